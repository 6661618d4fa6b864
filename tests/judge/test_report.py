"""What a learner reads: the report of a check, how close is close enough, and the table of progress."""

import copy
import json

import nbclient
import nbformat
import numpy as np
import pytest

from attention.fundamentals import causal_mask
from utils.check import TOLERANCE, close, difference, progress
from utils.judge import progress as kept
from utils.judge import show, wire
from utils.judge.exercise import exercises, find
from utils.judge.faults import failed
from utils.judge.report import lines
from utils.judge.result import Mistake, Property
from utils.judge.show import where
from utils.paths import ROOT

SOFTMAX = next(exercise for exercise in exercises("01") if exercise.name == "softmax")

# --- the report ------------------------------------------------------------------------------------------------------


def unguarded(x, axis=-1):
    print("rows:", len(x))
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def test_a_report_names_each_property_an_example_and_the_mistake():
    assert (
        "\n".join(lines(SOFTMAX, SOFTMAX.judge(unguarded)))
        == """\
1A softmax
  each row becomes weights that sum to 1   yes
  axis chooses what sums to 1              yes
  scores of 1e4 and -1e4 do not overflow   yes
  a score of -inf gets the weight 0        yes
  a row of only -inf gives zeros, not nan  NO   row 1: expected [0., 0.], got [nan, nan]
  the float type of x is kept              NO   the same
  all at once, the axis in the middle      NO   at [1, 0, 0, 3]: expected 0., got nan
  leaves its arguments as they were        yes
  for example:
    x        = [[ 0.5,  1. ],
                [-inf, -inf]]
    expected = [[0.3775, 0.6225],
                [0.    , 0.    ]]
    got      = [[0.3775, 0.6225],
                [   nan,    nan]]
  it prints: rows: 2
3 of 8 properties fail. -inf minus -inf is nan, and so is 0/0: guard the row that has nothing to attend to."""
    )


@pytest.mark.slow
def test_the_reports_lines_fit_a_notebook():
    for exercise in exercises("01"):
        for mistake in exercise.mistakes:
            for line in "\n".join(lines(exercise, exercise.judge(mistake.answer))).split("\n"):
                assert len(line) <= 150, line


@pytest.mark.parametrize(
    ("got", "expected", "words"),
    [
        ([[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.25, 0.75]], "row 1: expected [0.25, 0.75], got [0.5, 0.5]"),
        ([0.5, 0.5], [0.25, 0.75], "expected [0.25, 0.75], got [0.5, 0.5]"),
        (0.5, 0.25, "expected 0.25, got 0.5"),
        (np.zeros((2, 2, 1)), np.eye(2)[..., None], "at [0, 0]: expected [1.], got [0.]"),
        (np.zeros((2, 9)), np.eye(2, 9, 3), "at [0, 3]: expected 1., got 0."),
        ([[True]], [[False]], "row 0: expected [False], got [ True]"),
        ([[-0.0, np.nan]], [[0.0, 1.0]], "row 0: expected [0., 1.], got [ 0., nan]"),
        ([[np.inf]], [[1.0]], "row 0: expected [1.], got [inf]"),
        ([-745984.408, 1.0], [200657.482, 1.0], "expected [2.01e5, 1], got [-7.46e5, 1]"),
        ([1 + 1e-7], [1.0], "expected [1.], got [1.0000001]"),
        ([1 + 1e-15], [1.0], "expected [1.], got values that differ by 1e-15"),
    ],
)
def test_the_place_and_both_values_are_shown(got, expected, words):
    assert where(np.array(got), np.array(expected)) == words


def test_in_a_notebook_the_learners_own_line_is_shown_by_its_number_within_the_cell():
    cells = [
        "import sys; sys.path.insert(0, '..')\nfrom utils.check import check",
        "def first(x):\n\n    return x.shape[9]",
        "def softmax(x, axis=-1):\n    return first(x)\n\nsoftmax = check('1A', softmax)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(ROOT / "tests")}}).execute()
    text = "".join(output.text for output in notebook.cells[-1].outputs)
    assert "NO   IndexError in line 3\n" in text
    assert "    line 3: return x.shape[9]\n    IndexError: tuple index out of range\n" in text


def test_a_line_of_the_courses_own_is_not_shown_as_the_learners():
    """What is called wrongly raises in attention/ or in utils/; the line is that of the call."""
    packed = find("6E")

    class Values(packed.reference()):
        def forward(self, x, starts):
            from attention.flash import flash_attention_torch

            q = x @ self.w_q
            return flash_attention_torch(q[None, 1:], q[None, 1:], q[None])[0]

    text = "\n".join(lines(packed, packed.judge(Values)))
    assert "return flash_attention_torch(q[None, 1:], q[None, 1:], q[None])[0]" in text
    assert "*args, **kwargs" not in text


def test_an_object_is_shown_without_its_address():
    assert show.text([object(), Property]) == "[<object object>, <class 'utils.judge.result.Property'>]"
    assert show.text(kept.__loader__) == "<SourceFileLoader object>"


def calls_a_lecture_wrongly(x, axis=-1):
    if axis == 0:
        causal_mask(-1, 0)
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def does_so_too(x, axis=-1):
    return x if axis == -1 else calls_a_lecture_wrongly(x, axis)


def two_properties(mistakes):
    """The first two properties of 1A. It is a copy, and not declared: 1A stays what it is."""
    exercise = copy.copy(SOFTMAX)
    exercise.properties, exercise.mistakes = SOFTMAX.properties[:2], mistakes
    return exercise


def test_an_exception_in_a_lectures_function_is_told_by_the_learners_line_and_with_the_propertys_hint():
    exercise = two_properties([])
    text = "\n".join(lines(exercise, exercise.judge(calls_a_lecture_wrongly)))
    assert ": causal_mask(-1, 0)\n    ValueError: n_queries and n_keys must not be negative" in text
    assert text.endswith("Which calls in your softmax take an axis?")


def test_a_mistake_that_ends_in_the_same_exception_is_named_only_if_it_was_wrong_as_the_answer_is_before():
    mistakes = [Mistake("It is this one.", calls_a_lecture_wrongly), Mistake("It is the other.", does_so_too)]
    assert "the other" not in two_properties(mistakes[1:]).judge(calls_a_lecture_wrongly).hint
    assert two_properties(mistakes).judge(calls_a_lecture_wrongly).hint == "It is this one."


def test_of_two_mistakes_that_fail_alike_the_one_is_named_that_explains_what_comes_later():
    def last_axis(x, axis=-1):
        powers = np.exp(x - x.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    def of_all(x, axis=-1):
        return last_axis(x) if x.ndim == 2 else np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    exercise = two_properties([Mistake("Of all.", of_all), Mistake("Of the last.", last_axis)])
    exercise.properties = [exercise.properties[1], SOFTMAX.properties[6]]  # the first one fails at axis=0 in both
    assert exercise.judge(last_axis).hint == "Of the last."
    exercise.mistakes = exercise.mistakes[::-1]
    assert exercise.judge(of_all).hint == "Of all."


def test_a_line_of_the_judge_is_not_shown_as_the_learners_whatever_the_path_it_was_imported_by():
    own = ROOT / "lectures" / ".." / "utils" / "judge" / "drivers.py"
    error = wire.Error("AttributeError", "'list' object has no attribute 'x'", [(str(own), 110)])
    assert str(failed(error)) == "AttributeError: 'list' object has no attribute 'x'"


# --- how close is close enough ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_the_tolerance_is_relative_to_the_largest_value(dtype):
    expected = np.array([1000.0, 1.0])
    step = np.array([0.0, 1000.0 * TOLERANCE[dtype]])
    assert close((expected + 0.5 * step).astype(dtype), expected.astype(dtype))
    assert not close((expected + 3 * step).astype(dtype), expected.astype(dtype))


def test_the_coarser_of_two_dtypes_counts():
    assert close(np.float32([1 / 3]), np.array([1 / 3]))
    assert close(np.array([1 / 3]), np.float32([1 / 3]))
    assert not close(np.float32([1 / 3]).astype(float), np.array([1 / 3]))


def test_integers_and_booleans_have_to_be_equal():
    assert close(np.array([1, 2]), np.array([1, 2])) and not close(np.array([1, 2]), np.array([1, 3]))
    assert close(np.array([True]), np.array([True])) and not close(np.array([True]), np.array([False]))


def test_nan_and_infinity_agree_only_with_themselves():
    assert difference([np.nan, np.inf, 1.0], [np.nan, np.inf, 1.0]) == 0
    for actual, expected in (([np.nan], [1.0]), ([1.0], [np.nan]), ([np.inf], [-np.inf]), ([1.0], [np.inf])):
        assert difference(actual, expected) == np.inf
    assert difference([np.inf, 1.0], [np.inf, 2.0]) == 0.5


def test_a_difference_from_zero_is_absolute():
    assert difference([1e-3], [0.0]) == 1e-3


def test_tensors_are_compared_too():
    import torch

    thirds = torch.full((3,), 1 / 3, dtype=torch.float64, requires_grad=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert close(thirds.to(dtype), thirds)
        assert not close(thirds.to(dtype) * 1.1, thirds.detach().numpy())


def test_arrays_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"actual has the shape \(2,\), expected \(2, 1\)"):
        close(np.zeros(2), np.zeros((2, 1)))


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.fixture
def workbook(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "WORKBOOK", tmp_path / "workbook")
    monkeypatch.setattr(kept, "_now", {})
    for folder in ("workbook", "lectures"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "workbook")
    return tmp_path / "workbook"


def test_progress_is_kept_in_the_workbook(workbook, monkeypatch, capsys):
    kept.record("1A", True)
    kept.record("1B", False)
    monkeypatch.setattr(kept, "_now", {})  # the notebook is started anew
    progress()
    table = capsys.readouterr().out
    assert "1A    softmax             essential  passed\n" in table
    assert "1B    causal_mask         useful     tried\n" in table
    assert "1C    attention_weights   essential  not attempted\n" in table
    assert table.endswith(f"1 of {sum(line.startswith('  ') for line in table.splitlines())} exercises passed.\n")
    assert [path.name for path in workbook.iterdir()] == ["progress.json"]


def test_progress_is_kept_nowhere_else(workbook, monkeypatch):
    monkeypatch.chdir(workbook.parent / "lectures")
    kept.record("1A", True)
    assert [path for path in workbook.parent.rglob("*") if path.is_file()] == []
    assert "softmax             essential  passed" in "\n".join(kept.table())


def test_what_was_passed_once_stays_passed(workbook):
    kept.record("1A", True)
    kept.record("1A", False)
    assert json.loads((workbook / "progress.json").read_text()) == {"1A": "passed"}


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"9.9": "passed"}'])
def test_a_damaged_file_is_no_obstacle(workbook, content):
    (workbook / "progress.json").write_text(content)
    kept.record("1A", True)
    assert json.loads((workbook / "progress.json").read_text())["1A"] == "passed"
