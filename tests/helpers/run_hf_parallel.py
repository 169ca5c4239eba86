"""One rank of a model of transformers with NVFP4 weights: python run_hf_parallel.py CHECKPOINT MODE OUTPUT.

The launcher sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Rank 0 saves {"logits", "tokens", "experts", "rows"};
every rank writes what save_pretrained says into OUTPUT.RANK.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import transformers
from torch import distributed
from torch_nvfp4.integrations.transformers import register
from torch_nvfp4.integrations.transformers.modules import PackedExperts, PackedLinear
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.hf_models import greedy, prompt


def main(path: str, mode: str, output: str) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    register()
    size = int(os.environ["WORLD_SIZE"])
    ep_size = size if mode == "ep" else 1
    config = DistributedConfig(tp_size=size, ep_size=ep_size)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=config)
    with torch.no_grad():
        logits = model(prompt()).logits
    tokens = greedy(model, prompt(), 8)
    modules = list(model.modules())
    experts = next(module.packed for module in modules if isinstance(module, PackedExperts))
    rows = [tuple(m.packed.unpacked_weight().data.shape) for m in modules if isinstance(m, PackedLinear)]
    if distributed.get_rank() == 0:
        sizes = (experts.num_experts, experts.intermediate_size)
        torch.save({"logits": logits, "tokens": tokens, "experts": sizes, "linears": rows[:4]}, output)
    try:
        model.save_pretrained(f"{output}.saved")
        text = "saved"
    except ValueError as error:
        text = str(error)
    Path(f"{output}.{distributed.get_rank()}").write_text(text)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
