"""``fuse`` on networks of pytorchcv, in inference and in training: ``--full``."""

from __future__ import annotations

import pytest

from .cases import FUSED, Case
from .conftest import Measure
from .variants import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.group)
def test_fuse(measure: Measure, case: Case, variant: str) -> None:
    measure(case, variant)
