"""What every command shares: exit codes, one-line errors, --debug, and the reference scripts' spelling of options."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click

from siamese_deploy.cli.run_log import RunLog, end_logged, keep_log, log_of, open_log
from siamese_deploy.errors import SiameseError, UsageError, code_of, one_line


class _Path(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) == "":  # an unset variable of a script; pathlib takes it for the current folder
            self.fail("is empty; expected a path", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path, readable=False)  # click would call a missing permission wrong usage
SEED = click.IntRange(0, 2**32 - 1)

# Disk, permission, descriptors and memory: the environment's fault, not the user's and not ours.
_ENVIRONMENT_ERRNO = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO,
    errno.ENOMEM, errno.ESTALE, errno.EFBIG,
}  # fmt: skip


class Command(click.Command):
    """A click command that ends with the project's exit codes and one line on stderr.

    Options are declared with underscores, as the reference scripts spell them, and accepted with hyphens too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", {})
        kwargs["context_settings"] |= {
            "token_normalize_func": lambda token: token.replace("-", "_"),
            "help_option_names": ["-h", "--help"],
            "show_default": True,
        }
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(
                ["--log"],
                metavar="FILE",
                expose_value=False,
                callback=_log_named,
                help="Append what happens to FILE, one JSON object a line (docs/when-it-goes-wrong.md); - is stderr.  "
                "[default: $SIAMESE_LOG]",
            ),
            click.Option(["--debug"], is_flag=True, expose_value=False, callback=_debug, help="Show tracebacks."),
            click.Option(
                ["--version"],
                is_flag=True,
                expose_value=False,
                is_eager=True,
                callback=_version,
                help="Show the version.",
            ),
        ]

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        run_log = _opened_log(self, info_name, args, parent)
        with usage_errors_on_one_line(info_name, run_log):
            context = super().make_context(info_name, args, parent, **extra)
        keep_log(context, run_log)
        return context

    def invoke(self, ctx: click.Context) -> Any:
        with end_logged(ctx):
            return self._invoke(ctx)

    def _invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, _terminated)
        # Pillow warns of what is refused or repaired here anyway, on two lines and from the middle of a progress bar.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            return super().invoke(ctx)
        except (SystemExit, click.exceptions.Exit) as error:
            if error.code if isinstance(error, SystemExit) else error.exit_code:
                raise
            # A command ends well by coming to its end: exit code 0 is an answer, and no library's to give.
            _fail(ctx, _Failure("internal error: ended before it was done; this is a bug, please report it"))
        except BrokenPipeError:  # the reader of our output went away (`| head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except BaseException as error:  # also what is no Exception, such as a panic of a library written in Rust
            _fail(ctx, _failure_of(error))


class _Failure(NamedTuple):
    message: str
    exit_code: int = 70
    code: str = "internal-error"


def _failure_of(error: BaseException) -> _Failure:
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        return _Failure("interrupted", 130, "interrupted")
    if isinstance(error, SiameseError):
        return _Failure(text, error.exit_code, error.code)
    if isinstance(error, MemoryError):
        return _Failure("out of memory; use smaller pictures or batches", 5, "out-of-memory")
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT_ERRNO:
        return _Failure(f"{error.filename or 'output'}: {error.strerror}", 5, code_of(error, "environment"))
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return _Failure(f"{error.filename}: {error.strerror}", 2, UsageError.code)
    if isinstance(error, ImportError) and ".so" in text:  # no memory or no descriptor left for a library
        advice = "free memory, or install its package again"
        return _Failure(f"a library cannot be loaded: {error}; {advice}", 5, "library-broken")
    if isinstance(error, RuntimeError) and text == "can't start new thread":
        advice = "allow more memory or processes (ulimit -v, -u)"
        return _Failure(f"no further thread can be started; {advice}", 5, "out-of-threads")
    # What follows is torch's, known by name and text because torch may be absent.
    if text.startswith("DataLoader worker"):
        advice = "use fewer --workers, and --resume to go on"
        return _Failure(f"a loading process died ({error}); {advice}", 5, "process-died")
    if "shared memory(shm)" in text:
        advice = "enlarge /dev/shm (docker run --shm-size) or use fewer --workers"
        return _Failure(f"no shared memory left; {advice}", 5, "shared-memory-full")
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        advice = "lower --batch_size, --classes_per_batch or --image_size, or use --device cpu"
        return _Failure(f"out of memory; {advice}", 5, "out-of-memory")
    return _Failure(f"internal error: {error!r}; this is a bug, please report it with --debug's output")


class DecidingCommand(Command):
    """A command whose exit code 0 opens doors. --help and --version end with 0 only where they stand alone: among other
    arguments one of them may be what somebody has called a file.
    """

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        alone, given = len(args) == 1, list(args)  # click takes them out of the list
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.exceptions.Exit:
            if alone:
                raise
            message = "nothing was decided: --help and --version stand alone"
            click.echo(f"{info_name}: {message}", err=True)
            if run_log := _opened_log(self, info_name, given, parent, of_help=True):
                run_log.failed(UsageError.code, message)
                run_log.end(2)
            sys.exit(2)


@contextmanager
def usage_errors_on_one_line(name: str | None, run_log: RunLog | None = None) -> Iterator[None]:
    """click's own three lines become ours."""
    try:
        yield
    except click.UsageError as error:
        name = error.ctx.command_path if error.ctx else name
        if run_log:
            run_log.failed(UsageError.code, error.format_message())
            run_log.end(error.exit_code)
        _tell(f"{name}: {one_line(error.format_message())} (see {name} --help)")
        sys.exit(error.exit_code)


def _opened_log(
    command: click.Command, name: str | None, args: list[str], parent: click.Context | None, *, of_help: bool = False
) -> RunLog | None:
    try:
        return open_log(command, name, args, parent, of_help=of_help)
    except SiameseError as error:
        _tell(f"{parent.command_path + ' ' if parent else ''}{name}: {one_line(str(error))}")
        sys.exit(error.exit_code)


def _log_named(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value == "":  # as of a path
        raise click.BadParameter("is empty; expected a path", ctx, param)


def _debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    ctx.meta["siamese.debug"] = value


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"siamese-toolkit {metadata.version('siamese-toolkit')}")
        ctx.exit()


def _fail(ctx: click.Context, failure: _Failure) -> NoReturn:
    trace = ""
    if ctx.meta.get("siamese.debug"):
        import traceback

        trace = traceback.format_exc()
        with suppress(OSError):
            traceback.print_exc()
    if run_log := log_of(ctx):
        run_log.failed(failure.code, failure.message, trace)
    _tell(f"{ctx.command_path}: {one_line(failure.message)}")
    sys.exit(failure.exit_code)


def _tell(line: str) -> None:
    """On stderr; where nothing can be written to it, the exit code says it alone."""
    with suppress(OSError):
        click.echo(line, err=True)


def _terminated(_signal: int, _frame: object) -> NoReturn:
    sys.exit(143)  # an exception, so that temporary files are removed on the way out
