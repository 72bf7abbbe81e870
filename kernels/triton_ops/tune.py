"""Which kernel runs a layer on this GPU: measured once for each shape, kept on disk.

The candidates are the tiles of :mod:`.configs` (Triton), those of :mod:`.cuda_configs` (CUDA C++) where the extension
holds them, and PyTorch's own convolution followed by one fused pass, so that a fused layer is never slower than an
unfused one, to the accuracy of the measurement. ``backends.use("cuda")`` and ``backends.use("triton")`` leave one kind
of them; a choice among those is kept apart. Choices are written to
``$RESNET_FAST_CACHE/gpu-<name>-<versions>.json`` (default ``~/.cache/resnet_fast``): later processes run the same
kernels and so give the same bits. ``RESNET_FAST_TUNE=0`` measures nothing and takes what the model of :mod:`.configs`
expects.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from resnet_fast import backends, launch

from . import configs, cuda_configs
from .configs import A100, Config, Gpu, Layer
from .cuda_configs import CudaConfig

__all__ = ["Tuner", "choices", "gpu_of", "tuner", "use"]

LIBRARY = "library"
# How a chain of convolutions runs: a stage of it a launch, or a convolution a launch.
FORMS = ("stages", "layers")
Choice = Config | CudaConfig | str
# A faster tile must win by this much over an earlier candidate: the lists have the model's favourite first, and noise
# should not decide.
_MARGIN = 0.02

_forced: Choice | None = None


@contextlib.contextmanager
def use(choice: Choice) -> Iterator[None]:
    """Within the block every convolution runs with ``choice``, a configuration or ``"library"``, unmeasured."""
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def gpu_of(device: torch.device) -> Gpu:
    """What decides about tiles; an A100 behind the simulator, which executes code for it."""
    if launch.is_simulated():
        return A100
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
    return Gpu(10 * properties.major + properties.minor, properties.multi_processor_count, shared)


def cache_file(name: str) -> Path:
    """Choices depend on the GPU and on who compiles and who is compared with."""
    folder = os.environ.get("RESNET_FAST_CACHE") or Path.home() / ".cache" / "resnet_fast"
    versions = f"torch{torch.__version__}-triton{triton.__version__}"
    return Path(folder) / f"gpu-{re.sub(r'[^A-Za-z0-9.+-]+', '_', f'{name}-{versions}')}.json"


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median over at least 10 ms of runs, each after the caches of ``device`` were overwritten.

    Events are recorded on the current device's stream: it is made current, whichever the caller works on.
    """
    with torch.cuda.device(device):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(2 * cache, dtype=torch.int8, device=device)
        call()
        samples: list[float] = []
        while sum(samples) < 10e-3 and len(samples) < 100:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            call()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) * 1e-3)
        return statistics.median(samples)


def candidates(layer: Layer, gpu: Gpu, backend: str = "auto") -> list[Choice]:
    """What is measured: all of ``backend``'s kernels that are worth it, and the library where none was named."""
    found: list[Choice] = []
    if backend != "cuda":
        found += configs.candidates(layer, gpu)
    if backend != "triton" and layer.role == "conv_bn_relu" and backends.has_cuda_convolution():
        found += cuda_configs.candidates(layer, gpu)
    return found if backend in ("cuda", "triton") else [*found, LIBRARY]


def default(layer: Layer, gpu: Gpu, backend: str = "auto") -> Choice:
    """What runs where nothing may be measured: inside a CUDA graph's capture, or with tuning switched off."""
    return cuda_configs.default(layer, gpu) if backend == "cuda" else configs.default(layer, gpu)


class Tuner:
    """Choices for one GPU. ``measure``: seconds of a call; None to take the model's word."""

    def __init__(self, gpu: Gpu, file: Path | None, measure: Callable[[Callable[[], object]], float] | None) -> None:
        self.gpu, self.file, self.measure = gpu, file, measure
        self.chosen: dict[tuple[Layer | str, str], Choice] = {}
        self.seconds: dict[str, dict[str, float]] = {}
        self._stored = self._load()

    def choose(self, layer: Layer, run: Callable[[Choice], object], backend: str = "auto") -> Choice:
        """The choice for ``layer``; ``run(choice)`` computes it once, for the measurement.

        backend: ``"cuda"`` or ``"triton"`` where it was named, otherwise all take part.
        """
        if _forced is not None:
            return _forced
        fallback = functools.partial(default, layer, self.gpu, backend)
        return self._choose(layer, backend, lambda: candidates(layer, self.gpu, backend), fallback, run)

    def choose_form(self, chain: str, forms: dict[str, Callable[[], object]], backend: str = "auto") -> str:
        """Which of :data:`FORMS` runs the chain of convolutions ``chain``; the first where none is measured."""
        found = self._choose(chain, backend, lambda: list(forms), lambda: next(iter(forms)), lambda form: forms[form]())
        assert isinstance(found, str)
        return found

    def _choose(
        self,
        what: Layer | str,
        backend: str,
        among: Callable[[], list[Any]],
        unmeasured: Callable[[], Choice],
        run: Callable[[Any], object],
    ) -> Choice:
        choice = self.chosen.get((what, backend))
        if choice is None:
            key = _key(what, backend)
            choice = self._stored.get(key)
            if choice is None:
                if self.measure is None or _capturing():
                    return unmeasured()  # not kept: a later call may measure
                choice = self._measure(key, among(), run)
                # Another process may have been first.
                choice = self._stored.get(key, choice)
            self.chosen[what, backend] = choice
        return choice

    def _measure(self, key: str, among: list[Choice], run: Callable[[Choice], object]) -> Choice:
        assert self.measure is not None
        times: dict[Choice, float] = {}
        for candidate in among:
            try:
                times[candidate] = self.measure(lambda c=candidate: run(c))  # type: ignore[misc]
            except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError) as error:
                warnings.warn(f"resnet_fast: {candidate} does not run on this GPU: {error}", stacklevel=2)
        best = next(iter(times))
        for candidate, seconds in times.items():
            if seconds < times[best] * (1 - _MARGIN):
                best = candidate
        self.seconds[key] = {str(c): s for c, s in times.items()}
        self._store(key, best)
        return best

    def _load(self) -> dict[str, Choice]:
        if self.file is None or not self.file.exists():
            return {}
        try:
            return {k: _parse(v) for k, v in json.loads(self.file.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            warnings.warn(f"resnet_fast: {self.file} is not readable and is measured anew: {error}", stacklevel=2)
            return {}

    def _store(self, key: str, choice: Choice) -> None:
        """Adds an entry to the file. Others may write it meanwhile: it is read again and replaced as a whole."""
        self._stored[key] = choice
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # What another process found first stays, so that both run the same from then on.
            self._stored = {**self._stored, **self._load()}
            entries = {k: c if isinstance(c, str) else dataclasses.asdict(c) for k, c in self._stored.items()}
            handle, partial = tempfile.mkstemp(dir=self.file.parent, prefix=self.file.name)
            with open(handle, "w") as out:
                json.dump(entries, out, indent=1, sort_keys=True)
            os.replace(partial, self.file)
        except OSError as error:
            warnings.warn(f"resnet_fast: measured choices cannot be kept in {self.file}: {error}", stacklevel=2)


def _key(what: Layer | str, backend: str) -> str:
    text = what if isinstance(what, str) else " ".join(str(v) for v in dataclasses.astuple(what)).replace("torch.", "")
    return text if backend == "auto" else f"{backend}: {text}"


def _parse(entry: str | dict[str, int]) -> Choice:
    if isinstance(entry, str):
        if entry not in (LIBRARY, *FORMS):
            raise ValueError(f"unknown choice {entry!r}")
        return entry
    return CudaConfig(**entry) if "tile" in entry else Config(**entry)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_tuners: dict[tuple[bool, int | None], Tuner] = {}


def tuner(device: torch.device) -> Tuner:
    """The tuner of ``device``."""
    key = (launch.is_simulated(), device.index)
    if key not in _tuners:
        if launch.is_simulated():
            _tuners[key] = Tuner(gpu_of(device), None, None)
        else:
            measured = os.environ.get("RESNET_FAST_TUNE", "1") != "0"
            file = cache_file(torch.cuda.get_device_name(device))
            measure = functools.partial(_seconds, device=device) if measured else None
            _tuners[key] = Tuner(gpu_of(device), file, measure)
    return _tuners[key]


def choices() -> dict[Layer | str, tuple[Choice, dict[str, float]]]:
    """What runs each layer that this process has met, on any GPU, and the seconds of all that were measured for it.

    Chains of layers that could run a stage a launch stand beside them, by name.
    Where the choice was read from the file there are none.
    """
    return {
        layer: (choice, t.seconds.get(_key(layer, backend), {}))
        for t in _tuners.values()
        for (layer, backend), choice in t.chosen.items()
    }
