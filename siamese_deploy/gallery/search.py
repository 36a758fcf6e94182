"""Whom a question fits best: the order of the answers, and the rows worth asking first.

The head's score of one picture with all rows mostly follows a straight line through the few directions in which the
rows differ. `Shortcut` keeps every row's place along these. A question scores a sample of rows, takes from it the
direction in which the scores rise, and sorts all rows along that; then the head scores the foremost, the vectors
themselves, until twice as many change nothing. The shortcut decides which rows are scored, never a score.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from siamese_deploy.gallery.records import Rows
from siamese_deploy.gallery.store import Snapshot
from siamese_deploy.verifier import Embeddings, Scores

COORDINATES = 32
"""Float32 numbers kept of a row."""
SAMPLE_ROWS = 4096
SMALLEST_ROWS = 8 * SAMPLE_ROWS
"""Fewer are scored all."""
SHARES = (1 / 32, 1 / 16, 1 / 8)
"""Of the rows, scored one after the other; if the last one still changes the answer, all are."""
SETTLED_IDENTITIES = 10
"""That have to stay the same, if no more are asked for."""


@dataclass(frozen=True)
class Candidate:
    name: str
    score: float
    """In [0, 1], over the identity's pictures: the largest or the mean."""
    pictures: int
    """How many of them were compared."""


def best_identities(rows: Rows, scores: Scores, per_identity: str, number: int) -> list[Candidate]:
    """The `number` best of the identities that have a score, best first, equal ones by name.

    Args:
        scores: (n_rows,) float32, NaN for rows that do not count.
    """
    counted = np.flatnonzero(np.isfinite(scores))
    identities, scores = rows.identities[counted], scores[counted]
    counts = np.bincount(identities, minlength=len(rows.names))
    values: npt.NDArray[np.floating]
    if per_identity == "max":
        values = np.full(len(rows.names), -np.inf, np.float32)  # of the scores' type: NumPy is ten times as fast
        np.maximum.at(values, identities, scores)
    else:
        values = np.full(len(rows.names), -np.inf)
        np.divide(np.bincount(identities, scores, len(rows.names)), counts, out=values, where=counts > 0)
    best = np.flatnonzero(counts)
    if number < len(best):
        last = np.partition(values[best], len(best) - number)[len(best) - number]
        best = best[values[best] >= last]
    best = best[np.argsort(-values[best], kind="stable")[:number]]  # stable: equal scores in the order of the names
    return [Candidate(rows.names[k], float(values[k]), int(counts[k])) for k in best]


@dataclass(frozen=True)
class Shortcut:
    change: int
    """Of the rows that it is of."""
    coordinates: npt.NDArray[np.float32]
    """(n_rows, at most COORDINATES), each with a variance of one over the rows."""
    sound: npt.NDArray[np.bool_]
    """(n_rows,) whose vectors were the enrolled ones."""
    sample: Embeddings
    """(at most SAMPLE_ROWS, dim)."""
    sample_coordinates: npt.NDArray[np.float32]

    @classmethod
    def of(cls, snapshot: Snapshot) -> Shortcut:
        """Reads every vector once."""
        n_rows = len(snapshot.rows.slots)
        chosen = np.sort(np.random.RandomState(0).choice(n_rows, min(SAMPLE_ROWS, n_rows), replace=False))
        parts = [vectors.copy() for _, vectors in snapshot.sound_vectors_of(chosen)]
        sample = np.concatenate([np.empty((0, snapshot.vectors.dim), np.float32), *parts])
        basis = _principal_axes(sample)
        coordinates = np.zeros((n_rows, basis.shape[1]), np.float32)
        sound = np.zeros(n_rows, np.bool_)
        for row, vectors in snapshot.sound_vectors():
            coordinates[row] = vectors @ basis
            sound[row] = True
        return cls(snapshot.rows.change, coordinates, sound, sample, sample @ basis)

    def promise(self, sample_scores: Scores) -> npt.NDArray[np.float32]:
        """(n_rows,), higher for rows more likely to score high; -inf for those that were damaged.

        Least squares, as the coordinates are uncorrelated and alike in variance. Fitted to the ranks of the scores,
        the best weighing most: near 0 and 1 scores hardly differ.
        """
        n = len(sample_scores)
        target = np.empty(n, np.float32)
        target[np.argsort(-sample_scores, kind="stable")] = -np.log((np.arange(n) + 0.5) / n)
        promise: npt.NDArray[np.float32] = self.coordinates @ (self.sample_coordinates.T @ (target - target.mean()))
        promise[~self.sound] = -np.inf
        return promise


def _principal_axes(sample: Embeddings) -> npt.NDArray[np.float32]:
    """(dim, at most COORDINATES): onto the directions of most variance, each divided by its standard deviation."""
    if len(sample) < 2:
        return np.empty((sample.shape[1], 0), np.float32)
    variances, axes = np.linalg.eigh(np.atleast_2d(np.cov(sample.astype(np.float64), rowvar=False)))
    keep = np.flatnonzero(variances > 1e-9 * variances[-1])[-COORDINATES:]
    return np.ascontiguousarray(axes[:, keep] / np.sqrt(variances[keep]), np.float32)


def score_likely_rows(
    snapshot: Snapshot, shortcut: Shortcut, score: Callable[[Embeddings], Scores], number: int
) -> tuple[Scores, int] | None:
    """Scores of the rows that matter, and how many rows were found damaged; None if all rows have to be scored.

    (n_rows,) float32, NaN for rows that were not scored or are damaged. Of the `number` best identities found, every
    sound row is scored.
    """
    rows = snapshot.rows
    promise = shortcut.promise(score(shortcut.sample))
    n_rows = len(promise)
    counts = [max(1, int(share * n_rows)) for share in SHARES]
    least = np.partition(promise, [n_rows - count for count in counts])
    scores = np.full(n_rows, np.nan, np.float32)
    tried = np.zeros(n_rows, np.bool_)

    def try_rows(wanted: npt.NDArray[np.bool_]) -> None:
        new = np.flatnonzero(wanted & shortcut.sound & ~tried)
        tried[new] = True
        for row, vectors in snapshot.sound_vectors_of(new):
            scores[row] = score(vectors)

    number = min(max(number, SETTLED_IDENTITIES), len(rows.names))
    before: list[tuple[str, float]] = []
    for count in counts:
        try_rows(promise >= least[n_rows - count])
        best = [(candidate.name, candidate.score) for candidate in best_identities(rows, scores, "max", number)]
        if len(best) == number and best == before:
            try_rows(np.isin(rows.identities, [bisect_left(rows.names, name) for name, _ in best]))
            return scores, int((tried & np.isnan(scores)).sum() + (~shortcut.sound).sum())
        before = best
    return None
