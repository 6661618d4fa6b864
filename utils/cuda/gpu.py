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
from .errors import CompileError, KernelError
from .source import note_of_includes, without_includes
from .structure import FOR_HOST, constants, host_line, leaving_out
from .text import blank, point_at

_HERE = Path(__file__).parent
_BEFORE = (
    "".join((_HERE / name).read_text(encoding="utf-8") for name in ("include/cpu/constants.h", "gpu_before.h"))
    + '#line 1 "kernel.cu"\n'
)
# The table of gpu_before.h for one kernel; its first bytes find it in the binary.
_AFTER = """
#line 1 "signature"
extern "C" __device__ course_signature::table<decltype(&%(kernel)s)> course_signature_table =
    course_signature::table<decltype(&%(kernel)s)>::make();
"""
_MARK = b"kernel signature"

# Headers that a GPU's compiler may have. Others are taken out: a kernel has no C++ library and no files of a project.
_GPU_HEADER = re.compile(
    r"(?:cooperative_groups|cuda|cub|cute|cutlass|nv|thrust)/.*|(?:sm_|device_|surface_|texture_)\w*\.h"
    r"|cuda_(?:bf16|fp\d+|pipeline\w*|awbarrier\w*|runtime)\.hp?p?|curand\w*\.h|(?:cooperative_groups|mma|math_constants)\.h"
)
_NEEDS_LIBRARY = re.compile(r'cannot open source file "((?:nv|cuda)/[\w/]+)"')

_UNRESOLVED = re.compile(r"Unresolved extern function '_ZN?(?:\d+[a-z_]\w*?)??(\d+)(\w+)'")

_NVRTC_ERROR = re.compile(r"(?P<file>.+?)\((?P<line>\d+)\): (?:catastrophic )?error: (?P<message>.*)")


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for one architecture. `signature` describes the arguments as `utils.cuda.binary.Build` does."""

    name: str
    object_code: ObjectCode
    signature: tuple
    constants: tuple  # names of the constants that a host may fill

    @property
    def cubin(self):
        """The machine code, as the bytes of an ELF file."""
        return self.object_code.code


@functools.cache
def compile_for(source, name, arch="sm_90"):
    """Compile one kernel for a real architecture; no GPU is needed.

    source: CUDA C++ text. name: the kernel, with its template arguments: "flash_fwd<64>". arch: "sm_80", "sm_90a", ...
    Returns a Binary. Raises CompileError, which points at the source's line. Other functions of the source that do not
    compile are left out, as long as the kernel can do without them.
    """
    return leaving_out(source, name, lambda text: _compile(text, source, name, arch))


def _compile(text, source, name, arch):
    options = ProgramOptions(name="kernel.cu", arch=arch, std="c++17", lineinfo=True, **_headers())
    names = tuple(constants(blank(text)))
    text, skipped = without_includes(text, lambda header: _GPU_HEADER.fullmatch(header))
    text = _BEFORE + text + _AFTER % {"kernel": name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cuda.core warns when it meets no driver; compiling does not want one
        try:
            code = Program(text, "c++", options).compile(
                "cubin", name_expressions=[name, *(f"&{constant}" for constant in names)]
            )
        except Exception as error:  # noqa: BLE001 (cuda.core's own error class is not public)
            said, *where = _readable(str(error), source, name, arch)
            raise CompileError(said + note_of_includes(skipped), *where) from None
    return Binary(name, code, _read_signature(code.code), names)


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
        _fill(kernel, loaded)
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
    constants: dict
    filled: dict


@functools.cache
def _load(source, name, arch):
    binary = compile_for(source, name, arch)
    try:
        kernel = binary.object_code.get_kernel(name)
        names = {constant: binary.object_code.symbol_mapping[f"&{constant}"] for constant in binary.constants}
        return _Loaded(kernel, int(kernel.handle), kernel.attributes.shared_size_bytes, binary.signature, names, {})
    except Exception as error:  # noqa: BLE001 (cuda.core's own error class is not public)
        raise KernelError(
            f"{name}: the GPU's driver does not load the compiled kernel ({error}). A driver older than NVRTC "
            f"{_version_text()} is the usual reason: update the driver, or install an older nvidia-cuda-nvrtc."
        ) from None


def _fill(kernel, loaded):
    """Copy the values that `kernel.fill` was given into the module's constants, unless they are there already."""
    for name, values in kernel.filled.items():
        if loaded.filled.get(name) is values:
            continue
        _, library = driver.cuKernelGetLibrary(driver.CUkernel(loaded.handle))
        symbol = loaded.constants[name]
        status, address, size = driver.cuLibraryGetGlobal(
            library, symbol if isinstance(symbol, bytes) else symbol.encode()
        )
        if status != driver.CUresult.CUDA_SUCCESS:
            raise KernelError(f"{kernel.name}: the GPU's driver does not find the constant {name} ({status})")
        if size != values.nbytes:
            raise ValueError(
                f"{kernel.name}: {name}: the constant has {size:,} bytes, the values given {values.nbytes:,}"
            )
        (status,) = driver.cuMemcpyHtoD(address, values.ctypes.data, size)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise KernelError(f"{kernel.name}: the GPU's driver does not fill the constant {name} ({status})")
        loaded.filled[name] = values


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
    library = pathfinder.locate_nvidia_header_directory("cccl")  # what cooperative groups need, where it is installed
    if nvrtc_version() >= (13, 3):
        return {"use_bundled_headers": True, **({"include_path": library.abs_path} if library else {})}
    located = [at.abs_path for at in (pathfinder.locate_nvidia_header_directory("cudart"), library) if at]
    return {"include_path": located} if located else {}


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
    entries = struct.iter_unpack("<cc2xI", cubin[at + 4 : at + 4 + 8 * count])
    return tuple((kind.decode(), code.decode().strip("\0"), size) for kind, code, size in entries)


def _readable(log, source, name, arch):
    """NVRTC's log in the form of the other compilers' messages, the learner's line, its text, a caret; and the lines."""
    if "--gpu-architecture" in log:
        return (f"this NVRTC ({_version_text()}) does not know the architecture {arch!r}",)
    if missing := _NEEDS_LIBRARY.search(log):
        return (
            f"cooperative groups and cuda:: need CUDA's C++ headers ({missing[1]}), which PyTorch does not bring: "
            f"`pip install nvidia-cuda-cccl=={_version_text()}.*`",
        )
    if unresolved := _UNRESOLVED.search(log):
        function = unresolved[2][: int(unresolved[1])]
        return f"{function} is declared but not defined", (), function
    messages, lines, wrong = [], log.splitlines(), []
    for number, text in enumerate(lines):
        match = _NVRTC_ERROR.match(text)
        if match and match["file"] == "kernel.cu":
            caret = next((line for line in lines[number + 1 : number + 4] if line.strip() == "^"), "")
            column = max(0, caret.find("^") - 1)  # NVRTC indents by two, point_at counts from one
            messages.append(point_at(source, int(match["line"]), match["message"], column))
            wrong.append(int(match["line"]))
        elif match and match["file"] not in ("signature", "__nv_name_map"):
            messages.append(text)
            wrong.append(0)
    # what is left are complaints about our own table: the kernel that it asks for does not exist
    if line := host_line(source, wrong):
        return point_at(source, line, FOR_HOST), wrong
    text = "\n".join(messages[:3]) or f"the source has no kernel {name!r}, or its template arguments do not fit"
    return text, wrong
