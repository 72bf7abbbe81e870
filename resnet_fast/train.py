"""``python -m resnet_fast.train``, ``torchrun -m resnet_fast.train``: trains a network; ``--help`` lists the options.

Exit status: 0 trained to the end, 1 an internal error, 2 an error that the user can fix (options, data, disk), 128 + N
stopped by signal N with everything saved.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path

import torch

from . import backends

try:
    from .program import (
        checkpoints,
        data,
        distributed,
        evaluation,
        loop,
        options,
        report,
        resume,
        run_lock,
        signals,
    )
    from .program.reports import summary
except ModuleNotFoundError as error:
    sys.exit(f"resnet_fast.train needs {error.name}: pip install resnet_fast[train]")


def _train(given: options.Options, processes: distributed.Processes, stack: ExitStack) -> int:
    def say(text: str) -> None:
        if processes.rank == 0:
            report.say(text)

    out = Path(given.out)

    def start_from() -> Path | None:
        report.writable(out)
        # A machine that was lost may hold the lock until the file server misses it.
        stack.enter_context(run_lock.hold(out, patience=120 if processes.restarts else 0))
        checkpoints.clean(out)
        return resume.choose(given, processes.restarts)

    start = processes.from_first(start_from)
    loaded = data.load(given)
    for warning in loaded.warnings:
        say(f"warning: {warning}")
    trainer = loop.Trainer(given, loaded, processes, fresh=start is None)
    say(trainer.start_line())
    if start is not None:
        trainer.restore(start)
        say(f"goes on from {start}: epoch {trainer.epoch + 1}, step {trainer.done + 1}")
    processes.from_first(lambda: report.write_text(out / "config.yaml", given.as_yaml()))
    received = trainer.run()
    if received:
        name = signal.Signals(received).name
        say(f"stopped by {name}, all saved: --resume goes on from epoch {trainer.epoch + 1}, step {trainer.done + 1}")
        return 128 + received
    processes.from_first(lambda: resume.finished(given))
    unfused = [f"{what} ({times} times)" for what, times in backends.fallbacks().items()]
    if unfused:
        say("ran on PyTorch's own operators: " + ", ".join(unfused))
    return 0


def _evaluate(given: options.Options, processes: distributed.Processes) -> int:
    classes, result = evaluation.of_checkpoint(given, processes)
    if processes.rank == 0:
        report.say(report.worst_classes(classes, result.of_classes()))
        report.say(f"{given.evaluate}: loss {result.loss:.4f}, {summary.result_text(result)}")
    return 0


def _choose_backend(name: str, device: torch.device, stack: ExitStack) -> None:
    """Raises ProgramError if the backend that was asked for by name cannot train here."""
    try:
        stack.enter_context(backends.use(name))  # type: ignore[arg-type]
    except RuntimeError as error:
        raise options.ProgramError(f"--backend {name}: {error}") from error
    reason = backends.unfused_reason("conv_bn_stats", device.type) if name not in ("auto", "eager") else None
    if reason is not None:
        raise options.ProgramError(f"--backend {name} cannot train here: {reason}")


def main(arguments: list[str] | None = None) -> int:
    processes = given = None
    stack = ExitStack()
    try:
        given = options.parse(arguments)
        if given.threads is not None:
            torch.set_num_threads(given.threads)
        processes = distributed.Processes(given)
        with stack:
            _choose_backend(given.backend, processes.device, stack)
            return _train(given, processes, stack) if given.evaluate is None else _evaluate(given, processes)
    except distributed.FirstProcessError:
        return 2
    except options.ProgramError as error:
        # All processes have the same command line: one complains about it.
        if processes is not None or os.environ.get("RANK", "0") == "0":
            print(f"resnet_fast.train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("resnet_fast.train: stopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        # The other processes will report a lost connection.
        rank = 0 if processes is None else processes.rank
        reason = str(error).strip().splitlines() or [type(error).__name__]
        traceback.print_exc()
        print(f"resnet_fast.train: process {rank} stopped: {reason[0]}", file=sys.stderr)
        last = None if given is None or given.evaluate is not None else checkpoints.newest(Path(given.out))
        if last is not None:
            print(f"resnet_fast.train: {last} is whole; start it again with --resume", file=sys.stderr)
        return 1
    finally:
        if processes is not None:
            processes.close()


if __name__ == "__main__":
    signals.end_at_once()
    sys.exit(main())
