"""Options, the fixture that verifies and times, and the report at the end of ``pytest benchmarks``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from . import device as devices
from . import report
from .cases import Case
from .device import DEVICES, DTYPES, Device
from .images import KINDS
from .runner import Bench, Result, variants_of
from .timing import interleaved
from .variants import BASELINE, UnavailableError

Measure = Callable[[Case, str], None]
_results = pytest.StashKey[list[Result]]()
_device = pytest.StashKey[Device]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fast")
    group.addoption("--threads", type=int, default=2, help="threads of PyTorch and of the kernels")
    group.addoption("--full", action="store_true", help="resnet18 and resnet50, too")
    group.addoption("--images", choices=KINDS, default="photographs", help="what is timed; all are verified")
    group.addoption("--device", choices=DEVICES, default="auto", help="auto: the GPU where one is visible")
    group.addoption("--dtype", choices=list(DTYPES), help="of the arithmetic on a GPU (default float16)")
    group.addoption("--cold", action="store_true", help="overwrite the GPU's cache before each call")
    group.addoption("--seconds", type=float, default=20.0, help="budget for the interleaved samples of a variant")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_results] = []
    try:
        config.stash[_device] = devices.of(config.option.device, config.option.dtype, config.option.cold)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", list(variants_of(metafunc.config.stash[_device])))


@pytest.fixture(scope="session", autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Callable[[Case], Bench]:
    """The case at hand, built once for all its variants; only one is kept, networks are large."""
    kept: list[Bench] = []

    def get(case: Case) -> Bench:
        if not kept or kept[0].case is not case:
            kept.clear()
            kept.append(Bench(case, request.config.stash[_device]))
        return kept[0]

    return get


@pytest.fixture
def measure(request: pytest.FixtureRequest, bench: Callable[[Case], Bench], benchmark: Any) -> Measure:
    """Verifies a variant, times it in turn with the baseline (``extra_info``), then alone (the plugin's columns)."""
    options = request.config.option

    def run(case: Case, variant: str) -> None:
        if case.full and not options.full:
            pytest.skip("measured with --full only")
        current = bench(case)
        kind = options.images if options.images in case.kinds else case.kinds[0]
        try:
            calls = {name: current.call(name, kind) for name in dict.fromkeys([BASELINE, variant])}
        except UnavailableError as reason:
            pytest.skip(str(reason))
        timing = interleaved(calls, seconds=options.seconds, device=current.device)
        result = current.result(variant, kind, timing)
        request.config.stash[_results].append(result)
        benchmark.group = f"{case.group}, {kind}"
        benchmark.extra_info.update(
            variant=variant,
            threads=result.threads,
            error_over_eager=result.error,
            ratio_to=BASELINE,
            ratio=result.ratio.median,
            ratio_quartiles=[result.ratio.low, result.ratio.high],
            rounds=result.rounds,
        )
        benchmark.pedantic(
            _synchronised(calls[variant], current.device),
            rounds=5,
            iterations=max(1, round(0.01 / result.seconds.median)),
        )

    return run


def _synchronised(call: Callable[[], Any], device: Device) -> Callable[[], Any]:
    """The plugin has the host's clock: it must see the GPU's work end."""
    if device.name == "cpu":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[_results]
    if results:
        terminalreporter.section("verified, then timed in turn with the baseline")
        device = config.stash[_device]
        terminalreporter.write_line(report.conditions(device))
        terminalreporter.write_line(report.table(results))
        terminalreporter.write_line("written: " + " ".join(str(path) for path in report.save(results, device)))
