"""Read a lecture's source, solutions/NN_topic.py, and derive from it, without running anything:

- its cells as they stand (the solution notebook),
- its cells as a learner gets them (solutions cut out, what is not read first folded away).

What a source may hold is written in CONTRIBUTING.md. Whatever breaks those rules raises SourceError with file and line.
"""

import ast
import dataclasses
import hashlib
import re
from pathlib import Path

import jupytext
import nbformat

TAGS = {
    *("export", "exercise", "solution-only", "teacher", "gpu", "slow", "nbval-ignore-output"),
    *("plumbing", "approx", "slide", "first-attention", "language-model", "quiz"),
}
# What a cell's metadata may hold besides its tags. `lines_to_next_cell` is jupytext's: with it, a notebook edited in
# Jupyter syncs back to the same blank lines.
KEYS = {"slideshow", "lines_to_next_cell", "approx", "kind"}
KINDS = ("numpy", "module", "training", "kernel", "bug")  # of an exercise
MODEL = re.compile(r"\bsmollm\b")  # the name of the language model in every lecture
FOLDED = re.compile(r"^## (Quiz|Going further|Behind the scenes)$", re.MULTILINE)  # closed when a notebook opens
ONLY_IN_LECTURES = "lectures-only"  # utils/setup/workbook.py leaves cells with this tag out of a learner's copy
CELL_START = re.compile(r"#\s*%%")
MARKER = re.compile(r"(?P<indent>\s*)(?P<kind>###|//) (?P<word>BEGIN|END) SOLUTION\s*$")
STUB = {"###": "raise NotImplementedError", "//": "// your code here"}
NUMBER = r"(?P<number>\d+(?:\.\d+|[A-Z]))"  # 1A; in a first edition 1.2
EXERCISE = re.compile(
    rf"^#+ Exercise {NUMBER}: .+ \(difficulty [1-5] of 5,(?: (?P<importance>essential|useful|extra),)?"
    r" (?P<minutes>\d+) minutes(?P<two>; if you do only two)?\)$",
    re.MULTILINE,
)
CHECK = re.compile(rf"\bcheck\(\s*[\"']{NUMBER}[\"']\s*,\s*(?P<name>\w+)")
OWN_LENGTH = 24  # characters from which a line can be a solution's own: shorter ones ("return out") occur anywhere


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
    header: dict  # `course:` in the file's YAML header
    kernelspec: dict
    cells: list[Cell]
    exercises: list[Exercise]

    @property
    def name(self):
        return self.path.stem

    @property
    def module(self):
        """The module in attention/ that the export cells make."""
        return self.header["module"]

    @property
    def public(self):
        """The names of that module that other people rely on."""
        return self.header.get("public", [])

    @property
    def experiments(self):
        """The exported names that go to attention/experiments/ instead."""
        return self.header.get("experiments", [])


def read(path):
    """Return the Lecture in the file `path`. Raises SourceError for whatever CONTRIBUTING.md does not allow."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    starts = [number for number, line in enumerate(text.splitlines(), 1) if CELL_START.match(line)]
    if len(starts) != len(notebook.cells):
        raise SourceError(path, 1, f"{len(notebook.cells)} cells but {len(starts)} lines that start one (# %%)")
    header = dict(notebook.metadata.get("course", {}))
    if not str(header.get("module", "")).isidentifier():
        raise SourceError(path, 1, "the header names no module (course: module: name)")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        raise SourceError(path, 1, "the header's kernelspec is not python3")

    cells = [_cell(path, raw, start + 1) for raw, start in zip(notebook.cells, starts)]
    if not cells or cells[0].kind != "markdown" or not cells[0].source.startswith("# "):
        raise SourceError(path, starts[0] if starts else 1, "the first cell is not the title (# ...)")
    _require_plumbing_behind_the_scenes(path, cells)
    title = cells[0].source.splitlines()[0].removeprefix("# ")
    return Lecture(path, title, header, dict(notebook.metadata.kernelspec), cells, _exercises(path, cells))


def _cell(path, raw, line):
    tags = tuple(raw.metadata.get("tags", ()))
    for tag in sorted(set(tags) - TAGS):
        raise SourceError(path, line, f"unknown tag {tag!r}; known are {', '.join(sorted(TAGS))}")
    for key in sorted(set(raw.metadata) - KEYS - {"tags"}):
        raise SourceError(path, line, f"unknown cell metadata {key!r}; known are {', '.join(sorted(KEYS))}")
    kept = {key: raw.metadata[key] for key in sorted(KEYS) if key in raw.metadata}
    if problem := _metadata_problem(raw.cell_type, tags, kept):
        raise SourceError(path, line, problem)
    if raw.cell_type == "code" and bool(MODEL.search(raw.source)) != ("language-model" in tags):
        raise SourceError(path, line, "a code cell that uses smollm, and no other, has the tag language-model")
    return Cell(raw.cell_type, raw.source, line, tags, kept)


def _metadata_problem(kind, tags, kept):
    """Return what is wrong with a cell's tags and metadata taken together, as a sentence; "" if nothing is."""
    if kind != "code" and {"plumbing", "approx", "exercise"} & set(tags):
        return "the tags plumbing, approx and exercise are for code cells"
    if ("approx" in tags) != ("approx" in kept):
        return 'the tag approx and its tolerance come together: tags=["approx"] approx={"numbers": 0.05}'
    tolerance = kept.get("approx", {"numbers": 0.05})
    if not isinstance(tolerance, dict) or not tolerance or set(tolerance) - {"numbers", "picture"}:
        return f'approx holds "numbers", "picture" or both, not {tolerance!r}'
    for name, value in tolerance.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 0.5:
            return f"approx: {name} is {value!r}, and a tolerance is a number above 0 and at most 0.5"
    if "kind" in kept and ("exercise" not in tags or kept["kind"] not in KINDS):
        return f"kind={kept['kind']!r}: an exercise cell is one of {', '.join(KINDS)}"
    return ""


def _require_plumbing_behind_the_scenes(path, cells):
    """Folded cells stand where nobody looks for the lecture's own subject."""
    behind = False
    for cell in cells:
        headings = re.findall(r"^##? .+", cell.source, re.MULTILINE) if cell.kind == "markdown" else []
        if headings:
            behind = headings[-1] == "## Behind the scenes"
        if FOLDED.search(cell.source) and cell.kind == "markdown" and not FOLDED.match(cell.source):
            raise SourceError(path, cell.line, "a heading that is closed on opening begins a cell of its own")
        if "plumbing" in cell.tags and not behind:
            raise SourceError(path, cell.line, "a cell tagged plumbing stands under the heading '## Behind the scenes'")


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
            if re.search(r"^#+ Exercise\b", cell.source, re.MULTILINE) and len(headers) != 1:
                raise SourceError(
                    path,
                    cell.line,
                    "an exercise's header reads '#### Exercise 1A: goal  (difficulty 2 of 5, essential, 10 minutes)'",
                )
            if headers:
                header = headers[0]["number"]
                if int(re.match(r"\d+", header)[0]) != int(path.stem[:2]):
                    raise SourceError(path, cell.line, f"exercise {header} in lecture {path.stem[:2]}")
        if "exercise" in cell.tags:
            if not header or header in {exercise.number for exercise in exercises}:
                raise SourceError(path, cell.line, "an exercise without a header of its own in a cell before it")
            if not regions:
                raise SourceError(path, cell.line, "an exercise without ### BEGIN SOLUTION")
            _require_check(path, cell, header, cells[index + 1 :])
            exercises.append(Exercise(header, index, regions))
            _require_sound_stub(path, cell, exercises[-1])
    return exercises


def _require_sound_stub(path, cell, exercise):
    """What a learner gets must define its names without an error: Run All reaches the end with every exercise open."""
    try:
        nodes = list(ast.walk(ast.parse(_stub(cell, exercise).source)))
    except SyntaxError as error:
        raise SourceError(path, cell.line, f"without its solution the exercise is no Python: {error.msg}") from None
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    strings = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    removed = 0
    for begin, end in exercise.regions:
        stub = begin - removed + 1  # the line, from 1, at which the stub stands in the learner's cell
        removed += end - begin
        python = MARKER.match(cell.source.splitlines()[begin])["kind"] == "###"
        in_string = any(node.lineno <= stub <= node.end_lineno for node in strings)
        in_function = any(node.lineno < stub <= node.end_lineno for node in functions)
        if python and (in_string or not in_function):
            raise SourceError(path, cell.line + begin, "a solution in Python stands inside a function or method")
        if not python and not in_string:
            raise SourceError(path, cell.line + begin, "a solution in CUDA stands inside a string")


def _require_check(path, cell, number, later):
    calls = [call for other in later if other.kind == "code" for call in CHECK.finditer(other.source)]
    names = [call["name"] for call in calls if call["number"] == number]
    if not names:
        raise SourceError(path, cell.line, f'exercise {number} is followed by no check("{number}", ...)')
    for name in names:
        if not re.search(rf"^((def|class) {name}\b|{name}\s*=)", cell.source, re.MULTILINE):
            raise SourceError(path, cell.line, f'check("{number}", {name}), but the exercise defines no {name}')


# ---- The learner's cells ------------------------------------------------------------------------------------------


def learner_cells(lecture):
    """Return the cells of a lecture as a learner gets them: solutions cut, one sentence more below the title.

    The second cell says that lectures/ is not the place to work in; a learner's copy in workbook/ goes without it.
    """
    exercises = {exercise.cell: exercise for exercise in lecture.exercises}
    title, *cells = [
        _stub(cell, exercises.get(index))
        for index, cell in enumerate(lecture.cells)
        if not {"solution-only", "teacher"} & set(cell.tags)
    ]
    heading, _, rest = title.source.partition("\n")
    title = dataclasses.replace(title, source=f"{heading}\n\n{HOW_TO_RUN}\n\n{rest.strip()}".strip())
    return [title, Cell("markdown", _place(lecture), title.line, (ONLY_IN_LECTURES,)), *cells]


def open_from(lecture, number):
    """Return a lecture in which exercise `number` and all that come after it are not solved."""
    numbers = [exercise.number for exercise in lecture.exercises]
    open_ones = {exercise.cell: exercise for exercise in lecture.exercises[numbers.index(number) :]}
    cells = [_stub(cell, open_ones[i]) if i in open_ones else cell for i, cell in enumerate(lecture.cells)]
    return dataclasses.replace(lecture, cells=cells)


HOW_TO_RUN = (
    "*Run the cells from the start and in order (Shift+Enter); in an exercise, put your code in place of "
    "`raise NotImplementedError` (in CUDA, of `// your code here`), run the cell, then the check below it.*"
)


def _place(lecture):
    return (
        "*You have opened the course's own copy, which is for reading along. Yours is in `workbook/`: "
        f"`python course.py lab` makes and opens it. The solved lecture is `solutions/{lecture.name}.ipynb`.*"
    )


def _stub(cell, exercise):
    """Return a cell without its solutions; an exercise says in its metadata which one it is."""
    lines = cell.source.splitlines()
    metadata = {key: value for key, value in cell.metadata.items() if key != "lines_to_next_cell"}
    if exercise:
        for begin, end in reversed(exercise.regions):
            marker = MARKER.match(lines[begin])
            lines[begin : end + 1] = [marker["indent"] + STUB[marker["kind"]]]
        metadata["exercise"] = exercise.number
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
        before = [other.source for other in lecture.cells[: exercise.cell] if "exercise" not in other.tags]
        given = "\n".join([*before, _stub(cell, exercise).source])
        lines = cell.source.splitlines()
        solution = {line.strip() for begin, end in exercise.regions for line in lines[begin + 1 : end]}
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
        built[-1].metadata.update(cell.metadata | _view(cell) | ({"tags": list(cell.tags)} if cell.tags else {}))
    return nbformat.v4.new_notebook(cells=built, metadata=metadata)


def _view(cell):
    """Return the metadata with which JupyterLab opens a cell folded: plumbing, answers, and what is not read first."""
    if "plumbing" in cell.tags or "quiz" in cell.tags and cell.kind == "code":
        return {"jupyter": {"source_hidden": True}}
    if cell.kind == "markdown" and FOLDED.match(cell.source):
        return {"jp-MarkdownHeadingCollapsed": True}
    return {}


def drafts(lecture):
    """Return {folder: (unexecuted notebook, source line of each cell)} for solutions/ and lectures/."""
    metadata = {
        "kernelspec": lecture.kernelspec,
        "language_info": {"name": "python"},
        "course": {"module": lecture.module},
    }
    learner = learner_cells(lecture)
    pairing = {"course": lecture.header, "jupytext": {"formats": "ipynb,py:percent"}}  # Jupyter writes the header back
    origin = {"course": metadata["course"] | {"generated_from": f"solutions/{lecture.path.name}"}}
    made = {
        "solutions": (notebook(lecture.cells, metadata | pairing), [cell.line for cell in lecture.cells]),
        "lectures": (notebook(learner, metadata | origin), [cell.line for cell in learner]),
    }
    for line in leaks(lecture, made["lectures"][0]):
        raise SourceError(lecture.path, 1, f"the learner's notebook shows a solution, {line}")
    return made


def place(path, notebook, index, first_line, line=1):
    """Return where a line of a cell stands, as words (prompt, section, line of the source `path`), and that line.

    `first_line` is the line of the source where the cell begins, None if that is not known; `line` counts from 1
    inside the cell.
    """
    cells = notebook.cells[: index + 1]
    prompt = sum(cell.cell_type == "code" for cell in cells)
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    headings = [title for text in texts for title in re.findall(r"^#+ +(.+)$", text, re.MULTILINE)]
    lines = cells[-1].source.splitlines() or [""]
    shown = lines[min(line, len(lines)) - 1].strip()
    section = f' in "{headings[-1]}"' if headings else ""
    source = f", solutions/{path.name} line {first_line + line - 1}" if first_line else ""
    return f"In [{prompt}]{section}{source}", shown
