"""`siamese check`: what is wrong with a data set?"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from siamese_deploy.cli.command import PATH, Command
from siamese_deploy.cli.run_log import log_at_end
from siamese_deploy.errors import one_line


@click.command(cls=Command, name="check")
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--against", metavar="OTHER", type=PATH, help="A folder that should share nothing with DIR.")
@click.option(
    "--near", type=click.IntRange(0, 16), default=4, help="Bits of 64 in which near duplicates differ; 0: do not look."
)
@click.option("--strict", is_flag=True, help="Let warnings end with exit code 11 too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/check.md) and nothing else.")
@click.option("-o", "--out_path", type=PATH, help="Folder for findings.csv, findings.json and contact_sheet.png.")
def main(folder: Path, against: Path | None, near: int, strict: bool, as_json: bool, out_path: Path | None) -> None:
    """Look for what spoils training, or makes an evaluation better than it should be.

    Every picture of DIR, and of OTHER, is decoded. Exit code 0 means that there are warnings at most, 11 that there are
    errors: pictures that cannot be used, that lie in two classes, or in both folders; or no pairs to learn from.
    """
    from siamese_deploy.dataset_check.check import check_dataset
    from siamese_deploy.dataset_check.results import check_folder, json_text, report_json, report_lines, write_results
    from siamese_deploy.result_folder import refuse_inside

    for pictures in (folder, against):
        if out_path is not None and pictures is not None:
            refuse_inside(out_path, pictures)
    with check_folder(out_path) if out_path else contextlib.nullcontext():
        report = check_dataset(folder, against, near=near, show_progress=sys.stderr.isatty())
        facts = report_json(report, strict=strict, near=near)
        log_at_end(**facts["counts"], codes=facts["codes"])
        if out_path:
            from siamese_deploy.dataset_check.contact_sheet import contact_sheet

            write_results(out_path, report, facts, contact_sheet(report))
    if as_json:
        click.echo(json_text(facts), nl=False)
    else:
        for line in report_lines(report, strict=strict):
            click.echo(line)
        if out_path:
            click.echo(one_line(f"written: {out_path}/findings.csv, findings.json and contact_sheet.png"))
    if exit_code := report.exit_code(strict=strict):
        sys.exit(exit_code)
