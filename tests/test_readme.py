"""README.md: its commands, links, pictures and states of lectures are those of the course."""

import re

import pytest

from data.recorded import pictures
from tests.mutation.kept import counts
from utils.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
LECTURES = re.findall(r"^\| (\d\d) \| .+? \| (here|planned) \|", README, re.MULTILINE)


def test_every_link_and_picture_is_there_and_every_picture_has_a_text():
    links = re.findall(r"(!?)\[([^\]]*)\]\(([^)#]+)[^)]*\)", README)
    assert len(links) >= 5
    assert [where for _, _, where in links if "://" not in where and not (ROOT / where).exists()] == []
    assert [where for picture, text, where in links if picture and len(text) < 40] == []


def test_every_command_is_one():
    source = (ROOT / "course.py").read_text(encoding="utf-8")
    commands = set(re.findall(r"course\.py (\w+)", README)) | set(re.findall(r"`(\w+) \d\d`", README))
    assert {"lab", "test", "doctor"} <= commands
    assert [name for name in commands if f'"{name}"' not in source] == []


@pytest.mark.parametrize(("number", "state"), LECTURES)
def test_a_lecture_that_is_here_is_here(number, state):
    assert (state == "here") == bool(list((ROOT / "lectures").glob(f"{number}_*.ipynb")))


def test_all_lectures_are_in_the_table():
    assert [number for number, _ in LECTURES] == [f"{number:02}" for number in range(1, 14)]


def test_the_picture_of_the_model_is_the_figure_of_the_lecture():
    kept = (pictures.PICTURES / "model.png").read_bytes()
    assert kept == pictures.model_figure(), "python -m data.recorded.pictures makes it again"


def test_the_report_says_what_its_picture_shows():
    said = str(pictures.report())
    assert "RACE on shared part[32]: thread (32,0,0) writes at line 8" in said
    assert "and thread (0,0,0) reads at line 10" in said


def test_the_hours_it_promises_are_those_of_the_lectures():
    minutes = {}
    for path in sorted((ROOT / "solutions").glob("[0-9][0-9]_*.py")):
        together = re.findall(
            r"^# ?\| ?\*\*together\*\* ?\| ?\*\*(\d+)\*\*", path.read_text(encoding="utf-8"), re.MULTILINE
        )
        minutes[path.name[:2]] = int(together[0])
    assert "takes **three hours** alone" in README
    assert {minutes.pop("13")} <= set(range(80, 111)) and set(minutes.values()) == {180}


def test_the_mutants_it_speaks_of_are_refused():
    found = counts()
    assert "thousands of copies of the solutions with one error each are refused" in README
    assert sum(each["refused"] for each in found.values()) > 2000 and not any(
        each["survived"] for each in found.values()
    )
