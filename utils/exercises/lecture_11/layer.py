"""Lecture 11: the layer with its lambda. The oracle goes one head and one query at a time."""

import math

import torch
from torch import nn

from utils.exercises.arrays import draw
from utils.exercises.positions import Turned
from utils.judge.module import module

MODULE = "differential"
SIZES = {"d_model": 8, "n_heads": 2, "depth": 1}
VECTORS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def tensor(rng, *shape):
    return torch.from_numpy(draw(rng, *shape))


class Weights(nn.Module):
    """The parameters of the contract, and what the oracle and the mistakes share."""

    def __init__(self, d_model, n_heads, depth=0, positions=None):
        super().__init__()
        self.n_heads, self.d_head, self.positions = n_heads, d_model // n_heads // 2, positions
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        for name in ("w_q", "w_k", "w_v", "w_o"):
            setattr(self, name, nn.Parameter(torch.zeros(d_model, d_model)))
        for name in VECTORS:
            setattr(self, name, nn.Parameter(torch.zeros(self.d_head)))
        self.norm = nn.RMSNorm(2 * self.d_head, eps=1e-5)

    def turned(self, x, positions):
        """x (batch, heads, n, d_head), rotated where the module has positions."""
        if self.positions is None:
            return x
        return self.positions.rotate(x, torch.arange(x.shape[2]) if positions is None else positions)

    def lam_of(self, vectors):
        q1, k1, q2, k2 = vectors
        return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + self.lambda_init


@module("11B", MODULE, make=SIZES, importance="essential")
class DifferentialAttention(Weights):
    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        n, d, lam = x.shape[1], self.d_head, self.lam_of([getattr(self, name) for name in VECTORS])
        q, k = (self.turned((x @ w).unflatten(-1, (-1, d)).transpose(1, 2), positions) for w in (self.w_q, self.w_k))
        allowed = torch.ones(n, n, dtype=torch.bool).tril() if causal else torch.ones(n, n, dtype=torch.bool)
        allowed = allowed if mask is None else allowed & mask
        heads = []
        for h in range(self.n_heads):
            v, rows = x @ self.w_v[:, 2 * d * h : 2 * d * (h + 1)], []
            for i in range(n):
                out = 0 * v[:, 0]
                for which, share in ((2 * h, 1.0), (2 * h + 1, -lam)):
                    if allowed[i].any():
                        scores = (k[:, which, allowed[i]] * q[:, which, i, None]).sum(-1) / d**0.5
                        out = out + share * (torch.softmax(scores, -1)[..., None] * v[:, allowed[i]]).sum(1)
                rows.append(out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.norm.weight)
            heads.append(torch.stack(rows, dim=1) * (1 - self.lambda_init))
        return torch.cat(heads, dim=-1) @ self.w_o


@DifferentialAttention.property(
    "the weights of the contract",
    hint="Is the class made from DifferentialWeights, and does it leave __init__ as it is?",
)
def _(ask, rng):
    ask.parameters()
    ask.parameters(d_model=12, n_heads=3)


@DifferentialAttention.property(
    "one token: the values, the norm of each head, the factor",
    hint="A single token has two maps of 1: what is left of the values, what do the norm and "
    "self.factor make of it, and on which side stands self.w_o?",
)
def _(ask, rng):
    ask(tensor(rng, 1, 1, 8))
    ask(tensor(rng, 3, 1, 8))


@DifferentialAttention.property(
    "several tokens: pairs, lambda, the scale",
    hint="Which two heads are a pair, which of them is multiplied by lambda, and which width stands under the root?",
)
def _(ask, rng):
    ask(tensor(rng, 1, 4, 8))
    ask(2 * tensor(rng, 2, 5, 8))


@DifferentialAttention.property(
    "causal, and a mask", hint="Which arguments does masked_softmax take beside the scores, and do you hand both on?"
)
def _(ask, rng):
    ask(2 * tensor(rng, 2, 4, 8), causal=True)
    mask = torch.tensor([[True, True, False, True]] * 4)
    ask(2 * tensor(rng, 1, 4, 8), mask=mask)
    ask(2 * tensor(rng, 2, 4, 8), mask=mask, causal=True)
    ask(tensor(rng, 1, 3, 8), mask=torch.zeros(3, 3, dtype=torch.bool))


@DifferentialAttention.property(
    "other sizes, depths and positions",
    hint="Which sizes do you read off self, and are positions handed to self.project?",
)
def _(ask, rng):
    ask(2 * tensor(rng, 2, 4, 12), make={"d_model": 12, "n_heads": 3, "depth": 0})
    ask(2 * tensor(rng, 1, 4, 4), make={"d_model": 4, "n_heads": 1, "depth": 5})
    ask(2 * tensor(rng, 1, 4, 8), make={**SIZES, "positions": Turned()})
    ask(2 * tensor(rng, 2, 3, 8), make={**SIZES, "positions": Turned()}, positions=torch.tensor([4, 5, 9]), causal=True)


@DifferentialAttention.property(
    "gradients reach every weight, the four vectors of lambda and the input",
    hint="Where does the computation leave torch: detach, .data, .item(), float()?",
)
def _(ask, rng):
    ask.gradients(2 * tensor(rng, 1, 4, 8), causal=True)


@DifferentialAttention.property(
    "all at once: float32, a long text, large scores, a mask",
    hint="Which float type does a number of your own bring in, and does the softmax survive large scores?",
)
def _(ask, rng):
    mask = torch.rand(70, 70, generator=torch.Generator().manual_seed(0)) < 0.7
    ask(tensor(rng, 1, 70, 8).float(), make={**SIZES, "n_heads": 1}, mask=mask, causal=True)
    ask(40 * tensor(rng, 2, 30, 8), make={**SIZES, "positions": Turned()}, mask=mask[:30, :30], causal=True)


class Usual(Weights):
    """The layer in the usual way. The mistakes override one of its methods; as it stands, it is right."""

    def lam(self):
        return self.lam_of([getattr(self, name) for name in VECTORS])

    def width(self):
        return self.d_head

    def pairs(self, maps):
        return maps[:, 0::2], maps[:, 1::2]

    def difference(self, first, second):
        return first - self.lam() * second

    def after(self, heads):
        return self.norm(heads) * (1 - self.lambda_init)

    def seen(self, n, mask, causal):
        allowed = torch.ones(n, n, dtype=torch.bool)
        allowed = allowed.tril() if causal else allowed
        return allowed if mask is None else allowed & mask

    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        q, k = ((x @ w).unflatten(-1, (-1, self.d_head)).transpose(1, 2) for w in (self.w_q, self.w_k))
        q, k = self.turned(q, positions), self.turned(k, positions)
        v = (x @ self.w_v).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        seen = self.seen(x.shape[1], mask, causal)
        scores = (q @ k.mT / self.width() ** 0.5).masked_fill(~seen, -torch.inf)
        maps = torch.softmax(scores, -1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
        heads = self.after(self.difference(*self.pairs(maps)) @ v)
        return heads.transpose(1, 2).flatten(2) @ self.w_o


@DifferentialAttention.mistake("Heads i and i + n_heads are paired: in this contract 2i and 2i + 1 are.")
class _(Usual):
    def pairs(self, maps):
        return maps.chunk(2, dim=1)


@DifferentialAttention.mistake(
    "The second map of each pair has to be subtracted from the first, not the other way round."
)
class _(Usual):
    def pairs(self, maps):
        return maps[:, 1::2], maps[:, 0::2]


@DifferentialAttention.mistake(
    "lambda_init is not added: lambda is the difference of the exponentials plus lambda_init."
)
class _(Usual):
    def lam(self):
        return super().lam() - self.lambda_init


@DifferentialAttention.mistake("lambda is lambda_init alone: the four vectors are not used.")
class _(Usual):
    def lam(self):
        return self.lambda_init + 0 * super().lam()


@DifferentialAttention.mistake("The two exponentials are added: the second is subtracted.")
class _(Usual):
    def lam(self):
        first, second = (self.lambda_q1 @ self.lambda_k1).exp(), (self.lambda_q2 @ self.lambda_k2).exp()
        return first + second + self.lambda_init


@DifferentialAttention.mistake("The exponentials are missing: lambda has exp of each product of two vectors.")
class _(Usual):
    def lam(self):
        return self.lambda_q1 @ self.lambda_k1 - self.lambda_q2 @ self.lambda_k2 + self.lambda_init


@DifferentialAttention.mistake("exp is taken of each product of two numbers: first the sum over d_head, then exp.")
class _(Usual):
    def lam(self):
        first, second = (self.lambda_q1 * self.lambda_k1).exp(), (self.lambda_q2 * self.lambda_k2).exp()
        return first.sum() - second.sum() + self.lambda_init


@DifferentialAttention.mistake("lambda is not used: the second map is multiplied by it.")
class _(Usual):
    def difference(self, first, second):
        return first - second


@DifferentialAttention.mistake("The second map is added: it has to be subtracted.")
class _(Usual):
    def difference(self, first, second):
        return first + self.lam() * second


@DifferentialAttention.mistake("The norm is missing: each head goes through self.norm.")
class _(Usual):
    def after(self, heads):
        return heads * (1 - self.lambda_init)


@DifferentialAttention.mistake("The factor is missing: each head is multiplied by 1 - lambda_init, self.factor.")
class _(Usual):
    def after(self, heads):
        return self.norm(heads)


@DifferentialAttention.mistake("The factor is 1 - lambda: it is 1 - lambda_init, a constant.")
class _(Usual):
    def after(self, heads):
        return self.norm(heads) * (1 - self.lam())


@DifferentialAttention.mistake("The factor stands before the norm, which takes it away again: first the norm.")
class _(Usual):
    def after(self, heads):
        return self.norm(heads * (1 - self.lambda_init))


@DifferentialAttention.mistake(
    "The scale is that of the values, sqrt(2 d_head): scores are products of d_head numbers."
)
class _(Usual):
    def width(self):
        return 2 * self.d_head


@DifferentialAttention.mistake("The scores are not scaled: divide them by sqrt(d_head).")
class _(Usual):
    def width(self):
        return 1


@DifferentialAttention.mistake("causal=True changes nothing.")
class _(Usual):
    def seen(self, n, mask, causal):
        return super().seen(n, mask, False)


@DifferentialAttention.mistake("The mask is not used.")
class _(Usual):
    def seen(self, n, mask, causal):
        return super().seen(n, None, causal)


@DifferentialAttention.mistake("positions are not handed on to self.project.")
class _(Usual):
    def turned(self, x, positions):
        return super().turned(x, None)
