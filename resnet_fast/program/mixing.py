"""Mixup and CutMix, and the loss of mixed labels with label smoothing.

Image ``2i`` of a batch is mixed with image ``2i + 1`` and the other way round; batches are in random order, so any two
meet. What is drawn depends on seed, epoch and step alone: a resumed run, and as many images on any number of processes,
are mixed alike.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data import IGNORED
from .data.augment import draws

__all__ = ["Draw", "Targets", "box", "draw", "loss", "mix", "symmetric_beta"]

_STEPS = 1 << 63  # the stream's indices below are those of images


class Draw(NamedTuple):
    """How a step's images are mixed.

    Attributes:
        cut: CutMix, otherwise mixup.
        share: of an image, what it keeps.
        x, y: centre of CutMix's box, from 0 to 1.
    """

    cut: bool
    share: float
    x: float
    y: float


class Targets(NamedTuple):
    """Labels ``int64 [N]`` and, of mixed images, those mixed in, and the share of the first, a scalar.

    All of it is tensors: a captured step reads what they hold when it is replayed.
    """

    labels: Tensor
    partners: Tensor | None = None
    share: Tensor | None = None

    @property
    def heavier(self) -> Tensor:
        """The labels with the larger share, which count as right."""
        if self.partners is None or self.share is None:
            return self.labels
        return torch.where(self.share >= 0.5, self.labels, self.partners)


def symmetric_beta(alpha: float, u: float, v: float) -> float:
    """A number of the distribution Beta(alpha, alpha), from two uniform ones in [0, 1).

    Bailey's polar method gives Student's t with ``2 alpha`` degrees of freedom, ``t^2 = 2 alpha w cos(2 pi v)^2`` with
    ``w = u^(-1 / alpha) - 1`` ("Polar generation of random variates with the t-distribution", 1994), and
    ``(1 + t / sqrt(2 alpha + t^2)) / 2`` is Beta(alpha, alpha).
    """
    cosine = math.cos(2 * math.pi * v)
    # 1 / w, which is 0 where w is too large for a float64; 1 - u is never 0.
    power = (1 - u) ** (1 / alpha)
    inverse = power / (1 - power) if power < 1 else math.inf
    return 0.5 + 0.5 * math.copysign(math.sqrt(cosine**2 / (inverse + cosine**2)), cosine)


def draw(seed: int, epoch: int, before: int, *, mixup: float, cutmix: float) -> Draw | None:
    """What is drawn for a step: one share for its images, of Beta(alpha, alpha); None if neither is wanted.

    before: images of the epoch before the step, on all processes.
    mixup, cutmix: the alphas, 0: not at all. With both, half of the steps have one, half the other.
    """
    if mixup == 0 and cutmix == 0:
        return None
    coin, u, v, x, y = draws(seed, epoch, np.array([_STEPS + before], np.uint64), 5)[0].tolist()
    cut = cutmix > 0 and (mixup == 0 or coin < 0.5)
    return Draw(cut, symmetric_beta(cutmix if cut else mixup, u, v), x, y)


def box(drawn: Draw, height: int, width: int) -> tuple[int, int, int, int]:
    """CutMix's box: top, bottom, left and right; of area ``1 - share`` of the image, clipped to it.

    Yun et al. 2019, as torchvision computes it.
    """
    radius = 0.5 * math.sqrt(1 - drawn.share)
    x, y = int(drawn.x * width), int(drawn.y * height)
    dx, dy = int(radius * width), int(radius * height)
    return max(y - dy, 0), min(y + dy, height), max(x - dx, 0), min(x + dx, width)


def mix(images: Tensor, labels: Tensor, drawn: Draw | None) -> tuple[Tensor, Targets]:
    """Mixes neighbours: ``share * images + (1 - share) * images[[1, 0, 3, 2, ...]]``, or a box of the other image.

    mixup: Zhang et al. 2017. images ``[N, C, H, W]``, N even, keep dtype and memory format; labels ``int64 [N]``.
    """
    if drawn is None:
        return images, Targets(labels)
    even, odd = images[0::2], images[1::2]
    share = drawn.share
    if drawn.cut:
        top, bottom, left, right = box(drawn, *images.shape[2:])
        share = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
        mixed = images.clone()
        mixed[0::2, :, top:bottom, left:right] = odd[:, :, top:bottom, left:right]
        mixed[1::2, :, top:bottom, left:right] = even[:, :, top:bottom, left:right]
    else:
        mixed = torch.empty_like(images)
        mixed[0::2] = share * even + (1 - share) * odd
        mixed[1::2] = share * odd + (1 - share) * even
    partners = labels.unflatten(0, (-1, 2)).flip(1).flatten()
    # A slot without an image has no loss, mixed or not.
    return mixed, Targets(
        labels, torch.where(labels == IGNORED, IGNORED, partners), images.new_full((), share, dtype=torch.float32)
    )


def loss(scores: Tensor, targets: Targets, smoothing: float) -> Tensor:
    """The mean cross-entropy of ``scores [N, classes]`` with the mixed labels' probabilities.

    ``F.cross_entropy(scores, p, label_smoothing=smoothing)`` with ``p = share * one_hot(labels) + (1 - share) *
    one_hot(partners)``; slots without an image do not count.
    """
    if targets.partners is None or targets.share is None:
        return F.cross_entropy(scores, targets.labels, ignore_index=IGNORED, label_smoothing=smoothing)
    own, other = (
        F.cross_entropy(scores, labels, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")
        for labels in (targets.labels, targets.partners)
    )
    return (targets.share * own + (1 - targets.share) * other) / (targets.labels != IGNORED).sum()
