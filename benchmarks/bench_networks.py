"""Whole networks in inference; training steps are measured by ``python -m benchmarks --training``."""

from __future__ import annotations

import pytest

from .cases import NETWORKS, Case
from .conftest import Measure


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.group)
def test_network(measure: Measure, case: Case, variant: str) -> None:
    measure(case, variant)
