"""A validation split: training images kept back to choose the best checkpoint by, so that the test set is used once."""

from __future__ import annotations

import copy

import numpy as np

from .data import Data, Files, Images, Samples
from .options import ProgramError

__all__ = ["drawn_by_class", "split"]


def drawn_by_class(labels: np.ndarray, share: float) -> np.ndarray:
    """Whether each of ``labels [N]`` is kept back: ``share`` of each class, rounded, but never a whole class.

    The same for every ``--seed``, so that runs can be compared.
    """
    kept = np.zeros(len(labels), bool)
    dice = np.random.default_rng(0)
    for label in np.unique(labels):
        members = dice.permutation(np.flatnonzero(labels == label))
        kept[members[: min(round(share * len(members)), len(members) - 1)]] = True
    return kept


def _labels(images: Images) -> np.ndarray:
    if isinstance(images, Samples):
        return np.asarray(images.labels)
    if isinstance(images, Files):
        return np.array([label for _, label in images.files])
    raise ProgramError("--validation draws from images whose classes are known before they are read: not from shards")


def _part(images: Images, indices: np.ndarray) -> Samples | Files:
    part = copy.copy(images)
    if isinstance(part, Samples):
        part.images, part.labels = part.images[indices], part.labels[indices]
    elif isinstance(part, Files):
        part.files = [part.files[i] for i in indices]
    return part  # type: ignore[return-value]


def split(data: Data, share: float) -> tuple[Data, Images]:
    """The data with ``share`` of each class's training images left out, and these, without augmentation.

    Raises:
        ProgramError: no image would be kept back.
    """
    kept = drawn_by_class(_labels(data.train), share)
    if not kept.any():
        raise ProgramError(f"--validation is {share}: of {len(kept)} images, not one in any class; want more")
    validation = _part(data.train, np.flatnonzero(kept))
    validation.seed = None
    return data._replace(train=_part(data.train, np.flatnonzero(~kept))), validation
