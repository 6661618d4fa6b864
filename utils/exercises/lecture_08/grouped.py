"""Lecture 08: attention of query heads that share heads of keys and values, and a test of its step with a cache."""

import math
from functools import partial

import numpy as np

from utils.exercises.arrays import draw, kept_dtype, weights_of
from utils.judge.bug import bug
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "grouped_query"


@exercise("8A", MODULE, importance="essential")
def grouped_attention(q, k, v, causal=False):  # the oracle: one head and one query at a time
    lead = np.broadcast_shapes(q.shape[:-3], k.shape[:-3])
    n_heads, n_queries, d = q.shape[-3:]
    n_kv_heads, n_keys = k.shape[-3:-1]
    if n_kv_heads == 0 or n_heads % n_kv_heads:
        raise ValueError(f"n_heads must be a multiple of n_kv_heads, got {n_heads} and {n_kv_heads}")
    q, k, v = (np.broadcast_to(a, (*lead, *a.shape[-3:])) for a in (q, k, v))
    out = np.zeros(q.shape)
    for place in np.ndindex(*lead, n_heads, n_queries):
        *row, head, i = place
        theirs = (*row, head // (n_heads // n_kv_heads))
        scores = [math.fsum(map(float, q[place] * key)) / math.sqrt(d) for key in k[theirs]]
        allowed = [not causal or j <= i + n_keys - n_queries for j in range(n_keys)]
        out[place] = np.asarray(weights_of(scores, allowed)) @ v[theirs].astype(float)
    return out


@grouped_attention.property(
    "one head each: multi-head attention", hint="What do the scores divide by, and what do the weights sum over?"
)
def _(ask, rng):
    ask(np.round(draw(rng, 2, 2, 3)), np.round(draw(rng, 2, 2, 3)), np.round(draw(rng, 2, 2, 3)))
    ask(draw(rng, 3, 2, 4), draw(rng, 3, 5, 4), draw(rng, 3, 5, 4))


@grouped_attention.property(
    "one head for all: multi-query attention", hint="What is the size of a group when there is one key head?"
)
def _(ask, rng):
    ask(draw(rng, 3, 2, 4), draw(rng, 1, 5, 4), draw(rng, 1, 5, 4))


@grouped_attention.property(
    "neighbours share a key head", hint="Which two axes does the axis of heads become, and which one comes first?"
)
def _(ask, rng):
    ask(np.round(2 * draw(rng, 4, 1, 3)), np.round(2 * draw(rng, 2, 2, 3)), np.round(2 * draw(rng, 2, 2, 3)))
    ask(draw(rng, 6, 3, 4), draw(rng, 2, 5, 4), draw(rng, 2, 5, 4))
    ask(draw(rng, 9, 2, 4), draw(rng, 3, 40, 4), draw(rng, 3, 40, 4))


@grouped_attention.property(
    "any axes in front", hint="What stands for the axes in front in einsum, and in your reshape?"
)
def _(ask, rng):
    ask(draw(rng, 2, 4, 3, 4), draw(rng, 2, 2, 5, 4), draw(rng, 2, 2, 5, 4))
    ask(draw(rng, 2, 3, 4, 1, 4), draw(rng, 2, 3, 2, 5, 4), draw(rng, 2, 3, 2, 5, 4))
    ask(draw(rng, 1, 1, 1, 4), draw(rng, 1, 1, 1, 4), draw(rng, 1, 1, 1, 4))


@grouped_attention.property(
    "causal: nothing of the future, bottom-right aligned",
    hint="What does your causal_mask return for 2 queries and 4 keys?",
)
def _(ask, rng):
    ask(draw(rng, 4, 3, 2), draw(rng, 2, 3, 2), draw(rng, 2, 3, 2), causal=True)
    ask(draw(rng, 4, 2, 2), draw(rng, 2, 4, 2), draw(rng, 2, 4, 2), causal=True)
    ask(draw(rng, 4, 3, 2), draw(rng, 2, 2, 2), draw(rng, 2, 2, 2), causal=True)


@grouped_attention.property("scores of 1e4 do not overflow", hint="Which softmax of yours survives large scores?")
def _(ask, rng):
    ask(200 * draw(rng, 4, 2, 4), 50 * draw(rng, 2, 5, 4), draw(rng, 2, 5, 4))


@grouped_attention.property("the float type of q", hint="In which type are the scores and the scale?")
def _(ask, rng):
    q, k, v = draw(rng, 2, 4, 3, 4), draw(rng, 2, 2, 70, 4), draw(rng, 2, 2, 70, 4)
    kept_dtype(ask, np.float32, 3 * q, k, v, causal=True)
    kept_dtype(ask, np.float32, 3 * q, k=k, v=v)  # which stay in double


@grouped_attention.property(
    "all at once: causal, axes in front, one query, large scores",
    hint="Which two of these have you never tried together?",
)
def _(ask, rng):
    for n_queries in (1, 3):
        q, k = 200 * draw(rng, 2, 1, 4, n_queries, 4), 50 * draw(rng, 2, 1, 2, 5, 4)
        ask(q, k, draw(rng, 2, 1, 2, 5, 4), causal=True)
    q, k, v = (draw(rng, 2, 1, heads, n, 4).astype(np.float32) for heads, n in ((4, 1), (2, 5), (2, 5)))
    ask(q, k, v, causal=True)


@grouped_attention.property(
    "nothing as large as repeated keys is made",
    hint="Where do keys or values get n_heads heads? Which function repeats, tiles or copies them?",
)
def _(ask, rng):
    q, k, v = (draw(rng, heads, n, 64) for heads, n in ((32, 1), (2, 512), (2, 512)))
    made = ask.memory(q, k, v)
    if made > 4 * (k.nbytes + v.nbytes):  # repeated keys and values would be sixteen times as large
        raise Failed(f"{made:,} bytes were taken at once, where keys and values have {k.nbytes + v.nbytes:,}")


def place(q, n_kv_heads):
    return q.reshape(*q.shape[:-3], n_kv_heads, q.shape[-3] // n_kv_heads, *q.shape[-2:])


def dealt(q, n_kv_heads):
    """Every n_kv_heads-th head together, as with np.tile."""
    return place(q, q.shape[-3] // n_kv_heads).swapaxes(-4, -3)


def usual(q, k, v, causal=False, *, split=place, turned=lambda out: out, divisor=lambda q, k: math.sqrt(q.shape[-1]), axis=-1, shift=0,
          hide=lambda scores, seen: np.where(seen, scores, -np.inf), shown=lambda causal: causal, given=lambda k, v: (k, v)):  # fmt: skip
    """Grouped attention in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    k, v = given(k, v)
    scores = np.einsum("...hgid,...hjd->...hgij", split(q, k.shape[-3]), k) / divisor(q, k)
    if shown(causal):
        n_queries, n_keys = scores.shape[-2:]
        scores = hide(scores, np.tri(n_queries, n_keys, n_keys - n_queries + shift, dtype=bool))
    powers = np.exp(scores - np.maximum(scores.max(axis, keepdims=True), -1e300))
    total = powers.sum(axis, keepdims=True)
    out = np.einsum("...hgij,...hjd->...hgid", powers / np.where(total == 0, 1, total), v)
    return turned(out).reshape(q.shape).astype(q.dtype)


grouped_attention.mistakes_of(
    usual,
    {
        "Heads are dealt out like cards, as with tile: neighbours share, so h // group tells the key head.": [
            {"split": dealt, "turned": lambda out: out.swapaxes(-4, -3)},
            {"split": dealt},
        ],
        "The scores are not scaled: divide them by sqrt(d_head).": {"divisor": lambda q, k: 1.0},
        "The scores are divided by d_head, not by sqrt(d_head).": {"divisor": lambda q, k: q.shape[-1]},
        "The scores are divided by the square root of all columns of all heads: a dot product adds d_head numbers.": {
            "divisor": lambda q, k: math.sqrt(q.shape[-1] * q.shape[-3])
        },
        "The softmax runs over the queries: the row of one query has to sum to 1, over the keys.": {"axis": -2},
        "causal=True changes nothing.": {"shown": lambda causal: False},
        "The mask is there although causal is False.": {"shown": lambda causal: True},
        "With causal=True a query sees one key too many.": {"shift": 1},
        "With causal=True a query does not see its own key.": {"shift": -1},
        "A forbidden score becomes 0, and exp(0) is 1: it has to become -inf.": {
            "hide": lambda scores, seen: np.where(seen, scores, 0.0)
        },
        "A forbidden score becomes a large negative number: a query that sees no key then averages all; it has to be -inf.": [
            {"hide": lambda scores, seen: np.where(seen, scores, -1e9)},
            {"hide": lambda scores, seen: scores + np.where(seen, 0.0, -1e9)},
        ],
        "Every group gets the first head of the values.": {
            "given": lambda k, v: (k, np.repeat(v[..., :1, :, :], v.shape[-3], axis=-3))
        },
    },
)


@grouped_attention.mistake("The causal mask begins at the top left: the last query has to see all keys.")
def _(q, k, v, causal=False):
    return usual(q, k, v, causal, shift=q.shape[-2] - k.shape[-2])


# --- 8B --------------------------------------------------------------------------------------------------------------


def share(x, n_heads):
    return np.repeat(x, n_heads // len(x), axis=0)


def step(
    q,
    k_new,
    v_new,
    k_old,
    v_old,
    *,
    share_k=share,
    share_v=share,
    stored=None,
    scale=1.0,
    shift=0,
    late=False,
    front=False,
):
    """A step with a cache. The bugs are in what follows the `*`; as it stands, it is right."""
    both = (
        (lambda old, new: np.concatenate([new, old], axis=1))
        if front
        else (lambda old, new: np.concatenate([old, new], axis=1))
    )
    if stored:
        k_new, v_new = (stored(x, len(q)) for x in (k_new, v_new))
        k_old, v_old = (x if len(x) == len(q) else stored(x, len(q)) for x in (k_old, v_old))
    k, v = both(k_old, k_new), both(v_old, v_new)
    seen_k, seen_v = (k_old, v_old) if late and k_old.shape[1] else (k, v)
    keys, values = share_k(seen_k, len(q)), share_v(seen_v, len(q))
    scores = scale * q @ keys.swapaxes(1, 2) / math.sqrt(q.shape[-1])
    n_queries, n_keys = scores.shape[1:]
    scores = np.where(np.tri(n_queries, n_keys, k.shape[1] - n_queries + shift, dtype=bool), scores, -np.inf)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True) @ values, k, v


@bug("8B", MODULE, subject="step", importance="useful")
def test_step(step):
    rng = np.random.default_rng(4)
    q, k, v = 2 * rng.normal(size=(6, 8, 3)), rng.normal(size=(3, 8, 3)), rng.normal(size=(3, 8, 3))
    k_old = v_old = np.zeros((3, 0, 3))
    for begin, end in ((0, 5), (5, 6), (6, 8)):
        cut = slice(begin, end)
        out, k_old, v_old = step(q[:, cut], k[:, cut], v[:, cut], k_old, v_old)
        assert np.array_equal(k_old, k[:, :end]) and np.array_equal(v_old, v[:, :end])
        assert np.allclose(out, grouped_attention.oracle(q[:, cut], k[:, :end], v[:, :end], causal=True))


@test_step.right
def _(q, k_new, v_new, k_old, v_old):
    return step(q, k_new, v_new, k_old, v_old)


@test_step.right
def _(q, k_new, v_new, k_old, v_old):
    """The same through einsum, without a repeat."""
    k, v = np.append(k_old, k_new, axis=1), np.append(v_old, v_new, axis=1)
    return usual(q, k, v, causal=True), k, v


def tile(x, n_heads):
    return np.tile(x, (n_heads // len(x), 1, 1))


LOOK = "Which query heads does your test look at, and which key head does each of them need?"
for name, changes, hint in (
    ("cached after the repeat", {"stored": share}, "What shape should the cache have that comes back?"),
    ("keys and values dealt out, as by tile", {"share_k": tile, "share_v": tile}, LOOK),
    ("values alone dealt out", {"share_v": tile}, "Are the values of two heads different in your test?"),
    ("keys alone dealt out", {"share_k": tile}, "Do the keys of a head decide anything in your test?"),
    ("not scaled", {"scale": 2.0}, "Which number do you compare the output with?"),
    ("one future token seen", {"shift": 1}, "Has your test several new tokens at once?"),
    ("the new token is stored after the look", {"late": True}, "Has your test a cache that is not empty?"),
    ("new rows in front of the old ones", {"front": True}, "Feed the cache twice. Where do the new rows stand?"),
):
    test_step.mutant(name, hint)(partial(step, **changes))
