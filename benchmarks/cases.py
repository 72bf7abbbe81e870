"""What is measured: whole networks and single operators, each as a plain module that knows its fast twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast import reference
from resnet_fast.chain.executor import FusedModule
from resnet_fast.chain.record import GraphBuilder

from .images import KINDS, images

__all__ = ["FUSED", "FUSED_SMALL", "NETWORKS", "OPERATORS", "UNFUSED", "Case", "Twin"]


class Twin(nn.Module):
    """A module in plain PyTorch that can make its fast twin, with the same weights."""

    # Error allowed, as a multiple of eager PyTorch's.
    error_factor: ClassVar[float] = 2.0
    # Of its outputs, those from here on are judged together, each in units of its norm.
    together: ClassVar[int | None] = None

    def fast(self) -> Twin:
        raise NotImplementedError

    def compiled(self) -> nn.Module:
        return torch.compile(self)  # type: ignore[return-value]


class Network(Twin):
    """A network that returns its last feature map beside its output: what is timed is what was verified."""

    def __init__(self, name: str, net: Any) -> None:
        super().__init__()
        self.name = name
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.net.features(x)
        if isinstance(self.net, reference.ResNet32):
            pooled = torch.flatten(self.net.avgpooling(features), 1)
            return features, F.softmax(self.net.classifier(pooled), dim=1)
        return features, self.net.fc(torch.flatten(self.net.avgpool(features), 1))

    def fast(self) -> Twin:
        net = getattr(resnet_fast, self.name)()
        net.load_state_dict(self.net.state_dict())
        return Network(self.name, net).eval()


class Foreign(Twin):
    """A ResNet of pytorchcv, which nobody here wrote; its fast twin is what ``fuse`` makes of it."""

    def __init__(self, name: str, module: str = "resnet") -> None:
        super().__init__()
        net = getattr(import_module(f"pytorchcv.models.{module}"), name)()
        *maps, pool = net.features.children()
        self.maps, self.pool, self.output = nn.Sequential(*maps), pool, net.output

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.maps(x)
        return maps, self.output(torch.flatten(self.pool(maps), 1))

    def fast(self) -> Twin:
        return resnet_fast.fuse(self)  # type: ignore[return-value]


class Unfused(Network):
    """A network with a hook on every convolution: all of it runs unfused, and the time is that of finding out."""

    def __init__(self, name: str, net: Any) -> None:
        super().__init__(name, net)
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                m.register_forward_hook(_nothing)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with resnet_fast.backends.use("auto"):  # who asks for a backend by name is told that it cannot run
            return super().forward(x)

    def fast(self) -> Twin:
        net = getattr(resnet_fast, self.name)()
        net.load_state_dict(self.net.state_dict())
        # Laid out as the baseline: what is compared is the way to PyTorch's own convolutions, not these.
        unfused: Any = Unfused(self.name, net).eval()
        return unfused.to(memory_format=torch.channels_last)


def _nothing(module: nn.Module, inputs: Any, output: Any) -> None:
    pass


class TrainingStep(Twin):
    """Forward and backward of ``net`` in training mode: its last maps, and the gradients of its convolutions."""

    # A weight gradient by Winograd's algorithm may err that much; whole networks stay below.
    error_factor = 3.0
    # Where rounding turns the sign that a ReLU sees, gradients jump, by chance in one weight of one variant.
    together = 1

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weights = [p for p in self.net.parameters() if p.dim() == 4]
        self.net.train()
        self.net.zero_grad()
        with torch.enable_grad():
            maps, scores = self.net(x)
            scores.square().mean().backward()
        return maps.detach(), *(w.grad for w in weights if w.grad is not None)

    def fast(self) -> Twin:
        return TrainingStep(resnet_fast.fuse(self.net))

    def compiled(self) -> nn.Module:
        return TrainingStep(torch.compile(self.net))  # type: ignore[arg-type]


class ConvBnRelu(Twin):
    """relu(bn(conv(x))), 3x3 with stride 1 and as many channels out as in."""

    # Of a single convolution, for which Winograd's transforms are allowed that much; whole networks keep to 2.
    error_factor = 3.0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))

    def fast(self) -> Twin:
        twin = FusedConvBnRelu(self.conv.out_channels).eval()
        twin.load_state_dict(self.state_dict())
        return twin


class FusedConvBnRelu(FusedModule, ConvBnRelu):
    """With packed filters, as it runs inside a network."""

    def emit(self, builder: GraphBuilder, x: Any) -> Any:
        return builder.conv(self.conv, self.bn, x, relu=self.relu)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fused(x)
        return super().forward(x) if y is None else y


class AddRelu(Twin):
    """relu(x + residual)"""

    residual: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("residual", torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.residual)

    def fast(self) -> Twin:
        twin = FusedAddRelu(tuple(self.residual.shape)).eval()
        twin.load_state_dict(self.state_dict())
        return twin


class FusedAddRelu(AddRelu):
    def forward(self, x: Tensor) -> Tensor:
        return resnet_fast.ops.add_relu(x, self.residual)


@dataclass(frozen=True)
class Case:
    """One row group of the report: a model, the shape of its input and how to make both."""

    model: str
    shape: tuple[int, int, int, int]
    make: Callable[[], Twin]
    kinds: tuple[str, ...] = ("random",)
    full: bool = False  # measured with --full only
    what: str = "inference"
    variants: tuple[str, ...] | None = None  # measured by these alone

    @property
    def size(self) -> int:
        """Numbers in its input: which of the cases is the smallest?"""
        return prod(self.shape)

    @property
    def group(self) -> str:
        return f"{self.model}, {'x'.join(map(str, self.shape))}, {self.what}"

    def build(self) -> Twin:
        """The module in eval mode, the same in every run; statistics and affine weights as training leaves them."""
        torch.manual_seed(0)
        module = self.make()
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        for bn in norms:
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias, std=0.1)
            bn.momentum = None  # a plain mean over the batches below
        with torch.no_grad():
            for kind in self.kinds if norms else ():
                module(self._input(kind, max(8, min(self.shape[0], 32))))
        for bn in norms:
            bn.momentum = 0.1
        return module.eval()

    def input(self, kind: str) -> Tensor:
        return self._input(kind, self.shape[0])

    def _input(self, kind: str, batch: int) -> Tensor:
        _, channels, height, width = self.shape
        if channels == 3:
            return images(kind, batch, height)
        return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(channels))


def _network(name: str, batch: int, size: int, full: bool = False) -> Case:
    return Case(name, (batch, 3, size, size), lambda: Network(name, getattr(reference, name)()), KINDS, full)


NETWORKS = [
    _network("ResNet32", 8, 224),
    _network("ResNet32", 1, 224),
    _network("cifar_resnet32", 128, 32),
    _network("cifar_resnet32", 1, 32),
    _network("resnet18", 8, 224, full=True),
    _network("resnet50", 8, 224, full=True),
]


def _unfused(name: str, batch: int, size: int) -> Case:
    return Case(
        f"{name}, hooks",
        (batch, 3, size, size),
        lambda: Unfused(name, getattr(reference, name)()),
        ("photographs",),
        variants=("eager", "eager channels_last", "resnet_fast"),
    )


# Where the kernels take little of the time, and where they take most.
UNFUSED = [_unfused("cifar_resnet20", 1, 32), _unfused("resnet18", 1, 224)]


def _foreign(name: str, batch: int, size: int = 224, module: str = "resnet", full: bool = True) -> list[Case]:
    shape, title = (batch, 3, size, size), f"pytorchcv's {name}"
    return [
        Case(title, shape, lambda: Foreign(name, module), KINDS, full),
        Case(title, shape, lambda: TrainingStep(Foreign(name, module)), KINDS, full, what="training"),
    ]


FUSED = [case for name in ("resnet18", "resnet34", "resnet50") for case in _foreign(name, 8)]
FUSED_SMALL = _foreign("resnet20_cifar10", 8, 32, "resnet_cifar", full=False)

# The four stages of the ImageNet networks, the three of the CIFAR networks.
MAPS = [(8, 64, 56), (8, 128, 28), (8, 256, 14), (8, 512, 7), (128, 16, 32), (128, 32, 16), (128, 64, 8)]


def _operator(name: str, make: Callable[[tuple[int, int, int, int]], Twin]) -> list[Case]:
    shapes = [(batch, channels, side, side) for batch, channels, side in MAPS]
    return [Case(name, shape, lambda shape=shape: make(shape)) for shape in shapes]  # type: ignore[misc]


OPERATORS = {
    "conv_bn_relu": _operator("conv_bn_relu", lambda shape: ConvBnRelu(shape[1])),
    "add_relu": _operator("add_relu", AddRelu),
}
