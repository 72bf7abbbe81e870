"""pytest fixtures; a conftest imports them by name."""

import pytest

from .device import simulated


@pytest.fixture
def simulated_device():
    """The package's GPU path runs in the simulator; yields the device, whose `launches` hold the counters."""
    with simulated() as device:
        yield device
