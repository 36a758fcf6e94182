"""OnnxVerifier: a bundle on ONNX Runtime."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from siamese_deploy.bundle import (
    BACKBONE,
    EMBEDDINGS,
    HEAD,
    IMAGES,
    LEFT,
    RIGHT,
    SCORES,
    Bundle,
    golden_image,
    read_bundle,
)
from siamese_deploy.embedding import embed_pictures, require_signal
from siamese_deploy.embedding_cache import EmbeddingCache
from siamese_deploy.engine_cache import default_engine_root, engine_folder, prune_engines
from siamese_deploy.errors import BundleError, ImageError, IntegrityError, ProviderError, UsageError
from siamese_deploy.gpu import gpu_identity
from siamese_deploy.preprocess import Picture, Preprocess, load_image
from siamese_deploy.providers import (
    give_back_freed_memory,
    import_onnxruntime,
    nodes_by_provider,
    open_session,
    providers_to_try,
    require_compiled_in,
    run_session,
    usable_cores,
)
from siamese_deploy.tensorrt import HEAD_BATCH, EngineKey, engine_key, tensorrt_environment, tensorrt_options
from siamese_deploy.verifier import Embeddings, Images, Scores

# Larger runs are no faster on a CPU; every picture in a run takes memory, 8 MB with a resnet18 of 224 px.
_CPU_BATCH, _LEAST_CPU_BATCH = 8, 2
_PICTURES_AT_ONCE = 32

# The golden check tells a wrong, damaged or overflowing network from rounding; export measures rounding itself. In 8
# bits a value next to the border of two steps may fall to either side on another provider.
GOLDEN_LIMIT = {"fp32": 1e-2, "fp16": 1e-2, "int8-cpu": 5e-2, "int8-tensorrt": 5e-2}
"""Largest relative error of the embedding and largest difference of the score, by precision."""


class OnnxVerifier:
    """Embeds pictures and scores pairs with the two graphs of a bundle. May be used from several threads at once.

    The provider is the one asked for or an error, and the bundle's golden check has passed on it before the
    constructor returns.

    Args:
        bundle: folder, or a `Bundle` already read.
        provider: "auto" (CUDA where it truly starts, else CPU), "cpu", "cuda" or "tensorrt".
        threads: CPU threads within one run; default: the cores this process may use.
        throughput: for many pictures on the CPU: as many runs at once as there are threads, each of several
            pictures on one thread, instead of one run on all of them. A single picture then takes longer.
        max_batch: pictures in one run of the backbone; default: the bundle's largest batch.
        gpu_memory_mb: most that each of the two sessions may take on the GPU, in MiB, CUDA's own workspaces on top.
        cache: embeddings of pictures seen before, for `compare`.
        say: told in one line what takes long or is not as it should be while TensorRT's engines are opened or built.

    Raises:
        InputDataError: no such bundle.
        BundleError: not a bundle, damaged, or refused by ONNX Runtime.
        IntegrityError: the golden check fails.
        ProviderError: the provider cannot start here.
        MissingExtraError: onnxruntime is not installed.
        UsageError: `max_batch` is more than the bundle's, or a number is not positive.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle | str | os.PathLike[str],
        *,
        provider: str = "auto",
        threads: int | None = None,
        throughput: bool = False,
        max_batch: int | None = None,
        gpu_memory_mb: int | None = None,
        cache: EmbeddingCache | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
        self.cache = cache
        self._say = say
        self.max_batch = self.bundle.manifest.batch[2] if max_batch is None else max_batch
        if not 1 <= self.max_batch <= self.bundle.manifest.batch[2]:
            raise UsageError(
                f"max_batch: expected 1 to {self.bundle.manifest.batch[2]} (the bundle's), got {max_batch}"
            )
        for name, number in (("threads", threads), ("gpu_memory_mb", gpu_memory_mb)):
            if number is not None and number < 1:
                raise UsageError(f"{name}: expected at least 1, got {number}")
        self._gpu_memory_bytes = None if gpu_memory_mb is None else gpu_memory_mb * 2**20
        self.provider_note = ""
        """What "auto" passed over and why, or what makes this provider a poor choice for the bundle; "" if nothing."""
        candidates = providers_to_try(provider)
        for self.provider in candidates:
            try:
                self._open(threads or usable_cores(), throughput)
                break
            except (ProviderError, IntegrityError) as error:
                if self.provider == candidates[-1]:
                    raise
                reason = str(error).removeprefix(f"provider {self.provider}: ").partition("; ")[0]
                self.provider_note = f"{self.provider} passed over: {reason}"
        if (self.bundle.manifest.precision, self.provider) == ("int8-tensorrt", "cpu"):
            self.provider_note = "this bundle's 8 bits are for TensorRT; here fp32 is faster"

    def _open(self, threads: int, throughput: bool) -> None:
        self.calls_at_once = threads if throughput and self.provider == "cpu" else 1
        self._max_pairs = HEAD_BATCH[2] if self.provider == "tensorrt" else 0
        threads = threads if self.calls_at_once == 1 else 1
        require_compiled_in(self.provider)
        if self.provider == "tensorrt" and tensorrt_environment():
            names = ", ".join(tensorrt_environment())
            raise ProviderError(f"provider tensorrt: {names} change its options behind a bundle's back; unset them")
        with ExitStack() as held:
            # Always in this order, so that two processes which build the engines do not wait for each other.
            self._backbone, self._head = (
                self._open_graph(name, graph, threads, held)
                for name, graph in ((BACKBONE, self.bundle.backbone), (HEAD, self.bundle.head))
            )
            give_back_freed_memory()
            self._check_signatures()
            self._check_golden()
            self.nodes = {
                BACKBONE: nodes_by_provider(self._backbone),
                HEAD: nodes_by_provider(self._head),
            }
            """Number of nodes on each provider, by graph; empty where ONNX Runtime cannot tell (old, on the CPU)."""
        root = default_engine_root()
        if self.provider == "tensorrt" and root is not None:
            prune_engines(
                root, [self._engine(BACKBONE, self.bundle.backbone)[0], self._engine(HEAD, self.bundle.head)[0]]
            )

    def _open_graph(self, name: str, graph: bytes, threads: int, held: ExitStack) -> Any:
        """Its session; on TensorRT with its engine's folder, which stays locked until `held` ends."""
        profiles = "" if self.provider == "cpu" else held.enter_context(tempfile.TemporaryDirectory())
        open_it = partial(
            open_session,
            graph,
            name,
            self.provider,
            threads,
            gpu_memory_bytes=self._gpu_memory_bytes,
            profile_into=profiles,
        )
        if self.provider != "tensorrt" or gpu_identity() is None:  # without a GPU the session says what is missing
            return open_it()
        key, shapes = self._engine(name, graph)
        folder = held.enter_context(engine_folder(default_engine_root(), key, say=self._say))
        try:
            return open_it(options=tensorrt_options(key, folder.path, shapes))
        except ProviderError as error:
            if not folder.ready:
                raise
            self._say(f"{name}: the stored engine is not used ({error}); building it anew")
            folder.discard()
            return open_it(options=tensorrt_options(key, folder.path, shapes))

    def _engine(self, name: str, graph: bytes) -> tuple[EngineKey, dict[str, tuple[int | str, ...]]]:
        """What its engine depends on, and the shapes of its inputs."""
        shapes: dict[str, tuple[int | str, ...]]
        if name == BACKBONE:
            shapes = {IMAGES: ("N", *self.preprocess.size_hw, 3)}
            # From one picture on, whatever the manifest says: the golden check and the end of a folder are small.
            batch = (1, min(self.bundle.manifest.batch[1], self.max_batch), self.max_batch)
        else:
            shapes = {LEFT: ("P", self.embedding_dim), RIGHT: ("P", self.embedding_dim)}
            batch = HEAD_BATCH
        key = engine_key(
            name.removesuffix(".onnx"),
            graph,
            precision=self.bundle.manifest.precision,
            batch=batch,
            onnxruntime=self.runtime_version,
        )
        return key, shapes

    @property
    def preprocess(self) -> Preprocess:
        return self.bundle.manifest.preprocess

    @property
    def threshold(self) -> float:
        """Operating threshold in [0, 1]: accept when score >= threshold."""
        return self.bundle.manifest.threshold

    @property
    def threshold_origin(self) -> str:
        return self.bundle.manifest.threshold_origin

    @property
    def model_digest(self) -> str:
        return self.bundle.digest

    @property
    def embedding_dim(self) -> int:
        return self.bundle.manifest.embedding_dim

    @property
    def runtime_version(self) -> str:
        return str(import_onnxruntime().__version__)

    @property
    def batch_size(self) -> int:
        share = _PICTURES_AT_ONCE // self.calls_at_once
        if self.provider == "cpu":
            share = max(_LEAST_CPU_BATCH, min(_CPU_BATCH, share))
        return min(share, self.max_batch)

    def embed(self, images: Images) -> Embeddings:
        """(N, H, W, 3) uint8 RGB -> (N, dim) float32; more than `max_batch` is split. N may be 0.

        Raises:
            UsageError: wrong shape or dtype.
        """
        height, width = self.preprocess.size_hw
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (height, width, 3):
            raise UsageError(f"images: expected uint8 (N, {height}, {width}, 3), got {images.dtype} {images.shape}")

        def run(part: slice) -> Embeddings:
            inputs = {IMAGES: np.ascontiguousarray(images[part])}
            embeddings: Embeddings = run_session(self._backbone.run, EMBEDDINGS, inputs, self.provider)
            return embeddings

        if len(images) == 0:
            return np.empty((0, self.embedding_dim), np.float32)
        # Less than a batch is one call of several side by side, see `calls_at_once`.
        share = max(self.batch_size, -(-len(images) // self.calls_at_once))
        return np.concatenate(self._in_parts(run, len(images), min(share, self.max_batch)))

    def score(self, left: Embeddings, right: Embeddings) -> Scores:
        """(P, dim), (P, dim) float32 -> (P,) float32 in [0, 1]; either side may be (1, dim) and is broadcast.

        Raises:
            UsageError: wrong shape or dtype.
            IntegrityError: a score is NaN, as embeddings that are not finite give.
        """
        dim = self.embedding_dim
        left, right = np.asarray(left), np.asarray(right)
        rows = {len(left), len(right)} - {1} if left.ndim and right.ndim else set()
        for side in (left, right):
            if side.dtype != np.float32 or side.ndim != 2 or side.shape[1] != dim or len(rows) > 1:
                raise UsageError(
                    f"embeddings: expected two float32 (P, {dim}) or (1, {dim}), got {left.dtype} {left.shape} and "
                    f"{right.dtype} {right.shape}"
                )

        n_pairs = max(len(left), len(right)) if len(left) and len(right) else 0
        scores = self._run_head(left, right, n_pairs) if n_pairs else np.empty(0, np.float32)
        return _checked(scores)

    def _run_head(self, left: Embeddings, right: Embeddings, n_pairs: int) -> Scores:
        def run(part: slice) -> Scores:
            inputs = {LEFT: left if len(left) == 1 else left[part], RIGHT: right if len(right) == 1 else right[part]}
            scores: Scores = run_session(self._head.run, SCORES, inputs, self.provider)
            return scores[:, 0]

        return np.concatenate(self._in_parts(run, n_pairs, self._max_pairs or -(-n_pairs // self.calls_at_once)))

    @property
    def _device(self) -> str:
        return "cpu" if self.provider == "cpu" else "cuda"

    def place(self, embeddings: Embeddings) -> Any:
        """(P, dim) float32 -> an onnxruntime.OrtValue where the head runs, to be scored repeatedly without a copy."""
        return import_onnxruntime().OrtValue.ortvalue_from_numpy(embeddings, self._device, 0)

    def embed_placed(self, images: Images) -> Any:
        """(N, H, W, 3) uint8, N from 1 to `max_batch` -> what `place` gives of their embeddings, which stay there.

        Raises:
            IntegrityError: an embedding is not finite.
            ProviderError: as of any run.
        """

        def run(outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
            binding = self._backbone.io_binding()
            binding.bind_cpu_input(IMAGES, inputs[IMAGES])
            binding.bind_output(outputs[0], self._device)
            self._backbone.run_with_iobinding(binding)
            return list(binding.get_outputs())

        placed = run_session(run, EMBEDDINGS, {IMAGES: np.ascontiguousarray(images)}, self.provider)
        embeddings = placed.numpy()
        if not np.isfinite(embeddings).all():
            raise IntegrityError("the network gives no finite embedding (NaN or infinity)", code="not-finite")
        for embedding in embeddings:
            require_signal("picture", embedding)
        return placed

    def score_placed(self, left: Any, right: Any) -> Scores:
        """What `place` or `embed_placed` gave, (P, dim) or (1, dim) on either side -> (P,) float32 in [0, 1].

        Raises:
            IntegrityError: a score is NaN.
            ProviderError: as of any run.
        """

        def run(outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
            binding = self._head.io_binding()
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, value)
            binding.bind_output(outputs[0], "cpu")
            self._head.run_with_iobinding(binding)
            return list(binding.copy_outputs_to_cpu())

        return _checked(run_session(run, SCORES, {LEFT: left, RIGHT: right}, self.provider)[:, 0])

    def _in_parts(self, run: Callable[[slice], Any], n_rows: int, size: int) -> list[Any]:
        """`run` of consecutive slices of `size` rows; several at once if the sessions were made for that."""
        parts = [slice(start, start + size) for start in range(0, n_rows, size)]
        if self.calls_at_once == 1 or len(parts) == 1:
            return [run(part) for part in parts]
        with ThreadPoolExecutor(self.calls_at_once) as threads:
            return list(threads.map(run, parts))

    def compare(self, left: Picture, right: Picture) -> float:
        """Score of two pictures, in [0, 1]. Each is the path of a picture file, the bytes of one, a Pillow image, or a
        uint8 array (H, W, 3) RGB or (H, W) grey; all go through the one conversion of `preprocess.decode_image`.

        Raises:
            ImageError: one of them cannot be used.
            UsageError: one of them is something else.
            IntegrityError: the network gives no finite score, or an embedding of zeros.
        """
        if self.provider != "cpu" and self.cache is None:
            return self._compare_placed(left, right)
        vectors = []
        for batch in embed_pictures(self, (left, right), cache=self.cache):
            for item in batch:
                if item.vector is None:
                    raise ImageError(item.name, item.reason, item.code)
                require_signal(item.name, item.vector)
                vectors.append(item.vector)
        return float(self.score(vectors[0][None], vectors[1][None])[0])

    def _compare_placed(self, left: Picture, right: Picture) -> float:
        """`compare` whose embeddings do not leave the device."""
        sides = [self.embed_placed(load_image(picture, self.preprocess)[None]) for picture in (left, right)]
        return float(self.score_placed(*sides)[0])

    def _check_signatures(self) -> None:
        manifest = self.bundle.manifest
        height, width = self.preprocess.size_hw
        dim = manifest.embedding_dim
        images = ("tensor(uint8)", [height, width, 3])
        self._check(self._backbone, BACKBONE, {IMAGES: images}, EMBEDDINGS, dim)
        side = ("tensor(float)", [dim])
        self._check(self._head, HEAD, {LEFT: side, RIGHT: side}, SCORES, 1)

    @staticmethod
    def _check(session: Any, name: str, inputs: dict[str, tuple[str, list[int]]], output: str, width: int) -> None:
        try:
            found_in = {node.name: (node.type, node.shape[1:]) for node in session.get_inputs()}
            found_out = {node.name: (node.type, node.shape[1:]) for node in session.get_outputs()}
        except UnicodeDecodeError as error:
            raise BundleError(f"{name}: a name in it is not UTF-8; copy or export the bundle again") from error
        expected_out = {output: ("tensor(float)", [width])}
        if (found_in, found_out) != (inputs, expected_out):
            raise BundleError(f"{name}: expected {inputs} -> {expected_out}, got {found_in} -> {found_out}")

    def _check_golden(self) -> None:
        golden = self.bundle.manifest.golden
        embedding = self.embed(golden_image(self.preprocess.size_hw)[None])
        score = float(self._run_head(embedding, embedding, 1)[0])
        # In float64, where no square of a float32 overflows.
        expected, found = golden.embedding.astype(np.float64), embedding[0].astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) + 1e-12))
        limit = GOLDEN_LIMIT[self.bundle.manifest.precision]
        # Written so that NaN fails.
        if not (error <= limit and abs(score - golden.score) <= limit):
            raise IntegrityError(
                f"golden check failed on {self.provider}: relative embedding error {error:.2g} (at most "
                f"{limit}), score {score:.6f} (expected {golden.score:.6f}); the bundle does not "
                "answer here as it did at export",
                code="golden-check",
            )


def _checked(scores: Scores) -> Scores:
    if not ((scores >= 0) & (scores <= 1)).all():  # NaN is neither
        raise IntegrityError(
            "the network gives scores that are NaN or outside [0, 1]; the model is damaged", code="not-finite"
        )
    return scores
