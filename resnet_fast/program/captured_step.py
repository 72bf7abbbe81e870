"""The whole training step as one CUDA graph: passes, optimizer and loss scaling cost the host one launch."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .options import Options, ProgramError

__all__ = ["CapturedStep", "CudaGraphs", "Graphs", "obstacle"]

Inputs = Sequence[tuple[Tensor, ...]]


class Graphs(Protocol):
    """What captures: a GPU, or in tests a stand-in."""

    def aside(self) -> contextlib.AbstractContextManager[Any]:
        """Context manager: what it encloses runs on the stream that captures."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Records what ``run`` launches, without running it; returns what replays it. RuntimeError if it cannot."""


class CudaGraphs:
    """Captures on a stream of its own of ``device``, the current one."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # graphs and events that a collection destroys would end the capture
        try:
            # The thread that pins workers' batches goes on calling CUDA.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                run()
        finally:
            if collects:
                gc.enable()
        return graph.replay


class CapturedStep:
    """One training step of ``network``: the first steps run as they are, the next is captured, then it is replayed.

    The learning rate is a tensor that each replay sets, loss scale and the search for infinities are tensors already;
    PyTorch's fused SGD reads them on the device. Steps outside of the graph are by the same kernel: a resumed run,
    which begins with some, ends with the same weights bit for bit.

    run_pass: forward and backward of a pass's tensors and whether it is the step's last, accumulating gradients.
    give_up: is told why the step cannot be captured. Where it returns, steps run as they are from then on.
    """

    # cuDNN and the tuner choose in the first, tapes are recorded in the second.
    WARM_UP = 3

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        run_pass: Callable[..., None],
        graphs: Graphs,
        give_up: Callable[[str], None],
    ) -> None:
        self.network, self.optimizer, self.scaler, self.run_pass = network, optimizer, scaler, run_pass
        self.graphs, self.give_up = graphs, give_up
        self._eager, self._gave_up = 0, False
        self._replay: Callable[[], None] | None = None
        self._held: Inputs = ()  # what the graph reads
        self._rates = [torch.zeros((), device=group["params"][0].device) for group in optimizer.param_groups]

    def run(self, inputs: Inputs) -> None:
        """A step on the tensors of its passes, whose number and shapes are the same in every step."""
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self._replay is None and self._eager >= self.WARM_UP and not self._gave_up and self._has_momentum():
            self._replay = self._capture(inputs)
        if self._replay is None:
            with self.graphs.aside():
                self._step(inputs)
            self._eager += 1
            return
        for held, given in zip(self._held, inputs, strict=True):
            for into, t in zip(held, given, strict=True):
                into.copy_(t)
        self._replay()
        # Packed weights and saved tensors are found stale by the version, which a replay does not count.
        torch.autograd.graph.increment_version([*self.network.parameters(), *self.network.buffers()])

    def _step(self, inputs: Inputs) -> None:
        for number, tensors in enumerate(inputs):
            self.run_pass(*tensors, number + 1 == len(inputs))
        with self._on_the_device() if self._has_momentum() else contextlib.nullcontext():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _has_momentum(self) -> bool:
        """Whether the optimizer has made a step.

        The scaler skips the first ones: fused SGD would skip them after it has allocated momentum, which then nothing
        writes.
        """
        states = [self.optimizer.state[p] for group in self.optimizer.param_groups for p in group["params"]]
        return all(state.get("momentum_buffer") is not None for state in states)

    def _capture(self, inputs: Inputs) -> Callable[[], None] | None:
        self._held = [tuple(t.clone() for t in tensors) for tensors in inputs]
        try:
            return self.graphs.capture(lambda: self._step(self._held))
        except RuntimeError as error:
            self.give_up(str(error).splitlines()[0])
            self._gave_up, self._held = True, ()
            self.optimizer.zero_grad(set_to_none=True)  # those of the capture hold nothing
            return None

    @contextlib.contextmanager
    def _on_the_device(self) -> Iterator[None]:
        """Context manager: the optimizer's step waits for nothing. Its settings, which checkpoints hold, come back."""
        groups = self.optimizer.param_groups
        before = [{name: group[name] for name in ("lr", "fused", "foreach")} for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group.update(lr=rate, fused=True, foreach=False)
        # By this GradScaler leaves scale and skipping to the fused kernel.
        self.optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del self.optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]
            for group, values in zip(groups, before, strict=True):
                group.update(values)


def obstacle(options: Options, device: torch.device, launched: bool) -> str | None:
    """Why the step is not captured, or None. launched: by torchrun.

    Raises:
        ProgramError: ``--cuda-graph on``, and it cannot be.
    """
    if options.cuda_graph == "off":
        return "--cuda-graph off"
    reason = None
    if device.type != "cuda":
        reason = f"it wants a CUDA device, and this run is on {device}"
    elif launched:
        reason = "it wants a single process, without torchrun"
    elif options.compile:
        reason = "it does not go with --compile"
    if reason is not None and options.cuda_graph == "on":
        raise ProgramError(f"--cuda-graph on cannot be: {reason}")
    if reason is None and options.cuda_graph == "auto" and options.amp == "fp16":
        return "with --amp fp16 on request only"
    return reason
