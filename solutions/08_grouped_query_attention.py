# ---
# jupyter:
#   course:
#     edition: 2
#     experiments:
#     - characters
#     - batches
#     - grouped_lm
#     - train_grouped
#     - held_out_loss
#     - convert
#     - caches_of
#     - merged_layer
#     - with_layers
#     module: grouped_query
#     public:
#     - grouped_query_attention_numpy
#     - grouped_query_attention_torch
#     - grouped_query_attention_cuda
#     - GroupedQueryAttention
#     - merge_kv_heads
#     - aligned_merge
#     - cache_per_device
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["slide"]
# # Lecture 08 · Grouped-query attention
#
# **The question.** Why does a query not need keys of its own? **You will be able to** *write* attention whose query heads
# share keys without a copy (8A, 8D), *find* a cache that holds copies (8B), *merge* the heads of a trained model and
# *train* them on (8C, 8E), *read* each key once on a GPU (8F), *count* a cache on eight devices (8G).
# **You need** modules and training steps (lecture 01), heads (lecture 02), the KV cache (lecture 05).
#
# | part or section | core minutes | more minutes |
# |---|---|---|
# | Part 1 · the question: 8.1 | 15 | |
# | Part 2 · NumPy: 8.2, 8.3, exercises 8A, 8B, 8C | 73 | |
# | Part 3 · PyTorch: 8.4, exercises 8D, 8E | 53 | |
# | Part 4 · CUDA: 8.5 | 24 | |
# | Part 5 · does it matter: 8.6, 8.7 | 15 | |
# | Another day: exercise 8F | | 25 |
# | Going further: 8.8 to 8.11, exercise 8G | | 45 |
# | **together** | **180** | **70** |

# %% [markdown] tags=["teacher"]
# **For the teacher: two times 50 minutes.** Run everything before class.
#
# - *Hour 1 (40).* 8.1: the table, then ask for the length at which the cache outgrows the weights (9) · 8.2: loop, einsum,
#   flow figure, both ends (13) · 8.3: who shares with whom, what the model says with `repeat` (9) · 8.3: the cache after the
#   repeat (5) · say what 8A and 8B ask (4).
# - *At home after hour 1.* 8A, 8B. For volunteers 8C.
# - *Hour 2 (40).* 8.3: the rotated heads, bars on the board (8) · 8.4: the contract of 8D, three losses, the curve of
#   uptraining, the real model merged (15) · 8.5: which of five ways copies, guess first; the kernel's factor (11) · 8.6:
#   the roofline (6).
# - *At home after hour 2.* 8D, 8E. For volunteers 8F.
# - *Board.* $o_h=\text{attention}(q_h,\,k_{\lfloor h/g\rfloor},\,v_{\lfloor h/g\rfloor})$, nine queries above three keys.
# - *Always works.* In 8.3 let the class choose which of the two repeats SmolLM2 gets, and read aloud what it writes.
# - *Checkpoint 1.* Which key head does query head 5 of 9 on 3 ask, and which one with `repeat`? (1, and 2.)
#   *Checkpoint 2.* Does grouping make the score matrix smaller? (No: as many query heads, as many rows.)
# - *Skip first.* The ladder in 8.5 (4), then the devices in 8.6 (3): both read well at home.
# - *Questions that come.* Why not always one key head? Eight devices hold eight heads anyway (8.6), and quality (8.4). Does
#   grouping speed up the prompt? Hardly: there the keys are read once for many queries.

# %%
import math
import os
import sys

sys.path.insert(0, "." if os.path.exists("course.py") else "..")

import numpy as np
import torch
from torch import nn

from utils import data, plotting, training
from utils.check import check

torch.set_num_threads(1)  # tiny models: one thread is fastest

# %% [markdown]
# ## Part 1 · The question
#
# ### 8.1 Memory scaling problems
#
# **What does a model read to write one token?** Its weights, and all keys and values kept (lecture 05): $2 \cdot \text{layers} \cdot \text{key heads} \cdot d_\text{head}$ numbers a token.
#
# *Predict.* Llama 3 70B: 80 layers, 64 heads of 128, 8 texts of 1,000 tokens, two bytes each: how many GB?

# %% tags=["slide"]
models = {  # (layers, query heads, key heads, width of a head)
    "Llama 2 7B": (32, 32, 32, 128), "Llama 3 70B": (80, 64, 8, 128),
    "Mistral 7B": (32, 32, 8, 128), "gpt-oss 120B": (36, 64, 8, 64),
    "Falcon 7B": (32, 71, 1, 64), "SmolLM2 135M": (30, 9, 3, 64)}
for name, (n_layers, n_heads, n_kv_heads, d_head) in models.items():
    a_head = 2 * n_layers * d_head * 2  # bytes a token: keys and values, two bytes each
    kept, full = a_head * n_kv_heads, a_head * n_heads
    heads = f"{n_heads} heads on {n_kv_heads}:"
    print(f"{name:12s} {heads:15s} {kept // 1024:3d} KiB a token, 8 texts "
          f"{kept * 8e-6:4.2f} GB, with all heads {full * 8e-6:5.2f} GB")

# %% [markdown]
# It is 2.62 GB.
#
# **Trap.** *"Llama 3 70B has 64 heads, so its cache is 20.97 GB."* The arithmetic is right, the model is not: it has 64
# heads of queries and **8 heads of keys and values**, and 2.62 GB. That factor of eight is this lecture. Saying "4 to 8
# times less memory" is a statement about the ratio of two columns, not about a method: here it is 1, 3, 4, 8 or 71.
#
# (From the published configurations: the classes of the transformers package have those of Llama 2 7B, Mistral 7B, Falcon
# 7B and gpt-oss as defaults, the model card that of Llama 3. Llama 2 groups its heads only in the large models.)
#
# *Predict.* The weights of the 70B model, 141 GB in two bytes each, are read once for the whole batch. At which length does
# the cache of eight texts outgrow them?

# %% tags=["slide"]
lengths = 2 ** np.arange(10, 18)
a_token = 2 * 80 * 128 * 2 * 8 / 1e9  # GB: one key head, a token of each of 8 texts
plotting.curves({"MHA: 64 key heads": 64 * a_token * lengths, "GQA: 8 key heads":
                 8 * a_token * lengths, "MQA: 1 key head": a_token * lengths},
                x=lengths, log_y=True,
                xlabel="tokens in each of 8 texts", ylabel="gigabytes read for a step",
                threshold=141, threshold_name="weights, GB:",
                title="With 64 key heads the cache soon outgrows the weights"
                ).set_xscale("log", base=2)
plotting.show("Three rising lines of cache bytes against the length, logarithmic: with "
              "64 heads above the weights from 8,192 tokens, with 8 from 65,536.")
for kind, n_kv_heads in (("MHA", 64), ("GQA", 8), ("MQA", 1)):
    print(f"{kind}: as large as the weights at "
          f"{141 / (a_token * n_kv_heads):9,.0f} tokens a text")

# %% [markdown]
# From about 6,700 tokens on, if every head had keys of its own; from 53,800 with eight. Beyond that a step is mostly the reading of keys. Each of them is read for **one**
# multiplication and one addition and then thrown away: the arithmetic units wait (8.6 counts it). FlashAttention (lecture
# 06) does not help: there is no matrix of scores here, only the cache. Fewer keys would help. Heads of *queries* are not
# stored, so they may stay.

# %% [markdown] tags=["slide"]
# ## Part 2 · NumPy
#
# ### 8.2 The mathematics of grouped queries
#
# **What if several query heads asked the same keys?** Let $n_\text{heads}$ be a multiple of $n_\text{kv}$, and
# $g = n_\text{heads} / n_\text{kv}$ the size of a group. Neighbours share:
#
# $$o_h=\text{softmax}\!\Big(\frac{q_h\,k_{\lfloor h/g\rfloor}^\top}{\sqrt d}\Big)\,v_{\lfloor h/g\rfloor}$$
#
# |$n_\text{kv}$|name|
# |---|---|
# |$n_\text{heads}$|multi-head attention, MHA: a group is one head|
# |between|**grouped-query attention**, GQA (Ainslie et al. 2023)|
# |1|**multi-query attention**, MQA (Shazeer 2019): one group|
#
# The running example has the sizes of a layer of SmolLM2: nine query heads of width 64 on three heads of keys and values.
# One token is being written, forty are in the cache. *Predict.* Which key head does query head 5 ask?

# %% tags=["first-attention", "slide"]
draw = np.random.default_rng(8)
q = 2 * draw.standard_normal((9, 1, 64))  # (n_heads, n_queries, d_head)
k, v = draw.standard_normal((2, 3, 40, 64))  # (n_kv_heads, n_keys, d_head)
group = len(q) // len(k)

out_loop = np.zeros_like(q)
for h in range(len(q)):
    kv = h // group
    scores = q[h] @ k[kv].T / np.sqrt(64)  # (1, 40)
    weights = np.exp(scores) / np.exp(scores).sum()
    out_loop[h] = weights @ v[kv]
    print(f"query head {h} asks key head {kv}, first output {out_loop[h, 0, 0]:6.3f}")

# %% [markdown]
# Head 5 asks key head 1 and says 0.637. That number will come back. Now without a loop: the heads of a group become an
# axis of their own, and **one einsum** lets them meet their key head. `h` is the key head, `g` the place in its group.

# %%
grouped = q.reshape(3, 3, 1, 64)  # (n_kv_heads, group, n_queries, d_head)
scores = np.einsum("hgid,hjd->hgij", grouped, k) / np.sqrt(64)
weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
out = np.einsum("hgij,hjd->hgid", weights, v).reshape(9, 1, 64)
print(f"head 5: {out[5, 0, 0]:.3f}, largest difference to the loop "
      f"{np.abs(out - out_loop).max():.6f}")

# %% tags=["slide"]
plotting.flow(
    {"q": q, "k": k, "v": v, "q in groups": grouped, "scores": scores,
     "weights": weights, "out": out},
    [("q", "q in groups", "9 = 3 × 3"), (("q in groups", "k"), "scores", "q kᵀ / √d"),
     ("scores", "weights", "softmax"),
     (("weights", "v"), "out", "weights · v\n3 × 3 = 9")],
    title="Grouped queries: nine heads ask, three heads of keys and values answer")
plotting.show("Data flow: nine query heads become three groups of three, each group "
              "meets one of three key heads, the weights mix one of three value heads.")

# %% [markdown]
# Keys and values keep their three heads from beginning to end. The **scores** do not: there are nine rows of them, as
# without groups. Grouping makes the cache smaller; score memory and FLOPs stay.
#
# **Trap.** *"With $G$ groups attention costs $O(n^2/G)$."* The cache is linear in $n$, and it *grows* with $G$.
#
# *Predict.* Both ends of the formula are old friends. What has to come out with $n_\text{kv} = 9$? And if the columns
# of $W_K$ and $W_V$ that make a shared head are written three times into a multi-head layer?

# %%
from attention.fundamentals import attention_numpy
from attention.grouped_query import grouped_query_attention_numpy
from attention.multi_head import merge_heads, multi_head_attention_numpy, split_heads

full_k, full_v = draw.standard_normal((2, 9, 40, 64))
mha = grouped_query_attention_numpy(q, full_k, full_v)
mqa = grouped_query_attention_numpy(q, k[:1], v[:1])
as_before = attention_numpy(q, full_k, full_v), attention_numpy(q, k[0], v[0])
print(f"9 key heads, largest difference to MHA: {np.abs(mha - as_before[0]).max():.6f}")
print(f"1 key head, every query on it: {np.abs(mqa - as_before[1]).max():.6f}")

x = draw.standard_normal((5, 36))  # 5 tokens; 9 heads of 4 on 3
w = {name: draw.standard_normal((36, columns)) / 6
     for name, columns in (("q", 36), ("k", 12), ("v", 12), ("o", 36))}
tied = [w[name].reshape(36, 3, 1, 4).repeat(3, axis=2).reshape(36, 36) for name in "kv"]
as_mha = multi_head_attention_numpy(x, x, w["q"], *tied, w["o"], n_heads=9)
heads = [split_heads(x @ w[name], n) for name, n in (("q", 9), ("k", 3), ("v", 3))]
as_gqa = merge_heads(grouped_query_attention_numpy(*heads)) @ w["o"]
print(f"tied multi-head layer, against 9 on 3: {np.abs(as_mha - as_gqa).max():.6f}")

# %% [markdown]
# MHA comes out, and the tied layer gives the same. So a GQA layer *is* a multi-head layer whose keys and values are tied inside each group. It can say less, and it stores
# less. Whether the difference is heard is a question for 8.4.
#
# #### Exercise 8A: grouped heads, no copy  (difficulty 3 of 5, essential, 15 minutes; if you do only two)
#
# Write the formula for any number of axes in front.
#
# |argument|shape|meaning|
# |---|---|---|
# |`q`|`(..., n_heads, n_queries, d_head)`|queries|
# |`k`, `v`|`(..., n_kv_heads, n_keys, d_head)`|keys and values; $n_\text{kv}$ divides $n_\text{heads}$|
# |`causal`|bool|no query sees a later key; the last query sees all, and a query before all keys gets 0|
#
# Returns `(..., n_heads, n_queries, d_head)` in the float type of `q`. Nothing that is as large as repeated keys may be
# made on the way: the check watches the memory.
#
# <details><summary>Hint</summary>
#
# Into which two axes does the axis of heads fall, and which of them comes first? With `...` in front, what are the letters
# of q, of k and of their scores? Your `softmax` (1A) and `causal_mask` (1B) know the rest.
#
# </details>

# %%
from attention.fundamentals import causal_mask, softmax

# %% tags=["exercise", "export"] kind="numpy"
def grouped_attention(q, k, v, causal=False):
    """Attention of n_heads queries on n_kv_heads keys and values; neighbours share.

    q (..., n_heads, n_queries, d_head), k and v (..., n_kv_heads, n_keys, d_head).
    Returns the shape and float type of q. ValueError unless n_kv_heads divides n_heads.
    Source: Ainslie et al. 2023 (arXiv 2305.13245), section 2.2.
    """
    n_heads, n_kv_heads = q.shape[-3], k.shape[-3]
    if n_kv_heads == 0 or n_heads % n_kv_heads:
        raise ValueError("n_heads must be a multiple of n_kv_heads, "
                         f"got {n_heads} and {n_kv_heads}")
    ### BEGIN SOLUTION
    parts = n_kv_heads, n_heads // n_kv_heads
    grouped = q.reshape(*q.shape[:-3], *parts, *q.shape[-2:])
    scores = np.einsum("...hgid,...hjd->...hgij", grouped, k) / math.sqrt(q.shape[-1])
    if causal:
        scores = np.where(causal_mask(*scores.shape[-2:]), scores, -np.inf)
    out = np.einsum("...hgij,...hjd->...hgid", softmax(scores), v)
    return out.reshape(q.shape).astype(q.dtype, copy=False)
    ### END SOLUTION

# %%
grouped_attention = check("8A", grouped_attention)

# %% [markdown]
# **Into a real model.** SmolLM2 hands keys and values to a function that shares them out, and then to attention. Now the
# first does nothing, and the second is yours: it gets nine heads of queries and three of keys.

# %% tags=["language-model"]
from utils import language_model

smollm = language_model.load()
if smollm:
    language_model.put_in(smollm, share=lambda x, n_heads: x,
                          attention=language_model.on_arrays(grouped_attention))

# %% [markdown]
# ### 8.3 Head grouping strategies
#
# **Who shares with whom?** "Neighbours" is a convention, and it must be the one with which the model was trained. PyTorch
# has two functions that sound alike and give the same shape.
#
# *Predict.* For which of the nine query heads do they agree?

# %% tags=["slide"]
three = torch.arange(3)
sharing = {"interleave": three.repeat_interleave(3), "repeat": three.repeat(3)}
plotting.masks({name: np.eye(3, dtype=bool)[order] for name, order in sharing.items()},
               title="One repeat serves neighbours, the other every third",
               rows="query heads", columns="key heads")
plotting.show("Two maps of nine query heads by three key heads: with repeat_interleave "
              "blocks of three neighbours, with repeat three short diagonals.")
out_wrong = attention_numpy(q, *(np.concatenate([a] * 3) for a in (k, v)))
errors = np.abs(out_wrong - out)[:, 0].max(-1)
print("largest error of each head:", *(f"{e:.1f}" for e in errors))

# %% [markdown]
# For heads 0, 4 and 8. The others are wrong by more than 1. An `assert` of the shape lets both pass, and so does a test that
# looks at head 0.
#
# *Predict.* What does the real model say with `repeat`?

# %% tags=["language-model", "slide"]
if smollm:
    found = language_model.compare(
        smollm, share=lambda x, n_heads: x.repeat(1, n_heads // x.shape[1], 1, 1))
    guess = math.log(smollm.config.vocab_size)
    print(f"loss {found.loss:.1f} (right {found.right_loss:.2f}, guessing {guess:.1f})")
    print(f"writes {found.text[:20]!r} ...")
    print(f"right  {found.right_text!r}")

# %% [markdown]
# Worse than guessing, and nobody gets an error message. Two more facts about the place of the repeat. The rotation (RoPE)
# does not care: it turns every head alike. The **cache** does.

# %% tags=["slide"]
store = {"before the repeat": np.repeat(np.arange(3)[:, None], 8, 1),
         "after the repeat": np.repeat(np.arange(3).repeat(3)[:, None], 8, 1)}
plotting.memory(store, title="Cached after the repeat, grouping saves nothing",
                owners={i: f"key head {i}" for i in range(3)})
plotting.show("Memory of eight tokens: three lines, one for each key head, and below "
              "them nine lines in which each key head stands three times.")

# %% [markdown] tags=["slide"]
# #### Exercise 8B: find the bug  (difficulty 3 of 5, useful, 15 minutes)
#
# Here is a step with a cache. Write a test that is given such a function and notices whether it is wrong. It is tried on
# right ones and on eight wrong ones: among them one that caches after the repeat, and says the right thing.
#
# |argument|meaning|
# |---|---|
# |`step`|`step(q, k_new, v_new, k_old, v_old)` returns `(out, k, v)`, as `grouped_step` below|
#
# Returns nothing. It raises an error (`assert ...`) for a wrong step, and none for a right one.
#
# <details><summary>Hint</summary>
#
# A cache that is fed twice: what should its shape be, and where should the new rows stand? For the output, which loop is so
# plain that you believe it? Which heads does your test look at, and are its keys and its values both different in each head?
#
# </details>

# %% tags=["export"]
def grouped_step(q, k_new, v_new, k_old, v_old):
    """New tokens join a cache and attend to it, causally. NumPy, one sequence.

    q (n_heads, n_new, d_head); k_new, v_new (n_kv_heads, n_new, d_head); k_old, v_old
    (n_kv_heads, n_old, d_head). Returns out (n_heads, n_new, d_head) and the cache:
    k and v (n_kv_heads, n_old + n_new, d_head).
    """
    k = np.concatenate([k_old, k_new], axis=1)
    v = np.concatenate([v_old, v_new], axis=1)
    return grouped_attention(q, k, v, causal=True), k, v

# %% tags=["exercise", "export"] kind="bug"
def test_step(step):
    """Raise AssertionError if step(q, k_new, v_new, k_old, v_old) is wrong."""
    ### BEGIN SOLUTION
    rng = np.random.default_rng(1)
    q, k, v = (2 * rng.standard_normal((heads, 7, 4)) for heads in (6, 2, 2))
    k_old, v_old = np.zeros((2, 2, 0, 4))
    for begin, end in ((0, 3), (3, 5), (5, 7)):
        new = slice(begin, end)
        out, k_old, v_old = step(q[:, new], k[:, new], v[:, new], k_old, v_old)
        assert k_old.shape == v_old.shape == (2, end, 4), "a cache of other heads"
        assert np.allclose(k_old, k[:, :end]) and np.allclose(v_old, v[:, :end])
        for h in range(6):
            for i in range(begin, end):
                powers = np.exp(q[h, i] @ k[h // 3, :i + 1].T / 2)
                expected = powers @ v[h // 3, :i + 1] / powers.sum()
                assert np.allclose(out[h, i - begin], expected), (h, i)
    ### END SOLUTION

# %%
test_step = check("8B", test_step)

# %% [markdown]
# #### Merging the heads of a trained model
#
# **Can a model that has nine key heads be given three?** Ainslie et al. average the projections of a group: **mean**
# pooling; they compare with keeping the **first** head and with a **random** new one (§ 2.1). An average assumes that the
# columns of two heads mean the same. Nothing in training says so.
#
# *Predict.* Every value head is multiplied by a rotation of its own, $v_hR_h$, and its rows of $W_O$ by the inverse. What
# happens to the layer's output? And to the average of a group?

# %%
rng = np.random.default_rng(3)
tokens = rng.standard_normal((200, 24))
common, own = rng.standard_normal((4, 1, 24, 6)), rng.standard_normal((4, 2, 24, 6))
head_v = (common + 0.4 * own).reshape(8, 24, 6)  # 8 heads; the 2 of a group are alike
head_o = rng.standard_normal((8, 6, 24))
turns = np.stack([np.linalg.qr(rng.standard_normal((6, 6)))[0] for _ in range(8)])
turned_v, turned_o = head_v @ turns, turns.swapaxes(1, 2) @ head_o

def said(w_v, w_o):
    """What eight heads say about each token: (200, 24); those of a group share w_v."""
    return sum(tokens @ w_v[h * len(w_v) // 8] @ w_o[h] for h in range(8))

said_first = said(head_v, head_o)
size = np.linalg.norm(said_first)
mean = [np.linalg.norm(said(w.reshape(4, 2, 24, 6).mean(1), o) - said_first) / size
        for w, o in ((head_v, head_o), (turned_v, turned_o))]
print(f"output changed by {np.abs(said(turned_v, turned_o) - said_first).max():.6f}")
print(f"error of the mean: {mean[0]:.2f} before, {mean[1]:.2f} after the rotation")

# %% [markdown]
# The layer is the same to the last digit that matters, and its average is ruined: **heads have no common basis**. So turn
# them first. Head $h$ hands over $v_h$ on some text, the first head of its group $v_r$; the rotation that brings the one
# closest to the other (orthogonal Procrustes) is
#
# $$R_h=\arg\min_{R^\top R=1}\lVert v_hR-v_r\rVert=UV^\top,\qquad U\Sigma V^\top=\text{svd}(v_h^\top v_r)$$
#
# #### Exercise 8C: align, then merge  (difficulty 3 of 5, useful, 15 minutes)
#
# |argument|shape|meaning|
# |---|---|---|
# |`v`|`(n_heads, n_tokens, d_head)`|what each head hands over on some text|
# |`w_v`|`(n_heads, d_model, d_head)`|its projection|
# |`w_o`|`(n_heads, d_head, d_out)`|what its output is multiplied by|
# |`n_kv_heads`|int|how many heads shall be left|
#
# Returns the pair `(merged, turned)`: the means of the aligned projections of each group of neighbours, `(n_kv_heads,
# d_model, d_head)`, and every head's `w_o`, turned back, `(n_heads, d_head, d_out)`.
#
# <details><summary>Hint</summary>
#
# Which head is the reference of head h? `np.linalg.svd` returns $V^\top$ already. If a head's values are multiplied by R on
# the right, what has to happen to its w_o, and on which side, so that $v_hw_o$ stays?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def aligned_merge(v, w_v, w_o, n_kv_heads):
    """Turn the value heads of each group onto its first one, then average them.

    v (n_heads, n_tokens, d_head), w_v (n_heads, d_model, d_head), w_o (n_heads, d_head,
    d_out). Returns merged (n_kv_heads, d_model, d_head) and w_o turned back, as w_o.
    ValueError unless n_kv_heads divides n_heads. Source: arXiv 2412.20677.
    """
    if n_kv_heads < 1 or len(v) % n_kv_heads:
        raise ValueError("n_heads must be a multiple of n_kv_heads, "
                         f"got {len(v)} and {n_kv_heads}")
    ### BEGIN SOLUTION
    group = len(v) // n_kv_heads
    merged, turned = np.zeros((n_kv_heads, *w_v.shape[1:])), np.zeros(w_o.shape)
    for h in range(len(v)):
        u, _, vt = np.linalg.svd(v[h].T @ v[h // group * group])
        rotation = u @ vt
        merged[h // group] += w_v[h] @ rotation / group
        turned[h] = rotation.T @ w_o[h]
    return merged, turned
    ### END SOLUTION

# %%
aligned_merge = check("8C", aligned_merge)

# %% tags=["slide"]
after = [said(*aligned_merge(tokens @ turned_v, turned_v, turned_o, 4)),
         said(turned_v[::2], turned_o)]  # aligned; the first head of each group
aligned, kept_first = (np.linalg.norm(each - said_first) / size for each in after)
plotting.bars({"mean, before": mean[0], "mean, rotated": mean[1], "aligned, rotated":
               aligned, "first head, rotated": kept_first},
              ylabel="error of the layer's output, relative",
              title="A rotation ruins the mean; aligning repairs it")
plotting.show("Four bars of relative error: the mean is good, after a rotation bad, "
              "after aligning good again; the first head alone is bad.")

# %% [markdown]
# Keys have the same freedom, together with their queries, but less of it: RoPE turns the columns $i$ and $i + d/2$ as a
# pair, and only a turn *within* each pair can be exchanged with that. `align_keys` (Behind the scenes) finds these angles.
# In 8.4 both are tried on real heads.

# %% [markdown]
# ## Part 3 · PyTorch
#
# ### 8.4 Memory and quality
#
# **What does a model lose that stores less?** To find out it has to be trained, so it has to be a module.
#
# #### Exercise 8D: the layer  (difficulty 3 of 5, essential, 20 minutes; if you do only two)
#
# Write the layer that takes the place of `MultiHeadAttention` (lecture 02). The shape contract:
#
# |array|shape|
# |---|---|
# |`x`|`(batch, n, d_model)`|
# |parameters `w_q`, `w_o`|`(d_model, d_model)`|
# |parameters `w_k`, `w_v`|`(d_model, n_kv_heads * d_head)`, used as `x @ w`|
# |q, rotated|`(batch, n_heads, n, d_head)`|
# |k, rotated, and v; this is what `cache.update(k, v)` gets|`(batch, n_kv_heads, n, d_head)`|
# |out|`(batch, n, d_model)`|
#
# `cache.update(k, v)` stores new keys and values and returns all so far. `positions` has `rotate(x, places)`; the caller
# gives the places. For the formula there is `grouped_query_attention_torch(q, k, v, mask, causal)`, or your own.
#
# Returns what the heads found, merged and multiplied by `w_o`.
#
# <details><summary>Hint</summary>
#
# `split_heads(x @ w, count)`: which count for which of the three? In which order do rotate, cache and sharing stand? What
# undoes `split_heads`? A parameter of size (a, b): `nn.Parameter(torch.randn(a, b) * a**-0.5)`.
#
# </details>

# %%
from attention.grouped_query import grouped_query_attention_torch
from attention.multi_head import Positions

# %% tags=["exercise", "export"] kind="module"
class GroupedQueryAttention(nn.Module):
    """Self-attention of n_heads query heads on n_kv_heads heads of keys and values.

    positions: rotates queries and keys, as in MultiHeadAttention; by default nothing.
    ValueError unless n_kv_heads divides n_heads and n_heads divides d_model.
    """

    def __init__(self, d_model, n_heads, n_kv_heads, positions=None):
        super().__init__()
        if n_heads < 1 or d_model % n_heads or n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError("n_kv_heads must divide n_heads and n_heads d_model, "
                             f"got {n_kv_heads}, {n_heads} and {d_model}")
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.positions = Positions() if positions is None else positions
        ### BEGIN SOLUTION
        d_kv = d_model // n_heads * n_kv_heads
        self.w_q, self.w_k, self.w_v, self.w_o = (
            nn.Parameter(torch.randn(d_model, columns) * d_model**-0.5)
            for columns in (d_model, d_kv, d_kv, d_model))
        ### END SOLUTION

    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        ### BEGIN SOLUTION
        q = split_heads(x @ self.w_q, self.n_heads)
        k, v = (split_heads(x @ w, self.n_kv_heads) for w in (self.w_k, self.w_v))
        q, k = (self.positions.rotate(heads, positions) for heads in (q, k))
        if cache is not None:
            k, v = cache.update(k, v)
        return merge_heads(grouped_query_attention_torch(q, k, v, mask, causal)) @ self.w_o
        ### END SOLUTION

# %%
GroupedQueryAttention = check("8D", GroupedQueryAttention)

# %% [markdown]
# **Copied weights**, as in lecture 01: the matrices of a real layer in your module, and what the real layer makes of the
# same input.

# %% tags=["language-model"]
if smollm:
    from attention.rotary import Rotary

    ids = language_model.excerpt(smollm, 64)
    seen = {}
    theirs = smollm.blocks[12].attention
    hook = theirs.register_forward_hook(
        lambda module, args, result: seen.update(x=args[0], out=result))
    smollm.hidden(ids)
    hook.remove()
    mine = GroupedQueryAttention(576, 9, 3, Rotary(64, base=100000.0))
    with torch.no_grad():
        for name in ("w_q", "w_k", "w_v", "w_o"):
            getattr(mine, name).copy_(getattr(theirs, name))
        gap = (mine(seen["x"], causal=True) - seen["out"]).abs().max()
    size = seen["out"].abs().max()
    print(f"layer 12: outputs up to {size:.1f}, largest difference {gap:.4f}")
    del mine, seen

# %% [markdown]
# Now three small language models that write English character by character (two layers of width 64, 8 query heads):
# 8, 2 and 1 heads of keys. What a model saves in $W_K$ and $W_V$ goes into its feed-forward part, so all have **the same
# number of parameters**. A control: a table of character pairs.
#
# *Predict.* The cache shrinks to a quarter and to an eighth. What does the loss do?

# %% tags=["slide"]
from attention.experiments.grouped_query import batches, held_out_loss, pair_loss
from attention.experiments.grouped_query import train_grouped

trained, sizes = {}, {"MHA": 8, "GQA": 2, "MQA": 1}
for kind, n_kv_heads in sizes.items():
    trained[kind] = train_grouped(GroupedQueryAttention, n_kv_heads)
    count = sum(p.numel() for p in trained[kind].parameters())
    print(f"{kind}: {n_kv_heads} key heads, {count:,} parameters, {32 * n_kv_heads:3d} "
          f"numbers a token cached, loss {held_out_loss(trained[kind]):.2f}")
print(f"table of pairs: loss {pair_loss():.2f}")
plotting.bars({f"{kind}, {n} key heads": held_out_loss(trained[kind])
               for kind, n in sizes.items()} | {"table of pairs": pair_loss()},
              ylabel="loss on text not trained on (nats)",
              title="At this size fewer key heads cost little or nothing")
plotting.show("Four bars of loss: the three models lie close together, well below the "
              "table of pairs.")

# %% [markdown]
# It rises by less than a tenth of a nat, for an eighth of the cache. One seed each: with `seed=1` the order is another (an
# exercise left), so these differences rank nobody. Ainslie et al. (2305.13245, table 1) on T5-XXL, after the conversion below: 47.2 for MHA, 47.1 for
# eight groups, 46.6 for MQA, at 1.51, 0.28 and 0.24 seconds a sample. So why not one head? They also report that MQA
# training suffered from loss spikes and was unstable on long inputs, and that grouped models were stable (appendix A).
#
# #### Uptraining
#
# **Need one start again?** Convert the trained model, then train it on for a little: **uptraining**, in the paper with 5 %
# of the steps of the first training.
#
# **Trap.** *"For serving, switch to GQA."* A switch is what the first point of the next figure shows.
#
# #### Exercise 8E: a step of uptraining  (difficulty 2 of 5, useful, 12 minutes)
#
# Write one step for a language model: the loss of every next token, gradients, clipping, optimiser.
#
# |argument|shape|meaning|
# |---|---|---|
# |`model`||`model(ids)` gives logits `(batch, n, vocab_size)`|
# |`optimiser`||a `torch.optim` optimiser of the parameters to be trained|
# |`ids`|`(batch, n)` int64|text; each token but the last is to predict the one after it|
#
# Returns the loss before the step, a Python number: the mean over all predicted tokens. The gradients are clipped to norm 1
# together. Parameters that ask for no gradient stay as they are.
#
# <details><summary>Hint</summary>
#
# How many predictions can n tokens check? Which tokens go into the model, and which are the right answers? Then the four
# steps of exercise 1E: in which order?
#
# </details>

# %% tags=["exercise", "export"] kind="training"
def uptraining_step(model, optimiser, ids):
    """One step on the next-token loss of ids (batch, n), gradients clipped to norm 1.

    model(ids): logits (batch, n, vocab_size). Returns the loss before it, a float.
    """
    ### BEGIN SOLUTION
    loss = nn.functional.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:])
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()
    ### END SOLUTION

# %%
uptraining_step = check("8E", uptraining_step)

# %% [markdown]
# *Predict.* MHA becomes GQA-2 in four ways, then come 30 steps (10 % of its training). Which way starts lowest, and which
# ends lowest? The dashed line is the model before, with the same 30 steps.

# %% tags=["slide"]
from attention.experiments.grouped_query import convert

ways = {}
for way, n_kv_heads in (("mean", 2), ("first head", 2), ("random", 2),
                        ("aligned mean", 2), ("not converted", 8)):
    kind = "mean" if n_kv_heads == 8 else way  # of one head each: the model as it was
    model = convert(trained["MHA"], GroupedQueryAttention, n_kv_heads, kind)
    optimiser = torch.optim.AdamW(model.parameters(), lr=6e-3)
    text, ways[way] = batches(seed=77), [held_out_loss(model)]
    for step in range(1, 31):
        uptraining_step(model, optimiser, next(text))
        if step % 10 == 0:
            ways[way].append(held_out_loss(model))
    at_first, *_, at_last = ways[way]
    print(f"{way:13s} loss {at_first:.2f} at once, {at_last:.2f} after 30 steps")
again = ways.pop("not converted")[-1]
plotting.curves(ways, x=[0, 10, 20, 30], xlabel="steps of uptraining",
                ylabel="held-out loss (nats)", threshold=round(again, 2),
                threshold_name="MHA, same steps:",
                title="Aligned heads start lowest and end lowest")
plotting.show("Four falling curves of loss against steps of uptraining: the aligned "
              "mean lowest, then mean, first head, random; a line below them for MHA.")

# %% [markdown]
# The aligned mean, both times. Nobody can be switched: at once each is far worse than the model it came from. After 30 steps
# the paper's order is there (mean, first, random; its figure 4), with the aligned mean before all of them, at 2.03. The model
# that was grouped from its first step has 2.06.
#
# **And real heads?** SmolLM2 has three key heads. Merge them into one, in all 30 layers.
#
# *Predict.* The loss is 2.78, and guessing costs 10.8. How far up does each way go, without a step of training?

# %% tags=["language-model", "slide"]
if smollm:
    from attention.experiments.grouped_query import caches_of, merged_layer, with_layers

    text = language_model.excerpt(smollm, 1400)
    caches = caches_of(smollm, text[:, 500:900])  # keys and values of other text

    def merged_model(way, layers=range(30)):
        old = [block.attention for block in smollm.blocks]
        new = {i: merged_layer(old[i], caches[i], way) for i in layers}
        return with_layers(smollm, new)

    def loss_of(model):
        return float(model.losses(text[:, :256]).mean())

    at_once = {"three heads": loss_of(smollm)}
    for way in ("mean", "first head", "aligned mean"):
        at_once[way] = loss_of(merged_model(way))
        print(f"{way:12s} loss {at_once[way]:.1f}")
    plotting.bars(at_once, ylabel="loss on 256 tokens (nats)",
                  title="Without training all three fail, the aligned mean least")
    plotting.show("Four bars of loss: the model as it is 2.8, first head and mean near "
                  "or above guessing, aligned mean clearly lower.")

# %% [markdown]
# None of the three is a language model any more; but the aligned one has kept something that the others lost. Now the last
# ten layers only, and four steps of **your** uptraining, on merged keys and values alone (all else stays frozen).

# %% tags=["language-model", "slide"]
if smollm:
    tuned = {}
    for way in ("mean", "aligned mean"):
        model = merged_model(way, range(20, 30))
        new = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(new, lr=1e-3)
        before = loss_of(model)
        for step in range(4):
            start = 300 + 128 * step
            uptraining_step(model, optimiser, text[:, start:start + 128])
        tuned[way] = before, loss_of(model)
        print(f"ten layers, {way:12s}: loss {before:.1f} at once, {tuned[way][1]:.1f} "
              f"after 4 steps (three heads {at_once['three heads']:.2f})")
    del model, new, optimiser

# %% [markdown]
# Both fall, and the aligned one stays ahead; 512 tokens do not bring back what was there. The "5 % of
# the training" of the paper would be billions of tokens here: that part of the claim cannot be shown on a laptop.

# %% [markdown]
# ## Part 4 · CUDA
#
# ### 8.5 Implementation considerations: read once, copy nothing
#
# **Does the code save what the formula saves?** Five ways to write the same attention, nine heads on three, one new token,
# 4,096 in the cache. `new_bytes` counts the memory that each makes (Behind the scenes). Keys and values are 6.3 MB.
#
# *Predict.* `expand` copies nothing: it makes a view in which three heads are the same memory. Which of the five copy?

# %% tags=["slide"]
from attention.grouped_query import new_bytes

F = nn.functional
q4, k4, v4 = (torch.from_numpy(draw.standard_normal((1, n, m, 64))).float()
              for n, m in ((9, 1), (3, 4096), (3, 4096)))

def by_repeat(q, k, v):
    k, v = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
    return F.scaled_dot_product_attention(q, k, v)

def by_matmul(q, k, v):  # (1, 3, 3, 1, 64) @ (1, 3, 1, 64, 4096): k is expanded inside
    p = torch.softmax(q.unflatten(1, (3, 3)) @ k[:, :, None].mT / 8, dim=-1)
    return (p @ v[:, :, None]).flatten(1, 2)

def by_rows(q, k, v):  # (1, 3, 3, 64) @ (1, 3, 64, 4096): a group's heads are rows
    p = torch.softmax(q.reshape(1, 3, 3, 64) @ k.mT / 8, dim=-1)
    return (p @ v).reshape(1, 9, 1, 64)

def by_einsum(q, k, v):
    scores = torch.einsum("bhgid,bhjd->bhgij", q.unflatten(1, (3, 3)), k) / 8
    p = torch.softmax(scores, dim=-1)
    return torch.einsum("bhgij,bhjd->bhgid", p, v).flatten(1, 2)

# %%
def by_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

made, first = {}, by_repeat(q4, k4, v4)
for name, way in {"repeat": by_repeat, "expand and matmul": by_matmul,
                  "group as rows": by_rows, "einsum": by_einsum,
                  "enable_gqa": by_sdpa}.items():
    made[name] = new_bytes(way, q4, k4, v4) / 1e6
    gap = (way(q4, k4, v4) - first).abs().max()
    print(f"{name:18s} makes {made[name]:6.2f} MB, largest difference {gap:.5f}")
plotting.bars(made, ylabel="new memory (MB)",
              title="Two ways copy every key three times; three copy none")
plotting.show("Five bars of memory made: repeat and matmul on an expanded view 19 MB, "
              "group as rows and einsum 0.4 MB, enable_gqa almost nothing.")

# %% [markdown]
# The first two. **Trap.** *"A view is free."* `expand` was; the product that used it was not: it wrote the expanded keys
# out first. What helps is to move the group to the side of the queries: they are small. **A group of three heads with one query each is one head
# with three queries.** The course's `grouped_query_attention_torch` does that.
#
# #### A kernel for a group
#
# The decode kernel of lecture 05 gives each query head a block of threads. Where three heads share keys, three blocks read
# the same keys. **What has to change so that they are read once?** The block. Now it takes one head of keys, and has a warp
# for each query head of the group (a *row*; with several queries, `group * n_queries` rows):
#
# 1. all warps together bring 16 keys and 16 values into shared memory;
# 2. each warp scores the keys with its own query; lane $t$ keeps the score of key $t$;
# 3. `rescale`: the online softmax (lecture 06) turns a score into a weight and says by what factor the sum so far shrinks;
# 4. each warp adds the weighted values to its sum; and the next 16.
#
# A lane has the columns $l$, $l + 32$, ... of its query and of its sum, `C` of each, in registers.

# %% tags=["slide"]
lines = {"keys of head 1": np.repeat([0, 1], 16), "shared memory": np.repeat(0, 16),
         "query head": np.array(["", "3", *5 * [""], "4", *5 * [""], "5", ""])}
plotting.memory(lines, [(("keys of head 1", 7), ("shared memory", 7)),
                        (("shared memory", 1), ("query head", 1)),
                        (("shared memory", 7), ("query head", 7)),
                        (("shared memory", 13), ("query head", 13))],
                "One tile of keys is brought once, and three warps use it",
                owners={0: "this tile", 1: "the next one"})
plotting.show("A row of 32 keys, of which the first 16 are copied into shared memory; "
              "from there arrows lead to the warps of query heads 3, 4 and 5.")

# %% [markdown]
# #### Exercise 8F: one load for a group  (difficulty 3 of 5, useful, 20 minutes)
#
# Write the loop over the tiles. The functions that it calls stand in the next two
# cells.
#
# |argument|shape|meaning|
# |---|---|---|
# |`q`|`(groups, rows, d)`|all queries of a group, one behind the other|
# |`k`, `v`|`(groups, n_keys, d)`, `(groups, n_keys, d_v)`|its keys and values|
# |`begin`, `end`|int|the keys of this block|
# |`query`, `sum`, `maximum`, `total`||this row's query (scaled), its sum, maximum and total so far|
#
# `load_tile<C>(tile, from, n, d)` copies n rows with all threads of the block; `score_keys<C>(query, k_tile, n)` gives lane
# $t$ the score of key $t$; `sees(...)` says whether this row may look at key `first + lane`; `rescale(score, weight, maximum,
# total)` sets `weight` and returns the factor. In `v_tile` column $32c + \text{lane}$ of row $t$ is at
# `(t * C + c) * 32 + lane`. Returns nothing; it leaves `sum` and `total` complete.
#
# <details><summary>Hint</summary>
#
# Where in k do the rows of `head` begin, and where is key `first` of them? When may a tile be overwritten, and when may it be
# used? Which lane knows the weight of key t, and how do all get it (`__shfl_sync(0xffffffff, weight, t)`)? What is the score
# of a key that this row may not see?
#
# </details>

# %%
from attention.kv_cache import WARP

# %% tags=["export"]
GROUP_TILE = WARP + r"""
#define KEYS 16                                          // rows of a tile
// All threads copy n rows of d columns into rows of 32 C floats, zeros behind them.
template <int C, typename T>
__device__ void load_tile(float* tile, const T* from, int n, int d) {
  for (int e = threadIdx.y * 32 + threadIdx.x; e < n * 32 * C; e += blockDim.y * 32) {
    int r = e / (32 * C);
    int c = e % (32 * C);
    tile[e] = c < d ? (float)from[(size_t)r * d + c] : 0.0f;
  }
}
// This lane's columns of a query, times the scale.
template <int C>
__device__ void load_query(float (&query)[C], const float* q, int d, float scale) {
  for (int c = 0; c < C; ++c) {
    int column = 32 * c + threadIdx.x;
    query[c] = column < d ? scale * q[column] : 0.0f;
  }
}
// The scores of a tile's n keys with this warp's query: lane t gets that of key t.
template <int C>
__device__ float score_keys(const float (&query)[C], const float* k_tile, int n) {
  float score = -INFINITY;
  for (int t = 0; t < n; ++t) {
    float s = 0.0f;
    for (int c = 0; c < C; ++c) s += query[c] * k_tile[(t * C + c) * 32 + threadIdx.x];
    s = warp_sum(s);
    if (threadIdx.x == t) score = s;
  }
  return score;
}
"""

# %% tags=["export"]
GROUP_ROW = r"""
// Whether query i may see key j. allowed: this row of the mask, read only if there is one.
__device__ bool sees(const unsigned char* allowed, int i, int j, int n_queries, int n_keys,
                     int masked, int causal) {
  if (causal && j > i + n_keys - n_queries) return false;
  return !masked || allowed[j];
}
// From the score of a lane's key to its weight; returns the factor for what was summed before.
__device__ float rescale(float score, float& weight, float& maximum, float& total) {
  float larger = fmaxf(maximum, warp_max(score));
  float top = larger == -INFINITY ? 0.0f : larger;       // no key so far: -inf minus -inf is nan
  float shrink = expf(maximum - top);
  weight = expf(score - top);
  total = shrink * total + warp_sum(weight);
  maximum = larger;
  return shrink;
}
// How many keys the rows r to last of a group may see. Row r is query r % n_queries of its head.
__device__ int keys_of_block(int r, int last, int n_queries, int n_keys, int causal) {
  bool one_head = r / n_queries == last / n_queries;
  int latest = one_head ? last % n_queries : n_queries - 1;
  return causal ? max(0, latest + 1 + n_keys - n_queries) : n_keys;
}
"""

# %% tags=["exercise", "export"] kind="kernel"
GROUPED_SPLIT = GROUP_TILE + GROUP_ROW + r"""
template <typename T, int C>                             // 32 C >= d and d_v
__global__ __launch_bounds__(1024) void grouped_split(const float* q, const T* k, const T* v,
    const unsigned char* allowed, float* outs, double* lses, int rows, int n_queries, int n_keys,
    int d, int d_v, int split, int masked, int causal, float scale) {
  extern __shared__ float k_tile[];                      // KEYS rows of 32 C floats, twice
  float* v_tile = k_tile + KEYS * 32 * C;
  int lane = threadIdx.x;
  int top = blockIdx.y * blockDim.y;                     // rows of the group above this block
  int r = min(top + (int)threadIdx.y, rows - 1);         // this warp's row
  int visible = keys_of_block(top, min(top + (int)blockDim.y, rows) - 1, n_queries, n_keys, causal);
  int begin = blockIdx.z * split;
  int end = min(begin + split, visible);
  size_t head = blockIdx.x;                              // of keys and values
  size_t row = head * rows + r, part = row * gridDim.z + blockIdx.z;
  float query[C];
  load_query<C>(query, q + row * d, d, scale);
  float sum[C] = {};
  float maximum = -INFINITY, total = 0.0f;
  // BEGIN SOLUTION
  for (int first = begin; first < end; first += KEYS) {
    int n = min(KEYS, end - first);
    __syncthreads();                                     // the last tiles are used up
    load_tile<C>(k_tile, k + (head * n_keys + first) * d, n, d);
    load_tile<C>(v_tile, v + (head * n_keys + first) * d_v, n, d_v);
    __syncthreads();                                     // the new tiles are there
    float score = score_keys<C>(query, k_tile, n);       // of key `lane`
    bool seen = lane < n && sees(allowed + row * n_keys, r % n_queries, first + lane, n_queries,
                                 n_keys, masked, causal);
    score = seen ? score : -INFINITY;                    // before the softmax
    float weight;
    float shrink = rescale(score, weight, maximum, total);
    for (int c = 0; c < C; ++c) sum[c] *= shrink;
    for (int t = 0; t < n; ++t) {
      float w = __shfl_sync(0xffffffff, weight, t);
      for (int c = 0; c < C; ++c) sum[c] += w * v_tile[(t * C + c) * 32 + lane];
    }
  }
  // END SOLUTION
  if (top + threadIdx.y >= rows) return;                 // a warp without a row only helped to load
  for (int c = 0; c < C && 32 * c + lane < d_v; ++c)
    outs[part * d_v + 32 * c + lane] = sum[c] / (total == 0.0f ? 1.0f : total);
  if (lane == 0) lses[part] = (double)maximum + logf(total);
}
"""

# %%
GROUPED_SPLIT = check("8F", GROUPED_SPLIT)

# %% [markdown]
# The running example through three kernels: that of lecture 05, which needs repeated keys; this one with a block for each
# query head; this one as it is meant. *Predict.* How often does each read K and V?

# %% tags=["slide"]
from attention.grouped_query import grouped_bytes, grouped_launch
from attention.kv_cache import DECODE_SPLIT, split_kernel
from utils import cuda

repeated = [np.repeat(a, 3, axis=0).astype(np.float32) for a in (k, v)]
lone = np.zeros((9, 1, 64), np.float32)
once_a_head = split_kernel(DECODE_SPLIT)
reports = {"lecture 05, keys repeated": once_a_head.check[(9, 1), 32, 512](
    q[:, 0].astype(np.float32), *repeated, np.full(1, 40, np.int32), lone,
    np.zeros((9, 1)), 40, 9, 64, 1 / 8)}
mine = cuda.compile(GROUPED_SPLIT, name="grouped_split", template=("float", 2))
for name, warps in (("a block for each head", 1), ("a block for each group", 32)):
    _, launch, arguments = grouped_launch(q, k, v, warps=warps)
    reports[name] = mine.check[launch](*arguments)
once = 2 * 3 * 40 * 64 * 4  # bytes of K and V
for name, report in reports.items():
    read = sum(row.bytes for row in report.rows
               if row.kind == "load" and row.array in ("k", "v"))
    print(f"{name:25s} reads {read:7,} bytes of K and V: {read / once:.0f} times; "
          f"problems {len(report.problems)}")
print(f"formula for a group {grouped_bytes(9, 3, 1, 40, 64, 64):,}; "
      f"head 5: {arguments[4].reshape(9, 64)[5, 0]:.3f}")

# %% [markdown]
# The factor is the size of the group, to the byte, and head 5 says 0.637 again. (On a GPU its cache may save the second
# reading, or may not: blocks run far apart.) On an A100, eight texts of 8,192 tokens, one layer of Llama 3 70B:
#
# *Predict.* Which bar is the longest after the change?

# %%
n_tokens = 8 * 8192  # of all texts; width 128, half precision; C = 4
flops = 4 * 128 * 64 * n_tokens
rungs = {  # (bytes, turns of shared memory, operations)
    "a block for each head": (64 * n_tokens * 512, n_tokens * 64 * (8 + 8), flops),
    "a block for each group": (8 * n_tokens * 512, n_tokens * (64 * 8 + 8 * 8), flops)}
plotting.ladder(rungs, bandwidth=1.555e12, turns_per_second=108 * 1.41e9, peak=19.5e12,
                title="Eight times fewer bytes; shared memory is the next wall")
plotting.show("Three bars for each of two kernels, logarithmic: a block for each head "
              "waits for memory, a block for each group for its shared memory.")

# %% [markdown]
# That of shared memory. (A warp reads a key and a value in 4 turns each; to write a tile is shared by the group.) Real kernels give the
# scores of a group to the tensor cores: rows of queries are a matrix again.

# %% [markdown]
# ## Part 5 · Does it matter?
#
# ### 8.6 Real-world benchmarks, by arithmetic
#
# **How busy is a GPU that decodes?** Its **arithmetic intensity**: operations for each byte that is read. A query head does
# $4d$ operations with a key and a value (two products), whose $2d$ numbers are $4d$ bytes in half precision. So MHA
# does 1 operation for each byte, a group of $g$ does $g$; the roofline's ridge (section 4.2) of an A100 is at 201.
#
# *Predict.* Where on the roofline does a group of 8 stand? Would a larger batch help?

# %% tags=["slide"]
bandwidth, peak = 1.555e12, 312e12  # A100 40 GB, data sheet: bytes/s, bfloat16 FLOP/s
intensity = {"MHA": 1, "GQA, groups of 8": 8, "MQA, 64 heads": 64}
points = {name: (g, g * bandwidth) for name, g in intensity.items()}
plotting.roofline(points, bandwidth, peak,
                  title="Each query that shares a key moves decoding to the right")
plotting.show("Roofline of an A100 with three points on its slope: 1, 8 and 64 "
              "operations a byte, all left of the ridge at 201.")
cache, weights_read = 2 * 80 * 128 * 2 * 8 * 8192, 141e9  # GQA-8, one text of 8,192
for batch in (1, 8, 64):
    read = batch * cache + weights_read
    flops = batch * (141e9 + 4 * 64 * 128 * 80 * 8192)  # weights, attention
    print(f"batch {batch:2d}: cache {batch * cache / 1e9:5.1f} GB, "
          f"{batch * cache / read:3.0%} of the bytes; {flops / read:4.1f} FLOP a byte")

# %% [markdown]
# On the slope, far left of the ridge; a larger batch helps the weights, not the cache. At a batch of 64 more than half of
# the bytes are cache, and MHA's would be 1.4 TB.
#
# **Trap.** *"A large batch makes decoding compute-bound."* The weights are read once for all texts. But every text brings its
# own cache, whose intensity stays $g$.
#
# Counted times are upper limits of speed. Measured ones (table 1 of the paper, seconds a sample on TPUs, quoted in 8.4):
# 5.4 times faster with 8 groups than with MHA, 6.3 times with one.
#
# **And on eight devices?** Heads are dealt out (**tensor parallelism**). A model with one key head cannot be cut: every
# device holds a copy. Below: cache bytes a token and layer on **each** device, heads of 128 in half precision.

# %% tags=["slide"]
from attention.grouped_query import cache_per_device

devices = [1, 2, 4, 8, 16]
per_device = {kind: [cache_per_device(1, n, 128, n_devices) for n_devices in devices]
              for kind, n in (("MHA", 64), ("GQA", 8), ("MQA", 1))}
latent = [576 * 2] * len(devices)  # the latent cache of lecture 09, copied everywhere
for kind, row in (per_device | {"MLA": latent}).items():
    print(f"{kind} on", "  ".join(f"{n}: {size:6,}" for n, size in zip(devices, row)))
plotting.curves(per_device | {"MLA": latent}, x=devices, log_y=True, xlabel="devices",
                ylabel="bytes a token and layer, on each",
                title="Shared out, GQA falls to MQA on eight devices; MQA and MLA stay"
                ).set_xscale("log", base=2)
plotting.show("Cache bytes on each device against the number of devices, logarithmic: "
              "MHA and GQA fall, GQA until 8 devices; MQA and MLA are level.")

# %% [markdown]
# On eight devices GQA-8 stores what MQA does, and each device has a head of its own: one reason for so many eights. With
# 16 devices each key head stands twice. (Serving engines do that: in vLLM the rule is an `assert` that one of the two
# numbers divides the other, then `max(1, total_num_kv_heads // tp_size)`.)
#
# ### 8.7 In use
#
# **What do you call on Monday?** `F.scaled_dot_product_attention(q, k, v, enable_gqa=True)`: neighbours share, as here.
# transformers: `num_key_value_heads` in the configuration, and `repeat_kv` inside eager attention, after the cache.
# flash-attn and vLLM take the grouped cache as it is. You meet it in nearly every open model since 2023: first-token
# latency hardly changes, tokens a second and texts a batch do. In a model of your own: `n_kv_heads` as many as devices.

# %%
ours = grouped_query_attention_torch(*(torch.from_numpy(a)[None] for a in (q, k, v)))
theirs = nn.functional.scaled_dot_product_attention(
    *(torch.from_numpy(a)[None] for a in (q, k, v)), enable_gqa=True)
print(f"head 5: ours {ours[0, 5, 0, 0]:.3f}, PyTorch's {theirs[0, 5, 0, 0]:.3f}")

# %% [markdown]
# ## What you can do now
#
# You can let query heads share keys, in NumPy, as a layer and in a kernel, and say which bytes that saves and which not. You
# can find a cache that holds copies. You can merge the heads of a trained model, aligned first, and train it on.

# %%
kv_heads = 2 ** np.arange(7)
plotting.curves({"GQA: 80 layers, heads of 128": 2 * 80 * 128 * 2 * kv_heads / 1024},
                x=kv_heads, xlabel="heads of keys and values", ylabel="KiB a token",
                threshold=320, threshold_name="Llama 3 70B, 8 heads, KiB:",
                title="Half the key heads, half the cache: queries do not count")
plotting.show("Cache bytes a token against the number of key heads: a straight line, "
              "with a mark at 320 KiB for eight heads.")

# %% [markdown]
# ## Exercises left
#
# 1. `train_grouped(GroupedQueryAttention, 1, seed=1)`, and with 2 and 8 heads: does the order of the three stay?
# 2. Which layer of SmolLM2 can do with one key head? (8.8 has three of thirty.)
# 3. Give MQA the cache of GQA-2 back as width: at the same cache bytes, is one wide head better than two?
# 4. Write the backward pass of `grouped_attention`. Which gradient is a sum over a group?

# %% [markdown]
# ## Quiz

# %% [markdown] tags=["quiz"]
# **1.** 40 layers, 32 heads of queries on 4 heads of keys and values, each of width 128, two bytes a number. How many KiB
# of cache does one token take?
#
# - a) 40
# - b) 640
# - c) 160
# - d) 80

# %% tags=["quiz"]
from utils import quiz

one_token, none_yet = (np.zeros((2, 4, count, 128), np.float16) for count in (1, 0))
asker = np.zeros((32, 1, 128), np.float16)
_, kept_k, kept_v = grouped_step(asker, *one_token, *none_yet)
quiz.answer({"a": 40, "b": 640, "c": 160, "d": 80},
            40 * (kept_k.nbytes + kept_v.nbytes) / 1024,
            "Keys and values of 4 heads; 8 is the size of a group, not their number.")

# %% [markdown] tags=["quiz"]
# **2.** 8 heads of queries on 2 of keys, trained with `repeat_interleave`. By mistake `repeat` is called. How many of the
# 8 heads still ask the right keys?
#
# - a) one
# - b) two
# - c) four
# - d) all eight

# %% tags=["quiz"]
two_heads = torch.arange(2)
agreeing = int((two_heads.repeat_interleave(4) == two_heads.repeat(4)).sum())
quiz.answer({"a": 1, "b": 2, "c": 4, "d": 8}, agreeing,
            "Heads 0, 2, 5 and 7: a test that looks at the first head sees no error.")

# %% [markdown] tags=["quiz"]
# **3.** A prompt is read by 32 heads of queries on 8 heads of keys. Compared with 32 heads of keys, how many scores are
# computed?
#
# - a) an eighth as many
# - b) as many
# - c) a quarter as many
# - d) a sixteenth as many

# %% tags=["quiz"]
asking = np.zeros((32, 10, 16))
scores_of = {n: (asking.reshape(n, -1, 10, 16) @ np.zeros((n, 1, 16, 10))).size
             for n in (8, 32)}
quiz.answer({"a": 1 / 8, "b": 1, "c": 1 / 4, "d": 1 / 16}, scores_of[8] / scores_of[32],
            "Each query head has a row of its own; only keys and values are shared.")

# %% [markdown] tags=["quiz"]
# **4.** A model has 8 heads of queries on 2 of keys. Its code calls `repeat_interleave` on new keys and values, puts the
# result into the cache, and attends to that. What does this change?
#
# - a) the cache is four times as large
# - b) the output is wrong
# - c) the output is wrong, and the cache larger
# - d) nothing: a repeated head is a view

# %% tags=["quiz"]
asked, fresh = torch.randn(1, 8, 1, 16), torch.randn(1, 2, 5, 16)
stored = fresh.repeat_interleave(4, dim=1)
heard = [grouped_query_attention_torch(asked, each, each) for each in (stored, fresh)]
same_output = torch.allclose(*heard, atol=1e-5)
growth = stored.untyped_storage().nbytes() / fresh.untyped_storage().nbytes()
quiz.answer({"a": (True, 4), "b": (False, 1), "c": (False, 4), "d": (True, 1)},
            (same_output, growth), "A test of the output does not find it.")

# %% [markdown] tags=["quiz"]
# **5.** Decoding, 32 heads of queries on 4 of keys, two bytes a number, 64 texts at once. How many operations (each
# multiplication and each addition counts) are there for each byte of cache?
#
# - a) 1
# - b) 64
# - c) 512
# - d) 8

# %% tags=["quiz"]
texts_at_once = np.zeros((64, 2, 4, 100, 16), np.float16)  # keys, values; 100 tokens
operations = 64 * 32 * 100 * 4 * 16  # texts, query heads, keys; two products of 16
quiz.answer({"a": 1, "b": 64, "c": 512, "d": 8}, operations / texts_at_once.nbytes,
            "As many as heads share a key; each text brings a cache of its own.")

# %% [markdown]
# ## Going further
#
# Short sections, each alone, in any order.

# %% [markdown]
# ### 8.8 Which layers need their heads?
#
# **Does every layer of SmolLM2 need three key heads?** Section 8.4 merged many at once. Here one layer at a time.
#
# *Predict.* Where is it cheapest: first, middle or last layer?

# %% tags=["language-model"]
if smollm:
    layers = (0, 15, 29)
    before = at_once["three heads"]
    costs = {way: [loss_of(merged_model(way, [i])) - before for i in layers]
             for way in ("mean", "aligned mean")}
    for way, row in costs.items():
        shown = (f"layer {i} {cost:+.2f}" for i, cost in zip(layers, row))
        print(f"{way:12s}", " ".join(shown))
    plotting.curves(costs, x=layers, xlabel="layer with one key head",
                    ylabel="loss above the model's (nats)",
                    title="The first layer needs its heads most")
    plotting.show("Two lines of extra loss for three single layers: largest in layer "
                  "0, where the aligned mean is far below the mean; near 0 elsewhere.")

# %% [markdown]
# In the middle. The first layer is the dearest; aligned, it costs a small part of what the mean costs. The others can be merged
# almost for nothing, one at a time.

# %% [markdown]
# ### 8.9 Sharing across layers
#
# **If neighbouring heads can share, why not neighbouring layers?** *Cross-layer attention* (Brandon et al. 2024, arXiv
# 2405.12981) lets a layer use the keys and values of the layer below. In Gemma 3n the last 15 of 35 layers compute none
# of their own (`num_kv_shared_layers` in its configuration). The saving multiplies with that of grouping.
#
# #### Exercise 8G: the cache of each device  (difficulty 2 of 5, extra, 10 minutes)
#
# |argument|meaning|
# |---|---|
# |`n_layers`, `n_kv_heads`, `d_head`|sizes of the model|
# |`n_devices`|over how many devices the heads are dealt out|
# |`n_shared_layers`|layers that store nothing, because they use another one's cache|
# |`n_bytes`|bytes of a number|
#
# Returns the bytes that *one* token takes on *each* device, an integer. Where there are more devices than key heads, heads
# are copied. ValueError unless one of the two numbers divides the other.
#
# <details><summary>Hint</summary>
#
# How many key heads has each of 4 devices, if there are 8? If there is 1? Which function of Python gives both?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def cache_per_device(n_layers, n_kv_heads, d_head, n_devices=1, n_shared_layers=0,
                     n_bytes=2):
    """Bytes of keys and values that one token takes on each of n_devices devices.

    n_shared_layers store nothing. With more devices than heads, heads are copied.
    Returns an integer. ValueError unless n_kv_heads and n_devices divide one another.
    """
    if n_kv_heads < 1 or n_devices < 1:
        raise ValueError("n_kv_heads and n_devices must be at least 1, "
                         f"got {n_kv_heads} and {n_devices}")
    ### BEGIN SOLUTION
    if n_kv_heads % n_devices and n_devices % n_kv_heads:
        raise ValueError("one of n_kv_heads and n_devices must divide the other, "
                         f"got {n_kv_heads} and {n_devices}")
    heads = max(1, n_kv_heads // n_devices)
    return 2 * (n_layers - n_shared_layers) * heads * d_head * n_bytes
    ### END SOLUTION

# %%
cache_per_device = check("8G", cache_per_device)

# %%
gemma = {"its 8 query heads, all layers": cache_per_device(35, 8, 256),
         "2 key heads": cache_per_device(35, 2, 256),
         "and 15 layers that share": cache_per_device(35, 2, 256, n_shared_layers=15)}
plotting.bars({name: size / 1024 for name, size in gemma.items()}, ylabel="KiB a token",
              title="Gemma 3n: groups save a factor of 4, shared layers 1.75 more")
plotting.show("Three bars of cache for a token: 280 KiB with all heads, 70 with two, "
              "40 when fifteen layers share.")

# %% [markdown]
# ### 8.10 A key that is its own value
#
# **What else can be read once and used twice?** If the values are the keys, half of the bytes go, and each byte does
# twice the work (*grouped-tied attention*, arXiv 2505.21487). Multi-head latent attention (lecture 09) does it with one
# vector of 512 numbers that serves 128 heads, with 64 more for the key alone.

# %%
table = {"MHA": 1, "groups of 4": 4, "groups of 8": 8, "groups of 8, key = value": 16,
         "MQA, 128 heads": 128, "MLA, 128 heads": 128 * 2 * (576 + 512) / (576 * 2)}
for name, intensity_of in table.items():
    print(f"{name:25s} {intensity_of:5.1f} FLOP a byte (ridge of an A100: 201)")

# %% [markdown]
# Only the last passes the ridge: it has made decoding a matter of arithmetic.

# %% [markdown]
# ### 8.11 Where the gradients of a shared head come from
#
# **How does a shared key head learn?** In section 8.2 a GQA layer was a multi-head layer with tied heads. So the gradient
# of a shared head is the **sum** of the gradients that its copies would get: it learns for all its queries at once.

# %%
q_, k_, v_ = (torch.from_numpy(a).requires_grad_() for a in (q, k, v))
grouped_query_attention_torch(q_, k_, v_).square().sum().backward()
copies = torch.from_numpy(np.repeat(k, 3, axis=0)).requires_grad_()
values = torch.from_numpy(np.repeat(v, 3, axis=0))
again = grouped_query_attention_torch(torch.from_numpy(q), copies, values)
again.square().sum().backward()
summed = copies.grad.unflatten(0, (3, 3)).sum(1)
print(f"norm of the shared gradient {k_.grad.norm():.2f}, of the sum over copies "
      f"{summed.norm():.2f}, difference {(summed - k_.grad).abs().max():.6f}")

# %% [markdown]
# ## Behind the scenes
#
# **The triple**: `grouped_query_attention_numpy`, `_torch` and `_cuda`, and the checks that they share. The first two make a
# group's heads the rows of one head (section 8.5), and ask lecture 01.

# %%
import copy
import functools

from attention.fundamentals import attention_torch
from attention.kv_cache import KVCache, merge_kernel
from attention.multi_head import TransformerConfig, TransformerLM
from attention.rotary import Rotary
from torch.utils._python_dispatch import TorchDispatchMode
from utils import cuda

# %% tags=["export", "plumbing"]
def check_grouped_arguments(q, k, v, mask=None):
    """Raise ValueError, in one sentence, unless grouped heads and a mask fit together. For arrays and tensors.

    Returns the leading axes (those before the heads), broadcast together.
    """
    cuda.check_numbers(q=q, k=k, v=v)
    for name, array in (("q", q), ("k", k), ("v", v)):
        if len(array.shape) < 3:
            raise ValueError(f"{name} must have at least three axes (heads, seq, d_head), got shape "
                             f"{tuple(array.shape)}")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ValueError(f"q and k must have the same d_head of at least 1, got {q.shape[-1]} and {k.shape[-1]}")
    if tuple(k.shape[-3:-1]) != tuple(v.shape[-3:-1]):
        raise ValueError("k and v must have the same heads and n_keys, got "
                         f"{tuple(k.shape[-3:-1])} and {tuple(v.shape[-3:-1])}")
    heads, kv_heads = q.shape[-3], k.shape[-3]
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"the heads of q must be a multiple of those of k and v, got {heads} and {kv_heads}")
    axes = [tuple(a.shape[:-3]) for a in (q, k, v)]
    try:
        lead = np.broadcast_shapes(*axes)
    except ValueError:
        got = f"{axes[0]}, {axes[1]} and {axes[2]}"
        raise ValueError(f"the leading axes of q, k and v must broadcast, got {got}") from None
    if mask is not None:
        full = (*lead, heads, q.shape[-2], k.shape[-2])
        kind = getattr(mask, "dtype", type(mask).__name__)
        if "bool" not in str(kind):
            raise ValueError(f"mask must be boolean with True = may attend, got {kind}")
        try:
            fits = np.broadcast_shapes(tuple(mask.shape), full) == full
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"mask must broadcast to {full}, got shape {tuple(mask.shape)}")
    return lead

def as_rows(q, kv_heads, lead):
    """q (..., heads, n_queries, d), broadcast to the leading axes, as (..., kv_heads, rows of a group, d)."""
    heads, n_queries, d = q.shape[-3:]
    rows = heads // max(kv_heads, 1) * n_queries
    full = (*lead, heads, n_queries, d)
    q = torch.broadcast_to(q, full) if isinstance(q, torch.Tensor) else np.broadcast_to(q, full)
    return q.reshape(*lead, kv_heads, rows, d)

def allowed_rows(mask, causal, shape, kv_heads):
    """A mask for such rows, as array or tensor like `mask` (an array without one), or None where all is allowed.

    shape: (heads, n_queries, n_keys), which the last three axes of the mask broadcast to.
    """
    heads, n_queries, n_keys = shape
    allowed = causal_mask(n_queries, n_keys) if causal else None
    if mask is None:
        return None if allowed is None else np.tile(allowed, (heads // max(kv_heads, 1), 1))
    if isinstance(mask, torch.Tensor):
        if causal:
            mask = mask & torch.from_numpy(allowed).to(mask.device)
        full = mask.expand(*mask.shape[:-3], *shape)
    else:
        full = np.broadcast_to(mask & allowed if causal else mask, (*mask.shape[:-3], *shape))
    return full.reshape(*full.shape[:-3], kv_heads, heads // max(kv_heads, 1) * n_queries, n_keys)

# %% tags=["export", "plumbing"]
def grouped_query_attention_numpy(q, k, v, mask=None, causal=False, scale=None):
    """Attention of query heads that share heads of keys and values, in NumPy.

    q (..., n_heads, n_queries, d_head), k (..., n_kv_heads, n_keys, d_head), v (..., n_kv_heads, n_keys, d_v), leading
    axes broadcast; n_heads is a multiple of n_kv_heads, and query head i uses key head i // (n_heads // n_kv_heads).
    mask boolean, True = may attend, broadcastable to (..., n_heads, n_queries, n_keys); causal is aligned at the bottom
    right; scale defaults to 1/sqrt(d_head). Returns (..., n_heads, n_queries, d_v) in the float type of q; a query with
    nothing to attend to gets zeros. No key is copied for the heads of its group. ValueError when shapes or mask do not
    fit, TypeError for anything but arrays. Source: Ainslie et al. 2023 (arXiv 2305.13245), section 2.2.
    """
    lead = check_grouped_arguments(q, k, v, mask)
    cuda.check_kind(np.ndarray, q=q, k=k, v=v)
    mask = mask.numpy() if isinstance(mask, torch.Tensor) else mask
    allowed = allowed_rows(mask, causal, (*q.shape[-3:-1], k.shape[-2]), k.shape[-3])
    out = attention_numpy(as_rows(q, k.shape[-3], lead), k, v, allowed, scale=scale)
    return out.reshape(*lead, *q.shape[-3:-1], v.shape[-1])

def grouped_query_attention_torch(q, k, v, mask=None, causal=False, scale=None):
    """grouped_query_attention_numpy in PyTorch: same arguments, shapes and errors, differentiable.

    Half precision is computed in single and returned in the type of q.
    """
    lead = check_grouped_arguments(q, k, v, mask)
    cuda.check_kind(torch.Tensor, q=q, k=k, v=v)
    mask = torch.from_numpy(mask) if isinstance(mask, np.ndarray) else mask
    allowed = allowed_rows(mask, causal, (*q.shape[-3:-1], k.shape[-2]), k.shape[-3])
    out = attention_torch(as_rows(q, k.shape[-3], lead), k, v, allowed, scale=scale)
    return out.reshape(*lead, *q.shape[-3:-1], v.shape[-1])

# %% [markdown]
# **The kernel's launch**, and the bytes of keys and values that it reads.

# %% tags=["export", "plumbing"]
GROUP_TILE_KEYS = 16                                        # as KEYS in GROUP_TILE
GROUP_WARPS = 32                                            # the most warps of a block
GROUP_SPLIT = 128                                           # keys of a block where there are few queries

def cache_type(*caches):
    """The C++ and the torch type in which a kernel reads caches: as they are stored, or single precision."""
    names = {str(cuda.float_type(cache)).removeprefix("torch.") for cache in caches}
    if len(names) == 1:
        return {"float16": ("half", torch.float16), "bfloat16": ("__nv_bfloat16", torch.bfloat16)}.get(
            names.pop(), ("float", torch.float32))
    return "float", torch.float32

HALF_HEADERS = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
"""

@functools.cache
def grouped_kernel(element, columns):
    """The kernel for a type of keys and values and so many columns a lane, compiled on first use."""
    source = GROUPED_SPLIT if element == "float" else HALF_HEADERS + GROUPED_SPLIT
    return cuda.compile(source, name="grouped_split", template=(element, columns))

def grouped_launch(q, k, v, mask=None, causal=False, scale=None, warps=GROUP_WARPS):
    """What launches the kernel: kernel, (grid, block, shared bytes), arguments. A block has at most `warps` rows.

    The fifth and sixth argument are the outputs of the splits (rows, n_splits, d_v) and their log-sum-exps, to be
    written. Where more than 64 rows share a head of keys there is one split.
    """
    lead = check_grouped_arguments(q, k, v, mask)
    heads, n_queries, d = q.shape[-3:]
    kv_heads, n_keys, d_v = v.shape[-3:]
    element, dtype = cache_type(k, v)
    k, v = cuda.on_device(k, v, dtype=dtype)
    q = cuda.on_device(q)[0].to(k.device).expand(*lead, heads, n_queries, d).contiguous()
    k, v = (a.expand(*lead, *a.shape[-3:]).contiguous() for a in (k, v))
    allowed = q.new_zeros(1, dtype=torch.uint8)
    if mask is not None:
        mask = mask if isinstance(mask, torch.Tensor) else torch.from_numpy(np.array(mask))
        allowed = mask.to(q.device).expand(*lead, heads, n_queries, n_keys).to(torch.uint8).contiguous()
    groups, rows = math.prod(lead) * kv_heads, heads // max(kv_heads, 1) * n_queries
    split = GROUP_SPLIT if rows <= 64 else max(n_keys, 1)
    n_splits, n_blocks, columns = -(-n_keys // split), -(-rows // warps), -(-max(d, d_v) // 32)
    outs = q.new_zeros(groups * rows, n_splits, d_v)
    lses = q.new_full((groups * rows, n_splits), -math.inf, dtype=torch.float64)
    launch = (groups, n_blocks, n_splits), (32, -(-rows // max(n_blocks, 1))), 2 * 4 * GROUP_TILE_KEYS * 32 * columns
    scale = 1 / math.sqrt(d) if scale is None else float(scale)
    arguments = (q, k, v, allowed, outs, lses, rows, n_queries, n_keys, d, d_v, split, int(mask is not None),
                 int(causal), scale)
    return grouped_kernel(element, columns), launch, arguments

# %% tags=["export", "plumbing"]
@cuda.skip_unseen
def grouped_query_attention_cuda(q, k, v, mask=None, causal=False, scale=None):
    """grouped_query_attention_numpy by CUDA kernels: a head of keys and values is read once for up to 32 of its rows.

    q (..., heads, n_queries, d_head), k (..., n_kv_heads, n_keys, d_head), v (..., n_kv_heads, n_keys, d_v), leading
    axes broadcast; heads is a multiple of n_kv_heads, and head i uses key head i // (heads // n_kv_heads); mask
    boolean, broadcastable to (..., heads, n_queries, n_keys); causal is aligned at the bottom right; scale defaults to
    1/sqrt(d_head). NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU. Contiguous keys and values in
    float32, float16 or bfloat16 are read in place, others are copied to float32. Computed in single precision. Returns
    (..., heads, n_queries, d_v) in the kind and type of q; a query with nothing to attend to gets zeros. Not
    differentiable. Made for few queries: for a prompt the kernel of lecture 06 does less work. d_head and d_v up to 384
    with 48 KB of shared memory. Raises ValueError when shapes or mask do not fit.
    Source: Ainslie et al. 2023 (arXiv 2305.13245).
    """
    kernel, launch, arguments = grouped_launch(q, k, v, mask, causal, scale)
    outs, lses = arguments[4:6]
    rows, n_splits, d_v = outs.shape
    out = outs.new_zeros(rows, d_v)
    if outs.numel():
        kernel.fast[launch](*arguments)
        if n_splits == 1:
            out = outs
        else:
            merge_kernel().fast[rows, 32, 4 * n_splits](outs, lses, out, n_splits, d_v)
    return cuda.like(out.reshape(*arguments[0].shape[:-1], d_v), q)

def grouped_bytes(heads, kv_heads, n_queries, n_keys, d, d_v, causal=False, itemsize=4, warps=GROUP_WARPS):
    """Bytes of keys and values that the kernel reads for one sequence, exactly. itemsize: of a key's entry.

    Each row of K and V is read once by each block of up to `warps` rows of the group that may see it.
    """
    rows = heads // kv_heads * n_queries
    blocks = -(-rows // warps)
    share = -(-rows // blocks)
    keys = 0
    for first in range(0, rows, share):
        last = min(first + share, rows) - 1
        latest = last % n_queries if first // n_queries == last // n_queries else n_queries - 1
        keys += max(0, latest + 1 + n_keys - n_queries) if causal else n_keys
    return kv_heads * keys * (d + d_v) * itemsize

# %% [markdown]
# **Merging.** Keys can be turned within the pairs of RoPE only; the best angle of a pair is that of a sum of complex numbers.

# %% tags=["export", "plumbing"]
def merge_kv_heads(w, n_heads, n_kv_heads, how="mean"):
    """A projection w (d_model, n_heads * d_head), array or tensor, to n_kv_heads heads: the mean or the first of a group.

    Returns (d_model, n_kv_heads * d_head). ValueError unless n_kv_heads divides n_heads, n_heads the columns of w, and
    how is "mean" or "first". Source: Ainslie et al. 2023 (arXiv 2305.13245), section 2.1.
    """
    if n_heads < 1 or n_kv_heads < 1 or w.shape[-1] % n_heads or n_heads % n_kv_heads:
        raise ValueError("n_kv_heads must divide n_heads, and n_heads the columns of w, "
                         f"got {n_kv_heads}, {n_heads} and {w.shape[-1]}")
    if how not in ("mean", "first"):
        raise ValueError(f'how must be "mean" or "first", got {how!r}')
    groups = w.reshape(len(w), n_kv_heads, n_heads // n_kv_heads, w.shape[-1] // n_heads)
    merged = groups.mean(2) if how == "mean" else groups[:, :, 0]
    return merged.reshape(len(w), -1)

def turn_pairs(x, angles):
    """Turn columns i and i + d / 2 of x (..., d), an array, by angles (d / 2,)."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)

def align_keys(k, w_k, w_q, n_kv_heads):
    """Turn the key heads of each group onto its first one, pair by pair of RoPE, and average them. NumPy.

    k (n_heads, n_tokens, d_head), rotated or not, w_k (n_heads, d_model, d_head), w_q (n_heads, d_in, d_head): of the
    queries of each head. Returns (merged (n_kv_heads, d_model, d_head), w_q turned in the same way).
    """
    group, half = len(k) // n_kv_heads, k.shape[-1] // 2
    merged, turned = np.zeros((n_kv_heads, *w_k.shape[1:])), np.zeros(w_q.shape)
    pairs = k[..., :half] + 1j * k[..., half:]
    for h in range(len(k)):
        angles = np.angle((pairs[h].conj() * pairs[h // group * group]).sum(0))
        merged[h // group] += turn_pairs(w_k[h], angles) / group
        turned[h] = turn_pairs(w_q[h], angles)
    return merged, turned

# %% tags=["export", "plumbing"]
class _NewStorage(TorchDispatchMode):
    """Counts the bytes of memory that operations make; views make none."""

    def __init__(self):
        super().__init__()
        self.kept, self.n_bytes = {}, 0  # kept: so that no address is used twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._note(args, given=True)
        result = function(*args, **(kwargs or {}))
        self._note(result if isinstance(result, (tuple, list)) else (result,), given=False)
        return result

    def _note(self, things, given):
        for thing in things:
            if isinstance(thing, torch.Tensor):
                storage = thing.untyped_storage()
                if storage.data_ptr() not in self.kept:
                    self.kept[storage.data_ptr()] = storage
                    self.n_bytes += 0 if given else storage.nbytes()

def new_bytes(function, *tensors):
    """Bytes of memory that PyTorch's operations make inside function(*tensors), results included."""
    with _NewStorage() as counted:
        function(*tensors)
    return counted.n_bytes

# %% [markdown]
# **The small language models** of 8.4, trained in double precision on the course's prose, and their conversion.

# %% tags=["export", "plumbing"]
@functools.cache
def characters():
    """The prose, read once."""
    return data.characters()

def batches(seed):
    """Endless batches (16, 33) of stretches of the corpus."""
    return training.windows(characters().corpus, 32, 16, seed)

def grouped_lm(layer, n_kv_heads, d_ff=256):
    """A language model of characters: two layers of width 64, 8 query heads on n_kv_heads; layer: the attention's class."""
    config = TransformerConfig(len(characters().alphabet), 64, 8, 2, d_ff)

    def attention(config, _, positions):
        return layer(config.d_model, config.n_heads, n_kv_heads, positions)

    return TransformerLM(config, attention, Rotary(config.d_head)).double()

def train_grouped(layer, n_kv_heads, seed=0, steps=300):
    """Trained; what is saved in keys and values goes into the feed-forward part, so that all have as many parameters."""
    model = grouped_lm(layer, n_kv_heads, d_ff=256 + 8 * (8 - n_kv_heads))
    training.fit(training.initialise(model, seed), batches(seed), training.next_token_loss, steps, lr=8e-3)
    return model

@torch.no_grad()
def held_out_loss(model):
    """Mean loss on 128 stretches of 32 characters that were not trained on."""
    return float(training.next_token_loss(model, characters().held_out[: 128 * 33].view(128, 33)))

def pair_loss():
    """The loss of a table of character pairs of the corpus, on the same text: the control."""
    size = len(characters().alphabet)
    corpus, text = characters().corpus, characters().held_out[: 128 * 33].view(128, 33)
    table = torch.full((size, size), 0.01, dtype=torch.float64)
    ones = torch.ones(len(corpus) - 1, dtype=torch.float64)
    table.index_put_((corpus[:-1], corpus[1:]), ones, accumulate=True)
    return float(-(table / table.sum(1, keepdim=True)).log()[text[:, :-1], text[:, 1:]].mean())

# %% tags=["export", "plumbing"]
def split_weight(w, n_heads):
    """A projection (d_in, n_heads * d_head), tensor, as an array (n_heads, d_in, d_head)."""
    return w.detach().double().unflatten(-1, (n_heads, -1)).movedim(1, 0).numpy()

def join_weight(w, like):
    """The inverse: an array (n_heads, d_in, d_head) as a tensor (d_in, n_heads * d_head), in the type of `like`."""
    return torch.from_numpy(np.concatenate(list(w), axis=-1)).to(like.dtype)

def merged_weights(weights, n_heads, n_kv_heads, way, cached, seed=5):
    """The four matrices {"w_q", ...} of a layer with n_heads key heads, as those of one with n_kv_heads.

    way: "mean", "first head", "random" or "aligned mean"; cached: its keys and values on some text, (n_heads, n_tokens,
    d_head) arrays, which aligning looks at. The heads of queries may be a multiple of n_heads.
    """
    new = dict(weights)
    if way == "random":
        rng = np.random.default_rng(seed)
        for name in ("w_k", "w_v"):
            rows, columns = weights[name].shape
            drawn = rng.uniform(-(rows**-0.5), rows**-0.5, (rows, columns // n_heads * n_kv_heads))
            new[name] = torch.from_numpy(drawn).to(weights[name].dtype)
    elif way == "aligned mean":
        d_head = weights["w_k"].shape[1] // n_heads
        queries = split_weight(weights["w_q"], n_heads * (share := weights["w_q"].shape[1] // weights["w_k"].shape[1]))
        queries = queries.reshape(n_heads, -1, d_head)  # all queries of a key head, one below the other
        out = weights["w_o"].detach().double().numpy().reshape(n_heads, share, d_head, -1)
        out = np.concatenate(list(out.swapaxes(0, 1)), axis=-1)  # and all their outputs, side by side
        keys, queries = align_keys(cached[0], split_weight(weights["w_k"], n_heads), queries, n_kv_heads)
        values, out = aligned_merge(cached[1], split_weight(weights["w_v"], n_heads), out, n_kv_heads)
        out = np.stack(np.split(out, share, axis=-1), axis=1).reshape(weights["w_o"].shape)
        queries = queries.reshape(n_heads * share, -1, d_head)
        new = {"w_k": join_weight(keys, weights["w_k"]), "w_v": join_weight(values, weights["w_v"]),
               "w_q": join_weight(queries, weights["w_q"]), "w_o": torch.from_numpy(out).to(weights["w_o"].dtype)}
    else:
        how = {"mean": "mean", "first head": "first"}[way]
        new |= {name: merge_kv_heads(weights[name], n_heads, n_kv_heads, how) for name in ("w_k", "w_v")}
    return {name: w.detach().clone() for name, w in new.items()}

@torch.no_grad()
def convert(model, layer, n_kv_heads, way):
    """A model of grouped_lm with 8 key heads as one with n_kv_heads; way as in merged_weights."""
    new = grouped_lm(layer, n_kv_heads)
    caches = [KVCache(16, 8, 32, 8) for _ in model.blocks]
    model(characters().corpus[:512].view(16, 32), caches=caches)
    state = model.state_dict()
    for i, cache in enumerate(caches):
        names = {name: f"blocks.{i}.attention.{name}" for name in ("w_q", "w_k", "w_v", "w_o")}
        seen = [cached.transpose(0, 1).flatten(1, 2).numpy() for cached in (cache.k, cache.v)]
        merged = merged_weights({name: state[full] for name, full in names.items()}, 8, n_kv_heads, way, seen)
        state |= {names[name]: w for name, w in merged.items()}
    new.load_state_dict(state)
    return new

# %% [markdown]
# **Merged heads in the real model.** Token 0 of the text is left out: it is unlike all others (lecture 05 shows it).

# %% tags=["export", "plumbing"]
@torch.no_grad()
def caches_of(model, ids):
    """For each layer of a language model its keys and values on ids (1, n): arrays (n_kv_heads, n - 1, d_head)."""
    caches = model.new_caches()
    model.hidden(ids, caches=caches)
    return [[kept[0, :, 1:].double().numpy() for kept in (cache.k, cache.v)] for cache in caches]

def merged_layer(attention, cached, way):
    """A copy of a language model's attention with one key head; its merged w_k and w_v ask for gradients."""
    weights = {name: getattr(attention, name) for name in ("w_q", "w_k", "w_v", "w_o")}
    n_kv_heads = len(cached[0])
    new = copy.deepcopy(attention)
    for name, w in merged_weights(weights, n_kv_heads, 1, way, cached).items():
        setattr(new, name, nn.Parameter(w, requires_grad=name in ("w_k", "w_v")))
    return new

def with_layers(model, attentions):
    """A language model on the same weights, with other attentions: {layer: module}."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    blocks = []
    for i, block in enumerate(model.blocks):
        if i in attentions:
            block = copy.copy(block)
            block._modules = dict(block._modules) | {"attention": attentions[i]}
        blocks.append(block)
    other.blocks = nn.ModuleList(blocks)
    return other

# %% [markdown]
# ## Glossary
#
# |term|what it is|
# |---|---|
# |aligned merge|heads are turned onto one another before they are averaged|
# |arithmetic intensity|operations for each byte read|
# |cross-layer attention|layers that use another layer's keys and values|
# |GQA, grouped-query attention|groups of query heads, each with one head of keys and values|
# |group|the query heads that share a head of keys and values|
# |key head, KV head|a head of keys with its values: what a cache holds|
# |mean pooling|the average of the projections of a group|
# |MHA, multi-head attention|as many key heads as query heads|
# |MQA, multi-query attention|one key head for all query heads|
# |Procrustes|the rotation that brings one set of vectors closest to another|
# |tensor parallelism|heads dealt out over devices|
# |uptraining|training on after a conversion, for a small part of the first training|
#
# ## Sources
#
# Shazeer 2019, multi-query attention (arXiv 1911.02150) · Ainslie et al. 2023, GQA (2305.13245): § 2.1 conversion, § 2.2
# groups, table 1, figure 4, appendix A · Jin et al. 2024, Align attention heads before merging them (2412.20677) · Brandon
# et al. 2024, cross-layer attention (2405.12981) · Zadouri et al. 2025, tied keys and values (2505.21487) · DeepSeek-AI
# 2024, multi-head latent attention (2405.04434) · Allal et al. 2025, SmolLM2 (2502.02737) · configurations: the classes
# `LlamaConfig`, `MistralConfig`, `FalconConfig`, `GptOssConfig` and `Gemma3nTextConfig` of transformers 5.23, the model
# card of Llama 3 70B · vLLM, `Gemma3Attention` (docs, version 0.15), for the rule of copied heads.
