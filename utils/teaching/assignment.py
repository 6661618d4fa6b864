"""An assignment: a notebook with some exercises of a lecture, nothing solved, and a manifest for whoever marks it.

python course.py assignment 05 --exercises 5A,5C --points 10,15
python course.py assignment 05 --exercises 5A,5C --points 10,15 --nbgrader
"""

import argparse
import json
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat

from utils.authoring import source
from utils.judge.exercise import exercises, find
from utils.paths import ROOT
from utils.teaching import nbgraded, statements
from utils.teaching.trees import lecture_path

FOLDER = ROOT / "assignments"
MANIFEST = "manifest.json"
NBGRADER = "nbgrader"  # the folder of nbgrader's course, beside the assignments
WHERE = "Put this notebook into `workbook/`, where `python course.py lab` opens it. "
HAND_IN = (
    "*{where}Run the cells from the start and in order. In each exercise put your code in place of "
    "`raise NotImplementedError` (in CUDA, of `// your code here`), run the cell, then the check below it. Cells of your "
    "own may stand anywhere. Save the notebook and hand it in.*"
)


class Refused(Exception):
    """A sentence for the teacher."""


@dataclass(frozen=True)
class Task:
    """An exercise of an assignment."""

    number: str
    name: str
    points: float


def tasks(lecture, numbers, points):
    """The Tasks for exercise numbers and their points, in the lecture's order. Raises Refused."""
    if len(numbers) != len(points):
        raise Refused(
            f"{len(numbers)} exercises and {len(points)} points: give one number of points for each exercise."
        )
    found = {}
    for number, worth in zip(numbers, points):
        try:
            exercise = find(number)
        except LookupError as unknown:
            raise Refused(str(unknown)) from None
        if exercise.number not in {each.number for each in lecture.exercises}:
            raise Refused(f"Exercise {exercise.number} is not one of lecture {lecture.name[:2]}.")
        if exercise.number in found:
            raise Refused(f"Exercise {exercise.number} is named twice.")
        if not 0 < worth < 1000:
            raise Refused(f"{worth:g} points for exercise {number}: expected a number above 0 and below 1000.")
        found[exercise.number] = Task(exercise.number, exercise.name, worth)
    order = [each.number for each in exercises(lecture.name[:2])]
    return sorted(found.values(), key=lambda task: order.index(task.number))


def cells(lecture, wanted):
    """[(kind, text, exercise number or "")] of an assignment with these Tasks: what they need, their texts, stubs, checks."""
    open_ones = {
        exercise.cell: exercise for exercise in lecture.exercises if exercise.number in {t.number for t in wanted}
    }
    given = needed(lecture, open_ones)
    stubs = source.open_from(lecture, lecture.exercises[0].number).cells
    made, header = [], None
    for index, cell in enumerate(lecture.cells):
        if cell.kind == "markdown" and source.EXERCISE.search(cell.source):
            header = cell.source
        if index in open_ones:
            number = open_ones[index].number
            made += [("markdown", header, ""), ("code", stubs[index].source, number)]
            name = next(task.name for task in wanted if task.number == number)
            made.append(("code", f'{name} = check("{number}", {name})', ""))
        elif index in given:
            made.append(("code", given[index], ""))
    return [("markdown", title(lecture, wanted), ""), *made]


def title(lecture, wanted, where=WHERE):
    """The first cell: which exercises, what they are worth, how to hand in."""
    rows = "\n".join(f"| {task.number} | `{task.name}` | {task.points:g} |" for task in wanted)
    total = sum(task.points for task in wanted)
    table = f"| exercise | | points |\n|---|---|---|\n{rows}\n| **together** | | **{total:g}** |"
    return f"# Assignment: {lecture.title}\n\n{HAND_IN.format(where=where)}\n\n{table}"


def needed(lecture, open_ones):
    """{cell: text} of the code cells that the exercises in these cells need: imports and definitions, and nothing else.

    What an exercise that is not asked for defines is imported from the course.
    """
    texts = [cell.source if cell.kind == "code" and "teacher" not in cell.tags else "" for cell in lecture.cells]
    found, _ = statements.statements(texts)
    solved = {exercise.cell for exercise in lecture.exercises}
    foreign = frozenset(name for s in found if s.cell in solved for name in s.binds)
    own = {name for s in found if s.cell in open_ones for name in s.binds}
    chosen, _ = statements.closure(_imported_once(found), {*own, "check"}, foreign - own)
    start = next(index for index, text in enumerate(texts) if text)
    made = {start: texts[start]} | {
        statement.cell: texts[statement.cell] for statement in chosen if statement.cell not in solved
    }
    borrowed = {name for s in chosen for name in s.reads} & foreign - own
    if borrowed:
        made[start] += f"\n\nfrom attention.{lecture.module} import {', '.join(sorted(borrowed))}"
    return made


def _imported_once(found):
    """The statements without imports of what was imported before: the cell with these may hold much else."""
    known, kept = set(), []
    for statement in found:
        if not (statement.is_import and statement.binds and statement.binds <= known):
            kept.append(statement)
        known |= statement.binds if statement.is_import else set()
    return kept


def notebook(lecture, wanted):
    """The notebook, not executed. An exercise's cell says its number in its metadata."""
    metadata = {"kernelspec": lecture.kernelspec, "language_info": {"name": "python"}}
    built = source.notebook([source.Cell(kind, text, 1) for kind, text, _ in cells(lecture, wanted)], metadata)
    for cell, (_, _, number) in zip(built.cells, cells(lecture, wanted)):
        if number:
            cell.metadata.update({"tags": ["exercise"], "exercise": number})
    return built


def manifest(lecture, wanted):
    """What marking needs. The seed is the teacher's: marking draws other random inputs than the check that learners run."""
    return {
        "lecture": lecture.name[:2],
        "notebook": f"{lecture.name}.ipynb",
        "exercises": [vars(task) for task in wanted],
        "seed": secrets.randbits(31),
    }


def write(number, numbers, points, folder=FOLDER, for_nbgrader=False):
    """Write an assignment of lecture "NN" to `folder`/NN; returns that folder. Raises Refused.

    For nbgrader the notebook goes to its course in `folder`/nbgrader, and the manifest alone to `folder`/NN.
    """
    try:
        lecture = source.read(lecture_path(number))
    except LookupError as unknown:
        raise Refused(str(unknown)) from None
    wanted = tasks(lecture, numbers, points)
    place = Path(folder) / number
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise Refused(
            f"{place} is there already: rename it first. Without its manifest its notebooks cannot be marked."
        )
    place.mkdir(parents=True, exist_ok=True)
    built, kept = notebook(lecture, wanted), manifest(lecture, wanted)
    if for_nbgrader:
        built.cells[0].source = title(lecture, wanted, where="")
        nbgraded.write(built, kept, Path(folder) / NBGRADER)
    else:
        nbformat.write(built, place / kept["notebook"])
    (place / MANIFEST).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return place


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="course.py assignment", description=__doc__, allow_abbrev=False)
    parser.add_argument("lecture", help="its number: 05")
    parser.add_argument("--exercises", required=True, help="numbers of exercises: 5A,5C")
    parser.add_argument("--points", required=True, help="what each is worth: 10,15")
    parser.add_argument("--nbgrader", action="store_true", help="write a source notebook for nbgrader instead")
    arguments = parser.parse_args(argv)
    try:
        points = [float(text) for text in arguments.points.split(",")]
    except ValueError:
        parser.error(f"--points: expected numbers like 10,15, got {arguments.points}")
    try:
        place = write(
            arguments.lecture.zfill(2), arguments.exercises.split(","), points, for_nbgrader=arguments.nbgrader
        )
    except Refused as problem:
        print(f"course.py: {problem}", file=sys.stderr)
        return 1
    shown = place.relative_to(ROOT) if place.is_relative_to(ROOT) else place
    if arguments.nbgrader:
        print(
            f"{shown.parent / NBGRADER}/ is a course of nbgrader's with the source notebook: CLASS.md says what is next."
        )
        return 0
    print(f"{shown}/ has the notebook for your learners, and {MANIFEST}, which you keep: `grade` needs it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
