"""Argument checks of the operators on CUDA devices, in inference and training: they raise before any launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.arguments import DTYPES

__all__ = [
    "MOST_PIXELS",
    "check_algorithm",
    "check_dtype",
    "check_image",
    "check_input",
    "check_pixels",
    "check_rows",
    "check_sums",
    "fail",
]

MOST_PIXELS = 2**31 - 1  # that one launch covers


def fail(op: str, message: str) -> None:
    raise RuntimeError(f"{op}: {message}")


def check_dtype(name: str, t: Tensor) -> None:
    if t.dtype not in DTYPES["cuda"]:
        raise RuntimeError(f"{name} has dtype {t.dtype}, want float16, bfloat16 or float32")


def check_input(name: str, t: Tensor) -> None:
    """Checks for a batch of images in a dtype that kernels take, in any layout."""
    if t.dim() != 4:
        raise RuntimeError(f"{name} has {t.dim()} dimensions, want 4: [batch, channels, height, width]")
    check_dtype(name, t)


def check_pixels(op: str, pixels: int) -> None:
    if pixels > MOST_PIXELS:
        fail(op, f"x has or gives {pixels} pixels, more than the {MOST_PIXELS} that one launch covers")


def check_algorithm(op: str, algorithm: int) -> None:
    if algorithm != 0:
        fail(op, f"algorithm is {algorithm}, want 0 on CUDA devices")


def check_image(op: str, name: str, t: Tensor, like: tuple[str, Tensor] | None = None) -> None:
    check_input(f"{op}: {name}", t)
    if t.numel() > 0 and not t.is_contiguous(memory_format=torch.channels_last):
        fail(op, f"{name} of shape {tuple(t.shape)} is not contiguous in channels_last")
    if like is None:
        return
    other, u = like
    if t.shape != u.shape:
        fail(op, f"{name} has shape {tuple(t.shape)}, want {tuple(u.shape)} as {other} has")
    if t.dtype != u.dtype:
        fail(op, f"{name} has dtype {t.dtype}, want {u.dtype} as {other} has")
    if t.device != u.device:
        fail(op, f"{name} is on {t.device}, want {u.device} as {other} is")


def check_rows(op: str, name: str, t: Tensor | None, rows: int, like: Tensor) -> None:
    shape = (rows, like.shape[1])
    if t is None:
        return
    if tuple(t.shape) != shape or t.dtype != torch.float32 or not t.is_contiguous() or t.device != like.device:
        fail(
            op,
            f"{name} has shape {tuple(t.shape)} and dtype {t.dtype} on {t.device}, want a contiguous {shape} of "
            f"float32 on {like.device}",
        )


def check_sums(op: str, like: tuple[str, Tensor], ys: list[Tensor], stats: list[Tensor]) -> None:
    if len(ys) != len(stats) or len(ys) > 2:
        fail(op, f"there are {len(ys)} ys and {len(stats)} stats, want as many of both, at most 2")
    for y, mean in zip(ys, stats, strict=True):
        check_image(op, "ys", y, like)
        check_rows(op, "stats", mean, 2, like[1])
