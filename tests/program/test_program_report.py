"""Reports: lines of progress, charts of several runs, TensorBoard, traces."""

import gzip
import importlib.util
import json
import sys

import pytest
import torch
from helpers.program.support import checkpoint, eight_layers, run, small_cifar, trainer_for

from resnet_fast.program import options, report
from resnet_fast.program.reports import profiling, summary


def test_lines_where_there_is_no_terminal(monkeypatch, capfd):
    clock = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])
    bar = report.Bar(2, 4, steps=10, first=3, show=True)
    for _ in range(7):
        clock[0] += 11
        bar.step(64, torch.tensor([32.0, 48.0, 64.0]))
    bar.close()
    # 11 s a step, 33 s between lines. After three of the seven steps of this epoch 4 + 20 are left, then 1 + 20.
    assert capfd.readouterr().out.splitlines() == [
        "epoch 2/4, step 6/10: loss 0.500, accuracy 75.0%, 6 images/s, 0% waiting for data, 0:04:24 left in all",
        "epoch 2/4, step 9/10: loss 0.500, accuracy 75.0%, 6 images/s, 0% waiting for data, 0:03:51 left in all",
    ]
    hidden = report.Bar(1, 1, steps=2, first=0, show=False)
    clock[0] += 99
    hidden.step(1, torch.ones(3))
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("one_thread")
def test_start_line(tmp_path, monkeypatch):
    eight_layers(monkeypatch)
    trainer = trainer_for(tmp_path, "--accumulate", "2", "--epochs", "3")
    count = sum(p.numel() for p in trainer.network.parameters())
    line = trainer.start_line()
    assert line.startswith(f"cifar_resnet20, {count:,} parameters, on cpu (1 thread); ")
    assert "; backend cpu: loaded, " in line
    assert line.endswith(
        "; images: 80 for training, 20 for test; 3 epochs of 5 steps of 16 images; writes into " + str(tmp_path / "run")
    )
    trainer.processes.world = 4
    line = summary.start_line(
        options.Options("x", backend="eager"), trainer.processes, trainer.network, {"training": 8}, 1, 1
    )
    assert ", on 4 processes, each cpu (" in line
    assert "; backend eager: PyTorch's own operators; " in line
    assert "; 1 epoch of 1 step of 512 images; " in line


def test_names_that_the_output_cannot_show(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        report.say("dog\udcff ü 犬")
    assert (tmp_path / "out").read_text() == "dog\\udcff \\xfc \\u72ac\n"


ROW = {"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5, "test_loss": 0.5, "test_accuracy": 0.25}


def test_figure_of_curves():
    """Whole epochs, a title, single points seen, names as they are."""
    names = ["_hidden", "$5_$"]
    figure = report.curves_figure({names[0]: [ROW], names[1]: [ROW | {"epoch": n} for n in (1, 2, 3)]})
    assert "_hidden" in figure.get_suptitle()
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert all(tick == int(tick) for tick in axes.get_xticks())
        markers = [line.get_marker() for line in axes.get_lines()]
        assert markers == ["o", "o", "None", "None"]
    (legend,) = (axes.get_legend() for axes in figure.axes if axes.get_legend())
    texts = legend.get_texts()
    assert [t.get_text() for t in texts] == [f"{name}, {part}" for name in names for part in ("training", "test")]
    assert not any(t.get_parse_math() for t in texts)
    assert not report.curves_figure({"$": [ROW]}).texts[0].get_parse_math()
    left, right = report.curves_figure({"a": [ROW]}).axes
    assert [float(line.get_ydata()[0]) for line in left.get_lines()] == [1.0, 0.5]
    assert [float(line.get_ydata()[0]) for line in right.get_lines()] == [50.0, 25.0]


def test_runs_of_equal_names(tmp_path, monkeypatch):
    a, b = tmp_path / "a/run", tmp_path / "b/run"
    assert report.names_of([a]) == ["run"]
    assert report.names_of([a, b, tmp_path / "other"]) == ["a/run", "b/run", "other"]
    assert report.names_of([a, tmp_path / "run"]) == ["a/run", f"{tmp_path.name}/run"]
    drawn = {}
    monkeypatch.setattr(report, "curves", lambda path, runs: drawn.update(runs))
    for number, folder in enumerate((a, b)):
        folder.mkdir(parents=True)
        report.log(folder / "log.csv", [ROW | {"train_loss": number}])
    assert report.main(["chart.png", str(a), str(b)]) == 0
    assert [drawn[name][0]["train_loss"] for name in ("a/run", "b/run")] == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch,train_loss\n1,2\n", "has no train_accuracy, test_loss, test_accuracy: want epoch, train_loss, "),
        ("epoch,train_loss,train_accuracy,validation_accuracy\n1,2,1,1\n", "has no validation_loss: want "),
        ("epoch,train_loss\n", "has no epoch yet"),
        ("", "has no epoch yet"),
        ("epoch\n1,2,3\n", "cannot be read: "),
        ("epoch\nfirst\n", "cannot be read: could not convert"),
        ("epoch,train_loss,train_accuracy,test_loss,test_accuracy\n1,1,1,1,1\n2,1\n", "has no train_accuracy, "),
    ],
)
def test_logs_that_cannot_be_drawn(text, message, tmp_path, capfd):
    (tmp_path / "log.csv").write_text(text)
    assert report.main([str(tmp_path / "chart.png"), str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert f"{tmp_path}/log.csv {message}" in error
    assert error.count("\n") == 1


def test_tensorboard_has_the_log(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    eight_layers(monkeypatch)
    given = [*small_cifar(tmp_path, count=16), "--epochs", "3", "--lr", "0.01", "--tensorboard", "--keep", "9"]
    assert run(*given, "--out", tmp_path / "run") == 0
    # Back to the end of the first epoch, of two steps.
    for step in (4, 6):
        (tmp_path / f"run/step-{step:08d}.pt").unlink()
    assert run(*given, "--out", tmp_path / "run", "--resume") == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    history = checkpoint(tmp_path / "run/step-00000006.pt")["history"]
    for tag, column in (
        ("loss/train", "train_loss"),
        ("accuracy/test", "test_accuracy"),
        ("lr", "lr"),
        ("images_per_s", "images_per_s"),
    ):
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert found == {row["step"]: pytest.approx(row[column], rel=1e-6) for row in history}, tag
        assert len(events.Scalars(tag)) == 3, "what was taken back still counts"


def test_tensorboard_that_is_not_installed(monkeypatch, capfd):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    assert run("--data", "mnist5k", "--tensorboard") == 2
    assert "--tensorboard needs tensorboard: pip install resnet_fast[tensorboard]" in capfd.readouterr().err


def test_profile_traces_ten_steps(tmp_path, monkeypatch, capfd):
    eight_layers(monkeypatch)
    given = [*small_cifar(tmp_path, count=32), "--batch", "2", "--epochs", "1", "--lr", "0.01", "--profile"]
    assert run(*given, "--out", tmp_path / "run") == 0
    trace = tmp_path / "run/trace-0.json.gz"
    assert f"trace of 10 steps: {trace}" in capfd.readouterr().out
    with gzip.open(trace, "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert {int(name.split("#")[1]) for name in names if name.startswith("ProfilerStep#")} == set(range(5, 15))
    assert sum("conv_backward" in name for name in names) >= 10
    capfd.readouterr()
    assert run(*given, "--batch", "8", "--out", tmp_path / "short") == 0
    assert "--profile: no trace-0.json.gz, fewer than 6 steps were left" in capfd.readouterr().out
    assert not (tmp_path / "short/trace-0.json.gz").exists()


def test_trace_that_is_off(tmp_path):
    trace = profiling.Trace(tmp_path / "trace.json.gz", on=False)
    for _ in range(20):
        trace.step()
    trace.close()
    assert list(tmp_path.iterdir()) == []
