"""Answers to the exercises of lecture 09 in PyTorch, a layer, a real model's attention and a test, as in answers.py."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attention.latent import LatentWeights
from attention.multi_head import merge_heads, split_heads
from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 9B --------------------------------------------------------------------------------------------------------------


@right("9B")
class WithPytorchsFunction(LatentWeights):
    """Keys of both parts side by side, as models store them."""

    def project(self, x, positions):
        c_q = self.norm_q(x @ self.w_dq) if hasattr(self, "w_dq") else x
        q, q_r = split_heads(c_q @ self.w_uq, self.n_heads), split_heads(c_q @ self.w_qr, self.n_heads)
        k_r = self.positions.rotate((x @ self.w_kr).unsqueeze(1), positions).squeeze(1)
        return q, self.positions.rotate(q_r, positions), self.norm_kv(x @ self.w_dkv), k_r

    def keys_and_values(self, c_kv):
        return (split_heads(c_kv @ w, self.n_heads) for w in (self.w_uk, self.w_uv))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)

    def forward(self, x):
        q, q_r, c_kv, k_r = self.project(x, torch.arange(x.shape[1]))
        k, v = self.keys_and_values(c_kv)
        q = torch.cat([q, q_r], dim=-1)
        k = torch.cat([k, k_r[:, None].expand(-1, self.n_heads, -1, -1)], dim=-1)
        return merge_heads(self.attend(q, k, v)) @ self.w_o


@right("9B")
class Absorbed(WithPytorchsFunction):
    def forward(self, x):
        q, q_r, c, k_r = self.project(x, torch.arange(x.shape[1]))
        w_uk, w_uv = (w.view(len(w), self.n_heads, -1) for w in (self.w_uk, self.w_uv))
        s = torch.einsum("bhid,rhd,bjr->bhij", q, w_uk, c) + torch.einsum("bhir,bjr->bhij", q_r, k_r)
        future = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)
        p = (s * self.scale).masked_fill(future, -math.inf).softmax(-1)
        return torch.einsum("bhij,bjr,rhd->bihd", p, c, w_uv).flatten(2) @ self.w_o


@wrong("9B", "a parameter too many")
class OneMore(WithPytorchsFunction):
    def __init__(self, *sizes, **more):
        super().__init__(*sizes, **more)
        self.norm_k = nn.RMSNorm(4)


@wrong("9B", "The scale is 1/sqrt(d_latent + d_rope)")
class Scale576(WithPytorchsFunction):
    def attend(self, q, k, v):
        columns = len(self.w_uk) + self.w_kr.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=columns**-0.5)


@wrong("9B", "several tokens")
class ScaleFivePercentOff(WithPytorchsFunction):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.05 * self.scale)


@wrong("9B", "The mask is missing")
class SeesTheFuture(WithPytorchsFunction):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


@wrong("9B", "The latent is not normalised")
class NormForgotten(WithPytorchsFunction):
    def project(self, x, positions):
        q, q_r, _, k_r = super().project(x, positions)
        return q, q_r, x @ self.w_dkv, k_r


@wrong("9B", "one token")
class ValuesFromX(WithPytorchsFunction):
    def keys_and_values(self, c_kv):
        return (split_heads(c_kv @ w, self.n_heads) for w in (self.w_uk, self.w_uk))


@wrong("9B", "Error")
class SharedKeyOfOneHead(WithPytorchsFunction):
    def project(self, x, positions):
        q, q_r, c_kv, k_r = super().project(x, positions)
        return q, q_r, c_kv, k_r[:, :, : k_r.shape[2] // 2]


@wrong("9B", "gradients reach every weight")
class Detached(WithPytorchsFunction):
    def project(self, x, positions):
        q, q_r, c_kv, k_r = super().project(x, positions)
        return q, q_r.detach(), c_kv, k_r


@wrong("9B", "other sizes")
class QueriesFromX(WithPytorchsFunction):
    def project(self, x, positions):
        if not hasattr(self, "w_dq"):
            return super().project(x, positions)
        others = super().project(x, positions)
        q, q_r = (split_heads((x @ self.w_dq) @ w, self.n_heads) for w in (self.w_uq, self.w_qr))
        return q, self.positions.rotate(q_r, positions), *others[2:]


@wrong("9B", "all at once")
class NotShifted(WithPytorchsFunction):
    def attend(self, q, k, v):
        powers = (q @ k.mT * self.scale).exp().tril()
        return powers / powers.sum(-1, keepdim=True) @ v


# --- 9D --------------------------------------------------------------------------------------------------------------


@right("9D")
def compares_with_pytorch(decode):
    rng = np.random.default_rng(3)
    for size in (2.0, 1e3):
        q, r, c, k_r = (
            size * rng.normal(size=(2, 7)),
            size * rng.normal(size=(2, 4)),
            *map(rng.normal, (0, 0), (1, 1), ((5, 9), (5, 4))),
        )
        w_uk, w_uv = rng.normal(size=(2, 9, 7)), rng.normal(size=(2, 9, 3))
        keys = torch.from_numpy(np.concatenate([c @ w_uk, np.stack([k_r] * 2)], axis=-1))
        query = torch.from_numpy(np.concatenate([q, r], axis=-1))[:, None]
        expected = F.scaled_dot_product_attention(query, keys, torch.from_numpy(c @ w_uv))[:, 0].numpy()
        got = decode(q, r, c, k_r, w_uk, w_uv)
        assert np.isfinite(got).all() and np.abs(got - expected).max() < 1e-6 * np.abs(expected).max()


def sizes_of(size, heads=2, d=6, rope=4, n=5, latent=8):
    rng = np.random.default_rng(7)
    shapes = ((heads, d), (heads, rope), (n, latent), (n, rope), (heads, latent, d), (heads, latent, 3))
    arrays = [rng.normal(size=shape) for shape in shapes]
    arrays[0], arrays[1] = size * arrays[0], size * arrays[1]
    return arrays


def formula(q, r, c, k_r, w_uk, w_uv):
    s = np.stack([c @ w_uk[h] @ q[h] + k_r @ r[h] for h in range(len(q))]) / math.sqrt(q.shape[1] + r.shape[1])
    p = np.exp(s - s.max(1, keepdims=True))
    return np.stack([p[h] / p[h].sum() @ c @ w_uv[h] for h in range(len(q))])


@wrong("9D", "With even weights no scale shows")
def small_weights(decode):
    arrays = sizes_of(1e-4)
    assert np.allclose(decode(*arrays), formula(*arrays), atol=1e-3)
    large = sizes_of(1e4)
    assert np.isfinite(decode(*large)).all()


@wrong("9D", "Has your test scores of 1000 and more?")
def moderate_scores(decode):
    arrays = sizes_of(1.0)
    assert np.allclose(decode(*arrays), formula(*arrays))


@wrong("9D", "A test says no with an exception")
def returns_the_verdict(decode):
    arrays = sizes_of(1.0)
    return np.allclose(decode(*arrays), formula(*arrays))


@wrong("9D", "The right code is refused")
def expects_576(decode):
    arrays = sizes_of(1.0)
    assert np.allclose(decode(*arrays), formula(*arrays) * 1.1)


@wrong("9D", "With even weights no scale shows")
def shape_only(decode):
    arrays = sizes_of(1e4)
    got = decode(*arrays)
    assert got.shape == (2, 3) and np.isfinite(got).all()


@wrong("9D", "Is each head compared")
def one_head(decode):
    for size in (1.0, 1e4):
        arrays = sizes_of(size, heads=1)
        assert np.allclose(decode(*arrays), formula(*arrays))


@wrong("9D", "q_rope and k_rope")
def rotated_parts_of_zero(decode):
    for size in (1.0, 1e4):
        arrays = sizes_of(size)
        arrays[1] = 0 * arrays[1]
        assert np.allclose(decode(*arrays), formula(*arrays))


@wrong("9D", "Has each head a q_rope of its own?")
def equal_rotated_queries(decode):
    for size in (1.0, 1e4):
        arrays = sizes_of(size)
        arrays[1] = np.repeat(arrays[1][:1], 2, axis=0)
        assert np.allclose(decode(*arrays), formula(*arrays))


@wrong("9D", "Does every token of your cache change the output?")
def first_token_without_weight(decode):
    for size in (1.0, 1e4):
        arrays = sizes_of(size)
        arrays[2][0] = arrays[2][1]
        arrays[3][0] = arrays[3][1]
        arrays[2][1:3] = arrays[2][0]
        arrays[3][1:3] = arrays[3][0]
        arrays[2][:], arrays[3][:] = arrays[2][0], arrays[3][0]
        assert np.allclose(decode(*arrays), formula(*arrays))
    more = sizes_of(1.0)
    more[2][0], more[3][0] = -50 * np.abs(more[2][0]), 0.0
    more[4], more[0] = np.abs(more[4]), np.abs(more[0])
    assert np.allclose(decode(*more), formula(*more))


# --- 9E --------------------------------------------------------------------------------------------------------------


@right("9E")
def with_one_hot_selection(q, k, v):
    heads, groups, d = q.shape[1], k.shape[1], q.shape[3]
    c = torch.cat([k, v], 1).permute(0, 2, 1, 3).flatten(2)  # (batch, n_keys, 2 * groups * d)
    choose = torch.eye(groups, dtype=q.dtype).repeat_interleave(heads // groups, 0)  # (heads, groups)
    w_uk = torch.einsum("hg,de->hgde", choose, torch.eye(d, dtype=q.dtype)).reshape(heads, groups * d, d)
    nothing = torch.zeros_like(w_uk)
    wide = q @ torch.cat([w_uk, nothing], 1).mT
    n, m = q.shape[2], k.shape[2]
    seen = torch.arange(m) <= torch.arange(n)[:, None] + (m - n)
    p = F.softmax((wide @ c[:, None].mT * d**-0.5).masked_fill(~seen, -math.inf), -1)
    return p @ c[:, None] @ torch.cat([nothing, w_uk], 1)


@right("9E")
def with_sdpa(q, k, v):
    heads, groups, n, m = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    return F.scaled_dot_product_attention(q, *(a.repeat_interleave(heads // groups, 1) for a in (k, v)), attn_mask=seen)


def grouped(q, k, v, spread=torch.repeat_interleave, **more):
    n, m = q.shape[2], k.shape[2]
    seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    share = q.shape[1] // k.shape[1]
    k, v = (spread(a, share, dim=1) if spread is torch.repeat_interleave else spread(a, share) for a in (k, v))
    return F.scaled_dot_product_attention(q, k, v, **{"attn_mask": seen} | more)


@wrong("9E", "The scale is that of the wide key")
def wide_scale(q, k, v):
    return grouped(q, k, v, scale=(2 * k.shape[1] * q.shape[-1]) ** -0.5)


@wrong("9E", "the scale stays")
def scale_five_percent_off(q, k, v):
    return grouped(q, k, v, scale=(1.05 if q.shape[-1] == 5 else 1) * q.shape[-1] ** -0.5)


@wrong("9E", "neighbouring heads share")
def in_turns(q, k, v):
    return grouped(q, k, v, spread=lambda a, share: a.repeat(1, share, 1, 1))


@wrong("9E", "The mask is missing")
def everything_seen(q, k, v):
    return grouped(q, k, v, attn_mask=None)


@wrong("9E", "The mask starts at the top left")
def torchs_causal(q, k, v):
    return grouped(q, k, v, attn_mask=None, is_causal=True)


@wrong("9E", "gradients reach q, k and v")
def detached(q, k, v):
    return grouped(q, k.detach(), v)


@wrong("9E", "one head, one group")
def keys_for_values(q, k, v):
    return grouped(q, k, k)


@wrong("9E", "all at once")
def not_shifted(q, k, v):
    share, (n, m) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = (a.repeat_interleave(share, 1) for a in (k, v))
    p = (q @ k.mT / math.sqrt(q.shape[-1])).exp().tril(m - n)
    return p / p.sum(-1, keepdim=True) @ v
