"""One handed-in notebook is judged: in a process of its own, which ends with it.

None of the notebook is run here. This process knows oracles and reference; what an answer computes comes to it as plain
numbers, from the process that tries answers. Both are behind walls where the system has them (utils/judge/walls.py).
"""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from utils.judge import handed, stub, walls
from utils.judge.asked import UNCHANGED
from utils.judge.bug import BugExercise
from utils.judge.exercise import SEED, find
from utils.judge.faults import failed
from utils.judge.kernel import KernelExercise
from utils.judge.packing import pack
from utils.judge.process import Place, worker
from utils.judge.report import lines
from utils.judge.result import NotAttempted, Result, Row, Stopped
from utils.paths import ROOT
from utils.setup import notebooks
from utils.teaching import statements, trees

MOST_BYTES = 20 * 2**20  # of a notebook
PASSED, PARTLY, OPEN, MISSING, NOT_JUDGED = "passed", "not passed", "not attempted", "not found", "not judged"
CLOSED = ("exercises", "authoring", "setup", "teaching")  # rooms of utils/ that are hidden, too


@dataclass
class Verdict:
    """What became of one exercise. `rows` are (property, holds, why); `share` is what it earns of its points."""

    number: str
    name: str
    state: str
    share: float = 0.0
    rows: list = field(default_factory=list)
    report: str = ""


@dataclass(frozen=True)
class Desk:
    """What is the same for all sittings: the lecture, its exercises, what they were given, where their modules lie."""

    exercises: tuple  # numbers that are marked
    names: tuple  # of all exercises of the lecture
    module: str
    given: tuple  # code cells of the assignment
    trees: str
    seed: int
    has_walls: bool


def sit(connection, path, desk, folder):
    """Judge the notebook in the file `path` and send a list of Verdicts, or a sentence where it cannot be read."""
    connection.send(_judged(path, desk, folder))
    connection.close()


def _judged(path, desk, folder):
    try:
        if Path(path).stat().st_size > MOST_BYTES or not Path(path).is_file():
            raise ValueError("it is no file of at most 20 MB")
        notebook = notebooks.read(Path(path).read_bytes())
    except (ValueError, OSError, RecursionError) as problem:
        return f"The notebook cannot be read: {problem}."
    cells = [notebooks.source(cell) if cell["cell_type"] == "code" else "" for cell in notebook["cells"]]
    SEED.set(desk.seed)
    asked = [find(number) for number in desk.exercises]
    owns = [exercise.reference() for exercise in asked]
    for own in owns:
        stub.source(own)  # read now: the file cannot be opened behind the walls
    _settle(desk, folder)
    try:
        return [_verdict(exercise, own, cells, desk, folder) for exercise, own in zip(asked, owns)]
    finally:
        worker.stop()


def _settle(desk, folder):
    """From now on everything is written into `folder`, and behind walls nothing else is within reach."""
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR", "CUDA_COURSE_CACHE"):
        os.environ[name] = str(folder)
    tempfile.tempdir = None
    os.chdir(folder)
    if desk.has_walls:
        rooms = [str(path) for path in (ROOT / "utils").iterdir() if path.name not in CLOSED]
        walls.close([desk.trees, *rooms], [str(folder)])


def _verdict(exercise, own, cells, desk, folder):
    worker.stop()  # an exercise's answer meets nothing that another one left behind
    paths = [entry for entry in sys_path() if not Path(entry).is_relative_to(ROOT) or "site-packages" in entry]
    worker.place = Place([*trees.path_for(desk.trees, exercise.number), *paths], str(folder), desk.has_walls)
    verdict = Verdict(exercise.number, exercise.name, MISSING)
    try:
        answer = answer_in(cells, exercise, own, desk)
        result = exercise.judge(_text(answer, exercise), own) if isinstance(exercise, KernelExercise) else None
        result = result or exercise.judge(answer, own)
    except LookupError as missing:
        verdict.report = str(missing)
    except NotAttempted:
        verdict.state, verdict.report = OPEN, "It is still open."
    except Undefined as problem:
        result = Result(rows=[Row("the cell defines it", False, str(problem))], details=problem.details)
        verdict.state, verdict.report = PARTLY, "\n".join(lines(exercise, result))
        verdict.rows = [tuple(row) for row in result.rows]
    else:
        verdict.state = PASSED if result.passed else PARTLY
        verdict.share = share(exercise, result)
        verdict.rows = [tuple(row) for row in result.rows]
        verdict.report = "\n".join(lines(exercise, result))
    return verdict


def sys_path():
    """The folders in which this Python finds modules, as absolute paths."""
    import sys

    return [str(Path(entry).resolve()) for entry in sys.path if entry and Path(entry).exists()]


class Undefined(Exception):
    """The statements of an answer do not get as far as defining it."""

    def __init__(self, why, details=""):
        super().__init__(why)
        self.details = details


def share(exercise, result):
    """What a Result earns, from 0 to 1: properties that hold, of all. A test that refuses right code earns nothing.

    That an answer leaves its arguments alone is not earned, an answer that does nothing does that; but it can be lost.
    """
    if result.passed:
        return 1.0
    rows = [row for row in result.rows if row.name != UNCHANGED or row.holds is False]
    if isinstance(exercise, BugExercise):
        n_right = len(exercise.rights)
        if not all(row.holds for row in rows[:n_right]):
            return 0.0
        rows = rows[n_right:]
    return sum(row.holds is True for row in rows) / len(rows)


def answer_in(cells, exercise, own, desk):
    """The answer to an exercise in the code cells of a notebook, as Handed. Raises LookupError where there is none.

    It is the last definition of the exercise's name that is not the stub, with all statements that it needs, wherever
    they stand. What is not in the notebook comes from the assignment, other exercises' functions from the course.
    """
    mine, broken = statements.statements(cells)
    given, _ = statements.statements(desk.given)
    bound = {name for s in mine for name in s.binds}
    shifted = [statements.moved(s, len(cells)) for s in given if not s.binds <= bound]
    texts = [*cells, *desk.given]
    defining = [s for s in mine if exercise.name in s.binds and (s.is_definition or not s.reads & statements.CHECKS)]
    if not defining:
        places = [what for cell, what in broken.items() if exercise.name in cells[cell]]
        why = f"the cell with it is no Python: {places[0]}" if places else "no cell defines it"
        raise LookupError(f"There is no {exercise.name} in the notebook: {why}.")
    marker = stub.CUDA if isinstance(exercise, KernelExercise) else stub.PYTHON
    solved = [s for s in defining if not stub.is_stub(s.text, stub.source(own), marker)]
    answer = (solved or defining)[-1]
    usable = [s for s in (*shifted, *mine) if s not in defining or defining.index(s) <= defining.index(answer)]
    others = frozenset(desk.names) - {exercise.name}
    chosen, _ = statements.closure(usable, {exercise.name}, others)
    borrowed = sorted({name for s in chosen for name in s.reads} & others)
    parts = [(f"<cell {cell + 1}>", text) for cell, text in statements.parts(texts, chosen)]
    if borrowed:
        parts.insert(0, ("<the course>", f"from attention.{desk.module} import {', '.join(borrowed)}"))
    handed.remember(parts)
    return handed.Handed(exercise.name, answer.text, tuple(parts))


def _text(answer, exercise):
    """The string that an answer's statements bind to its name. Raises Undefined."""
    try:
        loading = worker.load(pack(answer), exercise.module, exercise.name)
        reply = None if loading.error else worker.ask((), {}, "text")
    except Stopped as stopped:
        raise Undefined(str(stopped)) from None
    finally:
        worker.finish()
    error = loading.error or reply.error
    if error:
        failure = failed(error)
        raise Undefined(str(failure), failure.details)
    return bytes(reply.values[0].array).decode()
