"""Networks of torchvision and timm, in an environment of their own with a later torch: ``make test-zoo``."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from resnet_fast import backends


@pytest.fixture(autouse=True)
def clean_state():
    """The extension that torch 2.13 built must load here: without it every test fails."""
    assert backends.loaded(), backends.status()["cpu"]
    backends.fallbacks(clear=True)
    torch.manual_seed(0)
