"""`course.py grade`: each kind of notebook gets its own mark, and takes nobody else's."""

import csv
import json
import os

import pytest

from tests.teaching import submissions
from utils.authoring import source
from utils.judge import walls
from utils.paths import ROOT
from utils.teaching import assignment, grade, marks

pytestmark = pytest.mark.slow
has_walls = pytest.mark.skipif(not walls.keep_out(ROOT), reason="this system has no Landlock")


@pytest.fixture(scope="module")
def handed_in(tmp_path_factory):
    """The folder of an assignment with points 10 and 15, and the notebooks that were handed in."""
    folder = tmp_path_factory.mktemp("class")
    place = assignment.write("01", ["1A", "1B"], [10, 15], folder)
    given = json.loads((place / "01_attention_fundamentals.ipynb").read_text(encoding="utf-8"))
    (folder / "in").mkdir()
    for name, make in submissions.KINDS.items():
        made = make(given)
        text = made if isinstance(made, str) else json.dumps(made)
        (folder / "in" / f"{name}.ipynb").write_text(text, encoding="utf-8")
    (folder / "in" / "a_folder.ipynb").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "in" / "a_pipe.ipynb")
    return folder


@pytest.fixture(scope="module")
def graded(handed_in):
    """Where the marks are, and the table as {learner: row}."""
    manifest = grade.read_manifest(handed_in / "01" / assignment.MANIFEST)
    target = grade.grade(manifest, handed_in / "in", handed_in / "01", at_once=2)
    with open(target / marks.TABLE, encoding="utf-8", newline="") as file:
        return target, {row["learner"]: row for row in csv.DictReader(file)}


def feedback(graded, learner):
    target, table = graded
    return (target / table[learner]["page"]).read_text(encoding="utf-8")


def test_everybody_has_a_row_and_a_page(graded, handed_in):
    target, table = graded
    assert set(table) == {path.stem for path in (handed_in / "in").iterdir()}
    assert len(list((target / marks.PAGES).iterdir())) == len(table) > len(submissions.KINDS)


@pytest.mark.parametrize("kind", submissions.FULL)
def test_a_right_answer_earns_all_points_whatever_stands_around_it(graded, kind):
    assert graded[1][kind]["points"] == "25"


def test_half_of_the_exercises_earns_their_points(graded):
    row = graded[1]["half_right"]
    assert (row["1A"], row["1B"], row["1B state"]) == ("10", "0", "not attempted")


def test_an_untouched_notebook_earns_nothing(graded):
    assert graded[1]["untouched"]["points"] == "0"


def test_a_wrong_answer_earns_its_share_and_the_page_says_what_fails_for_which_input(graded):
    assert 0 < float(graded[1]["overflows"]["1A"]) < 10
    page = feedback(graded, "overflows")
    for said in ("for example:", "expected", "got", "exp overflows", "not passed"):
        assert said in page


@pytest.mark.parametrize("kind", [kind for kind in submissions.KINDS if kind not in (*submissions.FULL, "half_right")])
def test_no_other_kind_passes_1a(graded, kind):
    row = graded[1][kind]
    assert row["1A state"] != "passed" and float(row["1A"]) < 10


@pytest.mark.parametrize(
    "kind, said",
    [
        ("loops", "does a loop never end?"),
        ("ends_its_process", "it ended its Python process"),
        ("crashes", "it ended its Python process"),
        ("takes_memory", "it took more than 2 GB of memory"),
        ("renamed_function", "There is no softmax in the notebook: no cell defines it."),
        ("answer_is_no_python", "There is no softmax in the notebook: the cell with it is no Python"),
        ("no_function", "softmax is no function: int"),
        ("takes_the_oracle", "it imports the exercises themselves"),
        ("takes_the_reference", "it calls the course&#x27;s own softmax"),
        ("markup", "&lt;script&gt;"),
    ],
)
def test_the_page_says_what_went_wrong(graded, kind, said):
    page = feedback(graded, kind)
    assert said in page and "<script>" not in page


@pytest.mark.parametrize(
    "kind", [kind for kind in submissions.KINDS if "E1A" not in kind and kind not in submissions.UNREADABLE]
)
def test_what_one_exercise_does_leaves_the_other_its_mark(graded, kind):
    if kind not in ("half_right", "untouched", "no_cells"):
        assert graded[1][kind]["1B"] == "15", kind


@pytest.mark.parametrize("kind", [*submissions.UNREADABLE, "a_folder", *(["a_pipe"] if hasattr(os, "mkfifo") else [])])
def test_what_is_no_notebook_is_said(graded, kind):
    assert graded[1][kind]["1A state"] == "not judged"
    assert "The notebook cannot be read" in feedback(graded, kind)


@has_walls
@pytest.mark.parametrize("kind", submissions.CHEATS)
def test_neither_oracle_nor_reference_can_be_reached(graded, kind):
    assert graded[1][kind]["1A"] in ("0", "0.0"), feedback(graded, kind)


@has_walls
@pytest.mark.parametrize("kind", ["reads_the_solutions", "reads_the_reference", "reads_the_judge_s_memory"])
def test_the_walls_are_what_stops_a_reader(graded, kind):
    assert "PermissionError" in feedback(graded, kind)


def test_the_summary_counts_which_property_failed(graded):
    target, table = graded
    page = (target / marks.SUMMARY).read_text(encoding="utf-8")
    assert (
        f"{len(table)} notebooks" in page and "scores of 1e4 and -1e4 do not overflow" in page and "not judged" in page
    )


def test_nothing_that_an_answer_started_is_left(graded):
    import psutil

    left = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "1000"]]
    assert left == []


def test_marks_are_never_overwritten(tmp_path):
    first = grade.free_folder(tmp_path)
    first.mkdir()
    assert grade.free_folder(tmp_path) != first


def test_learners_are_called_after_files_or_folders(tmp_path):
    for name in ("ada.ipynb", "ben/homework.ipynb", "eve/one.ipynb", "eve/two.ipynb", "eve/.ipynb_checkpoints/x.ipynb"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert list(grade.learners(tmp_path)) == ["ada", "ben", "eve/one", "eve/two"]


def test_a_name_that_a_spreadsheet_would_run_is_defused():
    assert marks.harmless("=1+1") == "'=1+1" and marks.harmless("ada") == "ada"


@pytest.mark.parametrize("text", ["", "{}", '{"lecture": "01", "exercises": [{}], "seed": 1}'])
def test_a_damaged_manifest_is_one_sentence(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(assignment.Refused, match="damaged"):
        grade.read_manifest(tmp_path / "manifest.json")


def test_a_folder_without_notebooks_is_one_sentence(tmp_path):
    with pytest.raises(assignment.Refused, match="no notebook"):
        grade.learners(tmp_path)


def test_an_exercise_is_named_by_its_check():
    lecture = submissions.LECTURE
    assert [grade.cell_name(lecture, each) for each in lecture.exercises][:2] == ["softmax", "causal_mask"]
    assert isinstance(lecture, source.Lecture)
