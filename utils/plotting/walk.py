"""An animation of blocks walking the tiles of Q, K and V: inline SVG and CSS, no script, no network, no kernel.

Without script it also runs in a static page; a radio button for each step stops it, so nobody has to watch it move.
"""

import hashlib
from dataclasses import dataclass
from html import escape

from utils.plotting.figure import COLOURS

CELL, GAP, MARGIN = 30, 12, 34
SECONDS_A_STEP = 0.9


def steps_of(visits):
    """Number each block's visits: [(step, block, query_tile, key_tile)], sorted. Blocks run side by side from step 0.

    visits: (block, query_tile, key_tile), whole numbers from 0, in the order in which each block makes them.
    Raises ValueError for an empty list or anything else.
    """
    seen, steps = {}, []
    for visit in visits:
        values = tuple(int(value) for value in visit)
        if len(values) != 3 or min(values) < 0:
            raise ValueError(f"visits must hold (block, query_tile, key_tile), whole numbers from 0, got {visit!r}")
        block = values[0]
        steps.append((seen.get(block, 0), *values))
        seen[block] = seen.get(block, 0) + 1
    if not steps:
        raise ValueError("visits must hold at least one (block, query_tile, key_tile), got none")
    return sorted(steps)


def summary(visits):
    """The finding in one line, for a title."""
    steps = steps_of(visits)
    blocks, n_steps = len({step[1] for step in steps}), 1 + steps[-1][0]
    tiles = len({step[2:] for step in steps})
    total = (1 + max(q for *_, q, _ in steps)) * (1 + max(k for *_, k in steps))
    return f"{blocks} blocks visit {tiles} of {total} tiles in {n_steps} steps"


@dataclass(frozen=True)
class Walk:
    """The animation; a notebook shows it, `html` is its text and `description` says it in words."""

    html: str
    description: str

    def _repr_html_(self):
        return self.html

    def __repr__(self):
        return self.description


def walk(visits):
    """Animate blocks that walk over the tiles of Q, K and V. Returns a Walk, which a notebook displays.

    visits: (block, query_tile, key_tile) in the order in which each block makes them. Each block keeps its tile of Q,
    reads one tile of K and V a step, and colours the tile of the score matrix that it works on.
    """
    steps = steps_of(visits)
    n_steps = 1 + steps[-1][0]
    n_queries, n_keys = 1 + max(q for *_, q, _ in steps), 1 + max(k for *_, k in steps)
    left, top = MARGIN + CELL + GAP, MARGIN + 2 * (CELL + GAP)
    width, height = left + n_keys * CELL + GAP, top + n_queries * CELL + GAP
    description = summary(visits) + ". Each block keeps one tile of Q and reads one tile of K and of V a step."

    def at(q, k):
        return left + k * CELL, top + q * CELL

    empty = [_rect(*at(q, k), "#ffffff") for q in range(n_queries) for k in range(n_keys)]
    empty += [_rect(MARGIN, top + q * CELL, "#ffffff") for q in range(n_queries)]
    empty += [_rect(left + k * CELL, MARGIN + row * (CELL + GAP), "#ffffff") for row in (0, 1) for k in range(n_keys)]
    names = [_text(MARGIN - GAP, top + n_queries * CELL / 2 + 5, "Q"), _text(left - GAP, MARGIN + CELL / 2 + 5, "K"),
             _text(left - GAP, MARGIN + CELL + GAP + CELL / 2 + 5, "V")]  # fmt: skip

    frames = []
    for now in range(n_steps):
        shapes = []
        for step, block, q, k in steps:
            colour = COLOURS[block % 6]
            if step <= now:
                shapes.append(_rect(*at(q, k), colour, 1 if step == now else 0.3))
            if step == now:
                shapes.append(_rect(MARGIN, top + q * CELL, colour))
                shapes += [_rect(left + k * CELL, MARGIN + row * (CELL + GAP), colour, 0.75) for row in (0, 1)]
        frames.append(f'<g class="step step{now}">{"".join(shapes)}</g>')
    picture = "".join(empty + names + frames)
    key = "walk-" + hashlib.sha1(picture.encode(), usedforsecurity=False).hexdigest()[:10]
    svg = (f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
           f'aria-label="{escape(description)}" font-family="sans-serif" font-size="14">{picture}</svg>')  # fmt: skip
    buttons = _button(key, "play", "play", checked=True) + "".join(_button(key, t, str(t)) for t in range(n_steps))
    html = (f'<figure id="{key}" style="margin:0;padding:8px;background:#ffffff;color:#222222;display:inline-block">'
            f"<style>{_style(key, n_steps)}</style>{buttons}<br>{svg}"
            f'<figcaption style="max-width:40em"><em>{escape(description)}</em></figcaption></figure>')  # fmt: skip
    return Walk(html, description)


def _style(key, n_steps):
    """Every frame is hidden but for its share of the cycle; a chosen step shows its frame and stops the clock."""
    share, cycle = 100 / n_steps, n_steps * SECONDS_A_STEP
    still = (
        f"#{key} .step{{animation:none}}#{key} input[value=play]:checked~svg .step{n_steps - 1}{{visibility:visible}}"
    )
    rules = [
        f"#{key} .step{{visibility:hidden;animation:{key} {cycle:g}s step-end infinite}}",
        f"#{key} input:not([value=play]):checked~svg .step{{animation:none}}",
        f"@keyframes {key}{{0%{{visibility:visible}}{share:.4g}%{{visibility:hidden}}}}",
        f"@media (prefers-reduced-motion:reduce){{{still}}}",
    ]
    for t in range(n_steps):
        # a negative delay puts frame t at its own place in the cycle from the first moment on
        rules.append(f"#{key} .step{t}{{animation-delay:{(t - n_steps) * SECONDS_A_STEP:g}s}}")
        rules.append(f'#{key} input[value="{t}"]:checked~svg .step{t}{{visibility:visible}}')
    return "".join(rules)


def _button(key, value, label, checked=False):
    mark = " checked" if checked else ""
    return (f'<input type="radio" name="{key}" value="{value}" id="{key}-{value}"{mark}>'
            f'<label for="{key}-{value}" style="margin:0 8px 0 2px">{label}</label>')  # fmt: skip


def _rect(x, y, colour, opacity=1):
    return (f'<rect x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" fill="{colour}" '
            f'fill-opacity="{opacity}" stroke="#999999"/>')  # fmt: skip


def _text(x, y, words):
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" fill="#222222">{words}</text>'
