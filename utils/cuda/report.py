"""What a checked run saw: traffic by source line, and problems."""
import html
import struct
from collections import namedtuple
from dataclasses import dataclass

from .problems import Problem, Writer

# As struct Traffic in runtime/traffic.h.
RECORD = struct.Struct("=IHBB7Q")
Record = namedtuple("Record", "place region kind size requests lanes bytes sectors ideal_sectors wavefronts "
                              "ideal_wavefronts")
FIRST_GLOBAL, SECTOR = 16, 32
KINDS = ("load", "store", "atomic")


@dataclass
class Row:
    """Traffic of one source line with one array. A request is one instruction of one warp."""

    line: int
    array: str
    space: str                    # "global" or "shared"
    kind: str                     # "load", "store" or "atomic"
    requests: int = 0
    bytes: int = 0
    sectors: int = 0
    ideal_sectors: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0

    def add(self, record):
        for field in ("requests", "bytes", "sectors", "ideal_sectors", "wavefronts", "ideal_wavefronts"):
            setattr(self, field, getattr(self, field) + getattr(record, field))

    @property
    def conflicts(self):
        return self.wavefronts - self.ideal_wavefronts


class Report:
    """What one checked run did. Sizes are bytes.

    problems: list of `Problem` (`.kind`, `.line`, `.message`); ok: whether there are none.
    global_loaded, global_stored: what the threads asked for.
    sectors_loaded, sectors_stored: 32-byte sectors moved if nothing is cached; sector_bytes_loaded,
    sector_bytes_stored: the same in bytes.
    distinct_loaded, distinct_stored: each sector counted once, as with a perfect cache.
    shared_loaded, shared_stored; bank_conflicts: extra wavefronts, 0 is ideal; shared_bytes: shared memory of a block.
    sectors_per_request: {line: sectors for each warp request to global memory, of the line's worst access}.
    rows: list of `Row`. output: what printf wrote. races_unchecked: names of arrays too large for the race check.
    """

    def __init__(self, kernel, build, block, arrays, result, problems=None):
        self.kernel, self.source = kernel.name, kernel.source
        self.output = result.get("output", b"").decode(errors="replace")
        shared = result.get("shared", [])
        regions = {i: (*entry, True) for i, entry in enumerate(shared)}
        regions |= {FIRST_GLOBAL + i: (a.name, a.nbytes, a.element, False) for i, a in enumerate(arrays)}
        self.shared_bytes = sum(size for _, size, _ in shared)
        self.distinct_loaded = sum(loaded for loaded, _ in result.get("distinct", []))
        self.distinct_stored = sum(stored for _, stored in result.get("distinct", []))
        self.races_unchecked = [arrays[i].name for i in result.get("races_unchecked", [])]
        self.rows = self._rows(result.get("traffic", b""), build.lines, regions)
        writer = Writer(kernel, build.lines, block, regions)
        self.problems = problems if problems is not None else writer.problems(result.get("problems", b""))

    @staticmethod
    def _rows(data, lines, regions):
        rows = {}
        for record in map(Record._make, RECORD.iter_unpack(data)):
            space = "global" if record.region >= FIRST_GLOBAL else "shared"
            key = lines.get(record.place, 0), regions[record.region][0], space, KINDS[record.kind]
            rows.setdefault(key, Row(*key)).add(record)
        return [rows[key] for key in sorted(rows)]

    def _sum(self, space, kind, field):
        return sum(getattr(r, field) for r in self.rows if r.space == space and r.kind in (kind, "atomic"))

    @property
    def ok(self):
        return not self.problems

    @property
    def global_loaded(self):
        return self._sum("global", "load", "bytes")

    @property
    def global_stored(self):
        return self._sum("global", "store", "bytes")

    @property
    def sectors_loaded(self):
        return self._sum("global", "load", "sectors")

    @property
    def sectors_stored(self):
        return self._sum("global", "store", "sectors")

    @property
    def sector_bytes_loaded(self):
        return SECTOR * self.sectors_loaded

    @property
    def sector_bytes_stored(self):
        return SECTOR * self.sectors_stored

    @property
    def shared_loaded(self):
        return self._sum("shared", "load", "bytes")

    @property
    def shared_stored(self):
        return self._sum("shared", "store", "bytes")

    @property
    def bank_conflicts(self):
        return sum(r.conflicts for r in self.rows if r.space == "shared")

    @property
    def sectors_per_request(self):
        worst = {}
        for r in self.rows:
            if r.space == "global":
                worst[r.line] = max(worst.get(r.line, 0), r.sectors / r.requests)
        return worst

    def complaint(self):
        """The first problem in full, the others folded: the text of a KernelError."""
        first, *rest = map(str, self.problems)
        if not rest:
            return first
        folded = [f"  - {text.splitlines()[0]}" for text in rest[:4]]
        more = [f"  - and {len(rest) - 4} more"] if len(rest) > 4 else []
        heading = f"{len(rest)} more problem{'s' * (len(rest) > 1)}, often with the same cause:"
        return "\n".join([first, heading, *folded, *more])

    def summary(self):
        """(what, loaded, stored, explanation) for each count of bytes."""
        return [("requested by threads", self.global_loaded, self.global_stored,
                 "every load and store of every thread"),
                ("moved in sectors", self.sector_bytes_loaded, self.sector_bytes_stored,
                 "32-byte sectors of each warp request, nothing cached"),
                ("distinct", self.distinct_loaded, self.distinct_stored, "each sector once, as with a perfect cache"),
                ("shared memory", self.shared_loaded, self.shared_stored,
                 f"{self.shared_bytes:,} B a block, {self.bank_conflicts:,} extra wavefronts by bank conflicts")]

    def __str__(self):
        verdict = "no problem found" if self.ok else f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)}"
        if self.races_unchecked:
            verdict += f"; races were not looked for in {', '.join(self.races_unchecked)} (too large)"
        out = [f"{self.kernel}: {verdict}", f"{'bytes':<22}{'loaded':>15}{'stored':>15}"]
        out += [f"{what:<22}{loaded:>15,}{stored:>15,}  {why}" for what, loaded, stored, why in self.summary()]
        return "\n".join(out + [str(p) for p in self.problems])

    __repr__ = __str__      # what a notebook keeps beside the HTML must not hold an address

    def table(self):
        """Traffic by source line, as text."""
        lines = self.source.split("\n")
        heading = (f"{'line':>4} {'what':<13} {'array':<10} {'requests':>9} {'bytes':>12} {'sectors/req':>11} "
                   f"{'ideal':>5} {'conflicts':>9}  source")
        out = [heading]
        for r in self.rows:
            if r.space == "global":
                cost = f"{r.sectors / r.requests:>11.1f} {r.ideal_sectors / r.requests:>5.1f} {'':>9}"
            else:
                cost = f"{'':>11} {'':>5} {r.conflicts:>9,}"
            source = lines[r.line - 1].strip()[:60] if 0 < r.line <= len(lines) else ""
            out.append(f"{r.line:>4} {r.space + ' ' + r.kind:<13} {_short(r.array):<10} {r.requests:>9,} "
                       f"{r.bytes:>12,} {cost}  {source}".rstrip())
        return "\n".join(out)

    def _repr_html_(self):
        return _page(self)


def _short(name):
    return "(dynamic)" if name == "dynamic shared memory" else name[:10]


# Colours with transparency read on light and on dark pages.
WASTE, WRONG = "background:rgba(230,159,0,.22)", "background:rgba(213,94,0,.22)"


def _cell(text, align="right", style=""):
    return (f'<td style="padding:0 .6em;text-align:{align};vertical-align:top;white-space:pre;color:inherit;{style}">'
            f'{text}</td>')


def _table(head, body):
    titles = "".join(_cell(f"<b>{text}</b>", align) for text, align in head)
    return f'<table style="border-collapse:collapse;color:inherit;margin-top:.6em"><tr>{titles}</tr>{body}</table>'


def _page(report):
    """The counts, and the kernel's source with counts and problems beside each line."""
    counts = "".join(f"<tr>{_cell(what, 'left')}{_cell(f'{loaded:,}')}{_cell(f'{stored:,}')}{_cell(why, 'left')}</tr>"
                     for what, loaded, stored, why in report.summary())
    body = [_problem_row(p) for p in report.problems if p.line == 0]
    for number, text in enumerate(report.source.split("\n"), 1):
        if text.strip():
            body.append(_source_row(report, number, text))
        body += [_problem_row(p) for p in report.problems if p.line == number]
    verdict = html.escape(str(report).splitlines()[0])
    return (f'<div style="font-family:monospace;font-size:12px;overflow-x:auto"><b>{verdict}</b>'
            + _table((("bytes", "left"), ("loaded", "right"), ("stored", "right"), ("counting", "left")), counts)
            + _table((("global bytes", "right"), ("sectors/request", "right"), ("shared bytes", "right"),
                      ("conflicts", "right"), ("line", "right"), ("source", "left")), "".join(body)) + "</div>")


def _source_row(report, number, text):
    """One cell for each count; a line that touches several arrays has one line of text for each."""
    here = [r for r in report.rows if r.line == number]
    on_global, on_shared = ([r for r in here if r.space == s] for s in ("global", "shared"))
    wasteful, conflicts = (any(r.sectors > r.ideal_sectors for r in on_global), any(r.conflicts for r in on_shared))
    wrong = any(p.line == number for p in report.problems)
    return "<tr>" + "".join([
        _cell(_lines(f"{r.kind} {r.array} {r.bytes:,}" for r in on_global)),
        _cell(_lines(f"{r.sectors / r.requests:.1f} (ideal {r.ideal_sectors / r.requests:.1f})" for r in on_global),
              style=WASTE if wasteful else ""),
        _cell(_lines(f"{r.kind} {_short(r.array)} {r.bytes:,}" for r in on_shared)),
        _cell(_lines(f"{r.conflicts:,}" for r in on_shared), style=WASTE if conflicts else ""),
        _cell(number), _cell(html.escape(text), "left", WRONG if wrong else "")]) + "</tr>"


def _lines(texts):
    return "<br/>".join(html.escape(text) for text in texts)


def _problem_row(problem: Problem):
    return (f'<tr><td colspan="5"></td><td style="padding:.1em .6em;text-align:left;white-space:pre-wrap;color:inherit;'
            f'border-left:3px solid #d55e00">{html.escape(str(problem))}</td></tr>')
