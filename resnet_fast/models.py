"""The fast networks: the twins in :mod:`resnet_fast.reference`, fused. Same constructors, same ``state_dict``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import backends, reference
from .blocks import BasicBlock, Block, Bottleneck, Stage
from .chain import compiling, patches
from .chain.executor import FusedModule
from .chain.layout import Observers, any_channels_last, is_channels_last, laid_out
from .chain.pooling import MaxPool2d, flat_average
from .chain.record import GraphBuilder
from .chain.whole import Whole
from .gpu.network import Replayed

__all__ = [
    "CifarResNet",
    "ResNet",
    "ResNet32",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
]


_OWN_CODE = (__name__, reference.__name__)


def _pools_its_stem(model: nn.Module, kind: type, behind: type, pool: nn.Module | None) -> bool:
    """Whether ``pooled_stem`` of ``model`` is ``pool(stem(x))``: nobody replaced it in ``behind``, or ``stem`` in
    ``kind``."""
    if type(model).stem is not kind.stem or "stem" in model.__dict__ or pool is None:  # type: ignore[attr-defined]
        return False
    return patches.is_original(kind, "stem") and patches.is_original(behind, "pooled_stem")


def _any_overridden(kinds: Sequence[type], methods: Sequence[str]) -> bool:
    """Whether one of ``kinds`` defines one of ``methods`` outside of this package."""
    for kind in kinds:
        own = vars(kind)
        for method in methods:
            if method in own and getattr(own[method], "__module__", None) not in _OWN_CODE:
                return True
    return False


class _Network(FusedModule):
    """What the families share: activations stay in channels_last between stages, unless someone observes them.

    As in PyTorch, a network of contiguous weights returns contiguous feature maps for contiguous images. Between its
    layers, the conversions would cost two copies of each activation.
    """

    def last_feature_map(self, x: Tensor) -> Tensor:
        """``features(x)`` in channels_last, stage by stage."""
        raise NotImplementedError(f"{type(self).__name__}.last_feature_map")

    def whole_feature_map(self, x: Tensor, channels_last: bool) -> Tensor | None:
        """``features(x)`` as one operator, in channels_last or in PyTorch's format; or None."""
        return None

    def features(self, x: Tensor) -> Tensor:
        if self._runs_own_code("features", ("stem", "pooled_stem"), x):
            y = self.whole_feature_map(x, False)
            if y is not None:
                return y
            if self._unobserved(x):
                return self._as_pytorch(self.last_feature_map(x), x)
        y = super().features(x)  # type: ignore[misc]
        # Fused operators in the graph return channels_last, whatever the format of the images.
        fused = torch.compiler.is_compiling() and not compiling.traced_unfused()
        return self._as_pytorch(y, x) if fused else y

    def flat_features(self, x: Tensor) -> Tensor:
        if self._runs_own_code("flat_features", ("stem", "pooled_stem", "features", "flat"), x):
            y = self.whole_feature_map(x, True)
            if y is None and self._unobserved(x):
                y = self.last_feature_map(x)
            if y is not None:
                return self.flat(y)  # type: ignore[operator]
        return super().flat_features(x)  # type: ignore[misc]

    def _runs_own_code(self, called: str, methods: tuple[str, ...], x: Tensor) -> bool:
        """Whether nothing but this package's code runs between the layers of ``called(x)``.

        called: the method that asks, which a subclass may override. methods: the methods that it calls.
        """
        # Compilers and transforms observe every step.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) not in (Tensor, nn.Parameter):
            return False
        kinds = type(self).__mro__
        if backends.transform_reason() is not None or not self.__dict__.keys().isdisjoint(methods):
            return False
        if _any_overridden(kinds, methods) or _any_overridden(kinds[kinds.index(_Network) + 1 :], (called,)):
            return False
        return None not in self._modules.values()  # a layer was removed: its call must fail as in PyTorch

    def _unobserved(self, x: Tensor) -> bool:
        """Whether no one can tell the layout of the feature maps between the stages."""
        return is_channels_last(x) or not self._known_observers().there

    def _known_observers(self) -> Observers:
        if self._observers is None or not self._observers.is_valid():
            self._observers = Observers(self)
        return self._observers

    def _as_pytorch(self, y: Tensor, x: Tensor) -> Tensor:
        """The feature map ``y`` in the memory format that PyTorch gives it for images like ``x``."""
        if torch.compiler.is_compiling():
            convolutions = [m for m in self.modules() if isinstance(m, nn.Conv2d)]
        else:
            convolutions = self._known_observers().convolutions
        return y if any_channels_last(convolutions) else laid_out(y, x)

    def _stem(self, x: Tensor, pool: nn.Module | None = None) -> Tensor | None:
        """The fused stem on its own. Compiled networks keep its result in channels_last."""
        return self.fused(x, pool, channels_last=torch.compiler.is_compiling())


class ResNet32(Replayed, _Network, reference.ResNet32):
    __doc__ = reference.ResNet32.__doc__
    stands_for = ("stem",)
    block = Block
    stage = Stage
    pool = MaxPool2d

    def parts(self) -> list[nn.Module]:
        return [m for m in (self, self.conv1) if m is not None]

    def emit(self, builder: GraphBuilder, x: Any) -> Any:
        return builder.conv(self.conv1, None, x)

    def last_feature_map(self, x: Tensor) -> Tensor:
        y = self.fused(x, self.maxpooling, channels_last=True)
        y = self.maxpooling(reference.ResNet32.stem(self, x)) if y is None else y
        return self.layer4(self.layer3(self.layer2(self.layer1(y))))

    def stem(self, x: Tensor) -> Tensor:
        y = self._stem(x)
        return super().stem(x) if y is None else y

    def pooled_stem(self, x: Tensor) -> Tensor:
        if not _pools_its_stem(self, ResNet32, reference.ResNet32, self.maxpooling):
            return super().pooled_stem(x)
        y = self._stem(x, self.maxpooling)
        return self.maxpooling(reference.ResNet32.stem(self, x)) if y is None else y

    def flat(self, x: Tensor) -> Tensor:
        y = flat_average(self.avgpooling, x) if patches.is_original(reference.ResNet32, "flat") else None
        return super().flat(x) if y is None else y


class _ConvBnReluStem(_Network):
    """``relu(bn1(conv1(x)))``, the stem of both families below."""

    stands_for = ("stem",)
    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    relu: nn.ReLU

    def parts(self) -> list[nn.Module]:
        return [m for m in (self, self.conv1, self.bn1, self.relu) if m is not None]

    def emit(self, builder: GraphBuilder, x: Any) -> Any:
        builder.needs(self.bn1, self.relu)
        return builder.conv(self.conv1, self.bn1, x, relu=self.relu)


class _WholeOnGpus(_ConvBnReluStem):
    """From the images to the scores as one chain, where a GPU has kernels for all of it."""

    def whole(self) -> Whole | None:
        raise NotImplementedError(f"{type(self).__name__}.whole")

    def forward(self, x: Tensor) -> Tensor:
        whole = self.whole() if isinstance(x, Tensor) and backends.kind(x) == "cuda" else None
        y = None if whole is None else whole.scores(x)
        return super().forward(x) if y is None else y


class CifarResNet(Replayed, _WholeOnGpus, reference.CifarResNet):
    __doc__ = reference.CifarResNet.__doc__
    block = BasicBlock
    stage = Stage
    _whole: Whole | None = None

    # Up to this batch the overhead of a call counts, and the whole network runs as one operator.
    small_batch = 4

    def whole(self) -> Whole | None:
        """The network as one chain; None where it must run stage by stage."""
        # A subclass may do more between the stages; tracing observes them.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(self) is not CifarResNet:
            return None
        if self._whole is None or self._whole.model is not self:  # the attribute may be copied from another module
            self._whole = Whole(self)
        return self._whole

    def _is_small_batch(self, x: Tensor) -> bool:
        return backends.kind(x) == "cpu" and x.dim() == 4 and x.shape[0] <= self.small_batch

    def whole_feature_map(self, x: Tensor, channels_last: bool) -> Tensor | None:
        whole = self.whole()
        if whole is None or not (self.training or self._is_small_batch(x) or whole.wants_all_gradients(x)):
            return None
        return whole.features(x, channels_last)

    def last_feature_map(self, x: Tensor) -> Tensor:
        y = self.fused(x, channels_last=True)
        y = reference.CifarResNet.stem(self, x) if y is None else y
        return self.layer3(self.layer2(self.layer1(y)))

    def stem(self, x: Tensor) -> Tensor:
        y = self._stem(x)
        return super().stem(x) if y is None else y

    def flat(self, x: Tensor) -> Tensor:
        y = flat_average(self.avgpool, x) if patches.is_original(reference.CifarResNet, "flat") else None
        return super().flat(x) if y is None else y


class ResNet(Replayed, _ConvBnReluStem, reference.ResNet):
    __doc__ = reference.ResNet.__doc__
    block: ClassVar[type[BasicBlock] | type[Bottleneck]] = BasicBlock
    stage = Stage
    pool = MaxPool2d

    def last_feature_map(self, x: Tensor) -> Tensor:
        y = self.fused(x, self.maxpool, channels_last=True)
        y = self.maxpool(reference.ResNet.stem(self, x)) if y is None else y
        return self.layer4(self.layer3(self.layer2(self.layer1(y))))

    def stem(self, x: Tensor) -> Tensor:
        y = self._stem(x)
        return super().stem(x) if y is None else y

    def pooled_stem(self, x: Tensor) -> Tensor:
        if not _pools_its_stem(self, ResNet, reference.ResNet, self.maxpool):
            return super().pooled_stem(x)
        y = self._stem(x, self.maxpool)
        return self.maxpool(reference.ResNet.stem(self, x)) if y is None else y

    def flat(self, x: Tensor) -> Tensor:
        y = flat_average(self.avgpool, x) if patches.is_original(reference.ResNet, "flat") else None
        return super().flat(x) if y is None else y


class _BottleneckResNet(ResNet):
    block = Bottleneck


def cifar_resnet20(num_classes: int = 10) -> CifarResNet:
    """20 layers: 3 stages of 3 blocks, 0.27 M parameters."""
    return CifarResNet(3, num_classes)


def cifar_resnet32(num_classes: int = 10) -> CifarResNet:
    """32 layers: 3 stages of 5 blocks, 0.47 M parameters."""
    return CifarResNet(5, num_classes)


def cifar_resnet44(num_classes: int = 10) -> CifarResNet:
    """44 layers: 3 stages of 7 blocks, 0.66 M parameters."""
    return CifarResNet(7, num_classes)


def cifar_resnet56(num_classes: int = 10) -> CifarResNet:
    """56 layers: 3 stages of 9 blocks, 0.86 M parameters."""
    return CifarResNet(9, num_classes)


def cifar_resnet110(num_classes: int = 10) -> CifarResNet:
    """110 layers: 3 stages of 18 blocks, 1.73 M parameters."""
    return CifarResNet(18, num_classes)


def resnet18(num_classes: int = 1000) -> ResNet:
    """[2, 2, 2, 2] basic blocks, 11.69 M parameters."""
    return ResNet([2, 2, 2, 2], num_classes)


def resnet34(num_classes: int = 1000) -> ResNet:
    """[3, 4, 6, 3] basic blocks, 21.80 M parameters."""
    return ResNet([3, 4, 6, 3], num_classes)


def resnet50(num_classes: int = 1000) -> ResNet:
    """[3, 4, 6, 3] bottleneck blocks, 25.56 M parameters."""
    return _BottleneckResNet([3, 4, 6, 3], num_classes)


def resnet101(num_classes: int = 1000) -> ResNet:
    """[3, 4, 23, 3] bottleneck blocks, 44.55 M parameters."""
    return _BottleneckResNet([3, 4, 23, 3], num_classes)
