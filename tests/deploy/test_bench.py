from __future__ import annotations

import io
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_files
from PIL import Image

from siamese_deploy import OnnxVerifier
from siamese_deploy.bench import Row, Settings, bundle_contenders, bundles, run_benchmark
from siamese_deploy.bench.bundles import tolerance
from siamese_deploy.bench.chart import chart_png
from siamese_deploy.bench.machine import SAME_MACHINE, describe_machine
from siamese_deploy.bench.regression import compare_with, read_baseline
from siamese_deploy.bench.scenarios import STAGES, make_workload, offline, single_stream
from siamese_deploy.bench.tables import bench_content, bench_json, markdown, table_lines
from siamese_deploy.bench.timing import MOST_WINDOWS, Window, is_stable, measure, percentiles_ms
from siamese_deploy.bundle import read_bundle
from siamese_deploy.image_folder import scan_image_folder
from siamese_deploy.pairs import sample_pairs
from siamese_deploy.verifier import Embeddings, Scores

QUICK = Settings(min_seconds=0.02, gallery_rows=(10,))


def rows_of(bundle: Path, pictures: Path, settings: Settings = QUICK) -> list[Row]:
    folder = scan_image_folder(pictures)
    contenders = bundle_contenders("tiny", read_bundle(bundle), settings)
    return list(run_benchmark(contenders, folder, sample_pairs(folder), settings))


def test_percentiles_are_numpys_of_the_values_that_occurred() -> None:
    random = np.random.RandomState(3)
    for n in (1, 2, 63, 64, 65, 100, 661, 662, 663, 1000):
        durations = random.permutation(np.exp(random.normal(15, 1, n)).astype(np.int64))
        values, missing = percentiles_ms(durations)
        for percent, needed in ((50, 1), (90, 64), (99, 662)):
            name = f"p{percent}"
            if n < needed:
                assert values[name] is None
                assert missing[name] == f"too few queries ({n} of {needed})"
            else:
                assert values[name] == np.percentile(durations, percent, method="inverted_cdf") / 1e6
                assert name not in missing
    assert percentiles_ms(np.arange(1, 1001) * 10**6)[0] == {"p50": 500, "p90": 900, "p99": 990}


def windows(*latencies_ms: float) -> list[Window]:
    return [Window(value, 1000 / value) for value in latencies_ms]


def test_stable_are_three_last_windows_within_ten_per_cent() -> None:
    assert is_stable(windows(50, 10, 10.9, 10.5))
    assert not is_stable(windows(10, 10.5, 11.1))
    assert not is_stable(windows(10, 10))
    steady = windows(10, 10)
    assert not is_stable([*steady, Window(10, 80)])  # the median holds still, a spike costs the throughput
    assert not is_stable([*steady, Window(12, 100)])


def test_the_warm_up_is_not_counted_and_both_minima_are_reached() -> None:
    started: list[int] = []

    def query(number: int) -> int:
        assert number == len(started)
        started.append(number)
        return number

    answers: list[int] = []
    timing = measure(query, answers.append, min_seconds=0.01, min_queries=0)
    assert answers == started
    assert len(answers) >= len(timing.durations_ns) + 2
    assert timing.durations_ns.sum() >= 0.01e9
    started.clear()
    timing = measure(query, lambda _: None, min_seconds=0, min_queries=662)
    assert len(timing.durations_ns) >= 662


def test_what_never_becomes_stable_ends_all_the_same() -> None:
    timing = measure(lambda n: time.sleep(0.001 * (1 + n % 2 * 4)), lambda _: None, min_seconds=0)
    assert (len(timing.windows), timing.stable) == (MOST_WINDOWS, False)


def test_an_interrupt_waits_for_the_end_of_the_query_and_no_longer() -> None:
    answers: list[int] = []

    def query(number: int) -> int:
        if number == 5:
            signal.raise_signal(signal.SIGINT)
        return number

    with pytest.raises(KeyboardInterrupt):
        measure(query, answers.append, min_seconds=0.2, min_queries=100)
    assert answers == [0, 1, 2, 3, 4, 5]


def test_every_scenario_gives_the_evaluations_scores(pictures: Path, tiny_bundle: Path) -> None:
    settings = replace(QUICK, batches=(1, 3, 8), gallery_rows=(1, 10, 20_000))
    rows = rows_of(tiny_bundle, pictures, settings)
    assert [(row.scenario, row.batch) for row in rows] == [
        ("SingleStream", 2), ("MultiStream", 16), ("Offline", 1), ("Offline", 3), ("Offline", 8),
        ("cached pairs", 8192), ("identify", 1), ("identify", 10), ("identify", 20_000),
    ]  # fmt: skip
    for row in rows:
        assert row.status in ("ok", "unstable"), row
        assert row.score_difference is not None
        assert row.score_difference <= 1e-6
        assert len(row.windows) >= 3
        assert (row.pairs_per_s or 0) > 0
        assert (row.images_per_s is None) == (row.scenario in ("cached pairs", "identify"))
        if row.images_per_s:
            assert row.images_per_s == pytest.approx(2 * (row.pairs_per_s or 0))
    assert list(rows[0].stages_ms) == [*STAGES, "total"]
    assert 0 < sum(rows[0].stages_ms[name] for name in STAGES) <= 2 * rows[0].stages_ms["total"]
    assert not any(row.stages_ms for row in rows[1:])


def test_the_queries_run_through_different_pairs(pictures: Path, tiny_bundle: Path) -> None:
    verifier = OnnxVerifier(tiny_bundle, provider="cpu")
    folder = scan_image_folder(pictures)
    pairs = sample_pairs(folder)
    work = make_workload(verifier, folder, pairs)
    one, compared = single_stream(verifier, work), []
    for number in range(len(pairs)):
        left, right = (folder.absolute_path(int(side[number])) for side in (pairs.left, pairs.right))
        compared.append(verifier.compare(left, right))
        assert one(number).scores == pytest.approx(compared[-1], abs=1e-6)
    assert len(set(compared)) > len(pairs) // 2
    assert one(len(pairs)).scores == pytest.approx(compared[0], abs=1e-6)
    with ThreadPoolExecutor(1) as threads:  # an odd group splits pairs
        query = offline(verifier, work, threads, 3)
        scores = np.concatenate([query(number).scores for number in range(20)])
    np.testing.assert_allclose(scores, (compared * 2)[:30], atol=1e-6)


def doctored(n_pairs: int, error: float) -> type[OnnxVerifier]:
    """Gives other scores where it is asked for exactly so many at once; 0: where the embeddings are placed."""

    class Doctored(OnnxVerifier):
        def score(self, left: Embeddings, right: Embeddings) -> Scores:
            scores = super().score(left, right)
            return scores + np.float32(error) if len(scores) == n_pairs else scores

        def score_placed(self, left: Any, right: Any) -> Scores:
            scores = super().score_placed(left, right)
            return scores if n_pairs else scores + np.float32(error)

    return Doctored


@pytest.mark.parametrize(
    ("scenario", "n_pairs", "error"),
    [
        ("SingleStream", 1, 5e-6),
        ("SingleStream", 1, float("nan")),
        ("MultiStream", 8, 5e-6),
        ("Offline", 2, 5e-6),  # one thread: 4 pictures a group
        ("cached pairs", 8192, 5e-6),
        ("identify", 0, 5e-6),
    ],
)
def test_a_timed_run_with_other_scores_is_worth_nothing(
    scenario: str, n_pairs: int, error: float, pictures: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "OnnxVerifier", doctored(n_pairs, error))
    rows = rows_of(tiny_bundle, pictures, replace(QUICK, min_seconds=0, threads=1))
    (row,) = (row for row in rows if row.status == "wrong")
    assert row.scenario == scenario
    assert "scores differ from the evaluation's by up to" in row.reason
    assert (row.queries, row.latency_ms, row.pairs_per_s, row.windows) == (0, {}, None, ())
    assert all(other.status in ("ok", "unstable") for other in rows if other is not row)


def test_only_rounding_is_tolerated(tiny_bundle: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    assert tolerance(bundle, "cpu") == 1e-6
    assert tolerance(bundle, "cuda") == 1e-2
    assert tolerance(replace(bundle, manifest=replace(bundle.manifest, precision="int8-cpu")), "cpu") == 1e-2


def test_unreadable_pictures_are_left_out_and_none_is_a_reason(pictures: Path, tiny_bundle: Path) -> None:
    write_files(pictures, {"apple/broken.png": b"no picture"})
    assert {row.status for row in rows_of(tiny_bundle, pictures)} <= {"ok", "unstable"}
    for file in pictures.glob("*/*.png"):
        file.write_bytes(b"no picture")
    (row,) = rows_of(tiny_bundle, pictures)
    assert (row.scenario, row.status) == ("all", "failed")
    assert "none of 17 pictures can be read" in row.reason


def test_a_planted_slowdown_is_seen_at_its_size(pictures: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    machine = describe_machine(None, with_gpu=False)
    rows = rows_of(tiny_bundle, pictures)
    content = bench_content(rows, QUICK, machine, {"pair_digest": "x"}, complete=True)
    (tmp_path / "bench.json").write_bytes(bench_json(content))
    baseline = read_baseline(tmp_path / "bench.json")
    for slower in (1, 1.2, 0.8, 1.05):
        changed = [
            replace(row, windows=tuple(Window(w.p50_ms * slower, w.queries_per_s / slower) for w in row.windows))
            for row in rows
        ]
        changes = compare_with(baseline, changed)
        assert [change.row.scenario for change in changes] == ["SingleStream", "MultiStream", "Offline"]
        assert [change.more for change in changes] == pytest.approx([slower - 1] * 3, abs=1e-4)
    lost = Row("tiny", rows[0].bundle_digest, "fp32", "cpu", "all", 0, "failed", "no driver")
    (change,) = compare_with(baseline, [lost])
    assert change.more == float("inf")
    assert "no driver" in change.line()


def test_machine_facts_come_from_the_system(tmp_path: Path) -> None:
    clock = "sys/devices/system/cpu/cpu0/cpufreq/"
    write_files(
        tmp_path,
        {
            "proc/cpuinfo": b"processor\t: 0\nmodel name\t: Some CPU @ 1 GHz\nmodel name\t: Other\n",
            f"{clock}scaling_governor": b"schedutil\n",
            f"{clock}scaling_cur_freq": b"1510400\n",
            f"{clock}scaling_max_freq": b"nonsense\n",
            "var/lib/nvpmodel/status": b"pmode:0002\n",
        },
    )
    facts = describe_machine(3, with_gpu=False, root=tmp_path)
    assert set(SAME_MACHINE) <= set(facts)
    expected = {
        "cpu": "Some CPU @ 1 GHz", "threads": 3, "governor": "schedutil", "clock_mhz": 1510, "clock_most_mhz": None,
        "power_mode": "pmode:0002", "gpu": None,
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    assert facts["date_utc"].endswith("+00:00")
    write_files(tmp_path, {"proc/cpuinfo": b"processor: 0\n", "proc/device-tree/model": b"NVIDIA Jetson Orin\0"})
    assert describe_machine(None, with_gpu=False, root=tmp_path)["cpu"] == "NVIDIA Jetson Orin"


def made_row(bundle: str, latency_ms: float, pairs_per_s: float, scenario: str = "SingleStream") -> Row:
    latency: dict[str, float | None] = {"p50": latency_ms, "p90": None, "p99": None}
    return Row(bundle, "0" * 64, "fp32", "cpu", scenario, 2, "ok", latency_ms=latency, pairs_per_s=pairs_per_s)


HOSTILE = "a|b\n# <img src=x>\x1b[31m\udcff[l](u)" + "x" * 400


def test_hostile_names_stay_on_their_line_and_in_their_cell() -> None:
    rows = [made_row(HOSTILE, 3, 10), Row(HOSTILE, "0" * 64, "fp32", "cuda", "all", 0, "failed", HOSTILE)]
    lines = table_lines(rows)
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    text = markdown(rows, describe_machine(None, with_gpu=False), complete=False)
    table = [line for line in text.splitlines() if line.startswith("| a\\|")]
    assert len(table) == 2
    for line in table:
        assert len(line.replace("\\|", "").split("|")) == 12 + 2
        assert "<img" not in line.replace("\\<", "")
        assert line.isprintable()
    assert "Incomplete" in text
    assert json.loads(bench_json({"name": HOSTILE})) == {"name": HOSTILE}
    assert Image.open(io.BytesIO(chart_png(rows))).size == (960, 600)


def test_the_chart_has_a_mark_for_each_row_that_worked() -> None:
    def marks(rows: list[Row]) -> int:
        picture = np.asarray(Image.open(io.BytesIO(chart_png(rows))).convert("RGB"))[60:536, 94:656].astype(int)
        return int((picture.max(axis=2) - picture.min(axis=2) > 60).sum())

    one = [made_row("one", 3, 10)]
    assert marks([]) == marks([made_row("one", 3, 10, "identify")]) == 0
    assert marks(one) > 50
    many = [made_row(f"bundle {k}", 10.0**k, 10.0 ** (3 - k), "Offline") for k in range(-3, 20)]
    assert marks(many) > 10 * 20
