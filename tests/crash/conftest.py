from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash import protocols
from crash.worker import Worker, compiled_shim, ram_folder


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def worker(tiny_bundle: Path, shim: Path) -> Iterator[Worker]:
    os.environ[protocols.BUNDLE] = str(tiny_bundle)
    made = Worker(tiny_bundle, shim)
    yield made
    made.close()
    del os.environ[protocols.BUNDLE]


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: the disk that loses power, or fails, is simulated."""
    folder = ram_folder()
    yield folder or tmp_path
    if folder:
        shutil.rmtree(folder)
