"""What only a GPU can show: measured choices, streams, graphs, the compiler, no synchronisation with the host."""

import functools
import json
import os
import statistics
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from helpers.processes import run_pytest
from helpers.support import randomize_

import resnet_fast
from resnet_fast import backends
from resnet_fast.gpu import convolution as layers
from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates import cuda as cuda_configs
from resnet_fast.gpu.candidates.triton import Config
from resnet_fast.gpu.cuda import conv as cuda_conv
from resnet_fast.gpu.layer import Layer, gpu_of

pytestmark = pytest.mark.machine


@pytest.fixture
def network(gpu):
    model = randomize_(resnet_fast.cifar_resnet20().eval()).to(gpu, torch.float16).requires_grad_(False)
    x = torch.randn(4, 3, 32, 32, device=gpu, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    return model, x, model(x)


def test_the_stream_is_that_of_pytorch(gpu):
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        assert torch.ops.resnet_fast.cuda_stream(0) == torch.cuda.current_stream(0).cuda_stream != 0
    assert torch.ops.resnet_fast.cuda_stream(0) == torch.cuda.current_stream(0).cuda_stream


def test_choices_are_measured_and_kept(gpu, tmp_path):
    layer = Layer(8, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1), torch.float16, "ieee", False, True)
    device = torch.device(gpu, 0)
    file = tmp_path / "gpu.json"
    tuner = tune.tuner(device)
    fresh = tune.Tuner(tuner.gpu, file, tuner.measure)
    choice = fresh.choose(layer, lambda: layers.trials(layer, device))
    (seconds,) = fresh.seconds.values()
    assert list(seconds) == [str(c) for c in tune.candidates(layer, tuner.gpu)]
    assert len(json.loads(file.read_text())) == 1
    assert tune.Tuner(tuner.gpu, file, None).choose(layer, pytest.fail) == choice
    print({name: f"{s * 1e6:.1f} us" for name, s in seconds.items()}, "chosen:", choice)


def graph_seconds(calls, rounds=15):
    """Medians of a graph of 20 calls of each, in turn: on purpose not the tuner's own clock."""
    graphs = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(20):
                call()
    samples = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            graph.replay()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(5):
                graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end) * 1e-3 / 100)
    return {name: statistics.median(values) for name, values in samples.items()}


LAYERS = [
    # batch, size, channels, filters, kernel, stride, residual, relu, shifted
    (1, 7, 512, 512, 3, 1, True, True, True),
    (8, 28, 128, 128, 3, 1, True, True, True),
    (8, 56, 64, 256, 1, 1, True, True, True),
    (64, 56, 64, 128, 1, 2, False, False, False),
    (64, 14, 256, 256, 3, 1, False, True, True),
]


@pytest.mark.alone
@pytest.mark.parametrize("sizes", LAYERS, ids=str)
def test_the_fastest_is_chosen_though_the_host_is_slow(gpu, sizes, monkeypatch):
    batch, size, channels, filters, kernel, stride, residual, relu, shifted = sizes
    image, taps = (batch, size, size, channels), ((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2))
    layer = Layer(*image, filters, *taps, torch.float16, "ieee", residual, relu, folded=True, shifted=shifted)
    device = torch.device(gpu, 0)
    tuner = tune.tuner(device)
    layers.prepare([layer], device)
    with monkeypatch.context() as patch:
        run = layers.run

        def slowly(*arguments):
            time.sleep(1e-3)
            return run(*arguments)

        patch.setattr(layers, "run", slowly)
        fresh = tune.Tuner(tuner.gpu, None, tuner.measure)
        choice = fresh.choose(layer, lambda: layers.trials(layer, device))
    trial = layers.trials(layer, device)[0]
    seconds = graph_seconds({c: functools.partial(trial, c) for c in tune.candidates(layer, tuner.gpu)})
    print({str(c): f"{s * 1e6:.1f} us" for c, s in seconds.items()}, "chosen:", choice)
    assert seconds[choice] <= 1.03 * min(seconds.values())


@pytest.mark.alone
def test_cold_start(gpu, tmp_path):
    """The first call of resnet50 with empty caches: at most 10 s on an H100."""
    code = """
import time, torch, resnet_fast
model = resnet_fast.resnet50().eval().cuda().half().requires_grad_(False)
x = torch.randn(8, 3, 224, 224, device="cuda", dtype=torch.float16)
torch.nn.functional.conv2d(x, torch.ones(8, 3, 3, 3, device="cuda", dtype=torch.float16))
torch.cuda.synchronize()
begin = time.perf_counter()
model(x)
torch.cuda.synchronize()
print(time.perf_counter() - begin)
"""
    caches = {"RESNET_FAST_CACHE": str(tmp_path / "choices"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **caches})
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout, done.stderr)
    assert float(done.stdout) <= 10


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


def test_a_tile_that_does_not_fit_is_left_out(gpu, monkeypatch):
    """Of a list for a larger GPU: the measurement warns and goes on with the others."""
    layer = Layer(1, 8, 8, 64, 64, (3, 3), (1, 1), (1, 1), torch.float16, "ieee", False, True)
    device = torch.device(gpu, 0)
    tuner = tune.Tuner(gpu_of(device), None, tune.tuner(device).measure)
    huge = Config(256, 256, 64, 8, 8)
    monkeypatch.setattr(tune, "candidates", lambda *_: [huge, tune.LIBRARY])
    with pytest.warns(UserWarning, match="does not run on this GPU"):
        assert tuner.choose(layer, lambda: layers.trials(layer, device)) == tune.LIBRARY


@pytest.mark.parametrize("options", [[], ["--cold", "--dtype", "bfloat16"]], ids=["warm", "cold"])
def test_benchmarks_pick_the_gpu(gpu, options):
    selection = "conv_bn_relu and 128x64x8x8 or network and cifar_resnet32 and 128x3 and not autotune"
    done = run_pytest("benchmarks", "--benchmark-only", "-q", "--seconds", "1", *options, "-k", selection)
    assert done.returncode == 0, done.stdout[-4000:]
    assert torch.cuda.get_device_name() in done.stdout
    assert "CUDA graph of resnet_fast, cast weights" in done.stdout
