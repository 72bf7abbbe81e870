"""Under a compiler: whether the graph gets PyTorch's own operators instead of the fused ones. The executor asks."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends
from . import patches

__all__ = ["traced_unfused"]

# Attributes in which PyTorch's wrappers around a backend hold it.
_WRAPPED = ("_torchdynamo_orig_backend", "backend_compile_fn", "compiler_fn", "__wrapped__", "__self__")


@patches.constant
def traced_unfused() -> bool:
    """Whether the compiler that traces now gets PyTorch's operators alone.

    ``torch.compile(backend="resnet_fast")`` does, because it finds chains in the graph itself. So does
    ``torch.export``, whose programs run where this package may be missing, unless a backend was named.
    """
    return (torch.compiler.is_exporting() and backends.selected() == "auto") or _is_own_backend()


def _is_own_backend() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator  # imported late: it is costly

    try:
        compiler: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # a compiler that traces without Dynamo
        return False
    while compiler is not None:
        if getattr(compiler, "finds_chains", False):
            return True
        compiler = next((inner for name in _WRAPPED if (inner := getattr(compiler, name, None)) is not None), None)
    return False
