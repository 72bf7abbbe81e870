"""Eval mode with gradients on CPUs: a chain whose batch norms take given statistics, as one autograd function.

With given statistics batch norm is affine, ``z = a * y + shift`` with ``a = gamma / std``. Its backward needs no
reduction first, and folds into that of the convolution before it:

    forward    y_i = conv(relu(a * y_j + shift)), the batch norm of y_j applied as y_j is read
    backward   g = the gradient of z behind the ReLU
               input: conv^T(g, a * W)     W: a * (the gradient of a * W)     bias: a * sum(g)
               gamma: (sum(g * y) - mean * sum(g)) / std                      beta: sum(g)

Saved, for layers whose gradients may be wanted: ``y``, or with a residual connection the result behind the ReLU, and
``y`` as well where gamma needs a gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import backends
from ...ops.differentiation import first_order, gradients_again, wanted
from ..cpu_algorithm import DIRECT, training_algorithm
from ..layout import laid_out
from ..record import sources_of
from .function import Program, _EagerChain
from .layers import TENSORS, Layer, dense, unpacked

__all__ = ["FrozenProgram", "frozen"]


def frozen(program: Program) -> bool:
    """Whether the chain is on the CPU and all its batch norms take given statistics, whatever its mode."""
    on_cpu = all(backends.kind(conv.weight) == "cpu" for conv, _ in program.pairs)
    return on_cpu and any(program.normalized) and not any(program.batch)


class FrozenProgram(Program):
    """A recorded chain, to be run in eval mode where a gradient is wanted."""

    def sources(self) -> list[Tensor | None]:
        """``TENSORS`` of each layer."""
        return [t for conv, bn in self.pairs for t in sources_of(conv, bn)]

    def requires_grad(self) -> bool:
        return any(t is not None and t.requires_grad for t in self.sources())

    def _run(self, x: Tensor) -> Tensor:
        # GPUs run the training passes, which are replayed, and whose kernels take given statistics, too.
        if backends.training.recompute_outputs or backends.kind(x) != "cpu":
            return super()._run(x)
        return _Frozen.apply(self.layers, x, *self.sources())


class _Value(NamedTuple):
    """A chain's input or a layer's result: a tensor, with the affine and ReLU to apply as it is read."""

    tensor: Tensor
    affine: Tensor | None = None  # [a; shift]
    relu: bool = False


class _Norms:
    """By layer, ``[a; shift]`` and ``1 / std``; None without batch norm."""

    def __init__(self, layers: list[Layer], tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> None:
        normalized = [i for i, layer in enumerate(layers) if layer.normalized]
        self.affine: list[Tensor | None] = [None] * len(layers)
        self.inv_std: list[Tensor | None] = [None] * len(layers)
        if not normalized:
            return

        def wide(k: int) -> list[Any]:
            found = (tensors[TENSORS * i + k] for i in normalized)
            return [None if t is None else t.detach().to(dtype) for t in found]

        gammas, betas, means, variances = map(wide, range(2, 6))
        inv_std = list(torch._foreach_add(variances, [layers[i].eps for i in normalized]))
        torch._foreach_rsqrt_(inv_std)
        scales: Any = [s if g is None else s * g for s, g in zip(inv_std, gammas, strict=True)]
        moved = torch._foreach_mul(means, scales)
        for i, std, scale, move, beta in zip(normalized, inv_std, scales, moved, betas, strict=True):
            self.affine[i] = torch.stack((scale, -move if beta is None else beta - move))
            self.inv_std[i] = std


class _Needs:
    """What the backward must compute, derived from the arguments that require a gradient."""

    def __init__(self, layers: list[Layer], needs: list[bool]) -> None:
        """needs: whether the gradient of x, and of each of the tensors, is wanted."""
        self.of = needs
        self.values = [needs[0]]  # by value: whether its gradient is wanted
        self.readers: dict[int, list[int]] = {}
        for i, layer in enumerate(layers):
            inputs = {layer.source, layer.residual} - {-1}
            for value in inputs:
                self.readers.setdefault(value, []).append(i)
            self.values.append(any(self.layer(i)) or any(self.values[value] for value in inputs))

    def layer(self, i: int) -> list[bool]:
        """Whether the gradients of weight, bias, gamma and beta are wanted."""
        return self.of[1 + TENSORS * i : 5 + TENSORS * i]

    def operand(self, value: int) -> bool:
        """Whether the gradient of a weight is computed from this value."""
        return any(self.layer(i)[0] for i in self.readers.get(value, ()))


class _SavedTensors(NamedTuple):
    """By layer: ``y`` before batch norm and the written result, each None where the backward does not read it; and
    their shape."""

    ys: list[Tensor | None]
    results: list[Tensor | None]
    shapes: list[torch.Size]


def _forward(
    layers: list[Layer], x: Tensor, tensors: tuple[Tensor | None, ...], norms: _Norms, needs: _Needs, direct: bool
) -> tuple[Tensor, _SavedTensors, bool]:
    """The result, the saved tensors, and whether Winograd ran, which spreads NaN; ``direct``: without Winograd."""
    convolve = torch.ops.resnet_fast.conv_bn_stats.default
    values: dict[int, _Value] = {0: _Value(x)}
    saved, spreads = _SavedTensors([], [], []), False
    last_reader = {value: i for i, layer in enumerate(layers) for value in (layer.source, layer.residual)}
    added = {layer.residual for layer in layers}
    for i, layer in enumerate(layers):
        weight, bias = tensors[TENSORS * i : TENSORS * i + 2]
        assert weight is not None
        source = values[layer.source]
        algorithm = DIRECT if direct else training_algorithm(weight, layer.stride, source.tensor, given=True)
        spreads = spreads or algorithm != DIRECT
        y, _ = convolve(*source, weight, bias, layer.stride, layer.padding, algorithm, False)
        value = _Value(y, norms.affine[i], layer.relu)
        if layer.residual >= 0:
            value = _Value(_apply(value, values[layer.residual]))
        elif layer.normalized and (i + 1 == len(layers) or (layer.relu and i + 1 in added)):
            value = _Value(_apply(value))  # a residual sum cannot apply the ReLU as it reads
        values[i + 1] = value
        for read in {layer.source, layer.residual} - {-1}:
            if last_reader[read] == i:
                del values[read]
        _save(saved, i, layer, y, value, needs)
    return values[len(layers)].tensor, saved, spreads


def _save(saved: _SavedTensors, i: int, layer: Layer, y: Tensor, value: _Value, needs: _Needs) -> None:
    """Appends what the backward reads of ``y``, the convolution's output, and ``value``, the layer's result."""
    masks = layer.relu and needs.values[i + 1]
    read = masks or needs.operand(i + 1)
    written = value.tensor is not y or value.affine is None
    wants_y = needs.layer(i)[2] or (read and not written)
    # A result written for the forward alone is not saved: the backward recomputes it from y as it reads.
    saved.results.append(value.tensor if written and read and (not wants_y or layer.residual >= 0) else None)
    saved.ys.append(y if wants_y else None)
    saved.shapes.append(y.shape)


def _apply(value: _Value, residual: _Value | None = None) -> Tensor:
    tensor, affine = (None, None) if residual is None else residual[:2]
    return torch.ops.resnet_fast.bn_apply.default(value.tensor, value.affine, tensor, affine, value.relu)


class _Backward:
    """One backward of a chain. Values are numbered as in the chain; layer ``value - 1`` computes ``value``."""

    def __init__(
        self,
        layers: list[Layer],
        x: Tensor,
        tensors: list[Tensor | None],
        norms: _Norms,
        saved: _SavedTensors,
        needs: _Needs,
    ) -> None:
        """Empties ``saved`` as it goes. tensors: the arguments of the chain."""
        self.layers, self.x, self.tensors, self.norms, self.saved, self.needs = layers, x, tensors, norms, saved, needs
        self.pending: dict[int, Tensor] = {}  # gradients of values, as far as accumulated
        self.masked: dict[int, tuple[Tensor, Tensor]] = {}  # the gradient behind a value's ReLU, and its reductions
        self.grads: list[Tensor | None] = [None] * len(needs.of)

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        """Gradients of x and of ``tensors``, None where not needed; ``grad``: that of the chain's result."""
        self.pending[len(self.layers)] = dense(grad.to(self.x.dtype))
        for i in reversed(range(len(self.layers))):
            if self.needs.values[i + 1]:
                self._layer(i)
            self.saved.ys[i] = self.saved.results[i] = None
        self.grads[0] = self.pending.get(0)
        return self.grads

    def _layer(self, i: int) -> None:
        layer, affine, at = self.layers[i], self.norms.affine[i], 1 + TENSORS * i
        need_weight, need_bias, need_gamma, need_beta = self.needs.layer(i)
        grad, sums = self._masked_gradient(i + 1)
        if layer.residual >= 0 and self.needs.values[layer.residual]:
            self._to_residual(i, grad, sums)
        if need_bias:
            self._set_gradient(at + 1, sums[0] if affine is None else sums[0] * affine[0])
        if need_gamma:
            inv_std = self.norms.inv_std[i]
            assert inv_std is not None
            self._set_gradient(at + 2, sums[1] * inv_std)
        if need_beta:
            self._set_gradient(at + 3, sums[0])
        need_x = self.needs.values[layer.source]
        if need_x or need_weight:
            self._convolution(i, grad, need_x, need_weight)

    def _set_gradient(self, argument: int, gradient: Tensor) -> None:
        """Stores a gradient in the dtype of its parameter, with memory of its own."""
        tensor = self.tensors[argument - 1]
        assert tensor is not None
        self.grads[argument] = gradient.to(tensor.dtype, copy=gradient._is_view())

    def _masked_gradient(self, value: int) -> tuple[Tensor, Tensor]:
        """The gradient g behind the ReLU of a value, and its reductions: sum(g), and sum(g * (y - mean)) for each y."""
        if value in self.masked:
            return self.masked.pop(value)
        i, grad = value - 1, self.pending.pop(value)
        ys, stats = self._reduction_inputs(value)
        if not self.layers[i].relu and not ys:
            wants = any(self.needs.layer(i)[1:])
            sums = torch.ops.resnet_fast.channel_sums.default(grad) if wants else grad.new_empty(0)
            return grad, sums[None]
        relu_source, affine = self._relu_source(i)
        return torch.ops.resnet_fast.bn_backward_reduce.default(grad, relu_source, affine, ys, stats)

    def _relu_source(self, i: int) -> tuple[Tensor | None, Tensor | None]:
        """A tensor, and an affine to apply to it: positive where the ReLU of layer ``i`` passes the gradient."""
        if not self.layers[i].relu:
            return None, None
        result = self.saved.results[i]
        return (self.saved.ys[i], self.norms.affine[i]) if result is None else (result, None)

    def _reduction_inputs(self, value: int) -> tuple[list[Tensor], list[Tensor]]:
        """The ys that a value's gradient is multiplied with and reduced, and their statistics."""
        i = value - 1
        projection = self._projection(i)
        read = [j for j in (i, projection) if j is not None and self.needs.layer(j)[2]]
        stats = [torch.stack(self.tensors[TENSORS * j + 4 : TENSORS * j + 6]).to(self._wide()) for j in read]  # type: ignore[arg-type]
        return [y for j in read if (y := self.saved.ys[j]) is not None], stats

    def _wide(self) -> torch.dtype:
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    def _projection(self, i: int) -> int | None:
        """The layer whose batch norm layer ``i`` adds, if no other layer reads it: they share reductions."""
        value = self.layers[i].residual
        if value <= 0 or self.needs.readers[value] != [i]:
            return None
        layer = self.layers[value - 1]
        return value - 1 if layer.normalized and not layer.relu and layer.residual < 0 else None

    def _to_residual(self, i: int, grad: Tensor, sums: Tensor) -> None:
        value, projection = self.layers[i].residual, self._projection(i)
        if projection is not None:
            second = 2 if self.needs.layer(i)[2] else 1
            self.masked[value] = (grad, sums[::second] if len(sums) > 1 else sums)
        elif value in self.pending:
            self.pending[value] = self.pending[value] + grad
        else:
            self.pending[value] = grad

    def _convolution(self, i: int, grad: Tensor, need_x: bool, need_weight: bool) -> None:
        """Accumulates the gradient of the layer's input, and masks it if complete; stores that of the weight."""
        layer, value, affine = self.layers[i], self.layers[i].source, self.norms.affine[i]
        weight = self.tensors[TENSORS * i]
        assert weight is not None
        by_channel = None if affine is None else affine[0].view(-1, 1, 1, 1)
        folded = weight if by_channel is None else weight.to(by_channel.dtype)
        if by_channel is not None and need_x:
            folded = folded * by_channel
        source = self._source(value)
        # The last contribution completes the gradient: the kernel also applies the ReLU's mask and reduces.
        last = need_x and value > 0 and self.needs.readers[value][0] == i and self.layers[value - 1].relu
        dx, dw, sums = torch.ops.resnet_fast.conv_backward.default(
            grad,
            None,
            None,
            *source,
            folded,
            layer.stride,
            layer.padding,
            training_algorithm(weight, layer.stride, source.tensor, True, need_x, given=True),
            need_x,
            need_weight,
            self.pending.pop(value, None) if need_x else None,
            last,
            *(self._reduction_inputs(value) if last else ([], [])),
        )
        if last:
            self.masked[value] = (dx, sums)
        elif need_x:
            self.pending[value] = dx
        if need_weight:
            self.grads[1 + TENSORS * i] = (dw if by_channel is None else dw.mul_(by_channel)).to(weight.dtype)

    def _source(self, value: int) -> _Value:
        """The input that a convolution read; uninitialised memory of its shape where no gradient needs it."""
        if value == 0:
            return _Value(self.x)
        result, y, layer = self.saved.results[value - 1], self.saved.ys[value - 1], self.layers[value - 1]
        if result is not None:
            return _Value(result)
        if y is not None:
            return _Value(y, self.norms.affine[value - 1], layer.relu)
        shape, strides = self.saved.shapes[value - 1], torch.channels_last
        return _Value(torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=strides))


class _Frozen(torch.autograd.Function):
    """``forward(layers, x, *TENSORS a layer) -> out``

    Saves ``x`` as given; if it is not channels_last, the backward copies it again. Second derivatives run the chain
    again on PyTorch's own operators.
    """

    @staticmethod
    def forward(ctx: Any, layers: list[Layer], x: Tensor, *tensors: Tensor | None) -> Tensor:
        image, wide = dense(x), torch.float64 if x.dtype == torch.float64 else torch.float32
        norms, needs = _Norms(layers, tensors, wide), _Needs(layers, list(ctx.needs_input_grad[1:]))
        # Skip the operators' autograd keys, which only raise.
        with torch._C._AutoDispatchBelowAutograd():
            out, saved, spreads = _forward(layers, image, tensors, norms, needs, False)
            # Winograd spreads a NaN over its whole tile, further than the filter's window: compute directly.
            if spreads and not math.isfinite(out.sum(dtype=wide).item()):
                out, saved, _ = _forward(layers, image, tensors, norms, needs, True)
        ctx.layers, ctx.norms, ctx.shapes = layers, norms, saved.shapes
        ctx.tensors = [False, *(t is not None for t in (x, *tensors))]
        ctx.save_for_backward(x, *saved.ys, *saved.results, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        layers, count = ctx.layers, len(ctx.layers)
        x, *rest = ctx.saved_tensors
        tensors, needs = rest[2 * count :], wanted(ctx)[1:]
        if not first_order(grad):
            return None, *gradients_again(_EagerChain(layers), [x, *tensors], needs, grad)
        # Unless the graph is retained, free each activation after its last use, not at the end of the backward.
        ctx.maybe_clear_saved_tensors()
        ys, results = ([unpacked(t) for t in rest[i * count : (i + 1) * count]] for i in range(2))
        saved = _SavedTensors(ys, results, ctx.shapes)
        del rest, ys, results
        with torch._C._AutoDispatchBelowAutograd():
            run = _Backward(layers, dense(x), tensors, ctx.norms, saved, _Needs(layers, needs))
            grad_x, *grads = run.gradients(grad)
            return None, None if grad_x is None else laid_out(grad_x, x), *grads
