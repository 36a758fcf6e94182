"""What the evaluation promises, measured.

    python evaluation.py              everything
    python evaluation.py scoring      every pair of Omniglot's validation pictures, against the bare head
    python evaluation.py streaming    metrics of 10^8 scores in bounded memory

Figures are asserted before they are printed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist

import click
import numpy as np

from siamese_deploy.metrics import VerificationMetrics, metrics_of_counts
from siamese_deploy.metrics.score_counts import ScoreCounts, ScoreHistogram

SCORES = 10**8
SUBSET = 10**7
CHUNK = 10**6
SAME_SHARE = 0.05
SHIFT = 2.5
"""Scores are 1 / (1 + exp(-(3 x - 4))) of a normal x, with mean 0 for different and SHIFT for same pairs."""
THRESHOLD = 0.385


@click.command()
@click.argument("which", nargs=-1, type=click.Choice(["scoring", "streaming"]))
@click.option("--child", type=int, hidden=True, help="Stream so many scores and print what was found.")
def main(which: tuple[str, ...], child: int | None) -> None:
    if child is not None:
        print(json.dumps(streamed(child)))
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"numpy {np.__version__}", time.strftime("%Y-%m-%d"))
    if not which or "scoring" in which:
        scoring()
    if not which or "streaming" in which:
        streaming()


def scoring() -> None:
    """Embeddings -> scores and figures of all 303,810 pairs, against the head alone on the same chunks laid out before;
    and the peak memory of the whole command.
    """
    from runtime import make_bundle
    from training import omniglot

    from siamese_deploy import OnnxVerifier
    from siamese_deploy.embedding import SCORE_CHUNK_PAIRS, embed_images
    from siamese_deploy.evaluate import evaluate_embedded
    from siamese_deploy.image_folder import scan_image_folder
    from siamese_deploy.pairs import every_pair

    pictures = omniglot() / "val"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/xdg"
        bundle = make_bundle(Path(folder))
        verifier = OnnxVerifier(bundle, provider="cpu")
        images = scan_image_folder(pictures)
        pairs = every_pair(images)
        embeddings = embed_images(verifier, images, pairs.unique_images())
        run_head, vectors = verifier._head.run, embeddings.vectors
        # One copy of the chunk after the other in the same place, as much memory as the bare runs would have at hand.
        left, right = (np.empty((SCORE_CHUNK_PAIRS, vectors.shape[1]), np.float32) for _ in range(2))
        bare_s = 0.0

        def bare() -> np.ndarray:
            nonlocal bare_s
            parts, bare_s = [], 0.0
            for chunk in pairs.chunks(SCORE_CHUNK_PAIRS):
                sides = {"left": left[: len(chunk)], "right": right[: len(chunk)]}
                sides["left"][:], sides["right"][:] = vectors[chunk.left], vectors[chunk.right]
                started_s = time.perf_counter()
                parts.append(run_head(None, sides)[0][:, 0])
                bare_s += time.perf_counter() - started_s
            return np.concatenate(parts)

        scores_s, ours_s, bares_s = [], [], []
        for _ in range(7):
            expected = bare()
            bares_s.append(bare_s)
            started_s = time.perf_counter()
            evaluation = evaluate_embedded(verifier, images, pairs, embeddings)
            ours_s.append(time.perf_counter() - started_s)
            scores_s.append(evaluation.score_s)
            assert np.array_equal(evaluation.scores, expected)
        ours, alone, base = (statistics.median(times) for times in (ours_s, scores_s, bares_s))
        print("| all pairs | seconds | against the bare head |\n| --- | --- | --- |")
        print(f"| bare head, {len(pairs):,} pairs | {base:.2f} | |")
        print(f"| scoring | {alone:.2f} | {alone / base:.2f} |")
        print(f"| scoring, figures and digest | {ours:.2f} | {ours / base:.2f} |")
        siamese = Path(sys.executable).with_name("siamese-eval")
        command = [siamese, "-v", pictures, "-o", f"{folder}/out", "-c", bundle, "--pairs", "all", "--provider", "cpu"]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, command)], check=True, capture_output=True, text=True
        )
        peak = int(done.stdout.splitlines()[-1])
        print(f"| peak memory of siamese-eval --pairs all | {peak} MiB | |")
        assert alone <= 1.3 * base, (alone, base)
        assert peak < 700, peak


PEAK = """
import re, sys
from siamese_deploy.cli.eval import main
sys.argv = sys.argv[1:]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""


def streaming() -> None:
    """Time and peak memory of a process that streams SCORES; its figures against the distribution that they are drawn
    from, and those of SUBSET of them against the exact ones.
    """
    large, small = (stream_in_a_process(number) for number in (SCORES, SUBSET))
    exact = figures(metrics_of_counts(exact_counts(SUBSET), threshold=THRESHOLD))
    print(f"| figure | 10^{math.log10(SUBSET):g} streaming | exact | difference | stated bound |")
    print("| --- | --- | --- | --- | --- |")
    for name, value in exact.items():
        found, bound = small["figures"][name], small["bounds"][name]
        assert abs(found - value) <= bound + 1e-9, name
        print(f"| {name} | {found:.8f} | {value:.8f} | {abs(found - value):.1e} | {bound:.1e} |")
    print(f"\n| figure | 10^{math.log10(SCORES):g} streaming | of the distribution | difference | stated bound |")
    print("| --- | --- | --- | --- | --- |")
    for name, (value, deviation) in of_the_distribution(SCORES).items():
        found, bound = large["figures"][name], large["bounds"][name]
        assert abs(found - value) <= 5 * deviation + bound, (name, found, value)
        print(f"| {name} | {found:.6f} | {value:.6f} | {abs(found - value):.1e} | {bound:.1e} |")
    assert max(large["bounds"].values()) < 1e-3
    print("\n| scores | peak memory | before the first | histogram | metrics |\n| --- | --- | --- | --- | --- |")
    for number, run in ((SUBSET, small), (SCORES, large)):
        print(
            f"| {number:,} | {run['peak_mib']} MiB | {run['idle_mib']} MiB | {run['histogram_s']:.1f} s "
            f"({run['histogram_s'] / number * 1e9:.0f} ns a score) | {run['metrics_s']:.2f} s |"
        )
    assert large["peak_mib"] < 400, large
    assert large["peak_mib"] <= small["peak_mib"] + 50, (small, large)


def stream_in_a_process(number: int) -> dict[str, dict[str, float]]:
    command = [sys.executable, str(Path(__file__)), "--child", str(number)]
    result: dict[str, dict[str, float]] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return result


def streamed(number: int) -> dict[str, object]:
    idle_mib, histogram, histogram_s = peak_mib(), ScoreHistogram(), 0.0
    for scores, is_same in drawn(number):
        started_s = time.perf_counter()
        histogram.add(scores, is_same)
        histogram_s += time.perf_counter() - started_s
    started_s = time.perf_counter()
    metrics = metrics_of_counts(histogram.counts(), threshold=THRESHOLD)
    return {
        "figures": figures(metrics),
        "bounds": metrics.bounds,
        "histogram_s": histogram_s,
        "metrics_s": time.perf_counter() - started_s,
        "idle_mib": idle_mib,
        "peak_mib": peak_mib(),
    }


def drawn(number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same first scores whatever the number."""
    random = np.random.default_rng(0)
    for first in range(0, number, CHUNK):
        size = min(CHUNK, number - first)
        is_same = random.random(size, np.float32) < SAME_SHARE
        x = random.standard_normal(size, np.float32) + np.float32(SHIFT) * is_same
        yield 1 / (1 + np.exp(4 - 3 * x)), is_same


def exact_counts(number: int) -> ScoreCounts:
    chunks = list(drawn(number))
    return ScoreCounts.of(np.concatenate([c[0] for c in chunks]), np.concatenate([c[1] for c in chunks]))


def figures(metrics: VerificationMetrics) -> dict[str, float]:
    """Under the names of `bounds`."""
    decisions, equal = metrics.at_threshold, metrics.equal_error_rate
    assert equal
    found = {
        "loss": metrics.loss,
        "accuracy": metrics.accuracy,
        "best_accuracy": metrics.best_accuracy.accuracy,
        "roc_auc": metrics.roc_auc,
        "average_precision": metrics.average_precision,
        "eer": equal.rate,
        "calibration/brier": metrics.calibration.brier,
        "calibration/ece": metrics.calibration.expected_calibration_error,
        **{f"tar_at_far/{far:g}": point and point.tar for far, point in metrics.tar_at_far.items()},
        **{f"at_threshold/{n}": getattr(decisions, n) for n in ("accuracy", "precision", "recall", "f1", "mcc", "far")},
    }
    assert set(found) == set(metrics.bounds) or not metrics.bounds
    return {name: value for name, value in found.items() if value is not None}


def of_the_distribution(number: int) -> dict[str, tuple[float, float]]:
    """Name -> what an endless sample would give, and the standard deviation of a sample's."""
    normal = NormalDist()
    same = number * SAME_SHARE
    expected = {
        "roc_auc": normal.cdf(SHIFT / math.sqrt(2)),
        "eer": normal.cdf(-SHIFT / 2),
        "at_threshold/recall": normal.cdf(SHIFT - x_of(THRESHOLD)),
        "at_threshold/far": normal.cdf(-x_of(THRESHOLD)),
    }
    expected |= {f"tar_at_far/{far:g}": normal.cdf(SHIFT + normal.inv_cdf(far)) for far in (0.1, 0.01, 0.001, 0.0001)}
    deviations = {name: 0.5 / math.sqrt(same) for name in expected}  # at most, of a share of the same pairs
    # The false accepts that set the threshold vary too: by the slope of TAR over the FAR.
    for far in (0.1, 0.01, 0.001, 0.0001):
        z = normal.inv_cdf(far)
        slope = normal.pdf(SHIFT + z) / normal.pdf(z)
        deviations[f"tar_at_far/{far:g}"] += slope * math.sqrt(far / (number - same))
    return {name: (value, deviations[name]) for name, value in expected.items()}


def x_of(score: float) -> float:
    return (math.log(score / (1 - score)) + 4) / 3


def peak_mib() -> int:
    status = Path("/proc/self/status").read_text()  # unlike ru_maxrss, without what the parent had
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) // 1024


if __name__ == "__main__":
    main()
