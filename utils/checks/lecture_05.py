"""The exercises of lecture 05: a step with a cache, its operations, left padding, the verification of a draft.
What a cache may forget is in memory_05.py, the kernels are in kernels_05.py.

The oracles go one token at a time, in Python's own arithmetic.
"""

import math

import numpy as np

from utils.checks import exercise
from utils.checks.kernels_05 import key_offset, merge_splits
from utils.checks.memory_05 import keep_heavy, round_to_levels

__all__ = ["keep_heavy", "key_offset", "merge_splits", "round_to_levels"]  # exercises too
MODULE = "kv_cache"


def draw(rng, *shape):
    return rng.normal(size=shape).round(1)


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


def flops_with(n_new, n_keys, d_model, d_ff, n_layers, vocab_size, *, projections=4, passes=2, of_keys=2, layers=2, words=1):
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


# --- 5.3 -------------------------------------------------------------------------------------------------------------


@exercise("5.3", MODULE, returns=("mask", "positions"))
def left_padding(lengths, n_keys):
    mask = np.zeros((len(lengths), 1, 1, n_keys), dtype=bool)
    positions = np.zeros((len(lengths), n_keys), dtype=int)
    for row, length in enumerate(lengths):
        for position in range(int(length)):
            column = n_keys - int(length) + position
            mask[row, 0, 0, column], positions[row, column] = True, position
    return mask, positions


@left_padding.property("the last lengths[b] columns are tokens, numbered from 0")
def _(ask, rng):
    ask(np.array([2]), 4)
    ask(np.array([3, 1]), 5)


@left_padding.property("a row without padding: all columns, 0 to n_keys - 1")
def _(ask, rng):
    ask(np.array([4, 2]), 4)


@left_padding.property("an empty row: nothing may be seen, positions 0")
def _(ask, rng):
    ask(np.array([0, 2]), 3)


@left_padding.property("more columns than the longest row")
def _(ask, rng):
    ask(np.array([2, 5, 1]), 9)


@left_padding.property("positions are integers that an embedding could take: none is negative")
def _(ask, rng):
    ask(np.array([1, 6]), 6)


def padding_with(mask=None, positions=None):
    def answer(lengths, n_keys):
        right = left_padding.oracle(lengths, n_keys)
        made = [part if make is None else make(np.asarray(lengths), n_keys) for make, part in zip((mask, positions), right)]
        return made[0], made[1]

    return answer


def columns(lengths, n_keys):
    return np.broadcast_to(np.arange(n_keys), (len(lengths), n_keys))


for message, answer in {
    "Positions count the padding: a row's first token has position 0.": padding_with(positions=columns),
    "Padding has negative positions: clip them at 0.": padding_with(
        positions=lambda lengths, n: columns(lengths, n) - (n - lengths[:, None])
    ),
    "Positions count from 1: cumsum of the mask, minus 1.": padding_with(
        positions=lambda lengths, n: (columns(lengths, n) - (n - lengths[:, None]) + 1).clip(0)
    ),
    "The mask is the wrong way round: True is where a token stands.": padding_with(
        mask=lambda lengths, n: ~left_padding.oracle(lengths, n)[0]
    ),
    "The mask is (batch, n_keys): give it the axes of heads and queries, (batch, 1, 1, n_keys).": padding_with(
        mask=lambda lengths, n: left_padding.oracle(lengths, n)[0][:, 0, 0]
    ),
    "The mask is off by one column: row b has n_keys - lengths[b] columns of padding.": padding_with(
        mask=lambda lengths, n: (columns(lengths, n) > n - lengths[:, None])[:, None, None, :]
    ),
}.items():
    left_padding.mistake(message)(answer)


@left_padding.mistake("The padding is on the right: here the tokens stand in the last columns.")
def _(lengths, n_keys):
    inside = columns(lengths, n_keys) < np.asarray(lengths)[:, None]
    return inside[:, None, None, :], columns(lengths, n_keys) * inside


# --- 5.4 -------------------------------------------------------------------------------------------------------------


@exercise("5.4", MODULE)
def verify_draft(draft, logits):
    written = []
    for place in range(len(draft) + 1):
        own = max(range(logits.shape[1]), key=lambda token: logits[place, token])
        written.append(own)
        if place == len(draft) or own != draft[place]:
            return np.array(written)


def logits_that_say(rng, tokens, vocab_size=6):
    """Logits whose largest of each row is the given token's."""
    logits = draw(rng, len(tokens), vocab_size)
    logits[np.arange(len(tokens)), tokens] = logits.max(1) + 1
    return logits


@verify_draft.property("a wrong first guess: the model's own token alone")
def _(ask, rng):
    ask(np.array([2, 3]), logits_that_say(rng, [4, 3, 1]))


@verify_draft.property("the draft is kept as far as the model agrees, then comes the model's own token")
def _(ask, rng):
    ask(np.array([2, 3, 5, 0]), logits_that_say(rng, [2, 3, 1, 4, 5]))


@verify_draft.property("a match behind the first mismatch means nothing")
def _(ask, rng):
    ask(np.array([2, 3, 5, 0]), logits_that_say(rng, [2, 4, 5, 0, 1]))
    ask(np.array([1, 1, 1]), logits_that_say(rng, [0, 1, 1, 1]))


@verify_draft.property("all right: the whole draft and one token more")
def _(ask, rng):
    ask(np.array([2, 3, 5]), logits_that_say(rng, [2, 3, 5, 4]))


@verify_draft.property("no guesses: one token, as in plain decoding")
def _(ask, rng):
    ask(np.array([], dtype=int), logits_that_say(rng, [3]))


@verify_draft.property("thirty random drafts")
def _(ask, rng):
    for _ in range(30):
        tokens = rng.integers(3, size=6)
        ask(np.where(rng.random(5) < 0.7, tokens[:5], rng.integers(3, size=5)), logits_that_say(rng, tokens, 3))


def accepted(draft, logits):
    """How many guesses are right before the first wrong one."""
    return len(verify_draft.oracle(draft, logits)) - 1


@verify_draft.mistake("The model's own token is missing: where it disagrees, and behind a draft that is all right.")
def _(draft, logits):
    return np.asarray(draft)[: accepted(draft, logits)]


@verify_draft.mistake("Where the draft is wrong, the model's own token is written, not the guess.")
def _(draft, logits):
    n = accepted(draft, logits)
    return np.append(draft[: n + 1], logits[-1].argmax()) if n == len(draft) else np.asarray(draft[: n + 1])


@verify_draft.mistake("All matches are counted: what comes behind the first mismatch means nothing.")
def _(draft, logits):
    own = logits.argmax(-1)
    return own[: (own[:-1] == draft).sum() + 1]


@verify_draft.mistake("All matches are counted: what comes behind the first mismatch means nothing.")
def _(draft, logits):
    own = logits.argmax(-1)
    match = own[:-1] == draft
    return np.append(draft[match], own[match.sum()])


@verify_draft.mistake("When nothing differs, argmax of the comparison is 0: ask first whether there is a mismatch.")
def _(draft, logits):
    own, n = logits.argmax(-1), accepted(draft, logits)
    return own[:1] if n == len(draft) else own[: n + 1]


@verify_draft.mistake("The model's own token comes from the first row that disagrees, not from the last row of logits.")
def _(draft, logits):
    return np.append(draft[: accepted(draft, logits)], logits[-1].argmax())


@verify_draft.mistake("Everything the model says is taken: behind the first mismatch it read a wrong guess.")
def _(draft, logits):
    return logits.argmax(-1)


@verify_draft.mistake("If the whole draft is right, the last row of logits gives one token more.")
def _(draft, logits):
    n = accepted(draft, logits)
    return np.asarray(draft) if n == len(draft) else verify_draft.oracle(draft, logits)


@verify_draft.mistake("Row i of the logits is what the model says after draft[:i]: compare it with draft[i].")
def _(draft, logits):
    own = logits.argmax(-1)
    wrong = np.flatnonzero(own[1:] != draft)
    return own[: (wrong[0] if len(wrong) else len(draft)) + 1]
