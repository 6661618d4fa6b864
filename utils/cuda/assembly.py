"""Where the access callbacks are called from, and for which line of the kernel.

A callback knows its caller's address. To turn that into a source line without reading DWARF, PDB or dSYM files, the
compiler's assembly is labelled after each call of a callback, a table of the labels is appended, and the line of each
is read from the `.loc` directives around it. The same for ELF, Mach-O and COFF.
"""
import re
import sys

CALL = re.compile(r"\s*(?:callq?|bl)\s+_?(?:__tsan_|__sanitizer_cov_(?:load|store)|_Z\d+atomic|__pipeline_memcpy_async"
                  r"|_ZN6nvcuda4wmma(?:9load|10store)_tile)")
LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
FILE = re.compile(r'\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"')
SECTION = {"darwin": ".section __DATA,__cu_places", "win32": '.section .data$cu,"dw"'}


def label_places(assembly, name="kernel.cu", platform=sys.platform):
    """Label every call of a callback. Returns the new assembly and the kernel's line for each label, in order."""
    inlined = re.compile(re.escape(name) + r":(\d+):\d+")
    file_number, line, out, lines = None, 0, [], []
    for text in assembly.split("\n"):
        out.append(text)
        if match := FILE.match(text):
            if match.group(2).endswith(name):
                file_number = match.group(1)
        elif match := LOC.match(text):
            if match.group(1) == file_number:
                line = int(match.group(2)) or line
            elif match := inlined.search(text):      # clang says where a function of a header was inlined;
                line = int(match.group(1))           # gcc does not, and the last line of the kernel stands
        elif CALL.match(text):
            out.append(f"Lcu_place{len(lines)}:")
            lines.append(line)
    underscore = "_" if platform == "darwin" else ""
    places, count = underscore + "cu_places", underscore + "cu_n_places"
    out += [SECTION.get(platform, '.section .data.rel.ro,"aw"'), ".p2align 3"]
    out += [f".globl {places}", f"{places}:"] + [f".quad Lcu_place{i}" for i in range(len(lines))] + [".quad 0"]
    out += [f".globl {count}", f"{count}:", f".quad {len(lines)}"]
    return "\n".join(out) + "\n", lines
