"""What the tests of sm_90a share: the text of a wgmma, and operands as its descriptors name them in shared memory."""

import functools
import pathlib

import numpy as np

from .compilers import compile_cuda

SOURCE = pathlib.Path(__file__).with_name("hopper_kernels.cu").read_text()
# Bytes of the pattern and the code of the descriptor's bits 62 and 63.
SWIZZLES = {16: 0, 32: 3, 64: 2, 128: 1}


def wgmma_call(n: int, kind: str = "f16", registers: bool = False, scales=(1, 1), transposes=(0, 0)) -> str:
    """wgmma of float32 sums d[n / 2], with `accumulate` for scale-d, as a statement of CUDA C++."""
    count, k = n // 2, 8 if kind == "tf32" else 16
    d = ", ".join(f"%{i}" for i in range(count))
    a = f"{{{', '.join(f'%{count + i}' for i in range(4))}}}" if registers else f"%{count}"
    at = count + (4 if registers else 1)
    flags = ", ".join(map(str, (*scales, *(() if kind == "tf32" else transposes[1:] if registers else transposes))))
    inputs = [f'"r"(f[{i}])' for i in range(4)] if registers else ['"l"(a_desc)']
    text = [
        "{", ".reg .pred p;", f"setp.ne.b32 p, %{at + 1}, 0;",
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} {{{d}}}, {a}, %{at}, p, {flags};",
        "}",
    ]  # fmt: skip
    outputs = [f'"+f"(d[{i}])' for i in range(count)]
    return 'asm volatile({} : {} : {} : "memory");'.format(
        "\n".join(f'"{line}\\n"' for line in text),
        ", ".join(outputs),
        ", ".join([*inputs, '"l"(b_desc)', '"r"(accumulate)']),
    )


@functools.cache
def compile_hopper(n: int = 8, **call) -> str:
    """The kernels' PTX with `product` of that instruction."""
    source = SOURCE.replace("COUNT", str(n // 2)).replace("WGMMA\n", wgmma_call(n, **call) + "\n")
    return compile_cuda(source, "-arch=sm_90a")


def shared_image(x: np.ndarray, swizzle: int, mn_major: bool) -> tuple[np.ndarray, int]:
    """Bytes of a matrix [rows, k] as a descriptor names them, and its bits without the address.

    Pieces of 16 bytes are placed with the strides of the canonical layouts, with gaps where strides are free; then the
    pattern's bits are exchanged."""
    t = 16 // x.itemsize
    rows, k = x.shape
    wide = swizzle // 16
    image, gap = {}, 3 if swizzle == 16 else 0
    if mn_major:
        pieces = x.T.reshape(k, rows // t, t)
        if swizzle == 16:  # ((T,1,m),(8,k)) : ((1,T,stride),(1T,leading))
            stride = 16 * (8 + gap)
            leading = stride * (rows // t)
            offset = lambda m, j: m * stride + j % 8 * 16 + j // 8 * leading  # noqa: E731
        else:  # ((T,w,m),(8,k)) : ((1,T,leading),(wT,stride))
            stride = 8 * swizzle
            leading = stride * (k // 8)
            offset = lambda m, j: m % wide * 16 + m // wide * leading + j % 8 * swizzle + j // 8 * stride  # noqa: E731
        for j in range(k):
            for m in range(rows // t):
                image[offset(m, j)] = pieces[j, m].tobytes()
    else:  # ((8,m),(T,2)) : ((wT,stride),(1,leading or T))
        pieces = x.reshape(rows, k // t, t)
        stride = 8 * swizzle + 16 * gap
        leading = stride * (rows // 8) + 16 if swizzle == 16 else 16
        for r in range(rows):
            for j in range(k // t):
                image[r % 8 * swizzle + r // 8 * stride + j * leading] = pieces[r, j].tobytes()
    out = np.full(max(image) // 1024 * 1024 + 1024, 0xFF, np.uint8)
    for at, data in image.items():
        row = at // 128 % 8
        low = at // 16 % 8 ^ {16: 0, 32: row & 1, 64: row & 3, 128: row}[swizzle]
        to = at // 128 * 128 + low * 16
        out[to : to + 16] = np.frombuffer(data, np.uint8)
    return out, leading // 16 << 16 | stride // 16 << 32 | SWIZZLES[swizzle] << 62


def accumulators(values: np.ndarray) -> np.ndarray:
    """[64, n] as the threads of a warpgroup hold it: [n / 2, 128]."""
    n = values.shape[1]
    t = np.arange(128)
    i = np.arange(n // 2)[:, None]
    return np.ascontiguousarray(values[t // 32 * 16 + t % 32 // 4 + i % 4 // 2 * 8, i // 4 * 8 + t % 4 * 2 + i % 2])


def entry(ptx: str, name: str) -> str:
    """The module with that kernel alone."""
    head, *bodies = ptx.split(".visible .entry ")
    (body,) = (b for b in bodies if b.startswith(f"{name}("))
    end = body.index("\n}\n\t// .globl") + 3 if "\n}\n\t// .globl" in body else len(body)
    return f"{head}.visible .entry {body[:end]}"
