"""Lecture 11: heads of DIFF V2, and a test of them. The oracle goes one head, one query and one key at a time."""

import math
from functools import partial

import numpy as np

from utils.exercises.arrays import draw, kept_dtype, refuses, weights_of
from utils.judge.bug import bug
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "differential"


def logistic(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


@exercise("11D", MODULE, importance="useful")
def differential_pairs(q, k, v, logits):
    (doubled, n, d), (groups, m) = q.shape[-3:], k.shape[-3:-1]
    if groups == 0 or doubled % (2 * groups):
        raise ValueError(f"groups must hold whole pairs, got {doubled} query heads on {groups} key heads")
    out = np.zeros((*q.shape[:-3], doubled // 2, n, v.shape[-1]))
    for at in np.ndindex(*out.shape[:-1]):
        *row, head, i = at
        theirs = (*row, 2 * head * groups // doubled)
        for which, share in ((2 * head, 1.0), (2 * head + 1, -logistic(float(logits[at])))):
            asked = q[(*row, which, i)].astype(float)
            scores = [math.fsum((asked * key).tolist()) / math.sqrt(d) for key in k[theirs]]
            for weight, value in zip(weights_of(scores, [j <= i + m - n for j in range(m)]), v[theirs]):
                out[at] += share * weight * value
    return out


def inputs(rng, heads=2, groups=2, n=3, m=3, d=4, lead=(), size=1.0):
    shapes = (2 * heads, n, d), (groups, m, d), (groups, m, d), (heads, n)
    q, k, v, logits = (draw(rng, *lead, *shape) for shape in shapes)
    return size * q, size * k, v, 2 * logits


@differential_pairs.property(
    "one pair on one key head",
    hint="Which axis counts the heads, what is the sigmoid of 0, and which of the two heads is multiplied by it?",
)
def _(ask, rng):
    ask(np.array([[[2.0]], [[0.0]]]), np.array([[[1.0], [0.0]]]), np.array([[[4.0], [8.0]]]), np.array([[0.0]]))
    ask(*inputs(rng, heads=1, groups=1))


@differential_pairs.property(
    "pairs are neighbours, and both have one key head",
    hint="With 8 query heads on 2 key heads: which key head have heads 2 and 3, and which pair are they?",
)
def _(ask, rng):
    ask(*inputs(rng, heads=2, groups=2))
    ask(*inputs(rng, heads=4, groups=2))
    ask(*inputs(rng, heads=6, groups=2, n=2, m=2))


@differential_pairs.property(
    "a lambda for each token and head", hint="Which axis has to stand behind logits, and is the sigmoid taken of all?"
)
def _(ask, rng):
    ask(*inputs(rng, heads=3, groups=1, n=3, m=3))
    ask(*inputs(rng, heads=3, groups=3, n=4, m=4))


@differential_pairs.property(
    "causal, with fewer queries than keys", hint="At which position is query 0 of 2, with 5 keys?"
)
def _(ask, rng):
    ask(*inputs(rng, n=2, m=5))
    ask(*inputs(rng, n=4, m=2))


@differential_pairs.property(
    "a group that would cut a pair is refused",
    hint="6 query heads on 2 key heads: three in each group. Which remainder shows it?",
)
def _(ask, rng):
    for doubled, groups in ((6, 2), (4, 4), (4, 3)):
        given = draw(rng, doubled, 2, 3), draw(rng, groups, 2, 3), draw(rng, groups, 2, 3), draw(rng, doubled // 2, 2)
        if not refuses(ask, *given):
            raise Failed(f"{doubled} query heads on {groups} key heads: a ValueError is expected")


@differential_pairs.property(
    "large scores and large logits do not overflow", hint="Is the sigmoid yours, or the one that is given?"
)
def _(ask, rng):
    q, k, v, logits = inputs(rng, heads=4, groups=2, size=150.0)
    ask(q, k, v, 500 * logits)


@differential_pairs.property("the float type of q", hint="In which float type is lambda when it meets the second head?")
def _(ask, rng):
    q, k, v, logits = inputs(rng, heads=4, groups=2, lead=(2,), n=1, m=40)
    kept_dtype(ask, np.float32, 3 * q, k, v, logits)
    q, k, v, logits = inputs(rng)
    kept_dtype(ask, np.float32, q, k, v, logits=logits)  # which stay in double


@differential_pairs.property(
    "all at once: axes in front, one query, large scores", hint="Which of these have you never tried together?"
)
def _(ask, rng):
    ask(*inputs(rng, heads=4, groups=2, lead=(2,), n=1, m=5, size=150.0))
    ask(*inputs(rng, heads=2, groups=1, lead=(1, 2), n=3, m=5, size=150.0))


def neighbours(heads):
    return heads[..., 0::2, :, :], heads[..., 1::2, :, :]


def halves(heads):
    return np.split(heads, 2, axis=-3)


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def repeat(x, times):
    return np.repeat(x, times, axis=-3)


def usual_pairs(
    q, k, v, logits, *, pairs=neighbours, share=repeat, share_v=None, squash=sigmoid, place=lambda lam: lam, order=(0, 1),
    scale=1.0, shift=0, top=False, causal=True, after=lambda out: out, sign=-1, refuse=True,
):  # fmt: skip
    """Heads of V2 in the usual way. The bugs are in what follows the `*`; as it stands, it is right."""
    if refuse and (k.shape[-3] == 0 or q.shape[-3] % (2 * k.shape[-3])):
        raise ValueError("each group must hold whole pairs")
    times = q.shape[-3] // k.shape[-3]
    keys, values = share(k, times), (share_v or share)(v, times)
    scores = scale * q @ keys.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    n, m = scores.shape[-2:]
    if causal:
        scores = np.where(np.tri(n, m, (0 if top else m - n) + shift, dtype=bool), scores, -np.inf)
    with np.errstate(all="ignore"):
        powers = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300))
        total = powers.sum(-1, keepdims=True)
    heads = powers / np.where(total == 0, 1, total) @ values
    both = pairs(heads)
    lam = place(squash(logits))[..., None].astype(q.dtype)
    return after(both[order[0]] + sign * lam * both[order[1]])


def tiled(x, times):
    return np.concatenate([x] * times, axis=-3)


def even(x):
    """Lambda averaged over the tokens of a head."""
    return np.broadcast_to(x.mean(-1, keepdims=True), x.shape)


def swapped(lam):
    return lam[..., ::-1, :]


def normed(out):
    return out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-5)


differential_pairs.mistakes_of(
    usual_pairs,
    {
        "Heads i and i + heads are paired: 2i and 2i + 1 are, inside one group.": {"pairs": halves},
        "Heads are dealt out like cards, as with tile: neighbours share a key head.": {"share": tiled},
        "The second head of a pair is subtracted from the first, not the other way round.": {"order": (1, 0)},
        "The second head is added: it has to be subtracted.": {"sign": 1},
        "The sigmoid is missing: lambda is sigmoid(logits).": {"squash": lambda x: x},
        "lambda is not used.": {"squash": np.ones_like},
        "A norm stands behind the subtraction: V2 has none.": {"after": normed},
        "The mask is missing: a query sees later keys.": {"causal": False},
        "The mask starts at the top left: the last query sees every key.": {"top": True},
        "The scores are not scaled: divide them by sqrt(d_head).": {"scale": 2.0},
        "A group that cuts a pair has to be refused with a ValueError.": {"refuse": False},
    },
)


@differential_pairs.mistake("The first head is multiplied by 1 - lambda: it stays as it is.")
def _(q, k, v, logits):
    first = usual_pairs(q, k, v, logits, squash=np.zeros_like)
    return usual_pairs(q, k, v, logits) - sigmoid(logits)[..., None].astype(q.dtype) * first


# --- 11E -------------------------------------------------------------------------------------------------------------


@bug("11E", MODULE, subject="heads", importance="useful")
def test_pairs(heads):
    rng = np.random.default_rng(4)
    shapes = (1, 12, 2, 3), (1, 2, 4, 3), (1, 2, 4, 3), (1, 6, 2)
    q, k, v, logits = (2 * rng.standard_normal(shape) for shape in shapes)
    assert np.allclose(heads(q, k, v, logits), differential_pairs.oracle(q, k, v, logits))


@test_pairs.right
def _(q, k, v, logits):
    return usual_pairs(q, k, v, logits)


@test_pairs.right
def _(q, k, v, logits):
    """The same one pair at a time."""
    times, out = q.shape[-3] // k.shape[-3], []
    for head in range(q.shape[-3] // 2):
        group = 2 * head // times
        own = q[..., 2 * head : 2 * head + 2, :, :]
        k_g, v_g = (x[..., group : group + 1, :, :] for x in (k, v))
        out.append(usual_pairs(own, k_g, v_g, logits[..., head : head + 1, :]))
    return np.concatenate(out, axis=-3)


PAIRS = "How many pairs has a group in your test, and how many groups are there?"
LAMBDA = "Does lambda in your test differ from head to head and from token to token, and is it far from 1/2?"
for name, changes, hint in (
    ("paired by halves, across the groups", {"pairs": halves}, PAIRS),
    ("key heads dealt out, as by tile", {"share": tiled}, PAIRS),
    ("values alone dealt out", {"share_v": tiled}, "Are the values of two groups different in your test?"),
    ("the first head subtracted from the second", {"order": (1, 0)}, "Have the two heads of a pair different queries?"),
    ("no sigmoid", {"squash": lambda x: x}, LAMBDA),
    ("one lambda for all tokens of a head", {"squash": lambda x: even(sigmoid(x))}, LAMBDA),
    ("lambdas of other heads", {"place": swapped}, LAMBDA),
    ("a norm behind the subtraction", {"after": normed}, "Does your test look at the size of the output?"),
    ("the mask starts at the top left", {"top": True}, "Has your test fewer queries than keys?"),
    ("not scaled", {"scale": 2.0}, "How much do the weights of your inputs differ? With even weights no scale shows."),
):
    test_pairs.mutant(name, hint)(partial(usual_pairs, **changes))
