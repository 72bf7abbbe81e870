"""Residual blocks and stages that run as one operator in eval mode.

Each subclasses its twin in :mod:`resnet_fast.reference` and states its dataflow; in training mode, and wherever a
kernel is missing, the twin's own ``forward`` runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import reference
from .chain import Build, Fused

__all__ = ["BasicBlock", "Block", "Bottleneck", "Stage"]


def _shortcut(build: Build, downsample: Any, x: Any) -> Any:
    return x if downsample is None else build.conv(downsample[0], downsample[1], x)


class Block(Fused, reference.Block):
    __doc__ = reference.Block.__doc__

    def flow(self, build: Build, x: Any) -> Any:
        y = build.conv(self.conv1, self.bn1, x, relu=True)
        shortcut = _shortcut(build, self.downsample, x)
        return build.conv(self.conv2, self.bn2, y, relu=True, residual=shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fused(x)
        return super().forward(x) if y is None else y


class BasicBlock(Fused, reference.BasicBlock):
    __doc__ = reference.BasicBlock.__doc__

    def flow(self, build: Build, x: Any) -> Any:
        y = build.conv(self.conv1, self.bn1, x, relu=True)
        shortcut = _shortcut(build, self.downsample, x)
        return build.conv(self.conv2, self.bn2, y, relu=True, residual=shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fused(x)
        return super().forward(x) if y is None else y


class Bottleneck(Fused, reference.Bottleneck):
    __doc__ = reference.Bottleneck.__doc__

    def flow(self, build: Build, x: Any) -> Any:
        y = build.conv(self.conv1, self.bn1, x, relu=True)
        y = build.conv(self.conv2, self.bn2, y, relu=True)
        shortcut = _shortcut(build, self.downsample, x)
        return build.conv(self.conv3, self.bn3, y, relu=True, residual=shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fused(x)
        return super().forward(x) if y is None else y


class Stage(Fused, nn.Sequential):
    """A sequence of residual blocks that runs as one operator; its blocks run apart where that is not possible."""

    def flow(self, build: Build, x: Any) -> Any:
        block: Any  # of this module, so it has a flow
        for block in self:
            x = block.flow(build, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        y = self.fused(x)
        return super().forward(x) if y is None else y
