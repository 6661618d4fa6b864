"""A CUDA source as text: comments and literals put aside, lines, brackets."""

import re

SKIPPED = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)


def blank(source):
    """The source with comments and literals replaced by spaces: same length, same lines, nothing to trip over."""
    return SKIPPED.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), source)


def line_at(source, position):
    return source.count("\n", 0, position) + 1


def split_at_commas(text):
    """Split at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "<([{") - (character in ">)]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def closing(text, position):
    """Position of the bracket that closes the one at `position`."""
    depth = 0
    for i in range(position, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def point_at(source, line, message, column=None):
    """A compiler's message with the line it is about."""
    lines = source.split("\n")
    text = lines[line - 1] if 0 < line <= len(lines) else ""
    shown = f"line {line}: {message}\n{line:>5} | {text}"
    if column and column <= len(text):
        shown += "\n      | " + re.sub(r"[^\t]", " ", text[: column - 1]) + "^"
    return shown
