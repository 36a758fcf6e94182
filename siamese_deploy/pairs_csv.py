"""pairs.csv: one row for each scored pair, in pair order; written here, and read again for comparisons.

Columns left, right (paths relative to the picture folder), is_same (0 or 1), score (the shortest decimal text that
reads back as the same float32) and decision (1: accepted as same). A path that a spreadsheet would take for a formula
gets "./" before it, which names the same file.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from siamese_deploy.errors import IntegrityError
from siamese_deploy.evaluate import Evaluation, room_for_scores
from siamese_deploy.image_folder import SkippedFile
from siamese_deploy.metrics import accepted
from siamese_deploy.table_files import csv_bytes, harmless, open_text
from siamese_deploy.verifier import Scores

COLUMNS = ("left", "right", "is_same", "score", "decision")


def write_pairs_csv(file: Path, evaluation: Evaluation) -> None:
    names = [harmless(path) for path in evaluation.folder.paths]
    with file.open("wb") as out:
        out.write(csv_bytes([COLUMNS]))
        for pairs, scores in evaluation.chunks():
            decisions = accepted(scores, evaluation.metrics.threshold).astype(np.int64).tolist()
            rows = zip(
                (names[image] for image in pairs.left.tolist()),
                (names[image] for image in pairs.right.tolist()),
                pairs.is_same.astype(np.int64).tolist(),
                shortest_float32(scores),
                decisions,
                strict=True,
            )
            out.write(csv_bytes(rows))


def write_skipped_pairs(file: Path, evaluation: Evaluation) -> None:
    """Columns left, right, is_same: the pairs that were asked for and could not be scored."""
    paths = evaluation.folder.paths
    with file.open("wb") as out:
        out.write(csv_bytes([COLUMNS[:3]]))
        for pairs in evaluation.skipped_pairs():
            names = ([harmless(paths[image]) for image in side.tolist()] for side in (pairs.left, pairs.right))
            out.write(csv_bytes(zip(*names, pairs.is_same.astype(np.int64).tolist(), strict=True)))


def read_scores(file: Path, evaluation: Evaluation) -> Scores:
    """(n_pairs,) float32: the scores that an earlier evaluation of the same pairs wrote.

    Raises:
        InputDataError: no such file.
        EnvironmentFault: it may not be read.
        IntegrityError: it holds other pairs, or something that is no score.
    """
    names = [harmless(path) for path in evaluation.folder.paths]
    scores = room_for_scores(len(evaluation.pairs))
    try:
        with open_text(file, "the pairs.csv beside the metrics.json to compare with") as text:
            rows = csv.DictReader(text)
            n = 0
            for pairs, _ in evaluation.chunks():
                for left, right, same in zip(
                    pairs.left.tolist(), pairs.right.tolist(), pairs.is_same.tolist(), strict=True
                ):
                    row = next(rows)
                    if (row["left"], row["right"], row["is_same"]) != (names[left], names[right], str(int(same))):
                        raise ValueError("another pair")
                    scores[n] = float(row["score"])
                    n += 1
            if next(rows, None) is not None:
                raise ValueError("more pairs")
    except (ValueError, KeyError, TypeError, StopIteration, csv.Error) as error:
        raise IntegrityError(
            f"{file}: does not hold the pairs that its metrics.json speaks of; evaluate that model again"
        ) from error
    if not ((scores >= 0) & (scores <= 1)).all():
        raise IntegrityError(
            f"{file}: has scores that are NaN or outside [0, 1]; evaluate that model again", code="not-finite"
        )
    return scores


def skipped_csv(skipped: Sequence[SkippedFile]) -> bytes:
    """A CSV file of what was left out and why: columns path, reason, code."""
    return csv_bytes([("path", "reason", "code"), *((harmless(file.path), file.reason, file.code) for file in skipped)])


def shortest_float32(values: Scores) -> list[str]:
    """The decimal texts with the fewest digits that read back as the same float32."""
    return [str(value) for value in values]
