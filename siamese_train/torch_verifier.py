"""TorchVerifier: a network or checkpoint with the two verbs of every backend."""

from __future__ import annotations

import numpy as np
import torch

from siamese_deploy.errors import EnvironmentFault, UsageError
from siamese_deploy.preprocess import Preprocess
from siamese_deploy.verifier import Embeddings, Images, Scores
from siamese_train.checkpoint import Checkpoint
from siamese_train.model import InputNormalisation, SiameseNetwork


class TorchVerifier:
    """Embeds and scores with PyTorch in float32 (no TF32). The network is put into inference mode for each call.

    Args:
        model_digest: SHA-256 of the checkpoint, or "" for a network that is still being trained.
    """

    backend = "pytorch"
    threshold = 0.5
    threshold_origin = "default: the reference scripts' 0.5, not chosen on data"

    def __init__(
        self, model: SiameseNetwork, preprocess: Preprocess, device: torch.device, model_digest: str = ""
    ) -> None:
        self.model = model.to(device)
        self.preprocess = preprocess
        self.device = device
        self.model_digest = model_digest
        self._normalise = InputNormalisation().to(device)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, device: torch.device) -> TorchVerifier:
        preprocess = Preprocess((checkpoint.image_size, checkpoint.image_size))
        return cls(checkpoint.build_model(), preprocess, device, checkpoint.sha256)

    @property
    def provider(self) -> str:
        return self.device.type

    @property
    def runtime_version(self) -> str:
        return torch.__version__

    @property
    def batch_size(self) -> int:
        return 32

    @property
    def calls_at_once(self) -> int:
        return 1

    @property
    def embedding_dim(self) -> int:
        return self.model.embedding_dim

    @torch.inference_mode()
    def embed(self, images: Images) -> Embeddings:
        """(N, H, W, 3) uint8 -> (N, dim) float32."""
        self.model.eval()
        with torch.backends.cudnn.flags(allow_tf32=False):  # on by default; the bundle on CUDA does without it too
            embeddings: Embeddings = self.model.backbone(self._normalise(self._tensor(images))).cpu().numpy()
        return embeddings

    @torch.inference_mode()
    def score(self, left: Embeddings, right: Embeddings) -> Scores:
        """(P, dim), (P, dim) -> (P,) float32 in [0, 1]; either side may be (1, dim)."""
        self.model.eval()
        scores: Scores = self.model.cls_head(self._tensor(left) * self._tensor(right))[:, 0].cpu().numpy()
        return scores

    def _tensor(self, array: Images | Embeddings) -> torch.Tensor:
        # A copy, because PyTorch takes no reversed views and warns of read-only ones.
        return torch.from_numpy(np.array(array, order="C")).to(self.device)


def choose_device(asked: str) -> torch.device:
    """torch.device for "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        UsageError: none of these.
        EnvironmentFault: CUDA was named and PyTorch has none, or not this one.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise UsageError(f"--device {asked!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {asked!r}: expected auto, cpu, cuda or cuda:N")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise EnvironmentFault(
            f"--device {asked}: PyTorch {torch.__version__} sees {n_gpus} CUDA devices; use --device cpu",
            code="provider-unavailable",
        )
    return device
