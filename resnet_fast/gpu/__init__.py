"""Chains of convolutions on GPUs, in inference and training, and the choice of a kernel for each layer.

Importing it registers the operators' CUDA implementations, and fills :mod:`resnet_fast.chain.devices`.
"""

from . import register as _register  # noqa: F401
