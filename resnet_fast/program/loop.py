"""The training loop: steps, evaluation, checkpoints, and resuming from one."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint import state_dict as whole
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import checkpoints, recipes, report, resume, sharded
from .data import IGNORED, Batch, Batches, Data, loader, workers_of
from .distributed import Processes
from .networks import build, prepare
from .options import Options, ProgramError
from .signals import Signals
from .sync_batch_norm import convert

__all__ = ["Trainer"]

# Checkpoints are the same for one process and for many, with whole or sharded weights.
_WHOLE = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
# Above every signal's number: the loss of a process is not finite.
_DIVERGED = 1 << 16
# Reading the loss waits for a GPU: it is looked at once in so many steps, and before anything is saved.
_LOOK_EVERY = 50
_AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        self.step = 0  # steps done, of all epochs
        self.epoch = self.done = 0  # complete epochs, and steps done in the next one
        self.consumed = 0  # images of this epoch that another number of processes has trained on
        # Totals of this epoch: loss, correct predictions, images.
        self.sums = torch.zeros(3, dtype=torch.float64, device=processes.device)
        self.lr = 0.0  # of the last step
        self._speed = (0.0, 0.0)  # images/s and seconds of the last epoch
        self.history: list[dict[str, Any]] = []
        self.best = -1.0  # test accuracy of the best epoch; below that of any
        self.confusion: Tensor | None = None
        self.broken: set[str] = set()
        # Each process draws dropout masks of its own.
        torch.manual_seed((options.seed + 1 + processes.rank) % 2**64)

    def state(self, *, weights: bool = True) -> dict[str, Any]:
        """All of the run that changes; without ``weights``, model and optimizer are None."""
        self.processes.share_buffers(self.network)
        rng = {"cpu": torch.get_rng_state()}
        if self.processes.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.processes.device)
        model = whole.get_model_state_dict(self.network, options=_WHOLE) if weights else None
        optimizer = whole.get_optimizer_state_dict(self.network, self.optimizer, options=_WHOLE) if weights else None
        return {
            "step": self.step,
            "epoch": self.epoch,
            "done": self.done,
            "consumed": self.consumed,
            "model": model,
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": self.processes.everyone(rng),
            "sums": self.processes.everyone(self.sums.cpu()),
            "lr": self.lr,
            "history": self.history,
            "best": self.best,
            "options": self.identity(),
            "preparation": self.data.preparation._asdict(),
        }

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed."""
        counts = {"epochs": self.recipe.epochs, "processes": self.processes.world, "images": len(self.data.train)}
        return {**self.options.result(), **counts}

    def restore(self, path: Path) -> None:
        """Resumes from checkpoint ``path``, as if never interrupted; writes log.csv and best.pt as they were then.

        Raises:
            ProgramError: the checkpoint cannot be loaded, or was written by a run with other settings.
        """
        resume.restore(self, path)
        folder = Path(self.options.out)
        if self.history:
            self.processes.from_first(lambda: report.log(folder / "log.csv", self.history))
            said = self.processes.from_first(lambda: checkpoints.restore_best(folder, path, self.history))
            if said is not None and self.processes.rank == 0:
                report.say(said)

    def run(self) -> int:
        """Trains to the end or until a signal; returns the signal's number, or 0."""
        pin = self.processes.device.type == "cuda"
        train = loader(self.data.train, self.batches, self.options.workers, pin)
        test = loader(self.data.test, self.test_batches, self.options.workers, pin)
        with workers_of(train, test), Signals() as signals:
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

    def save(self, best: bool) -> None:
        """Writes a checkpoint: all processes gather, or write their shards; all raise if that fails.

        Raises:
            ProgramError: it could not be written, or loss or weights are not finite, without ``--allow-nan``.
        """
        folder, keep = Path(self.options.out), self.options.keep
        if not self.options.allow_nan and self.processes.highest(not self._finite()):
            self._diverged()
        parts = self.options.checkpoints == "sharded"
        state = self.state(weights=best or not parts)
        if parts:
            self.processes.from_first(lambda: checkpoints.save_best(folder, state) if best else None)
            sharded.save(folder, state, self.network, self.optimizer, self.processes, keep=keep)
        else:
            self.processes.from_first(lambda: checkpoints.save(folder, state, keep=keep, best=best))

    def _finite(self) -> bool:
        """Whether the losses and weights of this process are; a gradient can be infinite where the loss is not."""
        tensors = (t.to_local() if isinstance(t, DTensor) else t for t in self.network.state_dict().values())
        return bool(torch.stack([t.isfinite().all() for t in (*tensors, self.sums)]).all())

    def _lost(self) -> int:
        """``_DIVERGED`` if the loss of this process is known not to be finite, or 0."""
        if self.options.allow_nan or (self.processes.device.type == "cuda" and self.done % _LOOK_EVERY):
            return 0
        return 0 if math.isfinite(self.sums[0]) else _DIVERGED

    def _diverged(self) -> NoReturn:
        """Ends the run, on all processes: the loss is not finite, and what would be saved is of no use."""
        sums = self.processes.total(self.sums)
        last = checkpoints.newest(Path(self.options.out))
        left = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"

        def fail() -> NoReturn:
            if not sums[2]:
                raise ProgramError(f"no image of --data {self.options.data} to train on can be read")
            raise ProgramError(
                f"the loss is not finite in epoch {self.epoch + 1}, step {self.done}: the run diverged; {left}; "
                f"want a smaller --lr than {self.recipe.lr}, or --allow-nan to go on"
            )

        self.processes.from_first(fail)
        raise AssertionError("unreachable")

    def _autocast(self) -> torch.autocast:
        dtype = _AMP[self.options.amp]
        return torch.autocast(self.processes.device.type, dtype, enabled=dtype is not None)

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        for name in batch.broken:
            if name not in self.broken:
                self.broken.add(name)
                report.say(f"broken image {len(self.broken)}: {name}")
        images = prepare(batch.images, self.data.preparation, self.sums.float(), self.memory_format)
        return images, batch.labels.to(self.processes.device, non_blocking=True)

    def _pass(self, batch: Batch, last: bool) -> None:
        """Forward and backward of one batch; accumulates gradients, loss and correct predictions."""
        images, labels = self._inputs(batch)
        with self.processes.pass_without_sync(self.joined, last):
            with self._autocast():
                scores = self.joined(images)
                loss = F.cross_entropy(scores.float(), labels, ignore_index=IGNORED)
            self.scaler.scale(loss / self.options.accumulate).backward()
        correct = (scores.detach().argmax(1) == labels).sum()
        count = (labels != IGNORED).sum()
        self.sums += torch.stack([loss.detach().double() * count, correct.double(), count.double()])

    def _train(self, batches: Any, signals: Signals) -> int:
        """Trains the rest of the epoch; returns the number of a signal that was received, or 0."""
        self.joined.train()
        self.batches.epoch, self.batches.first = self.epoch, self.done * self.options.accumulate
        self.batches.consumed = self.consumed
        steps = self.batches.total() // self.options.accumulate
        if self.done == self.consumed == 0:
            self.sums.zero_()
        bar = report.Bar(self.epoch + 1, self.recipe.epochs, steps, self.done, self.processes.rank == 0)
        with contextlib.closing(bar):
            for number, batch in enumerate(batches):
                last = (number + 1) % self.options.accumulate == 0
                self._pass(batch, last)
                if not last:
                    bar.images += len(batch.labels) * self.processes.world
                    continue
                self._step()
                bar.step(len(batch.labels) * self.processes.world, self.sums)
                received = self.processes.highest(max(signals.received, self._lost()))
                if received == _DIVERGED:
                    self._diverged()
                if received:
                    return received
                if self.options.save_every and self.done % self.options.save_every == 0 and self.done < steps:
                    self.save(best=False)
        self._speed = (bar.speed(), bar.seconds())
        return 0

    def _step(self) -> None:
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        with _quiet_skipped_step(self.scaler.get_scale() < scale):
            self.schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.network)
        self.done, self.step = self.done + 1, self.step + 1

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
        if not (math.isfinite(sums[0] + test[0]) or self.options.allow_nan):
            self._diverged()
        self.epoch, self.done, self.consumed = self.epoch + 1, 0, 0
        row = {
            "epoch": self.epoch,
            "step": self.step,
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
                f"{row['train_accuracy']:.2%}; test {test[0]:.4f}, {test[1]:.2%}; {self._speed[0]:.0f} images/s"
            )

    def _final(self) -> None:
        broken = set().union(*self.processes.everyone(self.broken))
        if self.processes.rank != 0 or self.confusion is None:
            return
        folder = Path(self.options.out)
        report.curves(folder / "curves.png", {self.options.model: self.history})
        report.confusion_chart(folder / "confusion.png", self.confusion, self.data.preparation.classes)
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
