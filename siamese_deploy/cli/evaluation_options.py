"""Options that siamese-eval and siamese-train-eval share: which pairs, what is drawn, and the limits to meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siamese_deploy.cli.command import PATH, SEED
from siamese_deploy.errors import AccuracyError, UsageError

if TYPE_CHECKING:
    from siamese_deploy.comparison import Comparison
    from siamese_deploy.image_folder import ImageFolder
    from siamese_deploy.metrics import VerificationMetrics
    from siamese_deploy.pairs import PairList


DEFAULT_SEED = 1
DEFAULT_WAYS = 20
DEFAULT_EPISODES = 400


def _images_to_draw(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | int | None:
    if value is None or value in ("all", "errors", "none"):
        return value
    if value.isascii() and value.isdigit():
        return int(value)
    raise click.BadParameter(f"{value!r}: expected all, errors, none or a number")


@dataclass(frozen=True)
class EvaluationOptions:
    val_path: Path
    out_path: Path
    pairs: str
    num_pairs: int | None
    protocol: str
    ways: int | None
    episodes: int | None
    seed: int | None
    images: str | int | None
    strict: bool
    compare: Path | None
    min_auc: float | None
    max_eer: float | None
    max_drop: float | None

    def check(self) -> None:
        """
        Raises:
            UsageError: options that exclude each other or have no effect, or a limit that is no number.
        """
        one_shot = self.protocol == "one-shot"
        asked = [self.pairs != "reference", self.num_pairs is not None, one_shot]
        if sum(asked) > 1:
            raise UsageError("--pairs, --num_pairs and --protocol one-shot: expected at most one of them")
        for name in ("ways", "episodes"):
            if not one_shot and getattr(self, name) is not None:
                raise UsageError(f"--{name}: expected with --protocol one-shot only")
        if self.seed is not None and not one_shot and self.num_pairs is None and self.pairs != "reference":
            raise UsageError(f"--seed: expected where pairs are drawn, not with --pairs {self.pairs}")
        for name in ("min_auc", "max_eer", "max_drop"):
            limit = getattr(self, name)
            if limit is not None and not 0 <= limit <= 1:  # click lets "nan" through its range
                raise UsageError(f"--{name} {limit}: expected a number from 0 to 1")
        if self.max_drop is not None and self.compare is None:
            raise UsageError("--max_drop: expected --compare with the evaluation or bundle that it is a drop from")

    def choose_pairs(self) -> tuple[ImageFolder, PairList, str]:
        """The folder, its pairs, and the name of their scheme."""
        from siamese_deploy.image_folder import scan_image_folder
        from siamese_deploy.pair_list import read_pair_list
        from siamese_deploy.pairs import balanced_pairs, every_pair, one_shot_pairs, sample_pairs

        if self.pairs not in ("reference", "all"):
            return *read_pair_list(Path(self.pairs), self.val_path), "file"
        folder = scan_image_folder(self.val_path)
        seed = DEFAULT_SEED if self.seed is None else self.seed
        if self.protocol == "one-shot":
            ways, episodes = self.ways or DEFAULT_WAYS, self.episodes or DEFAULT_EPISODES
            return folder, one_shot_pairs(folder, ways, episodes, seed), "one-shot"
        if self.num_pairs is not None:
            return folder, balanced_pairs(folder, self.num_pairs, seed), "balanced"
        if self.pairs == "all":
            return folder, every_pair(folder), "all"
        return folder, sample_pairs(folder, seed), "reference"

    def seed_of(self, scheme: str) -> int | None:
        """The seed, where the scheme draws."""
        return None if scheme in ("all", "file") else DEFAULT_SEED if self.seed is None else self.seed

    def check_earlier(self) -> None:
        """Whatever is wrong with --compare and can be told before anything is computed.

        Raises:
            InputDataError, IntegrityError: it is no evaluation of ours and no bundle.
        """
        from siamese_deploy.comparison import metrics_file_of
        from siamese_deploy.metrics_file import read_metrics

        if self.compare is not None and not (self.compare / "manifest.json").is_file():
            read_metrics(metrics_file_of(self.compare))

    def enforce(self, metrics: VerificationMetrics, comparison: Comparison | None) -> None:
        """
        Raises:
            AccuracyError: a limit is not met, or the figure that it limits is undefined.
        """
        equal = metrics.equal_error_rate
        limits = (
            ("--min_auc", "ROC AUC", metrics.roc_auc, self.min_auc, 1),
            ("--max_eer", "equal error rate", equal.rate if equal else None, self.max_eer, -1),
            ("--max_drop", "drop in ROC AUC", comparison.auc_drop if comparison else None, self.max_drop, -1),
        )
        missed = []
        for option, name, value, limit, sign in limits:
            # Written so that a figure that is missing or NaN never passes.
            if limit is not None and not (value is not None and sign * value >= sign * limit):
                shown = "undefined for these pairs" if value is None else f"{value:.6f}"
                missed.append(
                    f"{name} is {shown}, expected {'at least' if sign > 0 else 'at most'} {limit:g} ({option})"
                )
        if missed:
            raise AccuracyError(f"{'; '.join(missed)}; the results are in {self.out_path}")


_RATE = click.FloatRange(0, 1)
_OPTIONS = (
    click.option("-v", "--val_path", required=True, type=PATH, help="Folder: one sub-folder a class."),
    click.option("-o", "--out_path", required=True, type=PATH, help="Folder for report, metrics, pairs and pictures."),
    click.option(
        "--pairs",
        default="reference",
        metavar="reference|all|FILE",
        help="reference: each picture once, with a drawn partner. all: every two pictures. Or a list: a .csv file with "
        "the columns left, right, label, or a pairs.txt as of LFW.",
    ),
    click.option("--num_pairs", type=click.IntRange(2), help="So many drawn pairs instead, half of them same."),
    click.option(
        "--protocol",
        type=click.Choice(("verification", "one-shot")),
        default="verification",
        help="one-shot: which of --ways classes is this picture of, given one picture of each?",
    ),
    click.option("--ways", type=click.IntRange(2), help=f"Classes in an episode.  [default: {DEFAULT_WAYS}]"),
    click.option("--episodes", type=click.IntRange(1), help=f"Episodes of one-shot.  [default: {DEFAULT_EPISODES}]"),
    click.option("--seed", type=SEED, help=f"Seed of the pairs that are drawn.  [default: {DEFAULT_SEED}]"),
    click.option(
        "--images",
        callback=_images_to_draw,
        metavar="all|errors|none|N",
        help="Pairs to draw: all, errors, none, or the first N.  [default: all, of more than 5,000 none]",
    ),
    click.option("--strict", is_flag=True, help="Fail if a picture that is needed cannot be used."),
    click.option(
        "--compare",
        type=PATH,
        help="An earlier evaluation of the same pairs (its metrics.json) or another bundle: what changed?",
    ),
    click.option("--min_auc", type=_RATE, help="Fail with exit code 11 below this ROC AUC."),
    click.option("--max_eer", type=_RATE, help="Fail with exit code 11 above this equal error rate."),
    click.option("--max_drop", type=_RATE, help="Fail with exit code 11 if ROC AUC falls by more against --compare."),
)


def evaluation_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options; the command gets them as the keyword `options`."""

    @wraps(command)
    def with_options(**given: Any) -> None:
        names = EvaluationOptions.__dataclass_fields__
        options = EvaluationOptions(**{name: given.pop(name) for name in names})
        options.check()
        command(options=options, **given)

    for option in reversed(_OPTIONS):
        with_options = option(with_options)
    return with_options
