"""Evaluation: top-5, classes, a validation split that chooses best.pt, ``--evaluate``; predictions as JSON."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.program.support import checkpoint, eight_layers, run, small_cifar, trainer_for
from PIL import Image
from test_program_data import photographs

from resnet_fast import predict
from resnet_fast.program import checkpoints, data, distributed, evaluation, report, shards, validation
from resnet_fast.program.options import Options, ProgramError, parse
from resnet_fast.program.reports import summary


def evaluated(scores, labels, classes):
    """:func:`evaluation.evaluate` of a network that returns known scores, in batches of two."""
    batches = [data.Batch(scores[i : i + 2], labels[i : i + 2], []) for i in range(0, len(labels), 2)]
    return evaluation.evaluate(
        torch.nn.Identity(),
        batches,
        lambda batch: (batch.images, batch.labels),
        lambda: torch.autocast("cpu", enabled=False),
        classes,
        distributed.Processes(Options("x", device="cpu")),
    )


def test_top_5_of_known_scores():
    scores = torch.arange(12.0).repeat(6, 1)  # the last class is first, class 7 fifth
    labels = torch.tensor([11, 7, 6, 0, -1, 10])
    found = evaluated(scores, labels, 12)
    assert found.top5 == pytest.approx(3 / 5)
    assert (found.right, found.images) == (1, 5)
    there = labels != -1
    assert found.loss == pytest.approx(float(F.cross_entropy(scores[there], labels[there])))
    wanted = torch.zeros(12, 12, dtype=torch.int64)
    wanted[labels[there], 11] = 1
    assert found.confusion.equal(wanted)
    assert found.of_classes()[11] == (1, 1)
    assert found.of_classes()[1] == (0, 0)
    assert evaluated(scores[:, :10], labels.clamp(max=9), 10).top5 is None
    assert evaluated(scores, torch.full((6,), -1), 12) is None


def test_top_5_in_the_reports():
    result = evaluation.Result(0.5, torch.eye(12, dtype=torch.int64), 0.75)
    assert summary.result_text(result) == "12 of 12 test images right, 100.00%, top-5 75.00%"
    row = {"epoch": 2, "train_loss": 1.5, "train_accuracy": 0.25, "test_loss": 2.5, "test_accuracy": 0.125}
    row |= {"test_top5": 0.5, "images_per_s": 300.0}
    line = "epoch 2/9: loss 1.5000, accuracy 25.00%; test 2.5000, 12.50%, top-5 50.00%; 300 images/s"
    assert summary.epoch_line(row, 9, 1) == line
    assert summary.epoch_line(row, 9, 4) == f"{line}, 75 a process"


def test_accuracy_of_classes(tmp_path):
    found = [(1, 4), (0, 0), (3, 3)]
    assert report.worst_classes(["cat", "dog", "elk"], found) == "accuracy of classes: cat 25.0%, elk 100.0%"
    assert report.worst_classes(["cat", "dog", "elk"], found, most=1) == "worst of 3 classes: cat 25.0%"
    report.class_log(tmp_path / "classes.csv", ["cat", "d,og", "elk\udcff"], found)
    assert (tmp_path / "classes.csv").read_bytes() == (
        b'class,images,right,accuracy\ncat,4,1,0.25\n"d,og",0,0,\nelk\xff,3,3,1.0\n'
    )


def test_classes_are_drawn_alike():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [40, 21, 4, 1]))
    kept = validation.drawn_by_class(labels, 0.2)
    assert np.bincount(labels[kept], minlength=4).tolist() == [8, 4, 1, 0]
    assert kept.tolist() == validation.drawn_by_class(labels, 0.2).tolist()
    assert not validation.drawn_by_class(labels, 0.001).any()
    assert np.bincount(labels[~validation.drawn_by_class(labels, 0.99)]).tolist() == [1, 1, 1, 1]


def test_split_of_images_in_memory(tmp_path):
    options = parse([*small_cifar(tmp_path), "--seed", "5"])
    whole = data.load(options)
    rest, kept = validation.split(whole, 0.2)
    assert len(rest.train) + len(kept) == 80
    everything = [bytes(image) for part in (rest.train, kept) for image in part.images]
    assert sorted(everything) == sorted(bytes(image) for image in whole.train.images)
    # Kept images are neither shifted nor mirrored; the others still are.
    batch = kept.__getitems__([(0, 1), (0, -1)])
    assert batch.images[0].equal(torch.from_numpy(kept.images[1]))
    assert batch.labels.tolist() == [kept.labels[1], -1]
    assert not rest.train.__getitems__([(0, 1)]).images[0].equal(torch.from_numpy(rest.train.images[1]))
    assert rest.test is whole.test
    with pytest.raises(ProgramError, match=r"--validation is 0.001: of 80 images, not one in any class"):
        validation.split(whole, 0.001)


def test_split_of_folders(tmp_path):
    whole = data.load(parse(["--data", str(photographs(tmp_path / "photographs"))]))
    rest, kept = validation.split(whole, 0.4)
    assert sorted(rest.train.files + kept.files) == sorted(whole.train.files)
    assert {label for _, label in kept.files} == {label for _, label in whole.train.files}
    assert (kept.seed, rest.train.seed) == (None, 0)
    assert kept.labels.tolist() == [label for _, label in kept.files]
    assert len(rest.train) == len(rest.train.files)


def test_split_of_shards(tmp_path):
    folder = photographs(tmp_path / "photographs")
    assert shards.main([str(folder), str(tmp_path / "shards"), "--samples", "4"]) == 0
    whole = data.load(parse(["--data", str(tmp_path / "shards"), "--image-size", "16"]))
    rest, kept = validation.split(whole, 0.4)
    assert sorted(kept.labels.tolist() + rest.train.labels.tolist()) == sorted(whole.train.labels)
    names = [part.name(i) for part in (rest.train, kept) for i in range(len(part))]
    assert sorted(names) == sorted(whole.train.name(i) for i in range(len(whole.train)))
    assert kept.__getitems__([(0, 0)]).labels.tolist() == [kept.labels[0]]


def test_best_by_validation_and_the_test_set_once(tmp_path, monkeypatch, capfd):
    eight_layers(monkeypatch)
    # The second epoch is the best, not the last.
    real, seen = evaluation.evaluate, []

    def planted(network, batches, *rest):
        result = real(network, batches, *rest)
        seen.append((result.images, network.state_dict()["conv1.weight"].clone()))
        if len(seen) > 3:
            return result
        right = (1, 4, 2)[len(seen) - 1]
        return result._replace(confusion=torch.diag(torch.tensor([right, *[0] * 9])))

    monkeypatch.setattr(evaluation.Result, "accuracy", property(lambda self: self.right / 8))
    monkeypatch.setattr(evaluation, "evaluate", planted)
    given = [*small_cifar(tmp_path, count=40), "--validation", "0.2", "--epochs", "3", "--lr", "0.05", "--keep", "9"]
    assert run(*given, "--out", tmp_path / "run") == 0
    kept = seen[0][0]
    assert 4 < kept < 12
    assert [images for images, _ in seen] == [kept, kept, kept, 20]
    assert seen[3][1].equal(seen[1][1]), "the test images are for the weights of the best epoch"
    assert not seen[2][1].equal(seen[1][1])
    out = capfd.readouterr().out
    assert f"images: {40 - kept} for training, {kept} for validation, 20 for test; " in out
    assert re.search(
        r"final: \d+ of 20 test images right, .*; the weights of epoch 2, the best on validation images; "
        r"best epoch 50.00% of the validation images",
        out,
    )
    with (tmp_path / "run/log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["validation_accuracy"] for row in rows] == ["0.125", "0.5", "0.25"]
    assert not any(name.startswith("test") for name in rows[0])
    assert checkpoint(tmp_path / "run/best.pt")["epoch"] == 2
    assert (tmp_path / "run/classes.csv").read_text().startswith("class,images,right,accuracy\nclass0,")
    # Resumed after its end: the same weights are tested again.
    assert run(*given, "--out", tmp_path / "run", "--resume") == 0
    assert [images for images, _ in seen] == [kept, kept, kept, 20, 20]
    assert seen[4][1].equal(seen[1][1])
    # best.pt of a way that a stop has cut off is not taken.
    shutil.copy(max((tmp_path / "run").glob("step-*.pt")), tmp_path / "run/best.pt")
    monkeypatch.setattr(checkpoints, "restore_best", lambda *_: None)
    assert run(*given, "--out", tmp_path / "run", "--resume") == 0
    assert seen[5][1].equal(seen[2][1])
    assert "the weights of the last epoch, as" in capfd.readouterr().out


def test_evaluation_only(tmp_path, monkeypatch, capfd):
    eight_layers(monkeypatch)
    given = [*small_cifar(tmp_path, count=24), "--out", tmp_path / "run"]
    assert run(*given, "--epochs", "1", "--lr", "0.05", "--ema", "0.5") == 0
    final = re.search(r"final: (\d+ of 20 test images right, [\d.]+%)", capfd.readouterr().out).group(1)
    state = checkpoint(tmp_path / "run/step-00000003.pt")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    # The model is the checkpoint's, whatever --model says; here the averaged weights.
    evaluate = ["--evaluate", tmp_path / "run/step-00000003.pt"]
    assert run(*given, *evaluate, "--model", "resnet50") == 0
    out = capfd.readouterr().out
    assert f"loss {state['history'][0]['test_loss']:.4f}, {final}" in out
    assert "accuracy of classes: class0" in out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    folder = photographs(tmp_path / "photographs")
    assert run("--data", folder, "--workers", "0", *evaluate) == 2
    assert "has classes ['cat'" in capfd.readouterr().err
    assert run(*given, "--evaluate", tmp_path / "none.pt") == 2
    assert "none.pt cannot be read" in capfd.readouterr().err


def test_predictions_as_json(tmp_path, monkeypatch, capfd):
    eight_layers(monkeypatch)
    trainer = trainer_for(tmp_path)
    trainer.save(best=False)
    file = str(tmp_path / "run/step-00000000.pt")
    images = [tmp_path / "a.png", tmp_path / "b\udcff.png", tmp_path / "c.png"]
    for image in images[::2]:
        Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(image)
    assert predict.main([file, *map(str, images), "--json"]) == 1
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == [str(image) for image in images]
    assert lines[1].keys() == {"image", "error"}
    wanted = predict.predict(*predict.load(tmp_path / "run/step-00000000.pt"), images[0])
    found = {answer["class"]: answer["probability"] for answer in lines[0]["classes"]}
    assert [found[f"class{i}"] for i in range(10)] == wanted.tolist()
    shares = [answer["probability"] for answer in lines[0]["classes"]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    Image.open(images[0]).save(images[1], format="png")
    assert predict.main([file, str(images[1])]) == 0
    assert capfd.readouterr().out.count("%") == 3
    assert predict.main([file, str(images[0]), "--json", "--top", "2"]) == 0
    assert len(json.loads(capfd.readouterr().out)["classes"]) == 2
