"""Lecture 05: a step with a cache. The oracle goes one token at a time."""

import math

import numpy as np

from utils.exercises.arrays import draw
from utils.judge.function import exercise

MODULE = "kv_cache"


# --- 5A --------------------------------------------------------------------------------------------------------------


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


@exercise("5A", MODULE, returns=("out", "keys", "values"), formerly="5.1", importance="essential")
def cached_step(x, keys, values, w_q, w_k, w_v):
    return step_with(x, keys, values, w_q, w_k, w_v)


def step_input(rng, n_new, n_old, d_model=3, d_head=2, d_v=4):
    shapes = ((n_new, d_model), (n_old, d_head), (n_old, d_v), (d_model, d_head), (d_model, d_head), (d_model, d_v))
    return [draw(rng, *shape) for shape in shapes]


@cached_step.property(
    "an empty cache: plain causal attention",
    hint="Which keys does the first token see when there are no old ones?",
)
def _(ask, rng):
    ask(*step_input(rng, 2, 0))
    ask(*step_input(rng, 1, 0))


@cached_step.property(
    "one new token sees the cache and itself",
    hint="When do the new key and value join the old ones: before or after the look?",
)
def _(ask, rng):
    ask(*step_input(rng, 1, 2))
    ask(*step_input(rng, 1, 9, 5, 4, 3))


@cached_step.property(
    "several new tokens: each sees what came before it, and the last sees all",
    hint="How many keys does the first of several new tokens see, and which of them are new?",
)
def _(ask, rng):
    ask(*step_input(rng, 2, 3))
    ask(*step_input(rng, 4, 6, 5, 4, 3))


@cached_step.property(
    "the cache that comes back is what the next step needs",
    hint="How many rows has the cache after the step, and in which order?",
)
def _(ask, rng):
    x, keys, values, *matrices = step_input(rng, 6, 2)
    _, keys, values = ask(x[:4], keys, values, *matrices)
    ask(x[4:], keys, values, *matrices)


@cached_step.property(
    "keys and values of different widths; scores of 1e4",
    hint="Which width decides the scale, and which softmax of yours survives large scores?",
)
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


@cached_step.mistake("The scale is 1/sqrt(d_head), by the width of a key, not of x.")
def _(x, keys, values, w_q, w_k, w_v):
    return step_with(x, keys, values, w_q, w_k, w_v, scale=1 / math.sqrt(x.shape[1]))


@cached_step.mistake("The scale is 1/sqrt(d_head), by the width of a key, not of a value.")
def _(x, keys, values, w_q, w_k, w_v):
    return step_with(x, keys, values, w_q, w_k, w_v, scale=1 / math.sqrt(w_v.shape[1]))


@cached_step.mistake("Only the last new token looks: out has a row for each new token.")
def _(x, keys, values, w_q, w_k, w_v):
    out, keys, values = step_with(x, keys, values, w_q, w_k, w_v)
    return out[-1:], keys, values


@cached_step.mistake("The right three, in another order: return (out, keys, values).")
def _(x, keys, values, w_q, w_k, w_v):
    out, keys, values = step_with(x, keys, values, w_q, w_k, w_v)
    return keys, values, out
