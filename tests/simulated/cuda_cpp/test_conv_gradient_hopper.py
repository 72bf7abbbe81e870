"""The data gradient of the 3x3 convolution on Hopper, between the gradients of two batch norms."""

import pytest
import torch
import torch.nn.functional as F
from helpers import hopper_training_support as hopper
from ptxsim import Kernel
from ptxsim.compilers import compile_cuda
from ptxsim.tests.test_faults import survivors

# Batch, height, width, channels of the convolution's output and input; as for the forward pass.
SHAPES = [
    (3, 7, 7, 64, 72),
    (5, 2, 3, 48, 64),
    (1, 6, 28, 128, 64),
    (2, 13, 11, 32, 40),
    (1, 9, 14, 192, 16),
    (1, 4, 54, 64, 136),
]


def case(n, h, w, k, c, dtype, seed=0):
    """Small integers: sums and results are exact in any order."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high, *shape: torch.randint(low, high + 1, shape, generator=g)  # noqa: E731
    of_output = [draw(-2, 2, n, h, w, k).to(dtype) for _ in range(2)]
    of_input = [draw(-3, 3, n, h, w, c).to(dtype) for _ in range(3)]
    weight = (draw(-1, 1, k, 3, 3, c) * (torch.rand(k, 3, 3, c, generator=g) < 0.1)).to(dtype)
    affine, stats = draw(-2, 2, 2, c).float(), draw(-1, 1, 2, 2, c).float()
    return of_output, draw(-2, 2, 4, k).float(), weight, of_input, affine, stats


def check(tile, shape, dtype=torch.float16, seed=0, normed=True, relu=True, added=True, lazy=True, count=2, sums=True):
    """count: how many ys are reduced, of which the first is x."""
    (grad, y), coefficients, weight, (x, other, residual), affine, stats = case(*shape, dtype, seed)
    y, coefficients = (y, coefficients) if normed else (None, None)
    residual, ys = residual if added else None, [x, other][:count]
    source, scale_shift = x if relu else None, affine if relu and lazy else None
    dx, parts, report = hopper.gradient(
        tile, grad, weight, y, coefficients, residual, source, scale_shift, relu, ys, stats[:count], sums, seed
    )
    dy = grad.double()
    if normed:
        a, b, constant, mean = coefficients.double()
        dy = (a * dy + b * (y - mean) + constant).to(dtype).double()
    exact = F.conv_transpose2d(dy.permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2), padding=1)
    exact = exact.permute(0, 2, 3, 1) + (residual if added else 0)
    if relu:
        exact = exact * ((x.double() * affine[0] + affine[1] if lazy else x) > 0)
    assert torch.equal(dx, exact.to(dtype))
    if sums:
        terms = [dx.double(), *(dx.double() * (t - s[0]) for t, s in zip(ys, stats[:count], strict=True))]
        pixels = hopper.plan(tile, *shape, relu, gradient=True).pixels
        for row, term in enumerate(terms):
            expected = torch.stack([part.sum(0) for part in term.flatten(0, 2).split(pixels)])
            assert torch.allclose(parts[:, row].double(), expected, rtol=1e-6, atol=1e-6)
    return report


@pytest.mark.parametrize("tile", range(len(hopper.tiles())))
def test_every_tile(tile):
    """Padding is of the gradient that the prologue makes: a constant does not reach it."""
    for seed, shape in enumerate(SHAPES[tile % 3 :: 3] if hopper.tiles()[tile][1] == 1 else SHAPES[2::3]):
        report = check(tile, shape, seed=seed)
        assert report.conflicts() == [], shape


@pytest.mark.parametrize(
    "form",
    [
        {"dtype": torch.bfloat16, "relu": False, "count": 0},
        {"normed": False, "added": False, "lazy": False, "count": 1},
        {"relu": False, "added": False, "sums": False, "count": 0},
    ],
    ids=str,
)
def test_forms(form):
    """Without what a layer does not have: batch norm behind it, a residual, a ReLU before it, sums."""
    check(3, (3, 7, 7, 64, 72), **form)


def test_not_finite():
    """NaN passes the ReLU, and stays with the pixels around it."""
    (grad, _), _, weight, (x, _, _), affine, _ = case(1, 7, 7, 64, 64, torch.float16)
    weight[:] = 1
    grad[0, 3, 3, 5] = x[0, 0, 0, 1] = float("nan")
    dx, parts, _ = hopper.gradient(3, grad, weight, x=x, scale_shift=affine, relu=True)
    near = torch.zeros(7, 7, 64, dtype=torch.bool)
    near[2:5, 2:5] = (x * affine[0] + affine[1] > 0)[0, 2:5, 2:5]
    assert torch.equal(dx[0].isnan(), near)
    assert dx[0, 0, 0, 1] == grad[0, :2, :2].sum()  # where x is NaN the gradient passes
    assert torch.equal(parts[0, 0].isnan(), near.any(0).any(0))


def test_every_statement_that_orders_is_needed():
    """Three slices of two halos, then the tile and the sums in their place: without a wait, barrier or fence there is a
    fault or a wrong result."""
    (grad, y), coefficients, weight, (x, other, residual), affine, stats = case(1, 3, 7, 192, 8, torch.float16)
    operands = (grad, weight, y, coefficients, residual, x, affine, True, [x, other], stats)
    expected = hopper.gradient(3, *operands)[:2]
    name = hopper.compiled(torch.float16, 3, 64, gradient=True).name
    ptx = compile_cuda(hopper.source(torch.float16, 3, 64, gradient=True), *hopper.FLAGS)

    def run(kernel):
        found = hopper.gradient(3, *operands, kernel=kernel)[:2]
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    assert run(Kernel(ptx, name))
    pattern = r"^\s*(wgmma\.(wait_group|fence|commit_group)|fence\.|bar\.|cp\.async\.(wait|commit)_group).*$"
    assert survivors(ptx, pattern, name, run) == []
