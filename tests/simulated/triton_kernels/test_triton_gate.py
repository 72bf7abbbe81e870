"""The offline gate sees what it is asked for: tensor cores of each architecture, vectors, spills, occupancy."""

import pytest
import torch
from helpers import triton_gate as gate
from ptxsim import triton_kernels as kernels

from resnet_fast.backends import launch

POINTERS = {"a": "*fp16:16", "b": "*fp16:16", "c": "*fp16:16"}
SIZES = {"M": "i32:16", "N": "i32:16", "K": "i32:16"}


@pytest.mark.parametrize(("arch", "tensor_core"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_tensor_cores_and_vectors(arch, tensor_core):
    tile = {"BM": 128, "BN": 64, "BK": 32}
    sass = gate.inspect(kernels.matmul, POINTERS | SIZES, tile, arch, num_warps=4, num_stages=3)
    assert sass.count(tensor_core) > 0
    assert sum(sass.count(other) for other in {"HMMA", "HGMMA", "UTCHMMA"} - {tensor_core}) == 0
    assert sass.count("LDGSTS.128") > 0
    assert sass.count("STG.128") > 0
    assert sass.spills == 0
    # Three stages of both operand tiles in flight are the least it needs.
    assert 2 * (128 + 64) * 32 * 2 <= sass.shared <= gate.SHARED_BLOCK[arch]
    assert sass.threads == 128
    assert sass.blocks_per_sm >= 1


def test_unaligned_arguments_lose_the_vectors():
    sizes = dict.fromkeys(SIZES, "i32")
    sass = gate.inspect(kernels.matmul, POINTERS | sizes, {"BM": 64, "BN": 64, "BK": 32}, 80, num_warps=4, num_stages=2)
    assert sass.count("LDGSTS.128") == sass.count("LDG.128") == sass.count("STG.128") == 0


def test_spills_are_seen():
    tile = {"BM": 128, "BN": 128, "BK": 32}  # 16384 accumulators on 32 threads: 512 each, of 255 registers
    sass = gate.inspect(kernels.matmul, POINTERS | SIZES, tile, 80, num_warps=1, num_stages=2)
    assert sass.spills > 0
    assert sass.registers == 255
    assert sass.blocks_per_sm == 8


def test_recorded_launches_are_specialised_as_in_production():
    def op(n):
        x = torch.randn(n)
        launch.launch(kernels.add_relu, (1,), (x, x, torch.empty(n), n), B=1024, num_warps=8)

    for arch in gate.ARCHS:
        vectors = []
        for n in (1024, 1001):
            ((kernel, args, meta),) = gate.launches(op, n)
            sass = gate.inspect_launch(kernel, args, meta, arch)
            assert sass.threads == 256
            vectors.append(sass.count("LDG.128"))
        assert vectors[0] >= 2
        assert vectors[1] == 0


def test_a_wrong_parameter_is_named():
    with pytest.raises(TypeError, match=r"unknown parameters \['Q'\], missing \['B'\]"):
        gate.inspect(
            kernels.add_relu, {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"}, {"Q": 1}, 80, num_warps=4
        )
