# Generated from solutions/11_differential_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 11 · Differential attention: the finished code."""

import functools
import math

import numpy as np
import torch
from torch import nn

from attention.flash import FLASH_HEAD, flash_attention_cuda
from attention.fundamentals import attention_numpy, attention_torch, attention_weights
from attention.grouped_query import grouped_query_attention_numpy
from attention.multi_head import Positions, masked_softmax, merge_heads, split_heads
from utils import cuda

__all__ = [
    "differential_attention_numpy",
    "differential_attention_torch",
    "differential_attention_cuda",
    "DifferentialAttention",
    "lambda_init",
]


def subtract_map(q1, k1, q2, k2, v, lam, causal=False):
    """(softmax(q1 k1ᵀ/√d) - lam softmax(q2 k2ᵀ/√d)) v; lam a number or (heads,).

    q1, q2 (..., heads, n_queries, d_head), k1, k2 (..., heads, n_keys, d_head),
    v (..., heads, n_keys, d_v). Returns the float type of q1. Source: Ye et al. 2024.
    """
    lam = np.asarray(lam, q1.dtype)[..., None, None]
    first = attention_weights(q1, k1, causal=causal)
    second = attention_weights(q2, k2, causal=causal)
    return ((first - lam * second) @ v).astype(q1.dtype, copy=False)


def lambda_init(depth):
    """The fixed part of lambda in layer `depth`, from 0: .2, .356, .471, .556 ..."""
    if depth < 0:
        raise ValueError(f"depth must be at least 0, got {depth}")
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


class DifferentialWeights(nn.Module):
    """n_heads pairs of queries and keys, d_head d_model / (2 n_heads); depth from 0.

    positions: rotates queries and keys. ValueError unless 2 n_heads divides d_model.
    """

    def __init__(self, d_model, n_heads, depth=0, positions=None):
        super().__init__()
        if n_heads < 1 or d_model % (2 * n_heads):
            raise ValueError(f"2 n_heads must divide d_model, got {n_heads}, {d_model}")
        self.n_heads, self.d_head = n_heads, d_model // (2 * n_heads)
        self.positions = Positions() if positions is None else positions
        self.lambda_init, self.factor = lambda_init(depth), 1 - lambda_init(depth)
        for w in ("w_q", "w_k", "w_v", "w_o"):
            setattr(self, w, nn.Parameter(torch.randn(d_model, d_model) / d_model**0.5))
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(self, name, nn.Parameter(0.1 * torch.randn(self.d_head)))
        self.norm = nn.RMSNorm(2 * self.d_head, eps=1e-5)

    def project(self, x, positions=None, cache=None):
        """q, k (batch, 2 n_heads, n, d_head) and v (batch, n_heads, n, 2 d_head)."""
        where = torch.arange(x.shape[1]) if positions is None else positions
        q, k, v = (split_heads(x @ w, 2 * self.n_heads)
                   for w in (self.w_q, self.w_k, self.w_v))
        q, k = (self.positions.rotate(a, where.to(x.device)) for a in (q, k))
        k, v = (k, v) if cache is None else cache.update(k, v)
        return q, k, merge_heads(v.unflatten(1, (self.n_heads, 2)))


class DifferentialAttention(DifferentialWeights, nn.Module):
    """Multi-head differential attention (V1), called as MultiHeadAttention is.

    x (batch, n, d_model) to the same; mask boolean, True = may attend. Source: Ye et
    al. 2024 (arXiv 2410.05258), § 2.1.
    """

    @property
    def lam(self):
        first = (self.lambda_q1 @ self.lambda_k1).exp()
        second = (self.lambda_q2 @ self.lambda_k2).exp()
        return first - second + self.lambda_init

    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        q, k, v = self.project(x, positions, cache)
        maps = masked_softmax(q @ k.mT / math.sqrt(self.d_head), mask, causal)
        difference = maps[:, 0::2] - self.lam * maps[:, 1::2]
        heads = self.norm(cuda.weighted_sum(difference, v)) * self.factor
        return merge_heads(heads) @ self.w_o


DIFFERENTIAL_TOOLS = FLASH_HEAD + r"""
// This thread's score: query y of a tile with key x of another.
__device__ float score(const float* q_tile, const float* k_tile, int d) {
  float s = 0.0f;
  for (int t = 0; t < d; ++t)
    s += q_tile[threadIdx.y * (d + PAD) + t] * k_tile[threadIdx.x * (d + PAD) + t];
  return s;
}
// From a score to a weight; returns the factor for what was summed before.
__device__ float rescale(float s, float& weight, float& maximum, float& total) {
  float larger = fmaxf(maximum, row_max(s));
  float top = larger == -INFINITY ? 0.0f : larger;       // no key so far: -inf minus -inf is nan
  float shrink = expf(maximum - top);
  weight = expf(s - top);
  total = shrink * total + row_sum(weight);
  maximum = larger;
  return shrink;
}
__device__ float divided(float sum, float total) { return total == 0.0f ? 0.0f : sum / total; }
"""


DIFFERENTIAL_FLASH = DIFFERENTIAL_TOOLS + r"""
template <int C>                                         // columns of V a thread: 16 C >= d_v
__global__ void differential_flash(const float* q1, const float* k1, const float* q2,
    const float* k2, const float* v, const float* lam, float* out, int n_queries, int n_keys,
    int d, int d_v, int causal, float scale) {
  extern __shared__ float q1_tile[];
  int x = threadIdx.x, y = threadIdx.y, stride = d + PAD, top = blockIdx.y * TILE, i = top + y;
  float *q2_tile = q1_tile + TILE * stride, *k1_tile = q2_tile + TILE * stride;
  float *k2_tile = k1_tile + TILE * stride, *v_tile = k2_tile + TILE * stride;
  size_t head = blockIdx.x, query = head * n_queries + i;
  k1 += head * n_keys * d, k2 += head * n_keys * d, v += head * n_keys * d_v;
  load_rows(q1_tile, TILE, d, stride, q1 + head * n_queries * d, top, n_queries, d);
  load_rows(q2_tile, TILE, d, stride, q2 + head * n_queries * d, top, n_queries, d);
  int visible = visible_keys(top + TILE, n_queries, n_keys, causal);
  float maximum1 = -INFINITY, maximum2 = -INFINITY, lambda = lam[head];
  float total1 = 0.0f, total2 = 0.0f, sum1[C] = {}, sum2[C] = {};
  for (int first = 0; first < visible; first += TILE) {
    __syncthreads();                                     // load: the last tiles are used up
    load_rows(k1_tile, TILE, d, stride, k1, first, visible, d);
    load_rows(k2_tile, TILE, d, stride, k2, first, visible, d);
    load_rows(v_tile, TILE, TILE * C, TILE * C, v, first, visible, d_v);
    __syncthreads();                                     // the new tiles are there
    bool seen = may_attend(i, first + x, n_queries, n_keys, causal);             // score
    float s1 = seen ? scale * score(q1_tile, k1_tile, d) : -INFINITY;
    float s2 = seen ? scale * score(q2_tile, k2_tile, d) : -INFINITY;
    float weight1, shrink1 = rescale(s1, weight1, maximum1, total1);             // rescale
    float weight2, shrink2 = rescale(s2, weight2, maximum2, total2);
    for (int c = 0; c < C; ++c) sum1[c] *= shrink1;
    for (int c = 0; c < C; ++c) sum2[c] *= shrink2;
    for (int r = 0; r < TILE; ++r) {                     // accumulate: one value for both maps
      float w1 = __shfl_sync(0xffffffff, weight1, r, TILE);
      float w2 = __shfl_sync(0xffffffff, weight2, r, TILE);
      for (int c = 0; c < C; ++c) {
        float value = v_tile[(r * C + c) * TILE + x];
        sum1[c] += w1 * value;
        sum2[c] += w2 * value;
      }
    }
  }
  for (int c = 0; c < C && i < n_queries && x + TILE * c < d_v; ++c)             // write
    out[query * d_v + x + TILE * c] = divided(sum1[c], total1) - lambda * divided(sum2[c], total2);
}
"""


def sigmoid(x):
    """1 / (1 + exp(-x)) for arrays, without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def differential_pairs(q, k, v, logits):
    """Heads of DIFF V2, causal, NumPy: softmax map 2i minus sigmoid(logits) map 2i+1.

    q (..., 2 heads, n_queries, d_head), k and v (..., n_kv_heads, n_keys, d_head),
    logits (..., heads, n_queries). ValueError unless each group holds whole pairs.
    """
    if k.shape[-3] == 0 or q.shape[-3] % (2 * k.shape[-3]):
        raise ValueError("each group must hold whole pairs of query heads, got "
                         f"{q.shape[-3]} query heads on {k.shape[-3]} key heads")
    heads = grouped_query_attention_numpy(q, k, v, causal=True)
    lam = sigmoid(logits)[..., None].astype(q.dtype)
    return heads[..., 0::2, :, :] - lam * heads[..., 1::2, :, :]


def test_pairs(heads):
    """Raise AssertionError if heads of DIFF V2 are wrong; arguments as in 11D."""
    rng = np.random.default_rng(0)
    q, k = 2 * rng.standard_normal((2, 8, 3, 4)), rng.standard_normal((2, 2, 5, 4))
    v, logits = rng.standard_normal((2, 2, 5, 4)), 2 * rng.standard_normal((2, 4, 3))
    got = heads(q, k, v, logits)
    for b, head, i in np.ndindex(2, 4, 3):
        expected, group = 0.0, 2 * head // 4
        for which, share in ((2 * head, 1.0), (2 * head + 1, -sigmoid(logits[b, head, i]))):
            powers = np.exp(k[b, group, :i + 3] @ q[b, which, i] / 2)
            expected = expected + share * powers @ v[b, group, :i + 3] / powers.sum()
        assert np.abs(got[b, head, i] - expected).max() < 1e-8


def first_as_gate(q, k, v):
    """Causal attention with the first token outside of the softmax, as a gate.

    q (batch, n_heads, n_queries, d_head), k and v (batch, n_heads, n_keys, d_head).
    Returns out, shaped as q, and the gates (batch, n_heads, n_queries).
    """
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    allowed = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device)
    allowed = allowed.tril(n_keys - n_queries)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    sink, others, seen = scores[..., 0], scores[..., 1:], allowed[:, 1:]
    lse = torch.logsumexp(others.masked_fill(~seen, -math.inf), dim=-1)
    gate = torch.sigmoid(lse - sink)
    out = masked_softmax(others, seen) @ v[..., 1:, :]
    return gate[..., None] * out + (1 - gate)[..., None] * v[..., :1, :], gate


def differential_bytes(n_queries, n_keys, d, d_v, causal=False, maps=1):
    """Bytes that one head of the kernel asks for, exactly: (keys and values, queries, output).

    maps: how often V is read: 1 in one pass, 2 in two calls, each of which writes an output; those are read again.
    """
    ends = [min(first + 16, n_queries) for first in range(0, n_queries, 16)]
    keys = sum(max(0, end + n_keys - n_queries) if causal else n_keys for end in ends)
    outputs = 1 if maps == 1 else 5                        # two written, both read, their difference written
    return 4 * keys * (2 * d + maps * d_v), 4 * 2 * n_queries * d, 4 * outputs * n_queries * d_v


def check_differential(q1, k1, q2, k2, v, lam):
    """Raise ValueError or TypeError, in one sentence, unless two maps fit together. For arrays and tensors.

    Returns the leading axes (those before seq and d_head), broadcast together.
    """
    arrays = {"q1": q1, "k1": k1, "q2": q2, "k2": k2, "v": v}
    cuda.check_numbers(**arrays)
    for name, array in arrays.items():
        if len(array.shape) < 2:
            raise ValueError(f"{name} must have at least two axes (seq, d_head), got shape {tuple(array.shape)}")
    widths = [array.shape[-1] for array in (q1, k1, q2, k2)]
    if len(set(widths)) > 1 or widths[0] == 0:
        raise ValueError(f"q1, k1, q2 and k2 must have the same d_head of at least 1, got {widths[0]}, {widths[1]}, "
                         f"{widths[2]} and {widths[3]}")
    if q1.shape[-2] != q2.shape[-2]:
        raise ValueError(f"q1 and q2 must have the same n_queries, got {q1.shape[-2]} and {q2.shape[-2]}")
    if not k1.shape[-2] == k2.shape[-2] == v.shape[-2]:
        raise ValueError("k1, k2 and v must have the same n_keys, got "
                         f"{k1.shape[-2]}, {k2.shape[-2]} and {v.shape[-2]}")
    axes = [tuple(array.shape[:-2]) for array in arrays.values()]
    try:
        lead = np.broadcast_shapes(*axes)
    except ValueError:
        got = ", ".join(map(str, axes))
        raise ValueError(f"the leading axes of q1, k1, q2, k2 and v must broadcast, got {got}") from None
    shape = tuple(np.shape(lam))
    if shape not in ((), lead[-1:]):
        wanted = f" or one for each of the {lead[-1]} heads" if lead else ""
        raise ValueError(f"lam must be a number{wanted}, got shape {shape}")
    return lead


@functools.cache
def differential_kernel(columns):
    """The kernel for so many columns of V a thread, compiled on first use."""
    return cuda.compile(DIFFERENTIAL_FLASH, name="differential_flash", template=(columns,))

def differential_launch(q1, k1, q2, k2, v, lam, causal=False, scale=None):
    """What launches the kernel: kernel, (grid, block, shared bytes), arguments. The seventh is the output.

    All leading axes are one: (heads, seq, d), single precision. The output (heads, n_queries, d_v) is to be written.
    """
    lead = check_differential(q1, k1, q2, k2, v, lam)
    arrays = cuda.on_device(q1, k1, q2, k2, v)
    heads, (n_queries, d), (n_keys, d_v) = math.prod(lead), q1.shape[-2:], v.shape[-2:]
    arrays = [a.expand(*lead, *a.shape[-2:]).reshape(heads, *a.shape[-2:]).contiguous() for a in arrays]
    lam = torch.as_tensor(lam, dtype=torch.float32).detach().to(arrays[0].device)
    lam = lam.expand(lead).reshape(heads).contiguous()
    out = arrays[0].new_zeros(heads, n_queries, d_v)
    columns = max(1, -(-d_v // 16))
    launch = (heads, -(-n_queries // 16)), (16, 16), 4 * 16 * (4 * (d + 1) + 16 * columns)
    scale = 1 / math.sqrt(d) if scale is None else float(scale)
    return differential_kernel(columns), launch, (*arrays, lam, out, n_queries, n_keys, d, d_v, int(causal), scale)


def differential_attention_cuda(q1, k1, q2, k2, v, lam, causal=False, scale=None):
    """differential_attention_numpy by a CUDA kernel that forms both maps in one pass: V is read once for both.

    q1, q2 (..., n_queries, d_head), k1, k2 (..., n_keys, d_head), v (..., n_keys, d_v), leading axes broadcast, the
    last of them the heads; lam a number or (heads,); causal is aligned at the bottom right; scale defaults to
    1/sqrt(d_head). NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU. Computed in single precision.
    Returns (..., n_queries, d_v) in the kind and type of q1; a query with nothing to attend to gets zeros. Not
    differentiable. Has 48 KB of shared memory where 4 (d_head + 1) + d_v is up to 768; more has to be granted by the
    GPU. Raises ValueError when shapes do not fit.
    Source: Ye et al. 2024 (arXiv 2410.05258).
    """
    lead = check_differential(q1, k1, q2, k2, v, lam)
    values = cuda.on_device(v)[0]
    if not values.isfinite().all():                        # each map takes nothing from a value whose weight is 0
        maps = [flash_attention_cuda(*cuda.on_device(q, k, v), causal, scale)[0] for q, k in ((q1, k1), (q2, k2))]
        lam = torch.as_tensor(lam, dtype=torch.float32).detach().to(maps[0].device)
        return cuda.like(maps[0] - lam.expand(lead)[..., None, None] * maps[1], q1)
    kernel, launch, arguments = differential_launch(q1, k1, q2, k2, v, lam, causal, scale)
    out = arguments[6]
    if out.numel() and v.shape[-2]:
        kernel.fast[launch](*arguments)
    return cuda.like(out.reshape(*lead, *out.shape[1:]), q1)


def lambda_for(lam, lead, like):
    """lam as an array or a tensor as `like` is, which multiplies outputs (*lead, n_queries, d_v)."""
    if isinstance(like, torch.Tensor):
        lam = torch.as_tensor(lam, dtype=like.dtype, device=like.device)
        return lam.expand(lead)[..., None, None]
    return np.broadcast_to(np.asarray(lam, like.dtype), lead)[..., None, None]

def differential_attention_numpy(q1, k1, q2, k2, v, lam, causal=False, scale=None):
    """(softmax(q1 k1ᵀ scale) - lam softmax(q2 k2ᵀ scale)) v in NumPy: attention twice, and one subtraction.

    q1, q2 (..., n_queries, d_head), k1, k2 (..., n_keys, d_head), v (..., n_keys, d_v), leading axes broadcast, the
    last of them the heads; lam a number or (heads,); causal is aligned at the bottom right; scale defaults to
    1/sqrt(d_head). No norm inside. Returns (..., n_queries, d_v) in the float type of q1; a query with nothing to
    attend to gets zeros. Raises ValueError when shapes do not fit. Source: Ye et al. 2024 (arXiv 2410.05258).
    """
    lead = check_differential(q1, k1, q2, k2, v, lam)
    cuda.check_kind(np.ndarray, q1=q1, k1=k1, q2=q2, k2=k2, v=v)
    work = cuda.work_type(q1)
    first, second = (attention_numpy(q.astype(work), k.astype(work), v.astype(work), causal=causal, scale=scale)
                     for q, k in ((q1, k1), (q2, k2)))
    first = np.broadcast_to(first, (*lead, *first.shape[-2:]))
    return cuda.like(first - lambda_for(lam, lead, first) * second, q1)

def differential_attention_torch(q1, k1, q2, k2, v, lam, causal=False, scale=None):
    """differential_attention_numpy in PyTorch, differentiable, in lam too. Same arguments, shapes and errors."""
    lead = check_differential(q1, k1, q2, k2, v, lam)
    cuda.check_kind(torch.Tensor, q1=q1, k1=k1, q2=q2, k2=k2, v=v)
    work = cuda.work_type(q1)
    first, second = (attention_torch(q.to(work), k.to(work), v.to(work), causal=causal, scale=scale)
                     for q, k in ((q1, k1), (q2, k2)))
    first = first.expand(*lead, *first.shape[-2:])
    return cuda.like(first - lambda_for(lam, lead, first) * second, q1)
