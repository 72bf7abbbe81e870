"""Training recipes: optimizer and learning-rate schedule of two published ones."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, LinearLR, LRScheduler, MultiStepLR, OneCycleLR

from .options import Options, ProgramError

__all__ = ["Recipe", "of", "optimizer", "quiet_skipped_step", "schedule"]


class Recipe(NamedTuple):
    epochs: int
    lr: float
    weight_decay: float
    nesterov: bool


_RECIPES = {
    # He et al. 2015, section 4.2: 64,000 steps of 128 images, which are 164 epochs of CIFAR's 50,000.
    "he": Recipe(164, 0.1, 1e-4, False),
    # One cycle (Smith, Topin 2017) with cosine slopes, for a short budget.
    "onecycle": Recipe(10, 0.2, 5e-4, True),
}


def of(options: Options) -> Recipe:
    """The recipe that ``options`` name, with their overrides."""
    recipe = _RECIPES[options.recipe]
    return Recipe(
        recipe.epochs if options.epochs is None else options.epochs,
        recipe.lr if options.lr is None else options.lr,
        recipe.weight_decay if options.weight_decay is None else options.weight_decay,
        recipe.nesterov,
    )


def optimizer(network: nn.Module, recipe: Recipe) -> SGD:
    return SGD(
        network.parameters(), recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
    )


def schedule(optimizer: SGD, options: Options, steps: int) -> LRScheduler:
    """The learning-rate schedule for ``steps`` steps.

    ``he``: divided by 10 at 1/2 and 3/4 of the steps (32,000 and 48,000 of 64,000); with 110 layers, a tenth for the
    first 400 steps. ``onecycle``: a cosine up for a quarter of the steps, then a cosine down to zero. ``--warmup`` sets
    for how long the rate rises: in ``he`` as k/W of it in the k-th of W steps (Goyal et al. 2017).

    Raises:
        ProgramError: the rate would rise to the end.
    """
    epochs = of(options).epochs
    rise = None if options.warmup is None else round(options.warmup * steps / epochs)
    if options.warmup is not None and options.warmup >= epochs:
        raise ProgramError(f"--warmup is {options.warmup}, want less than the {epochs} epochs")
    if options.recipe == "onecycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        # With fewer than five steps OneCycleLR's ascent has length zero, by which it divides.
        total = max(steps + 1, 5)
        share = 0.25 if rise is None else max(rise, 2) / total  # an ascent of one step has length zero, too
        return OneCycleLR(optimizer, rates, total_steps=total, pct_start=share, cycle_momentum=False)
    falls = MultiStepLR(optimizer, [steps // 2, steps * 3 // 4], gamma=0.1)
    if rise is not None:
        if rise < 2:
            return falls
        return ChainedScheduler([LinearLR(optimizer, 1 / rise, total_iters=rise - 1), falls])
    if options.model == "cifar_resnet110":
        return ChainedScheduler([ConstantLR(optimizer, factor=0.1, total_iters=400), falls])
    return falls


@contextlib.contextmanager
def quiet_skipped_step(skipped: bool) -> Iterator[None]:
    """Silences PyTorch's warning where the scaler skipped the optimizer's step: the schedule advances all the same."""
    with warnings.catch_warnings():
        if skipped:
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        yield
