"""Runs every ``case_*`` of a few modules on several processes, with gloo on the CPU or with NCCL on GPUs."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.util
import json
import os
import signal
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
    environment = os.environ | {
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "RANKS_DEVICE": device,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE), str(PACKAGE / "tests"), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    environment.pop("TORCH_NVFP4_BACKEND", None)
    each: list[dict[str, str]] = [{}]  # one process, which forks the ranks
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:  # a process that forks may have touched the driver
        each = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    command = [sys.executable, "-m", "helpers.ranks", str(folder), *map(str, modules)]
    processes = [
        subprocess.Popen(command, env=environment | one, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for one in each
    ]
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            kill_group(process)
    written = {rank: folder / f"{rank}.json" for rank in range(ranks)}
    results = {rank: json.loads(path.read_text()) for rank, path in written.items() if path.exists()}
    failed = [
        f"{case} on rank {rank} of {ranks}:\n{text}"
        for rank, result in results.items()
        for case, text in result.items()
        if text
    ]
    # A rank that waits for one that failed ends by its collective's timeout: what failed is said first.
    codes = [process.returncode for process in processes]
    assert codes == [0] * len(processes), "\n".join([*failed, *errors])
    return list(results[0]), failed


def kill_group(process: subprocess.Popen[str]) -> None:
    """A process of a session of its own, and what it has forked, as far as they are still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def fork_ranks(ranks: int) -> None:
    """Returns in each of as many children, with $RANK and $LOCAL_RANK set; here it ends with 1 if one of them fails.

    What this process has imported, which takes longest, need not be imported by each.
    """
    gc.freeze()  # the children need not look through what is there already
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(int(any(codes)))


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


def main(folder: str, *paths: str) -> None:
    import torch
    import torch._dynamo
    from torch import distributed

    import torch_nvfp4.distributed  # noqa: F401

    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        fork_ranks(int(os.environ["WORLD_SIZE"]))
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
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    if any(result.values()):
        os._exit(0)  # without waiting for the others
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
