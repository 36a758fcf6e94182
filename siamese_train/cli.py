"""`siamese-train`, `siamese-train-eval`, `siamese-train-bench`. torch is imported after the options are parsed."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siamese_deploy.cli.bench import bench_into, open_bundles
from siamese_deploy.cli.bench_options import BenchOptions, bench_options
from siamese_deploy.cli.command import PATH, Command
from siamese_deploy.cli.eval import evaluate_into
from siamese_deploy.cli.evaluation_options import EvaluationOptions, evaluation_options
from siamese_deploy.cli.run_log import log_at_end
from siamese_deploy.errors import needs_extra, one_line
from siamese_train.config import TrainConfig

if TYPE_CHECKING:
    from siamese_deploy.bench import Contender, Settings
    from siamese_deploy.verifier import Verifier


class _TrainCommand(Command):
    """--help under the headings of TrainConfig's fields."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        of_name = {field.name: field.metadata["group"] for field in dataclasses.fields(TrainConfig)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record:
                groups.setdefault(of_name.get(parameter.name or "", "Other"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


def _option(field: dataclasses.Field[Any]) -> click.Option:
    setting = field.metadata
    required = field.default is dataclasses.MISSING
    kinds: dict[str, Any] = {"Path": PATH, "int": int, "float": float, "str": str, "bool": bool}
    kind = click.Choice(setting["choices"]) if setting.get("choices") else kinds[str(field.type)]
    # Said but not set, because it depends on --pairing: what is not given stays away from TrainConfig.
    default = _shown(field.default)
    if setting.get("batch") is not None:
        default += f"; batch pairing: {_shown(setting['batch'])}"
    return click.Option(
        [f"--{field.name}", *([setting["short"]] if setting["short"] else [])],
        type=kind,
        required=required,
        is_flag=True if field.type == "bool" else None,
        help=setting["help"] + ("" if required or field.type == "bool" else f"  [default: {default}]"),
    )


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@click.command(
    cls=_TrainCommand, name="siamese-train", params=[_option(field) for field in dataclasses.fields(TrainConfig)]
)
def train_main(**settings: Any) -> None:
    """Train a Siamese network; writes best.pth, epoch_<n>.pth, last.pth and a TensorBoard summary.

    Defaults are the reference scripts'; --pairing batch brings another recipe, which learns faster. With torchrun,
    several processes train one network: torchrun --nproc_per_node 4 -m siamese_train OPTIONS.
    """
    config = TrainConfig.with_recipe(**{name: value for name, value in settings.items() if value is not None})
    with needs_extra("train"):
        from siamese_train.train import train
    best = train(config)
    if os.environ.get("RANK", "0") == "0":
        click.echo(one_line(f"best checkpoint: {best}"))


@click.command(cls=Command, name="siamese-train-eval")
@evaluation_options
@click.option("-c", "--checkpoint", required=True, type=PATH, help="Checkpoint file (.pth).")
@click.option("--device", default="auto", help="auto (CUDA if PyTorch has it, else CPU), cpu, cuda or cuda:N.")
def train_eval_main(options: EvaluationOptions, checkpoint: Path, device: str) -> None:
    """Evaluate a checkpoint with PyTorch: report.html, metrics.json, pairs.csv and one picture per pair."""

    def open_verifier() -> Verifier:
        with needs_extra("train"):
            from siamese_train.checkpoint import read_checkpoint
            from siamese_train.torch_verifier import TorchVerifier, choose_device
        verifier = TorchVerifier.from_checkpoint(read_checkpoint(checkpoint), choose_device(device))
        click.echo(f"provider: {verifier.provider} (pytorch)")
        log_at_end(provider=verifier.provider)
        return verifier

    def open_bundle(folder: Path) -> Verifier:
        from siamese_deploy.runtime import OnnxVerifier

        return OnnxVerifier(folder)

    evaluate_into(open_verifier, open_bundle, options)


@click.command(cls=Command, name="siamese-train-bench")
@click.argument("bundles", type=PATH, nargs=-1, metavar="[BUNDLE...]")
@bench_options
@click.option("-c", "--checkpoint", required=True, type=PATH, help="Checkpoint file (.pth).")
def train_bench_main(bundles: tuple[Path, ...], options: BenchOptions, checkpoint: Path) -> None:
    """Measure PyTorch with a checkpoint, and each BUNDLE, as siamese bench does.

    PyTorch's rows are eager, eager in channels-last, and torch.compile; on CUDA, with --provider cuda or tensorrt, also
    automatic mixed precision. The exit codes are those of siamese bench.
    """

    def open_contenders(settings: Settings) -> list[Contender]:
        with needs_extra("train"):
            from siamese_train.bench import held_against, torch_contenders
            from siamese_train.checkpoint import read_checkpoint
        read = read_checkpoint(checkpoint)
        contenders, evaluated = torch_contenders(read, settings)
        return contenders + [held_against(read, evaluated, one) for one in open_bundles(bundles, options, settings)]

    bench_into(open_contenders, options, libraries=("torch", "torchvision"))
