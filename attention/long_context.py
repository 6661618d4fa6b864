# Generated from solutions/04_context_length_challenge.py by `python course.py build`. Edit that file, not this one.
"""Lecture 04 · The context-length challenge: the finished code."""

import copy
import functools
import math

import numpy as np
import torch
from torch import nn

from attention.fundamentals import attention_torch, softmax
from attention.multi_head import merge_heads, split_heads
from utils import cuda

__all__ = [
    "softmax_rows_numpy",
    "softmax_rows_torch",
    "softmax_rows_cuda",
    "matmul_numpy",
    "matmul_torch",
    "matmul_cuda",
    "attention_share",
    "kv_cache_bytes",
    "prompt_cost",
    "place_needle",
    "effective_length",
]


def attention_share(n, n_params, n_layers, d_model):
    """Share of scores and weighted sums in the FLOPs of one token that sees n tokens.

    n integers of any shape; n_params, n_layers, d_model integers. A multiplication and
    an addition are two FLOPs. Returns floats of the shape of n.
    """
    by_length = 4.0 * np.asarray(n) * d_model * n_layers
    return by_length / (2.0 * n_params + by_length)


def place_needle(haystack, needle, depth):
    """Documents with one statement replaced: needle[b] in document b at depth[b].

    haystack integers (batch, seq_len), needle integers (batch,), depth floats (batch,):
    0 the first place, 1 the last, between two places the nearer one, and the later one
    if both are equally near.
    Returns a new array. ValueError for a depth outside [0, 1].
    """
    if np.size(depth) and not (0 <= np.min(depth) and np.max(depth) <= 1):
        raise ValueError("depth must lie between 0 and 1, "
                         f"got {np.min(depth)} to {np.max(depth)}")
    places = np.floor(depth * (haystack.shape[1] - 1) + 0.5).astype(int)
    documents = haystack.copy()
    documents[np.arange(len(haystack)), places] = needle
    return documents


def test_place_needle(place):
    """Raise AssertionError if place(haystack, needle, depth) is wrong."""
    haystack = np.arange(40).reshape(8, 5)
    kept, needle = haystack.copy(), np.arange(100, 108)
    depth = np.array([0.0, 1.0, 0.125, 0.375, 0.3, 0.95, 0.625, 0.2])
    expected = haystack.copy()
    expected[np.arange(8), [0, 4, 1, 2, 1, 4, 3, 1]] = needle
    found = place(haystack, needle, depth)
    assert np.array_equal(found, expected), "wrong places"
    assert np.array_equal(haystack, kept), "the haystack was changed"
    for outside in (-0.1, 1.5):
        try:
            place(haystack[:1], needle[:1], np.array([outside]))
        except ValueError:
            continue
        raise AssertionError(f"a depth of {outside} is accepted")


def effective_length(lengths, scores, threshold):
    """The longest length up to which all scores are above the threshold, 0 for none.

    lengths integers (n_lengths,), rising; scores (n_models, n_lengths). Returns
    integers (n_models,). Source: the rule of Hsieh et al. 2024 (arXiv 2404.06654), § 4,
    with the shorter lengths asked for as well.
    """
    passed = np.logical_and.accumulate(np.asarray(scores) > threshold, axis=1)
    return np.concatenate([[0], np.asarray(lengths)])[passed.sum(axis=1)]


def loss_across_gap(model, prompt, rest, gaps, n_last):
    """Mean loss of the last n_last tokens of rest, a gap of positions after the prompt.

    prompt (1, n_prompt), rest (1, n_rest), gaps a list of integers. model has
    new_caches(), hidden and losses, both called (ids, positions=..., caches=...).
    Returns a tensor of floats (n_gaps,).
    """
    caches = model.new_caches()
    model.hidden(prompt, positions=torch.arange(prompt.shape[1]), caches=caches)
    found = []
    for gap in gaps:
        own = [copy.copy(cache) for cache in caches]
        positions = prompt.shape[1] + gap + torch.arange(rest.shape[1])
        losses = model.losses(rest, positions=positions, caches=own)
        found.append(losses[-n_last:].mean())
    return torch.stack(found)


class SegmentAttention(nn.Module):
    """Causal self-attention over segments that remembers `memory` tokens before each.

    x (batch, n, d_model) -> (batch, n, d_model). Parameters w_q, w_k, w_v, w_o
    (d_model, d_model). No gradient flows into what is remembered.
    Source: Dai et al. 2019 (arXiv 1901.02860), § 3.2, without its positions.
    """

    def __init__(self, d_model, n_heads, segment, memory):
        super().__init__()
        self.n_heads, self.segment, self.memory = n_heads, segment, memory
        self.w_q, self.w_k, self.w_v, self.w_o = (
            nn.Parameter(torch.randn(d_model, d_model) * d_model**-0.5) for _ in "qkvo")

    def forward(self, x):
        out = []
        for start in range(0, x.shape[1], self.segment):
            part = x[:, start:start + self.segment]
            remembered = x[:, max(0, start - self.memory):start].detach()
            seen = torch.cat([remembered, part], dim=1)
            q, k, v = (split_heads(rows @ w, self.n_heads) for rows, w in
                       ((part, self.w_q), (seen, self.w_k), (seen, self.w_v)))
            out.append(merge_heads(attention_torch(q, k, v, causal=True)) @ self.w_o)
        return torch.cat(out, dim=1)


def kv_cache_bytes(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0,
                   n_bytes=2):
    """Bytes of the keys and values of one sequence: integers of the shape of seq_len.

    n_full layers keep all seq_len tokens, n_windowed layers the last `window`; a number
    has n_bytes bytes.
    """
    seq_len = np.asarray(seq_len, dtype=np.int64)
    tokens_kept = n_full * seq_len + n_windowed * np.minimum(seq_len, window)
    return 2 * n_kv_heads * d_head * n_bytes * tokens_kept


OVER_BLOCK = r"""
#define THREADS 256
__device__ float combine(float a, float b, bool largest) { return largest ? fmaxf(a, b) : a + b; }
__device__ float over_block(float x, bool largest) {
  __shared__ float of_warp[THREADS / 32];
  for (int o = 16; o > 0; o /= 2) x = combine(x, __shfl_xor_sync(0xffffffff, x, o), largest);
  __syncthreads();                                      // the last call's numbers have been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();                                      // all eight are there
  x = of_warp[0];
  for (int w = 1; w < THREADS / 32; ++w) x = combine(x, of_warp[w], largest);
  return x;
}
// Every thread of the block calls these, and every thread gets the result.
__device__ float block_max(float x) { return over_block(x, true); }
__device__ float block_sum(float x) { return over_block(x, false); }
"""


SOFTMAX_READ_ONCE = OVER_BLOCK + r"""
__global__ void softmax_read_once(const float* x, float* y, int n_columns) {
  extern __shared__ float row[];
  x += (size_t)blockIdx.x * n_columns, y += (size_t)blockIdx.x * n_columns;             // this block's row

  // load
  float maximum = -INFINITY, total = 0.0f;
  for (int j = threadIdx.x; j < n_columns; j += THREADS) {
    row[j] = x[j];
    maximum = fmaxf(maximum, row[j]);
  }
  maximum = block_max(maximum);
  if (maximum == -INFINITY) maximum = 0.0f;             // nothing to attend to: every exponential is exp(-inf) = 0

  // exponentials
  for (int j = threadIdx.x; j < n_columns; j += THREADS) {
    row[j] = expf(row[j] - maximum);
    total += row[j];
  }
  total = block_sum(total);
  if (total == 0.0f) total = 1.0f;

  // write
  for (int j = threadIdx.x; j < n_columns; j += THREADS) y[j] = row[j] / total;
}
"""


MATMUL_TILED = r"""
#define TILE 16
__global__ void matmul_tiled(const float* a, const float* b, float* c, int m, int n, int k) {
  __shared__ float a_tile[TILE][TILE], b_tile[TILE][TILE];
  int x = threadIdx.x, y = threadIdx.y;
  int row = blockIdx.y * TILE + y, column = blockIdx.x * TILE + x;
  float sum = 0.0f;
  for (int first = 0; first < k; first += TILE) {
    // load
    a_tile[y][x] = row < m && first + x < k ? a[(size_t)row * k + first + x] : 0.0f;
    b_tile[y][x] = first + y < k && column < n ? b[(size_t)(first + y) * n + column] : 0.0f;
    __syncthreads();                                    // both tiles have arrived

    // accumulate
    for (int t = 0; t < TILE; ++t) sum += a_tile[y][t] * b_tile[t][x];
    __syncthreads();                                    // both tiles have been used
  }

  // write
  if (row < m && column < n) c[(size_t)row * n + column] = sum;
}
"""


def loss_by_position(losses, edges):
    """Mean loss in each bucket of positions: (n_buckets,) floats, nan for a bucket without any loss.

    losses (batch, seq_len), nan where there was nothing to predict; edges integers (n_buckets + 1,), bucket i holds the
    positions edges[i] to edges[i + 1] - 1.
    """
    means = np.full(len(edges) - 1, np.nan)
    for i, (first, end) in enumerate(zip(edges[:-1], edges[1:])):
        bucket = losses[:, first:end]
        known = bucket[~np.isnan(bucket)]
        if known.size:
            means[i] = known.mean()
    return means


class SegmentMemory:
    """The keys and values of the last `size` tokens, for one layer: a cache as TransformerLM wants it.

    For reading: keys and values are cut from the graph, so no weight learns through the memory.
    Source: the segment recurrence of Dai et al. 2019 (arXiv 1901.02860), section 3.2.
    """

    def __init__(self, size):
        self.size, self.length, self.kept = size, 0, None

    def update(self, k, v):
        """Take k, v (batch, n_heads, segment, d_head) of a new segment; returns them behind the remembered ones."""
        self.length += k.shape[-2]
        if self.kept is not None:
            k, v = (torch.cat(pair, dim=-2) for pair in zip(self.kept, (k, v)))
        start = max(k.shape[-2] - self.size, 0)
        self.kept = k[..., start:, :].detach(), v[..., start:, :].detach()
        return k, v

def read_in_segments(model, ids, segment, memory):
    """Logits of a TransformerLM that reads ids (batch, seq) segment by segment, with `memory` tokens remembered."""
    caches = [SegmentMemory(memory) for _ in model.blocks]
    return torch.cat([model(part, caches=caches) for part in ids.split(segment, dim=1)], dim=1)


def relative_shift(by_distance):
    """Scores by distance (..., n_queries, n_keys) turned into scores by key, of the same shape; 0 in the future.

    Column c of by_distance is the distance n_keys - 1 - c; the last query stands at the last key.
    Raises ValueError when there are more queries than keys. Source: Dai et al. 2019 (arXiv 1901.02860), appendix B.
    """
    n_queries, n_keys = by_distance.shape[-2:]
    if n_queries > n_keys:
        raise ValueError(f"by_distance must have at most as many queries as keys, got {n_queries} and {n_keys}")
    lead = by_distance.shape[:-2]
    padded = np.concatenate([np.zeros_like(by_distance[..., :1]), by_distance], axis=-1)
    line = padded.reshape(*lead, n_queries * (n_keys + 1))[..., n_queries:]
    return np.tril(line.reshape(*lead, n_queries, n_keys), k=n_keys - n_queries)

def relative_attention_numpy(q, k, v, r, u, w):
    """Causal attention with relative positions: scores ((q_i + u) k_j + (q_i + w) r_{i-j}) / sqrt(d_head), in NumPy.

    q (..., n_queries, d_head), k and v (..., n_keys, d_head); r (n_keys, d_head), row c for the distance
    n_keys - 1 - c; u, w (d_head,). Returns (..., n_queries, d_head).
    Source: Dai et al. 2019 (arXiv 1901.02860), section 3.3.
    """
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    scores = (q + u) @ np.swapaxes(k, -1, -2) + relative_shift((q + w) @ r.T)
    scores = np.where(np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool), scores / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return cuda.weighted_sum(weights / weights.sum(axis=-1, keepdims=True), v)


def prompt_cost(model, seq_len, n_bytes=2):
    """What a prompt costs a model: (FLOPs of the prefill, bytes of the cache, bytes that the next token reads).

    model: an entry of data/long_context_models.json; seq_len int, the tokens of the prompt. The next token reads all
    active weights once, and the cache; one sequence, n_bytes for each number.
    """
    def pairs(window):                                        # of queries and keys, causal
        width = min(seq_len, window)
        return width * (width + 1) / 2 + (seq_len - width) * width

    attended = model["full"] * pairs(seq_len) + model["windowed"] * pairs(model["window"] or 0)
    prefill = 2 * model["active"] * seq_len + 4 * model["d_attention"] * attended
    if "latent" in model:                                     # one vector stands for key and value
        cache = model["latent"] * n_bytes * model["full"] * seq_len
    else:
        cache = int(kv_cache_bytes(np.array([seq_len]), model["n_kv_heads"], model["d_head"], model["full"],
                                   model["windowed"], model["window"] or 0, n_bytes)[0])
    return prefill, cache, model["active"] * n_bytes + cache


SOFTMAX_ONLINE = OVER_BLOCK + r"""
__global__ void softmax_online(const float* x, float* y, int n_columns) {
  x += (size_t)blockIdx.x * n_columns, y += (size_t)blockIdx.x * n_columns;             // this block's row

  // maximum and sum, together
  float maximum = -INFINITY, total = 0.0f;
  for (int j = threadIdx.x; j < n_columns; j += THREADS) {
    float s = x[j];
    if (s > maximum) {
      total = total * expf(maximum - s) + 1.0f;         // rescale what was summed so far
      maximum = s;
    } else if (s != -INFINITY) total += expf(s - maximum);
  }
  float top = block_max(maximum);
  if (top == -INFINITY) top = 0.0f;
  total = block_sum(total * expf(maximum - top));       // each thread's sum, measured against the same maximum
  if (total == 0.0f) total = 1.0f;

  // write
  for (int j = threadIdx.x; j < n_columns; j += THREADS) y[j] = expf(x[j] - top) / total;
}
"""


MATMUL_REGISTERS = r"""
#define BLOCK 64                                        // a block computes BLOCK x BLOCK numbers of C
#define DEPTH 16                                        // columns of A, and rows of B, in a tile
#define EACH 4                                          // a thread computes EACH x EACH numbers of C
#define ROW(i) (y + 16 * (i))
#define COLUMN(j) (x + 16 * (j))
__global__ void matmul_registers(const float* a, const float* b, float* c, int m, int n, int k) {
  __shared__ float a_tile[BLOCK][DEPTH], b_tile[DEPTH][BLOCK];
  int x = threadIdx.x, y = threadIdx.y, thread = y * 16 + x;
  int top = blockIdx.y * BLOCK, left = blockIdx.z * BLOCK;                  // blockIdx.x: which pair of matrices
  a += (size_t)blockIdx.x * m * k, b += (size_t)blockIdx.x * k * n, c += (size_t)blockIdx.x * m * n;
  float sum[EACH][EACH] = {};
  for (int first = 0; first < k; first += DEPTH) {
    // load
    for (int e = thread; e < BLOCK * DEPTH; e += 256) {
      int r = e / DEPTH, t = e % DEPTH;
      a_tile[r][t] = top + r < m && first + t < k ? a[(size_t)(top + r) * k + first + t] : 0.0f;
    }
    for (int e = thread; e < DEPTH * BLOCK; e += 256) {
      int t = e / BLOCK, s = e % BLOCK;
      b_tile[t][s] = first + t < k && left + s < n ? b[(size_t)(first + t) * n + left + s] : 0.0f;
    }
    __syncthreads();                                    // both tiles have arrived

    // accumulate, from registers
    for (int t = 0; t < DEPTH; ++t) {
      float a_part[EACH], b_part[EACH];
      for (int i = 0; i < EACH; ++i) a_part[i] = a_tile[ROW(i)][t], b_part[i] = b_tile[t][COLUMN(i)];
      for (int i = 0; i < EACH; ++i)
        for (int j = 0; j < EACH; ++j) sum[i][j] += a_part[i] * b_part[j];
    }
    __syncthreads();                                    // both tiles have been used
  }

  // write
  for (int i = 0; i < EACH; ++i)
    for (int j = 0; j < EACH; ++j)
      if (top + ROW(i) < m && left + COLUMN(j) < n) c[(size_t)(top + ROW(i)) * n + left + COLUMN(j)] = sum[i][j];
}
"""


LONGEST_KEPT = 12_000              # columns: 48 KB of shared memory, less what block_max needs

def check_rows(x):
    """Raise ValueError, in one sentence, unless x holds rows of real numbers. For arrays and tensors."""
    cuda.check_numbers(x=x)
    if not np.ndim(x):
        raise ValueError("x must have at least one axis (n_columns), got a single number")

def widened(x):
    """An array or tensor in at least single precision: half precision is too coarse to add up in."""
    return x.to(cuda.work_type(x)) if isinstance(x, torch.Tensor) else x.astype(cuda.work_type(x))


def softmax_rows_numpy(x):
    """Softmax along the last axis. x (..., n_columns), real; -inf gives weight 0, a row of only -inf gives zeros.

    Returns an array of x's shape and float type (float64 for integers); half precision is computed in single.
    Raises ValueError if x has no axis or holds anything but real numbers.
    """
    check_rows(x)
    cuda.check_kind(np.ndarray, x=x)
    return cuda.like(softmax(widened(x)), x)

def softmax_rows_torch(x):
    """softmax_rows_numpy for a tensor, differentiable; the gradient of a row of only -inf is 0."""
    check_rows(x)
    cuda.check_kind(torch.Tensor, x=x)
    if not x.numel():
        return cuda.like(x.clone(), x)
    wide = widened(x)
    maximum = wide.detach().amax(-1, keepdim=True)
    exponentials = torch.exp(wide - torch.where(maximum == -math.inf, 0.0, maximum))
    total = exponentials.sum(-1, keepdim=True)
    return cuda.like(exponentials / torch.where(total == 0, 1.0, total), x)


@functools.cache
def softmax_kernel(kept):
    """The kernel that keeps a row in shared memory, or the one for rows of any length; compiled on first use."""
    return cuda.compile(SOFTMAX_READ_ONCE) if kept else cuda.compile(SOFTMAX_ONLINE)

def softmax_rows_cuda(x):
    """softmax_rows_numpy by a CUDA kernel. NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU.

    Computed in single precision, returned in the kind and type of x. Not differentiable.
    """
    check_rows(x)
    [rows] = cuda.on_device(x)
    out = torch.zeros_like(rows)
    if out.numel():
        n_columns = rows.shape[-1]
        kept = n_columns <= LONGEST_KEPT
        shared = 4 * n_columns if kept else 0
        softmax_kernel(kept).fast[rows.numel() // n_columns, 256, shared](rows, out, n_columns)
    return cuda.like(out, x)


def check_matrices(a, b):
    """Raise ValueError, in one sentence, unless a and b are real and can be multiplied. For arrays and tensors."""
    cuda.check_numbers(a=a, b=b)
    for name, shape in (("a", np.shape(a)), ("b", np.shape(b))):
        if len(shape) < 2:
            raise ValueError(f"{name} must have at least two axes (rows, columns), got shape {tuple(shape)}")
    (*lead_a, _, k_a), (*lead_b, k_b, _) = np.shape(a), np.shape(b)
    if k_a != k_b:
        raise ValueError(f"a must have as many columns as b has rows, got {k_a} and {k_b}")
    try:
        np.broadcast_shapes(tuple(lead_a), tuple(lead_b))
    except ValueError:
        leading = f"{tuple(lead_a)} and {tuple(lead_b)}"
        raise ValueError(f"the leading axes of a and b must broadcast, got {leading}") from None


def matmul_numpy(a, b):
    """Matrix product. a (..., m, k), b (..., k, n), real, leading axes broadcast. Returns (..., m, n) in a's type.

    Half precision is added up in single precision; k = 0 gives zeros; integers give float64. Raises ValueError for
    shapes that do not fit and for anything but real numbers.
    """
    check_matrices(a, b)
    cuda.check_kind(np.ndarray, a=a, b=b)
    return cuda.like(np.matmul(widened(a), widened(b)), a)

def matmul_torch(a, b):
    """matmul_numpy for tensors, differentiable."""
    check_matrices(a, b)
    cuda.check_kind(torch.Tensor, a=a, b=b)
    wide_a, wide_b = widened(a), widened(b)
    dtype = torch.promote_types(wide_a.dtype, wide_b.dtype)
    return cuda.like(wide_a.to(dtype) @ wide_b.to(dtype), a)

@functools.cache
def matmul_kernel():
    """The kernel with register tiles, compiled on first use."""
    return cuda.compile(MATMUL_REGISTERS)

def matmul_cuda(a, b):
    """matmul_numpy by a CUDA kernel. NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU.

    Computed in single precision, returned in the kind and type of a. Not differentiable. m and n up to 4 million.
    """
    check_matrices(a, b)
    left, right = cuda.on_device(a, b)
    lead = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    m, k, n = left.shape[-2], left.shape[-1], right.shape[-1]
    left, right = (t.expand(*lead, *t.shape[-2:]).contiguous() for t in (left, right))
    out = torch.zeros(*lead, m, n, device=left.device)
    if out.numel() and k:
        matmul_kernel().fast[(math.prod(lead), -(-m // 64), -(-n // 64)), (16, 16)](left, right, out, m, n, k)
    return cuda.like(out, a)
