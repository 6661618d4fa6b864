"""`course.py assignment --nbgrader`, and nbgrader itself from the source notebook to the marks in its gradebook."""

import copy
import csv
import json
import os
import subprocess

import nbformat
import pytest

from tests.teaching import classroom
from tests.teaching.submissions import LECTURE, SOLVED, solved
from utils.authoring import source
from utils.judge import strict, walls
from utils.judge.exercise import find
from utils.paths import ROOT
from utils.teaching import assignment, grade, marks, nbgraded

NUMBERS, POINTS = ["1A", "1B", "1G"], [10, 15, 5]  # 1G is CUDA C++
NAME = f"{LECTURE.name}.ipynb"
WRONG = "def softmax(x, axis=-1):\n    return x\n"
PATCHED = "from utils.judge import strict\nstrict.require = lambda *args, **kwargs: None\n"
SCORES = """
import json
from nbgrader.api import Gradebook
with Gradebook("sqlite:///gradebook.db") as book:
    print(json.dumps({s.student.id: {g.name: g.score for n in s.notebooks for g in n.grades}
                      for s in book.assignment_submissions("01")}))
"""


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The folder of nbgrader's course with a source notebook."""
    folder = tmp_path_factory.mktemp("class")
    assignment.write("01", NUMBERS, POINTS, folder, for_nbgrader=True)
    return folder / assignment.NBGRADER


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get(kind)]


def test_the_source_has_solution_cells_points_and_locked_checks_and_nothing_solved(course):
    notebook = nbformat.read(course / "source" / "01" / NAME, as_version=4)
    nbformat.validate(notebook)
    assert not source.leaks(LECTURE, notebook)
    assert [cell.metadata.exercise for cell in cells(notebook, "solution")] == NUMBERS
    assert [cell.metadata.nbgrader.points for cell in cells(notebook, "grade")] == POINTS
    every = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.metadata.nbgrader.locked != cell.metadata.nbgrader.solution for cell in every)
    assert {cell.metadata.nbgrader.schema_version for cell in every} == {3}
    names = [cell.metadata.nbgrader.grade_id for cell in every]
    assert len(set(names)) == len(names)


def test_the_stubs_are_the_course_s_own_in_c_too(course):
    notebook = nbformat.read(course / "source" / "01" / NAME, as_version=4)
    stubs = {cell.metadata.exercise: cell.source for cell in cells(notebook, "solution")}
    assert source.STUB["###"] in stubs["1A"] and source.STUB["//"] in stubs["1G"]
    assert source.STUB["###"] not in stubs["1G"]


def test_the_seed_is_the_manifest_s_and_stands_in_what_learners_do_not_get(course):
    manifest = json.loads((course.parent / "01" / assignment.MANIFEST).read_text(encoding="utf-8"))
    for cell in cells(nbformat.read(course / "source" / "01" / NAME, as_version=4), "grade"):
        seen, _, hidden = cell.source.partition("### BEGIN HIDDEN TESTS")
        assert f"seed={manifest['seed']})" in hidden and hidden.rstrip().endswith("### END HIDDEN TESTS")
        assert all(line.startswith("#") for line in seen.splitlines())


def test_a_second_assignment_keeps_the_configuration_and_the_same_one_is_refused(tmp_path):
    for lecture, number in (("01", "1A"), ("02", "2A")):
        assignment.write(lecture, [number], [1], tmp_path, for_nbgrader=True)
        (tmp_path / assignment.NBGRADER / nbgraded.CONFIG).write_text("# mine")
    assert (tmp_path / assignment.NBGRADER / nbgraded.CONFIG).read_text() == "# mine"
    with pytest.raises(assignment.Refused, match="is there already"):
        assignment.write("01", ["1A"], [1], tmp_path, for_nbgrader=True)


def defined(text):
    """What a cell's text defines first."""
    room = {}
    exec("import numpy as np\n" + text, room)
    return next(room[name] for name in ("softmax", "SOFTMAX_ROWS") if name in room)


@pytest.mark.parametrize(
    "number, answer, said",
    [
        ("1A", "def softmax(x, axis=-1):\n    raise NotImplementedError", "not attempted yet"),
        ("1A", WRONG, "properties fail"),
        ("1A", "softmax = 3", "int was given"),
        ("1A", "from attention.fundamentals import softmax", "the course's own"),
        ("1G", "from attention.fundamentals import SOFTMAX_ROWS", "the course's own"),
        ("1G", "SOFTMAX_ROWS = '// your code here'", "not attempted yet"),
    ],
)
def test_what_earns_nothing_raises(number, answer, said):
    with pytest.raises(strict.NotPassed, match=said):
        strict.require(number, defined(answer), seed=7)


def test_a_right_answer_passes_with_any_seed():
    assert strict.require("1A", defined(SOLVED["1A"]), seed=7) is None


def test_an_answer_that_knows_the_inputs_of_the_learner_s_check_does_not_pass(tmp_path):
    right, heard = defined(SOLVED["1A"]), str(tmp_path / "heard")

    def listening(x, axis=-1):
        with open(heard, "a") as file:
            file.write(repr(x.tobytes()) + "\n")
        return right(x, axis)

    find("1A").judge(listening)
    with open(heard) as file:
        known = set(file.read().splitlines())

    def knowing(x, axis=-1):
        return right(x, axis) if repr(x.tobytes()) in known else x

    assert strict.require("1A", knowing, seed=0) is None
    with pytest.raises(strict.NotPassed):
        strict.require("1A", knowing, seed=7)


# ---- nbgrader itself ----------------------------------------------------------------------------------------------


def right(notebook):
    return solved(notebook, *NUMBERS)


def edits_the_checks(notebook):
    made = solved(notebook, "1B", E1A=WRONG)
    for cell in made["cells"]:
        about = cell["metadata"].get("nbgrader", {})
        if about.get("grade"):
            cell["source"], about["points"] = "pass", 1000
        elif about.get("locked") and "check(" in cell["source"] and "import" not in cell["source"]:
            cell["source"] = "print('7 of 7 properties hold.')"
    return made


def deletes_cells(notebook):
    """The cells that earn points are gone, and the whole of exercise 1G."""
    made = solved(notebook, "1B", E1A=WRONG)
    gone = [c for c in made["cells"] if c["metadata"].get("nbgrader", {}).get("grade") or "SOFTMAX_ROWS" in c["source"]]
    made["cells"] = [cell for cell in made["cells"] if cell not in gone]
    return made


def patches_the_judge(notebook):
    return solved(notebook, "1B", E1A=PATCHED + WRONG)


HANDED_IN = {
    "right": (right, [10, 15, 5]),
    "half": (lambda notebook: solved(notebook, "1A"), [10, 0, 0]),
    "empty": (copy.deepcopy, [0, 0, 0]),
    "edits": (edits_the_checks, [0, 15, 0]),
    "deletes": (deletes_cells, [0, 15, 0]),
    "hangs": (lambda notebook: solved(notebook, "1B", E1A="import time\ntime.sleep(10**6)"), [0, 15, 0]),
}


@pytest.fixture(scope="module")
def marked(course, tmp_path_factory):
    """What the gradebook says, {learner: {cell: points}}, and the notebook that learners got.

    All of it runs behind walls: the course can be read and not be written to.
    """
    python = classroom.python()
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": str(ROOT)}

    def run(*command, status=0):
        walled = classroom.behind_walls([python, *command], course.parent.parent)
        done = subprocess.run(walled, cwd=course, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    run("-m", "nbgrader", "generate_assignment", "01")
    given = json.loads((course / "release" / "01" / NAME).read_text(encoding="utf-8"))
    for name, make in [*((name, make) for name, (make, _) in HANDED_IN.items()), ("corrupt", None)]:
        place = course / "submitted" / name / "01"
        place.mkdir(parents=True)
        text = json.dumps(make(given)) if make else json.dumps(right(given))[:900]
        (place / NAME).write_text(text, encoding="utf-8")
    run("-m", "nbgrader", "autograde", "01", "--create", "--Execute.timeout=60", status=1)  # 1: the corrupt one
    return json.loads(run("-c", SCORES)), given


@pytest.mark.slow
def test_learners_get_stubs_without_the_hidden_tests(marked):
    given = json.dumps(marked[1])
    assert "HIDDEN" not in given and "strict" not in given and "seed=" not in given
    assert "raise NotImplementedError" in given and "// your code here" in given


@pytest.mark.slow
@pytest.mark.parametrize("learner", HANDED_IN)
def test_the_gradebook_has_the_marks(marked, learner):
    found = marked[0][learner]
    assert [found[f"points-{number}"] for number in NUMBERS] == HANDED_IN[learner][1]


@pytest.mark.slow
def test_a_corrupt_notebook_costs_nobody_else_anything(marked):
    assert sum(marked[0].get("corrupt", {}).values()) == 0 and set(HANDED_IN) <= set(marked[0])


@pytest.mark.slow
@pytest.mark.skipif(not walls.keep_out(ROOT), reason="this system has no Landlock")
def test_what_was_submitted_to_nbgrader_can_be_marked_by_the_course_which_a_patched_judge_does_not_reach(course):
    given = nbformat.read(course / "source" / "01" / NAME, as_version=4)
    place = course / "handed-in" / "eve" / "01"
    place.mkdir(parents=True)
    (place / NAME).write_text(json.dumps(patches_the_judge(given)), encoding="utf-8")
    manifest = grade.read_manifest(course.parent / "01" / assignment.MANIFEST)
    target = grade.grade(manifest, course / "handed-in", course.parent / "01", at_once=1)
    with open(target / marks.TABLE, encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["learner"], row["1A"], row["1B"], row["1G"]) == ("eve", "0", "15", "0")
