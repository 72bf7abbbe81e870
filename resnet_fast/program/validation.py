"""A validation split: training images kept back to choose the best checkpoint by, so that the test set is used once."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
from torch.distributed.checkpoint import state_dict as whole

from . import checkpoints
from .data import Data, Files, Images, Samples
from .data.shards import Shards
from .options import ProgramError
from .reports.history import best_step

if TYPE_CHECKING:
    from .loop import Trainer

__all__ = ["drawn_by_class", "split", "take_best"]


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


def _part(images: Images, indices: np.ndarray) -> Samples | Files | Shards:
    part = copy.copy(images)
    if isinstance(part, Samples):
        part.images = part.images[indices]
    elif isinstance(part, Files):
        part.files = [part.files[i] for i in indices]
    elif isinstance(part, Shards):
        part.index = part.index[indices]
    else:
        raise TypeError(f"no part of {type(images).__name__}")
    part.labels = part.labels[indices]
    return part


def split(data: Data, share: float) -> tuple[Data, Images]:
    """The data with ``share`` of each class's training images left out, and these, without augmentation.

    Raises:
        ProgramError: no image would be kept back.
    """
    kept = drawn_by_class(data.train.labels, share)
    if not kept.any():
        raise ProgramError(f"--validation is {share}: of {len(kept)} images, not one in any class; want more")
    validation = _part(data.train, np.flatnonzero(kept))
    validation.seed = None
    return data._replace(train=_part(data.train, np.flatnonzero(~kept))), validation


def take_best(trainer: Trainer) -> str:
    """Takes the weights of best.pt, chosen on validation images; returns which they are."""
    path = trainer.folder / "best.pt"
    if not trainer.processes.everyone(path.exists())[0]:
        return "; the weights of the last epoch, as there is no best.pt"
    state = checkpoints.load(path)
    if state["step"] != best_step(trainer.history):  # of a way that a stop has cut off
        return f"; the weights of the last epoch, as {path} is of step {state['step']}, not of the best epoch"
    try:
        if trainer.ema is not None:
            trainer.ema.load_state_dict(state["ema"])
        else:
            everything = whole.StateDictOptions(full_state_dict=True)
            whole.set_model_state_dict(trainer.network, state["model"], options=everything)
    except checkpoints.MISFITS as error:
        raise checkpoints.misfit(path, error) from error
    return f"; the weights of epoch {state['epoch']}, the best on validation images"
