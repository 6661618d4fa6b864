"""Every row of the table: close to its oracle, sensitive to a scale that is wrong by 5 %, of numbers of unit size."""

import pytest
import torch

from tests.conformance import table

ROWS = table.rows()
CASES = [pytest.param(row, name, id=f"{row.mechanism}, {row.oracle}: {name}") for row in ROWS for name in row.cases]


@pytest.mark.parametrize(("row", "name"), CASES)
def test_the_course_gives_what_its_oracle_gives(row, name):
    assert max(row.differences(name)) <= table.LARGEST


DRAWN = [pytest.param(row, id=f"{row.mechanism}, {row.oracle}") for row in ROWS if not row.oracle.startswith("onnx")]


@pytest.mark.parametrize("row", DRAWN)
def test_queries_too_large_by_5_percent_are_seen_in_every_case(row):
    for name in row.cases:
        assert min(row.differences(name, factor=1.05)) > 20 * table.LARGEST


@pytest.mark.parametrize("row", DRAWN)
def test_what_is_compared_is_of_unit_size(row):
    with torch.no_grad():
        for case in row.cases.values():
            _, theirs = row.run(1.0, **case)
            assert 0.05 < table.as_array(theirs).std() < 20


@pytest.mark.parametrize("row", [row for row in ROWS if row.oracle.startswith("onnx")], ids=lambda row: row.mechanism)
def test_the_standard_s_own_numbers_show_5_percent_somewhere(row):
    assert max(max(row.differences(name, factor=1.05)) for name in row.cases) > 20 * table.LARGEST


def test_a_difference_is_relative_to_the_largest_number_and_needs_one_shape():
    assert table.difference([1.0, 100.0], [1.0, 101.0]) == pytest.approx(1 / 101)
    assert table.difference([0.1], [0.2]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="one shape"):
        table.difference([1.0], [[1.0]])


def test_the_table_rounds_up_and_has_a_line_for_each_row():
    lines = table.markdown([table.Measured("a", "b", 3, 2.1e-7), table.Measured("c", "d", 1, 0.0)]).splitlines()
    assert lines[2:] == ["| a | b | 3 | 3e-7 |", "| c | d | 1 | 0 |"]
    assert [table.up(x) for x in (9.5e-8, 1e-6, 5e-6)] == ["1e-7", "1e-6", "5e-6"]
