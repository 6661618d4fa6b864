# Generated from solutions/03_rotary_positional_embeddings.py by `python course.py build`. Edit that file, not this one.
"""Lecture 03 · Rotary positional embeddings: the finished code."""

import math

import numpy as np
import torch
from torch import nn

from attention.multi_head import Positions


def sinusoidal_positions(positions, d_model, base=10000.0):
    """Sinusoids of falling frequency: sine in the even columns, cosine in the odd ones.

    positions (...), d_model even. Returns (..., d_model) float64: [..., 2i] = sin(p / base^(2i/d_model)), [..., 2i+1]
    its cosine. Raises ValueError for an odd d_model. Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.5.
    """
    if d_model < 2 or d_model % 2:
        raise ValueError(f"d_model must be even and positive, got {d_model}")
    angles = np.asarray(positions, float)[..., None] * base ** (-np.arange(0, d_model, 2) / d_model)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(*angles.shape[:-1], d_model)


class Learned(Positions):
    """One trained vector for each position, added to the embeddings; max_length positions, and no more."""

    def __init__(self, max_length, d_model):
        super().__init__()
        self.table = nn.Embedding(max_length, d_model)

    def embed(self, x, positions):
        if positions.numel() and int(positions.max()) >= self.table.num_embeddings:
            raise ValueError(f"positions must be below max_length = {self.table.num_embeddings}, "
                             f"got {int(positions.max())}")
        return x + self.table(positions)

class Sinusoidal(Positions):
    """Fixed sinusoids, added to the embeddings."""

    def embed(self, x, positions):
        table = sinusoidal_positions(positions.cpu().numpy(), x.shape[-1])
        return x + torch.from_numpy(table).to(x)


def t5_buckets(relative, n_buckets=32, max_distance=128, bidirectional=True):
    """Sort key position minus query position into buckets: small distances get one each, large ones share.

    relative: integers of any shape. Half of the buckets of a side are exact, half logarithmic up to max_distance;
    with bidirectional half of all are for keys behind the query, otherwise those all count as distance 0.
    Returns int64 in [0, n_buckets). Source: Raffel et al. 2019 (arXiv 1910.10683), section 2.1.
    """
    relative = np.asarray(relative)
    offset = 0
    if bidirectional:
        n_buckets //= 2
        offset = np.where(relative > 0, n_buckets, 0)
        distance = np.abs(relative)
    else:
        distance = np.maximum(-relative, 0)
    exact = n_buckets // 2
    growth = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    shared = exact + (growth * (n_buckets - exact) + 1e-6).astype(np.int64)    # powers of two belong to their own bucket
    return offset + np.where(distance < exact, distance, np.minimum(shared, n_buckets - 1))

def relative_positions(n_queries, n_keys):
    """Key position minus query position, int64 (n_queries, n_keys), aligned at the bottom right."""
    return np.arange(n_keys) - (np.arange(n_queries) + n_keys - n_queries)[:, None]

class T5Bias(Positions):
    """One trained number for each head and bucket of distances, added to the scores."""

    def __init__(self, n_heads, n_buckets=32, max_distance=128, bidirectional=False):
        super().__init__()
        self.table = nn.Embedding(n_buckets, n_heads)
        self.max_distance, self.bidirectional = max_distance, bidirectional

    def bias(self, n_queries, n_keys):
        buckets = t5_buckets(relative_positions(n_queries, n_keys), self.table.num_embeddings, self.max_distance,
                             self.bidirectional)
        return self.table(torch.from_numpy(buckets).to(self.table.weight.device)).permute(2, 0, 1)


def alibi_slopes(n_heads):
    """How much each head of ALiBi dislikes distance: (n_heads,) float64.

    With n a power of two: 2^(-8/n), 2^(-16/n), ..., 2^-8. Otherwise the slopes of the next smaller power of two,
    then every second slope of the power of two above it. Raises ValueError for fewer than one head.
    Source: Press et al. 2021 (arXiv 2108.12409), section 3, and the authors' code for other numbers of heads.
    """
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, got {n_heads}")
    power = 2 ** int(math.log2(n_heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4 * np.arange(1, 2 * power + 1, 2) / power)
    return np.concatenate([slopes, between[:n_heads - power]])

class ALiBi(Positions):
    """A penalty on the scores that grows with the distance, at another slope in each head. Nothing is trained."""

    def __init__(self, n_heads):
        super().__init__()
        self.register_buffer("slopes", torch.from_numpy(alibi_slopes(n_heads)).to(torch.get_default_dtype()), False)

    def bias(self, n_queries, n_keys):
        distance = torch.from_numpy(np.abs(relative_positions(n_queries, n_keys))).to(self.slopes)
        return -self.slopes[:, None, None] * distance


def check_rope(x, positions, frequencies):
    """Raise ValueError, in one sentence, unless the shapes fit. For arrays and tensors."""
    shape, where, pairs = (tuple(a.shape) for a in (x, positions, frequencies))
    if len(shape) < 2:
        raise ValueError(f"x must have at least two axes (seq, d), got shape {shape}")
    if where != shape[-2:-1] and not (len(shape) > 2 and where == (shape[0], shape[-2])):
        raise ValueError(f"positions must have shape (seq,) or (batch, seq) of x {shape}, got {where}")
    if len(pairs) != 1 or 2 * pairs[0] > shape[-1]:
        raise ValueError(f"frequencies must be one for each pair of the {shape[-1]} columns of x at most, got {pairs}")

def rope_pairs(n_pairs, interleaved):
    """Where the two halves of each pair stand in the last axis, as two slices."""
    if interleaved:
        return slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2)
    return slice(0, n_pairs), slice(n_pairs, 2 * n_pairs)

def apply_rope_numpy(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    """Turn each pair of columns of x by position times frequency, in NumPy. The oracle of the other two.

    x (..., seq, d); positions (seq,) or (batch, seq), batch being the first axis of x; frequencies (d_rot / 2,), in
    radians per position. Pairs are columns (i, i + d_rot / 2), or with interleaved (2i, 2i + 1). Columns from d_rot on
    stay as they are. attention_scale multiplies what is rotated. Returns the shape and float type of x (half precision
    is computed in single); angles are computed in float64. Raises ValueError when shapes do not fit.
    Source: Su et al. 2021 (arXiv 2104.09864), equation 34.
    """
    x, positions, frequencies = np.asarray(x), np.asarray(positions), np.asarray(frequencies, np.float64)
    check_rope(x, positions, frequencies)
    work = np.result_type(x, np.float32)
    angles = positions[..., None].astype(np.float64) * frequencies
    if positions.ndim == 2:
        angles = angles.reshape(len(x), *[1] * (x.ndim - 3), *angles.shape[1:])
    cos, sin = (attention_scale * np.cos(angles)).astype(work), (attention_scale * np.sin(angles)).astype(work)
    first, second = rope_pairs(len(frequencies), interleaved)
    a, b = x[..., first].astype(work), x[..., second].astype(work)
    out = x.astype(work)
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out.astype(np.result_type(x, np.float16), copy=False)


def apply_rope_torch(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    """Rotary embedding in PyTorch; arguments, shapes and errors as apply_rope_numpy, differentiable in x.

    positions and frequencies may be tensors or arrays; angles are computed in float64.
    """
    positions = torch.as_tensor(positions, device=x.device)
    frequencies = torch.as_tensor(frequencies, device=x.device)
    check_rope(x, positions, frequencies)
    work = torch.promote_types(x.dtype, torch.float32 if x.is_floating_point() else torch.float64)
    angles = positions[..., None].double() * frequencies.double()
    if positions.dim() == 2:
        angles = angles.reshape(len(x), *[1] * (x.dim() - 3), *angles.shape[1:])
    cos, sin = (attention_scale * angles.cos()).to(work), (attention_scale * angles.sin()).to(work)
    n_pairs = len(frequencies)
    first, second = rope_pairs(n_pairs, interleaved)
    a, b = x[..., first].to(work), x[..., second].to(work)
    a, b = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack([a, b], dim=-1).flatten(-2) if interleaved else torch.cat([a, b], dim=-1)
    out = torch.cat([turned, x[..., 2 * n_pairs:].to(work)], dim=-1)
    return out.to(x.dtype) if x.is_floating_point() else out


def ntk_base(base, factor, d_rot):
    """The base whose slowest pair is `factor` times slower, while the fastest keeps its frequency of 1.

    Source: NTK-aware scaling, section 3.1 of Peng et al. 2023 (arXiv 2309.00071).
    """
    return base * factor ** (d_rot / (d_rot - 2))

def yarn_keep(d_rot, base, length, beta_slow=1.0, beta_fast=32.0):
    """How much of its own frequency each pair keeps under YaRN, the rest is interpolated: (d_rot / 2,) float64.

    1 for pairs that make more than beta_fast turns within the trained length, 0 for fewer than beta_slow, a ramp over
    the pairs between. The ends of the ramp are whole pairs, as in the published models.
    Source: Peng et al. 2023 (arXiv 2309.00071), section 3.2.
    """
    def pair_with(turns):
        return d_rot * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair_with(beta_fast)), 0), min(math.ceil(pair_with(beta_slow)), d_rot - 1)
    return 1 - np.clip((np.arange(d_rot // 2) - low) / max(high - low, 1e-3), 0, 1)

def llama3_keep(frequencies, length, low_freq_factor, high_freq_factor):
    """How much of its own frequency each pair keeps in Llama 3.1: (n_pairs,) float64, linear in the turns made."""
    turns = length * frequencies / (2 * math.pi)
    return np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)


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

def rope_frequencies(d_head, base=10000.0, scaling=None):
    """Frequencies of the pairs, in radians per position, and the factor for cosine and sine.

    scaling: None, or a dict with the keys of a published model's rope_parameters: rope_type (default, linear, dynamic,
    yarn, llama3) and what it needs; rope_theta there takes the place of base; partial_rotary_factor is the share of
    d_head that is rotated. dynamic also reads seq_len, the length in use.
    Returns (frequencies (d_rot / 2,) float64, attention_scale). Raises ValueError for an odd number of columns, an
    unknown rope_type or a missing key.
    Sources: linear Chen et al. 2023 (arXiv 2306.15595); dynamic, yarn Peng et al. 2023 (2309.00071); llama3 the code
    published with Llama 3.1.
    """
    scaling = dict(scaling or {})
    kind = scaling.get("rope_type", "default")
    if kind not in NEEDED:
        raise ValueError(f"rope_type must be one of {', '.join(NEEDED)}, got {kind!r}")
    missing = [key for key in NEEDED[kind] if scaling.get(key) is None]
    if missing:
        raise ValueError(f"scaling of rope_type {kind} must have {', '.join(missing)}, got {sorted(scaling)}")
    base, d_rot = scaling.get("rope_theta", base), int(d_head * scaling.get("partial_rotary_factor", 1.0))
    if d_rot < 2 or d_rot % 2:
        raise ValueError(f"the rotated part of d_head must be even and at least 2, got {d_rot} of {d_head}")
    factor, length = scaling.get("factor", 1.0), scaling.get("original_max_position_embeddings")
    if kind == "dynamic":
        stretch = factor * max(scaling.get("seq_len", length), length) / length - (factor - 1)
        base = ntk_base(base, stretch, d_rot)
    frequencies = base ** (-np.arange(0, d_rot, 2) / d_rot)
    keep = {"linear": lambda: 0.0,
            "yarn": lambda: yarn_keep(d_rot, base, length, scaling.get("beta_slow") or 1, scaling.get("beta_fast") or 32),
            "llama3": lambda: llama3_keep(frequencies, length, scaling["low_freq_factor"], scaling["high_freq_factor"]),
            }.get(kind, lambda: 1.0)()
    return frequencies * (keep + (1 - keep) / factor), yarn_attention_factor(scaling) if kind == "yarn" else 1.0


class Rotary(Positions):
    """RoPE: queries and keys are turned by their positions. Nothing is trained.

    d_head, base, scaling as in rope_frequencies; interleaved as in apply_rope_numpy; partial: the share of d_head that
    is rotated. With rope_type dynamic the frequencies follow the largest position that is asked for.
    """

    def __init__(self, d_head, base=10000.0, scaling=None, interleaved=False, partial=1.0):
        super().__init__()
        self.d_head, self.base, self.interleaved = d_head, base, interleaved
        self.scaling = {"partial_rotary_factor": partial} | (scaling or {})
        self.frequencies, self.attention_scale = rope_frequencies(d_head, base, self.scaling)

    def rotate(self, x, positions):
        frequencies = self.frequencies
        if self.scaling.get("rope_type") == "dynamic" and positions.numel():
            longest = self.scaling | {"seq_len": int(positions.max()) + 1}
            frequencies, _ = rope_frequencies(self.d_head, self.base, longest)
        return apply_rope_torch(x, positions, frequencies, self.attention_scale, self.interleaved)
