"""Parallelism outside a serving engine: DTensor's rules for the ops, and experts split over the ranks of a mesh.

Importing ``torch_nvfp4`` does not import this package; the rules of DTensor are registered when they are needed:
``help(torch_nvfp4.distributed.sharding)`` has their table.

    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("ep", "tp"))  # of torch.distributed.device_mesh
    plan = ExpertsPlan(tp="tp", ep="ep")
    model = parallelize_experts(model, mesh, plan)           # every NVFP4Experts in it, or
    experts = load_experts("checkpoint", 3, mesh, plan)      # layer 3, of which each rank reads its part
    y = experts(hidden_states, topk_weights, topk_ids)       # on every rank, as one NVFP4Experts
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
