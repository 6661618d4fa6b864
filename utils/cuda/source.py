"""What has to be known about a CUDA source before a C++ compiler sees it: its kernels, and its shared arrays."""

import re
from dataclasses import dataclass
from pathlib import Path

from .calls import marked
from .errors import CompileError
from .ptx import translated
from .structure import blocks, scope_at
from .text import blank, closing, line_at, point_at, split_at_commas

HEADERS = Path(__file__).with_name("include")
IN_BRACKETS = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
KERNEL = re.compile(rf"\b__global__\b(?:[^;{{}}()]|\b__\w+__\s*{IN_BRACKETS})*?\b(?!__\w+__\b)(\w+)\s*\(")
TEMPLATE = re.compile(r"\btemplate\s*<([^;{}]*)>[\s\w\"]*$")
ALIGNMENT = re.compile(r"\b(?:__align__|alignas|__attribute__)\s*\((?:[^()]|\([^()]*\))*\)")
# `static __shared__ float s[4]`, `float __shared__ s[4]`: words of the declaration may stand before __shared__.
SHARED = re.compile(rf"(?:(?:\w+(?:::\w+)*(?:<[^;{{}}()\n]*>)?|{ALIGNMENT.pattern})[ \t]+)*(?P<word>\b__shared__\b)")
EXTERN_SHARED = re.compile(r"\bextern\b[^;{}]*\b__shared__\s[^;]*;|\b__shared__\s[^;{}]*\bextern\b[^;]*;")
INITIALISED = re.compile(r"(?<![=<>!])=(?!=)|\{")
INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*([<\"])([^>\"\n]*)[>\"]", re.MULTILINE)
# Headers of the host's C library and of the CUDA runtime. What a kernel can use of them is built in, here and on a GPU.
HOST_HEADER = re.compile(
    r"(?:assert|float|limits|math|stddef|stdint|stdio|stdlib|string)\.h"
    r"|c(?:assert|float|limits|math|stddef|stdint|stdio|stdlib|string)"
    r"|cuda\.h|cuda_runtime(?:_api)?\.h|device_launch_parameters\.h|builtin_types\.h|vector_(?:types|functions)\.h"
    r"|device_functions\.h|sm_\w+_intrinsics\.h|math_functions\.h"
)


@dataclass(frozen=True)
class KernelSource:
    """One `__global__` function: its name, its parameters (`"const float* q"`, ...) and the names of these."""

    name: str
    line: int
    template: tuple  # its template parameters, as ("int D", "bool CAUSAL = false")
    declarations: tuple
    parameters: tuple

    @property
    def is_template(self):
        return bool(self.template)

    @property
    def needs_arguments(self):
        """Whether a template parameter has no default."""
        return any("=" not in parameter and "..." not in parameter for parameter in self.template)


def unclosed_brace(source):
    """(line, what to say) of a `{` without its `}`, or None if there are not too few `}`.

    The one that stays open is the outermost; the one that was meant to be closed is indented otherwise than the `}` that
    closes it.
    """
    bare, waiting, suspect = blank(source), [], None
    if bare.count("{") <= bare.count("}"):
        return None

    def indentation(position):
        line = bare[bare.rfind("\n", 0, position) + 1 :]
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
    all_blocks = blocks(bare)
    for match in KERNEL.finditer(bare):
        start = match.end() - 1
        name = "::".join((*scope_at(all_blocks, match.start()), match.group(1)))
        declarations = split_at_commas(bare[start + 1 : closing(bare, start)])
        declarations = tuple(" ".join(d.split("=")[0].split()) for d in declarations if d != "void")
        parameters = tuple(re.sub(r"\[.*", "", d).split()[-1].lstrip("*&") for d in declarations)
        head = TEMPLATE.search(bare, max(bare.rfind(c, 0, match.start()) for c in ";}") + 1, match.start())
        template = tuple(split_at_commas(head.group(1))) if head else ()
        known = kernels.get(name)
        if known and known.template and all("=" not in parameter for parameter in template):
            template = known.template  # its defaults stand where it is declared first
        kernels[name] = KernelSource(name, line_at(bare, match.start()), template, declarations, parameters)
    return list(kernels.values())


def choose_kernel(source, name):
    """The kernel called `name`, or the only one. Raises CompileError if that is not clear."""
    kernels = find_kernels(source)
    if not kernels:
        raise CompileError("the source has no kernel: a kernel is a function declared `__global__ void name(...)`")
    names = ", ".join(k.name for k in kernels)
    if name is None and len(kernels) > 1:
        raise CompileError(f"the source has {len(kernels)} kernels ({names}): say which one with name=")
    chosen = [k for k in kernels if name in (None, k.name)] or [k for k in kernels if k.name.endswith(f"::{name}")]
    if not chosen:
        raise CompileError(f"the source has no kernel called {name!r}; it has {names}")
    if len(chosen) > 1:
        raise CompileError(
            f"the source has {len(chosen)} kernels called {name!r} ({', '.join(k.name for k in chosen)})"
        )
    return chosen[0]


def instance(kernel, template):
    """The C++ name of the kernel with its template arguments: `flash_fwd<64>`."""
    template = template if isinstance(template, (tuple, list)) else (template,)
    if kernel.needs_arguments and not template:
        raise CompileError(f"{kernel.name} is a template: give its arguments, as in template=(64,)")
    if template and not kernel.is_template:
        raise CompileError(f"{kernel.name} is not a template, but template={tuple(template)!r} was given")
    words = [str(t).lower() if isinstance(t, bool) else str(t) for t in template]
    return f"{kernel.name}<{', '.join(words)}>" if kernel.is_template else kernel.name


def without_includes(source, is_kept):
    """The source without the headers that a kernel does not have; line numbers stay.

    is_kept: whether to leave a header of this name, `cuda_fp16.h`, to the compiler. Returns the source, and (line, text)
    of each header that was taken out and whose content is not built in.
    """
    bare, kept, skipped, at = blank(source), [], [], 0
    for match in INCLUDE.finditer(source):
        if bare[match.start() : match.start(1)].strip() == "" or is_kept(match.group(2)):  # in a comment, or available
            continue
        kept.append(source[at : match.start()])
        at = match.end()
        if not HOST_HEADER.fullmatch(match.group(2)):
            skipped.append((line_at(source, match.start()), match.group().strip()))
    return "".join([*kept, source[at:]]), skipped


def note_of_includes(skipped):
    """A line about headers that were taken out: what is missing may be theirs."""
    if not skipped:
        return ""
    what = ", ".join(f"{text} (line {line})" for line, text in skipped[:4])
    return f"\nnot read: {what}: a kernel has no C++ library and no files of a project; paste what it needs of them"


def _is_ours(header):
    return (HEADERS / header).is_file()


def skipped_includes(source):
    """(line, text) of each header that is taken out for the CPU and whose content is not built in."""
    return without_includes(source, _is_ours)[1]


def for_cpu(source, checked, every_call=False):
    """The source with its declarations of shared memory rewritten, for which plain C++ has no word. Line numbers stay."""
    source, _ = without_includes(source, _is_ours)
    source = translated(source)
    if checked:
        source = marked(source, every_call)
    bare, edits = blank(source), []
    for match in SHARED.finditer(bare):
        end = _end_of_declaration(bare, match.end())
        words = (bare[match.start() : match.start("word")] + bare[match.end("word") : end]).split()
        is_dynamic = "extern" in words
        declaration = " ".join(word for word in words if word not in ("extern", "static"))
        type_, variables = _shared_or_refuse(source, bare, match.start(), declaration)
        make = _dynamic_array if is_dynamic else _static_array
        text = "".join(make(type_, name, size, checked) for name, size in variables)
        edits.append((match.start(), end + 1, text))
    for start, end, text in reversed(edits):
        source = source[:start] + text + "\n" * source.count("\n", start, end) + source[end:]
    return source


def uses_dynamic_shared(source):
    return EXTERN_SHARED.search(blank(source)) is not None


def _end_of_declaration(bare, position):
    """Position of the `;` that ends a declaration, which may hold the body of a union."""
    depth = 0
    for i in range(position, len(bare)):
        depth += (bare[i] == "{") - (bare[i] == "}")
        if bare[i] == ";" and depth == 0 or depth < 0:
            return i
    return len(bare)


def _declared(declaration):
    """`float a[4][4], b[4]` -> (`float`, [(`a`, `[4][4]`), (`b`, `[4]`)]), or None if it does not look like that."""
    declaration = " ".join(ALIGNMENT.sub(" ", declaration).split())
    body = declaration.rfind("}") + 1  # of a union or struct that is declared here
    type_, variables = declaration[:body] or None, []
    for part in split_at_commas(declaration[body:]):
        match = re.fullmatch(r"(.*?)\b(\w+)\s*((?:\[.*\])?)", part)
        if not match:
            return None
        type_ = type_ if type_ is not None else match.group(1).strip()
        variables.append((match.group(2), match.group(3)))
    return (type_, variables) if type_ and variables else None


def _shared_or_refuse(source, bare, position, declaration):
    line = line_at(bare, position)
    if bare.count("{", 0, position) == bare.count("}", 0, position):
        raise CompileError(point_at(source, line, "declare shared memory inside the kernel that uses it"))
    without_sizes = re.sub(r"\[[^\]]*\]", "", declaration)
    if INITIALISED.search(re.sub(r"^[^{=]*\b(?:union|struct)\b[^{=]*\{.*\}", "", without_sizes)):
        raise CompileError(point_at(source, line, "shared memory cannot be initialised in its declaration"))
    declared = _declared(declaration)
    if declared is None:
        raise CompileError(point_at(source, line, "this declaration of shared memory is not understood"))
    return declared


def _dynamic_array(type_, name, size, _):
    """`float s[][33]` becomes a pointer to rows."""
    rows = size[size.find("]") + 1 :]
    return f"typedef {type_} cu_type_{name}{rows}; cu_type_{name}* {name} = (cu_type_{name}*)cu_dynamic_shared(); "


def _static_array(type_, name, size, checked):
    """A shared array is a reference into memory: guarded, and known to the runtime by name, or a thread's of the system,
    which runs one block at a time."""
    of_type = f"cu_type_{name}"
    if checked:
        memory = f"static CuSharedArray cu_array_{name};"
        about = f"sizeof({of_type}), CuElement<{of_type}>::size, CuElement<{of_type}>::shape"
        address = f'cu_static_shared(&cu_array_{name}, "{name}", {about})'
    else:
        memory = f"static CU_BLOCK_MEMORY unsigned char cu_array_{name}[sizeof({of_type})];"
        address = f"cu_array_{name}"
    return f"typedef {type_} {of_type}{size}; {memory} {of_type}& {name} = *({of_type}*){address}; "


def cell_shift(source):
    """log2 of the bytes in which races in dynamic shared memory are told apart: the smallest type the source names."""
    bare = EXTERN_SHARED.sub(" ", blank(source))
    if re.search(r"\b(?:u?int8_t|char|uchar\d?|bool)\b", bare):
        return 0
    if re.search(r"\b(?:half2?|__half2?|(?:__)?nv_bfloat162?|short|u?int16_t)\b", bare):
        return 1
    return 2
