"""The runner on other systems: compiled for each with ziglang, run under Wine and QEMU where they are installed.

This goes through the same code as a launch here (utils/cuda/cpu/toolchain.py), told that it is on the other platform; only
the worker is replaced, by tests/platforms/host.c. A Mac cannot be emulated: there it stops at the finished library.
"""

import functools
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.cuda.both import CASES
from utils.cuda import problems
from utils.cuda.cpu import assembly, toolchain
from utils.cuda.source import choose_kernel, for_cpu, instance

HERE = Path(__file__).resolve().parent
WINE = shutil.which("wine64") or shutil.which("wine") or next(
    (path for path in ("/usr/lib/wine/wine64",) if os.access(path, os.X_OK)), None)  # fmt: skip
QEMU, ARM_LIBRARIES = shutil.which("qemu-aarch64"), Path("/usr/aarch64-linux-gnu")


@dataclass(frozen=True)
class Platform:
    """A target of zig, what Python calls it, how its libraries begin, and what runs its programs here."""

    target: str
    python_name: str
    magic: bytes
    emulator: tuple = ()
    missing: str = ""


PLATFORMS = {
    "Windows x86-64": Platform("x86_64-windows-gnu", "win32", b"MZ", (WINE,),
                               "" if WINE else "Wine is not installed (Debian: wine64)"),
    "Linux ARM64": Platform("aarch64-linux-gnu", "linux", b"\x7fELF", (QEMU, "-L", str(ARM_LIBRARIES)),
                            "" if QEMU and ARM_LIBRARIES.exists() else
                            "QEMU or ARM64 libraries are not installed (Debian: qemu-user, libc6-arm64-cross)"),
    "macOS ARM64": Platform("aarch64-macos", "darwin", b"\xcf\xfa\xed\xfe", missing="a Mac cannot be emulated here"),
    "macOS x86-64": Platform("x86_64-macos", "darwin", b"\xcf\xfa\xed\xfe", missing="a Mac cannot be emulated here"),
}  # fmt: skip
RACE = """__global__ void reverse(float* x) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = s[63 - threadIdx.x];
}"""

pytestmark = pytest.mark.skipif(toolchain.zig_command() is None, reason="ziglang is not installed")


@pytest.fixture
def elsewhere(monkeypatch, request):
    """The toolchain believes that it is on the platform; returns the platform and its compiler."""
    platform, zig = PLATFORMS[request.param], toolchain.zig_command()
    monkeypatch.setattr(toolchain, "sys", SimpleNamespace(platform=platform.python_name))
    monkeypatch.setattr(
        toolchain, "LIBRARY_SUFFIX", {"win32": ".dll", "darwin": ".dylib"}.get(platform.python_name, ".so")
    )
    monkeypatch.setattr(
        toolchain, "label_places", functools.partial(assembly.label_places, platform=platform.python_name)
    )
    return platform, toolchain.Compiler((*zig, "-target", platform.target), is_clang=True, is_zig=True)


def as_cpp(source, template=(), checked=True):
    """What utils/cuda/binary.py hands to the compiler."""
    name = instance(choose_kernel(source, None), template)
    return "\n".join(['#include "cuda_on_cpu.h"', '#line 1 "kernel.cu"', for_cpu(source, checked),
                      f'#line 1 "entry of {name}"', f"CU_ENTRY({name})", ""])  # fmt: skip


def build(elsewhere, folder, source, template, checked):
    platform, compiler = elsewhere
    library = folder / ("kernel" + toolchain.LIBRARY_SUFFIX)
    places, _ = toolchain.build(compiler, as_cpp(source, template, checked), source, checked, library)
    assert library.read_bytes().startswith(platform.magic)
    return library, [line for line, _ in places]


def run(elsewhere, folder, library, checked, grid, block, shared, arguments):
    """Run the library under the platform's emulator. Returns the problems' bytes, the places' offsets, the last array."""
    platform, compiler = elsewhere
    host = folder / "host.exe"
    zig, _, *target = compiler.command
    as_c = toolchain.Compiler((zig, "cc", *target), is_clang=True, is_zig=True)  # "c++" would build a C++ library first
    toolchain.run(as_c, [HERE / "platforms/host.c", "-O1", "-o", host])
    grid, block = ((*(size if isinstance(size, tuple) else (size,)), 1, 1)[:3] for size in (grid, block))
    request = struct.pack("=9q", int(checked), *grid, *block, shared, len(arguments))
    for argument in arguments:
        array = isinstance(argument, np.ndarray)
        value = (
            argument
            if hasattr(argument, "tobytes")
            else np.array(argument, np.int32 if type(argument) is int else "f4")
        )
        request += struct.pack("=3q", array, value.itemsize, value.nbytes) + value.tobytes()
    (folder / "request").write_bytes(request)
    environment = {**os.environ, "WINEPREFIX": str(folder / "wine"), "WINEDEBUG": "-all", "DISPLAY": ""}
    done = subprocess.run([*platform.emulator, str(host), str(library), "request", "reply"], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    reply = (folder / "reply").read_bytes()
    (count,) = struct.unpack_from("=q", reply)
    found, at = reply[8 : 8 + 176 * count], 8 + 176 * count
    offsets = ()
    if checked:
        (places,) = struct.unpack_from("=q", reply, at)
        offsets, at = struct.unpack_from(f"={places}I", reply, at + 8), at + 8 + 4 * places
    last = arguments[-1]
    return found, offsets, np.frombuffer(reply[len(reply) - last.nbytes :], last.dtype).reshape(last.shape)


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", ["macOS ARM64"], indirect=True)  # the first link for a target takes zig a minute
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "plain"])
def test_a_kernel_becomes_a_library_for_a_mac(elsewhere, checked, tmp_path):
    case = CASES["flash attention, 66 KB of shared memory"]
    library, lines = build(elsewhere, tmp_path, case.source, case.template, checked)
    content = library.read_bytes()
    assert b"_cu_run" in content
    assert b"_cu_entry" in content
    assert bool(lines) == checked


@pytest.mark.parametrize("elsewhere", PLATFORMS, indirect=True)
def test_the_runtime_and_a_kernel_compile_for_the_platform(elsewhere, tmp_path):
    _, compiler = elsewhere
    (tmp_path / "kernel.cpp").write_text(as_cpp(RACE), encoding="utf-8")
    assembled = tmp_path / "kernel.s"
    toolchain.run(
        compiler, [*toolchain.kernel_flags(compiler, True), "-S", tmp_path / "kernel.cpp", "-o", assembled], RACE
    )
    labelled, places = toolchain.label_places(assembled.read_text(encoding="utf-8"))
    assembled.write_text(labelled, encoding="utf-8")
    toolchain.run(compiler, ["-c", assembled, "-o", tmp_path / "kernel.o"])
    assert {3, 4} <= {line for line, _ in places}
    assert toolchain.build_runtime(compiler, True, tmp_path).stat().st_size > 0


RUNNABLE = [pytest.param(name, marks=pytest.mark.skipif(bool(PLATFORMS[name].missing), reason=PLATFORMS[name].missing))
            for name in PLATFORMS]  # fmt: skip


@pytest.mark.parametrize("elsewhere", RUNNABLE, indirect=True)
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "plain"])
def test_the_platform_computes_what_numpy_computes(elsewhere, checked, tmp_path):
    for name in (
        "flash attention, 66 KB of shared memory",
        "cp.async, two buffers",
        "a struct by value, constant memory",
    ):
        case = CASES[name]
        arguments = case.arguments(np.random.default_rng(0))
        folder = tmp_path / name.split()[0]
        folder.mkdir()
        library, _ = build(elsewhere, folder, case.source, case.template, checked)
        found, _, result = run(elsewhere, folder, library, checked, case.grid, case.block, case.shared, arguments)
        assert found == b""
        np.testing.assert_allclose(result, case.expected(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("elsewhere", RUNNABLE, indirect=True)
def test_the_platform_reports_a_race_at_its_lines(elsewhere, tmp_path):
    library, lines = build(elsewhere, tmp_path, RACE, (), checked=True)
    found, offsets, _ = run(elsewhere, tmp_path, library, True, 1, 64, 0, (np.arange(64, dtype=np.float32),))
    line_of = dict(zip(offsets, lines))
    records = map(problems.Record._make, problems.RECORD.iter_unpack(found))
    races = [{line_of[r.place1], line_of[r.place2]} for r in records if problems.KINDS[r.kind] == "race"]
    assert {3, 4} in races
    assert all(pair == {3, 4} for pair in races)
