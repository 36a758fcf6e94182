"""`--log FILE`: what a command did, one JSON object a line; docs/when-it-goes-wrong.md says what is in them.

The file is opened anew for every line, so it may be moved away meanwhile, and a line is one write to its end, so
processes may share it. Without `--log` nothing here does anything.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from siamese_deploy.errors import EnvironmentFault, SiameseError, UsageError, code_of, one_line

if TYPE_CHECKING:
    from siamese_deploy.image_folder import SkippedFile

_META = "siamese.log"
_PATIENCE = 100
_CODE_OF_EXIT = {141: "output-closed", 143: "interrupted"}


class RunLog:
    """
    Args:
        target: the file, or "-" for stderr.
        command: such as "siamese verify".

    Raises:
        UsageError, EnvironmentFault: the first line cannot be written.
    """

    def __init__(self, target: str, command: str, arguments: list[str]) -> None:
        self._target, self._command = target, command
        self._start = time.monotonic()
        self._warned = False
        self._failure: tuple[str, str, dict[str, str]] | None = None
        self.facts: dict[str, Any] = {}
        """What the last line says besides."""
        try:
            self._append(
                self._line("started", "", "", {"version": metadata.version("siamese-toolkit"), "arguments": arguments})
            )
        except OSError as error:
            raise _refusal(target, error) from error

    def write(self, event: str, code: str, message: str, fields: dict[str, Any]) -> None:
        """Whatever keeps the line from being written is said once and changes nothing else."""
        try:
            self._append(self._line(event, code, message, fields))
        except (OSError, MemoryError) as error:
            if not self._warned:
                self._warned = True
                why = error.strerror if isinstance(error, OSError) else "out of memory"
                with suppress(OSError):
                    click.echo(one_line(f"{self._target}: the log is incomplete ({why}); going on"), err=True)

    def failed(self, code: str, message: str, traceback: str = "") -> None:
        """Kept for `end`."""
        self._failure = code, message, {"traceback": traceback} if traceback else {}

    def end(self, exit_code: int) -> None:
        if self._failure is None and exit_code in _CODE_OF_EXIT:
            self.failed(_CODE_OF_EXIT[exit_code], "")
        code, message, more = self._failure or ("", "", {})
        facts = {"exit_code": exit_code, "seconds": round(time.monotonic() - self._start, 3), **self.facts, **more}
        self.write("failed" if self._failure else "finished", code, message, facts)

    def _line(self, event: str, code: str, message: str, fields: dict[str, Any]) -> str:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {"time": now, "command": self._command, "pid": os.getpid(), "event": event}
        line |= {"code": code} if code else {}
        line |= {"message": message} if message else {}
        # ASCII: names that are not UTF-8 hold lone surrogates, which os.fsencode turns back into their bytes.
        return json.dumps(line | fields, default=str)

    def _append(self, line: str) -> None:
        if self._target == "-":
            return click.echo(line, err=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(self._target, flags, 0o600)
        try:
            status = os.fstat(descriptor)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISCHR(status.st_mode)):
                raise OSError(errno.EINVAL, "no plain file", self._target)
            data = line.encode("ascii") + b"\n"
            if stat.S_ISREG(status.st_mode) and _ends_in_half_a_line(descriptor):
                data = b"\n" + data
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._target)
        finally:
            os.close(descriptor)


def _ends_in_half_a_line(descriptor: int) -> bool:
    """Left by a full disk or a power cut, it must not take the next line with it. Half of what another process is
    writing at this moment may be seen too, and is soon whole."""
    for _ in range(_PATIENCE):
        size = os.fstat(descriptor).st_size
        if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
            return False
        time.sleep(0.01)
    return True


def _refusal(target: str, error: OSError) -> SiameseError:
    message = f"--log {target}: cannot be written ({error.strerror}); nothing was done; choose another file"
    code = code_of(error, "usage")
    kind = UsageError if code in ("usage", "not-found") else EnvironmentFault
    return kind(message, code=code)


def open_log(
    command: click.Command,
    name: str | None,
    args: list[str],
    parent: click.Context | None,
    *,
    of_help: bool = False,
) -> RunLog | None:
    """The log that the arguments or $SIAMESE_LOG ask for, also where other arguments are wrong.

    Args:
        of_help: also where --help or --version are among them.

    Raises:
        UsageError, EnvironmentFault: as `RunLog`.
    """
    settings: dict[str, Any] = {
        "resilient_parsing": True,
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        **command.context_settings,
    }
    context = click.Context(command, info_name=name, parent=parent, **settings)
    options: dict[str, Any] = {}
    with suppress(click.UsageError):
        options, _, _ = command.make_parser(context).parse_args(list(args))
    help_option = command.get_help_option(context)
    if not of_help and (options.get("version") or (help_option and options.get(str(help_option.name)))):
        return None
    target = options.get("log") or os.environ.get("SIAMESE_LOG")
    return RunLog(str(target), context.command_path, list(args)) if target else None


def keep_log(context: click.Context, run_log: RunLog | None) -> None:
    context.meta[_META] = run_log


def log_of(context: click.Context) -> RunLog | None:
    run_log: RunLog | None = context.meta.get(_META)
    return run_log


@contextmanager
def end_logged(context: click.Context) -> Iterator[None]:
    run_log = log_of(context)
    exit_code = 1  # Python's own, of what nobody catches
    try:
        yield
        exit_code = 0
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else 1
        raise
    except click.exceptions.Exit as error:
        exit_code = error.exit_code
        raise
    finally:
        if run_log:
            run_log.end(exit_code)


def log(event: str, code: str = "", message: str = "", **fields: Any) -> None:
    """A line of the command that is running."""
    if run_log := _current():
        run_log.write(event, code, message, fields)


def log_at_end(**facts: Any) -> None:
    """More for the last line of the command that is running."""
    if run_log := _current():
        run_log.facts |= facts


def log_skipped(root: Path | None, files: Iterable[SkippedFile]) -> None:
    """A line for each file; `root` is what their paths are relative to."""
    if run_log := _current():
        for file in files:
            path = file.path if root is None else str(root / file.path)
            run_log.write("skipped", file.code, file.reason, {"path": path})


def warn(code: str, message: str) -> None:
    """On stderr, and in the log."""
    click.echo(one_line(message), err=True)
    log("warning", code, message)


def _current() -> RunLog | None:
    context = click.get_current_context(silent=True)
    return log_of(context) if context else None
