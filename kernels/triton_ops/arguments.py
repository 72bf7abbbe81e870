"""Checks of the launchers' arguments, and images seen as rows of channels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fast import launch


def check_tensor(
    name: str,
    t: Tensor,
    like: Tensor | None = None,
    dtypes: Sequence[torch.dtype] = (),
    shape: Sequence[int] | None = None,
) -> None:
    """Raises TypeError or ValueError that names the argument, what it got and what it wants.

    like: whose device the tensor has to share; without one, it has to be where kernels run.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is {type(t).__name__}, want a tensor")
    if like is None and not t.is_cuda and not launch.is_simulated():
        raise ValueError(f"{name} is on {t.device}, want a CUDA device")
    if like is not None and t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, want {like.device}")
    if dtypes and t.dtype not in dtypes:
        raise TypeError(f"{name} is {t.dtype}, want {' or '.join(map(str, dtypes))}")
    if shape is not None and tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(t.shape)}, want {tuple(shape)}")


def check_image(name: str, t: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    check_tensor(name, t, dtypes=dtypes)
    if t.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, want [N, C, H, W]")


def as_rows(t: Tensor) -> Tensor:
    """[N, C, H, W] as [N H W, C] with dense rows: a view of a channels_last tensor, a copy of any other."""
    return t.permute(0, 2, 3, 1).contiguous().view(-1, t.shape[1])


def empty_image_like(t: Tensor) -> Tensor:
    """Uninitialised, of `t`'s shape and dtype, channels_last."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=torch.channels_last)
