"""Which statements of a notebook define a name: those that bind it, and those that bind what these read.

Nothing is run here. A statement is one at the top of a code cell, with the line numbers that it has there.
"""

import ast
import builtins
import dataclasses
import functools
import symtable

CHECKS = {"check", "progress"}  # what a learner calls; no answer needs it
SHELL = ("%", "!", "?")  # what IPython takes at the beginning of a line, and Python does not


@dataclasses.dataclass(frozen=True)
class Statement:
    """One statement at the top of a code cell: where it stands, and the names that it binds, changes and reads."""

    cell: int
    first: int  # line, from 1
    last: int
    text: str
    binds: frozenset
    changes: frozenset
    reads: frozenset
    is_definition: bool  # def or class
    is_import: bool
    has_star: bool  # from x import *


def statements(cells):
    """The statements of code cells, given as texts, and {cell: what is wrong} for those that are no Python."""
    found, broken = [], {}
    for index, text in enumerate(cells):
        own, problem = _of_cell(text)
        found += [moved(statement, index) for statement in own]
        if problem:
            broken[index] = problem
    return found, broken


@functools.lru_cache(maxsize=2000)
def _of_cell(text):
    plain = without_magics(text)
    try:
        return [_statement(0, node, plain.splitlines()) for node in ast.parse(plain).body], ""
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        return [], f"{getattr(error, 'msg', None) or type(error).__name__}{f' in line {line}' if line else ''}"


def without_magics(text):
    """The text of a cell without the lines that only IPython understands; the other lines keep their numbers."""
    return "\n".join("" if line.lstrip().startswith(SHELL) else line for line in text.splitlines())


def closure(found, names, stop=frozenset()):
    """The statements that bind `names`, and all that these need, in order; and the names that nothing binds.

    Statements that call a check are left out. Names in `stop` are not looked for: they come from elsewhere.
    """
    usable = [s for s in found if s.is_definition or not s.reads & CHECKS]
    wanted, chosen, missing = set(names), set(), set()
    pending = list(names)
    while pending:
        name = pending.pop()
        binding = [s for s in usable if name in s.binds]
        if not binding:
            missing.add(name)
            continue
        # `np.testing.assert_allclose(...)` changes no module.
        changing = [] if all(s.is_import for s in binding) else [s for s in usable if name in s.changes]
        for statement in (*binding, *changing):
            if statement in chosen:
                continue
            chosen.add(statement)
            fresh = statement.reads - wanted - stop
            wanted |= fresh
            pending += fresh
    missing -= set(dir(builtins)) | {"__name__", "__file__"}
    if missing:
        chosen |= {s for s in usable if s.has_star}
    return [s for s in usable if s in chosen], missing


def parts(cells, chosen):
    """[(cell, its text with nothing but the chosen statements)]: the lines keep their numbers."""
    made = {}
    for statement in chosen:
        lines = made.setdefault(statement.cell, [""] * len(without_magics(cells[statement.cell]).splitlines()))
        own = without_magics(cells[statement.cell]).splitlines()
        lines[statement.first - 1 : statement.last] = own[statement.first - 1 : statement.last]
    return [(cell, "\n".join(lines)) for cell, lines in sorted(made.items())]


def moved(statement, cells):
    """The same statement, so many cells further down."""
    return dataclasses.replace(statement, cell=statement.cell + cells)


def _statement(cell, node, lines):
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    text = "\n".join(lines[first - 1 : node.end_lineno])
    top = symtable.symtable(ast.unparse(node), "cell", "exec")
    binds = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    return Statement(
        cell,
        first,
        node.end_lineno,
        text,
        frozenset(binds),
        frozenset(_changes(node) - binds),
        frozenset(_reads(top) | (binds if isinstance(node, ast.AugAssign) else set())),
        isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)),
        isinstance(node, (ast.Import, ast.ImportFrom)),
        isinstance(node, ast.ImportFrom) and node.names[0].name == "*",
    )


def _reads(top):
    found, pending = set(), [top]
    while pending:
        table = pending.pop()
        pending += table.get_children()
        here = table is top
        found |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (here or s.is_global())}
    return found


def _changes(node):
    """Names whose objects a statement changes: `x[0] = 1`, `x.a = 1`, `x.append(1)`."""
    targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [getattr(node, "target", None)]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        targets = [node.value.func]
    if not isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete, ast.Expr)):
        return set()
    return {_base(target) for target in targets if isinstance(target, (ast.Attribute, ast.Subscript))} - {""}


def _base(node):
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
