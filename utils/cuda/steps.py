"""One block of a checked run, step by step: what each warp reads and writes, and what then stands in shared memory.

The view is one piece of HTML with its script and its data, without network; where scripts do not run, the still picture below
it stays. A step is one request: one instruction of one warp, with the lanes that took part.
"""

import hashlib
import html
import json
import math
import struct
from collections import namedtuple
from pathlib import Path

# As struct Traced in runtime/trace.h.
RECORD = struct.Struct("=IIHBBIQ16s")
Record = namedtuple("Record", "step place region kind size thread offset value")
FIRST_GLOBAL, BARRIER = 256, 15
MOST_BYTES = 180_000  # of HTML: a notebook holds what it shows
DIGITS = 4  # of a value that is shown
FORMATS = {
    **{code: code for code in "fdbBhHiIqQe?"},
    "y": "y",  # bfloat16
    "": {1: "B", 2: "e", 4: "f", 8: "d"},  # dynamic shared memory has no type
}
SCRIPT = Path(__file__).with_name("steps.js").read_text(encoding="utf-8").strip()
STYLE = """
[data-cuda-steps]{font:14px/1.4 system-ui,sans-serif;color:inherit;max-width:1000px}
[data-cuda-steps] button{font:inherit;color:inherit;background:transparent;border:1px solid #888;border-radius:3px;margin-right:4px}
[data-cuda-steps] input{width:260px;vertical-align:middle}
[data-cuda-steps] p{margin:6px 0;min-height:2.8em}
[data-cuda-steps] .both{display:flex;gap:16px;align-items:flex-start}
[data-cuda-steps] ol{flex:1 1 400px;min-width:0;max-height:420px;overflow:auto;margin:0;padding-left:3em;font:12px/1.5 monospace}
[data-cuda-steps] li{white-space:pre}
[data-cuda-steps] li.now{background:rgba(230,159,0,.3)}
[data-cuda-steps] .both>div{flex:0 1 auto;max-width:580px;overflow:auto;font:12px monospace}
"""


class Steps:
    """A block, step by step; a notebook shows it. `.report` is the run's, `.steps` a list of `Step`."""

    def __init__(self, report):
        self.report, trace = report, report.trace
        self.arrays = _arrays(trace)
        self.steps = _steps(trace, self.arrays)

    def __repr__(self):
        barriers = sum(step.kind == BARRIER for step in self.steps)
        return f"{self.report.kernel}: {len(self.steps)} steps of block (0,0,0), {barriers} barriers"

    def _repr_html_(self):
        if not self.steps:
            return f"<pre>{html.escape(str(self.report))}</pre>"
        picture = still(self)
        room = MOST_BYTES - len(picture) - len(SCRIPT) - len(STYLE) - len(self.report.source)
        packed, size = [], 0
        for step in self.steps:
            packed.append(step.packed())
            size += len(json.dumps(packed[-1], separators=(",", ":"))) + 1
            if size > room:
                packed.pop()
                break
        data = {
            "source": self.report.source.split("\n"),
            "arrays": [array._asdict() for array in self.arrays.values()],
            "steps": packed,
            "cut": len(packed) < len(self.steps),
        }
        data["id"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]
        text = (
            json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/").replace("<!--", "<\\!--")
        )
        more = f" The view plays the first {len(packed):,}." if data["cut"] else ""
        return (
            f'<div data-cuda-steps="{data["id"]}">Run this cell, or trust the notebook, to step through the block.</div>'
            f"<style>{STYLE}</style><script>{SCRIPT}({text})</script>"
            f"<figure style='margin:8px 0'>{picture}<figcaption>{html.escape(repr(self))}.{more}</figcaption></figure>"
        )


Array = namedtuple("Array", "name cells columns")  # columns 0: a global array, not drawn


class Step:
    """One request, or a barrier: its line, kind, array (a number), threads, first cells, cells each, and values stored."""

    def __init__(self, line, kind, array=0, width=1):
        self.line, self.kind, self.array, self.width = line, kind, array, width
        self.threads, self.cells, self.values = [], [], []

    def packed(self):
        values = _regular(self.values) if self.values else None
        return [self.line, self.kind, self.array, _regular(self.threads), _regular(self.cells), self.width, values]


def _regular(numbers):
    """[0, 2, 4, 6] as {"r": [0, 4, 2]}: first, count, stride."""
    if len(numbers) < 4 or None in numbers:
        return numbers
    stride = numbers[1] - numbers[0]
    if all(b - a == stride for a, b in zip(numbers, numbers[1:])):
        return {"r": [numbers[0], len(numbers), stride]}
    return numbers


def _arrays(trace):
    """{region: Array}, shared arrays first; dynamic shared memory in cells of the size of its first access."""
    arrays = {}
    for region, (name, size, element, is_shared) in sorted(trace.regions.items()):
        if not is_shared:
            arrays[region] = Array(name, size // element, 0)
            continue
        columns, code = trace.shapes[region]
        if not code:
            sizes = (r.size for r in map(Record._make, RECORD.iter_unpack(trace.data)) if r.region == region)
            element = min(4, next(sizes, 4))
        arrays[region] = Array(name, size // element, columns or min(32, size // element))
    return arrays


def _steps(trace, arrays):
    steps, numbers, last = [], {region: i for i, region in enumerate(arrays)}, None
    for r in map(Record._make, RECORD.iter_unpack(trace.data)):
        if r.kind == BARRIER:
            steps.append(Step(r.place, BARRIER))
            continue
        element = trace.regions[r.region][1] // arrays[r.region].cells
        if r.step != last:
            line, _ = trace.places.get(r.place, (0, 0))
            steps.append(Step(line, r.kind, numbers[r.region], max(1, r.size // element)))
            last = r.step
        steps[-1].threads.append(r.thread)
        steps[-1].cells.append(r.offset // element)
        if r.kind != 0 and arrays[r.region].columns:
            steps[-1].values += _values(r, element, trace.shapes[r.region][1])
    return steps


def _values(record, element, code):
    if code == "y":
        return [_shown(struct.unpack("=f", b"\0\0" + record.value[i : i + 2])[0]) for i in range(0, record.size, 2)]
    code = code or FORMATS[""].get(element, "B")
    count = max(1, record.size // element)
    if struct.calcsize("=" + code) != element:  # a struct, or a part of a cell
        return [int.from_bytes(record.value[: record.size], "little")] * count
    return [_shown(v) for v in struct.unpack_from(f"={count}{code}", record.value)]


def _shown(value):
    """Rounded to what is shown; None stands for nan and infinities, which JSON does not have."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = float(f"{value:.{DIGITS}g}")
        return int(value) if value.is_integer() and abs(value) < 1e6 else value
    return int(value)


def still(steps):
    """The whole block at a glance, as SVG: time to the right, a row for each line that touches memory, bars for barriers."""
    lines = sorted({step.line for step in steps.steps if step.kind != BARRIER})
    row = {line: i for i, line in enumerate(lines)}
    left, width, pitch = 44, 660, 15
    height = pitch * len(lines) + 8
    out, total = [], max(1, len(steps.steps))
    for line in lines:
        out.append(f'<text x="{left - 8}" y="{pitch * row[line] + 15}" text-anchor="end">{line}</text>')
    seen = set()
    for i, step in enumerate(steps.steps):
        x = left + width * i // total
        if step.kind == BARRIER:
            out.append(f'<path d="M{x} 2V{height - 2}" stroke="currentColor" stroke-dasharray="2 2"/>')
        elif (x, step.line, step.kind) not in seen:
            seen.add((x, step.line, step.kind))
            colour = "#56b4e9" if step.kind == 0 else "#e69f00"
            wide = max(2, width // total - 1)
            out.append(f'<path d="M{x} {pitch * row[step.line] + 11}h{wide}" stroke="{colour}" stroke-width="10"/>')
    label = f"{steps!r}. Time runs to the right; each row is a source line. Blue: loads; orange: stores and atomics; dashed: barriers."
    return (
        f'<svg role="img" aria-label="{html.escape(label)}" width="{left + width + 8}" height="{height}" '
        f'style="max-width:100%" font-size="12" font-family="system-ui,sans-serif" fill="currentColor">{"".join(out)}</svg>'
    )
