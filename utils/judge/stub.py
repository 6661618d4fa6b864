"""Whether an answer is still the stub: the lecture's text of it with a marker in place of the solution, and nothing else."""

import ast
import inspect
import textwrap

from utils.judge.handed import Handed

PYTHON, CUDA = "raise NotImplementedError", "// your code here"


def is_stub(text, own, marker):
    """Whether a text is the stub of the course's own: what the marker stands for is cut out, the rest is all there.

    own: the text of the course's own answer; "" where the lecture has not been built. A marker that has its block for
    itself is a stub in any case.
    """
    lines = _lines(text)
    places = [i for i, line in enumerate(lines) if line == marker]
    if not places:
        return False
    if all(_is_alone(lines, place) for place in places):
        return True
    if not own:
        return False
    rest = _lines(own)
    parts = [lines[a + 1 : b] for a, b in zip([-1, *places], [*places, len(lines)])]
    first, *middle, last = parts
    if rest[: len(first)] != first or rest[len(rest) - len(last) :] != last:
        return False
    rest = rest[len(first) : len(rest) - len(last)]
    for part in middle:
        at = next((i for i in range(len(rest)) if rest[i : i + len(part)] == part), None) if part else 0
        if at is None:
            return False
        rest = rest[at + len(part) :]
    return bool(rest)  # else the solution stands there, and only the marker was left


def is_python_stub(answer, own):
    """Whether a function or class is the stub."""
    if is_stub(source(answer), source(own), PYTHON):
        return True
    if inspect.isclass(answer) and not source(answer):  # a class of a notebook has no source, its methods have
        methods = [name for name, part in vars(answer).items() if inspect.isfunction(part)]
        return bool(methods) and all(is_python_stub(vars(answer)[name], getattr(own, name, None)) for name in methods)
    code = getattr(answer, "__code__", None)  # without its source: a body that does nothing else
    return (
        not source(answer) and code is not None and code.co_names == ("NotImplementedError",) and not code.co_freevars
    )


def stands_before_code(answer):
    """Whether a `raise NotImplementedError` stands before other lines of its block, which it keeps from running."""
    try:
        tree = ast.parse(source(answer))
    except SyntaxError:
        return False
    blocks = [block for node in ast.walk(tree) for block in (getattr(node, "body", None),) if isinstance(block, list)]
    return any(_raises(statement) for block in blocks for statement in block[:-1])


def source(thing):
    """The source of a function or class, "" where it is not to be had."""
    if isinstance(thing, Handed):
        return thing.text
    try:
        return textwrap.dedent(inspect.getsource(thing))
    except (OSError, TypeError, IndentationError):
        return ""


def _raises(statement):
    return (
        isinstance(statement, ast.Raise) and statement.exc is not None and "NotImplementedError" in ast.dump(statement)
    )


def _lines(text):
    without = (line.partition("  #")[0].strip() for line in text.splitlines())
    return [line for line in without if line]


def _is_alone(lines, place):
    """Whether nothing stands beside a marker in its block: `{` or a heading or docstring before it, `}` or nothing after."""
    before, after = lines[place - 1] if place else "", lines[place + 1 :]
    return before.endswith(("{", ":", '"""')) and (not after or after[0].startswith(("}", "def ", "class ", "@")))
