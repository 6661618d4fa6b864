"""The house: who may import whom, no circles, one formatting, files small enough to hold in the head."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from utils.paths import ROOT

MOST_LINES = 400  # of a hand-written module

# The rooms, and the rooms each may import. A room may always import from itself, and everybody may import `paths`.
LEARNERS = {"attention", "check", "plotting", "cuda", "data", "language_model", "quiz", "training"}
MAY_IMPORT = {
    "solutions": LEARNERS,
    "attention": {"cuda", "data", "training"},
    "check": {"judge"},
    "exercises": {"judge", "cuda"},
    "judge": {"cuda"},
    "plotting": set(),
    "cuda": set(),
    "data": set(),
    "language_model": {"data"},
    "training": set(),
    "quiz": set(),
    "paths": set(),
    "utils": set(),
    "authoring": set(),
    "teaching": {"authoring", "judge", "setup"},
    "setup": set(),
    "course.py": {"setup"},
    "conftest.py": {"authoring"},
}
ANYTHING = ("tests", "recorded")  # nothing imports these
STANDARD_LIBRARY_ONLY = ("setup", "course.py", "paths")


def room_of_file(path):
    """The room in which a file of the course lies."""
    first, *rest = path.relative_to(ROOT).parts
    if first == "utils":
        return "utils" if rest == ["__init__.py"] else Path(rest[0]).stem
    if first == "data":
        return "recorded"  # scripts that make data and records
    return first


def room_of_module(name):
    """The room of an imported module, None where it is not the course's."""
    first, _, rest = name.partition(".")
    if first == "utils":
        return rest.partition(".")[0] or "utils"
    if first == "data":
        return "recorded"
    if first in ("attention", "tests", "solutions"):
        return first
    return f"{first}.py" if first in ("course", "conftest") else None


def imports(path):
    """The full names of the modules that a file imports, `from a import b` as a.b, wherever the import stands."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            yield from (".".join(filter(None, (above, node.module, alias.name))) for alias in node.names)


def files():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    found = [ROOT / line for line in tracked.stdout.splitlines()] or sorted(ROOT.rglob("*.py"))
    hidden = (".venv", "build", "workbook", "samples")
    return [path for path in found if path.exists() and not set(path.relative_to(ROOT).parts) & set(hidden)]


FILES = files()


def forbidden(path):
    """The imports of a file that its room does not allow."""
    room = room_of_file(path)
    if room in ANYTHING:
        return []
    targets = {name: room_of_module(name) for name in imports(path)}
    allowed = MAY_IMPORT[room] | {room, "paths", None}
    return sorted(name for name, target in targets.items() if target not in allowed)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_its_room_may(path):
    assert forbidden(path) == []


def test_the_rule_bites(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for name, text, wrong in (
        ("utils/judge/a.py", "from utils import plotting", ["utils.plotting"]),
        (
            "utils/judge/b.py",
            "def f():\n    from utils.exercises.lecture_01 import arrays",
            ["utils.exercises.lecture_01.arrays"],
        ),
        ("utils/cuda/c.py", "from ..plotting import figure\nfrom .report import Report", ["utils.plotting.figure"]),
        ("utils/data.py", "import attention.flash", ["attention.flash"]),
        ("attention/d.py", "from utils.cuda import compile\nfrom attention.e import x", []),
        ("solutions/f.py", "from tests.cuda import cases", ["tests.cuda.cases"]),
        ("utils/setup/g.py", "from utils.paths import ROOT", []),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        assert forbidden(path) == wrong, name


def test_no_lecture_s_code_imports_a_later_one():
    order = {}
    for path in sorted((ROOT / "solutions").glob("[0-9][0-9]_*.py")):
        order[re.search(r"^#\s+module: (\w+)$", path.read_text(encoding="utf-8"), re.MULTILINE)[1]] = path.name[:2]
    for module, number in order.items():
        for name in imports(ROOT / "attention" / f"{module}.py"):
            other = name.split(".")[1] if name.startswith("attention.") else module
            assert order.get(other, "00") <= number, f"attention.{module} imports {name}"


def test_what_a_lecture_takes_from_another_is_there():
    for path in sorted((ROOT / "solutions").glob("[0-9][0-9]_*.py")):
        for module, _, name in (full.rpartition(".") for full in imports(path) if full.startswith("attention.")):
            assert hasattr(importlib.import_module(module or name), name), f"{path.name}: {module} has no {name}"


def test_no_lecture_s_exercises_import_another_one_s():
    for path in FILES:
        if room_of_file(path) == "exercises" and path.parent.name.startswith("lecture_"):
            others = [name for name in imports(path) if re.match(r"utils\.exercises\.lecture_\d\d", name)]
            assert not [name for name in others if path.parent.name not in name], path


def test_judge_and_check_name_exercises_in_one_place_only():
    naming = [path for path in FILES if room_of_file(path) in ("judge", "check") and _names_exercises(path)]
    assert len(naming) == 1, naming


def _names_exercises(path):
    texts = (
        node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant)
    )
    return any(isinstance(text, str) and text.startswith("utils.exercises") for text in texts)


def test_the_rooms_have_no_circle():
    arrows = {}
    for path in FILES:
        room = room_of_file(path)
        if room not in ANYTHING:
            arrows.setdefault(room, set()).update({room_of_module(name) for name in imports(path)} - {None, room})
    while leaves := [room for room in arrows if not arrows[room] & arrows.keys()]:
        for room in leaves:
            del arrows[room]
    assert arrows == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_runs_before_the_installation_imports_the_standard_library_only(path):
    if room_of_file(path) in STANDARD_LIBRARY_ONLY:
        foreign = [name for name in _imports_at_the_top(path) if room_of_module(name) is None]
        assert [name for name in foreign if name.partition(".")[0] not in sys.stdlib_module_names] == []


def _imports_at_the_top(path):
    top = ast.Module(
        [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, (ast.Import, ast.ImportFrom))], []
    )
    for node in top.body:
        yield from ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])


def test_no_file_outside_a_lecture_s_folder_carries_a_lecture_s_number():
    numbered = [
        path
        for path in FILES
        if re.search(r"_\d\d$", path.stem) and room_of_file(path) not in ("solutions", "recorded")
    ]
    assert numbered == []


def test_no_hand_written_module_is_longer_than_can_be_held_in_the_head():
    hand_written = [path for path in FILES if room_of_file(path) not in ("solutions", "attention")]
    long = {
        path.relative_to(ROOT).as_posix(): n
        for path in hand_written
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert long == {}


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["ruff check", "ruff format"])
def test_one_hand(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--quiet", "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
