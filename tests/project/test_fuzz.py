"""Some random trials of every kind, always the same; ``python -m tests.fuzz`` runs others."""

import sys

import fuzz
import pytest

from resnet_fast import ops
from resnet_fast.chain.guard import StalenessGuard

COUNTS = {"operators": 200, "wrong_calls": 200, "networks": 8, "structure": 8}
COUNTS |= {"images": 380, "archives": 120, "shards": 200}

# Shapes are small.
pytestmark = pytest.mark.usefixtures("one_thread")


def faults(kind, count):
    found = {seed: fuzz.trial(kind, seed) for seed in range(count)}
    return {seed: text for seed, text in found.items() if text is not None}


def told(found):
    """The last line of each, and how to see the rest."""
    return "\n".join(f"{seed}: {text.strip().splitlines()[-1]}" for seed, text in found.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "count"), COUNTS.items())
def test_trials(kind, count):
    found = faults(kind, count)
    assert not found, f"python -m tests.fuzz {kind} --trials 1 --seed ...\n{told(found)}"


def test_wrong_numbers_are_found(monkeypatch):
    """One number of many, by some roundings more than there are: what a trial is for."""
    right = ops.conv_bn_relu

    def wrong(*args, **kwargs):
        y = right(*args, **kwargs)
        return y if y.is_meta or y.numel() == 0 else y.index_fill(3, y.new_tensor([y.shape[3] - 1]).long(), 0.3)

    monkeypatch.setattr(ops, "conv_bn_relu", wrong)
    assert len(faults("operators", 40)) > 5


def test_stale_weights_are_found(monkeypatch):
    monkeypatch.setattr(StalenessGuard, "is_valid", lambda self: True)
    assert any(fuzz.trial("networks", seed) for seed in range(10))


def test_exceptions_that_escape_are_found(monkeypatch):
    """Those that nobody thought of: here, what messages are made by fails."""

    def fail(error):
        raise KeyError from error

    for kind in ("images", "archives"):
        monkeypatch.setattr(f"resnet_fast.program.data.{kind}.one_line", fail)
        assert faults(kind, 20)


def test_errors_that_do_not_name_the_argument_are_found(monkeypatch):
    for name in ("conv_bn_relu", "add_relu"):  # files, which functions hide
        monkeypatch.setattr(sys.modules[f"resnet_fast.ops.{name}"], "raised", lambda check, *arguments: None)
    assert faults("wrong_calls", 60)
