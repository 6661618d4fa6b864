# ---
# jupyter:
#   course:
#     edition: 2
#     experiments:
#     - needle_in_text
#     - pair_correlations
#     - Retriever
#     - fact_batches
#     - retrieval_loss
#     - accuracy
#     - with_attention
#     - train_retriever
#     - first_gradients
#     - GatedHead
#     - train_gated
#     module: differential
#     public:
#     - differential_attention_numpy
#     - differential_attention_torch
#     - differential_attention_cuda
#     - DifferentialAttention
#     - lambda_init
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["slide"]
# # Lecture 11 · Differential attention
#
# **The question.** Can a model subtract the noise of its own attention? **You will be able to** *subtract* one attention map
# from another (11A), *build* the layer with its λ (11B), *fuse* both maps in CUDA (11C), *pair* heads in a key group
# (11D), *test* that (11E), *rewrite* a sink as a gate (11F). **You need** attention (lecture 01), heads
# (lecture 02), flash attention (lecture 06), key groups (lecture 08).
#
# |part or section|core minutes|more minutes|
# |---|---|---|
# |Part 1 · one needle: 11.1|10| |
# |Part 2 · two maps: 11.2, exercise 11A|30| |
# |Part 3 · the layer: 11.3 to 11.5, exercise 11B|45| |
# |Part 4 · CUDA: 11.6, exercise 11C|35| |
# |Part 5 · does it matter: 11.7|5| |
# |Part 6 · what came after: 11.8 to 11.10, 11D, 11E, 11F|55| |
# |Going further: 11.11 to 11.14| |30|
# |**together**|**180**|**30**|
#
# **An exercise:** write in place of `raise NotImplementedError`, run the cell, then its `check`. Until yours passes, the
# lecture uses its own. Predict first.

# %% [markdown] tags=["teacher"]
# **For the teacher: two times 50 minutes, ten to spare in each.** Run everything before class.
#
# - *Hour 1 (40).* The needle, signal and noise (5) · 11.1: the lead that is needed, the head of a real model (8) · 11.2: the
#   subtraction, a negative weight, what 11A asks (9) · the correlation of the maps, predict first (8) · 11.3: λ and its table,
#   what 11B asks (10).
# - *At home after hour 1.* 11A, 11B.
# - *Hour 2 (40).* 11.4: why a norm (7) · 11.5: gradients of each layer (5) · 11.6: one pass, bytes and operations (8) · 11.7:
#   three seeds, nobody wins (6) · 11.8: pairs inside a group (6) · 11.9: a sink is a gate (8).
# - *At home after hour 2.* 11D, 11F. For volunteers 11C, 11E.
# - *Board.* $(\text{softmax}(S_1)-\lambda\,\text{softmax}(S_2))V$; under it what a row sums to.
# - *Always works.* After 11.2: let the class name a λ, then print `ratio(maps[0] - lam * maps[1])` for it, from 0 to 1.5 (4.6 at 0,
#   9.3 at 0.7, the best, 4.3 at 1.5).
# - *Checkpoint 1.* Two maps err independently. What does the subtraction do to the noise? (It adds: the variances add.)
#   *Checkpoint 2.* A head has nothing to say. What can softmax do, and what a gate? (Softmax must put its mass somewhere, on a
#   sink; a gate closes.)
# - *Skip first.* The learning rates of 11.5 and the trap of 11.6 (6 minutes).
# - *Questions that come.* Is a negative weight a probability? No, and nothing needs it to be. Why not subtract three maps? Nobody
#   forbids it; the paper has two. Is seed 1 broken, with its λ of -0.62? No: it answers as well as
#   the others (11.7).

# %%
import math
import os
import sys

sys.path.insert(0, "." if os.path.exists("course.py") else "..")

import numpy as np
import torch
from torch import nn

from utils import cuda, plotting, training
from utils.check import check

torch.set_num_threads(1)  # tiny models: one thread is fastest

# %% [markdown]
# ## Part 1 · One needle, a thousand distractors
#
# A query and 1,024 keys. One key is what the query looks for, the **needle**, with a score of 6. The others are distractors: random
# scores around 0. Column 0 of the values holds what the needle says, the others what they say.
#
# *Predict.* $e^6=403$. Which weight does the needle get: 0.9, 0.5 or 0.2?

# %% tags=["first-attention", "slide"]
from attention.fundamentals import softmax

rng = np.random.default_rng(11)
needle, root = 700, math.sqrt(32)
query = rng.standard_normal(32)
query *= root / np.linalg.norm(query)
keys, values = rng.standard_normal((1024, 32)), rng.standard_normal((1024, 64))
keys[needle] = 6 * query / root  # a score of 6: 6 * |query|^2 / 32
values[:, 0], values[needle] = 0.0, np.eye(64)[0]

def signal_and_noise(out):
    return out[0], np.sqrt((out[1:] ** 2).mean())

weights = softmax(keys @ query / root)
signal, noise = signal_and_noise(weights @ values)
print(f"needle {weights[needle]:.3f}, distractors {1 - weights[needle]:.3f}")
print(f"output: signal {signal:.3f}, noise {noise:.3f}, ratio {signal / noise:.1f}")

# %% [markdown]
# About a fifth. Each distractor gets little, but there are a thousand of them. Their values have nothing in common, so most of it
# cancels in the output; what remains is the **noise**, one fifth of the signal. This ratio will be found again from two
# maps, in PyTorch, from two flash calls and from a kernel. Can it be larger?
#
# ### 11.1 The attention-noise problem
#
# **What does a longer text do to the needle?** Its weight is $e^s/(e^s+\sum_je^{s_j})$. If the $n$ distractors have equal scores,
# and the needle's lead over them is $s$, it gets nine tenths when $e^s=9n$: the lead has to be $\ln 9n$.
#
# *Predict.* Random scores of variance 1, not equal ones: is the lead that is needed larger or smaller?

# %% tags=["slide"]
counts, needed = 10 ** np.arange(2, 7), []
for n in counts:
    scores = np.random.default_rng(n).standard_normal(n)
    needed.append(math.log(9) + math.log(np.exp(scores).sum()))
    print(f"{n:9,} distractors: a lead of {needed[-1]:4.1f} is needed, "
          f"ln 9n = {math.log(9 * n):4.1f}")
leads = {f"lead of {s}": 1 / (1 + counts * np.exp(0.5 - s)) for s in (6, 10, 14)}
plotting.curves(leads, x=counts, xlabel="distractors",
                ylabel="weight of the needle", threshold=0.9,
                threshold_name="nine tenths",
                title="Any fixed lead is diluted when the text grows"
                ).set_xscale("log")
plotting.show("Weight of the needle against the number of distractors, logarithmic: "
              "three falling curves, the lead of 6 lost first, that of 14 last.")

# %% [markdown]
# Larger, by half the variance of the scores, 0.5: the mean of $e^{s_j}$ is $e^{1/2}$. And each tenfold length asks for 2.3
# more. Scores are products of bounded vectors, so a lead cannot grow for ever. This dilution is the **attention noise** that
# the lecture is about.
#
# Now a trained model. SmolLM2 reads that the code of a door is 7419, then more and more prose, then the question up to the 7. The
# head that finds the 4 best in the short text is head 4 of layer 17.
#
# *Predict.* How much of its attention do 512 tokens of prose take away from the 4?

# %% tags=["language-model", "slide"]
from attention.experiments.differential import needle_in_text
from utils import language_model

smollm = language_model.load()
if smollm:
    for n in (16, 64, 256, 512):
        text = language_model.excerpt(smollm, 8 + n)
        row = needle_in_text(smollm, text)[17, 4]  # weights of the last token
        found, first = row["needle"], row["first"]
        rest = 1 - found - first
        print(f"{n:3d} tokens of prose: needle {found:.2f}, first token {first:.2f}, "
              f"all others {rest:.2f}")

# %% [markdown]
# Hardly any: all other tokens together get one to three hundredths, whatever the length. This head has learned a lead that is large
# enough for its texts. What the needle loses goes to the **first token**, the sink of lecture 05: softmax has to put its mass
# somewhere. Noise is what an *uncertain* head suffers from; sections 11.9 and 11.10 come back to the sink.
#
# ## Part 2 · Two maps
#
# %% [markdown] tags=["slide"]
# ### 11.2 The dual softmax
#
# **Where does an amplifier's noise go?** A differential amplifier has two inputs that pick up the same hum, and outputs their
# difference. Differential attention (Ye et al. 2024, arXiv 2410.05258) has two queries and two keys, so two maps, and one value:
#
# $$\text{DiffAttn}=\Big(\text{softmax}\big(\tfrac{Q_1K_1^\top}{\sqrt d}\big)
#   -\lambda\,\text{softmax}\big(\tfrac{Q_2K_2^\top}{\sqrt d}\big)\Big)V$$
#
# Let the second map see the same distractors, nearly (its scores have a correlation of 0.8 with the first), but not the needle.
#
# *Predict.* With $\lambda=0.8$: what does a row of weights sum to, and can a weight be negative?

# %% tags=["slide"]
rho, lam = 0.8, 0.8
other = rng.standard_normal((1024, 32))
keys2 = rho * keys + math.sqrt(1 - rho**2) * other
keys2[needle] = 0.0  # a score of 0
maps = weights, softmax(keys2 @ query / root)

def ratio(w):  # signal to noise
    signal, noise = signal_and_noise(w @ values)
    return signal / noise

out = np.zeros(64)
for j in range(1024):  # the formula, one value after another
    out += (maps[0][j] - lam * maps[1][j]) * values[j]
difference = maps[0] - lam * maps[1]
print(f"row sums to {difference.sum():.3f}, smallest weight {difference.min():.4f}")
print(f"signal {out[0]:.3f}, ratio {out[0] / signal_and_noise(out)[1]:.1f}, "
      f"one map {ratio(weights):.1f}")

# %% [markdown]
# It sums to $1-\lambda$, and some weights are negative: the head can say "not this". The signal is the same, for the second map
# does not see the needle; the noise is nearly halved.
#
# #### Exercise 11A: subtract a map  (difficulty 2 of 5, essential, 15 minutes; if you do only two)
#
# Write differential attention for any leading axes, the last of them the heads.
#
# |argument|shape|meaning|
# |---|---|---|
# |`q1`, `q2`|`(..., heads, n_queries, d_head)`|queries of the two maps|
# |`k1`, `k2`|`(..., heads, n_keys, d_head)`|keys of the two maps|
# |`v`|`(..., heads, n_keys, d_v)`|values of both|
# |`lam`|number or `(heads,)`|λ, the same for all heads or one for each|
# |`causal`|bool|the last query sees all keys, in both maps|
#
# Returns `(..., heads, n_queries, d_v)` in the float type of `q1`; a query that sees nothing gets zeros.
# `attention_weights(q, k, causal=causal)` of lecture 01 makes one map.
#
# <details><summary>Hint</summary>
#
# Is anything shared by the two softmaxes? With `lam` of shape `(heads,)`, which axes must follow before it can be multiplied with
# `(heads, n_queries, n_keys)`? How often is `v` multiplied? Which float type has `lam`?
#
# </details>

# %%
from attention.fundamentals import attention_weights

# %% tags=["exercise", "export"] kind="numpy"
def subtract_map(q1, k1, q2, k2, v, lam, causal=False):
    """(softmax(q1 k1ᵀ/√d) - lam softmax(q2 k2ᵀ/√d)) v; lam a number or (heads,).

    q1, q2 (..., heads, n_queries, d_head), k1, k2 (..., heads, n_keys, d_head),
    v (..., heads, n_keys, d_v). Returns the float type of q1. Source: Ye et al. 2024.
    """
    ### BEGIN SOLUTION
    lam = np.asarray(lam, q1.dtype)[..., None, None]
    first = attention_weights(q1, k1, causal=causal)
    second = attention_weights(q2, k2, causal=causal)
    return ((first - lam * second) @ v).astype(q1.dtype, copy=False)
    ### END SOLUTION

# %%
subtract_map = check("11A", subtract_map)

# %%
one_head = [a[None] for a in (query[None], keys, query[None], keys2, values)]
for factor in (0.0, 0.8):
    found = subtract_map(*one_head, factor)[0, 0]
    print(f"lambda {factor}: signal {found[0]:.3f}, "
          f"ratio {found[0] / signal_and_noise(found)[1]:.1f}")

# %% [markdown]
# With $\lambda=0$ it is attention. This is what flows where, with 6 of the keys (the colours of each array go from its own smallest to its own
# largest number: the brightest weight of map 2 is about 0.001):

# %% tags=["slide"]
few = slice(needle - 2, needle + 4)
drawn = {"q1": query[None], "k1": keys[few], "q2": query[None], "k2": keys2[few],
         "map 1": maps[0][None, few], "map 2": maps[1][None, few],
         "difference": difference[None, few], "v": values[few], "out": out[None]}
plotting.flow(
    drawn,
    [(("q1", "k1"), "map 1", "softmax"), (("q2", "k2"), "map 2", "softmax"),
     (("map 1", "map 2"), "difference", "map 1 - λ map 2"),
     (("difference", "v"), "out", "· v")],
    title="Two maps, one difference, one set of values")
plotting.show("Data flow: queries and keys 1 and 2 give two maps, the second is "
              "multiplied by lambda and subtracted, the difference weighs the values.")

# %% [markdown]
# #### Does subtraction cancel noise?
#
# The second map was given the same distractors. **What if the two maps do not err alike?** For random values the noise is
# $\sqrt{\sum_jw_j^2}$ over the distractors. We draw both maps with a correlation $\rho$ of their distractors' scores, 0 where they are
# independent.
#
# *Predict.* At $\rho=0$: does subtracting with $\lambda=0.8$ make the ratio better, worse, or leave it?

# %% tags=["slide"]
def mean_ratio(rho, lam, draws=40):
    """Signal to noise of maps whose distractors' scores are correlated; needle 6, 0."""
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        first, fresh = rng.standard_normal((2, 1023))
        second = rho * first + math.sqrt(1 - rho**2) * fresh
        w = softmax(np.append(first, 6.0)) - lam * softmax(np.append(second, 0.0))
        found.append(w[-1] / np.sqrt((w[:-1] ** 2).sum()))
    return np.mean(found)

rhos = np.array([0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95])
ratios = {"softmax": np.array([mean_ratio(r, 0.0) for r in rhos]),
          "differential, λ 0.8": np.array([mean_ratio(r, 0.8) for r in rhos])}
for name, found in ratios.items():
    print(f"{name:19s}", *(f"{r}: {x:.1f} " for r, x in zip(rhos, found)))
plotting.curves(ratios, x=rhos, xlabel="correlation of the two maps' distractors",
                ylabel="signal to noise",
                title="Subtraction helps where both maps err alike, and harms at 0")
plotting.show("Signal to noise against the correlation: softmax is flat near five; "
              "differential attention begins below it and rises to fifteen.")

# %% [markdown]
# **Worse**: 4.2 in place of 4.7. Independent errors do not cancel, their variances add. The subtraction pays from a correlation of about
# 0.3, and pays much above 0.8. (The *sum* of the distractors' weights is near 0 for every $\rho$: that sum is not the noise.) So
# the claim is about training: gradient descent has to make two maps that differ in the needle and agree in their errors. Do two
# heads of a trained model err alike, at least?
#
# *Predict.* In SmolLM2, nine heads a layer, three on each key head: the correlation of two heads' scores over the same tokens?

# %% tags=["language-model", "slide"]
from attention.experiments.differential import pair_correlations

if smollm:
    prose = language_model.excerpt(smollm, 256)
    same, across = pair_correlations(smollm, prose)  # (30,), (30,): by layer
    print(f"two heads of one key group: {same.mean():.2f}, "
          f"of two groups: {across.mean():.2f}")
    plotting.curves({"one key group": same, "two key groups": across},
                    xlabel="layer", ylabel="correlation of scores", threshold=0.3,
                    threshold_name="where subtraction begins to pay",
                    title="Scores of two heads agree, and more where they share keys")
    plotting.show("Correlation of two heads' scores in each of 30 layers: pairs of one "
                  "key group lie above pairs of two groups nearly everywhere.")

# %% [markdown]
# They do: 0.71 inside a key group, 0.54 across. (The line at 0.3 is that of our needle and $\lambda=0.8$; and a correlation of scores counts
# what both heads look for, too, not errors alone.) This model never learned to subtract, so it proves nothing about one that did; but
# the hum is there, and it is larger where keys are shared. Section 11.8 uses that.

# %% [markdown]
# ## Part 3 · The layer
#
# ### 11.3 Lambda dynamics
#
# **Who chooses λ?** The model, by gradient descent, one λ for each layer. It is not one number but made from four vectors of
# `d_head` numbers, so that it learns at the pace of the other weights (§ 2.1 of the paper):
#
# $$\lambda=e^{\lambda_{q1}\cdot\lambda_{k1}}-e^{\lambda_{q2}\cdot\lambda_{k2}}+\lambda_\text{init}\qquad
#   \lambda_\text{init}=0.8-0.6\,e^{-0.3\,\text{depth}}$$
#
# The depth counts layers from 0 (the paper writes $l-1$, with $l$ from 1).

# %% tags=["export"]
def lambda_init(depth):
    """The fixed part of lambda in layer `depth`, from 0: .2, .356, .471, .556 ..."""
    if depth < 0:
        raise ValueError(f"depth must be at least 0, got {depth}")
    return 0.8 - 0.6 * math.exp(-0.3 * depth)

# %% [markdown]
# *Predict.* The vectors start as small random numbers, of size 0.1. Where does λ start? And if they started as zeros, what would
# the gradient be?

# %%
print("layers 1 to 4:", *(f"{lambda_init(depth):.3f}" for depth in range(4)),
      f" layer 30: {lambda_init(29):.3f}")

def lam_of(vectors, depth=0):
    q1, k1, q2, k2 = vectors
    return (q1 @ k1).exp() - (q2 @ k2).exp() + lambda_init(depth)

rng = np.random.default_rng(0)
for name, start in (("random", 0.1 * rng.standard_normal((4, 8))),
                    ("zeros", np.zeros((4, 8)))):
    vectors = torch.from_numpy(start).requires_grad_()
    start = lam_of(vectors)
    start.backward()
    print(f"{name:6s}: lambda {start.item():.3f}, largest gradient "
          f"{vectors.grad.abs().max():.3f}")

# %% [markdown]
# Near $\lambda_\text{init}$ in both cases: the two exponentials are nearly 1 and cancel. But the gradient of $\lambda_{q1}$ is a multiple of
# $\lambda_{k1}$: from zeros, λ would never move. Nothing keeps λ between 0 and 1. (Of the models that they
# trained, an author of the paper reports values around 0.8 in deep layers, 0.2 or 0.4 in the first ones, some above 1, none negative:
# issue 1699 of microsoft/unilm, a comment, not a table.)
#
# #### The weights of the layer
#
# To keep the number of parameters, `n_heads` **halves**: a head has two queries and two keys of `d_head`, and values twice as wide.
# Heads $2i$ and $2i+1$ of `w_q` and `w_k` are a pair.

# %%
from attention.multi_head import Positions, masked_softmax, merge_heads, split_heads

# %% tags=["export"]
class DifferentialWeights(nn.Module):
    """n_heads pairs of queries and keys, d_head d_model / (2 n_heads); depth from 0.

    positions: rotates queries and keys. ValueError unless 2 n_heads divides d_model.
    """

    def __init__(self, d_model, n_heads, depth=0, positions=None):
        super().__init__()
        if n_heads < 1 or d_model % (2 * n_heads):
            raise ValueError(f"2 n_heads must divide d_model, got {n_heads}, {d_model}")
        self.n_heads, self.d_head = n_heads, d_model // (2 * n_heads)
        self.positions = Positions() if positions is None else positions
        self.lambda_init, self.factor = lambda_init(depth), 1 - lambda_init(depth)
        for w in ("w_q", "w_k", "w_v", "w_o"):
            setattr(self, w, nn.Parameter(torch.randn(d_model, d_model) / d_model**0.5))
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(self, name, nn.Parameter(0.1 * torch.randn(self.d_head)))
        self.norm = nn.RMSNorm(2 * self.d_head, eps=1e-5)

    def project(self, x, positions=None, cache=None):
        """q, k (batch, 2 n_heads, n, d_head) and v (batch, n_heads, n, 2 d_head)."""
        where = torch.arange(x.shape[1]) if positions is None else positions
        q, k, v = (split_heads(x @ w, 2 * self.n_heads)
                   for w in (self.w_q, self.w_k, self.w_v))
        q, k = (self.positions.rotate(a, where.to(x.device)) for a in (q, k))
        k, v = (k, v) if cache is None else cache.update(k, v)
        return q, k, merge_heads(v.unflatten(1, (self.n_heads, 2)))

# %% [markdown] tags=["slide"]
# #### Exercise 11B: the layer with its λ  (difficulty 3 of 5, essential, 25 minutes; if you do only two)
#
# Write the property `lam` and the method `forward`. The shape contract:
#
# |array|from|shape|
# |---|---|---|
# |`self.lam`|the four vectors and `self.lambda_init`, formula above|a tensor with one number|
# |`q`, `k`, `v`|`self.project(x, positions, cache)`|`(batch, 2 n_heads, n, d_head)`, the same, `(batch, n_heads, n, 2 d_head)`|
# |maps|`masked_softmax(scores, mask, causal)`, one for each of the $2\,n_\text{heads}$ queries|`(batch, 2 n_heads, n, n)`|
# |difference|map $2i$ minus λ times map $2i+1$|`(batch, n_heads, n, n)`|
# |head|the difference times `v`, through `self.norm`, times `self.factor`|`(batch, n_heads, n, 2 d_head)`|
#
# The heads are merged and go through `self.w_o`. Returns `(batch, n, d_model)`.
#
# <details><summary>Hint</summary>
#
# Which slice takes every second head, from 0 and from 1? By which width are the scores divided: that of a query or that of a
# value? Does the norm see one head at a time, and what is its last axis? Which of the two, norm and factor, comes first?
#
# </details>

# %% tags=["exercise", "export"] kind="module"
class DifferentialAttention(DifferentialWeights, nn.Module):
    """Multi-head differential attention (V1), called as MultiHeadAttention is.

    x (batch, n, d_model) to the same; mask boolean, True = may attend. Source: Ye et
    al. 2024 (arXiv 2410.05258), § 2.1.
    """

    @property
    def lam(self):
        ### BEGIN SOLUTION
        first = (self.lambda_q1 @ self.lambda_k1).exp()
        second = (self.lambda_q2 @ self.lambda_k2).exp()
        return first - second + self.lambda_init
        ### END SOLUTION

    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        q, k, v = self.project(x, positions, cache)
        ### BEGIN SOLUTION
        maps = masked_softmax(q @ k.mT / math.sqrt(self.d_head), mask, causal)
        difference = maps[:, 0::2] - self.lam * maps[:, 1::2]
        heads = self.norm(cuda.weighted_sum(difference, v)) * self.factor
        return merge_heads(heads) @ self.w_o
        ### END SOLUTION

# %%
DifferentialAttention = check("11B", DifferentialAttention)

# %% [markdown]
# transformers has the layer too, `DiffLlamaAttention`. It pairs head $i$ with head $i+H/2$ (the authors' code: $2i$ with $2i+1$), and its norm has
# no gain. So copied weights must change places.
#
# *Predict.* In double precision, how far apart are the two?

# %%
from transformers.models.diffllama import modeling_diffllama as diffllama

config = diffllama.DiffLlamaConfig(hidden_size=32, num_attention_heads=4,
                                   num_key_value_heads=4, attn_implementation="eager")
theirs = diffllama.DiffLlamaAttention(config, layer_idx=2).double()
layer = training.initialise(DifferentialAttention(32, 2, depth=2).double(), 0)
layer.norm.eps = config.rms_norm_eps

def by_halves(w):
    """Columns of heads 0 1 2 3 in the order 0 2 1 3."""
    return w.unflatten(1, (2, 2, 8)).transpose(1, 2).flatten(1)

with torch.no_grad():
    for name in ("q", "k", "v"):
        weight = by_halves(getattr(layer, f"w_{name}"))
        getattr(theirs, f"{name}_proj").weight.copy_(weight.T)
    theirs.o_proj.weight.copy_(layer.w_o.T)
    for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
        getattr(theirs, name).copy_(getattr(layer, name))
    x = torch.from_numpy(np.random.default_rng(4).standard_normal((1, 10, 32)))
    unturned = torch.ones(1, 10, 8).double(), torch.zeros(1, 10, 8).double()
    future = torch.full((10, 10), -math.inf).double().triu(1)
    right = theirs(x, unturned, future)[0]
    ours = layer(x, causal=True)
print(f"last token {ours[0, -1, 0]:.3f} and {right[0, -1, 0]:.3f}, "
      f"largest difference {(ours - right).abs().max():.6f}")

# %% [markdown]
# Nothing but rounding. (With positions, one difference more: the authors rotate interleaved pairs of columns, transformers halves.) Now λ in a
# training. The task stands in section 11.7: a list of facts, and questions about some of them.
#
# *Predict.* λ starts at 0.2 in the only layer. Does it rise, fall, or do three seeds disagree?

# %% tags=["approx"] approx={"numbers": 0.1, "picture": 0.05}
from attention.experiments.differential import train_retriever

runs = {(name, seed): train_retriever(name, seed)
        for name in ("softmax", "differential") for seed in range(3)}
traces = {f"seed {seed}": runs["differential", seed].lambdas for seed in range(3)}
for name, trace in traces.items():
    print(f"{name}: lambda {trace[0]:.2f} at first, {trace[-1]:.2f} in the end")
plotting.curves({k: np.array(v) for k, v in traces.items()},
                x=25 * np.arange(len(trace)), xlabel="step", ylabel="λ",
                threshold=0.2, threshold_name="λ_init",
                title="λ wanders, and each seed goes its own way")
plotting.show("Lambda against the training step: three curves start near 0.2 and end "
              "at different values.")

# %% [markdown]
# They disagree; seed 1 even *adds* the second map, which the authors met in none of their models. The two maps and λ are learned together, and at this size many combinations do
# the same.
#
# ### 11.4 GroupNorm's role
#
# **Why is there a norm behind the difference?** Rows sum to $1-\lambda$, and an uncertain head averages many values. The paper
# calls the norm GroupNorm, because each head is normalised alone; in the code it is an RMSNorm over the $2\,d_\text{head}$ numbers of a
# head, and no GroupNorm module is used.
#
# *Predict.* Even attention over $n$ random values of size 1: how large is the output for $n=64$ and 8,192?

# %% tags=["slide"]
norm = nn.RMSNorm(16, eps=1e-5).double()
sizes = {"before the norm": [], "after it": []}
lengths = [16, 64, 256, 1024, 4096, 8192]
for n in lengths:
    rng = np.random.default_rng(n)
    means = torch.from_numpy(np.array([rng.standard_normal((n, 16)).mean(0)
                                       for _ in range(50)]))
    for name, rows in (("before the norm", means), ("after it", norm(means))):
        sizes[name].append(float(rows.detach().square().mean().sqrt()))
    print(f"{n:5d} values: size {sizes['before the norm'][-1]:.3f}, after the norm "
          f"{sizes['after it'][-1]:.2f}, so a factor of "
          f"{sizes['after it'][-1] / sizes['before the norm'][-1]:4.1f}")
slopes = plotting.scaling({k: (lengths, v) for k, v in sizes.items()},
                          xlabel="values averaged", ylabel="size of the output (RMS)",
                          title="An even average shrinks with n; the norm undoes it")
plotting.show("Size of an average against the number of values, both logarithmic: "
              "before the norm it falls with slope minus one half, after it stays 1.")

# %% [markdown]
# It falls with $1/\sqrt n$: 0.12 and 0.01. The norm makes all of them 1, and so multiplies an output that says nothing by nearly 90. That
# is its use (heads of all kinds reach the next layer with the same size, and $1-\lambda$ does not matter) and its price: what was nearly
# silent becomes loud, and so does its gradient.
#
# Behind the norm stands the constant $1-\lambda_\text{init}$, "which aligns the gradient flow with Transformer" (figure 2 of the
# paper). Let us look: four layers, 36 tokens, the gradient of each layer's $W_V$ before the first step.
#
# *Predict.* Whose gradients are nearest to softmax's: with norm and factor, with the norm alone, or with neither?

# %% tags=["slide"]
from attention.experiments.differential import first_gradients

kinds = {"softmax": None, "norm and factor": {}, "norm alone": {"factor": 1.0},
         "neither": {"factor": 1.0, "norm": nn.Identity()}}
grads = {name: first_gradients(change) for name, change in kinds.items()}  # (3, 4)
times = {name: found / grads["softmax"] for name, found in grads.items()
         if name != "softmax"}
times["formula"] = 6 * (1 - np.array([lambda_init(depth) for depth in range(4)]))
for name, found in times.items():
    print(f"{name:15s} gradient of W_V, times softmax's, layers 1 to 4:",
          *(f"{g:.1f}" for g in np.atleast_2d(found).mean(0)))
plotting.curves(times, x=np.arange(1, 5), xlabel="layer", threshold=1,
                threshold_name="softmax", ylabel="gradient of $W_V$, times softmax's",
                title="The norm raises gradients, the factor takes a part back"
                ).set_ylim(0, 14)
plotting.show("Gradients against softmax's in four layers, three seeds: the norm alone "
              "five to eight times, norm and factor falling from six to two and a "
              "half, near the formula, neither about half.")

# %% [markdown]
# With neither. An even average of $n$ values has the size $1/\sqrt n$; the norm makes it 1, and the gradient $\sqrt n$ times as large (the
# formula: $\sqrt{36}\,(1-\lambda_\text{init})$). The factor takes a part back, more in each layer: from 5.8 to 2.6 times softmax's. So at the first step, when all maps are even, the
# argument does not hold; it needs heads that have found something. V2 drops the norm, and its authors report fewer spikes of the gradient.
#
# ### 11.5 Training considerations
#
# **Must the learning rate change?** If the gradient flow is aligned, the usual settings should do. We give each kind of model three
# rates, 200 steps, one seed.
#
# *Predict.* Is the best of the three the same for both?

# %% tags=["approx"] approx={"numbers": 0.25, "picture": 0.05}
for name in ("softmax", "differential"):
    reached = {lr: train_retriever(name, 0, lr=lr).accuracy[-1]
               for lr in (0.003, 0.01, 0.03)}
    print(f"{name:12s}", *(f" rate {lr}: {found:.2f}" for lr, found in reached.items()),
          " (chance 0.06)")

# %% [markdown]
# It is: 0.01, and 0.03 is too much for both. At 0.003, where neither is finished, the differential model is ahead. (Adam
# divides gradients by their usual size, so it is probably the larger *outputs* of its heads.) **A comparison at one learning rate says
# little about two mechanisms.**
#
# **Trap.** *"λ must be clipped to 0 ... 1, it is a share."* It is a factor, not a share; above 1 a row sums to less than 0, and the norm takes
# the size away. Clipping would stop its gradient.
#
# ## Part 4 · CUDA
#
# %% [markdown] tags=["slide"]
# ### 11.6 Performance: two maps, one pass
#
# **What do two maps cost?** With half the heads, the scores cost what they did: each head has two products $QK^\top$. If the maps are
# subtracted *before* they meet $V$ (twice as wide), so does the rest. But a flash kernel never holds a map. Below, operations
# are counted in $n^2d$, for each *pair* of heads.
#
# *Predict.* Two calls of flash attention, then a subtraction: how many operations, where two usual heads have 8?

# %%
ways = {"two usual heads": 2 * (2 + 2),
        "maps subtracted, then times V": 2 * 2 + 4,
        "two flash calls, V 2d wide": 2 * (2 + 4),
        "four flash calls, V in halves": 4 * (2 + 2),
        "one pass, two sums": 2 * 2 + 2 * 4}
for name, count in ways.items():
    print(f"{name:30s} {count:2d} n²d operations, {count / 8:.1f} times")

q1, k1, q2, k2, v = (torch.from_numpy(a)[None] for a in one_head)
sdpa = nn.functional.scaled_dot_product_attention
by_two_calls = (sdpa(q1, k1, v) - 0.8 * sdpa(q2, k2, v))[0, 0, 0].numpy()
print(f"needle by two calls: signal {by_two_calls[0]:.3f}, "
      f"ratio {by_two_calls[0] / signal_and_noise(by_two_calls)[1]:.1f}")

# %% [markdown]
# 1.5 times, and with kernels that need values as wide as keys, 2 times. "Equal operations at half the heads" holds for stored maps, and those are
# what flash attention avoids. The result is the same: flash kernels work unchanged.
#
# **What does one kernel for both maps save?** Bytes. A block has 16 queries, so keys and values pass by $n/16$ times, whatever the kernel. A key
# costs
#
# |way|floats of K and V a key and block|beside that|
# |---|---|---|
# |one pass|$2d + d_v = 4d$|one output written|
# |two calls, a kernel that takes $d_v \ne d$|$2d + 2d_v = 6d$|two outputs written, both read again, one written|
# |four calls, a kernel that needs $d_v = d$|$4d + 2d_v = 8d$|the same|
#
# The subtraction has to wait until the end: each map has a maximum and a sum of its own, and both still change. So a thread keeps **two
# maxima, two sums and two rows of output**, and one value from shared memory serves both.

# %%
from attention.flash import FLASH_HEAD

# %% tags=["export"]
DIFFERENTIAL_TOOLS = FLASH_HEAD + r"""
// This thread's score: query y of a tile with key x of another.
__device__ float score(const float* q_tile, const float* k_tile, int d) {
  float s = 0.0f;
  for (int t = 0; t < d; ++t)
    s += q_tile[threadIdx.y * (d + PAD) + t] * k_tile[threadIdx.x * (d + PAD) + t];
  return s;
}
// From a score to a weight; returns the factor for what was summed before.
__device__ float rescale(float s, float& weight, float& maximum, float& total) {
  float larger = fmaxf(maximum, row_max(s));
  float top = larger == -INFINITY ? 0.0f : larger;       // no key so far: -inf minus -inf is nan
  float shrink = expf(maximum - top);
  weight = expf(s - top);
  total = shrink * total + row_sum(weight);
  maximum = larger;
  return shrink;
}
__device__ float divided(float sum, float total) { return total == 0.0f ? 0.0f : sum / total; }
"""

# %% [markdown]
# #### Exercise 11C: both maps in one pass  (difficulty 4 of 5, useful, 20 minutes)
#
# Write the loop over the tiles of 16 keys. Given: `load_rows(tile, n_rows, width, stride, rows, first, end, d)` of lecture 06: all
# threads fill `n_rows` rows of `width` floats from row `first` on; what lies behind row `end` or column `d` of `rows` becomes 0.
# `score(q_tile, k_tile, d)` multiplies query y with key x, without `scale`; `may_attend(i, j, n_queries, n_keys, causal)` is false for
# keys that are not there, too; `rescale(s, weight, maximum, total)` sets this key's weight and returns the
# factor for what was summed before. Sixteen threads share a row.
#
# |name|meaning|
# |---|---|
# |`k1`, `k2`|`(n_keys, d)`, keys of this head, one for each map|
# |`v`|`(n_keys, d_v)`, its values|
# |`q1_tile`, `q2_tile`, `k1_tile`, `k2_tile`|shared: 16 rows of `d`, a row every `stride` floats; the queries are loaded|
# |`v_tile`|shared: 16 rows of `16 * C` floats, a row every `16 * C`|
# |`visible`|int, the keys that this block's queries may see|
# |`maximum1`, `total1`, `sum1[c]`, and 2|this query's state in each map; `sum1[c]` belongs to column `x + 16 * c`|
#
# Returns nothing; it leaves both states complete. Keys and values are read from global memory once a block, and
# none behind `visible`.
#
# <details><summary>Hint</summary>
#
# Which three tiles come in each round, and between which two barriers? What does a key that may not be seen score, in which of
# the maps? Which lane knows the weight of key r, and how do the other fifteen of the row get it
# (`__shfl_sync(0xffffffff, weight, r, TILE)`)? By which factor does each of the two sums shrink, and when?
#
# </details>

# %% tags=["exercise", "export"] kind="kernel"
DIFFERENTIAL_FLASH = DIFFERENTIAL_TOOLS + r"""
template <int C>                                         // columns of V a thread: 16 C >= d_v
__global__ void differential_flash(const float* q1, const float* k1, const float* q2,
    const float* k2, const float* v, const float* lam, float* out, int n_queries, int n_keys,
    int d, int d_v, int causal, float scale) {
  extern __shared__ float q1_tile[];
  int x = threadIdx.x, y = threadIdx.y, stride = d + PAD, top = blockIdx.y * TILE, i = top + y;
  float *q2_tile = q1_tile + TILE * stride, *k1_tile = q2_tile + TILE * stride;
  float *k2_tile = k1_tile + TILE * stride, *v_tile = k2_tile + TILE * stride;
  size_t head = blockIdx.x, query = head * n_queries + i;
  k1 += head * n_keys * d, k2 += head * n_keys * d, v += head * n_keys * d_v;
  load_rows(q1_tile, TILE, d, stride, q1 + head * n_queries * d, top, n_queries, d);
  load_rows(q2_tile, TILE, d, stride, q2 + head * n_queries * d, top, n_queries, d);
  int visible = visible_keys(top + TILE, n_queries, n_keys, causal);
  float maximum1 = -INFINITY, maximum2 = -INFINITY, lambda = lam[head];
  float total1 = 0.0f, total2 = 0.0f, sum1[C] = {}, sum2[C] = {};
  // BEGIN SOLUTION
  for (int first = 0; first < visible; first += TILE) {
    __syncthreads();                                     // load: the last tiles are used up
    load_rows(k1_tile, TILE, d, stride, k1, first, visible, d);
    load_rows(k2_tile, TILE, d, stride, k2, first, visible, d);
    load_rows(v_tile, TILE, TILE * C, TILE * C, v, first, visible, d_v);
    __syncthreads();                                     // the new tiles are there
    bool seen = may_attend(i, first + x, n_queries, n_keys, causal);             // score
    float s1 = seen ? scale * score(q1_tile, k1_tile, d) : -INFINITY;
    float s2 = seen ? scale * score(q2_tile, k2_tile, d) : -INFINITY;
    float weight1, shrink1 = rescale(s1, weight1, maximum1, total1);             // rescale
    float weight2, shrink2 = rescale(s2, weight2, maximum2, total2);
    for (int c = 0; c < C; ++c) sum1[c] *= shrink1;
    for (int c = 0; c < C; ++c) sum2[c] *= shrink2;
    for (int r = 0; r < TILE; ++r) {                     // accumulate: one value for both maps
      float w1 = __shfl_sync(0xffffffff, weight1, r, TILE);
      float w2 = __shfl_sync(0xffffffff, weight2, r, TILE);
      for (int c = 0; c < C; ++c) {
        float value = v_tile[(r * C + c) * TILE + x];
        sum1[c] += w1 * value;
        sum2[c] += w2 * value;
      }
    }
  }
  // END SOLUTION
  for (int c = 0; c < C && i < n_queries && x + TILE * c < d_v; ++c)             // write
    out[query * d_v + x + TILE * c] = divided(sum1[c], total1) - lambda * divided(sum2[c], total2);
}
"""

# %%
DIFFERENTIAL_FLASH = check("11C", DIFFERENTIAL_FLASH)

# %% [markdown]
# First the needle, then two heads of 32 with values of 64, 128 tokens. Beside the kernel: what two calls would read, from the formula, and four
# calls of lecture 06's kernel with $V$ in halves, run.
#
# *Predict.* How much does each way read, against each number once (the floor)? Which ratios do not change with $n$?

# %% tags=["slide"]
from attention.differential import differential_attention_cuda, differential_bytes
from attention.differential import differential_launch
from attention.flash import flash_launch

single = [a.astype(np.float32) for a in one_head]
by_kernel = differential_attention_cuda(*single, 0.8)[0, 0]
print(f"needle by the kernel: signal {by_kernel[0]:.3f}, "
      f"ratio {by_kernel[0] / signal_and_noise(by_kernel)[1]:.1f}")
q1, k1, q2, k2 = np.random.default_rng(11).standard_normal((4, 2, 128, 32), np.float32)
v = np.random.default_rng(12).standard_normal((2, 128, 64), np.float32)
kernel, launch, arguments = differential_launch(q1, k1, q2, k2, v, [0.8, 0.2])
report = kernel.check[launch](*arguments)

def of_kv(report):
    return sum(row.bytes for row in report.rows
               if row.kind == "load" and row.array in ("k", "v", "k1", "k2"))

read, once = {"one pass": of_kv(report)}, sum(a.nbytes for a in (k1, k2, v))
read["two calls"] = 2 * differential_bytes(128, 128, 32, 64, maps=2)[0]
read["four calls"] = 0
for q, k in ((q1, k1), (q2, k2)):
    for half in (v[..., :32], v[..., 32:]):
        other, shape, given = flash_launch("shared", *cuda.on_device(q, k, half))
        read["four calls"] += of_kv(other.check[shape](*given))

# %%
for name, count in read.items():
    print(f"{name:10s} {count:9,} bytes of K and V: {count / of_kv(report):.1f} times "
          f"one pass, {count / once:4.1f} times the floor")
formula = 2 * differential_bytes(128, 128, 32, 64)[0]
print(f"formula of one pass {formula:,}; problems {len(report.problems)}")
plotting.bars({name: count / once for name, count in read.items()},
              ylabel="bytes of K and V, times the floor",
              title="One pass for both maps reads half of what four calls read")
plotting.show("Three bars of bytes read: one pass 8 times the floor, two calls 12, "
              "four calls 16.")

# %% [markdown]
# 8 times the floor, because there are 8 blocks of 16 queries; 1.5 and 2 do not depend on $n$. And the two outputs of two calls, written, read
# again and subtracted, are not there at all. (What the one pass pays: two rows of sums in registers.)
#
# **Trap.** *"So differential attention needs a kernel of its own."* It needs none: two calls and a subtraction are exact. The kernel saves bytes.
#
# ## Part 5 · Does it matter?
#
# ### 11.7 Empirical improvements: several needles
#
# **Does it find needles better?** The paper reports better retrieval of several needles, at its scale. Here: 32 facts, each one token that is
# the sum of a name (of 64) and a value (of 16); then four of the names, and for each its value is asked. One layer of width 32,
# four usual heads or two differential ones, 200 steps, three seeds. Equal matrices; λ and the norm add 48 numbers.
#
# *Predict.* Which one learns faster, and is it so for every seed? (Chance is one of 16.)

# %% tags=["slide", "approx"] approx={"numbers": 0.1, "picture": 0.05}
curves = {name: np.array([runs[name, seed].accuracy for seed in range(3)])
          for name in ("softmax", "differential")}
for name, found in curves.items():
    late, last = found[:, -3], found[:, -1]
    print(f"{name:12s} {runs[name, 0].n_parameters:,} parameters; after 150 steps "
          f"{late.min():.2f} to {late.max():.2f}, after 200 {last.min():.2f} to "
          f"{last.max():.2f}")
plotting.curves(curves, x=25 * np.arange(len(found[0])), xlabel="step",
                ylabel="answers right", threshold=1 / 16, threshold_name="chance",
                title="32 facts: both learn to retrieve, neither clearly faster")
plotting.show("Right answers against the step, mean of three seeds with a band: both "
              "rise from chance late, softmax a little earlier on average.")

# %% [markdown]
# Both are far above chance in the end, and differential attention is **not** ahead here: after 150 steps its seeds lie between 0.94 and 0.99, those
# of softmax at 0.98 and 0.99, and the bands overlap all the way. At another learning rate the order turned (11.5). In a task where names can be told apart exactly, a head can learn any lead it
# needs, as the real model's did, and there is little noise to subtract. This page neither supports nor refutes the paper's results at its size; it shows
# that a subtraction is not better by itself, and that one seed or one rate would have "shown" either.
#
# ## Part 6 · What came after
#
# %% [markdown] tags=["slide"]
# ### 11.8 DIFF V2: pairs inside a key group
#
# **What did its authors keep?** The second version (Microsoft, blog of 2026-01-20 and code in microsoft/unilm) keeps the subtraction and changes what
# stands around it:
#
# |part|V1|V2|
# |---|---|---|
# |queries|half the heads, two queries each|twice the queries, on the *same* key and value heads|
# |keys, values|two keys, values $2d$ wide|those of grouped-query attention|
# |λ|one a layer, four vectors|$\sigma(xW_\lambda)$, for each token and head|
# |norm behind it|RMSNorm and $1-\lambda_\text{init}$|none|
#
# So one call of a usual kernel does it, $V$ is read once, and the cache is GQA's. A row sums to $1-\sigma(\cdot)$, between 0 and 1: a token whose two maps agree
# can silence the head, which V1's norm prevents.
#
# *Predict.* $d_\text{model}=4096$, 32 heads of 128 on 8 key heads: by how much does V2 have more parameters than GQA?

# %%
d_model, d, heads, groups = 4096, 128, 32, 8
kv = 2 * d_model * groups * d
counts = {"GQA": 2 * d_model * heads * d + kv,
          "DIFF V2": d_model * (2 * heads * d + heads) + kv + heads * d * d_model,
          "V2, W_O for 64 heads": 2 * d_model * 2 * heads * d + kv}
for name, count in counts.items():
    print(f"{name:20s} {count / 1e6:6.2f} M parameters, "
          f"{count / counts['GQA']:.2f} times GQA")

# %% [markdown]
# 58.85 M against 41.94 M. (A published lesson has 75.5 M: it gives $W_O$ the 64 heads that there are *before* the subtraction.)
#
# #### Exercise 11D: V2 in ten lines  (difficulty 3 of 5, useful, 15 minutes)
#
# Write the heads of DIFF V2. Heads $2i$ and $2i+1$ are a pair; neighbouring query heads share a key head, as in lecture 08.
#
# |argument|shape|meaning|
# |---|---|---|
# |`q`|`(..., 2 * heads, n_queries, d_head)`|queries|
# |`k`, `v`|`(..., n_kv_heads, n_keys, d_head)`|one for each group of neighbouring query heads|
# |`logits`|`(..., heads, n_queries)`|λ before the sigmoid, one for each token and head|
#
# Returns `(..., heads, n_queries, d_head)`, causal, in the float type of `q`. A group that would cut a pair is a ValueError.
#
# <details><summary>Hint</summary>
#
# How many calls of `grouped_query_attention_numpy(q, k, v, causal=True)` (lecture 08) are needed? Which slices of its heads are
# the first and the second of each pair? Where must an axis be added to λ? How many query heads has a group, and when does it cut a
# pair? `sigmoid` is given, and does not overflow.
#
# </details>

# %%
from attention.grouped_query import grouped_query_attention_numpy

# %% tags=["export"]
def sigmoid(x):
    """1 / (1 + exp(-x)) for arrays, without overflow."""
    return np.exp(-np.logaddexp(0, -x))

# %% tags=["exercise", "export"] kind="numpy"
def differential_pairs(q, k, v, logits):
    """Heads of DIFF V2, causal, NumPy: softmax map 2i minus sigmoid(logits) map 2i+1.

    q (..., 2 heads, n_queries, d_head), k and v (..., n_kv_heads, n_keys, d_head),
    logits (..., heads, n_queries). ValueError unless each group holds whole pairs.
    """
    if k.shape[-3] == 0 or q.shape[-3] % (2 * k.shape[-3]):
        raise ValueError("each group must hold whole pairs of query heads, got "
                         f"{q.shape[-3]} query heads on {k.shape[-3]} key heads")
    ### BEGIN SOLUTION
    heads = grouped_query_attention_numpy(q, k, v, causal=True)
    lam = sigmoid(logits)[..., None].astype(q.dtype)
    return heads[..., 0::2, :, :] - lam * heads[..., 1::2, :, :]
    ### END SOLUTION

# %%
differential_pairs = check("11D", differential_pairs)

# %% [markdown]
# #### Review this code
#
# Someone pairs by halves, head $i$ with head $i+H/2$, "as transformers does for V1". All shapes are right. Four query heads on two key heads;
# all keys are zero, so all maps are even averages; the values of the second group are ten times as large.
#
# *Predict.* With $\lambda=1/2$ and even maps a head of V2 is half an average of *its* values. What does the other pairing give?

# %%
rng = np.random.default_rng(8)
q = rng.standard_normal((4, 1, 2))
k, v = np.zeros((2, 5, 2)), np.ones((2, 5, 2)) * np.array([1.0, 10.0])[:, None, None]
heads_of = grouped_query_attention_numpy(q, k, v, causal=True)
print("pairs inside a group:", differential_pairs(q, k, v, np.zeros((2, 1)))[:, 0, 0])
print("pairs by halves:     ", (heads_of[:2] - 0.5 * heads_of[2:])[:, 0, 0])

# %% [markdown]
# Values of *another group* are subtracted: $A_1V_1-\lambda A_2V_2$ is no difference of maps, and nothing that two maps share can cancel. The blog
# calls the pairing inside a group crucial. (In V1 by halves is right: keys are not shared, and both halves of $V$ belong to the pair.)
#
# #### Exercise 11E: a test for V2  (difficulty 3 of 5, useful, 10 minutes)
#
# Write a function that is given heads of V2 and notices whether they are wrong. It is tried on right ones and on ten wrong ones: pairs, groups, λ, the
# scale, the mask, a norm too many.
#
# |argument|meaning|
# |---|---|
# |`heads`|`heads(q, k, v, logits)`, as in exercise 11D, for arrays with one leading axis|
#
# Returns nothing. It raises an error (`assert ...`) for wrong heads, and none for right ones.
#
# <details><summary>Hint</summary>
#
# What do you compare with: a loop over heads of your own? How many pairs must a group have for a wrong pairing to show, and must λ
# differ from head to head, from token to token? Are there as many queries as keys?
#
# </details>

# %% tags=["exercise", "export"] kind="bug"
def test_pairs(heads):
    """Raise AssertionError if heads of DIFF V2 are wrong; arguments as in 11D."""
    ### BEGIN SOLUTION
    rng = np.random.default_rng(0)
    q, k = 2 * rng.standard_normal((2, 8, 3, 4)), rng.standard_normal((2, 2, 5, 4))
    v, logits = rng.standard_normal((2, 2, 5, 4)), 2 * rng.standard_normal((2, 4, 3))
    got = heads(q, k, v, logits)
    for b, head, i in np.ndindex(2, 4, 3):
        expected, group = 0.0, 2 * head // 4
        for which, share in ((2 * head, 1.0), (2 * head + 1, -sigmoid(logits[b, head, i]))):
            powers = np.exp(k[b, group, :i + 3] @ q[b, which, i] / 2)
            expected = expected + share * powers @ v[b, group, :i + 3] / powers.sum()
        assert np.abs(got[b, head, i] - expected).max() < 1e-8
    ### END SOLUTION

# %%
test_pairs = check("11E", test_pairs)

# %% [markdown] tags=["slide"]
# ### 11.9 A sink is a gate
#
# **What if a head has nothing to say?** Softmax must spend 1. Two remedies look different. A **learned sink** (gpt-oss and others) adds one score $s$ to the
# softmax, that of a token without a value. A **gate** multiplies the head's output, before $W_O$, with $\sigma(xW)$ (gated attention, arXiv
# 2505.06708; Qwen3-Next).
#
# $$\frac{e^{s_j}}{e^{s}+\sum_ke^{s_k}}=\frac{e^{s_j}}{L}\cdot\frac{L}{e^{s}+L}
#   =w_j\cdot\sigma(\text{LSE}-s)\qquad L=\sum_ke^{s_k},\ \text{LSE}=\ln L,\ w_j=e^{s_j}/L$$
#
# The $w_j$ are the weights without a sink.
#
# *Predict.* The needle's scores have $\text{LSE}=7.6$. A sink of $s=7.6$: what becomes of signal, noise and their ratio?

# %% tags=["slide"]
scores = keys @ query / root
lse = np.logaddexp.reduce(scores)
for s in (0.0, lse, 10.0):
    with_sink = softmax(np.append(scores, s))[:-1]  # the sink's own weight is dropped
    gate = sigmoid(lse - s)
    gap = np.abs(with_sink - gate * weights).max()
    print(f"sink {s:4.1f}: gate {gate:.3f}, signal {with_sink[needle]:.3f}, "
          f"ratio {ratio(with_sink):.1f}, difference {gap:.6f}")
gate = 0.25  # and back: the sink that a gate of 0.25 is
s = lse - math.log(gate / (1 - gate))
print(f"gate {gate} is a sink of {s:.2f}: "
      f"{softmax(np.append(scores, s))[:-1].sum():.2f} of the mass is left")

# %% [markdown]
# Signal and noise are halved, their ratio is the same; both directions hold to the last digit. A sink, a gate for a head,
# and the log-sum-exp that flash attention stores anyway are one thing: with a kernel that returns
# its LSE, a sink costs one multiplication. (A gate for each *column*, as in Qwen3-Next, is more: as many sinks as columns.) And the **ratio stays**: a gate
# makes a head silent, it does not clean it. Subtraction is for noise, gates are for silence.
#
# #### Exercise 11F: the first token as a gate  (difficulty 3 of 5, useful, 15 minutes)
#
# In SmolLM2 the sink is a token, the first one, in most layers with a small value. Write its attention so that this token is taken out of the
# softmax and comes back as a gate:
#
# $$o_i=g_i\,\text{attention to the others}+(1-g_i)\,v_0\qquad g_i=\sigma(\text{LSE}_i-s_{i0})$$
#
# |argument|shape|meaning|
# |---|---|---|
# |`q`|`(batch, n_heads, n_queries, d_head)`|rotated|
# |`k`, `v`|`(batch, n_heads, n_keys, d_head)`|rotated keys, values; the last query sees all keys|
#
# $s_{i0}$ is the score of the first token, $\text{LSE}_i$ runs over the scores of the *others* that query $i$ may see, and every score is divided by
# $\sqrt{d_\text{head}}$. Returns `(out, gate)`: the heads' outputs, shaped as `q`, and the gates `(batch, n_heads, n_queries)`. A query that sees the first token
# alone has the gate 0.
#
# <details><summary>Hint</summary>
#
# Which columns of the scores belong to the others, and which mask do they keep? `masked_softmax` gives zeros where a row sees nothing: what does
# `torch.logsumexp` give for a row of $-\infty$, and what is the sigmoid of that? Is the scale in $s_{i0}$, too?
#
# </details>

# %% tags=["exercise", "export"] kind="training"
def first_as_gate(q, k, v):
    """Causal attention with the first token outside of the softmax, as a gate.

    q (batch, n_heads, n_queries, d_head), k and v (batch, n_heads, n_keys, d_head).
    Returns out, shaped as q, and the gates (batch, n_heads, n_queries).
    """
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    allowed = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device)
    allowed = allowed.tril(n_keys - n_queries)
    ### BEGIN SOLUTION
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    sink, others, seen = scores[..., 0], scores[..., 1:], allowed[:, 1:]
    lse = torch.logsumexp(others.masked_fill(~seen, -math.inf), dim=-1)
    gate = torch.sigmoid(lse - sink)
    out = masked_softmax(others, seen) @ v[..., 1:, :]
    return gate[..., None] * out + (1 - gate)[..., None] * v[..., :1, :], gate
    ### END SOLUTION

# %%
first_as_gate = check("11F", first_as_gate)

# %% [markdown]
# *Predict.* Does the model write the same? And how far open are its gates?

# %% tags=["language-model"]
if smollm:
    language_model.put_in(
        smollm, attention=lambda q, k, v, causal=True: first_as_gate(q, k, v)[0])

# %% tags=["language-model", "slide"]
if smollm:
    open_by = []

    def gated(q, k, v, causal=True, keep=1.0):
        out, gate = first_as_gate(q, k, v)
        open_by.append(float(gate[..., 64:].mean()))
        return out - (1 - keep) * (1 - gate)[..., None] * v[..., :1, :]

    with_value = smollm.replace(attention=gated).losses(prose).mean()
    pure = smollm.replace(attention=lambda *qkv, causal=True: gated(*qkv, keep=0.0))
    print(f"loss {with_value:.2f}, without the first token's value (a pure gate) "
          f"{pure.losses(prose).mean():.2f}")
    plotting.curves({"gates": np.array(open_by[:30])}, xlabel="layer",
                    ylabel="mean gate of the heads", threshold=1.0,
                    threshold_name="open",
                    title="The gates of SmolLM2: about half closed in most layers")
    plotting.show("Mean gate of each of 30 layers: near 1 in layers 0 to 2 and 10, 11, "
                  "between 0.4 and 0.75 in the others.")

# %% [markdown]
# The same logits: a model with a sink **is** a gated model. It has built its gates from a token. But not pure ones: without $v_0$ the loss
# rises by three quarters of a nat, for here the token's value is a bias that the next layers count on.
# (Where the gates are open, in layers 0 to 2, 10 and 11, $v_0$ is 0.6 to 1.3 times as long as the other values; elsewhere 0.1 to 0.4 times.) A learned sink has no value from the start.
# (Gated attention is reported to be free of the first-token sink and to bear larger learning rates: the paper's measurement, at 1.7
# and 15 billion parameters.)
#
# ### 11.10 In use
#
# **What do you call on Monday?** For V1 two calls of `scaled_dot_product_attention`, or of a flash kernel that takes values of another width than
# keys; for V2 one call and a subtraction; `DiffLlamaAttention` in transformers 5.23.0 has V1. For a sink, the `sinks` of
# `GptOssAttention` (an argument `s_aux` of its kernels); for a gate one multiplication before $W_O$. FlexAttention returns the LSE on request.
#
# *Predict.* Is torch's `scaled_dot_product_attention` with an extra key of zeros and a value of zeros a sink of $s=0$? (Four distractors.)

# %%
four = [torch.from_numpy(a[:4])[None, None] for a in (keys, values)]
asked = torch.from_numpy(query[None])[None, None]
padded = sdpa(asked, *(nn.functional.pad(a, (0, 0, 0, 1)) for a in four))[0, 0, 0]
gate = sigmoid(np.logaddexp.reduce(scores[:4]))
expected = gate * (softmax(scores[:4]) @ values[:4])
print(f"gate {gate:.3f}; column 1: {padded[1]:.4f} and {expected[1]:.4f}, "
      f"largest difference {np.abs(padded.numpy() - expected).max():.6f}")

# %% [markdown]
# It is ("softmax plus one"). A gate *before* $W_O$ is not the same as a gate on $V$: that one would belong to the token that is looked at, not to the one that
# looks. Folders of models in transformers 5.23.0: learned sinks in `gpt_oss`, `deepseek_v4`, `mimo_v2_flash`; output gates in `qwen3_next`,
# `qwen3_5`, `lfm3`.
#
# ## What you can do now
#
# You can say when a subtraction cancels noise: when two maps err alike; the more they differ, the smaller λ must be. You can build differential attention with its λ and
# norm, in one pass or by two calls, and V2 with its pairs. And you can tell a gate, a sink and a log-sum-exp from a remedy for noise.

# %% tags=["slide"]
by_hand, by_array = out, subtract_map(*one_head, 0.8)[0, 0]
forms = {"loop": by_hand, "arrays": by_array, "two calls": by_two_calls,
         "kernel": by_kernel}
plotting.matrix(np.stack([form[:8] for form in forms.values()]), list(forms),
                list(range(8)), title="The needle, four ways: one output",
                xlabel="column", annotate=True)
plotting.show("Four equal rows of numbers: the first eight outputs from the loop, from "
              "arrays, from two calls and from the kernel.")

# %% [markdown]
# ## Exercises left
#
# 1. Which λ is best for the needle? `ratio(maps[0] - x * maps[1])` for x from 0 to 1.5; compare with 11.13.
# 2. Give `train_retriever("differential", 0, steps=400)` more time. Where does λ end?
# 3. `first_gradients({"factor": 0.2})`: which constant makes the first layer's gradient equal to softmax's?
# 4. Take $v_0$ away in one layer of SmolLM2 only, with `keep=0.0` there: which layers need it?

# %% [markdown]
# ## Quiz

# %% [markdown] tags=["quiz"]
# **1.** Training has made $\lambda=1.3$. What does a row of weights, map 1 minus $\lambda$ map 2, sum to?
#
# - a) 1, as in every softmax
# - b) 0, because $\lambda$ is clipped to 1
# - c) 0.3
# - d) -0.3

# %% tags=["quiz"]
from utils import quiz

two_rows = softmax(np.random.default_rng(0).standard_normal((2, 50)))
row_sum = (two_rows[0] - 1.3 * two_rows[1]).sum()
quiz.answer({"a": 1, "b": 0, "c": 0.3, "d": -0.3}, row_sum,
            "Both rows sum to 1, and nothing keeps the factor between 0 and 1.")

# %% [markdown] tags=["quiz"]
# **2.** The errors of two maps have variance 1 each, and have nothing to do with one another. What is the variance of the
# error after the subtraction with $\lambda=1$?
#
# - a) 0, they cancel
# - b) 1
# - c) 2
# - d) 1/2

# %% tags=["quiz"]
error_1, error_2 = np.array([1, -1, 1, -1]), np.array([1, 1, -1, -1])  # uncorrelated
quiz.answer({"a": 0, "b": 1, "c": 2, "d": 1 / 2}, np.var(error_1 - error_2),
            "Variances add. Only errors that both maps share are subtracted away.")

# %% [markdown] tags=["quiz"]
# **3.** Your library has `scaled_dot_product_attention` and nothing for differential attention. How many calls give the
# exact result of one head?
#
# - a) two
# - b) one, with the query $q_1-\lambda q_2$
# - c) one, with the values $(1-\lambda)\,v$
# - d) none, a kernel must hold both maps

# %% tags=["quiz"]
made_up = np.random.default_rng(0).standard_normal((5, 1, 6, 8))
q_a, k_a, q_b, k_b, v_ab = torch.from_numpy(made_up)
guesses = {"two": sdpa(q_a, k_a, v_ab) - 0.8 * sdpa(q_b, k_b, v_ab),
           "q": sdpa(q_a - 0.8 * q_b, k_a, v_ab), "v": sdpa(q_a, k_a, 0.2 * v_ab)}
true_one = subtract_map(*made_up, 0.8)
exact_ones = [how for how, guess in guesses.items() if np.allclose(guess, true_one)]
quiz.answer({"a": "two", "b": "q", "c": "v", "d": "none"}, exact_ones[0],
            "One for each map, then subtract; a kernel of its own only saves bytes.")

# %% [markdown] tags=["quiz"]
# **4.** DIFF V2 with 8 query heads on 2 key heads makes 4 pairs. By mistake query head $i$ is paired with $i+4$. How many
# pairs subtract values of another key group?
#
# - a) none
# - b) four
# - c) one
# - d) two, the outer ones

# %% tags=["quiz"]
of_group = np.repeat([0, 1], 4)  # the key head of each query head
mixed_pairs = int((of_group[:4] != of_group[4:]).sum())
quiz.answer({"a": 0, "b": 4, "c": 1, "d": 2}, mixed_pairs,
            "Neighbours share a key head, so pairs must be neighbours: 2i and 2i + 1.")

# %% [markdown] tags=["quiz"]
# **5.** A query sees two keys, both with the score 0, and a learned sink of score 0. What do the weights of the two keys sum
# to?
#
# - a) 2/3
# - b) 1, softmax spends all
# - c) 1/2, the gate is $\sigma(0)$
# - d) 0

# %% tags=["quiz"]
sink_row = softmax(np.zeros(3))  # two keys, and the sink without a value
quiz.answer({"a": 2 / 3, "b": 1, "c": 1 / 2, "d": 0}, sink_row[:2].sum(),
            "The gate is sigmoid(LSE - s), and the LSE of two zeros is ln 2.")

# %% [markdown]
# ## Going further
#
# Short sections, each alone, in any order. No later lecture needs them.

# %% [markdown]
# ### 11.11 Multi-token attention
#
# **Can one weight depend on several tokens?** A score compares one query with one key. To find the block that holds an L *and* an A, one query would have to
# ask for both. Multi-token attention (Golovneva et al. 2025, arXiv 2504.00927) convolves the scores over neighbouring queries
# and keys before the softmax (a key-query convolution). Causality needs two masks: scores of the future become 0 *before* the convolution, and
# $-\infty$ after it.
#
# *Predict.* Blocks of six letters; the last two tokens ask for L, then for A. Which block gets most, with and without the convolution?

# %%
blocks = ["xxLxxx", "xxAxxx", "xLxAxx", "xxxAxx", "xxxxxx"]
text = "".join(blocks) + "xxxxLA"
letters = np.array([[c == "L", c == "A"] for c in text], float)
scores = 6.0 * letters @ letters.T  # (36, 36): queries, keys; only the last two ask

def convolved(scores, mask_first=True):
    """The scores of queries i-1 and i and keys j-2 ... j+2, summed."""
    past = np.tri(len(scores), dtype=bool)
    kept = np.where(past, scores, 0.0) if mask_first else scores
    kept = np.pad(kept, ((1, 0), (2, 2)))
    summed = sum(kept[a:a + len(scores), b:b + len(scores)]
                 for a in range(2) for b in range(5))
    return np.where(past, summed, -np.inf)

alone = np.where(np.tri(36) > 0, scores, -np.inf)
for name, rows in (("one query, one key", alone), ("convolved", convolved(scores))):
    mass = softmax(rows[-1, :30]).reshape(5, 6).sum(1)
    print(f"{name:18s}", *(f" {block} {m:.2f}" for block, m in zip(blocks, mass)))
changed = scores.copy()
changed[9, 11] += 5.0  # a score of the future: query 9, key 11
for mask_first in (True, False):
    rows = [softmax(convolved(s, mask_first))[9, :10] for s in (scores, changed)]
    print(f"masked before it: {mask_first}; row 9 changes by "
          f"{np.abs(rows[0] - rows[1]).max():.2f} when the future changes")

# %% [markdown]
# Without it every A is as good as any other; with it the block that has both wins (the rest falls on the question itself). And one mask is not enough: the convolution carries the future into the past.
# (The paper also mixes heads by a convolution, and in its first version has a norm with a factor that depends on the depth, as here.)
#
# ### 11.12 Why does it work, if it does?
#
# An analysis (Kong et al. 2025, arXiv 2505.16333) names three reasons for what V1 does: **negative attention** (a head can say "not
# this"), **less redundant heads**, and easier **learning**, rather than noise that cancels. It adds the operation to trained models: DEX keeps the softmax weights and
# applies a small learned difference to the heads' *outputs*, so the cache and the kernels stay. *Predict.* How many of the weights of our needle's difference are
# negative, and how much do they weigh?

# %%
negative = difference < 0
print(f"{negative.mean():.0%} of the weights are negative, together "
      f"{difference[negative].sum():.2f}; the others {difference[~negative].sum():.2f}")

# %% [markdown]
# ### 11.13 The best λ
#
# **Which λ is best for a given correlation?** The noise $\sum_j(w_j-\lambda u_j)^2$ is least at $\lambda=\sum w_ju_j/\sum u_j^2$. Weights are
# exponentials of scores; for normal scores of variance 1, and a needle of weight $p$ in the first map, that is $(1-p)\,e^{\rho-1}$.
#
# *Predict.* Is the best λ of independent maps 0?

# %%
lams = np.linspace(0, 1.2, 25)
for rho in (0.0, 0.5, 0.8, 0.95):
    best = lams[np.argmax([mean_ratio(rho, x) for x in lams])]
    print(f"rho {rho:.2f}: best of the grid {best:.2f}, formula "
          f"{(1 - weights[needle]) * math.exp(rho - 1):.2f}")

# %% [markdown]
# It is 0.3: all weights are positive, so even independent maps share their mean, and that much can be subtracted. $\lambda=0.8$ is too much for
# them, and right for a correlation near 1.

# %% [markdown]
# ### 11.14 A gate, trained
#
# **Does a gate keep a sink from growing?** Gated attention is reported to (11.9). The task of lecture 05 that grows one: tokens follow a table of pairs, but after
# a *trigger* the token before it comes again. One layer, one head of 32: at a trigger the head copies, elsewhere it has nothing to say.
#
# *Predict.* Mean weight on token 0 where nothing is to be copied: without a gate, with one for the head, with one for each column? Two seeds each; the length of
# token 0's value is relative to that of the others.

# %% tags=["approx"] approx={"numbers": 0.3, "picture": 0.1}
from attention.experiments.differential import train_gated
from attention.experiments.kv_cache import look_at_sink

sinks = {}
for name, columns in (("no gate", 0), ("one gate", 1), ("a gate a column", 32)):
    found = [look_at_sink(train_gated(columns, seed)) for seed in (0, 1)]
    sinks[name] = [each["mass"] for each in found]
    value, loss = ([each[key] for each in found] for key in ("value_ratio", "loss"))
    print(f"{name:16s} weight on token 0", *(f"{mass:.2f}" for mass in sinks[name]),
          "; length of its value", *(f"{ratio:.2f}" for ratio in value),
          "; loss", *(f"{one:.2f}" for one in loss))
plotting.bars(sinks, ylabel="weight on token 0 where nothing is copied",
              title="With a gate the sink is a fraction of what it was, and not gone")
plotting.show("Three bars with a dot for each seed: no gate near 0.7, one gate and a "
              "gate for each column between 0.1 and 0.4.")

# %% [markdown]
# Two thirds without, a seventh to a third with. Without a gate the value of token 0 is short, a fifth of the others: looking there is how the head says nothing.
# With one it is 0.6 of the others and more. The loss is 0.82 to 0.85 for all: at this size a gate neither helps nor harms. (Longer: `train_gated(columns, seed, steps=1500)`.)

# %% [markdown]
# ## Behind the scenes
#
# What the sections above import. **The triple**: checks, and the same in PyTorch and CUDA.

# %% tags=["plumbing"]
import functools
from typing import NamedTuple

from attention.experiments.kv_cache import N_TOKENS, copying_texts
from attention.flash import flash_attention_cuda
from attention.fundamentals import attention_numpy, attention_torch
from attention.multi_head import MultiHeadAttention, TransformerConfig, TransformerLM
from attention.rotary import Rotary

# %% [markdown]
# **The kernel of both maps**: its bytes, its launch, the function around it.

# %% tags=["export", "plumbing"]
def differential_bytes(n_queries, n_keys, d, d_v, causal=False, maps=1):
    """Bytes that one head of the kernel asks for, exactly: (keys and values, queries, output).

    maps: how often V is read: 1 in one pass, 2 in two calls, each of which writes an output; those are read again.
    """
    ends = [min(first + 16, n_queries) for first in range(0, n_queries, 16)]
    keys = sum(max(0, end + n_keys - n_queries) if causal else n_keys for end in ends)
    outputs = 1 if maps == 1 else 5                        # two written, both read, their difference written
    return 4 * keys * (2 * d + maps * d_v), 4 * 2 * n_queries * d, 4 * outputs * n_queries * d_v

# %% tags=["export", "plumbing"]
def check_differential(q1, k1, q2, k2, v, lam):
    """Raise ValueError or TypeError, in one sentence, unless two maps fit together. For arrays and tensors.

    Returns the leading axes (those before seq and d_head), broadcast together.
    """
    arrays = {"q1": q1, "k1": k1, "q2": q2, "k2": k2, "v": v}
    cuda.check_numbers(**arrays)
    for name, array in arrays.items():
        if len(array.shape) < 2:
            raise ValueError(f"{name} must have at least two axes (seq, d_head), got shape {tuple(array.shape)}")
    widths = [array.shape[-1] for array in (q1, k1, q2, k2)]
    if len(set(widths)) > 1 or widths[0] == 0:
        raise ValueError(f"q1, k1, q2 and k2 must have the same d_head of at least 1, got {widths[0]}, {widths[1]}, "
                         f"{widths[2]} and {widths[3]}")
    if q1.shape[-2] != q2.shape[-2]:
        raise ValueError(f"q1 and q2 must have the same n_queries, got {q1.shape[-2]} and {q2.shape[-2]}")
    if not k1.shape[-2] == k2.shape[-2] == v.shape[-2]:
        raise ValueError("k1, k2 and v must have the same n_keys, got "
                         f"{k1.shape[-2]}, {k2.shape[-2]} and {v.shape[-2]}")
    axes = [tuple(array.shape[:-2]) for array in arrays.values()]
    try:
        lead = np.broadcast_shapes(*axes)
    except ValueError:
        got = ", ".join(map(str, axes))
        raise ValueError(f"the leading axes of q1, k1, q2, k2 and v must broadcast, got {got}") from None
    shape = tuple(np.shape(lam))
    if shape not in ((), lead[-1:]):
        wanted = f" or one for each of the {lead[-1]} heads" if lead else ""
        raise ValueError(f"lam must be a number{wanted}, got shape {shape}")
    return lead

# %% tags=["export", "plumbing"]
@functools.cache
def differential_kernel(columns):
    """The kernel for so many columns of V a thread, compiled on first use."""
    return cuda.compile(DIFFERENTIAL_FLASH, name="differential_flash", template=(columns,))

def differential_launch(q1, k1, q2, k2, v, lam, causal=False, scale=None):
    """What launches the kernel: kernel, (grid, block, shared bytes), arguments. The seventh is the output.

    All leading axes are one: (heads, seq, d), single precision. The output (heads, n_queries, d_v) is to be written.
    """
    lead = check_differential(q1, k1, q2, k2, v, lam)
    arrays = cuda.on_device(q1, k1, q2, k2, v)
    heads, (n_queries, d), (n_keys, d_v) = math.prod(lead), q1.shape[-2:], v.shape[-2:]
    arrays = [a.expand(*lead, *a.shape[-2:]).reshape(heads, *a.shape[-2:]).contiguous() for a in arrays]
    lam = torch.as_tensor(lam, dtype=torch.float32).detach().to(arrays[0].device)
    lam = lam.expand(lead).reshape(heads).contiguous()
    out = arrays[0].new_zeros(heads, n_queries, d_v)
    columns = max(1, -(-d_v // 16))
    launch = (heads, -(-n_queries // 16)), (16, 16), 4 * 16 * (4 * (d + 1) + 16 * columns)
    scale = 1 / math.sqrt(d) if scale is None else float(scale)
    return differential_kernel(columns), launch, (*arrays, lam, out, n_queries, n_keys, d, d_v, int(causal), scale)

# %% tags=["export", "plumbing"]
def differential_attention_cuda(q1, k1, q2, k2, v, lam, causal=False, scale=None):
    """differential_attention_numpy by a CUDA kernel that forms both maps in one pass: V is read once for both.

    q1, q2 (..., n_queries, d_head), k1, k2 (..., n_keys, d_head), v (..., n_keys, d_v), leading axes broadcast, the
    last of them the heads; lam a number or (heads,); causal is aligned at the bottom right; scale defaults to
    1/sqrt(d_head). NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU. Computed in single precision.
    Returns (..., n_queries, d_v) in the kind and type of q1; a query with nothing to attend to gets zeros. Not
    differentiable. Has 48 KB of shared memory where 4 (d_head + 1) + d_v is up to 768; more has to be granted by the
    GPU. Raises ValueError when shapes do not fit.
    Source: Ye et al. 2024 (arXiv 2410.05258).
    """
    lead = check_differential(q1, k1, q2, k2, v, lam)
    values = cuda.on_device(v)[0]
    if not values.isfinite().all():                        # each map takes nothing from a value whose weight is 0
        maps = [flash_attention_cuda(*cuda.on_device(q, k, v), causal, scale)[0] for q, k in ((q1, k1), (q2, k2))]
        lam = torch.as_tensor(lam, dtype=torch.float32).detach().to(maps[0].device)
        return cuda.like(maps[0] - lam.expand(lead)[..., None, None] * maps[1], q1)
    kernel, launch, arguments = differential_launch(q1, k1, q2, k2, v, lam, causal, scale)
    out = arguments[6]
    if out.numel() and v.shape[-2]:
        kernel.fast[launch](*arguments)
    return cuda.like(out.reshape(*lead, *out.shape[1:]), q1)

# %% tags=["export", "plumbing"]
def lambda_for(lam, lead, like):
    """lam as an array or a tensor as `like` is, which multiplies outputs (*lead, n_queries, d_v)."""
    if isinstance(like, torch.Tensor):
        lam = torch.as_tensor(lam, dtype=like.dtype, device=like.device)
        return lam.expand(lead)[..., None, None]
    return np.broadcast_to(np.asarray(lam, like.dtype), lead)[..., None, None]

def differential_attention_numpy(q1, k1, q2, k2, v, lam, causal=False, scale=None):
    """(softmax(q1 k1ᵀ scale) - lam softmax(q2 k2ᵀ scale)) v in NumPy: attention twice, and one subtraction.

    q1, q2 (..., n_queries, d_head), k1, k2 (..., n_keys, d_head), v (..., n_keys, d_v), leading axes broadcast, the
    last of them the heads; lam a number or (heads,); causal is aligned at the bottom right; scale defaults to
    1/sqrt(d_head). No norm inside. Returns (..., n_queries, d_v) in the float type of q1; a query with nothing to
    attend to gets zeros. Raises ValueError when shapes do not fit. Source: Ye et al. 2024 (arXiv 2410.05258).
    """
    lead = check_differential(q1, k1, q2, k2, v, lam)
    cuda.check_kind(np.ndarray, q1=q1, k1=k1, q2=q2, k2=k2, v=v)
    work = cuda.work_type(q1)
    first, second = (attention_numpy(q.astype(work), k.astype(work), v.astype(work), causal=causal, scale=scale)
                     for q, k in ((q1, k1), (q2, k2)))
    first = np.broadcast_to(first, (*lead, *first.shape[-2:]))
    return cuda.like(first - lambda_for(lam, lead, first) * second, q1)

def differential_attention_torch(q1, k1, q2, k2, v, lam, causal=False, scale=None):
    """differential_attention_numpy in PyTorch, differentiable, in lam too. Same arguments, shapes and errors."""
    lead = check_differential(q1, k1, q2, k2, v, lam)
    cuda.check_kind(torch.Tensor, q1=q1, k1=k1, q2=q2, k2=k2, v=v)
    work = cuda.work_type(q1)
    first, second = (attention_torch(q.to(work), k.to(work), v.to(work), causal=causal, scale=scale)
                     for q, k in ((q1, k1), (q2, k2)))
    first = first.expand(*lead, *first.shape[-2:])
    return cuda.like(first - lambda_for(lam, lead, first) * second, q1)

# %% [markdown]
# **The language model**: a fact in a text that grows, and how alike its heads err.

# %% tags=["export", "plumbing"]
@torch.no_grad()
def needle_in_text(model, prose):
    """What the last token of a question attends to in each head, (n_layers, n_heads), by name.

    The text: 8 tokens of prose (1, 8 + n), a code of four digits, the other n, the question up to the code's first digit.
    needle: the weight of the second digit; first: that of the first token.
    """
    fact, question = model.encode("The code of the door is 7419. "), model.encode(" The code of the door is 7")
    place, rows, own = 8 + model.tokens(fact).index("4"), [], model.parts.attention

    def attention(q, k, v, causal=True):
        rows.append(torch.softmax(q[0, :, -1:] @ k[0].mT / math.sqrt(q.shape[-1]), dim=-1)[:, 0].double())
        return own(q, k, v, causal=causal)

    model.replace(attention=attention).hidden(torch.cat([prose[:, :8], fact, prose[:, 8:], question], dim=1))
    weights = torch.stack(rows).numpy()
    found = np.zeros(weights.shape[:2], [("needle", float), ("first", float)])
    found["needle"], found["first"] = weights[..., place], weights[..., 0]
    return found


@torch.no_grad()
def pair_correlations(model, ids):
    """How alike the heads of a layer score on ids (1, n): (pairs of one key group, pairs of two), each (n_layers,).

    Correlation of the scores of five queries with the keys between token 1 and their own neighbourhood of 8 tokens.
    """
    found, own, n = [], model.parts.attention, ids.shape[1]
    group = np.arange(model.config.n_heads) // (model.config.n_heads // model.config.n_kv_heads)

    def attention(q, k, v, causal=True):
        scores = (q @ k.mT)[0].double().numpy()
        found.append(np.mean([np.corrcoef(scores[:, i, 1:i - 7]) for i in np.linspace(n // 2, n - 1, 5).astype(int)], 0))
        return own(q, k, v, causal=causal)

    model.replace(attention=attention).hidden(ids)
    found, alike = np.array(found), group[:, None] == group
    return found[:, alike & ~np.eye(len(group), dtype=bool)].mean(1), found[:, ~alike].mean(1)

# %% [markdown]
# **The retrievers of 11.3 to 11.7**: facts, questions, and models that differ in their attention alone.

# %% tags=["export", "plumbing"]
class Retriever(nn.Module):
    """Reads facts, each a name and a value in one token, then questions, each a name; scores the values of those asked.

    names (batch, n) from 0 to 63; values (batch, n) from 0 to 15, or 16 for a question. The last 4 tokens are asked.
    """

    def __init__(self, attention, n_layers=1, d_model=32):
        super().__init__()
        self.names, self.values = nn.Embedding(64, d_model), nn.Embedding(17, d_model)
        self.layers = nn.ModuleList(attention(layer) for layer in range(n_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_layers + 1))
        self.answers = nn.Linear(d_model, 16, bias=False)

    def forward(self, names, values):
        x = self.names(names) + self.values(values)
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x), causal=True)
        return self.answers(self.norms[-1](x[:, -4:]))


def fact_batches(seed, batch=16, n_facts=32, n_asked=4):
    """Endless batches (names, values, answers): n_facts facts with different names, then n_asked of these names."""
    rng = np.random.default_rng(seed)
    while True:
        names = rng.random((batch, 64)).argsort(1)[:, :n_facts]
        values = rng.integers(16, size=(batch, n_facts))
        asked = rng.random((batch, n_facts)).argsort(1)[:, :n_asked]
        names = np.concatenate([names, np.take_along_axis(names, asked, 1)], axis=1)
        answers = np.take_along_axis(values, asked, 1)
        values = np.concatenate([values, np.full((batch, n_asked), 16)], axis=1)
        yield tuple(map(torch.from_numpy, (names, values, answers)))


def retrieval_loss(model, batch):
    """The mean cross-entropy of the answers, in nats."""
    names, values, answers = batch
    return nn.functional.cross_entropy(model(names, values).flatten(0, 1), answers.flatten())


@torch.no_grad()
def accuracy(model):
    """The share of right answers on 128 lists of facts."""
    names, values, answers = next(fact_batches(999, batch=128))
    return float((model(names, values).argmax(-1) == answers).double().mean())


def with_attention(change, n_layers, seed):
    """A Retriever in double precision with softmax (change None) or differential attention, {name: value} set in its layers."""
    if change is None:
        return training.initialise(Retriever(lambda layer: MultiHeadAttention(32, 4), n_layers).double(), seed)
    model = Retriever(lambda layer: DifferentialAttention(32, 2, depth=layer), n_layers).double()
    training.initialise(model, seed)
    rng = np.random.default_rng(seed + 77)
    for layer in model.layers:
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            getattr(layer, name).data = torch.from_numpy(0.1 * rng.standard_normal(layer.d_head))
        for name, value in change.items():
            setattr(layer, name, value)
    return model


class Run(NamedTuple):
    """What a training gave, every 25 steps from 0 on: accuracy and, of differential attention, lambda."""

    accuracy: list
    lambdas: list
    n_parameters: int


@functools.cache
def train_retriever(name, seed, lr=0.01, steps=200):
    """A Run of a Retriever of one layer with "softmax" or "differential" attention."""
    model = with_attention(None if name == "softmax" else {}, 1, seed)
    lambdas = []

    def measure(model):
        lambdas.append(float(getattr(model.layers[0], "lam", torch.zeros(()))))
        return accuracy(model)

    with torch.no_grad():
        start = measure(model)
    history = training.fit(model, fact_batches(seed), retrieval_loss, steps, lr=lr, evaluate=measure, every=25)
    return Run([start, *history.metrics], lambdas, sum(p.numel() for p in model.parameters()))


def first_gradients(change, n_layers=4, seeds=3):
    """Norms of the gradients of W_V before the first step: (seeds, n_layers). change: as in with_attention."""
    found = np.zeros((seeds, n_layers))
    for seed in range(seeds):
        model = with_attention(change, n_layers, seed)
        retrieval_loss(model, next(fact_batches(seed))).backward()
        found[seed] = [float(layer.w_v.grad.norm()) for layer in model.layers]
    return found

# %% [markdown]
# **The gated head of 11.14**, on the task of lecture 05.

# %% tags=["export", "plumbing"]
class GatedHead(MultiHeadAttention):
    """Multi-head attention with a gate sigmoid(x w_gate) on the heads' outputs, before W_O: one a head, or one a column."""

    def __init__(self, d_model, n_heads, positions, columns):
        super().__init__(d_model, n_heads, positions)
        self.w_gate = nn.Parameter(torch.randn(d_model, n_heads * columns))
        self.outputs.register_forward_hook(lambda module, given, heads: heads * self.gate)

    def forward(self, x, **named):
        self.gate = torch.sigmoid(split_heads(x @ self.w_gate, self.n_heads))
        return super().forward(x, **named)


def train_gated(columns, seed, steps=400):
    """A model of one layer and one head of 32, trained on the copying texts of lecture 05; columns: gates, 0, 1 or 32."""

    def attention(config, layer, positions):
        return GatedHead(32, 1, positions, columns) if columns else MultiHeadAttention(32, 1, positions)

    model = TransformerLM(TransformerConfig(N_TOKENS, 32, 1, 1, 0), attention, Rotary(32)).double()
    rng = np.random.default_rng(seed)
    texts = (torch.from_numpy(copying_texts(rng, 32, 32)) for _ in range(steps))
    training.fit(training.initialise(model, seed), texts, training.next_token_loss, steps, lr=1e-2)
    return model

# %% [markdown]
# ## Glossary
#
# |term|what it is|
# |---|---|
# |attention noise|what a head's output gets from keys that have nothing to do with its query|
# |DEX|a small difference on the outputs of trained heads, weights as they are|
# |differential attention|one softmax map minus λ times another, over the same values|
# |dilution|the loss of a needle's weight when distractors are added|
# |distractor, needle|a key that the query does not look for; the one that it does|
# |gate|a factor between 0 and 1 on a head's output, before $W_O$|
# |key-query convolution|scores of neighbouring queries and keys are mixed before the softmax|
# |λ, $\lambda_\text{init}$|the factor of the second map; its fixed part, which grows with the depth|
# |LSE|log-sum-exp of a row of scores|
# |sink|a token, or a learned score, on which a head puts the mass it has no use for|
# |V1, V2|differential attention with a norm and one λ a layer; with pairs in a key group and a λ for each token|
#
# ## Sources
#
# Ye et al. 2024, Differential Transformer (arXiv 2410.05258); code in microsoft/unilm, `Diff-Transformer`; DIFF V2: blog of
# 2026-01-20 (huggingface.co/blog/microsoft/diff-attn-v2) · Kong et al. 2025, DEX (2505.16333) · Qiu et al. 2025, gated attention (2505.06708) ·
# Golovneva et al. 2025, multi-token attention (2504.00927) · Allal et al. 2025, SmolLM2 (2502.02737) · transformers 5.23.0.
