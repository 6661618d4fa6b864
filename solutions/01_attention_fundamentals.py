# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   course:
#     module: fundamentals
# ---

# %% [markdown]
# # Lecture 01 · Attention fundamentals
#
# **Where we are.** You know matrix products, gradients, and what training a network means. **The question:** a network that
# reads a sequence has to use something it saw long ago. How can it look back?
# **What you build:** attention, three times with one signature: in NumPy to understand it, in PyTorch to train it, in CUDA to see where its bytes go. The eleven
# lectures after this one import what you write here.
#
# | part | sections | minutes |
# |---|---|---|
# | 1 · The problem, in experiments | 1.1 to 1.3 | 25 |
# | 2 · The mechanism, in NumPy | 1.4 to 1.9, exercises 1.1 to 1.5 | 75 |
# | 3 · PyTorch: attention that learns | exercise 1.6 | 40 |
# | 4 · CUDA: where the bytes go | exercises 1.7 to 1.9 | 60 |
# | Traps | questions and answers | 20 |
# | Going further | ten short sections that stand alone, exercise 1.10 | as you like |
#
# Parts 1 and 2 fill one class hour and a half; parts 3 and 4 another two. **How an exercise works:** write your code in place of
# `raise NotImplementedError`, run the cell, run the `check` below it. It tells you which properties hold. Until yours passes, the lecture goes on with the finished
# version, so that every later cell runs.

# %%
import sys; sys.path.insert(0, "..")              # the course's own modules live one folder up

import matplotlib.pyplot as plt
import numpy as np
import torch

from utils import data, plotting, training
from utils.check import check

torch.set_num_threads(1)                          # tiny models: one thread is fastest, and the same everywhere
rng = np.random.default_rng(0)

# %% tags=["export"]
import functools
import math

import numpy as np
import torch

from utils import cuda

# %% [markdown]
# # Part 1 · The problem, in experiments

# %% [markdown]
# ## 1.4 Queries, keys and values
#
# **What is attention, before it is a network?** It is a dictionary that answers with a blend.
#
# A Python dictionary compares a query with every key. Exactly one must match, and its value comes back.

# %%
legs = {"cat": 4.0, "bird": 2.0, "spider": 8.0}
print(f"legs['bird'] = {legs['bird']}")

# %% [markdown]
# Strings match or do not match. Vectors can match *more or less*. So each key becomes a vector, the comparison becomes a
# dot product, and a softmax turns the three comparisons into shares that sum to 1.
#
# *Predict.* The query below is the bird's own key. Will the answer be 2?

# %%
keys = np.array([[1.0, 0.0], [0.0, 1.0], [-0.7, 0.7]])      # (n_keys, d_head): cat, bird, spider
values = np.array([4.0, 2.0, 8.0])                          # one value for each key

def lookup(query, beta):
    shares = np.exp(beta * keys @ query)
    shares = shares / shares.sum()
    return shares, shares @ values

for beta in (1, 10, 100):
    shares, answer = lookup(np.array([0.0, 1.0]), beta)
    print(f"beta {beta:3d}: shares {np.round(shares, 3)}, legs {answer:.2f}")

# %% [markdown]
# Not at $\beta = 1$: a key that matches less still gets a share, and 4.55 legs is nobody's number. As $\beta$ grows the shares
# become one-hot and the soft dictionary turns into the hard one. In between it is differentiable: a small turn of the query changes the
# answer a little, and gradient descent can use that.
#
# The three roles have names. The **query** $q$ says what is wanted. A **key** $k_j$ says what item $j$ offers to be found by.
# The **value** $v_j$ is what item $j$ hands over.
#
# ### Why keep keys and values apart?
#
# The keys decide *where* to look; the values decide *what* comes back. Swap the values only:

# %%
values_swapped = np.array([0.2, 1.5, 0.01])                 # the same animals, now their weight in kg
shares, _ = lookup(np.array([0.0, 1.0]), 10)
print("shares unchanged:", np.round(shares, 3))
print(f"legs {shares @ values:.2f}, weight {shares @ values_swapped:.2f} kg")

# %% [markdown]
# One search served two questions. With $v_j = k_j$ an item could only hand over the very features it is found by.
# An experiment on this follows in the exercises left for you at the end.
#
# ## 1.5 Dot-product attention
#
# **How does this look for many queries at once, in the letters of the papers?** Each of $n$ queries gets its own shares over $m$ keys:
#
# $$ s_{ij} = \frac{q_i \cdot k_j}{\sqrt{d}} \qquad
#    p_{ij} = \frac{e^{s_{ij}}}{\sum_{j'} e^{s_{ij'}}} \qquad
#    o_i = \sum_j p_{ij}\, v_j $$
#
# The $s_{ij}$ are **scores**, the $p_{ij}$ are **attention weights**; each row of weights sums to 1. The division by $\sqrt d$ is explained in 1.6.
#
# | array | shape | meaning |
# |---|---|---|
# | `q` | `(n_queries, d_head)` | one query a row |
# | `k` | `(n_keys, d_head)` | one key a row |
# | `v` | `(n_keys, d_v)` | one value a row; usually `d_v = d_head` |
# | `scores`, `weights` | `(n_queries, n_keys)` | row = who asks, column = who is asked |
# | `out` | `(n_queries, d_v)` | one blend a row |
#
# First as loops, one line for each formula.

# %%
n_queries, n_keys, d_head = 3, 5, 4
q = rng.standard_normal((n_queries, d_head))
k = rng.standard_normal((n_keys, d_head))
v = rng.standard_normal((n_keys, d_head))

out_loop = np.zeros((n_queries, d_head))
for i in range(n_queries):
    s = np.array([sum(q[i, t] * k[j, t] for t in range(d_head)) for j in range(n_keys)]) / np.sqrt(d_head)
    p = np.exp(s) / np.exp(s).sum()
    for j in range(n_keys):
        out_loop[i] += p[j] * v[j]

print("output of query 1:", np.round(out_loop[1], 4))

# %% [markdown]
# The same as three lines of linear algebra. All $n \cdot m$ dot products are one matrix product, and so is the blend.

# %%
scores = q @ k.T / np.sqrt(d_head)                                          # (n_queries, n_keys)
weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)       # each row sums to 1
out = weights @ v                                                           # (n_queries, d_head)

print("output of query 1:", np.round(out[1], 4))
assert np.allclose(out, out_loop)

# %% [markdown]
# The number has not changed. PyTorch ships the same function, and an independent implementation is the best test there is.

# %%
out_torch = torch.nn.functional.scaled_dot_product_attention(*(torch.from_numpy(a)[None, None] for a in (q, k, v)))
print("agrees with PyTorch to 1e-12:", np.allclose(out_torch[0, 0].numpy(), out, atol=1e-12))

# %% [markdown]
# When queries, keys and values are all computed from the *same* sequence, this is **self-attention**. When the queries come from one
# sequence and the keys and values from another, it is **cross-attention**. The formula does not know the difference.
#
# What does it cost? Two matrix products of $n \cdot m \cdot d$ multiply-adds each: $4\,n\,m\,d$ floating-point operations, and $n \cdot m$ weights to
# keep. For a sequence that attends to itself both grow with the square of its length. Lecture 04 is about that square.

# %% [markdown]
# ## 1.6 The softmax, and why the scores are divided by $\sqrt d$
#
# **What can go wrong with $e^s$?** In 64-bit floats $e^{710}$ is already infinite, and infinity over infinity is not a number.

# %%
row = np.array([1000.0, 999.0, 0.0])
with np.errstate(over="ignore", invalid="ignore"):
    naive = np.exp(row) / np.exp(row).sum()
shifted = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
print("naive:  ", naive)
print("shifted:", np.round(shifted, 3))

# %% [markdown]
# Subtracting one number from every score multiplies numerator and denominator by the same factor, so the weights stay what they
# were; and with the row's maximum subtracted no exponent is positive. Nothing overflows.
#
# ### Exercise 1.1: a softmax that survives  (difficulty 2 of 5, 10 minutes)
#
# Write the shifted softmax, once for the whole course.
#
# | argument | shape | meaning |
# |---|---|---|
# | `x` | any | scores; `-inf` means "not allowed" and gets weight 0 |
# | `axis` | int | the axis along which the weights sum to 1 |
#
# returns weights of the shape and float type of `x`. A row in which *nothing* is allowed has no weights that sum to 1: it is all zeros, never nan.
# The input stays as it was.
#
# <details><summary>Hint</summary>What is the maximum of a row of only -inf, and what is -inf minus -inf? Replace that maximum by 0 before
# subtracting; then look at the denominator of the same row.</details>

# %% tags=["exercise", "export"]
def softmax(x, axis=-1):
    """Softmax along one axis, shifted by the maximum so that no finite score overflows.

    x: floats of any shape; -inf gives weight 0. Returns an array of the same shape and float type.
    A row of only -inf is all zeros: nothing may be attended, so nothing is.
    """
    ### BEGIN SOLUTION
    x = np.asarray(x, np.result_type(x, np.float16))
    maximum = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    exponentials = np.exp(x - np.where(np.isneginf(maximum), 0, maximum))
    total = exponentials.sum(axis=axis, keepdims=True)
    return exponentials / np.where(total == 0, 1, total)
    ### END SOLUTION

# %%
softmax = check("1.1", softmax)

# %% [markdown]
# ### Why $\sqrt d$?
#
# Let the entries of $q$ and $k$ be independent with mean 0 and variance 1. Each product $q_t k_t$ then has variance 1, and the dot product adds $d$ of them:
# its variance is $d$ and its typical size $\sqrt d$ (Vaswani et al. 2017, section 3.2.1, footnote 4).
#
# *Predict.* With 64 random keys and no training at all, what is the largest weight on average: with $d = 16$? With $d = 1024$?

# %%
sizes = [16, 64, 256, 1024]

def peak_and_slope(d, scale, n_keys=64, rows=500):
    """Mean of the largest weight, and of the trace of the softmax Jacobian, over random rows."""
    draw = np.random.default_rng(1)
    q, k = draw.standard_normal((rows, 1, d)), draw.standard_normal((rows, d, n_keys))
    p = softmax((q @ k)[:, 0] * scale)
    return p.max(-1).mean(), (p * (1 - p)).sum(-1).mean()

for d in sizes:
    (peak, slope), (peak_scaled, slope_scaled) = peak_and_slope(d, 1), peak_and_slope(d, 1 / np.sqrt(d))
    print(f"d {d:4d}: largest weight {peak:.2f}, scaled {peak_scaled:.2f};  Jacobian {slope:.2f}, scaled {slope_scaled:.2f}")

# %% [markdown]
# Without the scale an untrained head with $d = 1024$ has already decided: one key gets 95 % of the weight, chosen by chance.
# With it, the weights start spread out whatever the size.
#
# The second pair of numbers says why that matters. The derivative of the softmax is the Jacobian
# $\partial p_i / \partial s_j = p_i(\delta_{ij} - p_j)$, and its trace $\sum_i p_i (1 - p_i)$ measures how much the weights still
# react to the scores. A saturated softmax hardly reacts, so hardly any gradient comes through.

# %%
rows = {"q·k": [peak_and_slope(d, 1)[1] for d in sizes],
        "q·k / √d": [peak_and_slope(d, 1 / np.sqrt(d))[1] for d in sizes]}
plotting.curves(rows, x=sizes, xlabel="size of a head, $d$ (entries)", ylabel="trace of the softmax Jacobian",
                title="Unscaled scores saturate the softmax as d grows", log_x=True)
plotting.show("Two lines over the head size: unscaled, the trace of the Jacobian falls from about one half towards zero; "
              "scaled by the square root of d it stays near one.")

# %% [markdown]
# ## 1.7 A worked example, start to finish
#
# **Can you do it with a pencil?** Three tokens, $d = 4$, integers only. Do the first row on paper before you run the cells.

# %%
q = np.array([[2, 0, 1, 0], [0, 2, 0, 2], [1, 1, 1, 1]], float)
k = np.array([[1, 0, 0, 0], [0, 1, 2, 1], [0, 1, 0, 1]], float)
v = np.array([[10, 0, 0, 0], [0, 10, 0, 0], [0, 0, 10, 10]], float)

scores = q @ k.T
print(scores)
assert (scores == [[2, 2, 0], [0, 4, 4], [1, 4, 2]]).all()

# %% [markdown]
# Row 0: $q_0 \cdot k_0 = 2$, $q_0 \cdot k_1 = 2$, $q_0 \cdot k_2 = 0$. Divide by $\sqrt 4 = 2$: the scores are 1, 1 and 0. Their exponentials are
# 2.718, 2.718 and 1; they sum to 6.437. So the weights are $2.718 / 6.437 = 0.422$ twice, and $1 / 6.437 = 0.155$.

# %%
weights = softmax(scores / 2)
print(np.round(weights, 3))
assert np.allclose(weights[0], np.array([np.e, np.e, 1]) / (2 * np.e + 1))

# %% [markdown]
# The values are chosen so that the output shows the weights: ten times the weight of token 0, of token 1, and of token 2 twice.

# %%
out = weights @ v
print(np.round(out, 2))
assert np.allclose(out[0], 10 * weights[0, [0, 1, 2, 2]])

# %% [markdown]
# Row 1 gives token 0 a small share although their score is 0. A score of zero does not mean "unrelated, so ignored". It means $e^0 = 1$ in
# the numerator. Only $-\infty$ shuts a key out, and that is the next section but one.
#
# ## 1.8 Seeing attention
#
# **How is a matrix of weights read?** One row is one query, and the row sums to 1. So read along rows: *where does this token look?*
# A dark column would be a key that many queries want.

# %%
tokens = ["the", "cat", "sleeps"]
plotting.heatmap(weights, tokens, tokens, title="“cat” and “sleeps” look mostly at “cat”")
plotting.show("Heat map of the three by three weights of the worked example; the largest weight in rows 1 and 2 is in the column of cat.")

# %% [markdown]
# (The words are labels on the numbers above. Nobody trained them.)

# %% [markdown]
# ## 1.9 Masks: who may look where
#
# **How do you forbid a look?** A model that predicts the next word must not see it. A batch of sentences of unequal length is filled up with padding that
# must not be read. Both are a table of booleans, and in this course **True always means "may attend"**.
#
# The score of a forbidden pair is set to $-\infty$ *before* the softmax. Then $e^{-\infty} = 0$, and the row shares its weight among what is left.
#
# ### Exercise 1.3: the causal mask  (difficulty 2 of 5, 8 minutes)
#
# Query $i$ may look at key $j$ if $j$ is not in its future: before it *and itself*.
#
# | argument | meaning |
# |---|---|
# | `n_queries` | number of queries |
# | `n_keys` | number of keys; `None` means as many as queries |
#
# returns booleans `(n_queries, n_keys)`. If there are fewer queries than keys, the queries are the *last* ones of the sequence, and so the last query sees every key
# (lecture 05 needs this: one new token, a hundred remembered keys).
#
# <details><summary>Hint</summary>Compare a column of query positions with a row of key positions. At which position does the first query stand?</details>

# %% tags=["exercise", "export"]
def causal_mask(n_queries, n_keys=None):
    """Boolean (n_queries, n_keys), True where key j is not after query i; aligned at the bottom right.

    With more queries than keys the first rows see nothing. Raises ValueError for a negative size.
    """
    ### BEGIN SOLUTION
    n_keys = n_queries if n_keys is None else n_keys
    if n_queries < 0 or n_keys < 0:
        raise ValueError(f"n_queries and n_keys must not be negative, got {n_queries} and {n_keys}")
    positions = np.arange(n_queries)[:, None] + (n_keys - n_queries)
    return np.arange(n_keys)[None, :] <= positions
    ### END SOLUTION

# %%
causal_mask = check("1.3", causal_mask)

# %% [markdown]
# ### Exercise 1.4: the padding mask  (difficulty 1 of 5, 5 minutes)
#
# A batch holds sentences of `lengths[b]` real tokens, padded to `n_keys`. Nobody may look at the padding.
#
# | argument | shape | meaning |
# |---|---|---|
# | `lengths` | `(batch,)` integers | real tokens of each sentence |
# | `n_keys` | int | length after padding |
#
# returns booleans `(batch, 1, 1, n_keys)`. The two ones let it broadcast over heads and queries.

# %% tags=["exercise", "export"]
def padding_mask(lengths, n_keys):
    """Boolean (batch, 1, 1, n_keys), True for the first lengths[b] keys of sentence b.

    lengths: integers (batch,). Raises ValueError when a length is negative or larger than n_keys.
    """
    ### BEGIN SOLUTION
    lengths = np.asarray(lengths)
    if lengths.size and (lengths.min() < 0 or lengths.max() > n_keys):
        raise ValueError(f"lengths must lie between 0 and n_keys = {n_keys}, got {lengths.tolist()}")
    return (np.arange(n_keys) < lengths[:, None])[:, None, None, :]
    ### END SOLUTION

# %%
padding_mask = check("1.4", padding_mask)

# %% [markdown]
# Masks combine with "and": a key must be allowed by every mask.

# %%
causal, padding = causal_mask(6), padding_mask([4], 6)[0, 0]
plotting.masks({"causal": causal, "padding, length 4": np.broadcast_to(padding, (6, 6)), "both": causal & padding},
               title="Masks combine with “and”")
plotting.show("Three mask diagrams of six queries by six keys: the lower triangle with its diagonal, the first four columns, and their intersection.")

# %% [markdown]
# ### Exercise 1.5: attention weights with masks  (difficulty 3 of 5, 15 minutes)
#
# Now everything so far in one function: scores, scale, masks, softmax.
#
# | argument | shape | meaning |
# |---|---|---|
# | `q` | `(..., n_queries, d_head)` | queries |
# | `k` | `(..., n_keys, d_head)` | keys |
# | `mask` | booleans, broadcastable to `(..., n_queries, n_keys)` | True = may attend; `None` = all |
# | `causal` | bool | also forbid the future |
# | `scale` | float | factor on $q \cdot k$; `None` means $1/\sqrt{d_{head}}$ |
#
# returns weights `(..., n_queries, n_keys)`. A row that may look nowhere is zero.
#
# <details><summary>Hint</summary>The dots in front are batches and heads: transpose only the last two axes of k. `np.where` makes a new array, so that
# nothing of the caller's is overwritten. Your softmax already knows what to do with a row of -inf.</details>

# %% tags=["exercise", "export"]
def attention_weights(q, k, mask=None, causal=False, scale=None):
    """Attention weights softmax(scale * q k^T) with masks, in NumPy.

    q (..., n_queries, d_head), k (..., n_keys, d_head), mask boolean and broadcastable to (..., n_queries, n_keys)
    with True = may attend. Returns (..., n_queries, n_keys); a row with nothing to attend is zero.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1.
    """
    ### BEGIN SOLUTION
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ np.swapaxes(k, -1, -2) * float(scale)
    if causal:
        scores = np.where(causal_mask(q.shape[-2], k.shape[-2]), scores, -np.inf)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    return softmax(scores)
    ### END SOLUTION

# %%
attention_weights = check("1.5", attention_weights)

# %% [markdown]
# Packaged: the function that the next eleven lectures build on, and the oracle of every other version of it. It is strict about what it is given, because
# a mask of the wrong kind would otherwise give a wrong answer in silence.

# %% tags=["export"]
def check_arguments(q, k, v, mask=None):
    """Raise ValueError, in one sentence, unless the shapes of an attention fit together. For arrays and tensors."""
    for name, array in (("q", q), ("k", k), ("v", v)):
        if len(array.shape) < 2:
            raise ValueError(f"{name} must have at least two axes (seq, d_head), got shape {tuple(array.shape)}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same d_head, got {q.shape[-1]} and {k.shape[-1]}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have the same n_keys, got {k.shape[-2]} and {v.shape[-2]}")
    if mask is not None:
        if "bool" not in str(mask.dtype):
            raise ValueError(f"mask must be boolean with True = may attend, got {mask.dtype}")
        full = (*q.shape[:-2], q.shape[-2], k.shape[-2])
        try:
            fits = np.broadcast_shapes(tuple(mask.shape), full) == full
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"mask must broadcast to {full}, got shape {tuple(mask.shape)}")


def attention_numpy(q, k, v, mask=None, causal=False, scale=None):
    """Scaled dot-product attention in NumPy: the oracle of attention_torch and attention_cuda.

    q (..., n_queries, d_head), k (..., n_keys, d_head), v (..., n_keys, d_v); mask boolean, True = may attend,
    broadcastable to (..., n_queries, n_keys); causal is aligned at the bottom right; scale defaults to
    1/sqrt(d_head). Returns (..., n_queries, d_v) in the float type of q (half precision is computed in single);
    a query with nothing to attend gets zeros. Raises ValueError when shapes or mask do not fit.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1.
    """
    check_arguments(q, k, v, mask)
    work = np.result_type(q, np.float32)
    q_, k_, v_ = (a.astype(work, copy=False) for a in (q, k, v))
    return (attention_weights(q_, k_, mask, causal, scale) @ v_).astype(np.result_type(q, np.float16), copy=False)

# %% [markdown]
# **Does the mask leak?** If position 3 may not be seen from positions 0 to 2, then nothing that happens at 3 may change them, not even in the last bit.

# %%
q, k, v = (rng.standard_normal((6, 8)) for _ in range(3))
before = attention_numpy(q, k, v, causal=True)
k[3], v[3] = 100.0, -100.0                                  # something loud happens at position 3
after = attention_numpy(q, k, v, causal=True)
print("rows that changed:", [i for i in range(6) if not np.array_equal(before[i], after[i])])

# %% [markdown]
# Bit for bit, rows 0 to 2 never knew. A common wrong version masks *after* the softmax. *Predict*: does it leak?

# %%
def masked_too_late(q, k, v):
    weights = softmax(q @ k.T / np.sqrt(q.shape[-1])) * causal_mask(len(q))
    return weights @ v, weights

late_before, _ = masked_too_late(q, k, v)
k[3] = -100.0
late_after, weights = masked_too_late(q, k, v)
print("rows that changed:", [i for i in range(6) if not np.array_equal(late_before[i], late_after[i])])
print("rows sum to 1:", np.allclose(weights.sum(-1), 1))

# %% [markdown]
# It leaks into every row: the forbidden key is still in the denominator. And the rows no longer sum to 1.
#
# ### A row that may look nowhere
#
# An empty sentence in a batch has no key at all. There is no right answer, so this course fixes one: zero, with gradient zero. Never nan, because one nan spreads through
# the whole batch at the next mean.

# %%
nothing = np.zeros((6, 6), bool)
print("all zeros:", (attention_numpy(q, k, v, mask=nothing) == 0).all())

# %% [markdown]
# # Part 3 · PyTorch: attention that learns
#
# **What changes in PyTorch?** Not the formula. What is new is the gradient, and it must survive everything that the forward pass survives: a row with nothing to attend
# has to give gradient 0, not nan.

# %% tags=["export"]
def attention_torch(q, k, v, mask=None, causal=False, scale=None):
    """Scaled dot-product attention in PyTorch; same arguments, shapes and errors as attention_numpy, differentiable.

    Half precision is computed in single and returned in the type of q. mask and causal as in attention_numpy.
    """
    check_arguments(q, k, v, mask)
    work = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q.to(work) @ k.to(work).transpose(-1, -2) * scale
    if causal:
        allowed = torch.from_numpy(causal_mask(q.shape[-2], k.shape[-2])).to(q.device)
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~torch.as_tensor(mask, device=q.device), -math.inf)
    maximum = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - maximum.masked_fill(maximum == -math.inf, 0))
    total = weights.sum(-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1) @ v.to(work)).to(q.dtype)

# %%
q, k, v = (torch.from_numpy(rng.standard_normal((2, 4, 5, 8))).requires_grad_() for _ in range(3))
mask = torch.from_numpy(padding_mask([5, 3], 5))

ours = attention_torch(q, k, v, mask=mask, causal=True)
theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask & torch.ones(5, 5).tril().bool())
print("agrees with NumPy to 1e-12:  ", np.allclose(
    ours.detach().numpy(), attention_numpy(*(a.detach().numpy() for a in (q, k, v)), mask=mask.numpy(), causal=True), atol=1e-12))
print("agrees with PyTorch to 1e-12:", torch.allclose(ours, theirs, atol=1e-12, rtol=0))

# %% [markdown]
# The gradients too, against PyTorch's own function and, through `gradcheck`, against finite differences.

# %%
d_out = torch.from_numpy(rng.standard_normal(ours.shape))
ours_d, theirs_d = (torch.autograd.grad(out, (q, k, v), d_out) for out in (ours, theirs))
print("gradients agree to 1e-12:", all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(ours_d, theirs_d)))

small = [a[:1, :1].detach().requires_grad_() for a in (q, k, v)]
print("finite differences agree:", torch.autograd.gradcheck(lambda *a: attention_torch(*a, causal=True), small))

nowhere = torch.zeros(5, 5, dtype=torch.bool)
grads = torch.autograd.grad(attention_torch(q, k, v, mask=nowhere).sum(), (q, k, v))
print("nothing to attend, gradient 0:", all((g == 0).all().item() for g in grads))

# %% [markdown]
# ### Exercise 1.6: the backward pass by hand  (difficulty 4 of 5, 25 minutes)
#
# Autograd is convenient and keeps every intermediate. A fused kernel (lecture 06) has to write its own backward pass, so you write it here first.
# Given $dO = \partial L / \partial O$, walk back through the three formulas:
#
# $$ dV = P^\top dO \qquad dP = dO\, V^\top \qquad dS_{ij} = P_{ij}\Big(dP_{ij} - \sum_{j'} P_{ij'}\, dP_{ij'}\Big) \qquad
#    dQ = \text{scale} \cdot dS\, K \qquad dK = \text{scale} \cdot dS^\top Q $$
#
# The middle one is the Jacobian of the softmax from 1.6, applied to a row.
#
# | argument | shape |
# |---|---|
# | `q`, `k`, `v` | as in `attention_numpy` |
# | `d_out` | `(..., n_queries, d_v)`, gradient of the loss with respect to the output |
#
# returns `(d_q, d_k, d_v)` of the shapes of `q`, `k`, `v`.
#
# <details><summary>Hint</summary>Masks need no case of their own: a forbidden pair has $P_{ij} = 0$ and so $dS_{ij} = 0$.</details>

# %% tags=["exercise", "export"]
def attention_backward(q, k, v, d_out, mask=None, causal=False, scale=None):
    """Gradients of attention_numpy with respect to q, k and v, in NumPy.

    Shapes as in attention_numpy; d_out (..., n_queries, d_v). Returns (d_q, d_k, d_v), shaped like q, k, v.
    """
    ### BEGIN SOLUTION
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    p = attention_weights(q, k, mask, causal, scale)
    d_p = d_out @ np.swapaxes(v, -1, -2)
    d_s = p * (d_p - (p * d_p).sum(-1, keepdims=True))
    return scale * d_s @ k, scale * np.swapaxes(d_s, -1, -2) @ q, np.swapaxes(p, -1, -2) @ d_out
    ### END SOLUTION

# %%
attention_backward = check("1.6", attention_backward)

# %%
by_hand = attention_backward(*(a.detach().numpy() for a in (q, k, v)), d_out.numpy(), mask=mask.numpy(), causal=True)
print("by hand equals autograd to 1e-12:", all(np.allclose(a, b.numpy(), atol=1e-12) for a, b in zip(by_hand, ours_d)))

# %% [markdown]
# # Part 4 · CUDA: where the bytes go
#
# **If the formula is three lines, why do people write kernels for it?** Because of the matrix in the middle. For $n$ queries and $n$ keys the weights are $n^2$
# numbers that nobody asked for. Written to memory and read back, they cost more time than all the arithmetic.
# This part shows that in bytes.
#
# A GPU runs one function, the **kernel**, in thousands of **threads**. Threads come in **blocks**; a block has a small, fast **shared memory** of its own. All threads see
# the large, slow **global memory**. Thirty-two neighbouring threads form a **warp** and execute each line together.
#
# You need no GPU. `utils.cuda` compiles the same CUDA C++ for your CPU, runs every thread, and counts every access. On a machine with an NVIDIA GPU the same call,
# given CUDA tensors, runs there.

# %%
SCALE = r"""
__global__ void scale(const float* x, float* y, float factor, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;      // this thread's element
  if (i < n) y[i] = factor * x[i];                    // the last block is not full
}
"""
x, y = np.arange(1000, dtype=np.float32), np.zeros(1000, np.float32)
kernel = cuda.compile(SCALE)
kernel[4, 256](x, y, 0.5, 1000)                       # 4 blocks of 256 threads: 1,024 threads for 1,000 elements
print("right:", np.array_equal(y, x / 2))

# %% [markdown]
# The square brackets say how many blocks and how many threads in each. `kernel.check` runs the same and returns a report instead.
#
# *Predict.* What happens to threads 1,000 to 1,023 when the guard `if (i < n)` is forgotten?

# %%
unguarded = cuda.compile(SCALE.replace("if (i < n) ", ""))
print(unguarded.check[4, 256](x, y, 0.5, 1000).problems[0])

# %% [markdown]
# On a GPU this may crash, or corrupt somebody else's array, or seem to work. Here it is reported with its line, and nothing happens to the notebook: a kernel
# runs in a process of its own.
#
# ### Coalescing: thirty-two reads or one?
#
# Memory is fetched in **sectors** of 32 bytes. When the 32 threads of a warp read 32 neighbouring floats, that is 128 bytes: 4 sectors, all of it used. When
# they read 32 floats that lie far apart, it is 32 sectors, and seven eighths of every one is thrown away.
#
# Here is a softmax with one thread for each row.

# %%
SOFTMAX_STRIDED = r"""
__global__ void softmax_strided(const float* s, float* p, int n_queries, int n_keys) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;                // this thread's row
  if (i >= n_queries) return;
  float maximum = -INFINITY, total = 0.0f;
  for (int j = 0; j < n_keys; ++j) maximum = fmaxf(maximum, s[i * n_keys + j]);
  for (int j = 0; j < n_keys; ++j) total += expf(s[i * n_keys + j] - maximum);
  for (int j = 0; j < n_keys; ++j) p[i * n_keys + j] = expf(s[i * n_keys + j] - maximum) / total;
}
"""
n_queries, n_keys = 64, 64
scores = rng.standard_normal((n_queries, n_keys)).astype(np.float32)
p = np.zeros_like(scores)
strided = cuda.compile(SOFTMAX_STRIDED).check[2, 32](scores, p, n_queries, n_keys)
strided

# %% [markdown]
# Look at the column of sectors: 32 for each request where 4 would do. At step $j$ thread 0 reads `s[j]` and thread 1 reads `s[n_keys + j]`, a whole row further on.
#
# ### Exercise 1.7: coalesce it  (difficulty 3 of 5, 20 minutes)
#
# Give each row a whole warp instead. The kernel is launched with one block of 32 threads for each row; lane $l$ takes the columns $l, l + 32, l + 64, \dots$
#
# | argument | shape | meaning |
# |---|---|---|
# | `s` | `(n_queries, n_keys)` | scores |
# | `p` | `(n_queries, n_keys)` | weights, written |
# | `n_keys` | int | any number, not only multiples of 32 |
#
# `warp_max` and `warp_sum` are given: each lane hands in its own number and gets the result over all 32. Every lane must call them.
#
# <details><summary>Hint</summary>Three loops as above, each `for (int j = threadIdx.x; j < n_keys; j += 32)`, with a warp reduction after the first and after the
# second. The row is `blockIdx.x`.</details>

# %% tags=["exercise", "export"]
SOFTMAX_ROWS = r"""
__device__ float warp_max(float x) {
  for (int o = 16; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, o));
  return x;
}
__device__ float warp_sum(float x) {
  for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffff, x, o);
  return x;
}
__global__ void softmax_rows(const float* s, float* p, int n_keys) {
  // BEGIN SOLUTION
  const float* row = s + (size_t)blockIdx.x * n_keys;
  float maximum = -INFINITY, total = 0.0f;
  for (int j = threadIdx.x; j < n_keys; j += 32) maximum = fmaxf(maximum, row[j]);
  maximum = warp_max(maximum);
  for (int j = threadIdx.x; j < n_keys; j += 32) total += expf(row[j] - maximum);
  total = warp_sum(total);
  for (int j = threadIdx.x; j < n_keys; j += 32) p[(size_t)blockIdx.x * n_keys + j] = expf(row[j] - maximum) / total;
  // END SOLUTION
}
"""

# %%
SOFTMAX_ROWS = check("1.7", SOFTMAX_ROWS)

# %%
rows = cuda.compile(SOFTMAX_ROWS).check[n_queries, 32](scores, p, n_keys)
for name, report in (("one thread a row", strided), ("one warp a row", rows)):
    print(f"{name}: {report.global_loaded:,} bytes asked for, {report.sectors_loaded * 32:,} bytes of sectors fetched")

# %% [markdown]
# The same bytes are asked for. One version makes the memory deliver eight times as many.
#
# ### Attention in three kernels
#
# The formula of 1.5, one kernel for each line: scores, softmax, blend. Before running, do the arithmetic. With $n$ queries, $m$ keys and $d$ entries, in bytes of four to a float:
#
# | kernel | reads | writes |
# |---|---|---|
# | scores: one thread for each of $n m$ dot products of length $d$ | $4 \cdot 2 n m d$ | $4 n m$ |
# | softmax: three passes over each row | $4 \cdot 3 n m$ | $4 n m$ |
# | blend: one thread for each of $n d$ sums of length $m$ | $4 \cdot 2 n m d$ | $4 n d$ |

# %% tags=["export"]
SCORES = r"""
__global__ void scores(const float* q, const float* k, float* s, int n_queries, int n_keys, int d, float scale) {
  int j = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y * blockDim.y + threadIdx.y;
  if (i >= n_queries || j >= n_keys) return;
  float sum = 0.0f;
  for (int t = 0; t < d; ++t) sum += q[i * d + t] * k[j * d + t];
  s[i * n_keys + j] = scale * sum;
}
"""
BLEND = r"""
__global__ void blend(const float* p, const float* v, float* out, int n_queries, int n_keys, int d) {
  int t = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y * blockDim.y + threadIdx.y;
  if (i >= n_queries || t >= d) return;
  float sum = 0.0f;
  for (int j = 0; j < n_keys; ++j) sum += p[i * n_keys + j] * v[j * d + t];
  out[i * d + t] = sum;
}
"""

# %%
n, m, d = 64, 80, 32
q, k, v = (rng.standard_normal((rows, d)).astype(np.float32) for rows in (n, m, m))
s, p, out = np.zeros((n, m), np.float32), np.zeros((n, m), np.float32), np.zeros((n, d), np.float32)
tiles = lambda size: -(-size // 16)                                 # how many blocks of 16 cover it

naive = [cuda.compile(SCORES).check[(tiles(m), tiles(n)), (16, 16)](q, k, s, n, m, d, 1 / np.sqrt(d)),
         cuda.compile(SOFTMAX_ROWS).check[n, 32](s, p, m),
         cuda.compile(BLEND).check[(tiles(d), tiles(n)), (16, 16)](p, v, out, n, m, d)]

print("agrees with NumPy to 1e-5:", np.allclose(out, attention_numpy(q, k, v), atol=1e-5))
read, written = (sum(getattr(r, what) for r in naive) for what in ("global_loaded", "global_stored"))
print(f"read    {read:9,} bytes, formula {4 * (2 * n * m * d + 3 * n * m + 2 * n * m * d):9,}")
print(f"written {written:9,} bytes, formula {4 * (2 * n * m + n * d):9,}")

# %% [markdown]
# To the byte. A value of $q$ is fetched again for each of the $m$ keys, a value of $k$ for each of the $n$ queries.
#
# ### Tiles
#
# **How do you read a number once and use it sixteen times?** A block of 16 × 16 threads loads 16 rows of K into its shared memory, together. Then each thread takes what
# it needs from there. One read from global memory now serves 16 queries.
#
# It has a price: a thread uses numbers that *other* threads loaded, so it must know that they have arrived. `__syncthreads()` is a barrier: no thread of the block
# passes before all have come.

# %% [markdown]
# ### Exercise 1.8: load a tile  (difficulty 3 of 5, 15 minutes)
#
# All 256 threads of a block copy `TILE` = 16 rows of a matrix into shared memory. Each thread has a number, `thread` = 0 … 255.
#
# | argument | meaning |
# |---|---|
# | `tile` | in shared memory; row $r$, column $c$ belongs at `tile[r * stride + c]` |
# | `rows` | in global memory, `(n_rows, d)`, row after row |
# | `first` | the first row to copy; rows from `n_rows` on do not exist and become 0 |
#
# Neighbouring threads must read neighbouring addresses, for any `d`. Never read outside `rows`.
#
# <details><summary>Hint</summary>Number the 16 · d elements of the tile row after row. Thread number `thread` copies the elements `thread`, `thread + 256`, … Row and
# column of element `e` are `e / d` and `e % d`.</details>

# %% tags=["exercise", "export"]
LOAD_TILE = r"""
#define TILE 16
__device__ void load_tile(float* tile, int stride, const float* rows, int first, int n_rows, int d) {
  int thread = threadIdx.y * TILE + threadIdx.x;
  // BEGIN SOLUTION
  for (int e = thread; e < TILE * d; e += TILE * TILE) {
    int r = e / d, c = e % d;
    tile[r * stride + c] = first + r < n_rows ? rows[(size_t)(first + r) * d + c] : 0.0f;
  }
  // END SOLUTION
}
"""

# %%
LOAD_TILE = check("1.8", LOAD_TILE)

# %% [markdown]
# ### Exercise 1.9: place the barriers  (difficulty 3 of 5, 15 minutes)
#
# The kernel below computes scores from tiles of K. Its barriers are missing. Five places are numbered: which of them need a `__syncthreads()`?
# Return the smallest set of places that is right for every size.

# %% tags=["export"]
SCORES_TILED = r"""
__global__ void scores_tiled(const float* q, const float* k, float* s, int n_queries, int n_keys, int d, float scale) {
  extern __shared__ float k_tile[];                             // TILE keys
  int i = blockIdx.x * TILE + threadIdx.y;                      // this thread's query
  for (int first = 0; first < n_keys; first += TILE) {
    /* place 0 */
    load_tile(k_tile, d, k, first, n_keys, d);
    /* place 1 */
    int j = first + threadIdx.x;                                // this thread's key
    if (i < n_queries && j < n_keys) {
      /* place 2 */
      float sum = 0.0f;
      for (int t = 0; t < d; ++t) sum += q[i * d + t] * k_tile[threadIdx.x * d + t];
      s[i * n_keys + j] = scale * sum;
    }
    /* place 3 */
  }
  /* place 4 */
}
"""

# %% [markdown]
# <details><summary>Hint</summary>There are two things to wait for in each round of the loop: that the tile has arrived before anybody uses it, and that everybody has used
# it before anybody overwrites it. And a barrier inside an `if` waits for threads that never come.</details>

# %% tags=["exercise", "export"]
def barrier_places():
    """The places of SCORES_TILED that need a __syncthreads(), as a set of integers from 0 to 4."""
    ### BEGIN SOLUTION
    return {1, 3}
    ### END SOLUTION

# %%
barrier_places = check("1.9", barrier_places)

# %% [markdown]
# What the microscope says with no barrier at all:

# %%
def scores_tiled(places):
    source = SCORES_TILED
    for place in range(5):
        source = source.replace(f"/* place {place} */", "__syncthreads();" if place in places else "")
    return cuda.compile(LOAD_TILE + source, name="scores_tiled")

print(scores_tiled(set()).check[tiles(n), (16, 16), 4 * 16 * d](q, k, s, n, m, d, 1 / np.sqrt(d)).problems[0])

# %%
tiled_scores = scores_tiled(barrier_places()).check[tiles(n), (16, 16), 4 * 16 * d](q, k, s, n, m, d, 1 / np.sqrt(d))
print("problems:", len(tiled_scores.problems), " right to 1e-5:", np.allclose(s, q @ k.T / np.sqrt(d), atol=1e-5))
print(f"extra turns for bank conflicts: {tiled_scores.bank_conflicts:,}")

# %% [markdown]
# ### Bank conflicts
#
# Right, and yet something is slow. Shared memory has 32 **banks**; word $a$ lies in bank $a \bmod 32$, and each bank serves one word at a time. At step $t$ the
# sixteen keys of the tile are read at `threadIdx.x * d + t`. With $d = 32$ they all lie in the same bank and are served one after another.
#
# *Predict.* What happens if the rows of the tile are $d + 1$ apart instead of $d$?

# %%
def bank_of_key(stride, t=0):
    return (np.arange(16) * stride + t) % 32

for stride in (d, d + 1):
    print(f"rows {stride} apart: {len(set(bank_of_key(stride)))} different banks for 16 keys")

# %% [markdown]
# One unused float at the end of each row, and the conflict is gone. This is why tiles in real kernels have odd widths or swizzled addresses. The
# kernel below uses it.
#
# ### Attention without the matrix in the middle
#
# **Where do the scores go if they are never written out?** Into a tile of 16 × 16, used and overwritten. A softmax needs the row's maximum before its first exponential, so the kernel goes through K
# twice: once for the maximum, once more for weights and blend. Scores are computed twice and stored never.

# %% tags=["export"]
ATTENTION_TILED = r"""
#define PAD 1                                           // one unused float a row, against bank conflicts
__global__ void attention_tiled(const float* q, const float* k, const float* v, const unsigned char* mask, float* out,
                                int n_queries, int n_keys, int d, int d_v, int use_mask, int causal, float scale) {
  extern __shared__ float shared[];
  float* q_tile = shared;                               // TILE queries
  float* k_tile = q_tile + TILE * (d + PAD);            // TILE keys
  float* v_tile = k_tile + TILE * (d + PAD);            // TILE values
  float* o_tile = v_tile + TILE * (d_v + PAD);          // TILE rows of output, not yet divided
  float* p_tile = o_tile + TILE * (d_v + PAD);          // TILE x TILE weights, not yet divided: all that is ever stored
  int x = threadIdx.x, y = threadIdx.y;                 // key and query inside the tile
  size_t head = blockIdx.x;
  int first_query = blockIdx.y * TILE, i = first_query + y;
  q += head * n_queries * d;
  k += head * n_keys * d;
  v += head * n_keys * d_v;

  // load the queries
  load_tile(q_tile, d + PAD, q, first_query, n_queries, d);
  for (int c = x; c < d_v; c += TILE) o_tile[y * (d_v + PAD) + c] = 0.0f;

  float maximum = -INFINITY, total = 0.0f;
  for (int pass = 0; pass < 2; ++pass) {
    for (int first = 0; first < n_keys; first += TILE) {
      // load
      __syncthreads();                                  // the tiles of the last round have been used
      load_tile(k_tile, d + PAD, k, first, n_keys, d);
      if (pass == 1) load_tile(v_tile, d_v + PAD, v, first, n_keys, d_v);
      __syncthreads();                                  // the new tiles have arrived

      // score
      int j = first + x;
      bool allowed = i < n_queries && j < n_keys && (!causal || j <= i + n_keys - n_queries);
      if (allowed && use_mask) allowed = mask[(head * n_queries + i) * n_keys + j];
      float s = 0.0f;
      for (int t = 0; t < d; ++t) s += q_tile[y * (d + PAD) + t] * k_tile[x * (d + PAD) + t];
      s = allowed ? scale * s : -INFINITY;

      // first pass: the maximum of the row
      if (pass == 0) { maximum = fmaxf(maximum, s); continue; }

      // second pass: weights and blend
      float p = expf(s - maximum);
      total += p;
      p_tile[y * (TILE + PAD) + x] = p;
      __syncwarp();                                     // a row of the tile belongs to one warp
      for (int c = x; c < d_v; c += TILE)
        for (int r = 0; r < TILE; ++r)
          o_tile[y * (d_v + PAD) + c] += p_tile[y * (TILE + PAD) + r] * v_tile[r * (d_v + PAD) + c];
    }
    // the sixteen threads of a row combine what they found
    for (int o = TILE / 2; o > 0; o /= 2) {
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffff, maximum, o));
      total += __shfl_xor_sync(0xffffffff, total, o);
    }
    if (maximum == -INFINITY) maximum = 0.0f;           // nothing to attend: every weight is exp(-inf) = 0
  }

  // write
  if (i < n_queries)
    for (int c = x; c < d_v; c += TILE)
      out[(head * n_queries + i) * d_v + c] = total > 0.0f ? o_tile[y * (d_v + PAD) + c] / total : 0.0f;
}
"""

# %% [markdown]
# The function around it has the signature of the other two. It takes NumPy arrays or tensors of any size and shapes them for the kernel; with CUDA tensors it runs on the GPU.

# %% tags=["export"]
@functools.cache
def attention_kernel():
    """The tiled kernel, compiled on first use."""
    return cuda.compile(LOAD_TILE + ATTENTION_TILED, name="attention_tiled")


def attention_launch(q, k, v, mask, causal, scale):
    """Grid, block, shared bytes, arguments and output of the tiled kernel, for tensors (..., seq, d)."""
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    n_queries, n_keys, d, d_v = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    q, k, v = (t.detach().float().expand(*lead, *t.shape[-2:]).contiguous() for t in (q, k, v))
    allowed = torch.ones(1, dtype=torch.uint8, device=q.device) if mask is None else \
        torch.as_tensor(mask, device=q.device).expand(*lead, n_queries, n_keys).to(torch.uint8).contiguous()
    out = torch.zeros(*lead, n_queries, d_v, device=q.device)
    scale = 1 / math.sqrt(d) if scale is None else scale
    shared = 4 * 16 * (2 * (d + 1) + 2 * (d_v + 1) + 17)
    arguments = (q, k, v, allowed, out, n_queries, n_keys, d, d_v, int(mask is not None), int(causal), scale)
    return (max(1, math.prod(lead)), -(-n_queries // 16)), (16, 16), shared, arguments, out


def attention_cuda(q, k, v, mask=None, causal=False, scale=None):
    """Scaled dot-product attention by the tiled CUDA kernel; arguments, shapes and errors as attention_numpy.

    NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU. Computed in single precision, returned in
    the kind and type of q. Up to about 880 entries a head, where the tiles fill the shared memory of a block.
    """
    check_arguments(q, k, v, mask)
    tensors = [torch.as_tensor(a) for a in (q, k, v)]
    grid, block, shared, arguments, out = attention_launch(*tensors, mask, causal, scale)
    if out.numel() and k.shape[-2]:
        attention_kernel().fast[grid, block, shared](*arguments)
    out = out.to(tensors[0].dtype)
    return out if isinstance(q, torch.Tensor) else out.numpy()

# %%
grid, block, shared, arguments, out = attention_launch(*(torch.from_numpy(a) for a in (q, k, v)), None, False, None)
tiled = attention_kernel().check[grid, block, shared](*arguments)
print("problems:", len(tiled.problems), " agrees with NumPy to 1e-5:", np.allclose(out.numpy(), attention_numpy(q, k, v), atol=1e-5))
print(f"read    {tiled.global_loaded:9,} bytes, formula {4 * (n * d + tiles(n) * 3 * m * d):9,}")
print(f"written {tiled.global_stored:9,} bytes, formula {4 * n * d:9,}")

# %% [markdown]
# Q is read once. K is read twice and V once, for each tile of 16 queries. The scores appear nowhere.

# %%
traffic = {"three kernels": (sum(r.global_loaded + r.global_stored for r in naive), sum(r.distinct_loaded + r.distinct_stored for r in naive)),
           "tiled": (tiled.global_loaded + tiled.global_stored, tiled.distinct_loaded + tiled.distinct_stored)}
for name, (requested, distinct) in traffic.items():
    print(f"{name:13s} requested {requested:9,} bytes, distinct {distinct:7,} bytes")
print(f"requested: {traffic['three kernels'][0] / traffic['tiled'][0]:.0f} times fewer")

# %% [markdown]
# Two counts, and both are honest. **Requested** is what the threads ask for; **distinct** counts each byte once for each kernel, as if a perfect cache served every repetition. Real traffic lies between them.
# By either count the tiled kernel moves less, and only it keeps the $n \times m$ matrix out of memory.
#
# And the padding? The losing variant, for comparison:

# %%
unpadded = cuda.compile(LOAD_TILE + ATTENTION_TILED.replace("#define PAD 1", "#define PAD 0"), name="attention_tiled")
for name, report in (("rows d apart", unpadded.check[grid, block, shared](*arguments)), ("rows d + 1 apart", tiled)):
    print(f"{name:16s} {report.bank_conflicts:7,} extra turns for bank conflicts")

# %% [markdown]
# The kernel still reads K twice, only to know the maximum first. Is that needed? Lecture 06 finds a way around it, and that is FlashAttention.
#
# The last check: odd sizes, masks and all.

# %%
worst = 0.0
for shape_q, shape_k in (((3, 2, 19, 33), (3, 2, 45, 33)), ((1, 1, 7), (1, 70, 7)), ((50, 64), (20, 64))):
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in (shape_q, shape_k, shape_k))
    mask = rng.random((shape_q[-2], shape_k[-2])) < 0.7
    for causal in (False, True):
        worst = max(worst, np.abs(attention_cuda(q, k, v, mask, causal) - attention_numpy(q, k, v, mask, causal)).max())
print("six odd shapes agree to 1e-5:", worst < 1e-5)
