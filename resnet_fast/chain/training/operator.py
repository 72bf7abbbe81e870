"""Chain training as operators for ``torch.compile``: ``train_chain`` and ``train_chain_backward``.

``train_chain(x, tensors, present, fields, eps, batch, recompute)`` runs :mod:`.driver` on the device of ``x``.
``tensors`` are those of ``TENSORS`` a layer that ``present`` marks, because a list of tensors has no gaps. ``fields``
are the integers of ``conv_chain``; ``batch`` marks the layers normalised by batch statistics.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...ops.arguments import DTYPES, check_tensor, raised, shapeless
from ...ops.differentiation import Registry
from ...ops.register import without_gradient
from ...ops.spec import INTEGERS, check_values, conv_size, decode, empty_image
from ...ops.training import statistics_rows
from .layers import TENSORS, Layer, SavedTensors, dense, layers_of, unpacked
from .passes import Passes


def _spread(given: list[Tensor], present: list[bool]) -> list[Tensor | None]:
    rest = iter(given)
    return [next(rest) if there else None for there in present]


def _layers(present: list[bool], fields: list[int], eps: list[float], batch: list[bool]) -> list[Layer]:
    normalized = [own or there for own, there, _ in zip(batch, present[4::TENSORS], eps, strict=True)]
    layers = layers_of(decode(fields), eps, normalized, batch)
    if any((layer.relu or layer.residual >= 0) and not layer.normalized for layer in layers):
        raise ValueError("a ReLU or a sum without batch norm")
    return layers


@lru_cache(maxsize=64)  # more chains than a network has
def _passes(present: tuple[bool, ...], fields: tuple[int, ...], eps: tuple[float, ...], batch: tuple[bool, ...]) -> Any:
    return Passes(_layers(list(present), list(fields), list(eps), list(batch)))


def train_chain(x: Tensor, tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    """The result, [mean; variance] of each layer, and what else the backward needs: ys, then residual sums."""
    try:
        return _forward(x, tensors, *rest)
    except Exception:
        wrong = raised(_check, "train_chain", {"x": [x]}, tensors, *rest[:-1])
        if wrong is not None:
            raise wrong from None
        raise


def train_chain_backward(
    grad: Tensor, x: Tensor, tensors: list[Tensor], saved: list[Tensor], *rest: Any
) -> list[Tensor]:
    """Gradients of x and of ``tensors``, those that ``needs`` marks.

    saved: the results of ``train_chain`` without the first; the first at the end, if it is a residual sum that is not
    recomputed.
    """
    try:
        return _gradients(grad, x, tensors, saved, *rest)
    except Exception:
        wrong = raised(_check_backward, grad, x, tensors, saved, *rest)
        if wrong is not None:
            raise wrong from None
        raise


def _check(op: str, images: dict[str, list[Tensor]], tensors: list[Tensor], *settings: Any) -> None:
    """Raises RuntimeError for the first wrong argument, by name; ``images``: image arguments by name."""
    present, fields, eps, batch = settings
    count = len(eps)
    for name, values, wanted in (
        ("present", present, TENSORS * count),
        ("fields", fields, INTEGERS * count),
        ("batch", batch, count),
        ("tensors", tensors, sum(present)),
    ):
        if count == 0 or len(values) != wanted:
            raise RuntimeError(f"{op}: {name} has {len(values)} items, want {wanted} for the {count} layers of eps")
    (x,) = images["x"]
    for name, t in ((name, t) for name, several in images.items() for t in several):
        check_tensor(f"{op}: {name}", t, ("x", x))
        if t.dim() != 4 or t.numel() == 0 or t.dtype != x.dtype:
            raise RuntimeError(f"{op}: {name} is {list(t.shape)} of {t.dtype}, want an image in the dtype of x")
    spread = _spread(tensors, present)
    specs = decode(fields)
    check_values(f"{op}: fields", specs)
    for i, spec in enumerate(specs):
        weight, *vectors = spread[TENSORS * i : TENSORS * (i + 1)]
        if weight is None or (vectors[3] is None) != (vectors[4] is None) or (vectors[3] is not None and batch[i]):
            raise RuntimeError(f"{op}: present and batch want a weight in layer {i}, and statistics or the batch's own")
        if vectors[3] is None and not batch[i] and (spec.residual >= 0 or spec.relu):
            raise RuntimeError(f"{op}: batch has False for layer {i}, which has a ReLU or a sum, but no statistics")
        for t in (weight, *(v for v in vectors if v is not None)):
            check_tensor(f"{op}: tensors", t, ("x", x))
            fits = t.shape == weight.shape[: 4 if t is weight else 1] and weight.dim() == 4 and weight.numel() > 0
            if not fits or t.dtype not in DTYPES.get(backends.kind(x), (t.dtype,)):
                raise RuntimeError(
                    f"{op}: tensors has {list(t.shape)} of {t.dtype} in layer {i}, want [K, C, R, S], [K]"
                )


def _check_backward(grad: Tensor, x: Tensor, tensors: list[Tensor], saved: list[Tensor], *rest: Any) -> None:
    op, (*settings, needs) = "train_chain_backward", rest
    count = len(settings[2])
    _check(op, {"x": [x], "grad": [grad], "saved": saved[count:]}, tensors, *settings)
    if len(needs) != 1 + len(tensors):
        raise RuntimeError(f"{op}: needs has {len(needs)} items, want {1 + len(tensors)}: of x and of tensors")
    layers, weights = _layers(*settings), _spread(tensors, settings[0])[::TENSORS]
    if len(saved) < 2 * count - (not layers[-1].normalized):
        raise RuntimeError(f"{op}: saved has {len(saved)} items, fewer than train_chain gives for {count} layers")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for layer, weight, stats in zip(layers, weights, saved, strict=False):
        check_tensor(f"{op}: saved", stats, ("x", x))
        channels = weight.shape[0] if layer.normalized and weight is not None else 0
        if stats.shape != (2, channels) or stats.dtype != dtype:
            got = f"{list(stats.shape)} of {stats.dtype}"
            raise RuntimeError(f"{op}: saved has {got}, want mean and variance, [2, {channels}] of {dtype}")
    sizes = [tuple(x.shape[2:])]
    for i, layer in enumerate(layers):
        if min(layer.stride) < 1:
            raise RuntimeError(f"{op}: fields has layer {i} of stride {layer.stride}, want at least 1")
        steps = zip(sizes[layer.source], layer.padding, layer.kernel, layer.stride, strict=True)
        sizes.append(tuple(conv_size(*step) for step in steps))
    if grad.shape[0] != x.shape[0] or grad.shape[2:] != sizes[-1]:
        wanted = f"{x.shape[0]} images of {list(sizes[-1])}"
        raise RuntimeError(f"{op}: grad has shape {list(grad.shape)}, want {wanted}")


def _forward(x: Tensor, tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    *settings, recompute = rest
    out, saved = _passes(*map(tuple, settings)).forward(dense(x), _spread(tensors, settings[0]), recompute, ())
    inner = [s for s, y in zip(saved.sums[:-1], saved.ys, strict=False) if s is not None and s is not y]
    return [out, *saved.stats, *(y for y in saved.ys if y is not None), *inner]


def _gradients(grad: Tensor, x: Tensor, tensors: list[Tensor], saved: list[Tensor], *rest: Any) -> list[Tensor]:
    *settings, needs = rest
    passes, spread = _passes(*map(tuple, settings)), _spread(tensors, settings[0])
    layers, count = passes.layers, len(passes.layers)
    stats, images = list(map(unpacked, saved[:count])), map(unpacked, saved[count:])
    ys = [next(images) if i < count - 1 or layer.normalized else None for i, layer in enumerate(layers)]
    sums: list[Tensor | None] = []
    for i, layer in enumerate(layers):
        lazy = layer.normalized and layer.residual < 0
        sums.append(None if lazy else next(images, None) if layer.residual >= 0 else ys[i])
    missing: list[Tensor | None] = [None] * count
    wanted = iter(needs[1:])
    needed = [needs[0], *(there and next(wanted) for there in settings[0])]
    complete = SavedTensors(ys, sums, missing.copy(), stats, missing, missing)
    grads = passes.backward(dense(x), complete, spread, needed, grad)
    return [g for g, need in zip(grads, needed, strict=True) if need and g is not None]


def _fake(x: Tensor, tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    *settings, recompute = rest
    layers, weights = _layers(*settings), _spread(tensors, settings[0])[::TENSORS]
    images, stats = [x], []
    for layer, weight in zip(layers, weights, strict=True):
        assert weight is not None
        sizes = zip(images[layer.source].shape[2:], layer.padding, layer.kernel, layer.stride, strict=True)
        images.append(empty_image(x, weight.shape[0], *(conv_size(*size) for size in sizes)))
        stats.append(statistics_rows(x, 2, weight.shape[0] if layer.normalized else 0))
    ys = images[1:] if layers[-1].normalized else images[1:-1]
    sums = [] if recompute else [y for y, layer in zip(images[1:-1], layers, strict=False) if layer.residual >= 0]
    return [torch.empty_like(t) for t in (images[-1], *stats, *ys, *sums)]


def _fake_backward(grad: Tensor, x: Tensor, tensors: list[Tensor], saved: list[Tensor], *rest: Any) -> list[Tensor]:
    *_, needs = rest
    image = [empty_image(x, *x.shape[1:])] if needs[0] else []
    return image + [torch.empty_like(t) for t, need in zip(tensors, needs[1:], strict=True) if need]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, tensors, *settings, recompute = inputs
    layers = _layers(*settings)
    out, *saved = output
    ctx.settings, ctx.count = settings, len(tensors)
    last = [out] if layers[-1].residual >= 0 and not recompute else []
    ctx.save_for_backward(x, *tensors, *saved, *last)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, *saved = ctx.saved_tensors
    tensors, saved = saved[: ctx.count], saved[ctx.count :]
    # As in PyTorch, given statistics have no gradient.
    parameters = [i % TENSORS < 4 for i, there in enumerate(ctx.settings[0]) if there]
    own = zip(ctx.needs_input_grad[1], parameters, strict=True)
    needs = [ctx.needs_input_grad[0], *(need and parameter for need, parameter in own)]
    results: Any = iter([])
    if grads[0] is not None:
        results = iter(torch.ops.resnet_fast.train_chain_backward(grads[0], x, tensors, saved, *ctx.settings, needs))
    grad_x, *others = (next(results, None) if need else None for need in needs)
    return grad_x, others, None, None, None, None, None


def _register() -> None:
    library = Registry("resnet_fast", "IMPL", {})
    library.impl("train_chain", train_chain, "CompositeExplicitAutograd")
    library.impl("train_chain_backward", train_chain_backward, "CompositeExplicitAutograd")
    for op, fake in (("train_chain", _fake), ("train_chain_backward", _fake_backward)):
        torch.library.register_fake(f"resnet_fast::{op}", shapeless(op, fake), lib=library)
    torch.library.register_autograd("resnet_fast::train_chain", _backward, setup_context=_setup, lib=library)
    torch.library.register_autograd(
        "resnet_fast::train_chain_backward", without_gradient("train_chain_backward"), lib=library
    )
    # Registrations live as long as their library object.
    globals()["_library"] = library


if backends.loaded():
    _register()
