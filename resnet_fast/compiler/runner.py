"""One run of layers in a compiled graph at work: on the executor that fused modules have, or as the graph had it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from .. import backends
from ..chain.executor import autocast_dtype
from ..chain.inference import Chain as Packed
from ..chain.layout import any_channels_last, laid_out
from ..fusion.plan import LayerPaths, Segment
from .lift import Layer

__all__ = ["Chain", "Runner", "nodes_of"]

# A graph serves all modules of a class that differ in their tensors alone, such as blocks that are compiled one by one.
_BINDINGS = 64
# Beyond so few images on a CPU what a call costs besides the kernels does not count, and each stage has its own order.
_FEW_IMAGES = 4


def nodes_of(layers: Sequence[Layer]) -> list[fx.Node]:
    """The inputs of the graph that ``layers`` hold, each once."""
    values = (value for layer in layers for value in layer.inputs.values())
    return list(dict.fromkeys(value for value in values if isinstance(value, fx.Node)))


@dataclass(eq=False)
class Chain:
    """Layers with one input and one result. ``unfused(x, *inputs)``: the nodes of the graph that they were, where
    ``inputs`` are what the graph has for ``nodes_of(layers)``."""

    name: str
    paths: list[LayerPaths]
    layers: list[Layer]
    unfused: Callable[..., Tensor]


class _Layers(nn.Module):
    """The modules of a chain, holding the tensors that the graph was called with."""


class _Bound(Segment):
    """A chain whose modules are made for the tensors of a graph's inputs."""

    def __init__(self, name: str, paths: list[LayerPaths], modules: dict[str, nn.Module], training: bool) -> None:
        super().__init__(paths, [], [], [])
        self.name = name
        self.owner = _Layers()
        for layer in paths:
            for path in filter(None, layer[:2]):
                self.owner.add_module(path[0], modules[path[0]])
        self.owner.training = training

    def label(self) -> str:
        return self.name


class _Together(_Bound):
    """Several chains in a row as one, which run one by one where that does not work, and say why."""

    def _declined(self, reason: str | None) -> Tensor | None:
        return None


class _Binding:
    """A run of chains and the tensors that it was called with."""

    def __init__(self, runner: Runner, inputs: tuple[Any, ...]) -> None:
        self.inputs = inputs
        given = dict(zip(runner.nodes, inputs, strict=True))
        modules = {layer.name: layer.module(given) for chain in runner.chains for layer in chain.layers}
        self.chains = [
            (
                _Bound(chain.name, chain.paths, modules, runner.training),
                chain.unfused,
                [given[n] for n in nodes_of(chain.layers)],
            )
            for chain in runner.chains
        ]
        self._row: _Row | None = None
        self.together = None
        if len(runner.chains) > 1:
            self.together = _Together(runner.chains[0].name, _joined(runner.chains), modules, runner.training)
        # What PyTorch gives for contiguous images is contiguous, whatever the chains hand on to one another.
        self.contiguous = not any_channels_last(m for m in modules.values() if isinstance(m, nn.Conv2d))

    def run(self, x: Tensor) -> Tensor:
        if self.together is not None and _few(x):
            y = self.together.fused(x)
            if y is not None:
                return y
        joint = self._joint(x)
        if joint is not None and self._row is not None and self._row.serves(joint, x):
            return self._laid_out(self._row.run(x), x)
        y = x
        for chain, unfused, inputs in self.chains:
            z = chain.fused(y, channels_last=self.contiguous)
            y = unfused(y, *inputs) if z is None else z
        self._row = None if joint is None else _Row.of(joint, x, [chain for chain, *_ in self.chains], self.contiguous)
        return self._laid_out(y, x)

    def _laid_out(self, y: Tensor, x: Tensor) -> Tensor:
        return laid_out(y, x) if self.contiguous else y

    def _joint(self, x: Tensor) -> Packed | None:
        """All layers as one, if they can run as they are: asked once, not for each chain."""
        together = self.together
        if together is None or together.training or backends.kind(x) != "cpu" or autocast_dtype(x) is not None:
            return None
        joint, _, _ = together.packed(x, None)
        return None if joint is None or (torch.is_grad_enabled() and joint.requires_grad()) else joint


@dataclass(eq=False)
class _Row:
    """Chains that ran one after the other while ``joint`` was fresh, which watches the modules of all of them."""

    joint: Packed
    dtype: torch.dtype
    chains: list[Packed]
    contiguous: bool

    @classmethod
    def of(cls, joint: Packed, x: Tensor, chains: list[_Bound], contiguous: bool) -> _Row | None:
        packed = [chain._chain for chain in chains]
        if not all(isinstance(chain, Packed) for chain in packed):
            return None
        return cls(joint, x.dtype, cast(list[Packed], packed), contiguous)

    def serves(self, joint: Packed, x: Tensor) -> bool:
        return self.joint is joint and self.dtype == x.dtype and not (x.requires_grad and torch.is_grad_enabled())

    def run(self, x: Tensor) -> Tensor:
        for chain in self.chains:
            y = chain.run(x)
            x = laid_out(y, x) if chain.stays_contiguous and not self.contiguous else y
        return x


def _few(x: Tensor) -> bool:
    return x.dim() == 4 and x.shape[0] <= _FEW_IMAGES and backends.kind(x) == "cpu"


def _joined(chains: Sequence[Chain]) -> list[LayerPaths]:
    """Each chain reads what the one before it gives: values are numbered on."""
    paths: list[LayerPaths] = []
    for chain in chains:
        start = len(paths)
        for layer in chain.paths:
            residual = None if layer.residual is None else layer.residual + start
            paths.append(layer._replace(source=layer.source + start, residual=residual))
    return paths


class Runner:
    """``runner(x, *inputs)``: chains in a row on ``x``; ``inputs`` are what the graph has for ``nodes`` in this call.

    Modules are made for the first call with these tensors and kept for the next one, with all that is packed from them.
    What is kept holds the tensors: it goes with the compiled graph (``torch.compiler.reset()``), or as soon as so many
    others were given.
    """

    def __init__(self, training: bool, chains: list[Chain]) -> None:
        self.training, self.chains = training, chains
        self.nodes = nodes_of([layer for chain in chains for layer in chain.layers])
        self._bound: OrderedDict[tuple[Any, ...], _Binding] = OrderedDict()
        self._last: _Binding | None = None

    def __call__(self, x: Tensor, *inputs: Any) -> Tensor:
        last = self._last
        if last is None or not all(map(is_, last.inputs, inputs)):
            last = self._binding(inputs)
        return last.run(x)

    def _binding(self, inputs: tuple[Any, ...]) -> _Binding:
        key = tuple(id(t) if isinstance(t, Tensor) else t for t in inputs)
        found = self._bound.pop(key, None)
        if found is None:
            if len(self._bound) == _BINDINGS:
                self._bound.popitem(last=False)
            found = _Binding(self, inputs)
        self._bound[key] = self._last = found
        return found
