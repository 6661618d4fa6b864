"""Arrays in a report: small, rounded, readable."""

import math
import re
import textwrap

import numpy as np

LARGEST_SHOWN = 40  # elements
LARGEST_DEEP = 12  # of an array with more than two axes, which takes many lines
LONGEST_ROW = 4
LONGEST_SENTENCE = 100  # characters
LONGEST_DIGITS = 80  # of the same with more digits than three
WIDE = 1e5  # a number from which on all are written by their leading digits: -7.46e5


def text(value, precision=4):
    """A value as a learner would type it."""
    value = np.asarray(value.detach()) if hasattr(value, "detach") else value
    if not isinstance(value, (np.ndarray, np.generic)):
        said = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))  # the same answer gives the same lines
        return re.sub(r"<(?:\w+\.)+(\w+ object>)", r"<\1", said)
    value = np.asarray(value)
    how = {"separator": ", ", "precision": precision, "suppress_small": True, "max_line_width": 110}
    if value.dtype.kind == "f":
        value = np.round(value.astype(np.float64), precision) + 0.0  # no minus in front of a zero
        if (np.abs(value[np.isfinite(value)]) >= WIDE).any():
            how["formatter"] = {"float": lambda x: re.sub(r"e\+0?", "e", f"{x:.{precision}g}")}
    return np.array2string(value, **how)


def argument(value):
    """An argument: its values when it is small, else its shape."""
    return f"an array of shape {tuple(value.shape)}" if is_large(value) else text(value)


def is_large(value):
    """Whether a value has too many elements to be shown."""
    shape = getattr(value, "shape", ())
    return math.prod(shape) > (LARGEST_DEEP if len(shape) > 2 else LARGEST_SHOWN)


def what(value):
    """The type of what was returned (a worker's Value), in words."""
    if value.type_name == "NoneType":
        return "nothing (None)"
    if value.type_name == "ndarray":
        return "a NumPy array" if value.array is not None else "an array of things that are not numbers"
    article = "an" if value.type_name[0].lower() in "aeiou" else "a"
    return f"{article} {value.type_name}"


def returned(reply):
    """What a worker's Reply brought, in words."""
    return f"a tuple of {len(reply.values)}" if reply.is_tuple else what(reply.values[0])


def aligned(shown):
    """Lines `name = value` for a dictionary of names and texts."""
    width = max(map(len, shown), default=0)
    return "\n".join(
        f"{name:<{width}} = {textwrap.indent(value, ' ' * (width + 3)).lstrip()}" for name, value in shown.items()
    )


def where(got, expected):
    """Where two arrays of one shape first differ noticeably, and what stands there in each."""
    apart = _apart(got, expected)
    place = np.unravel_index(np.argmax(apart > 0.5 * min(apart.max(), 1e300)), apart.shape) if got.ndim else ()
    if got.ndim and got.shape[-1] <= LONGEST_ROW:
        place = place[:-1]
        label = f"row {place[0]}: " if len(place) == 1 else f"at {list(map(int, place))}: " if place else ""
    else:
        label = f"at {list(map(int, place))}: " if place else ""
    got, expected = got[place], expected[place]
    for precision, longest in ((3, LONGEST_SENTENCE), (8, LONGEST_DIGITS), (12, LONGEST_DIGITS)):
        sentence = f"{label}expected {text(expected, precision)}, got {text(got, precision)}"
        if text(got, precision) != text(expected, precision) and len(sentence) <= longest:
            return sentence
    return f"{label}expected {text(expected)}, got values that differ by {np.nanmax(_apart(got, expected)):.0e}"


def _apart(got, expected):
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        same = (got == expected) | (np.isnan(got) & np.isnan(expected))
        return np.where(same, 0.0, np.nan_to_num(np.abs(got - expected), nan=np.inf, posinf=np.inf))
