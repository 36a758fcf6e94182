"""`siamese COMMAND`: one file per command, imported when it is called."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from siamese_deploy.cli.command import usage_errors_on_one_line

_COMMANDS = {
    "verify": "compare two pictures: exit code 0 match, 10 no match",
    "eval": "evaluate a bundle on a folder of pictures",
    "gallery": "enrol pictures under names; find out whose a picture is",
    "prepare": "build TensorRT's engines ahead, and check that a bundle starts",
    "bench": "latency and throughput on real pictures, and whether they became worse",
    "check": "what is wrong with a data set: duplicates, leaks, damaged pictures, odd names",
    "doctor": "what is installed, which providers really start and why not",
    "cache": "show, shrink or remove the embeddings kept on disk",
    "demo_data": "draw a small data set of made-up characters",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        cmd_name = cmd_name.replace("-", "_")
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name}").main
        return command

    def make_context(self, info_name: str | None, args: list[str], **extra: Any) -> click.Context:  # type: ignore[override]
        with usage_errors_on_one_line(info_name):
            return super().make_context(info_name, args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with usage_errors_on_one_line(ctx.info_name):
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # The stock version imports every command to ask for its help line.
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(cls=_LazyGroup, name="siamese", no_args_is_help=False)
@click.version_option(package_name="siamese-toolkit", prog_name="siamese")
def main() -> None:
    """Do these two pictures show the same thing? Runs bundles made by siamese-export."""
