"""The benchmark of training steps: checked gradients, phases in turn, memory; what is wrong gets no time."""

import pytest
import torch
from torch import nn

from benchmarks import peers, training
from benchmarks.cases import TrainingStep
from benchmarks.memory import peak_bytes
from benchmarks.variants import UnavailableError
from benchmarks.verify import Reference, WrongResultError
from resnet_fast import backends, reference

CASE = training.TrainingCase("cifar_resnet20", (2, 3, 16, 16))


def test_a_case():
    names = ["eager", "resnet_fast", "resnet_fast, outputs recomputed", "resnet_fast bf16"]
    rows, refused = training.results(CASE, names, "random", rounds=5, seconds=1.0)
    assert refused == {}
    assert [r.variant for r in rows] == ["eager channels_last", *names]
    of = {r.variant: r for r in rows}
    for r in rows:
        assert r.rounds == 5
        assert set(r.seconds) == set(training.PHASES)
        assert r.seconds["step"].median > r.seconds["forward"].median
        assert r.peak > r.saved > 0
    ours, less = of["resnet_fast"], of["resnet_fast, outputs recomputed"]
    assert less.saved < ours.saved < of["eager"].saved
    assert not backends.training.recompute_outputs
    assert "**" in training.readme_table(rows)
    assert training.table(rows).count("\n") == len(rows) + 1


def test_wrong_gradients_are_refused(monkeypatch):
    plain = CASE.build()
    exact = training.Gradients(CASE, plain, "random")
    trainer = training.Trainer(CASE, plain, training.VARIANTS["resnet_fast"], "random")
    assert exact.check("resnet_fast", trainer) <= 3
    with torch.no_grad():
        trainer.model.layer2[1].bn1.weight.mul_(1.001)
    with pytest.raises(WrongResultError, match="resnet_fast: gradients are"):
        exact.check("resnet_fast", trainer)


def test_a_fallback_is_an_error():
    trainer = training.Trainer(CASE, CASE.build(), training.VARIANTS["resnet_fast"], "random")
    trainer.model.layer1[0].bn1 = torch.nn.GroupNorm(4, 16)
    with pytest.raises(RuntimeError, match="GroupNorm"):
        trainer.step()


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = reference.BasicBlock(8, 8)

    def forward(self, x):
        maps = self.block(x)
        return maps, maps.mean((2, 3))


@torch.no_grad()
def test_gradients_of_all_layers_are_judged_in_units_of_their_norm():
    step, x = TrainingStep(Small()), torch.randn(4, 8, 12, 12)
    exact = Reference.of(step, x)
    with backends.use("cpu"):
        maps, *gradients = step.fast()(x)
    assert [tuple(g.shape) for g in gradients] == [(8, 8, 3, 3)] * 2
    assert exact.check("resnet_fast", (maps, *gradients)) <= 3
    for i, factor in ((0, 1.001), (1, 1.001)):
        wrong = [g * factor if i == j else g for j, g in enumerate(gradients)]
        with pytest.raises(WrongResultError, match="output 1 is"):
            exact.check("resnet_fast", (maps, *wrong))


def test_peak_bytes():
    def call():
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(1 << 21, dtype=torch.uint8)
        del a
        return torch.empty(1 << 19, dtype=torch.uint8), b

    assert peak_bytes(call) == 3 << 20


def test_engines_of_inference_refuse_a_training_step():
    with pytest.raises(UnavailableError, match="inference only"):
        peers._graph(TrainingStep(nn.Conv2d(3, 3, 1)), torch.zeros(1, 3, 4, 4))
