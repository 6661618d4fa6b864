"""What a learner has passed is never lost, whatever has become of the file that keeps it."""

import os
import subprocess
import sys

import pytest

from utils.judge import progress as kept
from utils.paths import ROOT

DAMAGED = {
    "truncated": '{\n "1.1": "pas',
    "merge marks": '<<<<<<< ours\n{"1.1": "passed"}\n=======\n{}\n>>>>>>> theirs\n',
    "a list": '["1.1"]',
    "empty": "",
}


@pytest.fixture
def workbook(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "WORKBOOK", tmp_path)
    monkeypatch.setattr(kept, "_now", {})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_put_aside_and_not_overwritten(workbook, name):
    (workbook / "progress.json").write_text(DAMAGED[name], encoding="utf-8")
    (workbook / "progress.damaged.json").write_text("an earlier one", encoding="utf-8")
    kept.record("1.2", True)
    assert (workbook / "progress.damaged.json").read_text(encoding="utf-8") == "an earlier one"
    assert (workbook / "progress.damaged-2.json").read_text(encoding="utf-8") == DAMAGED[name]
    assert '"1.2": "passed"' in (workbook / "progress.json").read_text(encoding="utf-8")


def test_a_file_that_an_editor_gave_a_byte_order_mark_is_read(workbook):
    (workbook / "progress.json").write_text('{"1.1": "passed"}', encoding="utf-8-sig")
    kept.record("1.2", False)
    text = (workbook / "progress.json").read_text(encoding="utf-8")
    assert '"1.1": "passed"' in text and '"1.2": "tried"' in text


def test_a_folder_of_that_name_stays_and_nothing_is_left_beside_it(workbook):
    (workbook / "progress.json").mkdir()
    (workbook / "progress.json" / "mine.txt").write_text("x")
    kept.record("1.2", True)
    assert [path.name for path in workbook.rglob("mine.txt")] == ["mine.txt"]
    assert [path.name for path in workbook.iterdir() if path.name.split(".")[-1].isdigit()] == []


def test_a_class_has_a_workbook_for_each_learner(tmp_path):
    code = "from utils.judge import progress; progress.record('1A', True)"
    environment = {**os.environ, "COURSE_WORKBOOK": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert '"1A": "passed"' in (tmp_path / "progress.json").read_text(encoding="utf-8")
