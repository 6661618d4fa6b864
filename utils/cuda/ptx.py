"""Inline PTX for a CPU: an `asm` statement whose instructions are all known becomes calls of C++ functions (cpu/ptx.h).

Each instruction is recognised by its name and the shape of its operands. A statement with another instruction stays as it is,
and the compiler's error at its line then says that it is for a GPU.
"""

import re

from . import ptx_barriers
from .ptx_general import meaning
from .text import blank, closing

ASM = re.compile(r"\b(?:asm|__asm__)\b(?:\s*(?:volatile|__volatile__))?\s*\(")
LITERAL = re.compile(r'"((?:\\.|[^"\\])*)"')
LABEL = re.compile(r"\s*([A-Za-z_$][\w$]*)\s*:(?!:)\s*")
CONSTRAINT = re.compile(r'\s*"([^"]*)"\s*\((.*)\)\s*', re.DOTALL)
TOKEN = re.compile(r"%\w+(?:\.\w)?|[A-Za-z_]\w*|-?0[dDfFxX][0-9A-Fa-f]+|-?\d+(?:\.\d+)?")
VECTOR = {"tid": "threadIdx", "ctaid": "blockIdx", "ntid": "blockDim", "nctaid": "gridDim"}
THREAD = "((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x)"
SPECIAL = {
    "laneid": "cu_lane()", "warpid": f"({THREAD} / 32)", "lanemask_eq": "(1u << cu_lane())",
    "lanemask_lt": "((1u << cu_lane()) - 1u)", "lanemask_le": "((2u << cu_lane()) - 1u)",
    "clock": "(unsigned)cu_clock()", "clock64": "cu_clock()", "globaltimer": "cu_clock()",
    "lanemask_gt": "~((2u << cu_lane()) - 1u)", "lanemask_ge": "~((1u << cu_lane()) - 1u)",
}  # fmt: skip
REGISTER = {"64": "unsigned long long", "32": "unsigned", "16": "unsigned short", "f32": "float", "f64": "double",
            "pred": "bool"}  # fmt: skip

MMA = r"mma\.sync\.aligned\.(m16n8k(?:4|8|16|32))\.row\.col\.(f32|f16|s32)\.(f16|bf16|tf32|s8|u8)\.(f16|bf16|tf32|s8|u8)\.(f32|f16|s32)"
# (instruction, what it becomes). The groups of the pattern are \1, \2, ...; {0}, {1}, ... are its operands.
SIMPLE = [
    (r"cvta(?:\.to)?\.shared\.u64", "{0} = cu_to_shared((const void*){1})"),
    (r"cvta(?:\.to)?\.global\.u64", "{0} = (unsigned long long)(size_t)({1})"),
    (r"cvt\.rn(?:\.satfinite)?\.(f16|bf16)x2\.f32", r"{0} = cu_ptx_pack_\1({1}, {2})"),
    (r"cvt\.rna?\.tf32\.f32", "{0} = cu_ptx_to_tf32({1})"),
    (r"ex2\.approx(?:\.ftz)?\.f32", "{0} = exp2f({1})"),
    (r"lg2\.approx(?:\.ftz)?\.f32", "{0} = log2f({1})"),
    (r"rcp\.(?:approx|rn)(?:\.ftz)?\.f32", "{0} = 1.f / {1}"),
    (r"sqrt\.(?:approx|rn)(?:\.ftz)?\.f32", "{0} = sqrtf({1})"),
    (r"rsqrt\.approx(?:\.ftz)?\.f32", "{0} = cu_rsqrtf({1})"),
    (r"tanh\.approx\.f32", "{0} = tanhf({1})"),
    (r"sin\.approx(?:\.ftz)?\.f32", "{0} = sinf({1})"),
    (r"cos\.approx(?:\.ftz)?\.f32", "{0} = cosf({1})"),
    (r"bar(?:rier)?(?:\.cta)?\.sync(?:\.aligned)?", "__syncthreads()"),
    (r"bar\.warp\.sync", "__syncwarp({0})"),
    (r"cp\.async\.(?:ca|cg)\.shared(?:::cta)?\.global(?:\.L2::\w+)*", "cu_ptx_cp_async({all})"),
    (r"cp\.async\.commit_group", "__pipeline_commit()"),
    (r"cp\.async\.wait_group", "__pipeline_wait_prior({0})"),
    (r"cp\.async\.wait_all", "__pipeline_commit(), __pipeline_wait_prior(0)"),
    (r"ldmatrix\.sync\.aligned\.(?:m8n8\.x1|x1\.m8n8)\.shared(?:::cta)?\.b16", "cu_ptx_ldmatrix({1}, 1, false, __LINE__, &{0})"),
    (r"ldmatrix\.sync\.aligned\.(?:m8n8\.x2|x2\.m8n8)\.shared(?:::cta)?\.b16", "cu_ptx_ldmatrix({2}, 2, false, __LINE__, &{0}, &{1})"),
    (r"ldmatrix\.sync\.aligned\.(?:m8n8\.x4|x4\.m8n8)\.shared(?:::cta)?\.b16",
     "cu_ptx_ldmatrix({4}, 4, false, __LINE__, &{0}, &{1}, &{2}, &{3})"),
    (r"ldmatrix\.sync\.aligned\.(?:m8n8\.x1\.trans|x1\.trans\.m8n8)\.shared(?:::cta)?\.b16", "cu_ptx_ldmatrix({1}, 1, true, __LINE__, &{0})"),
    (r"ldmatrix\.sync\.aligned\.(?:m8n8\.x2\.trans|x2\.trans\.m8n8)\.shared(?:::cta)?\.b16",
     "cu_ptx_ldmatrix({2}, 2, true, __LINE__, &{0}, &{1})"),
    (r"ldmatrix\.sync\.aligned\.(?:m8n8\.x4\.trans|x4\.trans\.m8n8)\.shared(?:::cta)?\.b16",
     "cu_ptx_ldmatrix({4}, 4, true, __LINE__, &{0}, &{1}, &{2}, &{3})"),
]  # fmt: skip
# (shape, type of A and B) -> registers of A and of B
TILES = {
    ("m16n8k16", "f16"): (4, 2), ("m16n8k16", "bf16"): (4, 2), ("m16n8k8", "f16"): (2, 1), ("m16n8k8", "bf16"): (2, 1),
    ("m16n8k8", "tf32"): (4, 2), ("m16n8k4", "tf32"): (2, 1), ("m16n8k32", "s8"): (4, 2), ("m16n8k32", "u8"): (4, 2),
    ("m16n8k16", "s8"): (2, 1), ("m16n8k16", "u8"): (2, 1),
}  # fmt: skip


def translated(source):
    """The source with every known `asm` statement as C++; lines stay."""
    bare, edits = blank(source), []
    for match in ASM.finditer(bare):
        end = closing(bare, match.end() - 1)
        text = _statement(source[match.end() : end], bare[match.end() : end])
        if text is not None:
            in_macro = source[: match.start()].rsplit("\n", 1)[-1].lstrip().startswith("#") or _continued(
                source, match.start()
            )
            newline = "\\\n" if in_macro else "\n"
            edits.append((match.start(), end + 1, text + newline * source.count("\n", match.start(), end)))
    for start, end, text in reversed(edits):
        source = source[:start] + text + source[end:]
    return source


def _continued(source, position):
    """Whether a position stands in the lines of a `#define` that goes on over several."""
    start = source.rfind("\n", 0, position)
    return start > 0 and source[:start].endswith("\\")


def _statement(inner, bare):
    """`do { ... } while (0)` for what stands in the brackets of `asm`, or None."""
    colons, depth = [], 0
    for i, character in enumerate(bare):
        depth += (character in "([{") - (character in ")]}")
        if character == ":" and depth == 0:
            colons.append(i)
    bounds = [-1, *colons, len(bare)]
    sections = [(inner[a + 1 : b], bare[a + 1 : b]) for a, b in zip(bounds, bounds[1:])]
    template = "".join(m.group(1) for m in LITERAL.finditer(sections[0][0]))
    if re.sub(r"\\\n|\s", "", LITERAL.sub("", sections[0][0])):
        return None  # a template that a macro makes
    template = template.replace("\\n", "\n").replace("\\t", " ").replace('\\"', '"')
    operands = []  # as NVRTC, by number and not by name
    for text, blanked in sections[1:3]:
        for part in _split(text, blanked):
            match = CONSTRAINT.fullmatch(part.replace("\\\n", " "))
            if not match:
                return None
            operands.append(match.groups())
    body = _instructions(template, operands)
    return None if body is None else "do { " + " ".join(body) + " } while (0)"


def _split(text, blanked):
    parts, depth, start = [], 0, 0
    for i, character in enumerate(blanked):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in [*parts, text[start:]] if part.strip().replace("\\", "")]


def _instructions(template, operands):
    template = re.sub(r"//[^\n]*|/\*.*?\*/", " ", template, flags=re.DOTALL).strip()
    if template.startswith("{") and template.endswith("}") and ";" in template:
        template = template[1:-1]
    out, local, labels = [], set(), []
    for instruction in filter(None, (part.strip() for part in template.replace("%=", "").split(";"))):
        while label := LABEL.match(instruction):
            labels.append(f"cu_{label.group(1)}".replace("$", "_"))
            out.append(f"{labels[-1]}: ;")
            instruction = instruction[label.end() :]
        if not instruction:
            continue
        if declared := re.fullmatch(r"\.reg\s+\.(?:[bus](16|32|64)|(f32|f64|pred))\s+([\w,\s]+)", instruction):
            variables = [name.strip() for name in declared.group(3).split(",")]
            local |= set(variables)
            out.append(f"{REGISTER[declared.group(1) or declared.group(2)]} {', '.join(variables)};")
            continue
        guard = re.match(r"@(!?)\s*(\w+)\s+", instruction)
        if guard and guard.group(2) not in local:
            return None
        bare = instruction[guard.end() :] if guard else instruction
        if branch := re.fullmatch(r"bra(?:\.uni)?\s+([\w$]+)", bare):
            text = f"goto cu_{branch.group(1)}".replace("$", "_")
        else:
            text = _instruction(bare, operands, local)
        if text is None:
            return None
        out.append(f"if ({guard.group(1)}{guard.group(2)}) {{ {text}; }}" if guard else text + ";")
    if any(goto not in labels for goto in re.findall(r"goto (\w+)", " ".join(out))):
        return None
    return [*([f"__label__ {', '.join(labels)};"] if labels else []), *out] or ["(void)0;"]


def _instruction(instruction, operands, local):
    name, rest = re.fullmatch(r"(\S*)\s*(.*)", instruction, re.DOTALL).groups()
    given = []
    for token in TOKEN.finditer(re.sub(r"\s+", " ", rest)):
        value = _operand(token.group(), operands, local)
        if value is None:
            return None
        before = rest[: token.start()].rstrip()
        if before.endswith("+") and given:
            given[-1] = f"cu_ptx_plus({given[-1]}, {value})"
        else:
            given.append(value)
    if mma := re.fullmatch(MMA, name):
        return _mma(mma, given)
    if name.startswith("bar") and len(given) > 1 and not name.startswith("bar.warp"):
        return None  # a barrier of some of the warps
    if "L2::cache_hint" in name:  # its policy is for the cache
        name, given = name.replace(".L2::cache_hint", ""), given[:-1]
    for pattern, call in SIMPLE:
        if match := re.fullmatch(pattern, name):
            try:
                return match.expand(call).replace("{all}", ", ".join(given)).format(*given)
            except IndexError:
                return None
    return ptx_barriers.meaning(name, given, rest) or meaning(name, given, rest)


def _operand(token, operands, local):
    if token == "_":  # for a value that nobody wants
        return token
    if token.startswith("%%"):
        token = token[1:]
    if numbered := re.fullmatch(r"%(\w+)", token):
        key = numbered.group(1)
        if key.isdigit() and int(key) < len(operands):
            constraint, expression = operands[int(key)]
            return (
                expression if constraint.lstrip("=+&") != "n" and re.match(r"[=+]", constraint) else f"({expression})"
            )
        return SPECIAL.get(key)
    if special := re.fullmatch(r"%(\w+)\.(\w)", token):
        return f"{VECTOR[special.group(1)]}.{special.group(2)}" if special.group(1) in VECTOR else None
    if bits := re.fullmatch(r"0([fFdD])([0-9A-Fa-f]+)", token):
        return f"cu_bits<{'float' if bits.group(1) in 'fF' else 'double'}>(0x{bits.group(2)}{'u' if bits.group(1) in 'fF' else 'ull'})"
    return token if token in local or re.fullmatch(r"-?(?:0[xX][0-9A-Fa-f]+|\d+(?:\.\d+)?)", token) else None


def _mma(match, given):
    shape, d_type, a_type, b_type, c_type = match.groups()
    if (shape, a_type) not in TILES or a_type != b_type or d_type != c_type:
        return None
    if (d_type == "s32") != (a_type in ("s8", "u8")) or (d_type == "f16" and a_type != "f16"):
        return None
    n_a, n_b = TILES[shape, a_type]
    n_d = 2 if d_type == "f16" else 4
    if len(given) != 2 * n_d + n_a + n_b:
        return None
    d, a, b, c = (
        given[i:j] for i, j in ((0, n_d), (n_d, n_d + n_a), (n_d + n_a, n_d + n_a + n_b), (n_d + n_a + n_b, None))
    )
    type_ = {"f32": "float", "f16": "unsigned", "s32": "int"}[d_type]
    k = int(shape[6:])
    return (
        f"{{ const unsigned cu_a[] = {{{', '.join(f'cu_ptx_bits({x})' for x in a)}}}, "
        f"cu_b[] = {{{', '.join(f'cu_ptx_bits({x})' for x in b)}}}; {type_} cu_d[] = {{{', '.join(f'({type_})({x})' for x in c)}}}; "
        f"cu_ptx_mma_{d_type}<cu_ptx_{a_type}, {k}>(cu_a, cu_b, cu_d, __LINE__); "
        + " ".join(f"{x} = cu_d[{i}];" for i, x in enumerate(d))
        + " }"
    )
