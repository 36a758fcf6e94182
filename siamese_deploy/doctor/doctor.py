"""`siamese doctor`: what is installed, which providers really start and why the others do not, and one verdict.

A provider counts as working only after a graph ran on it and gave the right numbers: ONNX Runtime's own list says what
was compiled in, and a session may open where no kernel for the GPU exists.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from types import ModuleType
from typing import Any

from siamese_deploy.doctor import checks as doctor_checks
from siamese_deploy.doctor import packages as doctor_packages
from siamese_deploy.doctor.checks import Finding, Level
from siamese_deploy.errors import EnvironmentFault, MissingExtraError, SiameseError
from siamese_deploy.providers import ORT_NAMES, import_onnxruntime, open_session, providers_to_try

FORMAT = "siamese-doctor/1"

# Opset 13, IR 8: y = MatMul(Conv(x), weight), where every weight is 1: a convolution because it needs cuDNN, a product
# because it needs cuBLAS. float32 x (1, 1, 4, 4) -> y (1, 1, 2, 2); ones give 3 * 3 * 2.
PROBE_GRAPH = base64.b64decode(
    "CAg6ywEKFAoBeAoGa2VybmVsEgFjIgRDb252ChYKAWMKBndlaWdodBIBeSIGTWF0TXVsEgVwcm9iZSo4CAEIAQgDCAMQAUIGa2VybmVsSiQAAIA/"
    "AACAPwAAgD8AAIA/AACAPwAAgD8AAIA/AACAPwAAgD8qIAgCCAIQAUIGd2VpZ2h0ShAAAIA/AACAPwAAgD8AAIA/WhsKAXgSFgoUCAESEAoCCAEK"
    "AggBCgIIBAoCCARiGwoBeRIWChQIARIQCgIIAQoCCAEKAggCCgIIAkIECgAQDQ=="
)
_PROBE_RESULT = 18

# TensorRT may build the engines of a bundle for minutes; a driver that hangs does so for ever.
_PATIENCE_S = 3600


@dataclass(frozen=True)
class Attempt:
    """What became of running a graph on one provider."""

    works: bool
    reason: str
    """What was proved, or why it does not work."""
    remedy: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class Diagnosis:
    provider: str
    """The one asked for; "auto" is any that "auto" tries elsewhere."""
    bundle: str | None
    findings: tuple[Finding, ...]
    exit_code: int
    """0 only if `provider` works; 5, or 4 where the bundle does not answer on it as it should."""
    verdict: str

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def examine(provider: str, bundle: str | os.PathLike[str] | None, progress: Callable[[str], None]) -> Diagnosis:
    """Run every check.

    Args:
        provider: the one that has to work, of providers.CHOICES; the others are tried all the same.
        bundle: folder; its golden check must then pass on a provider that is to count as working.
        progress: is given a line before each step that may take long.

    Raises:
        UsageError: `provider` is none of providers.CHOICES.
        InputDataError: no such bundle.
        BundleError: not a bundle, or damaged.
    """
    wanted = providers_to_try(provider)
    if bundle is not None:
        from siamese_deploy.bundle import read_bundle

        read_bundle(bundle)
    findings = [*doctor_checks.check_python(), *doctor_packages.check_packages()]
    findings += doctor_packages.check_two_onnxruntimes()
    ort, about_it = _onnxruntime()
    findings += about_it
    compiled_in = [] if ort is None else ort.get_available_providers()
    attempts = {}
    for name, long_name in ORT_NAMES.items():
        if ort is None:
            attempts[name] = Attempt(False, about_it[0].message, about_it[0].remedy, EnvironmentFault.exit_code)
        elif name == "cpu" or long_name not in compiled_in:
            with _silence():
                attempts[name] = try_provider(name, bundle)
        else:
            progress(f"trying {name}{' (TensorRT may build engines for minutes)' if name == 'tensorrt' else ''} ...")
            attempts[name] = _try_apart(name, bundle)
    taken = next((name for name in wanted if attempts[name].works), None)
    for name, attempt in attempts.items():
        level = _level(attempt, name in wanted, taken is not None, ORT_NAMES[name] in compiled_in)
        findings.append(_finding(name, attempt, level))
    # From here on libraries are loaded into this process, which would change what a provider finds.
    findings += doctor_packages.check_gpu(compiled_in)
    findings += doctor_packages.check_nvidia_libraries(ort, wanted)
    findings += (finding for check in doctor_checks.CHECKS for finding in check())
    last = attempts[wanted[-1]]
    return Diagnosis(
        provider,
        None if bundle is None else str(bundle),
        tuple(findings),
        0 if taken else last.exit_code,
        _verdict(provider, taken, last, bundle is not None, findings),
    )


def answer(provider: str, bundle: str) -> None:
    """The child's side of a provider tried in a process of its own: one line of JSON on stdout."""
    with _silence():
        attempt = try_provider(provider, bundle or None)
    print(json.dumps(asdict(attempt)), flush=True)


def try_provider(provider: str, bundle: str | os.PathLike[str] | None) -> Attempt:
    """Run the probe graph, or a bundle's golden check, on the provider in this process. Raises nothing."""
    try:
        if bundle is not None:
            from siamese_deploy.runtime import OnnxVerifier

            OnnxVerifier(bundle, provider=provider)
            return Attempt(True, "the bundle's golden check passes")
        import numpy as np

        session = open_session(PROBE_GRAPH, "probe graph", provider)
        (result,) = session.run(["y"], {"x": np.ones((1, 1, 4, 4), np.float32)})
        if not (result == _PROBE_RESULT).all():
            raise EnvironmentFault(
                f"it computes {result.ravel().tolist()} where {_PROBE_RESULT} is right; check this build of ONNX "
                "Runtime and the device"
            )
        return Attempt(True, "a convolution and a matrix product give the right numbers")
    except Exception as error:  # ONNX Runtime raises its own kinds while running
        return _failure(error, provider)


def _onnxruntime() -> tuple[ModuleType | None, list[Finding]]:
    """The module with what there is to say of it; or None with the reason as the one finding."""
    try:
        with _silence():
            ort = import_onnxruntime()
            return ort, list(doctor_packages.check_onnxruntime(ort))
    except MissingExtraError as error:
        missing = _failure(error)
        return None, [Finding("problem", "no-onnxruntime", missing.reason, missing.remedy)]
    except Exception as error:  # a half overwritten package raises anything: AttributeError, for one
        names = " ".join(sorted({package.name for package in doctor_packages.onnxruntime_packages()})) or "onnxruntime"
        reason = f"onnxruntime is installed and cannot be used: {error}"
        remedy = f"pip uninstall -y {names} && pip install 'siamese-toolkit[cpu]'"
        return None, [Finding("problem", "broken-onnxruntime", reason, f"run: {remedy} (or [gpu]; or the board's own)")]


def _failure(error: Exception, provider: str = "") -> Attempt:
    text = str(error).strip() if isinstance(error, SiameseError) else repr(error).partition("\n")[0]
    reason, _, remedy = text.removeprefix(f"provider {provider}: ").partition("; ")
    exit_code = error.exit_code if isinstance(error, SiameseError) else EnvironmentFault.exit_code
    return Attempt(False, reason, remedy, exit_code)


def _try_apart(provider: str, bundle: str | os.PathLike[str] | None) -> Attempt:
    """In a fresh process: a crash there does not end the report, and no library left loaded helps the next provider."""
    code = "import sys; sys.path[:] = sys.argv[3:]; from siamese_deploy.doctor import answer; answer(*sys.argv[1:3])"
    command = [sys.executable, "-c", code, provider, "" if bundle is None else os.fspath(bundle), *sys.path]
    remedy = "its libraries may not fit together or the driver: compare the versions in this report"
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        return Attempt(False, f"no answer within {_PATIENCE_S // 60} minutes", remedy, EnvironmentFault.exit_code)
    try:  # the exit code does not count: libraries like to crash on the way out
        return Attempt(**json.loads(done.stdout.partition("\n")[0]))
    except (ValueError, TypeError):
        last_words = done.stderr.strip().rpartition("\n")[2]
        how = signal.strsignal(-done.returncode) if done.returncode < 0 else f"exit code {done.returncode}"
        reason = f"the process that tried it died ({how}){': ' if last_words else ''}{last_words}"
        return Attempt(False, reason, remedy, EnvironmentFault.exit_code)


def _level(attempt: Attempt, wanted: bool, any_works: bool, compiled_in: bool) -> Level:
    if attempt.works or not wanted:
        return "ok"
    if not any_works:
        return "problem"
    return "warning" if compiled_in else "ok"  # "auto" passes over CUDA: news only where CUDA was installed


def _finding(provider: str, attempt: Attempt, level: Level) -> Finding:
    message = f"{'works' if attempt.works else 'does not work here'}: {attempt.reason}"
    value = {"works": attempt.works, "reason": attempt.reason}
    return Finding(level, f"provider-{provider}", message, attempt.remedy, value)


def _verdict(provider: str, taken: str | None, last: Attempt, with_bundle: bool, findings: list[Finding]) -> str:
    if taken is None:
        subject = "no provider works" if provider == "auto" else f"{provider} does not work"
        return f"{subject} here: {last.reason}" + (f"; {last.remedy}" if last.remedy else "")
    levels = Counter(finding.level for finding in findings)
    counts = [f"{n} {level}{'s' if n > 1 else ''}" for level in ("problem", "warning") if (n := levels[level])]
    return f"{taken} works{' with this bundle' if with_bundle else ''}" + (f" ({', '.join(counts)})" if counts else "")


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on stdout and stderr, also from C: ONNX Runtime and NVIDIA's libraries write there unasked."""
    saved = {}
    for descriptor in (1, 2):
        try:
            # From 3 on: where 2 is closed, os.dup(1) would be 2.
            saved[descriptor] = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
        except OSError:  # closed by whoever started us
            continue
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in saved:
            os.dup2(nowhere, descriptor)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        for descriptor, copy in saved.items():
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(nowhere)
