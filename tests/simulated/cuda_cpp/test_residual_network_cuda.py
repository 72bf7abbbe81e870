"""Whole CIFAR networks on the stage kernels: three launches from images to scores, executed in the simulator."""

import copy

import pytest
import torch
from helpers.stage_support import DTYPES, add_kernels, assert_rule
from helpers.support import EAGER_LAYOUTS, assert_error_rule, computing, eager_results, twins
from torch import nn

import resnet_fast
from resnet_fast import backends, reference

STAGES = ("stem_16x32x32_1", "strided_32x16x16_1", "strided_64x8x8_1")


@pytest.fixture
def device(simulated_device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    add_kernels(simulated_device)
    return simulated_device


def names(dtype, *stages):
    return [f"residual_stage_{stage}_{str(dtype)[6:]}" for stage in stages]


def launched(device):
    found = [name for name, _ in computing(device)]
    device.launches.clear()
    return found


def networks(blocks=1, dtype=torch.float16, **options):
    """Of so many blocks a stage, of which one shows what depth does not change."""
    fast, eager = twins(resnet_fast.CifarResNet, reference.CifarResNet, blocks, **options)
    return fast.to(dtype), eager.to(dtype)


@pytest.mark.parametrize(("dtype", "layout"), zip(DTYPES, (*EAGER_LAYOUTS, EAGER_LAYOUTS[0]), strict=True), ids=str)
def test_cifar_resnet20(device, dtype, layout):
    fast, eager = networks(3, dtype)
    x = torch.randn(3, 3, 32, 32).to(dtype).contiguous(memory_format=layout)
    with torch.no_grad():
        scores = fast(x)
    assert launched(device) == names(dtype, *STAGES)
    assert_rule(scores, eager, x)
    # Thirty numbers are few: the last map by the rule, too, which the stem's own kernel and the stages give.
    with torch.no_grad():
        last = fast.features(x)
    assert launched(device)[1:] == names(dtype, "map_16x32x32_1", *STAGES[1:])
    assert_rule(last, eager, x, "features")
    assert backends.fallbacks() == {}


@pytest.mark.parametrize(("blocks", "batch", "classes"), [(1, 2, 100), (18, 1, 1)])
def test_depths(device, blocks, batch, classes):
    """The least, and that of cifar_resnet110."""
    fast, eager = networks(blocks, num_classes=classes)
    x = torch.randn(batch, 3, 32, 32).half()
    with torch.no_grad():
        scores = fast(x)
    assert len(launched(device)) == 3
    assert_rule(scores, eager, x)


def test_many_images(device):
    """More than one for each multiprocessor: several a block in the last stage, the last block not full. The images
    are the same five: and so are their scores, to the bit, whatever block and place they have in it."""
    fast, _ = networks()
    x = torch.randn(5, 3, 32, 32).half()
    with torch.no_grad():
        few = fast(x)
        launched(device)
        many = fast(x.repeat(22, 1, 1, 1)[:109])
    assert launched(device) == names(torch.float16, *STAGES[:2], "strided_64x8x8_2")
    assert torch.equal(many, few.repeat(22, 1)[:109])


def test_traffic(device):
    """Images, parameters and scores, and the two maps between the stages: nothing else goes through memory."""
    fast, _ = networks(5)
    x = torch.randn(1, 3, 32, 32).half()
    with torch.no_grad():
        y = fast(x)
    assert len(computing(device)) <= 4
    parameters = sum(
        p.nbytes if isinstance(m, (nn.Conv2d, nn.Linear)) else 4 * p.numel()
        for m in fast.modules()
        for p in m.parameters(recurse=False)
    )
    between = 2 * (16 * 32 * 32 + 32 * 16 * 16)
    needed = x.nbytes + parameters + 2 * between + y.nbytes
    moved = sum(sum(report.compulsory_bytes) for _, report in computing(device))
    touched, least = map(sum, zip(*(report.sectors for _, report in computing(device)), strict=True))
    print(f"{moved} bytes, {moved / needed:.3f} of what is needed; sectors {32 * touched / needed:.3f}, 3 launches")
    assert moved <= 1.01 * needed
    assert 32 * touched <= 1.1 * needed
    assert touched == least
    assert all(report.conflicts() == [] for _, report in computing(device))


def test_repeatable(device):
    fast, _ = networks(dtype=torch.bfloat16)
    x = torch.randn(2, 3, 32, 32).bfloat16()
    results = []
    for seed in (0, 5, 77):
        device.seed = seed
        with torch.no_grad():
            results.append(fast(x))
    assert all(torch.equal(y, results[0]) for y in results)


def test_weights_stay_fresh(device):
    fast, eager = networks()
    x = torch.randn(2, 3, 32, 32).half()
    changes = {
        "the first filter": lambda m: m.conv1.weight.mul_(2),
        "the statistics of a block": lambda m: m.layer2[0].downsample[1].running_mean.add_(1),
        "the linear layer": lambda m: m.fc.weight.mul_(-1),
        "its bias": lambda m: m.fc.bias.add_(1),
    }
    with torch.no_grad():
        before = fast(x)
        for what, change in changes.items():
            change(fast)
            change(eager)
            after = fast(x)
            assert not torch.equal(before, after), what
            exact, results = eager_results(eager, x)
            assert_error_rule(after, exact, results, what)
            before = after
    assert len(launched(device)) == 3 * (1 + len(changes))


def hooked(model):
    model.avgpool.register_forward_hook(lambda module, inputs, y: y * 2)


def other_pooling(model):
    model.avgpool = nn.AdaptiveMaxPool2d(1)


def other_head(model):
    model.fc = nn.Sequential(nn.Linear(64, 10), nn.Softmax(1)).to(model.fc.weight.dtype)


@pytest.mark.parametrize("change", [hooked, other_pooling, other_head])
def test_other_heads_run_apart(device, change):
    """What stands behind the stages is no longer what the kernel does: it runs as it is, the stages fused."""
    fast, eager = networks()
    change(eager)
    fast_head, eager_head = copy.deepcopy(eager.avgpool), copy.deepcopy(eager.fc)
    if change is hooked:
        hooked(fast)
    else:
        fast.avgpool, fast.fc = fast_head, eager_head
    x = torch.randn(2, 3, 32, 32).half()
    with torch.no_grad():
        y = fast(x)
    assert launched(device)[1:] == names(torch.float16, "map_16x32x32_1", *STAGES[1:])
    exact, results = eager_results(eager, x)
    assert_error_rule(y, exact, results)


def test_a_subclass_is_left_alone(device):
    class Doubled(resnet_fast.models.CifarResNet):
        def features(self, x):
            return 2 * super().features(x)

    fast = Doubled(1).eval().half()
    x = torch.randn(1, 3, 32, 32).half()
    with torch.no_grad():
        fast(x)
    assert launched(device)[1:] == names(torch.float16, "map_16x32x32_1", *STAGES[1:])


def test_gradients(device):
    """Eval mode with gradients: the stages' kernels keep nothing for the backward pass, so those of training run."""
    fast, eager = networks()
    x = torch.randn(2, 3, 32, 32).half().requires_grad_()
    fast(x).float().square().sum().backward()
    assert launched(device).count("_conv_bn_stats_kernel") == 1 + 2 * 3 + 2
    grad, x.grad = x.grad, None
    eager(x).float().square().sum().backward()
    exact_x = x.detach().double().requires_grad_()
    copy.deepcopy(eager).double()(exact_x).square().sum().backward()
    assert_error_rule(grad, exact_x.grad, [x.grad])


def test_autocast(device):
    fast, eager = networks(dtype=torch.float32)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, low = fast(x), eager(x)
    assert y.dtype == torch.bfloat16
    assert launched(device) == names(torch.bfloat16, *STAGES)
    with torch.no_grad():
        assert_error_rule(y, copy.deepcopy(eager).double()(x.double()), [low])


def test_other_images(device):
    """Images of another size have no stage kernels: they run layer by layer."""
    fast, _ = networks()
    with torch.no_grad():
        fast(torch.randn(1, 3, 16, 16).half())
    assert "_conv_bn_relu_fwd_kernel" in (found := launched(device))
    assert not any("residual_stage" in name for name in found)


def test_shapes_without_data():
    """What the compiler is told of the result."""
    x, packed = torch.empty(5, 64, 8, 8, device="meta", dtype=torch.float16), torch.empty(9, device="meta")
    block = [0, -1, 1, 64, 3, 3, 1, 1, 1, 1, 1, 0, 1, 64, 3, 3, 1, 1, 1, 1]
    y = torch.ops.resnet_fast.residual_network(x, packed, block, 0)
    assert y.shape == x.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    scores = torch.ops.resnet_fast.residual_network(x, packed, block, 7)
    assert (scores.shape, scores.dtype) == ((5, 7), torch.float16)
