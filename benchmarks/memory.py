"""What training keeps between the forward and the backward pass, counted alike for every implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from resnet_fast import backends

__all__ = ["peak_bytes", "saved_bytes"]


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of every storage that the graph of ``forward()`` keeps, each once, without the module's own tensors.

    Counted are the tensors saved for the backward pass, and those that a Python function keeps in its context beside
    them. The result itself counts if the graph keeps it.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    alive: list[Tensor] = []  # so that no address is given away twice

    def pack(t: Tensor) -> Tensor:
        alive.append(t)
        return note(t)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    nodes, seen = [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for value in getattr(node, "__dict__", {}).values():
            for t in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(t, Tensor):
                    note(t)
        nodes += [following for following, _ in node.next_functions]
    return sum(kept.values())


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that was in use at once during ``call()``, beyond what was there before: counted by PyTorch's CPU
    allocator, which gives all memory meanwhile."""
    keep, backends.cpu.keep_memory = backends.cpu.keep_memory, False
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
    finally:
        backends.cpu.keep_memory = keep
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
