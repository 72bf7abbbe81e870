"""The choice of a kernel: measured once, kept, the same in the next process; the library is one of the candidates."""

import dataclasses
import itertools
import json

import pytest
import torch
from helpers.stage_support import add_kernels
from helpers.support import computing, randomize_

from resnet_fast import backends, blocks
from resnet_fast.gpu import library, shipped, tune
from resnet_fast.gpu.candidates.cuda import CudaConfig
from resnet_fast.gpu.candidates.triton import Config
from resnet_fast.gpu.layer import A100, Layer
from resnet_fast.gpu.tune import candidates, default

LAYER = Layer(8, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1), torch.bfloat16, "ieee", True, True)


class Clock:
    """Stands for the GPU: the time of a candidate is looked up; ``None`` for one that cannot run."""

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, []

    def __call__(self, calls):
        for runs in calls.values():
            for run in runs:
                run()
        seconds = {c: self.seconds(c) for c in calls}
        refused = {c: RuntimeError("out of registers") for c, s in seconds.items() if s is None}
        return {c: s for c, s in seconds.items() if s is not None}, refused

    def trials(self):
        return [self.asked.append]

    @property
    def runs(self):
        return len(self.asked)


def choose(file, seconds, layer=LAYER, backend="auto"):
    clock = Clock(seconds)
    return tune.Tuner(A100, file, clock).choose(layer, clock.trials, backend), clock


def test_the_fastest_wins_and_the_library_counts(tmp_path):
    found = candidates(LAYER, A100)
    choice, clock = choose(tmp_path / "a.json", lambda c: 1.0 if c == found[2] else 2.0)
    assert choice == found[2]
    assert clock.asked == found
    assert {type(c) for c in found} == {Config, CudaConfig, str}
    assert found[-1] == tune.LIBRARY
    choice, _ = choose(tmp_path / "b.json", lambda c: 1.0 if c == tune.LIBRARY else 2.0)
    assert choice == tune.LIBRARY


def test_noise_does_not_decide(tmp_path):
    """Within 1%, the candidate that the model prefers stays."""
    found = candidates(LAYER, A100)
    choice, _ = choose(tmp_path / "a.json", lambda c: 1.0 if c == found[0] else 0.995)
    assert choice == found[0]


def test_kept_on_disk(tmp_path):
    file = tmp_path / "new" / "gpu.json"
    found = candidates(LAYER, A100)
    choice, _ = choose(file, lambda c: 1.0 if c == found[1] else 2.0)
    again, clock = choose(file, lambda c: 1.0 if c == tune.LIBRARY else 2.0)
    assert again == choice == found[1]
    assert clock.runs == 0
    other = Layer(1, 28, 28, 128, 128, (3, 3), (1, 1), (1, 1), torch.bfloat16, "ieee", True, True)
    choose(file, lambda c: 1.0 if c == tune.LIBRARY else 2.0, other)
    assert len(json.loads(file.read_text())) == 2
    assert [p.name for p in file.parent.iterdir()] == ["gpu.json"]  # no partial files


def test_a_named_backend_measures_its_own_kernels(tmp_path):
    """And its choices are kept apart from those of "auto", in the same file."""
    file = tmp_path / "gpu.json"
    for backend, kind in (("cuda", CudaConfig), ("triton", Config)):
        choice, clock = choose(file, lambda c: 1.0, backend=backend)
        assert clock.asked == candidates(LAYER, A100, backend)
        assert {type(c) for c in clock.asked} == {kind}
        again, clock = choose(file, lambda c: 0.0, backend=backend)
        assert again == choice
        assert clock.runs == 0
        assert isinstance(default(LAYER, A100, backend), kind)
    choice, _ = choose(file, lambda c: 1.0 if c == tune.LIBRARY else 2.0)
    assert choice == tune.LIBRARY
    assert len(json.loads(file.read_text())) == 3


def test_choices_are_told_with_what_was_measured(monkeypatch, tmp_path):
    """What `explain --device cuda` prints: for each layer its kernel, and the times of all candidates of every kind."""
    found = candidates(LAYER, A100)
    clock = Clock(lambda c: 1.0 if isinstance(c, CudaConfig) else 2.0)
    tuner = tune.Tuner(A100, tmp_path / "gpu.json", clock)
    monkeypatch.setattr(tune, "_tuners", {(False, 0): tuner})
    tuner.choose(LAYER, clock.trials)
    choice, seconds = tune.choices()[LAYER]
    assert str(choice).startswith("cuda halo ")
    assert seconds == {str(c): 1.0 if isinstance(c, CudaConfig) else 2.0 for c in found}
    assert {name.split()[0] for name in seconds} == {"cuda", "triton", "library"}
    again = tune.Tuner(A100, tmp_path / "gpu.json", clock)
    monkeypatch.setattr(tune, "_tuners", {(False, 0): again})
    again.choose(LAYER, clock.trials)
    assert tune.choices()[LAYER] == (choice, {})


def test_a_launch_a_stage_or_a_launch_a_convolution(simulated_device, monkeypatch, tmp_path):
    """A chain that could run in stages does so where that was the faster form, and keeps to it."""
    monkeypatch.setattr(backends.cuda, "replay", False)  # which asks no more
    add_kernels(simulated_device)
    torch.manual_seed(0)
    stage = randomize_(blocks.Stage(blocks.BasicBlock(16, 16), blocks.BasicBlock(16, 16))).half().eval()
    x = torch.randn(1, 16, 32, 32).half()
    file = tmp_path / "gpu.json"
    results = {}
    for slow, launches in ((tune.LAYERS, 1), (tune.STAGES, 4)):
        file.unlink(missing_ok=True)

        def measure(calls, slow=slow):
            for form in calls.values():
                form[0]()
            return {form: 2.0 if form == slow else 1.0 for form in calls}, {}

        with tune.use(default(LAYER, A100)):
            for _ in range(2):  # the second reads the file
                tuner = tune.Tuner(A100, file, measure)
                monkeypatch.setattr(tune, "tuner", lambda device, tuner=tuner: tuner)
                with torch.no_grad():
                    stage(x)
                    before = len(computing(simulated_device))
                    results[slow] = stage(x)
                assert len(computing(simulated_device)) - before == launches
                (name,) = {key for key, _ in tuner.chosen}
                assert name.startswith("chain ")
                assert name.endswith(" 1x16x32x32 float16")
    torch.testing.assert_close(*results.values(), rtol=1e-2, atol=1e-2)


def test_what_another_process_found_stays(tmp_path):
    """Two processes measure the same layer at once: both run what was stored first from then on."""
    file = tmp_path / "gpu.json"
    found = candidates(LAYER, A100)
    clock = Clock(lambda c: 1.0 if c == found[1] else 2.0)
    slow = tune.Tuner(A100, file, clock)  # read the file while it was empty
    choose(file, lambda c: 1.0 if c == found[0] else 2.0)
    slow.choose(LAYER, clock.trials)
    assert choose(file, lambda c: 0.0)[0] == found[0]
    assert slow.choose(LAYER, clock.trials) == found[0]


@pytest.mark.parametrize("text", ["{", "[1]", '{"x": {"block_m": 1}}'])
def test_a_broken_file_is_measured_anew(tmp_path, text):
    file = tmp_path / "gpu.json"
    file.write_text(text)
    with pytest.warns(UserWarning, match="measured anew"):
        choice, clock = choose(file, lambda c: 1.0)
    assert clock.runs
    assert choose(file, lambda c: 0.0)[0] == choice


def test_a_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="cannot be kept"):
        choice, _ = choose(blocked / "gpu.json", lambda c: 1.0)
    assert isinstance(choice, Config)


def test_nothing_is_measured_without_a_clock():
    tuner = tune.Tuner(A100, None, None)
    assert tuner.choose(LAYER, pytest.fail) == default(LAYER, A100)
    assert tuner.chosen == {}
    with tune.use(tune.LIBRARY):
        assert tuner.choose(LAYER, pytest.fail) == tune.LIBRARY


def test_libraries_run_layers_whose_filters_may_hold_the_scale(tmp_path):
    """Measured together with the others: the fastest for filters that may not be folded is known by then."""
    folded = dataclasses.replace(LAYER, folded=True)
    found = candidates(folded, A100)
    assert found == [*candidates(LAYER, A100)[:-1], library.CUDNN, tune.LIBRARY]
    assert library.CUDNN not in candidates(folded, A100, "cuda")
    clock = Clock(lambda c: {library.CUDNN: 1.0, found[1]: 2.0}.get(c, 3.0))
    tuner = tune.Tuner(A100, tmp_path / "gpu.json", clock)
    assert tuner.choose(folded, clock.trials) == library.CUDNN
    asked = clock.runs
    assert tuner.choose(LAYER, pytest.fail) == found[1]
    assert clock.runs == asked
    assert tune.Tuner(A100, tmp_path / "gpu.json", None).choose(folded, pytest.fail) == library.CUDNN
    pointwise = dataclasses.replace(folded, kernel=(1, 1), padding=(0, 0), residual=False)
    assert library.CUBLASLT in candidates(pointwise, A100)


def test_what_cannot_run_is_left_out(tmp_path):
    found = candidates(LAYER, A100)
    with pytest.warns(UserWarning, match="does not run on this GPU: out of registers"):
        choice, _ = choose(tmp_path / "a.json", lambda c: None if c == found[0] else 1.0)
    assert choice == found[1]
    with (
        pytest.warns(UserWarning, match="does not run"),
        pytest.raises(RuntimeError, match=r"none of triton .* runs on this GPU"),
    ):
        choose(None, lambda c: None)


def test_what_takes_long_is_said_once(capsys, monkeypatch, tmp_path):
    seconds = itertools.count(step=1.5)
    monkeypatch.setattr(tune.time, "perf_counter", lambda: next(seconds))
    clock = Clock(lambda c: 1.0)
    tuner = tune.Tuner(A100, tmp_path / "gpu.json", clock, "NVIDIA A100")
    said = []
    for batch in range(1, 5):
        tuner.choose(dataclasses.replace(LAYER, batch=batch), clock.trials)
        said.append(capsys.readouterr().err)
    assert said[0] == said[2] == said[3] == ""
    assert said[1].startswith("resnet_fast: measuring which kernels are fastest on NVIDIA A100, once, kept in ")
    assert said[1].count("\n") == 1


def test_the_file_names_gpu_and_versions(monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    file = tune.cache_file("NVIDIA A100-SXM4-80GB")
    assert file.parent == tmp_path
    assert file.name.startswith("gpu-NVIDIA_A100-SXM4-80GB-torch2")
    assert "triton3" in file.name
    # Choices are numbers of tiles: a build with other tiles has a file of its own.
    monkeypatch.setattr(shipped, "current", lambda: {"triton_tiles": "0.1", "cuda_tiles": "none built"})
    assert tune.cache_file("NVIDIA A100-SXM4-80GB") != file
