"""Parallelism outside a serving engine: DTensor's rules for the ops, and experts split over the ranks of a mesh.

Importing ``torch_nvfp4`` does not import this package; the rules of DTensor are registered when they are needed.
"""

from torch_nvfp4.distributed.parallel import (
    ExpertsPlan,
    ParallelExperts,
    expert_range,
    load_experts,
    parallelize_experts,
    slice_experts,
)
from torch_nvfp4.distributed.sharding import expert_maps

__all__ = [
    "ExpertsPlan",
    "ParallelExperts",
    "expert_maps",
    "expert_range",
    "load_experts",
    "parallelize_experts",
    "slice_experts",
]
