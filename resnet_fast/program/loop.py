"""The training loop: steps, evaluation, checkpoints, and resuming from one."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict as whole
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..chain.sync_batch_norm import convert
from . import checkpoints, evaluation, initial, mixing, recipes, report, resume, sharded, validation
from .captured_step import CapturedStep, CudaGraphs, obstacle
from .data import IGNORED, Batch, Batches, Data, loaders, workers_of
from .distributed import Processes
from .networks import build, prepare, prepared_values
from .options import AMP, Options, ProgramError
from .reports import profiling, summary, tensorboard
from .signals import Signals

__all__ = ["Trainer"]

# Checkpoints are the same for one process and for many, with whole or sharded weights.
_WHOLE = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
# Above every signal's number: the loss of a process is not finite.
_DIVERGED = 1 << 16
# Reading the loss waits for a GPU: it is looked at once in so many steps, and before anything is saved.
_LOOK_EVERY = 50


class Trainer:
    """A training run; ``state`` returns and ``restore`` sets all of it that changes."""

    def __init__(self, options: Options, data: Data, processes: Processes, *, fresh: bool = True) -> None:
        """fresh: begins with the weights of ``--init``; a run that is to be restored needs none."""
        self.options, self.data, self.processes = options, data, processes
        # Evaluated after each epoch: training images kept back, or else the test set.
        self.held_out, self.held_images = "test", data.test
        if options.validation:
            self.held_out = "validation"
            self.data, self.held_images = validation.split(data, options.validation)
        self.recipe = recipes.of(options)
        torch.manual_seed(options.seed)
        self.network = build(options.model, data.preparation)
        if options.init is not None and fresh:
            self._say(f"--init {options.init}: {initial.take(self.network, Path(options.init))}")
        self.network.to(processes.device)
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
        self.batches = Batches(len(self.data.train), *shared, accumulate=options.accumulate, seed=options.seed)
        self.held_batches = Batches(len(self.held_images), *shared)
        self.test_batches = Batches(len(data.test), *shared)
        self.steps = self.batches.total() // options.accumulate  # of an epoch
        if self.steps == 0:
            step = options.batch * options.accumulate * processes.world
            raise ProgramError(
                f"{len(self.data.train)} images to train on, but a step takes {step} (--batch x --accumulate x "
                "processes): want a smaller one"
            )
        self.optimizer = recipes.optimizer(self.network, self.recipe)
        self.schedule = recipes.schedule(self.optimizer, options, self.steps * self.recipe.epochs)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=options.amp == "fp16")
        self.graph = self._captured_step()
        self._held: list[tuple[Tensor, ...]] = []  # inputs of the passes of a step that the graph will run
        self.step = 0  # steps done, of all epochs
        self.epoch = self.done = 0  # complete epochs, and steps done in the next one
        self.consumed = 0  # images of this epoch that another number of processes has trained on
        # Totals of this epoch: loss, correct predictions, images.
        self.sums = torch.zeros(3, dtype=torch.float64, device=processes.device)
        self.lr = 0.0  # of the last step
        self._trace = profiling.Trace(self.folder, on=False)
        self._speed = (0.0, 0.0, 0.0)  # images/s, seconds and share of waiting for data of the last epoch
        self.history: list[dict[str, Any]] = []
        self.best = -1.0  # accuracy of the best epoch; below that of any
        self.result: evaluation.Result | None = None  # of the last evaluation
        self.broken: set[str] = set()
        self._tensorboard: tensorboard.Log | None = None
        # Each process draws dropout masks of its own.
        torch.manual_seed((options.seed + 1 + processes.rank) % 2**64)

    @property
    def folder(self) -> Path:
        return Path(self.options.out)

    def _say(self, text: str) -> None:
        if self.processes.rank == 0:
            report.say(text)

    def start_line(self) -> str:
        images = {"training": len(self.data.train), self.held_out: len(self.held_images), "test": len(self.data.test)}
        return summary.start_line(self.options, self.processes, self.network, images, self.steps, self.recipe.epochs)

    def _captured_step(self) -> CapturedStep | None:
        device = self.processes.device
        reason = obstacle(self.options, device, launched=self.processes.launched)
        if device.type == "cuda":
            self._say("steps are replayed as a CUDA graph" if reason is None else f"no CUDA graph: {reason}")
        if reason is not None:
            return None
        parts = (self.network, self.optimizer, self.scaler, self._pass_inputs)
        return CapturedStep(*parts, CudaGraphs(device), self._give_up)

    def _give_up(self, reason: str) -> None:
        reason = f"the step cannot be captured in a CUDA graph: {reason}"
        if self.options.cuda_graph == "on":
            raise ProgramError(f"{reason}; want --cuda-graph off")
        report.say(f"{reason}; it runs without one")

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
        if self.history:
            self.processes.from_first(lambda: report.log(self.folder / "log.csv", self.history))
            said = self.processes.from_first(lambda: checkpoints.restore_best(self.folder, path, self.history))
            if said is not None:
                self._say(said)

    def run(self) -> int:
        """Trains to the end or until a signal; returns the signal's number, or 0."""
        train, held_out, test = self._loaders()
        with workers_of(train, held_out, test), Signals() as signals, contextlib.ExitStack() as closing:
            self._trace = profiling.Trace(self.folder / f"trace-{self.processes.rank}.json.gz", self.options.profile)
            closing.callback(lambda: self._trace.close())
            if self.options.tensorboard and self.processes.rank == 0:
                self._tensorboard = tensorboard.Log(self.folder / "tensorboard", self.step + 1)
                closing.callback(self._tensorboard.close)
            while self.epoch < self.recipe.epochs:
                received = self._train(train, signals)
                if received:
                    if self.done:
                        self.save(best=False)
                    return received
                self._end_epoch(self._evaluate(held_out))
            chosen = validation.take_best(self) if self.options.validation else ""
            if self.result is None or self.options.validation:  # or resumed after the last epoch
                self.result = None
                self._evaluate(test, "test")
        summary.final(self, chosen)
        return 0

    def _loaders(self) -> list[Any]:
        """Batches to train with, to evaluate after each epoch, and to test on."""
        parts = [(self.data.train, self.batches), (self.held_images, self.held_batches)]
        if self.options.validation:
            parts.append((self.data.test, self.test_batches))
        # Mixed in float32, as workers' images are, and rounded afterwards.
        dtype = None if self.options.mixup else AMP[self.options.amp]
        table = prepared_values(self.data.preparation, self.sums.float()).to(dtype or torch.float32)
        found, line = loaders(self.options, parts, table, self.memory_format)
        self._say(line)
        return found if self.options.validation else [*found, found[1]]

    def save(self, best: bool) -> None:
        """Writes a checkpoint: all processes gather, or write their shards; all raise if that fails.

        Raises:
            ProgramError: it could not be written, or loss or weights are not finite, without ``--allow-nan``.
        """
        folder, keep = self.folder, self.options.keep
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
        last = checkpoints.newest(self.folder)
        left = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"

        def fail() -> NoReturn:
            raise ProgramError(
                f"the loss is not finite in epoch {self.epoch + 1}, step {self.done}: the run diverged; {left}; "
                f"want a smaller --lr than {self.recipe.lr}, or --allow-nan to go on"
            )

        self.processes.from_first(fail)
        raise AssertionError("unreachable")

    def _autocast(self) -> torch.autocast:
        dtype = AMP[self.options.amp]
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
        self._held.append(self._mixed(batch))
        if last:
            self.graph.run(self._held)
            self._held = []
            self._advance(skipped=True)  # or not: asking would wait for the device

    def _pass(self, batch: Batch, last: bool) -> None:
        """Forward and backward of one batch; accumulates gradients, loss and correct predictions."""
        self._pass_inputs(*self._mixed(batch), last)

    def _mixed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images and what :class:`mixing.Targets` holds of their labels."""
        options = self.options
        before = self.consumed + self.done * options.batch * options.accumulate * self.processes.world
        drawn = mixing.draw(options.seed, self.epoch, before, mixup=options.mixup, cutmix=options.cutmix)
        images, targets = mixing.mix(*self._inputs(batch), drawn)
        return images, *(t for t in targets if t is not None)

    def _pass_inputs(self, images: Tensor, *targets_and_last: Any) -> None:
        *tensors, last = targets_and_last
        targets = mixing.Targets(*tensors)
        with self.processes.pass_without_sync(self.joined, last):
            with self._autocast():
                scores = self.joined(images)
                loss = mixing.loss(scores.float(), targets, self.options.label_smoothing)
            self.scaler.scale(loss / self.options.accumulate).backward()
        correct = (scores.detach().argmax(1) == targets.heavier).sum()
        count = (targets.labels != IGNORED).sum()
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
            for number, batch in enumerate(bar.timed(batches)):
                last = (number + 1) % self.options.accumulate == 0
                self._take(batch, last)
                if not last:
                    bar.images += len(batch.labels) * self.processes.world
                    continue
                self._trace.step()
                bar.step(len(batch.labels) * self.processes.world, self.sums)
                received = self.processes.highest(max(signals.received, self._lost()))
                if received == _DIVERGED:
                    self._diverged()
                if received:
                    return received
                if self.options.save_every and self.done % self.options.save_every == 0 and self.done < steps:
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
        with recipes.quiet_skipped_step(skipped):
            self.schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.network)
        self.done, self.step = self.done + 1, self.step + 1

    def _evaluate(self, batches: Any, what: str = "") -> evaluation.Result:
        """Evaluates the averaged weights, or else the weights; keeps the result for the reports.

        what: the images' name, by default of those held out.
        """
        network = self.network if self.ema is None else self.ema.module
        for each in dict.fromkeys((self.network, network)):
            self.processes.share_buffers(each)
        classes = len(self.data.preparation.classes)
        result = evaluation.evaluate(network, batches, self._inputs, self._autocast, classes, self.processes)
        if result is None:
            raise ProgramError(f"no {what or self.held_out} image of --data {self.options.data} can be read")
        self.result = result
        return result

    def _end_epoch(self, held: evaluation.Result) -> None:
        sums = self.processes.total(self.sums)
        count = max(float(sums[2]), 1.0)
        if not (math.isfinite(sums[0] + held.loss) or self.options.allow_nan):
            self._diverged()
        self.epoch, self.done, self.consumed = self.epoch + 1, 0, 0
        row = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.lr,
            "train_loss": float(sums[0]) / count,
            "train_accuracy": float(sums[1]) / count,
            f"{self.held_out}_loss": held.loss,
            f"{self.held_out}_accuracy": held.accuracy,
            **({} if held.top5 is None else {f"{self.held_out}_top5": held.top5}),
            "images_per_s": round(self._speed[0], 1),
            "seconds": round(self._speed[1], 2),
        }
        self.history.append(row)
        is_best = held.accuracy > self.best
        self.best = max(self.best, held.accuracy)
        self.save(is_best)
        self.processes.from_first(lambda: report.log(self.folder / "log.csv", self.history))
        if self._tensorboard is not None:
            self._tensorboard.row(row)
        waiting = f", {self._speed[2]:.1%} waiting for data"
        self._say(summary.epoch_line(row, self.recipe.epochs, self.processes.world) + waiting)
