"""Checks of fused training on several processes, for ``program_ranks.py``: networks equal one process with all images.

The truth is the network in plain PyTorch, in one process, on the joined batch, in float64.
"""

import contextlib
import copy

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
        torch.manual_seed(1)
        plain = name.startswith("fuse") or name == "convert what is fused"
        own = (reference.CifarResNet if plain else CifarResNet)(1).double()
        truth = reference.CifarResNet(1).double()
        truth.load_state_dict(own.state_dict())
        truth, own = change(truth), synchronize(change(own))
        passes = batch(count)
        assert_equal(together(own, passes, wrap), alone(truth, passes), float64_rule, name)
