"""Where a line in a helper is reached from.

The barrier in a helper is one place in the source. Threads that come to it through different calls stand at different
barriers, as `if (c) all_wait(); else all_wait();` shows: so calls of a function that holds one are told apart where there
are several. All calls are marked only once something has gone wrong in a helper, as it takes time.
"""

import re

from .structure import ON_DEVICE, blocks, without_directives
from .text import blank, closing, line_at

BARRIER = re.compile(r"\b__syncthreads(?:_count|_and|_or)?\s*\(|\bsync\s*\(")
NAME = re.compile(r"\b(?!__\w+__\b)(\w+)\s*\(")
BEFORE_A_CALL = {"return", "else", "do", "case", "and", "or", "not"}  # any other word before it: a declaration


def marked(source, every=False):
    """The source, its PTX translated, with calls as `(CuFrom(line, number), call)`. Line numbers stay.

    every: all calls of the source's functions on the device, and not only those that lead to a barrier in several ways.
    """
    bare = without_directives(blank(source))
    functions = [b for b in blocks(bare) if b.kind == "function" and ON_DEVICE.search(b.head)]
    edits = []
    bodies = _bodies(bare, functions)
    for name in sorted(bodies) if every else _with_barriers(bodies):
        calls = [call for function in functions for call in _calls(bare, name, function)]
        if len(calls) > 1 or every:
            edits += calls
    inserted = []  # one call may stand in the arguments of another
    for number, (start, end) in enumerate(sorted(edits), 1):
        inserted += [(start, f"(CuFrom(__builtin_LINE(), {number}), "), (end, ")")]
    for position, text in sorted(inserted, key=lambda one: one[0], reverse=True):
        source = source[:position] + text + source[position:]
    return source


def helper_at(source, line):
    """Whether a line of the source is in a function on the device that is no kernel."""
    bare = blank(source)
    return any(
        b.kind == "function" and "__global__" not in b.head and line_at(bare, b.start) <= line <= line_at(bare, b.close)
        for b in blocks(bare)
    )


def _bodies(bare, functions):
    """{name: body} of the functions that are no kernels."""
    bodies = {}
    for function in functions:
        if "__global__" not in function.head and (name := NAME.search(function.head)):
            bodies[name.group(1)] = bodies.get(name.group(1), "") + bare[function.open : function.close]
    return bodies


def _with_barriers(bodies):
    """The names of the functions that hold a barrier, or call one that does."""
    found = {name for name, body in bodies.items() if BARRIER.search(body)}
    while more := {
        name
        for name, body in bodies.items()
        if name not in found and any(re.search(rf"\b{other}\b", body) for other in found)
    }:
        found |= more
    return sorted(found)


def _calls(bare, name, function):
    """(start, end) of each call in a function's body, with the namespaces before the name."""
    for match in re.finditer(rf"(?<![\w.:])(?:::)?(?:\w+::)*{name}\b", bare[function.open : function.close]):
        start, end = function.open + match.start(), function.open + match.end()
        before = bare[function.open : start].rstrip()
        word = re.search(r"\w+$", before)
        if before.endswith(("->", ".")) or word and word[0] not in BEFORE_A_CALL:
            continue
        opened = _arguments(bare, end)
        if opened is not None:
            yield start, closing(bare, opened) + 1


def _arguments(bare, position):
    """The `(` of a call whose name, or name and template arguments, end here; None where it is no call."""
    match = re.compile(r"\s*(<)?").match(bare, position)
    if match.group(1):
        depth = 0
        for position in range(match.start(1), len(bare)):
            depth += (bare[position] == "<") - (bare[position] == ">")
            if depth == 0 or bare[position] in ";{}":
                break
        position += 1
    match = re.compile(r"\s*\(").match(bare, position)
    return match.end() - 1 if match else None
