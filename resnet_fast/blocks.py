"""Residual blocks and stages that run as one operator in eval mode, and as one autograd function in training.

Each subclasses its twin in :mod:`resnet_fast.reference` and states its dataflow in ``emit``. Where no kernel can run
it, the twin's ``forward`` does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import reference
from .chain.executor import FusedModule
from .chain.record import GraphBuilder

__all__ = ["BasicBlock", "Block", "Bottleneck", "Stage"]


def _shortcut(builder: GraphBuilder, downsample: nn.Module | None, x: Any) -> Any:
    parts = [] if downsample is None else list(downsample) if isinstance(downsample, nn.Sequential) else [downsample]
    builder.needs(*parts)
    builder.leftover(*parts[2:])
    return builder.conv(parts[0], parts[1] if len(parts) > 1 else None, x) if parts else x


class Block(FusedModule, reference.Block):
    __doc__ = reference.Block.__doc__

    def emit(self, builder: GraphBuilder, x: Any) -> Any:
        builder.needs(self.bn1, self.relu1, self.bn2, self.relu2)
        y = builder.conv(self.conv1, self.bn1, x, relu=self.relu1)
        shortcut = _shortcut(builder, self.downsample, x)
        return builder.conv(self.conv2, self.bn2, y, relu=self.relu2, residual=shortcut)

    def parts(self) -> list[nn.Module]:
        """All but the dropout, which runs after the fused operator."""
        return [module for module in self.modules() if module is not self.dropout]

    def forward(self, x: Tensor) -> Tensor:
        y = self.fused(x)
        return super().forward(x) if y is None else self.dropout(y)


class BasicBlock(FusedModule, reference.BasicBlock):
    __doc__ = reference.BasicBlock.__doc__

    def emit(self, builder: GraphBuilder, x: Any) -> Any:
        builder.needs(self.bn1, self.relu, self.bn2)
        y = builder.conv(self.conv1, self.bn1, x, relu=self.relu)
        shortcut = _shortcut(builder, self.downsample, x)
        return builder.conv(self.conv2, self.bn2, y, relu=self.relu, residual=shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fused(x)
        return super().forward(x) if y is None else y


class Bottleneck(FusedModule, reference.Bottleneck):
    __doc__ = reference.Bottleneck.__doc__

    def emit(self, builder: GraphBuilder, x: Any) -> Any:
        builder.needs(self.bn1, self.relu, self.bn2, self.bn3)
        y = builder.conv(self.conv1, self.bn1, x, relu=self.relu)
        y = builder.conv(self.conv2, self.bn2, y, relu=self.relu)
        shortcut = _shortcut(builder, self.downsample, x)
        return builder.conv(self.conv3, self.bn3, y, relu=self.relu, residual=shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fused(x)
        return super().forward(x) if y is None else y


class Stage(FusedModule, nn.Sequential):
    """``nn.Sequential`` of residual blocks that runs as one operator, or block by block where that cannot run."""

    def emit(self, builder: GraphBuilder, x: Any) -> Any:
        for block in self:
            x = builder.block(block, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        y = self.fused(x)
        return super().forward(x) if y is None else y
