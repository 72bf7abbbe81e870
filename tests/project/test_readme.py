"""The README's snippets run, before and after their one changed line, to the same end."""

import functools
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import resnet_fast
from resnet_fast import CifarResNet, reference, train
from resnet_fast.blocks import Stage

README = (Path(__file__).parents[2] / "README.md").read_text()
SNIPPETS = dict(re.findall(r"<!-- snippet: (.*?) -->\n```diff\n(.*?)```", README, re.DOTALL))


def sides(snippet):
    """The code before and after."""
    lines = snippet.splitlines()
    assert {line[:1] for line in lines} == {"-", "+", " "}
    return ("\n".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")


def test_one_line_changes():
    assert list(SNIPPETS) == ["plain", "AMP", "DDP", "torch.compile"]
    for snippet in SNIPPETS.values():
        assert len(re.findall(r"^-", snippet, re.MULTILINE)) == len(re.findall(r"^\+", snippet, re.MULTILINE)) == 1


@pytest.fixture
def plain_network(monkeypatch):
    """``my_networks`` of the snippets: the same network in plain PyTorch."""
    module = types.ModuleType("my_networks")
    module.cifar_resnet32 = reference.cifar_resnet32
    monkeypatch.setitem(sys.modules, "my_networks", module)


@pytest.fixture
def single_process(monkeypatch):
    """What torchrun tells the one process of a job."""
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))


def executed(code):
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3, 16, 16), torch.randint(10, (4,))) for _ in range(2)]
    names = {"torch": torch, "F": F, "batches": batches}
    try:
        exec(compile(code, "README.md", "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return names


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet(name, plain_network, single_process, monkeypatch):
    if name == "torch.compile":  # takes a while for each layer: eight will do
        for module, network in ((sys.modules["my_networks"], reference.CifarResNet), (resnet_fast, CifarResNet)):
            monkeypatch.setattr(module, "cifar_resnet32", functools.partial(network, 1))
    before, after = (executed(code) for code in sides(SNIPPETS[name]))
    assert any(isinstance(module, Stage) for module in after["model"].modules())
    assert not any(isinstance(module, Stage) for module in before["model"].modules())
    # Two steps from the same weights: rounding, in bfloat16 of 2^-9 a layer. For the model as a whole: a few images
    # leave single weights to chance.
    states = [torch.cat([v.flatten() for v in side["model"].state_dict().values()]) for side in (before, after)]
    assert (states[1] - states[0]).norm() <= (0.1 if name == "AMP" else 1e-3) * states[0].norm()
    if "scores" in before:
        torch.testing.assert_close(after["scores"], before["scores"], rtol=1e-3, atol=1e-3)
    else:
        start = executed(next(sides(SNIPPETS[name])).split("for images")[0])["model"]
        start = getattr(start, "module", start)
        assert not start.fc.weight.equal(after["model"].fc.weight)


def test_commands_parse():
    commands = re.findall(
        r"^    (?:python|torchrun --nproc-per-node 2) -m resnet_fast\.train (.*)$", README, re.MULTILINE
    )
    assert len(commands) == 3
    for command in commands:
        assert train.options.parse(command.split()).data in command
