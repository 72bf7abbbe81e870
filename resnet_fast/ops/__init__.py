"""The fused operators as functions.

Every function takes tensors of any memory format and returns a new tensor, an image in ``channels_last``. CPU kernels
accumulate float32 and bfloat16 in float32, and float64 in float64. Derivatives of any order work.

PyTorch's own operators run instead for other dtypes, for devices without a kernel, for dilation, groups and filters of
more than 1024 taps, under forward-mode differentiation and under ``torch.func``;
:func:`resnet_fast.backends.fallbacks` counts these calls.
"""

from .add_relu import add_relu
from .conv_bn_relu import conv_bn, conv_bn_add_relu, conv_bn_relu
from .register import library as _library  # noqa: F401

__all__ = ["add_relu", "conv_bn", "conv_bn_add_relu", "conv_bn_relu"]
