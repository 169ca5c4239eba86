"""A mutation fuzzer for the checkpoint reader: ``python tests/fuzz_checkpoints.py --cases 100000 --seed 0``.

Each case takes a small checkpoint of one layout, changes bytes, JSON values, header fields, names or files of it, and
opens, summarises and loads it. Allowed are a CheckpointError whose text is one printable paragraph, and success with
the values that an independent fp64 decoder reads from the same files. Anything else is a failure, as is a case that
takes seconds, or memory beyond twice its files and a constant. A failing case is told by its number, which gives the
same case again (``--first N --cases 1``).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from helpers.fp64_loop import experts_of, raw_tensors
from torch_nvfp4.checkpoint import Checkpoint, CheckpointError, variants, write_checkpoint
from torch_nvfp4.checkpoint.synthetic import LayoutName
from torch_nvfp4.format import dequantize
from torch_nvfp4.quant_config import MoEQuantConfig

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
}
SECONDS_PER_CASE = 2.0
CONSTANT_BYTES = 2**20  # of Python objects beside twice the files
SECONDS_PER_LINE = 5.0
RESIDENT_BYTES = 64 * 2**20  # by which the process may grow over all cases

NUMBERS = [
    *(
        0,
        1,
        -1,
        2,
        3,
        16,
        17,
        255,
        10**6,
        10**6 + 1,
        2**31 - 1,
        2**31,
        10**11,
        10**12,
        2**63 - 1,
        2**63,
        10**30,
        10**400,
    ),
    *(0.0, -0.0, 0.5, 1.5, 1e-45, 1e-320, 3.5e38, 1e308, float("inf"), float("-inf"), float("nan")),
]
NAMES = [
    *(
        "",
        ".",
        "..",
        "a.b",
        "x" * 2000,
        "mtp",
        "mtp.0",
        "layers.0",
        "experts.0.w1",
        "layers.0.experts.999999.w1.weight",
    ),
    *(
        "\x1b]0;owned\x07\x1b[31mx",
        "[/red]x",
        "\ud800",
        "a\nb",
        "\u202eabc",
        "\0",
        "é",
        "layers." * 200,
        "__metadata__",
    ),
    *(
        "U8",
        "F8_E4M3",
        "F32",
        "BF16",
        "I8",
        "F8_E8M0",
        "F4",
        "C64",
        "BOOL",
        "silu",
        "gelu",
        "swigluoai",
        "llama4",
        "gpt_oss",
        "relu2",
        "situ",
        "nemotron_h",
    ),
]
CONFIG_KEYS = [
    *("model_type", "hidden_act", "hidden_activation", "num_hidden_layers", "hidden_size", "moe_intermediate_size"),
    *(
        "num_experts",
        "n_routed_experts",
        "num_local_experts",
        "moe_num_experts",
        "num_experts_per_tok",
        "top_k_experts",
    ),
    *("num_nextn_predict_layers", "swiglu_limit", "swiglu_limits", "expert_swiglu_limit_list", "swiglu_alpha"),
    *("swiglu_beta", "apply_router_weight_on_input", "text_config", "thinker_config", "quantization_config"),
    *("mlp_hidden_act", "moe_latent_size", "routed_expert_hidden_size", "activation_situ_beta"),
    *("mlp_clamp", "swiglu_limits_shared", "quant_method", "quant_algo", "moe_quant_algo"),
]


class Base(NamedTuple):
    layout: str
    files: dict[str, bytes]


class _Slow(BaseException):
    pass


def make_bases(scratch: Path) -> list[Base]:
    """A checkpoint of two layers in every layout, without the tensors that are neither experts nor a linear."""
    bases = []
    for number, layout in enumerate(get_args(LayoutName)):
        path = write_checkpoint(scratch / layout, layout=layout, num_hidden_layers=2, seed=number, **SIZES)
        kept = {
            name: tensor.contiguous()
            for name, tensor in raw_tensors(path).items()
            if any(part in name for part in (".experts.", ".moe.", "q_proj.", "k_scale", "q_norm", "router."))
            and "mtp" not in name
        }
        first = {name: tensor for name, tensor in kept.items() if "layers.1." not in name}
        second = {name: tensor for name, tensor in kept.items() if name not in first}
        for file in path.glob("*.safetensors"):
            file.unlink()
        save_file(first, path / "a.safetensors")
        save_file(second, path / "b.safetensors")
        index = {"weight_map": dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")}
        (path / INDEX).write_text(json.dumps(index))
        bases.append(_read(layout, path))
        if layout == "modelopt":
            variants.move_to_overlay(path, [name for name in kept if "experts.1." in name])
            bases.append(_read(layout, path))
            variants.add_leaves(path, ".pre_quant_scale", lambda module, codes: torch.ones(2 * codes.shape[-1]))
            variants.add_leaves(path, ".bias", lambda module, codes: torch.ones(1) if "layers.1." in module else None)
            bases.append(_read(layout, path))
    return bases


def _read(layout: str, path: Path) -> Base:
    return Base(layout, {file.name: file.read_bytes() for file in path.iterdir()})


# Mutations: each changes the files of a case.

Files = dict[str, "bytes | Callable[[Path], object]"]


def hostile(rng: random.Random, depth: int = 0) -> Any:
    choice = rng.randrange(9 if depth < 2 else 6)
    if choice < 3:
        return rng.choice(NUMBERS)
    if choice < 4:
        return rng.choice(NAMES)
    if choice < 6:
        return rng.choice([None, True, False, [], {}])
    if choice < 8:
        return [hostile(rng, depth + 1) for _ in range(rng.choice([1, 2, 3, 40]))]
    return {rng.choice(NAMES + CONFIG_KEYS): hostile(rng, depth + 1) for _ in range(2)}


def mutate_bytes(rng: random.Random, files: Files) -> None:
    names = [name for name, content in files.items() if isinstance(content, bytes)]
    if not names:
        return
    name = rng.choice(names)
    content = bytearray(files[name])  # type: ignore[arg-type]
    # Most of a shard is values; half of the changes go to its header.
    reach = min(len(content), 3000) if rng.random() < 0.5 else len(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(max(reach, 1))
        kind = rng.randrange(5)
        if kind == 0 and content:
            content[min(at, len(content) - 1)] = rng.randrange(256)
        elif kind == 1:
            content[at:at] = rng.randbytes(rng.choice([1, 4, 16]))
        elif kind == 2:
            del content[at : at + rng.choice([1, 4, 100])]
        elif kind == 3:
            del content[rng.choice([0, 4, 8, at]) :]
        else:
            content += rng.randbytes(rng.choice([1, 16]))
    files[name] = bytes(content)


def split_shard(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_shard(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutate_value(rng: random.Random, files: Files) -> None:
    """Somewhere in the JSON of a config, the index or a header: another value, no value, another or a second key."""
    names = [name for name, content in files.items() if isinstance(content, bytes)]
    if not names:
        return
    name = rng.choice(names)
    content = files[name]
    try:
        root, data = split_shard(content) if name.endswith(".safetensors") else (json.loads(content), None)  # type: ignore[arg-type]
    except (ValueError, struct.error):
        return
    if not isinstance(root, dict | list):  # an earlier mutation has cut the file down to a number
        return
    place = root
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.85:
            place = place[key]
            continue
        break
    kind = rng.randrange(6)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[rng.choice(NAMES)] = place.pop(key)
    elif kind == 2 and isinstance(place, list):
        place[:] = place * rng.choice([2, 1000])
    else:
        place[key] = hostile(rng)
    text = json.dumps(root)
    if kind == 3 and isinstance(place, dict):
        text = text.replace(f"{json.dumps(key)}:", f"{json.dumps(key)}: 1, {json.dumps(key)}:", 1)
    files[name] = text.encode() if data is None else struct.pack("<Q", len(text)) + text.encode() + data


def mutate_config(rng: random.Random, files: Files) -> None:
    if not isinstance(files.get(CONFIG), bytes):
        return
    try:
        config = json.loads(files[CONFIG])  # type: ignore[arg-type]
        section = config.get("text_config", config) if rng.random() < 0.7 else config
        section[rng.choice(CONFIG_KEYS)] = hostile(rng)
        files[CONFIG] = json.dumps(config).encode()
    except (ValueError, AttributeError, TypeError):
        return


def mutate_name(rng: random.Random, files: Files) -> None:
    """Renames a tensor in its shard and in the index, wholly or in one part."""
    try:
        index = json.loads(files[INDEX])  # type: ignore[arg-type]
        name = rng.choice(list(index["weight_map"]))
        shard = index["weight_map"].pop(name)
        header, data = split_shard(files[shard])  # type: ignore[arg-type]
        parts = name.split(".")
        parts[rng.randrange(len(parts))] = rng.choice(
            [*NAMES, "experts", "moe", "layers", "0", "7", "w1", "gate_up_proj"]
        )
        new = rng.choice(NAMES) if rng.random() < 0.2 else ".".join(parts)
        header[new] = header.pop(name)
        index["weight_map"][new] = shard
        files[shard], files[INDEX] = join_shard(header, data), json.dumps(index).encode()
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, struct.error):
        return  # an earlier mutation left no such name, or a list in the place of the map


def mutate_tensor(rng: random.Random, files: Files) -> None:
    """Another dtype, shape or kind of a tensor that still fits its bytes."""
    name = rng.choice(["a.safetensors", "b.safetensors"])
    try:
        header, data = split_shard(files[name])  # type: ignore[arg-type]
        entry = header[rng.choice(list(header))]
        shape = entry["shape"]
        kind = rng.randrange(5)
        if kind == 0:
            entry["dtype"] = rng.choice(["U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL", "BF16", "F32", "F4"])
        elif kind == 1:
            entry["shape"] = shape[::-1]
        elif kind == 2:
            entry["shape"] = [1, *shape] if rng.random() < 0.5 else [*shape, 1]
        elif kind == 3 and len(shape) > 1:
            entry["shape"] = [shape[0] * shape[1], *shape[2:]]
        elif shape and shape[0] % 2 == 0:
            entry["shape"] = [2, shape[0] // 2, *shape[1:]]
        files[name] = join_shard(header, data)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error):
        return


def mutate_file(rng: random.Random, files: Files) -> None:
    name = rng.choice(list(files))
    kind = rng.randrange(8)
    if kind == 0:
        files[name] = lambda file: file.mkdir()
    elif kind == 1:
        files[name] = lambda file: os.mkfifo(file)
    elif kind == 2:
        files[name] = lambda file: file.symlink_to(file.name)
    elif kind == 3:
        files[name] = lambda file: file.symlink_to("nowhere")
    elif kind == 4:
        files[name] = lambda file: file.symlink_to("/dev/zero")
    elif kind == 5:
        files[name] = lambda file: (file.touch(), os.truncate(file, 2**33))
    elif kind == 6:
        files[name] = rng.choice(list(files.values()))
    else:
        del files[name]


MUTATIONS = [mutate_bytes, mutate_value, mutate_value, mutate_config, mutate_name, mutate_tensor, mutate_file]


def make_case(bases: list[Base], seed: int, number: int) -> tuple[str, Files]:
    rng = random.Random(f"{seed} {number}")
    base = rng.choice(bases)
    files: Files = dict(base.files)
    if rng.random() < 0.1:
        del files[INDEX]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        rng.choice(MUTATIONS)(rng, files)
        if not files:
            break
    return base.layout, files


# What a case does, and what is allowed.


def write_case(path: Path, files: Files) -> int:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name, content in files.items():
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        else:
            content(path / name)
    return sum(len(content) for content in files.values() if isinstance(content, bytes))


def exercise(path: Path, layout: str, kinds: collections.Counter[str]) -> None:
    """Opens and loads; CheckpointError is checked and counted, everything else goes through."""
    checkpoint = attempt(kinds, "open", lambda: Checkpoint.open(path))
    if checkpoint is None:
        return
    attempt(kinds, "summary", checkpoint.summary)
    attempt(kinds, "config", lambda: MoEQuantConfig.from_config(checkpoint.config))
    attempt(kinds, "top_k", lambda: checkpoint.top_k)
    refused = {refusal.what for refusal in checkpoint.refusals()}
    for layer in checkpoint.layers[:2]:
        attempt(kinds, "layer_config", lambda layer=layer: checkpoint.layer_config(layer))
        weights = attempt(kinds, "experts", lambda layer=layer: checkpoint.experts(layer))
        attempt(
            kinds, "slice", lambda layer=layer: checkpoint.experts(layer, tp_rank=1, tp_size=2, ep_rank=1, ep_size=2)
        )
        if weights is not None:
            # gpt-oss's model type makes fused rows alternate, which the loop does not ask for.
            if checkpoint._model.interleaves_gate_and_up and layout != "gpt-oss":
                kinds["values: read as gpt-oss's"] += 1
            else:
                compare(path, layout, layer, weights, kinds)
            assert f"layer {layer}" not in refused or not is_gate_sound(checkpoint, layer), "refusals: what loads"
    for name in checkpoint.linears[:2]:
        attempt(kinds, "linear", lambda name=name: checkpoint.linear(name))
    name = next(iter(checkpoint.tensors))
    attempt(kinds, "tensor", lambda: checkpoint.tensor(name))


def is_gate_sound(checkpoint: Checkpoint, layer: int) -> bool:
    try:
        checkpoint.gate(layer)
    except CheckpointError:
        return False
    return True


def attempt(kinds: collections.Counter[str], what: str, call: Callable[[], Any]) -> Any:
    try:
        result = call()
    except CheckpointError as error:
        text = str(error)
        assert text, "an error without words"
        assert text.isprintable(), f"an error that is not printable: {text!r}"
        assert len(text) <= 2000, "an error of more than 2000 characters"
        assert "expected" in text, f"an error without 'expected': {text}"
        assert "got" in text, f"an error without 'got': {text}"
        assert "as it was when it was opened" not in text, f"a wrong statement: {text}"
        assert "safetensors library" not in text, f"opened, and cannot be read: {text}"
        kinds[f"{what}: refused"] += 1
        return None
    kinds[f"{what}: success"] += 1
    return result


def compare(path: Path, layout: str, layer: int, weights: Any, kinds: collections.Counter[str]) -> None:
    """The values against the independent decoder, where the experts still stand under the names of the layout."""
    w13, w2 = weights.w13, weights.w2
    num, intermediate = w2.data.shape[0], w13.data.shape[1] // (2 if weights.gated else 1)
    try:
        tensors = raw_tensors(path) if (path / INDEX).exists() else all_tensors(path)
        expected = experts_of(tensors, layout, layer, num, intermediate)
    except (KeyError, IndexError, RuntimeError, ValueError, OSError, SafetensorError):
        kinds["values: under other names"] += 1
        return
    gate_up, down = dequantize(w13, torch.float64), dequantize(w2, torch.float64)
    for expert, (gate, up, last, *biases) in enumerate(expected):
        first = up if gate is None else torch.cat((gate, up))
        for actual, wanted in ((gate_up[expert], first), (down[expert], last)):
            assert actual.shape == wanted.shape, f"shape {list(actual.shape)}, expected {list(wanted.shape)}"
            # compressed-tensors stores a reciprocal, which is rounded to fp32.
            assert torch.allclose(actual, wanted, rtol=2e-7, atol=0.0), f"values of expert {expert} of layer {layer}"
        compare_biases(weights, expert, biases)
    kinds["values: equal"] += 1
    kinds[f"values: equal ({layout})"] += 1


def compare_biases(weights: Any, expert: int, biases: list[torch.Tensor | None]) -> None:
    """Those of the loop, none where it has none."""
    gate, up, down = biases
    first = None if gate is None or up is None else torch.cat((gate, up))
    for name, read, wanted in (("w13_bias", weights.w13_bias, first), ("w2_bias", weights.w2_bias, down)):
        if wanted is not None:
            assert read is not None, f"no {name}"
            assert torch.equal(read[expert].double(), wanted), f"{name} of expert {expert}"


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def run_case(path: Path, layout: str, files: Files, kinds: collections.Counter[str], *, trace: bool) -> float:
    """Seconds of the case. AssertionError or another exception: it failed."""
    nbytes = write_case(path, files)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if trace:
        tracemalloc.start()
    signal.setitimer(signal.ITIMER_REAL, 20 * SECONDS_PER_CASE)
    started = time.perf_counter()
    try:
        exercise(path, layout, kinds)
    finally:
        seconds = time.perf_counter() - started
        signal.setitimer(signal.ITIMER_REAL, 0)
        peak = tracemalloc.get_traced_memory()[1] if trace else 0
        tracemalloc.stop()
    assert seconds < SECONDS_PER_CASE * (10 if trace else 1), f"{seconds:.1f} seconds"
    # tracemalloc sees Python's objects, getrusage the tensors too.
    assert peak <= 2 * nbytes + CONSTANT_BYTES, f"{peak} bytes of Python objects for files of {nbytes}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown <= 2 * nbytes + RESIDENT_BYTES, f"{grown} more bytes of memory for files of {nbytes}"
    return seconds


def fuzz(
    *, cases: int, seed: int, seconds: float = float("inf"), first: int = 0, keep: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Runs cases until their number or the time is reached; raises AssertionError at the first that fails.

    ``tell`` is called with a line of progress every few seconds.
    """

    def slow(*_: object) -> None:
        raise _Slow

    previous = signal.signal(signal.SIGALRM, slow)
    warnings.simplefilter("ignore")
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    scratch = Path(tempfile.mkdtemp(prefix="fuzz_checkpoints_", dir=folder))
    kinds: collections.Counter[str] = collections.Counter()
    started, total, worst, number = time.perf_counter(), 0.0, 0.0, first
    told = started
    try:
        bases = make_bases(scratch)
        for number in range(first, first + cases):
            if time.perf_counter() - started > seconds:
                number -= 1
                break
            if time.perf_counter() - told >= SECONDS_PER_LINE:
                told = time.perf_counter()
                tell(f"{number - first} of {cases} cases in {told - started:.0f} s, at most {worst * 1e3:.0f} ms each")
            layout, files = make_case(bases, seed, number)
            try:
                took = run_case(scratch / "case", layout, files, kinds, trace=number % 50 == 0)
            except (Exception, _Slow) as error:
                keep = True
                got = f"{type(error).__name__}: {error}"
                raise AssertionError(f"seed {seed}, case {number} ({layout}, {scratch / 'case'}): {got}") from error
            if number % 50:
                total, worst = total + took, max(worst, took)
    finally:
        signal.signal(signal.SIGALRM, previous)
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)
    done = number + 1 - first
    return {"cases": done, "mean_ms": total / max(done, 1) * 1e3, "worst_ms": worst * 1e3, "outcomes": dict(kinds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--keep", action="store_true", help="leave the last case's files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = fuzz(**vars(arguments), tell=lambda line: print(line, file=sys.stderr, flush=True))
    print(f"{result['cases']} cases, {result['mean_ms']:.2f} ms each, at most {result['worst_ms']:.0f} ms")
    for kind, count in sorted(result["outcomes"].items()):
        print(f"  {kind}: {count}")


if __name__ == "__main__":
    sys.exit(main())
