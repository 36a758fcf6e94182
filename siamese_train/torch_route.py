"""RoutedVerifier: a checkpoint as PyTorch's users deploy it, for benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from siamese_deploy.errors import EnvironmentFault
from siamese_deploy.preprocess import Preprocess
from siamese_deploy.verifier import Embeddings, Images, Scores
from siamese_train.checkpoint import Checkpoint
from siamese_train.model import InputNormalisation
from siamese_train.torch_verifier import TorchVerifier


@dataclass(frozen=True)
class Route:
    name: str
    channels_last: bool = False
    """Memory format of weights and activations; float32 convolutions on a CPU may be faster in it or not."""
    compiled: bool = False
    """By torch.compile in its default mode."""
    autocast: torch.dtype | None = None

    @property
    def precision(self) -> str:
        return {None: "fp32", torch.float16: "amp-fp16", torch.bfloat16: "amp-bf16"}[self.autocast]


@contextmanager
def torch_errors() -> Iterator[None]:
    """
    Raises:
        EnvironmentFault: PyTorch failed: no memory, no compiler, code that would have to be compiled again.
    """
    try:
        yield
    except RuntimeError as error:  # PyTorch's own are all of this kind; only their texts tell them apart
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise EnvironmentFault(
            f"PyTorch: {lines[0] if lines else type(error).__name__}", code="provider-failed"
        ) from error


class RoutedVerifier(TorchVerifier):
    """Embeds and scores without the copies that `TorchVerifier` makes for safety.

    Compiled, the backbone is specialised to each number of pictures when it first meets it; the head is compiled for
    any number of pairs, because its matrix products are a library's either way. What has been compiled for a shape is
    never compiled again: that would be an EnvironmentFault, as every failure of PyTorch is.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, route: Route) -> None:
        size_hw = (checkpoint.image_size, checkpoint.image_size)
        super().__init__(checkpoint.build_model(), Preprocess(size_hw), device, checkpoint.sha256)
        self.route = route
        if route.channels_last:
            self.model.to(memory_format=torch.channels_last)
            self._normalise = _InChannelsLast().to(device)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.backends.cudnn.allow_tf32 = False  # as everywhere here
        self._backbone: Callable[..., torch.Tensor] = self._embed_tensor
        self._head: Callable[..., torch.Tensor] = self._score_tensors
        self._compiled_for: set[tuple[Any, ...]] = set()
        if route.compiled:
            # With fullgraph, too many sizes are an error; without it, they are run eagerly and nobody notices.
            self._backbone = torch.compile(self._embed_tensor, dynamic=False, fullgraph=True)
            self._head = torch.compile(self._score_tensors, dynamic=True, fullgraph=True)

    def _embed_tensor(self, images: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.model.backbone(self._normalise(images))
        return embeddings.float()

    def _score_tensors(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.model.cls_head(left * right)
        return scores[:, 0].float()

    @torch.inference_mode()
    def embed(self, images: Images) -> Embeddings:
        """(N, H, W, 3) uint8 -> (N, dim) float32."""
        return self._run(self._backbone, self.place(images))

    @torch.inference_mode()
    def score(self, left: Embeddings, right: Embeddings) -> Scores:
        """(P, dim), (P, dim) -> (P,) float32 in [0, 1]; either side may be (1, dim)."""
        return self.score_placed(self.place(left), self.place(right))

    @torch.inference_mode()
    @torch_errors()
    def place(self, array: Images | Embeddings) -> torch.Tensor:
        """The same values on the device; on the CPU the same memory, too."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    @torch.inference_mode()
    def score_placed(self, left: torch.Tensor, right: torch.Tensor) -> Scores:
        """(P, dim), (P, dim), as `place` gives them -> (P,) float32 in [0, 1]; either side may be (1, dim)."""
        if not len(left) or not len(right):
            return np.empty(0, np.float32)
        return self._run(self._head, left, right)

    @torch_errors()
    def _run(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> npt.NDArray[np.float32]:
        with ExitStack() as held:
            if self.route.autocast:
                held.enter_context(torch.autocast(self.device.type, self.route.autocast))
            form = (function, *((tuple(tensor.shape), tensor.stride()) for tensor in inputs))
            if form in self._compiled_for:
                held.enter_context(torch.compiler.set_stance("fail_on_recompile"))
            answer: npt.NDArray[np.float32] = function(*inputs).cpu().numpy()
            if self.route.compiled:
                self._compiled_for.add(form)
        return answer


class _InChannelsLast(InputNormalisation):
    """The same numbers; pictures come with their channels last, and stay so."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(torch.float32).permute(0, 3, 1, 2) * self.scale + self.shift
