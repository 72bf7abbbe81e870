"""Other engines running the same networks from the same weights on the CPU: ONNX Runtime, OpenVINO, MNN and ncnn.

All start from one ONNX graph with the batch norms folded, and run in float32 on as many threads as PyTorch; OpenVINO
under bfloat16 autocast in bfloat16. An input is
bound when it first comes, and read where it lies or copied into the engine; later calls with the same tensor object run
the network and leave its outputs in row-major tensors, which the next call overwrites. Where an engine offers several
ways to use the same threads, each is tried and the fastest kept.
"""

from __future__ import annotations

import importlib
import logging
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .cases import TrainingStep
from .variants import Call, UnavailableError, Variant

__all__ = ["BF16_PEERS", "PEERS", "mnn", "ncnn", "onnxruntime", "openvino"]

Bind = Callable[[Tensor], Callable[[], Any]]
INPUT = "x"

# MNN's hint of that name, by number. Its default value takes tiles so large that ResNet32 is off by 1e-3 (relative
# rms); 1 keeps them small, for 3e-6.
WINOGRAD_MEMORY_LEVEL = 3
SMALL_TILES = 1


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = f"the package {package!r} is missing ({error}): pip install -e '.[peers]'"
        raise UnavailableError(reason) from error


def _binding(bind: Bind) -> Call:
    last, held = None, None
    run: Callable[[], Any] = tuple

    def call(x: Tensor) -> Any:
        nonlocal last, held, run
        if x is not last:
            last, held = x, x.contiguous()  # engines know its address only
            run = bind(held)
        return run()

    return call


def _fastest(candidates: list[Call], x: Tensor, seconds: float = 1.0) -> Call:
    """The candidate with the least time of a call, tried in turn at least 5 times."""
    best = [math.inf] * len(candidates)
    rounds, end = 0, time.perf_counter() + seconds
    while len(candidates) > 1 and (rounds < 5 or time.perf_counter() < end):
        rounds += 1
        for i, call in enumerate(candidates):
            call(x)  # the threads of the one before may still spin
            start = time.perf_counter()
            call(x)
            best[i] = min(best[i], time.perf_counter() - start)
    return candidates[best.index(min(best))]


class _Graph:
    """The module as ONNX for one shape of the input, and tensors for its outputs."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        # The graph is float32 under autocast, too: in what an engine computes is its own setting.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            outputs = module(x)
        self.single = isinstance(outputs, Tensor)
        shapes = [t.shape for t in ((outputs,) if self.single else outputs)]
        self.outputs = {f"y{i}": tuple(shape) for i, shape in enumerate(shapes)}
        _require("onnx", "onnx"), _require("onnxscript", "onnxscript")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
        with warnings.catch_warnings(), torch.autocast("cpu", enabled=False):
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                module, (x,), dynamo=True, input_names=[INPUT], output_names=list(self.outputs), verbose=False
            )
        self.onnx: bytes = program.model_proto.SerializeToString()

    def empty(self) -> list[Tensor]:
        return [torch.empty(shape) for shape in self.outputs.values()]

    def result(self, outputs: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """As the module returns it."""
        return outputs[0] if self.single else tuple(outputs)


_graphs: WeakKeyDictionary[nn.Module, dict[torch.Size, _Graph]] = WeakKeyDictionary()


def _graph(module: nn.Module, x: Tensor) -> _Graph:
    if isinstance(module, TrainingStep):
        raise UnavailableError("it runs inference only")
    graphs = _graphs.setdefault(module, {})
    if x.shape not in graphs:
        graphs[x.shape] = _Graph(module, x.contiguous())
    return graphs[x.shape]


def _tool(graph: _Graph, outputs: tuple[str, ...], command: Callable[[Path], list[str]]) -> tempfile.TemporaryDirectory:
    """A folder with what a converter, run as a program, made of ``model.onnx``."""
    folder = tempfile.TemporaryDirectory()
    (Path(folder.name) / "model.onnx").write_bytes(graph.onnx)
    done = subprocess.run(command(Path(folder.name)), cwd=folder.name, capture_output=True, text=True)
    missing = [name for name in outputs if not (Path(folder.name) / name).exists()]
    if done.returncode or missing:
        raise RuntimeError(f"{done.args[0]} gave {done.returncode}, without {missing}:\n{done.stdout}{done.stderr}")
    return folder


def onnxruntime(module: nn.Module, x: Tensor, threads: int | None = None) -> Call:
    """ONNX Runtime: all graph optimizations, one operator after the other, inputs and outputs bound in place."""
    ort = _require("onnxruntime", "onnxruntime")
    graph = _graph(module, x)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(graph.onnx, options, providers=["CPUExecutionProvider"])

    def bind(x: Tensor) -> Callable[[], Any]:
        outputs = graph.empty()
        binding = session.io_binding()
        binding.bind_input(INPUT, "cpu", 0, "float32", list(x.shape), x.data_ptr())
        for name, y in zip(graph.outputs, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, "float32", list(y.shape), y.data_ptr())
        result = graph.result(outputs)

        def run() -> Any:
            session.run_with_iobinding(binding)
            return result

        return run

    return _binding(bind)


def openvino(module: nn.Module, x: Tensor, threads: int | None = None) -> Call:
    """OpenVINO: one request on all threads (LATENCY), or the batch split among streams (THROUGHPUT)."""
    ov = _require("openvino", "openvino")
    core = ov.Core()
    whole = _graph(module, x)
    precision = "bf16" if torch.is_autocast_enabled("cpu") else "f32"

    def compiled(graph: _Graph, hint: str, **properties: Any) -> Any:
        properties |= {
            "PERFORMANCE_HINT": hint,
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": precision,
        }
        return core.compile_model(core.read_model(graph.onnx, b""), "CPU", properties)

    def split(model: Any, parts: int) -> Call:
        requests = [model.create_infer_request() for _ in range(parts)]

        def bind(x: Tensor) -> Callable[[], Any]:
            outputs = whole.empty()
            for k, request in enumerate(requests):
                request.set_input_tensor(0, ov.Tensor(x.chunk(parts)[k].numpy(), shared_memory=True))
                for i, y in enumerate(outputs):
                    request.set_output_tensor(i, ov.Tensor(y.chunk(parts)[k].numpy(), shared_memory=True))
            result = whole.result(outputs)

            def run() -> Any:
                for request in requests:
                    request.start_async()
                for request in requests:
                    request.wait()
                return result

            return run

        return _binding(bind)

    candidates = [split(compiled(whole, "LATENCY"), 1)]
    streams = compiled(whole, "THROUGHPUT").get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    if streams > 1 and x.shape[0] % streams == 0:
        part = _graph(module, x[: x.shape[0] // streams])
        candidates.append(split(compiled(part, "THROUGHPUT"), streams))
    return _fastest(candidates, x)


def mnn(module: nn.Module, x: Tensor, threads: int | None = None) -> Call:
    """MNN's Module API in high precision (float32), with small Winograd tiles."""
    engine = _require("MNN", "MNN")
    graph = _graph(module, x)
    # The converter's own program: MNN.tools would install a package and report the use of it by network.
    program = "import _tools, sys; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
    arguments = ["-f", "ONNX", "--modelFile", "model.onnx", "--MNNModel", "model.mnn", "--bizCode", "MNN"]
    config = {"backend": "CPU", "numThread": threads or torch.get_num_threads(), "precision": "high"}
    runtime = engine.nn.create_runtime_manager((config,))
    runtime.set_hint(WINOGRAD_MEMORY_LEVEL, SMALL_TILES)
    with _tool(graph, ("model.mnn",), lambda _: [sys.executable, "-c", program, *arguments]) as folder:
        net = engine.nn.load_module_from_file(
            f"{folder}/model.mnn", [INPUT], list(graph.outputs), runtime_manager=runtime
        )

    def bind(x: Tensor) -> Callable[[], Any]:
        source = engine.expr.placeholder(list(x.shape), engine.expr.NCHW)
        source.write(x.numpy())
        return lambda: graph.result([torch.from_numpy(y.read()) for y in net.onForward([source])])

    return _binding(bind)


def ncnn(module: nn.Module, x: Tensor, threads: int | None = None) -> Call:
    """ncnn in float32: the batch at once on all threads, or an image at a time on each thread."""
    engine = _require("ncnn", "ncnn")
    pnnx = _require("pnnx", "pnnx")
    workers = threads or torch.get_num_threads()
    batch = x.shape[0]
    whole = _graph(module, x)

    def load(graph: _Graph, threads: int) -> Any:
        net = engine.Net()
        net.opt.num_threads = threads
        net.opt.use_packing_layout = net.opt.use_winograd_convolution = True
        net.opt.use_fp16_storage = net.opt.use_fp16_packed = net.opt.use_fp16_arithmetic = False
        net.opt.use_bf16_storage = net.opt.use_bf16_packed = False
        files = ("model.ncnn.param", "model.ncnn.bin")
        with _tool(graph, files, lambda folder: [pnnx.EXEC_PATH, "model.onnx", "fp16=0"]) as folder:
            net.load_param(f"{folder}/{files[0]}")
            net.load_model(f"{folder}/{files[1]}")
        return net

    def infer(net: Any, source: Any, outputs: tuple[Tensor, ...]) -> None:
        extractor = net.create_extractor()
        extractor.input("in0", source)
        for i, y in enumerate(outputs):
            code, value = extractor.extract(f"out{i}")
            if code:
                raise RuntimeError(f"ncnn could not compute output {i}: {code}")
            y.copy_(torch.from_numpy(value.numpy(batch_index=0)).view_as(y))

    def in_parts(net: Any, parts: int, each: Callable[..., Any]) -> Call:
        def bind(x: Tensor) -> Callable[[], Any]:
            outputs = whole.empty()
            sources = [engine.Mat(part.numpy(), 0).clone() for part in x.chunk(parts)]
            targets = list(zip(*(y.chunk(parts) for y in outputs), strict=True))
            result = whole.result(outputs)

            def run() -> Any:
                list(each(infer, [net] * parts, sources, targets))
                return result

            return run

        return _binding(bind)

    candidates = [in_parts(load(whole, workers), 1, map)]
    if batch > 1:
        one = _graph(module, x[:1])
        candidates.append(in_parts(load(one, 1), batch, ThreadPoolExecutor(workers).map))
    return _fastest(candidates, x)


# ncnn errs up to four times what eager PyTorch does on cifar_resnet32.
SLACK = 10.0
PEERS = {
    "ONNX Runtime": Variant(onnxruntime, torch.contiguous_format, SLACK),
    "OpenVINO": Variant(openvino, torch.contiguous_format, SLACK),
    "MNN": Variant(mnn, torch.contiguous_format, SLACK),
    "ncnn": Variant(ncnn, torch.contiguous_format, SLACK),
}
BF16_PEERS = {"OpenVINO": PEERS["OpenVINO"]}  # the others' bfloat16, where they have it, is for storage only
