"""Answers to the exercises of lecture 03 as learners write them: right ones, unlike the lecture's, and wrong ones.

WRONG pairs each wrong answer with words that the report must contain. The known mistakes of utils/exercises/lecture_03/
are further wrong answers. Those in PyTorch and in CUDA stand in files of their own.
"""

import math

import numpy as np

from tests.lectures.collect import collect
from tests.lectures.lecture_03 import answers_kernels, answers_torch

RIGHT, WRONG, right, wrong = collect(answers_kernels, answers_torch)


# --- 3H --------------------------------------------------------------------------------------------------------------


@right("3H")
def slopes_by_recursion(n_heads):
    if n_heads & (n_heads - 1) == 0:
        return np.array([2 ** (-8 * (i + 1) / n_heads) for i in range(n_heads)])
    smaller = 1 << (n_heads.bit_length() - 1)
    return np.append(slopes_by_recursion(smaller), slopes_by_recursion(2 * smaller)[0::2][: n_heads - smaller])


@wrong("3H", "returned a list")
def slopes_as_a_list(n_heads):
    return [2 ** (-8 * (i + 1) / n_heads) for i in range(n_heads)]


@wrong("3H", "count from 1")
def slopes_from_one(n_heads):
    power = 2 ** int(math.log2(n_heads))
    own, other = (2.0 ** (-8 * np.arange(n) / n) for n in (power, 2 * power))
    return np.concatenate([own, other[::2][: n_heads - power]])


@wrong("3H", "meant for powers of two only")
def slopes_of_any_number(n_heads):
    return 2.0 ** (-8 * np.arange(1, n_heads + 1) / n_heads)


@wrong("3H", "other powers of two")
def halves(n_heads):
    return 0.5 ** np.arange(1.0, n_heads + 1)


# --- 3A --------------------------------------------------------------------------------------------------------------


def angles_of(x, positions, frequencies):
    angles = positions[..., None] * frequencies
    while positions.ndim == 2 and angles.ndim < x.ndim:
        angles = angles[:, None]
    return angles


@right("3A")
def rope_in_complex_numbers(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    n = len(frequencies)
    part = x[..., : 2 * n].astype(np.float64)
    a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else (part[..., :n], part[..., n:])
    z = (a + 1j * b) * attention_scale * np.exp(1j * angles_of(x, positions, frequencies))
    turned = np.stack([z.real, z.imag], axis=-1 if interleaved else -2).reshape(part.shape)
    return np.concatenate([turned, x[..., 2 * n :]], axis=-1).astype(x.dtype)


@right("3A")
def rope_by_rotate_half(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    n = len(frequencies)
    order = np.arange(2 * n).reshape(n, 2).T.ravel() if interleaved else np.arange(2 * n)
    part = x[..., order].astype(np.float64)
    angles = np.concatenate([angles_of(x, positions, frequencies)] * 2, axis=-1)
    half = np.concatenate([-part[..., n:], part[..., :n]], axis=-1)
    out = x.copy()
    out[..., order] = attention_scale * (part * np.cos(angles) + half * np.sin(angles))
    return out


@wrong("3A", "take both out of x")
def rope_overwritten(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    angles, n = angles_of(x, positions, frequencies), len(frequencies)
    cos, sin = attention_scale * np.cos(angles), attention_scale * np.sin(angles)
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(0, n), slice(n, 2 * n))
    out = x.astype(np.float64)
    out[..., first] = out[..., first] * cos - out[..., second] * sin
    out[..., second] = out[..., first] * sin + out[..., second] * cos
    return out.astype(x.dtype)


@wrong("3A", "returned the shape")
def rope_without_the_rest(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    return rope_in_complex_numbers(x[..., : 2 * len(frequencies)], positions, frequencies, attention_scale, interleaved)


@wrong("3A", "expected float32")
def rope_in_float64(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    return rope_in_complex_numbers(x.astype(np.float64), positions, frequencies, attention_scale, interleaved)


@wrong("3A", "`x` in place")
def rope_in_place(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    x[...] = rope_in_complex_numbers(x, positions, frequencies, attention_scale, interleaved)
    return x


@wrong("3A", "enters twice")
def rope_scaled_twice(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    return rope_in_complex_numbers(x, positions, frequencies, attention_scale**2, interleaved)


@wrong("3A", "not half of all columns")
def rope_in_halves_of_all(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    n, half = len(frequencies), x.shape[-1] // 2
    if interleaved:
        return rope_in_complex_numbers(x, positions, frequencies, attention_scale, interleaved)
    angles, out = angles_of(x, positions, frequencies), x.copy()
    cos, sin = attention_scale * np.cos(angles), attention_scale * np.sin(angles)
    a, b = x[..., :n], x[..., half : half + n]
    out[..., :n], out[..., half : half + n] = a * cos - b * sin, a * sin + b * cos
    return out


@wrong("3A", "leading axes")
def rope_along_the_heads(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    turned = rope_in_complex_numbers
    if x.ndim < 3 or positions.ndim == 2:
        return turned(x, positions, frequencies, attention_scale, interleaved)
    heads = np.arange(x.shape[-3])
    return turned(x.swapaxes(-2, -3), heads, frequencies, attention_scale, interleaved).swapaxes(-2, -3)


# --- 3C --------------------------------------------------------------------------------------------------------------


@right("3C")
def converted_by_an_index(w, n_heads):
    columns = np.arange(w.shape[1]).reshape(n_heads, -1)
    return w[:, np.concatenate([columns[:, 0::2], columns[:, 1::2]], axis=1).ravel()]


@wrong("3C", "the way back")
def converted_back(w, n_heads):
    columns = np.arange(w.shape[1]).reshape(n_heads, 2, -1)
    return w[:, columns.swapaxes(1, 2).ravel()]


@wrong("3C", "The heads are mixed")
def converted_across_heads(w, n_heads):
    return np.hstack([w[:, 0::2], w[:, 1::2]])


@wrong("3C", "stand where they stood")
def unconverted(w, n_heads):
    return w.copy()


@wrong("3C", "expected float32")
def converted_in_float64(w, n_heads):
    return converted_by_an_index(w, n_heads).astype(np.float64)


# --- 3F --------------------------------------------------------------------------------------------------------------


@right("3F")
def kept_by_interpolation(frequencies, length, slow, fast):
    return np.interp(frequencies * length / (2 * math.pi), [slow, fast], [0.0, 1.0])


@wrong("3F", "a turn is 2 pi")
def kept_by_radians(frequencies, length, slow, fast):
    return np.interp(frequencies * length, [slow, fast], [0.0, 1.0])


@wrong("3F", "upside down")
def kept_upside_down(frequencies, length, slow, fast):
    return np.interp(frequencies * length / (2 * math.pi), [slow, fast], [1.0, 0.0])


@wrong("3F", "cut it off")
def kept_without_limits(frequencies, length, slow, fast):
    return (frequencies * length / (2 * math.pi) - slow) / (fast - slow)


@wrong("3F", "at one end only")
def kept_below_one(frequencies, length, slow, fast):
    return np.minimum(1.0, (frequencies * length / (2 * math.pi) - slow) / (fast - slow))


@wrong("3F", "at one end only")
def kept_above_zero(frequencies, length, slow, fast):
    return np.maximum(0.0, (frequencies * length / (2 * math.pi) - slow) / (fast - slow))


@wrong("3F", "There is no ramp")
def kept_or_not(frequencies, length, slow, fast):
    return np.where(frequencies * length / (2 * math.pi) >= fast, 1.0, 0.0)


# --- 3B --------------------------------------------------------------------------------------------------------------


def complex_rows(x, positions, frequencies):
    """One token and one pair at a time."""
    out = x.astype(float)
    n = len(frequencies)
    for place in np.ndindex(*x.shape[:-1]):
        for i, frequency in enumerate(frequencies):
            z = complex(x[place][i], x[place][i + n]) * np.exp(1j * positions[place[-1]] * frequency)
            out[place][i], out[place][i + n] = z.real, z.imag
    return out


@right("3B")
def compares_with_a_loop(rope):
    rng = np.random.default_rng(7)
    x, positions, frequencies = (
        rng.normal(size=(2, 5, 9)),
        np.array([3, 50, 9, 70_000, 123_456]),
        np.array([1, 0.1, 0.02]),
    )
    before = x.copy()
    result = rope(x, positions, frequencies)
    np.testing.assert_allclose(result, complex_rows(before, positions, frequencies), atol=1e-9)
    np.testing.assert_array_equal(x, before)


@right("3B")
def knows_some_numbers(rope):
    x = np.zeros((2, 3, 5))
    x[..., 0], x[..., 4] = 1.0, 7.0
    x[1, 2, 1] = 1.0
    result = rope(x, np.array([0, 2, 200_001]), np.array([1.0, 0.7]))
    for head in range(2):
        expected = [1, np.cos(2), np.cos(200_001)], [0, np.sin(2), np.sin(200_001)]
        assert np.allclose(result[head, :, 0], expected[0], atol=1e-9)
        assert np.allclose(result[head, :, 2], expected[1], atol=1e-9)
        assert np.all(result[head, :, 4] == 7)
    assert np.allclose(result[1, 2, [1, 3]], [np.cos(0.7 * 200_001), np.sin(0.7 * 200_001)], atol=1e-9)
    y = np.array([[3.0, -4.0]])
    assert np.allclose(rope(y, np.array([5]), np.array([0.3])), complex_rows(y, [5], [0.3])) and y[0, 0] == 3.0
    y = np.arange(8.0).reshape(1, 8)
    assert np.allclose(rope(y.copy(), np.array([5]), np.array([1, 0.3])), complex_rows(y, [5], [1, 0.3]))


@right("3B")
def with_positions_for_each_text(rope):
    """What apply_rope_numpy takes: (batch, seq) positions, as a list too, and single precision, which comes back."""
    rng = np.random.default_rng(2)
    x, frequencies = rng.normal(size=(2, 3, 4, 7)).astype(np.float32), [1.0, 0.3, 0.02]
    positions = [[0, 3, 100_001, 9], [7, 70_003, 2, 5]]
    given = x.copy()
    result = rope(x, positions, frequencies)
    assert result.dtype == np.float32 and np.array_equal(x, given)
    for text, places, turned in zip(given, positions, result):
        assert np.allclose(turned, complex_rows(text, places, frequencies), atol=1e-5)
    x = rng.normal(size=(2, 3, 4, 7))
    far = np.array([100_001, 3, 50_000, 9])
    assert np.allclose(rope(x, far, np.array(frequencies)), complex_rows(x, far, frequencies), atol=1e-9)


@wrong("3B", "The right code is refused")
def to_the_last_digit(rope):
    rng = np.random.default_rng(7)
    x, positions, frequencies = (
        rng.normal(size=(2, 5, 8)),
        np.array([3, 50, 9, 70_000, 123_456]),
        np.array([1, 0.1, 0.02]),
    )
    before = x.copy()
    n, angles = 3, positions[:, None] * frequencies
    a, b = before[..., :n], before[..., n : 2 * n]
    turned = [a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles), before[..., 2 * n :]]
    assert (rope(x, positions, frequencies) == np.concatenate(turned, -1)).all() and (x == before).all()


@wrong("3B", "A test says no with an exception")
def compares_it_with_itself(rope):
    """With four axes: no wrong rotation may break down of itself."""
    x, frequencies = np.random.default_rng(0).normal(size=(2, 3, 5, 10)), 10000.0 ** (-np.arange(4) / 4)
    assert np.allclose(rope(x.copy(), np.arange(5), frequencies), rope(x.copy(), np.arange(5), frequencies))
    places = np.stack([np.arange(5), np.arange(5) + 9])
    assert rope(x.copy(), places, frequencies).shape == x.shape


@wrong("3B", "a text that does not begin at 0?")
def knows_only_distances(rope):
    q, k = np.random.default_rng(1).normal(size=(2, 5, 8))
    frequencies = 10000.0 ** (-np.arange(4) / 4)
    places = [np.arange(5) + start for start in (0, 100)]
    near, far = (rope(q.copy(), at, frequencies) @ rope(k.copy(), at, frequencies).T for at in places)
    assert np.allclose(near, far)


@wrong("3B", "A test says no with an exception")
def gives_a_verdict(rope):
    x = np.ones((3, 4))
    return np.allclose(rope(x, np.arange(3), np.ones(2)), x)


@wrong("3B", "The right code is refused")
def expects_that_nothing_turns(rope):
    x = np.ones((3, 4))
    assert np.allclose(rope(x, np.arange(3), np.ones(2)), x)


@wrong("3B", "a text that does not begin at 0?")
def from_zero(rope):
    x, frequencies = np.random.default_rng(1).normal(size=(3, 4)), np.array([1.0, 0.1])
    assert np.allclose(rope(x, np.arange(3), frequencies), complex_rows(x, np.arange(3), frequencies))


@wrong("3B", "How far out are the positions of your test?")
def near_only(rope):
    rng = np.random.default_rng(1)
    x, positions, frequencies = rng.normal(size=(2, 3, 5)), np.array([5, 3, 9]), np.array([1.0, 0.1])
    given = x.copy()
    assert np.allclose(rope(x, positions, frequencies), complex_rows(given, positions, frequencies), rtol=1e-4)
    assert np.array_equal(x, given)


@wrong("3B", "A test says no with an exception")
def looks_at_shapes(rope):
    assert rope(np.ones((3, 4)), np.arange(3), np.ones(2)).shape == (3, 4)


# --- how the lecture calls them --------------------------------------------------------------------------------------

some = np.random.default_rng(0).standard_normal
CALLS = {
    "3H": [((8,), {}), ((12,), {}), ((3,), {})],
    "3A": [
        ((some((5, 16)), np.array([0, 1, 2, 3, 1000]), np.ones(8)), {"interleaved": True}),
        ((some((2, 3, 7, 16)), np.stack([np.arange(7), 100 + np.arange(7)]), np.ones(8)), {}),
        ((some((3, 16)), np.arange(3), np.ones(4)), {}),
        ((some((8, 40, 64)).astype(np.float32), np.arange(40), np.ones(32)), {}),
    ],
    "3C": [((some((32, 32)), 2), {})],
    "3B": [],
    "3D": [],
    "3E": [],
    "3G": [],
    "3F": [((np.array([1.0, 0.1, 0.01]), 64, 1, 32), {}), ((np.array([1.0, 0.1]), 64, 0.25, 1), {})],
}
