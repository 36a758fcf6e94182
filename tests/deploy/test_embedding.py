from __future__ import annotations

import io
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import DIM

from siamese_deploy import OnnxVerifier
from siamese_deploy.embedding import SCORE_CHUNK_PAIRS, embed_images, embed_pictures, score_chunks
from siamese_deploy.embedding_cache import EmbeddingCache
from siamese_deploy.errors import InputDataError, IntegrityError, ProviderError
from siamese_deploy.image_folder import scan_image_folder
from siamese_deploy.pairs import Pairs, sample_pairs
from siamese_deploy.preprocess import load_image
from siamese_deploy.verifier import Embeddings, Images, Scores


class Overflowing:
    """A bundle's verifier whose network overflows on some inputs, as half precision does."""

    def __init__(self, verifier: OnnxVerifier, bad_image: int, bad_score: float) -> None:
        self.preprocess, self.backend, self.provider = verifier.preprocess, verifier.backend, verifier.provider
        self.model_digest, self.embedding_dim = verifier.model_digest, verifier.embedding_dim
        self.batch_size, self.calls_at_once = verifier.batch_size, verifier.calls_at_once
        self._verifier, self._bad_image, self._bad_score = verifier, bad_image, bad_score
        self.images_embedded = 0

    def embed(self, images: Images) -> Embeddings:
        embeddings = self._verifier.embed(images)
        if self.images_embedded <= self._bad_image < self.images_embedded + len(images):
            embeddings[self._bad_image - self.images_embedded, 3] = np.inf
        self.images_embedded += len(images)
        return embeddings

    def score(self, left: Embeddings, right: Embeddings) -> Scores:
        scores = self._verifier.score(left, right)
        scores[-1] = self._bad_score
        return scores


@pytest.fixture(scope="module")
def verifier(tiny_bundle: Path) -> OnnxVerifier:
    return OnnxVerifier(tiny_bundle, provider="cpu")


def test_every_picture_is_embedded_once_and_in_its_row(verifier: OnnxVerifier, pictures: Path) -> None:
    (pictures / "bolt/2.png").write_text("no picture")
    for k in range(2 * verifier.batch_size):
        (pictures / f"door/copy{k}.png").symlink_to(pictures / "door/0.png")
    folder = scan_image_folder(pictures)
    counting = Overflowing(verifier, -1, 0.5)
    wanted = np.arange(1, len(folder))  # all but the first
    found = embed_images(counting, folder, wanted)
    assert counting.images_embedded == len(folder) - 2
    assert found.vectors.shape == (len(folder) - 2, DIM)
    assert [file.path for file in found.skipped] == ["bolt/2.png"]
    assert found.row_of_image[0] == -1
    assert found.row_of_image[folder.paths.index("bolt/2.png")] == -1
    for image in (1, 7, len(folder) - 1):
        alone = verifier.embed(load_image(folder.absolute_path(image), verifier.preprocess)[None])[0]
        assert found.vectors[found.row_of_image[image]] == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def side_by_side(tiny_bundle: Path) -> OnnxVerifier:
    return OnnxVerifier(tiny_bundle, provider="cpu", throughput=True, threads=2)


def test_pictures_that_were_handed_over_are_let_go(verifier: OnnxVerifier, pictures: Path) -> None:
    """Else a long run without a cache holds every embedding twice."""
    files = [pictures / "bolt/2.png"] * (6 * verifier.batch_size)
    batches = embed_pictures(verifier, files)
    first = [weakref.ref(item) for item in next(batches)]
    assert len(first) == verifier.batch_size
    next(batches)
    assert [item() for item in first] == [None] * len(first)
    assert len(list(batches)) == 4


def test_calls_side_by_side_give_every_picture_its_own_embedding(
    verifier: OnnxVerifier, side_by_side: OnnxVerifier
) -> None:
    n_pictures = 7 * side_by_side.batch_size + 3
    files = [picture_bytes(k) for k in range(n_pictures)]
    files[11] = b"no picture"
    alone = [item for batch in embed_pictures(verifier, files) for item in batch]
    found = [item for batch in embed_pictures(side_by_side, files) for item in batch]
    assert [item.picture for item in found] == files
    assert found[11].vector is None
    assert "not a picture" in found[11].reason
    for k in set(range(n_pictures)) - {11}:
        assert np.array_equal(found[k].vector, alone[k].vector)
    assert len({item.vector.tobytes() for item in found if item.vector is not None}) == n_pictures - 1


def test_as_many_calls_at_once_as_the_verifier_wants(
    verifier: OnnxVerifier, side_by_side: OnnxVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [picture_bytes(k) for k in range(4 * verifier.batch_size)]
    both_there = threading.Barrier(2, timeout=20)
    embed = side_by_side.embed

    def embed_when_two_are_there(images: Images) -> Embeddings:
        both_there.wait()  # a call that stays alone breaks it
        return embed(images)

    monkeypatch.setattr(side_by_side, "embed", embed_when_two_are_there)
    assert sum(len(batch) for batch in embed_pictures(side_by_side, files)) == len(files)

    callers = []
    monkeypatch.setattr(verifier, "embed", lambda images: callers.append(threading.get_ident()) or embed(images))
    assert sum(len(batch) for batch in embed_pictures(verifier, files)) == len(files)
    assert callers == [threading.get_ident()] * 4


def test_a_call_that_fails_beside_others_ends_the_run(
    side_by_side: OnnxVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [picture_bytes(k) for k in range(6 * side_by_side.batch_size)]
    embed, third = side_by_side.embed, load_image(files[2 * side_by_side.batch_size], side_by_side.preprocess)

    def fail_on_the_third(images: Images) -> Embeddings:
        if np.array_equal(images[0], third):
            raise ProviderError("out of memory")
        return embed(images)

    monkeypatch.setattr(side_by_side, "embed", fail_on_the_third)
    done = 0
    with pytest.raises(ProviderError, match="out of memory"):
        for batch in embed_pictures(side_by_side, files):
            done += len(batch)
    assert done == 2 * side_by_side.batch_size


def picture_bytes(seed: int) -> bytes:
    pixels = np.random.RandomState(seed).randint(0, 256, (24, 32, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "bmp")
    return buffer.getvalue()


def test_pairs_are_scored_in_chunks_as_if_at_once(verifier: OnnxVerifier, pictures: Path) -> None:
    folder = scan_image_folder(pictures)
    found = embed_images(verifier, folder, np.arange(len(folder)))
    n_pairs = SCORE_CHUNK_PAIRS + 3
    left, right = np.arange(n_pairs) % 16, (np.arange(n_pairs) * 7 + 1) % 16
    pairs = Pairs(left, right, folder.labels[left] == folder.labels[right])
    chunks = list(score_chunks(verifier, found, pairs))
    assert [len(chunk) for chunk, _ in chunks] == [SCORE_CHUNK_PAIRS, 3]
    scores = np.concatenate([scores for _, scores in chunks])
    assert scores.shape == (n_pairs,)
    assert scores == pytest.approx(verifier.score(found.vectors[left], found.vectors[right]), abs=1e-6)


def test_an_embedding_that_is_not_finite_is_an_error_that_names_the_picture(
    verifier: OnnxVerifier, pictures: Path
) -> None:
    folder = scan_image_folder(pictures)
    with pytest.raises(IntegrityError, match=r"bolt/1\.png: the network gives no finite embedding"):
        embed_images(Overflowing(verifier, folder.paths.index("bolt/1.png"), 0.5), folder, np.arange(16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1, 1.1])
def test_a_score_outside_0_to_1_is_an_error(verifier: OnnxVerifier, pictures: Path, bad: float) -> None:
    folder = scan_image_folder(pictures)
    found = embed_images(verifier, folder, np.arange(16))
    with pytest.raises(IntegrityError, match=r"NaN or outside \[0, 1\]"):
        list(score_chunks(Overflowing(verifier, -1, bad), found, sample_pairs(folder)))


def test_nothing_to_embed_is_said(verifier: OnnxVerifier, pictures: Path) -> None:
    folder = scan_image_folder(pictures)
    with pytest.raises(InputDataError, match="none of 0 pictures can be read"):
        embed_images(verifier, folder, np.arange(0))


def test_a_known_picture_is_neither_decoded_nor_embedded(
    verifier: OnnxVerifier, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, images = scan_image_folder(pictures), np.arange(16)
    cache = EmbeddingCache(tmp_path / "cache")
    first = embed_images(verifier, folder, images, cache=cache)

    def never(*_: object) -> None:
        raise AssertionError("not needed")

    monkeypatch.setattr("siamese_deploy.embedding.decode_bytes", never)
    monkeypatch.setattr(verifier, "embed", never)
    second = embed_images(verifier, folder, images, cache=cache)
    assert np.array_equal(first.vectors, second.vectors)
    assert np.array_equal(first.row_of_image, second.row_of_image)


@pytest.mark.parametrize("position", [0, 40, 299])
def test_pictures_are_kept_also_where_a_run_ends_early(
    verifier: OnnxVerifier, pictures: Path, tmp_path: Path, position: int
) -> None:
    files = [picture_bytes(k) for k in range(300)]
    cache = EmbeddingCache(tmp_path / "cache")
    done = 0
    for batch in embed_pictures(verifier, files, cache=cache):
        done += len(batch)
        if done > position:
            break
    assert cache.stat().records == done
