"""How the process behaves: exit codes, signals, closed pipes, full disks, and what it says about a bug.

Exit codes: 0; 1 for a check that failed; 2 for a request, a checkpoint or a file that cannot be used (one line on
stderr); 3 for a bug; 130 and 143 after SIGINT (Ctrl-C) and SIGTERM; 141 when the reader of the output has gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import typer
from typer.core import TyperGroup

from torch_nvfp4._start import end_at_interrupt
from torch_nvfp4._version import __version__
from torch_nvfp4.bench import CPU_LEVEL_VARIABLE, BenchError
from torch_nvfp4.cli.memory import memory_advice, memory_error
from torch_nvfp4.cli.output import OutputError
from torch_nvfp4.cli.terminal import make_streams_total, print_traceback, say

FAILED, UNUSABLE, BUG, CLOSED_PIPE = 1, 2, 3, 128 + signal.SIGPIPE
DEBUG_VARIABLE = "TORCH_NVFP4_DEBUG"

# Some versions of typer hold a copy of click, so that the class has no public name in all of them.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]
_T = TypeVar("_T")


class Commands(TyperGroup):
    """The group of all commands. Every way out of one passes through ``_guarded``."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        make_streams_total()
        with _signals():
            return super().main(*args, **kwargs)

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return _guarded(lambda: "", lambda: super(Commands, self).make_context(info_name, args, parent, **extra))

    def invoke(self, ctx: Any) -> Any:
        return _guarded(lambda: ctx.invoked_subcommand or "", lambda: super(Commands, self).invoke(ctx))


def failed(command: str, message: str) -> NoReturn:
    """Ends a command whose check failed."""
    say(command, message)
    raise typer.Exit(FAILED)


def _guarded(command: Callable[[], str], run: Callable[[], _T]) -> _T:
    try:
        return run()
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        say(command(), "interrupted")
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        # Help without arguments is an error to typer, which prints it itself.
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        raise SystemExit(_explain(command(), error)) from error


def _explain(command: str, error: Exception) -> int:
    """Says what went wrong; the exit code."""
    refused = memory_error(error)
    if isinstance(error, BrokenPipeError):
        _discard_output()
        return CLOSED_PIPE
    if refused is not None:
        say(command, "; ".join(filter(None, (refused, memory_advice(command)))))
    elif isinstance(error, _UsageError):
        say(command, _usage(command, error.format_message()))
    # CheckpointError is a ValueError. NotImplementedError: no backend can run the layer.
    elif isinstance(error, (ValueError, NotImplementedError, BenchError, OutputError)):
        say(command, str(error))
    elif isinstance(error, OSError):
        say(command, _os_error(error))
        _discard_output()
    elif isinstance(error, RuntimeError) and CPU_LEVEL_VARIABLE in str(error):
        say(command, str(error).split("\n")[0])
    else:
        _say_bug(command, error)
        return BUG
    if _debugging():
        print_traceback(error)
    return UNUSABLE


def _usage(command: str, message: str) -> str:
    help_of = f"torch-nvfp4 {command} --help".replace("  ", " ")
    return f"expected what {help_of} lists, got: {message}"


def _os_error(error: OSError) -> str:
    where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else "the output"
    expected = "a file or directory that can be used" if error.filename is not None else "to write it"
    return f"{where}: expected {expected}, got: {error.strerror or error}"


def _say_bug(command: str, error: Exception) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    say(
        command,
        f"this is a bug in torch_nvfp4 {__version__}: {type(error).__name__}: {error}{place}. Please report it with "
        f"the command, the output of torch-nvfp4 info, and the traceback, which {DEBUG_VARIABLE}=1 prints.",
    )
    if _debugging():
        print_traceback(error)


def _debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def _discard_output() -> None:
    """What is left in the buffers of streams that cannot be written goes nowhere, so that Python's exit stays quiet."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # AttributeError: a stream that was closed at the start is None
            with suppress(OSError, ValueError, AttributeError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGINT run the clean-up on the way out; a second one ends the process at once.

    Only where the signal has Python's own handling, or that of the start: one that is ignored (nohup) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(number: int, _frame: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    own = (signal.SIG_DFL, signal.default_int_handler, end_at_interrupt)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    taken = {number: handler for number, handler in before.items() if handler in own}
    try:
        for number in taken:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
