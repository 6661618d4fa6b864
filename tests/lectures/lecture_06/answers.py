"""Answers to the exercises of lecture 06 as learners write them: right ones, unlike the lecture's, and wrong ones.

WRONG pairs each wrong answer with words that the report must contain. The known mistakes of utils/exercises/lecture_06/
are further wrong answers.
"""

import numpy as np

from tests.lectures.collect import collect
from tests.lectures.lecture_06 import answers_forward
from tests.lectures.lecture_06 import answers_kernels as kernels_06
from tests.lectures.lecture_06.answers_forward import keys_outside, scale_of

RIGHT, WRONG, right, wrong = collect(kernels_06, answers_forward)


# --- 6.5 -------------------------------------------------------------------------------------------------------------


@wrong("6.5", "scores go through exp at once, of 70,200 in all")
def gradients_in_torch(q, k, v, out, lse, d_out, causal=False, scale=None):
    import torch

    tensors = [torch.from_numpy(a.astype(float)).requires_grad_() for a in (q, k, v)]
    s = scale_of(q, scale) * tensors[0] @ tensors[1].mT
    allowed = torch.from_numpy(np.tri(*s.shape[-2:], s.shape[-1] - s.shape[-2], dtype=bool) | (not causal))
    p = torch.exp(s.masked_fill(~allowed, -1e9) - torch.from_numpy(np.where(np.isneginf(lse), np.inf, lse))[..., None])
    p = p / p.detach().sum(-1, keepdim=True).clamp(min=1e-300)
    given = torch.from_numpy(d_out.astype(float))
    weighted = (p.detach() * (given @ tensors[2].mT).detach()).sum(-1, keepdim=True)
    inner = p.detach() * ((given @ tensors[2].mT).detach() - weighted)
    d_q, d_k = torch.autograd.grad(s, tensors[:2], inner)
    return tuple(a.numpy().astype(q.dtype) for a in (d_q, d_k, p.detach().mT @ given))


@right("6.5")
def queries_one_by_one(q, k, v, out, lse, d_out, causal=False, scale=None):
    scale, shift = scale_of(q, scale), k.shape[-2] - q.shape[-2]
    d_q, d_k, d_v = (np.zeros_like(a) for a in (q, k, v))
    for i in range(q.shape[-2]):
        end = max(0, i + 1 + shift) if causal else k.shape[-2]
        if not end:
            continue
        k_i, v_i = k[..., :end, :], v[..., :end, :]
        p = np.exp(scale * np.einsum("...jd,...d->...j", k_i, q[..., i, :]) - lse[..., i, None])
        d_p = np.einsum("...jd,...d->...j", v_i, d_out[..., i, :])
        d_s = scale * p * (d_p - (out[..., i, :] * d_out[..., i, :]).sum(-1)[..., None])
        d_q[..., i, :] = np.einsum("...j,...jd->...d", d_s, k_i)
        d_k[..., :end, :] += d_s[..., None] * q[..., i, None, :]
        d_v[..., :end, :] += p[..., None] * d_out[..., i, None, :]
    return d_q, d_k, d_v


def tiles(n_queries, n_keys, causal):
    """Tiles of 64 that a backward pass visits, keys outside: slices, and who may attend in them."""
    mask = np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool) | (not causal)
    for j in range(0, n_keys, 64):
        for i in range(0, n_queries, 64):
            rows, columns = slice(i, i + 64), slice(j, j + 64)
            if mask[rows, columns].any():
                yield rows, columns, mask[rows, columns]


def tiled_backward(q, k, v, out, lse, d_out, causal, scale, visit):
    """The given loop; `visit` does one tile."""
    gradients = [np.zeros_like(a) for a in (q, k, v)]
    scale = scale_of(q, scale)
    lse = np.where(np.isneginf(lse), np.inf, lse)
    big_d = (d_out * out).sum(axis=-1)
    for rows, columns, allowed in tiles(q.shape[-2], k.shape[-2], causal):
        s = q[..., rows, :] @ np.swapaxes(k[..., columns, :], -1, -2) * scale
        visit(gradients, rows, columns, allowed, s, lse[..., rows, None], big_d[..., rows, None], q, k, v, d_out, scale)
    return tuple(gradients)


def add_tile(gradients, rows, columns, p, d_s, q, k, d_out):
    d_q, d_k, d_v = gradients
    d_q[..., rows, :] += d_s @ k[..., columns, :]
    d_k[..., columns, :] += np.swapaxes(d_s, -1, -2) @ q[..., rows, :]
    d_v[..., columns, :] += np.swapaxes(p, -1, -2) @ d_out[..., rows, :]


@right("6.5")
def tile_after_tile(q, k, v, out, lse, d_out, causal=False, scale=None):
    def visit(gradients, rows, columns, allowed, s, lse, big_d, q, k, v, d_out, scale):
        p = np.where(allowed, np.exp(np.where(allowed, s, 0) - lse), 0)
        d_s = p * (d_out[..., rows, :] @ np.swapaxes(v[..., columns, :], -1, -2) - big_d) * scale
        add_tile(gradients, rows, columns, p, d_s, q, k, d_out)

    gradients = tiled_backward(*(a.astype(float) for a in (q, k, v, out, lse, d_out)), causal, scale, visit)
    return tuple(g.astype(q.dtype) for g in gradients)


@wrong("6.5", "ValueError")
def lse_without_its_axis(q, k, v, out, lse, d_out, causal=False, scale=None):
    def visit(gradients, rows, columns, allowed, s, lse, big_d, q, k, v, d_out, scale):
        p = np.where(allowed, np.exp(s - lse[..., 0]), 0)
        d_s = p * (d_out[..., rows, :] @ np.swapaxes(v[..., columns, :], -1, -2) - big_d) * scale
        add_tile(gradients, rows, columns, p, d_s, q, k, d_out)

    return tiled_backward(q, k, v, out, lse, d_out, causal, scale, visit)


@wrong("6.5", "The mask is missing")
def backward_unmasked(q, k, v, out, lse, d_out, causal=False, scale=None):
    def visit(gradients, rows, columns, allowed, s, lse, big_d, q, k, v, d_out, scale):
        p = np.exp(s - lse)
        d_s = p * (d_out[..., rows, :] @ np.swapaxes(v[..., columns, :], -1, -2) - big_d) * scale
        add_tile(gradients, rows, columns, p, d_s, q, k, d_out)

    return tiled_backward(q, k, v, out, lse, d_out, causal, scale, visit)


@wrong("6.5", "Each tile adds to dV")
def backward_d_v_overwritten(q, k, v, out, lse, d_out, causal=False, scale=None):
    def visit(gradients, rows, columns, allowed, s, lse, big_d, q, k, v, d_out, scale):
        p = np.exp(np.where(allowed, s, -np.inf) - lse)
        d_s = p * (d_out[..., rows, :] @ np.swapaxes(v[..., columns, :], -1, -2) - big_d) * scale
        gradients[2][..., columns, :] = 0
        add_tile(gradients, rows, columns, p, d_s, q, k, d_out)

    return tiled_backward(q, k, v, out, lse, d_out, causal, scale, visit)


@wrong("6.5", "D is missing")
def backward_without_d(q, k, v, out, lse, d_out, causal=False, scale=None):
    def visit(gradients, rows, columns, allowed, s, lse, big_d, q, k, v, d_out, scale):
        p = np.exp(np.where(allowed, s, -np.inf) - lse)
        d_s = p * (d_out[..., rows, :] @ np.swapaxes(v[..., columns, :], -1, -2)) * scale
        add_tile(gradients, rows, columns, p, d_s, q, k, d_out)

    return tiled_backward(q, k, v, out, lse, d_out, causal, scale, visit)


@wrong("6.5", "The scale is missing in dQ and dK")
def backward_unscaled(q, k, v, out, lse, d_out, causal=False, scale=None):
    def visit(gradients, rows, columns, allowed, s, lse, big_d, q, k, v, d_out, scale):
        p = np.exp(np.where(allowed, s, -np.inf) - lse)
        d_s = p * (d_out[..., rows, :] @ np.swapaxes(v[..., columns, :], -1, -2) - big_d)
        add_tile(gradients, rows, columns, p, d_s, q, k, d_out)

    return tiled_backward(q, k, v, out, lse, d_out, causal, scale, visit)


@wrong("6.5", "d_v: ")
def backward_with_loud_outputs(q, k, v, out, lse, d_out, causal=False, scale=None):
    d_q, d_k, d_v = queries_one_by_one(q, k, v, out, lse, d_out, causal, scale)
    return d_q, d_k, d_v * (1 + 1e-3)


@wrong("6.5", "returned the shape")
def backward_without_leading_axes(q, k, v, out, lse, d_out, causal=False, scale=None):
    if q.ndim > 2:
        q, k, v, out, lse, d_out = (a[0] for a in (q, k, v, out, lse, d_out))
    return queries_one_by_one(q, k, v, out, lse, d_out, causal, scale)


# --- 6.6 -------------------------------------------------------------------------------------------------------------


@right("6.6")
def one_mask_of_squares(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    owner_q = np.repeat(np.arange(len(cu_queries) - 1), np.diff(cu_queries))
    owner_k = np.repeat(np.arange(len(cu_keys) - 1), np.diff(cu_keys))
    allowed = owner_q[:, None] == owner_k
    if causal:
        from_the_end_q = np.asarray(cu_queries)[owner_q + 1] - np.arange(len(owner_q))
        from_the_end_k = np.asarray(cu_keys)[owner_k + 1] - np.arange(len(owner_k))
        allowed = allowed & (from_the_end_k >= from_the_end_q[:, None])
    s = np.where(allowed, scale_of(q, scale) * q @ np.swapaxes(k, -1, -2), -np.inf)
    lse = np.logaddexp.reduce(s, axis=-1)
    return np.exp(s - np.nan_to_num(lse, neginf=0.0)[..., None]) @ v, lse


@wrong("6.6", "The sequences see each other")
def one_long_sequence(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    return one_mask_of_squares(q, k, v, [0, q.shape[-2]], [0, k.shape[-2]], causal, scale)


@wrong("6.6", "causal is forgotten")
def never_causal(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    return one_mask_of_squares(q, k, v, cu_queries, cu_keys, False, scale)


@wrong("6.6", "The scale is forgotten")
def never_scaled(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    return one_mask_of_squares(q, k, v, cu_queries, cu_keys, causal)


@wrong("6.6", "returned the shape")
def without_leading_axes(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    if q.ndim > 2:
        q, k, v = q[0], k[0], v[0]
    return one_mask_of_squares(q, k, v, cu_queries, cu_keys, causal, scale)


@wrong("6.6", "nan")
def empty_rows_are_nan(q, k, v, cu_queries, cu_keys, causal=False, scale=None):
    out, lse = one_mask_of_squares(q, k, v, cu_queries, cu_keys, causal, scale)
    return np.where(np.isneginf(lse)[..., None], np.nan, out), lse


# --- 6.7 -------------------------------------------------------------------------------------------------------------


@right("6.7")
def blocks_hop(q, k, v, positions, causal=False, scale=None):
    """The blocks move from hand to hand, as messages would."""
    n_ranks, scale = len(q), scale_of(q, scale)
    m, total = np.full((*q.shape[:2], 1), -np.inf), np.zeros((*q.shape[:2], 1))
    o, held = np.zeros((*q.shape[:2], v.shape[-1])), (k, v, positions)
    for _ in range(n_ranks):
        s = scale * q @ held[0].swapaxes(1, 2)
        s = np.where((held[2][:, None] <= positions[:, :, None]) | (not causal), s, -np.inf)
        m_new = np.maximum(m, s.max(-1, keepdims=True))
        safe = np.nan_to_num(m_new, neginf=0.0)
        p, factor = np.exp(s - safe), np.exp(m - safe)
        m, total, o = m_new, total * factor + p.sum(-1, keepdims=True), o * factor + p @ held[1]
        held = tuple(np.roll(a, 1, axis=0) for a in held)  # to the next rank
    return o / total


@right("6.7")
def all_at_once(q, k, v, positions, causal=False, scale=None):
    where = positions.ravel()
    flat = [a.reshape(-1, a.shape[-1]) for a in (q, k, v)]
    s = scale_of(q, scale) * flat[0] @ flat[1].T
    s = np.where((where <= where[:, None]) | (not causal), s, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return (p / p.sum(axis=-1, keepdims=True) @ flat[2]).reshape(*q.shape[:2], -1)


@wrong("6.7", "Each rank sees its own block only")
def no_messages(q, k, v, positions, causal=False, scale=None):
    return np.stack(
        [all_at_once(*(a[r : r + 1] for a in (q, k, v, positions)), causal, scale)[0] for r in range(len(q))]
    )


@wrong("6.7", "causal is forgotten")
def ring_never_causal(q, k, v, positions, causal=False, scale=None):
    return all_at_once(q, k, v, positions, False, scale)


@wrong("6.7", "not the positions in the sequence")
def ring_by_places(q, k, v, positions, causal=False, scale=None):
    return all_at_once(q, k, v, np.arange(positions.size).reshape(positions.shape), causal, scale)


@wrong("6.7", "The keys' positions belong to the block's owner")
def ring_with_own_positions(q, k, v, positions, causal=False, scale=None):
    out = []
    for rank, own in enumerate(positions):
        s = scale_of(q, scale) * q[rank] @ np.concatenate(np.roll(k, -rank, axis=0)).T
        s = np.where((np.tile(own, len(q)) <= own[:, None]) | (not causal), s, -np.inf)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        out.append(p / p.sum(axis=-1, keepdims=True) @ np.concatenate(np.roll(v, -rank, axis=0)))
    return np.array(out)


@wrong("6.7", "The scale is forgotten")
def ring_never_scaled(q, k, v, positions, causal=False, scale=None):
    return all_at_once(q, k, v, positions, causal)


@wrong("6.7", "nan")
def ring_overflows(q, k, v, positions, causal=False, scale=None):
    where = positions.ravel()
    flat = [a.reshape(-1, a.shape[-1]) for a in (q, k, v)]
    p = np.exp(scale_of(q, scale) * flat[0] @ flat[1].T) * ((where <= where[:, None]) | (not causal))
    return (p / p.sum(axis=-1, keepdims=True) @ flat[2]).reshape(*q.shape[:2], -1)


# --- how the lecture calls them --------------------------------------------------------------------------------------

numbers = np.random.default_rng(0).standard_normal
heads = [numbers((2, n, 16)) for n in (37, 53, 53)]
single = [numbers((2, 3, n, 8)).astype(np.float32) for n in (9, 7, 7)]
square = np.arange(12).reshape(3, 4)

# The arguments that the cells after a check pass on, in kind: axes, dtypes, by position or by name.
CALLS = {
    "6.1": [
        ((np.full(3, -np.inf), np.zeros(3), numbers((3, 4))), {}),
        ((np.array([-np.inf]), np.zeros(1), np.array([[-np.inf, -np.inf]])), {}),
        ((np.full((2, 5), -np.inf), np.zeros((2, 5)), numbers((2, 5, 3))), {}),
    ],
    "6.2": [
        (([numbers((5, 4)), numbers((5, 4))], [numbers(5), np.full(5, -np.inf)]), {}),
        (((numbers((5, 4)), numbers((5, 4))), (numbers(5), numbers(5))), {}),
    ],
    "6.3": [
        ((*heads,), {}),
        ((*heads, True, None, 16, 7), {}),
        ((*single, True), {"block_q": 2, "block_k": 2}),
        ((*heads,), {"scale": 1.0}),
        ((*(a[0] for a in heads), True), {}),
    ],
    "6.4": [((256, 256, 64, 64), {})],
    "6.5": [((*single, *keys_outside(*single, True), numbers((2, 3, 9, 8)).astype(np.float32), True), {})],
    "6.6": [((*(numbers((2, 10, 8)) for _ in range(3)), np.array([0, 3, 10]), np.array([0, 3, 10])), {"causal": True})],
    "6.7": [((*(numbers((3, 4, 8)) for _ in range(3)), square, True), {})],
}
