"""One training step: batch -> embeddings -> pairs -> loss -> weights; and all state that steps change."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from siamese_deploy.errors import IntegrityError
from siamese_train.config import TrainConfig
from siamese_train.data import Batch
from siamese_train.model import InputNormalisation, SiameseNetwork
from siamese_train.processes import Processes
from siamese_train.weights import load_strictly

_AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepResult(NamedTuple):
    loss_sum: torch.Tensor
    """() mean loss of the batch times its pairs, without the identity loss."""
    correct: torch.Tensor
    """() pairs decided rightly at 0.5; in batch pairing both kinds of pair count as one half of all."""
    n_pairs: int
    n_images: int


class Learner:
    """A network with its optimiser.

    With several processes, each embeds its share of a batch, receives the embeddings of the others, and computes the
    loss of the whole batch. Its gradient in the head is then complete in every process and is averaged; in the backbone
    it has the part that came by way of the process's own pictures, and the parts are added up. The sum is the gradient
    that one process would have, as long as BatchNorm agrees: synchronised on CUDA, which PyTorch cannot on the CPU.
    """

    def __init__(
        self, model: SiameseNetwork, config: TrainConfig, n_classes: int, steps_per_epoch: int, processes: Processes
    ) -> None:
        """`model` has its initial weights and is on the device; it is changed in place."""
        self.model, self.config, self.processes = model, config, processes
        self._steps_per_epoch = steps_per_epoch
        device = processes.device
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        if processes.count > 1 and device.type == "cuda" and not config.freeze_batchnorm:
            model.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)  # type: ignore[no-untyped-call]
        # Of a frozen backbone it would learn alone, and change nothing.
        classify = config.identity_loss and not config.freeze_backbone
        self.identity = nn.Linear(model.embedding_dim, n_classes).to(device) if classify else None
        self._average = (
            AveragedModel(model, multi_avg_fn=partial(_follow, config.ema), use_buffers=True) if config.ema else None
        )
        model.backbone.requires_grad_(not config.freeze_backbone)
        embed: nn.Module = nn.Identity() if config.freeze_backbone else _Embed(model.backbone, config, device)
        compare: nn.Module = _Compare(model.cls_head, self.identity)
        if processes.count > 1:
            compare = DistributedDataParallel(compare)
            if not config.freeze_backbone:
                embed = DistributedDataParallel(embed)
                # A lambda, because PyTorch reads the annotations of hooks and takes no quoted ones.
                embed.register_comm_hook(None, lambda _state, bucket: _added_up(bucket))
        self._embed, self._compare = embed, compare
        self.optimizer = _optimizer(config, [model, self.identity] if self.identity else [model])
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")

    @property
    def validated_model(self) -> SiameseNetwork:
        """The network to validate and to save: the averaged one, if there is one."""
        return self._average.module if self._average else self.model  # type: ignore[return-value]

    def learn(self, batch: Batch, epoch: int, step: int) -> StepResult | None:
        """Take a step; None where the batch has fewer than two pairs, of which BatchNorm cannot learn.

        Raises:
            IntegrityError: a score is NaN or infinite.
        """
        config, device, processes = self.config, self.processes.device, self.processes
        counts = processes.counts(len(batch.labels))
        left, right = (index.to(device) for index in pair_indices(counts, config.pairing))
        # In a process of its own, BatchNorm needs two pictures too.
        if len(left) < 2 or (processes.count > 1 and min(counts) < (4 if config.pairing == "reference" else 2)):
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(epoch * self._steps_per_epoch + step, self._steps_per_epoch, config)
        self._set_training_mode()

        # Dropout is drawn from seed, epoch and step, so that a resumed run needs no generator's state.
        _seed_dropout(config.seed, epoch, step, 1 + processes.rank)
        mine = self._embed(batch.inputs.to(device, non_blocking=True))
        embeddings = processes.rows(mine, counts)
        labels = processes.rows(batch.labels.to(device, non_blocking=True), counts)
        _seed_dropout(config.seed, epoch, step, 0)  # in the head the same in every process
        scores, identities = self._compare(embeddings, left, right)
        if not bool(torch.isfinite(scores).all()):  # the loss would end a CUDA process on NaN
            raise IntegrityError("a training score is NaN or infinite", code="not-finite")
        is_same = labels[left] == labels[right]
        weights = pair_weights(is_same) if config.pairing == "batch" else torch.ones_like(scores)
        pair_loss = F.binary_cross_entropy(
            scores, is_same.to(scores.dtype), weight=harder(weights, is_same, scores.detach(), config.hard_negatives)
        )
        loss = pair_loss
        if self.identity:
            classification = F.cross_entropy(identities, labels, label_smoothing=config.label_smoothing)
            loss = pair_loss + config.identity_loss * classification

        self.optimizer.zero_grad()
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if config.clip_norm:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters(), config.clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._average:
            self._average.update_parameters(self.model)
        right_decisions = ((scores.detach() >= 0.5) == is_same) * weights
        return StepResult(pair_loss.detach() * len(left), right_decisions.sum(), len(left), sum(counts))

    def restore(
        self, source: str, model_state: dict[str, Any], optimizer_state: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """Put back what `validated_model`, `optimizer` and `state` gave; settings stay those of `config`.

        Raises:
            CheckpointError: weights that do not fit.
            ValueError: an optimiser or classifier of other sizes; nothing but the network is changed then.
        """
        load_strictly(self.model, state.get("model", model_state), source)
        if self._average:
            load_strictly(self.validated_model, model_state, source)
            self._average.n_averaged.fill_(state.get("averaged_steps", 0))
        if self.identity and "identity" in state:
            if len(state["identity"]["bias"]) != self.identity.out_features:
                raise ValueError("other classes than before")
            load_strictly(self.identity, state["identity"], f"{source}: identity classifier")
        own_settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(optimizer_state)
        for group, settings in zip(self.optimizer.param_groups, own_settings, strict=True):
            group.update(settings)
        # The fused kernels take for granted that moments lie in memory as their weights do (--channels_last).
        for parameter, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if moment.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(moment)
        if state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides `validated_model` and the optimiser."""
        state: dict[str, Any] = {"scaler": self._scaler.state_dict()}
        if self.identity:
            state["identity"] = self.identity.state_dict()
        if self._average:
            state["model"] = self.model.state_dict()
            state["averaged_steps"] = int(self._average.n_averaged)
        return state

    def _parameters(self) -> Iterable[nn.Parameter]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def _set_training_mode(self) -> None:
        self.model.train()
        if self.config.freeze_batchnorm:
            for module in self.model.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()


class _Embed(nn.Module):
    """(N, H, W, 3) uint8 -> (N, dim) float32; in reference pairing the left half and the right half one by one.

    So BatchNorm sees each side's statistics, as in the reference scripts.
    """

    def __init__(self, backbone: nn.Module, config: TrainConfig, device: torch.device) -> None:
        super().__init__()
        self.backbone = backbone
        self._normalise = InputNormalisation().to(device)
        self._passes = 2 if config.pairing == "reference" else 1
        self._memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self._autocast = torch.autocast(device.type, _AMP_DTYPES[config.amp], enabled=config.amp != "off")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with self._autocast:
            return torch.cat(
                [
                    self.backbone(self._normalise(part).contiguous(memory_format=self._memory_format))
                    for part in images.chunk(self._passes)
                ]
            ).float()


class _Compare(nn.Module):
    """(N, dim) embeddings and (P,) indices -> (P,) scores, and (N, n_classes) logits if there is a classifier."""

    def __init__(self, cls_head: nn.Module, identity: nn.Module | None) -> None:
        super().__init__()
        self.cls_head, self.identity = cls_head, identity

    def forward(
        self, embeddings: torch.Tensor, left: torch.Tensor, right: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Rows by F.embedding, because the gradient of indexing adds up in any order when threads share it.
        scores = self.cls_head(F.embedding(left, embeddings) * F.embedding(right, embeddings))[:, 0]
        return scores, self.identity(embeddings) if self.identity else None


def pair_indices(counts: list[int], pairing: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(P,) left and (P,) right index into the embeddings of processes that have so many each."""
    n_images = sum(counts)
    if pairing == "batch":
        left, right = torch.triu_indices(n_images, n_images, 1)
        return left, right
    is_right = torch.cat([torch.arange(count) >= count // 2 for count in counts])
    return torch.nonzero(~is_right)[:, 0], torch.nonzero(is_right)[:, 0]


def pair_weights(is_same: torch.Tensor) -> torch.Tensor:
    """(P,) float32 with mean 1, in which same and different pairs weigh equally much as a whole."""
    n_same = is_same.sum()
    n_different = len(is_same) - n_same
    balanced = torch.where(is_same, len(is_same) / (2 * n_same), len(is_same) / (2 * n_different))
    return torch.where((n_same == 0) | (n_different == 0), torch.ones_like(balanced), balanced)


def harder(weights: torch.Tensor, is_same: torch.Tensor, scores: torch.Tensor, power: float) -> torch.Tensor:
    """`weights` (P,) with those of different pairs shifted to high scores, in proportion to score ** power."""
    if power == 0:
        return weights
    different = torch.where(is_same, 0.0, weights)
    shifted = different * scores.clamp_min(1e-6) ** power
    return torch.where(is_same, weights, shifted * (different.sum() / shifted.sum().clamp_min(1e-12)))


def learning_rate_at(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Of step `step` of the run (from 0): linear warm-up, then constant or half a cosine down to 0.

    The cosine is that of Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts" (ICLR 2017),
    without restarts.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.learning_rate
    whole = max(config.epochs * steps_per_epoch - warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / whole)))


def _optimizer(config: TrainConfig, modules: list[nn.Module]) -> torch.optim.Optimizer:
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if config.weight_decay:
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
    kind: type[torch.optim.Optimizer] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(groups, lr=config.learning_rate, weight_decay=0.0, fused=True)  # type: ignore[call-arg]


def _follow(decay: float, averaged: list[torch.Tensor], current: list[torch.Tensor], n_averaged: Any) -> None:
    """Moving average that follows faster in a run's first steps, when there is little to remember."""
    if averaged[0].is_floating_point():
        n = int(n_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))
    else:
        torch._foreach_copy_(averaged, current)


def _seed_dropout(*place: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))


def _added_up(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """DistributedDataParallel's communication hook: the sum over processes where its own is the mean."""
    reduced = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return reduced.then(lambda future: future.value()[0])
