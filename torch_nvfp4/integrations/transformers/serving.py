"""transformers' own server with this package's quantizer, for ``torch-nvfp4 serve``."""

from __future__ import annotations

import argparse
import errno
import socket
from collections.abc import Sequence
from pathlib import Path

from transformers.utils.import_utils import is_serve_available

from torch_nvfp4.integrations.transformers.registry import register

__all__ = ["check_address", "check_servable", "serve"]

_UVICORN_FAILED = 3  # its exit code where the server does not start; 3 of torch-nvfp4 is a bug


def check_servable() -> None:
    """Raises ValueError, with what to install, where the server's packages are missing."""
    if not is_serve_available():
        raise ValueError(
            "expected the packages of transformers' server (fastapi, uvicorn, openai, pydantic), got not all of them; "
            "pip install 'torch-nvfp4[serve]'"
        )


def check_address(arguments: Sequence[str]) -> None:
    """Raises ValueError where the server's address is in use: it would say so when the model is loaded.

    The options and their defaults are those of ``transformers serve``; what it has to refuse itself passes.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    try:
        options, _ = parser.parse_known_args(list(arguments))
        addresses = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (argparse.ArgumentError, OSError, OverflowError, SystemExit):
        return
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    continue
                got = f"{options.host}:{options.port}, which another process has; choose another --port"
                raise ValueError(f"--host, --port: expected an address that is free, got {got}") from error


def serve(path: str | Path, arguments: Sequence[str]) -> None:
    """Runs ``transformers serve path *arguments`` in this process until it is stopped.

    The server speaks the protocol of OpenAI (/v1/chat/completions with and without streaming, /v1/models, ...).

    Raises ValueError as ``check_servable`` and ``check_address``, RuntimeError as ``register``, KeyboardInterrupt after
    Ctrl-C, and SystemExit for its own usage errors.
    """
    check_servable()
    check_address(arguments)
    register(mxfp4=True)  # whoever serves with this command has chosen this package
    from transformers.cli.transformers import app

    try:
        code = app(args=["serve", str(path), *arguments], prog_name="torch-nvfp4", standalone_mode=False)
    except SystemExit as error:
        if error.code != _UVICORN_FAILED:
            raise
        raise ValueError("expected the server to start, got what it says above") from error
    except Exception as error:
        # Typer's, which transformers may hold a copy of: an abort because of Ctrl-C, and errors of usage.
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        if not hasattr(error, "show"):
            raise
        error.show()
        raise SystemExit(getattr(error, "exit_code", 2)) from error
    if isinstance(code, int) and code:
        raise SystemExit(code)
