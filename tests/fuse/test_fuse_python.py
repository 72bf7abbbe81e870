"""What people write in a ``forward``: fused where that is a function of its input, and otherwise left as it is.

Each network runs beside its fused copy, with something changed between the calls: results, attributes and what is
printed are the same, and ``fuse`` leaves nothing behind.
"""

import ast
import copy
import functools
import logging
import math
import os
import random
import re
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.fuse_checks import prepared
from torch import nn

import resnet_fast
from resnet_fast.fusion.convert import ConvertedModule

SHAPE = (2, 8, 6, 6)
FLAG, SCALE, CACHE = True, 1.0, {}


def helper(x):
    return x * SCALE


def tanh_helper(x):
    return x.tanh()


class Inner(nn.Module):
    factor = 2.0

    def forward(self, x):
        return x * self.factor


class Counted(nn.ModuleList):
    count = 0

    def __iter__(self):
        self.count += 1
        return super().__iter__()


class Base(nn.Module):
    """``relu(norm(conv(x)) + x)``, and what the networks below read and write."""

    kind = "plain"

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner = nn.Module()
        self.inner.scale = 2.0
        self.rows = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])
        self.special, self.counted = Inner(), Counted([nn.Tanh()])
        self.rows[0].scale, self.rows[1].scale = 1.0, 2.0
        self.flags, self.config = {"skip": True}, SimpleNamespace(skip=True)
        self.nested, self.numbers, self.acts, self.history = {"a": [1]}, [1.0, 2.0], {}, []
        self.skip, self.times, self.scale, self.table = True, 1, 2.0, (1.0, 3.0)
        self.act, self.function = F.relu, helper
        self.generator, self.random = torch.Generator().manual_seed(0), random.Random(0)
        self.register_buffer("calls", torch.zeros(1))

    def pattern(self, x):
        return self.norm(self.conv(x))

    @property
    def skips(self):
        return self.skip

    @staticmethod
    def twice(x):
        return x * 2

    @classmethod
    def named(cls, x):
        return x * (2 if cls.kind == "plain" else 3)

    def choose(self):
        return self.skip

    def all_rows(self):
        return self.rows


CASES = {}


def case(fused, change=None):
    """``fused``: whether it runs fused. ``change``: what is done to both networks, or globally."""

    def add(forward):
        kind = type(forward.__name__, (Base,), {"forward": forward, "__module__": __name__})
        CASES[forward.__name__] = kind, fused, change
        return forward

    return add


def sets(name, value):
    return lambda m, patch: setattr(m, name, value)


def sets_global(name, value):
    return lambda m, patch: patch.setitem(globals(), name, value)


# What is a function of the input.


@case(True)
def plain(self, x):
    return F.relu(self.pattern(x) + x)


@case(True, sets("skip", False))
def flag(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y + x) if self.skip else F.relu(y)


@case(True, lambda m, patch: m.flags.update(skip=False))
def flag_in_a_dict(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y + x) if self.flags["skip"] else F.relu(y)


@case(True, lambda m, patch: m.flags.pop("skip"))
def flag_gone_from_a_dict(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y + x) if self.flags.get("skip") else F.relu(y)


@case(True, lambda m, patch: m.flags.update(skipped=m.flags.pop("skip")))
def flag_renamed_in_a_dict(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y + x) if self.flags.get("skip") else F.relu(y)


@case(True, sets_global("FLAG", False))
def global_flag(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y + x) if FLAG else F.relu(y)


@case(True, sets_global("SCALE", 3.0))
def global_of_a_helper(self, x):
    return helper(F.relu(self.norm(self.conv(x))))


@case(True, sets_global("helper", tanh_helper))
def another_helper(self, x):
    return helper(F.relu(self.norm(self.conv(x))))


@case(True, lambda m, patch: patch.setattr(F, "relu", torch.tanh))
def another_relu_of_pytorch(self, x):
    return F.relu(self.norm(self.conv(x)))


@case(True, lambda m, patch: patch.setattr(torch, "tanh", torch.sigmoid))
def another_tanh_of_pytorch(self, x):
    return torch.tanh(self.norm(self.conv(x)))


@case(True, lambda m, patch: patch.setattr(Base, "kind", "other"))
def class_attribute(self, x):
    return self.norm(self.conv(x)) * (2 if self.kind == "plain" else 3)


@case(True, lambda m, patch: patch.setattr(Base, "kind", "other"))
def class_method(self, x):
    return self.named(self.norm(self.conv(x)))


@case(True, lambda m, patch: patch.setattr(Base, "twice", staticmethod(lambda x: x * 5)))
def static_method(self, x):
    return self.twice(F.relu(self.norm(self.conv(x))))


@case(True, sets("skip", False))
def read_by_a_property(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y + x) if self.skips else F.relu(y)


@case(True, sets("skip", False))
def read_by_a_method(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y + x) if self.choose() else F.relu(y)


@case(True, lambda m, patch: setattr(m, "choose", lambda: False))
def method_of_the_instance(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y + x) if self.choose() else F.relu(y)


@case(True, sets("function", tanh_helper))
def function_of_the_instance(self, x):
    return self.function(F.relu(self.norm(self.conv(x))))


@case(True, sets("act", torch.tanh))
def function_of_pytorch_in_an_attribute(self, x):
    return self.act(self.norm(self.conv(x)))


@case(True, lambda m, patch: setattr(m.inner, "scale", 5.0))
def attribute_of_a_child(self, x):
    return F.relu(self.norm(self.conv(x))) * self.inner.scale


@case(True, lambda m, patch: setattr(m.rows[0], "scale", 7.0))
def attributes_in_a_loop(self, x):
    y = F.relu(self.norm(self.conv(x)))
    for row in self.rows:
        y = row(y) * row.scale
    return y


@case(True, lambda m, patch: m.rows.append(nn.Tanh()))
def loop_over_layers(self, x):
    y = F.relu(self.norm(self.conv(x)))
    for row in self.rows:
        y = row(y)
    return y


@case(True, sets("times", 3))
def loop_by_an_attribute(self, x):
    y = F.relu(self.norm(self.conv(x)))
    for _ in range(self.times):
        y = y * 2
    return y


@case(True, sets("table", (5.0, 3.0)))
def tuple_of_numbers(self, x):
    return F.relu(self.norm(self.conv(x))) * self.table[0] + math.sqrt(self.table[1])


@case(True)
def local_lists_and_dicts(self, x):
    found = {"y": self.norm(self.conv(x))}
    found["z"] = F.relu(found["y"])
    parts = list(found.values())
    parts.append(x)
    return torch.cat(parts, 1)


@case(True)
def tensor_or_list(self, x):
    parts = [x] if isinstance(x, torch.Tensor) else x
    return F.relu(self.norm(self.conv(parts[0])))


@case(False)
def random_numbers_like_the_input(self, x):
    y = F.relu(self.norm(self.conv(x)))
    return y + torch.rand_like(y)


@case(True)
def functional_dropout(self, x):
    return F.dropout(F.relu(self.norm(self.conv(x))), 0.3, self.training)


@case(True, lambda m, patch: m.__dict__.pop("extra", None) or setattr(m, "extra", 3.0))
def attribute_that_may_come(self, x):
    y = F.relu(self.norm(self.conv(x)))
    return y * self.extra if hasattr(self, "extra") else y


# What is not.


@case(False)
def buffer_in_place(self, x):
    self.calls += 1
    return F.relu(self.norm(self.conv(x)))


@case(False)
def attribute_set(self, x):
    self.last = self.norm(self.conv(x))
    return F.relu(self.last)


@case(False)
def number_counted(self, x):
    self.times += 1
    return F.relu(self.norm(self.conv(x))) * self.times


@case(False)
def dict_written(self, x):
    self.acts["y"] = F.relu(self.norm(self.conv(x)))
    return self.acts["y"]


@case(False)
def list_grown(self, x):
    self.history.append(F.relu(self.norm(self.conv(x))))
    return self.history[-1] * len(self.history)


@case(False)
def cache_filled(self, x):
    CACHE[len(CACHE)] = F.relu(self.norm(self.conv(x)))
    return CACHE[len(CACHE) - 1]


@case(False)
def set_by_setattr(self, x):
    setattr(self, "last", self.norm(self.conv(x)))  # noqa: B010
    return F.relu(self.last)


@case(False)
def set_through_a_local_name(self, x):
    me = self
    me.last = self.norm(self.conv(x))
    return F.relu(me.last)


@case(False)
def setting_of_a_layer(self, x):
    self.norm.eps = self.norm.eps * 2
    return F.relu(self.norm(self.conv(x)))


@case(True)
def weight_written(self, x):
    self.conv.weight.data.mul_(1.5)
    return F.relu(self.norm(self.conv(x)))


@case(False)
def mode_of_a_layer(self, x):
    self.norm.train(False)
    return F.relu(self.norm(self.conv(x)))


@case(False)
def class_attribute_counted(self, x):
    type(self).count = getattr(type(self), "count", 0) + 1
    return F.relu(self.norm(self.conv(x))) * type(self).count


@case(False, lambda m, patch: setattr(m.config, "skip", False))
def config_object(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y + x) if self.config.skip else F.relu(y)


@case(False, lambda m, patch: m.nested["a"].__setitem__(0, 5))
def list_in_a_dict(self, x):
    return F.relu(self.norm(self.conv(x))) * self.nested["a"][0]


@case(False, lambda m, patch: m.numbers.__setitem__(0, 5.0))
def list_of_numbers(self, x):
    return F.relu(self.norm(self.conv(x))) * self.numbers[0]


@case(False)
def numpys_random_numbers(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if np.random.rand() < 0.5 else y


@case(False)
def pythons_random_numbers(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if random.random() < 0.5 else y


@case(False)
def a_generator_of_its_own(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if self.random.random() < 0.5 else y


@case(False)
def a_generator_of_pytorch(self, x):
    return F.relu(self.norm(self.conv(x))) + torch.rand(1, generator=self.generator)


@case(False, lambda m, patch: patch.setenv("RESNET_FAST_TEST", "1"))
def environment(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if os.environ.get("RESNET_FAST_TEST") else y


@case(False)
def attribute_of_the_input(self, x):
    if hasattr(x, "tensors"):
        x = x.tensors
    return F.relu(self.norm(self.conv(x)))


@case(False)
def attribute_of_the_input_by_name(self, x):
    x = getattr(x, "tensors", x)
    return F.relu(self.norm(self.conv(x)))


@case(False)
def type_of_the_input(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if type(x) is torch.Tensor else y


@case(False)
def class_of_the_input(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if x.__class__ is torch.Tensor else y


@case(False)
def is_tensor(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if torch.is_tensor(y) else y


@case(False)
def type_of_a_result(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if isinstance(y, torch.Tensor) else y


@case(False)
def type_of_a_size(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if isinstance(x.size(0), int) else y


@case(False)
def exception_caught(self, x):
    try:
        y = x.tensors
    except AttributeError:
        y = x
    return F.relu(self.norm(self.conv(y)))


@case(False)
def exception_of_a_symbol_caught(self, x):
    y = self.norm(self.conv(x))
    try:
        return F.relu(y) if x.mean() > 1000 else y
    except Exception:
        return y * 2


@case(False)
def without_gradients(self, x):
    with torch.no_grad():
        y = self.norm(self.conv(x))
    return F.relu(y + x)


@case(False)
@torch.no_grad()
def decorated(self, x):
    return F.relu(self.norm(self.conv(x)))


@case(False)
def autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return F.relu(self.norm(self.conv(x)))


@case(False)
def asks_for_autocast(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if torch.is_autocast_enabled("cpu") else y


@case(False)
def asks_for_gradients(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if torch.is_grad_enabled() else y


@case(False)
def prints(self, x):
    print("here")
    return F.relu(self.norm(self.conv(x)))


@case(False)
def logs(self, x):
    logging.getLogger("test").warning("here")
    return F.relu(self.norm(self.conv(x)))


@case(False)
def seeds(self, x):
    torch.manual_seed(3)
    return F.dropout(F.relu(self.norm(self.conv(x))), 0.5, True)


@case(False)
def dict_of_attributes(self, x):
    self.__dict__["last"] = x
    return F.relu(self.norm(self.conv(x)))


@case(False)
def variables(self, x):
    vars(self)["times"] += 1
    return F.relu(self.norm(self.conv(x)))


@case(False)
def evaluated(self, x):
    return F.relu(eval("self.norm(self.conv(x))"))


@case(False)
def inner_function(self, x):
    def count(y):
        self.times += 1
        return y * self.times

    return count(F.relu(self.norm(self.conv(x))))


@case(False)
def layer_made_anew(self, x):
    torch.manual_seed(0)
    return nn.Conv2d(8, 8, 1).to(x.dtype)(F.relu(self.norm(self.conv(x))))


@case(False)
def child_added(self, x):
    if not hasattr(self, "more"):
        self.add_module("more", nn.Tanh())
    return self.more(self.norm(self.conv(x)))


@case(False)
def partial_with_state(self, x):
    return functools.partial(self.history.append)(x) or F.relu(self.norm(self.conv(x)))


@case(False)
def alias_of_a_library(self, x):
    library = random
    y = self.norm(self.conv(x))
    return F.relu(y) if library.random() < 0.5 else y


@case(False)
def rounded_in_between(self, x):
    for row in self.rows:
        row.half()
        row.float()
    return F.relu(self.norm(self.conv(x)))


@case(False)
def dict_through_a_local_name(self, x):
    flags = self.flags
    flags["skip"] = not flags["skip"]
    y = self.norm(self.conv(x))
    return F.relu(y) if flags["skip"] else y


@case(False)
def dict_updated(self, x):
    self.flags.update(skip=not self.flags["skip"])
    y = self.norm(self.conv(x))
    return F.relu(y) if self.flags["skip"] else y


@case(False)
def dict_emptied(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if self.flags.pop("skip", False) else y


@case(False)
def layer_appended(self, x):
    self.rows.append(nn.Tanh())
    return self.rows[-1](self.norm(self.conv(x)))


@case(False)
def layer_appended_through_a_local_name(self, x):
    rows = self.rows
    if len(rows) < 4:
        rows.append(self.norm)
    y = self.conv(x)
    for row in rows:
        y = row(y)
    return F.relu(y)


@case(False)
def layer_taken_from_what_a_method_gives(self, x):
    y = F.relu(self.norm(self.conv(x)))
    if len(self.rows) > 1:
        self.all_rows().pop(1)
    for row in self.rows:
        y = row(y)
    return y


@case(False)
def layer_taken_out(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if self._modules.pop("inner", None) is not None else y


@case(False)
def layer_of_a_row_replaced(self, x):
    rows = self.rows
    rows[0] = self.rows[1]
    return rows[0](F.relu(self.norm(self.conv(x))))


def grow(rows, y):
    rows.append(rows[0])
    return y * len(rows)


@case(False)
def rows_handed_on(self, x):
    return grow(self.rows, F.relu(self.norm(self.conv(x))))


def walk(rows, y):
    for row in rows:
        y = row(y) * row.scale
    return y


@case(True, lambda m, patch: setattr(m.rows[1], "scale", 7.0))
def rows_walked_by_a_helper(self, x):
    return walk(self.rows, F.relu(self.norm(self.conv(x))))


@case(True, lambda m, patch: patch.setattr(Inner, "factor", 9.0))
def class_attribute_of_a_child(self, x):
    return F.relu(self.norm(self.conv(x))) * self.special.factor


@case(True, lambda m, patch: patch.setattr(Inner, "factor", 9.0))
def class_attribute_in_a_loop(self, x):
    y = F.relu(self.norm(self.conv(x)))
    for child in self.children():
        if isinstance(child, Inner):
            y = y * child.factor
    return y


@case(False)
def formatted(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if "tensor" in "%s" % x else y  # noqa: UP031


@case(False)
def formatted_by_a_method(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if "tensor" in "{}".format(x) else y  # noqa: UP032


@case(False)
def formatted_in_place(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if "tensor" in f"{x}" else y


@case(False)
def parameter_or_tensor(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y) if isinstance(x, nn.Parameter) else y


@case(False)
def a_row_of_its_own(self, x):
    y = F.relu(self.norm(self.conv(x)))
    for layer in self.counted:
        y = layer(y)
    return y * self.counted.count


@case(False)
def mode_of_a_row(self, x):
    for row in self.rows:
        row.eval()
    return F.relu(self.norm(self.conv(x)))


@case(True)
def rows_in_pairs(self, x):
    y = x
    for conv, norm in zip([self.conv, self.rows[0]], [self.norm, self.special], strict=True):
        y = norm(conv(y))
    return F.relu(y)


@case(False, lambda m, patch: m.rows.__setitem__(0, m.conv))
def identity_of_layers(self, x):
    y = x
    for conv in self.rows:
        y = conv(y) if conv is not self.conv else self.norm(conv(y))
    return F.relu(y)


@case(True, sets("times", 0))
def rows_by_number_and_name(self, x):
    y = F.relu(self.norm(self.conv(x)))
    for i, row in enumerate(self.rows):
        y = row(y) if i == self.times else y
    for name, row in self.rows.named_children():
        y = row(y) if name == "1" else y
    return y


@case(True, lambda m, patch: m.rows.__setitem__(0, nn.Identity()))
def types_of_layers(self, x):
    y = F.relu(self.norm(self.conv(x)))
    for row in self.rows:
        y = row(y) * 2 if isinstance(row, nn.Conv2d) else y
    return y


def twins(kind):
    torch.manual_seed(0)
    plain = prepared(kind())
    before = snapshot(plain)
    ours = copy.deepcopy(plain)
    resnet_fast.fuse(ours, inplace=True)
    assert same(before, snapshot(ours)), "fuse changed the network"
    return ours, plain


def snapshot(m):
    """All that a forward could change in the network."""
    return [
        (
            name,
            {k: repr(v) for k, v in vars(part).items() if k not in HIDDEN and not k.startswith("_")},
            list(part._modules),
            {k: (v.dtype, v.requires_grad, v.clone()) for k, v in part.state_dict().items()},
        )
        for name, part in m.named_modules()
    ]


HIDDEN = {"generator", "random", "act", "function", "choose"}


def same(a, b):
    plain = [[part[:3] for part in parts] for parts in (a, b)]
    tensors = [[v for part in parts for v in part[3].values()] for parts in (a, b)]
    return plain[0] == plain[1] and all(
        s[:2] == t[:2] and torch.allclose(s[2], t[2], rtol=1e-4, atol=1e-5) for s, t in zip(*tensors, strict=True)
    )


def seed():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    CACHE.clear()


def runs(m, x, calls):
    seed()
    return [m(x.clone()) for _ in range(calls)]


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
    """Of the cases with a change, that it changes what the plain network gives: else nothing would be tested."""
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
    text = (Path(__file__).parents[2] / "docs" / "fuse.md").read_text()
    rows = dict(re.findall(r"^\| ([^|`]+) \| (fused|unfused) \|$", text, re.M))
    assert rows == {name.replace("_", " "): "fused" if fused else "unfused" for name, (_, fused, _) in CASES.items()}


def networks_of(path):
    """Name, fused convolutions and all of them, as the file's NETWORKS has them."""
    tree = ast.parse((Path(__file__).parent / path).read_text())
    table = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "NETWORKS")
    if isinstance(table, ast.Dict):
        rows = [(k.value, v.elts[2]) for k, v in zip(table.keys, table.values, strict=True)]
    else:
        rows = [(f"pytorchcv {row.elts[1].value}", row.elts[3]) for row in table.elts]
    return {name: ast.literal_eval(counts) for name, counts in rows}


def test_the_networks_of_the_documents():
    text = (Path(__file__).parents[2] / "docs" / "fuse.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\d+) \| (\d+) \|$", text, re.M)
    found = {f"{library} {name}".removeprefix("torchvision "): (int(a), int(b)) for library, name, a, b in rows}
    assert found == {**networks_of("test_fuse_networks.py"), **networks_of("../zoo/test_zoo.py")}


def test_another_code_of_the_forward(monkeypatch):
    """The function stays the same object."""
    ours, plain = twins(CASES["plain"][0])
    x = torch.randn(SHAPE)
    with torch.no_grad():
        assert torch.allclose(ours(x), plain(x), atol=1e-5)
        monkeypatch.setattr(plain_forward := CASES["plain"][0].forward, "__code__", other.__code__)
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
