"""Lecture 12: a router and its layer. The oracle goes one token and one expert at a time."""

import torch
from torch import nn

from utils.exercises.arrays import draw
from utils.judge.module import module
from utils.judge.result import Failed

MODULE = "mixture"
SIZES = {"d_model": 6, "n_experts": 4, "d_head": 2, "top_k": 2}


def tensor(rng, *shape):
    return torch.from_numpy(draw(rng, *shape))


class Weights(nn.Module):
    """The parameters of the contract, and what the oracle and the mistakes share."""

    def __init__(self, d_model, n_experts, d_head, top_k, positions=None):
        super().__init__()
        self.n_experts, self.d_head, self.top_k, self.positions = n_experts, d_head, top_k, positions
        wide = n_experts * d_head
        shapes = {"w_router": (d_model, n_experts), "w_q": (d_model, wide), "w_k": (d_model, d_head)}
        shapes |= {"w_v": (d_model, d_head), "w_o": (wide, d_model)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def turned(self, x, places):
        """x (batch, heads, n, d_head), rotated where the layer has positions."""
        return x if self.positions is None else self.positions.rotate(x, places)


@module("12C", MODULE, make=SIZES, importance="essential")
class RoutedAttention(Weights):
    def forward(self, x, causal=True):
        texts = []
        for text in x:
            k, v = self.turned((text @ self.w_k)[None, None], torch.arange(len(text)))[0, 0], text @ self.w_v
            rows = []
            for i, token in enumerate(text):
                logits = token @ self.w_router
                chosen = sorted(range(self.n_experts), key=lambda e: -logits[e].item())[: self.top_k]
                gates, row = torch.softmax(torch.stack([logits[e] for e in chosen]), 0), 0.0
                seen = i + 1 if causal else len(text)
                for gate, e in zip(gates, chosen):
                    own = slice(e * self.d_head, (e + 1) * self.d_head)
                    q = self.turned((token @ self.w_q[:, own])[None, None, None], torch.tensor([i]))[0, 0, 0]
                    p = torch.softmax((k[:seen] * q).sum(-1) / self.d_head**0.5, 0)
                    row = row + gate * ((p[:, None] * v[:seen]).sum(0) @ self.w_o[own])
                rows.append(row)
            texts.append(torch.stack(rows))
        return torch.stack(texts)


@RoutedAttention.property(
    "the weights of the contract",
    hint="Is the class made from RoutedWeights, and does it leave __init__ as it is?",
)
def _(ask, rng):
    ask.parameters()
    ask.parameters(n_experts=3, top_k=1)


@RoutedAttention.property(
    "one token: the chosen experts, their gates, the output",
    hint="A single token attends to itself: which gates multiply the values, and which rows of w_o belong to expert e?",
)
def _(ask, rng):
    ask(tensor(rng, 1, 1, 6), make={**SIZES, "n_experts": 1, "top_k": 1})
    ask(tensor(rng, 1, 1, 6))
    ask(tensor(rng, 3, 1, 6), make={**SIZES, "top_k": 4})


@RoutedAttention.property(
    "several tokens: own queries, shared keys, the scale, the mask",
    hint="Whose tokens are the keys, which number stands under the root, and which tokens may a query see?",
)
def _(ask, rng):
    ask(tensor(rng, 1, 4, 6), make={**SIZES, "top_k": 1})
    ask(3 * tensor(rng, 1, 5, 6))
    ask(3 * tensor(rng, 1, 5, 6), causal=False)


@RoutedAttention.property(
    "several texts, other sizes",
    hint="When tokens of all texts stand in one axis, which token belongs to slot s?",
)
def _(ask, rng):
    ask(2 * tensor(rng, 3, 4, 6))
    ask(2 * tensor(rng, 2, 7, 5), make={"d_model": 5, "n_experts": 6, "d_head": 4, "top_k": 3})


class Turning(nn.Module):
    """RoPE of x (batch, heads, n, d): column i with column i + d/2, as complex numbers."""

    def rotate(self, x, positions):
        half = x.shape[-1] // 2
        angles = positions.double()[:, None] * 100.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles).to(
            torch.complex64 if x.dtype == torch.float32 else torch.complex128
        )
        return torch.cat([turned.real, turned.imag], dim=-1)


@RoutedAttention.property(
    "with RoPE: queries and the shared key are rotated",
    hint="What does self.positions rotate, and by which positions: those of the tokens, or those of the slots?",
)
def _(ask, rng):
    ask(3 * tensor(rng, 2, 5, 6), make={**SIZES, "d_head": 4, "positions": Turning()})


@RoutedAttention.property(
    "gradients reach every weight and the input, the router's too",
    hint="Where does the computation leave torch: detach, .data, .item(), NumPy? Through what does the router get a gradient?",
)
def _(ask, rng):
    ask.gradients(2 * tensor(rng, 2, 4, 6))


@RoutedAttention.property(
    "all at once: float32, RoPE, two texts, large scores",
    hint="Which float type do the positions bring in, and does the softmax survive large scores?",
)
def _(ask, rng):
    ask(20 * tensor(rng, 2, 30, 6).float(), make={**SIZES, "d_head": 4, "top_k": 3, "positions": Turning()})


@RoutedAttention.property(
    "a token pays for the experts that it chose",
    hint="Which rows of x are multiplied by the matrices of expert e: all, or those that chose it?",
)
def _(ask, rng):
    x = tensor(rng, 2, 8, 6)
    few, many = (ask.work(x, **{**SIZES, "d_head": 8, "n_experts": n}) for n in (4, 16))
    router = 2 * 2 * 8 * 6 * (16 - 4)  # multiplications and additions of the logits of twelve more experts
    if many > few + 2 * router:
        raise Failed(f"with 16 experts for 4, two chosen, it multiplies {many / few:.1f} times as much")


class Usual(Weights):
    """The layer in the usual way, dense. The mistakes override one of its methods; as it stands, it is right."""

    def gates(self, logits):
        top, chosen = logits.topk(self.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, chosen, top.softmax(-1))

    def scale(self):
        return self.d_head**-0.5

    def hide(self, scores):
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)

    def scores(self, q, k, causal):
        found = q @ k.mT * self.scale()
        return self.hide(found) if causal else found

    def rotate_both(self, q, k):
        places = torch.arange(q.shape[2])
        return self.turned(q, places), self.turned(k, places)

    def split_o(self):
        return self.w_o.unflatten(0, (self.n_experts, -1))

    def forward(self, x, causal=True):
        q = (x @ self.w_q).unflatten(-1, (self.n_experts, -1)).transpose(1, 2)
        q, k = self.rotate_both(q, (x @ self.w_k)[:, None])
        p = torch.softmax(self.scores(q, k, causal), -1)
        heads = p @ (x @ self.w_v)[:, None]
        return torch.einsum("bne,benh,ehd->bnd", self.gates(x @ self.w_router), heads, self.split_o())


@RoutedAttention.mistake("The gates are probabilities among all experts: here the softmax runs over the chosen logits.")
class _(Usual):
    def gates(self, logits):
        chosen = logits.topk(self.top_k, dim=-1).indices
        return torch.zeros_like(logits).scatter(-1, chosen, logits.softmax(-1).gather(-1, chosen))


@RoutedAttention.mistake("The softmax is taken twice: over all logits, and over the probabilities of the chosen.")
class _(Usual):
    def gates(self, logits):
        top, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        return torch.zeros_like(logits).scatter(-1, chosen, top.softmax(-1))


@RoutedAttention.mistake("All slots of a token get the same gate: it is the softmax of the chosen logits.")
class _(Usual):
    def gates(self, logits):
        return torch.zeros_like(logits).scatter(-1, logits.topk(self.top_k, dim=-1).indices, 1 / self.top_k)


@RoutedAttention.mistake("The gates are missing: each head is multiplied by the gate of its slot.")
class _(Usual):
    def gates(self, logits):
        return torch.zeros_like(logits).scatter(-1, logits.topk(self.top_k, dim=-1).indices, 1.0)


@RoutedAttention.mistake("All experts get a gate: only top_k of them are chosen.")
class _(Usual):
    def gates(self, logits):
        return logits.softmax(-1)


@RoutedAttention.mistake("A slot got another token: flattened, the top_k slots of a token stand side by side.")
class _(Usual):
    def forward(self, x, causal=True):
        batch, n, _ = x.shape
        top, chosen = (x @ self.w_router).topk(self.top_k, dim=-1)
        w_q, w_o = self.w_q.unflatten(1, (self.n_experts, -1)).transpose(0, 1), self.split_o()
        tokens, expert = torch.arange(batch * n).repeat(self.top_k), chosen.flatten()
        q = torch.einsum("sd,sdh->sh", x.flatten(0, 1)[tokens], w_q[expert])
        q = q.view(batch, n, self.top_k, self.d_head).transpose(1, 2)
        q, k = self.rotate_both(q, (x @ self.w_k)[:, None])
        p = torch.softmax(self.scores(q, k, causal), -1)
        heads = (p @ (x @ self.w_v)[:, None]).transpose(1, 2) * top.softmax(-1)[..., None]
        found = torch.einsum("sh,shd->sd", heads.flatten(0, 2), w_o[expert])
        return torch.zeros_like(x.flatten(0, 1)).index_add(0, tokens, found).view_as(x)


@RoutedAttention.mistake("The scale 1/sqrt(d_head) is missing.")
class _(Usual):
    def scale(self):
        return 1.0


@RoutedAttention.mistake("The scale is 1/sqrt(d_model): a query has d_head columns.")
class _(Usual):
    def scale(self):
        return len(self.w_k) ** -0.5


@RoutedAttention.mistake("The mask is missing: a token sees later ones.")
class _(Usual):
    def hide(self, scores):
        return scores


@RoutedAttention.mistake("`causal` is not asked: with causal=False a token sees all tokens.")
class _(Usual):
    def scores(self, q, k, causal):
        return super().scores(q, k, True)


@RoutedAttention.mistake("The shared key is not rotated.")
class _(Usual):
    def rotate_both(self, q, k):
        return self.turned(q, torch.arange(q.shape[2])), k


@RoutedAttention.mistake("The queries are not rotated.")
class _(Usual):
    def rotate_both(self, q, k):
        return q, self.turned(k, torch.arange(q.shape[2]))


@RoutedAttention.mistake("Nothing is rotated: self.positions rotates queries and the shared key.")
class _(Usual):
    def rotate_both(self, q, k):
        return q, k
