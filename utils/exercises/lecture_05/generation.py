"""Lecture 05: the loop that writes. The models here say a token that depends on all that was read, and on how often."""

import itertools
from types import SimpleNamespace

import numpy as np
import torch

from utils.judge.function import exercise

MODULE = "kv_cache"


class Growing:
    """A cache: keys and values in tensors that grow."""

    def __init__(self):
        self.k = self.v = None

    @property
    def length(self):
        return 0 if self.k is None else self.k.shape[2]

    def update(self, k, v):
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        return self.k, self.v


class Reader:
    """A model whose next token is a sum over all tokens, each times its place: what is left out or read twice changes it.

    most, calls: the tokens of a row that it may be given in all, and in how many calls; told: what on_token was told so
    far, added to the sum.
    """

    def __init__(self, vocab_size=11, most=None, calls=None, told=None):
        self.config = SimpleNamespace(n_layers=1, vocab_size=vocab_size)
        self.most, self.calls, self.told, self.read, self.called = most, calls, told, 0, 0

    def __call__(self, ids, caches=None):
        self.read, self.called = self.read + ids.shape[1], self.called + 1
        if self.most is not None and self.read > self.most:
            raise ValueError(f"the model was given {self.read} tokens of a row so far, where {self.most} are enough")
        if self.calls is not None and self.called > self.calls:
            raise ValueError(f"the model was called {self.called} times, where {self.calls} are enough")
        old = caches[0].length if caches else 0
        marks = ((ids + 1) * (torch.arange(old, old + ids.shape[1]) + 2)).double()[:, None, :, None]
        marks = marks if caches is None else caches[0].update(marks, marks)[0]
        said = marks[:, 0, :, 0].cumsum(1)[:, -ids.shape[1] :] + sum(self.told.heard if self.told else [])
        size = self.config.vocab_size
        return -((torch.arange(size) - said[..., None] % size).abs() - 0.3).abs()  # no two are equally likely


class Ear:
    """An on_token that remembers what it was told."""

    def __init__(self):
        self.heard = []

    def __call__(self, ids):
        if tuple(ids.shape[1:]) != (1,):
            raise ValueError(f"on_token is called with tokens (batch, 1), got {tuple(ids.shape)}")
        self.heard.append(int(ids.sum()))


def next_tokens(logits, temperature, top_k, rng):
    """The tokens (batch,) that `sample` draws, one row at a time."""
    draws = rng.random(len(logits)) if temperature else None
    found = []
    for row, scores in enumerate(logits.tolist()):
        order = sorted(range(len(scores)), key=lambda token: -scores[token])
        if not temperature:
            found.append(order[0])
            continue
        allowed = set(order[: top_k or len(order)])
        powers = [np.exp((s - max(scores)) / temperature) * (i in allowed) for i, s in enumerate(scores)]
        sums = list(itertools.accumulate(powers))
        found.append(next(i for i, total in enumerate(sums) if total >= draws[row] * sums[-1]))
    return torch.tensor(found)


def write(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None, *, say=-1, again=False,
          draw=next_tokens, kept=True, tell=True, fresh=False, first=False):  # fmt: skip
    """The loop in the usual way. The mistakes differ in what follows the `*`; as it stands, it is right."""
    rng, unread, text = np.random.default_rng(seed), ids, ids
    for step in range(n_new):
        given = text if caches is None or again else text[:, -1:] if first else unread
        logits = model(given) if caches is None else model(given, caches=caches)
        rng = np.random.default_rng(seed) if fresh else rng
        unread = draw(logits[:, say], temperature, top_k, rng)[:, None]
        text = torch.cat([text, unread], dim=1)
        if on_token is not None and tell:
            on_token(unread)
    return text if kept else text[:, ids.shape[1] :]


@exercise("5C", MODULE, importance="essential")
def generate(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids must be (batch, n) with at least one token, got shape {tuple(ids.shape)}")
    return write(model, ids, n_new, caches, temperature, top_k, seed, on_token)


def prompt(rng, batch, n, vocab_size=11):
    return torch.from_numpy(rng.integers(vocab_size, size=(batch, n)))


@generate.property(
    "without caches: greedy, a token at a time",
    hint="Which row of the logits speaks about the token that comes next, and what is read after it was appended?",
)
def _(ask, rng):
    ask(Reader(), prompt(rng, 1, 2), 1)
    ask(Reader(), prompt(rng, 1, 3), 5)


@generate.property(
    "several texts; no new token at all", hint="What has the shape (batch, 1), and what comes back when n_new is 0?"
)
def _(ask, rng):
    ask(Reader(), prompt(rng, 3, 4), 6)
    ask(Reader(), prompt(rng, 2, 4), 0)
    ask(Reader(), prompt(rng, 1, 1), 1)


@generate.property(
    "with caches: the same tokens", hint="What did the model put into the caches already, and what is still unread?"
)
def _(ask, rng):
    ask(Reader(), prompt(rng, 1, 3), 1, [Growing()])
    ask(Reader(), prompt(rng, 2, 3), 6, [Growing()])
    ask(Reader(), prompt(rng, 2, 1), 3, [Growing()])


@generate.property(
    "with caches each token is read once, and the last one not at all",
    hint="How many tokens does the model get in the first call, how many in each later one, and is there a call too many?",
)
def _(ask, rng):
    ask(Reader(most=4 + 5, calls=6), prompt(rng, 1, 4), 6, [Growing()])


@generate.property(
    "temperature, top_k and seed are used",
    hint="To which function do logits of shape (batch, vocab_size), temperature, top_k and rng go?",
)
def _(ask, rng):
    ask(Reader(), prompt(rng, 2, 3), 6, temperature=1.5, seed=4)
    ask(Reader(), prompt(rng, 2, 3), 6, temperature=4.0, top_k=3)
    ask(Reader(), prompt(rng, 2, 3), 6, top_k=1, seed=1)


@generate.property(
    "on_token hears each token as it comes", hint="When is on_token called, with which tensor, and what if it is None?"
)
def _(ask, rng):
    ear = Ear()
    ask(Reader(told=ear), prompt(rng, 2, 3), 5, on_token=ear)


@generate.property(
    "all at once: caches, several texts, sampled, each token heard",
    hint="Which two of these have you never tried together?",
)
def _(ask, rng):
    for batch in (1, 3):
        ear = Ear()
        ask(Reader(most=3 + 6, told=ear), prompt(rng, batch, 3), 7, [Growing()], 2.0, 5, 3, ear)
        ask(Reader(), prompt(rng, batch, 3), 4, None, 2.0, 5, 3, Ear())
        ask(Reader(), prompt(rng, batch, 3), 4, [Growing()], on_token=Ear())


def sampled(**changes):
    return lambda logits, temperature, top_k, rng: next_tokens(
        logits, changes.get("temperature", temperature), changes.get("top_k", top_k), rng
    )


generate.mistakes_of(
    write,
    {
        "The first row of the logits is taken: the last one speaks about the token that comes next.": {"say": 0},
        "The whole text goes into the caches again at each step: only what is unread does.": {"again": True},
        "Of the prompt only the last token was read: before the first step all of it is unread.": {"first": True},
        "Always the likeliest token: sample takes the temperature.": {"draw": sampled(temperature=0.0)},
        "All tokens may be drawn: sample takes top_k.": {"draw": sampled(top_k=None)},
        "The random numbers begin again at each step: the generator is made once.": {"fresh": True},
        "Only the new tokens come back: return the prompt with them.": {"kept": False},
        "on_token did not hear each token as it came: call it once in each step.": {"tell": False},
        "sample gets a temperature of 1: pass on the one that was given.": {"draw": sampled(temperature=1.0)},
    },
)


@generate.mistake("One token is missing: n_new tokens are written.")
def _(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    return write(model, ids, n_new - 1, caches, temperature, top_k, seed, on_token)


@generate.mistake("The caches are not used: pass them to the model.")
def _(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    return write(model, ids, n_new, None, temperature, top_k, seed, on_token)


@generate.mistake("There is one token too many: n_new tokens are written.")
def _(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    return write(model, ids, n_new + 1, caches, temperature, top_k, seed, on_token)


@generate.mistake("The last token is read, too: nobody asks what comes after it.")
def _(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    text = write(model, ids, n_new, caches, temperature, top_k, seed, on_token)
    if caches is not None:
        model(text[:, -1:], caches=caches)
    return text


@generate.mistake("The prompt goes in token by token: all of it is known, so it goes in at once.")
def _(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    if caches is not None and n_new:
        for token in ids[:, :-1].split(1, dim=1):
            model(token, caches=caches)
        found = write(model, ids[:, -1:], n_new, caches, temperature, top_k, seed, on_token)
        return torch.cat([ids[:, :-1], found], dim=1)
    return write(model, ids, n_new, caches, temperature, top_k, seed, on_token)
