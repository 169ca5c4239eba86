"""What the benchmark of transformers prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["DENSE", "PACKED", "load_table", "print_values", "time_table"]

PACKED, DENSE = "packed", "bf16"
_LABELS = {
    "block": ("MoE block, {} tokens", 4),
    "prefill": ("prefill, {} tokens", 2),
    "decode": ("decode step, batch {}", 3),
}


def load_table(loads: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per side: seconds, GB/s and memory."""
    lines = [f"{'load':8}{'GB':>8}{'s':>8}{'GB/s':>8}{'model GB':>10}{'GPU peak GB':>13}{'host peak GB':>14}"]
    for side, load in loads.items():
        sizes = [load[name] * 1e-9 for name in ("file_bytes", "device_bytes", "device_peak", "host_peak")]
        lines.append(
            f"{side:8}{sizes[0]:8.2f}{load['seconds']:8.2f}{load['gigabytes_per_s']:8.2f}"
            f"{sizes[1]:10.2f}{sizes[2]:13.2f}{sizes[3]:14.2f}"
        )
    return "\n".join(lines)


def time_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per measurement: milliseconds of both sides, their ratio, and tokens per second of both."""
    heads = (f"{PACKED} ms", f"{DENSE} ms", "ratio", f"{PACKED} tokens/s", f"{DENSE} tokens/s")
    lines = [" " * 26 + f"{heads[0]:>12}{heads[1]:>12}{heads[2]:>8}{heads[3]:>18}{heads[4]:>16}"]
    for row in rows:
        text, digits = _LABELS[row["kind"]]
        ours, theirs = row[PACKED], row.get(DENSE)
        cells = [f"{ours * 1e3:12.{digits}f}"]
        cells += [f"{'-':>12}{'-':>8}"] if theirs is None else [f"{theirs * 1e3:12.{digits}f}{theirs / ours:8.2f}"]
        if row["kind"] != "block":
            rates = ["-" if seconds is None else f"{_tokens(row) / seconds:.1f}" for seconds in (ours, theirs)]
            cells.append(f"{rates[0]:>18}{rates[1]:>16}")
        lines.append(f"{text.format(row['size']):26}{''.join(cells)}")
    return "\n".join(lines)


def _tokens(row: Mapping[str, Any]) -> int:
    product = 1
    for part in row["size"].split(" x "):
        product *= int(part)
    return product


def print_values(scores: Mapping[str, Any], errors: Mapping[str, Mapping[str, float]]) -> None:
    """The distances from the model in fp32."""
    print("log-probabilities of the same tokens against the model in fp32 with dequantized weights:")
    for side in (PACKED, DENSE):
        if side in scores:
            far = scores[side]
            print(
                f"  {side:8} error of the next token's: mean {far['mean_error']:.5f}, max {far['max_error']:.4f}; "
                f"KL: mean {far['mean_kl']:.3e}, max {far['max_kl']:.3e}; same top token {far['same_top']:.1%} "
                f"({far['positions']} positions)"
            )
    if "gain" in scores:
        gain = scores["gain"]
        print(
            f"  KL of {DENSE} less that of {PACKED}: {gain['mean']:+.3e}, standard error {gain['standard_error']:.1e}"
        )
    print("relative L2 error of the experts against fp32, on what the model gives them:")
    for name, sides in errors.items():
        print(f"  {name}: {', '.join(f'{side} {value:.2e}' for side, value in sides.items())}", flush=True)
