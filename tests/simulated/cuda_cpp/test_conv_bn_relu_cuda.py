"""What is true of the convolution in CUDA C++ alone: every instance of its kernel, counters of split sums, plans."""

import pytest
import torch
from helpers.conv_support import assert_exact, exact_sum, plain, whole_case
from helpers.cuda_support import cuda_device
from ptxsim.sim import Fault

from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates.cuda import CudaConfig, candidates, plan, tiles
from resnet_fast.gpu.cuda import conv as cuda_conv
from resnet_fast.gpu.layer import A100, Layer

INSTANCES = [
    (dtype, precision, i)
    for dtype, precision in ((torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"))
    for i, t in enumerate(tiles())
    if not t.simt
] + [(torch.float32, "ieee", i) for i, t in enumerate(tiles()) if t.simt]


@pytest.mark.parametrize(("dtype", "precision", "tile"), INSTANCES, ids=str)
def test_every_instance_gives_exact_integers(monkeypatch, dtype, precision, tile):
    """Whole and split sums, full and short blocks, several orders of warps and blocks: the same bits each time."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "tf32")
    t = tiles()[tile]
    narrow = 36 if t.channels >= 32 else 16  # odd tails of columns in the wide tiles
    channels, kernel, stride = {"halo": (72, 3, 1), "gather": (24, 3, 2), "scalar": (11, 3, 1)}[t.load]
    case = whole_case(3, (9, 8), channels, narrow, kernel, stride, 1, dtype)
    expected = exact_sum(case)
    for seed, (pixels, splits) in enumerate([(t.pixels, 1), (t.pixels, 3), (min(t.pixels, 72), 2), (24, 1)]):
        config = CudaConfig(tile, pixels, splits)
        with cuda_device(seed=seed) as device, tune.use(config):
            assert torch.equal(plain(case), expected), config
        ((name, report),) = device.launches
        assert name == cuda_conv.kernel_name(dtype, tile)
        assert bool(report.mma_flops) is not t.simt
        # Elements stored one by one may meet in a bank; fragments never do.
        assert [r for r in report.conflicts() if t.load != "scalar" or r.kind == "matrix"] == [], config


def test_counters_are_left_at_zero(device):
    """The same ones serve the next launch, of another layer, too: one buffer for all, and none is zeroed in between."""
    cases = [whole_case(2, (9, 8), c, 32, 3, 1, 1, torch.float16) for c in (72, 256)]
    tile = next(i for i, t in enumerate(tiles()) if t.load == "halo" and t.channels == 64)
    with tune.use(CudaConfig(tile, 64, 2)):
        assert_exact(cases[0])
        counters = cuda_conv.counters_of(cases[0].x, 1)
        for case in cases * 2:
            assert not counters.any()
            assert_exact(case)
    assert cuda_conv.counters_of(cases[0].x, counters.numel()) is counters
    assert not counters.any()
    # What goes wrong otherwise: the first block to arrive takes itself for the last.
    counters.fill_(1)
    with tune.use(CudaConfig(tile, 64, 2)), pytest.raises(Fault, match="uninitialised"):
        plain(cases[0])


def test_whose_counters(monkeypatch):
    """Each stream has its own, each capture has its own on each of its streams; more of them replace fewer."""
    at = [(0, 1, 0)]
    monkeypatch.setattr(cuda_conv, "_stream", lambda _: at[0])
    x = torch.zeros(1)
    with cuda_device():
        first = cuda_conv.counters_of(x, 10)
        assert cuda_conv.counters_of(x, first.numel()) is first
        more = cuda_conv.counters_of(x, first.numel() + 1)
        assert more.numel() > first.numel()
        assert cuda_conv.counters_of(x, 1) is more
        assert not more.is_inference()
        seen = [first, more]
        for at[0] in ((0, 2, 0), (1, 1, 0), (0, 1, 7), (0, 2, 7), (0, 1, 8)):
            with torch.inference_mode():
                counters = cuda_conv.counters_of(x, 1)
            assert not counters.is_inference()
            assert all(counters is not other for other in seen)
            assert cuda_conv.counters_of(x, 1) is counters
            seen.append(counters)
        at[0] = (0, 1, 0)
        assert cuda_conv.counters_of(x, 1) is more
        at[0] = (0, 1, 8)  # a capture that was over
        assert all(cuda_conv.counters_of(x, 1) is not other for other in seen)
    with cuda_device():
        at[0] = (0, 1, 0)
        assert cuda_conv.counters_of(x, 1) is not more  # another device behind the launches


@pytest.mark.parametrize(("width", "load"), [(56, "halo"), (4000, "gather")])
def test_wide_images(width, load):
    """A halo is two rows of an image: where shared memory cannot hold it, taps are gathered one by one."""
    layer = Layer(1, 40, width, 64, 64, (3, 3), (1, 1), (1, 1), torch.float16, "ieee", True, True)
    found = candidates(layer, A100)
    assert tiles()[found[0].tile].load == load
    assert all(plan(layer, c).shared <= A100.shared for c in found)
    assert load == "halo" or not any(tiles()[c.tile].load == "halo" for c in found)


def test_rows_that_follow_the_last_slice(device):
    """Images wider than 48 pixels: what the steps of a slice of channels do not copy follows after them."""
    case = whole_case(1, (3, 160), 72, 16, 3, 1, 1, torch.float16)
    halo = [i for i, t in enumerate(tiles()) if t.load == "halo" and not t.simt]
    for tile in halo:
        with tune.use(CudaConfig(tile, 64)):
            assert_exact(case)
    assert len(device.launches) == len(halo)


def test_what_cannot_be_is_refused():
    layer = Layer(1, 8, 8, 16, 16, (3, 3), (2, 2), (1, 1), torch.float16, "ieee", False, True)
    halo = next(i for i, t in enumerate(tiles()) if t.load == "halo")
    assert plan(layer, CudaConfig(halo, 64)) is None  # stride 2
    for config, message in (
        (CudaConfig(99, 64), "tile is 99, want 0 to"),
        (CudaConfig(halo, 0), "tile_pixels is 0, want 1 to 256"),
        (CudaConfig(halo, 64, 0), "splits is 0, want at least 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            plan(layer, config)
