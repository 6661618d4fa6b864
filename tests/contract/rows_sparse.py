"""The row of block-sparse attention (lecture 07)."""

import numpy as np

from attention import sparse
from tests.contract.triples import BAD_SHAPES, Triple, attention_inputs, changed, plain_attention


def block_inputs(rng, q=(2, 3, 5, 4), k=(2, 3, 7, 4), block_size=2, lead=(), **more):
    arguments = attention_inputs(rng, q, k, **more)
    there = rng.random((*lead, -(-q[-2] // block_size), -(-k[-2] // block_size))) < 0.6
    there[..., :1] = True  # every row has a block
    return arguments | {"block_mask": there, "block_size": block_size}


def plain_blocks(q, k, v, block_mask, block_size, causal=False, scale=None):
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    n, m = q.shape[-2], k.shape[-2]
    i, j = np.arange(n)[:, None] // block_size, np.arange(m) // block_size
    mask = np.broadcast_to(block_mask[..., i, j], (*lead, n, m)) if n and m else np.zeros((*lead, n, m), bool)
    return plain_attention(q, k, v, mask, causal, scale)[:1]


def absent_blocks(arguments):
    """Nan in keys and values whose blocks no row has."""
    new = changed(arguments, k=np.copy, v=np.copy, causal=False, block_mask=np.copy)
    new["block_mask"][..., 1] = False
    size = arguments["block_size"]
    for name in ("k", "v"):
        new[name][..., size : 2 * size, :] = np.nan
    return new


def all_blocks(call, rng):
    arguments = block_inputs(rng, causal=True)
    arguments["block_mask"][:] = True
    expected = plain_attention(*(arguments[name] for name in "qkv"), causal=True)[0]
    np.testing.assert_allclose(call(**arguments)[0], expected, atol=1e-5)


def one_large_block(call, rng):
    arguments = block_inputs(rng, block_size=100)
    expected = plain_attention(*(arguments[name] for name in "qkv"))[0]
    np.testing.assert_allclose(call(**arguments)[0], expected, atol=1e-5)


SPARSE = Triple(
    "block_sparse_attention",
    sparse.block_sparse_attention_numpy,
    sparse.block_sparse_attention_torch,
    sparse.block_sparse_attention_cuda,
    block_inputs,
    plain_blocks,
    {
        "no leading axes": dict(q=(5, 4), k=(7, 4)),
        "a mask for each head": dict(lead=(2, 3)),
        "a mask for the heads of all batches": dict(lead=(3,)),
        "causal": dict(causal=True),
        "causal, more queries than keys": dict(q=(2, 9, 4), k=(2, 4, 4), causal=True),
        "large blocks, ragged tails": dict(q=(2, 37, 8), k=(2, 70, 8), block_size=16, causal=True),
        "blocks of one": dict(block_size=1),
        "keys shared by the batch": dict(k=(1, 3, 7, 4)),
        "a scale": dict(scale=0.3),
        "a scale of 0": dict(scale=0.0),
    },
    {
        "no keys": dict(k=(2, 3, 0, 4)),
        "no queries": dict(q=(2, 3, 0, 4)),
        "no batch": dict(q=(0, 3, 5, 4), k=(0, 3, 7, 4)),
    },
    ("q", "k", "v"),
    ("q",),
    BAD_SHAPES
    | {
        "block_size must be a positive whole number": dict(block_size=0),
        "block_mask must be boolean with True = the block is there": dict(block_mask=np.ones((3, 4))),
        "block_mask must have the shape (3, 4)": dict(block_mask=np.ones((4, 3), bool)),
    },
    absent_blocks,
    lambda a: changed(a, block_mask=np.zeros_like),
    ("q", "k", "v"),
    {"with all blocks it is attention": all_blocks, "one block larger than all is attention": one_large_block},
)
