"""What a learner reads about refused mutants, drawn at random: `python -m tests.mutation.messages [--seed 1] [--count 40]`.

For each: the exercise, the line as it is and as the mutant has it, and the report of the check from the first property that fails.
"""

import argparse
import ast
import difflib
import linecache
import random
import sys

from tests.mutation.answers import everything, lecture
from tests.mutation.judge import BROKEN, SAME, SURVIVED, verdict
from utils.judge import process
from utils.judge.report import lines

SECONDS = 3  # of processor time, as in judge.py


def drawn(seed, count):
    """`count` refused Answers, drawn with a seed from those of all lectures, in the order in which they were drawn."""
    every = everything()
    random.Random(seed).shuffle(every)
    found = []
    for answer in every:
        if verdict(answer) not in (SURVIVED, BROKEN, SAME):
            found.append(answer)
        if len(found) == count:
            break
    return found


def report(answer):
    """The lines of the check's report."""
    before, process.TIME_LIMIT = process.TIME_LIMIT, SECONDS
    source = answer.mutant.source  # as in a notebook, where a line of the answer can be looked up
    linecache.cache[f"<{answer.name}>"] = len(source), None, source.splitlines(keepends=True), f"<{answer.name}>"
    try:
        return lines(answer.exercise, answer.exercise.judge(answer.made()))
    finally:
        process.TIME_LIMIT = before


def change(answer):
    """The lines of the exercise that differ, with - and +, or what the mutant says of itself."""
    source = lecture(answer.exercise.number[:-1].zfill(2))
    place = next(place for place in source.exercises if place.number == answer.exercise.number)
    before = source.cells[place.cell].source
    if not isinstance(answer.exercise.reference(), str):
        before = ast.unparse(ast.parse(before))
    differ = difflib.unified_diff(before.split("\n"), answer.mutant.source.split("\n"), n=0, lineterm="")
    return [line for line in differ if not line.startswith(("---", "+++", "@@"))]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.messages", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=40)
    asked = parser.parse_args(argv)
    for i, answer in enumerate(drawn(asked.seed, asked.count), 1):
        print(f"\n{i}. {answer.exercise.number} {answer.exercise.name}", *change(answer), sep="\n    ")
        print(*(f"    | {line}" for text in report(answer) for line in text.split("\n")), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
