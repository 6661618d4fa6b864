"""Kernels in the manner of much-read public ones, written for these tests: each uses constructs that such code uses.

MANNERS: name -> Case. `arguments(rng)` makes the arguments; `expected(*arguments)` computes what `out` (its place among them)
must hold. Constants are filled by `filled`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.cuda.manners_sources import (
    ADAM,
    AGGREGATED,
    BITONIC,
    BLOCK_REDUCE,
    CAUSAL,
    CONVOLUTION,
    ELEMENTWISE,
    EMBEDDING,
    FLASH_MINIMAL,
    GELU,
    HISTOGRAM,
    INT8,
    LAYERNORM_GROUPS,
    PERMUTE,
    ROPE,
    SCAN,
    SGEMM,
    STENCIL,
    WELFORD,
)


@dataclass(frozen=True)
class Case:
    """A kernel, its launch, its arguments, and what it must write."""

    source: str
    arguments: Callable
    expected: Callable
    grid: object
    block: object
    out: int = -1
    name: str | None = None
    template: tuple = ()
    shared: int = 0
    filled: dict = field(default_factory=dict)
    tolerance: float = 1e-5


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


STATE = np.array(
    (0.9, 0.99, 1e-2, 1e-8, 3), [("beta1", "f4"), ("beta2", "f4"), ("lr", "f4"), ("eps", "f4"), ("step", "i4")]
)[()]
CONV_MASK = np.linspace(-1, 1, 9).astype(np.float32)


def adam(params, grads, m, v, _n, _s):
    m, v = 0.9 * m + 0.1 * grads, 0.99 * v + 0.01 * grads**2
    return params - 1e-2 * (m / (1 - 0.9**3)) / (np.sqrt(v / (1 - 0.99**3)) + 1e-8)


def attention(q, k, v, *_):
    return softmax(q @ k.swapaxes(-1, -2) * 0.25) @ v


def stencil(x, _out, n):
    out = np.zeros((n, n), np.float32)
    out[1:-1, 1:-1] = x[1:-1, 1:-1] - 0.25 * (x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:])
    return out


def bf16(x):
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)


def rope(x, _y, table, _h, _n):
    pairs = (x.astype(np.uint32) << 16).view(np.float32).reshape(10, 16, 2)
    a, b = pairs[..., 0] + 1j * pairs[..., 1], table[..., 0] + 1j * table[..., 1]
    return np.stack([(a * b).real, (a * b).imag], -1)


MANNERS = {
    "softmax with block reductions": Case(
        BLOCK_REDUCE, lambda r: (zeros(5, 300), normal(r, 5, 300), 5, 300), lambda out, x, *_: softmax(x), 5, 128, out=0),
    "layer norm with cooperative groups": Case(
        LAYERNORM_GROUPS,
        lambda r: (zeros(7, 100), zeros(7), None, normal(r, 7, 100), normal(r, 100), normal(r, 100), 7, 100),
        lambda o, m, s, x, w, b, *_: (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * w + b,
        2, 128, out=0, tolerance=1e-4),
    "sgemm with default template arguments": Case(
        SGEMM, lambda r: (64, 64, 24, 0.5, normal(r, 64, 24), normal(r, 24, 64), 2.0, normal(r, 64, 64)),
        lambda m, n, k, alpha, a, b, beta, c: alpha * a @ b + beta * c, (2, 2), 64, tolerance=1e-4),
    "convolution with constant memory": Case(
        CONVOLUTION, lambda r: (normal(r, 200), zeros(200), 9, 200), lambda x, *_: np.correlate(x, CONV_MASK, "same"),
        4, 64, out=1, shared=4 * 72, filled={"Mask": CONV_MASK}, tolerance=1e-4),
    "Brent-Kung scan": Case(
        SCAN, lambda r: (normal(r, 250), zeros(250), 250), lambda x, *_: np.cumsum(x), 1, 128, out=1, tolerance=1e-4),
    "filter with one atomic for each warp": Case(
        AGGREGATED, lambda r: (zeros(200, dtype=np.int32), zeros(1, dtype=np.int32), r.integers(-9, 9, 200).astype("i4"), 200),
        lambda dst, n, src, _: np.concatenate([src[src > 0], np.zeros((src <= 0).sum(), np.int32)]), 2, 128, out=0),
    "bitonic sort": Case(
        BITONIC, lambda r: (zeros(256, dtype=np.uint32), r.integers(0, 1 << 32, 256, dtype=np.uint32)),
        lambda dst, src: np.sort(src), 1, 128, out=0),
    "halves packed by eight": Case(
        ELEMENTWISE, lambda r: (normal(r, 512).astype("f2"), normal(r, 512).astype("f2"), zeros(512, dtype=np.float16), 512),
        lambda a, b, *_: a + b, 1, 64, out=2, tolerance=1e-3),
    "flash attention, a thread for each row": Case(
        FLASH_MINIMAL,
        lambda r: (*(normal(r, 1, 2, 64, 16) for _ in range(3)), 64, 16, 2, 2, 32, 32, 0.25, zeros(1, 2, 64),
                   np.full((1, 2, 64), -np.inf, np.float32), zeros(1, 2, 64, 16)),
        attention, (1, 2), 32, shared=4 * (3 * 32 * 16 + 32 * 32), tolerance=1e-4),
    "AdamW with its state by value": Case(
        ADAM, lambda r: (normal(r, 100), normal(r, 100), normal(r, 100), r.random(100, dtype=np.float32), 100, STATE), adam,
        2, 64, out=0, template=("float", "float"), tolerance=1e-4),
    "int8 products": Case(
        INT8, lambda r: (r.integers(-128, 128, (6, 96)).astype("i1").view("i4"), r.integers(-128, 128, 96).astype("i1").view("i4"),
                         zeros(6, dtype=np.int32), 24),
        lambda w, x, *_: w.view("i1").astype("i4") @ x.view("i1").astype("i4"), 6, 32, out=2),
    "a functor in a namespace over float4": Case(
        GELU, lambda r: (normal(r, 400), zeros(400), 400, np.zeros((), [("unused", "i1")])[()]),
        lambda x, *_: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), 2, 32, out=1, name="act::map",
        template=("act::Gelu",)),
    "rotary embedding in bfloat16": Case(
        ROPE, lambda r: (bf16(normal(r, 10, 32)), zeros(10, 32, dtype=np.uint16), normal(r, 10, 16, 2), 16, 10), rope, 10, 32,
        out=1, tolerance=1e-2),
    "embedding with 64-bit rows": Case(
        EMBEDDING, lambda r: (r.integers(0, 9, 12), normal(r, 9, 70), zeros(12, 70), 70, 3),
        lambda ids, w, *_: np.where(ids[:, None] == 3, 0, w[ids]), 12, 32, out=2, template=("float",)),
    "private histogram": Case(
        HISTOGRAM, lambda r: (r.integers(0, 256, 999).astype("u1"), zeros(16, dtype=np.uint32), 999),
        lambda data, *_: np.bincount(data % 16, minlength=16), 3, 64, out=1),
    "causal softmax with loops of different length": Case(
        CAUSAL, lambda r: (normal(r, 32, 32), zeros(32, 32), 32),
        lambda x, *_: np.tril(np.exp(x)) / np.tril(np.exp(x)).sum(1, keepdims=True), 1, 32, out=1),
    "permute": Case(
        PERMUTE, lambda r: (*(zeros(2, 3, 5, 4) for _ in range(3)), normal(r, 2, 5, 3, 3, 4), 2, 5, 3, 4),
        lambda q, k, v, x, *_: x[:, :, 1].transpose(0, 2, 1, 3), 4, 32, out=1),
    "Welford's variance": Case(
        WELFORD, lambda r: (normal(r, 4, 77), zeros(4), 77), lambda x, *_: x.var(1), 4, 32, out=1, tolerance=1e-4),
    "stencil with a halo": Case(
        STENCIL, lambda r: (normal(r, 40, 40), zeros(40, 40), 40), stencil, (3, 3), (16, 16), out=1, tolerance=1e-4),
}  # fmt: skip
