"""Answers that are no answers, thrown at one specimen of each kind: each gets a sentence, none does any harm."""

import importlib
import itertools
import os
import sys
import time

import numpy as np
import pytest
import torch

from tests.judge import specimens
from utils.judge import process
from utils.judge.asked import AGAIN, KEEPS_SOMETHING, UNCHANGED
from utils.judge.report import lines
from utils.judge.result import NotAttempted

SPECIMENS = {
    "array": specimens.shares,
    "tuple": specimens.extremes,
    "tensor": specimens.double,
    "step": specimens.training_step,
    "test": specimens.test_triangle,
}
each = pytest.mark.parametrize("exercise", SPECIMENS.values(), ids=SPECIMENS)
functions = pytest.mark.parametrize("exercise", list(SPECIMENS.values())[:3], ids=list(SPECIMENS)[:3])


def report(exercise, answer, own=None):
    result = exercise.judge(answer, own)
    return result, "\n".join(lines(exercise, result))


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


@functions
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_answer_gets_a_sentence(exercise, case):
    answer, words = HOSTILE[case]
    result, text = report(exercise, answer)
    assert not result.passed
    assert words in text or exercise.returns and "expected the tuple" in text or "expected a tensor" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("exercise", "case"),
    [(specimens.shares, case) for case in FATAL] + [(e, "os._exit") for e in list(SPECIMENS.values())[1:]],
    ids=lambda value: getattr(value, "number", value),
)
def test_an_answer_that_ends_its_process_or_never_ends_is_survived(exercise, case, monkeypatch):
    answer, words = FATAL[case]
    if "loop" in case:
        monkeypatch.setattr(process, "TIME_LIMIT", 0.3)
    result, text = report(exercise, answer)
    assert result.rows[0].holds is False
    assert words in text
    assert "yes" not in text
    monkeypatch.setattr(process, "TIME_LIMIT", 10)
    assert exercise.judge(exercise.oracle).passed, "the next check works again"


@pytest.mark.parametrize(
    "make", [lambda **k: None, lambda **k: 1 / 0, lambda **k: os._exit(0)], ids=["None", "raises", "exits"]
)
def test_a_hostile_module_gets_a_sentence(make):
    class Hostile(torch.nn.Module):
        def __new__(cls, **kwargs):
            return make(**kwargs)

    result, text = report(specimens.Mix, Hostile)
    assert not result.passed and ("is expected" in text or "ZeroDivisionError" in text or "it ended its" in text)
    assert specimens.Mix.judge(specimens.Mix.oracle).passed


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "no kernel"),
        ("__global__ void scale(float* x) {}", "argument"),
        ("__global__ void scale(const float* x, float* y, int n) { y[threadIdx.x] = x[0] }", "expected ';'"),
        ("__global__ void scale(const float* x, float* y, int n) { y[50] = 0; }", "Compare i with n."),
        ("__global__ void scale(const float* x, float* y, int n) { *(volatile int*)0 = 1; }", "NO"),
    ],
    ids=["empty", "signature", "syntax", "out of bounds", "wild pointer"],
)
def test_a_hostile_kernel_gets_a_sentence(source, words):
    result, text = report(specimens.scale, source)
    assert not result.passed
    assert words in text and "Traceback" not in text


def test_an_answer_that_takes_all_memory_is_stopped(monkeypatch):
    monkeypatch.setattr(process, "MEMORY_LIMIT", 2**28)
    assert "GB of memory" in report(specimens.shares, takes_all_memory)[1]


def test_an_answer_that_waits_is_stopped_by_the_clock(monkeypatch):
    monkeypatch.setattr(process, "WALL_LIMIT", 0.5)
    assert "does it wait for something?" in report(specimens.shares, lambda *a, **k: time.sleep(100))[1]


def test_the_time_that_imports_take_is_not_the_answers(monkeypatch, tmp_path):
    (tmp_path / "slow_to_import.py").write_text(
        "import time\nend = time.process_time() + 1\nwhile time.process_time() < end: pass"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(process, "TIME_LIMIT", 0.4)

    def imports(x, axis=-1):
        importlib.import_module("slow_to_import")

        return x / x.sum(axis, keepdims=True)

    assert report(specimens.shares, imports)[0].passed


@each
def test_a_stub_is_not_attempted(exercise):
    with pytest.raises(NotAttempted):
        exercise.judge(stub)


@functions
def test_an_argument_changed_in_place_is_named(exercise):
    def spoils(x, *args, **kwargs):
        x += 1

    assert "it changes `x` in place" in report(exercise, spoils)[1]


@functions
def test_the_courses_own_answer_cannot_be_called(exercise):
    own = exercise.oracle
    _, text = report(exercise, lambda *args, **kwargs: own(*args, **kwargs), own)
    assert f"it calls the course's own {exercise.name}: write yours" in text


def test_neither_the_oracles_nor_the_courses_own_can_be_imported():
    from utils.judge.exercise import exercises

    softmax = exercises("01")[0]

    def the_oracle(x, axis=-1):
        return importlib.import_module("utils.exercises.lecture_01.softmax").softmax.oracle(x, axis)

    def the_courses(x, axis=-1):
        return getattr(importlib.import_module(f"attention.{softmax.module}"), softmax.name)(x, axis)

    assert "it imports the exercises themselves: write your own" in report(softmax, the_oracle)[1]
    assert f"it calls the course's own {softmax.name}: write yours" in report(softmax, the_courses)[1]


@functions
def test_every_call_gets_fresh_arguments(exercise):
    """An answer that spoils its arguments after it has computed them is still right in all other properties."""
    oracle = exercise.oracle

    def spoils(x, *args, **kwargs):
        result = oracle(x, *args, **kwargs)
        if not getattr(x, "requires_grad", False):
            x[...] = 0
        return result

    rows = exercise.judge(spoils).rows
    plain = exercise.judge(oracle).rows
    assert [row for row in rows if row.name != UNCHANGED] == [row for row in plain if row.name != UNCHANGED]


def test_what_is_written_into_the_pipe_is_not_executed(tmp_path):
    made = tmp_path / "made"

    def writes(x, axis=-1):
        import pickle

        class Bomb:
            def __reduce__(self):
                return (open, (str(made), "w"))

        for fd in range(3, 30):
            try:
                os.write(fd, pickle.dumps(Bomb()))
            except OSError:
                pass
        return x / x.sum(axis, keepdims=True)

    result, text = report(specimens.shares, writes)
    assert not result.passed and "it wrote into a pipe of its Python process" in text
    assert not made.exists()
    assert specimens.shares.judge(specimens.shares.oracle).passed


def test_an_answer_that_keeps_something_between_calls_is_found():
    def remembers(x, axis=-1, seen=[]):  # noqa: B006
        seen.append(1)
        return x / x.sum(axis, keepdims=True) * (1 if len(seen) < 3 else 2)

    result, text = report(specimens.shares, remembers)
    assert [row.name for row in result.rows if row.holds is False] == [AGAIN]
    assert text.endswith(KEEPS_SOMETHING)
