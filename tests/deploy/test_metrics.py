from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from siamese_deploy.errors import IntegrityError
from siamese_deploy.metrics import binary_cross_entropy, roc_auc, verification_metrics

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
