"""The fused operators as functions.

Every function takes tensors of any memory format and returns a new tensor, ``channels_last`` where it is an image. On
CPUs these functions compute in float32 for float32 and bfloat16, in float64 for float64; other dtypes, devices without
a kernel, dilation, groups and filters of more than 1024 taps run on PyTorch's own operators, which
:func:`resnet_fast.backends.fallbacks` then shows. So does everything within forward-mode differentiation and
``torch.func``. The operators have derivatives of any order.
"""

from .add_relu import add_relu
from .conv_bn_relu import conv_bn, conv_bn_add_relu, conv_bn_relu
from .register import library as _library  # noqa: F401

__all__ = ["add_relu", "conv_bn", "conv_bn_add_relu", "conv_bn_relu"]
