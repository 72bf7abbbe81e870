"""Batches of images from arrays in memory or from folders of files, in an order that a resumed run can continue."""

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
from .workers import Loader

__all__ = ["Batch", "Batches", "Data", "Files", "Preparation", "Samples", "load", "loader", "open_image", "workers_of"]

IGNORED = -1  # label of a slot without an image


class Batch(NamedTuple):
    """Images ``uint8 [N, C, H, W]``, labels ``int64 [N]`` (-1: no image), and broken files with the reasons."""

    images: Tensor
    labels: Tensor
    broken: list[str]


class Preparation(NamedTuple):
    """How images become a network's input; saved in checkpoints, so that prediction prepares them as training did."""

    classes: list[str]
    size: int
    channels: int
    mean: list[float]  # of pixels from 0 to 1
    std: list[float]


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
        if self.seed is not None:
            images = crop_and_flip(images, draws(self.seed, keys[0][0], index, 3), self.padding, self.flip)
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), [])


def open_image(path: Path, channels: int) -> Image.Image:
    """The image in colour, or in grey if ``channels`` is 1; raises OSError or ValueError if it is broken."""
    try:
        with Image.open(path) as image:
            return image.convert("L" if channels == 1 else "RGB")
    # Pillow's decoders raise these for damaged files, too.
    except (SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error


def centred(image: Image.Image, size: int) -> np.ndarray:
    """The centre crop, 7/8 of the shorter side, resized to ``[C, size, size]``; images of that size are unchanged."""
    if image.size != (size, size):
        side = min(image.size) * 7 / 8
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)


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


class Batches(Sampler):
    """Keys of one process's batches in one epoch.

    With a seed, all processes shuffle alike (by seed and epoch), take batches of the same order in turn, and drop what
    does not fill a step: N processes together see what one process with N times the batch sees. Without a seed, all
    samples come in order, padded so that each process has as many batches. ``first``: batches to skip when resuming.
    ``consumed``: samples of the shuffled order that another number of processes has trained on; batches begin behind.
    """

    def __init__(
        self, length: int, batch: int, rank: int = 0, world: int = 1, *, accumulate: int = 1, seed: int | None = None
    ) -> None:
        self.length, self.batch, self.rank, self.world, self.seed = length, batch, rank, world, seed
        self.accumulate = accumulate
        self.epoch = self.first = self.consumed = 0

    def total(self) -> int:
        """Batches of one process in an epoch."""
        if self.seed is not None:
            return (self.length - self.consumed) // (self.batch * self.world * self.accumulate) * self.accumulate
        return -(-self.length // (self.batch * self.world))

    def __len__(self) -> int:
        return self.total() - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        together = self.batch * self.world
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)[self.consumed :]
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
    """Mean and standard deviation of each channel, exact, from a histogram of the 256 values."""
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
        subset = np.random.default_rng(0).permutation(len(labels))[: options.limit]
        images, labels = images[subset], labels[subset]
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
    # Mean and deviation of ImageNet serve for all photographs.
    preparation = Preparation(classes, options.image_size, 3, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return Data(Files(train, options.image_size, options.seed), Files(test, options.image_size, None), preparation)


def load(options: Options) -> Data:
    """The data that ``--data`` names: digits shifted by up to 2 pixels, CIFAR by up to 4 and mirrored, photographs."""
    if options.data == "mnist5k":
        return _in_memory(digits(), options, padding=2, flip=False)
    path = Path(options.data)
    if path.is_dir():
        return _folder(path, options)
    if path.is_file():
        return _in_memory(read_cifar(path, options.checksum), options, padding=4, flip=True)
    raise ProgramError(f"--data is {options.data}: no such file or folder; want mnist5k, a CIFAR archive or a folder")


def _identity(batch: Batch) -> Batch:
    return batch


GRACE = 60  # seconds


def _outlive_signals(worker: int) -> None:
    """Makes a worker ignore SIGINT, and SIGTERM and SIGHUP for a minute: the main process decides when loading ends.

    Ctrl-C and many schedulers signal every process, but the main one needs batches until the end of the step. A worker
    alive a minute later was left behind.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.alarm(GRACE))


def loader(dataset: Samples | Files, batches: Batches, workers: int, pin: bool) -> DataLoader:
    # A worker loads a whole batch in one NumPy call; collating single images would cost more than loading them.
    return Loader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_identity,  # type: ignore[arg-type]
        pin_memory=pin,
        worker_init_fn=_outlive_signals,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # iterating must not advance the global generator, which is the network's
    )


@contextlib.contextmanager
def workers_of(*loaders: DataLoader) -> Iterator[None]:
    """Context manager: shuts the loaders' workers down at the end; the interpreter would wait for them at exit."""
    try:
        yield
    finally:
        for loaded in loaders:
            if loaded.num_workers > 0 and loaded._iterator is not None:
                loaded._iterator._shutdown_workers()  # type: ignore[attr-defined]
