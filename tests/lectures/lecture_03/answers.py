"""Answers to the exercises of lecture 03 as learners write them: right ones, unlike the lecture's, and wrong ones.

WRONG pairs each wrong answer with words that the report must contain. The known mistakes of utils/exercises/lecture_03/
are further wrong answers.
"""

import math

import numpy as np

from tests.lectures.collect import collect
from tests.lectures.lecture_03 import answers_kernels as kernels_03

RIGHT, WRONG, right, wrong = collect(kernels_03)


# --- 3.1 -------------------------------------------------------------------------------------------------------------


@right("3.1")
def slopes_by_recursion(n_heads):
    if n_heads & (n_heads - 1) == 0:
        return np.array([2 ** (-8 * (i + 1) / n_heads) for i in range(n_heads)])
    smaller = 1 << (n_heads.bit_length() - 1)
    return np.append(slopes_by_recursion(smaller), slopes_by_recursion(2 * smaller)[0::2][: n_heads - smaller])


@wrong("3.1", "returned a list")
def slopes_as_a_list(n_heads):
    return [2 ** (-8 * (i + 1) / n_heads) for i in range(n_heads)]


@wrong("3.1", "count from 1")
def slopes_from_one(n_heads):
    power = 2 ** int(math.log2(n_heads))
    own, other = (2.0 ** (-8 * np.arange(n) / n) for n in (power, 2 * power))
    return np.concatenate([own, other[::2][: n_heads - power]])


@wrong("3.1", "meant for powers of two only")
def slopes_of_any_number(n_heads):
    return 2.0 ** (-8 * np.arange(1, n_heads + 1) / n_heads)


@wrong("3.1", "other powers of two")
def halves(n_heads):
    return 0.5 ** np.arange(1.0, n_heads + 1)


# --- 3.2 -------------------------------------------------------------------------------------------------------------


def angles_of(x, positions, frequencies):
    angles = positions[..., None] * frequencies
    while positions.ndim == 2 and angles.ndim < x.ndim:
        angles = angles[:, None]
    return angles


@right("3.2")
def rope_in_complex_numbers(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    n = len(frequencies)
    part = x[..., : 2 * n].astype(np.float64)
    a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else (part[..., :n], part[..., n:])
    z = (a + 1j * b) * attention_scale * np.exp(1j * angles_of(x, positions, frequencies))
    turned = np.stack([z.real, z.imag], axis=-1 if interleaved else -2).reshape(part.shape)
    return np.concatenate([turned, x[..., 2 * n :]], axis=-1).astype(x.dtype)


@right("3.2")
def rope_by_rotate_half(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    n = len(frequencies)
    order = np.arange(2 * n).reshape(n, 2).T.ravel() if interleaved else np.arange(2 * n)
    part = x[..., order].astype(np.float64)
    angles = np.concatenate([angles_of(x, positions, frequencies)] * 2, axis=-1)
    half = np.concatenate([-part[..., n:], part[..., :n]], axis=-1)
    out = x.copy()
    out[..., order] = attention_scale * (part * np.cos(angles) + half * np.sin(angles))
    return out


@wrong("3.2", "take both out of x")
def rope_overwritten(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    angles, n = angles_of(x, positions, frequencies), len(frequencies)
    cos, sin = attention_scale * np.cos(angles), attention_scale * np.sin(angles)
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(0, n), slice(n, 2 * n))
    out = x.astype(np.float64)
    out[..., first] = out[..., first] * cos - out[..., second] * sin
    out[..., second] = out[..., first] * sin + out[..., second] * cos
    return out.astype(x.dtype)


@wrong("3.2", "returned the shape")
def rope_without_the_rest(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    return rope_in_complex_numbers(x[..., : 2 * len(frequencies)], positions, frequencies, attention_scale, interleaved)


@wrong("3.2", "expected float32")
def rope_in_float64(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    return rope_in_complex_numbers(x.astype(np.float64), positions, frequencies, attention_scale, interleaved)


@wrong("3.2", "`x` in place")
def rope_in_place(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    x[...] = rope_in_complex_numbers(x, positions, frequencies, attention_scale, interleaved)
    return x


@wrong("3.2", "enters twice")
def rope_scaled_twice(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    return rope_in_complex_numbers(x, positions, frequencies, attention_scale**2, interleaved)


@wrong("3.2", "leading axes")
def rope_along_the_heads(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    turned = rope_in_complex_numbers
    if x.ndim < 3 or positions.ndim == 2:
        return turned(x, positions, frequencies, attention_scale, interleaved)
    heads = np.arange(x.shape[-3])
    return turned(x.swapaxes(-2, -3), heads, frequencies, attention_scale, interleaved).swapaxes(-2, -3)


# --- 3.3 -------------------------------------------------------------------------------------------------------------


@right("3.3")
def converted_by_an_index(w, n_heads):
    columns = np.arange(w.shape[1]).reshape(n_heads, -1)
    return w[:, np.concatenate([columns[:, 0::2], columns[:, 1::2]], axis=1).ravel()]


@wrong("3.3", "the way back")
def converted_back(w, n_heads):
    columns = np.arange(w.shape[1]).reshape(n_heads, 2, -1)
    return w[:, columns.swapaxes(1, 2).ravel()]


@wrong("3.3", "The heads are mixed")
def converted_across_heads(w, n_heads):
    return np.hstack([w[:, 0::2], w[:, 1::2]])


@wrong("3.3", "stand where they stood")
def unconverted(w, n_heads):
    return w.copy()


@wrong("3.3", "expected float32")
def converted_in_float64(w, n_heads):
    return converted_by_an_index(w, n_heads).astype(np.float64)


# --- 3.4 -------------------------------------------------------------------------------------------------------------


@right("3.4")
def shifted_in_complex_numbers(k, shift, frequencies, interleaved=False):
    return rope_in_complex_numbers(k, np.full(k.shape[-2], shift), frequencies, 1.0, interleaved)


@wrong("3.4", "turned by their places already")
def turned_anew(k, shift, frequencies, interleaved=False):
    return rope_in_complex_numbers(k, shift + np.arange(k.shape[-2]), frequencies, 1.0, interleaved)


@wrong("3.4", "the other way")
def moved_backwards(k, shift, frequencies, interleaved=False):
    return rope_in_complex_numbers(k, np.full(k.shape[-2], -shift), frequencies, 1.0, interleaved)


@wrong("3.4", "interleaved is not passed on")
def moved_by_halves(k, shift, frequencies, interleaved=False):
    return rope_in_complex_numbers(k, np.full(k.shape[-2], shift), frequencies)


# --- 3.5 -------------------------------------------------------------------------------------------------------------


@right("3.5")
def slowed_by_another_base(frequencies, factor):
    return frequencies * np.geomspace(1.0, 1.0 / factor, len(frequencies))


@wrong("3.5", "position interpolation")
def slowed_all(frequencies, factor):
    return frequencies / factor


@wrong("3.5", "not slow enough")
def slowed_by_the_width(frequencies, factor):
    return frequencies * factor ** (-np.arange(len(frequencies)) / len(frequencies))


@wrong("3.5", "equal factors")
def slowed_by_equal_steps(frequencies, factor):
    return frequencies / np.linspace(1, factor, len(frequencies))


@wrong("3.5", "not the slowing")
def slowed_to_other_ends(frequencies, factor):
    return np.geomspace(frequencies[0], frequencies[-1] / factor, len(frequencies))


@wrong("3.5", "made anew from a base of 10,000")
def slowed_from_ten_thousand(frequencies, factor):
    d = 2 * len(frequencies)
    return (10000.0 * factor ** (d / (d - 2))) ** (-np.arange(0, d, 2) / d)


# --- 3.6 -------------------------------------------------------------------------------------------------------------


@right("3.6")
def kept_by_interpolation(frequencies, length, slow, fast):
    return np.interp(frequencies * length / (2 * math.pi), [slow, fast], [0.0, 1.0])


@wrong("3.6", "a turn is 2 pi")
def kept_by_radians(frequencies, length, slow, fast):
    return np.interp(frequencies * length, [slow, fast], [0.0, 1.0])


@wrong("3.6", "upside down")
def kept_upside_down(frequencies, length, slow, fast):
    return np.interp(frequencies * length / (2 * math.pi), [slow, fast], [1.0, 0.0])


@wrong("3.6", "cut it off")
def kept_without_limits(frequencies, length, slow, fast):
    return (frequencies * length / (2 * math.pi) - slow) / (fast - slow)


@wrong("3.6", "There is no ramp")
def kept_or_not(frequencies, length, slow, fast):
    return np.where(frequencies * length / (2 * math.pi) >= fast, 1.0, 0.0)


# --- how the lecture calls them --------------------------------------------------------------------------------------

some = np.random.default_rng(0).standard_normal
CALLS = {
    "3.1": [((8,), {}), ((12,), {}), ((3,), {})],
    "3.2": [
        ((some((5, 16)), np.array([0, 1, 2, 3, 1000]), np.ones(8)), {"interleaved": True}),
        ((some((2, 3, 7, 16)), np.stack([np.arange(7), 100 + np.arange(7)]), np.ones(8)), {}),
        ((some((3, 16)), np.arange(3), np.ones(4)), {}),
        ((some((8, 40, 64)).astype(np.float32), np.arange(40), np.ones(32)), {}),
    ],
    "3.3": [((some((32, 32)), 2), {})],
    "3.4": [((some((4, 16)), -50, np.ones(8)), {})],
    "3.5": [((np.array([1.0, 0.1, 0.01]), 4), {}), ((np.ones(8), 13.0), {})],
    "3.6": [((np.array([1.0, 0.1, 0.01]), 64, 1, 32), {}), ((np.array([1.0, 0.1]), 64, 0.25, 1), {})],
}
