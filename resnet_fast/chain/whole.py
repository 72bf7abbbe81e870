"""A CIFAR network as one operator: from the images to the last feature map, in training as one autograd function.

On GPUs with kernels for all of it, one operator goes on to the scores. Called by
:class:`resnet_fast.models.CifarResNet`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from .executor import ChainExecutor, autocast_dtype
from .record import ChainRecorder, GraphBuilder, operator

__all__ = ["Whole"]


class Whole(ChainExecutor):
    """A network of ``stem``, ``layer1`` to ``layer3``, ``avgpool`` and ``fc`` as one chain.

    Where it cannot run whole, its stem and stages run as operators of their own, and count their own fallbacks.
    """

    stands_for = ("forward", "flat_features", "features", "stem", "flat")

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self.model.training

    def _stages(self) -> list[Any]:
        return [self.model.layer1, self.model.layer2, self.model.layer3]

    def _head(self) -> tuple[Any, Any]:
        """Pooling and linear layer; None for one that no kernel can replace, and that is no part of the chain then."""
        pool, linear = (getattr(self.model, name, None) for name in ("avgpool", "fc"))
        averages = type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1))
        return pool if averages else None, linear if type(linear) is nn.Linear else None

    def parts(self) -> list[nn.Module]:
        inside = (m for stage in self._stages() if stage is not None for m in stage.modules())
        return list(dict.fromkeys((*self.model.parts(), *inside, *(m for m in self._head() if m is not None))))

    def emit(self, builder: GraphBuilder, x: Any) -> Any:
        if isinstance(builder, ChainRecorder):
            builder.through([m for m in self._head() if m is not None], None)  # they run after the chain
        x = self.model.emit(builder, x)
        for stage in self._stages():
            x = builder.block(stage, x)
        return x

    def _declined(self, reason: str | None) -> Tensor | None:
        """No result and no count: the stages run next and count their own fallbacks."""
        return None

    def _wants_gradient(self, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(p.requires_grad for p in self.model.parameters())

    def wants_all_gradients(self, x: Tensor) -> bool:
        """In eval mode: whether a gradient is wanted from the first layer on, and kernels have the backward.

        Otherwise the network runs stage by stage: frozen stages as in inference, and without kernels for the backward
        PyTorch's operators compute it.
        """
        if not torch.is_grad_enabled() or backends.unfused_reason(operator(True), backends.kind(x)) is not None:
            return False
        return x.requires_grad or any(p.requires_grad for m in self.model.parts()[1:] for p in m.parameters())

    def features(self, x: Tensor, channels_last: bool) -> Tensor | None:
        """``model.features(x)`` as one chain; None where it runs stage by stage."""
        if not self.training and self._wants_gradient(x) and not self.wants_all_gradients(x):
            return None
        return self.fused(x, channels_last=channels_last)

    def scores(self, x: Tensor) -> Tensor | None:
        """``model(x)`` in eval mode on a GPU with kernels for all of it, else None."""
        if self.training or not backends.has_kernel("residual_network", "cuda") or self._wants_gradient(x):
            return None
        pool, linear = self._head()
        if pool is None or linear is None:
            return None
        chain, x, _ = self.packed(x, autocast_dtype(x))
        stages = None if chain is None else chain.gpu.stages_with_head(x)
        if chain is None or stages is None:
            return None
        if linear.in_features != stages[-1].channels or linear.weight.dtype != chain.dtype:
            return None
        return chain.gpu.scores(x, stages, (linear.weight, linear.bias))
