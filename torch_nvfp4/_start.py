"""What the command does before torch is imported, which takes seconds: Ctrl-C ends it in one line, --version is quick.

Importing this module acts, and only in a process that is the command: ``torch-nvfp4`` or ``python -m torch_nvfp4``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress

from torch_nvfp4._version import __version__


def end_at_interrupt(_number: int, _frame: object) -> None:
    """Ends the process as the commands end it later. Nothing has been made that would have to be cleaned up."""
    if sys.stderr is not None:
        with suppress(OSError):
            os.write(2, b"torch-nvfp4: interrupted\n")
    os._exit(128 + signal.SIGINT)


def _is_the_command() -> bool:
    arguments = getattr(sys, "argv", None) or [""]  # none in a program that embeds Python
    if arguments[0] != "-m":
        return os.path.basename(arguments[0]) == "torch-nvfp4"
    # While python -m looks for a module, which imports this package first, the name is not among the arguments.
    asked = sys.orig_argv[-len(arguments)] if len(sys.orig_argv) > len(arguments) else ""
    return asked.removeprefix("-m") == "torch_nvfp4"


def _print_version() -> None:
    """Ends the process if the version is all that was asked for and it could be printed; if not, the command will."""
    if sys.argv[1:] == ["--version"] and sys.stdout is not None:
        with suppress(OSError):
            os.write(1, f"torch-nvfp4 {__version__}\n".encode())
            os._exit(0)


if _is_the_command():
    # Only instead of Python's own handling: a signal that is ignored (nohup) stays ignored.
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, end_at_interrupt)
    _print_version()
