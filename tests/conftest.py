import pytest
import torch

from resnet_fast import backends


@pytest.fixture(autouse=True)
def clean_state():
    """Every test needs the extension: where it is missing, every test fails. None sees another's fallbacks or seed."""
    assert backends.loaded(), backends.status()["cpu"]
    backends.fallbacks(clear=True)
    torch.manual_seed(0)
