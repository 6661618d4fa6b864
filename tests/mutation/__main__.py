"""Mutate the exercises' solutions, and let the checks judge: `python -m tests.mutation [NN or 1A ...] [--sample N] [--scale]`;
or the modules of attention/, and let the tests judge: `python -m tests.mutation attention[.flash[.online_softmax]] ...`."""

import argparse
import re
import sys
from collections import Counter

from tests.mutation.answers import everything
from tests.mutation.judge import SURVIVED, run, sample
from tests.mutation.kept import keep


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument(
        "which", nargs="*", help="lectures (02) or exercises (2A); all where none is named; or attention.flash"
    )
    parser.add_argument(
        "--sample", type=int, help="so many mutants, drawn with a fixed seed; of a module, among those not tried yet"
    )
    parser.add_argument("--scale", action="store_true", help="only factors that are wrong by 5 %%")
    parser.add_argument("--keep", action="store_true", help="write the counts down, for tests/REPORT.md")
    parser.add_argument("--triples", action="store_true", help="of attention only what is built three times")
    parser.add_argument("--only", choices=("python", "kernels"), help="of attention only one of these")
    parser.add_argument("--known", action="store_true", help="of attention by tests that were run before alone")
    arguments = parser.parse_args(argv)
    if words := [word for word in arguments.which if word.split(".")[0] == "attention"]:
        if len(words) < len(arguments.which):
            parser.error("exercises and attention are mutated one after the other")
        from tests.mutation import survey

        return survey.main(words, arguments)
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
