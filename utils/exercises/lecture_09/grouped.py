"""Lecture 09: grouped-query attention as attention to one latent. The oracle never makes the latent."""

from functools import partial

import torch

from utils.exercises.arrays import draw
from utils.judge.function import exercise

MODULE = "latent"


@exercise("9E", MODULE, importance="useful")
def grouped_as_latent(q, k, v):
    n, m, share = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    allowed = torch.arange(m) <= torch.arange(n)[:, None] + m - n
    heads = []
    for h in range(q.shape[1]):
        scores = (q[:, h, :, None] * k[:, h // share, None]).sum(-1) / q.shape[-1] ** 0.5
        weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1)
        heads.append((weights[..., None] * v[:, h // share, None]).sum(2))
    return torch.stack(heads, dim=1)


def tensors(rng, batch=1, heads=4, groups=2, n=3, m=3, d=2, size=1.0):
    shapes = (batch, heads, n, d), (batch, groups, m, d), (batch, groups, m, d)
    q, k, v = (torch.from_numpy(draw(rng, *shape)) for shape in shapes)
    return size * q, k, v


@grouped_as_latent.property(
    "one head, one group: attention as it was",
    hint="Which columns of the blend are the value, and what is d_head?",
)
def _(ask, rng):
    ask(*tensors(rng, heads=1, groups=1, n=1, m=1))
    ask(*tensors(rng, heads=1, groups=1))


@grouped_as_latent.property(
    "each head finds the key and the value of its group",
    hint="Neighbours share: with 4 heads on 2 groups the groups are 0 0 1 1. Where are the columns of group g?",
)
def _(ask, rng):
    ask(*tensors(rng, n=1, m=2))
    ask(*tensors(rng, heads=6, groups=3, d=3))
    ask(*tensors(rng, heads=6, groups=2))


@grouped_as_latent.property(
    "the scale stays 1/sqrt(d_head)", hint="The wide query is mostly zeros: how many numbers does the dot product add?"
)
def _(ask, rng):
    ask(*tensors(rng, n=1, m=4, d=5, size=3.0))


@grouped_as_latent.property(
    "causal, with fewer queries than keys", hint="At which position is query 0 of 2, with 5 keys?"
)
def _(ask, rng):
    ask(*tensors(rng, n=4, m=4))
    ask(*tensors(rng, n=2, m=5))


@grouped_as_latent.property(
    "gradients reach q, k and v", hint="Where does the computation leave torch: detach, .data, .item(), NumPy?"
)
def _(ask, rng):
    ask.gradients(*tensors(rng, n=2, m=3))


@grouped_as_latent.property(
    "all at once: a batch, float32, 40 tokens, large scores",
    hint="Which float type has a tensor that you make yourself, and does your softmax survive large scores?",
)
def _(ask, rng):
    q, k, v = tensors(rng, batch=2, heads=9, groups=3, n=30, m=40, d=4, size=300.0)
    ask(q.float(), k.float(), v.float())
    ask(*tensors(rng, heads=4, groups=1, n=1, m=5, size=2000.0))
    ask(*(a.float() for a in tensors(rng, heads=2, groups=1, n=1, m=3)))


def usual_grouped(
    q, k, v, *, columns=lambda d, c: d, group=lambda h, heads, groups: h // (heads // groups), causal=True, top=False,
    value_of=None,
):  # fmt: skip
    """The function in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    heads, groups, d, (n, m) = q.shape[1], k.shape[1], q.shape[-1], (q.shape[2], k.shape[2])
    c = torch.cat([k, v], 1).transpose(1, 2).flatten(2)[:, None]
    wide = q.new_zeros(*q.shape[:3], c.shape[-1])
    own = [group(h, heads, groups) for h in range(heads)]
    for h, g in enumerate(own):
        wide[:, h, :, g * d : (g + 1) * d] = q[:, h]
    scores = wide @ c.mT / columns(d, c.shape[-1]) ** 0.5
    hidden = torch.ones(n, m, dtype=torch.bool).triu(1 if top else m - n + 1)
    p = torch.softmax(scores.masked_fill(hidden, -torch.inf) if causal else scores, -1)
    values = (p @ c)[..., : groups * d] if value_of == "keys" else (p @ c)[..., groups * d :]
    return torch.stack([values[:, h, :, g * d : (g + 1) * d] for h, g in enumerate(own)], 1)


for message, change in {
    "The scale is that of the wide key: the dot product still adds d_head numbers that are not 0.": {
        "columns": lambda d, c: c
    },
    "The scores are not scaled: divide them by sqrt(d_head).": {"columns": lambda d, c: 1},
    "The groups are dealt out in turns, 0 1 0 1: neighbouring heads share, 0 0 1 1.": {
        "group": lambda h, heads, groups: h % groups
    },
    "The mask is missing: a query sees later keys.": {"causal": False},
    "The mask starts at the top left: the last query sees every key.": {"top": True},
    "What is taken from the blend are the keys' columns: the values stand behind them.": {"value_of": "keys"},
}.items():
    grouped_as_latent.mistake(message)(partial(usual_grouped, **change))
