"""What a kernel did wrong, in sentences."""

import struct
from collections import namedtuple
from dataclasses import dataclass

from .source import uses_dynamic_shared

# As struct Problem in runtime/problems.h.
RECORD = struct.Struct("=9iI2Qq3I96s4x")
Record = namedtuple(
    "Record",
    "kind line1 line2 access1 access2 region size thread1 thread2 count place1 place2 offset "
    "block_x block_y block_z text",
)
KINDS = {
    1: "out of bounds",
    2: "null pointer",
    3: "misaligned",
    4: "write to const",
    5: "unwritten shared memory",
    6: "race",
    7: "race between blocks",
    8: "async copy",
    9: "async copy",
    10: "barrier",
    11: "deadlock",
    12: "shuffle",
    13: "shuffle",
    14: "shuffle",
    15: "stack overflow",
    16: "assert",
    17: "shared memory",
    18: "division by zero",
    19: "shuffle",
    20: "barrier",
    21: "barrier",
    22: "race",
    23: "race between blocks",
}
ACCESSES, RACES, HARMLESS = (1, 2, 3, 4), (6, 7), (22, 23)
STORE = 1  # as enum AccessKind in runtime/state.h
CAUSES = ("barrier", "deadlock")
DYNAMIC = "dynamic shared memory"  # as scheduler.h names it
READS = ("reads", "writes", "updates atomically", "", "writes (cp.async)", "updates atomically")
READ = ("read", "write", "atomic", "", "write", "atomic")


@dataclass(frozen=True)
class Problem:
    """One thing that a kernel did wrong: `kind` is a word in KINDS, "crash" or "time limit"; `line` is 0 if unknown.

    is_harmless: the kernel's results do not depend on it.
    """

    kind: str
    line: int
    message: str
    is_harmless: bool = False

    def __str__(self):
        return self.message


def may_be_harmless(data):
    """Whether there is a race of two stores of one statement: they may write the same."""
    return any(
        r.kind in RACES and r.place1 == r.place2 and r.access1 == r.access2 == STORE
        for r in map(Record._make, RECORD.iter_unpack(data))
    )


def lines_of_access(data, places):
    """The lines of accesses that could not be made, and of which it is not known from where they were reached."""
    found = (r for r in map(Record._make, RECORD.iter_unpack(data)) if r.kind in ACCESSES and not r.line2)
    return {places.get(r.place1, (0, 0))[0] for r in found}


class Writer:
    """Turns the runtime's records into `Problem`s. `regions` maps a number to (name, bytes, element, is shared)."""

    def __init__(self, kernel, places, block, regions):
        self.source, self.places, self.block, self.regions = kernel.source.split("\n"), places, block, regions
        self.hint = ""
        if uses_dynamic_shared(kernel.source) and DYNAMIC not in [name for name, *_ in regions.values()]:
            self.hint = (
                f"; this launch gives the block no dynamic shared memory: {kernel.name}[grid, block, shared_bytes]"
            )

    def problems(self, data):
        """One problem for each kind and pair of lines, in the order they were found, but causes first: what a barrier
        that not all reach did not order is found as a race before the barrier is."""
        merged = {}
        for record in map(Record._make, RECORD.iter_unpack(data)):
            pair = (record.kind, *sorted(self.lines(record)), record.region)
            first, count = merged.get(pair, (record, 0))
            merged[pair] = first, count + record.count
        found = [self.problem(record, count) for record, count in merged.values()]
        return sorted(found, key=lambda problem: problem.kind not in CAUSES)

    def lines(self, r):
        return tuple(
            line or self.places.get(place, (0, 0))[0] for line, place in ((r.line1, r.place1), (r.line2, r.place2))
        )

    def problem(self, r, count):
        line, _ = self.lines(r)
        message = getattr(
            self,
            "_"
            + {
                8: "not_waited",
                9: "at_exit",
                12: "not_in_mask",
                13: "from_exited",
                14: "own_lane",
                19: "width",
                20: "not_made",
                21: "too_many",
                22: "same_value",
                23: "same_value_between_blocks",
            }.get(r.kind, KINDS[r.kind].replace(" ", "_")),
        )(r)
        if r.kind in ACCESSES and r.line2:
            message += f"\n  called {self.at(r.line2)}"
        times = f" ({count:,} times)" if count > 1 else ""
        return Problem(KINDS[r.kind], line, message + times, r.kind in HARMLESS)

    # ---- parts of a sentence

    def at(self, line):
        if not 0 < line <= len(self.source):
            return "at an unknown line"
        return f"at line {line}: `{self.source[line - 1].strip()}`"

    def first_at(self, r):
        return self.at(self.lines(r)[0])

    def second_at(self, r):
        return self.at(self.lines(r)[1])

    def thread(self, number):
        x, y, _ = self.block
        return f"thread ({number % x},{number // x % y},{number // x // y})"

    def who(self, r):
        return f"{self.thread(r.thread1)} of {self.where(r)}"

    def where(self, r):
        return f"block ({r.block_x},{r.block_y},{r.block_z})"

    def element(self, r):
        name, _, element, is_shared = self.regions[r.region]
        if name == DYNAMIC:
            return f"byte {r.offset} of dynamic shared memory"
        return f"{'shared ' if is_shared else ''}{name}[{r.offset // element}]"

    @staticmethod
    def text(r):
        first, _, second = r.text.split(b"\0")[0].decode(errors="replace").partition("|")
        return first, second

    # ---- one sentence for each kind

    def _out_of_bounds(self, r):
        who = f"by {self.who(r)}, {self.first_at(r)}"
        if r.region < 0:
            return f"OUT OF BOUNDS {READ[r.access1]} of {r.size} bytes, far from every array, {who}{self.hint}"
        name, size, element, _ = self.regions[r.region]
        extent = f"it has {size:,} bytes" if name == DYNAMIC else f"{name} has {size // element:,} elements"
        return f"OUT OF BOUNDS {READ[r.access1]} of {r.size} bytes at {self.element(r)}, but {extent}, {who}"

    def _null_pointer(self, r):
        return f"NULL POINTER: {READ[r.access1]} through it by {self.who(r)}, {self.first_at(r)}{self.hint}"

    def _misaligned(self, r):
        name = self.regions[r.region][0]
        return (
            f"MISALIGNED {READ[r.access1]} of {r.size} bytes at byte {r.offset} of {name}, which is no multiple "
            f"of {r.size}, by {self.who(r)}, {self.first_at(r)}"
        )

    def _write_to_const(self, r):
        return f"WRITE TO A CONST ARRAY at {self.element(r)} by {self.who(r)}, {self.first_at(r)}"

    def _unwritten_shared_memory(self, r):
        return (
            f"UNWRITTEN SHARED MEMORY: {self.who(r)} {READS[r.access1]} {self.element(r)}, which no "
            f"thread of the block has written, {self.first_at(r)}"
        )

    def _race(self, r):
        same_warp = r.thread1 // 32 == r.thread2 // 32
        if r.place1 == r.place2 and "read" not in (READ[r.access1], READ[r.access2]):
            between = "both in the same statement: let one thread write"
        elif same_warp:
            between = "with no __syncwarp() or __syncthreads() between them"
        else:
            between = "with no __syncthreads() between them"
        place = "" if self.regions[r.region][3] else "global "
        return (
            f"RACE on {place}{self.element(r)}: {self.thread(r.thread1)} {READS[r.access1]} {self.first_at(r)}\n"
            f"  and {self.thread(r.thread2)} {READS[r.access2]} {self.second_at(r)}\n"
            f"  {between}, in {self.where(r)}"
        )

    def _race_between_blocks(self, r):
        return (
            f"RACE BETWEEN BLOCKS on global {self.element(r)}: {self.where(r)} {READS[r.access1]} "
            f"{self.first_at(r)}\n"
            f"  and an earlier block {READS[r.access2]} {self.second_at(r)}\n"
            "  Blocks of one launch have no order: use an atomic, or two launches"
        )

    def _same_value(self, r):
        place = "" if self.regions[r.region][3] else "global "
        return (
            f"SAME VALUE written to {place}{self.element(r)} by {self.thread(r.thread1)} and {self.thread(r.thread2)} of "
            f"{self.where(r)}, {self.first_at(r)}\n  It does no harm, but one thread is enough: let one thread write"
        )

    def _same_value_between_blocks(self, r):
        return (
            f"SAME VALUE written to global {self.element(r)} by {self.where(r)} and an earlier block, {self.first_at(r)}\n"
            "  It does no harm, but one block is enough: let one block write"
        )

    def _not_waited(self, r):
        return (
            f"ASYNC COPY NOT WAITED FOR: {self.who(r)} {READS[r.access1]} {self.element(r)} "
            f"while a cp.async into it is under way, {self.first_at(r)}. Commit it, wait for it "
            "(__pipeline_wait_prior), then __syncthreads(); or wait at the barrier that it belongs to"
        )

    def _at_exit(self, r):
        return f"ASYNC COPY NOT WAITED FOR: {self.who(r)} returns while its copy is under way, {self.first_at(r)}"

    def _barrier(self, r):
        begin = f"BARRIER NOT REACHED BY ALL in {self.where(r)}: {self.thread(r.thread1)} waits {self.at(r.line1)}\n  "
        if not r.line2:
            return begin + f"but {self.thread(r.thread2)} has already returned"
        if r.line2 == r.line1 and r.access1:
            return begin.rstrip() + (
                f", called {self.at(r.access1)}\n  but {self.thread(r.thread2)} waits in another call of it, {self.at(r.access2)}"
            )
        if r.line2 == r.line1:
            return begin + f"but {self.thread(r.thread2)} waits at another barrier of that line"
        return begin + f"but {self.thread(r.thread2)} waits {self.at(r.line2)}"

    def _deadlock(self, r):
        first, second = self.text(r)
        begin = f"DEADLOCK in {self.where(r)}: {self.thread(r.thread1)} waits in {first} {self.at(r.line1)}\n  "
        if not r.line2:
            return begin + (
                "for arrivals or bytes that never come"
                if "barrier" in first
                else "for lanes of its warp that never come"
            )
        return begin + f"but {self.thread(r.thread2)} waits in {second} {self.at(r.line2)}"

    def _not_in_mask(self, r):
        name, mask = self.text(r)
        return (
            f"SHUFFLE OUT OF THE MASK: {self.who(r)} reads lane {r.thread2} in {name}, but the "
            f"mask 0x{mask} does not have that lane, {self.first_at(r)}"
        )

    def _from_exited(self, r):
        name, _ = self.text(r)
        return (
            f"SHUFFLE FROM A MISSING LANE: {self.who(r)} reads lane {r.thread2} in {name}, which has "
            f"returned or does not exist in this block, {self.first_at(r)}"
        )

    def _own_lane(self, r):
        name, mask = self.text(r)
        return (
            f"WRONG MASK: {self.who(r)} calls {name} with the mask 0x{mask}, which does not have "
            f"its own lane {r.thread1 % 32}, {self.first_at(r)}"
        )

    def _not_made(self, r):
        return f"BARRIER NOT INITIALISED: {self.who(r)} uses it before init(&barrier, threads), {self.first_at(r)}"

    def _too_many(self, r):
        return (
            f"TOO MANY ARRIVALS: {self.who(r)} arrives at a barrier whose phase expects no more, {self.first_at(r)}; "
            "init(&barrier, threads) says how many come"
        )

    def _width(self, r):
        name, width = self.text(r)
        return (
            f"SHUFFLE WIDTH: {self.who(r)} calls {name} with the width {width}, which is not 1, 2, 4, 8, 16 or 32, "
            f"{self.first_at(r)}; on a GPU its result is undefined"
        )

    def _stack_overflow(self, r):
        return (
            f"STACK OVERFLOW: the local variables of {self.who(r)} take more than 96 KB"
            f"{', ' + self.first_at(r) if r.place1 else ''}; look for large local arrays or unbounded recursion"
        )

    def _assert(self, r):
        expression = r.text.split(b"\0")[0].decode(errors="replace")
        return f"ASSERT failed: {expression} by {self.who(r)}, {self.first_at(r)}"

    def _division_by_zero(self, r):
        return f"INTEGER DIVISION BY ZERO by {self.who(r)}, {self.first_at(r)}; on a GPU its result is undefined"

    def _shared_memory(self, r):
        return (
            "TOO MUCH SHARED MEMORY: a block has at most 48 KB in declared arrays (more must be `extern "
            "__shared__`), 227 KB in all, and here at most 256 arrays"
        )
