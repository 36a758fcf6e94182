"""`siamese COMMAND`: one file per command, imported when it is called."""

from __future__ import annotations

from importlib import import_module

import click

_COMMANDS = {
    "eval": "evaluate a bundle on a folder of pictures",
    "demo_data": "draw a small data set of made-up characters",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name}").main
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # The stock version imports every command to ask for its help line.
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(cls=_LazyGroup, name="siamese")
@click.version_option(package_name="siamese-toolkit", prog_name="siamese")
def main() -> None:
    """Do these two pictures show the same thing? Runs bundles made by siamese-export."""
