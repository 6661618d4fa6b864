"""Answers to the exercises of lecture 06 in PyTorch, a backward pass and a layer, as in answers.py."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from attention.flash import flash_attention_torch
from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


def scale_of(q, scale):
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


# --- 6D --------------------------------------------------------------------------------------------------------------


@wrong("6D", "scores go through exp at once, of 70,200 in all")
def by_autograd(q, k, v, out, lse, d_out, causal=False, scale=None):
    scores = scale_of(q, scale) * q @ k.mT
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2]) | (not causal)
    p = torch.exp(scores.masked_fill(~allowed, -math.inf) - lse.masked_fill(lse == -math.inf, math.inf)[..., None])
    d_p = d_out @ v.mT
    d_s = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale_of(q, scale)
    return d_s @ k, d_s.mT @ q, p.mT @ d_out


@right("6D")
def queries_one_by_one(q, k, v, out, lse, d_out, causal=False, scale=None):
    scale, shift = scale_of(q, scale), k.shape[-2] - q.shape[-2]
    d_q, d_k, d_v = (torch.zeros_like(a) for a in (q, k, v))
    for i in range(q.shape[-2]):
        end = max(0, i + 1 + shift) if causal else k.shape[-2]
        if not end:
            continue
        k_i, v_i = k[..., :end, :], v[..., :end, :]
        p = torch.exp(scale * torch.einsum("...jd,...d->...j", k_i, q[..., i, :]) - lse[..., i, None])
        d_p = torch.einsum("...jd,...d->...j", v_i, d_out[..., i, :])
        d_s = scale * p * (d_p - (out[..., i, :] * d_out[..., i, :]).sum(-1)[..., None])
        d_q[..., i, :] = torch.einsum("...j,...jd->...d", d_s, k_i)
        d_k[..., :end, :] += d_s[..., None] * q[..., i, None, :]
        d_v[..., :end, :] += p[..., None] * d_out[..., i, None, :]
    return d_q, d_k, d_v


def visited(n_queries, n_keys, causal):
    """Tiles of 64, keys outside: slices, and who may attend in them."""
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries) | (not causal)
    for j in range(0, n_keys, 64):
        for i in range(0, n_queries, 64):
            rows, columns = slice(i, i + 64), slice(j, j + 64)
            if mask[rows, columns].any():
                yield rows, columns, mask[rows, columns]


def in_tiles(tile):
    """The given loop around what `tile` does with one: it returns P and dS."""

    def answer(q, k, v, out, lse, d_out, causal=False, scale=None):
        scale, big_d = scale_of(q, scale), (d_out * out).sum(-1)
        d_q, d_k, d_v = (torch.zeros_like(a) for a in (q, k, v))
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        for rows, columns, allowed in visited(q.shape[-2], k.shape[-2], causal):
            s = scale * q[..., rows, :] @ k[..., columns, :].mT
            d_p = d_out[..., rows, :] @ v[..., columns, :].mT
            p, d_s = tile(s, d_p, allowed, lse[..., rows], big_d[..., rows, None], scale)
            d_v[..., columns, :] += p.mT @ d_out[..., rows, :]
            d_k[..., columns, :] += d_s.mT @ q[..., rows, :]
            d_q[..., rows, :] += d_s @ k[..., columns, :]
        return d_q, d_k, d_v

    return answer


@right("6D")
@in_tiles
def masked_afterwards(s, d_p, allowed, lse, big_d, scale):
    p = torch.where(allowed, torch.exp(torch.where(allowed, s, 0) - lse[..., None]), 0)
    return p, p * (d_p - big_d) * scale


def like(words, tile):
    WRONG.setdefault("6D", []).append((in_tiles(tile), words))


def weights(s, allowed, lse):
    return torch.exp(s.masked_fill(~allowed, -math.inf) - lse[..., None])


def unmasked(s, d_p, allowed, lse, big_d, scale):
    p = torch.exp(s - lse[..., None])
    return p, p * (d_p - big_d) * scale


def without_d(s, d_p, allowed, lse, big_d, scale):
    p = weights(s, allowed, lse)
    return p, p * d_p * scale


def unscaled(s, d_p, allowed, lse, big_d, scale):
    p = weights(s, allowed, lse)
    return p, p * (d_p - big_d)


def five_percent_off(s, d_p, allowed, lse, big_d, scale):
    p = weights(s, allowed, lse)
    return p, 1.05 * p * (d_p - big_d) * scale


def without_its_axis(s, d_p, allowed, lse, big_d, scale):
    p = torch.exp(s.masked_fill(~allowed, -math.inf) - lse)
    return p, p * (d_p - big_d) * scale


def softmax_of_a_tile(s, d_p, allowed, lse, big_d, scale):
    p = torch.softmax(s.masked_fill(~allowed, -math.inf), -1).nan_to_num()
    return p, p * (d_p - big_d) * scale


def d_of_a_tile(s, d_p, allowed, lse, big_d, scale):
    p = weights(s, allowed, lse)
    return p, p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale


def unscaled_scores(s, d_p, allowed, lse, big_d, scale):
    p = weights(s / scale, allowed, lse)
    return p, p * (d_p - big_d) * scale


like("The mask is missing", unmasked)
like("The weights are those of one tile", softmax_of_a_tile)
like("D belongs to the whole row", d_of_a_tile)
like("The scale is missing in S", unscaled_scores)
like("D is missing", without_d)
like("The scale is missing in dQ and dK", unscaled)
like("d_q: ", five_percent_off)
like("Error in line", without_its_axis)


@wrong("6D", "returned the shape")
def without_leading_axes(q, k, v, out, lse, d_out, causal=False, scale=None):
    if q.dim() > 2:
        q, k, v, out, lse, d_out = (a[0] for a in (q, k, v, out, lse, d_out))
    return queries_one_by_one(q, k, v, out, lse, d_out, causal, scale)


@wrong("6D", "returned float64, expected float32")
def in_double(q, k, v, out, lse, d_out, causal=False, scale=None):
    return tuple(a.double() for a in queries_one_by_one(q, k, v, out, lse, d_out, causal, scale))


@wrong("6D", "d_v: ")
def loud_values(q, k, v, out, lse, d_out, causal=False, scale=None):
    d_q, d_k, d_v = queries_one_by_one(q, k, v, out, lse, d_out, causal, scale)
    return d_q, d_k, d_v * (1 + 1e-3)


# --- 6E --------------------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """Text after text through torch's own attention, in parts that a wrong answer replaces."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads, self.d_head = n_heads, d_model // n_heads
        for name in ("w_q", "w_k", "w_v", "w_o"):
            setattr(self, name, nn.Parameter(torch.randn(d_model, d_model) / math.sqrt(d_model)))

    def heads(self, x, w):
        return (x @ w).view(len(x), self.n_heads, self.d_head).permute(1, 0, 2)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]

    def merge(self, out):
        return out.permute(1, 0, 2).flatten(1)

    def borders(self, starts):
        return [int(start) for start in starts]

    def forward(self, x, starts):
        found = []
        borders = self.borders(starts)
        for begin, end in zip(borders[:-1], borders[1:]):
            if end > begin:
                own = x[begin:end]
                out = self.attend(*(self.heads(own, w) for w in (self.w_q, self.w_k, self.w_v)))
                found.append(self.merge(out))
        return torch.cat(found) @ self.w_o


right("6E")(Packed)


@right("6E")
class InTiles(Packed):
    def attend(self, q, k, v):
        return flash_attention_torch(q, k, v, causal=True)[0]


@right("6E")
class OneMask(Packed):
    def forward(self, x, starts):
        text = torch.searchsorted(starts[1:], torch.arange(len(x)), right=True)
        allowed = (text[:, None] == text).tril()
        q, k, v = (self.heads(x, w)[None] for w in (self.w_q, self.w_k, self.w_v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)[0]
        return out.transpose(0, 1).flatten(1) @ self.w_o


@wrong("6E", "The texts see each other")
class OneLongText(Packed):
    def borders(self, starts):
        return [0, int(starts[-1])]


@wrong("6E", "A token sees later ones of its text")
class NotCausal(Packed):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


@wrong("6E", "The columns are dealt out")
class DealtOut(Packed):
    def heads(self, x, w):
        return (x @ w).view(len(x), self.d_head, self.n_heads).permute(2, 0, 1)

    def merge(self, out):
        return out.permute(1, 2, 0).flatten(1)


@wrong("6E", "is missing")
class WithLinearLayers(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)


@wrong("6E", "gradients reach every parameter")
class Detached(Packed):
    def attend(self, q, k, v):
        return super().attend(q, k, v.detach())


@wrong("6E", "one text: causal self-attention")
class ScaleFivePercentOff(Packed):
    def attend(self, q, k, v):
        return super().attend(1.05 * q, k, v)


@wrong("6E", "many texts")
class LastTwoTextsAreOne(Packed):
    def borders(self, starts):
        borders = super().borders(starts)
        return borders[:-2] + borders[-1:] if len(borders) > 3 else borders
