# ---
# jupyter:
#   course:
#     edition: 2
#     experiments:
#     - OffsetLayer
#     - WindowedCopy
#     - copies
#     - copy_loss
#     - train_copy
#     - copy_accuracy
#     - needle_recall
#     - minilm_chunks
#     - share_of_mass
#     - block_scores
#     - lsh_recall
#     module: sparse
#     public:
#     - block_sparse_attention_numpy
#     - block_sparse_attention_torch
#     - block_sparse_attention_cuda
#     - sliding_window_attention_cuda
#     - sliding_window_mask
#     - longformer_mask
#     - bigbird_mask
#     - reachable
#     - select_blocks
#     - compressed_attention
#     - longformer_attention
#     - native_sparse_attention
#     - LightningIndexer
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["slide"]
# # Lecture 07 · Sliding-window and sparse attention
#
# **The question.** Which keys can be left out, and who decides? **You will be able to** *write* windows and the block-sparse loop (7A, 7B),
# *choose* blocks (7C), *build* and *train* an indexer (7D, 7E), *find* a leak (7F), *say* which bytes are saved (7G).
# **You need** masks (lecture 01), tiles (lecture 06); of PyTorch `nn.Module`.
#
# | part or section | core minutes | more minutes |
# |---|---|---|
# | Part 1 · who sees whom: 7.1, 7.2, exercise 7A | 40 | |
# | Part 2 · blocks: 7.3 to 7.5, exercise 7B | 47 | |
# | Part 3 · who decides: 7.6 to 7.8, exercise 7D | 50 | |
# | Part 4 · in a real model: 7.9 | 22 | |
# | Part 5 · CUDA: 7.10 | 12 | |
# | Part 6 · in use: 7.11 | 9 | |
# | Another day: exercises 7C, 7E, 7F, 7G | | 70 |
# | Going further: 7.12 to 7.20 | | 80 |
# | **together** | **180** | **150** |

# %% [markdown] tags=["teacher"]
# **For the teacher: two times 50 minutes, ten to spare in each.** Run everything before class; the learner's copy has no outputs.
#
# - *Hour 1 (40).* The cliff: sketch three curves first (6) · 7.1: the example, the zoo, count a row of each, the two conventions (11) · 7.2:
#   reachability on the board with a chain of four tokens (8) · 7.3: the flow figure, what 7B asks (10) · 7.5: order the four (5).
# - *At home after hour 1.* 7A, 7B.
# - *Hour 2 (40).* 7.6: why a mean key misses (6) · 7.7: indexer, its loss, the bars (12) · 7.8: the off-by-one (6) · 7.9:
#   the exact reach, the sink, the loss that is too good (10) · 7.10: the list and the bytes (6).
# - *At home after hour 2.* 7D. For volunteers 7C, 7E, 7F, 7G.
# - *Board.* $L(w-1)$ as a ladder of arrows; a grid of blocks with one row's list.
# - *Always works.* After 7.1: let the class dictate a pattern as a rule for i and j, then call `layers_until(mask, key=1)`.
# - *Skip first.* The mean reach of 7.2; 7.4 is not in class.
# - *Checkpoint 1.* Window 4, two layers: how far back? (6.) *Checkpoint 2.* Blocks of four: from which query on may block 0 be seen? (3.)
# - *Questions that come.* Is it faster? Not in this notebook: a loop in Python costs more than it saves, so bytes are shown. Why not always
#   select? Selecting looks at every pair, if only cheaply.

# %%
import math
import os
import sys
from functools import partial

sys.path.insert(0, "." if os.path.exists("course.py") else "..")

import numpy as np
import torch
from torch import nn

from attention.fundamentals import attention_numpy, attention_weights, causal_mask
from utils import plotting, training
from utils.check import check

torch.set_num_threads(1)  # tiny models: one thread is fastest

# %% [markdown]
# ## Part 1 · Who sees whom
#
# A model in which each token sees only itself and the three tokens before it: a **window** of $w=4$. At each place of a
# stream of symbols it is asked: which symbol was $k$ steps back? Four symbols; one, two and three
# layers.
#
# *Predict.* Sketch accuracy against $k$, a curve for each number of layers. Where does each one fall?

# %% tags=["slide"]
from attention.experiments.sparse import copy_accuracy, train_copy

near, accuracy = (0, 1, 2, 3), {}  # a window of 4: how far back a layer looks
for n_layers in (1, 2, 3):
    right = copy_accuracy(train_copy([near] * n_layers, seed=0))
    accuracy[f"L = {n_layers}"] = right
    last = np.flatnonzero(right > 0.9)[-1]
    print(f"L = {n_layers}: right as far as k = {last}, beyond at most "
          f"{right[last + 1:].max():.1f}")
plotting.curves(accuracy, xlabel="k: how many steps back", ylabel="accuracy",
                threshold=1 / 4, threshold_name="chance",
                title="With a window of 4 the answers end at 3, 6 and 9 steps")
plotting.show("Accuracy against the lag k: one layer falls from 1 to chance after 3 "
              "steps, two layers after 6, three layers after 9.")

# %% [markdown]
# Three, six, nine: each layer hands on what the layer below had collected, and adds three more steps. Up to there the
# answer is right, one step further it is guessed. A window saves pairs of query and key, and it takes something away.
# This lecture asks what, and how to choose better than by distance.
#
# ### 7.1 Local and global patterns
#
# **Which pairs would you keep?** The running example of this lecture: 32 tokens; the last query, 31, looks for key 5.
#
# *Predict.* A window of 8 leaves out three quarters of the keys of that row. Which weight is left for key 5?

# %% tags=["first-attention", "slide"]
size, needle = 4, 5
rng = np.random.default_rng(7)
q, k, v = (rng.standard_normal((32, 16)) for _ in range(3))
q[31], v[needle, 0] = 1.3 * k[needle], 3.0  # it asks for key 5; its value begins so
weights = attention_weights(q, k, causal=True)
out = attention_numpy(q, k, v, causal=True)
near8 = np.tri(32, dtype=bool) & ~np.tri(32, k=-8, dtype=bool)
blind = attention_weights(q, k, near8)
print(f"all keys: query 31 gives key {needle} the weight {weights[31, needle]:.2f}; "
      f"its output begins with {out[31, 0]:.2f}")
print(f"window 8: weight {blind[31, needle]:.2f}, output {(blind @ v)[31, 0]:.2f}")

# %% [markdown]
# None: the query finds nothing that it asked for, and averages what is near. Which other pairs could one keep? A pattern is a boolean matrix, True = may attend, a row for each query. A **local** pattern keeps
# pairs that lie near each other, a **global** one gives some tokens a row or a column of their own. Here are eight, for 24 tokens.

# %% tags=["slide"]
i, j = np.arange(24)[:, None], np.arange(24)
past, distance = j <= i, i - j
zoo = {
    "causal": past,
    "window 6": past & (distance < 6),
    "dilated": past & (distance < 12) & (distance % 2 == 0),
    "blocks of 6": past & (i // 6 == j // 6),
    "strided": past & ((distance < 6) | (distance % 6 == 0)),
    "fixed": past & ((i // 6 == j // 6) | (j % 6 == 5)),
    "window + global": past & ((distance < 6) | (j == 0)),
    "window + random": past & ((distance < 6) | (((i * 7 + j * 11) % 23) < 2)),
}
plotting.masks(zoo, title="Eight causal patterns: all pairs, and seven ways to fewer")
plotting.show("Eight masks of 24 queries by 24 keys: a triangle, bands, blocks along "
              "the diagonal, bands with stripes, with columns and with scattered dots.")

# %% [markdown]
# *Strided* and *fixed* are the two of the Sparse Transformer (7.12), *window + global* and *window + random* the parts of
# Longformer and BigBird (7.4).
#
# *Predict.* In which of them does the last query, number 23, know anything of key 1 after one layer? After two?

# %%
def layers_until(mask, key, query=-1):
    """Layers until what stands at `key` can have reached `query`; 0 for never."""
    seen = np.eye(len(mask), dtype=bool)
    for layer in range(1, len(mask)):
        seen = mask @ seen  # of booleans: an "or" of "ands"
        if seen[query, key]:
            return layer
    return 0

print("pattern            pairs   share   layers from key 1 to query 23")
for name, mask in zoo.items():
    layers = layers_until(mask, key=1)
    share = mask.sum() / past.sum()
    print(f"{name:16s} {mask.sum():6d} {share:7.0%}   {layers or 'never'}")

# %% [markdown]
# After one layer only in the causal one, after two in *strided* and *fixed*. Half of the pairs may reach as far as all, one layer later; or, with blocks, never. **What counts is not how many pairs
# are kept but how they chain.** (Key 0 is a global token, so key 1 stands for the others.)
#
# #### Exercise 7A: the sliding window  (difficulty 2 of 5, essential, 10 minutes)
#
# Query $i$ sees `window` keys: its own and the `window - 1` before it.
#
# |argument|meaning|
# |---|---|
# |`n_queries`, `n_keys`|as in `causal_mask`: with fewer queries than keys, the queries are the last ones|
# |`window`|how many keys a query sees, itself included; more than there are is no error|
#
# Returns booleans `(n_queries, n_keys)`.
#
# <details><summary>Hint</summary>
#
# At which position stands query 0 of 2, with 5 keys? Between which two positions must a key lie? How many keys are that when
# the window is 1?
#
# </details>

# %%
from attention.kv_cache import check_sizes  # ValueError unless whole numbers

# %% tags=["exercise", "export"] kind="numpy"
def sliding_window_mask(n_queries, n_keys, window):
    """Boolean (n_queries, n_keys): the key at a query's position and window - 1 before.

    Aligned at the bottom right as causal_mask is; a query before all keys sees none.
    Raises ValueError for a negative size and for a window below 1.
    Source: the convention of Mistral 7B (arXiv 2310.06825) in transformers.
    """
    check_sizes(0, n_queries=n_queries, n_keys=n_keys)
    check_sizes(window=window)
    ### BEGIN SOLUTION
    position = np.arange(n_queries)[:, None] + (n_keys - n_queries)
    back = position - np.arange(n_keys)
    return (back >= 0) & (back < window)
    ### END SOLUTION

# %%
sliding_window_mask = check("7A", sliding_window_mask)

# %% [markdown]
# **Trap.** *"A window of 4 is a window of 4."* Two conventions live in public code:
#
# |who|keys that query $i$ sees|how many|
# |---|---|---|
# |Mistral, transformers' `sliding_window`, this course|$i-w+1$ to $i$|$w$|
# |Longformer's `attention_window` (even)|$i-w/2$ to $i+w/2$|$w+1$|
# |`window_size=(w, 0)` of flash-attn|$i-w$ to $i$|$w+1$|
#
# *Predict.* A model trained with the first is served with the third, $w=4$, three layers. How much further does it see?

# %%
ours, theirs = sliding_window_mask(24, 24, 4), sliding_window_mask(24, 24, 4 + 1)
for name, mask in (("i-3 to i", ours), ("i-4 to i", theirs)):
    back = 23 - (mask @ mask @ mask)[-1].argmax()
    print(f"{name:8s}: {mask[-1].sum()} keys in one layer, three reach {back} back")

# %% [markdown]
# One key a layer, and no error is raised: all shapes are right. (Lecture 05's `RingKVCache` keeps $w$ keys; section 7.13
# holds it against this mask.)
#
# ### 7.2 Sparse attention matrices
#
# **How far does a stack see?** The pattern of one layer is a matrix $M$; what two layers can carry is the boolean product
# $M M$ (an *or* over the tokens in between), $L$ layers carry $M^L$. For a window that is a band of $L(w-1)+1$ keys.

# %% tags=["export"]
def reachable(mask, n_layers):
    """What n_layers of one pattern can carry: boolean (n, n), query i knows of key j.

    mask boolean (n, n), True = may attend; each layer also keeps a token's own state.
    """
    if n_layers < 0 or mask.dtype != bool or mask.shape != (len(mask),) * 2:
        raise ValueError("mask must be boolean (n, n) and n_layers not negative, "
                         f"got {mask.dtype} {mask.shape} and {n_layers}")
    seen = np.eye(len(mask), dtype=bool)
    for _ in range(n_layers):
        seen = seen | mask @ seen
    return seen

# %% tags=["slide"]
stack = {f"{n} layer{'s' * (n > 1)}": reachable(ours, n) for n in (1, 2, 3, 7)}
for name, mask in stack.items():
    print(f"{name:8s}: the last query knows of {mask[-1].sum():2d} keys, the furthest "
          f"{23 - mask[-1].argmax()} back")
plotting.masks(stack, title="A window of 4 grows by three keys a layer")
plotting.show("Four masks: a band of four keys, then of seven, ten, and twenty-two.")

# %% [markdown]
# There are the 3, 6 and 9 of the trained models. But a band says what *can* arrive. What does arrive, if every layer simply
# averages its window and adds it to what it had, with weight $a$ on its own state? Then the last row of
# $(aI + (1-a)A)^L$ says how much each key counts.
#
# *Predict.* 32 layers, $w=128$, $a=0.9$: the last reachable key is 4,064 back. How far back is 99 % of the influence?

# %% tags=["slide"]
def influence(window, n_layers, a):
    """How much the keys 0, 1, 2, ... steps back count for the last query."""
    step = np.full(window, (1 - a) / window)
    step[0] += a
    total = np.ones(1)
    for _ in range(n_layers):
        total = np.convolve(total, step)
    return total  # (n_layers * (window - 1) + 1,)

spread = {f"a = {a}": influence(128, 32, a) for a in (0.0, 0.5, 0.9)}
for name, counts in spread.items():
    far = np.searchsorted(np.cumsum(counts), 0.99)
    mean = counts @ np.arange(len(counts))
    print(f"{name}: last {len(counts) - 1:,}, mean {mean:6.1f}, 99 % within {far:,}")
plotting.curves({name: np.cumsum(counts)[::16] for name, counts in spread.items()},
                x=np.arange(0, 4065, 16), xlabel="distance back",
                ylabel="share of the influence",
                title="32 averaging layers of 128: nothing comes from the last third")
plotting.show("Cumulated influence against distance up to 4,064: with a = 0.9 all of "
              "it lies within some five hundred tokens, with a = 0 within 2,500.")

# %% [markdown]
# With $a = 0.9$ within 552 tokens, about a seventh of the reach. The mean is exactly $L(1-a)(w-1)/2$. So "this model sees $L \cdot w$ tokens" is wrong twice: the last token is $L(w-1)$ back, and
# what averages sees a part of it. What is *trained* to copy can use all of it, as our first figure shows.
#
# ## Part 2 · Blocks
#
# ### 7.3 Block-sparse implementations
#
# **How does a machine skip a pair?** Not one by one: a mask that is looked at after the scores were computed saves
# nothing. Hardware loads keys in tiles (lecture 06), so whole **blocks** are left out. A **block mask** has one boolean
# for each pair of a block of queries and a block of keys.
#
# The running example in blocks of 4:

# %%
few = np.eye(8, dtype=bool) | np.eye(8, k=-1, dtype=bool)  # own block, the one before
few[7, needle // size] = True  # and for the last queries that of the needle
print(f"{few.sum()} blocks of {np.tril(np.ones((8, 8))).sum():.0f} are there")

# %% [markdown]
# Each row of the block mask becomes one small dense attention: gather the keys and values of its blocks, attend, write the
# rows. Here for the last row, queries 28 to 31:

# %% tags=["slide"]
columns = np.concatenate([np.arange(4 * b, 4 * b + 4) for b in np.flatnonzero(few[7])])
q_rows, k_there, v_there = q[28:], k[columns], v[columns]  # gathered
seen = columns <= np.arange(28, 32)[:, None]  # causal, inside the blocks
p_there = attention_weights(q_rows, k_there, seen)
out_rows = p_there @ v_there
print("keys that are read:", columns)
print(f"weight of key 5: {p_there[3, 1]:.2f}, first output {out_rows[3, 0]:.2f}")
plotting.flow(
    {"block mask": few.astype(float), "k": k, "v": v, "q rows": q_rows,
     "k there": k_there, "v there": v_there, "weights": p_there, "out rows": out_rows},
    [(("block mask", "k"), "k there", "gather row 7"),
     (("block mask", "v"), "v there", "gather row 7"),
     (("q rows", "k there"), "weights", "attend"),
     (("weights", "v there"), "out rows", "weights · v")],
    title="One row of blocks: twelve keys and values are gathered, twenty never read")
plotting.show("Data flow: row 7 of the block mask gathers twelve keys and values of "
              "thirty-two; four queries attend to them.")

# %% [markdown]
# The weight rises from 0.44 to 0.68, because fewer keys share it, and the output moves from 1.39 to 1.99. That is the price: block-sparse
# attention is exact for the pairs that are there, and blind for the others.
#
# #### Exercise 7B: the block-sparse loop  (difficulty 3 of 5, essential, 20 minutes; if you do only two)
#
# Write the loop: over the leading axes, and over the rows of the block mask. (`attention_numpy` under a mask that repeats each
# boolean for its block gives the same weights; but it reads all keys, and one check puts nan where nothing may be read.)
#
# |argument|shape|meaning|
# |---|---|---|
# |`q`, `k`, `v`|`(..., n_queries, d_head)`, `(..., n_keys, d_head)`, `(..., n_keys, d_v)`|as in `attention_numpy`|
# |`block_mask`|booleans `(n_query_blocks, n_key_blocks)`, leading axes before it or not|True = the block is there|
# |`block_size`|int|tokens of a block; the last block of queries or keys may be shorter|
# |`causal`, `scale`||as in `attention_numpy`: aligned at the bottom right|
#
# Returns `(..., n_queries, d_v)`. Block $i$ covers the rows `i * block_size` to `(i + 1) * block_size`. A query without a
# key is 0. What an absent block holds is never read: it may be nan. Given: arguments are checked, and `q`, `k`, `v`
# and `there` come with equal leading axes `lead`; `attention_numpy` of lecture 01.
#
# <details><summary>Hint</summary>
#
# For a `place` in `np.ndindex(lead)` and row `a`: which rows of q are block a? Which columns are the blocks of
# `there[place][a]`, and which of them exist? `out[place][rows] = attention_numpy(q[place][rows], k[place][____],
# v[place][____], mask=____, scale=scale)`. Where causal, which column may row i see?
#
# </details>

# %% tags=["export"]
from attention.flash import leading_axes
from attention.fundamentals import check_arguments
from utils import cuda

def check_block_mask(block_mask, block_size, lead, n_queries, n_keys):
    """Raise ValueError, in one sentence, unless a block mask (array, tensor) fits."""
    whole = isinstance(block_size, (int, np.integer)) and block_size is not True
    if not whole or block_size < 1:
        raise ValueError("block_size must be a positive whole number, "
                         f"got {block_size!r}")
    kind = str(getattr(block_mask, "dtype", type(block_mask).__name__))
    if "bool" not in kind:
        raise ValueError("block_mask must be boolean with True = the block is there, "
                         f"got {kind}")
    shape = tuple(block_mask.shape)
    blocks = (-(-n_queries // block_size), -(-n_keys // block_size))
    ahead = zip(shape[:-2][::-1], tuple(lead)[::-1])
    if (shape[-2:] != blocks or len(shape) - 2 > len(lead)
            or any(a not in (1, b) for a, b in ahead)):
        raise ValueError(f"block_mask must have the shape {blocks}, ahead nothing or "
                         f"leading axes that broadcast to {tuple(lead)}, got {shape}")

# %% tags=["exercise", "export"] kind="numpy"
def block_sparse_attention_numpy(q, k, v, block_mask, block_size, causal=False,
                                 scale=None):
    """Attention within the blocks that are there, in NumPy: oracle of _torch and _cuda.

    q (..., n_queries, d_head), k (..., n_keys, d_head), v (..., n_keys, d_v);
    block_mask boolean (n_query_blocks, n_key_blocks), True = the block is there, with
    leading axes or without. Returns (..., n_queries, d_v) in the float type of q. A
    query without a key gets 0, an absent block is never read. Raises ValueError when
    shapes do not fit.
    Source: Dao et al. 2022 (arXiv 2205.14135), § 3.3.
    """
    check_arguments(q, k, v)
    cuda.check_kind(np.ndarray, q=q, k=k, v=v)
    n_queries, n_keys, lead = q.shape[-2], k.shape[-2], leading_axes(q, k, v)
    check_block_mask(block_mask, block_size, lead, n_queries, n_keys)
    q, k, v, there = (np.broadcast_to(a, (*lead, *np.shape(a)[-2:]))
                      for a in (q, k, v, np.asarray(block_mask)))
    out = np.zeros((*lead, n_queries, v.shape[-1]), cuda.float_type(q))
    ### BEGIN SOLUTION
    for place in np.ndindex(lead):
        for a in range(there.shape[-2]):
            rows = np.arange(a * block_size, min((a + 1) * block_size, n_queries))
            keys = np.repeat(there[place][a], block_size)[:n_keys]
            columns = np.flatnonzero(keys)
            mask = columns <= rows[:, None] + n_keys - n_queries if causal else None
            out[place][rows] = attention_numpy(
                q[place][rows], k[place][columns], v[place][columns], mask, scale=scale)
    ### END SOLUTION
    return out

# %%
block_sparse_attention_numpy = check("7B", block_sparse_attention_numpy)

# %% [markdown]
# Three limits, on the example. With all blocks it is attention. With few it is attention under the mask that repeats each
# boolean of the block mask. And nan in absent blocks changes nothing.

# %%
whole = block_sparse_attention_numpy(q, k, v, np.ones((8, 8), bool), size, causal=True)
ours_few = block_sparse_attention_numpy(q, k, v, few, size, causal=True)
token_mask = np.repeat(np.repeat(few, size, 0), size, 1)  # a boolean for each pair
masked = attention_numpy(q, k, v, token_mask, causal=True)
k_nan = k.copy()
k_nan[8:24] = np.nan  # blocks that the last row does not have
last = block_sparse_attention_numpy(q[28:], k_nan, v, few[7:], size, causal=True)
print(f"all blocks: first output of query 31 {whole[31, 0]:.2f}, to attention "
      f"{np.abs(whole - out).max():.0e}")
print(f"few blocks: first output of query 31 {ours_few[31, 0]:.2f}, to the mask "
      f"{np.abs(ours_few - masked).max():.0e}, with nan elsewhere {last[3, 0]:.2f}")

# %% [markdown]
# In PyTorch the same loop gathers tensors (its code: Behind the scenes). It has gradients, and none for what it did not
# read.
#
# *Predict.* Of 32 keys, how many get a gradient of exactly 0 when the loss reads only rows 24 to 31?

# %%
from attention.sparse import block_sparse_attention_torch

leaves = [torch.from_numpy(array).requires_grad_() for array in (q, k, v)]
result = block_sparse_attention_torch(*leaves, torch.from_numpy(few), size, causal=True)
d_q, d_k, d_v = torch.autograd.grad(result[24:].sum(), leaves)
print(f"first output of query 31: {result[31, 0].item():.2f}")
print(f"keys whose gradient is exactly 0: {int((d_k == 0).all(-1).sum())} of 32")
small = [leaf[:8, :3].detach().clone().requires_grad_() for leaf in leaves]
options = {"block_mask": few[:2, :2], "block_size": 4, "causal": True}
same = torch.autograd.gradcheck(partial(block_sparse_attention_torch, **options), small)
print(f"gradients of 8 tokens, {8 * 3 * 3} numbers, as finite differences: {same}")

# %% [markdown]
# Sixteen: those of the four blocks that rows 24 to 31 do not read.
#
# **What is saved?** Work and bytes are those of the blocks that are there: $4 B^2 d$ operations a block of $B\times B$.
# A window makes their number grow with $n$, where it grew with $n^2$.

# %% tags=["slide"]
def blocks_there(n, window=256, block=64):
    """Causal blocks of n tokens, and those that a window touches."""
    a, b = np.arange(n // block)[:, None], np.arange(n // block)
    return int((b <= a).sum()), int(((b <= a) & (a - b <= window // block)).sum())

lengths = np.array([1024, 2048, 4096, 8192, 16384])
every, window_of_256 = np.array([blocks_there(n) for n in lengths]).T
for n, all_of_them, kept in zip(lengths, every, window_of_256):
    print(f"{n:6d} tokens: {all_of_them:6,} causal blocks, {kept:5,} with a window")
plotting.scaling({"all keys": (lengths, every), "window": (lengths, window_of_256)},
                 xlabel="tokens", ylabel="blocks of 64 × 64",
                 title="All pairs grow with the square, a window with the length")
plotting.show("Blocks against tokens, both logarithmic: all causal blocks rise with "
              "slope two, those of a window of 256 with slope one.")

# %% [markdown]
# (Slopes of 1.98 and 1.04, not 2 and 1: the diagonal, and the first rows, whose window is cut off.)
#
# ### 7.4 Longformer and BigBird
#
# **Who carries a message across the whole text?** A few **global** tokens that see everybody and that everybody sees: any two tokens
# are then at most two layers apart. Longformer (Beltagy, Peters and Cohan 2020, arXiv 2004.05150) adds them to a window; BigBird (Zaheer et al. 2020,
# arXiv 2007.14062) adds random blocks as well. Both were made for encoders: no triangle.

# %% tags=["export"]
def longformer_mask(n, window, global_tokens=()):
    """Boolean (n, n): window // 2 keys a side, rows and columns of global tokens.

    window: even, as in the paper, else ValueError. Source: arXiv 2004.05150, § 3.1.
    """
    check_sizes(0, n=n, window=window)
    if window % 2 or not all(0 <= token < n for token in global_tokens):
        raise ValueError(f"window must be even and global_tokens from 0 to below {n}, "
                         f"got {window} and {list(global_tokens)}")
    mask = np.abs(np.arange(n)[:, None] - np.arange(n)) <= window // 2
    mask[list(global_tokens)] = True
    mask[:, list(global_tokens)] = True
    return mask

# %% tags=["export"]
def bigbird_mask(n_blocks, n_random=3, seed=0):
    """Block mask (n_blocks, n_blocks): a window of three, two global, some random ones.

    The first and the last block see all and are seen by all; each other row has
    n_random blocks more, drawn from what is left (all of it, where that is less).
    Raises ValueError for a negative number. Source: arXiv 2007.14062.
    """
    check_sizes(0, n_blocks=n_blocks, n_random=n_random)
    rng = np.random.default_rng(seed)
    mask = np.abs(np.arange(n_blocks)[:, None] - np.arange(n_blocks)) <= 1
    mask[[0, -1] if n_blocks else []] = mask[:, [0, -1] if n_blocks else []] = True
    for row in mask[1:-1]:
        free = np.flatnonzero(~row)
        row[rng.permutation(free)[:n_random]] = True
    return mask

# %%
both = {"Longformer, window 6": longformer_mask(24, 6, [0]),
        "BigBird, 24 blocks": bigbird_mask(24, 2)}
plotting.masks(both, title="A window, global rows and columns, and random blocks")
plotting.show("Two masks of 24 by 24: a band with a full first row and column; a "
              "narrow one with full first and last rows and columns and some dots.")
for name, mask in both.items():
    print(f"{name:20s} {mask.mean():4.0%} of the pairs, all known after two layers: "
          f"{reachable(mask, 2).mean():.0%}")

# %% [markdown]
# ### 7.5 Trade-offs in long sequences
#
# **Twelve pairs a token: how would you spend them?** One layer with a window of 12, two layers with 6, three with 4? Or two layers of
# 4 of which the second looks 0, 4, 8 and 12 steps back: a **dilated** window, eight pairs.
#
# *Predict.* Order the four by how far back they answer.

# %% tags=["slide"]
spent = {
    "1 layer of 12": [range(12)],
    "2 layers of 6": [range(6)] * 2,
    "3 layers of 4": [range(4)] * 3,
    "2 layers, dilated": [range(4), range(0, 16, 4)],
}
recall = {}
for name, layers in spent.items():
    model = None if name == "3 layers of 4" else train_copy(map(tuple, layers), seed=0)
    recall[name] = copy_accuracy(model) if model else accuracy["L = 3"]  # trained above
    pairs = sum(map(len, layers))
    ends = np.flatnonzero(recall[name] > 0.6).max()
    print(f"{name:18s} {pairs:2d} pairs a token: right as far as {ends:2d} steps back")
plotting.curves(recall, xlabel="k: how many steps back", ylabel="accuracy",
                threshold=1 / 4, threshold_name="chance",
                title="At equal cost one wide layer sees further than three narrow")
plotting.show("Accuracy against the lag: three layers of 4 fall after 9, two of 6 "
              "after 10, one of 12 after 11, and the dilated pair after 15 steps.")

# %% [markdown]
# The dilated pair first, then one wide layer, two, three. At equal cost depth does not buy reach: $L(w-1)$ loses one key a layer. What reaches far is a pattern whose layers differ. And no
# pattern reaches beyond its end: **a fixed pattern decides before it has seen the text.** The cliff is the trade-off, and its
# remedy is to let the text decide.

# %% [markdown]
# ## Part 3 · Who decides
#
# ### 7.6 Blocks chosen by their mean key
#
# **How do you find the right block without reading its keys?** Keep one vector for each block, the mean of its keys, and score the query
# against those: one score for a block instead of $B$. MoBA (Lu et al. 2025, arXiv 2502.13189) chooses blocks so, without
# a single parameter. In our example:

# %%
mean_keys = k.reshape(8, size, 16).mean(1)
by_mean = mean_keys @ q[31] / 4  # (8,): a score a block
print("best blocks:", np.argsort(-by_mean)[:3], " the needle's:", needle // size)
print(f"score of its block {by_mean[1]:.2f}, of key 5 {k[needle] @ q[31] / 4:.2f}")

# %% [markdown]
# The mean of four keys holds the needle at a quarter of its strength, and the noise of three others. The larger the
# block, the less is left of it.
#
# *Predict.* 2,048 keys, and an eighth of the blocks may be read. How often is the right one among them, with blocks of 8,
# 32, 128? And when four keys of a block match instead of one?

# %% tags=["slide"]
from attention.experiments.sparse import needle_recall

sizes = [8, 16, 32, 64, 128]
found = {"one key of d = 32": [needle_recall(b, 32) for b in sizes],
         "one key of d = 128": [needle_recall(b, 128) for b in sizes],
         "four keys of d = 128": [needle_recall(b, 128, together=4) for b in sizes]}
for name, shares in found.items():
    print(f"{name:21s}", *(f"B={b} {s:.1f}" for b, s in zip(sizes, shares)))
plotting.curves(found, x=sizes, xlabel="tokens of a block", threshold=1 / 8,
                ylabel="right block chosen", threshold_name="chance",
                title="A mean key finds four keys together; a lone one is lost "
                "as blocks grow").set_xscale("log", base=2)
plotting.show("Share of right blocks against block size: the lines of a lone key fall "
              "towards chance, that of four keys together stays above three in four.")

# %% [markdown]
# A lone key of 128 numbers in eight of ten tries, in four, in two; four keys together always with the small blocks, and still in eight of ten with 128. Small blocks, wide keys, and neighbours that mean the same help ("Optimizing MoBA", arXiv 2511.11571, says so in theory
# and adds a convolution that makes neighbours alike). Two blocks never depend on a score: a query must see its **own**
# block, or it does not see itself, and the **first** one, because trained models park weight there (the sink of lecture 05).
#
# #### Exercise 7C: choose blocks  (difficulty 3 of 5, useful, 15 minutes)
#
# From scores of blocks make a causal block mask: for each row its own block and block 0, always; then the best of those
# before it, until `n_keep` are there.
#
# |argument|shape|meaning|
# |---|---|---|
# |`scores`|`(..., n_blocks, n_blocks)`|row: block of queries; those of later blocks mean nothing|
# |`n_keep`|int, at least 2|blocks of a row, own and first counted; early rows have fewer|
#
# Returns booleans of the same shape. Of equal scores the earlier block is taken.
#
# <details><summary>Hint</summary>
#
# Which number could stand in for the score of a block that must be taken, and which for one that must not? What does
# `np.argsort` of an `np.argsort` give, and what does `kind="stable"` do for equal scores? Row 0 has how many blocks?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def select_blocks(scores, n_keep):
    """A causal block mask: own block, first block and the best before, n_keep in all.

    scores (..., n_blocks, n_blocks), a row for each block of queries. Returns booleans
    of the same shape; never a later block. Raises ValueError for scores that are not
    square and for n_keep below 2.
    """
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2] or n_keep < 2:
        raise ValueError("scores must be (..., n_blocks, n_blocks), n_keep at least 2, "
                         f"got {scores.shape} and {n_keep}")
    ### BEGIN SOLUTION
    row, column = np.indices(scores.shape[-2:])
    ranked = np.where(column < row, scores, -np.inf)
    ranked = np.where((column == row) | (column == 0), np.inf, ranked)
    order = np.argsort(-ranked, axis=-1, kind="stable")
    place = np.argsort(order, axis=-1)
    return (place < n_keep) & (column <= row)
    ### END SOLUTION

# %%
select_blocks = check("7C", select_blocks)

# %%
mean_queries = q.reshape(8, size, 16).mean(1)
chosen = {"by means, 3 blocks": select_blocks(mean_queries @ mean_keys.T, 3),
          "by the true maximum": select_blocks(
              (q @ k.T).reshape(8, size, 8, size).max((1, 3)), 3)}
for name, there in chosen.items():
    found_it = block_sparse_attention_numpy(q, k, v, there, size, causal=True)
    print(f"{name:20s} row 7 reads {np.flatnonzero(there[7])}, query 31 begins with "
          f"{found_it[31, 0]:+.2f} (all keys {out[31, 0]:+.2f})")
plotting.masks(chosen, title="Own block, first block, and one chosen by its score",
               rows="blocks of queries", columns="blocks of keys")
plotting.show("Two block masks of eight by eight: a diagonal, a first column, and one "
              "more block a row, not the same in both.")

# %% [markdown]
# By means row 7 misses the needle, although query 31 alone put its block first. A row of blocks asks with the mean of *four*
# queries, of which one looks for key 5 and three for something else; and the mean key holds a quarter of it. The true maximum
# looks at every pair, finds it, and saves nothing: all scores were computed. (Chosen for a row of blocks, a query's blocks depend on *later* queries of its row:
# harmless when a prompt is read, a leak in training. MoBA and NSA choose for each query.)

# %% [markdown] tags=["slide"]
# ### 7.7 The lightning indexer
#
# **Can the choice be learned?** A top-k has no gradient: nothing tells a block that was not chosen that it should have been.
# DeepSeek Sparse Attention (DeepSeek-V3.2-Exp report, 2025) gives the choice a network of its own, an **indexer** with few
# small heads, and trains it to *imitate* the attention it is to replace:
#
# $$I_{t,s}=\sum_{j=1}^{H^I} w^I_{t,j}\cdot\text{ReLU}\left(q^I_{t,j}\cdot k^I_s\right)$$
#
# $h_t$ is the token that asks, $h_s$ one that may be read. Each head $j$ has a query $q^I_{t,j}$ and a weight
# $w^I_{t,j}$, both projected from $h_t$; all share one key $k^I_s$. Then the $k$ keys with the largest $I_{t,s}$ get real attention. Published code
# also normalises the key (LayerNorm) and multiplies by $1/\sqrt{d^I}$ and $1/\sqrt{H^I}$.
#
# #### Exercise 7D: the indexer  (difficulty 3 of 5, essential, 20 minutes; if you do only two)
#
# |array|shape|
# |---|---|
# |`x`: the tokens $h$|`(..., n, d_model)`|
# |$q^I$ from the layer `query`, no bias|`(..., n, n_heads, d_index)`|
# |$k^I$ from the layer `key`, no bias, then `norm`: LayerNorm with `eps=1e-6`|`(..., n, d_index)`|
# |$w^I$ from the layer `weight`, no bias, times $1/\sqrt{H^I}$|`(..., n, n_heads)`|
# |ReLU of $q^I\cdot k^I/\sqrt{d^I}$|`(..., n, n_heads, n)`|
#
# Returns $I$ `(..., n, n)`: rows ask. With `causal=True` the future is `-inf`.
#
# <details><summary>Hint</summary>
#
# `self.query(x).unflatten(-1, (____, ____))`. All heads share a key: which axis of $k^I$ is missing? The sum over heads is a
# product of a row `(1, n_heads)` with a matrix `(n_heads, n)`: which of the two stands in front of which?
#
# </details>

# %% tags=["exercise", "export"] kind="module"
class LightningIndexer(nn.Module):
    """Index scores of DeepSeek Sparse Attention: which keys are worth reading.

    x (..., n, d_model). Returns I (..., n, n), larger = rather read; with causal=True
    the future is -inf. The published model also rotates parts of query and key
    (half-split RoPE). Source: DeepSeek-V3.2-Exp (2025), equation 1.
    """

    def __init__(self, d_model, n_heads, d_index):
        super().__init__()
        ### BEGIN SOLUTION
        self.n_heads = n_heads
        self.query = nn.Linear(d_model, n_heads * d_index, bias=False)
        self.key = nn.Linear(d_model, d_index, bias=False)
        self.norm = nn.LayerNorm(d_index, eps=1e-6)
        self.weight = nn.Linear(d_model, n_heads, bias=False)
        ### END SOLUTION

    def forward(self, x, causal=False):
        ### BEGIN SOLUTION
        q = self.query(x).unflatten(-1, (self.n_heads, -1))  # (..., n, heads, d_index)
        k = self.norm(self.key(x))
        matches = torch.relu(q @ k[..., None, :, :].mT * k.shape[-1] ** -0.5)
        w = self.weight(x) * self.n_heads**-0.5
        scores = (w[..., None, :] @ matches)[..., 0, :]
        if causal:
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        return scores
        ### END SOLUTION

# %%
LightningIndexer = check("7D", LightningIndexer)

# %% [markdown]
# **What does it imitate?** The attention weights of the model, summed over its heads and normalised to a row that sums to
# 1, $p_{t,:}$. The loss is the Kullback-Leibler divergence to the softmax of the index scores, over all tokens:
#
# $$\mathcal L^I=\sum_t D_{KL}\left(p_{t,:}\,\|\,\text{softmax}(I_{t,:})\right),\qquad
#   D_{KL}(p\,\|\,r)=\sum_s p_s\ln\frac{p_s}{r_s}$$
#
# #### Exercise 7E: train the indexer  (difficulty 3 of 5, useful, 15 minutes)
#
# Write one step of its training. The model that gives $p$ is frozen: it is not even there.
#
# |argument|shape|meaning|
# |---|---|---|
# |`indexer`||`indexer(x)` gives scores `(batch, n, n)`|
# |`optimiser`||of the indexer's parameters|
# |`x`|`(batch, n, d_model)`|tokens|
# |`p`|`(batch, n, n)`|rows sum to 1; a weight may be 0|
#
# Returns the loss before the step, a Python number: the divergence averaged over all rows. A weight of 0 adds 0 to it.
#
# <details><summary>Hint</summary>
#
# $\ln(p/r)=\ln p-\ln r$: which function gives $\ln\text{softmax}$ without overflow? What is `0 * log(0)` in floats, and
# what does `torch.xlogy(p, p)` make of it? On which axis do the rows sum to 1, and over which is averaged?
#
# </details>

# %% tags=["exercise", "export"] kind="training"
def indexer_step(indexer, optimiser, x, p):
    """One step of an indexer towards attention weights, by their KL divergence.

    indexer(x): scores (batch, n, n) for x (batch, n, d_model); p (batch, n, n), rows
    sum to 1. Returns the mean divergence of a row before the step, a float.
    Source: DeepSeek-V3.2-Exp (2025), the dense warm-up stage.
    """
    ### BEGIN SOLUTION
    logarithms = torch.log_softmax(indexer(x), dim=-1)
    loss = (torch.xlogy(p, p) - p * logarithms).sum(-1).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()
    ### END SOLUTION

# %%
indexer_step = check("7E", indexer_step)

# %% [markdown]
# Now to real weights: layer 3 of MiniLM (lecture 01) reads pieces of 64 tokens of this course, and the mean of its twelve heads
# is $p$. An indexer of four heads of 16 imitates it on 32 pieces; then, on eight pieces that it has not seen, each query may
# read 8 of 64 keys. How much of the weight is on them?
#
# *Predict.* Order: the eight nearest, eight at random, the eight that are best on average, the indexer before and after
# its training.

# %%
from attention.experiments.sparse import minilm_chunks, share_of_mass

x, p = minilm_chunks(layer=3)  # (40, 64, 384) and (40, 64, 64)
learned, new = x[:32], (x[32:], p[32:])
mass = {"random": [], "untrained": [], "trained": []}
for seed in range(3):
    indexer = training.initialise(LightningIndexer(384, 4, 16).double(), seed)
    pieces = np.random.default_rng(seed)
    noise = torch.from_numpy(pieces.random((8, 64, 64)))
    mass["random"].append(share_of_mass(noise, new[1]))
    mass["untrained"].append(share_of_mass(indexer(new[0]), new[1]))
    optimiser = torch.optim.AdamW(indexer.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        some = pieces.integers(32, size=8)
        losses.append(float(indexer_step(indexer, optimiser, x[some], p[some])))
    mass["trained"].append(share_of_mass(indexer(new[0]), new[1]))
    print(f"seed {seed}: divergence {losses[0]:.1f} -> {losses[-1]:.2f}")

# %% tags=["slide"]
place = torch.arange(64.0)
nearest = -(place[:, None] - place).abs().expand(8, 64, 64)
average = p[:32].mean((0, 1)).expand(8, 64, 64)
shown = {"random": mass["random"], "nearest 8": share_of_mass(nearest, new[1]),
         "untrained indexer": mass["untrained"],
         "best on average": share_of_mass(average, new[1]),
         "trained indexer": mass["trained"],
         "the true best 8": share_of_mass(new[1], new[1])}
for name, value in shown.items():
    print(f"{name:17s} {np.mean(value):.2f} of the attention")
plotting.bars(shown, ylabel="share of the attention on 8 of 64 keys",
              title="A trained indexer finds nearly what the true best eight hold")
plotting.show("Six bars: random and the untrained indexer hold little attention, "
              "the nearest keys a quarter, the best on average more, the trained "
              "indexer almost as much as the true best eight.")

# %% [markdown]
# Random and untrained alike, then nearest, best on average, trained. The control is *best on average*, one list for all queries: some keys are always looked at. The trained indexer beats it
# and comes near the best that eight keys can hold. It is still asked for **every** pair, so DSA costs $O(n^2)$, with a small
# constant (7.16 counts it).
#
# *Draw it:* what flows where, with the arrays of one piece.

# %% tags=["slide"]
with torch.no_grad():
    one = new[0][0]
    scores_of_one = indexer(one)
    best = torch.zeros(64, 64).scatter(1, scores_of_one.topk(8).indices, 1.0)
    heads_of_one = indexer.query(one).unflatten(-1, (4, 16)).transpose(0, 1)
    plotting.flow({"h": one, "q I": heads_of_one, "w I": indexer.weight(one),
                   "k I": indexer.norm(indexer.key(one)), "I": scores_of_one,
                   "mask": best},
                  [("h", "q I", "query"), ("h", "w I", "weight"),
                   ("h", "k I", "key, norm"),
                   (("q I", "w I", "k I"), "I", "Σ w ReLU(q·k)"),
                   ("I", "mask", "top 8")],
                  title="The indexer: four small heads and one key decide what is read")
plotting.show("Data flow from the tokens h through small queries, weights and one key "
              "to index scores and a mask with eight keys a row.")

# %% [markdown]
# ### 7.8 Compressed keys, three branches, and one leak
#
# **And what was not chosen: is it lost?** Native Sparse Attention (NSA, Yuan et al. 2025, arXiv 2502.11089) reads three
# things and adds them, each through a gate from 0 to 1: **compressed** keys and values, one a block, a blurred view of everything;
# **selected** blocks, sharp; a **window**. Each branch has keys and values of its own (a common shortcut uses one pair for all).
#
# Compression has one trap. The compressed key of block $b$ holds tokens $bm$ to $bm+m-1$. Query $t$ may see it when its *last* token
# is not after $t$: that are the first $\lfloor (t+1)/m\rfloor$ blocks.

# %% tags=["export"]
def compressed_attention(q, k, v, m):
    """Causal attention to the means of whole blocks of m keys and values, in NumPy.

    q, k (..., n, d_head), v (..., n, d_v). Query t sees the (t + 1) // m blocks that
    end at t or before; while there is none its output is 0. Returns (..., n, d_v).
    Raises ValueError where m is below 1. Source: arXiv 2502.11089, § 3.3.1, with a mean
    for its learned map.
    """
    check_sizes(m=m)
    n, n_blocks = q.shape[-2], k.shape[-2] // m
    k_mean, v_mean = (a[..., : n_blocks * m, :]
                      .reshape(*a.shape[:-2], n_blocks, m, a.shape[-1]).mean(-2)
                      for a in (k, v))
    visible = (np.arange(n) + 1) // m
    mask = np.arange(n_blocks) < visible[:, None]
    return attention_numpy(q, k_mean, v_mean, mask)

# %%
all_of_them = compressed_attention(q, k, v, 1)
print(f"m = 1: first output of query 31 {all_of_them[31, 0]:+.2f}, to attention "
      f"{np.abs(all_of_them - out).max():.0e}")
for m in (2, 4, 8):
    blurred = compressed_attention(q, k, v, m)
    print(f"m = {m}: first output of query 31 {blurred[31, 0]:+.2f}")

# %% [markdown]
# #### Exercise 7F: find the leak  (difficulty 3 of 5, useful, 15 minutes)
#
# Someone rewrote `compressed_attention`. Write a test for it. It is tried on right ones and on eight wrong ones: blocks that end
# in the future, blocks seen too late, an unfinished block that is seen, a scale that is missing, a mean over the wrong
# tokens, a first value for a mean value, a row that sees nothing and is not zero.
#
# |argument|meaning|
# |---|---|
# |`compressed_attention`|`compressed_attention(q, k, v, m)`, arrays `(n, d)` in, `(n, d_v)` out|
#
# Returns nothing. It raises an error (`assert ...`) for a wrong one, and none for a right one.
#
# <details><summary>Hint</summary>
#
# Change token t: which rows may move? Let n be no multiple of m. Where m = 1 there is a function that must give the same; where m = 2 and
# n = 3 you can write down row 2 by hand.
#
# </details>

# %% tags=["exercise", "export"] kind="bug"
def test_compressed(compressed_attention):
    """Raise AssertionError if compressed_attention(q, k, v, m) is wrong."""
    ### BEGIN SOLUTION
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 11, 4))
    for m in (1, 2, 3, 4):
        got = compressed_attention(q, k, v, m)
        for t in range(11):
            count = (t + 1) // m
            if count == 0:
                assert not got[t].any(), "a query that sees nothing"
                continue
            keys = np.stack([k[b * m : b * m + m].mean(0) for b in range(count)])
            values = np.stack([v[b * m : b * m + m].mean(0) for b in range(count)])
            powers = np.exp(keys @ q[t] / 2)
            assert np.allclose(got[t], powers @ values / powers.sum()), (m, t)
    ### END SOLUTION

# %%
test_compressed = check("7F", test_compressed)

# %% [markdown]
# With $\lfloor t/m\rfloor + 1$ blocks, an easy slip, the last block holds tokens that come after $t$. A model that is trained so learns to
# read its answer. **A loss that is too good is a bug report** (7.9 shows one). All three branches together:

# %% tags=["export"]
def native_sparse_attention(q, keys, values, gates, m, n_keep, window):
    """The three branches of NSA for one head, in NumPy: compressed, selected, window.

    q (n, d_head), n a multiple of m; keys and values: three arrays (n, d) each, one a
    branch; gates (n, 3). Each query selects blocks of m by their mean keys
    (select_blocks: own, first, best, n_keep in all). Returns (n, d_v).
    Source: Yuan et al. 2025 (arXiv 2502.11089), equation 5; there a block's score comes
    from the weights of the compressed branch.
    """
    n, there = len(q), np.zeros((len(q), len(q) // m), bool)
    means = keys[1].reshape(n // m, m, -1).mean(1)
    for first in range(m):  # one query of each block: their mean would see the future
        there[first::m] = select_blocks(q[first::m] @ means.T, n_keep)
    seen = np.repeat(there, m, axis=1)
    branches = (
        compressed_attention(q, keys[0], values[0], m),
        attention_numpy(q, keys[1], values[1], seen, causal=True),
        attention_numpy(q, keys[2], values[2], sliding_window_mask(n, n, window)),
    )
    return sum(gates[:, [i]] * branch for i, branch in enumerate(branches))

# %%
keys3, values3 = ([array] * 3 for array in (k, v))
for gate, name in enumerate(("compressed", "selected", "window")):
    only = np.eye(3)[[gate] * 32]
    small_part = native_sparse_attention(q, keys3, values3, only, 4, 3, 8)
    m = (1, 4, 4)[gate]
    everything = native_sparse_attention(q, keys3, values3, only, m, 8, 32)
    print(f"{name:10s} first output of query 31 {small_part[31, 0]:+.2f}; with all "
          f"selected {everything[31, 0]:+.2f} (attention {out[31, 0]:+.2f})")

# %% [markdown]
# Each branch becomes causal attention when nothing is left out: blocks of one token, all blocks, a window of $n$. That is the cheapest test
# of any sparse method, and the first that you should write.

# %% [markdown]
# ## Part 4 · In a real model
#
# ### 7.9 Windows and chosen blocks in SmolLM2
#
# **Do these laws hold in a model that was trained with full attention?** SmolLM2 has 30 layers of 9 heads (lecture 05). Its attention is one
# function; here it becomes yours, with a window. First a window that is longer than the text: nothing may change.

# %% tags=["language-model"]
from utils import language_model

smollm = language_model.load()

def windowed(window, n_sinks=0):
    """Attention in which a query sees `window` keys and the first n_sinks tokens."""
    def attend(q, k, v, causal=True):
        n_queries, n_keys = q.shape[-2], k.shape[-2]
        seen = sliding_window_mask(n_queries, n_keys, window)
        seen = seen | (causal_mask(n_queries, n_keys) & (np.arange(n_keys) < n_sinks))
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.as_tensor(seen))
    return attend

_ = language_model.put_in(smollm, attention=windowed(1024))

# %% [markdown]
# Now $w=4$ in all 30 layers. One token of 220 is exchanged, number 100.
#
# *Predict.* In which of the places after it do the logits change? Where is the last?

# %% tags=["language-model", "approx", "slide"] approx={"picture": 0.05, "numbers": 0.3}
if smollm:
    narrow = smollm.replace(attention=windowed(4))
    text = language_model.excerpt(smollm, 220, of="course")
    swapped = text.clone()
    swapped[0, 100] = (swapped[0, 100] + 1000) % 49000
    with torch.no_grad():
        change = (narrow(text) - narrow(swapped)).abs().amax(-1)[0, 100:].numpy()
    print(f"largest change 1 token on: {change[1]:.0f}, 10 tokens on: {change[10]:.1g}")
    print(f"from 91 tokens on: {change[91:].max()} (30 layers × 3 = 90)")
    shown_until = np.maximum(change, 1e-9)
    plotting.curves({"window 4": shown_until}, xlabel="tokens after the changed one",
                    ylabel="largest change of a logit", log_y=True,
                    title="The reach of 30 layers of a window of 4 ends at 90")
    plotting.show("Change of the logits, logarithmic: falls to the size of rounding "
                  "within 40 tokens, stays there to 90, then the floor, which is 0.")

# %% [markdown]
# Not one logit beyond 90 moves. And what arrives is little: after 40 tokens the change is of the size of rounding. Both halves of section 7.2, *can* and *does*.
#
# **What does a window cost?** 512 tokens of this course; the loss of tokens 200 to 511, above that of full attention. A window of 64 in all
# layers, in three of four, in one of two; with and without the first token kept as a **sink**.
#
# *Predict.* Which matters more, half of the layers with full attention, or one single key?

# %% tags=["language-model", "slide"]
if smollm:
    reading = language_model.excerpt(smollm, 512, of="course")
    full = float(smollm.losses(reading)[200:].mean())
    costs = {}
    for n_sinks in (0, 1):
        local = windowed(64, n_sinks)
        for name, full_layers in (("all", []), ("3 of 4", range(3, 30, 4)),
                                  ("1 of 2", range(1, 30, 2))):
            parts = [windowed(512) if i in full_layers else local for i in range(30)]
            loss = smollm.replace(attention=parts).losses(reading)[200:].mean()
            costs[f"{name}, {n_sinks} sink"] = float(loss) - full
    print(f"full attention: {full:.2f} nats a token; above it:")
    print(*(f"{name:18s} {cost:.2f}" for name, cost in costs.items()), sep="\n")
    plotting.bars(costs, ylabel="loss above full attention (nats)",
                  title="One sink saves more than fifteen layers of full attention")
    plotting.show("Six bars: without the sink a window of 64 costs much, in all layers "
                  "or in half of them; with one sink a small part of that.")

# %% [markdown]
# The single key. (Without it, full attention in fifteen layers brings an eighth of a nat.) This model was trained with full attention and parks weight on its first token (lecture 05); a window
# throws that token away. With it back, and every fourth or second layer full, hardly anything is lost. Models that are trained with windows
# mix such layers (7.11), and keep a sink as a parameter (7.19).
#
# Now four masks were tried: query t sees all keys up to the end of its block, with blocks of 1, 2, 4 and 8.
#
# *Predict.* Which of these losses would you be proud of?

# %% tags=["language-model"]
if smollm:
    token = np.arange(512)
    def block_causal(block):
        """Query t sees all keys up to the end of its block."""
        seen = token[None] <= (token[:, None] // block + 1) * block - 1
        return lambda q, k, v, causal=True: nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.as_tensor(seen))

    for block in (1, 2, 4, 8):
        leaky = smollm.replace(attention=block_causal(block))
        print(f"blocks of {block}: loss {leaky.losses(reading)[200:].mean():.2f}")

# %% [markdown]
# None but the first: it is the causal mask. Blocks of 2 show every second query its next token, blocks of 8 seven of eight, and the loss
# falls from four nats to one and a half. This model has not even been trained to use the leak. *The loss cannot be your test.*
#
# **Which blocks does it need?** Blocks of 32, 16 of them; your `select_blocks` keeps 3 a row for each head, own and first included, by five
# kinds of scores: the true attention mass of a block; the **antidiagonal** rule of XAttention (Xu et al. 2025, arXiv 2503.16428), which
# looks at every eighth antidiagonal of the scores (from bottom left to top right of a block); mean query times mean key; the nearest; random.
#
# *Predict.* Order the five by loss.

# %% tags=["language-model"]
if smollm:
    from attention.experiments.sparse import block_scores

    def chosen_by(scores_of, n_keep, kept):
        """Attention in chosen blocks of 32; `kept` collects the mass that is there."""
        def attend(q, k, v, causal=True):
            seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
            logits = (q @ k.mT / 8).masked_fill(~seen, -math.inf)
            there = select_blocks(scores_of(q, k, logits).numpy(), n_keep)
            there = torch.as_tensor(there)
            there = there.repeat_interleave(32, -2).repeat_interleave(32, -1)
            p = torch.softmax(logits, -1) * there
            mass = p.sum(-1, keepdim=True)
            kept.append(float(mass[..., 256:, :].mean()))
            return p @ v / mass
        return attend

    found_by, full_late = {}, float(smollm.losses(reading)[256:].mean())
    for rule in ("true mass", "antidiagonals", "mean keys", "nearest", "random"):
        kept = []
        choosing = chosen_by(partial(block_scores, rule), 3, kept)
        loss = smollm.replace(attention=choosing).losses(reading)[256:].mean()
        found_by[rule] = float(loss) - full_late
        print(f"{rule:14s} {np.mean(kept):.2f} of the mass, loss {found_by[rule]:+.2f}")

# %% tags=["language-model", "slide"]
if smollm:
    plotting.bars(found_by, ylabel="loss above full attention (nats)",
                  title="An eighth of the scores chooses blocks as well as all")
    plotting.show("Five bars of added loss: true mass and antidiagonals lowest, mean "
                  "keys and nearest a little higher, random highest by far.")

# %% [markdown]
# Blocks chosen by an eighth of the scores are as good as by all; mean keys and even the nearest come close, a random block does not.
# Own and first block are there by rule in all five: only the third differs, and still a random one costs 0.4 nats. (Each choice still computed all scores here, to measure the mass; nothing was
# faster.)
#
# ## Part 5 · CUDA
#
# ### 7.10 Blocks that are never loaded
#
# **Which bytes are saved?** A kernel that loads all tiles and masks saves none. The flash kernel of lecture 06 walks over all tiles of keys;
# this one gets a **list** for each row of the block mask. Row $l$ has the blocks `blocks[starts[l]]` up to `blocks[starts[l + 1] - 1]`.
# For one head, $s$ bytes a number and $K$ key rows visited by all tiles of queries together:
#
# $$\text{read}=s\,d\,(n+2K),\qquad \text{written}=s\,d\,n$$
#
# What is done with a tile is lecture 06's: `load_chunks`, `score`, `rescale`, `accumulate`, in one function,
# `attend_tile` (Behind the scenes). What is new is the walk.

# %% [markdown] tags=["slide"]
# #### Exercise 7G: walk over the list  (difficulty 3 of 5, useful, 20 minutes)
#
# Write the walk of one block of threads (16 × 16) over the key blocks of its row. `BQ` queries are loaded; `maximum`, `total`
# and `sum` of each thread's rows are ready; what comes after writes them.
#
# |name|meaning|
# |---|---|
# |`starts`, `blocks`|the key blocks of this row are `blocks[starts[list]]` to `blocks[starts[list + 1] - 1]`|
# |`block_size`, `BK`|keys of a block, of a tile: a block has one tile or more, the last one shorter|
# |`visible`|no query of this tile sees a key from here on|
# |`load_chunks<D>(tile, BK, rows, first, end, d)`|all threads copy `BK` rows from `first` on, zeros from `end` on|
# |`attend_tile<D, R, C, G>(q_tile, k_tile, v_tile, p_rows, maximum, total, sum, first_query, first, end, n_queries, n_keys, causal, window, scale)`|takes one tile, keys `first` to `end - 1`, into `maximum`, `total` and `sum`|
#
# Returns nothing. Keys and values of absent blocks are not read, those of present ones once for each tile of queries.
#
# <details><summary>Hint</summary>
#
# Two loops, over the numbers in the list and over the tiles of a block: where does a block end, if it is the last, or if
# `visible` comes first? A tile is overwritten while another warp still reads it: where do two `__syncthreads()` stand?
#
# </details>

# %% tags=["exercise", "export"] kind="kernel"
BLOCK_SPARSE = r"""
template <int D, int BQ, int BK>                         // d in steps of 32; rows of a tile
__global__ void block_sparse(const float* q, const float* k, const float* v, const int* starts,
                             const int* blocks, float* out, int n_queries, int n_keys, int d,
                             int block_size, int causal, int window, float scale) {
  const int R = BQ / TILE;
  const int C = BK / TILE;
  const int G = (D / 4 + TILE - 1) / TILE;
  extern __shared__ float4 q_tile[];
  float4* k_tile = q_tile + BQ * (D / 4);
  float4* v_tile = k_tile + BK * (D / 4);
  float* p_rows = (float*)(v_tile + BK * (D / 4)) + threadIdx.y * (BK + (C % 2 == 0 ? 16 : 0));
  int tiles = (block_size + BQ - 1) / BQ;                // of queries, in a block
  int row = blockIdx.y / tiles;                          // of the block mask
  int first_query = row * block_size + blockIdx.y % tiles * BQ;
  int end_query = min(min(first_query + BQ, (row + 1) * block_size), n_queries);
  if (first_query >= end_query) return;                  // the last block may be short
  size_t head = blockIdx.x;
  size_t list = head * (gridDim.y / tiles) + row;
  q += head * n_queries * d;
  k += head * n_keys * d;
  v += head * n_keys * d;
  int visible = visible_keys(end_query, n_queries, n_keys, causal);
  load_chunks<D>(q_tile, BQ, q, first_query, end_query, d);
  float maximum[R];
  float total[R] = {};
  float4 sum[R][G] = {};
  for (int r = 0; r < R; ++r) maximum[r] = -INFINITY;
  // BEGIN SOLUTION
  for (int b = starts[list]; b < starts[list + 1]; ++b) {  // the blocks that are there
    int block = blocks[b];
    int end = min((block + 1) * block_size, visible);
    for (int first = block * block_size; first < end; first += BK) {
      __syncthreads();                                   // the tiles of the last round are used up
      load_chunks<D>(k_tile, BK, k, first, end, d);
      load_chunks<D>(v_tile, BK, v, first, end, d);
      __syncthreads();                                   // the new tiles are there
      attend_tile<D, R, C, G>(q_tile, k_tile, v_tile, p_rows, maximum, total, sum, first_query,
                              first, end, n_queries, n_keys, causal, window, scale);
    }
  }
  // END SOLUTION
  write_rows(out + head * n_queries * d, sum, total, first_query, end_query, d);
}
"""

# %%
BLOCK_SPARSE = check("7G", BLOCK_SPARSE)

# %% [markdown]
# One head, 256 queries and keys, $d = 64$, blocks of 32: a window of three blocks, and one global block that all see.
#
# *Predict.* 28 of 64 blocks are there. What part of the dense kernel's bytes is read?

# %% tags=["slide"]
from attention.flash import flash_bytes
from attention.sparse import block_sparse_bytes, block_sparse_launch

draws = np.random.default_rng(7)
q32, k32, v32 = draws.standard_normal((3, 1, 256, 64)).astype(np.float32)
row, column = np.indices((8, 8))
band = (abs(row - column) <= 1) | (column == 0)
kernel, launch, arguments, _ = block_sparse_launch(q32, k32, v32, band, 32)
report = kernel.check[launch](*arguments)
read = sum(line.bytes for line in report.rows
           if line.kind == "load" and line.array in ("q", "k", "v"))
dense = flash_bytes(256, 256, 64, 32)[0]
print(f"{band.sum()} of {band.size} blocks are there; problems: {len(report.problems)}")
print(f"q, k, v read {read:9,} bytes, formula "
      f"{block_sparse_bytes(band, 32, 256, 256, 64)[0]:9,}")
print(f"dense        {dense:9,} bytes: read is {read / dense:.2f} of it")
off = arguments[5].numpy() - block_sparse_attention_numpy(q32, k32, v32, band, 32)
print(f"largest difference to NumPy {np.abs(off).max():.6f}")

# %% [markdown]
# 0.47 of them; the formula holds to the byte. The running example once more, in CUDA:

# %%
from attention.sparse import block_sparse_attention_cuda, window_blocks

by_kernel = block_sparse_attention_cuda(q, k, v, few, size, causal=True)
print(f"few blocks: first output of query 31 {by_kernel[31, 0]:.2f}")

# %% [markdown]
# **Is it then faster?** No kernel is faster than the longest of three times: bytes over bandwidth, turns of shared memory over clock,
# operations over peak. The last two are proportional to the blocks that are there, the bytes nearly.
#
# *Predict.* 16,384 tokens, $d = 64$, a window of 1,024. By how much does each bar shrink?

# %% tags=["slide"]
tokens_n, tile = 16384, 64
near_blocks = int(window_blocks(tokens_n, tokens_n, 1024, tile).sum())
all_blocks = (tokens_n // tile) * (tokens_n // tile + 1) // 2
rungs = {}
for name, count in (("all blocks", all_blocks), ("window", near_blocks)):
    keys_read = count * tile
    products = count * tile * tile * 64
    rungs[name] = (4 * 64 * (2 * tokens_n + 2 * keys_read), products / 32, 4 * products)
print(f"blocks: {all_blocks:,} and {near_blocks:,}, "
      f"{all_blocks / near_blocks:.1f} times fewer")
plotting.ladder(rungs, bandwidth=1.555e12, turns_per_second=108 * 1.41e9, peak=19.5e12,
                title="All three bars shrink together: eight times fewer blocks")
plotting.show("Three bars for each of two kernels, logarithmic: for all blocks and for "
              "a window, each some eight times shorter in the second.")

# %% [markdown]
# Nearly eight; the bytes a little less, because queries and output are moved in any case. (A100 40 GB, data sheet; one turn for each operand of 32 products, an estimate.) On a GPU, lists bring an imbalance: a block of threads with a
# long list runs longer than its neighbours. And blocks have to be large enough for the tensor cores: 64 or 128 in practice, while 7.6
# wants them small. That is the real trade-off of block selection. (No GPU run is recorded for this kernel: bytes, no measured times.)
#
# ## Part 6 · In use
#
# ### 7.11 What you call on Monday
#
# `flex_attention` of PyTorch takes a function of indices, a `mask_mod`, and builds the block mask from it; compiled, it skips the blocks that
# are empty. It runs on a CPU as well.

# %%
import warnings

from torch.nn.attention.flex_attention import create_block_mask, flex_attention

def window_mod(batch, head, query, key):
    return (key <= query) & (query - key < 6)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # uncompiled, it says that it is slow
    flex_mask = create_block_mask(window_mod, 1, 1, 32, 32, device="cpu", BLOCK_SIZE=4)
    flex = flex_attention(*(torch.from_numpy(a)[None, None] for a in (q, k, v)),
                          block_mask=flex_mask)[0, 0].numpy()
mine = attention_numpy(q, k, v, sliding_window_mask(32, 32, 6))
print(f"first output of query 31: its {flex[31, 0]:.3f}, yours {mine[31, 0]:.3f}")
print(f"blocks left out: {flex_mask.sparsity():.0f} %, by window_blocks "
      f"{100 * (1 - window_blocks(32, 32, 6, 4).mean()):.0f} %")

# %% [markdown]
# |call|what to know|
# |---|---|
# |`flex_attention`|compile it; the block mask costs memory and is made once for a length|
# |`flash_attn_func(window_size=(left, right))`|left and right do not count the query itself|
# |`sliding_window` in a transformers configuration|counts the query; `layer_types` says which layers have it|
# |vLLM, SGLang|a window also frees pages of the cache; DSA models bring an indexer cache of their own|
#
# Mistral 7B had its window of 4,096 in *every* layer (arXiv 2310.06825). Read in default configurations of transformers 5.23.0 (2026-11-28): Gemma 3 has five window layers for one full layer, gpt-oss one for one with a window of
# 128 and a sink as a parameter, `deepseek_v32` an indexer with 64 heads of 128 that keeps 2,048 keys. Defaults of a class may differ from a published model.
#
# **Trap.** *"A sliding-window model forgets what lies before its window."* It cannot look there; what the layers carried on may still be known (7.2).
#
# ## What you can do now
#
# You can write any pattern as a mask, and say how far its layers reach. You can compute attention within blocks, choose the blocks, train an
# indexer that chooses keys, and test that nothing leaks. You can count the bytes that a block-sparse kernel does not read.

# %% tags=["slide"]
plotting.masks({"by distance": window_blocks(32, 32, 8, 4), "by hand": few,
                "by mean keys": chosen["by means, 3 blocks"],
                "by maximum": chosen["by the true maximum"]},
               title="Who decides? Distance, a person, a mean key, or the scores",
               rows="blocks of queries", columns="blocks of keys")
plotting.show("Four block masks of eight by eight: a band, a band with one block more, "
              "and two with a first column and chosen blocks.")

# %% [markdown]
# ## Exercises left
#
# 1. Train a copy with four layers of two keys, `train_copy([(0, 1), (0, 2), (0, 4), (0, 8)], seed=0)`: eight pairs a token. Where is its
#    cliff? (It asks for lags below `N_LAGS` = 18, in streams of `LENGTH` = 30: no cliff behind that would be seen.)
# 2. Give `select_blocks` the weights of the compressed branch instead of means: does NSA's own rule find the needle?
# 3. Let `window_mod` keep the first key as well, and compare the sparsity.
# 4. Train the indexer on layer 1 of MiniLM, and use it on layer 3. What is left?
#
# ## Glossary
#
# **block mask**: a boolean for each pair of a block of queries and a block of keys. **compressed key**: one vector that stands for a block of keys. **dilated**: a
# window with gaps. **global token**: sees all, seen by all. **indexer**: a small network that scores keys before attention. **local**: near in
# the text. **reach**: how far back anything can come from. **sink**: a key on which weight is parked.
#
# ## Sources
#
# Child et al. 2019 (Sparse Transformer, 1904.10509) · Kitaev et al. 2020 (Reformer, 2001.04451) · Beltagy et al. 2020 (2004.05150) · Zaheer et al. 2020 (2007.14062) ·
# Xiao et al. 2023 (StreamingLLM, 2309.17453) · Lu et al. 2025 (MoBA, 2502.13189) · Yuan et al. 2025 (NSA, 2502.11089) · Xu et al. 2025 (XAttention, 2503.16428) ·
# DeepSeek-AI 2025 (DeepSeek-V3.2-Exp report) · Dao et al. 2022 (block-sparse FlashAttention, 2205.14135, § 3.3).

# %% [markdown]
# ## Quiz

# %% [markdown] tags=["quiz"]
# **1.** A window of 16 (the query and the 15 keys before it), five layers, 200 tokens. Of how many tokens, itself included,
# can the last query know something?
#
# - a) 16
# - b) 80
# - c) 76
# - d) all 200

# %% tags=["quiz"]
from utils import quiz

known = int(reachable(sliding_window_mask(200, 200, 16), 5)[-1].sum())
quiz.answer({"a": 16, "b": 80, "c": 76, "d": 200}, known,
            "Each layer adds w - 1 keys, not w: 5 * 15, and the query itself.")

# %% [markdown] tags=["quiz"]
# **2.** A model was trained with `sliding_window=8` of transformers, and is causal. Which `window_size=(left, right)` of
# flash-attn serves it with the same mask?
#
# - a) (8, 0)
# - b) (9, 0)
# - c) (4, 4)
# - d) (7, 0)

# %% tags=["quiz"]
lag = np.arange(32)[:, None] - np.arange(32)
offered = {"a": (8, 0), "b": (9, 0), "c": (4, 4), "d": (7, 0)}
equal_masks = [(left, right) for left, right in offered.values() if np.array_equal(
    (lag <= left) & (-lag <= right), sliding_window_mask(32, 32, 8))]
quiz.answer(offered, equal_masks[0],
            "There left and right do not count the query; sliding_window does.")

# %% [markdown] tags=["quiz"]
# **3.** Each compressed key is the mean of 8 keys: that of block 0 of the keys 0 to 7, and so on. Which is the first query
# that may see the compressed key of block 2?
#
# - a) query 15
# - b) query 16
# - c) query 23
# - d) query 24

# %% tags=["quiz"]
in_block_2 = np.zeros((40, 1))
in_block_2[16:24] = 1  # the values: whoever sees block 2 gets more than 0
moved = compressed_attention(np.zeros((40, 4)), np.zeros((40, 4)), in_block_2, 8)
quiz.answer({"a": 15, "b": 16, "c": 23, "d": 24}, int(np.flatnonzero(moved)[0]),
            "Its last key is key 23: earlier queries would read their future.")

# %% [markdown] tags=["quiz"]
# **4.** In a block of 16 keys one has the product 32 with the query; the other 15 stand at right angles to it. What is the
# product of the query with the mean key?
#
# - a) 2
# - b) 8
# - c) 32
# - d) 0, the 15 hide it

# %% tags=["quiz"]
one_match = np.zeros((16, 4))
one_match[5, 0] = 32
quiz.answer({"a": 2, "b": 8, "c": 32, "d": 0}, one_match.mean(0) @ np.eye(4)[0],
            "A mean of 16 keeps a 16th of a lone key. A larger block keeps less.")

# %% [markdown] tags=["quiz"]
# **5.** A model with a lightning indexer reads the 2,048 best keys of each query. The text becomes twice as long, and still
# 2,048 are read. The number of index scores, without a mask, becomes ...
#
# - a) twice as large
# - b) four times as large
# - c) a little more than twice as large
# - d) no larger

# %% tags=["quiz"]
pairs_scored = [LightningIndexer(16, 2, 4)(torch.zeros(1, tokens, 16)).numel()
                for tokens in (32, 64)]
quiz.answer({"a": 2, "b": 4, "c": "n log n", "d": 1},
            pairs_scored[1] / pairs_scored[0],
            "What is read grows with n; the choice still looks at every pair.")

# %% [markdown]
# ## Going further
#
# Short sections, each alone, in any order. No later lecture needs them.

# %% [markdown]
# ### 7.12 Sparse Transformer: strided and fixed
#
# **How do two sparse layers see everything?** Child et al. 2019 (arXiv 1904.10509) take about $\sqrt n$ keys a query, such that any two
# positions are joined by two steps. *Strided*, with stride $l$: the last $l$ keys, and every $l$-th before. *Fixed*: the own block, and the last
# $c$ places of every block, which so become summaries.

# %% tags=["export"]
def strided_mask(n, stride):
    """Boolean (n, n), causal: the last `stride` keys and every stride-th one before.

    Raises ValueError for a stride below 1. Source: arXiv 1904.10509, § 4.3.
    """
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    back = np.arange(n)[:, None] - np.arange(n)
    return (back >= 0) & ((back < stride) | (back % stride == 0))

def fixed_mask(n, stride, summary=1):
    """Boolean (n, n), causal: the own block, and the last `summary` places of each.

    Raises ValueError unless 1 <= summary <= stride. Source: arXiv 1904.10509, § 4.3.
    """
    if not 1 <= summary <= stride:
        raise ValueError(f"summary must be from 1 to stride = {stride}, got {summary}")
    row, column = np.indices((n, n))
    same = row // stride == column // stride
    return (column <= row) & (same | (column % stride >= stride - summary))

# %%
triangle = causal_mask(64)
for name, pattern in (("strided", strided_mask(64, 8)), ("fixed", fixed_mask(64, 8)),
                      ("window 15", sliding_window_mask(64, 64, 15))):
    two = reachable(pattern, 2)[triangle].mean()
    print(f"{name:10s} at most {pattern.sum(1).max()} keys a row, two layers reach "
          f"{two:.0%}")

# %% [markdown]
# Both reach everything, a window of the same size seven tenths. In the paper the two halves of a pattern may be different heads or different layers. The text alone does not settle
# every detail of the published code (openai/sparse_attention, issue 7).
#
# ### 7.13 A ring is a window
#
# **Does a cache of $w$ slots compute the same as the mask?** Lecture 05's ring overwrites the oldest token.

# %%
from attention.kv_cache import RingKVCache

ring, rows_of_ring = RingKVCache(1, 1, 6, 16), []
for t in range(32):
    kept = ring.update(*(torch.from_numpy(a[None, None, t : t + 1]) for a in (k, v)))
    rows_of_ring.append(attention_numpy(q[t : t + 1], *(a[0, 0].numpy() for a in kept)))
by_mask = attention_numpy(q, k, v, sliding_window_mask(32, 32, 6))
apart = np.abs(np.concatenate(rows_of_ring) - by_mask).max()
print(f"query 31: ring {rows_of_ring[31][0, 0]:.3f}, mask {by_mask[31, 0]:.3f}; "
      f"largest difference {apart:.6f}; "
      f"{ring.k.shape[2]} slots for 32 tokens")

# %% [markdown]
# ### 7.14 Local and hard attention before the Transformer
#
# **Who decided in 2015?** Luong et al. (arXiv 1508.04025) had both kinds: *global* attention to all source words, and *local* attention to a
# window around a place that the network predicts, times a Gaussian (local-p).

# %%
from attention.fundamentals import local_weights

even = local_weights(np.zeros((1, 16)), centre=[6.5], window=4)
print("local-p, equal scores, centre 6.5, keys 3 to 10:", np.round(even[0, 3:11], 2))
print(f"they sum to {even.sum():.2f}: not normalised again, as in the paper")

# %% [markdown]
# The Gaussian lets a gradient reach the predicted place. **Hard attention** (Xu et al. 2015, arXiv 1502.03044) draws *one* place from the
# weights and reads only that. A draw has no gradient; REINFORCE estimates it: the reward times the gradient of the log-probability of what
# was drawn. *Predict:* is the estimate right on average? How far off is a single one?

# %%
scores_of_8 = np.linspace(-1, 1, 8)
chance = np.exp(scores_of_8) / np.exp(scores_of_8).sum()
reward = np.array([0, 0, 1, 0, 0, 3, 0, 1.0])
exact = chance * (reward - chance @ reward)  # soft attention's gradient
drawn = np.random.default_rng(0).choice(8, 20000, p=chance)
for name, baseline in (("REINFORCE", 0.0), ("with a baseline", chance @ reward)):
    each = (reward[drawn] - baseline)[:, None] * (np.eye(8)[drawn] - chance)
    single = np.sqrt(((each - exact) ** 2).sum(1).mean())
    bias = np.abs(each.mean(0) - exact).max()
    print(f"{name:16s} mean is off by {bias:.2f}, a single one by {single:.1f} "
          f"(gradient {np.linalg.norm(exact):.1f})")

# %% [markdown]
# Right on average, and a typical single one is off by more than twice the length of the gradient. That is why selection is trained by imitation (7.7) or left to
# scores that are computed anyway (7.6).
#
# ### 7.15 The other families, one number each
#
# **Who else decides?** Reformer (Kitaev et al. 2020, arXiv 2001.04451) lets *hashes* decide: vectors that point in similar directions fall into the same
# bucket (**LSH**, locality-sensitive hashing): the largest entry of $[xR; -xR]$ for a random $R$. Keys are queries, normalised.
#
# Of 512 vectors, the 8 nearest of each: how many fall into its bucket, in one of some rounds?

# %%
from attention.experiments.sparse import lsh_recall

print("rounds   true top 8 found   pairs compared")
for n_rounds in (1, 2, 4, 8):
    recall_of_lsh, compared = lsh_recall(n_rounds)
    print(f"{n_rounds:6d}   {recall_of_lsh:16.2f}   {compared:14.2f}")

# %% [markdown]
# More rounds find more, and compare more. The others, with between a sixteenth and a good quarter of the scores of 256 tokens in 16 clusters; error of the output,
# relative to its size:

# %%
some_rng = np.random.default_rng(1)
centres = 1.5 * some_rng.standard_normal((16, 32))
asked, held = some_rng.integers(16, size=(2, 256))  # clusters of queries and of keys
asks, keys = (centres[c] + 0.3 * some_rng.standard_normal((256, 32))
              for c in (asked, held))
values = centres[held] @ some_rng.standard_normal((32, 8))
dense_out = attention_numpy(asks, keys, values)
high, wide = np.divmod(np.arange(256), 16)  # tokens as an image of 16 by 16
close = (abs(high[:, None] - high) <= 2) & (abs(wide[:, None] - wide) <= 2)
pool = np.kron(np.eye(32), np.full((1, 8), 1 / 8))  # the mean of 8 neighbours
q_marks, k_marks = pool @ asks, pool @ keys
families = {
    "window of 33": attention_numpy(asks, keys, values, longformer_mask(256, 32)),
    "neighbourhood 5 × 5": attention_numpy(asks, keys, values, close),
    "clusters (Routing)": attention_numpy(asks, keys, values, asked[:, None] == held),
    "pooled to 32 (Linformer)": attention_numpy(asks, pool @ keys, pool @ values),
    "Nyström, 32 landmarks": (attention_weights(asks, k_marks)
                              @ np.linalg.pinv(attention_weights(q_marks, k_marks), 0.1)
                              @ attention_numpy(q_marks, keys, values)),
}
for name, result in families.items():
    off = np.linalg.norm(result - dense_out) / np.linalg.norm(dense_out)
    print(f"{name:25s} error {off:.1f}")

# %% [markdown]
# Clusters win because these queries look for clusters, and nothing here is local or smooth. Each family wins on data of its own kind; such numbers say which kind yours is. *Neighbourhood* attention (Hassani et al. 2022, arXiv 2204.07143) is the window of images; *Routing* (Roy et al. 2020, arXiv 2003.05997)
# learns the clusters, here they are given; *Linformer* (Wang et al. 2020, arXiv 2006.04768) learns the projection, here a mean; *Nyström* (Xiong et al. 2021,
# arXiv 2102.03902). *Graph* attention takes the mask from a graph: lecture 13.
#
# ### 7.16 Where the cost of DSA goes
#
# **Is DSA linear?** Multiplications a query, from the defaults of transformers' `DeepseekV32Config`: an indexer of 64 heads of 128 over all $n$ keys, and a
# core of 128 heads of 576 + 512 over 2,048.

# %%
print("  tokens   dense / DSA   indexer's share")
for n in (4096, 32768, 131072, 1048576):
    dense_cost = n * 128 * (576 + 512)
    index_cost, core_cost = n * 64 * 128, min(n, 2048) * 128 * (576 + 512)
    whole_cost = index_cost + core_cost
    print(f"{n:8,} {dense_cost / whole_cost:11.1f}   {index_cost / whole_cost:15.2f}")
print(f"indexer = core at {2048 * 128 * (576 + 512) // (64 * 128):,} tokens")

# %% [markdown]
# The square stays, seventeen times smaller: past 35,000 tokens most of the work is choosing. One more trap: the published indexer rotates *half-split* pairs,
# the latent attention beside it *interleaved* ones (lecture 03). Ports had it wrong at first (sgl-project/sglang, pull request 13495): shapes agree, the chosen keys do not.
#
# ### 7.17 XAttention: antidiagonals
#
# **Why diagonals that run the other way?** An antidiagonal of a block crosses every row and every column of it, so it meets each
# vertical line (one key that all look at) and each slash (keys at one distance). The rules of section 7.9:

# %%
import inspect

from attention.experiments.sparse import block_scores

print(inspect.getsource(block_scores))

# %%
row8, column8 = np.indices((8, 8))
sampled = (row8 + column8) % 8 == 7  # one antidiagonal of a block of 8
for distance in (23, 24):
    lines = np.full((64, 64), -4.0)
    lines[:, 21] = 4.0  # a vertical line
    lines[np.arange(distance, 64), np.arange(64 - distance)] = 4.0  # a slash
    inside = np.exp(lines).reshape(8, 8, 8, 8).swapaxes(1, 2)  # block, block, 8, 8
    high = inside.max((2, 3)) > 1  # blocks with a part of a line
    seen_by_it = (inside * sampled).max((2, 3)) > 1
    print(f"slash at distance {distance}: {high.sum()} blocks have a line, the "
          f"antidiagonal meets it in {(high & seen_by_it).sum()}")

# %% [markdown]
# The 8 blocks of the vertical line are met always; the slash in every block where its distance is odd, and in none where it is even:
# there $r - c$ is even, so $r + c$ is too, and the antidiagonal has $r + c = 7$. In 7.9 the rule did as well as all scores.

# %% [markdown]
# ### 7.18 Compressed sparse attention
#
# **Compress first, or choose first?** DeepSeek-V4's *compressed sparse attention* (class `deepseek_v4` of transformers 5.23) does both: keys are compressed by $m=4$, an
# indexer chooses among the *compressed* ones, and a window of raw keys stands beside them in the same softmax.

# %%
def compressed_sparse(q, k, v, m, n_keep, window):
    """One softmax over the best n_keep compressed keys and a window of raw ones."""
    n = len(q)
    k_blocks, v_blocks = (a[: n // m * m].reshape(n // m, m, -1).mean(1)
                          for a in (k, v))
    visible = np.arange(n // m) < ((np.arange(n) + 1) // m)[:, None]
    index = np.where(visible, q @ k_blocks.T, -np.inf)
    place = np.argsort(np.argsort(-index, axis=1), axis=1)
    mask = np.concatenate([visible & (place < n_keep), sliding_window_mask(n, n, window)
                           if window else np.zeros((n, n), bool)], axis=1)
    k_both, v_both = np.concatenate([k_blocks, k]), np.concatenate([v_blocks, v])
    return attention_numpy(q, k_both, v_both, mask)

for m, n_keep, window in ((4, 2, 4), (4, 8, 8), (1, 32, 0)):
    got = compressed_sparse(q, k, v, m, n_keep, window)
    print(f"m = {m}, {n_keep:2d} kept, window {window}: {got[31, 0]:+.2f}; largest "
          f"difference to attention {np.abs(got - out).max():.2f}")

# %% [markdown]
# With $m=1$, all kept and no window it is causal attention. (The published layer also rotates, normalises and weights inside a block with a learned softmax. One vector is key
# *and* value there, so values are rotated too, and the output is turned back by the query's position.)
#
# Its other half is *heavily compressed attention*: blocks of 128, all of them read. *Predict.* What part of V3.2's cache does V4 keep for a token?

# %%
from transformers import DeepseekV4Config, DeepseekV32Config

v4, v32 = DeepseekV4Config(), DeepseekV32Config()
lightly, heavily = (v4.layer_types.count(f"{kind}_attention")
                    for kind in ("compressed_sparse", "heavily_compressed"))
rates = [v4.compress_rates[f"{kind}_attention"]
         for kind in ("compressed_sparse", "heavily_compressed")]
a_token = (lightly * (v4.head_dim + v4.index_head_dim) / rates[0]
           + heavily * v4.head_dim / rates[1])
before = v32.num_hidden_layers * (v32.kv_lora_rank + v32.qk_rope_head_dim
                                  + v32.index_head_dim)
print(f"{lightly} layers with blocks of {rates[0]}, {heavily} with blocks of "
      f"{rates[1]}, windows of {v4.sliding_window}")
print(f"numbers a token: {a_token:,.0f} and {before:,}: {a_token / before:.1%}")

# %% [markdown]
# From the defaults of both classes, read in transformers 5.23.0; the windows of 128 tokens, which do not grow, come on top.
#
# ### 7.19 Sinks beside windows
#
# **What if the sink is a parameter?** gpt-oss gives each head one number, a score that takes part in the softmax and has no value. A head with
# nothing to say parks its weight there, and a window cannot lose it. With the log-sum-exp of lecture 06 it is one factor: the output times $\sigma(\text{lse}-\text{sink})$.

# %%
from attention.flash import flash_attention_numpy

plain, lse = flash_attention_numpy(q, k, v, causal=True)
for sink in (-10.0, 0.0, 4.0):
    with_sink = plain / (1 + np.exp(sink - lse))[:, None]
    k_sink, v_sink = (np.vstack([np.zeros((1, 16)), a]) for a in (k, v))
    logits = q @ k_sink.T / 4 + np.eye(1, 33) * sink
    powers = np.exp(logits) * np.hstack([np.ones((32, 1)), causal_mask(32)])
    longhand = powers / powers.sum(1, keepdims=True) @ v_sink
    print(f"sink {sink:5.1f}: query 31 {with_sink[31, 0]:+.2f}, as one key more "
          f"{longhand[31, 0]:+.2f}")

# %% [markdown]
# A sink at $-10$ changes nothing, one at 4 takes some four tenths of query 31's weight. It is a gate on the output, driven by how much the head found: lecture 11 has
# more of these.

# %% [markdown]
# ### 7.20 Global tokens with projections of their own
#
# **Does a global token ask the questions that all ask?** Longformer (7.4) gives global attention its *own* projections: for the rows of global
# tokens $Q_g, K_g, V_g$ take the place of $Q_s, K_s, V_s$ (§ 3.1), for the keys and values as well.
#
# *Predict.* Which rows change when the projections are shared?

# %% tags=["export"]
def longformer_attention(local, globals_, window, global_tokens):
    """Longformer's attention: global rows have projections of their own, in NumPy.

    local, globals_: (q, k, v), (..., n, d_head) each; window even; global_tokens ints.
    Local rows see the window and the global tokens through `local`; global rows see
    everything through `globals_`. Returns (..., n, d_head).
    Source: Beltagy et al. 2020 (arXiv 2004.05150), § 3.1.
    """
    tokens = list(global_tokens)
    out = attention_numpy(*local, longformer_mask(local[0].shape[-2], window, tokens))
    q, k, v = globals_
    out[..., tokens, :] = attention_numpy(q[..., tokens, :], k, v)
    return out

# %%
other = [rng.standard_normal((32, 16)) for _ in range(3)]
own = longformer_attention((q, k, v), other, 6, [0])
shared = longformer_attention((q, k, v), (q, k, v), 6, [0])
print("rows that change when the projections are shared:",
      np.flatnonzero(np.abs(own - shared).max(-1)))
print(f"by as much as {np.abs(own - shared).max():.1f}")

# %% [markdown]
# Only the global row; but it is the one a classifier reads. (With copied weights this equals transformers'
# `LongformerSelfAttention`: a test of the course. It has local rows look at global keys through the *local* projections. Its `BigBird` draws random blocks in
# training only: in evaluation mode they all are block 0, which so counts once more, and short texts get full attention. Two more tests.)


# %% [markdown]
# ## Behind the scenes
#
# What the lecture imports and does not show: checks, the PyTorch loop, the kernels' launchers, the experiments.

# %% tags=["plumbing"]
from attention.fundamentals import attention_torch

# %% tags=["export", "plumbing"]
@cuda.skip_unseen
def block_sparse_attention_torch(q, k, v, block_mask, block_size, causal=False, scale=None):
    """Attention within the blocks that are there, in PyTorch; arguments and errors as block_sparse_attention_numpy.

    Differentiable in q, k and v; a key that is not read gets the gradient 0. Returns (..., n_queries, d_v) in the type of q.
    """
    check_arguments(q, k, v)
    cuda.check_kind(torch.Tensor, q=q, k=k, v=v)
    n_queries, n_keys, lead = q.shape[-2], k.shape[-2], leading_axes(q, k, v)
    check_block_mask(block_mask, block_size, lead, n_queries, n_keys)
    q, k, v = (t if t.is_floating_point() else t.double() for t in (q, k, v))
    q, k, v = (t.expand(*lead, *t.shape[-2:]) for t in (q, k, v))
    if not math.prod(lead) * n_queries:
        return attention_torch(q, k, v, causal=causal, scale=scale)
    there = block_mask.cpu().numpy() if isinstance(block_mask, torch.Tensor) else np.asarray(block_mask)
    there = np.broadcast_to(there, (*lead, *there.shape[-2:]))
    heads = []
    for place in np.ndindex(lead):
        parts = []
        for a in range(there.shape[-2]):
            rows = torch.arange(a * block_size, min((a + 1) * block_size, n_queries), device=q.device)
            keys = np.flatnonzero(np.repeat(there[place][a], block_size)[:n_keys])
            columns = torch.from_numpy(keys).to(q.device)
            mask = columns <= rows[:, None] + n_keys - n_queries if causal else None
            parts.append(attention_torch(q[place][rows], k[place][columns], v[place][columns], mask, scale=scale))
        heads.append(torch.cat(parts))
    return torch.stack(heads).reshape(*lead, n_queries, v.shape[-1])

# %% tags=["export", "plumbing"]
SPARSE_TILE = r"""
// One tile of keys, first to end - 1, as in lecture 06. A window counts the query itself.
template <int D, int R, int C, int G>
__device__ void attend_tile(const float4* q_tile, const float4* k_tile, const float4* v_tile,
                            float* p_rows, float (&maximum)[R], float (&total)[R],
                            float4 (&sum)[R][G], int first_query, int first, int end,
                            int n_queries, int n_keys, int causal, int window, float scale) {
  const int P_STRIDE = C * TILE + (C % 2 == 0 ? 16 : 0);
  float s[R][C] = {};
  score<D>(s, q_tile, k_tile);
  for (int r = 0; r < R; ++r) {
    int i = first_query + threadIdx.y + TILE * r;
    for (int c = 0; c < C; ++c) {
      int j = first + threadIdx.x + TILE * c;
      bool near = j < end && j > i + n_keys - n_queries - window;
      bool seen = near && may_attend(i, j, n_queries, n_keys, causal);
      s[r][c] = seen ? scale * s[r][c] : -INFINITY;
    }
    float factor = rescale(s[r], p_rows + TILE * r * P_STRIDE, maximum[r], total[r]);
    for (int g = 0; g < G; ++g) sum[r][g] = times(factor, sum[r][g]);
  }
  __syncwarp();                                          // the weights of a row are there
  accumulate<D>(sum, p_rows, P_STRIDE, v_tile, C * TILE);
}
// The rows of this block of threads that stand before `end`, divided by the sums of their weights.
template <int R, int G>
__device__ void write_rows(float* out, const float4 (&sum)[R][G], const float (&total)[R],
                           int first, int end, int d) {
  for (int r = 0; r < R; ++r) {
    int i = first + threadIdx.y + TILE * r;
    float all = row_sum(total[r]);
    float share = all == 0.0f ? 0.0f : 1.0f / all;       // nothing to attend to: zeros
    for (int g = 0; g < G; ++g) {
      int c = 4 * (threadIdx.x + TILE * g);
      if (i < end) store_chunk(out + (size_t)i * d + c, d - c, d, times(share, sum[r][g]));
    }
  }
}
"""

# %% tags=["export", "plumbing"]
BLOCK_SPARSE_HALF = r"""
template <int D, int BQ, int BK>                         // d in steps of 16; rows of a tile
__global__ void block_sparse_half(const element* q, const element* k, const element* v,
                                  const int* starts, const int* blocks, element* out,
                                  int n_queries, int n_keys, int d, int block_size, int causal,
                                  int window, float scale) {
  extern __shared__ __align__(128) float o_tile[];
  int own = threadIdx.x / 32 * 16;                       // the first row of this warp
  int row = own + threadIdx.x % 32 / 2;                  // two lanes a row
  int odd = threadIdx.x % 2;
  float* s_tile = o_tile + BQ * (D + 4);
  float* o_row = o_tile + row * (D + 4);
  float* s_row = s_tile + row * (BK + 4);
  element* q_tile = (element*)(s_tile + BQ * (BK + 4));
  element* k_tile = q_tile + BQ * (D + 8);
  element* v_tile = k_tile + BK * (D + 8);
  element* p_tile = v_tile + BK * (D + 8);
  int tiles = (block_size + BQ - 1) / BQ;
  int mask_row = blockIdx.y / tiles;
  int first_query = mask_row * block_size + blockIdx.y % tiles * BQ;
  int end_query = min(min(first_query + BQ, (mask_row + 1) * block_size), n_queries);
  if (first_query >= end_query) return;
  size_t head = blockIdx.x;
  size_t list = head * (gridDim.y / tiles) + mask_row;
  int visible = visible_keys(end_query, n_queries, n_keys, causal);
  load_half<D>(q_tile, BQ, q + head * n_queries * d, first_query, end_query, d);
  for (int c = odd; c < D; c += 2) o_row[c] = 0.0f;
  float maximum = -INFINITY;
  float total = 0.0f;
  int i = first_query + row;
  int last = starts[list + 1];
  for (int b = starts[list]; b < last; ++b) {
    int block = blocks[b];
    int end = min((block + 1) * block_size, visible);
    for (int first = block * block_size; first < end; first += BK) {
      __syncthreads();
      load_half<D>(k_tile, BK, k + head * n_keys * d, first, end, d);
      load_half<D>(v_tile, BK, v + head * n_keys * d, first, end, d);
      __syncthreads();
      score_half<D, BK>(s_tile + own * (BK + 4), q_tile + own * (D + 8), k_tile);
      __syncwarp();
      for (int c = odd; c < BK; c += 2) {
        int j = first + c;
        bool near = j < end && j > i + n_keys - n_queries - window;
        bool seen = near && may_attend(i, j, n_queries, n_keys, causal);
        s_row[c] = seen ? scale * s_row[c] : -INFINITY;
      }
      rescale_half<D, BK>(s_row, p_tile + row * (BK + 8), o_row, maximum, total);
      __syncwarp();
      accumulate_half<D, BK>(o_tile + own * (D + 4), p_tile + own * (BK + 8), v_tile);
    }
  }
  __syncwarp();
  total += __shfl_xor_sync(0xffffffff, total, 1);
  float share = total == 0.0f ? 0.0f : 1.0f / total;
  write_half(out + (head * n_queries + first_query + own) * d, o_tile + own * (D + 4), D + 4, share,
             end_query - first_query - own, d);
}
"""

# %% tags=["plumbing"]
import functools

from attention.flash import (CHUNKS, FLASH_HEAD, HALF_ROWS, HALF_TILES, REGISTER_STEPS, SWIZZLE, as_heads,
                             registers_bytes, tensor_cores_bytes, tile_sizes)

# %% tags=["export", "plumbing"]
def block_lists(block_mask, lead, device):
    """A block mask as lists: starts (heads * query blocks + 1,) and blocks, both int32 tensors on the device."""
    mask = block_mask if isinstance(block_mask, torch.Tensor) else torch.from_numpy(np.array(block_mask))
    n_rows, n_columns = mask.shape[-2:]
    rows = mask.to(device).expand(*lead, n_rows, n_columns).reshape(math.prod(lead) * n_rows, n_columns)
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32, device=device)
    starts[1:] = rows.sum(-1).cumsum(0)
    blocks = rows.nonzero()[:, 1].int()
    return starts, blocks if len(blocks) else starts[:1]                        # a kernel's array holds at least one

@functools.cache
def block_sparse_kernel(rung, *template):
    """The kernel for a type, compiled on first use: "registers" for single precision, "half" or "bfloat16"."""
    if rung == "registers":
        return cuda.compile(FLASH_HEAD + SWIZZLE + CHUNKS + REGISTER_STEPS + SPARSE_TILE + BLOCK_SPARSE,
                            name="block_sparse", template=template)
    if rung == "half":
        return cuda.compile(FLASH_HEAD + HALF_TILES + HALF_ROWS + BLOCK_SPARSE_HALF, name="block_sparse_half",
                            template=template)
    return cuda.compile(FLASH_HEAD + HALF_TILES.replace("typedef half", "typedef __nv_bfloat16") + HALF_ROWS
                        + BLOCK_SPARSE_HALF, name="block_sparse_half", template=template)

def block_sparse_launch(q, k, v, block_mask, block_size, causal=False, scale=None, window=None):
    """What launches the kernel: kernel, (grid, block, shared bytes), arguments, and the leading axes of the output.

    Arguments as in block_sparse_attention_cuda; window: a query sees so many keys, itself included, None for all. The
    sixth argument is the output, tensors (heads, n_queries, d), to be written.
    """
    check_arguments(q, k, v)
    lead, n_queries, n_keys = leading_axes(q, k, v), q.shape[-2], k.shape[-2]
    check_block_mask(block_mask, block_size, lead, n_queries, n_keys)
    block_size = min(int(block_size), max(n_queries, n_keys, 1))                # larger ones are one block too
    name = str(cuda.float_type(q)).removeprefix("torch.")
    rung, dtype, step, needs = {
        "float16": ("half", torch.float16, 16, tensor_cores_bytes),
        "bfloat16": ("bfloat16", torch.bfloat16, 16, tensor_cores_bytes),
    }.get(name, ("registers", torch.float32, 32, registers_bytes))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    (q, k, v), lead = as_heads((q, k, v), dtype)
    n_heads, d = len(q), q.shape[-1]
    width = step * math.ceil(d / step)
    needs = functools.partial(needs, width)
    rows, keys = tile_sizes(min(block_size, 64), min(block_size, 64), needs)
    starts, blocks = block_lists(block_mask, lead, q.device)
    grid = n_heads, math.ceil(n_queries / block_size) * math.ceil(block_size / rows)
    block = (16, 16) if rung == "registers" else 2 * rows
    window = n_queries + n_keys if window is None else int(window)
    arguments = (q, k, v, starts, blocks, torch.zeros_like(q), n_queries, n_keys, d, block_size, int(causal), window,
                 scale)
    return block_sparse_kernel(rung, width, rows, keys), (grid, block, needs(rows, keys)), arguments, lead

# %% tags=["export", "plumbing"]
@cuda.skip_unseen
def block_sparse_attention_cuda(q, k, v, block_mask, block_size, causal=False, scale=None):
    """Attention within the blocks that are there, as a CUDA kernel; arguments as block_sparse_attention_numpy.

    q (..., n_queries, d), k (..., n_keys, d), v (..., n_keys, d_v), leading axes broadcast; block_mask boolean
    (n_query_blocks, n_key_blocks), True = the block is there, with leading axes of q, k and v before it or without;
    causal is aligned at the bottom right; scale defaults to 1/sqrt(d). Keys and values of an absent block are not read.
    NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU. Half precision and bfloat16 use tensor cores
    and sum in single precision; other types are computed in single. Returns (..., n_queries, d_v) in the kind and type
    of q; a query with nothing to attend to gets zeros. Not differentiable. d up to 1,184, on sm_80 864, on sm_120 512.
    Raises ValueError when shapes, mask or block size do not fit. Source: Dao et al. 2022 (arXiv 2205.14135), § 3.3.
    """
    kernel, launch, arguments, lead = block_sparse_launch(q, k, v, block_mask, block_size, causal, scale)
    out = arguments[5]
    if out.numel() and k.shape[-2]:
        kernel.fast[launch](*arguments)
    return cuda.like(out[..., :v.shape[-1]].reshape(*lead, q.shape[-2], v.shape[-1]), q)

def window_blocks(n_queries, n_keys, window, block_size):
    """The blocks that a causal window touches: boolean (n_query_blocks, n_key_blocks). The window counts the query."""
    first = np.arange(0, n_queries, block_size)[:, None] + n_keys - n_queries   # the key that the first query sees last
    last = np.minimum(first + block_size, n_keys) - 1
    begin = np.arange(0, n_keys, block_size)
    return (begin <= last) & (begin + block_size - 1 > first - window)

@cuda.skip_unseen
def sliding_window_attention_cuda(q, k, v, window, scale=None):
    """Causal attention in which a query sees `window` keys, itself included; blocks of 64 before them are not read.

    Arrays, types, results and limits as in block_sparse_attention_cuda. Raises ValueError when shapes do not fit or the
    window is no positive whole number.
    """
    if not isinstance(window, (int, np.integer)) or isinstance(window, bool) or window < 1:
        raise ValueError(f"window must be a positive whole number, got {window!r}")
    check_arguments(q, k, v)
    there = window_blocks(q.shape[-2], k.shape[-2], window, 64)
    kernel, launch, arguments, lead = block_sparse_launch(q, k, v, there, 64, True, scale, window)
    if arguments[5].numel() and k.shape[-2]:
        kernel.fast[launch](*arguments)
    return cuda.like(arguments[5][..., :v.shape[-1]].reshape(*lead, q.shape[-2], v.shape[-1]), q)

# %% tags=["export", "plumbing"]
def block_sparse_bytes(block_mask, block_size, n_queries, n_keys, d, causal=False, tile=64, itemsize=4):
    """Bytes of q, k and v that the kernel asks for, one head: (loaded, stored), exactly.

    block_mask boolean (n_query_blocks, n_key_blocks); tile: the most queries that share a tile of keys, a multiple of
    16. Every query row is read once; a key row once for each tile of queries whose list has its block.
    """
    keys = 0
    for row, column in np.argwhere(block_mask):
        for first in range(row * block_size, min((row + 1) * block_size, n_queries), tile):
            end_query = min(first + tile, (row + 1) * block_size, n_queries)
            visible = max(0, end_query + n_keys - n_queries) if causal else n_keys
            keys += max(0, min((column + 1) * block_size, visible) - column * block_size)
    return itemsize * d * (n_queries + 2 * keys), itemsize * d * n_queries

# %% [markdown]
# The experiments: a copy through windows, needles in blocks, weights of MiniLM, rules for blocks, hashes.

# %% tags=["export", "plumbing"]
N_SYMBOLS, N_LAGS, LENGTH = 4, 18, 30

class OffsetLayer(nn.Module):
    """One attention layer in which token t reads tokens t - offset, with a learned bias for each head and offset."""

    def __init__(self, d_model, n_heads, offsets):
        super().__init__()
        self.n_heads = n_heads
        self.register_buffer("offsets", torch.tensor(offsets))
        self.norm = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.bias = nn.Parameter(torch.linspace(-1, 1, n_heads * len(offsets)).view(n_heads, 1, len(offsets)))

    def forward(self, x):
        """x (batch, n, d_model) to the same shape; only the offsets' keys are scored, n * len(offsets) of them."""
        batch, n, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, n, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        source = torch.arange(n)[:, None] - self.offsets
        k, v = (a[:, :, source.clamp(min=0)] for a in (k, v))                   # (batch, heads, n, offsets, d_head)
        scores = (q[..., None, :] @ k.mT)[..., 0, :] * q.shape[-1] ** -0.5 + self.bias
        p = torch.softmax(scores.masked_fill(source < 0, -math.inf), dim=-1)
        return x + self.out((p[..., None, :] @ v)[..., 0, :].transpose(1, 2).reshape(batch, n, d))

class WindowedCopy(nn.Module):
    """Symbols (batch, n) -> logits (batch, n, N_LAGS, N_SYMBOLS): which symbol was k steps back? A layer for each tuple."""

    def __init__(self, layers, d_model=72):
        super().__init__()
        self.embedding = nn.Embedding(N_SYMBOLS, d_model)
        self.layers = nn.Sequential(*(OffsetLayer(d_model, 12, tuple(offsets)) for offsets in layers))
        self.norm, self.out = nn.LayerNorm(d_model), nn.Linear(d_model, N_LAGS * N_SYMBOLS)

    def forward(self, x):
        return self.out(self.norm(self.layers(self.embedding(x)))).unflatten(-1, (N_LAGS, N_SYMBOLS))

def copies(x):
    """What is right: for symbols (batch, n) the symbol k steps before each place from N_LAGS on, (batch, n - N_LAGS, N_LAGS)."""
    return torch.stack([x[:, N_LAGS - k : x.shape[1] - k] for k in range(N_LAGS)], dim=-1)

def copy_loss(model, x):
    """Cross-entropy over all lags, for `training.fit`."""
    return nn.functional.cross_entropy(model(x)[:, N_LAGS:].flatten(0, 2), copies(x).flatten())

def train_copy(layers, seed, steps=80):
    """A WindowedCopy, trained; layers: the offsets of each layer."""
    model = training.initialise(WindowedCopy(layers).double(), seed)
    for layer in model.layers:
        drawn = np.random.default_rng(seed + 1).standard_normal(layer.bias.shape)
        layer.bias.data = torch.from_numpy(drawn)
    rng = np.random.default_rng(seed)
    streams = (torch.from_numpy(rng.integers(N_SYMBOLS, size=(24, LENGTH))) for _ in range(steps))
    training.fit(model, streams, copy_loss, steps, lr=1e-2)
    return model

@torch.no_grad()
def copy_accuracy(model):
    """Share of right answers for each lag, (N_LAGS,), on streams that were not trained on."""
    x = torch.from_numpy(np.random.default_rng(999).integers(N_SYMBOLS, size=(64, LENGTH)))
    return (model(x)[:, N_LAGS:].argmax(-1) == copies(x)).double().mean((0, 1)).numpy()

# %% tags=["export", "plumbing"]
def needle_recall(block, d, together=1, n=2048, tries=400):
    """How often the block of a needle is in the best eighth by mean keys, over random keys and queries.

    The needle: `together` neighbouring keys that hold half of the query on top of their noise.
    """
    rng = np.random.default_rng(block + d + together)
    hits = 0
    for _ in range(tries):
        query = rng.standard_normal(d)
        means = rng.standard_normal((n // block, d)) / math.sqrt(block)         # of `block` keys each
        means[0] += together * 0.5 * query / block
        hits += (means[1:] @ query > means[0] @ query).sum() < n // block // 8
    return hits / tries

@torch.no_grad()
def minilm_chunks(layer, n_tokens=64, count=40):
    """What enters a layer of MiniLM on pieces of this course, x (count, n, 384), and the mean weights of its heads, p."""
    from utils import data

    model, tokenizer = data.minilm()
    ids = tokenizer.encode(data.course_prose()[:20000], add_special_tokens=False, verbose=False)
    pieces = torch.tensor(ids[: n_tokens * count]).view(count, n_tokens)
    found = model(input_ids=pieces, output_attentions=True, output_hidden_states=True)
    p = found.attentions[layer].double().mean(1)
    return found.hidden_states[layer].double(), p / p.sum(-1, keepdim=True)

@torch.no_grad()
def share_of_mass(scores, p, n_keep=8):
    """The share of the weights p (batch, n, n) on the n_keep keys of each row with the largest scores."""
    return float(p.gather(-1, scores.topk(n_keep, dim=-1).indices).sum(-1).mean())

def block_scores(rule, q, k, logits, size=32):
    """Scores of blocks (heads, blocks, blocks) by one of five rules.

    logits: q k^T / sqrt(d), with -inf for the future.
    """
    heads, n = logits.shape[1], logits.shape[-1] // size
    tiles = logits[0].view(heads, n, size, n, size).transpose(2, 3)
    if rule == "true mass":
        return torch.softmax(logits[0], -1).view(heads, n, size, n, size).sum((2, 4))
    if rule == "antidiagonals":
        row, column = torch.arange(size)[:, None], torch.arange(size)
        return tiles[..., (row + column) % 8 == 7].logsumexp(-1)
    if rule == "mean keys":
        q, k = (a[0].view(heads, n, size, -1).mean(2) for a in (q, k))
        return q @ k.mT
    if rule == "nearest":
        return torch.arange(n).expand(heads, n, n)
    return torch.from_numpy(np.random.default_rng(n).random((heads, n, n)))

def lsh_recall(n_rounds, n=512, d=32, n_buckets=16, n_best=8):
    """Share of each vector's n_best nearest that share its bucket in some round, and the share of pairs that do."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((32, d))[rng.integers(32, size=n)] + 0.7 * rng.standard_normal((n, d))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    near = points @ points.T
    np.fill_diagonal(near, -np.inf)
    best = np.argsort(-near, axis=1)[:, :n_best]
    together = np.zeros((n, n), bool)
    for _ in range(n_rounds):
        turned = points @ rng.standard_normal((d, n_buckets // 2))
        bucket = np.concatenate([turned, -turned], axis=1).argmax(1)
        together |= bucket[:, None] == bucket
    return np.take_along_axis(together, best, axis=1).mean(), together.mean()
