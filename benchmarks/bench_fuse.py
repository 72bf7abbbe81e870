"""``fuse`` on networks of pytorchcv, in inference and in training; those of ImageNet with ``--full``."""

from __future__ import annotations

import pytest

from .cases import FUSED, FUSED_SMALL, Case
from .conftest import Measure


@pytest.mark.parametrize("case", [*FUSED_SMALL, *FUSED], ids=lambda case: case.group)
def test_fuse(measure: Measure, case: Case, variant: str) -> None:
    measure(case, variant)
