"""Which package may need what. import-linter holds the import statements; these hold what really happens."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import siamese_deploy

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "siamese_deploy").rglob("*.py"))
FORBIDDEN = ("torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "tensorboard", "siamese_train", "siamese_export")
MODULES = [module.name for module in pkgutil.walk_packages(siamese_deploy.__path__, "siamese_deploy.")]


def test_every_module_of_the_runtime_imports_where_torch_and_onnxruntime_are_blocked() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({(*FORBIDDEN, 'onnxruntime')!r}))\n"
    code += "\n".join(f"import {name}" for name in MODULES)
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    assert len(MODULES) > 15


def imported(source: Path) -> set[str]:
    """Top-level packages named by any import statement, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_runtime_names_no_training_package_anywhere(source: Path) -> None:
    assert not imported(source) & set(FORBIDDEN)
    if source.name not in ("providers.py", "runtime.py"):
        assert "onnxruntime" not in imported(source)


def test_help_and_version_need_only_click() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxruntime', 'numpy', 'PIL', 'tqdm']))\n"
        "from importlib import import_module\n"
        "module, name = sys.argv.pop(1).split(':')\n"
        "getattr(import_module(module), name)()"
    )
    commands = ("eval", "verify", "gallery", "cache", "doctor", "check", "bench", "prepare", "demo_data")
    for command in ("", *(f".{name}" for name in commands)):
        for option in ("--help",) if command in (".gallery", ".cache") else ("--help", "--version"):
            subprocess.run(
                [sys.executable, "-c", code, f"siamese_deploy.cli{command}:main", option],
                check=True,
                capture_output=True,
            )


def test_every_listed_subcommand_loads() -> None:
    from siamese_deploy.cli import _COMMANDS
    from siamese_deploy.cli import main as group

    for name in _COMMANDS:
        assert import_module(f"siamese_deploy.cli.{name}").main.help
        assert name in group.list_commands(None)  # type: ignore[arg-type]
