"""Read a GGUF file, the one-file format of llama.cpp: what it says about a model, and its tensors as float32.

Of the format's quantised types it knows two. Both store blocks of 32 numbers: Q8_0 a scale and 32 bytes, x = scale * byte;
Q4_1 a scale, a minimum and 32 half bytes, x = scale * half + minimum, the low halves being the first 16 numbers.
Source: github.com/ggml-org/ggml, docs/gguf.md and src/ggml-common.h.
"""

import mmap
import struct

import numpy as np

NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # the letters of struct; little-endian
STRING, ARRAY = 8, 9
BLOCKS = {  # a block of each type of tensor
    0: np.dtype([("number", "<f4")]),
    3: np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("halves", "u1", 16)]),
    8: np.dtype([("scale", "<f2"), ("bytes", "i1", 32)]),
}
PIECE = 4096  # blocks


def _unpack(blocks, kind, out):
    """The numbers of blocks, written to out of shape (blocks, numbers of a block)."""
    if kind == 0:
        out[:, 0] = blocks["number"]
        return
    scale = blocks["scale"].astype(np.float32)[:, None]
    if kind == 8:
        np.multiply(scale, blocks["bytes"], out=out)
        return
    halves = blocks["halves"]
    np.multiply(scale, halves & 15, out=out[:, :16])
    np.multiply(scale, halves >> 4, out=out[:, 16:])
    out += blocks["minimum"].astype(np.float32)[:, None]


class GGUF:
    """An open file. metadata: what it says, {key: number, string, bool or list}; shapes: its tensors in order, {name: shape}."""

    def __init__(self, path):
        """ValueError for a file that is no GGUF of version 2 or 3."""
        with open(path, "rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        if self._data[:4] != b"GGUF" or self._take("II")[1] not in (2, 3):
            raise ValueError(f"{path} must be a GGUF file of version 2 or 3, got {bytes(self._data[:8])!r}")
        n_tensors, n_entries = self._take("QQ")
        self.metadata = {self._string(): self._value(*self._take("I")) for _ in range(n_entries)}
        self._tensors = {self._string(): self._place() for _ in range(n_tensors)}
        self._start = -self._at % self.metadata.get("general.alignment", 32) + self._at

    @property
    def shapes(self):
        return {name: shape for name, (shape, _, _) in self._tensors.items()}

    def tensor(self, name, out=None):
        """A tensor as float32, in NumPy's order of axes: the last one is contiguous. ValueError for another type.

        out: a contiguous float32 array with as many numbers, in which the tensor is put; a new one where it is None.
        """
        shape, kind, offset = self._tensors[name]
        if kind not in BLOCKS:
            raise ValueError(f"tensor {name} must be of type F32, Q4_1 or Q8_0 (0, 3, 8), got type {kind}")
        per_block = 1 if kind == 0 else 32
        blocks = np.frombuffer(self._data, BLOCKS[kind], int(np.prod(shape)) // per_block, self._start + offset)
        out = (np.empty(shape, np.float32) if out is None else out).reshape(-1, per_block)
        for at in range(0, len(blocks), PIECE):  # so few that what lies between stays in the processor's cache
            _unpack(blocks[at : at + PIECE], kind, out[at : at + PIECE])
        return out.reshape(shape)

    def _take(self, letters):
        """The next numbers of the header."""
        values = struct.unpack_from("<" + letters, self._data, self._at)
        self._at += struct.calcsize("<" + letters)
        return values

    def _string(self):
        (length,) = self._take("Q")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8")

    def _value(self, kind):
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            kind, count = self._take("IQ")
            return [self._value(kind) for _ in range(count)]
        return self._take(NUMBERS[kind])[0]

    def _place(self):
        """Shape, type and offset of a tensor. The file counts axes from the contiguous one."""
        (n_axes,) = self._take("I")
        *axes, kind, offset = self._take(f"{n_axes}QIQ")
        return tuple(axes[::-1]), kind, offset
