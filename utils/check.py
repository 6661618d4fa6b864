"""The exercises' answers: `softmax = check("1.1", softmax)`, and `progress()`.

How close is close enough stands in one table, TOLERANCE; `close` and `difference` apply it.
"""

from utils.checks import exercises, lectures
from utils.checks import progress as _progress
from utils.checks.compare import TOLERANCE, close, difference
from utils.checks.process import NotSendable
from utils.checks.report import lines
from utils.checks.trial import NotAttempted, try_answer

__all__ = ["TOLERANCE", "check", "close", "difference", "progress"]
_tried = set()  # exercises to which this notebook had an answer


def check(number, answer):
    """Print which properties of exercise `number` ("1.1") the answer has; never raises.

    `answer` is the learner's function, or the string where the exercise asks for CUDA source. Returns the answer when
    every property holds, and the course's own otherwise, so that the lecture can go on.
    """
    try:
        return _check(number, answer)
    except Exception as error:  # noqa: BLE001 (a lecture goes on whatever happens here)
        print(f"The check {number} itself went wrong ({type(error).__name__}: {error}). The answer was not judged.")
        return answer


def progress():
    """Print all exercises of the course, each passed, tried or not attempted."""
    print("\n".join(_progress.table()))


def _check(number, answer):
    try:
        exercise = _find(number)
    except LookupError as unknown:
        print(unknown)
        return answer
    try:
        own = exercise.reference()
    except (ImportError, AttributeError):
        own = None
    if _judge(exercise, answer, own):
        return answer
    if own is None:
        print(
            f"The course's own {exercise.name} is not built yet (`python course.py build {number.split('.')[0]:0>2}`)."
        )
        return answer
    return own


def _find(number):
    lecture, _, _ = str(number).partition(".")
    declared = exercises(f"{lecture:0>2}") if f"{lecture:0>2}" in lectures() else []
    for exercise in declared:
        if exercise.number == number:
            return exercise
    known = (
        f"lecture {lecture} has {declared[0].number} to {declared[-1].number}" if declared else 'they look like "1.1"'
    )
    raise LookupError(f"There is no exercise {number!r}: {known}.")


def _judge(exercise, answer, own):
    """Print the report; returns whether the answer passed."""
    title = f"{exercise.number} {exercise.name}"
    wanted = "a function" if exercise.oracle else "a string of CUDA source"
    if answer is own and own is not None:
        if exercise.number in _tried:
            print(f"{title}: run the cell with your {exercise.name} again, then this one (this is the course's own)")
        else:
            print(f"{title}: not attempted yet (this is the course's own {exercise.name})")
        return False
    _tried.add(exercise.number)
    if not (callable(answer) if exercise.oracle else isinstance(answer, str)):
        print(f"{title}: {wanted} is expected, {type(answer).__name__} was given.")
        return False
    try:
        result = try_answer(exercise, answer, own)
    except NotAttempted:
        _tried.discard(exercise.number)
        print(f"{title}: not attempted yet")
        return False
    except NotSendable as reason:
        print(
            f"{title}: the answer uses something that cannot be copied to the process that tries it ({reason}). "
            "Use what comes in as arguments, or make it inside."
        )
        return False
    _progress.record(exercise.number, result.passed)
    print("\n".join(lines(exercise, result)))
    return result.passed
