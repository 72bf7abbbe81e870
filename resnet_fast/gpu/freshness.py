"""Packed filters that follow their weights on the device, whoever writes them: :class:`FilterFollower`.

The staleness guard (:mod:`resnet_fast.chain.guard`) sees what PyTorch counts. Of a GPU it reads no contents, for the
host would wait; and a CUDA graph asks no guard. So each chain begins with a launch that compares and packs there
(``kernels/triton_ops/refresh_filters.py``).
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backends
from ..backends import launch
from ..ops.chain import cuda_unpack
from . import residual_network, tune
from .tape import Tapes

if TYPE_CHECKING:
    from .._triton.refresh_filters import PackedFilter

__all__ = [
    "FilterFollower",
    "RefreshedNetwork",
    "Sources",
    "ahead",
    "followed",
    "followed_stages",
    "follower",
    "follows",
    "keep",
    "latest",
    "measuring",
]

Sources = Sequence[Tensor | None]  # weight, bias, gamma, beta, mean and variance
_NOTHING: Sources = (None,) * 5


_failed = False


def follows() -> bool:
    """Whether packed filters follow their weights: ``backends.cuda.check_weights``, and Triton can compile here."""
    return backends.cuda.check_weights and backends.has_triton() and not _failed


def follower(
    filters: Sequence[PackedFilter], dtype: torch.dtype, others: Iterable[FilterFollower | None] = ()
) -> FilterFollower | None:
    """A follower, of ``others`` the one of these filters.

    None, with a warning, where Triton cannot compile, say without a C compiler: other kernels run.
    """
    global _failed
    for other in others:
        if other is not None and [*map(id, other.filters)] == [*map(id, filters)]:
            return other
    try:
        return FilterFollower(filters, dtype)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # RuntimeErrors that say nothing of the compiler
        raise
    except _refusals() as error:
        _failed = True
        warnings.warn(
            "resnet_fast: changed weights are seen on GPUs only if PyTorch counts the change (docs/limits.md), for "
            f"Triton cannot compile the kernel that compares them: {error}",
            stacklevel=2,
        )
        return None


def _refusals() -> tuple[type[Exception], ...]:
    """What Triton raises where it, its assembler or a C compiler cannot compile, or its driver not load."""
    from triton.errors import TritonError

    return TritonError, RuntimeError, OSError, ImportError, subprocess.CalledProcessError


def _fingerprints(filters: Tensor) -> Tensor:
    from .._triton.refresh_filters import tiles

    return torch.zeros(tiles(filters.numel()), dtype=torch.int64, device=filters.device)


def followed(
    packed: Tensor,
    sources: Sources,
    added: Sources,
    eps: tuple[float, float],
    dtype: torch.dtype,
    *,
    folded: bool,
    deferred: bool,
) -> PackedFilter:
    """What :func:`.packing.packed` has just packed in ``dtype``; added: the sources of a layer whose shift is in it."""
    from .._triton.refresh_filters import PackedFilter, places

    weight = sources[0]
    assert weight is not None
    k, c, r, s = weight.shape
    filters, scale, shift, bias = cuda_unpack(packed, (k, r, s, c), dtype)
    return PackedFilter(
        (*sources, *(added[1:] or _NOTHING)),
        eps,
        *(filters.view(-1), scale, shift, bias, places(k, r, s, c, dtype), _fingerprints(filters)),
        folded=folded,
        deferred=deferred,
    )


def followed_stages(
    packed: Tensor,
    found: Sequence[residual_network.Stage],
    sources: Sequence[Sources],
    eps: Sequence[float],
    dtype: torch.dtype,
    head: tuple[Tensor, Tensor | None] | None,
) -> list[PackedFilter]:
    """What :func:`.residual_network.pack` has just packed: each layer, and the head."""
    from .._triton.refresh_filters import PackedFilter, places

    def floats(begin: int, count: int) -> Tensor:
        return packed[begin : begin + count]

    listed, end = [], 0
    for layer, (k, r, s, c), begin, count in residual_network.sections(found, dtype):
        filters, at = floats(begin, count).view(dtype), begin + count
        padded = (k, 4, 3, 4) if c == 3 else (k, r, s, c)
        listed.append(
            PackedFilter(
                (*sources[layer], *_NOTHING),
                (eps[layer], 0.0),
                *(filters, floats(at, k), floats(at + k, k), None),
                *(residual_network.arranged(places(*padded, dtype)), _fingerprints(filters)),
                rounds=dtype == torch.float32,
            )
        )
        end = at + 2 * k
    if head is not None:
        weight, bias = head
        k, c = weight.shape
        count = k * c * dtype.itemsize // 4
        filters, shift = floats(end, count).view(dtype), floats(end + count, k)
        linear = (weight[:, :, None, None], bias, None, None, None, None, *_NOTHING)
        order = places(k, 1, 1, c, dtype)
        listed.append(
            PackedFilter(linear, (0.0, 0.0), filters, None, shift, None, order, _fingerprints(filters)),
        )
    return listed


class _ThisThread(threading.local):
    met: list[FilterFollower] | None = None  # collects followers
    ahead: frozenset[FilterFollower] = frozenset()  # those that a launch has refreshed
    measures = False


_this_thread = _ThisThread()


@contextlib.contextmanager
def _set(**values: Any) -> Iterator[None]:
    """Context manager: this thread's state."""
    before = {name: getattr(_this_thread, name) for name in values}
    vars(_this_thread).update(values)
    try:
        yield
    finally:
        vars(_this_thread).update(before)


def measuring() -> contextlib.AbstractContextManager[None]:
    """Context manager: this thread measures. Its graphs are gone after it, and what it runs is no part of a network."""
    return _set(met=None, ahead=frozenset(), measures=True)


def ahead(followers: Iterable[FilterFollower | None]) -> frozenset[FilterFollower | None]:
    """Those of ``followers`` that a launch for a whole network has refreshed: they launch nothing now."""
    return _this_thread.ahead and _this_thread.ahead.intersection(followers)


class FilterFollower:
    """Refreshes packed filters, by one launch before they are read.

    filters: packed just now, or followed by another instance. dtype: theirs.
    """

    def __init__(self, filters: Sequence[PackedFilter], dtype: torch.dtype) -> None:
        from .._triton import refresh_filters as kernel

        self.filters, self.dtype, self._launch = filters, dtype, kernel.refresh_filters
        self._kept = False
        self._streams: set[torch.cuda.Stream] = set()  # that launched it
        # A recorder would take this for steps of a tape, and the tensors outlive inference mode.
        with launch.unrecorded(), torch.inference_mode(False):
            self._table, self._tiles = kernel.table(filters, filters[0].filters.device)
            # Aliases, which do not hold the modules' parameters.
            self._reaches = tuple(t.detach() for f in filters for t in f.reaches())
            self._run()

    def refresh(self) -> None:
        """Launches the check, if none of a whole :class:`RefreshedNetwork` ran before; a captured one keeps all that it
        reaches."""
        if self in _this_thread.ahead:
            return
        if _this_thread.met is not None:
            _this_thread.met.append(self)
        self._run()
        if tune.capturing() and not self._kept:
            self._kept = keep(self.filters[0].sources[0], self._table, self._tiles, self._reaches)

    def _run(self) -> None:
        stream = _stream(self._table)
        if stream is not None and stream not in self._streams:
            self._streams.add(stream)
            # A launch may still wait there when all this is dropped and its memory is free to the stream that packed.
            with launch.unrecorded():
                for t in (self._table, self._tiles, *(t for f in self.filters for t in (f.filters, f.fingerprints))):
                    t.record_stream(stream)  # of the whole storage; nothing on the stream that allocated it
        self._launch(self._table, self._tiles, self.dtype, self._reaches)


def _stream(t: Tensor) -> torch.cuda.Stream | None:
    """The stream whose launches outlast the host's references; none captures, for :func:`keep` holds those."""
    return torch.cuda.current_stream(t.device) if t.is_cuda and not tune.capturing() else None


class RefreshedNetwork:
    """Calls of a network whose chains are refreshed together, by one launch at its head."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], tuple[FilterFollower, frozenset[FilterFollower]]] = {}

    def run(self, kind: tuple[Any, ...], forward: Callable[[], Tensor]) -> Tensor:
        """``forward()``; kind: what decides which chains it runs, and how."""
        made = self._made.get(kind)
        if made is not None:
            made[0].refresh()
            with _set(ahead=made[1]):
                return forward()
        with _set(met=[]):
            y = forward()
            met = frozenset(_this_thread.met or ())
        if len(met) > 1 and len({f.dtype for f in met}) == 1 and not tune.capturing():
            found = next((made for made in [*self._made.values()] if made[1] == met), None)
            if found is None:
                filters = {id(f): f for each in met for f in each.filters}
                found = FilterFollower([*filters.values()], next(iter(met)).dtype), met
            latest(self._made, kind, found)
        return y


def latest(made: dict[Any, Any], kind: Any, value: Any) -> None:
    """Adds to what is made for each kind of inputs; drops the earliest, as :class:`Tapes` does."""
    made[kind] = value
    if len(made) > Tapes.MOST:
        made.pop(next(iter(made)), None)


def keep(weight: Tensor | None, *held: object) -> bool:
    """Keeps what a CUDA graph reads as long as ``weight`` lives: a chain may be packed anew, and the graph replayed.

    Returns whether it does: not what is measured.
    """
    if _this_thread.measures:
        return False
    weakref.finalize(weight, tuple, held).atexit = False
    return True
