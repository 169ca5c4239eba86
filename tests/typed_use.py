"""What a type checker says of code that uses the package; ``make lint`` reads it, and nothing runs it.

mypy (strict) complains of an ignored error that is none, so each line below holds: a name or an argument that is not
there is an error to whoever has a type checker or an editor.
"""

from torch import Tensor

import torch_nvfp4
from torch_nvfp4.distributed import ExpertsPlan, ParallelExperts, parallelize_experts
from torch_nvfp4.integrations import transformers
from torch_nvfp4.ops.namespace import nvfp4


def names_that_are_not_there() -> None:
    _ = torch_nvfp4.mose  # type: ignore[attr-defined]
    _ = torch_nvfp4.compiler.fuse_gate  # type: ignore[attr-defined]
    _ = transformers.registre  # type: ignore[attr-defined]
    _ = nvfp4.mose  # type: ignore[attr-defined]
    torch_nvfp4.inductor_options(fuse_gate=True)  # type: ignore[call-arg]
    ExpertsPlan(cp="cp")  # type: ignore[call-arg]


def submodules_are_attributes(experts: torch_nvfp4.NVFP4Experts, plan: torch_nvfp4.distributed.ExpertsPlan) -> None:
    torch_nvfp4.testing.random_routing(1, 2, 1)
    torch_nvfp4.integrations.transformers.register()
    parallelize_experts(experts, "ep", plan)  # type: ignore[call-overload]


def ops(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    nvfp4.linear(x)  # type: ignore[call-arg]
    nvfp4.swiglu(x, clamp_limit="7")  # type: ignore[arg-type]
    torch_nvfp4.moe(x, x, x, x, x, x, ids, activation=None)  # type: ignore[arg-type]
    return nvfp4.route.default(ids, None, 4)


def whole_or_part(part: ParallelExperts) -> Tensor:
    output: Tensor = part(part.experts)
    return output
