"""What only a GPU can show: measured choices, streams, graphs, the compiler, no synchronisation with the host."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import randomize_

import resnet_fast
from resnet_fast import backends
from resnet_fast._triton import cuda_configs, cuda_conv, tune
from resnet_fast._triton.configs import Config, Layer, candidates

pytestmark = pytest.mark.machine
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def network(gpu):
    model = randomize_(resnet_fast.cifar_resnet20().eval()).to(gpu, torch.float16).requires_grad_(False)
    x = torch.randn(4, 3, 32, 32, device=gpu, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    return model, x, model(x)


def test_choices_are_measured_kept_and_fast_enough(gpu, tmp_path):
    """The library is among the candidates, so what is chosen is not slower than it, but for the noise of the clock."""
    layer = Layer(8, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1), torch.float16, "ieee", False, True)
    x = torch.randn(8, 128, 28, 28, device=gpu).half().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3, device=gpu).half()

    def run(choice):
        with tune.use(choice):
            return resnet_fast.ops.conv_bn_relu(x, weight, padding=1)

    file = tmp_path / "gpu.json"
    tuner = tune.tuner(x.device)
    fresh = tune.Tuner(tuner.gpu, file, tuner.measure)
    choice = fresh.choose(layer, run)
    (seconds,) = fresh.seconds.values()
    assert len(seconds) == len(candidates(layer, tuner.gpu)) + 1
    assert seconds[str(choice)] <= seconds[tune.LIBRARY] * 1.03
    assert len(json.loads(file.read_text())) == 1
    assert tune.Tuner(tuner.gpu, file, None).choose(layer, run) == choice
    print({name: f"{s * 1e6:.1f} us" for name, s in seconds.items()}, "chosen:", choice)


def test_the_command_shows_the_choices(gpu):
    command = [sys.executable, "-m", "resnet_fast", "explain", "cifar_resnet20", "--device", "cuda"]
    done = subprocess.run([*command, "--dtype", "float16"], capture_output=True, text=True, check=True)
    assert "Measured once on this GPU" in done.stdout
    assert "3x3/1 16 -> 1x16x32x32: " in done.stdout


def test_counters_of_split_sums(gpu):
    """The same counters in launch after launch; those of two streams and of a graph, all at once, are their own."""
    x = torch.randint(-2, 3, (8, 256, 14, 14)).to(gpu, torch.float16).contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-2, 3, (256, 256, 3, 3)).to(gpu, torch.float16)
    expected = F.conv2d(x.float(), weight.float(), padding=1).relu().half()
    tile = next(i for i, t in enumerate(cuda_configs.tiles()) if t.load == "halo" and t.channels == 64)
    run = functools.partial(resnet_fast.ops.conv_bn_relu, x, weight, padding=1)
    with tune.use(cuda_configs.CudaConfig(tile, 64, 4)):
        assert all(torch.equal(run(), expected) for _ in range(3))
        counters = cuda_conv.counters_of(x, 1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [run() for _ in range(4)]
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        results = []
        for _ in range(50):
            with torch.cuda.stream(streams[0]):
                graph.replay()
            for stream in streams[1:]:
                with torch.cuda.stream(stream):
                    results.append(run())
            results.append(run())
        torch.cuda.synchronize()
        assert all(torch.equal(y, expected) for y in (*captured, *results))
        assert cuda_conv.counters_of(x, 1) is counters
        assert not counters.any()


def test_graph(network):
    model, x, expected = network
    image = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(image)
    image.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(y, expected.flip(0))
    assert backends.fallbacks() == {}


def test_compiled(network):
    model, x, expected = network
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        # The convolutions are the same kernels; of the mean and the linear layer the compiler may round 16-bit logits
        # elsewhere: a few units in the last place, 2^-11, of the largest.
        assert (compiled(x).float() - expected.float()).abs().max() <= 2**-8 * expected.float().abs().max()
        reduced = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            assert torch.isfinite(reduced(x)).all()


def test_another_stream(network):
    model, x, expected = network
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = model(x)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


def test_the_host_does_not_wait(network):
    model, x, expected = network
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(y, expected)


def test_a_tile_that_does_not_fit_is_left_out(gpu):
    """Of a list for a larger GPU: the measurement warns and goes on with the others."""
    layer = Layer(1, 8, 8, 64, 64, (3, 3), (1, 1), (1, 1), torch.float16, "ieee", False, True)
    x = torch.randn(1, 64, 8, 8, device=gpu).half()
    weight = torch.randn(64, 64, 3, 3, device=gpu).half()
    tuner = tune.Tuner(tune.gpu_of(x.device), None, tune.tuner(x.device).measure)
    huge = Config(256, 256, 64, 8, 8)

    def run(choice):
        with tune.use(huge if choice != tune.LIBRARY else choice):
            return resnet_fast.ops.conv_bn_relu(x, weight, padding=1)

    with pytest.warns(UserWarning, match="does not run on this GPU"):
        assert tuner.choose(layer, run) == tune.LIBRARY


@pytest.mark.parametrize("options", [[], ["--cold", "--dtype", "bfloat16"]], ids=["warm", "cold"])
def test_benchmarks_pick_the_gpu(gpu, options):
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "--seconds", "1", *options]
    command += ["-k", "conv_bn_relu and 128x64x8x8 or network and cifar_resnet32 and 128x3 and not autotune"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]
    assert torch.cuda.get_device_name() in done.stdout
    assert "CUDA graph of resnet_fast, cast weights" in done.stdout
