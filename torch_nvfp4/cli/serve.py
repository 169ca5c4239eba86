"""``torch-nvfp4 serve``."""

from __future__ import annotations

import typer

from torch_nvfp4.cli.inspect import open_checkpoint
from torch_nvfp4.cli.integration import integration
from torch_nvfp4.cli.options import CheckpointArgument
from torch_nvfp4.cli.terminal import Terminal
from torch_nvfp4.errors import CheckpointError, refusal


def command(context: typer.Context, checkpoint: CheckpointArgument) -> None:
    """Serve a checkpoint by OpenAI's protocol, with transformers' own server on the packed weights.

    NVFP4 and MXFP4 experts stay packed. Clients name the model as CHECKPOINT is given here, or not at all.

    Every other option goes to transformers serve: --host, --port, --device, --dtype, --compile, --continuous-batching
    and more, which transformers serve --help lists. Needs pip install 'torch-nvfp4[serve]'.

    \b
    Examples:
      torch-nvfp4 serve DeepSeek-V4-Flash-NVFP4
      torch-nvfp4 serve Qwen3-30B-A3B-NVFP4 --host 0.0.0.0 --port 8080 --device cuda:0
    """
    opened = open_checkpoint(Terminal(), checkpoint)
    if not opened.layers and not opened.linears:
        advice = "torch-nvfp4 quantize makes them"
        raise CheckpointError(refusal(checkpoint, "NVFP4 weights or MXFP4 experts", "none", advice))
    integration("serving", "serve").serve(checkpoint, context.args)
