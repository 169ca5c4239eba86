"""What the plug-in brings to vLLM on this machine: ``python -m torch_nvfp4.bench.vllm``.

    python -m torch_nvfp4.bench.vllm                        # a Qwen3-MoE model served with and without the plug-in
    python -m torch_nvfp4.bench.vllm --tensor-parallel-size 2
    python -m torch_nvfp4.bench.vllm chat                   # the same model behind vllm serve, asked as a chat
    python -m torch_nvfp4.bench.vllm layer                  # the MoE layer of DeepSeek-V4-Flash in vLLM's own class

The first writes a model with random NVFP4 experts (``model``) and starts vLLM in a new process for each measurement
(``engine``), in turns with ``TORCH_NVFP4_VLLM=require`` and ``off`` (``serve``). The first pair of processes fills
caches and is not counted. It also scores the same tokens on both sides, and ``reference`` says how far each side is
from the model in fp32 with dequantized weights.
``chat`` starts ``vllm serve`` on all GPUs, once with the plug-in and once without, and posts chat completions: every
answer is whole, torch_nvfp4 runs the experts on every rank, and the same question alone has the same answer.
``layer`` checks one layer against fp64 and times it under CUDA graphs.

vLLM has to be installed, and torch_nvfp4 beside it.
"""
