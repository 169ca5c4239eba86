"""The ranks of models of transformers with NVFP4 weights: python run_hf_parallel.py OUTPUT [MODE CHECKPOINT]...

The launcher sets WORLD_SIZE, MASTER_ADDR and MASTER_PORT; MODE is tp or ep. Each rank saves one dict per model,
{"logits", "tokens", "experts", "linears", "saving"}, into OUTPUT.RANK.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import distributed
from transformers.distributed import DistributedConfig

from torch_nvfp4.integrations.transformers import register
from torch_nvfp4.integrations.transformers.modules import PackedExperts, PackedLinear

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.hf_models import greedy, prompt
from helpers.ranks import fork_ranks


def run(path: str, mode: str, folder: Path) -> dict[str, Any]:
    """Loads a model with a plan, runs it and tries to save it."""
    size = int(os.environ["WORLD_SIZE"])
    config = DistributedConfig(tp_size=size, ep_size=size if mode == "ep" else 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=config)
    with torch.no_grad():
        logits = model(prompt()).logits
    modules = list(model.modules())
    experts = next(module.packed for module in modules if isinstance(module, PackedExperts))
    linears = [tuple(m.packed.unpacked_weight().data.shape) for m in modules if isinstance(m, PackedLinear)]
    try:
        model.save_pretrained(folder)
        saving = "saved"
    except ValueError as error:
        saving = str(error)
    return {
        "logits": logits,
        "tokens": greedy(model, prompt(), 8),
        "experts": (experts.num_experts, experts.intermediate_size),
        "linears": linears[:4],
        "saving": saving,
    }


def main(output: str, *models: str) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    register(mxfp4=True)
    fork_ranks(int(os.environ["WORLD_SIZE"]))
    pairs = zip(models[::2], models[1::2], strict=True)
    results = [run(path, mode, Path(f"{output}.saved")) for mode, path in pairs]
    torch.save(results, f"{output}.{os.environ['RANK']}")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
