"""Every tile that may run somewhere, compiled offline for its GPUs: tensor cores, vectors, registers, shared memory."""

import concurrent.futures
import itertools
import os

import pytest
import torch
import triton_gate as gate

from resnet_fast._triton import configs
from resnet_fast._triton.conv_bn_relu import _conv_bn_relu_fwd_kernel
from resnet_fast._triton.configs import Gpu, Layer

GPUS = {80: configs.A100, 90: Gpu(90, 132, 227 * 1024), 100: Gpu(100, 148, 227 * 1024)}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
TYPES = {torch.float16: "*fp16:16", torch.bfloat16: "*bf16:16", torch.float32: "*fp32:16"}
PRECISIONS = [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
