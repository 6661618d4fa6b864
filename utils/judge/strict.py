"""A check that raises, for programs that run a notebook and take a cell without an error for a right answer (nbgrader)."""

import contextlib
import io

from utils.judge.exercise import SEED, find
from utils.judge.report import lines
from utils.judge.result import NotAttempted, NotSendable


class NotPassed(AssertionError):
    """An answer that earns nothing; the text is the report."""


def require(number, answer, seed=0):
    """Return without a word when `answer` has every property of exercise `number`; raise NotPassed in any other case.

    Random inputs are drawn from `seed`; 0 draws those of the learner's check.
    """
    exercise = find(number)
    title, own = f"{exercise.number} {exercise.name}", exercise.reference()
    if answer is own:
        raise NotPassed(f"{title}: this is the course's own.")
    if not exercise.accepts(answer):
        raise NotPassed(f"{title}: {exercise.wanted} is expected, {type(answer).__name__} was given.")
    drawn = SEED.set(seed)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # nbgrader takes a warning for a failure
            result = exercise.judge(answer, own)
    except NotAttempted:
        raise NotPassed(f"{title}: not attempted yet.") from None
    except NotSendable as reason:
        raise NotPassed(f"{title}: the answer cannot be copied to the process that tries it ({reason}).") from None
    finally:
        SEED.reset(drawn)
    if not result.passed:
        raise NotPassed("\n".join(lines(exercise, result)))
