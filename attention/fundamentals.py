# Generated from solutions/01_attention_fundamentals.py by `python course.py build`. Edit that file, not this one.
"""Lecture 01 · Attention fundamentals: the finished code."""

import functools
import math

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from utils import cuda
from utils.data import Vocabulary

__all__ = [
    "attention_numpy",
    "attention_torch",
    "attention_cuda",
    "softmax",
    "attention_weights",
    "causal_mask",
    "padding_mask",
    "AdditiveAttention",
    "Seq2Seq",
]


def softmax(x, axis=-1):
    """Softmax along one axis, shifted by the maximum so that no finite score overflows.

    x: numbers of any shape; -inf gives weight 0. Returns the same shape and float type,
    float64 for integers; half precision is summed in single.
    A row of only -inf is all zeros: nothing may be attended to, so nothing is.
    """
    x = np.asarray(x)
    dtype = x.dtype if x.dtype.kind == "f" else np.dtype(float)
    x = x.astype(np.result_type(dtype, np.float32), copy=False)  # half is too coarse
    maximum = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    exponentials = np.exp(x - np.where(np.isneginf(maximum), 0, maximum))
    total = exponentials.sum(axis=axis, keepdims=True)
    return (exponentials / np.where(total == 0, 1, total)).astype(dtype, copy=False)


def causal_mask(n_queries, n_keys=None):
    """Boolean (n_queries, n_keys), True where key j is not after query i.

    Aligned at the bottom right; with more queries than keys the first rows see nothing.
    Raises ValueError for a negative size.
    """
    n_keys = n_queries if n_keys is None else n_keys
    if n_queries < 0 or n_keys < 0:
        raise ValueError("n_queries and n_keys must not be negative, "
                         f"got {n_queries} and {n_keys}")
    positions = np.arange(n_queries)[:, None] + (n_keys - n_queries)
    return np.arange(n_keys)[None, :] <= positions


def padding_mask(lengths, n_keys):
    """Boolean (batch, 1, 1, n_keys), True for the first lengths[b] keys of sentence b.

    lengths: integers (batch,). Raises ValueError when one is negative or above n_keys.
    """
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or lengths.size and lengths.dtype.kind not in "iu":
        raise ValueError(f"lengths must be integers (batch,), got {lengths.dtype} "
                         f"of shape {lengths.shape}")
    if lengths.size and (lengths.min() < 0 or lengths.max() > n_keys):
        raise ValueError(f"lengths must lie between 0 and n_keys = {n_keys}, "
                         f"got {lengths.tolist()}")
    return (np.arange(n_keys) < lengths[:, None])[:, None, None, :]


def attention_weights(q, k, mask=None, causal=False, scale=None):
    """Attention weights softmax(scale * q k^T) with masks, in NumPy.

    q (..., n_queries, d_head), k (..., n_keys, d_head); mask boolean, True = may attend
    (else ValueError), broadcastable to (..., n_queries, n_keys). Returns (...,
    n_queries, n_keys), at least in single precision; a row that sees nothing is zero.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1.
    """
    if mask is not None and mask.dtype != bool:
        raise ValueError("mask must be boolean with True = may attend, "
                         f"got {mask.dtype}")
    types = [a.dtype if a.dtype.kind == "f" else float for a in (q, k)]
    work = np.result_type(*types, np.float32)  # never in integers or in half
    q, k = q.astype(work, copy=False), k.astype(work, copy=False)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ np.swapaxes(k, -1, -2) * float(scale)
    if causal:
        allowed = causal_mask(q.shape[-2], k.shape[-2])
        scores = np.where(allowed, scores, -np.inf)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    return softmax(scores)


class SelfAttention(nn.Module):
    """One head of self-attention: q, k and v are projections of the same x.

    x (..., n, d_model). Returns (out (..., n, d_head), weights (..., n, n)).
    """

    def __init__(self, d_model, d_head):
        super().__init__()
        self.query = nn.Linear(d_model, d_head)
        self.key = nn.Linear(d_model, d_head)
        self.value = nn.Linear(d_model, d_head)

    def forward(self, x, causal=False):
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if causal:
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        weights = torch.softmax(scores, dim=-1)
        return weights @ v, weights


def training_step(model, optimiser, x, y):
    """One step of training: cross-entropy, gradients, clipping to norm 1, optimiser.

    model(x): logits (batch, n, n_answers) for x (batch, n); y (batch, n) are the right
    answers. Returns the loss before the step, a float.
    """
    loss = nn.functional.cross_entropy(model(x).transpose(1, 2), y)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()


def test_attention(attention):
    """Raise AssertionError if attention(q, k, v, mask, causal, scale) is wrong."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in ((2, 4), (5, 4), (5, 3)))
    every, triangle = np.ones((2, 5), bool), np.tri(2, 5, 3, dtype=bool)
    some = np.array([[True, False, True, True, False], [False, True, False, True, True]])
    cases = [({}, every, 0.5), ({"scale": 2.0}, every, 2.0), ({"mask": some}, some, 0.5),
             ({"causal": True}, triangle, 0.5),
             ({"mask": some, "causal": True}, some & triangle, 0.5)]
    for options, allowed, scale in cases:
        powers = np.exp(q @ k.T * scale) * allowed
        expected = powers / powers.sum(-1, keepdims=True) @ v
        assert np.allclose(attention(q, k, v, **options), expected), options
    nothing = attention(q, k, v, mask=np.zeros((2, 5), bool))
    assert np.array_equal(nothing, np.zeros((2, 3))), "nothing to attend to"
    large = attention(1e4 * q, k, v)
    assert np.allclose(large, v[(q @ k.T).argmax(-1)]), "large scores"


SOFTMAX_ROWS = r"""
__device__ float warp_max(float x) {
  for (int o = 16; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, o));
  return x;
}
__device__ float warp_sum(float x) {
  for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffff, x, o);
  return x;
}
__global__ void softmax_rows(const float* s, float* p, int n_keys) {
  const float* row = s + (size_t)blockIdx.x * n_keys;
  float* weights = p + (size_t)blockIdx.x * n_keys;
  float maximum = -INFINITY;
  for (int j = threadIdx.x; j < n_keys; j += 32) maximum = fmaxf(maximum, row[j]);
  maximum = warp_max(maximum);
  float total = 0.0f;
  for (int j = threadIdx.x; j < n_keys; j += 32) total += expf(row[j] - maximum);
  total = warp_sum(total);
  for (int j = threadIdx.x; j < n_keys; j += 32) weights[j] = expf(row[j] - maximum) / total;
}
"""


ATTENTION_TILED = r"""
__global__ void attention_tiled(const float* q, const float* k, const float* v,
                                const unsigned char* mask, float* out, int n_queries, int n_keys,
                                int d, int d_v, int use_mask, int causal, float scale) {
  extern __shared__ float shared[];
  float* q_tile = shared;
  float* k_tile = q_tile + TILE * (d + PAD);
  float* v_tile = k_tile + TILE * (d + PAD);
  float* o_tile = v_tile + TILE * (d_v + PAD);  // the output, undivided
  float* p_tile = o_tile + TILE * (d_v + PAD);  // the weights, undivided
  int x = threadIdx.x;
  int y = threadIdx.y;
  int i = blockIdx.y * TILE + y;
  size_t head = blockIdx.x;
  q += head * n_queries * d;
  k += head * n_keys * d;
  v += head * n_keys * d_v;
  load_tile(q_tile, d + PAD, q, blockIdx.y * TILE, n_queries, d);
  for (int c = x; c < d_v; c += TILE) o_tile[y * (d_v + PAD) + c] = 0.0f;
  float maximum = -INFINITY;
  float total = 0.0f;
  for (int pass = 0; pass < 2; ++pass) {
    for (int first = 0; first < n_keys; first += TILE) {
      __syncthreads();  // the tiles of the last round have been used
      load_tile(k_tile, d + PAD, k, first, n_keys, d);
      if (pass == 1) load_tile(v_tile, d_v + PAD, v, first, n_keys, d_v);
      __syncthreads();  // the new tiles have arrived
      int j = first + x;
      bool allowed = i < n_queries && j < n_keys && (!causal || j <= i + n_keys - n_queries);
      if (allowed && use_mask) allowed = mask[(head * n_queries + i) * n_keys + j];
      float s = 0.0f;
      for (int t = 0; t < d; ++t) s += q_tile[y * (d + PAD) + t] * k_tile[x * (d + PAD) + t];
      s = allowed ? scale * s : -INFINITY;
      if (pass == 0) maximum = fmaxf(maximum, s);
      if (pass == 1) total += add_to_output(o_tile, p_tile, v_tile, expf(s - maximum), d_v);
    }
    maximum = row_max(maximum);
    if (maximum == -INFINITY) maximum = 0.0f;  // nothing to attend to: every weight is 0
  }
  total = row_sum(total);
  for (int c = x; c < d_v && i < n_queries; c += TILE)
    out[(head * n_queries + i) * d_v + c] =
        total == 0.0f ? 0.0f : o_tile[y * (d_v + PAD) + c] / total;
}
"""


def additive_scores(q, k, w_q, w_k, v):
    """Additive score e_ij = v . tanh(q_i w_q + k_j w_k) of each query with each key.

    q (n_queries, d_q), k (n_keys, d_k), w_q (d_q, d_a), w_k (d_k, d_a), v (d_a,).
    Returns (n_queries, n_keys).
    Source: Bahdanau et al. 2014 (arXiv 1409.0473), appendix A.1.2.
    """
    return np.tanh((q @ w_q)[:, None, :] + (k @ w_k)[None, :, :]) @ v


def attention_backward(q, k, v, d_out, mask=None, causal=False, scale=None):
    """Gradients of attention_numpy with respect to q, k and v, in NumPy.

    Shapes as in attention_numpy; d_out (..., n_queries, d_v), else ValueError. Returns
    (d_q, d_k, d_v) in the shapes and float types of q, k, v: where one is shared along
    a leading axis, its gradient is summed over it. A forbidden row of v may be nan.
    """
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    expected = (*lead, q.shape[-2], v.shape[-1])
    if d_out.shape != expected:
        raise ValueError(f"d_out must have the shape {expected}, got {d_out.shape}")

    def summed(gradient, array):  # over the axes along which the array was shared
        ahead = gradient.ndim - array.ndim
        axes = [ahead + i for i, n in enumerate(array.shape)
                if n == 1 != gradient.shape[ahead + i]]
        dtype = array.dtype if array.dtype.kind == "f" else float
        total = gradient.sum((*range(ahead), *axes)).reshape(array.shape)
        return total.astype(dtype, copy=False)

    q_, k_ = (np.where(np.isnan(a), 0, a) for a in (q, k))  # seen: d_s is nan already
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    p = attention_weights(q, k, mask, causal, scale)
    d_p = np.where(p == 0, 0, d_out @ np.swapaxes(v, -1, -2))  # forbidden v: nan?
    d_s = scale * p * (d_p - (p * d_p).sum(-1, keepdims=True))
    return (summed(d_s @ k_, q), summed(np.swapaxes(d_s, -1, -2) @ q_, k),
            summed(np.swapaxes(p, -1, -2) @ d_out, v))


LOAD_TILE = r"""
#define TILE 16
__device__ void load_tile(float* tile, int stride, const float* rows, int first, int n_rows,
                          int d) {
  int thread = threadIdx.y * TILE + threadIdx.x;
  for (int e = thread; e < TILE * d; e += TILE * TILE) {
    int r = e / d;
    int c = e % d;
    bool exists = first + r < n_rows;
    tile[r * stride + c] = exists ? rows[(size_t)(first + r) * d + c] : 0.0f;
  }
}
"""


SCORES_TILED = r"""
__global__ void scores_tiled(const float* q, const float* k, float* s, int n_queries,
                             int n_keys, int d, float scale) {
  extern __shared__ float k_tile[];                             // TILE keys
  int i = blockIdx.x * TILE + threadIdx.y;                      // this thread's query
  for (int first = 0; first < n_keys; first += TILE) {
    /* place 0 */
    load_tile(k_tile, d, k, first, n_keys, d);
    /* place 1 */
    int j = first + threadIdx.x;                                // this thread's key
    if (i < n_queries && j < n_keys) {
      /* place 2 */
      float sum = 0.0f;
      for (int t = 0; t < d; ++t) sum += q[(size_t)i * d + t] * k_tile[threadIdx.x * d + t];
      s[(size_t)i * n_keys + j] = scale * sum;
    }
    /* place 3 */
  }
  /* place 4 */
}
"""


ROW_OF_A_TILE = r"""
#define PAD 1  // one unused float at the end of each row of a tile
__device__ float row_max(float x) {  // over the TILE threads that share a row
  for (int o = TILE / 2; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, o));
  return x;
}
__device__ float row_sum(float x) {
  for (int o = TILE / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffff, x, o);
  return x;
}
"""


ADD_TILE = r"""
__device__ float add_to_output(float* o_tile, float* p_tile, const float* v_tile, float weight,
                               int d_v) {                // one round of the blend, in a row
  int x = threadIdx.x;
  int y = threadIdx.y;
  p_tile[y * (TILE + PAD) + x] = weight;
  __syncwarp();                                          // a row of the tile belongs to one warp
  for (int c = x; c < d_v; c += TILE)
    for (int r = 0; r < TILE; ++r)
      o_tile[y * (d_v + PAD) + c] +=
          p_tile[y * (TILE + PAD) + r] * v_tile[r * (d_v + PAD) + c];
  return weight;
}
"""


def local_weights(scores, centre, window):
    """Local attention weights: a softmax over a window, times a Gaussian (local-p).

    scores (n_queries, n_keys); centre (n_queries,), real positions, 0 is the first key;
    window is D >= 1.
    Returns weights (n_queries, n_keys): 0 outside the window, not normalised again.
    Raises ValueError if window is below 1. Source: arXiv 1508.04025, equation 10.
    """
    if window < 1:
        raise ValueError(f"window is {window}; expected an integer of at least 1")
    distance = np.arange(scores.shape[-1]) - np.asarray(centre)[:, None]
    gaussian = np.exp(-(distance**2) / (2 * (window / 2) ** 2))
    return softmax(np.where(np.abs(distance) <= window, scores, -np.inf)) * gaussian


def check_arguments(q, k, v, mask=None):
    """Raise ValueError or TypeError, in one sentence, unless q, k, v and mask fit together. For arrays and tensors."""
    cuda.check_numbers(q=q, k=k, v=v)
    for name, array in (("q", q), ("k", k), ("v", v)):
        if len(array.shape) < 2:
            raise ValueError(f"{name} must have at least two axes (seq, d_head), got shape {tuple(array.shape)}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same d_head, got {q.shape[-1]} and {k.shape[-1]}")
    if q.shape[-1] == 0:
        raise ValueError(f"q and k must have a d_head of at least 1, got shape {tuple(q.shape)}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have the same n_keys, got {k.shape[-2]} and {v.shape[-2]}")
    axes = [tuple(a.shape[:-2]) for a in (q, k, v)]
    try:
        full = (*np.broadcast_shapes(*axes), q.shape[-2], k.shape[-2])
    except ValueError:
        got = f"{axes[0]}, {axes[1]} and {axes[2]}"
        raise ValueError(f"the leading axes of q, k and v must broadcast, got {got}") from None
    if mask is not None:
        if "bool" not in str(getattr(mask, "dtype", type(mask).__name__)):
            raise ValueError("mask must be boolean with True = may attend, "
                             f"got {getattr(mask, 'dtype', type(mask).__name__)}")
        try:
            fits = np.broadcast_shapes(tuple(mask.shape), full) == full
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"mask must broadcast to {full}, got shape {tuple(mask.shape)}")

@cuda.skip_unseen
def attention_numpy(q, k, v, mask=None, causal=False, scale=None):
    """Each query's weighted average of the values: softmax(q k^T / sqrt(d_head)) v, in NumPy.

    The oracle of attention_torch and attention_cuda.
    q (..., n_queries, d_head), k (..., n_keys, d_head), v (..., n_keys, d_v), leading axes broadcast; mask boolean,
    True = may attend, broadcastable to (..., n_queries, n_keys); causal is aligned at the bottom right; scale defaults
    to 1/sqrt(d_head). Returns (..., n_queries, d_v) in the float type of q, float64 for integers (half precision is
    computed in single); a query with nothing to attend to gets zeros, and a value that it may not attend to changes
    nothing, be it nan. Raises ValueError when shapes or mask do not fit, TypeError for anything but arrays.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1.
    """
    check_arguments(q, k, v, mask)
    cuda.check_kind(np.ndarray, q=q, k=k, v=v)
    q_, k_, v_ = (a.astype(cuda.work_type(q), copy=False) for a in (q, k, v))
    return cuda.like(attention_weights(q_, k_, mask, causal, scale) @ v_, q)


@cuda.skip_unseen
def attention_torch(q, k, v, mask=None, causal=False, scale=None):
    """Scaled dot-product attention in PyTorch; same arguments, shapes and errors as attention_numpy, differentiable.

    Half precision is computed in single and returned in the type of q. mask and causal as in attention_numpy.
    """
    check_arguments(q, k, v, mask)
    cuda.check_kind(torch.Tensor, q=q, k=k, v=v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q_, k_, v_ = (a.to(cuda.work_type(q)) for a in (q, k, v))
    lost = k_.isnan()                                      # a key with nan has score nan, but as a forbidden one the
    scores = q_ @ k_.masked_fill(lost, 0).mT * scale       # gradient 0, and not 0 times nan
    scores = scores.masked_fill(lost.any(-1).unsqueeze(-2), math.nan)
    if causal:
        allowed = torch.from_numpy(causal_mask(q.shape[-2], k.shape[-2])).to(q.device)
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is not None:
        scores = torch.where(torch.as_tensor(mask, device=q.device), scores, -math.inf)
    if k.shape[-2] == 0:
        return cuda.like(scores @ v_, q)
    maximum = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - maximum.masked_fill(maximum == -math.inf, 0))
    total = weights.sum(-1, keepdim=True)
    return cuda.like(weights / total.masked_fill(total == 0, 1) @ v_, q)


@functools.cache
def attention_kernel():
    """The tiled kernel, compiled on first use."""
    return cuda.compile(LOAD_TILE + ROW_OF_A_TILE + ADD_TILE + ATTENTION_TILED, name="attention_tiled")

def attention_launch(q, k, v, mask, causal, scale):
    """Grid, block, shared bytes, arguments and output of the tiled kernel, for tensors (..., seq, d)."""
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    n_queries, n_keys, d, d_v = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    q, k, v = (t.detach().float().expand(*lead, *t.shape[-2:]).contiguous() for t in (q, k, v))
    allowed = torch.ones(1, dtype=torch.uint8, device=q.device) if mask is None else \
        torch.as_tensor(mask, device=q.device).expand(*lead, n_queries, n_keys).to(torch.uint8).contiguous()
    out = torch.zeros(*lead, n_queries, d_v, device=q.device)
    scale = 1 / math.sqrt(d) if scale is None else float(scale)
    shared = 4 * 16 * (2 * (d + 1) + 2 * (d_v + 1) + 17)
    arguments = (q, k, v, allowed, out, n_queries, n_keys, d, d_v, int(mask is not None), int(causal), scale)
    return (max(1, math.prod(lead)), -(-n_queries // 16)), (16, 16), shared, arguments, out

@cuda.skip_unseen
def attention_cuda(q, k, v, mask=None, causal=False, scale=None):
    """Scaled dot-product attention by the tiled CUDA kernel; arguments, shapes and errors as attention_numpy.

    NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU. Computed in single precision, returned in
    the kind and type of q. Not differentiable.
    d + d_v up to 1,805 where a block may have 227 KB of shared memory, 1,293 on sm_80, 781 on sm_120.
    """
    check_arguments(q, k, v, mask)
    grid, block, shared, arguments, out = attention_launch(*cuda.on_device(q, k, v), mask, causal, scale)
    if out.numel() and k.shape[-2]:
        attention_kernel().fast[grid, block, shared](*arguments)                # without the checks and counts
    return cuda.like(out, q)


SCORES = r"""
__global__ void scores(const float* q, const float* k, float* s, int n_queries, int n_keys,
                       int d, float scale) {
  int i = blockIdx.y * blockDim.y + threadIdx.y;
  int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n_queries || j >= n_keys) return;
  float sum = 0.0f;
  for (int t = 0; t < d; ++t) sum += q[(size_t)i * d + t] * k[(size_t)j * d + t];
  s[(size_t)i * n_keys + j] = scale * sum;
}
"""
BLEND = r"""
__global__ void blend(const float* p, const float* v, float* out, int n_queries, int n_keys,
                      int d) {
  int i = blockIdx.y * blockDim.y + threadIdx.y;
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n_queries || t >= d) return;
  float sum = 0.0f;
  for (int j = 0; j < n_keys; ++j) sum += p[(size_t)i * n_keys + j] * v[(size_t)j * d + t];
  out[(size_t)i * d + t] = sum;
}
"""


class AdditiveAttention(nn.Module):
    """Bahdanau's alignment model: e_tj = v . tanh(s_{t-1} W_q + h_j W_k), alpha_t = softmax(e_t).

    The context is c_t = sum_j alpha_tj h_j. Parameters: w_q (d_query, d_hidden), w_k (d_key, d_hidden), v (d_hidden,);
    in the paper W_a, U_a, v_a. Source: arXiv 1409.0473, equations 5 and 6, appendix A.1.2.
    """

    def __init__(self, d_query, d_key, d_hidden):
        super().__init__()
        self.w_q = nn.Parameter(torch.randn(d_query, d_hidden) / math.sqrt(d_query))
        self.w_k = nn.Parameter(torch.randn(d_key, d_hidden) / math.sqrt(d_key))
        self.v = nn.Parameter(torch.randn(d_hidden) / math.sqrt(d_hidden))

    def forward(self, query, keys, mask, projected=None):
        """query (batch, d_query), keys (batch, n_keys, d_key), mask (batch, n_keys) bool, True = may attend.

        projected: keys @ w_k, for which one computation a sentence is enough; it is computed here where it is not given.
        Returns the context c_t (batch, d_key) and the weights alpha_t (batch, n_keys); zeros for a row that may
        attend to nothing. ValueError for a mask that does not fit.
        """
        expected = tuple(keys.shape[:-1])
        if mask.dtype != torch.bool or mask.shape != expected:
            raise ValueError(
                f"mask must be boolean of shape {expected}, not {mask.dtype} {tuple(mask.shape)}"
            )
        projected = keys @ self.w_k if projected is None else projected
        scores = torch.tanh((query @ self.w_q)[:, None] + projected) @ self.v
        lowest = torch.finfo(
            scores.dtype
        ).min  # a row of -inf would be nan; `* mask` makes zeros exact
        weights = torch.softmax(scores.masked_fill(~mask, lowest), dim=-1) * mask
        return (weights[:, None] @ keys)[:, 0], weights


class Encoder(nn.Module):
    """Annotations of a sentence: a GRU reads it forwards, another backwards. Sentences as in Seq2Seq."""

    def __init__(self, n_source, d_hidden):
        super().__init__()
        self.embed = nn.Embedding(n_source, d_hidden)
        self.gru = nn.GRU(d_hidden, d_hidden, batch_first=True, bidirectional=True)

    def forward(self, source):
        """All h_j (batch, n_source, 2 d), and the two states that have read everything, h_n and h_1, each (batch, d)."""
        lengths = (source != Vocabulary.PAD).sum(1).cpu()
        words = pack_padded_sequence(
            self.embed(source), lengths, batch_first=True, enforce_sorted=False
        )
        h, (h_n, h_1) = self.gru(words)
        return (
            pad_packed_sequence(h, batch_first=True, total_length=source.shape[1])[0],
            h_n,
            h_1,
        )


class Seq2Seq(nn.Module):
    """An encoder-decoder of word ids, as in Bahdanau et al. 2014 (arXiv 1409.0473), with attention or one fixed vector.

    n_source, n_target: sizes of the two vocabularies, whose ids of padding, start and end are those of `Vocabulary`.
    attention: "additive", or None for the fixed vector c_t = [forward h_n; backward h_1].
    Sentences are ids (batch, length) int64, each with at least one word, padded behind. In the paper's letters:
    h_j = [forward h_j; backward h_j], s_0 = tanh(W_s backward h_1), s_t = f(s_{t-1}, y_{t-1}, c_t) and
    p(y_t) = softmax(g(y_{t-1}, s_t, c_t)).
    """

    def __init__(self, n_source, n_target, d_hidden=48, attention="additive"):
        super().__init__()
        if attention not in ("additive", None):
            raise ValueError(f'attention must be "additive" or None, not {attention!r}')
        self.encoder = Encoder(n_source, d_hidden)
        self.embed_target = nn.Embedding(n_target, d_hidden)
        self.w_s = nn.Parameter(torch.randn(d_hidden, d_hidden) / math.sqrt(d_hidden))
        self.attention = (
            AdditiveAttention(d_hidden, 2 * d_hidden, d_hidden) if attention else None
        )
        self.f = nn.GRUCell(3 * d_hidden, d_hidden)
        self.g = nn.Linear(4 * d_hidden, n_target)

    def decode(self, source, n_steps, target=None):
        """Logits (batch, n_steps, n_target), alignments (batch, n_steps, n_source) or None.

        y_{t-1} is the target's word, or without a target the decoder's own best word.
        """
        h, h_n, h_1 = self.encoder(source)
        projected = h @ self.attention.w_k if self.attention else None  # once, not at each t
        s, fixed = torch.tanh(h_1 @ self.w_s), torch.cat([h_n, h_1], dim=-1)
        y, logits, alignments = torch.full_like(source[:, 0], Vocabulary.START), [], []
        for t in range(n_steps):
            y = self.embed_target(y)
            c, alpha = fixed, None
            if self.attention:
                c, alpha = self.attention(s, h, source != Vocabulary.PAD, projected)
            s = self.f(torch.cat([y, c], dim=-1), s)
            logits.append(self.g(torch.cat([y, s, c], dim=-1)))
            alignments.append(alpha)
            y = logits[-1].argmax(-1) if target is None else target[:, t]
        found = torch.stack(alignments, 1) if self.attention else None
        return torch.stack(logits, 1), found

    def forward(self, source, target):
        """Logits (batch, length, n_target) for every word of target (batch, length), given the words before it."""
        return self.decode(source, target.shape[1], target)[0]

    @torch.no_grad()
    def translate(self, source, n_steps):
        """Greedy translation: ids (batch, n_steps), to be read up to the first END; and the alignments or None."""
        logits, alignments = self.decode(source, n_steps)
        return logits.argmax(-1), alignments
