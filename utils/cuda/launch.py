"""A compiled kernel and the three ways to launch it."""
import ctypes
import math
import os
import re
import sys
import warnings

from . import arguments as args
from . import process
from .compile import checked_build, plain_build
from .problems import Problem
from .report import Report
from .source import CompileError, blank, cell_shift, choose_kernel, instance

MAX_SHARED = 227 * 1024           # bytes of shared memory a block can have on sm_90; sm_80 has 163 KB, sm_120 99 KB
DEFAULT_SHARED = 48 * 1024        # more than this, a GPU grants only on request; utils.cuda.gpu asks for it
GUARD = 64 * 1024                 # bytes of nothing, at least, before and after each array
SECTOR_PAGE = 256                 # arrays start at multiples of this, as cudaMalloc would place them
_warned = set()


class KernelError(Exception):
    """The kernel did something wrong. `.report` is what is known, None if it crashed or did not end."""

    def __init__(self, message, report=None):
        super().__init__(message)
        self.report = report


class Kernel:
    """A CUDA kernel. `kernel[grid, block](...)` runs it, checked on a CPU; see also `.check` and `.fast`.

    Attributes: `name` (`"flash_fwd<64>"`), `parameters` (their names), `declarations` (as the source spells them),
    `source`, `template`.
    """

    def __init__(self, source, name=None, template=()):
        self.source = source
        kernel = choose_kernel(source, name)
        self.template = tuple(template) if isinstance(template, (tuple, list)) else (template,)
        self.name = instance(kernel, self.template)
        self.parameters, self.declarations, self._line = kernel.parameters, kernel.declarations, kernel.line
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

    def _run(self, grid, block, shared, arguments):
        if self._on_gpu(arguments):
            return self._run_on_gpu(grid, block, shared, arguments)
        report = self._check(grid, block, shared, arguments)
        if report.output:
            print(report.output, end="")
        if not report.ok:
            raise KernelError(report.complaint(), report)

    def _on_gpu(self, arguments):
        args.check_count(self.name, self.parameters, arguments)
        return args.on_gpu(self.name, self.parameters, arguments)

    def _run_on_gpu(self, grid, block, shared, arguments):
        from . import gpu
        gpu.launch(self, grid, block, shared, arguments)

    def _check(self, grid, block, shared, arguments):
        if self._on_gpu(arguments):
            raise ValueError(f"{self.name}: .check runs on the CPU; pass arrays in the CPU's memory")
        build = checked_build(self.source, self.name)
        try:
            result, arrays = self._launch(build, True, grid, block, shared, arguments, threads=1)
        except process.WorkerDied as death:
            return Report(self, build, block, [], {}, [Problem(*self._epitaph(death, grid, checked=True))])
        return Report(self, build, block, arrays, result)

    def _fast(self, grid, block, shared, arguments):
        if self._on_gpu(arguments):
            return self._run_on_gpu(grid, block, shared, arguments)
        build = plain_build(self.source, self.name)
        threads = 1 if self._ordered else min(_cores(), math.prod(grid))
        try:
            result, arrays = self._launch(build, False, grid, block, shared, arguments, threads)
        except process.WorkerDied as death:
            raise KernelError(self._epitaph(death, grid, checked=False)[2]) from None
        report = Report(self, build, block, arrays, result)
        if report.output:
            print(report.output, end="")
        if not report.ok:
            raise KernelError(report.complaint(), report)

    def _epitaph(self, death, grid, checked):
        if death.timed_out:
            return "time limit", 0, (
                f"TIME LIMIT: {self.name} ran for {time_limit():g} s and was stopped. Look for a loop whose condition "
                "never becomes false, or a thread that waits in a loop for another thread or block; or launch "
                f"fewer blocks ({math.prod(grid):,})")
        advice = ("Look for unbounded recursion, a wild pointer or an integer division by zero" if checked
                  else "Run it checked (kernel.check[...]) to see why")
        return "crash", 0, f"CRASH: {self.name} crashed the process it ran in. {advice}"

    def _launch(self, build, checked, grid, block, shared, arguments, threads):
        packed = args.pack(self.name, self.parameters, build.signature, arguments)
        arrays = [a for a in packed if isinstance(a, args.Array)]
        args.check_overlap(self.name, arrays)
        self._check_shared(shared)
        with process.lock:
            worker = process.worker()
            placed = _place(arrays, worker.memory)
            for array, offset in placed.values():
                ctypes.memmove(worker.memory.start + offset, array.address, array.nbytes)
            offset_of = {key: offset for key, (_, offset) in placed.items()}
            result = worker.run(
                build.library, checked, float(time_limit()), grid, block, shared,
                [offset_of[a.address, a.nbytes] if isinstance(a, args.Array) else a for a in packed],
                [(a.name, offset, a.nbytes, a.element, a.writable) for a, offset in placed.values()],
                self._cell_shift, threads)
            for array, offset in placed.values():
                if array.writable:
                    ctypes.memmove(array.address, worker.memory.start + offset, array.nbytes)
        return result, [array for array, _ in placed.values()]

    def _check_shared(self, shared):
        if shared > MAX_SHARED:
            raise ValueError(f"{self.name}: shared_bytes: {shared:,} bytes, but no GPU gives a block more than "
                             f"{MAX_SHARED:,}")
        if shared > DEFAULT_SHARED and self.name not in _warned:
            _warned.add(self.name)
            # warn_explicit: a warning that names the caller's file would differ from one notebook run to the next.
            warnings.warn_explicit(
                f"{self.name}: {shared:,} bytes of shared memory; above {DEFAULT_SHARED:,} a GPU must be asked for it "
                "(cudaFuncSetAttribute), which the launcher for GPUs does", UserWarning, "kernel.cu", self._line)


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
        self._kernel(*arguments)           # says how to launch


def time_limit():
    """Seconds a kernel may run on the CPU: `utils.cuda.time_limit`, which may be set."""
    return sys.modules[__package__].time_limit


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _place(arrays, memory):
    """Give each distinct array a place in the shared memory with room around it: {(address, nbytes): (Array, offset)}.

    The room before and after is as large as the array, so that an index that runs too far meets nothing.
    """
    placed, at = {}, 0
    for a in arrays:
        key = a.address, a.nbytes
        if key in placed:
            placed[key][0].writable |= a.writable
            continue
        room = max(GUARD, a.nbytes)
        offset = -(-(at + room) // SECTOR_PAGE) * SECTOR_PAGE
        placed[key] = (a, offset)
        at = offset + a.nbytes + room
    memory.grow(at + GUARD)
    return placed


def compile(source, name=None, template=()):
    """Compile a CUDA C++ kernel.

    source: CUDA C++, as for a GPU. name: the kernel's name, needed where the source has several. template: its template
    arguments, `(64,)` for `flash_fwd<64>`. Returns a `Kernel`. Raises CompileError, which points at the line.
    """
    if not isinstance(source, str):
        raise TypeError(f"compile: source: expected CUDA C++ in a string, got {type(source).__name__}")
    kernel = Kernel(source, name, template)
    try:
        checked_build(kernel.source, kernel.name)
    except CompileError:
        if not _has_gpu():
            raise
    return kernel


def _has_gpu():
    """A kernel that only a GPU can run compiles when it is launched there. Does not import torch for this."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()
