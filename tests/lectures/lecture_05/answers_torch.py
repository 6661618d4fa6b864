"""Answers to the exercises of lecture 05 in PyTorch, and to its test, as learners write them."""

import numpy as np
import torch
from torch import nn

from attention.kv_cache import place_code, read_alone, sample
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


@wrong("5C", "on_token was never called")
def write_silently(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    return write_prompt_first(model, ids, n_new, caches, temperature, top_k, seed)


@wrong("5C", "what comes back when n_new is 0")
def write_at_least_one(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    return write_prompt_first(model, ids, max(n_new, 1), caches, temperature, top_k, seed, on_token)


@wrong("5C", "on_token was never called")
def write_deaf_when_sampling(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    heard = on_token if temperature == 0 else None
    return write_prompt_first(model, ids, n_new, caches, temperature, top_k, seed, heard)


# --- 5D --------------------------------------------------------------------------------------------------------------


@right("5D")
def compares_every_row_with_reading_alone(decoder_class):
    rng = np.random.default_rng(5)
    texts = rng.normal(size=(2, 12, 4))
    decoder = decoder_class(2, 4, [0, 2])
    found = np.concatenate([decoder.read(texts[:, i : i + 3]) for i in (0, 3)] + [decoder.read(texts[:, 6:7])], axis=1)
    np.testing.assert_allclose(found[0], read_alone(texts[0, :7]))
    np.testing.assert_allclose(found[1, 2:], read_alone(texts[1, 2:7]))
    decoder.rewind(4)
    rest = decoder.read(texts[:, 7:9])
    np.testing.assert_allclose(rest[0], read_alone(np.concatenate([texts[0, :4], texts[0, 7:9]]))[4:])
    decoder.reorder(np.array([1, 0]))
    last = decoder.read(texts[:, 10:11])
    kept = np.concatenate([texts[1, 2:4], texts[1, 7:9], texts[0, 10:11]])
    if not np.allclose(last[0, 0], read_alone(kept)[-1]):
        raise ValueError("rows")


@wrong("5D", "Has your test several new vectors behind some that are cached?")
def one_by_one_only(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    decoder = decoder_class(1, 4)
    found = [decoder.read(row[None, None])[0, 0] for row in x]
    assert np.allclose(found, read_alone(x))


@wrong("5D", "Has your test a second piece?")
def all_at_once_only(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    assert np.allclose(decoder_class(1, 4).read(x[None])[0], read_alone(x))


@wrong("5D", "What is read after your test has rewound")
def pieces_only(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    decoder = decoder_class(1, 4)
    assert np.allclose(np.concatenate([decoder.read(part[None])[0] for part in (x[:2], x[2:])]), read_alone(x))


@wrong("5D", "What should the first real vector of a row with padding find?")
def no_padding(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    decoder = decoder_class(1, 4)
    assert np.allclose(np.concatenate([decoder.read(part[None])[0] for part in (x[:2], x[2:])]), read_alone(x))
    decoder.rewind(3)
    assert np.allclose(decoder.read(x[None, 3:5])[0], read_alone(x[:5])[3:])


@wrong("5D", "What should the first real vector of a row with padding find?")
def padding_is_not_looked_at(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    decoder = decoder_class(1, 4)
    assert np.allclose(np.concatenate([decoder.read(part[None])[0] for part in (x[:2], x[2:])]), read_alone(x))
    decoder.rewind(3)
    assert np.allclose(decoder.read(x[None, 3:5])[0], read_alone(x[:5])[3:])
    first = decoder_class(1, 4, [1]).read(x[None, :2])[0, 1]
    assert np.abs(first - x[1]).max() < np.abs(x[:2]).max() * 2
    q = decoder_class(1, 4, [2])
    q.read(np.concatenate([x[:2] * 0 - place_code(np.array([0, 0]), 4), x])[None])


@wrong("5D", "Whose text does row 0 continue")
def never_reorders(decoder_class):
    no_padding(decoder_class)
    x = np.random.default_rng(5).normal(size=(6, 4))
    padded = decoder_class(1, 4, [2]).read(np.concatenate([np.full((2, 4), 7.0), x])[None])
    assert np.allclose(padded[0, 2:], read_alone(x))


@wrong("5D", "does each row find the values of its own text?")
def compares_rows_with_one_another(decoder_class):
    never_reorders(decoder_class)
    texts = np.random.default_rng(5).normal(size=(2, 6, 4))
    decoder = decoder_class(2, 4)
    decoder.read(texts)
    decoder.reorder(np.array([1, 1]))
    decoder.rewind(6)
    new = np.stack([texts[0, :1], texts[0, :1]])
    keys = getattr(decoder, "k", None)
    if keys is not None:
        assert np.allclose(keys[0], keys[1])
    decoder.read(new)


@wrong("5D", "Does your test compare numbers?")
def trusts_the_first(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    decoder = decoder_class(1, 4)
    decoder.read(x[None, :1])
    found = decoder.read(x[None, 1:3])[0]
    assert found.shape == (2, 4) and np.isfinite(found).all()


@wrong("5D", "it survived")
def compares_roughly(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    decoder = decoder_class(1, 4)
    found = np.concatenate([decoder.read(part[None])[0] for part in (x[:3], x[3:])])
    assert np.abs(found - read_alone(x)).max() < 0.4


@wrong("5D", "A test says no with an exception")
def says_what_it_found(decoder_class):
    x = np.ones((1, 2, 4))
    return np.allclose(decoder_class(1, 4).read(x), 1)


@wrong("5D", "The right code is refused")
def wants_no_positions(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    assert np.allclose(decoder_class(1, 4).read(x[None])[0, -1], x.mean(0))


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
