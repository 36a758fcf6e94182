from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    log_loss,
    matthews_corrcoef,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from siamese_deploy.errors import InputDataError, IntegrityError
from siamese_deploy.metrics import (
    FALSE_ACCEPT_RATES,
    VerificationMetrics,
    accepted,
    binary_cross_entropy,
    equal_error_rate,
    fold_accuracy,
    one_shot_accuracy,
    operating_point,
    roc_auc,
    verification_metrics,
)
from siamese_deploy.metrics.decisions import Decisions

# Few distinct values, so that ties are common.
scored = st.lists(st.tuples(st.integers(0, 12).map(lambda n: n / 12), st.booleans()), min_size=2, max_size=60)


def split(rows: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([r[0] for r in rows], np.float32), np.array([r[1] for r in rows])


@given(scored)
def test_auc_and_loss_agree_with_scikit_learn(rows: list[tuple[float, bool]]) -> None:
    scores, is_same = split(rows)
    if is_same.all() or not is_same.any():
        assert roc_auc(scores, is_same) is None
    else:
        assert roc_auc(scores, is_same) == pytest.approx(roc_auc_score(is_same, scores), abs=1e-12)
    inside = scores.clip(0.01, 0.99).astype(np.float32)
    expected = log_loss(is_same, inside.astype(np.float64), labels=[False, True])
    assert binary_cross_entropy(inside, is_same) == pytest.approx(expected, abs=1e-9)


def test_a_confident_mistake_costs_100_as_in_torch() -> None:
    loss = binary_cross_entropy(np.array([0, 1, 1, 0], np.float32), np.array([True, False, True, False]))
    assert loss == 50.0


def test_decision_is_score_at_least_threshold() -> None:
    metrics = verification_metrics(np.array([0.5, 0.49, 0.5], np.float32), np.array([True, False, False]))
    assert (metrics.pairs, metrics.same_pairs) == (3, 1)
    assert metrics.accuracy == pytest.approx(2 / 3)
    stricter = verification_metrics(np.array([0.5], np.float32), np.array([True]), threshold=0.6)
    assert (stricter.accuracy, stricter.at_threshold.accuracy) == (1, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.01, 1.0000002])
def test_nan_is_an_error_never_a_number(bad: float) -> None:
    with pytest.raises(IntegrityError, match=r"1 of 2 scores are NaN or outside \[0, 1\]"):
        verification_metrics(np.array([bad, 0.5], np.float32), np.array([True, False]))


def test_no_pairs_is_an_error() -> None:
    with pytest.raises(InputDataError, match="no pair"):
        verification_metrics(np.empty(0, np.float32), np.empty(0, bool))


def test_a_threshold_that_is_no_float32_compares_as_float64_everywhere() -> None:
    just_below = np.array([0.385], np.float32)  # 0.38499999...
    assert float(just_below[0]) < 0.385
    assert not accepted(just_below, 0.385).any()
    assert accepted(just_below, float(just_below[0])).all()
    assert (just_below >= 0.385).all()  # what NumPy would say
    metrics = verification_metrics(just_below, np.array([True]), threshold=0.385)
    assert metrics.at_threshold == Decisions(true_accepts=0, false_accepts=0, true_rejects=0, false_rejects=1)


def at(scores: np.ndarray, is_same: np.ndarray, threshold: float) -> tuple[float, float]:
    """FAR and TAR by counting."""
    accepted = scores.astype(np.float64) >= threshold
    return float(accepted[~is_same].mean()), float(accepted[is_same].mean())


many = st.lists(st.tuples(st.integers(0, 30).map(lambda n: n / 31), st.booleans()), min_size=60, max_size=200)


@given(many, st.sampled_from([0.2, 0.25, 0.5, 0.9]))
def test_the_operating_point_is_the_best_that_keeps_the_rate(rows: list[tuple[float, bool]], far: float) -> None:
    scores, is_same = split(rows)
    if is_same.all() or not is_same.any() or (~is_same).sum() < 10 / far:
        with pytest.raises(InputDataError, match="needs"):
            operating_point(scores, is_same, far)
        return
    point = operating_point(scores, is_same, far)
    assert (point.far, point.tar) == pytest.approx(at(scores, is_same, point.threshold))
    assert point.far <= far
    # no lower threshold that decides otherwise about any pair keeps the rate
    lower = scores[scores < point.threshold]
    if len(lower):
        assert at(scores, is_same, float(lower.max()))[0] > far
    # and no score lies at the threshold itself, where rounding would decide
    assert not np.isclose(scores, point.threshold, atol=1e-3).any()


def test_a_rate_needs_enough_different_pairs() -> None:
    scores, is_same = np.linspace(0, 0.9, 1000, dtype=np.float32), np.arange(1000) == 999
    assert operating_point(scores, is_same, 0.0101).far <= 0.0101
    with pytest.raises(InputDataError, match=r"0\.01 needs 1,000 different pairs .* got 999 and 1"):
        operating_point(scores, is_same, 0.01)


def test_a_rate_allows_the_whole_number_of_pairs_that_it_means() -> None:
    scores, is_same = np.linspace(0, 0.9, 101, dtype=np.float32), np.arange(101) == 100
    assert 0.29 * 100 < 29  # as float64
    assert operating_point(scores, is_same, 0.29).far == 0.29


def test_no_threshold_separates_pairs_that_all_have_the_score_1() -> None:
    scores, is_same = np.ones(200, np.float32), np.arange(200) % 2 == 0
    with pytest.raises(InputDataError, match="score of 1"):
        operating_point(scores, is_same, 0.1)


def test_equal_scores_are_worth_a_guess() -> None:
    """As of a network that gives every picture the same embedding."""
    scores, is_same = np.full(400, 0.7, np.float32), np.arange(400) % 2 == 0
    metrics = verification_metrics(scores, is_same)
    point = metrics.tar_at_far[0.1]
    assert metrics.equal_error_rate is not None
    assert (metrics.roc_auc, metrics.equal_error_rate.rate) == (0.5, 0.5)
    assert point == operating_point(scores, is_same, 0.1)
    assert point is not None
    assert point.tar == 0  # nobody is let in
    assert not (scores >= point.threshold).any()


@given(many)
def test_equal_error_rate_agrees_with_scikit_learns_curve(rows: list[tuple[float, bool]]) -> None:
    scores, is_same = split(rows)
    point = equal_error_rate(scores, is_same)
    if is_same.all() or not is_same.any():
        assert point is None
        return
    assert point
    assert (point.far, point.tar) == pytest.approx(at(scores, is_same, point.threshold))
    far, tar, _ = roc_curve(is_same, scores, drop_intermediate=False)
    assert abs(point.far - (1 - point.tar)) == pytest.approx(np.abs(far[1:] - (1 - tar[1:])).min(), abs=1e-12)


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Ties, extreme imbalance, constant scores, one kind of pair only, and anything between."""
    random = np.random.RandomState(seed)
    kind = seed % 5
    n_same, n_different = (1, 10_000) if kind == 0 and seed % 10 else (int(n) for n in random.randint(0, 60, 2))
    if kind == 4:
        n_same, n_different = max(n_same, 1), 150 + n_different  # enough for a FAR of 0.1
    is_same = random.permutation(np.arange(max(n_same + n_different, 1)) < n_same)
    scores = (random.random_sample(len(is_same)) + 0.3 * is_same) / 1.3
    levels = [1000, 7, 1, 3, 40][kind]  # 1: constant
    scores = (np.floor(scores * levels) + 0.5) / (levels + 1)
    threshold = float(np.float32(random.choice(scores))) if seed % 2 else random.random_sample()
    return scores.astype(np.float32), is_same, threshold


def test_agrees_with_scikit_learn_on_200_cases() -> None:
    seen_both = seen_tar = 0
    for seed in range(200):
        scores, is_same, threshold = random_case(seed)
        metrics = verification_metrics(scores, is_same, threshold=threshold)
        as_float64 = scores.astype(np.float64)
        decided = as_float64 >= threshold
        expected = {
            "accuracy": accuracy_score(is_same, decided),
            "precision": precision_score(is_same, decided, zero_division=np.nan),
            "recall": recall_score(is_same, decided, zero_division=np.nan),
            "f1": f1_score(is_same, decided, zero_division=np.nan),
            "mcc": matthews_corrcoef(is_same, decided) if 0 < decided.mean() < 1 and 0 < is_same.mean() < 1 else np.nan,
        }
        for name, value in expected.items():
            ours = getattr(metrics.at_threshold, name)
            assert (ours is None) == np.isnan(value), (seed, name)
            assert ours is None or ours == pytest.approx(value, abs=1e-9), (seed, name)
            assert (f"at_threshold/{name}" in metrics.not_computed) == (ours is None)
        tr, fa, fr, ta = confusion_matrix(is_same, decided, labels=[False, True]).ravel()
        assert metrics.at_threshold == Decisions(ta, fa, tr, fr)
        assert metrics.calibration.brier == pytest.approx(brier_score_loss(is_same, as_float64, pos_label=1), abs=1e-9)
        assert metrics.loss == pytest.approx(log_loss(is_same, as_float64, labels=[False, True]), abs=1e-9)
        assert metrics.accuracy == pytest.approx(accuracy_score(is_same, as_float64 >= 0.5), abs=1e-9)
        if is_same.all() or not is_same.any():
            assert metrics.roc_auc is metrics.average_precision is metrics.equal_error_rate is None
            assert {"roc_auc", "average_precision", "eer", "tar_at_far/0.1"} <= set(metrics.not_computed)
            continue
        seen_both += 1
        assert metrics.roc_auc == pytest.approx(roc_auc_score(is_same, scores), abs=1e-9)
        assert metrics.average_precision == pytest.approx(average_precision_score(is_same, scores), abs=1e-9)
        far, tar, _ = roc_curve(is_same, as_float64, drop_intermediate=False)
        right = tar * is_same.sum() + (1 - far) * (~is_same).sum()
        assert metrics.best_accuracy.accuracy == pytest.approx(right.max() / len(scores), abs=1e-9)
        for rate, point in metrics.tar_at_far.items():
            if (~is_same).sum() * rate < 10 - 1e-9:
                assert point is None
                assert "different pairs" in metrics.not_computed[f"tar_at_far/{rate:g}"]
                continue
            seen_tar += 1
            assert point
            assert point.tar == pytest.approx(tar[far <= rate + 1e-12].max(), abs=1e-9)
    assert seen_both > 120
    assert seen_tar > 60


def test_the_loss_is_that_of_torch_to_the_last_digits() -> None:
    for seed in range(20):
        scores, is_same, _ = random_case(seed)
        scores[0] = seed % 2  # a logarithm of 0
        truth = np.where(is_same, scores.astype(np.float64), 1 - scores.astype(np.float64))
        with np.errstate(divide="ignore"):
            expected = float(np.mean(-np.maximum(np.log(truth), -100)))
        assert binary_cross_entropy(scores, is_same) == pytest.approx(expected, rel=1e-12)


def test_one_kind_of_pair_leaves_the_other_figures() -> None:
    metrics = verification_metrics(np.array([0.2, 0.7], np.float32), np.array([True, True]), threshold=0.5)
    assert metrics.at_threshold.accuracy == metrics.at_threshold.recall == 0.5
    assert (metrics.at_threshold.precision, metrics.at_threshold.far, metrics.at_threshold.mcc) == (1, None, None)
    assert metrics.not_computed["roc_auc"] == "needs pairs of both kinds, got 2 same and 0 different"
    assert set(metrics.tar_at_far) == set(FALSE_ACCEPT_RATES)
    assert not any(metrics.tar_at_far.values())
    assert metrics.calibration.brier == pytest.approx((0.8**2 + 0.3**2) / 2)


@given(many)
def test_best_accuracy_is_reached_at_its_threshold_and_at_no_lower_one(rows: list[tuple[float, bool]]) -> None:
    scores, is_same = split(rows)
    best = verification_metrics(scores, is_same).best_accuracy

    def accuracy(threshold: float) -> float:
        return float(np.mean(accepted(scores, threshold) == is_same))

    assert accuracy(best.threshold) == pytest.approx(best.accuracy)
    others = np.unique(np.concatenate([[0.0], scores.astype(np.float64)]))
    assert all(accuracy(t) < best.accuracy - 1e-12 for t in others[others < best.threshold - 0.02])
    assert all(accuracy(t) <= best.accuracy + 1e-12 for t in others)


def test_no_threshold_rejects_a_score_of_1() -> None:
    best = verification_metrics(np.ones(4, np.float32), np.zeros(4, bool)).best_accuracy
    assert best == (0, 0)
    assert verification_metrics(np.full(4, 0.9, np.float32), np.zeros(4, bool)).best_accuracy == pytest.approx(
        (0.95, 1)
    )


def test_the_reliability_curve_and_its_error() -> None:
    scores = np.array([0, 1 / 15, 0.0667, 0.95, 1, 1], np.float32)  # float32(1/15) lies above 1/15
    is_same = np.array([False, True, False, True, True, False])
    found = verification_metrics(scores, is_same).calibration
    assert [(bin.low, bin.pairs) for bin in found.bins] == [(0, 1), (1 / 15, 2), (14 / 15, 3)]
    assert [bin.same_share for bin in found.bins] == pytest.approx([0, 1 / 2, 2 / 3])
    gaps = [abs(bin.mean_score - bin.same_share) * bin.pairs for bin in found.bins]
    assert found.expected_calibration_error == pytest.approx(sum(gaps) / 6)
    edge = verification_metrics(np.array([0.2, 0.6], np.float32), is_same[:2]).calibration  # 3 / 15, 9 / 15
    assert [bin.low for bin in edge.bins] == pytest.approx([3 / 15, 9 / 15])  # both float32 lie above the edge
    assert verification_metrics(np.zeros(1, np.float32), is_same[:1]).calibration.bins[0].low == 0


def test_calibrated_scores_have_a_small_error_and_overconfident_ones_a_large_one() -> None:
    random = np.random.RandomState(0)
    probability = random.random_sample(20_000)
    is_same = random.random_sample(20_000) < probability

    def error(scores: np.ndarray) -> float:
        return verification_metrics(scores.astype(np.float32), is_same).calibration.expected_calibration_error

    assert error(probability) < 0.015
    assert error((probability > 0.5).astype(float)) > 0.2


def test_folds_choose_their_threshold_on_the_others() -> None:
    scores = np.array([0.1, 0.9, 0.1, 0.9, 0.1, 0.3], np.float32)
    is_same = np.array([False, True] * 3)
    fold = np.array([0, 0, 1, 1, 2, 2])
    found = fold_accuracy(scores, is_same, fold)
    # Of the first fold the others say: from 0.2 on; of the third: from 0.5 on, which rejects its same pair.
    assert found.thresholds == pytest.approx((0.2, 0.2, 0.5))
    assert found.accuracies == (1, 1, 0.5)
    assert found.mean == pytest.approx(5 / 6)
    assert found.standard_error == pytest.approx(np.std([1, 1, 0.5], ddof=1) / math.sqrt(3))
    with pytest.raises(InputDataError, match="two folds"):
        fold_accuracy(scores, is_same, np.zeros(6, np.int64))


def test_one_shot_shares_the_credit_of_a_tie() -> None:
    scores = np.array([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.3, 0.4, 0.4], [0.7, 0.7, 0.7]], np.float32).reshape(-1)
    is_same = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]], bool).reshape(-1)
    assert one_shot_accuracy(scores, is_same, 3) == pytest.approx((1 + 1 / 2 + 0 + 1 / 3) / 4)
    with pytest.raises(InputDataError, match="episodes of 3 pairs"):
        one_shot_accuracy(scores, np.ones(12, bool), 3)
    with pytest.raises(InputDataError, match="episodes of 5 pairs"):
        one_shot_accuracy(scores, is_same, 5)


def test_exact_figures_have_no_bounds() -> None:
    metrics: VerificationMetrics = verification_metrics(*random_case(1)[:2])
    assert metrics.bounds == {}
