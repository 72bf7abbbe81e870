"""Training on the GPU path: every kernel executed by the simulator, in both forms, against eager and float64."""

import contextlib
import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import triton_gate as gate
from helpers.support import assert_error_rule, channels_last, name_of, twins
from helpers.training_support import BROKEN, affine, assert_trains_as_eager, opcheck_arguments
from ptxsim.device import simulated

import resnet_fast
from resnet_fast import backends, blocks, reference
from resnet_fast.__main__ import _chosen
from resnet_fast.gpu import training_operators as training
from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates.triton import candidates
from resnet_fast.gpu.layer import A100, Layer

pytestmark = pytest.mark.usefixtures("exact_float32")
ops = torch.ops.resnet_fast
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FORMS = ("kernels", "library")


def form(name):
    """The convolutions by our kernels, or by PyTorch's between ours."""
    return tune.use(tune.LIBRARY) if name == "library" else contextlib.nullcontext()


# batch, channels, height and width, filters, kernel, stride, padding
SHAPES = [
    (2, 32, (9, 7), 48, (3, 3), (1, 1), (1, 1)),  # tap by tap, whole channels
    (3, 16, (9, 10), 32, (3, 3), (2, 2), (1, 1)),  # phases
    (2, 33, (9, 8), 17, (1, 1), (2, 2), (0, 0)),  # pixels that no filter reaches, odd channels
    (1, 3, (13, 12), 20, (7, 7), (2, 2), (3, 3)),  # taps and channels mixed
    (40, 8, (3, 4), 16, (2, 3), (3, 1), (1, 0)),
]
# Each constant of a kernel is compiled for: every shape and every dtype once or twice, not all of both.
CASES = [
    *((shape, dtype, "kernels") for shape, dtype in zip(SHAPES, (DTYPES * 2)[:5], strict=True)),
    (SHAPES[0], torch.float32, "kernels"),
    (SHAPES[0], torch.bfloat16, "library"),
    (SHAPES[2], torch.float32, "library"),
    (SHAPES[4], torch.float16, "library"),
]


def rows(count, channels):
    return torch.rand(count, channels) + 0.5


def whole(*shape):
    return channels_last(torch.randint(-2, 3, shape).to(torch.bfloat16))


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("channels", "filters", "stride"), [(64, 64, 1), (16, 32, 2)], ids=name_of)
def test_every_tile_gives_exact_integers(simulated_device, channels, filters, stride, split):
    """Sums of small integers are exact in any order: all tiles, eight warps too, and shared sums over pixels."""
    x, weight = whole(2, channels, 10, 9), whole(filters, channels, 3, 3)
    settings = ([stride, stride], [1, 1], 0)
    exact = F.conv2d(x.double().relu(), weight.double(), None, stride, 1)
    grad, residual = whole(*exact.shape), whole(*x.shape)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        *(grad.double(), x.double().relu(), weight.double(), None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1),
        [True, True, False],
    )
    plain = torch.stack((torch.ones(channels), torch.zeros(channels)))
    size = (2, 10, 9, channels, filters, (3, 3), (stride, stride), (1, 1), torch.bfloat16, "ieee", True, True)
    for role in ("conv_bn_stats", "data gradient", "weight gradient") if split == 1 else ("weight gradient",):
        for config in candidates(Layer(*size, role), A100):
            with tune.use(dataclasses.replace(config, split_k=split)):
                if role == "conv_bn_stats":
                    y, _ = ops.conv_bn_stats(x, plain, True, weight, None, *settings, True)
                    assert torch.equal(y.double(), exact.bfloat16().double()), config
                    continue
                need = (role == "data gradient", role == "weight gradient")
                rest = (residual, True, [x], [rows(2, channels)]) if need[0] else (None, False, [], [])
                a, b, _ = ops.conv_backward(grad, None, None, x, plain, True, weight, *settings, *need, *rest)
                expected = ((dx + residual.double()) * (x > 0)).bfloat16() if need[0] else dw.bfloat16()
                assert torch.equal(a if need[0] else b, expected), config


@pytest.mark.parametrize(
    ("kernel", "stride", "size"),
    [((33, 1), (1, 1), (20, 3)), ((1, 35), (1, 1), (2, 9)), ((1, 67), (1, 2), (2, 12))],
    ids=name_of,
)
def test_filters_of_more_than_32_taps_in_a_row(simulated_device, kernel, stride, size):
    """Which taps lie on the map is a bit each, of a stride's phase in the gradient: longer filters need another way."""
    padding = [kernel[0] // 2, kernel[1] // 2]
    x, weight = whole(1, 16, *size), whole(16, 16, *kernel)
    y, _ = ops.conv_bn_stats(x, None, False, weight, None, [*stride], padding, 0, False)
    exact = F.conv2d(x.double(), weight.double(), None, stride, padding)
    assert torch.equal(y.double(), exact.bfloat16().double())
    grad = whole(*y.shape)
    rest = (True, True, None, False, [], [])
    dx, dw, _ = ops.conv_backward(grad, None, None, x, None, False, weight, [*stride], padding, 0, *rest)
    expected = torch.ops.aten.convolution_backward(
        *(grad.double(), x.double(), weight.double(), None, stride, padding, [1, 1], False, [0, 0], 1),
        [True, True, False],
    )
    assert torch.equal(dx.double(), expected[0].bfloat16().double())
    assert torch.equal(dw.double(), expected[1].bfloat16().double())


@pytest.mark.parametrize(("shape", "dtype", "which"), CASES, ids=name_of)
def test_operators(simulated_device, shape, dtype, which):
    n, c, size, k, kernel, stride, padding = shape
    x = channels_last(torch.randn(n, c, *size).to(dtype))
    weight = (torch.randn(k, c, *kernel) / (c * kernel[0] * kernel[1]) ** 0.5).to(dtype)
    scale_shift, bias = rows(2, c) - 0.7, torch.randn(k) + 3
    settings = (list(stride), list(padding), 0)

    def forward(wide):
        a = affine(x.to(wide), scale_shift.to(wide)).relu().to(x.dtype if wide != torch.float64 else wide)
        return F.conv2d(a.to(wide), weight.to(wide), bias.to(wide), stride, padding)

    with form(which):
        y, moments = ops.conv_bn_stats(x, scale_shift, True, weight, bias, *settings, True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_error_rule(y, forward(torch.float64), [forward(torch.float32).to(dtype)])
    var, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert torch.allclose(moments.double(), torch.stack((mean, var)), rtol=2e-6, atol=1e-6)

    grad, residual = channels_last(torch.randn(y.shape).to(dtype)), channels_last(torch.randn(x.shape).to(dtype))
    other = channels_last(torch.randn(x.shape).to(dtype))
    coefficients, means = rows(4, k), [rows(2, c), rows(2, c)]

    def backward(wide):
        """The gradients, rounded where eager PyTorch writes them."""
        store = wide if wide == torch.float64 else dtype
        a, b, constant, own = (t.to(wide)[:, None, None] for t in coefficients)
        dy = (a * grad.to(wide) + b * (y.to(wide) - own) + constant).to(store)
        lazy = affine(x.to(wide), scale_shift.to(wide))
        plain = (dy.to(wide), lazy.relu().to(store).to(wide), weight.to(wide), None)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            *plain, stride, padding, [1, 1], False, [0, 0], 1, [True, True, False]
        )
        return ((dx + residual.to(wide)) * (lazy > 0)).to(store), dw.to(store)

    arguments = (grad, y, coefficients, x, scale_shift, True, weight, *settings)
    with form(which):
        dx, dw, sums = ops.conv_backward(*arguments, True, True, residual, True, [x, other], means)
        alone, _, nothing = ops.conv_backward(*arguments, True, False, None, False, [], [])
        empty, of_weight, _ = ops.conv_backward(*arguments, False, True, None, False, [], [])
    for ours, exact, eager, what in zip(
        (dx, dw), backward(torch.float64), backward(torch.float32), ("dx", "dw"), strict=True
    ):
        assert ours.dtype == dtype
        assert_error_rule(ours, exact, [eager], what)
    assert torch.equal(of_weight, dw)
    assert empty.shape == (0, *x.shape[1:])
    assert nothing.shape == (0, c)
    passes = affine(x.float(), scale_shift) > 0
    assert torch.allclose((alone.float() + residual.float()) * passes, dx.float(), rtol=2e-2, atol=2e-2)
    # Sums of the gradients as they were stored, in float32 and a fixed order.
    g = dx.double()
    exact = [g, *(g * (t.double() - m[0].double()[:, None, None]) for t, m in zip((x, other), means, strict=True))]
    for ours, terms in zip(sums.double(), exact, strict=True):
        assert ((ours - terms.sum((0, 2, 3))).abs() <= 2e-6 * terms.abs().sum((0, 2, 3)) + 1e-6).all()


@pytest.mark.parametrize(("dtype", "count"), [*zip(DTYPES, (2, 0, 1), strict=True), (torch.float32, 2)], ids=name_of)
def test_passes(simulated_device, dtype, count):
    """bn_apply and bn_backward_reduce, each in all its variants."""
    y, other, grad, *ys = (channels_last(torch.randn(3, 19, 5, 7).to(dtype)) for _ in range(3 + count))
    affines = [None, rows(2, 19) - 0.7]
    for residual, own, relu in ((None, affines[1], True), (other, affines[0], True), (other, affines[1], False)):
        out = ops.bn_apply(y, affines[1], residual, own if residual is not None else None, relu)

        def plain(wide, residual=residual, own=own, relu=relu):
            z = affine(y.to(wide), affines[1].to(wide))
            if residual is not None:
                z = z + affine(residual.to(wide), None if own is None else own.to(wide))
            return z.relu() if relu else z

        assert_error_rule(out, plain(torch.float64), [plain(torch.float32).to(dtype)])
    for relu_source, own in ((None, None), (y, None), (y, affines[1])):
        means = [rows(2, 19) for _ in ys]
        out, sums = ops.bn_backward_reduce(grad, relu_source, own, ys, means)
        shown = torch.ones(1, dtype=torch.bool) if relu_source is None else affine(relu_source.float(), own) > 0
        assert torch.equal(out, torch.where(shown, grad, 0))
        terms = [out.double(), *(out.double() * (t - m[0][:, None, None]) for t, m in zip(ys, means, strict=True))]
        for ours, term in zip(sums.double(), terms, strict=False):
            assert ((ours - term.sum((0, 2, 3))).abs() <= 2e-6 * term.abs().sum((0, 2, 3))).all()


@pytest.mark.parametrize(
    ("kind", "stride", "dtype", "which"),
    [
        ("BasicBlock", 1, torch.float32, "kernels"),
        ("Block", 2, torch.bfloat16, "kernels"),
        ("Bottleneck", 2, torch.bfloat16, "library"),
        ("Block", 2, torch.float32, "library"),
    ],
    ids=name_of,
)
def test_blocks(simulated_device, kind, stride, dtype, which):
    fast, eager = (m.to(dtype) for m in twins(getattr(blocks, kind), getattr(reference, kind), 16, 16, stride))
    x = torch.randn(2, 16, 9, 7).to(dtype)
    with torch.no_grad():
        grad = torch.randn_like(eager(x))
    with form(which):
        assert_trains_as_eager(fast, eager, x, grad, factor=2, backend="triton")
    names = {name for name, _ in simulated_device.launches}
    assert ("_conv_bn_stats_kernel" in names) == (which == "kernels")
    assert backends.fallbacks() == {}


@pytest.mark.parametrize("which", FORMS)
def test_a_small_network(simulated_device, which):
    """Stem, three blocks, classifier: a training step under autocast in float16 with a scaled loss."""
    fast, eager = twins(resnet_fast.CifarResNet, reference.CifarResNet, 1)
    x, target = channels_last(torch.randn(4, 3, 12, 12)), torch.arange(4)
    exact = copy.deepcopy(eager).double()
    results = []
    for m, dtype in ((fast, torch.float16), (eager, torch.float16), (exact, None)):
        m.train()
        scale = 1 if dtype is None else 64
        with torch.autocast("cpu", dtype, enabled=dtype is not None), form(which):
            loss = F.cross_entropy(m(x.to(m.fc.weight.dtype)).to(m.fc.weight.dtype), target)
            (loss * scale).backward()
        # One parameter of many may have a gradient that eager hits by luck: the rule is for all of them together.
        grads = [p.grad / scale for p in m.parameters()]
        results.append((grads, [b for b in m.buffers() if b.is_floating_point()]))
    assert backends.fallbacks() == {}
    for ours, theirs, e in zip(*results, strict=True):
        joined = [
            torch.cat([(t / u.norm()).flatten() for t, u in zip(part, e, strict=True)]) for part in (ours, theirs, e)
        ]
        assert_error_rule(joined[0].float(), joined[2], [joined[1].float()])
    assert all(bn.num_batches_tracked == 1 for bn in fast.modules() if isinstance(bn, torch.nn.BatchNorm2d))


def test_the_order_of_blocks_is_no_matter():
    m = twins(blocks.BasicBlock, reference.BasicBlock, 16, 32, 2)[0].train()
    x, results = torch.randn(3, 16, 8, 8), []
    for seed in range(2):
        with simulated(seed=1000 * seed):
            copied, own = copy.deepcopy(m), x.clone().requires_grad_()
            y = copied(own)
            y.square().sum().backward()
            results.append([y, own.grad, *(p.grad for p in copied.parameters()), *copied.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("which", FORMS)
def test_large_means_do_not_cancel(simulated_device, which):
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 8, 8)
    for m in (fast, eager):
        m.conv1.bias = torch.nn.Parameter(torch.full((8,), 100.0))
    with form(which):
        assert_trains_as_eager(
            fast, eager, torch.randn(4, 8, 9, 9), torch.randn(4, 8, 9, 9), factor=2, backend="triton"
        )


# Activation-sized reads and writes of a basic block without projection in eager PyTorch, one kernel each; batch norm
# reads its input for the statistics and once more to normalise, and its backward reads both maps twice.
EAGER_FORWARD = {"conv1": 2, "bn1": 3, "relu1": 2, "conv2": 2, "bn2": 3, "add": 3, "relu2": 2}
EAGER_BACKWARD = {
    **{"relu2": 3, "bn2": 5, "conv2 data": 2, "conv2 weight": 2, "relu1": 3, "bn1": 5, "conv1 data": 2},
    **{"conv1 weight": 2, "accumulate": 3},
}
# What the library's convolutions move beside our kernels, in the first form.
LIBRARY_CONVOLUTIONS = 2 * (2 + 2 + 2)
MAPS = {"x", "y", "y1", "y2", "residual", "out", "grad", "added", "relu_source", "dx", "dy"}


@pytest.mark.parametrize(("which", "most"), [("kernels", 0.6), ("library", 0.9)])
def test_traffic_of_a_block(simulated_device, which, most):
    """Bytes of activations that forward and backward read and write, those of convolutions included."""
    m = blocks.BasicBlock(16, 16).half().train()
    x = channels_last(torch.randn(2, 16, 32, 32).half()).requires_grad_()
    with form(which):
        m(x).backward(channels_last(torch.randn(x.shape).half()))
    moved = sum(
        counts["read"] + counts["written"]
        for _, report in simulated_device.launches
        for name, counts in report.buffers.items()
        if name in MAPS
    )
    maps = moved / x.nbytes + (LIBRARY_CONVOLUTIONS if which == "library" else 0)
    eager = sum(EAGER_FORWARD.values()) + sum(EAGER_BACKWARD.values())
    print(f"{which}: {maps:.2f} maps against {eager} of eager, {maps / eager:.3f}")
    assert maps / eager <= most
    assert all(report.divergent_branches == 0 for _, report in simulated_device.launches)


@pytest.mark.parametrize(("op", "index", "change", "message"), BROKEN, ids=name_of)
def test_broken_arguments(simulated_device, op, index, change, message):
    arguments = list(opcheck_arguments()[op])
    simulated_device.launches.clear()
    arguments[index] = change(arguments[index])
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(*arguments)
    assert not simulated_device.launches


@pytest.mark.parametrize("role", ["conv_bn_stats", "data gradient", "weight gradient"])
def test_the_choice_is_measured_for_each_role(tmp_path, role):
    """Kept apart from the choice for inference, with the library as a candidate."""
    sizes = (8, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1), torch.bfloat16, "ieee", False, True)
    layer, inference = Layer(*sizes, role), Layer(*sizes)
    found = candidates(layer, A100)
    assert 1 <= len(found) <= 6
    asked = []

    def measure(calls):
        for runs in calls.values():
            runs[0]()
        return {c: 1.0 if c == tune.LIBRARY else 2.0 for c in calls}, {}

    tuner = tune.Tuner(A100, tmp_path / "gpu.json", measure)
    assert tuner.choose(layer, lambda: [asked.append]) == tune.LIBRARY
    assert asked == [*found, tune.LIBRARY]
    assert tune.Tuner(A100, tmp_path / "gpu.json", None).choose(layer, pytest.fail) == tune.LIBRARY
    assert tune.Tuner(A100, tmp_path / "gpu.json", None).choose(inference, pytest.fail) != tune.LIBRARY
    assert _chosen(layer, tune.LIBRARY) == f"{role:<15} 3x3/1 128 -> 8x128x28x28: library"


def layer_and_back(x, weight, scale_shift, coefficients):
    """The operators of one layer, forward and backward, with everything that they can be given."""
    arguments = (weight, [1, 1], [1, 1], 0)
    y, moments = training.conv_bn_stats(x, scale_shift, True, weight, None, *arguments[1:], True)
    training.bn_apply(y, moments, x, None, True)
    training.bn_backward_reduce(y, x, None, [y, x], [moments, moments])
    training.conv_backward(y, y, coefficients, x, scale_shift, True, *arguments, True, True, y, True, [x], [moments])
    with tune.use(tune.LIBRARY):
        training.conv_backward(y, y, coefficients, x, None, False, *arguments, False, True, None, False, [], [])


TENSOR_CORES = {80: ["HMMA"], 90: ["HGMMA", "HMMA"], 100: ["UTCHMMA", "HMMA"]}


@pytest.mark.parametrize("arch", gate.ARCHS)
@pytest.mark.parametrize("channels", [16, 64])
def test_code(arch, channels):
    """Tensor cores, whole vectors and no spills, for the tiles that the model picks."""
    x = channels_last(torch.randn(8, channels, 16, 16).bfloat16())
    weight = channels_last(torch.randn(channels, channels, 3, 3).bfloat16())
    seen = set()
    for kernel, args, meta in gate.launches(layer_and_back, x, weight, rows(2, channels), rows(4, channels)):
        sass, name = gate.inspect_launch(kernel, args, meta, arch), kernel.__name__
        assert sass.spills == sass.stack == 0, name
        seen.add(name)
        if name in CONVOLUTIONS:
            assert any(sass.count(opcode) for opcode in TENSOR_CORES[arch]), name
            assert sass.count("LDG.128") + sass.count("LDGSTS.128") > 0, name
            assert sass.blocks_per_sm >= 2, name
    assert seen >= {*CONVOLUTIONS, "_bn_apply_kernel", "_bn_backward_reduce_kernel", "_bn_input_gradient_kernel"}


CONVOLUTIONS = ("_conv_bn_stats_kernel", "_data_gradient_kernel", "_weight_gradient_kernel")
