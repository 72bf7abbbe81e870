"""augment: a batch cropped, mirrored and normalised, bit for bit as NumPy makes it; errors."""

import pytest
import torch
from helpers.program.support import AUGMENT_CASES, augment_arguments, augmented

from resnet_fast import backends
from resnet_fast.ops.augment import augment

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("case", AUGMENT_CASES, ids=str)
def test_equals_numpy(case, random):
    given = augment_arguments(*case, random=random)
    out = augment(*given)
    assert torch.equal(out, augmented(*given))
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    given = augment_arguments(*AUGMENT_CASES[0], dtype=dtype)
    out = augment(*given)
    assert out.dtype == dtype
    assert torch.equal(out, augmented(*given))


def test_every_shift_and_both_sides_are_drawn():
    """One bright pixel in the middle: where it comes to lie tells the window."""
    images = torch.zeros(2000, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 1] = 1
    table = torch.arange(256.0)[None]
    out = augment(images, torch.arange(2000), table, 12345, 1, True)
    where = out[:, 0].flatten(1).argmax(1)
    counts = torch.bincount(where, minlength=25).reshape(5, 5)
    # Columns 0, 1, 2 of those that are not mirrored, 2, 3, 4 of the others: 1/18 each of rows 1 to 3, twice column 2.
    wanted = torch.zeros(5, 5)
    wanted[1:4] = 2000 / 18 * torch.tensor([1, 1, 2, 1, 1])
    # Five standard deviations of a count.
    assert ((counts - wanted).abs() <= 5 * wanted.sqrt()).all()


def test_many_images_by_threads():
    given = augment_arguments(300, 3, 8, 8, 3, 2, True)
    assert torch.equal(augment(*given), augmented(*given))


def test_empty_batch():
    images, _, table, *rest = augment_arguments(*AUGMENT_CASES[0])
    assert augment(images, torch.zeros(0, dtype=torch.int64), table, *rest).shape == (0, 3, 7, 5)


def test_operator_is_well_formed():
    torch.library.opcheck(torch.ops.resnet_fast.augment, augment_arguments(*AUGMENT_CASES[0]))


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, lambda t: t.int(), "images"),
        (0, lambda t: t[0], "images has shape"),
        (0, lambda t: t[:, :, ::2], "images of shape"),
        (0, lambda t: t[:, :2].contiguous(), "images have 2 channels, want 1, or 3"),
        (0, lambda t: None, "images"),
        (1, lambda t: t.int(), "index"),
        (1, lambda t: t[None], "index has shape"),
        (1, lambda t: t + 1, r"index holds 9, want from -1 to 8"),
        (1, lambda t: t - 1, r"index holds -2, want from -1 to 8"),
        (2, lambda t: t[:, :255], "table has shape"),
        (2, lambda t: t.byte(), "table has a dtype of 1 bytes"),
        (2, lambda t: t.int(), "table has a dtype of 4 bytes that is none of"),
        (4, lambda p: -1, "padding is -1"),
        (4, lambda p: 2**40, "padding is"),
    ],
)
def test_errors_name_the_argument(number, change, message):
    given = list(augment_arguments(*AUGMENT_CASES[0]))
    given[number] = change(given[number])
    with pytest.raises((RuntimeError, TypeError), match=message):
        torch.ops.resnet_fast.augment(*given)


def test_without_a_kernel():
    given = augment_arguments(*AUGMENT_CASES[0])
    with backends.use("eager"), pytest.raises(RuntimeError, match=r"augment cannot run: backends.use\('eager'\)"):
        augment(*given)
