# ---
# jupyter:
#   course:
#     module: multi_head
#     public:
#     - multi_head_attention_numpy
#     - multi_head_attention_torch
#     - multi_head_attention_cuda
#     - split_heads
#     - merge_heads
#     - MultiHeadAttention
#     - TransformerConfig
#     - TransformerLM
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lecture 02 · Multi-head attention
#
# **Where we are.** Lecture 01 built attention: each query gets *one* blend of the values. **The question:** what if a
# token has to look at two things at once? **What you build:** attention in several heads, in NumPy, PyTorch and CUDA; a
# small language model around it, which later lectures train again and again; and the tools to look inside a head and to
# switch it off.
#
# | part | sections | minutes |
# |---|---|---|
# | 1 · The problem: one look is not enough | 2.1 | 15 |
# | 2 · The mechanism, in NumPy | 2.2 to 2.4, exercises 2.1 to 2.3 | 80 |
# | 3 · PyTorch: what heads learn | 2.5 to 2.7, exercises 2.4 to 2.6 | 120 |
# | 4 · CUDA: heads read in place | exercise 2.7 | 80 |
# | Traps | questions and answers | 25 |
# | Going further | short sections, in any order | as you like |
#
# From lecture 01 you need `attention_numpy`, masks (True = may attend) and what a row of weights is. Until your answer
# to an exercise passes its check, the lecture goes on with the finished version.

# %% [markdown] tags=["teacher"]
# **For the teacher: two hours of 50 minutes.**
#
# - *Hour 1.* 2.1: the three tasks, the prediction, the bars (8) · worked example on paper (8) · 2.2: shapes, the count
#   (7) · 2.3: one product or 3h, exercise 2.2 together (12) · 2.4: FLOPs and memory; "complexity grows with each head"
#   (10) · comparison with `nn.MultiheadAttention` (5).
# - *Hour 2.* 2.5: the jump, the two patterns, one layer cannot (18) · 2.6: sum over heads, one head off, a group off
#   (12) · cross-attention: the alignment (8) · 2.7 and the CUDA arithmetic (12).
# - *Before.* Cells tagged `slow` take up to half a minute: run the one of 2.1 before the prediction, that of 2.5 and
#   the translators at the start of hour 2.
# - *At home.* 2.1 and 2.3 after hour 1 (until then the finished versions stand in), 2.4 to 2.6 after hour 2; CUDA for
#   volunteers.
# - *Questions that come.* Why does a layer with one head not simply look at both? It does; the values come back mixed
#   (2.1). Are heads with clear names the rule? In this model yes, in MiniLM few have any (Going further).

# %%
import os
import sys

sys.path.insert(0, "." if os.path.exists("course.py") else "..")  # the course's own modules

import matplotlib.pyplot as plt
import numpy as np
import torch

from utils import data, plotting, training
from utils.check import check

torch.set_num_threads(1)                          # tiny models: one thread is fastest, and the same everywhere
rng = np.random.default_rng(0)

# %%
import math
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attention.fundamentals import attention_numpy, attention_torch, attention_weights, causal_mask
from utils import cuda
from utils.data import Vocabulary

# %% [markdown]
# ## Part 1 · The problem: one look is not enough

# %% [markdown]
# ### 2.1 Why one head is not enough
#
# **What can one blend not say?** A head returns *one* weighted average for each query. Eight keys, each with a number
# as its value. The question names two of them, first $a$, then $b$, and wants one of three answers:
#
# $$ v_a \qquad\qquad v_a + v_b \qquad\qquad v_a - v_b $$
#
# *Predict.* Which of the three can one head learn in 400 steps? Which can two heads?

# %%
from attention.multi_head import MultiHeadAttention

class TwoLookups(nn.Module):
    """Eight keys with values, a question about two of them, a number as the answer: attention and a linear layer."""

    def __init__(self, n_heads, d_model=32, n_keys=8):
        super().__init__()
        self.key, self.first, self.second = (nn.Embedding(n_keys, d_model) for _ in range(3))
        self.value = nn.Parameter(torch.randn(1, d_model))              # the direction in which a value is written
        self.attention = MultiHeadAttention(d_model, n_heads)
        self.answer = nn.Linear(d_model, 1)

    def forward(self, keys, values, a, b):
        memory = self.key(keys) + values[..., None] @ self.value        # (batch, 8, d_model)
        question = (self.first(a) + self.second(b))[:, None]            # (batch, 1, d_model)
        return self.answer(self.attention(question, memory))[:, 0, 0]

print("parameters:", {heads: sum(p.numel() for p in TwoLookups(heads).parameters()) for heads in (1, 2)})

# %% [markdown]
# One head of 32 numbers or two heads of 16: they have equally many parameters and cost equally many FLOPs.
# `MultiHeadAttention` is borrowed from part 3.

# %%
def lookups(rng, batch=128, n_keys=8):
    """Keys in random order, their values, the two keys asked for, and the values of these two."""
    keys = rng.permuted(np.tile(np.arange(n_keys), (batch, 1)), axis=1)
    values = rng.standard_normal((batch, n_keys))
    places = rng.permuted(np.tile(np.arange(n_keys), (batch, 1)), axis=1)[:, :2]
    asked, found = (np.take_along_axis(x, places, axis=1) for x in (keys, values))
    return [torch.from_numpy(x) for x in (keys, values, asked[:, 0], asked[:, 1], found[:, 0], found[:, 1])]

tasks = {"$v_a$": lambda a, b: a, "$v_a+v_b$": lambda a, b: a + b, "$v_a-v_b$": lambda a, b: a - b}
exam = lookups(np.random.default_rng(99), batch=2000)

def explained(task, n_heads, seed):
    """Train one model; the share of the variance of the answer that it explains (1 is perfect, 0 is a constant)."""
    rng = np.random.default_rng(seed)
    model = training.initialise(TwoLookups(n_heads).double(), seed)
    loss = lambda model, batch: F.mse_loss(model(*batch[:4]), task(*batch[4:]))
    training.fit(model, (lookups(rng) for _ in range(400)), loss, steps=400, lr=1e-2)
    with torch.no_grad():
        return 1 - (loss(model, exam) / task(*exam[4:]).var()).item()

# %% tags=["slow"]
shares = {(name, heads): [explained(task, heads, seed) for seed in range(3)]
          for name, task in tasks.items() for heads in (1, 2)}

# %%
plotting.bars({f"{name}, {heads}\N{NO-BREAK SPACE}head{'s' * (heads > 1)}": v for (name, heads), v in shares.items()},
              ylabel="share of the variance explained",
              title="One head can add two values, but not subtract them")
plotting.show("Six bars with three seeds each: all near 1, except one head on the difference, near one half.")
one, two = shares["$v_a-v_b$", 1], shares["$v_a-v_b$", 2]
print("difference: one head below 0.75 for each seed: ", max(one) < 0.75)
print("            two heads above 0.85 for each seed:", min(two) > 0.85)
print("sum: one head above 0.9 for each seed:         ", min(shares["$v_a+v_b$", 1]) > 0.9)

# %% [markdown]
# One head does look at both keys. But its weights are positive and what comes back is mixed: $p_a v_a + p_b v_b$. From
# that a sum can be read off, a difference cannot: both values count in the same direction. As long as the weights do
# not depend on the values, the best is to look at one of the two, and that explains half. (Here the keys carry the
# values too. Longer training can use that, and gains a little.) Two heads bring two blends, and the last layer
# subtracts.
#
# Vaswani et al. (2017, section 3.2.2) put it like this: heads let a model "jointly attend to information from different
# representation subspaces at different positions. With a single attention head, averaging inhibits this." It is not
# looking at two places that is inhibited. It is telling apart what was found there.

# %% [markdown]
# ## Part 2 · The mechanism, in NumPy

# %% [markdown]
# ### 2.2 Parameter matrices
#
# **What belongs to one head?** Three matrices of its own, and a slice of a fourth.
#
# $$ \text{head}_i = \text{attention}(X_q W^Q_i,\; X_{kv} W^K_i,\; X_{kv} W^V_i) \qquad
#    \text{out} = [\text{head}_1 ; \ldots ; \text{head}_h]\, W^O $$
#
# | array | shape | meaning |
# |---|---|---|
# | $X_q$ | `(n_queries, d_model)` | the tokens that ask |
# | $X_{kv}$ | `(n_keys, d_model)` | the tokens that answer; in self-attention the same |
# | $W^Q_i$, $W^K_i$ | `(d_model, d_head)` | what head $i$ asks for, and what it can be found by |
# | $W^V_i$ | `(d_model, d_v)` | what it hands over; usually `d_v = d_head` |
# | $W^O$ | `(h * d_v, d_model)` | mixes what the heads found |
#
# As a loop over the heads, each with small matrices of its own:

# %%
n_heads, n_queries, n_keys, d_model, d_head = 4, 5, 7, 16, 4
x_q, x_kv = rng.standard_normal((n_queries, d_model)), rng.standard_normal((n_keys, d_model))
heads_q, heads_k, heads_v = rng.standard_normal((3, n_heads, d_model, d_head)) / np.sqrt(d_model)
w_o = rng.standard_normal((n_heads * d_head, d_model)) / np.sqrt(d_model)

found = [attention_numpy(x_q @ heads_q[i], x_kv @ heads_k[i], x_kv @ heads_v[i]) for i in range(n_heads)]
out_loop = np.concatenate(found, axis=-1) @ w_o
print("each head:", found[0].shape, "  side by side:", np.concatenate(found, axis=-1).shape, "  out:", out_loop.shape)
print("query 1: ", np.round(out_loop[1, :5], 4))

# %% [markdown]
# How many parameters is that? With $d_\text{head} = d_\text{model} / h$, the four matrices hold $4\, d_\text{model}^2$
# numbers, whatever $h$ is. PyTorch's layer has as many. It stores them differently: its three input matrices are
# stacked in one, `in_proj_weight`, and each is transposed, because torch computes `x @ w.T`.

# %%
torch_layer = nn.MultiheadAttention(d_model, n_heads, bias=False, batch_first=True, dtype=torch.float64)
for name, parameter in torch_layer.named_parameters():
    print(f"{name:16s} {tuple(parameter.shape)}")
ours = heads_q.size + heads_k.size + heads_v.size + w_o.size
print("ours:", ours, " torch:", sum(p.numel() for p in torch_layer.parameters()), " 4 d_model²:", 4 * d_model**2)

# %% [markdown]
# #### Exercise 2.1: weights from another house  (difficulty 2 of 5, 8 minutes)
#
# Take the four matrices out of PyTorch's layer, in the convention of this course: `(d_in, d_out)`, used as `x @ w`.
# Then both can be fed the same numbers.
#
# | argument | shape | meaning |
# |---|---|---|
# | `in_proj_weight` | `(3 * d_model, d_model)` | array or tensor; matrices of queries, keys, values, `(d_out, d_in)` |
# | `out_proj_weight` | `(d_model, d_model)` | array or tensor; the last matrix, `(d_out, d_in)` |
#
# Returns `(w_q, w_k, w_v, w_o)`, each `(d_model, d_model)`: arrays of arrays, tensors of tensors.
#
# <details><summary>Hint</summary>
#
# Cut first, along the first axis, into three equal parts; then transpose each part. Slices and `.T` work on arrays and
# on tensors.
#
# </details>

# %% tags=["exercise", "export"]
def weights_from_torch(in_proj_weight, out_proj_weight):
    """The matrices of an nn.MultiheadAttention as this course keeps them: (d_in, d_out), used as x @ w.

    in_proj_weight (3 * d_model, d_model), out_proj_weight (d_model, d_model), arrays or tensors.
    Returns (w_q, w_k, w_v, w_o), each (d_model, d_model). ValueError for other shapes.
    """
    d_model = in_proj_weight.shape[-1]
    if tuple(in_proj_weight.shape) != (3 * d_model, d_model) or tuple(out_proj_weight.shape) != (d_model, d_model):
        raise ValueError("in_proj_weight and out_proj_weight must have shapes (3 * d_model, d_model) and "
                         f"(d_model, d_model), got {tuple(in_proj_weight.shape)} and {tuple(out_proj_weight.shape)}")
    ### BEGIN SOLUTION
    w_q, w_k, w_v = (in_proj_weight[i * d_model:(i + 1) * d_model].T for i in range(3))
    return w_q, w_k, w_v, out_proj_weight.T
    ### END SOLUTION

# %%
weights_from_torch = check("2.1", weights_from_torch)

# %% [markdown]
# ### A worked example
#
# **Can you do it with a pencil?** Three tokens of two numbers, two heads of one number each, and $W^Q = W^K = W^V =
# I$: head 0 sees the first number of each token, head 1 the second. With $d_\text{head} = 1$ nothing is scaled. Do the
# first row on paper.

# %%
x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
w_last = np.array([[1.0, 1.0], [1.0, -1.0]])

head_0 = attention_numpy(x[:, :1], x[:, :1], x[:, :1])
head_1 = attention_numpy(x[:, 1:], x[:, 1:], x[:, 1:])
side_by_side = np.concatenate([head_0, head_1], axis=-1)
print(np.round(side_by_side, 3))
print(np.round(side_by_side @ w_last, 3))

# %% [markdown]
# Row 0, head 0: the query is 1, the keys are 1, 0, 1, so the weights are $e, 1, e$ over $2e + 1$; the values are the
# keys: $2e/(2e+1) = 0.845$. Head 1: the query is 0, so all scores are 0 and all weights a third; the values are 0, 1
# and 1: $0.667$. The last matrix adds them and subtracts them: 1.511 and 0.178. The difference is what section 2.1 was
# about.

# %%
assert np.allclose(side_by_side[0], [2 * np.e / (2 * np.e + 1), 2 / 3])
assert np.allclose((side_by_side @ w_last)[0], [1.511, 0.178], atol=1e-3)

# %% [markdown]
# ### 2.3 Linear projections in detail
#
# **Twelve small products, or one?** With four heads there are $3h = 12$ matrices in front. They all multiply $X$, so
# they may stand side by side in one matrix $[W^Q \; W^K \; W^V]$ of shape `(d_model, 3 * d_model)`. The product is then
# cut by columns.

# %%
x = x_kv                                                              # self-attention: one X for all three
separate = [x @ w[i] for w in (heads_q, heads_k, heads_v) for i in range(n_heads)]       # 12 products

w_qkv = np.concatenate([w[i] for w in (heads_q, heads_k, heads_v) for i in range(n_heads)], axis=1)
fused = x @ w_qkv                                                     # one product, (7, 48)
same = np.allclose(fused, np.concatenate(separate, axis=1), atol=1e-12)
print("fused", fused.shape, " equal to the twelve to 1e-12:", same)

# %% [markdown]
# A column of a product depends on one column of the matrix only. So the twelve were never separate things. In
# particular, the four $W^Q_i$ side by side are **one** matrix $W^Q$ of shape `(d_model, d_model)`, and head $i$ owns
# the columns $i\, d_\text{head}$ to $(i + 1)\, d_\text{head}$.
#
# It follows that a head is not a slice of the token. Every head's query is computed from *all* `d_model` numbers; only
# the result is cut.

# %%
w_q, w_k, w_v = (np.concatenate(list(w), axis=1) for w in (heads_q, heads_k, heads_v))
cut = (x @ w_q)[:, 2 * d_head:3 * d_head]
print("columns 8 to 11 are head 2's queries:", np.allclose(cut, x @ heads_q[2]))
changed = x.copy()
changed[:, 0] += 1.0                                                  # one number of each token
noticed = [i for i in range(4) if not np.allclose(x @ heads_q[i], changed @ heads_q[i])]
print("heads that notice a change of number 0:", noticed)

# %% [markdown]
# #### Exercise 2.2: split the heads  (difficulty 2 of 5, 8 minutes)
#
# After the big product, attention wants the heads as an axis of their own, *in front* of the sequence, so that one call
# works on all of them.
#
# | argument | shape | meaning |
# |---|---|---|
# | `x` | `(..., seq, n_heads * d_head)` | array or tensor; one row for each token, the heads side by side |
# | `n_heads` | int | into how many the last axis is cut |
#
# Returns `(..., n_heads, seq, d_head)`, an array or a tensor as `x` is: head $i$ has the columns $i\, d_\text{head}$ to
# $(i + 1)\, d_\text{head}$.
#
# <details><summary>Hint</summary>
#
# `x.reshape` may cut the last axis in two, without moving a number: `(..., seq, n_heads, d_head)`. Then `swapaxes`
# swaps two axes. Reshaping straight to the final shape would cut at other places.
#
# </details>

# %% tags=["exercise", "export"]
def split_heads(x, n_heads):
    """Cut the last axis into heads: (..., seq, n_heads * d_head) -> (..., n_heads, seq, d_head). Arrays and tensors.

    Head i gets the columns i * d_head to (i + 1) * d_head. ValueError when n_heads does not divide the last axis.
    """
    if n_heads < 1 or x.shape[-1] % n_heads:
        raise ValueError(f"n_heads must divide the last axis of x, got {n_heads} heads and {x.shape[-1]} columns")
    ### BEGIN SOLUTION
    return x.reshape(*x.shape[:-1], n_heads, x.shape[-1] // n_heads).swapaxes(-3, -2)
    ### END SOLUTION

# %%
split_heads = check("2.2", split_heads)

# %% [markdown]
# Its inverse, given:

# %% tags=["export"]
def merge_heads(x):
    """The inverse of split_heads: (..., n_heads, seq, d_head) -> (..., seq, n_heads * d_head). Arrays and tensors."""
    x = x.swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])

# %%
heads = split_heads(x @ w_q, n_heads)
print("head 2 is x W_2:", np.allclose(heads[2], x @ heads_q[2]))
print("merged again:   ", np.array_equal(merge_heads(heads), x @ w_q))

# %% [markdown]
# What does the swap cost? Nothing yet: NumPy only changes its strides. The copy comes when somebody needs the numbers
# in the new order, as `reshape` does in `merge_heads`. Part 4 counts the bytes of such copies, and avoids them.
#
# #### Exercise 2.3: all heads at once  (difficulty 3 of 5, 15 minutes)
#
# Put it together: project, split, attend in all heads with *one* call of `attention_numpy`, merge, project.
#
# | argument | shape | meaning |
# |---|---|---|
# | `x_q`, `x_kv` | `(..., n_queries, d_model)`, `(..., n_keys, d_model)` | who asks, who answers |
# | `w_q`, `w_k` | `(d_model, h * d_head)` | used as `x @ w` |
# | `w_v`, `w_o` | `(d_model, h * d_v)`, `(h * d_v, d_model)` | values in, everything out |
# | `n_heads` | int | $h$ |
# | `mask` | booleans, broadcastable to `(..., n_heads, n_queries, n_keys)` | True = may attend |
# | `causal` | bool | also forbid the future |
#
# Returns `(..., n_queries, d_model)`.
#
# <details><summary>Hint</summary>
#
# Which of the two inputs makes the queries, which the keys and the values? `attention_numpy` takes care of the axes in
# front, the scale and both masks.
#
# </details>

# %% tags=["export"]
def check_projections(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads):
    """Raise ValueError, in one sentence, unless inputs, matrices and number of heads fit. For arrays and tensors."""
    cuda.check_numbers(x_q=x_q, x_kv=x_kv, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o)
    for name, x in (("x_q", x_q), ("x_kv", x_kv)):
        if len(x.shape) < 2:
            raise ValueError(f"{name} must have at least two axes (seq, d_model), got shape {tuple(x.shape)}")
    try:
        np.broadcast_shapes(tuple(x_q.shape[:-2]), tuple(x_kv.shape[:-2]))
    except ValueError:
        raise ValueError("the leading axes of x_q and x_kv must broadcast, got shapes "
                         f"{tuple(x_q.shape)} and {tuple(x_kv.shape)}") from None
    d_in = {"w_q": x_q.shape[-1], "w_k": x_kv.shape[-1], "w_v": x_kv.shape[-1], "w_o": w_v.shape[-1]}
    for name, w in (("w_q", w_q), ("w_k", w_k), ("w_v", w_v), ("w_o", w_o)):
        if len(w.shape) != 2 or w.shape[0] != d_in[name]:
            raise ValueError(f"{name} must have shape ({d_in[name]}, columns), got {tuple(w.shape)}")
    if w_q.shape[1] != w_k.shape[1]:
        raise ValueError(f"w_q and w_k must give the same d_head, got {w_q.shape[1]} and {w_k.shape[1]} columns")
    if n_heads < 1 or w_q.shape[1] % n_heads or w_v.shape[1] % n_heads:
        raise ValueError(f"n_heads must divide the columns of w_q and w_v, got {n_heads} heads, "
                         f"{w_q.shape[1]} and {w_v.shape[1]} columns")

# %% tags=["exercise", "export"]
def multi_head_attention_numpy(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    """Multi-head attention in NumPy: project, attend in each head, concatenate, project.

    x_q (..., n_queries, d_model), x_kv (..., n_keys, d_model); w_q, w_k (d_model, n_heads * d_head),
    w_v (d_model, n_heads * d_v), w_o (n_heads * d_v, d_model); mask boolean, True = may attend, broadcastable to
    (..., n_heads, n_queries, n_keys). Returns (..., n_queries, d_model). Raises ValueError when shapes do not fit.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.2.
    """
    check_projections(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads)
    ### BEGIN SOLUTION
    cuda.check_kind(np.ndarray, x_q=x_q, x_kv=x_kv, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o)
    given, work = x_q, cuda.work_type(x_q)                  # never in integers or in half
    x_q, x_kv, w_q, w_k, w_v, w_o = (a.astype(work, copy=False) for a in (x_q, x_kv, w_q, w_k, w_v, w_o))
    q, k, v = (split_heads(x @ w, n_heads) for x, w in ((x_q, w_q), (x_kv, w_k), (x_kv, w_v)))
    return cuda.like(merge_heads(attention_numpy(q, k, v, mask, causal)) @ w_o, given)
    ### END SOLUTION

# %%
multi_head_attention_numpy = check("2.3", multi_head_attention_numpy)

# %% [markdown]
# The number of section 2.2 has not changed, and with PyTorch's own weights it is PyTorch's number.

# %%
out = multi_head_attention_numpy(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads)
print("query 1:", np.round(out[1, :5], 4), "  equals the loop:", np.allclose(out, out_loop))

theirs = weights_from_torch(*(p.detach().numpy() for p in (torch_layer.in_proj_weight, torch_layer.out_proj.weight)))
a, b = torch.from_numpy(x_q)[None], torch.from_numpy(x_kv)[None]
expected = torch_layer(a, b, b, need_weights=False)[0][0].detach().numpy()
out = multi_head_attention_numpy(x_q, x_kv, *theirs, n_heads)
print("equals nn.MultiheadAttention to 1e-12:", np.allclose(out, expected, atol=1e-12))

# %% [markdown]
# ### 2.4 Head dimension calculations
#
# **Do more heads cost more?** With $d_\text{head} = d_\text{model} / h$, the four projections cost $8\, n\,
# d_\text{model}^2$ FLOPs and the two products of attention $4\, n^2 d_\text{head}$ in each of $h$ heads.
#
# *Predict.* From 1 head to 16: what happens to the FLOPs, and what to the memory of the scores? We measure both: torch
# counts the FLOPs of the products, NumPy's allocations are traced.

# %%
import tracemalloc
from torch.utils.flop_counter import FlopCounterMode

def measured_flops(n_heads, x, matrices):
    with FlopCounterMode(display=False) as counter:
        q, k, v = (split_heads(x @ w, n_heads) for w in matrices[:3])
        merge_heads(torch.softmax(q @ k.mT / q.shape[-1]**0.5, dim=-1) @ v) @ matrices[3]
        return counter.get_total_flops()

def measured_peak(n_heads, x, matrices):
    tracemalloc.start()
    multi_head_attention_numpy(x, x, *matrices, n_heads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak

# %%
n, d_model = 256, 64
x = rng.standard_normal((n, d_model))
matrices = rng.standard_normal((4, d_model, d_model)) / np.sqrt(d_model)
x_torch, matrices_torch = torch.from_numpy(x), torch.from_numpy(matrices)
print("heads  d_head        FLOPs   peak memory, MB   scores and weights alone, MB")
for h in (1, 2, 4, 8, 16):
    flops, peak = measured_flops(h, x_torch, matrices_torch), measured_peak(h, x, matrices)
    assert flops == 8 * n * d_model**2 + 4 * n * n * d_model
    print(f"{h:5d} {d_model // h:7d} {flops:12,d} {peak / 1e6:17.0f} {2 * h * n * n * 8 / 1e6:18.0f}")

# %% [markdown]
# The FLOPs do not move: $h$ heads of $1/h$ the size. The memory does: each head has an $n \times n$ matrix of its own,
# so the scores need $h\, n^2$ numbers, if they are written out at all (lecture 06 does not write them). The peak is
# three such arrays: softmax holds one more while it works.
#
# #### What is the price of many heads, then?
#
# The scores of a head are $Q_i K_i^\top$, an $n \times n$ matrix of rank at most $d_\text{head}$.

# %%
for h in (1, 4, 16, 64):
    q, k = (split_heads(x @ w, h) for w in matrices[:2])
    ranks = np.linalg.matrix_rank(q @ k.swapaxes(-1, -2))
    print(f"h = {h:2d}: the {n} x {n} scores of a head have rank {ranks.max()}")

# %% [markdown]
# With 64 heads of size 1, a token is found by a single number. Many heads look at many things, each with poor eyes.
# Bhojanapalli et al. (2020, arXiv 2002.07028) call this the low-rank bottleneck and propose to make $d_\text{head}$ as
# large as the input is long, whatever $h$ is. Nothing forbids it: the function above takes any number of columns that
# $h$ divides.

# %%
wide_q, wide_k, wide_v = rng.standard_normal((3, d_model, 16 * 24)) / np.sqrt(d_model)      # 16 heads of 24, not of 4
wide_o = rng.standard_normal((16 * 24, d_model)) / np.sqrt(16 * 24)
print("16 heads of 24:", multi_head_attention_numpy(x, x, wide_q, wide_k, wide_v, wide_o, 16).shape)

# %% [markdown]
# ## Part 3 · PyTorch: what heads learn

# %% [markdown]
# ### From arrays to a module
#
# **What changes in PyTorch?** The function hardly does. What has to be shown is that the gradients are right too.

# %% tags=["export"]
def multi_head_attention_torch(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    """Multi-head attention in PyTorch; arguments, shapes and errors as multi_head_attention_numpy, differentiable.

    Half precision is computed in single.
    """
    check_projections(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads)
    cuda.check_kind(torch.Tensor, x_q=x_q, x_kv=x_kv, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o)
    given, work = x_q, cuda.work_type(x_q)
    x_q, x_kv, w_q, w_k, w_v, w_o = (t.to(work) for t in (x_q, x_kv, w_q, w_k, w_v, w_o))
    q, k, v = split_heads(x_q @ w_q, n_heads), split_heads(x_kv @ w_k, n_heads), split_heads(x_kv @ w_v, n_heads)
    return cuda.like(merge_heads(attention_torch(q, k, v, mask, causal)) @ w_o, given)

# %%
theirs = torch_layer.in_proj_weight, torch_layer.out_proj.weight
ours = [w.detach().clone().requires_grad_() for w in weights_from_torch(*theirs)]
out = multi_head_attention_torch(a, b, *ours, 4)
expected = torch_layer(a, b, b, need_weights=False)[0]
print("outputs agree to 1e-12:  ", torch.allclose(out, expected, atol=1e-12))

d_out = torch.from_numpy(rng.standard_normal(out.shape))
grads = torch.autograd.grad(out, ours, d_out)
d_theirs = torch.autograd.grad(expected, theirs, d_out)
same = [torch.allclose(g, t, atol=1e-12) for g, t in zip(grads, weights_from_torch(*d_theirs))]
print("gradients agree to 1e-12:", all(same))

# %% [markdown]
# Now as a module, the one that later lectures build on. Three things are new. It can be told *positions* (the next
# section). It can be handed a *cache* (lecture 05). And two of its steps, `weights` and `outputs`, are modules of their
# own that do nothing: places where a hook can look in, or put something else.

# %% tags=["export"]
class Positions(nn.Module):
    """How a model knows the order of its tokens. This one knows nothing; a scheme overrides one of its methods."""

    def embed(self, x, positions):
        """Add positions to embeddings. x (batch, seq, d_model), positions integers (seq,) or (batch, seq)."""
        return x

    def rotate(self, x, positions):
        """Turn queries or keys by their positions. x (batch, n_heads, seq, d_head), positions as in embed."""
        return x

    def bias(self, n_queries, n_keys):
        """Numbers to add to the scores: (n_heads, n_queries, n_keys), aligned at the bottom right, or None."""
        return None

# %% tags=["export"]
def masked_softmax(scores, mask=None, causal=False):
    """Weights from scores (batch, n_heads, n_queries, n_keys); a row with nothing to attend to is zero, gradient too.

    mask boolean, True = may attend, broadcastable to the scores, on their device. ValueError for another mask.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean with True = may attend, got {mask.dtype}")
    if mask is not None:
        try:
            fits = torch.broadcast_shapes(mask.shape, scores.shape) == scores.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"mask must broadcast to {tuple(scores.shape)}, got shape {tuple(mask.shape)}")
    if causal:
        allowed = torch.from_numpy(causal_mask(*scores.shape[-2:])).to(scores.device)
        mask = allowed if mask is None else allowed & mask
    if mask is None:
        return torch.softmax(scores, dim=-1)
    nothing = ~mask.any(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(~mask & ~nothing, -math.inf), dim=-1).masked_fill(nothing, 0.0)

# %% tags=["export"]
class MultiHeadAttention(nn.Module):
    """Multi-head attention, self or cross, with places to look at and to change what a head does.

    A hook on `weights` sees the attention weights (batch, n_heads, n_queries, n_keys); one on `outputs` sees what the
    heads found, (batch, n_heads, n_queries, d_head), before they are merged. What a hook returns takes their place.
    """

    def __init__(self, d_model, n_heads, positions=None):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model, got {n_heads} and {d_model}")
        self.n_heads = n_heads
        self.positions = Positions() if positions is None else positions
        self.w_q, self.w_k, self.w_v, self.w_o = (nn.Parameter(torch.randn(d_model, d_model) * d_model**-0.5)
                                                  for _ in range(4))
        self.weights, self.outputs = nn.Identity(), nn.Identity()

    def forward(self, x, x_kv=None, mask=None, causal=False, positions=None, cache=None):
        """x (batch, n_queries, d_model) asks; x_kv (batch, n_keys, d_model) answers, by default x itself.

        mask boolean, broadcastable to (batch, n_heads, n_queries, n_keys). positions: integers (n_queries,) or
        (batch, n_queries), by default 0, 1, ...; they rotate queries and keys in self-attention only.
        cache: update(k, v) stores keys and values and returns all that may be attended to. Returns the shape of x.
        """
        for name, tokens in (("x", x), ("x_kv", x if x_kv is None else x_kv)):
            if tokens.dim() != 3 or tokens.shape[-1] != len(self.w_q):
                raise ValueError(f"{name} must have shape (batch, seq, {len(self.w_q)}), got {tuple(tokens.shape)}")
        q = split_heads(x @ self.w_q, self.n_heads)
        k, v = (split_heads((x if x_kv is None else x_kv) @ w, self.n_heads) for w in (self.w_k, self.w_v))
        if x_kv is None:
            positions = torch.arange(x.shape[1], device=x.device) if positions is None else positions
            q, k = self.positions.rotate(q, positions), self.positions.rotate(k, positions)
        if cache is not None:
            k, v = cache.update(k, v)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        bias = self.positions.bias(*scores.shape[-2:]) if x_kv is None else None
        if bias is not None:
            scores = scores + bias
        weights = self.weights(masked_softmax(scores, mask, causal))
        return merge_heads(self.outputs(cuda.weighted_sum(weights, v))) @ self.w_o

# %%
module = MultiHeadAttention(16, 4).double()
for parameter, value in zip((module.w_q, module.w_k, module.w_v, module.w_o), ours):
    parameter.data.copy_(value.data)
print("cross:       ", torch.allclose(module(a, b), out, atol=1e-12))
causal = multi_head_attention_torch(b, b, *ours, 4, causal=True)
print("self, causal:", torch.allclose(module(b, causal=True), causal, atol=1e-12))
nowhere = torch.zeros(1, 1, 5, 7, dtype=torch.bool)
gradient = torch.autograd.grad(module(a, b, mask=nowhere).sum(), module.w_k, allow_unused=True)[0]
print("nothing to attend to: output 0 and gradient 0:", (module(a, b, mask=nowhere) == 0).all().item(),
      (gradient == 0).all().item())

# %% [markdown]
# ### A small language model
#
# **What does it take to train attention on something?** Embeddings below, a prediction above, and the order of the
# tokens, which attention alone does not know (lecture 03).
#
# A position can enter in three places: added to the embeddings, as a rotation of queries and keys, or added to the
# scores. `Positions` has a method for each. Lecture 03 compares the schemes; today one is enough: a learned number for
# each head and each distance, added to the scores. (Source of the idea: Raffel et al. 2019, arXiv 1910.10683, T5.)

# %% tags=["export"]
class DistanceBias(Positions):
    """A learned number for each head and distance is added to the scores; beyond `reach` all distances share one.

    The factor 4 lets the numbers grow four times as far in as many steps.
    """

    def __init__(self, n_heads, reach=7):
        super().__init__()
        self.reach = reach
        self.table = nn.Parameter(torch.zeros(n_heads, 2 * reach + 1))

    def bias(self, n_queries, n_keys):
        queries = torch.arange(n_keys - n_queries, n_keys, device=self.table.device)
        distance = queries[:, None] - torch.arange(n_keys, device=self.table.device)
        return 4 * self.table[:, distance.clip(-self.reach, self.reach) + self.reach]

# %% [markdown]
# A layer is attention and a small network for each token alone (the *feed-forward* layer), each preceded by a norm, and
# each *added* to what came in. (A *norm* brings each token's vector to mean 0 and variance 1, then scales it.) That sum
# is called the **residual stream**: layers read from it and write to it.

# %% tags=["export"]
@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a TransformerLM. d_ff = 0 leaves the feed-forward layers out (an attention-only model)."""

    vocab_size: int
    d_model: int = 64
    n_heads: int = 4
    n_layers: int = 2
    d_ff: int = 256

    @property
    def d_head(self):
        return self.d_model // self.n_heads

def feed_forward(d_model, d_ff):
    """Two linear layers without biases and a GELU between them, for each token alone: (..., d_model) to the same."""
    return nn.Sequential(nn.Linear(d_model, d_ff, bias=False), nn.GELU(), nn.Linear(d_ff, d_model, bias=False))

class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x)) if there is one."""

    def __init__(self, config, attention, norm):
        super().__init__()
        self.norm_1, self.attention = norm(config.d_model), attention
        if config.d_ff:
            self.norm_2, self.feed_forward = norm(config.d_model), feed_forward(config.d_model, config.d_ff)

    def forward(self, x, **where):
        x = x + self.attention(self.norm_1(x), causal=True, **where)
        return x + self.feed_forward(self.norm_2(x)) if hasattr(self, "feed_forward") else x

# %% [markdown]
# The model. Attention, positions and norm are handed in, so that later lectures can exchange them.

# %% tags=["export"]
def check_ids(name, ids, vocab_size):
    """Raise ValueError, in one sentence, unless ids are int32 or int64 (batch, seq) from 0 to vocab_size - 1."""
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be integers (batch, seq), int32 or int64, "
                         f"got {ids.dtype} of shape {tuple(ids.shape)}")
    if ids.numel() and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"{name} must lie in 0 ... {vocab_size - 1}, got {ids.min()} to {ids.max()}")

def standard_attention(config, layer, positions):
    """The attention of layer number `layer` (from 0) of a TransformerLM."""
    return MultiHeadAttention(config.d_model, config.n_heads, positions)

class TransformerLM(nn.Module):
    """A small decoder-only language model. ids (batch, seq) -> logits (batch, seq, vocab_size).

    config: a TransformerConfig. Three parts can be exchanged:
    attention(config, layer, positions): a module called as MultiHeadAttention is, one for each layer;
    positions: a Positions, shared by all layers; norm(d_model): a module, such as nn.LayerNorm or nn.RMSNorm.
    """

    def __init__(self, config, attention=standard_attention, positions=None, norm=nn.LayerNorm):
        super().__init__()
        self.config = config
        self.positions = Positions() if positions is None else positions
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, attention(config, layer, self.positions), norm)
                                    for layer in range(config.n_layers))
        self.norm = norm(config.d_model)
        self.unembedding = nn.Linear(config.d_model, config.vocab_size, bias=False)     # to one score for each word

    def forward(self, ids, mask=None, positions=None, caches=None):
        """mask boolean, True = may attend, beside the causal one, broadcastable to (batch, n_heads, seq, n_keys).

        positions: integers (seq,) or (batch, seq), by default 0, 1, ... after what the caches hold.
        caches: one for each layer, with `length`, the tokens seen so far, and update(k, v); see lecture 05.
        ValueError where ids are not integers (batch, seq) below vocab_size.
        """
        check_ids("ids", ids, self.config.vocab_size)
        if positions is None:
            start = caches[0].length if caches else 0
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.positions.embed(self.embedding(ids), positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask=mask, positions=positions, cache=caches[layer] if caches else None)
        return self.unembedding(self.norm(x))

# %%
def count(module):
    return sum(p.numel() for p in module.parameters())

model = training.initialise(TransformerLM(TransformerConfig(vocab_size=32), positions=DistanceBias(4)).double(), seed=0)
for name, part in model.named_children():
    print(f"{name:12s} {count(part):7,d}")

# %% [markdown]
# Does it see the future? Another token at position 5 may change the predictions from there on, and no earlier one.

# %%
ids = torch.from_numpy(rng.integers(32, size=(1, 10)))
other = ids.clone()
other[0, 5] = (other[0, 5] + 1) % 32
with torch.no_grad():
    moved = (model(ids) != model(other)).any(-1)[0]
print("predictions that changed:", torch.nonzero(moved).flatten().tolist())

# %% [markdown]
# ### Looking inside: every activation in a dictionary
#
# **How does one see what a head does?** With forward hooks: functions that PyTorch calls with the output of a module
# (lecture 01, Going further). Libraries such as TransformerLens give every step of a model a name and keep what passed
# through it. That takes about twenty lines, and twenty more to change it.

# %% tags=["export"]
@contextmanager
def record(model, names=("weights", "outputs")):
    """During the block, keep what leaves the modules of these last names: {"blocks.0.attention.weights": tensor}.

    Hooks run in the order in which they came: enter it after without_heads to see what is left.
    """
    cache, handles = {}, []
    for path, module in model.named_modules():
        if path.split(".")[-1] in names:
            def keep(_module, _inputs, output, path=path):
                cache[path] = output.detach()
            handles.append(module.register_forward_hook(keep))
    try:
        yield cache
    finally:
        for handle in handles:
            handle.remove()

@contextmanager
def without_heads(model, heads, means=None):
    """During the block, the heads [(layer, head), ...] of a TransformerLM hand over zeros.

    With means (n_layers, n_heads, d_head) they hand over their mean instead, the same for each token. ValueError for a
    head that the model does not have.
    """
    for layer, head in heads:
        if not (0 <= layer < len(model.blocks) and 0 <= head < model.blocks[layer].attention.n_heads):
            raise ValueError(f"heads must be (layer, head) pairs of the model, got {(layer, head)}")

    def switch_off(layer):
        def change(_module, _inputs, outputs):
            outputs = outputs.clone()
            for of_layer, head in heads:
                if of_layer == layer:
                    outputs[:, head] = 0.0 if means is None else means[layer][head]
            return outputs
        return change

    handles = [block.attention.outputs.register_forward_hook(switch_off(i)) for i, block in enumerate(model.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

# %%
with torch.no_grad(), record(model) as cache:
    model(ids)
for path, value in cache.items():
    print(f"{path:28s} {tuple(value.shape)}")
with torch.no_grad(), without_heads(model, [(0, 2)]), record(model, ("outputs",)) as cache:
    model(ids)
print("head 2 of layer 0 is silent:", (cache["blocks.0.attention.outputs"][0, 2] == 0).all().item())

# %% [markdown]
# ### 2.5 Pattern specialisation per head
#
# **Do heads come to do different things, if nobody tells them to?** A task in which it can be seen: a random segment of
# 8 to 20 different tokens, repeated until 40 tokens are full. In the first round almost nothing can be predicted (only
# that no token comes twice). In the second everything can: find the last place where the present token stood, and say
# what came after it.

# %%
def repeated(seed, batch=32, vocab=32, seq_len=40):
    """Sequences (batch, seq_len) that repeat their first `period` tokens, and the period; endless."""
    rng = np.random.default_rng(seed)
    while True:
        period = rng.integers(8, 21)
        segment = rng.permuted(np.tile(np.arange(vocab), (batch, 1)), axis=1)[:, :period]
        yield torch.from_numpy(np.tile(segment, (1, seq_len // period + 1))[:, :seq_len]), period

ids, period = next(repeated(seed=3, batch=1))
for start in range(0, 40, period):
    print(*(f"{token:2d}" for token in ids[0, start:start + period].tolist()))

# %% [markdown]
# The models have no feed-forward layers, so whatever they learn is in the attention: one layer of four heads, or two.
#
# *Predict.* Can one layer do it? It has four heads and may look at all earlier tokens.

# %%
def next_token_loss(model, batch):
    ids, _ = batch
    return F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])

stream = repeated(seed=99, batch=64)
exam = [next(stream) for _ in range(3)]

@torch.no_grad()
def second_round(model):
    """Accuracy and loss (nats) where the next token can be known: from the end of the first round on."""
    logits, targets = zip(*((model(ids[:, :-1])[:, period:], ids[:, period + 1:]) for ids, period in exam))
    right = [(l.argmax(-1) == t).double().mean().item() for l, t in zip(logits, targets)]
    return np.mean(right), np.mean([F.cross_entropy(l.mT, t).item() for l, t in zip(logits, targets)])

# %%
def attention_only(n_layers, seed):
    """Train a model without feed-forward layers; returns it, and every 10 steps (accuracy, loss, head scores)."""
    config = TransformerConfig(vocab_size=32, d_model=48, n_heads=4, n_layers=n_layers, d_ff=0)
    model = training.initialise(TransformerLM(config, positions=DistanceBias(4)).double(), seed)
    seen = []

    def evaluate(model):
        seen.append((*second_round(model), attention_maps(model)))
        return seen[-1][0]

    history = training.fit(model, repeated(seed), next_token_loss, steps=300, lr=6e-3, evaluate=evaluate, every=10)
    return model, np.array(history.steps), seen

ids_20 = next((ids, period) for ids, period in stream if period == 20)[0]         # 64 sequences, two rounds of 20

@torch.no_grad()
def attention_maps(model, ids=ids_20):
    """Weights of all heads, averaged over sequences: (n_layers, n_heads, 40, 40)."""
    with record(model, ("weights",)) as cache:
        model(ids)
    return torch.stack(list(cache.values())).mean(1).numpy()

# %% tags=["slow"]
two_layers = [attention_only(2, seed) for seed in range(3)]

# %%
one_layer = [attention_only(1, seed) for seed in range(3)]

# %%
steps = two_layers[0][1]
def measured(runs, which):
    return [[row[which] for row in seen] for _, _, seen in runs]

figure, axes = plt.subplots(1, 2, figsize=(10, 4))
for ax, which, name in zip(axes, (1, 0), ("loss in the second round (nats)", "accuracy in the second round")):
    curves = {"two layers": measured(two_layers, which), "one layer": measured(one_layer, which)}
    plotting.curves(curves, x=steps, ax=ax, xlabel="training step", ylabel=name)
axes[0].set_title("Loss: two layers fall suddenly, one slowly")
axes[1].set_title("Accuracy: two reach 1, one stays near 0.1")
plotting.show("Loss and accuracy in the second round against training steps, three runs each: with two layers a long "
              "plateau and then a sudden jump to accuracy 1; with one layer the loss sinks slowly and the accuracy "
              "stays near 0.1.")

# %%
accuracy = np.array(measured(two_layers, 0))
jump = [steps[np.argmax(curve > 0.8)] - steps[np.argmax(curve > 0.25)] for curve in accuracy]
print("two layers: above 0.95 at the end, for each seed:      ", accuracy[:, -1].min() > 0.95)
print("            from 0.25 to 0.8 in at most 60 of 300 steps:", max(jump) <= 60)
print("one layer:  below 0.3 at the end, for each seed:       ", max(run[-1] for run in measured(one_layer, 0)) < 0.3)

# %% [markdown]
# One layer cannot. A head scores a key by the key's token, the query's token and their distance. The key that is wanted
# is the one *whose predecessor* equals the query's token, and in a single layer no key knows its predecessor. Somebody
# has to write it there first. (What one layer gains: the next token is one of those seen some way back.)
#
# #### Exercise 2.4: two patterns  (difficulty 2 of 5, 10 minutes)
#
# Measure in a map of weights how much of it is one of two patterns, in sequences that repeat with a known `period`:
#
# - **previous token**: query $i$ looks at key $i - 1$. Mean weight over $i = 1, \ldots, n - 1$;
# - **induction**: query $i$ looks at the key *after* the last place where its own token stood, which is key
#   $i - \text{period} + 1$. Mean weight over $i = \text{period}, \ldots, n - 1$.
#
# | argument | shape | meaning |
# |---|---|---|
# | `weights` | `(..., n, n)` | attention weights, rows are queries |
# | `period` | int | after how many tokens the sequence repeats; at least 2 |
#
# Returns `(previous, induction)`, each of shape `(...)`.
#
# <details><summary>Hint</summary>
#
# Both are diagonals. `np.diagonal(weights, offset, axis1=-2, axis2=-1)` puts one on the last axis; below the main
# diagonal the offset is negative. Which of its entries belong to queries from `period` on?
#
# </details>

# %% tags=["exercise", "export"]
def pattern_scores(weights, period):
    """How much each map of weights looks at the previous token, and at the token after the last occurrence.

    weights (..., n, n), rows are queries, of sequences that repeat after `period` tokens.
    Returns (previous, induction), each (...): the mean of weights[i, i - 1] over i >= 1, and the mean of
    weights[i, i - period + 1] over i >= period. ValueError unless 2 <= period < n.
    Source: Olsson et al. 2022 (arXiv 2209.11895).
    """
    if not 2 <= period < weights.shape[-1]:
        raise ValueError(f"period must be at least 2 and less than n = {weights.shape[-1]}, got {period}")
    ### BEGIN SOLUTION
    previous = np.diagonal(weights, -1, axis1=-2, axis2=-1)
    induction = np.diagonal(weights, 1 - period, axis1=-2, axis2=-1)[..., 1:]      # its first entry is query period - 1
    return previous.mean(-1), induction.mean(-1)
    ### END SOLUTION

# %%
pattern_scores = check("2.4", pattern_scores)

# %%
maps = attention_maps(two_layers[0][0])
previous, induction = pattern_scores(maps, period=20)
print("                   " + "".join(f"  head {h}" for h in range(4)))
for layer in (0, 1):
    for name, scores in (("previous", previous), ("induction", induction)):
        print(f"layer {layer}, {name:10s}" + "".join(f"{score:8.1f}" for score in scores[layer]))

best = maps[0, previous[0].argmax()]
one_back, far = np.diagonal(best, -1), np.tril(best, -7).sum(-1)               # DistanceBias has one number from 7 on
early, late, far = one_back[:8].mean(), one_back[-20:].mean(), far[-20:].mean()
print(f"best previous-token head: {early:.1f} in its first 8 rows, {late:.1f} in the last 20")
print(f"in these 20 rows keys 7 or more back get {far:.1f} of the weight")

# %%
plotting.heads(attention_maps(two_layers[0][0], ids_20[:1]),
               title="Some heads of layer 0 look one back; layer 1 looks after the last occurrence")
plotting.show("Attention maps of two layers of four heads on one sequence of two rounds: in layer 0 some heads "
              "have a diagonal one below the main one (head 2's is the main one: it looks at itself), in layer 1 all "
              "have a bright one 19 tokens back in round two.")

# %% [markdown]
# They do, but by layer: in layer 0 some heads look one back and others do not; in layer 1 all four have learned the
# same thing. Layer 0 copies to each token what stood before it. (Why is the score only a half? It is an average: 0.9
# in the first rows, 0.3 in the last, where the many keys 7 or more back take most of the rest, each very little.)
# Layer 1 then compares the present token with *that*, and finds the token after the last occurrence: **induction
# heads** (Elhage et al. 2021; Olsson et al. 2022, arXiv 2209.11895). Heads of two layers work together, and nobody
# told them of each other.
#
# *Predict.* In training, does the previous-token half come long before the induction half?

# %%
def best_heads(runs):
    """Over training, the largest previous-token score in layer 0 and induction score in layer 1, for each run."""
    scores = [[pattern_scores(maps, 20) for _, _, maps in seen] for _, _, seen in runs]
    return [[p[0].max() for p, _ in run] for run in scores], [[i[1].max() for _, i in run] for run in scores]

previous_best, induction_best = best_heads(two_layers)
plotting.curves({"best previous-token head, layer 0": previous_best, "best induction head, layer 1": induction_best,
                 "accuracy": accuracy}, x=steps, xlabel="training step", ylabel="score, accuracy",
                title="Both patterns and the accuracy rise together")
plotting.show("Three curves over training steps with bands over three seeds: previous-token score, induction score and "
              "accuracy all lie flat for 100 steps and rise within the next 70.")
half_way = np.array([[steps[np.argmax(np.array(curve) > curve[-1] / 2)] for curve in curves]
                     for curves in (previous_best, induction_best, accuracy)])
print("all three pass half of their final value within 50 steps, each seed:", (np.ptp(half_way, axis=0) <= 50).all())

# %% [markdown]
# It does not. A plausible reason: neither half is of any use without the other, so neither grows alone; once both have
# a little, each makes the other worth more. The paper reports such a jump in much larger models: the heads form "at
# precisely the same point as a sudden sharp increase in in-context learning ability, visible as a bump in the training
# loss" (abstract). (*In-context learning* is getting better along the text, without training.) For small
# attention-only models it calls its evidence causal, for larger models with feed-forward layers correlational. The
# causal test is next: take a head out.

# %% [markdown]
# ### 2.6 Output aggregation
#
# **Is the last matrix a mixer, or a sum?** Both are true. $W^O$ has $h$ blocks of $d_v$ rows, one for each head, and a
# product with a concatenation is a sum of products:
#
# $$ [\text{head}_1; \ldots; \text{head}_h]\, W^O = \sum_i \text{head}_i\, W^O_i $$
#
# #### Exercise 2.5: who wrote what  (difficulty 2 of 5, 10 minutes)
#
# Compute what each head alone adds to the output, before the sum.
#
# | argument | shape | meaning |
# |---|---|---|
# | `heads` | `(..., n_heads, seq, d_v)` | what each head found |
# | `w_o` | `(n_heads * d_v, d_model)` | the last matrix |
#
# Returns `(..., n_heads, seq, d_model)`: what each head adds to the output. Their sum over the heads is
# `merge_heads(heads) @ w_o`.
#
# <details><summary>Hint</summary>
#
# Cut `w_o` into blocks of rows, `(n_heads, d_v, d_model)`. `@` then pairs each head with its block by broadcasting.
#
# </details>

# %% tags=["exercise", "export"]
def head_contributions(heads, w_o):
    """What each head adds to the output of multi-head attention; the sum over the heads is merge_heads(heads) @ w_o.

    heads (..., n_heads, seq, d_v), w_o (n_heads * d_v, d_model). Returns (..., n_heads, seq, d_model). ValueError for
    other numbers of axes or rows.
    """
    if len(heads.shape) < 3 or len(w_o.shape) != 2:
        raise ValueError("heads must have at least three axes (n_heads, seq, d_v) and w_o two, got shapes "
                         f"{tuple(heads.shape)} and {tuple(w_o.shape)}")
    n_heads, d_v = heads.shape[-3], heads.shape[-1]
    if len(w_o) != n_heads * d_v:
        raise ValueError(f"w_o must have n_heads * d_v = {n_heads * d_v} rows, got {len(w_o)}")
    ### BEGIN SOLUTION
    return heads @ w_o.reshape(n_heads, d_v, w_o.shape[-1])
    ### END SOLUTION

# %%
head_contributions = check("2.5", head_contributions)

# %%
found, w_last = rng.standard_normal((4, 7, 5)), rng.standard_normal((20, 16))
parts = head_contributions(found, w_last)
whole = merge_heads(found) @ w_last
print("sum of the heads equals concat and project, to 1e-12:", np.allclose(parts.sum(axis=0), whole, atol=1e-12))

# %% [markdown]
# So each head writes into the residual stream by itself, and the others do not notice. That makes a clean experiment
# possible: **ablation**. Let one head write nothing, and measure. Writing nothing is not the only choice: a head may
# have added the same vector to every token, and whoever reads the stream counts on it. *Mean ablation* keeps that
# vector and removes only what differs from token to token.
#
# *Predict.* Eight heads. How many of them can be silenced alone without harm?

# %%
def head_means(model):
    """What each head hands over on average: (n_layers, n_heads, d_head)."""
    with torch.no_grad(), record(model, ("outputs",)) as cache:
        model(ids_20)
    return [outputs.mean((0, 2)) for outputs in cache.values()]

def accuracy_without(model, heads, means=None):
    with without_heads(model, heads, means):
        return second_round(model)[0]

everyone = [(layer, head) for layer in (0, 1) for head in range(4)]
zero, mean = [], []
for model, _, _ in two_layers:
    zero.append([accuracy_without(model, [head]) for head in everyone])
    mean.append([accuracy_without(model, [head], head_means(model)) for head in everyone])
print("accuracy without:", "  ".join(f"{layer}.{head}" for layer, head in everyone), "  (layer.head)")
for seed in range(3):
    print(f"seed {seed}, zero:    ", "  ".join(f"{a:.1f}" for a in zero[seed]))
    print("        mean:    ", "  ".join(f"{a:.1f}" for a in mean[seed]))

# %% [markdown]
# Most of them. The worst single loss is a fifth of the answers, in two seeds of three. (Zero and mean agree to the
# printed digit: these heads add nothing constant that others count on.) It would be wrong to conclude that no head
# matters more than that: several may do the same, and stand in for each other. Silence them **as a group**: all heads
# of layer 0 that look one back, and, for comparison, the most harmful other group of as many heads of layer 0.

# %%
from itertools import combinations

def copiers(model):
    """The heads of layer 0 that look at the previous token."""
    scores = pattern_scores(attention_maps(model), 20)[0][0]
    return tuple((0, h) for h in range(4) if scores[h] > 0.25)

without = {"none": [], "worst others": [], "previous-token heads": []}
induction_left = []
for seed, (model, _, _) in enumerate(two_layers):
    group = copiers(model)
    others = [other for other in combinations(everyone[:4], len(group)) if other != group]
    without["none"].append(second_round(model)[0])
    without["worst others"].append(min(accuracy_without(model, other) for other in others))
    without["previous-token heads"].append(accuracy_without(model, group))
    with without_heads(model, group):
        induction_left.append(pattern_scores(attention_maps(model), 20)[1][1].max())
    print(f"seed {seed}: {len(group)} previous-token heads, {len(others)} other groups of as many")

# %%
plotting.bars(without, ylabel="accuracy in the second round",
              title="Which heads are silent? The previous-token heads are needed, as a group")
plotting.show("Three bars: accuracy 1 with all heads, near 0.8 without the most harmful other group of as many heads "
              "of layer 0, near 0.1 without the previous-token heads.")
print("without previous-token heads: accuracy below 0.4, each seed:", max(without["previous-token heads"]) < 0.4)
print("without the worst other group: above 0.6, each seed:        ", min(without["worst others"]) > 0.6)
print("without previous-token heads the induction score of layer 1 falls below 0.3:", max(induction_left) < 0.3)

# %% [markdown]
# That is the causal link. Layer 1 was not touched, and still its induction heads lose their target: the token that they
# look for is written by layer 0. And it is not a matter of how many heads are silent.
#
# #### How many heads does the model need?
#
# Michel, Levy and Neubig (2019, arXiv 1905.10650) find that "a large percentage of attention heads can be removed at
# test time without significantly impacting performance"; Voita et al. (2019, arXiv 1905.09418) prune 38 of the 48
# encoder heads of a translation model, with training, for a loss of 0.15 BLEU. Here: take heads away one by one, the
# least important first, and count.

# %%
def loss_without(model, heads):
    with without_heads(model, heads):
        return second_round(model)[1]

def pruned(model):
    """Accuracy with 0, 1, ..., 8 heads removed; each time the one whose loss hurts least goes next."""
    gone, curve = [], [second_round(model)[0]]
    while len(gone) < 8:
        left = [head for head in everyone if head not in gone]
        gone.append(min(left, key=lambda head: loss_without(model, [*gone, head])))
        curve.append(accuracy_without(model, gone))
    return curve

curves = np.array([pruned(model) for model, _, _ in two_layers])

# %%
plotting.curves({"two layers of four heads": curves}, xlabel="heads removed", ylabel="accuracy in the second round",
                title="Three of the eight heads can go unnoticed, without any training")
plotting.show("Accuracy against the number of removed heads: near 1 up to three, 0.6 with six, near 0 with seven.")
spare = (curves > 0.9).sum(axis=1) - 1
print("at least 2 heads can go before the accuracy falls below 0.9, each seed:", spare.min() >= 2)
print("a single head is not enough: accuracy below 0.2 with one left:       ", curves[:, 7].max() < 0.2)

# %% [markdown]
# With two heads left it still knows more than half of the answers; with one, nothing: the circuit has two parts. The
# miniature agrees with the papers, and adds a caution. "Can be removed" was measured *one at a time* in the table and
# *in good order* in the curve. Removed in a bad order, two or three heads are fatal, as the group experiment showed.
# And dispensable after training does not mean dispensable during it.

# %% [markdown]
# ### Cross-attention: two sequences
#
# **What if the queries come from one sequence and the answers from another?** Then it is cross-attention: a decoder,
# which writes German, looks into an encoder, which has read English. The formula has had two inputs from the start.
#
# In lecture 01 a recurrent net translated numbers with one additive attention. Here nothing is recurrent. The encoder
# attends to itself in both directions; the decoder attends to itself causally, then to the encoder's output.

# %% tags=["export"]
class EncoderLayer(nn.Module):
    """x + self-attention in both directions, then x + feed-forward. x (batch, seq, d_model)."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.self_attention = MultiHeadAttention(d_model, n_heads, DistanceBias(n_heads))
        self.feed_forward = feed_forward(d_model, 2 * d_model)

    def forward(self, x, mask=None):
        x = x + self.self_attention(self.norm_1(x), mask=mask)
        return x + self.feed_forward(self.norm_2(x))

class DecoderLayer(nn.Module):
    """y + causal self-attention, then y + cross-attention into the encoder's output, then y + feed-forward."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(d_model) for _ in range(3))
        self.self_attention = MultiHeadAttention(d_model, n_heads, DistanceBias(n_heads))
        self.cross_attention = MultiHeadAttention(d_model, n_heads)
        self.feed_forward = feed_forward(d_model, 2 * d_model)

    def forward(self, y, encoded, mask):
        y = y + self.self_attention(self.norm_1(y), causal=True)
        y = y + self.cross_attention(self.norm_2(y), encoded, mask=mask)
        return y + self.feed_forward(self.norm_3(y))

# %% tags=["export"]
class EncoderDecoder(nn.Module):
    """A Transformer that translates word ids, with encoder and decoder of n_layers each.

    Sentences are ids (batch, length), padded at the end, with the padding, start and end of `Vocabulary`.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.1, with the norms in front of each part.
    """

    def __init__(self, n_source, n_target, d_model=48, n_heads=4, n_layers=1):
        super().__init__()
        self.source, self.target = nn.Embedding(n_source, d_model), nn.Embedding(n_target, d_model)
        self.encoder = nn.ModuleList(EncoderLayer(d_model, n_heads) for _ in range(n_layers))
        self.decoder = nn.ModuleList(DecoderLayer(d_model, n_heads) for _ in range(n_layers))
        self.norm_source, self.norm_target = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.out = nn.Linear(d_model, n_target)

    def forward(self, source, target):
        """Logits (batch, length, n_target) of every target word, given the words before it, all at once."""
        check_ids("source", source, self.source.num_embeddings)
        check_ids("target", target, self.target.num_embeddings)
        mask = (source != Vocabulary.PAD)[:, None, None, :]
        x = self.source(source)
        for layer in self.encoder:
            x = layer(x, mask)
        encoded = self.norm_source(x)
        y = self.target(F.pad(target[:, :-1], (1, 0), value=Vocabulary.START))
        for layer in self.decoder:
            y = layer(y, encoded, mask)
        return self.out(self.norm_target(y))

    @torch.no_grad()
    def translate(self, source, n_steps):
        """Greedy translation: ids (batch, n_steps), to be read up to the first END."""
        target = source.new_full((len(source), n_steps), Vocabulary.PAD)
        for t in range(n_steps):
            target[:, t] = self(source, target[:, :t + 1])[:, t].argmax(-1)
        return target

# %%
train, test = data.number_words()
english, german = data.Vocabulary([p.source for p in train]), data.Vocabulary([p.target for p in train])

def as_ids(pairs):
    source, target = english.encode([p.source for p in pairs]), german.encode([p.target for p in pairs])
    return torch.from_numpy(source), torch.from_numpy(target)

def sentences(source, target, seed):
    rng = np.random.default_rng(seed)
    while True:
        rows = torch.from_numpy(rng.integers(len(source), size=64))
        yield tuple(ids[:, :(ids != Vocabulary.PAD).sum(1).max()] for ids in (source[rows], target[rows]))

def translation_loss(model, batch):
    return F.cross_entropy(model(*batch).mT, batch[1], ignore_index=Vocabulary.PAD)

# %%
source, target = as_ids(train)
test_source, test_target = as_ids(test)

def train_translator(seed):
    model = training.initialise(EncoderDecoder(len(english), len(german)).double(), seed)
    training.fit(model, sentences(source, target, seed), translation_loss, steps=300, lr=5e-3)
    return model

def exactly_right(model):
    found = model.translate(test_source, test_target.shape[1])
    return ((found == test_target) | (test_target == Vocabulary.PAD)).all(1).double().mean().item()

translators = [train_translator(seed) for seed in range(3)]
accuracy = [exactly_right(model) for model in translators]

# %%
print("exactly right, over 80 % of 1,000 new numbers, each of three seeds:", min(accuracy) > 0.8)
print("parameters:", count(translators[0]))

# %% [markdown]
# It learns what the recurrent net of lecture 01 learned, in twice as many steps. (More is not claimed: neither was
# tuned.) Two sequences of different length meet in the cross-attention, so its map is not square.

# %%
row = [p.source for p in test].index("fifty six thousand eight hundred thirty two".split())
with torch.no_grad(), record(translators[0], ("weights",)) as cache:
    translators[0](test_source, test_target)
for path, w in cache.items():
    print(f"{path:36s} {tuple(w.shape[1:])}")

# %% [markdown]
# Which of the four cross heads looks where the right word stands? The data come with the alignment.
#
# *Predict.* All four? One? And is it the same for each seed?

# %%
def aligned(model):
    """For each cross head: in which share of the words with a counterpart is the largest weight on the counterpart."""
    with torch.no_grad(), record(model, ("weights",)) as cache:
        model(test_source, test_target)
    best = cache["decoder.0.cross_attention.weights"].argmax(-1).numpy()             # (1000, heads, n_target)
    pairs = [(i, t, j) for i, p in enumerate(test) for t, j in enumerate(p.alignment) if j >= 0]
    i, t, j = np.array(pairs).T
    return (best[i, :, t] == j[:, None]).mean(0)

shares = np.array([aligned(model) for model in translators])
print("best head on the right word in more than 70 % of the words, each seed:", shares.max(1).min() > 0.7)
print("every head on it in more than half of the words, each seed:           ", shares.min() > 0.5)

# %%
pair = test[row]
map_ = cache["decoder.0.cross_attention.weights"][row, 2, :len(pair.target), :len(pair.source) + 1].numpy()
plotting.alignment(map_, [*pair.source, "end"], pair.target, title="A cross head crosses where German does")
plotting.show("Cross-attention of head 2: a diagonal from English to German words, crossed where German "
              "says the unit before the ten.")

# %% [markdown]
# All four, more or less: nobody told them which word translates which, and each finds most of the right words. Heads
# need not share the work out.
#
# The keys and values of the cross-attention are the decoder layer's own: its $W^K$ and $W^V$, applied to the encoder's
# output. They do not depend on what has been written so far, so a real decoder computes them once for each sentence.

# %%
model = translators[0]
own = {name for name, _ in model.named_parameters() if name.endswith(("w_k", "w_v"))}
print(*sorted(own), sep="\n")

# %% [markdown]
# ### Review this code
#
# A colleague sends you multi-head attention for review, with dropout and with a mask of shape `(batch, n_keys)` for the
# padding, True = may attend. Listings like it are in many tutorials. (*Dropout* sets a random share of the weights to
# zero in training and enlarges the rest, so that their mean stays. Here the draw is an argument: `keep` is False where
# a weight is dropped.) *Before you run the tests: how many faults do you see? There are five.*

# %%
def attention_for_review(q, k, v, key_mask, keep, rate):
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])          # (batch, heads, n_queries, n_keys)
    scores = np.where(key_mask == 0, scores, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    weights = weights * keep / (1 - rate)
    return weights @ v, weights

# %%
q, k, v = rng.standard_normal((3, 3, 2, 3, 4))                      # 3 sentences, 2 heads, 3 queries and keys
key_mask = np.array([[True, True, False], [True, False, False], [False, False, False]])      # the last one is empty
keep = rng.random((3, 2, 3, 3)) > 0.5

with np.errstate(all="ignore"):
    weights = attention_for_review(q, k, v, key_mask, keep, 0.5)[1]
    turned = attention_for_review(q, k, v, ~key_mask, keep, 0.5)[1]                     # mended from outside
    other_mask = np.where([[False], [True], [False]], True, key_mask)                   # sentence 1 gets another mask
    other = attention_for_review(q, k, v, ~other_mask, keep, 0.5)[1]
    large = attention_for_review(1e3 * q, k, v, ~np.ones_like(key_mask), keep, 0.5)[1]
print("rows of the returned weights sum to 1:    ", np.allclose(weights.sum(-1), 1))
print("padding gets no weight:                   ", (weights[0, :, :, 2] == 0).all())
print("with ~key_mask: an empty row gives no nan:", not np.isnan(turned).any())
print("sentence 1's mask leaves sentence 0 alone:", np.array_equal(turned[0], other[0], equal_nan=True))
print("large scores give no nan:                 ", not np.isnan(large).any())

# %% [markdown]
# #### Exercise 2.6: mend it  (difficulty 3 of 5, 15 minutes)
#
# Write the function anew, without the five faults.
#
# | argument | shape | meaning |
# |---|---|---|
# | `q` | `(batch, n_heads, n_queries, d_head)` | queries |
# | `k`, `v` | `(batch, n_heads, n_keys, d_head)` | keys and values |
# | `key_mask` | `(batch, n_keys)` booleans | True = every query and head of the sentence may attend to this key |
# | `keep` | `(batch, n_heads, n_queries, n_keys)` booleans | False = this weight is dropped |
# | `rate` | float | the share that is dropped; what is kept is divided by `1 - rate` |
#
# Returns `(out, weights)`: the output, computed with dropout, and the attention weights *as they were before it*. A
# sentence with nothing to attend to gives zeros.
#
# <details><summary>Hint</summary>
#
# `(batch, n_keys)` against `(batch, n_heads, n_queries, n_keys)`: broadcasting aligns at the last axis. With three
# sentences of three tokens it does not even complain. `attention_weights` of lecture 01, imported at the top, shifts
# the scores and gives zeros where nothing is allowed.
#
# </details>

# %% tags=["exercise", "export"]
def attention_with_dropout(q, k, v, key_mask, keep, rate):
    """Attention with dropout on its weights, in NumPy. Returns (out, weights), the weights as they were before dropout.

    q (batch, n_heads, n_queries, d_head), k, v (batch, n_heads, n_keys, d_head); key_mask (batch, n_keys) boolean,
    True = may attend; keep (batch, n_heads, n_queries, n_keys) boolean, False = dropped; rate: the share dropped, what
    is kept is divided by 1 - rate. A row with nothing to attend to is zero. ValueError for a rate outside [0, 1) and
    for a key_mask that is not boolean.
    """
    if key_mask.dtype != bool:
        raise ValueError(f"key_mask must be boolean with True = may attend, got {key_mask.dtype}")
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be at least 0 and less than 1, got {rate}")
    ### BEGIN SOLUTION
    weights = attention_weights(q, k, mask=key_mask[:, None, None, :])
    return cuda.weighted_sum(weights * keep / (1 - rate), v), weights
    ### END SOLUTION

# %%
attention_with_dropout = check("2.6", attention_with_dropout)

# %% [markdown]
# The five: the mask is the wrong way round (a habit from libraries in which True means *forbidden*); its shape belongs
# to queries and keys, not to sentences; an empty row is 0/0; the softmax is not shifted; and what is returned as "the
# weights" has been through dropout. A sixth is not a fault but a price: the weights are always written out, $h\,n^2$
# numbers, whether anybody wants to see them or not.

# %% [markdown]
# ### 2.7 Parallel computation benefits
#
# **Heads do not wait for each other. What is that worth?** No head needs anything of another, so a loop over heads and
# one batched product do the same arithmetic. The difference is in how often somebody has to be asked.
#
# *Predict.* 32 heads: how many products does the loop start, how many the batched version?

# %%
def looped(x, w_q, w_k, w_v, w_o, n_heads):
    d_head = w_q.shape[1] // n_heads
    found = []
    for i in range(n_heads):
        own = slice(i * d_head, (i + 1) * d_head)
        found.append(attention_torch(x @ w_q[:, own], x @ w_k[:, own], x @ w_v[:, own]))
    return torch.cat(found, dim=-1) @ w_o

def batched(x, w_q, w_k, w_v, w_o, n_heads):
    return multi_head_attention_torch(x, x, w_q, w_k, w_v, w_o, n_heads)

x = torch.from_numpy(rng.standard_normal((2, 32, 128)))
w = torch.from_numpy(rng.standard_normal((4, 128, 128)) / np.sqrt(128))

# %%
from torch.overrides import TorchFunctionMode

class Products(TorchFunctionMode):
    """Counts the matrix products that are started during the block."""
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += "matmul" in getattr(function, "__name__", "")
        return function(*args, **(kwargs or {}))

for h in (1, 4, 32):
    with Products() as loop:
        one_by_one = looped(x, *w, h)
    with Products() as batch:
        together = batched(x, *w, h)
    same = torch.allclose(one_by_one, together, atol=1e-12)
    print(f"h = {h:2d}: {loop.count:3d} products in the loop, {batch.count} batched; equal to 1e-12: {same}")

# %% tags=["nbval-ignore-output"]
import time

def best_ms(function, h, repeats=51):
    times = []                                          # a time can be too long, never too short
    for _ in range(repeats):
        start = time.process_time()
        function(x, *w, h)
        times.append(1e3 * (time.process_time() - start))
    return min(times)

print("ms of processor time, the best of 51:")
for h in (1, 4, 16, 32):
    loop, batch = best_ms(looped, h), best_ms(batched, h)
    print(f"h = {h:2d}: loop {loop:5.1f}, batched {batch:5.1f}, ratio {loop / batch:.1f}")

# %% [markdown]
# (Times of the machine that built this page, one thread; yours will differ.) With the FLOPs equal, what the loop pays
# for is calls, and products too small to fill the machine. A GPU has thousands of lanes to fill, and the batched form
# hands it all heads, sentences and tiles of queries at once; part 4 starts one block for each.
#
# #### Heads on two machines
#
# The sum of section 2.6 lets heads be *distributed*. Each machine gets half of the heads: half of the columns of $W^Q,
# W^K, W^V$ and half of the rows of $W^O$. They exchange nothing until the end, and then one sum; in the backward pass
# there is one more. (Shoeybi et al. 2019, arXiv 1909.08053, train large models this way.)

# %%
half = [slice(0, 64), slice(64, 128)]
partial = [multi_head_attention_torch(x, x, w[0][:, s], w[1][:, s], w[2][:, s], w[3][s], n_heads=2) for s in half]
print("two machines with two heads each:", torch.allclose(sum(partial), batched(x, *w, 4), atol=1e-12))

# %% [markdown]
# ## Part 4 · CUDA: heads read in place
#
# **Where is a head in memory?** In NumPy and PyTorch it is a view: the `reshape` and `swapaxes` of `split_heads` move
# no byte. A kernel that wants each head in one piece needs a real copy, of Q, K, V and of the result. This part counts
# what those copies cost, and builds a kernel that does without.
#
# The words and the tools are those of lecture 01, part 4: `cuda.compile`, requests, sectors, tiles. So are the two
# counts of bytes: **requested** is what the threads ask for, **distinct** counts each sector of 32 bytes once for each
# kernel. As there, no GPU run is recorded: this part shows bytes and no times.

# %%
import functools

from attention.fundamentals import ROW_OF_A_TILE, check_arguments

# %% [markdown]
# ### Arithmetic first: four products, one attention, four copies
#
# For `n` tokens of width `d`, in self-attention, at four bytes a float. A product of (n, d) by (d, d) is $2nd^2$
# floating-point operations (FLOPs):
#
# | step | FLOPs | reads | writes |
# |---|---|---|---|
# | products by $W_Q, W_K, W_V, W_O$ | $4 \cdot 2nd^2$ | $4 \cdot 4(nd + d^2)$ | $4 \cdot 4nd$ |
# | attention, all heads | $4n^2d$ | $4 \cdot 3nd$ at least | $4nd$ |
# | copies of Q, K, V and the result | 0 | $4 \cdot 4nd$ | $4 \cdot 4nd$ |
#
# The number of heads appears nowhere: $h$ heads of width $d/h$ cost what one of width $d$ costs. (The exponentials are
# not counted; there are $h n^2$ of them.)
#
# *Predict.* From which length on does attention compute more than the four products? And which share of all bytes is
# copying?

# %%
def cost(n, d):
    """(FLOPs of the products, FLOPs of attention, least bytes of both, bytes of the copies) of n tokens of width d."""
    return 8 * n * d**2, 4 * n**2 * d, 4 * (8 * n * d + 4 * d**2) + 4 * 4 * n * d, 4 * 8 * n * d

print("        n  attention / products   bytes without copies   with copies")
for n in (128, 1024, 4096, 32768):
    products, attention, moved, copied = cost(n, d=512)
    print(f"{n:9,}  {attention / products:20.2f}   {moved / 1e6:17.1f} MB   {(moved + copied) / moved:9.2f} x")

# %% [markdown]
# From $n = 2d$ on, attention computes more. The copies compute nothing. For long inputs, where the weights no longer
# count, they turn $12nd$ numbers moved into $20nd$: two thirds more.
#
# ### The products, tile by tile
#
# Each of the four products is one launch. A block computes 16 × 16 outputs; it walks along the inner dimension, and
# every number that it loads is used 16 times. Batch and sequence are one axis here: a projection does not care which
# sentence a row comes from.

# %% tags=["export"]
PROJECT = r"""
#define TILE 16
__global__ void project(const float* x, const float* w, float* out, int n_rows, int d_in, int d_out) {
  __shared__ float x_tile[TILE][TILE], w_tile[TILE][TILE];
  int c = threadIdx.x, r = threadIdx.y, row = blockIdx.x * TILE + r, column = blockIdx.y * TILE + c;
  float sum = 0.0f;
  for (int first = 0; first < d_in; first += TILE) {
    // load
    x_tile[r][c] = row < n_rows && first + c < d_in ? x[(size_t)row * d_in + first + c] : 0.0f;
    w_tile[r][c] = first + r < d_in && column < d_out ? w[(size_t)(first + r) * d_out + column] : 0.0f;
    __syncthreads();                                    // both tiles have arrived
    // multiply
    for (int t = 0; t < TILE; ++t) sum += x_tile[r][t] * w_tile[t][c];
    __syncthreads();                                    // both have been used
  }
  // write
  if (row < n_rows && column < d_out) out[(size_t)row * d_out + column] = sum;
}
"""

# %% tags=["export"]
@functools.cache
def project_kernel():
    """The product x w in tiles, compiled on first use."""
    return cuda.compile(PROJECT, name="project")

def project_launch(x, w):
    """Grid, block, arguments and output of the kernel `project`, for float32 tensors x (..., d_in), w (d_in, d_out)."""
    d_in, d_out = w.shape
    n_rows = math.prod(x.shape[:-1])
    out = torch.zeros(*x.shape[:-1], d_out, device=x.device)
    return (-(-n_rows // 16), -(-d_out // 16)), (16, 16), (x, w, out, n_rows, d_in, d_out), out

# %%
def draw(*shape):
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

rng = np.random.default_rng(4)
n, d = 50, 40                                                       # neither is a multiple of 16
x, w = draw(n, d), draw(d, d)
grid, block, arguments, out = project_launch(x, w)
report = project_kernel().check[grid, block](*arguments)
tiles = lambda size: -(-size // 16)                                 # how many tiles of 16 cover it

print("problems:", len(report.problems), "  right to 1e-5:", torch.allclose(out, x @ w, atol=1e-5, rtol=1e-5))
print(f"read    {report.global_loaded:7,} bytes, formula {4 * (n * d * tiles(d) + d * d * tiles(n)):7,}")
print(f"written {report.global_stored:7,} bytes, formula {4 * n * d:7,}")

# %% [markdown]
# To the byte, ragged ends included. `x` is read once for each column of tiles, `w` once for each row of tiles.
#
# *Predict.* What do tiles of 8 and of 32 read?

# %%
for tile in (8, 16, 32):
    kernel = cuda.compile(PROJECT.replace("TILE 16", "TILE " + str(tile)), name="project")
    read = kernel.check[(-(-n // tile), -(-d // tile)), (tile, tile)](*arguments).global_loaded
    print(f"tile {tile:2d}: {read:7,} bytes, {2 * n * d * d / read:.1f} FLOPs for each byte read")

# %% [markdown]
# The larger the tile, the fewer bytes. A block has at most 1,024 threads, and that is 32 × 32, with one output a
# thread. A thread that computes several outputs goes further, as libraries do.
#
# ### The losing variant: copy first
#
# What `.contiguous()` does after `split_heads`: (batch, seq, heads, d_head) becomes (batch, heads, seq, d_head).
# Thread number `e` writes element `e` of the result.
#
# *Predict.* Reading a transposed array sounds uncoalesced. With heads of 16 floats, how many sectors does a request of
# 32 lanes touch?

# %%
SPLIT_COPY = r"""
__global__ void split_copy(const float* x, float* y, int n_heads, int seq, int d_head, int n) {
  int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= n) return;
  int c = e % d_head, t = e / d_head % seq, h = e / d_head / seq % n_heads, b = e / d_head / seq / n_heads;
  y[e] = x[((size_t)(b * seq + t) * n_heads + h) * d_head + c];
}
"""
batch, seq, heads, d_head = 2, 48, 4, 16
x = draw(batch, seq, heads * d_head)
y = torch.zeros(batch, heads, seq, d_head)
copying = cuda.compile(SPLIT_COPY).check[-(-x.numel() // 256), 256](x, y, heads, seq, d_head, x.numel())
print("the same as split_heads:", torch.equal(y, split_heads(x, heads)))
print("sectors of a request:", *(row.sectors // row.requests for row in copying.rows), "(load, store)")
print(f"{copying.global_loaded + copying.global_stored:,} bytes for one copy; four for each layer:",
      f"{4 * (copying.global_loaded + copying.global_stored):,} = 8 * batch * seq * d_model * 4:",
      4 * (copying.global_loaded + copying.global_stored) == 8 * batch * seq * heads * d_head * 4)

# %% [markdown]
# Four, on both sides: a row of a head is 64 bytes in one piece, two whole sectors. The copy is coalesced; it loses
# because it is there at all. And if the *copy* can read a head without waste, so can the kernel that needs it.
#
# ### A head is a window of columns
#
# Row $t$ of head $h$ begins at `t * row_stride + h * d_head`: `row_stride` numbers further for the next token, `d_head`
# further for the next head.

# %%
lane = np.arange(32)
for d_head in (16, 4):
    offsets = 4 * (lane // d_head * 64 + lane % d_head)             # head 0 of rows of 64 floats
    plotting.warp_access(offsets)
plotting.show("Two maps of memory, one warp reading a head in place: heads of 16 floats fill four sectors; heads of 4 "
              "touch eight and use half of each.")

# %% [markdown]
# #### Exercise 2.7: read a head in place  (difficulty 3 of 5, 20 minutes)
#
# All 256 threads of a block copy `TILE` = 16 rows of **one head** into shared memory, as in exercise 1.8. What is new
# is where they are: the heads of a token stand side by side in one row.
#
# | argument | meaning |
# |---|---|
# | `tile` | in shared memory; row $r$, column $c$ of the head belongs at `tile[r * stride + c]` |
# | `stride` | words from one row of the tile to the next, at least `d_head` |
# | `rows` | in global memory, `(n_rows, row_stride)`, row after row; all heads of a token in its row |
# | `row_stride` | numbers in a whole row, at least `(head + 1) * d_head` |
# | `head` | which head, from 0 |
# | `first` | the first row to copy |
# | `n_rows` | how many rows there are; rows from there on are not read and become 0 |
# | `d_head` | columns of one head, any number |
#
# Neighbouring threads must read neighbouring addresses within a row. Read nothing but the head.
#
# <details><summary>Hint</summary>
#
# Number the 16 · `d_head` elements of the tile row after row; `e / d_head` and `e % d_head` are row and column in the
# tile. In memory the row is `first` further down, the column `head * d_head` further right.
#
# </details>

# %% tags=["exercise", "export"]
LOAD_HEAD = r"""
#define TILE 16
__device__ void load_head(float* tile, int stride, const float* rows, int row_stride, int head, int first, int n_rows,
                          int d_head) {
  int thread = threadIdx.y * TILE + threadIdx.x;
  // BEGIN SOLUTION
  for (int e = thread; e < TILE * d_head; e += TILE * TILE) {
    int r = e / d_head, c = e % d_head;
    bool exists = first + r < n_rows;
    tile[r * stride + c] = exists ? rows[(size_t)(first + r) * row_stride + head * d_head + c] : 0.0f;
  }
  // END SOLUTION
}
"""

# %%
LOAD_HEAD = check("2.7", LOAD_HEAD)

# %% [markdown]
# With one head it is `load_tile` of lecture 01. *Predict.* From which `d_head` on is nothing wasted?

# %%
READ_HEAD = r"""
__global__ void read_head(const float* rows, float* out, int row_stride, int head, int n_rows, int d_head) {
  extern __shared__ float tile[];
  load_head(tile, d_head, rows, row_stride, head, 0, n_rows, d_head);
  __syncthreads();
  for (int c = threadIdx.x; c < d_head; c += TILE) out[threadIdx.y * d_head + c] = tile[threadIdx.y * d_head + c];
}
"""
kernel = cuda.compile(LOAD_HEAD + READ_HEAD, name="read_head")
for d_head in (1, 2, 4, 8, 12, 16, 32, 64):
    rows, out = draw(16, 3 * d_head), torch.zeros(16, d_head)
    report = kernel.check[1, (16, 16), 4 * 16 * d_head](rows, out, 3 * d_head, 1, 16, d_head)
    assert torch.equal(out, rows[:, d_head:2 * d_head])
    fetched = sum(row.sectors for row in report.rows if row.array == "rows")
    print(f"d_head {d_head:2d}: {fetched:3d} sectors for {16 * d_head:5d} floats,",
          f"{32 * fetched / (64 * d_head):.1f} times the bytes")

# %% [markdown]
# From 8 on, if it is a multiple of 8: then a row of a head is whole sectors, and reading in place is as good as reading
# a copy. A row of 12 floats is one and a half sectors, so it begins or ends in the middle of one. The paper of 2017
# and GPT-2 have heads of 64.
#
# ### Attention over heads in place
#
# The kernel is that of lecture 01, and three things are better:
#
# - **in place:** `load_head` reads Q, K and V where the products left them. The result of head $h$ goes to its own
#   columns, so it is merged already;
# - **scores are kept:** lecture 01 computed each score twice and read K twice. Here the scores of the first `kept` keys
#   stay in shared memory, and only those after them are computed again;
# - **the future is not loaded:** with a causal mask, tiles after a block's last query are left out.
#
# First the tools: from lecture 01 `PAD` and two reductions over the sixteen threads of a row (`row_max`, `row_sum`), a
# dot product, and the weighted sum of a tile of values.

# %% tags=["export"]
ROW_TOOLS = ROW_OF_A_TILE + r"""
__device__ float dot(const float* a, const float* b, int d) {
  float sum = 0.0f;
  for (int t = 0; t < d; ++t) sum += a[t] * b[t];
  return sum;
}
__device__ void blend(float* o_row, const float* weights, const float* v_tile, int d_v) {
  for (int c = threadIdx.x; c < d_v; c += TILE)
    for (int r = 0; r < TILE; ++r) o_row[c] += weights[r] * v_tile[r * (d_v + PAD) + c];
}
"""

# %% tags=["export"]
ATTEND_HEADS = r"""
__global__ void attend_heads(const float* q, const float* k, const float* v, const unsigned char* mask, float* out,
                             int n_heads, int n_queries, int n_keys, int d_head, int d_v, int q_stride, int k_stride,
                             int v_stride, int kept, int causal, float scale) {
  extern __shared__ float shared[];
  float *q_tile = shared, *k_tile = q_tile + TILE * (d_head + PAD), *v_tile = k_tile + TILE * (d_head + PAD);
  float *o_tile = v_tile + TILE * (d_v + PAD), *s_tile = o_tile + TILE * (d_v + PAD);   // output undivided, scores
  int x = threadIdx.x, y = threadIdx.y, first_query = blockIdx.y * TILE, i = first_query + y;
  int head = blockIdx.x % n_heads, end = causal ? min(n_keys, first_query + TILE + n_keys - n_queries) : n_keys;
  size_t batch = blockIdx.x / n_heads;
  q += batch * n_queries * q_stride, k += batch * n_keys * k_stride, v += batch * n_keys * v_stride;
  if (mask) mask += ((size_t)blockIdx.x * n_queries + i) * n_keys;                       // none is a null pointer
  float *q_row = q_tile + y * (d_head + PAD), *o_row = o_tile + y * (d_v + PAD);         // this thread's rows
  // load the queries
  load_head(q_tile, d_head + PAD, q, q_stride, head, first_query, n_queries, d_head);
  for (int c = x; c < d_v; c += TILE) o_row[c] = 0.0f;
  float maximum = -INFINITY, total = 0.0f;
  for (int pass = 0; pass < 2; ++pass) {
    for (int first = 0, j = x; first < end; first += TILE, j += TILE) {       // j: this thread's key
      bool fresh = pass == 0 || first >= kept;          // else the scores of this tile are still here
      // load
      __syncthreads();                                  // the tiles of the last round have been used
      if (fresh) load_head(k_tile, d_head + PAD, k, k_stride, head, first, n_keys, d_head);
      if (pass == 1) load_head(v_tile, d_v + PAD, v, v_stride, head, first, n_keys, d_v);
      __syncthreads();                                  // the new tiles have arrived
      // score
      float* scores = s_tile + y * (kept + TILE + PAD) + min(first, kept);    // TILE places for all that is not kept
      bool allowed = fresh && i < n_queries && j < n_keys && (!causal || j <= i + n_keys - n_queries)
        && (!mask || mask[j]);
      if (fresh) scores[x] = allowed ? scale * dot(q_row, k_tile + x * (d_head + PAD), d_head) : -INFINITY;
      if (pass == 0) { maximum = fmaxf(maximum, scores[x]); continue; }
      // weights and blend, once the maximum is known
      scores[x] = expf(scores[x] - maximum);
      total += scores[x];
      __syncwarp();                                     // a row of the tile belongs to one warp
      blend(o_row, scores, v_tile, d_v);
    }
    maximum = fmaxf(row_max(maximum), -3e38f);          // finite: with nothing to attend to each weight is exp(-inf)
  }
  total = row_sum(total);
  // write, into the head's own columns
  out += (batch * n_queries + i) * n_heads * d_v + head * d_v;
  for (int c = x; c < d_v && i < n_queries; c += TILE) out[c] = total == 0.0f ? 0.0f : o_row[c] / total;
}
"""

# %% [markdown]
# How many scores are kept? As many as fit into 48 KB beside the tiles. That much a block gets on any GPU without
# having to ask.

# %% tags=["export"]
@functools.cache
def attend_kernel():
    """Attention over heads in place, compiled on first use."""
    return cuda.compile(LOAD_HEAD + ROW_TOOLS + ATTEND_HEADS, name="attend_heads")

def attend_launch(q, k, v, n_heads, mask, causal, kept=None):
    """Grid, block, shared bytes, arguments and output of `attend_heads`.

    q (batch, n_queries, n_heads * d_head), k and v alike: float32 tensors, contiguous. mask None or uint8
    (batch, n_heads, n_queries, n_keys). kept: for how many keys scores are kept, a multiple of 16; as many as fit
    unless given.
    """
    batch, n_queries, n_keys = q.shape[0], q.shape[1], k.shape[1]
    d_head, d_v = q.shape[2] // n_heads, v.shape[2] // n_heads
    room = 48 * 1024 // 64 - 2 * (d_head + 1) - 2 * (d_v + 1) - 17            # in scores of each of the 16 rows
    kept = max(0, min(-(-n_keys // 16) * 16, room // 16 * 16)) if kept is None else kept
    shared = 64 * (2 * (d_head + 1) + 2 * (d_v + 1) + 17 + kept)
    out = torch.zeros(batch, n_queries, v.shape[2], device=q.device)
    arguments = (q, k, v, mask, out, n_heads, n_queries, n_keys, d_head, d_v, q.shape[2], k.shape[2], v.shape[2],
                 kept, int(causal), 1 / math.sqrt(d_head))
    return (batch * n_heads, -(-n_queries // 16)), (16, 16), shared, arguments, out

# %%
batch, n, m, d_model, heads = 2, 40, 70, 64, 4
d = d_model // heads
q, k, v = draw(batch, n, d_model), draw(batch, m, d_model), draw(batch, m, d_model)
grid, block, shared, arguments, out = attend_launch(q, k, v, heads, None, False)
kept = attend_kernel().check[grid, block, shared](*arguments)

expected = merge_heads(attention_numpy(*(split_heads(a.numpy(), heads) for a in (q, k, v))))
print("problems:", len(kept.problems), "  agrees with NumPy to 1e-5:", np.allclose(out, expected, atol=1e-5))
print(f"read    {kept.global_loaded:7,} bytes, formula {4 * batch * heads * (n * d + tiles(n) * 2 * m * d):7,}")
print(f"written {kept.global_stored:7,} bytes, formula {4 * batch * heads * n * d:7,}")
print("sectors of every request as few as can be:", all(row.sectors == row.ideal_sectors for row in kept.rows))

# %% [markdown]
# For each tile of 16 queries K and V are read once, and no sector is wasted. With `kept=0` it is the kernel of lecture
# 01.
#
# *Predict.* Three variants of the same kernel, for 96 tokens that attend to themselves: no scores kept, all kept, all
# kept and causal. How do their reads compare?

# %%
q, k, v = (draw(1, 96, 64) for _ in range(3))
for name, causal, kept in (("none kept", False, 0), ("all kept", False, 96), ("causal", True, 96)):
    grid, block, shared, arguments, _ = attend_launch(q, k, v, 4, None, causal, kept)
    loaded = attend_kernel().check[grid, block, shared](*arguments).global_loaded
    print(f"{name:9s}: {loaded:8,} bytes = {loaded / (4 * 96 * 64):4.1f} times the size of Q")

# %% [markdown]
# Q once, and for each of six tiles of queries V once and K twice or once: 1 + 6 · 3 = 19 and 1 + 6 · 2 = 13. Causal
# blocks read one, two, ... six sixths of K and V: 1 + 3.5 · 2 = 8. (Keeping has its price: shared memory that one block
# holds, another cannot use. Can the second reading of K be avoided at any length? Lecture 06.)
#
# ### All together
#
# Three products, attention, one product: five launches, and nothing between them but reshapes that move no byte.

# %% tags=["export"]
def project_in_tiles(x, w):
    """x (..., d_in) by w (d_in, d_out), arrays or tensors, through the kernel; a float32 tensor."""
    grid, block, arguments, out = project_launch(*cuda.on_device(x, w))
    if out.numel() and w.shape[0]:
        project_kernel().fast[grid, block](*arguments)
    return out

@cuda.skip_unseen
def attend(q, k, v, n_heads, mask, causal):
    """The output of `attend_heads` for the arguments of attend_launch."""
    grid, block, shared, arguments, out = attend_launch(q, k, v, n_heads, mask, causal)
    if out.numel() and k.shape[1]:
        attend_kernel().fast[grid, block, shared](*arguments)
    return out

def multi_head_attention_cuda(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    """Multi-head attention by tiled CUDA kernels that read heads in place; arguments, shapes and errors as
    multi_head_attention_numpy.

    NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU. Computed in single precision, returned in
    the kind and type of x_q. Not differentiable.
    d_head + d_v up to 1,805 where a block may have 227 KB of shared memory, 1,293 on sm_80, 781 on sm_120.
    """
    check_projections(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads)
    q, k, v = (project_in_tiles(x, w) for x, w in ((x_q, w_q), (x_kv, w_k), (x_kv, w_v)))
    check_arguments(*(split_heads(t, n_heads) for t in (q, k, v)), mask)      # a view: nothing is copied
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    q, k, v = (t.expand(*lead, *t.shape[-2:]).reshape(math.prod(lead), *t.shape[-2:]).contiguous() for t in (q, k, v))
    if mask is not None:
        full = (*lead, n_heads, q.shape[1], k.shape[1])
        mask = torch.as_tensor(mask, device=q.device).expand(full).to(torch.uint8).contiguous()
    out = attend(q, k, v, n_heads, mask, causal)
    out = project_in_tiles(out.reshape(*lead, *out.shape[1:]), w_o)
    return cuda.like(out, x_q)

# %%
worst = 0.0
odd = (((3,), 19, 45, 20, 2, 5, 9), ((), 1, 70, 7, 3, 8, 1), ((2, 2), 33, 17, 24, 4, 6, 6))
for lead, n, m, d_model, heads, d_head, d_v in odd:
    x_q, x_kv = rng.standard_normal((*lead, n, d_model)), rng.standard_normal((*lead, m, d_model))
    w_q, w_k = rng.standard_normal((2, d_model, heads * d_head))
    w_v, w_o = rng.standard_normal((d_model, heads * d_v)), rng.standard_normal((heads * d_v, d_model))
    mask = rng.random((heads, n, m)) < 0.7
    for causal in (False, True):
        call = x_q, x_kv, w_q, w_k, w_v, w_o, heads, mask, causal
        expected = multi_head_attention_numpy(*call)
        worst = max(worst, np.abs(multi_head_attention_cuda(*call) - expected).max() / np.abs(expected).max())
print("six odd cases agree with NumPy to 1e-5 of the largest value:", worst < 1e-5)

# %% [markdown]
# And the copies, measured beside the rest: distinct bytes of a layer over 256 tokens, from one launch of each kind.

# %%
n, d_model, heads = 256, 64, 4
x, w = draw(1, n, d_model), draw(d_model, d_model)
grid, block, arguments, q = project_launch(x, w)
product = project_kernel().check[grid, block](*arguments)
grid, block, shared, arguments, _ = attend_launch(q, q.clone(), q.clone(), heads, None, False)  # three arrays
attend = attend_kernel().check[grid, block, shared](*arguments)
y = torch.zeros(1, heads, n, d_model // heads)
copying = cuda.compile(SPLIT_COPY).check[-(-q.numel() // 256), 256](q, y, heads, n, d_model // heads, q.numel())

products, attention, copies = (times * (report.distinct_loaded + report.distinct_stored)
                               for times, report in ((4, product), (1, attend), (4, copying)))
_, _, moved, copied = cost(n, d_model)
print(f"four products {products:8,} bytes, attention {attention:8,}, four copies {copies:8,}")
print(f"with copies {1 + copies / (products + attention):.2f} times the bytes, formula {1 + copied / moved:.2f}")

# %% [markdown]
# ### One product instead of three
#
# $W_Q$, $W_K$ and $W_V$ side by side are one matrix (d, 3d). **What does one launch save?** GPT-2 stores them this
# way (`c_attn`).
#
# *Predict.* Does the number of requested bytes change? And of distinct bytes?

# %%
x, packed = draw(n, d_model), draw(d_model, 3 * d_model)
counts = {}
for name, weights in (("three launches", packed.split(d_model, dim=1)), ("one launch", [packed])):
    launches = [project_launch(x, w.contiguous()) for w in weights]
    reports = [project_kernel().check[grid, block](*arguments) for grid, block, arguments, _ in launches]
    counts[name] = [sum(row) for row in zip(*((r.global_loaded, r.distinct_loaded) for r in reports))]
    print(f"{name:14s}: requested {counts[name][0]:9,} bytes, distinct {counts[name][1]:8,}")
print(f"saved distinct bytes: {counts['three launches'][1] - counts['one launch'][1]:,}; x is {4 * n * d_model:,}")

# %% [markdown]
# The threads ask for the same. What is saved is the second and third reading of `x` from slow memory, where it did not
# stay in the cache anyway. The result is one array (n, 3d), and here strides pay once more: K begins `d_model` numbers
# later, with rows `3 * d_model` apart. The same kernel reads it, uncopied.

# %%
_, _, _, qkv = launches[0]                                          # (n, 3 * d_model)
q, k, v = (part.contiguous()[None] for part in qkv.split(d_model, dim=1))
grid, block, shared, arguments, out = attend_launch(q, k, v, heads, None, True)
attend_kernel().fast[grid, block, shared](*arguments)               # from three arrays

flat, packed_out = qkv.flatten(), torch.zeros_like(out)
views = [flat[part * d_model:] for part in range(3)]                # Q, K and V begin d_model apart
sizes = list(arguments[5:])
sizes[5:8] = [3 * d_model] * 3                                      # and their rows 3 * d_model
attend_kernel().fast[grid, block, shared](*views, None, packed_out, *sizes)
print("read from the packed array, the same to the bit:", torch.equal(out, packed_out))

# %% [markdown]
# ## Traps
#
# Statements from slides, glossaries and tutorials. Say what is wrong before you open the answer.

# %% [markdown]
# ### "Complexity grows with each attention head"
#
# *Which complexity, and what is held fixed?*
#
# <details><summary>Answer</summary>
#
# With `d_model` fixed, the FLOPs do not depend on the number of heads (section 2.4). The memory of the scores does, if
# they are written out. With `d_head` fixed, and heads really *added*, everything grows, the parameters too.
#
# </details>

# %%
n, d_model = 1024, 512
print("GFLOPs of scores and blends:")
print("heads   with d_model = 512   with d_head = 64   scores, million numbers")
for h in (8, 16, 32):
    print(f"{h:5d} {4 * n * n * d_model / 1e9:20.1f} {4 * n * n * h * 64 / 1e9:19.1f} {h * n * n / 1e6:18.0f}")

# %% [markdown]
# ### "Pass the attention scores of the heads through a final linear layer"
#
# *What is concatenated?*
#
# <details><summary>Answer</summary>
#
# The heads' **outputs**, `(seq, n_heads * d_v)`. The scores are `(n_heads, n_queries, n_keys)`; a matrix of fixed size
# could not take them, because `n_keys` changes with the text.
#
# </details>

# %%
small = MultiHeadAttention(16, 4).double()
for n in (5, 9):
    with torch.no_grad(), record(small) as cache:
        small(torch.zeros(1, n, 16, dtype=torch.float64))
    print(f"{n} tokens: scores {tuple(cache['weights'].shape[1:])}, outputs {tuple(cache['outputs'].shape[1:])}, "
          f"last matrix {tuple(small.w_o.shape)}")

# %% [markdown]
# ### "The attention of a layer is the mean over its heads"
#
# *`nn.MultiheadAttention` returns exactly that. Could the layer have computed its output from it?*
#
# <details><summary>Answer</summary>
#
# No. Each head blends its own values by its own weights. The mean map belongs to no head. In the model of section 2.5
# the mean of layer 0 hides that some heads look at the previous token and others do not.
#
# </details>

# %%
x = torch.from_numpy(rng.standard_normal((1, 6, 16)))
with torch.no_grad():
    out, mean_map = torch_layer(x, x, x)
    w_q, w_k, w_v, w_o = weights_from_torch(torch_layer.in_proj_weight, torch_layer.out_proj.weight)
    from_mean = mean_map @ (x @ w_v) @ w_o
print("the returned map:", tuple(mean_map.shape))
print("the output follows from it:", torch.allclose(from_mean, out, atol=0.01))

# %% [markdown]
# ### "The decoder uses the keys and values of the encoder's self-attention"
#
# *How many key matrices does a Transformer with two encoder and two decoder layers have?*
#
# <details><summary>Answer</summary>
#
# Six: two in the encoder, and in each decoder layer one for its self-attention and one for its cross-attention, which
# is applied to the encoder's *output*.
#
# </details>

# %%
deep = EncoderDecoder(10, 10, d_model=16, n_heads=2, n_layers=2)
keys = [name for name, _ in deep.named_parameters() if name.endswith("w_k")]
print(len(keys), "key matrices;", len({id(deep.get_parameter(name)) for name in keys}), "different ones")

# %% [markdown]
# ### "The energy of a language model is dominated by attention"
#
# *After how many tokens does attention take half of the FLOPs of the next token?*
#
# <details><summary>Answer</summary>
#
# For a model of 70 billion parameters, 80 layers and `d_model` 8192, after about 53,000 tokens. After a thousand it is
# 2 %. A token costs $2N$ FLOPs in the matrices and $4\,n\,d_\text{model}$ in each layer's attention over $n$ tokens.
# (A causal prompt as a whole reaches one half at twice the length.)
#
# </details>

# %%
parameters, layers, d_model = 70e9, 80, 8192
for n in (1_000, 8_000, 32_000, 128_000):
    attention = 4 * n * d_model * layers
    print(f"{n:7,d} tokens: scores and blends are {attention / (2 * parameters + attention):4.0%} of the FLOPs")
print(f"one half at {2 * parameters / (4 * d_model * layers):,.0f} tokens")

# %% [markdown]
# (That counts FLOPs. Bytes are another matter: lectures 04 and 05.)
#
# ### "d_head is d_model / h"
#
# *Is that a law?*
#
# <details><summary>Answer</summary>
#
# A convention, which keeps the cost of a layer fixed. Section 2.4 ran 16 heads of 24 in a model of 64. `w_o` brings any
# width back to `d_model`. What must agree is the width of queries and keys; values may be narrower still.
#
# </details>

# %%
d_model, h = 16, 3
w = [rng.standard_normal(shape) for shape in ((d_model, h * 7), (d_model, h * 7), (d_model, h * 2), (h * 2, d_model))]
x = rng.standard_normal((5, d_model))
print("3 heads, queries and keys of 7, values of 2:", multi_head_attention_numpy(x, x, *w, h).shape)

# %% [markdown]
# ### "To get the heads, reshape to (batch, heads, seq, d_head)"
#
# *The shape is right. What is in head 0?*
#
# <details><summary>Answer</summary>
#
# Parts of the first tokens, all of their numbers. A reshape never moves a number; it cuts the same row of numbers at
# other places. Heads need the axis of the heads cut out of the last one, and then a swap.
#
# </details>

# %%
x = np.arange(4)[:, None] * 10 + np.arange(6)                    # token t, number c is 10 t + c
print("reshaped only:\n", x.reshape(2, 4, 3)[0])
print("split:\n", split_heads(x, 2)[0])

# %% [markdown]
# ## Going further
#
# Sections that stand alone.

# %% [markdown]
# ### Seeing heads: the viewer and BertViz
#
# Hover over a token; choose a layer and a head. First the model of section 2.5, on a segment of eight tokens in two
# rounds, in our viewer and in BertViz's model view, which shows all heads at a glance.

# %% tags=["nbval-ignore-output"]
letters = [*"ABCDEFGH"] * 2
w = attention_maps(two_layers[0][0], torch.tensor([[3, 17, 8, 29, 11, 0, 22, 5] * 2]))
plotting.head_viewer(w, letters, "Two layers of four heads on ABCDEFGH ABCDEFGH: choose layer 1 and the second C.")

# %% tags=["nbval-ignore-output"]
plotting.bertviz_model_view(w.round(3), letters, "The same in BertViz's model view, which is interactive; "
                            "where scripts do not run, its picture is that above.")

# %% [markdown]
# *Predict.* MiniLM, the pretrained encoder of lecture 01: will its heads look as tidy?

# %% tags=["nbval-ignore-output"]
sentence = "The animal didn't cross the street because it was too tired."
weights, tokens = data.minilm_attention(sentence)
plotting.head_viewer(weights, tokens, "Six layers of twelve heads of MiniLM on the sentence about the tired animal.")

# %%
plotting.bertviz_model_view(weights[:2].round(3), tokens, "Layers 0 and 1 of MiniLM, twelve heads each, in BertViz.")

# %% [markdown]
# ### Do the heads of a real model have names?
#
# **In how many of MiniLM's 72 heads is there a pattern that one can name?** Five candidates: the token itself, the one
# before, the one after, the start token [CLS], the end token [SEP]. A head gets a name if it gives more than 0.6 of its
# weight to one of them, on average over four sentences.

# %%
texts = [sentence, "The old man the boats while the young wait at home.",
         "She gave the book to her brother because he had asked for it.",
         "Numbers are translated word by word, except that the units come first."]

def named_shares(w):
    """Mean weight (layers, heads) on: the token itself, the one before, the one after, the first, the last."""
    inner = w[:, :, 1:-1]                                              # queries without [CLS] and [SEP]
    n = inner.shape[2]
    here = np.arange(n)
    return {"itself": inner[:, :, here, here + 1].mean(-1), "previous": inner[:, :, here, here].mean(-1),
            "next": inner[:, :, here, here + 2].mean(-1),
            "[CLS]": inner[..., 0].mean(-1), "[SEP]": inner[..., -1].mean(-1)}

found = [named_shares(data.minilm_attention(text)[0]) for text in texts]
shares = {name: np.mean([f[name] for f in found], axis=0) for name in found[0]}
named = {name: int((share > 0.6).sum()) for name, share in shares.items()}
print(named, " without a name:", 72 - sum(named.values()))

# %% [markdown]
# Most have none of these names, and 17 of those that have one look at the start token, which every sentence has (why,
# is a question for lecture 05). Clark et al. (2019, arXiv 1906.04341) looked at BERT with many more candidates and
# found heads for the next token, for delimiters and for some grammatical relations. A name is a hypothesis that has
# passed a test; most heads have not been given one.
#
# #### Which of them does the model miss?
#
# The same ablation as in section 2.6: each head alone is silenced, and we see how far the sentence vectors turn.

# %%
model, tokenizer = data.minilm()
inputs = tokenizer(texts, return_tensors="pt", padding=True)

@torch.no_grad()
def sentence_vectors():
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1), dim=-1)

def turned_by(layer, head):
    """Mean of 1 - cosine between the sentence vectors with and without a head."""
    def silence(_module, _inputs, outputs):
        context = outputs[0].clone()
        context[..., head * 32:(head + 1) * 32] = 0.0
        return context, *outputs[1:]
    handle = model.encoder.layer[layer].attention.self.register_forward_hook(silence)
    turned = 1 - (sentence_vectors() * intact).sum(-1).mean().item()
    handle.remove()
    return turned

intact = sentence_vectors()
turned = np.array([[turned_by(layer, head) for head in range(12)] for layer in range(6)])

# %%
order = np.sort(turned.ravel())[::-1]
plotting.curves({"one head of 72 silenced": order}, xlabel="heads, from the most to the least important",
                ylabel="1 - cosine with the intact vector", title="A few heads matter, most hardly do").set_ylim(0)
plotting.show("Seventy-two values sorted: a few high ones, then a long low tail.")
print("the ten most important heads do more than the other 62 together:", order[:10].sum() > order[10:].sum())

# %% [markdown]
# ### Rollout, where the truth is known
#
# Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928; lecture 01) multiplies the maps of all layers, mixed half
# and half with the identity, to say from which *input* tokens an output comes. **Does it find the right ones?** In the
# induction model we know them. The prediction at $i$ needs three tokens: $i$ itself, its twin at $i - \text{period}$,
# and the one after that, which is the answer.

# %%
def rollout(weights):
    """Weights (layers, heads, n, n) to one map (n, n), from the last layer back to the input."""
    result = np.eye(weights.shape[-1])
    for layer in weights.mean(axis=1):
        result = (0.5 * layer + 0.5 * np.eye(len(layer))) @ result
    return result

def removal(model, ids, position, period=20):
    """How much each input token matters for the prediction at a position: mean rise of the loss when it is replaced."""
    target = ids[:, position + 1 - period]
    with torch.no_grad():
        before = F.cross_entropy(model(ids)[:, position], target).item()
        rises = []
        for j in range(position + 1):
            changed = ids.clone()
            changed[:, j] = (changed[:, j] + 7) % 32
            rises.append(F.cross_entropy(model(changed)[:, position], target).item() - before)
    return np.array(rises)

position = 30
model = two_layers[0][0]
shares = rollout(attention_maps(model))[position, :position + 1]
rises = removal(model, ids_20, position)
needed = [position, position - 20, position - 19]
print("rollout:  the three largest shares are at", sorted(np.argsort(-shares)[:3].tolist()))
print("removing: the three worst losses are at  ", sorted(np.argsort(-rises)[:3].tolist()))
print("needed:                                  ", sorted(needed))
others = [0, 1, 2, 3, 4, 29]
print(f"rollout's shares of {others}, the largest is 1:", *np.round(shares[others] / shares.max(), 1))
print("their removal: less than a tenth of the largest rise:", rises[others].max() < 0.1 * rises.max())

# %%
plotting.curves({"rollout: share": shares / shares.max(), "removal: rise of the loss": rises / rises.max()},
                xlabel="input position", ylabel="relative to the largest",
                title="What the prediction at position 30 depends on: tokens 10, 11 and 30")
plotting.show("Two curves over the input positions 0 to 30, highest at 11 and 30 with a shoulder at 10; rollout alone "
              "also has a low plateau over 0 to 4 and a step at 29.")

# %% [markdown]
# It does. It also gives about a tenth of the largest share to token 29, which the previous-token heads write into
# position 30, and to each of tokens 0 to 4; replacing any of these raises the loss by less than a tenth of the largest
# rise. Rollout knows where information *went*. Whether it was used, only removal tells.

# %% [markdown]
# ### Sentiment: what a layer of attention adds to a bag of words
#
# Lecture 01 asked what a sentiment model looks at. Here: **why does it need a Transformer at all?** Reviews of twelve
# words with one opinion. In half of them *not* stands right before the opinion; in the others it stands among the first
# three words, where it denies nothing. Every review contains *not*, so counting it says nothing.

# %%
words = ["great", "tasty", "kind", "awful", "bland", "rude", "not",
         "the", "food", "staff", "was", "and", "we", "sat", "table", "menu"]

def reviews(rng, batch=64, length=12):
    """Words (batch, 12), positive (batch,), place of the opinion, and whether it is negated."""
    x = rng.integers(7, len(words), size=(batch, length))
    positive, negated = rng.integers(2, size=(2, batch))
    rows, place = np.arange(batch), rng.integers(4, length, size=batch)
    x[rows, place] = np.where(positive ^ negated, 0, 3) + rng.integers(3, size=batch)
    x[rows, np.where(negated, place - 1, rng.integers(0, 3, size=batch))] = 6
    return torch.from_numpy(x), torch.from_numpy(positive), place, negated

class Sentiment(nn.Module):
    """The mean of the word vectors, with or without an encoder layer before it, and a linear classifier."""

    def __init__(self, attend, d_model=16):
        super().__init__()
        self.embedding, self.out = nn.Embedding(len(words), d_model), nn.Linear(d_model, 2)
        self.layer = EncoderLayer(d_model, 2) if attend else nn.Identity()

    def forward(self, x):
        return self.out(self.layer(self.embedding(x))).mean(1)

# %%
exam_x, exam_y, place, negated = reviews(np.random.default_rng(9), 2000)

def train_sentiment(attend, seed):
    rng = np.random.default_rng(seed)
    model = training.initialise(Sentiment(attend).double(), seed)
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
    training.fit(model, (reviews(rng) for _ in range(300)), loss, steps=300, lr=1e-2)
    return model

readers = {attend: [train_sentiment(attend, seed) for seed in range(3)] for attend in (False, True)}
with torch.no_grad():
    right = {attend: [(model(exam_x).argmax(-1) == exam_y).double().mean().item() for model in three]
             for attend, three in readers.items()}
print("bag of words: below 0.65, each seed:        ", max(right[False]) < 0.65)
print("one encoder layer: above 0.95, each seed:   ", min(right[True]) > 0.95)

# %% [markdown]
# A bag of words can only add votes, and here they cancel. What does the layer do to a good word? The votes can be read
# position by position, because the classifier takes their mean.
#
# *Predict.* In "not great": does the vote of *great* turn, or does *not* outvote it?

# %%
with torch.no_grad():
    for seed, model in enumerate(readers[True]):
        logits = model.out(model.layer(model.embedding(exam_x)))                     # (2000, 12, 2)
        votes = (logits[..., 1] - logits[..., 0]).numpy()
        vote, before = votes[np.arange(2000), place], votes[np.arange(2000), place - 1]
        rest = votes.sum(1) - vote - before
        good = exam_x[np.arange(2000), place].numpy() < 3
        denied, alone = good & (negated == 1), good & (negated == 0)
        of_whom = vote[alone], vote[denied], before[denied], rest[denied]
        sides = ["for" if v.mean() > 0 else "against" for v in of_whom]
        print(f"seed {seed}: good word alone {sides[0]}, after 'not' {sides[1]};",
              f"that 'not' {sides[2]}, the other words {sides[3]}")

# %% [markdown]
# Three seeds, and three ways: in the first *great* turns, against all others; in the second everything turns; in the
# third *great* stays for, and the others, which have read both words, outvote it. In each of them some vector is no
# longer that of the dictionary, but rewritten by its neighbours. That is what a *contextual* embedding is. BERT
# (Devlin et al. 2018, arXiv 1810.04805) is twelve or twenty-four such layers, trained to fill in missing words.

# %% [markdown]
# ## Glossary
#
# The first line of each function's or class's own description, from lecture 01 and this one. If a definition changes in
# the code, it changes here.

# %%
import inspect

from IPython.display import Markdown

from attention import fundamentals, multi_head

terms = {"attention (SDPA)": fundamentals.attention_numpy, "attention weight": fundamentals.attention_weights,
         "causal mask": fundamentals.causal_mask, "multi-head attention": multi_head.multi_head_attention_numpy,
         "head": multi_head.split_heads, "output aggregation": multi_head.head_contributions,
         "previous-token and induction score": multi_head.pattern_scores, "ablation": multi_head.without_heads,
         "position bias": multi_head.DistanceBias, "Transformer layer": multi_head.Block,
         "language model": multi_head.TransformerLM, "encoder-decoder": multi_head.EncoderDecoder}
rows = ["| term | in the code | what it is |", "|---|---|---|"]
rows += [f"| {term} | `{thing.__name__}` | {inspect.getdoc(thing).splitlines()[0]} |" for term, thing in terms.items()]
Markdown("\n".join(rows))

# %% [markdown]
# *Self-attention* is `multi_head_attention(x, x, ...)`, *cross-attention* is `multi_head_attention(x, y, ...)`. A
# *head* is one set of $W^Q_i, W^K_i, W^V_i$ with its block of $W^O$. *Queries*, *keys* and *values* are the three
# projections; the *residual stream* is the sum that every layer reads from and adds to.
#
# ## Summary
#
# - One head returns one blend. Several heads return several, and what was found in different places stays apart.
# - The matrices of all heads lie side by side in one; a head is a block of its columns, and a block of rows of $W^O$.
#   FLOPs do not depend on how many heads there are, the memory of the scores does, and the rank of a head's scores is
#   at most $d_\text{head}$.
# - Concatenate and project is a sum over heads. So heads can be silenced, measured and distributed one by one.
# - Trained on repetition, a two-layer model forms previous-token heads and induction heads, suddenly and together; one
#   layer cannot. Most single heads are dispensable; the groups that do a job are not.
#
# **Exercises left.**
#
# 1. One head, unequal weights, and a feed-forward layer after it: can it subtract after all, if the values are only
#    the digits 0 to 9? (Think of $0.9\, v_a + 0.1\, v_b$.)
# 2. Train the model of section 2.5 with one head in each layer. Does it still jump?
# 3. Prune the induction model in the *worst* order. How few heads must go before it fails?
# 4. Give the encoder-decoder two layers. Which layer's cross heads are aligned?
#
# **Sources.** Vaswani et al. 2017 (arXiv 1706.03762) · Devlin et al. 2018 (1810.04805) · Michel, Levy, Neubig 2019
# (1905.10650) · Voita et al. 2019 (1905.09418) · Clark et al. 2019 (1906.04341) · Shoeybi et al. 2019 (1909.08053) ·
# Raffel et al. 2019 (1910.10683) · Bhojanapalli et al. 2020 (2002.07028) · Abnar, Zuidema 2020 (2005.00928) · Elhage et
# al. 2021, A Mathematical Framework for Transformer Circuits (transformer-circuits.pub) · Olsson et al. 2022
# (2209.11895).
