"""A whole network as one operator: from the image to the scores where a GPU has kernels for all of it, on CPUs to the
last feature map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import residual_network
from .chain import Chain, Fused, Recorder
from .watch import hooks_reason, uncounted_reason

__all__ = ["Whole"]


class Whole:
    """What a network in eval mode was packed into, for as long as the network stays as it is.

    Where it cannot run whole, its stem and stages run as operators of their own and say why where these fall back.
    """

    def __init__(self) -> None:
        self._chain: Chain | None = None

    def _ready(self, model: Any, x: Tensor) -> tuple[Chain, Tensor] | None:
        """The chain of all convolutions and ``x`` in the dtype that it wants, where no gradient is asked for."""
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if model.training or model.cannot_run(x, False, autocast) is not None:
            return None
        chain = self._chain
        if chain is None or not chain.fresh():
            chain = self._chain = _record(model)
        if chain is None or x.device != chain.device:
            return None
        x = x if autocast is None or torch.float64 in (x.dtype, chain.dtype) else x.to(autocast)
        if autocast is None and x.dtype != chain.dtype:
            return None
        wanted = torch.is_grad_enabled() and (x.requires_grad or chain.requires_grad() or model.fc.weight.requires_grad)
        return None if wanted else (chain, x)

    def features(self, model: Any, x: Tensor) -> Tensor | None:
        """``model.features(x)`` as one chain, or None."""
        ready = self._ready(model, x)
        return None if ready is None else ready[0].run(ready[1])

    def scores(self, model: Any, x: Tensor) -> Tensor | None:
        """``model(x)`` for a network of ``stem``, ``layer1`` to ``layer3``, ``avgpool`` and ``fc``, or None."""
        ready = self._ready(model, x) if residual_network.kernels() else None
        if ready is None:
            return None
        chain, x = ready
        head = (model.fc.weight, model.fc.bias)
        stages = chain.stages(x)
        if stages is None or not residual_network.has_head(stages) or head[0].shape[1] != stages[-1].channels:
            return None
        return chain.run_stages(x, stages, head)


def _record(model: Any) -> Chain | None:
    """The convolutions of the network, if nothing but pooling and the linear layer lies between and behind them."""
    parts = list(model.modules())
    head = [model.avgpool, model.fc]
    if type(head[0]) is not nn.AdaptiveAvgPool2d or head[0].output_size not in (1, (1, 1)):
        return None
    if type(head[1]) is not nn.Linear:
        return None
    recorder = Recorder()
    value = model.flow(recorder, 0)
    for stage in (model.layer1, model.layer2, model.layer3):
        if not isinstance(stage, Fused):
            return None
        value = recorder.block(stage, value)
    if recorder.reason([m for m in parts if m not in head]) or hooks_reason(parts) or uncounted_reason(parts):
        return None
    return Chain(parts, recorder) if head[1].weight.dtype == model.conv1.weight.dtype else None
