"""Lecture 09: the layer with its decoupled rotation. The oracle goes one query and one head at a time."""

import torch
from torch import nn

from utils.exercises.arrays import draw
from utils.judge.module import module

MODULE = "latent"
SIZES = {"d_model": 8, "n_heads": 2, "d_head": 3, "d_latent": 5, "d_rope": 4}


def tensor(rng, *shape):
    return torch.from_numpy(draw(rng, *shape))


def turn(x, positions):
    """RoPE of x (..., n, d): column i with column i + d/2, as complex numbers."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = (positions.double()[:, None] * frequencies).to(x.dtype)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


class Weights(nn.Module):
    """The parameters of the contract, and what the oracle and the mistakes share."""

    def __init__(self, d_model, n_heads, d_head, d_latent, d_rope, d_query=None):
        super().__init__()
        self.n_heads, self.d_head, self.d_rope = n_heads, d_head, d_rope
        d_in = d_query or d_model
        shapes = {
            "w_dkv": (d_model, d_latent),
            "w_kr": (d_model, d_rope),
            "w_uk": (d_latent, n_heads * d_head),
            "w_uv": (d_latent, n_heads * d_head),
            "w_uq": (d_in, n_heads * d_head),
            "w_qr": (d_in, n_heads * d_rope),
            "w_o": (n_heads * d_head, d_model),
        }
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))
        self.norm_kv = nn.RMSNorm(d_latent, eps=1e-6)
        if d_query:
            self.w_dq = nn.Parameter(torch.zeros(d_model, d_query))
            self.norm_q = nn.RMSNorm(d_query, eps=1e-6)

    def queries_from(self, x):
        return self.norm_q(x @ self.w_dq) if hasattr(self, "w_dq") else x

    def split(self, x):
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


@module("9B", MODULE, make=SIZES, importance="essential")
class LatentAttention(Weights):
    def forward(self, x):
        n, d, r = x.shape[1], self.d_head, self.d_rope
        positions, c_q, c_kv = torch.arange(n), self.queries_from(x), self.norm_kv(x @ self.w_dkv)
        k_rope, heads = turn(x @ self.w_kr, positions), []
        for h in range(self.n_heads):
            own, turned = slice(h * d, (h + 1) * d), slice(h * r, (h + 1) * r)
            q, q_rope = c_q @ self.w_uq[:, own], turn(c_q @ self.w_qr[:, turned], positions)
            k, v, rows = c_kv @ self.w_uk[:, own], c_kv @ self.w_uv[:, own], []
            for i in range(n):
                scores = (k[:, : i + 1] * q[:, i, None]).sum(-1)
                scores = scores + (k_rope[:, : i + 1] * q_rope[:, i, None]).sum(-1)
                weights = torch.softmax(scores / (d + r) ** 0.5, dim=-1)
                rows.append((weights[..., None] * v[:, : i + 1]).sum(1))
            heads.append(torch.stack(rows, dim=1))
        return torch.cat(heads, dim=-1) @ self.w_o


@LatentAttention.property(
    "the weights of the contract",
    hint="Is the class made from LatentWeights, and does it leave __init__ as it is?",
)
def _(ask, rng):
    ask.parameters()
    ask.parameters(d_query=6)


@LatentAttention.property(
    "one token: the latent, its norm, the values",
    hint="A single token attends to itself: which norm stands before W_UV, and what comes after the heads are merged?",
)
def _(ask, rng):
    ask(tensor(rng, 1, 1, 8))
    ask(tensor(rng, 3, 1, 8))


@LatentAttention.property(
    "several tokens: two products, the scale, the mask",
    hint="Which two products are added, which number stands under the root, and which tokens may a query see?",
)
def _(ask, rng):
    ask(tensor(rng, 1, 4, 8))
    ask(3 * tensor(rng, 2, 5, 8))


@LatentAttention.property(
    "other sizes, and queries from a latent of their own",
    hint="Which sizes do you read off the weights, and from what are the queries made when there is a w_dq?",
)
def _(ask, rng):
    ask(2 * tensor(rng, 2, 4, 6), make={"d_model": 6, "n_heads": 3, "d_head": 2, "d_latent": 7, "d_rope": 2})
    ask(2 * tensor(rng, 2, 4, 8), make={**SIZES, "d_query": 6})


@LatentAttention.property(
    "gradients reach every weight and the input",
    hint="Where does the computation leave torch: detach, .data, .item(), NumPy?",
)
def _(ask, rng):
    ask.gradients(2 * tensor(rng, 1, 4, 8))


@LatentAttention.property(
    "all at once: float32, a long text, large scores",
    hint="Which float type do the positions bring in, and does the softmax survive large scores?",
)
def _(ask, rng):
    ask(40 * tensor(rng, 1, 70, 8).float(), make={**SIZES, "n_heads": 1, "d_query": 3})


class Usual(Weights):
    """The layer in the usual way. The mistakes override one of its methods; as it stands, it is right."""

    def latent(self, x):
        return self.norm_kv(x @ self.w_dkv)

    def shared_key(self, x, positions):
        return turn(x @ self.w_kr, positions)[:, None]

    def rotated(self, q, positions):
        return turn(q, positions)

    def columns(self):
        return self.d_head + self.d_rope

    def scores(self, nope, rope):
        return (nope + rope) / self.columns() ** 0.5

    def hide(self, scores):
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)

    def forward(self, x):
        positions, c_q, c_kv = torch.arange(x.shape[1]), self.queries_from(x), self.latent(x)
        k, v = self.split(c_kv @ self.w_uk), self.split(c_kv @ self.w_uv)
        q, q_rope = self.split(c_q @ self.w_uq), self.rotated(self.split(c_q @ self.w_qr), positions)
        scores = self.scores(q @ k.mT, q_rope @ self.shared_key(x, positions).mT)
        return (torch.softmax(self.hide(scores), -1) @ v).transpose(1, 2).flatten(2) @ self.w_o


@LatentAttention.mistake("The scale is 1/sqrt(d_head): a key has d_head + d_rope columns.")
class _(Usual):
    def columns(self):
        return self.d_head


@LatentAttention.mistake("The scale is 1/sqrt(d_latent + d_rope): the key has d_head + d_rope columns, in both forms.")
class _(Usual):
    def columns(self):
        return len(self.w_uk) + self.d_rope


@LatentAttention.mistake("The scores are not scaled: multiply by self.scale.")
class _(Usual):
    def columns(self):
        return 1


@LatentAttention.mistake("The latent is not normalised: norm_kv stands between W_DKV and both up-projections.")
class _(Usual):
    def latent(self, x):
        return x @ self.w_dkv


@LatentAttention.mistake("The rotated part is missing: its product is added to the score.")
class _(Usual):
    def scores(self, nope, rope):
        return nope / self.columns() ** 0.5


@LatentAttention.mistake("The scale is applied to the first product only: both are scaled together.")
class _(Usual):
    def scores(self, nope, rope):
        return nope / self.columns() ** 0.5 + rope


@LatentAttention.mistake(
    "All texts get the shared keys of the first one: take the axis of heads away, not that of texts."
)
class _(Usual):
    def shared_key(self, x, positions):
        return super().shared_key(x, positions)[:1]


@LatentAttention.mistake("The shared key is not rotated.")
class _(Usual):
    def shared_key(self, x, positions):
        return (x @ self.w_kr)[:, None]


@LatentAttention.mistake("The queries' rotated part is not rotated.")
class _(Usual):
    def rotated(self, q, positions):
        return q


@LatentAttention.mistake("Neither rotated part is rotated: without it nothing tells positions.")
class _(Usual):
    def shared_key(self, x, positions):
        return (x @ self.w_kr)[:, None]

    def rotated(self, q, positions):
        return q


@LatentAttention.mistake("The mask is missing: a token sees later ones.")
class _(Usual):
    def hide(self, scores):
        return scores


@LatentAttention.mistake("The shared key went through a norm: only the latent does.")
class _(Usual):
    def shared_key(self, x, positions):
        rows = x @ self.w_kr
        return turn(rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt(), positions)[:, None]
