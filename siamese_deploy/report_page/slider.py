"""Counts of scores -> what the threshold slider of the report page needs: about 1,000 thresholds, counted exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from siamese_deploy.metrics.score_counts import ScoreCounts
from siamese_deploy.report_page.charts import Axes
from siamese_deploy.report_page.format import far_power

_EVENLY, _BY_SHARE = 400, 180
_DECIMALS = 6


def stated_thresholds(metrics: dict[str, Any]) -> list[tuple[str, float]]:
    """The thresholds that metrics.json names, with a short name for each; the one in use is the first."""
    stated = [("in use", metrics["threshold"])]
    stated += [(f"FAR {far_power(float(far))}", t) for far, t in metrics["threshold_at_far"].items()]
    stated += [("EER", metrics["eer_threshold"]), ("best accuracy", metrics["best_accuracy_threshold"])]
    return [(label, float(threshold)) for label, threshold in stated if threshold is not None]


def slider_data(
    metrics: dict[str, Any], counts: ScoreCounts, marks: Sequence[tuple[str, Axes]]
) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """What the script reads, and the positions of `stated_thresholds` on the slider.

    The script finds under `thresholds` the threshold at each position, ascending; under `same` and `different` the
    pairs of either kind with at least that score; under `start` the position of the threshold in use; under `marks`
    where the charts' marks stand (x, y): "histogram" by threshold, "roc" by FAR and TAR, "det" by FAR and FRR.
    """
    stated = stated_thresholds(metrics)
    thresholds = _thresholds(counts, [threshold for _, threshold in stated])
    first = np.searchsorted(counts.scores, thresholds, side="left")
    same, different = counts.same_accepted[first], counts.different_accepted[first]
    positions = [(label, int(np.searchsorted(thresholds, threshold))) for label, threshold in stated]
    start = positions[0][1]
    # Of a histogram these are near, but metrics.json says what is shown at the threshold in use.
    same[start] = metrics["at_threshold"]["true_accepts"]
    different[start] = metrics["at_threshold"]["false_accepts"]
    tar, far = same / max(1, counts.same_pairs), different / max(1, counts.different_pairs)
    places = {"histogram": (thresholds, np.ones_like(thresholds)), "roc": (far, tar), "det": (far, 1 - tar)}
    data = {
        "thresholds": thresholds.tolist(),
        "same": same.tolist(),
        "different": different.tolist(),
        "start": start,
        "marks": {name: [np.round(values, 1).tolist() for values in axes.at(*places[name])] for name, axes in marks},
    }
    return data, positions


def _thresholds(counts: ScoreCounts, exactly: list[float]) -> npt.NDArray[np.float64]:
    """Ascending and distinct: evenly over [0, 1], by equal shares of both kinds, by equal ratios of the FAR."""
    found = [np.linspace(0, 1, _EVENLY + 1)]
    for kind in (counts.same, counts.different):
        rising = np.cumsum(kind)
        if len(rising) and rising[-1]:
            n = int(rising[-1])
            ranks = np.concatenate([np.linspace(0, n - 1, _BY_SHARE), n - np.geomspace(1, n, _BY_SHARE)])
            found.append(counts.scores[np.searchsorted(rising, ranks, side="right").clip(0, len(rising) - 1)])
    near = np.unique(np.round(np.concatenate(found), _DECIMALS))
    near = near[~np.isin(near, np.round(exactly, _DECIMALS))]  # one position for what reads alike
    return np.unique(np.concatenate([near, np.array(exactly, np.float64)]))
