"""A compiled kernel and the three ways to launch it."""

import contextlib
import ctypes
import math
import os
import re
import sys
import warnings

from . import arguments as args
from . import binary
from .calls import helper_at
from .cpu import process
from .errors import CompileError, KernelError
from .problems import Problem, Writer, lines_of_access, may_be_harmless
from .report import Report
from .source import cell_shift, choose_kernel, instance, skipped_includes
from .steps import Steps
from .structure import constants
from .text import blank, point_at

MAX_SHARED = 227 * 1024  # bytes of shared memory a block can have on sm_90; sm_80 has 163 KB, sm_120 99 KB
DEFAULT_SHARED = 48 * 1024  # more than this, a GPU grants only on request; utils.cuda.gpu asks for it
GUARD = 64 * 1024  # bytes of nothing, at least, before and after each array
SECTOR_PAGE = 256  # arrays start at multiples of this, as cudaMalloc would place them
TIME_LIMIT = 60.0  # seconds
SCHEDULES = ("forward", "reverse", "random")  # as enum Schedule in runtime/state.h
_warned = set()


class Kernel:
    """A CUDA kernel. `kernel[grid, block](...)` runs it, checked on a CPU; see also `.check` and `.fast`.

    Attributes: `name` (`"flash_fwd<64>"`), `parameters` (their names), `declarations` (as the source spells them),
    `source`, `template`; `time_limit`, the seconds that a launch on the CPU may take; `schedule`, see `compile`.
    """

    def __init__(self, source, name=None, template=(), time_limit=TIME_LIMIT, schedule="forward"):
        self.source, self.time_limit, self.schedule = source, time_limit, schedule
        kernel = choose_kernel(source, name)
        self.template = tuple(template) if isinstance(template, (tuple, list)) else (template,)
        self.name = instance(kernel, self.template)
        self.parameters, self.declarations, self._line = kernel.parameters, kernel.declarations, kernel.line
        self.filled = {}  # name of a constant: the values that `fill` was given
        bare = blank(source)
        # Sums of floats depend on their order, and printed lines too: such a kernel runs its blocks one after another.
        self._ordered = re.search(r"\batomic[A-Z]|\bprintf\b", bare) is not None
        self._cell_shift = cell_shift(source)

    def __repr__(self):
        return f"<kernel {self.name}({', '.join(self.declarations)})>"

    def __getitem__(self, configuration):
        """Launch; `kernel[grid, block, shared_bytes](*arguments)` returns None and writes the arrays in place.

        Grid and block are whole numbers or tuples of up to three. NumPy arrays and CPU tensors run on the CPU, checked:
        problems raise KernelError. CUDA tensors run on the GPU.
        """
        return Launch(self, self._run, configuration)

    def __call__(self, *arguments):
        raise TypeError(f"{self.name}: launch with {self.name}[grid, block](...)")

    @property
    def check(self):
        """`kernel.check[grid, block](...)` runs on the CPU and returns the report, whatever the kernel did."""
        return _Launcher(self, self._check)

    @property
    def fast(self):
        """`kernel.fast[grid, block](...)` runs without checks, on the CPU some fifty times faster; CUDA tensors: as above."""
        return _Launcher(self, self._fast)

    def fill(self, name, values):
        """Give a `__constant__` variable of the source its values for all later launches of this kernel.

        name: as in the source, with its namespaces. values: an array of the variable's type and size, or a number.
        Raises TypeError and ValueError, on a CPU here and on a GPU at the launch.
        """
        if name not in constants(blank(self.source)):
            raise ValueError(f"{self.name}: the source has no `__constant__` variable {name!r} that can be filled")
        self.filled[name] = args.constant_values(f"{self.name}: {name}", values)

    def _run(self, grid, block, shared, arguments):
        if self._on_gpu(arguments):
            return self._run_on_gpu(grid, block, shared, arguments)
        report = self._check(grid, block, shared, arguments)
        if report.output:
            print(report.output, end="")
        if not report.ok:
            raise KernelError(report.complaint(), report)
        for warning in report.warnings:
            warnings.warn_explicit(f"{self.name}: {warning}", UserWarning, "kernel.cu", warning.line)

    def _on_gpu(self, arguments):
        args.check_count(self.name, self.parameters, arguments)
        return args.on_gpu(self.name, self.parameters, arguments)

    def _run_on_gpu(self, grid, block, shared, arguments):
        from . import gpu

        gpu.launch(self, grid, block, shared, arguments)

    @property
    def steps(self):
        """`kernel.steps[grid, block](...)` runs on the CPU and returns its first block step by step, to be looked at."""
        return _Launcher(self, self._steps)

    def _steps(self, grid, block, shared, arguments):
        return Steps(self._check(grid, block, shared, arguments, traced=0))

    def _check(self, grid, block, shared, arguments, traced=None):
        if self._on_gpu(arguments):
            raise ValueError(f"{self.name}: .check and .steps run on the CPU; pass arrays in the CPU's memory")
        try:
            build, result, arrays = self._launch(
                binary.checked_build, grid, block, shared, arguments, threads=1, traced=traced
            )
        except process.WorkerDied as death:
            return Report(self, None, block, [], {}, [Problem(*self._epitaph(death, grid, block, checked=True))])
        return Report(self, build, block, arrays, result)

    def _fast(self, grid, block, shared, arguments):
        if self._on_gpu(arguments):
            return self._run_on_gpu(grid, block, shared, arguments)
        threads = 1 if self._ordered else min(_cores(), math.prod(grid))
        try:
            build, result, arrays = self._launch(binary.plain_build, grid, block, shared, arguments, threads)
        except process.WorkerDied as death:
            raise KernelError(self._epitaph(death, grid, block, checked=False)[2]) from None
        report = Report(self, build, block, arrays, result)
        if report.output:
            print(report.output, end="")
        if not report.ok:
            raise KernelError(report.complaint(), report)

    def _epitaph(self, death, grid, block, checked):
        """The kind, line and text of what ended the process."""
        if not death.timed_out:
            advice = (
                "Look for unbounded recursion, a wild pointer or an integer division by zero"
                if checked
                else "Run it checked (kernel.check[...]) to see why"
            )
            return "crash", 0, f"CRASH: {self.name} crashed the process it ran in. {advice}"
        line, where = self._where(death.where, block) if death.where else (0, "")
        return (
            "time limit",
            line,
            f"TIME LIMIT: {self.name} ran for {self.time_limit:g} s and was stopped{where}. Look for a loop whose condition "
            "never becomes false, or a thread that waits in a loop for another thread or block; or launch "
            f"fewer blocks ({math.prod(grid):,})",
        )

    def _where(self, where, block):
        """Line and words for a thread that was running when time was up."""
        place, thread, block_index = where
        writer = Writer(self, binary.checked_build(self.source, self.name).places, block, {})
        line, _ = writer.places.get(place, (0, 0))
        text = f", in {writer.thread(thread)} of block ({','.join(map(str, block_index))})"
        return line, text + (f", whose last access to memory was {writer.at(line)}" if line else "")

    def _launch(self, find_build, grid, block, shared, arguments, threads, traced=None):
        """Returns the build, the worker's reply and the arrays. A build that was damaged in the cache is made again."""
        build = find_build(self.source, self.name)
        try:
            return self._run_in_worker(build, grid, block, shared, arguments, threads, traced)
        except (process.WorkerDied, process.NotLoaded):
            if not binary.is_damaged(build):
                raise
        binary.forget(build)
        build = find_build(self.source, self.name)
        return self._run_in_worker(build, grid, block, shared, arguments, threads, traced)

    def _run_in_worker(self, build, grid, block, shared, arguments, threads, traced):
        packed = args.pack(self.name, self.parameters, build.signature, arguments)
        arrays = [a for a in packed if isinstance(a, args.Array)]
        args.check_overlap(self.name, arrays)
        filled = args.pack_constants(self.name, build.constants, self.filled)
        self._check_shared(shared)
        with process.lock:
            worker = process.worker()
            placed = _place(arrays, worker.memory)

            def run(build, compared=False):
                for array, offset in placed.values():
                    ctypes.memmove(worker.memory.start + offset, array.address, array.nbytes)
                return worker.run(
                    build.library,
                    build.checked,
                    float(self.time_limit),
                    grid,
                    block,
                    shared,
                    [placed[a.key][1] if isinstance(a, args.Array) else a for a in packed],
                    [(offset, a.nbytes, a.element, a.writable) for a, offset in placed.values()],
                    self._cell_shift,
                    threads,
                    filled,
                    SCHEDULES.index(self.schedule),
                    traced,
                    compared,
                )

            result = run(build)
            if may_be_harmless(result["problems"]):
                result = run(build, compared=True)
            elif build.checked and any(
                helper_at(self.source, n) for n in lines_of_access(result["problems"], build.places)
            ):
                with contextlib.suppress(CompileError):
                    build = binary.checked_build(self.source, self.name, every_call=True)
                    result = run(build)
            for array, offset in placed.values():
                if array.writable:
                    ctypes.memmove(array.address, worker.memory.start + offset, array.nbytes)
        return build, result, [array for array, _ in placed.values()]

    def _check_shared(self, shared):
        if shared > MAX_SHARED:
            raise ValueError(
                f"{self.name}: shared_bytes: {shared:,} bytes, but no GPU gives a block more than {MAX_SHARED:,}"
            )
        if shared > DEFAULT_SHARED and self.name not in _warned:
            _warned.add(self.name)
            # warn_explicit: a warning that names the caller's file would differ from one notebook run to the next.
            warnings.warn_explicit(
                f"{self.name}: {shared:,} bytes of shared memory; above {DEFAULT_SHARED:,} a GPU must be asked for it "
                "(cudaFuncSetAttribute), which the launcher for GPUs does",
                UserWarning,
                "kernel.cu",
                self._line,
            )


class Launch:
    """`kernel[grid, block]`: waits for the arguments."""

    def __init__(self, kernel, how, configuration):
        self._how = how
        self._shape = args.launch_shape(kernel.name, configuration)

    def __call__(self, *arguments):
        return self._how(*self._shape, arguments)


class _Launcher:
    def __init__(self, kernel, how):
        self._kernel, self._how = kernel, how

    def __getitem__(self, configuration):
        return Launch(self._kernel, self._how, configuration)

    def __call__(self, *arguments):
        self._kernel(*arguments)  # says how to launch


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _place(arrays, memory):
    """Give each distinct array a place in the shared memory with room around it: {its key: (Array, offset)}.

    The room before and after is as large as the array, so that an index that runs too far meets nothing.
    """
    placed, at = {}, 0
    for a in arrays:
        if a.key in placed:
            first = placed[a.key][0]
            first.writable |= a.writable
            first.element = min(first.element, a.element)  # of two types; races are looked for in the smaller
            continue
        room = max(GUARD, a.nbytes)
        offset = -(-(at + room) // SECTOR_PAGE) * SECTOR_PAGE
        placed[a.key] = (a, offset)
        at = offset + a.nbytes + room
    memory.grow(at + GUARD)
    return placed


def compile(source, name=None, template=(), time_limit=TIME_LIMIT, schedule="forward"):
    """Compile a CUDA C++ kernel.

    source: CUDA C++, as for a GPU. name: the kernel's name, needed where the source has several. template: its template
    arguments, `(64,)` for `flash_fwd<64>`. time_limit: seconds that a launch on the CPU may take before it is stopped.
    schedule: in which order the CPU runs blocks, warps and lanes, "forward", "reverse" or "random" (the same every time);
    what depends on it is a race. Returns a `Kernel`. Raises CompileError, which points at the line.
    """
    if not isinstance(source, str):
        raise TypeError(f"compile: source: expected CUDA C++ in a string, got {type(source).__name__}")
    if not isinstance(time_limit, (int, float)) or not time_limit > 0:
        raise ValueError(f"compile: time_limit: expected a number of seconds above 0, got {time_limit!r}")
    if schedule not in SCHEDULES:
        raise ValueError(f"compile: schedule: expected one of {', '.join(map(repr, SCHEDULES))}, got {schedule!r}")
    kernel = Kernel(source, name, template, time_limit, schedule)
    try:
        build = binary.checked_build(kernel.source, kernel.name)
    except CompileError:
        if not _has_gpu():
            raise
        return kernel
    if skipped := skipped_includes(source):
        what = ", ".join(text for _, text in skipped)
        warnings.warn_explicit(f"{what}: not read; the kernel does without", UserWarning, "kernel.cu", skipped[0][0])
    for line, text in build.warnings:
        warnings.warn_explicit(point_at(source, line, text), UserWarning, "kernel.cu", line)
    return kernel


def _has_gpu():
    """A kernel that only a GPU can run compiles when it is launched there. Does not import torch for this."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()
