# Generated from solutions/06_flash_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 06 · Flash attention: what it trains for itself alone."""

import math
import tracemalloc
import warnings
from collections import Counter

import numpy as np
import torch

from attention.experiments.fundamentals import Recall, recall_loss
from attention.flash import flash_attention_numpy, flash_launch
from attention.fundamentals import BLEND, SCORES, SOFTMAX_ROWS
from utils import cuda, data, training

__all__ = [
    "SlowMemory",
    "algorithm_0",
    "algorithm_2",
    "kept_bytes",
    "ladder_counts",
    "naive_bytes",
    "peak_bytes",
    "pairs_of_work",
    "with_dropout",
    "keep_mask",
    "schedule",
    "WeighedRecall",
    "recall_losses",
]


class SlowMemory:
    """Named arrays (n, ...) of which rows are loaded and stored; counts the elements that move."""

    def __init__(self, **arrays):
        self.arrays, self.loaded, self.stored = arrays, Counter(), Counter()

    def load(self, name, rows):
        self.loaded[name] += self.arrays[name][rows].size
        return self.arrays[name][rows].copy()

    def store(self, name, rows, block):
        self.stored[name] += block.size
        self.arrays[name][rows] = block

    @property
    def traffic(self):
        return self.loaded.total() + self.stored.total()

    def tiles(self, size):
        """The rows of Q in tiles, as slices."""
        n = len(self.arrays["Q"])
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def algorithm_0(q, k, v):
    """Standard attention as in the paper, without scale. Returns the output and the memory it used."""
    n, every = len(q), slice(None)
    memory = SlowMemory(Q=q, K=k, V=v, S=np.empty((n, len(k))), P=np.empty((n, len(k))), O=np.empty((n, v.shape[1])))
    memory.store("S", every, memory.load("Q", every) @ memory.load("K", every).T)
    s = memory.load("S", every)
    p = np.exp(s - s.max(1, keepdims=True))
    memory.store("P", every, p / p.sum(1, keepdims=True))
    memory.store("O", every, memory.load("P", every) @ memory.load("V", every))
    return memory.arrays["O"], memory


def algorithm_2(q, k, v, block_q, block_k):
    """The forward pass of FlashAttention-2 without scale: queries outside. Returns output, memory, counts."""
    n, d = q.shape
    memory = SlowMemory(Q=q, K=k, V=v, O=np.zeros((n, d)), L=np.zeros((n, 1)))
    count = Counter(tiles_q=-(-n // block_q), tiles_k=-(-n // block_k))
    for i in range(0, n, block_q):
        rows = slice(i, i + block_q)
        Q_i = memory.load("Q", rows)
        m, ell, O_i = np.full((len(Q_i), 1), -np.inf), np.zeros((len(Q_i), 1)), np.zeros((len(Q_i), d))
        for j in range(0, n, block_k):
            K_j, V_j = (memory.load(name, slice(j, j + block_k)) for name in "KV")
            S = Q_i @ K_j.T
            m_new = np.maximum(m, S.max(1, keepdims=True))
            P, factor = np.exp(S - m_new), np.exp(m - m_new)
            ell, m, O_i = factor * ell + P.sum(1, keepdims=True), m_new, factor * O_i + P @ V_j
            count["multiplied"] += O_i.size
        memory.store("O", rows, O_i / ell)                                     # divided once, at the end
        memory.store("L", rows, m + np.log(ell))
        count["divided"] += O_i.size
    return memory.arrays["O"], memory, count


def naive_bytes(n, d):
    """Bytes that the three kernels of lecture 01 move through global memory, counted: each sector once a kernel."""
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((n, d)).astype(np.float32) for _ in range(3))
    s, p, out = np.zeros((n, n), np.float32), np.zeros((n, n), np.float32), np.zeros((n, d), np.float32)
    return sum(report.distinct_loaded + report.distinct_stored for report in naive_reports(q, k, v, s, p, out))

def naive_reports(q, k, v, s, p, out):
    """Reports of the three kernels of lecture 01: scores, softmax, blend."""
    (n, d), m = q.shape, len(k)

    def up(size):
        return -(-size // 16)

    return [cuda.compile(SCORES).check[(up(m), up(n)), (16, 16)](q, k, s, n, m, d, 1 / math.sqrt(d)),
            cuda.compile(SOFTMAX_ROWS).check[n, 32](s, p, m),
            cuda.compile(BLEND).check[(up(d), up(n)), (16, 16)](p, v, out, n, m, d)]

def peak_bytes(function, *arguments):
    """The most memory that NumPy held at any moment of the call, in bytes, without what was there before."""
    tracemalloc.start()
    function(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak

def kept_bytes(function, n, d=64):
    """Bytes that autograd keeps between the forward and the backward pass of one head of length n."""
    kept = {}
    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    arrays = [torch.zeros(n, d, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*arrays)
        del result                                              # the hook has seen all that its graph held
    return sum(kept.values())


def pairs_of_work(positions):
    """Pairs of query and key that rank r has to compute at step t, under a causal mask: (ranks, steps)."""
    ranks = range(len(positions))
    return np.array([[(positions[(r - t) % len(ranks)] <= positions[r][:, None]).sum() for t in ranks] for r in ranks])


def ladder_counts(n, d):
    """What seven kernels need for one head of n tokens: {rung: (bytes of sectors, turns of shared memory, operations)}.

    Operations of tensor cores count 67 / 989, so that one peak serves for all: an H100's in single precision.
    """
    draw = np.random.default_rng(6)
    arrays = [draw.standard_normal((n, d)).astype(np.float32) for _ in range(3)]
    s, p, out = np.zeros((n, n), np.float32), np.zeros((n, n), np.float32), np.zeros((n, d), np.float32)
    reports = {"1 three kernels": naive_reports(*arrays, s, p, out)}
    heads = [torch.from_numpy(a)[None] for a in arrays]
    for name, rung in (("2 a thread a query", "rows"), ("3 a block shares", "shared"),
                       ("4 registers 4 × 2", "registers"), ("5 registers 8 × 8", "large"),
                       ("6 tensor cores, wmma", "half"), ("7 tensor cores, mma", "mma")):
        given = heads if rung in ("rows", "shared", "registers", "large") else [a.half() for a in heads]
        kernel, launch, arguments = flash_launch(rung, *given)
        with warnings.catch_warnings():                    # more than 48 KB of shared memory has to be asked for
            warnings.simplefilter("ignore")
            reports[name] = [kernel.check[launch](*arguments)]
    counts = {}
    for name, several in reports.items():
        rows = [row for report in several for row in report.rows]
        n_bytes = 32 * sum(row.sectors for row in rows if row.space == "global")
        turns = sum(row.wavefronts for row in rows if row.space == "shared")
        counts[name] = n_bytes, turns, 4 * n * n * d * (67 / 989 if "tensor" in name else 1)
    return counts


def keep_mask(seed, i, j, shape, rate):
    """Which weights of tile (i, j) are kept: booleans, the same whenever and wherever they are asked for."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, i, j])).random(shape) >= rate

def with_dropout(q, k, v, d_out, seed, rate, block):
    """Output and gradients of attention with dropout; the mask exists one tile at a time, twice."""
    n, keep = len(q), 1 - rate
    starts = range(0, n, block)
    _, lse = flash_attention_numpy(q, k, v, scale=1.0)

    def part(i):
        return slice(i, i + block)

    def weights(i, j):
        return np.exp(q[part(i)] @ k[part(j)].T - lse[part(i), None])

    def mask(i, j):
        return keep_mask(seed, i, j, (block, block), rate) / keep

    out, d_q, d_k, d_v = (np.zeros_like(a) for a in (v, q, k, v))
    for i in starts:                                                         # forward: queries outside
        for j in starts:
            out[part(i)] += (mask(i, j) * weights(i, j)) @ v[part(j)]
    D = (d_out * out).sum(1)                                                 # holds with dropout too
    for j in starts:                                                         # backward: keys outside
        for i in starts:
            p, z = weights(i, j), mask(i, j)
            d_v[part(j)] += (z * p).T @ d_out[part(i)]
            d_s = p * (z * (d_out[part(i)] @ v[part(j)].T) - D[part(i), None])
            d_q[part(i)] += d_s @ k[part(j)]
            d_k[part(j)] += d_s.T @ q[part(i)]
    return out, d_q, d_k, d_v


def schedule(groups, tiles, product=2, softmax=1):
    """Jobs (group, unit, start, length) of warp groups that share tensor cores and exponential units, greedily."""
    free, ready, jobs = {"products": 0, "softmax": 0}, [0] * groups, []
    for _ in range(tiles):
        for unit, length in (("products", product), ("softmax", softmax)):
            for group in range(groups):
                start = max(free[unit], ready[group])
                jobs.append((group, unit, start, length))
                free[unit] = ready[group] = start + length
    return jobs


class WeighedRecall(Recall):
    """Lecture 01's model with attention, for 64 symbols; weigh(scores) turns scores (64, 64) into weights."""

    def __init__(self, weigh):
        super().__init__("attention", seq_len=64)
        self.weigh = weigh

    def attend(self, x):
        return self.weigh(self.question.weight @ (x + self.place.weight).mT / math.sqrt(x.shape[-1]))

def streams(seed, batch=16):
    draw = np.random.default_rng(seed)
    while True:
        yield [torch.from_numpy(ids) for ids in data.recall_stream(draw, batch, seq_len=64, n_symbols=8)]

def recall_losses(weigh, seed):
    """The loss at each of 200 steps of training, in double precision."""
    model = training.initialise(WeighedRecall(weigh).double(), seed)
    return training.fit(model, streams(seed), recall_loss, steps=200, lr=1e-2).losses
