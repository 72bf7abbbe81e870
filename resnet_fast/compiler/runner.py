"""What a compiled graph calls for its chains: a :class:`Runner`, on the chain executor or as the graph had it.

:mod:`.graph` makes one for each chain that it finds. At a call the image and the layers' tensors come in.
"""

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
from ..chain.inference import Chain
from ..chain.layout import any_channels_last, laid_out
from ..fusion.execution_plan import LayerPaths, Segment
from .lift import LiftedLayer

__all__ = ["GraphChain", "Runner", "nodes_of"]

# Bindings of one graph, which serves all modules that differ in their tensors alone, as blocks compiled one by one do.
_BINDINGS = 64
# In larger batches on CPUs the overhead of a call does not count, and each stage has a loop order of its own.
_SMALL_BATCH = 4


def nodes_of(layers: Sequence[LiftedLayer]) -> list[fx.Node]:
    """The inputs of the graph that ``layers`` hold, each once."""
    values = (value for layer in layers for value in layer.inputs.values())
    return list(dict.fromkeys(value for value in values if isinstance(value, fx.Node)))


@dataclass(eq=False)
class GraphChain:
    """Layers with one input and one result. ``unfused(x, *inputs)`` runs them as the graph had them; ``inputs`` are the
    values of ``nodes_of(layers)``."""

    name: str
    paths: list[LayerPaths]
    layers: list[LiftedLayer]
    unfused: Callable[..., Tensor]


class _Owner(nn.Module):
    """Holds the modules of a chain, with the tensors that the graph was called with."""


class _BoundChain(Segment):
    """A chain whose modules hold the tensors that the graph was called with."""

    def __init__(self, name: str, paths: list[LayerPaths], modules: dict[str, nn.Module], training: bool) -> None:
        super().__init__(paths, [], [], [])
        self.name = name
        self.owner = _Owner()
        for layer in paths:
            for path in filter(None, layer[:2]):
                self.owner.add_module(path[0], modules[path[0]])
        self.owner.training = training

    def label(self) -> str:
        return self.name


class _JoinedChain(_BoundChain):
    """Consecutive chains as one. Where it declines, they run one by one, and report why."""

    def _declined(self, reason: str | None) -> Tensor | None:
        return None


class _Binding:
    """The chains of a runner, bound to the tensors that it was called with."""

    def __init__(self, runner: Runner, inputs: tuple[Any, ...]) -> None:
        self.inputs = inputs
        given = dict(zip(runner.nodes, inputs, strict=True))
        modules = {layer.name: layer.module(given) for chain in runner.chains for layer in chain.layers}
        self.chains = [
            (
                _BoundChain(chain.name, chain.paths, modules, runner.training),
                chain.unfused,
                [given[n] for n in nodes_of(chain.layers)],
            )
            for chain in runner.chains
        ]
        self._sequence: _Sequence | None = None
        self.joined = None
        if len(runner.chains) > 1:
            self.joined = _JoinedChain(runner.chains[0].name, _joined_paths(runner.chains), modules, runner.training)
        # For contiguous images PyTorch returns contiguous ones, whatever the layout between the chains.
        self.contiguous = not any_channels_last(m for m in modules.values() if isinstance(m, nn.Conv2d))

    def run(self, x: Tensor) -> Tensor:
        if self.joined is not None and _is_small_batch(x):
            y = self.joined.fused(x)
            if y is not None:
                return y
        whole = self._packed_whole(x)
        if whole is not None and self._sequence is not None and self._sequence.serves(whole, x):
            return self._laid_out(self._sequence.run(x), x)
        y = x
        for chain, unfused, inputs in self.chains:
            z = chain.fused(y, channels_last=self.contiguous)
            y = unfused(y, *inputs) if z is None else z
        bound = [chain for chain, *_ in self.chains]
        self._sequence = None if whole is None else _Sequence.of(whole, x, bound, self.contiguous)
        return self._laid_out(y, x)

    def _laid_out(self, y: Tensor, x: Tensor) -> Tensor:
        return laid_out(y, x) if self.contiguous else y

    def _packed_whole(self, x: Tensor) -> Chain | None:
        """All layers as one packed chain, if they can run as they are: checked once, not for each chain."""
        joined = self.joined
        if joined is None or joined.training or backends.kind(x) != "cpu" or autocast_dtype(x) is not None:
            return None
        whole, _, _ = joined.packed(x, None)
        return None if whole is None or (torch.is_grad_enabled() and whole.requires_grad()) else whole


@dataclass(eq=False)
class _Sequence:
    """Chains that ran one after the other while ``whole`` was valid: its guard watches the modules of all of them."""

    whole: Chain
    dtype: torch.dtype
    chains: list[Chain]
    contiguous: bool

    @classmethod
    def of(cls, whole: Chain, x: Tensor, chains: list[_BoundChain], contiguous: bool) -> _Sequence | None:
        packed = [chain._chain for chain in chains]
        if not all(isinstance(chain, Chain) for chain in packed):
            return None
        return cls(whole, x.dtype, cast(list[Chain], packed), contiguous)

    def serves(self, whole: Chain, x: Tensor) -> bool:
        return self.whole is whole and self.dtype == x.dtype and not (x.requires_grad and torch.is_grad_enabled())

    def run(self, x: Tensor) -> Tensor:
        for chain in self.chains:
            y = chain.run(x)
            x = laid_out(y, x) if chain.stays_contiguous and not self.contiguous else y
        return x


def _is_small_batch(x: Tensor) -> bool:
    return x.dim() == 4 and x.shape[0] <= _SMALL_BATCH and backends.kind(x) == "cpu"


def _joined_paths(chains: Sequence[GraphChain]) -> list[LayerPaths]:
    """The paths of all layers: each chain reads the result of the one before it."""
    paths: list[LayerPaths] = []
    for chain in chains:
        start = len(paths)
        for layer in chain.paths:
            residual = None if layer.residual is None else layer.residual + start
            paths.append(layer._replace(source=layer.source + start, residual=residual))
    return paths


class Runner:
    """``runner(x, *inputs)`` runs chains one after the other on ``x``; ``inputs`` are the values of ``nodes``.

    The first call with these tensors makes modules of them, kept for the next call with all that is packed from them.
    They hold the tensors until the compiled graph goes (``torch.compiler.reset()``) or 64 others were given since.
    """

    def __init__(self, training: bool, chains: list[GraphChain]) -> None:
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
