"""tests/REPORT.md is what its command writes, and nothing in it is bad news."""

import pytest

from tests import report
from tests.conformance.table import LARGEST


def test_the_report_is_what_its_command_writes():
    assert report.TARGET.read_text(encoding="utf-8") == report.text(report.read()), report.COMMAND


def test_what_is_kept_of_third_parties_is_as_close_as_promised():
    kept = report.read()["conformance"]
    assert kept and all(float(largest) <= LARGEST for _, largest in kept.values())


def test_numbers_are_read_as_they_were_written(tmp_path):
    numbers = {"conformance": {"rope, against torch": [3, "2e-7"]}, "budgets": {"lectures/01.ipynb": [60, 900]}}
    report.write(numbers, tmp_path / "kept.json")
    assert report.read(tmp_path / "kept.json") == numbers
    assert '"lectures/01.ipynb": [60, 900]\n' in (tmp_path / "kept.json").read_text(encoding="utf-8")


def test_a_difference_that_another_machine_rounds_otherwise_stays():
    assert report.steady("4e-7", kept="2e-7") == "2e-7"
    assert report.steady("4e-6", kept="2e-7") == "4e-6"
    assert report.steady("4e-6", kept="0") == "4e-6"
    assert report.steady("6e-8", kept="0") == "0"


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        report.main(["99"])
    assert "99: expected 01, 02" in capsys.readouterr().err
