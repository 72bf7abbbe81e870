"""Tests that need an NVIDIA GPU: `make test-gpu`. Without one they fail; nothing is skipped for the lack of it.

Their files are not called `test_*.py`, so that `make test` does not collect them. With `--simulated` those that only
compute run on the simulated device: that is how they are kept in order where there is no GPU.
"""

import contextlib
import os

import pytest
import torch
from helpers.cuda_support import find_cuda
from ptxsim.device import simulated

NO_GPU = "no CUDA device is visible to PyTorch: these tests need an NVIDIA GPU"


def pytest_addoption(parser):
    parser.addoption(
        "--simulated", action="store_true", help="on the simulated device; tests of the machine are left out"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "alone: takes times, beside which nothing else may use the GPU")
    config.addinivalue_line("markers", "machine: asks for what only a GPU has: streams, graphs, clocks, memory")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--simulated", default=False):
        machine = [item for item in items if item.get_closest_marker("machine")]
        config.hook.pytest_deselected(items=machine)
        items[:] = [item for item in items if item not in machine]


@pytest.fixture(scope="session", autouse=True)
def gpu(request):
    """The device's name: "cuda", or "cpu" behind the simulator."""
    if request.config.getoption("--simulated", default=False):
        return "cpu"
    if not torch.cuda.is_available():
        pytest.fail(NO_GPU, pytrace=False)
    return "cuda"


@pytest.fixture(autouse=True)
def processes_of_tests(monkeypatch):
    """What a test starts is no worker of pytest-xdist, whatever runs the test."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def settings(gpu):
    """float32 means float32 where a test does not ask for TF32; the simulator stands in where it was asked for."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with simulated(find_cuda=find_cuda) if gpu == "cpu" else contextlib.nullcontext():
        yield
    torch.backends.cudnn.allow_tf32 = before
