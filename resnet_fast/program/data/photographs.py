"""Images that are decoded batch by batch, wherever they are stored."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..options import ProgramError
from .augment import draws, random_box
from .batches import IGNORED, Batch, Data, Preparation
from .images import centred

__all__ = ["SUFFIXES", "Photographs", "abridged", "check_readable", "class_warnings", "data_of"]

SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Of ImageNet: they serve for all photographs.
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Photographs(Dataset):
    """Images by index, of which subclasses know ``name`` and ``open``; with ``seed``, random boxes, randomly mirrored.

    Broken images are reported. In training the next readable image replaces one, so that batches stay full; in testing
    its slot is ignored. Keys are ``(epoch, index)``.
    """

    def __init__(self, labels: np.ndarray, size: int, seed: int | None) -> None:
        self.labels, self.size, self.seed = labels, size, seed

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """For messages."""
        raise NotImplementedError(f"{type(self).__name__}.name")

    def open(self, index: int) -> Image.Image:
        """The image, in colour; raises OSError or ValueError if it is broken."""
        raise NotImplementedError(f"{type(self).__name__}.open")

    def _pixels(self, epoch: int, index: int) -> np.ndarray:
        image = self.open(index)
        if self.seed is None:
            return centred(image, self.size)
        dice = draws(self.seed, epoch, np.array([index]), 5)[0]
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, random_box(*image.size, dice))
        pixels = np.asarray(image).transpose(2, 0, 1)
        return pixels[..., ::-1] if dice[4] < 0.5 else pixels

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        images = np.zeros((len(keys), 3, self.size, self.size), np.uint8)
        labels = np.full(len(keys), IGNORED, np.int64)
        broken: list[str] = []
        for slot, (epoch, first) in enumerate(keys):
            candidates = range(first, first + len(self)) if self.seed is not None else range(first, first + 1)
            for index in (i % len(self) for i in candidates if first >= 0):
                try:
                    images[slot] = self._pixels(epoch, index)
                    labels[slot] = self.labels[index]
                    break
                except (OSError, ValueError) as error:
                    broken.append(f"{self.name(index)}: {error}")
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), broken)


def check_readable(images: Photographs, what: str) -> None:
    """Raises ProgramError if none of the images can be read: before the first epoch, not after it."""
    reason = "there are none"
    for index in range(len(images)):
        try:
            images.open(index)
            return
        except (OSError, ValueError) as error:
            reason = f"the last, {images.name(index)}: {error}"
    raise ProgramError(f"no {what} image can be read ({reason})")


def abridged(what: str, lines: list[str]) -> list[str]:
    """``lines`` as one warning: how many, and the first ten."""
    if not lines:
        return []
    shown = [*lines[:10], *(["..."] if len(lines) > 10 else [])]
    return [f"{what}: {len(lines)} ({'; '.join(shown)})"]


def class_warnings(classes: list[str], labels: dict[str, np.ndarray]) -> list[str]:
    """Of empty classes in each part, and of a class that is the only one."""
    found = []
    for part, numbers in labels.items():
        there = np.bincount(numbers, minlength=len(classes)) > 0
        found += abridged(f"classes without {part} images", [classes[i] for i in np.flatnonzero(~there)])
    if len(classes) == 1:
        found.append(f"there is one class only, {classes[0]}: every answer will be right")
    return found


def data_of(train: Photographs, test: Photographs, classes: list[str], warnings: list[str]) -> Data:
    """Both parts as data, with warnings of classes.

    Raises:
        ProgramError: a part has no readable image.
    """
    check_readable(train, "training")
    check_readable(test, "test")
    more = class_warnings(classes, {"training": train.labels, "test": test.labels})
    return Data(train, test, Preparation(classes, train.size, 3, _MEAN, _STD), [*warnings, *more])
