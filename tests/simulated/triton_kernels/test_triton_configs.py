"""Every tile that may run somewhere, compiled offline for its GPUs: tensor cores, vectors, registers, shared memory."""

import concurrent.futures
import dataclasses
import itertools
import os

import pytest
import torch
from helpers import triton_gate as gate

from resnet_fast._triton.conv_bn_relu import _conv_bn_relu_fwd_kernel, epilogue
from resnet_fast.gpu.candidates import triton as configs
from resnet_fast.gpu.layer import A100, Gpu, Layer

GPUS = {80: A100, 90: Gpu(90, 132, 227 * 1024), 100: Gpu(100, 148, 227 * 1024)}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
TYPES = {torch.float16: "*fp16:16", torch.bfloat16: "*bf16:16", torch.float32: "*fp32:16"}
PRECISIONS = [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]


def layers():
    """3x3 for every width of the list, so that every tile occurs; the stem and an odd width, which mix taps."""
    for dtype, precision in PRECISIONS:
        for channels in (16, 32, 64, 128):
            yield Layer(8, 28, 28, channels, channels, (3, 3), (1, 1), (1, 1), dtype, precision, True, True)
    for dtype, precision in PRECISIONS[1:3]:
        yield Layer(8, 224, 224, 3, 64, (7, 7), (2, 2), (3, 3), dtype, precision, False, False)
        yield Layer(8, 28, 28, 256, 64, (1, 1), (1, 1), (0, 0), dtype, precision, False, True)


def binaries():
    """Each (gpu, layer, tile) once: what one tile is compiled for depends on the layer's channels, not on its map."""
    seen = set()
    for arch, layer in itertools.product(gate.ARCHS, layers()):
        for config in configs.tiles(layer, GPUS[arch]):
            tile = (arch, layer.dtype, layer.precision, layer.kernel, layer.channels % config.block_k == 0, config)
            if tile not in seen:
                seen.add(tile)
                yield arch, layer, config
                if layer.kernel == (3, 3) and config.block_n == 64 and layer.dtype == torch.bfloat16:
                    yield arch, layer, dataclasses.replace(config, split_k=2)


def compiled(case):
    arch, layer, config = case
    split = config.split_k > 1
    image = TYPES[layer.dtype]
    pointers = {"x": image, "weight": image, "y": image, "scale": "*fp32:16", "shift": "*fp32:16"}
    constants = {"residual": None} if split or not layer.residual else {}
    constants |= {} if split else {"partial": None}
    pointers |= {"partial": "*fp32:16"} if split else {}
    pointers |= {"residual": image} if "residual" not in constants else {}
    sizes = dict.fromkeys(("pixels", "height", "width", "out_height", "out_width"), "i32")
    constants |= {"C": layer.channels, "K": layer.out_channels, "R": layer.kernel[0], "S": layer.kernel[1]}
    constants |= {"STRIDE_H": layer.stride[0], "STRIDE_W": layer.stride[1]}
    constants |= {"PAD_H": layer.padding[0], "PAD_W": layer.padding[1]}
    constants |= {"RELU": layer.relu, "PRECISION": layer.precision}
    constants |= {"WIDE": False, "SPLIT_K": config.split_k}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    return gate.inspect(
        _conv_bn_relu_fwd_kernel,
        pointers | sizes,
        constants,
        arch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


@pytest.mark.long
def test_every_configuration():
    cases = list(binaries())
    assert len(cases) > 60
    # ptxas and the disassembler are processes of their own: threads are enough to keep the cores busy.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for case, sass in zip(cases, pool.map(compiled, cases), strict=True):
            check(*case, sass)


def check(arch, layer, config, sass):
    what = f"sm_{arch} {layer.channels} -> {layer.out_channels} {layer.kernel} {layer.dtype} {layer.precision} {config}"
    what += f": {sass.registers} registers, {sass.shared} bytes shared, {dict(sass.opcodes.most_common(8))}"
    assert sass.spills == 0, what
    assert sass.stack == 0, what
    assert sass.shared <= gate.SHARED_BLOCK[arch], what
    # What the tiles were chosen for: two warps for each scheduler of a multiprocessor, so that one can wait.
    assert sass.blocks_per_sm * config.num_warps >= 8, what
    cores = {name: sass.count(name) for name in TENSOR_CORES.values()}
    if layer.dtype == torch.float32 and layer.precision == "ieee":
        assert not any(cores.values()), what
        assert sass.count("FFMA") >= config.block_k, what
        return
    assert cores.pop(TENSOR_CORES[arch]) > 0, what
    assert not any(cores.values()), what
    assert sass.count("STG.128") > 0, what
    if layer.channels % config.block_k == 0:
        assert sass.count("LDGSTS.128") > 0, what
        if layer.residual and config.split_k == 1:
            assert sass.count("LDG.128") > 0, what


@pytest.mark.parametrize("arch", gate.ARCHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_second_pass(arch, dtype):
    """Of split sums, and after the library's convolution: whole vectors of what it reads, enough blocks to stream."""
    image = torch.empty(2, 64, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)
    vectors = torch.ones(64), torch.zeros(64)
    for sums, splits in ((torch.empty(3, 128, 64), 3), (image, 1)):
        ((kernel, args, meta),) = gate.launches(epilogue, sums, *vectors, image, image, True, splits)
        sass = gate.inspect_launch(kernel, args, meta, arch)
        what = f"sm_{arch} {dtype}, {splits} splits: {sass.registers} registers, {dict(sass.opcodes.most_common(8))}"
        assert sass.spills == sass.stack == 0, what
        assert sass.count("LDG.128") >= splits, what
        assert sass.count("STG") == sass.count("STG.128") + sass.count("STG.64"), what
        assert sass.blocks_per_sm >= 8, what


def test_a_tile_too_large_is_seen():
    """The gate above can fail: 128 x 128 sums on one warp do not fit the registers."""
    layer = next(layer for layer in layers() if layer.channels == 128 and layer.dtype == torch.bfloat16)
    case = (80, layer, configs.Config(128, 128, 32, 1, 3))
    sass = compiled(case)
    with pytest.raises(AssertionError, match="registers"):
        check(*case, sass)
