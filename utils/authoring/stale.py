"""When a notebook has to be executed again.

Its outputs are decided by its code cells and by what those reach: the course's modules that they import, the data
that these name, the lecture's exercises, the pins, and the code that builds and compares. Two keys stand for that:
the cells are compared one by one with those in the notebook, and a hash of the rest is noted in build/, which git
ignores. So a change that decides nothing (a comment in a README, a sentence of the text) makes nothing stale, and
one that decides only whether a notebook is up to date touches no notebook.
"""

import ast
import hashlib
import json
import re
import subprocess
import threading

SLACK = 60  # seconds: git writes the files of a checkout one after the other
BUILT, PASSED = "keys", "passed"  # folders of notes in build/
DATA_NAME = re.compile(r"[\w./-]+")
PARSING = threading.Lock()  # the parser of Python 3.11 fails now and then when two threads use it at once


def inputs(lecture, root):
    """Return the files, other than the lecture's own source, that decide its outputs, sorted."""
    code = [cell.source for cell in lecture.cells if cell.kind == "code"]
    files = {root / "attention" / f"{lecture.module}.py"}
    files |= set((root / "utils" / "exercises" / f"lecture_{lecture.name[:2]}").rglob("*.py"))
    files |= {path for text in code for path in _imported(text, (), root)}
    pending = [path for path in files if path.exists()]
    while pending:
        path = pending.pop()
        new = _imported(path.read_text(encoding="utf-8"), path.relative_to(root).parts[:-1], root)
        new |= {file for name in new | {path} for file in _room(name, root)}
        pending += [file for file in new - files if file.suffix == ".py"]
        files |= new
    texts = code + [path.read_text(encoding="utf-8") for path in files if path.suffix == ".py" and path.exists()]
    files |= _data_named(texts, root)
    files |= set((root / "utils" / "authoring").rglob("*.py"))
    files |= {root / "requirements.txt", root / "constraints.txt"}
    return sorted(path for path in files if path.is_file())


def key(lecture, root):
    """Return a hash of `inputs`."""
    total = hashlib.sha256()
    for path in inputs(lecture, root):
        total.update(path.relative_to(root).as_posix().encode() + b"\0")
        total.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return total.hexdigest()[:16]


def is_current(target, lecture, root):
    """Whether the outputs of the notebook `target` are those that its inputs, as they are now, give.

    For a notebook that was built here the note in build/ decides. One that came from elsewhere, with a clone or a
    pull, is taken as it came: it is current unless an input was changed here after it arrived.
    """
    if not target.is_file():
        return False
    noted = _read_note(target, root, BUILT)
    if noted.get("notebook") == _digest(target):
        return noted["key"] == key(lecture, root)
    arrived = target.stat().st_mtime + SLACK
    return all(path.stat().st_mtime <= arrived for path in inputs(lecture, root))


def has_passed(target, lecture, root):
    """Whether the notebook `target` was executed and compared here, and nothing that decides the outcome has changed."""
    noted = _read_note(target, root, PASSED)
    return noted.get("notebook") == _digest(target) and noted["key"] == key(lecture, root)


def needs_no_test(target, lecture, root):
    """Whether `target` has passed here, or is as it was committed and its inputs are those it came with.

    What was committed passed where it was committed: that is left to the whole test.
    """
    if has_passed(target, lecture, root):
        return True
    command = ["git", "diff", "--quiet", "HEAD", "--", str(target)]
    try:
        committed = subprocess.run(command, cwd=root, capture_output=True, check=False).returncode == 0
    except OSError:  # no git
        return False
    return committed and is_current(target, lecture, root)


def note(target, lecture, root, kind=BUILT):
    """Note in build/ that `target`, as it is now, was BUILT from the inputs as they are now, or has PASSED with them."""
    place = _place(target, root, kind)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"key": key(lecture, root), "notebook": _digest(target)}), encoding="utf-8")


def _read_note(target, root, kind):
    try:
        noted = json.loads(_place(target, root, kind).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) and "key" in noted else {}


def _place(target, root, kind):
    return root / "build" / kind / target.relative_to(root).with_suffix(".json")


def _digest(path):
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()[:16]


def _room(path, root):
    """Return all files of the room of utils/ that `path` lies in: rooms start programs and read files of their own.

    Exercises are no such room: a lecture needs its own folder there, and what that imports.
    """
    parts = path.relative_to(root).parts
    if len(parts) < 3 or parts[0] != "utils" or parts[1] in ("exercises", "authoring"):
        return set()
    found = (root / "utils" / parts[1]).rglob("*.*")
    return {file for file in found if file.is_file() and file.suffix not in (".pyc", ".md")}


def _parse(text):
    """Return the syntax tree of a piece of Python."""
    with PARSING:
        return ast.parse(text)


def _imported(text, package, root):
    """Return the course's own modules that a piece of Python, in the package `package`, imports."""
    try:
        tree = _parse(text)
    except SyntaxError:  # reported when the cell or the module is run
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    found = set()
    for parts in (name.split(".") for name in names):
        for end in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:end])
            found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
    return found


def _data_named(texts, root):
    """Return the files of data/ whose name, with or without its ending, is a string of one of the texts."""
    strings = set()
    for text in texts:
        try:
            nodes = ast.walk(_parse(text))
        except SyntaxError:
            continue
        constants = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
        strings |= {part.split("/")[-1] for string in constants for part in DATA_NAME.findall(string)}
    files = (path for path in (root / "data").rglob("*.*") if path.is_file())
    kept = (path for path in files if path.suffix not in (".py", ".pyc", ".md") and not path.name.startswith("."))
    return {path for path in kept if {path.name, path.stem} & strings}
