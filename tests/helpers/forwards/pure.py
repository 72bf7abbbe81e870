"""Code of a ``forward`` that ``fuse`` shows to be a function of its input, and of values that it watches."""

import math

import torch
import torch.nn.functional as F
from helpers.forwards import base
from helpers.forwards.base import Base, Cases, Inner, helper, sets, sets_global, tanh_helper
from torch import nn

FLAG = True

PURE = Cases()
case = PURE.case


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


@case(True, sets_global(globals(), "FLAG", False))
def global_flag(self, x):
    y = self.norm(self.conv(x))
    return F.relu(y + x) if FLAG else F.relu(y)


@case(True, sets_global(vars(base), "SCALE", 3.0))
def global_of_a_helper(self, x):
    return helper(F.relu(self.norm(self.conv(x))))


@case(True, sets_global(globals(), "helper", tanh_helper))
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


@case(True)
def functional_dropout(self, x):
    return F.dropout(F.relu(self.norm(self.conv(x))), 0.3, self.training)


@case(True, lambda m, patch: m.__dict__.pop("extra", None) or setattr(m, "extra", 3.0))
def attribute_that_may_come(self, x):
    y = F.relu(self.norm(self.conv(x)))
    return y * self.extra if hasattr(self, "extra") else y


@case(True)
def weight_written(self, x):
    self.conv.weight.data.mul_(1.5)
    return F.relu(self.norm(self.conv(x)))


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


@case(True)
def rows_in_pairs(self, x):
    y = x
    for conv, norm in zip([self.conv, self.rows[0]], [self.norm, self.special], strict=True):
        y = norm(conv(y))
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
