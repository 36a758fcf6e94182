"""What the two graphs promise, measured against other engines on the same pictures.

    python network.py             everything
    python network.py backbone    pictures into embeddings: PyTorch, torch.compile, OpenVINO, our fp32 and int8
    python network.py pairs       known embeddings into scores: against embedding again, PyTorch's head, FAISS
    python network.py routes      what else could make the backbone faster on this CPU, and what it costs in ROC AUC

Omniglot's validation pictures ($SIAMESE_DATA or ../shared/data), else drawn ones. Without --checkpoint an untrained
resnet18 of 224 px, whose times are those of a trained one and whose ROC AUC says nothing. Medians of rounds in turn;
outputs are compared before a ratio is printed; a promise that is not kept makes the exit code 1.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import faiss
import numpy as np
import torch
from engines import (
    Embed,
    Subject,
    embed_all,
    largest_difference,
    make_subject,
    openvino_choice,
    openvino_way,
    session_way,
    torch_ways,
)
from measuring import Ratio, in_turns, medians, print_machine, print_ratios, print_table, require_kept

from siamese_deploy import OnnxVerifier
from siamese_deploy.embedding import SCORE_CHUNK_PAIRS
from siamese_deploy.gallery.store import CHUNK_ROWS
from siamese_deploy.providers import usable_cores

PROMISED_AT_BATCH = 8
MOST_AUC_DROP = 0.002
PICTURES_A_ROUND = 64
# Largest relative difference of an embedding to PyTorch's in float32; beyond it a way computes something else.
FP32, BF16, INT8 = 1e-4, 0.1, 0.3
EAGER = "PyTorch eager, channels-last"
OURS, OURS_INT8 = "ours, fp32", "ours, int8"


@dataclass(frozen=True)
class Way:
    embed: Embed
    limit: float
    """FP32, BF16 or INT8."""


@dataclass(frozen=True)
class Measured:
    picture_s: dict[int, dict[str, float]]
    """Batch -> way -> median seconds a picture."""
    auc_drop: dict[str, float]
    """Empty of an untrained network."""


@click.command()
@click.argument("which", nargs=-1, type=click.Choice(["backbone", "pairs", "routes"]))
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), help="A trained network (.pth).")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 8, 32), show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--pictures", type=click.IntRange(PICTURES_A_ROUND), default=780, help="Validation pictures used.")
@click.option("--rows", type=click.IntRange(CHUNK_ROWS), default=100_000, help="Gallery of the comparison with FAISS.")
def main(
    which: tuple[str, ...], checkpoint: Path | None, batches: tuple[int, ...], rounds: int, pictures: int, rows: int
) -> None:
    print_machine("torch", "onnxruntime", "openvino", "faiss-cpu", "numpy")
    flags = Path("/proc/cpuinfo").read_text().split()
    has = [
        name for name in ("avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if name in flags
    ]
    print(f"{', '.join(has) or 'no AVX-512, VNNI or bf16'}; {usable_cores()} threads each; {rounds} rounds")
    torch.set_num_threads(usable_cores())
    faiss.omp_set_num_threads(usable_cores())
    ratios: list[Ratio] = []
    with tempfile.TemporaryDirectory() as folder:
        subject = make_subject(checkpoint, Path(folder), pictures)
        if not which or "backbone" in which:
            ratios += backbone(subject, batches, rounds)
        if not which or "pairs" in which:
            ratios += cached_pairs(subject, batches, rounds) + head(subject, rounds) + search(subject, rows, rounds)
        if not which or "routes" in which:
            routes(subject, batches, rounds)
    require_kept(ratios)


def backbone(subject: Subject, batches: tuple[int, ...], rounds: int) -> list[Ratio]:
    of_torch = torch_ways(subject.network)
    fp32 = subject.bundles["fp32"]
    openvino_default = f"OpenVINO, its own choice ({openvino_choice()})"
    ways = {name: Way(of_torch[name], FP32) for name in of_torch if "bf16" not in name} | {
        "OpenVINO, float32": Way(openvino_way(fp32, INFERENCE_PRECISION_HINT="f32"), FP32),
        openvino_default: Way(openvino_way(fp32), BF16),
        OURS: Way(subject.verifiers["fp32"].embed, FP32),
        OURS_INT8: Way(subject.verifiers["int8"].embed, INT8),
    }
    measured = measure("Backbone", subject, ways, batches, rounds)
    ours = [name for name in (OURS, OURS_INT8) if measured.auc_drop.get(name, 0) <= MOST_AUC_DROP]
    ratios = []
    for batch, seconds in measured.picture_s.items():
        promised = batch == PROMISED_AT_BATCH
        best = min(ours, key=seconds.__getitem__)
        for name, slow, quick, least in (
            (f"{EAGER} / {OURS}", EAGER, OURS, 1.35),
            (f"{OURS} / {OURS_INT8}", OURS, OURS_INT8, 2.5),
            (f"{openvino_default} / best of ours ({best})", openvino_default, best, 1.0),
        ):
            ratios.append(Ratio(f"{name}, batch {batch}", seconds[slow] / seconds[quick], least if promised else None))
    print_ratios("Backbone: time of the first over that of the second", ratios)
    if subject.is_trained:  # without a way of ours within the limit there is no best one
        print(f"Ways of ours with a ROC AUC at most {MOST_AUC_DROP} below PyTorch's: {', '.join(ours)}", flush=True)
    return ratios


def measure(title: str, subject: Subject, ways: dict[str, Way], batches: tuple[int, ...], rounds: int) -> Measured:
    """Compare what each way gives with PyTorch's float32, then time them in turns; one table."""
    differences, aucs = {}, {}
    reference_auc = subject.roc_auc(subject.reference) if subject.is_trained else None
    for name, way in ways.items():
        vectors = embed_all(way.embed, subject.images, max(batches))
        differences[name] = largest_difference(vectors, subject.reference)
        assert differences[name] <= way.limit, (name, differences[name], way.limit)
        if subject.is_trained:
            aucs[name] = subject.roc_auc(vectors)
    picture_s = {batch: times(subject, ways, batch, rounds) for batch in batches}
    rows = []
    for name in ways:
        columns = [f"{picture_s[batch][name] * 1e3:.2f}" for batch in batches]
        accuracy = (f"{aucs[name]:.4f}", f"{reference_auc - aucs[name]:+.5f}") if reference_auc else ("", "")
        rows.append((name, *columns, f"{differences[name]:.1e}", *accuracy))
    header = [f"ms a picture, batch {batches[0]}", *map(str, batches[1:]), "largest relative difference"]
    print_table(title, ("way", *header, "ROC AUC", "AUC drop"), rows)
    return Measured(picture_s, {name: reference_auc - auc for name, auc in aucs.items()} if reference_auc else {})


def times(subject: Subject, ways: dict[str, Way], batch: int, rounds: int) -> dict[str, float]:
    """Median seconds a picture; what is timed is compared first."""
    n_batches = -(-PICTURES_A_ROUND // batch)
    indices = np.arange(n_batches * batch).reshape(n_batches, batch) % len(subject.images)
    parts = [np.ascontiguousarray(subject.images[rows]) for rows in indices]
    for name, way in ways.items():
        for part, rows in zip(parts, indices, strict=True):
            difference = largest_difference(way.embed(part), subject.reference[rows])
            assert difference <= way.limit, (name, batch, difference)

    def all_parts(embed: Embed) -> Callable[[], object]:
        return lambda: [embed(part) for part in parts]

    seconds = medians(in_turns({name: all_parts(way.embed) for name, way in ways.items()}, rounds))
    return {name: value / indices.size for name, value in seconds.items()}


def cached_pairs(subject: Subject, batches: tuple[int, ...], rounds: int) -> list[Ratio]:
    """A call of 2,048 pairs of embeddings in memory, against embedding both pictures at the best batch and the head."""
    n_pairs = min(max(PICTURES_A_ROUND // 2, *batches), len(subject.images) // 2)
    left, right = np.random.default_rng(0).integers(len(subject.images), size=(2, SCORE_CHUNK_PAIRS))
    left[:n_pairs], right[:n_pairs] = np.arange(n_pairs), np.arange(n_pairs) + n_pairs
    sides = {}
    ways: dict[str, Callable[[], np.ndarray]] = {}
    for precision, verifier in subject.verifiers.items():
        vectors = embed_all(verifier.embed, subject.images, max(batches))
        sides[precision] = vectors[left], vectors[right]
        ways[precision] = lambda v=verifier, s=sides[precision]: v.score(*s)  # type: ignore[misc]
        for batch in batches:
            ways[f"{precision}, batch {batch}"] = anew(verifier, subject.images, n_pairs, batch)
            difference = np.abs(ways[f"{precision}, batch {batch}"]() - ways[precision]()[:n_pairs]).max()
            assert difference <= 1e-5, (precision, batch, difference)
    seconds = medians(in_turns(ways, rounds))
    rows, ratios = [], []
    for precision in subject.verifiers:
        cached_s = seconds[precision] / SCORE_CHUNK_PAIRS
        anew_s = {batch: seconds[f"{precision}, batch {batch}"] / n_pairs for batch in batches}
        best = min(anew_s, key=anew_s.__getitem__)
        rows.append((precision, f"{cached_s * 1e6:.2f} us", f"{anew_s[best] * 1e3:.2f} ms (batch {best})"))
        promised = 2000 if precision == "fp32" else None
        ratios.append(Ratio(f"embedding both pictures / cached pair, {precision}", anew_s[best] / cached_s, promised))
    print_table("A pair", ("backbone", "embeddings known", "both pictures embedded"), rows)
    print_ratios("A pair: what known embeddings save", ratios)
    return ratios


def anew(verifier: OnnxVerifier, images: np.ndarray, n_pairs: int, batch: int) -> Callable[[], np.ndarray]:
    """Scores of picture i with picture i + n_pairs; every picture embedded for its pair."""

    def embedded(first: int, end: int) -> np.ndarray:
        return np.concatenate([verifier.embed(images[k : min(k + batch, end)]) for k in range(first, end, batch)])

    return lambda: verifier.score(embedded(0, n_pairs), embedded(n_pairs, 2 * n_pairs))


def head(subject: Subject, rounds: int) -> list[Ratio]:
    """The head alone against the same head in PyTorch."""
    ratios, rows = [], []
    cls_head = subject.network.cls_head
    for n_pairs, calls in ((SCORE_CHUNK_PAIRS, 5), (1, 1000)):
        left, right = (subject.reference[np.arange(n_pairs) * step % len(subject.images)] for step in (1, 7))

        @torch.inference_mode()
        def in_torch(left: np.ndarray = left, right: np.ndarray = right) -> np.ndarray:
            scores: np.ndarray = cls_head(torch.from_numpy(left) * torch.from_numpy(right))[:, 0].numpy()
            return scores

        def ours(left: np.ndarray = left, right: np.ndarray = right) -> np.ndarray:
            return subject.verifiers["fp32"].score(left, right)

        difference = np.abs(ours() - in_torch()).max()
        assert difference <= 1e-5, difference
        ways = {"ours": repeated(ours, calls), "PyTorch": repeated(in_torch, calls)}
        seconds = {name: value / calls / n_pairs for name, value in medians(in_turns(ways, rounds)).items()}
        rows.append((f"{n_pairs:,}", *(f"{seconds[name] * 1e6:.2f}" for name in ways), f"{difference:.1e}"))
        ratios.append(Ratio(f"PyTorch's head / ours, {n_pairs:,} pairs a call", seconds["PyTorch"] / seconds["ours"]))
    print_table("Head", ("pairs a call", "ours, us a pair", "PyTorch eager", "largest difference of a score"), rows)
    print_ratios("Head: time of the first over that of the second", ratios)
    return ratios


def repeated(call: Callable[[], object], times: int) -> Callable[[], object]:
    return lambda: [call() for _ in range(times)]


def search(subject: Subject, n_rows: int, rounds: int) -> list[Ratio]:
    """One picture against a gallery in memory: the bare head, and what an inner product instead of it would cost."""
    run_head = subject.verifiers["fp32"]._head.run
    random = np.random.default_rng(0)
    matrix = random.standard_normal((n_rows, subject.reference.shape[1]), np.float32)
    queries = matrix[:: n_rows // 32][:32] + random.standard_normal((32, matrix.shape[1]), np.float32) / 2
    query = queries[:1]
    index = faiss.IndexFlatIP(matrix.shape[1])
    index.add(matrix)

    def bare_head() -> np.ndarray:
        chunks = [matrix[k : k + CHUNK_ROWS] for k in range(0, n_rows, CHUNK_ROWS)]
        return np.concatenate([run_head(None, {"left": query, "right": chunk})[0][:, 0] for chunk in chunks])

    expected = subject.network.cls_head(torch.from_numpy(query * matrix[:1000])).detach().numpy()[:, 0]
    assert np.abs(bare_head()[:1000] - expected).max() <= 1e-5
    products, found = queries @ matrix.T, index.search(queries, 1)
    assert np.array_equal(found[1][:, 0], products.argmax(axis=1))
    assert np.array_equal(index.search(query, 1)[1], found[1][:1])
    assert np.allclose(found[0][:, 0], products.max(axis=1), rtol=1e-4)
    ways: dict[str, Callable[[], object]] = {
        "bare head, one query": bare_head,
        "FAISS IndexFlatIP, one query": lambda: index.search(query, 1),
        "NumPy inner product, one query": lambda: (matrix @ query[0]).argmax(),
        "FAISS IndexFlatIP, 32 queries at once": lambda: index.search(queries, 1),
    }
    seconds = medians(in_turns(ways, rounds))
    per_query = {name: value / (32 if "32" in name else 1) for name, value in seconds.items()}
    rows = [(name, f"{value * 1e3:.2f}", f"{value / n_rows * 1e6:.3f}") for name, value in per_query.items()]
    print_table(f"1:{n_rows:,}, {matrix.shape[1]} numbers a row", ("way", "ms a query", "us a row"), rows)
    bare_s = per_query.pop("bare head, one query")
    ratios = [Ratio(f"bare head / {name}", bare_s / value) for name, value in per_query.items()]
    print_ratios("Most that a score cheaper than the head could save", ratios)
    return ratios


def routes(subject: Subject, batches: tuple[int, ...], rounds: int) -> None:
    fp32, int8 = subject.bundles["fp32"], subject.bundles["int8"]
    ways = {
        OURS: Way(subject.verifiers["fp32"].embed, FP32),
        "fp32, single-threaded runs of one session at once": Way(several_runs(fp32), FP32),
        "fp32, threads sleep between operators": Way(session_way(fp32, **SLEEPING), FP32),
        "fp32, threads spin between runs": Way(session_way(fp32), FP32),
        "fp32, optimisation off": Way(session_way(fp32, level="ORT_DISABLE_ALL"), FP32),
        "fp32, optimisation basic": Way(session_way(fp32, level="ORT_ENABLE_BASIC"), FP32),
        "fp32, optimisation extended": Way(session_way(fp32, level="ORT_ENABLE_EXTENDED"), FP32),
        "OpenVINO, float32": Way(openvino_way(fp32, INFERENCE_PRECISION_HINT="f32"), FP32),
        "OpenVINO, bf16": Way(openvino_way(fp32, INFERENCE_PRECISION_HINT="bf16"), BF16),
        "PyTorch, channels-last, bf16": Way(torch_ways(subject.network)["PyTorch eager, channels-last, bf16"], BF16),
        OURS_INT8: Way(subject.verifiers["int8"].embed, INT8),
        "int8, single-threaded runs of one session at once": Way(several_runs(int8), INT8),
        "int8, threads sleep between operators": Way(session_way(int8, **SLEEPING), INT8),
        "int8, threads spin between runs": Way(session_way(int8), INT8),
        "OpenVINO, our int8 graph": Way(openvino_way(int8), INT8),
    }
    if platform.machine() in ("aarch64", "arm64"):
        ways["fp32, bf16 matrix products"] = Way(session_way(fp32, **ARM_BF16), BF16)
    else:
        print("mlas.enable_gemm_fastmath_arm64_bfloat16 left out: ONNX Runtime has it on ARM only")
    measured = measure("Routes", subject, ways, batches, rounds)
    allowed = [name for name in ways if measured.auc_drop.get(name, 0) <= MOST_AUC_DROP]
    for batch, seconds in measured.picture_s.items():
        first, second = sorted(allowed, key=seconds.__getitem__)[:2]
        print(
            f"Best at batch {batch}{f', ROC AUC at most {MOST_AUC_DROP} lower' * subject.is_trained}: {first}, "
            f"{seconds[OURS] / seconds[first]:.2f} times {OURS}, {seconds[OURS_INT8] / seconds[first]:.2f} times "
            f"{OURS_INT8}; then {second}, {seconds[OURS] / seconds[second]:.2f} times {OURS}",
            flush=True,
        )


SLEEPING = {"session__intra_op__allow_spinning": "0"}
ARM_BF16 = {"mlas__enable_gemm_fastmath_arm64_bfloat16": "1"}


def several_runs(bundle: Path) -> Embed:
    verifier = OnnxVerifier(bundle, provider="cpu", throughput=True)
    threads = ThreadPoolExecutor(verifier.calls_at_once)
    return lambda images: np.concatenate(
        list(threads.map(verifier.embed, np.array_split(images, verifier.calls_at_once)))
    )


if __name__ == "__main__":
    main()
