"""Lecture 12: a test of causality, tried on causal layers and on layers that leak in one way each."""

import numpy as np

from utils.judge.bug import bug

MODULE = "mixture"


def mixed(x, allowed=None, scores=None):
    """Softmax attention of x with itself, where `allowed` is True."""
    scores = x @ x.T / np.sqrt(x.shape[1]) if scores is None else scores
    scores = np.where(np.tri(len(x), dtype=bool) if allowed is None else allowed, scores, -np.inf)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True) @ x


@bug("12F", MODULE, subject="layer", importance="essential")
def test_causal(layer):
    rng = np.random.default_rng(3)
    for size in (1.0, 100.0):
        x = rng.standard_normal((20, 8)) * np.linspace(1, size, 20)[:, None]
        whole = layer(x)
        for i in range(1, 20):
            assert np.allclose(layer(x[:i]), whole[:i], rtol=1e-4, atol=1e-4)


@test_causal.right
def _(x):
    return mixed(x)


@test_causal.right
def _(x):
    """Tokens choose one of two matrices; computed in single precision."""
    x = x.astype(np.float32)
    return np.where(x[:, :1] > x[:, 1:2], mixed(x)[:, ::-1], 2 * x)


@test_causal.right
def _(x):
    """A running mean, a norm of each token, and a capacity by order; fewer columns come out."""
    means = np.cumsum(x, axis=0) / np.arange(1, len(x) + 1)[:, None]
    normed = means / (1e-6 + np.sqrt((means**2).mean(-1, keepdims=True)))
    return np.where(np.arange(len(x))[:, None] < 5, normed, x)[:, :3]


def window(n, ahead=0, first=0):
    i = np.arange(n)
    return (i <= i[:, None] + ahead) | ((i[:, None] == 0) & (i < first))


ONE_CUT = "Is every place a cut, also the last but one?"
ALONE = "What does the layer say to the first tokens alone, when nothing follows them?"
LARGE = "Are later tokens ever much larger than earlier ones in your test?"


@test_causal.mutant("no mask at all", hint=ALONE)
def _(x):
    return mixed(x, np.ones((len(x), len(x)), bool))


@test_causal.mutant("each token sees the next one", hint=ONE_CUT)
def _(x):
    return mixed(x, window(len(x), ahead=1))


@test_causal.mutant(
    "tokens see their whole block of four", hint="Do your cuts fall inside of blocks as well as between them?"
)
def _(x):
    i = np.arange(len(x))
    return mixed(x, i // 4 <= i[:, None] // 4)


@test_causal.mutant("the mean of the text is subtracted", hint=ALONE)
def _(x):
    return mixed(x) - x.mean(0)


@test_causal.mutant("experts choose their tokens", hint="Is the output compared at every token, not only at the last?")
def _(x):
    room, scores = max(1, len(x) // 2), x[:, 0]
    chosen = np.isin(np.arange(len(x)), np.argsort(-scores, kind="stable")[:room])
    return np.where(chosen[:, None], mixed(x), 0)


@test_causal.mutant("a full expert drops the tokens with the lowest scores", hint=LARGE)
def _(x):
    kept = np.isin(np.arange(len(x)), np.argsort(-x[:, 0], kind="stable")[:6])
    return np.where(kept[:, None], 2 * x, x)


@test_causal.mutant("the output depends on how many tokens follow", hint=ALONE)
def _(x):
    return mixed(x) * (1 + np.arange(len(x), 0, -1)[:, None] / 10)


@test_causal.mutant("only the first token sees the future", hint="Is the first token compared?")
def _(x):
    return mixed(x, window(len(x), first=len(x)))


@test_causal.mutant("numbers are divided by the largest of the text, if that is above 10", hint=LARGE)
def _(x):
    largest = np.abs(x).max(initial=0)
    return mixed(x) / (largest if largest > 10 else 1.0)


@test_causal.mutant(
    "a leak of one part in a hundred",
    hint="How far may outputs differ in your test: is that little, compared with them?",
)
def _(x):
    return mixed(x) + 0.01 * x[::-1].mean(0)
