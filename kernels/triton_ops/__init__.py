"""Triton kernels and their launchers; installed as ``resnet_fast._triton`` and imported where a GPU wants them.

A file names an operator and holds its kernels, the geometry of its launches (pure functions of shapes) and the function
that launches them through :mod:`resnet_fast.launch`.
"""

from resnet_fast import residual_network as _network

from . import operators as _operators

# By the operator's name: what resnet_fast.ops registers for CUDA devices.
OPERATORS = {
    "add_relu": _operators.add_relu,
    "conv_bn": _operators.conv_bn,
    "conv_bn_relu": _operators.conv_bn_relu,
    "conv_bn_add_relu": _operators.conv_bn_add_relu,
    "pack_conv_bn": _operators.pack_conv_bn,
    "residual_stage": _operators.residual_stage,
    "residual_network": _network.residual_network,  # CUDA C++: a stage of it is a launch
}
