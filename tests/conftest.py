import os

# Sleep, do not spin, at the end of a parallel region: on a machine that others use, spinning makes tests of small
# shapes ten times slower. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from ptxsim.fixtures import simulated_device  # noqa: F401

from resnet_fast import backends


def pytest_collection_modifyitems(items):
    """What takes long begins first, so that no worker waits for another's last test."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def clean_state():
    """Every test needs the extension: where it is missing, every test fails. None sees another's fallbacks or seed."""
    assert backends.loaded(), backends.status()["cpu"]
    backends.fallbacks(clear=True)
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
