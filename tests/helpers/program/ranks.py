"""Checks that every process of a torchrun makes: ``torchrun ... ranks.py FOLDER``."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.program import synchronized
from helpers.program.support import differences, small_cifar
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnet_fast import CifarResNet
from resnet_fast.chain import sync_batch_norm
from resnet_fast.program import checkpoints, data, distributed, loop, options, signals

LR = 0.05


def close(a, b, what, tolerance=1e-9):
    error = float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-30))
    assert error <= tolerance, f"{what}: {error}"


def batch_norm_like_one_process(rank, world):
    """Unequal batches, one of them empty: outputs, gradients and statistics of the joined batch."""
    counts = [3, 1, 0, 4][:world] if world > 2 else [3, 2]
    x = torch.randn(sum(counts), 5, 3, 2, dtype=torch.float64) * 2 + 1000
    grad = torch.randn_like(x)
    start = sum(counts[:rank])
    mine = slice(start, start + counts[rank])
    for variant in ("", "momentum=None", "no beta", "not tracked any more"):
        alone = nn.BatchNorm2d(5, momentum=None if variant == "momentum=None" else 0.1, dtype=torch.float64)
        nn.init.uniform_(alone.weight), nn.init.uniform_(alone.bias)
        if variant == "no beta":
            alone.bias = None
        alone.track_running_stats = variant != "not tracked any more"
        synced = copy.deepcopy(alone)
        sync_batch_norm.convert(synced)
        for _ in range(2):
            own, whole = x[mine].clone().requires_grad_(), x.clone().requires_grad_()
            synced.zero_grad(), alone.zero_grad()
            y, wanted = synced(own), alone(whole)
            y.backward(grad[mine]), wanted.backward(grad)
        if counts[rank]:
            close(y, wanted[mine], "output")
            close(own.grad, whole.grad[mine], "gradient")
        for (name, p), q in zip(synced.named_parameters(), alone.parameters(), strict=True):
            dist.all_reduce(p.grad)
            close(p.grad, q.grad, name)
        for name, value in alone.state_dict().items():
            close(synced.state_dict()[name].double(), value.double(), name)
    synced.eval(), alone.eval()
    close(synced(x), alone(x), "evaluation")
    half = sync_batch_norm.SyncBatchNorm2d(2, dtype=torch.float16)
    x = torch.randn(1, 2, 300, 300, dtype=torch.float64).half()  # more values a channel than float16 can count
    wanted = nn.BatchNorm2d(2, dtype=torch.float64)(x.double())
    close(half(x), wanted, "float16", 1.02 * 2**-11)  # the result's own rounding


def training_like_one_process(rank, world):
    """Three steps of a network in float64: weights and statistics of one process with the joined batch."""
    alone = CifarResNet(1).double()
    shared = copy.deepcopy(alone)
    sync_batch_norm.convert(shared)
    joined = DistributedDataParallel(shared)
    optimizers = [torch.optim.SGD(m.parameters(), LR, momentum=0.9) for m in (alone, shared)]
    for _ in range(3):
        x, labels = torch.randn(4 * world, 3, 12, 12, dtype=torch.float64), torch.randint(10, (4 * world,))
        F.cross_entropy(alone(x), labels).backward()
        mine = slice(4 * rank, 4 * rank + 4)
        F.cross_entropy(joined(x[mine]), labels[mine]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, value in alone.state_dict().items():
        close(shared.state_dict()[name].double(), value.double(), name, 1e-7)


def trained(folder, group, name, *given):
    """The state after one epoch of the program's own loop; another trainer takes it up from the file."""
    out = folder.parent / name
    settings = ["--epochs", "1", "--lr", "0.01", "--sync-bn", "--out", str(out)]
    chosen = options.parse([*small_cifar(folder), *settings, *given])
    trainer = loop.Trainer(chosen, data.load(chosen), group)
    received = trainer._train(data.loader(trainer.data.train, trainer.batches, 0, False), signals.Signals())
    assert received == 0
    trainer.save(best=False)
    other = loop.Trainer(chosen, data.load(chosen), group)
    other.restore(checkpoints.newest(out))
    assert differences(other.state(), trainer.state()) == []
    return trainer.state()


def strategies_agree(folder, group):
    """Sharded and replicated weights, and gradients sent once or with every pass, come to the same."""
    ddp = trained(folder, group, "ddp", "--accumulate", "2")
    fsdp = trained(folder, group, "fsdp", "--accumulate", "2", "--strategy", "fsdp")
    parts = trained(folder, group, "sharded", "--accumulate", "2", "--strategy", "fsdp", "--checkpoints", "sharded")
    assert differences(parts["model"], fsdp["model"]) == []
    every_pass = distributed.Processes.pass_without_sync
    distributed.Processes.pass_without_sync = staticmethod(lambda network, last: every_pass(network, True))
    try:
        chatty = trained(folder, group, "every pass", "--accumulate", "2")
    finally:
        distributed.Processes.pass_without_sync = staticmethod(every_pass)
    assert ddp["step"] == fsdp["step"] == chatty["step"] == 80 // (8 * 2 * group.world)
    for name, value in ddp["model"].items():
        # Two steps from the same weights in float32, with other orders of sums: an activation next to zero may pass its
        # ReLU or not, which moves a bias that began at zero by a percent. What is not sent moves it by half.
        close(fsdp["model"][name].double(), value.double(), f"fsdp {name}", 0.05)
        close(chatty["model"][name].double(), value.double(), f"every pass {name}", 0.05)
    assert ddp["optimizer"].keys() == fsdp["optimizer"].keys()


def averages_are_evaluated_alike(folder, group):
    """Every process evaluates rank 0's average, with its statistics, which is what is saved."""
    given = ["--epochs", "1", "--ema", "0.5", "--lr", "0.01", "--out", str(folder.parent / "ema")]
    chosen = options.parse([*small_cifar(folder), *given])
    trainer = loop.Trainer(chosen, data.load(chosen), group)
    trainer._train(data.loader(trainer.data.train, trainer.batches, 0, False), signals.Signals())
    trainer._evaluate(data.loader(trainer.data.test, trainer.test_batches, 0, False))
    own = torch.cat([t.double().flatten() for t in trainer.ema.module.state_dict().values()])
    assert all(t.equal(own) for t in group.everyone(own))


def no_sync_sends_nothing(rank, world):
    network = nn.Linear(3, 2)
    joined = DistributedDataParallel(network)
    x = torch.full((1, 3), float(rank + 1))
    with distributed.Processes.pass_without_sync(joined, last=False):
        joined(x).sum().backward()
    assert network.weight.grad.equal(x.expand(2, 3)), "the first pass was sent"
    with distributed.Processes.pass_without_sync(joined, last=True):
        joined(x).sum().backward()
    mean = sum(2.0 * (r + 1) for r in range(world)) / world
    assert network.weight.grad.equal(torch.full((2, 3), mean)), "the passes together were not sent"


def main():
    folder = Path(sys.argv[1])
    group = distributed.Processes(options.Options("none", device="cpu"))
    rank, world = group.rank, group.world
    torch.manual_seed(0)  # all draw the same images
    batch_norm_like_one_process(rank, world)
    training_like_one_process(rank, world)
    no_sync_sends_nothing(rank, world)
    synchronized.main()
    own = folder / str(rank)
    own.mkdir()
    if world == 2:
        strategies_agree(own, group)
        averages_are_evaluated_alike(own, group)
    (own / "done").write_text("")
    group.close()


if __name__ == "__main__":
    main()
