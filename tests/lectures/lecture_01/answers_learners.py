"""What readers of the text handed in: right answers in other styles, and mistakes that were accepted or misnamed."""

import math

import numpy as np
import torch
from torch import nn

from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 1A ----------------------------------------------------------------------------------------------------


@right("1A")
def softmax_of_each_row(x, axis=-1):
    rows = np.moveaxis(np.array(x), axis, -1)
    out = np.zeros_like(rows)
    for place in np.ndindex(rows.shape[:-1]):
        allowed = rows[place] > -np.inf
        if allowed.any():
            powers = np.exp(rows[place][allowed] - rows[place][allowed].max())
            out[place][allowed] = powers / powers.sum()
    return np.moveaxis(out, -1, axis)


def softmax_below(maximum, x, axis):
    powers = np.exp(x - np.where(maximum == -np.inf, 0, maximum))
    total = powers.sum(axis=axis, keepdims=True)
    return powers / np.where(total == 0, 1, total)


@wrong("1A", "not the row's own maximum")
def maximum_from_zero(x, axis=-1):
    return softmax_below(np.maximum(x.max(axis=axis, keepdims=True), 0), x, axis)


@wrong("1A", "which one has to come back?")
def never_back_to_half(x, axis=-1):
    x = x.astype(np.result_type(x.dtype, np.float32))
    return softmax_below(x.max(axis=axis, keepdims=True), x, axis)


# --- 1B ----------------------------------------------------------------------------------------------------


@wrong("1B", "These are numbers")
def ones_and_zeros(n_queries, n_keys=None):
    n_keys = n_queries if n_keys is None else n_keys
    return np.tril(np.ones((n_queries, n_keys), int), k=n_keys - n_queries)


@wrong("1B", "also sees the next position")
def one_too_many(n_queries, n_keys=None):
    n_keys = n_queries if n_keys is None else n_keys
    return np.tri(n_queries, n_keys, n_keys - n_queries + 1, dtype=bool)


@wrong("1B", "has n_queries columns")
def always_square(n_queries, n_keys=None):
    return np.tri(n_queries, dtype=bool)


# --- 1C ----------------------------------------------------------------------------------------------------


def weights_from(q, k, mask, causal, before=1.0, after=1.0):
    """The usual way; `before` multiplies what the mask is written into, `after` what it was written into."""
    scores = q @ np.swapaxes(k, -1, -2) * before
    if causal:
        n, m = scores.shape[-2:]
        scores = np.where(np.tri(n, m, m - n, dtype=bool), scores, -np.inf)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    with np.errstate(invalid="ignore"):
        scores = scores * after
    return softmax_below(scores.max(axis=-1, keepdims=True), scores, -1)


@right("1C")
def weights_of_the_allowed_only(q, k, mask=None, causal=False, scale=None):
    scores = np.einsum("...id,...jd->...ij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    n, m = scores.shape[-2:]
    keep = np.tri(n, m, m - n if causal else m, dtype=bool)
    keep = np.broadcast_to(keep if mask is None else keep & mask, scores.shape)
    top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf, where=keep)
    powers = np.where(keep, np.exp(np.where(keep, scores - np.where(np.isinf(top), 0, top), 0)), 0)
    total = powers.sum(-1, keepdims=True)
    return np.divide(powers, total, out=np.zeros_like(powers), where=total > 0)


@wrong("1C", "before the scale comes")
def scaled_after_the_mask(q, k, mask=None, causal=False, scale=None):
    return weights_from(q, k, mask, causal, after=q.shape[-1] ** -0.5 if scale is None else scale)


@wrong("1C", "which of them is d_head")
def the_second_axis_is_d(q, k, mask=None, causal=False, scale=None):
    return weights_from(q, k, mask, causal, before=q.shape[1] ** -0.5 if scale is None else scale)


@wrong("1C", "0/0 for a query with nothing")
def masked_late_and_divided_again(q, k, mask=None, causal=False, scale=None):
    weights = weights_from(q, k, None, causal, before=q.shape[-1] ** -0.5 if scale is None else scale)
    with np.errstate(invalid="ignore"):
        return weights if mask is None else weights * mask / (weights * mask).sum(-1, keepdims=True)


# --- 1D ----------------------------------------------------------------------------------------------------


class Head(nn.Module):
    def __init__(self, d_model, d_head):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(d_model, d_head) for _ in range(3))

    def scores(self, x):
        q = self.query(x)
        return q @ self.key(x).mT / math.sqrt(q.shape[-1])

    def hide(self, scores):
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)

    def forward(self, x, causal=False):
        scores = self.scores(x)
        weights = (self.hide(scores) if causal else scores).softmax(-1)
        return weights @ self.value(x), weights


@wrong("1D", "returned a list, expected the tuple (out, weights)")
class AList(Head):
    def forward(self, x, causal=False):
        return list(super().forward(x, causal))


@wrong("1D", "returned a tuple of 3, expected the tuple (out, weights)")
class OneResultMore(Head):
    def forward(self, x, causal=False):
        return *super().forward(x, causal), self.scores(x)


@wrong("1D", "gradients reach every parameter and the input      NO   the same")
class Arrays(Head):
    def forward(self, x, causal=False):
        return tuple(part.detach().numpy() for part in super().forward(x, causal))


@wrong("1D", "holds the scores")
class OutAndScores(Head):
    def forward(self, x, causal=False):
        scores = self.scores(x)
        return super().forward(x, causal)[0], self.hide(scores) if causal else scores


@wrong("1D", "The mask comes after the softmax")
class MasksLate(Head):
    def forward(self, x, causal=False):
        weights = self.scores(x).softmax(-1)
        weights = weights.tril() if causal else weights
        return weights @ self.value(x), weights


# --- 1F ----------------------------------------------------------------------------------------------------


@wrong("1F", "The test ends in ValueError on code that is right")
def takes_two_results(attention):
    q = np.ones((3, 4))
    out, weights = attention(q, q, q)
    assert np.allclose(weights.sum(-1), 1)
