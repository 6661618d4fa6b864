"""Which exercises are passed or tried: kept beside the learner's own copies of the lectures, and nowhere else."""

import contextlib
import itertools
import json
import os
from pathlib import Path

from utils.judge.exercise import exercises, lectures
from utils.paths import WORKBOOK

PASSED, TRIED = "passed", "tried"
_now = {}  # what was checked since this notebook was started


def record(number, passed):
    """Note that an exercise was passed or tried. What was passed once stays passed."""
    states = _read()
    if passed or states.get(number) != PASSED:
        states[number] = _now[number] = PASSED if passed else TRIED
    path = _path()
    if path:
        fresh = path.with_suffix(f".{os.getpid()}")
        try:
            if path.exists() and _kept(path) is None:  # damaged: what is in it may still be wanted
                os.replace(path, _free_name(path))
            fresh.write_text(json.dumps(dict(sorted(states.items())), indent=1) + "\n", encoding="utf-8")
            os.replace(fresh, path)
        except OSError:  # a full disk, a read-only folder or a folder of that name is no reason to stop a lecture
            with contextlib.suppress(OSError):
                fresh.unlink()


def _free_name(path):
    """progress.damaged.json, progress.damaged-2.json, ...: the first that is not taken."""
    names = (path.with_name(f"{path.stem}.damaged{f'-{n}' if n > 1 else ''}.json") for n in itertools.count(1))
    return next(name for name in names if not name.exists())


def table():
    """The lines of the table of all exercises."""
    states, out, passed, count = _read(), [], 0, 0
    for lecture in lectures():
        declared = exercises(lecture)
        width = max((len(e.name) for e in declared), default=0)
        weight = max((len(e.importance) for e in declared), default=0)
        out.append(f"Lecture {lecture}")
        for exercise in declared:
            state = _state(states, exercise)
            important = f"  {exercise.importance:<{weight}}" if weight else ""
            out.append(f"  {exercise.number:<5} {exercise.name:<{width}}{important}  {state}")
            passed += state == PASSED
        count += len(declared)
    return [*out, f"{passed} of {count} exercises passed."]


def _state(states, exercise):
    """What became of an exercise, under its number or the one that it had in an older edition."""
    found = {states.get(exercise.number), states.get(exercise.formerly)} - {None}
    return PASSED if PASSED in found else TRIED if found else "not attempted"


def _path():
    """The file, when the notebook runs in workbook/."""
    here = Path.cwd().resolve()
    return WORKBOOK / "progress.json" if here.is_relative_to(WORKBOOK) else None


def _kept(path):
    """What the file says, {number: state}; None where it is damaged."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, dict) else None


def _read():
    path = _path()
    kept = (_kept(path) if path else None) or {}
    return {**{number: state for number, state in kept.items() if state in (PASSED, TRIED)}, **_now}
