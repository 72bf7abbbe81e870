"""The networks in plain PyTorch: the specification of the fast models, and their fallback.

Every class of :mod:`resnet_fast.models` and :mod:`resnet_fast.blocks` subclasses its twin here and overrides how it
runs, not what it holds: both have the same constructor, the same parameters and the same ``state_dict``.

Sources: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015 (section 3.4 for ImageNet, 4.2 for
CIFAR-10); projections and key names as in torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Pickles of fused networks hold a digest of the code behind forward, docstrings included: a reworded one unfuses them.
__all__ = [
    "BasicBlock",
    "Block",
    "Bottleneck",
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


def _projection(in_channels: int, out_channels: int, stride: int, bias: bool) -> nn.Sequential | None:
    """1x1 convolution and batch norm for a shortcut that changes stride or width; None for the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=bias), nn.BatchNorm2d(out_channels)
    )


class Block(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), then dropout; all convolutions with a bias.

    Args:
        dim: input channels.
        out_dim: output channels.
        stride: of the first convolution and of the projection.
        dropout: probability of dropping an output element in training.

    Shape: ``[N, dim, H, W] -> [N, out_dim, ceil(H / stride), ceil(W / stride)]``.
    """

    def __init__(self, dim: int, out_dim: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, out_dim, kernel_size=3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(out_dim)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_dim, out_dim, kernel_size=3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_dim)
        self.relu2 = nn.ReLU()
        self.downsample = _projection(dim, out_dim, stride, bias=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.dropout(self.relu2(y + shortcut))


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), convolutions 3x3 without bias; torchvision's keys.

    Shape: ``[N, inplanes, H, W] -> [N, planes, ceil(H / stride), ceil(W / stride)]``.
    """

    expansion: ClassVar[int] = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _projection(inplanes, planes, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)): 1x1, 3x3 (strided), 1x1.

    Shape: ``[N, inplanes, H, W] -> [N, 4 * planes, ceil(H / stride), ceil(W / stride)]``.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        out = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(inplanes, out, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet32(nn.Module):
    """A 7x7/2 stem, max pooling, four stages of [3, 4, 6, 3] blocks, average pooling, a linear classifier, softmax.

    Args:
        in_channel: channels of the stem; the stages have 64, 128, 256 and 512.
        num_classes: classes.
        image_size: height and width of the images, which fixes the classifier's input (4608 features at 224).
        dropout: probability of dropping an element of a block's output, in training.

    Shape: ``[N, 3, image_size, image_size] -> [N, num_classes]``, probabilities; a loss wants :meth:`logits`.

    Raises:
        ValueError: ``image_size`` is too small for the five halvings, or the images have another size.
    """

    block: ClassVar[type[Block]] = Block
    stage: ClassVar[type[nn.Sequential]] = nn.Sequential
    pool: ClassVar[type[nn.MaxPool2d]] = nn.MaxPool2d

    def __init__(
        self, in_channel: int = 64, num_classes: int = 2, *, image_size: int = 224, dropout: float = 0.0
    ) -> None:
        super().__init__()
        side = self._feature_side(image_size)
        if side < 1:
            raise ValueError(f"image_size is {image_size}, want at least 35: smaller maps vanish in the last pooling")
        self.in_channel = in_channel
        self.num_classes = num_classes
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, in_channel, kernel_size=7, stride=2, padding=3)
        self.maxpooling = self.pool(kernel_size=2)
        self.layer1 = self._make_layer(in_channel, 64, num_blocks=3, stride=1, dropout=dropout)
        self.layer2 = self._make_layer(64, 128, num_blocks=4, stride=2, dropout=dropout)
        self.layer3 = self._make_layer(128, 256, num_blocks=6, stride=2, dropout=dropout)
        self.layer4 = self._make_layer(256, 512, num_blocks=3, stride=2, dropout=dropout)
        self.avgpooling = nn.AvgPool2d(kernel_size=2)
        self.classifier = nn.Linear(512 * side * side, num_classes)

    @staticmethod
    def _feature_side(size: int) -> int:
        """Height of the last feature map: strided convolutions round up, poolings round down."""
        size = (size + 1) // 2 // 2
        for _ in range(3):
            size = (size + 1) // 2
        return size // 2

    def _make_layer(self, dim: int, out_dim: int, num_blocks: int, stride: int, dropout: float) -> nn.Sequential:
        blocks = [self.block(dim, out_dim, stride, dropout)]
        blocks += [self.block(out_dim, out_dim, 1, dropout) for _ in range(1, num_blocks)]
        return self.stage(*blocks)

    def stem(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def pooled_stem(self, x: Tensor) -> Tensor:
        return self.maxpooling(self.stem(x))

    def features(self, x: Tensor) -> Tensor:
        """The last feature map: ``[N, 3, image_size, image_size] -> [N, 512, ceil(image_size / 32), ...]``."""
        return self.layer4(self.layer3(self.layer2(self.layer1(self.pooled_stem(x)))))

    def flat(self, x: Tensor) -> Tensor:
        """The classifier's input, from the last feature map."""
        return torch.flatten(self.avgpooling(x), 1)

    def flat_features(self, x: Tensor) -> Tensor:
        return self.flat(self.features(x))

    def logits(self, x: Tensor) -> Tensor:
        """Class scores before the softmax, ``[N, num_classes]``."""
        side = self._feature_side(self.image_size)
        # Proxies of torch.fx have no sizes.
        if isinstance(x, Tensor) and x.dim() == 4 and [self._feature_side(s) for s in x.shape[2:]] != [side, side]:
            raise ValueError(
                f"x is {x.shape[2]} x {x.shape[3]}, but the classifier expects images of {self.image_size} x "
                f"{self.image_size} ({self.classifier.in_features} features): build the model with image_size="
            )
        return self.classifier(self.flat_features(x))

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.logits(x), dim=1)


class CifarResNet(nn.Module):
    """The CIFAR-10 network of He et al.: 3x3 stem, three stages of n blocks at 16, 32 and 64 channels, linear layer.

    Shape: ``[N, 3, H, W] -> [N, num_classes]``, logits; images of 32 x 32 in the paper, any size here.
    """

    block: ClassVar[type[BasicBlock]] = BasicBlock
    stage: ClassVar[type[nn.Sequential]] = nn.Sequential

    def __init__(self, num_blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _make_stage(self, 16, 16, num_blocks, stride=1)
        self.layer2 = _make_stage(self, 16, 32, num_blocks, stride=2)
        self.layer3 = _make_stage(self, 32, 64, num_blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        _initialize(self)

    def stem(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)))

    def features(self, x: Tensor) -> Tensor:
        """The last feature map, ``[N, 64, ceil(H / 4), ceil(W / 4)]``."""
        return self.layer3(self.layer2(self.layer1(self.stem(x))))

    def flat(self, x: Tensor) -> Tensor:
        """What the linear layer takes of the last feature map."""
        return torch.flatten(self.avgpool(x), 1)

    def flat_features(self, x: Tensor) -> Tensor:
        return self.flat(self.features(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flat_features(x))


class ResNet(nn.Module):
    """The ImageNet network of He et al. with torchvision's keys.

    Args:
        layers: blocks of each of the four stages.
        num_classes: classes.

    Shape: ``[N, 3, H, W] -> [N, num_classes]``, logits.
    """

    block: ClassVar[type[BasicBlock] | type[Bottleneck]] = BasicBlock
    stage: ClassVar[type[nn.Sequential]] = nn.Sequential
    pool: ClassVar[type[nn.MaxPool2d]] = nn.MaxPool2d

    def __init__(self, layers: Sequence[int], num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = self.pool(kernel_size=3, stride=2, padding=1)
        expansion = self.block.expansion
        self.layer1 = _make_stage(self, 64, 64, layers[0], stride=1)
        self.layer2 = _make_stage(self, 64 * expansion, 128, layers[1], stride=2)
        self.layer3 = _make_stage(self, 128 * expansion, 256, layers[2], stride=2)
        self.layer4 = _make_stage(self, 256 * expansion, 512, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * expansion, num_classes)
        _initialize(self)

    def stem(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)))

    def pooled_stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.stem(x))

    def features(self, x: Tensor) -> Tensor:
        """The last feature map, ``[N, 512 * expansion, ceil(H / 32), ceil(W / 32)]``."""
        return self.layer4(self.layer3(self.layer2(self.layer1(self.pooled_stem(x)))))

    def flat(self, x: Tensor) -> Tensor:
        """What the linear layer takes of the last feature map."""
        return torch.flatten(self.avgpool(x), 1)

    def flat_features(self, x: Tensor) -> Tensor:
        return self.flat(self.features(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flat_features(x))


def _make_stage(model: CifarResNet | ResNet, inplanes: int, planes: int, num_blocks: int, stride: int) -> nn.Sequential:
    blocks = [model.block(inplanes, planes, stride)]
    blocks += [model.block(planes * model.block.expansion, planes) for _ in range(1, num_blocks)]
    return model.stage(*blocks)


def _initialize(model: nn.Module) -> None:
    """He et al. 2015, "Delving Deep into Rectifiers": normal weights of variance 2 / fan_out."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


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


class _BottleneckResNet(ResNet):
    block = Bottleneck


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
