"""Triton kernels and their launchers; installed as ``resnet_fast._triton`` and imported where a GPU wants them.

A file names an operator and holds its kernels, the geometry of its launches (pure functions of shapes) and the function
that launches them through :mod:`resnet_fast.launch`. The files whose names begin with ``cuda`` and ``hopper`` do the
latter for the kernels in CUDA C++, which the extension holds.
"""

from resnet_fast import backends as _backends
from resnet_fast import residual_network as _network

from . import cuda_avg_pool as _cuda_avg_pool
from . import cuda_conv as _cuda_conv
from . import cuda_stem as _cuda_stem
from . import hopper_conv as _hopper_conv
from . import operators as _operators
from . import training as _training

if _backends.has_cuda_convolution():
    _cuda_conv.register()
    _cuda_stem.register()
    _cuda_avg_pool.register()
    _hopper_conv.register()

# By the operator's name: what resnet_fast.ops registers for CUDA devices.
OPERATORS = {
    "add_relu": _operators.add_relu,
    "conv_bn": _operators.conv_bn,
    "conv_bn_relu": _operators.conv_bn_relu,
    "conv_bn_add_relu": _operators.conv_bn_add_relu,
    "pack_conv_bn": _operators.pack_conv_bn,
    "residual_stage": _operators.residual_stage,
    "conv_moments": _training.conv_moments,
    "bn_apply": _training.bn_apply,
    "bn_backward_sums": _training.bn_backward_sums,
    "channel_sums": _training.channel_sums,
    "conv_backward": _training.conv_backward,
    "residual_network": _network.residual_network,  # CUDA C++: a stage of it is a launch
}
