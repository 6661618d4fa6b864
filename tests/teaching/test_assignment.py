"""`course.py assignment`: what is asked for is there, nothing is solved, and the notebook runs from start to end."""

import json

import nbformat
import pytest
from nbclient import NotebookClient

from utils.authoring import source
from utils.paths import ROOT
from utils.teaching import assignment, statements, trees

LECTURES = {path.name[:2]: source.read(path) for path in sorted((ROOT / "solutions").glob("[0-9][0-9]_*.py"))}
EVERY = [(number, exercise.number) for number, lecture in LECTURES.items() for exercise in lecture.exercises]


def made(lecture, *numbers):
    return assignment.notebook(lecture, assignment.tasks(lecture, numbers, [1.0] * len(numbers)))


def texts(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("lecture, number", EVERY, ids=[number for _, number in EVERY])
def test_each_exercise_alone_brings_what_its_solution_needs_and_not_the_solution(lecture, number):
    lecture = LECTURES[lecture]
    notebook = made(lecture, number)
    assert not source.leaks(lecture, notebook)
    (stub,) = [cell for cell in notebook.cells if cell.metadata.get("exercise")]
    assert stub.metadata.exercise == number and "BEGIN SOLUTION" not in "".join(texts(notebook))
    solution = next(lecture.cells[each.cell].source for each in lecture.exercises if each.number == number)
    found, broken = statements.statements([solution if text == stub.source else text for text in texts(notebook)])
    own = {name for s in found if s.text in solution for name in s.binds}
    assert not broken and statements.closure(found, own)[1] == set()
    assert len(notebook.cells) <= 16, "more than an exercise needs"


def test_a_whole_lecture_keeps_its_order_and_says_what_it_is_worth():
    lecture = LECTURES["01"]
    notebook = assignment.notebook(lecture, assignment.tasks(lecture, ["1C", "1A"], [15, 10]))
    assert [cell.metadata.exercise for cell in notebook.cells if "exercise" in cell.metadata] == ["1A", "1C"]
    assert "| 1C | `attention_weights` | 15 |" in notebook.cells[0].source and "**25**" in notebook.cells[0].source


def test_another_exercise_that_is_needed_comes_from_the_course():
    assert "from attention.fundamentals import causal_mask, softmax" in "\n".join(texts(made(LECTURES["01"], "1C")))
    assert "from attention.fundamentals import causal_mask\n" in "\n".join(texts(made(LECTURES["01"], "1A", "1C")))


@pytest.mark.slow
def test_the_notebook_runs_untouched_and_every_check_says_that_it_is_open():
    notebook = made(LECTURES["01"], "1A", "1C", "1D")
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "lectures")}}).execute()
    said = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", ()))
    assert said.count("not attempted yet") == 3


@pytest.mark.parametrize(
    "numbers, points, said",
    [
        (["1A"], [1, 2], "one number of points for each"),
        (["1Z"], [1], "There is no exercise '1Z'"),
        (["2A"], [1], "is not one of lecture 01"),
        (["1A", "1.1"], [1, 1], "named twice"),
        (["1A"], [0], "above 0"),
        (["1A"], [float("nan")], "above 0"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_a_sentence(numbers, points, said):
    with pytest.raises(assignment.Refused, match=said):
        assignment.tasks(LECTURES["01"], numbers, points)


def test_there_is_no_lecture_99(tmp_path):
    with pytest.raises(assignment.Refused, match="There is no lecture 99"):
        assignment.write("99", ["1A"], [1], tmp_path)


def test_an_assignment_is_not_overwritten(tmp_path):
    place = assignment.write("01", ["1A"], [10], tmp_path)
    kept = json.loads((place / assignment.MANIFEST).read_text(encoding="utf-8"))
    assert kept["exercises"] == [{"number": "1A", "name": "softmax", "points": 10}]
    assert nbformat.read(place / kept["notebook"], as_version=4)
    with pytest.raises(assignment.Refused, match="is there already"):
        assignment.write("01", ["1B"], [10], tmp_path)


def test_the_command_line_says_what_is_wrong(capsys):
    assert assignment.main(["01", "--exercises", "1Z", "--points", "10"]) == 1
    assert "There is no exercise" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        assignment.main(["01", "--exercises", "1A", "--points", "ten"])
    assert "expected numbers like 10,15" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", LECTURES)
def test_the_copies_for_marking_hold_no_answer_and_can_be_imported(number, tmp_path):
    import subprocess
    import sys

    lecture = LECTURES[number]
    trees.plant(lecture, tmp_path)
    assert not list(tmp_path.rglob("*exercises*")) and not list(tmp_path.rglob("*solutions*"))
    for index, exercise in enumerate(lecture.exercises):
        text = (tmp_path / exercise.number / "attention" / f"{lecture.module}.py").read_text(encoding="utf-8")
        for other in lecture.exercises[index:]:
            begin, end = other.regions[0]
            lines = lecture.cells[other.cell].source.splitlines()[begin + 1 : end]
            assert "\n".join(lines) not in text, f"{other.number} in the copy for {exercise.number}"
    first = trees.path_for(tmp_path, lecture.exercises[0].number)
    code = f"import sys; sys.path[:0] = {first!r}; import attention.{lecture.module}"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
