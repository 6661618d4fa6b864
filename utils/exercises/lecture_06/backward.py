"""Lecture 06: the gradient of flash attention, tile by tile, in PyTorch."""

import math

import numpy as np
import torch

from utils.exercises.arrays import INF, draw
from utils.exercises.lecture_06.forward import tiled_attention
from utils.exercises.lecture_06.rows import seen
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "flash"


# --- 6D --------------------------------------------------------------------------------------------------------------


@exercise("6D", MODULE, returns=("d_q", "d_k", "d_v"), formerly="6.5", importance="essential")
def tile_gradients(q, k, v, out, lse, d_out, causal=False, scale=None):  # the oracle: one query at a time
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    allowed = seen(q.shape[-2], k.shape[-2], causal)
    q, k, v, d_out = (a.double().numpy() for a in (q, k, v, d_out))
    d_q, d_k, d_v = (np.zeros(a.shape) for a in (q, k, v))
    for place in np.ndindex(*q.shape[:-1]):
        lead, i = place[:-1], place[-1]
        keys = np.flatnonzero(allowed[i])
        if not keys.size:
            continue
        own_k, own_v, gradient = k[lead][keys], v[lead][keys], d_out[place]
        s = scale * own_k @ q[place]
        p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
        d_s = (np.diag(p) - np.outer(p, p)) @ (own_v @ gradient)  # the Jacobian of the softmax, written out
        d_q[place] = scale * d_s @ own_k
        d_k[lead][keys] += scale * np.outer(d_s, q[place])
        d_v[lead][keys] += np.outer(p, gradient)
    return tuple(map(torch.from_numpy, (d_q, d_k, d_v)))


def backward_input(rng, *shape_q, n_keys, d_v=2, causal=False, scale=None, dtype=float):
    """Arguments of the backward pass: what the forward pass was given and what it returned, as tensors."""
    *lead, n_queries, d = shape_q
    q, k, v, d_out = (draw(rng, *lead, n, w) for n, w in ((n_queries, d), (n_keys, d), (n_keys, d_v), (n_queries, d_v)))
    out, lse = tiled_attention.oracle(q, k, v, causal, scale)
    return *(torch.from_numpy(a.astype(dtype)) for a in (q, k, v, out, lse, d_out)), causal, scale


@tile_gradients.property(
    "one tile: dQ, dK and dV", hint="Which of the products gives dV, which dP, and what is dS made of?"
)
def _(ask, rng):
    ask(*backward_input(rng, 2, 3, n_keys=3))


@tile_gradients.property(
    "several tiles add up, the last ones smaller",
    hint="Which gradients does another tile add to, and does yours leave that there?",
)
def _(ask, rng):
    ask(*backward_input(rng, 70, 2, n_keys=5))
    ask(*backward_input(rng, 5, 2, n_keys=130))
    ask(*backward_input(rng, 70, 2, n_keys=90))


@tile_gradients.property(
    "causal, in one tile and in several",
    hint="What becomes of a forbidden score before exp, and when is `allowed` None?",
)
def _(ask, rng):
    ask(*backward_input(rng, 4, 3, n_keys=4, causal=True))
    ask(*backward_input(rng, 70, 2, n_keys=90, causal=True))


@tile_gradients.property(
    "a row with nothing to attend to has no gradient, and no nan",
    hint="What is e to the minus infinity, and is lse as the given code made it?",
)
def _(ask, rng):
    ask(*backward_input(rng, 5, 3, n_keys=2, causal=True))


@tile_gradients.property(
    "a scale that is given is used", hint="Where does the scale stand in S, and where does it come back?"
)
def _(ask, rng):
    ask(*backward_input(rng, 3, 3, n_keys=4, scale=0.25))


@tile_gradients.property(
    "leading axes, and v wider than k",
    hint="Which axis does lse lack, so that it broadcasts over the columns of a tile?",
)
def _(ask, rng):
    ask(*backward_input(rng, 2, 3, 4, 2, n_keys=5, d_v=4, causal=True))


@tile_gradients.property(
    "float32 in, the same gradients to 1e-5", hint="Does anything that you make have a float type of its own?"
)
def _(ask, rng):
    for part in ask(*backward_input(rng, 3, 3, n_keys=4, dtype=np.float32)):
        if part.dtype != np.float32:
            raise Failed(f"returned {part.dtype}, expected float32 for tensors of float32")


@tile_gradients.property(
    "all at once: causal, a scale, leading axes, one of them 1, several tiles, empty rows, float32",
    hint="Which two of the options do not work together?",
)
def _(ask, rng):
    ask(*backward_input(rng, 2, 1, 70, 2, n_keys=68, d_v=3, causal=True, scale=0.4))
    ask(*backward_input(rng, 2, 1, 70, 2, n_keys=75, d_v=1, causal=True, scale=0.4, dtype=np.float32))
    ask(*backward_input(rng, 2, 3, 4, 1, n_keys=3, causal=True, scale=0.6, dtype=np.float32))


@tile_gradients.property(
    "tile by tile, never all scores at once", hint="Which of q, k, v and d_out are cut by rows, and which by columns?"
)
def _(ask, rng):
    n, m = 260, 270
    largest = ask.largest_exp(*backward_input(rng, n, 2, n_keys=m))
    if largest > n * m // 4:
        raise Failed(f"{largest:,} scores go through exp at once, of {n * m:,} in all")


def usual_backward(
    q,
    k,
    v,
    out,
    lse,
    d_out,
    causal=False,
    scale=None,
    *,
    masked=True,
    weights=lambda s, lse: torch.exp(s - lse.masked_fill(lse == -INF, INF)[..., None]),
    scored=lambda s, scale: s * scale,
    minus=lambda d_out, out, of_tile: (d_out * out).sum(-1, keepdim=True),
    scaled=lambda d_s, scale: d_s * scale,
    overwritten=(),
    block=64,
):
    """The backward pass in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right.

    overwritten: the gradients in which a tile overwrites what other tiles brought.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    d_q, d_k, d_v = (torch.zeros_like(a) for a in (q, k, v))
    allowed = torch.from_numpy(seen(q.shape[-2], k.shape[-2], causal and masked))
    visited = seen(q.shape[-2], k.shape[-2], causal)
    for j in range(0, k.shape[-2], block):
        for i in range(0, q.shape[-2], block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            if not visited[rows, columns].any():
                continue
            q_i, k_j, v_j, d_i = q[..., rows, :], k[..., columns, :], v[..., columns, :], d_out[..., rows, :]
            s = torch.where(allowed[rows, columns], scored(q_i @ k_j.mT, scale), -INF)
            p = weights(s, lse[..., rows])
            d_p = d_i @ v_j.mT
            big_d = minus(d_i, out[..., rows, :], (p * d_p).sum(-1, keepdim=True))
            d_s = scaled(p * (d_p - big_d), scale)
            for name, sums, place, part in (
                ("dQ", d_q, rows, d_s @ k_j),
                ("dK", d_k, columns, d_s.mT @ q_i),
                ("dV", d_v, columns, p.mT @ d_i),
            ):
                sums[..., place, :] = part + (0 if name in overwritten else sums[..., place, :])
    return d_q, d_k, d_v


tile_gradients.mistakes_of(
    usual_backward,
    {
        "Other tiles add to the same rows: use +=, not =.": {"overwritten": ("dQ", "dK", "dV")},
        "Each tile adds to dQ: use +=, not =.": {"overwritten": ("dQ",)},
        "Each tile adds to dK: use +=, not =.": {"overwritten": ("dK",)},
        "Each tile adds to dV: use +=, not =.": {"overwritten": ("dV",)},
        "The mask is missing: weights of the future are 0, so mask the scores before exp.": {"masked": False},
        "D is missing: dS = P * (dP - D).": {"minus": lambda d_out, out, of_tile: 0.0},
        "D is the sum over the row of dO * O, not of dO alone.": {
            "minus": lambda d_out, out, of_tile: d_out.sum(-1, keepdim=True)
        },
        "D belongs to the whole row, and this is the sum over one tile: it is rowsum(dO * O), given as D.": {
            "minus": lambda d_out, out, of_tile: of_tile
        },
        "The scale is missing in S: the weights are exp(scale * q k - lse).": {"scored": lambda s, scale: s},
        "The weights are those of one tile: a softmax of it sums to 1 in each. P = exp(S - lse).": {
            "weights": lambda s, lse: torch.softmax(s, -1).nan_to_num()
        },
        "The scale is missing in dQ and dK.": {"scaled": lambda d_s, scale: d_s},
        "The scale is applied twice: once is enough, in dS.": {"scaled": lambda d_s, scale: d_s * scale**2},
        "The weights are not finished: P = exp(S - lse).": {"weights": lambda s, lse: torch.exp(s)},
        "-inf minus -inf is nan: for an empty row subtract +inf, as the given code does.": {
            "weights": lambda s, lse: torch.exp(s - lse[..., None])
        },
    },
)
