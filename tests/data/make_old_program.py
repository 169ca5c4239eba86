"""Writes old_program.pt2 and old_program.safetensors, an exported program and its results on the CPU.

The results are those of the portable level, whose last bits are no compiler's choice: it has no fused multiply-add.

Run with the package of the version whose schemas the program is to hold, which no later one can write again:
the state before the ops had biases (14 arguments of nvfp4::moe), torch 2.13.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import torch_nvfp4
from torch_nvfp4.testing import random_routing, random_weight

ops = torch.ops.nvfp4
E, K, I, M = 2, 32, 16, 3  # noqa: E741


class Program(nn.Module):
    """Every op that got arguments later, with all that it had and with as few as it takes."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        w13 = random_weight((E, 2 * I, K), gated=True, generator=generator)
        w2 = random_weight((E, K, I), generator=generator)
        self.register_buffer("w13", torch_nvfp4.pack(w13, gated=True))
        self.register_buffer("w13_scale", w13.global_scale)
        self.register_buffer("w2", torch_nvfp4.pack(w2))
        self.register_buffer("w2_scale", w2.global_scale)

    def forward(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor, counts: Tensor
    ) -> dict[str, Tensor]:
        w = (self.w13, self.w13_scale, self.w2, self.w2_scale)
        gate = {"activation": 0, "clamp_limit": 0.5, "alpha": 1.702, "beta": 1.0}
        how = {"apply_router_weight_on_input": True, "batch_invariant": True}
        order, offsets = ops.route(topk_ids, expert_map, E)
        gemm = (x, self.w13, self.w13_scale, order, offsets)
        batch = torch.stack((x, x.flip(0)))
        out, batch_out = torch.empty_like(x), torch.zeros_like(batch)
        ops.moe.out(x, *w, topk_weights, topk_ids, expert_map, **gate, **how, out=out)
        ops.batched_moe.out(batch, *w, counts, activation=4, out=batch_out)
        return {
            "moe": ops.moe(x, *w, topk_weights, topk_ids),
            "moe with all": ops.moe(x, *w, topk_weights, topk_ids, expert_map, **gate, **how),
            "moe.out": out,
            "batched_moe": ops.batched_moe(batch, *w, counts),
            "batched_moe with all": ops.batched_moe(batch, *w, counts, **gate),
            "batched_moe.out": batch_out,
            "grouped_gemm": ops.grouped_gemm(*gemm),
            "grouped_gemm with all": ops.grouped_gemm(*gemm, topk_weights, batch_invariant=True),
            "grouped_gemm_swiglu": ops.grouped_gemm_swiglu(*gemm),
            "grouped_gemm_swiglu with all": ops.grouped_gemm_swiglu(*gemm, topk_weights, **gate, batch_invariant=True),
            "swiglu": ops.swiglu(x),
            "swiglu with all": ops.swiglu(x, activation=1, clamp_limit=0.5, alpha=1.0, beta=0.0),
        }


def main() -> None:
    os.environ["TORCH_NVFP4_CPU_LEVEL"] = "portable"
    generator = torch.Generator().manual_seed(7)
    program = Program(generator)
    x = torch.randn(M, K, generator=generator).to(torch.bfloat16)
    topk_weights, topk_ids = random_routing(M, 4, 2, generator=generator)
    expert_map = torch.tensor([1, -1, 0, -1], dtype=torch.int32)
    args = (x, topk_weights, topk_ids, expert_map, torch.tensor([3, 1], dtype=torch.int32))
    folder = Path(__file__).parent
    torch.export.save(torch.export.export(program, args), folder / "old_program.pt2")
    save_file({name: value.contiguous() for name, value in program(*args).items()}, folder / "old_program.safetensors")


if __name__ == "__main__":
    main()
