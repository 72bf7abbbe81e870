"""The documents' code runs, their commands parse, their links lead somewhere.

Snippets with one changed line run before and after it, to the same end.
"""

import ast
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

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "results" / "README.md"]
README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()
SNIPPETS = dict(re.findall(r"<!-- snippet: (.*?) -->\n```diff\n(.*?)```", TRAINING, re.DOTALL))


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
        exec(compile(code, "training.md", "exec"), names)
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


def test_readme_code(capsys):
    """The blocks of the README one after another, as a reader types them."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    names = {}
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)
    assert names["probabilities"].shape == (8, 2)
    assert "ResNet32" in capsys.readouterr().out
    assert not resnet_fast.backends.fallbacks()


def test_training_commands_parse(monkeypatch):
    text = TRAINING.replace("\\\n    ", "")
    commands = re.findall(
        r"^(?:    python|    torchrun|srun torchrun)(?: .*)? -m resnet_fast\.train (.*)$", text, re.MULTILINE
    )
    assert len(commands) == 11
    read = []
    monkeypatch.setattr(train.options.config, "arguments", lambda path, *_: read.append(path) or ["--data=saved"])
    for command in commands:
        assert train.options.parse(command.split()).data in (command if "--config" not in command else "saved")
    assert read == [Path("runs/cifar/config.yaml")]


def test_scaling_is_computed_from_what_was_measured():
    """Every row of docs/scaling.md from the documents of measurements, the parameters and the links' speeds."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    gpu, cpu = (
        (ROOT / "docs" / "measurements" / f"{name}.md").read_text() for name in ("gpu-networks", "cpu-training")
    )
    rows = re.findall(r"^\| (\w+), batch (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 8
    for name, batch, cells in rows:
        step, megabytes, *rest = cells.split(" | ")
        with torch.device("meta"):
            network = getattr(resnet_fast, name)()
        count = 4 * sum(parameter.numel() for parameter in network.parameters())
        assert megabytes == f"{count / 1e6:.1f}"
        if len(rest[0].split(".")[1]) == 3:  # of an H200
            milliseconds, digits, share, links = float(step), 3, 2, (450e9, 400e9)
            assert re.search(rf"^\| {name}, batch {batch} \| [\d.]+ \| [\d.]+ \| {step} \|", gpu, re.MULTILINE)
        else:
            measured = rf"^\| {name}, batch {batch}, \d+ x \d+ \| (\d+) \| \*\*([\d.]+)\*\* "
            eager, ratio = re.search(measured, cpu, re.MULTILINE).groups()
            milliseconds, digits, share, links = float(eager) * float(ratio), 1, 3, (3.125e9, 3.125e9)
            assert step == f"{milliseconds:.0f}"
        times = [2 * (n - 1) / n * count / link * 1e3 for n, link in zip((8, 64), links, strict=True)]
        wanted = [f"{t:.{digits}f}" for t in times]
        assert rest == wanted + [f"{milliseconds / (milliseconds + t):.{share}f}" for t in times]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(document):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def rooms_of_imports():
    """By room, what its files import of the package: folders and modules of ``resnet_fast``."""
    found = {}
    files = [
        (file, ("resnet_fast", *file.relative_to(ROOT / "resnet_fast").parts))
        for file in (ROOT / "resnet_fast").rglob("*.py")
    ]
    files += [(file, ("resnet_fast", "_triton", file.name)) for file in (ROOT / "kernels" / "triton_ops").glob("*.py")]
    for file, place in files:
        room = place[1].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                base = (*place[: len(place) - node.level], "") if node.level else ()
                start = ".".join(base) + (node.module or "")
                names = [f"{start}.{alias.name}".replace("..", ".") for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "resnet_fast" and len(parts) > 1 and parts[1] != room:
                    found.setdefault(room, set()).add(parts[1])
    return found


def test_import_floors():
    """No room imports more than the table of docs/architecture.md allows."""
    table = re.findall(r"^\| `(\w+)` \| (-|(?:`\w+` ?)+) \|", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    allowed = {room: set(re.findall(r"`(\w+)`", rooms)) for room, rooms in table}
    found = rooms_of_imports()
    assert len(found) > 8
    for front in ("__init__", "__main__"):  # the package's face sees everything
        found.pop(front)
    assert {room: more for room, rooms in found.items() if (more := rooms - allowed.get(room, set()))} == {}


def test_functions_on_the_way():
    """Those that docs/architecture.md names with their file are there."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| \d+ \| `([\w.]+)` \| `([\w/]+\.py)` \|", text, re.M)
    assert len(rows) == 8
    for name, file in rows:
        scope = ast.parse((ROOT / "resnet_fast" / file).read_text())
        for part in name.split("."):
            found = [node for node in scope.body if getattr(node, "name", None) == part]
            assert found, f"no {name} in {file}"
            scope = found[0]
