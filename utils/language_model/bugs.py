"""Mistakes that leave every shape right, and how to see them: logits first, then the loss, then what the model writes."""

import itertools
import math
import weakref
from functools import partial
from typing import NamedTuple

import torch

from utils.language_model.model import rotate
from utils.language_model.texts import excerpt

STEP, STEPS = 64, 4  # the text is read in four steps with a cache, as a server would read it
PROMPT = "The capital of France is Paris. The capital of Germany is"
N_WRITTEN = 8
TOLERANCE = 1e-3  # of logits up to 40 in single precision; other orders of summing make 1e-4


def attention(q, k, v, mask=None, causal=True, scale=None, last=0, hidden=-math.inf, axis=-1):
    """Softmax attention step by step, with a place for each mistake.

    Query i may attend to the keys up to that of its own token plus `last`; a number `hidden` is added to the other scores;
    axis: over which the softmax goes. scale: by default 1 / sqrt(d_head).
    """
    n_queries, n_keys = q.shape[-2:-1] + k.shape[-2:-1]
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries + last)
    if mask is not None:
        allowed = allowed & mask
    scores = torch.where(allowed, scores, scores + hidden)
    return torch.softmax(scores, axis).nan_to_num(0.0) @ v  # nan: a query that sees nothing


def top_left(q, k, v, **options):
    """Attention whose causal mask begins at the first key, wherever the queries stand: torch's is_causal."""
    return attention(q, k, v, **options, last=q.shape[-2] - k.shape[-2])


def repeat(x, n_heads):
    """Key heads 0 1 2 0 1 2 0 1 2 for nine query heads, where it should be 0 0 0 1 1 1 2 2 2."""
    return x.repeat(1, n_heads // x.shape[1], 1, 1)


def rotate_neighbours(x, positions):
    """RoPE on the pairs (2i, 2i + 1), for weights that were stored for (i, i + d_head / 2)."""
    order = torch.arange(x.shape[-1]).unflatten(0, (-1, 2)).T.flatten()
    return rotate(x[..., order], positions, 100000.0)[..., order.argsort()]


# What takes the place of which part: model.replace(**BUGS["no scale"]).
BUGS = {
    "no scale": {"attention": partial(attention, scale=1.0)},
    "scale 1/d": {"attention": partial(attention, scale=1 / 64)},
    "scale 1/sqrt(d_model)": {"attention": partial(attention, scale=1 / 24)},
    "softmax over the queries": {"attention": partial(attention, axis=-2)},
    "no mask": {"attention": partial(attention, hidden=0.0)},
    "mask of -1": {"attention": partial(attention, hidden=-1.0)},
    "mask of -10": {"attention": partial(attention, hidden=-10.0)},
    "one future token seen": {"attention": partial(attention, last=1)},
    "own token not seen": {"attention": partial(attention, last=-1)},
    "mask at the top left": {"attention": top_left},
    "repeat, not repeat_interleave": {"share": repeat},
    "wrong pairs in RoPE": {"rotate": rotate_neighbours},
    "RoPE with base 10,000": {"rotate": partial(rotate, base=10000.0)},
    "no positions": {"rotate": lambda x, positions: x},
    "positions twice as large": {"locate": lambda n_old, n_new: 2 * torch.arange(n_old, n_old + n_new)},
    "positions restarted": {"locate": lambda n_old, n_new: torch.arange(n_new)},
    "positions one too early": {"locate": lambda n_old, n_new: torch.arange(n_new) + max(n_old - 1, 0)},
}


class Comparison(NamedTuple):
    """A changed model beside the right one; losses in nats a token.

    difference: how far its logits are from the right ones, at most. same: whether that is below TOLERANCE, the only verdict;
    some mistakes change neither the loss in two decimals nor what is written.
    """

    difference: float
    same: bool
    loss: float
    right_loss: float
    text: str
    right_text: str

    @property
    def off(self):
        """How far the logits are off, as far as another processor would say the same: broken models multiply roundings."""
        if self.same:
            return f"less than {TOLERANCE}"
        if not math.isfinite(self.difference):
            return str(self.difference)
        return f"more than {10.0 ** math.floor(math.log10(self.difference)):g}"

    def __str__(self):
        loss = f"{self.loss:.{2 if abs(self.loss - self.right_loss) < 1 else 1}f}"
        right = "the same as it should" if self.text == self.right_text else f"should be {self.right_text!r}"
        return (
            f"logits: off by {self.off}\n"
            f"loss:   {loss} (should be {self.right_loss:.2f})\n"
            f"text:   {self.text!r}\n        ({right})"
        )


def compare(model, **parts):
    """Put other parts into a model, as LanguageModel.replace does, and return a Comparison of the two.

    They read 256 tokens of prose, 64 at a time with a cache, and continue one sentence by 8 tokens. Errors of the parts
    pass through.
    """
    logits, loss, text = _behaviour(model.replace(**parts))
    right_logits, right_loss, right_text = _right_behaviour(model)
    difference = float((logits - right_logits).abs().max())
    return Comparison(difference, difference < TOLERANCE, loss, right_loss, text, right_text)


def put_in(model, **parts):
    """Put a learner's functions into a model by name and print what becomes of it, whatever they do.

    Returns the model with them if its logits stay the same, otherwise the model as it was. Without a model (None) it says
    nothing and returns None.
    """
    if model is None:
        return None
    names = " and ".join(parts)
    try:
        found = compare(model, **parts)
    except Exception as error:
        print(f"The model could not run with your {names}: {type(error).__name__}: {error}")
        return model
    print(found)
    print(f"It speaks with your {names}." if found.same else f"With your {names} it is another model.")
    return model.replace(**parts) if found.same else model


@torch.no_grad()
def _behaviour(model):
    """What a model makes of the text: logits (256, vocab_size), loss, and what it writes after PROMPT."""
    ids = excerpt(model, STEP * STEPS)
    caches = model.new_caches()
    logits = torch.cat([model(step, caches=caches)[0].float() for step in ids.split(STEP, dim=1)])
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    written = torch.cat(list(itertools.islice(model.stream(model.encode(PROMPT)), N_WRITTEN)), dim=1)
    return logits, float(loss), model.decode(written)


def _right_behaviour(model):
    """The behaviour of the model as it was loaded: 50 MB, once, as long as the model is there."""
    if model not in _right:
        _right[model] = _behaviour(model)
    return _right[model]


_right = weakref.WeakKeyDictionary()
