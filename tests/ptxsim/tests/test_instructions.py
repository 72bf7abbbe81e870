"""Single instructions: rounding, flushing, NaNs, conversions, bits."""

import itertools

import numpy as np
import pytest

from ptxsim import Kernel

REGISTER = {
    "f32": "f32",
    "f64": "f64",
    "s32": "b32",
    "u32": "b32",
    "b32": "b32",
    "s64": "b64",
    "u64": "b64",
    "b64": "b64",
    "f16": "b16",
    "bf16": "b16",
    "b16": "b16",
    "s16": "b16",
    "u16": "b16",
    "f16x2": "b32",
    "bf16x2": "b32",
}


def apply(op, out_type, in_types, *inputs):
    """Runs `op` (a template with {d}, {a}, {b}, {c}) on arrays, one element a thread."""
    n = len(inputs[0])
    size = {"b16": 2, "b32": 4, "f32": 4, "b64": 8, "f64": 8}
    text = [
        ".version 8.0",
        ".target sm_80",
        ".address_size 64",
        ".visible .entry k(.param .u64 out, .param .u32 n"
        + "".join(f", .param .u64 in{k}" for k in range(len(inputs)))
        + ") {",
        ".reg .pred %p;",
        ".reg .b32 %i, %n, %t, %b;",
        ".reg .b64 %o, %s;",
        f".reg .{REGISTER[out_type]} %d;",
    ]
    text += [f".reg .{REGISTER[t]} %x{k};" for k, t in enumerate(in_types)]
    text += [
        "mov.u32 %t, %tid.x;",
        "mov.u32 %b, %ctaid.x;",
        "shl.b32 %b, %b, 7;",
        "add.u32 %i, %b, %t;",
        "ld.param.u32 %n, [n];",
        "setp.ge.u32 %p, %i, %n;",
        "@%p ret;",
    ]
    for k, t in enumerate(in_types):
        r = REGISTER[t]
        text += [
            f"ld.param.u64 %o, [in{k}];",
            f"mul.wide.u32 %s, %i, {size[r]};",
            "add.u64 %o, %o, %s;",
            f"ld.global.{r} %x{k}, [%o];",
        ]
    r = REGISTER[out_type]
    text += [
        op.format(d="%d", a="%x0", b="%x1", c="%x2") + ";",
        "ld.param.u64 %o, [out];",
        f"mul.wide.u32 %s, %i, {size[r]};",
        "add.u64 %o, %o, %s;",
        f"st.global.{r} [%o], %d;",
        "ret;",
        "}",
    ]
    dtype = {2: np.uint16, 4: np.uint32, 8: np.uint64}[size[r]]
    out = np.empty(n, dtype)
    Kernel("\n".join(text), "k").launch(-(-n // 128), 128, out, n, *inputs, outputs=[out])
    return out


def floats(n, seed=0):
    """Bit patterns of every kind: normals near and far, subnormals, zeros, infinities, NaNs."""
    g = np.random.default_rng(seed)
    x = g.integers(0, 2**32, n, dtype=np.uint32).view("f")
    y = (g.standard_normal(n) * 4).astype("f")
    x = np.where(g.random(n) < 0.5, x, y).astype("f")
    x[:14] = np.float32(
        [0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, 0.5, 65504, 2.0**-126]
    )
    return x


def flush(x):
    return np.where(abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x).astype("f")


def directed(exact, mode):
    """Rounds an exact value (long double holds products and sums of floats well enough) to float."""
    with np.errstate(all="ignore"):
        near = exact.astype("f")
        wide = near.astype(np.longdouble)
        down, up = np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))
        below, above = np.where(wide <= exact, near, down), np.where(wide >= exact, near, up)
        return {"rn": near, "rm": below, "rp": above, "rz": np.where(exact > 0, below, above)}[mode]


def same(got, expected):
    got, expected = got.view("f"), expected.astype("f")
    nan = np.isnan(expected)
    assert (got.view(np.uint32)[nan] == 0x7FFFFFFF).all()
    assert np.array_equal(got[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_rounding(op, mode):
    g = np.random.default_rng(1)
    x, y = (g.standard_normal((2, 1000)) * 10.0 ** g.integers(-3, 3, (2, 1000))).astype("f")
    wx, wy = x.astype(np.longdouble), y.astype(np.longdouble)
    exact = wx + wy if op == "add" else wx - wy if op == "sub" else wx * wy
    same(apply(f"{op}.{mode}.f32 {{d}}, {{a}}, {{b}}", "f32", ["f32", "f32"], x, y), directed(exact, mode))


def test_fma_rounds_once_in_every_mode():
    one = np.float32([1 + 2.0**-12] * 4)
    got = [
        float(
            apply(f"fma.{m}.f32 {{d}}, {{a}}, {{a}}, {{b}}", "f32", ["f32", "f32"], one, np.float32([-1] * 4)).view(
                "f"
            )[0]
        )
        for m in ("rn", "rz", "rm", "rp")
    ]
    assert got == [2.0**-11 + 2.0**-24] * 4  # exact; an unfused product would lose the last term
    third = np.float32([1 / 3] * 4)
    up, down = (
        apply(f"fma.{m}.f32 {{d}}, {{a}}, {{a}}, {{b}}", "f32", ["f32", "f32"], third, one).view("f")[0]
        for m in ("rp", "rm")
    )
    assert up == np.nextafter(down, np.float32(2))


@pytest.mark.parametrize("op", ["add", "mul", "max", "min"])
def test_special_values_and_ftz(op):
    x, y = (a.ravel() for a in np.meshgrid(floats(40), floats(40)))
    with np.errstate(all="ignore"):
        f = {"add": np.add, "mul": np.multiply, "max": np.fmax, "min": np.fmin}[op]
        for ftz in (False, True):
            a, b = (flush(x), flush(y)) if ftz else (x, y)
            expected = f(a, b)
            if op in ("max", "min"):  # -0 < +0, which numpy leaves open
                zero = (a == 0) & (b == 0)
                sign = np.signbit(a) & np.signbit(b) if op == "max" else np.signbit(a) | np.signbit(b)
                expected = np.where(zero, np.where(sign, np.float32(-0.0), np.float32(0)), expected)
            got = apply(f"{op}{'.ftz' * ftz}.f32 {{d}}, {{a}}, {{b}}", "f32", ["f32", "f32"], x, y)
            same(got, flush(expected) if ftz else expected)


def test_max_keeps_nan_only_when_asked():
    x, y = np.float32([np.nan, 1, np.nan]), np.float32([2, np.nan, np.nan])
    assert np.array_equal(
        apply("max.f32 {d}, {a}, {b}", "f32", ["f32", "f32"], x, y).view("f"), [2, 1, np.nan], equal_nan=True
    )
    assert np.isnan(apply("max.NaN.f32 {d}, {a}, {b}", "f32", ["f32", "f32"], x, y).view("f")).all()


def test_saturation():
    x = np.float32([-1, 0.25, 2, np.nan, np.inf])
    assert apply("add.sat.f32 {d}, {a}, 0f00000000", "f32", ["f32"], x).view("f").tolist() == [0, 0.25, 1, 0, 1]


def test_f16_arithmetic_is_correctly_rounded():
    g = np.random.default_rng(2)
    x, y, z = g.integers(0, 2**16, (3, 6000), dtype=np.uint16).view("e")
    with np.errstate(all="ignore"):
        wide = [a.astype("d") for a in (x, y, z)]
        for op, exact in (("add", wide[0] + wide[1]), ("sub", wide[0] - wide[1]), ("mul", wide[0] * wide[1])):
            got = apply(f"{op}.f16 {{d}}, {{a}}, {{b}}", "f16", ["f16", "f16"], x, y).view("e")
            assert np.array_equal(got, exact.astype("e"), equal_nan=True)
        got = apply("fma.rn.f16 {d}, {a}, {b}, {c}", "f16", ["f16"] * 3, x, y, z).view("e")
        exact = x.astype(np.longdouble) * y + z  # 64 bits hold the sum up to overflow
        assert np.array_equal(got, exact.astype("e"), equal_nan=True)
        relu = apply("fma.rn.relu.f16 {d}, {a}, {b}, {c}", "f16", ["f16"] * 3, x, y, z).view("e")
        assert np.array_equal(relu, np.where(np.isnan(got), got, np.maximum(got, 0)), equal_nan=True)


def test_every_half_converts_both_ways():
    h = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    f = apply("cvt.f32.f16 {d}, {a}", "f32", ["f16"], h).view("f")
    assert np.array_equal(f, h.view("e").astype("f"), equal_nan=True)
    back = apply("cvt.rn.f16.f32 {d}, {a}", "f16", ["f32"], f)
    number = ~np.isnan(f)
    assert np.array_equal(back[number], h[number])
    assert (back[~number] == 0x7FFF).all()


def bfloat(x, mode):
    """Reference rounding of floats to bf16, on the bits."""
    b = x.view(np.uint32).astype(np.uint64)
    low, odd = b & 0xFFFF, b >> 16 & 1
    up = {"rn": (low > 0x8000) | ((low == 0x8000) & (odd == 1)), "rz": False}[mode]
    return np.where(np.isnan(x), 0x7FFF, (b >> 16) + up).astype(np.uint16)


@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_float_to_narrow(mode):
    x = floats(5000, 3)
    x[20:2000].view(np.uint32)[:] &= 0xFFFF8000  # plenty of ties
    assert np.array_equal(apply(f"cvt.{mode}.bf16.f32 {{d}}, {{a}}", "bf16", ["f32"], x), bfloat(x, mode))
    packed = apply(f"cvt.{mode}.bf16x2.f32 {{d}}, {{a}}, {{b}}", "bf16x2", ["f32", "f32"], x, x[::-1].copy())
    assert np.array_equal(packed, bfloat(x, mode).astype(np.uint32) << 16 | bfloat(x[::-1].copy(), mode))
    with np.errstate(all="ignore"):
        half = x.astype("e")
        if mode == "rz":
            over = abs(half.astype("f")) > abs(x)
            half = np.where(over, np.nextafter(half, np.float16(0)), half)
    got = apply(f"cvt.{mode}.f16.f32 {{d}}, {{a}}", "f16", ["f32"], x).view("e")
    assert np.array_equal(got, half, equal_nan=True)


def test_tf32_rounds_ties_away():
    x = np.float32([1, 1 + 2.0**-11, 1 + 2.0**-10, 1 + 3 * 2.0**-11, -1 - 2.0**-11, 3.0e38])
    got = apply("cvt.rna.tf32.f32 {d}, {a}", "b32", ["f32"], x).view("f")
    assert got[:5].tolist() == [1, 1 + 2.0**-10, 1 + 2.0**-10, 1 + 2.0**-9, -1 - 2.0**-10]


@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_float_to_integer_saturates(to, mode):
    x = np.concatenate(
        [floats(200, 4), np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 2.0**31, -(2.0**31), 2.0**63, 70000.5, -70000.5])]
    )
    info = np.iinfo({"s32": "i4", "u32": "u4", "s64": "i8", "u64": "u8", "s16": "i2", "u16": "u2"}[to])
    r = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype("d"))
    # NaN: zero, but the lowest value's pattern for 64-bit results
    expected = [
        ((1 << 63) if info.bits == 64 else 0)
        if np.isnan(v)
        else info.max
        if v >= info.max
        else info.min
        if v <= info.min
        else int(v)
        for v in r
    ]
    got = apply(f"cvt.{mode}.{to}.f32 {{d}}, {{a}}", to, ["f32"], x)
    assert [int(v) for v in got] == [v % (1 << info.bits) for v in expected]


def test_integer_to_float_rounds_once():
    x = np.random.default_rng(5).integers(-(2**63), 2**63, 2000)
    for mode in ("rn", "rz", "rm", "rp"):
        same(apply(f"cvt.{mode}.f32.s64 {{d}}, {{a}}", "f32", ["s64"], x), directed(x.astype(np.longdouble), mode))


@pytest.mark.parametrize(
    ("op", "f"),
    [
        ("ex2.approx", np.exp2),
        ("lg2.approx", np.log2),
        ("sin.approx", np.sin),
        ("cos.approx", np.cos),
        ("tanh.approx", np.tanh),
        ("rsqrt.approx", lambda x: 1 / np.sqrt(x)),
        ("rcp.approx", np.reciprocal),
        ("sqrt.approx", np.sqrt),
    ],
)
def test_approximate_functions_are_close(op, f):
    x = np.random.default_rng(6).uniform(0.01, 3, 500).astype("f")
    np.testing.assert_allclose(
        apply(f"{op}.f32 {{d}}, {{a}}", "f32", ["f32"], x).view("f"), f(x.astype("d")), rtol=2.0**-22
    )


def test_bit_instructions():
    g = np.random.default_rng(7)
    a, b, c = g.integers(0, 2**32, (3, 500), dtype=np.uint32)
    u32 = ["u32"] * 3
    lut = 0b11011000
    expected = sum(
        (
            (lut >> k & 1) * np.uint32(1) * 0xFFFFFFFF
            & (a if k & 4 else ~a)
            & (b if k & 2 else ~b)
            & (c if k & 1 else ~c)
        )
        for k in range(8)
    )
    assert np.array_equal(
        apply(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {lut}", "u32", u32, a, b, c), expected.astype(np.uint32)
    )
    assert apply("brev.b32 {d}, {a}", "u32", u32[:1], a).tolist() == [int(f"{v:032b}"[::-1], 2) for v in a]
    assert apply("popc.b32 {d}, {a}", "u32", u32[:1], a).tolist() == [bin(v).count("1") for v in a]
    assert apply("clz.b32 {d}, {a}", "u32", u32[:1], a >> 7).tolist() == [32 - int(v).bit_length() for v in a >> 7]
    wide = [(int(h) << 32 | int(lo)) for lo, h in zip(a, b, strict=True)]
    assert apply("shf.l.wrap.b32 {d}, {a}, {b}, {c}", "u32", u32, a, b, c).tolist() == [
        (w << (int(s) & 31) >> 32) % 2**32 for w, s in zip(wide, c, strict=True)
    ]
    assert apply("shf.r.clamp.b32 {d}, {a}, {b}, {c}", "u32", u32, a, b, c % 40).tolist() == [
        (w >> min(int(s), 32)) % 2**32 for w, s in zip(wide, c % 40, strict=True)
    ]
    sel = c & 0xFFFF

    def permute(w, s):
        by = [w >> 8 * ((s >> 4 * i) & 7) & 255 for i in range(4)]
        by = [(255 if v & 128 else 0) if s >> 4 * i & 8 else v for i, v in enumerate(by)]
        return sum(v << 8 * i for i, v in enumerate(by))

    assert apply("prmt.b32 {d}, {a}, {b}, {c}", "u32", u32, a, b, sel).tolist() == [
        permute(w, int(s)) for w, s in zip(wide, sel, strict=True)
    ]
    pos, length = b % 40, c % 40
    assert apply("bfe.u32 {d}, {a}, {b}, {c}", "u32", u32, a, pos, length).tolist() == [
        (int(v) >> int(p)) % (1 << int(n)) for v, p, n in zip(a, pos, length, strict=True)
    ]
    signed = [(int(v) - (1 << 32) * (int(v) >> 31)) >> int(p) for v, p in zip(a, pos, strict=True)]
    expected = [
        0 if n == 0 else (v % (1 << int(n)) - ((1 << int(n)) if v >> int(n) - 1 & 1 else 0)) % 2**32
        for v, n in zip(signed, length, strict=True)
    ]
    assert apply("bfe.s32 {d}, {a}, {b}, {c}", "u32", u32, a, pos, length).tolist() == expected
    assert apply("shl.b32 {d}, {a}, {b}", "u32", u32[:2], a, pos).tolist() == [
        (int(v) << int(p)) % 2**32 for v, p in zip(a, pos, strict=True)
    ]


def test_integer_division_by_zero_does_not_trap():
    x = np.int32([7, -7, -(2**31)])
    assert (
        apply("div.u32 {d}, {a}, {b}", "u32", ["u32"] * 2, x.view(np.uint32), np.zeros(3, np.uint32)).tolist()
        == [2**32 - 1] * 3
    )
    assert apply("div.s32 {d}, {a}, {b}", "s32", ["s32"] * 2, x, np.int32([-1] * 3)).view(np.int32).tolist() == [
        -7,
        7,
        -(2**31),
    ]


def test_all_pairs_of_comparisons():
    x, y = (np.repeat(np.float32([1, 2, np.nan]), 3), np.tile(np.float32([1, 2, np.nan]), 3))
    nan = np.isnan(x) | np.isnan(y)
    ordered = {"eq": x == y, "ne": (x != y) & ~nan, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}
    for op, expected in [
        *ordered.items(),
        *((k + "u", v | nan) for k, v in ordered.items()),
        ("num", ~nan),
        ("nan", nan),
    ]:
        got = apply(f"set.{op}.u32.f32 {{d}}, {{a}}, {{b}}", "u32", ["f32"] * 2, x, y)
        assert np.array_equal(got != 0, expected), op


def test_carry_chains_follow_the_hardware():
    """subc after add.cc, as nvcc mixes them: a + ~b + carry."""
    a, b = (np.array(v, np.uint32) for v in zip(*itertools.product([0, 1, 2**32 - 1], repeat=2), strict=True))
    got = apply("add.cc.u32 {d}, {a}, {b};\nsubc.u32 {d}, {a}, {b}", "u32", ["u32"] * 2, a, b)
    carry = (a.astype(np.uint64) + b) >> np.uint64(32)
    assert got.tolist() == [
        (int(x) + (2**32 - 1 - int(y)) + int(k)) % 2**32 for x, y, k in zip(a, b, carry, strict=True)
    ]
