"""A CUDA graph's stand-in on CPUs: what a run calls of PyTorch is recorded, and replayed on the same memory.

As a graph does, it keeps every number that Python computed, and it refuses what would wait for the device.
"""

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if call is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        arguments = call._schema.arguments
        given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        for t in tree_leaves([given.get(name) for name in written]):
            if isinstance(t, Tensor):
                self.before.setdefault(id(t), (t, t.clone()))
        out = call(*args, **kwargs)
        memory = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        # A view needs no copy: it shows what was written to its memory.
        results = [t if isinstance(t, Tensor) and _memory(t) not in memory else None for t in tree_leaves(out)]
        self.calls.append((call, args, kwargs, results))
        return out


def _memory(t):
    return t.untyped_storage().data_ptr()


class RecordedGraphs:
    """``replays`` counts; with ``broken``, nothing can be captured."""

    def __init__(self, broken=False):
        self.broken, self.replays = broken, 0

    def aside(self):
        return contextlib.nullcontext()

    def capture(self, run):
        with _Recorder() as recorder:
            run()
        with torch.no_grad():  # a capture runs nothing
            for t, value in reversed(recorder.before.values()):  # the first value of memory written by two names
                t.copy_(value)
        if self.broken:
            raise RuntimeError("operation not permitted\nand more")

        def replay():
            self.replays += 1
            with torch.no_grad():
                for call, args, kwargs, results in recorder.calls:
                    found = tree_leaves(call(*args, **kwargs))
                    for into, t in zip(results, found, strict=True):
                        if into is not None:
                            into.copy_(t)

        return replay
