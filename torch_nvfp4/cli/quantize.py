"""``torch-nvfp4 quantize``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from torch_nvfp4.cli.options import JsonOption
from torch_nvfp4.cli.output import json_writer
from torch_nvfp4.cli.process import failed
from torch_nvfp4.cli.terminal import Steps, Terminal
from torch_nvfp4.cli.wording import count, error, size
from torch_nvfp4.convert import Conversion, LayerError, Progress, open_conversion

_NOTE_SECONDS = 30.0
_LEAST_SECONDS = 1.0  # before that a rate says nothing


SourceArgument = Annotated[
    Path,
    typer.Argument(metavar="SRC", help="A checkpoint in bf16, fp16, fp32, FP8 blocks or MXFP4.", show_default=False),
]
DestinationArgument = Annotated[
    Path, typer.Argument(metavar="DST", help="A new directory, or that of an interrupted run.", show_default=False)
]
LayoutOption = Annotated[
    str, typer.Option("--layout", metavar="NAME", help="What to write: modelopt or compressed-tensors.")
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--include", metavar="GLOB", show_default=False,
        help="Modules to quantize, such as '*.mlp.*_proj'; repeatable. Default: the routed experts.",
    ),
]  # fmt: skip
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="GLOB", show_default=False, help="Modules to leave, of those; repeatable."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=1024, metavar="N", show_default=False, help="Default: one per processor."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Only say what would be written, and whether the disk has room.")
]
VerifyOption = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Read the result back and compare it with SRC.")
]


def command(
    source: SourceArgument,
    destination: DestinationArgument,
    layout: LayoutOption = "modelopt",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    threads: ThreadsOption = None,
    dry_run: DryRunOption = False,
    verify: VerifyOption = True,
    json_file: JsonOption = None,
) -> None:
    """Quantize the experts of a checkpoint to NVFP4 (weights only; activations stay 16-bit).

    Experts in MXFP4 keep their values exactly, or a matrix that NVFP4 cannot hold is an error.

    Router gates, norms, embeddings, attention and lm_head stay as they are; FP8 weights among them become bf16. A run
    that was interrupted, even by SIGKILL, goes on when the same command is given again. Until it is complete DST has no
    config.json, so that nothing loads it. At the end every matrix is read back and compared with SRC; exit code 1 if
    one is further from its source than rounding explains.

    \b
    Examples:
      torch-nvfp4 quantize Qwen3-30B-A3B Qwen3-30B-A3B-NVFP4 --dry-run
      torch-nvfp4 quantize DeepSeek-V3 DeepSeek-V3-NVFP4 --layout compressed-tensors
      torch-nvfp4 quantize SRC DST --exclude 'model.layers.0.*'
    """
    terminal = Terminal(json_file)
    with json_writer(json_file) as write_json:
        conversion = open_conversion(source, destination, layout=layout, include=include, exclude=exclude or ())
        try:
            facts = _facts(conversion, source, destination)
            _print_plan(terminal, facts)
            conversion.check_disk()
            if dry_run:
                write_json(facts | {"dry_run": True})
                return
            started = time.perf_counter()
            errors = _convert(terminal, conversion, threads or os.cpu_count() or 1, verify)
            seconds = time.perf_counter() - started
            layers = [each.to_json() for each in errors]
            write_json(facts | {"dry_run": False, "seconds": seconds, "errors": layers})
        finally:
            conversion.close()
    _print_errors(terminal, errors)
    wrote = f"{size(conversion.nbytes)} in {count(len(conversion.shards), 'shard')}"
    terminal.line(f"quantize done: {destination} has {wrote}, after {duration(seconds)}", "green")


def _convert(terminal: Terminal, conversion: Conversion, threads: int, verify: bool) -> list[LayerError]:
    errors: list[LayerError] = []
    with terminal.progress() as steps:
        conversion.write(threads, Meter(terminal, steps, len(conversion.shards)))
        if verify:
            errors = conversion.compare(threads, Meter(terminal, steps, len(conversion.shards)))
        wrong = [each for each in errors if each.problem]
        if not wrong:
            steps.begin("writing the configs")
            conversion.finish()
    if wrong:
        _print_errors(terminal, errors)
        expected = "values within the rounding of NVFP4"
        failed(
            "quantize", f"{wrong[0].label}: expected {expected}, got: {wrong[0].problem}; config.json is not written"
        )
    return errors


class Meter:
    """Tells where a run stands: on the bar, or where stderr is no terminal as a line every half a minute."""

    def __init__(
        self, terminal: Terminal, steps: Steps, shards: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._terminal, self._steps, self._clock = terminal, steps, clock
        self._started = self._noted = clock()
        self._step = ""
        steps.stage(shards)

    def __call__(self, progress: Progress) -> None:
        now = self._clock()
        text = progress_text(progress, now - self._started)
        if self._step and progress.step != self._step:
            self._steps.advance()
        self._step = progress.step
        self._steps.begin(text)
        if now - self._noted >= _NOTE_SECONDS and not sys.stderr.isatty():
            self._noted = now
            self._terminal.note(text)


def progress_text(progress: Progress, seconds: float) -> str:
    """``quantizing layer 3: 1.00 GiB of 4.00 GiB, 0.54 GB/s, 6 s left``."""
    text = f"{progress.step}: {size(progress.done)} of {size(progress.total)}"
    if seconds < _LEAST_SECONDS or not progress.done:
        return text
    rate = progress.done / seconds
    return f"{text}, {rate / 1e9:.2f} GB/s, {duration((progress.total - progress.done) / rate)} left"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _facts(conversion: Conversion, source: Path, destination: Path) -> dict[str, Any]:
    selection = conversion.selection
    groups = [group for shard in conversion.shards for group in shard.groups]
    return {
        "source": str(source), "destination": str(destination), "layout": conversion.layout,
        "layers": [shard.label for shard in conversion.shards if shard.groups],
        "quantized_matrices": sum(len(group.parts) for group in groups),
        "dequantized_weights": len(selection.dequantized), "copied_tensors": len(selection.copied),
        "other_files": [name for name, _ in conversion.files],
        "source_bytes": conversion.source_bytes, "written_bytes": conversion.nbytes,
        "needed_bytes": conversion.needed, "free_bytes": conversion.free,
        "resumed": conversion.resumed, "shards": len(conversion.shards), "shards_done": len(conversion.done),
    }  # fmt: skip


def _print_plan(terminal: Terminal, facts: dict[str, Any]) -> None:
    quantized = f"{count(facts['quantized_matrices'])} matrices ({count(len(facts['layers']), 'shard')} with experts)"
    rows = [
        ("layout", facts["layout"]),
        ("to NVFP4", quantized),
        ("FP8 to bf16", count(facts["dequantized_weights"], "weight")),
        ("as they are", count(facts["copied_tensors"], "tensor")),
        ("size", f"{size(facts['source_bytes'])} become {size(facts['written_bytes'])}"),
        ("disk", f"{size(facts['needed_bytes'])} to write, {size(facts['free_bytes'])} free"),
    ]
    if facts["resumed"]:
        rows.append(("resumed", f"{facts['shards_done']} of {count(facts['shards'], 'shard')} are there"))
    terminal.table(("quantize", ""), rows, left=("quantize", ""))


def _print_errors(terminal: Terminal, errors: Sequence[LayerError]) -> None:
    if not errors:
        return
    terminal.line()
    terminal.table(
        ("compared", "matrices", "worst rel. L2", "of", ""),
        [
            (each.label, count(each.matrices), error(each.relative_l2), each.worst, "FAILED" if each.problem else "ok")
            for each in errors
        ],
        left=("compared", "of"),
        marked=[number for number, each in enumerate(errors) if each.problem],
    )
