"""Answers to the exercises of lecture 01 as learners write them: right ones, unlike the lecture's, and wrong ones.

WRONG pairs each wrong answer with words that the report must contain. The known mistakes of utils/checks/lecture_01.py
are further wrong answers.
"""

import math

import numpy as np

from tests.answers.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 1.1 -------------------------------------------------------------------------------------------------------------


@right("1.1")
def softmax_through_logarithms(x, axis=-1):
    with np.errstate(divide="ignore"):
        total = np.logaddexp.reduce(x, axis=axis, keepdims=True)
    return np.exp(x - np.where(np.isneginf(total), 0, total)).astype(x.dtype)


@right("1.1")
def softmax_in_torch(x, axis=-1):
    import torch

    return torch.nan_to_num(torch.softmax(torch.from_numpy(x), dim=axis), nan=0.0).numpy()


@wrong("1.1", "exp overflows")
def naive(x, axis=-1):
    return np.exp(x) / np.exp(x).sum(axis=axis, keepdims=True)


@wrong("1.1", "returned a list")
def a_list(x, axis=-1):
    return [[math.exp(s) for s in row] for row in x]


@wrong("1.1", "`x` in place")
def shifted_in_place(x, axis=-1):
    top = x.max(axis=axis, keepdims=True)
    x -= np.where(np.isneginf(top), 0, top)
    total = np.exp(x).sum(axis=axis, keepdims=True)
    return np.exp(x) / np.where(total == 0, 1, total)


def softmax_with(top, divisor):
    """A softmax whose maximum and denominator are still to be chosen; the row of only -inf is guarded."""

    def answer(x, axis=-1):
        maximum = top(x, axis)
        powers = np.exp(x - np.where(maximum == -np.inf, 0, maximum))
        return powers / divisor(powers.sum(axis=axis, keepdims=True))

    return answer


def row_maximum(x, axis):
    return x.max(axis=axis, keepdims=True)


WRONG["1.1"] += [
    (softmax_with(lambda x, axis: x.max(), lambda t: np.where(t == 0, 1, t)), "largest score of the whole array"),
    (softmax_with(row_maximum, lambda t: t + 1e-9), "Nothing may be added to the denominator"),
    (softmax_with(row_maximum, lambda t: t + 1e-12), "In float16 so small a number is 0"),
    (softmax_with(row_maximum, lambda t: np.maximum(t, 1e-30)), "In float16 so small a number is 0"),
    (softmax_with(row_maximum, lambda t: t), "and so is 0/0"),
    (softmax_with(row_maximum, lambda t: np.where(t == 0, np.float64(1), t)), "returned float64, expected float32"),
]


@wrong("1.1", "keepdims=True keeps the axis")
def axis_lost(x, axis=-1):
    powers = np.exp(x - x.max(axis=axis))
    return powers / powers.sum(axis=axis)


# --- 1.2 -------------------------------------------------------------------------------------------------------------


@right("1.2")
def additive_one_product(q, k, w_q, w_k, v):
    """tanh(W [q; k]) with the two matrices stacked."""
    n_queries, n_keys = len(q), len(k)
    both = np.concatenate([np.repeat(q, n_keys, axis=0), np.tile(k, (n_queries, 1))], axis=1)
    return (np.tanh(both @ np.concatenate([w_q, w_k])) @ v).reshape(n_queries, n_keys)


@wrong("1.2", "returned the shape (2, 2, 2), expected (2, 2)")
def additive_sum_forgotten(q, k, w_q, w_k, v):
    return np.tanh((q @ w_q)[:, None] + (k @ w_k)[None]) * v


@wrong("1.2", "Every query meets every key: make a new axis for each.")
def additive_no_broadcasting(q, k, w_q, w_k, v):
    return np.tanh(q @ w_q + k @ w_k) @ v


@wrong("1.2", "the softmax comes later")
def additive_weights(q, k, w_q, w_k, v):
    return plain_softmax(additive_one_product(q, k, w_q, w_k, v))


@wrong("1.2", "dot product of the projections")
def additive_dot(q, k, w_q, w_k, v):
    return np.einsum("ia,ja->ij", q @ w_q, k @ w_k)


@wrong("1.2", "tanh is missing")
def additive_linear(q, k, w_q, w_k, v):
    return (q @ w_q @ v)[:, None] + (k @ w_k @ v)[None, :]


# --- 1.3 -------------------------------------------------------------------------------------------------------------


@right("1.3")
def triangle(n_queries, n_keys=None):
    n_keys = n_queries if n_keys is None else n_keys
    return np.tril(np.ones((n_queries, n_keys), dtype=bool), k=n_keys - n_queries)


@wrong("1.3", "top left")
def triangle_top_left(n_queries, n_keys=None):
    return np.tril(np.ones((n_queries, n_keys or n_queries), dtype=bool))


@wrong("1.3", "takes 0 keys for none given")
def triangle_or(n_queries, n_keys=None):
    n_keys = n_keys or n_queries
    return np.tril(np.ones((n_queries, n_keys), dtype=bool), k=n_keys - n_queries)


@wrong("1.3", "boolean")
def triangle_of_ones(n_queries, n_keys=None):
    n_keys = n_queries if n_keys is None else n_keys
    return np.tril(np.ones((n_queries, n_keys)), k=n_keys - n_queries)


@wrong("1.3", "transposed")
def triangle_upside_down(n_queries, n_keys=None):
    n_keys = n_queries if n_keys is None else n_keys
    return np.triu(np.ones((n_queries, n_keys), dtype=bool), k=n_keys - n_queries)


@wrong("1.3", "TypeError")
def triangle_square_only(n_queries, n_keys=None):
    return np.arange(n_keys) <= np.arange(n_queries)[:, None] + (n_keys - n_queries)


# --- 1.4 -------------------------------------------------------------------------------------------------------------


@right("1.4")
def padding_by_counting(lengths, n_keys):
    ones = [[1] * int(length) + [0] * (n_keys - int(length)) for length in lengths]
    return np.array(ones, dtype=bool).reshape(-1, 1, 1, n_keys)


@right("1.4")
def padding_of_arrays(lengths, n_keys):
    return np.less.outer(np.arange(n_keys), lengths).T[:, None, None]


@wrong("1.4", "These are numbers")
def padding_of_ones(lengths, n_keys):
    return np.stack([np.arange(n_keys) < length for length in lengths])[:, None, None] * 1.0


@wrong("1.4", "<, not <=")
def padding_inclusive(lengths, n_keys):
    return (np.arange(n_keys) <= lengths[:, None])[:, None, None]


@wrong("1.4", "two axes of length 1")
def padding_two_axes(lengths, n_keys):
    return np.arange(n_keys)[None] < lengths[:, None]


@wrong("1.4", "returned the shape (2, 4, 1, 1), expected (2, 1, 1, 4)")
def padding_axes_at_the_end(lengths, n_keys):
    return (np.arange(n_keys)[None] < lengths[:, None])[:, :, None, None]


# --- 1.5 -------------------------------------------------------------------------------------------------------------


@right("1.5")
def weights_in_torch(q, k, mask=None, causal=False, scale=None):
    import torch

    q, k = torch.from_numpy(q), torch.from_numpy(k)
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    scores = torch.einsum("...id,...jd->...ij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = torch.ones(n_queries, n_keys, dtype=torch.bool)
    if causal:
        allowed = allowed.tril(n_keys - n_queries)
    if mask is not None:
        allowed = allowed & torch.from_numpy(mask)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return weights.masked_fill(~allowed, 0.0).numpy()


@right("1.5")
def weights_one_query_at_a_time(q, k, mask=None, causal=False, scale=None):
    n_queries, d_head = q.shape[-2:]
    n_keys = k.shape[-2]
    weights = np.zeros((*q.shape[:-1], n_keys), q.dtype)
    allowed = np.broadcast_to(True if mask is None else mask, weights.shape)
    for place in np.ndindex(*weights.shape[:-1]):
        keys = [j for j in range(n_keys) if allowed[place][j] and (not causal or j <= place[-1] + n_keys - n_queries)]
        if keys:
            scores = k[place[:-1]][keys] @ q[place] * (1 / math.sqrt(d_head) if scale is None else scale)
            powers = np.exp(scores - scores.max())
            weights[place][keys] = powers / powers.sum()
    return weights


def plain_softmax(scores):
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@wrong("1.5", "scaled by d_head, not by sqrt(d_head)")
def weights_scaled_by_d(q, k, mask=None, causal=False, scale=None):
    scores = q @ np.swapaxes(k, -1, -2) / q.shape[-1]
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], dtype=bool)), scores, -np.inf)
    return plain_softmax(scores if mask is None else np.where(mask, scores, -np.inf))


@wrong("1.5", "very low but not -inf")
def weights_minus_1e9(q, k, mask=None, causal=False, scale=None):
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    scores = q @ np.swapaxes(k, -1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        scores = np.where(np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool), scores, -1e9)
    return plain_softmax(scores if mask is None else np.where(mask, scores, -1e9))


@wrong("1.5", "A scale of 0 is a scale too")
def weights_scale_zero_is_none(q, k, mask=None, causal=False, scale=None):
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    scores = q @ np.swapaxes(k, -1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    if causal:
        scores = np.where(np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool), scores, -np.inf)
    return plain_softmax(scores if mask is None else np.where(mask, scores, -np.inf))


@wrong("1.5", "`mask` in place")
def weights_mask_reused(q, k, mask=None, causal=False, scale=None):
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    if causal:
        past = np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool)
        if mask is not None and mask.shape == past.shape:
            mask &= past
        else:
            mask = past if mask is None else mask & past
    return weights_one_query_at_a_time(q, k, mask, False, scale)


@wrong("1.5", "Swap the last two axes only: np.swapaxes(k, -1, -2).")
def weights_all_axes_turned(q, k, mask=None, causal=False, scale=None):
    return weights_one_query_at_a_time(q, k, mask, causal, scale) if q.ndim == 2 else plain_softmax(q @ k.T)


@wrong("1.5", "mask is applied after the softmax")
def weights_masked_late(q, k, mask=None, causal=False, scale=None):
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    scores = q @ np.swapaxes(k, -1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    weights = plain_softmax(scores) * (1 if mask is None else mask)
    return weights * np.tri(n_queries, n_keys, n_keys - n_queries) if causal else weights


@wrong("1.5", "The forbidden score still decided the maximum")
def weights_masked_late_and_renormalised(q, k, mask=None, causal=False, scale=None):
    weights = weights_masked_late(q, k, mask, causal, scale)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


# --- 1.6 -------------------------------------------------------------------------------------------------------------


@right("1.6")
def backward_by_autograd(q, k, v, d_out, mask=None, causal=False, scale=None):
    import torch

    q, k, v = (torch.from_numpy(a).requires_grad_() for a in (q, k, v))
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    allowed = torch.ones(n_queries, n_keys, dtype=torch.bool)
    allowed = allowed.tril(n_keys - n_queries) if causal else allowed
    allowed = allowed if mask is None else allowed & torch.from_numpy(mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -1e30)
    weights = scores.softmax(-1).masked_fill(~allowed, 0.0)
    (weights @ v * torch.from_numpy(d_out)).sum().backward()
    return tuple(a.grad.numpy() for a in (q, k, v))


@right("1.6")
def backward_with_the_jacobian(q, k, v, d_out, mask=None, causal=False, scale=None):
    """diag(p) - p p^T written out for every row."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    p = weights_one_query_at_a_time(q, k, mask, causal, scale)
    jacobian = p[..., :, None] * np.eye(p.shape[-1], dtype=p.dtype) - p[..., :, None] * p[..., None, :]
    d_s = scale * np.einsum("...ijl,...id,...ld->...ij", jacobian, d_out, v)
    return d_s @ k, np.einsum("...ij,...id->...jd", d_s, q), np.einsum("...ij,...id->...jd", p, d_out)


def backward_parts(q, k, v, d_out, mask, causal, scale):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    p = weights_one_query_at_a_time(q, k, mask, causal, scale)
    d_p = d_out @ np.swapaxes(v, -1, -2)
    return scale, p, d_p, p * (d_p - (p * d_p).sum(axis=-1, keepdims=True))


@wrong("1.6", "not p * d_p")
def backward_without_jacobian(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, d_p, _ = backward_parts(q, k, v, d_out, mask, causal, scale)
    return scale * (p * d_p) @ k, scale * np.swapaxes(p * d_p, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1.6", "A scale of 0 is a scale too")
def backward_scale_zero_is_none(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, _, d_s = backward_parts(q, k, v, d_out, mask, causal, scale or None)
    return scale * d_s @ k, scale * np.swapaxes(d_s, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1.6", "The scale is missing")
def backward_without_scale(q, k, v, d_out, mask=None, causal=False, scale=None):
    _, p, _, d_s = backward_parts(q, k, v, d_out, mask, causal, scale)
    return d_s @ k, np.swapaxes(d_s, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1.6", "The scale is missing in d_k:")
def backward_d_k_without_scale(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, _, d_s = backward_parts(q, k, v, d_out, mask, causal, scale)
    return scale * d_s @ k, np.swapaxes(d_s, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1.6", "The sum runs over p * d_p, not over d_p.")
def backward_sum_of_d_p(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, d_p, _ = backward_parts(q, k, v, d_out, mask, causal, scale)
    d_s = scale * p * (d_p - d_p.sum(axis=-1, keepdims=True))
    return d_s @ k, np.swapaxes(d_s, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1.6", "keepdims=True keeps the axis of the keys")
def backward_axis_lost(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, d_p, _ = backward_parts(q, k, v, d_out, mask, causal, scale)
    d_s = scale * p * (d_p - (p * d_p).sum(axis=-1))
    return d_s @ k, np.swapaxes(d_s, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1.6", "Swap the last two axes only: np.swapaxes(v, -1, -2).")
def backward_all_axes_turned(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, _, _ = backward_parts(q, k, v, d_out, mask, causal, scale)
    d_p = d_out @ v.T
    d_s = scale * p * (d_p - (p * d_p).sum(axis=-1, keepdims=True))
    return d_s @ k, d_s.T @ q, p.T @ d_out


@wrong("1.6", "and d_s in the same way")
def backward_d_s_all_axes_turned(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, _, d_s = backward_parts(q, k, v, d_out, mask, causal, scale)
    return scale * d_s @ k, scale * d_s.T @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1.6", "d_k needs the transpose")
def backward_d_k_not_transposed(q, k, v, d_out, mask=None, causal=False, scale=None):
    scale, p, _, d_s = backward_parts(q, k, v, d_out, mask, causal, scale)
    return scale * d_s @ k, scale * d_s @ q, np.swapaxes(p, -1, -2) @ d_out


@wrong("1.6", "expected the tuple (d_q, d_k, d_v)")
def backward_one_gradient(q, k, v, d_out, mask=None, causal=False, scale=None):
    return backward_with_the_jacobian(q, k, v, d_out, mask, causal, scale)[0]


# --- 1.10 ------------------------------------------------------------------------------------------------------------


@right("1.10")
def local_by_loops(scores, centre, window):
    weights = np.zeros_like(scores)
    for i, p in enumerate(centre):
        first, last = max(0, math.ceil(p - window)), min(scores.shape[1] - 1, math.floor(p + window))
        if first <= last:
            s = np.arange(first, last + 1)
            powers = np.exp(scores[i, s] - scores[i, s].max())
            weights[i, s] = powers / powers.sum() * np.exp(-((s - p) ** 2) / (window**2 / 2))
    return weights


@wrong("1.10", "sum to 1 again")
def local_renormalised(scores, centre, window):
    weights = local_by_loops(scores, centre, window)
    return weights / weights.sum(axis=-1, keepdims=True)


@wrong("1.10", "sigma is half the window")
def local_wide(scores, centre, window):
    distance = np.arange(scores.shape[1]) - centre[:, None]
    inside = np.where(np.abs(distance) <= window, scores, -np.inf)
    return plain_softmax(inside) * np.exp(-(distance**2) / (2 * window**2))


@wrong("1.10", "mask the scores to the window first")
def local_softmax_over_everything(scores, centre, window):
    distance = np.arange(scores.shape[1]) - centre[:, None]
    return plain_softmax(scores) * np.exp(-2 * (distance / window) ** 2) * (np.abs(distance) <= window)


@wrong("1.10", "TypeError in line")
def local_whole_centres_only(scores, centre, window):
    weights = np.zeros_like(scores)
    for i, p in enumerate(centre):
        weights[i, p - window : p + window + 1] = 1
    return weights


# --- 1.7 to 1.9, in CUDA ---------------------------------------------------------------------------------------------

SOFTMAX_HEAD = r"""
__device__ float warp_max(float x) {
  for (int o = 16; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, o));
  return x;
}
__device__ float warp_sum(float x) {
  for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffff, x, o);
  return x;
}
__global__ void softmax_rows(const float* s, float* p, int n_keys) {
  int lane = threadIdx.x;
  s += blockIdx.x * n_keys;
  p += blockIdx.x * n_keys;
"""
ONLINE = (
    SOFTMAX_HEAD
    + r"""
  float maximum = -INFINITY, total = 0.0f;
  for (int j = lane; j < n_keys; j += 32) {
    float higher = fmaxf(maximum, s[j]);
    total = total * expf(maximum - higher) + expf(s[j] - higher);
    maximum = higher;
  }
  float top = warp_max(maximum);
  total = warp_sum(maximum == -INFINITY ? 0.0f : total * expf(maximum - top));
  for (int j = lane; j < n_keys; j += 32) p[j] = expf(s[j] - top) / total;
}
"""
)
ONE_KEY_A_LANE = (
    SOFTMAX_HEAD
    + r"""
  float x = lane < n_keys ? s[lane] : -INFINITY;
  float power = expf(x - warp_max(x)), total = warp_sum(power);
  if (lane < n_keys) p[lane] = power / total;
}
"""
)
NOT_SHIFTED = (
    SOFTMAX_HEAD
    + r"""
  float total = 0.0f;
  for (int j = lane; j < n_keys; j += 32) total += expf(s[j]);
  total = warp_sum(total);
  for (int j = lane; j < n_keys; j += 32) p[j] = expf(s[j]) / total;
}
"""
)
NO_GUARD = (
    SOFTMAX_HEAD
    + r"""
  float x = s[lane];
  float power = expf(x - warp_max(x)), total = warp_sum(power);
  p[lane] = power / total;
}
"""
)
CHUNK_A_LANE = (
    SOFTMAX_HEAD
    + r"""
  int each = (n_keys + 31) / 32, first = lane * each, last = min(first + each, n_keys);
  float maximum = -INFINITY, total = 0.0f;
  for (int j = first; j < last; ++j) maximum = fmaxf(maximum, s[j]);
  maximum = warp_max(maximum);
  for (int j = first; j < last; ++j) total += expf(s[j] - maximum);
  total = warp_sum(total);
  for (int j = first; j < last; ++j) p[j] = expf(s[j] - maximum) / total;
}
"""
)
ALL_BY_EACH_LANE = (
    SOFTMAX_HEAD
    + r"""
  float maximum = -INFINITY, total = 0.0f;
  for (int j = 0; j < n_keys; ++j) maximum = fmaxf(maximum, s[j]);
  for (int j = 0; j < n_keys; ++j) total += expf(s[j] - maximum);
  for (int j = lane; j < n_keys; j += 32) p[j] = expf(s[j] - maximum) / total;
}
"""
)
LANE_ZERO_ALONE = (
    SOFTMAX_HEAD
    + r"""
  float maximum = -INFINITY, total = 0.0f;
  if (lane == 0) {
    for (int j = 0; j < n_keys; ++j) maximum = fmaxf(maximum, s[j]);
    for (int j = 0; j < n_keys; ++j) total += expf(s[j] - maximum);
    for (int j = 0; j < n_keys; ++j) p[j] = expf(s[j] - maximum) / total;
  }
}
"""
)
NEVER_ENDS = SOFTMAX_HEAD + "  for (int j = lane; j < n_keys; j += 0) p[j] = s[j];\n}"
TILE_HEAD = r"""
#define TILE 16
__device__ void load_tile(float* tile, int stride, const float* rows, int first, int n_rows, int d) {
  int thread = threadIdx.y * TILE + threadIdx.x;
"""
TILE_BY_ROWS_OF_WARPS = (
    TILE_HEAD
    + r"""
  int count = max(0, min(TILE, n_rows - first)) * d;
  const float* from = rows + (size_t)first * d;
  for (int e = thread; e < TILE * d; e += 256) tile[(e / d) * stride + e % d] = e < count ? from[e] : 0.0f;
}
"""
)
TILE_WITHOUT_STRIDE = TILE_BY_ROWS_OF_WARPS.replace("(e / d) * stride + e % d", "e")
TILE_WITHOUT_END = TILE_BY_ROWS_OF_WARPS.replace("e < count ? from[e] : 0.0f", "from[e]")
TILE_ONE_ELEMENT_A_THREAD = TILE_BY_ROWS_OF_WARPS.replace(
    "for (int e = thread; e < TILE * d; e += 256)", "int e = thread; if (e < TILE * d)"
)
TILE_WITHOUT_FIRST = TILE_BY_ROWS_OF_WARPS.replace("rows + (size_t)first * d", "rows")
TILE_NOT_ZEROED = TILE_BY_ROWS_OF_WARPS.replace("e < TILE * d", "e < count")
TILE_BY_COLUMNS = (
    TILE_HEAD
    + r"""
  for (int e = thread; e < TILE * d; e += 256) {
    int r = e % TILE, c = e / TILE;
    tile[r * stride + c] = first + r < n_rows ? rows[(first + r) * d + c] : 0.0f;
  }
}
"""
)
TILE_BY_THREAD_ZERO = TILE_BY_ROWS_OF_WARPS.replace("int e = thread; e < TILE * d; e += 256", "int e = 0; e < TILE * d && !thread; ++e")
TILE_WITH_ITS_PADDING = (
    TILE_HEAD
    + r"""
  for (int e = thread; e < TILE * stride; e += 256) {
    int r = e / stride, c = e % stride;
    tile[e] = c < d && first + r < n_rows ? rows[(size_t)(first + r) * d + c] : 0.0f;
  }
}
"""
)
TILE_BY_EVERYBODY = (
    TILE_HEAD
    + r"""
  for (int c = threadIdx.x; c < d; c += TILE)
    for (int again = 0; again < 2; ++again)
      tile[threadIdx.y * stride + c] = first + threadIdx.y < n_rows ? rows[(first + threadIdx.y) * d + c] : 0.0f;
}
"""
)

FROM_ZERO = ONLINE.replace("maximum = -INFINITY, total", "maximum = 0.0f, total")
RESULT_UNUSED = ONLINE.replace("float top = warp_max(maximum);", "float top = maximum; warp_max(maximum);")
IDLE_LANES_RETURN = ONLINE.replace("  float maximum", "  if (lane >= n_keys) return;\n  float maximum", 1)
IN_THE_LOOP = (
    SOFTMAX_HEAD
    + r"""
  for (int j = lane; j < n_keys; j += 32) {
    float power = expf(s[j] - warp_max(s[j]));
    p[j] = power / warp_sum(power);
  }
}
"""
)
ROW_IS_THE_THREAD = ONLINE.replace("blockIdx.x * n_keys", "(blockIdx.x * 32 + lane) * n_keys")

RIGHT["1.7"] = [ONLINE]
WRONG["1.7"] = [
    (ONE_KEY_A_LANE, "Let j go on in steps of 32"),
    (NOT_SHIFTED, "let the search for it start at -INFINITY"),
    (FROM_ZERO, "let the search for it start at -INFINITY"),
    (RESULT_UNUSED, "Use what warp_max and warp_sum return"),
    (IDLE_LANES_RETURN, "lanes without a column have to take part"),
    (IN_THE_LOOP, "lanes without a column have to take part"),
    (ROW_IS_THE_THREAD, "the row is blockIdx.x."),
    (NO_GUARD, "Its columns are 0 to n_keys - 1."),
    (CHUNK_A_LANE, "Lane l reads columns"),
    (LANE_ZERO_ALONE, "Every lane reads its own columns, in one request of the warp."),
    (NEVER_ENDS, "TIME LIMIT"),
    (ALL_BY_EACH_LANE, "bytes were read, for"),
    (SOFTMAX_HEAD + "  p[lane] = s[lane]\n}", "expected ';'"),
]
RIGHT["1.8"] = [TILE_BY_ROWS_OF_WARPS, TILE_WITH_ITS_PADDING]
WRONG["1.8"] = [
    (TILE_WITHOUT_STRIDE, "row r begins at r * stride"),
    (TILE_WITHOUT_END, "Compare first + r with n_rows."),
    (TILE_ONE_ELEMENT_A_THREAD, "Where 99 is left, 256 threads have to copy more than 256 elements"),
    (TILE_WITHOUT_FIRST, "row r of the tile is row first + r of the matrix"),
    (TILE_NOT_ZEROED, "Compare first + r with n_rows. 99 stood in the tile before."),
    (TILE_BY_COLUMNS, "Number the elements row after row"),
    (TILE_BY_EVERYBODY, "bytes were read, for"),
    (TILE_BY_THREAD_ZERO, "requests, where 24 would do"),
]
RIGHT["1.9"] = [lambda: {0, 1}]
WRONG["1.9"] = [
    (lambda: set(), "Who has to wait for load_tile"),
    (lambda: {3}, "Who has to wait for load_tile"),
    (lambda: {1}, "The loop comes round"),
    (lambda: {1, 2, 3}, "reached by all threads of the block or by none"),
    (lambda: {(1, 3)}, "expected a set, such as {0, 4}"),
    (lambda: {0, 1, 3}, "fewer barriers would do"),
    (lambda: {1}, "(in load_tile)"),
    (lambda: {1, 7}, "the places are 0 to 4"),
    (lambda: {"1"}, "expected a set, such as {0, 4}"),
    (lambda: [1, 3], "returned a list, expected a set, such as {0, 4}"),
    (lambda: (1, 3), "returned a tuple of 2, expected a set, such as {0, 4}"),
]

# --- how the lecture calls them --------------------------------------------------------------------------------------

numbers = np.random.default_rng(0).standard_normal
head, single = numbers((3, 2, 5, 4)), numbers((3, 7, 5)).astype(np.float32)
some = np.array([[True], [False]])

# The arguments that the cells after a check pass on, in kind: axes, dtypes, by position or by name.
CALLS = {
    "1.1": [
        ((np.array([0.0, 0.0, -np.inf]),), {}),
        ((np.full(3, -np.inf, dtype=np.float32),), {}),
        ((np.array([12, 11, 0], dtype=np.float16),), {}),
        ((numbers((3, 7, 7)),), {}),
    ],
    "1.2": [((numbers((6, 16)), numbers((50, 16)), *numbers((2, 16, 32)), numbers(32)), {})],
    "1.3": [((6,), {}), ((np.shape(head)[-2], 7), {})],
    "1.4": [((np.array([4]), 6), {}), ((np.array([5, 3]), 5), {})],
    "1.5": [
        ((numbers((6, 8)), numbers((4, 8))), {}),
        ((head, head), {"causal": True}),
        ((single, single, None, False, None), {}),
        ((head[0], head[0], np.zeros((5, 5), bool), True, 0.5), {}),
    ],
    "1.6": [((head[:2], head[:2], head[:2], head[:2]), {"mask": some[..., None, None], "causal": True})],
    "1.10": [((numbers((1, 20)), np.array([8.3]), 4), {})],
}
