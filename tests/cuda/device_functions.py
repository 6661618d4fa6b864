"""CUDA's own device functions, and which of them the CPU has: `python -m tests.cuda.device_functions` writes the table.

The names and parameters are read from the headers of nvidia-cuda-runtime. What NVRTC takes is a device function; of these the
CPU has those that its header compiles.
"""

import re
import subprocess
import tempfile
import warnings
from pathlib import Path

from cuda import pathfinder
from cuda.core import Program, ProgramOptions

from utils.cuda.binary import OPTIONAL
from utils.cuda.cpu import toolchain
from utils.paths import ROOT

TABLE = ROOT / "utils/cuda/FUNCTIONS.md"
HEADERS = {
    "Mathematics": ("crt/math_functions.h",),
    "Integers, conversions, rounding": (
        "crt/device_functions.h",
        "crt/device_double_functions.h",
        "sm_20_intrinsics.h",
        "sm_32_intrinsics.h",
        "sm_61_intrinsics.h",
    ),
    "Warps": ("sm_30_intrinsics.h", "crt/sm_70_rt.h", "crt/sm_80_rt.h"),
    "Atomics": (
        "device_atomic_functions.h",
        "sm_20_atomic_functions.h",
        "sm_32_atomic_functions.h",
        "sm_60_atomic_functions.h",
    ),
    "half": ("cuda_fp16.h",),
    "bfloat16": ("cuda_bf16.h",),
}
NUMBER = r"(?:unsigned|signed|char|short|int|long|float|double|bool|size_t|(?:__half|__nv_bfloat16)2?(?:_raw)?|(?:float|double|u?int|u?short|u?char|u?long|u?longlong)[234])"
TYPE = rf"(?:const\s+)?{NUMBER}(?:\s+{NUMBER})*(?:\s+const)?[\s*]*(?:const\s*)?"
DECLARATION = re.compile(rf"(?:^|[\s_]){TYPE}\s*\b([A-Za-z_]\w*)\s*\(([^(){{}};]*)\)[^;{{}}=]*[;{{]")
PARAMETER = re.compile(rf"({TYPE})\s*(?:\b(?:__restrict__\s*)?\w+)?(?:\s*=.*)?")
NOT_FOR_KERNELS = re.compile(
    r"short|int|long|char|ballot|all|any|syncthreads_\w+|__(?:finite|isinf|isnan|signbit)[fl]?|_[A-Za-z]\w*_impl|__nv_\w+|__cuda\w+|__builtin\w+|_[A-Z]\w*|operator|if|return"
)


def signatures(include):
    """{group: sorted [(name, (parameter type, ...)), ...]} of the headers in a folder."""
    found = {}
    for group, headers in HEADERS.items():
        entries = set()
        for header in headers:
            text = re.sub(r"/\*.*?\*/|//[^\n]*", "", (include / header).read_text(errors="replace"), flags=re.DOTALL)
            text = re.sub(r"^[ \t]*#(?:[^\n\\]|\\\n|\\.)*", ";", text, flags=re.MULTILINE)
            text = text.replace("__DEF_IF_HOST", ";")
            for name, given in DECLARATION.findall(text):
                matches = [PARAMETER.fullmatch(part.strip()) for part in given.split(",") if part.strip() != "void"]
                if given.strip() == "" or all(matches):
                    types = tuple(" ".join(m.group(1).split()) for m in matches if m)
                    if not NOT_FOR_KERNELS.fullmatch(name):
                        entries.add((name, types))
        found[group] = sorted(entries)
    return found


def calls(entries):
    """A function on each line that calls one of them."""
    lines = []
    for number, (name, types) in enumerate(entries):
        parameters = ", ".join(f"{type_} a{i}" for i, type_ in enumerate(types))
        arguments = ", ".join(f"a{i}" for i in range(len(types)))
        lines.append(f"__device__ void use_{number}({parameters}) {{ (void){name}({arguments}); }}")
    return "\n".join(lines)


def known_to_nvrtc(entries):
    text, include = calls(entries), str(headers_of_cuda())
    before = '#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n#line 1 "calls"\n'
    wrong = set()
    for _ in range(20):
        left = "\n".join("" if n in wrong else line for n, line in enumerate(text.split("\n"), 1))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                options = ProgramOptions(name="calls", arch="sm_90", std="c++17", include_path=[include])
                Program(before + left, "c++", options).compile("cubin")
            break
        except Exception as error:  # noqa: BLE001 (cuda.core's own error class is not public)
            new = {int(line) for line in re.findall(r"^calls\((\d+)\): error", str(error), re.MULTILINE)}
            if not new - wrong:
                raise
            wrong |= new
    return [entry for number, entry in enumerate(entries, 1) if number not in wrong]


def known_to_cpu(entries):
    compiler = toolchain.find_compiler()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calls.cpp"
        parts = "".join(f"#define {part}\n" for part in OPTIONAL)
        file.write_text(f'{parts}#include "cuda_on_cpu.h"\n#line 1 "calls"\n' + calls(entries))
        options = [*toolchain.common_flags(compiler), "-fsyntax-only", "-fmax-errors=0"]
        done = subprocess.run([*compiler.command, *options, file], capture_output=True, text=True, check=False)
    elsewhere = re.findall(r"^(?!calls:)[^\s:]+:\d+:\d+: error.*", done.stderr, re.MULTILINE)
    assert not elsewhere, elsewhere[:3]
    wrong = {int(line) for line in re.findall(r"^calls:(\d+):\d+: error", done.stderr, re.MULTILINE)}
    return [entry for number, entry in enumerate(entries, 1) if number not in wrong]


def headers_of_cuda():
    """The folder of nvidia-cuda-runtime's headers, or None."""
    located = pathfinder.locate_nvidia_header_directory("cudart")
    return Path(located.abs_path) if located else None


def groups():
    """[(group, entries that the CPU has, entries that only a GPU has)], of what NVRTC takes."""
    out = []
    for group, entries in signatures(headers_of_cuda()).items():
        entries = known_to_nvrtc(entries)
        here = set(known_to_cpu(entries))
        out.append((group, [e for e in entries if e in here], [e for e in entries if e not in here]))
    return out


def table():
    """FUNCTIONS.md as text."""
    lines = [
        "# CUDA's device functions on the CPU",
        "",
        "Made by `python -m tests.cuda.device_functions` from the headers of nvidia-cuda-runtime and from what NVRTC takes",
        'for sm_90. A name stands under "only on a GPU" if one of its overloads is missing here.',
    ]
    for group, here, only in groups():
        missing = sorted({name for name, _ in only})
        names = sorted({name for name, _ in here} - set(missing))
        lines += ["", f"## {group}: {len(names)} of {len(names) + len(missing)}", ""]
        lines += [f"On the CPU: {_listed(names)}", "", f"Only on a GPU: {_listed(missing) or 'none'}"]
    return "\n".join(lines) + "\n"


def _listed(names):
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
