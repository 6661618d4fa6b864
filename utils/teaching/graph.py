"""The graph of prerequisites as a picture: which lecture needs which, drawn as SVG, the same text for the same graph."""

import html
import textwrap

WIDTH, HEIGHT, ACROSS, DOWN, MARGIN = 190, 56, 74, 22, 14
STYLE = (
    ".needs text{font:14px system-ui,'DejaVu Sans',sans-serif;fill:#222}.needs .n{font-weight:bold;fill:#005a8c}"
    ".needs rect{fill:#fff;stroke:#0072b2;stroke-width:1.5}"
    ".needs path{fill:none;stroke:#777;stroke-width:1.5;marker-end:url(#tip)}"
)


def reduced(needs):
    """{number: needed numbers} without the arrows that others imply: 03 needs 02, and 02 needs 01, says enough."""

    def all_of(number):
        return set(needs[number]).union(*(all_of(other) for other in needs[number]))

    return {n: [m for m in needs[n] if not any(m in all_of(other) for other in needs[n] if other != m)] for n in needs}


def depths(needs):
    """{number: the length of the longest chain of lectures that come before it}."""
    found = {}
    for number in sorted(needs):
        found[number] = 1 + max((found[other] for other in needs[number]), default=-1)
    return found


def described(titles, needs):
    """The graph in words, for those who do not see it."""
    return ". ".join(
        f"{number} {titles[number]} needs {' and '.join(arrows) if arrows else 'no other lecture'}"
        for number, arrows in sorted(reduced(needs).items())
    )


def svg(titles, needs):
    """The picture. titles {number: title}, needs {number: numbers of earlier lectures}; each needed one has a title."""
    columns = {}
    for number, depth in depths(needs).items():
        columns.setdefault(depth, []).append(number)
    tallest = max(map(len, columns.values()))
    place = {}
    for depth, numbers in columns.items():
        top = MARGIN + (tallest - len(numbers)) * (HEIGHT + DOWN) / 2
        for row, number in enumerate(numbers):
            place[number] = MARGIN + depth * (WIDTH + ACROSS), top + row * (HEIGHT + DOWN)
    width = 2 * MARGIN + len(columns) * (WIDTH + ACROSS) - ACROSS
    height = 2 * MARGIN + tallest * (HEIGHT + DOWN) - DOWN
    lines = [
        f'<svg class="needs" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" width="{width}" height="{height:g}" role="img">',
        f"<title>Which lecture needs which</title><desc>{html.escape(described(titles, needs))}</desc>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" style="fill:#777;stroke:none"/></marker></defs>',
        f'<rect width="{width}" height="{height:g}" style="stroke:none"/>',
    ]
    for number, arrows in sorted(reduced(needs).items()):
        lines += [_arrow(place[other], place[number]) for other in arrows]
    lines += [_box(number, titles[number], *place[number]) for number in sorted(place)]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _arrow(start, end):
    x, y = start[0] + WIDTH, start[1] + HEIGHT / 2
    to_x, to_y = end[0] - 2, end[1] + HEIGHT / 2
    bend = min(ACROSS, to_x - x) / 2
    return f'<path d="M{x:g} {y:g}C{x + bend:g} {y:g} {to_x - bend:g} {to_y:g} {to_x:g} {to_y:g}"/>'


def _box(number, title, x, y):
    words = textwrap.wrap(title, 21)
    top = y + HEIGHT / 2 + 5 - 9 * (len(words) - 1)
    text = "".join(
        f'<text x="{x + 40:g}" y="{top + 18 * i:g}">{html.escape(line)}</text>' for i, line in enumerate(words)
    )
    return (
        f'<g><rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text class="n" x="{x + 10:g}" y="{y + HEIGHT / 2 + 5:g}">{number}</text>{text}</g>'
    )
