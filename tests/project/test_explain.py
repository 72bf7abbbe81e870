"""``explain``: each layer of fused and other networks once, with its kernel, its work and its time."""

from functools import partial

import pytest
import torch
from helpers.support import SHALLOW, channels_last, shallow, twins
from torch import nn

import resnet_fast
from resnet_fast import backends, models, reference
from resnet_fast.__main__ import main

# Name, size of the images, convolutions.
NETWORKS = list(zip(SHALLOW, (32, 64, 64, 64), (9, 12, 17, 36), strict=True))


def network(name):
    return twins(partial(shallow, models, name), partial(shallow, reference, name))


def multiply_adds(eager, x):
    """Counted by hooks on the plain twin."""
    found = []

    def count(module, inputs, y):
        found.append(y.numel() * module.weight[0].numel())

    for m in eager.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.register_forward_hook(count)
    with torch.no_grad():
        eager(x)
    return sum(found)


@pytest.mark.parametrize(("name", "size", "convolutions"), NETWORKS)
def test_networks(name, size, convolutions):
    fast, eager = network(name)
    x = channels_last(torch.randn(2, 3, size, size))
    found = resnet_fast.explain(fast, x, runs=1)
    names = [row.name for row in found.rows]
    assert len(set(names)) == len(names)
    assert sum("3x3" in r.kernel or "1x1" in r.kernel or "7x7" in r.kernel for r in found.rows) == convolutions
    assert sum(r.flops for r in found.rows) == 2 * multiply_adds(eager, x)
    assert all(r.seconds > 0 and r.bytes > 0 for r in found.rows)
    assert found.fallbacks == {}
    assert "sum of the layers" in str(found)
    assert "fused" not in vars(fast)
    assert fast(x).shape == eager(x).shape


def test_pooling_belongs_to_the_stem():
    fast, _ = network("ResNet of basic blocks")
    x = channels_last(torch.randn(1, 3, 64, 64))
    first, *others = resnet_fast.explain(fast, x, runs=1).rows
    assert first.kernel == f"direct 7x7/2 {backends.isa()}, max pool 3x3/2"
    assert first.shape == (1, 64, 16, 16)
    assert first.flops == 2 * 64 * 32 * 32 * 147
    assert not any("Pool" in row.kernel and "Max" in row.kernel for row in others)
    fast.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)  # cannot come along
    first, pool, *_ = resnet_fast.explain(fast, x, runs=1).rows
    assert (first.kernel, pool.kernel) == (f"direct 7x7/2 {backends.isa()}", "eager MaxPool2d")
    assert first.shape == (1, 64, 32, 32)


def test_a_network_of_others():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    found = resnet_fast.explain(resnet_fast.fuse(net.eval()), torch.randn(2, 3, 9, 9), runs=1)
    assert [(r.name, r.kernel.split()[0]) for r in found.rows] == [("0", "direct"), ("3", "eager")]


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (nn.Identity(), torch.zeros(1), "training mode"),
        (nn.Identity().eval(), torch.zeros(1, device="meta"), "x is on meta"),
        (nn.Identity().eval(), torch.zeros(0, 3, 32, 32), r"x has shape \[0, 3, 32, 32\]"),
    ],
    ids=["training", "device", "empty"],
)
def test_errors(model, x, message):
    with pytest.raises(ValueError, match=message):
        resnet_fast.explain(model, x)


@pytest.mark.parametrize("name", ["cifar_resnet20"])
def test_the_program(name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["resnet_fast", "explain", name, "--batch", "1"])
    main()
    out = capsys.readouterr().out
    assert out.startswith(name)
    assert "conv1" in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("explain cifar_resnet20 --batch 0", "--batch is 0, want at least 1"),
        ("explain cifar_resnet20 --batch -3", "--batch is -3, want at least 1"),
        ("explain cifar_resnet20 --batch 0 --device cuda", "--batch is 0, want at least 1"),
        ("explain cifar_resnet20 --image-size 0", "--image-size is 0, want at least 1"),
        ("explain resnet18 --image-size -1", "--image-size is -1, want at least 1"),
        ("explain ResNet32 --image-size 0 --eager", "--image-size is 0, want at least 1"),
        ("explain ResNet32 --image-size 8", "image_size is 8, want at least 35"),
        ("explain ResNet32 --image-size 8 --device cuda", "image_size is 8, want at least 35"),
        ("explain cifar_resnet20 --threads 0", "--threads is 0, want at least 1"),
        ("explain cifar_resnet20 --image-size 10000000", "no memory for 1 images of 10000000 x 10000000"),
        ("explain cifar_resnet20 --device cuda --dtype float64", "--dtype is float64, want float32, bfloat16 or"),
        ("tune cifar_resnet20 --batch 0", "--batch is 0, want at least 1"),
        ("tune cifar_resnet20 --image-size 0", "--image-size is 0, want at least 1"),
    ],
)
def test_the_program_names_what_is_wrong(command, message, monkeypatch, capsys):
    """In a line, before anything is measured."""
    monkeypatch.setattr("sys.argv", ["resnet_fast", *command.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value).startswith(f"{command.split()[0]}: {message}")
    assert "\n" not in str(end.value)
    assert capsys.readouterr().out == ""


def test_no_runs():
    with pytest.raises(ValueError, match="runs is 0, want at least 1"):
        resnet_fast.explain(nn.Identity().eval(), torch.zeros(1, 3, 4, 4), runs=0)
