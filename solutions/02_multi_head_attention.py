# ---
# jupyter:
#   course:
#     edition: 2
#     experiments:
#     - minilm_layer
#     - explained
#     - repeated
#     - train_repeats
#     - with_module
#     - head_importance
#     - train_translator
#     - named_shares
#     - Sentiment
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

# %% [markdown] tags=["slide"]
# # Lecture 02 · Multi-head attention
#
# **The question.** What if a token has to look at two things at once? **You will be able to** *split* a layer into heads and
# *write* it in NumPy (2A, 2B) and as a module with places for hooks (2D), *test* one (2C), *find* heads with a job and
# *silence* them (2E to 2G), *read* heads in place on a GPU (2H).
# **You need** attention, masks, modules and training steps (lecture 01).
#
# | part or section | core minutes | more minutes |
# |---|---|---|
# | Part 1 · the question: 2.1 | 10 | |
# | Part 2 · NumPy: 2.2 to 2.4, exercises 2A, 2B | 56 | |
# | Part 3 · PyTorch: 2.5, 2.6, exercises 2D, 2E, 2G | 82 | |
# | Part 4 · CUDA: 2.7, 2.8 | 22 | |
# | Part 5 · does it matter: 2.9, 2.10 | 10 | |
# | Another day: exercises 2C, 2F, 2H | | 45 |
# | Going further: 2.11 to 2.20 | | 90 |
# | **together** | **180** | **135** |

# %% [markdown] tags=["teacher"]
# **For the teacher: two times 50 minutes, ten to spare in each.** Run everything before class.
#
# - *Hour 1 (40).* 2.1: the twelve rows, the prediction, the bars (9) · 2.2: loop, flow figure, worked example on paper (13) ·
#   2.3: one product or 36, what a reshape does (9) · 2.4: FLOPs stay, memory grows (6) · say what 2A and 2B ask (3).
# - *At home after hour 1.* 2A, 2B. For volunteers 2C.
# - *Hour 2 (40).* 2.5: the contract of 2D, the jump, the two patterns, the cloud of 270 heads (16) · 2.6: sum over heads,
#   both ablations (12) · 2.8: arithmetic, which sectors a head touches (6) · 2.9: the curves of two texts (6).
# - *At home after hour 2.* 2D, 2E, 2G. For volunteers 2F, 2H.
# - *Board.* $\text{out}=\sum_i\text{head}_iW^O_i$, and the two-step circuit: who writes, who reads.
# - *Always works.* In 2.6 let the class name ten of the 270 heads and silence them.
# - *Checkpoint 1.* Does a head see a slice of the token? (No: a slice of the projection.) *Checkpoint 2.* Why can one layer
#   not copy? (No key knows its predecessor.)
# - *Skip first.* Two machines in 2.7 (3), then the second curve of 2.5 (3): both read well at home.
# - *Questions that come.* Does one head not look at both? It does; the values come back mixed. Have all heads a job with a
#   name? No: 2.13 counts.

# %%
import math
import os
import sys

sys.path.insert(0, "." if os.path.exists("course.py") else "..")

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from utils import data, plotting, training
from utils.check import check

torch.set_num_threads(1)  # tiny models: one thread is fastest

# %% [markdown]
# ## Part 1 · The question
#
# ### 2.1 Why one head is not enough
#
# **What does one look miss?** In lecture 01 one head of MiniLM (layer 3, head 1) looked from *it* to *animal* with 0.68. It
# was not alone: the layer has twelve heads, and each has a row for *it*.
#
# *Predict.* How many of the twelve look mostly at *animal*?

# %% tags=["slide"]
from attention.experiments.multi_head import minilm_layer

sentence = "The animal didn't cross the street because it was too tired."
layer = minilm_layer(sentence, 3)
tokens = layer.tokens
it, animal = tokens.index("it"), tokens.index("animal")
rows = layer.weights[:, it]  # (12 heads, 16 tokens)
plotting.heatmap(rows, [f"head {h}" for h in range(12)], tokens, ylabel="heads",
                 title='Twelve looks of one word: only head 1 looks mostly at "animal"')
plotting.show('Twelve rows of weights of the word "it": head 1 has 0.68 on "animal", '
              "most others rest on the start token.")
print(f"it -> animal in head 1: {rows[1, animal]:.2f}, "
      f"in the others at most {np.delete(rows[:, animal], 1).max():.2f}")

# %% [markdown]
# One. The others spread their weight over *tired*, *because*, *was*, or rest on the start token. Twelve blends, where
# one head would return one. **What can a single blend not say?** Eight keys carry a number each. A question names two of
# them, first $a$, then $b$; the answer is $v_a+v_b$, or $v_a-v_b$. We train attention and one linear layer, with one
# head of 32 numbers or two of 16: as many parameters, as many FLOPs.
#
# *Predict.* Which of the two can one head learn? (1 is perfect, 0 is always guessing the mean.)

# %% tags=["slide"]
from attention.experiments.multi_head import explained

shares = {f"{task}, {heads} head{'s' * (heads > 1)}":
          [explained(task, heads, seed) for seed in range(2)]
          for task in ("sum", "difference") for heads in (1, 2)}
plotting.bars(shares, ylabel="share of the variance explained",
              title="One head adds two values, but subtracts them only by half")
plotting.show("Four bars, two seeds each: the sum is near 1 with one head and with "
              "two; the difference is about one half with one head, near 1 with two.")
for name, runs in shares.items():
    print(f"{name:19s}", " and ".join(f"{share:.1f}" for share in runs))

# %% [markdown]
# The sum. One head *does* look at both keys, but its weights are positive and what comes back is mixed: $p_av_a+p_bv_b$.
# A sum can be read off that, a difference cannot: the best is to look at one of the two, and that explains half. Two heads
# bring two blends, and the last layer subtracts. "With a single attention head, averaging inhibits this" (Vaswani et
# al. 2017, § 3.2.2): not looking at two places, but telling apart what was found there.

# %% [markdown] tags=["slide"]
# ## Part 2 · NumPy
#
# ### 2.2 Parameter matrices
#
# **What belongs to one head?** Three matrices of its own, and a slice of a fourth.
#
# $$\text{head}_i=\text{attention}(X_qW^Q_i,\;X_{kv}W^K_i,\;X_{kv}W^V_i)\qquad
#   \text{out}=[\text{head}_1;\ldots;\text{head}_h]\,W^O$$
#
# |array|shape|meaning|
# |---|---|---|
# |$X_q$, $X_{kv}$|`(n_queries, d_model)`, `(n_keys, d_model)`|who asks, who answers; in self-attention the same|
# |$W^Q_i$, $W^K_i$|`(d_model, d_head)`|what head $i$ asks for, and what it can be found by|
# |$W^V_i$|`(d_model, d_v)`|what it hands over; usually $d_v=d_\text{head}$|
# |$W^O$|`(h * d_v, d_model)`|mixes what the heads found|
#
# Here are those of our layer, on our sentence: twelve heads of 32. (MiniLM adds biases. A bias is one more row of a matrix,
# if a 1 stands at the end of each token: so $x$ has 385 columns.)

# %% tags=["first-attention", "slide"]
from attention.fundamentals import attention_numpy

x, w_q, w_k, w_v, w_o = layer.x, layer.w_q, layer.w_k, layer.w_v, layer.w_o
n_heads, d_head = 12, 32
found = []
for h in range(n_heads):
    own = slice(h * d_head, (h + 1) * d_head)  # the columns of head h
    found.append(attention_numpy(x @ w_q[:, own], x @ w_k[:, own], x @ w_v[:, own]))
side_by_side = np.concatenate(found, axis=-1)  # (16, 384)
out_loop = side_by_side @ w_o
print(f"x {x.shape}, w_q {w_q.shape}, a head finds {found[0].shape}, w_o {w_o.shape}")
print(f"first output of it: {out_loop[it, 0]:.3f}")
print(f"largest difference to the layer itself: "
      f"{np.abs(out_loop + layer.b_o - layer.out).max():.5f}")

# %% [markdown]
# That is MiniLM's own layer, rebuilt from its numbers; the first output of *it* will come back.

# %% tags=["slide"]
cut = {name: np.stack([(x @ w)[:, 32 * h:32 * h + 32] for h in range(12)])
       for name, w in (("q", w_q), ("k", w_k), ("v", w_v))}
plotting.flow(
    {"x": x, **cut, "weights": layer.weights, "heads": np.stack(found),
     "side by side": side_by_side, "out": out_loop},
    [("x", "q", "W_Q"), ("x", "k", "W_K"), ("x", "v", "W_V"),
     (("q", "k"), "weights", "softmax\nq kᵀ / √d_head"),
     (("weights", "v"), "heads", "weights · v"),
     ("heads", "side by side", "merge"), ("side by side", "out", "W_O")],
    title="Twelve heads: split after the projections, merged before the last one")
plotting.show("Data flow: the sentence is projected to queries, keys and values of "
              "twelve heads, each head has weights and a blend; side by side they "
              "are multiplied by the last matrix.")

# %% [markdown]
# **Trap.** *"Pass the attention scores of the heads through a final linear layer."* It is the heads' **outputs** that go
# through $W^O$, `(seq, h * d_v)`. The scores are `(h, n, n)`; no matrix of fixed size could take them.
#
# How many parameters is that? With $d_\text{head}=d_\text{model}/h$ four matrices of $d_\text{model}^2$ numbers, whatever
# $h$ is. PyTorch's layer has as many; it stacks the first three in one, `in_proj_weight`, transposed (torch computes
# `x @ w.T`). And the course's language model, SmolLM2?
#
# *Predict.* It has 134.5 million parameters. Which share is in the matrices of attention?

# %% tags=["language-model"]
from utils import language_model

smollm = language_model.load()
if smollm:
    attention = smollm.blocks[0].attention
    for name in ("w_q", "w_k", "w_v", "w_o"):
        print(f"{name} {tuple(getattr(attention, name).shape)}", end="  ")
    of_layer = sum(p.numel() for p in attention.parameters())
    everything = sum(p.numel() for p in smollm.parameters())
    print(f"\n30 layers of 9 heads: {30 * 9} heads, {30 * of_layer:,} parameters, "
          f"{30 * of_layer / everything:.0%} of {everything:,}")

# %%
theirs = nn.MultiheadAttention(384, 12, batch_first=True, dtype=torch.float64)
for name, parameter in theirs.named_parameters():
    print(f"{name:16s} {tuple(parameter.shape)}")
ours = sum(w.size for w in (w_q, w_k, w_v, w_o, layer.b_o))
torchs = sum(p.numel() for p in theirs.parameters())
print(f"MiniLM's layer {ours:,}, torch's {torchs:,}, "
      f"4 · 384² = {4 * 384**2:,} and 4 · 384 biases")

# %% [markdown]
# About a fifth. (Its $W_K$ and $W_V$ are narrower: three heads of keys serve nine of queries, lecture 08. Most of the rest is in
# the feed-forward layers and in the table of words.)
#
# #### A worked example, with a pencil
#
# Three tokens of two numbers, two heads of one number each, $W^Q=W^K=W^V=I$: head 0 sees the first number of each token,
# head 1 the second. With $d_\text{head}=1$ nothing is scaled. *Predict.* Do the first row on paper.

# %%
pencil = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
w_last = np.array([[1.0, 1.0], [1.0, -1.0]])
two = [attention_numpy(a, a, a) for a in (pencil[:, :1], pencil[:, 1:])]
merged = np.concatenate(two, axis=-1)
print("side by side\n", np.round(merged, 3))
print("times W_O\n", np.round(merged @ w_last, 3))

# %% [markdown]
# Row 0, head 0: the query is 1, the keys 1, 0, 1, so the weights are $e,1,e$ over $2e+1$, and the values are the keys:
# $2e/(2e+1)=0.845$. Head 1: the query is 0, all weights are a third: $0.667$. The last matrix adds them and subtracts
# them: 1.511 and 0.178. The difference is what 2.1 was about.

# %% [markdown]
# ### 2.3 Linear projections in detail
#
# **36 small products, or one?** Twelve heads have $3h=36$ matrices in front. All multiply $x$, so they may stand side by
# side in one matrix, and the product is cut by columns.
#
# *Predict.* One number of the token *it* changes. How many of the twelve heads notice?

# %%
w_qkv = np.concatenate([w_q, w_k, w_v], axis=1)  # (385, 1152)
fused = x @ w_qkv  # one product
separate = [x @ w[:, 32 * h:32 * h + 32] for w in (w_q, w_k, w_v) for h in range(12)]
gap = np.abs(fused - np.concatenate(separate, axis=1)).max()
print(f"fused {fused.shape}, largest difference to 36 products {gap:.6f}")

moved = x.copy()
moved[it, 0] += 1.0
change = np.abs((moved - x) @ w_q)[it].reshape(12, 32).max(axis=1)
print("change of each head's query:", *(f"{c:.2f}" for c in change))

# %% [markdown]
# All. A column of a product depends on one column of the matrix, so the 36 were never separate things: head $i$ owns
# the columns $i\,d_\text{head}$ to $(i+1)\,d_\text{head}$ of $W^Q$, and computes its query from *all* numbers of the
# token. **A head is not a slice of the token. It is a slice of the projection.** To attend in all heads with one call, the
# heads have to become an axis of their own, in front of the sequence.
#
# #### Exercise 2A: split the heads  (difficulty 2 of 5, essential, 8 minutes)
#
# |argument|shape|meaning|
# |---|---|---|
# |`x`|`(..., seq, n_heads * d_head)`|array or tensor; a row for each token, the heads side by side|
# |`n_heads`|int|into how many the last axis is cut|
#
# Returns `(..., n_heads, seq, d_head)`, an array or a tensor as `x` is: head $i$ has the columns $i\,d_\text{head}$ to
# $(i+1)\,d_\text{head}$.
#
# <details><summary>Hint</summary>
#
# Which reshape cuts the last axis in two and moves no number? Which two axes have to change places then, counted from the
# end? Which methods have arrays and tensors both?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def split_heads(x, n_heads):
    """Cut the last axis into heads. Arrays and tensors.

    x (..., seq, n_heads * d_head). Returns (..., n_heads, seq, d_head): head i gets
    the columns i * d_head to (i + 1) * d_head. ValueError unless n_heads divides them.
    """
    if n_heads < 1 or x.shape[-1] % n_heads:
        raise ValueError("n_heads must divide the last axis of x, "
                         f"got {n_heads} heads and {x.shape[-1]} columns")
    ### BEGIN SOLUTION
    cut = x.reshape(*x.shape[:-1], n_heads, x.shape[-1] // n_heads)
    return cut.swapaxes(-3, -2)
    ### END SOLUTION

# %%
split_heads = check("2A", split_heads)

# %% [markdown]
# **Trap.** *"To get the heads, reshape to (heads, seq, d_head)."* The shape is right. *Predict.* What is in head 0?

# %% tags=["slide"]
numbered = np.arange(4)[:, None] * 10 + np.arange(6)  # token t, column c: 10 t + c
plotting.memory({"token": numbered.reshape(-1) // 10,
                 "head, split": np.tile(np.arange(6) // 3, 4),
                 "head, reshaped": np.arange(24) // 12},
                title="A reshape gives head 0 whole tokens; a split gives it columns")
plotting.show("Memory of four tokens of six numbers in three lines: the token of each "
              "number, its head after a split (three and three, alternating), and "
              "after a plain reshape (the first twelve, the last twelve).")
print("reshaped, head 0:", *numbered.reshape(2, 4, 3)[0].tolist())
print("split, head 0:   ", *split_heads(numbered, 2)[0].tolist())

# %% [markdown]
# All numbers of the first two tokens. A reshape moves nothing; it cuts the same row of numbers at other places.
# `swapaxes` moves nothing either: it changes strides. The copy comes when somebody wants the new order in one piece, as
# the inverse does (2.8 counts its bytes):

# %% tags=["export"]
def merge_heads(x):
    """The inverse of split_heads, for arrays and tensors.

    x (..., n_heads, seq, d_head). Returns (..., seq, n_heads * d_head).
    """
    x = x.swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])

# %% [markdown] tags=["slide"]
# #### Exercise 2B: all heads at once  (difficulty 3 of 5, essential, 15 minutes; if you do only two)
#
# Project, split, attend in all heads with *one* call, merge, project.
#
# |argument|shape|meaning|
# |---|---|---|
# |`x_q`, `x_kv`|`(..., n_queries, d_model)`, `(..., n_keys, d_model)`|who asks, who answers|
# |`w_q`, `w_k`|`(d_model, h * d_head)`|used as `x @ w`|
# |`w_v`, `w_o`|`(d_model, h * d_v)`, `(h * d_v, d_out)`|values in, everything out|
# |`n_heads`|int|$h$|
# |`mask`|booleans, broadcastable to `(..., h, n_queries, n_keys)`|True = may attend|
# |`causal`|bool|also forbid the future|
#
# Returns `(..., n_queries, d_out)`.
#
# <details><summary>Hint</summary>
#
# Which of the two inputs makes the queries, which the keys and the values? `attention_numpy(q, k, v, mask, causal)` takes
# any axes in front: what has to stand there? What undoes the split, and what is left to do after it?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def multi_head(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    """Multi-head attention in NumPy: project, attend in each head, merge, project.

    x_q (..., n_queries, d_model), x_kv (..., n_keys, d_model); w_q, w_k (d_model,
    n_heads * d_head), w_v (d_model, n_heads * d_v), w_o (n_heads * d_v, d_out); mask
    boolean, True = may attend. Returns (..., n_queries, d_out).
    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.2.
    """
    ### BEGIN SOLUTION
    q, k, v = (split_heads(x @ w, n_heads)
               for x, w in ((x_q, w_q), (x_kv, w_k), (x_kv, w_v)))
    return merge_heads(attention_numpy(q, k, v, mask, causal)) @ w_o
    ### END SOLUTION

# %%
multi_head = check("2B", multi_head)

# %%
out = multi_head(x, x, w_q, w_k, w_v, w_o, 12)
print(f"first output of it: {out[it, 0]:.3f}")
print(f"largest difference to the loop {np.abs(out - out_loop).max():.6f}")
with torch.no_grad():  # MiniLM's numbers in torch's layer
    theirs.in_proj_weight.copy_(torch.from_numpy(w_qkv[:384].T))
    theirs.in_proj_bias.copy_(torch.from_numpy(w_qkv[384]))
    theirs.out_proj.weight.copy_(torch.from_numpy(w_o.T))
    theirs.out_proj.bias.zero_()
    x_torch = torch.from_numpy(x[None, :, :384])
    expected, mean_map = theirs(x_torch, x_torch, x_torch)
print(f"to nn.MultiheadAttention {np.abs(out - expected[0].numpy()).max():.6f}")

# %% [markdown]
# The number has not changed.
#
# #### Exercise 2C: review this code  (difficulty 3 of 5, useful, 15 minutes)
#
# *Another day.* Listings like this one are in many tutorials. *Before you write: how many faults do you see?*

# %%
def layer_for_review(x, w_q, w_k, w_v, w_o, n_heads, key_mask):
    batch, n, d_model = x.shape
    q, k, v = ((x @ w).reshape(batch, n_heads, n, -1) for w in (w_q, w_k, w_v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(d_model)
    scores = np.where(key_mask, -np.inf, scores)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return (weights @ v).swapaxes(1, 2).reshape(batch, n, -1) @ w_o, weights

# %% [markdown]
# Write the test that this listing should have had. It is given such a function and notices whether it is wrong; it is tried
# on right ones and on eleven wrong ones.
#
# |argument of `layer`|shape|meaning|
# |---|---|---|
# |`x`|`(batch, n, d_model)`|sentences that attend to themselves|
# |`w_q`, `w_k`, `w_v`, `w_o`|`(d_model, d_model)`|used as `x @ w`|
# |`n_heads`|int|divides `d_model`|
# |`key_mask`|`(batch, n)` booleans|True = all of this sentence may attend to this key|
#
# A right `layer` returns `(out, weights)`: `(batch, n, d_model)` and `(batch, n_heads, n, n)`; a sentence without any key
# gets zeros in both. Your test returns nothing: it raises an error (`assert ...`) for a wrong layer, and none for a right one.
#
# <details><summary>Hint</summary>
#
# Call your `multi_head` (2B) for one sentence alone: which mask does it need? How many sentences must a test have, so that a
# mask of the wrong one shows? What about a sentence without keys, and about large scores? And the weights: what do rows sum to?
#
# </details>

# %% tags=["exercise", "export"] kind="bug"
def test_layer(layer):
    """Raise AssertionError if layer(x, *four matrices, n_heads, key_mask) is wrong."""
    ### BEGIN SOLUTION
    rng = np.random.default_rng(2)
    masks = np.array([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1]], bool)
    w = rng.standard_normal((4, 6, 6))
    for size in (1.0, 30.0):
        x = size * rng.standard_normal((4, 4, 6))
        out, weights = layer(x, *w, 3, masks)
        assert out.shape == (4, 4, 6) and weights.shape == (4, 3, 4, 4)
        for b in range(4):
            expected = multi_head(x[b], x[b], *w, 3, masks[b])
            assert np.allclose(out[b], expected), f"sentence {b}, size {size}"
            assert np.allclose(weights[b].sum(-1), masks[b].any())
            assert not weights[b][..., ~masks[b]].any()
    ### END SOLUTION

# %%
test_layer = check("2C", test_layer)

# %%
try:
    with np.errstate(all="ignore"):
        test_layer(layer_for_review)
except Exception as error:
    print(f"the listing is refused: {type(error).__name__}")

# %% [markdown]
# Its six: heads cut by a plain reshape; the scale from the wrong width; the mask turned round (a habit from libraries in
# which True means *forbidden*), and laid on the wrong axes; a softmax that is not shifted; nan for a sentence without keys.
#
# ### 2.4 Head dimension calculations
#
# **Do more heads cost more?** With $d_\text{head}=d_\text{model}/h$ the four projections take $8\,n\,d_\text{model}^2$
# FLOPs, and attention $4\,n^2d_\text{head}$ in each of $h$ heads.
#
# *Predict.* From 1 head to 16: what happens to the FLOPs, and what to the memory? (torch counts, and NumPy's allocations are
# traced, in an answer to 2B that holds all heads at once.)

# %%
import tracemalloc
from torch.utils.flop_counter import FlopCounterMode
from attention.multi_head import multi_head as all_at_once
from attention.multi_head import multi_head_attention_torch as all_heads

draw = np.random.default_rng(4)
tokens_256 = draw.standard_normal((256, 64))
matrices = draw.standard_normal((4, 64, 64)) / 8
as_torch = [torch.from_numpy(a) for a in (tokens_256, tokens_256, *matrices)]
flops, peaks, counts = [], [], (1, 2, 4, 8, 16)
for h in counts:
    with FlopCounterMode(display=False) as counter:
        all_heads(*as_torch, h)
    flops.append(counter.get_total_flops())
    tracemalloc.start()
    all_at_once(tokens_256, tokens_256, *matrices, h)
    peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
    tracemalloc.stop()
    print(f"{h:2d} heads of {64 // h:2d}: {flops[-1]:,} FLOPs, peak {peaks[-1]:3.0f} "
          f"MB, scores alone {h * 256 * 256 * 8 / 1e6:3.0f} MB")

# %% tags=["slide"]
plotting.curves({"FLOPs": np.array(flops) / flops[0],
                 "peak memory": np.array(peaks) / peaks[0]}, x=counts, log_y=True,
                xlabel="heads, 64 columns in all", ylabel="relative to one head",
                title="More heads: the FLOPs stay, the memory grows"
                ).set_xscale("log", base=2)
plotting.show("Two lines against the number of heads, logarithmic: FLOPs level, peak "
              "memory rising almost in proportion.")

# %% [markdown]
# The FLOPs do not move: $h$ heads of $1/h$ the size. Every head has an $n\times n$ matrix of its own, so written-out
# scores take $h\,n^2$ numbers (lecture 06 does not write them).
#
# **Trap.** *"Complexity grows with each attention head."* Which one, and what is held fixed? FLOPs and parameters do not, at
# fixed `d_model`. With `d_head` fixed, heads are really *added*, and everything grows.
#
# **What is the price of many heads, then?** The scores of a head, $Q_iK_i^\top$, have at most rank $d_\text{head}$.

# %%
for h in (1, 4, 16, 64):
    q_one, k_one = (split_heads(tokens_256 @ m, h)[0] for m in matrices[:2])
    rank = np.linalg.matrix_rank(q_one @ k_one.T)
    print(f"{h:2d} heads of {64 // h:2d}: 256 x 256 scores of rank {rank}")
wide = draw.standard_normal((3, 64, 16 * 24)) / 8
wide_out = multi_head(tokens_256, tokens_256, *wide, wide[0].T / 6, 16)
print("16 heads of 24 in a model of 64:", wide_out.shape)

# %% [markdown]
# With 64 heads of size 1, a token is found by a single number: many looks, each with poor eyes (the low-rank bottleneck of
# Bhojanapalli et al. 2020, arXiv 2002.07028). That $d_\text{head}=d_\text{model}/h$ is a convention, not a law: the last line
# runs 16 heads of 24. Queries and keys must agree in width; values may be narrower or wider.

# %% [markdown]
# ## Part 3 · PyTorch
#
# ### 2.5 Pattern specialisation per head
#
# **Do heads come to do different things, if nobody tells them to?** That needs a model that is trained, and so a module.
#
# #### Exercise 2D: the layer, with places to look in  (difficulty 3 of 5, essential, 20 minutes; if you do only two)
#
# The layer on which later lectures build. Three things are new. It can be told *positions*, handed a *cache* (lecture 05),
# and two of its steps are modules that do nothing: **places for hooks**. What a hook on them returns takes their place.
#
# |array|shape|
# |---|---|
# |parameters `w_q`, `w_k`, `w_v`, `w_o`, random at first, of a size near `d_model**-0.5`|`(d_model, d_model)`, used as `x @ w`|
# |`x` asks, `x_kv` answers (by default `x` itself)|`(batch, n_queries, d_model)`, `(batch, n_keys, d_model)`|
# |q, k, v|`(batch, n_heads, n, d_head)`|
# |scores, weights; the weights go through `self.weights`|`(batch, n_heads, n_queries, n_keys)`|
# |what the heads found; it goes through `self.outputs`|`(batch, n_heads, n_queries, d_head)`|
# |out|`(batch, n_queries, d_model)`|
#
# In self-attention (no `x_kv`) `self.positions.rotate(a, positions)` turns q and k, and `self.positions.bias(n_queries,
# n_keys)` is added to the scores, unless it is None. A cache comes after the rotation: `k, v = cache.update(k, v)`.
# `masked_softmax(scores, mask, causal)` is given. Returns the merged heads, multiplied by `w_o`.
#
# <details><summary>Hint</summary>
#
# A module that hands on what it gets: `nn.Identity()`. A parameter of size (a, b): `nn.Parameter(torch.randn(a, b) *
# a**-0.5)`. Which sequence makes q, which k and v? In which order do rotate, cache, bias, softmax, `self.weights` and
# `self.outputs` stand? What has to happen between `self.outputs` and `w_o`?
#
# </details>

# %%
from attention.multi_head import masked_softmax
from utils import cuda

# %% tags=["export"]
class Positions(nn.Module):
    """How a model knows the order of its tokens: not at all. A scheme overrides one."""

    def embed(self, x, positions):
        """Add positions, (seq,) or (batch, seq), to x (batch, seq, d_model)."""
        return x

    def rotate(self, x, positions):
        """Turn queries or keys x (batch, n_heads, seq, d_head) by their positions."""
        return x

    def bias(self, n_queries, n_keys):
        """Numbers to add to the scores: (n_heads, n_queries, n_keys), or None.

        Aligned at the bottom right: the last query stands at the last key.
        """
        return None

# %% tags=["exercise", "export"] kind="module"
class MultiHeadAttention(nn.Module):
    """Multi-head attention, self or cross, with places to look at what a head does.

    Hooks on `weights` see the attention weights (batch, n_heads, n_queries, n_keys);
    those on `outputs` what the heads found (batch, n_heads, n_queries, d_head).
    """

    def __init__(self, d_model, n_heads, positions=None):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError("n_heads must divide d_model, "
                             f"got {n_heads} and {d_model}")
        self.n_heads, self.d_model = n_heads, d_model
        self.positions = Positions() if positions is None else positions
        ### BEGIN SOLUTION
        self.w_q, self.w_k, self.w_v, self.w_o = (
            nn.Parameter(torch.randn(d_model, d_model) * d_model**-0.5)
            for _ in range(4))
        self.weights, self.outputs = nn.Identity(), nn.Identity()
        ### END SOLUTION

    def forward(self, x, x_kv=None, mask=None, causal=False, positions=None,
                cache=None):
        for name, tokens in (("x", x), ("x_kv", x if x_kv is None else x_kv)):
            if tokens.dim() != 3 or tokens.shape[-1] != self.d_model:
                wanted = f"(batch, seq, {self.d_model}), got {tuple(tokens.shape)}"
                raise ValueError(f"{name} must have shape {wanted}")
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        ### BEGIN SOLUTION
        other = x if x_kv is None else x_kv
        q = split_heads(x @ self.w_q, self.n_heads)
        k, v = (split_heads(other @ w, self.n_heads) for w in (self.w_k, self.w_v))
        if x_kv is None:
            q, k = (self.positions.rotate(heads, positions) for heads in (q, k))
        if cache is not None:
            k, v = cache.update(k, v)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        bias = self.positions.bias(*scores.shape[-2:]) if x_kv is None else None
        if bias is not None:
            scores = scores + bias
        weights = self.weights(masked_softmax(scores, mask, causal))
        return merge_heads(self.outputs(cuda.weighted_sum(weights, v))) @ self.w_o
        ### END SOLUTION

# %%
MultiHeadAttention = check("2D", MultiHeadAttention)

# %% [markdown]
# **Into a real model.** Your layer takes the place of all thirty in SmolLM2: its matrices are put into yours, its
# rotation is your `positions`. (Each of its three key heads is written three times, once for each query head that asks it.)

# %% tags=["language-model", "slide"]
if smollm:
    from attention.experiments.multi_head import with_module

    text = language_model.excerpt(smollm, 128)
    mine = with_module(smollm, MultiHeadAttention)
    with torch.no_grad():
        gap = (mine(text[:, :32]) - smollm(text[:, :32])).abs().max()
    print(f"loss {mine.losses(text).mean():.3f}, with its own layers "
          f"{smollm.losses(text).mean():.3f}, logits differ by less than 0.01: "
          f"{bool(gap < 0.01)}")
    language_model.speak(mine, "The capital of Germany is", 8)
    del mine

# %% [markdown]
# It speaks. **A small language model** of our own is a stack of such layers. Each *adds* to what came in, attention first, then
# a small network for each token alone (*feed-forward*), both behind a norm (mean 0, variance 1). That sum is the **residual
# stream**: layers read from it and write to it.

# %% tags=["export"]
class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)) if there is one."""

    def __init__(self, config, attention, norm):
        super().__init__()
        self.norm_1, self.attention = norm(config.d_model), attention
        if config.d_ff:
            self.norm_2 = norm(config.d_model)
            self.feed_forward = feed_forward(config.d_model, config.d_ff)

    def forward(self, x, **where):
        x = x + self.attention(self.norm_1(x), causal=True, **where)
        if not hasattr(self, "feed_forward"):
            return x
        return x + self.feed_forward(self.norm_2(x))

# %% [markdown]
# `TransformerLM` (Behind the scenes) puts an embedding in front of the blocks and a linear layer behind them. The order of
# the tokens enters through `positions`: here a learned number for each head and distance, added to the scores
# (`DistanceBias`; lecture 03 compares the schemes). Does it see the future?

# %%
from contextlib import contextmanager

from attention.multi_head import DistanceBias, TransformerConfig, TransformerLM

config = TransformerConfig(vocab_size=32, d_model=48, n_heads=4, n_layers=2, d_ff=0)
model = TransformerLM(config, positions=DistanceBias(4)).double()
training.initialise(model, seed=0)
ids = torch.arange(10)[None]
changed = ids.clone()
changed[0, 5] = 20
with torch.no_grad():
    moved_at = (model(ids) != model(changed)).any(-1)[0]
print("token 5 changed; what moved:", *torch.nonzero(moved_at)[:, 0].tolist())

# %% [markdown]
# It does not. **How does one see what a head does?** With a *forward hook*: a function that PyTorch calls with what a module
# hands over. TransformerLens and its like are built on this. Fifteen lines:

# %% tags=["export"]
@contextmanager
def record(model, names=("weights", "outputs")):
    """During the block, keep what leaves the modules of these names, by their path.

    Yields {"blocks.0.attention.weights": tensor, ...}. Hooks run in the order in which
    they came: enter it after without_heads to see what is left.
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

# %% [markdown] tags=["slide"]
# #### A task in which a job can be seen
#
# A random segment of 8 to 20 different tokens is repeated until 40 are full. In the first round little can be predicted, in
# the second everything: find the last place where the present token stood, and say what came after it. The models have no
# feed-forward layers; what they learn is in the attention.
#
# *Predict.* One layer of four heads, which may look at all earlier tokens: can it do that? Do two layers learn it step by
# step?

# %% tags=["slow", "slide"]
from attention.experiments.multi_head import guess_earlier, repeated, train_repeats

sequence, period = next(repeated(seed=3, batch=1))
print("first round:", *sequence[0, :period].tolist())
two_layers = [train_repeats(2, seed) for seed in range(3)]
one_layer = [train_repeats(1, seed=0)]
plotting.curves({"two layers": [run.accuracy for run in two_layers],
                 "one layer": [run.accuracy for run in one_layer]},
                x=two_layers[0].steps, xlabel="training step",
                ylabel="accuracy in the second round",
                threshold=round(guess_earlier(), 2), threshold_name="a guess:",
                title="Two layers learn to copy within 60 steps, one layer never")
plotting.show("Accuracy in the second round against training steps: two layers, "
              "three seeds, lie flat, then jump to 1; one layer stays near the guess.")

# %%
for name, runs in (("two layers", two_layers), ("one layer ", one_layer)):
    last = [run.accuracy[-1] for run in runs]
    print(f"{name}: accuracy {min(last):.1f} to {max(last):.1f} at the end, "
          f"loss {np.mean([run.loss[-1] for run in runs]):.1f}")
jumps = [np.diff([run.steps[np.argmax(run.accuracy > level)] for level in (0.25, 0.8)])
         for run in two_layers]
print(f"two layers, from 0.25 to 0.8: in {max(jumps)[0]} steps or fewer "
      f"(at most 60: {max(jumps)[0] <= 60})")

# %% [markdown]
# It cannot, and two layers learn it in a jump. A head scores a key by the key's token, the query's token and their distance.
# The key that is wanted is the one *whose predecessor* equals the query's token, and in a single layer no key knows its
# predecessor. Somebody has to write it there first.
#
# #### Exercise 2E: two patterns  (difficulty 2 of 5, useful, 8 minutes)
#
# Measure how much of a map is one of two patterns, in sequences that repeat after `period` tokens:
#
# - **previous token**: query $i$ looks at key $i-1$. Mean weight over $i=1,\ldots,n-1$;
# - **induction**: query $i$ looks at the key *after* the last place where its own token stood, key $i-\text{period}+1$. Mean
#   weight over $i=\text{period},\ldots,n-1$.
#
# |argument|shape|meaning|
# |---|---|---|
# |`weights`|`(..., n, n)`|attention weights, rows are queries|
# |`period`|int|after how many tokens the sequence repeats; at least 2|
#
# Returns `(previous, induction)`, each of shape `(...)`.
#
# <details><summary>Hint</summary>
#
# Both are diagonals: `np.diagonal(weights, ____, axis1=-2, axis2=-1)`. Which sign has an offset below the main one? Which of
# its entries belong to queries from `period` on?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def pattern_scores(weights, period):
    """How much each map looks at the previous token, and after the last occurrence.

    weights (..., n, n), rows are queries, of sequences that repeat after `period`.
    Returns (previous, induction), each (...): the mean of weights[i, i - 1] over
    i >= 1, and of weights[i, i - period + 1] over i >= period.
    ValueError unless 2 <= period < n. Source: Olsson et al. 2022 (arXiv 2209.11895).
    """
    if not 2 <= period < weights.shape[-1]:
        raise ValueError("period must be at least 2 and less than "
                         f"n = {weights.shape[-1]}, got {period}")
    ### BEGIN SOLUTION
    previous = np.diagonal(weights, -1, axis1=-2, axis2=-1)
    induction = np.diagonal(weights, 1 - period, axis1=-2, axis2=-1)[..., 1:]
    return previous.mean(-1), induction.mean(-1)
    ### END SOLUTION

# %%
pattern_scores = check("2E", pattern_scores)

# %% tags=["slide"]
from attention.experiments.multi_head import attention_maps, two_rounds

copier = two_layers[0].model
previous, induction = pattern_scores(attention_maps(copier), period=20)
for name, scores in (("previous ", previous), ("induction", induction)):
    for i in (0, 1):
        print(f"layer {i}, {name}:", "  ".join(f"{score:.1f}" for score in scores[i]))
plotting.heads(attention_maps(copier, two_rounds()[:1]),
               title="Layer 0: heads 0 and 1 look one back; layer 1 after the twin")
plotting.show("Eight maps of one sequence in two rounds. Layer 0: heads 0 and 1 have a "
              "diagonal just below the main one, head 2 looks at itself, head 3 near "
              "itself and far back. Layer 1: all have a bright diagonal 19 tokens "
              "back in round two.")

# %% [markdown]
# Layer 0 copies to each token what stood before it. (A score of a half is an average: nearly all of the weight in the first
# rows, less in the last, where the many distant keys take most of the rest.) Layer 1 compares the present token with *that* copy
# and finds the token after the last occurrence: **induction heads** (Elhage et al. 2021; Olsson et al. 2022). Heads of two
# layers work together, and nobody told them of each other.
#
# *Predict.* In training, does the previous-token half come long before the induction half?

# %%
of_runs = [[pattern_scores(maps, 20) for maps in run.maps] for run in two_layers]
best = {"best previous-token head, layer 0":
        [[prev[0].max() for prev, _ in scores] for scores in of_runs],
        "best induction head, layer 1":
        [[ind[1].max() for _, ind in scores] for scores in of_runs],
        "accuracy": [run.accuracy for run in two_layers]}
plotting.curves(best, x=two_layers[0].steps, xlabel="training step",
                ylabel="score, accuracy",
                title="Both scores and the accuracy rise together")
plotting.show("Three curves over training steps with bands over three seeds; all lie "
              "flat and then rise within the same stretch.")
half_way = np.array([[two_layers[0].steps[np.argmax(np.array(one) > one[-1] / 2)]
                      for one in curve] for curve in best.values()])
print("half of the final value, first to last of the three: at most "
      f"{np.ptp(half_way, axis=0).max()} steps (within 50: {np.ptp(half_way) <= 50})")

# %% [markdown]
# It does not. A plausible reason: neither half is of use without the other. The paper reports the jump in much larger models:
# induction heads form "at precisely the same point as a sudden sharp increase in in-context learning ability" (abstract).
#
# #### And in a real model?
#
# Nobody built this task for SmolLM2. Fifty random tokens, twice: what its 270 heads do with the second round.
#
# *Predict.* How many of them have an induction score above 0.3? And do the previous-token heads stand before or behind them?

# %% tags=["language-model", "slide"]
if smollm:
    import matplotlib.pyplot as plt
    from attention.experiments.multi_head import ranked, twice

    fifty = [twice(smollm, seed) for seed in range(3)]  # (1, 101): start, 50, 50
    found = [pattern_scores(language_model.weights(smollm, ids)[:, :, 1:, 1:], 50)
             for ids in fifty]
    prev_real, ind_real = np.mean(found, axis=0)  # (30, 9) each, over three draws
    for name, scores in (("previous ", prev_real), ("induction", ind_real)):
        top = "  ".join(f"({i},{h}) {scores[i, h]:.2f}" for i, h in ranked(scores)[:5])
        print(f"{name}: {(scores > 0.3).sum():2d} of 270 above 0.3; {top}")
    figure, ax = plt.subplots(figsize=(6.5, 4.2))
    dots = ax.scatter(prev_real, ind_real, c=np.repeat(np.arange(30), 9))
    figure.colorbar(dots, label="layer")
    ax.set(xlabel="previous-token score", ylabel="induction score",
           title="Each job has its own few heads; no head has both")
    plotting.show("A cloud of 270 points at the origin, a few far out along one axis, "
                  "a few along the other, none in the corner; colours give the layer.")

# %% [markdown]
# Nine of 270; 15 look one back (in brackets: layer, head). The order is mostly the one that the circuit needs: the two strongest
# previous-token heads stand in layers 16 and 11, before the induction heads of layers 17 and 18. Not all do: the third stands
# in layer 19, and can feed only those behind it.
#
# ### 2.6 Output aggregation
#
# **Is the last matrix a mixer, or a sum?** Both. $W^O$ has $h$ blocks of $d_v$ rows, and a product with a concatenation is
# a sum of products:
#
# $$[\text{head}_1;\ldots;\text{head}_h]\,W^O=\sum_i\text{head}_i\,W^O_i$$
#
# #### Exercise 2F: who wrote what  (difficulty 2 of 5, useful, 8 minutes)
#
# *Another day.* Compute what each head alone adds to the output, before the sum.
#
# |argument|shape|meaning|
# |---|---|---|
# |`heads`|`(..., n_heads, seq, d_v)`|what each head found|
# |`w_o`|`(n_heads * d_v, d_model)`|the last matrix|
#
# Returns `(..., n_heads, seq, d_model)`; its sum over the heads is `merge_heads(heads) @ w_o`.
#
# <details><summary>Hint</summary>
#
# Which rows of `w_o` belong to head 0? Into which three axes do you cut it, so that `@` pairs each head with its block?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def head_contributions(heads, w_o):
    """What each head adds to the output; the sum is merge_heads(heads) @ w_o.

    heads (..., n_heads, seq, d_v), w_o (n_heads * d_v, d_model).
    Returns (..., n_heads, seq, d_model). ValueError for other numbers of axes or rows.
    """
    if len(heads.shape) < 3 or len(w_o.shape) != 2:
        raise ValueError("heads must have at least three axes (n_heads, seq, d_v) and "
                         f"w_o two, got {tuple(heads.shape)} and {tuple(w_o.shape)}")
    n_heads, d_v = heads.shape[-3], heads.shape[-1]
    if len(w_o) != n_heads * d_v:
        raise ValueError(f"w_o must have n_heads * d_v = {n_heads * d_v} rows, "
                         f"got {len(w_o)}")
    ### BEGIN SOLUTION
    return heads @ w_o.reshape(n_heads, d_v, w_o.shape[1])
    ### END SOLUTION

# %%
head_contributions = check("2F", head_contributions)

# %% [markdown]
# *Predict.* Head 1 of our layer is the one that looks at *animal*. Does it write the most into *it*?

# %% tags=["slide"]
parts = head_contributions(split_heads(side_by_side, 12), w_o)[:, it]  # (12, 384)
print(f"first output of it: {parts[:, 0].sum():.3f}, of which head 1 {parts[1, 0]:.3f}")
lengths = np.linalg.norm(parts, axis=-1)
plotting.bars({f"{h}": lengths[h] for h in range(12)},
              ylabel="length of what a head writes",
              title='Every head writes into "it", and head 1 not the most')
plotting.show("Twelve bars: lengths of the vectors that the heads of layer 3 add to "
              "the token it.")

# %% [markdown]
# Not the most. Each head writes into the residual stream by itself, and the others do not notice. That makes a clean experiment possible,
# an **ablation**: let one head write nothing, and measure.
#
# #### Exercise 2G: the loss without some heads  (difficulty 3 of 5, essential, 15 minutes)
#
# Write the hooks that silence heads. Each returns a copy of `outputs`, with zeros for its heads; `outputs` itself stays as it is.
#
# |argument|meaning|
# |---|---|
# |`model`|`model(ids)` gives logits `(batch, n, vocab_size)`; `model.blocks[i].attention.outputs` is the place, `(batch, n_heads, n, d_head)`|
# |`ids`|`(batch, n)` int64; each token but the last is to predict the next one|
# |`groups`|a list of groups; a group is a list of pairs `(layer, head)`, perhaps empty|
# |`start`|only predictions from this position on count|
#
# Returns a tensor `(len(groups),)`: for each group the mean loss (nats) while *that group alone* is silent. No gradients.
#
# <details><summary>Hint</summary>
#
# `handle = place.register_forward_hook(f)` calls `f(module, inputs, outputs)`, and what f returns takes the place of
# `outputs`; `handle.____()` takes it away: when? On what does f write its zeros, if `outputs` is still needed? A function
# made in a loop sees the loop's *last* layer: how does it keep its own? And `torch.stack` keeps the float type.
#
# </details>

# %% tags=["exercise", "export"] kind="training"
def losses_without(model, ids, groups, start=0):
    """The loss of a language model while one group of heads after the other is silent.

    ids (batch, n) int64; groups: lists of (layer, head); only the predictions of
    positions start, ..., n - 2 count. Returns (len(groups),) in the model's float type.
    """
    ### BEGIN SOLUTION
    def silencer(heads):
        def silence(_module, _inputs, outputs):
            outputs = outputs.clone()
            outputs[:, heads] = 0.0
            return outputs
        return silence

    losses = []
    for group in groups:
        handles = []
        for i, block in enumerate(model.blocks):
            own = [head for layer, head in group if layer == i]
            place = block.attention.outputs
            handles.append(place.register_forward_hook(silencer(own)))
        with torch.no_grad():
            logits = model(ids[:, :-1])[:, start:]
        for handle in handles:
            handle.remove()
        losses.append(F.cross_entropy(logits.mT, ids[:, start + 1:]))
    return torch.stack(losses)
    ### END SOLUTION

# %%
losses_without = check("2G", losses_without)

# %% [markdown]
# First our own model: its eight heads one by one, then *all* heads of layer 0 that look one back, together; and the control,
# as many other heads of the same layer, in the worst choice of them.
#
# *Predict.* How many of the eight can be silenced alone with a loss below 1 (a blind guess costs 3.5)? And which group is fatal?

# %% tags=["slide"]
from itertools import combinations

everyone = [(i, h) for i in (0, 1) for h in range(4)]
cut_off = {"none": [], "worst single": [], "worst control group": [],
           "look one back": []}
for seed, run in enumerate(two_layers):
    scores = pattern_scores(run.maps[-1], 20)[0][0]
    group = [(0, h) for h in range(4) if scores[h] > 0.25]
    others = map(list, combinations(everyone[:4], len(group)))
    others = [other for other in others if other != group]
    tried = [[], *([head] for head in everyone), *others, group]
    losses = losses_without(run.model, two_rounds(), tried, start=20).numpy()
    for name, part in zip(cut_off, np.split(losses, [1, 9, len(losses) - 1])):
        cut_off[name].append(part.max())
    print(f"seed {seed}: alone", *(f"{loss:.1f}" for loss in losses[1:9]),
          f" group of {len(group)}: {losses[-1]:.1f},",
          f"worst other: {losses[9:-1].max():.1f}")
plotting.bars(cut_off, ylabel="loss in the second round (nats)",
              title="Each loss of heads costs; "
                    "the group that looks one back costs most")
plotting.show("Four bars of loss: near 0.1 with all heads, about 1 to 2 without the "
              "worst single head and without the worst other group, and about 5 "
              "without the heads that look one back.")

# %% [markdown]
# At least seven of the eight. That does not mean that heads do not matter: several do the same, and stand in for each other, though
# not at no cost. Without the whole group the task is lost, and the control shows that it is not a matter of *how many* are
# silent. Layer 1 was not touched; what its heads look for is no longer written.
#
# *Predict.* In SmolLM2 the ten best induction heads (of 270) fall silent, or one head that looks one back. Which does more
# harm to the second round? The controls: as many heads of the same layers.

# %% tags=["language-model", "slide"]
if smollm:
    ten = ranked(ind_real)[:10]
    quiet = {i: [h for h in range(9) if ind_real[i, h] < 0.1] for i, _ in ten}
    same = [(i, quiet[i].pop(0)) for i, _ in ten]
    feeder = ranked(prev_real)[0]
    beside = next((feeder[0], h) for h in range(9) if prev_real[feeder[0], h] < 0.1)
    cases = {"none": [], "10 induction heads": ten, "10 others, same layers": same,
             f"previous-token head {feeder}": [feeder],
             f"its neighbour {beside}": [beside]}
    second = torch.stack([losses_without(smollm, ids, list(cases.values()), start=51)
                          for ids in fifty[:2]]).T  # (cases, draws)
    plotting.bars({name: row.numpy() for name, row in zip(cases, second)},
                  ylabel="loss in the second round (nats)",
                  title="Ten induction heads, or one that feeds them: the copy is lost")
    plotting.show("Five bars of loss, two draws each: low with all heads and without "
                  "either control, high without the ten induction heads and without "
                  "the one previous-token head.")
    first = float(smollm.losses(fifty[0])[:50].mean())
    print(f"first round, where nothing can be known: {first:.0f}")
    for name, row in zip(cases, second):
        print(f"{name:28s}", " ".join(f"{loss:4.1f}" for loss in row))

# %% [markdown]
# Ten heads of 270 carry nearly all of it: the loss goes most of the way back to that of the first round, and their neighbours
# in the same layers cost almost nothing. The single feeder costs more than half as much: many induction heads share what it
# writes. A circuit that was found in a toy has been found in a model that nobody built for it, by the same two functions.

# %% [markdown]
# ## Part 4 · CUDA
#
# ### 2.7 Parallel computation benefits
#
# **Heads do not wait for each other. What is that worth?** A loop over heads and one batched product do the same
# arithmetic. The difference is how often somebody has to be asked.
#
# *Predict.* 32 heads: how many matrix products does the loop start, how many the batched version?

# %%
from attention.fundamentals import attention_torch
from torch.overrides import TorchFunctionMode

class Products(TorchFunctionMode):
    """Counts the matrix products that are started during the block."""
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += "matmul" in getattr(function, "__name__", "")
        return function(*args, **(kwargs or {}))

def looped(x, w_q, w_k, w_v, w_o, n_heads):
    parts = zip(*(w.chunk(n_heads, dim=1) for w in (w_q, w_k, w_v)))
    heads = [attention_torch(x @ a, x @ b, x @ c) for a, b, c in parts]
    return torch.cat(heads, dim=-1) @ w_o

def batched(x, w_q, w_k, w_v, w_o, n_heads):
    return all_heads(x, x, w_q, w_k, w_v, w_o, n_heads)

a = torch.from_numpy(draw.standard_normal((2, 32, 128)))
w = torch.from_numpy(draw.standard_normal((4, 128, 128)) / 128**0.5)

# %%
for h in (1, 4, 32):
    with Products() as loop:
        one_by_one = looped(a, *w, h)
    with Products() as batch:
        together = batched(a, *w, h)
    print(f"{h:2d} heads: {loop.count:3d} products in the loop, {batch.count} batched; "
          f"largest difference {(one_by_one - together).abs().max():.6f}")

# %% tags=["nbval-ignore-output"]
import time

def best_ms(function, h, repeats=51):
    times = []  # a time can be too long, never too short
    for _ in range(repeats):
        start = time.process_time()
        function(a, *w, h)
        times.append(1e3 * (time.process_time() - start))
    return min(times)

for h in (1, 4, 32):
    loop, batch = best_ms(looped, h), best_ms(batched, h)
    print(f"{h:2d} heads: loop {loop:.1f} ms, batched {batch:.1f}: "
          f"{loop / batch:.1f} times")

# %% [markdown]
# (Least processor time of 51 turns on the machine that built this page.) With equal FLOPs the loop pays for calls, and for
# products too small to fill a machine. And the sum of 2.6 lets heads be **dealt out**: each of two machines gets half of the
# columns of $W^Q,W^K,W^V$ and half of the rows of $W^O$; at the end comes one sum (Shoeybi et al. 2019, arXiv 1909.08053).

# %%
halves = [slice(0, 64), slice(64, 128)]
two_machines = sum(batched(a, *(w[i][:, s] for i in range(3)), w[3][s], 2)
                   for s in halves)
print(f"two machines, two heads each: largest difference to one with four "
      f"{(two_machines - batched(a, *w, 4)).abs().max():.6f}")

# %% [markdown]
# ### 2.8 Heads in place
#
# **Where is a head in memory?** In NumPy and PyTorch it is a view. A kernel that wants each head in one piece needs real
# copies, of Q, K, V and of the result. What do they cost, for $n$ tokens of width $d$, four bytes a number?
#
# |step|FLOPs|reads|writes|
# |---|---|---|---|
# |products by $W^Q,W^K,W^V,W^O$|$8nd^2$|$16(nd+d^2)$|$16nd$|
# |attention, all heads|$4n^2d$|$12nd$ at least|$4nd$|
# |copies of Q, K, V and the result|0|$16nd$|$16nd$|
#
# *Predict.* From which length on does attention compute more than the products? How much do the copies add to the bytes?

# %%
def cost(n, d):
    """FLOPs of products and of attention, least bytes of both, bytes of the copies."""
    return 8 * n * d**2, 4 * n**2 * d, 16 * (2 * n * d + d**2) + 16 * n * d, 32 * n * d

for n in (128, 1024, 4096, 32768):
    products, of_attention, moved_bytes, copied = cost(n, d=512)
    print(f"n {n:6,}: attention {of_attention / products:5.2f} of the products' FLOPs; "
          f"copies make {(moved_bytes + copied) / moved_bytes:.2f} times the bytes")

# %% [markdown]
# From $n=2d$ on. The copies compute nothing, and add two thirds for long inputs. Do without: row $t$ of head $h$ begins at `t * row_stride + h * d_head`. *Predict.* A
# warp reads a head in place. How many sectors of 32 bytes does it touch, and how much of them does it use?

# %% tags=["slide"]
lane = np.arange(32)
for size in (16, 4):
    plotting.warp_access(4 * (lane // size * 64 + lane % size),
                         title=f"Heads of {size} in rows of 64 numbers: "
                         + ("4 full sectors" if size == 16 else "8 sectors, half used"))
plotting.show("Two maps of memory, one warp reading a head in place: heads of 16 "
              "floats fill four sectors; heads of 4 touch eight and use half of each.")

# %% [markdown]
# Four, all of them used, if a row of the head is 64 bytes; rows of 16 bytes leave half of eight sectors unused. Heads of 8 floats
# or a multiple are read in place as well as a copy would be.
#
# #### Exercise 2H: read a head in place  (difficulty 3 of 5, useful, 20 minutes)
#
# *Another day.* All 256 threads of a block copy `TILE` = 16 rows of **one head** into shared memory. The heads of a token stand side by
# side in one row.
#
# |argument|meaning|
# |---|---|
# |`tile`|shared memory; row $r$, column $c$ of the head belongs at `tile[r * stride + c]`|
# |`stride`|words from one row of the tile to the next, at least `d_head`|
# |`rows`|global memory, `(n_rows, row_stride)`; all heads of a token in its row|
# |`row_stride`|numbers in a whole row, at least `(head + 1) * d_head`|
# |`head`, `first`|which head; the first row to copy|
# |`n_rows`|how many rows there are; rows from there on are not read and become 0|
# |`d_head`|columns of one head, any number|
#
# Neighbouring threads must read neighbouring addresses within a row. Read nothing but the head. Returns nothing.
#
# <details><summary>Hint</summary>
#
# Number the 16 · `d_head` elements of the tile row after row: what are `e / d_head` and `e % d_head`? How much further down
# and to the right does this element stand in memory? Which elements does thread number `thread` take, if there are more than
# 256?
#
# </details>

# %% tags=["exercise", "export"] kind="kernel"
LOAD_HEAD = r"""
#define TILE 16
__device__ void load_head(float* tile, int stride, const float* rows, int row_stride, int head,
                          int first, int n_rows, int d_head) {
  int thread = threadIdx.y * TILE + threadIdx.x;
  // BEGIN SOLUTION
  for (int e = thread; e < TILE * d_head; e += TILE * TILE) {
    int r = e / d_head;
    int c = e % d_head;
    bool exists = first + r < n_rows;
    size_t at = (size_t)(first + r) * row_stride + head * d_head + c;
    tile[r * stride + c] = exists ? rows[at] : 0.0f;
  }
  // END SOLUTION
}
"""

# %%
LOAD_HEAD = check("2H", LOAD_HEAD)

# %% [markdown]
# The course's kernel, `attend_heads` (Behind the scenes), is that of lecture 01 with three changes: it reads heads in place and
# writes the result into the head's own columns, so that it is merged already; it **keeps the scores** of as many keys as fit, where
# lecture 01 computed each twice; and with a causal mask it leaves out tiles of the future.
#
# *Predict.* Our sentence, twelve heads of 32. How often is K read, and what does the copy variant add?

# %%
from attention.multi_head import attend_kernel, attend_launch, split_copy_kernel

q32, k32, v32 = (torch.from_numpy(x @ m).float()[None] for m in (w_q, w_k, w_v))
grid, block, shared, arguments, blended = attend_launch(q32, k32, v32, 12, None, False)
in_place = attend_kernel().check[grid, block, shared](*arguments)
apart = torch.zeros(1, 12, 16, 32)
copying = split_copy_kernel().check[24, 256](q32, apart, 12, 16, 32, q32.numel())
print(f"first output of it: {(blended[0].numpy() @ w_o)[it, 0]:.3f}; problems "
      f"{len(in_place.problems)}; the copy is split_heads: "
      f"{torch.equal(apart, split_heads(q32, 12))}")
print(f"read    {in_place.global_loaded:6,} bytes; Q, K, V once: {12 * 16 * 384:,}")
print(f"written {in_place.global_stored:6,} bytes; the result:   {4 * 16 * 384:,}")
extra = 4 * (copying.global_loaded + copying.global_stored)
print(f"four copies would move {extra:,} more; sectors of a copy's request:",
      *(row.sectors // row.requests for row in copying.rows), "(load, store)")

# %% [markdown]
# Once each, and no sector is wasted: the copy is coalesced too. It loses because it is there at all. For a sentence of 16 tokens one
# tile is enough. For 1,024 tokens of width 768 (GPT-2's first layer) each tile of 16 queries reads K and V again.
#
# *Predict.* Which of three changes buys most: no copies, kept scores, a causal mask?

# %%
turns = {}
pair = [torch.from_numpy(draw.standard_normal((1, 64, 64))).float() for _ in range(3)]
for kept in (0, 64):  # one head of 64, 64 tokens: turns of shared memory for each pair
    grid, block, shared, arguments, _ = attend_launch(*pair, 1, None, False, kept)
    counted = attend_kernel().check[grid, block, shared](*arguments)
    turns[kept] = sum(r.wavefronts for r in counted.rows if r.space == "shared") / 64**2
n, d, n_tiles, pairs = 1024, 768, 1024 // 16, 12 * 1024**2
work = 4 * n**2 * d
once = 4 * n * d  # bytes of Q, of K, of V, of the result
twice_k = turns[0] * pairs, 1.5 * work
rungs = {"copies, K read twice": ((2 + 3 * n_tiles + 8) * once, *twice_k),
         "in place, K read twice": ((2 + 3 * n_tiles) * once, *twice_k),
         "in place, scores kept": ((2 + 2 * n_tiles) * once, turns[64] * pairs, work),
         "and causal": ((3 + n_tiles) * once, turns[64] * pairs / 2, work / 2)}
plotting.ladder(rungs, bandwidth=1.555e12, turns_per_second=108 * 1.41e9, peak=19.5e12,
                title="Copies cost little here; kept scores and a causal mask pay")
plotting.show("Three bars for each of four kernels on an A100, logarithmic: shared "
              "memory is the longest in all; bytes second, arithmetic shortest.")
for name, (n_bytes, n_turns, _) in rungs.items():
    print(f"{name:22s} {n_bytes / 1e6:4.0f} MB, {n_turns / 1e6:5.0f} million turns")

# %% [markdown]
# The mask, which halves everything; kept scores save a fifth of the turns. Shared memory is the longest bar on every rung: this
# kernel computes from it, number by number. The copies are a small part of the bytes, because K and V are read 64 times.
# Lecture 06 makes both bars short.
#
# ## Part 5 · Does it matter?
#
# ### 2.9 Which heads can go?
#
# **Does a model need all its heads?** Michel, Levy and Neubig (2019, arXiv 1905.10650) find that "a large percentage of
# attention heads can be removed at test time without significantly impacting performance"; Voita et al. (2019, arXiv
# 1905.09418) prune 38 of 48 encoder heads of a translator, with training. Which ones? Removing each of 270 alone takes 270 passes.
# Cheaper: put a factor $g=1$ behind each head and ask how fast the loss changes, $|\partial L/\partial g|$. One backward
# pass gives all 270 (`head_importance`: a hook for each layer, as in 2G).
#
# We do that on one text, Python's help, and silence heads on two: on other lines of it, and on pages of this course, which the
# model has not seen.
#
# *Predict.* A tenth of SmolLM2's heads fall silent. What does that cost, in nats a token: if they are the least important ones? If
# they are drawn at random?

# %% tags=["language-model", "slide"]
if smollm:
    from attention.experiments.multi_head import head_importance

    prose = language_model.excerpt(smollm, 812)
    importance = head_importance(smollm, prose[:, 300:812].split(64, dim=1))
    order = ranked(importance)[::-1]  # the least important first
    drawn = [[order[i] for i in np.random.default_rng(seed).permutation(270)]
             for seed in (0, 1)]
    groups = [some[:count] for some in (order, *drawn) for count in (27, 54)]
    costs = {}
    for name, ids in (("help", prose[:, :160]),
                      ("course", language_model.excerpt(smollm, 160, of="course"))):
        losses = losses_without(smollm, ids, [[], *groups])
        rises = F.pad((losses[1:] - losses[0]).view(3, 2), (1, 0)).numpy()
        for which, rows in (("least important", rises[:1]), ("random", rises[1:])):
            costs[f"{name}, {which}"] = rows
            print(f"{name:6s} ({losses[0]:.1f}), {which:15s}", "  ".join(
                f"{share}%: {rise:+.2f}"
                for share, rise in zip((0, 10, 20), rows.mean(0))))
    plotting.curves(costs, x=np.array([0, 10, 20]), xlabel="% of 270 heads silent",
                    ylabel="loss above the whole model's (nats)",
                    title="In each text chosen heads cost less than drawn ones")
    plotting.show("Four rising lines of extra loss against the share of silent heads, "
                  "two for each text: in each, the least important lie below random.")

# %% [markdown]
# Chosen, 0.2 nats on the one text and next to nothing on the other; drawn, about half a nat. A fifth costs 0.6 and 0.15. The order
# is the same on both, the price is not: with 160 tokens of each, trust the order. So the claim holds, weaker than in the papers,
# which train on, or look at the accuracy of a task. And note the two traps of *can be removed*: one at a time is not all
# together (2.6), and what is dispensable after training is not dispensable during it.

# %% [markdown]
# ### 2.10 In use
#
# **What do you call on Monday?** `F.scaled_dot_product_attention` on `(batch, heads, seq, d_head)`, with projections of your
# own: in nearly every open model this is the layer. `nn.MultiheadAttention` is older: `batch_first=False` by default, masks with True =
# *blocked*, and the weights it returns are averaged. In transformers `attn_implementation="eager"` with
# `output_attentions=True` returns weights, the fast paths return none. TransformerLens and nnsight give every activation a name. You
# meet heads again when a model is dealt out over devices, when a cache is grouped (lecture 08), and in papers that name them.
#
# **Trap.** *"The attention of a layer is the mean over its heads."* `nn.MultiheadAttention` returns exactly that. *Predict.* Can the
# output be computed from it?

# %%
with torch.no_grad():
    own_maps = theirs(x_torch, x_torch, x_torch, average_attn_weights=False)[1]
print("by default", tuple(mean_map.shape), " on request", tuple(own_maps.shape))
from_mean = mean_map[0].numpy() @ (x @ w_v) @ w_o
error = np.linalg.norm(from_mean - out) / np.linalg.norm(out)
print(f"it -> animal: {own_maps[0, 1, it, animal]:.2f} in head 1, "
      f"{mean_map[0, it, animal]:.2f} in the mean")
print(f"output from the mean map: off by {error:.0%}")

# %% [markdown]
# No. The mean map belongs to no head: each blends its own values by its own weights.
#
# ## What you can do now
#
# You can split a layer into heads, in NumPy, as a module and in a kernel that copies nothing, and test it. You can say what a head
# writes, find heads with a job in any model, and silence them. You know that one circuit takes two layers.

# %% tags=["slide"]
last_maps = attention_maps(copier, two_rounds()[:1])
plotting.heads(np.stack([last_maps[0, 0], last_maps[1, 0]]),
               names=["layer 0, head 0", "layer 1, head 0"],
               title="Two heads of two layers do one job: find and copy")
plotting.show("Two attention maps of the induction model: a diagonal just below the "
              "main one, and a diagonal nineteen tokens back.")

# %% [markdown]
# ## Exercises left
#
# 1. One head, unequal weights, and a feed-forward layer after it: can it subtract after all, if the values are the digits 0
#    to 9? (Think of $0.9\,v_a+0.1\,v_b$.)
# 2. Train the model of 2.5 with one head in each layer. Does it still jump?
# 3. Silence the ten induction heads of SmolLM2 on ordinary text: `losses_without(smollm, prose[:, :256], [[], ten])`.
# 4. Prune the small model in the *worst* order. How few heads must go before it fails?

# %% [markdown]
# ## Quiz

# %% [markdown] tags=["quiz"]
# **1.** A layer of width 64 gets 16 heads in place of 4. By which factor do the FLOPs of the layer change?
#
# - a) 4
# - b) 2
# - c) 1
# - d) 0.25

# %% tags=["quiz"]
from utils import quiz

factor = flops[counts.index(16)] / flops[counts.index(4)]
quiz.answer({"a": 4, "b": 2, "c": 1, "d": 0.25}, factor,
            "Four times the heads, each a quarter; only score matrices are more.")

# %% [markdown] tags=["quiz"]
# **2.** Token $t$ has the numbers $10t$ to $10t+5$. Two heads are made by `x.reshape(2, 4, 3)`. What is the second row of head
# 0?
#
# - a) 3, 4, 5
# - b) 10, 11, 12
# - c) 13, 14, 15
# - d) 1, 11, 21

# %% tags=["quiz"]
second_row = str(numbered.reshape(2, 4, 3)[0, 1].tolist())
quiz.answer({"a": "[3, 4, 5]", "b": "[10, 11, 12]", "c": "[13, 14, 15]",
             "d": "[1, 11, 21]"}, second_row,
            "A reshape cuts the same row of numbers at other places: still token 0.")

# %% [markdown] tags=["quiz"]
# **3.** 256 tokens, 32 heads of 2 numbers. Which rank can the 256 x 256 scores of a head have, at most?
#
# - a) 256
# - b) 32
# - c) 8
# - d) 2

# %% tags=["quiz"]
thin_q, thin_k = (split_heads(tokens_256 @ m, 32) for m in matrices[:2])
rank = int(np.linalg.matrix_rank(thin_q[0] @ thin_k[0].T))
quiz.answer({"a": 256, "b": 32, "c": 8, "d": 2}, rank,
            "A product of (256, d_head) and (d_head, 256) has rank d_head or less.")

# %% [markdown] tags=["quiz"]
# **4.** MiniLM's layer reads 16 tokens of 384 numbers with twelve heads. Which array does $W^O$ multiply?
#
# - a) the scores, (12, 16, 16)
# - b) the heads side by side, (16, 384)
# - c) the mean of the heads, (16, 32)
# - d) the queries of all heads, (12, 16, 32)

# %% tags=["quiz"]
shape = str(side_by_side.shape)
quiz.answer({"a": "(12, 16, 16)", "b": "(16, 384)", "c": "(16, 32)",
             "d": "(12, 16, 32)"}, shape,
            "What the heads found, each in its own columns; no score.")

# %% [markdown] tags=["quiz"]
# **5.** Six tokens, four heads, `nn.MultiheadAttention` as it is. Which shape has the map of weights that it returns for a
# batch of one?
#
# - a) (1, 6, 6)
# - b) (1, 4, 6, 6)
# - c) (4, 6, 6)
# - d) (1, 6, 4)

# %% tags=["quiz"]
six = torch.zeros(1, 6, 16)
_, six_map = nn.MultiheadAttention(16, 4, batch_first=True)(six, six, six)
quiz.answer({"a": "(1, 6, 6)", "b": "(1, 4, 6, 6)", "c": "(4, 6, 6)",
             "d": "(1, 6, 4)"}, str(tuple(six_map.shape)),
            "By default it returns the mean over the heads.")

# %% [markdown]
# ## Going further
#
# Short sections, each alone, in any order.

# %% [markdown]
# ### 2.11 Cross-attention: two sequences
#
# **What if the queries come from one sequence and the answers from another?** A decoder, which writes German, looks into an
# encoder, which has read English. In lecture 01 a recurrent net translated numbers; in this encoder-decoder nothing is
# recurrent. The encoder attends to itself in both directions, the decoder to itself causally, then to the encoder's output.

# %%
from attention.experiments.multi_head import exactly_right, train_translator
from attention.experiments.fundamentals import translation

words = translation()
translator = train_translator(seed=0)
print(f"share of 1,000 new numbers exactly right: {exactly_right(translator):.1f} "
      f"(above 0.8: {exactly_right(translator) > 0.8})")

# %% [markdown]
# *Predict.* Two sequences of different length meet. Nobody said which word translates which. How many of the four cross heads
# have their largest weight on the right word?

# %%
pair = next(p for p in words.test
            if " ".join(p.source) == "fifty six thousand eight hundred thirty two")
with torch.no_grad(), record(translator, ("weights",)) as kept_maps:
    translator(words.test_source, words.test_target)
cross = kept_maps["decoder.0.cross_attention.weights"]  # (1000, 4, n_target, n_source)
hits = [(i, t, j) for i, p in enumerate(words.test)
        for t, j in enumerate(p.alignment) if j >= 0]
i, t, j = (torch.tensor(column) for column in zip(*hits))
share = (cross.argmax(-1)[i, :, t] == j[:, None]).double().mean(0)
print("largest weight on the right word, each head:", *(f"{s:.1f}" for s in share))
own_map = cross[words.test.index(pair), int(share.argmax())]
plotting.alignment(own_map[:len(pair.target), :len(pair.source) + 1].numpy(),
                   [*pair.source, "end"], pair.target,
                   title="A cross head crosses where German does")
plotting.show("Cross-attention of the best head: a diagonal from English to German "
              "words, crossed where German says the unit before the ten.")

# %% [markdown]
# All four, more or less: heads need not share the work out.
#
# **Trap.** *"The decoder uses the keys and values of the encoder's self-attention."* Every decoder layer has a $W^K$ and a
# $W^V$ of its own, applied to the encoder's *output*. They do not depend on what was written so far: a decoder computes these
# keys once a sentence.

# %% [markdown]
# ### 2.12 The mean in place of zero
#
# **Is zero the right nothing?** A head may add the same vector to every token, and whoever reads the stream counts on it. *Mean
# ablation* keeps that vector, and removes only what differs from token to token.

# %%
from attention.experiments.multi_head import second_round
from attention.multi_head import without_heads

with torch.no_grad(), record(copier, ("outputs",)) as handed_over:
    copier(two_rounds())
averages = [outputs.mean((0, 2)) for outputs in handed_over.values()]  # (heads, d_head)
for name, means in (("zero", None), ("mean", averages)):
    accuracies = []
    for head in everyone:
        with without_heads(copier, [head], means):
            accuracies.append(second_round(copier)[0])
    print(f"{name}: accuracy without each head", *(f"{a:.1f}" for a in accuracies))

# %% [markdown]
# No difference in one decimal: these heads add nothing constant that others count on. In a large model it can matter.

# %% [markdown]
# ### 2.13 Seeing heads, and naming them
#
# Hover over a token; choose a layer and a head: the small model on ABCDEFGH, twice, in our viewer and in BertViz.

# %% tags=["nbval-ignore-output"]
letters = [*"ABCDEFGH"] * 2
w_letters = attention_maps(copier, torch.tensor([[3, 17, 8, 29, 11, 0, 22, 5] * 2]))
plotting.head_viewer(w_letters, letters,
                     "ABCDEFGH twice: choose layer 1 and the second C.",
                     title="Layer 0: heads 0 and 1 look one back; "
                           "layer 1 after the twin")

# %% tags=["nbval-ignore-output"]
plotting.bertviz_model_view(w_letters.round(3), letters,
                            "The same heads of both layers in BertViz.",
                            title="All of layer 1 does one job; "
                                  "layer 0 shares its heads out")

# %% [markdown]
# **In how many of MiniLM's 72 heads is there a pattern that one can name?** Five candidates: the token itself, the one before,
# the one after, the start token, the end token. A head gets a name if it gives more than 0.6 of its weight to one of them, on
# average over four sentences.

# %%
from attention.experiments.multi_head import named_shares

names = named_shares()
named = {name: int((share > 0.6).sum()) for name, share in names.items()}
print(named, " without a name:", 72 - sum(named.values()))

# %% [markdown]
# Most have none of these names, and nearly all of the others look at the start token (why: lecture 05). Clark et al. (2019, arXiv
# 1906.04341) looked at BERT with many more candidates. A name is a hypothesis that has passed a test.

# %% [markdown]
# ### 2.14 The heads of SmolLM2 on ordinary text
#
# **And on prose, not on random tokens?** Each head's mean weight on four places. A head has a type if one of them gets more than
# half.

# %% tags=["language-model"]
if smollm:
    on_text = language_model.weights(smollm, prose[:, :256])
    rows_q = np.arange(64, 256)
    near = [on_text[:, :, i, i - 7:i + 1].sum(-1) for i in rows_q]
    kinds = {"token 0": on_text[:, :, 64:, 0].mean(-1),
             "last 8 tokens": np.mean(near, axis=0),
             "previous token": on_text[:, :, rows_q, rows_q - 1].mean(-1),
             "itself": on_text[:, :, rows_q, rows_q].mean(-1)}
    print({name: int((share > 0.5).sum()) for name, share in kinds.items()}, "of 270")
    figure, grid = plt.subplots(1, 4, figsize=(9, 5.5), sharey=True)
    for ax, (name, share) in zip(grid, kinds.items()):
        picture = ax.imshow(share, vmin=0, vmax=1, aspect="auto")
        ax.set(title=name, xlabel="head", xticks=[0, 4, 8])
    grid[0].set_ylabel("layer")
    figure.colorbar(picture, ax=grid, label="mean weight, queries 64 to 255")
    figure.suptitle("Late layers rest on token 0, early ones look near")
    plotting.show("Four maps of 30 layers by 9 heads: weight on token 0 is high in "
                  "many heads from layer 12 on, on the last 8 tokens in early ones; "
                  "only single heads look at the previous token or at themselves.")

# %% [markdown]
# Half of the heads rest on one of two simple places. A third park their weight on token 0: an *attention sink*, a subject of lecture 05.

# %% [markdown]
# ### 2.15 When does the stream know? The logit lens
#
# **If layers add to one stream, can one read it half-way?** Take the stream after each layer, give it the model's last norm and
# output matrix (the *logit lens*), and look at the rank of the word that will be said.

# %% tags=["language-model"]
if smollm:
    ranks = {}
    for prompt, word in (("The capital of France is", " Paris"),
                         ("The opposite of hot is", " cold")):
        stream, places = [], [block.register_forward_hook(
            lambda _module, _inputs, result: stream.append(result))
            for block in smollm.blocks]
        with torch.no_grad():
            smollm.hidden(smollm.encode(prompt))
            scores = torch.stack([smollm.logits(smollm.norm(s[0, -1])) for s in stream])
        for place in places:
            place.remove()
        target = scores[:, smollm.encode(word)[0, 0]]
        ranks[f"{prompt}:{word}"] = (scores > target[:, None]).sum(1).numpy() + 1
        print(f"{prompt}{word}: rank", *(f"{ranks[f'{prompt}:{word}'][i]:,} (layer {i})"
                                         for i in (6, 24, 27, 29)))
    plotting.curves(ranks, xlabel="after layer", ylabel="rank of the word", log_y=True,
                    title="Both words come up in the last third, first only at the end")
    plotting.show("Two falling lines of rank against layer, logarithmic: near a "
                  "thousand or more until layer 20, then falling to 1 at the end.")

# %% [markdown]
# At the very end. And *it*? In a causal model its row is computed before the last word is read: "too tired" and "too wide"
# leave the attention of *it* as it was, to the last bit, in all 270 heads. In lecture 01's encoder it changed.

# %% tags=["language-model"]
if smollm:
    both = [language_model.weights(smollm, smollm.encode(text))
            for text in (sentence, sentence.replace("tired", "wide"))]
    place = smollm.tokens(smollm.encode(sentence)).index(" it")
    print(f"row of it, tired against wide: largest difference "
          f"{np.abs(both[0][:, :, place] - both[1][:, :, place]).max():.1f}")

# %% [markdown]
# ### 2.16 Rollout, where the truth is known
#
# Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928; lecture 01) multiplies the maps of all layers, mixed half and half
# with the identity, to say from which *input* tokens an output comes. **Does it find the right ones?** In the induction model we know
# them: the prediction at $i$ needs $i$ itself, its twin at $i-\text{period}$, and the one after that, which is the answer.

# %%
def rollout(weights):
    """Weights (layers, heads, n, n) to one map (n, n), from the last layer back."""
    result = np.eye(weights.shape[-1])
    for of_layer in weights.mean(axis=1):
        result = (0.5 * of_layer + 0.5 * np.eye(len(of_layer))) @ result
    return result

def removal(model, ids, position, period=20):
    """Mean rise of the loss at a position when each input token is replaced."""
    target = ids[:, position + 1 - period]
    losses = []
    for j in [None, *range(position + 1)]:
        other = ids.clone()
        if j is not None:
            other[:, j] = (other[:, j] + 7) % 32
        with torch.no_grad():
            losses.append(F.cross_entropy(model(other)[:, position], target).item())
    return np.array(losses[1:]) - losses[0]

# %%
flowed = rollout(attention_maps(copier))[30, :31]
rises = removal(copier, two_rounds(), 30)
for name, numbers in (("rollout", flowed), ("removal", rises)):
    print(f"{name}: the three largest at", *sorted(np.argsort(-numbers)[:3].tolist()))
plotting.curves({"rollout": flowed / flowed.max(), "removal": rises / rises.max()},
                xlabel="input position", ylabel="relative to the largest",
                title="Rollout and removal agree on 10, 11 and 30; rollout adds others")
plotting.show("Two curves over the input positions 0 to 30, highest at 11 and 30 with "
              "a shoulder at 10; rollout alone is not 0 at 0 to 4 and at 29.")

# %% [markdown]
# It does, and adds a little of token 29, which the previous-token heads write into position 30, and of tokens 0 to 4. Rollout
# knows where information *went*. Whether it was used, only removal tells.

# %% [markdown]
# ### 2.17 Sentiment: what a layer adds to a bag of words
#
# **Why does a sentiment model need a Transformer?** Reviews of twelve words with one opinion. In half of them *not* stands right
# before it, in the others among the first three words, where it denies nothing. Every review contains *not*.

# %%
from attention.experiments.multi_head import reviews, train_sentiment

exam_x, exam_y, place, negated = reviews(np.random.default_rng(9), 2000)
readers = {attend: [train_sentiment(attend, seed) for seed in range(3)]
           for attend in (False, True)}
with torch.no_grad():
    for attend, name in ((False, "bag of words"), (True, "one encoder layer")):
        right = [(model(exam_x).argmax(-1) == exam_y).double().mean().item()
                 for model in readers[attend]]
        print(f"{name:17s} right: {min(right):.1f} to {max(right):.1f}")
    each = np.arange(2000)
    for seed, reader in enumerate(readers[True]):
        logits = reader.out(reader.layer(reader.embedding(exam_x)))
        vote = (logits[..., 1] - logits[..., 0]).numpy()[each, place]
        good = exam_x[each, place].numpy() < 3
        sides = ["for" if vote[good & (negated == n)].mean() > 0 else "against"
                 for n in (0, 1)]
        print(f"seed {seed}: a good word votes {sides[0]}, after 'not' {sides[1]}")

# %% [markdown]
# A bag of words can only add votes, and here they cancel. With a layer, some vector is no longer that of the dictionary but
# rewritten by its neighbours: in some runs the good word itself turns, in others those around it outvote it. That is a
# *contextual* embedding. BERT (Devlin et al. 2018, arXiv 1810.04805) is twelve or twenty-four such layers.

# %% [markdown]
# ### 2.18 Dropout, and which weights to return
#
# *Dropout* sets a random share of the weights to zero in training and divides the rest by $1-\text{rate}$, so that their mean
# stays. **Which of the two should a function return as "the attention"?** Many listings return what is left after dropout:
# rows that do not sum to 1. `attention_with_dropout` returns the weights as they were.

# %%
from attention.multi_head import attention_with_dropout

q3, k3, v3 = draw.standard_normal((3, 3, 2, 3, 4))  # 3 sentences, 2 heads, 3 tokens
keys_there = np.array([[True, True, False], [True, False, False], [False] * 3])
keep = draw.random((3, 2, 3, 3)) > 0.5
_, kept_weights = attention_with_dropout(q3, k3, v3, keys_there, keep, 0.5)
sums = kept_weights.sum(-1), (kept_weights * keep / 0.5).sum(-1)
for name, of_rows in zip(("before", "after"), sums):
    print(f"{name} dropout rows sum to", *np.unique(of_rows.round(1)))

# %% [markdown]
# ### 2.19 How many heads does the small model need?
#
# Take heads away one by one, each time the one that is missed least.

# %%
from attention.experiments import multi_head as lab
from attention.multi_head import without_heads as silent

def pruned(model):
    """Accuracy with 0, 1, ..., 8 heads removed, the least missed first."""
    gone, accuracies = [], [lab.second_round(model)[0]]
    while len(gone) < 8:
        left = [head for head in everyone if head not in gone]
        tried = [[*gone, head] for head in left]
        losses = losses_without(model, lab.two_rounds(), tried, start=20)
        gone.append(left[int(losses.argmin())])
        with silent(model, gone):
            accuracies.append(lab.second_round(model)[0])
    return accuracies

fewer = np.array([pruned(run.model) for run in two_layers])
plotting.curves({"two layers, four heads each": fewer}, xlabel="heads removed",
                ylabel="accuracy in the second round",
                title="The first heads go unnoticed; with one head left all is lost")
plotting.show("Accuracy against the number of removed heads: near 1 at first, then "
              "falling, near 0 with seven and eight.")
print("above 0.9 with so many removed, each seed:", *((fewer > 0.9).sum(1) - 1))
print(f"with one head left at most {fewer[:, 7].max():.1f}")

# %% [markdown]
# The circuit has two parts, so one head cannot be enough.

# %% [markdown]
# ### 2.20 One product instead of three
#
# $W^Q$, $W^K$ and $W^V$ side by side are one matrix $(d,3d)$; GPT-2 stores them so. **What does one launch save?** The kernel
# `project` computes 16 × 16 outputs a block, tile by tile. *Requested* bytes are what threads ask for; *distinct* counts each
# sector once a launch.
#
# *Predict.* Which of the two changes?

# %%
from attention.multi_head import project_kernel, project_launch

flat, packed = (torch.from_numpy(draw.standard_normal(shape)).float()
                for shape in ((128, 64), (64, 192)))
for name, given in (("three launches", packed.split(64, dim=1)),
                    ("one launch", [packed])):
    asked = distinct = 0
    for matrix in given:
        grid, block, arguments, product = project_launch(flat, matrix.contiguous())
        counted = project_kernel().check[grid, block](*arguments)
        asked += counted.global_loaded
        distinct += counted.distinct_loaded
    print(f"{name:14s}: requested {asked:7,} bytes, distinct {distinct:7,}")
q_k_v = product.split(64, dim=1)
grid, block, shared, arguments, three = attend_launch(
    *(part.contiguous()[None] for part in q_k_v), 4, None, True)
attend_kernel().fast[grid, block, shared](*arguments)
views = [product.flatten()[64 * part:] for part in range(3)]  # Q, K, V begin 64 apart
strides = list(arguments[5:])
strides[5:8] = [192] * 3  # and their rows 192
one = torch.zeros_like(three)
attend_kernel().fast[grid, block, shared](*views, None, one, *strides)
print(f"heads of the packed array: largest difference {(one - three).abs().max():.6f}")

# %% [markdown]
# The threads ask for the same. What is saved is the second and third reading of `x` from slow memory. And the kernel of 2.8 reads Q, K
# and V out of the one array, uncopied: strides pay once more.

# %% [markdown]
# ## Behind the scenes
#
# **The triple**: `multi_head_attention_numpy`, `_torch` and `_cuda`, and the checks that they share.

# %%
import copy
import functools
from dataclasses import dataclass
from typing import NamedTuple

from attention.fundamentals import ROW_OF_A_TILE, attention_weights, causal_mask
from attention.fundamentals import check_arguments
from utils.data import Vocabulary

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
def multi_head_attention_numpy(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads, mask=None, causal=False):
    """Multi-head attention in NumPy: project, attend in each head, concatenate, project.

    x_q (..., n_queries, d_model), x_kv (..., n_keys, d_model); w_q, w_k (d_model, n_heads * d_head),
    w_v (d_model, n_heads * d_v), w_o (n_heads * d_v, d_model); mask boolean, True = may attend, broadcastable to
    (..., n_heads, n_queries, n_keys). Returns (..., n_queries, d_model). Raises ValueError when shapes do not fit.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.2.
    """
    check_projections(x_q, x_kv, w_q, w_k, w_v, w_o, n_heads)
    cuda.check_kind(np.ndarray, x_q=x_q, x_kv=x_kv, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o)
    given, work = x_q, cuda.work_type(x_q)                  # never in integers or in half
    x_q, x_kv, w_q, w_k, w_v, w_o = (a.astype(work, copy=False) for a in (x_q, x_kv, w_q, w_k, w_v, w_o))
    q, k, v = (split_heads(x @ w, n_heads) for x, w in ((x_q, w_q), (x_kv, w_k), (x_kv, w_v)))
    return cuda.like(merge_heads(attention_numpy(q, k, v, mask, causal)) @ w_o, given)

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

# %% [markdown]
# **From PyTorch's layer**, and a listing mended: weights are returned as they were before dropout.

# %% tags=["export", "plumbing"]
def weights_from_torch(in_proj_weight, out_proj_weight):
    """The matrices of an nn.MultiheadAttention as this course keeps them: (d_in, d_out), used as x @ w.

    in_proj_weight (3 * d_model, d_model), out_proj_weight (d_model, d_model), arrays or tensors.
    Returns (w_q, w_k, w_v, w_o), each (d_model, d_model). ValueError for other shapes.
    """
    d_model = in_proj_weight.shape[-1]
    if tuple(in_proj_weight.shape) != (3 * d_model, d_model) or tuple(out_proj_weight.shape) != (d_model, d_model):
        raise ValueError("in_proj_weight and out_proj_weight must have shapes (3 * d_model, d_model) and "
                         f"(d_model, d_model), got {tuple(in_proj_weight.shape)} and {tuple(out_proj_weight.shape)}")
    w_q, w_k, w_v = (in_proj_weight[i * d_model:(i + 1) * d_model].T for i in range(3))
    return w_q, w_k, w_v, out_proj_weight.T

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
    weights = attention_weights(q, k, mask=key_mask[:, None, None, :])
    return cuda.weighted_sum(weights * keep / (1 - rate), v), weights

# %% [markdown]
# **Around the layer**: how a position may enter, the softmax with masks, and the check of its inputs.

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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

# %% [markdown]
# **The language model** of this and later lectures. Attention, positions and norm are handed in.

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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

# %% [markdown]
# **The encoder and decoder** of 2.11.

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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

# %% [markdown]
# **The kernels**: products in tiles, attention over heads in place, the copy that loses, and their launches.

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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

SPLIT_COPY = r"""
__global__ void split_copy(const float* x, float* y, int n_heads, int seq, int d_head, int n) {
  int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= n) return;
  int c = e % d_head, t = e / d_head % seq, h = e / d_head / seq % n_heads, b = e / d_head / seq / n_heads;
  y[e] = x[((size_t)(b * seq + t) * n_heads + h) * d_head + c];
}
"""

@functools.cache
def split_copy_kernel():
    """The copy of (batch, seq, heads * d_head) to (batch, heads, seq, d_head), a thread an element."""
    return cuda.compile(SPLIT_COPY, name="split_copy")

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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
# How many scores are kept? As many as fit into 48 KB beside the tiles; that much a block gets on any GPU.

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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

# %% [markdown]
# **A layer of MiniLM** on one sentence.

# %% tags=["export", "plumbing"]
class Layer(NamedTuple):
    """The attention of a trained encoder layer on one sentence: float64 arrays, (d_in, d_out), used as x @ w.

    x (n, 385) has a last column of ones, so that the last rows of w_q, w_k and w_v (385, 384) are their biases;
    w_o (384, 384), b_o (384,); weights (12, n, n) and out (n, 384) are what the layer itself computed.
    """

    tokens: list[str]
    x: np.ndarray
    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    w_o: np.ndarray
    b_o: np.ndarray
    weights: np.ndarray
    out: np.ndarray

def minilm_layer(sentence, number):
    """The attention of layer `number` (0 to 5) of MiniLM with what goes in and comes out. ValueError for others."""
    if not 0 <= number < 6:
        raise ValueError(f"number must be from 0 to 5, got {number}")
    model, tokenizer = data.minilm()
    weights, tokens = data.minilm_attention(sentence)
    attention, kept = model.encoder.layer[number].attention, {}
    hook = attention.output.dense.register_forward_hook(lambda module, inputs, result: kept.update(out=result))
    with torch.no_grad():
        states = model(**tokenizer(sentence, return_tensors="pt"), output_hidden_states=True).hidden_states
    hook.remove()

    def matrix(part):
        return np.concatenate([part.weight.detach().numpy().T, part.bias.detach().numpy()[None]])

    own, last = attention.self, attention.output.dense
    x = np.pad(states[number][0].numpy(), ((0, 0), (0, 1)), constant_values=1.0)
    arrays = (x, matrix(own.query), matrix(own.key), matrix(own.value), last.weight.detach().numpy().T,
              last.bias.detach().numpy(), weights[number], kept["out"][0].numpy())
    return Layer(tokens, *(array.astype(np.float64) for array in arrays))

# %% [markdown]
# **Two lookups**, the task of 2.1.

# %% tags=["export", "plumbing"]
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

def lookups(rng, batch=128, n_keys=8):
    """Keys in random order, their values, the two keys asked for, and the values of these two."""
    keys = rng.permuted(np.tile(np.arange(n_keys), (batch, 1)), axis=1)
    values = rng.standard_normal((batch, n_keys))
    places = rng.permuted(np.tile(np.arange(n_keys), (batch, 1)), axis=1)[:, :2]
    asked, found = (np.take_along_axis(x, places, axis=1) for x in (keys, values))
    return [torch.from_numpy(x) for x in (keys, values, asked[:, 0], asked[:, 1], found[:, 0], found[:, 1])]

def explained(task, n_heads, seed):
    """Train one model on task "sum" or "difference"; the share of the answer's variance that it explains then."""
    sign, rng = {"sum": 1, "difference": -1}[task], np.random.default_rng(seed)
    model = training.initialise(TwoLookups(n_heads).double(), seed)

    def loss(model, batch):
        return F.mse_loss(model(*batch[:4]), batch[4] + sign * batch[5])

    training.fit(model, (lookups(rng) for _ in range(300)), loss, steps=300, lr=1e-2)
    exam = lookups(np.random.default_rng(99), batch=2000)
    with torch.no_grad():
        return 1 - (loss(model, exam) / (exam[4] + sign * exam[5]).var()).item()

# %% [markdown]
# **Repeated segments**, the task of 2.5, and models without feed-forward layers that learn it.

# %% tags=["export", "plumbing"]
def repeated(seed, batch=32, vocab=32, seq_len=40):
    """Sequences (batch, seq_len) that repeat their first `period` tokens, and the period; endless."""
    rng = np.random.default_rng(seed)
    while True:
        period = rng.integers(8, 21)
        segment = rng.permuted(np.tile(np.arange(vocab), (batch, 1)), axis=1)[:, :period]
        yield torch.from_numpy(np.tile(segment, (1, seq_len // period + 1))[:, :seq_len]), period

@functools.cache
def exams():
    """Three batches (32, 40) with their periods, and one with two whole rounds of 20."""
    stream = repeated(seed=99, batch=32)
    first = [next(stream) for _ in range(3)]
    return first, next(ids for ids, period in stream if period == 20)

def two_rounds():
    """32 sequences (32, 40) of two rounds of 20."""
    return exams()[1]

def guess_earlier():
    """The accuracy in the second round of a guess among the tokens of the first."""
    return float(np.mean([1 / period for _, period in exams()[0]]))

@torch.no_grad()
def second_round(model):
    """Accuracy and loss (nats) where the next token can be known: from the end of the first round on."""
    logits, targets = zip(*((model(ids[:, :-1])[:, period:], ids[:, period + 1:]) for ids, period in exams()[0]))
    right = [(row.argmax(-1) == t).double().mean().item() for row, t in zip(logits, targets)]
    return np.mean(right), np.mean([F.cross_entropy(row.mT, t).item() for row, t in zip(logits, targets)])

@torch.no_grad()
def attention_maps(model, ids=None):
    """Weights of all heads, averaged over sequences, by default those of two_rounds(): (n_layers, n_heads, n, n)."""
    with record(model, ("weights",)) as cache:
        model(two_rounds() if ids is None else ids)
    return torch.stack(list(cache.values())).mean(1).numpy()

class Run(NamedTuple):
    """A trained model, and what was measured every ten steps."""

    model: nn.Module
    steps: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray
    maps: list[np.ndarray]

def train_repeats(n_layers, seed):
    """Train a model of n_layers layers of four heads without feed-forward layers for 200 steps: a Run."""
    config = TransformerConfig(vocab_size=32, d_model=48, n_heads=4, n_layers=n_layers, d_ff=0)
    model = training.initialise(TransformerLM(config, positions=DistanceBias(4)).double(), seed)
    seen = []

    def loss(model, batch):
        return training.next_token_loss(model, batch[0])

    def evaluate(model):
        seen.append((*second_round(model), attention_maps(model)))
        return seen[-1][0]

    history = training.fit(model, repeated(seed), loss, steps=200, lr=6e-3, evaluate=evaluate, every=10)
    accuracy, losses, maps = zip(*seen)
    return Run(model, np.array(history.steps), np.array(accuracy), np.array(losses), list(maps))

# %% [markdown]
# **The real model**: a lecture's layer in all of its places, random tokens twice, and how fast the loss changes with a head.

# %% tags=["export", "plumbing"]
class Rotation(Positions):
    """Positions that rotate as a language model does."""

    def __init__(self, rotate):
        super().__init__()
        self.turn = rotate

    def rotate(self, x, positions):
        return self.turn(x, positions)

class InPlace(nn.Module):
    """A layer of this lecture, called as a LanguageModel calls its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, parts, attention, positions, cache, options):
        return self.layer(x, causal=True, positions=positions, cache=cache, **options)

@torch.no_grad()
def with_module(model, layer_class):
    """A language model on the same weights, with layer_class(d_model, n_heads, positions) for the attention of each layer."""
    config, other = model.config, copy.copy(model)
    other._modules, blocks = dict(model._modules), []
    for block in model.blocks:
        new = layer_class(config.d_model, config.n_heads, Rotation(model.parts.rotate))
        for name in ("w_q", "w_k", "w_v", "w_o"):
            w = getattr(block.attention, name)
            if w.shape[1] < config.d_model:                             # each key head for all the queries that ask it
                heads = w.unflatten(1, (config.n_kv_heads, -1))
                w = heads.repeat_interleave(config.n_heads // config.n_kv_heads, dim=1).flatten(1)
            getattr(new, name).data = w                                 # not a copy, where it is the model's own
        block = copy.copy(block)
        block._modules = dict(block._modules) | {"attention": InPlace(new)}
        blocks.append(block)
    other.blocks = nn.ModuleList(blocks)
    return other

def twice(model, seed, n=50):
    """A start token, then n random tokens of a language model, twice: ids (1, 2 n + 1)."""
    segment = np.random.default_rng(seed).integers(1000, 49000, n)
    return torch.from_numpy(np.concatenate([[0], segment, segment])[None])

def ranked(scores):
    """The heads (layer, head) of an array of scores (n_layers, n_heads), the largest first."""
    return [(int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in np.argsort(-scores, axis=None, kind="stable")]

def head_importance(model, texts):
    """How fast the loss changes with a factor behind each head: |d loss / d factor|, its mean over texts (1, n).

    model: with blocks[i].attention.outputs, the place of a hook. Returns an array (n_layers, n_heads).
    Source: Michel et al. 2019 (arXiv 1905.10650), equation 2, with one factor a text.
    """
    total = 0.0
    for ids in texts:
        factors, handles = [], []
        for block in model.blocks:
            factor = torch.ones(block.attention.n_heads, requires_grad=True)

            def multiply(_module, _inputs, outputs, factor=factor):
                return outputs * factor[:, None, None].to(outputs.dtype)

            handles.append(block.attention.outputs.register_forward_hook(multiply))
            factors.append(factor)
        loss = F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])
        for handle in handles:
            handle.remove()
        total = total + torch.stack(torch.autograd.grad(loss, factors)).abs().numpy()
    return total / len(texts)

# %% [markdown]
# **The translator** of 2.11, the names of 2.13 and the reviews of 2.17.

# %% tags=["export", "plumbing"]
from attention.experiments.fundamentals import translation, translation_batches, translation_loss

def train_translator(seed):
    """Train an EncoderDecoder with one layer each for 240 steps."""
    words = translation()
    model = training.initialise(EncoderDecoder(len(words.english), len(words.german)).double(), seed)
    batches = translation_batches(words.source, words.target, seed)
    training.fit(model, batches, translation_loss, steps=240, lr=5e-3)
    return model

@functools.cache
def exactly_right(model):
    """The share of the 1,000 test numbers that are translated without a mistake."""
    target = translation().test_target
    found = model.translate(translation().test_source, target.shape[1])
    return ((found == target) | (target == Vocabulary.PAD)).all(1).double().mean().item()

# %% tags=["export", "plumbing"]
def named_shares():
    """Mean weight of MiniLM's heads (6, 12) on five places, over four sentences: {name: array}."""
    texts = ["The animal didn't cross the street because it was too tired.",
             "The old man the boats while the young wait at home.",
             "She gave the book to her brother because he had asked for it.",
             "Numbers are translated word by word, except that the units come first."]
    found = []
    for text in texts:
        w = data.minilm_attention(text)[0]
        inner = w[:, :, 1:-1]                                           # queries without [CLS] and [SEP]
        here = np.arange(inner.shape[2])
        found.append({"itself": inner[:, :, here, here + 1].mean(-1), "previous": inner[:, :, here, here].mean(-1),
                      "next": inner[:, :, here, here + 2].mean(-1), "[CLS]": inner[..., 0].mean(-1),
                      "[SEP]": inner[..., -1].mean(-1)})
    return {name: np.mean([f[name] for f in found], axis=0) for name in found[0]}

class Sentiment(nn.Module):
    """The mean of the word vectors, with or without an encoder layer before it, and a linear classifier."""

    def __init__(self, attend, d_model=16):
        super().__init__()
        self.embedding, self.out = nn.Embedding(16, d_model), nn.Linear(d_model, 2)
        self.layer = EncoderLayer(d_model, 2) if attend else nn.Identity()

    def forward(self, x):
        return self.out(self.layer(self.embedding(x))).mean(1)

def reviews(rng, batch=64, length=12):
    """Words (batch, 12), positive (batch,), place of the opinion, and whether it is negated.

    Words 0 to 2 are good, 3 to 5 bad, 6 is "not", 7 to 15 say nothing.
    """
    x = rng.integers(7, 16, size=(batch, length))
    positive, negated = rng.integers(2, size=(2, batch))
    rows, place = np.arange(batch), rng.integers(4, length, size=batch)
    x[rows, place] = np.where(positive ^ negated, 0, 3) + rng.integers(3, size=batch)
    x[rows, np.where(negated, place - 1, rng.integers(0, 3, size=batch))] = 6
    return torch.from_numpy(x), torch.from_numpy(positive), place, negated

def train_sentiment(attend, seed):
    """Train a Sentiment model for 300 steps."""
    rng = np.random.default_rng(seed)
    model = training.initialise(Sentiment(attend).double(), seed)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    training.fit(model, (reviews(rng) for _ in range(300)), loss, steps=300, lr=1e-2)
    return model

# %% [markdown]
# ## Glossary
#
# |term|what it is|
# |---|---|
# |ablation|switching a part off, to see what depends on it; with zeros, or with its mean|
# |circuit|parts of several layers that do one job together|
# |contextual embedding|the vector of a token after its neighbours have rewritten it|
# |cross-attention|queries from one sequence, keys and values from another|
# |$d_\text{head}$|columns of one head; usually $d_\text{model}/h$|
# |encoder-decoder|a model that reads with one stack of layers, and writes with another that looks into the first|
# |head|one set of $W^Q_i,W^K_i,W^V_i$ with its block of rows of $W^O$|
# |head importance|how fast the loss changes with a factor behind the head|
# |hook|a function that is called with what a module hands over, and may replace it|
# |induction head|a head that looks after the last place where the present token stood|
# |in place|read where the numbers are, without a copy in another order|
# |logit lens|the model's last norm and output matrix, put on the stream of an earlier layer|
# |low-rank bottleneck|the scores of a head have at most rank $d_\text{head}$|
# |merge, split|heads side by side in a row, heads as an axis of their own|
# |multi-head attention|several attentions side by side, their results mixed by $W^O$|
# |previous-token head|a head that looks at the token before|
# |residual stream|the sum that every layer reads from and adds to|
# |rollout|the product of the maps of all layers, mixed with the identity|
#
# ## Sources
#
# Vaswani et al. 2017, § 3.2.2 (arXiv 1706.03762) · Devlin et al. 2018, BERT (1810.04805) · Michel, Levy, Neubig 2019
# (1905.10650) · Voita et al. 2019 (1905.09418) · Clark et al. 2019 (1906.04341) · Shoeybi et al. 2019, Megatron-LM
# (1909.08053) · Raffel et al. 2019, T5 (1910.10683), for the learned number a distance · Bhojanapalli et al. 2020, the
# low-rank bottleneck (2002.07028) · Abnar, Zuidema 2020, rollout (2005.00928) · Elhage et al. 2021, A Mathematical
# Framework for Transformer Circuits (transformer-circuits.pub) · Olsson et al. 2022, induction heads (2209.11895) · Allal
# et al. 2025, SmolLM2 (2502.02737).
