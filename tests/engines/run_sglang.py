"""Starts as a process of SGLang does: loads the plug-ins through its own loader, then makes a layer of NVFP4 experts.

    python run_sglang.py LAYOUT [FAULT]

FAULT breaks something first: "version", "signature", "library" or "classes". Prints the layer's backend.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

from engines import sglang_stubs


def break_something(fault: str) -> None:
    if fault == "version":
        real = importlib.metadata.version
        importlib.metadata.version = lambda name: "0.9.0" if name == "sglang" else real(name)
    elif fault == "signature":
        from sglang.srt.layers.moe.moe_runner.runner import MoeRunner

        MoeRunner.run = lambda self, everything: None
    elif fault == "library":
        sys.modules["torch_nvfp4.ops"] = None  # type: ignore[assignment]
    elif fault == "classes":
        import torch_nvfp4_sglang

        importlib.metadata.version = lambda name: "0.9.0"
        torch_nvfp4_sglang.NVFP4_CLASSES = (("sglang.srt.layers.quantization.moved", "Moved"),)
    elif fault:
        raise SystemExit(f"unknown fault {fault!r}")


def main(layout: str, fault: str = "") -> None:
    sglang_stubs.install()
    from sglang.srt.plugins import load_plugins

    break_something(fault)
    load_plugins()
    print("SGLang goes on", flush=True)
    from sglang_layer import make_layer, sglang_process

    with sglang_process():
        print("backend", make_layer(layout).runner_backend.value)


if __name__ == "__main__":
    main(*sys.argv[1:])
