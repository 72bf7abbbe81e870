"""Nothing is timed before its result is right: the error rule, against float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from .cases import Twin
from .gpu.device import CPU, Device

__all__ = ["Reference", "WrongResultError", "in_layout"]

# A handful of numbers, the class scores, is too few for the rule: eager's own two layouts differ there by 3x.
FEW = 4096
FEW_FACTOR = 3.0


T = TypeVar("T", bound=nn.Module)


class WrongResultError(AssertionError):
    """A result outside the error rule. It has no time worth reporting."""


def in_layout(module: T, layout: torch.memory_format) -> T:
    """A copy with weights and buffers in ``layout``."""
    return copy.deepcopy(module).to(memory_format=layout)  # type: ignore[call-overload]


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item()


def _joined(outputs: tuple[Tensor, ...], norms: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The last outputs as one, each in units of its norm."""
    if not norms:
        return outputs
    first = len(outputs) - len(norms)
    return *outputs[:first], torch.cat([(o / n).flatten() for o, n in zip(outputs[first:], norms, strict=True)])


@dataclass(frozen=True)
class Reference:
    """What ``model(x)`` is in float64, and how far eager PyTorch is from it in the arithmetic of the device."""

    exact: tuple[Tensor, ...]
    eager_error: tuple[float, ...]
    rounding: tuple[float, ...]
    factor: float
    norms: tuple[Tensor, ...] = ()  # of the last outputs, which are judged together

    @classmethod
    @torch.no_grad()
    def of(cls, model: Twin, x: Tensor, device: Device = CPU) -> Reference:
        exact = as_tuple(copy.deepcopy(model).double()(x.double()))
        norms = () if model.together is None else tuple(e.norm() for e in exact[model.together :])
        exact = _joined(exact, norms)
        runs = []
        for layout in (torch.contiguous_format, torch.channels_last):
            laid_out = in_layout(model, layout)
            with device.arithmetic():
                runs.append(_joined(as_tuple(laid_out(x.contiguous(memory_format=layout))), norms))
        errors = tuple(max(rms(run[i] - exact[i]) for run in runs) for i in range(len(exact)))
        rounding = tuple(rms(e) * torch.finfo(r.dtype).eps / 2 for e, r in zip(exact, runs[0], strict=True))
        return cls(exact, errors, rounding, model.error_factor, norms)

    def check(self, name: str, outputs: Tensor | tuple[Tensor, ...], slack: float = 1.0) -> float:
        """Error of the first output as a multiple of eager's.

        Raises:
            WrongResultError: rms(output - exact) > slack * factor * rms(eager - exact) + one rounding, for any.
        """
        results = _joined(as_tuple(outputs), self.norms)
        if [r.shape for r in results] != [e.shape for e in self.exact]:
            raise WrongResultError(f"{name}: shapes {[tuple(r.shape) for r in results]}")
        for i, (result, exact) in enumerate(zip(results, self.exact, strict=True)):
            factor = self.factor * (1 if exact.numel() >= FEW else FEW_FACTOR)
            limit = slack * factor * self.eager_error[i] + self.rounding[i]
            error = rms(result - exact)
            if not error <= limit:  # NaN fails, too
                raise WrongResultError(
                    f"{name}: output {i} is {error:.3g} from float64 (rms), want at most {limit:.3g}"
                )
        first = rms(results[0] - self.exact[0])
        return first / self.eager_error[0] if self.eager_error[0] > 0 else 0.0
