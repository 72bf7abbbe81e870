"""Records what runs on a thread as a tape: launches with arguments, calls of operators, and the buffers they use.

Buffers are the inputs, the results of operators, what kernels write, and constants: everything else that a kernel
reads, kept alive by the tape. Memory for what kernels write comes from PyTorch's allocator: a tensor for each output,
and one scratch block in which buffers share space if their lifetimes do not overlap.
``kernels/csrc/chain/tape_read.cpp`` reads the encoded recording.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..backends import launch

__all__ = ["Buffer", "Call", "Launch", "LaunchRecorder", "arrange"]

_ALIGN = 512  # bytes, like PyTorch's allocator
# c10::ScalarType, whose numbers the C interface uses.
_DTYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bfloat16: 15,
}
_EMPTY = (
    "aten::empty",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::empty_permuted",
    "aten::new_empty",
    "aten::new_empty_strided",
)
# Enumerations of tape.h.
_INPUT, _SCRATCH, _OUTPUT, _CONSTANT, _RESULT = range(5)
_NONE, _TENSOR, _INT, _DOUBLE, _BOOL, _INTS, _FORMAT, _BOOLS, _DTYPE = range(9)
_UNKNOWN = -1  # the buffer of a tensor that no step of a tape computes
_FORMATS = {torch.contiguous_format: 0, torch.channels_last: 1, torch.preserve_format: 2}


class Buffer:
    """Memory that steps read and write, live from step ``first`` to step ``last``."""

    def __init__(self, kind: int, place: int, size: int, step: int) -> None:
        self.kind, self.place, self.bytes, self.first, self.last = kind, place, size, step, step


class Launch(NamedTuple):
    compiled: launch.Compiled
    grid: tuple[int, ...]
    parameters: list[bytes | tuple[int, int, int]]  # a value, or buffer, offset and extent in bytes


class Call(NamedTuple):
    name: str
    overload: str
    arguments: list[tuple[int, bool, Any]]  # kind, whether optional, value
    results: list[int]  # views, -1 for None


class _NotRecordedError(Exception):
    pass


class LaunchRecorder(TorchDispatchMode):
    """Context manager that records what runs on this thread, for inputs like ``inputs``.

    ``reason``: why no tape can be made, or None. ``closed``: kernels may read only the inputs and what was computed
    from them; a constant is then a reason.
    """

    def __init__(self, inputs: Sequence[Tensor], closed: bool = False) -> None:
        super().__init__()
        self.inputs, self.closed = list(inputs), closed
        self.reason: str | None = None
        self.steps: list[Launch | Call] = []
        self._buffers: list[Buffer] = []
        self._numbers: dict[int, list[int]] = {}  # buffers by storage; inputs may share one
        self._begins: list[int] = []  # addresses by buffer
        self._views: list[tuple[int, ...]] = []
        self._held: list[Any] = []  # keeps storages alive, so that their addresses identify them
        self._constants: list[Any] = []
        self._paused = False
        for i, t in enumerate(self.inputs):
            self._add(t, _INPUT, i, _span(t))

    def __enter__(self) -> LaunchRecorder:
        launch.record(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        launch.record(None)
        super().__exit__(*error)

    def pause(self) -> _Pause:
        """A context in which nothing is recorded: tensors made there are constants."""
        return _Pause(self)

    def launched(self, compiled: launch.Compiled, grid: Sequence[int], values: Sequence[Any]) -> None:
        """Records a launch; ``values``: the arguments, in the order of ``compiled.parameters``."""
        if self.reason is not None:
            return
        try:
            parameters = [
                (*self._place(value), _span(value)) if isinstance(value, Tensor) else _bytes_of(kind, value)
                for kind, value in zip(compiled.parameters, values, strict=True)
            ]
        except _NotRecordedError as error:
            self.reason = str(error)
            return
        parameters += [bytes(8)] * compiled.scratch_pointers
        self.steps.append(Launch(compiled, (*grid, 1, 1)[:3], parameters))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._paused or self.reason is not None:
            return out
        try:
            self._ran(func, args, kwargs or {}, out)
        except _NotRecordedError as error:
            self.reason = str(error)
        return out

    def _ran(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        schema = func._schema
        if schema.name == "aten::max_pool2d_with_indices":  # record max_pool2d: inference does not use the indices
            out, indices = out
            self._numbers[indices.untyped_storage()._cdata] = [_UNKNOWN]
            self._held.append(indices)
            func = torch.ops.aten.max_pool2d.default
            schema = func._schema
        results = out if isinstance(out, tuple) else (out,)
        if schema.is_mutable or not all(t is None or isinstance(t, Tensor) for t in results):
            raise _NotRecordedError(f"{schema.name} in a chain")
        if schema.name in _EMPTY:
            self._add(out, _SCRATCH, 0, out.untyped_storage().nbytes())
            return
        if isinstance(out, Tensor) and self._is_view(out, args):
            return
        values = [
            args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            for i, argument in enumerate(schema.arguments)
        ]
        if schema.name == "aten::addmm" and values[3:] == [1, 1]:  # its factors have a type that tapes cannot hold
            func, values = torch.ops.aten.linear.default, [values[1], values[2].t(), values[0]]
            schema = func._schema
        arguments = [self._argument(a.type, value) for a, value in zip(schema.arguments, values, strict=True)]
        for t in results:
            if t is not None:
                self._add(t, _RESULT, 0, t.untyped_storage().nbytes())
        views = [-1 if t is None else self._view(t) for t in results]
        self.steps.append(Call(schema.name, schema.overload_name, arguments, views))

    def _is_view(self, out: Tensor, args: Sequence[Any]) -> bool:
        """Whether ``out`` is a view of a buffer or of a constant."""
        storage = out.untyped_storage()._cdata
        return storage in self._numbers or any(
            isinstance(a, Tensor) and a.untyped_storage()._cdata == storage for a in args
        )

    def _argument(self, kind: Any, value: Any) -> tuple[int, bool, Any]:
        optional = isinstance(kind, torch.OptionalType)
        if value is None:
            return _NONE, optional, 0
        if isinstance(value, Tensor):
            return _TENSOR, optional, self._view(value)
        name = str(kind.getElementType() if optional else kind)
        if isinstance(value, torch.memory_format) and value in _FORMATS:
            return _FORMAT, optional, _FORMATS[value]
        if name == "bool":
            return _BOOL, optional, int(value)
        if name == "int" and type(value) is int:
            return _INT, optional, value
        if name == "float":
            return _DOUBLE, optional, struct.unpack("q", struct.pack("d", value))[0]
        if name == "List[int]" and all(type(v) is int for v in value):
            return _INTS, optional, list(value)
        if name == "List[bool]" and not optional:
            return _BOOLS, optional, list(map(int, value))
        if isinstance(value, torch.dtype) and value in _DTYPES:
            return _DTYPE, optional, _DTYPES[value]
        raise _NotRecordedError(f"an operator's argument {value!r} of type {kind}")

    def _add(self, t: Tensor, kind: int, place: int, size: int) -> int:
        storage, number = t.untyped_storage(), len(self._buffers)
        self._held.append(storage)
        if kind == _INPUT:
            self._numbers.setdefault(storage._cdata, []).append(number)
        else:
            self._numbers[storage._cdata] = [number]
        self._begins.append(t.data_ptr() if kind == _INPUT else storage.data_ptr())
        self._buffers.append(Buffer(kind, place, size, len(self.steps)))
        return number

    def _place(self, t: Tensor) -> tuple[int, int]:
        """The buffer of ``t``, and the offset of ``t`` in it in bytes; a new constant if none is known."""
        storage = t.untyped_storage()
        numbers = self._numbers.get(storage._cdata)
        if numbers is None:
            if self.closed:
                raise _NotRecordedError(f"a constant of shape {tuple(t.shape)}")
            numbers = [self._add(t, _CONSTANT, storage.data_ptr(), storage.nbytes())]
            self._constants.append(storage)
        if numbers == [_UNKNOWN]:
            raise _NotRecordedError("indices of max pooling")
        begin, end = t.data_ptr(), t.data_ptr() + _span(t)
        for number in numbers:
            buffer, first = self._buffers[number], self._begins[number]
            if first <= begin and end <= first + buffer.bytes:
                buffer.last = len(self.steps)
                return number, begin - first
        raise _NotRecordedError("memory beside the inputs")

    def _view(self, t: Tensor) -> int:
        dtype = _dtype_number(t)
        buffer, offset = self._place(t)
        self._views.append((buffer, dtype, offset // t.element_size(), *_listed(t.shape, t.stride())))
        return len(self._views) - 1

    def words(self, outputs: Sequence[Tensor]) -> list[int] | None:
        """The recording encoded for C++, after it has ended; None if there is a :attr:`reason`. ``outputs``: distinct
        tensors that were computed."""
        if self.reason is not None:
            return None
        try:
            return self._words(outputs)
        except _NotRecordedError as error:
            self.reason = str(error)
            return None

    def _words(self, outputs: Sequence[Tensor]) -> list[int]:
        returned = [self._returned(t) for t in outputs]
        output_buffers = {self._views[view][0] for view in returned}
        first = self.inputs[0]
        words = [int(first.is_cuda), first.get_device(), arrange(self._buffers) // 8]
        words.append(len(self._buffers))
        for b in self._buffers:
            words += [b.kind, b.place, b.bytes]
        words.append(len(self.inputs))
        for i, t in enumerate(self.inputs):
            words += [i, _dtype_number(t), 0, *_listed(t.shape, t.stride()), int(t.data_ptr() % 16 == 0)]
        aliases = self._aliases()
        words.append(len(aliases))
        for alias in aliases:
            words += alias
        words.append(len(self._views))
        for view in self._views:
            words += view
        words += [*_listed(returned), len(self.steps)]
        ends: dict[int, list[int]] = {}
        for n, b in enumerate(self._buffers):
            if b.kind == _RESULT and n not in output_buffers:
                ends.setdefault(b.last, []).append(n)
        for i, step in enumerate(self.steps):
            words += _launch_words(step) if isinstance(step, Launch) else _call_words(step)
            words += _listed(ends.get(i, ()))
        return words

    def _returned(self, t: Tensor) -> int:
        """The view of an output; gives its buffer memory of its own, outside of the scratch block."""
        view = self._view(t)
        buffer = self._buffers[self._views[view][0]]
        if buffer.kind == _SCRATCH:
            if t.storage_offset() != 0 or t.untyped_storage().nbytes() != _span(t):
                raise _NotRecordedError("a result that is a part of what was computed")
            buffer.kind, buffer.place = _OUTPUT, view
        elif buffer.kind not in (_OUTPUT, _RESULT):
            raise _NotRecordedError("a result that nothing computed")
        return view

    def _aliases(self) -> list[tuple[int, int, int]]:
        """Pairs of inputs that overlap, and the distance of their addresses: kernels were given the first of a pair."""
        found = []
        for numbers in self._numbers.values():
            inputs = [n for n in numbers if n != _UNKNOWN and self._buffers[n].kind == _INPUT]
            for i, n in enumerate(inputs):
                for m in inputs[:i]:
                    apart = self._begins[n] - self._begins[m]
                    if -self._buffers[n].bytes < apart < self._buffers[m].bytes:
                        found.append((m, n, apart))
        return found

    def constants(self) -> list[Any]:
        """Objects that must live as long as the tape."""
        compiled = [s.compiled for s in self.steps if isinstance(s, Launch)]
        return [*self._constants, *((c.owner, c.reaches) for c in compiled)]


class _Pause:
    def __init__(self, recorder: LaunchRecorder) -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        self._before, self._recorder._paused = self._recorder._paused, True

    def __exit__(self, *error: Any) -> None:
        self._recorder._paused = self._before


def _span(t: Tensor) -> int:
    """Bytes from the first element to the end of the last one."""
    if t.numel() == 0:
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def _dtype_number(t: Tensor) -> int:
    if t.dtype not in _DTYPES:
        raise _NotRecordedError(f"a tensor of {t.dtype}")
    return _DTYPES[t.dtype]


def _listed(*lists: Sequence[int]) -> list[int]:
    return [word for values in lists for word in (len(values), *values)]


def _text(text: bytes | str) -> list[int]:
    data = text.encode() if isinstance(text, str) else text
    return [len(data), *array("q", data + bytes(-len(data) % 8))]


def _bytes_of(kind: str, value: Any) -> bytes:
    """A parameter by value; integers in eight bytes, of which a kernel reads as many as its type has."""
    if isinstance(value, bytes):
        return value
    if kind in ("fp32", "fp64"):
        return struct.pack({"fp32": "f", "fp64": "d"}[kind], value)
    return int(value or 0).to_bytes(8, "little", signed=int(value or 0) < 0)


def _launch_words(step: Launch) -> list[int]:
    compiled = step.compiled
    words = [0, compiled.function, int(compiled.by_driver), *step.grid, compiled.threads, compiled.shared]
    words.append(len(step.parameters))
    for parameter in step.parameters:
        words += [0, *_text(parameter)] if isinstance(parameter, bytes) else [1, *parameter]
    return words


def _call_words(step: Call) -> list[int]:
    words = [1, *_text(step.name), *_text(step.overload), len(step.arguments)]
    for kind, optional, value in step.arguments:
        words += [kind, int(optional)]
        if kind in (_INTS, _BOOLS):
            words += _listed(value)
        elif kind != _NONE:
            words.append(value)
    return [*words, *_listed(step.results)]


def arrange(buffers: Sequence[Buffer]) -> int:
    """Assigns offsets to the scratch buffers, the largest first, each at the lowest offset that no buffer live at the
    same time overlaps; returns the total in bytes."""
    placed: list[Buffer] = []
    total = 0
    for b in sorted((b for b in buffers if b.kind == _SCRATCH), key=lambda b: -b.bytes):
        place = 0
        for other in sorted(placed, key=lambda other: other.place):
            apart = b.last < other.first or other.last < b.first
            if not apart and other.place < place + b.bytes and place < other.place + other.bytes:
                place = math.ceil((other.place + other.bytes) / _ALIGN) * _ALIGN
        b.place = place
        placed.append(b)
        total = max(total, place + math.ceil(b.bytes / _ALIGN) * _ALIGN)
    return total
