"""What falling back costs: networks that run unfused in every block, over plain eager ones. Want at most 1.03."""

from __future__ import annotations

import pytest

from .cases import UNFUSED, Case
from .conftest import Measure


@pytest.mark.parametrize("case", UNFUSED, ids=lambda case: case.group)
def test_fallback(measure: Measure, case: Case, variant: str) -> None:
    measure(case, variant)
