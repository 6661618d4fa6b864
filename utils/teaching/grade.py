"""Mark a folder of handed-in notebooks with the course's own checks.

    python course.py grade 05 FOLDER

Each notebook is judged in a process of its own, with limits for time and memory. What a learner is called is the name of
the file, or of the folder that it lies in.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import wait
from pathlib import Path

import psutil

from utils.authoring import source
from utils.judge import walls
from utils.judge.exercise import EXERCISES, PACKAGE, order
from utils.paths import ROOT
from utils.teaching import marks, trees
from utils.teaching.assignment import FOLDER, MANIFEST, Refused, Task, cells
from utils.teaching.sitting import NOT_JUDGED, Desk, Verdict, sit

SECONDS = 60, 90  # on the clock: for a sitting, and for each exercise in it
SECONDS_TO_END = 30  # for a process that has said what it had to say
MOST_MEMORY = 6 * 2**30  # bytes of all processes of a sitting
LOOK_UP = 0.5  # seconds
HERE_ONLY = "This system has no walls (Landlock): a notebook written to cheat could read the course's solutions here."


@dataclass(frozen=True)
class Manifest:
    """What is marked: the lecture "NN", its Tasks, and the seed of the inputs."""

    lecture: str
    tasks: tuple
    seed: int


def read_manifest(path):
    """The Manifest in a file. Raises Refused."""
    try:
        kept = json.loads(Path(path).read_text(encoding="utf-8"))
        wanted = tuple(Task(each["number"], each["name"], float(each["points"])) for each in kept["exercises"])
        return Manifest(kept["lecture"], wanted, int(kept["seed"]))
    except OSError:
        raise Refused(f"There is no {path}: make the assignment with `python course.py assignment`.") from None
    except (ValueError, KeyError, TypeError):
        raise Refused(f"{path} is damaged.") from None


def learners(folder):
    """{learner: notebook} of all notebooks in a folder and its folders, by name. Raises Refused where there is none."""
    found = sorted(path for path in Path(folder).rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    if not found:
        raise Refused(f"There is no notebook in {folder}.")
    places = [path.relative_to(folder) for path in found]
    own = [place.parts[0] if len(place.parts) > 1 else "" for place in places]
    return {
        first if first and own.count(first) == 1 else place.with_suffix("").as_posix(): path
        for first, place, path in zip(own, places, found)
    }


def prepare(manifest, folder):
    """The Desk for a Manifest, with copies of the course without answers in `folder`."""
    lecture = source.read(trees.lecture_path(manifest.lecture))
    trees.plant(lecture, folder)
    given = tuple(text for kind, text, number in cells(lecture, manifest.tasks) if kind == "code" and not number)
    names = tuple(cell_name(lecture, exercise) for exercise in lecture.exercises)
    numbers = tuple(task.number for task in manifest.tasks)
    return Desk(numbers, names, lecture.module, given, str(folder), manifest.seed, walls.keep_out(ROOT))


def cell_name(lecture, exercise):
    """What an exercise is called: the name in its check."""
    later = (cell.source for cell in lecture.cells[exercise.cell :] if cell.kind == "code")
    return next(m["name"] for text in later for m in source.CHECK.finditer(text) if m["number"] == exercise.number)


def judge_all(found, desk, at_once, say=print):
    """{learner: list of Verdicts, or a sentence} for {learner: notebook}, `at_once` of them at a time."""
    context, waiting, running, done = _context(desk), list(found.items()), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                learner, path = waiting.pop(0)
                sitting = Sitting(context, path, desk)
                running[sitting.receiver] = learner, sitting
            for receiver in wait(list(running), timeout=LOOK_UP):
                learner, sitting = running.pop(receiver)
                done[learner] = sitting.result()
                say(len(done), learner, done[learner])
            for _, sitting in running.values():
                sitting.watch()
    finally:
        for _, sitting in running.values():
            sitting.end("The marking was interrupted.")
            sitting.result()
    return {learner: done[learner] for learner in found}


class Sitting:
    """The process in which one notebook is judged."""

    def __init__(self, context, path, desk):
        self._folder = tempfile.mkdtemp(prefix="course-sitting-")
        self._until = time.monotonic() + SECONDS[0] + SECONDS[1] * len(desk.exercises)
        self._why = ""
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=sit, args=(sender, str(path), desk, self._folder), daemon=False)
        self.process.start()
        sender.close()

    def watch(self):
        """End the sitting where it takes too long or too much memory."""
        if time.monotonic() > self._until:
            self.end("Judging it took too long.")
        elif sum(_memory(process) for process in self._family()) > MOST_MEMORY:
            self.end(f"Judging it took more than {MOST_MEMORY // 2**30} GB of memory.")

    def end(self, why):
        self._why = why
        for process in reversed(self._family()):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def result(self):
        """The Verdicts, a sentence where the notebook could not be read, or why nothing came."""
        got = None
        with contextlib.suppress(EOFError, OSError):
            got = self.receiver.recv() if self.receiver.poll() else None
        self.receiver.close()
        self.process.join(SECONDS_TO_END)
        if self.process.is_alive():
            self.end(self._why)
            self.process.join()
        shutil.rmtree(self._folder, ignore_errors=True)
        if got is not None and not self._why:
            return got
        return self._why or "Judging it ended the process that judges: look at this notebook yourself."

    def _family(self):
        with contextlib.suppress(psutil.Error):
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        return []


def _memory(process):
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _context(desk):
    """How sittings are started: copies of a process that has imported what judging needs; on Windows anew each time."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    lecture = f"{order(desk.exercises[0])[0]:02d}"
    own = [f"{PACKAGE}.lecture_{lecture}.{p.stem}" for p in (EXERCISES / f"lecture_{lecture}").glob("[a-z]*.py")]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "utils.teaching.sitting", *sorted(own), f"attention.{desk.module}"])
    return context


def fill(result, manifest):
    """Verdicts for every Task of a Manifest: where judging gave a sentence, that sentence for each."""
    if not isinstance(result, str):
        return result
    return [Verdict(task.number, task.name, NOT_JUDGED, report=result) for task in manifest.tasks]


def free_folder(place):
    """The first of graded-DATE, graded-DATE-2, ... that is not taken: marks are never overwritten."""
    stem, number = f"graded-{date.today().isoformat()}", 2
    wanted = place / stem
    while wanted.exists():
        wanted, number = place / f"{stem}-{number}", number + 1
    return wanted


def grade(manifest, folder, place, at_once):
    """Judge the notebooks in `folder` and write marks, pages and summary into a new folder in `place`; returns it."""
    found, began = learners(folder), time.monotonic()

    def say(n, learner, result):
        rows = marks.row(manifest, learner, fill(result, manifest))
        print(f"  {n} of {len(found)}  {learner}: {rows[-2]} of {rows[-1]} points", flush=True)

    with tempfile.TemporaryDirectory(prefix="course-grading-") as copies:
        desk = prepare(manifest, copies)
        if not desk.has_walls:
            print(HERE_ONLY)
        results = judge_all(found, desk, at_once, say)
    verdicts = {learner: fill(result, manifest) for learner, result in results.items()}
    target = free_folder(place)
    marks.write(target, manifest, verdicts)
    print(f"{len(found)} notebooks in {time.monotonic() - began:.0f} s.")
    return target


def main(argv=None):
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="course.py grade", description=__doc__, allow_abbrev=False)
    parser.add_argument("lecture", help="its number: 05")
    parser.add_argument("folder", type=Path, help="where the handed-in notebooks lie")
    parser.add_argument("--manifest", type=Path, help=f"without it assignments/NN/{MANIFEST}")
    arguments = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    path = arguments.manifest or FOLDER / arguments.lecture.zfill(2) / MANIFEST
    try:
        manifest = read_manifest(path)
        if manifest.lecture != arguments.lecture.zfill(2):
            raise Refused(f"{path} is of lecture {manifest.lecture}.")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        target = grade(manifest, arguments.folder, path.resolve().parent, min(cores, 8))
    except Refused as problem:
        print(f"course.py: {problem}", file=sys.stderr)
        return 1
    print(f"{target} has {marks.TABLE}, {marks.SUMMARY} and a page for each learner in {marks.PAGES}/.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
