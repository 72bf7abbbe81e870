"""Chooses the kernel that runs a layer on this GPU: measured once for each shape, cached on disk.

The candidates are the tiles of :mod:`.candidates.triton`, and of :mod:`.candidates.cuda`, :mod:`.candidates.hopper` and
:mod:`.candidates.conv1x1` if the extension holds them, cuDNN and cuBLASLt (:mod:`.library`) if filters may be folded,
and aten's convolution followed by one fused pass: to the accuracy of the measurement (:mod:`.timing`) a fused layer is
never slower than an unfused one. ``backends.use("cuda")`` and ``backends.use("triton")`` restrict the candidates to one
kind, and cache choices of their own.

Choices are cached in ``$RESNET_FAST_CACHE/gpu-<name>-<versions>.json`` (default ``~/.cache/resnet_fast``), so that
later processes run the same kernels and give the same bits. Choices of :mod:`.shipped` are not measured again.
``RESNET_FAST_TUNE=0`` measures nothing and takes the first by the cost model of :mod:`.candidates.triton`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import backends
from ..backends import launch
from . import library, shipped, timing
from .candidates import conv1x1 as conv1x1_configs
from .candidates import cuda as cuda_configs
from .candidates import hopper as hopper_configs
from .candidates import hopper_training as training_configs
from .candidates import triton as configs
from .candidates import weight_gradient as gradient_configs
from .candidates.conv1x1 import Conv1x1Config
from .candidates.cuda import CudaConfig
from .candidates.hopper import HopperConfig
from .candidates.hopper_training import TrainingConfig
from .candidates.triton import Config
from .candidates.weight_gradient import GradientConfig
from .layer import Gpu, Layer, gpu_of

__all__ = ["Tuner", "choices", "tuner", "use"]

LIBRARY = "library"  # aten's convolution, followed by one fused pass
# Forms of a chain: one launch a stage, one launch for a convolution and its pooling, one launch a convolution.
STAGES, POOLED, LAYERS = "stages", "pooled", "layers"
Choice = Config | CudaConfig | HopperConfig | Conv1x1Config | TrainingConfig | GradientConfig | str
Run = Callable[[Any], object]
# Returns seconds a call of each candidate, and the exceptions of those that cannot run here.
Measure = Callable[[Mapping[Any, Sequence[Callable[[], object]]]], tuple[dict[Any, float], dict[Any, Exception]]]
# Configurations by the field that the entries of a cache file have of none of the others; Triton's have neither.
_KINDS: dict[str, Any] = {
    "tile": CudaConfig,
    "halo": HopperConfig,
    "conv1x1": Conv1x1Config,
    "training": TrainingConfig,
    "gradient": GradientConfig,
}
_LIBRARIES = (library.CUDNN, library.CUBLASLT)
# A candidate must be faster than an earlier one by this much: the model's favourite is first, and noise should not
# decide.
_MARGIN = 0.01

_forced: Choice | None = None


def forced() -> Choice | None:
    """The choice of :func:`use`, None outside of it."""
    return _forced


@contextlib.contextmanager
def use(choice: Choice) -> Iterator[None]:
    """Context manager: every convolution runs by ``choice``, a configuration or ``"library"``, unmeasured."""
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def cache_file(name: str) -> Path:
    """The cache file: choices depend on the GPU, on the versions of PyTorch and Triton, and on the lists of tiles."""
    folder = os.environ.get("RESNET_FAST_CACHE") or Path.home() / ".cache" / "resnet_fast"
    versions = f"torch{torch.__version__}-triton{backends.triton_version()}-kernels{shipped.kernels()}"
    return Path(folder) / f"gpu-{re.sub(r'[^A-Za-z0-9.+-]+', '_', f'{name}-{versions}')}.json"


def _measured(device: torch.device) -> Measure:
    refusals: tuple[type[Exception], ...] = (RuntimeError,)
    if backends.has_triton():
        from triton.runtime import errors

        refusals += (errors.OutOfResources, errors.PTXASError)
    return functools.partial(timing.interleaved, device=device, errors=refusals)


def candidates(layer: Layer, gpu: Gpu, backend: str = "auto") -> list[Choice]:
    """The kernels of ``backend`` that are worth measuring, and with "auto" those of aten, cuDNN and cuBLASLt."""
    found: list[Choice] = []
    if backend != "cuda" and backends.has_triton():
        found += configs.candidates(layer, gpu)
    # On Hopper the mma.sync tiles of CUDA C++ were fastest for none of 104 layers (an H200, float16): skip them.
    skipped = backend == "triton" or (backend == "auto" and gpu.family == 90 and layer.dtype != torch.float32)
    if not skipped and layer.role == "conv_bn_relu" and backends.has_cuda_convolution():
        found += cuda_configs.candidates(layer, gpu)
    # After the others: these have not been timed on a GPU yet, and the first candidate wins a tie.
    if backend != "triton" and backends.has_cuda_convolution():
        for kind in (hopper_configs, conv1x1_configs, training_configs, gradient_configs):
            found += kind.candidates(layer, gpu)
    if backend in ("cuda", "triton"):
        return found
    return [*found, *(library.candidates(layer) if layer.folded else ()), LIBRARY]


def default(layer: Layer, gpu: Gpu, backend: str = "auto") -> Choice:
    """The choice where nothing may be measured: within a CUDA graph's capture, or with tuning switched off."""
    in_cuda = backend == "cuda" or not backends.has_triton()
    return cuda_configs.default(layer, gpu) if in_cuda else configs.default(layer, gpu)


class Tuner:
    """The choices for one GPU.

    file: the cache. measure: measures candidates; None to trust the cost model. name: of the GPU. known: entries that
    come with the package, in the form of the file, which takes precedence.
    """

    def __init__(
        self,
        gpu: Gpu,
        file: Path | None,
        measure: Measure | None,
        name: str = "this GPU",
        known: Mapping[str, Any] = {},
    ) -> None:
        self.gpu, self.file, self.measure, self.name = gpu, file, measure, name
        self._known = {key: _parse(entry) for key, entry in known.items()}
        self.chosen: dict[tuple[Layer | str, str], Choice] = {}
        self.seconds: dict[str, dict[str, float]] = {}
        self._stored = self._load()
        self._spent, self._told = 0.0, False

    def choose(self, layer: Layer, trials: Callable[[], Sequence[Run]], backend: str = "auto") -> Choice:
        """The choice for ``layer``.

        trials: makes functions ``run(choice)`` that compute the layer, each on operands of its own, to be measured.
        backend: ``"cuda"`` or ``"triton"`` to choose among their kernels alone.
        """
        if _forced is not None:
            return _forced
        fallback = functools.partial(default, layer, self.gpu, backend)
        return self._choose(layer, backend, lambda: candidates(layer, self.gpu, backend), fallback, trials)

    def choose_form(self, chain: str, forms: dict[str, Callable[[], object]], backend: str = "auto") -> str:
        """Which of ``forms`` runs the chain called ``chain``; the first if nothing is measured."""
        first = next(iter(forms))
        found = self._choose(chain, backend, lambda: list(forms), lambda: first, lambda: [lambda form: forms[form]()])
        assert isinstance(found, str)
        return found

    def wanted(self, layer: Layer, backend: str = "auto") -> list[Choice]:
        """What :meth:`choose` would run: the choice, or all candidates if it would measure them."""
        if _forced is not None:
            return [_forced]
        known = self.chosen.get((layer, backend)) or self._cached(_key(layer, backend))
        if known is not None:
            return [known]
        return candidates(layer, self.gpu, backend) if self.measures() else [default(layer, self.gpu, backend)]

    def _cached(self, key: str) -> Choice | None:
        return self._stored.get(key) or self._known.get(key)

    def entries(self) -> dict[str, Any]:
        """The entries of the file, by key."""
        return {k: c if isinstance(c, str) else dataclasses.asdict(c) for k, c in self._stored.items()}

    def measures(self) -> bool:
        """Whether a missing choice would be measured now."""
        return self.measure is not None and not capturing()

    def _choose(
        self,
        what: Layer | str,
        backend: str,
        among: Callable[[], list[Any]],
        unmeasured: Callable[[], Choice],
        trials: Callable[[], Sequence[Run]],
    ) -> Choice:
        choice = self.chosen.get((what, backend))
        if choice is None:
            key = _key(what, backend)
            choice = self._cached(key)
            if choice is None:
                if not self.measures():
                    return unmeasured()  # not cached: a later call may measure
                begin = time.perf_counter()
                choice = self._measure(what, backend, among(), trials())
                self._tell(time.perf_counter() - begin)
                # Another process may have been first.
                choice = self._stored.get(key, choice)
            self.chosen[what, backend] = choice
        return choice

    def _measure(self, what: Layer | str, backend: str, among: list[Choice], runs: Sequence[Run]) -> Choice:
        assert self.measure is not None
        times, refused = self.measure({c: [functools.partial(run, c) for run in runs] for c in among})
        for candidate, error in refused.items():
            warnings.warn(f"resnet_fast: {candidate} does not run on this GPU: {error}", stacklevel=2)
        if not times:
            raise RuntimeError(f"none of {', '.join(map(str, among))} runs on this GPU") from next(
                iter(refused.values())
            )
        self._store_fastest(what, backend, times)
        if isinstance(what, Layer) and what.folded:
            # The same times also decide for the layer with filters that may not be folded.
            unfolded = {c: s for c, s in times.items() if c not in _LIBRARIES}
            if unfolded:
                self._store_fastest(dataclasses.replace(what, folded=False), backend, unfolded)
        return self._stored[_key(what, backend)]

    def _store_fastest(self, what: Layer | str, backend: str, times: dict[Choice, float]) -> None:
        best = next(iter(times))
        for candidate, seconds in times.items():
            if seconds < times[best] * (1 - _MARGIN):
                best = candidate
        key = _key(what, backend)
        self.seconds[key] = {str(c): s for c, s in times.items()}
        self._store(key, best)

    def _tell(self, seconds: float) -> None:
        """Prints once, after two seconds of measurements, what takes so long."""
        self._spent += seconds
        if self._spent > 2 and not self._told:
            self._told = True
            where = f", kept in {self.file}" if self.file else ""
            print(f"resnet_fast: measuring which kernels are fastest on {self.name}, once{where}", file=sys.stderr)

    def _load(self) -> dict[str, Choice]:
        if self.file is None or not self.file.exists():
            return {}
        try:
            # An earlier version called the role of a layer so.
            read = json.loads(self.file.read_text())
            return {k.replace(" conv_moments ", " conv_bn_stats "): _parse(v) for k, v in read.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            warnings.warn(f"resnet_fast: {self.file} is not readable and is measured anew: {error}", stacklevel=2)
            return {}

    def _store(self, key: str, choice: Choice) -> None:
        """Adds an entry to the file. Other processes write it, too: reads it again, then replaces it atomically."""
        self._stored[key] = choice
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # The entry of a process that was first stays, so that both run the same from then on.
            self._stored = {**self._stored, **self._load()}
            handle, partial = tempfile.mkstemp(dir=self.file.parent, prefix=self.file.name)
            with open(handle, "w") as out:
                json.dump(self.entries(), out, indent=1, sort_keys=True)
            os.replace(partial, self.file)
        except OSError as error:
            warnings.warn(f"resnet_fast: measured choices cannot be kept in {self.file}: {error}", stacklevel=2)


def _key(what: Layer | str, backend: str) -> str:
    text = what if isinstance(what, str) else " ".join(str(v) for v in dataclasses.astuple(what)).replace("torch.", "")
    return text if backend == "auto" else f"{backend}: {text}"


def _parse(entry: str | dict[str, int]) -> Choice:
    if isinstance(entry, str):
        if entry not in (LIBRARY, *_LIBRARIES, STAGES, POOLED, LAYERS):
            raise ValueError(f"unknown choice {entry!r}")
        return entry
    kinds = (kind for field, kind in _KINDS.items() if field in entry)
    return next(kinds, Config)(**entry)


def capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing may wait for the device."""
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
            name = torch.cuda.get_device_name(device)
            measure = _measured(device) if measured else None
            _tuners[key] = Tuner(gpu_of(device), cache_file(name), measure, name, shipped.load(name))
    return _tuners[key]


def choices() -> dict[Layer | str, tuple[Choice, dict[str, float]]]:
    """The choice for each layer that this process has met, on any GPU, and the seconds of the measured candidates.

    Chains for which a form was chosen are included, by name. A choice read from a file comes without seconds.
    """
    return {
        layer: (choice, t.seconds.get(_key(layer, backend), {}))
        for t in _tuners.values()
        for (layer, backend), choice in t.chosen.items()
    }
