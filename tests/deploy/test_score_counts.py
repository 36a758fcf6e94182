from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siamese_deploy.errors import IntegrityError
from siamese_deploy.metrics import VerificationMetrics, accepted, metrics_of_counts
from siamese_deploy.metrics.score_counts import ScoreCounts, ScoreHistogram

AWKWARD = (0.0, -0.0, 1.0, 0.5, 1e-45, 1e-38, 2.0**-24, 1 - 2.0**-24, 1 - 2.0**-23, 0.5 - 2.0**-25, 0.5 + 2.0**-24)
value = st.one_of(
    st.floats(0, 1, width=32),
    st.sampled_from(AWKWARD),
    st.integers(0, 2000).map(lambda k: 0.3 + k * 2.0**-25),  # several scores in one bin
    st.integers(0, 2000).map(lambda k: 0.7 + k * 2.0**-24),
    st.integers(-40, 40).map(lambda k: 0.2 + k * 2.0**-26),  # on both sides of an edge of calibration bins
)
rows = st.lists(st.tuples(value, st.booleans(), st.integers(1, 40)), min_size=1, max_size=60)


def split(cases: list[tuple[float, bool, int]]) -> tuple[np.ndarray, np.ndarray]:
    repeats = [n for _, _, n in cases]
    return (
        np.repeat(np.array([s for s, _, _ in cases], np.float32), repeats),
        np.repeat(np.array([same for _, same, _ in cases]), repeats),
    )


def figures(metrics: VerificationMetrics) -> dict[str, float | None]:
    """Under the names of `bounds`."""
    equal, decisions = metrics.equal_error_rate, metrics.at_threshold
    return {
        "loss": metrics.loss,
        "accuracy": metrics.accuracy,
        "roc_auc": metrics.roc_auc,
        "average_precision": metrics.average_precision,
        "eer": equal and equal.rate,
        "best_accuracy": metrics.best_accuracy.accuracy,
        "calibration/brier": metrics.calibration.brier,
        "calibration/ece": metrics.calibration.expected_calibration_error,
        **{f"tar_at_far/{far:g}": point and point.tar for far, point in metrics.tar_at_far.items()},
        **{f"at_threshold/{n}": getattr(decisions, n) for n in ("accuracy", "precision", "recall", "f1", "mcc", "far")},
    }


@given(rows)
def test_counts_are_those_of_a_plain_count(cases: list[tuple[float, bool, int]]) -> None:
    scores, is_same = split(cases)
    counts = ScoreCounts.of(scores, is_same)
    expected: dict[float, list[int]] = {}
    for score, same in zip((scores + 0).tolist(), is_same.tolist(), strict=True):
        expected.setdefault(score, [0, 0])[same] += 1
    assert counts.scores.tolist() == sorted(expected)
    assert [list(pair) for pair in zip(counts.different, counts.same, strict=True)] == [
        expected[score] for score in sorted(expected)
    ]
    assert counts.same_pairs == is_same.sum()
    for k, score in enumerate(counts.scores):
        assert counts.same_accepted[k] == (scores[is_same] >= score).sum()
        assert counts.different_accepted[k] == (scores[~is_same] >= score).sum()
    assert counts.exact


@settings(deadline=None)
@given(rows, st.one_of(value, st.sampled_from([0.385, 0.30003])))
def test_streaming_agrees_with_exact_within_the_stated_bounds(
    cases: list[tuple[float, bool, int]], threshold: float
) -> None:
    scores, is_same = split(cases)
    histogram = ScoreHistogram()
    histogram.add(scores, is_same)
    streaming = metrics_of_counts(histogram.counts(), threshold=threshold)
    exact = metrics_of_counts(ScoreCounts.of(scores, is_same), threshold=threshold)
    true, found = figures(exact), figures(streaming)
    assert (streaming.pairs, streaming.same_pairs) == (exact.pairs, exact.same_pairs)
    for name, number in found.items():
        may_differ = name in ("at_threshold/precision", "at_threshold/f1", "at_threshold/mcc")  # defined or not
        if number is None or true[name] is None:
            assert may_differ or (number is None and true[name] is None), name
            continue
        assert streaming.bounds[name] >= 0
        assert abs(number - true[name]) <= streaming.bounds[name] + 1e-9, name
    assert set(streaming.bounds) == {name for name, number in found.items() if number is not None}


def test_a_streamed_threshold_gives_the_rates_that_are_stated_for_it() -> None:
    random = np.random.RandomState(0)
    for _ in range(40):
        is_same = random.random_sample(3000) < 0.2
        # within few bins of the histogram
        scores = (0.5 + random.random_sample(3000) * 2e-4 + 1e-5 * is_same).astype(np.float32)
        histogram = ScoreHistogram()
        histogram.add(scores, is_same)
        metrics = metrics_of_counts(histogram.counts())
        for far, point in metrics.tar_at_far.items():
            if point:
                assert point.far <= far
                assert np.mean(accepted(scores[~is_same], point.threshold)) == point.far
                assert np.mean(accepted(scores[is_same], point.threshold)) == point.tar


def differences(scores: np.ndarray, is_same: np.ndarray, threshold: float) -> dict[str, tuple[float, float]]:
    """Name -> how far the streaming figure is from the exact one, and the stated bound."""
    histogram = ScoreHistogram()
    histogram.add(scores, is_same)
    streaming = metrics_of_counts(histogram.counts(), threshold=threshold)
    exact = figures(metrics_of_counts(ScoreCounts.of(scores, is_same), threshold=threshold))
    return {
        name: (abs(number - exact[name]), streaming.bounds[name])  # type: ignore[operator]
        for name, number in figures(streaming).items()
        if number is not None and exact[name] is not None
    }


@pytest.mark.parametrize("around", [0.3, 0.2, 0.7])
def test_pairs_of_one_bin_in_any_order_stay_within_the_bounds(around: float) -> None:
    """Nearly all scores in one or two bins, so that the streaming figures are far off, and say so."""
    worst: dict[str, float] = {}
    for seed in range(8):
        random = np.random.RandomState(seed)
        scores = (around + random.randint(-250, 250, 1200) * 2.0**-26).astype(np.float32)
        scores[:20] = random.random_sample(20)
        is_same = (random.random_sample(1200) < 0.1) ^ (scores > np.median(scores)) ^ bool(seed % 2)  # or upside down
        for name, (difference, bound) in differences(scores, is_same, float(np.sort(scores)[400])).items():
            assert difference <= bound + 1e-9, (seed, name)
            worst[name] = max(worst.get(name, 0), difference)
    needed = {"roc_auc", "average_precision", "eer", "best_accuracy", "tar_at_far/0.1", "at_threshold/mcc", "loss"}
    assert min(worst[name] for name in needed) > 1e-9, worst


def test_the_bound_of_a_coefficient_that_may_be_undefined() -> None:
    """One bin of different pairs lies across the threshold; without any accepted there is no coefficient."""
    scores = np.array([0.1, 0.2, *(0.3 + np.arange(10) * 2.0**-25)], np.float32)
    is_same = np.arange(12) < 2
    defined = [differences(scores, is_same, float(scores[k])).get("at_threshold/mcc") for k in range(2, 12)]
    for difference, bound in filter(None, defined):
        assert difference <= bound + 1e-9
    assert sum(found is not None and found[0] > 0 for found in defined) >= 3


@given(rows)
@settings(deadline=None)
def test_bins_know_their_scores(cases: list[tuple[float, bool, int]]) -> None:
    scores, is_same = split(cases)
    histogram = ScoreHistogram()
    for k in range(0, len(scores), 7):  # in other pieces, from the last to the first
        histogram.add(scores[::-1][k : k + 7], is_same[::-1][k : k + 7])
    counts = histogram.counts()
    low, high = counts.ends
    assert not counts.exact
    assert (np.diff(counts.scores) > 0).all()
    assert (low <= counts.scores).all()
    assert (counts.scores <= high).all()
    assert (high[:-1] < low[1:]).all()
    assert (high - low <= np.minimum(low, 1 - high) * 2.0**-14 + 1e-40).all()
    values = np.sort(scores.astype(np.float64) + 0)
    assert np.isin(low, values).all()
    assert np.isin(high, values).all()
    bins = np.searchsorted(low, values, side="right") - 1
    assert (values <= high[bins]).all()
    assert np.bincount(bins, minlength=len(low)).tolist() == (counts.same + counts.different).tolist()
    mean = np.bincount(bins, values) / np.bincount(bins)
    np.testing.assert_allclose(counts.scores, mean, rtol=1e-12, atol=0)
    assert ((1 - counts.scores) <= (1 - mean) * (1 + 1e-12) + 1e-16).all()


def test_scores_of_a_coarse_network_stay_exact() -> None:
    """A network in half precision gives few distinct scores: each bin then holds one, and nothing is blurred."""
    random = np.random.RandomState(0)
    scores = random.random_sample(20_000).astype(np.float16).astype(np.float32)
    is_same = random.random_sample(20_000) < scores
    histogram = ScoreHistogram()
    histogram.add(scores, is_same)
    streaming, exact = metrics_of_counts(histogram.counts()), metrics_of_counts(ScoreCounts.of(scores, is_same))
    assert set(streaming.bounds.values()) == {0.0}
    assert figures(streaming) == figures(exact)


def test_the_bounds_are_small() -> None:
    random = np.random.RandomState(0)
    is_same = random.random_sample(200_000) < 0.1
    scores = (1 / (1 + np.exp(-random.standard_normal(200_000) * 2 - 3 * is_same))).astype(np.float32)
    histogram = ScoreHistogram()
    histogram.add(scores, is_same)
    metrics = metrics_of_counts(histogram.counts(), threshold=0.385)
    assert 0 < metrics.bounds["roc_auc"] < 1e-5
    assert max(metrics.bounds.values()) < 1e-3
    exact = metrics_of_counts(ScoreCounts.of(scores, is_same))
    assert metrics.roc_auc == pytest.approx(exact.roc_auc, abs=1e-6)
    assert metrics.loss == pytest.approx(exact.loss, abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-6, 1.0000002])
def test_a_histogram_refuses_what_is_no_score_and_counts_nothing_of_it(bad: float) -> None:
    histogram = ScoreHistogram()
    with pytest.raises(IntegrityError, match="1 of 3 scores are NaN or outside"):
        histogram.add(np.array([0.2, bad, 0.3], np.float32), np.array([True, False, True]))
    assert len(histogram.counts().scores) == 0
