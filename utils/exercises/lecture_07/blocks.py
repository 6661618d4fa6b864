"""Lecture 07: attention in blocks, and the choice of blocks."""

import math

import numpy as np

from utils.exercises.arrays import draw, kept_dtype, weights_of
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "sparse"


# --- 7B --------------------------------------------------------------------------------------------------------------


@exercise("7B", MODULE, importance="essential")
def block_sparse_attention_numpy(q, k, v, block_mask, block_size, causal=False, scale=None):
    """One query at a time: a list of the keys that it sees."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v, there = (np.broadcast_to(a, (*lead, *a.shape[-2:])) for a in (q, k, v, np.asarray(block_mask)))
    n, m = q.shape[-2], k.shape[-2]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = np.zeros((*lead, n, v.shape[-1]))
    for place in np.ndindex(*lead, n):
        head, i = place[:-1], place[-1]
        seen = [j for j in range(m) if there[head][i // block_size, j // block_size]]
        seen = [j for j in seen if not causal or j <= i + m - n]
        scores = [scale * math.fsum(map(float, q[place] * k[head][j])) for j in seen]
        for share, j in zip(weights_of(scores, [True] * len(seen)), seen):
            out[place] += share * v[head][j]
    return out


def head(rng, n, m, d=4, d_v=3):
    return draw(rng, n, d), draw(rng, m, d), draw(rng, m, d_v)


@block_sparse_attention_numpy.property(
    "all blocks: the attention of lecture 01", hint="Which rows of q and which of k belong to block 0, 1, ...?"
)
def _(ask, rng):
    ask(*head(rng, 4, 4, 2, 2), np.ones((2, 2), bool), 2)
    ask(*head(rng, 6, 9), np.ones((2, 3), bool), 3)


@block_sparse_attention_numpy.property(
    "the weights are those of the blocks that are there",
    hint="Which columns does row a of the mask allow, and which row of it is yours?",
)
def _(ask, rng):
    ask(*head(rng, 4, 4, 2, 2), np.array([[True, False], [True, True]]), 2)
    ask(
        *head(rng, 6, 8),
        np.array([[True, False, False, True], [False, True, True, False], [False, False, True, True]]),
        2,
    )


@block_sparse_attention_numpy.property(
    "the last block of queries or keys may be short", hint="Where does the last block end, and is there a row 7 of 7?"
)
def _(ask, rng):
    ask(*head(rng, 5, 7), np.array([[True, False, True], [False, True, True]]), 3)
    ask(*head(rng, 1, 2), np.ones((1, 1), bool), 5)
    ask(*head(rng, 67, 70), rng.random((5, 5)) < 0.5, 16)


@block_sparse_attention_numpy.property(
    "a row of blocks without any is 0", hint="What does attention_numpy return when it is given no keys?"
)
def _(ask, rng):
    ask(*head(rng, 4, 4), np.array([[False, False], [True, False]]), 2)
    ask(*head(rng, 3, 3), np.zeros((3, 3), bool), 1, causal=True)


@block_sparse_attention_numpy.property(
    "causal: inside the blocks too, aligned at the bottom right",
    hint="Which keys may query i see, counted in the whole text and not in the gathered one?",
)
def _(ask, rng):
    ask(*head(rng, 4, 4, 2, 2), np.ones((2, 2), bool), 2, causal=True)
    ask(*head(rng, 6, 6), np.array([[True, False], [True, True]]), 3, causal=True)
    ask(*head(rng, 3, 7), np.array([[True, False, True, True], [False, True, True, True]]), 2, causal=True)
    ask(*head(rng, 7, 3), np.ones((4, 2), bool), 2, causal=True)


@block_sparse_attention_numpy.property(
    "absent blocks are not read: they may hold nan", hint="Are the keys gathered before the scores, or masked after?"
)
def _(ask, rng):
    q, k, v = head(rng, 4, 6)
    k[2:4], v[2:4] = np.nan, np.nan
    ask(q, k, v, np.array([[True, False, True], [True, False, False]]), 2)


@block_sparse_attention_numpy.property(
    "leading axes, and masks of their own", hint="Which of the heads is there[place], and is there one mask for all?"
)
def _(ask, rng):
    q, k, v = draw(rng, 2, 3, 4, 2), draw(rng, 2, 3, 6, 2), draw(rng, 2, 3, 6, 5)
    ask(q, k, v, rng.random((2, 3)) < 0.7, 2)
    ask(q, k, v, rng.random((2, 3, 2, 3)) < 0.6, 2)
    ask(q, k[:, :1], v[:1], rng.random((3, 2, 3)) < 0.6, 2, causal=True)


@block_sparse_attention_numpy.property(
    "a scale that is given is used, 0 too; large scores", hint="Is the scale handed on to attention_numpy?"
)
def _(ask, rng):
    ask(*head(rng, 4, 4), np.array([[True, False], [True, True]]), 2, scale=0.25)
    ask(*head(rng, 4, 4), np.array([[True, False], [True, True]]), 2, scale=0.0)
    q, k, v = head(rng, 3, 4)
    ask(1e3 * q, k, v, np.array([[True, True], [False, True]]), 2, scale=3.0)


@block_sparse_attention_numpy.property(
    "all at once: masks, causal, a scale, leading axes, float32, an axis of 1",
    hint="Which two of the options do not work together?",
)
def _(ask, rng):
    q, k, v = draw(rng, 2, 1, 11, 5), draw(rng, 2, 1, 14, 5), draw(rng, 2, 1, 14, 1)
    there = rng.random((2, 1, 3, 4)) < 0.6
    there[..., 1] = False
    k[..., 4:8, :], v[..., 4:8, :] = np.nan, np.nan  # read by nobody
    kept_dtype(ask, np.float32, q, k, v, there, 4, causal=True, scale=0.7)
    ask(1e3 * q, k, v, there, 4, causal=True, scale=0.7)


def in_blocks(
    q, k, v, block_mask, block_size, causal=False, scale=None, *, turned=False, shift=None, inside=True, first=False,
    whole=False, divisor=math.sqrt, given=True, gathered=False, one_mask=False, offset=0,
):  # fmt: skip
    """The loop in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v, there = (np.broadcast_to(a, (*lead, *a.shape[-2:])) for a in (q, k, v, np.asarray(block_mask)))
    n, m = q.shape[-2], k.shape[-2]
    out = np.zeros((*lead, n, v.shape[-1]), q.dtype)
    scale = 1 / divisor(q.shape[-1]) if scale is None or not given else scale
    shift = m - n if shift is None else shift
    for place in np.ndindex(*lead):
        mask = there[(0,) * len(lead)] if one_mask else there[place]
        mask = mask.T if turned and mask.shape[0] == mask.shape[1] else mask
        for a in range(mask.shape[0]):
            rows = np.arange(a * block_size, min((a + 1) * block_size, n if not whole else n - n % block_size))
            blocks = np.flatnonzero(mask[a])[: 1 if first else None]
            keys = (blocks[:, None] * block_size + np.arange(block_size)).ravel()
            keys = keys[keys < m]
            seen = np.ones((len(rows), len(keys)), bool)
            if causal:
                columns = np.arange(len(keys)) if gathered else keys
                seen = columns <= rows[:, None] + shift + offset
                seen = seen if inside else (keys // block_size <= (rows[:, None] + shift) // block_size)
            scores = np.where(seen, scale * q[place][rows] @ k[place][keys].T, -np.inf)
            top = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), -1e300)
            powers = np.exp(scores - top)
            total = powers.sum(-1, keepdims=True)
            out[place][rows] = powers @ v[place][keys] / np.where(total == 0, 1, total)
    return out


block_sparse_attention_numpy.mistakes_of(
    in_blocks,
    {
        "Rows and columns of the block mask have changed places: row a belongs to block a of the queries.": {
            "turned": True
        },
        "Only the first block of a row is read: take all that are there.": {"first": True},
        "The queries of the last, short block are left out.": {"whole": True},
        "The causal mask starts at the top left: query i may see the keys up to i + n_keys - n_queries.": {"shift": 0},
        "Causal by blocks only: inside a block the future has to be hidden as well.": {"inside": False},
        "The causal mask counts gathered columns: compare the places that the keys have in the text.": {
            "gathered": True
        },
        "With causal a query does not see its own key.": {"offset": -1},
        "The scores are divided by d_head, not by sqrt(d_head).": {"divisor": float},
        "The scale that was given is ignored.": {"given": False},
        "One head's blocks are used for all: there[place] belongs to this head.": {"one_mask": True},
    },
)


@block_sparse_attention_numpy.mistake("Absent blocks are masked, but they are read: nan comes through. Gather first.")
def _(q, k, v, block_mask, block_size, causal=False, scale=None):
    n, m = q.shape[-2], k.shape[-2]
    seen = np.repeat(np.repeat(block_mask, block_size, -2), block_size, -1)[..., :n, :m]
    if causal:
        seen = seen & np.tri(n, m, m - n, dtype=bool)
    scores = q @ np.swapaxes(k, -1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = scores + np.where(seen, 0.0, -np.inf).astype(q.dtype)
    powers = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300))
    total = powers.sum(-1, keepdims=True)
    return powers / np.where(total == 0, 1, total) @ v


# --- 7C --------------------------------------------------------------------------------------------------------------


@exercise("7C", MODULE, importance="useful")
def select_blocks(scores, n_keep):
    """One row at a time, one block after the other."""
    chosen = np.zeros(scores.shape, bool)
    for place in np.ndindex(scores.shape[:-1]):
        row = place[-1]
        taken = {0, row}
        while len(taken) < min(n_keep, row + 1):
            left = [b for b in range(row) if b not in taken]
            taken.add(max(left, key=lambda b: (scores[place][b], -b)))
        chosen[place][list(taken)] = True
    return chosen


def ranks(rng, *shape):
    """Scores without equal ones: small whole numbers in random order."""
    count = shape[-1]
    return np.array([rng.permutation(count) for _ in range(math.prod(shape[:-1]))], float).reshape(shape)


@select_blocks.property(
    "own block and first block are always there",
    hint="Which number could stand in for the score of a block that must be taken?",
)
def _(ask, rng):
    ask(-ranks(rng, 5, 5), 2)
    scores = np.zeros((4, 4))
    scores[:, 1] = 9.0
    ask(scores, 2)


@select_blocks.property(
    "the best of those before, until n_keep are there", hint="Own and first count: how many are left to choose?"
)
def _(ask, rng):
    ask(ranks(rng, 5, 5), 3)
    ask(ranks(rng, 6, 6), 4)


@select_blocks.property("never a later block", hint="What happens to the scores above the diagonal?")
def _(ask, rng):
    scores = ranks(rng, 5, 5) + 100 * (np.arange(5) > np.arange(5)[:, None])
    ask(scores, 3)


@select_blocks.property(
    "early rows have fewer blocks, and n_keep may be larger than all", hint="How many blocks can row 0 have?"
)
def _(ask, rng):
    ask(ranks(rng, 3, 3), 3)
    ask(ranks(rng, 3, 3), 10)
    ask(np.zeros((1, 1)), 2)


@select_blocks.property("of equal scores the earlier block is taken", hint="What does kind='stable' do in np.argsort?")
def _(ask, rng):
    ask(np.zeros((6, 6)), 3)
    ask(np.round(ranks(rng, 30, 30) / 6), 9)


@select_blocks.property(
    "any numbers: negative, very large, -inf", hint="Is your stand-in larger than every score that there can be?"
)
def _(ask, rng):
    ask(-1e6 * (ranks(rng, 5, 5) + 1), 3)
    ask(1e30 * (ranks(rng, 5, 5) + 1), 3)
    scores = ranks(rng, 6, 6)
    scores[:, 2] = -np.inf
    ask(scores, 3)


@select_blocks.property("leading axes, each with its own choice, many blocks", hint="On which axis do you sort?")
def _(ask, rng):
    ask(ranks(rng, 2, 3, 7, 7), 4)
    scores = 1e3 * ranks(rng, 2, 1, 9, 9)
    scores[..., 4] = -np.inf
    ask(scores, 4)
    ask((scores / 1e3).astype(np.float32), 4)
    result = ask(ranks(rng, 1, 40, 40).astype(np.float32), 12)
    if result.dtype != bool:
        raise Failed(f"returned {result.dtype}, expected bool")


def usual_choice(
    scores, n_keep, *, own=True, first=True, past=True, extra=0, sign=1, axis=-1, large=np.inf, stable=True, once=False
):  # fmt: skip
    """The choice in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    n = scores.shape[-1]
    row, column = np.indices((n, n))
    ranked = np.where((column < row) | (not past), sign * scores.astype(float), -np.inf)
    always = ((column == row) & own) | ((column == 0) & first)
    ranked = np.where(always, large, ranked)
    if not stable:
        ranked, always = ranked[..., ::-1], always
    place = np.argsort(-ranked, axis=axis, kind="stable")
    place = place if once else np.argsort(place, axis=axis)
    place = place if stable else place[..., ::-1]
    return (place < n_keep + extra) & ((column <= row) | (not past))


select_blocks.mistakes_of(
    usual_choice,
    {
        "The own block is only there when its score is high: a query must see its neighbours.": {"own": False},
        "The first block is only there when its score is high: it is always taken.": {"first": False},
        "Later blocks are chosen: nothing of the future.": {"past": False},
        "n_keep blocks are chosen beside own and first: the two are counted.": {"extra": 2},
        "All earlier blocks are chosen: a row has n_keep at most.": {"extra": 10**6},
        "One block too few in each row.": {"extra": -1},
        "The worst blocks are taken: sort the other way.": {"sign": -1},
        "The choice goes along the queries: sort along the last axis.": {"axis": -2},
        "Own and first get a number that a real score can beat: take infinity.": {"large": 50.0},
        "Of equal scores the later block is taken: the earlier one is asked for.": {"stable": False},
        "np.argsort lists blocks from the best to the worst; the rank of each block is the argsort of that list.": {
            "once": True
        },
    },
)


@select_blocks.mistake("A threshold lets in all blocks with an equal score: take n_keep of them, the earlier first.")
def _(scores, n_keep):
    n = scores.shape[-1]
    row, column = np.indices((n, n))
    ranked = np.where(column < row, scores.astype(float), -np.inf)
    ranked = np.where((column == row) | (column == 0), np.inf, ranked)
    least = np.sort(ranked, axis=-1)[..., ::-1][..., min(n_keep, n) - 1, None]
    return (ranked >= least) & (column <= row)
