"""Without the language model every lecture goes on: its cells do nothing, and no other cell needs what they bind."""

import symtable

import pytest

from utils.authoring import source as lecture_source
from utils.language_model import files
from utils.paths import ROOT

LECTURES = [lecture_source.read(path) for path in sorted((ROOT / "solutions").glob("[0-9][0-9]_*.py"))]


def cells(lecture, tagged):
    return [cell for cell in lecture.cells if cell.kind == "code" and ("language-model" in cell.tags) == tagged]


def tables(table):
    """A symbol table and all that are nested in it."""
    yield table
    for inner in table.get_children():
        yield from tables(inner)


def names(cell):
    """The names that a cell binds in the notebook, and those of the notebook that it reads."""
    top, *inner = tables(symtable.symtable(cell.source, "cell", "exec"))
    bound = {name.get_name() for name in top.get_symbols() if name.is_assigned() or name.is_imported()}
    read = {name.get_name() for name in top.get_symbols() if name.is_referenced()}
    read |= {name.get_name() for table in inner for name in table.get_symbols() if name.is_global()}
    return bound, read


def idle(cells):
    """What cells print where the model is missing, run one after the other in a notebook that has nothing else."""
    namespace = {}
    for cell in cells:
        exec(compile(cell.source, f"line {cell.line}", "exec"), namespace)


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setattr(files, "PACKAGE", "no_such_package")


@pytest.mark.parametrize("lecture", LECTURES, ids=lambda lecture: lecture.name)
def test_without_the_model_its_cells_say_how_to_get_it_and_nothing_else(lecture, missing, capsys):
    found = cells(lecture, tagged=True)
    idle(found)
    said = capsys.readouterr().out
    loads = sum("language_model.load()" in cell.source for cell in found)
    assert loads == bool(found), "the model is loaded once a lecture"
    assert said == (f"{files.problem()}\n" if found else "")


def needed_of_the_model(lecture_cells):
    """Names that a cell without the model reads although a cell with it has bound them last."""
    bound_by, found = {}, []
    for cell in lecture_cells:
        if cell.kind == "code":
            tagged, (bound, read) = "language-model" in cell.tags, names(cell)
            found += [name for name in read - bound if bound_by.get(name) and not tagged]
            bound_by |= dict.fromkeys(bound, tagged)
    return found


@pytest.mark.parametrize("lecture", LECTURES, ids=lambda lecture: lecture.name)
def test_no_other_cell_needs_what_they_bind(lecture):
    assert needed_of_the_model(lecture.cells) == []


def test_a_cell_that_needs_it_is_seen():
    tag = ("language-model",)
    sources = [("x = 1", ()), ("if smollm:\n    x = 2", tag), ("def f(q):\n    y = q\n    return x", ())]
    assert needed_of_the_model([lecture_source.Cell("code", text, 1, tags) for text, tags in sources]) == ["x"]
    sources = [("q = y = 1", ()), ("def f(q):\n    y = q\n    return q", tag), ("print(q, y)", ())]
    assert needed_of_the_model([lecture_source.Cell("code", text, 1, tags) for text, tags in sources]) == []


def test_a_cell_without_its_guard_is_seen(missing):
    unguarded = lecture_source.Cell("code", "smollm = None\nsmollm.encode('text')", 1)
    with pytest.raises(AttributeError):
        idle([unguarded])
