"""What `siamese-train-bench` adds to `siamese bench`: a checkpoint with PyTorch, as contenders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from siamese_deploy.bench import Contender, Settings
from siamese_deploy.bench.scenarios import BenchVerifier, Workload, make_workload
from siamese_deploy.errors import IntegrityError, ProviderError
from siamese_deploy.image_folder import ImageFolder
from siamese_deploy.pairs import Pairs
from siamese_deploy.providers import usable_cores
from siamese_train.checkpoint import Checkpoint
from siamese_train.torch_route import Route, RoutedVerifier, torch_errors
from siamese_train.torch_verifier import TorchVerifier

BEST_BATCH = 16
"""Offline's where none is asked for; that of exported bundles."""
PARITY = 1e-3
"""Largest difference of a float32 bundle's score from PyTorch's. Export measures rounding; this finds a network that is
another one."""
_FLOAT32_ON_CPU = 1e-5
"""Largest difference of a score by another batch size or memory format, or compiled."""
_ROUTES = (
    (Route("eager"), 1e-2),
    (Route("channels-last", channels_last=True), 1e-2),
    (Route("channels-last compile", channels_last=True, compiled=True), 1e-2),
    (Route("channels-last amp-fp16", channels_last=True, autocast=torch.float16), 1e-2),
    (Route("channels-last amp-bf16", channels_last=True, autocast=torch.bfloat16), 5e-2),  # 8 bits of mantissa
)
"""With the largest difference of a score on CUDA from the evaluation."""

Evaluate = Callable[[ImageFolder, Pairs], Workload]


def torch_contenders(checkpoint: Checkpoint, settings: Settings) -> tuple[list[Contender], Evaluate]:
    """PyTorch's routes on the devices of `settings.providers`, automatic mixed precision only on CUDA; and the
    evaluation on the CPU, as siamese-train-eval does it, eager and in float32.
    """
    threads = settings.threads or usable_cores()
    devices = dict.fromkeys("cpu" if provider == "cpu" else "cuda" for provider in settings.providers)
    evaluations = {device: _once(partial(_evaluate, checkpoint, device, threads)) for device in ("cpu", "cuda")}

    @torch_errors()
    def opened(device: str, route: Route, batch: int | None) -> RoutedVerifier:
        verifier = RoutedVerifier(checkpoint, _usable(device, threads), route)
        if route.compiled:  # so that what it lacks is said once, before any row
            verifier.embed(np.zeros((batch or 2, *verifier.preprocess.size_hw, 3), np.uint8))
        return verifier

    def evaluate(device: str, _verifier: BenchVerifier, folder: ImageFolder, pairs: Pairs) -> Workload:
        return evaluations[device](folder, pairs)

    contenders = [
        Contender(
            checkpoint.path.name,
            checkpoint.sha256,
            route.precision,
            f"torch {device} {route.name}",
            best_batch=BEST_BATCH,
            tolerance=_FLOAT32_ON_CPU if device == "cpu" else tolerance,
            open=partial(opened, device, route),
            evaluate=partial(evaluate, device),
        )
        for device in devices
        for route, tolerance in _ROUTES
        if device == "cuda" or route.autocast is None
    ]
    return contenders, evaluations["cpu"]


def held_against(checkpoint: Checkpoint, evaluated: Evaluate, contender: Contender) -> Contender:
    """The same one; in float32 and exported from this checkpoint, it is wrong where its scores are not those
    `evaluated`."""
    if (contender.checkpoint, contender.precision) != (checkpoint.sha256, "fp32"):
        return contender

    def evaluate(verifier: BenchVerifier, folder: ImageFolder, pairs: Pairs) -> Workload:
        work = contender.evaluate(verifier, folder, pairs)
        worst = float(np.abs(work.expected - evaluated(folder, pairs).expected).max())
        limit = max(PARITY, contender.tolerance)
        if not worst <= limit:
            raise IntegrityError(
                f"scores differ from the checkpoint's by up to {worst:.2g} (at most {limit:g})", code="scores-differ"
            )
        return work

    return replace(contender, evaluate=evaluate)


@torch_errors()
def _evaluate(checkpoint: Checkpoint, device: str, threads: int, folder: ImageFolder, pairs: Pairs) -> Workload:
    return make_workload(TorchVerifier.from_checkpoint(checkpoint, _usable(device, threads)), folder, pairs)


def _once(evaluate: Evaluate) -> Evaluate:
    """What it answered the first time; the folder and the pairs are always the same ones."""
    known: list[Workload] = []

    def remembered(folder: ImageFolder, pairs: Pairs) -> Workload:
        if not known:
            known.append(evaluate(folder, pairs))
        return known[0]

    return remembered


def _usable(device: str, threads: int) -> torch.device:
    """
    Raises:
        ProviderError: PyTorch has no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ProviderError(f"provider cuda: PyTorch {torch.__version__} sees no CUDA device")
    torch.set_num_threads(threads)
    return torch.device(device)
