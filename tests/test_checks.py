"""Every exercise's check: right answers pass, wrong ones fail with words that help, and no answer does any harm."""

import builtins
import dataclasses
import importlib
import itertools
import os
import re
import sys
import threading
import time
import types

import numpy as np
import pytest

from attention import fundamentals
from utils.check import check, close
from utils.checks import Exercise, Failed, exercises, lectures, process
from utils.checks import exercise as declare
from utils.checks.report import lines
from utils.checks.show import where
from utils.checks.trial import UNCHANGED, NotAttempted, try_answer

EXERCISES = [exercise for lecture in lectures() for exercise in exercises(lecture)]
FUNCTIONS = [exercise for exercise in EXERCISES if exercise.oracle]
by_number = {exercise.number: exercise for exercise in EXERCISES}
ANSWERS = [importlib.import_module(f"tests.answers.lecture_{lecture}") for lecture in lectures()]
numbers = pytest.mark.parametrize("exercise", FUNCTIONS, ids=lambda e: e.number)


def answers(kind):
    return [
        (number, answer) for module in ANSWERS for number, given in getattr(module, kind).items() for answer in given
    ]


def report(exercise, answer, own=None):
    result = try_answer(exercise, answer, own)
    return result, "\n".join(lines(exercise, result))


def twin(function):
    """The same function, as a learner would have it: another object."""
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)


# --- right and wrong answers -----------------------------------------------------------------------------------------


def test_every_exercise_has_enough_answers_to_be_tested_with():
    assert len(EXERCISES) >= 7
    for exercise in EXERCISES:
        assert len(exercise.properties) >= 4
        assert len([1 for number, _ in answers("WRONG") if number == exercise.number]) >= 3
        assert len([1 for number, _ in answers("RIGHT") if number == exercise.number]) >= 1


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.number)
def test_the_courses_own_answer_passes(exercise):
    own = exercise.reference()
    result, text = report(exercise, own if isinstance(own, str) else twin(own))
    assert result.passed, text


@pytest.mark.parametrize(("number", "answer"), answers("RIGHT"), ids=lambda a: getattr(a, "__name__", a))
def test_a_right_answer_written_differently_passes(number, answer):
    result, text = report(by_number[number], answer)
    assert result.passed, text


CALLS = {number: calls for module in ANSWERS for number, calls in module.CALLS.items()}


@pytest.mark.parametrize(
    ("number", "answer"), [pair for pair in answers("RIGHT") if callable(pair[1])], ids=lambda a: getattr(a, "__name__", a)
)
def test_a_right_answer_can_take_the_references_place_in_the_lecture(number, answer):
    """Called as the lecture calls it, it gives what the lecture goes on with."""
    if number == "1.9":
        assert {place in answer() for place in range(5)} == {True, False}
        return
    for args, kwargs in CALLS[number]:
        expected = by_number[number].reference()(*args, **kwargs)
        got = answer(*args, **kwargs)
        if not isinstance(expected, tuple):
            expected, got = [expected], [got]
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected):
            assert type(ours) is type(theirs) and ours.dtype == theirs.dtype
            assert close(ours, theirs)


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [(number, *pair) for number, pair in answers("WRONG")],
    ids=lambda a: getattr(a, "__name__", None),
)
def test_a_wrong_answer_fails_with_words_that_help(number, answer, words):
    result, text = report(by_number[number], answer)
    assert not result.passed
    assert words in text


@pytest.mark.parametrize(
    ("exercise", "mistake"),
    [(exercise, mistake) for exercise in FUNCTIONS for mistake in exercise.mistakes],
    ids=lambda a: getattr(a, "number", None) or a.message[:40],
)
def test_a_known_mistake_is_named(exercise, mistake):
    result, text = report(exercise, mistake.answer)
    assert not result.passed
    assert text.endswith(mistake.message)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.number)
def test_each_property_is_needed(exercise):
    """A property that no wrong answer fails proves nothing."""
    wrong = [mistake.answer for mistake in exercise.mistakes]
    wrong += [answer for number, (answer, _) in answers("WRONG") if number == exercise.number]
    failed = {row.name for answer in wrong for row in try_answer(exercise, answer).rows if row.holds is False}
    assert {prop.name for prop in exercise.properties} <= failed


# --- answers that are no answers -------------------------------------------------------------------------------------


def stub(*args, **kwargs):
    raise NotImplementedError


def returns(value):
    return lambda *args, **kwargs: value


class AlwaysRight(np.ndarray):
    """Agrees with everything."""

    def __eq__(self, other):
        return True

    def __array__(self, *args, **kwargs):
        raise RuntimeError("no")

    def __sub__(self, other):
        return np.zeros(np.shape(other))


class Pretender:
    shape, dtype, ndim = (2, 2), np.dtype(float), 2

    def __eq__(self, other):
        return True

    def __array__(self, *args, **kwargs):
        return np.zeros((2, 2))


def shaped_nan(*args, **kwargs):
    return np.full((2, 3), np.nan)


def raises_without_words(*args, **kwargs):
    class Odd(Exception):
        def __str__(self):
            raise ValueError

    raise Odd


def exits(*args, **kwargs):
    sys.exit(3)


def leaves(*args, **kwargs):
    os._exit(0)


def crashes(*args, **kwargs):
    os.abort()


def never_ends(*args, **kwargs):
    while True:
        pass


def prints_for_ever(*args, **kwargs):
    for i in itertools.count():
        print("line", i)


def takes_all_memory(*args, **kwargs):
    kept = []
    while True:
        kept.append(np.ones(10_000_000))


def asks_the_keyboard(*args, **kwargs):
    return input("a number, please")


def never_returns_from_recursion(*args, **kwargs):
    return never_returns_from_recursion(*args, **kwargs)


def objects(*args, **kwargs):
    return np.array([{}, None], dtype=object)


def tensor(*args, **kwargs):
    import torch

    return torch.zeros(2, 2)


def too_many(*args, **kwargs):
    return tuple(range(9))


HOSTILE = {
    "None": (returns(None), "returned nothing (None)"),
    "a tensor": (tensor, "expected"),
    "a string": (returns("weights"), "returned a str"),
    "a dictionary": (returns({}), "returned a dict"),
    "a number": (returns(0.5), "returned a float"),
    "nan": (shaped_nan, "NO"),
    "an array of objects": (objects, "things that are not numbers"),
    "a subclass that agrees with everything": (lambda *a, **k: np.zeros((2, 2)).view(AlwaysRight), "an AlwaysRight"),
    "an object that agrees with everything": (lambda *a, **k: Pretender(), "a Pretender"),
    "its first argument": (lambda first, *a, **k: first, "NO"),
    "a long tuple": (too_many, "a tuple of 9"),
    "exception": (lambda *a, **k: 1 / 0, "ZeroDivisionError"),
    "exception without words": (raises_without_words, "Odd"),
    "wrong signature": (lambda *, unknown: None, "TypeError"),
    "sys.exit": (exits, "SystemExit"),
    "input": (asks_the_keyboard, "EOFError"),
    "recursion": (never_returns_from_recursion, "RecursionError"),
}
FATAL = {
    "os._exit": (leaves, "it ended its Python process"),
    "crash": (crashes, "it ended its Python process"),
    "loop": (never_ends, "it did not finish within"),
    "printing loop": (prints_for_ever, "it did not finish within"),
}


@numbers
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_answer_gets_a_sentence(exercise, case):
    answer, words = HOSTILE[case]
    result, text = report(exercise, answer)
    assert not result.passed
    assert words in text
    assert "Traceback" not in text


@numbers
@pytest.mark.parametrize("case", FATAL)
def test_an_answer_that_ends_its_process_or_never_ends_is_survived(exercise, case, monkeypatch):
    answer, words = FATAL[case]
    if "loop" in case:
        monkeypatch.setattr(process, "TIME_LIMIT", 0.2)
    result, text = report(exercise, answer)
    assert result.rows[0].holds is False
    assert {row.holds for row in result.rows[1:]} == {None}
    assert words in text
    monkeypatch.setattr(process, "TIME_LIMIT", 10)
    assert try_answer(exercise, exercise.oracle).rows[0].holds, "the next check works again"


def test_an_answer_that_takes_all_memory_is_stopped(monkeypatch):
    monkeypatch.setattr(process, "MEMORY_LIMIT", 2**28)
    _, text = report(by_number["1.1"], takes_all_memory)
    assert "GB of memory" in text


@numbers
def test_a_stub_is_not_attempted(exercise, capsys):
    with pytest.raises(NotAttempted):
        try_answer(exercise, stub)
    check(exercise.number, stub)
    assert capsys.readouterr().out.splitlines()[0] == f"{exercise.number} {exercise.name}: not attempted yet"


@numbers
def test_an_argument_changed_in_place_is_named(exercise):
    def spoils(*args, **kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, np.ndarray):
                value.flat[0] = 1 - value.flat[0]

    result, text = report(exercise, spoils)
    takes_arrays = any(isinstance(value, np.ndarray) for value in result.example.arguments.values())
    assert ("in place" in text) == takes_arrays


@numbers
def test_the_courses_own_answer_cannot_be_called(exercise, monkeypatch):
    monkeypatch.setattr(process, "TIME_LIMIT", 60)  # to import a whole lecture takes its time
    module, name = f"attention.{exercise.module}", exercise.name
    own = exercise.reference()

    def imports_it(*args, **kwargs):
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    def calls_it(*args, **kwargs):
        return own(*args, **kwargs)

    for answer in (imports_it, calls_it):
        _, text = report(exercise, answer, own)
        assert f"it calls the course's own {name}: write yours" in text


def test_the_courses_other_answers_may_be_used():
    softmax = by_number["1.1"].reference()

    def attention_weights(q, k, mask=None, causal=False, scale=None):
        scores = q @ np.swapaxes(k, -1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            scores = np.where(np.tri(*scores.shape[-2:], scores.shape[-1] - scores.shape[-2]), scores, -np.inf)
        return softmax(scores if mask is None else np.where(mask, scores, -np.inf))

    result, text = report(by_number["1.5"], attention_weights, by_number["1.5"].reference())
    assert result.passed, text


@numbers
def test_every_call_gets_fresh_arguments(exercise):
    """An answer that spoils its arguments after it has computed them is still right in all other properties."""
    oracle = exercise.oracle

    def spoils(*args, **kwargs):
        result = oracle(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, np.ndarray):
                value[...] = 0
        return result

    rows = try_answer(exercise, spoils).rows
    plain = try_answer(exercise, oracle).rows
    assert [row for row in rows if row.name != UNCHANGED] == [row for row in plain if row.name != UNCHANGED]


def test_an_answer_that_cannot_be_copied_gets_a_sentence(capsys):
    lock = threading.Lock()
    check("1.1", lambda x, axis=-1: lock)
    assert "cannot be copied" in capsys.readouterr().out


def test_an_answer_that_names_a_module_of_the_course_is_told_what_to_import(capsys):
    check("1.1", lambda x, axis=-1: fundamentals.softmax(x, axis))
    assert "write `from attention.fundamentals import ...`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "answer", "words"),
    [
        ("1.1", 3, "a function is expected, int was given"),
        ("1.99", stub, "There is no exercise '1.99': lecture 1 has 1.1 to"),
        ("99.1", stub, "There is no exercise '99.1'"),
        (1.1, stub, "There is no exercise 1.1"),
        (None, stub, "There is no exercise None"),
    ],
)
def test_bad_input_gets_a_sentence(number, answer, words, capsys):
    check(number, answer)
    assert words in capsys.readouterr().out


def test_a_kernel_passes_or_fails_by_its_properties():
    kernel = Exercise("0.1", "KERNEL", "none")

    @kernel.property("writes y", hint="Write to y[i].")
    def _(source, rng):
        if "y[i] =" not in source:
            raise Failed("y stays as it was")

    @kernel.property("compiles")
    def _(source, rng):
        if ";" not in source:
            raise RuntimeError("line 1: expected ';'\n  y[i] = x[i]\n             ^")

    assert report(kernel, "y[i] = x[i];")[0].passed
    assert report(kernel, "x[i] = y[i];")[1].endswith("1 of 2 properties fails. Write to y[i].")
    assert "line 1: expected ';'\n      y[i] = x[i]\n                 ^" in report(kernel, "y[i] = x[i]")[1]
    with pytest.raises(NotAttempted):
        try_answer(kernel, "void f() {\n  // your code here\n}")


# --- what comes back -------------------------------------------------------------------------------------------------


@pytest.fixture
def course(monkeypatch):
    """Exercise 1.1 with a course's own softmax that is certainly there."""
    own = twin(by_number["1.1"].oracle)
    monkeypatch.setattr(type(by_number["1.1"]), "reference", lambda self: own)
    return own


def right_softmax(x, axis=-1):
    total = np.logaddexp.reduce(x, axis=axis, keepdims=True)
    return np.exp(x - np.where(np.isneginf(total), 0, total)).astype(x.dtype)


def test_a_right_answer_comes_back_itself(course, capsys):
    assert check("1.1", right_softmax) is right_softmax
    assert capsys.readouterr().out.endswith("7 of 7 properties hold.\n")


@pytest.mark.parametrize(
    "answer", [stub, returns(None), exits, "softmax"], ids=["stub", "wrong", "exits", "no function"]
)
def test_otherwise_the_courses_own_comes_back(course, answer, capsys):
    assert check("1.1", answer) is course


def test_a_second_check_of_what_came_back_says_so(course, capsys):
    assert check("1.1", check("1.1", stub)) is course
    assert capsys.readouterr().out.splitlines()[1] == (
        "1.1 softmax: not attempted yet (this is the course's own softmax)"
    )


def test_after_a_failure_the_check_alone_says_what_to_run(course, capsys):
    assert check("1.1", check("1.1", returns(None))) is course
    assert capsys.readouterr().out.splitlines()[-1] == (
        "1.1 softmax: run the cell with your softmax again, then this one (this is the course's own)"
    )
    assert check("1.1", check("1.1", stub)) is course
    assert capsys.readouterr().out.splitlines()[-1].endswith("not attempted yet (this is the course's own softmax)")


def test_the_courses_load_tile_is_not_shown():
    for places in (set(), {1}, {3}):
        _, text = report(by_number["1.9"], lambda places=places: places)
        assert "(in load_tile)" in text and "tile[r" not in text
        assert "k_tile[threadIdx.x * d + t]" in text, "the kernel of the exercise itself is quoted"


def test_arrays_with_many_axes_are_told_by_their_shape():
    def fails(*args, **kwargs):
        raise ValueError

    leading = [prop for prop in by_number["1.6"].properties if prop.name == "leading axes"]
    _, text = report(dataclasses.replace(by_number["1.6"], properties=leading), fails)
    assert "q      = an array of shape (2, 2, 2, 2)" in text
    assert len(text.split("\n")) < 15


def test_without_the_courses_own_the_answer_comes_back(monkeypatch, capsys):
    def missing(self):
        raise ImportError

    monkeypatch.setattr(type(by_number["1.1"]), "reference", missing)
    assert check("1.1", stub) is stub
    assert "`python course.py build 01`" in capsys.readouterr().out


def test_a_fault_in_the_check_itself_does_not_stop_the_lecture(monkeypatch, capsys):
    monkeypatch.setattr(by_number["1.1"], "oracle", lambda x, axis=-1: 1 / 0)
    assert check("1.1", right_softmax) is right_softmax
    assert "The check 1.1 itself went wrong" in capsys.readouterr().out


def test_an_interrupt_stops_the_answer_and_the_next_check_works(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(process.worker, "_wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check("1.1", never_ends)
    assert try_answer(by_number["1.1"], right_softmax).passed


def test_the_same_answer_gets_the_same_report():
    exercise = by_number["1.5"]
    for answer in [exercise.mistakes[0].answer, returns(object()), HOSTILE["exception"][0]]:
        first, second = (report(exercise, answer)[1] for _ in range(2))
        assert first == second
        assert not re.search(r"0x[0-9a-f]{6,}", first)


def test_checks_are_quick():
    for exercise in FUNCTIONS:
        try_answer(exercise, exercise.oracle)
        start = time.perf_counter()
        try_answer(exercise, exercise.oracle)
        assert time.perf_counter() - start < 1.0  # 0.05 s on two quiet cores; tests may share them


def test_a_small_exercise_loads_nothing_large():
    process.worker.restart()

    def loaded(x, axis=-1):
        raise ValueError(f"loaded: {sum(name.startswith('tor') for name in sys.modules)}")

    assert "ValueError: loaded: 0" in report(by_number["1.1"], loaded)[1]


def test_a_process_that_was_ended_from_outside_is_replaced():
    process.worker._process.kill()
    process.worker._process.wait()
    assert try_answer(by_number["1.1"], right_softmax).passed


def test_a_process_that_does_not_start_gets_a_sentence(monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path)
        patched.delenv("PYTHONPATH", raising=False)
        patched.setattr(process, "ROOT", tmp_path)  # the worker's own module is not found there
        process.worker.restart()
        _, text = report(by_number["1.1"], right_softmax)
    assert "the process that tries answers did not get ready: check once more" in text
    assert try_answer(by_number["1.1"], right_softmax).passed


def test_the_process_ends_with_the_notebook():
    """Even while an answer loops: the other end of its pipe closes."""
    worker = process.Worker()
    worker.start()
    request = process.request(process.pack(never_ends, None, "f"), (), {}, "none", "f")
    worker.get_ready(request)
    process.pickle.dump(request, worker._process.stdin)
    worker._process.stdin.flush()
    time.sleep(0.2)
    assert worker._process.poll() is None
    worker._process.stdin.close()
    assert worker._process.wait(timeout=10) == 0


def test_an_exercise_may_take_and_return_tensors():
    import torch

    @declare("0.2", "none")
    def double(x, times=2):
        return times * np.asarray(x)

    @double.property("doubles")
    def _(ask, rng):
        ask(torch.from_numpy(rng.normal(size=(2, 3))))
        ask(torch.ones(2, dtype=torch.float32))

    @double.mistake("That is the square.")
    def _(x, times=2):
        return x * x

    assert report(double, lambda x: x + x)[0].passed
    assert report(double, lambda x: x**2)[1].endswith("1 of 2 properties fails. That is the square.")
    assert "returned a NumPy array, expected a tensor of shape (2, 3)" in report(double, lambda x: 2 * x.numpy())[1]
    assert "it changes `x` in place" in report(double, lambda x: x.mul_(2))[1]


def test_a_kernel_is_run_and_its_faults_are_told():
    from utils import cuda

    kernel = Exercise("0.3", "SCALE", "none")

    @kernel.property("every element, and nothing beyond the last")
    def _(source, rng):
        x, y = np.arange(40, dtype=np.float32), np.zeros(40, dtype=np.float32)
        cuda.compile(source)[2, 32](x, y, 40)
        if not close(y, 2 * x):
            raise Failed(where(y, 2 * x))

    right = """
    __global__ void scale(const float* x, float* y, int n) {
      int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i < n) y[i] = 2 * x[i];
    }"""
    assert report(kernel, right)[0].passed
    assert "at [20]: expected 40., got 60." in report(kernel, right.replace("2 * x", "3 * x"))[1]
    assert "OUT OF BOUNDS read of 4 bytes at x[40]" in report(kernel, right.replace("if (i < n)", ""))[1]
    assert "line 4" in report(kernel, right.replace("2 * x", "2 x"))[1]


def test_printing_is_captured_and_shown_in_one_line(capfd):
    def prints(x, axis=-1):
        builtins.print("the maximum is", x.max())
        os.write(1, b"past Python")
        return right_softmax(x, axis)

    result, text = report(by_number["1.1"], prints)
    assert result.passed
    assert text.count("it prints: the maximum is 1.2") == 1
    assert capfd.readouterr().out == ""
