"""Residual networks for PyTorch with convolution, batch norm, ReLU and residual add fused into one kernel."""

try:
    from . import backends, ops, reference
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    from .diagnose.without_torch import stop

    stop()

from . import gpu as _gpu  # noqa: F401
from .chain.guard import refresh
from .diagnose.explain import explain
from .earlier_names import install as install_earlier_names
from .fusion.convert import fuse, unfuse
from .fusion.report import report
from .models import (
    CifarResNet,
    ResNet,
    ResNet32,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
)

install_earlier_names()

__version__ = "0.1.0"

__all__ = [
    "CifarResNet",
    "ResNet",
    "ResNet32",
    "backends",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
    "explain",
    "fuse",
    "ops",
    "reference",
    "refresh",
    "report",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "unfuse",
]
