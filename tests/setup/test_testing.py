"""`course.py test`: everything, some lectures, or what is quick; never nothing without a word."""

from pathlib import Path

import pytest

import course
from utils.paths import ROOT
from utils.setup import testing
from utils.setup.environment import Stop


def test_without_arguments_everything_is_run():
    assert testing.selection(ROOT, [], quick=False) == []


def test_other_arguments_go_to_pytest():
    assert testing.selection(ROOT, ["tests/test_data.py", "-n", "4"], quick=False) == ["tests/test_data.py", "-n", "4"]


def test_a_lecture_is_its_tests_its_two_notebooks_and_its_part_of_the_gates():
    *paths, option, expression = testing.selection(ROOT, ["6"], quick=False)
    assert all((ROOT / path).exists() for path in paths) and set(testing.GATES) <= set(paths)
    name = "06_flash_attention"
    assert {"tests/lectures/lecture_06", f"lectures/{name}.ipynb", f"solutions/{name}.ipynb"} <= set(paths)
    assert option == "-k" and expression.startswith(
        f"lecture_06 or {name} or [flash_attention- or [flash_attention] or "
    )


def test_several_lectures_and_more_arguments():
    chosen = testing.selection(ROOT, ["01", "05", "-x", "-n", "1"], quick=False)
    assert chosen[-3:] == ["-x", "-n", "1"] and {"lecture_01", "lecture_05"} < set(chosen[-4].split(" or "))
    assert {"tests/lectures/lecture_01", "tests/lectures/lecture_05"} <= set(chosen)


def test_quick_is_one_folder_of_notebooks_and_nothing_slow():
    chosen = testing.selection(ROOT, ["-x"], quick=True)
    assert chosen == ["tests", "lectures", "-m", "not slow", "--skip-passed", "-x"]


@pytest.mark.parametrize(
    ("rest", "quick", "message"),
    [(["99"], False, "There is no lecture 99; there are 01, 02"), (["01"], True, "test takes --quick or lectures")],
)
def test_what_cannot_be_run_is_a_sentence(rest, quick, message):
    with pytest.raises(Stop, match=message):
        testing.selection(ROOT, rest, quick)


@pytest.fixture
def status(monkeypatch):
    """Let pytest end with a status; nothing is run."""

    def end_with(number):
        monkeypatch.setattr(course, "prepare", lambda *_: Path("python"))
        monkeypatch.setattr(course, "run", lambda *_, **__: number)

    return end_with


def test_no_test_found_is_said(status, capsys):
    status(testing.NOTHING)
    assert course.main(["test", "-k", "nothing"]) == testing.NOTHING
    assert capsys.readouterr().err == "course.py: no test was found by: -k nothing\n"


def test_a_status_is_passed_on(status, capsys):
    status(1)
    assert course.main(["test", "--quick"]) == 1 and capsys.readouterr().err == ""
