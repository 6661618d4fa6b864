"""The rows of lectures 03 to 05, and the whole table."""

import math

import numpy as np

from attention import kv_cache, long_context, rotary
from tests.contract.grouped import GROUPED
from tests.contract.rows_differential import DIFFERENTIAL
from tests.contract.rows_latent import LATENT
from tests.contract.rows_linear import LINEAR, SCAN
from tests.contract.rows_mixture import MIXTURE
from tests.contract.rows_sparse import SPARSE
from tests.contract.triples import (
    ATTENTION,
    BACKWARD,
    FLASH,
    MULTI_HEAD,
    Triple,
    changed,
    normal,
    plain_attention,
)

# ---- 03: rotary positions -------------------------------------------------------------------------------------------


def rope_inputs(rng, x=(2, 3, 5, 8), positions=(5,), pairs=4, **more):
    frequencies = 10.0 ** -np.arange(pairs)
    return {"x": normal(rng, *x), "positions": rng.integers(-50, 50, positions), "frequencies": frequencies} | more


def plain_rope(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    """Pairs as complex numbers."""
    n, out = len(frequencies), np.array(x, float)
    angles = np.asarray(positions, float)[..., None] * frequencies
    if positions.ndim == 2:
        angles = angles.reshape(len(x), *[1] * (x.ndim - 3), *angles.shape[1:])
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(0, n), slice(n, 2 * n))
    turned = (out[..., first] + 1j * out[..., second]) * np.exp(1j * angles) * attention_scale
    out[..., first], out[..., second] = turned.real, turned.imag
    return (out,)


def position_zero(call, rng):
    arguments = changed(rope_inputs(rng), positions=np.zeros(5, int))
    np.testing.assert_allclose(call(**arguments)[0], arguments["x"], rtol=1e-6)


ROPE = Triple(
    "apply_rope",
    rotary.apply_rope_numpy,
    rotary.apply_rope_torch,
    rotary.apply_rope_cuda,
    rope_inputs,
    plain_rope,
    {
        "no leading axes": dict(x=(5, 8)),
        "interleaved": dict(interleaved=True),
        "part of the columns": dict(pairs=3),
        "no pairs": dict(pairs=0),
        "positions of each text": dict(positions=(2, 5)),
        "positions of each text, no heads": dict(x=(2, 5, 8), positions=(2, 5)),
        "positions of each text, two axes of heads": dict(x=(2, 3, 2, 5, 8), positions=(2, 5)),
        "a factor": dict(attention_scale=1.3),
        "odd sizes": dict(x=(3, 1, 17, 7), positions=(3, 17), pairs=3, interleaved=True),
    },
    {
        "no tokens": dict(x=(2, 0, 8), positions=(0,)),
        "no batch": dict(x=(0, 5, 8)),
        "no batch with positions of its own": dict(x=(0, 3, 5, 8), positions=(0, 5)),
    },
    ("x",),
    ("x",),
    {
        "x must have at least two axes": dict(x=lambda x: x[0, 0, 0]),
        "positions must have shape": dict(positions=np.arange(4)),
        "frequencies must be one for each pair": dict(frequencies=np.ones(5)),
        "x must hold real numbers": dict(x=lambda x: x > 0),
        "positions must hold real numbers": dict(positions=np.ones(5, bool)),
    },
    gradient=("x",),
    limits={"position 0 changes nothing": position_zero},
)

# ---- 04: the memory-bound and the compute-bound kernel --------------------------------------------------------------


def plain_softmax(x):
    out = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:-1]):
        top = max(x[at], default=-math.inf)
        if top > -math.inf:
            powers = [math.exp(float(number) - float(top)) for number in x[at]]
            out[at] = np.array(powers) / math.fsum(powers)
    return (out,)


def rows_with_infinity(call, rng):
    x = normal(rng, 3, 40)
    x[0, 3:], x[1] = -np.inf, -np.inf
    np.testing.assert_allclose(call(x=x)[0], plain_softmax(x)[0], atol=1e-6)


SOFTMAX = Triple(
    "softmax_rows",
    long_context.softmax_rows_numpy,
    long_context.softmax_rows_torch,
    long_context.softmax_rows_cuda,
    lambda rng, x=(2, 3, 37): {"x": normal(rng, *x)},
    plain_softmax,
    {
        "one row": dict(x=(300,)),
        "one column": dict(x=(5, 1)),
        "a long row": dict(x=(1, 12_345)),
        "a row longer than shared memory": dict(x=(1, 60_000)),
    },
    {"no columns": dict(x=(3, 0)), "no rows": dict(x=(0, 5))},
    ("x",),
    ("x",),
    {"x must have at least one axis": dict(x=np.array(1.0)), "x must hold real numbers": dict(x=lambda x: x > 0)},
    nothing=lambda a: changed(a, x=lambda x: np.full_like(x, -np.inf)),
    gradient=("x",),
    limits={"-inf gets no weight, a row of it is 0": rows_with_infinity},
)


def unit_matrix(call, rng):
    a = normal(rng, 5, 7)
    np.testing.assert_allclose(call(a=a, b=np.eye(7))[0], a, rtol=1e-6)


MATMUL = Triple(
    "matmul",
    long_context.matmul_numpy,
    long_context.matmul_torch,
    long_context.matmul_cuda,
    lambda rng, a=(2, 5, 7), b=(2, 7, 3): {"a": normal(rng, *a), "b": normal(rng, *b)},
    lambda a, b: (np.einsum("...ik,...kj->...ij", np.asarray(a, float), np.asarray(b, float)),),
    {
        "no leading axes": dict(a=(5, 7), b=(7, 3)),
        "ragged tails": dict(a=(67, 19), b=(19, 65)),
        "one more than a tile": dict(a=(65, 17), b=(17, 129)),
        "leading axes broadcast": dict(a=(2, 1, 5, 7), b=(3, 7, 3)),
        "rows and columns of 1": dict(a=(1, 7), b=(7, 1)),
    },
    {
        "no inner axis": dict(a=(5, 0), b=(0, 3)),
        "no rows": dict(a=(0, 7), b=(7, 3)),
        "no columns": dict(a=(5, 7), b=(7, 0)),
        "no batch": dict(a=(0, 5, 7), b=(7, 3)),
    },
    ("a", "b"),
    ("a",),
    {
        "a must have as many columns as b has rows": dict(b=lambda b: b[:, :4]),
        "b must have at least two axes": dict(b=lambda b: b[0, 0]),
        "the leading axes of a and b must broadcast": dict(b=lambda b: np.concatenate([b, b[:1]])),
        "a must hold real numbers": dict(a=lambda a: a + 1j),
    },
    gradient=("a", "b"),
    limits={"the unit matrix changes nothing": unit_matrix},
)

# ---- 05: one query and a cache --------------------------------------------------------------------------------------


def decode_inputs(rng, batch=3, heads=2, capacity=9, d=4, lengths=(9, 4, 0), **more):
    cache = (batch, heads, capacity, d)
    drawn = {"q": normal(rng, batch, heads, d), "k_cache": normal(rng, *cache), "v_cache": normal(rng, *cache)}
    return drawn | {"lengths": np.array(lengths, np.int64)} | more


def plain_decode(q, k_cache, v_cache, lengths, scale=None):
    out = np.zeros(q.shape)
    for row, length in enumerate(lengths):
        k, v = (cache[row, :, :length] for cache in (k_cache, v_cache))
        out[row] = plain_attention(q[row][:, None], k, v, scale=scale)[0][:, 0]
    return (out,)


def behind_the_lengths(arguments):
    new = changed(arguments, k_cache=np.copy, v_cache=np.copy)
    for row, length in enumerate(arguments["lengths"]):
        new["k_cache"][row, :, length:] = new["v_cache"][row, :, length:] = np.nan
    return new


def decode_is_attention(call, rng):
    arguments = decode_inputs(rng, lengths=(9, 9, 9))
    expected = plain_attention(arguments["q"][:, :, None], arguments["k_cache"], arguments["v_cache"])[0][:, :, 0]
    np.testing.assert_allclose(call(**arguments)[0], expected, atol=1e-5)


BAD_LENGTHS = {
    "q must be (batch, heads, d_head)": dict(q=lambda q: q[0]),
    "lengths must be integers, got float64": dict(lengths=lambda x: x + 0.5),
    "lengths must be (3,), one for each row of q": dict(lengths=lambda x: x[:2]),
    "lengths must lie between 0 and": dict(lengths=lambda x: x - 1),
    "q must hold real numbers": dict(q=lambda q: q > 0),
}

DECODE = Triple(
    "decode_attention",
    kv_cache.decode_attention_numpy,
    kv_cache.decode_attention_torch,
    kv_cache.decode_attention_cuda,
    decode_inputs,
    plain_decode,
    {
        "lengths of 9, 4 and 0": {},
        "one head, one key": dict(batch=1, heads=1, capacity=1, lengths=(1,)),
        "more than one split": dict(batch=2, capacity=300, d=5, lengths=(300, 129)),
        "a scale": dict(scale=0.3),
        "a scale of 0": dict(scale=0.0),
    },
    {
        "no room": dict(capacity=0, lengths=(0, 0, 0)),
        "no rows": dict(batch=0, lengths=()),
        "no heads": dict(heads=0),
    },
    ("q", "k_cache", "v_cache"),
    ("q",),
    BAD_LENGTHS
    | {
        "keys and values must have one shape": dict(v_cache=lambda v: v[:, :, :5]),
        "keys and values must be (batch, heads, capacity, d_head)": dict(
            k_cache=lambda k: k[:2], v_cache=lambda v: v[:2]
        ),
        "values must hold real numbers": dict(v_cache=lambda v: v > 0),
    },
    behind_the_lengths,
    lambda a: changed(a, lengths=np.zeros(3, np.int64)),
    ("q", "k_cache", "v_cache"),
    {"with full lengths it is attention": decode_is_attention},
)


def paged_inputs(rng, n_pages=7, page_size=4, heads=2, d=4, lengths=(9, 4, 0), batch=3, columns=3, **more):
    pages = (n_pages, page_size, heads, d)
    table = rng.permutation(n_pages * columns)[: batch * columns].reshape(batch, columns) % max(n_pages, 1)
    for row, length in enumerate(lengths):
        table[row, -(-length // page_size) :] = -1
    drawn = {"q": normal(rng, batch, heads, d), "k_pages": normal(rng, *pages), "v_pages": normal(rng, *pages)}
    return drawn | {"block_table": table.astype(np.int64), "lengths": np.array(lengths, np.int64)} | more


def token(pages, table, row, j):
    return pages[table[row, j // pages.shape[1]], j % pages.shape[1]]


def plain_paged(q, k_pages, v_pages, block_table, lengths, scale=None):
    out = np.zeros(q.shape)
    for row, length in enumerate(lengths):
        if length:
            k, v = (np.stack([token(p, block_table, row, j) for j in range(length)], 1) for p in (k_pages, v_pages))
            out[row] = plain_attention(q[row][:, None], k, v, scale=scale)[0][:, 0]
    return (out,)


def pages_not_read(arguments):
    """Nan in every slot that no row reads."""
    read = np.zeros(arguments["k_pages"].shape[:2], bool)
    for row, length in enumerate(arguments["lengths"]):
        for j in range(length):
            read[arguments["block_table"][row, j // read.shape[1]], j % read.shape[1]] = True
    nan = {name: np.where(read[:, :, None, None], arguments[name], np.nan) for name in ("k_pages", "v_pages")}
    return arguments | nan


def paged_is_contiguous(call, rng):
    arguments = paged_inputs(rng, lengths=(12, 7, 1))
    rows = [arguments[name][np.maximum(arguments["block_table"], 0)] for name in ("k_pages", "v_pages")]
    caches = [r.reshape(3, 12, 2, 4).swapaxes(1, 2) for r in rows]
    expected = plain_decode(arguments["q"], *caches, arguments["lengths"])[0]
    np.testing.assert_allclose(call(**arguments)[0], expected, atol=1e-5)


PAGED = Triple(
    "paged_decode_attention",
    kv_cache.paged_decode_attention_numpy,
    kv_cache.paged_decode_attention_torch,
    kv_cache.paged_decode_attention_cuda,
    paged_inputs,
    plain_paged,
    {
        "lengths of 9, 4 and 0": {},
        "pages of one token": dict(page_size=1, columns=9, n_pages=30, lengths=(9, 4, 1)),
        "more than one split": dict(page_size=64, columns=5, lengths=(300, 129, 64)),
        "a scale": dict(scale=0.3),
    },
    {
        "no rows": dict(batch=0, lengths=()),
        "no columns": dict(columns=0, lengths=(0, 0, 0)),
        "no heads": dict(heads=0),
    },
    ("q", "k_pages", "v_pages"),
    ("q",),
    BAD_LENGTHS
    | {
        "block_table must be (3, columns)": dict(block_table=lambda t: t[:2]),
        "block_table must name pages 0 to 6": dict(block_table=lambda t: t + 7),
        "block_table must be integers, got float64": dict(block_table=lambda t: t + 0.5),
        "keys and values must have one shape": dict(v_pages=lambda v: v[:5]),
        "pages must be (n_pages, page_size, heads, d_head)": dict(k_pages=lambda k: k[0], v_pages=lambda v: v[0]),
    },
    pages_not_read,
    lambda a: changed(a, lengths=np.zeros(3, np.int64)),
    ("q", "k_pages", "v_pages"),
    {"paged is contiguous": paged_is_contiguous},
)

# ---- 07: attention within blocks ------------------------------------------------------------------------------------


TRIPLES = (
    ATTENTION,
    MULTI_HEAD,
    ROPE,
    SOFTMAX,
    MATMUL,
    DECODE,
    PAGED,
    FLASH,
    BACKWARD,
    SPARSE,
    GROUPED,
    LATENT,
    LINEAR,
    SCAN,
    DIFFERENTIAL,
    MIXTURE,
)
