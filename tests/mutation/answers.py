"""The mutants of an exercise: its solution in the source of the lecture, with one error in the learner's lines."""

import functools
import importlib
import types
from collections import Counter
from typing import NamedTuple

from tests.mutation import kernels, syntax
from utils.authoring.source import read
from utils.judge.exercise import exercises, lectures
from utils.paths import ROOT


class Answer(NamedTuple):
    """One mutant of an exercise, and how it becomes an answer."""

    exercise: object
    mutant: syntax.Mutant
    module: str

    @property
    def name(self):
        return f"{self.exercise.number} {self.mutant.name}"

    def made(self):
        """The function, class or CUDA source. Raises whatever its own code raises."""
        names = dict(vars(importlib.import_module(f"attention.{self.module}")))
        room = types.ModuleType("answers")
        vars(room).update(names, __name__="answers", check=lambda number, answer: answer)
        exec(compile(self.mutant.source, f"<{self.name}>", "exec"), vars(room))
        return getattr(room, self.exercise.name)


@functools.cache
def lecture(number):
    """The lecture "NN" as its source says."""
    return read(next((ROOT / "solutions").glob(f"{number}_*.py")))


def answers(number, scale=False, only=()):
    """Every Answer of the exercises of lecture "NN", in order; scale: those with a factor wrong by 5 %.

    only: the numbers of the exercises that are wanted; all where none is named.
    """
    source = lecture(number)
    declared = {exercise.number: exercise for exercise in exercises(number)}
    for place in source.exercises:
        exercise, cell = declared[place.number], source.cells[place.cell]
        if not exercise.properties or (
            only and exercise.number not in only
        ):  # a test that finds bugs: its mutants are its exercise
            continue
        text = cell.source
        lines = {n + 1 for begin, end in place.regions for n in range(begin + 1, end)}
        make = kernels.mutants if isinstance(exercise.reference(), str) else syntax.mutants
        names = Counter()  # a name shows the beginning of a line: two mutants may share it
        for mutant in make(text, lines, scale):
            names[mutant.name] += 1
            again = f" ({names[mutant.name]})" if names[mutant.name] > 1 else ""
            yield Answer(exercise, mutant._replace(what=mutant.what + again), source.module)


def everything(numbers=(), scale=False, only=()):
    """The Answers of some lectures, or of some of their exercises; of all where none is named."""
    return [answer for number in numbers or lectures() for answer in answers(number, scale, only)]
