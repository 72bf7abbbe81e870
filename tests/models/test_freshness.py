"""Packed weights follow the module: whatever is done to it between two calls, the second call shows it."""

import copy
import io
import pickle
import threading

import pytest
import torch
from helpers.changes import FUSED_AFTERWARDS, UNFUSED_AFTERWARDS, check, fill, fresh_conv, pair_of_blocks
from helpers.support import assert_same_model, channels_last, rms, twins
from torch import nn

import resnet_fast
from resnet_fast import backends, blocks, reference


@pytest.mark.parametrize("name", FUSED_AFTERWARDS)
@torch.no_grad()
def test_changes_that_leave_it_fused(name):
    fast, eager = pair_of_blocks()
    x = torch.randn(2, 16, 7, 7)
    fast.train().eval()
    check(fast, eager, FUSED_AFTERWARDS[name], x)
    backends.fallbacks(clear=True)
    with backends.use("cpu"):
        assert_same_model(fast, eager, x)
    assert backends.fallbacks() == {}


@pytest.mark.parametrize("name", UNFUSED_AFTERWARDS)
@torch.no_grad()
def test_changes_that_end_the_fusion(name):
    """The eager code itself runs then, and backends say why."""
    fast, eager = pair_of_blocks(dropout=0.5)
    x = torch.randn(2, 16, 7, 7)
    change, reason = UNFUSED_AFTERWARDS[name]
    after = check(fast, eager, change, x)
    torch.manual_seed(0)
    assert torch.equal(after, eager(x))
    assert [key for key in backends.fallbacks() if key.startswith("Block: ") and reason in key], backends.fallbacks()
    with backends.use("cpu"), pytest.raises(RuntimeError, match=r"backends.use\('cpu'\): Block cannot run fused"):
        fast(x)


@torch.no_grad()
def test_dropout_that_goes_on_follows_the_fused_block():
    fast, _ = pair_of_blocks(dropout=0.5)
    x = torch.randn(2, 16, 7, 7)
    before = fast(x)
    fast.dropout.train()
    with backends.use("cpu"):
        after = fast(x)
    assert torch.equal(after, torch.where(after == 0, 0, 2 * before))
    assert not torch.equal(after == 0, before == 0)


@torch.no_grad()
def test_hook_on_a_child_ends_with_its_removal():
    fast, eager = pair_of_blocks()
    x, seen = torch.randn(2, 16, 7, 7), []
    handle = fast.conv2.register_forward_hook(lambda *_: seen.append(1))
    fast(x)
    assert seen == [1]
    handle.remove()
    with backends.use("cpu"):
        assert_same_model(fast, eager, x)
    assert seen == [1]


@torch.no_grad()
def test_hook_on_the_block_itself_leaves_it_fused():
    fast, eager = pair_of_blocks()
    x, seen = torch.randn(2, 16, 7, 7), []
    fast.register_forward_hook(lambda *_: seen.append(1))
    with backends.use("cpu"):
        assert_same_model(fast, eager, x)
    assert seen == [1]


def small_model():
    return twins(resnet_fast.cifar_resnet20, reference.cifar_resnet20)


@torch.no_grad()
def test_hook_inside_a_stage_lets_the_other_blocks_run_fused():
    fast, eager = small_model()
    x, seen = torch.randn(2, 3, 16, 16), []
    fast(x)
    fast.layer2[1].register_forward_hook(lambda *_: seen.append(1))
    backends.fallbacks(clear=True)
    assert_same_model(fast, eager, x, "features")
    assert seen == [1]
    assert backends.fallbacks() == {"Stage: a hook on a BasicBlock": 1}


@torch.no_grad()
def test_global_hooks_see_every_module():
    fast, _ = small_model()
    seen = []
    fast(torch.randn(1, 3, 16, 16))
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        fast(torch.randn(1, 3, 16, 16))
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) == 21


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.layer1.append(nn.Identity()),
        lambda m: m.layer2.insert(1, nn.Hardtanh(-0.1, 0.1)),
        lambda m: m.layer3.__setitem__(1, nn.Sequential(fresh_conv(64, 64, 1), nn.ReLU())),
        lambda m: m.layer1.__delitem__(1),
        lambda m: setattr(m, "layer1", nn.Identity()),
        lambda m: setattr(m, "bn1", nn.Identity()),
        lambda m: setattr(m, "relu", nn.Hardtanh(-0.1, 0.1)),
        lambda m: setattr(m, "conv1", nn.Sequential(fresh_conv(3, 16, 3, padding=1))),
    ],
)
@torch.no_grad()
def test_a_network_taken_apart(change):
    fast, eager = small_model()
    x = torch.randn(2, 3, 16, 16)
    fast(x)
    change(fast)
    change(eager)
    assert_same_model(fast, eager, x, "features")


class Halved(blocks.BasicBlock):
    def forward(self, x):
        return super().forward(x) * 0.5


class HalvedReference(reference.BasicBlock):
    def forward(self, x):
        return super().forward(x) * 0.5


@torch.no_grad()
def test_a_subclass_with_a_forward_of_its_own_keeps_it():
    fast, eager = small_model()
    fast.layer1[0], eager.layer1[0] = Halved(16, 16).eval(), HalvedReference(16, 16).eval()
    eager.load_state_dict(fast.state_dict())
    assert_same_model(fast, eager, torch.randn(2, 3, 16, 16), "features")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_to_another_dtype_and_back(dtype):
    fast, eager = pair_of_blocks()
    x = torch.randn(2, 16, 7, 7)
    for m in (fast, eager):
        m.to(dtype)
    fast(x.to(dtype))
    if dtype == torch.bfloat16:
        assert_same_model(fast, eager, x.to(dtype))
    for _ in range(5):
        for m in (fast, eager):
            m.conv1.weight.mul_(1.01)
            m.float()
        with backends.use("cpu"):
            assert_same_model(fast, eager, x)
        for m in (fast, eager):
            m.to(dtype)


@pytest.mark.parametrize("times", [1, 2, 3])
@torch.no_grad()
def test_rounding_through_bfloat16_without_a_call_between(times):
    """The weights lie in new memory, perhaps in the old place, and PyTorch counts no change."""
    for _ in range(10):
        fast, eager = small_model()
        x = torch.randn(1, 3, 16, 16)
        fast(x)
        for m in (fast, eager):
            for _ in range(times):
                m.bfloat16().float()
        assert_same_model(fast, eager, x, "features")


@torch.no_grad()
def test_one_weight_replaced_many_times():
    x = torch.randn(1, 3, 64, 64)
    for _ in range(20):
        fast = resnet_fast.ResNet32(image_size=64).eval()
        fast.stem(x)
        for _ in range(2):
            fast.conv1.weight.data = fast.conv1.weight.data * 2
        expected = fast.conv1(x)
        assert rms((fast.stem(x) - expected).numpy()) <= 1e-5 * rms(expected.numpy())


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch_round_trip(m)],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
@torch.no_grad()
def test_copies(duplicate):
    fast, eager = small_model()
    x = torch.randn(2, 3, 16, 16)
    first = fast(x)
    other = duplicate(fast)
    assert torch.equal(other(x), first)
    if duplicate is not copy.copy:
        other.conv1.weight.zero_()
        other.layer1[0].conv1.weight.zero_()
        assert not torch.equal(other(x), first)
        assert torch.equal(fast(x), first)
        assert_same_model(fast, eager, x, "features")


def torch_round_trip(m):
    file = io.BytesIO()
    torch.save(m, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def test_pickles_do_not_carry_packed_filters():
    fast, _ = small_model()
    before = len(pickle.dumps(fast))
    with torch.no_grad():
        fast(torch.randn(2, 3, 16, 16))
    assert len(pickle.dumps(fast)) == before


@torch.no_grad()
def test_train_and_eval():
    fast, eager = small_model()
    x = torch.randn(4, 3, 16, 16)
    for _ in range(2):
        for m in (fast, eager):
            m.train()
            m(x)
            m.eval()
        assert_same_model(fast, eager, x, "features")
    # One part in training mode: it takes the statistics of its batch, the rest does not.
    for m in (fast, eager):
        m.layer2.train()
    with backends.use("cpu"):
        assert_same_model(fast, eager, x, "features")


@torch.no_grad()
def test_sync_batch_norm():
    fast, eager = small_model()
    x = torch.randn(2, 3, 16, 16)
    fast(x)
    fast, eager = nn.SyncBatchNorm.convert_sync_batchnorm(fast), nn.SyncBatchNorm.convert_sync_batchnorm(eager)
    with backends.use("cpu"):
        assert torch.allclose(fast(x), eager(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_functional_call():
    fast, eager = small_model()
    x = torch.randn(2, 3, 16, 16)
    first = fast(x)
    other = {k: v * (1 + fill(v)) for k, v in eager.named_parameters()}
    out = torch.func.functional_call(fast, other, (x,))
    exact = copy.deepcopy(eager)
    exact.load_state_dict(other, strict=False)
    eager_error = exact(channels_last(x)) - exact(x)
    assert rms((out - exact(x)).numpy()) <= 20 * rms(eager_error.numpy()) + 1e-5 * rms(out.numpy())
    assert torch.equal(fast(x), first)


def test_functional_call_gives_gradients():
    """To what was passed in, be it a parameter, a plain tensor or the result of something."""
    fast, eager = pair_of_blocks()
    x = torch.randn(2, 16, 7, 7)
    for requires_grad in (True, False):
        results = []
        for m in (fast.requires_grad_(requires_grad), eager):
            scale = torch.ones((), requires_grad=True)
            leaves = {k: v.detach().clone().requires_grad_() for k, v in m.named_parameters()}
            tensors = {k: v * scale for k, v in leaves.items()}
            m(x)
            torch.func.functional_call(m, tensors, (x,)).square().mean().backward()
            results.append([scale.grad, *(t.grad for t in leaves.values())])
        for ours, theirs in zip(*results, strict=True):
            # The same eager backward; the output that the loss squares differs by some eps (2^-23).
            assert rms((ours - theirs).numpy()) <= 1e-5 * rms(theirs.numpy())


def test_vmap_and_func_grad():
    fast, eager = pair_of_blocks()
    x = torch.randn(3, 2, 16, 7, 7)
    with torch.no_grad():
        fast(x[0])
        assert torch.allclose(torch.vmap(fast)(x), torch.vmap(eager)(x))
    assert any("torch.func transform" in key for key in backends.fallbacks())
    params = {k: v.detach() for k, v in eager.named_parameters()}

    def loss(model):
        return lambda p, x: torch.func.functional_call(model, p, (x,)).square().mean()

    ours, theirs = (torch.func.grad(loss(m))(params, x[0]) for m in (fast, eager))
    assert all(torch.equal(ours[k], theirs[k]) for k in params)


def test_inference_mode():
    """Weights made in it: tests/models/test_inference_weights.py."""
    fast, _ = pair_of_blocks()
    x = torch.randn(2, 16, 7, 7)
    with torch.inference_mode(), backends.use("cpu"):
        first = fast(x)
    with torch.no_grad():
        assert torch.equal(fast(x), first)
    y = fast(x)  # whose gradient is wanted: rounded elsewhere
    assert torch.allclose(y, first, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert fast.conv1.weight.grad is not None


def test_freezing_after_the_first_call():
    """Filters packed while gradients were wanted must not ask for them later."""
    fast, _ = pair_of_blocks()
    x = torch.randn(2, 16, 7, 7)
    assert fast(x).requires_grad
    fast.requires_grad_(False)
    assert not fast(x).requires_grad
    fast.requires_grad_(True)
    assert fast(x).requires_grad


@torch.no_grad()
def test_swapped_tensors():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        fast, eager = pair_of_blocks()
        x = torch.randn(2, 16, 7, 7)
        fast(x)
        for m in (fast, eager):
            m.bfloat16().float()
        assert_same_model(fast, eager, x)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@torch.no_grad()
def test_edits_between_the_calls_of_two_threads():
    """Each thread edits its own block and calls a shared one."""
    shared, shared_eager = pair_of_blocks()
    x = torch.randn(2, 16, 7, 7)
    expected, failures = shared(x), []

    @torch.no_grad()
    def work(seed):
        own, eager = twins(blocks.Block, reference.Block, 16, 16, 1, seed=seed)
        for i in range(20):
            for m in (own, eager):
                m.conv1.weight.mul_(1.1 if i % 2 else 0.8)
            if not torch.allclose(own(x), eager(x), rtol=1e-3, atol=1e-4) or not torch.equal(shared(x), expected):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []
    assert_same_model(shared, shared_eager, x)
