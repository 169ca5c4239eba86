"""Runs every ``case_*`` of a few modules on several processes, with gloo on the CPU or with NCCL on GPUs."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
TIMEOUT = 60  # seconds that a rank waits for another in a collective


def run_ranks(modules: Sequence[Path], ranks: int, device: str, folder: Path) -> tuple[list[str], list[str]]:
    """(the cases that ran, the tracebacks of those that failed with case and rank).

    A case whose name ends with a number runs with that many ranks only. After a failure the others do not run.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "RANKS_DEVICE": device,
            "PYTHONPATH": os.pathsep.join([str(PACKAGE), str(PACKAGE / "tests"), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        environment.pop("TORCH_NVFP4_BACKEND", None)
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "helpers.ranks", str(folder / f"{rank}.json"), *map(str, modules)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    failed = [
        f"{case} on rank {rank} of {ranks}:\n{text}"
        for rank, result in enumerate(results)
        for case, text in result.items()
        if text
    ]
    return list(results[0]), failed


def _cases(paths: Sequence[str], ranks: int) -> Iterator[tuple[str, Callable[[], None]]]:
    for path in paths:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, case in list(vars(module).items()):  # a case may import
            wanted = name.rpartition("_")[2]
            if name.startswith("case_") and (not wanted.isdigit() or int(wanted) == ranks):
                yield name, case


def main(output: str, *paths: str) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    backend = "gloo"
    if os.environ["RANKS_DEVICE"] == "cuda":
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=TIMEOUT))
    result = {}
    for name, case in _cases(paths, distributed.get_world_size()):
        try:
            case()
            result[name] = ""
        except BaseException:
            result[name] = traceback.format_exc()
            break  # the other ranks may be somewhere else
    Path(output).write_text(json.dumps(result))
    if any(result.values()):
        os._exit(0)  # without waiting for the others
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
