"""What an update may read, keeps, says and carries over: damaged lectures, touched copies, solved exercises."""

import copy
import hashlib
import json

import nbformat
import pytest

from utils.authoring import source as lecture_source
from utils.setup import notebooks, workbook
from utils.setup.environment import Stop

NAME = "01_topic.ipynb"
STUB = "def softmax(x):\n    raise NotImplementedError"
SOLVED = "def softmax(x):\n    return x / x.sum()"


def code(source, number=None, **metadata):
    if number:
        metadata |= {"tags": ["exercise"], "exercise": number}
    digest = hashlib.sha256(f"code\n{source}".encode()).hexdigest()[:12]
    made = nbformat.v4.new_code_cell(source, id=digest, metadata=metadata, execution_count=3)
    made.outputs = [nbformat.v4.new_output("stream", text="1\n")]
    return made


def text(source, **metadata):
    return nbformat.v4.new_markdown_cell(source, metadata=metadata)


def lecture(*cells, **metadata):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    made = nbformat.v4.new_notebook(cells=list(cells), metadata={"kernelspec": kernel} | metadata)
    return (nbformat.writes(made) + "\n").encode()


FIRST = lecture(text("# Topic"), code(STUB, "1A"), code('softmax = check("1A", softmax)'))
SECOND = lecture(text("# Topic"), text("New."), code(STUB, "1A"), code('softmax = check("1A", softmax)'))


class Course:
    def __init__(self, folder):
        self.lectures, self.workbook = folder / "lectures", folder / "workbook"
        self.lecture, self.copy = self.lectures / NAME, self.workbook / NAME
        self.lectures.mkdir()
        self.lecture.write_bytes(FIRST)

    def update(self, new=None):
        if new is not None:
            self.lecture.write_bytes(new)
        return workbook.update(self.lectures, self.workbook)

    def edit(self, change, path=None):
        made = json.loads((path or self.copy).read_bytes())
        change(made)
        (path or self.copy).write_bytes(json.dumps(made).encode())
        return (path or self.copy).read_bytes()

    def solve(self, index, source, path=None):
        return self.edit(lambda made: made["cells"][index].update(source=source), path)

    @property
    def beside(self):
        [path] = self.workbook.glob("*.new-*.ipynb")
        return path

    def sources(self, path):
        return [notebooks.source(cell) for cell in json.loads(path.read_bytes())["cells"]]


@pytest.fixture
def course(tmp_path):
    made = Course(tmp_path)
    made.update()
    return made


# ---- What a copy is -----------------------------------------------------------------------------------------------


def test_a_copy_has_no_outputs_no_prompts_and_nothing_about_lectures(course):
    note = text("Not here.", tags=[lecture_source.ONLY_IN_LECTURES])
    course.copy.unlink()
    course.update(lecture(text("# Topic"), note, code("print(1)")))
    made = nbformat.read(course.copy, as_version=4)
    nbformat.validate(made)
    assert [cell.source for cell in made.cells] == ["# Topic", "print(1)"]
    assert made.cells[1].outputs == [] and made.cells[1].execution_count is None
    assert b'"1\\n"' in course.lecture.read_bytes()


def test_both_sides_mean_the_same_tag():
    assert notebooks.ONLY_IN_LECTURES == lecture_source.ONLY_IN_LECTURES


# ---- What never replaces a good copy ------------------------------------------------------------------------------

MERGE = FIRST.replace(b' "cells"', b'<<<<<<< HEAD\n "cells"', 1)
MERGED_INSIDE = lecture(text("# Topic"), code("<<<<<<< local\nx = 1\n=======\nx = 2\n>>>>>>> remote"))
DAMAGED = {
    "merge marks": (MERGE, "marks of a merge"),
    "merge marks inside a cell": (MERGED_INSIDE, "marks of a merge"),
    "empty": (b"", "is empty"),
    "blank": (b" \n", "is empty"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS"),
    "half a file": (FIRST[: len(FIRST) // 2], "not a notebook"),
    "cells of another kind": (FIRST.replace(b'"markdown"', b'"heading"'), "not a notebook"),
    "a list": (b"[]", "not a notebook"),
    "not text": (b"\xff\xfe\x00", "not a notebook"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_lecture_replaces_nothing_and_is_named(course, name):
    content, reason = DAMAGED[name]
    before = course.copy.read_bytes()
    written, [message] = course.update(content)
    assert written == [] and course.copy.read_bytes() == before
    assert reason in message and "stays as it is" in message and "git checkout" in message and "\n" not in message
    assert course.update(SECOND)[0] == [course.copy]  # mended, and the copy counts as untouched still


def test_a_damaged_lecture_is_not_copied(course):
    course.copy.unlink()
    written, [message] = course.update(b"")
    assert written == [] and not course.copy.exists() and "no copy" in message


def test_one_damaged_lecture_does_not_keep_the_others_back(course):
    (course.lectures / "02_other.ipynb").write_bytes(FIRST)
    written, messages = course.update(MERGE)
    assert [path.name for path in written] == ["02_other.ipynb"] and len(messages) == 1


# ---- What counts as touched ---------------------------------------------------------------------------------------

TOUCHES = {
    "a tag": lambda made: made["cells"][1]["metadata"].update(tags=["mine"]),
    "a slide mark": lambda made: made["cells"][0]["metadata"].update(slideshow={"slide_type": "slide"}),
    "a grade id": lambda made: made["cells"][1]["metadata"].update(nbgrader={"grade_id": "a", "points": 2}),
    "a folded cell": lambda made: made["cells"][1]["metadata"].update(jupyter={"source_hidden": True}),
    "metadata of the notebook": lambda made: made["metadata"].update(authors=[{"name": "Ada"}]),
    "another kernel": lambda made: made["metadata"]["kernelspec"].update(name="mine"),
    "an attachment": lambda made: made["cells"][0].update(attachments={"a.png": {"image/png": "AAAA"}}),
    "another cell id": lambda made: made["cells"][1].update(id="mine"),
    "the kind of a cell": lambda made: made["cells"][0].update(cell_type="raw"),
    "the order of cells": lambda made: made["cells"].reverse(),
    "a text": lambda made: made["cells"][0].update(source="# My topic"),
}


@pytest.mark.parametrize("name", TOUCHES)
def test_a_copy_with_any_change_is_never_overwritten(course, name):
    mine = course.edit(TOUCHES[name])
    written, [message] = course.update(SECOND)
    assert course.copy.read_bytes() == mine and written == [course.beside]
    assert "Yours is untouched" in message


RUNS = {
    "outputs": lambda made: made["cells"][1].update(outputs=[{"output_type": "stream", "name": "stdout", "text": "2"}]),
    "prompts": lambda made: made["cells"][1].update(execution_count=7),
    "the kernel's description": lambda made: made["metadata"].update(language_info={"version": "3.12.1"}),
    "the kernel's display name": lambda made: made["metadata"]["kernelspec"].update(
        display_name="Python 3 (ipykernel)"
    ),
    "times": lambda made: made["cells"][1]["metadata"].update(execution={"iopub.status.busy": "2026"}),
    "sources as strings": lambda made: [c.update(source="".join(c["source"])) for c in made["cells"]],
    "the format's minor version": lambda made: made.update(nbformat_minor=4),
}


@pytest.mark.parametrize("name", RUNS)
def test_running_and_saving_a_copy_is_not_touching_it(course, name):
    course.edit(RUNS[name])
    assert course.update(SECOND)[0] == [course.copy]
    assert "New." in course.sources(course.copy)


def test_a_copy_as_the_first_edition_made_it_follows_unless_it_was_opened(course):
    manifest = {NAME: {"file": hashlib.sha256(FIRST).hexdigest(), "cells": "of another kind"}}
    (course.workbook / workbook.MANIFEST).write_text(json.dumps(manifest))
    course.copy.write_bytes(FIRST)
    assert course.update(SECOND)[0] == [course.copy]
    (course.workbook / workbook.MANIFEST).write_text(json.dumps(manifest))
    course.copy.write_bytes(FIRST)
    mine = course.edit(TOUCHES["a tag"])
    course.update()
    assert course.copy.read_bytes() == mine and course.beside.exists()


# ---- Files that are not what they should be -----------------------------------------------------------------------


def test_a_workbook_that_is_a_file_is_a_sentence(tmp_path):
    made = Course(tmp_path)
    made.workbook.write_text("mine")
    with pytest.raises(Stop, match="is not a folder"):
        made.update()
    assert made.workbook.read_text() == "mine"


def test_a_copy_that_is_a_folder_is_a_sentence_and_the_others_follow(course):
    course.copy.unlink()
    course.copy.mkdir()
    (course.lectures / "02_other.ipynb").write_bytes(FIRST)
    written, [message] = course.update(SECOND)
    assert "is a folder" in message and [path.name for path in written] == ["02_other.ipynb"]


@pytest.mark.parametrize("name", [workbook.MANIFEST, workbook.NEWS])
def test_a_folder_where_the_course_writes_its_notes_is_a_sentence(course, name):
    (course.workbook / name).unlink(missing_ok=True)
    (course.workbook / name / "mine").mkdir(parents=True)
    with pytest.raises(Stop, match="cannot be read or written"):
        course.update(SECOND)


# ---- Said where the learner looks ---------------------------------------------------------------------------------


def test_what_an_update_did_stands_in_a_note_beside_the_copies(course):
    news = course.workbook / workbook.NEWS
    assert not news.exists()
    course.update(SECOND)
    first = news.read_text(encoding="utf-8")
    assert f"{NAME} has been updated" in first
    news.write_text(first + "\nA thought of mine.\n", encoding="utf-8")
    course.edit(TOUCHES["a tag"])
    course.update(FIRST)
    lines = news.read_text(encoding="utf-8").splitlines()
    assert course.beside.name in lines[0] and "has been updated" in lines[1] and "A thought of mine." in lines
    course.update()
    assert news.read_text(encoding="utf-8").splitlines() == lines


def test_a_note_in_any_encoding_keeps_every_byte(course):
    news = course.workbook / workbook.NEWS
    mine = "Grüße an mich\r\n".encode("latin-1") + b"\xff\x00"
    news.write_bytes(mine)
    course.update(SECOND)
    assert news.read_bytes().endswith(mine) and news.read_bytes() != mine


@pytest.mark.parametrize("place", ["notebook", "cell", "kernelspec", "tags"])
@pytest.mark.parametrize("value", [None, 5, "text"])
def test_a_copy_with_damaged_metadata_counts_as_touched(course, place, value):
    mine = json.loads(FIRST)
    if place == "notebook":
        mine["metadata"] = value
    elif place == "kernelspec":
        mine["metadata"]["kernelspec"] = value
    elif place == "cell":
        mine["cells"][0]["metadata"] = value
    else:
        mine["cells"][0]["metadata"]["tags"] = value
    content = json.dumps(mine).encode()
    course.copy.write_bytes(content)
    course.update(SECOND)
    assert course.copy.read_bytes() == content and course.beside.exists()


# ---- Solved exercises ---------------------------------------------------------------------------------------------


def test_a_solved_exercise_is_filled_into_the_new_version_and_the_old_file_is_untouched(course):
    mine = course.solve(1, SOLVED)
    _, [message] = course.update(SECOND)
    assert course.copy.read_bytes() == mine
    assert SOLVED in course.sources(course.beside) and "New." in course.sources(course.beside)
    assert "exercises 1A filled in" in message
    nbformat.validate(nbformat.read(course.beside, as_version=4))


def changed(stub=STUB, number="1A", name="softmax"):
    check = f'{name} = check("{number}", {name})'
    return lecture(text("# Topic"), text("New."), code(stub, number), code(check))


LONGER = STUB.replace(":\n", ':\n    """Say more."""\n', 1)


@pytest.mark.parametrize(
    ("new", "carried"),
    [
        (changed(LONGER), True),  # the stub has changed, the exercise is the same
        (changed(number="1B"), True),  # the same stub under another letter
        (changed(LONGER, "1B"), True),  # another letter and another stub: the name is the same
        (changed(LONGER.replace("softmax", "mask"), "1A", "mask"), False),  # the letter means something else now
    ],
    ids=["new stub", "new letter", "both", "another exercise"],
)
def test_an_answer_is_filled_in_only_where_the_same_thing_is_asked(course, new, carried):
    course.solve(1, SOLVED)
    course.update(new)
    assert (SOLVED in course.sources(course.beside)) == carried


@pytest.mark.parametrize("known", [True, False], ids=["with manifest", "without"])
def test_an_open_exercise_gets_the_new_stub(course, known):
    course.edit(TOUCHES["a slide mark"])
    if not known:
        (course.workbook / workbook.MANIFEST).unlink()
    _, [message] = course.update(changed(LONGER))
    assert LONGER in course.sources(course.beside) and "filled in" not in message


def test_a_first_edition_s_exercise_is_known_by_its_header(course):
    exercise = code(STUB, tags=["exercise"])
    header = text("#### Exercise 1.1: a softmax  (difficulty 1 of 5, 5 minutes)")
    check = code('softmax = check("1.1", softmax)')
    (course.workbook / workbook.MANIFEST).unlink()
    course.copy.write_bytes(lecture(header, exercise, check))
    course.solve(1, SOLVED)
    course.update(SECOND)
    assert SOLVED in course.sources(course.beside)


def test_what_was_solved_in_the_version_beside_is_carried_on(course):
    course.solve(1, SOLVED)
    course.update(SECOND)
    better, first = SOLVED + "  # better", course.beside
    course.solve(2, better, first)
    third = json.loads(SECOND)
    third["cells"].append(copy.deepcopy(third["cells"][1]))
    course.update(json.dumps(third).encode())
    [newest] = set(course.workbook.glob("*.new-*.ipynb")) - {first}
    assert better in course.sources(newest)
