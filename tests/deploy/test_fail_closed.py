"""Nobody is let in by a fault: whatever breaks, at whatever moment, is neither a match nor exit code 0.

Faults are put in at the seams between the stages of a decision; all else, ONNX Runtime included, is real. The healthy
run of the same arguments is a match (threshold 0, the same picture twice, one person enrolled), so that any answer at
all would be one.
"""

from __future__ import annotations

import asyncio
import errno
import json
import math
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import Result
from conftest import RunCommand, assert_refused
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_bundle import DIM, make_bundle

from siamese_deploy import Gallery, OnnxVerifier, errors, runtime
from siamese_deploy.cli import command
from siamese_deploy.cli import main as siamese
from siamese_deploy.errors import IntegrityError, SiameseError, UsageError
from siamese_deploy.metrics import accepted

Doors = dict[str, tuple[object, ...]]
N_GALLERY = 3
"""Identities, of two pictures each."""


@pytest.fixture(scope="module")
def verifier(tiny_bundle: Path) -> OnnxVerifier:
    return OnnxVerifier(tiny_bundle, provider="cpu", threads=1)


@pytest.fixture
def gallery(tmp_path: Path, pictures: Path, verifier: OnnxVerifier) -> Gallery:
    gallery = Gallery(tmp_path / "gallery", verifier, create=True)
    gallery.enrol("apple", [pictures / "apple/0.png"])
    return gallery


@pytest.fixture
def doors(pictures: Path, tiny_bundle: Path, gallery: Gallery) -> Doors:
    """The commands whose exit code 0 lets somebody in, with arguments that are a match."""
    picture, how = pictures / "apple/0.png", ("-c", tiny_bundle, "--provider", "cpu", "--no_cache", "--threshold", 0)
    identify = ("gallery", "identify", gallery.store.folder, picture, *how)
    as_json = ("gallery", "identify", "--json", *identify[2:])
    return {"verify": ("verify", picture, picture, *how), "identify": identify, "json": as_json}


def says_match(result: Result) -> bool:
    if result.stdout.startswith("{"):
        return bool(json.loads(result.stdout)["decision"] == "match")
    return any(line.startswith("match") for line in result.stdout.splitlines())


def assert_closed(result: Result) -> None:
    assert result.exit_code not in (0, 10), (result.exit_code, result.stdout, result.stderr)
    assert not says_match(result), result.stdout


def test_the_doors_open_for_whom_they_should(run: RunCommand, doors: Doors) -> None:
    for arguments in doors.values():
        result = run(siamese, *arguments)
        assert (result.exit_code, says_match(result)) == (0, True), result.stderr


# --- errors --------------------------------------------------------------------------------------------------------


class Panic(BaseException):
    """As libraries written in Rust raise it."""


OURS = [
    kind("planted", "reason") if kind is errors.ImageError else kind("planted")
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SiameseError)
]
ERRORS: list[BaseException] = [
    *OURS,
    *(
        OSError(number, "planted", "file")
        for number in (errno.EIO, errno.ENOSPC, errno.ENOENT, errno.EMFILE, errno.EINTR)
    ),
    *(kind("planted") for kind in (sqlite3.Error, sqlite3.OperationalError, sqlite3.DatabaseError)),
    *(kind("planted") for kind in (ValueError, TypeError, RuntimeError, AssertionError, ImportError, RecursionError)),
    *(kind() for kind in (MemoryError, StopIteration, GeneratorExit, TimeoutError, KeyboardInterrupt, Panic)),
    *(SystemExit(code) for code in (0, None, 1)),
    asyncio.CancelledError(),
    click.exceptions.Exit(0),
    click.Abort(),
    RuntimeError("can't start new thread"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "planted"),
]
# Where the fault is put in, and at which call: of `run_session` the first two are the golden check's.
VERIFY = [
    ("siamese_deploy.bundle:read_bundle", 1),
    ("siamese_deploy.bundle:check_graph", 2),
    ("siamese_deploy.runtime:open_session", 1),
    ("siamese_deploy.runtime:open_session", 2),
    ("siamese_deploy.runtime:golden_image", 1),
    ("siamese_deploy.runtime:run_session", 1),
    ("siamese_deploy.runtime:run_session", 2),
    ("siamese_deploy.runtime:nodes_by_provider", 1),
    ("siamese_deploy.embedding:read_picture_file", 1),
    ("siamese_deploy.embedding:decode_bytes", 1),
    ("siamese_deploy.embedding:resize_image", 1),
    ("siamese_deploy.runtime:run_session", 3),
    ("siamese_deploy.runtime:run_session", 4),
    ("siamese_deploy.runtime:_checked", 1),
]
IDENTIFY = [
    *VERIFY,
    ("siamese_deploy.gallery.gallery:GalleryStore.snapshot", 1),
    ("siamese_deploy.gallery.gallery:require_signal", 1),
    ("siamese_deploy.gallery.gallery:best_identities", 1),
    ("siamese_deploy.gallery.store:sqlite3.connect", 1),
    ("siamese_deploy.gallery.store:sqlite3.connect", 2),
    ("siamese_deploy.gallery.store:VectorFile.read", 1),
    ("siamese_deploy.gallery.store:read_rows", 1),
    ("siamese_deploy.gallery.store:checksums", 1),
]
SEAMS = [
    *(("verify", *seam) for seam in VERIFY),
    ("verify", "siamese_deploy.runtime:require_signal", 1),
    ("verify", "siamese_deploy.cli.verify:tell_provider", 1),
    *(("identify", *seam) for seam in IDENTIFY),
    ("identify", "siamese_deploy.cli.gallery:tell_provider", 1),
    ("json", "siamese_deploy.cli.gallery:_as_json", 1),
]


def plant(patch: pytest.MonkeyPatch, seam: str, call: int, fault: Callable[[Any], Any]) -> None:
    """At the `call`-th call of what `seam` names, what it returned (or None) goes through `fault`."""
    module, _, path = seam.partition(":")
    *owners, name = path.split(".")
    owner: Any = import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    healthy, calls = getattr(owner, name), 0

    def faulty(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return healthy(*arguments, **options) if calls != call else fault(partial(healthy, *arguments, **options))

    patch.setattr(owner, name, faulty)


def raising(error: BaseException) -> Callable[[Any], Any]:
    def fault(_: Any) -> Any:
        raise error

    return fault


def assert_refused_whatever(
    run: RunCommand, doors: Doors, door: str, seam: str, call: int, planted: list[BaseException]
) -> None:
    for error in planted:
        with pytest.MonkeyPatch.context() as patch:
            plant(patch, seam, call, raising(error))
            result = run(siamese, *doors[door])
        assert_closed(result)
        if isinstance(error, SiameseError):
            assert result.exit_code == error.exit_code, (error, result.stderr)
        if not isinstance(error, SystemExit) or not error.code:
            assert len(result.stderr.splitlines()) == 1, (error, result.stderr)


@pytest.mark.parametrize("k", range(len(SEAMS)))
def test_an_error_opens_no_door(run: RunCommand, doors: Doors, k: int) -> None:
    """A part of the errors at each seam, each error at many."""
    assert_refused_whatever(run, doors, *SEAMS[k], ERRORS[k % 9 :: 9])


@pytest.mark.slow
@pytest.mark.parametrize(("door", "seam", "call"), SEAMS)
def test_every_error_at_every_seam_opens_no_door(
    run: RunCommand, doors: Doors, door: str, seam: str, call: int
) -> None:
    assert_refused_whatever(run, doors, door, seam, call, ERRORS)


@pytest.mark.parametrize("door", ["verify", "identify"])
def test_the_harness_sees_errors_that_end_with_0(
    run: RunCommand, doors: Doors, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_fail", lambda *_: sys.exit(0))
    with pytest.raises(AssertionError):
        assert_refused_whatever(run, doors, door, "siamese_deploy.runtime:run_session", 4, ERRORS[:1])


def test_a_cache_that_fails_decides_nothing(run: RunCommand, pictures: Path, tiny_bundle: Path) -> None:
    """It costs time: the answer is the one without it, here "no match"."""
    pair = ("verify", pictures / "apple/0.png", pictures / "bolt/0.png", "-c", tiny_bundle, "--threshold", 1)
    for call in (1, 2, 3):
        for error in ERRORS[call::4]:
            with pytest.MonkeyPatch.context() as patch:
                plant(patch, "siamese_deploy.embedding_cache:opened", call, raising(error))
                result = run(siamese, *pair)
            assert result.exit_code != 0
            assert not says_match(result)


@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_a_file_called_help_opens_no_door(run: RunCommand, doors: Doors, option: str, tmp_path: Path) -> None:
    for arguments in doors.values():
        n_words = 2 if arguments[0] == "gallery" else 1
        words, others = arguments[:n_words], arguments[n_words:]
        for n in range(len(others) + 1):
            assert_refused(run(siamese, *words, *others[:n], option, *others[n:]), 2)
        log = tmp_path / "log.jsonl"
        assert_refused(run(siamese, *words, option, *others, "--log", log), 2, "nothing was decided")
        assert json.loads(log.read_text().splitlines()[-1])["exit_code"] == 2
        assert run(siamese, *words, option).exit_code == 0  # alone it is what it says


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGALRM])
@pytest.mark.slow
@pytest.mark.parametrize("seam", ["runtime.open_session", "embedding.resize_image", "runtime._checked"])
def test_a_signal_opens_no_door(doors: Doors, number: int, seam: str) -> None:
    """Whoever waits too long, and ends it."""
    module, name = seam.split(".")
    code = (
        f"import time\nfrom siamese_deploy import {module} as stage\n"
        f"def wait(*_a, **_k):\n    print('waiting\\n', end='', flush=True)\n    time.sleep(2)\n"
        f"stage.{name} = wait\nfrom siamese_deploy.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *map(str, doors["verify"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stdout.readline() == "waiting\n"  # of one thread or the other
        child.send_signal(number)
        stdout, _ = child.communicate()
    assert child.returncode not in (0, 10)
    assert "match" not in stdout


# --- numbers -------------------------------------------------------------------------------------------------------

ANY_FLOAT32 = st.floats(width=32) | st.sampled_from([0.0, 1.0, 0.5, -0.0, 1 + 2**-23, -(2.0**-149), math.nan, math.inf])
ANY_THRESHOLD = st.floats() | st.sampled_from([0.0, 1.0, 0.5, math.nan, math.inf, -math.inf, 1 + 2**-52, -5e-324])


def assert_decided_by_the_rule(run: RunCommand, doors: Doors, score: float, threshold: float) -> None:
    given = np.float32(score)
    for door in ("verify", "identify", "json"):
        with pytest.MonkeyPatch.context() as patch:
            # The head's answer for the pair, after the golden check's.
            plant(patch, "siamese_deploy.runtime:run_session", 4, lambda run: np.full_like(run(), given))
            result = run(siamese, *doors[door][:-1], threshold)
        if not 0 <= threshold <= 1:
            expected = 2
        elif not 0 <= given <= 1:
            expected = 4
        else:
            expected = 0 if float(given) >= threshold else 10
        assert result.exit_code == expected, (door, result.stdout, result.stderr)
        assert says_match(result) == (expected == 0), result.stdout


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(score=ANY_FLOAT32, threshold=ANY_THRESHOLD)
@example(score=1.0, threshold=1.0)
@example(score=0.0, threshold=0.0)
@example(score=0.5, threshold=0.5)
@example(score=0.0, threshold=5e-324)
def test_only_a_score_of_at_least_the_threshold_opens(
    run: RunCommand, doors: Doors, score: float, threshold: float
) -> None:
    assert_decided_by_the_rule(run, doors, score, threshold)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, 1.0000001, -1e-9])
def test_scores_that_are_none(run: RunCommand, doors: Doors, score: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_decided_by_the_rule(run, doors, score, 0.0)
    monkeypatch.setattr(runtime, "_checked", lambda scores: scores)
    with pytest.raises(AssertionError):  # without the check of the score
        assert_decided_by_the_rule(run, doors, score, 0.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v * np.nan,
        lambda v: v * np.inf,
        lambda v: np.where(np.arange(DIM) == 3, np.float32(np.nan), v),
        lambda v: np.where(np.arange(DIM) == 3, np.float32(-np.inf), v),
        lambda v: v * 0,
        lambda v: v[:0],
        lambda v: v[:, 1:],
        lambda v: v.astype(np.float64),
        lambda v: np.concatenate([v, v]),
        lambda v: v[0],
        lambda v: None,
    ],
)
def test_embeddings_that_are_none(run: RunCommand, doors: Doors, change: Callable[[Any], Any]) -> None:
    for arguments in doors.values():
        with pytest.MonkeyPatch.context() as patch:
            plant(patch, "siamese_deploy.runtime:run_session", 3, lambda run: change(run()))
            assert_closed(run(siamese, *arguments))


@pytest.mark.parametrize("change", [lambda s: s[:0], lambda s: s[0], lambda s: s[:, :0], lambda s: None, lambda s: "1"])
def test_answers_of_another_shape(run: RunCommand, doors: Doors, change: Callable[[Any], Any]) -> None:
    for arguments in doors.values():
        with pytest.MonkeyPatch.context() as patch:
            plant(patch, "siamese_deploy.runtime:run_session", 4, lambda run: change(run()))
            assert_closed(run(siamese, *arguments))


@given(scores=st.lists(ANY_FLOAT32, min_size=1), threshold=ANY_THRESHOLD)
def test_accepted_is_never_true_of_nan(scores: list[float], threshold: float) -> None:
    found = accepted(np.array(scores, np.float32), threshold).tolist()
    assert found == [float(np.float32(score)) >= threshold for score in scores]
    assert not any(yes for yes, score in zip(found, scores, strict=True) if math.isnan(score) or math.isnan(threshold))


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf, -0.1, 1.1])
def test_no_bundle_has_a_threshold_that_is_none(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold: expected a number in"):
        replace(make_bundle().manifest, threshold=threshold)


# --- galleries -----------------------------------------------------------------------------------------------------

SOUND = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.5, 1.0])


@pytest.fixture(scope="module")
def people(verifier: OnnxVerifier, tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    gallery = Gallery(tmp_path_factory.mktemp("people") / "gallery", verifier, create=True)
    random = np.random.RandomState(0)
    for k in range(N_GALLERY):
        gallery.enrol(f"person {k}", list(random.randint(0, 256, (2, 24, 32, 3)).astype(np.uint8)), doubles=False)
    return gallery


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.one_of(SOUND, SOUND, SOUND, ANY_FLOAT32), min_size=2 * N_GALLERY, max_size=2 * N_GALLERY),
    threshold=st.none() | SOUND | ANY_THRESHOLD,
    min_margin=st.sampled_from([0.0, 0.1, 1.0, -0.1, math.nan]) | SOUND,
    per_identity=st.sampled_from(["max", "mean"]),
)
def test_an_identity_is_told_by_the_rule_alone(
    people: Gallery, scores: list[float], threshold: float | None, min_margin: float, per_identity: str
) -> None:
    given = np.array(scores, np.float32)
    query = np.full((24, 32, 3), 7, np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(people.verifier, "_run_head", lambda *_: given)
        ask = partial(people.identify, query, threshold=threshold, min_margin=min_margin, per_identity=per_identity)
        if not ((threshold is None or 0 <= threshold <= 1) and 0 <= min_margin <= 1):
            with pytest.raises(UsageError):
                ask()
            return
        if not ((given >= 0) & (given <= 1)).all():
            with pytest.raises(IntegrityError):
                ask()
            return
        found = ask()
    limit = people.verifier.threshold if threshold is None else threshold
    rows = given.astype(np.float64).reshape(N_GALLERY, 2)
    of_person = rows.max(axis=1) if per_identity == "max" else rows.mean(axis=1)
    second, best = np.sort(of_person)[-2:].tolist()
    expected = "no match" if best < limit else "match" if best - second > min_margin else "ambiguous"
    assert found.decision == expected
    assert found.name == (f"person {of_person.argmax()}" if expected == "match" else None)


def test_who_is_not_there_is_nobody(
    run: RunCommand, doors: Doors, gallery: Gallery, pictures: Path, tmp_path: Path, other_bundle: Path
) -> None:
    picture = pictures / "apple/0.png"
    for name in ("", "Apple", "apple ", "apple\0", "pear"):
        with pytest.raises(SiameseError):
            gallery.verify(picture, name)
    (vectors,) = gallery.store.folder.glob("vectors-*.f32")
    whole = vectors.read_bytes()
    for damaged in (b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), bytes(len(whole)), whole[::-1]):
        vectors.write_bytes(damaged)
        result = run(siamese, *doors["identify"])
        assert (result.exit_code, says_match(result)) == (10, False)
        with pytest.raises(SiameseError):
            gallery.verify(picture, "apple")
    vectors.write_bytes(whole)
    gallery.remove("apple")
    result = run(siamese, *doors["identify"])
    assert (result.exit_code, says_match(result)) == (10, False)
    other = OnnxVerifier(other_bundle, provider="cpu", threads=1)
    with pytest.raises(IntegrityError, match="another bundle"):
        Gallery(gallery.store.folder, other)
    shutil.rmtree(gallery.store.folder)
    assert_refused(run(siamese, *doors["identify"]), 3)
