"""The limits of a lecture, measured on what a learner sees: python -m utils.authoring.gates [NN ...].

Prints a table with the numbers of every lecture. A lecture whose header says `edition: 2` has to keep the limits; for
an exception its header gives a reason: `exceptions: {cells: "why"}`. Outputs are those of lectures/NN_topic.ipynb, in
cells that have not changed since.
"""

import argparse
import ast
import re
import sys

from utils.authoring import references, seen
from utils.authoring import source as lecture_source
from utils.authoring.names import parse, rebound
from utils.paths import ROOT

CELLS, WORDS, CODE_LINES = 110, 4500, 600  # of the core
CELL_LINES, KERNEL_LINES = 25, 50
COLUMNS, KERNEL_COLUMNS = 88, 100
CELLS_A_FIGURE = 12
FIRST_OUTPUT = 250, 25  # words, code lines
FIRST_EXPERIMENT = 10  # cells
FIRST_ATTENTION = 40, 60  # cells, code lines
VERDICTS = 0.10
EXERCISES = 6, 8
TRAPS = 5
CORE_MINUTES = 180  # with the exercises of the core
LINE_WIDTH = 95

GATES = {}  # name -> function of a View (and, if it takes two, of all Views) that yields what is wrong, as sentences


def gate(function):
    """Decorator: a limit, under the function's name; the same name stands under `exceptions` in a header."""
    GATES[function.__name__] = function
    return function


def at(cell):
    """Where a cell stands, for a person who will mend it."""
    return f"cell {cell.place}, line {cell.line}"


# ---- How much -----------------------------------------------------------------------------------------------------


def count_words(view):
    return sum(cell.words for cell in view.core)


def count_code(view):
    return sum(len(cell.lines) for cell in view.shown_core)


def long_cells(view):
    limit = {False: CELL_LINES, True: KERNEL_LINES}
    return [cell for cell in view.cells if cell.is_code and len(cell.lines) > limit[cell.is_kernel]]


def wide_cells(view):
    limit = {False: COLUMNS, True: KERNEL_COLUMNS}
    return [c for c in view.cells if c.is_code and max(map(len, c.lines), default=0) > limit[c.is_kernel]]


def cells_a_figure(view):
    return len(view.core) / max(1, sum(len(cell.figures) for cell in view.core))


@gate
def cells(view):
    if len(view.core) > CELLS:
        yield f"the core has {len(view.core)} cells; at most {CELLS}"


@gate
def words(view):
    if count_words(view) > WORDS:
        yield f"the core has {count_words(view):,} words; at most {WORDS:,}"


@gate
def code_lines(view):
    if count_code(view) > CODE_LINES:
        yield f"the core shows {count_code(view)} lines of code; at most {CODE_LINES}"


@gate
def cell_lines(view):
    for cell in long_cells(view):
        yield f"{at(cell)}: {len(cell.lines)} lines of code; at most {CELL_LINES}, with a kernel {KERNEL_LINES}"


@gate
def columns(view):
    for cell in wide_cells(view):
        longest = max(cell.lines, key=len)
        yield f"{at(cell)}: {len(longest)} columns; at most {COLUMNS}, with a kernel {KERNEL_COLUMNS}: {longest.strip()}"


@gate
def figures(view):
    if cells_a_figure(view) > CELLS_A_FIGURE:
        yield f"one figure for {cells_a_figure(view):.0f} cells of the core; at least one for {CELLS_A_FIGURE}"


# ---- The way in ---------------------------------------------------------------------------------------------------


def place_of_first_output(view):
    return view.first(lambda cell: cell.outputs)


def place_of_first_experiment(view):
    return view.first(lambda cell: cell.figures or any(re.search(r"\d", line) for line in cell.printed))


def place_of_first_attention(view):
    return view.first(lambda cell: "first-attention" in cell.tags)


@gate
def first_output(view):
    place = place_of_first_output(view)
    if place is None:
        yield "no cell has an output: build the lecture first"
        return
    found = view.before(place)
    if found[0] > FIRST_OUTPUT[0] or found[1] > FIRST_OUTPUT[1]:
        yield "{} words and {} lines of code to the first output; at most {} and {}".format(*found, *FIRST_OUTPUT)


@gate
def first_experiment(view):
    place = place_of_first_experiment(view)
    if place is None or place > FIRST_EXPERIMENT:
        yield f"the first figure or number is in cell {place}; at the latest in cell {FIRST_EXPERIMENT}"


@gate
def first_attention(view):
    tagged = [cell for cell in view.code if "first-attention" in cell.tags]
    if len(tagged) != 1:
        yield f"{len(tagged)} cells tagged first-attention; it is the one cell where the learner first computes attention"
        return
    lines = view.before(tagged[0].place)[1]
    if tagged[0].place > FIRST_ATTENTION[0] or lines > FIRST_ATTENTION[1]:
        yield "{}: the first attention, after {} lines of code; at most {} cells and {} lines".format(
            at(tagged[0]), lines, *FIRST_ATTENTION
        )


@gate
def flow(view):
    mechanisms = {
        name
        for cell in view.core
        if "export" in cell.tags
        for name in re.findall(r"^def (\w+)_numpy\(", cell.source, re.MULTILINE)
        if not name.endswith("_backward")
    }
    drawn = sum(len(re.findall(r"\bplotting\.flow\(", cell.source)) for cell in view.core)
    if drawn < max(1, len(mechanisms)):
        yield f"{drawn} pictures of what flows where (plotting.flow) for {', '.join(sorted(mechanisms)) or 'the mechanism'}"


# ---- What is printed and drawn --------------------------------------------------------------------------------------


def share_of_verdicts(view):
    lines = [line for cell in view.cells for line in cell.printed if "not attempted yet" not in line]
    return sum(map(seen.is_nothing_but_a_verdict, lines)) / max(1, len(lines))


@gate
def verdicts(view):
    if share_of_verdicts(view) > VERDICTS:
        worst = [line for cell in view.cells for line in cell.printed if seen.is_nothing_but_a_verdict(line)]
        yield (
            f"{share_of_verdicts(view):.0%} of the printed lines are nothing but a verdict; at most {VERDICTS:.0%}. "
            f"Show the number, then the threshold: loss 1.71 (below 2: True). The first: {worst[0].strip()}"
        )


@gate
def line_width(view):
    for cell in view.cells:
        for line in cell.printed:
            if len(line) > LINE_WIDTH:
                yield f"{at(cell)}: a printed line of {len(line)} characters; at most {LINE_WIDTH}: {line[:60]}..."


VIEWS = "head_viewer", "bertviz_head_view", "bertviz_model_view"  # their title is the fifth or fourth argument


def untitled_views(source):
    """The views that a cell calls without a title."""
    for node in ast.walk(parse(source)):
        name = getattr(getattr(node, "func", None), "attr", None)
        if isinstance(node, ast.Call) and name in VIEWS and "title" not in [word.arg for word in node.keywords]:
            if len(node.args) < (5 if name == "head_viewer" else 4):
                yield name


@gate
def titles(view):
    entitling = set()  # functions of the notebook that set a title themselves
    for cell in view.code:
        for definition in re.finditer(r"^def (\w+)\(.*(?:\n(?:[ \t].*)?)*", cell.source, re.MULTILINE):
            if "title" in definition[0]:
                entitling.add(definition[1])
        called = set(re.findall(r"\b(\w+)\(", cell.source))
        # flow and memory take their title as the last argument, without its name
        named = re.search(r"title|\.(flow|memory)\(", cell.source)
        if cell.figures and not named and not called & entitling:
            yield f"{at(cell)}: a figure without a title"
        for name in untitled_views(cell.source):
            yield f"{at(cell)}: {name} without a title: its picture would say what rows and columns are, and no finding"


@gate
def predictions(view):
    for cell, after in zip(view.cells, [*view.cells[1:], None]):
        paragraphs = [part for part in cell.source.split("\n\n") if part.strip()] if cell.kind == "markdown" else []
        asks = [index for index, part in enumerate(paragraphs) if re.match(r"\*+Predict\b", part)]
        if asks and asks[-1] != len(paragraphs) - 1:
            yield f"{at(cell)}: text stands under a *Predict* in its own cell; the answer comes after the experiment"
        if asks and (after is None or after.kind != "code"):
            yield f"{at(cell)}: no experiment follows a *Predict*"


# ---- Exercises and text -------------------------------------------------------------------------------------------


@gate
def headers(view):
    found = [match for match, _ in view.exercises]
    if not EXERCISES[0] <= len(found) <= EXERCISES[1]:
        yield f"{len(found)} exercises; {EXERCISES[0]} to {EXERCISES[1]}"
    for match, cell in view.exercises:
        if not match["number"][-1].isalpha() or not match["importance"]:
            yield f"{at(cell)}: the header of exercise {match['number']} lacks its letter or its importance"
    if (marked := sum(bool(match["two"]) for match in found)) != 2:
        yield f"{marked} exercises are marked 'if you do only two'"


def kinds_of(view):
    return [cell.metadata.get("kind") for cell in view.cells if "exercise" in cell.metadata]


@gate
def kinds(view):
    found = kinds_of(view)
    for kind in lecture_source.KINDS:
        if kind not in found:
            yield f"no exercise of the kind {kind}"
    if found.count("module") + found.count("training") < 2:
        yield "fewer than two exercises in PyTorch (module, training)"
    needed = {"module": r"\bModule\)", "kernel": seen.KERNEL.pattern, "bug": r"\bdef \w+\("}
    for cell in view.cells:
        if "exercise" in cell.metadata and not re.search(needed.get(cell.metadata.get("kind"), ""), cell.source):
            yield f"{at(cell)}: exercise {cell.metadata['exercise']} is no {cell.metadata['kind']}"


@gate
def numbered(view):
    yield from references.unnumbered(view)


@gate
def dangling(view, views):
    yield from references.dangling(view, views)


@gate
def minutes(view):
    yield from references.minutes(view)


@gate
def core_minutes(view):
    if (found := references.minutes_of_core(view)) > CORE_MINUTES:
        yield f"the core takes {found} minutes with its exercises; at most {CORE_MINUTES}"
    for number in references.essential_beyond_core(view):
        yield f"exercise {number} is called essential, and its row of the table of minutes has none in the core"


@gate
def traps(view):
    found = sum(len(re.findall(r"^(?:#+ |\*\*)Trap\b", cell.source, re.MULTILINE)) for cell in view.texts)
    under = False
    for level, text, _ in view.headings:
        under = text.startswith("Traps") if level == 2 else under
        found += under and level == 3
    if found > TRAPS:
        yield f"{found} traps; at most {TRAPS}"


@gate
def names(view):
    code = view.code
    for index, name, later in rebound([cell.source for cell in code]):
        yield f"{at(code[index])}: a function reads {name}, which cell {code[later].place} binds to something else"


# ---- All of them --------------------------------------------------------------------------------------------------


def problems(view, views):
    """Return [(name of the gate, sentence)] for one lecture, whatever its edition; its exceptions are taken out."""
    found = []
    for name, function in GATES.items():
        takes_all = function.__code__.co_argcount == 2
        found += [(name, sentence) for sentence in (function(view, views) if takes_all else function(view))]
    exceptions = view.lecture.header.get("exceptions", {})
    broken = {name for name, _ in found}
    kept = [(name, sentence) for name, sentence in found if name not in exceptions]
    for name, reason in exceptions.items():
        if name not in GATES:
            kept.append(("exceptions", f"{name!r} is no limit; known are {', '.join(GATES)}"))
        elif not isinstance(reason, str) or len(reason.split()) < 3:
            kept.append(("exceptions", f"{name}: an exception needs a reason"))
        elif name not in broken:
            kept.append(("exceptions", f"{name}: the limit is kept, so no exception is needed"))
    return kept


def edition(view):
    """1 or 2: limits bind the second edition."""
    return view.lecture.header.get("edition", 1)


COLUMNS_OF_TABLE = {
    "lecture": lambda v, p: v.number,
    "edition": lambda v, p: edition(v),
    "cells": lambda v, p: len(v.core),
    "words": lambda v, p: count_words(v),
    "code": lambda v, p: count_code(v),
    "long": lambda v, p: len(long_cells(v)),
    "wide": lambda v, p: len(wide_cells(v)),
    "cells/figure": lambda v, p: f"{cells_a_figure(v):.0f}",
    "first output": lambda v, p: "{} w, {} l".format(*v.before(place_of_first_output(v) or 0)),
    "experiment": lambda v, p: place_of_first_experiment(v) or "-",
    "attention": lambda v, p: place_of_first_attention(v) or "-",
    "verdicts": lambda v, p: f"{share_of_verdicts(v):.0%}",
    "minutes": lambda v, p: references.minutes_of_core(v),
    "PyTorch": lambda v, p: sum(kind in ("module", "training") for kind in kinds_of(v)),
    "names": lambda v, p: sum(name == "names" for name, _ in p),
    "dangling": lambda v, p: sum(name == "dangling" for name, _ in p),
    "limits broken": lambda v, p: len({name for name, _ in p}),
}


def table(results):
    """Return the lines of a table, one row for each (View, problems)."""
    rows = [list(COLUMNS_OF_TABLE)]
    rows += [[str(column(*result)) for column in COLUMNS_OF_TABLE.values()] for result in results]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(text.rjust(width) for text, width in zip(row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]]


def report(numbers=(), root=ROOT):
    """Return (lines to print, whether every lecture of the second edition keeps its limits).

    The table has every lecture. What is wrong is listed for those of the second edition, and for those in `numbers`.
    """
    lectures = [lecture_source.read(path) for path in sorted((root / "solutions").glob("[0-9][0-9]_*.py"))]
    views = [seen.view(lecture, root / "lectures" / f"{lecture.name}.ipynb") for lecture in lectures]
    results = [(view, problems(view, views)) for view in views]
    lines, sound = table(results), True
    for view, found in results:
        binding = edition(view) != 1
        sound &= not (binding and found)
        if view.number in numbers or (binding and not numbers):
            lines += [f"{'FAILED ' if binding else ''}lecture {view.number}, {name}: {what}" for name, what in found]
    return lines, sound


def main(argv=None, root=ROOT):
    """Print the table and what is wrong. Return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m utils.authoring.gates", description=__doc__.split("\n")[0])
    parser.add_argument("numbers", nargs="*", metavar="NN", help="lectures whose problems are listed, as 01 06")
    lines, sound = report(parser.parse_args(argv).numbers, root)
    print("\n".join(lines))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
