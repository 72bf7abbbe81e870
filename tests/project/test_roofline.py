"""The count of arithmetic and bytes on GPUs, against sums done by hand and the networks' published sizes."""

import subprocess
import sys

import pytest
import torch

import resnet_fast
from resnet_fast.diagnose.roofline import A100, H100, roofline


def rows(name, *shape, dtype=torch.bfloat16):
    found = roofline(getattr(resnet_fast, name)().eval(), torch.empty(shape, dtype=dtype))
    return found, {r.name: r for r in found.rows}


def test_a_layer_by_hand():
    """56 x 56 x 64, 3 x 3, batch 8, 2 bytes: the second convolution of a block, with its residual."""
    _, layers = rows("ResNet32", 8, 3, 224, 224)
    first, second = layers["layer1.1.conv1"], layers["layer1.1.conv2"]
    one_map, filters = 8 * 56 * 56 * 64 * 2, 64 * 64 * 9 * 2
    assert second.shape == (8, 64, 56, 56)
    assert second.flops == 2 * 8 * 56 * 56 * 64 * 64 * 9
    assert second.bytes == 3 * one_map + filters  # image, residual, result
    # conv 2 maps, batch norm 2, add 3, ReLU 2
    assert second.eager_bytes == 9 * one_map + filters
    assert second.kernel == "3x3/1 conv+bn+add+relu"
    assert first.bytes == 2 * one_map + filters
    assert first.eager_bytes == 6 * one_map + filters
    stem = layers["conv1"]
    assert stem.kernel == "7x7/2 conv"
    assert stem.bytes == stem.eager_bytes == (8 * 3 * 224 * 224 + 8 * 64 * 112 * 112 + 64 * 3 * 49) * 2
    projection = layers["layer2.0.downsample.0"]
    assert projection.kernel == "1x1/2 conv+bn"
    assert projection.eager_bytes - projection.bytes == 2 * 8 * 128 * 28 * 28 * 2


def test_floor_is_the_slower_of_arithmetic_and_memory():
    assert A100.floor(312_000_000, 1, torch.bfloat16) == pytest.approx(1e-6)
    assert H100.floor(1, 3_350_000, torch.bfloat16) == pytest.approx(1e-6)
    assert A100.floor(312_000_000, 1, torch.float32) == pytest.approx(2e-6)  # TF32


@pytest.mark.parametrize(
    ("name", "size", "macs", "convolutions"),
    [("resnet50", 224, 4.09e9, 53), ("resnet18", 224, 1.81e9, 20), ("cifar_resnet32", 32, 69e6, 33)],
)
def test_published_totals(name, size, macs, convolutions):
    """Multiply-adds of an image as the papers and torchvision's model cards give them, linear layer apart."""
    found, layers = rows(name, 1, 3, size, size)
    assert len(layers) == convolutions
    assert found.total.flops / 2 == pytest.approx(macs, rel=0.01)
    assert found.floor(A100) >= max(found.total.flops / 312e12, found.total.bytes / 2.039e12)


def test_the_table_says_that_it_was_computed():
    text = str(rows("cifar_resnet20", 1, 3, 32, 32)[0])
    assert "Computed from datasheets, not measured: A100 SXM 80 GB (312 TFLOP/s" in text
    assert "layer1.0.conv1" in text


def test_command_without_a_gpu():
    command = [
        sys.executable,
        "-m",
        "resnet_fast",
        "explain",
        "cifar_resnet20",
        "--device",
        "cuda",
        "--dtype",
        "bfloat16",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "sum of the convolutions" in done.stdout
    assert "No CUDA device is visible: no time was measured." in done.stdout


def test_bad_arguments():
    model = resnet_fast.cifar_resnet20()
    with pytest.raises(ValueError, match="model is in training mode"):
        roofline(model, torch.empty(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64, want float16"):
        roofline(model.eval(), torch.empty(1, 3, 32, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x has shape \[0, 3, 32, 32\], want at least 1 of each"):
        roofline(model, torch.empty(0, 3, 32, 32))
