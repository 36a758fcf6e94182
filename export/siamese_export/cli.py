"""`siamese-export`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from siamese_deploy.bundle import MANIFEST, SIGNATURE, Bundle, read_bundle
from siamese_deploy.cli.command import PATH, SEED, Command
from siamese_deploy.cli.run_log import log_at_end
from siamese_deploy.durable_files import refuse_existing
from siamese_deploy.errors import UsageError, needs_extra, one_line
from siamese_deploy.signature import SigningKey
from siamese_export.sign import sign_bundle

if TYPE_CHECKING:
    from siamese_export.export import Exported


def _print_bundle(path: Path) -> None:
    bundle = read_bundle(path)
    manifest = bundle.manifest
    height, width = manifest.preprocess.size_hw
    lines = {
        "bundle digest": bundle.digest,
        "manifest digest": json.loads((path / MANIFEST).read_bytes())["manifest_sha256"],
        "signed": "yes (whose signature it is, --verify_key tells)" if (path / SIGNATURE).exists() else "no",
        "backbone": f"{manifest.backbone}, {len(bundle.backbone):,} bytes; head {len(bundle.head):,} bytes",
        "embedding": f"{manifest.embedding_dim} numbers",
        "precision": f"{manifest.precision}, head fp32",
        "pictures": f"{width} x {height} px, {manifest.preprocess.resize}",
        "batch": f"{manifest.batch[0]} to {manifest.batch[2]}, best {manifest.batch[1]}",
        "threshold": f"{manifest.threshold:.4f} ({manifest.threshold_origin})",
        "created": manifest.created_utc,
    }
    for name, value in lines.items():
        click.echo(one_line(f"{name + ':':17}{value}"))
    for name, facts in manifest.about.items():
        if not isinstance(facts, dict):
            click.echo(one_line(f"{name + ':':17}{facts}"))
            continue
        click.echo(one_line(f"{name}:"))
        for key, value in _leaves(facts):
            click.echo(one_line(f"  {key + ':':31} {value}"))


def _leaves(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, f"{value:.6g}" if isinstance(value, float) else "none" if value is None else value


@click.command(cls=Command, name="siamese-export")
@click.option("-c", "--checkpoint", type=PATH, help="Checkpoint file (.pth), ours or the reference's.")
@click.option("-o", "--out_path", type=PATH, help="Bundle folder to make; must not exist, but for --force.")
@click.option("--force", is_flag=True, help="Replace the bundle OUT_PATH once the new one is complete.")
@click.option(
    "--val_path", type=PATH, help="Validation pictures, for parity, accuracy and threshold; without it, drawn ones."
)
@click.option(
    "--target_far",
    type=float,
    help="False accept rate on VAL_PATH that the threshold is for.  [default: 0.001, if there are pairs enough; else "
    "the threshold is the reference's 0.5; below fp32 there must be]",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    help="Of the backbone's numbers; below fp32 the bundle is refused if it costs more than the limits below.",
)
@click.option("--target", type=click.Choice(["cpu", "tensorrt"]), help="What int8 is for.  [default: cpu]")
@click.option("--calibration", type=PATH, help="Training pictures, from which int8 takes the range of its values.")
@click.option(
    "--calibration_images", type=click.IntRange(1), help="How many of them, equally many a class.  [default: 256]"
)
@click.option("--seed", type=SEED, help="Which of them.  [default: 1]")
@click.option("--max_auc_drop", type=click.FloatRange(0, 1), help="Largest fall of ROC AUC.  [default: 0.002]")
@click.option(
    "--max_tar_drop",
    type=click.FloatRange(0, 1),
    help="Largest fall of the true accept rate at TARGET_FAR.  [default: 0.01]",
)
@click.option(
    "--max_far_growth",
    type=click.FloatRange(1),
    help="Largest growth of the false accept rate at fp32's threshold, as a factor.  [default: 1.25]",
)
@click.option(
    "--triton",
    type=PATH,
    help="Also write this folder, a model repository for Triton Inference Server; must not exist. With --bundle, of "
    "that bundle.",
)
@click.option(
    "--sign", type=PATH, metavar="KEY", help="Sign the bundle with this private key (Ed25519, PEM); see docs/bundle.md."
)
@click.option("--bundle", type=PATH, help="For --triton and --sign: a bundle that was exported before.")
@click.option("--show", type=PATH, help="Print what is in this bundle instead.")
def main(
    checkpoint: Path | None,
    out_path: Path | None,
    force: bool,
    val_path: Path | None,
    target_far: float | None,
    precision: str,
    target: str | None,
    calibration: Path | None,
    triton: Path | None,
    sign: Path | None,
    bundle: Path | None,
    show: Path | None,
    **numbers: float | None,
) -> None:
    """Export a checkpoint as a bundle of two ONNX graphs, after proving that they answer like PyTorch."""
    chosen = _chosen_options()
    if show:
        _refuse_others(chosen, {"show"})
        return _print_bundle(show)
    if triton:
        refuse_existing(triton)
        _refuse_inside(triton, bundle or out_path)
    key = SigningKey(sign) if sign else None
    if bundle:
        _refuse_others(chosen, {"bundle", "triton", "sign"})
        return _use_bundle(bundle, triton, key)
    if checkpoint is None or out_path is None:
        raise UsageError(
            "expected --checkpoint FILE and --out_path FOLDER, or --show BUNDLE, or --bundle BUNDLE with "
            "--triton FOLDER or --sign KEY (see --help)"
        )
    given = {name: value for name, value in numbers.items() if value is not None}
    for name, value in given.items():
        if not math.isfinite(value):
            raise UsageError(f"--{name}: expected a finite number, got {value}")
    _refuse_without_effect(chosen, precision)
    with needs_extra("export"):
        import onnxscript  # noqa: F401  torch loads it late; if it is missing, say so before any work

        from siamese_export.accuracy import Limits
        from siamese_export.export import Calibration, export_checkpoint
    drawn = {"images": given.get("calibration_images"), "seed": given.get("seed")}
    exported = export_checkpoint(
        checkpoint,
        out_path,
        val_path,
        precision=f"int8-{target or 'cpu'}" if precision == "int8" else precision,
        calibration=Calibration(calibration, **_present(drawn)) if calibration else None,
        target_far=target_far,
        limits=Limits(**{name[len("max_") :]: value for name, value in given.items() if name in _LIMITS}),
        replace=force,
        key=key,
        say=lambda line: click.echo(one_line(line), err=True),
    )
    log_at_end(
        bundle=str(out_path), bundle_digest=exported.bundle.digest, manifest_digest=exported.bundle.manifest_digest
    )
    _print_exported(exported)
    click.echo(one_line(f"bundle: {out_path}"))
    if triton:
        _write_triton(exported.bundle, triton)


_LIMITS = ("max_auc_drop", "max_tar_drop", "max_far_growth")


def _present(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _chosen_options() -> list[str]:
    """Names of the options on the command line, in the order of --help."""
    context = click.get_current_context()
    return [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]


def _refuse_others(chosen: list[str], allowed: set[str]) -> None:
    others = [name for name in chosen if name not in allowed]
    if others:
        raise UsageError(f"--{others[0]} has no effect together with --{' and --'.join(sorted(allowed))}")


def _refuse_without_effect(chosen: list[str], precision: str) -> None:
    for name in chosen:
        if precision != "int8" and name in ("target", "calibration", "calibration_images", "seed"):
            raise UsageError(f"--{name} has an effect with --precision int8 only")
        if precision == "fp32" and name in _LIMITS:
            raise UsageError(f"--{name} has an effect with --precision fp16 and int8 only")


def _refuse_inside(triton: Path, bundle: Path | None) -> None:
    """A bundle with anything else in it is no bundle any more."""
    if bundle and triton.resolve().is_relative_to(bundle.resolve()):
        raise UsageError(f"--triton {triton}: is inside the bundle {bundle}; choose another folder")


def _print_exported(exported: Exported) -> None:
    from siamese_export.parity import BATCH_SIZES

    parity, accuracy, manifest = exported.parity, exported.accuracy, exported.bundle.manifest
    batches = ", ".join(map(str, BATCH_SIZES))
    click.echo(one_line(f"parity on {parity.pictures} pictures ({parity.source}), batches {batches}:"))
    click.echo(f"  backbone    relative embedding error {parity.relative_embedding_error:.1e}")
    click.echo(f"  head        max score difference     {parity.head_score_difference:.1e}")
    click.echo(f"  end to end  max score difference     {parity.end_to_end_score_difference:.1e}")
    if accuracy:
        click.echo(one_line(f"accuracy on all {accuracy.pairs:,} pairs of {accuracy.source}:"))
        click.echo(f"  ROC AUC {accuracy.roc_auc:.4f}  equal error rate {accuracy.equal_error_rate:.4f}")
        rates = (
            f"{far}: {'too few pairs' if tar is None else f'{tar:.4f}'}" for far, tar in accuracy.tar_at_far.items()
        )
        click.echo(f"  true accept rate at false accept rate  {'  '.join(rates)}")
    if exported.speed is not None:
        click.echo(f"speed of the backbone on this CPU: {exported.speed:.2f} times fp32's")
        if exported.speed < 1:
            click.echo("recommended: --precision fp32, which is faster here")
    click.echo(one_line(f"threshold: {manifest.threshold:.4f} ({manifest.threshold_origin})"))
    click.echo(f"bundle digest: {exported.bundle.digest}")
    click.echo(f"manifest digest: {exported.bundle.manifest_digest}")


def _use_bundle(path: Path, triton: Path | None, key: SigningKey | None) -> None:
    if triton is None and key is None:
        raise UsageError("--bundle BUNDLE goes with --triton FOLDER or --sign KEY")
    bundle = read_bundle(path)
    if key is not None:
        digest = sign_bundle(path, key)
        click.echo(one_line(f"signed: {path}, manifest digest {digest}"))
    if triton is not None:
        _write_triton(bundle, triton)


def _write_triton(bundle: Bundle, folder: Path) -> None:
    from siamese_export.triton import write_repository

    write_repository(bundle, folder)
    click.echo(one_line(f"Triton model repository: {folder}"))
