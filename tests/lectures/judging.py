"""The tests of a lecture's exercises: right answers pass, wrong ones fail with words that help.

    class TestExercises(judging.Exercises):
        lecture, answers = "02", answers

`answers` is the module with RIGHT, WRONG and CALLS of that lecture.
"""

import itertools
import types
import warnings

import pytest

from tests.lectures.features import calls_of, never_together
from tests.mutation.answers import answers as mutated
from tests.mutation.judge import SURVIVED, verdict
from tests.mutation.syntax import SCALE
from utils.check import close
from utils.judge.exercise import exercises
from utils.judge.function import FunctionExercise
from utils.judge.module import ModuleExercise
from utils.judge.report import lines

_verdicts = {}


def judged(exercise, answer):
    """The Result. An answer that two tests look at is tried once."""
    key = exercise.number, id(answer)
    if key not in _verdicts:
        _verdicts[key] = exercise.judge(answer), answer  # the answer is kept: no other one gets its id
    return _verdicts[key][0]


def report(exercise, answer):
    """The Result, and the text that a learner reads."""
    result = judged(exercise, answer)
    return result, "\n".join(lines(exercise, result))


def twin(function):
    """The same function, as a learner would have it: another object."""
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)


def another(own):
    """The course's own answer as a learner would have it; a class or a string is taken as it is."""
    return twin(own) if isinstance(own, types.FunctionType) else own


def scaled_results(exercise):
    """(name, answer) for answers that return one part 5 % too large; none where what is returned are no floats."""
    own = exercise.reference()
    if isinstance(exercise, FunctionExercise):
        parts = next((call.expected for call in calls_of(exercise, another(own)) if call.expected), ())
        for i in [i for i, part in enumerate(parts) if part.dtype.kind == "f"]:
            yield f"part {i}", _scaled(another(own), i)
    elif isinstance(exercise, ModuleExercise):
        for i in range(max(1, len(exercise.returns))):
            yield f"output {i}", type("Scaled", (own,), {"forward": _scaled(own.forward, i)})


def _scaled(function, part):
    def answer(*args, **kwargs):
        result = function(*args, **kwargs)
        if not isinstance(result, tuple):
            return result * result.dtype.type(SCALE) if hasattr(result, "astype") else SCALE * result
        return tuple(r * SCALE if i == part else r for i, r in enumerate(result))

    return answer


def rows_of(exercise):
    """The names of what an exercise asks: its properties, or the bugs that a test has to find."""
    return {prop.name for prop in exercise.properties} | {f"finds: {m.name}" for m in getattr(exercise, "mutants", ())}


def name_of(value):
    return (
        getattr(value, "number", None) or getattr(value, "__name__", None) or getattr(value, "message", str(value))[:40]
    )


def slow_but_the_first(rows):
    """The same rows, of which `course.py test --quick` keeps one of each exercise."""
    marked = []
    for _, (first, *others) in itertools.groupby(rows, key=lambda row: row[0].number):
        marked += [first, *(pytest.param(*row, marks=pytest.mark.slow) for row in others)]
    return marked


class Exercises:
    lecture, answers = None, None

    def pytest_generate_tests(self, metafunc):
        declared = exercises(self.lecture)
        right = [(e, a) for e in declared for a in self.answers.RIGHT.get(e.number, [])]
        wrong = [(e, *pair) for e in declared for pair in self.answers.WRONG.get(e.number, [])]
        known = [(e, mistake) for e in declared for mistake in e.mistakes]
        rows = {
            ("exercise", "answer", "words"): slow_but_the_first(wrong),
            ("exercise", "mistake"): known,
            ("exercise", "answer"): right,
            ("exercise",): [(e,) for e in declared],
        }
        for names, values in rows.items():
            if set(names) == set(metafunc.fixturenames) & {"exercise", "answer", "words", "mistake"}:
                metafunc.parametrize(names, values, ids=name_of)

    def test_there_are_enough_answers_to_test_with(self, exercise):
        assert len(rows_of(exercise)) >= 4
        assert len(self.answers.WRONG.get(exercise.number, [])) >= 3
        assert len(self.answers.RIGHT.get(exercise.number, [])) >= 1

    def test_the_courses_own_answer_passes(self, exercise):
        result, text = report(exercise, another(exercise.reference()))
        assert result.passed, text

    def test_the_features_of_an_exercise_are_asked_together(self, exercise):
        """Nothing passes that handles each of two options alone."""
        if not isinstance(exercise, FunctionExercise):
            pytest.skip("not a function of arrays")
        assert never_together(exercise, another(exercise.reference())) == []

    def test_an_answer_that_squeezes_its_result_fails(self, exercise):
        if not isinstance(exercise, FunctionExercise):
            pytest.skip("not a function of arrays")
        own = another(exercise.reference())
        if not any(1 in part.shape for call in calls_of(exercise, own) for part in call.expected):
            pytest.skip("its result has no axis of size 1")

        def squeezes(*args, **kwargs):
            result = own(*args, **kwargs)
            return tuple(part.squeeze() for part in result) if isinstance(result, tuple) else result.squeeze()

        assert not exercise.judge(squeezes).passed

    @pytest.mark.slow
    def test_a_factor_wrong_by_five_percent_fails(self, exercise):
        """Inside of the solution, and in each part of what a function or module returns."""

        def accepted():
            inside = mutated(self.lecture, scale=True, only=(exercise.number,))
            wrong = [a.name for a in inside if verdict(a) == SURVIVED]
            return wrong + [name for name, answer in scaled_results(exercise) if exercise.judge(answer).passed]

        if wrong := accepted():  # a hole is there each time; what is there once in a while has to be heard of
            warnings.warn(f"accepted at first: {wrong}", stacklevel=1)
            wrong = accepted()
        assert not wrong, wrong

    def test_a_right_answer_written_differently_passes(self, exercise, answer):
        result, text = report(exercise, answer)
        assert result.passed, text

    def test_a_right_answer_can_take_the_references_place_in_the_lecture(self, exercise, answer):
        """Called as the lecture calls it, it gives what the lecture goes on with."""
        for args, kwargs in self.answers.CALLS[exercise.number] if callable(answer) else []:
            expected, got = exercise.reference()(*args, **kwargs), answer(*args, **kwargs)
            if not isinstance(expected, tuple):
                expected, got = [expected], [got]
            assert len(got) == len(expected)
            for ours, theirs in zip(got, expected):
                assert type(ours) is type(theirs) and ours.dtype == theirs.dtype
                assert close(ours, theirs)

    def test_a_wrong_answer_fails_with_words_that_help(self, exercise, answer, words):
        result, text = report(exercise, answer)
        assert not result.passed
        assert words in text

    @pytest.mark.slow
    def test_a_known_mistake_is_named(self, exercise, mistake):
        result, text = report(exercise, mistake.answer)
        assert not result.passed
        assert text.endswith(mistake.message)

    @pytest.mark.slow
    def test_each_property_is_needed(self, exercise):
        """A property that no wrong answer fails proves nothing."""
        wrong = [mistake.answer for mistake in exercise.mistakes]
        wrong += [answer for answer, _ in self.answers.WRONG.get(exercise.number, [])]
        failed = {row.name for answer in wrong for row in judged(exercise, answer).rows if row.holds is False}
        assert rows_of(exercise) <= failed
