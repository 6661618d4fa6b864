"""Rows beside packages that are none of the course's: the same promises as the table's, where the package is there."""

import pytest
import torch

from tests.conformance import elsewhere
from tests.conformance.table import LARGEST, as_array

CASES = [
    pytest.param(row, name, id=f"{row.mechanism}, {row.oracle}: {name}") for row in elsewhere.ROWS for name in row.cases
]


@pytest.mark.parametrize(("row", "name"), CASES)
def test_the_course_gives_what_its_oracle_gives_and_5_percent_are_seen(row, name):
    package = elsewhere.missing(row.oracle)
    if package:
        pytest.skip(f"{package} is not installed: it is none of the course's packages")
    assert max(row.differences(name)) <= LARGEST
    assert min(row.differences(name, factor=1.05)) > 20 * LARGEST
    with torch.no_grad():
        assert 0.05 < as_array(row.run(1.0, **row.cases[name])[1]).std() < 20
