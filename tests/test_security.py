"""What no file of the three packages may do, read from their syntax trees; each rule finds a planted sinner.

torch's data loaders and process groups, which talk between the processes of one run, do not show here; SECURITY.md
names them.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from siamese_deploy.bundle import BACKBONE, HEAD, MANIFEST, read_bundle
from siamese_deploy.embedding_cache import open_cache
from siamese_deploy.errors import BundleError
from siamese_deploy.gallery import Gallery
from siamese_deploy.runtime import OnnxVerifier

ROOT = Path(__file__).parent.parent
PACKAGES = ("siamese_deploy", "siamese_train", "export/siamese_export")
SOURCES = sorted(source for package in PACKAGES for source in (ROOT / package).rglob("*.py"))

RUNS_WHAT_IT_READS = {"pickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "pickletools", "yaml"}
NETWORK = {
    "socket", "_socket", "ssl", "http", "urllib.request", "urllib3", "requests", "httpx", "aiohttp", "websockets",
    "ftplib", "smtplib", "poplib", "imaplib", "telnetlib", "nntplib", "xmlrpc", "socketserver", "asyncio", "webbrowser",
    "multiprocessing.managers", "torch.distributed.rpc",
}  # fmt: skip
# torch.hub and onnx.hub fetch, and the rest of these runs what is in a file.
FORBIDDEN_NAMES = {
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile", "runpy",
    "code.InteractiveInterpreter", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "tempfile.mktemp", "torch.hub", "onnx.hub", "torch.package", "torch.jit.load", "torch.export.load",
    "torch.utils.model_zoo", "torch.serialization.add_safe_globals", "numpy.lib.format.read_array",
    "multiprocessing.connection.Listener", "multiprocessing.connection.Client",
}  # fmt: skip
# Keyword that a call has to have, and its value; None: any.
REQUIRED_KEYWORDS = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "PIL.Image.open": ("formats", None),
}

ALLOWED = {
    # `--weights default`: torchvision's pretrained weights, where they are not on the machine.
    "siamese_train/weights.py": {"torch.hub.get_dir", "torch.hub.download_url_to_file"},
}


def sins(text: str) -> Iterator[str]:
    """Everything forbidden in a source text, whatever name it was imported under."""
    tree = ast.parse(text)
    meaning: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _sins_of_module(alias.name)
                top = alias.name.partition(".")[0]
                meaning[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield from _sins_of_module(f"{node.module}.{alias.name}")
                meaning[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    within = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}  # the `a.b` of `a.b.c`
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in within:
            yield from _among(_meant(node, meaning), FORBIDDEN_NAMES)
        if isinstance(node, ast.Call):
            yield from _sins_of_call(node, _meant(node.func, meaning))


def _meant(node: ast.expr, meaning: dict[str, str]) -> str:
    """np.load -> numpy.load; "" for what is no dotted name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join([meaning.get(node.id, node.id), *parts]) if isinstance(node, ast.Name) else ""


def _among(name: str, forbidden: set[str]) -> Iterator[str]:
    """`name`, if it or a package it lies in is forbidden."""
    parts = name.split(".")
    if any(".".join(parts[:count]) in forbidden for count in range(1, len(parts) + 1)):
        yield name


def _sins_of_module(name: str) -> Iterator[str]:
    yield from _among(name, RUNS_WHAT_IT_READS | NETWORK | FORBIDDEN_NAMES)


def _sins_of_call(call: ast.Call, name: str) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in REQUIRED_KEYWORDS:
        keyword, value = REQUIRED_KEYWORDS[name]
        found = given.get(keyword)
        if found is None or (value is not None and not (isinstance(found, ast.Constant) and found.value is value)):
            yield f"{name} without {keyword}={'...' if value is None else value}"
    shell = given.get("shell")
    if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
        yield f"{name}(shell=...)"
    if name.startswith("subprocess.") and None in given:
        yield f"{name}(**...), which may hold shell=True"
    if name.endswith("import_module"):
        first = call.args[0]
        if isinstance(first, ast.Constant):
            yield from _sins_of_module(str(first.value))
        # A computed name has to lie in the package itself: f"{__name__}.{...}".
        elif not (isinstance(first, ast.JoinedStr) and ast.unparse(first).startswith("f'{__name__}.")):
            yield f"{name} of a computed name"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_reads_and_nothing_talks_to_the_network(source: Path) -> None:
    assert set(sins(source.read_text("utf-8"))) == ALLOWED.get(str(source.relative_to(ROOT)), set())


def test_every_package_is_read() -> None:
    assert len(SOURCES) > 100
    for package in PACKAGES:
        assert ROOT / package / "__init__.py" in SOURCES


@pytest.mark.parametrize(
    "planted",
    [
        *(f"import {name}" for name in sorted(RUNS_WHAT_IT_READS | NETWORK)),
        "import pickle as harmless",
        "from pickle import loads",
        "def f():\n    import pickle",
        "from urllib import request",
        "from urllib.request import urlopen",
        "from http.client import HTTPConnection",
        "from importlib import import_module\nimport_module('pickle')",
        "import importlib\nimportlib.import_module(name)",
        "import importlib\nimportlib.import_module(f'{name}.{__name__}')",
        "__import__('pickle')",
        "eval('1')",
        "run = eval",
        "exec('1')",
        "compile('1', '', 'eval')",
        "import builtins\nbuiltins.eval('1')",
        "from builtins import exec as do\ndo('1')",
        "import os\nos.system('ls')",
        "from os import popen",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=flag)",
        "import subprocess\nsubprocess.run('ls', **options)",
        "from subprocess import Popen\nPopen('ls', shell=1)",
        "from subprocess import getoutput",
        "import tempfile\ntempfile.mktemp()",
        "from tempfile import mktemp",
        "import torch\ntorch.load(file)",
        "import torch\ntorch.load(file, weights_only=False)",
        "import torch\ntorch.load(file, weights_only=flag)",
        "import torch as t\nt.load(file)",
        "from torch import load\nload(file)",
        "import torch\ntorch.load(file, **options)",
        "import torch\ntorch.hub.load_state_dict_from_url(url)",
        "from torch.hub import load_state_dict_from_url",
        "import torch\ntorch.jit.load(file)",
        "import torch\ntorch.serialization.add_safe_globals([dict])",
        "import onnx\nonnx.hub.load('resnet50')",
        "import numpy as np\nnp.load(file)",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "from numpy import load\nload(file, allow_pickle=flag)",
        "from PIL import Image\nImage.open(file)",
        "import PIL.Image\nPIL.Image.open(file)",
    ],
)
def test_a_planted_sinner_is_found(planted: str) -> None:
    assert list(sins(planted))


def test_what_is_allowed_is_not_found() -> None:
    allowed = """
import re, os, subprocess, tempfile
from importlib import import_module
from urllib.parse import quote
import numpy as np
import torch
from PIL import Image
re.compile("x")
torch.load(file, weights_only=True)
np.load(file, allow_pickle=False)
Image.open(file, formats=("PNG",))
subprocess.run(["ls"], shell=False)
tempfile.mkstemp()
import_module(f"{__name__}.{name}")
model.eval()
"""
    assert list(sins(allowed)) == []


def test_bandit_as_configured_finds_what_is_planted_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("bandit")
    (tmp_path / "planted.py").write_text(
        "import hashlib, pickle, torch\n"
        "pickle.loads(data)\n"
        "torch.load(file)\n"
        "hashlib.md5(data)\n"
        "assert password\n"
        "open('/tmp/x')\n"
        "try:\n    f()\nexcept Exception:\n    pass\n"
    )  # fmt: skip
    command = (sys.executable, "-m", "bandit", "--quiet", "-c", ROOT / "pyproject.toml", "-r", tmp_path)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert set(re.findall(r"B\d{3}", done.stdout)) >= {"B301", "B614", "B324", "B101", "B108", "B110"}
    (tmp_path / "planted.py").write_text("import json\njson.loads(data)\n")
    assert subprocess.run(command, capture_output=True).returncode == 0


# Locked installations


def pinned(file: str) -> set[tuple[str, str]]:
    """Names and versions."""
    lines = (ROOT / file).read_text("utf-8").splitlines()
    found = (re.match(r"([A-Za-z0-9._-]+)==([\w.+!]+)", line) for line in lines)
    return {(match[1].lower(), match[2]) for match in found if match}


def locked(name: str) -> set[tuple[str, str]]:
    return pinned(f"requirements/{name}.txt")


@pytest.mark.parametrize("name", ["edge", "train"])
def test_every_locked_package_has_hashes_and_no_line_names_another_place(name: str) -> None:
    text = (ROOT / f"requirements/{name}.txt").read_text("utf-8")
    code = re.sub(r"#.*", "", text)
    assert not re.search(r"://|index-url|find-links|trusted-host|^\s*-e|\.\./|\s/\w", code, re.MULTILINE)
    assert "/" not in "".join(re.findall(r"-c (\S+)", text))
    entries = [entry for entry in re.sub(r"\\\n", " ", code).splitlines() if entry.strip()]
    assert len(entries) > 10
    for entry in entries:
        assert re.match(r"[a-z0-9][a-z0-9._-]*==[0-9][\w.+!-]* ", entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry
    names = {entry.partition("==")[0] for entry in entries}
    assert ("torch" in names) is (name == "train")
    assert {"numpy", "pillow", "onnxruntime", "click", "tqdm", "cryptography"} <= names


@pytest.mark.parametrize("name", ["edge", "train"])
def test_the_locks_are_of_the_versions_that_are_tested(name: str) -> None:
    """`make lock` was run after constraints.txt was changed."""

    wanted = pinned("constraints.txt")
    constrained = {package for package, _ in wanted}
    assert {pair for pair in locked(name) if pair[0] in constrained} <= wanted


@pytest.mark.parametrize("name", ["edge", "train"])
def test_the_bill_of_materials_is_of_the_locked_packages(name: str) -> None:
    bill = json.loads((ROOT / f"sbom/{name}.cdx.json").read_text("utf-8"))
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "siamese-toolkit")
    hashes = {
        (part["name"], part["version"]): {
            item["content"] for reference in part["externalReferences"] for item in reference["hashes"]
        }
        for part in bill["components"]
    }
    assert set(hashes) == locked(name)
    text = (ROOT / f"requirements/{name}.txt").read_text("utf-8")
    assert set().union(*hashes.values()) == set(re.findall(r"--hash=sha256:(\w+)", text))
    assert all(part["purl"] == f"pkg:pypi/{part['name']}@{part['version']}" for part in bill["components"])


def test_the_report_of_vulnerabilities_is_dated_and_of_the_locked_versions() -> None:
    text = (ROOT / "docs/vulnerabilities.md").read_text("utf-8")
    assert re.search(r"^Report of \d{4}-\d{2}-\d{2}, ", text, re.MULTILINE)
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("| ")][2:]
    reported = {(package, version) for package, cell in rows for version in re.findall(r"\d+\.\d+\.\d+", cell)}
    packages = {package for package, _ in rows}
    assert packages > {"pillow", "onnxruntime", "cryptography", "onnx", "torch"}
    assert reported == {pair for pair in locked("edge") | locked("train") if pair[0] in packages}


# Files of others, and of ours


def test_nothing_of_a_bundle_is_read_through_a_link(tiny_bundle: Path, tmp_path: Path) -> None:
    for name in (MANIFEST, BACKBONE, HEAD):
        bundle = Path(shutil.copytree(tiny_bundle, tmp_path / f"of-{name}"))
        (bundle / name).rename(tmp_path / name)
        (bundle / name).symlink_to(tmp_path / name)
        with pytest.raises(BundleError, match=f"{re.escape(name)}: is a link"):
            read_bundle(bundle)
        (bundle / name).unlink()
        os.mkfifo(bundle / name)  # and nobody waits for a writer
        with pytest.raises(BundleError, match="expected a plain file"):
            read_bundle(bundle)
        (bundle / name).unlink()
        with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(bundle):
            listener.bind(name)
        with pytest.raises(BundleError, match="expected a plain file"):
            read_bundle(bundle)


def test_a_link_put_there_at_the_last_moment_is_not_followed(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / HEAD).rename(tmp_path / HEAD)
    (bundle / HEAD).symlink_to(tmp_path / HEAD)
    monkeypatch.setattr(Path, "is_symlink", lambda _: False)  # it was none when it was looked at
    with pytest.raises(BundleError, match="is a link or a socket"):
        read_bundle(bundle)


def test_what_is_kept_of_pictures_is_for_the_owner_alone(tiny_bundle: Path, pictures: Path, tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        cache, note = open_cache(tmp_path / "cache")
        assert not note
        verifier = OnnxVerifier(tiny_bundle, provider="cpu", cache=cache)
        verifier.compare(pictures / "apple/0.png", pictures / "apple/1.png")
        gallery = Gallery(tmp_path / "gallery", verifier, create=True)
        gallery.enrol("apple", [pictures / "apple/0.png"])
    finally:
        os.umask(mask)
    for folder in (tmp_path / "cache", tmp_path / "gallery"):
        kept = list(folder.rglob("*"))
        assert kept
        for path in (folder, *kept):
            assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
