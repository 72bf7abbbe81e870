"""Checks of fused training on several processes, for ``ranks.py``: networks equal one process with all images.

The truth is the network in plain PyTorch, in one process, on the joined batch, in float64.
"""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import resnet_fast
from resnet_fast import CifarResNet, backends, blocks, reference
from resnet_fast.chain import sync_batch_norm
from resnet_fast.chain.training import synchronized

UNEVEN = [3, 1, 0, 4]  # images of each process


def ours(network):
    sync_batch_norm.convert(network)
    return network


def pytorchs(network):
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def own_part(t, counts=None):
    rank, world = dist.get_rank(), dist.get_world_size()
    counts = counts or (UNEVEN if world == 4 else [4, 1])
    start = sum(counts[:rank])
    return t[start : start + counts[rank]]


def batch(passes=1, dtype=torch.float64):
    """Images and the gradients of their scores, for each pass; the same on all processes."""
    count = sum(UNEVEN) if dist.get_world_size() == 4 else 5
    shape = (passes, count, 3, 10, 10)
    return list(zip(torch.randn(shape, dtype=dtype) + 3, torch.randn(passes, count, 10, dtype=dtype), strict=True))


def alone(network, passes, forward=None):
    """Scores, gradients and buffers after ``passes`` in one process."""
    scores = []
    for x, grad in passes:
        y = network(x) if forward is None else forward(network, x)
        y.backward(grad)
        scores.append(y.detach())
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return scores, grads, dict(network.named_buffers())


def together(network, passes, wrap, forward=None):
    """The same, of the processes together: scores of this one, gradients as after an all-reduce."""
    backends.fallbacks(clear=True)
    joined, scores = wrap(network), []
    for number, (x, grad) in enumerate(passes):
        last = number + 1 == len(passes)
        # A static graph wants its first pass sent: plain networks fail in PyTorch, too, if it is not.
        sent = last or not isinstance(joined, DistributedDataParallel) or joined.static_graph
        with contextlib.nullcontext() if sent else joined.no_sync():
            y = joined(own_part(x)) if forward is None else forward(joined, own_part(x))
            y.backward(own_part(grad))
        scores.append(y.detach())
    assert backends.fallbacks() == {}, backends.fallbacks()
    world, grads = dist.get_world_size(), {}
    for name, p in network.named_parameters():
        if p.grad is not None and joined is network and not isinstance(p.grad, DTensor):
            dist.all_reduce(p.grad)
            grads[name] = p.grad
        elif p.grad is not None:  # an average over the processes
            grads[name] = (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad) * world
    return scores, grads, dict(network.named_buffers())


def error(found, wanted):
    return float((found.detach().double() - wanted.detach().double()).norm())


def assert_equal(found, wanted, rule, what):
    """rule: the largest error of a tensor, from (its name, the tensor wanted)."""
    for number, (y, joined) in enumerate(zip(found[0], wanted[0], strict=True)):
        mine = own_part(joined)
        assert error(y, mine) <= rule(("score", number), joined), (what, "scores", error(y, mine))
    for at in (1, 2):
        assert found[at].keys() == wanted[at].keys(), what
        for name, t in wanted[at].items():
            assert error(found[at][name], t) <= rule(name, t), (what, name, error(found[at][name], t))
    # Bit for bit the same statistics on all processes.
    own = torch.cat([t.double().flatten() for t in found[2].values()])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    assert all(t.equal(own) for t in everyone), what


def float64_rule(name, wanted):
    # 2^-53 times some hundred sums and norms of statistics, each of which condition the next layer's.
    return 1e-10 * float(wanted.double().norm()) + 1e-13


def ddp(**options):
    return lambda network: DistributedDataParallel(network, **options)


def sharded(network):
    for child in network.children():
        if isinstance(child, nn.Sequential):
            fully_shard(child)
    fully_shard(network)
    return network


def checkpointed(network, x):
    """``network`` with its second stage computed again in the backward."""
    inner = getattr(network, "module", network)
    if not hasattr(inner.layer2, "plain"):
        inner.layer2.plain = inner.layer2.forward
        inner.layer2.forward = lambda x: checkpoint(inner.layer2.plain, x, use_reentrant=False)
    return network(x)


class WithUnused(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.unused = network, nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x):
        return self.network(x)


def freeze(network):
    """A frozen backbone: the stem without gradients, the first stage by its running statistics, too."""
    for part in (network.conv1, network.bn1, network.layer1):
        part.requires_grad_(False)
    network.layer1.eval()
    return network


def other_norms(network):
    """Cumulative averages; batch norms without running statistics, and without gamma and beta."""
    network.bn1.momentum = None
    network.layer1[0].bn2.momentum = None
    network.layer2[0].bn1 = nn.BatchNorm2d(32, track_running_stats=False, dtype=torch.float64)
    network.layer3[0].bn1 = nn.BatchNorm2d(64, affine=False, dtype=torch.float64)
    return network


def same(network):
    return network


CASES = {  # how the network is changed, synchronised and wrapped, passes
    "ours": (same, ours, ddp(), 1),
    "static graph": (same, ours, ddp(static_graph=True), 2),
    "PyTorch's": (same, pytorchs, same, 2),
    "fuse": (same, lambda m: resnet_fast.fuse(pytorchs(m)), same, 1),
    "convert what is fused": (same, lambda m: pytorchs(resnet_fast.fuse(m)), same, 1),
    "fuse ours": (same, lambda m: resnet_fast.fuse(ours(m)), ddp(), 1),
    "unused": (WithUnused, ours, ddp(find_unused_parameters=True), 2),
    "frozen": (freeze, ours, ddp(), 1),
    "other norms": (other_norms, pytorchs, same, 2),
    "fsdp": (same, ours, sharded, 1),
}


def networks_like_one_process():
    for name, (change, synchronize, wrap, count) in CASES.items():
        plain = name.startswith("fuse") or name == "convert what is fused"
        if plain and dist.get_world_size() > 2:
            continue  # the processes say the same as two
        torch.manual_seed(1)
        own = (reference.CifarResNet if plain else CifarResNet)(1).double()
        truth = reference.CifarResNet(1).double()
        truth.load_state_dict(own.state_dict())
        truth, own = change(truth), synchronize(change(own))
        passes = batch(count)
        assert_equal(together(own, passes, wrap), alone(truth, passes), float64_rule, name)


def rounded_like_one_process():
    """float32 errs at most twice what plain PyTorch errs in one process, against float64; so do bfloat16's gradients.

    In bfloat16 all tensors count together: a few images leave a single one to chance.
    """
    for amp in (None, torch.bfloat16):
        torch.manual_seed(2)
        own, truth = ours(CifarResNet(1)), reference.CifarResNet(1)
        truth.load_state_dict(own.state_dict())
        exact, passes = copy.deepcopy(truth).double(), batch(dtype=torch.float32)
        wanted = alone(exact, [(x.double(), grad.double()) for x, grad in passes])
        passes = [(x, grad.to(amp or x.dtype)) for x, grad in passes]
        with torch.autocast("cpu", amp, enabled=amp is not None):
            plain, found = alone(truth, passes), together(own, passes, ddp())
        if amp is None:
            errors = {("score", 0): error(plain[0][0], wanted[0][0])}
            errors |= {name: error(t, wanted[at][name]) for at in (1, 2) for name, t in plain[at].items()}

            def rule(name, t, errors=errors):
                return 2 * errors[name] + torch.finfo(torch.float32).eps * float(t.double().norm())

            assert_equal(found, wanted, rule, "float32")
        for at in (1, 2):
            truth = {name: t.double() for name, t in wanted[at].items()}
            of_found, of_plain = (
                sum(error(t, truth[name]) / float(truth[name].norm()) for name, t in side[at].items())
                for side in (found, plain)
            )
            assert of_found <= 2 * of_plain, (amp, at, of_found, of_plain)


def options_like_one_process():
    """Checkpointing, which runs a forward again, with its collectives; and block outputs that are recomputed."""
    torch.manual_seed(3)
    own, truth = ours(CifarResNet(2).double()), reference.CifarResNet(2).double()
    truth.load_state_dict(own.state_dict())
    passes = batch()
    backends.training.recompute_outputs = True
    apart, synchronized.SyncedKernels._apart = synchronized.SyncedKernels._apart, lambda *_: True
    try:  # the gradients of weights beside the collectives, as on GPUs
        found = together(own, passes, same, checkpointed)
    finally:
        backends.training.recompute_outputs = False
        synchronized.SyncedKernels._apart = apart
    assert_equal(found, alone(truth, passes, checkpointed), float64_rule, "checkpoint, recompute")


def collectives_and_groups():
    """One collective for all statistics of a block's last convolution and projection; groups keep to themselves."""
    rank, world, counted = dist.get_rank(), dist.get_world_size(), [0, 0]
    calls = dist.all_gather, dist.all_reduce

    def count(which):
        def call(*args, **kwargs):
            counted[which] += 1
            return calls[which](*args, **kwargs)

        return call

    groups = [dist.new_group(ranks) for ranks in ([[0, 1], [2, 3]] if world == 4 else [[0], [1]])]
    group = groups[rank // 2 if world == 4 else rank]
    block = blocks.Bottleneck(4, 2, 2).double()
    x, mine = torch.randn(world, 2, 4, 6, 6, dtype=torch.float64), slice(rank // 2 * 2, rank // 2 * 2 + 2)
    ours_of = lambda network, process_group: sync_batch_norm.convert(network, process_group) or network  # noqa: E731
    for process_group, images, convert in (
        (None, x, nn.SyncBatchNorm.convert_sync_batchnorm),
        (group, x[mine] if world == 4 else x[rank : rank + 1], nn.SyncBatchNorm.convert_sync_batchnorm),
        (group, x[mine] if world == 4 else x[rank : rank + 1], ours_of),
    ):
        truth = copy.deepcopy(block)
        synced = convert(copy.deepcopy(block), process_group)
        dist.all_gather, dist.all_reduce, counted[:] = count(0), count(1), (0, 0)
        try:
            y = synced(x[rank])
            y.square().sum().backward()
        finally:
            dist.all_gather, dist.all_reduce = calls
        truth(images.flatten(0, 1)).square().sum().backward()
        apart = process_group is not None and world == 2  # a group of one
        assert counted == ([0, 0] if apart else [3, 3]), counted
        for name, t in truth.named_buffers():
            assert error(dict(synced.named_buffers())[name], t) <= float64_rule(name, t), name
        for p, q in zip(synced.parameters(), truth.parameters(), strict=True):
            dist.all_reduce(p.grad, group=process_group)
            assert error(p.grad, q.grad) <= float64_rule("", q.grad)
    network = ours(blocks.BasicBlock(3, 3))
    y = network(torch.ones(1, 3, 2, 2, requires_grad=True))
    with pytest.raises(RuntimeError, match="synchronised batch norm has no second derivatives"):
        torch.autograd.grad(y.sum(), network.conv1.weight, create_graph=True)
    for module in (network, copy.deepcopy(network.bn1)):  # one value in all, in a chain and in plain PyTorch
        with pytest.raises(ValueError, match="more than 1 value per channel when training, got 1 in all"):
            module(torch.ones(int(rank == 0), 3, 1, 1))
    assert backends.fallbacks() == {}


def mixed_norms():
    """A norm that keeps to its process's batch, which is empty on one: all of them run the block unfused."""
    rank = dist.get_rank()
    torch.manual_seed(5)
    block = blocks.BasicBlock(3, 3).double()
    block.bn1 = sync_batch_norm.SyncBatchNorm2d(3, dtype=torch.float64)
    backends.fallbacks(clear=True)
    y = block(torch.randn(int(rank > 0) * 2, 3, 5, 5, dtype=torch.float64))
    y.sum().backward()
    assert y.shape[0] == int(rank > 0) * 2
    (reason,) = backends.fallbacks(clear=True)
    assert "with and without the statistics of all processes" in reason


def unsynchronized_runs_fused():
    """Each process with its own statistics, replicated and sharded; DTensors seen outside of a forward fall back."""
    for wrap in (ddp(), sharded):
        torch.manual_seed(4)
        own, truth = CifarResNet(1).double(), reference.CifarResNet(1).double()
        truth.load_state_dict(own.state_dict())
        passes = [(x[:4], grad[:4]) for x, grad in batch()]
        counts = [4 // dist.get_world_size()] * dist.get_world_size()
        mine = [(own_part(x, counts), own_part(grad, counts)) for x, grad in passes]
        _, wanted, _ = alone(truth, mine)
        backends.fallbacks(clear=True)
        joined = wrap(own)
        joined(mine[0][0]).backward(mine[0][1])
        assert backends.fallbacks() == {}, backends.fallbacks()
        for name, p in own.named_parameters():
            dist.all_reduce(wanted[name])
            found = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            assert error(found * dist.get_world_size(), wanted[name]) <= float64_rule(name, wanted[name]), name
    with pytest.raises(RuntimeError, match="DTensor"):  # PyTorch's, of the operators that run instead
        own.stem(mine[0][0])
    assert [reason for reason in backends.fallbacks(clear=True) if "weights of type DTensor" in reason]


def main():
    networks_like_one_process()
    rounded_like_one_process()
    options_like_one_process()
    collectives_and_groups()
    mixed_norms()
    unsynchronized_runs_fused()
