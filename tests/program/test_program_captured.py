"""The step in a CUDA graph, by a stand-in on CPUs: same training as without, bit for bit; when it is captured."""

import contextlib
import copy
import dataclasses
import math

import pytest
import torch
from helpers.program.support import differences, run, small_cifar
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_fast import models
from resnet_fast.program import data, distributed, loop, signals
from resnet_fast.program.captured_step import CapturedStep, obstacle
from resnet_fast.program.options import Options, ProgramError, parse

pytestmark = pytest.mark.usefixtures("one_thread")


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if call is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        arguments = call._schema.arguments
        given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        for t in tree_leaves([given.get(name) for name in written]):
            if isinstance(t, Tensor):
                self.before.setdefault(id(t), (t, t.clone()))
        out = call(*args, **kwargs)
        memory = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        # A view needs no copy: it shows what was written to its memory.
        results = [t if isinstance(t, Tensor) and _memory(t) not in memory else None for t in tree_leaves(out)]
        self.calls.append((call, args, kwargs, results))
        return out


def _memory(t):
    return t.untyped_storage().data_ptr()


class RecordedGraphs:
    """Graphs' stand-in on CPUs: what a run calls of PyTorch is recorded, and replayed on the same memory.

    As a graph does, it keeps every number that Python computed, and it refuses what would wait for the device.
    ``replays`` counts; with ``broken``, nothing can be captured.
    """

    def __init__(self, broken=False):
        self.broken, self.replays = broken, 0

    def aside(self):
        return contextlib.nullcontext()

    def capture(self, run):
        with _Recorder() as recorder:
            run()
        with torch.no_grad():  # a capture runs nothing
            for t, value in reversed(recorder.before.values()):  # the first value of memory written by two names
                t.copy_(value)
        if self.broken:
            raise RuntimeError("operation not permitted\nand more")

        def replay():
            self.replays += 1
            with torch.no_grad():
                for call, args, kwargs, results in recorder.calls:
                    found = tree_leaves(call(*args, **kwargs))
                    for into, t in zip(results, found, strict=True):
                        if into is not None:
                            into.copy_(t)

        return replay


def prepared(tmp_path, monkeypatch, graphs, *given, scaled=False):
    """A trainer of eight steps an epoch."""
    monkeypatch.setattr(models, "cifar_resnet20", lambda num_classes: models.CifarResNet(1, num_classes))
    options = parse([*small_cifar(tmp_path, count=64), "--epochs", "1", "--out", str(tmp_path / "run"), *given])
    trainer = loop.Trainer(options, data.load(options), distributed.Processes(options))
    if scaled:  # the first and the fifth step overflow
        trainer.scaler = torch.amp.GradScaler("cpu", growth_interval=2)
        poison, advance = torch.tensor(math.inf), trainer._advance
        trainer.network.fc.bias.register_hook(lambda grad: grad + poison)
        trainer._advance = lambda skipped: (advance(skipped), poison.fill_(math.inf if trainer.done == 4 else 0))
    if graphs is not None:
        parts = (trainer.network, trainer.optimizer, trainer.scaler, trainer._pass_inputs)
        trainer.graph = CapturedStep(*parts, graphs, trainer._give_up)
    return trainer


def trained(tmp_path, *given, start=None, **options):
    """The state after an epoch, or the rest of it behind the checkpoint ``start``."""
    trainer = prepared(tmp_path, *given, **options)
    if start is not None:
        trainer.restore(tmp_path / "run" / start)
    assert trainer._train(trainer._loaders()[0], signals.Signals()) == 0
    return trainer.state()


@pytest.mark.parametrize(
    ("way", "scaled", "replays"),
    [
        ((), False, 5),
        (("--accumulate", "2", "--ema", "0.9", "--recipe", "he"), False, 1),
        (("--mixup", "0.4", "--cutmix", "1", "--label-smoothing", "0.1"), False, 5),
        ((), True, 6),
    ],
    ids=["plain", "accumulated", "mixed", "scaled"],
)
def test_trains_as_without(way, scaled, replays, tmp_path, monkeypatch):
    if scaled:  # of the first step there is no momentum
        monkeypatch.setattr(CapturedStep, "WARM_UP", 1)
    graphs = RecordedGraphs()
    captured = trained(tmp_path, monkeypatch, graphs, *way, scaled=scaled)
    assert graphs.replays == replays
    plain = trained(tmp_path, monkeypatch, None, *way, scaled=scaled)
    monkeypatch.setattr(CapturedStep, "WARM_UP", 99)
    launched = trained(tmp_path, monkeypatch, RecordedGraphs(), *way, scaled=scaled)
    assert differences(captured, launched) == []
    assert captured["scaler"].get("scale") == (2.0**16 if scaled else None)  # halved and doubled twice
    # PyTorch's fused SGD rounds otherwise than its own for many tensors.
    apart = {name.split(".")[1] for name in differences(captured, plain)}
    assert apart <= {"model", "optimizer", "ema", "sums"}
    for name, value in plain["model"].items():
        torch.testing.assert_close(captured["model"][name], value, rtol=1e-3, atol=1e-4)


def test_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """A resumed run begins with steps outside of a graph."""
    whole = trained(tmp_path, monkeypatch, RecordedGraphs(), "--save-every", "5")
    resumed = trained(tmp_path, monkeypatch, RecordedGraphs(), start="step-00000005.pt")
    assert differences(whole, resumed) == []


def test_evaluation_sees_what_a_replay_wrote(tmp_path, monkeypatch):
    """Packed weights are found stale."""
    trainer = prepared(tmp_path, monkeypatch, RecordedGraphs())
    x = torch.randn(2, 3, 32, 32)
    batches = iter(trainer._loaders()[0])
    for _ in range(5):
        trainer.network.train()
        trainer._take(next(batches), True)
        versions = [t._version for t in (*trainer.network.parameters(), *trainer.network.buffers())]
        with torch.no_grad():
            scores = trainer.network.eval()(x)
            plain = copy.deepcopy(trainer.network)(x)
        assert torch.equal(scores, plain)
    assert trainer.graph._replay is not None
    trainer.network.train()
    trainer._take(next(batches), True)
    assert all(t._version > before for t, before in zip(trainer.network.parameters(), versions, strict=False))


def test_step_that_cannot_be_captured(tmp_path, monkeypatch, capfd):
    broken = trained(tmp_path, monkeypatch, RecordedGraphs(broken=True))
    line = "the step cannot be captured in a CUDA graph: operation not permitted"
    assert capfd.readouterr().out.count(f"{line}; it runs without one\n") == 1
    assert differences(broken, trained(tmp_path, monkeypatch, RecordedGraphs())) == []
    trainer = prepared(tmp_path, monkeypatch, None)
    trainer.options = dataclasses.replace(trainer.options, cuda_graph="on")
    with pytest.raises(ProgramError, match=f"^{line}; want --cuda-graph off$"):
        trainer._give_up("operation not permitted")


def test_where_it_runs(tmp_path, capfd):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert obstacle(Options("x", cuda_graph="auto"), gpu, launched=False) is None
    assert obstacle(Options("x", cuda_graph="on", amp="fp16"), gpu, launched=False) is None
    for options, device, launched, reason in (
        (Options("x", cuda_graph="auto"), cpu, False, "it wants a CUDA device, and this run is on cpu"),
        (Options("x", cuda_graph="auto"), gpu, True, "it wants a single process, without torchrun"),
        (Options("x", compile=True, cuda_graph="auto"), gpu, False, "it does not go with --compile"),
        (Options("x", amp="fp16", cuda_graph="auto"), gpu, False, "with --amp fp16 on request only"),
        (Options("x"), gpu, False, "--cuda-graph off"),
    ):
        assert obstacle(options, device, launched=launched) == reason
        if options.cuda_graph == "auto" and options.amp == "off":
            with pytest.raises(ProgramError, match=f"^--cuda-graph on cannot be: {reason}$"):
                obstacle(dataclasses.replace(options, cuda_graph="on"), device, launched=launched)
    assert run(*small_cifar(tmp_path), "--cuda-graph", "on", "--out", tmp_path / "run") == 2
    assert capfd.readouterr().err.startswith("resnet_fast.train: --cuda-graph on cannot be: it wants a CUDA device")
