"""Where a run goes on: which checkpoint, and how its state becomes that of the trainer, also with other processes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import state_dict as whole

from . import checkpoints, sharded
from .options import Options, ProgramError
from .reports.history import accuracy

if TYPE_CHECKING:
    from .loop import Trainer

__all__ = ["choose", "finished", "restore"]

_WHOLE = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
# Which options together make the images of a step.
_OF_A_STEP = ("batch", "accumulate", "processes")
_JOB = ".job"


def choose(options: Options, restarts: int) -> Path | None:
    """The checkpoint to go on from, or None to start; call it where ``--out`` is locked.

    A job that torchrun restarts goes on from its newest checkpoint without ``--resume``. ``.job`` tells that the
    checkpoints are its own: it is there from the first attempt that was let in until the run ends, and holds the job's
    id and ``--resume``.
    """
    out = Path(options.out)
    last = checkpoints.newest(out)
    own, job = out / _JOB, os.environ.get("TORCHELASTIC_RUN_ID", "")
    # torchrun does not count a restart because agents joined or left; "none" is the id of all jobs without one.
    me = f"{job}\n{options.resume}"
    was = own.read_text() if own.is_file() else ""
    again = was.split("\n")[0] == job if restarts > 0 else was == me and job not in ("", "none")
    if again and was and last is not None:
        return last
    own.unlink(missing_ok=True)  # if this start is refused, so are its restarts
    start = _chosen(options, last)
    if job:
        checkpoints.with_reason(own, lambda: checkpoints.write(own, me.encode()))
    return start


def _chosen(options: Options, last: Path | None) -> Path | None:
    if options.resume is None and last is not None:
        raise ProgramError(f"--out {options.out} holds {last.name} of an earlier run: want --resume, or another")
    if options.resume == "" and last is None:
        raise ProgramError(f"--resume finds no checkpoint in --out {options.out}: want --resume auto to start then")
    return Path(options.resume) if options.resume not in (None, "", "auto") else last


def finished(options: Options) -> None:
    """The job is done: what torchrun starts next is another."""
    (Path(options.out) / _JOB).unlink(missing_ok=True)


def restore(trainer: Trainer, path: Path) -> None:
    """Sets the trainer's state to that of checkpoint ``path``.

    With ``--allow-world-change`` and other images a step, the rest of the epoch are those of the shuffled order that no
    process has trained on, and the learning rate is that of the same share of the images.

    Raises:
        ProgramError: the checkpoint cannot be loaded, or was written by a run with other settings.
    """
    parts = path.is_dir()
    state = checkpoints.load(path / sharded.REST if parts else path, sharded=parts)
    try:
        _check(trainer, path, state)
        _set(trainer, path, state, parts)
    except checkpoints.MISFITS as error:
        raise checkpoints.misfit(path, error) from error


def _check(trainer: Trainer, path: Path, state: dict[str, Any]) -> None:
    """Raises ProgramError where the state is of a run with other settings, or ``--out`` of another run."""
    mine, was = trainer.identity(), state["options"]
    change = _OF_A_STEP if trainer.options.allow_world_change else ()
    was = {**Options("").result(), **was}  # files of before an option have it as it was: off
    unlike = {name: value for name, value in was.items() if name not in change and mine.get(name) != value}
    if unlike:
        listed = ", ".join(f"{name} {value} (now {mine.get(name)})" for name, value in unlike.items())
        hint = " or --allow-world-change" if set(unlike) <= set(_OF_A_STEP) else ""
        raise ProgramError(f"{path} was trained with {listed}: want the same{hint} to go on")
    if state["preparation"] != trainer.data.preparation._asdict():
        raise ProgramError(f"{path} was trained on other images than --data {trainer.options.data}")
    _alone(trainer.options, path, state["step"])


def _alone(options: Options, path: Path, step: int) -> None:
    """Raises ProgramError if ``--out`` holds what a run from ``path`` on would be mixed up with."""
    out = Path(options.out)
    last = checkpoints.newest(out)
    if last is None or (path.parent.resolve() == out.resolve() and checkpoints.step_of(last) <= step):
        return
    raise ProgramError(
        f"--out {out} holds {last.name}, which is not of the way to --resume {path}: want it removed, or another --out"
    )


def _set(trainer: Trainer, path: Path, state: dict[str, Any], parts: bool) -> None:
    processes = trainer.processes
    trainer.step, trainer.epoch, trainer.done = state["step"], state["epoch"], state["done"]
    trainer.consumed = state.get("consumed", 0)
    before, now = _images_of_a_step(state["options"]), _images_of_a_step(trainer.identity())
    if before != now:
        trainer.consumed, trainer.done = trainer.consumed + trainer.done * before, 0
        _advance(trainer, trainer.epoch * trainer.steps + trainer.consumed // now)
        rates = trainer.schedule.get_last_lr()
    if parts:
        sharded.load(path, state, trainer.network, trainer.optimizer, processes)
    else:
        options = whole.StateDictOptions(full_state_dict=True)
        whole.set_model_state_dict(trainer.network, state["model"], options=options)
        whole.set_optimizer_state_dict(trainer.network, trainer.optimizer, state["optimizer"], options=_WHOLE)
    if before != now:
        for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    else:
        trainer.schedule.load_state_dict(state["schedule"])
    if trainer.ema is not None:
        trainer.ema.load_state_dict(state["ema"])
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.lr, trainer.history = state["lr"], state["history"]
    trainer.best = max(map(accuracy, trainer.history), default=-1.0)
    if len(state["sums"]) == processes.world:
        trainer.sums.copy_(state["sums"][processes.rank])
    elif processes.rank == 0:
        trainer.sums.copy_(torch.stack(state["sums"]).sum(0))
    if processes.rank < len(state["rng"]):  # a process that was not there keeps its own
        rng = state["rng"][processes.rank]
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and processes.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], processes.device)


def _images_of_a_step(options: dict[str, Any]) -> int:
    return options["batch"] * options["accumulate"] * options["processes"]


def _advance(trainer: Trainer, steps: int) -> None:
    """Moves the schedule on by ``steps`` of now."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        for _ in range(steps):
            trainer.schedule.step()
