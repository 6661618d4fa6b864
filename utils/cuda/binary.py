"""From CUDA C++ source to a library that the worker can load."""

import functools
import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from .cpu import cache, process, toolchain
from .errors import CompileError
from .source import for_cpu
from .structure import constants, leaving_out
from .text import blank

# Parts of the header that are read only where a source uses them.
OPTIONAL = {
    "CU_ROUNDING": re.compile(r"_r[nzdu]\b|\b__ddiv|\b__drcp"),
    "CU_SPECIAL": re.compile(r"\b(?:[jy][01n]f?|cyl_bessel_i[01]f?|erfc?invf?|erfcxf?|normcdfinvf?)\s*\("),
    "CU_SIMD": re.compile(r"\b__v\w+[24]\b|\b__vi\w+"),
    "CU_PTX": re.compile(r"\basm\b|\b__asm__\b|__cvta_generic_to_shared"),
    "CU_HALF_FUNCTIONS_TOO": re.compile(r"half|bfloat16|bf16|f16x2"),
}


@dataclass(frozen=True)
class Build:
    """A compiled kernel: its library, its arguments as `(kind, code, size)`, and the places in it.

    kind is "s" (by value), "p" (pointer) or "c" (pointer to const); code is a `struct` letter, "e" half, "y" bfloat16,
    "v" void, "" a struct; size is in bytes. `places` maps an offset in the library to the (line, column) of an access; it
    is empty in a plain build. `constants` maps a name to (its number, code, size of an element, bytes). `warnings`
    are the compiler's, as (line, text).
    """

    library: str
    checked: bool
    signature: tuple
    places: dict
    constants: dict
    warnings: tuple


@functools.lru_cache(maxsize=256)
def build(source, kernel, checked, compiler, folder, every_call=False):
    """Compile `kernel` (`"flash_fwd<64>"`) of `source`, or find it in the cache `folder`. Raises CompileError.

    Other functions of the source that do not compile are left out, as long as the kernel can do without them.
    """
    return leaving_out(source, kernel, lambda text: _build(text, kernel, checked, compiler, folder, every_call))


def _build(source, kernel, checked, compiler, folder, every_call):
    names = constants(blank(source))
    text = "\n".join(
        [
            *(f"#define {part}" for part, names in OPTIONAL.items() if names.search(source)),
            '#include "cuda_on_cpu.h"',
            '#line 1 "kernel.cu"',
            for_cpu(source, checked, every_call),
            f'#line 1 "entry of {kernel}"',
            f"CU_ENTRY({kernel})",
            f"CU_CONSTANTS({' '.join(f'cu_constant({name}),' for name in names)})",
            "",
        ]
    )
    what = (text, toolchain.runtime_digest(), compiler, toolchain.kernel_flags(compiler, checked), sys.platform)
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:24]
    library = folder / (key + toolchain.LIBRARY_SUFFIX)
    known = cache.find(library)
    if known is None:
        try:
            places, warnings = toolchain.build(compiler, text, source, checked, library)
        except CompileError as error:
            if "always_inline" not in str(error):
                raise
            places, warnings = toolchain.build(
                compiler, f"#define CU_INLINE_IS_A_HINT\n{text}", source, checked, library
            )
        with process.lock:
            signature, offsets, sizes = process.worker().describe(str(library), checked)
        known = {"signature": signature, "places": list(zip(offsets, places)), "constants": list(zip(names, sizes))}
        known["warnings"] = warnings
        cache.seal(library, **known)
    return Build(
        str(library),
        checked,
        tuple(map(tuple, known["signature"])),
        {offset: tuple(place) for offset, place in known["places"]},
        {name: (number, *size) for number, (name, size) in enumerate(known["constants"])},
        tuple(map(tuple, known["warnings"])),
    )


def checked_build(source, kernel, every_call=False):
    """every_call: to know from where a helper was called; slower."""
    return build(source, kernel, True, toolchain.find_compiler(), cache.folder(), every_call)


def plain_build(source, kernel):
    return build(source, kernel, False, toolchain.find_compiler(), cache.folder())


def is_damaged(built):
    """Whether the library is gone, or not what it was when it was built."""
    return cache.find(Path(built.library)) is None


def forget(built):
    """Build it again when it is needed next."""
    cache.forget(Path(built.library))
    build.cache_clear()
