"""augment in Triton: the compiled kernel executed in the simulator, and what ptxas makes of it."""

import pytest
import torch
from helpers import triton_gate as gate
from helpers.program.support import AUGMENT_CASES, augment_arguments, augmented

from resnet_fast._triton import augment as kernels
from resnet_fast.ops.augment import augment


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("case", AUGMENT_CASES, ids=str)
def test_equals_numpy(simulated_device, case, random):
    given = augment_arguments(*case, random=random)
    out = augment(*given)
    assert torch.equal(out, augmented(*given))
    assert out.is_contiguous(memory_format=torch.channels_last)
    ((name, _),) = simulated_device.launches
    assert name == "_augment_kernel"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(simulated_device, dtype):
    given = augment_arguments(*AUGMENT_CASES[0], dtype=dtype)
    assert torch.equal(augment(*given), augmented(*given))


def test_index_out_of_range_reads_nothing(simulated_device):
    images, _, table, *rest = augment_arguments(*AUGMENT_CASES[0])
    out = augment(images, torch.tensor([9, -1, 2**40, -(2**40)]), table, *rest)
    assert torch.equal(out, table[:, 0, None, None].expand(4, 3, 7, 5))


def test_empty_batch(simulated_device):
    images, _, table, *rest = augment_arguments(*AUGMENT_CASES[0])
    assert augment(images, torch.zeros(0, dtype=torch.int64), table, *rest).shape == (0, 3, 7, 5)
    assert simulated_device.launches == []


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, lambda t: t.int(), "images has dtype"),
        (0, lambda t: t[0], "images of shape"),
        (0, lambda t: t[:, :2].contiguous(), "images have 2 channels, want 1 or 3"),
        (1, lambda t: t.int(), "index has dtype"),
        (2, lambda t: t[:, :255].contiguous(), "table has shape"),
        (4, lambda p: -1, "padding is -1"),
    ],
)
def test_errors_name_the_argument(simulated_device, number, change, message):
    given = list(augment_arguments(*AUGMENT_CASES[0]))
    given[number] = change(given[number])
    with pytest.raises(RuntimeError, match=message):
        augment(*given)


def test_geometry():
    assert kernels.geometry(128, 3 * 32 * 32) == (128, 3)
    assert kernels.geometry(0, 5) == (0, 1)


@pytest.mark.parametrize("arch", gate.ARCHS)
def test_code(arch):
    """The eight elements of a thread are written as two vectors."""
    images, index, table, *rest = augment_arguments(4, 3, 32, 32, 3, 4, True)
    ((kernel, args, meta),) = gate.launches(kernels.augment, images, index, table, *rest)
    sass = gate.inspect_launch(kernel, args, meta, arch)
    assert sass.spills == sass.stack == 0
    assert sass.count("STG.128") == 2
    assert sass.blocks_per_sm >= 8
