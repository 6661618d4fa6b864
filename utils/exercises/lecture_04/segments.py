"""Lecture 04: a layer that reads in segments and remembers the tokens before each."""

import math

import torch
from torch import nn

from utils.exercises.arrays import draw
from utils.judge.module import module

MODULE = "long_context"


def tensor(rng, *shape):
    return torch.from_numpy(draw(rng, *shape))


@module("4E", MODULE, make={"d_model": 4, "n_heads": 2, "segment": 3, "memory": 2}, importance="essential")
class SegmentAttention(nn.Module):  # the oracle: one query and one head at a time
    def __init__(self, d_model, n_heads, segment, memory):
        super().__init__()
        self.n_heads, self.segment, self.memory = n_heads, segment, memory
        for name in "qkvo":
            setattr(self, f"w_{name}", nn.Parameter(torch.zeros(d_model, d_model)))

    def forward(self, x):
        d, rows = x.shape[-1] // self.n_heads, []
        for i in range(x.shape[1]):
            start, heads = i // self.segment * self.segment, []
            seen = [x[:, j].detach() for j in range(max(0, start - self.memory), start)]
            seen = torch.stack([*seen, *(x[:, j] for j in range(start, i + 1))], dim=1)
            for h in range(self.n_heads):
                own = slice(h * d, (h + 1) * d)
                q, k, v = x[:, i] @ self.w_q[:, own], seen @ self.w_k[:, own], seen @ self.w_v[:, own]
                weights = torch.softmax((k @ q[:, :, None])[..., 0] / math.sqrt(d), dim=-1)
                heads.append((weights[:, None] @ v)[:, 0])
            rows.append(torch.cat(heads, dim=-1) @ self.w_o)
        return torch.stack(rows, dim=1)


@SegmentAttention.property(
    "parameters w_q, w_k, w_v and w_o of the contract", hint="How many rows and columns has each of the four?"
)
def _(ask, rng):
    ask.parameters()
    ask.parameters(d_model=6, n_heads=3, segment=5, memory=0)


@SegmentAttention.property(
    "one segment: causal attention",
    hint="Without a memory this is a layer of lecture 02: which heads are there, which keys does query i see?",
)
def _(ask, rng):
    ask(tensor(rng, 1, 3, 4))
    ask(tensor(rng, 2, 3, 4))


@SegmentAttention.property(
    "two segments, the second with a memory", hint="Which rows of x does the segment that begins at 3 remember?"
)
def _(ask, rng):
    ask(tensor(rng, 1, 6, 4))


@SegmentAttention.property(
    "many segments, the last one short", hint="What does your loop do with a text that is no multiple of the segment?"
)
def _(ask, rng):
    ask(tensor(rng, 2, 11, 4))
    ask(tensor(rng, 1, 1, 4))
    ask(tensor(rng, 1, 13, 6), make={"d_model": 6, "n_heads": 3, "segment": 4, "memory": 4})


@SegmentAttention.property(
    "a memory of 0, and one longer than a segment", hint="What are the last 0 rows? Does the memory end at one segment?"
)
def _(ask, rng):
    ask(tensor(rng, 1, 8, 4), make={"memory": 0})
    ask(tensor(rng, 1, 10, 4), make={"segment": 2, "memory": 5})
    ask(tensor(rng, 2, 5, 4), make={"segment": 9, "memory": 3})


@SegmentAttention.property(
    "gradients: none into what is remembered, and w_k and w_v learn from it",
    hint="What is detached: the rows of x, or the keys and values made of them?",
)
def _(ask, rng):
    ask.gradients(tensor(rng, 1, 6, 4))
    ask.gradients(tensor(rng, 2, 7, 4), make={"memory": 3})


@SegmentAttention.property(
    "a text is read as if no other had been read before",
    hint="What does your layer still know when the next call comes? Begin each call with an empty memory.",
)
def _(ask, rng):
    ask.after((tensor(rng, 1, 5, 4),), tensor(rng, 1, 7, 4))


@SegmentAttention.property(
    "its weights begin at random, of size about 1 over the root of d_model",
    hint="How large are the numbers of x @ w, if those of x are about 1?",
)
def _(ask, rng):
    ask.begins(256**-0.5, d_model=256)


class Usual(nn.Module):
    """The layer in the usual way. The mistakes override one of its methods; as it stands, it is right."""

    def __init__(self, d_model, n_heads, segment, memory):
        super().__init__()
        self.n_heads, self.segment, self.memory = n_heads, segment, memory
        for name in "qkvo":
            setattr(self, f"w_{name}", nn.Parameter(torch.randn(d_model, d_model) * d_model**-0.5))

    def split(self, x):
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def through(self, x, w):
        return x @ w

    def remembered(self, x, start):
        return x[:, max(0, start - self.memory) : start].detach()

    def keys(self, old, part):
        seen = torch.cat([old, part], dim=1)
        return self.through(seen, self.w_k), self.through(seen, self.w_v)

    def queries(self, old, part):
        return self.through(part, self.w_q)

    def scale(self, q):
        return q.shape[-1] ** -0.5

    def allowed(self, scores):
        n, m = scores.shape[-2:]
        return torch.ones(n, m, dtype=torch.bool).tril(m - n)

    def join(self, out):
        return out.transpose(1, 2).flatten(2)

    def project(self, out):
        return self.through(out, self.w_o)

    def forward(self, x):
        outs = []
        for start in range(0, x.shape[1], self.segment):
            part, old = x[:, start : start + self.segment], self.remembered(x, start)
            q = self.split(self.queries(old, part))
            k, v = (self.split(a) for a in self.keys(old, part))
            scores = q @ k.mT * self.scale(q)
            weights = scores.masked_fill(~self.allowed(scores), -1e300).softmax(-1)
            outs.append(self.project(self.join(weights @ v)))
        return torch.cat(outs, dim=1)


@SegmentAttention.mistake("A gradient flows into the memory: detach the rows of x that are remembered.")
class _(Usual):
    def remembered(self, x, start):
        return x[:, max(0, start - self.memory) : start]


@SegmentAttention.mistake("Keys and values are detached, so w_k and w_v do not learn from the memory: detach x alone.")
class _(Usual):
    def keys(self, old, part):
        return tuple(torch.cat([(old @ w).detach(), part @ w], dim=1) for w in (self.w_k, self.w_v))


@SegmentAttention.mistake("Nothing is remembered: the memory changes nothing.")
class _(Usual):
    def remembered(self, x, start):
        return x[:, :0]


@SegmentAttention.mistake("Everything before is remembered: only the last `memory` rows are.")
class _(Usual):
    def remembered(self, x, start):
        return x[:, :start].detach()


@SegmentAttention.mistake("The memory ends at one segment: it is the last `memory` rows, from however many segments.")
class _(Usual):
    def remembered(self, x, start):
        return x[:, max(0, start - min(self.memory, self.segment)) : start].detach()


@SegmentAttention.mistake("The first rows of the segment before are remembered: its last ones are asked for.")
class _(Usual):
    def remembered(self, x, start):
        first = max(0, start - self.segment)
        return x[:, first : min(start, first + self.memory)].detach()


@SegmentAttention.mistake("The memory stands behind the segment: it came before it.")
class _(Usual):
    def keys(self, old, part):
        return super().keys(part, old)


@SegmentAttention.mistake("The causal mask begins at the top left: the last query has to see all keys.")
class _(Usual):
    def allowed(self, scores):
        return torch.ones(scores.shape[-2:], dtype=torch.bool).tril()


@SegmentAttention.mistake("Queries see later keys: inside a segment it is causal.")
class _(Usual):
    def allowed(self, scores):
        return torch.ones(scores.shape[-2:], dtype=torch.bool)


@SegmentAttention.mistake("The scores are not scaled: divide them by sqrt(d_head).")
class _(Usual):
    def scale(self, q):
        return 1.0


@SegmentAttention.mistake("The scores are divided by sqrt(d_model): a dot product adds d_head numbers.")
class _(Usual):
    def scale(self, q):
        return len(self.w_q) ** -0.5


@SegmentAttention.mistake("The axes of heads and tokens were not swapped back before the heads were merged.")
class _(Usual):
    def join(self, out):
        return out.reshape(out.shape[0], out.shape[2], -1)


@SegmentAttention.mistake("The output is not multiplied by w_o.")
class _(Usual):
    def project(self, out):
        return out + 0 * self.w_o.sum()


@SegmentAttention.mistake("The matrices are used the other way round: x @ w, not x @ w.T.")
class _(Usual):
    def through(self, x, w):
        return x @ w.T


@SegmentAttention.mistake("There is one head as wide as the model: cut q, k and v into n_heads heads.")
class _(Usual):
    def split(self, x):
        return x[:, None]


@SegmentAttention.mistake("The heads are cut across the tokens: split the last axis, then swap heads and tokens.")
class _(Usual):
    def split(self, x):
        return x.reshape(len(x), self.n_heads, x.shape[1], -1)

    def join(self, out):
        return out.reshape(len(out), out.shape[2], -1)


@SegmentAttention.mistake("The first rows have no memory, and zeros in its place are keys too: they take weight.")
class _(Usual):
    def remembered(self, x, start):
        missing = max(0, self.memory - start)
        return nn.functional.pad(super().remembered(x, start), (0, 0, missing, 0))


@SegmentAttention.mistake("start - memory is below 0 at first, and a negative index counts from the end: max(0, ...).")
class _(Usual):
    def remembered(self, x, start):
        return x[:, start - self.memory : start].detach()
