"""What runs, what does not and why: backends.use, status, fallbacks, isa."""

import threading

import pytest
import torch
from helpers.support import integer_case, twins

import resnet_fast
from resnet_fast import backends, blocks, ops, reference


def test_status():
    status = backends.status()
    assert set(status) == {"cpu", "cuda", "triton"}
    bf16 = " with bfloat16 products" if backends.bf16_products() else ""
    assert status["cpu"] == f"loaded, {backends.isa()}{bf16}"
    assert all(isinstance(reason, str) and reason for reason in status.values())
    if not torch.cuda.is_available():
        assert not status["cuda"].startswith("loaded")


def test_isa_is_no_better_than_the_cpu():
    capability = torch.backends.cpu.get_cpu_capability()
    assert backends.isa() in {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(capability, ("baseline",))


@pytest.mark.parametrize("name", ["", "CPU", "cudnn", None, 3])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=r"name is .*want one of auto, eager, cpu, cuda, triton"):  # noqa: SIM117
        with backends.use(name):
            pytest.fail("entered")


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backends_that_cannot_run_say_why(name):
    if backends.status()[name].startswith("loaded"):
        with backends.use(name):
            assert backends.selected() == name
        return
    with pytest.raises(RuntimeError) as error, backends.use(name):
        pytest.fail("entered")
    assert str(error.value) == f"backend '{name}' cannot run: {backends.status()[name]}"


def test_use_nests_and_ends():
    assert backends.selected() == "auto"
    with backends.use("eager"):
        with backends.use("cpu"):
            assert backends.selected() == "cpu"
        assert backends.selected() == "eager"
        with pytest.raises(KeyError), backends.use("auto"):
            raise KeyError
        assert backends.selected() == "eager"
    assert backends.selected() == "auto"


def test_use_is_seen_by_other_threads():
    seen = []
    with backends.use("eager"):
        thread = threading.Thread(target=lambda: seen.append(backends.selected()))
        thread.start()
        thread.join()
    assert seen == ["eager"]


@torch.no_grad()
def test_eager_runs_pytorchs_own_operators():
    fast, eager = twins(blocks.Block, reference.Block, 16, 16, 1)
    x = torch.randn(2, 16, 6, 6)
    with backends.use("eager"):
        assert torch.equal(fast(x), eager(x))
        assert torch.equal(ops.add_relu(x, x), (x + x).relu())
    assert backends.fallbacks() == {"Block: backends.use('eager')": 1, "add_relu: backends.use('eager')": 1}
    case = integer_case(1, 3, (5, 5), 4, 3, 1, 1)
    with backends.use("eager"):
        assert torch.equal(case.fused("conv_bn_add_relu"), case.eager("conv_bn_add_relu"))


@torch.no_grad()
def test_fallbacks_count_and_clear():
    fast = resnet_fast.cifar_resnet20().half().eval()
    assert backends.fallbacks() == {}
    for _ in range(2):
        fast(torch.randn(2, 3, 8, 8).half())
    counts = backends.fallbacks()
    # A stem, three stages and nine blocks, each asked in turn.
    reason = "no kernel for torch.float16"
    assert counts == {f"CifarResNet: {reason}": 2, f"Stage: {reason}": 6, f"BasicBlock: {reason}": 18}
    counts.clear()  # a copy
    assert backends.fallbacks(clear=True)
    assert backends.fallbacks() == {}


@torch.no_grad()
def test_a_forced_backend_raises_instead_of_falling_back():
    block = blocks.Block(4, 4, 1).train().half()
    reason = r"use\('cpu'\): Block cannot run fused: no kernel for torch\.float16"
    with backends.use("cpu"), pytest.raises(RuntimeError, match=reason):
        block(torch.randn(2, 4, 5, 5).half())
    assert backends.fallbacks() == {}
    with backends.use("cpu"), pytest.raises(RuntimeError, match=r"conv_bn cannot run fused: 2 groups"):
        ops.conv_bn(torch.randn(1, 4, 5, 5), torch.randn(4, 2, 3, 3), groups=2)
    with (
        backends.use("cpu"),
        pytest.raises(RuntimeError, match=r"add_relu cannot run fused: no kernel for torch\.float16"),
    ):
        ops.add_relu(torch.ones(3).half(), torch.ones(3).half())


def test_public_names():
    for name in resnet_fast.__all__:
        assert hasattr(resnet_fast, name), name
    assert {"ResNet32", "cifar_resnet32", "resnet50", "backends", "ops", "reference"} <= set(resnet_fast.__all__)
