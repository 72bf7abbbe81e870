"""A whole network as one operator, from the image to the scores, where a GPU has kernels for all of it."""

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

    def scores(self, model: Any, x: Tensor) -> Tensor | None:
        """``model(x)`` for a network of ``stem``, ``layer1`` to ``layer3``, ``avgpool`` and ``fc``, or None."""
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if model.training or model.cannot_run(x, False, autocast) is not None or not residual_network.kernels():
            return None
        chain = self._chain
        if chain is None or not chain.fresh():
            chain = self._chain = _record(model)
        if chain is None or x.device != chain.device:
            return None
        x = x if autocast is None else x.to(autocast)
        if autocast is None and x.dtype != chain.dtype:
            return None
        head = (model.fc.weight, model.fc.bias)
        if torch.is_grad_enabled() and (x.requires_grad or chain.requires_grad() or head[0].requires_grad):
            return None
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
    if type(head[1]) is not nn.Linear or head[1].weight.dtype != model.conv1.weight.dtype:
        return None
    recorder = Recorder()
    value = model.flow(recorder, 0)
    for stage in (model.layer1, model.layer2, model.layer3):
        if not isinstance(stage, Fused):
            return None
        value = recorder.block(stage, value)
    if recorder.reason([m for m in parts if m not in head]) or hooks_reason(parts) or uncounted_reason(parts):
        return None
    return Chain(parts, recorder)
