"""Read a lecture's source, solutions/NN_topic.py, and derive from it, without running anything:

- its cells as they stand (the solution notebook),
- its cells as a learner gets them (solutions cut out, a first cell that says so),
- the text of its module in attention/, made of the cells tagged `export`.

What a source may hold is written in CONTRIBUTING.md. Whatever breaks those rules raises SourceError with file and line.
"""

import ast
import builtins
import dataclasses
import hashlib
import re
import sys
from pathlib import Path

import jupytext
import nbformat

TAGS = {"export", "exercise", "solution-only", "teacher", "gpu", "slow", "nbval-ignore-output"}
CELL_START = re.compile(r"#\s*%%")
MARKER = re.compile(r"(?P<indent>\s*)(?P<kind>###|//) (?P<word>BEGIN|END) SOLUTION\s*$")
STUB = {"###": "raise NotImplementedError", "//": "// your code here"}
EXERCISE = re.compile(r"^#+ Exercise (?P<number>\d+\.\d+): .+ \(difficulty [1-5] of 5, \d+ minutes\)$", re.MULTILINE)
CHECK = re.compile(r"\bcheck\(\s*[\"'](?P<number>\d+\.\d+)[\"']\s*,\s*(?P<name>\w+)")
OWN_LENGTH = 24  # characters from which a line can be a solution's own: shorter ones ("return out") occur anywhere
COURSE_PACKAGES = {"attention", "utils"}  # imported last


class SourceError(ValueError):
    """A rule of CONTRIBUTING.md that a source breaks, with file and line."""

    def __init__(self, path, line, message):
        super().__init__(f"{path.parent.name}/{path.name}, line {line}: {message}")


@dataclasses.dataclass(frozen=True)
class Cell:
    kind: str  # "markdown" or "code"
    source: str
    line: int  # of the first line of `source` in the file
    tags: tuple[str, ...] = ()
    metadata: dict = dataclasses.field(default_factory=dict)  # what else a notebook keeps of it


@dataclasses.dataclass(frozen=True)
class Exercise:
    number: str  # "1.2"
    cell: int  # index into the lecture's cells
    regions: list[tuple[int, int]]  # the marker lines of each solution, as indices into the cell's lines


@dataclasses.dataclass(frozen=True)
class Lecture:
    path: Path
    title: str
    module: str
    kernelspec: dict
    cells: list[Cell]
    exercises: list[Exercise]

    @property
    def name(self):
        return self.path.stem


def read(path):
    """Return the Lecture in the file `path`. Raises SourceError for whatever CONTRIBUTING.md does not allow."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    starts = [number for number, line in enumerate(text.splitlines(), 1) if CELL_START.match(line)]
    if len(starts) != len(notebook.cells):
        raise SourceError(path, 1, f"{len(notebook.cells)} cells but {len(starts)} lines that start one (# %%)")
    module = notebook.metadata.get("course", {}).get("module", "")
    if not module.isidentifier():
        raise SourceError(path, 1, "the header names no module (course: module: name)")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        raise SourceError(path, 1, "the header's kernelspec is not python3")

    cells = [_cell(path, raw, start + 1) for raw, start in zip(notebook.cells, starts)]
    if not cells or cells[0].kind != "markdown" or not cells[0].source.startswith("# "):
        raise SourceError(path, starts[0] if starts else 1, "the first cell is not the title (# ...)")
    title = cells[0].source.splitlines()[0].removeprefix("# ")
    return Lecture(path, title, module, dict(notebook.metadata.kernelspec), cells, _exercises(path, cells))


def _cell(path, raw, line):
    tags = tuple(raw.metadata.get("tags", ()))
    for tag in sorted(set(tags) - TAGS):
        raise SourceError(path, line, f"unknown tag {tag!r}; known are {', '.join(sorted(TAGS))}")
    # `lines_to_next_cell` is jupytext's: with it, a notebook edited in Jupyter syncs back to the same blank lines.
    kept = {key: raw.metadata[key] for key in ("slideshow", "lines_to_next_cell") if key in raw.metadata}
    return Cell(raw.cell_type, raw.source, line, tags, kept)


# ---- Exercises and their markers ----------------------------------------------------------------------------------

def _regions(path, cell):
    """Return the (BEGIN, END) line indices of each solution in a cell."""
    regions, opened = [], None
    for index, line in enumerate(cell.source.splitlines()):
        if "BEGIN SOLUTION" not in line and "END SOLUTION" not in line:
            continue
        number, marker = cell.line + index, MARKER.match(line)
        if not marker:
            raise SourceError(path, number, "a solution marker stands alone on its line: '### BEGIN SOLUTION'")
        if "exercise" not in cell.tags:
            raise SourceError(path, number, "a solution marker outside a cell tagged exercise")
        if marker["word"] == "BEGIN":
            if opened:
                raise SourceError(path, number, "BEGIN SOLUTION inside a solution that is still open")
            opened = index, marker["kind"]
        else:
            if not opened:
                raise SourceError(path, number, "END SOLUTION without its BEGIN SOLUTION")
            if opened[1] != marker["kind"]:
                raise SourceError(path, number, f"the solution began with {opened[1]} and ends with {marker['kind']}")
            if index == opened[0] + 1:
                raise SourceError(path, number, "an empty solution")
            regions.append((opened[0], index))
            opened = None
    if opened:
        raise SourceError(path, cell.line + opened[0], "BEGIN SOLUTION without its END SOLUTION")
    return regions


def _exercises(path, cells):
    """Pair each exercise cell with the header before it, its solutions and the check after it."""
    exercises, header = [], None
    for index, cell in enumerate(cells):
        regions = _regions(path, cell)
        if cell.kind == "markdown":
            headers = list(EXERCISE.finditer(cell.source))
            if re.search(r"^#+ Exercise", cell.source, re.MULTILINE) and len(headers) != 1:
                raise SourceError(path, cell.line, "an exercise's header reads "
                                                   "'### Exercise 1.2: goal  (difficulty 2 of 5, 10 minutes)'")
            if headers:
                header = headers[0]["number"]
                if int(header.split(".")[0]) != int(path.stem[:2]):
                    raise SourceError(path, cell.line, f"exercise {header} in lecture {path.stem[:2]}")
        if "exercise" in cell.tags:
            if not header or header in {exercise.number for exercise in exercises}:
                raise SourceError(path, cell.line, "an exercise without a header of its own in a cell before it")
            if not regions:
                raise SourceError(path, cell.line, "an exercise without ### BEGIN SOLUTION")
            _require_check(path, cell, header, cells[index + 1:])
            exercises.append(Exercise(header, index, regions))
    return exercises


def _require_check(path, cell, number, later):
    calls = [call for other in later if other.kind == "code" for call in CHECK.finditer(other.source)]
    names = [call["name"] for call in calls if call["number"] == number]
    if not names:
        raise SourceError(path, cell.line, f"exercise {number} is followed by no check(\"{number}\", ...)")
    for name in names:
        if not re.search(rf"^((def|class) {name}\b|{name}\s*=)", cell.source, re.MULTILINE):
            raise SourceError(path, cell.line, f"check(\"{number}\", {name}), but the exercise defines no {name}")


# ---- The learner's cells ------------------------------------------------------------------------------------------

def learner_cells(lecture):
    """Return the cells of a lecture as a learner gets them: solutions cut, the first cell says what to do."""
    regions = {exercise.cell: exercise.regions for exercise in lecture.exercises}
    cells = [_stub(cell, regions.get(index, ())) for index, cell in enumerate(lecture.cells)
             if not {"solution-only", "teacher"} & set(cell.tags)]
    return [Cell("markdown", _note(lecture), 1), *cells]


def _note(lecture):
    return (
        "*An exercise: replace `raise NotImplementedError` (in CUDA, `// your code here`) by your code, run the cell, "
        f"then run the check below it. Solved: `solutions/{lecture.name}.ipynb`.*\n\n"
        f"*(For authors: generated from `solutions/{lecture.path.name}`; edit that, then "
        f"`python course.py build {lecture.name[:2]}`.)*"
    )


def _stub(cell, regions):
    lines = cell.source.splitlines()
    for begin, end in reversed(regions):
        marker = MARKER.match(lines[begin])
        lines[begin:end + 1] = [marker["indent"] + STUB[marker["kind"]]]
    metadata = {key: value for key, value in cell.metadata.items() if key != "lines_to_next_cell"}
    return dataclasses.replace(cell, source="\n".join(lines), metadata=metadata)


def leaks(lecture, notebook):
    """Return the exercises whose solution a learner's notebook shows in one cell, in its source or its text outputs.

    Shown means half or more of the lines that are the solution's own: long enough, and not open before the exercise.
    A single line may well come back in the code of a later section.
    """
    shown = [{line.strip() for text in _texts(cell) for line in text.splitlines()} for cell in notebook.cells]
    found = []
    for exercise in lecture.exercises:
        cell = lecture.cells[exercise.cell]
        before = [other.source for other in lecture.cells[:exercise.cell] if "exercise" not in other.tags]
        given = "\n".join([*before, _stub(cell, exercise.regions).source])
        lines = cell.source.splitlines()
        solution = {line.strip() for begin, end in exercise.regions for line in lines[begin + 1:end]}
        own = {line for line in solution - set(map(str.strip, given.splitlines())) if len(line) >= OWN_LENGTH}
        worst = max((sorted(own & lines) for lines in shown), key=len)
        if worst and len(worst) >= len(own) / 2:
            found.append(f"exercise {exercise.number}: {worst[0]}")
    return found


def _texts(cell):
    yield cell.source
    for output in cell.get("outputs", ()):
        yield output.get("text", "")
        yield from (text for text in output.get("data", {}).values() if isinstance(text, str))


# ---- Notebooks ----------------------------------------------------------------------------------------------------

def notebook(cells, metadata):
    """Return an unexecuted notebook of `cells`. Its cell ids come from the cells' content."""
    built, seen = [], {}
    for cell in cells:
        digest = hashlib.sha256(f"{cell.kind}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell_id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        new = nbformat.v4.new_markdown_cell if cell.kind == "markdown" else nbformat.v4.new_code_cell
        built.append(new(cell.source, id=cell_id))
        built[-1].metadata.update(cell.metadata | ({"tags": list(cell.tags)} if cell.tags else {}))
    return nbformat.v4.new_notebook(cells=built, metadata=metadata)


def drafts(lecture):
    """Return {folder: (unexecuted notebook, source line of each cell)} for solutions/ and lectures/."""
    metadata = {"kernelspec": lecture.kernelspec, "language_info": {"name": "python"},
                "course": {"module": lecture.module}}
    learner = learner_cells(lecture)
    pairing = {"jupytext": {"formats": "ipynb,py:percent"}}
    made = {
        "solutions": (notebook(lecture.cells, metadata | pairing), [cell.line for cell in lecture.cells]),
        "lectures": (notebook(learner, metadata), [cell.line for cell in learner]),
    }
    for line in leaks(lecture, made["lectures"][0]):
        raise SourceError(lecture.path, 1, f"the learner's notebook shows a solution, {line}")
    return made


# ---- The module in attention/ -------------------------------------------------------------------------------------

def module_text(lecture):
    """Return the text of attention/<module>.py: the export cells in order, their imports on top."""
    imports, bodies = {}, []
    for cell in (cell for cell in lecture.cells if "export" in cell.tags):
        lines = [line for line in cell.source.splitlines() if not MARKER.match(line)]
        try:
            tree = ast.parse("\n".join(lines))
        except SyntaxError as error:
            raise SourceError(lecture.path, cell.line, f"an export cell that is not plain Python: {error}") from None
        for node in reversed(tree.body):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                text = "\n".join(lines[node.lineno - 1:node.end_lineno])
                if ast.dump(ast.parse(text)) != ast.dump(ast.Module([node], [])):
                    raise SourceError(lecture.path, cell.line, "an exported import shares its line with something else")
                imports[ast.unparse(node)] = (_import_order(node), text)
                del lines[node.lineno - 1:node.end_lineno]
        body = "\n".join(lines).strip()
        if ast.parse(body).body:
            bodies.append(body)
    groups = {}
    for (group, *_), text in sorted(imports.values()):
        groups.setdefault(group, []).append(text)
    head = (
        f"# Generated from solutions/{lecture.path.name} by `python course.py build`. Edit that file, not this one.\n"
        f'"""{lecture.title}: the finished code."""'
    )
    text = "\n\n\n".join(["\n\n".join([head, *("\n".join(lines) for _, lines in sorted(groups.items()))]), *bodies])
    for name in _unknown_names(text):
        raise SourceError(lecture.path, 1, f"the export cells use {name!r}, which none of them imports or defines")
    return text + "\n"


def _import_order(node):
    module = node.names[0].name if isinstance(node, ast.Import) else node.module or ""
    top = module.split(".")[0]
    group = 0 if top == "__future__" else 1 if top in sys.stdlib_module_names else 3 if top in COURSE_PACKAGES else 2
    return group, isinstance(node, ast.ImportFrom), module


def _unknown_names(text):
    """Return the names that a module reads and never binds, in any of its scopes."""
    known, used = set(dir(builtins)) | {"__name__", "__file__"}, set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else known).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)):
            known.add(node.name)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.alias):
            known.add((node.asname or node.name).split(".")[0])
    return sorted(used - known)
