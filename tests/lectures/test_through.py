"""The command that sends other answers through a notebook replaces each exercise's cell, and no other."""

import importlib

import nbformat
import pytest

from tests.lectures.through import with_other_answers
from utils.judge.exercise import exercises, lectures
from utils.paths import ROOT


@pytest.mark.parametrize("lecture", lectures())
def test_each_exercise_gets_another_answer(lecture):
    path = next((ROOT / "solutions").glob(f"{lecture}_*.ipynb"))
    kept = nbformat.read(path, as_version=4)
    notebook, replaced = with_other_answers(lecture, kept, style=1)
    assert replaced == [exercise.number for exercise in exercises(lecture)]
    changed = [new for old, new in zip(kept.cells, notebook.cells) if old.source != new.source]
    assert len(changed) == len(replaced)
    for cell, exercise in zip(changed, exercises(lecture)):
        room = {}
        exec(cell.source, room)
        right = importlib.import_module(f"tests.lectures.lecture_{lecture}.answers").RIGHT[exercise.number]
        assert room[exercise.name] is right[1 if len(right) > 1 else 0]
