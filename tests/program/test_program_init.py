"""``--init``: weights of another run or program to start from."""

import collections
from pathlib import Path

import pytest
import torch
from helpers.program.support import eight_layers, run, small_cifar, trainer_for

from resnet_fast import models, reference
from resnet_fast.program import initial
from resnet_fast.program.options import ProgramError


def network(classes=10):
    return models.CifarResNet(1, classes)


@pytest.fixture
def weights():
    """Of plain PyTorch, under torchvision's names, with 7 classes; no tensor is as it is initialised."""
    state = reference.CifarResNet(1, 7).state_dict()
    return {name: torch.rand_like(t) if t.is_floating_point() else t + 5 for name, t in state.items()}


def saved(content, folder):
    path = folder / "weights.pt"
    torch.save(content, path)
    return path


def prefixed(state, prefix="module."):
    return {f"{prefix}{name}": t for name, t in state.items()}


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: collections.OrderedDict(state),
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"state": {}}},
        lambda state: prefixed(state),
        lambda state: {"state_dict": prefixed(state, "module._orig_mod.")},
        lambda state: {
            "ema": {"n_averaged": torch.tensor(3), **{f"module.{n}": t for n, t in state.items()}},
            "model": {},
        },
        lambda state: {"ema": None, "model": state},
    ],
    ids=["plain", "ordered", "state_dict", "model", "DDP", "compiled", "average", "without average"],
)
def test_files_of_every_form(wrapped, weights, tmp_path):
    mine = network(10)
    before = {name: t.clone() for name, t in mine.state_dict().items()}
    taken = initial.take(mine, saved(wrapped(weights), tmp_path))
    after = mine.state_dict()
    assert sorted(taken.left) == ["fc.bias", "fc.weight"]
    for name, tensor in after.items():
        assert tensor.equal(before[name] if name in taken.left else weights[name]), name
    assert str(taken) == (
        f"{len(after) - 2} of {len(after)} tensors taken; left as they were: fc.weight (7x64 in the file, want 10x64), "
        "fc.bias (7 in the file, want 10)"
    )


def test_the_same_head_is_taken(weights, tmp_path):
    mine = network(7)
    taken = initial.take(mine, saved(weights, tmp_path))
    assert taken.left == {}
    assert mine.fc.weight.equal(weights["fc.weight"])
    assert str(taken) == f"{len(weights)} of {len(weights)} tensors taken"


def test_without_head_or_counts_of_batches(weights, tmp_path):
    old = {n: t for n, t in weights.items() if not n.startswith("fc.") and not n.endswith("num_batches_tracked")}
    mine = network(10)
    taken = initial.take(mine, saved({**old, "fc.extra": torch.ones(1)}, tmp_path))
    assert taken.left["fc.weight"] == taken.left["bn1.num_batches_tracked"] == "not in the file"
    assert mine.conv1.weight.equal(weights["conv1.weight"])


def test_other_networks_are_refused(weights, tmp_path):
    smaller = {name: t for name, t in weights.items() if not name.startswith("layer3.0.conv2")}
    wider = {**weights, "conv1.weight": torch.ones(32, 3, 3, 3)}
    for content, message in (
        (smaller, "is of another network: layer3.0.conv2.weight is not in the file"),
        (wider, "is of another network: conv1.weight is 32x3x3x3 in the file, want 16x3x3x3"),
        ({**weights, "layer4.0.x": torch.ones(1)}, "is of another network: it has layer4.0.x, which --model lacks"),
        ({"state_dict": {}}, "holds no weights: want a checkpoint or a state_dict"),
        ([1, 2], "holds no weights"),
        (torch.ones(3), "holds no weights"),
    ):
        mine = network(10)
        before = {name: t.clone() for name, t in mine.state_dict().items()}
        with pytest.raises(ProgramError, match=message):
            initial.take(mine, saved(content, tmp_path))
        assert all(t.equal(before[name]) for name, t in mine.state_dict().items())
    (tmp_path / "weights.pt").write_bytes(b"none")
    with pytest.raises(ProgramError, match=r"weights.pt is damaged, or not a file of torch.save"):
        initial.take(network(), tmp_path / "weights.pt")
    with pytest.raises(ProgramError, match="/none cannot be read: No such file or directory"):
        initial.take(network(), Path("/none"))


def test_files_of_before_pytorch_1_6(weights, tmp_path):
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert initial.take(network(7), tmp_path / "old.pth").left == {}


def test_the_program_starts_from_them(weights, tmp_path, monkeypatch, capfd):
    """Averaged weights, too; a resumed run does not read the file again, and is no other run's."""
    eight_layers(monkeypatch)
    path = saved(weights, tmp_path)
    trainer = trainer_for(tmp_path, "--init", path, "--ema", "0.5")
    assert trainer.network.conv1.weight.equal(weights["conv1.weight"])
    assert trainer.ema.module.conv1.weight.equal(weights["conv1.weight"])
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    given = [*small_cifar(tmp_path, count=16), "--epochs", "1", "--lr", "0", "--out", tmp_path / "run"]
    assert run(*given, "--init", path) == 0
    assert "tensors taken; left as they were: fc.weight (7x64 in the file, want 10x64)" in capfd.readouterr().out
    assert torch.load(tmp_path / "run/step-00000002.pt")["model"]["conv1.weight"].equal(weights["conv1.weight"])
    path.unlink()
    assert run(*given, "--init", path, "--resume") == 0
    assert "tensors taken" not in capfd.readouterr().out
    assert run(*given, "--resume") == 2
    assert f"was trained with init {path} (now None)" in capfd.readouterr().err


def test_what_was_fine_tuned_is_evaluated(tmp_path, monkeypatch, capfd):
    """By the run's own file of options, which has ``init``."""
    monkeypatch.setattr(models, "cifar_resnet20", lambda num_classes: models.CifarResNet(1, num_classes))
    torch.save(models.CifarResNet(1).state_dict(), tmp_path / "init.pt")
    given = [
        *small_cifar(tmp_path, count=16),
        "--epochs",
        "1",
        "--out",
        tmp_path / "run",
        "--init",
        tmp_path / "init.pt",
    ]
    assert run(*given) == 0
    config = ["--config", tmp_path / "run/config.yaml", "--evaluate", tmp_path / "run/best.pt"]
    assert run(*config) == run(*config, "--strategy", "fsdp", "--checkpoints", "sharded") == 0
    assert capfd.readouterr().out.count("best.pt: loss") == 2
