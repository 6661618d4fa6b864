"""Answers to the exercises of lecture 08 as learners write them: right ones, unlike the lecture's, and wrong ones.

Those in PyTorch and in CUDA stand in files of their own.
"""

import math

import numpy as np

from tests.lectures.collect import collect
from tests.lectures.lecture_08 import answers_kernels, answers_torch

RIGHT, WRONG, right, wrong = collect(answers_kernels, answers_torch)


# --- 8A --------------------------------------------------------------------------------------------------------------


def shares(scores, causal):
    if causal:
        n, m = scores.shape[-2:]
        scores = np.where(np.arange(m) <= np.arange(n)[:, None] + m - n, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    powers = np.exp(scores - np.where(np.isneginf(top), 0, top))
    total = powers.sum(-1, keepdims=True)
    return powers / np.where(total == 0, 1, total)


@right("8A")
def by_rows(q, k, v, causal=False):
    """A group's heads are rows of one head."""
    lead, (heads, n, d), kv = q.shape[:-3], q.shape[-3:], k.shape[-3]
    scores = q.reshape(*lead, kv, heads // kv * n, d) @ k.swapaxes(-1, -2) / math.sqrt(d)
    weights = shares(scores.reshape(*lead, kv, heads // kv, n, -1), causal).reshape(scores.shape)
    return (weights @ v).reshape(q.shape).astype(q.dtype)


@right("8A")
def head_by_head(q, k, v, causal=False):
    group = q.shape[-3] // k.shape[-3]
    out = np.empty_like(q)
    for h in range(q.shape[-3]):
        keys, values = k[..., h // group, :, :], v[..., h // group, :, :]
        out[..., h, :, :] = shares(q[..., h, :, :] @ keys.swapaxes(-1, -2) * q.shape[-1] ** -0.5, causal) @ values
    return out


@right("8A")
def by_broadcasting(q, k, v, causal=False):
    parts = q.reshape(*q.shape[:-3], k.shape[-3], -1, *q.shape[-2:])
    scores = parts @ k[..., None, :, :].swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    return (shares(scores, causal) @ v[..., None, :, :]).reshape(q.shape).astype(q.dtype, copy=False)


@wrong("8A", "nothing as large as repeated keys is made")
def repeated(q, k, v, causal=False):
    group = q.shape[-3] // k.shape[-3]
    k, v = np.repeat(k, group, axis=-3), np.repeat(v, group, axis=-3)
    return (shares(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), causal) @ v).astype(q.dtype)


@wrong("8A", "Heads are dealt out like cards")
def tiled(q, k, v, causal=False):
    group = q.shape[-3] // k.shape[-3]
    k, v = (np.concatenate([a] * group, axis=-3) for a in (k, v))
    return (shares(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), causal) @ v).astype(q.dtype)


@wrong("8A", "one head each")
def five_percent_off(q, k, v, causal=False):
    return by_rows(1.05 * q, k, v, causal)


@wrong("8A", "any axes in front")
def three_axes_only(q, k, v, causal=False):
    grouped = q.reshape(k.shape[0], -1, *q.shape[1:])
    scores = np.einsum("hgid,hjd->hgij", grouped, k) / math.sqrt(q.shape[-1])
    return np.einsum("hgij,hjd->hgid", shares(scores, causal), v).reshape(q.shape)


@wrong("8A", "scores of 1e4 do not overflow")
def not_shifted(q, k, v, causal=False):
    grouped = q.reshape(*q.shape[:-3], k.shape[-3], -1, *q.shape[-2:])
    scores = np.einsum("...hgid,...hjd->...hgij", grouped, k) / math.sqrt(q.shape[-1])
    powers = np.exp(np.where(shares(scores, causal) > 0, scores, -np.inf))
    total = powers.sum(-1, keepdims=True)
    out = np.einsum("...hgij,...hjd->...hgid", powers / np.where(total == 0, 1, total), v)
    return out.reshape(q.shape).astype(q.dtype)


@wrong("8A", "returned")
def heads_not_joined(q, k, v, causal=False):
    grouped = q.reshape(*q.shape[:-3], k.shape[-3], -1, *q.shape[-2:])
    scores = np.einsum("...hgid,...hjd->...hgij", grouped, k) / math.sqrt(q.shape[-1])
    return np.einsum("...hgij,...hjd->...hgid", shares(scores, causal), v)


@wrong("8A", "begins at the top left")
def top_left(q, k, v, causal=False):
    grouped = q.reshape(*q.shape[:-3], k.shape[-3], -1, *q.shape[-2:])
    scores = np.einsum("...hgid,...hjd->...hgij", grouped, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    return np.einsum("...hgij,...hjd->...hgid", shares(scores, False), v).reshape(q.shape)


@wrong("8A", "a query that sees no key then averages all")
def minus_a_billion_instead(q, k, v, causal=False):
    grouped = q.reshape(*q.shape[:-3], k.shape[-3], -1, *q.shape[-2:])
    scores = np.einsum("...hgid,...hjd->...hgij", grouped, k) / math.sqrt(q.shape[-1])
    if causal:
        n, m = scores.shape[-2:]
        scores[..., ~np.tri(n, m, m - n, dtype=bool)] = -1e9
    return np.einsum("...hgij,...hjd->...hgid", shares(scores, False), v).reshape(q.shape).astype(q.dtype)


@wrong("8A", "a query that sees no key then averages all")
def minus_a_billion(q, k, v, causal=False):
    grouped = q.reshape(*q.shape[:-3], k.shape[-3], -1, *q.shape[-2:])
    scores = np.einsum("...hgid,...hjd->...hgij", grouped, k) / math.sqrt(q.shape[-1])
    if causal:
        n, m = scores.shape[-2:]
        scores = scores + np.where(np.tri(n, m, m - n, dtype=bool), 0, -1e9).astype(q.dtype)
    return np.einsum("...hgij,...hjd->...hgid", shares(scores, False), v).reshape(q.shape).astype(q.dtype)


@wrong("8A", "the float type of q")
def always_double(q, k, v, causal=False):
    return by_rows(q, k, v, causal).astype(float) * np.ones(1)


# --- 8B --------------------------------------------------------------------------------------------------------------


@right("8B")
def compares_with_repeated_heads(step):
    rng = np.random.default_rng(2)
    q, k, v = rng.normal(size=(4, 6, 5)) * 3, rng.normal(size=(2, 6, 5)), rng.normal(size=(2, 6, 5))
    cache = np.zeros((2, 0, 5)), np.zeros((2, 0, 5))
    for i in range(0, 6, 2):
        out, *cache = step(q[:, i : i + 2], k[:, i : i + 2], v[:, i : i + 2], *cache)
        if cache[0].shape != (2, i + 2, 5) or cache[1].shape != (2, i + 2, 5):
            raise ValueError("the cache has another shape")
        keys, values = k[:, : i + 2].repeat(2, axis=0), v[:, : i + 2].repeat(2, axis=0)
        wanted = shares(q[:, i : i + 2] @ keys.swapaxes(1, 2) / math.sqrt(5), True) @ values
        np.testing.assert_allclose(out, wanted)


@right("8B")
def step_by_step_equals_all_at_once(step):
    rng = np.random.default_rng(3)
    q, k, v = 2 * rng.normal(size=(6, 5, 4)), 2 * rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 4))
    whole = by_rows(q, k, v, causal=True)
    k_old, v_old = k[:, :0], v[:, :0]
    for begin, end in ((0, 3), (3, 5)):
        new = np.s_[:, begin:end]
        out, k_old, v_old = step(q[new], k[new], v[new], k_old, v_old)
        assert np.allclose(out, whole[new])
    assert k_old.nbytes == k.nbytes and np.array_equal(k_old, k) and np.array_equal(v_old, v)


@wrong("8B", "What shape should the cache have")
def looks_at_the_output_only(step):
    rng = np.random.default_rng(3)
    q, k, v = 2 * rng.normal(size=(6, 5, 4)), 2 * rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 4))
    whole = by_rows(q, k, v, causal=True)
    k_old, v_old = k[:, :0], v[:, :0]
    for begin, end in ((0, 3), (3, 5)):
        new = np.s_[:, begin:end]
        out, k_old, v_old = step(q[new], k[new], v[new], k_old, v_old)
        assert np.allclose(out, whole[new])


@wrong("8B", "Which query heads does your test look at")
def looks_at_head_0_only(step):
    rng = np.random.default_rng(3)
    q, k, v = 2 * rng.normal(size=(6, 5, 4)), 2 * rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 4))
    whole = by_rows(q, k, v, causal=True)
    k_old, v_old = k[:, :0], v[:, :0]
    for begin, end in ((0, 3), (3, 5)):
        new = np.s_[:, begin:end]
        out, k_old, v_old = step(q[new], k[new], v[new], k_old, v_old)
        assert np.allclose(out[0], whole[new][0])
        assert k_old.shape == (3, end, 4)


@wrong("8B", "Has your test a cache that is not empty?")
def an_empty_cache_only(step):
    rng = np.random.default_rng(3)
    q, k, v = 2 * rng.normal(size=(6, 5, 4)), 2 * rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 4))
    out, k_old, v_old = step(q, k, v, k[:, :0], v[:, :0])
    assert np.allclose(out, by_rows(q, k, v, causal=True)) and np.array_equal(k_old, k)


@wrong("8B", "A test says no with an exception")
def returns_a_verdict(step):
    q = np.ones((4, 1, 2))
    out, k, v = step(q, q[:2], q[:2], q[:2, :0], q[:2, :0])
    return np.allclose(out, 1)


@wrong("8B", "The right code is refused")
def expects_repeated_heads_in_the_cache(step):
    q = np.ones((4, 1, 2))
    _, k, _ = step(q, q[:2], q[:2], q[:2, :0], q[:2, :0])
    assert k.shape[0] == 4


# --- 8C --------------------------------------------------------------------------------------------------------------


@right("8C")
def aligned_in_groups(v, w_v, w_o, n_kv_heads):
    group = len(v) // n_kv_heads
    first = np.repeat(v[::group], group, axis=0)
    u, _, vt = np.linalg.svd(np.einsum("htd,hte->hde", v, first))
    r = u @ vt
    merged = (w_v @ r).reshape(n_kv_heads, group, *w_v.shape[1:]).mean(axis=1)
    return merged, np.einsum("hde,hdo->heo", r, w_o)


@right("8C")
def aligned_with_scipy(v, w_v, w_o, n_kv_heads):
    from scipy.linalg import orthogonal_procrustes

    group, heads, back = len(v) // n_kv_heads, [], []
    for h in range(len(v)):
        r, _ = orthogonal_procrustes(v[h], v[h - h % group])
        heads.append(w_v[h] @ r)
        back.append(np.linalg.inv(r) @ w_o[h])
    return np.stack([np.mean(heads[i : i + group], axis=0) for i in range(0, len(v), group)]), np.stack(back)


@wrong("8C", "this is the plain mean")
def plain_mean(v, w_v, w_o, n_kv_heads):
    return w_v.reshape(n_kv_heads, -1, *w_v.shape[1:]).mean(1), w_o.copy()


@wrong("8C", "turned onto head 0")
def onto_head_0(v, w_v, w_o, n_kv_heads):
    u, _, vt = np.linalg.svd(np.einsum("htd,te->hde", v, v[0]))
    r = u @ vt
    return (w_v @ r).reshape(n_kv_heads, -1, *w_v.shape[1:]).mean(1), r.swapaxes(1, 2) @ w_o


@wrong("8C", "w_o is not turned back")
def w_o_forgotten(v, w_v, w_o, n_kv_heads):
    return aligned_in_groups(v, w_v, w_o, n_kv_heads)[0], w_o


@wrong("8C", "from v, what the heads hand over")
def from_the_weights(v, w_v, w_o, n_kv_heads):
    return aligned_in_groups(w_v, w_v, w_o, n_kv_heads)


@wrong("8C", "expected the tuple (merged, turned)")
def merged_only(v, w_v, w_o, n_kv_heads):
    return aligned_in_groups(v, w_v, w_o, n_kv_heads)[0]


@wrong("8C", "returned the shape")
def every_head_kept(v, w_v, w_o, n_kv_heads):
    merged, back = aligned_in_groups(v, w_v, w_o, n_kv_heads)
    return np.repeat(merged, len(v) // n_kv_heads, axis=0), back


@wrong("8C", "rotated copies of one head")
def a_group_of_one_is_scaled(v, w_v, w_o, n_kv_heads):
    merged, back = aligned_in_groups(v, w_v, w_o, n_kv_heads)
    return merged, back if n_kv_heads > 1 or len(v) == 2 else 1.05 * back


# --- 8G --------------------------------------------------------------------------------------------------------------


@right("8G")
def rounded_up(n_layers, n_kv_heads, d_head, n_devices=1, n_shared_layers=0, n_bytes=2):
    small, large = sorted((n_kv_heads, n_devices))
    if large % small:
        raise ValueError(f"{n_kv_heads} heads cannot be dealt to {n_devices} devices")
    return -(-n_kv_heads // n_devices) * (n_layers - n_shared_layers) * d_head * n_bytes * 2


@wrong("8G", "are refused")
def never_refuses(n_layers, n_kv_heads, d_head, n_devices=1, n_shared_layers=0, n_bytes=2):
    return 2 * (n_layers - n_shared_layers) * max(1, n_kv_heads // n_devices) * d_head * n_bytes


@wrong("8G", "a device has one head, not none")
def none_left(n_layers, n_kv_heads, d_head, n_devices=1, n_shared_layers=0, n_bytes=2):
    return 2 * (n_layers - n_shared_layers) * (n_kv_heads // n_devices) * d_head * n_bytes


@wrong("8G", "it has a whole one")
def a_part_of_a_head(n_layers, n_kv_heads, d_head, n_devices=1, n_shared_layers=0, n_bytes=2):
    if n_kv_heads % n_devices and n_devices % n_kv_heads:
        raise ValueError(f"{n_kv_heads} heads cannot be dealt to {n_devices} devices")
    return 2 * (n_layers - n_shared_layers) * d_head * n_bytes * n_kv_heads // n_devices


@wrong("8G", "a factor of 2 is missing")
def keys_only(n_layers, n_kv_heads, d_head, n_devices=1, n_shared_layers=0, n_bytes=2):
    return (n_layers - n_shared_layers) * max(1, n_kv_heads // n_devices) * d_head * n_bytes


@wrong("8G", "expected integers")
def a_float(n_layers, n_kv_heads, d_head, n_devices=1, n_shared_layers=0, n_bytes=2):
    return 2 * (n_layers - n_shared_layers) * max(1, n_kv_heads / n_devices) * d_head * n_bytes


# --- how the lecture calls them --------------------------------------------------------------------------------------

numbers = np.random.default_rng(0).standard_normal
single = numbers((1, 9, 4, 8)).astype(np.float32), numbers((1, 3, 12, 8)).astype(np.float32)

CALLS = {
    "8A": [((single[0], single[1], single[1]), {"causal": True}), ((numbers((9, 1, 8)), *numbers((2, 3, 5, 8))), {})],
    "8B": [],
    "8C": [((numbers((8, 200, 6)), numbers((8, 24, 6)), numbers((8, 6, 24)), 4), {})],
    "8D": [],
    "8E": [],
    "8F": [],
    "8G": [],
}
