# Generated from solutions/06_flash_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 06 · Flash attention: the finished code."""

import datetime
import functools
import math
import os
import socket
import tempfile
import time
from multiprocessing import connection
from pathlib import Path

import numpy as np
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F

from attention.fundamentals import ROW_OF_A_TILE, check_arguments
from utils import cuda

__all__ = [
    "flash_attention_numpy",
    "flash_attention_torch",
    "flash_attention_cuda",
    "flash_attention_backward_numpy",
    "flash_attention_backward_torch",
    "flash_attention_backward_cuda",
    "online_softmax",
    "merge_by_lse",
    "ring_attention_numpy",
    "ring_attention",
]


def online_softmax(m, ell, scores):
    """The softmax's running maximum m and sum ell, after one more block of scores.

    m, ell (...), -inf and 0 at the beginning; scores (..., width), -inf where a score
    may not be seen. Returns (m, ell) of the same shapes in the float type of scores;
    ell is the sum of exp(score - m). A row of nothing but -inf keeps -inf and 0.
    Source: Milakov and Gimelshein 2018 (arXiv 1805.02867), algorithm 3.
    """
    scores = scores.astype(cuda.float_type(scores), copy=False)  # whole numbers: floats
    m_new = np.maximum(m, scores.max(axis=-1, initial=-np.inf))
    finite = np.where(np.isneginf(m_new), 0, m_new)
    ell_new = ell * np.exp(m - finite) + np.exp(scores - finite[..., None]).sum(axis=-1)
    return m_new.astype(scores.dtype), ell_new.astype(scores.dtype)


def tiled_attention(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    """Attention tile by tile, without the matrix of scores, in NumPy: (out, lse).

    q (..., n_queries, d_head), k (..., n_keys, d_head), v (..., n_keys, d_v) with equal
    leading axes; causal is aligned at the bottom right; block_q, block_k: rows of a
    tile. Returns out (..., n_queries, d_v) in the float type of q, lse (...,
    n_queries), at least in single precision; 0 and -inf for a query without a key.
    Source: Dao 2023 (arXiv 2307.08691), algorithm 1.
    """
    work = cuda.work_type(q)  # half precision is computed in single
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    lead, n_queries, n_keys = q.shape[:-2], q.shape[-2], k.shape[-2]
    shift = n_keys - n_queries  # query i may see the keys up to i + shift
    out = np.zeros((*lead, n_queries, v.shape[-1]), cuda.float_type(q))
    lse = np.full((*lead, n_queries), -np.inf, work)
    for i in range(0, n_queries, block_q):
        rows = np.arange(i, min(i + block_q, n_queries))
        end = min(n_keys, rows[-1] + shift + 1) if causal else n_keys  # seen by a row
        q_i = q[..., rows[0]:rows[-1] + 1, :].astype(work) * scale
        m = np.full((*lead, len(rows), 1), -np.inf, work)
        ell, o = np.zeros_like(m), np.zeros((*lead, len(rows), v.shape[-1]), work)
        for j in range(0, end, block_k):
            k_j, v_j = (a[..., j:min(j + block_k, end), :].astype(work, copy=False)
                        for a in (k, v))
            s = q_i @ np.swapaxes(k_j, -1, -2)
            columns = np.arange(j, j + s.shape[-1])
            if causal and columns[-1] > i + shift:  # the diagonal crosses this tile
                np.copyto(s, -np.inf, where=columns > rows[:, None] + shift)
            m_new = np.maximum(m, s.max(axis=-1, keepdims=True))
            finite = np.where(np.isneginf(m_new), 0, m_new)
            p = np.exp(np.subtract(s, finite, out=s), out=s)  # in the place of the scores
            factor = np.exp(m - finite)
            ell = ell * factor + p.sum(axis=-1, keepdims=True)
            o = o * factor + cuda.weighted_sum(p, v_j)
            m = m_new
        out[..., rows, :] = o / np.where(ell == 0, 1, ell)
        with np.errstate(divide="ignore"):
            lse[..., rows] = (m + np.log(ell))[..., 0]
    return out, lse


def test_flash(attend):
    """Raise AssertionError if attend(q, k, v, causal, scale, block_q, block_k) errs."""
    draws = np.random.default_rng(3)
    for n, n_keys, causal, size in ((5, 7, False, 1.0), (5, 7, True, 1.0),
                                    (6, 4, True, 1.0), (5, 7, False, -300.0)):
        q, k = draws.standard_normal((n, 4)), draws.standard_normal((n_keys, 4))
        v = draws.standard_normal((n_keys, 3))
        if size != 1:  # low scores, and rows of very different size
            q, k = np.arange(1, n + 1)[:, None] * np.ones((n, 4)), size + np.abs(k)
        out, lse = attend(q, k, v, causal, 0.7, 2, 3)
        for i in range(n):
            seen = max(0, i + 1 + n_keys - n) if causal else n_keys
            if seen == 0:
                assert (out[i] == 0).all() and np.isneginf(lse[i]), "an empty row"
                continue
            s = 0.7 * k[:seen] @ q[i]
            powers = np.exp(s - s.max())
            assert np.allclose(out[i], powers @ v[:seen] / powers.sum()), i
            assert np.isclose(lse[i], s.max() + np.log(powers.sum())), i


def backward_tiles(n_queries, n_keys, causal, block=64, device="cpu"):
    """Yield the tiles that a backward pass visits, keys outside.

    (slice of queries, slice of keys, boolean tensor (rows, columns) or None) for each.
    """
    shift = n_keys - n_queries
    for j in range(0, n_keys, block):
        for i in range(0, n_queries, block):
            rows = slice(i, min(i + block, n_queries))
            columns = slice(j, min(j + block, n_keys))
            if not causal or columns.stop - 1 <= i + shift:
                yield rows, columns, None
            elif j <= rows.stop - 1 + shift:
                key = torch.arange(j, columns.stop, device=device)
                query = torch.arange(i, rows.stop, device=device)
                yield rows, columns, key <= query[:, None] + shift


def tile_gradients(q, k, v, out, lse, d_out, causal=False, scale=None):
    """Gradients of flash attention with respect to q, k and v, tile by tile: PyTorch.

    q, k, v, out, d_out of one float type, with equal leading axes; out and lse are what
    flash attention returned; d_out (..., n_queries, d_v). Returns (d_q, d_k, d_v) of
    the shapes and types of q, k and v; 0 for a query without a key.
    Source: Dao 2023 (arXiv 2307.08691), algorithm 2.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    lse = lse.masked_fill(lse == -math.inf, math.inf)  # an empty row has no weights
    D = (d_out * out).sum(-1)
    d_q, d_k, d_v = (torch.zeros_like(a) for a in (q, k, v))
    sizes = q.shape[-2], k.shape[-2]
    for rows, columns, allowed in backward_tiles(*sizes, causal, device=q.device):
        q_i, d_out_i = q[..., rows, :], d_out[..., rows, :]
        k_j, v_j = k[..., columns, :], v[..., columns, :]
        s = q_i @ k_j.mT * scale
        if allowed is not None:
            s = s.masked_fill(~allowed, -math.inf)
        p = torch.exp(s - lse[..., rows, None])
        d_p = d_out_i @ v_j.mT
        d_s = p * (d_p - D[..., rows, None]) * scale
        d_v[..., columns, :] += p.mT @ d_out_i
        d_k[..., columns, :] += d_s.mT @ q_i
        d_q[..., rows, :] += d_s @ k_j
    return d_q, d_k, d_v


class PackedSelfAttention(nn.Module):
    """Causal self-attention of n_heads heads on texts packed one behind the other.

    ValueError unless n_heads divides d_model.
    """

    def __init__(self, d_model, n_heads):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model: {n_heads} and {d_model}")
        self.n_heads = n_heads
        self.w_q, self.w_k, self.w_v, self.w_o = (
            nn.Parameter(torch.randn(d_model, d_model) * d_model**-0.5) for _ in range(4))

    def forward(self, x, starts):
        q, k, v = ((x @ w).unflatten(-1, (self.n_heads, -1)).transpose(0, 1)
                   for w in (self.w_q, self.w_k, self.w_v))  # (heads, total, d_head)
        borders = starts.tolist()
        parts = [flash_attention_torch(q[:, a:b], k[:, a:b], v[:, a:b], causal=True)[0]
                 for a, b in zip(borders, borders[1:])]
        return torch.cat(parts, dim=1).transpose(0, 1).flatten(1) @ self.w_o


FLASH_SHARED = r"""
__global__ void flash_shared(const float* q, const float* k, const float* v, float* out, float* lse,
                             int n_queries, int n_keys, int d, int causal, float scale) {
  extern __shared__ float shared[];
  int stride = d + PAD, x = threadIdx.x, y = threadIdx.y, i = blockIdx.y * TILE + y;
  float *q_tile = shared, *k_tile = q_tile + TILE * stride, *v_tile = k_tile + TILE * stride;
  float *o_row = v_tile + TILE * stride + y * stride;
  float *p_row = shared + 4 * TILE * stride + y * (TILE + PAD);
  size_t head = blockIdx.x;
  const float* queries = q + head * n_queries * d;
  const float* keys = k + head * n_keys * d;
  const float* values = v + head * n_keys * d;
  int visible = visible_keys((blockIdx.y + 1) * TILE, n_queries, n_keys, causal);
  load_rows(q_tile, TILE, d, stride, queries, blockIdx.y * TILE, n_queries, d);
  for (int c = x; c < d; c += TILE) o_row[c] = 0.0f;
  float maximum, total;
  maximum = -INFINITY;
  total = 0.0f;
  for (int first = 0; first < visible; first += TILE) {
    // load
    __syncthreads();                                     // the last tiles are used up
    load_rows(k_tile, TILE, d, stride, keys, first, visible, d);
    load_rows(v_tile, TILE, d, stride, values, first, visible, d);
    __syncthreads();                                     // the new tiles have arrived
    // score
    float s = 0.0f;
    for (int t = 0; t < d; ++t) s += q_tile[y * stride + t] * k_tile[x * stride + t];
    s = may_attend(i, first + x, n_queries, n_keys, causal) ? scale * s : -INFINITY;
    // rescale
    float highest = fmaxf(maximum, row_max(s));
    float shift = highest == -INFINITY ? 0.0f : highest;
    float factor = expf(maximum - shift), weight = expf(s - shift);
    maximum = highest;
    total = factor * total + row_sum(weight);
    p_row[x] = weight;
    __syncwarp();                                        // a row belongs to one warp
    // accumulate
    for (int c = x; c < d; c += TILE) {
      float sum = factor * o_row[c];
      for (int r = 0; r < TILE; ++r) sum += p_row[r] * v_tile[r * stride + c];
      o_row[c] = sum;
    }
  }
  if (i >= n_queries) return;
  float share = total == 0.0f ? 0.0f : 1.0f / total;
  for (int c = x; c < d; c += TILE) out[(head * n_queries + i) * d + c] = o_row[c] * share;
  if (x == 0) lse[head * n_queries + i] = total == 0.0f ? -INFINITY : maximum + logf(total);
}
"""


def merge_by_lse(outs, lses):
    """Attention over all keys, from attentions over disjoint sets of keys.

    outs (n_parts, ..., n_queries, d_v), lses (n_parts, ..., n_queries): arrays or lists
    of arrays; -inf where a part had nothing to attend to. Returns (out, lse) without
    the axis of parts, in the float types of outs and lses; 0 and -inf for an empty row.
    """
    outs, lses = np.asarray(outs), np.asarray(lses)
    if lses.ndim < 1 or len(lses) == 0 or outs.shape[:-1] != lses.shape:
        raise ValueError("outs and lses must be (n_parts, ..., n_queries, d_v) and "
                         "(n_parts, ..., n_queries) of at least one part, got shapes "
                         f"{outs.shape} and {lses.shape}")
    top = lses.max(axis=0)
    finite = np.where(np.isneginf(top), 0, top)
    shares = np.exp(lses - finite)
    total = shares.sum(axis=0)
    out = shares[..., None] * outs
    out[shares == 0] = 0  # a part that was not seen may hold anything, even nan
    out = out.sum(axis=0) / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):  # the logarithm of an empty row is -inf
        return cuda.like(out, outs), finite + np.log(total)


def ring_attention_numpy(q, k, v, positions, causal=False, scale=None):
    """Ring attention in one process: each rank attends to all blocks and merges.

    q, k (n_ranks, n_local, d_head), v (n_ranks, n_local, d_v), positions integers
    (n_ranks, n_local): where each token stands; causal: a query may see keys at its own
    position and before. scale defaults to 1/sqrt(d_head). Returns (n_ranks, n_local,
    d_v). Source: Liu, Zaharia and Abbeel 2023 (arXiv 2310.01889), algorithm 1.
    """
    check_arguments(q, k, v)
    if q.ndim != 3 or k.shape != q.shape or positions.shape != q.shape[:2]:
        raise ValueError("q, k and positions must be (n_ranks, n_local, d_head), the "
                         "same, and (n_ranks, n_local), got shapes "
                         f"{q.shape}, {k.shape} and {positions.shape}")
    q, k, v = (a.astype(cuda.float_type(a), copy=False) for a in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    results = np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    for rank in range(len(q)):
        state = results[rank], np.full(q.shape[1], -np.inf, q.dtype)
        for step in range(len(q)):
            held = (rank - step) % len(q)
            state = attend_block(state, q[rank], k[held], v[held], positions[rank],
                                 positions[held], causal, scale)
        results[rank] = state[0]
    return results


MMA = r"""
// Four 8 x 8 tiles of shared memory into registers; lane l names the row l % 8 of tile l / 8.
__device__ void load_tiles(unsigned (&r)[4], const element* row) {
  unsigned address = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ void load_tiles_transposed(unsigned (&r)[4], const element* row) {
  unsigned address = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
// sum (16 x 8) += a (16 x 16) b (16 x 8)
__device__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ unsigned pack(float low, float high) {
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
"""


MMA_STEPS = r"""
#define MMA_KEYS 64                                      // keys of a tile
// Scores of 16 queries with the tile, eight keys a piece.
template <int D> __device__ void mma_scores(float (&s)[MMA_KEYS / 8][4], const element* k_tile,
                                            const unsigned (&query)[D / 16][4]) {
  int lane = threadIdx.x % 32, key = lane / 16 * 8 + lane % 8, column = lane / 8 % 2 * 8;
  for (int c = 0; c < MMA_KEYS / 16; ++c)
    for (int t = 0; t < D / 16; ++t) {
      unsigned b[4];
      load_tiles(b, k_tile + (16 * c + key) * (D + 8) + 16 * t + column);
      multiply_add(s[2 * c], query[t], b[0], b[1]);
      multiply_add(s[2 * c + 1], query[t], b[2], b[3]);
    }
}
// Scores of row r (0 or 1) of this lane become weights; returns the factor for the sums so far.
__device__ float mma_rescale(float (&s)[MMA_KEYS / 8][4], int r, float& maximum, float& total) {
  float highest = maximum;
  for (int c = 0; c < MMA_KEYS / 8; ++c)
    highest = fmaxf(highest, fmaxf(s[c][2 * r], s[c][2 * r + 1]));
  highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 1));
  highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 2));
  float shift = highest == -INFINITY ? 0.0f : highest, factor = expf(maximum - shift);
  maximum = highest;
  total *= factor;
  for (int c = 0; c < MMA_KEYS / 8; ++c)
    for (int e = 2 * r; e < 2 * r + 2; ++e) {
      s[c][e] = expf(s[c][e] - shift);
      total += s[c][e];
    }
  return factor;
}
// sum += weights times V; the weights are packed into the left factor where they are.
template <int D> __device__ void mma_blend(float (&sum)[D / 8][4], const element* v_tile,
                                           const float (&s)[MMA_KEYS / 8][4]) {
  int lane = threadIdx.x % 32;
  for (int c = 0; c < MMA_KEYS / 16; ++c) {
    const float *left = s[2 * c], *right = s[2 * c + 1];
    unsigned p[4] = {pack(left[0], left[1]), pack(left[2], left[3]),
                     pack(right[0], right[1]), pack(right[2], right[3])};
    for (int t = 0; t < D / 16; ++t) {
      unsigned b[4];
      load_tiles_transposed(b, v_tile + (16 * c + lane % 16) * (D + 8) + 16 * t + lane / 16 * 8);
      multiply_add(sum[2 * t], p, b[0], b[1]);
      multiply_add(sum[2 * t + 1], p, b[2], b[3]);
    }
  }
}
"""


FLASH_MMA = r"""
template <int D, int WARPS>                              // d rounded up by 16; 16 queries a warp
__global__ void flash_mma(const element* q, const element* k, const element* v, element* out,
                          float* lse, int n_queries, int n_keys, int d, int causal, float scale) {
  extern __shared__ __align__(128) element k_tile[];     // the queries too, at the beginning
  element* v_tile = k_tile + max(16 * WARPS, MMA_KEYS) * (D + 8);
  int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16, top = blockIdx.y * 16 * WARPS;
  int i = top + own + lane / 4, column = lane % 4 * 2;   // this lane's entries: rows i and i + 8
  size_t head = blockIdx.x;
  const element* keys = k + head * n_keys * d;
  const element* values = v + head * n_keys * d;
  int visible = visible_keys(top + 16 * WARPS, n_queries, n_keys, causal);
  load_half<D>(k_tile, 16 * WARPS, q + head * n_queries * d, top, n_queries, d);
  __syncthreads();
  unsigned query[D / 16][4];
  for (int t = 0; t < D / 16; ++t)
    load_tiles(query[t], k_tile + (own + lane % 16) * (D + 8) + 16 * t + lane / 16 * 8);
  float sum[D / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, total[2] = {};
  for (int first = 0; first < visible; first += MMA_KEYS) {
    __syncthreads();
    load_half<D>(k_tile, MMA_KEYS, keys, first, visible, d);
    load_half<D>(v_tile, MMA_KEYS, values, first, visible, d);
    __syncthreads();
    float s[MMA_KEYS / 8][4] = {};
    mma_scores<D>(s, k_tile, query);
    for (int c = 0; c < MMA_KEYS / 8; ++c)
      for (int e = 0; e < 4; ++e)
        if (may_attend(i + e / 2 * 8, first + 8 * c + column + e % 2, n_queries, n_keys, causal))
          s[c][e] *= scale;
        else
          s[c][e] = -INFINITY;
    float factor[2];
    for (int r = 0; r < 2; ++r) factor[r] = mma_rescale(s, r, maximum[r], total[r]);
    for (int t = 0; t < D / 8; ++t)
      for (int e = 0; e < 4; ++e) sum[t][e] *= factor[e / 2];
    mma_blend<D>(sum, v_tile, s);
  }
  for (int e = 0; e < 4; ++e) {                          // write: two rows, even and odd columns
    int row = i + e / 2 * 8;
    float all = total[e / 2] + __shfl_xor_sync(0xffffffff, total[e / 2], 1);
    all += __shfl_xor_sync(0xffffffff, all, 2);
    for (int c = column + e % 2, t = 0; c < d && row < n_queries; c += 8, ++t)
      out[(head * n_queries + row) * d + c] = element(all == 0.0f ? 0.0f : sum[t][e] / all);
    if (e % 2 == 0 && column == 0 && row < n_queries)
      lse[head * n_queries + row] = all == 0.0f ? -INFINITY : maximum[e / 2] + logf(all);
  }
}
"""


def check_blocks(block_q, block_k):
    """Raise ValueError, in one sentence, unless both sizes of a tile are positive whole numbers."""
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name} must be a positive whole number, got {size!r}")

def leading_axes(q, k, v):
    """The leading axes of q, k and v, broadcast together. Raises ValueError, in one sentence, where they cannot be."""
    axes = [tuple(a.shape[:-2]) for a in (q, k, v)]
    try:
        return np.broadcast_shapes(*axes)
    except ValueError:
        got = f"{axes[0]}, {axes[1]}, {axes[2]}"
        raise ValueError(f"the leading axes of q, k and v must broadcast, got {got}") from None

def check_flash_arguments(kind, q, k, v, block_q=None, block_k=None):
    """Raise ValueError unless q, k, v and the sizes of a tile fit; TypeError unless all are of a kind (array, tensor)."""
    check_arguments(q, k, v)
    check_blocks(1 if block_q is None else block_q, 1 if block_k is None else block_k)
    leading_axes(q, k, v)
    cuda.check_kind(kind, q=q, k=k, v=v)


TILE_QUERIES, TILE_KEYS = 256, 512                         # of a tile that is chosen
TILE_SCORES = 4 * TILE_QUERIES * TILE_KEYS                 # at a time, all heads together

def chosen_tile(n_queries, n_keys, block_q=None, block_k=None):
    """Rows of a tile of queries and of keys: those given, others from the sizes."""
    return (max(1, min(TILE_QUERIES, n_queries)) if block_q is None else block_q,
            max(1, min(TILE_KEYS, n_keys)) if block_k is None else block_k)

def parts_of(lead, size):
    """Indices that cut leading axes into parts of at most `size` heads (a part of one head at least)."""
    if math.prod(lead) <= size or not lead:
        yield ()
        return
    step = max(1, size // max(1, math.prod(lead[1:])))
    for first in range(0, lead[0], step):
        for rest in parts_of(lead[1:], size):
            yield slice(first, first + step), *rest

def flash_attention_numpy(q, k, v, causal=False, scale=None, block_q=None, block_k=None):
    """Attention tile by tile: the output and the log-sum-exp of each row, without the matrix of scores, in NumPy.

    The oracle of flash_attention_torch and flash_attention_cuda.
    q (..., n_queries, d_head), k (..., n_keys, d_head), v (..., n_keys, d_v), leading axes broadcast; causal is aligned
    at the bottom right; scale defaults to 1/sqrt(d_head). block_q, block_k: rows of a tile of queries and of keys, for
    all leading axes at once; where one is None, it is chosen from the sizes, and few heads are taken at a time. Returns
    out (..., n_queries, d_v) in the float type of q and lse (..., n_queries), at least in single precision; 0 and -inf
    for a query with nothing to attend to. The sizes of tiles do not change the result beyond rounding. Raises
    ValueError when shapes do not fit or a size is no positive whole number.
    Source: Dao 2023 (arXiv 2307.08691), algorithm 1.
    """
    check_flash_arguments(np.ndarray, q, k, v, block_q, block_k)
    lead = leading_axes(q, k, v)
    rows, keys = chosen_tile(q.shape[-2], k.shape[-2], block_q, block_k)
    heads = math.prod(lead)
    if block_q is None or block_k is None:
        heads = max(1, TILE_SCORES // (rows * (keys + q.shape[-1] + v.shape[-1])))
    out = np.zeros((*lead, q.shape[-2], v.shape[-1]), cuda.float_type(q))
    lse = np.zeros((*lead, q.shape[-2]), cuda.work_type(q))
    q, k, v = (np.broadcast_to(a, (*lead, *a.shape[-2:])) for a in (q, k, v))
    for part in parts_of(lead, heads):
        out[part], lse[part] = tiled_attention(q[part], k[part], v[part], causal, scale, rows, keys)
    return out, lse


def causal_tiles(n_queries, n_keys, block_q, block_k):
    """Count the tiles of a causal matrix, aligned at the bottom right: integers (3,), full, partial, skipped.

    Full: every query of the tile may see every key of it; skipped: none may see any. Ragged last tiles count as one.
    Raises ValueError when a block size is no positive whole number.
    """
    check_blocks(block_q, block_k)
    if n_queries < 0 or n_keys < 0:
        raise ValueError(f"n_queries and n_keys must not be negative, got {n_queries} and {n_keys}")
    full = partial = skipped = 0
    for i in range(0, n_queries, block_q):
        last_i, shift = min(i + block_q, n_queries) - 1, n_keys - n_queries
        for j in range(0, n_keys, block_k):
            last_j = min(j + block_k, n_keys) - 1
            if last_j <= i + shift:
                full += 1
            elif j <= last_i + shift:
                partial += 1
            else:
                skipped += 1
    return np.array([full, partial, skipped])


def check_backward(q, k, v, out, lse, d_out):
    """Raise ValueError, in one sentence, unless what a backward pass is given fits together. For arrays and tensors."""
    check_arguments(q, k, v)
    cuda.check_numbers(out=out, lse=lse, d_out=d_out)
    lead = tuple(q.shape[:-2])
    shapes = {"k": (k, (*lead, *k.shape[-2:])), "v": (v, (*lead, *v.shape[-2:])), "lse": (lse, tuple(q.shape[:-1])),
              "out": (out, (*q.shape[:-1], v.shape[-1])), "d_out": (d_out, (*q.shape[:-1], v.shape[-1]))}
    for name, (array, expected) in shapes.items():
        if tuple(array.shape) != tuple(expected):
            raise ValueError(f"{name} must have the shape {tuple(expected)}, got {tuple(array.shape)}")


def flash_attention_backward_numpy(q, k, v, out, lse, d_out, causal=False, scale=None):
    """Gradients of flash_attention_numpy's output with respect to q, k and v: weights are computed again, in NumPy.

    q, k, v, causal, scale as in flash_attention_numpy, with equal leading axes; out and lse are what it returned; d_out
    (..., n_queries, d_v). Returns (d_q, d_k, d_v) of the shapes and types of q, k, v; 0 for a query with nothing to
    attend to. Raises ValueError when shapes do not fit.
    Source: Dao 2023 (arXiv 2307.08691), algorithm 2.
    """
    check_backward(q, k, v, out, lse, d_out)
    cuda.check_kind(np.ndarray, q=q, k=k, v=v, out=out, lse=lse, d_out=d_out)
    work = cuda.work_type(q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    types = [cuda.float_type(a) for a in (q, k, v)]
    q, k, v, out, d_out = (a.astype(work, copy=False) for a in (q, k, v, out, d_out))
    d_q, d_k, d_v = (np.zeros_like(a) for a in (q, k, v))
    lse = np.where(np.isneginf(lse), np.inf, lse)              # exp(s - inf) is 0: an empty row has no weights
    D = (d_out * out).sum(axis=-1)
    for rows, columns, allowed in backward_tiles(q.shape[-2], k.shape[-2], causal):
        q_i, d_out_i = q[..., rows, :], d_out[..., rows, :]
        k_j, v_j = k[..., columns, :], v[..., columns, :]
        s = q_i @ np.swapaxes(k_j, -1, -2) * scale
        if allowed is not None:
            s[..., ~allowed.numpy()] = -np.inf
        p = np.exp(s - lse[..., rows, None])
        d_p = d_out_i @ np.swapaxes(v_j, -1, -2)
        d_s = p * (d_p - D[..., rows, None]) * scale
        d_v[..., columns, :] += np.swapaxes(p, -1, -2) @ d_out_i
        d_k[..., columns, :] += np.swapaxes(d_s, -1, -2) @ q_i
        d_q[..., rows, :] += d_s @ k_j
    return tuple(gradient.astype(type_, copy=False) for gradient, type_ in zip((d_q, d_k, d_v), types))


def flash_forward_torch(q, k, v, causal, scale, block_q, block_k):
    """The loops of flash_attention_numpy on tensors with equal leading axes: (out, lse). Records no gradient."""
    work = cuda.work_type(q)
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    shift, positions = n_keys - n_queries, torch.arange(max(n_queries, n_keys), device=q.device)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = torch.full(q.shape[:-1], -math.inf, dtype=work, device=q.device)
    for i in range(0, n_queries, block_q):
        stop = min(i + block_q, n_queries)
        end = min(n_keys, stop + shift) if causal else n_keys
        q_i = q[..., i:stop, :].to(work) * scale
        m = torch.full((*q_i.shape[:-1], 1), -math.inf, dtype=work, device=q.device)
        ell, o = torch.zeros_like(m), torch.zeros(*q_i.shape[:-1], v.shape[-1], dtype=work, device=q.device)
        for j in range(0, end, block_k):
            j_stop = min(j + block_k, end)
            s = q_i @ k[..., j:j_stop, :].to(work).mT
            if causal and j_stop - 1 > i + shift:
                s.masked_fill_(positions[j:j_stop] > positions[i:stop, None] + shift, -math.inf)
            m_new = torch.maximum(m, s.amax(-1, keepdim=True))
            finite = m_new.masked_fill(m_new == -math.inf, 0)
            p, factor = torch.exp(s - finite), torch.exp(m - finite)
            ell = ell * factor + p.sum(-1, keepdim=True)
            o = o * factor + p @ v[..., j:j_stop, :].to(work)
            m = m_new
        out[..., i:stop, :] = (o / ell.masked_fill(ell == 0, 1)).to(out.dtype)
        lse[..., i:stop] = (m + torch.log(ell))[..., 0]
    return out, lse


def flash_attention_backward_torch(q, k, v, out, lse, d_out, causal=False, scale=None):
    """Gradients as flash_attention_backward_numpy computes them, in PyTorch; arguments, shapes and errors as there."""
    check_backward(q, k, v, out, lse, d_out)
    cuda.check_kind(torch.Tensor, q=q, k=k, v=v, out=out, lse=lse, d_out=d_out)
    work, types = cuda.work_type(q), [cuda.float_type(a) for a in (q, k, v)]
    q, k, v, out, lse, d_out = (a.detach().to(work) for a in (q, k, v, out, lse, d_out))
    gradients = tile_gradients(q, k, v, out, lse, d_out, causal, scale)
    return tuple(gradient.to(type_) for gradient, type_ in zip(gradients, types))


class FlashAttention(torch.autograd.Function):
    """Flash attention as one operation of autograd: it keeps q, k, v, the output and one number for each row."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale, block_q, block_k):
        out, lse = flash_forward_torch(q, k, v, causal, scale, block_q, block_k)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.scale = causal, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, _):
        gradients = flash_attention_backward_torch(*ctx.saved_tensors, d_out, ctx.causal, ctx.scale)
        return *gradients, None, None, None, None

@cuda.skip_unseen
def flash_attention_torch(q, k, v, causal=False, scale=None, block_q=None, block_k=None):
    """Attention tile by tile in PyTorch; arguments, shapes and errors as flash_attention_numpy.

    Differentiable in q, k and v through the output; the log-sum-exp carries no gradient. Half precision is computed in
    single.
    """
    check_flash_arguments(torch.Tensor, q, k, v, block_q, block_k)
    lead = leading_axes(q, k, v)
    q, k, v = (t if t.is_floating_point() else t.double() for t in (q, k, v))
    q, k, v = (t.expand(*lead, *t.shape[-2:]) for t in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if block_q is None:                                    # fewer rows of more heads, so that the scores stay few
        block_q = max(16, min(TILE_QUERIES, q.shape[-2], TILE_SCORES // max(1, math.prod(lead) * TILE_KEYS)))
    _, block_k = chosen_tile(q.shape[-2], k.shape[-2], block_q, block_k)
    return FlashAttention.apply(q, k, v, causal, scale, block_q, block_k)


def attend_block(state, q, k, v, q_positions, k_positions, causal, scale):
    """Take one block of keys and values into a running attention: the new state (out, lse).

    state: out (..., n_queries, d_v) and lse (..., n_queries) over the blocks before, 0 and -inf at the beginning;
    q (..., n_queries, d_head), k, v (..., n_keys, d), positions integers (n_queries,) and (n_keys,).
    """
    s = q @ np.swapaxes(k, -1, -2) * scale
    if causal:
        s = np.where(k_positions <= q_positions[:, None], s, -np.inf)
    m, ell = online_softmax(np.full(s.shape[:-1], -np.inf), np.zeros(s.shape[:-1]), s)
    p = np.exp(s - np.where(np.isneginf(m), 0, m)[..., None])
    with np.errstate(divide="ignore"):
        out, lse = cuda.weighted_sum(p, v) / np.where(ell == 0, 1, ell)[..., None], m + np.log(ell)
    return merge_by_lse([state[0], out], [state[1], lse])


LOST_CONTACT = 5                                           # exit code of a rank whose neighbour went away

def ring_rank(rank, n_ranks, folder, shards, positions, causal, scale, time_limit, dies):
    """What one process of the ring runs. shards: its own q, k, v. Writes its output to a file in `folder`.

    dies: the rank that ends without a word after the first exchange, for the experiment, or None.
    """
    torch.set_num_threads(1)
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:                                           # gloo would look up the host's name, which may mean nothing
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    store = distributed.FileStore(str(folder / "store"), n_ranks)
    try:
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks,
                                       timeout=datetime.timedelta(seconds=time_limit))
        for step, state in enumerate(ring_steps(rank, n_ranks, *shards, positions, causal, scale)):
            if rank == dies and step == 0:
                raise SystemExit(3)
        np.save(folder / f"{rank}.npy", state[0])
        distributed.barrier()                              # nobody leaves while another still waits for a message
        distributed.destroy_process_group()
    except RuntimeError:                                   # gloo's, when a neighbour is gone or the time is up
        raise SystemExit(LOST_CONTACT) from None

def ring_steps(rank, n_ranks, q, k, v, positions, causal, scale):
    """The steps of one rank: sends its block on, receives the next, attends meanwhile. Yields its state after each."""
    state = np.zeros((len(q), v.shape[-1]), q.dtype), np.full(len(q), -np.inf, q.dtype)
    block = torch.from_numpy(np.concatenate([k, v], axis=-1))                   # one message for both
    for step in range(n_ranks):
        arriving, under_way = torch.empty_like(block), []
        if step < n_ranks - 1:
            under_way = [distributed.isend(block, (rank + 1) % n_ranks),
                         distributed.irecv(arriving, (rank - 1) % n_ranks)]
        keys, values = np.split(block.numpy(), [k.shape[-1]], axis=-1)
        state = attend_block(state, q, keys, values, positions[rank], positions[(rank - step) % n_ranks], causal, scale)
        for message in under_way:
            message.wait()
        block = arriving
        yield state


def wait_for(ranks, deadline, time_limit):
    """Return when all processes have ended well. RuntimeError as soon as one has not, and at the deadline."""
    while running := [rank for rank in ranks if rank.exitcode is None]:
        if not connection.wait([rank.sentinel for rank in running], max(0, deadline - time.monotonic())):
            late = [number for number, rank in enumerate(ranks) if rank.exitcode is None]
            raise RuntimeError(f"ranks {late} were not done after {time_limit:g} seconds; the ring was stopped")
        for number, rank in enumerate(ranks):
            if rank.exitcode not in (None, 0, LOST_CONTACT):
                raise RuntimeError(f"rank {number} of {len(ranks)} ended with exit code {rank.exitcode}; "
                                   "the ring was stopped")
    if lost := [number for number, rank in enumerate(ranks) if rank.exitcode == LOST_CONTACT]:
        raise RuntimeError(f"ranks {lost} of {len(ranks)} lost contact; the ring was stopped")


def ring_attention(q, k, v, n_ranks=4, causal=False, scale=None, striped=True, time_limit=120.0, dies=None):
    """Attention by a ring of processes on this machine, each with its share of the sequence. Returns (n, d_v).

    q, k (n, d_head), v (n, d_v), of one float type, n a multiple of n_ranks. striped: token i belongs to rank i mod
    n_ranks; otherwise each rank has a contiguous part. time_limit: seconds for everything, the start of the processes
    included. dies: a rank that ends after the first exchange, to see what happens then.
    Raises ValueError when shapes do not fit; RuntimeError, within the time limit, when a rank fails or is not done.
    """
    check_arguments(q, k, v)
    if n_ranks < 1:
        raise ValueError(f"n_ranks must be at least 1, got {n_ranks}")
    q, k, v = (a.astype(cuda.float_type(q), copy=False) for a in (q, k, v))
    if q.ndim != 2 or len(q) != len(k) or len(q) % n_ranks:
        raise ValueError(f"q and k must have the shape (n, d_head) with n a multiple of {n_ranks}, "
                         f"got {q.shape} and {k.shape}")
    positions = np.arange(len(q)).reshape(-1, n_ranks).T if striped else np.arange(len(q)).reshape(n_ranks, -1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    spawn, deadline = multiprocessing.get_context("spawn"), time.monotonic() + time_limit
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        ranks = [spawn.Process(target=ring_rank, daemon=True,
                               args=(rank, n_ranks, Path(name), (q[rows], k[rows], v[rows]), positions, causal, scale,
                                     time_limit, dies)) for rank, rows in enumerate(positions)]
        try:
            for rank in ranks:
                rank.start()
            wait_for(ranks, deadline, time_limit)
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    rank.kill()
                    rank.join()
        out = np.empty((len(q), v.shape[-1]), q.dtype)
        for rank, rows in enumerate(positions):
            out[rows] = np.load(Path(name) / f"{rank}.npy")
    return out


FLASH_HEAD = r"""
#define TILE 16                                          // threads that share a row of a tile; two rows are a warp
""" + ROW_OF_A_TILE.lstrip("\n") + r"""__device__ bool may_attend(int i, int j, int n_queries, int n_keys, int causal) {
  return i < n_queries && j < n_keys && (!causal || j <= i + n_keys - n_queries);
}
// How many keys the queries before `last` may attend to. Tiles behind them are not even loaded.
__device__ int visible_keys(int last, int n_queries, int n_keys, int causal) {
  return causal ? max(0, min(last, n_queries) + n_keys - n_queries) : n_keys;
}
// All threads copy n_rows rows of d floats, from row `first` on. What is not there becomes 0: rows from `end` on, and
// columns from d to width - 1.
__device__ void load_rows(float* tile, int n_rows, int width, int stride,
                          const float* rows, int first, int end, int d) {
  for (int e = threadIdx.y * blockDim.x + threadIdx.x; e < n_rows * width; e += blockDim.x * blockDim.y) {
    int r = e / width, c = e % width;
    tile[r * stride + c] = first + r < end && c < d ? rows[(size_t)(first + r) * d + c] : 0.0f;
  }
}
"""


FLASH_ROWS = r"""
#define ROWS 64                                          // queries of a block, one a thread
#define KEYS 16                                          // keys of a tile
template <int D>                                         // d, rounded up to a multiple of 16
__global__ void flash_rows(const float* q, const float* k, const float* v, float* out, float* lse,
                           int n_queries, int n_keys, int d, int causal, float scale) {
  __shared__ float k_tile[KEYS * D], v_tile[KEYS * D];
  int i = blockIdx.y * ROWS + threadIdx.x, visible = visible_keys((blockIdx.y + 1) * ROWS, n_queries, n_keys, causal);
  size_t head = blockIdx.x;
  q += (head * n_queries + i) * d, k += head * n_keys * d, v += head * n_keys * d;       // q: this thread's row
  float query[D], sum[D], s[KEYS], maximum = -INFINITY, total = 0.0f;
  for (int t = 0; t < D; ++t) query[t] = i < n_queries && t < d ? q[t] : 0.0f, sum[t] = 0.0f;
  for (int first = 0; first < visible; first += KEYS) {
    // load
    __syncthreads();                                     // the tiles of the last round have been used
    load_rows(k_tile, KEYS, D, D, k, first, visible, d);
    load_rows(v_tile, KEYS, D, D, v, first, visible, d);
    __syncthreads();                                     // the new tiles have arrived
    // score
    float highest = maximum;
    for (int j = 0; j < KEYS; ++j) {
      float product = 0.0f;
      for (int t = 0; t < D; ++t) product += query[t] * k_tile[j * D + t];
      s[j] = may_attend(i, first + j, n_queries, n_keys, causal) ? scale * product : -INFINITY;
      highest = fmaxf(highest, s[j]);
    }
    // rescale
    float shift = highest == -INFINITY ? 0.0f : highest; // no key so far: -inf minus -inf would be nan
    float factor = expf(maximum - shift);
    maximum = highest, total *= factor;
    for (int t = 0; t < D; ++t) sum[t] *= factor;
    // accumulate
    for (int j = 0; j < KEYS; ++j) {
      float weight = expf(s[j] - shift);
      total += weight;
      for (int t = 0; t < D; ++t) sum[t] += weight * v_tile[j * D + t];
    }
  }
  // write
  if (i >= n_queries) return;
  for (int t = 0; t < D; ++t)
    if (t < d) out[(head * n_queries + i) * d + t] = total == 0.0f ? 0.0f : sum[t] / total;
  lse[head * n_queries + i] = total == 0.0f ? -INFINITY : maximum + logf(total);
}
"""


SWIZZLE = r"""
__device__ int place(int row, int chunk, int chunks) {
  return row * chunks + (chunk ^ (row % 8));
}
"""


CHUNKS = r"""
template <int D> __device__ void load_chunks(float4* tile, int n_rows, const float* rows, int first, int end, int d) {
  for (int e = threadIdx.y * TILE + threadIdx.x; e < n_rows * (D / 4); e += TILE * TILE) {
    int r = e / (D / 4), chunk = e % (D / 4);
    const float* from = rows + (size_t)(first + r) * d + 4 * chunk;
    int left = first + r < end ? d - 4 * chunk : 0;      // columns that exist from here on
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (d % 4 == 0) {
      if (left > 0) four = *(const float4*)from;
    } else {
      if (left > 0) four.x = from[0];
      if (left > 1) four.y = from[1];
      if (left > 2) four.z = from[2];
      if (left > 3) four.w = from[3];
    }
    tile[place(r, chunk, D / 4)] = four;
  }
}
__device__ void store_chunk(float* to, int left, int d, float4 a) {
  if (d % 4 == 0) {
    if (left > 0) *(float4*)to = a;
  } else {
    if (left > 0) to[0] = a.x;
    if (left > 1) to[1] = a.y;
    if (left > 2) to[2] = a.z;
    if (left > 3) to[3] = a.w;
  }
}
__device__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
__device__ float4 times(float factor, float4 a) {
  return make_float4(factor * a.x, factor * a.y, factor * a.z, factor * a.w);
}
__device__ void add(float4& sum, float weight, float4 a) {
  sum.x += weight * a.x, sum.y += weight * a.y, sum.z += weight * a.z, sum.w += weight * a.w;
}
"""


REGISTER_STEPS = r"""
template <int D, int R, int C> __device__ void score(float (&s)[R][C], const float4* q_tile, const float4* k_tile) {
  for (int t = 0; t < D / 4; ++t) {
    float4 key[C];
    for (int c = 0; c < C; ++c) key[c] = k_tile[place(threadIdx.x + TILE * c, t, D / 4)];
    for (int r = 0; r < R; ++r) {
      float4 query = q_tile[place(threadIdx.y + TILE * r, t, D / 4)];
      for (int c = 0; c < C; ++c) s[r][c] += dot(query, key[c]);
    }
  }
}
// Turns the scores of a row into weights, in shared memory, and returns the factor for what was summed before.
template <int C> __device__ float rescale(const float (&s)[C], float* p_row, float& maximum, float& total) {
  float highest = -INFINITY;
  for (int c = 0; c < C; ++c) highest = fmaxf(highest, s[c]);
  highest = fmaxf(maximum, row_max(highest));
  float shift = highest == -INFINITY ? 0.0f : highest, factor = expf(maximum - shift);
  maximum = highest, total *= factor;
  for (int c = 0; c < C; ++c) {
    float weight = expf(s[c] - shift);
    p_row[threadIdx.x + TILE * c] = weight;
    total += weight;
  }
  return factor;
}
// Four weights and four chunks of V at a time.
template <int D, int R, int G> __device__ void accumulate(float4 (&sum)[R][G], const float* p_rows, int p_stride,
                                                          const float4* v_tile, int n_keys) {
  for (int j = 0; j < n_keys; j += 4) {
    float4 p[R];
    for (int r = 0; r < R; ++r) p[r] = *(const float4*)(p_rows + TILE * r * p_stride + j);
    for (int g = 0; g < G; ++g) {
      int chunk = threadIdx.x + TILE * g;
      if (chunk >= D / 4) continue;
      float4 v0 = v_tile[place(j, chunk, D / 4)], v1 = v_tile[place(j + 1, chunk, D / 4)];
      float4 v2 = v_tile[place(j + 2, chunk, D / 4)], v3 = v_tile[place(j + 3, chunk, D / 4)];
      for (int r = 0; r < R; ++r)
        add(sum[r][g], p[r].x, v0), add(sum[r][g], p[r].y, v1), add(sum[r][g], p[r].z, v2), add(sum[r][g], p[r].w, v3);
    }
  }
}
"""


FLASH_REGISTERS = r"""
template <int D, int BQ, int BK>                         // d rounded up to a multiple of 32; queries and keys of a tile
__global__ void flash_registers(const float* q, const float* k, const float* v, float* out, float* lse,
                                int n_queries, int n_keys, int d, int causal, float scale) {
  const int R = BQ / TILE, C = BK / TILE, CHUNKS = D / 4, G = (CHUNKS + TILE - 1) / TILE;
  const int P_STRIDE = BK + (BK % 32 == 0 ? 16 : 0);     // the two rows of a warp are 16 banks apart
  extern __shared__ float4 shared[];
  float4 *q_tile = shared, *k_tile = q_tile + BQ * CHUNKS, *v_tile = k_tile + BK * CHUNKS;
  int x = threadIdx.x, y = threadIdx.y, first_query = blockIdx.y * BQ;
  float* p_rows = (float*)(v_tile + BK * CHUNKS) + y * P_STRIDE;          // of this thread: rows y, y + 16, ...
  size_t head = blockIdx.x;
  q += head * n_queries * d, k += head * n_keys * d, v += head * n_keys * d;
  int visible = visible_keys(first_query + BQ, n_queries, n_keys, causal);
  load_chunks<D>(q_tile, BQ, q, first_query, n_queries, d);
  float maximum[R], total[R] = {};
  float4 sum[R][G] = {};
  for (int r = 0; r < R; ++r) maximum[r] = -INFINITY;
  for (int first = 0; first < visible; first += BK) {
    __syncthreads();
    load_chunks<D>(k_tile, BK, k, first, visible, d);
    load_chunks<D>(v_tile, BK, v, first, visible, d);
    __syncthreads();
    float s[R][C] = {};
    score<D>(s, q_tile, k_tile);
    for (int r = 0; r < R; ++r) {
      int i = first_query + y + TILE * r;
      for (int c = 0; c < C; ++c)
        s[r][c] = may_attend(i, first + x + TILE * c, n_queries, n_keys, causal) ? scale * s[r][c] : -INFINITY;
      float factor = rescale(s[r], p_rows + TILE * r * P_STRIDE, maximum[r], total[r]);
      for (int g = 0; g < G; ++g) sum[r][g] = times(factor, sum[r][g]);
    }
    __syncwarp();                                        // rows of weights belong to one warp
    accumulate<D>(sum, p_rows, P_STRIDE, v_tile, BK);
  }
  // write
  for (int r = 0; r < R; ++r) {
    int i = first_query + y + TILE * r;
    float all = row_sum(total[r]), share = all == 0.0f ? 0.0f : 1.0f / all;
    if (i >= n_queries) continue;
    for (int g = 0, c = 4 * x; g < G; ++g, c += 4 * TILE)
      store_chunk(out + (head * n_queries + i) * d + c, d - c, d, times(share, sum[r][g]));
    if (x == 0) lse[head * n_queries + i] = all == 0.0f ? -INFINITY : maximum[r] + logf(all);
  }
}
"""


HALF_TILES = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
typedef half element;
using namespace nvcuda;
typedef wmma::fragment<wmma::matrix_a, 16, 16, 16, element, wmma::row_major> Left;
typedef wmma::fragment<wmma::matrix_b, 16, 16, 16, element, wmma::row_major> Right;
typedef wmma::fragment<wmma::matrix_b, 16, 16, 16, element, wmma::col_major> RightTransposed;
typedef wmma::fragment<wmma::accumulator, 16, 16, 16, float> Sum;

// As load_rows, for a block of one dimension. Rows are padded by 16 bytes, which wmma allows.
template <int D> __device__ void load_half(element* tile, int n_rows, const element* rows, int first, int end, int d) {
  for (int e = threadIdx.x; e < n_rows * D; e += blockDim.x) {
    int r = e / D, c = e % D;
    tile[r * (D + 8) + c] = first + r < end && c < d ? rows[(size_t)(first + r) * d + c] : element(0.0f);
  }
}
// s = q k^T, for 16 queries and BK keys.
template <int D, int BK> __device__ void score_half(float* s, const element* q, const element* k) {
  for (int c = 0; c < BK; c += 16) {
    Left a; RightTransposed b; Sum sum;
    wmma::fill_fragment(sum, 0.0f);
    for (int t = 0; t < D; t += 16) {
      wmma::load_matrix_sync(a, q + t, D + 8);
      wmma::load_matrix_sync(b, k + c * (D + 8) + t, D + 8);
      wmma::mma_sync(sum, a, b, sum);
    }
    wmma::store_matrix_sync(s + c, sum, BK + 4, wmma::mem_row_major);
  }
}
// o += p v
template <int D, int BK> __device__ void accumulate_half(float* o, const element* p, const element* v) {
  for (int t = 0; t < D; t += 16) {
    Left a; Right b; Sum sum;
    wmma::load_matrix_sync(sum, o + t, D + 4, wmma::mem_row_major);
    for (int c = 0; c < BK; c += 16) {
      wmma::load_matrix_sync(a, p + c, BK + 8);
      wmma::load_matrix_sync(b, v + c * (D + 8) + t, D + 8);
      wmma::mma_sync(sum, a, b, sum);
    }
    wmma::store_matrix_sync(o + t, sum, D + 4, wmma::mem_row_major);
  }
}
"""


HALF_ROWS = r"""
// Scores of a row into weights in half precision; what was summed before is rescaled. total: of this lane's columns.
template <int D, int BK> __device__ void rescale_half(float* s_row, element* p_row, float* o_row,
                                                      float& maximum, float& total) {
  int odd = threadIdx.x % 2;
  float highest = -INFINITY;
  for (int c = odd; c < BK; c += 2) highest = fmaxf(highest, s_row[c]);
  highest = fmaxf(maximum, fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 1)));
  float shift = highest == -INFINITY ? 0.0f : highest, factor = expf(maximum - shift);
  maximum = highest, total *= factor;
  for (int c = odd; c < BK; c += 2) {
    float weight = expf(s_row[c] - shift);
    p_row[c] = element(weight), total += weight;
  }
  for (int c = odd; c < D; c += 2) o_row[c] *= factor;
}
// The 16 rows of a warp, one after another and all lanes side by side. Lanes 2 r and 2 r + 1 know the share of row r.
__device__ void write_half(element* out, const float* o_rows, int stride, float share, int n_rows, int d) {
  for (int r = 0; r < 16; ++r) {
    float of_row = __shfl_sync(0xffffffff, share, 2 * r);
    for (int c = threadIdx.x % 32; c < d && r < n_rows; c += 32)
      out[(size_t)r * d + c] = element(of_row * o_rows[r * stride + c]);
  }
}
"""


FLASH_TENSOR_CORES = r"""
template <int D, int BQ, int BK>                         // d rounded up to a multiple of 16; queries and keys of a tile
__global__ void flash_tensor_cores(const element* q, const element* k, const element* v, element* out, float* lse,
                                   int n_queries, int n_keys, int d, int causal, float scale) {
  extern __shared__ __align__(128) float shared[];
  int own = threadIdx.x / 32 * 16, row = own + threadIdx.x % 32 / 2, odd = threadIdx.x % 2;
  int first_query = blockIdx.y * BQ, i = first_query + row;
  float *o_tile = shared, *o_row = o_tile + row * (D + 4);
  float *s_tile = o_tile + BQ * (D + 4), *s_row = s_tile + row * (BK + 4);
  element *q_tile = (element*)(s_tile + BQ * (BK + 4)), *k_tile = q_tile + BQ * (D + 8);
  element *v_tile = k_tile + BK * (D + 8), *p_tile = v_tile + BK * (D + 8), *p_row = p_tile + row * (BK + 8);
  size_t head = blockIdx.x;
  q += head * n_queries * d, k += head * n_keys * d, v += head * n_keys * d;
  int visible = visible_keys(first_query + BQ, n_queries, n_keys, causal);

  load_half<D>(q_tile, BQ, q, first_query, n_queries, d);
  for (int c = odd; c < D; c += 2) o_row[c] = 0.0f;
  float maximum = -INFINITY, total = 0.0f;
  for (int first = 0; first < visible; first += BK) {
    __syncthreads();
    load_half<D>(k_tile, BK, k, first, visible, d);
    load_half<D>(v_tile, BK, v, first, visible, d);
    __syncthreads();
    score_half<D, BK>(s_tile + own * (BK + 4), q_tile + own * (D + 8), k_tile);
    __syncwarp();
    for (int c = odd; c < BK; c += 2)
      s_row[c] = may_attend(i, first + c, n_queries, n_keys, causal) ? scale * s_row[c] : -INFINITY;
    rescale_half<D, BK>(s_row, p_row, o_row, maximum, total);
    __syncwarp();
    accumulate_half<D, BK>(o_tile + own * (D + 4), p_tile + own * (BK + 8), v_tile);
  }
  // write
  __syncwarp();
  total += __shfl_xor_sync(0xffffffff, total, 1);
  float share = total == 0.0f ? 0.0f : 1.0f / total;
  write_half(out + (head * n_queries + first_query + own) * d, o_tile + own * (D + 4), D + 4, share,
             n_queries - first_query - own, d);
  if (odd == 0 && i < n_queries) lse[head * n_queries + i] = total == 0.0f ? -INFINITY : maximum + logf(total);
}
"""


FLASH_D_Q = r"""
__device__ float dot_rows(const float* a, const float* b, int d) {
  float sum = 0.0f;
  for (int t = 0; t < d; ++t) sum += a[t] * b[t];
  return sum;
}
// A block for each tile of queries. Also writes delta, the D of the formulas, for the other kernel.
template <int D>                                         // d, rounded up to a multiple of 16
__global__ void flash_d_q(const float* q, const float* k, const float* v, const float* out, const float* lse,
                          const float* d_out, float* delta, float* d_q,
                          int n_queries, int n_keys, int d, int causal, float scale) {
  extern __shared__ float shared[];
  int stride = d + PAD, x = threadIdx.x, y = threadIdx.y, i = blockIdx.y * TILE + y;
  float *q_tile = shared, *g_tile = q_tile + TILE * stride, *k_tile = g_tile + TILE * stride;
  float *v_tile = k_tile + TILE * stride, *ds_row = v_tile + TILE * stride + y * (TILE + PAD);
  size_t head = blockIdx.x, row = head * n_queries + i;
  q += head * n_queries * d, d_out += head * n_queries * d, k += head * n_keys * d, v += head * n_keys * d;
  int visible = visible_keys((blockIdx.y + 1) * TILE, n_queries, n_keys, causal);
  load_rows(q_tile, TILE, d, stride, q, blockIdx.y * TILE, n_queries, d);
  load_rows(g_tile, TILE, d, stride, d_out, blockIdx.y * TILE, n_queries, d);
  __syncthreads();
  float share = 0.0f, log_sum = i < n_queries ? lse[row] : 0.0f, sum[D / TILE] = {};
  for (int c = x; c < d && i < n_queries; c += TILE) share += g_tile[y * stride + c] * out[row * d + c];
  share = row_sum(share);
  if (x == 0 && i < n_queries) delta[row] = share;
  for (int first = 0; first < visible; first += TILE) {
    __syncthreads();
    load_rows(k_tile, TILE, d, stride, k, first, visible, d);
    load_rows(v_tile, TILE, d, stride, v, first, visible, d);
    __syncthreads();
    float s = scale * dot_rows(q_tile + y * stride, k_tile + x * stride, d);
    float p = may_attend(i, first + x, n_queries, n_keys, causal) ? expf(s - log_sum) : 0.0f;
    ds_row[x] = p * (dot_rows(g_tile + y * stride, v_tile + x * stride, d) - share);
    __syncwarp();
    for (int c = 0; c < D / TILE; ++c)
      for (int r = 0; r < TILE && x + TILE * c < d; ++r) sum[c] += ds_row[r] * k_tile[r * stride + x + TILE * c];
  }
  for (int c = 0; c < D / TILE; ++c)
    if (i < n_queries && x + TILE * c < d) d_q[row * d + x + TILE * c] = scale * sum[c];
}
"""


FLASH_D_KV = r"""
// A block for each tile of keys. The queries now lie along x, and begin with the first that may see a key of the tile.
template <int D>
__global__ void flash_d_kv(const float* q, const float* k, const float* v, const float* lse, const float* delta,
                           const float* d_out, float* d_k, float* d_v,
                           int n_queries, int n_keys, int d, int causal, float scale) {
  extern __shared__ float shared[];
  int stride = d + PAD, x = threadIdx.x, y = threadIdx.y, j = blockIdx.y * TILE + y;
  float *q_tile = shared, *g_tile = q_tile + TILE * stride, *k_tile = g_tile + TILE * stride;
  float *v_tile = k_tile + TILE * stride, *p_row = v_tile + TILE * stride + y * (TILE + PAD);
  float* ds_row = p_row + TILE * (TILE + PAD);
  size_t head = blockIdx.x, row = head * n_keys + j;
  q += head * n_queries * d, d_out += head * n_queries * d, lse += head * n_queries, delta += head * n_queries;
  load_rows(k_tile, TILE, d, stride, k + head * n_keys * d, blockIdx.y * TILE, n_keys, d);
  load_rows(v_tile, TILE, d, stride, v + head * n_keys * d, blockIdx.y * TILE, n_keys, d);
  float k_sum[D / TILE] = {}, v_sum[D / TILE] = {};
  int start = causal ? max(0, (int)blockIdx.y * TILE + n_queries - n_keys) : 0;
  for (int first = start; first < n_queries; first += TILE) {
    __syncthreads();
    load_rows(q_tile, TILE, d, stride, q, first, n_queries, d);
    load_rows(g_tile, TILE, d, stride, d_out, first, n_queries, d);
    __syncthreads();
    int i = first + x;
    bool allowed = may_attend(i, j, n_queries, n_keys, causal);
    float s = scale * dot_rows(q_tile + x * stride, k_tile + y * stride, d);
    p_row[x] = allowed ? expf(s - lse[i]) : 0.0f;
    ds_row[x] = allowed ? p_row[x] * (dot_rows(g_tile + x * stride, v_tile + y * stride, d) - delta[i]) : 0.0f;
    __syncwarp();
    for (int c = 0; c < D / TILE; ++c)
      for (int r = 0; r < TILE && x + TILE * c < d; ++r) {
        v_sum[c] += p_row[r] * g_tile[r * stride + x + TILE * c];
        k_sum[c] += ds_row[r] * q_tile[r * stride + x + TILE * c];
      }
  }
  for (int c = 0; c < D / TILE; ++c)
    if (j < n_keys && x + TILE * c < d)
      d_k[row * d + x + TILE * c] = scale * k_sum[c], d_v[row * d + x + TILE * c] = v_sum[c];
}
"""


def flash_bytes(n_queries, n_keys, d, block_q, causal=False, itemsize=4):
    """Bytes of global memory that one head of a flash kernel asks for: (loaded, stored), exactly.

    block_q: queries of a block; itemsize: bytes of an entry of q, k, v and the output. The log-sum-exp has 4 bytes.
    """
    last = [min(first + block_q, n_queries) for first in range(0, n_queries, block_q)]     # one after each block's last
    visible = sum(max(0, end + n_keys - n_queries) if causal else n_keys for end in last)
    return itemsize * (n_queries * d + 2 * d * visible), itemsize * n_queries * d + 4 * n_queries


@functools.cache
def flash_kernel(rung, *template):
    """One rung of the ladder, compiled on first use: "rows", "shared", "registers", "half", "bfloat16" or "mma"."""
    if rung == "rows":
        return cuda.compile(FLASH_HEAD + FLASH_ROWS, name="flash_rows", template=template)
    if rung == "shared":
        return cuda.compile(FLASH_HEAD + FLASH_SHARED, name="flash_shared")
    if rung == "registers":
        return cuda.compile(FLASH_HEAD + SWIZZLE + CHUNKS + REGISTER_STEPS + FLASH_REGISTERS, name="flash_registers",
                            template=template)
    if rung == "mma":
        return cuda.compile(FLASH_HEAD + HALF_TILES + MMA + MMA_STEPS + FLASH_MMA, name="flash_mma", template=template)
    if rung == "half":
        return cuda.compile(FLASH_HEAD + HALF_TILES + HALF_ROWS + FLASH_TENSOR_CORES, name="flash_tensor_cores",
                            template=template)
    return cuda.compile(FLASH_HEAD + HALF_TILES.replace("typedef half", "typedef __nv_bfloat16") + HALF_ROWS
                        + FLASH_TENSOR_CORES, name="flash_tensor_cores", template=template)

def registers_bytes(width, rows, keys):
    """Shared memory of flash_registers<width, rows, keys>."""
    return 4 * (width * (rows + 2 * keys) + rows * (keys + (16 if keys % 32 == 0 else 0)))

def tensor_cores_bytes(width, rows, keys):
    """Shared memory of flash_tensor_cores<width, rows, keys>."""
    return 4 * rows * (width + keys + 8) + 2 * ((rows + 2 * keys) * (width + 8) + rows * (keys + 8))

def mma_bytes(width, warps):
    """Shared memory of flash_mma<width, warps>: keys and values, 64 at a time; the queries pass through the keys' place."""
    return 2 * (width + 8) * (max(16 * warps, 64) + 64)

def tile_sizes(block_q, block_k, shared_bytes, available=48 * 1024):
    """Multiples of 16 up to 64, near those asked for, that fit: (queries, keys). The keys give way first."""
    rows, keys = (min(64, 16 * math.ceil(block / 16)) for block in (block_q, block_k))
    while shared_bytes(rows, keys) > available and (rows, keys) != (16, 16):
        rows, keys = (rows, keys - 16) if keys > 16 else (rows - 16, keys)
    return rows, keys


RUNGS = {"rows": None, "shared": None, "registers": None, "large": 96, "half": None, "bfloat16": None, "mma": 128}   # d

def flash_launch(rung, q, k, v, causal=False, scale=None, block_q=None, block_k=None):
    """What launches a rung on tensors (heads, seq, d) of its type: kernel, (grid, block, shared bytes), arguments.

    rung: as in flash_kernel; "large" are register tiles of 128 x 128, d up to 96: they need more shared memory than 48
    KB, and for more columns more than any GPU has. "mma" takes 128 queries, d up to 128. The fourth and fifth argument
    are the output and the log-sum-exp, in single precision, both to be written. Raises ValueError for another rung, and
    for a larger d.
    """
    (n_heads, n_queries, d), n_keys = q.shape, k.shape[1]
    if rung not in RUNGS:
        raise ValueError(f"rung must be one of {', '.join(RUNGS)}, got {rung!r}")
    if RUNGS[rung] and d > RUNGS[rung]:
        raise ValueError(f'rung "{rung}" takes d up to {RUNGS[rung]}, got {d}')
    block_q, block_k = (64 if block is None else block for block in (block_q, block_k))
    step = 32 if rung in ("registers", "large") else 16
    width = step * math.ceil(d / step)
    if rung == "rows":
        template, rows, block, shared = (width,), 64, 64, 0
    elif rung == "shared":
        template, rows, block, shared = (), 16, (16, 16), 4 * 16 * (4 * (d + 1) + 17)
    elif rung == "large":
        template, rows, block, shared = (width, 128, 128), 128, (16, 16), registers_bytes(width, 128, 128)
    elif rung == "mma":
        template, rows, block, shared = (width, 8), 128, 256, mma_bytes(width, 8)
    else:
        needs = functools.partial(registers_bytes if rung == "registers" else tensor_cores_bytes, width)
        rows, keys = tile_sizes(block_q, block_k, needs)
        template, shared = (width, rows, keys), needs(rows, keys)
        block = (16, 16) if rung == "registers" else 2 * rows                             # a warp for 16 queries
    out = torch.zeros_like(q)
    lse = torch.full((n_heads, n_queries), -math.inf, device=q.device)
    scale = 1 / math.sqrt(d) if scale is None else float(scale)
    arguments = q, k, v, out, lse, n_queries, n_keys, d, int(causal), scale
    rung = "registers" if rung == "large" else rung
    return flash_kernel(rung, *template), ((n_heads, math.ceil(n_queries / rows)), block, shared), arguments


def as_heads(arrays, dtype):
    """Arrays or tensors (..., seq, d) as tensors (heads, seq, d) of one type, and their leading axes.

    A smaller last axis is filled up with zeros, which change no dot product.
    """
    tensors = cuda.on_device(*arrays, dtype=dtype)
    lead, d = torch.broadcast_shapes(*(t.shape[:-2] for t in tensors)), max(t.shape[-1] for t in tensors)
    heads = []
    for t in tensors:
        t = F.pad(t, (0, d - t.shape[-1])).expand(*lead, t.shape[-2], d)
        t = t.reshape(math.prod(lead), t.shape[-2], d).contiguous()
        heads.append(t.clone() if t.data_ptr() % 16 else t)                     # chunks begin at multiples of 16 bytes
    return heads, lead


@cuda.skip_unseen
def flash_attention_cuda(q, k, v, causal=False, scale=None, block_q=None, block_k=None):
    """Exact attention that never stores the scores, as a CUDA kernel; arguments and errors as flash_attention_numpy.

    q (..., n_queries, d), k (..., n_keys, d), v (..., n_keys, d_v), leading axes broadcast. NumPy arrays and CPU
    tensors run on the CPU, CUDA tensors on the GPU. Half precision and bfloat16 use tensor cores and sum in single
    precision; other types are computed in single. Returns (out, lse): out (..., n_queries, d_v) in the kind and type of
    q, lse (..., n_queries) in double for double and in single otherwise. A query with nothing to attend to has output
    0 and lse -inf. Not differentiable. The kernel takes tiles near block_q and block_k: multiples of 16 up to 64
    (64 by default), smaller where shared memory is short. d up to 1,184, on sm_80 864, on sm_120 512. Raises ValueError when shapes or
    block sizes do not fit.
    Source: Dao 2023 (FlashAttention-2, arXiv 2307.08691), algorithm 1.
    """
    check_arguments(q, k, v)
    check_blocks(*(1 if block is None else block for block in (block_q, block_k)))
    leading_axes(q, k, v)
    dtype = cuda.float_type(q)
    rung = {"float16": "half", "bfloat16": "bfloat16"}.get(str(dtype).removeprefix("torch."), "registers")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    heads, lead = as_heads((q, k, v), {"half": torch.float16, "bfloat16": torch.bfloat16}.get(rung, torch.float32))
    kernel, launch, arguments = flash_launch(rung, *heads, causal, scale, block_q, block_k)
    out, lse = arguments[3:5]
    if out.numel() and k.shape[-2]:
        kernel.fast[launch](*arguments)
    out = out[..., :v.shape[-1]].reshape(*lead, q.shape[-2], v.shape[-1])
    lse_type = torch.float64 if str(dtype).endswith("float64") else torch.float32
    return cuda.like(out, q), cuda.like(lse.reshape(*lead, q.shape[-2]), q, lse_type)


@functools.cache
def backward_kernel(name, width):
    """flash_d_q or flash_d_kv for d up to width, a multiple of 16, compiled on first use."""
    return cuda.compile(FLASH_HEAD + FLASH_D_Q + FLASH_D_KV, name=name, template=(width,))

def backward_launches(q, k, v, out, lse, d_out, causal, scale):
    """[(kernel, (grid, block, shared bytes), arguments)] of the two kernels, and the gradients that they write.

    Tensors (heads, seq, d) and (heads, n_queries), single precision.
    """
    (n_heads, n_queries, d), n_keys = q.shape, k.shape[1]
    d_q, d_k, d_v, delta = (torch.zeros_like(a) for a in (q, k, v, lse))
    width, shared = 16 * math.ceil(d / 16), 4 * 16 * (4 * (d + 1) + 2 * 17)
    sizes = n_queries, n_keys, d, int(causal), float(scale)
    launches = [(backward_kernel(name, width), ((n_heads, math.ceil(seq / 16)), (16, 16), shared), (*arrays, *sizes))
                for name, seq, arrays in (("flash_d_q", n_queries, (q, k, v, out, lse, d_out, delta, d_q)),
                                          ("flash_d_kv", n_keys, (q, k, v, lse, delta, d_out, d_k, d_v)))]
    return launches, (d_q, d_k, d_v)

def flash_attention_backward_cuda(q, k, v, out, lse, d_out, causal=False, scale=None):
    """Gradients of flash attention by two CUDA kernels, without atomics; as flash_attention_backward_numpy.

    q, k and v with equal leading axes; out and lse are what the forward pass returned, d_out is the gradient of out.
    Computed in single precision. Returns (d_q, d_k, d_v) in the shapes and types of q, k and v. d up to 898, on sm_80
    642, on sm_120 386; at most 1,048,560 queries and as many keys. Raises ValueError when shapes do not fit.
    Source: Dao 2023 (arXiv 2307.08691), algorithm 2, with its loop taken apart in two.
    """
    check_backward(q, k, v, out, lse, d_out)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    (q_, k_, v_, out_, d_out_), _ = as_heads((q, k, v, out, d_out), torch.float32)
    (lse_,), _ = as_heads((lse[..., None],), torch.float32)
    launches, gradients = backward_launches(q_, k_, v_, out_, lse_[..., 0], d_out_, causal, scale)
    if q_.numel() and k_.numel():
        for kernel, launch, arguments in launches:
            kernel.fast[launch](*arguments)
    gradients = [g[..., :a.shape[-1]].reshape(a.shape) for g, a in zip(gradients, (q, k, v))]
    return tuple(cuda.like(g, a) for g, a in zip(gradients, (q, k, v)))
