from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siamese_deploy import Gallery, OnnxVerifier
from siamese_deploy.errors import UsageError
from siamese_deploy.gallery import Candidate, Identification
from siamese_deploy.gallery.records import Group, StoredPicture
from siamese_deploy.gallery.search import SMALLEST_ROWS, Shortcut

ROWS_AN_IDENTITY = 4
IDENTITIES = SMALLEST_ROWS // ROWS_AN_IDENTITY


def drawing(seed: int) -> np.ndarray:
    """(24, 32, 3) uint8: coarse squares of random colours."""
    squares = np.random.RandomState(seed).randint(0, 256, (6, 8, 3), np.uint8)
    return squares.repeat(4, axis=0).repeat(4, axis=1)


def enrol(gallery: Gallery, names: list[str], rows_each: int) -> None:
    """Made-up rows among the embeddings of drawings."""
    random = np.random.RandomState(0)
    drawn = gallery.verifier.embed(np.stack([drawing(-seed % 2**32) for seed in range(1, 65)]))
    n_rows = len(names) * rows_each
    parts = random.dirichlet(np.full(len(drawn), 0.1), n_rows).astype(np.float32)
    vectors = parts @ drawn
    pictures = [StoredPicture(names[k // rows_each], f"{k}".encode().ljust(32), "") for k in range(n_rows)]
    groups = [
        Group(name, pictures[k * rows_each : (k + 1) * rows_each], vectors[k * rows_each : (k + 1) * rows_each])
        for k, name in enumerate(names)
    ]
    assert all(isinstance(outcome, list) for outcome in gallery.store.enrol(groups))


@pytest.fixture(scope="module")
def verifier(tiny_bundle: Path) -> OnnxVerifier:
    return OnnxVerifier(tiny_bundle, provider="cpu")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, verifier: OnnxVerifier) -> Gallery:
    """As few rows as fast questions need; not to be changed."""
    gallery = Gallery(tmp_path_factory.mktemp("large") / "gallery", verifier, create=True)
    enrol(gallery, [f"id{k}" for k in range(IDENTITIES)], ROWS_AN_IDENTITY)
    return gallery


@pytest.fixture
def copy(large: Gallery, tmp_path: Path) -> Gallery:
    return Gallery(shutil.copytree(large.store.folder, tmp_path / "copy"), large.verifier)


def vectors_file(gallery: Gallery) -> Path:
    (file,) = gallery.store.folder.glob("vectors-*.f32")
    return file


def damage(gallery: Gallery, name: str) -> None:
    """Every vector of an identity."""
    with open(vectors_file(gallery), "r+b") as file:
        for picture in gallery.store.pictures(name):
            file.seek(picture.slot * 4 * gallery.verifier.embedding_dim + 5)
            file.write(b"\xff\xff\xff")


def everybody(gallery: Gallery, picture: np.ndarray) -> dict[str, Candidate]:
    found = gallery.identify(picture, top=10 * IDENTITIES)
    return {candidate.name: candidate for candidate in found.candidates}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), threshold=st.floats(0, 1), top=st.integers(1, 15))
def test_a_candidate_is_what_the_exact_search_makes_of_it(
    large: Gallery, seed: int, threshold: float, top: int
) -> None:
    exact = everybody(large, drawing(seed))
    found = large.identify(drawing(seed), top=top, threshold=threshold, fast=True)
    assert [exact[candidate.name] for candidate in found.candidates] == list(found.candidates)
    assert [c.score for c in found.candidates] == sorted((c.score for c in found.candidates), reverse=True)
    if found.decision == "match":
        assert found.name is not None
        assert exact[found.name].score >= threshold


def test_the_ten_best_are_found_by_scoring_few_rows(large: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    score, scored, hits, questions = large.verifier.score, 0, 0, 40

    def counting(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        nonlocal scored
        scored += len(right)
        return score(left, right)

    for seed in range(questions):
        exact = large.identify(drawing(seed), top=10)
        with monkeypatch.context() as patch:
            patch.setattr(large.verifier, "score", counting)
            found = large.identify(drawing(seed), top=10, fast=True)
        hits += sum(candidate.score >= exact.candidates[-1].score for candidate in found.candidates)
    assert hits >= 0.999 * 10 * questions
    assert scored <= 0.3 * SMALLEST_ROWS * questions  # an eighth is the sample


def test_a_shortcut_that_leads_nowhere_ends_in_the_exact_answer(
    large: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = np.random.RandomState(0).permutation(SMALLEST_ROWS).astype(np.float32)
    monkeypatch.setattr(Shortcut, "promise", lambda self, sample_scores: order)
    for seed in range(5):
        assert large.identify(drawing(seed), top=10, fast=True) == large.identify(drawing(seed), top=10)


def test_small_galleries_are_searched_exactly(tmp_path: Path, verifier: OnnxVerifier) -> None:
    gallery = Gallery(tmp_path / "gallery", verifier, create=True)
    assert gallery.identify(drawing(0), fast=True).candidates == ()
    enrol(gallery, ["a", "b", "c"], 5)
    assert gallery.identify(drawing(0), fast=True) == gallery.identify(drawing(0))


def test_few_identities_of_many_rows(tmp_path: Path, verifier: OnnxVerifier) -> None:
    gallery = Gallery(tmp_path / "gallery", verifier, create=True)
    enrol(gallery, ["a", "b", "c"], -(-SMALLEST_ROWS // 3))
    assert gallery.identify(drawing(0), fast=True) == gallery.identify(drawing(0))


def test_rows_that_are_all_alike(tmp_path: Path, verifier: OnnxVerifier) -> None:
    gallery = Gallery(tmp_path / "gallery", verifier, create=True)
    pictures = [StoredPicture("a", f"{k}".encode().ljust(32), "") for k in range(SMALLEST_ROWS)]
    vectors = np.ones((len(pictures), verifier.embedding_dim), np.float32)
    gallery.store.enrol([Group("a", pictures, vectors)])
    assert gallery.identify(drawing(0), fast=True) == gallery.identify(drawing(0))


def test_the_mean_is_refused(large: Gallery) -> None:
    with pytest.raises(UsageError, match="fast finds the largest score only"):
        large.identify(drawing(0), per_identity="mean", fast=True)


@pytest.mark.parametrize("asked_before", [True, False])
def test_damaged_rows_are_never_matched(copy: Gallery, asked_before: bool) -> None:
    best = copy.identify(drawing(0), fast=asked_before).candidates[0].name
    damage(copy, best)
    found = copy.identify(drawing(0), fast=True)
    assert best not in {candidate.name for candidate in found.candidates}
    assert 1 <= found.damaged <= ROWS_AN_IDENTITY
    assert found.candidates == copy.identify(drawing(0)).candidates


@pytest.mark.parametrize("asked_before", [True, False])
def test_a_damaged_row_of_the_best_is_counted_once(copy: Gallery, asked_before: bool) -> None:
    best = copy.identify(drawing(0), fast=asked_before).candidates[0]
    slots = [picture.slot for picture in copy.store.pictures(best.name)]
    vectors = np.fromfile(vectors_file(copy), "<f4").reshape(-1, copy.verifier.embedding_dim)[slots]
    worst = slots[int(copy.verifier.score(copy.verifier.embed(drawing(0)[None]), vectors).argmin())]
    with open(vectors_file(copy), "r+b") as file:
        file.seek(worst * 4 * copy.verifier.embedding_dim + 5)
        file.write(b"\xff\xff\xff")
    found = copy.identify(drawing(0), fast=True)
    assert found.candidates[0] == Candidate(best.name, best.score, ROWS_AN_IDENTITY - 1)
    assert found.damaged == 1


def test_a_vector_file_cut_short_is_no_crash(copy: Gallery) -> None:
    copy.identify(drawing(0), fast=True)
    with open(vectors_file(copy), "r+b") as file:
        file.truncate(SMALLEST_ROWS // 2 * 4 * copy.verifier.embedding_dim + 6)
    found = copy.identify(drawing(0), fast=True)
    assert found.damaged > 0
    exact = everybody(copy, drawing(0))
    assert [exact[candidate.name] for candidate in found.candidates] == list(found.candidates)


def test_changes_of_the_gallery_are_seen(copy: Gallery) -> None:
    def fast() -> Identification:
        return copy.identify(drawing(3), fast=True)

    best = fast().candidates[0].name
    copy.enrol("anew", [drawing(seed) for seed in range(3, 4 + ROWS_AN_IDENTITY)], doubles=False)
    assert fast() == copy.identify(drawing(3))
    copy.remove(best)  # and there are still enough rows for a fast question
    assert best not in {candidate.name for candidate in fast().candidates}
    assert fast() == copy.identify(drawing(3))


def test_threads_prepare_once_and_agree(copy: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    of = Shortcut.of
    monkeypatch.setattr(Shortcut, "of", lambda snapshot: prepared.append(1) or of(snapshot))
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda seed: copy.identify(drawing(seed), fast=True), [0, 1] * 6))
    assert answers[2:] == answers[:2] * 5
    assert prepared == [1]
