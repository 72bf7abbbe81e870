"""Kernels as PTX text, launched on numpy arrays and CPU torch tensors."""

import ctypes as c
import functools
import json
import re
import struct

import numpy as np

from . import build
from .report import Report

# Beyond the host's own addresses, at which buffers lie that a kernel reaches by addresses in memory.
GLOBAL_BASE, GUARD = 0x1_0000_0000_0000, 4096


class Fault(Exception):  # noqa: N818 (the word of the field)
    """What a kernel did wrong; `kind` is one word, the rest says where; `report` has the counters up to there."""

    def __init__(self, kernel, report, kind, text, address=0, line=None, source="", instruction="", block=0, thread=0):
        self.kernel, self.report, self.kind, self.text = kernel, report, kind, text
        self.address, self.line = address, line
        self.source, self.instruction, self.block, self.thread = source, instruction, block, thread
        place = f"source {source or 'unknown'}, block {block}, thread {thread}, address {address:#x}"
        where = "" if line is None else f"\n  PTX line {line}: {instruction}\n  {place}"
        super().__init__(f"{kernel}: {kind}: {text}{where}")


class PtxError(Exception):
    """PTX the simulator does not know; names the instruction and its line."""


class _Buffer(c.Structure):
    _fields_ = [("name", c.c_char_p), ("base", c.c_uint64), ("size", c.c_uint64)]
    _fields_ += [("host", c.c_void_p), ("init", c.c_void_p), ("output", c.c_int)]


class _Launch(c.Structure):
    _fields_ = [(n, c.c_uint32 * 3) for n in ("grid", "block")]
    _fields_ += [(n, c.c_uint32) for n in ("dynamic_shared", "param_bytes", "buffers", "pad")]
    _fields_ += [("params", c.c_char_p), ("buffer", c.POINTER(_Buffer)), ("seed", c.c_uint64), ("limit", c.c_uint64)]


@functools.cache
def _library() -> c.CDLL:
    lib = build.load()
    lib.ptxsim_compile.restype = lib.ptxsim_free.restype = c.c_void_p
    lib.ptxsim_compile.argtypes = [c.c_char_p, c.c_char_p, c.POINTER(c.c_char_p)]
    lib.ptxsim_free.argtypes = lib.ptxsim_describe.argtypes = [c.c_void_p]
    lib.ptxsim_describe.restype = lib.ptxsim_launch.restype = c.c_char_p
    lib.ptxsim_launch.argtypes = [c.c_void_p, c.POINTER(_Launch)]
    return lib


class _Array:
    """Where an array or tensor lies: host address, bytes spanned, offset in its allocation (decides alignment)."""

    def __init__(self, x):
        if hasattr(x, "data_ptr"):
            if x.device.type != "cpu":
                raise TypeError("the simulator runs on CPU tensors")
            size, self.start = x.element_size(), x.data_ptr()
            strides, self.offset = [s * size for s in x.stride()], self.start - x.untyped_storage().data_ptr()
        else:
            size, strides, self.start = x.itemsize, x.strides, x.ctypes.data
            self.offset = self.start % 16
        if any(s < 0 for s in strides):
            raise TypeError("arrays with negative strides are not supported")
        self.shape, self.strides = (*x.shape, size), (*strides, 1)
        self.bytes = 0 if 0 in x.shape else 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    def unwritten(self) -> np.ndarray:
        """Initialisation map of an output: 0 for its elements, 1 for gaps between them."""
        init = np.ones(self.bytes, np.uint8)
        np.lib.stride_tricks.as_strided(init, self.shape, self.strides)[...] = 0
        return init


class Kernel:
    """One entry function of a PTX module."""

    def __init__(self, ptx: str, name: str | None = None):
        names = [name] if name else re.findall(r"\.entry\s+([\w$]+)", ptx)
        if len(names) != 1:
            raise PtxError(f"name one of the kernels {names}")
        self.name, error = names[0], c.c_char_p()
        self._handle = _library().ptxsim_compile(ptx.encode(), self.name.encode(), c.byref(error))
        if not self._handle:
            raise PtxError((error.value or b"").decode())
        self.info = json.loads(_library().ptxsim_describe(self._handle))

    def __del__(self):
        if getattr(self, "_handle", None):
            _library().ptxsim_free(self._handle)

    def launch(
        self, grid, block, *args, shared=0, outputs=(), scratch=(), names=(), init=None, reaches=(), seed=0, limit=10**9
    ) -> Report:
        """Runs the kernel; arrays and tensors are changed in place.

        args: arrays, CPU tensors, numbers, None (null), bytes (structs by value); parameters left out at the end are
        null. outputs: those whose old contents must not be read and that must be written in full; scratch: the
        former only. init: {position: uint8 map of initialised bytes, updated}. reaches: initialised CPU tensors whose
        addresses the kernel finds in memory. Raises Fault.
        """
        grid, block = _triple(grid), _triple(block)
        threads = block[0] * block[1] * block[2]
        if self.info["threads"] not in (0, threads):
            raise ValueError(f"{self.name} was compiled for {self.info['threads']} threads a block, not {threads}")
        if not 0 < threads <= 1024 or not all(grid):
            raise ValueError(f"impossible launch of {self.name}: grid {grid}, block {block}")
        arrays = {k: _Array(a) for k, a in enumerate(args) if isinstance(a, np.ndarray) or hasattr(a, "data_ptr")}
        fresh, must_write = {id(x) for x in (*outputs, *scratch)}, {id(x) for x in outputs}
        maps = {k: a.unwritten() if id(args[k]) in fresh else (init or {}).get(k) for k, a in arrays.items()}
        groups: list[tuple[int, int, list[int]]] = []  # start, end and arguments: those that overlap share a buffer
        for k, a in sorted(arrays.items(), key=lambda item: (item[1].start, -item[1].bytes)):
            if groups and a.bytes and a.start < groups[-1][1]:
                start, end, members = groups.pop()
                groups.append((start, max(end, a.start + a.bytes), [*members, k]))
            else:
                groups.append((a.start, a.start + a.bytes, [k]))
        reached = _spans(reaches)
        buffers, addresses, states, at = (_Buffer * max(1, len(groups) + len(reached)))(), {}, [], GLOBAL_BASE
        for n, (start, end, members) in enumerate(groups):
            base = (at + GUARD + 511) // 512 * 512 + arrays[members[0]].offset % 512
            at = base + end - start
            addresses |= {k: base + arrays[k].start - start for k in members}
            parts = [(arrays[k].start - start, maps[k]) for k in members if maps[k] is not None]
            state = np.ones(end - start, np.uint8) if parts else None
            for low, part in parts:
                state[low : low + len(part)] &= part
            states.append((state, parts))
            name = " / ".join(names[k] if k < len(names) else f"arg{k}" for k in members).encode()
            output = any(id(args[k]) in must_write for k in members)
            buffers[n] = _Buffer(name, base, end - start, start, state.ctypes.data if parts else None, output)
        for n, (start, end) in enumerate(reached, len(groups)):
            buffers[n] = _Buffer(f"reached{n - len(groups)}".encode(), start, end - start, start, None, False)
        params = self._pack(args, addresses)
        count = len(groups) + len(reached)
        launch = _Launch(grid, block, shared, len(params), count, 0, params, buffers, seed, limit)
        result = json.loads(_library().ptxsim_launch(self._handle, c.byref(launch)))
        for state, parts in states:
            for low, part in parts:
                part[:] = state[low : low + len(part)]
        report = Report.of(result)
        if "fault" in result:
            raise Fault(self.name, report, **result["fault"])
        return report

    def _pack(self, args, addresses) -> bytes:
        layout = self.info["params"]
        if len(args) > len(layout):
            raise TypeError(f"{self.name} takes {len(layout)} parameters, got {len(args)}")
        out = bytearray(max((o + n for o, n in layout), default=0))
        for k, (offset, size) in enumerate(layout):
            a = addresses.get(k, args[k] if k < len(args) else None)
            if isinstance(a, (bytes, bytearray)):
                data = bytes(a)
            elif isinstance(a, np.generic):
                data = a.tobytes()
            elif isinstance(a, float):
                data = struct.pack({2: "e", 4: "f", 8: "d"}[size], a)
            else:
                data = (int(a or 0) % (1 << 8 * size)).to_bytes(size, "little")
            if len(data) != size:
                raise TypeError(f"parameter {k} of {self.name} has {size} bytes, the argument {len(data)}")
            out[offset : offset + size] = data
        return bytes(out)


def _spans(tensors) -> list[tuple[int, int]]:
    """First and last address of each piece of memory that the tensors span, merged where they overlap."""
    spans: list[tuple[int, int]] = []
    for a in sorted((_Array(t) for t in tensors), key=lambda a: a.start):
        if a.bytes and spans and a.start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], a.start + a.bytes)
        elif a.bytes:
            spans.append((a.start, a.start + a.bytes))
    return spans


def _triple(x) -> tuple[int, ...]:
    t = tuple(x) if isinstance(x, (tuple, list)) else (x,)
    return (*map(int, t), *([1] * (3 - len(t))))
