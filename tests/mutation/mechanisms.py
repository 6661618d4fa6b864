"""The mutants of attention/: each module's functions, classes and kernels with one error each."""

import ast
import functools
from collections import Counter
from typing import NamedTuple

from tests.mutation import kernels, syntax
from utils.paths import ROOT

MODULES = sorted(path.stem for path in (ROOT / "attention").glob("*.py") if path.stem != "__init__")
LINES = 3  # of a string that is taken for a kernel, at least


class Change(NamedTuple):
    """One mutant of one definition of attention/<module>.py."""

    module: str
    definition: str
    first: int  # the line of the module where the definition begins
    mutant: syntax.Mutant  # lines count from there; of a kernel, from the first of its string
    kernel: str | None  # the string as it was

    @property
    def name(self):
        return f"{self.definition} {self.mutant.name}"

    @property
    def line(self):
        """The line of the module that is changed."""
        return self.first + self.mutant.line - 1


class Definition(NamedTuple):
    name: str
    first: int
    text: str
    lines: frozenset  # of the text, numbered from 1: those that may be changed
    is_kernel: bool


def path_of(module):
    return ROOT / "attention" / f"{module}.py"


@functools.cache
def definitions(module):
    """Every Definition of a module, in order: functions and classes, and the kernels, which are strings."""
    text = path_of(module).read_text(encoding="utf-8")
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("test_"):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            part = "\n".join(text.split("\n")[first - 1 : node.end_lineno])
            found.append(Definition(node.name, first, part, _changeable(ast.parse(part)), False))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            pieces = [n for n in ast.walk(node.value) if _is_long(n)]
            for i, piece in enumerate(pieces):
                name = node.targets[0].id + (f" {i + 1}" if len(pieces) > 1 else "")
                every = frozenset(range(1, piece.value.count("\n") + 2))
                found.append(Definition(name, piece.lineno, piece.value, every, True))
    return found


def _is_long(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count("\n") >= LINES


def _changeable(tree):
    """The lines of a definition without decorators, docstrings, and what an error says."""
    lines, without = set(range(1, tree.body[0].end_lineno + 1)), []
    for node in ast.walk(tree):
        without += getattr(node, "decorator_list", [])
        if isinstance(node, ast.Raise):
            without.append(node)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            without.append(node.body[0])
    for node in without:
        lines -= set(range(node.lineno, node.end_lineno + 1))
    return frozenset(lines)


def changes(module, only=()):
    """Every Change of a module; only: the names of the definitions that are wanted, all where none is named."""
    for d in definitions(module):
        if only and d.name.split()[0] not in only:
            continue
        names = Counter()  # a name shows the beginning of a line: two mutants may share it
        for mutant in (kernels.mutants if d.is_kernel else syntax.mutants)(d.text, d.lines):
            names[mutant.name] += 1
            again = f" ({names[mutant.name]})" if names[mutant.name] > 1 else ""
            yield Change(
                module, d.name, d.first, mutant._replace(what=mutant.what + again), d.text if d.is_kernel else None
            )


def named(words):
    """{module: names of definitions} for words like "attention", "attention.flash", "attention.flash.online_softmax".

    No names stand for all. Raises ValueError for a word that means nothing.
    """
    found = {}
    for word in words:
        _, module, name, *_ = [*word.split("."), "", "", ""]
        if module and module not in MODULES or name and name not in names_of(module):
            raise ValueError(f"{word}: there is no such module or definition in attention/")
        for each in [module] if module else MODULES:
            found.setdefault(each, set()).update([name] if name else names_of(each))
    return found


def names_of(module):
    return [d.name.split()[0] for d in definitions(module)]
