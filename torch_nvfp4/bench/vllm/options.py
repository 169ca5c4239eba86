"""What both benchmarks of a whole model tell vLLM."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

__all__ = ["EngineOptions"]


@dataclass(frozen=True)
class EngineOptions:
    """A model, and how vLLM serves it."""

    model: str
    _: KW_ONLY
    max_model_len: int = 4096
    dtype: str = "bfloat16"
    tensor_parallel_size: int = 1
    memory: float = 0.6  # share of the GPU's
    attention_backend: str | None = None  # None: vLLM's choice
    options: dict[str, Any] = field(default_factory=dict)  # more of its arguments; they win over those below

    def arguments(self, sequences: int) -> dict[str, Any]:
        """Those of ``vllm.LLM`` besides the model, for up to ``sequences`` at once; ``vllm serve`` has the same."""
        return {
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.memory,
            "enable_prefix_caching": False,
            "max_num_seqs": max(sequences, 64),
            "max_num_batched_tokens": max(8192, self.max_model_len),
            "seed": 0,
            "tensor_parallel_size": self.tensor_parallel_size,
            **({"attention_backend": self.attention_backend} if self.attention_backend else {}),
            **self.options,
        }
