"""The exercises' answers: `softmax = check("1.1", softmax)`, and `progress()`.

How close is close enough stands in one table, TOLERANCE; `close` and `difference` apply it.
"""

import sys
import textwrap

from utils.judge import progress as _progress
from utils.judge.compare import TOLERANCE, close, difference
from utils.judge.exercise import find, order
from utils.judge.process import worker as _worker
from utils.judge.report import lines
from utils.judge.result import NotAttempted, NotSendable

__all__ = ["TOLERANCE", "check", "close", "difference", "progress"]
if "ipykernel" in sys.modules:  # a notebook: the process that tries answers gets ready while its reader reads
    _worker.start(imports=[name for name in ("torch",) if name in sys.modules])
COLUMNS = 95  # what JupyterLab shows beside its file browser at 1280 pixels
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
        exercise = find(number)
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
            f"The course's own {exercise.name} is not built yet (`python course.py build {order(exercise.number)[0]:0>2}`)."
        )
        return answer
    return own


def _judge(exercise, answer, own):
    """Print the report; returns whether the answer passed."""
    title = f"{exercise.number} {exercise.name}"
    if answer is own and own is not None:
        if exercise.number in _tried:
            print(f"{title}: run the cell with your {exercise.name} again, then this one (this is the course's own)")
        else:
            print(f"{title}: not attempted yet (this is the course's own {exercise.name})")
        return False
    _tried.add(exercise.number)
    if not exercise.accepts(answer):
        print(f"{title}: {exercise.wanted} is expected, {type(answer).__name__} was given.")
        return False
    try:
        result = exercise.judge(answer, own)
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
    *rows, verdict = lines(exercise, result)
    print("\n".join([*rows, *textwrap.wrap(verdict, COLUMNS)]))
    return result.passed
