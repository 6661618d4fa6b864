"""An exercise whose answer is CUDA source: a property runs it and looks at what it did.

    softmax_rows = KernelExercise("1.7", "SOFTMAX_ROWS", "fundamentals")

    @softmax_rows.property("each row becomes weights that sum to 1", hint="Every lane has to call warp_sum.")
    def _(source, rng):
        report = launch(compiled(source, "softmax_rows"), grid, block, 0, scores, weights, n_keys)
        must_be(weights, expected, s=scores)
        must_coalesce(report)

What `compiled` and `launch` raise is the learner's; any other exception is the property's own fault, and is not told as
the learner's.
"""

import contextlib
from dataclasses import dataclass, field

from utils import cuda
from utils.judge.compare import close
from utils.judge.exercise import Exercise, random_for
from utils.judge.faults import Fault, fault
from utils.judge.process import TIME_LIMIT
from utils.judge.result import Failed, NotAttempted, Result, Row, Stopped
from utils.judge.show import LARGEST_SHOWN, aligned, argument, text, where
from utils.judge.stub import CUDA, is_stub

TILE = 16


@dataclass
class KernelExercise(Exercise):
    """The learner's CUDA source, in a string. Each property gets it, and runs it as it likes.

    `fault_hints` says, for a kind of problem that the CUDA runner finds ("shuffle"), what to show in place of the
    property's hint.
    """

    fault_hints: dict[str, str] = field(default_factory=dict)

    wanted = "a string of CUDA source"

    def accepts(self, answer):
        return isinstance(answer, str)

    def judge(self, answer, own=None):
        if is_stub(answer, own or "", CUDA):
            raise NotAttempted
        result, stopped = Result(), False
        for prop in self.properties:
            failure = None if stopped else _failure(prop, answer)
            if failure and result.passed:
                result.details = failure.details
                result.hint = self._hint(prop, failure)
            result.rows.append(Row(prop.name, None if stopped else failure is None, str(failure or "")))
            stopped = stopped or isinstance(failure, Stopped)
        return result

    def _hint(self, prop, failure):
        kind = failure.kind if isinstance(failure, Fault) else ""
        return "" if kind is None else self.fault_hints.get(kind, prop.hint)


def _failure(prop, source):
    """What a property has to say against a kernel; None where it holds."""
    try:
        prop.holds(source, random_for(prop))
    except Failed as failed:
        return failed
    return None


@contextlib.contextmanager
def running():
    """What the runner raises inside is told as a Fault."""
    try:
        yield
    except Failed:
        raise
    except Exception as error:
        raise fault(error) from None


def compiled(source, name, template=()):
    """The kernel `name` of the source, with as much time as a whole check. Raises Fault where it does not compile."""
    with running():
        return cuda.compile(source, name=name, template=template, time_limit=TIME_LIMIT)


def launch(kernel, grid, block, shared, *arguments):
    """Run a kernel and return its report; raises Fault if it does something wrong, Stopped if it does not end."""
    with running():
        report = kernel.check[grid, block, shared](*arguments)
        if report.problems and report.problems[0].kind == "time limit":
            raise Stopped(report.complaint())
        if not report.ok or report.warnings:
            raise cuda.KernelError(report.complaint(), report)
        return report


def must_be(got, expected, **inputs):
    """Raise Failed, with the inputs where they are small, unless a kernel's result is the expected one."""
    if not close(got, expected):
        shown = {name: argument(value) for name, value in inputs.items()}
        if len(got) < TILE and got.size <= LARGEST_SHOWN:
            shown |= {"expected": text(expected), "got": text(got)}
        raise Failed(where(got, expected), aligned(shown))


def of_global(report, kind, array=None):
    """The rows of global loads or stores; array: of one of the arrays that were handed over, from 0."""
    name = None if array is None else report.arrays[array]
    return [r for r in report.rows if (r.space, r.kind) == ("global", kind) and name in (None, r.array)]


def bytes_read(report, array):
    """What all threads ask for of one of the arrays that were handed over, from 0."""
    return sum(row.bytes for row in of_global(report, "load", array))


def must_coalesce(report):
    """Raise Failed where lanes of a request lie far apart. A few sectors too many come from the end of a row."""
    for kind, verb in (("load", "fetches"), ("store", "writes to")):
        for row in of_global(report, kind):
            if row.sectors >= 2 * row.ideal_sectors:
                raise Failed(f"line {row.line} {verb} {row.sectors} sectors where {row.ideal_sectors} would do")


def must_employ(report, array, kind, threads):
    """Raise Failed where fewer threads than said load from an array ("load") or store to it ("store").

    array: which of the arrays that were handed over, from 0: a learner may call it otherwise; "shared" or "global" for
    all arrays of that memory together.
    """
    name = report.arrays[array] if isinstance(array, int) else array
    found = report.workers[name, kind]
    if found < threads:
        of = name if isinstance(array, int) else f"{name} memory"
        does = {"load": "load from", "store": "write to"}[kind]
        raise Failed(f"{found:,} threads {does} {of}, where {threads:,} could")


def must_share(report, enough):
    """Raise Failed where so many requests were made that most lanes must have stood idle."""
    requests = sum(row.requests for row in of_global(report, "load"))
    if requests > enough:
        raise Failed(f"{requests} requests, where {enough} would do")
