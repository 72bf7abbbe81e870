"""3x3 convolution, batch norm and ReLU on the maps of both families, filters packed as inside a network."""

from __future__ import annotations

import pytest

from .cases import OPERATORS, Case
from .conftest import Measure


@pytest.mark.parametrize("case", OPERATORS["conv_bn_relu"], ids=lambda case: case.group)
def test_conv_bn_relu(measure: Measure, case: Case, variant: str) -> None:
    measure(case, variant)
