"""The stem with its pooling in CUDA C++: compiled for sm_80 by nvcc, run in the simulator behind its own launcher."""

import pytest
import torch
import torch.nn.functional as F
from helpers.conv_support import misaligned, whole
from helpers.cuda_support import cuda_device
from helpers.support import (
    EAGER_LAYOUTS,
    assert_error_rule,
    channels_last,
    computing,
    eager_results,
    name_of,
    twins,
    unwatched,
)
from ptxsim.sim import GLOBAL_BASE, Fault

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.gpu.cuda import stem as cuda_stem
from resnet_fast.gpu.layer import A100, Gpu, Layer

pytestmark = pytest.mark.usefixtures("exact_float32")
stage = torch.ops.resnet_fast.conv_chain
pack = torch.ops.resnet_fast.pack_conv_bn
MMA = 2 * 16 * 8 * 16
POOLS = ([2, 2, 2, 2, 0, 0], [3, 3, 2, 2, 1, 1])
TYPES = ((torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))


def layer_of(x, weight, padding, relu, precision="ieee"):
    n, c, h, w = x.shape
    return Layer(n, h, w, c, weight.shape[0], weight.shape[2:], (2, 2), padding, x.dtype, precision, False, relu)


def run(x, weight, scale, shift, padding, relu, pool, precision="ieee", rows=0, tiles=0):
    """The kernel on ``weight`` as PyTorch has it."""
    layer = layer_of(x, weight, padding, relu, precision)
    layer = Layer(**{**layer.__dict__, "kernel": tuple(layer.kernel)})
    size = F.max_pool2d(torch.empty(1, 1, layer.out_height, layer.out_width), pool[:2], pool[2:4], pool[4:]).shape
    y = torch.empty(x.shape[0], weight.shape[0], *size[2:], dtype=x.dtype, memory_format=torch.channels_last)
    plan = cuda_stem.plan
    if rows:
        cuda_stem.plan = lambda *args: plan(*args, rows, tiles)
    try:
        filters = weight.permute(0, 2, 3, 1).contiguous()
        cuda_stem.conv_bn_relu_pool(layer, x, filters, scale, shift, pool, y)
    finally:
        cuda_stem.plan = plan
    return y


@unwatched()
def expected_of(x, weight, scale, shift, padding, relu, pool):
    """In float64, rounded once."""
    z = F.conv2d(x.double(), weight.double(), None, 2, padding) * scale.double()[:, None, None]
    z = z + shift.double()[:, None, None]
    return F.max_pool2d(z.relu() if relu else z, pool[:2], pool[2:4], pool[4:]).to(x.dtype)


def planes(t):
    return t.contiguous()


def strided(t):
    """Neither format, and no column after the other."""
    return torch.empty(*t.shape[:3], 2 * t.shape[3], dtype=t.dtype)[..., ::2].copy_(t)


SHAPES = [
    # batch, size, filter, padding, filters, layout
    (2, (37, 48), 7, (3, 3), 64, channels_last),
    (1, (46, 40), 7, (3, 3), 64, planes),
    (2, (33, 35), 7, (3, 3), 48, channels_last),  # odd sizes; a part of the filters
    (3, (23, 29), 7, (2, 0), 16, planes),  # rows begin at even elements
    (1, (42, 56), 7, (3, 3), 80, strided),  # two groups of filters
    (2, (31, 24), 3, (1, 1), 32, planes),
    (2, (29, 32), 3, (0, 1), 64, misaligned),
    (1, (7, 260), 7, (3, 3), 16, channels_last),  # more than one patch across
    (2, (16, 8), 3, (1, 0), 16, channels_last),
]


@pytest.mark.parametrize(("dtype", "precision"), TYPES, ids=name_of)
@pytest.mark.parametrize("pool", POOLS, ids=["2x2", "3x3"])
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_exact_integers(shape, pool, dtype, precision):
    """Every kernel with several shares of a warp: the same bits as float64 rounded once."""
    batch, size, kernel, padding, filters, layout = shape
    x, weight = layout(whole(batch, 3, *size).to(dtype)), whole(filters, 3, kernel, kernel).to(dtype)
    scale, shift = torch.ldexp(torch.tensor([1.0, -1.0])[torch.arange(filters) % 2], torch.tensor(-1)), whole(filters)
    for seed, (relu, rows, tiles) in enumerate([(True, 0, 0), (False, 1, 1), (True, 3, 2)]):
        expected = expected_of(x, weight, scale, shift, padding, relu, pool)
        with cuda_device(seed=seed) as device:
            y = run(x, weight, scale, shift, padding, relu, pool, precision, rows, tiles)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, expected), (rows, tiles, (y != expected).nonzero()[:5])
        ((_, report),) = device.launches
        assert bool(report.mma_flops) is (dtype != torch.float32 or precision == "tf32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("pool", POOLS, ids=["2x2", "3x3"])
def test_error_rule(pool, dtype):
    x, weight = torch.randn(2, 3, 37, 45).to(dtype), (torch.randn(64, 3, 7, 7) / 12).to(dtype)
    scale, shift = torch.rand(64) + 0.5, torch.randn(64)
    with cuda_device():
        y = run(x, weight, scale, shift, (3, 3), True, pool)
    z = F.conv2d(x.double(), weight.double(), None, 2, 3) * scale.double()[:, None, None]
    exact = F.max_pool2d((z + shift.double()[:, None, None]).relu(), pool[:2], pool[2:4], pool[4:])

    def eager(x):
        z = F.conv2d(x, weight, None, 2, 3) * scale.to(dtype)[:, None, None] + shift.to(dtype)[:, None, None]
        return F.max_pool2d(z.relu(), pool[:2], pool[2:4], pool[4:])

    assert_error_rule(y, exact, [eager(x), eager(channels_last(x))], "stem")


@pytest.mark.parametrize("pool", POOLS, ids=["2x2", "3x3"])
def test_tf32(pool):
    """TF32 keeps 10 bits of a factor, rounded to nearest: 2^-11 each, so 2^-10 of a product, to first order; and a
    float32 sum of 147 products. The greatest of some numbers moves by no more than they do."""
    x, weight = torch.randn(2, 3, 29, 36), torch.randn(16, 3, 7, 7)
    ones, zeros = torch.ones(16), torch.zeros(16)
    with cuda_device() as device:
        y = run(x, weight, ones, zeros, (3, 3), False, pool, "tf32")
    assert device.launches[0][1].mma_flops
    exact = expected_of(x.double(), weight, ones, zeros, (3, 3), False, pool)
    size = F.conv2d(x.double().abs(), weight.double().abs(), None, 2, 3) * (2**-10 + 2**-20 + 147 * 2**-24)
    bound = F.max_pool2d(size, pool[:2], pool[2:4], pool[4:])
    assert ((y.double() - exact).abs() <= bound).all()
    assert ((y.double() - exact).abs() > 2**-23 * exact.abs()).any()  # it was TF32


@pytest.mark.parametrize(("dtype", "precision"), TYPES, ids=name_of)
@pytest.mark.parametrize("pool", POOLS, ids=["2x2", "3x3"])
@pytest.mark.parametrize("layout", [planes, channels_last, strided])
def test_nan_and_infinity(layout, pool, dtype, precision):
    """Both reach the windows that see them and no others; nothing comes in through padding or unused lanes."""
    for kernel, padding in ((7, (3, 3)), (7, (1, 2)), (3, (1, 1))):
        x, weight = whole(2, 3, 27, 48).to(dtype), whole(64, 3, kernel, kernel).to(dtype)
        weight[:, 0, 0, 0], weight[:, 2, -1, -1] = 1, -1
        for n, c, row, column, value in (
            *((0, 1, 0, 0, torch.nan), (0, 0, 13, 20, torch.inf), (0, 2, 26, 47, -torch.inf)),
            *((1, 0, 7, 9, torch.nan), (1, 2, 19, 31, torch.nan), (1, 1, 12, 47, torch.inf)),
        ):
            x[n, c, row, column] = value
        x = layout(x)
        scale, shift = torch.ones(64), torch.zeros(64)
        with cuda_device():
            for relu in (True, False):
                y = run(x, weight, scale, shift, padding, relu, pool, precision, 2, 2)
                expected = expected_of(x, weight, scale, shift, padding, relu, pool)
                assert torch.equal(y.isnan(), expected.isnan())
                assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))
                assert y.isnan().any()
                assert y.isfinite().any()


@pytest.mark.parametrize("relu", [True, False])
def test_infinite_and_missing_weights(relu):
    """A filter of infinities meets pixels, not what fills the fragments up; a NaN stays in its channel."""
    for pool in POOLS:
        x, weight = torch.ones(1, 3, 21, 24, dtype=torch.float16), whole(16, 3, 7, 7).half()
        weight[3], weight[5, 1, 6, 6] = torch.inf, torch.nan
        scale, shift = torch.ones(16), torch.zeros(16)
        with cuda_device():
            y = run(x, weight, scale, shift, (3, 3), relu, pool)
        expected = expected_of(x, weight, scale, shift, (3, 3), relu, pool)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))


def convolution(channels, filters, kernel, padding, dtype, stride=2):
    """A packed filter and its integers, ReLU behind it."""
    weight = torch.randn(filters, channels, kernel, kernel).to(dtype)
    packed = pack(weight, torch.randn(filters).to(dtype), *[None] * 4, 0.0, 0)
    return [packed], [0, -1, 1, filters, kernel, kernel, stride, stride, padding, padding]


def test_the_operator_pools_as_torch_does(device):
    """The same bits as max pooling of the convolution's own result, from a kernel of the same sums or not."""
    for pool in POOLS:
        filters, layers = convolution(3, 32, 7, 3, torch.float16)
        x = torch.randn(2, 3, 30, 33).half()
        y = stage(x, filters, layers, pool)
        expected = F.max_pool2d(stage(x, filters, layers), pool[:2], pool[2:4], pool[4:])
        torch.testing.assert_close(y, expected, rtol=2**-10, atol=2**-10)  # a rounding of float16
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("chain", "pool"),
    [
        ((3, 32, 7, 3, torch.float16), [3, 3, 2, 2, 0, 0]),
        ((3, 32, 7, 3, torch.float16), [2, 2, 2, 2, 0]),
        ((3, 24, 7, 3, torch.float16), POOLS[0]),
        ((4, 32, 7, 3, torch.float16), POOLS[0]),
        ((3, 32, 5, 2, torch.float16), POOLS[1]),
        ((3, 32, 7, 3, torch.float16, 1), POOLS[1]),
    ],
    ids=name_of,
)
def test_what_has_no_kernel_is_refused(device, chain, pool):
    filters, layers = convolution(*chain)
    with pytest.raises(RuntimeError, match=rf"pool is \[{', '.join(map(str, pool))}\], want none: on CUDA devices"):
        stage(torch.randn(1, chain[0], 33, 33).half(), filters, layers, pool)


def test_two_convolutions_are_refused(device):
    filters, layers = convolution(3, 16, 7, 3, torch.float16)
    more, others = convolution(16, 16, 3, 1, torch.float16, 1)
    with pytest.raises(RuntimeError, match="pool is"):
        stage(torch.randn(1, 3, 32, 32).half(), filters + more, [*layers, 1, *others[1:]], POOLS[0])


def test_arguments_of_a_plan():
    layer = Layer(1, 32, 32, 3, 64, (7, 7), (2, 2), (3, 3), torch.float16, "ieee", False, True)
    strides = (3072, 1024, 32, 1)
    with pytest.raises(RuntimeError, match="kernel is 8, want 0 to 7"):
        cuda_stem.plan(layer, 8, strides, True, A100)
    with pytest.raises(RuntimeError, match="rows and tiles are 65 and 1, want at most 64"):
        cuda_stem.plan(layer, 0, strides, True, A100, 65, 1)
    for change, message in (
        ({"out_channels": 24}, "weight has 24 filters, want a multiple of 16"),
        ({"height": 0}, "x has 0 x 32 pixels and padding 3 x 3, less than a filter of 7 x 7"),
        ({"width": 2**29}, "more than 32 bits count"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cuda_stem.plan(Layer(**{**layer.__dict__, **change}), 0, strides, True, A100)
    with pytest.raises(RuntimeError, match="args has 3 integers, want 24"):
        torch.ops.resnet_fast.conv_bn_relu_pool_plan(0, [1, 2, 3], 2, True, 108, 99999)
    y = torch.empty(1, 64, 8, 8)
    with pytest.raises(RuntimeError, match=r"no kernel computes .* and pooling by \[5, 5, 2, 2, 0, 0\]"):
        cuda_stem.conv_bn_relu_pool(layer, y, y, y, y, [5, 5, 2, 2, 0, 0], y)


@pytest.mark.parametrize(("dtype", "precision"), TYPES, ids=name_of)
@pytest.mark.parametrize("pool", POOLS, ids=["2x2", "3x3"])
@pytest.mark.parametrize("gpu", [A100, Gpu(90, 132, 227 * 1024), Gpu(89, 58, 99 * 1024)], ids=name_of)
def test_plans(gpu, pool, dtype, precision):
    """Patches cover the pooled map without gaps, fit shared memory, and keep a GPU busy."""
    for batch, height, width in ((1, 224, 224), (8, 224, 224), (64, 224, 224), (3, 35, 67), (1, 40, 4000)):
        layer = Layer(batch, height, width, 3, 64, (7, 7), (2, 2), (3, 3), dtype, precision, False, True)
        made = cuda_stem.plan(
            layer, cuda_stem.kernel_of(layer, pool), (3 * height * width, height * width, width, 1), True, gpu
        )
        fields = ("rows", "tiles", "load", "oh", "ow", "height", "width", "strips", "across")
        plan = dict(zip(fields, made.args[11:], strict=False))
        assert made.shared <= gpu.shared
        workers = 4 if precision == "ieee" and dtype == torch.float32 else 2 if dtype != torch.float32 else 1
        assert plan["strips"] * plan["rows"] * workers >= plan["height"]
        overlap = pool[0] == 3
        assert plan["across"] * (8 * plan["tiles"] - overlap) + overlap >= plan["width"]
        assert made.blocks <= batch * plan["strips"] * plan["across"]
        if batch == 64:
            assert made.blocks >= gpu.multiprocessors


def test_empty(device):
    filters, layers = convolution(3, 32, 7, 3, torch.float16)
    y = stage(torch.randn(0, 3, 33, 40).half(), filters, layers, POOLS[1])
    assert y.shape == (0, 32, 9, 10)
    assert device.launches == []


@pytest.mark.parametrize("columns", [(1, 3), (8, 1), (1, 4)], ids=["pixels", "planes", "elements"])
def test_offsets_beyond_32_bits(device, monkeypatch, columns):
    """The second image begins 6e9 bytes on, where nothing lies: the fault names the full address."""
    far = 3 * 10**9 // 8 * 8
    layer = Layer(2, 1, 8, 3, 16, (7, 7), (2, 2), (3, 3), torch.float16, "ieee", False, True)
    made = cuda_stem.plan(layer, 1, (far, columns[0], 32, columns[1]), True, A100)
    monkeypatch.setattr(cuda_stem, "plan", lambda *_: made)
    x, y = torch.zeros(2, 3, 1, 8, dtype=torch.float16), torch.empty(2, 16, 1, 2, dtype=torch.float16)
    weight = torch.zeros(16, 7, 7, 3, dtype=torch.float16)
    with pytest.raises(Fault) as found:
        cuda_stem.conv_bn_relu_pool(layer, x, weight, torch.ones(16), torch.zeros(16), POOLS[1], y)
    assert found.value.kind == "out-of-bounds"
    assert 0 <= found.value.address - GLOBAL_BASE - 2 * far < 2**20


WINDOWS = [("ResNet32", {"image_size": 70}, 70, 0), ("ResNet", {"layers": [1, 1, 1, 1], "num_classes": 7}, 67, 1)]


@pytest.mark.parametrize(("name", "options", "size", "overlap"), WINDOWS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=name_of)
def test_stems_of_networks(device, name, options, size, overlap, dtype):
    """One launch from the image to the pooled map, in eval mode and without gradients."""
    fast, eager = twins(getattr(resnet_fast.models, name), getattr(reference, name), **options)
    fast, eager, x = fast.to(dtype), eager.to(dtype), torch.randn(2, 3, size, size).to(dtype)
    exact, results = eager_results(eager, x, "pooled_stem")
    with torch.no_grad():
        for layout in EAGER_LAYOUTS:
            out = fast.pooled_stem(x.contiguous(memory_format=layout))
            assert_error_rule(out, exact, results, name)
    kernel = 4 * (dtype == torch.float32) + overlap
    assert [n for n, _ in computing(device)] == [cuda_stem.kernel_name(dtype, kernel)] * 2
    assert backends.fallbacks() == {}
    # Where a gradient is wanted, and in training, the pooling is a function of its own.
    device.launches.clear()
    fast.pooled_stem(x.clone().requires_grad_())
    assert "pool" not in computing(device)[0][0]


def test_without_the_kernel_pooling_follows(simulated_device):
    """Behind launches without CUDA C++, and by a window of another kind."""
    model = resnet_fast.models.ResNet([1, 1, 1, 1], 7).eval().half()
    x = torch.randn(1, 3, 34, 33).half()
    with torch.no_grad():
        y = model.pooled_stem(x)
        assert torch.equal(y, model.maxpool(model.stem(x)))
    assert not any("pool" in name for name, _ in simulated_device.launches)


def test_other_windows_follow(device):
    model = resnet_fast.models.ResNet([1, 1, 1, 1], 7).eval().half()
    model.maxpool.kernel_size = 2
    x = torch.randn(1, 3, 34, 33).half()
    with torch.no_grad():
        assert torch.equal(model.pooled_stem(x), model.maxpool(model.stem(x)))
    assert not any("pool" in name for name, _ in device.launches)


@pytest.mark.parametrize("layout", [planes, channels_last])
@pytest.mark.parametrize(
    ("pool", "work", "waves", "others"), [(POOLS[0], 1.09, 1.5, 5), (POOLS[1], 1.23, 1.75, 6)], ids=["2x2", "3x3"]
)
def test_costs(monkeypatch, pool, work, waves, others, layout):
    """4 images on 8 multiprocessors are 64 on 128: traffic, products and wavefronts of shared memory.

    Requests to global memory against the compulsory bytes, input, filters and pooled map once: patches overlap, and
    each block reads the filters. No first-level cache is counted on. work: products over the useful ones, of 147 in 160
    and rows that are computed twice; waves, others: wavefronts and instructions of PTX beside an mma, loading and
    pooling included.
    """
    monkeypatch.setattr(cuda_stem, "gpu_of", lambda _: Gpu(90, 8, 227 * 1024))
    x, weight = layout(whole(4, 3, 224, 224).half()), whole(64, 3, 7, 7).half()
    scale, shift = torch.ones(64), torch.zeros(64)
    with cuda_device() as device:
        y = run(x, weight, scale, shift, (3, 3), True, pool)
    assert torch.equal(y, expected_of(x, weight, scale, shift, (3, 3), True, pool))
    ((_, report),) = device.launches
    read, written = x.nbytes + weight.nbytes + 2 * 4 * 64, y.nbytes
    assert report.compulsory_bytes == (read, written)
    products, useful = sum(report.mma_flops.values()) / MMA, 2 * 4 * y.numel() * 147 / MMA
    traffic, taken = report.sectors[0] * 32 / (read + written), report.wavefronts[0] / products
    print(
        f"traffic {traffic:.2f}, work {products / useful:.3f}, wavefronts {taken:.2f}, {report.executed / products:.1f}"
    )
    assert traffic <= 1.4
    assert products <= work * useful
    assert taken <= waves
    assert report.executed <= (1 + others) * products
