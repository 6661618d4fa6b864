"""One-step errors of Python code, by its syntax tree."""

import ast
import copy
import re
from typing import NamedTuple

SCALE = 1.05
OTHER = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
TWINS = ("maximum minimum", "max min", "amax amin", "floor ceil", "argmax argmin", "ones zeros", "triu tril", "any all")
TWIN = {a: b for pair in TWINS for a, b in (pair.split(), pair.split()[::-1])}
SCALED = {"exp", "exp2", "softmax", "log_softmax"}  # what is exponentiated is multiplied
MULTIPLIED = {"sqrt", "einsum", "matmul", "dot"}  # the result is


class Mutant(NamedTuple):
    line: int
    column: int
    what: str  # "a < b: < becomes <="
    source: str

    @property
    def name(self):
        return f"line {self.line}.{self.column}: {self.what}"


def mutants(source, lines=None, scale=False):
    """Every Mutant of a source whose change begins in one of the lines, numbered from 1; None stands for all.

    scale: only those in which a factor is wrong by 5 %.
    """
    tree = ast.parse(source)
    found = {}
    for parent in ast.walk(tree):
        for node, put in _children(parent):
            line = getattr(node, "lineno", None)
            if line is None or (lines is not None and line not in lines):
                continue
            for what, change in _scales(node) if scale else _changes(node):
                put(ast.fix_missing_locations(ast.copy_location(change(node), node)))
                text = ast.unparse(tree)
                found.setdefault(text, Mutant(line, node.col_offset, what, text))
                put(node)
    found.pop(ast.unparse(tree), None)
    return sorted(found.values())


def _children(parent):
    """(node, a function that puts another in its place) for each node below; not what `copy=` says, which never shows."""
    if isinstance(parent, ast.keyword) and parent.arg == "copy":
        return
    if isinstance(parent, ast.Call) and ast.unparse(parent.func).split(".")[-1].startswith("check_"):
        return  # what is said of wrong arguments is no part of an exercise
    for field, value in ast.iter_fields(parent):
        if isinstance(value, ast.AST):
            yield value, lambda new, field=field: setattr(parent, field, new)
        for i, item in enumerate(value if isinstance(value, list) else []):
            if isinstance(item, ast.AST):
                yield item, lambda new, value=value, i=i: value.__setitem__(i, new)


def _with(**fields):
    def change(node):
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    return change


def _short(node):
    text = ast.unparse(node).split("\n")[0]
    return text if len(text) <= 40 else f"{text[:37]}..."


def _changes(node):
    """(what it says, a function that makes the new node) for each error at this place."""
    short = _short(node) if isinstance(node, (ast.expr, ast.stmt)) else ""
    if re.match(r"(\w+\.)?check_\w+\(", short):
        return
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in OTHER:
        yield f"{short}: {_word(node.op)} becomes {_word(OTHER[type(node.op)]())}", _with(op=OTHER[type(node.op)]())
    if isinstance(node, ast.BinOp):
        for side in ("left", "right"):
            yield f"{short} becomes its {side} side", lambda n, side=side: getattr(n, side)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        other = OTHER[type(node.ops[0])]()
        yield f"{short}: {_word(node.ops[0])} becomes {_word(other)}", _with(ops=[other, *node.ops[1:]])
    if isinstance(node, ast.Constant):
        yield from _constants(node, short)
    if isinstance(node, ast.UnaryOp):
        yield f"{short} becomes {_short(node.operand)}", lambda n: n.operand
    if isinstance(node, ast.IfExp):
        yield f"{short} becomes {_short(node.body)}", lambda n: n.body
        yield f"{short} becomes {_short(node.orelse)}", lambda n: n.orelse
    if isinstance(node, (ast.If, ast.While)):
        for value in (True, False):
            if not (value and isinstance(node, ast.While)):
                yield f"if {_short(node.test)} becomes {value}", _with(test=ast.Constant(value))
    if isinstance(node, ast.Call):
        yield from _calls(node, short)
    if isinstance(node, ast.AugAssign):
        yield f"{short}: = instead", lambda n: ast.Assign([n.target], n.value)
    if isinstance(node, (ast.AugAssign, ast.Expr)) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)
    ):
        yield f"{short}: left out", lambda n: ast.Pass()
    if isinstance(node, ast.Slice):
        for part in ("lower", "upper", "step"):
            end = getattr(node, part)
            if end is not None and not (part == "lower" and isinstance(end, ast.Constant) and end.value == 0):
                yield f"{short} without its {part} end", _with(**{part: None})
    if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Load) and len(node.elts) > 1:
        first, second, *rest = node.elts
        yield f"{short}: the first two change places", lambda n: _with(elts=[n.elts[1], n.elts[0], *n.elts[2:]])(n)


def _constants(node, short):
    value = node.value
    if isinstance(value, bool):
        yield f"{short} becomes {not value}", _with(value=not value)
    elif isinstance(value, (int, float)):
        for new in (value + 1, value - 1):
            yield f"{short} becomes {new}", _with(value=new)


def _calls(node, short):
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in TWIN:
        field = "attr" if isinstance(node.func, ast.Attribute) else "id"
        yield f"{short}: {TWIN[name]} instead", lambda n: _with(func=_with(**{field: TWIN[name]})(n.func))(n)
    for i, keyword in enumerate(node.keywords):
        if keyword.arg and keyword.arg != "copy":
            yield (
                f"{short} without {keyword.arg}",
                lambda n, i=i: _with(keywords=[*n.keywords[:i], *n.keywords[i + 1 :]])(n),
            )
    if name == "where" and len(node.args) == 3:
        for i in (1, 2):
            yield f"{short} becomes {_short(node.args[i])}", lambda n, i=i: n.args[i]
    elif name in ("astype", "swapaxes", "copy", "clip", "transpose") and isinstance(node.func, ast.Attribute):
        module = isinstance(node.func.value, ast.Name) and node.func.value.id in ("np", "torch", "math")
        if not module:
            yield f"{short} without .{name}", lambda n: n.func.value
        elif node.args:
            yield f"{short} becomes {_short(node.args[0])}", lambda n: n.args[0]


def _scales(node):
    def times(thing):
        return ast.BinOp(ast.Constant(SCALE), ast.Mult(), thing)

    short = _short(node) if isinstance(node, (ast.expr, ast.stmt)) else ""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield f"{SCALE} * ({short})", times
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in MULTIPLIED:
            yield f"{SCALE} * {short}", times
        if name in SCALED and node.args:
            yield f"{short}: its argument times {SCALE}", lambda n: _with(args=[times(n.args[0]), *n.args[1:]])(n)
    if isinstance(node, ast.Name) and node.id in ("scale", "attention_scale") and isinstance(node.ctx, ast.Load):
        yield f"{SCALE} * {short}", times


def _word(operator):
    words = {ast.And: "and", ast.Or: "or", ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in"}
    if type(operator) in words:
        return words[type(operator)]
    if isinstance(operator, ast.cmpop):
        return ast.unparse(ast.Compare(ast.Name("a"), [operator], [ast.Name("b")]))[2:-2]
    return ast.unparse(ast.BinOp(ast.Name("a"), operator, ast.Name("b")))[2:-2]
