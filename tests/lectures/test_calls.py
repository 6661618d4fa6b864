"""A keyword that a lecture gives to a learner's function or layer is one that the check gives, too.

Otherwise an answer without it passes, and the lecture breaks on it. Read from the code: nothing is run.
"""

import ast
import inspect
import textwrap

import nbformat
import pytest

from utils.judge.exercise import exercises, lectures
from utils.paths import ROOT

ALL = [exercise for number in lectures() for exercise in exercises(number)]


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keywords(found):
    return {keyword.arg for call in found for keyword in call.keywords if keyword.arg}


def in_the_lecture(exercise):
    """The keywords of the calls of an exercise's function in the code of its lecture; of a class, of its instances' calls."""
    (path,) = (ROOT / "solutions").glob(f"{exercise.number[:-1].zfill(2)}_*.ipynb")
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    trees = [ast.parse(cell) for cell in cells if not cell.lstrip().startswith(("%", "!"))]
    names = {exercise.name}
    if f"class {exercise.name}" in "\n".join(cells):
        names = {name for tree in trees for name in _made_of(exercise.name, tree)}
    return keywords(c for tree in trees for c in calls(tree) if isinstance(c.func, ast.Name) and c.func.id in names)


def _made_of(name, tree):
    """Names that are given what comes from a call of the class alone: `a, b = other(), Layer(8)` gives b."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        target, value = node.targets[0], node.value
        pairs = (
            zip(target.elts, value.elts)
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            else [(target, value)]
        )
        for one, made in pairs:
            if isinstance(one, ast.Name) and any(
                isinstance(c.func, ast.Name) and c.func.id == name for c in calls(made)
            ):
                yield one.id


def in_the_check(exercise):
    """The keywords of the calls of `ask`, and of its methods, in the exercise's properties."""
    found = set()
    for prop in exercise.properties:
        tree = ast.parse(textwrap.dedent(inspect.getsource(prop.holds)))
        found |= keywords(call for call in calls(tree) if "ask" in ast.unparse(call.func).split("."))
    return found


def test_both_sides_are_read():
    found = {exercise.number: (in_the_lecture(exercise), in_the_check(exercise)) for exercise in ALL}
    assert "causal" in found["12C"][0] and {"causal", "make"} <= found["12C"][1]
    assert sum(bool(lecture) for lecture, _ in found.values()) >= 10


@pytest.mark.parametrize("exercise", ALL, ids=lambda exercise: exercise.number)
def test_what_the_lecture_asks_by_name_the_check_asks(exercise):
    assert in_the_lecture(exercise) - in_the_check(exercise) == set()
