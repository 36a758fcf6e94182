"""Whatever happens to an export, the bundle that was there stays whole until the new one is."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import RunCommand, assert_refused
from networks import SMALL, own_checkpoint, random_network

from siamese_deploy import read_bundle
from siamese_export.cli import main as export_main
from siamese_export.export import export_checkpoint

KILLS = int(os.environ.get("SIAMESE_KILLS", "6"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return [own_checkpoint(folder / f"{seed}.pth", random_network(seed=seed), *SMALL) for seed in (0, 1)]


@pytest.mark.slow
def test_killed_at_random_times(checkpoints: list[Path], tmp_path: Path) -> None:
    """SIAMESE_KILLS=200 for the long version. Half of the kills wait until the files are being written."""
    target = tmp_path / "bundle"
    digests = [export_checkpoint(path, tmp_path / path.stem).bundle.digest for path in checkpoints]
    export_checkpoint(checkpoints[0], target)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["siamese_export.export"])
    chance = random.Random(1)  # noqa: S311
    whole_s, current, killed, replaced = 8.0, 0, 0, 0
    while killed < KILLS:
        new = 1 - current
        started_s = time.monotonic()
        child = processes.Process(target=export_checkpoint, args=(checkpoints[new], target), kwargs={"replace": True})
        child.start()
        if killed % 2:
            before = set(os.listdir(tmp_path))
            while child.is_alive() and set(os.listdir(tmp_path)) == before:
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.1))
        else:
            child.join(chance.uniform(0, 1.1) * whole_s)
        killed += child.is_alive()
        child.kill()
        child.join()
        if child.exitcode == 0:
            whole_s = time.monotonic() - started_s
        assert child.exitcode in (0, -signal.SIGKILL)
        found = digests.index(read_bundle(target).digest)
        assert child.exitcode != 0 or found == new
        replaced += found == new
        current = found
    export_checkpoint(checkpoints[1 - current], target, replace=True)  # what the killed runs left is in nobody's way
    assert read_bundle(target).digest == digests[1 - current]
    others = [name for name in os.listdir(tmp_path) if name not in ("bundle", "0", "1")]
    assert all(name.startswith(".bundle.") and name.endswith(".tmp") for name in others)
    print(f"{killed} kills: the new bundle was there {replaced} times, {len(others)} temporary folders were left")


def test_force_replaces_bundles_and_nothing_else(run: RunCommand, checkpoints: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    first = export_checkpoint(checkpoints[0], target).bundle.digest
    assert_refused(run(export_main, "-c", checkpoints[1], "-o", target), 2, "exists already")
    result = run(export_main, "-c", checkpoints[1], "-o", target, "--force")
    assert result.exit_code == 0, result.output
    assert read_bundle(target).digest != first
    assert os.listdir(tmp_path) == ["bundle"]

    (target / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(target)
    for name, words in (
        ("bundle", "is no bundle, and only a bundle may be replaced"),
        ("empty", "is no bundle, and only a bundle may be replaced"),
        ("file", "is a file; expected a bundle to replace"),
        ("link", "is a link; expected a bundle to replace"),
    ):
        assert_refused(run(export_main, "-c", checkpoints[1], "-o", tmp_path / name, "--force"), 2, words)
    assert (target / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_bundle(checkpoints: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    digest = export_checkpoint(checkpoints[0], target).bundle.digest
    command = [sys.executable, "-c", "from siamese_export.cli import main; main()"]
    command += ["-c", str(checkpoints[1]), "-o", str(target), "--force"]
    half = (target / "backbone.onnx").stat().st_size // 2
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        # A file may grow no larger than half a backbone: a disk that fills while it is written.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)),
    )
    assert done.returncode == 5, done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert read_bundle(target).digest == digest
    assert os.listdir(tmp_path) == ["bundle"]
