"""The exercises of the course: lecture NN declares its own in lecture_NN.py.

    @exercise("1.1", "fundamentals")
    def softmax(x, axis=-1):                                    # the oracle: float64, not the lecture's way
        ...

    @softmax.property("scores of 1e4 do not overflow")
    def _(ask, rng):
        ask(np.array([[1e4, 0.0, -1e4]]))                       # the learner's result must equal the oracle's

    @softmax.mistake("exp overflows: subtract the largest score first.")
    def _(x, axis=-1):
        ...

A property calls `ask` as if it were the learner's function. `ask` runs it elsewhere, on copies, compares with the
oracle and hands back the result as plain arrays. What more a property wants, it says with `Failed`; `ask.run` compares
with nothing. In an exercise without an oracle, `ask` is the learner's CUDA source itself (kernels_01.py).
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Failed(Exception):
    """Raised by a property that does not hold: a sentence that says where, and more lines if there is more to say."""

    def __init__(self, why, details=""):
        super().__init__(why)
        self.details = details


class Property(NamedTuple):
    name: str
    holds: Callable  # (ask, rng) -> None, raises Failed; in an exercise without an oracle (source, rng)
    hint: str


class Mistake(NamedTuple):
    message: str
    answer: Callable  # the wrong answer itself, with the exercise's signature


@dataclass
class Exercise:
    """One exercise: its number, the name of its function in `attention.<module>`, and how an answer is judged.

    `oracle` is None where the answer is CUDA source: its properties get the string. `returns` names the parts of a
    result that is a tuple. `fault_hints` says, for a kind of problem that the CUDA runner finds ("shuffle"), what to
    show in place of the property's hint.
    """

    number: str
    name: str
    module: str
    oracle: Callable | None = None
    returns: tuple[str, ...] = ()
    properties: list[Property] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    fault_hints: dict[str, str] = field(default_factory=dict)

    def property(self, name, hint=""):
        """Decorator: add a property; the hint is shown when it is the first that fails."""

        def add(function):
            self.properties.append(Property(name, function, hint))
            return function

        return add

    def mistake(self, message):
        """Decorator: add a wrong answer, recognised by what it returns or raises, and the message that names it.

        It has one error and everything else right.
        """


        def add(function):
            self.mistakes.append(Mistake(message, function))
            return function

        return add

    def reference(self):
        """The course's own answer. Raises ImportError or AttributeError when the lecture has not been built."""
        return getattr(importlib.import_module(f"attention.{self.module}"), self.name)


def exercise(number, module, returns=()):
    """Decorator: make an exercise of its oracle, under the oracle's name."""
    return lambda oracle: Exercise(number, oracle.__name__, module, oracle, returns)


def lectures():
    """The numbers of the lectures that have exercises, in order: ["01", ...]."""
    return sorted(path.stem.removeprefix("lecture_") for path in Path(__file__).parent.glob("lecture_*.py"))


def exercises(lecture):
    """The exercises of lecture "NN", in the order of their numbers."""
    module = importlib.import_module(f"{__name__}.lecture_{lecture}")
    declared = [value for value in vars(module).values() if isinstance(value, Exercise)]
    return sorted(declared, key=lambda exercise: [int(part) for part in exercise.number.split(".")])
