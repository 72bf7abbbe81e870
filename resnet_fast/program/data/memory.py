"""Data sets that lie in memory: digits and CIFAR."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from ..options import Options
from .archives import Arrays
from .augment import crop_and_flip, draws
from .batches import IGNORED, Batch, Data, Preparation

__all__ = ["Samples", "in_memory"]


class Samples(Dataset):
    """Images in memory; with ``seed``, randomly cropped and flipped. Keys are ``(epoch, index)``."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, padding: int, flip: bool, seed: int | None) -> None:
        self.images, self.labels, self.padding, self.flip, self.seed = images, labels, padding, flip, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        index = np.array([i for _, i in keys])
        there = index >= 0
        images, labels = self.images[index], np.where(there, self.labels[index], IGNORED)
        images[~there] = 0
        if self.seed is not None:
            images = crop_and_flip(images, draws(self.seed, keys[0][0], index, 3), self.padding, self.flip)
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), [])


def _statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, exact, from a histogram of the 256 values."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(images.shape[1]):
        share = np.bincount(images[:, channel].ravel(), minlength=256) / images[:, channel].size
        mean.append(float(share @ values))
        std.append(float(np.sqrt(share @ (values - mean[-1]) ** 2)) or 1.0)
    return mean, std


def in_memory(arrays: Arrays, options: Options, padding: int, flip: bool) -> Data:
    """The arrays as data; training images are shifted by up to ``padding`` pixels, and with ``flip`` mirrored."""
    images, labels = arrays.train_images, arrays.train_labels
    if options.limit is not None:
        subset = np.random.default_rng(0).permutation(len(labels))[: options.limit]
        images, labels = images[subset], labels[subset]
    mean, std = _statistics(images)
    _, channels, size, _ = images.shape
    return Data(
        Samples(images, labels, padding, flip, options.seed),
        Samples(arrays.test_images, arrays.test_labels, 0, False, None),
        Preparation(arrays.classes, size, channels, mean, std),
    )
