"""docs/features.md: each row of its tables has a check, each check a row, and what the row says is what happens."""

import re
from pathlib import Path

import feature_checks_calls  # noqa: F401  (registers)
import feature_checks_compilers  # noqa: F401
import feature_checks_modules  # noqa: F401
import pytest
from feature_support import CHECKS, Check, found_way, is_ours, native

TEXT = (Path(__file__).parent.parent / "docs" / "features.md").read_text()
OUTCOMES = ("fused", "unfused", "raises as eager")


def rows(text):
    """Feature, and the outcomes in eval and in training mode."""
    found = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)]
    return [row[:3] for row in found if row[0] != "Feature" and set(row[0]) != {"-"}]


ROWS = rows(TEXT)


def test_rows_and_checks_belong_together():
    assert sorted(feature for feature, *_ in ROWS) == sorted(CHECKS)
    assert {outcome for _, *outcomes in ROWS for outcome in outcomes} == set(OUTCOMES)
    assert len(re.findall(r"^\| Feature \| eval \| training \| Note \|$", TEXT, re.M)) == TEXT.count("| Feature")


def cases():
    for feature, *outcomes in ROWS:
        for training, outcome in zip((False, True), outcomes, strict=True):
            yield pytest.param(feature, training, outcome, id=f"{feature}-{'train' if training else 'eval'}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("feature", "training", "outcome"), list(cases()))
def test_feature(feature, training, outcome):
    assert found_way(CHECKS[feature], training) == outcome


def test_what_differs_from_eager_is_found():
    wrong = Check(lambda m, x: m(x) * (1 + is_ours(m)), native, 1e-3, False, "")
    with pytest.raises(AssertionError):
        found_way(wrong, False)


def test_errors_that_no_row_expects_are_found():
    wrong = Check(lambda m, x: m(x[0]), native, 1e-3, False, "")
    with pytest.raises(AssertionError, match="expected 4D input"):
        found_way(wrong, False)
