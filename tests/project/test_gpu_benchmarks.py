"""What the benchmarks do on a GPU, as far as a machine without one can tell: choice, arithmetic, checks, clock."""

import pytest
import torch
from ptxsim.device import simulated

from benchmarks.cases import Case, ConvBnRelu
from benchmarks.gpu import device as devices
from benchmarks.gpu.device import Device
from benchmarks.gpu.variants import GPU_VARIANTS, eager, fused
from benchmarks.runner import variants_of
from benchmarks.variants import BASELINE, OURS, VARIANTS
from benchmarks.verify import Reference, WrongResultError


def test_the_gpu_is_picked_up_by_itself(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.of("auto", None, False) == devices.CPU
    with pytest.raises(ValueError, match="no CUDA device is visible"):
        devices.of("cuda", None, False)
    for options in ((None, True), ("float16", False)):
        with pytest.raises(ValueError, match="on the CPU times are taken in float32 or bfloat16, with warm caches"):
            devices.of("auto", *options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.of("auto", None, True) == Device("cuda", torch.float16, True)
    assert torch.backends.cudnn.benchmark
    assert devices.of("cpu", None, False) == devices.CPU
    assert variants_of(devices.of("cpu", "bfloat16", False)) is variants_of(devices.CPU) is VARIANTS
    assert {BASELINE, OURS, "torch.compile, max-autotune"} <= set(variants_of(Device("cuda")))


@pytest.mark.parametrize("name", [n for n, v in GPU_VARIANTS.items() if v.prepare in (eager, fused)])
def test_variants_are_checked_in_the_arithmetic_of_the_device(name, monkeypatch):
    """Eager and fused, under autocast and with cast weights, on CPU tensors; a wrong result has no time."""
    monkeypatch.setattr(Device, "arithmetic", lambda self: torch.autocast("cpu", self.dtype))
    case = Case("conv_bn_relu", (2, 16, 9, 7), lambda: ConvBnRelu(16))
    module, x, device, variant = case.build(), case.input("random"), Device("cuda", torch.bfloat16), GPU_VARIANTS[name]
    reference = Reference.of(module, x, device)
    image = x.to(device.dtype) if variant.cast else x
    with torch.no_grad(), device.arithmetic(), simulated() as launches:
        call = variant.prepare(module, image.contiguous(memory_format=variant.layout))
        y = call(image)
    assert y.dtype == torch.bfloat16
    assert bool(launches.launches) == (variant.prepare is fused)
    assert reference.check(name, y) <= 2
    with pytest.raises(WrongResultError, match="output 0"):
        reference.check(name, y * 1.1)


class Gpu:
    """A GPU whose calls take 3 ms, or 5 ms where their data are not in the cache."""

    def __init__(self, monkeypatch):
        self.now, self.warm, self.flushes = 0.0, False, 0
        monkeypatch.setattr(devices, "_events", lambda: Event(self))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: type("P", (), {"L2_cache_size": 1024}))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch, "empty", lambda n, dtype, device: Flush(self, n))

    def call(self):
        self.now += 3 if self.warm else 5
        self.warm = True


class Flush:
    def __init__(self, gpu, size):
        assert size == 2048
        self.gpu = gpu

    def zero_(self):
        self.gpu.warm, self.gpu.now = False, self.gpu.now + 100
        self.gpu.flushes += 1


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = self.gpu.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.mark.parametrize(("cold", "milliseconds", "flushes"), [(False, 3.5, 0), (True, 5, 4)])
def test_clock(monkeypatch, cold, milliseconds, flushes):
    """Warm: four calls in a row, the first cold. Cold: each after the cache was overwritten, which is not counted."""
    with monkeypatch.context() as patch:
        gpu = Gpu(patch)
        seconds = Device("cuda", torch.float16, cold).sample(gpu.call, 4)
    assert seconds == pytest.approx(milliseconds * 1e-3)
    assert gpu.flushes == flushes
