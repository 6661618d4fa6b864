"""Lecture 07: a test of compressed attention, tried on right ones and on ones with a bug each."""

import numpy as np

from utils.judge.bug import bug

MODULE = "sparse"


def compress(
    q, k, v, m, *, visible=lambda t, m: (t + 1) // m, scale=True, pick=None, ragged=False, empty=0.0, offset=0
):
    """Compressed attention with a place for each bug, in what follows the `*`; as it stands, it is right."""
    n, d = q.shape
    count = -(-n // m) if ragged else n // m
    starts = [b * m + offset for b in range(count)]
    k_mean = np.stack([k[s : s + m].mean(0) for s in starts]) if count else np.zeros((0, d))
    v_mean = [v[s : s + m].mean(0) if pick is None else v[min(s + pick, n - 1)] for s in starts]
    out = np.full((n, v.shape[1]), empty)
    for t in range(n):
        seen = count if ragged and t == n - 1 else min(visible(t, m), count)
        if seen > 0:
            scores = k_mean[:seen] @ q[t] / (np.sqrt(d) if scale else 1.0)
            powers = np.exp(scores - scores.max())
            out[t] = powers @ np.stack(v_mean[:seen]) / powers.sum()
    return out


@bug("7F", MODULE, subject="compressed_attention", importance="useful")
def test_compressed(compressed_attention):
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((9, 5)), rng.standard_normal((9, 5)), rng.standard_normal((9, 2))
    for m in (1, 2, 4):
        assert np.allclose(compressed_attention(q, k, v, m), compress(q, k, v, m))


@test_compressed.right
def _(q, k, v, m):
    return compress(np.asarray(q, float), np.asarray(k, float), np.asarray(v, float), m)


@test_compressed.right
def _(q, k, v, m):
    """With a matrix that averages, and one mask."""
    n, blocks = len(q), len(k) // m
    average = np.zeros((blocks, len(k)))
    for b in range(blocks):
        average[b, b * m : (b + 1) * m] = 1 / m
    scores = q @ (average @ k).T / q.shape[1] ** 0.5
    ends = (np.arange(blocks) + 1) * m - 1
    powers = np.exp(scores - scores.max(-1, keepdims=True, initial=0.0)) * (ends <= np.arange(n)[:, None])
    total = powers.sum(-1, keepdims=True)
    return powers / np.where(total == 0, 1, total) @ (average @ v)


WHEN = "For n = 3 and m = 2, which blocks may query 1 see, and which query 2?"
MUTANTS = {
    "the last visible block ends in the future": ({"visible": lambda t, m: t // m + 1}, WHEN),
    "every query sees all blocks": (
        {"visible": lambda t, m: 10**6},
        "What should row 0 be, when the keys after it change?",
    ),
    "a block is seen one token too late": ({"visible": lambda t, m: t // m}, WHEN),
    "an unfinished block at the end is seen": (
        {"ragged": True},
        "Let n be no multiple of m: which blocks may the last query see?",
    ),
    "the scores are not scaled": ({"scale": False}, "Which number should the output of one query be?"),
    "the mean is taken over the wrong tokens": (
        {"offset": 1},
        "Which tokens does block 0 hold, and do you change one of them?",
    ),
    "a block hands over its first value, not the mean": (
        {"pick": 0},
        "Have the values of a block differed in your test?",
    ),
    "a query that sees nothing is not zero": ({"empty": 1.0}, "What is row 0, when m is 2?"),
}


for name, (changes, hint) in MUTANTS.items():

    def wrong(q, k, v, m, changes=changes):
        return compress(q, k, v, m, **changes)

    test_compressed.mutant(name, hint=hint)(wrong)
