"""1:N over a large gallery: what `identify` costs above the bare head, and what `fast` gains and misses.

    python search.py --bundle BUNDLE                                       1,000,000 rows, 20 questions
    python search.py --bundle BUNDLE --rows 100000 --questions 200

Rows are made from the embeddings of Omniglot's pictures ($SIAMESE_DATA or ../shared/data): an identity is a blend of
two pictures, and its four rows lie about it as the pictures of a character do. Questions are validation pictures that
no row was made of. Each is asked in turn exactly, fast, and (the first few) of the bare head. Recall counts the ten
best identities; one with the same score as the tenth counts for it. The gallery takes 4 GB for a million rows of 1,000
numbers, and the matrix for the bare head as much memory.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click
import numpy as np
from measuring import Ratio, print_machine, print_ratios, print_table, require_kept
from training import omniglot

from siamese_deploy import Gallery, OnnxVerifier
from siamese_deploy.gallery import Identification
from siamese_deploy.gallery.records import Group, StoredPicture
from siamese_deploy.gallery.search import Shortcut
from siamese_deploy.gallery.store import CHUNK_ROWS
from siamese_deploy.image_folder import scan_image_folder
from siamese_deploy.preprocess import load_image

TOP = 10
ROWS_AN_IDENTITY = 4
ENROLLED_AT_ONCE = 20_000
ROUNDS_OF_THE_BARE_HEAD = 5
HELD_OUT = 200
T = TypeVar("T")


@click.command()
@click.option("--bundle", type=click.Path(exists=True, path_type=Path), required=True, help="Of a trained network.")
@click.option("--rows", "n_rows", type=click.IntRange(ENROLLED_AT_ONCE), default=1_000_000, show_default=True)
@click.option("--questions", type=click.IntRange(ROUNDS_OF_THE_BARE_HEAD, HELD_OUT), default=20, show_default=True)
@click.option("--gallery", "folder", type=click.Path(path_type=Path), help="Made there and kept, or used again.")
@click.option("--only_fill", is_flag=True, help="Make the gallery, ask nothing.")
@click.option("--no_promises", is_flag=True, help="Print ratios only: for a network that has learnt nothing.")
def main(bundle: Path, n_rows: int, questions: int, folder: Path | None, only_fill: bool, no_promises: bool) -> None:
    print_machine("onnxruntime", "numpy")
    with tempfile.TemporaryDirectory() as temporary:
        verifier = OnnxVerifier(bundle, provider="cpu")
        train, val = (embedded(verifier, omniglot() / part) for part in ("train", "val"))
        asked = np.random.default_rng(1).permutation(len(val[0]))[:HELD_OUT]
        folder = folder or Path(temporary, "gallery")
        if not folder.exists():
            rest = np.setdiff1d(np.arange(len(val[0])), asked)
            vectors = np.concatenate([train[0], val[0][rest]])
            labels = np.concatenate([train[1], val[1][rest] + train[1].max() + 1])
            fill(Gallery(folder, verifier, create=True), vectors, labels, n_rows)
        if only_fill:
            return
        ratios = measure(Gallery(folder, verifier), verifier, val[0][asked[:questions]])
    if not no_promises:
        require_kept(ratios)


def embedded(verifier: OnnxVerifier, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """(n, dim) float32 and (n,) classes."""
    folder = scan_image_folder(root)
    images = [load_image(folder.absolute_path(k), verifier.preprocess) for k in range(len(folder))]
    return verifier.embed(np.stack(images)), np.asarray(folder.labels)


def fill(gallery: Gallery, vectors: np.ndarray, labels: np.ndarray, n_rows: int) -> None:
    order = np.argsort(labels, kind="stable")
    vectors, labels = vectors[order], labels[order]
    first = np.searchsorted(labels, labels)
    size = np.searchsorted(labels, labels, side="right") - first
    for start in range(0, n_rows, ENROLLED_AT_ONCE):
        random = np.random.default_rng(start)
        n = min(ENROLLED_AT_ONCE, n_rows - start)
        one, other = random.integers(len(vectors), size=(2, -(-n // ROWS_AN_IDENTITY)))
        part = random.uniform(0.5, 1, (len(one), 1)).astype(np.float32)
        centres = part * vectors[one] + (1 - part) * vectors[other]
        drawn = random.integers(len(vectors), size=n)
        of_its_class = first[drawn] + random.integers(2**30, size=n) % size[drawn]
        rows = np.repeat(centres, ROWS_AN_IDENTITY, axis=0)[:n]
        rows += np.float32(0.7) * (vectors[drawn] - vectors[of_its_class])
        rows += np.float32(0.01 * vectors.std()) * random.standard_normal(rows.shape, np.float32)
        pictures = [
            StoredPicture(f"id{(start + k) // ROWS_AN_IDENTITY}", f"{start + k}".encode().ljust(32), "")
            for k in range(n)
        ]
        step = range(0, n, ROWS_AN_IDENTITY)
        groups = [
            Group(pictures[k].name, pictures[k : k + ROWS_AN_IDENTITY], rows[k : k + ROWS_AN_IDENTITY]) for k in step
        ]
        assert all(isinstance(outcome, list) for outcome in gallery.store.enrol(groups))


def measure(gallery: Gallery, verifier: OnnxVerifier, questions: np.ndarray) -> list[Ratio]:
    started_s = time.perf_counter()
    with gallery.store.snapshot() as held:
        opened_s = time.perf_counter() - started_s
        gallery._rows = rows = held.rows
        matrix = np.concatenate([vectors.copy() for _, vectors in held.sound_vectors()])
        prepared_s, gallery._shortcut = timed(lambda: Shortcut.of(held))
    assert len(matrix) == len(rows.slots)
    run_head = verifier._head.run

    def bare(question: np.ndarray) -> np.ndarray:
        chunks = [matrix[k : k + CHUNK_ROWS] for k in range(0, len(matrix), CHUNK_ROWS)]
        return np.concatenate([run_head(None, {"left": question[None], "right": chunk})[0][:, 0] for chunk in chunks])

    seconds: dict[str, list[float]] = {"bare": [], "exact": [], "fast": []}
    recalls: list[float] = []
    for k, question in enumerate(questions):
        exact_s, exact = timed(lambda q=question: gallery._identification(q, TOP, "max", None, 0.0, fast=False))  # type: ignore[misc]
        fast_s, fast = timed(lambda q=question: gallery._identification(q, TOP, "max", None, 0.0, fast=True))  # type: ignore[misc]
        seconds["exact"].append(exact_s)
        seconds["fast"].append(fast_s)
        if k < ROUNDS_OF_THE_BARE_HEAD:
            bare_s, scores = timed(lambda q=question: bare(q))  # type: ignore[misc]
            seconds["bare"].append(bare_s)
            best = np.zeros(len(rows.names), np.float32)
            np.maximum.at(best, rows.identities, scores)
            assert np.array_equal(np.sort(best)[::-1][:TOP], [candidate.score for candidate in exact.candidates])
        for candidate in fast.candidates:
            of_it = matrix[rows.identities == rows.names.index(candidate.name)]
            assert candidate.pictures == len(of_it)
            assert candidate.score == verifier.score(question[None], of_it).max()
        recalls.append(recall(fast, exact))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    title = f"1:{len(matrix):,}, {len(rows.names):,} identities, {len(questions)} questions"
    table = [(name, f"{value * 1e3:,.0f}", f"{value / len(matrix) * 1e6:.2f}") for name, value in median.items()]
    print_table(title, ("way", "ms a question", "us a row"), table)
    print(
        f"slowest fast question {max(seconds['fast']) * 1e3:,.0f} ms; preparing for fast ones {prepared_s:.2f} s; "
        f"reading who is enrolled {opened_s:.1f} s; questions with a miss {sum(r < 1 for r in recalls)}"
    )
    ratios = [
        Ratio("exact / bare head", median["exact"] / median["bare"], at_most=1.5),
        Ratio("exact / fast", median["exact"] / median["fast"], at_least=5),
        Ratio(f"recall@{TOP} of fast", statistics.mean(recalls), at_least=0.999),
    ]
    print_ratios(title, ratios)
    return ratios


def recall(found: Identification, exact: Identification) -> float:
    last = exact.candidates[-1].score
    return sum(candidate.score >= last for candidate in found.candidates) / len(exact.candidates)


def timed(call: Callable[[], T]) -> tuple[float, T]:
    started_s = time.perf_counter()
    result = call()
    return time.perf_counter() - started_s, result


if __name__ == "__main__":
    main()
