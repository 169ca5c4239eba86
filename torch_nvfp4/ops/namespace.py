"""``torch.ops.nvfp4`` with types, for type checkers and editors: torch itself declares its attributes as Any.

``from torch_nvfp4.ops.namespace import nvfp4``: then ``nvfp4.moe(...)`` and ``nvfp4.moe.default`` are checked and
completed. What the arguments mean stands in the docstrings of the functions of the same names in ``torch_nvfp4``; the
types are in namespace.pyi, which .ci/write_op_types.py writes out of the ops' schemas.
"""

import torch

nvfp4 = torch.ops.nvfp4
