"""A learner's work is never lost: what `workbook.update` does to copies that were edited, run, deleted, left alone."""

import json

import pytest

from utils.setup import workbook

NAME = "01_topic.ipynb"


def notebook(*sources, outputs=()):
    """The bytes of a notebook with these code cells."""
    cells = [{"cell_type": "code", "source": [source], "outputs": list(outputs)} for source in sources]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}).encode()


@pytest.fixture
def course(tmp_path):
    """A course with one lecture, and `update()` as `course.py lab` calls it."""

    class Course:
        lectures, copies = tmp_path / "lectures", tmp_path / "workbook"
        lecture, copy = lectures / NAME, copies / NAME

        def update(self):
            return workbook.update(self.lectures, self.copies)

        def new_versions(self):
            return sorted(self.copies.glob("*.new-*.ipynb"))

    Course.lectures.mkdir()
    Course.lecture.write_bytes(notebook("version = 1"))
    return Course()


def test_first_use_copies_every_lecture_silently(course):
    written, messages = course.update()
    assert written == [course.copy] and messages == []
    assert course.copy.read_bytes() == course.lecture.read_bytes()


def test_without_news_nothing_is_written(course):
    course.update()
    course.copy.write_bytes(notebook("mine"))
    assert course.update() == ([], [])
    assert course.copy.read_bytes() == notebook("mine")


def test_an_untouched_copy_follows_the_course(course):
    course.update()
    course.lecture.write_bytes(notebook("version = 2"))
    written, messages = course.update()
    assert written == [course.copy] and len(messages) == 1
    assert course.copy.read_bytes() == notebook("version = 2")


def test_running_a_copy_is_not_editing_it(course):
    course.update()
    course.copy.write_bytes(notebook("version = 1", outputs=[{"output_type": "stream", "text": "1"}]))
    course.lecture.write_bytes(notebook("version = 2"))
    course.update()
    assert course.copy.read_bytes() == notebook("version = 2")


def test_an_edited_copy_stays_and_the_new_version_goes_beside_it(course):
    course.update()
    course.copy.write_bytes(notebook("mine"))
    course.lecture.write_bytes(notebook("version = 2"))
    written, messages = course.update()
    assert course.copy.read_bytes() == notebook("mine")
    assert written == course.new_versions() and written[0].read_bytes() == notebook("version = 2")
    assert NAME in messages[0] and written[0].name in messages[0]


def test_a_new_version_is_offered_once(course):
    course.update()
    course.copy.write_bytes(notebook("mine"))
    course.lecture.write_bytes(notebook("version = 2"))
    course.update()
    assert course.update() == ([], [])


def test_two_updates_on_one_day_overwrite_nothing(course):
    course.update()
    course.copy.write_bytes(notebook("mine"))
    for version in (2, 3, 4):
        course.lecture.write_bytes(notebook(f"version = {version}"))
        course.update()
    contents = [path.read_bytes() for path in course.new_versions()]
    assert sorted(contents) == [notebook(f"version = {version}") for version in (2, 3, 4)]
    assert course.copy.read_bytes() == notebook("mine")


def test_new_outputs_alone_are_no_reason_to_bother_someone_who_edited(course):
    course.update()
    course.copy.write_bytes(notebook("mine"))
    course.lecture.write_bytes(notebook("version = 1", outputs=[{"output_type": "stream", "text": "1"}]))
    assert course.update() == ([], [])
    assert course.copy.read_bytes() == notebook("mine")


@pytest.mark.parametrize("damage", [b"", b"not json", b"[1]", b'{"01_topic.ipynb": 5}'])
def test_without_a_readable_manifest_every_copy_counts_as_edited(course, damage):
    course.update()
    (course.copies / workbook.MANIFEST).write_bytes(damage)
    course.copy.write_bytes(notebook("mine"))
    course.update()
    assert course.copy.read_bytes() == notebook("mine")
    assert len(course.new_versions()) == 1


def test_an_interrupted_refresh_is_no_edit(course):
    course.update()
    course.lecture.write_bytes(notebook("version = 2"))
    course.copy.write_bytes(notebook("version = 2"))  # written, but the manifest was not
    assert course.update() == ([], [])
    course.lecture.write_bytes(notebook("version = 3"))
    course.update()
    assert course.copy.read_bytes() == notebook("version = 3")


def test_a_deleted_copy_comes_back_fresh(course):
    course.update()
    course.copy.unlink()
    course.update()
    assert course.copy.read_bytes() == course.lecture.read_bytes()


@pytest.mark.parametrize("content", [b"<<<<<<< mine", b"{}", b"[]", b'{"cells": [1]}'])
def test_a_copy_that_is_no_notebook_any_more_counts_as_edited(course, content):
    course.update()
    course.copy.write_bytes(content)
    course.lecture.write_bytes(notebook("version = 2"))
    course.update()
    assert course.copy.read_bytes() == content
    assert len(course.new_versions()) == 1


def test_the_learners_own_files_are_left_alone(course):
    course.copies.mkdir()
    own = course.copies / "notes.ipynb"
    own.write_bytes(notebook("mine"))
    course.update()
    course.lecture.unlink()
    course.update()
    assert own.read_bytes() == notebook("mine") and course.copy.exists()


def test_a_copy_has_the_folder_depth_of_its_lecture(course):
    course.update()
    assert course.copy.parent.parent == course.lecture.parent.parent  # sys.path.insert(0, "..") finds the course
