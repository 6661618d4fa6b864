# Generated from solutions/12_mixture_of_experts_attention.py by `python course.py build`. Edit that file, not this one.
"""Lecture 12 · Mixture-of-experts attention: the finished code."""

import datetime
import functools
import math
import os
import socket
import tempfile

import numpy as np
import torch
from torch import distributed, multiprocessing, nn

from attention.fundamentals import attention_numpy, attention_torch, causal_mask, softmax
from attention.grouped_query import grouped_query_attention_cuda
from attention.long_context import matmul_cuda
from attention.multi_head import Positions, masked_softmax, merge_heads, split_heads
from utils import cuda

__all__ = [
    "mixture_attention_numpy",
    "mixture_attention_torch",
    "mixture_attention_cuda",
    "MixtureOfHeadsAttention",
    "RoutedAttention",
    "top_k_gates",
    "load_balancing_loss",
    "router_z_loss",
    "balancing_step",
    "kept_slots",
]


def top_k_gates(logits, k):
    """Gates (..., n_experts): softmax over the k largest logits of a row, else 0.

    Equal logits: the lower index first. ValueError unless 1 <= k <= n_experts.
    Source: Shazeer et al. 2017 (arXiv 1701.06538), section 2.1, without its noise.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must be from 1 to {logits.shape[-1]}, got {k}")
    chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    kept = np.full_like(logits, -np.inf)
    values = np.take_along_axis(logits, chosen, axis=-1)
    np.put_along_axis(kept, chosen, values, axis=-1)
    return softmax(kept)


def routed_attention(x, gates, w_q, w_k, w_v, w_o, causal=False):
    """Attention of each token's experts to shared keys: (n, d_model), NumPy.

    x (n, d_model), gates (n, n_experts), w_q (n_experts, d_model, d_head), w_k and
    w_v (d_model, d_head), w_o (n_experts, d_head, d_model). Only what has a gate
    is computed. Source: Zhang et al. 2022 (arXiv 2210.05144), section 3.
    """
    k, v, out = x @ w_k, x @ w_v, np.zeros_like(x)
    allowed = causal_mask(len(x)) if causal else np.ones((len(x), len(x)), bool)
    for e in range(len(w_q)):
        rows = np.flatnonzero(gates[:, e])
        if len(rows):
            found = attention_numpy(x[rows] @ w_q[e], k, v, mask=allowed[rows])
            out[rows] += gates[rows, e, None] * (found @ w_o[e])
    return out


class RoutedWeights(nn.Module):
    """The weights of attention experts. positions: what rotates; nothing by default.

    w_router (d_model, n_experts), w_q (d_model, n_experts * d_head), w_k and w_v
    (d_model, d_head), w_o (n_experts * d_head, d_model).
    """

    def __init__(self, d_model, n_experts, d_head, top_k, positions=None):
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k must be from 1 to {n_experts}, got {top_k}")
        self.n_experts, self.top_k = n_experts, top_k
        self.positions = Positions() if positions is None else positions
        wide = n_experts * d_head
        shapes = {"w_router": (d_model, n_experts), "w_q": (d_model, wide),
                  "w_k": (d_model, d_head), "w_v": (d_model, d_head),
                  "w_o": (wide, d_model)}
        for name, (rows, columns) in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(rows, columns) * rows**-0.5))

    def experts(self):
        """w_q (n_experts, d_model, d_head) and w_o (n_experts, d_head, d_model)."""
        w_q = self.w_q.unflatten(1, (self.n_experts, -1)).transpose(0, 1)
        return w_q, self.w_o.unflatten(0, (self.n_experts, -1))


class RoutedAttention(RoutedWeights, nn.Module):
    """Causal attention whose heads are chosen by each token: x (batch, n, d_model).

    Source: Zhang et al. 2022 (arXiv 2210.05144); gates as in JetMoE (2404.07413).
    """

    def route(self, x):
        """(gates, chosen), both (batch, n, top_k); keeps self.logits."""
        self.logits = x @ self.w_router
        largest, chosen = self.logits.topk(self.top_k, dim=-1)
        return largest.softmax(-1), chosen

    def forward(self, x, mask=None, causal=True, positions=None, cache=None):
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        (gates, chosen), (w_q, w_o), rows = self.route(x), self.experts(), x.flatten(0, 1)
        slots = [torch.nonzero(chosen.flatten() == e)[:, 0] for e in range(len(w_q))]
        q = x.new_zeros(chosen.numel(), w_q.shape[-1])
        for e, own in enumerate(slots):  # slot s belongs to token s // top_k
            q = q.index_add(0, own, rows[own // self.top_k] @ w_q[e])
        q = q.view(*chosen.shape, w_q.shape[2]).transpose(1, 2)  # as heads
        q, k = (self.positions.rotate(a, positions) for a in (q, (x @ self.w_k)[:, None]))
        v = (x @ self.w_v)[:, None]
        if cache is not None:
            k, v = cache.update(k, v)
        p = masked_softmax(q @ k.mT / math.sqrt(q.shape[-1]), mask, causal)
        heads = (p @ v).transpose(1, 2) * gates[..., None]
        heads, out = heads.flatten(0, 2), torch.zeros_like(rows)
        for e, own in enumerate(slots):
            out = out.index_add(0, own // self.top_k, heads[own] @ w_o[e])
        return out.view_as(x)


def load_balancing_loss(router_logits, top_k):
    """Switch's auxiliary loss: n_experts * sum of load times mean probability.

    router_logits (..., n_experts), a tensor; loads are shares of all slots. 1 when
    balanced, n_experts when top-1 is collapsed onto one. Source: arXiv 2101.03961.
    """
    cuda.check_kind(torch.Tensor, router_logits=router_logits)
    n_experts = router_logits.shape[-1]
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k must be from 1 to {n_experts}, got {top_k}")
    rows = router_logits.reshape(-1, n_experts)
    chosen = rows.topk(top_k, dim=-1).indices.flatten()
    share = torch.bincount(chosen, minlength=n_experts).to(rows.dtype) / len(chosen)
    return n_experts * (share * rows.softmax(-1).mean(0)).sum()


def router_z_loss(router_logits):
    """The mean squared log-sum-exp of router_logits (..., n_experts), a tensor."""
    cuda.check_kind(torch.Tensor, router_logits=router_logits)
    return torch.logsumexp(router_logits, dim=-1).square().mean()


def balancing_step(bias, router_logits, top_k, speed):
    """The bias (n_experts,) after one step towards an even load; nothing is trained.

    Source: Wang et al. 2024 (arXiv 2408.15664); used in DeepSeek-V3 (2412.19437).
    """
    n_experts = router_logits.shape[-1]
    rows = router_logits.reshape(-1, n_experts) + bias
    counts = torch.bincount(rows.topk(top_k, dim=-1).indices.flatten(),
                            minlength=n_experts).to(bias.dtype)
    return bias + speed * torch.sign(counts.mean() - counts)


def kept_slots(chosen, n_experts, capacity):
    """Boolean, shaped as chosen (n, top_k): which slots an expert has room for.

    Tokens come in their order: an expert takes its first `capacity` slots.
    """
    order = chosen.reshape(-1)
    before = np.cumsum(np.eye(n_experts, dtype=int)[order], axis=0)
    place = np.take_along_axis(before, order[:, None], axis=1)  # 1 for the first
    return (place <= capacity).reshape(chosen.shape)


def test_causal(layer):
    """Raise AssertionError if an output of layer(x), x (n, 8), sees later tokens."""
    rng = np.random.default_rng(0)
    for size in (1.0, 30.0):
        for n in (7, 16):
            rows = rng.standard_normal((n, 8)) * np.linspace(1, size, n)[:, None]
            whole = layer(rows)
            for i in range(1, n):
                early, reach = layer(rows[:i]), np.abs(whole[:i]).max()
                assert np.abs(early - whole[:i]).max() <= 1e-4 * (reach + 1e-3)


GROUPED_MATMUL = r"""
#define ROWS 32                                          // slots of a tile, all of one expert
#define COLUMNS 64                                       // columns of a block
#define DEPTH 32                                         // columns of x, and rows of w, in a tile
__global__ void grouped_matmul(const float* x, const float* w, const int* from, const int* to,
    const float* gates, const int* tiles, float* y, int inner, int columns) {
  __shared__ float x_tile[ROWS * (DEPTH + 1)], w_tile[DEPTH * COLUMNS], gate[ROWS];
  __shared__ int source[ROWS], target[ROWS];
  int tx = threadIdx.x, ty = threadIdx.y, thread = ty * 16 + tx, left = blockIdx.y * COLUMNS;
  int expert = tiles[3 * blockIdx.x], begin = tiles[3 * blockIdx.x + 1];
  int rows = tiles[3 * blockIdx.x + 2] - begin;
  w += (size_t)expert * inner * columns + left;
  if (thread < rows) {
    source[thread] = from[begin + thread];
    target[thread] = to[begin + thread];
    gate[thread] = gates[begin + thread];
  }
  float sum[2][4] = {};
  for (int first = 0; first < inner; first += DEPTH) {
    __syncthreads();                                     // load: the last tiles are used up
    for (int e = thread; e < ROWS * DEPTH; e += 256) {   // gather
      int r = e / DEPTH, t = e % DEPTH;
      bool there = r < rows && first + t < inner;
      x_tile[r * (DEPTH + 1) + t] = there ? x[(size_t)source[r] * inner + first + t] : 0.0f;
    }
    for (int e = thread; e < DEPTH * COLUMNS; e += 256) {
      int t = e / COLUMNS, c = e % COLUMNS;
      bool there = first + t < inner && left + c < columns;
      w_tile[e] = there ? w[(size_t)(first + t) * columns + c] : 0.0f;
    }
    __syncthreads();                                     // the new tiles are there
    for (int t = 0; t < DEPTH; ++t)                      // accumulate
      for (int c = 0; c < 4; ++c) {
        float value = w_tile[t * COLUMNS + tx + 16 * c];
        sum[0][c] += x_tile[ty * (DEPTH + 1) + t] * value;
        sum[1][c] += x_tile[(ty + 16) * (DEPTH + 1) + t] * value;
      }
  }
  for (int r = ty, i = 0; r < rows; r += 16, ++i)        // write: scatter
    for (int c = tx; c < COLUMNS && left + c < columns; c += 16)
      y[(size_t)target[r] * columns + left + c] = gate[r] * sum[i][c / 16];
}
"""


class HeadWeights(nn.Module):
    """The weights of MixtureOfHeadsAttention: those of all heads, and three routers."""

    def __init__(self, d_model, n_heads, top_k, n_shared=0, positions=None):
        super().__init__()
        routed = n_heads - n_shared
        if n_heads < 1 or d_model % n_heads or not 1 <= top_k <= routed or n_shared < 0:
            raise ValueError("n_heads must divide d_model, top_k be at most n_heads - "
                             f"n_shared, got {n_heads, d_model, top_k, n_shared}")
        self.n_heads, self.top_k, self.n_shared = n_heads, top_k, n_shared
        self.positions = Positions() if positions is None else positions
        columns = dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), d_model)
        columns |= {"w_router": routed}
        columns |= {"w_shared": n_shared, "w_balance": 2} if n_shared else {}
        for name, wide in columns.items():
            w = torch.randn(d_model, wide) * d_model**-0.5
            setattr(self, name, nn.Parameter(w))


class HeadGates(HeadWeights):
    """Which heads work for a token, and how much."""

    def gates(self, x):
        """The gates of all heads, shared ones first: (batch, n, n_heads)."""
        self.logits = x @ self.w_router
        top, chosen = self.logits.topk(self.top_k, dim=-1)
        gates = self.top_k * top.softmax(-1)
        routed = torch.zeros_like(self.logits).scatter(-1, chosen, gates)
        if not self.n_shared:
            return routed
        shared = self.n_shared * (x @ self.w_shared).softmax(-1)
        balance = 2 * (x @ self.w_balance).softmax(-1)
        return torch.cat([balance[..., :1] * shared, balance[..., 1:] * routed], dim=-1)


class MixtureOfHeadsAttention(HeadGates):
    """Multi-head attention whose heads have gates; called as MultiHeadAttention is.

    The first n_shared heads always work; of the others each token chooses top_k. All
    are computed. Source: Jin et al. 2024 (arXiv 2410.11842), gates as in its code.
    """

    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        """x (batch, n, d_model) to the same; arguments as MultiHeadAttention's."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        q, k, v = (split_heads(x @ w, self.n_heads)
                   for w in (self.w_q, self.w_k, self.w_v))
        q, k = (self.positions.rotate(a, positions) for a in (q, k))
        if cache is not None:
            k, v = cache.update(k, v)
        p = masked_softmax(q @ k.mT / math.sqrt(q.shape[-1]), mask, causal)
        heads = cuda.weighted_sum(p, v) * self.gates(x).mT[..., None]
        return merge_heads(heads) @ self.w_o


def at_the_experts(slots, expert, w):
    """slots @ w[expert] where each process holds some experts: (n_slots, columns).

    slots (n_slots, inner) and expert (n_slots,) are this process's own, w (n_experts /
    n_processes, inner, columns) the experts that it holds, in the order of the ranks.
    """
    order = expert.argsort(stable=True)  # by expert, so by process
    leave = (expert // len(w)).bincount(minlength=distributed.get_world_size())
    come = torch.empty_like(leave)
    distributed.all_to_all_single(come, leave)  # how many rows will come from each
    leave, come = leave.tolist(), come.tolist()
    rows = slots.new_empty(sum(come), slots.shape[1])
    whose = expert.new_empty(sum(come))  # which expert each row is for
    distributed.all_to_all_single(rows, slots[order], come, leave)
    distributed.all_to_all_single(whose, expert[order], come, leave)
    found = slots.new_empty(len(rows), w.shape[2])
    for e in whose.unique().tolist():
        found[whose == e] = rows[whose == e] @ w[e % len(w)]
    back, out = (slots.new_empty(len(slots), w.shape[2]) for _ in range(2))
    distributed.all_to_all_single(back, found, leave, come)
    out[order] = back
    return out


def check_mixture(x, w_router, w_q, w_k, w_v, w_o, top_k):
    """Raise ValueError or TypeError, in one sentence, unless the arguments fit together. For arrays and tensors."""
    arrays = {"x": x, "w_router": w_router, "w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o}
    cuda.check_numbers(**arrays)
    if len(x.shape) < 2:
        raise ValueError(f"x must have at least two axes (seq, d_model), got shape {tuple(x.shape)}")
    if len(w_q.shape) != 3 or w_q.shape[2] == 0:
        raise ValueError("w_q must have shape (n_experts, d_model, d_head) with a d_head of at least 1, got "
                         f"{tuple(w_q.shape)}")
    d_model, (n_experts, _, d_head) = x.shape[-1], w_q.shape
    shapes = {"w_router": (d_model, n_experts), "w_q": (n_experts, d_model, d_head), "w_k": (d_model, d_head),
              "w_v": (d_model, d_head), "w_o": (n_experts, d_head, d_model)}
    for name, shape in shapes.items():
        if tuple(arrays[name].shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(arrays[name].shape)}")
    if not isinstance(top_k, (int, np.integer)) or isinstance(top_k, bool) or not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k must be a whole number from 1 to {n_experts}, got {top_k!r}")


def mixture_attention_numpy(x, w_router, w_q, w_k, w_v, w_o, top_k, causal=False):
    """Attention whose heads, the experts, are chosen by each token; keys and values are shared. NumPy.

    x (..., seq, d_model), w_router (d_model, n_experts), w_q (n_experts, d_model, d_head), w_k and w_v (d_model, d_head),
    w_o (n_experts, d_head, d_model). The top_k largest logits of x @ w_router choose,
    of equal ones the lower number; gates are the softmax over them. An expert is computed for its tokens only, so one
    that nobody chose may hold nan. causal: no token sees a later one. Returns the shape and float type of x (integers:
    double). Raises ValueError when shapes or top_k do not fit.
    Source: Zhang et al. 2022 (arXiv 2210.05144), section 3; gates as in Shen et al. 2024 (2404.07413).
    """
    check_mixture(x, w_router, w_q, w_k, w_v, w_o, top_k)
    cuda.check_kind(np.ndarray, x=x, w_router=w_router, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o)
    rows, w_router, *others = (a.astype(cuda.work_type(x)) for a in (x, w_router, w_q, w_k, w_v, w_o))
    out = np.zeros_like(rows)
    for at in np.ndindex(rows.shape[:-2]):
        out[at] = routed_attention(rows[at], top_k_gates(rows[at] @ w_router, top_k), *others, causal=causal)
    return cuda.like(out, x)

def mixture_attention_torch(x, w_router, w_q, w_k, w_v, w_o, top_k, causal=False):
    """mixture_attention_numpy in PyTorch: all texts at once, differentiable. Same arguments, shapes and errors."""
    check_mixture(x, w_router, w_q, w_k, w_v, w_o, top_k)
    cuda.check_kind(torch.Tensor, x=x, w_router=w_router, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o)
    (*lead, n, d_model), work = x.shape, cuda.work_type(x)
    rows, w_router, w_q, w_k, w_v, w_o = (a.to(work) for a in (x, w_router, w_q, w_k, w_v, w_o))
    rows = rows.reshape(math.prod(lead) * n, d_model)
    largest, chosen = (a[:, :top_k] for a in torch.sort(rows @ w_router, dim=-1, descending=True, stable=True))
    slots = {e: torch.nonzero(chosen.flatten() == e)[:, 0] for e in chosen.unique().tolist()}
    q = rows.new_zeros(len(rows) * top_k, w_q.shape[-1])
    for e, own in slots.items():                                    # slot s belongs to token s // top_k
        q = q.index_add(0, own, rows[own // top_k] @ w_q[e])
    q = q.view(math.prod(lead), n, top_k, w_q.shape[-1]).transpose(1, 2)
    k, v = ((rows @ w).view(math.prod(lead), 1, n, w.shape[1]) for w in (w_k, w_v))
    heads = attention_torch(q, k, v, causal=causal).transpose(1, 2).reshape(len(rows) * top_k, w_v.shape[1])
    heads, out = heads * largest.softmax(-1).reshape(-1, 1), torch.zeros_like(rows)
    for e, own in slots.items():
        out = out.index_add(0, own // top_k, heads[own] @ w_o[e])
    for a in (rows, w_router, w_q, w_k, w_v, w_o):                  # where nobody chose: gradient zero, not none
        out = out + a.flatten()[:0].sum()
    return cuda.like(out.view(x.shape), x)


def route(x, w_router, top_k):
    """The experts of each token and their gates, on tensors: (chosen int64, gates single), both (..., top_k).

    x (..., d_model), w_router (d_model, n_experts), arrays or tensors. Computed in double, so that nearly equal logits
    fall as in NumPy; of equal ones the first expert is taken. The gates are the softmax over the chosen logits.
    """
    device = cuda.on_device(x, w_router)[0].device
    x, w_router = (a.detach().to(device).double() if isinstance(a, torch.Tensor)
                   else torch.from_numpy(np.array(a, np.float64)).to(device) for a in (x, w_router))
    top, chosen = (x @ w_router).sort(dim=-1, descending=True, stable=True)
    return chosen[..., :top_k], torch.softmax(top[..., :top_k], -1).float()

def routed_slots(chosen, n_experts, rows=32):
    """Slots sorted by expert, and the tiles of a grouped product: (token, row, slot, tiles), integers (int32).

    chosen (batch, seq, top_k). A slot is a token with one of its experts, number token * top_k + choice; row is its row
    where choices are heads, (batch, top_k, seq). tiles (n_tiles, 3): expert, first and last + 1 of its slots in that
    order, at most `rows`.
    """
    batch, seq, top_k = chosen.shape
    flat = chosen.reshape(-1)
    slot = flat.argsort(stable=True)
    token, choice = slot // max(top_k, 1), slot % max(top_k, 1)
    row = (token // max(seq, 1) * top_k + choice) * seq + token % max(seq, 1)
    ends = flat.bincount(minlength=n_experts).cumsum(0).tolist()
    tiles = [(expert, first, min(first + rows, end)) for expert, (begin, end) in enumerate(zip([0, *ends], ends))
             for first in range(begin, end, rows)]
    tiles = torch.tensor(tiles, dtype=torch.int32, device=chosen.device).reshape(-1, 3)
    return token.int(), row.int(), slot.int(), tiles


@functools.cache
def experts_kernel():
    """The grouped product, compiled on first use."""
    return cuda.compile(GROUPED_MATMUL)

def experts_launch(x, w, source, target, gates, tiles):
    """What launches the grouped product on tensors: kernel, (grid, block), arguments. The seventh is the output.

    x (n_rows, inner), w (n_experts, inner, columns), source, target int32 (n_slots,), gates (n_slots,), tiles int32
    (n_tiles, 3). The output (n_slots, columns) has row target[s] = gates[s] x[source[s]] w[expert of s].
    """
    columns = w.shape[2]
    x, w, gates = cuda.on_device(x, w, gates)
    y = x.new_zeros(len(source), columns)
    launch = (len(tiles), -(-columns // 64)), (16, 16)
    return experts_kernel(), launch, (x, w, source, target, gates, tiles, y, x.shape[1], columns)

def experts_product(*arguments):
    """The output of experts_launch, computed."""
    kernel, launch, arguments = experts_launch(*arguments)
    if arguments[6].numel():
        kernel.fast[launch](*arguments)
    return arguments[6]

def experts_bytes(tiles, inner, columns):
    """Bytes that the grouped product asks for, exactly: (rows of x, weights, output). tiles (n_tiles, 3)."""
    slots = int((tiles[:, 2] - tiles[:, 1]).sum())
    return 4 * slots * inner * -(-columns // 64), 4 * len(tiles) * inner * columns, 4 * slots * columns


def mixture_attention_cuda(x, w_router, w_q, w_k, w_v, w_o, top_k, causal=False):
    """mixture_attention_numpy by CUDA kernels: slots sorted by expert, two grouped products, one attention.

    x (..., seq, d_model), w_router (d_model, n_experts), w_q (n_experts, d_model, d_head), w_k, w_v (d_model, d_head),
    w_o (n_experts, d_head, d_model); top_k from 1 to n_experts. NumPy arrays and CPU tensors run on the CPU, CUDA
    tensors on the GPU. Computed in single precision, the router in double. Returns (..., seq, d_model) in the kind and
    type of x. Not differentiable. d_head up to 384. Raises ValueError when shapes do not fit.
    Source: Zhang et al. 2022 (arXiv 2210.05144); grouped products: Tan et al. 2024 (arXiv 2403.08245).
    """
    check_mixture(x, w_router, w_q, w_k, w_v, w_o, top_k)
    (*lead, seq, d_model), d_head, n_experts = x.shape, w_q.shape[2], w_q.shape[0]
    batch = math.prod(lead)
    chosen, gates = route(x, w_router, top_k)
    rows, w_q, w_k, w_v, w_o = cuda.on_device(x, w_q, w_k, w_v, w_o)
    rows = rows.reshape(batch * seq, d_model)
    token, row, slot, tiles = routed_slots(chosen.reshape(batch, seq, top_k), n_experts)
    q = experts_product(rows, w_q, token, row, torch.ones_like(slot), tiles)
    k, v = (matmul_cuda(rows, w).reshape(batch, 1, seq, d_head) for w in (w_k, w_v))
    out = grouped_query_attention_cuda(q.reshape(batch, top_k, seq, d_head), k, v, causal=causal)
    gates = gates.reshape(-1)[slot.long()]
    out = experts_product(out.reshape(-1, d_head), w_o, row, slot, gates, tiles)
    return cuda.like(out.reshape(*x.shape[:-1], top_k, d_model).sum(-2), x)


def experts_process(rank, n_processes, folder, slots, expert, w, time_limit):
    """What one process runs: its part of the slots, with its part of the experts. Writes its rows to a file in `folder`."""
    torch.set_num_threads(1)
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:                                                    # gloo would look up the host's name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    distributed.init_process_group("gloo", store=distributed.FileStore(f"{folder}/store", n_processes), rank=rank,
                                   world_size=n_processes, timeout=datetime.timedelta(seconds=time_limit))
    own = (a.tensor_split(n_processes)[rank] for a in (slots, expert, w))
    torch.save(at_the_experts(*own), f"{folder}/{rank}.pt")
    distributed.barrier()                                           # nobody leaves while another still waits for a message
    distributed.destroy_process_group()

def experts_on_processes(slots, expert, w, n_processes, time_limit=120.0):
    """slots @ w[expert] by processes on this machine, each with a part of the slots and of the experts. (n_slots, columns).

    slots (n_slots, inner), expert integers (n_slots,), w (n_experts, inner, columns), n_experts a multiple of n_processes.
    Raises ValueError when it is not, and what torch.multiprocessing raises when a process fails.
    """
    if n_processes < 1 or len(w) % n_processes:
        raise ValueError(f"the number of experts must be a multiple of n_processes, got {len(w)} and {n_processes}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        multiprocessing.spawn(experts_process, (n_processes, folder, slots, expert, w, time_limit), n_processes)
        return torch.cat([torch.load(f"{folder}/{rank}.pt") for rank in range(n_processes)])
