"""Wrong calls of the operators: every one is refused by an error that names the argument, and none does harm."""

import random
import re

import numpy as np
import torch

from resnet_fast import backends, ops

from .calls import CONVOLUTIONS, DTYPES, VECTORS, arguments, convolution, laid_out

ERRORS = (TypeError, ValueError, RuntimeError)
# What only tracebacks of C++ and tables of the dispatcher say.
BACKTRACE = re.compile(r"Exception raised from|^frame #|\bC\+\+|registered at /|0x[0-9a-f]{8}", re.MULTILINE)


def check(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    op, name, right, wrong = drawn(rng)
    backend = rng.choice(("auto", "auto", "cpu", "eager"))
    before = getattr(ops, op)(**right)
    values = {k: v.clone() for k, v in right.items() if isinstance(v, torch.Tensor)}
    fault = answer(op, name, wrong, backend)
    assert fault is None, f"backends.use({backend!r}): {op} with wrong {name}: {described(wrong)}\n{fault}"
    changed = [k for k, v in values.items() if not v.equal(right[k])]
    assert not changed, f"{op} with wrong {name} wrote to {changed}: {described(wrong)}"
    assert before.equal(getattr(ops, op)(**right)), (
        f"{op} with wrong {name} changed what comes after: {described(wrong)}"
    )


def answer(op, name, given, backend):
    """What is the matter with the answer to a wrong call, or None."""
    try:
        with backends.use(backend):
            out = getattr(ops, op)(**given)
    except ERRORS as error:
        text = str(error)
        if BACKTRACE.search(text):
            return f"shows C++: {text[:1000]}"
        # Of a backend that was named it may be said first that it cannot run.
        named = re.search(rf"\b{name}\b", text) or text.startswith("backends.use(")
        return None if named else f"does not name {name}: {text}"
    except (AttributeError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return f"is taken, and gives {short(out)}"


def described(given):
    return ", ".join(f"{k}={short(v)}" for k, v in given.items())


def short(value):
    if isinstance(value, torch.Tensor):
        layout = "" if value.layout == torch.strided else f" {value.layout}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{layout} on {value.device.type}"
    return f"{type(value).__name__}()" if isinstance(value, (np.ndarray, list)) else repr(value)


# What no argument may be, made of what it should be.
NO_TENSORS = (
    lambda t: None,
    lambda t: "x",
    lambda t: 1,
    lambda t: [t],
    lambda t: np.ones(tuple(t.shape), np.float32),
    lambda t: t.tolist(),
)
WRONG_TENSORS = (
    lambda t: t.to(torch.complex64),
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
)
# Not of x, of which other dtypes run on PyTorch's own operators, where those can.
WRONG_DTYPES = (lambda t: t.to(torch.int32), lambda t: t.to(torch.bool))
WRONG_SHAPES = (lambda t: t[None], lambda t: t.flatten() if t.dim() > 1 else t[:, None], lambda t: t.sum())


def longer(axis):
    """One more in the dimension."""
    return lambda t: torch.cat([t, t.narrow(axis, 0, 1)], axis) if t.shape[axis] else torch.ones(2, *t.shape[1:]).to(t)


def of(name, *makers):
    """Values for ``name``, made of the tensor that is there, or of one that could be."""

    def made(maker):
        def value(call):
            t = call[name]
            return maker(torch.ones(call["weight"].shape[0]) if t is None else t.detach())

        return value

    return [made(maker) for maker in makers]


def other_dtype(t):
    return t.to(torch.float32 if t.dtype == torch.float64 else torch.float64)


def mkldnn(t):
    return t.float().contiguous().to_mkldnn()


def vector(name):
    """A vector may be missing, and have another dtype than the images."""
    return of(name, *NO_TENSORS[1:], *WRONG_TENSORS, *WRONG_DTYPES, *WRONG_SHAPES, longer(0))


def constants(*values):
    return [lambda call, value=value: value for value in values]


def pairs(name, *values):
    return constants(*values, None, "same", 1.5, (1,), (1, 1, 1), (1.0, 1.0), ("a", 1), -1, (1, -2), -(2**62), 2**70)


def filter_larger_than_the_image(call):
    k, c = call["weight"].shape[:2]
    side = max(call["x"].shape[2:]) + 2 * max(np.ravel(call["padding"])) + 1
    return torch.zeros(k, c, side, 1).to(call["weight"])


IMAGE = (*NO_TENSORS, *WRONG_TENSORS, *WRONG_SHAPES)
WRONG = {
    "x": of("x", *IMAGE, longer(1)),
    "weight": [
        *of("weight", *IMAGE, *WRONG_DTYPES, longer(1), other_dtype, mkldnn, lambda t: t[:0], lambda t: t[..., :0]),
        filter_larger_than_the_image,
    ],
    "residual": of("residual", *IMAGE, *WRONG_DTYPES, *map(longer, range(4)), other_dtype, mkldnn),
    **{name: vector(name) for name in VECTORS},
    "stride": pairs("stride", 0, (1, 0)),
    "padding": pairs("padding", 2**62),
    "dilation": pairs("dilation", 0, (0, 1)),
    "groups": constants(0, -1, 1.5, None, "a", (1, 1), 2**40, 2**70, 67),
    "eps": constants(None, "a", 1j, (1e-5,)),
}
SUMMANDS = {
    "a": (*NO_TENSORS, *WRONG_TENSORS[1:]),
    "b": (*NO_TENSORS, *WRONG_TENSORS, *WRONG_DTYPES, *WRONG_SHAPES, *map(longer, range(3)), other_dtype),
}


def drawn(rng):
    """An operator, the name of an argument, all arguments right, and the same with that one wrong."""
    if rng.random() < 0.15:
        a, b = (torch.randn(2, 3, 4).to(dtype) for dtype in [rng.choice(DTYPES)] * 2)
        name = rng.choice("ab")
        return "add_relu", name, {"a": a, "b": b}, {"a": a, "b": b, name: rng.choice(SUMMANDS[name])(a)}
    op = rng.choice(CONVOLUTIONS)
    call = laid_out(rng, convolution(rng, False, rng.choice(DTYPES)))
    right = arguments(op, call)
    name = rng.choice([name for name in WRONG if name in right])
    return op, name, right, right | {name: rng.choice(WRONG[name])(call)}
