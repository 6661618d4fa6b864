"""What a checked run saw: traffic by source line, and problems."""

import struct
from collections import namedtuple
from dataclasses import dataclass

from .problems import Writer

# As struct Traffic in runtime/traffic.h.
RECORD = struct.Struct("=IHBB7Q")
Record = namedtuple(
    "Record", "place region kind size requests lanes bytes sectors ideal_sectors wavefronts ideal_wavefronts"
)
Trace = namedtuple("Trace", "data places regions shapes block")  # what steps.py plays
FIRST_GLOBAL, SECTOR = 256, 32
KINDS = ("load", "store", "atomic", "", "", "atomic")  # as enum AccessKind in runtime/state.h
TABLE = ("line", "what", "array", "requests", "bytes", "sectors/req", "ideal", "conflicts", "source")
LEFT = ("what", "array", "source")  # the columns of words
WIDEST = 95  # characters: what a notebook shows without breaking a line


@dataclass
class Row:
    """Traffic of one source line with one array. A request is one instruction of one warp.

    A line that holds several accesses to an array has a row for each, unless they cost the same.
    """

    line: int
    array: str
    space: str  # "global" or "shared"
    kind: str  # "load", "store" or "atomic"
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

    problems: list of `Problem` (`.kind`, `.line`, `.message`); ok: whether there are none; warnings: others like these, on
    which no result depends.
    global_loaded, global_stored: what the threads asked for.
    sectors_loaded, sectors_stored: 32-byte sectors moved if nothing is cached; sector_bytes_loaded,
    sector_bytes_stored: the same in bytes.
    distinct_loaded, distinct_stored: each sector counted once, as with a perfect cache.
    shared_loaded, shared_stored; bank_conflicts: extra wavefronts, 0 is ideal; shared_bytes: shared memory of a block.
    sectors_per_request: {line: sectors for each warp request to global memory, of the line's worst access}.
    arrays: the names of the global arrays, as the kernel calls its arguments.
    workers: {(array, "load" or "store"): how many threads did that}, a thread of each block counted once; for "global"
    and "shared", arrays of that memory taken together.
    rows: list of `Row`. output: what printf wrote. races_unchecked: names of arrays too large for the race check;
    more_problems: whether there were more problems than a run keeps.
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
        places = build.places if build else {}
        self.arrays = [a.name for a in arrays]
        self.workers = {
            (name, kind): n
            for name, both in zip([*self.arrays, "global", "shared"], result.get("workers", []))
            for kind, n in zip(("load", "store"), both)
        }
        self.trace = Trace(result.get("trace", b""), places, regions, result.get("shapes", []), block)
        self.rows = self._rows(result.get("traffic", b""), places, regions)
        writer = Writer(kernel, places, block, regions)
        found = problems if problems is not None else writer.problems(result.get("problems", b""))
        self.problems = [problem for problem in found if not problem.is_harmless]
        self.warnings = [problem for problem in found if problem.is_harmless]
        self.more_problems = result.get("more_problems", False)

    @staticmethod
    def _rows(data, places, regions):
        """One row for each place; places of a line that cost the same for each request are one row."""
        at_place = {}
        for record in map(Record._make, RECORD.iter_unpack(data)):
            space = "global" if record.region >= FIRST_GLOBAL else "shared"
            line, column = places.get(record.place, (0, 0))
            key = line, regions[record.region][0], space, KINDS[record.kind]
            at_place.setdefault((*key, column), Row(*key)).add(record)
        rows = {}
        for (*key, _), row in sorted(at_place.items()):
            rows.setdefault((*key, row.sectors / row.requests, row.conflicts / row.requests), Row(*key)).add(row)
        return sorted(rows.values(), key=lambda row: (row.line, row.array, row.space, row.kind))

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
        """The first problem in full, the others folded, or the warnings: the text of a KernelError."""
        first, *rest = map(str, self.problems or self.warnings)
        if not rest:
            return first
        folded = [f"  - {text.splitlines()[0]}" for text in rest[:4]]
        more = [f"  - and {len(rest) - 4} more"] if len(rest) > 4 else []
        heading = f"{'more than ' * self.more_problems}{len(rest)} more problem{'s' * (len(rest) > 1)}, often with the same cause:"
        return "\n".join([first, heading, *folded, *more])

    def summary(self):
        """(what, loaded, stored, explanation) for each count of bytes."""
        return [
            ("requested by threads", self.global_loaded, self.global_stored, "every load and store of every thread"),
            (
                "moved in sectors",
                self.sector_bytes_loaded,
                self.sector_bytes_stored,
                "32-byte sectors of each warp request, nothing cached",
            ),
            ("distinct", self.distinct_loaded, self.distinct_stored, "each sector once, as with a perfect cache"),
            (
                "shared memory",
                self.shared_loaded,
                self.shared_stored,
                f"{self.shared_bytes:,} B a block, {self.bank_conflicts:,} extra wavefronts by bank conflicts",
            ),
        ]

    def __str__(self):
        more = "more than " * self.more_problems
        verdict = (
            "no problem found" if self.ok else f"{more}{len(self.problems)} problem{'s' * (len(self.problems) > 1)}"
        )
        if self.races_unchecked:
            verdict += f"; races were not looked for in {', '.join(self.races_unchecked)} (too large)"
        out = [f"{self.kernel}: {verdict}", f"{'bytes':<22}{'loaded':>15}{'stored':>15}"]
        out += [f"{what:<22}{loaded:>15,}{stored:>15,}  {why}" for what, loaded, stored, why in self.summary()]
        return "\n".join(out + [str(p) for p in [*self.problems, *self.warnings]])

    __repr__ = __str__  # what a notebook keeps beside the HTML must not hold an address

    def table(self):
        """Traffic by source line, as text of at most 95 columns; columns in which nothing stands are left out."""
        lines = self.source.split("\n")
        rows = [
            {
                "line": str(r.line),
                "what": f"{r.space} {r.kind}",
                "array": _short(r.array),
                "requests": f"{r.requests:,}",
                "bytes": f"{r.bytes:,}",
                "sectors/req": f"{r.sectors / r.requests:.1f}" if r.space == "global" else "",
                "ideal": f"{r.ideal_sectors / r.requests:.1f}" if r.space == "global" else "",
                "conflicts": f"{r.conflicts:,}" if r.space == "shared" else "",
                "source": lines[r.line - 1].strip() if 0 < r.line <= len(lines) else "",
            }
            for r in self.rows
        ]
        shown = [name for name in TABLE if name in ("line", "source") or any(row[name] for row in rows)]
        widths = {name: max([len(name), *(len(row[name]) for row in rows)]) for name in shown}
        out = []
        for row in ({name: name for name in TABLE}, *rows):
            cells = [f"{row[name]:{'<' if name in LEFT else '>'}{widths[name]}}" for name in shown]
            out.append(" ".join(cells)[:WIDEST].rstrip())
        return "\n".join(out)

    def _repr_html_(self):
        from .page import page  # here: pygments is wanted only where a report is looked at

        return page(self)


def _short(name):
    return "(dynamic)" if name == "dynamic shared memory" else name[:10]
