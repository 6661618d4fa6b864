# Generated from solutions/03_rotary_positional_embeddings.py by `python course.py build`. Edit that file, not this one.
"""Lecture 03 · Rotary positional embeddings: the finished code."""

import functools
import math

import numpy as np
import torch
from torch import nn

from attention.fundamentals import attention_torch
from attention.multi_head import Positions, merge_heads, split_heads
from utils import cuda

__all__ = ["apply_rope_numpy", "apply_rope_torch", "apply_rope_cuda", "rope_frequencies", "alibi_slopes"]


def apply_rope_numpy(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    """Turn each pair of columns of x by position times frequency, in NumPy.

    x (..., seq, d); positions (seq,) or (batch, seq), batch being the first axis of x;
    frequencies (d_rot / 2,), in radians per position. Pairs are columns i and
    i + d_rot / 2, or with interleaved 2i and 2i + 1. Columns from d_rot on stay as they
    are. attention_scale multiplies what is rotated. Returns the shape and float type of
    x (half precision may be computed in single); rope_angles raises a ValueError when
    shapes do not fit. Source: Su et al. 2021 (arXiv 2104.09864), equation 34.
    """
    angles, work = rope_angles(x, positions, frequencies), cuda.work_type(x)
    cos = (attention_scale * np.cos(angles)).astype(work)
    sin = (attention_scale * np.sin(angles)).astype(work)
    first, second = pair_slices(len(frequencies), interleaved)
    a, b = x[..., first].astype(work), x[..., second].astype(work)
    out = x.astype(work)
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return cuda.like(out, x)


def test_rope(rope):
    """Raise AssertionError if rope(x, positions, frequencies) is wrong."""
    rng = np.random.default_rng(1)
    x, thetas = rng.standard_normal((2, 3, 9)), np.array([1.0, 0.5, 0.2, 0.01])
    given, places = x.copy(), np.array([100_003, 7, 40])
    got = rope(x, places, thetas)
    assert np.array_equal(x, given), "the input has changed"
    for head in range(2):
        for row, place in enumerate(places):
            for i, theta in enumerate(thetas):
                z = complex(given[head, row, i], given[head, row, i + 4])
                z = z * np.exp(1j * place * theta)
                assert np.allclose(got[head, row, [i, i + 4]], [z.real, z.imag]), i
    assert np.array_equal(got[..., 8], given[..., 8]), "a column without a pair"


def interleaved_to_half_split(w, n_heads):
    """Reorder columns of a projection: half-split RoPE then does what interleaved did.

    w (d_model, n_heads * d_head), d_head even. Returns the same shape and type.
    ValueError where the columns do not make n_heads heads of even size.
    """
    if n_heads < 1 or w.shape[-1] % (2 * n_heads):
        raise ValueError("w must have an even number of columns for each of "
                         f"{n_heads} heads, got {w.shape[-1]}")
    pairs = w.reshape(len(w), n_heads, -1, 2)
    return pairs.swapaxes(-1, -2).reshape(w.shape)


class RotaryAttention(nn.Module):
    """Causal self-attention whose queries and keys are turned by their positions.

    base: of the frequencies. ValueError unless d_model / n_heads is an even number.
    """

    def __init__(self, d_model, n_heads, base=10000.0):
        super().__init__()
        if n_heads < 1 or d_model % (2 * n_heads):
            raise ValueError("d_model must make n_heads heads of even size, "
                             f"got {d_model} and {n_heads}")
        self.n_heads = n_heads
        self.frequencies, _ = rope_frequencies(d_model // n_heads, base)
        self.w_q, self.w_k, self.w_v, self.w_o = (
            nn.Parameter(torch.randn(d_model, d_model) * d_model**-0.5) for _ in range(4))

    def forward(self, x, positions=None, cache=None):
        q, k, v = (split_heads(x @ w, self.n_heads) for w in (self.w_q, self.w_k, self.w_v))
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.shape[1])
        q, k = (apply_rope_torch(a, positions, self.frequencies) for a in (q, k))
        if cache is not None:
            k, v = cache.update(k, v)
        return merge_heads(attention_torch(q, k, v, causal=True)) @ self.w_o


def gap_loss(model, ids, n_prompt, gap):
    """Mean next-token loss behind a gap of positions after the first n_prompt tokens.

    model(ids, positions=...): logits (batch, n, vocab_size); ids (batch, n) int64.
    Returns a tensor () with its graph: the mean over all tokens after that at n_prompt.
    """
    positions = torch.arange(ids.shape[1])
    positions[n_prompt:] += gap
    logits = model(ids, positions=positions)[:, n_prompt:-1]
    return nn.functional.cross_entropy(logits.mT, ids[:, n_prompt + 1:])


def keep_by_turns(frequencies, length, slow, fast):
    """How much of its own frequency each pair keeps, by its turns within `length`.

    0 for at most `slow` turns, 1 for at least `fast`, a straight line between.
    ValueError unless slow < fast. Source: Peng et al. 2023 (arXiv 2309.00071), § 3.2.
    """
    if not slow < fast:
        raise ValueError(f"slow must be less than fast, got {slow} and {fast}")
    frequencies = np.asarray(frequencies)
    turns = length * frequencies / (2 * np.pi)
    return np.clip((turns - slow) / (fast - slow), 0, 1)


ROPE_PAIRS = r"""
__device__ float2 turn(long long position, double frequency);        // (cosine, sine)

__global__ void rope_pairs(float* x, const long long* positions, const double* frequencies,
                           int n_rows, int seq, int d) {
  size_t pair = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  int half = d / 2;
  int i = pair % half;
  size_t row = pair / half;
  if (row >= n_rows) return;
  float2 t = turn(positions[row % seq], frequencies[i]);
  float* first = x + row * d + i;
  float* second = first + half;
  float a = *first;
  float b = *second;
  *first = a * t.x - b * t.y;
  *second = a * t.y + b * t.x;
}
"""


def alibi_slopes(n_heads):
    """How much each head of ALiBi dislikes distance: (n_heads,) float64.

    n a power of two: 2^(-8/n), 2^(-16/n), ..., 2^-8. Otherwise the slopes of the next
    smaller power of two, then every second slope of the power of two above it.
    ValueError for fewer than one head. Source: Press et al. 2021 (arXiv 2108.12409),
    section 3, and the authors' code for other numbers of heads.
    """
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, got {n_heads}")
    power = 2 ** int(math.log2(n_heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([slopes, between[:n_heads - power]])


def check_rope(x, positions, frequencies):
    """Raise ValueError, in one sentence, unless the shapes fit. For arrays and tensors."""
    cuda.check_numbers(x=x, positions=positions, frequencies=frequencies)
    shape, where, pairs = (tuple(a.shape) for a in (x, positions, frequencies))
    if len(shape) < 2:
        raise ValueError(f"x must have at least two axes (seq, d), got shape {shape}")
    if where != shape[-2:-1] and not (len(shape) > 2 and where == (shape[0], shape[-2])):
        raise ValueError(f"positions must have shape (seq,) or (batch, seq) of x {shape}, got {where}")
    if len(pairs) != 1 or 2 * pairs[0] > shape[-1]:
        raise ValueError(f"frequencies must be one for each pair of the {shape[-1]} columns of x at most, got {pairs}")

def pair_slices(n_pairs, interleaved):
    """Where the first and the second members of all pairs stand in the last axis, as two slices."""
    if interleaved:
        return slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2)
    return slice(0, n_pairs), slice(n_pairs, 2 * n_pairs)

def rope_angles(x, positions, frequencies):
    """Angles for arrays x (..., seq, d), in a shape that broadcasts with (..., seq, n_pairs): float64.

    positions (seq,), or (batch, seq) where batch is the first axis of x. ValueError where shapes do not fit, TypeError
    for anything but an array x.
    """
    positions, frequencies = np.asarray(positions), np.asarray(frequencies, np.float64)
    check_rope(x, positions, frequencies)
    cuda.check_kind(np.ndarray, x=x)
    angles = positions[..., None].astype(np.float64) * frequencies
    if positions.ndim == 2:                                          # (batch, 1, ..., seq, n_pairs)
        angles = angles.reshape(len(x), *[1] * (x.ndim - 3), *angles.shape[1:])
    return angles

def apply_rope_torch(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    """Rotary embedding in PyTorch; arguments, shapes and errors as apply_rope_numpy, differentiable in x.

    positions and frequencies may be tensors or arrays; angles are computed in float64.
    """
    cuda.check_kind(torch.Tensor, x=x)
    positions = torch.as_tensor(positions, device=x.device)
    frequencies = torch.as_tensor(frequencies, device=x.device)
    check_rope(x, positions, frequencies)
    angles = positions[..., None].double() * frequencies.double()
    if positions.dim() == 2:                                         # (batch, 1, ..., seq, n_pairs)
        angles = angles.reshape(len(x), *[1] * (x.dim() - 3), *angles.shape[1:])
    work = cuda.work_type(x)
    cos, sin = (attention_scale * angles.cos()).to(work), (attention_scale * angles.sin()).to(work)
    n_pairs = len(frequencies)
    first, second = pair_slices(n_pairs, interleaved)
    a, b = x[..., first].to(work), x[..., second].to(work)
    a, b = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack([a, b], dim=-1).flatten(-2) if interleaved else torch.cat([a, b], dim=-1)
    out = torch.cat([turned, x[..., 2 * n_pairs:].to(work)], dim=-1)
    return cuda.like(out, x)

def shift_keys(k, shift, frequencies, interleaved=False):
    """Move cached keys by `shift` positions: RoPE at p, then shift_keys, is RoPE at p + shift.

    k (..., seq, d), already rotated; frequencies and interleaved as in apply_rope_numpy. Returns the shape of k.
    """
    return apply_rope_numpy(k, np.full(k.shape[-2], shift), frequencies, interleaved=interleaved)


class Learned(Positions):
    """One trained vector for each position, added to the embeddings; max_length positions, and no more."""

    def __init__(self, max_length, d_model):
        super().__init__()
        self.table = nn.Embedding(max_length, d_model)

    def embed(self, x, positions):
        lowest, highest = (int(end) for end in positions.aminmax()) if positions.numel() else (0, 0)
        if lowest < 0 or highest >= self.table.num_embeddings:
            raise ValueError(f"positions must be from 0 to max_length - 1 = {self.table.num_embeddings - 1}, "
                             f"got {lowest} to {highest}")
        return x + self.table(positions)

def sinusoidal_positions(positions, d_model, base=10000.0):
    """Sinusoids of falling frequency: sine in the even columns, cosine in the odd ones.

    positions of any shape (...), d_model even. Returns (..., d_model) float64: [..., 2i] = sin(p / base^(2i/d_model)),
    [..., 2i+1] its cosine. Raises ValueError for an odd d_model. Source: Vaswani et al. 2017 (1706.03762), section 3.5.
    """
    if d_model < 2 or d_model % 2:
        raise ValueError(f"d_model must be even and positive, got {d_model}")
    angles = np.asarray(positions, float)[..., None] * base ** (-np.arange(0, d_model, 2) / d_model)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(*angles.shape[:-1], d_model)

class Sinusoidal(Positions):
    """Fixed sinusoids, added to the embeddings."""

    def embed(self, x, positions):
        table = sinusoidal_positions(positions.cpu().numpy(), x.shape[-1])
        return x + torch.from_numpy(table).to(x)

def relative_positions(n_queries, n_keys):
    """Key position minus query position, int64 (n_queries, n_keys), aligned at the bottom right."""
    return np.arange(n_keys) - (np.arange(n_queries) + n_keys - n_queries)[:, None]

def t5_buckets(relative, n_buckets=32, max_distance=128, bidirectional=True):
    """Sort key position minus query position into buckets: small distances get one each, large ones share.

    relative: integers of any shape. Half of the buckets of a side are exact, half logarithmic up to max_distance;
    with bidirectional half of all are for keys behind the query, otherwise those all count as distance 0.
    Returns int64 in [0, n_buckets). Raises ValueError unless max_distance is above the exact distances, at least one.
    Source: Raffel et al. 2019 (arXiv 1910.10683), section 2.1, and its code.
    """
    relative = np.asarray(relative, np.int64)               # minus the lowest 8-bit number is no 8-bit number
    offset, distance = 0, np.maximum(-relative, 0)
    if bidirectional:
        n_buckets //= 2
        offset, distance = np.where(relative > 0, n_buckets, 0), np.abs(relative)
    exact = n_buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(f"max_distance must be above the number of exact distances, at least 1, "
                         f"got {max_distance} and {exact}")
    growth = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    shared = exact + (growth * (n_buckets - exact) + 1e-6).astype(np.int64)    # a power of two starts its own bucket
    return offset + np.where(distance < exact, distance, np.minimum(shared, n_buckets - 1))

class T5Bias(Positions):
    """One trained number for each head and bucket of distances, added to the scores.

    Distances are counted in tokens; positions are not read.
    """

    def __init__(self, n_heads, n_buckets=32, max_distance=128, bidirectional=False):
        super().__init__()
        self.table = nn.Embedding(n_buckets, n_heads)
        self.max_distance, self.bidirectional = max_distance, bidirectional

    def bias(self, n_queries, n_keys):
        buckets = t5_buckets(relative_positions(n_queries, n_keys), self.table.num_embeddings, self.max_distance,
                             self.bidirectional)
        return self.table(torch.from_numpy(buckets).to(self.table.weight.device)).permute(2, 0, 1)

class ALiBi(Positions):
    """A penalty on the scores that grows with the distance, at another slope in each head. Nothing is trained.

    Distances are counted in tokens; positions are not read.
    """

    def __init__(self, n_heads):
        super().__init__()
        self.exact = alibi_slopes(n_heads)                                # float64, whatever the model is cast to
        self.register_buffer("slopes", torch.from_numpy(self.exact).to(torch.get_default_dtype()), False)

    def bias(self, n_queries, n_keys):
        bias = -self.exact[:, None, None] * np.abs(relative_positions(n_queries, n_keys))
        return torch.from_numpy(bias).to(self.slopes)                     # rounded once, after the product


def ntk_frequencies(frequencies, factor):
    """NTK-aware scaling: the fastest pair as it was, the slowest `factor` times slower.

    From pair to pair the slowing is a geometric sequence.
    frequencies (n_pairs,), fastest first. Returns (n_pairs,). Raises ValueError for fewer than two pairs, or a
    factor that is not positive.
    Source: section 3.1 of Peng et al. 2023 (arXiv 2309.00071), there as a change of the base.
    """
    if len(frequencies) < 2:
        raise ValueError(f"frequencies must be of at least two pairs, got {len(frequencies)}")
    if not factor > 0:
        raise ValueError(f"factor must be positive, got {factor}")
    frequencies = np.asarray(frequencies)
    passed = np.arange(len(frequencies)) / (len(frequencies) - 1)
    return frequencies / factor**passed

def yarn_keep(d_rot, base, length, beta_slow=1.0, beta_fast=32.0, truncate=True):
    """How much of its own frequency each pair keeps in published YaRN models: (d_rot / 2,) float64.

    As keep_by_turns, but linear in the number of the pair, between the pairs that make beta_fast and beta_slow turns,
    with truncate rounded outwards to whole pairs. Raises ValueError unless beta_slow < beta_fast.
    Source: the code of Peng et al. 2023 (arXiv 2309.00071).
    """
    if not beta_slow < beta_fast:
        raise ValueError(f"beta_slow must be less than beta_fast, got {beta_slow} and {beta_fast}")

    def pair_with(turns):
        return d_rot * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d_rot - 1)
    return 1 - np.clip((np.arange(d_rot // 2) - low) / max(high - low, 1e-3), 0, 1)

def yarn_attention_factor(scaling):
    """What cosine and sine are multiplied with under YaRN: 0.1 ln(factor) + 1, unless the model says otherwise."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def grown(mscale):
        return 0.1 * mscale * math.log(max(scaling["factor"], 1.0)) + 1.0

    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(above) / grown(below) if above and below else grown(1.0)

NEEDED = {"default": [], "linear": ["factor"], "dynamic": ["factor", "original_max_position_embeddings"],
          "yarn": ["factor", "original_max_position_embeddings"],
          "llama3": ["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"]}

def without_nulls(scaling):
    """A copy of a scaling without the keys that are None; configuration files have such keys."""
    return {key: value for key, value in (scaling or {}).items() if value is not None}

def rope_type(scaling):
    """Which scaling it is; older models have the key `type`."""
    return scaling.get("rope_type", scaling.get("type", "default"))

def check_scaling(scaling):
    """Raise ValueError, in one sentence, unless a scaling has a known rope_type and what that needs."""
    kind = rope_type(scaling)
    if kind not in NEEDED:
        raise ValueError(f"rope_type must be one of {', '.join(NEEDED)}, got {kind!r}")
    missing = [key for key in NEEDED[kind] if key not in scaling]
    if missing:
        raise ValueError(f"scaling of rope_type {kind} must have {', '.join(missing)}, got {sorted(scaling)}")
    if not scaling.get("factor", 1.0) > 0:
        raise ValueError(f"factor must be positive, got {scaling['factor']}")

def rope_frequencies(d_head, base=10000.0, scaling=None):
    """Frequencies of the pairs, in radians per position, and the factor for cosine and sine.

    scaling: None, or a dict with the keys of a published model's rope_parameters: rope_type (default, linear, dynamic,
    yarn, llama3) and what it needs; rope_theta there takes the place of base; partial_rotary_factor is the share of
    d_head that is rotated. dynamic also reads seq_len, the length in use. A key that is None counts as missing.
    Returns (frequencies (d_rot / 2,) float64, attention_scale). Raises ValueError for an odd number of columns, an
    unknown rope_type, a missing key, or a factor or base that is not positive.
    Sources: linear Chen et al. 2023 (arXiv 2306.15595); yarn Peng et al. 2023 (2309.00071); dynamic the code of
    transformers (with factor 1 it is that of Peng et al., seq_len / length); llama3 the code published with Llama 3.1.
    """
    scaling = without_nulls(scaling)
    check_scaling(scaling)
    base, d_rot = scaling.get("rope_theta", base), int(d_head * scaling.get("partial_rotary_factor", 1.0))
    if not base > 0:
        raise ValueError(f"base must be positive, got {base}")
    if not 2 <= d_rot <= d_head or d_rot % 2:
        raise ValueError(f"the rotated part of d_head must be even and from 2 to d_head, got {d_rot} of {d_head}")
    factor, length = scaling.get("factor", 1.0), scaling.get("original_max_position_embeddings")
    keep, attention_scale = 1.0, 1.0
    kind = rope_type(scaling)
    frequencies = base ** (-np.arange(0, d_rot, 2) / d_rot)
    match kind:
        case "dynamic":
            longer = max(scaling.get("seq_len", length), length) / length
            frequencies = ntk_frequencies(frequencies, factor * longer - (factor - 1))
        case "linear":
            keep = 0.0
        case "llama3":
            keep = keep_by_turns(frequencies, length, scaling["low_freq_factor"], scaling["high_freq_factor"])
        case "yarn":
            keep = yarn_keep(d_rot, base, length, scaling.get("beta_slow") or 1, scaling.get("beta_fast") or 32,
                             scaling.get("truncate", True))
            attention_scale = yarn_attention_factor(scaling)
    return frequencies * (keep + (1 - keep) / factor), attention_scale

class Rotary(Positions):
    """RoPE: queries and keys are turned by their positions. Nothing is trained.

    d_head, base, scaling as in rope_frequencies; interleaved as in apply_rope_numpy; partial: the share of d_head that
    is rotated, unless scaling has a partial_rotary_factor. With rope_type dynamic the frequencies follow the largest
    position that is asked for.
    """

    def __init__(self, d_head, base=10000.0, scaling=None, interleaved=False, partial=1.0):
        super().__init__()
        self.d_head, self.base, self.interleaved = d_head, base, interleaved
        self.scaling = {"partial_rotary_factor": partial} | without_nulls(scaling)
        self.frequencies, self.attention_scale = rope_frequencies(d_head, base, self.scaling)

    def rotate(self, x, positions):
        frequencies = self.frequencies
        if rope_type(self.scaling) == "dynamic" and positions.numel():
            longest = self.scaling | {"seq_len": int(positions.max()) + 1}
            frequencies, _ = rope_frequencies(self.d_head, self.base, longest)
        return apply_rope_torch(x, positions, frequencies, self.attention_scale, self.interleaved)


TURN = r"""
// cosine and sine of position * frequency
__device__ float2 turn(long long position, double frequency) {
  double angle = position * frequency;
  angle -= 6.283185307179586 * rint(angle * 0.15915494309189535);       // whole turns
  float small = (float)angle;
  return make_float2(cosf(small), sinf(small));
}
// the pair (a, b) turned, where it stands; t is (cosine, sine)
__device__ void rotate(float& a, float& b, float2 t) {
  float turned = a * t.x - b * t.y;
  b = a * t.y + b * t.x;
  a = turned;
}
"""

ROPE = r"""
__device__ void meet(float& a, float& b, const float2* t, int) { rotate(a, b, t[0]); }
__device__ void meet(float4& a, float4& b, const float2* t, int interleaved) {
  if (interleaved) {
    rotate(a.x, a.y, t[0]), rotate(a.z, a.w, t[1]), rotate(b.x, b.y, t[2]), rotate(b.z, b.w, t[3]);
  } else {
    rotate(a.x, b.x, t[0]), rotate(a.y, b.y, t[1]), rotate(a.z, b.z, t[2]), rotate(a.w, b.w, t[3]);
  }
}
template <typename V>                                   // V is float or float4
__global__ void rope(const float* x, const long long* positions, const double* frequencies, float* y, int n_tokens,
                     int seq, int n_heads, int d, int n_pairs, int interleaved, float attention_scale) {
  const int width = sizeof(V) / sizeof(float);
  int half = n_pairs / width, items = d / width - half; // of a row: vectors with a partner, then those only copied
  size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, token = thread / items;
  int i = thread % items;
  if (token >= n_tokens) return;

  // angles: once for all heads of this thread
  long long position = positions[token];
  float2 t[width];
  for (int w = 0; w < width && i < half; ++w) {
    int pair = interleaved && width == 4 ? 2 * (i + w / 2 * half) + w % 2 : width * i + w;
    t[w] = turn(position, frequencies[pair]);
    t[w].x *= attention_scale, t[w].y *= attention_scale;
  }
  int first = interleaved && width == 1 ? 2 * i : i, second = interleaved && width == 1 ? first + 1 : i + half;

  for (int head = blockIdx.y; head < n_heads; head += gridDim.y) {
    size_t row = ((token / seq * n_heads + head) * seq + token % seq) * d;
    const V* from = reinterpret_cast<const V*>(x + row);
    V* to = reinterpret_cast<V*>(y + row);
    if (i < half) {                                     // load, rotate, write
      V a = from[first], b = from[second];
      meet(a, b, t, interleaved);
      to[first] = a, to[second] = b;
    } else {                                            // past the pairs: copy
      to[i + half] = from[i + half];
    }
  }
}
"""

@functools.cache
def rope_kernel(wide):
    """The kernel for float4 if wide, else for float, compiled on first use."""
    if wide:
        return cuda.compile(TURN + ROPE, name="rope", template=("float4",))
    return cuda.compile(TURN + ROPE, name="rope", template=("float",))

def rope_launch(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    """Whether float4 fits, grid, block, arguments and output of the kernel, for a tensor x (..., seq, d)."""
    x = x.detach().float().contiguous()
    seq, d, n_pairs = x.shape[-2], x.shape[-1], len(frequencies)
    n_heads = x[..., 0, 0].numel() // (len(x) if positions.ndim == 2 else 1)
    wide = n_pairs % 4 == 0 and d % 4 == 0 and x.data_ptr() % 16 == 0
    n_tokens, out = positions.numel(), torch.empty_like(x)
    threads = n_tokens * (d - n_pairs) // (4 if wide else 1)
    grid = -(-threads // 256), min(-(-n_heads // 8), 65_535)
    arguments = (x, positions.long().contiguous(), frequencies.double().contiguous(), out, n_tokens, seq, n_heads, d,
                 n_pairs, int(interleaved), float(attention_scale))
    return wide, grid, 256, arguments, out

def apply_rope_cuda(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    """Rotary embedding by the CUDA kernel; arguments, shapes and errors as apply_rope_numpy, positions integers.

    NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU. Angles are computed in double precision, the
    rest in single; returned in the kind and type of x. Not differentiable.
    """
    device = x.device if isinstance(x, torch.Tensor) else "cpu"
    positions, frequencies = (torch.as_tensor(np.array(a) if isinstance(a, np.ndarray) else a, device=device)
                              for a in (positions, frequencies))
    check_rope(x, positions, frequencies)
    if positions.is_floating_point():
        raise ValueError(f"positions must be integers, got {str(positions.dtype).removeprefix('torch.')}")
    [out] = cuda.on_device(x)
    if out.numel():
        wide, grid, block, arguments, out = rope_launch(out, positions, frequencies, attention_scale, interleaved)
        rope_kernel(wide).fast[grid, block](*arguments)
    return cuda.like(out, x)
