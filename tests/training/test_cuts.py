"""Chains under DistributedDataParallel: cut into stages, so that gradients leave while the backward goes on."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers.support import channels_last
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import resnet_fast
from benchmarks.memory import saved_bytes
from resnet_fast import backends, blocks, reference
from resnet_fast.chain import sync_batch_norm
from resnet_fast.chain.record import ChainRecorder
from resnet_fast.chain.training.cuts import BUCKET_BYTES, stages
from resnet_fast.chain.training.passes import Passes


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def keep_outputs():
    yield
    backends.training.recompute_outputs = False


def specs_of(*modules):
    recorder, x = ChainRecorder(training=True), 0
    for m in modules:
        x = m.emit(recorder, x)
    return recorder.specs


def cut(specs, size=1):
    return stages(specs, [size] * len(specs))


def test_a_stage_begins_with_the_block_that_has_a_stride():
    block, stem = blocks.BasicBlock, resnet_fast.CifarResNet(1)
    parts = [[stem, block(16, 4), block(4, 4)], [block(4, 8, 2), block(8, 8)], [blocks.Bottleneck(8, 4, 2)]]
    assert cut(specs_of(*(m for part in parts for m in part))) == [specs_of(*part) for part in parts]
    assert cut(specs_of(*parts[1])) == [specs_of(*parts[1])]
    strided = specs_of(stem)[0]._replace(stride=(2, 2))
    no_blocks = [strided, strided._replace(source=1)]
    assert cut(no_blocks) == [no_blocks]


def test_a_large_stage_is_cut_where_a_bucket_is_full():
    block = blocks.BasicBlock(4, 4)
    parts = [[block], [block, block], [block, block]]
    whole = specs_of(*(m for part in parts for m in part))
    assert cut(whole, BUCKET_BYTES // 4) == [specs_of(*part) for part in parts]
    assert cut(whole, BUCKET_BYTES // 4 - 1) == [specs_of(*part) for part in ([block] * 2, [block] * 3)]


def test_no_cut_where_a_later_layer_reads_across():
    plain = specs_of(blocks.BasicBlock(4, 4), blocks.BasicBlock(4, 8, 2), blocks.BasicBlock(8, 8))
    assert len(cut(plain)) == 2
    across = [*plain[:-1], plain[-1]._replace(residual=1)]
    assert cut(across) == [across]


def in_flat_order():
    """Blocks of all stages in one Sequential: one chain for ``fuse``."""
    plain = reference.CifarResNet(1)
    return resnet_fast.fuse(nn.Sequential(*plain.layer1, *plain.layer2, *plain.layer3))


def with_frozen_norms():
    model = resnet_fast.CifarResNet(1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            m.train = lambda mode: None
    return model


def with_synchronized_norms():
    model = resnet_fast.CifarResNet(1)
    sync_batch_norm.convert(model)
    return model


class Checkpointed(nn.Module):
    """Runs again in the backward, where no forward of DistributedDataParallel is active."""

    def __init__(self, reentrant):
        super().__init__()
        self.model, self.reentrant = resnet_fast.CifarResNet(1), reentrant

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


def functions(y):
    """How many autograd functions of chains made ``y``."""
    found, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [inner for inner, _ in node.next_functions]
    return sum(type(node).__name__ in ("_TrainBackward", "_FrozenBackward") for node in found)


def passes(model, x, first):
    """Two passes, the first in the context ``first``: output, gradients, buffers."""
    own = x.clone().requires_grad_()
    with first():
        model(own).square().sum().backward()
    y = model(own)
    y.square().sum().backward()
    return [y, own.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: resnet_fast.CifarResNet(1), {}),
        (lambda: resnet_fast.CifarResNet(1), {"find_unused_parameters": True, "gradient_as_bucket_view": True}),
        (in_flat_order, {"static_graph": True}),
        (with_frozen_norms, {}),
        (with_synchronized_norms, {}),
        (lambda: Checkpointed(False), {}),
        (lambda: Checkpointed(True), {"static_graph": True}),
    ],
    ids=["network", "unused parameters", "fused", "frozen norms", "synchronized", "checkpointed", "reentrant"],
)
def test_the_bits_of_the_whole_chain(process_group, one_thread, make, options):
    """With one thread and few pixels: a reduction between stages then has one block of sums with a cut and without."""
    model = make().train()
    whole = copy.deepcopy(model)
    x = torch.randn(2, 16 if isinstance(model, nn.Sequential) else 3, 8, 8)
    joined = DistributedDataParallel(model, **options)
    # A static graph wants its first pass sent.
    first = torch.enable_grad if joined.static_graph else joined.no_sync
    ours, theirs = passes(joined, x, first), passes(whole, x, torch.enable_grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if not isinstance(model, Checkpointed):
        assert (functions(joined(x)), functions(whole(x))) == (3, 1)
    assert backends.fallbacks() == {}


def test_gradients_leave_before_the_backward_ends(process_group, monkeypatch):
    model = resnet_fast.CifarResNet(1).train()
    joined, events = DistributedDataParallel(model, bucket_cap_mb=0.1), []

    def hook(_, bucket):
        events.append(f"bucket {bucket.index()}")
        sent = torch.futures.Future()
        sent.set_result(bucket.buffer())
        return sent

    def backward(self, *args):
        events.append("backward")
        return run(self, *args)

    run = Passes.backward
    monkeypatch.setattr(Passes, "backward", backward)
    joined.register_comm_hook(None, hook)
    for _ in range(2):  # the first tells DistributedDataParallel the order of gradients
        events.clear()
        joined(torch.randn(2, 3, 8, 8)).sum().backward()
    assert events[:2] == ["backward", "bucket 0"]
    assert events.count("backward") == 3
    assert events[-1].startswith("bucket")


def change_modes(model):
    model.eval().train()


def evaluate(model):
    model.eval()(torch.randn(2, 3, 8, 8))
    model.train()


def set_eps(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps = float(str(m.eps))


@pytest.mark.parametrize(
    "between",
    [change_modes, evaluate, set_eps, resnet_fast.refresh, lambda _: None],
    ids=["modes", "an evaluation", "eps", "refresh", "nothing"],
)
def test_checkpointing_finds_the_same_cuts(process_group, between):
    """Whatever happens between the forward and the backward, which runs the chain again without its wrapper."""
    model = Checkpointed(False).train()
    joined = DistributedDataParallel(model)
    y = joined(torch.randn(2, 3, 8, 8))
    del joined
    between(model.model)
    y.sum().backward()
    assert functions(model.model(torch.randn(2, 3, 8, 8))) == 3


class Calling(nn.Module):
    """Calls ``other``, which it does not hold, as another thread may in the meantime."""

    def __init__(self, other):
        super().__init__()
        self.layer, self.others = nn.Linear(1, 1), [other]

    def forward(self, x):
        return self.others[0](x)


def test_a_cut_is_made_where_the_wrapper_holds_the_chain(process_group):
    model, x = resnet_fast.CifarResNet(1).train(), torch.randn(2, 3, 8, 8)
    assert functions(DistributedDataParallel(Calling(model))(x)) == functions(model(x)) == 1
    assert functions(DistributedDataParallel(model)(x)) == functions(model(x)) == 3


def test_no_cut_is_made_in_a_backward(process_group, monkeypatch):
    """A step of another model in another thread: its wrapper is active while this model's checkpoint runs again."""
    model = resnet_fast.CifarResNet(1).train()
    y = checkpoint(model, torch.randn(2, 3, 8, 8), use_reentrant=False)
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", DistributedDataParallel(model))
    y.sum().backward()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_cut_keeps_no_more(process_group, recompute):
    """But for the results of the first two stages, which would be recomputed."""
    backends.training.recompute_outputs = recompute
    model, x = resnet_fast.CifarResNet(1).train(), channels_last(torch.randn(2, 3, 16, 16))
    whole = saved_bytes(model, lambda: model(x))
    joined = DistributedDataParallel(model)
    in_stages = saved_bytes(model, lambda: joined(x))
    first = 2 * 16 * 16 * 16 * x.element_size()
    assert in_stages - whole == (first + first // 2 if recompute else 0)
