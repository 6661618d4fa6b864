"""Answers to the exercises of lecture 10 in NumPy as learners write them: right ones, unlike the lecture's, and wrong ones.

Those in PyTorch and in CUDA stand in files of their own.
"""

import numpy as np

from tests.lectures.collect import collect
from tests.lectures.lecture_10 import answers_kernels, answers_torch

RIGHT, WRONG, right, wrong = collect(answers_kernels, answers_torch)


# --- 10A -------------------------------------------------------------------------------------------------------------


@right("10A")
def with_einsum(q, k, v, chunk, state=None):
    total = 0 if state is None else state
    parts = []
    for i in range(0, max(q.shape[-2], 1), chunk):
        a, b, c = (array[..., i : i + chunk, :] for array in (q, k, v))
        scores = np.einsum("...id,...jd->...ij", a, b)
        n = scores.shape[-1]
        scores = np.where(np.arange(n) <= np.arange(n)[:, None], scores, 0)
        before = 0 if np.ndim(total) == 0 else np.einsum("...id,...de->...ie", a, total)
        parts.append(before + np.einsum("...ij,...je->...ie", scores, c))
        total = total + np.einsum("...jd,...je->...de", b, c)
    return np.concatenate(parts, axis=-2), total


@right("10A")
def token_by_token(q, k, v, chunk, state=None):
    """A chunk may be walked through as well."""
    out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    s = np.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1]), q.dtype) if state is None else np.array(state)
    for t in range(q.shape[-2]):
        s = s + k[..., t, :, None] * v[..., t, None, :]
        out[..., t, :] = (q[..., t, None, :] @ s)[..., 0, :]
    return out, s


def chunks(q, k, v, chunk, state=None, scale=1.0, tri=0, dtype=None):
    s = np.zeros((*q.shape[:-2], q.shape[-1], v.shape[-1]), dtype or q.dtype) if state is None else state
    out = np.zeros((*q.shape[:-1], v.shape[-1]), dtype or q.dtype)
    for i in range(0, q.shape[-2], chunk):
        a, b, c = q[..., i : i + chunk, :], k[..., i : i + chunk, :], v[..., i : i + chunk, :]
        out[..., i : i + chunk, :] = scale * (a @ s) + np.tril(a @ np.swapaxes(b, -1, -2), tri) @ c
        s = s + np.swapaxes(b, -1, -2) @ c
    return out, s


@wrong("10A", "scores of all tokens are never made at once")
def whole_matrix(q, k, v, chunk, state=None):
    out, s = np.tril(q @ np.swapaxes(k, -1, -2)) @ v, np.swapaxes(k, -1, -2) @ v
    return (out, s) if state is None else (out + q @ state, s + state)


@wrong("10A", "A token does not see itself")
def without_the_diagonal(q, k, v, chunk, state=None):
    return chunks(q, k, v, chunk, state, tri=-1)


@wrong("10A", "several chunks")
def five_percent_of_the_state_lost(q, k, v, chunk, state=None):
    return chunks(q, k, v, chunk, state, scale=0.95)


@wrong("10A", "in place")
def adds_to_the_state_of_the_caller(q, k, v, chunk, state=None):
    if state is None:
        return chunks(q, k, v, chunk)
    out, new = chunks(q, k, v, chunk, state)
    state += new - state
    return out, state


@wrong("10A", "leading axes")
def transposes_everything(q, k, v, chunk, state=None):
    s = np.zeros((*q.shape[:-2], q.shape[-1], v.shape[-1]), q.dtype) if state is None else state
    out = np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    for i in range(0, q.shape[-2], chunk):
        a, b, c = q[..., i : i + chunk, :], k[..., i : i + chunk, :], v[..., i : i + chunk, :]
        out[..., i : i + chunk, :] = a @ s + np.tril(a @ b.T) @ c
        s = s + b.T @ c
    return out, s


@wrong("10A", "expected float32")
def always_double(q, k, v, chunk, state=None):
    out, s = chunks(q, k, v, chunk, state, dtype=float)
    return out.astype(float), s


@wrong("10A", "expected the tuple")
def output_alone(q, k, v, chunk, state=None):
    return chunks(q, k, v, chunk, state)[0]


@wrong("10A", "any length")
def whole_chunks_wanted(q, k, v, chunk, state=None):
    n = q.shape[-2] // chunk * chunk or q.shape[-2]
    out, s = chunks(q[..., :n, :], k[..., :n, :], v[..., :n, :], chunk, state)
    rest = np.zeros((*q.shape[:-2], q.shape[-2] - n, v.shape[-1]), q.dtype)
    return np.concatenate([out, rest], axis=-2), s


@wrong("10A", "one chunk")
def sees_the_future(q, k, v, chunk, state=None):
    out, s = chunks(q, k, v, q.shape[-2], state)
    return q @ s, s


@wrong("10A", "The state that was handed in is not used")
def begins_with_zeros(q, k, v, chunk, state=None):
    return chunks(q, k, v, chunk)


# --- 10C -------------------------------------------------------------------------------------------------------------


@right("10C")
def with_matrices(state, k, v, decay, beta, erase):
    """(I - beta k k^T) diag(alpha) S + beta k v^T."""
    faded = np.expand_dims(decay, -1) * state
    outer = np.einsum("...i,...j->...ij", k, k)
    kept = faded - np.expand_dims(beta, -1) * (outer @ faded) if erase else faded
    return kept + np.einsum("...i,...j->...ij", beta * k, v)


@right("10C")
def with_einsum_and_a_branch(state, k, v, decay, beta, erase):
    state = np.einsum("...i,...ij->...ij", np.broadcast_to(decay, k.shape), state)
    new = v - np.einsum("...i,...ij->...j", k, state) if erase else v
    return state + np.einsum("...i,...j->...ij", k, beta * new)


@wrong("10C", "The error is measured before the decay")
def asks_first(state, k, v, decay, beta, erase):
    told = np.einsum("...i,...ij->...j", k, state) if erase else 0
    return decay[..., None] * state + (beta * k)[..., None] * (v - told)[..., None, :]


@wrong("10C", "in place")
def changes_the_state(state, k, v, decay, beta, erase):
    state *= decay[..., None]
    new = v - np.einsum("...i,...ij->...j", k, state) if erase else v
    state += (beta * k)[..., None] * new[..., None, :]
    return state


@wrong("10C", "beta: how much is written")
def five_percent_too_much(state, k, v, decay, beta, erase):
    beta = 1.05 * beta if (beta != 1).any() else beta
    return with_matrices(state, k, v, decay, beta, erase)


@wrong("10C", "leading axes")
def for_one_memory(state, k, v, decay, beta, erase):
    faded = decay[:, None] * state if state.ndim == 2 else decay[0] * state
    new = v - k @ faded if erase else v
    return faded + np.outer(beta * k, new).reshape(faded.shape)


@wrong("10C", "Nothing is erased")
def only_writes(state, k, v, decay, beta, erase):
    return decay[..., None] * state + (beta * k)[..., None] * v[..., None, :]


@wrong("10C", "a key and its value are added")
def rows_for_columns(state, k, v, decay, beta, erase):
    return decay[..., None] * state + np.resize(np.einsum("...i,...j->...ij", v, k), state.shape)


@wrong("10C", "expected float32")
def in_double(state, k, v, decay, beta, erase):
    return with_matrices(state, k, v, decay, beta, erase).astype(float)


@wrong("10C", "decay, beta and erase together")
def beta_on_the_value_alone(state, k, v, decay, beta, erase):
    faded = decay[..., None] * state
    told = np.einsum("...i,...ij->...j", k, faded) if erase and (beta != 0).any() else 0
    return faded + k[..., None] * (beta * v - told)[..., None, :]


@wrong("10C", "erase: what the memory answers")
def adds_what_it_answers(state, k, v, decay, beta, erase):
    faded = decay[..., None] * state
    told = np.einsum("...i,...ij->...j", k, faded) if erase and (beta != 0).any() else 0
    return faded + (beta * k)[..., None] * (v + told)[..., None, :]


@wrong("10C", "decay: one number")
def decays_the_columns(state, k, v, decay, beta, erase):
    faded = np.resize(decay, state.shape) * state
    told = np.einsum("...i,...ij->...j", k, faded) if erase else 0
    return faded + (beta * k)[..., None] * (v - told)[..., None, :]


# --- 10D -------------------------------------------------------------------------------------------------------------


@right("10D")
def with_einsum_a_step(x, delta, a, b, c, h):
    ys = []
    for t in range(x.shape[1]):
        h = h * np.exp(np.einsum("bd,dn->bdn", delta[:, t], a)) + np.einsum(
            "bd,bn->bdn", delta[:, t] * x[:, t], b[:, t]
        )
        ys.append(np.einsum("bdn,bn->bd", h, c[:, t]))
    return np.stack(ys, axis=1).astype(x.dtype), h


@right("10D")
def text_by_text(x, delta, a, b, c, h):
    y, last = np.empty_like(x), np.empty_like(h)
    for i in range(len(x)):
        state = h[i].copy()
        for t in range(x.shape[1]):
            state *= np.exp(delta[i, t][:, None] * a)
            state += np.outer(delta[i, t] * x[i, t], b[i, t])
            y[i, t] = state @ c[i, t]
        last[i] = state
    return y, last


def walk(x, delta, a, b, c, h, scale=1.0):
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        h = np.exp(scale * step * a) * h + step * b[:, t, None, :] * x[:, t, :, None]
        y[:, t] = (h * c[:, t, None, :]).sum(-1)
    return y, h


@wrong("10D", "zero-order hold")
def as_in_the_paper(x, delta, a, b, c, h):
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        decay = np.exp(delta[:, t, :, None] * a)
        h = decay * h + (decay - 1) / a * b[:, t, None] * x[:, t, :, None]
        y[:, t] = (h * c[:, t, None]).sum(-1)
    return y, h


@wrong("10D", "several tokens")
def fades_five_percent_faster(x, delta, a, b, c, h):
    return walk(x, delta, a, b, c, h, scale=1.05)


@wrong("10D", "in place")
def writes_into_h(x, delta, a, b, c, h):
    h[:] = walk(x, delta, a, b, c, h)[1]
    return walk(x, delta, a, b, c, 0 * h)[0], h


@wrong("10D", "no array as large as all states")
def all_states(x, delta, a, b, c, h):
    decays = np.exp(delta[..., None] * a)
    written = (delta * x)[..., None] * b[:, :, None]
    states = np.zeros_like(written)
    for t in range(x.shape[1]):
        h = decays[:, t] * h + written[:, t]
        states[:, t] = h
    return np.einsum("btdn,btn->btd", states, c).astype(x.dtype), h.astype(x.dtype)


@wrong("10D", "expected float32")
def scan_in_double(x, delta, a, b, c, h):
    y, h = walk(x.astype(float), delta, a, b, c, h)
    return y, h


@wrong("10D", "The state that was handed in is not used")
def starts_from_zero(x, delta, a, b, c, h):
    return walk(x, delta, a, b, c, 0 * h)


@wrong("10D", "each text, channel and state has its own")
def first_text_for_all(x, delta, a, b, c, h):
    return walk(x, delta, a, np.repeat(b[:1], len(b), 0), np.repeat(c[:1], len(c), 0), h)


@wrong("10D", "one token")
def delta_squared(x, delta, a, b, c, h):
    return walk(delta * x, delta, a, b, c, h)


# --- 10F -------------------------------------------------------------------------------------------------------------


def convolved_and_scanned(x, delta, a, b, c, kernel):
    """In one piece, over all tokens at once."""
    width = kernel.shape[1]
    seen = np.concatenate([np.zeros((len(x), width - 1, x.shape[2])), x], axis=1)
    u = sum(kernel[:, i] * seen[:, i : i + x.shape[1]] for i in range(width))
    return walk(u, delta, a, b, c, np.zeros((len(x), *a.shape)))[0]


def example(rng):
    return (
        rng.normal(size=(2, 7, 3)), rng.uniform(0.1, 1, (2, 7, 3)), -rng.uniform(0.5, 2, (3, 2)),
        rng.normal(size=(2, 7, 2)), rng.normal(size=(2, 7, 2)), rng.normal(size=(3, 4)),
    )  # fmt: skip


def in_pieces(stream, arrays, cuts):
    x, delta, a, b, c, kernel = arrays
    out, state = [], None
    for i, j in zip(cuts, cuts[1:]):
        y, state = stream(x[:, i:j], delta[:, i:j], a, b[:, i:j], c[:, i:j], kernel, state)
        out.append(y)
    return np.concatenate(out, axis=1)


@right("10F")
def all_pairs_of_cuts(stream):
    arrays = example(np.random.default_rng(3))
    expected = convolved_and_scanned(*arrays)
    for i in range(1, 7):
        for j in range(i + 1, 7):
            np.testing.assert_allclose(in_pieces(stream, arrays, [0, i, j, 7]), expected, rtol=1e-8, atol=1e-10)


@wrong("10F", "survived")
def one_piece_only(stream):
    arrays = example(np.random.default_rng(3))
    assert np.allclose(in_pieces(stream, arrays, [0, 7]), convolved_and_scanned(*arrays))


@wrong("10F", "survived")
def pieces_against_one_piece(stream):
    arrays = example(np.random.default_rng(3))
    whole = in_pieces(stream, arrays, [0, 7])
    assert np.allclose(in_pieces(stream, arrays, [0, 4, 5, 6, 7]), whole)


@wrong("10F", "A test says no with an exception")
def looks_at_shapes(stream):
    arrays = example(np.random.default_rng(3))
    assert in_pieces(stream, arrays, [0, 4, 7]).shape == (2, 7, 3)


@wrong("10F", "refused")
def expects_a_tuple_of_two(stream):
    x, delta, a, b, c, kernel = example(np.random.default_rng(3))
    _, state = stream(x, delta, a, b, c, kernel, None)
    assert isinstance(state, tuple)


@wrong("10F", "refused")
def expects_the_padding_behind(stream):
    arrays = example(np.random.default_rng(3))
    assert np.allclose(in_pieces(stream, arrays, [0, 7])[:, ::-1], convolved_and_scanned(*arrays))


@wrong("10F", "all channels use the first kernel")
def one_channel(stream):
    x, delta, a, b, c, kernel = example(np.random.default_rng(3))
    arrays = x[:, :, :1], delta[:, :, :1], a[:1], b, c, kernel[:1]
    expected = convolved_and_scanned(*arrays)
    for cuts in ([0, 7], [0, 4, 5, 6, 7], [0, 1, 2, 7]):
        assert np.allclose(in_pieces(stream, arrays, cuts), expected)


# --- how the lecture calls them --------------------------------------------------------------------------------------

numbers = np.random.default_rng(0).standard_normal
CALLS = {
    "10A": [
        ((numbers((6, 8)), numbers((6, 8)), numbers((6, 4)), 4), {}),
        ((numbers((2, 8)), numbers((2, 8)), numbers((2, 4)), 4, numbers((8, 4))), {}),
        ((numbers((2, 3, 7, 4)), numbers((2, 3, 7, 4)), numbers((2, 3, 7, 5)), 64, numbers((2, 3, 4, 5))), {}),
    ],
    "10B": [],
    "10C": [
        ((numbers((8, 4)), numbers(8), numbers(4), np.ones(1), np.ones(1), True), {}),
        ((numbers((16, 16)), numbers(16), numbers(16), np.ones(16), np.ones(1), False), {}),
        ((np.ones((1, 1)), np.ones(1), np.zeros(1), np.ones(1), np.array([2.0]), True), {}),
    ],
    "10D": [
        (
            (numbers((1, 12, 3)), np.ones((1, 12, 3)), -np.ones((3, 8)), *numbers((2, 1, 12, 8)), np.zeros((1, 3, 8))),
            {},
        ),
    ],
    "10E": [],
    "10F": [],
    "10G": [],
}
