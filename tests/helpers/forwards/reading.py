"""Code of a ``forward`` that depends on more than its input and what ``fuse`` watches: types, contexts, random numbers,
the world outside. ``fuse`` leaves it alone."""

import logging
import os
import random

import numpy as np
import torch
import torch.nn.functional as F
from helpers.forwards.base import Cases
from torch import nn

READING = Cases()
case = READING.case


@case(False)
def random_numbers_like_the_input(self, x):
    y = F.relu(self.norm(self.conv(x)))
    return y + torch.rand_like(y)


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
def evaluated(self, x):
    return F.relu(eval("self.norm(self.conv(x))"))


@case(False)
def layer_made_anew(self, x):
    torch.manual_seed(0)
    return nn.Conv2d(8, 8, 1).to(x.dtype)(F.relu(self.norm(self.conv(x))))


@case(False)
def alias_of_a_library(self, x):
    library = random
    y = self.norm(self.conv(x))
    return F.relu(y) if library.random() < 0.5 else y


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


@case(False, lambda m, patch: m.rows.__setitem__(0, m.conv))
def identity_of_layers(self, x):
    y = x
    for conv in self.rows:
        y = conv(y) if conv is not self.conv else self.norm(conv(y))
    return F.relu(y)
