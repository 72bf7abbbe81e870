"""Data sets of image files in folders: ``train/CLASS/IMAGE`` and ``test/CLASS/IMAGE``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..options import Options, ProgramError
from .augment import draws, random_box
from .batches import IGNORED, Batch, Data, Preparation
from .images import centred, open_image

__all__ = ["Files", "folder"]


class Files(Dataset):
    """Image files; with ``seed``, random boxes of them, randomly mirrored. Keys are ``(epoch, index)``.

    Broken files are reported. In training the next readable file replaces one, so that batches stay full; in testing
    its slot is ignored.
    """

    def __init__(self, files: list[tuple[Path, int]], size: int, seed: int | None) -> None:
        self.files, self.size, self.seed = files, size, seed

    def __len__(self) -> int:
        return len(self.files)

    def _pixels(self, epoch: int, index: int) -> np.ndarray:
        image = open_image(self.files[index][0], 3)
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
                    labels[slot] = self.files[index][1]
                    break
                except (OSError, ValueError) as error:
                    broken.append(f"{self.files[index][0]}: {error}")
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), broken)


_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def _listed(place: Path, classes: list[str]) -> list[tuple[Path, int]]:
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((place / name).rglob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not files:
        raise ProgramError(f"{place} holds no images: want {place}/CLASS/IMAGE ({', '.join(sorted(_SUFFIXES))})")
    return files


def folder(root: Path, options: Options) -> Data:
    """The data in ``root``; classes are the folders in ``root/train``."""
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise ProgramError(
                f"{root} has no folder {part!r}: want {root}/train/CLASS/IMAGE and {root}/test/CLASS/IMAGE"
            )
    classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    strangers = sorted(path.name for path in (root / "test").iterdir() if path.is_dir() and path.name not in classes)
    if strangers:
        raise ProgramError(f"{root}/test has classes that {root}/train lacks: {', '.join(strangers)}")
    train, test = _listed(root / "train", classes), _listed(root / "test", classes)
    if options.limit is not None:
        train = [train[i] for i in np.random.default_rng(0).permutation(len(train))[: options.limit]]
    # Mean and deviation of ImageNet serve for all photographs.
    preparation = Preparation(classes, options.image_size, 3, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return Data(Files(train, options.image_size, options.seed), Files(test, options.image_size, None), preparation)
