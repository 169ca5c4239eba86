"""Calls every op with random shapes and hostile values, and checks what comes back.

``make fuzz`` runs it on a library built with the address and undefined-behaviour sanitizers; test_op_safety.py runs a
few calls on the normal one. A call is made of one seed and nothing else: call i of ``--seed S`` is call 0 of ``--seed
S+i``, which the report of a failure names. The calls run in a process of their own, so that a crash or a hang is
reported too.

Checked are, for every call:

- a real call and one on meta tensors both work, with results of the same shape, or raise the same words;
- only what a kernel alone can see (values of order and offsets, NaN block scales, views that begin between elements) is
  raised by the real call alone, and always is;
- results equal the plain reference; where a token's own values have no defined sum (NaN, infinities, beyond what fp32
  holds) its row is left out, all the others are not, and a token with NaN or infinity must come out as NaN;
- the same call gives the same bits again.
"""

from __future__ import annotations

import argparse
import collections
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuzz_cases import BF16, FP16, FP32, INF, MAKERS, NAN, Arguments, Random, require

HANG_SECONDS = 120


# ---- bad shapes, dtypes and numbers


def misaligned(good: Tensor) -> Tensor:
    """The same values one byte further on in memory."""
    size = good.numel() * good.element_size()
    there = torch.zeros(size + 64, dtype=torch.uint8)
    offset = (1 - there.data_ptr()) % good.element_size() or good.element_size()
    there[offset : offset + size] = good.contiguous().view(-1).view(torch.uint8)
    return torch.frombuffer(there.numpy(), dtype=good.dtype, offset=offset, count=good.numel()).view(good.shape)


def mutate_tensor(r: Random, good: Tensor) -> Tensor:
    shape = list(good.shape)
    if max(shape, default=0) > 2**20:  # made here before
        return good
    how = r.randrange(8)
    if how == 0 and shape:
        shape[r.randrange(len(shape))] += r.choice((-1, 1, 16, 64)) if 0 not in shape else 1
        return good.new_zeros([max(size, 0) for size in shape])
    if how == 1 and shape:
        shape[r.randrange(len(shape))] = r.choice((0, 1, 2))
        return good.new_zeros(shape)
    if how == 2:
        return good.new_zeros(shape[1:])
    if how == 3:
        return good.new_zeros([r.choice((0, 1, 3)), *shape])
    if how == 4:
        dtypes = (torch.int8, torch.uint8, torch.int32, torch.int64, BF16, FP16, FP32, torch.float64, torch.bool)
        return torch.zeros(shape, dtype=r.choice(dtypes))
    if how == 5:  # not contiguous, where it has more than one element
        return good.unsqueeze(-1).repeat(*[1] * good.dim(), 2)[..., 0]
    if how == 6 and shape:
        return good[..., :1].expand(shape) if shape[-1] else good
    # Sizes that no memory holds.
    shape = [r.choice((1, 16, 2**42, 2**45)) if size else 0 for size in shape]
    if 0 not in shape and shape:
        shape[r.randrange(len(shape))] = 0
    try:
        return torch.empty(shape, dtype=good.dtype)
    except RuntimeError:  # beyond what strides count
        return good


NUMBERS: dict[str, tuple[Any, ...]] = {
    "num_experts": (0, -1, 1, 7, 2**31, 2**40, 2**63 - 1, -(2**63)),
    "in_features": (0, -16, 16, 72, 2**31, 2**62, 2**63 - 1, -(2**63)),
    "activation": (-1, 5, 2, 3, 4, 2**63 - 1, -(2**63)),
    "clamp_limit": (0.0, -0.0, -1.0, NAN, INF, -INF, 1e39, 1e-46, 5.0),
    "alpha": (NAN, INF, 1e300, 2.0),
    "beta": (NAN, -INF, -1e39, 1.0),
    "gated": (True, False),
}


def mutate(r: Random, arguments: Arguments) -> Arguments:
    arguments = dict(arguments)
    for _ in range(r.choice((1, 1, 1, 2))):
        name = r.choice([name for name, value in arguments.items() if value is not None] or ["activation"])
        value = arguments[name]
        if isinstance(value, Tensor):
            arguments[name] = mutate_tensor(r, value)
        elif name in NUMBERS:
            arguments[name] = r.choice(NUMBERS[name])
    return arguments


# ---- one call


def call(op: str, arguments: Arguments) -> Any:
    """The results, or the error's text. An out overload's result is what its buffer holds then."""
    name, _, overload = op.partition(".")
    try:
        result = getattr(getattr(torch.ops.nvfp4, name), overload or "default")(**arguments)
    except RuntimeError as error:
        text = str(error)
        require(text.startswith(f"nvfp4::{op}: "), "an error that does not name the op:", text)
        return text
    if overload == "out":
        return (arguments["out"].clone(),)
    return result if isinstance(result, tuple) else (result,)


def on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def levels() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return ["portable", *["avx2"] * ("avx2" in flags), *["avx512"] * ("avx512_vnni" in flags)]


LEVELS = levels()


def one_call(seed: int) -> str:
    """What became of it: "values", "refused values", "no defined values", "refused", "no memory" or "accepted"."""
    r = Random(seed)
    os.environ["TORCH_NVFP4_CPU_LEVEL"] = r.choice(LEVELS)
    torch.set_num_threads(2 if r.chance(0.05) else 1)
    case = r.choice(MAKERS)(r)
    op, arguments = case.op, case.arguments
    mutated = r.chance(0.35)
    if mutated:
        arguments = mutate(r, arguments)
    elif r.chance(0.05):
        name = r.choice([name for name, value in arguments.items() if isinstance(value, Tensor)])
        if arguments[name].element_size() > 1 and arguments[name].numel():
            error = call(op, {**arguments, name: misaligned(arguments[name])})
            require(isinstance(error, str) and f"{name} must begin at a multiple of" in error, "misaligned:", error)
            return "refused values"

    real, meta = call(op, arguments), call(op, {name: on_meta(value) for name, value in arguments.items()})
    if isinstance(meta, str):
        require(mutated, "the fake refuses good arguments:", meta)
        require(real == meta.replace(" on meta", " on cpu"), "the fake says:", meta, "the kernel:", real)
        return "refused"
    if isinstance(real, str):
        if mutated and ("bytes of memory for out" in real or "bytes of memory for the gradient" in real):
            return "no memory"
        known = (
            "order must hold every slot", "offsets must begin with 0", "scale must hold finite",
            "expert_num_tokens must be from 0 to",
        )  # fmt: skip
        require(any(words in real for words in known), "the kernel alone refuses:", real)
        require(mutated or (case.value_error or "nothing") in real, "expected", case.value_error, "got", real)
        return "refused values"
    require(mutated or case.value_error is None, "expected an error:", case.value_error)
    for got, fake in zip(real, meta, strict=True):
        require((got.shape, got.dtype) == (fake.shape, fake.dtype), got.shape, got.dtype, fake.shape, fake.dtype)
        require(got.is_contiguous(), "a result that is not contiguous")
    if mutated:
        return "accepted"
    again = call(op, arguments)
    require(all(map(same_bits, real, again)), "another result the second time")
    if case.check is None:
        return "no defined values"
    case.check(real if len(real) > 1 else real[0])
    return "values"


# ---- the process that calls, and the one that watches it


def work(seed: int, calls: int, progress: mmap.mmap) -> None:
    counts: collections.Counter[str] = collections.Counter()
    for i in range(calls):
        progress[:8] = struct.pack("q", i)
        try:
            counts[one_call(seed + i)] += 1
        except Exception as error:
            print(f"call {i}: {type(error).__name__}: {error}", flush=True)
            raise SystemExit(1) from error
    print(f"{calls} calls from seed {seed}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))


def watch(seed: int, calls: int) -> int:
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(8))
        file.flush()
        child = subprocess.Popen(
            [sys.executable, __file__, "--seed", str(seed), "--calls", str(calls), "--progress", file.name]
        )
        last, since = -1, time.monotonic()
        while True:
            try:
                child.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                (now,) = struct.unpack("q", Path(file.name).read_bytes())
                if now != last:
                    last, since = now, time.monotonic()
                elif time.monotonic() - since > HANG_SECONDS:
                    child.kill()
                    print(f"no call ended for {HANG_SECONDS} s")
        if child.returncode != 0:
            (at,) = struct.unpack("q", Path(file.name).read_bytes())
            print(f"FAILED (exit code {child.returncode}); again: python {__file__} --calls 1 --seed {seed + at}")
            return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--progress", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.progress is None:
        return watch(options.seed, options.calls)
    with open(options.progress, "r+b") as file, mmap.mmap(file.fileno(), 8) as progress:
        work(options.seed, options.calls, progress)
    return 0


if __name__ == "__main__":
    sys.exit(main())
