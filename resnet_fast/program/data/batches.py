"""Batches, their order in an epoch, which a resumed run can continue, and what every kind of data consists of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["IGNORED", "Batch", "Batches", "Data", "Images", "Preparation"]

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


class Images(Protocol):
    """A data set. Keys are ``(epoch, index)``; index -1 asks for no image."""

    labels: np.ndarray

    def __len__(self) -> int: ...

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch: ...


class Data(NamedTuple):
    """Images to train with and to test on, and how a network takes them."""

    train: Images
    test: Images
    preparation: Preparation
    warnings: Sequence[str] = ()


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

    def indices(self) -> np.ndarray:
        """Indices of the images of each batch that remains, ``int64 [batches, batch]``; -1 for an empty slot."""
        together = self.batch * self.world
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)[self.consumed :]
        else:
            order = np.full(self.total() * together, IGNORED)
            order[: self.length] = np.arange(self.length)
        return order[: self.total() * together].reshape(-1, self.world, self.batch)[self.first :, self.rank]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.indices():
            yield [(self.epoch, index) for index in batch.tolist()]
