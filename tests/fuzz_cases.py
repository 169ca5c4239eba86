"""One random call of each op for fuzz_ops.py: its arguments, and a check of its result against the plain reference."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import torch_nvfp4  # noqa: F401  (registers the ops)
from torch_nvfp4 import reference
from torch_nvfp4.format import E2M1_VALUES

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
NAN, INF = math.nan, math.inf
# Generous bounds of errors: of a number that is rounded, and of a number that a GEMM reads, in units of the largest of
# its row (CPU levels with 16-bit products keep 14 bits of that). A wrong row, scale or code is off by far more.
ROUNDING = {BF16: 2.0**-7, FP16: 2.0**-9, FP32: 1e-5}
INPUT = {BF16: 2.0**-13, FP16: 2.0**-13, FP32: 1e-6}
# What a buffer for a result holds before the call.
UNWRITTEN = 3.0
# The plain reference is in fp64; results and intermediates beyond these may overflow.
LARGEST = {BF16: 1e37, FP16: 3e4, FP32: 1e37}

Arguments = dict[str, Any]


class Failure(AssertionError):
    pass


def require(condition: bool, *what: Any) -> None:
    if not condition:
        raise Failure(" ".join(map(str, what)))


class Case(NamedTuple):
    op: str
    arguments: Arguments
    # From a result to the error of its elements; may leave out rows. None: nothing is known of the values.
    check: Callable[[Any], None] | None
    # What the kernel alone can see is wrong: words of the error that it must raise. None: nothing.
    value_error: str | None = None


class Random(random.Random):
    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.getrandbits(40))

    def size(self, multiple: int, most: int) -> int:
        return multiple * self.randint(1, most)


# ---- weights


def e4m3_values() -> Tensor:
    """Of all 256 bytes, NaN's taken for 480 as the kernels do."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    values[0x7F], values[0xFF] = 480.0, -480.0
    return values


E4M3 = e4m3_values()
E2M1 = torch.tensor(E2M1_VALUES, dtype=torch.float64)
HOSTILE_SCALES = (NAN, INF, -INF, 0.0, -0.0, 1e-45, 3e38, -1.0)


class Weight(NamedTuple):
    packed: Tensor
    global_scale: Tensor
    dense: Tensor  # [E, N, K] in fp64, the global scale included
    hostile: Tensor  # [E] whose global scale is no moderate number


def make_weight(r: Random, e: int, n: int, k: int, gated: bool, batched: bool = True) -> Weight:
    generator = r.generator()
    codes = torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 0x7F, (e, n, k // 16), dtype=torch.uint8, generator=generator)
    scales |= torch.randint(0, 2, scales.shape, dtype=torch.uint8, generator=generator) << 7
    if r.chance(0.3):  # scales of similar size, which the AVX-512 level folds
        scales = (scales & 0x8F) | 0x40
    packed = torch.ops.nvfp4.pack(codes, scales, gated)
    if r.chance(0.1):  # bytes that pack never made: NaN scales, padding that is not zero
        packed = torch.randint(0, 256, packed.shape, dtype=torch.uint8, generator=generator)
        codes, scales = torch.ops.nvfp4.unpack(packed, k, gated)
    scale = torch.exp2(torch.rand((e, 2) if gated else (e,), generator=generator) * 4 - 12)
    hostile = torch.zeros(e, dtype=torch.bool)
    if r.chance(0.15):
        index = r.randrange(e)
        scale[index] = r.choice(HOSTILE_SCALES)
        hostile[index] = True
    values = E2M1[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]
    values = values * E4M3[scales.int()].repeat_interleave(16, -1)
    rows = scale.double().repeat_interleave(n // 2, -1) if gated else scale.double()[:, None]
    dense = values * torch.where(hostile[:, None], 0.0, rows)[..., None]
    if not batched:
        return Weight(packed[0].clone(), scale[0].clone(), dense, hostile)
    return Weight(packed, scale, dense, hostile)


# ---- activations and routings


def make_x(r: Random, rows: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, k]; which rows hold NaN or an infinity; which hold numbers that may overflow or vanish."""
    x = torch.randn(rows, k, generator=r.generator()) * r.choice((1.0, 0.1, 0.01))
    if r.chance(0.2):
        x *= torch.rand(rows, k, generator=r.generator()) < 0.3
    x = x.to(dtype)
    bad, extreme = torch.zeros(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.bool)
    if rows and r.chance(0.4):
        for _ in range(r.randint(1, 3)):
            row, value = r.randrange(rows), r.choice((NAN, INF, -INF, 3e38, -3e38, 1e-40, 1e-45, 65504.0))
            x[row, r.randrange(k)] = torch.tensor(value).to(dtype)
        bad = ~x.isfinite().all(1)
        extreme = (x.abs() > 1e3).any(1)
    return x, bad, extreme


def make_routing(r: Random, tokens: int, top_k: int, experts: int) -> Arguments:
    generator = r.generator()
    weights = torch.randn(tokens, top_k, generator=generator)
    ids = torch.randint(0, experts, (tokens, top_k), generator=generator)
    if r.chance(0.3) and ids.numel():
        hostile = torch.tensor((-1, experts, INT_MIN, INT_MAX, experts + 1))
        at = torch.rand(ids.shape, generator=generator) < r.choice((0.1, 0.9))
        ids = torch.where(at, hostile[torch.randint(0, 5, ids.shape, generator=generator)], ids)
    if r.chance(0.5):
        ids = ids.int()
    elif r.chance(0.2) and ids.numel():
        ids.view(-1)[r.randrange(ids.numel())] = r.choice((-(2**63), 2**63 - 1, 2**32, 2**32 + 1))
    expert_map = None
    if r.chance(0.4):
        expert_map = torch.randint(-1, experts, (r.choice((0, 1, experts, 2 * experts)),), generator=generator).int()
        if expert_map.numel() and r.chance(0.3):
            expert_map[r.randrange(expert_map.numel())] = r.choice((INT_MIN, INT_MAX, experts))
    return {"topk_weights": weights, "topk_ids": ids, "expert_map": expert_map}


def spoil_weights(r: Random, weights: Tensor) -> Tensor:
    """Puts hostile numbers into router weights; which tokens have one."""
    hit = torch.zeros(weights.shape[0], dtype=torch.bool)
    if weights.numel() and r.chance(0.15):
        row = r.randrange(weights.shape[0])
        weights[row, r.randrange(weights.shape[1])] = r.choice((NAN, INF, -INF, 3e38, 1e-45))
        hit[row] = True
    return hit


def make_gate(r: Random) -> tuple[Arguments, bool]:
    """Parameters of a gate, and whether results stay moderate."""
    activation = r.randrange(6)
    gate: Arguments = {"activation": activation, "clamp_limit": None, "alpha": 1.0, "beta": 0.0}
    if activation < 2 and r.chance(0.6):
        gate["clamp_limit"] = r.choice((0.01, 0.5, 7.0, 10.0, 1e-45, 1e-30, 3e38, 3.4028234663852886e38))
    if activation == 0 and r.chance(0.4):
        gate["alpha"], gate["beta"] = r.choice(((1.702, 1.0), (0.0, 0.0), (-1.0, -2.0), (2.0**64, 1.0), (1.0, 3e38)))
    if activation == 5:
        gate["alpha"], gate["beta"] = r.choice(((4.0, 25.0), (0.5, 0.0), (2.0**-64, 2.0**-64), (2.0**64, 2.0**64)))
        return gate, 0.1 < gate["alpha"] < 100
    return gate, max(gate["alpha"], gate["beta"]) < 10 and (gate["clamp_limit"] or 1.0) > 1e-20


def compare(out: Tensor, expected: Tensor, error: Tensor, skip: Tensor, nan_rows: Tensor | None = None) -> None:
    """out [rows, n] against fp64 ``expected``, whose rounding is still to come on top of ``error``.

    Rows of ``skip`` may hold anything, those of ``nan_rows`` must be all NaN.
    """
    if nan_rows is not None:
        require(bool(out[nan_rows].isnan().all()), "a row with NaN or infinity did not come out as NaN")
        skip = skip | nan_rows
    limit = error + ROUNDING[out.dtype] * expected.abs() + 1e-6
    held = ~skip[:, None] & (expected.abs() + error < LARGEST[out.dtype])
    wrong = held & ~((out.double() - expected).abs() <= limit)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        wanted, allowed, got = float(expected[at]), float(limit[at]), float(out[at])
        raise Failure(f"index {at}: expected {wanted:g} within {allowed:g}, got {got:g}")


def finite(x: Tensor) -> Tensor:
    """fp64, with zeros for what is no number."""
    return x.double().nan_to_num(0, 0, 0)


def input_error(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a GEMM may read for every number of a row of finite x, more or less."""
    return INPUT[dtype] * x.abs().amax(-1, keepdim=True).expand_as(x)


def gated_error(pre: Tensor, error: Tensor, gate: Arguments, gated: bool = True) -> Tensor:
    """How far a gate, or an activation without one, goes from its value where its inputs are off by ``error``."""
    halves = 2 if gated else 1
    middle = reference.swiglu(pre, gated=gated, **gate)
    furthest = torch.zeros_like(middle)
    for signs in itertools.product((-1, 1), repeat=halves):
        off = torch.tensor(signs, dtype=pre.dtype).repeat_interleave(pre.shape[-1] // halves) * error
        furthest = torch.maximum(furthest, (reference.swiglu(pre + off, gated=gated, **gate) - middle).abs())
    return furthest


class Terms(NamedTuple):
    """The rows that experts give, in fp64: their values, errors that are allowed, and whether an intermediate may
    have overflowed."""

    rows: Tensor
    errors: Tensor
    overflow: Tensor


def mlp_terms(
    x: Tensor, dtype: torch.dtype, w13: Weight, w2: Weight, order: Tensor, offsets: Tensor, on_input: Tensor | None,
    gate: Arguments, biases: Arguments,
) -> Terms:  # fmt: skip
    clean = finite(x)
    gated = w13.global_scale.dim() == 2
    pre = reference.grouped_gemm(clean, w13.dense, order, offsets, on_input, biases["w13_bias"])
    pre_error = reference.grouped_gemm(input_error(clean, dtype), w13.dense.abs(), order, offsets, on_input).abs()
    hidden = reference.swiglu(pre, gated=gated, **gate)
    hidden_error = (
        gated_error(pre, pre_error, gate, gated) + ROUNDING[dtype] * hidden.abs() + input_error(hidden, dtype)
    )
    return Terms(
        reference.grouped_gemm(hidden, w2.dense, order, offsets, None, biases["w2_bias"]),
        reference.grouped_gemm(hidden_error, w2.dense.abs(), order, offsets),
        torch.maximum(pre.abs().amax(-1), hidden.abs().amax(-1)) > LARGEST[dtype],
    )


def make_experts(r: Random, e: int, k: int, i: int) -> tuple[Weight, Weight, Arguments, Arguments, bool]:
    """w13, w2, the biases, the gate, and whether the gate is moderate; of experts with a gate or without."""
    gated = r.chance(0.7)
    rows = 2 * i if gated else i
    w13, w2 = make_weight(r, e, rows, k, gated), make_weight(r, e, k, i, False)
    gate, moderate = make_gate(r) if gated else ({"activation": r.choice((0, 2, 3, 4))}, True)
    biases = {"w13_bias": (e, rows), "w2_bias": (e, k)}
    values = {name: torch.randn(n, generator=r.generator()) if r.chance(0.3) else None for name, n in biases.items()}
    return w13, w2, values, gate, moderate


# ---- one case of every op


def moe(r: Random) -> Case:
    e, k, i = r.randint(1, 5), r.size(16, 10), r.size(16, 6)
    tokens, top_k = r.choice((0, 1, 1, 2, 3, 5, 9, 17, 40, 300)), r.choice((0, 1, 1, 2, 3, 4))
    dtype = r.choice((BF16, FP16, FP32))
    w13, w2, biases, gate, moderate = make_experts(r, e, k, i)
    x, bad, extreme = make_x(r, tokens, k, dtype)
    routing = make_routing(r, tokens, top_k, e)
    weigh_input = r.chance(0.3)
    skip = extreme | spoil_weights(r, routing["topk_weights"])
    arguments = {
        "hidden_states": x, "w13": w13.packed, "w13_global_scale": w13.global_scale, "w2": w2.packed,
        "w2_global_scale": w2.global_scale, **routing, **biases, **gate, "apply_router_weight_on_input": weigh_input,
    }  # fmt: skip

    def check(out: Tensor) -> None:
        weights, ids, expert_map = routing.values()
        order, offsets = reference.route(ids, expert_map, e)
        plain = finite(weights)
        on_input, on_output = (plain, torch.ones_like(plain)) if weigh_input else (None, plain)
        terms = mlp_terms(x, dtype, w13, w2, order, offsets, on_input, gate, biases)
        expected = reference.combine(terms.rows, on_output, ids, expert_map, e)
        error = reference.combine(terms.errors, on_output.abs(), ids, expert_map, e)
        local = reference.local_experts(ids, expert_map, e)
        used = local < e
        hostile = torch.cat((w13.hostile | w2.hostile, torch.zeros(1, dtype=torch.bool)))[local].any(1)
        unclear = skip | hostile | terms.overflow.view(tokens, top_k).any(1)
        compare(out, expected, error, unclear, bad & used.any(1))

    return Case("moe", arguments, check if moderate else None)


def batched_moe(r: Random) -> Case:
    e, k, i = r.randint(1, 5), r.size(16, 10), r.size(16, 6)
    t = r.choice((0, 1, 1, 2, 5, 9, 17, 40, 150))
    dtype = r.choice((BF16, FP16, FP32))
    w13, w2, biases, gate, moderate = make_experts(r, e, k, i)
    x, bad, extreme = make_x(r, e * t, k, dtype)
    counts = torch.tensor([r.choice((0, 1, t, r.randint(0, t))) if t else 0 for _ in range(e)], dtype=torch.int32)
    expert_of_row = torch.arange(e).repeat_interleave(t)
    used = torch.arange(t).repeat(e) < counts[expert_of_row]
    x[~used] = r.choice((0.0, NAN, INF))
    error = None
    if r.chance(0.15):
        at, count = r.randrange(e), r.choice((INT_MIN, INT_MAX, -1, t + 1))
        counts[at] = count
        error = f"expert_num_tokens must be from 0 to T = {t}, got {count} at index {at}"
    arguments = {
        "hidden_states": x.view(e, t, k), "w13": w13.packed, "w13_global_scale": w13.global_scale, "w2": w2.packed,
        "w2_global_scale": w2.global_scale, "expert_num_tokens": counts, **biases, **gate,
    }  # fmt: skip

    def check(out: Tensor) -> None:
        rows = out.view(e * t, k)
        behind = rows[~used]
        clean_rest = bool((behind == 0).all()) or bool((behind == UNWRITTEN).all())
        require(clean_rest, "rows behind the counts are neither zeros nor what the buffer held")
        order = torch.cat((used.nonzero(), (~used).nonzero())).flatten().int()
        offsets = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
        terms = mlp_terms(x, dtype, w13, w2, order, offsets, None, gate, biases)
        unclear = extreme | terms.overflow | (w13.hostile | w2.hostile)[expert_of_row] | ~used
        compare(rows, terms.rows, terms.errors, unclear, bad & used)

    return Case("batched_moe", arguments, check if moderate else None, error)


def out_of(make: Callable[[Random], Case]) -> Callable[[Random], Case]:
    """The out overload of an op whose result is as its hidden_states."""

    def make_out(r: Random) -> Case:
        case = make(r)
        out = torch.full_like(case.arguments["hidden_states"], UNWRITTEN)
        return Case(f"{case.op}.out", {**case.arguments, "out": out}, case.check, case.value_error)

    return make_out


def backward_of(make: Callable[[Random], Case]) -> Callable[[Random], Case]:
    """The op's derivative: that kernel and fake agree, and that nothing outside the tensors is touched."""

    def make_backward(r: Random) -> Case:
        case = make(r)
        arguments = dict(case.arguments)
        on_meta = {name: a.to("meta") if isinstance(a, Tensor) else a for name, a in arguments.items()}
        shape = getattr(torch.ops.nvfp4, case.op)(**on_meta).shape
        x = next(iter(arguments.values()))
        grad = make_x(r, math.prod(shape[:-1]), shape[-1], x.dtype)[0].view(shape)
        if case.op == "linear":
            kept = {name: arguments[name] for name in ("weight", "global_scale")}
            arguments = {"grad_output": grad, **kept, "in_features": x.shape[-1]}
        elif case.op == "swiglu":
            arguments = {"grad_output": grad, **arguments}
        else:
            first, weights = ("hidden_states" if case.op == "moe" else "x"), arguments.get("topk_weights")
            wants = {f"needs_{first}": r.chance(0.8), "needs_topk_weights": weights is not None and r.chance(0.6)}
            arguments = {"grad_output": grad, **arguments, **wants}
        return Case(f"{case.op}_backward", arguments, None, case.value_error)

    return make_backward


def route(r: Random) -> Case:
    e, tokens, top_k = r.choice((1, 2, 5, 60)), r.choice((0, 1, 3, 17, 300)), r.choice((0, 1, 2, 5))
    routing = make_routing(r, tokens, top_k, e)
    arguments = {"topk_ids": routing["topk_ids"], "expert_map": routing["expert_map"], "num_experts": e}

    def check(out: tuple[Tensor, Tensor]) -> None:
        for got, wanted in zip(out, reference.route(*arguments.values()), strict=True):
            require(torch.equal(got, wanted), "expected", wanted.tolist(), "got", got.tolist())

    return Case("route", arguments, check)


def bad_routing(order: list[int], offsets: list[int]) -> str | None:
    """The rule that it breaks."""
    if offsets[0] != 0 or sorted(offsets) != offsets or offsets[-1] > len(order):
        return "offsets must begin with 0, not decrease and not exceed the"
    return None if sorted(order) == list(range(len(order))) else "order must hold every slot from 0 to"


def grouped_gemm(r: Random) -> Case:
    gated, swiglu = r.chance(0.5), r.chance(0.5)
    e, k, n = r.randint(1, 5), r.size(16, 10), r.size(32, 5)
    rows, per_row = r.choice((0, 1, 2, 5, 17, 150)), r.choice((0, 1, 1, 2, 3))
    dtype = r.choice((BF16, FP16, FP32))
    weight = make_weight(r, e, n, k, gated or swiglu)
    x, bad, extreme = make_x(r, rows, k, dtype)
    routing = make_routing(r, rows, per_row, e)
    order, offsets = torch.ops.nvfp4.route(routing["topk_ids"], routing["expert_map"], e)
    for _ in range(r.choice((0, 0, 0, 1, 2))):
        changed = order if r.chance(0.5) and order.numel() else offsets
        value = r.choice((INT_MIN, INT_MAX, -1, 0, 1, order.numel(), order.numel() - 1, order.numel() + 1))
        changed[r.randrange(changed.numel())] = value
    weights = routing["topk_weights"] if r.chance(0.3) else None
    skip = extreme | (spoil_weights(r, weights) if weights is not None else extreme)
    gate, moderate = make_gate(r) if swiglu else ({}, True)
    arguments = {
        "x": x, "weight": weight.packed, "global_scale": weight.global_scale, "order": order, "offsets": offsets,
        "topk_weights": weights, **gate,
    }  # fmt: skip

    def check(out: Tensor) -> None:
        plain, clean = None if weights is None else finite(weights), finite(x)
        expected = reference.grouped_gemm(clean, weight.dense, order, offsets, plain)
        error = reference.grouped_gemm(input_error(clean, dtype), weight.dense.abs(), order, offsets, plain).abs()
        used, hostile = torch.zeros(len(order), dtype=torch.bool), torch.zeros(len(order), dtype=torch.bool)
        for expert in range(e):
            own = order[offsets[expert] : offsets[expert + 1]].long()
            used[own], hostile[own] = True, bool(weight.hostile[expert])
        slot_rows = torch.arange(len(order)) // max(per_row, 1)
        if swiglu:
            expected, error = reference.swiglu(expected, **gate), gated_error(expected, error, gate)
        compare(out, expected, error, skip[slot_rows] | hostile, bad[slot_rows] & used)

    error = bad_routing(order.tolist(), offsets.tolist())
    return Case("grouped_gemm_swiglu" if swiglu else "grouped_gemm", arguments, check if moderate else None, error)


def combine(r: Random) -> Case:
    e, n = r.randint(1, 5), r.choice((0, 1, 7, 16, 1030))
    tokens, top_k = r.choice((0, 1, 3, 17, 70)), r.choice((0, 1, 2, 5))
    dtype = r.choice((BF16, FP16, FP32))
    routing = make_routing(r, tokens, top_k, e)
    x, bad, extreme = make_x(r, tokens * top_k, n, dtype) if n else (torch.zeros(tokens * top_k, 0), *[None] * 2)
    skip = spoil_weights(r, routing["topk_weights"])
    arguments = {"x": x, **routing, "num_experts": e}

    def check(out: Tensor) -> None:
        weights, ids, expert_map = routing.values()
        clean, plain = finite(x), finite(weights)
        expected = reference.combine(clean, plain, ids, expert_map, e)
        error = 1e-6 * reference.combine(clean.abs(), plain.abs(), ids, expert_map, e)
        used = reference.local_experts(ids, expert_map, e) < e
        unclear = skip
        if bad is not None and extreme is not None:
            unclear = unclear | ((bad | extreme).view(tokens, top_k) & used).any(1)
        compare(out, expected, error, unclear)

    return Case("combine", arguments, check)


def linear(r: Random) -> Case:
    k, n, gated = r.size(16, 12), r.size(32, 4), r.chance(0.3)
    dtype = r.choice((BF16, FP16, FP32))
    lead = r.choice(((0,), (1,), (3,), (2, 5), (2, 0, 3), (), (200,)))
    weight = make_weight(r, 1, n, k, gated, batched=False)
    rows = math.prod(lead)
    x, bad, extreme = make_x(r, rows, k, dtype)
    bias = torch.randn(n, generator=r.generator()).to(dtype) if r.chance(0.5) else None
    arguments = {"x": x.view(*lead, k), "weight": weight.packed, "global_scale": weight.global_scale, "bias": bias}

    def check(out: Tensor) -> None:
        clean = finite(x)
        expected = reference.linear(clean, weight.dense[0], bias)
        error = reference.linear(input_error(clean, dtype), weight.dense[0].abs())
        skip = extreme | weight.hostile.expand(rows)
        compare(out.view(rows, n), expected, error, skip, bad)

    return Case("linear", arguments, check)


def swiglu(r: Random) -> Case:
    i, lead = r.choice((1, 3, 16, 100)), r.choice(((0,), (1,), (3,), (2, 5), (), (40,)))
    dtype = r.choice((BF16, FP16, FP32))
    rows = math.prod(lead)
    x, bad, extreme = make_x(r, rows, 2 * i, dtype)
    gate, moderate = make_gate(r)

    def check(out: Tensor) -> None:
        expected = reference.swiglu(finite(x), **gate)
        compare(out.view(rows, i), expected, 1e-5 * expected.abs(), bad | extreme)

    return Case("swiglu", {"gate_up": x.view(*lead, 2 * i), **gate}, check if moderate else None)


def pack(r: Random) -> Case:
    e, n, k, gated = r.choice((None, 0, 1, 3)), r.size(32, 3), r.size(16, 9), r.chance(0.5)
    lead = () if e is None else (e,)
    generator = r.generator()
    codes = torch.randint(0, 256, (*lead, n, k // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 0x7F, (*lead, n, k // 16), dtype=torch.uint8, generator=generator)
    error = None
    if scales.numel() and r.chance(0.2):
        scales.view(-1)[r.randrange(scales.numel())] = byte = r.choice((0x7F, 0xFF))
        error = f"scale must hold finite E4M3 values, got NaN (byte 0x{byte:02X}) at index"

    def check(packed: Tensor) -> None:
        if e == 0:
            return
        back = torch.ops.nvfp4.unpack(packed, k, gated)
        require(torch.equal(back[0], codes) and torch.equal(back[1], scales), "unpack gives other bytes than pack took")

    scale = scales.view(torch.float8_e4m3fn) if r.chance(0.5) else scales
    return Case("pack", {"weight": codes, "scale": scale, "gated": gated}, check, error)


def unpack(r: Random) -> Case:
    e, n, k, gated = r.choice((None, 1, 3)), r.size(32, 3), r.size(16, 9), r.chance(0.5)
    rows = (2, n // 2) if gated else (n,)
    shape = (*(() if e is None else (e,)), *rows, math.ceil(k / 64), 36)
    packed = torch.randint(0, 256, shape, dtype=torch.uint8, generator=r.generator())

    def check(out: tuple[Tensor, Tensor]) -> None:
        codes, scales = out
        if bool(((scales & 0x7F) == 0x7F).any()) or k % 64:
            return
        require(torch.equal(torch.ops.nvfp4.pack(codes, scales, gated), packed), "pack gives other bytes")

    return Case("unpack", {"packed": packed, "in_features": k, "gated": gated}, check)


MAKERS = (
    moe, moe, moe, out_of(moe), batched_moe, batched_moe, out_of(batched_moe), route, grouped_gemm, grouped_gemm,
    grouped_gemm, combine, linear, swiglu, pack, unpack, backward_of(moe), backward_of(moe), backward_of(grouped_gemm),
    backward_of(linear), backward_of(swiglu),
)  # fmt: skip
