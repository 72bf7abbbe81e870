"""Networks and batches by their names, ``"ResNet32 64"``, ``"cifar_resnet20 2 16"``, ``"ResNet32 64 training"``."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

from resnet_fast import reference

from ..cases import Case, Network, Twin
from ..training import TrainingCase
from .options import Options

__all__ = ["INFERENCE", "TRAINING", "Workload", "chosen", "kinds"]

INFERENCE = (
    *("ResNet32 1", "ResNet32 8", "ResNet32 64", "resnet18 32", "resnet50 8", "resnet50 128"),
    *("cifar_resnet32 1", "cifar_resnet32 128", "cifar_resnet32 1024"),
)
TRAINING = ("cifar_resnet32 128 training", "ResNet32 64 training", "resnet50 64 training")
SMALL = {"inference": ("cifar_resnet20 2 8",), "training": ("cifar_resnet20 2 8 training",)}


@dataclass(frozen=True)
class Workload:
    model: str
    batch: int
    size: int
    training: bool

    @classmethod
    def of(cls, text: str) -> Workload:
        """Raises: ValueError for what is no such name."""
        words = text.split()
        training = words[-1:] == ["training"]
        model, *numbers = words[:-1] if training else words
        if not hasattr(reference, model) or not 1 <= len(numbers) <= 2 or not all(n.isdigit() for n in numbers):
            raise ValueError(f"case is {text!r}, want MODEL BATCH [SIZE] [training], such as 'ResNet32 64'")
        size = int(numbers[1]) if len(numbers) == 2 else 32 if model.startswith("cifar") else 224
        return cls(model, int(numbers[0]), size, training)

    @property
    def name(self) -> str:
        return f"{self.model}, {self.batch}x3x{self.size}x{self.size}"

    def case(self) -> Case:
        return Case(self.model, (self.batch, 3, self.size, self.size), lambda: _network(self.model), kinds())

    def module(self) -> Twin:
        """The network in eval mode with statistics of a batch; built once in a process for all batches."""
        return _built(self.model, self.size)

    def training_case(self) -> TrainingCase:
        return TrainingCase(self.model, (self.batch, 3, self.size, self.size))


def _network(model: str) -> Twin:
    return Network(model, getattr(reference, model)())


@functools.cache
def _built(model: str, size: int) -> Twin:
    return Workload(model, 8, size, False).case().build()


def kinds() -> tuple[str, ...]:
    """Of images; photographs come with scikit-learn."""
    return ("photographs", "random") if importlib.util.find_spec("sklearn") else ("random",)


def chosen(options: Options, training: bool) -> list[str]:
    """The cases that were named, or the list."""
    if options.cases:
        return [text for text in options.cases if Workload.of(text).training == training]
    if options.simulated:
        return list(SMALL["training" if training else "inference"])
    return list(TRAINING if training else INFERENCE)
