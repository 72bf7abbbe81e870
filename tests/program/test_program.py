"""The training program as a whole: it learns, in every way of running; predictions of image files."""

import csv
import io
import math
import re
import sys

import numpy as np
import pytest
import torch
from helpers.program.support import checkpoint, differences, eight_layers, rates, run, small_cifar, trainer_for
from PIL import Image
from test_program_data import photographs

from resnet_fast import predict, reference
from resnet_fast.program import data, recipes, report
from resnet_fast.program.data import archives
from resnet_fast.program.options import Options, ProgramError, parse

COLUMNS = [
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "images_per_s",
    "seconds",
]


def rows_of(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_learns_digits(tmp_path, capfd):
    """A small version of the run in docs/training.md: 1,500 digits, three epochs."""
    given = ["--data", "mnist5k", "--limit", "1500", "--batch", "32", "--epochs", "3", "--lr", "0.1"]
    assert run(*given, "--out", tmp_path / "run") == 0
    rows = rows_of(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert list(rows[0]) == COLUMNS
    # Guessing gives 10% and log(10).
    assert float(rows[-1]["test_accuracy"]) >= 0.93
    assert float(rows[-1]["train_loss"]) < 0.25 * math.log(10)
    assert (
        f"final: {round(float(rows[-1]['test_accuracy']) * 1000)} of 1000 test images right" in capfd.readouterr().out
    )
    for name in ("curves.png", "confusion.png"):
        with Image.open(tmp_path / "run" / name) as chart:
            assert min(chart.size) > 300
            assert len(np.unique(np.asarray(chart.convert("L")))) > 50

    digits = archives.digits()
    images = []
    for i in range(0, 1000, 25):
        images.append(tmp_path / f"{digits.test_labels[i]}-{i}.png")
        Image.fromarray(digits.test_images[i, 0]).save(images[-1])
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:60])
    checkpoint_file = max((tmp_path / "run").glob("step-*"))
    assert predict.main([str(checkpoint_file), *map(str, images), str(broken), "--top", "2"]) == 1
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert len(lines) == 40
    right = sum(f": {path.name[0]} " in line for path, line in zip(images, lines, strict=True))
    assert right >= 34
    first = lines[0].split(": ")[1].split(", ")
    assert len(first) == 2
    assert all(answer.endswith("%") for answer in first)
    assert "broken.png: cannot be read" in err


def test_predictions_are_those_of_the_plain_network(tmp_path):
    assert run(*small_cifar(tmp_path), "--epochs", "1", "--out", tmp_path / "run") == 0
    state = checkpoint(tmp_path / "run/step-00000010.pt")
    plain = reference.cifar_resnet20()
    plain.load_state_dict(state["model"])
    pixels = np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    mean, std = (np.array(state["preparation"][name]) for name in ("mean", "std"))
    x = torch.tensor(((pixels / 255 - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32)
    with torch.no_grad():
        wanted = plain.eval()(x).softmax(1)[0]
    found = predict.predict(*predict.load(tmp_path / "run/step-00000010.pt"), tmp_path / "image.png")
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "way",
    [
        ["--amp", "bf16"],
        ["--amp", "fp16"],
        ["--no-channels-last"],
        ["--accumulate", "2"],
        ["--backend", "eager"],
        ["--model", "ResNet32", "--image-size", "40"],
        ["--model", "resnet18", "--recipe", "he"],
    ],
    ids=" ".join,
)
def test_ways_to_run(way, tmp_path, capfd):
    """Two steps on photographs; light and dark ones are told apart from then on, or at least nothing is NaN."""
    folder = photographs(tmp_path / "photographs", broken=("train/cat/2",))
    given = ["--data", folder, "--image-size", "32", "--batch", "3", "--epochs", "2", "--workers", "0", "--lr", "0.01"]
    assert run(*given, *way, "--out", tmp_path / "run") == 0
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2
    assert all(math.isfinite(float(row[name])) for row in rows for name in ("train_loss", "test_loss"))
    out = capfd.readouterr().out
    assert "broken image 1:" in out
    assert "1 broken images were left out" in out
    state = checkpoint(max((tmp_path / "run").glob("step-*")))
    assert state["step"] == (4 if "--accumulate" in way else 8)
    assert (state["scaler"] != {}) == ("fp16" in way)


def test_compiled(tmp_path, monkeypatch):
    eight_layers(monkeypatch)  # compiling takes a while for each
    given = [*small_cifar(tmp_path, count=16), "--epochs", "1", "--lr", "0.01"]
    assert run(*given, "--out", tmp_path / "eager") == 0
    assert run(*given, "--out", tmp_path / "compiled", "--compile") == 0
    eager, compiled = (checkpoint(tmp_path / name / "step-00000002.pt")["model"] for name in ("eager", "compiled"))
    assert differences(eager, compiled) != []
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-2, atol=1e-2)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = report.Bar(2, 9, steps=10, first=3, show=True)
    bar.step(64, torch.tensor([32.0, 48.0, 64.0]))
    bar.close()
    line = terminal.getvalue().split("\r")[-1]
    assert line.startswith("epoch 2/9:  40%")
    assert "4/10 [" in line
    assert "loss 0.500, accuracy 75.0%" in line
    assert re.search(r"\[\d+:\d+<\d+:\d+, .* images/s", line)  # time left, and speed
    hidden = Terminal()
    monkeypatch.setattr(sys, "stderr", hidden)
    report.Bar(1, 1, steps=1, first=0, show=False).step(1, torch.ones(3))
    assert hidden.getvalue() == ""


def test_curves_of_several_runs(tmp_path, capfd):
    row = dict.fromkeys(COLUMNS, 1)
    for name in ("a", "b"):
        report.log(tmp_path / name / "log.csv", [{**row, "epoch": epoch, "test_loss": 0.5} for epoch in (1, 2)])
    assert report.read_log(tmp_path / "a/log.csv")[1]["test_loss"] == 0.5
    assert report.main([str(tmp_path / "chart.png"), str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    with Image.open(tmp_path / "chart.png") as chart:
        assert len(np.unique(np.asarray(chart.convert("L")))) > 50
    assert report.main([str(tmp_path / "chart.png"), str(tmp_path / "none")]) == 2
    assert "none/log.csv cannot be read" in capfd.readouterr().err


def test_average_of_the_weights(tmp_path):
    """After the first step the average is the weights; then e = decay * e + (1 - decay) * w."""
    trainer = trainer_for(tmp_path, "--epochs", "1", "--ema", "0.75")
    name, expected = "fc.weight", None
    for batch in data.loader(trainer.data.train, trainer.batches, 0, False):
        trainer._pass(batch, True)
        trainer._step()
        weight = trainer.network.state_dict()[name].clone()
        expected = weight if expected is None else 0.75 * expected + 0.25 * weight
    torch.testing.assert_close(trainer.ema.module.state_dict()[name], expected)
    test = data.loader(trainer.data.test, trainer.test_batches, 0, False)
    averaged = trainer._evaluate(test).loss
    trainer.ema = None
    assert trainer._evaluate(test).loss != averaged


def test_accumulated_passes_are_one_step(tmp_path):
    """With batch norm frozen, two passes of 8 have the gradient of one pass of 16."""
    gradients = []
    for batch, passes in (("16", 1), ("8", 2)):
        trainer = trainer_for(tmp_path, "--epochs", "1", "--batch", batch, "--accumulate", str(passes))
        trainer.joined.eval()
        batches = iter(data.loader(trainer.data.train, trainer.batches, 0, False))
        for i in range(passes):
            trainer._pass(next(batches), i + 1 == passes)
        gradients.append(trainer.network.conv1.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_recipe_of_he():
    """Section 4.2: 0.1, divided by 10 at 32k and 48k of 64k steps; weight decay 1e-4, momentum 0.9."""
    found = rates(Options("x", recipe="he"), 640)
    assert found == pytest.approx([0.1] * 320 + [0.01] * 160 + [0.001] * 160)
    group = recipes.optimizer(torch.nn.Linear(1, 1), recipes.of(Options("x", recipe="he"))).param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
    deep = rates(Options("x", recipe="he", model="cifar_resnet110"), 1600)
    assert deep[:401:200] == pytest.approx([0.01, 0.01, 0.1])


@pytest.mark.parametrize("steps", [1, 2, 3, 40])
def test_recipe_of_one_cycle(steps):
    found = rates(Options("x", lr=0.4), steps)
    assert all(0 <= rate <= 0.4 + 1e-9 for rate in found)
    if steps == 40:
        assert found.index(max(found)) in (9, 10)
        assert max(found) == pytest.approx(0.4, rel=1e-2)
        assert found[0] < 0.02
        assert found[-1] < 0.003
        assert found[25] == pytest.approx(0.2, rel=0.1)  # half-way down the cosine


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--batch", "0"], "--batch is 0, want at least 1"),
        (["--epochs", "0"], "--epochs is 0, want at least 1"),
        (["--lr", "-1"], "--lr is -1.0, want a number from 0"),
        (["--lr", "nan"], "--lr is nan, want a number from 0"),
        (["--ema", "1"], "--ema is 1.0, want a decay"),
        (["--strategy", "fsdp", "--ema", "0.9"], "--ema does not run with --strategy fsdp"),
        (["--strategy", "fsdp", "--amp", "fp16"], "--amp fp16 does not run with --strategy fsdp"),
    ],
)
def test_options_that_cannot_be(given, message):
    with pytest.raises(ProgramError, match=message):
        parse(["--data", "x", *given])


def test_clear_errors(tmp_path, capfd):
    given = [*small_cifar(tmp_path), "--out", tmp_path / "run"]
    for more, message in (
        (["--batch", "81"], "80 images to train on, but a step takes 81"),
        (["--model", "ResNet32"], "--model ResNet32 for images of 32 x 32: image_size is 32, want at least 35"),
        (["--device", "cuda"], "no CUDA device is visible"),
    ):
        assert run(*given, *more) == 2
        error = capfd.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert predict.main([str(tmp_path / "none.pt"), "x.png"]) == 2
    assert "none.pt cannot be read: No such file" in capfd.readouterr().err
