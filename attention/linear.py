# Generated from solutions/10_linear_and_state_space_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 10 · Linear and state-space attention: the finished code."""

import functools
import math

import numpy as np
import torch
from torch import nn

from attention.flash import FLASH_HEAD
from attention.fundamentals import attention_numpy, check_arguments
from utils import cuda

__all__ = [
    "linear_attention_numpy",
    "linear_attention_torch",
    "linear_attention_cuda",
    "selective_scan_numpy",
    "selective_scan_torch",
    "selective_scan_cuda",
    "chunked_attention",
    "memory_step",
    "scan",
    "favor_features",
    "stream",
    "wkv",
    "long_convolution",
    "Mamba",
]


def chunked_attention(q, k, v, chunk, state=None):
    """Causal linear attention in chunks: (out, the state after the last token).

    q, k (..., n, d_k), v (..., n, d_v), state (..., d_k, d_v) or None for zeros;
    chunk at least 1, ValueError otherwise. Source: Hua et al. 2022 (arXiv 2202.10447).
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if state is None:
        state = np.zeros((*q.shape[:-2], q.shape[-1], v.shape[-1]), q.dtype)
    out = np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    for first in range(0, q.shape[-2], chunk):
        rows = slice(first, first + chunk)
        q_c, k_c, v_c = q[..., rows, :], k[..., rows, :], v[..., rows, :]
        inside = np.tril(q_c @ k_c.swapaxes(-1, -2)) @ v_c
        out[..., rows, :] = q_c @ state + inside
        state = state + k_c.swapaxes(-1, -2) @ v_c
    return out, state


def favor_features(x, w):
    """Positive random features of x (..., d): (..., m), for w (m, d) of N(0, 1).

    The mean of favor_features(q, w) · favor_features(k, w) is exp(q · k).
    Source: Choromanski et al. 2021 (arXiv 2009.14794), § 2.3.
    """
    with_w = x @ w.T - (x * x).sum(-1, keepdims=True) / 2
    return np.exp(with_w) / math.sqrt(len(w))


def imitation_step(features, optimiser, q, k):
    """One step of features towards the softmax weights of q and k (batch, n, d).

    Returns the loss, a float: the mean cross-entropy of a row, before the step.
    Source: Zhang et al. 2024 (arXiv 2402.04347).
    """
    p = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    w = features.of_q(q) @ features.of_k(k).mT
    w = w / w.sum(dim=-1, keepdim=True)
    loss = -(p * w.log()).sum(dim=-1).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def memory_step(state, k, v, decay, beta, erase):
    """One step of a linear memory: decay, then (perhaps) erase along k, then write.

    state (..., d_k, d_v), k (..., d_k), v (..., d_v), decay (..., d_k) or (..., 1),
    beta (..., 1). Returns the new state. Source: arXiv 2412.06464 and 2510.26692.
    """
    state = decay[..., None] * state
    if erase:
        v = v - (k[..., None, :] @ state)[..., 0, :]
    return state + k[..., None] * (beta * v)[..., None, :]


def scan(x, delta, a, b, c, h):
    """The selective scan of Mamba from a state h: (outputs, the state at the end).

    x, delta (batch, n, channels), a (channels, d_state), b, c (batch, n, d_state),
    h (batch, channels, d_state). Source: arXiv 2312.00752, algorithm 2, with the step
    of its code.
    """
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]  # (batch, channels, 1)
        h = np.exp(step * a) * h + step * b[:, t, None] * x[:, t, :, None]
        y[:, t] = (h * c[:, t, None]).sum(-1)
    return y, h


class MambaWeights(nn.Module):
    """The weights of Mamba's layer; as in the course, matrices are (d_in, d_out)."""

    def __init__(self, d_model, d_inner, d_state=16, width=4, rank=4):
        super().__init__()
        self.d_state, self.rank = d_state, rank
        shapes = {"w_in": (d_model, 2 * d_inner), "conv": (d_inner, width),
                  "w_x": (d_inner, rank + 2 * d_state), "w_dt": (rank, d_inner),
                  "w_out": (d_inner, d_model)}
        for name, (rows, columns) in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(rows, columns) * rows**-0.5))
        decays = torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1)
        self.a_log = nn.Parameter(decays)  # a = -exp(a_log): -1, -2, ..., as HiPPO's
        self.d = nn.Parameter(torch.ones(d_inner))
        self.conv_bias = nn.Parameter(torch.zeros(d_inner))
        self.dt_bias = nn.Parameter(torch.full((d_inner,), -3.0))  # steps near 0.05


class Mamba(MambaWeights, nn.Module):
    """Mamba's layer: x (batch, n, d_model) to the same.

    Source: Gu and Dao 2023 (arXiv 2312.00752), figure 3.
    """

    def forward(self, x):
        F = nn.functional
        u, gate = (x @ self.w_in).chunk(2, dim=-1)
        padded = F.pad(u.mT, (self.conv.shape[1] - 1, 0))
        u = F.conv1d(padded, self.conv[:, None], self.conv_bias, groups=len(self.conv))
        u = F.silu(u.mT)
        low, b, c = (u @ self.w_x).split([self.rank, self.d_state, self.d_state], -1)
        delta = F.softplus(low @ self.w_dt + self.dt_bias)
        y = selective_scan_torch(u, delta, -self.a_log.exp(), b, c, self.d)
        return (y * F.silu(gate)) @ self.w_out


def stream(x, delta, a, b, c, kernel, state=None):
    """A piece of a text: short causal convolution, then scan. NumPy: (y, state).

    As scan; kernel (channels, width), its last column for the token itself. state is
    (tail, h): the last width - 1 inputs (batch, width - 1, channels) and the scan's.
    """
    width, n = kernel.shape[1], x.shape[1]
    if state is None:
        state = (np.zeros((len(x), width - 1, x.shape[2])),
                 np.zeros((len(x), *a.shape)))
    tail, h = state
    seen = np.concatenate([tail, x], axis=1)  # (batch, width - 1 + n, channels)
    u = sum(kernel[:, i] * seen[:, i:i + n] for i in range(width))
    y, h = scan(u, delta, a, b, c, h)
    return y, (seen[:, n:], h)


def test_stream(stream):
    """Raise AssertionError if stream(x, delta, a, b, c, kernel, state) is wrong."""
    rng = np.random.default_rng(0)
    x, delta = rng.standard_normal((2, 9, 3)), rng.uniform(0.1, 1, (2, 9, 3))
    b, c = rng.standard_normal((2, 2, 9, 4))
    a, kernel = -rng.uniform(0.5, 2, (3, 4)), rng.standard_normal((3, 4))
    h, expected = np.zeros((2, 3, 4)), np.zeros((2, 9, 3))
    for t in range(9):
        u = sum(kernel[:, 3 - i] * x[:, t - i] for i in range(min(4, t + 1)))
        step = delta[:, t, :, None]
        h = np.exp(step * a) * h + step * b[:, t, None] * u[..., None]
        expected[:, t] = (h * c[:, t, None]).sum(-1)
    for cuts in ([0, 9], [0, 5, 6, 7, 8, 9], [0, 1, 3, 9]):
        state = None
        for first, end in zip(cuts, cuts[1:]):
            piece = slice(first, end)
            y, state = stream(x[:, piece], delta[:, piece], a, b[:, piece],
                              c[:, piece], kernel, state)
            assert np.allclose(y, expected[:, piece]), (first, end)


CHUNK_TOOLS = FLASH_HEAD + r"""
// All threads copy TILE rows of `pitch` floats, from row `first` on, so many columns. Else zeros.
__device__ void load_tile(float* tile, int width, int stride, const float* from, int first, int end,
                          int columns, int pitch) {
  int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int e = thread; e < TILE * width; e += blockDim.x * blockDim.y) {
    int r = e / width, c = e % width;
    bool there = first + r < end && c < columns;
    tile[r * stride + c] = there ? from[(size_t)(first + r) * pitch + c] : 0.0f;
  }
}
"""


LINEAR_TOOLS = CHUNK_TOOLS + r"""
// A number of the state: 16 C columns, and space behind them so that two rows lie in other banks.
#define STATE(t, c) state[((t) * (C | 1) + (c)) * TILE + threadIdx.x]
__device__ float score(const float* q_tile, const float* k_tile, int d) {  // query y with key x
  float s = 0.0f;
  for (int t = 0; t < d; ++t)
    s += q_tile[threadIdx.y * (d + PAD) + t] * k_tile[threadIdx.x * (d + PAD) + t];
  return s;
}
// sum += row y of Q S, in columns x, x + 16, ...
template <int C>
__device__ void read_state(float (&sum)[C], const float* q_tile, const float* state, int d) {
  for (int t = 0; t < d; ++t) {
    float q = q_tile[threadIdx.y * (d + PAD) + t];
    for (int c = 0; c < C; ++c) sum[c] += q * STATE(t, c);
  }
}
// S += K^T V: a thread has rows y, y + 16, ... of S.
template <int C>
__device__ void add_to_state(float* state, const float* k_tile, const float* v_tile, int d) {
  for (int t = threadIdx.y; t < d; t += TILE) {
    float sum[C] = {};
    for (int r = 0; r < TILE; ++r) {
      float k = k_tile[r * (d + PAD) + t];
      for (int c = 0; c < C; ++c) sum[c] += k * v_tile[(r * C + c) * TILE + threadIdx.x];
    }
    for (int c = 0; c < C; ++c) STATE(t, c) += sum[c];
  }
}
"""


LINEAR_CHUNKED = LINEAR_TOOLS + r"""
template <int C>                                         // columns of V a thread, 16 C a block
__global__ void linear_chunked(const float* q, const float* k, const float* v, float* out,
                               int n_queries, int n_keys, int d, int d_v, int causal) {
  extern __shared__ float q_tile[];
  int x = threadIdx.x, y = threadIdx.y, stride = d + PAD, left = blockIdx.y * TILE * C;
  float *k_tile = q_tile + TILE * stride, *v_tile = k_tile + TILE * stride;
  float* state = v_tile + TILE * TILE * C;               // d rows, zero in the beginning
  int columns = min(TILE * C, d_v - left), before = causal ? n_keys - n_queries : n_keys;
  size_t head = blockIdx.x;
  q += head * n_queries * d, k += head * n_keys * d;
  v += head * n_keys * d_v + left, out += head * n_queries * d_v + left;
  for (int e = y * TILE + x; e < d * TILE * (C | 1); e += TILE * TILE) state[e] = 0.0f;
  for (int first = 0; first < before; first += TILE) {   // keys that all queries see
    __syncthreads();
    load_tile(k_tile, d, stride, k, first, before, d, d);
    load_tile(v_tile, TILE * C, TILE * C, v, first, before, columns, d_v);
    __syncthreads();
    add_to_state<C>(state, k_tile, v_tile, d);
  }
  for (int first = 0; first < n_queries; first += TILE) {
    __syncthreads();                                     // load: the last chunk is added
    load_tile(q_tile, d, stride, q, first, n_queries, d, d);
    if (causal) load_tile(k_tile, d, stride, k, before + first, n_keys, d, d);
    if (causal) load_tile(v_tile, TILE * C, TILE * C, v, before + first, n_keys, columns, d_v);
    __syncthreads();                                     // the new chunk is there
    float s = causal ? score(q_tile, k_tile, d) : 0.0f;  // score
    float sum[C] = {};
    read_state<C>(sum, q_tile, state, d);                // accumulate: what came before ...
    for (int r = 0; r < TILE; ++r) {                     // ... and the chunk itself
      float w = __shfl_sync(0xffffffff, s, r, TILE);
      for (int c = 0; c < C && causal && r <= y; ++c) sum[c] += w * v_tile[(r * C + c) * TILE + x];
    }
    for (int c = 0; c < C && first + y < n_queries && x + TILE * c < columns; ++c)     // write
      out[(size_t)(first + y) * d_v + x + TILE * c] = sum[c];
    __syncthreads();                                     // the old state is used up
    if (causal) add_to_state<C>(state, k_tile, v_tile, d);
  }
}
"""


SELECTIVE_SCAN = CHUNK_TOOLS + r"""
#define CHANNELS 32                                      // of a block; TILE lanes each
template <int S>                                         // states a lane: 16 S >= n_state
__global__ __launch_bounds__(512) void selective_scan(const float* x, const float* delta,
    const float* a, const float* b, const float* c, const float* d, float* out,
    int n, int channels, int n_state) {
  __shared__ float x_tile[TILE * CHANNELS], delta_tile[TILE * CHANNELS], y_tile[TILE * CHANNELS];
  extern __shared__ float b_tile[];                      // TILE rows of 16 S floats, twice
  float* c_tile = b_tile + TILE * TILE * S;
  int lane = threadIdx.x, own = threadIdx.y, left = blockIdx.x * CHANNELS;
  int columns = min(CHANNELS, channels - left);
  size_t batch = blockIdx.y, begin = batch * n * channels + left;
  a += (size_t)(left + own) * n_state, b += batch * n * n_state, c += batch * n * n_state;
  float rate[S], state[S] = {};
  for (int s = 0; s < S; ++s)
    rate[s] = own < columns && lane + TILE * s < n_state ? a[lane + TILE * s] : 0.0f;
  float skip = own < columns && lane == 0 ? d[left + own] : 0.0f;
  for (int first = 0; first < n; first += TILE) {
    load_tile(x_tile, CHANNELS, CHANNELS, x + begin, first, n, columns, channels);       // load
    load_tile(delta_tile, CHANNELS, CHANNELS, delta + begin, first, n, columns, channels);
    load_tile(b_tile, TILE * S, TILE * S, b, first, n, n_state, n_state);
    load_tile(c_tile, TILE * S, TILE * S, c, first, n, n_state, n_state);
    __syncthreads();                                     // the new steps are there
    for (int t = 0; t < TILE; ++t) {                     // step
      float step = delta_tile[t * CHANNELS + own], u = x_tile[t * CHANNELS + own], y = 0.0f;
      for (int s = 0; s < S; ++s) {
        int at = (t * S + s) * TILE + lane;
        state[s] = expf(step * rate[s]) * state[s] + step * b_tile[at] * u;
        y += c_tile[at] * state[s];
      }
      y = row_sum(y);                                    // over the lanes of this channel
      if (lane == 0) y_tile[t * CHANNELS + own] = y + skip * u;
    }
    __syncthreads();                                     // the steps are used, the sums are there
    for (int e = own * TILE + lane; e < TILE * CHANNELS; e += TILE * CHANNELS) {         // write
      int t = first + e / CHANNELS, channel = e % CHANNELS;
      if (t < n && channel < columns) out[begin + (size_t)t * channels + channel] = y_tile[e];
    }
  }
}
"""


def wkv(w, u, k, v):
    """RWKV-4's weighted mean of values, stable. w, u (channels,), k, v (n, channels).

    w > 0 is the decay a token, u the bonus of the token itself. Returns (n, channels).
    Source: Peng et al. 2023 (arXiv 2305.13048).
    """
    top = np.full(k.shape[1], -np.inf)  # the largest exponent so far
    above, below = np.zeros(k.shape[1]), np.zeros(k.shape[1])
    out = np.zeros(v.shape)
    for i in range(len(k)):
        new = np.maximum(top, u + k[i])
        old, now = np.exp(top - new), np.exp(u + k[i] - new)
        out[i] = (old * above + now * v[i]) / (old * below + now)
        new = np.maximum(top - w, k[i])
        old, now = np.exp(top - w - new), np.exp(k[i] - new)
        above, below, top = old * above + now * v[i], old * below + now, new
    return out


def long_convolution(x, kernel):
    """Causal convolution by FFT: x (..., n, channels), kernel (n, channels).

    Returns the shape of x. Zeros stand behind the text, or its end would leak into
    the beginning.
    """
    n = x.shape[-2]
    product = np.fft.rfft(x, 2 * n, axis=-2) * np.fft.rfft(kernel, 2 * n, axis=0)
    return np.fft.irfft(product, 2 * n, axis=-2)[..., :n, :]


def infini_attention(q, k, v, segment, gate, delta=False):
    """Softmax inside segments, a linear memory of all before them, mixed by a gate.

    q, k (n, d), v (n, d_v), NumPy; sigmoid(gate) is the memory's share; delta: write
    only what the memory does not answer yet. Returns (n, d_v). ValueError where
    segment is below 1. Source: Munkhdalai et al. 2024 (arXiv 2404.07143), § 2.1.
    """
    if segment < 1:
        raise ValueError(f"segment must be at least 1, got {segment}")
    share, out = 1 / (1 + np.exp(-gate)), np.zeros((len(q), v.shape[1]))
    memory, total = np.zeros((k.shape[1], v.shape[1])), np.zeros(k.shape[1])
    for first in range(0, len(q), segment):
        rows = slice(first, first + segment)
        q_f, k_f = (np.exp(np.minimum(a[rows], 0)) + np.maximum(a[rows], 0)
                    for a in (q, k))  # elu + 1
        said, known = (f @ memory / np.maximum(f @ total, 1e-9)[:, None]
                       for f in (q_f, k_f))
        local = attention_numpy(q[rows], k[rows], v[rows], causal=True)
        out[rows] = share * said + (1 - share) * local
        memory = memory + k_f.T @ (v[rows] - (known if delta else 0))
        total = total + k_f.sum(0)
    return out


def check_linear(q, k, v, chunk=64):
    """Raise ValueError or TypeError, in one sentence, unless the arguments fit. Returns the leading axes, broadcast."""
    check_arguments(q, k, v)
    if isinstance(chunk, bool) or not isinstance(chunk, (int, np.integer)) or chunk < 1:
        raise ValueError(f"chunk must be a positive whole number, got {chunk!r}")
    return np.broadcast_shapes(*(tuple(a.shape[:-2]) for a in (q, k, v)))

def linear_attention_numpy(q, k, v, causal=True, chunk=64, normalise=False):
    """Linear attention in chunks, with a state between them, in NumPy: sum_j (q_i · k_j) v_j, or divided by sum_j (q_i · k_j).

    q (..., n_queries, d_head) and k (..., n_keys, d_head) are features already, without a scale; v (..., n_keys, d_v);
    leading axes broadcast; causal is aligned at the bottom right; chunk, a positive number, does not change the result.
    Returns (..., n_queries, d_v) in the float type of q, float64 for integers (half precision is computed in single); a
    query with nothing to attend to, or weights that add up to 0 where they are normalised, gets zeros. What a query may
    not see changes nothing, be it nan. Raises ValueError when shapes do not fit.
    Source: Katharopoulos et al. 2020 (arXiv 2006.16236), equations 4 to 12.
    """
    lead = check_linear(q, k, v, chunk)
    cuda.check_kind(np.ndarray, q=q, k=k, v=v)
    given, work = q, cuda.work_type(q)
    q, k, v = (np.broadcast_to(a, (*lead, *a.shape[-2:])).astype(work) for a in (q, k, v))
    if normalise:
        v = np.concatenate([v, np.ones_like(v[..., :1], shape=(*v.shape[:-1], 1))], -1)  # a column more: the sum of the weights
    n, m = q.shape[-2], k.shape[-2]
    blind, before = (max(0, n - m), max(0, m - n)) if causal else (0, m)
    state = k[..., :before, :].swapaxes(-1, -2) @ v[..., :before, :]                      # what all queries see
    out = np.zeros((*lead, n, v.shape[-1]), work)
    if causal:
        finite = np.isfinite(k).all() and np.isfinite(v).all()                            # 0 times nan is nan, so ...
        rest = (a[..., first:, :] for a, first in ((q, blind), (k, before), (v, before)))
        out[..., blind:, :] = chunked_attention(*rest, int(chunk) if finite else 1, state)[0]
    else:
        out = q @ state
    if normalise:
        total = out[..., -1:]
        out = out[..., :-1] / np.where(total == 0, 1, total)
    return cuda.like(out, given)

def linear_attention_torch(q, k, v, causal=True, chunk=64, normalise=False):
    """linear_attention_numpy in PyTorch, differentiable. Same arguments, shapes and errors."""
    lead = check_linear(q, k, v, chunk)
    cuda.check_kind(torch.Tensor, q=q, k=k, v=v)
    given, work = q, cuda.work_type(q)
    q, k, v = (a.to(work).expand(*lead, *a.shape[-2:]) for a in (q, k, v))
    if normalise:
        v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
    n, m = q.shape[-2], k.shape[-2]
    blind, before = (max(0, n - m), max(0, m - n)) if causal else (0, m)
    state = k[..., :before, :].mT @ v[..., :before, :]
    if causal:
        finite = bool(k.isfinite().all() and v.isfinite().all())
        step, pieces = int(chunk) if finite else 1, [q.new_zeros(*lead, blind, v.shape[-1])]
        for first in range(0, max(n - blind, 1), step):                                    # once even where nothing is there
            q_c = q[..., blind + first : blind + first + step, :]
            k_c, v_c = (a[..., before + first : before + first + step, :] for a in (k, v))
            pieces.append(q_c @ state + (q_c @ k_c.mT).tril() @ v_c)
            state = state + k_c.mT @ v_c
        out = torch.cat(pieces, -2)
    else:
        out = q @ state
    if normalise:
        total = out[..., -1:]
        out = out[..., :-1] / total.masked_fill(total == 0, 1)
    return cuda.like(out, given)


def selective_scan_numpy(x, delta, a, b, c, d=None):
    """The selective scan of Mamba in NumPy: h_t = exp(delta_t a) h_{t-1} + delta_t b_t x_t, y_t = c_t · h_t + d x_t.

    x, delta (batch, seq, channels), a (channels, state), b, c (batch, seq, state), d (channels,) or None; delta positive
    and a negative for a state that fades. Returns (batch, seq, channels) in the float type of x, float64 for integers.
    Raises ValueError when shapes do not fit. Source: Gu and Dao 2023 (arXiv 2312.00752), algorithm 2, with the step of its code.
    """
    check_scan(x, delta, a, b, c, d)
    cuda.check_kind(np.ndarray, x=x, delta=delta, a=a, b=b, c=c, **({} if d is None else {"d": d}))
    given, work = x, cuda.work_type(x)
    x, delta, a, b, c = (array.astype(work) for array in (x, delta, a, b, c))
    y, _ = scan(x, delta, a, b, c, np.zeros((len(x), *a.shape), work))
    return cuda.like(y if d is None else y + d.astype(work) * x, given)

def selective_scan_torch(x, delta, a, b, c, d=None):
    """selective_scan_numpy in PyTorch, differentiable. Same arguments, shapes and errors."""
    check_scan(x, delta, a, b, c, d)
    cuda.check_kind(torch.Tensor, x=x, delta=delta, a=a, b=b, c=c, **({} if d is None else {"d": d}))
    given, work = x, cuda.work_type(x)
    x, delta, a, b, c = (tensor.to(work) for tensor in (x, delta, a, b, c))
    h, ys = x.new_zeros(len(x), *a.shape), []
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * a) * h + step * b[:, t, None] * x[:, t, :, None]
        ys.append((h * c[:, t, None]).sum(-1))
    nothing = x * delta * a.sum(-1) * (b * c).sum(-1, keepdim=True)                       # a text without tokens has gradients too
    y = torch.stack(ys, 1) if ys else nothing
    return cuda.like(y if d is None else y + d.to(work) * x, given)


def linear_tiles(d, d_v, available=48 * 1024):
    """How V is cut: (columns a thread, slices, bytes of shared memory). At most four columns a thread, fewer to fit."""
    def shared(columns):
        return 4 * (32 * (d + 1) + 256 * columns + 16 * d * (columns | 1))

    most = next((columns for columns in (4, 3, 2) if shared(columns) <= available), 1)
    slices = max(1, -(-d_v // (16 * most)))
    columns = max(1, -(-d_v // (16 * slices)))
    return columns, slices, shared(columns)

def linear_bytes(n_queries, n_keys, d, d_v):
    """Bytes of global memory that one head of the chunked kernel asks for, exactly: (loaded, stored).

    Queries and keys are read once for each slice of V, values once.
    """
    slices = linear_tiles(d, d_v)[1]
    return 4 * (slices * (n_queries + n_keys) * d + n_keys * d_v), 4 * n_queries * d_v

def scan_bytes(batch, n, channels, n_state, block=32):
    """Bytes of global memory that the scan asks for, exactly; block: channels that share a reading of b and c."""
    each = 3 * channels + 2 * n_state * -(-channels // block)              # x, delta, the output; b and c
    return 4 * (batch * n * each + batch * channels * (n_state + 1))


@functools.cache
def linear_kernel(columns):
    """The kernel for so many columns of V a thread, compiled on first use."""
    return cuda.compile(LINEAR_CHUNKED, name="linear_chunked", template=(columns,))

def linear_launch(q, k, v, causal=True):
    """What launches the chunked kernel: kernel, (grid, block, shared bytes), arguments. The fourth is the output.

    All leading axes are one: (heads, seq, d), single precision. Causal: at least as many keys as queries.
    """
    lead, (n_queries, d), (n_keys, d_v) = check_linear(q, k, v), q.shape[-2:], v.shape[-2:]
    heads = math.prod(lead)
    q, k, v = (a.expand(*lead, *a.shape[-2:]).reshape(heads, *a.shape[-2:]).contiguous()
               for a in cuda.on_device(q, k, v))
    columns, slices, shared = linear_tiles(d, d_v)
    out = q.new_zeros(heads, n_queries, d_v)
    launch = (heads, slices), (16, 16), shared
    return linear_kernel(columns), launch, (q, k, v, out, n_queries, n_keys, d, d_v, int(causal))


def linear_attention_cuda(q, k, v, causal=True, chunk=64, normalise=False):
    """linear_attention_numpy by a CUDA kernel: chunks of 16 tokens, the state d_head x d_v in shared memory.

    q (..., n_queries, d_head), k (..., n_keys, d_head), v (..., n_keys, d_v), leading axes broadcast, features already;
    causal is aligned at the bottom right; normalise divides by the sum of the weights (0 where that is 0). chunk is
    checked and else not used: it does not change the result. NumPy arrays and CPU tensors run on the CPU, CUDA tensors
    on the GPU. Computed in single precision. Returns (..., n_queries, d_v) in the kind and type of q. Not
    differentiable. d_head up to 250 within 48 KB of shared memory; more has to be granted by the GPU. Raises ValueError
    when shapes do not fit.
    Source: Katharopoulos et al. 2020 (arXiv 2006.16236); chunks: Yang et al. 2024 (arXiv 2312.06635), section 4.
    """
    lead, given, n_queries, d_v = check_linear(q, k, v, chunk), q, q.shape[-2], v.shape[-1]
    q, k, v = cuda.on_device(q, k, v)
    if normalise:
        v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)               # one more column: the sum of the weights
    out = q.new_zeros(*lead, n_queries, v.shape[-1])
    blind = max(0, n_queries - k.shape[-2]) if causal else 0               # queries before the first key
    kernel, launch, arguments = linear_launch(q[..., blind:, :], k, v, causal)
    if arguments[3].numel():
        kernel.fast[launch](*arguments)
    out[..., blind:, :] = arguments[3].reshape(*lead, n_queries - blind, v.shape[-1])
    if normalise:
        total = out[..., d_v:]
        out = out[..., :d_v] / total.masked_fill(total == 0, 1)
    return cuda.like(out, given)


def check_scan(x, delta, a, b, c, d=None):
    """Raise ValueError or TypeError, in one sentence, unless the arguments of a scan fit. For arrays and tensors."""
    arrays = {"x": x, "delta": delta, "a": a, "b": b, "c": c} | ({} if d is None else {"d": d})
    cuda.check_numbers(**arrays)
    if len(x.shape) != 3 or len(a.shape) != 2:
        raise ValueError("x and a must have the axes (batch, seq, channels) and (channels, state), got shapes "
                         f"{tuple(x.shape)} and {tuple(a.shape)}")
    shapes = {"delta": tuple(x.shape), "a": (x.shape[2], a.shape[1]), "b": (*x.shape[:2], a.shape[1]),
              "c": (*x.shape[:2], a.shape[1]), "d": (x.shape[2],)}
    for name, shape in shapes.items():
        if name in arrays and tuple(arrays[name].shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(arrays[name].shape)}")

@functools.cache
def scan_kernel(states):
    """The kernel for so many states a lane, compiled on first use."""
    return cuda.compile(SELECTIVE_SCAN, name="selective_scan", template=(states,))

def scan_launch(x, delta, a, b, c, d=None):
    """What launches the scan: kernel, (grid, block, shared bytes), arguments. The seventh is the output."""
    check_scan(x, delta, a, b, c, d)
    (batch, n, channels), n_state = x.shape, a.shape[1]
    arrays = cuda.on_device(x, delta, a, b, c, np.zeros(channels, np.float32) if d is None else d)
    states = max(1, -(-n_state // 16))
    launch = (-(-channels // 32), batch), (16, 32), 2 * 4 * 16 * 16 * states
    return scan_kernel(states), launch, (*arrays, torch.zeros_like(arrays[0]), n, channels, n_state)


def selective_scan_cuda(x, delta, a, b, c, d=None):
    """selective_scan_numpy by a CUDA kernel: 16 lanes a channel with its states in registers, 32 channels a block.

    x, delta (batch, seq, channels), a (channels, state), b, c (batch, seq, state), d (channels,) or None. NumPy arrays
    and CPU tensors run on the CPU, CUDA tensors on the GPU. Computed in single precision. Returns (batch, seq,
    channels) in the kind and type of x. Not differentiable. Up to 320 states with 48 KB of shared memory. Raises
    ValueError when shapes do not fit.
    Source: Gu and Dao 2023 (arXiv 2312.00752), algorithm 2.
    """
    kernel, launch, arguments = scan_launch(x, delta, a, b, c, d)
    if arguments[6].numel():
        kernel.fast[launch](*arguments)
    return cuda.like(arguments[6], x)
