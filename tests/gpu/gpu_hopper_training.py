"""The 3x3 training kernels of Hopper on the GPU they are for: exact integers with every tile, times beside others."""

import functools

import pytest
import torch
import torch.nn.functional as F

from resnet_fast.gpu import timing, tune
from resnet_fast.gpu.candidates.hopper_training import TrainingConfig, candidates, plan, tiles
from resnet_fast.gpu.layer import Layer, gpu_of

ops = torch.ops.resnet_fast
ROLES = ("conv_bn_stats", "data gradient")
# Batch, size, channels: the stages of cifar_resnet32 and of the basic blocks of a ResNet.
STAGES = [(128, 32, 16), (128, 16, 32), (128, 8, 64), (64, 56, 64), (64, 28, 128), (64, 14, 256), (64, 7, 512)]
SETTINGS = ([1, 1], [1, 1], 0)


@pytest.fixture(autouse=True)
def hopper(gpu):
    if gpu == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"compute capability {torch.cuda.get_device_capability()}: these kernels are for 9.0 alone")


def layer_of(role, batch, size, channels, filters, dtype):
    one = (1, 1)
    return Layer(batch, *size, channels, filters, (3, 3), one, one, dtype, "ieee", role == "data gradient", True, role)


class Case:
    """A layer's operands of small integers, its operators, and their exact results."""

    def __init__(self, gpu, batch, size, channels, filters, dtype):
        def image(c):
            return torch.randint(-2, 3, (batch, c, *size)).to(gpu, dtype).contiguous(memory_format=torch.channels_last)

        def rows(count, c):
            return torch.randint(-1, 2, (count, c)).float().to(gpu)

        self.x, self.residual, self.grad, self.y = image(channels), image(channels), image(filters), image(filters)
        self.weight = torch.randint(-1, 2, (filters, channels, 3, 3)).to(gpu, dtype)
        self.affine, self.coefficients, self.stats = rows(2, channels), rows(4, filters), rows(2, channels)

    def run(self, role):
        if role == "conv_bn_stats":
            return ops.conv_bn_stats(self.x, self.affine, True, self.weight, None, *SETTINGS, True)
        operands = (self.grad, self.y, self.coefficients, self.x, self.affine, True, self.weight, *SETTINGS)
        dx, _, sums = ops.conv_backward(*operands, True, False, self.residual, True, [self.x], [self.stats])
        return dx, sums[:2]

    def exact(self, role):
        """In float64, on the GPU where there is one."""
        wide = [t.double() for t in (self.x, self.residual, self.grad, self.y, self.weight)]
        x, residual, grad, y, weight = wide
        columns = lambda t: t.double()[:, :, None, None]  # noqa: E731
        scale, shift = columns(self.affine)
        activation = (scale * x + shift).relu()
        if role == "conv_bn_stats":
            result = F.conv2d(activation, weight, None, 1, 1).to(self.x.dtype)
            var, mean = torch.var_mean(result.double(), (0, 2, 3), correction=0)
            return result, torch.stack((mean, var))
        a, b, constant, mean = columns(self.coefficients)
        dx = F.conv_transpose2d(a * grad + b * (y - mean) + constant, weight, None, 1, 1) + residual
        dx = torch.where(activation > 0, dx, 0).to(self.x.dtype)
        terms = torch.stack((dx.double(), dx.double() * (x - self.stats[0].double()[:, None, None])))
        return dx, terms.sum((1, 3, 4))

    def check(self, role, expected):
        result, sums = self.run(role)
        assert torch.equal(result, expected[0])
        scale = 1 + expected[0].double().square().mean((0, 2, 3)) * (1 if role == "conv_bn_stats" else len(self.x))
        assert ((sums.double() - expected[1]).abs() <= 1e-4 * scale + 1e-5 * expected[1].abs()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("shape", [(3, (7, 7), 64, 64), (1, (6, 28), 128, 64), (2, (13, 11), 32, 48)], ids=str)
def test_every_tile_gives_exact_integers(gpu, shape, role, dtype):
    case, ran = Case(gpu, *shape, dtype), 0
    expected = case.exact(role)
    for config in map(TrainingConfig, range(len(tiles()))):
        if plan(layer_of(role, *shape, dtype), config, True) is None:
            continue
        with tune.use(config):
            case.check(role, expected)
        ran += 1
    assert ran >= 3


@pytest.mark.machine
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_exact_again_and_again(gpu, stage, role):
    """Large grids, all candidates of this GPU, ten launches each: what a race would change; the sums bit for bit."""
    batch, size, channels = stage
    case = Case(gpu, batch, (size, size), channels, channels, torch.bfloat16)
    expected = case.exact(role)
    layer = layer_of(role, batch, (size, size), channels, channels, torch.bfloat16)
    found = candidates(layer, gpu_of(case.x.device), most=6)
    assert found
    for config in found:
        with tune.use(config):
            case.check(role, expected)
            first = case.run(role)
            assert all(all(map(torch.equal, case.run(role), first)) for _ in range(10)), config


@pytest.mark.machine
@pytest.mark.alone
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_times_beside_the_others(gpu, stage, role):
    """Interleaved, in graphs: every candidate of the tuner, the library between fused passes among them.

    Prints the times; nothing is asserted of them but that each is there: which is faster the tuner asks itself.
    """
    batch, size, channels = stage
    case = Case(gpu, batch, (size, size), channels, channels, torch.bfloat16)
    expected = case.exact(role)
    layer = layer_of(role, batch, (size, size), channels, channels, torch.bfloat16)
    torch.backends.cudnn.benchmark = True

    def run(choice):
        with tune.use(choice):
            return case.run(role)

    choices = tune.candidates(layer, gpu_of(case.x.device))
    for choice in choices:
        with tune.use(choice):
            case.check(role, expected)
    seconds, refused = timing.interleaved({str(c): [functools.partial(run, c)] for c in choices}, case.x.device)
    ranked = sorted(seconds.items(), key=lambda pair: pair[1])
    print(f"\n{role} {stage}: " + ", ".join(f"{name} {s * 1e6:.1f} us" for name, s in ranked))
    assert refused == {}
    assert set(seconds) == set(map(str, choices))


@pytest.mark.machine
def test_broken_launches(gpu):
    """The launchers check before they touch memory."""
    layer = layer_of("conv_bn_stats", 2, (8, 8), 64, 64, torch.float16)
    args = list(plan(layer, TrainingConfig(3), True).args)
    x = torch.zeros(2, 8, 8, 64, device=gpu, dtype=torch.float16)
    weight, affine = torch.zeros(64, 3, 3, 64, device=gpu, dtype=torch.float16), torch.zeros(2, 64, device=gpu)
    launch = ops.conv_halo_stats_launch
    for arguments, message in [
        ((x.float(), affine, weight, None, x, None, 3, args), "x has dtype float32"),
        ((x, affine, weight[1:], None, x, None, 3, args), "weight has .* elements, want 36864"),
        ((x, affine[0], weight, None, x, None, 3, args), "scale_shift has 64 elements, want 128"),
        ((x, affine.half(), weight, None, x, None, 3, args), "scale_shift has dtype float16, want float32"),
        ((x, affine, weight, None, x, affine[:1], 3, args), "partial has 64 elements, want 256"),
        ((x, affine, weight, None, x.view(-1)[1:], None, 3, args), "y has .* elements|not aligned"),
        ((x, affine, weight, None, x, None, 6, args), "tile is 6, want 0 to 5"),
        ((x, affine, weight, None, x, None, 3, args[1:]), "args has 18 integers, want 19"),
        ((x.cpu(), affine, weight, None, x, None, 3, args), "is not on the device"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            launch(*arguments)
    rest = (None, None, None, None, None, None)
    with pytest.raises(RuntimeError, match="y and coefficients come together"):
        ops.conv_halo_gradient_launch(x, x, None, weight, None, *rest, x, None, 3, args)
    with pytest.raises(RuntimeError, match="x is None, want the input of the ReLU"):
        ops.conv_halo_gradient_launch(x, None, None, weight, None, *rest, x, None, 3, args)
