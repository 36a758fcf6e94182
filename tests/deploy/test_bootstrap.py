from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import erf, sqrt

import numpy as np
import pytest

from siamese_deploy.metrics import VerificationMetrics, metrics_of_counts, verification_metrics
from siamese_deploy.metrics.bootstrap import ClassedScores, Replicates, bootstrap, paired_difference, replicates_for
from siamese_deploy.metrics.score_counts import ScoreCounts, ScoreHistogram

THRESHOLD = 0.385


class Data:
    """All pairs of made-up pictures, with scores between 0 and 1."""

    def __init__(self, classes: int, images: int, seed: int, *, effect: float = 0.8, shift: float = 2.0) -> None:
        random = np.random.RandomState(seed)
        labels = np.repeat(np.arange(classes), images)
        i, j = np.triu_indices(len(labels), 1)
        self.left, self.right = labels[i], labels[j]
        self.is_same = self.left == self.right
        of_same, of_different = effect * random.standard_normal((2, classes))
        latent = random.standard_normal(len(i)) + np.where(
            self.is_same, shift + of_same[self.left], of_different[self.left] + of_different[self.right]
        )
        self.scores = (1 / (1 + np.exp(-latent))).astype(np.float32)
        self.classes = classes

    @staticmethod
    def true_auc(effect: float = 0.8, shift: float = 2.0) -> float:
        return (1 + erf(shift / sqrt(2 + 3 * effect**2) / sqrt(2))) / 2

    def chunks(self, size: int = 1000) -> Iterator[ClassedScores]:
        for k in range(0, len(self.scores), size):
            here = slice(k, k + size)
            yield self.left[here], self.right[here], self.is_same[here], self.scores[here]

    def counts(self) -> ScoreCounts:
        return ScoreCounts.of(self.scores, self.is_same)

    def bootstrap(self, replicates: int = 200, seed: int = 1, size: int = 1000) -> Replicates:
        return bootstrap(
            lambda: self.chunks(size),
            self.counts(),
            self.classes,
            threshold=THRESHOLD,
            seed=seed,
            replicates=replicates,
        )


def figures(metrics: VerificationMetrics) -> dict[str, float | None]:
    equal = metrics.equal_error_rate
    return {
        "accuracy": metrics.accuracy,
        "roc_auc": metrics.roc_auc,
        "average_precision": metrics.average_precision,
        "eer": equal and equal.rate,
        **{f"tar_at_far/{far:g}": point and point.tar for far, point in metrics.tar_at_far.items()},
        **{f"at_threshold/{name}": getattr(metrics.at_threshold, name) for name in ("accuracy", "recall", "far")},
    }


@pytest.mark.parametrize("levels", [50, 10**7])  # few distinct scores, which get a bin each, and many
def test_a_replicate_is_the_metrics_of_the_resampled_pairs(levels: int) -> None:
    data = Data(classes=12, images=9, seed=3)
    data.scores = (np.round(data.scores.astype(np.float64) * levels) / levels).astype(np.float32)
    found = data.bootstrap(replicates=30)
    random = np.random.RandomState(1)
    for k in range(30):
        times = np.bincount((random.random_sample(12) * 12).astype(int), minlength=12)
        weight = np.where(data.is_same, times[data.left], times[data.left] * times[data.right])

        def of_copies(same_copies: int, different_copies: int) -> dict[str, float | None]:
            copies = weight * np.where(data.is_same, same_copies, different_copies)  # noqa: B023
            return figures(
                verification_metrics(
                    np.repeat(data.scores, copies), np.repeat(data.is_same, copies), threshold=THRESHOLD
                )
            )

        exact, weighted = of_copies(1, 1), of_copies(11, 12)  # 11 / 12 restores the shares of the two kinds
        for name in ("accuracy", "at_threshold/accuracy", "average_precision"):
            exact[name] = weighted[name]
        for name, value in exact.items():
            if name in ("tar_at_far/0.001", "tar_at_far/0.0001"):
                continue
            tolerance = 1e-12
            if levels > 50 and name in ("roc_auc", "average_precision", "eer"):
                tolerance = 2e-3
            elif levels > 50 and name.startswith("tar_at_far"):
                tolerance = 1e-2  # one of the 432 same pairs, of a class drawn four times
            assert found.values[name][k] == pytest.approx(value, abs=tolerance), (k, name)


def test_intervals_hold_the_figures_of_the_data() -> None:
    data = Data(classes=30, images=8, seed=0)
    found = data.bootstrap(replicates=300)
    for name, value in figures(metrics_of_counts(data.counts(), threshold=THRESHOLD)).items():
        interval = found.interval(name)
        if value is None:
            assert interval is None
            assert found.undefined(name) == 300
            continue
        assert interval, name
        low, high = interval
        assert low < value < high, name
        assert found.undefined(name) == 0


def pair_bootstrap(data: Data, random: np.random.RandomState) -> tuple[float, float]:
    """The naive way: pairs resampled as if they were independent."""
    counts = data.counts()
    same, different = (
        random.multinomial(kind.sum(), kind / kind.sum(), size=200) for kind in (counts.same, counts.different)
    )
    below = np.cumsum(different, axis=1) - different / 2
    low, high = np.percentile((same * below).sum(axis=1) / (same.sum(1) * different.sum(1)), (2.5, 97.5))
    return float(low), float(high)


def test_the_interval_covers_the_truth_as_often_as_it_says_and_resampled_pairs_do_not() -> None:
    truth, covered, naively_covered, wider = Data.true_auc(), 0, 0, []
    random = np.random.RandomState(0)
    for seed in range(100):
        data = Data(classes=20, images=4, seed=seed)
        data.scores = (np.floor(data.scores * 256) / 256).astype(np.float32)
        interval = data.bootstrap().interval("roc_auc")
        assert interval
        low, high = interval
        covered += low <= truth <= high
        naive_low, naive_high = pair_bootstrap(data, random)
        naively_covered += naive_low <= truth <= naive_high
        wider.append((high - low) / (naive_high - naive_low))
    assert 85 <= covered
    assert naively_covered < 80
    assert np.mean(wider) > 1.3


def test_the_same_pairs_give_the_same_replicates_whatever_the_chunks() -> None:
    data = Data(classes=10, images=6, seed=1)
    one, other = data.bootstrap(size=7), data.bootstrap(size=10**6)
    for name, values in one.values.items():
        assert values.tobytes() == other.values[name].tobytes()
    assert data.bootstrap(seed=2).values["roc_auc"].tobytes() != one.values["roc_auc"].tobytes()
    # Fewer replicates are the first of more.
    assert data.bootstrap(replicates=50).values["eer"].tolist() == one.values["eer"][:50].tolist()


def test_the_classes_drawn_are_frozen() -> None:
    """Whole-number data: each class has 1 same pair at a score of its own, so recall tells the classes drawn."""
    n = 8
    scores = (np.arange(2 * n) % n / n).astype(np.float32)
    classes = np.arange(2 * n) % n
    is_same = np.arange(2 * n) < n
    found = bootstrap(
        lambda: [(classes, np.where(is_same, classes, (classes + 1) % n), is_same, scores)],
        ScoreCounts.of(scores, is_same),
        n,
        threshold=0.5,
        replicates=64,
    )
    accepted = np.round(found.values["at_threshold/recall"] * n).astype(int)
    assert hashlib.sha256(bytes(accepted.tolist())).hexdigest()[:16] == "ea85ed5b8816cd73", accepted.tolist()


def test_streaming_counts_serve_as_well() -> None:
    data = Data(classes=15, images=12, seed=4)
    histogram = ScoreHistogram()
    histogram.add(data.scores, data.is_same)
    exact = data.bootstrap()
    streaming = bootstrap(data.chunks, histogram.counts(), data.classes, threshold=THRESHOLD, replicates=200)
    for name, values in exact.values.items():
        np.testing.assert_allclose(streaming.values[name], values, atol=5e-3, err_msg=name)


def test_cells_that_do_not_fit_are_added_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(classes=15, images=6, seed=4)
    whole = data.bootstrap()
    monkeypatch.setattr("siamese_deploy.metrics.bootstrap._HELD_CELLS", 500)
    for name, values in data.bootstrap(size=200).values.items():
        assert values.tobytes() == whole.values[name].tobytes()


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_few_classes_give_no_interval_and_say_why(classes: int) -> None:
    """Of two classes every draw that has a different pair is the same draw: an interval without width."""
    data = Data(classes=classes, images=6, seed=0)
    found = bootstrap(data.chunks, ScoreCounts.of(data.scores, data.is_same), classes, threshold=0.5)
    assert found.interval("accuracy") is None
    assert found.reason
    assert f"at least 4 classes, got {classes}" in found.reason
    assert paired_difference(found, found, "accuracy") is None


def test_intervals_of_four_classes_have_a_width_and_hold_the_figure() -> None:
    for seed in range(10):
        data = Data(classes=4, images=6, seed=seed)
        counts = ScoreCounts.of(data.scores, data.is_same)
        found = bootstrap(data.chunks, counts, 4, threshold=0.5)
        metrics = metrics_of_counts(counts)
        for name in ("accuracy", "roc_auc", "average_precision"):
            interval = found.interval(name)
            assert interval
            assert interval[0] < getattr(metrics, name) < interval[1]


def test_same_pairs_of_two_folders_weigh_as_different_ones_do() -> None:
    """Lists from files may call pictures of two folders the same (camera A, camera B)."""
    left = np.repeat(np.arange(0, 10, 2), 20)
    right = left + 1
    is_same = np.tile([True, False], 50)
    scores = np.full(100, 0.1, np.float32)  # all different pairs right, all same ones wrong
    found = bootstrap(lambda: [(left, right, is_same, scores)], ScoreCounts.of(scores, is_same), 10, threshold=0.5)
    defined = found.values["accuracy"][~np.isnan(found.values["accuracy"])]
    assert np.allclose(defined, 0.5)


def test_replicates_without_a_same_pair_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 classes only one has a same pair: (2/3)^3 of the replicates have none."""
    monkeypatch.setattr("siamese_deploy.metrics.bootstrap.MIN_CLASSES", 3)
    left, right = np.array([0, 0, 0, 1]), np.array([0, 1, 2, 2])
    scores, is_same = np.array([0.9, 0.4, 0.6, 0.5], np.float32), left == right
    found = bootstrap(
        lambda: [(left, right, is_same, scores)], ScoreCounts.of(scores, is_same), 3, threshold=0.5, replicates=1000
    )
    share = found.undefined("roc_auc") / 1000
    assert share == pytest.approx((2 / 3) ** 3 + (1 / 3) ** 3, abs=0.05)  # or no different one
    assert found.undefined("average_precision") == found.undefined("eer") == found.undefined("roc_auc")
    assert found.interval("roc_auc") == (1, 1)
    assert found.interval("tar_at_far/0.1") is None
    # Different pairs of the first two classes alone: fewer than half of the draws have both.
    left, right = np.array([0, 1, 2, 0]), np.array([0, 1, 2, 1])
    rarely = bootstrap(
        lambda: [(left, right, left == right, scores)], ScoreCounts.of(scores, left == right), 3, threshold=0.5
    )
    assert 500 < rarely.undefined("roc_auc") < 620
    assert rarely.interval("roc_auc") is None
    assert rarely.interval("at_threshold/recall")
    left, right = np.array([0, 0, 0, 1]), np.array([0, 1, 2, 2])
    only_different = bootstrap(
        lambda: [(left[1:], right[1:], is_same[1:], scores[1:])],
        ScoreCounts.of(scores[1:], is_same[1:]), 3, threshold=0.5, replicates=100,
    )  # fmt: skip
    assert only_different.interval("roc_auc") is None
    assert only_different.interval("at_threshold/recall") is None
    assert only_different.interval("accuracy") is not None


def test_no_threshold_rejects_scores_of_1() -> None:
    data = Data(classes=8, images=8, seed=0)
    data.scores[~data.is_same] = 1
    assert data.bootstrap().interval("tar_at_far/0.1") is None
    data.scores[~data.is_same] = 0.999
    assert data.bootstrap().interval("tar_at_far/0.1") is not None


def test_a_better_model_is_told_from_an_equal_one() -> None:
    before = Data(classes=20, images=5, seed=5)
    better, noisy = Data(classes=20, images=5, seed=5, shift=2.8), Data(classes=20, images=5, seed=5)
    noise = np.random.RandomState(0).standard_normal(len(noisy.scores)) * 1e-3
    noisy.scores = (noisy.scores + noise).clip(0, 1).astype(np.float32)
    runs = {name: data.bootstrap() for name, data in (("before", before), ("better", better), ("noisy", noisy))}

    gain = paired_difference(runs["before"], runs["better"], "roc_auc")
    assert gain
    assert 0 < gain.low < gain.high
    assert gain.p_value == 2 / 201
    loss = paired_difference(runs["better"], runs["before"], "roc_auc")
    assert loss
    assert (loss.low, loss.high, loss.p_value) == pytest.approx((-gain.high, -gain.low, gain.p_value))
    # Paired, the difference is known far better than either figure.
    interval = runs["before"].interval("roc_auc")
    assert interval
    assert gain.high - gain.low < interval[1] - interval[0]

    itself = paired_difference(runs["before"], runs["before"], "eer")
    assert itself
    assert (itself.low, itself.high, itself.p_value) == (0, 0, 1)
    same = paired_difference(runs["before"], runs["noisy"], "roc_auc")
    assert same
    assert same.p_value > 0.05
    assert same.low < 0 < same.high
    assert paired_difference(runs["before"], runs["better"], "tar_at_far/0.0001") is None


def test_only_runs_of_the_same_resampled_classes_are_paired() -> None:
    data = Data(classes=6, images=4, seed=0)
    for other in (data.bootstrap(seed=2), data.bootstrap(replicates=100), Data(7, 4, 0).bootstrap()):
        with pytest.raises(ValueError, match="cannot be paired"):
            paired_difference(data.bootstrap(), other, "roc_auc")


def test_the_number_of_replicates_follows_from_the_number_of_pairs() -> None:
    assert [replicates_for(n) for n in (0, 303_810, 10**6, 2 * 10**6, 10**8)] == [1000, 1000, 1000, 500, 200]
    assert replicates_for(10**8, 50) == 50
