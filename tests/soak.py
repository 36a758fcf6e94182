"""Mixed requests to one OnnxVerifier and one Gallery for long, a tenth of them bad.

    python soak.py BUNDLE FOLDER REQUESTS sound|leaking|reload

Prints one JSON object: what the process held after the first half and at the end. "leaking" plants leaks, so that the
test which reads this can be seen to fail; "reload" opens the bundle REQUESTS times instead.
"""

from __future__ import annotations

import gc
import io
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from siamese_deploy import Gallery, OnnxVerifier, embedding
from siamese_deploy.demo_data import draw_character
from siamese_deploy.embedding_cache import EmbeddingCache
from siamese_deploy.errors import ImageError, InputDataError, IntegrityError, UsageError

N_PICTURES = 10
SIZE = (160, 120)
"""(width, height) of the pictures."""


def held(threads: int | None = None) -> dict[str, int]:
    """What this process holds; threads that are about to end get up to two seconds to come down to `threads`."""
    gc.collect()
    time.sleep(0.2)
    deadline = time.monotonic() + 2
    while (n_threads := len(os.listdir("/proc/self/task"))) > (threads or n_threads) and time.monotonic() < deadline:
        time.sleep(0.05)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": n_threads,
    }


def plant_leaks() -> None:
    """Every decoded picture is kept, every opened file stays open, and every tenth picture leaves a thread behind."""
    kept: list[Any] = []
    decode, load, read = embedding.decode_bytes, embedding.load_image, embedding.read_picture_file

    def note(image: Any) -> None:
        kept.append(np.array(image, np.float32))
        if len(kept) % 10 == 0:
            threading.Thread(target=threading.Event().wait, daemon=True).start()

    def decoded(data: bytes, name: str) -> Image.Image:
        image = decode(data, name)
        note(image)
        return image

    def loaded(picture: Any, preprocess: Any) -> Any:
        pixels = load(picture, preprocess)
        note(np.resize(pixels, (*SIZE, 3)))
        return pixels

    def opened(path: Any) -> bytes:
        data = read(path)
        kept.append(os.open(path, os.O_RDONLY))
        return data

    embedding.decode_bytes, embedding.load_image, embedding.read_picture_file = decoded, loaded, opened


class Load:
    def __init__(self, bundle: str, folder: Path) -> None:
        self.verifier = OnnxVerifier(bundle, provider="cpu", threads=2)
        self.cache = EmbeddingCache(folder / "cache")
        self.gallery = Gallery(folder / "gallery", self.verifier, create=True)
        self.chance = random.Random(0)  # noqa: S311 - the order of requests
        self.folder = folder
        self.paths = []
        for k in range(N_PICTURES):
            path = folder / f"{k}.{'png' if k % 2 else 'jpg'}"
            draw_character(k // 2, k % 2).convert("RGB").resize(SIZE).save(path)
            self.paths.append(path)
            if k % 2:
                self.gallery.enrol(f"person {k}", [path], doubles=False)
        height, width = self.verifier.preprocess.size_hw
        self.images = np.random.RandomState(0).randint(0, 256, (20, height, width, 3)).astype(np.uint8)
        self.vectors = self.verifier.embed(self.images)
        self.answers: dict[tuple[int, int], float] = {}
        self.refused: dict[str, int] = {}

    def picture(self, k: int) -> Any:
        path = self.paths[k]
        kind = self.chance.randrange(4)
        if kind == 0:
            return path
        if kind == 1:
            return path.read_bytes()
        with Image.open(path) as image:
            image.load()
            return np.asarray(image) if kind == 2 else image

    def good(self) -> None:
        self.verifier.cache = self.cache if self.chance.random() < 0.3 else None
        what = self.chance.randrange(6)
        left, right = (self.chance.randrange(N_PICTURES) for _ in range(2))
        if what < 2:
            score = self.verifier.compare(self.picture(left), self.picture(right))
            # A batch of one and one of two may differ in the last bits.
            assert abs(score - self.answers.setdefault((left, right), score)) <= 1e-6
        elif what == 2:
            n = self.chance.randrange(len(self.images) + 1)
            np.testing.assert_allclose(self.verifier.embed(self.images[:n]), self.vectors[:n], rtol=1e-3, atol=1e-4)
        elif what == 3:
            n = self.chance.randrange(1, len(self.vectors) + 1)
            assert len(self.verifier.score(self.vectors[: self.chance.choice((1, n))], self.vectors[-n:])) == n
        elif what == 4:
            found = self.gallery.identify(self.picture(left | 1), threshold=0)
            assert found.candidates, found
        else:
            assert self.gallery.verify(self.picture(left), f"person {right | 1}").pictures == 1

    def bad(self) -> None:
        pixels = np.asarray(self.images[0])
        whole = self.paths[0].read_bytes()
        (self.folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
        (self.folder / "text.png").write_bytes(b"this is no picture\n" * 20)
        pipe = self.folder / "pipe.png"
        if not pipe.exists():
            os.mkfifo(pipe)
        compare, good = self.verifier.compare, self.paths[1]
        nan = np.full_like(self.vectors, np.nan)
        faults: dict[str, tuple[type[Exception], Callable[[], object]]] = {
            "truncated": (ImageError, lambda: compare(self.folder / "cut.jpg", good)),
            "truncated image": (ImageError, lambda: compare(Image.open(io.BytesIO(whole[: len(whole) // 2])), good)),
            "no bytes": (ImageError, lambda: compare(good, b"")),
            "text": (ImageError, lambda: self.gallery.identify(self.folder / "text.png")),
            "missing": (ImageError, lambda: compare(self.folder / "nowhere.png", good)),
            "pipe": (ImageError, lambda: self.gallery.verify(pipe, "person 1")),
            "too small": (ImageError, lambda: compare(pixels[:4], good)),
            "float picture": (UsageError, lambda: compare(pixels.astype(np.float32), good)),
            "no picture": (UsageError, lambda: compare(7, good)),  # type: ignore[arg-type]
            "wrong size": (UsageError, lambda: self.verifier.embed(self.images[:, 1:])),
            "float batch": (UsageError, lambda: self.verifier.embed(self.images / 1.0)),
            "double embedding": (UsageError, lambda: self.verifier.score(self.vectors.astype("f8"), self.vectors)),
            "unequal sides": (UsageError, lambda: self.verifier.score(self.vectors[:3], self.vectors[:2])),
            "NaN": (IntegrityError, lambda: self.verifier.score(nan, self.vectors)),
            "nobody": (InputDataError, lambda: self.gallery.verify(good, "nobody")),
        }
        name = self.chance.choice(sorted(faults))
        kind, request = faults[name]
        try:
            request()
        except kind:
            self.refused[name] = self.refused.get(name, 0) + 1
        else:
            raise AssertionError(f"{name}: was answered")


def main(bundle: str, folder: Path, requests: int, how: str) -> None:
    load = Load(bundle, folder)
    if how == "leaking":
        plant_leaks()
    reports = []
    for n in range(1, requests + 1):
        if n % 10:
            load.good()
        else:
            load.bad()
        if n in (requests // 2, requests):
            reports.append(held(reports[0]["threads"] if reports else None))
    print(json.dumps({"half": reports[0], "end": reports[1], "refused": load.refused}))


def reload(bundle: str, times: int) -> None:
    """Open the bundle again and again instead."""
    images = np.zeros((1, 24, 32, 3), np.uint8)
    reports = []
    for n in range(1, times + 1):
        OnnxVerifier(bundle, provider="cpu", threads=2).embed(images)
        if n in (times // 2, times):
            reports.append(held(reports[0]["threads"] if reports else None))
    print(json.dumps({"half": reports[0], "end": reports[1]}))


if __name__ == "__main__":
    if sys.argv[4] == "reload":
        reload(sys.argv[1], int(sys.argv[3]))
    else:
        main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
