"""The clock that compares candidates, on a GPU of pretence: its own time, graphs, and a host that does not count."""

import contextlib

import pytest
import torch

from resnet_fast.gpu import timing

DEVICE = torch.device("cuda", 1)


class Gpu:
    """Work takes its seconds, whoever queues it; a graph's work is done when it is replayed."""

    def __init__(self, monkeypatch):
        self.now, self.capturing, self.current, self.sleeps = 0.0, None, [0], 0
        self.stream = None
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeCUDAGraph(self))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(self, device))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream or FakeStream(self, None))
        monkeypatch.setattr(torch.cuda, "stream", self.on_stream)
        monkeypatch.setattr(torch.cuda, "device", self.on_device)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)

    @contextlib.contextmanager
    def on_device(self, device):
        self.current.append(device.index)
        yield
        self.current.pop()

    @contextlib.contextmanager
    def on_stream(self, stream):
        self.stream, before = stream, self.stream
        yield
        self.stream = before

    def sleep(self, cycles):
        self.sleeps += 1

    def work(self, seconds):
        assert self.current[-1] == DEVICE.index
        if self.capturing is None:
            self.now += seconds
        else:
            self.capturing.append(seconds)


class FakeStream:
    def __init__(self, gpu, device):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        assert self.gpu.current[-1] == DEVICE.index
        self.at = self.gpu.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class FakeCUDAGraph:
    def __init__(self, gpu):
        self.gpu, self.replays = gpu, 0

    def capture_begin(self, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.gpu.capturing = self.captured = []

    def capture_end(self):
        self.gpu.capturing = None

    def replay(self):
        self.replays += 1
        for seconds in self.captured:
            self.gpu.work(seconds)


@pytest.fixture
def gpu(monkeypatch):
    with monkeypatch.context() as patch:
        yield Gpu(patch)


def test_seconds_of_a_call(gpu):
    """Whatever the length: many short calls a graph, few long ones; several operands take turns."""
    turns = []

    def call(number, seconds):
        turns.append(number)
        gpu.work(seconds)

    candidates = {
        "short": [lambda n=n: call(n, 4e-6 + n * 2e-6) for n in range(2)],
        "long": [lambda: gpu.work(5e-6)],
        "longer": [lambda: gpu.work(6e-3)],
    }
    seconds, refused = timing.interleaved(candidates, DEVICE)
    assert seconds == pytest.approx({"short": 5e-6, "long": 5e-6, "longer": 6e-3})
    assert refused == {}
    assert turns[2:] == [0, 1] * (timing.MOST_CALLS // 2)  # the first two: compiled, and how long is it
    assert gpu.current == [0]
    assert gpu.sleeps > 0


def test_who_is_behind_is_out(gpu, monkeypatch):
    """And all take turns: in each round a sample of each."""
    samples = []
    sample = timing._Replay.sample
    monkeypatch.setattr(timing._Replay, "sample", lambda self: samples.append(self) or sample(self))
    candidates = {name: [lambda s=s: gpu.work(s)] for name, s in (("a", 1e-5), ("b", 1.2e-5), ("c", 1.3e-5))}
    seconds, _ = timing.interleaved(candidates, DEVICE)
    assert list(seconds) == ["a", "b", "c"]
    order = ["abc".index(name) for name in "abc"]
    numbers = {replay: order[i] for i, replay in enumerate(samples[:3])}
    taken = [numbers[replay] for replay in samples[3:]]  # the first of each says how many replays a sample needs
    assert taken == [0, 1, 2] * timing.TRIAL_ROUNDS + [0, 1] * (timing.ROUNDS - timing.TRIAL_ROUNDS)


def test_what_cannot_run_is_refused(gpu):
    def broken():
        raise RuntimeError("no engine")

    def breaks_a_capture():
        if gpu.capturing is not None:
            raise RuntimeError("not permitted when stream is capturing")
        gpu.work(1e-5)

    candidates = {"broken": [broken], "not captured": [breaks_a_capture], "right": [lambda: gpu.work(2e-5)]}
    seconds, refused = timing.interleaved(candidates, DEVICE)
    assert seconds == pytest.approx({"right": 2e-5})
    assert {name: str(error) for name, error in refused.items()} == {
        "broken": "no engine",
        "not captured": "not permitted when stream is capturing",
    }
    assert gpu.capturing is None


def test_a_fault_of_the_device_is_raised(gpu):
    def faulty():
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        timing.interleaved({"faulty": [faulty], "right": [lambda: gpu.work(1e-5)]}, DEVICE)
