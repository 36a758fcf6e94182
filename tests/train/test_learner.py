"""What one step does: which pairs, which weights, which learning rate."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siamese_deploy.demo_data import draw_character
from siamese_train.config import TrainConfig
from siamese_train.data import Batch
from siamese_train.learner import Learner, harder, learning_rate_at, pair_indices, pair_weights
from siamese_train.model import InputNormalisation, SiameseNetwork
from siamese_train.processes import Processes

CONFIG = TrainConfig.with_recipe(
    train_path=Path("t"), val_path=Path("v"), out_path=Path("o"), backbone="shufflenet_v2_x0_5", image_size=32
)
IN_BATCH = TrainConfig.with_recipe(
    train_path=Path("t"), val_path=Path("v"), out_path=Path("o"), backbone="squeezenet1_1", image_size=32,
    pairing="batch", warmup_epochs=0,
)  # fmt: skip


def batch_of(labels: list[int]) -> Batch:
    drawn = [np.asarray(draw_character(label, i).resize((32, 32))) for i, label in enumerate(labels)]
    return Batch(torch.from_numpy(np.stack(drawn)), torch.tensor(labels), [])


def learner_for(config: TrainConfig, n_classes: int = 4) -> Learner:
    torch.manual_seed(0)
    model = SiameseNetwork(config.backbone, config.image_size, config.embedding_dim)
    return Learner(model, config, n_classes, 10, Processes(torch.device("cpu")))


def test_reference_pairs_are_left_and_right_halves_and_in_a_batch_all() -> None:
    left, right = pair_indices([6], "reference")
    assert (left.tolist(), right.tolist()) == ([0, 1, 2], [3, 4, 5])
    left, right = pair_indices([4, 2], "reference")  # of two processes
    assert (left.tolist(), right.tolist()) == ([0, 1, 4], [2, 3, 5])
    left, right = pair_indices([3, 2], "batch")
    assert list(zip(left.tolist(), right.tolist(), strict=True)) == list(combinations(range(5), 2))


@given(st.lists(st.booleans(), min_size=1, max_size=50), st.floats(0, 5))
@settings(deadline=None)
def test_same_and_different_pairs_weigh_equally_much(kinds: list[bool], power: float) -> None:
    is_same = torch.tensor(kinds)
    scores = torch.linspace(0.01, 0.99, len(kinds))
    weights = harder(pair_weights(is_same), is_same, scores, power)
    assert float(weights.sum()) == pytest.approx(len(kinds), rel=1e-4)
    if len(set(kinds)) == 2:
        assert float(weights[is_same].sum()) == pytest.approx(len(kinds) / 2, rel=1e-4)
        different = weights[~is_same]
        assert bool((different.diff() >= -1e-6).all())  # scores rise, so do the weights


def test_hard_negatives_weigh_by_their_score() -> None:
    is_same = torch.tensor([True, False, False])
    weights = harder(pair_weights(is_same), is_same, torch.tensor([0.5, 0.2, 0.6]), 2.0)
    assert weights[2] / weights[1] == pytest.approx(9.0, rel=1e-4)
    assert weights[0] == 1.5


@pytest.mark.parametrize("config", [CONFIG, IN_BATCH], ids=["reference", "batch"])
def test_the_loss_is_binary_cross_entropy_over_the_pairs(config: TrainConfig) -> None:
    """Against the network called as the reference scripts call it; without dropout, so that both see the same."""
    labels = [0, 0, 1, 1, 2, 3]
    batch = batch_of(labels)
    learner = learner_for(config)
    for module in learner.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    images = InputNormalisation()(batch.inputs)
    pairs = [(0, 3), (1, 4), (2, 5)] if config is CONFIG else list(combinations(range(6), 2))
    left, right = map(list, zip(*pairs, strict=True))
    learner.model.train()
    with torch.no_grad():
        scores = learner.model(images[left], images[right])[:, 0]
    is_same = torch.tensor([labels[a] == labels[b] for a, b in pairs])
    losses = torch.nn.functional.binary_cross_entropy(scores, is_same.float(), reduction="none")
    right_ones = ((scores >= 0.5) == is_same).float()
    if config is CONFIG:
        expected, accuracy = losses.mean(), right_ones.mean()
    else:
        expected = (losses[is_same].mean() + losses[~is_same].mean()) / 2
        accuracy = (right_ones[is_same].mean() + right_ones[~is_same].mean()) / 2
    fresh = learner_for(config)
    for module in fresh.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    result = fresh.learn(batch, 0, 0)
    assert result
    assert (result.n_pairs, result.n_images) == (len(pairs), 6)
    assert float(result.loss_sum) / len(pairs) == pytest.approx(float(expected), abs=1e-5)
    assert float(result.correct) / len(pairs) == pytest.approx(float(accuracy), abs=1e-6)


def test_a_batch_with_fewer_than_two_pairs_is_passed_over() -> None:
    for config, labels in ((CONFIG, [0, 1]), (IN_BATCH, [0, 1]), (IN_BATCH, [0])):
        learner = learner_for(config)
        before = {key: value.clone() for key, value in learner.model.state_dict().items()}
        assert learner.learn(batch_of(labels), 0, 0) is None
        assert all(torch.equal(value, before[key]) for key, value in learner.model.state_dict().items())
    empty = Batch(torch.empty((0, 1, 1, 3), dtype=torch.uint8), torch.empty(0, dtype=torch.int64), [])
    assert learner_for(CONFIG).learn(empty, 0, 0) is None


def test_batches_of_one_kind_of_pair_are_learnt_from() -> None:
    for labels in ([0, 0, 0], [0, 1, 2]):
        result = learner_for(IN_BATCH).learn(batch_of(labels), 0, 0)
        assert result
        assert torch.isfinite(result.loss_sum)


def test_the_identity_classifier_learns_and_is_no_part_of_the_network() -> None:
    learner = learner_for(IN_BATCH)
    assert learner.identity is not None
    before = learner.identity.weight.detach().clone()
    keys = set(learner.model.state_dict())
    learner.learn(batch_of([0, 0, 1, 1]), 0, 0)
    assert not torch.equal(learner.identity.weight, before)
    assert set(learner.validated_model.state_dict()) == keys == set(SiameseNetwork("squeezenet1_1", 32).state_dict())
    assert learner_for(CONFIG).identity is None


def test_dropout_depends_on_the_place_in_the_run_alone() -> None:
    batch = batch_of([0, 0, 1, 1, 2, 2])

    def loss(epoch: int, step: int, seed: int = 1) -> float:
        learner = learner_for(replace(CONFIG, seed=seed))
        torch.seed()  # whatever was drawn before
        result = learner.learn(batch, epoch, step)
        assert result
        return float(result.loss_sum)

    assert loss(3, 4) == loss(3, 4)
    assert len({loss(3, 4), loss(3, 5), loss(4, 4), loss(3, 4, seed=2)}) == 4


def test_a_large_batch_gives_the_same_gradient_bit_for_bit() -> None:
    """Many pairs share each picture, and the threads that add up its gradient must not race."""
    gradients = []
    for _ in range(6):
        learner = learner_for(replace(IN_BATCH, image_size=32))
        learner.learn(batch_of([label for label in range(4) for _ in range(12)]), 0, 0)
        gradients.append(torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None]))
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)


def test_learning_rates() -> None:
    config = replace(IN_BATCH, learning_rate=1.0, epochs=10, warmup_epochs=2.0)
    rates = [learning_rate_at(step, 5, config) for step in range(50)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[30] == pytest.approx(0.5)
    assert rates == rates[:11] + sorted(rates[11:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert {learning_rate_at(step, 5, CONFIG) for step in (0, 7, 10**6)} == {1e-4}
    learner = learner_for(replace(IN_BATCH, warmup_epochs=1.0))
    learner.learn(batch_of([0, 0, 1, 1]), 0, 3)
    assert {group["lr"] for group in learner.optimizer.param_groups} == {
        learning_rate_at(3, 10, replace(IN_BATCH, warmup_epochs=1.0))
    }


def test_weight_decay_spares_biases_and_norms() -> None:
    learner = learner_for(replace(IN_BATCH, weight_decay=0.1))
    decayed, spared = learner.optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert min(parameter.ndim for parameter in decayed["params"]) >= 2
    assert max(parameter.ndim for parameter in spared["params"]) == 1
    assert len(learner_for(CONFIG).optimizer.param_groups) == 1


def test_gradients_are_clipped() -> None:
    learner = learner_for(replace(CONFIG, clip_norm=1e-3))
    learner.learn(batch_of([0, 1, 2, 0, 1, 3]), 0, 0)
    gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
    assert float(torch.stack([g.norm() for g in gradients]).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_the_average_follows_the_weights() -> None:
    learner = learner_for(replace(IN_BATCH, ema=0.5))
    batch = batch_of([0, 0, 1, 1])
    name = "cls_head.5.weight"
    learner.learn(batch, 0, 0)
    average = learner.model.state_dict()[name].clone()  # of one step: that one
    assert torch.equal(learner.validated_model.state_dict()[name], average)
    for step in (1, 2):
        learner.learn(batch, 0, step)
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * learner.model.state_dict()[name]
    assert torch.allclose(learner.validated_model.state_dict()[name], average, atol=1e-7)
    assert not torch.equal(learner.validated_model.state_dict()[name], learner.model.state_dict()[name])
    running = "cls_head.2.running_mean"
    assert not torch.equal(learner.validated_model.state_dict()[running], learner.model.state_dict()[running])
    assert int(learner.validated_model.state_dict()["cls_head.2.num_batches_tracked"]) == 3


def test_the_scale_of_half_precision_gradients_is_kept() -> None:
    config = replace(IN_BATCH, amp="fp16")
    learner, fresh = learner_for(config), learner_for(config)
    learner.learn(batch_of([0, 0, 1, 1]), 0, 0)
    kept = learner.state()
    assert fresh.state()["scaler"] != kept["scaler"]
    fresh.restore("last.pth", learner.model.state_dict(), learner.optimizer.state_dict(), kept)
    assert fresh.state()["scaler"] == kept["scaler"]


def test_frozen_batchnorm_keeps_its_statistics() -> None:
    config = replace(IN_BATCH, backbone="shufflenet_v2_x0_5", freeze_batchnorm=True)
    learner = learner_for(config)
    name = "backbone.conv1.1.running_mean"
    before = learner.model.state_dict()[name].clone()
    learner.learn(batch_of([0, 0, 1, 1]), 0, 0)
    assert torch.equal(learner.model.state_dict()[name], before)
    learner = learner_for(replace(config, freeze_batchnorm=False))
    learner.learn(batch_of([0, 0, 1, 1]), 0, 0)
    assert not torch.equal(learner.model.state_dict()[name], before)


@pytest.mark.parametrize("changes", [{"amp": "bf16"}, {"amp": "fp16"}, {"channels_last": True}], ids=str)
def test_faster_ways_to_compute_give_nearly_the_same(changes: dict[str, Any]) -> None:
    batch = batch_of([0, 0, 1, 1, 2, 2])
    exact, other = (
        learner_for(IN_BATCH).learn(batch, 0, 0),
        learner_for(replace(IN_BATCH, **changes)).learn(batch, 0, 0),
    )
    assert exact
    assert other
    assert float(other.loss_sum) == pytest.approx(float(exact.loss_sum), rel=0.02)
    if "amp" in changes:
        assert float(other.loss_sum) != float(exact.loss_sum)
