"""Options, the fixture that verifies and times, and the report at the end of ``pytest benchmarks``.

The variants of a case are built, verified and timed in turn when the first of them is asked for; each has a test of its
own, which reports it. By default what takes minutes is left out, whole compilers and large networks: ``--full``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from . import report
from .busy import Load, line
from .cases import Case
from .gpu import device as devices
from .gpu.device import DEVICES, DTYPES, Device
from .gpu.variants import SLOW as GPU_SLOW
from .images import KINDS
from .runner import Measured, Result, measured, variants_of
from .timing import Spread
from .variants import BASELINE, SLOW, UnavailableError

Measure = Callable[[Case, str], None]
_results = pytest.StashKey[list[Result]]()
_baselines = pytest.StashKey[dict[str, Spread]]()
_device = pytest.StashKey[Device]()
_load = pytest.StashKey[Load]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fast")
    group.addoption("--threads", type=int, default=2, help="threads of PyTorch and of the kernels")
    group.addoption("--full", action="store_true", help="large networks and torch.compile, too")
    group.addoption("--smoke", action="store_true", help="the smallest case of each file: does it run? No figures")
    group.addoption("--images", choices=KINDS, default="photographs", help="what is timed; all are verified")
    group.addoption("--device", choices=DEVICES, default="auto", help="auto: the GPU where one is visible")
    group.addoption("--dtype", choices=list(DTYPES), help="of the arithmetic on a GPU (default float16)")
    group.addoption("--cold", action="store_true", help="overwrite the GPU's cache before each call")
    group.addoption("--seconds", type=float, default=10.0, help="budget for the interleaved samples of a case")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_results], config.stash[_baselines] = [], {}
    config.stash[_load] = Load.now(config.option.threads)
    try:
        config.stash[_device] = devices.of(config.option.device, config.option.dtype, config.option.cold)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


# Last: the variants of a case come one after another, after whatever else a test is parametrized by.
@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" in metafunc.fixturenames:
        left_out = () if metafunc.config.option.full else (*SLOW, *GPU_SLOW)
        known = variants_of(metafunc.config.stash[_device])
        metafunc.parametrize("variant", [name for name in known if name not in left_out])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    smallest: dict[Path, int] = {}
    for item in items:
        if (case := _case(item)) is not None:
            smallest[item.path] = min(case.size, smallest.get(item.path, case.size))

    def wanted(item: pytest.Item) -> bool:
        case = _case(item)
        if case is None:
            return True
        if case.variants is not None and item.callspec.params["variant"] not in case.variants:  # type: ignore
            return False
        if config.option.full:
            return True
        return case.size == smallest[item.path] if config.option.smoke else not case.full

    left_out = [item for item in items if not wanted(item)]
    items[:] = [item for item in items if wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def _case(item: pytest.Item) -> Case | None:
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("case") if callspec is not None else None
    return case if isinstance(case, Case) else None


@pytest.fixture(scope="session", autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measured_case(request: pytest.FixtureRequest) -> Callable[[Case], Measured]:
    """The case at hand, measured once for all its variants; only one is kept, networks are large."""
    kept: list[Measured] = []
    options, device = request.config.option, request.config.stash[_device]

    def get(case: Case) -> Measured:
        if not kept or kept[0].case is not case:
            kept.clear()
            asked = (item for item in request.session.items if _case(item) is case)
            names = [item.callspec.params["variant"] for item in asked]  # type: ignore[attr-defined]
            kind = options.images if options.images in case.kinds else case.kinds[0]
            # One variant that fails must not take the others' times away: its own test raises what it raised.
            kept.append(measured(case, names, kind, device, refusals=(Exception,), seconds=options.seconds))
        return kept[0]

    return get


@pytest.fixture
def measure(request: pytest.FixtureRequest, measured_case: Callable[[Case], Measured], benchmark: Any) -> Measure:
    """Reports a variant: its times in turn with the others (``extra_info``), then alone (the plugin's columns)."""
    config = request.config

    def run(case: Case, variant: str) -> None:
        found = measured_case(case)
        reason = found.refused.get(variant)
        if isinstance(reason, UnavailableError):
            pytest.skip(str(reason))
        if reason is not None:
            raise reason
        result, baseline = found.results[variant], found.results[BASELINE]
        config.stash[_results].append(result)
        config.stash[_baselines][f"{result.group}, {result.images}"] = baseline.seconds
        benchmark.group = f"{result.group}, {result.images}"
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
            _synchronised(found.calls[variant], config.stash[_device]),
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
        terminalreporter.section("verified, then timed in turn")
        device = config.stash[_device]
        baselines = config.stash[_baselines]
        machine = line(config.stash[_load], baselines)
        terminalreporter.write_line(report.conditions(device))
        terminalreporter.write_line(report.table(results))
        terminalreporter.write_line(machine)
        terminalreporter.write_line("written: " + " ".join(map(str, report.save(results, device, machine))))
