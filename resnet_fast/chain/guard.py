"""Whether a module has changed since it was packed: :class:`StalenessGuard`, checked before every fused call.

The check itself is in C++ and costs a few microseconds a block. The executor, plans of :mod:`resnet_fast.fusion` and
networks on GPUs hold guards; :func:`touched`, :func:`refresh` and optimizer steps invalidate them.
"""

from __future__ import annotations

import gc
import threading
import weakref
from array import array
from collections.abc import Iterable, Mapping, Sequence, Sized
from itertools import chain
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .. import backends
from ..backends.native import extension
from . import patches, tensor_state
from .sync_batch_norm import SyncBatchNorm2d

__all__ = ["DROPOUTS", "HOOKS", "NORMS", "StalenessGuard", "attributes", "hooks_reason", "refresh", "touched"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_VERSION: Any = Tensor._version
_SHAPE: Any = Tensor.shape
_CELL: Any = CellType.cell_contents
_CODE: tuple[Any, ...] = (FunctionType.__code__, FunctionType.__defaults__, FunctionType.__kwdefaults__)
_KIND: tuple[Any, ...] = (vars(object)["__class__"], Tensor.dtype, Tensor.device, _SHAPE)
DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_SETTINGS: dict[type, tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    SyncBatchNorm2d: ("eps", "training", "process_group"),  # before the class it is derived from
    nn.BatchNorm2d: ("eps", "training"),
    nn.SyncBatchNorm: ("eps", "training", "process_group"),
    **dict.fromkeys(DROPOUTS, ("training", "p")),
}
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d)
_LAYERS = (nn.Conv2d, *NORMS, nn.ReLU, nn.Identity, nn.Linear, nn.AdaptiveAvgPool2d, *DROPOUTS)
patches.register_layers(*_LAYERS)
patches.register(nn.Sequential, nn.AvgPool2d, nn.MaxPool2d)

# Attributes in which this package caches what it found out about a module.
_CACHES = ("_chain", "_program", "_eval_program", "_whole", "_network", "_observers", "_resnet_fast")
# Attributes of every module; ``training`` is compared where it matters.
_OF_ALL_MODULES = {*vars(nn.Module()), *_CACHES, "_is_full_backward_hook"}


def attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes that the code of ``forward`` may read, besides children and tensors."""
    return {name: value for name, value in vars(module).items() if name not in _OF_ALL_MODULES}


def hooks_reason(parts: list[nn.Module]) -> str | None:
    """Which hook or method keeps the modules after the first from being skipped; or None.

    The first module is called either way, so its own hooks run.
    """
    for module in parts[1:]:
        if any(getattr(module, hooks) for hooks in HOOKS):
            return f"a hook on a {type(module).__name__}"
        reason = patches.own_method(module, patches.methods(type(module)))
        if reason is not None:
            return reason
    return None


def _extent(t: Tensor) -> tuple[int, int] | None:
    """Address and bytes from the first element to the last, of a dense tensor on the CPU; else None."""
    if backends.kind(t) != "cpu" or not tensor_state.is_strided(t) or type(t) not in (Tensor, nn.Parameter):
        return None
    last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), (last + 1) * t.element_size() if t.numel() else 0


def _storage(t: Tensor) -> int | None:
    """The address of the storage that a tensor shares with its views, or None."""
    if not tensor_state.is_strided(t) or type(t) not in (Tensor, nn.Parameter):
        return None
    return t.untyped_storage().data_ptr() or None


def _is_container(module: nn.Module) -> bool:
    """Whether the module may get children even if it has none now."""
    return type(module) not in _LAYERS


class _Snapshot:
    """Counts and objects in a row, in the order in which ``kernels/csrc/staleness_guard.cpp`` reads them."""

    def __init__(self) -> None:
        self.words = array("Q")
        self.held: list[Any] = []  # keeps the objects alive: their addresses identify them

    def count(self, of: Sized) -> None:
        self.words.append(len(of))

    def add(self, *objects: Any) -> None:
        self.held += objects
        self.words.extend(map(id, objects))

    def add_entry(self, of: Mapping[str, Any], name: str) -> None:
        if name in of:
            self.add(of[name])
        else:
            self.words.append(0)

    def add_values(self, entries: Mapping[Any, Any]) -> None:
        self.add(entries)
        self.count(entries)
        self.add(*entries.values())

    def add_attribute(self, descriptor: Any, objects: Sequence[Any]) -> None:
        self.add(descriptor)
        self.count(objects)
        self.add(*chain.from_iterable((o, descriptor.__get__(o)) for o in objects))


# Living guards, to be invalidated by events that they cannot see; the second: those that compare tensor contents.
_guards: weakref.WeakSet[StalenessGuard] = weakref.WeakSet()
_content_guards: weakref.WeakSet[StalenessGuard] = weakref.WeakSet()
_lock = threading.Lock()


def _invalidate(guards: weakref.WeakSet[StalenessGuard], modules: Iterable[nn.Module]) -> None:
    """Invalidates those of ``guards`` that guard one of ``modules``."""
    changed = set(map(id, modules))
    with _lock:
        for guard in guards:
            if not guard.modules.isdisjoint(changed):
                guard.invalidate()


def touched(module: nn.Module) -> None:
    """Invalidates what was packed from ``module``: a state was loaded, or ``train`` or ``eval`` was called."""
    if _content_guards:
        _invalidate(_content_guards, [module])


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    """After every step of every optimizer: fused ones bump no version, and small steps may escape the fingerprint.

    Tensors that the host cannot read are stale after any step if one of them wants a gradient: the optimizer may hold a
    copy or a shard of them, to be written back later. Others are stale if the optimizer holds their storage.
    """
    if torch.compiler.is_compiling():  # a compiled step bumps versions
        return
    with _lock:
        guards = [guard for guard in _content_guards if not guard.is_invalidated()]
    if not guards:
        return
    written = {_storage(p) for group in optimizer.param_groups for p in group["params"]}
    for guard in guards:
        if any(t.requires_grad for t in guard.unread) or not guard.storages.isdisjoint(written):
            guard.invalidate()


register_optimizer_step_post_hook(_stepped)


def refresh(model: nn.Module) -> None:
    """Packs all weights of ``model`` anew at the next call, whether or not anything changed.

    No call is needed after changes that PyTorch counts (``Tensor._version``), a step of a ``torch.optim`` optimizer,
    ``load_state_dict``, or ``train()`` or ``eval()`` of a module that runs fused or of one that holds it, even if the
    mode stays. Every call also compares a sample of each tensor, on GPUs by a kernel if
    ``backends.cuda.check_weights`` is on and Triton is installed: all of up to 512 bytes, else eight pieces of 64
    bytes. A call is needed after changes that none of that shows: writes to elements outside of the sample alone,
    through ``Tensor.data``, NumPy or DLPack views, shared memory, a storage, a collective, a CUDA graph, kernels of
    other libraries, or within ``torch.inference_mode()`` to weights made or moved in it.

    On GPUs, weights that want a gradient are packed anew after a step of any optimizer, even of another network's.

    Where a gradient is wanted, CPUs pack weights at every call. Programs frozen by ``torch.compile`` hold copies of the
    weights: compile them again. CUDA graphs compare at each replay; where the kernel does not run, capture them again.

    Args:
        model: a network or any part of one, fused or not, in any mode.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, want a torch.nn.Module")
    _invalidate(_guards, model.modules())
    # Compiled graphs have modules of their own that hold the same tensors.
    storages = {_storage(t) for t in chain(model.parameters(), model.buffers())}
    with _lock:
        for guard in _content_guards:
            if not guard.storages.isdisjoint(storages):
                guard.invalidate()


class StalenessGuard:
    """Snapshot of modules as they were packed: their children, settings, hooks, methods, and their tensors' contents.

    Contents are compared by PyTorch's version counter (``Tensor._version``), by the address of the memory, by shape and
    strides, and on CPUs by a fingerprint, a copy of a sample: all of a tensor of up to 512 bytes, eight pieces of 64
    bytes of a larger one. The fingerprint shows writes that PyTorch does not count: by fused optimizers, collectives,
    other processes and libraries. On other devices reading it would make the host wait; :func:`touched` and optimizer
    steps invalidate the guard there, and a kernel compares (:mod:`resnet_fast.gpu.freshness`). Tensors made or moved in
    inference mode have no version counter, sparse ones nothing but that.

    Without ``contents``, only the identity, class, dtype, device and shape of tensors are compared; without ``kinds``,
    only their identity. All else is compared by identity: setting an attribute to an equal value may cost one packing
    too many, never a wrong result.

    Methods are compared in classes and in instances: ``forward``, and for PyTorch's layers what it calls. For
    ``opened`` modules, whose code was read, everything that the code looks up is compared: methods, attributes (the
    missing ones, too), global names and closure variables. For the first module, ``methods`` are compared; the first of
    them is the one that was called, which the instance may override.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        opened: Mapping[nn.Module, Sequence[str]] | None = None,
        *,
        methods: Sequence[str] = ("forward",),
        contents: bool = True,
        kinds: bool = True,
    ) -> None:
        was, opened = _Snapshot(), opened or {}
        outside = self._add_modules(was, modules, opened, methods)
        stores = [store for m in modules for store in (m._parameters, m._buffers) if store]
        children = [m._modules for m in modules if m._modules or _is_container(m)]
        hooks = [getattr(m, hooks) for m in modules[1:] for hooks in HOOKS]
        dicts = [value for m in opened for value in attributes(m).values() if type(value) is dict]
        filled = [entries for entries in (*stores, *children, *hooks, *dicts) if entries]
        empty = [entries for entries in (*children, *hooks, *dicts) if not entries]
        was.count(empty)
        was.add(*empty)
        was.count(filled)
        for entries in filled:
            was.add_values(entries)
        # num_batches_tracked, an integer, changes no result.
        tensors = [t for store in stores for t in store.values() if t is not None and t.is_floating_point()]
        extents = [_extent(t) for t in tensors] if contents else []
        self.unread = [t for t, extent in zip(tensors, extents, strict=False) if extent is None]
        self.storages = frozenset(start for t in tensors if contents and (start := _storage(t)) is not None)
        self._add_tensors(was, tensors, contents, kinds, outside)
        was.words.frombytes(tensor_state.samples([extent for extent in extents if extent is not None]))
        self.modules = frozenset(map(id, modules))
        self._held = was.held
        self._snapshot: bytes | None = was.words.tobytes()
        with _lock:
            _guards.add(self)
            if contents:
                _content_guards.add(self)

    def _add_modules(
        self,
        was: _Snapshot,
        modules: list[nn.Module],
        opened: Mapping[nn.Module, Sequence[str]],
        methods: Sequence[str],
    ) -> patches.Surroundings:
        rows: list[tuple[Any, dict[str, Any], Iterable[str]]] = []
        classes: dict[type, dict[str, None]] = {nn.Module: dict.fromkeys(patches.CALL)}
        known: set[tuple[type, tuple[str, ...]]] = set()
        for m in modules:
            kind = type(m)
            if m in opened:
                looked_up = (*patches.called(kind), *opened[m])
                own = (*looked_up, "training", *attributes(m), *opened[m])
            elif m is modules[0]:
                looked_up, own = tuple(methods), tuple(methods[1:])
            else:
                looked_up = own = patches.methods(kind)
            settings = next((names for layer, names in _SETTINGS.items() if isinstance(m, layer)), ())
            # The contents of these dicts are compared below; here, that the module still holds the same dicts.
            stores = ("_modules",) if _is_container(m) else ("_parameters", "_buffers") if m._parameters else ()
            rows.append((m, vars(m), [name for name in (*settings, *own, *stores) if name not in _CACHES]))
            if (kind, looked_up) not in known:
                known.add((kind, looked_up))
                for c, names in patches.lookups(kind, looked_up).items():
                    classes.setdefault(c, {}).update(dict.fromkeys(names))
        # The first row may have a forward of its own, later rows may not: so classes come after the modules. The dict
        # of a class is the referent of its mappingproxy.
        stored_in = {c: gc.get_referents(vars(c))[0] for c in classes}
        rows += [(c, stored_in[c], names) for c, names in classes.items()]
        found = [stored_in[c].get(name) for c, names in classes.items() for name in names if c is not nn.Module]
        values = [value for m in opened for value in attributes(m).values()]
        outside = patches.surroundings([*found, *values] if opened else [])
        rows += [(space, space, names) for space, names in outside.names.values()]
        # Their keys; their lengths and values are compared with the other dicts.
        rows += [(value, value, list(value)) for value in values if type(value) is dict]
        was.count(rows)
        for owner, stored, wanted in rows:
            was.add(owner, type(owner), stored)
            was.add_entry(stored, "forward")
            names = [name for name in dict.fromkeys(wanted) if name != "forward"]
            positions = {name: i for i, name in enumerate(stored)}
            was.count(names)
            for name in names:
                was.add(name)
                was.add_entry(stored, name)
                was.words.append(positions.get(name, 0))
        return outside

    def _add_tensors(
        self, was: _Snapshot, tensors: list[Tensor], contents: bool, kinds: bool, outside: patches.Surroundings
    ) -> None:
        # Aliases keep the memory alive: a new tensor must not get the old address.
        self._aliases = [t.detach() for t in tensors if contents]
        states = {t: state for t in tensors if contents and (state := tensor_state.of(t))}
        was.count(states)
        was.held += states
        was.words.frombytes(b"".join(states.values()))
        others = [t for t in tensors if contents and t not in states]
        strided = [t for t in others if tensor_state.is_strided(t)]
        methods = [method for t in strided for method in (t.data_ptr, t.stride)]
        was.count(methods)
        was.add(*chain.from_iterable((method, method()) for method in methods))
        if contents:
            # A tensor moved in inference mode has kept a version, which counts changes outside of inference mode.
            asked: list[tuple[Any, Sequence[Any]]] = [
                (_VERSION, [t for t in others if not t.is_inference() or tensor_state.has_version(t)]),
                (_SHAPE, strided),
            ]
        else:
            shaped = [t for t in tensors if not t.is_nested]
            asked = [(kind, shaped if kind is _SHAPE else tensors) for kind in _KIND if kinds]
        asked.append((_CELL, [cell for cell in outside.cells if cell != CellType()]))
        asked += [(part, outside.functions) for part in _CODE]
        was.count(asked)
        for attribute, of in asked:
            was.add_attribute(attribute, of)

    def __reduce__(self) -> Any:
        raise TypeError("a StalenessGuard knows its objects by their addresses: a copy would not hold them")

    def is_valid(self) -> bool:
        """Whether nothing has changed. In C++, because every fused call asks."""
        return self._snapshot is not None and extension.unchanged(self._snapshot)

    def invalidate(self) -> None:
        self._snapshot = None

    def is_invalidated(self) -> bool:
        return self._snapshot is None
