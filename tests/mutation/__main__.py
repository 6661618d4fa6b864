"""Mutate the exercises' solutions, and let the checks judge: `python -m tests.mutation [NN or 1A ...] [--sample N] [--scale]`."""

import argparse
import re
import sys
from collections import Counter

from tests.mutation.answers import everything
from tests.mutation.judge import SURVIVED, run, sample
from tests.mutation.kept import keep


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("which", nargs="*", help="lectures (02) or exercises (2.3); all where none is named")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn with a fixed seed")
    parser.add_argument("--scale", action="store_true", help="only factors that are wrong by 5 %%")
    parser.add_argument("--keep", action="store_true", help="write the counts down, for tests/REPORT.md")
    arguments = parser.parse_args(argv)
    if arguments.keep and (arguments.sample or arguments.scale):
        parser.error("--keep counts all mutants: without --sample and --scale")
    numbers = sorted({re.match(r"\d+", word)[0].zfill(2) for word in arguments.which})
    single = {word for word in arguments.which if not word.isdigit()}
    answers = everything(numbers, arguments.scale, single)
    if arguments.sample:
        answers = sample(answers, arguments.sample, seed=1)
    found = run(answers)
    if arguments.keep:
        keep(answers, found)
    counts = Counter(found)
    print(", ".join(f"{counts[word]} {word}" for word in sorted(counts)) or "no mutants")
    return 1 if counts[SURVIVED] else 0


if __name__ == "__main__":
    sys.exit(main())
