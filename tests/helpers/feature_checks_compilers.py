"""Checks of the rows of docs/features.md about compilers, modes and ``fuse``. See feature_support.py."""

import contextlib
import io
import logging
import tempfile
import threading
from pathlib import Path

import onnx
import onnxruntime
import torch
from helpers.feature_support import SIZE, block, check, foreign, fresh, graph, is_ours, note_graph
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import resnet_fast
from resnet_fast import backends, reference

# Of the table's columns: what compiles modules, or reads their code, takes them as they are.
PLAIN = ("compiled",)


def compiled(m, **settings):
    """The twin is compared as it is."""
    if not is_ours(m):
        return m
    torch._dynamo.reset()

    def backend(graph_module, inputs):
        note_graph(graph_module)
        return graph_module

    return torch.compile(m, backend=backend, fullgraph=True, **settings)


@check("`torch.compile`", networks=block, leaves_out=PLAIN)
def _(m, x):
    return compiled(m)(x), m


@check("`torch.compile(dynamic=True)`", networks=block, leaves_out=PLAIN)
def _(m, x):
    call = compiled(m, dynamic=True)
    return [call(x), call(torch.randn(3, 3, SIZE, SIZE))], m


@check('`torch.compile(backend="resnet_fast")`', leaves_out=PLAIN)
def _(m, x):
    torch._dynamo.reset()
    return (torch.compile(m, backend="resnet_fast", fullgraph=True) if is_ours(m) else m)(x), m


@check("`torch.export`", networks=block, gradients=False, leaves_out=PLAIN)
def _(m, x):
    if not is_ours(m):
        return m(x).detach(), nn.Identity()
    exported = torch.export.export(m, (x,))
    note_graph(exported)
    return exported.module()(x).detach(), nn.Identity()


@check('`torch.export` within `backends.use("cpu")`', networks=block, gradients=False, leaves_out=PLAIN)
def _(m, x):
    if not is_ours(m):
        return m(x).detach(), nn.Identity()
    with backends.use("cpu"):
        exported = torch.export.export(m, (x,))
    note_graph(exported)
    return exported.module()(x).detach(), nn.Identity()


def in_onnx(m, x, **settings):
    """What ONNX Runtime makes of the exported network; the twin runs as it is."""
    if not is_ours(m):
        return m(x).detach(), nn.Identity()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(m, (x,), path, verbose=False, **settings)
        graph.extend(f"{n.domain}.{n.op_type}" for n in onnx.load(path).graph.node)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y), nn.Identity()


@check("`torch.onnx.export(dynamo=True)`", gradients=False, leaves_out=("training", *PLAIN))
def _(m, x):
    return in_onnx(m, x, dynamo=True)


@check("`torch.onnx.export(dynamo=False)`", gradients=False, leaves_out=("training", *PLAIN))
def _(m, x):
    return in_onnx(m, x, dynamo=False)


@check("`torch.jit.trace`", gradients=False, leaves_out=PLAIN)
def _(m, x):
    return torch.jit.trace(m, x, check_trace=False)(x), m


@check("`torch.jit.script`", leaves_out=PLAIN)
def _(m, x):
    scripted = torch.jit.script(m)
    graph.extend(n.kind() for n in scripted.inlined_graph.nodes())
    return scripted(x), m


@check("`torch.fx.symbolic_trace`", leaves_out=PLAIN)
def _(m, x):
    traced = torch.fx.symbolic_trace(m)
    note_graph(traced)
    return traced(x), m


@check("`prepare_fx`: quantisation of graphs", leaves_out=PLAIN)
def _(m, x):
    prepare = prepare_qat_fx if m.training else prepare_fx
    prepared = prepare(m, get_default_qconfig_mapping() if not m.training else get_default_qat_qconfig_mapping(), (x,))
    note_graph(prepared)
    return prepared(x), nn.Identity()


@check("`FakeTensorMode`", gradients=False)
def _(m, x):
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = m(mode.from_tensor(x))
    return torch.tensor(y.shape)


@check("`TorchDispatchMode`")
def _(m, x):
    with Passing():
        return m(x)


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@check("`FlopCounterMode`, which hooks every module")
def _(m, x):
    with FlopCounterMode(display=False):
        return m(x)


@check("`torch.profiler`")
def _(m, x):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        return m(x)


@check("several threads at once", gradients=False)
def _(m, x):
    found = {}

    def call(i):
        with torch.set_grad_enabled(i % 2 == 0) if not m.training else contextlib.nullcontext():
            found[i] = (fresh(m) if m.training else m)(x * i).detach()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return [found[i] for i in range(3)]


@check("`torch.set_default_dtype`, `set_default_device`")
def _(m, x):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            return m(x)
    finally:
        torch.set_default_dtype(torch.float32)


@check("`fuse`: keyword arguments", networks=foreign)
def _(m, x):
    return m(x=x), m


class Scaled(reference.BasicBlock):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


def scaled():
    eager = Scaled(3, 3)
    return resnet_fast.fuse(eager), eager


@check("`fuse`: another argument than the tensors", networks=scaled)
def _(m, x):
    m(x)
    return m(x, scale=2.0), m


@check("`pickle`, `torch.save` of a module")
def _(m, x):
    stream = io.BytesIO()
    torch.save(m, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    return again(x), again
