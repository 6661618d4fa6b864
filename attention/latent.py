# Generated from solutions/09_multi_head_latent_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 09 · Multi-head latent attention: the finished code."""

import functools
import math

import numpy as np
import torch
from torch import nn

from attention.fundamentals import softmax
from attention.grouped_query import HALF_HEADERS, cache_type
from attention.kv_cache import WARP, check_sizes, merge_kernel, whole_numbers
from attention.multi_head import masked_softmax, merge_heads, split_heads
from attention.rotary import Rotary
from attention.sparse import LightningIndexer
from utils import cuda

__all__ = [
    "latent_decode_attention_numpy",
    "latent_decode_attention_torch",
    "latent_decode_attention_cuda",
    "MultiHeadLatentAttention",
    "LatentCache",
    "joint_latent",
]


def joint_latent(w_k, w_v, d_latent, x=None):
    """Factors (w_dkv, w_uk, w_uv) of the best joint latent of keys and values.

    w_k (d_model, d_k), w_v (d_model, d_v), d_latent at least 1; x (n, d_model) are
    inputs whose keys and values are to be kept, None weighs all directions alike.
    Raises ValueError for weights that do not fit. Source: Eckart and Young 1936.
    """
    if w_k.ndim != 2 or w_v.ndim != 2 or len(w_k) != len(w_v) or d_latent < 1:
        raise ValueError("w_k and w_v must be (d_model, columns) with one d_model, and "
                         f"d_latent at least 1, got {w_k.shape}, {w_v.shape} and "
                         f"{d_latent}")
    both = np.concatenate([w_k, w_v], axis=1)
    _, _, vt = np.linalg.svd(both if x is None else x @ both, full_matrices=False)
    best = vt[:d_latent]
    return both @ best.T, best[:, :w_k.shape[1]], best[:, w_k.shape[1]:]


class LatentWeights(nn.Module):
    """The weights of multi-head latent attention, in the letters of arXiv 2405.04434.

    d_query: the width of the queries' own latent; None makes queries from x directly.
    positions: what rotates (Rotary(d_rope) by default); scale: of the scores.
    """

    def __init__(self, d_model, n_heads, d_head, d_latent, d_rope, d_query=None,
                 d_v=None, positions=None, scale=None):
        super().__init__()
        d_v, d_in = d_v or d_head, d_query or d_model
        self.n_heads = n_heads
        self.scale = (d_head + d_rope) ** -0.5 if scale is None else scale
        self.positions = Rotary(d_rope) if positions is None else positions
        nope, rope, value = n_heads * d_head, n_heads * d_rope, n_heads * d_v
        shapes = {"w_dkv": (d_model, d_latent), "w_kr": (d_model, d_rope),
                  "w_uk": (d_latent, nope), "w_uv": (d_latent, value),
                  "w_uq": (d_in, nope), "w_qr": (d_in, rope), "w_o": (value, d_model)}
        for name, (rows, columns) in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(rows, columns) * rows**-0.5))
        self.norm_kv = nn.RMSNorm(d_latent, eps=1e-6)
        if d_query:
            self.w_dq = nn.Parameter(torch.randn(d_model, d_query) * d_model**-0.5)
            self.norm_q = nn.RMSNorm(d_query, eps=1e-6)


class LatentAttention(LatentWeights, nn.Module):
    """Multi-head latent attention, expanded: x (batch, n, d_model) to the same, causal.

    Source: DeepSeek-AI 2024 (arXiv 2405.04434), § 2.1, equations 9 to 19.
    """

    def project(self, x, positions):
        """(q_nope, q_rope, c_kv, k_rope) of x at positions (n,); shapes as in 9B."""
        c_q = self.norm_q(x @ self.w_dq) if hasattr(self, "w_dq") else x
        q_nope, q_rope = (split_heads(c_q @ w, self.n_heads)
                          for w in (self.w_uq, self.w_qr))
        k_rope = self.positions.rotate((x @ self.w_kr)[:, None], positions)[:, 0]
        q_rope = self.positions.rotate(q_rope, positions)
        return q_nope, q_rope, self.norm_kv(x @ self.w_dkv), k_rope

    def forward(self, x):
        positions = torch.arange(x.shape[1], device=x.device)
        q_nope, q_rope, c_kv, k_rope = self.project(x, positions)
        k, v = (split_heads(c_kv @ w, self.n_heads) for w in (self.w_uk, self.w_uv))
        scores = (q_nope @ k.mT + q_rope @ k_rope[:, None].mT) * self.scale
        return merge_heads(masked_softmax(scores, causal=True) @ v) @ self.w_o


def absorbed_decode(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    """One query a head against a latent cache: (batch, heads, d_latent), NumPy.

    Row b attends to its first lengths[b] latents, and gets zeros where that is 0.
    """
    out = np.zeros_like(q_latent)
    for b, length in enumerate(lengths):
        c, k_r = c_kv[b, :length], k_rope[b, :length]
        scores = (q_latent[b] @ c.T + q_rope[b] @ k_r.T) * scale  # (heads, length)
        out[b] = softmax(scores) @ c
    return out


class LatentCache:
    """The latents and rotated keys of one layer, in memory that is taken once."""

    def __init__(self, batch, capacity, d_latent, d_rope, dtype=torch.float64,
                 device=None):
        check_sizes(0, batch=batch, capacity=capacity, d_rope=d_rope)
        check_sizes(d_latent=d_latent)
        self.c_kv = torch.zeros(batch, capacity, d_latent, dtype=dtype, device=device)
        self.k_rope = self.c_kv.new_zeros(batch, capacity, d_rope)
        self.length = 0

    def update(self, c_kv, k_rope):
        """Store new rows (batch, n, width); return all so far. ValueError if full."""
        end = self.length + c_kv.shape[1]
        for name, new in (("c_kv", c_kv), ("k_rope", k_rope)):
            kept = getattr(self, name)
            if new.shape != (len(kept), end - self.length, kept.shape[2]):
                wanted = f"({len(kept)}, n_new, {kept.shape[2]})"
                raise ValueError(f"{name} must be {wanted}, got {tuple(new.shape)}")
        if end > self.c_kv.shape[1]:
            raise ValueError(f"the cache holds {self.c_kv.shape[1]} tokens, got {end}")
        self.c_kv[:, self.length:end], self.k_rope[:, self.length:end] = c_kv, k_rope
        self.length = end
        return self.c_kv[:, :end], self.k_rope[:, :end]


class MultiHeadLatentAttention(LatentAttention):
    """MLA for TransformerLM and for decoding: two forms, one result."""

    def forward(self, x, mask=None, causal=False, positions=None, cache=None,
                absorbed=False):
        """x (batch, n, d_model) to the same; mask boolean, True = may attend.

        positions integers (n,), by default after what the cache, a LatentCache, holds.
        """
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        q_nope, q_rope, *latents = self.project(x, positions)
        if cache is not None:
            latents = cache.update(*latents)
        c_kv, k_rope = (rows[:, None] for rows in latents)  # one head for all
        w_uk, w_uv = (w.unflatten(1, (self.n_heads, -1)).transpose(0, 1)
                      for w in (self.w_uk, self.w_uv))  # (n_heads, d_latent, ...)
        scores = (q_nope @ w_uk.mT) @ c_kv.mT if absorbed else q_nope @ (c_kv @ w_uk).mT
        scores = (scores + q_rope @ k_rope.mT) * self.scale
        p = masked_softmax(scores, mask, causal)
        out = cuda.weighted_sum(p, c_kv if absorbed else c_kv @ w_uv)
        out = out @ w_uv if absorbed else out
        return merge_heads(out) @ self.w_o


def test_latent_decode(decode):
    """Raise AssertionError if the decode step is wrong; its arguments are in 9D."""
    rng = np.random.default_rng(0)
    for size in (1.0, 300.0):
        shapes = (3, 6), (3, 4), (7, 10), (7, 4), (3, 10, 6), (3, 10, 5)
        q_nope, q_rope, c, k_rope, w_uk, w_uv = map(rng.standard_normal, shapes)
        q_nope, q_rope = size * q_nope, size * q_rope
        got = decode(q_nope, q_rope, c, k_rope, w_uk, w_uv)
        for h in range(3):
            scores = (c @ w_uk[h] @ q_nope[h] + k_rope @ q_rope[h]) / math.sqrt(10)
            p = np.exp(scores - scores.max())
            expected = p / p.sum() @ (c @ w_uv[h])
            assert np.abs(got[h] - expected).max() < 1e-8 * np.abs(expected).max()


def grouped_as_latent(q, k, v):
    """Causal grouped-query attention as attention to one latent for all heads.

    q (batch, n_heads, n_queries, d_head), k and v (batch, n_groups, n_keys, d_head).
    Returns the shape of q. ValueError if n_groups does not divide n_heads.
    """
    n_heads, n_groups, d = q.shape[1], k.shape[1], q.shape[-1]
    if n_heads % n_groups:
        raise ValueError(f"{n_groups} groups do not divide {n_heads} heads")
    c = torch.cat([k, v], dim=1).transpose(1, 2).flatten(2)[:, None]
    q_latent = q.new_zeros(*q.shape[:3], c.shape[-1])
    group = [head // (n_heads // n_groups) for head in range(n_heads)]
    for head, g in enumerate(group):
        q_latent[:, head, :, g * d:(g + 1) * d] = q[:, head]
    blend = masked_softmax(q_latent @ c.mT / math.sqrt(d), causal=True) @ c
    values = blend[..., n_groups * d:]
    return torch.stack([values[:, head, :, g * d:(g + 1) * d]
                        for head, g in enumerate(group)], dim=1)


LATENT_TILE = WARP + r"""
#define KEYS 16                                          // rows of a tile
#define SPLIT 128                                        // keys of a block
// All threads copy rows first to end - 1: the latent, the shared key, zeros up to 32 C columns.
template <int C, typename T>
__device__ void load_latents(float* tile, const T* c_kv, const T* k_rope, size_t first, int n,
                             int d_latent, int d_rope) {
  for (int e = threadIdx.y * 32 + threadIdx.x; e < n * 32 * C; e += blockDim.y * 32) {
    size_t j = first + e / (32 * C);
    int c = e % (32 * C);
    float x = 0.0f;
    if (c < d_latent) x = (float)c_kv[j * d_latent + c];
    else if (c < d_latent + d_rope) x = (float)k_rope[j * d_rope + c - d_latent];
    tile[e] = x;
  }
}
// This lane's columns of one head's query, latent and rotary part.
template <int C>
__device__ void load_query(float (&query)[C], const float* q_latent, const float* q_rope,
                           int d_latent, int d_rope, float scale) {
  for (int c = 0; c < C; ++c) {
    int column = 32 * c + threadIdx.x;
    query[c] = 0.0f;
    if (column < d_latent) query[c] = scale * q_latent[column];
    else if (column < d_latent + d_rope) query[c] = scale * q_rope[column - d_latent];
  }
}
// From the score of a lane's key to its weight; returns the factor for what was summed before.
__device__ float rescale(float score, float& weight, float& maximum, float& total) {
  float larger = fmaxf(maximum, warp_max(score));
  float top = larger == -INFINITY ? 0.0f : larger;
  float shrink = expf(maximum - top);
  weight = expf(score - top);
  total = shrink * total + warp_sum(weight);
  maximum = larger;
  return shrink;
}
"""


LATENT_SPLIT = LATENT_TILE + r"""
template <typename T, int C>                             // 32 C >= d_latent + d_rope
__global__ __launch_bounds__(1024) void latent_split(
    const float* q_latent, const float* q_rope, const T* c_kv, const T* k_rope, const int* lengths,
    float* outs, double* lses, int capacity, int heads, int d_latent, int d_rope, float scale) {
  extern __shared__ float tile[];                        // KEYS rows of 32 C floats
  int lane = threadIdx.x;
  int h = blockIdx.y * blockDim.y + threadIdx.y;         // this warp's head
  size_t rows = (size_t)blockIdx.x * capacity;           // of the cache, before this sequence
  int begin = blockIdx.z * SPLIT;
  int end = min(begin + SPLIT, lengths[blockIdx.x]);
  size_t row = (size_t)blockIdx.x * heads + min(h, heads - 1);
  size_t split = row * gridDim.z + blockIdx.z;
  if (begin >= end && lane == 0 && h < heads) lses[split] = -INFINITY;
  if (begin >= end) return;                              // no keys: the merge will not look
  float query[C], sum[C] = {};
  load_query<C>(query, q_latent + row * d_latent, q_rope + row * d_rope, d_latent, d_rope, scale);
  float maximum = -INFINITY, total = 0.0f;
  for (int first = begin; first < end; first += KEYS) {
    int n = min(KEYS, end - first);
    __syncthreads();                                     // the last tile is used up
    load_latents<C>(tile, c_kv, k_rope, rows + first, n, d_latent, d_rope);
    __syncthreads();                                     // the new tile is there
    float score = -INFINITY;
    for (int t = 0; t < n; ++t) {                        // as keys: lane t keeps the score of t
      float s = 0.0f;
      for (int c = 0; c < C; ++c) s += query[c] * tile[(t * C + c) * 32 + lane];
      s = warp_sum(s);
      if (lane == t) score = s;
    }
    float weight, shrink = rescale(score, weight, maximum, total);
    for (int c = 0; c < C; ++c) sum[c] *= shrink;
    for (int t = 0; t < n; ++t) {                        // as values
      float w = __shfl_sync(0xffffffff, weight, t);
      for (int c = 0; c < C; ++c) sum[c] += w * tile[(t * C + c) * 32 + lane];
    }
  }
  if (h >= heads) return;
  for (int c = 0; c < C && 32 * c + lane < d_latent; ++c)
    outs[split * d_latent + 32 * c + lane] = sum[c] / (total == 0.0f ? 1.0f : total);
  if (lane == 0) lses[split] = (double)maximum + logf(total);
}
"""


LATENT_SPLIT_KEYS = 128  # as SPLIT in LATENT_TILE

def latent_bytes(lengths, heads, d_latent, d_rope, itemsize=4, warps=32):
    """Bytes that the kernel reads, exactly: (cache, queries).

    itemsize: of the cache; warps: the most heads that share a block.
    """
    rows, width = sum(lengths), d_latent + d_rope
    splits = sum(-(-n // LATENT_SPLIT_KEYS) for n in lengths)
    return -(-heads // warps) * rows * width * itemsize, splits * heads * width * 4


def best_of_past(scores, top_k):
    """Boolean, as scores (..., n, n): the top_k best places of a row, none later.

    Of equal scores the earlier place is taken, however many places follow.
    """
    past = torch.ones_like(scores, dtype=torch.bool).tril()
    scores = scores.masked_fill(~past, -math.inf)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(past).scatter(-1, best, True) & past  # see below


class IndexedLatentAttention(MultiHeadLatentAttention):
    """Latent attention to the top_k tokens that an indexer scores best, causal.

    Sizes as in MultiHeadLatentAttention, d_query with them; index_heads of d_index
    columns choose, their first d_rope rotated. Source: DeepSeek-V3.2-Exp (2025).
    """

    def __init__(self, *sizes, top_k, index_heads, d_index, **named):
        super().__init__(*sizes, **named)
        self.top_k, self.d_rope = top_k, self.w_kr.shape[1]
        d_model, d_query = self.w_dq.shape
        self.indexer = LightningIndexer(d_model, index_heads, d_index)
        self.indexer.query = nn.Linear(d_query, index_heads * d_index, bias=False)
        self.index_positions = Rotary(self.d_rope)  # half-split, unlike the layer's own

    def forward(self, x, absorbed=False):
        return super().forward(x, self.chosen(x)[:, None], True, absorbed=absorbed)

    def chosen(self, x):
        """Boolean (batch, n, n): the best top_k of each token, never a later one."""
        own, places = self.indexer, torch.arange(x.shape[1], device=x.device)
        q = split_heads(own.query(self.norm_q(x @ self.w_dq)), own.n_heads)
        q, k = (self.turned(a, places) for a in (q, own.norm(own.key(x))[:, None]))
        matches = torch.relu(q @ k.mT * k.shape[-1] ** -0.5)  # (batch, heads, n, n)
        w = own.weight(x).mT[..., None] * own.n_heads**-0.5  # (batch, heads, n, 1)
        return best_of_past((w * matches).sum(1), self.top_k)

    def turned(self, heads, places):
        turned = self.index_positions.rotate(heads[..., :self.d_rope], places)
        return torch.cat([turned, heads[..., self.d_rope:]], dim=-1)


LATENT_TILE_KEYS = 16                                       # as KEYS

def check_latent_arguments(q_latent, q_rope, c_kv, k_rope, lengths):
    """Raise ValueError, in one sentence, unless queries and a latent cache fit together. For arrays and tensors."""
    cuda.check_numbers(q_latent=q_latent, q_rope=q_rope, c_kv=c_kv, k_rope=k_rope)
    shape = tuple(q_latent.shape)
    if len(shape) != 3 or shape[2] == 0:
        raise ValueError(f"q_latent must be (batch, heads, d_latent), d_latent at least 1, got shape {shape}")
    if len(q_rope.shape) != 3 or tuple(q_rope.shape[:2]) != shape[:2]:
        raise ValueError(f"q_rope must be (batch, heads, d_rope) with the {shape[:2]} of q_latent, "
                         f"got shape {tuple(q_rope.shape)}")
    for name, cache, width in (("c_kv", c_kv, shape[2]), ("k_rope", k_rope, q_rope.shape[2])):
        if len(cache.shape) != 3 or (cache.shape[0], cache.shape[2]) != (shape[0], width):
            raise ValueError(f"{name} must be ({shape[0]}, capacity, {width}), got shape {tuple(cache.shape)}")
    if c_kv.shape[1] != k_rope.shape[1]:
        raise ValueError(f"c_kv and k_rope must have the same capacity, got {c_kv.shape[1]} and {k_rope.shape[1]}")
    lengths, capacity = whole_numbers("lengths", lengths), c_kv.shape[1]
    if lengths.shape != shape[:1]:
        raise ValueError(f"lengths must be ({shape[0]},), one for each row of q_latent, got shape {lengths.shape}")
    if lengths.size and (lengths.min() < 0 or lengths.max() > capacity):
        raise ValueError(f"lengths must lie between 0 and {capacity}, got {lengths.tolist()}")

@functools.cache
def latent_kernel(element, columns):
    """The kernel for a type of the cache and so many columns a lane, compiled on first use."""
    if element == "float":
        return cuda.compile(LATENT_SPLIT, name="latent_split", template=(element, columns))
    return cuda.compile(HALF_HEADERS + LATENT_SPLIT, name="latent_split", template=(element, columns))

def latent_launch(q_latent, q_rope, c_kv, k_rope, lengths, scale, warps=32):
    """What launches the kernel: kernel, (grid, block, shared bytes), arguments. A block has at most `warps` heads.

    The sixth and seventh argument are the outputs of the splits and their log-sum-exps, to be written.
    """
    element, dtype = cache_type(c_kv, k_rope)
    c_kv, k_rope = cuda.on_device(c_kv, k_rope, dtype=dtype)
    q_latent, q_rope = (q.to(c_kv.device) for q in cuda.on_device(q_latent, q_rope))
    if q_rope.shape[-1] == 0:                                                   # a kernel's array holds at least one
        q_rope, k_rope = q_latent.new_zeros(1), c_kv.new_zeros(1)
    (batch, heads, d_latent), d_rope = q_latent.shape, q_rope.shape[-1] if q_rope.dim() == 3 else 0
    lengths = whole_numbers("lengths", lengths).astype(np.int32)
    n_splits, n_blocks = -(-int(lengths.max(initial=0)) // LATENT_SPLIT_KEYS), -(-heads // warps)
    columns = -(-(d_latent + d_rope) // 32)
    outs = q_latent.new_empty(batch * heads, n_splits, d_latent)
    lses = q_latent.new_empty(batch * heads, n_splits, dtype=torch.float64)
    launch = (batch, n_blocks, n_splits), (32, -(-heads // n_blocks)), 4 * LATENT_TILE_KEYS * 32 * columns
    arguments = (q_latent, q_rope, c_kv, k_rope, torch.from_numpy(lengths).to(c_kv.device), outs, lses, c_kv.shape[1],
                 heads, d_latent, d_rope, float(scale))
    return latent_kernel(element, columns), launch, arguments


def latent_decode_attention_numpy(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    """One query for each head attends to a latent cache that is key and value of all heads, in NumPy.

    q_latent (batch, heads, d_latent), already through W_UK; q_rope (batch, heads, d_rope); c_kv (batch, capacity,
    d_latent) and k_rope (batch, capacity, d_rope), of which the first lengths[b] rows count, whatever stands behind
    them; lengths integers (batch,); scale a number, 1/sqrt(d_head + d_rope) of the keys that are never made.
    Returns the weighted latents (batch, heads, d_latent) in the float type of q_latent; a row of length 0 gets zeros.
    Raises ValueError when shapes or lengths do not fit. Source: DeepSeek-AI 2024 (arXiv 2405.04434), section 2.1.
    """
    check_latent_arguments(q_latent, q_rope, c_kv, k_rope, lengths)
    cuda.check_kind(np.ndarray, q_latent=q_latent, q_rope=q_rope, c_kv=c_kv, k_rope=k_rope)
    arrays = (array.astype(cuda.work_type(q_latent)) for array in (q_latent, q_rope, c_kv, k_rope))
    return cuda.like(absorbed_decode(*arrays, whole_numbers("lengths", lengths), float(scale)), q_latent)

def latent_decode_attention_torch(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    """latent_decode_attention_numpy in PyTorch: all rows at once, differentiable. Same arguments, shapes and errors."""
    check_latent_arguments(q_latent, q_rope, c_kv, k_rope, lengths)
    cuda.check_kind(torch.Tensor, q_latent=q_latent, q_rope=q_rope, c_kv=c_kv, k_rope=k_rope)
    work = cuda.work_type(q_latent)
    lengths = torch.from_numpy(whole_numbers("lengths", lengths)).to(q_latent.device)
    inside = torch.arange(c_kv.shape[1], device=q_latent.device) < lengths[:, None]           # (batch, capacity)
    # What lies behind the end may be anything, even nan: 0 * nan is nan, so it is replaced before the products.
    c, k_r = (cache.to(work).masked_fill(~inside[..., None], 0) for cache in (c_kv, k_rope))
    scores = (q_latent.to(work) @ c.mT + q_rope.to(work) @ k_r.mT) * float(scale)
    return cuda.like(masked_softmax(scores, inside[:, None]) @ c, q_latent)


def latent_decode_attention_cuda(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    """latent_decode_attention_numpy by two CUDA kernels: each row of the cache is read once for up to 32 heads.

    q_latent (batch, heads, d_latent), already through W_UK; q_rope (batch, heads, d_rope); c_kv (batch, capacity,
    d_latent) and k_rope (batch, capacity, d_rope), of which the first lengths[b] rows count; lengths integers (batch,);
    scale a number. NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU; lengths may lie anywhere.
    A contiguous cache in float32, float16 or bfloat16 is read in place, any other is copied to float32. Computed in
    single precision. Returns the weighted latents (batch, heads, d_latent) in the kind and type of q_latent; a row of
    length 0 gets zeros. Not differentiable. d_latent + d_rope up to 768 with 48 KB of shared memory.
    Raises ValueError when shapes or lengths do not fit. Source: DeepSeek-AI 2024 (arXiv 2405.04434), § 2.1.
    """
    check_latent_arguments(q_latent, q_rope, c_kv, k_rope, lengths)
    (batch, heads, d_latent), longest = q_latent.shape, int(whole_numbers("lengths", lengths).max(initial=0))
    (out,) = cuda.on_device(q_latent)
    out = torch.zeros_like(out)
    if out.numel() and longest:
        kernel, launch, arguments = latent_launch(q_latent, q_rope, c_kv, k_rope, lengths, scale)
        kernel.fast[launch](*arguments)
        outs, lses = arguments[5:7]
        merge_kernel().fast[batch * heads, 32, 4 * outs.shape[1]](outs, lses, out, outs.shape[1], d_latent)
    return cuda.like(out, q_latent)
