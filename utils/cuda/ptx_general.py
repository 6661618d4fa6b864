"""PTX that is not about tensor cores: arithmetic of registers, predicates, loads and stores, atomics, votes and shuffles.

`meaning(name, given, rest)` is the C++ of one instruction, or None if it is not known. Registers are bits: an operand is read
as the instruction's type (`cu_ptx_get`) and written as the register's own (`cu_ptx_put`), as `mov.b32` of a float shows.
"""

import re

TYPES = {
    **{f"{letter}{bits}": c for bits, c in ((8, "unsigned char"), (16, "unsigned short"), (32, "unsigned"),
                                            (64, "unsigned long long")) for letter in "ub"},
    "s8": "signed char", "s16": "short", "s32": "int", "s64": "long long", "f32": "float", "f64": "double",
}  # fmt: skip
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
TYPE = r"([busf](?:8|16|32|64))"
WHOLE = r"([bus](?:16|32|64))"
# An instruction; what it gives, of its type T, from its operands {1}, {2}, ... which are read as T.
VALUES = [
    (rf"mov\.{TYPE}", "{1}"),
    (rf"add(?:\.rn)?(?:\.ftz)?\.{TYPE}", "{1} + {2}"),
    (rf"sub(?:\.rn)?(?:\.ftz)?\.{TYPE}", "{1} - {2}"),
    (rf"mul\.lo\.{WHOLE}", "{1} * {2}"),
    (r"mul(?:\.rn)?(?:\.ftz)?\.(f32|f64)", "{1} * {2}"),
    (rf"mad\.lo\.{WHOLE}", "{1} * {2} + {3}"),
    (r"(?:fma\.rn|mad(?:\.rn)?)(?:\.ftz)?\.(f32)", "fmaf({1}, {2}, {3})"),
    (r"fma\.rn\.(f64)", "fma({1}, {2}, {3})"),
    (r"div(?:\.(?:rn|approx|full))?(?:\.ftz)?\.(f32|f64)", "{1} / {2}"),
    (r"mul\.hi\.(u32)", "__umulhi({1}, {2})"),
    (r"mul\.hi\.(s32)", "__mulhi({1}, {2})"),
    (rf"min(?:\.ftz)?\.{TYPE}", "min({1}, {2})"),
    (rf"max(?:\.ftz)?\.{TYPE}", "max({1}, {2})"),
    (rf"neg(?:\.ftz)?\.{TYPE}", "-{1}"),
    (r"abs(?:\.ftz)?\.(s32|f32)", "abs({1})"),
    (rf"and\.{WHOLE}", "{1} & {2}"),
    (rf"or\.{WHOLE}", "{1} | {2}"),
    (rf"xor\.{WHOLE}", "{1} ^ {2}"),
    (rf"not\.{WHOLE}", "~{1}"),
    (r"lop3\.(b32)", "cu_ptx_lop3({1}, {2}, {3}, {4})"),
    (r"prmt\.(b32)", "__byte_perm({1}, {2}, {3})"),
    (r"brev\.(b32)", "__brev({1})"),
    (r"popc\.(b32)", "(unsigned)__popc({1})"),
    (r"clz\.(b32)", "(unsigned)__clz((int){1})"),
    (r"bfe\.(u32|s32)", "cu_ptx_bfe({1}, {2}, {3})"),
    (r"bfi\.(b32)", "cu_ptx_bfi({1}, {2}, {3}, {4})"),
    (r"shf\.l\.(?:wrap)\.(b32)", "__funnelshift_l({1}, {2}, {3})"),
    (r"shf\.r\.(?:wrap)\.(b32)", "__funnelshift_r({1}, {2}, {3})"),
    (r"dp4a\.s32\.(s32)", "__dp4a({1}, {2}, {3})"),
    (r"dp4a\.u32\.(u32)", "__dp4a({1}, {2}, {3})"),
    (r"activemask\.(b32)", "__activemask()"),
    (r"vote\.sync\.ballot\.(b32)", "__ballot_sync({2}, {1})"),
    (r"redux\.sync\.add\.(u32|s32)", "__reduce_add_sync((unsigned){2}, {1})"),
    (r"redux\.sync\.min\.(u32|s32)", "__reduce_min_sync((unsigned){2}, {1})"),
    (r"redux\.sync\.max\.(u32|s32)", "__reduce_max_sync((unsigned){2}, {1})"),
    (r"createpolicy\.fractional\.L2::\w+\.(b64)", "0"),
]
PAIRS = {"add": "__hadd2", "sub": "__hsub2", "mul": "__hmul2", "min": "__hmin2", "max": "__hmax2", "fma": "__hfma2"}
ROUNDINGS = {"rn": "rn", "rni": "rn", "rz": "rz", "rzi": "rz", "rmi": "rd", "rpi": "ru", "rm": "rd", "rp": "ru"}
ATOMICS = {"add": "Add", "min": "Min", "max": "Max", "and": "And", "or": "Or", "xor": "Xor", "exch": "Exch", "cas": "CAS",
           "inc": "Inc", "dec": "Dec"}  # fmt: skip
NOTHING = re.compile(r"(?:prefetch|applypriority|discard|nanosleep|fence\.proxy)\b.*")
FENCE = re.compile(r"membar\.(?:gl|cta|sys)|fence(?:\.(?:acq_rel|sc|acquire|release))?\.(gpu|cta|sys)")
MEMORY = re.compile(rf"(ld|st)((?:\.[\w:]+)*?)(?:\.v([24]))?\.{TYPE[:-1]})")
ATOMIC = re.compile(rf"(atom|red)((?:\.[\w:]+)*?)\.({'|'.join(ATOMICS)})(?:\.noftz)?\.{TYPE}")
ORDERED = {"volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"}
HINTS = {"weak", "gpu", "cta", "sys", "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt"} | ORDERED
SPACES = {"global", "shared", "shared::cta"}


def meaning(name, given, rest):
    """The C++ of `name rest`, whose operands are `given`, or None."""
    if NOTHING.fullmatch(name):
        return "(void)0"
    if fence := FENCE.fullmatch(name):
        return "__threadfence_block()" if fence.group(1) == "cta" or name == "membar.cta" else "__threadfence()"
    for read in (_pack, _convert, _compare, _select, _shift, _wide, _pairs, _shuffle, _memory, _atomic, _value):
        if text := read(name, given, rest):
            return text
    return None


def _get(type_, operand):
    return f"cu_ptx_get<{TYPES.get(type_, type_)}>({operand})"


def _put(operand, value):
    return f"cu_ptx_put({operand}, {value})"


def _value(name, given, _):
    for pattern, text in VALUES:
        if match := re.fullmatch(pattern, name):
            wanted = max((int(n) for n in re.findall(r"{(\d)}", text)), default=0)
            if len(given) <= wanted or (wanted and len(given) != wanted + 1):
                return None
            type_ = TYPES[match.group(1)]
            return _put(given[0], f"({type_})({text.format(*(_get(type_, operand) for operand in given))})")
    return None


def _pack(name, given, rest):
    """`mov.b64 %0, {%1, %2}` and back; `mov.b32` of two halves."""
    if name not in ("mov.b64", "mov.b32") or len(given) != 3:
        return None
    half = {"mov.b64": "unsigned", "mov.b32": "unsigned short"}[name]
    whole = {"mov.b64": "unsigned long long", "mov.b32": "unsigned"}[name]
    bits = {"mov.b64": 32, "mov.b32": 16}[name]
    if rest.lstrip().startswith("{"):
        return f"{{ {whole} cu_w = {_get(whole, given[2])}; {_put(given[0], f'({half})cu_w')}; {_put(given[1], f'({half})(cu_w >> {bits})')}; }}"
    return _put(given[0], f"({whole})({_get(half, given[1])} | ({whole}){_get(half, given[2])} << {bits})")


def _compare(name, given, _):
    match = re.fullmatch(rf"setp\.(\w\w)(?:\.ftz)?\.{TYPE}", name)
    if not match or match.group(1) not in COMPARE or len(given) != 3:
        return None
    return f"{given[0]} = {_get(match.group(2), given[1])} {COMPARE[match.group(1)]} {_get(match.group(2), given[2])}"


def _select(name, given, _):
    match = re.fullmatch(rf"selp\.{TYPE}", name)
    if not match or len(given) != 4:
        return None
    return _put(given[0], f"({given[3]} ? {_get(match.group(1), given[1])} : {_get(match.group(1), given[2])})")


def _shift(name, given, _):
    match = re.fullmatch(rf"sh([lr])\.{WHOLE}", name)
    if not match or len(given) != 3:
        return None
    return _put(given[0], f"cu_ptx_sh{match.group(1)}({_get(match.group(2), given[1])}, {_get('u32', given[2])})")


def _wide(name, given, _):
    match = re.fullmatch(r"(mul|mad)\.wide\.([us](?:16|32))", name)
    if not match or len(given) != {"mul": 3, "mad": 4}[match.group(1)]:
        return None
    wide, narrow = TYPES[WIDE[match.group(2)]], match.group(2)
    product = f"({wide}){_get(narrow, given[1])} * ({wide}){_get(narrow, given[2])}"
    return _put(given[0], f"({wide})({product}{f' + {_get(wide, given[3])}' if match.group(1) == 'mad' else ''})")


def _convert(name, given, _):
    """Between floats, halves and whole numbers."""
    match = re.fullmatch(r"cvt(?:\.(rn|rz|rni|rzi|rmi|rpi|rm|rp))?(?:\.ftz)?(\.sat)?\.(\w+)\.(\w+)", name)
    if not match or len(given) != 2:
        return None
    rounding, saturate, to, from_ = match.groups()
    half = {"f16": "__half", "bf16": "__nv_bfloat16"}
    value = _get(half.get(from_, from_), given[1])
    if saturate:
        return _put(given[0], f"__saturatef({value})") if (to, from_) == ("f32", "f32") else None
    if to in half and from_ == "f32" and rounding in ("rn", "rz"):
        return _put(given[0], f"{'__float2half' if to == 'f16' else '__float2bfloat16'}_{rounding}({value})")
    if from_ in half and to == "f32":
        return _put(given[0], f"{'__half2float' if from_ == 'f16' else '__bfloat162float'}({value})")
    if to in ("s32", "u32") and from_ == "f32" and rounding:
        return _put(given[0], f"__float2{'int' if to == 's32' else 'uint'}_{ROUNDINGS[rounding]}({value})")
    if to == "f32" and from_ in ("s32", "u32") and rounding in ("rn", "rz"):
        return _put(given[0], f"__{'int' if from_ == 's32' else 'uint'}2float_{rounding}({value})")
    if to in TYPES and from_ in TYPES and not rounding and to != "f32" and from_[0] != "f":
        return _put(given[0], f"({TYPES[to]}){value}")
    return _put(given[0], f"({TYPES[to]}){value}") if {to, from_} == {"f32", "f64"} else None


def _pairs(name, given, _):
    match = re.fullmatch(r"(\w+?)(?:\.rn)?\.(f16|bf16)x2", name)
    if not match or match.group(1) not in PAIRS or len(given) != (4 if match.group(1) == "fma" else 3):
        return None
    type_ = "__half2" if match.group(2) == "f16" else "__nv_bfloat162"
    return _put(given[0], f"{PAIRS[match.group(1)]}({', '.join(_get(type_, operand) for operand in given[1:])})")


def _shuffle(name, given, rest):
    match = re.fullmatch(r"shfl\.sync\.(bfly|down|up|idx)\.b32", name)
    if (
        not match
        or len(given) != 5
        or "|" in rest
        or re.sub(r"[()\s]", "", given[3]) not in ("31", "0x1f", "0x1F", "0")
    ):
        return None
    if (re.sub(r"[()\s]", "", given[3]) == "0") != (match.group(1) == "up"):
        return None  # a shuffle inside segments
    function = {"bfly": "__shfl_xor_sync", "down": "__shfl_down_sync", "up": "__shfl_up_sync", "idx": "__shfl_sync"}
    return _put(
        given[0],
        f"{function[match.group(1)]}({_get('u32', given[4])}, {_get('u32', given[1])}, {_get('s32', given[2])})",
    )


def _place(words):
    """Of `.global.acquire.gpu`: the space that is meant, "" for any, and the hints; None if a word is not known."""
    words = [word for word in words.split(".") if word]
    spaces = [word for word in words if word in SPACES]
    hints = {word for word in words if word not in SPACES}
    if len(spaces) > 1 or any(word not in HINTS and not re.match(r"L[12]::(?!cache_hint)", word) for word in hints):
        return None
    return (spaces[0] if spaces else ""), hints


def _pointer(space, operand):
    return f"cu_shared_pointer({operand})" if space.startswith("shared") else f"cu_ptx_pointer({operand})"


def _memory(name, given, _):
    """Loads and stores of one, two or four values: one access each, as of the vector."""
    match = MEMORY.fullmatch(name)
    place = match and _place(match.group(2))
    if not place:
        return None
    (space, hints), count, type_ = place, int(match.group(3) or 1), TYPES[match.group(4)]
    if len(given) != count + 1:
        return None
    ordered = bool(hints & ORDERED)
    array = f"{type_} cu_v[{count}]"
    if match.group(1) == "ld":
        puts = " ".join(f"{_put(operand, f'cu_v[{i}]')};" for i, operand in enumerate(given[:count]))
        return f"{{ {array}; cu_ptx_access(cu_v, {_pointer(space, given[count])}, sizeof cu_v, 0, {int(ordered)}); {puts} }}"
    values = ", ".join(_get(type_, operand) for operand in given[1:])
    fence = "__threadfence(); " if hints & {"release", "acq_rel"} else ""
    return f"{{ {array} = {{{values}}}; {fence}cu_ptx_access(cu_v, {_pointer(space, given[0])}, sizeof cu_v, 1, {int(ordered)}); }}"


def _atomic(name, given, _):
    match = ATOMIC.fullmatch(name)
    place = match and _place(match.group(2))
    returns = bool(match) and match.group(1) == "atom"
    if not place or len(given) != returns + 2 + (match.group(3) == "cas"):
        return None
    (space, hints), operation, type_ = place, match.group(3), match.group(4)
    c_type = TYPES[{"s64": "u64"}.get(type_, type_) if operation == "add" else type_]
    if type_ in ("f32", "f64") and operation not in ("add", "exch") or type_[1:] in ("8", "16"):
        return None
    pointer, *values = given[returns:]
    call = f"atomic{ATOMICS[operation]}(({c_type}*){_pointer(space, pointer)}, {', '.join(_get(c_type, v) for v in values)})"
    call = f"(__threadfence(), {call})" if hints & {"release", "acq_rel"} else call
    return _put(given[0], call) if returns else f"(void){call}"
