"""Lecture 05: a step with a cache, and its operations. The oracles go one token at a time."""

import math

import numpy as np

from utils.exercises.arrays import draw
from utils.judge.function import exercise

MODULE = "kv_cache"


# --- 5.1 -------------------------------------------------------------------------------------------------------------


def weighted(query, keys, values, scale):
    """One query's softmax-weighted sum of values, over all given keys."""
    scores = [scale * math.fsum(float(a) * float(b) for a, b in zip(query, key)) for key in keys]
    powers = [math.exp(score - max(scores)) for score in scores]
    return [math.fsum(p * float(v) for p, v in zip(powers, column)) / math.fsum(powers) for column in values.T]


def step_with(x, keys, values, w_q, w_k, w_v, *, sees=lambda i, n_old: n_old + i + 1, scale=None):
    """One step in loops; new token i sees the first sees(i, n_old) keys. As it stands, it is right."""
    n_old, scale = len(keys), 1 / math.sqrt(w_q.shape[1]) if scale is None else scale
    keys, values = np.concatenate([keys, x @ w_k]), np.concatenate([values, x @ w_v])
    out = np.zeros((len(x), w_v.shape[1]))
    for i, token in enumerate(x):
        seen = sees(i, n_old)
        out[i] = weighted(token @ w_q, keys[:seen], values[:seen], scale) if seen else 0.0
    return out, keys, values


@exercise("5.1", MODULE, returns=("out", "keys", "values"))
def cached_step(x, keys, values, w_q, w_k, w_v):
    return step_with(x, keys, values, w_q, w_k, w_v)


def step_input(rng, n_new, n_old, d_model=3, d_head=2, d_v=4):
    shapes = ((n_new, d_model), (n_old, d_head), (n_old, d_v), (d_model, d_head), (d_model, d_head), (d_model, d_v))
    return [draw(rng, *shape) for shape in shapes]


@cached_step.property("an empty cache: plain causal attention")
def _(ask, rng):
    ask(*step_input(rng, 2, 0))
    ask(*step_input(rng, 1, 0))


@cached_step.property("one new token sees the cache and itself")
def _(ask, rng):
    ask(*step_input(rng, 1, 2))
    ask(*step_input(rng, 1, 9, 5, 4, 3))


@cached_step.property("several new tokens: each sees what came before it, and the last sees all")
def _(ask, rng):
    ask(*step_input(rng, 2, 3))
    ask(*step_input(rng, 4, 6, 5, 4, 3))


@cached_step.property("the cache that comes back is what the next step needs")
def _(ask, rng):
    x, keys, values, *matrices = step_input(rng, 6, 2)
    _, keys, values = ask(x[:4], keys, values, *matrices)
    ask(x[4:], keys, values, *matrices)


@cached_step.property("keys and values of different widths; scores of 1e4")
def _(ask, rng):
    x, keys, values, *matrices = step_input(rng, 3, 4, 3, 2, 7)
    ask(1e4 * x, keys, values, *matrices)
    ask(1e4 * x[:1], keys, values, *matrices)


@cached_step.property(
    "all at once: a long cache, rows of very different size, one new token, float32",
    hint="Does anything depend on the size of the cache, or of another row?",
)
def _(ask, rng):
    x, keys, values, *matrices = step_input(rng, 5, 70, 4, 3, 2)
    ask(np.array([[1e3], [1.0], [1e-3], [1.0], [30.0]]) * x, keys, values, *matrices)
    ask(*(a.astype(np.float32) for a in (x, keys, values, *matrices)))
    ask(*(a.astype(np.float32) for a in step_input(rng, 1, 50, 3, 1, 1)))


@cached_step.mistake("The mask starts at the top left: the last new token must see all keys (bottom right).")
def _(x, keys, values, w_q, w_k, w_v):
    return step_with(x, keys, values, w_q, w_k, w_v, sees=lambda i, n_old: i + 1)


@cached_step.mistake("New tokens see tokens that come after them: pass causal=True.")
def _(x, keys, values, w_q, w_k, w_v):
    return step_with(x, keys, values, w_q, w_k, w_v, sees=lambda i, n_old: n_old + len(x))


@cached_step.mistake("A new token does not see itself: its key goes into the cache before anybody looks.")
def _(x, keys, values, w_q, w_k, w_v):
    return step_with(x, keys, values, w_q, w_k, w_v, sees=lambda i, n_old: n_old + i)


@cached_step.mistake("Only the old cache is looked at: the new keys and values go behind it first.")
def _(x, keys, values, w_q, w_k, w_v):
    return step_with(x, keys, values, w_q, w_k, w_v, sees=lambda i, n_old: n_old)


@cached_step.mistake("The new tokens only see each other: the cache is not looked at.")
def _(x, keys, values, w_q, w_k, w_v):
    out, _, _ = step_with(x, keys[:0], values[:0], w_q, w_k, w_v)
    return out, np.concatenate([keys, x @ w_k]), np.concatenate([values, x @ w_v])


@cached_step.mistake("The new keys stand before the old ones: they go behind them.")
def _(x, keys, values, w_q, w_k, w_v):
    out, _, _ = step_with(x, keys, values, w_q, w_k, w_v)
    return out, np.concatenate([x @ w_k, keys]), np.concatenate([x @ w_v, values])


@cached_step.mistake("The cache comes back as it was: return it with the new keys and values in it.")
def _(x, keys, values, w_q, w_k, w_v):
    return step_with(x, keys, values, w_q, w_k, w_v)[0], keys, values


@cached_step.mistake("Only the new keys and values come back: return the whole cache.")
def _(x, keys, values, w_q, w_k, w_v):
    return step_with(x, keys, values, w_q, w_k, w_v)[0], x @ w_k, x @ w_v


@cached_step.mistake("The scale is missing: divide the scores by the square root of d_head.")
def _(x, keys, values, w_q, w_k, w_v):
    return step_with(x, keys, values, w_q, w_k, w_v, scale=1.0)


# --- 5.2 -------------------------------------------------------------------------------------------------------------


@exercise("5.2", MODULE)
def forward_flops(n_new, n_keys, d_model, d_ff, n_layers, vocab_size):
    return flops_with(n_new, n_keys, d_model, d_ff, n_layers, vocab_size)


def flops_with(
    n_new, n_keys, d_model, d_ff, n_layers, vocab_size, *, projections=4, passes=2, of_keys=2, layers=2, words=1
):
    """The sum over all matrix products (rows, inner, columns), one by one. As it stands, it is right."""
    totals = []
    for n, keys in zip(n_new.tolist(), n_keys.tolist()):
        layer = [(n, d_model, d_model)] * projections + [(n, d_model, d_ff)] * layers + [(n, d_model, keys)] * of_keys
        products = layer * n_layers + [(n, d_model, vocab_size)] * words
        totals.append(sum(passes * rows * inner * columns for rows, inner, columns in products))
    return np.array(totals)


@forward_flops.property("one token, one key, one layer, without a feed-forward layer")
def _(ask, rng):
    ask(np.array([1]), np.array([1]), 4, 0, 1, 3)


@forward_flops.property("several new tokens, and as many keys")
def _(ask, rng):
    ask(np.array([2, 5]), np.array([2, 5]), 4, 0, 1, 3)


@forward_flops.property("one new token and many keys; some new tokens and many keys")
def _(ask, rng):
    ask(np.array([1, 1]), np.array([10, 1000]), 4, 0, 1, 3)
    ask(np.array([3, 7]), np.array([20, 7]), 4, 0, 1, 3)


@forward_flops.property("the feed-forward layer: two products")
def _(ask, rng):
    ask(np.array([3]), np.array([8]), 4, 10, 1, 3)


@forward_flops.property("layers are repeated, the output layer is not")
def _(ask, rng):
    ask(np.array([1, 3]), np.array([8, 3]), 4, 10, 5, 7)
    ask(np.array([1]), np.array([128]), 64, 128, 2, 103)


def flops_mistake(**changes):
    return lambda *args, **kwargs: flops_with(*args, **kwargs, **changes)


for message, changes in {
    "A product and a sum are two operations: the factor 2 is missing.": {"passes": 1},
    "There are four projections: queries, keys, values and the output.": {"projections": 3},
    "Keys are read twice: for the scores, and their values for the weighted sum.": {"of_keys": 1},
    "The output layer is missing: each new token is multiplied with (d_model, vocab_size).": {"words": 0},
    "The feed-forward layer has two products: up to d_ff and back.": {"layers": 1},
}.items():
    forward_flops.mistake(message)(flops_mistake(**changes))


@forward_flops.mistake("Each new token meets all keys: n_new * n_keys, not n_new squared.")
def _(n_new, n_keys, d_model, d_ff, n_layers, vocab_size):
    return forward_flops.oracle(n_new, n_new, d_model, d_ff, n_layers, vocab_size)


@forward_flops.mistake("Old tokens are not projected again: only n_new tokens are.")
def _(n_new, n_keys, d_model, d_ff, n_layers, vocab_size):
    return forward_flops.oracle(n_keys, n_keys, d_model, d_ff, n_layers, vocab_size)


@forward_flops.mistake("Keys and values of old tokens are in the cache: only those of the n_new tokens are computed.")
def _(n_new, n_keys, d_model, d_ff, n_layers, vocab_size):
    again = n_layers * 2 * 2 * (n_keys - n_new) * d_model**2
    return forward_flops.oracle(n_new, n_keys, d_model, d_ff, n_layers, vocab_size) + again


@forward_flops.mistake("The output layer stands once, behind the last layer.")
def _(n_new, n_keys, d_model, d_ff, n_layers, vocab_size):
    return n_layers * forward_flops.oracle(n_new, n_keys, d_model, d_ff, 1, vocab_size)
