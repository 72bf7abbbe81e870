"""What the phases of the kit for GPU machines do: times of a GPU, peers, the sanitizer's reports, tables."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.cases import AddRelu, Case, ConvBnRelu, Network
from benchmarks.gpu import variants as gpu_variants
from benchmarks.gpu.cudnn_fused import fold
from benchmarks.kit import clock, options, results, supervise
from benchmarks.kit.phases import infer, sanitize, tests
from benchmarks.kit.rehearsal import CallInstead, conv_add_relu, conv_relu
from benchmarks.variants import UnavailableError
from benchmarks.verify import Reference, WrongResultError
from resnet_fast import backends, reference

ROOT = Path(__file__).parents[2]


def parsed(tmp_path, *arguments):
    return options.parse(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *arguments])


@pytest.fixture
def no_gpu(monkeypatch):
    """cuDNN's operators and graphs of the peers, on the CPU."""
    monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
    monkeypatch.setattr(gpu_variants, "Graphed", CallInstead)


@pytest.mark.parametrize("name", ["ResNet32", "cifar_resnet20", "resnet18", "resnet50"])
def test_the_network_for_cudnn(no_gpu, name, monkeypatch):
    """Folded batch norm, ReLU and residual by cuDNN's operators, against float64; every block's last adds."""
    case = Case(name, (2, 3, 64, 64), lambda: Network(name, network(name)))
    module, x = case.build(), case.input("random").contiguous(memory_format=torch.channels_last)
    calls = []
    for operator in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        run = getattr(torch, operator)
        monkeypatch.setattr(torch, operator, lambda *a, run=run, o=operator: calls.append(o) or run(*a))
    with torch.no_grad():
        folded = gpu_variants.cudnn_fused(module, x)
        calls.clear()
        outputs = folded(x)
    assert Reference.of(module, x).check("cuDNN fused", outputs, 2.0) <= 4
    blocks = [
        m for m in module.modules() if isinstance(m, (reference.Block, reference.BasicBlock, reference.Bottleneck))
    ]
    assert calls.count("cudnn_convolution_add_relu") == len(blocks)
    assert calls.count("cudnn_convolution_relu") == len(blocks) * (2 if name == "resnet50" else 1)
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with pytest.raises(WrongResultError):
        Reference.of(module, x).check("cuDNN fused", tuple(1.01 * y for y in outputs), 2.0)
    assert module.net.layer1[0].bn1.running_mean is not None  # the original stays


def network(name):
    return reference.ResNet32(image_size=64) if name == "ResNet32" else getattr(reference, name)()


def test_what_nobody_writes_for_cudnn(no_gpu, monkeypatch):
    x = torch.randn(2, 16, 9, 7).contiguous(memory_format=torch.channels_last)
    single = ConvBnRelu(16).eval()
    with torch.no_grad():
        assert Reference.of(single, x).check("single", fold(single, torch.float32)(x), 2.0) <= 4
    with pytest.raises(UnavailableError, match="nobody has written a AddRelu for cuDNN"):
        fold(AddRelu((2, 16, 9, 7)), torch.float32)

    def refuse(*_):
        raise RuntimeError("no engine\nat length")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", refuse)
    with pytest.raises(UnavailableError, match=r"cuDNN refuses: no engine$"):
        gpu_variants.cudnn_fused(single, x)


def test_ours_must_run_fused(simulated_device, monkeypatch):
    """What users get by default; a layer that runs unfused is an error, not a slower row."""
    module, x = ConvBnRelu(16).eval(), torch.randn(2, 16, 9, 7)
    with torch.no_grad():
        gpu_variants.fused(module, x)
        assert simulated_device.launches
        fast = module.fast()
        fast.bn = torch.nn.GroupNorm(4, 16)
        monkeypatch.setattr(module, "fast", lambda: fast)
        with pytest.raises(RuntimeError, match="resnet_fast runs in part unfused"):
            gpu_variants.fused(module, x)
    assert backends.fallbacks() == {}


class Gpu:
    """A GPU that works while the host goes on: 1 ms a replay; the host needs ``host`` ms to launch one."""

    def __init__(self, monkeypatch, host):
        self.now = self.free = 0.0  # ms: the host's clock, and when the GPU has done all it was given
        self.host, self.replayed = host, 0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)

    def wait(self):
        self.now = max(self.now, self.free)

    def sleep(self, cycles):
        self.free = max(self.now, self.free) + cycles / 2e6

    def replay(self):
        self.replayed += 1
        self.now += self.host
        self.free = max(self.now, self.free) + 1


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.now, self.gpu.free)

    def query(self):
        return self.gpu.now >= self.at

    def synchronize(self):
        self.gpu.wait()

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.mark.parametrize("host", [0.01, 3.0])
def test_a_graph_never_waits_for_the_host(monkeypatch, host):
    """1 ms a replay, also where the host takes three times as long for a launch: it begins with a lead."""
    gpu = Gpu(monkeypatch, host)
    timed = clock.Clock("cuda", torch.float16)
    assert timed.sample(clock.Replay(gpu), 10) == pytest.approx(1e-3)
    assert gpu.replayed >= 10


def test_a_host_that_cannot_keep_ahead_gives_no_time(monkeypatch):
    gpu = Gpu(monkeypatch, 1e6)
    with pytest.raises(RuntimeError, match="the host does not keep ahead"):
        clock.Clock("cuda", torch.float16).sample(clock.Replay(gpu), 10)


def test_a_call_counts_the_host(monkeypatch):
    """The host's clock from an idle GPU to an idle GPU."""
    gpu = Gpu(monkeypatch, 0.5)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: gpu.now * 1e-3)
    gpu.free = 7.0
    assert clock.Clock("cuda", torch.float16).sample(gpu.replay, 4) == pytest.approx((0.5 + 4) / 4 * 1e-3)


PYTEST = """
tests/gpu/gpu_ops.py::test_add_relu[torch.float16] PASSED                [  9%]
[gw1] [ 18%] PASSED tests/gpu/gpu_ops.py::test_convolutions[(2, 64, (9, 7), 64, 3, 1, 1)-torch.float16]
[gw0] [ 27%] FAILED tests/gpu/gpu_machine.py::test_graph
tests/gpu/gpu_machine.py::test_compiled ERROR       [ 36%]
=================================== FAILURES ===================================
tests/gpu/gpu_ops.py::test_of_the_summary PASSED [ 40%]
"""


def test_outcomes_of_tests():
    assert tests.outcomes(PYTEST) == {
        "tests/gpu/gpu_ops.py::test_add_relu[torch.float16]": "PASSED",
        "tests/gpu/gpu_ops.py::test_convolutions[(2, 64, (9, 7), 64, 3, 1, 1)-torch.float16]": "PASSED",
        "tests/gpu/gpu_machine.py::test_graph": "FAILED",
        "tests/gpu/gpu_machine.py::test_compiled": "ERROR",
    }


SANITIZER = """========= COMPUTE-SANITIZER
steps: 10
========= Invalid __global__ write of size 4 bytes
=========     at conv_bn_relu_fwd_kernel+0x70
========= Invalid __global__ write of size 4 bytes
=========     at conv_bn_relu_fwd_kernel+0x70
========= Error: Race reported between Write access at 0x10 and Read access at 0x20
========= Error: Race reported between Write access at sm90_xmma_dgrad_execute_kernel__5x_cudnn+0x7dd0
steps: 40
========= ERROR SUMMARY: 3 errors
"""


def test_reports_of_the_sanitizer(tmp_path):
    found = sanitize.errors(SANITIZER)
    assert [line.split(" at ")[0] for line in found] == [
        "Invalid __global__ write of size 4 bytes",
        "Error: Race reported between Write access",
    ]
    assert found[0].endswith(" at conv_bn_relu_fwd_kernel+0x70")
    (library,) = sanitize.errors(SANITIZER, library=True)
    assert library.endswith("__5x_cudnn+0x7dd0")
    assert sanitize.errors("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n") == []
    commands = sanitize.commands(parsed(tmp_path), "/bin/compute-sanitizer")
    first = next(iter(commands))
    assert first == "memcheck: steps of training"
    assert commands[first][-1] == "steps=2000"
    assert {f"racecheck: {name}" for name in sanitize.NAMES} <= set(commands)


def test_the_sanitizer_is_asked(tmp_path, monkeypatch):
    """A program in its place: what it reports, its status and what is late become rows."""
    program = tmp_path / "compute-sanitizer"
    report = "echo '========= Invalid read'; exit 66"
    program.write_text(f'#!/bin/bash\ncase "$*" in *racecheck*stages*) {report};; esac\necho "steps: 20"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sanitize, "tool", lambda name: str(program))
    rows, found = [], parsed(tmp_path)
    sanitize.run("families", found, rows.append, time.time() + 60)
    errors = [row for row in rows if "error" in row]
    assert [row["check"] for row in errors] == ["racecheck: stages"]
    assert errors[0]["error"] == "racecheck: stages: Invalid read"
    assert {row["check"]: row.get("steps") for row in rows}["memcheck: steps of training"] == 20
    monkeypatch.setattr(sanitize, "tool", lambda name: None)
    rows.clear()
    sanitize.run("families", found, rows.append, time.time() + 60)
    assert "compute-sanitizer is not installed here" in rows[0]["missing"]


def test_families_are_all_listed():
    from benchmarks.kit.families import FAMILIES

    assert set(sanitize.NAMES) == set(FAMILIES)


def test_results_are_tables(tmp_path):
    found = parsed(tmp_path)
    rows = [
        {"item": "a", "case": "net", "variant": "x|y", "ms": 1.5, "ms low": 1.25, "ms high": 2.0},
        {"item": "a", "case": "net", "variant": "ours", "ms": 1.0, "ms low": 1.0, "ms high": 1.0, "best peer": "x|y"},
        {"item": "a", "variant": "z", "error": "not timed, WrongResultError: far"},
        {"item": "b", "missing": "ncu is not installed here"},
    ]
    results.write([supervise.Phase("infer", 60.0, "done", 3.0, rows, {"card": "H100", "torch": "2.11"})], found)
    text = (tmp_path / "out/results.md").read_text()
    assert text.startswith("card H100, torch 2.11\n")
    assert "| net  | x/y     | 1.5 (1.25-2) |" in text
    assert "- **z**: not timed, WrongResultError: far" in text
    assert "- missing: ncu is not installed here" in text
    assert json.loads((tmp_path / "out/results.json").read_text())["phases"][0]["rows"] == rows
    assert not list((tmp_path / "out").glob("*.partial"))


def test_what_is_wrong_has_no_time(simulated_device, no_gpu, tmp_path, monkeypatch):
    """The reason stands where the time would be; the others go on."""
    wrong = gpu_variants.Variant(
        lambda module, x: lambda image: tuple(1.1 * y for y in eager(module, image)), cast=True
    )
    monkeypatch.setitem(gpu_variants.GPU_VARIANTS, "cuDNN fused", wrong)
    monkeypatch.setattr(infer, "PLAIN", ("eager channels_last, cast weights", "cuDNN fused"))
    monkeypatch.setattr(infer, "GRAPHS", ())
    rows = []
    found = parsed(tmp_path, "--simulated", "--rounds", "5", "--seconds", "0.1")
    infer.run("cifar_resnet20 2 8", found, rows.append, time.time() + 60)
    assert [row["variant"] for row in rows] == ["cuDNN fused", "eager channels_last, cast weights"]
    assert "ms" not in rows[0]
    assert rows[0]["error"].startswith("not timed, WrongResultError: cuDNN fused on ")
    assert rows[1]["ms"] > 0


def eager(module, image):
    return gpu_variants.eager(module, image)(image)
