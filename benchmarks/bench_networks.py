"""Whole networks in inference. Training is eager PyTorch's own for now, so there is nothing to compare."""

from __future__ import annotations

import pytest

from .cases import NETWORKS, Case
from .conftest import Measure


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.group)
def test_network(measure: Measure, case: Case, variant: str) -> None:
    measure(case, variant)
