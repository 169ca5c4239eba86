"""What NVFP4 weights bring to transformers on this machine: ``python -m torch_nvfp4.bench.transformers``.

    python -m torch_nvfp4.bench.transformers dsv4            # three layers of DeepSeek-V4-Flash's real widths
    python -m torch_nvfp4.bench.transformers qwen3           # twelve layers of Qwen3-30B-A3B's
    python -m torch_nvfp4.bench.transformers dsv4 --tiny     # to try the benchmark itself; also on a CPU

It writes a checkpoint with random weights in the published layout (``deepseek``, or the model of the benchmark of vLLM)
and the same weights dequantized to bf16 (``dense``). transformers loads both, the first with this package's quantizer,
and the benchmark reports the time and memory that takes (``loading``); how far the logits of both are from the model in
fp32 (``values``); and, in turns, the time of a prefill, of a compiled decode step and of a MoE block (``timing``).

transformers and accelerate have to be installed.
"""
