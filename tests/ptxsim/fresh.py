"""Follows tensors that PyTorch hands out uninitialised (`torch.empty` and kin) until something writes them.

Kernels that read what nothing has written are then found across launches; PyTorch's own operations see NaNs.
"""

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

_EMPTY = {
    "aten::empty",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::empty_permuted",
}


class FreshTensors(TorchDispatchMode):
    """While active, keeps one byte map per uninitialised storage: 0 = never written."""

    def __init__(self, operators=None):
        """operators: by namespace and name, what runs in the place of an operator."""
        super().__init__()
        self._operators = operators or {}
        self._maps: dict[int, tuple[StorageWeakRef, np.ndarray]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operator = self._operators.get(func.namespace, {}).get(func._opname)
        if operator is not None:
            with self:
                return operator(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _EMPTY and isinstance(out, torch.Tensor) and out.device.type == "cpu":
            storage = out.untyped_storage()
            if storage.nbytes():
                storage.fill_(255)  # a NaN in every floating format
                self._maps[storage._cdata] = (StorageWeakRef(storage), np.zeros(storage.nbytes(), np.uint8))
                if len(self._maps) % 64 == 0:
                    self._maps = {k: v for k, v in self._maps.items() if not v[0].expired()}
        elif func._schema.is_mutable:
            bound = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            for a in func._schema.arguments:
                if a.alias_info is not None and a.alias_info.is_write:
                    for t in bound.get(a.name) if isinstance(bound.get(a.name), (list, tuple)) else [bound.get(a.name)]:
                        written = self.bytes_of(t) if isinstance(t, torch.Tensor) else None
                        if written is not None:
                            written[:] = 1
        return out

    def bytes_of(self, tensor: torch.Tensor) -> np.ndarray | None:
        """The map of the bytes a tensor spans, changed through it; None if all of it is initialised."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._maps:
            return None
        ref, state = self._maps[storage._cdata]
        if ref.expired() or len(state) != storage.nbytes() or not tensor.numel():
            return None
        first = tensor.storage_offset() * tensor.element_size()
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        part = state[first : first + span * tensor.element_size()]
        return None if part.all() else part
