"""The exercises of the course: lecture NN declares its own in utils/exercises/lecture_NN/, and finds them here by number.

An exercise is one of five kinds, each with a module of its own: function.py, kernel.py, module.py, step.py, bug.py.
Whatever the kind, it has properties, and `judge(answer, own) -> Result`.
"""

import contextvars
import importlib
import re
import zlib
from dataclasses import dataclass, field

import numpy as np

from utils.judge.result import Property
from utils.paths import ROOT

PACKAGE = "utils.exercises"
EXERCISES = ROOT / "utils" / "exercises"
IMPORTANCE = ("", "essential", "useful", "extra")
NUMBER = re.compile(r"(\d+)(?:\.(\d+)|([A-Z]))")  # 1.10 in a first edition, 1A in a second
SEED = contextvars.ContextVar("seed", default=0)  # other random numbers for all properties, where a class is marked
_declared = {}  # number -> exercise


@dataclass
class Exercise:
    """One exercise: its number ("1A"), and the name of its answer in `attention.<module>`.

    formerly: the number that it had in an older edition; what was passed under it stays passed.
    importance: "essential", "useful" or "extra", as in the lecture.
    """

    number: str
    name: str
    module: str
    formerly: str = ""
    importance: str = ""
    properties: list[Property] = field(default_factory=list)

    wanted = "a function"
    mistakes = ()  # known wrong answers, where an exercise can recognise them

    def __post_init__(self):
        if not NUMBER.fullmatch(self.number):
            raise ValueError(f'number: expected one like "1A" or "1.1", got {self.number!r}')
        if self.importance not in IMPORTANCE:
            raise ValueError(f"importance: expected one of {', '.join(IMPORTANCE[1:])}, got {self.importance!r}")
        _declared[self.number] = self

    def property(self, name, hint=""):
        """Decorator: add a property; the hint is shown when it is the first that fails."""

        def add(function):
            self.properties.append(Property(name, function, hint))
            return function

        return add

    def accepts(self, answer):
        """Whether an answer is of the kind that can be judged at all."""
        return callable(answer)

    def reference(self):
        """The course's own answer. Raises ImportError or AttributeError when the lecture has not been built."""
        return getattr(importlib.import_module(f"attention.{self.module}"), self.name)

    def judge(self, answer, own=None):
        """Judge an answer: Result. Raises NotAttempted for a stub, and NotSendable.

        `own` is the course's own answer, which the learner's must not call.
        """
        raise NotImplementedError


def random_for(prop):
    """The random numbers of a property: the same in every check, others for each property and each SEED."""
    return np.random.default_rng(zlib.crc32(prop.name.encode(), SEED.get()))


def order(number):
    """What sorts the numbers of exercises: 1.2 before 1.10."""
    lecture, place, letter = NUMBER.fullmatch(number).groups()
    return int(lecture), int(place or 0), letter or ""


def lectures():
    """The numbers of the lectures that have exercises, in order: ["01", ...]."""
    return sorted(path.name.removeprefix("lecture_") for path in EXERCISES.glob("lecture_*") if path.is_dir())


def exercises(lecture):
    """The exercises of lecture "NN", in the order of their numbers."""
    for path in sorted((EXERCISES / f"lecture_{lecture}").glob("[a-z]*.py")):
        importlib.import_module(f"{PACKAGE}.lecture_{lecture}.{path.stem}")
    return sorted(
        (exercise for number, exercise in _declared.items() if order(number)[0] == int(lecture)),
        key=lambda exercise: order(exercise.number),
    )


def find(number):
    """The exercise of a number, as text or as a float; its number of an older edition will do. Raises LookupError."""
    asked = str(number).strip().upper()
    match = NUMBER.fullmatch(asked) if isinstance(number, (str, float)) else None
    declared = exercises(f"{match[1]:0>2}") if match and f"{match[1]:0>2}" in lectures() else []
    known = {exercise.formerly: exercise for exercise in declared if exercise.formerly}
    known |= {exercise.number: exercise for exercise in declared}
    if isinstance(number, float) and f"{asked}0" in known:
        raise LookupError(f'{asked} may be "{asked}" or "{asked}0": put the number in quotes.')
    if asked in known:
        return known[asked]
    say = (
        f"lecture {match[1]} has {declared[0].number} to {declared[-1].number}" if declared else 'they look like "1.1"'
    )
    raise LookupError(f"There is no exercise {number!r}: {say}.")
