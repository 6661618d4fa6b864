# Generated from solutions/08_grouped_query_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 08 · Grouped-query attention: the finished code."""

import functools
import math

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from attention.fundamentals import attention_numpy, attention_torch, causal_mask, softmax
from attention.kv_cache import WARP, merge_kernel
from attention.multi_head import Positions, merge_heads, split_heads
from utils import cuda

__all__ = [
    "grouped_query_attention_numpy",
    "grouped_query_attention_torch",
    "grouped_query_attention_cuda",
    "GroupedQueryAttention",
    "merge_kv_heads",
    "aligned_merge",
    "cache_per_device",
]


def grouped_attention(q, k, v, causal=False):
    """Attention of n_heads queries on n_kv_heads keys and values; neighbours share.

    q (..., n_heads, n_queries, d_head), k and v (..., n_kv_heads, n_keys, d_head).
    Returns the shape and float type of q. ValueError unless n_kv_heads divides n_heads.
    Source: Ainslie et al. 2023 (arXiv 2305.13245), section 2.2.
    """
    n_heads, n_kv_heads = q.shape[-3], k.shape[-3]
    if n_kv_heads == 0 or n_heads % n_kv_heads:
        raise ValueError("n_heads must be a multiple of n_kv_heads, "
                         f"got {n_heads} and {n_kv_heads}")
    parts = n_kv_heads, n_heads // n_kv_heads
    grouped = q.reshape(*q.shape[:-3], *parts, *q.shape[-2:])
    scores = np.einsum("...hgid,...hjd->...hgij", grouped, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = np.where(causal_mask(*scores.shape[-2:]), scores, -np.inf)
    out = np.einsum("...hgij,...hjd->...hgid", softmax(scores), v)
    return out.reshape(q.shape).astype(q.dtype, copy=False)


def grouped_step(q, k_new, v_new, k_old, v_old):
    """New tokens join a cache and attend to it, causally. NumPy, one sequence.

    q (n_heads, n_new, d_head); k_new, v_new (n_kv_heads, n_new, d_head); k_old, v_old
    (n_kv_heads, n_old, d_head). Returns out (n_heads, n_new, d_head) and the cache:
    k and v (n_kv_heads, n_old + n_new, d_head).
    """
    k = np.concatenate([k_old, k_new], axis=1)
    v = np.concatenate([v_old, v_new], axis=1)
    return grouped_attention(q, k, v, causal=True), k, v


def test_step(step):
    """Raise AssertionError if step(q, k_new, v_new, k_old, v_old) is wrong."""
    rng = np.random.default_rng(1)
    q, k, v = (2 * rng.standard_normal((heads, 7, 4)) for heads in (6, 2, 2))
    k_old, v_old = np.zeros((2, 2, 0, 4))
    for begin, end in ((0, 3), (3, 5), (5, 7)):
        new = slice(begin, end)
        out, k_old, v_old = step(q[:, new], k[:, new], v[:, new], k_old, v_old)
        assert k_old.shape == v_old.shape == (2, end, 4), "a cache of other heads"
        assert np.allclose(k_old, k[:, :end]) and np.allclose(v_old, v[:, :end])
        for h in range(6):
            for i in range(begin, end):
                powers = np.exp(q[h, i] @ k[h // 3, :i + 1].T / 2)
                expected = powers @ v[h // 3, :i + 1] / powers.sum()
                assert np.allclose(out[h, i - begin], expected), (h, i)


def aligned_merge(v, w_v, w_o, n_kv_heads):
    """Turn the value heads of each group onto its first one, then average them.

    v (n_heads, n_tokens, d_head), w_v (n_heads, d_model, d_head), w_o (n_heads, d_head,
    d_out). Returns merged (n_kv_heads, d_model, d_head) and w_o turned back, as w_o.
    ValueError unless n_kv_heads divides n_heads. Source: arXiv 2412.20677.
    """
    if n_kv_heads < 1 or len(v) % n_kv_heads:
        raise ValueError("n_heads must be a multiple of n_kv_heads, "
                         f"got {len(v)} and {n_kv_heads}")
    group = len(v) // n_kv_heads
    merged, turned = np.zeros((n_kv_heads, *w_v.shape[1:])), np.zeros(w_o.shape)
    for h in range(len(v)):
        u, _, vt = np.linalg.svd(v[h].T @ v[h // group * group])
        rotation = u @ vt
        merged[h // group] += w_v[h] @ rotation / group
        turned[h] = rotation.T @ w_o[h]
    return merged, turned


class GroupedQueryAttention(nn.Module):
    """Self-attention of n_heads query heads on n_kv_heads heads of keys and values.

    positions: rotates queries and keys, as in MultiHeadAttention; by default nothing.
    ValueError unless n_kv_heads divides n_heads and n_heads divides d_model.
    """

    def __init__(self, d_model, n_heads, n_kv_heads, positions=None):
        super().__init__()
        if n_heads < 1 or d_model % n_heads or n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError("n_kv_heads must divide n_heads and n_heads d_model, "
                             f"got {n_kv_heads}, {n_heads} and {d_model}")
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.positions = Positions() if positions is None else positions
        d_kv = d_model // n_heads * n_kv_heads
        self.w_q, self.w_k, self.w_v, self.w_o = (
            nn.Parameter(torch.randn(d_model, columns) * d_model**-0.5)
            for columns in (d_model, d_kv, d_kv, d_model))

    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        q = split_heads(x @ self.w_q, self.n_heads)
        k, v = (split_heads(x @ w, self.n_kv_heads) for w in (self.w_k, self.w_v))
        q, k = (self.positions.rotate(heads, positions) for heads in (q, k))
        if cache is not None:
            k, v = cache.update(k, v)
        return merge_heads(grouped_query_attention_torch(q, k, v, mask, causal)) @ self.w_o


def uptraining_step(model, optimiser, ids):
    """One step on the next-token loss of ids (batch, n), gradients clipped to norm 1.

    model(ids): logits (batch, n, vocab_size). Returns the loss before it, a float.
    """
    loss = nn.functional.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()


GROUP_TILE = WARP + r"""
#define KEYS 16                                          // rows of a tile
// All threads copy n rows of d columns into rows of 32 C floats, zeros behind them.
template <int C, typename T>
__device__ void load_tile(float* tile, const T* from, int n, int d) {
  for (int e = threadIdx.y * 32 + threadIdx.x; e < n * 32 * C; e += blockDim.y * 32) {
    int r = e / (32 * C);
    int c = e % (32 * C);
    tile[e] = c < d ? (float)from[(size_t)r * d + c] : 0.0f;
  }
}
// This lane's columns of a query, times the scale.
template <int C>
__device__ void load_query(float (&query)[C], const float* q, int d, float scale) {
  for (int c = 0; c < C; ++c) {
    int column = 32 * c + threadIdx.x;
    query[c] = column < d ? scale * q[column] : 0.0f;
  }
}
// The scores of a tile's n keys with this warp's query: lane t gets that of key t.
template <int C>
__device__ float score_keys(const float (&query)[C], const float* k_tile, int n) {
  float score = -INFINITY;
  for (int t = 0; t < n; ++t) {
    float s = 0.0f;
    for (int c = 0; c < C; ++c) s += query[c] * k_tile[(t * C + c) * 32 + threadIdx.x];
    s = warp_sum(s);
    if (threadIdx.x == t) score = s;
  }
  return score;
}
"""


GROUP_ROW = r"""
// Whether query i may see key j. allowed: this row of the mask, read only if there is one.
__device__ bool sees(const unsigned char* allowed, int i, int j, int n_queries, int n_keys,
                     int masked, int causal) {
  if (causal && j > i + n_keys - n_queries) return false;
  return !masked || allowed[j];
}
// From the score of a lane's key to its weight; returns the factor for what was summed before.
__device__ float rescale(float score, float& weight, float& maximum, float& total) {
  float larger = fmaxf(maximum, warp_max(score));
  float top = larger == -INFINITY ? 0.0f : larger;       // no key so far: -inf minus -inf is nan
  float shrink = expf(maximum - top);
  weight = expf(score - top);
  total = shrink * total + warp_sum(weight);
  maximum = larger;
  return shrink;
}
// How many keys the rows r to last of a group may see. Row r is query r % n_queries of its head.
__device__ int keys_of_block(int r, int last, int n_queries, int n_keys, int causal) {
  bool one_head = r / n_queries == last / n_queries;
  int latest = one_head ? last % n_queries : n_queries - 1;
  return causal ? max(0, latest + 1 + n_keys - n_queries) : n_keys;
}
"""


GROUPED_SPLIT = GROUP_TILE + GROUP_ROW + r"""
template <typename T, int C>                             // 32 C >= d and d_v
__global__ __launch_bounds__(1024) void grouped_split(const float* q, const T* k, const T* v,
    const unsigned char* allowed, float* outs, double* lses, int rows, int n_queries, int n_keys,
    int d, int d_v, int split, int masked, int causal, float scale) {
  extern __shared__ float k_tile[];                      // KEYS rows of 32 C floats, twice
  float* v_tile = k_tile + KEYS * 32 * C;
  int lane = threadIdx.x;
  int top = blockIdx.y * blockDim.y;                     // rows of the group above this block
  int r = min(top + (int)threadIdx.y, rows - 1);         // this warp's row
  int visible = keys_of_block(top, min(top + (int)blockDim.y, rows) - 1, n_queries, n_keys, causal);
  int begin = blockIdx.z * split;
  int end = min(begin + split, visible);
  size_t head = blockIdx.x;                              // of keys and values
  size_t row = head * rows + r, part = row * gridDim.z + blockIdx.z;
  float query[C];
  load_query<C>(query, q + row * d, d, scale);
  float sum[C] = {};
  float maximum = -INFINITY, total = 0.0f;
  for (int first = begin; first < end; first += KEYS) {
    int n = min(KEYS, end - first);
    __syncthreads();                                     // the last tiles are used up
    load_tile<C>(k_tile, k + (head * n_keys + first) * d, n, d);
    load_tile<C>(v_tile, v + (head * n_keys + first) * d_v, n, d_v);
    __syncthreads();                                     // the new tiles are there
    float score = score_keys<C>(query, k_tile, n);       // of key `lane`
    bool seen = lane < n && sees(allowed + row * n_keys, r % n_queries, first + lane, n_queries,
                                 n_keys, masked, causal);
    score = seen ? score : -INFINITY;                    // before the softmax
    float weight;
    float shrink = rescale(score, weight, maximum, total);
    for (int c = 0; c < C; ++c) sum[c] *= shrink;
    for (int t = 0; t < n; ++t) {
      float w = __shfl_sync(0xffffffff, weight, t);
      for (int c = 0; c < C; ++c) sum[c] += w * v_tile[(t * C + c) * 32 + lane];
    }
  }
  if (top + threadIdx.y >= rows) return;                 // a warp without a row only helped to load
  for (int c = 0; c < C && 32 * c + lane < d_v; ++c)
    outs[part * d_v + 32 * c + lane] = sum[c] / (total == 0.0f ? 1.0f : total);
  if (lane == 0) lses[part] = (double)maximum + logf(total);
}
"""


def cache_per_device(n_layers, n_kv_heads, d_head, n_devices=1, n_shared_layers=0,
                     n_bytes=2):
    """Bytes of keys and values that one token takes on each of n_devices devices.

    n_shared_layers store nothing. With more devices than heads, heads are copied.
    Returns an integer. ValueError unless n_kv_heads and n_devices divide one another.
    """
    if n_kv_heads < 1 or n_devices < 1:
        raise ValueError("n_kv_heads and n_devices must be at least 1, "
                         f"got {n_kv_heads} and {n_devices}")
    if n_kv_heads % n_devices and n_devices % n_kv_heads:
        raise ValueError("one of n_kv_heads and n_devices must divide the other, "
                         f"got {n_kv_heads} and {n_devices}")
    heads = max(1, n_kv_heads // n_devices)
    return 2 * (n_layers - n_shared_layers) * heads * d_head * n_bytes


def check_grouped_arguments(q, k, v, mask=None):
    """Raise ValueError, in one sentence, unless grouped heads and a mask fit together. For arrays and tensors.

    Returns the leading axes (those before the heads), broadcast together.
    """
    cuda.check_numbers(q=q, k=k, v=v)
    for name, array in (("q", q), ("k", k), ("v", v)):
        if len(array.shape) < 3:
            raise ValueError(f"{name} must have at least three axes (heads, seq, d_head), got shape "
                             f"{tuple(array.shape)}")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ValueError(f"q and k must have the same d_head of at least 1, got {q.shape[-1]} and {k.shape[-1]}")
    if tuple(k.shape[-3:-1]) != tuple(v.shape[-3:-1]):
        raise ValueError("k and v must have the same heads and n_keys, got "
                         f"{tuple(k.shape[-3:-1])} and {tuple(v.shape[-3:-1])}")
    heads, kv_heads = q.shape[-3], k.shape[-3]
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"the heads of q must be a multiple of those of k and v, got {heads} and {kv_heads}")
    axes = [tuple(a.shape[:-3]) for a in (q, k, v)]
    try:
        lead = np.broadcast_shapes(*axes)
    except ValueError:
        got = f"{axes[0]}, {axes[1]} and {axes[2]}"
        raise ValueError(f"the leading axes of q, k and v must broadcast, got {got}") from None
    if mask is not None:
        full = (*lead, heads, q.shape[-2], k.shape[-2])
        kind = getattr(mask, "dtype", type(mask).__name__)
        if "bool" not in str(kind):
            raise ValueError(f"mask must be boolean with True = may attend, got {kind}")
        try:
            fits = np.broadcast_shapes(tuple(mask.shape), full) == full
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"mask must broadcast to {full}, got shape {tuple(mask.shape)}")
    return lead

def as_rows(q, kv_heads, lead):
    """q (..., heads, n_queries, d), broadcast to the leading axes, as (..., kv_heads, rows of a group, d)."""
    heads, n_queries, d = q.shape[-3:]
    rows = heads // max(kv_heads, 1) * n_queries
    full = (*lead, heads, n_queries, d)
    q = torch.broadcast_to(q, full) if isinstance(q, torch.Tensor) else np.broadcast_to(q, full)
    return q.reshape(*lead, kv_heads, rows, d)

def allowed_rows(mask, causal, shape, kv_heads):
    """A mask for such rows, as array or tensor like `mask` (an array without one), or None where all is allowed.

    shape: (heads, n_queries, n_keys), which the last three axes of the mask broadcast to.
    """
    heads, n_queries, n_keys = shape
    allowed = causal_mask(n_queries, n_keys) if causal else None
    if mask is None:
        return None if allowed is None else np.tile(allowed, (heads // max(kv_heads, 1), 1))
    if isinstance(mask, torch.Tensor):
        if causal:
            mask = mask & torch.from_numpy(allowed).to(mask.device)
        full = mask.expand(*mask.shape[:-3], *shape)
    else:
        full = np.broadcast_to(mask & allowed if causal else mask, (*mask.shape[:-3], *shape))
    return full.reshape(*full.shape[:-3], kv_heads, heads // max(kv_heads, 1) * n_queries, n_keys)


def grouped_query_attention_numpy(q, k, v, mask=None, causal=False, scale=None):
    """Attention of query heads that share heads of keys and values, in NumPy.

    q (..., n_heads, n_queries, d_head), k (..., n_kv_heads, n_keys, d_head), v (..., n_kv_heads, n_keys, d_v), leading
    axes broadcast; n_heads is a multiple of n_kv_heads, and query head i uses key head i // (n_heads // n_kv_heads).
    mask boolean, True = may attend, broadcastable to (..., n_heads, n_queries, n_keys); causal is aligned at the bottom
    right; scale defaults to 1/sqrt(d_head). Returns (..., n_heads, n_queries, d_v) in the float type of q; a query with
    nothing to attend to gets zeros. No key is copied for the heads of its group. ValueError when shapes or mask do not
    fit, TypeError for anything but arrays. Source: Ainslie et al. 2023 (arXiv 2305.13245), section 2.2.
    """
    lead = check_grouped_arguments(q, k, v, mask)
    cuda.check_kind(np.ndarray, q=q, k=k, v=v)
    mask = mask.numpy() if isinstance(mask, torch.Tensor) else mask
    allowed = allowed_rows(mask, causal, (*q.shape[-3:-1], k.shape[-2]), k.shape[-3])
    out = attention_numpy(as_rows(q, k.shape[-3], lead), k, v, allowed, scale=scale)
    return out.reshape(*lead, *q.shape[-3:-1], v.shape[-1])

def grouped_query_attention_torch(q, k, v, mask=None, causal=False, scale=None):
    """grouped_query_attention_numpy in PyTorch: same arguments, shapes and errors, differentiable.

    Half precision is computed in single and returned in the type of q.
    """
    lead = check_grouped_arguments(q, k, v, mask)
    cuda.check_kind(torch.Tensor, q=q, k=k, v=v)
    mask = torch.from_numpy(mask) if isinstance(mask, np.ndarray) else mask
    allowed = allowed_rows(mask, causal, (*q.shape[-3:-1], k.shape[-2]), k.shape[-3])
    out = attention_torch(as_rows(q, k.shape[-3], lead), k, v, allowed, scale=scale)
    return out.reshape(*lead, *q.shape[-3:-1], v.shape[-1])


GROUP_TILE_KEYS = 16                                        # as KEYS in GROUP_TILE
GROUP_WARPS = 32                                            # the most warps of a block
GROUP_SPLIT = 128                                           # keys of a block where there are few queries

def cache_type(*caches):
    """The C++ and the torch type in which a kernel reads caches: as they are stored, or single precision."""
    names = {str(cuda.float_type(cache)).removeprefix("torch.") for cache in caches}
    if len(names) == 1:
        return {"float16": ("half", torch.float16), "bfloat16": ("__nv_bfloat16", torch.bfloat16)}.get(
            names.pop(), ("float", torch.float32))
    return "float", torch.float32

HALF_HEADERS = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
"""

@functools.cache
def grouped_kernel(element, columns):
    """The kernel for a type of keys and values and so many columns a lane, compiled on first use."""
    source = GROUPED_SPLIT if element == "float" else HALF_HEADERS + GROUPED_SPLIT
    return cuda.compile(source, name="grouped_split", template=(element, columns))

def grouped_launch(q, k, v, mask=None, causal=False, scale=None, warps=GROUP_WARPS):
    """What launches the kernel: kernel, (grid, block, shared bytes), arguments. A block has at most `warps` rows.

    The fifth and sixth argument are the outputs of the splits (rows, n_splits, d_v) and their log-sum-exps, to be
    written. Where more than 64 rows share a head of keys there is one split.
    """
    lead = check_grouped_arguments(q, k, v, mask)
    heads, n_queries, d = q.shape[-3:]
    kv_heads, n_keys, d_v = v.shape[-3:]
    element, dtype = cache_type(k, v)
    k, v = cuda.on_device(k, v, dtype=dtype)
    q = cuda.on_device(q)[0].to(k.device).expand(*lead, heads, n_queries, d).contiguous()
    k, v = (a.expand(*lead, *a.shape[-3:]).contiguous() for a in (k, v))
    allowed = q.new_zeros(1, dtype=torch.uint8)
    if mask is not None:
        mask = mask if isinstance(mask, torch.Tensor) else torch.from_numpy(np.array(mask))
        allowed = mask.to(q.device).expand(*lead, heads, n_queries, n_keys).to(torch.uint8).contiguous()
    groups, rows = math.prod(lead) * kv_heads, heads // max(kv_heads, 1) * n_queries
    split = GROUP_SPLIT if rows <= 64 else max(n_keys, 1)
    n_splits, n_blocks, columns = -(-n_keys // split), -(-rows // warps), -(-max(d, d_v) // 32)
    outs = q.new_zeros(groups * rows, n_splits, d_v)
    lses = q.new_full((groups * rows, n_splits), -math.inf, dtype=torch.float64)
    launch = (groups, n_blocks, n_splits), (32, -(-rows // max(n_blocks, 1))), 2 * 4 * GROUP_TILE_KEYS * 32 * columns
    scale = 1 / math.sqrt(d) if scale is None else float(scale)
    arguments = (q, k, v, allowed, outs, lses, rows, n_queries, n_keys, d, d_v, split, int(mask is not None),
                 int(causal), scale)
    return grouped_kernel(element, columns), launch, arguments


@cuda.skip_unseen
def grouped_query_attention_cuda(q, k, v, mask=None, causal=False, scale=None):
    """grouped_query_attention_numpy by CUDA kernels: a head of keys and values is read once for up to 32 of its rows.

    q (..., heads, n_queries, d_head), k (..., n_kv_heads, n_keys, d_head), v (..., n_kv_heads, n_keys, d_v), leading
    axes broadcast; heads is a multiple of n_kv_heads, and head i uses key head i // (heads // n_kv_heads); mask
    boolean, broadcastable to (..., heads, n_queries, n_keys); causal is aligned at the bottom right; scale defaults to
    1/sqrt(d_head). NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU. Contiguous keys and values in
    float32, float16 or bfloat16 are read in place, others are copied to float32. Computed in single precision. Returns
    (..., heads, n_queries, d_v) in the kind and type of q; a query with nothing to attend to gets zeros. Not
    differentiable. Made for few queries: for a prompt the kernel of lecture 06 does less work. d_head and d_v up to 384
    with 48 KB of shared memory. Raises ValueError when shapes or mask do not fit.
    Source: Ainslie et al. 2023 (arXiv 2305.13245).
    """
    kernel, launch, arguments = grouped_launch(q, k, v, mask, causal, scale)
    outs, lses = arguments[4:6]
    rows, n_splits, d_v = outs.shape
    out = outs.new_zeros(rows, d_v)
    if outs.numel():
        kernel.fast[launch](*arguments)
        if n_splits == 1:
            out = outs
        else:
            merge_kernel().fast[rows, 32, 4 * n_splits](outs, lses, out, n_splits, d_v)
    return cuda.like(out.reshape(*arguments[0].shape[:-1], d_v), q)

def grouped_bytes(heads, kv_heads, n_queries, n_keys, d, d_v, causal=False, itemsize=4, warps=GROUP_WARPS):
    """Bytes of keys and values that the kernel reads for one sequence, exactly. itemsize: of a key's entry.

    Each row of K and V is read once by each block of up to `warps` rows of the group that may see it.
    """
    rows = heads // kv_heads * n_queries
    blocks = -(-rows // warps)
    share = -(-rows // blocks)
    keys = 0
    for first in range(0, rows, share):
        last = min(first + share, rows) - 1
        latest = last % n_queries if first // n_queries == last // n_queries else n_queries - 1
        keys += max(0, latest + 1 + n_keys - n_queries) if causal else n_keys
    return kv_heads * keys * (d + d_v) * itemsize


def merge_kv_heads(w, n_heads, n_kv_heads, how="mean"):
    """A projection w (d_model, n_heads * d_head), array or tensor, to n_kv_heads heads: the mean or the first of a group.

    Returns (d_model, n_kv_heads * d_head). ValueError unless n_kv_heads divides n_heads, n_heads the columns of w, and
    how is "mean" or "first". Source: Ainslie et al. 2023 (arXiv 2305.13245), section 2.1.
    """
    if n_heads < 1 or n_kv_heads < 1 or w.shape[-1] % n_heads or n_heads % n_kv_heads:
        raise ValueError("n_kv_heads must divide n_heads, and n_heads the columns of w, "
                         f"got {n_kv_heads}, {n_heads} and {w.shape[-1]}")
    if how not in ("mean", "first"):
        raise ValueError(f'how must be "mean" or "first", got {how!r}')
    groups = w.reshape(len(w), n_kv_heads, n_heads // n_kv_heads, w.shape[-1] // n_heads)
    merged = groups.mean(2) if how == "mean" else groups[:, :, 0]
    return merged.reshape(len(w), -1)

def turn_pairs(x, angles):
    """Turn columns i and i + d / 2 of x (..., d), an array, by angles (d / 2,)."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)

def align_keys(k, w_k, w_q, n_kv_heads):
    """Turn the key heads of each group onto its first one, pair by pair of RoPE, and average them. NumPy.

    k (n_heads, n_tokens, d_head), rotated or not, w_k (n_heads, d_model, d_head), w_q (n_heads, d_in, d_head): of the
    queries of each head. Returns (merged (n_kv_heads, d_model, d_head), w_q turned in the same way).
    """
    group, half = len(k) // n_kv_heads, k.shape[-1] // 2
    merged, turned = np.zeros((n_kv_heads, *w_k.shape[1:])), np.zeros(w_q.shape)
    pairs = k[..., :half] + 1j * k[..., half:]
    for h in range(len(k)):
        angles = np.angle((pairs[h].conj() * pairs[h // group * group]).sum(0))
        merged[h // group] += turn_pairs(w_k[h], angles) / group
        turned[h] = turn_pairs(w_q[h], angles)
    return merged, turned


class _NewStorage(TorchDispatchMode):
    """Counts the bytes of memory that operations make; views make none."""

    def __init__(self):
        super().__init__()
        self.kept, self.n_bytes = {}, 0  # kept: so that no address is used twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._note(args, given=True)
        result = function(*args, **(kwargs or {}))
        self._note(result if isinstance(result, (tuple, list)) else (result,), given=False)
        return result

    def _note(self, things, given):
        for thing in things:
            if isinstance(thing, torch.Tensor):
                storage = thing.untyped_storage()
                if storage.data_ptr() not in self.kept:
                    self.kept[storage.data_ptr()] = storage
                    self.n_bytes += 0 if given else storage.nbytes()

def new_bytes(function, *tensors):
    """Bytes of memory that PyTorch's operations make inside function(*tensors), results included."""
    with _NewStorage() as counted:
        function(*tensors)
    return counted.n_bytes
