"""The first call on a GPU: kernels are compiled all at once, or choices come with the package; the command for it."""

import json
import os
import subprocess
import sys

import pytest
import torch
import triton

from resnet_fast import backends
from resnet_fast._triton import conv_bn_relu
from resnet_fast.backends import launch
from resnet_fast.gpu import convolution as layers
from resnet_fast.gpu import library, shipped, tune
from resnet_fast.gpu.candidates.triton import Config
from resnet_fast.gpu.layer import A100, Gpu, Layer

LAYER = Layer(1, 8, 8, 32, 32, (3, 3), (1, 1), (1, 1), torch.float16, "ieee", True, True, folded=True)


class Driver:
    """What the compiler asks a GPU's driver for."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A Hopper GPU for which kernels can be compiled, and nothing else."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    kernels = conv_bn_relu._conv_bn_relu_fwd_kernel, conv_bn_relu._epilogue_kernel
    for kernel in kernels:
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    monkeypatch.setattr(torch.cuda, "device", lambda device: launch.contextlib.nullcontext())
    gpu = tune.Tuner(Gpu(90, 132, 227 * 1024), None, lambda calls: pytest.fail("nothing is to be measured"))
    monkeypatch.setattr(tune, "tuner", lambda device: gpu)
    return gpu, lambda: [len(kernel.device_caches[0][0]) for kernel in kernels]


def test_all_that_is_measured_is_compiled_beforehand(hopper, monkeypatch):
    gpu, compiled = hopper
    wanted = [c for c in gpu.wanted(LAYER) if isinstance(c, Config)]
    assert len(wanted) >= 2
    layers.prepare([LAYER, LAYER], torch.device("cpu"))
    splits = len({c.split_k for c in wanted if c.split_k > 1})
    assert compiled() == [len(wanted), splits]
    # What runs later asks for the very same kernels.
    with launch.compile_only():
        for choice in wanted:
            x, filters, residual = layers.operands(LAYER, torch.device("cpu"))
            layers.run(LAYER, choice, x, filters, residual)
    assert compiled() == [len(wanted), splits]


def test_a_parser_that_fails_now_and_then(hopper, monkeypatch):
    """As CPython 3.11's does where several threads parse at once."""
    gpu, compiled = hopper
    kernel = conv_bn_relu._conv_bn_relu_fwd_kernel
    parse, calls = type(kernel).parse, []

    def failing(self):
        calls.append(self)
        if self is kernel and calls.count(kernel) == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=33, after=87)")
        return parse(self)

    monkeypatch.setattr(type(kernel), "parse", failing)
    layers.prepare([LAYER], torch.device("cpu"))
    wanted = [c for c in gpu.wanted(LAYER) if isinstance(c, Config)]
    assert compiled()[0] == len(wanted)
    assert calls.count(kernel) == len(wanted) + 1


def test_a_known_choice_alone_is_compiled(hopper):
    gpu, compiled = hopper
    other = Layer(2, 8, 8, 32, 32, (3, 3), (2, 2), (1, 1), torch.float16, "ieee", False, True)
    gpu.chosen = {(LAYER, "auto"): Config(64, 32, 32, 4, 2), (other, "auto"): Config(128, 32, 32, 4, 2)}
    layers.prepare([LAYER, other], torch.device("cpu"))
    assert compiled() == [2, 0]
    gpu.chosen = {(LAYER, "auto"): library.CUDNN, (other, "auto"): tune.LIBRARY}
    layers.prepare([LAYER, other], torch.device("cpu"))
    assert compiled() == [2, 0]


def test_only_this_thread_compiles_only():
    seen = []

    class Kernel:
        def warmup(self, *args, grid, **meta):
            seen.append("compiled")

        def __getitem__(self, grid):
            return lambda *args, **meta: seen.append("started")

    with launch.compile_only():
        launch.launch(Kernel(), (1,), ())
        launch.cuda_launch("no such kernel", (1,), (32,), 0, ())
        thread = launch.threading.Thread(target=lambda: launch.launch(Kernel(), (1,), ()))
        thread.start()
        thread.join()
    launch.launch(Kernel(), (1,), ())
    assert seen == ["compiled", "started", "started"]


def test_choices_that_come_with_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    entries = {tune._key(LAYER, "auto"): "cudnn"}
    file = tmp_path / "NVIDIA_A100.json"
    assert shipped.load("NVIDIA A100") == {}
    assert shipped.status("NVIDIA A100").startswith("none for this GPU")
    shipped.export("NVIDIA A100", entries, file, "2026-11-27")
    assert shipped.load("NVIDIA A100") == entries
    assert shipped.status("NVIDIA A100") == "1 of 2026-11-27"
    tuner = tune.Tuner(
        A100, tmp_path / "gpu.json", lambda calls: pytest.fail("known"), known=shipped.load("NVIDIA A100")
    )
    assert tuner.choose(LAYER, pytest.fail) == library.CUDNN
    assert not (tmp_path / "gpu.json").exists()
    # What was measured here counts more.
    (tmp_path / "gpu.json").write_text(json.dumps({tune._key(LAYER, "auto"): "library"}))
    tuner = tune.Tuner(A100, tmp_path / "gpu.json", None, known=shipped.load("NVIDIA A100"))
    assert tuner.choose(LAYER, pytest.fail) == tune.LIBRARY


@pytest.mark.parametrize("what", ["torch", "triton", "cudnn", "triton_tiles", "cuda_tiles", "hopper_tiles"])
def test_choices_of_other_versions_are_left_alone(monkeypatch, tmp_path, what):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    file = tmp_path / "NVIDIA_A100.json"
    shipped.export("NVIDIA A100", {tune._key(LAYER, "auto"): "cudnn"}, file, "2026-11-27")
    content = json.loads(file.read_text())
    content["versions"][what] = "0.1"
    file.write_text(json.dumps(content))
    assert shipped.load("NVIDIA A100") == {}
    assert f"not current, made with {what} 0.1 (here " in shipped.status("NVIDIA A100")


def test_choices_from_before_there_were_tiles_for_hopper(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    file = tmp_path / "NVIDIA_A100.json"
    shipped.export("NVIDIA A100", {tune._key(LAYER, "auto"): "cudnn"}, file, "2026-11-27")
    content = json.loads(file.read_text())
    del content["versions"]["hopper_tiles"]
    file.write_text(json.dumps(content))
    assert len(shipped.load("NVIDIA A100")) == 1
    assert shipped.status("NVIDIA A100") == "1 of 2026-11-27"


@pytest.mark.parametrize("file", sorted(shipped.FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_the_package_s_own_tables_are_of_these_kernels(file):
    content = json.loads(file.read_text())
    for tiles in ("triton_tiles", "cuda_tiles"):
        if tiles == "triton_tiles" or backends.has_cuda_convolution():  # built for CPUs alone, there are no others
            assert content["versions"][tiles] == shipped.current()[tiles], "measure again: make gpu-kit, phase warm"
    assert all(tune._parse(entry) for entry in content["choices"].values())


def test_the_command_says_what_is_wrong():
    command = [sys.executable, "-m", "resnet_fast", "tune", "cifar_resnet20"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    assert done.stderr == "tune: no CUDA device is visible to PyTorch\n"
