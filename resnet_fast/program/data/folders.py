"""Data sets of image files in folders: ``train/CLASS/IMAGE`` and ``test/CLASS/IMAGE``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from ..options import Options, ProgramError
from .batches import Data
from .images import check_regular, open_image
from .photographs import SUFFIXES, Photographs, abridged, data_of

__all__ = ["Files", "folder", "list_images"]


class Files(Photographs):
    """Image files with their labels."""

    def __init__(self, files: list[tuple[Path, int]], size: int, seed: int | None) -> None:
        super().__init__(np.array([label for _, label in files], np.int64), size, seed)
        self.files = files

    def name(self, index: int) -> str:
        return str(self.files[index][0])

    def open(self, index: int) -> Image.Image:
        return open_image(self.files[index][0], 3)


_Identity = tuple[int, int]  # device and inode


def _identity(folder: Path) -> _Identity:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _scan(folder: Path, above: set[_Identity], skipped: list[str]) -> tuple[list[Path], list[Path]]:
    """Folders and image files in ``folder``, without hidden folders, folders of ``above`` and what is no file."""
    folders, images = [], []
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        skipped.append(f"{folder}: {error.strerror}")
        return [], []
    for entry in entries:
        path = Path(entry.path)
        try:
            if entry.is_dir():
                if entry.name.startswith("."):
                    skipped.append(f"{path}: hidden")
                elif _identity(path) in above:
                    skipped.append(f"{path}: leads back to a folder that it lies in")
                else:
                    folders.append(path)
            elif path.suffix.lower() in SUFFIXES:
                if not entry.is_file():
                    check_regular(path)
                images.append(path)
        except OSError as error:
            skipped.append(f"{path}: {error.strerror or error}")
    return folders, images


def _images_below(folder: Path, above: set[_Identity], skipped: list[str]) -> list[Path]:
    above = above | {_identity(folder)}
    folders, images = _scan(folder, above, skipped)
    return images + [image for inner in folders for image in _images_below(inner, above, skipped)]


def list_images(root: Path) -> tuple[list[str], dict[str, list[tuple[Path, int]]], list[str]]:
    """Classes, image files with labels of ``train`` and ``test``, and warnings.

    Raises:
        ProgramError: a part is missing or without images, or the parts have different classes.
    """
    names: dict[str, list[str]] = {}
    skipped: list[str] = []
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise ProgramError(
                f"{root} has no folder {part!r}: want {root}/train/CLASS/IMAGE and {root}/test/CLASS/IMAGE"
            )
        folders, strays = _scan(root / part, {_identity(root), _identity(root / part)}, skipped)
        names[part] = sorted(path.name for path in folders)
        skipped += [f"{path}: in no class" for path in strays]
    strangers = sorted(set(names["test"]) - set(names["train"]))
    if strangers:
        raise ProgramError(f"{root}/test has classes that {root}/train lacks: {', '.join(strangers)}")
    files = {}
    label = {name: number for number, name in enumerate(names["train"])}
    for part, there in names.items():
        above = {_identity(root), _identity(root / part)}
        files[part] = [
            (path, label[name]) for name in there for path in sorted(_images_below(root / part / name, above, skipped))
        ]
        if not files[part]:
            raise ProgramError(
                f"{root / part} holds no images: want {root / part}/CLASS/IMAGE ({', '.join(sorted(SUFFIXES))})"
            )
    return names["train"], files, abridged(f"skipped in {root}", skipped)


def folder(root: Path, options: Options) -> Data:
    """The data in ``root``; classes are the folders in ``root/train``."""
    classes, files, warnings = list_images(root)
    train = files["train"]
    if options.limit is not None:
        train = [train[i] for i in np.random.default_rng(0).permutation(len(train))[: options.limit]]
    size = options.image_size
    return data_of(Files(train, size, options.seed), Files(files["test"], size, None), classes, warnings)
