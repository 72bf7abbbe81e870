"""Who traces: ``torch.compile(backend="resnet_fast")`` finds chains in the graph, so modules must leave them to it."""

from __future__ import annotations

from typing import Any

from . import patches

__all__ = ["left_to_backend"]

# Wrappers that PyTorch puts around a backend keep it in one of these.
_WRAPPED = ("_torchdynamo_orig_backend", "backend_compile_fn", "compiler_fn", "__wrapped__", "__self__")


@patches.constant
def left_to_backend() -> bool:
    """Whether this is traced for the backend of this package. To be asked while something is compiled."""
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
