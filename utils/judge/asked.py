"""What exercises have in common whose answer is called in another process: known mistakes, and the way to a verdict."""

from dataclasses import dataclass, field
from functools import partial

from utils.judge.exercise import Exercise, random_for
from utils.judge.process import worker
from utils.judge.result import Failed, Mistake, NotAttempted, Property, Result, Row, Stopped
from utils.judge.stub import is_python_stub

UNCHANGED = "leaves its arguments as they were"
AGAIN = "asked again, it answers the same"
WORK_ON_A_COPY = "Work on a copy: whoever called the function still needs what they passed."
KEEPS_SOMETHING = "It keeps something from one call to the next: a global, or a default argument that it changes."


@dataclass
class AskedExercise(Exercise):
    """`oracle` gives what is right; `returns` names the parts of a result that is a tuple."""

    oracle: object = None
    returns: tuple[str, ...] = ()
    mistakes: list[Mistake] = field(default_factory=list)

    def trial(self, answer, own):
        """What stands for the answer in the properties."""
        raise TypeError(f"{type(self).__name__}: no trial")

    def mistake(self, message):
        """Decorator: add a wrong answer, recognised by what it returns or raises, and the message that names it.

        It has one error and everything else right.
        """

        def add(answer):
            self.mistakes.append(Mistake(message, answer))
            return answer

        return add

    def mistakes_of(self, usual, changes):
        """Add {message: change, or a list of them}: `usual` is right until a change replaces some of its keywords."""
        for message, change in changes.items():
            for one in change if isinstance(change, list) else [change]:
                self.mistake(message)(partial(usual, **one))

    def judge(self, answer, own=None):
        if is_python_stub(answer, own):
            raise NotAttempted
        ask = self.trial(answer, own)
        try:
            return self._judge(ask)
        finally:
            worker.finish()

    def _judge(self, ask):
        result, stopped = Result(), False
        for prop in self.properties:
            failure = None if stopped else _failure(prop, ask)
            if failure and result.passed:
                result.details = failure.details
                result.hint = ask.hint(prop, failure)
                result.example = ask.example()
            result.rows.append(Row(prop.name, None if stopped else failure is None, str(failure or "")))
            stopped = stopped or isinstance(failure, Stopped)
        if ask.named:  # once more at the end: of two known mistakes that one is meant which explains more of the calls
            result.hint = ask.likeliest()
        if hasattr(ask, "again") and result.passed:
            failure = _failure(Property(AGAIN, lambda ask, rng: ask.again(), ""), ask)
            if failure:
                result.rows.append(Row(AGAIN, False, str(failure)))
                result.hint, result.details = KEEPS_SOMETHING, failure.details
        result.printed = ask.printed
        if result.passed and ask.changed:
            result.hint = WORK_ON_A_COPY
        if ask.takes_arrays:
            result.rows.append(Row(UNCHANGED, not ask.changed if ask.returned else None, ask.changed))
        return result


def _failure(prop, ask):
    """What a property has to say against an answer; None where it holds. Other exceptions are the property's own."""
    try:
        prop.holds(ask, random_for(prop))
    except Failed as failed:
        return failed
    return None
