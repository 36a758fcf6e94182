"""Does a test notice if the code that decides is changed? By hand: `python tests/mutations.py [FILE[:FUNCTION] ...]`.

Every comparison, `not`, `and`, `or`, number, True, False, `raise`, condition and bare call in the places below is
changed, one at a time, in a copy of the package, and the tests beside it run on the copy until one fails. A mutant that
no test kills is printed, and is a missing test or stands in _EXPLAINED with the reason why it changes nothing that
matters. Exit code 1 if one survives that is not explained.
"""

from __future__ import annotations

import ast
import copy
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# File of siamese_deploy, functions ("" for all of it), test files of tests/deploy, the quickest to notice first.
PLACES = [
    ("cli/verify.py", "", "verify_command fail_closed log"),
    ("cli/gallery.py", "identify", "gallery_command verify_command fail_closed log"),
    ("cli/gallery.py", "_as_json", "fail_closed gallery_command"),
    (
        "cli/command.py",
        "invoke make_context _fail _failure_of _terminated",
        "command fail_closed log interrupts faults_of_the_environment",
    ),
    (
        "errors.py",
        "SiameseError UsageError InputDataError IntegrityError EnvironmentFault BusyError",
        "command fail_closed when_it_goes_wrong",
    ),
    ("runtime.py", "_checked", "runtime fail_closed"),
    (
        "runtime.py",
        "_check_golden _check compare _compare_placed score score_placed embed_placed",
        "runtime faults_of_the_runtime verify_command fail_closed",
    ),
    ("embedding.py", "require_signal", "faults_of_the_runtime fail_closed"),
    (
        "gallery/gallery.py",
        "_identification verify name _embed _best_identities _score_rows",
        "gallery gallery_search fail_closed",
    ),
    ("gallery/vectors.py", "checksums read", "gallery gallery_faults"),
    ("bundle.py", "_read_bundle _checked_digest _unexpected __post_init__", "bundle signature fail_closed"),
    ("bundle.py", "_read_regular _parse_manifest _typed _unique_keys", "bundle signature faults_of_the_runtime"),
    ("signature.py", "check _public_key", "signature"),
    ("metrics/decisions.py", "accepted", "metrics fail_closed"),
]
_BOUND = "no error that is measured is the limit to its last bit"
_EXPLAINED = (
    ("cli/gallery.py: click.echo(json.dumps", "indent=3))", "by how much JSON is indented"),
    ("gallery/gallery.py: raise AssertionError('one picture", "pass", "never reached"),
    (
        "gallery/gallery.py: best = best_identities",
        "max(top, 3))",
        "one more is found, and cut off with those behind `top`",
    ),
    ("gallery/gallery.py: likely = ", "max(top, 3)) if fast else None", "one more is looked for, and cut off"),
    (
        "gallery/gallery.py: if only is None and",
        "if only is None or self._device_bytes:",
        "on a CPU, rows placed on it score alike",
    ),
    ("gallery/gallery.py: wanted = ", "-2)", "no row has a negative number"),
    ("gallery/vectors.py: while", "done <= len(view):", "one more read, of nothing, which ends the loop"),
    ("gallery/vectors.py: ", "reshape(-2).view(np.uint8))", "NumPy takes any negative number for the rest"),
    ("gallery/vectors.py: ", "reshape(-2).view(np.uint8)[done:] = 0", "the same"),
    (
        "runtime.py: if self.provider",
        "self.cache is not None:",
        "on a GPU only; both ways give the same score, a test says",
    ),
    ("runtime.py: score = float(self._run_head(", "2)[0])", "a slice of two rows of one row is that row"),
    ("runtime.py: if not (error <= limit", "if not (error < limit and abs(score - golden.score) <= limit):", _BOUND),
    ("runtime.py: if not (error <= limit", "abs(score - golden.score) < limit):", _BOUND),
    ("runtime.py: n_pairs = ", "if len(left) or len(right) else 0", "the head gives no score for no row, too"),
    ("runtime.py: n_pairs = ", "if len(left) and len(right) else 1", "the head gives no score for no row, too"),
)
"""How what is printed of a mutant begins and ends, and why it is none."""

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What a node may be changed into."""
    if isinstance(node, ast.Compare):
        for k, operator in enumerate(node.ops):
            for other in _COMPARISONS[type(operator)]:
                changed = copy.deepcopy(node)
                changed.ops[k] = other()
                yield changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()
    elif isinstance(node, ast.If | ast.IfExp) and isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
        changed = copy.copy(node)
        changed.test = ast.UnaryOp(ast.Not(), node.test)
        yield changed


def mutants(source: str, functions: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of the line that is changed, as it was and as it is, and the whole changed source."""
    tree = ast.parse(source)
    source = ast.unparse(tree)
    owners = [node for node in ast.walk(tree) if getattr(node, "name", "") in functions] if functions else [tree]
    for owner in owners:
        for parent in ast.walk(owner):
            for field, value in ast.iter_fields(parent):
                if field in ("returns", "annotation", "decorator_list") and functions:
                    continue
                children = value if isinstance(value, list) else [value]
                for k, child in enumerate(children):
                    for changed in variants(child) if isinstance(child, ast.AST) else ():
                        _put(parent, field, k, ast.fix_missing_locations(ast.copy_location(changed, child)))
                        yield _changed_line(source, ast.unparse(tree)), ast.unparse(tree)
                        _put(parent, field, k, child)


def _changed_line(before: str, after: str) -> str:
    lines = zip(before.splitlines(), after.splitlines(), strict=True)
    old, new = next((old.strip(), new.strip()) for old, new in lines if old != new)
    return f"{old}  =>  {new}"


def _put(parent: ast.AST, field: str, k: int, child: ast.AST) -> None:
    value = getattr(parent, field)
    if isinstance(value, list):
        value[k] = child
    else:
        setattr(parent, field, child)


def tested(package_root: Path, tests: list[str], limit_s: float) -> str:
    """Of the copy: "killed" by a test that fails, "survived" or "timed out"; forked: libraries are imported once."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        sys.path.insert(0, str(package_root))
        os.environ["PYTHONPATH"] = str(package_root)
        os.chdir(package_root)  # `python -c` looks there first
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        import pytest

        options = [
            "-x",
            "-q",
            "--assert=plain",
            "-p",
            "no:cacheprovider",
            "--basetemp",
            str(package_root / "tmp"),  # other runs of pytest tidy up the usual one
            "--rootdir",
            str(ROOT),
            "-c",
            str(ROOT / "pyproject.toml"),
        ]
        status = 1
        try:
            status = int(pytest.main([*options, *tests]))
        finally:  # also of a SystemExit that a mutant lets through: the folder is the parent's
            os._exit(status)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "killed" if status else "survived"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timed out"


def main(wanted: list[str]) -> int:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    import hypothesis  # noqa: F401 - before the forks
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import PIL.Image  # noqa: F401
    import pytest  # noqa: F401

    counts = {"killed": 0, "timed out": 0, "explained": 0, "survived": 0}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "siamese_deploy", Path(folder, "siamese_deploy"))
        for file, functions, names in PLACES:
            chosen = [one for one in functions.split() if not wanted or file in wanted or f"{file}:{one}" in wanted]
            if wanted and file not in wanted and not chosen:
                continue
            tests = [str(ROOT / f"tests/deploy/test_{name}.py") for name in names.split()]
            target = Path(folder, "siamese_deploy", file)
            source = target.read_text()
            target.write_text(ast.unparse(ast.parse(source)))
            start = time.monotonic()
            if tested(Path(folder), tests, 3600) != "survived":
                raise SystemExit(f"{names}: a test fails without any change; make them pass first")
            limit_s = 60 + 10 * (time.monotonic() - start)
            for change, mutant in mutants(source, chosen):
                target.write_text(mutant)
                label = f"{file}: {change}"
                outcome = tested(Path(folder), tests, limit_s)
                if outcome == "survived" and any(label.startswith(a) and label.endswith(b) for a, b, _ in _EXPLAINED):
                    outcome = "explained"
                counts[outcome] += 1
                if outcome != "killed":
                    print(f"{outcome}  {label}", flush=True)
            target.write_text(source)
            print(f"{file} {functions}: {counts}", flush=True)
    return bool(counts["survived"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
