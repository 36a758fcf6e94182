"""Two models on the same pairs: what changed, whether that can be chance, and which decisions flipped."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from siamese_deploy.embedding import SCORE_CHUNK_PAIRS
from siamese_deploy.errors import InputDataError, IntegrityError
from siamese_deploy.evaluate import Evaluation, counted, resample
from siamese_deploy.metrics import accepted, metrics_of_counts
from siamese_deploy.metrics.bootstrap import Difference, Replicates, paired_difference
from siamese_deploy.metrics_file import read_metrics
from siamese_deploy.pairs_csv import read_scores, shortest_float32
from siamese_deploy.table_files import csv_bytes, harmless

FORMAT = "siamese-comparison/1"


@dataclass(frozen=True)
class Change:
    """One figure of both models; `difference` is after - before."""

    name: str
    before: float
    after: float
    difference: Difference | None
    """None where the classes are too few to say."""


@dataclass(frozen=True)
class Comparison:
    before: Evaluation
    after: Evaluation
    before_digest: str
    """Digest of the model compared with."""
    changes: tuple[Change, ...]
    flipped: npt.NDArray[np.int64]
    """(n_flipped,) indices of the pairs that the two models decide differently, each at its own threshold."""
    now_right: int
    """Of the flipped, those that the later model decides rightly."""

    @property
    def auc_drop(self) -> float | None:
        before, after = self.before.metrics.roc_auc, self.after.metrics.roc_auc
        return None if before is None or after is None else before - after

    def content(self) -> dict[str, Any]:
        """For comparison.json."""
        return {
            "format": FORMAT,
            "pair_digest": self.after.pair_digest,
            "before": self.before_digest,
            "changes": {
                change.name: {
                    "before": change.before,
                    "after": change.after,
                    "difference": change.difference and asdict(change.difference),
                }
                for change in self.changes
            },
            "flipped": len(self.flipped),
            "flipped_now_right": self.now_right,
            "flipped_now_wrong": len(self.flipped) - self.now_right,
        }

    def write_flips(self, file: Path) -> None:
        """The flipped pairs: pair (row in pairs.csv, from 0), left, right, is_same, score_before, score_after."""
        paths = self.after.folder.paths
        with file.open("wb") as out:
            out.write(csv_bytes([("pair", "left", "right", "is_same", "score_before", "score_after")]))
            for numbers in np.array_split(self.flipped, len(self.flipped) // SCORE_CHUNK_PAIRS + 1):
                pairs = self.after.pairs.take(numbers)
                columns = (
                    numbers.tolist(),
                    [harmless(paths[image]) for image in pairs.left.tolist()],
                    [harmless(paths[image]) for image in pairs.right.tolist()],
                    pairs.is_same.astype(np.int64).tolist(),
                    shortest_float32(self.before.scores[numbers]),
                    shortest_float32(self.after.scores[numbers]),
                )
                out.write(csv_bytes(zip(*columns, strict=True)))

    def table(self) -> list[str]:
        """Lines for people."""
        lines = [f"{'':18}{'before':>9}{'after':>9}{'change':>10}   95 % interval          p"]
        for change in self.changes:
            d = change.difference
            spread = f"[{d.low:+.4f}, {d.high:+.4f}]   {d.p_value:.3f}" if d else "too few classes to say"
            figures = f"{change.before:9.4f}{change.after:9.4f}{change.after - change.before:+10.4f}"
            lines.append(f"{change.name:18}{figures}   {spread}")
        lines.append(
            f"decisions flipped: {len(self.flipped):,} of {len(self.after.pairs):,} "
            f"({self.now_right:,} now right, {len(self.flipped) - self.now_right:,} now wrong)"
        )
        return lines


def metrics_file_of(path: Path) -> Path:
    """`path` may be the file, or the folder that an evaluation was written into."""
    return path / "metrics.json" if path.is_dir() else path


def read_earlier(path: Path, evaluation: Evaluation) -> tuple[Evaluation, str]:
    """An earlier evaluation of the same pairs, from its metrics.json (or the folder with it), and its model's digest.

    Raises:
        InputDataError: it is not there, or is one of other pairs.
        IntegrityError: it is damaged.
    """
    file = metrics_file_of(path)
    content = read_metrics(file)
    if content["pair_digest"] != evaluation.pair_digest:
        raise InputDataError(
            f"{file}: is an evaluation of other pairs (digest {content['pair_digest'][:12]}..., expected "
            f"{evaluation.pair_digest[:12]}...); evaluate both on the same folder with the same --pairs and --seed",
            code="other-pairs",
        )
    threshold = content.get("threshold")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise IntegrityError(f"{file}: has no threshold in [0, 1]; evaluate that model again")
    scores = read_scores(file.with_name("pairs.csv"), evaluation)
    counts = counted(scores, evaluation.pairs)
    metrics = metrics_of_counts(counts, threshold=threshold)
    earlier = replace(evaluation, scores=scores, counts=counts, metrics=metrics)
    return earlier, str(content.get("model_digest", ""))


def compare(before: Evaluation, after: Evaluation, before_digest: str, after_spread: Replicates) -> Comparison:
    """Both must be evaluations of the same pairs.

    Significance is that of a paired bootstrap: both models meet the same resampled classes.

    Raises:
        InputDataError: they are not of the same pairs.
    """
    if before.pair_digest != after.pair_digest:
        raise InputDataError(
            "the two models were not evaluated on the same pairs (a picture that only one of them could read?); "
            "use --strict to see which",
            code="other-pairs",
        )
    before_spread = resample(before)
    figures = (figures_of(before), figures_of(after))
    changes = tuple(
        Change(name, figures[0][name], value, paired_difference(before_spread, after_spread, name))
        for name, value in figures[1].items()
        if name in figures[0]
    )
    flipped, now_right = _flips(before, after)
    return Comparison(before, after, before_digest, changes, flipped, now_right)


def _flips(before: Evaluation, after: Evaluation) -> tuple[npt.NDArray[np.int64], int]:
    found, now_right, start = [np.empty(0, np.int64)], 0, 0
    for pairs, scores in after.chunks():
        earlier = accepted(before.scores[start : start + len(pairs)], before.metrics.threshold)
        later = accepted(scores, after.metrics.threshold)
        here = np.flatnonzero(earlier != later)
        found.append(start + here)
        now_right += int((later[here] == pairs.is_same[here]).sum())
        start += len(pairs)
    return np.concatenate(found), now_right


def figures_of(evaluation: Evaluation) -> dict[str, float]:
    """The figures that have an interval, under their names in `Replicates`."""
    metrics = evaluation.metrics
    figures = {
        "accuracy": metrics.accuracy,
        "roc_auc": metrics.roc_auc,
        "average_precision": metrics.average_precision,
        "eer": metrics.equal_error_rate.rate if metrics.equal_error_rate else None,
    }
    figures |= {f"tar_at_far/{far:g}": point.tar if point else None for far, point in metrics.tar_at_far.items()}
    return {name: value for name, value in figures.items() if value is not None}
