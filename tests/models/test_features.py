"""docs/features.md: each row of its tables has a check, each check a row, and what the row says is what happens."""

import re
from pathlib import Path

import pytest
from helpers import (
    feature_checks_calls,  # noqa: F401  (registers)
    feature_checks_compilers,  # noqa: F401
    feature_checks_modules,  # noqa: F401
)
from helpers.feature_compiled import compiled_way
from helpers.feature_support import CHECKS, Check, found_way, is_ours, native

TEXT = (Path(__file__).parents[2] / "docs" / "features.md").read_text()
OUTCOMES = ("fused", "unfused", "raises as eager")
COLUMNS = ("eval", "training", "compiled")
MODES = ("eval", "training")


def rows(text):
    """Feature, and what stands in ``COLUMNS``."""
    found = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)]
    return [row[:4] for row in found if row[0] != "Feature" and set(row[0]) != {"-"}]


ROWS = rows(TEXT)


def outcomes(cells):
    """Column, mode, outcome of the cells of a row."""
    for column, cell in zip(COLUMNS, cells, strict=True):
        modes = MODES if column == "compiled" else (column,)
        said = cell.split(" / ")
        for mode, outcome in zip(modes, said if len(said) == len(modes) else said * len(modes), strict=True):
            if outcome != "-":
                yield column, mode, outcome


def test_rows_and_checks_belong_together():
    assert sorted(feature for feature, *_ in ROWS) == sorted(CHECKS)
    assert {outcome for _, *cells in ROWS for *_, outcome in outcomes(cells)} == set(OUTCOMES)
    for feature, *cells in ROWS:
        left_out = {column for column, cell in zip(COLUMNS, cells, strict=True) if cell == "-"}
        assert left_out == set(CHECKS[feature].leaves_out), feature
    assert TEXT.count(" | ".join(("| Feature", *COLUMNS, "Note |"))) == TEXT.count("| Feature")


def cases():
    for feature, *cells in ROWS:
        for column, mode, outcome in outcomes(cells):
            yield pytest.param(feature, column, mode, outcome, id=f"{feature}-{column}-{mode}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("feature", "column", "mode", "outcome"), list(cases()))
def test_feature(feature, column, mode, outcome):
    way = compiled_way if column == "compiled" else found_way
    assert way(CHECKS[feature], mode == "training") == outcome


def test_what_differs_from_eager_is_found():
    wrong = Check(lambda m, x: m(x) * (1 + is_ours(m)), native, 1e-3, False, "", ())
    for way in (found_way, compiled_way):
        with pytest.raises(AssertionError):
            way(wrong, False)


def test_errors_that_no_row_expects_are_found():
    wrong = Check(lambda m, x: m(x[0]), native, 1e-3, False, "", ())
    with pytest.raises(AssertionError, match="expected 4D input"):
        found_way(wrong, False)
