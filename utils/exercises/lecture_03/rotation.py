"""Lecture 03: RoPE and its two pairings.

The oracles turn one pair at a time, as a complex number, in Python's own arithmetic."""

import cmath
from functools import partial

import numpy as np

from utils.exercises.arrays import draw
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "rotary"


# --- 3A --------------------------------------------------------------------------------------------------------------


@exercise("3A", MODULE, formerly="3.2", importance="essential")
def apply_rope_numpy(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    out = x.astype(np.float64)
    for place in np.ndindex(*x.shape[:-1]):
        position = positions[place[-1]] if positions.ndim == 1 else positions[place[0], place[-1]]
        for i, frequency in enumerate(frequencies):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + len(frequencies))
            z = complex(out[place][first], out[place][second])
            z *= attention_scale * cmath.exp(1j * float(position) * float(frequency))
            out[place][first], out[place][second] = z.real, z.imag
    return out.astype(np.result_type(x, np.float16))


def rope_input(rng, *shape, n_pairs=None, positions=None):
    n_pairs = shape[-1] // 2 if n_pairs is None else n_pairs
    frequencies = np.array([1.0, 0.5, 0.2, 0.1, 0.05, 0.02])[:n_pairs]
    return draw(rng, *shape), np.arange(shape[-2]) if positions is None else np.array(positions), frequencies


@apply_rope_numpy.property(
    "pair (i, i + n_pairs) turned by position * frequency",
    hint="Which two columns are a pair? In which of the two lines does the sine have a minus?",
)
def _(ask, rng):
    ask(np.array([[1.0, 0.0]]), np.array([2]), np.array([0.5]))
    ask(*rope_input(rng, 2, 4, positions=[1, 5]))
    ask(*rope_input(rng, 3, 8))


@apply_rope_numpy.property(
    "interleaved: pairs are the columns (2i, 2i + 1)",
    hint="Which slices does `pair_slices` give with interleaved=True? Where are a and b written back?",
)
def _(ask, rng):
    ask(*rope_input(rng, 2, 4, positions=[1, 5]), interleaved=True)
    ask(*rope_input(rng, 3, 8), interleaved=True)


@apply_rope_numpy.property(
    "columns beyond the pairs stay as they are",
    hint="What does your result hold where no pair is?",
)
def _(ask, rng):
    ask(*rope_input(rng, 2, 6, n_pairs=2, positions=[1, 5]))
    ask(*rope_input(rng, 2, 7, n_pairs=2, positions=[3, 4]), interleaved=True)


@apply_rope_numpy.property(
    "attention_scale multiplies what is rotated, and nothing else",
    hint="Where does the scale enter: in x, or in cosine and sine?",
)
def _(ask, rng):
    ask(*rope_input(rng, 2, 4, positions=[1, 5]), attention_scale=2.0)
    ask(*rope_input(rng, 2, 6, n_pairs=2, positions=[1, 5]), attention_scale=2.0)


@apply_rope_numpy.property(
    "leading axes, and positions for each text of a batch",
    hint="Which shape do the angles have, and which a and b?",
)
def _(ask, rng):
    ask(*rope_input(rng, 2, 3, 4, positions=[4, 5, 6]))
    ask(*rope_input(rng, 2, 2, 3, 4, positions=[[0, 1, 2], [7, 8, 9]]))
    ask(*rope_input(rng, 2, 3, 4, positions=[[0, 1, 2], [7, 8, 9]]), interleaved=True)


@apply_rope_numpy.property(
    "position 100,000 is as precise as position 1",
    hint="In which float type is position times frequency formed?",
)
def _(ask, rng):
    ask(*rope_input(rng, 2, 4, positions=[99_999, 100_000]))


@apply_rope_numpy.property(
    "the float type of x is kept",
    hint="In which type are cosine and sine, and what do they make of x?",
)
def _(ask, rng):
    for dtype in (np.float32, np.float16):
        x, positions, frequencies = rope_input(rng, 2, 4, positions=[1, 5])
        result = ask(x.astype(dtype), positions, frequencies)
        if result.dtype != dtype:
            raise Failed(f"returned {result.dtype}, expected {dtype.__name__} for an x of {dtype.__name__}")


@apply_rope_numpy.property(
    "all at once: a batch's positions, both pairings, a scale, columns beyond, an axis of 1, float32",
    hint="Which two of the options do not work together?",
)
def _(ask, rng):
    x, positions, frequencies = rope_input(rng, 2, 1, 3, 7, n_pairs=3, positions=[[0, 4, 1], [70, 2, 9]])
    for interleaved in (True, False):
        ask(x, positions, frequencies, 1.3, interleaved)
        ask(x.astype(np.float32), positions, frequencies, 1.3, interleaved)
    ask(1e4 * x[:, 0, :1], positions[:, :1], frequencies[:1], 0.5, True)


def usual_angles(x, positions, frequencies):
    angles = positions[..., None].astype(np.float64) * frequencies
    return angles.reshape(len(x), *[1] * (x.ndim - 3), *angles.shape[1:]) if positions.ndim == 2 else angles


def slices(n_pairs, interleaved):
    if interleaved:
        return slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2)
    return slice(0, n_pairs), slice(n_pairs, 2 * n_pairs)


def forwards(a, b, cos, sin):
    return a * cos - b * sin, a * sin + b * cos


def usual_rope(
    x,
    positions,
    frequencies,
    attention_scale=1.0,
    interleaved=False,
    *,
    angles=usual_angles,
    paired=slices,
    written=slices,
    turned=forwards,
    rest=1.0,
    power=1,
    dtype=None,
):
    """RoPE in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    angle = angles(x, positions, frequencies)
    factor = attention_scale**power
    n_pairs = len(frequencies)
    first, second = paired(n_pairs, interleaved)
    a, b = turned(x[..., first], x[..., second], factor * np.cos(angle), factor * np.sin(angle))
    out = x * (attention_scale if rest is None else rest)
    out = out.astype(np.float64)
    first, second = written(n_pairs, interleaved)
    out[..., first], out[..., second] = a, b
    return out.astype(dtype or x.dtype)


def overwritten(a, b, cos, sin):
    a = a * cos - b * sin
    return a, a * sin + b * cos


def neighbours_share(x, positions, frequencies):
    """Angles repeated for neighbouring columns, where halves are turned."""
    doubled = np.repeat(usual_angles(x, positions, frequencies), 2, axis=-1)
    return doubled[..., : len(frequencies)]


for message, change in {
    "It turns the wrong way: (a cos - b sin, a sin + b cos).": {
        "turned": lambda a, b, cos, sin: (a * cos + b * sin, b * cos - a * sin)
    },
    "The second line uses the first member after it was turned: take both out of x before you write either.": {
        "turned": overwritten
    },
    "interleaved is ignored: with it, pairs are the columns (2i, 2i + 1).": {
        "paired": lambda n, i: slices(n, False),
        "written": lambda n, i: slices(n, False),
    },
    "It always pairs neighbours: without interleaved, pairs are the columns (i, i + n_pairs).": {
        "paired": lambda n, i: slices(n, True),
        "written": lambda n, i: slices(n, True),
    },
    "Interleaved pairs are written back as two halves: put each member where it came from.": {
        "written": lambda n, i: slices(n, False)
    },
    "The columns beyond the pairs are lost: they stay as they are.": {"rest": 0.0},
    "attention_scale multiplies only what is rotated, not the other columns.": {"rest": None},
    "attention_scale is ignored: it multiplies what is rotated.": {"power": 0},
    "attention_scale enters twice: it is in cos and sin already.": {"power": 2},
    "positions is ignored: 0, 1, 2 ... is right only for a text that begins here.": {
        "angles": lambda x, positions, f: np.arange(x.shape[-2])[:, None] * f
    },
    "The position enters twice: the angle is position times frequency.": {
        "angles": lambda x, positions, f: usual_angles(x, positions**2, f)
    },
    "cos and sin are repeated for neighbours, but the halves are turned: the angle belongs to a pair.": {
        "angles": neighbours_share
    },
    "The angle was rounded to single precision: at position 100,000 that costs three digits of the cosine.": {
        "angles": lambda x, positions, f: usual_angles(x, positions, f).astype(np.float32).astype(np.float64)
    },
    "The sign of b is lost: a sin + b cos, but a cos MINUS b sin.": {
        "turned": lambda a, b, cos, sin: (a * cos + b * sin, a * sin + b * cos)
    },
}.items():
    apply_rope_numpy.mistake(message)(partial(usual_rope, **change))


@apply_rope_numpy.mistake("The second member stands n_pairs columns after the first, not half of all columns.")
def _(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    half = lambda n, i: slices(n, i) if i else (slice(0, n), slice(x.shape[-1] // 2, x.shape[-1] // 2 + n))  # noqa: E731
    return usual_rope(x, positions, frequencies, attention_scale, interleaved, paired=half, written=half)


@apply_rope_numpy.mistake("attention_scale is ignored when the pairs are interleaved: it multiplies what is rotated.")
def _(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    return usual_rope(x, positions, frequencies, 1.0 if interleaved else attention_scale, interleaved)


# --- 3C --------------------------------------------------------------------------------------------------------------


@exercise("3C", MODULE, formerly="3.3", importance="useful")
def interleaved_to_half_split(w, n_heads):
    out, d_head = np.empty_like(w), w.shape[-1] // n_heads
    for head in range(n_heads):
        for i in range(d_head // 2):
            out[:, head * d_head + i] = w[:, head * d_head + 2 * i]
            out[:, head * d_head + d_head // 2 + i] = w[:, head * d_head + 2 * i + 1]
    return out


def numbered(d_model, columns):
    """Weights that name their place: row.column."""
    return np.arange(d_model)[:, None] + np.arange(columns) / 100


@interleaved_to_half_split.property(
    "one head of 4 columns: 0, 2, 1, 3",
    hint="Which columns hold the first members of the pairs, in the given order?",
)
def _(ask, rng):
    ask(numbered(4, 4), 1)


@interleaved_to_half_split.property(
    "one head of 6 and of 8 columns",
    hint="How many pairs has a head of 6 columns?",
)
def _(ask, rng):
    ask(numbered(2, 6), 1)
    ask(numbered(3, 8), 1)


@interleaved_to_half_split.property(
    "each head by itself",
    hint="Which axis of your reshape is the head, and does it stay in front?",
)
def _(ask, rng):
    ask(numbered(2, 12), 2)
    ask(draw(rng, 5, 24), 3)


@interleaved_to_half_split.property(
    "more rows than columns, and a square",
    hint="Which axis of w holds the columns of the heads?",
)
def _(ask, rng):
    ask(draw(rng, 9, 6), 1)
    ask(numbered(8, 8), 1)


@interleaved_to_half_split.property(
    "the float type of w is kept",
    hint="Which function of yours makes new numbers, where moving them would do?",
)
def _(ask, rng):
    result = ask(draw(rng, 2, 6).astype(np.float32), 1)
    if result.dtype != np.float32:
        raise Failed(f"returned {result.dtype}, expected float32 for weights of float32")


@interleaved_to_half_split.property("one row, as many heads as pairs", hint="Which axes may have the size 1?")
def _(ask, rng):
    ask(draw(rng, 1, 12).astype(np.float32), 3)
    ask(draw(rng, 4, 6), 3)


@interleaved_to_half_split.mistake("This is the way back: it makes interleaved weights out of half-split ones.")
def _(w, n_heads):
    return w.reshape(len(w), n_heads, 2, -1).swapaxes(-1, -2).reshape(w.shape)


@interleaved_to_half_split.mistake("The heads are mixed: take the columns apart within each head.")
def _(w, n_heads):
    return np.concatenate([w[:, ::2], w[:, 1::2]], axis=1)


@interleaved_to_half_split.mistake("The second members stand first: first all first members, then all second ones.")
def _(w, n_heads):
    heads = w.reshape(len(w), n_heads, -1)
    return np.concatenate([heads[..., 1::2], heads[..., ::2]], axis=-1).reshape(w.shape)


@interleaved_to_half_split.mistake("The rows are reordered: it is the columns, because the weights are used as x @ w.")
def _(w, n_heads):
    return interleaved_to_half_split.oracle(w.T, n_heads).T


@interleaved_to_half_split.mistake("The columns stand where they stood.")
def _(w, n_heads):
    return w


@interleaved_to_half_split.mistake("The heads are an axis of the result: put them side by side in the columns again.")
def _(w, n_heads):
    return w.reshape(len(w), n_heads, -1, 2).swapaxes(-1, -2).reshape(len(w), n_heads, -1)
