"""What a C++ compiler or linker complains about, as sentences at the learner's lines."""

import re

from ..source import find_kernels, note_of_includes, skipped_includes, unclosed_brace
from ..structure import FOR_HOST, host_line
from ..text import blank, line_at, point_at

SHOWN_ERRORS = 3
# What only a GPU can do, and what to do instead.
ONLY_ON_A_GPU = {
    r"\bwgmma": "wgmma: use mma.sync or wmma, or run it on a GPU",
    r"\basm\b|\b__asm__": "this PTX: run it on a GPU, or give the function another body under `#ifdef CU_ON_CPU`",
    r"\bcuda::(?!barrier|pipeline|make_pipeline|memcpy_async|aligned_size|thread_scope|device|std::move)\w": (
        "of cuda:: only barriers, pipelines and memcpy_async: run it on a GPU"
    ),
    r"cluster": "clusters, because blocks run one after another: run it on a GPU",
    r"<<<": "launches from a kernel: launch it with kernel[grid, block](...)",
}
MESSAGE = re.compile(r"^(?:.*[/\\])?kernel\.cu:(\d+):(?:(\d+):)? (?:fatal )?(error|note|warning)?:? ?(.*)$")
LEADS_TO = re.compile(
    r"(?:^In file included from|^ +from) (?:.*[/\\])?kernel\.cu:(\d+)"
    r"|kernel\.cu:(\d+):\d+:   required from"
)
CAME_FROM = re.compile(
    r"kernel\.cu:(\d+):\d+: note: "
    r"(?:in instantiation|in expansion of macro|called from|expanded from|in evaluation)"
)
AT_ENTRY = re.compile(r"^entry of (.+?):1:", re.MULTILINE)  # the line that compile.py adds for our own entry
UNDEFINED = re.compile(
    r"undefined (?:reference to|symbol:?) [`'\"]?([^'\"\n]+)|^ +\"?_?([^\"\n]+)\"?, referenced from:", re.MULTILINE
)
SHOWN_WARNING = re.compile(r"\[-W(?:[\w-]*uninitialized|array-bounds|format|return-type)\b[^\]]*\]$")
VARIABLE_SIZE = re.compile(r"variable.length array|variably modified|variable-sized")


def explain(stderr, source):
    """The errors in a compiler's or linker's output, each at its line of `source`, as one text."""
    if re.search(r"expected '}'", stderr) and (brace := unclosed_brace(source)):
        return point_at(source, *brace)
    if found := errors(stderr):
        if line := host_line(source, [line for line, *_ in found]):
            return point_at(source, line, FOR_HOST)
        return in_source(found, source) + note_of_includes(skipped_includes(source))
    if at_entry := AT_ENTRY.search(stderr):
        return wrong_kernel(at_entry.group(1), source)
    if undefined := UNDEFINED.search(stderr):
        return not_defined(undefined.group(1) or undefined.group(2), source) + note_of_includes(
            skipped_includes(source)
        )
    return stderr.strip() or "the compiler failed without saying why"


def errors(stderr):
    """The compiler's errors as (line of the kernel, column or 0, message), once each.

    An error inside a header is shown at the line of the kernel that led there; gcc names it before the error, clang
    after it.
    """
    found, before, waiting, included = [], None, None, None
    for text in stderr.splitlines():
        match = MESSAGE.match(text)
        if match and match.group(3) == "error":
            found.append((int(match.group(1)), int(match.group(2) or 0), match.group(4)))
            before = waiting = included = None
        elif lead := LEADS_TO.search(text):
            before = int(lead.group(1) or lead.group(2))
        elif (origin := CAME_FROM.search(text)) and waiting:
            found.append((int(origin.group(1)), 0, waiting))
            waiting = None
        elif origin and included is not None:  # in a header of ours, for the sake of this line
            found[included] = (int(origin.group(1)), 0, found[included][2])
            included = None
        elif " error: " in text:
            message = text.split(" error: ", 1)[1]
            if before:
                included = len(found)
                found.append((before, 0, message))
            else:
                waiting = message
            before = None
    return found


def warnings_in(stderr):
    """What a compiler warns of that a learner should see, as (line of the kernel, text), once each."""
    found = []
    for text in stderr.splitlines():
        match = MESSAGE.match(text)
        if match and match.group(3) == "warning" and SHOWN_WARNING.search(text):
            found.append((int(match.group(1)), tidy(match.group(4))))
    return list(dict.fromkeys(found))


def in_source(found, source):
    shown, lines = [], source.split("\n")
    for number, column, message in found[:SHOWN_ERRORS]:
        line = lines[number - 1] if number <= len(lines) else ""
        if what := next((text for pattern, text in ONLY_ON_A_GPU.items() if re.search(pattern, line)), None):
            return "\n".join([*shown, point_at(source, number, f"this is not available on the CPU ({what})")])
        if VARIABLE_SIZE.search(message):  # what follows is about the same array
            is_shared = "__shared__" in line
            remedy = (
                "the size of a shared array must be a constant; else use extern __shared__"
                if is_shared
                else ("the size of an array must be a constant")
            )
            return "\n".join([*shown, point_at(source, number, remedy)])
        if "frame" in message and "larger" in message or "stack frame size" in message:
            message = "the local variables of one thread take more than 88 KB: use shared or global memory"
        shown.append(point_at(source, number, tidy(message), caret(line, column, message)))
    hidden = len(found) - len(shown)
    if hidden > 0:
        shown.append(f"and {hidden} more error{'s' * (hidden > 1)}")
    return "\n".join(shown)


def wrong_kernel(instance, source):
    """The kernel compiles, but our entry cannot call it."""
    name = instance.split("<")[0]
    line = next((k.line for k in find_kernels(source) if k.name == name), 0)
    return point_at(
        source,
        line,
        f"{instance} must be one `__global__ void` function without reference parameters, and template=... must fit it",
    )


def missing(stderr):
    """The name of the first function that a linker misses, or None."""
    undefined = UNDEFINED.search(stderr)
    if not undefined:
        return None
    return _last_part(re.sub(r"\(.*", "", undefined.group(1) or undefined.group(2)).strip())


def _last_part(name):
    """`float ns::f<int>` -> `f`."""
    return re.split(r"[\s:]", re.sub(r"<.*", "", name))[-1]


def not_defined(function, source):
    """`function` is as the linker spells it: `f(float)`."""
    name = re.sub(r"\(.*", "", function).strip()
    if declared := re.search(rf"\b{re.escape(_last_part(name))}\b", blank(source)):
        return point_at(source, line_at(source, declared.start()), f"{name} is declared but not defined")
    return f"{name} is declared but not defined"


def tidy(message):
    return re.sub(r" \[-W[^\]]*\]$", "", message)


def caret(line, column, message):
    """The column to point at: that of the quoted word if it is elsewhere (a rewritten line has other columns)."""
    for word in re.findall(r"'([^']+)'", message):
        match = re.search(rf"\b{re.escape(word)}\b", line)
        if match and not line[column - 1 :].startswith(word):
            return match.start() + 1
    return None if "__shared__" in line else column
