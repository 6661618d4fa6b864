"""What a learner sees of a lecture: its cells with solutions cut, their kept outputs, and what can be counted there."""

import dataclasses
import re
from functools import cached_property

import nbformat

from utils.authoring import source as lecture_source

END_OF_CORE = re.compile(r"^## (Quiz|Going further|Behind the scenes|Traps)\b", re.MULTILINE)
KERNEL = re.compile(r"__global__|__device__")
THRESHOLD = re.compile(r"\b(below|under|over|above|than|within|to|at most|at least|from|beyond) [-+\d.e%]+")
VERDICT = re.compile(r"\b(True|False)\b")


@dataclasses.dataclass(frozen=True)
class Seen:
    """One cell as it is read: `place` counts from 1, `outputs` are those that lectures/ keeps."""

    place: int
    kind: str
    source: str
    line: int
    tags: tuple[str, ...]
    metadata: dict
    outputs: list

    @property
    def is_code(self):
        """Whether it is a code cell whose code is not folded away."""
        return self.kind == "code" and "plumbing" not in self.tags

    @property
    def lines(self):
        """Its lines that are not blank."""
        return [line for line in self.source.splitlines() if line.strip()]

    @property
    def words(self):
        """The number of words of a text cell."""
        return len(self.source.split()) if self.kind == "markdown" else 0

    @property
    def is_kernel(self):
        return bool(KERNEL.search(self.source))

    @property
    def figures(self):
        """Its pictures, as outputs."""
        return [output for output in self.outputs if "image/png" in output.get("data", {})]

    @property
    def printed(self):
        """The lines that it prints; beside HTML nobody sees the text."""
        shown = [output.get("data", {}) for output in self.outputs if output not in self.figures]
        texts = [output.get("text", "") for output in self.outputs]
        texts += [data.get("text/plain", "") for data in shown if "text/html" not in data]
        return [line for text in texts for line in text.splitlines() if line.strip()]


@dataclasses.dataclass(frozen=True)
class View:
    """A lecture as a learner sees it."""

    lecture: lecture_source.Lecture
    cells: list[Seen]

    @property
    def number(self):
        return self.lecture.name[:2]

    @cached_property
    def core(self):
        """The cells before the first heading that ends the core."""
        ends = [c.place for c in self.cells if c.kind == "markdown" and END_OF_CORE.search(c.source)]
        return self.cells[: min(ends, default=len(self.cells) + 1) - 1]

    @cached_property
    def shown_core(self):
        return [cell for cell in self.core if cell.is_code]

    @property
    def code(self):
        return [cell for cell in self.cells if cell.kind == "code"]

    @property
    def texts(self):
        return [cell for cell in self.cells if cell.kind == "markdown"]

    def before(self, place):
        """Words and shown code lines of the cells up to `place`, the cell there included."""
        cells = self.cells[:place]
        return sum(c.words for c in cells), sum(len(c.lines) for c in cells if c.is_code)

    def first(self, holds):
        """The place of the first code cell for which `holds(cell)`; None if there is none."""
        return next((cell.place for cell in self.code if holds(cell)), None)

    @cached_property
    def headings(self):
        """(level, text, cell) of each heading, those in fenced code left out."""
        found = []
        for cell in self.texts:
            text = re.sub(r"^```.*?^```", "", cell.source, flags=re.MULTILINE | re.DOTALL)
            found += [(len(m[1]), m[2].strip(), cell) for m in re.finditer(r"^(#+) (.+)$", text, re.MULTILINE)]
        return found

    @cached_property
    def sections(self):
        """The numbers of its sections: {"1.4", ...}."""
        numbers = (re.match(r"(\d+\.\d+)\b", text) for level, text, _ in self.headings if level in (2, 3))
        return {number[1] for number in numbers if number}

    @cached_property
    def exercises(self):
        """The headers of its exercises, as matches of source.EXERCISE, each with its cell."""
        return [(m, cell) for cell in self.texts for m in lecture_source.EXERCISE.finditer(cell.source)]


def view(lecture, kept=None):
    """Return the View of a lecture. `kept` is the path of its executed notebook: outputs are taken from equal cells."""
    draft, lines = lecture_source.drafts(lecture)["lectures"]
    outputs = {}
    if kept is not None and kept.exists():
        notebook = nbformat.read(kept, as_version=4)
        outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    cells = []
    for cell, line in zip(draft.cells, lines):
        tags = tuple(cell.metadata.get("tags", ()))
        if lecture_source.ONLY_IN_LECTURES not in tags:
            text = cell.source.replace(lecture_source.HOW_TO_RUN, "")  # the same in every lecture
            shown = outputs.get(cell.id, [])
            cells.append(Seen(len(cells) + 1, cell.cell_type, text, line, tags, dict(cell.metadata), shown))
    return View(lecture, cells)


def is_nothing_but_a_verdict(line):
    """Whether a printed line says True or False and shows no number that was measured (a threshold is none)."""
    if not VERDICT.search(line):
        return False
    return not re.search(r"\d\.\d|\d ?%|\de[-+]?\d|(?<!\S)[-+]?\d+(?!\S)(?=\s*\()", THRESHOLD.sub("", line))
