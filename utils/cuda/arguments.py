"""From what a learner passes to what a kernel takes: checks, each with one clear sentence, and packing."""

import ctypes
import math
import operator
import reprlib
import struct
import sys
from dataclasses import dataclass

import numpy as np

MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_ARGUMENT_BYTES = 32764  # of all arguments together, on a GPU from sm_70 on
TYPE_NAMES = {
    "f": "float",
    "d": "double",
    "e": "half",
    "y": "bfloat16",
    "?": "bool",
    "b": "int8",
    "B": "uint8",
    "h": "int16",
    "H": "uint16",
    "i": "int",
    "I": "unsigned",
    "q": "long long",
    "Q": "unsigned long long",
}
DTYPES = {
    "f": ("float32",),
    "d": ("float64",),
    "e": ("float16",),
    "y": ("bfloat16", "uint16"),
    "?": ("bool",),
    "b": ("int8",),
    "B": ("uint8", "bool"),
    "h": ("int16",),
    "H": ("uint16",),
    "i": ("int32",),
    "I": ("uint32", "int32"),
    "q": ("int64",),
    "Q": ("uint64",),
}


@dataclass
class Array:
    """An array argument: where it lies, and what the kernel may do with it."""

    name: str
    address: int
    nbytes: int
    element: int
    writable: bool

    @property
    def key(self):
        """Equal for two arguments that are one array. Arrays without elements may share an address and are not one."""
        return (self.address, self.nbytes) if self.nbytes else self.name


def is_tensor(x):
    return hasattr(x, "data_ptr") and hasattr(x, "is_cuda")


def is_array(x):
    return is_tensor(x) or isinstance(x, np.ndarray)


def three(what, value, limits):
    """A grid or block as three sizes. Raises ValueError unless each is between 1 and its limit."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    try:
        sizes = tuple(operator.index(s) for s in sizes)
    except TypeError:
        raise TypeError(f"{what}: expected a whole number or a tuple of up to three, got {value!r}") from None
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"{what}: expected one to three sizes, got {len(sizes)}: {value!r}")
    sizes += (1,) * (3 - len(sizes))
    for axis, size, limit in zip("xyz", sizes, limits):
        if not 1 <= size <= limit:
            raise ValueError(f"{what}: its {axis} size must be between 1 and {limit:,}, got {size:,}")
    return sizes


def launch_shape(name, configuration):
    """`kernel[grid, block]` or `kernel[grid, block, shared_bytes]` -> grid, block (three sizes each), shared_bytes."""
    if not isinstance(configuration, tuple) or len(configuration) not in (2, 3):
        raise TypeError(
            f"{name}: launch with {name}[grid, block](...) or {name}[grid, block, shared_bytes](...), "
            f"got {name}[{configuration!r}]"
        )
    grid = three(f"{name}: grid", configuration[0], MAX_GRID)
    block = three(f"{name}: block", configuration[1], MAX_BLOCK)
    if math.prod(block) > MAX_THREADS:
        raise ValueError(
            f"{name}: block: {math.prod(block):,} threads ({' x '.join(map(str, block))}), "
            f"but a block has at most {MAX_THREADS:,}"
        )
    shared = configuration[2] if len(configuration) == 3 else 0
    try:
        shared = operator.index(shared)
    except TypeError:
        raise TypeError(f"{name}: shared_bytes: expected a whole number of bytes, got {shared!r}") from None
    if shared < 0:
        raise ValueError(f"{name}: shared_bytes: expected 0 or more, got {shared}")
    return grid, block, shared


def check_count(name, parameters, arguments):
    if len(arguments) != len(parameters):
        raise TypeError(f"{name} takes {len(parameters)} arguments ({', '.join(parameters)}), got {len(arguments)}")


def on_gpu(name, parameters, arguments):
    """Whether the tensors are on a GPU. Raises ValueError if some are and some are not, or for any other device."""
    places = {p: _place(f"{name}: {p}", a) for p, a in zip(parameters, arguments) if is_array(a)}
    if len(set(places.values())) > 1:
        raise ValueError(
            f"{name}: all arrays must be on one device, but "
            + " and ".join(f"{p} is {places[p]}" for p in _one_of_each(places))
        )
    return "a CUDA tensor" in places.values()


def _place(where, a):
    if is_tensor(a) and a.is_cuda:
        return "a CUDA tensor"
    device = a.device.type if is_tensor(a) and hasattr(a, "device") else "cpu"
    if device != "cpu":
        raise ValueError(f"{where}: expected a tensor on the CPU or on a CUDA device, got one on the device {device!r}")
    return "in the CPU's memory"


def _one_of_each(places):
    return list({place: p for p, place in reversed(places.items())}.values())


def pack(name, parameters, signature, arguments):
    """The arguments as the worker takes them: bytes for a value, an `Array` for an array."""
    check_count(name, parameters, arguments)
    total = sum(size if kind == "s" else 8 for kind, _, size in signature)
    if total > MAX_ARGUMENT_BYTES:
        raise ValueError(f"{name}: its arguments take {total:,} bytes, but a GPU takes at most {MAX_ARGUMENT_BYTES:,}")
    return [
        _value(f"{name}: {p}", code, size, a) if kind == "s" else _array(f"{name}: {p}", p, kind, code, size, a)
        for p, (kind, code, size), a in zip(parameters, signature, arguments)
    ]


def _value(where, code, size, a):
    if is_array(a) and (is_tensor(a) or a.dtype.names is None):
        raise TypeError(f"{where}: expected {_a(code, size)} value, got an array of shape {tuple(a.shape)}")
    if not code:
        return _struct(where, size, a)
    expected = f"{where}: expected {_a(code, size)} value, got {reprlib.repr(a)}"
    try:
        if code in "fdey":
            return _float(code, a)
        if code == "?":
            if not isinstance(a, (bool, np.bool_, int, np.integer)):
                raise TypeError
            return struct.pack("?", bool(a))
        return struct.pack(code, operator.index(a))
    except (TypeError, ValueError):
        raise TypeError(expected) from None
    except (struct.error, OverflowError):
        raise ValueError(f"{where}: {reprlib.repr(a)} does not fit into {_a(code, size)}") from None


def _float(code, a):
    if isinstance(a, (str, bytes, bytearray, np.complexfloating)):  # Python would read a text, NumPy drop a part
        raise TypeError
    return _bfloat16(float(a)) if code == "y" else struct.pack("=" + code, float(a))


def _bfloat16(x):
    bits = struct.unpack("=I", struct.pack("=f", x))[0]
    if math.isnan(x):
        return struct.pack("=H", 0x7FFF)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 & 0xFFFF
    if rounded & 0x7FFF == 0x7F80 and not math.isinf(x):
        raise OverflowError
    return struct.pack("=H", rounded)


def _struct(where, size, a):
    if isinstance(a, ctypes.Structure) and not hasattr(a, "_swappedbytes_"):
        data = bytes(a)
    elif isinstance(a, (np.void, np.ndarray)) and a.dtype.names is not None and a.size == 1 and a.dtype.isnative:
        data = a.tobytes()
    else:
        raise TypeError(
            f"{where}: expected a struct of {size} bytes (a ctypes.Structure or a NumPy structured "
            f"scalar), got {type(a).__name__}"
        )
    if len(data) == 0 and size == 1:  # in C++ a struct without fields has a byte
        return b"\0"
    if len(data) != size:
        raise TypeError(
            f"{where}: the kernel's struct has {size} bytes, the one given {len(data)}: "
            "are order, types and padding of the fields the same?"
        )
    return data


def _a(code, size):
    word = TYPE_NAMES.get(code, f"{size}-byte")
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _array(where, parameter, kind, code, size, a):
    if a is None:
        return struct.pack("=Q", 0)  # a null pointer: a kernel may take an optional array
    if not is_array(a):
        raise TypeError(f"{where}: expected an array, got {type(a).__name__} {reprlib.repr(a)}")
    _place(where, a)
    writable = kind == "p"
    dtype, element, nbytes, address = (_tensor if is_tensor(a) else _ndarray)(where, writable, a)
    if code in DTYPES and dtype not in DTYPES[code]:
        raise TypeError(f"{where}: expected an array of {DTYPES[code][0]}, got {dtype}")
    if not code and element != size:
        raise TypeError(f"{where}: the kernel's struct has {size} bytes, the array's elements {element}")
    return Array(parameter, address, nbytes, element, writable)


def constant_values(where, values):
    """What a constant is filled with: an array, its own copy. A number becomes an array of one."""
    if is_tensor(values):
        values = values.detach().cpu()
        bits = str(values.dtype) == "torch.bfloat16"
        values = (values.view(sys.modules["torch"].int16) if bits else values).numpy()
        values = values.view(np.uint16) if bits else values
    if not isinstance(values, (np.ndarray, np.generic, int, float)):
        raise TypeError(f"{where}: expected an array or a number, got {type(values).__name__}")
    return np.array(values, order="C")


def pack_constants(name, constants, filled):
    """{number of a constant: its bytes}. constants: as in `binary.Build`. A number takes the constant's type."""
    packed = {}
    for constant, values in filled.items():
        number, code, element, size = constants[constant]
        where = f"{name}: {constant}"
        if values.ndim == 0 and code:
            data = _value(where, code, element, values[()])
        else:
            if code in DTYPES and values.dtype.name not in DTYPES[code]:
                raise TypeError(f"{where}: expected values of {DTYPES[code][0]}, got {values.dtype}")
            data = values.tobytes()
        if len(data) != size:
            raise ValueError(f"{where}: the constant has {size:,} bytes, the values given {len(data):,}")
        packed[number] = data
    return packed


CONTIGUOUS = "expected a contiguous array; pass a contiguous copy"


def _ndarray(where, writable, a):
    """What a kernel needs to know of a NumPy array. Refuses what its bytes alone would say wrongly."""
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(f"{where}: expected a plain array, got a masked one: a kernel would not see the mask")
    if a.dtype.hasobject:
        raise TypeError(f"{where}: expected an array of numbers, got one of Python objects")
    if not a.dtype.isnative:
        raise ValueError(
            f"{where}: the array's bytes are in the order of another machine ({a.dtype.str}); pass "
            "x.astype(x.dtype.newbyteorder('='))"
        )
    if not a.flags.c_contiguous:
        raise ValueError(f"{where}: {CONTIGUOUS} (np.ascontiguousarray)")
    if writable and not a.flags.writeable:
        raise ValueError(f"{where}: the array is read-only, but the kernel's parameter is not const")
    return a.dtype.name, a.itemsize, a.nbytes, a.ctypes.data


def _tensor(where, writable, a):
    """What a kernel needs to know of a tensor. Refuses what its bytes alone would say wrongly."""
    torch = sys.modules["torch"]
    if a.layout != torch.strided or a.is_quantized or a.is_nested:
        kind = "quantised" if a.is_quantized else "nested" if a.is_nested else str(a.layout).removeprefix("torch.")
        raise TypeError(f"{where}: expected a dense tensor, got a {kind} one")
    if a.is_neg() or a.is_conj():
        which, resolve = ("negative", "resolve_neg") if a.is_neg() else ("conjugate", "resolve_conj")
        raise ValueError(
            f"{where}: the tensor is marked as {which}, its memory holds the other values; pass x.{resolve}()"
        )
    if not a.is_contiguous():
        raise ValueError(f"{where}: {CONTIGUOUS} (x.contiguous())")
    if writable and a.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{where}: the tensor requires gradients, and the kernel may write to it (its parameter is not const), which "
            "autograd would not see; pass x.detach()"
        )
    try:
        address = a.data_ptr()
    except RuntimeError:  # inside torch.func, or a fake tensor
        address = 0
    if address == 0 and a.numel():
        raise ValueError(f"{where}: expected a tensor with memory of its own, got a {type(a).__name__} that has none")
    return str(a.dtype).removeprefix("torch."), a.element_size(), a.numel() * a.element_size(), address


def check_overlap(name, arrays):
    """Two names for one array are fine. Arrays that share part of their memory would be torn apart: ValueError."""
    for i, a in enumerate(arrays):
        for b in arrays[:i]:
            overlap = a.address < b.address + b.nbytes and b.address < a.address + a.nbytes
            same = (a.address, a.nbytes) == (b.address, b.nbytes)
            if overlap and not same and (a.writable or b.writable):
                raise ValueError(
                    f"{name}: {b.name} and {a.name} share part of their memory, and the kernel may write "
                    "to it: pass separate arrays"
                )
