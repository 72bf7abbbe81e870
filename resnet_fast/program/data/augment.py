"""Random crops and flips whose random numbers depend on seed, epoch and image alone.

They do not depend on the worker, the batch or the process: a resumed run and any number of workers or processes see the
same augmented images. The kernels of :func:`resnet_fast.ops.augment.augment` compute them bit for bit.
"""

from __future__ import annotations

import numpy as np

__all__ = ["crop_and_flip", "draws", "random_box", "stream"]

_STEP = 0x9E3779B97F4A7C15


def _mix(z: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def stream(seed: int, epoch: int) -> int:
    """The 64-bit state of seed and epoch, as a signed integer; an image's numbers follow from it and the index."""
    state = np.array([seed], dtype=np.uint64)
    for part in (epoch, 0):
        state = _mix(state + np.uint64(_STEP)) + np.uint64(part)
    return int(state.view(np.int64)[0])


def draws(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Uniform random numbers in [0, 1), ``[len(indices), count]``, a function of seed, epoch and index."""
    state = _mix(np.int64(stream(seed, epoch)).view(np.uint64) + indices.astype(np.uint64))
    numbers = _mix(state[:, None] + np.uint64(_STEP) * np.arange(1, count + 1, dtype=np.uint64))
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def crop_and_flip(images: np.ndarray, dice: np.ndarray, padding: int, flip: bool) -> np.ndarray:
    """Shifts each of ``[N, C, H, W]`` by up to ``padding`` pixels, filling with zeros, and mirrors half of them.

    He et al. 2015, section 4.2, with 4 pixels. dice: uniform numbers, ``[N, 3]``.
    """
    n, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    shifts = 2 * padding + 1
    cropped = windows[np.arange(n), :, (dice[:, 0] * shifts).astype(int), (dice[:, 1] * shifts).astype(int)]
    if flip:
        mirrored = dice[:, 2] < 0.5
        cropped[mirrored] = cropped[mirrored][..., ::-1]
    return cropped


def random_box(width: int, height: int, dice: np.ndarray) -> tuple[float, float, float, float]:
    """A box of 8% to 100% of the area, of aspect ratio 3:4 to 4:3 (Szegedy et al. 2014), clipped to the image.

    dice: four uniform numbers. Returns left, top, right and bottom.
    """
    area = width * height * (0.08 + 0.92 * dice[0])
    ratio = (3 / 4) * (16 / 9) ** dice[1]
    w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    left, top = dice[2] * (width - w), dice[3] * (height - h)
    return left, top, left + w, top + h
