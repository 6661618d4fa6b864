"""What `check` prints and gives back, whatever is handed in; and the process behind it."""

import builtins
import copy
import importlib
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import types

import numpy as np
import pytest

from attention import fundamentals
from tests.judge import specimens
from tests.judge.test_hostile import HOSTILE, exits, never_ends, returns, stub
from utils.check import check
from utils.judge import packing, process, worker
from utils.judge.exercise import exercises
from utils.judge.faults import fault
from utils.judge.kernel import KernelExercise
from utils.judge.report import lines
from utils.judge.result import Failed, NotAttempted

by_number = {exercise.number: exercise for exercise in exercises("01")}


def report(exercise, answer, own=None):
    result = exercise.judge(answer, own)
    return result, "\n".join(lines(exercise, result))


def twin(function):
    """The same function, as a learner would have it: another object."""
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)


def test_the_courses_other_answers_may_be_used():
    softmax = by_number["1A"].reference()

    def attention_weights(q, k, mask=None, causal=False, scale=None):
        scores = q @ np.swapaxes(k, -1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            scores = np.where(np.tri(*scores.shape[-2:], scores.shape[-1] - scores.shape[-2]), scores, -np.inf)
        return softmax(scores if mask is None else np.where(mask, scores, -np.inf))

    result, text = report(by_number["1C"], attention_weights, by_number["1C"].reference())
    assert result.passed, text


def test_an_answer_that_cannot_be_copied_gets_a_sentence(capsys):
    lock = threading.Lock()
    check("1A", lambda x, axis=-1: lock)
    assert "cannot be copied" in capsys.readouterr().out


def test_an_answer_that_names_a_module_of_the_course_is_told_what_to_import(capsys):
    check("1A", lambda x, axis=-1: fundamentals.softmax(x, axis))
    assert "write `from attention.fundamentals import ...`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        ("1A", 3, "a function is expected, int was given"),
        ("1.99", stub, "There is no exercise '1.99': lecture 1 has 1A to 1H"),
        ("99.1", stub, "There is no exercise '99.1'"),
        (None, stub, "There is no exercise None"),
    ],
)
def test_bad_input_gets_a_sentence(number, answer, words, capsys):
    check(number, answer)
    assert words in capsys.readouterr().out


def test_a_kernel_passes_or_fails_by_its_properties():
    kernel = KernelExercise("0.1", "KERNEL", "none")

    @kernel.property("writes y", hint="Write to y[i].")
    def _(source, rng):
        if "y[i] =" not in source:
            raise Failed("y stays as it was")

    @kernel.property("compiles")
    def _(source, rng):
        if ";" not in source:
            raise fault(RuntimeError("line 1: expected ';'\n  y[i] = x[i]\n             ^"))

    assert report(kernel, "y[i] = x[i];")[0].passed
    assert report(kernel, "x[i] = y[i];")[1].endswith("1 of 2 properties fails. Write to y[i].")
    assert "line 1: expected ';'\n      y[i] = x[i]\n                 ^" in report(kernel, "y[i] = x[i]")[1]
    with pytest.raises(NotAttempted):
        kernel.judge("void f() {\n  // your code here\n}")


# --- what comes back -------------------------------------------------------------------------------------------------


@pytest.fixture
def course(monkeypatch):
    """Exercise 1A with a course's own softmax that is certainly there."""
    own = twin(by_number["1A"].oracle)
    monkeypatch.setattr(type(by_number["1A"]), "reference", lambda self: own)
    return own


def right_softmax(x, axis=-1):
    total = np.logaddexp.reduce(x, axis=axis, keepdims=True)
    return np.exp(x - np.where(np.isneginf(total), 0, total)).astype(x.dtype)


def test_a_right_answer_comes_back_itself(course, capsys):
    assert check("1A", right_softmax) is right_softmax
    assert re.search(r"\n(\d+) of \1 properties hold\.\n$", capsys.readouterr().out)


@pytest.mark.parametrize(
    "answer", [stub, returns(None), exits, "softmax"], ids=["stub", "wrong", "exits", "no function"]
)
def test_otherwise_the_courses_own_comes_back(course, answer, capsys):
    assert check("1A", answer) is course


def test_a_second_check_of_what_came_back_says_so(course, capsys):
    assert check("1A", check("1A", stub)) is course
    assert capsys.readouterr().out.splitlines()[1] == (
        "1A softmax: not attempted yet (this is the course's own softmax)"
    )


def test_after_a_failure_the_check_alone_says_what_to_run(course, capsys):
    assert check("1A", check("1A", returns(None))) is course
    assert capsys.readouterr().out.splitlines()[-1] == (
        "1A softmax: run the cell with your softmax again, then this one (this is the course's own)"
    )
    assert check("1A", check("1A", stub)) is course
    assert capsys.readouterr().out.splitlines()[-1].endswith("not attempted yet (this is the course's own softmax)")


def test_arrays_with_many_axes_are_told_by_their_shape():
    def fails(*args, **kwargs):
        raise ValueError

    leading = [prop for prop in by_number["1H"].properties if prop.name == "leading axes"]
    backward = copy.copy(by_number["1H"])  # not dataclasses.replace, which would declare a second 1H
    backward.properties = leading
    _, text = report(backward, fails)
    assert "q      = an array of shape (2, 3, 2, 2)" in text
    assert len(text.split("\n")) < 15


def test_without_the_courses_own_the_answer_comes_back(monkeypatch, capsys):
    def missing(self):
        raise ImportError

    monkeypatch.setattr(type(by_number["1A"]), "reference", missing)
    assert check("1A", stub) is stub
    assert "`python course.py build 01`" in capsys.readouterr().out


def test_a_fault_in_the_check_itself_does_not_stop_the_lecture(monkeypatch, capsys):
    monkeypatch.setattr(by_number["1A"], "oracle", lambda x, axis=-1: 1 / 0)
    assert check("1A", right_softmax) is right_softmax
    assert "The check 1A itself went wrong" in capsys.readouterr().out


def test_an_interrupt_stops_the_answer_and_the_next_check_works(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(process.worker, "_await", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check("1A", never_ends)
    assert by_number["1A"].judge(right_softmax).passed


def test_the_same_answer_gets_the_same_report():
    exercise = by_number["1C"]
    for answer in [exercise.mistakes[0].answer, returns(object()), HOSTILE["exception"][0]]:
        first, second = (report(exercise, answer)[1] for _ in range(2))
        assert first == second
        assert not re.search(r"0x[0-9a-f]{6,}", first)


def test_a_small_exercise_loads_nothing_large():
    process.worker.restart()

    def loaded(x, axis=-1):
        raise ValueError(f"loaded: {sum(name.startswith('tor') for name in sys.modules)}")

    assert "ValueError: loaded: 0" in report(by_number["1A"], loaded)[1]


def right_softmax_is_right():
    assert by_number["1A"].judge(right_softmax).passed


def test_a_process_that_was_ended_from_outside_is_replaced():
    right_softmax_is_right()
    process.worker._process.kill()
    process.worker._process.wait()
    assert by_number["1A"].judge(right_softmax).passed


def test_a_process_that_does_not_start_gets_a_sentence(monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path)
        patched.delenv("PYTHONPATH", raising=False)
        patched.setattr(process, "ROOT", tmp_path)  # the worker's own module is not found there
        process.worker.restart()
        _, text = report(by_number["1A"], right_softmax)
    assert "the process that tries answers did not get ready: check once more" in text
    assert by_number["1A"].judge(right_softmax).passed


def test_the_process_ends_with_the_notebook():
    """Even while an answer loops: the other end of its pipe closes."""
    ours = process.Worker()
    ours.start()
    ours.load(packing.pack(never_ends), "none", "f")
    process.pickle.dump(worker.Ask(99, packing.pack(((), {}))), ours._process.stdin)
    ours._process.stdin.flush()
    time.sleep(0.2)
    assert ours._process.poll() is None
    ours._process.stdin.close()
    assert ours._process.wait(timeout=60) == 0


def test_printing_is_captured_and_shown_in_one_line(capfd):
    def prints(x, axis=-1):
        builtins.print("the maximum is", x.max())
        os.write(1, b"past Python")
        return right_softmax(x, axis)

    result, text = report(by_number["1A"], prints)
    assert result.passed
    assert text.count("it prints: the maximum is 1.2") == 1
    assert capfd.readouterr().out == ""


def test_importing_the_judge_starts_no_process():
    code = "import psutil; import utils.check; import utils.judge.function; print(len(psutil.Process().children()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


# --- the function that was passed is judged --------------------------------------------------------------------------

RIGHT_MASK = """
import numpy as np
def shares(x, axis=-1):
    return halve(x, axis)
def halve(x, axis):
    return x / x.sum(axis, keepdims=True)
"""


@pytest.fixture
def my(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_answers.py").write_text(RIGHT_MASK)
    yield importlib.import_module("my_answers")
    sys.modules.pop("my_answers", None)


def edit(module, old, new):
    path = module.__file__
    text = open(path).read().replace(old, new)
    open(path, "w").write(text)
    os.utime(path, (time.time() + 5, time.time() + 5))
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        return importlib.reload(module)
    finally:
        sys.dont_write_bytecode = before


def test_an_answer_from_a_file_is_judged_as_it_is_after_a_reload(my):
    assert specimens.shares.judge(my.shares).passed
    wrong = edit(my, "x.sum(axis", "2 + x.sum(axis")
    assert not specimens.shares.judge(wrong.shares).passed
    assert specimens.shares.judge(edit(wrong, "2 + x.sum(axis", "x.sum(axis").shares).passed


def test_a_helper_from_a_file_is_judged_as_it_is_after_a_reload(my):
    def answer(x, axis=-1):
        return my.shares(x, axis)

    assert specimens.shares.judge(answer).passed
    edit(my, "x.sum(axis", "2 + x.sum(axis")
    assert not specimens.shares.judge(answer).passed


def test_a_class_from_a_file_is_judged_as_it_is_after_a_reload(my):
    my = edit(
        my,
        "def shares",
        textwrap.dedent("""
        import torch
        class Mix(torch.nn.Module):
            def __init__(self, d):
                super().__init__()
                self.first, self.second = torch.nn.Linear(d, d), torch.nn.Linear(d, d, bias=False)
            def forward(self, x):
                return self.first(x) * torch.sigmoid(self.second(x))
        def shares"""),
    )
    assert specimens.Mix.judge(my.Mix).passed
    assert not specimens.Mix.judge(edit(my, "torch.sigmoid", "torch.tanh").Mix).passed


# --- a stub is recognised by being the stub --------------------------------------------------------------------------


def test_a_solved_kernel_with_the_comment_still_above_the_code_is_judged():
    right = specimens.RIGHT_KERNEL
    with_comment = right.replace("  int i", "  // your code here\n  int i")
    assert specimens.scale.judge(with_comment, own=right).passed
    assert specimens.scale.judge(with_comment).passed
    for stub_of_it in (
        re.sub(r"  int i.*\n.*\n", "  // your code here\n", right),
        right.replace("if (i < n) y[i] = 2 * x[i];", "// your code here"),
    ):
        with pytest.raises(NotAttempted):
            specimens.scale.judge(stub_of_it, own=right)


def test_code_below_the_raise_is_told():
    def answer(x, axis=-1):
        raise NotImplementedError
        return x / x.sum(axis, keepdims=True)

    assert "`raise NotImplementedError` still stands before your code" in report(specimens.shares, answer)[1]


def test_an_answer_that_raises_not_implemented_somewhere_is_judged():
    def answer(x, axis=-1):
        if axis == 0:
            raise NotImplementedError("columns")
        return x / x.sum(axis, keepdims=True)

    result, text = report(specimens.shares, answer)
    assert [row.holds for row in result.rows[:2]] == [True, False] and "NotImplementedError" in text


def test_a_stub_with_given_lines_is_a_stub():
    def answer(x, axis=-1):
        total = x.sum(axis, keepdims=True)
        return x / total

    own = answer

    def answer(x, axis=-1):
        total = x.sum(axis, keepdims=True)  # noqa: F841
        raise NotImplementedError

    with pytest.raises(NotAttempted):
        specimens.shares.judge(answer, own)


# --- the harness's own errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["function", "kernel", "module", "step"])
def test_an_authors_bug_in_a_property_is_not_told_as_the_learners(kind, monkeypatch, capsys):
    exercise = {
        "function": specimens.shares,
        "kernel": specimens.scale,
        "module": specimens.Mix,
        "step": specimens.training_step,
    }[kind]
    answer = specimens.RIGHT_KERNEL if kind == "kernel" else getattr(exercise, "oracle", None)

    def broken(ask, rng):
        return undefined_name  # noqa: F821

    monkeypatch.setattr(exercise, "properties", [exercise.properties[0]._replace(holds=broken)])
    monkeypatch.setattr("utils.check.find", lambda number: exercise)
    check(exercise.number, answer)
    said = capsys.readouterr().out
    assert "itself went wrong (NameError" in said and "The answer was not judged." in said and "NO" not in said
