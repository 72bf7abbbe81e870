"""Batches of images: from arrays in memory or from folders of files, in an order that can be taken up anywhere."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .archives import Arrays, digits, read_cifar
from .augment import crop_and_flip, draws, random_box
from .options import Options, ProgramError

__all__ = ["Batch", "Batches", "Data", "Files", "Preparation", "Samples", "load", "loader", "open_image", "workers_of"]

IGNORED = -1  # label of a place that holds no image


class Batch(NamedTuple):
    """Images ``uint8 [N, C, H, W]``, labels ``int64 [N]`` (-1: no image), and what was broken, by name and reason."""

    images: Tensor
    labels: Tensor
    broken: list[str]


class Preparation(NamedTuple):
    """What a network's input is made of; kept in checkpoints, so that predictions see what training saw."""

    classes: list[str]
    size: int
    channels: int
    mean: list[float]  # of pixels from 0 to 1
    std: list[float]


class Samples(Dataset):
    """Arrays in memory; with ``seed``, cropped and flipped at random. Keys are ``(epoch, index)``."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, padding: int, flip: bool, seed: int | None) -> None:
        self.images, self.labels, self.padding, self.flip, self.seed = images, labels, padding, flip, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        index = np.array([i for _, i in keys])
        there = index >= 0
        images, labels = self.images[index], np.where(there, self.labels[index], IGNORED)
        if self.seed is not None:
            images = crop_and_flip(images, draws(self.seed, keys[0][0], index, 3), self.padding, self.flip)
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), [])


def open_image(path: Path, channels: int) -> Image.Image:
    """The image in colour, or in grey where ``channels`` is 1; raises OSError or ValueError where it is broken."""
    try:
        with Image.open(path) as image:
            return image.convert("L" if channels == 1 else "RGB")
    # Pillow's decoders raise these, too, on damaged files.
    except (SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error


def centred(image: Image.Image, size: int) -> np.ndarray:
    """The middle square, 7/8 of the shorter side, as ``[C, size, size]``; images of that size stay as they are."""
    if image.size != (size, size):
        side = min(image.size) * 7 / 8
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)


class Files(Dataset):
    """Image files; with ``seed``, random boxes of them, mirrored at random. Keys are ``(epoch, index)``.

    A broken file is named. In training the next one that can be read takes its place, so that batches stay full; when
    testing, its place is ignored.
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
        for place, (epoch, first) in enumerate(keys):
            candidates = range(first, first + len(self)) if self.seed is not None else range(first, first + 1)
            for index in (i % len(self) for i in candidates if first >= 0):
                try:
                    images[place] = self._pixels(epoch, index)
                    labels[place] = self.files[index][1]
                    break
                except (OSError, ValueError) as error:
                    broken.append(f"{self.files[index][0]}: {error}")
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), broken)


class Batches(Sampler):
    """Keys of one process's batches in one epoch.

    All processes shuffle alike (by seed and epoch), take whole batches in turn out of the same order, and drop what
    does not fill a step: N processes see together what one process with N times the batch sees. ``first`` is the number
    of batches that were had already. Without a seed: in order, all of them, padded so that each process has as many.
    """

    def __init__(
        self, length: int, batch: int, rank: int = 0, world: int = 1, *, accumulate: int = 1, seed: int | None = None
    ) -> None:
        self.length, self.batch, self.rank, self.world, self.seed = length, batch, rank, world, seed
        self.accumulate = accumulate
        self.epoch = self.first = 0

    def total(self) -> int:
        """Batches of a process in an epoch."""
        if self.seed is not None:
            return self.length // (self.batch * self.world * self.accumulate) * self.accumulate
        return -(-self.length // (self.batch * self.world))

    def __len__(self) -> int:
        return self.total() - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        together = self.batch * self.world
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        else:
            order = np.full(self.total() * together, IGNORED)
            order[: self.length] = np.arange(self.length)
        for number in range(self.first, self.total()):
            start = number * together + self.rank * self.batch
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch]]


class Data(NamedTuple):
    train: Samples | Files
    test: Samples | Files
    preparation: Preparation


def _statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, exactly, from counts of the 256 values."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(images.shape[1]):
        share = np.bincount(images[:, channel].ravel(), minlength=256) / images[:, channel].size
        mean.append(float(share @ values))
        std.append(float(np.sqrt(share @ (values - mean[-1]) ** 2)) or 1.0)
    return mean, std


def _in_memory(arrays: Arrays, options: Options, padding: int, flip: bool) -> Data:
    images, labels = arrays.train_images, arrays.train_labels
    if options.limit is not None:
        kept = np.random.default_rng(0).permutation(len(labels))[: options.limit]
        images, labels = images[kept], labels[kept]
    mean, std = _statistics(images)
    _, channels, size, _ = images.shape
    return Data(
        Samples(images, labels, padding, flip, options.seed),
        Samples(arrays.test_images, arrays.test_labels, 0, False, None),
        Preparation(arrays.classes, size, channels, mean, std),
    )


_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def _listed(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not files:
        raise ProgramError(f"{folder} holds no images: want {folder}/CLASS/IMAGE ({', '.join(sorted(_SUFFIXES))})")
    return files


def _folder(root: Path, options: Options) -> Data:
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
    # Those of ImageNet, as photographs are alike.
    preparation = Preparation(classes, options.image_size, 3, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return Data(Files(train, options.image_size, options.seed), Files(test, options.image_size, None), preparation)


def load(options: Options) -> Data:
    """What ``--data`` names: digits moved by up to 2 pixels, CIFAR by up to 4 and mirrored, boxes of photographs."""
    if options.data == "mnist5k":
        return _in_memory(digits(), options, padding=2, flip=False)
    path = Path(options.data)
    if path.is_dir():
        return _folder(path, options)
    if path.is_file():
        return _in_memory(read_cifar(path, options.checksum), options, padding=4, flip=True)
    raise ProgramError(f"--data is {options.data}: no such file or folder; want mnist5k, a CIFAR archive or a folder")


def _as_it_is(batch: Batch) -> Batch:
    return batch


GRACE = 60  # seconds


def _outlive_signals(worker: int) -> None:
    """Ctrl-C and many schedulers signal every process; the main one decides, and its end is the workers' end, too.

    It may want batches until the end of a step. A worker that is still there a minute later was left behind.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def loader(dataset: Samples | Files, batches: Batches, workers: int, pin: bool) -> DataLoader:
    # A worker loads whole batches, one NumPy call for all images: collating single images would cost more than that.
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        pin_memory=pin,
        worker_init_fn=_outlive_signals,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # the global one belongs to the network: iterating must not move it
    )


@contextlib.contextmanager
def workers_of(*loaders: DataLoader) -> Iterator[None]:
    """Ends the loading workers with the block. The interpreter's end would wait for them: they outlive its signal."""
    try:
        yield
    finally:
        for loaded in loaders:
            if loaded.num_workers > 0 and loaded._iterator is not None:
                loaded._iterator._shutdown_workers()  # type: ignore[attr-defined]
