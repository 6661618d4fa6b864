"""Where the access callbacks are called from, and for which place in the kernel.

A callback knows its caller's address. To turn that into a place in the source without reading the debug information of
ELF, Mach-O and COFF files, the compiler's assembly is labelled after each call of a callback, a table of the labels is
appended, and the place of each is read from the assembly: its line and column.

An access that stands in a header of ours, such as the copy of a float4, belongs to the kernel's line that it was inlined
into. clang writes that line beside each `.loc`. gcc writes it into the debug information, as the call of each inlined
block; the blocks begin and end at labels (`.LBB7`, `.LBE7`), and with -dA their attributes have names.
"""

import re
import sys

CALL = re.compile(
    r"\s*(?:callq?|bl)\s+_?(?:__tsan_|__sanitizer_cov_(?:load|store)|_Z\d+(?:atomic|cu_ptx_(?:ldmatrix|access))|__pipeline_memcpy_async"
    r"|cu_(?:log_(?:copy|fill)|memcpy|memset|mbarrier_\w+|bulk_store)\b|_ZN6nvcuda4wmma(?:9load|10store)_tile)"
)
DIVISION = re.compile(r"\s*i?div[bwlq]\s")  # of integers; x86 stops at a zero
LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)(?:\s+(\d+))?")
FILE = re.compile(r'\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"')
BLOCK = re.compile(r"\.LB([BE])(\d+):")
FUNCTION = ".cfi_startproc"
SECTION = {"darwin": ".section __DATA,__cu_places", "win32": '.section .data$cu,"dw"'}


def label_places(assembly, name="kernel.cu", platform=sys.platform):
    """Label every call of a callback behind it, and every division of integers before it. Returns the new assembly and, in
    order, the (line, column) of each in the kernel."""
    inlined_by_clang = re.compile(re.escape(name) + r":(\d+):(\d+)")
    calls = inlined_by_gcc(assembly, name)
    file_number, last, here, blocks, out, places = None, (0, 0), None, [], [], []
    for text in assembly.split("\n"):
        out.append(text)
        if match := FILE.match(text):
            if match.group(2).endswith(name):
                file_number = match.group(1)
        elif match := LOC.match(text):
            here = None
            if match.group(1) == file_number:
                here = int(match.group(2)) or last[0], int(match.group(3) or 0)
            elif match := inlined_by_clang.search(text):
                here = int(match.group(1)), int(match.group(2))
            last = here or last
        elif match := BLOCK.match(text):
            if match.group(1) == "B":
                blocks.append(match.group(2))
            elif match.group(2) in blocks:
                blocks.remove(match.group(2))
        elif FUNCTION in text:
            blocks = []
        elif (call := CALL.match(text)) or DIVISION.match(text):
            around = (calls[block] for block in reversed(blocks) if block in calls)
            out.insert(len(out) - (not call), f"Lcu_place{len(places)}:")
            places.append(here or next(around, last))
    underscore = "_" if platform == "darwin" else ""
    table, count = underscore + "cu_places", underscore + "cu_n_places"
    out += [SECTION.get(platform, '.section .data.rel.ro,"aw"'), ".p2align 3"]
    out += [f".globl {table}", f"{table}:"] + [f".quad Lcu_place{i}" for i in range(len(places))] + [".quad 0"]
    out += [f".globl {count}", f"{count}:", f".quad {len(places)}"]
    return "\n".join(out) + "\n", places


# An attribute's value stands before its name, or behind it where all entries of a kind share it.
ENTRY = re.compile(r"\(DIE \(0x[0-9a-f]+\) DW_TAG_(\w+)\)")
CALL_FILE = re.compile(r"DW_AT_call_file \((?:\w+, )?(.*)\)")
CALL_NUMBER = re.compile(r"(?:\.\w+\s+(\w+)\s+\S+ )?DW_AT_call_(line|column)(?: \((\w+)\))?")
FIRST_BLOCK = re.compile(r"\.LBB(\d+)\s+\S+ DW_AT_low_pc")
RANGES = re.compile(r"(\.LLRL\d+)\s+\S+ DW_AT_ranges")
RANGE_LIST = re.compile(r"(\.LLRL\d+):\n((?:[ \t].*\n)*)")


def inlined_by_gcc(assembly, name):
    """{number of a block: (line, column) of the call in the kernel that it is the inlined body of}."""
    ranges = {label: re.findall(r"\.LBB(\d+)", body) for label, body in RANGE_LIST.findall(assembly)}
    calls, entries = {}, ENTRY.split(assembly)
    for tag, attributes in zip(entries[1::2], entries[2::2]):
        file = CALL_FILE.search(attributes)
        if tag != "inlined_subroutine" or not file or not file.group(1).endswith(name):
            continue
        numbers = {which: int(before or behind, 0) for before, which, behind in CALL_NUMBER.findall(attributes)}
        blocks = FIRST_BLOCK.findall(attributes)
        for label in RANGES.findall(attributes):
            blocks += ranges.get(label, [])
        calls |= dict.fromkeys(blocks, (numbers.get("line", 0), numbers.get("column", 0)))
    return calls


UNCHECKED = re.compile(r"^attributes (#\d+) = \{[^\n]*\bnosanitize_coverage\b", re.MULTILINE)
CALLBACK = re.compile(r"call void @__sanitizer_cov_(load|store)(\d+)\(ptr (\S+)\)")
VOLATILE = re.compile(r"\b(?:load|store) volatile\b.*?, ptr ([^\s,]+)")
COPY = re.compile(r"[ \t]*(?:tail )?call void @llvm\.mem(cpy|move|set)\.[\w.]+\((.*)\)(?: #\d+)?(, !dbg !\d+)?.*")


def log_copies(ir):
    """LLVM's text with a callback before every copy of a struct, which clang's own callbacks leave out; not in functions of
    ours, which are to go unseen. Callbacks of volatile accesses get the names that gcc has for them."""
    unchecked, is_ours, out, callback, used = set(UNCHECKED.findall(ir)), False, [], None, set()
    for text in ir.split("\n"):
        if text.startswith("define "):
            is_ours = not unchecked.isdisjoint(re.findall(r"#\d+", text))
        elif not is_ours and (match := COPY.match(text)):
            what, (to, value, size, _) = match.group(1), match.group(2).split(", ")
            name, given = ("fill", (to, size)) if what == "set" else ("copy", (to, value, size))
            arguments = ", ".join(f"{a.split()[0]} {a.split()[-1]}" for a in given)
            out.append(f"  call void @cu_log_{name}({arguments}){match.group(3) or ''}")
        elif called := CALLBACK.search(text):
            callback = len(out), called
        elif (access := VOLATILE.search(text)) and callback and callback[1].group(3) == access.group(1):
            what, size, _ = callback[1].groups()
            name = f"__tsan_volatile_{'read' if what == 'load' else 'write'}{size}"
            out[callback[0]] = out[callback[0]].replace(f"@__sanitizer_cov_{what}{size}", f"@{name}")
            used.add(name)
        out.append(text)
    return "\n".join(
        [*out, "declare void @cu_log_copy(ptr, ptr, i64)", "declare void @cu_log_fill(ptr, i64)",
         *(f"declare void @{name}(ptr)" for name in sorted(used)), ""]
    )  # fmt: skip
