"""Some random trials of every kind, always the same; ``python -m tests.fuzz`` runs others."""

import fuzz
import pytest
import torch
from fuzz import wrong_calls

from resnet_fast import ops
from resnet_fast.watch import Watch


@pytest.fixture(autouse=True)
def one_thread():
    """Shapes are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def faults(kind, count):
    found = {seed: fuzz.trial(kind, seed) for seed in range(count)}
    return {seed: text for seed, text in found.items() if text is not None}


def told(found):
    """The last line of each, and how to see the rest."""
    return "\n".join(f"{seed}: {text.strip().splitlines()[-1]}" for seed, text in found.items())


@pytest.mark.parametrize(("kind", "count"), [("operators", 200), ("networks", 8)])
def test_trials(kind, count):
    found = faults(kind, count)
    assert not found, f"python -m tests.fuzz {kind} --trials 1 --seed ...\n{told(found)}"


@pytest.mark.filterwarnings("ignore")
def test_wrong_calls_do_no_harm():
    for seed in range(200):
        wrong_calls.check(seed, strict=False)


def test_wrong_numbers_are_found(monkeypatch):
    """One number of many, by some roundings more than there are: what a trial is for."""
    right = ops.conv_bn_relu

    def wrong(*args, **kwargs):
        y = right(*args, **kwargs)
        return y if y.is_meta or y.numel() == 0 else y.index_fill(3, y.new_tensor([y.shape[3] - 1]).long(), 0.3)

    monkeypatch.setattr(ops, "conv_bn_relu", wrong)
    assert len(faults("operators", 40)) > 5


def test_stale_weights_are_found(monkeypatch):
    monkeypatch.setattr(Watch, "unchanged", lambda self: True)
    assert any(fuzz.trial("networks", seed) for seed in range(10))
