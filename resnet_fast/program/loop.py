"""The training loop: steps, evaluation, checkpoints, and resuming from one."""

from __future__ import annotations

import contextlib
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint import state_dict as whole
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import checkpoints, recipes, report
from .captured_step import CapturedStep, CudaGraphs, obstacle
from .data import IGNORED, Batch, Batches, Data, loaders, workers_of
from .distributed import Processes
from .networks import build, prepare, prepared_values
from .options import Options, ProgramError
from .sync_batch_norm import convert

__all__ = ["Trainer"]

# Checkpoints are the same for one process and for many, with whole or sharded weights.
_WHOLE = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
_AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Signals:
    """Context manager that records SIGINT and SIGTERM, so that the current step can end; a second one kills.

    Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun: signals within two seconds count as
    one.
    """

    def __init__(self) -> None:
        self.received = 0
        self._at = 0.0

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.received and now - self._at > 2:
            signal.signal(number, self._before[signal.Signals(number)])
            signal.raise_signal(number)
        elif not self.received:
            self.received, self._at = number, now

    def __enter__(self) -> _Signals:
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Trainer:
    """A training run; ``state`` returns and ``restore`` sets all of it that changes."""

    def __init__(self, options: Options, data: Data, processes: Processes) -> None:
        self.options, self.data, self.processes = options, data, processes
        self.recipe = recipes.of(options)
        torch.manual_seed(options.seed)
        self.network = build(options.model, data.preparation).to(processes.device)
        self.memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        if options.strategy != "fsdp":  # FSDP shards contiguous weights only; the images' format decides then
            self.network.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        if processes.world > 1 and options.sync_bn:
            convert(self.network)
        average = get_ema_multi_avg_fn(options.ema)
        self.ema = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True) if options.ema else None
        self.joined = processes.join(self.network, options.strategy)
        if options.compile:
            self.network.compile()
        shared = (options.batch, processes.rank, processes.world)
        self.batches = Batches(len(data.train), *shared, accumulate=options.accumulate, seed=options.seed)
        self.test_batches = Batches(len(data.test), *shared)
        self.steps = self.batches.total() // options.accumulate  # of an epoch
        if self.steps == 0:
            step = options.batch * options.accumulate * processes.world
            raise ProgramError(
                f"{len(data.train)} images to train on, but a step takes {step} (--batch x --accumulate x processes): "
                "want a smaller one"
            )
        self.optimizer = recipes.optimizer(self.network, self.recipe)
        self.schedule = recipes.schedule(self.optimizer, options, self.steps * self.recipe.epochs)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=options.amp == "fp16")
        self.graph = self._captured_step()
        self._held: list[tuple[Tensor, Tensor]] = []  # inputs of the passes of a step that the graph will run
        self.epoch = self.done = 0  # complete epochs, and steps done in the next one
        # Totals of this epoch: loss, correct predictions, images.
        self.sums = torch.zeros(3, dtype=torch.float64, device=processes.device)
        self.lr = 0.0  # of the last step
        self._speed = (0.0, 0.0, 0.0)  # images/s, seconds and share of waiting for data of the last epoch
        self.history: list[dict[str, Any]] = []
        self.best = 0.0
        self.confusion: Tensor | None = None
        self.broken: set[str] = set()
        # Each process draws dropout masks of its own.
        torch.manual_seed(options.seed + 1 + processes.rank)

    def _captured_step(self) -> CapturedStep | None:
        device = self.processes.device
        reason = obstacle(self.options, device, launched=self.processes.launched)
        if device.type == "cuda" and self.processes.rank == 0:
            report.say("steps are replayed as a CUDA graph" if reason is None else f"no CUDA graph: {reason}")
        if reason is not None:
            return None
        parts = (self.network, self.optimizer, self.scaler, self._pass_inputs)
        return CapturedStep(*parts, CudaGraphs(device), self._give_up)

    def _give_up(self, reason: str) -> None:
        reason = f"the step cannot be captured in a CUDA graph: {reason}"
        if self.options.cuda_graph == "on":
            raise ProgramError(f"{reason}; want --cuda-graph off")
        report.say(f"{reason}; it runs without one")

    def state(self) -> dict[str, Any]:
        self.processes.share_buffers(self.network)
        rng = {"cpu": torch.get_rng_state()}
        if self.processes.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.processes.device)
        return {
            "step": self.epoch * self.steps + self.done,
            "epoch": self.epoch,
            "done": self.done,
            "model": whole.get_model_state_dict(self.network, options=_WHOLE),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": whole.get_optimizer_state_dict(self.network, self.optimizer, options=_WHOLE),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": self.processes.everyone(rng),
            "sums": self.processes.everyone(self.sums.cpu()),
            "lr": self.lr,
            "history": self.history,
            "best": self.best,
            "options": self._identity(),
            "preparation": self.data.preparation._asdict(),
        }

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed."""
        counts = {"epochs": self.recipe.epochs, "processes": self.processes.world, "images": len(self.data.train)}
        return {**self.options.result(), **counts}

    def restore(self, path: Path) -> None:
        """Resumes from checkpoint ``path``, as if never interrupted.

        Raises:
            ProgramError: the file cannot be loaded, or was written by a run with other settings.
        """
        state = checkpoints.load(path)
        mine = self._identity()
        others = {name: value for name, value in state["options"].items() if mine.get(name) != value}
        if others:
            was = ", ".join(f"{name} {value} (now {mine.get(name)})" for name, value in others.items())
            raise ProgramError(f"{path} was trained with {was}: want the same to go on")
        if state["preparation"] != self.data.preparation._asdict():
            raise ProgramError(f"{path} was trained on other images than --data {self.options.data}")
        self.epoch, self.done = state["epoch"], state["done"]
        whole.set_model_state_dict(self.network, state["model"], options=whole.StateDictOptions(full_state_dict=True))
        whole.set_optimizer_state_dict(self.network, self.optimizer, state["optimizer"], options=_WHOLE)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        rng = state["rng"][self.processes.rank]
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.processes.device)
        self.sums.copy_(state["sums"][self.processes.rank])
        self.lr, self.history, self.best = state["lr"], state["history"], state["best"]

    def run(self) -> int:
        """Trains to the end or until a signal; returns the signal's number, or 0."""
        train, test = self._loaders()
        with workers_of(train, test), _Signals() as signals:
            while self.epoch < self.recipe.epochs:
                received = self._train(train, signals)
                if received:
                    if self.done:
                        self.save(best=False)
                    return received
                self._end_epoch(self._evaluate(test))
            if self.confusion is None:  # resumed after the last epoch
                self._evaluate(test)
        self._final()
        return 0

    def _loaders(self) -> list[Any]:
        """Batches to train with and to test on."""
        parts = ((self.data.train, self.batches), (self.data.test, self.test_batches))
        table = prepared_values(self.data.preparation, self.sums.float()).to(_AMP[self.options.amp] or torch.float32)
        found, line = loaders(self.options, parts, table, self.memory_format)
        if self.processes.rank == 0:
            report.say(line)
        return found

    def save(self, best: bool) -> None:
        """Writes a checkpoint: all processes gather, rank 0 writes, all raise if that fails."""
        state, failure = self.state(), None
        if self.processes.rank == 0:
            try:
                checkpoints.save(Path(self.options.out), state, keep=self.options.keep, best=best)
            except ProgramError as error:
                failure = str(error)
        failure = self.processes.everyone(failure)[0]
        if failure is not None:
            raise ProgramError(failure)

    def _autocast(self) -> torch.autocast:
        dtype = _AMP[self.options.amp]
        return torch.autocast(self.processes.device.type, dtype, enabled=dtype is not None)

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        for name in batch.broken:
            if name not in self.broken:
                self.broken.add(name)
                report.say(f"broken image {len(self.broken)}: {name}")
        images = batch.images
        if images.dtype == torch.uint8:  # the device prepares its own
            images = prepare(images, self.data.preparation, self.sums.float(), self.memory_format)
        return images, batch.labels.to(self.processes.device, non_blocking=True)

    def _take(self, batch: Batch, last: bool) -> None:
        """A pass on ``batch`` and, after the ``last`` of a step, the step; or both at once, by the graph."""
        if self.graph is None:
            self._pass(batch, last)
            if last:
                self._step()
            return
        self._held.append(self._inputs(batch))
        if last:
            self.graph.run(self._held)
            self._held = []
            self._advance(skipped=True)  # or not: asking would wait for the device

    def _pass(self, batch: Batch, last: bool) -> None:
        """Forward and backward of one batch; accumulates gradients, loss and correct predictions."""
        self._pass_inputs(*self._inputs(batch), last)

    def _pass_inputs(self, images: Tensor, labels: Tensor, last: bool) -> None:
        with self.processes.pass_without_sync(self.joined, last):
            with self._autocast():
                scores = self.joined(images)
                loss = F.cross_entropy(scores.float(), labels, ignore_index=IGNORED)
            self.scaler.scale(loss / self.options.accumulate).backward()
        correct = (scores.detach().argmax(1) == labels).sum()
        count = (labels != IGNORED).sum()
        self.sums += torch.stack([loss.detach().double() * count, correct.double(), count.double()])

    def _train(self, batches: Any, signals: _Signals) -> int:
        """Trains the rest of the epoch; returns the number of a signal that was received, or 0."""
        self.joined.train()
        self.batches.epoch, self.batches.first = self.epoch, self.done * self.options.accumulate
        first = self.done == 0
        if first:
            self.sums.zero_()
        bar = report.Bar(self.epoch + 1, self.recipe.epochs, self.steps, self.done, self.processes.rank == 0)
        with contextlib.closing(bar):
            for number, batch in enumerate(bar.timed(batches)):
                last = (number + 1) % self.options.accumulate == 0
                self._take(batch, last)
                if not last:
                    bar.images += len(batch.labels) * self.processes.world
                    continue
                bar.step(len(batch.labels) * self.processes.world, self.sums)
                received = self.processes.highest(signals.received)
                if received:
                    return received
                if self.options.save_every and self.done % self.options.save_every == 0 and self.done < self.steps:
                    self.save(best=False)
        self._speed = (bar.speed(), bar.seconds(), bar.waiting())
        return 0

    def _step(self) -> None:
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._advance(self.scaler.get_scale() < scale)

    def _advance(self, skipped: bool) -> None:
        """What follows an optimizer's step, which the scaler may have skipped."""
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        with _quiet_skipped_step(skipped):
            self.schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.network)
        self.done += 1

    @torch.no_grad()
    def _evaluate(self, batches: Any) -> tuple[float, float]:
        """Loss and accuracy on the test images; stores the confusion matrix."""
        self.processes.share_buffers(self.network)
        network = self.network if self.ema is None else self.ema.module
        network.eval()
        classes = len(self.data.preparation.classes)
        matrix = torch.zeros(classes * classes, dtype=torch.int64, device=self.processes.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for batch in batches:
            images, labels = self._inputs(batch)
            with self._autocast():
                scores = network(images)
            loss += F.cross_entropy(scores.float(), labels, ignore_index=IGNORED, reduction="sum")
            there = labels != IGNORED
            matrix += torch.bincount(labels[there] * classes + scores.argmax(1)[there], minlength=classes * classes)
        self.confusion = self.processes.total(matrix).reshape(classes, classes)
        count = int(self.confusion.sum())
        if count == 0:
            raise ProgramError(f"no test image of --data {self.options.data} can be read")
        return float(self.processes.total(loss)) / count, float(self.confusion.diagonal().sum()) / count

    def _end_epoch(self, test: tuple[float, float]) -> None:
        sums = self.processes.total(self.sums)
        count = max(float(sums[2]), 1.0)
        self.epoch, self.done = self.epoch + 1, 0
        row = {
            "epoch": self.epoch,
            "step": self.epoch * self.steps,
            "lr": self.lr,
            "train_loss": float(sums[0]) / count,
            "train_accuracy": float(sums[1]) / count,
            "test_loss": test[0],
            "test_accuracy": test[1],
            "images_per_s": round(self._speed[0], 1),
            "seconds": round(self._speed[1], 2),
        }
        self.history.append(row)
        is_best = test[1] > self.best
        self.best = max(self.best, test[1])
        self.save(is_best)
        if self.processes.rank == 0:
            folder = Path(self.options.out)
            report.log(folder / "log.csv", self.history)
            report.say(
                f"epoch {self.epoch}/{self.recipe.epochs}: loss {row['train_loss']:.4f}, accuracy "
                f"{row['train_accuracy']:.2%}; test {test[0]:.4f}, {test[1]:.2%}; {self._speed[0]:.0f} images/s, "
                f"{self._speed[2]:.1%} waiting for data"
            )

    def _final(self) -> None:
        broken = set().union(*self.processes.everyone(self.broken))
        if self.processes.rank != 0 or self.confusion is None:
            return
        folder = Path(self.options.out)
        report.draw(report.curves, folder / "curves.png", {self.options.model: self.history})
        classes = self.data.preparation.classes
        report.draw(report.confusion_chart, folder / "confusion.png", self.confusion, classes)
        correct, count = int(self.confusion.diagonal().sum()), int(self.confusion.sum())
        report.say(f"final: {correct} of {count} test images right, {correct / count:.2%}; best epoch {self.best:.2%}")
        if broken:
            report.say(f"{len(broken)} broken images were left out")


@contextlib.contextmanager
def _quiet_skipped_step(skipped: bool) -> Iterator[None]:
    """Silences PyTorch's warning where the scaler skipped the optimizer's step: the schedule advances all the same."""
    with warnings.catch_warnings():
        if skipped:
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        yield
