"""relu(a + b) on the maps of both families."""

from __future__ import annotations

import pytest

from .cases import OPERATORS, Case
from .conftest import Measure


@pytest.mark.parametrize("case", OPERATORS["add_relu"], ids=lambda case: case.group)
def test_add_relu(measure: Measure, case: Case, variant: str) -> None:
    measure(case, variant)
