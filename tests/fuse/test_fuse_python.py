"""What people write in a ``forward``: fused where that is a function of its input, and otherwise left as it is.

Each network of ``helpers/forwards`` runs beside its fused copy, with something changed between the calls: results,
attributes and what is printed are the same, and ``fuse`` leaves nothing behind.
"""

import ast
import re
from pathlib import Path

import pytest
import torch
from helpers.forwards.base import SHAPE, runs, same, snapshot, twins
from helpers.forwards.changing import CHANGING
from helpers.forwards.pure import PURE
from helpers.forwards.reading import READING
from helpers.fuse_checks import prepared

import resnet_fast
from resnet_fast.fusion.converted_module import ConvertedModule

CASES = {**PURE, **CHANGING, **READING}
TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "fuse.md"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CASES)
def test_forward(name, training, monkeypatch, capsys, caplog):
    kind, fused, change = CASES[name]
    ours, plain = twins(kind)
    assert isinstance(ours, ConvertedModule) == fused, str(resnet_fast.report(ours))
    x = torch.randn(SHAPE)
    for step in range(3):
        printed = []
        results = []
        for m in (plain.train(training), ours.train(training)):
            kind.count = 0
            results.append(runs(m, x, 3))
            out = capsys.readouterr().out
            printed.append((out, len(caplog.records)))
            caplog.clear()
        torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=2e-4)
        assert printed[0] == printed[1]
        assert same(snapshot(ours), snapshot(plain))
        if step == 1 and change is not None:
            for m in (ours, plain):
                change(m, monkeypatch)


def test_the_changes_matter():
    """Each change alters the result of the plain network: else nothing would be tested."""
    for name, (kind, _, change) in CASES.items():
        if change is not None:
            with pytest.MonkeyPatch.context() as patch:
                plain = prepared(kind())
                x = torch.randn(SHAPE)
                before = runs(plain, x, 1)[0]
                change(plain, patch)
                after = runs(plain, x, 1)[0]
                assert not torch.allclose(before, after), name


def test_the_table_of_the_documents():
    text = DOCUMENT.read_text()
    rows = dict(re.findall(r"^\| ([^|`]+) \| (fused|unfused) \|$", text, re.M))
    assert rows == {name.replace("_", " "): "fused" if fused else "unfused" for name, (_, fused, _) in CASES.items()}


def networks_of(path):
    """Fused convolutions and all of them, by network, from the file's NETWORKS."""
    tree = ast.parse((TESTS / path).read_text())
    table = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "NETWORKS")
    if isinstance(table, ast.Dict):
        rows = [(k.value, v.elts[2]) for k, v in zip(table.keys, table.values, strict=True)]
    else:
        # Classes that the tests build smaller than anybody does are not in the document.
        names = [row.elts[1].value for row in table.elts]
        rows = [(f"pytorchcv {n}", row.elts[3]) for n, row in zip(names, table.elts, strict=True) if n.islower()]
    return {name: ast.literal_eval(counts) for name, counts in rows}


def test_the_networks_of_the_documents():
    text = DOCUMENT.read_text()
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\d+) \| (\d+) \|$", text, re.M)
    found = {f"{library} {name}".removeprefix("torchvision "): (int(a), int(b)) for library, name, a, b in rows}
    assert found == {**networks_of("fuse/test_fuse_networks.py"), **networks_of("zoo/test_zoo.py")}
