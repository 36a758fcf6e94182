"""`siamese doctor`: does it work here, and if not, why not?"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from siamese_deploy.cli.command import PATH, Command
from siamese_deploy.cli.run_log import log_at_end
from siamese_deploy.errors import one_line
from siamese_deploy.providers import CHOICES


@click.command(cls=Command, name="doctor")
@click.argument("bundle", type=PATH, required=False)
@click.option("--provider", type=click.Choice(CHOICES), default="auto", help="The provider that has to work.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/doctor.md) and nothing else.")
def main(bundle: Path | None, provider: str, as_json: bool) -> None:
    """Report what is installed, which providers really start and why the others do not.

    A provider works when a small graph gives the right numbers on it, with BUNDLE when that bundle's golden check
    passes. Exit code 0 means that the provider asked for works (auto: one of those it tries), 5 that it does not.
    """
    import json

    from siamese_deploy.doctor import examine

    def progress(line: str) -> None:
        if sys.stderr.isatty():
            click.echo(line, err=True)

    diagnosis = examine(provider, bundle, progress)
    log_at_end(verdict=diagnosis.verdict)
    if as_json:
        click.echo(json.dumps(diagnosis.to_json(), indent=2))
    else:
        width = max(len(finding.code) for finding in diagnosis.findings)
        for finding in diagnosis.findings:
            level = "" if finding.level == "ok" else finding.level
            click.echo(one_line(f"{level:<9}{finding.code:<{width}}  {finding.message}"))
            if finding.remedy:
                click.echo(one_line(f"{'':<9}{'':<{width}}  -> {finding.remedy}"))
        click.echo(one_line(f"verdict: {diagnosis.verdict}"))
    if diagnosis.exit_code:
        sys.exit(diagnosis.exit_code)
