"""How one notebook is judged: what counts as its answer, what an answer earns, which inputs are drawn."""

import subprocess
import sys

import numpy as np
import pytest

from tests.teaching.submissions import SOLVED
from utils.judge import stub, walls
from utils.judge.asked import UNCHANGED
from utils.judge.exercise import SEED, find, random_for
from utils.judge.result import Property, Result, Row
from utils.teaching import sitting

DESK = sitting.Desk(("1A",), ("softmax", "causal_mask"), "fundamentals", ("import numpy as np",), "", 0, False)
OPEN = "def softmax(x, axis=-1):\n    raise NotImplementedError"


def answer(*cells):
    exercise = find("1A")
    return sitting.answer_in(list(cells), exercise, exercise.reference(), DESK)


def test_the_last_definition_that_is_not_the_stub_is_the_answer():
    assert SOLVED["1A"].startswith(answer(SOLVED["1A"], OPEN).text)
    assert answer("def softmax(x):\n    return 1", "def softmax(x):\n    return 2").text.endswith("return 2")
    assert stub.is_python_stub(answer(OPEN), find("1A").reference())


def test_what_the_notebook_lacks_comes_from_the_assignment_and_other_exercises_from_the_course():
    got = answer("def softmax(x):\n    return np.exp(x) * causal_mask(3)", "def causal_mask(n):\n    return 0")
    texts = [text.strip() for _, text in got.parts]
    assert texts[0] == "from attention.fundamentals import causal_mask" and "import numpy as np" in texts
    assert not any("def causal_mask" in text for text in texts)


def test_the_notebook_s_own_imports_come_before_the_assignment_s():
    assert [text.strip() for _, text in answer("np = 3\ndef softmax(x):\n    return np").parts] == [
        "np = 3\ndef softmax(x):\n    return np"
    ]


@pytest.mark.parametrize("cells", [[], ["def my_softmax(x):\n    return x"], ["x = (\nsoftmax = 3"]])
def test_no_answer_is_a_sentence(cells):
    with pytest.raises(LookupError, match="There is no softmax in the notebook"):
        answer(*cells)


@pytest.mark.parametrize(
    "number, rows, earned",
    [
        ("1A", [True] * 4, 1.0),
        ("1A", [True, True, False, None], 0.5),
        ("1F", [True, True, True, False], 0.5),  # two rows for right code, two bugs
        ("1F", [False, True, True, True], 0.0),
    ],
)
def test_what_an_answer_earns(number, rows, earned):
    assert sitting.share(find(number), Result(rows=[Row(str(i), holds) for i, holds in enumerate(rows)])) == earned


def test_to_leave_the_arguments_alone_earns_nothing_but_can_be_lost():
    rows = [Row("a", False), Row("b", False), Row(UNCHANGED, True)]
    assert sitting.share(find("1A"), Result(rows=rows)) == 0
    rows = [Row("a", True), Row(UNCHANGED, False)]
    assert sitting.share(find("1A"), Result(rows=rows)) == 0.5


def test_a_seed_draws_other_numbers_and_none_the_learner_s():
    prop = Property("each row becomes weights", None, "")
    seen = random_for(prop).random(4)
    token = SEED.set(7)
    try:
        assert not np.array_equal(random_for(prop).random(4), seen)
    finally:
        SEED.reset(token)
    assert np.array_equal(random_for(prop).random(4), seen)


@pytest.mark.parametrize("number", ["1A", "1C", "1D", "1E", "1F", "1G"])
def test_the_course_s_own_answer_holds_with_another_seed(number):
    token = SEED.set(20_260_101)
    try:
        exercise = find(number)
        assert exercise.judge(exercise.reference()).passed
    finally:
        SEED.reset(token)


@pytest.mark.skipif(not walls.version(), reason="this system has no Landlock")
def test_walls_leave_what_is_allowed_and_nothing_else(tmp_path):
    for name in ("read", "write", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("here")
    code = f"""
import sys
sys.path.insert(0, {str(sitting.ROOT)!r})
from pathlib import Path
from utils.judge import walls
walls.close([{str(tmp_path / "read")!r}], [{str(tmp_path / "write")!r}])
def works(action):
    try:
        action()
    except PermissionError:
        return False
    return True
for name in ("read", "write", "closed"):
    file = Path({str(tmp_path)!r}, name, "file")
    print(name, works(file.read_text), works(lambda: file.write_text("changed")), works(file.unlink))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["read True False False", "write True True True", "closed False False False"]
