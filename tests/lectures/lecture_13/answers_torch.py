"""Answers to the exercises of lecture 13 in PyTorch, induced attention and a memory, as in answers.py."""

import torch
from torch import nn

from attention.beyond import SetBlock
from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 13C -------------------------------------------------------------------------------------------------------------


class Induced(nn.Module):
    """The parameters of the contract. The answers differ in forward."""

    def __init__(self, d_model, n_heads, m):
        super().__init__()
        self.points = nn.Parameter(torch.randn(m, d_model))
        self.gather, self.spread = SetBlock(d_model, n_heads), SetBlock(d_model, n_heads)


@right("13C")
class Filled(Induced):
    def forward(self, x, mask=None):
        points = self.points[None].repeat(x.shape[0], 1, 1)
        out = self.spread(x, self.gather(points, x, mask=mask))
        return out if mask is None else out.masked_fill(~mask.unsqueeze(-1), 0.0)


@right("13C")
class AlwaysMasked(Induced):
    def forward(self, x, mask=None):
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool)
        gathered = self.gather(self.points.expand(x.shape[0], *self.points.shape), x, mask)
        return torch.where(mask[..., None], self.spread(x, gathered), 0.0)


@wrong("13C", "the points ask padding, too")
class MaskForgotten(Induced):
    def forward(self, x, mask=None):
        out = self.spread(x, self.gather(self.points.expand(len(x), -1, -1), x))
        return out if mask is None else out * mask[..., None]


@wrong("13C", "Rows of padding are not zero")
class PaddingLeft(Induced):
    def forward(self, x, mask=None):
        return self.spread(x, self.gather(self.points.expand(len(x), -1, -1), x, mask))


@wrong("13C", "the elements have to ask them")
class HalfWay(Induced):
    def forward(self, x, mask=None):
        return self.gather(self.points.expand(len(x), -1, -1), x, mask)


@wrong("13C", "self.gather first, then self.spread")
class OneBlock(Induced):
    def forward(self, x, mask=None):
        out = self.gather(x, self.gather(self.points.expand(len(x), -1, -1), x, mask))
        return out if mask is None else out * mask[..., None]


@wrong("13C", "How does (m, d_model) get an axis for the batch")
class FirstSetOnly(Induced):
    def forward(self, x, mask=None):
        gathered = self.gather(self.points[None], x[:1], None if mask is None else mask[:1])
        out = self.spread(x, gathered.expand(len(x), -1, -1))
        return out if mask is None else out * mask[..., None]


@wrong("13C", "a parameter too many")
class OneMore(Filled):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.scale = nn.Parameter(torch.ones(1))


@wrong("13C", "gradients reach")
class Detached(Filled):
    def forward(self, x, mask=None):
        return super().forward(x, mask) - self.points.sum() + self.points.detach().sum()


@wrong("13C", "other sizes")
class ThreePoints(Filled):
    def forward(self, x, mask=None):
        points = self.points.new_zeros(3, x.shape[-1])
        points[: len(self.points)] = self.points[:3]
        out = self.spread(x, self.gather(points.expand(len(x), -1, -1), x, mask))
        return out if mask is None else out * mask[..., None]


@wrong("13C", "all at once")
class FiftyElements(Filled):
    def forward(self, x, mask=None):
        out = super().forward(x, mask)
        return torch.cat([out[:, :50], 0 * out[:, 50:]], dim=1)


# --- 13E -------------------------------------------------------------------------------------------------------------


@right("13E")
def by_einsum(q, k, v, rate, momentum=0.0, forget=0.0):
    memory = k.new_zeros(*k.shape[:-2], k.shape[-1], v.shape[-1])
    step, out = memory.clone(), []
    for i in range(k.shape[-2]):
        error = torch.einsum("...d,...de->...e", k[..., i, :], memory) - v[..., i, :]
        step = momentum * step - rate * torch.einsum("...d,...e->...de", k[..., i, :], error)
        memory = memory - forget * memory + step
        out.append(torch.einsum("...d,...de->...e", q[..., i, :], memory))
    return torch.stack(out, dim=-2), memory


@right("13E")
def by_autograd(q, k, v, rate, momentum=0.0, forget=0.0):
    memory = torch.zeros(*k.shape[:-2], k.shape[-1], v.shape[-1], dtype=k.dtype)
    step, out = torch.zeros_like(memory), []
    for i in range(k.shape[-2]):
        weights = memory.clone().requires_grad_()
        with torch.enable_grad():
            loss = (k[..., i : i + 1, :].detach() @ weights - v[..., i : i + 1, :].detach()).square().sum() / 2
        step = momentum * step - rate * torch.autograd.grad(loss, weights)[0]
        memory = (1 - forget) * memory + step
        out.append(q[..., i : i + 1, :] @ memory)
    return torch.cat(out, dim=-2), memory


def by_rows(q, k, v, rate, momentum=0.0, forget=0.0, *, sign=-1.0, plain=False, late=False, old=True, carry=True):
    memory = k.new_zeros(*k.shape[:-2], k.shape[-1], v.shape[-1])
    step, out = memory.clone(), []
    for i in range(k.shape[-2]):
        key, value, query = (a[..., i : i + 1, :] for a in (k, v, q))
        surprise = key.mT @ (-value if plain else key @ memory - value)
        if late:
            out.append(query @ memory)
        step = momentum * step * carry + sign * rate * surprise
        memory = (1 - forget) * memory + step if old else (1 - forget) * (memory + step)
        if not late:
            out.append(query @ memory)
    return torch.cat(out, dim=-2), memory


@wrong("13E", "The step goes up the gradient")
def upwards(q, k, v, rate, momentum=0.0, forget=0.0):
    return by_rows(q, k, v, rate, momentum, forget, sign=1.0)


@wrong("13E", "this is linear attention")
def linear_attention(q, k, v, rate, momentum=0.0, forget=0.0):
    return by_rows(q, k, v, rate, momentum, forget, plain=True)


@wrong("13E", "it reads after the step")
def reads_first(q, k, v, rate, momentum=0.0, forget=0.0):
    return by_rows(q, k, v, rate, momentum, forget, late=True)


@wrong("13E", "The new step is forgotten, too")
def forgets_the_step(q, k, v, rate, momentum=0.0, forget=0.0):
    return by_rows(q, k, v, rate, momentum, forget, old=False)


@wrong("13E", "momentum is not used")
def no_momentum(q, k, v, rate, momentum=0.0, forget=0.0):
    return by_rows(q, k, v, rate, 0.0, forget)


@wrong("13E", "forget is not used")
def no_forgetting(q, k, v, rate, momentum=0.0, forget=0.0):
    return by_rows(q, k, v, rate, momentum, 0.0)


@wrong("13E", "the float type of the queries")
def in_double(q, k, v, rate, momentum=0.0, forget=0.0):
    return by_rows(q.double(), k.double(), v.double(), rate, momentum, forget)


@wrong("13E", "any axes in front")
def two_axes(q, k, v, rate, momentum=0.0, forget=0.0):
    out, memory = by_rows(q, k, v, rate, momentum, forget)
    return (out, memory) if q.ndim == 2 else (out.sum(0, keepdim=True).expand_as(out), memory)


@wrong("13E", "all at once")
def one_or_the_other(q, k, v, rate, momentum=0.0, forget=0.0):
    return by_rows(q, k, v, rate, momentum, forget if momentum == 0 else 0.0)
