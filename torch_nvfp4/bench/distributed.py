"""DeepSeek-V4-Flash's MoE layers over the GPUs of a host: tensor and expert parallel beside one GPU.

``python -m torch_nvfp4.bench.distributed`` starts one process for each GPU (``--ranks N`` for another number, with gloo
on a CPU); under torchrun it is one of them. Random weights are written as a checkpoint in the published layout, each
rank reads its own part, and every plan is compared with one GPU and with fp64.

A row's times are of one call of a layer: medians of CUDA graphs of several calls with other tokens and routings, in
turns with one GPU's, of the slowest rank. "Communication" is the share of the time that the ranks' own experts do not
take. Where tokens are sent, the host waits for their numbers, so that these calls are no graph; each rank begins with
an equal part of the tokens. With 4 GPUs the plans run over 2 and 4 of them, with 8 over 2, 4 and 8, all GPUs at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torch_nvfp4 import NVFP4Experts, reference
from torch_nvfp4.bench.cuda import event_seconds
from torch_nvfp4.bench.layer import BenchError, Case, Shape, cases, parse_tokens
from torch_nvfp4.bench.random_model import projections
from torch_nvfp4.bench.transformers import deepseek
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.checkpoint.writer import write_json
from torch_nvfp4.distributed import ExpertsPlan, ParallelExperts, load_experts
from torch_nvfp4.testing import TOLERANCE, relative_l2

_CHECKED = 16  # tokens that are compared with one GPU and with fp64
_ONE_LAYERS = 2  # of one GPU, which keeps them beside its parts
_TINY = deepseek.Sizes(hidden=64, intermediate=128, experts=6, top_k=2)


@dataclass(frozen=True)
class Split:
    """A way to split a layer: the mesh has the groups that do the same as its first dimension."""

    name: str
    ranks: int
    mesh: DeviceMesh
    plan: ExpertsPlan

    @property
    def sends_tokens(self) -> bool:
        return self.plan.tokens == "sharded"


@dataclass
class Row:
    """Seconds of one call. local: of the slowest rank's experts alone, None where tokens are sent. layers: how many
    the calls take turns among."""

    split: str
    ranks: int
    layers: int
    tokens: int
    seconds: float
    one: float
    local: float | None

    def __str__(self) -> str:
        share = "" if self.local is None else f"{max(0.0, 1 - self.local / self.seconds):14.0%}"
        times = f"{self.seconds * 1e6:10.1f}{self.one * 1e6:12.1f}{self.one / self.seconds:9.2f}"
        return f"{self.split:22}{self.ranks:6}{self.layers:7}{self.tokens:8}{times}{share}"


_HEAD = f"{'':22}{'ranks':>6}{'layers':>7}{'tokens':>8}{'us':>10}{'one, us':>12}{'faster':>9}{'communication':>14}"


def splits(device: str, ranks: int) -> Iterator[Split]:
    """Over 2, 4, ... of the ranks, as often as they fit, and over all of them."""
    sizes = [size for size in (2, 4, 8, 16, 32, 64) if size < ranks and ranks % size == 0]
    for size in [*sizes, ranks]:
        line = init_device_mesh(device, (ranks // size, size), mesh_dim_names=("copies", "ranks"))
        yield Split("tensor", size, line, ExpertsPlan(tp="ranks"))
        yield Split("experts", size, line, ExpertsPlan(ep="ranks"))
        if size >= 4 and size % 2 == 0:
            square = init_device_mesh(device, (ranks // size, size // 2, 2), mesh_dim_names=("copies", "ep", "tp"))
            yield Split("experts x tensor 2", size, square, ExpertsPlan(ep="ep", tp="tp"))
        yield Split("experts, tokens sent", size, line, ExpertsPlan(ep="ranks", tokens="sharded"))


def write_layers(path: Path, sizes: deepseek.Sizes, device: torch.device) -> None:
    """The experts of some layers, in shards that the ranks write in turns; nothing else of the model."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    matrices = (
        ("w1", sizes.intermediate, sizes.hidden, 1.5 * sizes.limit),  # a quarter of the gate's values clamp
        ("w3", sizes.intermediate, sizes.hidden, 0.75 * sizes.limit),
        ("w2", sizes.hidden, sizes.intermediate, 1.0),
    )
    weight_map: dict[str, str] = {}
    for number, (layer, (name, rows, columns, gain)) in enumerate(
        (layer, matrix) for layer in range(sizes.layers) for matrix in matrices
    ):
        if number % world != rank:
            continue
        generator = torch.Generator(device).manual_seed(number)
        module = f"layers.{layer}.ffn.experts.{{}}.{name}"
        shard = dict(projections(sizes.experts, rows, columns, module, generator, gain))
        file = f"model-{number:05}.safetensors"
        save_file({key: value.contiguous() for key, value in shard.items()}, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    gathered: list[Any] = [None] * world
    distributed.all_gather_object(gathered, weight_map)
    if rank == 0:
        merged = {name: file for part in gathered for name, file in part.items()}
        write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": merged})
        write_json(path / "config.json", deepseek.config_of(sizes))
    distributed.barrier()


class Bench:
    """One rank's side of a run."""

    def __init__(self, checkpoint: Checkpoint, sizes: deepseek.Sizes, device: torch.device, seconds: float) -> None:
        self.checkpoint, self.sizes, self.device, self.seconds = checkpoint, sizes, device, seconds
        self.shape = Shape(sizes.experts, sizes.hidden, sizes.intermediate, sizes.top_k)
        self.dtype = torch.bfloat16
        count = min(_ONE_LAYERS, sizes.layers)
        started = time.perf_counter()
        self.one = [NVFP4Experts.from_checkpoint(checkpoint, layer, device=device) for layer in range(count)]
        self.load_seconds = {"one": (time.perf_counter() - started) / count}
        self.sample = self._cases(_CHECKED, 1)[0]
        self.expected = [layer(*self.sample) for layer in self.one]
        # Sampled layers: the first and the last that one GPU has.
        self.exact = [
            reference.moe(
                self.sample[0], *layer.unpacked_weights(), *self.sample[1:], **layer.quant_config.gate.kwargs()
            )
            for layer in self.one
        ]
        self.errors = {"one": max(map(relative_l2, self.expected, self.exact))}

    def _cases(self, tokens: int, count: int) -> list[Case]:
        source = cases(self.shape, tokens, device=self.device)
        return [
            case._replace(hidden_states=case.hidden_states.to(self.dtype))
            for case, _ in zip(source, range(count), strict=False)
        ]

    def load(self, split: Split) -> list[ParallelExperts]:
        """This rank's part of every layer, or of the first ones where not all fit on every rank's device."""
        fit = torch.tensor(float(self.sizes.layers), device=self.device)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            fit.clamp_(max=0.8 * free * split.ranks / (self.shape.experts * self.shape.expert_bytes))
        distributed.all_reduce(fit, op=distributed.ReduceOp.MIN)
        started = time.perf_counter()
        layers = [
            load_experts(self.checkpoint, layer, split.mesh, split.plan, device=self.device)
            for layer in range(max(1, int(fit)))
        ]
        self.load_seconds[f"{split.name} {split.ranks}"] = (time.perf_counter() - started) / len(layers)
        return layers

    def own(self, split: Split, case: Case) -> Case:
        """This rank's tokens: all of them, or a part where tokens are sent."""
        if not split.sends_tokens:
            return case
        rank, tokens = split.mesh.get_local_rank("ranks"), len(case.hidden_states)
        part = slice(tokens * rank // split.ranks, tokens * (rank + 1) // split.ranks)
        return Case(*(tensor[part] for tensor in case))

    def check(self, split: Split, layers: Sequence[ParallelExperts]) -> None:
        """Raises BenchError for a result that is neither one GPU's nor fp64's, within the op's tolerance."""
        worst = {"one": 0.0, "fp64": 0.0}
        for layer, expected, exact in zip(layers, self.expected, self.exact, strict=False):
            result = layer(*self.own(split, self.sample))
            case = Case(expected, exact, exact)
            mine = self.own(split, case)
            for name, wanted in (("one", mine[0]), ("fp64", mine[1])):
                worst[name] = max(worst[name], relative_l2(result, wanted))
        name = f"{split.name} {split.ranks}"
        self.errors |= {f"{name} against {other}": error for other, error in worst.items()}
        if worst["fp64"] > TOLERANCE[self.dtype]:
            raise BenchError(f"{name}: expected an error of at most {TOLERANCE[self.dtype]}, got {worst['fp64']:g}")

    def time(self, split: Split, layers: Sequence[ParallelExperts], tokens: int) -> Row:
        """One row of the table, the same on every rank."""
        count = 12 if tokens <= 64 else 5 if tokens <= 512 else 3
        inputs = self._cases(tokens, count)
        own = [self.own(split, case) for case in inputs]

        def calls(run: Callable[[int, Case], Tensor], given: Sequence[Case]) -> Callable[[], object]:
            return lambda: [run(number, case) for number, case in enumerate(given)]

        runs = {
            "one": self._graph(calls(lambda n, case: self.one[n % len(self.one)](*case), inputs)),
            "split": calls(lambda n, case: layers[n % len(layers)](*case), own),
        }
        if not split.sends_tokens:
            runs["split"] = self._graph(runs["split"])
            runs["local"] = self._graph(calls(lambda n, case: layers[n % len(layers)].local(*case), own))
        measured: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        rounds, started = 0, time.perf_counter()
        go_on = torch.ones(1, device=self.device)
        while bool(go_on):
            for name, run in runs.items():
                distributed.barrier()
                measured[name].append(self._seconds(run) / count)
            rounds += 1
            # Rank 0's clock, so that all ranks go on or stop together.
            go_on.fill_(rounds < 5 or (rounds < 200 and time.perf_counter() - started < self.seconds))
            distributed.broadcast(go_on, src=0)
        medians = torch.tensor([statistics.median(values) for values in measured.values()], dtype=torch.float64)
        medians = medians.float().to(self.device)
        distributed.all_reduce(medians, op=distributed.ReduceOp.MAX)
        slowest = dict(zip(measured, medians.tolist(), strict=True))
        return Row(
            split.name, split.ranks, len(layers), tokens, slowest["split"], slowest["one"], slowest.get("local")
        )  # fmt: skip

    def _graph(self, run: Callable[[], object]) -> Callable[[], object]:
        """``run`` as a CUDA graph; on a CPU ``run`` itself."""
        if self.device.type != "cuda":
            return run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks for events in a thread of its own meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            kept = run()

        def replay(_: object = (run, kept)) -> None:  # what the graph reads and writes stays alive with it
            graph.replay()

        return replay

    def _seconds(self, run: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return event_seconds(run)
        started = time.perf_counter()
        run()
        return time.perf_counter() - started


@torch.inference_mode()
def measure(args: argparse.Namespace, device: torch.device, path: Path) -> dict[str, Any]:
    """Writes, loads, checks and times; the same result on every rank but for errors and load times."""
    world, first = distributed.get_world_size(), distributed.get_rank() == 0
    layers = args.layers
    sizes = deepseek.Sizes(layers=layers) if not args.tiny else _tiny(layers)
    started = time.perf_counter()
    write_layers(path, sizes, device)
    say(f"wrote {layers} layers in {time.perf_counter() - started:.1f} s")
    bench = Bench(Checkpoint.open(path), sizes, device, args.seconds)
    rows: list[Row] = []
    if first:
        print(_HEAD, flush=True)
    for split in splits(device.type, world):
        parts = bench.load(split)
        bench.check(split, parts)
        for tokens in args.tokens:
            if split.sends_tokens and tokens < split.ranks:
                continue
            rows.append(bench.time(split, parts, tokens))
            if first:
                print(rows[-1], flush=True)
        del parts  # before the next ones are loaded
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if first:
        for name, error in bench.errors.items():
            print(f"error of {name}: {error:.2e}")
        for name, seconds in bench.load_seconds.items():
            print(f"loading a layer's part, {name}: {seconds:.2f} s", flush=True)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "ranks": world,
        "sizes": asdict(sizes),
        "rows": [asdict(row) for row in rows],
        "errors": bench.errors,
        "load_seconds": bench.load_seconds,
    }


def _tiny(layers: int) -> deepseek.Sizes:
    return deepseek.Sizes(**{**asdict(_TINY), "layers": layers})


def say(text: str) -> None:
    """On stderr, from the first rank."""
    if distributed.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m torch_nvfp4.bench.distributed", description=__doc__)
    parser.add_argument("--ranks", type=int, help="processes to start; default: one per GPU")
    layers = "layers to split; the calls take turns among them (default 1)"
    parser.add_argument("--layers", type=int, default=1, help=layers)
    tokens = "rows of the table: numbers of tokens, such as 1,16,128,1024,8192 (the default)"
    parser.add_argument("--tokens", type=parse_tokens, default=(1, 16, 128, 1024, 8192), help=tokens)
    parser.add_argument("--seconds", type=float, default=0.5, help="time of each row (default 0.5)")
    parser.add_argument("--dir", type=Path, help="where the checkpoint goes; default: shared memory, else $TMPDIR")
    parser.add_argument("--json", type=Path, help="file for the rows and what they were measured on")
    parser.add_argument("--tiny", action="store_true", help="a layer of toy size")
    return parser


def _start_ranks(ranks: int, arguments: Sequence[str]) -> None:
    """Goes on as torchrun, which starts this module once for each rank."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    os.execv(sys.executable, [sys.executable, *command, "-m", "torch_nvfp4.bench.distributed", *arguments])


def main(arguments: Sequence[str]) -> int:
    """One rank, or the start of all of them."""
    args = _parser().parse_args(arguments)
    if args.layers < 1:
        raise BenchError(f"expected --layers to be at least 1, got {args.layers}")
    if "RANK" not in os.environ:
        ranks = args.ranks or (torch.cuda.device_count() if torch.cuda.is_available() else 2)
        _start_ranks(ranks, arguments)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # torchrun asks for one thread per rank; reading a checkpoint takes more.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // distributed.get_world_size()))
    folder: list[Any] = [None]
    if distributed.get_rank() == 0:
        shared = Path("/dev/shm")
        folder[0] = tempfile.mkdtemp(dir=args.dir or (shared if shared.is_dir() else None))
    distributed.broadcast_object_list(folder, src=0)
    try:
        result = measure(args, device, Path(folder[0]))
        distributed.barrier()
    finally:
        if distributed.get_rank() == 0:
            shutil.rmtree(folder[0], ignore_errors=True)
    if args.json is not None and distributed.get_rank() == 0:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BenchError as error:
        sys.exit(str(error))
