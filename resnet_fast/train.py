"""``python -m resnet_fast.train``, ``torchrun -m resnet_fast.train``: trains a network; ``--help`` lists the options.

Exit status: 0 trained to the end, 1 an internal error, 2 an error that the user can fix (options, data, disk), 128 + N
stopped by signal N with everything saved.
"""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path

import torch

from . import backends

try:
    from .program import checkpoints, data, distributed, loop, options, report
except ModuleNotFoundError as error:
    sys.exit(f"resnet_fast.train needs {error.name}: pip install resnet_fast[train]")


def _start_from(given: options.Options) -> Path | None:
    """The checkpoint to resume from, or None."""
    if given.resume is None:
        found = checkpoints.newest(Path(given.out))
        if found is not None:
            raise options.ProgramError(
                f"--out {given.out} holds {found.name} of an earlier run: want --resume, or another"
            )
        return None
    path = Path(given.resume) if given.resume else checkpoints.newest(Path(given.out))
    if path is None:
        raise options.ProgramError(f"--resume finds no checkpoint in --out {given.out}")
    return path


def _train(given: options.Options, processes: distributed.Processes) -> int:
    def say(text: str) -> None:
        if processes.rank == 0:
            report.say(text)

    start = _start_from(given)
    if processes.rank == 0:
        report.writable(Path(given.out))
    loaded = data.load(given)
    for warning in loaded.warnings:
        say(f"warning: {warning}")
    trainer = loop.Trainer(given, loaded, processes)
    if start is not None:
        trainer.restore(start)
        say(f"goes on from {start}: epoch {trainer.epoch + 1}, step {trainer.done + 1}")
    received = trainer.run()
    if received:
        name = signal.Signals(received).name
        say(f"stopped by {name}, all saved: --resume goes on from epoch {trainer.epoch + 1}, step {trainer.done + 1}")
        return 128 + received
    unfused = [f"{what} ({times} times)" for what, times in backends.fallbacks().items()]
    if unfused:
        say("ran on PyTorch's own operators: " + ", ".join(unfused))
    return 0


def main(arguments: list[str] | None = None) -> int:
    processes = None
    try:
        given = options.parse(arguments)
        if given.threads is not None:
            torch.set_num_threads(given.threads)
        processes = distributed.Processes(given)
        with backends.use(given.backend):  # type: ignore[arg-type]
            return _train(given, processes)
    except options.ProgramError as error:
        print(f"resnet_fast.train: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        # The other processes will report a lost connection.
        rank = 0 if processes is None else processes.rank
        reason = str(error).strip().splitlines() or [type(error).__name__]
        traceback.print_exc()
        print(f"resnet_fast.train: process {rank} stopped: {reason[0]}", file=sys.stderr)
        print("resnet_fast.train: checkpoints are whole; start it again with --resume", file=sys.stderr)
        return 1
    finally:
        if processes is not None:
            processes.close()


if __name__ == "__main__":
    sys.exit(main())
