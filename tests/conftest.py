import os
import re

# Sleep, do not spin, at the end of a parallel region: on a machine that others use, spinning makes tests of small
# shapes ten times slower. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from ptxsim.fixtures import simulated_device  # noqa: F401

from resnet_fast import backends


def pytest_itemcollected(item):
    """Names of tests without addresses of functions: all workers find the same."""
    item._nodeid = re.sub(r" at 0x[0-9a-f]+", "", item._nodeid)


@pytest.fixture(autouse=True)
def clean_state():
    """Every test needs the extension: where it is missing, every test fails. None sees another's fallbacks or seed."""
    assert backends.loaded(), backends.status()["cpu"]
    backends.fallbacks(clear=True)
    torch.manual_seed(0)
