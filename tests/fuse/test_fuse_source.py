"""The code that ``fuse`` reads is the code that runs: sources that are gone or changed, variables around a function."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from helpers.forwards.base import SHAPE, Base, twins
from helpers.forwards.pure import PURE

import resnet_fast
from resnet_fast.fusion.converted_module import ConvertedModule


def test_another_code_of_the_forward(monkeypatch):
    """The function stays the same object."""
    ours, plain = twins(PURE["plain"][0])
    x = torch.randn(SHAPE)
    with torch.no_grad():
        assert torch.allclose(ours(x), plain(x), atol=1e-5)
        monkeypatch.setattr(plain_forward := PURE["plain"][0].forward, "__code__", other.__code__)
        assert plain_forward.__code__ is other.__code__
        assert torch.allclose(ours(x), plain(x), atol=1e-5)
        assert (plain(x) < 0).any()


def other(self, x):
    return self.norm(self.conv(x))


def closed_over(flag):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return F.relu(y + x) if flag else F.relu(y)

    def change(value):
        nonlocal flag
        flag = value

    return type("ClosedOver", (Base,), {"forward": forward}), change


def test_a_variable_around_the_forward():
    kind, change = closed_over(True)
    ours, plain = twins(kind)
    assert isinstance(ours, ConvertedModule)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        before = plain(x)
        assert torch.allclose(ours(x), before, atol=1e-5)
        change(False)
        assert not torch.allclose(plain(x), before)
        assert torch.allclose(ours(x), plain(x), atol=1e-5)


def test_code_without_source_is_left_alone():
    space = {"F": F}
    exec("def forward(self, x):\n    return F.relu(self.norm(self.conv(x)))", space)
    ours, _ = twins(type("NoSource", (Base,), {"forward": space["forward"]}))
    assert not isinstance(ours, ConvertedModule)
    (reason,) = {row.detail for row in resnet_fast.report(ours).rows if row.name == ""}
    assert "source" in reason


def test_source_that_has_changed_is_not_believed(tmp_path, monkeypatch):
    """The file says one thing, the code that was loaded does another."""
    monkeypatch.syspath_prepend(tmp_path)
    text = (
        "import torch.nn.functional as F\n\ndef forward(self, x):\n    {}\n    return F.relu(self.norm(self.conv(x)))\n"
    )
    (tmp_path / "changing_module.py").write_text(text.format("self.times += 1"))
    import changing_module

    (tmp_path / "changing_module.py").write_text(text.format("self"))
    ours, _ = twins(type("Changed", (Base,), {"forward": changing_module.forward}))
    assert not isinstance(ours, ConvertedModule)


def test_a_getattr_of_its_own():
    class Own(Base):
        def __getattr__(self, name):
            return super().__getattr__(name)

        def forward(self, x):
            return F.relu(self.norm(self.conv(x)))

    ours, _ = twins(Own)
    assert not isinstance(ours, ConvertedModule)


def test_ordered_dicts_are_not_watched():
    class Ordered(Base):
        def __init__(self):
            super().__init__()
            self.ordered = OrderedDict(skip=True)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return F.relu(y) if self.ordered["skip"] else y

    ours, _ = twins(Ordered)
    assert not isinstance(ours, ConvertedModule)
