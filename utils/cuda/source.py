"""What has to be known about a CUDA source before a C++ compiler sees it: its kernels, and its shared arrays."""
import re
from dataclasses import dataclass

SKIPPED = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)
KERNEL = re.compile(r"\b__global__\b(?:[^;{}()]|__launch_bounds__\s*\([^)]*\))*?\b(\w+)\s*\((?<!__launch_bounds__\()")
SHARED = re.compile(r"\b__shared__\b\s*([^;]+);")
EXTERN_SHARED = re.compile(r"\bextern\s+__shared__\s+([^;]+);")
INITIALISED = re.compile(r"(?<![=<>!])=(?!=)|\{")
# Headers of the host's C library and of the CUDA runtime. What a kernel can use of them is built in, here and on a GPU.
HOST_INCLUDE = re.compile(
    r"^[ \t]*#[ \t]*include[ \t]*[<\"](?:(?:assert|float|limits|math|stddef|stdint|stdio|stdlib|string)\.h"
    r"|c(?:assert|float|limits|math|stddef|stdint|stdio|stdlib|string)"
    r"|cuda\.h|cuda_runtime(?:_api)?\.h|device_launch_parameters\.h)[>\"]", re.MULTILINE)
ALIGNMENT = re.compile(r"\b(?:__align__|alignas|__attribute__)\s*\((?:[^()]|\([^()]*\))*\)")


class CompileError(Exception):
    """The source cannot be compiled. The text points at the line of the source."""


@dataclass(frozen=True)
class KernelSource:
    """One `__global__` function: its name, its parameters (`"const float* q"`, ...) and the names of these."""

    name: str
    line: int
    is_template: bool
    declarations: tuple
    parameters: tuple


def blank(source):
    """The source with comments and literals replaced by spaces: same length, same lines, nothing to trip over."""
    return SKIPPED.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), source)


def line_at(source, position):
    return source.count("\n", 0, position) + 1


def split_at_commas(text):
    """Split at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "<([{") - (character in ">)]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def closing(text, position):
    """Position of the bracket that closes the one at `position`."""
    depth = 0
    for i in range(position, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def unclosed_brace(source):
    """(line, what to say) of a `{` without its `}`, or None if there are not too few `}`.

    The one that stays open is the outermost; the one that was meant to be closed is indented otherwise than the `}` that
    closes it.
    """
    bare, waiting, suspect = blank(source), [], None
    if bare.count("{") <= bare.count("}"):
        return None

    def indentation(position):
        line = bare[bare.rfind("\n", 0, position) + 1:]
        return len(line) - len(line.lstrip(" \t"))

    for brace in re.finditer(r"[{}]", bare):
        if brace.group() == "{":
            waiting.append(brace.start())
        elif waiting:
            opened = waiting.pop()
            if suspect is None and indentation(opened) > indentation(brace.start()):
                suspect = opened
    return line_at(source, waiting[-1] if suspect is None else suspect), "this '{' is never closed"


def find_kernels(source):
    """All `__global__` functions of a source, in order, as `KernelSource`; one that is declared first counts once."""
    bare, kernels = blank(source), {}
    for match in KERNEL.finditer(bare):
        name, start = match.group(1), match.end() - 1
        if name == "__launch_bounds__":
            continue
        declarations = split_at_commas(bare[start + 1:closing(bare, start)])
        declarations = tuple(" ".join(d.split("=")[0].split()) for d in declarations if d != "void")
        parameters = tuple(re.sub(r"\[.*", "", d).split()[-1].lstrip("*&") for d in declarations)
        before = bare[:match.start()].rstrip()
        is_template = before.endswith(">") and re.search(r"\btemplate\s*<[^;{}]*>$", before) is not None
        kernels[name] = KernelSource(name, line_at(bare, match.start()), is_template, declarations, parameters)
    return list(kernels.values())


def choose_kernel(source, name):
    """The kernel called `name`, or the only one. Raises CompileError if that is not clear."""
    kernels = find_kernels(source)
    if not kernels:
        raise CompileError("the source has no kernel: a kernel is a function declared `__global__ void name(...)`")
    names = ", ".join(k.name for k in kernels)
    if name is None and len(kernels) > 1:
        raise CompileError(f"the source has {len(kernels)} kernels ({names}): say which one with name=")
    chosen = [k for k in kernels if name in (None, k.name)]
    if not chosen:
        raise CompileError(f"the source has no kernel called {name!r}; it has {names}")
    return chosen[0]


def instance(kernel, template):
    """The C++ name of the kernel with its template arguments: `flash_fwd<64>`."""
    template = template if isinstance(template, (tuple, list)) else (template,)
    if kernel.is_template and not template:
        raise CompileError(f"{kernel.name} is a template: give its arguments, as in template=(64,)")
    if template and not kernel.is_template:
        raise CompileError(f"{kernel.name} is not a template, but template={tuple(template)!r} was given")
    words = [str(t).lower() if isinstance(t, bool) else str(t) for t in template]
    return f"{kernel.name}<{', '.join(words)}>" if words else kernel.name


def without_host_includes(source):
    """The source without `#include <math.h>` and its like; line numbers stay."""
    return HOST_INCLUDE.sub("", source)


def for_cpu(source, checked):
    """The source with the two spellings rewritten that plain C++ has no word for. Line numbers stay."""
    source = without_host_includes(source)
    bare, edits = blank(source), []
    for match in EXTERN_SHARED.finditer(bare):
        edits.append((match.span(), _dynamic_array(source, bare, match)))
    dynamic = [span for span, _ in edits]
    for match in SHARED.finditer(bare):
        inside = any(start <= match.start() < end for start, end in dynamic)
        if checked and not inside:
            edits.append((match.span(), _static_arrays(source, bare, match)))
    for (start, end), text in sorted(edits, reverse=True):
        source = source[:start] + text + "\n" * source.count("\n", start, end) + source[end:]
    return source


def uses_dynamic_shared(source):
    return EXTERN_SHARED.search(blank(source)) is not None


def _declared(declaration):
    """`float a[4][4], b[4]` -> (`float`, [(`a`, `[4][4]`), (`b`, `[4]`)]), or None if it does not look like that."""
    type_, variables = None, []
    for part in split_at_commas(" ".join(ALIGNMENT.sub(" ", declaration).split())):
        match = re.fullmatch(r"(.*?)\b(\w+)\s*((?:\[.*\])?)", part)
        if not match:
            return None
        type_ = type_ if type_ is not None else match.group(1).strip()
        variables.append((match.group(2), match.group(3)))
    return (type_, variables) if type_ and variables else None


def _shared_or_refuse(source, bare, match):
    line = line_at(bare, match.start())
    if bare.count("{", 0, match.start()) == bare.count("}", 0, match.start()):
        raise CompileError(point_at(source, line, "declare shared memory inside the kernel that uses it"))
    without_sizes = re.sub(r"\[[^\]]*\]", "", match.group(1))
    if INITIALISED.search(without_sizes):
        raise CompileError(point_at(source, line, "shared memory cannot be initialised in its declaration"))
    declared = _declared(match.group(1))
    if declared is None:
        raise CompileError(point_at(source, line, "this declaration of shared memory is not understood"))
    return declared


def _dynamic_array(source, bare, match):
    type_, ((name, _), *_) = _shared_or_refuse(source, bare, match)
    return f"{type_}* {name} = ({type_}*)cu_dynamic_shared();"


def _static_arrays(source, bare, match):
    """In the checked build a shared array is a reference into guarded memory, known to the runtime by name."""
    type_, variables = _shared_or_refuse(source, bare, match)
    return "".join(
        f"typedef {type_} cu_type_{name}{size}; static CuSharedArray cu_array_{name}; "
        f"cu_type_{name}& {name} = *(cu_type_{name}*)cu_static_shared(&cu_array_{name}, \"{name}\", "
        f"sizeof(cu_type_{name}), CuElement<cu_type_{name}>::size); "
        for name, size in variables)


def cell_shift(source):
    """log2 of the bytes in which races in dynamic shared memory are told apart: the smallest type the source names."""
    bare = EXTERN_SHARED.sub(" ", blank(source))
    if re.search(r"\b(?:u?int8_t|char|uchar\d?|bool)\b", bare):
        return 0
    if re.search(r"\b(?:half2?|__half2?|(?:__)?nv_bfloat162?|short|u?int16_t)\b", bare):
        return 1
    return 2


def point_at(source, line, message, column=None):
    """A compiler's message with the line it is about."""
    lines = source.split("\n")
    text = lines[line - 1] if 0 < line <= len(lines) else ""
    shown = f"line {line}: {message}\n{line:>5} | {text}"
    if column and column <= len(text):
        shown += "\n      | " + re.sub(r"[^\t]", " ", text[:column - 1]) + "^"
    return shown
