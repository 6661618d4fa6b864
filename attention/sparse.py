# Generated from solutions/07_sparse_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 07 · Sliding-window and sparse attention: the finished code."""

import functools
import math

import numpy as np
import torch
from torch import nn

from attention.flash import (
    CHUNKS,
    FLASH_HEAD,
    HALF_ROWS,
    HALF_TILES,
    REGISTER_STEPS,
    SWIZZLE,
    as_heads,
    leading_axes,
    registers_bytes,
    tensor_cores_bytes,
    tile_sizes,
)
from attention.fundamentals import attention_numpy, attention_torch, check_arguments
from attention.kv_cache import check_sizes
from utils import cuda

__all__ = [
    "block_sparse_attention_numpy",
    "block_sparse_attention_torch",
    "block_sparse_attention_cuda",
    "sliding_window_attention_cuda",
    "sliding_window_mask",
    "longformer_mask",
    "bigbird_mask",
    "reachable",
    "select_blocks",
    "compressed_attention",
    "longformer_attention",
    "native_sparse_attention",
    "LightningIndexer",
]


def sliding_window_mask(n_queries, n_keys, window):
    """Boolean (n_queries, n_keys): the key at a query's position and window - 1 before.

    Aligned at the bottom right as causal_mask is; a query before all keys sees none.
    Raises ValueError for a negative size and for a window below 1.
    Source: the convention of Mistral 7B (arXiv 2310.06825) in transformers.
    """
    check_sizes(0, n_queries=n_queries, n_keys=n_keys)
    check_sizes(window=window)
    position = np.arange(n_queries)[:, None] + (n_keys - n_queries)
    back = position - np.arange(n_keys)
    return (back >= 0) & (back < window)


def reachable(mask, n_layers):
    """What n_layers of one pattern can carry: boolean (n, n), query i knows of key j.

    mask boolean (n, n), True = may attend; each layer also keeps a token's own state.
    """
    if n_layers < 0 or mask.dtype != bool or mask.shape != (len(mask),) * 2:
        raise ValueError("mask must be boolean (n, n) and n_layers not negative, "
                         f"got {mask.dtype} {mask.shape} and {n_layers}")
    seen = np.eye(len(mask), dtype=bool)
    for _ in range(n_layers):
        seen = seen | mask @ seen
    return seen


def check_block_mask(block_mask, block_size, lead, n_queries, n_keys):
    """Raise ValueError, in one sentence, unless a block mask (array, tensor) fits."""
    whole = isinstance(block_size, (int, np.integer)) and block_size is not True
    if not whole or block_size < 1:
        raise ValueError("block_size must be a positive whole number, "
                         f"got {block_size!r}")
    kind = str(getattr(block_mask, "dtype", type(block_mask).__name__))
    if "bool" not in kind:
        raise ValueError("block_mask must be boolean with True = the block is there, "
                         f"got {kind}")
    shape = tuple(block_mask.shape)
    blocks = (-(-n_queries // block_size), -(-n_keys // block_size))
    ahead = zip(shape[:-2][::-1], tuple(lead)[::-1])
    if (shape[-2:] != blocks or len(shape) - 2 > len(lead)
            or any(a not in (1, b) for a, b in ahead)):
        raise ValueError(f"block_mask must have the shape {blocks}, ahead nothing or "
                         f"leading axes that broadcast to {tuple(lead)}, got {shape}")


def block_sparse_attention_numpy(q, k, v, block_mask, block_size, causal=False,
                                 scale=None):
    """Attention within the blocks that are there, in NumPy: oracle of _torch and _cuda.

    q (..., n_queries, d_head), k (..., n_keys, d_head), v (..., n_keys, d_v);
    block_mask boolean (n_query_blocks, n_key_blocks), True = the block is there, with
    leading axes or without. Returns (..., n_queries, d_v) in the float type of q. A
    query without a key gets 0, an absent block is never read. Raises ValueError when
    shapes do not fit.
    Source: Dao et al. 2022 (arXiv 2205.14135), § 3.3.
    """
    check_arguments(q, k, v)
    cuda.check_kind(np.ndarray, q=q, k=k, v=v)
    n_queries, n_keys, lead = q.shape[-2], k.shape[-2], leading_axes(q, k, v)
    check_block_mask(block_mask, block_size, lead, n_queries, n_keys)
    q, k, v, there = (np.broadcast_to(a, (*lead, *np.shape(a)[-2:]))
                      for a in (q, k, v, np.asarray(block_mask)))
    out = np.zeros((*lead, n_queries, v.shape[-1]), cuda.float_type(q))
    for place in np.ndindex(lead):
        for a in range(there.shape[-2]):
            rows = np.arange(a * block_size, min((a + 1) * block_size, n_queries))
            keys = np.repeat(there[place][a], block_size)[:n_keys]
            columns = np.flatnonzero(keys)
            mask = columns <= rows[:, None] + n_keys - n_queries if causal else None
            out[place][rows] = attention_numpy(
                q[place][rows], k[place][columns], v[place][columns], mask, scale=scale)
    return out


def longformer_mask(n, window, global_tokens=()):
    """Boolean (n, n): window // 2 keys a side, rows and columns of global tokens.

    window: even, as in the paper, else ValueError. Source: arXiv 2004.05150, § 3.1.
    """
    check_sizes(0, n=n, window=window)
    if window % 2 or not all(0 <= token < n for token in global_tokens):
        raise ValueError(f"window must be even and global_tokens from 0 to below {n}, "
                         f"got {window} and {list(global_tokens)}")
    mask = np.abs(np.arange(n)[:, None] - np.arange(n)) <= window // 2
    mask[list(global_tokens)] = True
    mask[:, list(global_tokens)] = True
    return mask


def bigbird_mask(n_blocks, n_random=3, seed=0):
    """Block mask (n_blocks, n_blocks): a window of three, two global, some random ones.

    The first and the last block see all and are seen by all; each other row has
    n_random blocks more, drawn from what is left (all of it, where that is less).
    Raises ValueError for a negative number. Source: arXiv 2007.14062.
    """
    check_sizes(0, n_blocks=n_blocks, n_random=n_random)
    rng = np.random.default_rng(seed)
    mask = np.abs(np.arange(n_blocks)[:, None] - np.arange(n_blocks)) <= 1
    mask[[0, -1] if n_blocks else []] = mask[:, [0, -1] if n_blocks else []] = True
    for row in mask[1:-1]:
        free = np.flatnonzero(~row)
        row[rng.permutation(free)[:n_random]] = True
    return mask


def select_blocks(scores, n_keep):
    """A causal block mask: own block, first block and the best before, n_keep in all.

    scores (..., n_blocks, n_blocks), a row for each block of queries. Returns booleans
    of the same shape; never a later block. Raises ValueError for scores that are not
    square and for n_keep below 2.
    """
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2] or n_keep < 2:
        raise ValueError("scores must be (..., n_blocks, n_blocks), n_keep at least 2, "
                         f"got {scores.shape} and {n_keep}")
    row, column = np.indices(scores.shape[-2:])
    ranked = np.where(column < row, scores, -np.inf)
    ranked = np.where((column == row) | (column == 0), np.inf, ranked)
    order = np.argsort(-ranked, axis=-1, kind="stable")
    place = np.argsort(order, axis=-1)
    return (place < n_keep) & (column <= row)


class LightningIndexer(nn.Module):
    """Index scores of DeepSeek Sparse Attention: which keys are worth reading.

    x (..., n, d_model). Returns I (..., n, n), larger = rather read; with causal=True
    the future is -inf. The published model also rotates parts of query and key
    (half-split RoPE). Source: DeepSeek-V3.2-Exp (2025), equation 1.
    """

    def __init__(self, d_model, n_heads, d_index):
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(d_model, n_heads * d_index, bias=False)
        self.key = nn.Linear(d_model, d_index, bias=False)
        self.norm = nn.LayerNorm(d_index, eps=1e-6)
        self.weight = nn.Linear(d_model, n_heads, bias=False)

    def forward(self, x, causal=False):
        q = self.query(x).unflatten(-1, (self.n_heads, -1))  # (..., n, heads, d_index)
        k = self.norm(self.key(x))
        matches = torch.relu(q @ k[..., None, :, :].mT * k.shape[-1] ** -0.5)
        w = self.weight(x) * self.n_heads**-0.5
        scores = (w[..., None, :] @ matches)[..., 0, :]
        if causal:
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        return scores


def indexer_step(indexer, optimiser, x, p):
    """One step of an indexer towards attention weights, by their KL divergence.

    indexer(x): scores (batch, n, n) for x (batch, n, d_model); p (batch, n, n), rows
    sum to 1. Returns the mean divergence of a row before the step, a float.
    Source: DeepSeek-V3.2-Exp (2025), the dense warm-up stage.
    """
    logarithms = torch.log_softmax(indexer(x), dim=-1)
    loss = (torch.xlogy(p, p) - p * logarithms).sum(-1).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def compressed_attention(q, k, v, m):
    """Causal attention to the means of whole blocks of m keys and values, in NumPy.

    q, k (..., n, d_head), v (..., n, d_v). Query t sees the (t + 1) // m blocks that
    end at t or before; while there is none its output is 0. Returns (..., n, d_v).
    Raises ValueError where m is below 1. Source: arXiv 2502.11089, § 3.3.1, with a mean
    for its learned map.
    """
    check_sizes(m=m)
    n, n_blocks = q.shape[-2], k.shape[-2] // m
    k_mean, v_mean = (a[..., : n_blocks * m, :]
                      .reshape(*a.shape[:-2], n_blocks, m, a.shape[-1]).mean(-2)
                      for a in (k, v))
    visible = (np.arange(n) + 1) // m
    mask = np.arange(n_blocks) < visible[:, None]
    return attention_numpy(q, k_mean, v_mean, mask)


def test_compressed(compressed_attention):
    """Raise AssertionError if compressed_attention(q, k, v, m) is wrong."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 11, 4))
    for m in (1, 2, 3, 4):
        got = compressed_attention(q, k, v, m)
        for t in range(11):
            count = (t + 1) // m
            if count == 0:
                assert not got[t].any(), "a query that sees nothing"
                continue
            keys = np.stack([k[b * m : b * m + m].mean(0) for b in range(count)])
            values = np.stack([v[b * m : b * m + m].mean(0) for b in range(count)])
            powers = np.exp(keys @ q[t] / 2)
            assert np.allclose(got[t], powers @ values / powers.sum()), (m, t)


def native_sparse_attention(q, keys, values, gates, m, n_keep, window):
    """The three branches of NSA for one head, in NumPy: compressed, selected, window.

    q (n, d_head), n a multiple of m; keys and values: three arrays (n, d) each, one a
    branch; gates (n, 3). Each query selects blocks of m by their mean keys
    (select_blocks: own, first, best, n_keep in all). Returns (n, d_v).
    Source: Yuan et al. 2025 (arXiv 2502.11089), equation 5; there a block's score comes
    from the weights of the compressed branch.
    """
    n, there = len(q), np.zeros((len(q), len(q) // m), bool)
    means = keys[1].reshape(n // m, m, -1).mean(1)
    for first in range(m):  # one query of each block: their mean would see the future
        there[first::m] = select_blocks(q[first::m] @ means.T, n_keep)
    seen = np.repeat(there, m, axis=1)
    branches = (
        compressed_attention(q, keys[0], values[0], m),
        attention_numpy(q, keys[1], values[1], seen, causal=True),
        attention_numpy(q, keys[2], values[2], sliding_window_mask(n, n, window)),
    )
    return sum(gates[:, [i]] * branch for i, branch in enumerate(branches))


BLOCK_SPARSE = r"""
template <int D, int BQ, int BK>                         // d in steps of 32; rows of a tile
__global__ void block_sparse(const float* q, const float* k, const float* v, const int* starts,
                             const int* blocks, float* out, int n_queries, int n_keys, int d,
                             int block_size, int causal, int window, float scale) {
  const int R = BQ / TILE;
  const int C = BK / TILE;
  const int G = (D / 4 + TILE - 1) / TILE;
  extern __shared__ float4 q_tile[];
  float4* k_tile = q_tile + BQ * (D / 4);
  float4* v_tile = k_tile + BK * (D / 4);
  float* p_rows = (float*)(v_tile + BK * (D / 4)) + threadIdx.y * (BK + (C % 2 == 0 ? 16 : 0));
  int tiles = (block_size + BQ - 1) / BQ;                // of queries, in a block
  int row = blockIdx.y / tiles;                          // of the block mask
  int first_query = row * block_size + blockIdx.y % tiles * BQ;
  int end_query = min(min(first_query + BQ, (row + 1) * block_size), n_queries);
  if (first_query >= end_query) return;                  // the last block may be short
  size_t head = blockIdx.x;
  size_t list = head * (gridDim.y / tiles) + row;
  q += head * n_queries * d;
  k += head * n_keys * d;
  v += head * n_keys * d;
  int visible = visible_keys(end_query, n_queries, n_keys, causal);
  load_chunks<D>(q_tile, BQ, q, first_query, end_query, d);
  float maximum[R];
  float total[R] = {};
  float4 sum[R][G] = {};
  for (int r = 0; r < R; ++r) maximum[r] = -INFINITY;
  for (int b = starts[list]; b < starts[list + 1]; ++b) {  // the blocks that are there
    int block = blocks[b];
    int end = min((block + 1) * block_size, visible);
    for (int first = block * block_size; first < end; first += BK) {
      __syncthreads();                                   // the tiles of the last round are used up
      load_chunks<D>(k_tile, BK, k, first, end, d);
      load_chunks<D>(v_tile, BK, v, first, end, d);
      __syncthreads();                                   // the new tiles are there
      attend_tile<D, R, C, G>(q_tile, k_tile, v_tile, p_rows, maximum, total, sum, first_query,
                              first, end, n_queries, n_keys, causal, window, scale);
    }
  }
  write_rows(out + head * n_queries * d, sum, total, first_query, end_query, d);
}
"""


def strided_mask(n, stride):
    """Boolean (n, n), causal: the last `stride` keys and every stride-th one before.

    Raises ValueError for a stride below 1. Source: arXiv 1904.10509, § 4.3.
    """
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    back = np.arange(n)[:, None] - np.arange(n)
    return (back >= 0) & ((back < stride) | (back % stride == 0))

def fixed_mask(n, stride, summary=1):
    """Boolean (n, n), causal: the own block, and the last `summary` places of each.

    Raises ValueError unless 1 <= summary <= stride. Source: arXiv 1904.10509, § 4.3.
    """
    if not 1 <= summary <= stride:
        raise ValueError(f"summary must be from 1 to stride = {stride}, got {summary}")
    row, column = np.indices((n, n))
    same = row // stride == column // stride
    return (column <= row) & (same | (column % stride >= stride - summary))


def longformer_attention(local, globals_, window, global_tokens):
    """Longformer's attention: global rows have projections of their own, in NumPy.

    local, globals_: (q, k, v), (..., n, d_head) each; window even; global_tokens ints.
    Local rows see the window and the global tokens through `local`; global rows see
    everything through `globals_`. Returns (..., n, d_head).
    Source: Beltagy et al. 2020 (arXiv 2004.05150), § 3.1.
    """
    tokens = list(global_tokens)
    out = attention_numpy(*local, longformer_mask(local[0].shape[-2], window, tokens))
    q, k, v = globals_
    out[..., tokens, :] = attention_numpy(q[..., tokens, :], k, v)
    return out


@cuda.skip_unseen
def block_sparse_attention_torch(q, k, v, block_mask, block_size, causal=False, scale=None):
    """Attention within the blocks that are there, in PyTorch; arguments and errors as block_sparse_attention_numpy.

    Differentiable in q, k and v; a key that is not read gets the gradient 0. Returns (..., n_queries, d_v) in the type of q.
    """
    check_arguments(q, k, v)
    cuda.check_kind(torch.Tensor, q=q, k=k, v=v)
    n_queries, n_keys, lead = q.shape[-2], k.shape[-2], leading_axes(q, k, v)
    check_block_mask(block_mask, block_size, lead, n_queries, n_keys)
    q, k, v = (t if t.is_floating_point() else t.double() for t in (q, k, v))
    q, k, v = (t.expand(*lead, *t.shape[-2:]) for t in (q, k, v))
    if not math.prod(lead) * n_queries:
        return attention_torch(q, k, v, causal=causal, scale=scale)
    there = block_mask.cpu().numpy() if isinstance(block_mask, torch.Tensor) else np.asarray(block_mask)
    there = np.broadcast_to(there, (*lead, *there.shape[-2:]))
    heads = []
    for place in np.ndindex(lead):
        parts = []
        for a in range(there.shape[-2]):
            rows = torch.arange(a * block_size, min((a + 1) * block_size, n_queries), device=q.device)
            keys = np.flatnonzero(np.repeat(there[place][a], block_size)[:n_keys])
            columns = torch.from_numpy(keys).to(q.device)
            mask = columns <= rows[:, None] + n_keys - n_queries if causal else None
            parts.append(attention_torch(q[place][rows], k[place][columns], v[place][columns], mask, scale=scale))
        heads.append(torch.cat(parts))
    return torch.stack(heads).reshape(*lead, n_queries, v.shape[-1])


SPARSE_TILE = r"""
// One tile of keys, first to end - 1, as in lecture 06. A window counts the query itself.
template <int D, int R, int C, int G>
__device__ void attend_tile(const float4* q_tile, const float4* k_tile, const float4* v_tile,
                            float* p_rows, float (&maximum)[R], float (&total)[R],
                            float4 (&sum)[R][G], int first_query, int first, int end,
                            int n_queries, int n_keys, int causal, int window, float scale) {
  const int P_STRIDE = C * TILE + (C % 2 == 0 ? 16 : 0);
  float s[R][C] = {};
  score<D>(s, q_tile, k_tile);
  for (int r = 0; r < R; ++r) {
    int i = first_query + threadIdx.y + TILE * r;
    for (int c = 0; c < C; ++c) {
      int j = first + threadIdx.x + TILE * c;
      bool near = j < end && j > i + n_keys - n_queries - window;
      bool seen = near && may_attend(i, j, n_queries, n_keys, causal);
      s[r][c] = seen ? scale * s[r][c] : -INFINITY;
    }
    float factor = rescale(s[r], p_rows + TILE * r * P_STRIDE, maximum[r], total[r]);
    for (int g = 0; g < G; ++g) sum[r][g] = times(factor, sum[r][g]);
  }
  __syncwarp();                                          // the weights of a row are there
  accumulate<D>(sum, p_rows, P_STRIDE, v_tile, C * TILE);
}
// The rows of this block of threads that stand before `end`, divided by the sums of their weights.
template <int R, int G>
__device__ void write_rows(float* out, const float4 (&sum)[R][G], const float (&total)[R],
                           int first, int end, int d) {
  for (int r = 0; r < R; ++r) {
    int i = first + threadIdx.y + TILE * r;
    float all = row_sum(total[r]);
    float share = all == 0.0f ? 0.0f : 1.0f / all;       // nothing to attend to: zeros
    for (int g = 0; g < G; ++g) {
      int c = 4 * (threadIdx.x + TILE * g);
      if (i < end) store_chunk(out + (size_t)i * d + c, d - c, d, times(share, sum[r][g]));
    }
  }
}
"""


BLOCK_SPARSE_HALF = r"""
template <int D, int BQ, int BK>                         // d in steps of 16; rows of a tile
__global__ void block_sparse_half(const element* q, const element* k, const element* v,
                                  const int* starts, const int* blocks, element* out,
                                  int n_queries, int n_keys, int d, int block_size, int causal,
                                  int window, float scale) {
  extern __shared__ __align__(128) float o_tile[];
  int own = threadIdx.x / 32 * 16;                       // the first row of this warp
  int row = own + threadIdx.x % 32 / 2;                  // two lanes a row
  int odd = threadIdx.x % 2;
  float* s_tile = o_tile + BQ * (D + 4);
  float* o_row = o_tile + row * (D + 4);
  float* s_row = s_tile + row * (BK + 4);
  element* q_tile = (element*)(s_tile + BQ * (BK + 4));
  element* k_tile = q_tile + BQ * (D + 8);
  element* v_tile = k_tile + BK * (D + 8);
  element* p_tile = v_tile + BK * (D + 8);
  int tiles = (block_size + BQ - 1) / BQ;
  int mask_row = blockIdx.y / tiles;
  int first_query = mask_row * block_size + blockIdx.y % tiles * BQ;
  int end_query = min(min(first_query + BQ, (mask_row + 1) * block_size), n_queries);
  if (first_query >= end_query) return;
  size_t head = blockIdx.x;
  size_t list = head * (gridDim.y / tiles) + mask_row;
  int visible = visible_keys(end_query, n_queries, n_keys, causal);
  load_half<D>(q_tile, BQ, q + head * n_queries * d, first_query, end_query, d);
  for (int c = odd; c < D; c += 2) o_row[c] = 0.0f;
  float maximum = -INFINITY;
  float total = 0.0f;
  int i = first_query + row;
  int last = starts[list + 1];
  for (int b = starts[list]; b < last; ++b) {
    int block = blocks[b];
    int end = min((block + 1) * block_size, visible);
    for (int first = block * block_size; first < end; first += BK) {
      __syncthreads();
      load_half<D>(k_tile, BK, k + head * n_keys * d, first, end, d);
      load_half<D>(v_tile, BK, v + head * n_keys * d, first, end, d);
      __syncthreads();
      score_half<D, BK>(s_tile + own * (BK + 4), q_tile + own * (D + 8), k_tile);
      __syncwarp();
      for (int c = odd; c < BK; c += 2) {
        int j = first + c;
        bool near = j < end && j > i + n_keys - n_queries - window;
        bool seen = near && may_attend(i, j, n_queries, n_keys, causal);
        s_row[c] = seen ? scale * s_row[c] : -INFINITY;
      }
      rescale_half<D, BK>(s_row, p_tile + row * (BK + 8), o_row, maximum, total);
      __syncwarp();
      accumulate_half<D, BK>(o_tile + own * (D + 4), p_tile + own * (BK + 8), v_tile);
    }
  }
  __syncwarp();
  total += __shfl_xor_sync(0xffffffff, total, 1);
  float share = total == 0.0f ? 0.0f : 1.0f / total;
  write_half(out + (head * n_queries + first_query + own) * d, o_tile + own * (D + 4), D + 4, share,
             end_query - first_query - own, d);
}
"""


def block_lists(block_mask, lead, device):
    """A block mask as lists: starts (heads * query blocks + 1,) and blocks, both int32 tensors on the device."""
    mask = block_mask if isinstance(block_mask, torch.Tensor) else torch.from_numpy(np.array(block_mask))
    n_rows, n_columns = mask.shape[-2:]
    rows = mask.to(device).expand(*lead, n_rows, n_columns).reshape(math.prod(lead) * n_rows, n_columns)
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32, device=device)
    starts[1:] = rows.sum(-1).cumsum(0)
    blocks = rows.nonzero()[:, 1].int()
    return starts, blocks if len(blocks) else starts[:1]                        # a kernel's array holds at least one

@functools.cache
def block_sparse_kernel(rung, *template):
    """The kernel for a type, compiled on first use: "registers" for single precision, "half" or "bfloat16"."""
    if rung == "registers":
        return cuda.compile(FLASH_HEAD + SWIZZLE + CHUNKS + REGISTER_STEPS + SPARSE_TILE + BLOCK_SPARSE,
                            name="block_sparse", template=template)
    if rung == "half":
        return cuda.compile(FLASH_HEAD + HALF_TILES + HALF_ROWS + BLOCK_SPARSE_HALF, name="block_sparse_half",
                            template=template)
    return cuda.compile(FLASH_HEAD + HALF_TILES.replace("typedef half", "typedef __nv_bfloat16") + HALF_ROWS
                        + BLOCK_SPARSE_HALF, name="block_sparse_half", template=template)

def block_sparse_launch(q, k, v, block_mask, block_size, causal=False, scale=None, window=None):
    """What launches the kernel: kernel, (grid, block, shared bytes), arguments, and the leading axes of the output.

    Arguments as in block_sparse_attention_cuda; window: a query sees so many keys, itself included, None for all. The
    sixth argument is the output, tensors (heads, n_queries, d), to be written.
    """
    check_arguments(q, k, v)
    lead, n_queries, n_keys = leading_axes(q, k, v), q.shape[-2], k.shape[-2]
    check_block_mask(block_mask, block_size, lead, n_queries, n_keys)
    block_size = min(int(block_size), max(n_queries, n_keys, 1))                # larger ones are one block too
    name = str(cuda.float_type(q)).removeprefix("torch.")
    rung, dtype, step, needs = {
        "float16": ("half", torch.float16, 16, tensor_cores_bytes),
        "bfloat16": ("bfloat16", torch.bfloat16, 16, tensor_cores_bytes),
    }.get(name, ("registers", torch.float32, 32, registers_bytes))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    (q, k, v), lead = as_heads((q, k, v), dtype)
    n_heads, d = len(q), q.shape[-1]
    width = step * math.ceil(d / step)
    needs = functools.partial(needs, width)
    rows, keys = tile_sizes(min(block_size, 64), min(block_size, 64), needs)
    starts, blocks = block_lists(block_mask, lead, q.device)
    grid = n_heads, math.ceil(n_queries / block_size) * math.ceil(block_size / rows)
    block = (16, 16) if rung == "registers" else 2 * rows
    window = n_queries + n_keys if window is None else int(window)
    arguments = (q, k, v, starts, blocks, torch.zeros_like(q), n_queries, n_keys, d, block_size, int(causal), window,
                 scale)
    return block_sparse_kernel(rung, width, rows, keys), (grid, block, needs(rows, keys)), arguments, lead


@cuda.skip_unseen
def block_sparse_attention_cuda(q, k, v, block_mask, block_size, causal=False, scale=None):
    """Attention within the blocks that are there, as a CUDA kernel; arguments as block_sparse_attention_numpy.

    q (..., n_queries, d), k (..., n_keys, d), v (..., n_keys, d_v), leading axes broadcast; block_mask boolean
    (n_query_blocks, n_key_blocks), True = the block is there, with leading axes of q, k and v before it or without;
    causal is aligned at the bottom right; scale defaults to 1/sqrt(d). Keys and values of an absent block are not read.
    NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU. Half precision and bfloat16 use tensor cores
    and sum in single precision; other types are computed in single. Returns (..., n_queries, d_v) in the kind and type
    of q; a query with nothing to attend to gets zeros. Not differentiable. d up to 1,184, on sm_80 864, on sm_120 512.
    Raises ValueError when shapes, mask or block size do not fit. Source: Dao et al. 2022 (arXiv 2205.14135), § 3.3.
    """
    kernel, launch, arguments, lead = block_sparse_launch(q, k, v, block_mask, block_size, causal, scale)
    out = arguments[5]
    if out.numel() and k.shape[-2]:
        kernel.fast[launch](*arguments)
    return cuda.like(out[..., :v.shape[-1]].reshape(*lead, q.shape[-2], v.shape[-1]), q)

def window_blocks(n_queries, n_keys, window, block_size):
    """The blocks that a causal window touches: boolean (n_query_blocks, n_key_blocks). The window counts the query."""
    first = np.arange(0, n_queries, block_size)[:, None] + n_keys - n_queries   # the key that the first query sees last
    last = np.minimum(first + block_size, n_keys) - 1
    begin = np.arange(0, n_keys, block_size)
    return (begin <= last) & (begin + block_size - 1 > first - window)

@cuda.skip_unseen
def sliding_window_attention_cuda(q, k, v, window, scale=None):
    """Causal attention in which a query sees `window` keys, itself included; blocks of 64 before them are not read.

    Arrays, types, results and limits as in block_sparse_attention_cuda. Raises ValueError when shapes do not fit or the
    window is no positive whole number.
    """
    if not isinstance(window, (int, np.integer)) or isinstance(window, bool) or window < 1:
        raise ValueError(f"window must be a positive whole number, got {window!r}")
    check_arguments(q, k, v)
    there = window_blocks(q.shape[-2], k.shape[-2], window, 64)
    kernel, launch, arguments, lead = block_sparse_launch(q, k, v, there, 64, True, scale, window)
    if arguments[5].numel() and k.shape[-2]:
        kernel.fast[launch](*arguments)
    return cuda.like(arguments[5][..., :v.shape[-1]].reshape(*lead, q.shape[-2], v.shape[-1]), q)


def block_sparse_bytes(block_mask, block_size, n_queries, n_keys, d, causal=False, tile=64, itemsize=4):
    """Bytes of q, k and v that the kernel asks for, one head: (loaded, stored), exactly.

    block_mask boolean (n_query_blocks, n_key_blocks); tile: the most queries that share a tile of keys, a multiple of
    16. Every query row is read once; a key row once for each tile of queries whose list has its block.
    """
    keys = 0
    for row, column in np.argwhere(block_mask):
        for first in range(row * block_size, min((row + 1) * block_size, n_queries), tile):
            end_query = min(first + tile, (row + 1) * block_size, n_queries)
            visible = max(0, end_query + n_keys - n_queries) if causal else n_keys
            keys += max(0, min((column + 1) * block_size, visible) - column * block_size)
    return itemsize * d * (n_queries + 2 * keys), itemsize * d * n_queries
