"""The report of a check, as lines of text. The same answer always gives the same lines."""

import textwrap

from utils.judge.show import aligned

VERDICT = {True: "yes", False: "NO ", None: "not tried"}
DETAIL_LINES = 12


def lines(exercise, result):
    """The lines that `check` prints for a Result."""
    out = [f"{exercise.number} {exercise.name}"]
    width = max(len(row.name) for row in result.rows)
    previous = None
    for name, holds, why in result.rows:
        out.append(f"  {name:<{width}}  {VERDICT[holds]}  {'the same' if why and why == previous else why}".rstrip())
        previous = why or previous
    if result.example:
        out += ["  for example:", *textwrap.indent(aligned(dict(result.example)), "    ").split("\n")]
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
