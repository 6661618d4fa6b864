"""What becomes of the mutants of exercises: refused, survived, or equivalent to the right answer."""

import random

from tests.mutation.equivalent import reason
from utils.judge import asked, kernel, process
from utils.judge.faults import Fault
from utils.judge.result import NotSendable

REFUSED, SURVIVED, BROKEN, SAME = "refused", "survived", "does not compile", "equivalent"
SECONDS = 3  # of processor time for a mutant that never ends


def verdict(answer):
    """One of the four words about an Answer; the properties after the first that fails are not tried."""
    if reason(answer.exercise.number, answer.mutant.name):
        return SAME
    try:
        made = answer.made()
    except Exception:  # noqa: BLE001 (a mutant may fail where it is defined)
        return BROKEN
    process.TIME_LIMIT, before = SECONDS, process.TIME_LIMIT
    try:
        return _verdict(answer.exercise, made)
    except NotSendable:
        return BROKEN
    finally:
        process.TIME_LIMIT = before


def _verdict(exercise, made):
    if isinstance(made, str):
        for prop in exercise.properties:
            failure = kernel._failure(prop, made)
            if failure:
                return BROKEN if isinstance(failure, Fault) and failure.kind is None else REFUSED
        return SURVIVED
    try:
        ask = exercise.trial(made, None)
        failed = any(asked._failure(prop, ask) for prop in exercise.properties) or ask.changed
        return REFUSED if failed else SURVIVED
    finally:
        process.worker.finish()


def sample(answers, count, seed):
    """`count` of the Answers, drawn with a fixed seed, those of one exercise behind each other."""
    drawn = random.Random(seed).sample(range(len(answers)), min(count, len(answers)))
    return [answers[i] for i in sorted(drawn)]


def run(answers, say=print):
    """The verdict of each Answer, in their order; survivors are said as they come."""
    found = []
    for answer in answers:
        found.append(verdict(answer))
        if found[-1] == SURVIVED:
            say(f"survived: {answer.name}")
    return found
