"""Whole networks: parameters, keys, shapes, values."""

import copy

import pytest
import torch
from helpers.support import assert_same_model, channels_last, exact_kernels, randomize_, twins
from torch import nn

import resnet_fast
from benchmarks.memory import peak_bytes
from resnet_fast import backends, reference

NAMES = [
    "ResNet32",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def on_meta(module, name, *args, **kwargs):
    with torch.device("meta"):
        return getattr(module, name)(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "count"),
    # torchvision's published numbers.
    [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032), ("resnet101", 44_549_160)],
)
def test_published_parameter_counts(name, count):
    assert parameters(on_meta(resnet_fast, name)) == count
    assert parameters(on_meta(reference, name)) == count


@pytest.mark.parametrize(
    ("name", "millions"),
    # He et al. 2015, table 6; their shortcuts have no weights, ours 2.75 thousand, a projection each.
    [
        ("cifar_resnet20", 0.27),
        ("cifar_resnet32", 0.46),
        ("cifar_resnet44", 0.66),
        ("cifar_resnet56", 0.85),
        ("cifar_resnet110", 1.7),
    ],
)
def test_cifar_parameter_counts(name, millions):
    count = parameters(on_meta(resnet_fast, name, 10))
    projections = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert round((count - projections) / 1e6, 1 if millions > 1 else 2) == millions
    if name == "cifar_resnet32":
        assert 0.46e6 < count < 0.47e6


def test_resnet32_parameter_count():
    """By hand: stem, per stage the first block with its projection and the others, classifier."""

    def block(c, k):
        return 9 * c * k + k + 2 * k + 9 * k * k + k + 2 * k + (c * k + k + 2 * k if c != k else 0)

    stages = [(64, 64, 3), (64, 128, 4), (128, 256, 6), (256, 512, 3)]
    total = 49 * 3 * 64 + 64 + sum(block(c, k) + (n - 1) * block(k, k) for c, k, n in stages) + 4608 * 2 + 2
    assert parameters(on_meta(resnet_fast, "ResNet32")) == total


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_exchange_both_ways(name):
    fast, eager = on_meta(resnet_fast, name), on_meta(reference, name)
    assert [(k, v.shape) for k, v in fast.state_dict().items()] == [(k, v.shape) for k, v in eager.state_dict().items()]
    fast.load_state_dict(eager.state_dict(), strict=True, assign=True)
    eager.load_state_dict(fast.state_dict(), strict=True, assign=True)
    assert type(fast).__name__ == type(eager).__name__
    assert isinstance(fast, type(eager).__mro__[0] if name == "ResNet32" else nn.Module)


def bn(prefix):
    return [f"{prefix}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


@pytest.mark.parametrize(
    ("name", "stages", "convs"),
    [
        ("resnet18", [2, 2, 2, 2], 2),
        ("resnet34", [3, 4, 6, 3], 2),
        ("resnet50", [3, 4, 6, 3], 3),
        ("resnet101", [3, 4, 23, 3], 3),
        ("cifar_resnet32", [5, 5, 5], 2),
    ],
)
def test_torchvisions_keys(name, stages, convs):
    keys = ["conv1.weight", *bn("bn1"), "fc.weight", "fc.bias"]
    for i, blocks in enumerate(stages, 1):
        for j in range(blocks):
            block = f"layer{i}.{j}"
            for k in range(1, convs + 1):
                keys += [f"{block}.conv{k}.weight", *bn(f"{block}.bn{k}")]
            if j == 0 and (i > 1 or convs == 3):
                keys += [f"{block}.downsample.0.weight", *bn(f"{block}.downsample.1")]
    assert sorted(on_meta(resnet_fast, name).state_dict()) == sorted(keys)


def test_resnet32_keys():
    keys = set(on_meta(resnet_fast, "ResNet32").state_dict())
    assert {"conv1.bias", "layer1.0.conv1.bias", "layer2.0.downsample.0.bias", "classifier.weight"} <= keys
    assert "layer1.0.downsample.0.weight" not in keys
    # A stem of another width than the first stage takes a projection.
    keys = set(on_meta(resnet_fast, "ResNet32", 32).state_dict())
    assert "layer1.0.downsample.0.weight" in keys


def test_resnet32_at_full_size():
    fast, eager = twins(resnet_fast.ResNet32, reference.ResNet32)
    x = torch.randn(8, 3, 224, 224)
    with backends.use("cpu"), torch.no_grad():
        y = fast(x)
        assert y.shape == (8, 2)
        assert ((y >= 0) & (y <= 1)).all()
        # Two probabilities, each rounded: to within 2 eps.
        assert (y.sum(1) - 1).abs().max() <= 2 * torch.finfo(torch.float32).eps
        assert torch.equal(torch.softmax(fast.logits(x[:1]), 1), fast(x[:1]))
        assert_same_model(fast, eager, x[:1], "features", factor=2)
        with exact_kernels():
            assert_same_model(fast, eager, x[:1], "features", factor=2)
    assert backends.fallbacks() == {}


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "shape"),
    [
        ("ResNet32", (32, 5), {"image_size": 64}, (3, 3, 64, 64)),
        ("ResNet32", (), {"image_size": 75, "dropout": 0.5}, (1, 3, 75, 75)),
        ("cifar_resnet32", (), {}, (5, 3, 32, 32)),
        ("cifar_resnet20", (7,), {}, (2, 3, 29, 37)),
        ("cifar_resnet110", (), {}, (1, 3, 32, 32)),
        ("resnet18", (10,), {}, (2, 3, 64, 64)),
        ("resnet34", (10,), {}, (1, 3, 65, 71)),
        ("resnet50", (10,), {}, (3, 3, 64, 64)),
        ("resnet101", (10,), {}, (1, 3, 64, 64)),
    ],
    ids=str,
)
def test_error_rule(name, args, kwargs, shape):
    """On the last feature map: a handful of logits is too few numbers for a ratio of errors."""
    fast, eager = twins(getattr(resnet_fast, name), getattr(reference, name), *args, **kwargs)
    x = torch.randn(shape)
    with backends.use("cpu"), torch.no_grad():
        with exact_kernels():
            assert_same_model(fast, eager, x, "features", factor=2)
        assert_same_model(fast, eager, x, "features", factor=2)
        assert fast(x).shape == (shape[0], args[-1] if args else {"ResNet32": 2}.get(name, 10))
    assert backends.fallbacks() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("name", "size"), [("cifar_resnet20", 32), ("resnet50", 64)])
def test_other_dtypes(name, size, dtype):
    fast, eager = (m.to(dtype) for m in twins(getattr(resnet_fast, name), getattr(reference, name)))
    x = torch.randn(2, 3, size, size).to(dtype)
    with backends.use("cpu"):
        if dtype == torch.bfloat16:
            assert_same_model(fast, eager, x, "features", factor=2)
        else:
            # The reference is float64 itself: both differ from the truth by roundings, from each other by two.
            with torch.no_grad():
                ours, nchw = fast.features(x), eager.features(x)
                last = eager.to(memory_format=torch.channels_last).features(
                    x.contiguous(memory_format=torch.channels_last)
                )
            eager_spread = (nchw - last).square().mean().sqrt()
            assert (ours - nchw).square().mean().sqrt() <= 4 * eager_spread


def test_channels_last_model_and_input():
    fast, eager = twins(resnet_fast.cifar_resnet20, reference.cifar_resnet20)
    fast = fast.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32)
    exact = eager(x)
    out = fast(x.contiguous(memory_format=torch.channels_last))
    # Thirty convolutions deep, by different sums.
    assert torch.allclose(out, exact, rtol=1e-3, atol=1e-4)


def test_logits_are_what_a_loss_wants():
    fast, eager = twins(resnet_fast.ResNet32, reference.ResNet32, image_size=64)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_same_model(fast, eager, x, "logits", factor=3)
        assert torch.equal(fast(x), torch.softmax(fast.logits(x), 1))


@pytest.mark.parametrize("module", [resnet_fast, reference], ids=["fast", "reference"])
def test_wrong_image_size_names_the_right_one(module):
    model = module.ResNet32().eval()
    with pytest.raises(ValueError, match=r"\b64 x 64\b.*\b224 x 224\b.*4608 features.*image_size"):
        model(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"\b224 x 64\b"):
        model(torch.randn(1, 3, 224, 64))
    with pytest.raises(ValueError, match="image_size is 34"):
        module.ResNet32(image_size=34)
    assert module.ResNet32(image_size=35).eval()(torch.randn(1, 3, 35, 35)).shape == (1, 2)


@pytest.mark.parametrize("image_size", [35, 64, 75, 96, 223, 224, 225, 256])
def test_image_size_sets_the_classifier(image_size):
    """What the layers really give, not a formula."""
    model = reference.ResNet32(image_size=image_size).to("meta")
    x = torch.randn(1, 3, image_size, image_size, device="meta")
    assert model.avgpooling(model.features(x)).flatten(1).shape[1] == model.classifier.in_features
    assert (
        on_meta(resnet_fast, "ResNet32", image_size=image_size).classifier.in_features == model.classifier.in_features
    )


def test_dropout_acts_in_training_only():
    model = randomize_(resnet_fast.ResNet32(image_size=64, dropout=0.5))
    x = torch.randn(2, 3, 64, 64)
    plain = resnet_fast.ResNet32(image_size=64)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval().logits(x), plain.eval().logits(x))
    features = copy.deepcopy(model).train().features(x)
    assert 0.4 < (features[:, :, 0] == 0).float().mean() < 1
    dropped = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert len(dropped) == 16
    assert all(m.p == 0.5 for m in dropped)


@pytest.mark.parametrize("batch", [1, 8])
def test_memory_beside_the_weights(batch):
    """What the first call takes at most, packed filters and maps included, in weights of the network."""
    model, x = resnet_fast.ResNet32().eval(), channels_last(torch.randn(batch, 3, 224, 224))
    weights = sum(p.nbytes for p in model.parameters())
    with torch.no_grad():
        first, later = (peak_bytes(lambda: model(x)) / weights for _ in range(2))
    print(f"batch {batch}: {first:.2f} in the first call, {later:.2f} later")
    assert 0.1 < first < 1.5  # from 0.5 on where nothing ran before in this process, whose memory is used again
    assert later < 0.5


def test_initialisation_is_the_references():
    for name in ("cifar_resnet20", "resnet18", "ResNet32"):
        torch.manual_seed(3)
        fast = getattr(resnet_fast, name)()
        torch.manual_seed(3)
        eager = getattr(reference, name)()
        assert all(map(torch.equal, fast.state_dict().values(), eager.state_dict().values()))
