"""Kernels as PTX text, launched on numpy arrays and CPU torch tensors."""

import ctypes
import functools
import json
import re
import struct

import numpy as np

from . import build
from .report import Report, Row

GLOBAL_BASE, GUARD = 0x7F00_0000_0000, 4096


class Fault(Exception):  # noqa: N818 (the word of the field)
    """What a kernel did wrong; `kind` is one word, the rest says where; `report` has the counters up to there."""

    report: Report

    def __init__(self, kernel, kind, text, address=0, line=None, source="", instruction="", block=None, thread=None):
        self.kernel, self.kind, self.text, self.address, self.line = kernel, kind, text, address, line
        self.source, self.instruction, self.block, self.thread = source, instruction, block, thread
        where = ""
        if line is not None:
            place = f"source {source or 'unknown'}, block {block}, thread {thread}, address {address:#x}"
            where = f"\n  PTX line {line}: {instruction}\n  {place}"
        super().__init__(f"{kernel}: {kind}: {text}{where}")


class PtxError(Exception):
    """PTX the simulator does not know; names the instruction and its line."""


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("base", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("host", ctypes.c_void_p),
        ("init", ctypes.c_void_p),
        ("output", ctypes.c_int),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint32),
        ("param_bytes", ctypes.c_uint32),
        ("buffers", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("params", ctypes.c_char_p),
        ("buffer", ctypes.POINTER(_Buffer)),
        ("seed", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    lib = build.load()
    lib.ptxsim_compile.restype = lib.ptxsim_free.restype = ctypes.c_void_p
    lib.ptxsim_compile.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p)]
    lib.ptxsim_free.argtypes = lib.ptxsim_describe.argtypes = [ctypes.c_void_p]
    lib.ptxsim_describe.restype = lib.ptxsim_launch.restype = ctypes.c_char_p
    lib.ptxsim_launch.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Launch)]
    return lib


def _extent(x) -> tuple[int, int, int]:
    """First host byte, bytes spanned, offset from the allocation's start (which decides alignment)."""
    if hasattr(x, "data_ptr"):
        if x.device.type != "cpu":
            raise TypeError("the simulator runs on CPU tensors")
        span = 1 + sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        return x.data_ptr(), span * x.element_size(), x.data_ptr() - x.untyped_storage().data_ptr()
    if any(s < 0 for s in x.strides):
        raise TypeError("arrays with negative strides are not supported")
    span = x.itemsize + sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True)) if x.size else 0
    return x.ctypes.data, span, x.ctypes.data % 16


def _unwritten(x) -> np.ndarray:
    """Initialisation map of an output: 0 for its elements, 1 for gaps between them."""
    torch_like = hasattr(x, "data_ptr")
    size = x.element_size() if torch_like else x.itemsize
    strides = [s * size for s in x.stride()] if torch_like else x.strides
    init = np.ones(_extent(x)[1], np.uint8)
    np.lib.stride_tricks.as_strided(init, (*x.shape, size), (*strides, 1))[...] = 0
    return init


def _is_buffer(x) -> bool:
    return (isinstance(x, np.ndarray) and x.ndim > 0) or hasattr(x, "data_ptr")


class Kernel:
    """One entry function of a PTX module."""

    def __init__(self, ptx: str, name: str | None = None):
        if name is None:
            names = re.findall(r"\.entry\s+([\w$]+)", ptx)
            if len(names) != 1:
                raise PtxError(f"name one of the kernels {names}")
            name = names[0]
        error = ctypes.c_char_p()
        self.name = name
        self._handle = _library().ptxsim_compile(ptx.encode(), name.encode(), ctypes.byref(error))
        if not self._handle:
            raise PtxError((error.value or b"").decode())
        self.info = json.loads(_library().ptxsim_describe(self._handle))

    def __del__(self):
        if getattr(self, "_handle", None):
            _library().ptxsim_free(self._handle)

    def launch(
        self,
        grid,
        block,
        *args,
        shared: int = 0,
        outputs=(),
        scratch=(),
        names=(),
        init=None,
        seed: int = 0,
        limit: int = 10**9,
    ) -> Report:
        """Runs the kernel; arrays and tensors are changed in place.

        args: arrays, CPU tensors, numbers, None (null), bytes (structs by value); parameters left out at the end are
        null. outputs: those whose old contents must not be read and that must be written in full; scratch: the
        former only. init: {position: uint8 map of initialised bytes, updated}. Raises Fault.
        """
        spans = {}  # position -> extent; overlapping ones share one simulated buffer
        for k, a in enumerate(args):
            if _is_buffer(a):
                spans[k] = _extent(a)
        groups: list[list] = []
        for k, (start, size, offset) in sorted(spans.items(), key=lambda kv: (kv[1][0], -kv[1][1])):
            if groups and size and start < groups[-1][0] + groups[-1][1]:
                group = groups[-1]
                group[1] = max(group[1], start + size - group[0])
                group[3].append(k)
            else:
                groups.append([start, size, offset, [k]])
        fresh = {id(x): x for x in (*outputs, *scratch)}
        must_write = {id(x) for x in outputs}
        buffers, keep, bases, at = (_Buffer * max(1, len(groups)))(), [], [], GLOBAL_BASE
        addresses, writebacks = {}, []
        for n, (start, size, offset, members) in enumerate(groups):
            base = (at + GUARD + 511) // 512 * 512 + offset % 512
            at = base + size
            state = None
            for k in members:
                addresses[k] = base + spans[k][0] - start
                part = _unwritten(args[k]) if id(args[k]) in fresh else init.get(k) if init else None
                if part is not None:
                    state = np.ones(size, np.uint8) if state is None else state
                    low = spans[k][0] - start
                    state[low : low + len(part)] &= part
                    writebacks.append((state, low, part))
            name = " / ".join(names[k] if k < len(names) else f"arg{k}" for k in members)
            keep.append((name.encode(), state))
            bases.append((start, base))
            buffers[n] = _Buffer(
                keep[-1][0],
                base,
                size,
                start,
                state.ctypes.data if state is not None else None,
                int(any(id(args[k]) in must_write for k in members)),
            )
        params = self._pack(args, addresses)
        launch = _Launch(
            (ctypes.c_uint32 * 3)(*_triple(grid)),
            (ctypes.c_uint32 * 3)(*_triple(block)),
            shared,
            len(params),
            len(groups),
            0,
            params,
            buffers,
            seed,
            limit,
        )
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        if self.info["threads"] and self.info["threads"] != threads:
            raise ValueError(
                f"{self.name} was compiled for {self.info['threads']} threads a block, launched with {threads}"
            )
        if not 0 < threads <= 1024 or not all(launch.grid):
            raise ValueError(f"impossible launch of {self.name}: grid {grid}, block {block}")
        result = json.loads(_library().ptxsim_launch(self._handle, ctypes.byref(launch)))
        for state, low, part in writebacks:
            part[:] = state[low : low + len(part)]
        report = Report(
            result["executed"],
            [Row(*r) for r in result["rows"]],
            result["classes"],
            result["mma_flops"],
            {b.pop("name"): b for b in result["buffers"]},
        )
        if "fault" in result:
            fault = Fault(self.name, **result["fault"])
            fault.report = report
            raise fault
        return report

    def _pack(self, args, addresses) -> bytes:
        layout = self.info["params"]
        if len(args) > len(layout):
            raise TypeError(f"{self.name} takes {len(layout)} parameters, got {len(args)}")
        out = bytearray(max((o + n for o, n in layout), default=0))
        for k, (offset, size) in enumerate(layout):
            a = args[k] if k < len(args) else None
            if k in addresses:
                data = addresses[k].to_bytes(8, "little")
            elif a is None:
                data = bytes(size)
            elif isinstance(a, (bytes, bytearray)):
                data = bytes(a)
            elif isinstance(a, (np.generic, np.ndarray)):
                data = a.tobytes()
            elif isinstance(a, float):
                data = struct.pack({2: "e", 4: "f", 8: "d"}[size], a)
            else:
                data = (int(a) % (1 << 8 * size)).to_bytes(size, "little")
            if len(data) != size:
                raise TypeError(f"parameter {k} of {self.name} has {size} bytes, the argument {len(data)}")
            out[offset : offset + size] = data
        return bytes(out)


def _triple(x) -> tuple[int, ...]:
    t = tuple(x) if isinstance(x, (tuple, list)) else (x,)
    return (*map(int, t), *([1] * (3 - len(t))))
