"""Tapes: a chain's launches and calls, recorded once for each kind of inputs and replayed in C++.

From Python a launch costs the host 50 to 200 us, several times what it costs the GPU. So all that depends on shapes
alone is computed once: while a call runs as usual, a :class:`.recorder.LaunchRecorder` records each kernel with its
grid and its arguments, and each operator of PyTorch's that computes something. ``kernels/csrc/chain/tape_replay.cpp``
replays that for other inputs of the same kind, at a few microseconds a step. In inference there is one input, the
images; a forward or backward pass of training has parameters and saved tensors beside them.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, launch
from ..native import extension
from .recorder import Launch, LaunchRecorder

__all__ = ["Tape", "Tapes", "record"]


class Tape:
    """A recording of a :class:`LaunchRecorder`, held in C++."""

    def __init__(self, words: list[int], recorder: LaunchRecorder) -> None:
        self.steps = recorder.steps
        self._held = recorder.constants()
        self._error: BaseException | None = None
        self._replay = launch.device().replay
        launcher = self._launcher() if callable(self._replay) else self._replay
        self.number = extension.tape(array("q", words).tobytes(), launcher)
        weakref.finalize(self, extension.drop_tape, self.number)

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Replays the recording on ``inputs``; returns no outputs if they differ from those of the recording in number,
        shape, strides, dtype, device, alignment or shared memory."""
        try:
            return torch.ops.resnet_fast.run_tape.default(inputs, self.number)
        except RuntimeError:
            error, self._error = self._error, None
            if error is None:
                raise
            raise error from None

    def _launcher(self) -> Callable[[int, list[tuple[bytes, int]]], bool]:
        """The callback that C++ launches through under a simulator."""
        weak = weakref.ref(self)  # the tape in C++ holds the callback

        def start(step: int, parameters: list[tuple[bytes, int]]) -> bool:
            tape = weak()
            assert tape is not None
            assert callable(tape._replay)
            ran = tape.steps[step]
            assert isinstance(ran, Launch)
            try:
                tape._replay(ran.compiled, ran.grid, parameters)
            except BaseException as error:
                tape._error = error
                return False
            return True

        return start


def record(
    inputs: Sequence[Tensor], run: Callable[[], list[Tensor]], closed: bool = False
) -> tuple[list[Tensor], Tape | str]:
    """``run()``, a function of ``inputs``, and its tape, or why it cannot be replayed."""
    with LaunchRecorder(inputs, closed) as recorder:
        outputs = run()
    words = recorder.words(outputs)
    return outputs, recorder.reason or "" if words is None else Tape(words, recorder)


class Tapes:
    """The tapes of a pure function, by kind of call.

    The first call of a kind runs, and chooses kernels; the second is recorded; later ones are replayed. If the inputs
    no longer fit a tape, it is recorded again. The ``MOST`` latest kinds are kept. ``closed``: see
    :class:`LaunchRecorder`.
    """

    MOST = 64

    def __init__(self, closed: bool = False) -> None:
        self.closed = closed
        # None after the first call; then the tape, or why there is none.
        self.found: dict[tuple[Any, ...], Tape | str | None] = {}

    def run(self, x: Tensor, kind: tuple[Any, ...], run: Callable[[], Tensor]) -> Tensor:
        """``run()``, a function of ``x``; kind: the switches that decide how it computes."""
        return self.run_all([x], kind, lambda: [run()])[0]

    def run_all(self, inputs: list[Tensor], kind: tuple[Any, ...], run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """``run()``, distinct tensors computed from ``inputs``; ``kind`` and the first input select the tape."""
        x = inputs[0]
        # An outer recording records the launches themselves. A CUDA graph's capture has its own stream and memory, and
        # the time of a call does not matter there.
        if not backends.cuda.replay or x.numel() == 0 or launch.recording() or _capturing(x):
            return run()
        # Workspaces belong to a stream.
        stream = torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0
        key = (*kind, x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0, stream, launch.device())
        if key not in self.found:
            outputs = run()
            self.found[key] = None
            if len(self.found) > self.MOST:
                del self.found[next(iter(self.found))]
            return outputs
        tape = self.found[key]
        if isinstance(tape, Tape):
            outputs = tape.run(inputs)
            if outputs:
                return outputs
        elif tape is not None:
            return run()
        outputs, self.found[key] = record(inputs, run, self.closed)
        return outputs


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
