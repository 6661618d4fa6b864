"""Lecture 10: the selective scan. The oracle unrolls it: each output is a sum over the tokens before it."""

import numpy as np

from utils.exercises.arrays import draw, kept_dtype
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "linear"


@exercise("10D", MODULE, returns=("y", "h"), importance="essential")
def scan(x, delta, a, b, c, h):
    x, delta, a, b, c, h = (np.asarray(array, float) for array in (x, delta, a, b, c, h))
    y, last = np.zeros(x.shape), np.zeros(h.shape)
    total = np.cumsum(delta, axis=1)  # (batch, n, channels)
    for t in range(x.shape[1] + 1):
        at = min(t, x.shape[1] - 1)
        state = h * np.exp(total[:, at, :, None] * a) if x.shape[1] else h.copy()
        for j in range(min(t, at) + 1 if x.shape[1] else 0):
            fading = np.exp((total[:, at] - total[:, j])[..., None] * a)
            state = state + fading * (delta[:, j] * x[:, j])[..., None] * b[:, j, None]
        if t < x.shape[1]:
            y[:, t] = np.einsum("bcs,bs->bc", state, c[:, t])
        else:
            last = state
    return y, last


def inputs(rng, batch=1, n=3, channels=2, d_state=2, begin=False, size=1.0):
    delta = rng.integers(1, 10, (batch, n, channels)) / 10
    a = -rng.integers(1, 20, (channels, d_state)) / 10
    h = draw(rng, batch, channels, d_state) if begin else np.zeros((batch, channels, d_state))
    return size * draw(rng, batch, n, channels), delta, a, draw(rng, batch, n, d_state), draw(rng, batch, n, d_state), h


@scan.property(
    "one token: a step writes, c reads",
    hint="What is added to the state, and over which axis is the product with c summed?",
)
def _(ask, rng):
    one = np.ones((1, 1, 1))
    ask(3 * one, 0.5 * one, np.array([[-1.0]]), 2 * one, 4 * one, np.zeros((1, 1, 1)))
    ask(*inputs(rng, n=1))


@scan.property("several tokens: the state fades and is read", hint="Which power of e does the state get at each step?")
def _(ask, rng):
    ask(*inputs(rng, n=2, channels=1, d_state=1))
    ask(*inputs(rng, n=4, channels=3))
    ask(*inputs(rng, n=5, channels=2, d_state=4))


@scan.property(
    "a state that is handed in, and the one handed back",
    hint="With which state does the loop begin, and which is returned?",
)
def _(ask, rng):
    ask(*inputs(rng, n=1, begin=True))
    ask(*inputs(rng, n=4, begin=True))


@scan.property(
    "each text, channel and state has its own",
    hint="Which of the arrays have an axis for the text, and which share one?",
)
def _(ask, rng):
    ask(*inputs(rng, batch=3, n=3, channels=2, d_state=2, begin=True))
    ask(*inputs(rng, batch=2, n=4, channels=4, d_state=4, begin=True))


@scan.property(
    "all at once: float32, axes of size 1, large numbers, 60 tokens",
    hint="Which float type has the array that you fill?",
)
def _(ask, rng):
    ask(*inputs(rng, batch=2, n=60, channels=1, d_state=3, begin=True, size=1000.0))
    kept_dtype(ask, np.float32, *inputs(rng, batch=2, n=7, channels=3, begin=True))
    kept_dtype(ask, np.float32, *inputs(rng, batch=1, n=5, channels=1, d_state=1, begin=True))


@scan.property("no array as large as all states", hint="How many states does the loop need at the same time?")
def _(ask, rng):
    given = inputs(rng, batch=1, n=300, channels=8, d_state=16)
    made = ask.memory(*given)
    if made > 6 * given[0].nbytes + 40 * given[5].nbytes:
        raise Failed(f"{made:,} bytes were taken at once; all states would be {300 * given[5].nbytes:,}")


def usual(
    x, delta, a, b, c, h, *, euler=True, fade=True, late=False, given=True, sign=1, handed=True, mixed=False, use=True,
    turned=False, power=True,
):  # fmt: skip
    """The scan in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    first, y = h, np.zeros_like(x)
    h, b, c = h if given else np.zeros_like(h), c if turned else b, b if turned else c
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        decay = np.exp(sign * step * a) if fade else np.exp(a)
        decay = decay if power else 1 + step * a
        weight = step if euler else (decay - 1) / a
        written = (weight if use else 1) * b[:, t, None] * x[:, t, :, None]
        read = h
        h = decay * (h + written) if mixed else decay * h + written
        y[:, t] = ((read if late else h) * c[:, t, None]).sum(-1)
    return y, h if handed else first


scan.mistakes_of(
    usual,
    {
        "The input is written with a zero-order hold: here it is Euler's step, delta b x.": {"euler": False},
        "The state fades by exp(a): delta belongs into the exponent.": {"fade": False},
        "The sign of the exponent is turned: a is negative already.": {"sign": -1},
        "y reads the state before the token was written.": {"late": True},
        "The state that was handed in is not used.": {"given": False},
        "The state that comes back is the first one.": {"handed": False},
        "What is written fades at once: first fade, then write.": {"mixed": True},
        "delta is missing from what is written.": {"use": False},
        "b and c are exchanged: b writes, c reads.": {"turned": True},
        "The state fades by 1 + delta a: here it is the exponential of delta a.": {"power": False},
    },
)
