"""Mixup, CutMix, label smoothing and warm-up: their definitions, and the same batches however a run is divided."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.program.support import checkpoint, differences, eight_layers, rates, run, small_cifar, trainer_for

from resnet_fast.program import data, mixing
from resnet_fast.program.options import Options, ProgramError, parse


def soft(targets, classes):
    """The labels as probabilities."""
    first, second = (F.one_hot(labels, classes).double() for labels in (targets.labels, targets.partners))
    return targets.share * first + (1 - targets.share) * second


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_pytorchs(smoothing):
    scores = torch.randn(6, 5, dtype=torch.float64)
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    plain = mixing.loss(scores, mixing.Targets(labels), smoothing)
    torch.testing.assert_close(plain, F.cross_entropy(scores, labels, label_smoothing=smoothing))
    targets = mixing.Targets(labels, labels.flip(0), torch.tensor(0.3))
    wanted = F.cross_entropy(scores, soft(targets, 5), label_smoothing=smoothing)
    torch.testing.assert_close(mixing.loss(scores, targets, smoothing), wanted)
    # Slots without an image do not count.
    there = torch.tensor([True, True, False, False, True, True])
    empty = mixing.Targets(torch.where(there, labels, -1), torch.where(there, labels.flip(0), -1), torch.tensor(0.3))
    wanted = F.cross_entropy(scores[there], soft(targets, 5)[there], label_smoothing=smoothing)
    torch.testing.assert_close(mixing.loss(scores, empty, smoothing), wanted)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 4.0])
def test_shares_are_of_the_beta_distribution(alpha):
    """Mean, variance and fourth moment, over a grid of the two uniform numbers."""
    grid = (np.arange(400) + 0.5) / 400
    x = np.array([mixing.symmetric_beta(alpha, u, v) for u, v in itertools.product(grid, grid)]) - 0.5
    assert x.mean() == pytest.approx(0, abs=1e-9)
    assert (x**2).mean() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.01)
    assert (x**4).mean() == pytest.approx(3 / (16 * (2 * alpha + 1) * (2 * alpha + 3)), rel=0.02)


def test_extreme_shares():
    assert mixing.symmetric_beta(0.001, 1 - 2**-53, 0.1) == 1.0
    assert mixing.symmetric_beta(1.0, 0.0, 0.1) == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixup_of_pairs(dtype):
    images = torch.randn(4, 3, 6, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    labels = torch.tensor([3, 1, 0, 2])
    mixed, targets = mixing.mix(images, labels, mixing.Draw(False, 0.25, 0.5, 0.5))
    assert mixed.equal(0.25 * images + 0.75 * images[[1, 0, 3, 2]])
    assert mixed.dtype == dtype
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert targets.partners.tolist() == [1, 3, 2, 0]
    assert targets.share == 0.25
    assert targets.heavier.equal(targets.partners)
    assert targets._replace(share=torch.tensor(0.5)).heavier.equal(labels)
    same, plain = mixing.mix(images, labels, None)
    assert same is images
    assert plain.heavier is labels
    assert mixing.mix(images, torch.tensor([3, -1, 0, 2]), mixing.Draw(False, 0.25, 0, 0))[1].partners[1] == -1


@pytest.mark.parametrize(
    ("x", "y", "wanted"),
    [(0.5, 0.5, (8, 24, 16, 48)), (0.0, 0.99, (23, 32, 0, 16)), (0.99, 0.0, (0, 8, 47, 64))],
)
def test_cutmix_pastes_a_box(x, y, wanted):
    """A quarter of the image, half as wide and high, clipped at the edges; the share is that of the pixels."""
    images, labels = torch.randn(2, 3, 32, 64), torch.tensor([1, 2])
    mixed, targets = mixing.mix(images, labels, mixing.Draw(True, 0.75, x, y))
    top, bottom, left, right = wanted
    inside = torch.zeros(32, 64, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    assert mixed.equal(torch.where(inside, images.flip(0), images))
    assert targets.share == 1 - int(inside.sum()) / 2048
    assert targets.partners.tolist() == [2, 1]


def test_draws_of_steps():
    """Other steps, epochs and seeds draw others; with both methods, half of the steps have each."""
    both = [mixing.draw(1, 0, step, mixup=0.2, cutmix=1.0) for step in range(200)]
    assert 70 < sum(drawn.cut for drawn in both) < 130
    assert len({drawn.share for drawn in both}) == 200
    assert mixing.draw(1, 1, 0, mixup=0.2, cutmix=1.0) != both[0] != mixing.draw(2, 0, 0, mixup=0.2, cutmix=1.0)
    assert not any(mixing.draw(1, 0, step, mixup=0.2, cutmix=0.0).cut for step in range(20))
    assert all(mixing.draw(1, 0, step, mixup=0.0, cutmix=1.0).cut for step in range(20))
    assert mixing.draw(1, 0, 0, mixup=0.0, cutmix=0.0) is None


def test_two_processes_mix_as_one(tmp_path):
    options = parse(small_cifar(tmp_path, count=16))
    images = data.load(options).train

    def mixed(batch, rank, world):
        batches = data.Batches(16, batch, rank, world, seed=0)
        batches.epoch = 3
        found = []
        for step, keys in enumerate(batches):
            loaded = images.__getitems__(keys)
            drawn = mixing.draw(0, 3, step, mixup=0.4, cutmix=0.4)
            found.append(mixing.mix(loaded.images.float(), loaded.labels, drawn))
        return found

    one, two = mixed(8, 0, 1), zip(mixed(4, 0, 2), mixed(4, 1, 2), strict=True)
    for (whole, targets), ((first, mine), (second, others)) in zip(one, two, strict=True):
        assert whole.equal(torch.cat([first, second]))
        assert targets.partners.equal(torch.cat([mine.partners, others.partners]))
        assert targets.share == mine.share == others.share


def test_a_step_of_the_program(tmp_path, monkeypatch):
    """Loss, and right answers by the heavier label, of mixed images with smoothed labels."""
    eight_layers(monkeypatch)
    given = ["--mixup", "0.5", "--cutmix", "0.5", "--label-smoothing", "0.2", "--seed", "4"]
    trainer = trainer_for(tmp_path, *given)
    trainer.joined.train()
    trainer.epoch, trainer.done = 2, 5
    batch = trainer.data.train.__getitems__([(2, index) for index in range(8)])
    network = copy.deepcopy(trainer.network)
    images, labels = trainer._inputs(batch)
    images, targets = mixing.mix(images, labels, mixing.draw(4, 2, 40, mixup=0.5, cutmix=0.5))
    scores = network(images)
    wanted = F.cross_entropy(scores, soft(targets, 10).float(), label_smoothing=0.2)
    wanted.backward()
    trainer._pass(batch, True)
    torch.testing.assert_close(trainer.sums[0] / 8, wanted.double().detach(), rtol=1e-5, atol=0)
    assert trainer.sums[1] == (scores.argmax(1) == targets.heavier).sum()
    torch.testing.assert_close(trainer.network.fc.weight.grad, network.fc.weight.grad, rtol=1e-4, atol=1e-5)
    assert F.cross_entropy(scores, labels).item() != pytest.approx(wanted.item(), rel=1e-3)


@pytest.mark.usefixtures("one_thread")
def test_resumed_run_mixes_alike(tmp_path, monkeypatch, capfd):
    eight_layers(monkeypatch)
    given = [*small_cifar(tmp_path, count=32), "--mixup", "0.3", "--cutmix", "1", "--epochs", "2", "--lr", "0.05"]
    given += ["--label-smoothing", "0.1", "--warmup", "0.5", "--save-every", "1", "--keep", "9"]
    assert run(*given, "--out", tmp_path / "run") == 0
    whole = checkpoint(tmp_path / "run/step-00000008.pt")
    for step in (6, 7, 8):
        (tmp_path / f"run/step-{step:08d}.pt").unlink()
    assert run(*given, "--out", tmp_path / "run", "--resume") == 0
    assert differences(whole, checkpoint(tmp_path / "run/step-00000008.pt")) == []
    capfd.readouterr()
    assert run(*given, "--out", tmp_path / "run", "--resume", "--mixup", "0.2", "--label-smoothing", "0") == 2
    assert "was trained with label_smoothing 0.1 (now 0.0), mixup 0.3 (now 0.2)" in capfd.readouterr().err


def test_options_that_older_checkpoints_lack(tmp_path, monkeypatch):
    """They were trained without: resuming with is another run."""
    eight_layers(monkeypatch)
    trainer = trainer_for(tmp_path)
    trainer.save(best=False)
    path = tmp_path / "run/step-00000000.pt"
    state = checkpoint(path)
    new = {"label_smoothing": "0.1", "mixup": "0.1", "cutmix": "0.1", "warmup": "1", "validation": "0.2"}
    for name in new:
        del state["options"][name]
    torch.save(state, path)
    trainer_for(tmp_path).restore(path)
    for name, value in new.items():
        other = trainer_for(tmp_path, f"--{name.replace('_', '-')}", value)
        with pytest.raises(ProgramError, match=rf"was trained with .*{name} (0\.0|None) \(now {float(value)}\)"):
            other.restore(path)


def test_warmup_step_by_step():
    he = rates(Options("x", recipe="he", epochs=4, lr=0.8, warmup=1.25), 16)  # four steps an epoch
    assert he == pytest.approx([0.16, 0.32, 0.48, 0.64, 0.8, 0.8, 0.8, 0.8] + [0.08] * 4 + [0.008] * 4)
    assert rates(Options("x", recipe="he", epochs=4, lr=0.8, warmup=0), 16) == pytest.approx(
        [0.8] * 8 + [0.08] * 4 + [0.008] * 4
    )
    deep = rates(Options("x", recipe="he", epochs=4, lr=0.8, warmup=1, model="cifar_resnet110"), 16)
    assert deep[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    cycle = rates(Options("x", epochs=10, lr=0.4, warmup=5), 40)
    assert cycle.index(max(cycle)) == 19
    assert cycle[0] == pytest.approx(0.016)
    assert all(a < b for a, b in itertools.pairwise(cycle[:20]))
    assert rates(Options("x", epochs=10, lr=0.4, warmup=2.5), 40)[:9] == pytest.approx(
        rates(Options("x", epochs=10, lr=0.4), 40)[:9], rel=0.1
    )
    for recipe in ("he", "onecycle"):
        for warmup in (0, 0.01, 0.9):
            assert len(rates(Options("x", recipe=recipe, epochs=1, warmup=warmup), 2)) == 2
    with pytest.raises(ProgramError, match=r"--warmup is 4.0, want less than the 4 epochs"):
        rates(Options("x", epochs=4, warmup=4.0), 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--mixup", "-1"], "--mixup is -1.0, want a number from 0"),
        (["--cutmix", "nan"], "--cutmix is nan, want a number from 0"),
        (["--mixup", "1", "--batch", "3"], "--batch is 3, want an even one"),
        (["--cutmix", "1", "--batch", "1"], "--batch is 1, want an even one"),
        (["--label-smoothing", "1"], "--label-smoothing is 1.0, want a share from 0 to below 1"),
        (["--validation", "nan"], "--validation is nan, want a share from 0 to below 1"),
        (["--warmup", "inf"], "--warmup is inf, want a number from 0"),
    ],
)
def test_options_that_cannot_be(given, message):
    with pytest.raises(ProgramError, match=message):
        parse(["--data", "x", *given])
