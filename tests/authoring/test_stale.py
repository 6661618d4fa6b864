"""A notebook is executed again when something that decides its outputs has changed, and only then."""

import os
import time

import nbformat
import pytest

from tests.authoring.courses import new_course, small
from utils.authoring import build, stale
from utils.authoring import source as lecture_source

# A course with two lectures that import one module each; `told` is imported by no cell.
FILES = {
    "utils/__init__.py": "",
    "utils/used.py": "from utils import indirect\n",
    "utils/indirect.py": "import json\nTABLE = 'table.json'\n",
    "utils/unused.py": "x = 1\n",
    "utils/drawing/__init__.py": "",
    "utils/drawing/view.js": "1;\n",
    "utils/exercises/arrays.py": "x = 1\n",
    "utils/exercises/lecture_01/arrays.py": "from utils.exercises import arrays\nHINT = 'one'\n",
    "utils/exercises/lecture_02/arrays.py": "from utils.exercises import arrays\nHINT = 'two'\n",
    "utils/authoring/outputs.py": "TOLERANCE = 1\n",
    "data/README.md": "Data.\n",
    "data/table.json": "[1]\n",
    "data/other.json": "[1]\n",
    "requirements.txt": "numpy==1\n",
}
FIRST = "import sys; sys.path.insert(0, '..')\nimport json\nfrom utils import drawing, used\nprint(1)"
BOTH, NONE = {"01", "02"}, set()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two lectures, built. Tests change files and put them back."""
    folder = tmp_path_factory.mktemp("stale")
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    new_course(folder, small(FIRST))
    second = small("import sys; sys.path.insert(0, '..')\nprint(2)").replace("module: sample", "module: other")
    (folder / "solutions" / "02_other.py").write_text(second, encoding="utf-8")
    assert build.main([], root=folder) == 0
    return folder


def outcome(folder, capsys):
    """Build; return {notebook: what was done}."""
    capsys.readouterr()
    assert build.main([], root=folder) == 0
    lines = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
    return {name: done for name, _, done in lines if name.endswith(".ipynb")}


def stale_lectures(folder):
    lectures = [lecture_source.read(path) for path in sorted((folder / "solutions").glob("*.py"))]
    kept = [folder / "lectures" / f"{lecture.name}.ipynb" for lecture in lectures]
    pairs = zip(kept, lectures)
    return {lecture.name[:2] for target, lecture in pairs if not stale.is_current(target, lecture, folder)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("utils/used.py", {"01"}),
        ("utils/indirect.py", {"01"}),
        ("utils/unused.py", NONE),
        ("utils/drawing/view.js", {"01"}),
        ("utils/exercises/lecture_01/arrays.py", {"01"}),
        ("utils/exercises/lecture_02/arrays.py", {"02"}),
        ("utils/exercises/arrays.py", BOTH),
        ("utils/authoring/outputs.py", BOTH),
        ("attention/sample.py", {"01"}),
        ("data/README.md", NONE),
        ("data/table.json", {"01"}),
        ("data/other.json", NONE),
        ("requirements.txt", BOTH),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["built here", "fresh clone"])
def test_a_change_makes_stale_what_depends_on_it(name, expected, elsewhere, built):
    path = built / name
    before, times = path.read_bytes(), path.stat()
    keys = built / "build" / "keys"
    if elsewhere:
        keys.rename(built / "build" / "away")
    try:
        assert stale_lectures(built) == NONE
        path.write_bytes(before + b"\n")
        now = time.time() + 2 * stale.SLACK
        os.utime(path, (now, now))
        assert stale_lectures(built) == expected
    finally:
        path.write_bytes(before)
        os.utime(path, (times.st_atime, times.st_mtime))
        if elsewhere:
            (built / "build" / "away").rename(keys)
    assert stale_lectures(built) == NONE


def test_nothing_is_executed_twice(built, capsys):
    assert set(outcome(built, capsys).values()) == {"unchanged"}


def test_a_fresh_clone_is_taken_as_it_came_and_then_known(built, capsys):
    for path in (built / "build" / "keys").rglob("*.json"):
        path.unlink()
    assert set(outcome(built, capsys).values()) == {"unchanged"}
    used = built / "utils" / "used.py"
    before = used.read_bytes()
    used.write_bytes(before + b"\n")
    assert stale_lectures(built) == {"01"}  # by its key: the clock says nothing so soon
    used.write_bytes(before)


def test_a_damaged_note_is_no_note(built):
    for path in (built / "build" / "keys").rglob("*.json"):
        path.write_text("[", encoding="utf-8")
    assert stale_lectures(built) == NONE


def test_changed_text_and_tags_are_written_without_executing(built, capsys):
    source = built / "solutions" / "01_sample.py"
    before = source.read_text(encoding="utf-8")
    counts = [nbformat.read(built / "lectures" / "01_sample.ipynb", 4).cells[-1].execution_count]
    source.write_text(before.replace("A small lecture", "A lecture").replace("\n# %%\n", '\n# %% tags=["slow"]\n'))
    done = outcome(built, capsys)
    assert done["lectures/01_sample.ipynb"].startswith("text and tags written")
    assert done["lectures/02_other.ipynb"] == "unchanged"
    written = nbformat.read(built / "lectures" / "01_sample.ipynb", 4)
    assert written.cells[0].source.startswith("# A lecture") and written.cells[-1].metadata.tags == ["slow"]
    assert [written.cells[-1].execution_count] == counts and written.cells[-1].outputs[0].text == "1\n"
    source.write_text(before, encoding="utf-8")
    outcome(built, capsys)


def test_a_changed_cell_and_a_cell_edited_in_the_notebook_are_executed(built, capsys):
    lecture = built / "lectures" / "02_other.ipynb"
    lecture.write_text(lecture.read_text(encoding="utf-8").replace("print(2)", "print(3)"), encoding="utf-8")
    done = outcome(built, capsys)
    assert [name for name, what in done.items() if what != "unchanged"] == ["lectures/02_other.ipynb"]
    source = built / "solutions" / "02_other.py"
    before = source.read_text(encoding="utf-8")
    source.write_text(before + "\n# %%\nprint(4)\n", encoding="utf-8")
    done = outcome(built, capsys)
    assert {name[-14:-12] for name, what in done.items() if what.startswith("executed")} == {"02"}
    source.write_text(before, encoding="utf-8")
    outcome(built, capsys)


def test_a_notebook_says_nothing_of_its_keys(built):
    for path in built.rglob("*.ipynb"):
        assert set(nbformat.read(path, 4).metadata) <= {"kernelspec", "language_info", "course", "jupytext"}
