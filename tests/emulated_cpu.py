"""The CPU kernels in a program of another processor, against the reference: ``make test-aarch64``.

    python tests/emulated_cpu.py EMULATOR PROGRAM

PROGRAM is ``csrc/cpu/bench/moe_of_file.cpp`` with the backend, EMULATOR a command that runs it, such as qemu-aarch64.
"""

from __future__ import annotations

import math
import shlex
import struct
import subprocess
import sys

import torch
from torch import Tensor

from helpers.layers import BF16, DTYPES, GATES, Layer, activations, make_layer, preactivation_scale, seeded
from torch_nvfp4 import reference
from torch_nvfp4.gate import parse_activation
from torch_nvfp4.testing import assert_accurate, random_routing

SHAPES = ((1, 2, 64, 32, 1), (3, 4, 208, 80, 2), (40, 3, 336, 112, 3))  # tokens, experts, K, I, top-k


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def run(command: list[str], layer: Layer, x: Tensor, weights: Tensor, ids: Tensor, gate: dict[str, object]) -> Tensor:
    (experts, n, _), top_k = layer.w13.data.shape, ids.shape[1]
    limit = gate.get("clamp_limit")
    header = (DTYPES.index(x.dtype), len(x), top_k, experts, x.shape[1], n // 2)
    data = struct.pack("<8q", *header, int(parse_activation(gate["activation"])), int(limit is not None))
    data += struct.pack("<3f", limit or 0.0, gate.get("alpha", 1.0), gate.get("beta", 0.0))
    for part in (*layer.w13, *layer.w2, x, weights.float(), ids.long()):
        data += bytes_of(part)
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)}: expected 0, got {done.returncode}: {done.stderr.decode().strip()}")
    return torch.frombuffer(bytearray(done.stdout), dtype=x.dtype).view(x.shape)


def main() -> None:
    command = [word for argument in sys.argv[1:] for word in shlex.split(argument)]
    cases = 0
    for (tokens, experts, k, i, top_k), dtype, (name, gate) in (
        (shape, dtype, gate) for shape in SHAPES for dtype in DTYPES for gate in GATES.items()
    ):
        layer = make_layer(experts, k, i, seed=cases, all_scales=name == "silu-clamped")
        scale = preactivation_scale(layer.w13, 2.0 if name == "relu2" else 10.0)
        x = activations(tokens, k, seed=1000 + cases, scale=scale)
        weights, ids = random_routing(tokens, experts, top_k, generator=seeded(2000 + cases))
        out = run(command, layer, x.to(dtype), weights, ids, gate)
        assert_accurate(out, reference.moe(x, *layer, weights, ids, **gate))
        if dtype is BF16 and tokens > 1:  # a NaN stays in its token
            x[0, 5] = math.nan
            again = run(command, layer, x.to(dtype), weights, ids, gate)
            if not (bool(again[0].isnan().all()) and torch.equal(again[1:], out[1:])):
                raise SystemExit(f"{name}: expected NaN in row 0 alone, got {again.isnan().sum(1).tolist()} per row")
        cases += 1
    print(f"{cases} layers agree with the reference: {shlex.join(command)}")


if __name__ == "__main__":
    main()
