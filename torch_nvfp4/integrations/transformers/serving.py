"""transformers' own server with this package's quantizer, for ``torch-nvfp4 serve``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers.utils.import_utils import is_serve_available

from torch_nvfp4.integrations.transformers.registry import register

__all__ = ["check_servable", "serve"]


def check_servable() -> None:
    """Raises ValueError, with what to install, where the server's packages are missing."""
    if not is_serve_available():
        raise ValueError(
            "expected the packages of transformers' server (fastapi, uvicorn, openai, pydantic), got not all of them; "
            "pip install 'torch-nvfp4[serve]'"
        )


def serve(path: str | Path, arguments: Sequence[str]) -> None:
    """Runs ``transformers serve path *arguments`` in this process until it is stopped.

    The server speaks the protocol of OpenAI (/v1/chat/completions with and without streaming, /v1/models, ...).

    Raises ValueError as ``check_servable``, RuntimeError as ``register``, and SystemExit for its own usage errors.
    """
    check_servable()
    register()
    from transformers.cli.transformers import app

    app(args=["serve", str(path), *arguments], prog_name="torch-nvfp4", standalone_mode=True)
