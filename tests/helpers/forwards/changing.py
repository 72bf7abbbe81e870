"""Code of a ``forward`` that changes what outlives the call, or may change it: ``fuse`` leaves it alone."""

import functools

import torch.nn.functional as F
from helpers.forwards.base import CACHE, Cases
from torch import nn

CHANGING = Cases()
case = CHANGING.case


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


@case(False)
def mode_of_a_layer(self, x):
    self.norm.train(False)
    return F.relu(self.norm(self.conv(x)))


@case(False)
def class_attribute_counted(self, x):
    type(self).count = getattr(type(self), "count", 0) + 1
    return F.relu(self.norm(self.conv(x))) * type(self).count


@case(False)
def dict_of_attributes(self, x):
    self.__dict__["last"] = x
    return F.relu(self.norm(self.conv(x)))


@case(False)
def variables(self, x):
    vars(self)["times"] += 1
    return F.relu(self.norm(self.conv(x)))


@case(False)
def inner_function(self, x):
    def count(y):
        self.times += 1
        return y * self.times

    return count(F.relu(self.norm(self.conv(x))))


@case(False)
def child_added(self, x):
    if not hasattr(self, "more"):
        self.add_module("more", nn.Tanh())
    return self.more(self.norm(self.conv(x)))


@case(False)
def partial_with_state(self, x):
    return functools.partial(self.history.append)(x) or F.relu(self.norm(self.conv(x)))


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
