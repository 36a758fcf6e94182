"""docs/when-it-goes-wrong.md and the code say the same: every reason code, and messages that really occur."""

from __future__ import annotations

import ast
import errno
import os
import re
from functools import cache
from pathlib import Path

from conftest import RunCommand

from siamese_deploy import errors
from siamese_deploy.cli import main as siamese

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/when-it-goes-wrong.md").read_text("utf-8")
SOURCES = [
    file
    for package in ("siamese_deploy", "siamese_train", "export/siamese_export")
    for file in sorted((ROOT / package).rglob("*.py"))
]
POSITION = {"_Failure": 2, "warn": 0, "log": 1, "SkippedFile": 2, "ImageError": 2}
"""Where the code stands among the arguments, if it is not given by name."""


@cache
def trees() -> list[ast.Module]:
    return [ast.parse(file.read_text("utf-8")) for file in SOURCES]


def texts_of(node: ast.expr) -> set[str]:
    """The texts that an expression can be, as far as they stand in it."""
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) and node.value else set()
    if isinstance(node, ast.IfExp):
        return texts_of(node.body) | texts_of(node.orelse)
    if isinstance(node, ast.BoolOp):
        return set().union(*map(texts_of, node.values))
    if isinstance(node, ast.Tuple):
        return texts_of(node.elts[-1])
    if isinstance(node, ast.Dict):
        return set().union(*map(texts_of, node.values))
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "code_of":
        return texts_of(node.args[1])
    return set()


def codes_in(tree: ast.Module) -> set[str]:
    codes: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "code":
            codes |= texts_of(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in POSITION:
            codes |= set().union(*map(texts_of, node.args[POSITION[node.func.id] :][:1]))
        elif isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.Assign | ast.AnnAssign) and line.value is not None:
                    target = line.targets[0] if isinstance(line, ast.Assign) else line.target
                    codes |= texts_of(line.value) if ast.unparse(target) == "code" else set()
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("_CODE_OF"):
            codes |= texts_of(node.value)
        elif isinstance(node, ast.FunctionDef) and node.name in ("_code_of", "_why_unreadable"):
            for line in ast.walk(node):
                codes |= texts_of(line.value) if isinstance(line, ast.Return) and line.value else set()
    return codes


def rows() -> list[list[str]]:
    """The page's table rows with a code as their second column."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line[:2] == "| "]
    return [row for row in cells if len(row) == 3 and re.fullmatch("`[a-z-]+`", row[1])]


def test_the_page_lists_every_code_of_the_source_and_no_other() -> None:
    used = set().union(*map(codes_in, trees()))
    listed = {row[1].strip("`") for row in rows()}
    assert len(used) > 50
    assert used - listed == set()
    assert listed - used == set()
    assert all(re.fullmatch("[a-z]+(-[a-z]+)*", code) for code in used)


def test_every_message_on_the_page_really_occurs(run: RunCommand) -> None:
    said = [os.strerror(number) for number in errno.errorcode]
    for tree in trees():
        documentation = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                said.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documentation:
                said.append(node.value)
    for wrong in (("eval", "--sedd", 1), ("eval",), ("verify", "a"), ("eval", "--seed", "x"), ("bogus",)):
        said.append(run(siamese, *wrong).stderr)
    quoted = [text for row in rows() for text in re.findall("`([^`]+)`", row[0])]
    assert len(quoted) > 100
    missing = [text for text in quoted if not any(all(part in line for part in text.split(" ... ")) for line in said)]
    assert not missing, missing


def test_every_kind_of_error_has_a_code_of_its_own() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SiameseError)]
    assert len({kind.code for kind in kinds}) == len(kinds) > 10
