# Generated from solutions/13_beyond_text_and_memory.py by `python course.py build`. Edit that file, not this one.
"""Lecture 13 · Appendix: beyond text and memory: the finished code."""

import functools
import math

import numpy as np
import torch
from torch import nn

from attention.kv_cache import WARP
from attention.multi_head import masked_softmax, merge_heads, split_heads
from utils import cuda

__all__ = ["segment_softmax", "graph_attention", "SetBlock", "InducedSetAttention", "patchify", "memory_by_gradient"]


def segment_softmax(scores, target, n_nodes):
    """Softmax over the edges of each target: scores (n_edges, heads) to the same.

    target (n_edges,) in any order; an edge of -inf has the weight 0. NumPy.
    """
    top = np.full((n_nodes, *scores.shape[1:]), -np.inf, scores.dtype)
    np.maximum.at(top, target, scores)
    top[top == -np.inf] = 0
    powers = np.exp(scores - top[target])
    total = np.zeros_like(top)
    np.add.at(total, target, powers)
    return powers / np.where(total == 0, 1, total)[target]


def blend_edges(scores, features, source, target):
    """Each target's blend of its sources' features: ((n, d), weights (n_edges,))."""
    weights = segment_softmax(scores[:, None], target, len(features))
    out = np.zeros_like(features)
    np.add.at(out, target, weights * features[source])
    return out, weights[:, 0]

def graph_attention(h, source, target, w, a_target, a_source):
    """One GAT head in NumPy: (new features (n, d), weights (n_edges,))."""
    features = h @ w
    scores = (features @ a_target)[target] + (features @ a_source)[source]
    scores = np.where(scores > 0, scores, 0.2 * scores)
    return blend_edges(scores, features, source, target)


SEGMENT_SOFTMAX = WARP + r"""
__global__ void segment_softmax(const float* scores, const int* starts, float* weights,
                                int n_nodes) {
  int lane = threadIdx.x, node = blockIdx.x * blockDim.y + threadIdx.y;
  if (node >= n_nodes) return;                           // the whole warp leaves
  int first = starts[node], end = starts[node + 1];
  float maximum = -INFINITY, total = 0.0f;
  for (int e = first + lane; e < end; e += 32)           // load
    maximum = fmaxf(maximum, scores[e]);
  maximum = warp_max(maximum);
  for (int e = first + lane; e < end; e += 32)           // score
    total += expf(scores[e] - maximum);
  total = warp_sum(total);
  for (int e = first + lane; e < end; e += 32)           // write
    weights[e] = expf(scores[e] - maximum) / total;
}
"""


class SetBlock(nn.Module):
    """MAB: x (batch, n, d_model) asks y (batch, m, d_model). Without layer norms."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        for name in ("w_q", "w_k", "w_v", "w_o", "w_f"):
            first = torch.randn(d_model, d_model) / d_model**0.5
            setattr(self, name, nn.Parameter(first))

    def forward(self, x, y, mask=None):
        """mask (batch, m) boolean: which elements of y are there."""
        q, k, v = (split_heads(a @ w, self.n_heads)
                   for a, w in ((x, self.w_q), (y, self.w_k), (y, self.w_v)))
        seen = None if mask is None else mask[:, None, None]
        weights = masked_softmax(q @ k.mT / math.sqrt(q.shape[-1]), seen)
        h = x + merge_heads(weights @ v) @ self.w_o
        return h + torch.relu(h @ self.w_f)


class InducedWeights(nn.Module):
    """m inducing points, and two blocks."""

    def __init__(self, d_model, n_heads, m):
        super().__init__()
        self.points = nn.Parameter(torch.randn(m, d_model))
        self.gather, self.spread = (SetBlock(d_model, n_heads) for _ in range(2))


class InducedSetAttention(InducedWeights, nn.Module):
    """ISAB: set attention over m inducing points. Source: Lee et al. 2019."""

    def forward(self, x, mask=None):
        points = self.points.expand(len(x), -1, -1)
        out = self.spread(x, self.gather(points, x, mask))
        return out if mask is None else out * mask[..., None]


def test_pooling(pool):
    """Raise AssertionError unless pool(x, mask) is an invariant pooling."""
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((3, 7, 8)), np.ones((3, 7), bool)
    mask[1, 4:], mask[2, ::2] = False, False
    right, order = pool(x, mask), rng.permutation(7)
    same = {
        "order": pool(x[:, order], mask[:, order]),
        "padding's content": pool(np.where(mask[..., None], x, 50.0), mask),
        "more padding": pool(np.pad(x, ((0, 0), (0, 5), (0, 0)), constant_values=2.0),
                             np.pad(mask, ((0, 0), (0, 5)))),
        "alone": np.concatenate([pool(x[i:i + 1], mask[i:i + 1]) for i in range(3)]),
    }
    for name, found in same.items():
        assert np.abs(found - right).max() < 1e-4, name
    for i, j in zip(*np.nonzero(mask)):
        other = x.copy()
        other[i, j] += 1.0
        assert np.abs(pool(other, mask)[i] - right[i]).max() > 1e-4, "an element"


def patchify(images, side=2):
    """Squares of a picture, row by row: (batch, H, W) to (batch, patches, side²)."""
    rows, columns = images.shape[1] // side, images.shape[2] // side
    cut = images.reshape(len(images), rows, side, columns, side)
    return cut.swapaxes(2, 3).reshape(len(images), rows * columns, side * side)


def memory_by_gradient(q, k, v, rate, momentum=0.0, forget=0.0):
    """A linear memory that takes one gradient step for each token, in PyTorch.

    q, k (..., n, d), v (..., n, d_v). Returns out (..., n, d_v), memory (..., d, d_v).
    """
    memory = torch.zeros_like(k[..., :1, :].mT @ v[..., :1, :])
    step, out = torch.zeros_like(memory), []
    for i in range(k.shape[-2]):
        row = k[..., i:i + 1, :]
        surprise = row.mT @ (row @ memory - v[..., i:i + 1, :])
        step = momentum * step - rate * surprise
        memory = (1 - forget) * memory + step
        out.append(q[..., i:i + 1, :] @ memory)
    return torch.cat(out, dim=-2), memory


def address(memory, last, key, beta, gate, shift, gamma):
    """A head's weights (batch, N); memory (batch, N, M), shift (batch, 3): -1, 0, 1."""
    alike = nn.functional.cosine_similarity(memory, key[:, None], dim=-1)
    w = gate * torch.softmax(beta * alike, dim=-1) + (1 - gate) * last
    w = sum(shift[:, s + 1, None] * w.roll(s, dims=1) for s in (-1, 0, 1))
    w = (w + 1e-12) ** gamma
    return w / w.sum(dim=1, keepdim=True)


def graph_attention_v2(h, source, target, w_target, w_source, a):
    """One GATv2 head in NumPy: (new features (n, d), weights (n_edges,)).

    h (n, d_in); source, target (n_edges,), sorted by target; w_target, w_source (d_in, d); a (d,). Source: arXiv 2105.14491.
    """
    features = h @ w_source
    both = (h @ w_target)[target] + features[source]
    return blend_edges(np.where(both > 0, both, 0.2 * both) @ a, features, source, target)


@functools.cache
def segment_softmax_kernel():
    """The kernel, compiled on first use."""
    return cuda.compile(SEGMENT_SOFTMAX, name="segment_softmax")

def segment_softmax_launch(scores, target, n_nodes):
    """What launches the kernel: kernel, (grid, block, shared bytes), arguments. The third argument is the weights.

    scores (n_edges,), target (n_edges,) sorted, both NumPy. ValueError for targets that are not sorted.
    """
    if (np.diff(target) < 0).any():
        raise ValueError("target must be sorted: the kernel reads the edges of a node as one row")
    starts = np.searchsorted(target, np.arange(n_nodes + 1)).astype(np.int32)
    scores = cuda.on_device(scores)[0]
    starts, weights = torch.from_numpy(starts).to(scores.device), torch.zeros_like(scores)
    launch = max(1, -(-n_nodes // 4)), (32, 4), 0
    return segment_softmax_kernel(), launch, (scores, starts, weights, n_nodes)
