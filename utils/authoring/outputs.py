"""What a cell's outputs come down to, and when two runs of a cell agree.

`clean` puts outputs in the form that notebooks keep; `differences` compares the kept ones with new ones. Text is
compared word for word and number for number, pictures by what they show and by the words in them. The tolerances cover
another processor's rounding and nothing more; tests/authoring/test_outputs.py holds them to it.
"""

import copy
import difflib
import itertools
import math
import re

from utils.authoring import pictures

# Written to stderr by libraries on some machines and not on others; says nothing about the course.
NOISE = re.compile(r".*(NNPACK|font cache|frozen modules|PYDEVD_DISABLE_FILE_VALIDATION).*\n?")

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?")
CONTENT_ID = re.compile(r"(?<![0-9A-Za-z])(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f])[0-9a-f]{8,64}(?![0-9A-Za-z])")
ADDRESS = re.compile(r"<.* at 0x[0-9a-fA-F]{6,}.*>")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
ENCODED = re.compile(r"[A-Za-z0-9+/=]{120,}")
RELATIVE = 2e-3  # of a printed float
SMALL = (
    1e-6  # below this a number is rounding, and only its magnitude says something: "difference 1e-7", 3e-7 elsewhere
)
MAGNITUDE = 30.0  # by which factor rounding may differ
EPSILON = 2.2e-16  # what a difference of exactly 0 counts as
LONGEST = 300  # characters of a line that a report shows
NAMES = {"image/png": "the picture", "text/html": "the HTML view", "text/markdown": "the Markdown text"}
NAMES |= {"stdout": "the printed text", "text/plain": "the value shown", "image/svg+xml": "the drawing"}


def clean(outputs):
    """Return a cell's outputs as a notebook keeps them: one stream of each name, no noise, PNGs of 64 colours."""
    cleaned, streams = [], {}
    for output in copy.deepcopy(outputs):
        if output["output_type"] == "stream":
            if output["name"] in streams:
                streams[output["name"]]["text"] += output["text"]
                continue
            streams[output["name"]] = output
        data = output.get("data", {})
        if "image/png" in data:
            data["image/png"] = pictures.quantised(data["image/png"])
        cleaned.append(output)
    if "stderr" in streams:
        streams["stderr"]["text"] = NOISE.sub("", streams["stderr"]["text"])
    return [output for output in cleaned if output["output_type"] != "stream" or output["text"]]


def plain(text):
    """Return text without the codes that colour it in a terminal."""
    return COLOUR.sub("", text)


def unfit(output):
    """Return why an output cannot be kept in a notebook that is compared elsewhere, as a sentence; "" if it can."""
    if output.get("name") == "stderr":
        return f"writes to stderr: {output['text'].strip()}"
    for text in (output.get("text", ""), output.get("data", {}).get("text/plain", "")):
        if found := ADDRESS.search(text):
            return f"shows an address in memory, another one each time: {found[0]}"
    return ""


def differences(expected, actual, approx=None, keep=None):
    """Return what distinguishes two lists of outputs, as sentences; an empty list if they agree.

    `approx` is the metadata of that name of a cell tagged `approx`: {"numbers": relative tolerance, "picture": share of
    it that may change}. `keep`, a path without an ending, says where pictures that differ are kept as files.
    """
    approx = approx or {}
    expected, actual = [[_parts(output) for output in clean(outputs)] for outputs in (expected, actual)]
    found = []
    if len(expected) != len(actual):
        found.append(f"{len(expected)} outputs expected, {len(actual)} came: {_kinds(expected)} / {_kinds(actual)}")
    for index, (old, new) in enumerate(itertools.zip_longest(expected, actual, fillvalue={}), 1):
        where = keep.with_name(f"{keep.name}_output_{index}") if keep else None
        for kind in sorted(old.keys() | new.keys()):
            if kind not in new:
                found.append(f"output {index}: {_name(kind)} is missing{_excerpt(kind, old[kind])}")
            elif kind not in old:
                found.append(f"output {index}: {_name(kind)} is new{_excerpt(kind, new[kind])}")
            elif message := _difference(kind, old[kind], new[kind], approx, where):
                found.append(f"output {index}, {_name(kind)}: {message}")
    return found


def _parts(output):
    """Return what of an output is compared, by kind."""
    if output["output_type"] == "stream":
        return {output["name"]: output["text"]}
    if output["output_type"] == "error":
        return {"error": f"{output['ename']}: {output['evalue']}"}
    parts = {kind: content for kind, content in output["data"].items() if "widget-view" not in kind}
    if "image/png" in parts:
        parts["image/png"] = parts["image/png"], output.get("metadata", {}).get("image/png", {}).get("words")
    return parts


def _name(kind):
    return NAMES.get(kind, kind)


def _kinds(outputs):
    return ", ".join(" and ".join(map(_name, output)) for output in outputs) or "none"


def _excerpt(kind, content):
    """Return how a text begins; nothing of what is no text to read."""
    if not isinstance(content, str) or kind == "text/html":
        return ""
    return f": {_shown(content.strip().splitlines()[0])}" if content.strip() else ""


def _shown(line):
    """Return a line as a report can show it: no encoded pictures, no colours, not for ever."""
    line = ENCODED.sub("...", plain(line))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def _difference(kind, expected, actual, approx, keep):
    relative = approx.get("numbers")
    if kind == "image/png":
        (old, old_words), (new, new_words) = expected, actual
        words = _word_difference(old_words, new_words, relative)
        pixels = pictures.difference(old, new, approx.get("picture", pictures.SHARE))
        kept = f"see {', '.join(map(str, pictures.save(old, new, keep)))}" if keep and (words or pixels) else ""
        return "; ".join(filter(None, (words, pixels, kept)))
    if not isinstance(expected, str) or not isinstance(actual, str):
        return "" if expected == actual else f"expected {_shown(repr(expected))}, got {_shown(repr(actual))}"
    if kind in ("text/html", "image/svg+xml"):
        expected, actual = (CONTENT_ID.sub("id", text) for text in (expected, actual))
    return _text_difference(expected, actual, relative)


def _word_difference(expected, actual, relative):
    """Return how the words of two pictures (title, axes, legend, ticks, labels) differ."""
    if (expected is None) != (actual is None):
        return f"its words are {'new' if expected is None else 'missing'}: build the lecture again"
    old, new = (list(_flat(words or ())) for words in (expected, actual))
    if len(old) == len(new):
        pairs = [(a, b) for a, b in zip(old, new) if not _same_line(a, b, relative)]
        return "its words differ: " + ", ".join(f"{a!r} is now {b!r}" for a, b in pairs[:5]) if pairs else ""
    changes = difflib.ndiff(old, new)
    return "its words differ: " + ", ".join(line for line in changes if line[0] in "+-")


def _flat(words):
    for word in words:
        if isinstance(word, str):
            yield word
        else:
            yield from _flat(word)


def _text_difference(expected, actual, relative=None):
    old, new = expected.splitlines(), actual.splitlines()
    if len(old) == len(new):
        pairs = [(a, b) for a, b in zip(old, new) if not _same_line(a, b, relative)]
        return "\n".join(f"\n  expected: {_shown(a)}\n  got:      {_shown(b)}" for a, b in pairs[:5])
    lines = difflib.unified_diff(old, new, "expected", "got", lineterm="", n=0)
    return "\n" + "\n".join(map(_shown, lines))


def _same_line(expected, actual, relative=None):
    if expected == actual:
        return True
    # Spaces beside a number do not count: a number that grows by a digit or a sign moves what is beside it.
    words = [re.sub(r"\s*\0\s*", "\0", NUMBER.sub("\0", line)).strip() for line in (expected, actual)]
    numbers = [NUMBER.findall(line) for line in (expected, actual)]
    return words[0] == words[1] and all(_same_number(*pair, relative) for pair in zip(*numbers))


def _same_number(expected, actual, relative=None):
    """Whether two printed numbers agree.

    Integers do exactly; floats to a relative tolerance, or to one in the last of at least three digits. Numbers that
    are rounding agree if they are of one magnitude, whatever their signs. `relative` is a wider tolerance, also for
    integers.
    """
    if expected == actual:
        return True
    old, new = float(expected), float(actual)
    if relative is not None and math.isclose(old, new, rel_tol=relative):
        return True
    if not all(re.search(r"[.eE]", text) for text in (expected, actual)):
        return False
    mantissa, _, exponent = expected.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    digits = len(re.sub(r"\D", "", mantissa).lstrip("0"))
    last_digit = 10.0 ** (int(exponent or 0) - decimals) if max(decimals, digits) >= 3 else 0.0
    if math.isclose(old, new, rel_tol=RELATIVE, abs_tol=1.001 * last_digit):
        return True
    small, large = sorted((max(abs(old), EPSILON), max(abs(new), EPSILON)))
    return small < SMALL and large <= MAGNITUDE * small and abs(old - new) <= SMALL
