"""A batch of training images from a set in device memory, in one kernel: the operator as a function, and its fake."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends

__all__ = ["VALUES", "augment", "check_augment", "fake", "unavailable"]

VALUES = 256  # of a pixel


def augment(images: Tensor, index: Tensor, table: Tensor, stream: int | None, padding: int, flip: bool) -> Tensor:
    """``y[n, k, h, w] = table[k, pixels[n, k, h, w]]``, pixels randomly cropped and mirrored from ``images[index]``.

    Equivalent to ``crop_and_flip`` of ``resnet_fast/program/data/augment.py`` and a look-up of its result, bit for bit.
    The table holds what normalisation and the cast make of the 256 values of a pixel.

    Args:
        images: the set, ``uint8 [set, K or 1, H, W]``, contiguous. A single channel serves for all K.
        index: ``int64 [N]``, from 0 to set - 1; -1 for a slot without an image, whose pixels are 0.
        table: ``[K, 256]``, contiguous, float16, bfloat16, float32 or float64.
        stream: the state of the random numbers (``stream`` in that file), a signed 64-bit integer; None neither crops
            nor mirrors.
        padding: pixels by which images are shifted at most (He et al. 2015, section 4.2, with 4), filled with 0.
        flip: mirrors every other image.

    Returns:
        ``[N, K, H, W]`` in channels_last, in the dtype of ``table``.

    Raises:
        RuntimeError: an argument is not as above, the message names it; or there is no kernel for the device. Indices
            are checked on CPUs; on a GPU one out of range gives a slot without an image.
    """
    if (reason := unavailable(backends.kind(images))) is not None:
        raise RuntimeError(f"augment cannot run: {reason}")
    return torch.ops.resnet_fast.augment(images, index, table, stream, padding, flip)


def unavailable(device: str) -> str | None:
    """Why there is no kernel for ``device``, or None."""
    return backends.unfused_reason("augment", device)


def check_augment(images: Tensor, index: Tensor, table: Tensor, padding: int) -> None:
    """Raises the errors of :func:`augment` that shapes, dtypes and devices show."""
    for name, t, dtype in (("images", images, torch.uint8), ("index", index, torch.int64)):
        if t.dtype != dtype:
            raise RuntimeError(f"augment: {name} has dtype {t.dtype}, want {dtype}")
    for name, t, rank in (("images", images, 4), ("index", index, 1), ("table", table, 2)):
        if t.dim() != rank or not t.is_contiguous() or t.device != images.device:
            raise RuntimeError(
                f"augment: {name} of shape {list(t.shape)} on {t.device}, want {rank} dimensions, contiguous, on "
                f"{images.device}"
            )
    if table.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise RuntimeError(f"augment: table has dtype {table.dtype}, want float16, bfloat16, float32 or float64")
    if table.shape[1] != VALUES:
        raise RuntimeError(f"augment: table has shape {list(table.shape)}, want [channels, {VALUES}]")
    if images.shape[1] not in (1, table.shape[0]):
        raise RuntimeError(f"augment: images have {images.shape[1]} channels, want 1 or {table.shape[0]} as table has")
    if not 0 <= padding <= 65535:
        raise RuntimeError(f"augment: padding is {padding}, want from 0 to 65535")


def fake(images: Tensor, index: Tensor, table: Tensor, stream: Any, padding: int, flip: bool) -> Tensor:
    check_augment(images, index, table, padding)
    shape = (index.shape[0], table.shape[0], *images.shape[2:])
    return torch.empty(shape, dtype=table.dtype, device=table.device, memory_format=torch.channels_last)
