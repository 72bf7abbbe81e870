"""Random crops and flips whose dice depend on seed, epoch and image alone.

Not on the worker that loads an image, nor on the batch or the process that it falls into: a resumed run, another number
of workers and another number of processes see the same pictures.
"""

from __future__ import annotations

import numpy as np

__all__ = ["crop_and_flip", "draws", "random_box"]


def _mix(z: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draws(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1), ``[len(indices), count]``: the same for the same seed, epoch and index."""
    step = np.uint64(0x9E3779B97F4A7C15)
    state = np.full(len(indices), seed, dtype=np.uint64)
    for part in (np.full(len(indices), epoch, dtype=np.uint64), indices.astype(np.uint64)):
        state = _mix(state + step) + part
    numbers = _mix(_mix(state)[:, None] + step * np.arange(1, count + 1, dtype=np.uint64))
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def crop_and_flip(images: np.ndarray, dice: np.ndarray, padding: int, flip: bool) -> np.ndarray:
    """Each of ``[N, C, H, W]`` moved by up to ``padding`` pixels, zeros coming in, and mirrored half of the time.

    He et al. 2015, section 4.2, with 4 pixels; ``dice`` is ``[N, 3]``.
    """
    n, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    places = 2 * padding + 1
    moved = windows[np.arange(n), :, (dice[:, 0] * places).astype(int), (dice[:, 1] * places).astype(int)]
    if flip:
        mirrored = dice[:, 2] < 0.5
        moved[mirrored] = moved[mirrored][..., ::-1]
    return moved


def random_box(width: int, height: int, dice: np.ndarray) -> tuple[float, float, float, float]:
    """A box of 8% to 100% of the area with sides from 3:4 to 4:3 (Szegedy et al. 2014), cut to the image; 4 dice."""
    area = width * height * (0.08 + 0.92 * dice[0])
    ratio = (3 / 4) * (16 / 9) ** dice[1]
    w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    left, top = dice[2] * (width - w), dice[3] * (height - h)
    return left, top, left + w, top + h
