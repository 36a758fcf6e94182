from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score, roc_curve

from siamese_deploy.errors import InputDataError, IntegrityError
from siamese_deploy.metrics import (
    binary_cross_entropy,
    equal_error_rate,
    operating_point,
    roc_auc,
    verification_metrics,
)

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
    assert verification_metrics(np.array([0.5], np.float32), np.array([True]), threshold=0.6).accuracy == 0


def test_nan_is_an_error_never_a_number() -> None:
    with pytest.raises(IntegrityError, match="1 of 2 scores are NaN"):
        verification_metrics(np.array([math.nan, 0.5], np.float32), np.array([True, False]))


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


def test_no_threshold_separates_pairs_that_all_have_the_score_1() -> None:
    scores, is_same = np.ones(200, np.float32), np.arange(200) % 2 == 0
    with pytest.raises(InputDataError, match="score of 1"):
        operating_point(scores, is_same, 0.1)


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
