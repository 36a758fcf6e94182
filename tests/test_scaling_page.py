"""docs/scaling.md shows what benchmarks/scaling.json gives, and the arithmetic between them is right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import RunCommand

from siamese_deploy.cli import main as siamese

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scaling.md"
FIGURES = ROOT / "benchmarks" / "scaling.json"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_the_page_shows_what_the_figures_give() -> None:
    from scaling_plan import blocks_of, differing

    figures = json.loads(FIGURES.read_text())
    assert not figures["measured"]["quick"]
    assert differing(PAGE.read_text("utf-8"), blocks_of(figures)) == []


def test_every_figure_on_the_page_and_in_the_file_is_held(tmp_path: Path) -> None:
    def checked(page: str, figures: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "page.md").write_text(page, "utf-8")
        (tmp_path / "scaling.json").write_text(figures)
        options = ["--figures", tmp_path / "scaling.json", "--check", tmp_path / "page.md"]
        script = [sys.executable, ROOT / "benchmarks/scaling.py", "plan", *options]
        return subprocess.run(list(map(str, script)), capture_output=True, text=True)

    page, figures = PAGE.read_text("utf-8"), FIGURES.read_text()
    assert checked(page, figures).returncode == 0
    start, end = (page.index(text) for text in ("<!-- computed: identify -->", "<!-- computed: limits -->"))
    number = re.search(r"\d\.\d+", page[start:end])
    assert number
    wrong = page[: start + number.start()] + "9.87" + page[start + number.end() :]
    done = checked(wrong, figures)
    assert (done.returncode, "page.md: identify: not what scaling.json gives" in done.stderr) == (1, True)
    changed = json.loads(figures)
    changed["constants"]["us_per_row"] *= 1.5
    done = checked(page, json.dumps(changed))
    assert done.returncode == 1
    assert "constants, identify, limits" in done.stderr
    done = checked(page.replace("<!-- computed: storage -->", ""), figures)
    assert (done.returncode, "storage" in done.stderr) == (1, True)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_a_known_power_is_found(exponent: float) -> None:
    from scaling_fit import fitted_time

    sizes = [10.0**k for k in range(1, 8)]
    noise = 1 + 0.02 * np.random.default_rng(0).standard_normal(len(sizes))
    fit = fitted_time(sizes, [3e-6 * n**exponent * x for n, x in zip(sizes, noise, strict=True)])
    assert fit.exponent == pytest.approx(exponent, abs=0.02)
    assert fit.error < 0.02


def test_fixed_costs_are_told_from_what_grows() -> None:
    from scaling_fit import fitted_memory, fitted_time

    sizes = [10.0**k for k in range(2, 8)]
    fit = fitted_time(sizes, [0.05 + 2e-6 * n for n in sizes])
    assert (fit.constant, fit.slope) == pytest.approx((0.05, 2e-6))
    assert fit.exponent == pytest.approx(1, abs=0.06)  # over all sizes together it would be 0.5
    assert fit.first == 1e5
    memory = fitted_memory(sizes, [250 + 4e-4 * n for n in sizes])
    assert memory
    assert (memory.constant, memory.slope) == pytest.approx((250, 4e-4))
    assert memory.exponent == pytest.approx(1)
    assert fitted_memory(sizes, [250, 251, 249, 252, 250, 253]) is None  # noise is no growth


def test_the_plan_multiplies_what_was_measured() -> None:
    """By hand, at costs that can be reckoned in the head."""
    from scaling_plan import candidates, embedding, identify, largest, pairs, storage

    c = {
        "backbone_ms_per_image": 10.0, "decode_ms_per_image": 4.0, "picture_side": 1024, "picture_bytes": 100_000,
        "cache_us_per_image": 10.0, "embedding_dim": 1000, "row_bytes_disk": 4100, "cache_bytes_per_image": 4500,
        "memory_bytes_per_row": 40, "memory_bytes_per_pair": 20, "us_per_pair": 5.0, "us_per_row": 5.0,
        "first_us_per_row": 7.0, "one_image_ms": 10.0,
    }  # fmt: skip

    def cells(text: str, name: str) -> list[str]:
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {name}"))
        return [cell.strip() for cell in line.strip("|").split("|")][1:]

    text = embedding({"cores": 2}, c)  # 10 ms + 4 ms / 2 cores = 12 ms
    assert cells(text, "one machine like this") == ["3.33 h", "13.9 days", "3.8 years"]
    assert cells(text, "such machines for one day") == ["1", "14", "1,400"]
    assert cells(text, "pictures on the disk") == ["100 GB", "10 TB", "1 PB"]
    text = storage(c)
    assert cells(text, "float32, 1,000 numbers") == ["4 GB", "400 GB", "40 TB"]
    assert cells(text, "HNSW graph of 32 links") == ["4.26 GB", "426 GB", "42.6 TB"]
    assert cells(text, "machines of 256 GB (assumed) that hold in memory: float32, 1,000") == ["1", "2", "160"]
    text = pairs(c)
    assert cells(text, "pairs") == ["5 x 10^11", "5 x 10^15", "5 x 10^19"]
    assert cells(text, "one machine like this")[:2] == ["28.9 days", "792 years"]
    assert cells(text, "a list of 100 pairs") == ["8.33 min", "13.9 h", "57.9 days"]
    text = identify(c)  # 10^6 rows: 5 s to score, 4 GB to read
    assert cells(text, "10^6") == ["5 s", "5 s", "7 s", "4 GB", "5"]
    assert cells(candidates(c), "1,000") == ["10 ms", "10 ms", "5 ms", "25 ms"]
    for n in (2, 1000, 10**6):
        assert largest(n * (n - 1) / 2) == pytest.approx(n)


def test_durations_name_the_largest_unit_of_which_there_is_one() -> None:
    from scaling_fit import duration

    seconds = (5e-7, 0.0123, 59.94, 3600, 86400 * 365.25 * 792, 1e16)
    shown = ["500 ns", "12.3 ms", "59.9 s", "1 h", "792 years", "3.2 x 10^8 years"]
    assert [duration(value) for value in seconds] == shown


def test_numbers_are_rounded_to_the_safe_side() -> None:
    from scaling_plan import count, scientific, size

    assert [count(n) for n in (0.2, 1, 1.01, 99.5, 101, 1_234, 12_345_678)] == [
        "1", "1", "2", "100", "110", "1,300", "1.3 x 10^7",
    ]  # fmt: skip
    assert [count(n, down=True) for n in (1.9, 199, 1_299)] == ["1", "190", "1,200"]
    assert [scientific(n) for n in (10**4, 25_000, 10**10)] == ["10^4", "2.5 x 10^4", "10^10"]
    assert [size(n) for n in (999, 4e9, 1.5e13)] == ["999 B", "4 GB", "15 TB"]


def test_the_program_gives_the_gallerys_answer(
    run: RunCommand, pictures: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    (program,) = re.findall(r"<!-- tested: [^>]*-->\n```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    who = pictures / "cog/2.png"
    (tmp_path / "who.png").write_bytes(who.read_bytes())
    who.unlink()
    for command in (("enrol", "gallery", pictures, "-c", tiny_bundle), ("export", "gallery", "exported")):
        arguments = [tmp_path / part if part in ("gallery", "exported") else part for part in command]
        assert run(siamese, "gallery", *arguments).exit_code == 0
    expected = run(
        siamese, "gallery", "identify", tmp_path / "gallery", tmp_path / "who.png", "-c", tiny_bundle, "--json"
    )
    first = json.loads(expected.stdout)["candidates"][0]
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, score, *_ = done.stdout.split()
    assert (name, score) == (first["name"], f"{first['score']:.4f}")
