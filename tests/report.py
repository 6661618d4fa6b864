"""Write tests/REPORT.md: `python -m tests.report` as things are, `... 07 conformance` after measuring these anew.

    python -m tests.report                # seconds: answers and tests as they are, numbers as they were kept
    python -m tests.report 07             # minutes: the mutants of lecture 07 first
    python -m tests.report conformance    # the third parties first
    python -m tests.report budgets        # the last run of all notebooks here first
    python -m tests.report all            # everything first

Kept are the numbers of third parties and budgets in tests/report.json, those of mutants in tests/mutation/kept.json: one
line for each thing measured, so that whoever changes a lecture renews its lines and no others.
"""

import argparse
import ast
import importlib
import json
import sys

from tests.mutation import kept as mutants
from tests.mutation import kept_mechanisms, mechanisms, same
from tests.mutation.equivalent import EQUIVALENT, EVERYWHERE
from utils.authoring.usage import MEGABYTES, SECONDS
from utils.judge.exercise import exercises, lectures, order
from utils.paths import ROOT

TARGET, KEPT = ROOT / "tests" / "REPORT.md", ROOT / "tests" / "report.json"
SECTIONS = "conformance", "budgets"
STEADY, ROUNDING = 3, 2**-23  # differences within this factor, or below this, are the same: machines round differently
COMMAND = "python -m tests.report"


# --- what is measured ------------------------------------------------------------------------------------------------


def measure(name, numbers):
    """Put what is measured of a lecture, or of a section, in place of what was kept of it."""
    if name == "conformance":
        numbers[name] = conformance(numbers[name])
    elif name == "budgets":
        numbers[name].update(budgets())
    else:
        from tests.mutation.answers import everything
        from tests.mutation.judge import run

        every = everything([name])
        mutants.keep(every, run(every))


def conformance(before):
    """{"mechanism, against oracle": [cases, largest difference]}; before: what was kept of them."""
    from tests.conformance import table

    found = {}
    for line in table.table():
        name = f"{line.mechanism}, against {line.oracle}"
        largest = table.up(line.largest)
        found[name] = [line.cases, steady(largest, before.get(name, [0, largest])[1])]
    return found


def steady(largest, kept):
    """The kept difference where a new one is as good as the same."""
    ratio = max(float(largest), ROUNDING) / max(float(kept), ROUNDING)
    return kept if 1 / STEADY <= ratio <= STEADY else largest


def budgets():
    """{notebook: [processor seconds, megabytes]} of the last `python course.py test` here."""
    last = ROOT / "build" / "notebook_times.md"
    rows = (
        [line.split("|")[1:-1] for line in last.read_text(encoding="utf-8").splitlines()[2:]] if last.exists() else []
    )
    return {name.strip(): [int(seconds), int(megabytes)] for name, seconds, _, megabytes, _ in rows}


# --- what is kept ----------------------------------------------------------------------------------------------------


def read(file=KEPT):
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {section: kept.get(section, {}) for section in SECTIONS}


def write(numbers, file=KEPT):
    """One line for each thing measured."""
    parts = []
    for section in SECTIONS:
        lines = [
            f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value)}" for key, value in numbers[section].items()
        ]
        parts.append(f'"{section}": {{\n' + ",\n".join(lines) + "\n}")
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


# --- what is said ----------------------------------------------------------------------------------------------------


def table(heads, rows):
    """A Markdown table; all columns but the first hold numbers."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1), *lines])


def with_sums(rows):
    return [*rows, ("**together**", *(sum(column) for column in list(zip(*rows))[1:]))] if rows else []


def of_answers():
    """For each exercise: properties, right answers, wrong answers, known mistakes."""
    rows = []
    for lecture in lectures():
        given = importlib.import_module(f"tests.lectures.lecture_{lecture}.answers")
        for e in exercises(lecture):
            asked = len(e.properties) or len(e.mutants)
            right, wrong = (len(answers.get(e.number, [])) for answers in (given.RIGHT, given.WRONG))
            rows.append((f"{e.number} {e.name}", asked, 1 + right, wrong, len(e.mistakes)))
    return table(["exercise", "properties", "right", "wrong", "known mistakes"], with_sums(rows))


def of_mutants():
    found = mutants.counts()
    listed = [e for lecture in lectures() for e in exercises(lecture) if e.number in found]
    rows = with_sums([(f"{e.number} {e.name}", *(found[e.number][word] for word in mutants.WORDS)) for e in listed])
    refused, survived = (sum(found[e.number][word] for e in listed) for word in (mutants.REFUSED, mutants.SURVIVED))
    share = 100 * refused / max(1, refused + survived)
    left = [n for n in lectures() if not any(e in listed for e in exercises(n))]
    yield f"Of {refused + survived:,} mutants that are not equivalent {refused:,} are refused: {share:.2f} %."
    if left:
        yield f"Not counted yet: {', '.join(left)}."
    yield table(["exercise", *mutants.WORDS], rows)
    yield "Taken for equivalent are the following; 1.05 is the factor of the test in which one is wrong by 5 %."
    said = [f"- everywhere, `{name}`: {why}" for name, why in EVERYWHERE.items()]
    for number in sorted({e.number for e in listed} & set(EQUIVALENT), key=order):
        said += [f"- {number}, `{name}`: {why}" for name, why in EQUIVALENT[number].items()]
    yield "\n".join(said)


def of_mechanisms():
    """For each module of attention/: its definitions, those that were tried, what became of their mutants; and what is left."""
    kept, rows, waiting, left = kept_mechanisms.read(), [], [], []
    for module in mechanisms.MODULES:
        names = [f"{module}.{d.name}" for d in mechanisms.definitions(module)]
        tried = [name for name in names if name in kept]
        counts = [sum(kept[name].get(word, 0) for name in tried) for word in kept_mechanisms.WORDS]
        rows.append((module, len(names), len(tried), *counts))
        if len(tried) < len(names):
            waiting.append(f"- {module}: {', '.join(n.split('.', 1)[1] for n in names if n not in kept)}")
        left += [
            f"- {name}, {', '.join(f'`{m}`' for m in kept[name]['left'])}" for name in tried if "left" in kept[name]
        ]
    rows = with_sums(rows)
    killed, lost = rows[-1][3], rows[-1][5] + rows[-1][6]
    yield (
        f"Of {killed + lost:,} mutants that are not equivalent, and not an exercise's alone, {killed:,} are killed: "
        f"{100 * killed / max(1, killed + lost):.2f} %. {rows[-1][1] - rows[-1][2]} of {rows[-1][1]} definitions have not "
        "been tried as a whole."
    )
    yield table(["module", "definitions", "tried", *kept_mechanisms.WORDS], rows)
    if left:
        yield "Not killed, and not known to be equivalent:"
        yield "\n".join(left)
    if waiting:
        yield from of_drawn(kept_mechanisms.read(kept_mechanisms.DRAWN))
        yield "Not tried as a whole yet:"
        yield "\n".join(waiting)
    yield "Taken for equivalent:"
    said = [f"- everywhere, `{name}`: {why}" for name, why in same.EVERYWHERE.items()]
    for module, reasons in same.REASONS.items():
        said += [f"- {module}, {', '.join(f'`{name}`' for name in names)}: {why}" for why, names in reasons.items()]
    yield "\n".join(said)


def of_drawn(drawn):
    """What became of mutants that were drawn among those of the other definitions."""
    counts = {module: [of.get(word, 0) for word in kept_mechanisms.WORDS] for module, of in drawn.items()}
    rows = [(module, sum(numbers), *numbers) for module, numbers in counts.items()]
    yield (
        "Drawn among the mutants of the others (`attention.flash --sample 60 --keep`). What runs in processes of "
        "its own (`ring_steps`, `at_the_experts`, `experts_process`) is seen by no test here, although tests ask it."
    )
    yield table(["module", "drawn", *kept_mechanisms.WORDS], with_sums(rows))
    left = [f"- {module}, {', '.join(f'`{m}`' for m in of['left'])}" for module, of in drawn.items() if "left" in of]
    if left:
        yield "Of these not killed, and not known to be equivalent:"
        yield "\n".join(left)


def of_bytes():
    """What tests say whose name has a formula, and bytes, reads or moves."""
    rows = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            name = getattr(node, "name", "").removeprefix("test_").replace("_", " ")
            if "formula" in name and any(word in name for word in ("bytes", "read", "moves")):
                rows.append((name, path.relative_to(ROOT / "tests").as_posix()))
    return table(["what holds", "in tests/"], rows)


def of_budgets(used):
    """The table of the last run that was kept, if there is one."""
    if used:
        yield "The last run that was kept, on one machine:"
        yield table(["notebook", "processor s", "MB"], [(k, *v) for k, v in used.items()])
    else:
        yield f"No run was kept yet: `{COMMAND} budgets` after `python course.py test`."


def text(numbers):
    """The report, as Markdown."""
    parts = [
        "# What the tests of mechanisms and checks say",
        f"Made by `{COMMAND}`; `{COMMAND} all` measures first.",
        "## Third parties",
        "Each mechanism beside an independent implementation with copied weights, in single precision. Differences are "
        "relative to the largest number of a result, at least 1, and rounded up to one digit. 5e-6 is allowed.",
        table(["mechanism", "cases", "largest difference"], [(k, *v) for k, v in numbers["conformance"].items()]),
        "## Exercises",
        "`tests/lectures/lecture_NN/test_exercises.py` hands in all of these. The course's own answer and those in other "
        "styles are accepted; each wrong one is refused, with the words that it stands beside in `answers.py`; each known "
        "mistake is named.",
        of_answers(),
        "## Mutants of the solutions",
        "A mutant is an exercise's solution with one error in the lines that a learner writes: another operator, constant "
        "or axis, a part left out.",
        *of_mutants(),
        "## Mutants of the mechanisms",
        "A mutant is a function, a class or a kernel of `attention/` with one error. It is killed by a test of the contract, of "
        "the third parties or of its lecture that fails, runs too long, or ends its process. Lines count from where the "
        "definition begins. `python -m tests.mutation attention.flash --keep` tries those of a module again.",
        *of_mechanisms(),
        "## Bytes",
        "These tests hold the bytes that the CUDA runner counts to a formula, exactly.",
        of_bytes(),
        "## Budgets",
        f"A notebook has {SECONDS} s of processor time and {MEGABYTES:,} MB.",
        *of_budgets(numbers["budgets"]),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("which", nargs="*", help=f"measured first: lectures (07), {' or '.join(SECTIONS)}, or all")
    asked = parser.parse_args(argv).which
    known = [*lectures(), *SECTIONS]
    if unknown := [name for name in asked if name not in (*known, "all")]:
        parser.error(f"{unknown[0]}: expected {', '.join(known)} or all")
    numbers = read()
    for name in known if "all" in asked else asked:
        print(f"measuring {name}", flush=True)
        measure(name, numbers)
        write(numbers)
    TARGET.write_text(text(numbers), encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: written")


if __name__ == "__main__":
    sys.exit(main())
