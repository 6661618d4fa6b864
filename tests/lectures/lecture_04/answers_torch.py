"""Answers to the exercises of lecture 04 in PyTorch, the loss across a gap and a layer with a memory, as in answers.py."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 4D --------------------------------------------------------------------------------------------------------------


@right("4D")
def read_again_for_each_gap(model, prompt, rest, gaps, n_last):
    found = torch.zeros(len(gaps))
    for i, gap in enumerate(gaps):
        caches = model.new_caches()
        model.hidden(prompt, caches=caches)
        positions = torch.arange(prompt.shape[1] + gap, prompt.shape[1] + gap + rest.shape[1])
        found[i] = model.losses(rest, positions=positions, caches=caches)[-n_last:].mean()
    return found


@right("4D")
def from_the_logits(model, prompt, rest, gaps, n_last):
    first = model.new_caches()
    model.hidden(prompt, caches=first)
    out = []
    for gap in gaps:
        own = copy.deepcopy(first)
        x = model.hidden(rest, positions=prompt.shape[1] + gap + torch.arange(rest.shape[1]), caches=own)
        out.append(F.cross_entropy(model.logits(x[0, -n_last - 1 : -1]), rest[0, -n_last:]).item())
    return torch.tensor(out)


def losses_after(model, caches, prompt, rest, gap):
    positions = prompt.shape[1] + gap + torch.arange(rest.shape[1])
    return model.losses(rest, positions=positions, caches=caches)


@wrong("4D", "The second gap finds the question of the first in its caches")
def one_cache_for_all(model, prompt, rest, gaps, n_last):
    caches = model.new_caches()
    model.hidden(prompt, caches=caches)
    return torch.tensor([float(losses_after(model, caches, prompt, rest, gap)[-n_last:].mean()) for gap in gaps])


@wrong("4D", "only the last n_last tokens count")
def all_of_rest(model, prompt, rest, gaps, n_last):
    found = []
    for gap in gaps:
        caches = model.new_caches()
        model.hidden(prompt, caches=caches)
        found.append(losses_after(model, caches, prompt, rest, gap).mean().item())
    return torch.tensor(found)


@wrong("4D", "and those of the prompt must not")
def both_moved(model, prompt, rest, gaps, n_last):
    found = []
    for gap in gaps:
        caches = model.new_caches()
        model.hidden(prompt, positions=gap + torch.arange(prompt.shape[1]), caches=caches)
        found.append(losses_after(model, caches, prompt, rest, gap)[-n_last:].mean().item())
    return torch.tensor(found)


@wrong("4D", "The prompt is forgotten in the positions")
def counted_from_zero(model, prompt, rest, gaps, n_last):
    found = []
    for gap in gaps:
        caches = model.new_caches()
        model.hidden(prompt, caches=caches)
        positions = gap + torch.arange(rest.shape[1])
        found.append(model.losses(rest, positions=positions, caches=caches)[-n_last:].mean().item())
    return torch.tensor(found)


@wrong("4D", "The prompt was never read")
def question_alone(model, prompt, rest, gaps, n_last):
    return torch.tensor(
        [losses_after(model, model.new_caches(), prompt, rest, gap)[-n_last:].mean().item() for gap in gaps]
    )


@right("4D")
def in_one_piece_without_a_cache(model, prompt, rest, gaps, n_last):
    ids, n = torch.cat([prompt, rest], dim=1), prompt.shape[1]
    places = torch.arange(ids.shape[1])
    losses = [model.losses(ids, positions=places + gap * (places >= n)) for gap in gaps]
    return torch.stack([each[-n_last:].mean() for each in losses])


@wrong("4D", "the loss of the last token alone")
def the_last_token(model, prompt, rest, gaps, n_last):
    return read_again_for_each_gap(model, prompt, rest, gaps, 1)


@wrong("4D", "returned a list")
def as_a_list(model, prompt, rest, gaps, n_last):
    return read_again_for_each_gap(model, prompt, rest, gaps, n_last).tolist()


@wrong("4D", "several gaps")
def the_first_gap_only(model, prompt, rest, gaps, n_last):
    return read_again_for_each_gap(model, prompt, rest, [gaps[0]] * len(gaps), n_last)


@wrong("4D", "any model, any lengths")
def five_digits(model, prompt, rest, gaps, n_last):
    return read_again_for_each_gap(model, prompt, rest, gaps, min(n_last, 5))


# --- 4E --------------------------------------------------------------------------------------------------------------


class Base(nn.Module):
    """One mask for the whole text, in parts that a wrong answer replaces."""

    def __init__(self, d_model, n_heads, segment, memory):
        super().__init__()
        self.n_heads, self.segment, self.memory = n_heads, segment, memory
        for name in ("w_q", "w_k", "w_v", "w_o"):
            setattr(self, name, nn.Parameter(torch.randn(d_model, d_model) / d_model**0.5))

    def heads(self, x):
        return x.view(*x.shape[:2], self.n_heads, -1).permute(0, 2, 1, 3)

    def past(self, x):
        return x.detach()

    def which(self, n):
        """(own, old): boolean (n, n), keys of the query's segment up to itself, and remembered ones."""
        i, j = torch.arange(n)[:, None], torch.arange(n)
        start = i // self.segment * self.segment
        return (j >= start) & (j <= i), (j < start) & (j >= start - self.memory)

    def forward(self, x):
        own, old = self.which(x.shape[1])
        past = self.past(x)
        q = self.heads(x @ self.w_q) * (x.shape[-1] / self.n_heads) ** -0.5
        near, far = (q @ self.heads(each @ self.w_k).mT for each in (x, past))
        scores = torch.where(own, near, far).masked_fill(~(own | old), -1e300)
        weights = scores.softmax(-1)
        out = (weights * own) @ self.heads(x @ self.w_v) + (weights * old) @ self.heads(past @ self.w_v)
        return out.permute(0, 2, 1, 3).reshape(x.shape) @ self.w_o


@right("4E")
class OneMask(Base):
    pass


@right("4E")
class SegmentBySegment(nn.Module):
    def __init__(self, d_model, n_heads, segment, memory):
        super().__init__()
        self.n_heads, self.segment, self.memory = n_heads, segment, memory
        self.w_o, self.w_v, self.w_k, self.w_q = (
            nn.Parameter(torch.randn(d_model, d_model) / d_model**0.5) for _ in range(4)
        )

    def attend(self, part, seen):
        q, k, v = (
            (a @ w).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for a, w in ((part, self.w_q), (seen, self.w_k), (seen, self.w_v))
        )
        allowed = torch.ones(part.shape[1], seen.shape[1], dtype=torch.bool).tril(seen.shape[1] - part.shape[1])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return out.transpose(1, 2).flatten(2) @ self.w_o

    def forward(self, x):
        outs, old = [], x[:, :0]
        for part in x.split(self.segment, dim=1):
            seen = torch.cat((old, part), dim=1)
            outs.append(self.attend(part, seen))
            old = seen[:, max(0, seen.shape[1] - self.memory) :].detach()
        return torch.cat(outs, dim=1)


@wrong("4E", "A gradient flows into the memory")
class NotDetached(Base):
    def past(self, x):
        return x


@wrong("4E", "Everything before is remembered")
class AllRemembered(Base):
    def which(self, n):
        i, j = torch.arange(n)[:, None], torch.arange(n)
        start = i // self.segment * self.segment
        return (j >= start) & (j <= i), (j < start).expand(n, n)


@wrong("4E", "Nothing is remembered")
class NoMemory(Base):
    def which(self, n):
        own, old = super().which(n)
        return own, old & False


@wrong("4E", "Queries see later keys")
class NotCausal(Base):
    def which(self, n):
        i, j = torch.arange(n)[:, None], torch.arange(n)
        start = i // self.segment * self.segment
        return (j >= start) & (j < start + self.segment), super().which(n)[1]


@wrong("4E", "two segments, the second with a memory")
class OneTooMany(Base):
    def which(self, n):
        i, j = torch.arange(n)[:, None], torch.arange(n)
        start = i // self.segment * self.segment
        return super().which(n)[0], (j < start) & (j >= start - self.memory - 1)


@wrong("4E", "the parameter w_o (4, 4) is missing")
class NoOutput(Base):
    def __init__(self, d_model, n_heads, segment, memory):
        super().__init__(d_model, n_heads, segment, memory)
        del self.w_o


@wrong("4E", "begins with numbers of size 0, expected about 0.06")
class BeginsWithZeros(Base):
    def __init__(self, d_model, n_heads, segment, memory):
        super().__init__(d_model, n_heads, segment, memory)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


@wrong("4E", "Begin each call with an empty memory")
class KeepsItsMemory(Base):
    kept = None

    def forward(self, x):
        before = x[:, :0] if self.kept is None else self.kept[: len(x)]
        self.kept = x[:, -self.segment :].detach()
        return super().forward(torch.cat([before, x], dim=1))[:, before.shape[1] :]


@wrong("4E", "x @ w, not x @ w.T")
class Transposed(Base):
    def forward(self, x):
        turned = Base(x.shape[-1], self.n_heads, self.segment, self.memory).to(x.dtype)
        for own, parameter in zip(turned.parameters(), self.parameters()):
            own.data = parameter.data.T
        return turned(x) + 0 * sum(parameter.sum() for parameter in self.parameters())


@wrong("4E", "a negative index counts from the end")
class NegativeStart(SegmentBySegment):
    def forward(self, x):
        outs = []
        for start in range(0, x.shape[1], self.segment):
            part = x[:, start : start + self.segment]
            seen = torch.cat((x[:, start - self.memory : start].detach(), part), dim=1)
            outs.append(self.attend(part, seen))
        return torch.cat(outs, dim=1)
