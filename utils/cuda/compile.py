"""From CUDA C++ source to a library that the worker can load."""
import functools
import hashlib
import json
import os
import sys
from dataclasses import dataclass

from . import process, toolchain
from .source import for_cpu


@dataclass(frozen=True)
class Build:
    """A compiled kernel: its library, its arguments as `(kind, code, size)`, and the source line of each place in it.

    kind is "s" (by value), "p" (pointer) or "c" (pointer to const); code is a `struct` letter, "e" half, "y" bfloat16,
    "v" void, "" a struct; size is in bytes. `lines` is empty in a plain build.
    """

    library: str
    signature: tuple
    lines: dict


@functools.lru_cache(maxsize=256)
def build(source, kernel, checked, compiler, folder):
    """Compile `kernel` (`"flash_fwd<64>"`) of `source`, or find it in the cache `folder`. Raises CompileError."""
    text = "\n".join(['#include "cuda_on_cpu.h"', '#line 1 "kernel.cu"', for_cpu(source, checked),
                      f'#line 1 "entry of {kernel}"', f"CU_ENTRY({kernel})", ""])
    what = (text, toolchain.runtime_digest(), compiler, toolchain.kernel_flags(compiler, checked), sys.platform)
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:24]
    library, notes = folder / (key + toolchain.LIBRARY_SUFFIX), folder / (key + ".json")
    if not (library.exists() and notes.exists()):
        lines = toolchain.build(compiler, text, source, checked, library)
        with process.lock:
            signature, offsets = process.worker().describe(str(library), checked)
        scratch = notes.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps({"signature": signature, "lines": list(zip(offsets, lines))}))
        toolchain.put(scratch, notes)
    known = json.loads(notes.read_text())
    return Build(str(library), tuple(map(tuple, known["signature"])), dict(known["lines"]))


def checked_build(source, kernel):
    return build(source, kernel, True, toolchain.find_compiler(), toolchain.cache_folder())


def plain_build(source, kernel):
    return build(source, kernel, False, toolchain.find_compiler(), toolchain.cache_folder())
