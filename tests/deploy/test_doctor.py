from __future__ import annotations

import json
import os
import resource
import shutil
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import RunCommand, assert_refused
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import make_bundle

from siamese_deploy.cli import main as siamese
from siamese_deploy.doctor import packages as doctor_packages
from siamese_deploy.doctor.checks import Finding, check_cpu, check_memory, check_open_files
from siamese_deploy.doctor.doctor import PROBE_GRAPH
from siamese_deploy.gpu import GpuIdentity
from siamese_deploy.installed_libraries import find_library, nvidia_libraries_needed
from siamese_deploy.providers import ORT_NAMES

COMPILED_IN = onnxruntime.get_available_providers()
NO_CUDA = pytest.mark.skipif(ORT_NAMES["cuda"] in COMPILED_IN, reason="this ONNX Runtime has CUDA")


def diagnose(run: RunCommand, *arguments: object) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The JSON object, and its findings by their code."""
    result = run(siamese, "doctor", *arguments, "--json")
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["exit_code"] == result.exit_code
    findings = {finding["code"]: finding for finding in report["findings"]}
    assert len(findings) == len(report["findings"])
    return report, findings


def run_apart(code: str, *arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with `path` before everything installed."""
    folders = filter(None, (path and str(path), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": ""}  # as users have it
    command = [sys.executable, "-c", f"import sys; {code}; from siamese_deploy.cli.doctor import main; main()"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=path)


def plant_package(site: Path, name: str, version: str, **files: str) -> None:
    """The metadata of an installed distribution; `files` are further files in its dist-info folder."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files.items():
        (folder / file.replace("top_level", "top_level.txt")).write_text(text)


# --- the verdict and the exit code ---------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["auto", "cpu"])
def test_a_provider_that_works_is_exit_code_0(run: RunCommand, provider: str) -> None:
    result = run(siamese, "doctor", "--provider", provider)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1].startswith(("verdict: cpu works", "verdict: cuda works"))
    assert "\x1b" not in result.stdout


@NO_CUDA
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_is_exit_code_5_with_reason_and_remedy(run: RunCommand, provider: str) -> None:
    result = run(siamese, "doctor", "--provider", provider)
    assert (result.exit_code, result.stderr) == (5, "")
    verdict = result.stdout.splitlines()[-1]
    assert verdict.startswith(f"verdict: {provider} does not work here: the installed ONNX Runtime")
    assert "pip install" in verdict
    _, findings = diagnose(run, "--provider", provider)
    assert findings[f"provider-{provider}"]["level"] == "problem"
    assert findings["provider-cpu"]["level"] == "ok"
    _, findings = diagnose(run, "--provider", "cpu")
    assert findings[f"provider-{provider}"]["level"] == "ok"  # nobody asked for it
    assert findings[f"provider-{provider}"]["value"]["works"] is False


def test_a_closed_stderr_does_not_cost_the_report() -> None:
    done = run_apart("import os; os.close(2)", "--json")
    assert (done.returncode, json.loads(done.stdout)["exit_code"]) == (0, 0)


def test_json_and_text_say_the_same(run: RunCommand) -> None:
    report, findings = diagnose(run)
    lines = run(siamese, "doctor").stdout.splitlines()
    assert list(report) == ["format", "provider", "bundle", "findings", "exit_code", "verdict"]
    assert (report["format"], report["provider"], report["bundle"]) == ("siamese-doctor/1", "auto", None)
    assert lines[-1] == f"verdict: {report['verdict']}"
    starts = [line[9:].split(" ")[0] for line in lines[:-1] if line[9] != " "]
    assert starts == list(findings)
    for code, finding in findings.items():
        (line,) = [line for line in lines[:-1] if line[9:].startswith(f"{code} ")]
        assert line[:9].strip() == finding["level"].replace("ok", "")
        if code != "memory":  # moves between two runs
            assert finding["message"] in line
        assert not finding["remedy"] or any(f"-> {finding['remedy']}" in line for line in lines)
    warnings = sum(finding["level"] == "warning" for finding in findings.values())
    assert ("warning" in report["verdict"]) == (warnings > 0)


def test_reports_what_is_really_installed(run: RunCommand) -> None:
    _, findings = diagnose(run)
    assert findings["python"]["value"]["executable"] == sys.executable
    assert findings["packages"]["value"]["numpy"] == np.__version__
    assert findings["onnxruntime"]["value"]["version"] == onnxruntime.__version__
    assert findings["onnxruntime"]["value"]["compiled_in"] == COMPILED_IN
    assert findings["sqlite"]["value"]["version"] == sqlite3.sqlite_version
    assert ("sqlite-wal-unsafe" in findings) == (sqlite3.sqlite_version_info < (3, 51, 3))
    assert findings["cpu"]["value"]["usable"] == len(os.sched_getaffinity(0))
    assert 0 < findings["memory"]["value"]["available_bytes"] < findings["memory"]["value"]["total_bytes"]
    assert set(findings["pillow-codecs"]["value"]) >= {"jpg", "webp"}
    assert not {"two-onnxruntimes", "shadowed-onnxruntime", "other-onnxruntime", "vulnerable-pillow"} & set(findings)


def test_the_probe_graph_is_the_one_described() -> None:
    ones = [
        numpy_helper.from_array(np.ones(s, np.float32), n) for s, n in (((1, 1, 3, 3), "kernel"), ((2, 2), "weight"))
    ]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "kernel"], ["c"]), helper.make_node("MatMul", ["c", "weight"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 2, 2])],
        ones,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert model.SerializeToString() == PROBE_GRAPH


# --- with a bundle -------------------------------------------------------------------------------------------------


def test_with_a_bundle_its_golden_check_must_pass(run: RunCommand, tiny_bundle: Path, tmp_path: Path) -> None:
    report, findings = diagnose(run, tiny_bundle, "--provider", "cpu")
    assert report["verdict"].startswith("cpu works with this bundle")
    assert "golden check passes" in findings["provider-cpu"]["message"]

    def wrong(model: onnx.ModelProto) -> None:
        weight = next(tensor for tensor in model.graph.initializer if tensor.name == "weight")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.5), "weight"))

    make_bundle(wrong).write(tmp_path / "wrong")
    report, findings = diagnose(run, tmp_path / "wrong", "--provider", "cpu")
    assert (report["exit_code"], findings["provider-cpu"]["level"]) == (4, "problem")
    assert report["verdict"].startswith("cpu does not work here: golden check failed on cpu")


def test_a_folder_that_is_no_sound_bundle_keeps_its_own_exit_code(
    run: RunCommand, tiny_bundle: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_bundle, damaged)
    with open(damaged / "head.onnx", "r+b") as file:
        file.write(b"\xff")
    for bundle, exit_code in ((tmp_path / "absent", 3), (tmp_path, 4), (damaged, 4)):
        result = run(siamese, "doctor", bundle, "--json")
        assert_refused(result, exit_code)
        assert result.stdout == ""
    assert_refused(run(siamese, "doctor", "--provider", "gpu"), 2, "'gpu' is not one of")


# --- ONNX Runtime missing, doubled, broken, crashing ---------------------------------------------------------------


def test_missing_onnxruntime_is_a_verdict_and_not_a_crash() -> None:
    for arguments in ((), ("--json",), ("--provider", "cpu")):
        done = run_apart("sys.modules['onnxruntime'] = None", *arguments)
        assert (done.returncode, done.stderr) == (5, "")
        if "--json" in arguments:
            report = json.loads(done.stdout)
            assert "no-onnxruntime" in [finding["code"] for finding in report["findings"]]
            assert report["verdict"].startswith(
                "no provider works here: onnxruntime is not installed; run: pip install"
            )
        else:
            assert "does not work here: onnxruntime is not installed" in done.stdout
            assert "pip install 'siamese-toolkit[cpu]'" in done.stdout.splitlines()[-1]


def test_two_onnxruntimes_in_one_folder_are_a_problem_with_the_commands_that_mend_it(
    run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    plant_package(site, "onnxruntime-gpu", "99.0", top_level="onnxruntime\n")
    (site / "onnxruntime").symlink_to(Path(onnxruntime.__file__).parent)  # one folder for both
    monkeypatch.syspath_prepend(site)
    report, findings = diagnose(run)
    assert findings["two-onnxruntimes"]["level"] == "problem"
    assert "onnxruntime-gpu 99.0" in findings["two-onnxruntimes"]["message"]
    mend = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'siamese-toolkit[gpu]'"
    assert mend in findings["two-onnxruntimes"]["remedy"]
    assert (report["exit_code"], "1 problem" in report["verdict"]) == (0, True)  # the provider does work


def test_an_onnxruntime_behind_another_one_is_a_warning(
    run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    plant_package(site, "onnxruntime-openvino", "99.0", RECORD="onnxruntime/__init__.py,,\n")
    plant_package(site, "onnxruntime-extensions", "1.0", top_level="onnxruntime_extensions\n")
    plant_package(site, "onnxruntime-genai", "1.0", RECORD="onnxruntime_genai/onnxruntime/__init__.py,,\n")
    monkeypatch.syspath_prepend(site)
    _, findings = diagnose(run)
    assert findings["shadowed-onnxruntime"]["level"] == "warning"
    assert "onnxruntime-openvino 99.0" in findings["shadowed-onnxruntime"]["message"]
    assert "extensions" not in findings["shadowed-onnxruntime"]["message"]
    assert "genai" not in findings["shadowed-onnxruntime"]["message"]
    assert "two-onnxruntimes" not in findings


def test_a_half_removed_onnxruntime_is_named(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime/__init__.py").touch()  # what `pip uninstall` of one of two can leave
    done = run_apart("pass", "--json", path=tmp_path)
    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (5, "")
    (finding,) = [finding for finding in report["findings"] if finding["code"] == "broken-onnxruntime"]
    assert "get_available_providers" in finding["message"]
    assert "pip uninstall -y onnxruntime" in finding["remedy"]


CHATTERING = """
import os
__version__ = "1.19.2"
print("chatter of Python")
os.write(1, b"chatter of C\\n")
os.write(2, b"chatter of C\\n")
def set_default_logger_severity(level): os.write(2, b"chatter of C\\n")
def get_available_providers(): return ["CUDAExecutionProvider", "CPUExecutionProvider"]
class SessionOptions:
    def add_session_config_entry(self, key, value): pass
class InferenceSession:
    def __init__(self, graph, options, providers, **more):
        if providers[0][0] == "CUDAExecutionProvider":
            os.write(2, b"last words\\n")
            os.abort()
    def get_providers(self): return ["CPUExecutionProvider"]
    def run(self, outputs, inputs):
        print("chatter of Python")
        return [inputs["x"][:, :, :2, :2]]
"""


def test_a_provider_that_crashes_ends_neither_the_report_nor_its_form(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime/__init__.py").write_text(CHATTERING)
    plant_package(tmp_path, "onnxruntime", "1.33.0", top_level="onnxruntime\n")
    done = run_apart("pass", "--json", "--provider", "cuda", path=tmp_path)
    assert (done.returncode, done.stderr) == (5, "")
    report = json.loads(done.stdout)  # nothing but the object
    findings = {finding["code"]: finding for finding in report["findings"]}
    assert "the process that tried it died (Aborted)" in report["verdict"]
    assert findings["provider-cuda"]["level"] == "problem"
    assert "computes [1.0, 1.0, 1.0, 1.0] where 18 is right" in findings["provider-cpu"]["message"]
    assert findings["provider-cpu"]["level"] == "ok"  # nobody asked for it
    assert "1.19.2 is older than 1.20" in findings["old-onnxruntime"]["message"]
    done = run_apart("pass", path=tmp_path)
    assert "chatter" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("verdict: no provider works here: ")


def test_an_imported_onnxruntime_that_pip_did_not_install_is_named(tmp_path: Path) -> None:
    (tmp_path / "first/onnxruntime").mkdir(parents=True)
    (tmp_path / "first/onnxruntime/__init__.py").write_text(CHATTERING)
    report = json.loads(run_apart("pass", "--json", path=tmp_path / "first").stdout)
    (finding,) = [finding for finding in report["findings"] if finding["code"] == "other-onnxruntime"]
    assert str(tmp_path / "first/onnxruntime") in finding["message"]
    assert f"onnxruntime {onnxruntime.__version__}" in finding["message"]


# --- versions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "vulnerable", "safe"),
    [("torch", "2.5.1+cu124", "2.10.0+cu130"), ("pillow", "12.2.0", "12.3.0"), ("onnx", "1.9.0", "1.21.0")],
)
def test_vulnerable_versions_are_warnings_and_are_read_without_importing(
    run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, vulnerable: str, safe: str
) -> None:
    plant_package(tmp_path / "old", name, vulnerable)
    plant_package(tmp_path / "new", name, safe)
    monkeypatch.syspath_prepend(tmp_path / "old")
    report, findings = diagnose(run)
    assert findings[f"vulnerable-{name}"]["level"] == "warning"
    assert f"{name} {vulnerable} is older than" in findings[f"vulnerable-{name}"]["message"]
    assert report["exit_code"] == 0
    monkeypatch.syspath_prepend(tmp_path / "new")
    assert f"vulnerable-{name}" not in diagnose(run)[1]


def test_torch_and_onnx_are_never_imported() -> None:
    done = run_apart("sys.modules.update(torch=None, onnx=None, torchvision=None)")
    assert done.returncode == 0, done.stderr


# --- the machine ---------------------------------------------------------------------------------------------------


def plant_control_group(root: Path, files: dict[str, str], available_kb: int = 4_000_000) -> Path:
    group = root / "sys/fs/cgroup/outer/inner"
    group.mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("1:name=systemd:/\n0::/outer/inner\n")
    (root / "proc/meminfo").write_text(f"MemTotal:  8000000 kB\nMemAvailable:  {available_kb} kB\n")
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).write_text(text)
    return root


def by_code(findings: Any) -> dict[str, Finding]:
    return {finding.code: finding for finding in findings}


def test_limits_of_the_container_count(tmp_path: Path) -> None:
    free = plant_control_group(tmp_path / "free", {"outer/inner/memory.max": "max\n", "outer/cpu.max": "max 100000\n"})
    assert by_code(check_memory(free))["memory"].value == {
        "total_bytes": 8_192_000_000,
        "available_bytes": 4_096_000_000,
        "limit_bytes": None,
    }
    assert list(by_code(check_memory(free))) == ["memory"]
    assert list(by_code(check_cpu(free))) == ["cpu"]
    files = {
        "outer/inner/memory.max": "max\n",
        "outer/memory.max": "268435456\n",
        "outer/inner/cpu.max": "50000 100000\n",
    }
    tight = plant_control_group(tmp_path / "tight", files)
    assert by_code(check_memory(tight))["memory"].value["limit_bytes"] == 2**28
    assert "256 MiB" in by_code(check_memory(tight))["little-memory"].message
    assert by_code(check_cpu(tight))["cpu"].value["quota"] == 0.5
    if len(os.sched_getaffinity(0)) > 1:
        assert by_code(check_cpu(tight))["cpu-quota"].level == "warning"
    full = plant_control_group(tmp_path / "full", {"memory.max": "4000000000"}, available_kb=100_000)
    assert "little-memory" in by_code(check_memory(full))


def test_a_cache_folder_that_others_may_write_into_is_a_problem(
    run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "siamese-toolkit"
    assert diagnose(run)[1]["cache-folder"]["value"] == {"folder": str(folder), "exists": False}
    assert not folder.exists()  # looking makes nothing
    folder.mkdir(mode=0o700)
    assert diagnose(run)[1]["cache-folder"]["value"]["exists"] is True
    folder.chmod(0o777)
    finding = diagnose(run)[1]["cache-not-private"]
    assert (finding["level"], f"chmod go-w {folder}" in finding["remedy"]) == ("problem", True)


def test_few_open_files_are_a_warning() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (255, hard))
        assert list(by_code(check_open_files())) == ["open-files", "few-open-files"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert list(by_code(check_open_files())) == ["open-files"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- NVIDIA's libraries --------------------------------------------------------------------------------------------


def elf_that_needs(*names: str) -> bytes:
    """The least of a shared library: one loaded segment and a dynamic section with these names."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    offsets = [strings.index(b"\0" + name.encode() + b"\0") + 1 for name in names]
    at, address = 64 + 2 * 56, 0x10000
    dynamic = b"".join(struct.pack("<qQ", 1, offset) for offset in offsets)
    dynamic += struct.pack("<qQqQ", 5, address + at + len(dynamic) + 32, 0, 0)
    header = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    )
    size = at + len(dynamic) + len(strings)
    load = struct.pack("<IIQQQQQQ", 1, 4, 0, address, address, size, size, 4096)
    section = struct.pack("<IIQQQQQQ", 2, 4, at, address + at, address + at, len(dynamic), len(dynamic), 8)
    return header + load + section + dynamic + strings


def test_what_a_provider_library_needs_is_read_from_it(tmp_path: Path) -> None:
    library = elf_that_needs("libcudart.so.13", "libc.so.6", "libcublasLt.so.13", "libnvinfer.so.10", "libm.so.6")
    (tmp_path / "provider.so").write_bytes(library)
    expected = ("libcudart.so.13", "libcublasLt.so.13", "libnvinfer.so.10")
    assert nvidia_libraries_needed(tmp_path / "provider.so") == expected
    for name, damaged in (
        ("empty", b""),
        ("text", b"no library"),
        ("cut", library[:100]),
        ("32 bits", b"\x7fELF\x01" + library[5:]),
    ):
        (tmp_path / name).write_bytes(damaged)
        assert nvidia_libraries_needed(tmp_path / name) == ()
    assert nvidia_libraries_needed(tmp_path / "absent") == ()


def test_libraries_are_found_as_the_loader_does_and_in_pip_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = find_library("libm.so.6")
    assert system is not None
    assert Path(system.path).is_file()
    assert find_library("libplanted.so.1") is None
    (tmp_path / "nvidia/cu99/lib").mkdir(parents=True)
    shutil.copy(system.path, tmp_path / "nvidia/cu99/lib/libplanted.so.1")
    monkeypatch.syspath_prepend(tmp_path)
    planted = find_library("libplanted.so.1")
    assert planted is not None
    assert planted.path == str(tmp_path / "nvidia/cu99/lib/libplanted.so.1")


def test_missing_cuda_and_an_old_driver_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("onnxruntime")
    module.__file__ = str(tmp_path / "__init__.py")
    (tmp_path / "capi").mkdir()
    provider = tmp_path / "capi/libonnxruntime_providers_cuda.so"
    provider.write_bytes(elf_that_needs("libcudart.so.99", "libc.so.6"))
    monkeypatch.setattr(doctor_packages, "gpu_identity", lambda: GpuIdentity("Board", "8.7", 16, "540.4", "12.6"))
    findings = by_code(doctor_packages.check_nvidia_libraries(module, ["cuda", "cpu"]))
    assert findings["cuda-libraries"].level == "warning"
    assert "libcudart.so.99" in findings["cuda-libraries"].value["missing"]
    assert "libcudnn.so.9" in findings["cuda-libraries"].value["needed"]
    assert "supports CUDA up to 12.6, ONNX Runtime needs CUDA 99" in findings["old-driver"].message
    findings = by_code(doctor_packages.check_nvidia_libraries(module, ["cpu"]))
    assert (findings["cuda-libraries"].level, "old-driver" in findings) == ("ok", False)
    provider.write_bytes(elf_that_needs("libcudart.so.12", "libc.so.6"))
    assert "old-driver" not in by_code(doctor_packages.check_nvidia_libraries(module, ["cuda"]))
    assert "gpu-unused" in by_code(doctor_packages.check_gpu(["CPUExecutionProvider"]))
    assert list(by_code(doctor_packages.check_gpu(["CUDAExecutionProvider"]))) == ["gpu"]
