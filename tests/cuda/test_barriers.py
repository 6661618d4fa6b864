"""Every barrier of every kernel of the course is deleted in turn, and the runner says what is then wrong."""

import pytest

from tests.cuda.course_launches import course_launches

LAUNCHES = course_launches()
CASES = [(launched, *barrier) for launched in LAUNCHES for barrier in launched.barriers()]
# Barriers that order nothing in these launches: (kernel, text of the line).
NEEDLESS = set()


def test_all_kernels_with_barriers_are_there():
    assert len({launched.kernel.name.split("<")[0] for launched, *_ in CASES}) >= 22


@pytest.mark.parametrize("launched", LAUNCHES, ids=str)
def test_as_they_are_nothing_is_wrong(launched):
    assert launched.check(launched.kernel).ok


@pytest.mark.slow
@pytest.mark.parametrize(("launched", "start", "end", "line"), CASES, ids=[f"{c[0]}-{c[3]}" for c in CASES])
def test_a_barrier_that_is_deleted_is_missed(launched, start, end, line):
    report = launched.check(launched.without(start, end))
    assert not report.ok, f"line {line}: {launched.kernel.source.splitlines()[line - 1]}"
