"""Packed filters refreshed on the simulated device: bits of the host's packing, no store where nothing changed."""

import re

import pytest
import torch
from helpers import triton_gate as gate
from helpers.support import channels_last
from ptxsim.sim import Fault

from resnet_fast._triton import refresh_filters as kernel
from resnet_fast.gpu import residual_network
from resnet_fast.gpu.freshness import FilterFollower, followed, followed_stages
from resnet_fast.gpu.packing import packed, scale_shift
from resnet_fast.gpu.residual_network import Stage

EPS = 1e-5
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALL = ("bias", "gamma", "beta", "mean", "var")
NORM = ALL[1:]


def sources(shape, given=NORM, dtype=torch.float32, layout="contiguous"):
    """Weight and vectors of a layer, of which only ``given`` are there."""
    k = shape[0]
    weight = torch.randn(shape).to(dtype)
    vectors = [torch.rand(k).add(0.5).to(dtype) if name in given else None for name in ALL]
    if layout == "sliced":  # of larger tensors
        whole = torch.zeros(k, shape[1] + 2, *shape[2:], dtype=dtype)
        weight = whole[:, 1:-1].copy_(weight)
        vectors = [None if v is None else torch.stack([v, -v], 1)[:, 0] for v in vectors]
    return [channels_last(weight) if layout == "channels_last" else weight, *vectors]


def host_packed(own, other, dtype, folded, deferred):
    """As the host packs a layer, with the shift of another or without its own."""
    with torch.no_grad():
        scale, shift = scale_shift(own[0], own[1:], EPS if own[5] is not None else 0.0)
        if other:
            shift = shift + scale_shift(other[0], other[1:], 2 * EPS)[1]
        return packed(own[0], scale, torch.zeros_like(shift) if deferred else shift, dtype, folded=folded)


def follower(own, other=(), dtype=torch.float32, folded=False, deferred=False):
    into = host_packed(own, other, dtype, folded, deferred)
    eps = EPS if own[5] is not None else 0.0, 2 * EPS if other else 0.0
    return into, FilterFollower([followed(into, own, other, eps, dtype, folded=folded, deferred=deferred)], dtype)


def change(*tensors):
    """Behind PyTorch's back."""
    for t in tensors:
        if t is not None:
            versions = t._version
            t.data.mul_(1.25)
            assert t._version == versions


CASES = {
    "batch norm": {},
    "a bias": {"given": ALL},
    "a bias alone": {"given": ("bias",)},
    "neither": {"given": ()},
    "statistics alone": {"given": ("mean", "var")},
    "folded": {"folded": True},
    "folded, with a bias": {"folded": True, "given": ALL},
    "its shift added later": {"deferred": True},
    "another's shift added": {"added": True},
    "channels_last": {"layout": "channels_last"},
    "sliced": {"layout": "sliced", "folded": True},
    "half weights": {"source": torch.float16},
    "bfloat16 weights, folded": {"source": torch.bfloat16, "folded": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_the_hosts_packing(simulated_device, case, dtype):
    options = {"given": NORM, "layout": "contiguous", "source": torch.float32} | CASES[case]
    shape, kinds = (5, 3, 3, 2), (options["given"], options["source"], options["layout"])
    own = sources(shape, *kinds)
    other = sources((5, 7, 1, 1), ALL) if options.get("added") else []
    flags = {"folded": options.get("folded", False), "deferred": options.get("deferred", False)}
    into, following = follower(own, other, dtype, **flags)
    before = into.clone()
    for changed in (own, other) if other else (own,):
        change(*changed)
        following.refresh()
        assert torch.equal(into, host_packed(own, other, dtype, **flags))
        assert not torch.equal(into, before)
        before = into.clone()


@pytest.mark.parametrize("changed", range(6), ids=("weight", *ALL))
def test_each_source_is_compared(simulated_device, changed):
    own = sources((300, 16, 3, 3), ALL)  # vectors, too, of more than a sample
    into, following = follower(own)
    change(own[changed])
    following.refresh()
    assert torch.equal(into, host_packed(own, [], torch.float32, False, False))


def test_filters_of_several_tiles(simulated_device):
    own = sources((56, 16, 9, 9))
    into, following = follower(own, dtype=torch.float16)
    assert kernel.tiles(own[0].numel()) == 3
    change(*own)
    following.refresh()
    assert torch.equal(into, host_packed(own, [], torch.float16, False, False))


def written(device):
    """Bytes that the latest launch wrote."""
    return sum(b["written"] for b in device.launches[-1][1].buffers.values())


def test_nothing_is_stored_where_nothing_changed(simulated_device):
    """What is packed is not even touched: marks in its place stay. A change packs its own layer alone."""
    layers = [sources((16, 8, 3, 3)), sources((32, 16, 1, 1))]
    intos = [host_packed(own, [], torch.float32, False, False) for own in layers]
    flags = {"folded": False, "deferred": False}
    pairs = zip(intos, layers, strict=True)
    following = FilterFollower(
        [followed(into, own, (), (EPS, 0.0), torch.float32, **flags) for into, own in pairs], torch.float32
    )
    marks = [into.fill_(7).clone() for into in intos]
    for _ in range(2):
        following.refresh()
        assert all(map(torch.equal, intos, marks))
    fingerprints = 8 * 2  # an atomic operation counts as a write
    assert written(simulated_device) <= fingerprints
    change(layers[1][3])
    following.refresh()
    assert torch.equal(intos[0], marks[0])
    fresh = host_packed(layers[1], [], torch.float32, False, False)
    at = 3 * 32  # padding is not written again
    assert torch.equal(intos[1][at:], fresh[at:])
    following.refresh()
    assert written(simulated_device) <= fingerprints


@pytest.mark.parametrize("channels", [8, 36], ids=["small", "large"])
def test_what_the_sample_holds(simulated_device, channels):
    """All of up to 512 bytes; of more, eight pieces of 64 bytes, the first and the last bytes among them."""
    own = [torch.zeros(channels, 4, 2, 2), *[None] * 5]
    into, following = follower(own)
    flat, filters, seen = own[0].numpy().reshape(-1), into[3 * channels :], set()
    for i in range(3, len(flat), 16):  # one in each piece
        filters.fill_(7)
        flat[i] = 1
        following.refresh()
        if (filters != 7).any():
            seen.add(i // 16)
    pieces = len(flat) // 16
    assert (len(seen), {0, pieces - 1} - seen) == (8, set())
    assert pieces == (8 if channels == 8 else 36)


def test_halves_that_trade_places(simulated_device):
    own = [torch.arange(16.0).reshape(4, 4, 1, 1), *[None] * 5]
    into, following = follower(own)
    weight = own[0].numpy()
    weight[...] = weight[::-1].copy()
    following.refresh()
    assert torch.equal(into, host_packed(own, [], torch.float32, False, False))


def stage_packed(stages, layers, dtype, head):
    filters = []
    for weight, *vectors in layers:
        scale, shift = scale_shift(weight.to(dtype), vectors, EPS)
        filters.append(packed(weight, scale, shift, dtype, folded=False))
    return residual_network.pack(stages, filters, dtype, head)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_head", [False, True], ids=["maps", "scores"])
def test_stages(simulated_device, dtype, with_head):
    """Fragments of a stem, of a stage behind it and of a strided one, in the order of their kernels."""
    stages = [Stage("stem", 16, 32, (0, 1, 2)), Stage("strided", 32, 16, (4, 3, 5))]
    shapes = {layer: shape for s in stages for layer, shape in zip(s.layers, s.weights(), strict=True)}
    layers = [sources((k, c, r, s), NORM if i % 2 else ALL) for i, (k, r, s, c) in sorted(shapes.items())]
    head = (torch.randn(3, 32), torch.randn(3)) if with_head else None
    into = stage_packed(stages, layers, dtype, head)
    before = into.clone()
    filters = followed_stages(into, stages, layers, [EPS] * len(layers), dtype, head)
    following = FilterFollower(filters, dtype)
    change(*(t for own in layers for t in own), *(head or ()))
    following.refresh()
    assert torch.equal(into, stage_packed(stages, layers, dtype, head))
    assert not torch.equal(into, before)


def test_what_is_not_finite(simulated_device):
    stages = [Stage("map", 16, 32, (0,))]
    own = sources((16, 16, 3, 3))
    into = stage_packed(stages, [own], torch.float32, None)
    following = FilterFollower(followed_stages(into, stages, [own], [EPS], torch.float32, None), torch.float32)
    own[0].numpy()[:4, 0, 0, 0] = float("inf"), -float("inf"), float("nan"), 3e38
    following.refresh()
    want = stage_packed(stages, [own], torch.float32, None)
    assert torch.equal(into.nan_to_num(), want.nan_to_num())
    assert torch.equal(into.isnan(), want.isnan())


def test_two_that_follow_the_same(simulated_device):
    """As two kinds of inputs do: the second finds the fingerprint of the first, and stores nothing."""
    own = sources((16, 8, 3, 3))
    into = host_packed(own, [], torch.float32, False, False)
    filters = [followed(into, own, (), (EPS, 0.0), torch.float32, folded=False, deferred=False)]
    first, second = FilterFollower(filters, torch.float32), FilterFollower(filters, torch.float32)
    change(*own)
    first.refresh()
    assert torch.equal(into, host_packed(own, [], torch.float32, False, False))
    into.fill_(7)
    second.refresh()
    assert bool((into == 7).all())


def test_only_what_is_named_can_be_reached(simulated_device):
    """The simulator finds a table whose addresses nobody holds."""
    own = sources((8, 8, 3, 3))
    _, following = follower(own)
    following._reaches = following._reaches[1:]
    with pytest.raises(Fault, match="out-of-bounds"):
        following.refresh()


def test_no_local_memory_and_enough_blocks():
    """On every architecture: comparing must not wait for a multiprocessor."""
    for arch in gate.ARCHS:
        ((launched, args, meta),) = gate.launches(
            kernel.refresh_filters,
            torch.zeros(1, 99, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            torch.float16,
            (),
        )
        sass = gate.inspect_launch(launched, args, meta, arch)
        assert sass.spills == 0
        assert sass.blocks_per_sm >= 4
        # A tile is stored before its fingerprint is released; samples go through no shared memory but to be summed.
        release = sass.ptx.index(".release.")
        assert "bar.sync" in sass.ptx[sass.ptx.rindex("st.global", 0, release) : release]
        assert sass.ptx.count("st.shared") <= 2
        # Sources, unlike the table's 64-bit words, are read past the multiprocessor's own cache.
        loads = set(re.findall(r"ld\.global\S*", sass.ptx))
        assert loads == {"ld.global.b64", "ld.global.cg.b16", "ld.global.cg.b32"}
