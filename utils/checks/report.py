"""The report of a check, as lines of text. The same answer always gives the same lines."""

import textwrap

from utils.checks.show import aligned, argument, is_large, text

VERDICT = {True: "yes", False: "NO ", None: "not tried"}
DETAIL_LINES = 12


def lines(exercise, result):
    """The lines that `check` prints for a Result of trial.py."""
    out = [f"{exercise.number} {exercise.name}"]
    width = max(len(row.name) for row in result.rows)
    previous = None
    for name, holds, why in result.rows:
        out.append(f"  {name:<{width}}  {VERDICT[holds]}  {'the same' if why and why == previous else why}".rstrip())
        previous = why or previous
    if result.example:
        out += _example(exercise, result.example)
    if result.details:
        out += textwrap.indent(result.details, "    ").split("\n")[:DETAIL_LINES]
    if result.printed.strip():
        first, *more = result.printed.strip().split("\n")
        out.append(f"  it prints: {first[:80]}{' ...' if more or len(first) > 80 else ''}")
    return [*out, f"{_count(result.rows)} {result.hint}".rstrip()]


def _count(rows):
    failed, untried = (sum(row.holds is verdict for row in rows) for verdict in (False, None))
    if not failed:
        return f"{len(rows)} of {len(rows)} properties hold."
    not_tried = f", {untried} {'was' if untried == 1 else 'were'} not tried" if untried else ""
    return f"{failed} of {len(rows)} properties {'fails' if failed == 1 else 'fail'}{not_tried}."


def _example(exercise, call):
    shown = {name: argument(value) for name, value in call.arguments.items() if value is not None}
    names = exercise.returns or ("",)
    for what, parts in (("expected", call.expected), ("got", call.got or [])):
        if len(parts) > len(names) and not any(map(is_large, parts)):  # a tuple too long: all of it
            shown[what] = f"({', '.join(map(text, parts))})"
            continue
        for name, part in zip(names, parts):
            if not is_large(part):
                shown[f"{what} {name}".rstrip()] = text(part)
    return ["  for example:", *textwrap.indent(aligned(shown), "    ").split("\n")] if shown else []
