"""Lecture 10: one step of a linear memory. The oracle goes one entry at a time."""

import numpy as np

from utils.exercises.arrays import draw, kept_dtype
from utils.judge.function import exercise

MODULE = "linear"


@exercise("10C", MODULE, importance="essential")
def memory_step(state, k, v, decay, beta, erase):
    d_k, d_v = state.shape[-2:]
    lead = np.broadcast_shapes(state.shape[:-2], k.shape[:-1], v.shape[:-1], decay.shape[:-1], beta.shape[:-1])
    decay = np.broadcast_to(decay, (*lead, d_k)).astype(float)
    beta = np.broadcast_to(beta, (*lead, 1)).astype(float)
    state = np.broadcast_to(state, (*lead, d_k, d_v))
    k, v = np.broadcast_to(k, (*lead, d_k)).astype(float), np.broadcast_to(v, (*lead, d_v)).astype(float)
    out = np.zeros((*lead, d_k, d_v))
    for at in np.ndindex(*lead):
        for j in range(d_v):
            column = [float(decay[at][i] * state[at][i, j]) for i in range(d_k)]
            told = sum(column[i] * k[at][i] for i in range(d_k)) if erase else 0.0
            out[at][:, j] = [column[i] + beta[at][0] * k[at][i] * (v[at][j] - told) for i in range(d_k)]
    return out


def inputs(rng, lead=(), d_k=3, d_v=2, one_decay=False, size=1.0):
    decay, beta = (rng.integers(1, 10, (*lead, n)) / 10 for n in (1 if one_decay else d_k, 1))
    return size * draw(rng, *lead, d_k, d_v), draw(rng, *lead, d_k), draw(rng, *lead, d_v), decay, beta


def plain(rng, **sizes):
    """Nothing decays, all is written."""
    state, k, v, decay, beta = inputs(rng, **sizes)
    return state, k, v, np.ones_like(decay), np.ones_like(beta)


@memory_step.property(
    "a key and its value are added", hint="The outer product has as many rows as the key has numbers."
)
def _(ask, rng):
    ask(np.zeros((2, 2)), np.array([1.0, 0.0]), np.array([3.0, 4.0]), np.ones(2), np.ones(1), False)
    ask(*plain(rng), False)


@memory_step.property(
    "decay: one number, or one for each row",
    hint="Which axis of the state belongs to the key: what does decay have to meet?",
)
def _(ask, rng):
    state, k, v, decay, _ = inputs(rng, d_k=2, d_v=2)
    ask(state, k, v, decay, np.ones(1), False)
    ask(*inputs(rng, one_decay=True)[:4], np.ones(1), False)


@memory_step.property("beta: how much is written", hint="Does beta reach the new part only?")
def _(ask, rng):
    state, k, v, _, beta = inputs(rng)
    ask(state, k, v, np.ones(3), beta, False)
    ask(state, k, v, np.ones(3), 0 * beta, True)


@memory_step.property(
    "erase: what the memory answers already is taken off", hint="The answer to k is a sum over which axis of the state?"
)
def _(ask, rng):
    state, k, v, *_ = plain(rng)
    ask(np.array([[5.0, 0.0], [0.0, 7.0]]), np.array([1.0, 0.0]), np.array([3.0, 4.0]), np.ones(2), np.ones(1), True)
    ask(state, k, v, np.ones(3), np.ones(1), True)


@memory_step.property(
    "decay, beta and erase together", hint="Is the answer that is taken off the one before or after the decay?"
)
def _(ask, rng):
    ask(*inputs(rng), True)
    ask(*inputs(rng, d_k=5, d_v=1, one_decay=True), True)


@memory_step.property(
    "leading axes, all at once: float32, large numbers, axes of size 1",
    hint="Do the new axes stand at the end, so that any number of axes may stand in front?",
)
def _(ask, rng):
    ask(*inputs(rng, (2,), d_k=2, d_v=2), True)
    ask(*inputs(rng, (2,)), True)
    ask(*inputs(rng, (2, 3), size=1000.0), True)
    ask(*inputs(rng, (2, 1), d_k=1, d_v=1, size=1000.0), True)
    ask(*inputs(rng, (3,), one_decay=True), False)
    for lead in ((2, 1), ()):
        kept_dtype(ask, np.float32, *inputs(rng, lead, one_decay=bool(lead)), erase=True)
        kept_dtype(ask, np.float32, *inputs(rng, lead), erase=False)


def usual(
    state, k, v, decay, beta, erase, *, order="first", sign=1, on=True, always=False, wide=False, written=True,
    after=False,
):  # fmt: skip
    """The step in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    faded = decay[..., None] * state
    seen = state if order == "before" else faded
    told = (k[..., None, :] @ seen)[..., 0, :] if (erase and on) or always else np.zeros_like(v)
    new = (beta * v - sign * told) if wide else beta * (v - sign * told)
    if not written:
        new = v - told
    return faded + (decay[..., None] if after else 1) * k[..., None] * new[..., None, :]


memory_step.mistakes_of(
    usual,
    {
        "The error is measured before the decay: decay first, then ask the memory.": {"order": "before"},
        "The answer is added instead of taken off.": {"sign": -1},
        "Nothing is erased: with erase the memory's own answer is taken off the value.": {"on": False},
        "beta multiplies the value only: it multiplies the difference.": {"wide": True},
        "beta is not used.": {"written": False},
        "It always erases: only where erase is true.": {"always": True},
        "What is written fades too: only the old state does.": {"after": True},
    },
)


@memory_step.mistake("decay meets the columns of the state: it belongs to the key's axis, the rows.")
def _(state, k, v, decay, beta, erase):
    faded = np.broadcast_to(decay, k.shape)[..., None, :] * state
    told = (k[..., None, :] @ faded)[..., 0, :] if erase else 0
    return faded + k[..., None] * (beta * (v - told))[..., None, :]


@memory_step.mistake("The error is measured in the old state and nothing decays: decay is not used.")
def _(state, k, v, decay, beta, erase):
    return usual(state, k, v, np.ones_like(decay), beta, erase)
