"""Every family of kernels once, on small shapes, for compute-sanitizer: ``python -m benchmarks.kit.families``.

A family is a function of the device; it computes by our kernels and by PyTorch in float32, and both must be close: a
sanitizer looks at accesses, not at numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast import backends, blocks, ops, reference

from .options import Options

__all__ = ["FAMILIES", "main"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# batch, channels, size, filters, kernel, stride, padding: halo, gather, projection, stem, odd, split sums, 1x1.
SHAPES = [
    (2, 64, (9, 7), 64, 3, 1, 1),
    (1, 32, (11, 6), 48, 3, 2, 1),
    (3, 48, (5, 5), 17, 1, 2, 0),
    (1, 3, (13, 10), 64, 7, 2, 3),
    (2, 20, (6, 7), 24, 3, 1, 1),
    (1, 128, (7, 7), 128, 3, 1, 1),
    (2, 136, (9, 7), 72, 1, 2, 0),
]


def _close(ours: Tensor, exact: Tensor, what: str) -> None:
    """Within what 8 bits of mantissa and sums of a thousand products leave: a wrong kernel is not near it."""
    error = (ours.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-12)
    if not error <= 0.05:
        raise AssertionError(f"{what} is {error.item():.3g} from PyTorch, relative")


def _last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def _allow_tf32(allow: bool) -> Iterator[None]:
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, allow
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def add_relu(device: str, small: bool) -> None:
    for dtype in DTYPES:
        for shape in ((3, 5, 7, 11), (2, 64, 8, 8)):
            a, b = (_last(torch.randn(shape, device=device).to(dtype)) for _ in range(2))
            _close(ops.add_relu(a, b), F.relu(a.float() + b.float()), f"add_relu {shape} {dtype}")


def _convolutions(device: str, small: bool, kind: str, dtype: torch.dtype) -> None:
    """Tiles that suit a shape, with whole and with split sums: all in CUDA C++, of Triton's, which are compiled first,
    two."""
    from resnet_fast.gpu import tune
    from resnet_fast.gpu.candidates import triton as configs
    from resnet_fast.gpu.layer import Layer, gpu_of

    gpu = gpu_of(torch.device(device, 0) if device == "cuda" else torch.device(device))
    for n, c, size, k, kernel, stride, padding in SHAPES[:1] if small else SHAPES:
        x = _last(torch.randn(n, c, *size, device=device).to(dtype))
        weight = (torch.randn(k, c, kernel, kernel, device=device) / (c * kernel**2) ** 0.5).to(dtype)
        z = F.conv2d(x.float(), weight.float(), stride=stride, padding=padding)
        residual = _last(torch.randn_like(z).to(dtype))
        exact = F.relu(z + residual.float())
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
            window, steps, edges = (kernel, kernel), (stride, stride), (padding, padding)
            layer = Layer(n, *size, c, k, window, steps, edges, dtype, precision, True, True)
            choices: list[Any] = [tune.LIBRARY]
            if kind == "triton":
                found = list(configs.tiles(layer, gpu))
                choices = [dataclasses.replace(found[0], split_k=3), *found[:2]]
            elif kind == "cuda":
                choices = _cuda_choices(layer, gpu)
            for choice in choices[:2] if small else choices:
                with _allow_tf32(precision == "tf32"), tune.use(choice):
                    y = ops.conv_bn_add_relu(x, residual, weight, stride=stride, padding=padding)
                _close(y, exact, f"{choice} {layer}")


def _cuda_choices(layer: Any, gpu: Any) -> list[Any]:
    from resnet_fast.gpu.candidates import conv1x1, hopper
    from resnet_fast.gpu.candidates import cuda as cuda_configs

    simt = layer.dtype == torch.float32 and layer.precision == "ieee"
    found: list[Any] = []
    for i, tile in enumerate(cuda_configs.tiles()):
        for splits in (1, 3):
            config = cuda_configs.CudaConfig(i, min(tile.pixels, 64), splits)
            made = cuda_configs.plan(layer, config) if tile.simt == simt else None
            if made is not None and made.shared <= gpu.shared:
                found.append(config)
    return [*found, *hopper.candidates(layer, gpu), *conv1x1.candidates(layer, gpu)]


def _conv_family(kind: str, dtype: torch.dtype) -> Callable[[str, bool], None]:
    def run(device: str, small: bool) -> None:
        if kind == "cuda" and not backends.has_cuda_convolution():
            raise RuntimeError("the extension holds no CUDA C++ kernels: it was built without nvcc")
        _convolutions(device, small, kind, dtype)

    return run


def _network(device: str, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    torch.manual_seed(1)
    for dtype in dtypes:
        fast = getattr(resnet_fast, name)().to(device).eval()
        twin = getattr(reference, name)().to(device).eval()
        twin.load_state_dict(fast.state_dict())
        x = _last(torch.randn(shape, device=device))
        with torch.no_grad():
            ours, exact = fast.to(dtype).features(x.to(dtype)), twin.features(x)
            fast(x.to(dtype))
        _close(ours, exact, f"{name} {shape} {dtype}")


def stages(device: str, small: bool) -> None:
    """A stage a launch: images that share a block, blocks that are not full."""
    for batch in (2,) if small else (3, 140, 301):
        _network(device, "cifar_resnet20", (batch, 3, 32, 32), DTYPES[:1] if small else DTYPES)


def chains(device: str, small: bool) -> None:
    """A convolution a launch, stems with pooling behind, projections, bottlenecks."""
    for name in ("resnet18",) if small else ("resnet18", "resnet50"):
        _network(device, name, (1, 3, 33, 40) if small else (2, 3, 65, 80), DTYPES[:1] if small else DTYPES)


def pooled_stems(device: str, small: bool) -> None:
    """7x7 convolutions of three channels with max pooling behind, of 2 x 2 and of 3 x 3 that overlap; odd sizes."""
    for name in ("resnet18", "ResNet32"):
        torch.manual_seed(1)
        fast, twin = (getattr(m, name)().to(device).eval() for m in (resnet_fast, reference))
        twin.load_state_dict(fast.state_dict())
        for shape in ((1, 3, 21, 18),) if small else ((1, 3, 21, 18), (3, 3, 64, 75), (2, 3, 96, 224)):
            x = _last(torch.randn(shape, device=device))
            for dtype in DTYPES[:1] if small else DTYPES:
                with torch.no_grad():
                    _close(
                        fast.to(dtype).pooled_stem(x.to(dtype)),
                        twin.pooled_stem(x),
                        f"pooled stem of {name}, {shape} {dtype}",
                    )


def training(device: str, small: bool) -> None:
    """Forward and backward of blocks: statistics, both gradients, 1x1 projections with stride 2, all tiles' default and
    the library's convolutions between our kernels."""
    from resnet_fast.gpu import tune

    kinds = [("BasicBlock", 32, 32, 1), ("BasicBlock", 16, 32, 2), ("Bottleneck", 32, 16, 2), ("Block", 20, 33, 2)]
    for dtype in DTYPES[:1] if small else DTYPES:
        for kind, channels, planes, stride in kinds[1:2] if small else kinds:
            torch.manual_seed(2)
            fast = getattr(blocks, kind)(channels, planes, stride).to(device).train()
            twin = getattr(reference, kind)(channels, planes, stride).to(device).train()
            twin.load_state_dict(fast.state_dict())
            x = _last(torch.randn(3, channels, 12, 10, device=device))
            found = []
            forms = (contextlib.nullcontext(), tune.use(tune.LIBRARY), None)
            for form in forms[:1] + forms[2:] if small else forms:
                m: nn.Module = twin if form is None else fast.to(dtype)
                own = x.detach().to(torch.float32 if form is None else dtype).requires_grad_()
                m.zero_grad()
                with form or contextlib.nullcontext():
                    y = m(own)
                    (y.float() * torch.linspace(-1, 1, y[0].numel(), device=device).view(y.shape[1:])).sum().backward()
                assert own.grad is not None
                found.append((y.detach(), own.grad))
            for y, dx in found[:-1]:
                _close(y, found[-1][0], f"{kind} {dtype}, output")
                # Where rounding turns a sign that ReLU sees, single elements jump.
                if not (dx.double() - found[-1][1].double()).norm() <= 0.3 * found[-1][1].double().norm():
                    raise AssertionError(f"{kind} {dtype}: the input's gradient is not near PyTorch's")


def steps(device: str, small: bool, count: int = 3, batch: int = 16) -> None:
    """Steps of training of a whole network; says how far it has come."""
    torch.manual_seed(3)
    model = (resnet_fast.CifarResNet(1) if small else resnet_fast.cifar_resnet32()).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batch, side = (2, 12) if small else (batch, 32)
    x = _last(torch.randn(batch, 3, side, side, device=device))
    target = torch.arange(batch, device=device) % 10
    for i in range(count):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=i % 4 != 3):
            scores = model(x)
        loss = F.cross_entropy(scores.float(), target)
        loss.backward()
        optimizer.step()
        if i % 10 == 9 or i + 1 == count:
            if not loss.isfinite().item():
                raise AssertionError(f"the loss of step {i} is {loss.item()}")
            print(f"steps: {i + 1}", flush=True)


FAMILIES: dict[str, Callable[..., None]] = {
    **{
        f"conv_{kind}_{str(dtype).removeprefix('torch.')}": _conv_family(kind, dtype)
        for kind in ("triton", "cuda", "library")
        for dtype in DTYPES
    },
    **{f.__name__: f for f in (add_relu, stages, chains, pooled_stems, training, steps)},
}


def main(path: str, *families: str) -> None:
    """Runs ``families``, of which ``steps=N`` takes a number."""
    options = Options.load(path)
    surroundings: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if options.simulated:
        from .rehearsal import rehearsal

        surroundings = rehearsal()
    with surroundings:
        for family in families:
            name, *count = family.split("=")
            FAMILIES[name](options.device, options.simulated, *map(int, count))
        if options.device == "cuda":
            torch.cuda.synchronize()
    if found := backends.fallbacks():
        raise RuntimeError(f"resnet_fast ran in part unfused: {found}")
    print(f"{', '.join(families)}: as PyTorch computes it", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
