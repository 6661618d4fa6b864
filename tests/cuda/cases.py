"""How to launch each sample kernel on ragged data, with what NumPy says the result is."""

import re
from dataclasses import dataclass
from functools import partial

import numpy as np

from utils.cuda import samples


@dataclass
class Case:
    """`launch(kernel.check)` runs the kernel, and returns (report, result, expected result)."""

    source: str
    name: str
    template: tuple
    launch: object


def up(n, tile):
    return -(-n // tile)


def attention(q, k, v):
    s = np.einsum("hid,hjd->hij", q, k, dtype=np.float64) / np.sqrt(q.shape[-1])
    p = np.exp(s - s.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True)) @ v


def matmul(how, rows=37, inner=29, columns=50, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((rows, inner), dtype=np.float32)
    b = rng.standard_normal((inner, columns), dtype=np.float32)
    c = np.zeros((rows, columns), np.float32)
    return how[(up(columns, 16), up(rows, 16)), (16, 16)](a, b, c, rows, inner, columns), c, a @ b


def flash(how, n=77, heads=2, d=32, seed=0):
    q, k, v = np.random.default_rng(seed).standard_normal((3, heads, n, d), dtype=np.float32)
    out = np.zeros_like(q)
    shape = (up(n, 64), heads), 128, samples.flash_shared_bytes(d)
    return how[shape](q, k, v, out, n, d**-0.5), out, attention(q, k, v)


def scores(how, n=21, heads=2, d=16):
    q, k = np.random.default_rng(0).standard_normal((2, heads, n, d), dtype=np.float32)
    s = np.zeros((heads, n, n), np.float32)
    return how[(up(n, 32), up(n, 4), heads), (32, 4)](q, k, s, n, d, 0.25), s, q @ k.swapaxes(1, 2) * 0.25


def softmax(how, rows=3, n=150):
    s = np.random.default_rng(0).standard_normal((rows, n), dtype=np.float32)
    p, e = np.zeros_like(s), np.exp(s - s.max(1, keepdims=True))
    return how[rows, 96](s, p, n), p, e / e.sum(1, keepdims=True)


def weighted_sum(how, n=21, heads=2, d=20):
    rng = np.random.default_rng(0)
    p, v = rng.random((heads, n, n), dtype=np.float32), rng.random((heads, n, d), dtype=np.float32)
    out = np.zeros_like(v)
    return how[(up(d, 32), up(n, 4), heads), (32, 4)](p, v, out, n, d), out, p @ v


def transpose(how, rows=40, columns=70):
    x = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    y = np.zeros((columns, rows), np.float32)
    return how[(up(columns, 32), up(rows, 32)), (32, 32)](x, y, rows, columns), y, x.T


def block_sum(how, n=1000):
    x, total = np.random.default_rng(0).random(n, dtype=np.float32), np.zeros(1, np.float32)
    return how[3, 128](x, total, n), total, x.sum(keepdims=True)


def histogram(how, n=777, bins=19):
    x, counts = np.random.default_rng(0).integers(0, bins, n, dtype=np.int32), np.zeros(bins, np.int32)
    return how[4, 64, 4 * bins](x, counts, n, bins), counts, np.bincount(x, minlength=bins)


def double_buffer(how, tiles=5):
    x, sums = np.random.default_rng(0).random((tiles, 128), dtype=np.float32), np.zeros((tiles, 4), np.float32)
    return how[1, 128](x, sums, tiles), sums, (x + x[:, ::-1]).reshape(tiles, 4, 32).sum(-1)


def wmma(how, dtype="half", rows=32, inner=48, columns=16):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((rows, inner), (inner, columns)))
    c = np.zeros((rows, columns), np.float32)
    if dtype == "bfloat16":  # small whole numbers: the upper half of a float is exact
        narrow = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b)]
    else:
        narrow = [x.astype(np.float16) for x in (a, b)]
    return how[(columns // 16, rows // 16), 32](*narrow, c, inner, columns), c, a @ b


CASES = {
    "matmul": Case(samples.MATMUL, "matmul", (), matmul),
    "flash": Case(samples.FLASH, "flash", (32,), flash),
    "scores": Case(samples.NAIVE, "scores", (), scores),
    "softmax": Case(samples.NAIVE, "softmax", (), softmax),
    "weighted_sum": Case(samples.NAIVE, "weighted_sum", (), weighted_sum),
    "transpose": Case(samples.TRANSPOSE, "transpose", (1,), transpose),
    "block_sum": Case(samples.BLOCK_SUM, "block_sum", (), block_sum),
    "histogram": Case(samples.HISTOGRAM, "histogram", (), histogram),
    "double_buffer": Case(samples.DOUBLE_BUFFER, "tile_sums", (), double_buffer),
    "wmma_half": Case(samples.WMMA, "wmma_matmul", ("half",), wmma),
    "wmma_bfloat16": Case(samples.WMMA, "wmma_matmul", ("nv_bfloat16",), partial(wmma, dtype="bfloat16")),
}


def without_line(source, number):
    """The source with one line emptied, so that the others keep their numbers."""
    lines = source.split("\n")
    lines[number - 1] = ""
    return "\n".join(lines)


def barrier_lines(case):
    """The lines of a case's kernel that hold nothing but a barrier or a wait."""
    barrier = re.compile(r"\s*__(?:syncthreads\(\)|syncwarp\(\)|pipeline_wait_prior\(\d\));")
    found, kernel = [], None
    for number, line in enumerate(case.source.split("\n"), 1):
        if match := re.search(r"__global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(", line):
            kernel = match.group(1)
        if kernel == case.name and barrier.fullmatch(line):
            found.append(number)
    return found
