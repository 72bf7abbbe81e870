"""Has a module changed since it was packed? Asked at every call, so it costs a few microseconds a block."""

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

from ..native import extension
from . import patches

__all__ = ["DROPOUTS", "HOOKS", "StalenessGuard", "attributes", "hooks_reason", "refresh", "touched"]

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
    nn.BatchNorm2d: ("eps", "training"),
    **dict.fromkeys(DROPOUTS, ("training", "p")),
}
_LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Identity, nn.Linear, nn.AdaptiveAvgPool2d, *DROPOUTS)
patches.register_layers(*_LAYERS)
patches.register(nn.Sequential, nn.AvgPool2d, nn.MaxPool2d)

# What is found out about a module, and kept in it.
_FOUND = ("_chain", "_program", "_eval_program", "_whole", "_network", "_observers", "_resnet_fast")
# What every module has; ``training`` is asked for where it matters.
_OF_ALL_MODULES = {*vars(nn.Module()), *_FOUND, "_is_full_backward_hook"}


def attributes(module: nn.Module) -> dict[str, Any]:
    """What the code of ``forward`` may ask for beside children and tensors."""
    return {name: value for name, value in vars(module).items() if name not in _OF_ALL_MODULES}


def hooks_reason(parts: list[nn.Module]) -> str | None:
    """Why the modules after the first must be called one by one, or None. Hooks on the first itself run either way."""
    for module in parts[1:]:
        if any(getattr(module, hooks) for hooks in HOOKS):
            return f"a hook on a {type(module).__name__}"
        reason = patches.own_method(module, patches.methods(type(module)))
        if reason is not None:
            return reason
    return None


def _has_version(t: Tensor) -> bool:
    try:
        return t._version >= 0
    except RuntimeError:
        return False


def _place(t: Tensor) -> tuple[int, int] | None:
    """Address and bytes of a tensor that the host can read, from its first number to its last, or None."""
    if t.device.type != "cpu" or t.layout != torch.strided or type(t) not in (Tensor, nn.Parameter):
        return None
    last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), (last + 1) * t.element_size() if t.numel() else 0


def _storage(t: Tensor) -> int | None:
    """Where the memory begins that a tensor shares with its views, or None."""
    if t.layout != torch.strided or type(t) not in (Tensor, nn.Parameter):
        return None
    return t.untyped_storage().data_ptr() or None


def _is_container(module: nn.Module) -> bool:
    """Whether it may get children though it has none now."""
    return type(module) not in _LAYERS


class _Snapshot:
    """Counts and objects in a row, in the order in which ``kernels/csrc/staleness_guard.cpp`` reads them."""

    def __init__(self) -> None:
        self.words = array("Q")
        self.held: list[Any] = []  # so that no address becomes that of another object

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


# Those that are alive, to be told of what they do not see; the second: those that watch contents.
_watches: weakref.WeakSet[StalenessGuard] = weakref.WeakSet()
_of_contents: weakref.WeakSet[StalenessGuard] = weakref.WeakSet()
_lock = threading.Lock()


def _end(guards: weakref.WeakSet[StalenessGuard], modules: Iterable[nn.Module]) -> None:
    """Those that watch one of ``modules`` see a change from now on."""
    these = set(map(id, modules))
    with _lock:
        for guard in guards:
            if not guard.modules.isdisjoint(these):
                guard.end()


def touched(module: nn.Module) -> None:
    """``module`` was loaded into or told its mode, be it the same: what was packed from its contents is old."""
    if _of_contents:
        _end(_of_contents, [module])


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    """After every step of every optimizer: fused ones bump no version, and small steps may miss the fingerprint.

    Contents that the host cannot read are old after any step, if one of them wants a gradient: what the optimizer holds
    may be a copy or a shard of them, which is written back later. Others are old if the optimizer holds their memory.
    """
    if torch.compiler.is_compiling():  # a compiled step bumps versions
        return
    with _lock:
        guards = [guard for guard in _of_contents if not guard.ended()]
    if not guards:
        return
    written = {_storage(p) for group in optimizer.param_groups for p in group["params"]}
    for guard in guards:
        if any(t.requires_grad for t in guard.unread) or not guard.storages.isdisjoint(written):
            guard.end()


register_optimizer_step_post_hook(_stepped)


def refresh(model: nn.Module) -> None:
    """Packs all weights of ``model`` anew at the next call, whatever has changed or not.

    Seen without it, whatever PyTorch counts: every step of a ``torch.optim`` optimizer, ``load_state_dict``, and every
    ``train()`` and ``eval()`` of a module that runs fused or of one around it, whether or not the mode changes. On
    CPUs, too, whoever writes: what changes a sample of the tensor, which is compared at every call (all of up to 512
    bytes, else eight pieces of 64 bytes). Wanted after changes that PyTorch does not count and none of these shows:

    - on CPUs: of elements outside of the sample alone, through ``Tensor.data``, NumPy or DLPack views, shared memory, a
      storage or a collective; or by anything in ``torch.inference_mode()``, of weights made or moved in it;
    - on GPUs: of any elements, in place, through these, by collectives such as ``torch.distributed.broadcast``, by a
      CUDA graph that is replayed, or by kernels of other libraries; or by anything in inference mode, of weights made
      or moved in it.

    On GPUs weights that want a gradient are packed anew after a step of any optimizer, one of another network included.

    Where a gradient is wanted, CPUs pack weights at every call. Programs that ``torch.compile`` has frozen and CUDA
    graphs hold weights of their own: compile or capture them again.

    Args:
        model: a network or any part of one, fused or not, in any mode.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, want a torch.nn.Module")
    _end(_watches, model.modules())
    # Of compiled graphs the modules are others, which hold the same tensors.
    held = {_storage(t) for t in chain(model.parameters(), model.buffers())}
    with _lock:
        for guard in _of_contents:
            if not guard.storages.isdisjoint(held):
                guard.end()


class StalenessGuard:
    """What modules were like when they were packed: their children, settings, hooks, and the contents of their tensors.

    Contents are told by PyTorch's own count of in-place changes (``Tensor._version``), by the address of the memory,
    and on CPUs by a fingerprint that is taken at every question: all of a tensor of up to 512 bytes, eight pieces of 64
    bytes of a larger one. It shows what PyTorch does not count: fused optimizers, collectives, other processes and
    libraries that write to the memory. On other devices it would make the host wait, so nothing is read there:
    :func:`touched` and steps of optimizers say when the contents may be others. :func:`refresh` ends a watch whatever
    it sees. Tensors made or moved in inference mode are not counted at all: shape and strides count instead.

    Without ``contents`` only what tensors there are and their classes, dtypes, devices and shapes count; without
    ``kinds`` only what tensors there are. All else is told by identity: a setting that is set to an equal value is
    another one, and only packed once more.

    Methods count, those of classes and those that a module has put before them: ``forward``, and of layers what it
    calls. Of ``opened`` modules, whose code was looked into, all counts that the code may ask for: methods, attributes,
    those that it asks for in vain too, global names, variables around functions. Of the first module ``methods`` count;
    the first one of these is what it was called by, and may be its own.
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
        was.count((*stores, *children, *hooks, *dicts))
        for entries in (*stores, *children, *hooks, *dicts):
            was.add_values(entries)
        # A count of batches changes no result.
        tensors = [t for store in stores for t in store.values() if t is not None and t.is_floating_point()]
        places = [_place(t) for t in tensors] if contents else []
        self.unread = [t for t, place in zip(tensors, places, strict=False) if place is None]
        self.storages = frozenset(start for t in tensors if contents and (start := _storage(t)) is not None)
        self._add_tensors(was, tensors, contents, kinds, outside)
        was.count(read := [place for place in places if place is not None])
        for place in read:
            was.words.extend((*place, extension.fingerprint(place)))
        self.modules = frozenset(map(id, modules))
        self._held = was.held
        self._snapshot: bytes | None = was.words.tobytes()
        with _lock:
            _watches.add(self)
            if contents:
                _of_contents.add(self)

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
            # The dicts below are compared, too: here, that they are still the module's.
            stores = ("_modules",) if _is_container(m) else ("_parameters", "_buffers") if m._parameters else ()
            rows.append((m, vars(m), [name for name in (*settings, *own, *stores) if name not in _FOUND]))
            if (kind, looked_up) not in known:
                known.add((kind, looked_up))
                for c, names in patches.places(kind, looked_up).items():
                    classes.setdefault(c, {}).update(dict.fromkeys(names))
        # The first one's own forward does not count, that of classes does: these come behind. Their dicts themselves
        # are what their proxies refer to.
        stored_in = {c: gc.get_referents(vars(c))[0] for c in classes}
        rows += [(c, stored_in[c], names) for c, names in classes.items()]
        found = [stored_in[c].get(name) for c, names in classes.items() for name in names if c is not nn.Module]
        values = [value for m in opened for value in attributes(m).values()]
        outside = patches.surroundings([*found, *values] if opened else [])
        rows += [(space, space, names) for space, names in outside.names.values()]
        # Their keys; how many there are is asked with their values.
        rows += [(value, value, list(value)) for value in values if type(value) is dict]
        was.count(rows)
        for owner, stored, wanted in rows:
            was.add(owner, type(owner), stored)
            was.add_entry(stored, "forward")
            names = [name for name in dict.fromkeys(wanted) if name != "forward"]
            was.count(names)
            for name in names:
                was.add(name)
                was.add_entry(stored, name)
        return outside

    def _add_tensors(
        self, was: _Snapshot, tensors: list[Tensor], contents: bool, kinds: bool, outside: patches.Surroundings
    ) -> None:
        uncounted = [t for t in tensors if contents and t.is_inference()]
        # Aliases keep the memory from being given to someone else, whose address would look like the old one.
        self._aliases = [t.detach() for t in tensors if contents]
        methods = [t.data_ptr for t in tensors if contents] + [t.stride for t in uncounted if t.dim() > 1]
        was.count(methods)
        was.add(*chain.from_iterable((method, method()) for method in methods))
        if contents:
            # One that was moved in inference mode has kept a version, which counts what is done outside of it.
            asked: list[tuple[Any, Sequence[Any]]] = [
                (_VERSION, [t for t in tensors if not t.is_inference() or _has_version(t)])
            ]
            # In place and without new memory, only shape and strides can change.
            asked += [(_SHAPE, uncounted)]
        else:
            asked = [(kind, tensors) for kind in _KIND if kinds]
        asked.append((_CELL, [cell for cell in outside.cells if cell != CellType()]))
        asked += [(part, outside.functions) for part in _CODE]
        was.count(asked)
        for attribute, of in asked:
            was.add_attribute(attribute, of)

    def __reduce__(self) -> Any:
        raise TypeError("a StalenessGuard knows its objects by their addresses: a copy would not hold them")

    def is_valid(self) -> bool:
        """In C: this is asked before every fused call."""
        return self._snapshot is not None and extension.unchanged(self._snapshot)

    def end(self) -> None:
        """From now on nothing is as it was."""
        self._snapshot = None

    def ended(self) -> bool:
        return self._snapshot is None
