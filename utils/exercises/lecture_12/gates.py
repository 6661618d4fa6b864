"""Lecture 12: top-k gates. The oracle ranks each logit among those of its row."""

import numpy as np

from utils.exercises.arrays import draw, kept_dtype
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "mixture"


@exercise("12A", MODULE, importance="essential")
def top_k_gates(logits, k):
    rows = np.asarray(logits, float).reshape(-1, logits.shape[-1])
    gates = np.zeros(rows.shape)
    for row, gate in zip(rows, gates):
        chosen = sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]
        powers = [np.exp(row[e] - row[chosen[0]]) for e in chosen]
        for e, power in zip(chosen, powers):
            gate[e] = power / sum(powers)
    return gates.reshape(logits.shape)


@top_k_gates.property(
    "one token: the largest logits, softmax over them",
    hint="Over how many logits does the softmax run: over those of all experts, or over the chosen?",
)
def _(ask, rng):
    ask(np.array([2.0, 0.0, 1.0, 0.0]), 2)
    ask(np.array([[0.0, 3.0, 1.0, 2.0]]), 3)


@top_k_gates.property(
    "k = 1 and k = n_experts", hint="What is a softmax over one number, and which experts are left out?"
)
def _(ask, rng):
    ask(np.array([[1.0, 3.0, 2.0], [5.0, 4.0, 0.0]]), 1)
    ask(np.array([[1.0, 3.0, 2.0], [5.0, 4.0, 0.0]]), 3)


@top_k_gates.property("each token chooses for itself, any axes in front", hint="Which axis is sorted and cut?")
def _(ask, rng):
    ask(draw(rng, 5, 4), 2)
    ask(draw(rng, 2, 3, 6), 3)


@top_k_gates.property(
    "of equal logits the lower number",
    hint='Which kind of sort keeps equal numbers in their order (kind="stable"), and does a reversal keep it?',
)
def _(ask, rng):
    ask(np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 2.0]]), 2)
    ask(rng.integers(0, 3, (4, 40)).astype(float), 5)  # of few numbers every sort keeps the order


@top_k_gates.property("the rest is exactly 0, and a row sums to 1", hint="What does softmax make of minus infinity?")
def _(ask, rng):
    gates = ask(1e-3 * draw(rng, 6, 5), 2)
    if (gates != 0).sum(-1).max() > 2:
        raise Failed("more than k gates of a row are not 0")


@top_k_gates.property(
    "all at once: float32, large logits, ties, many axes",
    hint="Is the largest logit subtracted before exp, which float type comes back, and which of equal logits is chosen?",
)
def _(ask, rng):
    kept_dtype(ask, np.float32, draw(rng, 2, 3, 5).astype(np.float32), k=2)
    ask(np.round(1e4 * draw(rng, 2, 4, 6), -4).astype(np.float32), 3)
    ask(np.round(1e4 * draw(rng, 3, 1, 5), -4).astype(np.float32), 1)


def usual_gates(logits, k, *, over=None, order=None, spread=False, fill=-np.inf, axis=-1):
    """The gates in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    ranked = np.argsort(-logits, axis=axis, kind="stable") if order is None else order(logits)
    kept = np.zeros(logits.shape, bool)
    np.put_along_axis(kept, ranked[..., :k], True, axis=-1)
    scores = logits if over == "all" else np.where(kept, logits, fill)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    gates = powers / powers.sum(-1, keepdims=True)
    if spread:
        return np.where(kept, np.asarray(1 / k, logits.dtype), np.zeros_like(logits))
    return np.where(kept, gates, np.zeros_like(gates)) if fill == -np.inf else gates


top_k_gates.mistakes_of(
    usual_gates,
    {
        "The softmax runs over all logits: it has to run over the chosen, so that their gates sum to 1.": {
            "over": "all"
        },
        "The smallest logits are chosen: sort the other way.": {
            "order": lambda r: np.argsort(r, axis=-1, kind="stable")
        },
        "Of equal logits the higher number is chosen: reversing a sort turns ties round.": {
            "order": lambda r: np.argsort(r, axis=-1, kind="stable")[..., ::-1]
        },
        "All chosen experts get the same gate: the gates are the softmax of their logits.": {"spread": True},
        "Experts that were not chosen have a logit of 0, not minus infinity: exp(0) is 1.": {"fill": 0.0},
    },
)


@top_k_gates.mistake("exp overflows: subtract the largest logit of a row first.")
def _(logits, k):
    ranked = np.argsort(-logits, axis=-1, kind="stable")
    kept = np.zeros(logits.shape, bool)
    np.put_along_axis(kept, ranked[..., :k], True, axis=-1)
    powers = np.where(kept, np.exp(logits), 0)
    return powers / powers.sum(-1, keepdims=True)
