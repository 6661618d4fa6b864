"""Compile a kernel for a real GPU with NVRTC, and launch it on CUDA tensors.

The learner's source is the same as on the CPU. Compiling needs no GPU: that is how every kernel of the course is checked
for real architectures. Launching goes to PyTorch's current stream and copies nothing.
"""

import ctypes
import functools
import re
import struct
import warnings
from dataclasses import dataclass

from cuda import pathfinder
from cuda.bindings import driver, nvrtc
from cuda.core import ObjectCode, Program, ProgramOptions

from utils import cuda
from utils.cuda.source import CompileError, point_at

MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024

# What NVRTC lacks and ordinary CUDA source expects; the integers as CUDA's own headers define them for NVRTC.
# It stands before "#line 1", so the learner's line numbers stay.
_PRELUDE = """
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif
typedef signed char int8_t;      typedef unsigned char uint8_t;
typedef short int16_t;           typedef unsigned short uint16_t;
typedef int int32_t;             typedef unsigned int uint32_t;
typedef long long int64_t;       typedef unsigned long long uint64_t;
typedef long long intptr_t;      typedef unsigned long long uintptr_t;
#line 1 "kernel.cu"
"""

# The compiler itself says what the arguments are: a table in the kernel's binary, found again by its first bytes. Parsing
# the parameter list would miss typedefs, macros and template parameters.
_MARK = b"kernel signature"
_SIGNATURE = """
#line 1 "signature"
struct __half; struct __half2; struct __nv_bfloat16; struct __nv_bfloat162;
namespace course_signature {
template <class T> struct code { static constexpr char value = 0; };  // 0: a struct, known by its size alone
#define COURSE_CODE(T, letter) template <> struct code<T> { static constexpr char value = letter; };
COURSE_CODE(float, 'f') COURSE_CODE(double, 'd') COURSE_CODE(__half, 'e') COURSE_CODE(__nv_bfloat16, 'y')
COURSE_CODE(bool, '?') COURSE_CODE(char, 'b') COURSE_CODE(signed char, 'b') COURSE_CODE(unsigned char, 'B')
COURSE_CODE(short, 'h') COURSE_CODE(unsigned short, 'H') COURSE_CODE(int, 'i') COURSE_CODE(unsigned, 'I')
COURSE_CODE(long, sizeof(long) == 8 ? 'q' : 'i') COURSE_CODE(unsigned long, sizeof(long) == 8 ? 'Q' : 'I')
COURSE_CODE(long long, 'q') COURSE_CODE(unsigned long long, 'Q')
template <class T> struct pointee : code<T> {};  // an array of vectors is an array of numbers
#define COURSE_POINTEE(T, letter) template <> struct pointee<T> { static constexpr char value = letter; };
COURSE_POINTEE(float2, 'f') COURSE_POINTEE(float3, 'f') COURSE_POINTEE(float4, 'f') COURSE_POINTEE(double2, 'd')
COURSE_POINTEE(int2, 'i') COURSE_POINTEE(int3, 'i') COURSE_POINTEE(int4, 'i')
COURSE_POINTEE(uint2, 'I') COURSE_POINTEE(uint4, 'I') COURSE_POINTEE(__half2, 'e') COURSE_POINTEE(__nv_bfloat162, 'y')

struct entry { char kind, code; unsigned short size; };
template <class T> struct describe { static constexpr entry is = {'s', code<T>::value, sizeof(T)}; };
template <class T> struct describe<T*> { static constexpr entry is = {'p', pointee<T>::value, sizeof(T*)}; };
template <class T> struct describe<const T*> { static constexpr entry is = {'c', pointee<T>::value, sizeof(T*)}; };
template <class F> struct table;
template <class... A> struct table<void (*)(A...)> {
  char mark[16]; int count; entry entries[sizeof...(A) + 1];
  static __device__ constexpr table make() {
    return {{'k','e','r','n','e','l',' ','s','i','g','n','a','t','u','r','e'}, sizeof...(A), {describe<A>::is..., {}}};
  }
};
}
extern "C" __device__ course_signature::table<decltype(&%(kernel)s)> course_signature_table =
    course_signature::table<decltype(&%(kernel)s)>::make();
"""

# code: (the C type, the tensor dtypes that a pointer to it takes); the codes are struct's, "y" is bfloat16
_TYPES = {
    "f": ("float", ("float32",)), "d": ("double", ("float64",)),
    "e": ("half", ("float16",)), "y": ("bfloat16", ("bfloat16",)), "?": ("bool", ("bool",)),
    "b": ("char", ("int8",)), "B": ("unsigned char", ("uint8", "bool")),
    "h": ("short", ("int16",)), "H": ("unsigned short", ("uint16", "int16")),
    "i": ("int", ("int32",)), "I": ("unsigned int", ("uint32", "int32")),
    "q": ("long long", ("int64",)), "Q": ("unsigned long long", ("uint64", "int64")),
}  # fmt: skip


_NVRTC_ERROR = re.compile(r"(?P<file>.+?)\((?P<line>\d+)\): (?:catastrophic )?error: (?P<message>.*)")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a compiled kernel, as the compiler sees it.

    kind: "s" (passed by value), "p" (pointer) or "c" (pointer to const). code: the type of the value, or of what the
    pointer points to, as a letter of `struct`; "y" bfloat16, "v" or NUL anything. size: of the parameter, in bytes.
    """

    kind: str
    code: str
    size: int


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for one architecture."""

    expression: str
    object_code: ObjectCode
    parameters: tuple[Parameter, ...]

    @property
    def cubin(self):
        """The machine code, as bytes of an ELF file."""
        return self.object_code.code


def kernel_expression(name, template=()):
    """The C++ name of one instance: ("flash", (64, True)) gives "flash<64, true>"."""
    if not template:
        return name
    words = [str(value).lower() if isinstance(value, bool) else str(value) for value in template]
    return f"{name}<{', '.join(words)}>"


@functools.cache
def compile_for(source, name, template=(), arch="sm_90"):
    """Compile one kernel for a real architecture; no GPU is needed.

    source: CUDA C++ text. name: the kernel. template: its template arguments. arch: "sm_80", "sm_90a", ...
    Returns a Binary. Raises CompileError with the compiler's own message, whose lines count from the source's first.
    """
    expression = kernel_expression(name, template)
    options = ProgramOptions(name="kernel.cu", arch=arch, std="c++17", lineinfo=True, **_headers())
    text = _PRELUDE + source + _SIGNATURE % {"kernel": expression}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cuda.core warns when it meets no driver; compiling does not want one
        try:
            code = Program(text, "c++", options).compile("cubin", name_expressions=[expression])
        except Exception as error:  # noqa: BLE001 (cuda.core's own error class is not public)
            raise CompileError(_readable(str(error), source, expression, arch)) from None
    return Binary(expression, code, _read_signature(code.code))


def launch(kernel, grid, block, shared_bytes, args):
    """Run a kernel on the GPU that holds its tensors, on PyTorch's current stream of that GPU. Returns at once.

    kernel: has `source`, `name`, `template` and `parameters` (names). grid, block: an int or up to three.
    shared_bytes: dynamic shared memory of a block; above 48 KB the opt-in is set here. args: CUDA tensors, None for a null
    pointer, numbers, and structs as NumPy structured scalars or ctypes.Structure.

    Raises KernelError when an argument or the launch is wrong. What a kernel does wrong while it runs shows up later, at
    the next synchronisation, as PyTorch's error; run the kernel on CPU tensors to be told what and where.
    """
    import torch

    grid, block = _dimensions("grid", grid, MAX_GRID), _dimensions("block", block, MAX_BLOCK)
    if block[0] * block[1] * block[2] > MAX_THREADS:
        raise cuda.KernelError(f"{kernel.name}: block {block} has more than {MAX_THREADS} threads.")
    device = _device_of(kernel, args)
    with torch.cuda.device(device):
        loaded = _load(kernel.source, kernel.name, tuple(kernel.template), _arch(device))
        values = pack(kernel.name, kernel.parameters, loaded.parameters, args)
        if shared_bytes > 0:
            _opt_in(kernel, loaded, shared_bytes, device)
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
        stream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
        (status,) = driver.cuLaunchKernel(
            driver.CUfunction(loaded.handle), *grid, *block, shared_bytes, stream, ctypes.addressof(pointers), 0
        )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise cuda.KernelError(
            f"{kernel.name}: the GPU refused the launch with grid {grid}, block {block} and {shared_bytes} bytes of "
            f"shared memory: {_meaning(status)}. An error of an earlier kernel can show up here too."
        )


def pack(kernel_name, names, parameters, args):
    """The kernel's arguments as C values, in order: a list of ctypes objects. Raises KernelError naming the argument."""
    if len(args) != len(parameters):
        takes = f"{len(parameters)} argument" + ("s" if len(parameters) != 1 else "")
        raise cuda.KernelError(f"{kernel_name} takes {takes} ({', '.join(names)}), got {len(args)}.")
    return [_c_value(f"{kernel_name}: argument {name}", parameter, value)
            for name, parameter, value in zip(names, parameters, args)]  # fmt: skip


def _c_value(what, parameter, value):
    if parameter.kind != "s":
        return ctypes.c_void_p(_address(what, parameter, value))
    if hasattr(value, "data_ptr") and value.dim():
        raise cuda.KernelError(f"{what} is a value, got a tensor of shape {tuple(value.shape)}.")
    if parameter.code not in _TYPES:
        content = value.tobytes() if hasattr(value, "tobytes") else value
        if not isinstance(content, (bytes, ctypes.Structure)) or len(bytes(content)) != parameter.size:
            raise cuda.KernelError(
                f"{what} is a struct of {parameter.size} bytes, got {value!r}; pass a NumPy structured scalar or a "
                "ctypes.Structure of the same size."
            )
        content = bytes(content)
    else:
        content = _number(what, parameter, value)
    return (ctypes.c_char * parameter.size).from_buffer_copy(content)


def _number(what, parameter, value):
    try:
        if parameter.code == "y":
            # round to the nearest bfloat16, ties to even: the upper half of the float32
            (bits,) = struct.unpack("<I", struct.pack("<f", value))
            return struct.pack("<H", bits + 0x7FFF + (bits >> 16 & 1) >> 16)
        return struct.pack("<" + parameter.code, value)
    except (struct.error, OverflowError, TypeError):
        raise cuda.KernelError(f"{what} is {_TYPES[parameter.code][0]}, got {value!r}.") from None


def _address(what, parameter, tensor):
    if tensor is None:
        return 0
    if not hasattr(tensor, "data_ptr"):
        raise cuda.KernelError(f"{what} is a pointer, got {type(tensor).__name__}; pass a CUDA tensor.")
    given = str(tensor.dtype).removeprefix("torch.")
    dtypes = _TYPES[parameter.code][1] if parameter.code in _TYPES else ()
    if dtypes and given not in dtypes:
        raise cuda.KernelError(f"{what} wants {dtypes[0]}, got a tensor of {given}.")
    if not tensor.is_contiguous():
        raise cuda.KernelError(f"{what} is not contiguous; call .contiguous() first.")
    return tensor.data_ptr()


def _dimensions(what, given, most):
    values = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    if not 1 <= len(values) <= 3 or any(not hasattr(value, "__index__") for value in values):
        raise cuda.KernelError(f"{what} is one to three whole numbers, got {given!r}.")
    values = tuple(int(value) for value in values) + (1,) * (3 - len(values))
    if any(not 1 <= value <= limit for value, limit in zip(values, most)):
        raise cuda.KernelError(f"{what} {values} is out of range: each number is at least 1 and at most {most}.")
    return values


def _device_of(kernel, args):
    devices = {}
    for name, value in zip(kernel.parameters, args):
        if hasattr(value, "data_ptr"):
            devices.setdefault(str(value.device), (name, value.device))
        elif hasattr(value, "__array_interface__") and getattr(value, "ndim", 0):
            devices.setdefault("cpu", (name, None))
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, (name, _) in devices.items())
        raise cuda.KernelError(f"{kernel.name}: all arrays must be on one device, got {where}.")
    (_, device), = devices.values()  # fmt: skip
    return device


@dataclass(frozen=True)
class _Loaded:
    handle: int
    kernel: object
    static_bytes: int
    parameters: tuple[Parameter, ...]


@functools.cache
def _load(source, name, template, arch):
    binary = compile_for(source, name, template, arch)
    try:
        kernel = binary.object_code.get_kernel(binary.expression)
        return _Loaded(int(kernel.handle), kernel, kernel.attributes.shared_size_bytes, binary.parameters)
    except Exception as error:  # noqa: BLE001 (cuda.core's own error class is not public)
        raise cuda.KernelError(
            f"{name}: the GPU's driver does not load the compiled kernel ({error}). A driver older than NVRTC "
            f"{_version()} is the usual reason: update the driver, or install an older nvidia-cuda-nvrtc."
        ) from None


def _opt_in(kernel, loaded, shared_bytes, device):
    """More than 48 KB of dynamic shared memory has to be asked for, once for each kernel and GPU."""
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, driver.CUkernel(loaded.handle), device.index)
    if status != driver.CUresult.CUDA_SUCCESS:
        limit = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        _, most = driver.cuDeviceGetAttribute(limit, device.index)
        raise cuda.KernelError(
            f"{kernel.name} asks for {shared_bytes} bytes of dynamic and {loaded.static_bytes} bytes of static shared "
            f"memory in a block; this GPU has {most}."
        )


def _arch(device):
    """The GPU's own architecture; from Hopper on with the "a" that unlocks wgmma and its relatives."""
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


@functools.cache
def _headers():
    """Where cuda_fp16.h, mma.h and the others come from: NVRTC brings its own since 13.3, before that it is told."""
    if _version() >= (13, 3):
        return {"use_bundled_headers": True}
    located = pathfinder.locate_nvidia_header_directory("cudart")
    return {"include_path": located.abs_path} if located else {}


def _version():
    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def _read_signature(cubin):
    at = cubin.find(_MARK) + len(_MARK)
    (count,) = struct.unpack_from("<i", cubin, at)
    entries = struct.iter_unpack("<ccH", cubin[at + 4 : at + 4 + 4 * count])
    return tuple(Parameter(kind.decode(), code.decode(), size) for kind, code, size in entries)


def _readable(log, source, expression, arch):
    """NVRTC's log in the form of the other compilers' messages: the learner's line, its text, a caret."""
    if "--gpu-architecture" in log:
        return f"this NVRTC ({'.'.join(map(str, _version()))}) does not know the architecture {arch!r}"
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
    return "\n".join(messages[:3]) or f"the source has no kernel {expression!r}, or its template arguments do not fit"


def _meaning(status):
    _, text = driver.cuGetErrorString(status)
    return text.decode() if text else str(status)
