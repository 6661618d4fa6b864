"""The table of all mechanisms that are built three times: one row each, and what a row needs to be held to the contract.

A new lecture adds a row; test_triples.py holds it to every promise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from attention import flash, fundamentals, multi_head


@dataclass(frozen=True)
class Triple:
    """One mechanism. What it is called with are keyword arguments: arrays, numbers, None.

    inputs(rng, **case): arguments in float64 (masks boolean, lengths and tables int64); cases, empty: names and cases.
    reference(**arguments): the results as a tuple of float64 arrays, computed in another way.
    floats: the arguments that have the float type in question. results: for each result, the argument whose kind and
    type it has. unseen(arguments): a copy with nan where nobody may look. nothing(arguments): a copy in which nothing
    may be attended to, for all queries. bad: sentence -> what changes in the arguments, a value or a function of them.
    limits: property -> function(call, rng), which asserts; call(**arguments) gives a tuple of float64 arrays.
    """

    name: str
    numpy: Callable
    torch: Callable
    cuda: Callable
    inputs: Callable
    reference: Callable
    cases: dict
    empty: dict
    floats: tuple
    results: tuple
    bad: dict
    unseen: Callable | None = None
    nothing: Callable | None = None
    gradient: tuple = ()  # the arguments in which the torch version is differentiable
    limits: dict = field(default_factory=dict)


def normal(rng, *shape):
    return rng.standard_normal(shape)


def changed(arguments, **changes):
    """A copy of the arguments; a change that is a function is given the old value."""
    new = {name: change(arguments[name]) if callable(change) else change for name, change in changes.items()}
    return arguments | new


def plain_attention(q, k, v, mask=None, causal=False, scale=None):
    """Attention as sums over single keys, and the log-sum-exp of each row, in float64."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    n, m = q.shape[-2], k.shape[-2]
    q, k, v = (np.broadcast_to(np.asarray(a, float), (*lead, *a.shape[-2:])) for a in (q, k, v))
    allowed = np.broadcast_to(True if mask is None else mask, (*lead, n, m))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out, lse = np.zeros((*lead, n, v.shape[-1])), np.full((*lead, n), -np.inf)
    for at in np.ndindex(*lead, n):
        seen = [j for j in range(m) if allowed[at][j] and (not causal or j <= at[-1] + m - n)]
        scores = [scale * float(q[at] @ k[at[:-1]][j]) for j in seen]
        if seen and max(scores) > -math.inf:
            powers = [math.exp(score - max(scores)) for score in scores]
            out[at] = sum(p * v[at[:-1]][j] for p, j in zip(powers, seen, strict=True)) / math.fsum(powers)
            lse[at] = max(scores) + math.log(math.fsum(powers))
    return out, lse


def unseen_keys(arguments, keys=("k", "v")):
    """Without a causal mask the last key is forbidden to all queries, and holds nan."""
    mask = np.ones((arguments["q"].shape[-2], arguments["k"].shape[-2]), bool)
    mask[:, -1] = False
    new = changed(arguments, mask=mask, causal=False)
    for name in keys:
        new[name] = new[name].copy()
        new[name][..., -1, :] = np.nan
    return new


# ---- 01 and 06: attention, whole and in tiles -----------------------------------------------------------------------


def attention_inputs(rng, q=(2, 3, 5, 4), k=(2, 3, 7, 4), d_v=6, v=None, mask=None, **more):
    v = v or (*k[:-1], d_v)
    drawn = {"q": normal(rng, *q), "k": normal(rng, *k), "v": normal(rng, *v)}
    return drawn | ({} if mask is None else {"mask": rng.random(mask) < 0.6}) | more


LEADING = {
    "no leading axes": dict(q=(5, 4), k=(7, 4)),
    "one query, one key": dict(q=(1, 4), k=(1, 4)),
    "ragged tails": dict(q=(2, 19, 7), k=(2, 35, 7), d_v=3),
    "a causal mask, fewer queries than keys": dict(causal=True),
    "a causal mask, more queries than keys": dict(q=(2, 9, 4), k=(2, 4, 4), causal=True),
    "keys shared by the batch": dict(q=(3, 5, 4), k=(1, 7, 4), v=(7, 2)),
    "queries shared by the batch": dict(q=(5, 4), k=(3, 7, 4)),
    "values bring the batch": dict(q=(5, 4), k=(7, 4), v=(3, 7, 2)),
    "a scale": dict(scale=0.3),
    "a scale of 0": dict(scale=0.0),
    "d_head of 1": dict(q=(2, 5, 1), k=(2, 7, 1)),
}
NOTHING_THERE = {
    "no keys": dict(q=(2, 3, 4), k=(2, 0, 4)),
    "no keys, and k brings the batch": dict(q=(1, 2, 3), k=(5, 0, 3), d_v=4),
    "no queries": dict(q=(2, 0, 4), k=(2, 7, 4)),
    "no batch": dict(q=(0, 3, 4), k=(0, 7, 4)),
    "no batch, brought by k": dict(q=(1, 3, 4), k=(0, 7, 4)),
    "values without columns": dict(q=(3, 4), k=(7, 4), v=(7, 0)),
    "nothing at all": dict(q=(0, 4), k=(0, 4)),
}
BAD_SHAPES = {
    "q and k must have the same d_head, got 4 and 3": dict(k=lambda k: k[..., :3]),
    "q and k must have a d_head of at least 1": dict(q=lambda q: q[..., :0], k=lambda k: k[..., :0]),
    "k and v must have the same n_keys, got 7 and 6": dict(v=lambda v: v[..., :6, :]),
    "q must have at least two axes": dict(q=lambda q: q[0, 0, 0]),
    "the leading axes of q, k and v must broadcast": dict(k=lambda k: k[:, :2]),
    "q must hold real numbers": dict(q=lambda q: q + 1j),
    "v must hold real numbers": dict(v=lambda v: v > 0),
}


def one_key(call, rng):
    arguments = attention_inputs(rng, q=(3, 4), k=(1, 4))
    np.testing.assert_allclose(call(**arguments)[0], np.broadcast_to(arguments["v"], (3, 6)), rtol=1e-6)


def scale_of_zero(call, rng):
    arguments = attention_inputs(rng, scale=0.0)
    mean = arguments["v"].mean(-2, keepdims=True)
    np.testing.assert_allclose(call(**arguments)[0], np.broadcast_to(mean, (2, 3, 5, 6)), atol=1e-6)


def order_of_keys(call, rng):
    arguments, order = attention_inputs(rng), rng.permutation(7)
    other = changed(arguments, k=lambda k: k[..., order, :], v=lambda v: v[..., order, :])
    np.testing.assert_allclose(call(**other)[0], call(**arguments)[0], atol=1e-6)


LIMITS = {
    "one key gives its value": one_key,
    "a scale of 0 gives the mean": scale_of_zero,
    "the order of keys does not matter": order_of_keys,
}

ATTENTION = Triple(
    "attention",
    fundamentals.attention_numpy,
    fundamentals.attention_torch,
    fundamentals.attention_cuda,
    attention_inputs,
    lambda **a: plain_attention(**a)[:1],
    LEADING
    | {
        "a mask": dict(mask=(2, 3, 5, 7)),
        "a mask for keys": dict(mask=(2, 1, 1, 7)),
        "a mask without leading axes": dict(mask=(5, 7)),
        "a mask brings the batch of k": dict(q=(2, 4), k=(3, 5, 4), mask=(3, 1, 5)),
        "a mask brings the batch of v": dict(q=(2, 4), k=(5, 4), v=(3, 5, 2), mask=(3, 2, 5)),
        "a mask and a causal one": dict(mask=(5, 7), causal=True),
    },
    NOTHING_THERE,
    ("q", "k", "v"),
    ("q",),
    BAD_SHAPES
    | {
        "mask must be boolean with True = may attend": dict(mask=np.zeros((5, 7))),
        "mask must broadcast to": dict(mask=np.ones((7, 5), bool)),
    },
    unseen_keys,
    lambda a: changed(a, mask=np.zeros((5, 7), bool)),
    ("q", "k", "v"),
    LIMITS,
)


def in_blocks(sizes):
    def same(call, rng):
        arguments = attention_inputs(rng, causal=True)
        expected = plain_attention(**arguments)
        for result, exact in zip(call(**arguments, **sizes), expected, strict=True):
            np.testing.assert_allclose(result, exact, atol=1e-5)

    return same


def nan_behind_the_diagonal(call, rng):
    arguments = attention_inputs(rng, q=(9, 4), k=(9, 4), causal=True)
    expected = call(**arguments)[0]
    arguments["v"][5] = np.nan
    for block in (1, 2, 3, 4, 64):
        out = call(**arguments, block_q=block, block_k=block)[0]
        np.testing.assert_allclose(out[:5], expected[:5], atol=1e-5)
        assert np.isnan(out[5:]).all()


FLASH = Triple(
    "flash_attention",
    flash.flash_attention_numpy,
    flash.flash_attention_torch,
    flash.flash_attention_cuda,
    attention_inputs,
    plain_attention,
    LEADING
    | {
        "small blocks": dict(causal=True, block_q=2, block_k=3),
        "small blocks, more queries than keys": dict(q=(2, 9, 4), k=(2, 4, 4), causal=True, block_q=2, block_k=3),
    },
    NOTHING_THERE,
    ("q", "k", "v"),
    ("q", None),
    BAD_SHAPES | {"block_q must be a positive whole number": dict(block_q=0)},
    None,
    lambda a: changed(a, k=lambda k: k[..., :0, :], v=lambda v: v[..., :0, :]),
    ("q", "k", "v"),
    LIMITS
    | {f"blocks of {b}": in_blocks(dict(block_q=b, block_k=c)) for b, c in ((1, 1), (3, 2), (64, 16))}
    | {"nan behind the diagonal, whatever the block size": nan_behind_the_diagonal},
)


def backward_inputs(rng, q=(2, 3, 5, 4), k=(2, 3, 7, 4), d_v=6, **more):
    arguments = attention_inputs(rng, q, k, d_v, **more)
    out, lse = plain_attention(**arguments)
    return arguments | {"out": out, "lse": lse, "d_out": normal(rng, *out.shape)}


def plain_backward(q, k, v, out, lse, d_out, causal=False, scale=None):
    """Gradients by autograd through PyTorch's own attention, row by row without those that see nothing."""
    tensors = [torch.tensor(np.asarray(a, float), requires_grad=True) for a in (q, k, v)]
    n, m = q.shape[-2], k.shape[-2]
    allowed = torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else torch.ones(n, m, dtype=torch.bool)
    seeing = allowed.any(-1)
    result = torch.nn.functional.scaled_dot_product_attention(
        tensors[0][..., seeing, :], *tensors[1:], attn_mask=allowed[seeing], scale=scale
    )
    if not result.numel() or m == 0:
        return tuple(np.zeros(a.shape) for a in (q, k, v))
    gradient = torch.tensor(np.asarray(d_out, float))[..., seeing, :]
    return tuple(g.numpy() for g in torch.autograd.grad(result, tensors, gradient))


BACKWARD = Triple(
    "flash_attention_backward",
    flash.flash_attention_backward_numpy,
    flash.flash_attention_backward_torch,
    flash.flash_attention_backward_cuda,
    backward_inputs,
    plain_backward,
    {name: case for name, case in LEADING.items() if "shared" not in name and "bring" not in name},
    {name: case for name, case in NOTHING_THERE.items() if "brought" not in name and "brings" not in name},
    ("q", "k", "v", "out", "lse", "d_out"),
    ("q", "k", "v"),
    {
        "k must have the shape": dict(k=lambda k: k[:1], v=lambda v: v[:1]),
        "d_out must have the shape": dict(d_out=lambda d: d[..., :2]),
        "lse must have the shape": dict(lse=lambda x: x[..., :2]),
        "out must hold real numbers": dict(out=lambda x: x > 0),
        "q and k must have the same d_head, got 4 and 3": dict(k=lambda k: k[..., :3]),
    },
)

# ---- 02: multi-head attention ---------------------------------------------------------------------------------------


def multi_head_inputs(rng, x_q=(2, 5, 8), x_kv=(2, 7, 8), heads=2, mask=None, **more):
    weights = {name: normal(rng, 8, 8) / 2 for name in ("w_q", "w_k", "w_v", "w_o")}
    drawn = {"x_q": normal(rng, *x_q), "x_kv": normal(rng, *x_kv)} | weights | {"n_heads": heads}
    return drawn | ({} if mask is None else {"mask": rng.random(mask) < 0.6}) | more


def plain_multi_head(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    """One head after another: a head is some columns of the projections and some rows of w_o."""
    lead = np.broadcast_shapes(x_q.shape[:-2], x_kv.shape[:-2])
    total, width, width_v = np.zeros((*lead, x_q.shape[-2], w_o.shape[1])), len(w_q.T) // n_heads, len(w_v.T) // n_heads
    for head in range(n_heads):
        own, own_v = slice(head * width, (head + 1) * width), slice(head * width_v, (head + 1) * width_v)
        allowed = mask if mask is None or mask.ndim < 3 or mask.shape[-3] == 1 else mask[..., head : head + 1, :, :]
        allowed = allowed[..., 0, :, :] if allowed is not None and allowed.ndim > 2 else allowed
        q, k, v = x_q @ w_q[:, own], x_kv @ w_k[:, own], x_kv @ w_v[:, own_v]
        total += plain_attention(q, k, v, allowed, causal)[0] @ w_o[own_v]
    return (total,)


def multi_head_unseen(arguments):
    mask = np.ones((5, 7), bool)
    mask[:, -1] = False
    x_kv = arguments["x_kv"].copy()
    x_kv[..., -1, :] = np.nan
    return changed(arguments, x_kv=x_kv, mask=mask)


def one_head(call, rng):
    arguments = multi_head_inputs(rng, heads=1)
    x, y = arguments["x_q"], arguments["x_kv"]
    q, k, v = x @ arguments["w_q"], y @ arguments["w_k"], y @ arguments["w_v"]
    expected = plain_attention(q, k, v)[0] @ arguments["w_o"]
    np.testing.assert_allclose(call(**arguments)[0], expected, atol=1e-5 * np.abs(expected).max())


MULTI_HEAD = Triple(
    "multi_head_attention",
    multi_head.multi_head_attention_numpy,
    multi_head.multi_head_attention_torch,
    multi_head.multi_head_attention_cuda,
    multi_head_inputs,
    plain_multi_head,
    {
        "no leading axes": dict(x_q=(5, 8), x_kv=(7, 8)),
        "four heads, ragged tails": dict(x_q=(2, 19, 8), x_kv=(2, 35, 8), heads=4),
        "causal": dict(causal=True),
        "causal, more queries than keys": dict(x_q=(2, 9, 8), x_kv=(2, 4, 8), causal=True),
        "keys shared by the batch": dict(x_kv=(1, 7, 8)),
        "queries shared by the batch": dict(x_q=(5, 8)),
        "a mask for each head": dict(mask=(2, 2, 5, 7)),
        "a mask for keys": dict(mask=(2, 1, 1, 7)),
        "a mask without leading axes": dict(mask=(5, 7), causal=True),
    },
    {
        "no keys": dict(x_kv=(2, 0, 8)),
        "no queries": dict(x_q=(2, 0, 8)),
        "no batch": dict(x_q=(0, 5, 8), x_kv=(0, 7, 8)),
        "no keys, and x_kv brings the batch": dict(x_q=(1, 5, 8), x_kv=(3, 0, 8)),
    },
    ("x_q", "x_kv", "w_q", "w_k", "w_v", "w_o"),
    ("x_q",),
    {
        "n_heads must divide the columns of w_q and w_v": dict(n_heads=3),
        "w_k must have shape": dict(w_k=lambda w: w[:3]),
        "x_q must have at least two axes": dict(x_q=lambda x: x[0, 0]),
        "the leading axes of x_q and x_kv must broadcast": dict(x_kv=lambda x: np.concatenate([x, x[:1]])),
        "w_o must hold real numbers": dict(w_o=lambda w: w > 0),
        "mask must be boolean with True = may attend": dict(mask=np.zeros((5, 7))),
        "mask must broadcast to": dict(mask=np.ones((7, 5), bool)),
    },
    multi_head_unseen,
    lambda a: changed(a, mask=np.zeros((5, 7), bool)),
    ("x_q", "x_kv"),  # and in the weights, but a product with a token of nan makes the gradient of its weights nan
    {"one head is attention between projections": one_head},
)
