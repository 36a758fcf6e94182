"""The ways in which the toolkit writes to disk, each as a sequence of numbered steps that anybody can check.

Step n is a call of the real code whose result follows from n alone; when it returns, it is acknowledged. `view` opens
what is there with the real code and raises if anything is damaged or half there. So after a crash, a failed call or a
kill there are two right answers: `expected(done)`, and `expected(done + 1)` if a step was under way.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from siamese_deploy import durable_files
from siamese_deploy.bundle import Bundle, read_bundle
from siamese_deploy.durable_files import write_atomically
from siamese_deploy.embedding_cache import EmbeddingCache
from siamese_deploy.engine_cache import engine_folder, prune_engines
from siamese_deploy.errors import EnvironmentFault, InputDataError, IntegrityError, UsageError
from siamese_deploy.gallery.copies import export_gallery
from siamese_deploy.gallery.records import Group, StoredPicture
from siamese_deploy.gallery.store import GalleryStore
from siamese_deploy.result_folder import result_folder
from siamese_deploy.tensorrt import EngineKey

BUNDLE = "SIAMESE_CRASH_BUNDLE"
"""Environment variable: folder of the bundle that is written again and again."""
_TEMPORARY = re.compile(r"\..*\.tmp(\.old)?|\.siamese-staging-.*|.*\.old|.*-journal")


class Protocol:
    steps: ClassVar[int] = 3
    """Of a replay: enough to meet every kind of write, first and repeated."""
    acknowledged_survives_power_loss: ClassVar[bool] = True
    without_exchange: ClassVar[bool] = False
    """Run it on a kernel that cannot exchange two folders."""

    def __init__(self, root: Path, rows: int = 3) -> None:
        self.root = root
        self.rows = rows
        """Per step, where it writes rows."""

    def prepare(self) -> None:
        """The state before the first step."""

    def step(self, n: int) -> None:
        """Raises if it was not done, or could not be said to be done."""
        raise NotImplementedError

    def rows_of(self, n: int) -> int:
        """Rows that step n, acknowledged, adds."""
        return 0

    def view(self, most: int) -> Any:
        """What is there, of at most that many steps."""
        raise NotImplementedError

    def expected(self, n: int) -> Any:
        """The view after n steps."""
        raise NotImplementedError

    def accepts(self, found: Any, done: int, *, in_flight: bool, power_loss: bool) -> bool:
        return found == self.expected(done) or (in_flight and found == self.expected(done + 1))

    def recover(self) -> None:
        """What the next writer does before it adds anything."""

    def leftovers(self) -> list[str]:
        """Files that nobody will ever read or remove."""
        return [str(path) for path in self.root.rglob("*") if _TEMPORARY.fullmatch(path.name)]


class AtomicFile(Protocol):
    """metrics.json, config.json, manifests of engines: `write_atomically`."""

    def path(self) -> Path:
        return self.root / "metrics.json"

    def prepare(self) -> None:
        self.step(-1)

    def step(self, n: int) -> None:
        def write(file: Any) -> None:
            for part in range(3):
                file.write(b"%d %d\n" % (n, part) * 700)

        write_atomically(self.path(), write)

    def view(self, most: int) -> Any:
        numbers = self.path().read_bytes().split()
        n = int(numbers[0])
        assert numbers == b"".join(b"%d %d\n" % (n, part) * 700 for part in range(3)).split()
        return n + 1

    def expected(self, n: int) -> Any:
        return n

    def recover(self) -> None:
        for stale in self.root.glob(".metrics.json.*.tmp"):  # as siamese-train does, which holds the folder's lock
            stale.unlink()


class Checkpoints(Protocol):
    """best.pth and last.pth: `save_checkpoint`, read by `read_checkpoint`."""

    steps = 4

    def step(self, n: int) -> None:
        import torch

        from siamese_train.checkpoint import save_checkpoint

        model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(16, 8), "cls_head": torch.nn.Linear(8, 1)})
        for weight in model.parameters():
            torch.nn.init.constant_(weight, n)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        save_checkpoint(
            self.root / ("best.pth" if n % 2 else "last.pth"),
            epoch=n,
            model=model,  # type: ignore[arg-type]
            optimizer=optimizer,
            config=_train_config(self.root),
            run={},
        )

    def view(self, most: int) -> Any:
        from siamese_train.checkpoint import read_checkpoint

        found = {}
        for path in sorted(self.root.glob("*.pth")):
            checkpoint = read_checkpoint(path)
            assert all(bool((weight == checkpoint.epoch).all()) for weight in checkpoint.model_state.values())
            found[path.name] = checkpoint.epoch
        return found

    def expected(self, n: int) -> Any:
        newest = {"best.pth" if k % 2 else "last.pth": k for k in range(n)}
        return dict(sorted(newest.items()))

    def recover(self) -> None:
        for stale in self.root.glob(".*.pth.*.tmp"):
            stale.unlink()


def _train_config(root: Path) -> Any:
    from siamese_train.config import TrainConfig

    return TrainConfig(root / "train", root / "val", root / "run")


class NewBundles(Protocol):
    """`siamese-export -o NEW`: `folder_published_as` where nothing was."""

    def step(self, n: int) -> None:
        _bundle(n).write(self.root / f"bundle{n}")

    def view(self, most: int) -> Any:
        return sorted(_number_of(read_bundle(path)) for path in self.root.glob("bundle*"))

    def expected(self, n: int) -> Any:
        return list(range(n))

    def recover(self) -> None:
        for n in range(max(self.view(0), default=-1) + 2):
            _remove_abandoned(self.root / f"bundle{n}")


class ReplacedBundle(Protocol):
    """`siamese-export --force`: `folder_published_as` with renameat2's exchange."""

    def prepare(self) -> None:
        self.step(-1)

    def step(self, n: int) -> None:
        _bundle(n).write(self.root / "bundle", replace=True)

    def view(self, most: int) -> Any:
        return _number_of(read_bundle(self.root / "bundle")) + 1

    def expected(self, n: int) -> Any:
        return n

    def recover(self) -> None:
        _remove_abandoned(self.root / "bundle")


class ReplacedBundleWithoutExchange(ReplacedBundle):
    """The same on a kernel or file system without the call: for a moment nothing has the name."""

    without_exchange = True

    def view(self, most: int) -> Any:
        if not (self.root / "bundle").exists():
            with suppress(UsageError):  # "exists already": whoever writes next puts it back first
                _bundle(-2).write(self.root / "bundle")
        return super().view(most)


@cache
def _base_bundle() -> Bundle:
    return read_bundle(os.environ[BUNDLE])


def _bundle(n: int) -> Bundle:
    base = _base_bundle()
    return Bundle(replace(base.manifest, about={"step": n}), base.backbone, base.head)


def _number_of(bundle: Bundle) -> int:
    n = bundle.manifest.about["step"]
    assert bundle.manifest_digest == _bundle(n).manifest_digest  # which covers every byte
    return int(n)


def _remove_abandoned(target: Path) -> None:
    """What publishing to `target` begins with, a minute after the crash."""
    with (
        mock.patch.object(durable_files, "_ABANDONED_AFTER_S", -1),
        suppress(_Stop),
        durable_files.folder_published_as(target, lambda _: None),
    ):
        raise _Stop


class _Stop(Exception):
    """Ends a block that publishes, so that it publishes nothing."""


class GalleryRows(Protocol):
    """Enrol, add, replace, remove, and another bundle for all: SQLite and the flat file of vectors."""

    steps = 8
    dim: ClassVar[int] = 48
    """192 bytes, so that three vectors are more than a sector."""

    def __init__(self, root: Path, rows: int = 3) -> None:
        super().__init__(root, rows)
        self._states: list[dict[str, Any]] = [{}]

    def _folder(self) -> Path:
        return self.root / "gallery"

    def _changes(self, n: int, generation: int) -> tuple[str, list[Group]]:
        def group(owner: int, rows: range) -> Group:
            pictures = [StoredPicture(f"id{owner}", _sha256(n, row), f"/{n}/{row}") for row in rows]
            return Group(f"id{owner}", pictures, np.stack([self._vector(n, row, generation) for row in rows]))

        kind = ("enrol", "enrol", "enrol", "replace", "enrol", "remove", "add", "model")[n % 8]
        if kind == "remove":
            return kind, [group(n - 4, range(0, 1))]
        if kind in ("replace", "add"):
            return kind, [group(n - 1 if kind == "replace" else n - 2, range(self.rows))]
        if n % 8 == 4:
            return kind, [group(n, range(self.rows)), group(n + 100_000, range(1000, 1002))]
        return kind, [group(n, range(self.rows))]

    def _vector(self, n: int, row: int, generation: int) -> np.ndarray:
        return (np.arange(1, self.dim + 1) + 100 * n + row + generation / 64).astype(np.float32)

    def step(self, n: int) -> None:
        generation = n // 8
        store = GalleryStore.create(self._folder(), "digest", self.dim) if n == 0 else GalleryStore(self._folder())
        kind, groups = self._changes(n, generation)
        if kind == "model":
            with store.snapshot() as snapshot:
                change, pictures = snapshot.rows.change, snapshot.pictures()
            numbers = [tuple(map(int, picture.source[1:].split("/"))) for picture in pictures]
            vectors = np.stack([self._vector(*pair, generation + 1) for pair in numbers])
            store.replace_model(f"digest{n}", change, pictures, vectors)
        elif kind == "remove":
            store.remove([groups[0].name])
        else:
            outcomes = store.enrol(groups, add=kind == "add", replace=kind == "replace")
            assert outcomes == [list(range(len(group.pictures))) for group in groups], outcomes

    def rows_of(self, n: int) -> int:
        kind, groups = self._changes(n, 0)
        return 0 if kind in ("remove", "model") else sum(len(group.pictures) for group in groups)

    def expected(self, n: int) -> Any:
        while len(self._states) <= n:
            k, state = len(self._states) - 1, dict(self._states[-1])
            generation = k // 8
            kind, groups = self._changes(k, generation)
            if kind == "model":
                state = {
                    name: [(n, row, generation + 1) for n, row, _ in rows] for name, rows in state.items()
                }  # fmt: skip
            elif kind == "remove":
                del state[groups[0].name]
            else:
                for group in groups:
                    new = [(k, int(picture.source.split("/")[2]), generation) for picture in group.pictures]
                    state[group.name] = sorted((state.get(group.name, []) if kind == "add" else []) + new)
            self._states.append(state)
        return self._states[n]

    def view(self, most: int) -> Any:
        try:
            store = GalleryStore(self._folder())
        except InputDataError:  # there is none yet, or a file that was never filled: enrolling makes it
            return {}
        found: dict[str, Any] = {}
        with store.snapshot() as snapshot:
            rows, by_slot = snapshot.rows, {picture.slot: picture for picture in snapshot.pictures()}
            assert rows.damaged == 0
            sound = 0
            for indices, vectors in snapshot.sound_vectors():
                for index, vector in zip(indices, vectors, strict=True):
                    picture = by_slot[int(rows.slots[index])]
                    n, row = map(int, picture.source[1:].split("/"))
                    generation = round((float(vector[0]) - 1 - 100 * n - row) * 64)
                    assert picture.name == rows.names[rows.identities[index]]
                    assert (picture.sha256, picture.damaged) == (_sha256(n, row), False)
                    assert (vector == self._vector(n, row, generation)).all()
                    found.setdefault(picture.name, []).append((n, row, generation))
                    sound += 1
            assert sound == len(rows.slots) == len(by_slot), "a row without its vector"
        return {name: sorted(rows) for name, rows in found.items()}

    def recover(self) -> None:
        try:
            store = GalleryStore(self._folder())
        except InputDataError:
            store = GalleryStore.create(self._folder(), "digest", self.dim)
        store.enrol([])

    def leftovers(self) -> list[str]:
        left = super().leftovers()
        store = GalleryStore(self._folder())
        used = {picture.slot for picture in store.pictures()}
        files = sorted(self._folder().glob("vectors-*.f32"))
        left += [str(path) for path in files[1:]]
        for path in files:
            vectors = np.fromfile(path, np.float32).reshape(-1, self.dim)
            left += [
                f"{path.name}: slot {k} is not wiped" for k in range(len(vectors)) if vectors[k].any() and k not in used
            ]
        return left


@cache
def _sha256(*numbers: int) -> bytes:
    return hashlib.sha256(repr(numbers).encode()).digest()


class GalleryExports(Protocol):
    """`siamese gallery export`: a folder with what a gallery held."""

    steps = 2

    def _gallery(self) -> GalleryRows:
        return GalleryRows(self.root, self.rows)

    def prepare(self) -> None:
        gallery = self._gallery()
        for n in range(5):
            gallery.step(n)

    def step(self, n: int) -> None:
        export_gallery(self.root / "gallery", self.root / f"export{n}")

    def view(self, most: int) -> Any:
        gallery = self._gallery()
        assert gallery.view(5) == gallery.expected(5)
        names = {name for name, rows in gallery.expected(5).items() for _ in rows}
        found = []
        for path in sorted(self.root.glob("export*")):
            vectors = np.load(path / "embeddings.npy", allow_pickle=False)
            with open(path / "gallery.csv", newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            assert {row["name"] for row in rows} == names
            for row, vector in zip(rows, vectors, strict=True):
                n, number = map(int, row["source"][1:].split("/"))
                assert (vector == gallery._vector(n, number, 0)).all()
            found.append(int(path.name.removeprefix("export")))
        return sorted(found)

    def expected(self, n: int) -> Any:
        return list(range(n))

    def recover(self) -> None:
        self._gallery().recover()
        for n in range(max(self.view(0), default=-1) + 2):
            _remove_abandoned(self.root / f"export{n}")


class CachedEmbeddings(Protocol):
    """The embedding cache: whatever happens, no wrong vector. A record may be lost when the power goes."""

    acknowledged_survives_power_loss = False
    dim: ClassVar[int] = 300
    """1200 bytes, so that a sector can be lost from the middle of a vector, and SQLite sees nothing of it."""

    def _vectors(self, n: int) -> np.ndarray:
        rows = np.arange(self.rows)[:, None]
        return (100.0 * n + rows + np.arange(self.dim)).astype(np.float32)

    def _keys(self, n: int) -> list[bytes]:
        return [_sha256(n, row) for row in range(self.rows)]

    def step(self, n: int) -> None:
        cache = EmbeddingCache(self.root / "cache")
        cache.put_many(self._keys(n), self._vectors(n))
        if cache.warning:
            raise EnvironmentFault(cache.warning)

    def rows_of(self, n: int) -> int:
        return self.rows

    def view(self, most: int) -> Any:
        try:
            cache = EmbeddingCache(self.root / "cache")
        except IntegrityError as error:
            return str(error)
        known = cache.get_many([key for n in range(most) for key in self._keys(n)], self.dim)
        found = {}
        for n in range(most):
            right = zip(self._keys(n), self._vectors(n), strict=True)
            same = [(known[key] == vector).all() for key, vector in right if key in known]
            assert all(same), "a wrong vector"
            if same:
                found[n] = len(same)
        return cache.warning or found

    def expected(self, n: int) -> Any:
        return {k: self.rows for k in range(n)}

    def accepts(self, found: Any, done: int, *, in_flight: bool, power_loss: bool) -> bool:
        if power_loss:  # any of them may be gone, and the file unreadable, which is said
            return isinstance(found, str) or set(found) <= set(range(done + in_flight))
        return super().accepts(found, done, in_flight=in_flight, power_loss=power_loss)

    def recover(self) -> None:
        self.view(0)

    def leftovers(self) -> list[str]:
        return []


class Engines(Protocol):
    """TensorRT's engines, kept only when complete; the files are ONNX Runtime's, which syncs none."""

    def _key(self, n: int) -> EngineKey:
        return EngineKey(f"{n:064x}", "backbone", "gpu", "driver", "10", "1.20", "fp32", (1, 4, 8))

    def _content(self, n: int, name: str) -> bytes:
        return f"{name} {n}\n".encode() * 300

    def step(self, n: int) -> None:
        said: list[str] = []
        with engine_folder(self.root / "engines", self._key(n), say=said.append) as folder:
            if not folder.ready and folder.path:
                for name in ("a.engine", "a.profile"):
                    (folder.path / name).write_bytes(self._content(n, name))
        said = [line for line in said if "built again" not in line]
        if said:
            raise EnvironmentFault("; ".join(said))

    def view(self, most: int) -> Any:
        found = []
        for n in range(most):
            with suppress(_Stop), engine_folder(self.root / "engines", self._key(n), say=lambda _: None) as folder:
                if folder.ready:
                    assert folder.path is not None
                    for name in ("a.engine", "a.profile"):
                        assert (folder.path / name).read_bytes() == self._content(n, name)
                    found.append(n)
                raise _Stop
        return found

    def expected(self, n: int) -> Any:
        return list(range(n))

    def recover(self) -> None:
        prune_engines(self.root / "engines", [], most=10_000)


class Results(Protocol):
    """What an evaluation writes: a folder that has metrics.json holds the files of one evaluation."""

    def prepare(self) -> None:
        self.step(-1)

    def _files(self, n: int) -> dict[str, bytes]:
        files = {
            "metrics.json": json.dumps({"step": n}).encode(),
            "pairs.csv": b"%d," % n * 500,
            "report.html": b"%d" % n,
        }
        return files | {f"{k}.png": b"picture %d of %d" % (k, n) for k in range(2 + n % 2)}

    def step(self, n: int) -> None:
        with result_folder(self.root / "results") as staging:
            for name, data in self._files(n).items():
                (staging / name).write_bytes(data)

    def view(self, most: int) -> Any:
        folder = self.root / "results"
        if not (folder / "metrics.json").exists():
            return "incomplete"
        n = json.loads((folder / "metrics.json").read_bytes())["step"]
        there = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
        assert there == self._files(n), "files of two evaluations"
        return n + 1

    def expected(self, n: int) -> Any:
        return n

    def accepts(self, found: Any, done: int, *, in_flight: bool, power_loss: bool) -> bool:
        if in_flight and found == "incomplete":
            return True
        return super().accepts(found, done, in_flight=in_flight, power_loss=power_loss)

    def recover(self) -> None:
        with suppress(_Stop), result_folder(self.root / "results"):
            raise _Stop


PROTOCOLS: dict[str, type[Protocol]] = {
    "atomic file": AtomicFile,
    "new bundle": NewBundles,
    "replaced bundle": ReplacedBundle,
    "replaced bundle, no exchange": ReplacedBundleWithoutExchange,
    "gallery": GalleryRows,
    "gallery export": GalleryExports,
    "embedding cache": CachedEmbeddings,
    "engine cache": Engines,
    "results": Results,
    "checkpoint": Checkpoints,  # the last: a process with torch in it forks slowly
}
