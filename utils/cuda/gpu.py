"""Compile a kernel for a real GPU with NVRTC, and launch it on CUDA tensors.

The learner's source is the same as on the CPU. Compiling needs no GPU: that is how every kernel of the course is checked
for real architectures. Launching goes to PyTorch's current stream and copies nothing.
"""

import ctypes
import functools
import struct
import warnings
from dataclasses import dataclass

from cuda import pathfinder
from cuda.bindings import driver, nvrtc
from cuda.core import ObjectCode, Program, ProgramOptions

from utils import cuda

MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024

# What NVRTC lacks and ordinary CUDA source expects. It stands before "#line 1", so the learner's line numbers stay.
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
typedef decltype(sizeof(0)) uintptr_t;
#line 1 "kernel.cu"
"""

# The compiler itself says what the arguments are: a table in the kernel's binary, found again by its first bytes. Parsing
# the parameter list would miss typedefs, macros and template parameters.
_MARK = b"kernel signature"
_SIGNATURE = """
#line 1 "signature"
struct __half; struct __half2; struct __nv_bfloat16; struct __nv_bfloat162;
namespace course_signature {
template <class T> struct type { static constexpr char family = '?'; static constexpr unsigned size = sizeof(T); };
template <> struct type<void>  { static constexpr char family = 'v'; static constexpr unsigned size = 0; };
#define COURSE_TYPE(T, letter, bytes) \\
  template <> struct type<T> { static constexpr char family = letter; static constexpr unsigned size = bytes; };
COURSE_TYPE(bool, 'b', 1)
COURSE_TYPE(char, 'i', 1) COURSE_TYPE(signed char, 'i', 1) COURSE_TYPE(unsigned char, 'u', 1)
COURSE_TYPE(short, 'i', 2) COURSE_TYPE(unsigned short, 'u', 2)
COURSE_TYPE(int, 'i', 4) COURSE_TYPE(unsigned, 'u', 4)
COURSE_TYPE(long, 'i', sizeof(long)) COURSE_TYPE(unsigned long, 'u', sizeof(long))
COURSE_TYPE(long long, 'i', 8) COURSE_TYPE(unsigned long long, 'u', 8)
COURSE_TYPE(float, 'f', 4) COURSE_TYPE(double, 'f', 8) COURSE_TYPE(__half, 'f', 2) COURSE_TYPE(__nv_bfloat16, 'y', 2)
// a pointer to a vector type takes an array of its elements
template <class T> struct element { typedef T of; };
#define COURSE_VECTOR(V, T) template <> struct element<V> { typedef T of; };
COURSE_VECTOR(float2, float) COURSE_VECTOR(float3, float) COURSE_VECTOR(float4, float) COURSE_VECTOR(double2, double)
COURSE_VECTOR(int2, int) COURSE_VECTOR(int3, int) COURSE_VECTOR(int4, int)
COURSE_VECTOR(uint2, unsigned) COURSE_VECTOR(uint3, unsigned) COURSE_VECTOR(uint4, unsigned)
COURSE_VECTOR(char4, char) COURSE_VECTOR(uchar4, unsigned char)
COURSE_VECTOR(__half2, __half) COURSE_VECTOR(__nv_bfloat162, __nv_bfloat16)
template <class T> using element_type = type<typename element<T>::of>;

struct entry { char kind, family; unsigned short size; };
template <class T> struct describe { static constexpr entry is = {'s', type<T>::family, type<T>::size}; };
template <class T> struct describe<const T> : describe<T> {};
template <class T> struct describe<T*> {
  static constexpr entry is = {'p', element_type<T>::family, element_type<T>::size}; };
template <class T> struct describe<const T*> {
  static constexpr entry is = {'c', element_type<T>::family, element_type<T>::size}; };
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

_PACK = {("f", 2): "e", ("f", 4): "f", ("f", 8): "d", ("b", 1): "?",
         ("i", 1): "b", ("i", 2): "h", ("i", 4): "i", ("i", 8): "q",
         ("u", 1): "B", ("u", 2): "H", ("u", 4): "I", ("u", 8): "Q"}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One parameter of a compiled kernel, as the compiler sees it.

    `kind` is "s" (passed by value), "p" (pointer) or "c" (pointer to const). `family` and `size` (bytes) describe the
    value, or what the pointer points to: "f" float, "i" signed, "u" unsigned, "b" bool, "y" bfloat16, "v" void, "?" other.
    """

    kind: str
    family: str
    size: int

    @property
    def dtypes(self):
        """Names of the tensor dtypes that a pointer of this type takes; empty when any will do."""
        bits = 8 * self.size
        return {
            "f": (f"float{bits}",),
            "i": (f"int{bits}",),
            "u": (f"uint{bits}", "bool") if bits == 8 else (f"uint{bits}", f"int{bits}"),
            "b": ("bool",),
            "y": ("bfloat16",),
        }.get(self.family, ())


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for one architecture: the object code (`.code` is the cubin) and its parameters."""

    expression: str
    object_code: ObjectCode
    parameters: tuple[Parameter, ...]


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
            raise cuda.CompileError(_readable(str(error), expression, arch)) from None
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
    if parameter.family == "?":
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
        if parameter.family == "y":
            # round to the nearest bfloat16, ties to even: the upper half of the float32
            (bits,) = struct.unpack("<I", struct.pack("<f", value))
            return struct.pack("<H", bits + 0x7FFF + (bits >> 16 & 1) >> 16)
        return struct.pack("<" + _PACK[parameter.family, parameter.size], value)
    except (struct.error, OverflowError, TypeError):
        kind = {"f": "float", "y": "bfloat16", "i": "int", "u": "unsigned int", "b": "bool"}[parameter.family]
        raise cuda.KernelError(f"{what} is {kind} ({8 * parameter.size} bits), got {value!r}.") from None


def _address(what, parameter, tensor):
    if tensor is None:
        return 0
    if not hasattr(tensor, "data_ptr"):
        raise cuda.KernelError(f"{what} is a pointer, got {type(tensor).__name__}; pass a CUDA tensor.")
    given = str(tensor.dtype).removeprefix("torch.")
    if parameter.dtypes and given not in parameter.dtypes:
        raise cuda.KernelError(f"{what} wants {parameter.dtypes[0]}, got a tensor of {given}.")
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
        import torch

        most = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
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
    return tuple(Parameter(kind.decode(), family.decode(), size) for kind, family, size in entries)


def _readable(message, expression, arch):
    """NVRTC's log without the lines that speak of our own table; they only repeat that the kernel is not there."""
    if "--gpu-architecture" in message:
        return f"This NVRTC ({'.'.join(map(str, _version()))}) does not know the architecture {arch!r}."
    log = message.partition("compilation log:")[2].strip() or message
    blocks, keep = [], True
    for line in log.splitlines():
        starts = "): error" in line or "): warning" in line or "): catastrophic" in line
        keep = (not line.startswith(("signature(", "__nv_name_map("))) if starts else keep
        if keep and "detected in the compilation" not in line:
            blocks.append(line)
    text = "\n".join(blocks).strip("\0\n ")
    return text or f"The source has no kernel {expression!r}, or its template arguments do not fit."


def _meaning(status):
    _, text = driver.cuGetErrorString(status)
    return text.decode() if text else str(status)
