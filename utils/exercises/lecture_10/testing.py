"""Lecture 10: a test of a stream that hands its state over, tried on right ones and on streams with one bug each."""

import numpy as np

from utils.judge.bug import bug

MODULE = "linear"


def piece(
    x, delta, a, b, c, kernel, state=None, *, tail_kept=True, h_kept=True, width_off=0, convolved=False, euler=True,
    late=False, turned=False, one_kernel=False, short=True, first=False,
):  # fmt: skip
    """A piece with a place for each bug, in what follows the `*`; as it stands, it is right."""
    width, n = kernel.shape[1], x.shape[1]
    if state is None:
        state = np.zeros((len(x), width - 1, x.shape[2])), np.zeros((len(x), *a.shape))
    tail, h = state
    used = np.repeat(kernel[:1], len(kernel), axis=0) if one_kernel else kernel[:, ::-1] if turned else kernel
    seen = np.concatenate([tail, x], axis=1)
    u = sum(used[:, i] * seen[:, i : i + n] for i in range(width))
    y = np.zeros_like(x)
    for t in range(n):
        step = delta[:, t, :, None]
        before, decay = h, np.exp(step * a)
        h = decay * h + (step if euler else (decay - 1) / a) * b[:, t, None] * u[:, t, :, None]
        y[:, t] = ((before if late else h) * c[:, t, None]).sum(-1)
    if convolved:
        new = np.concatenate([tail, u], axis=1)[:, n:]
    elif not short:  # only what this piece has
        new = np.concatenate([np.zeros_like(tail), x], axis=1)[:, n:]
    else:
        new = seen[:, n - width_off : n - width_off + width - 1] if n >= width_off else seen[:, : width - 1]
    if not tail_kept:
        new = np.zeros_like(tail)
    return y, (tail if first else new, h if h_kept else np.zeros_like(h))


@bug("10F", MODULE, subject="stream", importance="useful")
def test_stream(stream):
    rng = np.random.default_rng(1)
    x, delta = rng.standard_normal((2, 8, 2)), rng.uniform(0.1, 1, (2, 8, 2))
    b, c, a = rng.standard_normal((2, 8, 3)), rng.standard_normal((2, 8, 3)), -rng.uniform(0.5, 2, (2, 3))
    kernel = rng.standard_normal((2, 4))
    expected, _ = piece(x, delta, a, b, c, kernel)
    for cuts in ([0, 8], [0, 5, 6, 7, 8], [0, 1, 2, 8]):
        state = None
        for i, j in zip(cuts, cuts[1:]):
            y, state = stream(x[:, i:j], delta[:, i:j], a, b[:, i:j], c[:, i:j], kernel, state)
            assert np.allclose(y, expected[:, i:j])


@test_stream.right
def _(x, delta, a, b, c, kernel, state=None):
    return piece(x, delta, a, b, c, kernel, state)


@test_stream.right
def _(x, delta, a, b, c, kernel, state=None):
    """One token at a time, and a state of another form: a dictionary."""
    batch, n, channels = x.shape
    state = dict(state or {"h": np.zeros((batch, *a.shape)), "past": []})
    out = np.empty(x.shape)
    for t in range(n):
        state["past"] = [*state["past"], x[:, t]][-kernel.shape[1] :]
        u = sum(old * kernel[:, -1 - i] for i, old in enumerate(reversed(state["past"])))
        state["h"] = np.exp(delta[:, t, :, None] * a) * state["h"] + (delta[:, t] * u)[..., None] * b[:, t, None]
        out[:, t] = np.einsum("bcs,bs->bc", state["h"], c[:, t])
    return out, state


CUT = "Is a text cut into pieces, and is each piece compared?"
MUTANTS = {
    "the convolution starts anew with each piece": ({"tail_kept": False}, CUT),
    "the scan starts anew with each piece": ({"h_kept": False}, CUT),
    "a piece shorter than the kernel drops older inputs": (
        {"short": False},
        "Is one of your pieces shorter than the kernel?",
    ),
    "the tail that is handed over is one token old": ({"width_off": 1}, CUT),
    "the tail holds what was convolved, not the inputs": ({"convolved": True}, CUT),
    "the first tail is handed on for ever": ({"first": True}, CUT),
    "the input is written with a zero-order hold": (
        {"euler": False},
        "Do you compare with a loop of your own, in one piece too?",
    ),
    "the output reads the state before the token": (
        {"late": True},
        "Do you compare with a loop of your own, in one piece too?",
    ),
    "the kernel is turned": ({"turned": True}, "Do you compare with a loop of your own, in one piece too?"),
    "all channels use the first kernel": ({"one_kernel": True}, "Has each channel of your test a kernel of its own?"),
}


for name, (changes, hint) in MUTANTS.items():

    def wrong(x, delta, a, b, c, kernel, state=None, changes=changes):
        return piece(x, delta, a, b, c, kernel, state, **changes)

    test_stream.mutant(name, hint=hint)(wrong)
