"""``StalenessGuard`` by itself: what it sees, what it need not see, and that nothing is left behind."""

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

from resnet_fast.backends.native import extension
from resnet_fast.chain import tensor_state
from resnet_fast.chain.guard import StalenessGuard, refresh


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.row = nn.Sequential(nn.ReLU(), nn.Identity())
        self.scale, self.names, self.nothing = 0.5, ["a"], None


def watch(owner, **kwargs):
    return StalenessGuard(list(owner.modules()), {owner: ()}, **kwargs)


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
    "less of the same memory": lambda o: setattr(o.conv.weight, "data", o.conv.weight.data[:2]),
}
CONTENTS = {
    "in place": lambda o: o.conv.weight.add_(0),
    "a buffer in place": lambda o: o.bn.running_var.mul_(1),
    "through a view": lambda o: o.conv.weight[0, 0, 0, 0].fill_(1),
    "data": lambda o: setattr(o.conv.weight, "data", o.conv.weight.data.clone()),
    "there and back": lambda o: o.conv.half().float(),
    "swapped": swap,
    "the same memory, transposed": lambda o: setattr(o.conv.weight, "data", o.conv.weight.data.transpose(2, 3)),
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
    assert contents.is_valid()
    assert kinds.is_valid()
    (STRUCTURE | CONTENTS | NOTHING)[name](owner)
    assert contents.is_valid() == (name in NOTHING)
    assert kinds.is_valid() == (name not in STRUCTURE)


def test_the_order_of_an_ordered_dict():
    """Such are the children in modules of old pickles; its order is not that of the dict below it."""
    owner = Owner()
    owner.row._modules = OrderedDict(owner.row._modules)
    owner.row._modules.move_to_end("0")
    seen = watch(owner)
    assert seen.is_valid()
    owner.row._modules.move_to_end("1")
    assert not seen.is_valid()


def test_a_hook_that_is_removed():
    owner = Owner()
    seen = watch(owner)
    handle = owner.conv.register_forward_hook(lambda *_: None)
    assert not seen.is_valid()
    handle.remove()
    assert seen.is_valid()


def test_errors_come_through():
    owner = Owner()
    seen = watch(owner)
    with torch.inference_mode():
        owner.bn.running_mean = torch.zeros(3)
    assert not seen.is_valid()
    with pytest.raises(TypeError, match="bytes"):
        extension.unchanged([])
    with pytest.raises(TypeError, match="5 arguments"):
        extension.tensor_state(owner.conv.weight)


def test_without_kinds_only_what_there_is():
    """What keeps a module from running fused whatever its tensors are."""
    owner = Owner()
    seen = watch(owner, contents=False, kinds=False)
    with torch.no_grad():
        for name in ("shape", "in place", "data"):
            (STRUCTURE | CONTENTS)[name](owner)
            assert seen.is_valid()
    owner.conv.bias = None
    assert not seen.is_valid()


def test_hooks_and_forwards_that_stay():
    """They keep a module from running fused: as long as they are the same, so is the answer."""
    owner = Owner()
    handles = [owner.conv.register_forward_hook(lambda *_: None) for _ in range(2)]
    owner.bn.forward = own = owner.bn.forward
    seen = watch(owner)
    assert seen.is_valid()
    handles[0].remove()
    assert not seen.is_valid()
    seen = watch(owner)
    owner.bn.forward = lambda x: x
    assert not seen.is_valid()
    owner.bn.forward = own
    assert seen.is_valid()
    del owner.bn.forward
    assert not seen.is_valid()


def test_an_attribute_that_moved_in_its_dict():
    """It is looked for where it was, then by its name."""
    owner = Owner()
    seen = watch(owner)
    stride = owner.conv.__dict__.pop("stride")
    assert not seen.is_valid()
    owner.conv.stride = stride
    assert list(vars(owner.conv))[-1] == "stride"
    assert seen.is_valid()
    owner.conv.stride = (2, 2)
    assert not seen.is_valid()


def test_a_swap_for_a_view_of_the_same_memory():
    """It has the same address and as many writes, but other strides."""
    owner = Owner()
    owner.conv.weight = nn.Parameter(torch.zeros(3, 2, 3, 3))
    seen, view = watch(owner), nn.Parameter(owner.conv.weight.data.transpose(2, 3))
    assert (view.data_ptr(), view._version) == (owner.conv.weight.data_ptr(), owner.conv.weight._version)
    torch.utils.swap_tensors(owner.conv.weight, view)
    assert not seen.is_valid()


FAILURES = {
    "no such function": lambda t, *_: None,
    "versions that never change": lambda t, impl, size, data, _: TRUE_STATE(t, impl, size, data, t._version),
    "memory that never changes": lambda t, impl, size, _, version: TRUE_STATE(t, impl, size, t.data_ptr(), version),
    "swaps that are not seen": lambda t, *_: TRUE_STATE(t, *tensor_state._description(t)),
}
TRUE_STATE = extension.tensor_state


@pytest.fixture(params=FAILURES)
def getters(request, monkeypatch):
    """A release of PyTorch in which C++ cannot read tensors: Python's getters are asked."""

    class Extension:
        tensor_state = staticmethod(FAILURES[request.param])

    monkeypatch.setattr(tensor_state, "extension", Extension)
    tensor_state._is_reliable.cache_clear()
    yield
    tensor_state._is_reliable.cache_clear()


@torch.no_grad()
def test_what_is_seen_by_getters(getters):
    assert tensor_state.of(torch.zeros(3)) is None
    for name, change in (STRUCTURE | CONTENTS | NOTHING).items():
        owner = Owner()
        seen = watch(owner)
        assert seen.is_valid()
        change(owner)
        assert seen.is_valid() == (name in NOTHING), name


def made_in_inference_mode():
    with torch.inference_mode():
        return Owner()


def moved_in_inference_mode():
    """Its parameters keep a version, which counts nothing that is done in inference mode."""
    owner = Owner()
    with torch.inference_mode():
        return owner.double().float()


UNCOUNTED = {name: CONTENTS[name] for name in ("data", "there and back", "swapped", "the same memory, transposed")} | {
    "in place": lambda o: o.conv.weight.add_(1),
    "all of it": lambda o: o.conv.weight.fill_(1),
    "a buffer in place": lambda o: o.bn.running_var.mul_(2),
    "one number of a few": lambda o: o.bn.running_mean[2].fill_(5),
    "transposed in place": lambda o: o.conv.weight.transpose_(2, 3),
    "a load": lambda o: o.load_state_dict({k: v + 1 for k, v in o.state_dict().items()}),
    "fewer numbers": lambda o: o.bn.running_mean.resize_(2),
    "resized": lambda o: o.bn.running_mean.untyped_storage().resize_(1 << 20),
    "memory gone": lambda o: o.bn.running_mean.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("make", [made_in_inference_mode, moved_in_inference_mode])
@pytest.mark.parametrize("name", STRUCTURE | UNCOUNTED | NOTHING)
def test_what_is_seen_of_tensors_made_in_inference_mode(make, name):
    owner = make()
    assert owner.conv.weight.is_inference()
    assert owner.bn.running_mean.is_inference()
    seen = watch(owner)
    assert seen.is_valid()
    with torch.inference_mode():
        (STRUCTURE | UNCOUNTED | NOTHING)[name](owner)
    assert seen.is_valid() == (name in NOTHING)


def test_a_moved_tensor_that_is_changed_outside_of_inference_mode():
    """No number of it that the fingerprint reads."""
    owner = moved_in_inference_mode()
    owner.conv.weight.data = torch.ones(1024, 2, 3, 3)
    with torch.inference_mode():
        owner.double().float()
    seen = watch(owner)
    factors = torch.ones(1024, 2, 3, 3)
    factors[100, 1] = 2
    with torch.inference_mode():
        owner.conv.weight.mul_(factors.clone())
    assert seen.is_valid()  # as the next assertion wants it
    with torch.no_grad():
        owner.conv.weight.mul_(factors)
    assert not seen.is_valid()


def test_refresh_ends_every_watch_of_a_part():
    owner, other = Owner(), Owner()
    whole, part, others = watch(owner), StalenessGuard([owner.conv]), watch(other)
    refresh(owner.bn)
    assert [w.is_valid() for w in (whole, part, others)] == [False, True, True]
    refresh(nn.Sequential(owner))
    assert [w.is_valid() for w in (part, others)] == [False, True]
    with pytest.raises(TypeError, match="model is a list, want a torch"):
        refresh([owner])


class Asked(torch.overrides.TorchFunctionMode):
    """Python code that runs in the middle, where PyTorch's getters are asked for a version."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.raises:
            raise ValueError("asked")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("getters", list(FAILURES)[:1], indirect=True)
def test_python_in_between(getters):
    owner = Owner()
    seen = watch(owner)
    with Asked() as mode:
        mode.raises = False
        assert seen.is_valid()
        mode.raises = True
        with pytest.raises(ValueError, match="asked"):
            seen.is_valid()
    assert seen.is_valid()


def test_no_python_in_between():
    seen = watch(Owner())
    with Asked() as mode:
        mode.raises = True
        assert seen.is_valid()


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
            assert all(w.is_valid() for w in seen)
            assert not any(w.is_valid() for w in changed)

    ask(100)
    gc.collect()
    counts, blocks = list(map(sys.getrefcount, objects)), sys.getallocatedblocks()
    ask(20_000)
    gc.collect()
    # Other threads of the process come and go by the hundreds, a fault by a count each time.
    assert all(abs(sys.getrefcount(o) - count) < 10_000 for o, count in zip(objects, counts, strict=True))
    assert abs(sys.getallocatedblocks() - blocks) < 10_000


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_would_hold_nothing(duplicate):
    with pytest.raises(TypeError, match="addresses"):
        duplicate(watch(Owner()))


def test_what_is_watched_can_be_collected():
    owner = Owner()
    owner.seen = watch(owner)  # a circle
    gone = weakref.ref(owner.conv)
    assert owner.seen.is_valid()
    del owner
    gc.collect()
    assert gone() is None


def test_many_threads_ask():
    owner = Owner()
    seen, answers = watch(owner), []

    def ask():
        answers.extend(seen.is_valid() for _ in range(2000))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert answers == [True] * 8000
