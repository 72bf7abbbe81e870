"""Weights that change without a count of PyTorch's: a module in eval mode follows them, as its eager twin does."""

import pytest
import torch
import torch.distributed as dist
from helpers.changes import fill, pair_of_blocks
from helpers.fuse_support import fused_names
from helpers.support import assert_same_model, randomize_, twins
from torch import nn

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.chain import guard as watch


def small():
    return twins(resnet_fast.cifar_resnet20, reference.cifar_resnet20)


def stem_and_pool():
    return twins(lambda: resnet_fast.ResNet32(image_size=64), lambda: reference.ResNet32(image_size=64))


def converted(make):
    def pair():
        eager = randomize_(make().eval())
        fast = make().eval()
        fast.load_state_dict(eager.state_dict())
        fast = resnet_fast.fuse(fast, inplace=True)
        assert fused_names(fast)
        return fast, eager

    return pair


MODELS = {
    "block": (pair_of_blocks, (2, 16, 7, 7)),
    "small network, one image": (small, (1, 3, 16, 16)),
    "small network": (small, (6, 3, 16, 16)),
    "a network fused afterwards": (converted(lambda: reference.CifarResNet(1)), (2, 3, 16, 16)),
}


POOLED = {"network with a pooled stem": (stem_and_pool, (2, 3, 64, 64))}
FEW = ("block", "small network, one image", "a network fused afterwards")


def result(m, x, gradients):
    """In eval mode without gradients, or with those of the input and all parameters."""
    if not gradients:
        with torch.no_grad():
            return [m(x)]
    x = x.clone().requires_grad_()
    y = m(x)
    wanted = [x, *m.parameters()]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]


def assert_same(fast, eager, x, gradients):
    if not gradients:
        assert_same_model(fast, eager, x)
        return
    for ours, theirs in zip(result(fast, x, True), result(eager, x, True), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def floats(m):
    return [t for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()]


def set_gradients(parameters):
    for i, p in enumerate(parameters):
        p.grad = fill(p, i)


def step(kind, **kwargs):
    def change(m, _):
        set_gradients(m.parameters())
        kind(m.parameters(), fused=True, **kwargs).step()

    return change


def flat_step(m, _):
    """The optimizer knows one vector, the module's parameters are slices of it."""
    flat = m.vector.requires_grad_()
    flat.grad = fill(flat)
    torch.optim.SGD([flat], lr=0.01, fused=True).step()


def flatten(m):
    m.__dict__["vector"] = torch.cat([p.detach().flatten() for p in m.parameters()])
    at = 0
    for p in m.parameters():
        p.data = m.vector[at : at + p.numel()].view_as(p)
        at += p.numel()


def others(t, seed):
    """Other values, near enough that a deep network's scores stay finite."""
    return t.detach() * (1 + 0.3 * fill(t, seed))


def write(how):
    def change(m, _):
        for i, t in enumerate(floats(m)):
            how(t, others(t, i))

    return change


def collective(name):
    def change(m, peer):
        tensors = floats(m)
        values = [others(t, i) for i, t in enumerate(tensors)]
        if name == "all_reduce":  # a sum
            values = [v - t.detach() for v, t in zip(values, tensors, strict=True)]
        peer.send((name, values))
        for t in tensors:
            dist.broadcast(t.detach(), 1) if name == "broadcast" else dist.all_reduce(t.detach())
        assert peer.recv() == name

    return change


def write_elsewhere(m, peer):
    peer.send(("write", floats(m)))
    assert peer.recv() == "write"


ROUTES = {
    "fused SGD": step(torch.optim.SGD, lr=0.01),
    "fused Adam": step(torch.optim.Adam, lr=0.01),
    "fused AdamW": step(torch.optim.AdamW, lr=0.01),
    "fused Adagrad": step(torch.optim.Adagrad, lr=0.01),
    "broadcast": collective("broadcast"),
    "all_reduce": collective("all_reduce"),
    "another process": write_elsewhere,
    "storage": write(lambda t, v: t.untyped_storage().copy_(v.untyped_storage())),
    "numpy": write(lambda t, v: t.detach().numpy().__setitem__(..., v.numpy())),
    "dlpack": write(lambda t, v: torch.from_dlpack(t.detach()).copy_(v)),
    "data": write(lambda t, v: t.data.copy_(v)),
    "optimizer of a flat vector": flat_step,
    "flat vector": lambda m, _: m.vector.mul_(1.05),
}
PREPARE = {
    "another process": lambda m: m.share_memory(),
    "optimizer of a flat vector": flatten,
    "flat vector": flatten,
}


def work(connection, store):
    """The other process."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=1, world_size=2)
    while (job := connection.recv()) is not None:
        name, tensors = job
        for t in tensors:
            if name == "broadcast":
                dist.broadcast(t, 1)
            elif name == "all_reduce":
                dist.all_reduce(t)
            else:
                with torch.no_grad():
                    t.mul_(1.05)
        connection.send(name)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, store), daemon=True)
    process.start()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=2)
    yield here
    here.send(None)
    dist.destroy_process_group()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "gradients"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("route", ROUTES)
def test_changes_that_are_not_counted(route, model, gradients, peer):
    make, shape = (MODELS | POOLED)[model]
    fast, eager = make()
    x = torch.randn(shape)
    for m in (fast, eager):
        PREPARE.get(route, lambda _: None)(m)
    with backends.use("cpu"):
        before = result(fast, x, gradients)
        for m in (fast, eager):
            ROUTES[route](m, peer)
        assert_same(fast, eager, x, gradients)
        assert not torch.equal(before[0], result(fast, x, gradients)[0])
    assert backends.fallbacks() == {}


@pytest.mark.parametrize("route", ["fused Adam", "broadcast", "numpy"])
def test_a_pooled_stem(route, peer):
    test_changes_that_are_not_counted(route, *POOLED, False, peer)


@pytest.mark.parametrize("model", MODELS)
def test_fine_tuning_with_frozen_statistics(model):
    """Steps of a fused optimizer between calls in eval mode, and evaluation between them."""
    make, shape = MODELS[model]
    fast, eager = make()
    x = torch.randn(shape)
    losses = {}
    for m in (fast, eager):
        optimizer, losses[m] = torch.optim.SGD(m.parameters(), lr=1e-3, fused=True), []
        around = nn.ModuleList([m]).train()
        m.eval()
        assert around.training
        for _ in range(3):
            optimizer.zero_grad()
            loss = m(x).square().mean()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                losses[m] += [loss.item(), m(x).square().mean().item()]
    assert torch.allclose(*(torch.tensor(losses[m]) for m in (fast, eager)), rtol=1e-4)
    assert len(set(losses[fast])) > 3
    assert backends.fallbacks() == {}


def element(m):
    """The weight of a convolution that runs fused, and an element of it that the fingerprint does not read."""
    return next(c.weight for c in m.modules() if isinstance(c, nn.Conv2d) and c.weight.numel() > 2000), 700


def step_of_one(m):
    """All other gradients are zero."""
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    weight, at = element(m)
    weight.grad.view(-1)[at] = 5
    torch.optim.SGD(m.parameters(), lr=1, fused=True).step()


TOLD = {
    "eval": lambda m: m.eval(),
    "eval of what is around it": lambda m: nn.Sequential(m).eval(),
    "train and eval": lambda m: m.train().eval(),
    "load_state_dict of nothing": lambda m: m.load_state_dict({}, strict=False),
    "load_state_dict of what is around it": lambda m: nn.Sequential(m).load_state_dict({}, strict=False),
    "refresh": resnet_fast.refresh,
    "a step of an optimizer": step_of_one,
}


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "gradients"])
@pytest.mark.parametrize("model", FEW)
@pytest.mark.parametrize("name", TOLD)
def test_an_element_that_the_fingerprint_does_not_read(name, model, gradients):
    make, shape = MODELS[model]
    fast, eager = make()
    x = torch.randn(shape)
    with backends.use("cpu"):
        before = result(fast, x, gradients)
        for m in (fast, eager):
            weight, at = element(m)
            weight.data.view(-1)[at] = 5
        # As the docstring of refresh says; where a gradient is wanted nothing is packed.
        assert torch.equal(before[0], result(fast, x, gradients)[0]) != gradients
        for m in (fast, eager):
            TOLD[name](m)
        assert_same(fast, eager, x, gradients)
        assert not torch.equal(before[0], result(fast, x, gradients)[0])


@pytest.mark.parametrize("images", [1, 6])
@torch.no_grad()
def test_eval_of_a_part_of_a_network(images):
    fast, eager = small()
    x = torch.randn(images, 3, 16, 16)
    before = fast(x)
    for m in (fast, eager):
        weight, at = element(m.layer1)
        weight.data.view(-1)[at] = 5
        m.layer1[0].eval()
    with backends.use("cpu"):
        assert_same_model(fast, eager, x)
    assert not torch.equal(fast(x), before)


@pytest.fixture
def unreadable(monkeypatch):
    """As on GPUs, whose memory the host must not read at every call."""
    monkeypatch.setattr(watch, "_extent", lambda t: None)


STEPS = [name for name in ROUTES if "fused" in name or "optimizer" in name]


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "gradients"])
@pytest.mark.parametrize("model", FEW)
@pytest.mark.parametrize("route", STEPS)
def test_steps_where_contents_cannot_be_read(route, model, gradients, unreadable):
    test_changes_that_are_not_counted(route, model, gradients, None)


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("model", FEW)
def test_what_is_told_where_contents_cannot_be_read(name, model, unreadable):
    test_an_element_that_the_fingerprint_does_not_read(name, model, False)


@torch.no_grad()
def test_what_is_not_seen_where_contents_cannot_be_read(unreadable):
    """As the docstring of refresh says."""
    fast, eager = pair_of_blocks()
    x = torch.randn(2, 16, 7, 7)
    before = fast(x)
    for m in (fast, eager):
        for t in floats(m):
            t.data.mul_(1.5)
    assert torch.equal(fast(x), before)
    resnet_fast.refresh(fast)
    with backends.use("cpu"):
        assert_same_model(fast, eager, x)


def other_step():
    other = nn.Linear(2, 2)
    set_gradients(other.parameters())
    torch.optim.SGD(other.parameters(), lr=0.1).step()


@torch.no_grad()
def test_steps_of_another_network():
    """A teacher is packed once."""
    fast, _ = small()
    x = torch.randn(1, 3, 16, 16)
    fast(x)
    chain = fast.whole()._chain
    assert chain is not None
    other_step()
    fast(x)
    assert fast.whole()._chain is chain


@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_steps_of_another_network_where_contents_cannot_be_read(frozen, unreadable):
    """What wants a gradient may be written from a copy that the optimizer holds."""
    fast, _ = pair_of_blocks()
    fast.requires_grad_(not frozen)
    x = torch.randn(1, 16, 7, 7)
    fast(x)
    chain = fast._chain
    other_step()
    fast(x)
    assert (fast._chain is chain) == frozen


@torch.no_grad()
def test_frozen_slices_of_what_an_optimizer_holds(unreadable):
    fast, eager = pair_of_blocks()
    x = torch.randn(2, 16, 7, 7)
    for m in (fast, eager):
        flatten(m)
        m.requires_grad_(False)
    before = fast(x)
    for m in (fast, eager):
        flat_step(m, None)
    with backends.use("cpu"):
        assert_same_model(fast, eager, x)
    assert not torch.equal(fast(x), before)


@pytest.mark.parametrize("readable", [False, True])
@torch.no_grad()
def test_a_step_that_is_compiled(readable, monkeypatch):
    """PyTorch counts it, whatever the hook does there."""
    if not readable:
        monkeypatch.setattr(watch, "_extent", lambda t: None)
    fast, eager = pair_of_blocks()
    x = torch.randn(2, 16, 7, 7)
    before = fast(x)
    for m in (fast, eager):
        set_gradients(m.parameters())
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        torch.compile(lambda o=optimizer: o.step(), backend="aot_eager")()
    with backends.use("cpu"):
        assert_same_model(fast, eager, x)
    assert not torch.equal(fast(x), before)
