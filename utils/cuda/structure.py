"""What stands where in a CUDA source: its functions, its namespaces, its constant memory, and what is not for a kernel.

All functions here take the source with comments and literals blanked (text.blank) unless they say otherwise.
"""

import re
from dataclasses import dataclass

from .errors import CompileError
from .text import blank, line_at

MOST_ROUNDS = 8  # of leaving out what does not compile

# What only a program on the host says.
HOST_WORDS = re.compile(
    r"<<<|\bcuda[A-Z]\w*\b|\bstd::|\bnamespace\s+std\b|\bint\s+main\s*\(|\b(?:torch|at|c10)::|\bPYBIND11_|\bTORCH_\w+"
    r"|\b(?:malloc|calloc|free|srand|rand|atoi|fopen|gettimeofday)\s*\("
)
FOR_HOST = "this is host code: paste only the kernel and its device functions, and launch with kernel[grid, block](...)"
NAMESPACE = re.compile(r"\bnamespace\b\s*([\w:]*)\s*$")
LINKAGE = re.compile(r'\bextern\s*("C"|\s{3})\s*$')
DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n\\]|\\\n|\\.)*", re.MULTILINE)
FUNCTION = re.compile(r"[\w>&*\]]\s*\([^;{}]*\)[^;{}()=]*(?:\([^;{}()]*\)[^;{}()=]*)*$|\boperator\b[^;{}]*$", re.DOTALL)
NO_FUNCTION = re.compile(r"\b(?:struct|class|union|enum)\b[^()]*$")
ON_DEVICE = re.compile(r"\b__(?:global|device)__\b")
CONSTANT = re.compile(r"\b__constant__\b")
ATTRIBUTE = re.compile(r"\b(?:__align__|alignas|__attribute__)\s*\((?:[^()]|\([^()]*\))*\)")


@dataclass(frozen=True)
class Block:
    """What stands in one pair of braces at namespace scope, with what stands before it."""

    start: int  # of its head
    open: int  # its `{`
    close: int  # its `}`
    head: str
    kind: str  # "namespace", "function" or "" (a struct, the values of an array)
    scope: tuple  # names of the namespaces around it

    @property
    def is_for_host(self):
        return self.kind == "function" and not ON_DEVICE.search(self.head)


def without_directives(bare):
    """The same with `#define` and its like blanked: same length, same lines."""
    return DIRECTIVE.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), bare)


def blocks(bare):
    """All `Block`s at namespace scope, in order of their beginning; namespaces among them."""
    bare, found, waiting, start, depth = without_directives(bare), [], [], 0, 0
    for brace in re.finditer(r"[{};]", bare):
        at = brace.start()
        if brace.group() == "{":
            head = bare[start:at]
            named = NAMESPACE.search(head)
            if depth == 0 and (named or LINKAGE.search(head)):
                waiting.append((start, at, head, named.group(1) if named else None))
                start = at + 1
                continue
            if depth == 0:
                opened = start, at, head
            depth += 1
        elif brace.group() == "}" and depth:
            depth -= 1
            if depth == 0:
                scope = tuple(name for *_, name in waiting if name)
                kind = "function" if FUNCTION.search(opened[2]) and not NO_FUNCTION.search(opened[2]) else ""
                begin, opening, head = opened
                begin += len(head) - len(head.lstrip())
                found.append(Block(begin, opening, at, head.lstrip(), kind, scope))
                if kind == "function":
                    start = at + 1
        elif brace.group() == "}":
            if waiting:
                begin, opening, head, name = waiting.pop()
                found.append(Block(begin, opening, at, head, "namespace", (name,) if name else ()))
            start = at + 1
        elif depth == 0:
            start = at + 1
    return sorted(found, key=lambda block: block.open)


def scope_at(all_blocks, position):
    """The namespaces around a position, as `("attention", "detail")`."""
    around = [b for b in all_blocks if b.kind == "namespace" and b.open < position < b.close]
    return tuple(part for block in around for part in "::".join(block.scope).split("::") if part)


def constants(bare):
    """The qualified names of the `__constant__` variables that a host may fill: those that are not const in C++ too."""
    all_blocks, names = blocks(bare), []
    inside = [(b.open, b.close) for b in all_blocks if b.kind == "function" or NO_FUNCTION.search(b.head)]
    flat = without_directives(bare)
    for word in CONSTANT.finditer(flat):
        at = word.start()
        if any(opened < at < closed for opened, closed in inside):
            continue
        begin = max(flat.rfind(c, 0, at) for c in ";{}") + 1
        declaration = flat[begin : _end_of_statement(flat, at)]
        if re.search(r"\b(?:const|constexpr|extern|template)\b", declaration):
            continue
        scope = scope_at(all_blocks, at)
        plain = ATTRIBUTE.sub(" ", _without_values(declaration))
        for part in plain.split(","):
            if name := re.search(r"(\w+)\s*(?:\[[^\]]*\]\s*)*$", part.strip()):
                names.append("::".join((*scope, name.group(1))))
    return list(dict.fromkeys(names))


def _end_of_statement(flat, position):
    depth = 0
    for i in range(position, len(flat)):
        depth += (flat[i] in "{(") - (flat[i] in "})")
        if flat[i] == ";" and depth == 0:
            return i
    return len(flat)


def _without_values(declaration):
    """`float a[2] = {1, 2}, b` -> `float a[2] , b`."""
    out, depth, skipping = [], 0, False
    for character in declaration:
        if character in "{=" and depth == 0:
            skipping = True
        depth += (character in "{([") - (character in "})]")
        if character == "," and depth == 0:
            skipping = False
        if not skipping and not (character == "," and depth):
            out.append(character)
    return "".join(out)


def host_line(source, lines):
    """The first of these lines of a source (not blanked) that belongs to a program of the host, or None."""
    bare = blank(source)
    texts, whole = bare.split("\n"), [b for b in blocks(bare) if b.kind != "namespace"]
    functions = [b for b in whole if b.kind == "function"]
    for line in lines:
        around = [b for b in functions if line_at(bare, b.start) <= line <= line_at(bare, b.close)]
        if around and not around[0].is_for_host:
            continue
        said = bare[around[0].start : around[0].close] if around else texts[line - 1] if 0 < line <= len(texts) else ""
        if not around and any(
            line_at(bare, b.start) <= line <= line_at(bare, b.close) and ON_DEVICE.search(bare[b.open : b.close])
            for b in whole
        ):
            continue  # in a struct of the device's
        if HOST_WORDS.search(said):
            return line
    return None


def others_at(source, kernel, lines):
    """The functions of a source (not blanked) that hold these lines, or () if some are in none of them, or in `kernel`.

    kernel: its C++ name, `"flash<64>"`. The source may do without them: they are other kernels, and templates that are
    not used.
    """
    if host_line(source, lines):
        return ()
    bare, name = blank(source), kernel.split("<")[0].split("::")[-1]
    found = {}
    for line in lines:
        around = [
            b for b in blocks(bare) if b.kind == "function" and line_at(bare, b.start) <= line <= line_at(bare, b.close)
        ]
        if not around or any(re.search(rf"\b{re.escape(name)}\s*\(", b.head) for b in around):
            return ()
        found |= {b.open: b for b in around}
    return tuple(found.values())


def leaving_out(source, kernel, attempt):
    """attempt(source), and again without the functions that it fails at, as long as `kernel` can do without them.

    What is raised in the end is about a function that the kernel needs.
    """
    left, removed = source, []
    for _ in range(MOST_ROUNDS):
        try:
            return attempt(left)
        except CompileError as error:
            if others := others_at(left, kernel, error.lines):
                removed += [block.head for block in others]
                left = without_functions(left, others)
            elif error.missing and removed and (others := _other_kernels(left, kernel)):  # one of them may miss it
                removed += [block.head for block in others]
                left = without_functions(left, others)
            elif missed := [head for head in removed if error.missing and re.search(rf"\b{error.missing}\b", head)]:
                left = without_functions(source, _headed(source, [head for head in removed if head not in missed]))
                return attempt(left)
            else:
                raise
    raise CompileError(f"{kernel}: too many functions of its source do not compile")


def _headed(source, heads):
    return [block for block in blocks(blank(source)) if block.head in heads]


def _other_kernels(source, kernel):
    name = kernel.split("<")[0].split("::")[-1]
    found = [block for block in blocks(blank(source)) if block.kind == "function" and "__global__" in block.head]
    return [block for block in found if not re.search(rf"\b{re.escape(name)}\s*\(", block.head)]


def without_functions(source, spans):
    """The source with the bodies of these `Block`s left out: what remains of them are declarations. Lines stay."""
    for block in sorted(spans, key=lambda b: -b.open):
        body = source[block.open : block.close + 1]
        source = source[: block.open] + ";" + re.sub(r"[^\n]", "", body) + source[block.close + 1 :]
    return source
