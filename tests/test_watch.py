"""``Watch`` by itself: what it sees, what it need not see, and that nothing is left behind."""

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

from resnet_fast import backends
from resnet_fast.watch import Watch


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.row = nn.Sequential(nn.ReLU(), nn.Identity())
        self.scale, self.names, self.nothing = 0.5, ["a"], None


def watch(owner, **kwargs):
    return Watch(list(owner.modules()), [owner], **kwargs)


class Conv(nn.Conv2d):
    pass


def swap(owner):
    torch.utils.swap_tensors(owner.conv.weight, nn.Parameter(owner.conv.weight.detach().clone()))


STRUCTURE = {
    "class": lambda o: setattr(o.conv, "__class__", Conv),
    "class of the owner": lambda o: setattr(o, "__class__", type("Other", (Owner,), {})),
    "forward": lambda o: setattr(o.bn, "forward", o.bn.forward),
    "stride": lambda o: setattr(o.conv, "stride", (2, 2)),
    "padding mode": lambda o: setattr(o.conv, "padding_mode", "reflect"),
    "eps": lambda o: setattr(o.bn, "eps", 1e-3),
    "mode": lambda o: o.bn.eval(),
    "dropout": lambda o: setattr(o.drop, "p", 0.25),
    "a number": lambda o: setattr(o, "scale", 0.25),
    "a list": lambda o: setattr(o, "names", ["a"]),
    "None": lambda o: setattr(o, "nothing", 0),
    "an attribute gone": lambda o: delattr(o, "nothing"),
    "a setting gone": lambda o: delattr(o.conv, "stride"),
    "a hook": lambda o: o.conv.register_forward_hook(lambda *_: None) and None,
    "a pre-hook": lambda o: o.bn.register_forward_pre_hook(lambda *_: None) and None,
    "a backward hook": lambda o: o.bn.register_full_backward_hook(lambda *_: None) and None,
    "a backward pre-hook": lambda o: o.bn.register_full_backward_pre_hook(lambda *_: None) and None,
    "a child": lambda o: setattr(o, "conv", nn.Conv2d(2, 3, 3)),
    "a child more": lambda o: o.row.append(nn.Identity()),
    "a child less": lambda o: o.row.__delitem__(1),
    "children in turn": lambda o: o.row._modules.update({"1": o.row[0], "0": o.row[1]}),
    "no child": lambda o: setattr(o, "drop", None),
    "a parameter": lambda o: setattr(o.conv, "weight", nn.Parameter(o.conv.weight.detach())),
    "no parameter": lambda o: setattr(o.conv, "bias", None),
    "a parameter more": lambda o: o.conv.register_parameter("more", None),
    "a buffer": lambda o: setattr(o.bn, "running_mean", torch.zeros(3)),
    "dtype": lambda o: o.double(),
    "shape": lambda o: setattr(o.conv.weight, "data", torch.zeros(3, 2, 1, 1)),
}
CONTENTS = {
    "in place": lambda o: o.conv.weight.add_(0),
    "a buffer in place": lambda o: o.bn.running_var.mul_(1),
    "through a view": lambda o: o.conv.weight[0, 0, 0, 0].fill_(1),
    "data": lambda o: setattr(o.conv.weight, "data", o.conv.weight.data.clone()),
    "there and back": lambda o: o.conv.half().float(),
    "swapped": swap,
}
NOTHING = {
    "a count of batches": lambda o: o.bn.num_batches_tracked.add_(1),
    "what nobody reads": lambda o: setattr(o.conv, "note", 1),
    "the same again": lambda o: (setattr(o.conv, "groups", 1), setattr(o, "conv", o.conv), o.bn.train()),
    "a hook on the owner": lambda o: o.register_forward_hook(lambda *_: None) and None,
    "gradients": lambda o: (o.requires_grad_(False), setattr(o.conv.weight, "grad", torch.zeros(3, 2, 3, 3))),
    "the state of all": lambda o: o.zero_grad(),
}


@pytest.mark.parametrize("name", STRUCTURE | CONTENTS | NOTHING)
@torch.no_grad()
def test_what_is_seen(name):
    owner = Owner()
    contents, kinds = watch(owner), watch(owner, contents=False)
    assert contents.unchanged()
    assert kinds.unchanged()
    (STRUCTURE | CONTENTS | NOTHING)[name](owner)
    assert contents.unchanged() == (name in NOTHING)
    assert kinds.unchanged() == (name not in STRUCTURE)


def test_the_order_of_an_ordered_dict():
    """Such are the children in modules of old pickles; its order is not that of the dict below it."""
    owner = Owner()
    owner.row._modules = OrderedDict(owner.row._modules)
    owner.row._modules.move_to_end("0")
    seen = watch(owner)
    assert seen.unchanged()
    owner.row._modules.move_to_end("1")
    assert not seen.unchanged()


def test_a_hook_that_is_removed():
    owner = Owner()
    seen = watch(owner)
    handle = owner.conv.register_forward_hook(lambda *_: None)
    assert not seen.unchanged()
    handle.remove()
    assert seen.unchanged()


def test_errors_come_through():
    owner = Owner()
    seen = watch(owner)
    with torch.inference_mode():
        owner.bn.running_mean = torch.zeros(3)
    assert not seen.unchanged()
    with pytest.raises(RuntimeError, match="version counter"):
        watch(owner)
    with pytest.raises(TypeError, match="bytes"):
        backends.native.unchanged([])


class Asked(torch.overrides.TorchFunctionMode):
    """Python code that runs in the middle, where PyTorch is asked for a version."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.raises:
            raise ValueError("asked")
        return function(*args, **(kwargs or {}))


def test_python_in_between():
    owner = Owner()
    seen = watch(owner)
    with Asked() as mode:
        mode.raises = False
        assert seen.unchanged()
        mode.raises = True
        with pytest.raises(ValueError, match="asked"):
            seen.unchanged()
    assert seen.unchanged()


def test_nothing_is_kept_or_let_go():
    """References are counted by hand in C: none may be left over, none given away."""
    owner = Owner()
    with torch.no_grad():
        for _ in range(300):  # beyond the numbers that Python keeps
            owner.conv.weight.add_(0)
    owner.row._modules = OrderedDict(owner.row._modules)
    changed = [watch(owner), watch(owner, contents=False)]
    owner.conv.bias = None
    seen = [watch(owner), watch(owner, contents=False)]
    objects = [None, True, False, owner.conv.weight, owner.conv.stride, owner.row[0], torch.float32, "forward"]
    objects += [vars(m) for m in owner.modules()]
    objects += map(type, owner.modules())

    def ask(times):
        for _ in range(times):
            assert all(w.unchanged() for w in seen)
            assert not any(w.unchanged() for w in changed)

    ask(100)
    gc.collect()
    counts, blocks = list(map(sys.getrefcount, objects)), sys.getallocatedblocks()
    ask(20_000)
    gc.collect()
    assert list(map(sys.getrefcount, objects)) == counts
    assert abs(sys.getallocatedblocks() - blocks) < 100


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_would_hold_nothing(duplicate):
    with pytest.raises(TypeError, match="addresses"):
        duplicate(watch(Owner()))


def test_what_is_watched_can_be_collected():
    owner = Owner()
    owner.seen = watch(owner)  # a circle
    gone = weakref.ref(owner.conv)
    assert owner.seen.unchanged()
    del owner
    gc.collect()
    assert gone() is None


def test_many_threads_ask():
    owner = Owner()
    seen, answers = watch(owner), []

    def ask():
        answers.extend(seen.unchanged() for _ in range(2000))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert answers == [True] * 8000
