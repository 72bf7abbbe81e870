"""add_relu: values, layouts, special values, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F
from helpers.support import DTYPES, LAYOUTS, product

from resnet_fast import backends, ops

# 1024 is the piece in which bfloat16 is widened, 32768 the least that a thread takes.
SHAPES = [
    (),
    (0,),
    (1,),
    (17,),
    (1023,),
    (1025,),
    (3, 5, 7),
    (2, 3, 4, 5),
    (2, 0, 4, 5),
    (1, 3, 181, 191),
    (2, 1, 3, 1, 5),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_eager(shape, dtype):
    """One addition and one rounding: the result is eager's, bit for bit."""
    a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    with backends.use("cpu"):
        out = ops.add_relu(a, b)
    assert torch.equal(out, F.relu(a + b))
    assert out.stride() == torch.empty_like(a).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "second"), product(LAYOUTS, LAYOUTS), ids=lambda f: f.__name__)
def test_layouts(first, second, dtype):
    a, b = torch.randn(2, 5, 6, 7).to(dtype), torch.randn(2, 5, 6, 7).to(dtype)
    out = ops.add_relu(first(a), second(b))
    assert torch.equal(out, F.relu(a + b))
    assert out.stride() == torch.empty_like(first(a)).stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-40, -1e-40])
    # 11 * 11 values: whole vectors and a remainder.
    a, b = (t.flatten().to(dtype) for t in torch.meshgrid(values, values, indexing="ij"))
    out, expected = ops.add_relu(a, b), F.relu(a + b)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    assert torch.equal(torch.signbit(out)[~out.isnan()], torch.signbit(expected)[~out.isnan()])


def test_bfloat16_nan_payloads_stay_nan():
    """Rounding the largest payload up would carry into infinity."""
    bits = torch.tensor([0x7F81, 0x7FBF, 0x7FFF, 0xFF81 - 65536, 0xFFFF - 65536], dtype=torch.int16)
    a = bits.view(torch.bfloat16)
    assert ops.add_relu(a, torch.zeros_like(a)).isnan().all()


def test_bfloat16_rounds_to_nearest_even():
    """Every sum of two bfloat16 that lies halfway between two of them, and every other of a grid."""
    grid = torch.arange(0, 512).to(torch.bfloat16)
    a, b = (t.flatten() for t in torch.meshgrid(grid, grid / 256, indexing="ij"))
    assert torch.equal(ops.add_relu(a, b), (a.double() + b.double()).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_aliasing_and_expanded(dtype):
    a = torch.randn(3, 4, 5, 6).to(dtype)
    assert torch.equal(ops.add_relu(a, a), F.relu(a + a))
    row = torch.randn(1, 4, 1, 6).to(dtype).expand(3, 4, 5, 6)
    assert torch.equal(ops.add_relu(row, a), F.relu(row + a))
    assert torch.equal(ops.add_relu(a, row), F.relu(row + a))
    assert torch.equal(ops.add_relu(row, row), F.relu(row + row))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_eager(dtype):
    a, b = (torch.randn(2, 5, 6, 7).to(dtype).requires_grad_() for _ in range(2))
    grad = torch.randn(2, 5, 6, 7).to(dtype)
    with torch.no_grad():
        b[0] = -a[0]  # at zero, as everywhere, the gradient is PyTorch's
    fused = torch.autograd.grad(ops.add_relu(a, b), (a, b), grad)
    eager = torch.autograd.grad(F.relu(a + b), (a, b), grad)
    assert all(map(torch.equal, fused, eager))


def test_second_derivatives():
    a, b = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(ops.add_relu, (a, b))
    assert torch.autograd.gradgradcheck(ops.add_relu, (a, b))


@pytest.mark.parametrize(
    ("name", "a", "b"),
    [
        ("b", torch.randn(2, 3), torch.randn(3, 2)),
        ("b", torch.randn(2, 3), torch.randn(3)),
        ("b", torch.randn(2, 3), torch.randn(2, 3, 1)),
        ("b", torch.randn(2, 3), torch.randn(2, 3).double()),
        ("b", torch.randn(2, 3).bfloat16(), torch.randn(2, 3)),
        ("b", torch.randn(2, 3), torch.randn(2, 3, device="meta")),
        ("b", torch.randn(2, 3, device="meta"), torch.randn(2, 3)),
        ("b", torch.randn(2, 3, device="meta"), torch.randn(3, 2, device="meta")),
    ],
)
def test_errors_name_the_argument(name, a, b):
    with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
        ops.add_relu(a, b)


def test_operator_checks_its_dtypes():
    with pytest.raises(RuntimeError, match=r"\ba has dtype"):
        torch.ops.resnet_fast.add_relu(torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.int32))


def test_other_dtypes_run_unfused():
    a = torch.arange(-3, 3)
    assert torch.equal(ops.add_relu(a, a), F.relu(a + a))
    assert backends.fallbacks() == {"add_relu: no kernel for torch.int64": 1}
    with backends.use("cpu"), pytest.raises(RuntimeError, match="int64"):
        ops.add_relu(a, a)


def test_cuda_kernel_is_registered():
    """Built where nvcc was, the CUDA kernel is there, though no GPU may be; the status says which is the case."""
    built = torch._C._dispatch_has_kernel_for_dispatch_key("resnet_fast::add_relu", "CUDA")
    assert built == (not backends.status()["cuda"].startswith("not compiled"))
    assert built == backends.has_kernel("add_relu", "cuda")
