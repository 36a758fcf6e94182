"""A real small disk that fills up: exit code 5, what was acknowledged and what was there before stay whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from crash.protocols import BUNDLE, PROTOCOLS

_TESTS = Path(__file__).resolve().parents[1]


def run_on_small_disk(disk: Path, mib: int, prepare: str, *command: object) -> subprocess.CompletedProcess[str]:
    """The command in a mount namespace of its own, where `disk` is a tmpfs of that size. Skips where there is none."""
    disk.mkdir()
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    mount = f'mount -t tmpfs -o size={mib}m none "$0" || exit 99; {prepare} exec "$@"'
    try:
        done = subprocess.run(
            [*namespace, "sh", "-c", mount, disk, *map(str, command)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(_TESTS)},
        )
    except FileNotFoundError:
        pytest.skip("NOT RUN: no unshare here")
    if done.returncode == 99 or done.stderr.startswith("unshare:"):
        pytest.skip(f"NOT RUN: no disk can be mounted here ({done.stderr.strip()})")
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_disk_that_fills_up(name: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUNDLE, str(tiny_bundle))
    disk = tmp_path / "disk"
    done = run_on_small_disk(disk, 4, "", sys.executable, "-m", "crash.full_disk", name, disk)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(f"{name}: {report}")
    assert report["problems"] == []
    assert report["full"] >= 1
    assert report["codes"] == [5]


@pytest.mark.parametrize("what", ["enrol", "evaluate"])
def test_commands_on_a_full_disk(what: str, pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    siamese = Path(sys.executable).with_name("siamese")
    command = {
        "enrol": ["gallery", "enrol", disk / "gallery", pictures, "-c", tiny_bundle, "--no_cache"],
        "evaluate": ["eval", "-v", pictures, "-o", disk / "eval", "-c", tiny_bundle, "--no_cache"],
    }[what]
    full = 'head -c 2m /dev/zero > "$0/ballast" 2> /dev/null;'
    done = run_on_small_disk(disk, 1, full, siamese, *command)
    assert done.returncode == 5, done.stderr
    assert len(done.stderr.strip().splitlines()[-1:]) == 1
    assert "Traceback" not in done.stderr
