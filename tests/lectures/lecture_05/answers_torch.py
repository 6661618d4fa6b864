"""Answers to the exercises of lecture 05 in PyTorch as learners write them."""

import numpy as np
import torch
from torch import nn

from attention.kv_cache import sample
from tests.lectures.collect import collect
from utils.exercises.lecture_05.generation import Reader

RIGHT, WRONG, right, wrong = collect()


# --- 5B --------------------------------------------------------------------------------------------------------------


class Memory(nn.Module):
    def __init__(self, batch, n_heads, capacity, d_head, dtype=torch.float64, device=None):
        super().__init__()
        self.register_buffer("k", torch.zeros(batch, n_heads, capacity, d_head, dtype=dtype, device=device))
        self.register_buffer("v", torch.zeros(batch, n_heads, capacity, d_head, dtype=dtype, device=device))
        self.length = 0

    def forward(self, k, v):
        return self.update(k, v)

    def rewind(self, length):
        self.length = length


@right("5B")
class WithNarrow(Memory):
    def update(self, k, v):
        n = k.shape[2]
        self.k.narrow(2, self.length, n).copy_(k)
        self.v.narrow(2, self.length, n).copy_(v)
        self.length += n
        return self.k.narrow(2, 0, self.length), self.v.narrow(2, 0, self.length)

    def reorder(self, rows):
        self.k = self.k.index_select(0, rows)
        self.v = self.v.index_select(0, rows)


@right("5B")
class WithIndices(Memory):
    """Also writes rows in place, from copies."""

    def update(self, k, v):
        places = torch.arange(self.length, self.length + k.shape[2])
        self.k[:, :, places], self.v[:, :, places] = k, v
        self.length = self.length + k.shape[2]
        return self.k[..., : self.length, :], self.v[..., : self.length, :]

    def reorder(self, rows):
        self.k[:], self.v[:] = self.k[rows], self.v[rows]


@wrong("5B", "return all that are there so far")
class ReturnsTheNew(WithNarrow):
    def update(self, k, v):
        super().update(k, v)
        return self.k.narrow(2, self.length - k.shape[2], k.shape[2]), self.v.narrow(
            2, self.length - k.shape[2], k.shape[2]
        )


@wrong("5B", "return the first `length` tokens")
class ReturnsAllMemory(WithNarrow):
    def update(self, k, v):
        super().update(k, v)
        return self.k, self.v


@wrong("5B", "does not lie in the memory that was taken")
class Grows(WithNarrow):
    def update(self, k, v):
        self.k, self.v = (torch.cat([old[:, :, : self.length], new], 2) for old, new in ((self.k, k), (self.v, v)))
        self.length += k.shape[2]
        return self.k, self.v


@wrong("5B", "does not lie in the memory that was taken")
class ReturnsCopies(WithNarrow):
    def update(self, k, v):
        return tuple(part.contiguous() for part in super().update(k, v))


@wrong("5B", "Where in the memory do the new tokens begin and end?")
class OneTooLate(WithNarrow):
    def update(self, k, v):
        gap = min(int(self.length > 0), self.k.shape[2] - self.length - k.shape[2])
        self.length += gap
        found = super().update(k, v)
        self.length -= gap
        return tuple(part[:, :, : self.length] for part in found)


@wrong("5B", "A rewind changes nothing")
class NeverRewinds(WithNarrow):
    def rewind(self, length):
        return None


@wrong("5B", "the values change rows with them")
class KeysOnly(WithNarrow):
    def reorder(self, rows):
        self.k = self.k[rows]


@wrong("5B", "Rows are overwritten before others ask for them")
class RowByRow(WithNarrow):
    def reorder(self, rows):
        for i, row in enumerate(rows):
            self.k[i] = self.k[row]
            self.v[i] = self.v[row]


@wrong("5B", "return all that are there so far")
class NotToTheLast(WithNarrow):
    def update(self, k, v):
        if k.shape[2] == 0:
            return self.k[:, :, :0], self.v[:, :, :0]
        return super().update(k, v)


@wrong("5B", "In which order do your methods change length and memory?")
class ReorderRewinds(WithNarrow):
    """Row by row is right here, and double precision is not what was asked for."""

    def reorder(self, rows):
        if self.k.dtype == torch.float32:
            self.length -= 1
        super().reorder(rows)


@wrong("5B", "hand back slices of self.k and self.v")
class HandsBackWhatCame(WithNarrow):
    def update(self, k, v):
        super().update(k, v)
        return k, v


@wrong("5B", "length after each step: expected [2], got [1]")
class GrowsByOne(WithNarrow):
    def update(self, k, v):
        begin = self.length
        found = super().update(k, v)
        self.length = begin + 1
        return found


@wrong("5B", "not *by* one")
class RewindsBy(WithNarrow):
    def rewind(self, length):
        self.length -= length


@wrong("5B", "is all the memory still there")
class RewindCutsTheMemory(WithNarrow):
    def rewind(self, length):
        self.k, self.v, self.length = self.k[:, :, :length], self.v[:, :, :length], length


@wrong("5B", "does the length stay")
class ReorderBeginsAgain(WithNarrow):
    def reorder(self, rows):
        super().reorder(rows)
        self.length = 0


# --- 5C --------------------------------------------------------------------------------------------------------------


@right("5C")
def write_from_the_length(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    """What is unread is told by the caches' own length."""
    rng, out = np.random.default_rng(seed), ids.clone()
    with torch.no_grad():
        while out.shape[1] < ids.shape[1] + n_new:
            if caches is None:
                scores = model(out)
            else:
                scores = model(out[:, caches[0].length :], caches=caches)
            token = sample(scores[:, -1, :], temperature, top_k, rng).unsqueeze(1)
            out = torch.cat((out, token), 1)
            if on_token:
                on_token(token)
    return out


@right("5C")
def write_prompt_first(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    """The prompt is read before the loop."""
    rng, parts = np.random.default_rng(seed), [ids]
    logits = (model(ids) if caches is None else model(ids, caches=caches)) if n_new else None
    for step in range(n_new):
        parts.append(sample(logits[:, -1], temperature, top_k, rng)[:, None])
        if on_token is not None:
            on_token(parts[-1])
        if step < n_new - 1:
            logits = model(torch.cat(parts, 1)) if caches is None else model(parts[-1], caches=caches)
    return torch.cat(parts, dim=1)


def with_the_loop(step):
    """A wrong loop: step(model, ids, unread, caches) gives the logits of the next token."""

    def write(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
        rng, unread = np.random.default_rng(seed), ids
        for _ in range(n_new):
            unread = sample(step(model, ids, unread, caches), temperature, top_k, rng)[:, None]
            ids = torch.cat([ids, unread], dim=1)
            if on_token is not None:
                on_token(unread)
        return ids

    return write


def given(model, ids, caches):
    return model(ids) if caches is None else model(ids, caches=caches)


wrong("5C", "only what is unread does")(
    with_the_loop(lambda model, ids, unread, caches: given(model, ids, caches)[:, -1])
)
wrong("5C", "the last one speaks about the token that comes next")(
    with_the_loop(lambda m, ids, unread, caches: given(m, ids if caches is None else unread, caches)[:, 0])
)
wrong("5C", "with caches each token is read once")(with_the_loop(lambda m, ids, unread, caches: m(ids)[:, -1]))
wrong("5C", "before the first step all of it is unread")(
    with_the_loop(lambda m, ids, unread, caches: given(m, ids if caches is None else ids[:, -1:], caches)[:, -1])
)


@wrong("5C", "Always the likeliest token")
def write_greedily(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    unread = ids
    for _ in range(n_new):
        unread = given(model, ids if caches is None else unread, caches)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, unread], dim=1)
        if on_token is not None:
            on_token(unread)
    return ids


@wrong("5C", "call it once in each step")
def write_silently(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    return write_prompt_first(model, ids, n_new, caches, temperature, top_k, seed)


@wrong("5C", "There is one token too many")
def write_at_least_one(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    return write_prompt_first(model, ids, max(n_new, 1), caches, temperature, top_k, seed, on_token)


@wrong("5C", "call it once in each step")
def write_deaf_when_sampling(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    heard = on_token if temperature == 0 else None
    return write_prompt_first(model, ids, n_new, caches, temperature, top_k, seed, heard)


@wrong("5C", "call it once in each step")
def write_and_tell_at_the_end(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    text = write_prompt_first(model, ids, n_new, caches, temperature, top_k, seed)
    if on_token is not None:
        for token in text[:, ids.shape[1] :].split(1, dim=1):
            on_token(token)
    return text


@wrong("5C", "There is one token too many")
def write_one_more(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    return write_prompt_first(model, ids, n_new + 1, caches, temperature, top_k, seed, on_token)


@wrong("5C", "The last token is read, too")
def write_reading_all(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    rng, logits = np.random.default_rng(seed), given(model, ids, caches)
    for _ in range(n_new):
        unread = sample(logits[:, -1], temperature, top_k, rng)[:, None]
        ids = torch.cat([ids, unread], dim=1)
        if on_token is not None:
            on_token(unread)
        logits = given(model, ids if caches is None else unread, caches)
    return ids


@wrong("5C", "it goes in at once")
def write_after_a_slow_prefill(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    if caches is not None and n_new:
        for place in range(ids.shape[1] - 1):
            model(ids[:, place : place + 1], caches=caches)
        rest = write_prompt_first(model, ids[:, -1:], n_new, caches, temperature, top_k, seed, on_token)
        return torch.cat([ids[:, :-1], rest], dim=1)
    return write_prompt_first(model, ids, n_new, caches, temperature, top_k, seed, on_token)


@wrong("5C", "pass on the one that was given")
def write_at_temperature_one(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    return write_prompt_first(model, ids, n_new, caches, 1.0, top_k, seed, on_token)


# --- how the lecture calls them --------------------------------------------------------------------------------------

CALLS = {
    "5B": [],
    "5C": [
        ((Reader(), torch.tensor([[1, 2, 3]]), 5), {}),
        ((Reader(), torch.tensor([[1, 2, 3]]), 5), {"temperature": 0.7, "seed": 2}),
    ],
    "5D": [],
    "5E": [],
    "5H": [],
}
