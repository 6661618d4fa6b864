"""Copies of the course without answers: what a handed-in notebook finds when it imports the course's modules."""

import shutil
from pathlib import Path

from utils.authoring import module, source
from utils.paths import DATA, ROOT

UTILS = ("__init__.py", "check.py", "data.py", "paths.py", "training.py", "cuda", "judge", "language_model", "plotting")


def lecture_path(lecture, root=ROOT):
    """The source of lecture "NN". Raises LookupError."""
    found = sorted((root / "solutions").glob(f"{lecture}_*.py"))
    if not found:
        names = [path.name[:2] for path in sorted((root / "solutions").glob("[0-9][0-9]_*.py"))]
        raise LookupError(f"There is no lecture {lecture}; there are {', '.join(names)}.")
    return found[0]


def plant(lecture, folder):
    """Make the copies for a Lecture in `folder`: what they have in common, and an attention/ for each exercise.

    In that of exercise 1C, 1C and all later exercises of the lecture are open, and no later lecture is there.
    """
    common = Path(folder) / "common"
    for name in UTILS:
        _copy(ROOT / "utils" / name, common / "utils" / name)
    _copy(DATA, common / "data", "recorded")
    earlier = [source.read(path) for path in sorted((ROOT / "solutions").glob("[0-9][0-9]_*.py"))]
    earlier = [each for each in earlier if each.name < lecture.name]
    for exercise in lecture.exercises:
        attention = Path(folder) / exercise.number / "attention"
        _copy(ROOT / "attention" / "experiments" / "__init__.py", attention / "experiments" / "__init__.py")
        for each in earlier:
            _copy(ROOT / "attention" / f"{each.module}.py", attention / f"{each.module}.py")
        without = source.open_from(lecture, exercise.number)
        made = {**module.texts(without), "__init__.py": module.face([*earlier, lecture])}
        for name, text in made.items():
            (attention / name).parent.mkdir(parents=True, exist_ok=True)
            (attention / name).write_text(text, encoding="utf-8")


def path_for(folder, number):
    """The folders of the course's modules for an exercise."""
    return [str(Path(folder) / number), str(Path(folder) / "common")]


def _copy(old, new, *without):
    if old.is_dir():
        shutil.copytree(old, new, ignore=shutil.ignore_patterns("__pycache__", *without))
    elif old.exists():
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(old, new)
