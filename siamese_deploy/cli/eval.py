"""`siamese-eval`, also `siamese eval`: a bundle on a folder of pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from siamese_deploy.cli.command import Command
from siamese_deploy.cli.evaluation_options import EvaluationOptions, evaluation_options
from siamese_deploy.cli.run_log import log_at_end, log_skipped, warn
from siamese_deploy.cli.runtime_options import RuntimeOptions, describe, report_cache, runtime_options
from siamese_deploy.errors import one_line

if TYPE_CHECKING:
    from siamese_deploy.comparison import Comparison
    from siamese_deploy.embedding_cache import EmbeddingCache
    from siamese_deploy.evaluate import Evaluation
    from siamese_deploy.metrics.bootstrap import Replicates
    from siamese_deploy.verifier import Verifier


@click.command(cls=Command, name="eval")
@evaluation_options
@runtime_options
def main(options: EvaluationOptions, runtime: RuntimeOptions) -> None:
    """Evaluate a bundle with ONNX Runtime: report.html, metrics.json, pairs.csv and one picture per pair."""
    cache = runtime.open_cache()

    def open_verifier(runtime: RuntimeOptions = runtime) -> Verifier:
        verifier = runtime.open_verifier(cache, throughput=True)
        click.echo(describe(verifier))
        return verifier

    def open_other(bundle: Path) -> Verifier:
        return open_verifier(replace(runtime, bundle=bundle, expect_digest=None))

    evaluate_into(open_verifier, open_other, options, cache=cache)
    report_cache(cache)


def evaluate_into(
    open_verifier: Callable[[], Verifier],
    open_bundle: Callable[[Path], Verifier],
    options: EvaluationOptions,
    *,
    cache: EmbeddingCache | None = None,
) -> None:
    """Evaluate, write the report into the output folder and print the summary; shared with siamese-train-eval."""
    from siamese_deploy.evaluate import evaluate_pairs, resample
    from siamese_deploy.metrics_file import metrics_content
    from siamese_deploy.pair_drawing import PairDrawing
    from siamese_deploy.report import write_report
    from siamese_deploy.result_folder import refuse_inside, result_folder

    refuse_inside(options.out_path, options.val_path)
    options.check_earlier()
    show_progress = sys.stderr.isatty()
    with result_folder(options.out_path) as staging:
        folder, pairs, scheme = options.choose_pairs()
        verifier = open_verifier()
        with PairDrawing(staging, folder, pairs, verifier, options.images) as drawing:
            evaluation = evaluate_pairs(
                verifier,
                folder,
                pairs,
                strict=options.strict,
                cache=cache,
                after_batch=drawing.draw_early,
                show_progress=show_progress,
            )
            spread = resample(evaluation, show_progress=show_progress)
            content = metrics_content(evaluation, spread, verifier, pair_scheme=scheme, seed=options.seed_of(scheme))
            other = options.compare
            comparison = _compare(other, evaluation, spread, open_bundle, cache) if other else None
            write_report(staging, evaluation, content, comparison)
            drawn = drawing.finish(evaluation, show_progress=show_progress)
    _print_summary(evaluation, options, scheme, drawn)
    for line in comparison.table() if comparison else []:
        click.echo(line)
    options.enforce(evaluation.metrics, comparison)


def _compare(
    path: Path,
    evaluation: Evaluation,
    spread: Replicates,
    open_bundle: Callable[[Path], Verifier],
    cache: EmbeddingCache | None,
) -> Comparison:
    from siamese_deploy.comparison import compare, read_earlier
    from siamese_deploy.evaluate import evaluate_pairs

    if (path / "manifest.json").is_file():
        other = open_bundle(path)
        # The very pairs that were scored, so that a picture which one decoder size cannot use is out for both.
        earlier = evaluate_pairs(other, evaluation.folder, evaluation.pairs, cache=cache)
        digest = other.model_digest
    else:
        earlier, digest = read_earlier(path, evaluation)
    return compare(earlier, evaluation, digest, spread)


def _print_summary(evaluation: Evaluation, options: EvaluationOptions, scheme: str, drawn: int) -> None:
    from siamese_deploy.dataset_check.quick import quick_line
    from siamese_deploy.metrics import different_pairs_needed

    metrics, out_path = evaluation.metrics, options.out_path
    if scheme != "file" and (line := quick_line(evaluation.folder)):  # of a list, the folder is only a part
        warn("data-set", line)
    log_skipped(evaluation.folder.root, evaluation.skipped)
    log_at_end(
        out_path=str(out_path),
        pairs=metrics.pairs,
        pairs_skipped=evaluation.pairs_skipped,
        files_skipped=len(evaluation.skipped),
        pair_digest=evaluation.pair_digest,
    )
    if evaluation.skipped:
        first = evaluation.skipped[0]
        click.echo(
            one_line(
                f"skipped {len(evaluation.skipped)} files and {evaluation.pairs_skipped} pairs "
                f"(first: {first.path}: {first.reason}); see {out_path / 'skipped.csv'}"
            ),
            err=True,
        )
    different = metrics.pairs - metrics.same_pairs
    too_few = {f"tar_at_far/{far:g}" for far in metrics.tar_at_far if different < different_pairs_needed(far)}
    names_of: dict[str, list[str]] = {}
    for name, reason in metrics.not_computed.items():
        if name not in too_few:  # said below
            names_of.setdefault(reason, []).append(name)
    for reason, names in names_of.items():
        warn("not-computed", f"not computed: {', '.join(names)}: {reason}")
    seed = options.seed_of(scheme)
    drawn_from = f"{scheme}" if seed is None else f"{scheme}, seed {seed}"
    click.echo(f"pairs: {metrics.pairs} ({metrics.same_pairs} same), {drawn_from}")
    click.echo(f"pair digest: {evaluation.pair_digest}")
    equal = metrics.equal_error_rate
    click.echo(
        f"loss: {metrics.loss:.4f}  accuracy: {metrics.accuracy:.4f}  ROC AUC: {_shown(metrics.roc_auc)}  "
        f"equal error rate: {_shown(equal.rate if equal else None)}"
    )
    rates = []
    for far, point in metrics.tar_at_far.items():
        missing = "too few pairs" if f"tar_at_far/{far:g}" in too_few else "undefined"
        rates.append(f"{far:g}: {point.tar:.4f}" if point else f"{far:g}: {missing}")
    click.echo(f"true accept rate at false accept rate  {'  '.join(rates)}")
    click.echo(one_line(f"written: {out_path}/report.html, metrics.json, pairs.csv and {drawn} pair pictures"))


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
