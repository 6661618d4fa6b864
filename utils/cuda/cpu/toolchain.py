"""Finding a C++ compiler, and running it."""

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import CompileError
from . import cache
from .assembly import label_places, log_copies
from .diagnostics import errors, explain, missing, warnings_in

HERE = Path(__file__).parents[1]  # utils/cuda
LIBRARY_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
COPIES = re.compile(r"\b(?:struct|class|union|volatile)\b")  # where clang's own callbacks do not say all (assembly.py)
# What a learner wants to be told about a kernel that compiles; diagnostics.py shows these and no others. Those that guess
# (-Wmaybe-uninitialized) accuse correct kernels.
WARNINGS = {
    "gcc": ["-Wuninitialized", "-Wno-maybe-uninitialized", "-Warray-bounds", "-Wformat", "-Wreturn-type"],
    "clang": [
        "-Wuninitialized",
        "-Wsometimes-uninitialized",
        "-Warray-bounds",
        "-Wformat",
    ],
}
LARGEST_FRAME = 88 * 1024  # bytes of local variables in one function; a thread's stack has 96 KB


@dataclass(frozen=True)
class Compiler:
    """How to call a compiler, and whether it takes gcc's or clang's options."""

    command: tuple
    is_clang: bool
    is_zig: bool = False


def zig_command():
    """The compiler inside the wheel `ziglang`, or None."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    zig = Path(spec.submodule_search_locations[0]) / ("zig.exe" if sys.platform == "win32" else "zig")
    # baseline: else zig compiles for the very processor that it runs on, and a shared cache would not fit another
    return (str(zig), "c++", "-mcpu=baseline") if zig.exists() else None


def find_compiler():
    """The compiler for kernels: `CUDA_COURSE_CXX` (g++, clang++, zig), else what is installed. Raises CompileError."""
    return _find_compiler(os.environ.get("CUDA_COURSE_CXX"))


@functools.lru_cache
def _find_compiler(wanted):
    if wanted and wanted != "zig":
        if not shutil.which(wanted):
            raise CompileError(f"CUDA_COURSE_CXX names the compiler {wanted!r}, which is not on this machine")
        return Compiler((wanted,), sys.platform == "darwin" or "clang" in wanted)
    if not wanted:
        # Windows: MinGW's g++ and MSVC have no access callbacks. macOS: g++ is clang, and without Apple's command line
        # tools a stub that opens a dialogue.
        if sys.platform == "linux" and shutil.which("g++"):
            return Compiler(("g++",), is_clang=False)
        if sys.platform != "win32" and shutil.which("clang++") and _has_command_line_tools():
            return Compiler(("clang++",), is_clang=True)
    if zig := zig_command():
        return Compiler(zig, is_clang=True, is_zig=True)
    raise CompileError("no C++ compiler was found: `pip install ziglang` brings one (about 100 MB)")


def _has_command_line_tools():
    if sys.platform != "darwin":
        return True
    return subprocess.run(["xcode-select", "-p"], capture_output=True, check=False).returncode == 0


@functools.lru_cache
def runtime_digest():
    """A hash of everything of ours that a compiled kernel is made with: with other files it is compiled again."""
    files = sorted(
        [
            HERE / "runtime.cpp",
            HERE / "cpu/assembly.py",
            *(HERE / "runtime").glob("*.h"),
            *(HERE / "include").rglob("*.h"),
        ]
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def common_flags(compiler):
    flags = ["-std=gnu++17", f"-I{HERE / 'include'}", f"-I{HERE}", "-fno-exceptions", "-fno-rtti"]
    if sys.platform != "win32":
        # Hidden: a static variable of a template would else be one and the same in all kernels that are loaded.
        flags += ["-fPIC", "-fvisibility=hidden"]
    if compiler.is_zig:
        flags.append("-fno-sanitize=all")
    if compiler.is_zig and sys.platform == "win32":
        flags.append("-fno-rtlib-defaultlib")  # zig's objects ask for a sanitizer library that is not there
    return flags


def kernel_flags(compiler, checked):
    """Options for a kernel.

    No -march=native and no contraction to fused multiply-adds: results are the same on every x86-64 (and on every
    ARM64) processor, at a cost of about a tenth. The checked build keeps accesses where the source has them: no
    vectoriser, no unrolling.
    """
    frame = (
        ["-Werror=frame-larger-than", f"-Wframe-larger-than={LARGEST_FRAME}"]
        if compiler.is_clang
        else [f"-Werror=frame-larger-than={LARGEST_FRAME}"]
    )
    flags = [
        *common_flags(compiler),
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-Werror=vla",
        *frame,
    ]
    if not checked:
        return [*flags, "-O3"]
    flags += WARNINGS["clang" if compiler.is_clang else "gcc"]
    flags += ["-O1", "-g1", "-DCU_CHECKED", "-fno-optimize-sibling-calls"]
    if compiler.is_clang:
        return [
            *flags,
            "-gdwarf-4",  # for Windows too, where clang would write CodeView
            "-fsanitize-coverage=func,trace-loads,trace-stores",
            "-fno-vectorize",
            "-fno-slp-vectorize",
            "-fno-unroll-loops",
            "-fno-builtin-memset",
            "-fno-builtin-memcpy",
        ]
    return [
        *flags,
        "-fsanitize=thread",
        "--param",
        "tsan-instrument-func-entry-exit=0",
        "-gdwarf-5",
        "-dA",  # names in the debug information, for assembly.py
        "-gstatement-frontiers",
        "-ftree-vrp",  # for the warnings about bounds
        "-fno-reorder-blocks",  # the last .loc before a call is then that of its statement
    ]


def backend_flags(compiler):
    """Options for what clang has already optimised."""
    return ["-O1", *["-fPIC"] * (sys.platform != "win32"), *["-fno-sanitize=all"] * compiler.is_zig]


def link_flags(compiler):
    """A shared library without the C++ library; with zig that one takes minutes to build on first use."""
    flags = ["-shared", *(["-nostdlib++"] if compiler.is_clang else ["-nodefaultlibs", "-lm", "-lc", "-lgcc"])]
    if sys.platform == "linux":
        flags += ["-Wl,-Bsymbolic", "-Wl,-z,defs"]  # a function without a body is an error here and not in the worker
    return flags


def run(compiler, arguments, source=""):
    """Run the compiler. Returns what it wrote. Raises CompileError with the errors that are about `source`."""
    environment = {**os.environ, "LC_ALL": "C"}  # plain quotes in gcc's messages
    done = subprocess.run(
        [*compiler.command, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        check=False,
    )
    if done.returncode:
        raise CompileError(
            explain(done.stderr, source), [line for line, *_ in errors(done.stderr)], missing(done.stderr)
        )
    return done.stderr


def build(compiler, text, source, checked, target):
    """Compile the C++ `text` (made from `source`) into the library `target`.

    Returns the (line, column) of each place, and the compiler's warnings as (line, text).
    """
    runtime = build_runtime(compiler, checked, target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        folder = Path(folder)
        cpp, assembly, library = folder / "kernel.cpp", folder / "kernel.s", folder / ("kernel" + LIBRARY_SUFFIX)
        cpp.write_text(text, encoding="utf-8")
        flags, places, said = kernel_flags(compiler, checked), [], ""
        if checked:
            if not compiler.is_clang and "volatile" in source:
                flags += ["--param", "tsan-distinguish-volatile=1"]  # gcc 11 and later
            if compiler.is_clang and COPIES.search(source):
                ir = folder / "kernel.ll"
                said = run(compiler, [*flags, "-S", "-emit-llvm", cpp, "-o", ir], source)
                ir.write_text(log_copies(ir.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")
                flags, cpp = backend_flags(compiler), ir
            said += run(compiler, [*flags, "-S", cpp, "-o", assembly], source)
            labelled, places = label_places(assembly.read_text(encoding="utf-8", errors="replace"))
            assembly.write_text(labelled, encoding="utf-8")
            flags, cpp = [], assembly
        run(compiler, [*flags, cpp, runtime, "-o", library, *link_flags(compiler)], source)
        cache.put(library, target)
    return places, warnings_in(said)


def build_runtime(compiler, checked, folder):
    """The runtime as an object file, compiled once for each compiler and build."""
    key = hashlib.sha256(repr((runtime_digest(), compiler, sys.platform)).encode()).hexdigest()[:16]
    target = folder / f"runtime-{'checked' if checked else 'plain'}-{key}.o"
    if not cache.find(target):
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            made = Path(scratch) / "runtime.o"
            run(
                compiler,
                [*common_flags(compiler), "-O3", *["-DCU_CHECKED"] * checked, "-c", HERE / "runtime.cpp", "-o", made],
            )
            cache.put(made, target)
        cache.seal(target)
    return target
