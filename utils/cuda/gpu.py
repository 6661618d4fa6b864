"""Compile a kernel for a real GPU with NVRTC, and launch it on CUDA tensors.

The learner's source is the same as on the CPU, and so are the checks of the arguments. Compiling needs no GPU: that is how
every kernel of the course is checked for real architectures. A launch goes to PyTorch's current stream and copies nothing.
"""

import ctypes
import functools
import re
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

from cuda import pathfinder
from cuda.bindings import driver, nvrtc
from cuda.core import ObjectCode, Program, ProgramOptions

from . import arguments as args
from .launch import KernelError
from .source import CompileError, point_at, without_host_includes

_BEFORE = Path(__file__).with_name("gpu_before.h").read_text(encoding="utf-8") + '#line 1 "kernel.cu"\n'
# The table of gpu_before.h for one kernel; its first bytes find it in the binary.
_AFTER = """
#line 1 "signature"
extern "C" __device__ course_signature::table<decltype(&%(kernel)s)> course_signature_table =
    course_signature::table<decltype(&%(kernel)s)>::make();
"""
_MARK = b"kernel signature"

_NVRTC_ERROR = re.compile(r"(?P<file>.+?)\((?P<line>\d+)\): (?:catastrophic )?error: (?P<message>.*)")


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for one architecture. `signature` describes the arguments as `utils.cuda.compile.Build` does."""

    name: str
    object_code: ObjectCode
    signature: tuple

    @property
    def cubin(self):
        """The machine code, as the bytes of an ELF file."""
        return self.object_code.code


@functools.cache
def compile_for(source, name, arch="sm_90"):
    """Compile one kernel for a real architecture; no GPU is needed.

    source: CUDA C++ text. name: the kernel, with its template arguments: "flash_fwd<64>". arch: "sm_80", "sm_90a", ...
    Returns a Binary. Raises CompileError, which points at the source's line.
    """
    options = ProgramOptions(name="kernel.cu", arch=arch, std="c++17", lineinfo=True, **_headers())
    text = _BEFORE + without_host_includes(source) + _AFTER % {"kernel": name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cuda.core warns when it meets no driver; compiling does not want one
        try:
            code = Program(text, "c++", options).compile("cubin", name_expressions=[name])
        except Exception as error:  # noqa: BLE001 (cuda.core's own error class is not public)
            raise CompileError(_readable(str(error), source, name, arch)) from None
    return Binary(name, code, _read_signature(code.code))


def launch(kernel, grid, block, shared_bytes, arguments):
    """Run a kernel on the GPU that holds its tensors, on PyTorch's current stream of that GPU. Returns at once.

    kernel: a `utils.cuda.Kernel`. grid, block: three sizes each, in range. shared_bytes: dynamic shared memory of a block;
    above 48 KB the opt-in is set here. arguments: CUDA tensors, None for a null pointer, numbers, structs.

    Raises TypeError and ValueError for arguments as on the CPU, CompileError, and KernelError if the GPU refuses the
    launch. What a kernel does wrong while it runs shows up at the next synchronisation, as PyTorch's error; run it on CPU
    tensors to be told what and where.
    """
    import torch

    device = _device_of(kernel, arguments)
    with torch.cuda.device(device):
        loaded = _load(kernel.source, kernel.name, _arch(device))
        values = [_c_value(value) for value in args.pack(kernel.name, kernel.parameters, loaded.signature, arguments)]
        if shared_bytes:
            _opt_in(kernel, loaded, shared_bytes, device)
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
        stream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
        (status,) = driver.cuLaunchKernel(
            driver.CUfunction(loaded.handle), *grid, *block, shared_bytes, stream, ctypes.addressof(pointers), 0
        )
    if status != driver.CUresult.CUDA_SUCCESS:
        _, meaning = driver.cuGetErrorString(status)
        raise KernelError(
            f"{kernel.name}: the GPU refused the launch with grid {grid}, block {block} and {shared_bytes:,} bytes of "
            f"shared memory: {meaning.decode() if meaning else status}. An error of an earlier kernel can show up here too."
        )


def _c_value(value):
    """What a kernel's argument points to: an address, or the bytes of a number or struct."""
    if isinstance(value, args.Array):
        return ctypes.c_void_p(value.address)
    return (ctypes.c_char * len(value)).from_buffer_copy(value)


def _device_of(kernel, arguments):
    tensors = {name: a.device for name, a in zip(kernel.parameters, arguments) if args.is_tensor(a)}
    (first, device), *others = tensors.items()
    for name, other in others:
        if other != device:
            raise ValueError(f"{kernel.name}: all tensors must be on one device, but {first} is on {device} and {name} on "
                             f"{other}")  # fmt: skip
    return device


@dataclass(frozen=True)
class _Loaded:
    """A kernel in the GPU's driver. `kernel` keeps it there; static_bytes is the shared memory that its source declares."""

    kernel: object
    handle: int
    static_bytes: int
    signature: tuple


@functools.cache
def _load(source, name, arch):
    binary = compile_for(source, name, arch)
    try:
        kernel = binary.object_code.get_kernel(name)
        return _Loaded(kernel, int(kernel.handle), kernel.attributes.shared_size_bytes, binary.signature)
    except Exception as error:  # noqa: BLE001 (cuda.core's own error class is not public)
        raise KernelError(
            f"{name}: the GPU's driver does not load the compiled kernel ({error}). A driver older than NVRTC "
            f"{_version_text()} is the usual reason: update the driver, or install an older nvidia-cuda-nvrtc."
        ) from None


def _opt_in(kernel, loaded, shared_bytes, device):
    """More than 48 KB of shared memory has to be asked for, for each kernel and GPU; asking for less does no harm."""
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, driver.CUkernel(loaded.handle), device.index)
    if status != driver.CUresult.CUDA_SUCCESS:
        limit = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        _, most = driver.cuDeviceGetAttribute(limit, device.index)
        raise KernelError(
            f"{kernel.name} asks for {shared_bytes:,} bytes of dynamic and {loaded.static_bytes:,} bytes of static shared "
            f"memory in a block; this GPU has {most:,}"
        )


def _arch(device):
    """The GPU's own architecture; from Hopper on with the "a" that unlocks wgmma and its relatives."""
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


@functools.cache
def _headers():
    """Where cuda_fp16.h, mma.h and the others come from: NVRTC brings its own since 13.3, before that it is told."""
    if nvrtc_version() >= (13, 3):
        return {"use_bundled_headers": True}
    located = pathfinder.locate_nvidia_header_directory("cudart")
    return {"include_path": located.abs_path} if located else {}


def nvrtc_version():
    """(major, minor) of the NVRTC library in use."""
    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def _version_text():
    return ".".join(map(str, nvrtc_version()))


def _read_signature(cubin):
    """((kind, code, size), ...) from the table in the binary."""
    at = cubin.find(_MARK) + len(_MARK)
    (count,) = struct.unpack_from("<i", cubin, at)
    entries = struct.iter_unpack("<ccH", cubin[at + 4 : at + 4 + 4 * count])
    return tuple((kind.decode(), code.decode().strip("\0"), size) for kind, code, size in entries)


def _readable(log, source, name, arch):
    """NVRTC's log in the form of the other compilers' messages: the learner's line, its text, a caret."""
    if "--gpu-architecture" in log:
        return f"this NVRTC ({_version_text()}) does not know the architecture {arch!r}"
    messages, lines = [], log.splitlines()
    for number, text in enumerate(lines):
        match = _NVRTC_ERROR.match(text)
        if match and match["file"] == "kernel.cu":
            caret = next((line for line in lines[number + 1 : number + 4] if line.strip() == "^"), "")
            column = max(0, caret.find("^") - 1)  # NVRTC indents by two, point_at counts from one
            messages.append(point_at(source, int(match["line"]), match["message"], column))
        elif match and match["file"] not in ("signature", "__nv_name_map"):
            messages.append(text)
    # what is left are complaints about our own table: the kernel that it asks for does not exist
    return "\n".join(messages[:3]) or f"the source has no kernel {name!r}, or its template arguments do not fit"
