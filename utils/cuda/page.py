"""A report as a page: the counts, then the kernel's source with counts and problems beside each line.

The source stands first and columns in which nothing stands are left out, so that it fits beside a file browser; a long line of source is broken. Sectors are those of a warp's request.
"""

import html

from pygments.lexers import CppLexer
from pygments.token import Comment, Keyword, Name

# Colours that are read on light and on dark pages.
WASTE, WRONG = "background:rgba(230,159,0,.22)", "background:rgba(213,94,0,.22)"
STYLES = {
    Comment: "opacity:.65;font-style:italic",
    Keyword: "font-weight:bold",
    Name.Function: "text-decoration:underline",
}
CUDA_WORDS = {"__global__", "__device__", "__shared__", "__constant__", "__restrict__", "__forceinline__", "half"}


def page(report):
    """A `Report` as HTML, without scripts, ids or colours of its own for text."""
    counts = "".join(
        f"<tr>{_cell(what, 'left')}{_cell(f'{loaded:,}')}{_cell(f'{stored:,}')}{_cell(why, 'left')}</tr>"
        for what, loaded, stored, why in report.summary()
    )
    columns = [column for column in COLUMNS if any(column.text(row) for row in report.rows)]
    body, found = (
        [_problem_row(p, columns) for p in report.problems if p.line == 0],
        [*report.problems, *report.warnings],
    )
    for number, (plain, shown) in enumerate(zip(report.source.split("\n"), highlighted(report.source)), 1):
        if plain.strip():
            body.append(_source_row(report, number, shown, columns))
        body += [_problem_row(p, columns) for p in found if p.line == number]
    verdict = html.escape(str(report).splitlines()[0])
    head = [("line", "right"), ("source", "left"), *((column.title, "right") for column in columns)]
    return (
        f'<div style="font-family:monospace;font-size:12px;overflow-x:auto"><b>{verdict}</b>'
        + _table((("bytes", "left"), ("loaded", "right"), ("stored", "right"), ("counting", "left")), counts)
        + _table(head, "".join(body))
        + "</div>"
    )


class Column:
    """One kind of count: what stands in it for a row of traffic, "" for nothing, and whether that is wasteful."""

    def __init__(self, title, space, text, wasteful=lambda row: False):
        self.title, self._space, self._text, self._wasteful = title, space, text, wasteful

    def text(self, row):
        return self._text(row) if row.space == self._space else ""

    def cell(self, rows):
        """The cell of a line that touches several arrays: one line of text for each."""
        texts = [html.escape(self.text(row)) for row in rows if self.text(row)]
        wasteful = any(row.space == self._space and self._wasteful(row) for row in rows)
        return _cell("<br/>".join(texts), style=WASTE if wasteful else "")


COLUMNS = (
    Column("global bytes", "global", lambda row: f"{row.kind} {row.array} {row.bytes:,}"),
    Column(
        "sectors (ideal)",
        "global",
        lambda row: f"{row.sectors / row.requests:.1f} ({row.ideal_sectors / row.requests:.1f})",
        lambda row: row.sectors > row.ideal_sectors,
    ),
    Column(
        "shared bytes",
        "shared",
        lambda row: f"{row.kind} {row.array.removeprefix('dynamic shared memory')[:10]} {row.bytes:,}".replace(
            "  ", " "
        ),
    ),
    Column("conflicts", "shared", lambda row: f"{row.conflicts:,}", lambda row: row.conflicts > 0),
)


def highlighted(source):
    """The lines of CUDA C++ as HTML, words of the language marked."""
    lines = [""]
    for kind, text in CppLexer(stripnl=False, ensurenl=False).get_tokens(source):
        style = STYLES[Keyword] if text in CUDA_WORDS else next((STYLES[k] for k in STYLES if kind in k), "")
        for index, part in enumerate(text.split("\n")):
            if index:
                lines.append("")
            if part:
                part = html.escape(part)
                lines[-1] += f'<span style="{style}">{part}</span>' if style and part.strip() else part
    return lines


def _cell(text, align="right", style="", space="pre"):
    return (
        f'<td style="padding:0 .5em;text-align:{align};vertical-align:top;white-space:{space};color:inherit;{style}">'
        f"{text}</td>"
    )


def _table(head, body):
    titles = "".join(_cell(f"<b>{text}</b>", align) for text, align in head)
    return f'<table style="border-collapse:collapse;color:inherit;margin-top:.6em"><tr>{titles}</tr>{body}</table>'


def _source_row(report, number, shown, columns):
    here = [row for row in report.rows if row.line == number]
    wrong = any(problem.line == number for problem in report.problems)
    cells = [
        _cell(number),
        _cell(shown, "left", WRONG if wrong else "", "pre-wrap"),
        *(column.cell(here) for column in columns),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _problem_row(problem, columns):
    return (
        f'<tr><td></td><td colspan="{1 + len(columns)}" style="padding:.1em .6em;text-align:left;white-space:pre-wrap;'
        f'color:inherit;border-left:3px solid #d55e00">{html.escape(str(problem))}</td></tr>'
    )
