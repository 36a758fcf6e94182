"""The repository for a Triton Inference Server: what is in the files, and what a real server answers from them.

The server is the one inside the wheel nvidia-pytriton. It has no onnxruntime backend, so the graphs are run by its
python backend with ONNX Runtime (STAND_IN); all else is as written. The unchanged files are loaded too, and there the
missing backend is the only thing the server may find wrong.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_bundle

from siamese_deploy import Bundle, Evaluation, OnnxVerifier, evaluate_folder
from siamese_deploy.errors import UsageError
from siamese_deploy.preprocess import load_image
from siamese_export.triton import write_repository

Pictures = npt.NDArray[np.uint8]

START_LIMIT_S = 60
NAN_PICTURE, FAILING_PICTURE = 77, 78
"""Pictures of one such value make the stand-in's backbone answer NaN, or fail."""
STAND_IN = f"""
import os, time
import numpy as np, onnxruntime
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        time.sleep(0.02)  # a queue forms meanwhile
        return [self.answer(request) for request in requests]

    def answer(self, request):
        names = [node.name for node in self.session.get_inputs()]
        inputs = {{name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}}
        output = self.session.get_outputs()[0].name
        values = self.session.run([output], inputs)[0]
        if names == ["images"]:
            if (inputs["images"] == {FAILING_PICTURE}).all(axis=(1, 2, 3)).any():
                return pb_utils.InferenceResponse(error=pb_utils.TritonError("out of memory"))
            values[(inputs["images"] == {NAN_PICTURE}).all(axis=(1, 2, 3))] = np.nan
        return pb_utils.InferenceResponse([pb_utils.Tensor(output, values)])
"""


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """The tiny bundle with a threshold amid the scores."""
    made = tiny_bundle.make_bundle()
    return replace(made, manifest=replace(made.manifest, threshold=0.0945))


@pytest.fixture(scope="module")
def repository(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("triton") / "repository"
    write_repository(bundle, path)
    return path


def config(repository: Path, model: str) -> str:
    return (repository / model / "config.pbtxt").read_text()


def setting(text: str, key: str) -> str:
    """The value of a TensorRT or model parameter."""
    found = re.findall(rf'key: "{key}" value:? (?:{{ string_value: )?"([^"]*)"', text)
    assert len(found) == 1, (key, found)
    return str(found[0])


def test_the_repository_holds_three_models_and_the_bundles_own_bytes(repository: Path, bundle: Bundle) -> None:
    assert sorted(str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()) == [
        "siamese/1/model.py",
        "siamese/config.pbtxt",
        "siamese_backbone/1/model.onnx",
        "siamese_backbone/config.pbtxt",
        "siamese_head/1/model.onnx",
        "siamese_head/config.pbtxt",
    ]
    assert (repository / "siamese_backbone/1/model.onnx").read_bytes() == bundle.backbone
    assert (repository / "siamese_head/1/model.onnx").read_bytes() == bundle.head


def test_sizes_are_the_bundles_and_height_comes_before_width(repository: Path) -> None:
    backbone, head, pair = (config(repository, model) for model in ("siamese_backbone", "siamese_head", "siamese"))
    for text in (backbone, pair):
        assert "max_batch_size: 8\n" in text
        assert "dims: [ 24, 32, 3 ]" in text
        assert "dynamic_batching { }" in text
    assert head.count("TYPE_FP32 dims: [ 16 ]") == 4  # two inputs, and their warm-up
    assert re.findall(r"batch_size: (\d+)\n  inputs", backbone) == ["1", "4", "8"]


def test_the_threshold_keeps_every_digit(bundle: Bundle, tmp_path: Path) -> None:
    threshold = 0.1 + 0.2
    write_repository(replace(bundle, manifest=replace(bundle.manifest, threshold=threshold)), tmp_path / "repository")
    text = config(tmp_path / "repository", "siamese")
    assert float(setting(text, "threshold")) == threshold
    assert setting(text, "bundle_digest") == bundle.digest


def test_tensorrt_engines_cover_all_batches_and_are_kept_by_digest(repository: Path, bundle: Bundle) -> None:
    text = config(repository, "siamese_backbone")
    assert setting(text, "precision_mode") == "FP32"
    shapes = [setting(text, f"trt_profile_{which}_shapes") for which in ("min", "opt", "max")]
    assert shapes == ["images:1x24x32x3", "images:4x24x32x3", "images:8x24x32x3"]
    assert setting(text, "trt_engine_cache_path") == f"/var/cache/siamese/{bundle.digest}"
    assert setting(text, "trt_engine_cache_prefix") == bundle.digest
    assert "KIND_GPU" not in text  # it must load without one


@pytest.mark.parametrize(
    ("precision", "mode"), [("fp32", "FP32"), ("fp16", "FP16"), ("int8-tensorrt", "INT8"), ("int8-cpu", None)]
)
def test_precision_of_the_bundle_decides_about_tensorrt(
    bundle: Bundle, tmp_path: Path, precision: str, mode: str | None
) -> None:
    write_repository(replace(bundle, manifest=replace(bundle.manifest, precision=precision)), tmp_path / "repository")
    text = config(tmp_path / "repository", "siamese_backbone")
    if mode:
        assert setting(text, "precision_mode") == mode
    else:
        assert "trt_" not in text
        assert "instance_group [ { kind: KIND_CPU } ]" in text


def test_it_is_published_complete_or_not_at_all(
    bundle: Bundle, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="exists already"):
        write_repository(bundle, repository)
    with pytest.raises(UsageError, match="parent folder does not exist"):
        write_repository(bundle, tmp_path / "absent/repository")
    monkeypatch.setattr("siamese_export.triton._pair_config", lambda bundle: 1 / 0)  # the last of three models
    with pytest.raises(ZeroDivisionError):
        write_repository(bundle, tmp_path / "repository")
    assert os.listdir(tmp_path) == []


def test_the_writer_needs_neither_torch_nor_onnx_nor_a_server() -> None:
    blocked = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "triton_python_backend_utils")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import siamese_export.triton"
    subprocess.run([sys.executable, "-c", code], check=True)


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any

    def output(self, name: str) -> list[Any]:
        assert self.status == 200, self.body
        return next(list(output["data"]) for output in self.body["outputs"] if output["name"] == name)


@dataclass(frozen=True)
class Server:
    port: int

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Answer:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v2/{path}", data, timeout=30) as response:
                return Answer(response.status, json.load(response) if response.length else {})
        except urllib.error.HTTPError as error:
            return Answer(error.code, json.loads(error.read() or b"{}"))

    def compare(self, left: Pictures, right: Pictures, model: str = "siamese") -> Answer:
        """Ask about P pairs, (P, H, W, 3) uint8 each side."""
        sides = (("left", left), ("right", right))
        inputs = [
            {"name": name, "datatype": "UINT8", "shape": side.shape, "data": side.ravel().tolist()}
            for name, side in sides
        ]
        return self.ask(f"models/{model}/infer", {"inputs": inputs})

    def states(self) -> dict[str, tuple[str, str]]:
        """(state, reason) of each model."""
        index = self.ask("repository/index", {}).body
        return {model["name"]: (model.get("state", ""), model.get("reason", "")) for model in index}


@contextlib.contextmanager
def triton_server(repository: Path, folder: Path) -> Iterator[Server]:
    """A server that has loaded, or failed to load, what is in `repository`; `folder` is for its files."""
    if not os.environ.get("SIAMESE_TRITON"):
        pytest.fail("set SIAMESE_TRITON to a venv with nvidia-pytriton==0.7.0, 'numpy<2' and onnxruntime installed")
    venv = Path(os.environ["SIAMESE_TRITON"]).absolute()
    tell = "import sysconfig as s; print(s.get_path('purelib'), s.get_config_var('LIBDIR'), s.get_python_version())"
    told = subprocess.run([f"{venv}/bin/python", "-c", tell], capture_output=True, text=True, check=True)
    site_packages, libpython, version = told.stdout.split()
    triton = Path(site_packages, "pytriton/tritonserver")
    python_backend = folder / "backends/python"
    shutil.copytree(triton / "backends/python", python_backend)
    shutil.copy(triton / "python_backend_stubs" / version / "triton_python_backend_stub", python_backend)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared_memory = f"siamese_test_{port}_"
    command = [
        triton / "bin/tritonserver", f"--model-repository={repository}", f"--backend-directory={folder / 'backends'}",
        "--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false",
        "--exit-on-error=false", f"--backend-config=python,shm-region-prefix-name={shared_memory}",
    ]  # fmt: skip
    # The server's Python processes take their packages from the first Python on the path: numpy<2 must be there.
    environment = {
        "PATH": f"{venv}/bin:{os.defpath}",
        "LD_LIBRARY_PATH": f"{Path(site_packages, 'nvidia_pytriton.libs')}:{libpython}",
    }
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        server = Server(port)
        wait_until_live(server, process, log)
        yield server
    finally:
        stop(process)
        for left_over in Path("/dev/shm").glob(f"{shared_memory}*"):  # noqa: S108  where the server keeps them
            left_over.unlink()


def wait_until_live(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Triton answers once each model has loaded or failed to."""
    end = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if server.ask("health/live").status == 200:
                return
        time.sleep(0.1)
    pytest.fail(f"tritonserver did not start (exit code {process.poll()}):\n{log.read_text(errors='replace')[-3000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(START_LIMIT_S)
    with contextlib.suppress(ProcessLookupError):  # also what the server may have left of its Python processes
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    runnable = folder / "repository"
    shutil.copytree(repository, runnable)
    for model in ("siamese_backbone", "siamese_head"):
        text = config(runnable, model)
        assert text.count('backend: "onnxruntime"') == 1
        (runnable / model / "config.pbtxt").write_text(text.replace('"onnxruntime"', '"python"'))
        (runnable / model / "1/model.py").write_text(STAND_IN)
    with triton_server(runnable, folder) as started:
        assert started.ask("health/ready").status == 200, started.states()
        yield started


@pytest.fixture
def evaluation(bundle: Bundle, pictures: Path) -> Evaluation:
    """What siamese-eval computes; its pairs.csv has the same scores, with all digits."""
    return evaluate_folder(OnnxVerifier(bundle, provider="cpu"), pictures)


@pytest.fixture
def pairs(bundle: Bundle, evaluation: Evaluation) -> tuple[Pictures, Pictures]:
    """All left and all right pictures of the evaluation's pairs, (P, H, W, 3) uint8."""
    folder = evaluation.folder
    images = np.stack([load_image(folder.absolute_path(i), bundle.manifest.preprocess) for i in range(len(folder))])
    return images[evaluation.pairs.left], images[evaluation.pairs.right]


@pytest.mark.triton
def test_scores_are_those_of_siamese_eval(
    server: Server, bundle: Bundle, evaluation: Evaluation, pairs: tuple[Pictures, Pictures]
) -> None:
    left, right = pairs
    assert len(left) == 16
    assert np.ptp(evaluation.scores) > 0.03  # otherwise equal scores would prove little
    # Requests of up to 8 pairs, the most the server takes: 16 pictures in one call, where the backbone takes 8.
    sizes = (1, 2, 5, 8)
    ends = np.cumsum(sizes)
    assert ends[-1] == len(left)
    answers = [server.compare(left[end - n : end], right[end - n : end]) for n, end in zip(sizes, ends, strict=True)]
    scores = np.concatenate([answer.output("scores") for answer in answers])
    is_same = np.concatenate([answer.output("is_same") for answer in answers])
    assert np.abs(scores - evaluation.scores).max() <= 1e-6
    assert is_same.tolist() == (evaluation.scores >= bundle.manifest.threshold).tolist()
    assert 0 < is_same.sum() < len(is_same)


@pytest.mark.triton
def test_the_documented_request_gets_an_answer(
    server: Server, bundle: Bundle, evaluation: Evaluation, tmp_path: Path
) -> None:
    page = Path(__file__).parents[2].joinpath("docs/triton.md").read_text()
    program = page.partition("<!-- tested: this program -->\n```python\n")[2].partition("```")[0]
    assert program.count("127.0.0.1:8000") == 1
    bundle.write(tmp_path / "bundle")
    folder = evaluation.folder
    for name, image in (("a.png", evaluation.pairs.left[0]), ("b.png", evaluation.pairs.right[0])):
        shutil.copy(folder.absolute_path(image), tmp_path / name)
    command = [sys.executable, "-c", program.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    (scores, score), (is_same, decision) = (line.split() for line in done.stdout.splitlines())
    expected = bool(evaluation.scores[0] >= bundle.manifest.threshold)
    assert (scores, is_same, decision) == ("scores", "is_same", f"[{expected}]")
    assert abs(float(score.strip("[]")) - evaluation.scores[0]) <= 1e-6


@pytest.mark.triton
def test_requests_in_parallel_are_mixed_and_each_gets_its_own_answer(
    server: Server, evaluation: Evaluation, pairs: tuple[Pictures, Pictures]
) -> None:
    left, right = pairs
    before = executions(server)
    sizes = [1, 3, 2, 1, 4] * 16
    starts = np.random.RandomState(0).randint(0, len(left) - 4, len(sizes))
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda start, n: server.compare(left[start:][:n], right[start:][:n]), starts, sizes))
    for answer, start, n in zip(answers, starts, sizes, strict=True):
        assert np.abs(np.array(answer.output("scores")) - evaluation.scores[start:][:n]).max() <= 1e-6
    assert executions(server) - before < len(sizes) / 2


def executions(server: Server) -> int:
    """How often the pair model's script ran; less often than it was asked where requests were put together."""
    return int(server.ask("models/siamese/stats").body["model_stats"][0]["execution_count"])


@pytest.mark.triton
def test_damage_is_an_error_of_the_request_it_concerns_and_never_a_score(
    server: Server, evaluation: Evaluation, pairs: tuple[Pictures, Pictures]
) -> None:
    left, right = pairs
    damaged = left[:2].copy()
    damaged[1] = NAN_PICTURE
    with ThreadPoolExecutor(12) as threads:  # mixed with sound ones
        bad = [threads.submit(server.compare, damaged, right[:2]) for _ in range(4)]
        good = [threads.submit(server.compare, left[k : k + 1], right[k : k + 1]) for k in range(8)]
    for future in bad:
        assert_refused(future.result(), 500, "the network gives the score nan")
    for k, future in enumerate(good):
        assert abs(future.result().output("scores")[0] - evaluation.scores[k]) <= 1e-6


@pytest.mark.triton
def test_a_failing_backbone_is_an_error_that_says_so(server: Server, pairs: tuple[Pictures, Pictures]) -> None:
    answer = server.compare(np.full_like(pairs[0][:1], FAILING_PICTURE), pairs[1][:1])
    assert_refused(answer, 500, "siamese: siamese_backbone: ", "out of memory")
    assert "model.py" not in str(answer.body)  # no stack traces for clients


@pytest.mark.triton
def test_wrong_shapes_are_refused(server: Server, pairs: tuple[Pictures, Pictures]) -> None:
    left, right = pairs
    turned = left[:1].transpose(0, 2, 1, 3)
    assert_refused(server.compare(turned, right[:1]), 400, "unexpected shape", "[-1,24,32,3]")
    assert_refused(server.compare(left[:1], right[:2]), 400, "batch size does not match")
    assert_refused(server.compare(left[:9], right[:9]), 400, "batch-size must be <= 8")


def assert_refused(answer: Answer, status: int, *words: str) -> None:
    assert answer.status == status, answer
    assert list(answer.body) == ["error"]
    for word in words:
        assert word in answer.body["error"], answer.body


def misspell(text: str) -> str:
    return text.replace("dynamic_batching", "dynamic_baching")


@pytest.mark.triton
@pytest.mark.parametrize("change", [None, misspell])
def test_the_unchanged_files_lack_nothing_but_the_backend(
    repository: Path, tmp_path: Path, change: Callable[[str], str] | None
) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy)
    if change:  # the negative control
        (copy / "siamese_backbone/config.pbtxt").write_text(change(config(copy, "siamese_backbone")))
    with triton_server(copy, tmp_path) as server:
        states = server.states()
    missing = "unable to find backend library for backend 'onnxruntime'"
    only_the_backend_is_missing = (
        states["siamese"] == ("READY", "")
        and all(missing in states[model][1] for model in ("siamese_backbone", "siamese_head") if model in states)
        and len(states) == 3
    )
    assert only_the_backend_is_missing == (change is None), states
