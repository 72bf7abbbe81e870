"""Inputs: crops of two photographs, handwritten digits, noise; all normalised per channel.

Noise needs neither NumPy nor scikit-learn: they are imported where they are used.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KINDS", "images"]

KINDS = ("photographs", "digits", "random")


@cache
def images(kind: str, batch: int, size: int) -> Tensor:
    """``[batch, 3, size, size]``, float32, contiguous, mean 0 and variance 1 per channel; the same in every run."""
    generator = torch.Generator().manual_seed(batch * 1009 + size)
    if kind == "photographs":
        x = _photographs(batch, size, generator)
    elif kind == "digits":
        x = _digits(batch, size)
    elif kind == "random":
        x = torch.randn(batch, 3, size, size, generator=generator)
    else:
        raise ValueError(f"kind is {kind!r}, want one of {', '.join(KINDS)}")
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True)
    return (x - mean) / variance.sqrt()


def _photographs(batch: int, size: int, generator: torch.Generator) -> Tensor:
    """Crops at random places of scikit-learn's two photographs (427 x 640) in turn."""
    import numpy as np
    from sklearn.datasets import load_sample_images

    photographs = [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in load_sample_images().images]
    crops = []
    for i in range(batch):
        photograph = photographs[i % len(photographs)]
        top, left = (int(torch.randint(s - size + 1, (), generator=generator)) for s in photograph.shape[1:])
        crops.append(photograph[:, top : top + size, left : left + size])
    return torch.stack(crops).float()


def _digits(batch: int, size: int) -> Tensor:
    """scikit-learn's 8 x 8 digits, resized, in three equal channels."""
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().images[:batch]).float()[:, None]
    return F.interpolate(digits, size=(size, size), mode="bilinear", align_corners=False).repeat(1, 3, 1, 1)
