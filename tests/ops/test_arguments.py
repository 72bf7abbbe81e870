"""Wrong arguments of the operators: errors name the operator and the argument, whatever path the call would take."""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.support import OPS, channels_last

from resnet_fast import backends, ops
from resnet_fast.ops import arguments

registered = torch.ops.resnet_fast


def arguments_of(op, dtype=torch.float32):
    """A call that runs, by name."""
    x, weight = torch.randn(2, 8, 9, 9, dtype=dtype), torch.randn(8, 8, 3, 3, dtype=dtype)
    vectors = {name: torch.rand(8, dtype=dtype) + 0.5 for name in arguments.VECTORS}
    residual = {"residual": torch.randn(2, 8, 9, 9, dtype=dtype)} if op == "conv_bn_add_relu" else {}
    return {"x": x, **residual, "weight": weight, **vectors, "padding": 1}


# Kernels, and what runs on PyTorch's own operators, which take more than kernels do and name nothing.
PATHS = {"kernel": {}, "dilation": {"dilation": 2, "padding": 2}}

WRONG = {
    "None": ("weight", None, TypeError, "weight is None, want a tensor"),
    "x None": ("x", None, TypeError, "x is None, want a tensor"),
    "list": ("weight", [1.0], TypeError, "weight is a list, want a tensor"),
    "array": ("bias", torch.rand(8).numpy(), TypeError, "bias is a ndarray, want a tensor"),
    "sparse": ("x", torch.randn(2, 8, 9, 9).to_sparse(), RuntimeError, "x is torch.sparse_coo, want torch.strided"),
    "sparse vector": ("bias", torch.rand(8).to_sparse(), RuntimeError, "bias is torch.sparse_coo"),
    "mkldnn": ("weight", torch.randn(8, 8, 3, 3).to_mkldnn(), RuntimeError, "weight is torch._mkldnn"),
    "nested": ("x", torch.nested.nested_tensor([torch.randn(3, 2)]), RuntimeError, "x is nested, want torch.strided"),
    "device": ("running_var", torch.rand(8, device="meta"), RuntimeError, "running_var is on meta, want cpu"),
    "unbatched": ("x", torch.randn(8, 9, 9), RuntimeError, r"x has shape \[8, 9, 9\]"),
    "channels": ("x", torch.randn(2, 7, 9, 9), RuntimeError, "x has 7 channels, want 8"),
    "no filters": ("weight", torch.randn(0, 8, 3, 3), RuntimeError, r"weight has shape \[0, 8, 3, 3\]"),
    "small": ("x", torch.randn(2, 8, 9, 0), RuntimeError, "x (has shape|is)"),
    "dtype": ("weight", torch.randn(8, 8, 3, 3).double(), RuntimeError, "weight has dtype"),
    "integers": ("running_mean", torch.ones(8, dtype=torch.int64), RuntimeError, "running_mean has dtype"),
    "narrow vector": ("bn_weight", torch.ones(8).half(), RuntimeError, "bn_weight has dtype"),
    "length": ("bn_bias", torch.rand(1), RuntimeError, r"bn_bias has shape \[1\], want \[8\]"),
    "alone": ("running_mean", None, RuntimeError, "running_mean and running_var"),
    "stride": ("stride", 0, RuntimeError, r"stride is \[0, 0\], want"),
    "huge stride": ("stride", 2**63 - 1, RuntimeError, "stride is .* to 2147483647"),
    "huge padding": ("padding", 2**63 - 1, RuntimeError, "padding is .* to 65535"),
    "both huge": ("padding", 2**31 - 1, RuntimeError, "padding is .* to 65535"),
    "eps": ("eps", -1.0, RuntimeError, "eps is -1.*, want at least 0"),
    "text for eps": ("eps", "1e-5", (RuntimeError, TypeError), "eps"),
}


def assert_named(raises, op, message):
    """One message, which starts with the operator; what PyTorch said, backtraces and all, is not shown above it."""
    error = raises.value
    assert str(error).startswith(f"{op}: "), error
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__
    assert "CapturedTraceback" not in str(error)
    assert len(str(error)) < 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("op", OPS)
def test_convolutions(op, case, path):
    name, value, kind, message = WRONG[case]
    call = {**arguments_of(op), **PATHS[path], name: value}
    with pytest.raises(kind, match=message) as raises:
        getattr(ops, op)(**call)
    assert_named(raises, op, message)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("op", OPS)
def test_the_call_itself_runs(op, path):
    """Beside every wrong argument above all others are right."""
    assert getattr(ops, op)(**{**arguments_of(op), **PATHS[path]}).shape == (2, 8, 9, 9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (8, 9, 9), (2, 8, 9, 1)], ids=str)
def test_no_residual_is_broadcast(shape, path):
    call = {**arguments_of("conv_bn_add_relu"), **PATHS[path], "residual": torch.randn(shape)}
    with pytest.raises(RuntimeError, match=r"conv_bn_add_relu: residual"):
        ops.conv_bn_add_relu(**call)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"groups": 3}, RuntimeError, "groups is 3, want a divisor of 8"),
        ({"groups": 0}, RuntimeError, "groups is 0"),
        ({"groups": 2}, RuntimeError, "x has 8 channels, want 16"),
        ({"groups": "2"}, TypeError, "groups is a str"),
        ({"dilation": 0}, RuntimeError, r"dilation is \[0, 0\]"),
        ({"dilation": 9}, RuntimeError, "x is .* smaller .* than weight"),
    ],
    ids=str,
)
def test_what_only_pytorch_takes(changes, kind, message):
    with pytest.raises(kind, match=f"^conv_bn: {message}"):
        ops.conv_bn(**{**arguments_of("conv_bn"), **changes})


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_pytorch_refuses(dtype):
    x, weight = torch.ones(1, 3, 4, 4).to(dtype), torch.ones(4, 3, 3, 3).to(dtype)
    with pytest.raises(RuntimeError, match=f"^conv_bn: x has dtype {dtype}, want float32"):
        ops.conv_bn(x, weight)
    a = torch.ones(3).to(dtype)
    with pytest.raises(RuntimeError, match=f"^add_relu: a has dtype {dtype}"):
        ops.add_relu(a, a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)  # kernel and not
@pytest.mark.parametrize(
    ("a", "b", "kind", "message"),
    [
        (None, torch.ones(3), TypeError, "a is None, want a tensor"),
        (torch.ones(3), None, TypeError, "b is None, want a tensor"),
        (torch.ones(3), 1.0, TypeError, "b is a float, want a tensor"),
        (torch.ones(3), torch.ones(1), RuntimeError, r"b has shape \[1\], want \[3\]"),
        (torch.ones(2, 3).to_sparse(), torch.ones(2, 3), RuntimeError, "a is torch.sparse_coo"),
        (torch.ones(3), torch.ones(3).half(), RuntimeError, "b has dtype"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_add_relu(a, b, kind, message, dtype):
    a = a.to(dtype) if isinstance(a, torch.Tensor) else a
    b = b.to(dtype) if isinstance(b, torch.Tensor) and b.dtype == torch.float32 else b
    with pytest.raises(kind, match=message) as raises:
        ops.add_relu(a, b)
    assert_named(raises, "add_relu", message)


def test_an_error_that_no_argument_is_to_blame_for_stays(monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory")

    for name in ("conv_bn_relu", "add_relu"):  # files, which functions hide
        monkeypatch.setattr(sys.modules[f"resnet_fast.ops.{name}"], "unfused_reason", fail)
    with pytest.raises(RuntimeError, match=r"^no memory$"):
        ops.conv_bn(**arguments_of("conv_bn"))
    with pytest.raises(RuntimeError, match=r"^no memory$"):
        ops.add_relu(torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("vectors", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_statistics_of_any_dtype_with_and_without_dilation(dtype, vectors):
    """The docstring allows any of these; F.batch_norm does not."""
    call = {k: v.to(vectors) if k in arguments.VECTORS else v for k, v in arguments_of("conv_bn_relu", dtype).items()}
    call["weight"] = call["weight"] / 8
    wide = {k: v.double() for k, v in call.items() if isinstance(v, torch.Tensor)}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 0.05
    for path in PATHS.values():
        y = ops.conv_bn_relu(**{**call, **path})
        exact = F.conv2d(wide["x"], wide["weight"], wide["bias"], 1, path.get("padding", 1), path.get("dilation", 1))
        norm = (wide["running_mean"], wide["running_var"], wide["bn_weight"], wide["bn_bias"])
        exact = F.relu(F.batch_norm(exact, *norm, eps=1e-5))
        assert y.dtype == dtype
        assert torch.allclose(y.double(), exact, rtol=tolerance, atol=tolerance * float(exact.max()))
    with backends.use("eager"):
        assert ops.conv_bn_relu(**call).dtype == dtype


def test_gradients_of_statistics_of_another_dtype():
    call = arguments_of("conv_bn", torch.float64)
    call = {k: v.float().requires_grad_() if k in ("bn_weight", "bn_bias") else v for k, v in call.items()}
    fused, unfused = (ops.conv_bn(**{**call, **path}) for path in PATHS.values())
    for y in (fused, unfused):
        grads = torch.autograd.grad(y.sum(), (call["bn_weight"], call["bn_bias"]))
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_shapes_with_dilation_need_no_device():
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments_of("conv_bn").items()}
    assert ops.conv_bn(**{**meta, "dilation": 2, "padding": 2}).shape == (2, 8, 9, 9)


# Registered operators: Python's None may stand for any tensor, and lists may be of any length.


def stage_filters(count=1):
    return [registered.pack_conv_bn(torch.randn(8, 8, 3, 3), *[None] * 5, 0.0, 0) for _ in range(count)]


LAYER = [0, -1, 1, 8, 3, 3, 1, 1, 1, 1]
X = channels_last(torch.randn(2, 8, 6, 6))
WEIGHT = torch.randn(8, 8, 3, 3)
ROWS = torch.rand(2, 8) + 0.5
PAIRS = ([1, 1], [1, 1])
NO_VECTORS = [None] * 5

REGISTERED = [
    ("add_relu", (None, X), "a is None"),
    ("add_relu", (X, None), "b is None"),
    ("conv_bn", (None, WEIGHT, *NO_VECTORS, 0.0, *PAIRS), "x is None"),
    ("conv_bn", (X, None, *NO_VECTORS, 0.0, *PAIRS), "weight is None"),
    ("conv_bn_add_relu", (X, None, WEIGHT, *NO_VECTORS, 0.0, *PAIRS), "residual is None"),
    ("conv_bn", (X, WEIGHT, *NO_VECTORS, 0.0, [1, 1, 1], [1, 1]), r"stride is \[1, 1, 1\], want two integers"),
    ("conv_bn", (X, WEIGHT, *NO_VECTORS, 0.0, [1, 1], [1, 2**63 - 1]), r"padding is \[1, \d+\], want two integers"),
    ("pack_conv_bn", (WEIGHT, None, None, None, ROWS[0], ROWS[1], -1.0), "eps is -1, want at least 0"),
    ("conv_chain", (None, stage_filters(), LAYER), "x is None"),
    ("conv_chain", (X, stage_filters(), [*LAYER[:8], 2**62, 1]), "padding is"),
    ("conv_chain", (X, stage_filters(), [*LAYER[:4], 2**62, 4, *LAYER[6:]]), "layer 0 has a filter of"),
    ("conv_chain", (X, stage_filters(), LAYER, [2, 2, 1, 2**63 - 1, 0, 0]), "pool has a window"),
    ("conv_bn_stats", (X, None, False, None, None, *PAIRS, 0, True), "weight is None"),
    ("conv_bn_stats", (X, None, False, WEIGHT, None, [1, 1], [0, 2**62], 0, True), "padding is"),
    ("bn_apply", (X, None, None, None, True), "scale_shift is None"),
    ("bn_backward_reduce", (None, X, None, [], []), "grad is None"),
    ("channel_sums", (X[:, :, :3],), "grad of shape"),
    ("conv_backward", (X, None, None, None, None, False, WEIGHT, *PAIRS, 0, True, True, None, False, [], []), "x is N"),
    ("max_pool", (X, [3, 3], [1, 2**63 - 1], [1, 1], False), "stride is"),
    ("max_pool_backward", (X, None, [6, 6], [3, 3], [1, 1], [1, 1]), "argmax is None"),
    ("max_pool_backward", (X, torch.zeros(288, dtype=torch.uint8), [6, -1], [3, 3], [1, 1], [1, 1]), "size is"),
]


@pytest.mark.parametrize(("op", "call", "message"), REGISTERED, ids=lambda v: v if isinstance(v, str) else "")
def test_registered_operators(op, call, message):
    with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
        getattr(registered, op)(*call)


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn], ids=lambda f: f.__name__)
def test_layouts_that_have_no_kernel(name, change):
    call = {"x": X, "weight": WEIGHT, "bias": ROWS[0]}
    call[name] = change(call[name].contiguous())
    with pytest.raises(RuntimeError, match=f"^conv_bn: {name} is torch") as raises:
        registered.conv_bn(*call.values(), *[None] * 4, 0.0, *PAIRS)
    assert_named(raises, "conv_bn", name)


def test_lists_that_have_no_kernel():
    with pytest.raises(RuntimeError, match=r"^bn_backward_reduce: ys is torch.sparse_coo"):
        registered.bn_backward_reduce(X, None, None, [X.contiguous().to_sparse()], [ROWS])


def test_no_channels():
    """Sums of nothing: pieces are counted in channels."""
    empty = channels_last(torch.empty(2, 0, 6, 6))
    assert registered.channel_sums(empty).shape == (0,)
    assert registered.bn_backward_reduce(empty, None, None, [], [])[1].shape == (3, 0)


@pytest.mark.parametrize("stride", [7, 100, 2**31 - 1])
def test_strides_beyond_the_map(stride):
    """Of the positions modulo the stride only those in the map are visited."""
    settings = ([1, stride], [1, 1])
    grad = channels_last(torch.randn(2, 8, 6, 1))
    rest = (0, True, True, None, False, [], [])
    dx, dw, _ = registered.conv_backward(grad, None, None, X, None, False, WEIGHT, *settings, *rest)
    wide = (t.double() for t in (grad, X, WEIGHT))
    # PyTorch's own, at a stride that it takes and that is beyond the map, too.
    exact = torch.ops.aten.convolution_backward(
        *wide, None, [1, 7], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    assert torch.allclose(dx.double(), exact[0], atol=1e-4)
    assert torch.allclose(dw.double(), exact[1], atol=1e-4)


TRAIN = {
    "x": X,
    "tensors": [WEIGHT, ROWS[0], ROWS[1]],
    "present": [True, False, True, True, False, False],
    "fields": LAYER,
    "eps": [1e-5],
    "batch": [True],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", X[0]),
        ("tensors", TRAIN["tensors"][:2]),
        ("tensors", [WEIGHT[0], *ROWS]),
        ("tensors", [WEIGHT, ROWS[0, :7], ROWS[1]]),
        ("tensors", [WEIGHT.int(), *ROWS]),
        ("present", TRAIN["present"][:5]),
        ("present", [False, True, True, True, False, False]),
        ("fields", LAYER[:9]),
        ("fields", [1, *LAYER[1:]]),
        ("eps", []),
        ("batch", []),
        ("batch", [False]),
    ],
)
def test_train_chain(name, value):
    assert len(registered.train_chain(*TRAIN.values(), False)) == 3
    with pytest.raises(RuntimeError, match=rf"^train_chain: .*\b{name}\b"):
        registered.train_chain(*{**TRAIN, name: value}.values(), False)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("grad", lambda t: t[..., :3]),
        ("saved", lambda ts: ts[:1]),
        ("saved", lambda ts: [ts[0][:1], *ts[1:]]),
        ("saved", lambda ts: [ts[0], ts[1][0]]),
        ("needs", lambda bs: bs[:2]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_train_chain_backward(name, change):
    out, *saved = registered.train_chain(*TRAIN.values(), False)
    x, tensors, *settings = TRAIN.values()
    call = {"grad": out, "x": x, "tensors": tensors, "saved": saved, "settings": settings, "needs": [True] * 4}

    def run(grad, x, tensors, saved, settings, needs):
        return registered.train_chain_backward(grad, x, tensors, saved, *settings, needs)

    assert len(run(**call)) == 4
    with pytest.raises(RuntimeError, match=rf"^train_chain_backward: {name}"):
        run(**{**call, name: change(call[name])})


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("channel_sums", (torch.empty(3),)),
        ("bn_apply", (torch.empty(2, 3), ROWS, None, None, True)),
        ("conv_chain", (X, [], [*LAYER, 5, *LAYER[1:]])),
        ("conv_bn", (X, WEIGHT, *NO_VECTORS, 0.0, [], [])),
        ("max_pool_backward", (X, torch.empty(288), [6], [3, 3], [1, 1], [1, 1])),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_shapes_of_wrong_arguments(op, call):
    """On meta tensors, as in torch.compile: the error says what was given."""
    meta = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in call]
    with pytest.raises(RuntimeError, match=f"^{op}: no shapes follow from "):
        getattr(registered, op)(*meta)


@pytest.mark.parametrize("name", ["x", "weight"])
def test_autocast(name):
    call = {"x": X, "weight": WEIGHT}
    call[name] = None
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"^conv_bn: {name} is None"):
        registered.conv_bn(*call.values(), *NO_VECTORS, 0.0, *PAIRS)


# Filters of more taps than kernels take
