"""Who traces a module, and whether what it gets are PyTorch's own operators."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends
from . import patches

__all__ = ["traced_unfused"]

# Wrappers that PyTorch puts around a backend keep it in one of these.
_WRAPPED = ("_torchdynamo_orig_backend", "backend_compile_fn", "compiler_fn", "__wrapped__", "__self__")


@patches.constant
def traced_unfused() -> bool:
    """Whether compilers get PyTorch's operators alone. To be asked while something is compiled.

    ``torch.compile(backend="resnet_fast")`` finds chains in the graph itself. Programs of ``torch.export`` go to places
    where this package is not, unless a backend was named: then they hold its operators.
    """
    return (torch.compiler.is_exporting() and backends.selected() == "auto") or _is_own_backend()


def _is_own_backend() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator  # not needed where nothing is compiled

    try:
        compiler: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # other compilers trace without Dynamo
        return False
    while compiler is not None:
        if getattr(compiler, "finds_chains", False):
            return True
        compiler = next((inner for name in _WRAPPED if (inner := getattr(compiler, name, None)) is not None), None)
    return False
