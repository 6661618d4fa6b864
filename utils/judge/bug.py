"""An exercise whose answer is a test that finds the bug: it accepts the right code, and refuses each mutant.

@bug("1H", "fundamentals", subject="causal_mask")
def test_causal_mask(causal_mask):                          # the oracle: a test that finds all of them
    ...

@test_causal_mask.right                                     # the right code; and once more in another style
def _(n_queries, n_keys=None):
    ...

@test_causal_mask.mutant("the mask starts at the top left", hint="Try fewer queries than keys.")
def _(n_queries, n_keys=None):
    ...
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from utils.judge.exercise import Exercise
from utils.judge.faults import failed
from utils.judge.packing import pack
from utils.judge.process import worker
from utils.judge.result import NotAttempted, Result, Row, Stopped
from utils.judge.stub import is_python_stub

FEWEST = 5  # mutants
TIMES = 3  # the right code has to be accepted: a test with random numbers may refuse it now and then
NOTHING_CHECKED = (
    "Does your test compare numbers? A test says no with an exception: `assert result == expected`. "
    "What it returns is not looked at."
)
REFUSED = "The right code is refused: what does your test expect that is not promised?"
BROKEN = "The test ends in {} on code that is right: look at that line of the test. Only what `assert` raises says no."


class Mutant(NamedTuple):
    name: str
    code: object
    hint: str


@dataclass
class BugExercise(Exercise):
    """subject: the name of what is tested; `oracle` is a test that finds every bug."""

    subject: str = ""
    oracle: object = None
    rights: list = field(default_factory=list)
    mutants: list[Mutant] = field(default_factory=list)

    wanted = "a function that tests another one"

    def right(self, code):
        """Decorator: add the right code, or the same in another style."""
        self.rights.append(code)
        return code

    def mutant(self, name, hint=""):
        """Decorator: add code with one bug; the name tells it, once a test has let it pass."""

        def add(code):
            self.mutants.append(Mutant(name, code, hint))
            return code

        return add

    def judge(self, answer, own=None):
        if not self.rights or len(self.mutants) < FEWEST:
            raise ValueError(f"exercise {self.number}: right code and at least {FEWEST} mutants are needed")
        if is_python_stub(answer, own):
            raise NotAttempted
        try:
            return self._judge(answer, own)
        finally:
            worker.finish()

    def _judge(self, answer, own):
        result = Result()
        packed = pack(answer, own, self.name)
        loading = worker.load(packed, self.module, self.name)
        if loading.error:
            raise failed(loading.error)
        for i, code in enumerate(self.rights):
            name = "accepts the right code" if i == 0 else f"accepts it written differently ({i})"
            result.rows.append(self._row(result, name, code, wanted=False))
        stopped = not result.passed
        for mutant in self.mutants:
            name = f"finds: {mutant.name}"
            row = Row(name, None) if stopped else self._row(result, name, mutant.code, wanted=True)
            if row.holds is False and not result.hint:
                result.hint = mutant.hint
            result.rows.append(row)
            stopped = stopped or (row.holds is False and "survived" not in row.why)
        if all(row.holds is False for row in result.rows[len(self.rights) :]) and not self._compares():
            result.hint = NOTHING_CHECKED
        return result

    def _compares(self):
        """Whether the test says no to the right code's numbers, one added to each: then it compares, with too little."""
        right = self.rights[0]

        def code(*args, **kwargs):
            result = right(*args, **kwargs)
            try:
                return tuple(part + 1 for part in result) if isinstance(result, tuple) else result + 1
            except TypeError:
                return result

        code.__name__ = code.__qualname__ = self.subject
        try:
            return worker.ask((code,), {}).error is not None
        except Stopped:
            return True

    def _row(self, result, name, code, wanted):
        """One row: whether the test raises for this code, as it should or should not."""
        code.__name__ = code.__qualname__ = self.subject
        try:
            replies = [worker.ask((code,), {}) for _ in range(1 if wanted else TIMES)]
        except Stopped as failure:
            return Row(name, False, str(failure))
        result.printed = result.printed or replies[0].printed
        errors = [reply.error for reply in replies if reply.error]
        if bool(errors) == wanted:
            return Row(name, True)
        if wanted:
            return Row(name, False, "it survived")
        failure = failed(errors[0])
        refused = errors[0].type_name == "AssertionError"
        result.details = result.details or failure.details
        result.hint = result.hint or (REFUSED if refused else BROKEN.format(errors[0].type_name))
        return Row(name, False, f"refused: {failure}")


def bug(number, module, subject, *, formerly="", importance=""):
    """Decorator: make an exercise of its oracle, a test, under the oracle's name."""

    def make(oracle):
        return BugExercise(number, oracle.__name__, module, formerly, importance, subject=subject, oracle=oracle)

    return make
