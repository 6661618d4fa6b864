"""From what a learner passes to what a kernel takes: checks, each with one clear sentence, and packing."""
import ctypes
import math
import operator
import struct
from dataclasses import dataclass

import numpy as np

MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
TYPE_NAMES = {"f": "float", "d": "double", "e": "half", "y": "bfloat16", "?": "bool", "b": "int8", "B": "uint8",
              "h": "int16", "H": "uint16", "i": "int", "I": "unsigned", "q": "long long", "Q": "unsigned long long"}
DTYPES = {"f": ("float32",), "d": ("float64",), "e": ("float16",), "y": ("bfloat16", "uint16"), "?": ("bool",),
          "b": ("int8",), "B": ("uint8", "bool"), "h": ("int16",), "H": ("uint16",), "i": ("int32",),
          "I": ("uint32", "int32"), "q": ("int64",), "Q": ("uint64",)}


@dataclass
class Array:
    """An array argument: where it lies, and what the kernel may do with it."""

    name: str
    address: int
    nbytes: int
    element: int
    writable: bool


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
        raise TypeError(f"{name}: launch with {name}[grid, block](...) or {name}[grid, block, shared_bytes](...), "
                        f"got {name}[{configuration!r}]")
    grid = three(f"{name}: grid", configuration[0], MAX_GRID)
    block = three(f"{name}: block", configuration[1], MAX_BLOCK)
    if math.prod(block) > MAX_THREADS:
        raise ValueError(f"{name}: block: {math.prod(block):,} threads ({' x '.join(map(str, block))}), "
                         f"but a block has at most {MAX_THREADS:,}")
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
    """Whether the tensors are on a GPU. Raises ValueError if some are and some are not."""
    places = {p: "a CUDA tensor" if is_tensor(a) and a.is_cuda else "in the CPU's memory"
              for p, a in zip(parameters, arguments) if is_array(a)}
    if len(set(places.values())) > 1:
        raise ValueError(f"{name}: all arrays must be on one device, but "
                         + " and ".join(f"{p} is {places[p]}" for p in _one_of_each(places)))
    return "a CUDA tensor" in places.values()


def _one_of_each(places):
    return list({place: p for p, place in reversed(places.items())}.values())


def pack(name, parameters, signature, arguments):
    """The arguments as the worker takes them: bytes for a value, an `Array` for an array."""
    check_count(name, parameters, arguments)
    return [_value(f"{name}: {p}", code, size, a) if kind == "s" else _array(f"{name}: {p}", p, kind, code, size, a)
            for p, (kind, code, size), a in zip(parameters, signature, arguments)]


def _value(where, code, size, a):
    if is_array(a) and (is_tensor(a) or a.dtype.names is None):
        raise TypeError(f"{where}: expected {_a(code, size)} value, got an array of shape {tuple(a.shape)}")
    if not code:
        return _struct(where, size, a)
    expected = f"{where}: expected {_a(code, size)} value, got {a!r}"
    try:
        if code in "fd":
            return struct.pack(code, float(a))
        if code == "e":
            return np.float16(a).tobytes()
        if code == "y":
            return _bfloat16(float(a))
        if code == "?":
            if not isinstance(a, (bool, np.bool_, int, np.integer)):
                raise TypeError
            return struct.pack("?", bool(a))
        return struct.pack(code, operator.index(a))
    except (TypeError, ValueError):
        raise TypeError(expected) from None
    except (struct.error, OverflowError):
        raise ValueError(f"{where}: {a!r} does not fit into {_a(code, size)}") from None


def _bfloat16(x):
    bits = struct.unpack("=I", struct.pack("=f", x))[0]
    if math.isnan(x):
        return struct.pack("=H", 0x7FFF)
    return struct.pack("=H", (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 & 0xFFFF)


def _struct(where, size, a):
    if isinstance(a, ctypes.Structure):
        data = bytes(a)
    elif isinstance(a, (np.void, np.ndarray)) and a.dtype.names is not None and a.size == 1:
        data = a.tobytes()
    else:
        raise TypeError(f"{where}: expected a struct of {size} bytes (a ctypes.Structure or a NumPy structured "
                        f"scalar), got {type(a).__name__}")
    if len(data) != size:
        raise TypeError(f"{where}: the kernel's struct has {size} bytes, the one given {len(data)}: "
                        "are order, types and padding of the fields the same?")
    return data


def _a(code, size):
    word = TYPE_NAMES.get(code, f"{size}-byte")
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _array(where, parameter, kind, code, size, a):
    if a is None:
        return struct.pack("=Q", 0)                    # a null pointer: a kernel may take an optional array
    if not is_array(a):
        raise TypeError(f"{where}: expected an array, got {type(a).__name__} {a!r}")
    if is_tensor(a):
        dtype, element, nbytes = str(a.dtype).removeprefix("torch."), a.element_size(), a.numel() * a.element_size()
        address, contiguous, read_only = a.data_ptr(), a.is_contiguous(), False
    else:
        dtype, element, nbytes = a.dtype.name, a.itemsize, a.nbytes
        address, contiguous, read_only = a.ctypes.data, a.flags.c_contiguous, not a.flags.writeable
    if code in DTYPES and dtype not in DTYPES[code]:
        raise TypeError(f"{where}: expected an array of {DTYPES[code][0]}, got {dtype}")
    if not code and element != size:
        raise TypeError(f"{where}: the kernel's struct has {size} bytes, the array's elements {element}")
    if not contiguous:
        raise ValueError(f"{where}: expected a contiguous array; pass a contiguous copy (np.ascontiguousarray)")
    if kind == "p" and read_only:
        raise ValueError(f"{where}: the array is read-only, but the kernel's parameter is not const")
    return Array(parameter, address, nbytes, element, kind == "p")


def check_overlap(name, arrays):
    """Two names for one array are fine. Arrays that share part of their memory would be torn apart: ValueError."""
    for i, a in enumerate(arrays):
        for b in arrays[:i]:
            overlap = a.address < b.address + b.nbytes and b.address < a.address + a.nbytes
            same = (a.address, a.nbytes) == (b.address, b.nbytes)
            if overlap and not same and (a.writable or b.writable):
                raise ValueError(f"{name}: {b.name} and {a.name} share part of their memory, and the kernel may write "
                                 "to it: pass separate arrays")
