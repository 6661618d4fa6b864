# ---
# jupyter:
#   course:
#     edition: 2
#     experiments:
#     - SlowMemory
#     - algorithm_0
#     - algorithm_2
#     - kept_bytes
#     - ladder_counts
#     - naive_bytes
#     - peak_bytes
#     - pairs_of_work
#     - with_dropout
#     - keep_mask
#     - schedule
#     - WeighedRecall
#     - recall_losses
#     module: flash
#     public:
#     - flash_attention_numpy
#     - flash_attention_torch
#     - flash_attention_cuda
#     - flash_attention_backward_numpy
#     - flash_attention_backward_torch
#     - flash_attention_backward_cuda
#     - online_softmax
#     - merge_by_lse
#     - ring_attention_numpy
#     - ring_attention
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["slide"]
# # Lecture 06 · Flash attention
#
# **The question.** The matrix of attention weights is needed for a moment only. Must it ever exist? **You will be able to**
# *write* attention that holds one tile of it (6A, 6B), *find* the bug in such a loop (6C), *compute* gradients without it
# (6D), *pack* texts of all lengths into one batch (6E), *deal* the loop out to a GPU's threads (6F), *merge* the parts of a
# row, around a ring of machines too (6G, 6H).
# **You need** attention, its gradient and the bytes of its kernels (lecture 01), heads (lecture 02).
#
# | part or section | core minutes | more minutes |
# |---|---|---|
# | Part 1 · where the bytes go: 6.1 | 15 | |
# | Part 2 · NumPy: 6.2, 6.3, exercises 6A, 6B | 70 | |
# | Part 3 · PyTorch: 6.4, exercise 6D | 46 | |
# | Part 4 · CUDA: 6.5 | 15 | |
# | Part 5 · does it matter: 6.6 to 6.8, exercise 6G | 34 | |
# | Another day: exercises 6C, 6E, 6F, 6H | | 75 |
# | Going further: 6.9 to 6.18 | | 60 |
# | **together** | **180** | **135** |

# %% [markdown] tags=["teacher"]
# **For the teacher: two times 50 minutes.** Run everything before class.
#
# - *Hour 1 (40).* 6.1: the row of five, the bytes of three kernels, guess the factor first (8) · 6.2: one score at a time, on
#   the board, then the start at $10^{-30}$ (9) · 6.2: three steps of tiles, the flow figure, what 6A and 6B ask (11) · 6.2:
#   peak memory, the model's next tokens (6) · 6.3: twice the fast memory (6).
# - *At home after hour 1.* 6A, 6B. For volunteers 6C.
# - *Hour 2 (40).* 6.4: which tiles a mask skips (5) · 6.4: the log-sum-exp and $D$, derived on the board, what 6D asks (11)
#   · 6.5: the two orders of the loops, who moves less? (7) · 6.5: the ladder, guess each longest bar (7) · 6.7: two halves
#   of a row, the ring, contiguous and striped (10).
# - *At home after hour 2.* 6D, 6G. For volunteers 6E, 6F, 6H.
# - *Board.* $m'=\max(m,s)$, $\ell'=\ell\,e^{m-m'}+e^{s-m'}$, $O'=O\,e^{m-m'}+e^{s-m'}v$; the five scores under it.
# - *Always works.* In 6.2 let the class keep $m$, $\ell$ and $O$ of the five scores by hand, one pupil a letter.
# - *Checkpoint 1.* A tile brings a maximum that is lower than the old one: what is rescaled? (Nothing: the factor is 1.)
#   *Checkpoint 2.* What does the backward pass need beside Q, K, V, O and dO? (One number a row, the log-sum-exp.)
# - *Skip first.* The table of loop orders in 6.5 (7), then 6.3 (6): both read well at home.
# - *Questions that come.* Is it an approximation? No: the same numbers are added in another order. Why does more arithmetic
#   take less time? The arithmetic units were waiting. Does it make decoding faster? No, section 6.6.

# %%
import math
import os
import sys

sys.path.insert(0, "." if os.path.exists("course.py") else "..")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from utils import cuda, plotting
from utils.check import check

torch.set_num_threads(1)
rng = np.random.default_rng(0)

# %% [markdown]
# ## Part 1 · Where the bytes go
#
# ### 6.1 IO-aware computation
#
# **Which part of attention takes the time?** One query has scored five keys, and mixes five values. The number at the end is
# the one that every rewrite has to find again.

# %% tags=["first-attention"]
row_scores = np.array([1.0, 2.0, 0.5, 5.0, 4.0])
row_values = np.array([10.0, 20.0, 30.0, 40.0, 50.0])
maximum = row_scores.max()  # pass 1
total = np.exp(row_scores - maximum).sum()  # pass 2
row_weights = np.exp(row_scores - maximum) / total  # pass 3
print(f"maximum {maximum:.1f}, sum {total:.4f}, output {row_weights @ row_values:.3f}")

# %% [markdown]
# **41.398.** For one row nobody minds three passes. With $n$ queries the scores are a matrix of $n\times n$ numbers, too
# large to stay near the arithmetic. A GPU has several memories: the large one is slow, the fast ones are small.
#
# | | A100 | H100 | who sees it |
# |---|---|---|---|
# | registers | 256 KB a multiprocessor | 256 KB | one thread |
# | shared memory (the papers: SRAM) | up to 164 KB a multiprocessor | up to 228 KB | one block of threads |
# | L2 cache | 40 MB | 50 MB | the whole GPU |
# | HBM: the global memory | 40 or 80 GB | 80 GB | the whole GPU |
#
# An A100 has 108 multiprocessors and reads 1.5 to 2.0 TB a second from HBM, and about 19 TB a second from all its shared
# memories together (Dao et al. 2022, arXiv 2205.14135, figure 1). What is fetched should be used often before it is dropped.
#
# *Predict.* The three kernels of lecture 01 (scores, softmax, blend) get twice as many tokens. By which factor do the bytes
# grow that they move through global memory?

# %% tags=["slide"]
from attention.experiments.flash import naive_bytes

lengths = [16, 32, 64, 128, 256]
moved = [naive_bytes(n, d=32) for n in lengths]  # counted: each sector once a kernel
for n, count in zip(lengths, moved):
    formula = 4 * (4 * n * n + 4 * n * 32)
    print(f"n = {n:3d}: {count:9,} bytes, 4 (4 n n + 4 n d) = {formula:9,}, "
          f"of them the matrix {16 * n * n / formula:.0%}")
plotting.curves({"naive": moved, "Q, K, V and output": [16 * n * 32 for n in lengths]},
                x=lengths, log_y=True, xlabel="tokens n", ylabel="bytes moved",
                title="Soon most bytes belong to a matrix that nobody asked for"
                ).set_xscale("log", base=2)
plotting.show("Bytes against tokens on double logarithmic axes: the naive kernels rise "
              "ever steeper, inputs and output rise in proportion.")

# %% [markdown]
# By 2.7, then 3, 3.3, 3.6, and in the end by 4: scores are written, read, written as weights and read again, $4n^2$ numbers
# beside the $4nd$ that go in and come out. And each byte has to pay for itself in arithmetic:

# %%
for n in (128, 1024, 8192):
    flops, matrix, inputs = 4 * n * n * 64, 2 * 4 * n * n, 2 * 4 * n * 64
    print(f"n = {n:5,}, d = 64, two-byte numbers: FLOP a byte with the matrix "
          f"{flops / (matrix + inputs):4.1f}, without {flops / inputs:7,.0f}")
for name, gigabytes, ms in (("standard", 40.3, 41.7), ("flash", 4.4, 7.3)):
    print(f"{name:8s} {gigabytes:4.1f} GB in {ms:4.1f} ms: moving takes at least "
          f"{gigabytes / 1.5 / ms:.0%} of it at 1.5 TB/s")

# %% [markdown]
# An A100 does 312 TFLOP a second in half precision and reads about 1.5 TB: it needs 200 FLOP for each byte. With the
# matrix it gets at most 32, and waits. The last lines are the paper's measurement (GPT-2 medium on an A100, forward and
# backward, figure 2 of 2205.14135): 9 times fewer bytes, 6 times less time, *more* arithmetic. **Count the bytes between
# the memories, not the FLOPs.**
#
# **Trap.** *"192 kb of low-bandwidth SRAM on each of 108 stream processors (19 TB/s)."* Kilo*bytes*; *high* bandwidth;
# streaming *multi*processors; and the 19 TB/s are all of them together. A kernel gets at most 164 of the 192 KB.

# %% [markdown] tags=["slide"]
# ## Part 2 · NumPy
#
# ### 6.2 Tiling strategies
#
# The two products are easily cut into tiles. The softmax between them is not: it reads its row three times, and a tile of
# keys passes through fast memory once. **Can a row be finished in one pass, before we know the maximum of the scores that
# have not arrived?** What was summed against an old maximum $m$ is too large against a new one, by a factor that we know:
#
# $$m'=\max(m,s_j)\qquad \ell'=\ell\,e^{m-m'}+e^{s_j-m'}\qquad o'=o\,e^{m-m'}+e^{s_j-m'}v_j$$
#
# *Predict.* Three scores have gone by, their maximum is 2. Now the 5 arrives. What happens to the sum?

# %% tags=["slide"]
m, ell, o = -np.inf, 0.0, 0.0
for score, value in zip(row_scores, row_values):
    m_new = max(m, score)
    factor, weight = np.exp(m - m_new), np.exp(score - m_new)
    ell = ell * factor + weight
    o = o * factor + weight * value
    m = m_new
    print(f"score {score:3.1f}: factor {factor:.3f}, maximum {m:3.1f}, sum {ell:.4f}, "
          f"output so far {o / ell:6.3f}")

# %% [markdown]
# It is multiplied by $e^{2-5}\approx0.05$ before the new term comes in, and so is the output. The last line says 41.398:
# one pass, no score read twice. This is the **online softmax** (Milakov and Gimelshein 2018, arXiv 1805.02867).
#
# *Predict.* Some teaching code starts its maximum at $10^{-30}$. On which scores does that go wrong?

# %%
def running_sum(scores, start):
    m, ell = start, 0.0
    for s in scores:
        m_new = max(m, s)
        ell = ell * np.exp(m - m_new) + np.exp(s - m_new)
        m = m_new
    return ell

for name, low in (("easy", [0.3, -1.2, 0.8]), ("hard", [-800.0, -801.0, -799.0])):
    print(f"{name}: sum from -inf {running_sum(low, -np.inf):.4f}, "
          f"from 1e-30 {running_sum(low, 1e-30):.4f}")

# %% [markdown]
# On low ones: every term has underflowed, and the weights are 0/0. On the easy row nobody would notice, and random test data
# is easy data.
#
# #### Exercise 6A: a block of scores at a time  (difficulty 2 of 5, useful, 10 minutes)
#
# Scores arrive in blocks, for many rows at once. Take the next block in.
#
# |argument|shape|meaning|
# |---|---|---|
# |`m`|`(...)`|maximum of each row so far; `-inf` at the beginning|
# |`ell`|`(...)`|sum of $e^{s-m}$ of each row so far; 0 at the beginning|
# |`scores`|`(..., width)`|the next block; `-inf` is a score that may not be seen|
#
# Returns the new `m` and `ell` in the float type of `scores`. A row that has seen nothing but `-inf` keeps `-inf` and 0.
#
# <details><summary>Hint</summary>
#
# What is -inf minus -inf? Which finite number can you subtract from a row of nothing but -inf, so that every exponential of
# it is $e^{-\infty}=0$? Which axis do the sum and the maximum run along?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def online_softmax(m, ell, scores):
    """The softmax's running maximum m and sum ell, after one more block of scores.

    m, ell (...), -inf and 0 at the beginning; scores (..., width), -inf where a score
    may not be seen. Returns (m, ell) of the same shapes in the float type of scores;
    ell is the sum of exp(score - m). A row of nothing but -inf keeps -inf and 0.
    Source: Milakov and Gimelshein 2018 (arXiv 1805.02867), algorithm 3.
    """
    scores = scores.astype(cuda.float_type(scores), copy=False)  # whole numbers: floats
    ### BEGIN SOLUTION
    m_new = np.maximum(m, scores.max(axis=-1, initial=-np.inf))
    finite = np.where(np.isneginf(m_new), 0, m_new)
    ell_new = ell * np.exp(m - finite) + np.exp(scores - finite[..., None]).sum(axis=-1)
    return m_new.astype(scores.dtype), ell_new.astype(scores.dtype)
    ### END SOLUTION

# %%
online_softmax = check("6A", online_softmax)

# %% [markdown] tags=["slide"]
# #### Tiles of queries, tiles of keys
#
# **Now the whole of attention, with one tile of scores as the only piece of the matrix that exists.** A tile of queries
# stays; tiles of keys and values come by. Each row keeps its maximum $m$, its sum $\ell$ and its output $O$, undivided:
#
# $$S=Q_iK_j^\top/\sqrt d\qquad m'=\max(m,\text{rowmax}\,S)\qquad P=e^{S-m'}$$
# $$\ell'=e^{m-m'}\ell+\text{rowsum}\,P\qquad O'=e^{m-m'}O+PV_j$$
#
# At the end $O/\ell$ is the output, and $L=m+\log\ell$, the **log-sum-exp**, one number a row, is kept: 6.4 and 6.7 need it.

# %% tags=["slide"]
plotting.tiles(n_queries=12, n_keys=16, d_head=4, block_q=4, block_k=4,
               steps=[(0, 0), (0, 3), (1, 1)],
               title="A tile of scores is all that exists of the matrix")
plotting.show("Three steps of tiled attention: one tile of queries, one of keys and "
              "values and one of scores are on chip; finished scores are not kept.")

# %% [markdown]
# One step of it, with numbers: four queries, the second of two tiles of keys.

# %% tags=["slide"]
q_i, o_old = rng.standard_normal((2, 4, 8))
k_j, v_j = rng.standard_normal((2, 6, 8))
m_old, ell_old = rng.standard_normal((4, 1)), np.ones((4, 1))
s = q_i @ k_j.T / np.sqrt(8)
m_new = np.maximum(m_old, s.max(axis=1, keepdims=True))
p, shrink = np.exp(s - m_new), np.exp(m_old - m_new)
o_new, ell_new = shrink * o_old + p @ v_j, shrink * ell_old + p.sum(1, keepdims=True)
plotting.flow(
    {"Q_i": q_i, "K_j": k_j, "m": m_old, "S": s, "m'": m_new, "P": p, "V_j": v_j,
     "O": o_old, "ell": ell_old, "O'": o_new, "ell'": ell_new},
    [(("Q_i", "K_j"), "S", "q kᵀ / √d"), (("S", "m"), "m'", "maximum"),
     (("S", "m'"), "P", "exp(S - m')"), (("P", "V_j", "O"), "O'", "rescale O, + P V"),
     (("P", "ell"), "ell'", "rescale ell, + sum")],
    title="One tile: scores come, the state of four rows moves on, scores go")
plotting.show("Data flow of one step: queries and keys give scores, these and the old "
              "maximum a new one, then weights; output and sum are rescaled.")

# %% [markdown] tags=["slide"]
# #### Exercise 6B: attention without the matrix  (difficulty 4 of 5, essential, 25 minutes; if you do only two)
#
# The loop over tiles of queries stands. Write what happens to one of them: the loop over tiles of keys, and the end.
#
# |argument|shape|meaning|
# |---|---|---|
# |`q`, `k`|`(..., n_queries, d_head)`, `(..., n_keys, d_head)`|queries and keys|
# |`v`|`(..., n_keys, d_v)`|values|
# |`causal`|bool|no query sees a later key; the last query sees all|
# |`scale`|float|factor on $q\cdot k$; `None` means $1/\sqrt{d_\text{head}}$|
# |`block_q`, `block_k`|int|rows of a tile of queries, of keys; the last may be smaller|
#
# Returns the output `(..., n_queries, d_v)` and the log-sum-exp `(..., n_queries)`; 0 and `-inf` for a query that may look
# nowhere. No array may have more than `block_q` × `block_k` scores (for each of the leading axes).
#
# <details><summary>Hint</summary>
#
# Which keys may query i see, if the shift is n_keys - n_queries? What do `k[..., j:j + block_k, :]` and
# `s[..., forbidden] = -np.inf` do? With `keepdims=True` the maximum is `(..., rows, 1)`: which of your arrays then broadcast?
# Which number do you subtract from a row that has seen nothing, and by which do you divide it?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def tiled_attention(q, k, v, causal=False, scale=None, block_q=64, block_k=64):
    """Attention tile by tile, without the matrix of scores, in NumPy: (out, lse).

    q (..., n_queries, d_head), k (..., n_keys, d_head), v (..., n_keys, d_v) with equal
    leading axes; causal is aligned at the bottom right; block_q, block_k: rows of a
    tile. Returns out (..., n_queries, d_v) in the float type of q, lse (...,
    n_queries), at least in single precision; 0 and -inf for a query without a key.
    Source: Dao 2023 (arXiv 2307.08691), algorithm 1.
    """
    work = cuda.work_type(q)  # half precision is computed in single
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    lead, n_queries, n_keys = q.shape[:-2], q.shape[-2], k.shape[-2]
    shift = n_keys - n_queries  # query i may see the keys up to i + shift
    out = np.zeros((*lead, n_queries, v.shape[-1]), cuda.float_type(q))
    lse = np.full((*lead, n_queries), -np.inf, work)
    for i in range(0, n_queries, block_q):
        ### BEGIN SOLUTION
        rows = np.arange(i, min(i + block_q, n_queries))
        end = min(n_keys, rows[-1] + shift + 1) if causal else n_keys  # seen by a row
        q_i = q[..., rows[0]:rows[-1] + 1, :].astype(work) * scale
        m = np.full((*lead, len(rows), 1), -np.inf, work)
        ell, o = np.zeros_like(m), np.zeros((*lead, len(rows), v.shape[-1]), work)
        for j in range(0, end, block_k):
            k_j, v_j = (a[..., j:min(j + block_k, end), :].astype(work, copy=False)
                        for a in (k, v))
            s = q_i @ np.swapaxes(k_j, -1, -2)
            columns = np.arange(j, j + s.shape[-1])
            if causal and columns[-1] > i + shift:  # the diagonal crosses this tile
                np.copyto(s, -np.inf, where=columns > rows[:, None] + shift)
            m_new = np.maximum(m, s.max(axis=-1, keepdims=True))
            finite = np.where(np.isneginf(m_new), 0, m_new)
            p = np.exp(np.subtract(s, finite, out=s), out=s)  # in the place of the scores
            factor = np.exp(m - finite)
            ell = ell * factor + p.sum(axis=-1, keepdims=True)
            o = o * factor + cuda.weighted_sum(p, v_j)
            m = m_new
        out[..., rows, :] = o / np.where(ell == 0, 1, ell)
        with np.errstate(divide="ignore"):
            lse[..., rows] = (m + np.log(ell))[..., 0]
        ### END SOLUTION
    return out, lse

# %%
tiled_attention = check("6B", tiled_attention)

# %% [markdown]
# **Is it the same number, and does the size of a tile change the answer?** The row of five has one query of width 1.

# %% tags=["slide"]
from attention.fundamentals import attention_numpy

one_row = np.ones((1, 1)), row_scores[:, None], row_values[:, None]
for block_k in (1, 2, 5):
    out, lse = tiled_attention(*one_row, scale=1.0, block_q=1, block_k=block_k)
    print(f"tiles of {block_k}: output {out[0, 0]:.3f}, log-sum-exp {lse[0]:.4f}")
q, k, v = (rng.standard_normal((2, n, 16)) for n in (37, 53, 53))
for causal in (False, True):
    expected, worst = attention_numpy(q, k, v, causal=causal), 0.0
    for block_q in (1, 5, 16, 37, 64):
        for block_k in (1, 7, 32, 53, 64):
            got, _ = tiled_attention(q, k, v, causal, None, block_q, block_k)
            worst = max(worst, np.abs(got - expected).max())
    print(f"causal {causal!s:5s}: 25 pairs of sizes, largest difference {worst:.6f}")

# %% [markdown]
# 41.398 for every size: the order of the additions changes, nothing else. Flash attention is **exact**.
#
# *Predict.* Peak memory of one head, inputs not counted: which slope has each curve when the length doubles?

# %% tags=["slide"]
from attention.experiments.flash import peak_bytes

lengths = [256, 512, 1024, 2048, 4096]
peaks = {"naive": [], "flash attention": []}
for n in lengths:
    arrays = rng.standard_normal((3, n, 64)).astype(np.float32)
    peaks["naive"].append(peak_bytes(attention_numpy, *arrays))
    peaks["flash attention"].append(
        peak_bytes(tiled_attention, *arrays, False, None, 64, 64))
slopes = plotting.scaling(
    {name: (lengths, np.round(peak, -4)) for name, peak in peaks.items()},
    xlabel="tokens n", ylabel="peak bytes of one head",
    title="The matrix costs the square, tiles less than the length")
plotting.show("Peak memory against length on double logarithmic axes: a line of slope "
              "about two, and a much lower one of slope below one.")
print(f"slope of naive {slopes['naive']:.1f} (above 1.8: {slopes['naive'] > 1.8}), of "
      f"flash {slopes['flash attention']:.1f} "
      f"(below 1.1: {slopes['flash attention'] < 1.1})")

# %% [markdown]
# 2, and below 1: what flash attention holds is the output, one number a row, and some tiles, which do not grow.
#
# **Into a real model.** SmolLM2-135M (30 layers, 9 heads) gets your function for its attention. It reads 256 tokens in four
# steps with a cache, so the mask has to be aligned at the bottom right.

# %% tags=["language-model"]
from utils import language_model

smollm = language_model.load()
if smollm:
    def in_tiles(q, k, v, causal):
        return tiled_attention(q, k, v, causal=causal, block_q=64, block_k=64)[0]

    language_model.put_in(smollm, attention=language_model.on_arrays(in_tiles))

# %% [markdown]
# #### Exercise 6C: find the bug  (difficulty 3 of 5, useful, 15 minutes)
#
# Ten kernels of the world have a bug, all shapes right; most give the right numbers on random data. Write a test that
# notices. It is tried on right functions, which must pass, and on the ten.
#
# |argument|meaning|
# |---|---|
# |`attend`|`attend(q, k, v, causal, scale, block_q, block_k)` returns `(out, lse)`, as exercise 6B; arrays of two axes|
#
# Returns nothing. It raises an error (`assert ...`) for a wrong function, and none for a right one.
#
# <details><summary>Hint</summary>
#
# Which loop over queries is so plain that you believe it? Which rows are hard: all scores very low, rows of very different
# size, rows that see nothing? Which sizes leave a rest, and where does the diagonal cross a tile? Do you look at `lse` too?
#
# </details>

# %% tags=["exercise", "export"] kind="bug"
def test_flash(attend):
    """Raise AssertionError if attend(q, k, v, causal, scale, block_q, block_k) errs."""
    ### BEGIN SOLUTION
    draws = np.random.default_rng(3)
    for n, n_keys, causal, size in ((5, 7, False, 1.0), (5, 7, True, 1.0),
                                    (6, 4, True, 1.0), (5, 7, False, -300.0)):
        q, k = draws.standard_normal((n, 4)), draws.standard_normal((n_keys, 4))
        v = draws.standard_normal((n_keys, 3))
        if size != 1:  # low scores, and rows of very different size
            q, k = np.arange(1, n + 1)[:, None] * np.ones((n, 4)), size + np.abs(k)
        out, lse = attend(q, k, v, causal, 0.7, 2, 3)
        for i in range(n):
            seen = max(0, i + 1 + n_keys - n) if causal else n_keys
            if seen == 0:
                assert (out[i] == 0).all() and np.isneginf(lse[i]), "an empty row"
                continue
            s = 0.7 * k[:seen] @ q[i]
            powers = np.exp(s - s.max())
            assert np.allclose(out[i], powers @ v[:seen] / powers.sum()), i
            assert np.isclose(lse[i], s.max() + np.log(powers.sum())), i
    ### END SOLUTION

# %%
test_flash = check("6C", test_flash)

# %% [markdown]
# ### 6.3 Memory hierarchy optimisation: how large may a tile be?
#
# **What does fast memory buy?** The first paper's own loop looks different from yours. It begins with the capacity $M$ of
# the fast memory, counted in *numbers*, cuts the matrices so that a tile each of Q, K, V and O fits, and its outer loop runs
# over the **keys**. Here it is line by line, on a slow memory that counts (`SlowMemory`, Behind the scenes).

# %%
from collections import Counter

from attention.experiments.flash import SlowMemory, algorithm_0

def algorithm_1(q, k, v, capacity, watch=lambda *state: None, slow=SlowMemory):
    """FlashAttention (arXiv 2205.14135, algorithm 1): output, memory, counts."""
    n, d = q.shape
    B_c = -(-capacity // (4 * d))  # line 1
    B_r, count = min(B_c, d), Counter()
    memory = slow(Q=q, K=k, V=v, O=np.zeros((n, d)),  # 2
                  l=np.zeros((n, 1)), m=np.full((n, 1), -np.inf))
    for keys in memory.tiles(B_c):  # 3, 5
        K_j, V_j = memory.load("K", keys), memory.load("V", keys)  # 6
        for rows in memory.tiles(B_r):  # 4, 7
            Q_i, O_i, l_i, m_i = (memory.load(name, rows) for name in "QOlm")  # 8
            S = Q_i @ K_j.T  # 9
            m_tile = S.max(1, keepdims=True)  # 10
            P = np.exp(S - m_tile)
            m_new = np.maximum(m_i, m_tile)  # 11
            old, new = np.exp(m_i - m_new), np.exp(m_tile - m_new)
            l_new = old * l_i + new * P.sum(1, keepdims=True)
            O_i = (l_i * old * O_i + new * (P @ V_j)) / l_new  # 12
            for name, block in zip("Olm", (O_i, l_new, m_new)):  # 12, 13
                memory.store(name, rows, block)
            count.update(multiplied=2 * O_i.size, divided=O_i.size)
            watch(rows, keys.stop, m_new, l_new, O_i)
    return memory.arrays["O"], memory, count  # 16

# %% [markdown]
# The proof of the paper rests on an invariant: after each tile, $m$, $\ell$ and $O$ are the maximum, the sum and the
# **finished** attention over the keys seen so far. We watch it hold.

# %%
q_96, k_96, v_96 = rng.standard_normal((3, 96, 8))
off = []

def invariant(rows, seen, m, l, O):
    """How far the state is from attention over the keys seen so far."""
    s = q_96[rows] @ k_96[:seen].T
    off.append((np.abs(m - s.max(1, keepdims=True)).max(),
                np.abs(l / np.exp(s - m).sum(1, keepdims=True) - 1).max(),
                np.abs(O - attention_numpy(q_96[rows], k_96[:seen], v_96[:seen],
                                           scale=1.0)).max()))

out_1, _, _ = algorithm_1(q_96, k_96, v_96, 4 * 8 * 20, invariant)
out_0, memory_0 = algorithm_0(q_96, k_96, v_96)
print(f"after each of {len(off)} tiles: m, ell and O are off by at most "
      f"{np.max(off):.6f}")
print(f"algorithm 1 against the matrix: {np.abs(out_1 - out_0).max():.6f}")
print(f"algorithm 0 moves {memory_0.traffic:,} numbers; 4 n n + 4 n d = "
      f"{4 * 96 * 96 + 4 * 96 * 8:,}")

# %% [markdown]
# (Printed without scale, mask and dropout, which are in the paper's appendix. With a mask a row may see nothing in its
# first tile: then line 12 needs a guard against $-\infty-(-\infty)$.)
#
# *Predict.* Twice the fast memory: how much less traffic?

# %% tags=["slide"]
n, d = 512, 16
q, k, v = rng.standard_normal((3, n, d))
capacities, moved = [512, 1024, 2048, 4096, 8192], []
for capacity in capacities:
    _, memory, _ = algorithm_1(q, k, v, capacity)
    T_c = -(-n // -(-capacity // (4 * d)))  # tiles of keys
    moved.append(memory.traffic)
    print(f"M = {capacity:5,}: {T_c:2d} tiles of keys, {memory.traffic:9,} moved, "
          f"2 n d + T_c (3 n d + 4 n) = {2 * n * d + T_c * (3 * n * d + 4 * n):9,}")
standard = 4 * n * n + 4 * n * d
plotting.scaling({"flash: algorithm 1": (capacities, moved),
                  "naive: algorithm 0": (capacities, [standard] * 5)},
                 xlabel="capacity M of the fast memory (numbers)",
                 ylabel="numbers moved",
                 title="Twice the fast memory halves the traffic, of algorithm 1 only")
plt.ylim(1e5, 2e6)
plotting.show("Numbers moved against capacity on double logarithmic axes: algorithm 1 "
              "falls with slope near -1 and crosses the flat line of algorithm 0.")

# %% [markdown]
# Half: $T_c=4nd/M$ passes over Q and O make $\Theta(n^2d^2/M)$ (theorem 2), against $\Theta(nd+n^2)$. With too little fast
# memory the tiled way moves *more*: $d^2$ against $M$ decides.
#
# **Trap.** *"192 KB and d = 64, so $B_c=196{,}608/256=768$."* $M$ counts numbers: with two bytes each $B_c=384$, and
# $B_r=\min(B_c,d)=64$. The tile of scores is not in that count, hence the minimum. Real kernels take 64 or 128 rows: scores
# and output have to fit into registers.

# %%
for d in (64, 128):
    B_c = -(-192 * 1024 // 2 // (4 * d))
    print(f"d = {d:3d}: B_c = {B_c}, B_r = {min(B_c, d):3d}; long texts move "
          f"{4 / (3 * d / B_c):4.1f} times less than with the matrix")

# %% [markdown]
# ## Part 3 · PyTorch
#
# ### 6.4 Implementation details
#
# **What else must a real implementation do?** Skip what the mask forbids, give gradients without the matrix that the gradient
# needs, and take texts of different lengths in one batch.
#
# **Skipping.** Half of a causal matrix is forbidden. A tile is **full** (every pair allowed), **partial** (the diagonal
# crosses it) or **skipped**: not even loaded. Only partial tiles need a mask.
#
# *Predict.* 4,096 tokens, tiles of 64 × 64: which share of all tiles is skipped, and which needs a mask?

# %% tags=["slide"]
from attention.flash import causal_tiles

plotting.tiles(n_queries=12, n_keys=12, d_head=4, block_q=4, block_k=2,
               steps=[(0, 0), (0, 1), (1, 3)], causal=True,
               title="Six of these eighteen tiles hold nothing that a query may see")
plotting.show("Three steps of causal tiles, three by six: tiles above the diagonal are "
              "crossed out as skipped, those below are visited row by row.")
for n in (256, 4096):
    full, partial, skipped = causal_tiles(n, n, 64, 64)
    tiles = full + partial + skipped
    print(f"n = {n:5,}: {tiles:5,} tiles, full {full / tiles:.1%}, partial "
          f"{partial / tiles:.1%}, skipped {skipped / tiles:.1%}")

# %% [markdown] tags=["slide"]
# #### A backward pass without the matrix
#
# **The gradient needs the weights $P$ (exercise 1H), and they were never stored.** Compute them again, tile by tile: the
# log-sum-exp that was kept gives them finished, $P_{ij}=e^{S_{ij}-L_i}$. One obstacle is left. In
#
# $$dS_{ij}=P_{ij}\Big(dP_{ij}-\sum_{j'}P_{ij'}\,dP_{ij'}\Big),\qquad dP=dO\,V^\top$$
#
# the sum runs over the whole row. But it can be had without the row, from what a tile of queries has anyway:
#
# $$\sum_jP_{ij}\,dP_{ij}=\sum_jP_{ij}\sum_c dO_{ic}V_{jc}=\sum_c dO_{ic}\sum_jP_{ij}V_{jc}=\sum_c dO_{ic}\,O_{ic}=:D_i$$
#
# *Predict.* What do the weights $e^{S-L}$ of a row sum to?

# %% tags=["slide"]
q_20, k_20, v_20, d_out = rng.standard_normal((4, 20, 8))
out, lse = tiled_attention(q_20, k_20, v_20)
p = np.exp(q_20 @ k_20.T / np.sqrt(8) - lse[:, None])  # finished weights
d_p = d_out @ v_20.T
big_d = (d_out * out).sum(1, keepdims=True)
d_s = p * (d_p - big_d) / np.sqrt(8)
print(f"rows of P sum to {p.sum(1).min():.4f} to {p.sum(1).max():.4f}")
gap = np.abs((p * d_p).sum(1) - big_d[:, 0]).max()
print(f"sum of P dP against rowsum(dO * O): largest difference {gap:.6f}")
plotting.flow({"Q": q_20, "K": k_20, "L": lse[:, None], "P": p, "V": v_20, "dO": d_out,
               "dP": d_p, "D": big_d, "dS": d_s, "dQ": d_s @ k_20, "dV": p.T @ d_out},
              [(("Q", "K", "L"), "P", "exp(q kᵀ / √d - L)"),
               (("dO", "V"), "dP", "dO Vᵀ"),
               (("P", "dP", "D"), "dS", "P (dP - D) / √d"), ("dS", "dQ", "dS K"),
               (("P", "dO"), "dV", "Pᵀ dO")],
              title="Backward: weights come from L, the sum of the row from D")
plotting.show("Data flow: queries, keys and L give weights; the gradient of the output "
              "and V give dP; with D they give dS, and that the gradients.")

# %% [markdown]
# To 1. The price is arithmetic: the backward pass has five products of size $n^2d$ ($S$ again, $dV$, $dP$, $dQ$, $dK$), the
# forward pass two.
#
# **Trap.** *"Load blocks, softmax, backward pass, write back, repeat."* The backward pass is another kernel. It runs when
# $dO$ exists, after the forward pass of the whole model, and begins with nothing but Q, K, V, O, $L$ and $dO$.
#
# #### Exercise 6D: the gradient, tile by tile  (difficulty 4 of 5, essential, 25 minutes; if you do only two)
#
# This is what a training step will run. The loop over tiles stands, keys outside, queries inside, as in FlashAttention-2;
# write what one tile adds. `rows` and `columns` are slices, `allowed` is a boolean tensor `(rows, columns)`, or `None` where
# all of the tile may be seen; tiles of the future are skipped already.
#
# |argument|shape|
# |---|---|
# |`q`, `k`, `v`, `causal`, `scale`|as in exercise 6B, tensors of one float type|
# |`out`, `lse`|what the forward pass returned|
# |`d_out`|`(..., n_queries, d_v)`, gradient of the loss with respect to the output|
#
# Returns `(d_q, d_k, d_v)` of the shapes and types of `q`, `k`, `v`.
#
# <details><summary>Hint</summary>
#
# Weights first: scores, masked, minus which number of each row? Then dV, dP, dS, at last dQ and dK: which of them get
# something from other tiles too? Where does the scale come in, and how often? For an empty row `lse` was set to +inf: what is
# $e^{s-\infty}$?
#
# </details>

# %% tags=["export"]
def backward_tiles(n_queries, n_keys, causal, block=64, device="cpu"):
    """Yield the tiles that a backward pass visits, keys outside.

    (slice of queries, slice of keys, boolean tensor (rows, columns) or None) for each.
    """
    shift = n_keys - n_queries
    for j in range(0, n_keys, block):
        for i in range(0, n_queries, block):
            rows = slice(i, min(i + block, n_queries))
            columns = slice(j, min(j + block, n_keys))
            if not causal or columns.stop - 1 <= i + shift:
                yield rows, columns, None
            elif j <= rows.stop - 1 + shift:
                key = torch.arange(j, columns.stop, device=device)
                query = torch.arange(i, rows.stop, device=device)
                yield rows, columns, key <= query[:, None] + shift

# %% tags=["exercise", "export"] kind="training"
def tile_gradients(q, k, v, out, lse, d_out, causal=False, scale=None):
    """Gradients of flash attention with respect to q, k and v, tile by tile: PyTorch.

    q, k, v, out, d_out of one float type, with equal leading axes; out and lse are what
    flash attention returned; d_out (..., n_queries, d_v). Returns (d_q, d_k, d_v) of
    the shapes and types of q, k and v; 0 for a query without a key.
    Source: Dao 2023 (arXiv 2307.08691), algorithm 2.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    lse = lse.masked_fill(lse == -math.inf, math.inf)  # an empty row has no weights
    D = (d_out * out).sum(-1)
    d_q, d_k, d_v = (torch.zeros_like(a) for a in (q, k, v))
    sizes = q.shape[-2], k.shape[-2]
    for rows, columns, allowed in backward_tiles(*sizes, causal, device=q.device):
        ### BEGIN SOLUTION
        q_i, d_out_i = q[..., rows, :], d_out[..., rows, :]
        k_j, v_j = k[..., columns, :], v[..., columns, :]
        s = q_i @ k_j.mT * scale
        if allowed is not None:
            s = s.masked_fill(~allowed, -math.inf)
        p = torch.exp(s - lse[..., rows, None])
        d_p = d_out_i @ v_j.mT
        d_s = p * (d_p - D[..., rows, None]) * scale
        d_v[..., columns, :] += p.mT @ d_out_i
        d_k[..., columns, :] += d_s.mT @ q_i
        d_q[..., rows, :] += d_s @ k_j
        ### END SOLUTION
    return d_q, d_k, d_v

# %%
tile_gradients = check("6D", tile_gradients)

# %% [markdown]
# **How does your gradient get into a training step?** Autograd would record every tile and keep it, which is the matrix
# again. So the tiles run without autograd, inside a `Function` that says itself how to go back.

# %%
from attention.flash import flash_forward_torch

class Flash(torch.autograd.Function):
    """Flash attention as one operation: keeps q, k, v, the output, a number a row."""

    tiles = staticmethod(flash_forward_torch)  # your loop of 6B, on tensors

    @staticmethod
    def forward(ctx, q, k, v, causal):
        out, lse = Flash.tiles(q, k, v, causal, q.shape[-1] ** -0.5, 64, 64)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx, d_out):
        return *tile_gradients(*ctx.saved_tensors, d_out, ctx.causal), None

tensors = [torch.from_numpy(rng.standard_normal((2, 3, 90, 8))).requires_grad_()
           for _ in range(3)]
d_out = torch.from_numpy(rng.standard_normal((2, 3, 90, 8)))
theirs = nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
ours = Flash.apply(*tensors, True)
ways = [(way, *torch.autograd.grad(way, tensors, d_out)) for way in (ours, theirs)]
for name, a, b in zip(("output", "dQ", "dK", "dV"), *ways):
    print(f"{name:6s} against torch's own: off by {(a - b).abs().max():.6f}")

# %% [markdown]
# *Predict.* Autograd keeps tensors between forward and backward. How many bytes at twice the length, for one head?

# %%
from attention.experiments.flash import kept_bytes
from attention.flash import flash_attention_torch
from attention.fundamentals import attention_torch

for n in (256, 512, 1024):
    plain, flash = kept_bytes(attention_torch, n), kept_bytes(flash_attention_torch, n)
    print(f"n = {n:5,}: flash keeps {flash:9,} bytes, 4 (4 n d + n) = "
          f"{4 * (4 * n * 64 + n):9,}; attention {plain / flash:4.1f} times as many")

# %% [markdown]
# Twice as many; plain attention four times as many. And in the model: the gradient of its loss with respect to a matrix in
# the middle, through your backward pass.

# %% tags=["language-model"]
if smollm:
    ids = language_model.excerpt(smollm, 64)
    w_k = smollm.blocks[15].attention.w_k

    def gradient_of_loss(model):
        loss = nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
        return loss.item(), torch.autograd.grad(loss, w_k)[0]

    w_k.requires_grad_(True)
    with_matrix = gradient_of_loss(smollm)
    with_tiles = gradient_of_loss(smollm.replace(
        attention=lambda q, k, v, causal: Flash.apply(q, k, v, causal)))
    w_k.requires_grad_(False)
    off_by = (with_matrix[1] - with_tiles[1]).abs().max() / with_matrix[1].abs().max()
    print(f"loss {with_matrix[0]:.3f} and {with_tiles[0]:.3f}; gradient of w_k in "
          f"layer 15: largest difference, relative, {off_by:.3f}")

# %% [markdown]
# **Does a language model notice that its attention never saw the matrix?** Now at 768 places the one token that SmolLM2
# thinks likeliest.
#
# *Predict.* How many change with the order of the additions? And how many when weights and activations have the 8 bits of
# precision of bfloat16, as models in use have?

# %% tags=["language-model", "approx", "slide"] approx={"numbers": 0.4}
if smollm:
    import copy

    pieces = [language_model.excerpt(smollm, 256, of="help"),
              *language_model.excerpt(smollm, 512, of="course").split(256, dim=1)]
    rounded = {id(w): nn.Parameter(w.bfloat16(), requires_grad=False)
               for w in smollm.parameters()}
    models = {"the matrix": smollm, "in bfloat16": copy.deepcopy(smollm, rounded),
              "in tiles": smollm.replace(
                  attention=lambda q, k, v, causal: Flash.apply(q, k, v, causal))}
    found = {name: [] for name in models}
    with torch.no_grad():
        for ids in pieces:  # one at a time: 256 tokens have 50 MB of logits
            logits = {name: model(ids)[0].float() for name, model in models.items()}
            exact = logits["the matrix"]
            for name, each in logits.items():
                found[name].append((
                    (each.argmax(-1) != exact.argmax(-1)).sum().item(),
                    (each - exact).abs().max().item(),
                    nn.functional.cross_entropy(each[:-1], ids[0, 1:]).item()))
    _, _, loss = np.mean(found["the matrix"], axis=0)
    for name in ("in tiles", "in bfloat16"):
        changed, moved, losses = zip(*found[name])
        print(f"{name:11s} {sum(changed):2d} of {3 * 256} next tokens are other ones; "
              f"a logit moved by up to {max(moved):.1f}, the loss "
              f"by {abs(np.mean(losses) - loss):.2f}")

# %% [markdown]
# **Tiles change nothing; precision changes words, not quality.** The order of additions moves a logit in the fifth decimal,
# and no two candidates are that close here. bfloat16 moves it by about 1, and some thirty of 768 next tokens become others,
# as likely: the loss stays. Who compares a flash kernel in half precision with a reference in single sees the second.

# %% tags=["language-model"]
smollm = models = rounded = logits = exact = each = w_k = None  # free again

# %% [markdown]
# #### Texts of different lengths, packed
#
# **A batch has texts of 3, 900 and 40 tokens. Must all be padded to 900?** No. Put them one behind the other, and write
# down where each begins, and the end (`cu_seqlens` in real libraries). Without a matrix there is nothing that has to be a
# rectangle.

# %%
lengths = np.array([3, 900, 40])
starts = np.concatenate([[0], lengths.cumsum()])
print("starts:", starts)
print(f"padded {3 * 900:,} rows, packed {lengths.sum():,}; scores of a head: "
      f"{3 * 900 ** 2:,} and {(lengths ** 2).sum():,}")

# %% [markdown]
# #### Exercise 6E: a layer for packed texts  (difficulty 3 of 5, useful, 20 minutes)
#
# Write causal self-attention for a pack. The shape contract:
#
# |array|shape|
# |---|---|
# |`x`|`(total, d_model)`: all tokens of all texts|
# |`starts`|integers `(batch + 1,)`: text b has the rows `starts[b]` to `starts[b + 1]`; a text may be empty|
# |parameters `w_q`, `w_k`, `w_v`, `w_o`|`(d_model, d_model)`, used as `x @ w`; head h has the columns from $h\,d_\text{head}$ on|
# |out|`(total, d_model)`|
#
# Your loop on tensors, `flash_attention_torch(q, k, v, causal=True)`, returns `(out, lse)` for `(heads, n, d_head)`.
# Returns what the heads found, merged and multiplied by `w_o`. No text sees another.
#
# <details><summary>Hint</summary>
#
# Which axis must stand in front so that a slice of rows is `q[:, a:b]`? What do `unflatten(-1, (n_heads, -1))` and
# `transpose(0, 1)` do to `(total, d_model)`, and what undoes them? Along which axis are the parts put together?
#
# </details>

# %% tags=["exercise", "export"] kind="module"
class PackedSelfAttention(nn.Module):
    """Causal self-attention of n_heads heads on texts packed one behind the other.

    ValueError unless n_heads divides d_model.
    """

    def __init__(self, d_model, n_heads):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model: {n_heads} and {d_model}")
        self.n_heads = n_heads
        ### BEGIN SOLUTION
        self.w_q, self.w_k, self.w_v, self.w_o = (
            nn.Parameter(torch.randn(d_model, d_model) * d_model**-0.5) for _ in range(4))
        ### END SOLUTION

    def forward(self, x, starts):
        ### BEGIN SOLUTION
        q, k, v = ((x @ w).unflatten(-1, (self.n_heads, -1)).transpose(0, 1)
                   for w in (self.w_q, self.w_k, self.w_v))  # (heads, total, d_head)
        borders = starts.tolist()
        parts = [flash_attention_torch(q[:, a:b], k[:, a:b], v[:, a:b], causal=True)[0]
                 for a, b in zip(borders, borders[1:])]
        return torch.cat(parts, dim=1).transpose(0, 1).flatten(1) @ self.w_o
        ### END SOLUTION

# %%
PackedSelfAttention = check("6E", PackedSelfAttention)

# %% [markdown]
# ## Part 4 · CUDA
#
# ### 6.5 FlashAttention-1 and FlashAttention-2, and a kernel
#
# **Your loop has the queries outside, algorithm 1 has the keys outside. Does it matter?** The result is the same. We count
# what is not: your loop on the slow memory of 6.3 (`algorithm_2`, Behind the scenes).
#
# **Trap.** *"FlashAttention, algorithm 1: for each block of queries, loop over the keys ..."* That is the second paper. In
# the first, O goes to slow memory after every tile, divided; the stores of O tell the two apart.
#
# *Predict.* The same tiles of 64 × 64, $n=512$: which of the two divides more, which stores more, which moves more in all?

# %% tags=["slide"]
from attention.experiments.flash import algorithm_2

n, d, B = 512, 64, 64
q, k, v = rng.standard_normal((3, n, d)) / 2
_, memory_1, count_1 = algorithm_1(q, k, v, capacity=4 * d * B)
_, memory_2, count_2 = algorithm_2(q, k, v, B, B)
print(f"{'':30s} algorithm 1   FlashAttention-2")
for name, a, b in (
        ("elements of O multiplied", count_1["multiplied"], count_2["multiplied"]),
        ("elements of O divided", count_1["divided"], count_2["divided"]),
        ("stored: O and statistics", memory_1.stored.total(), memory_2.stored.total()),
        ("moved in all", memory_1.traffic, memory_2.traffic)):
    print(f"{name:30s} {a:11,}   {b:16,}   {a / b:.1f} times")
M = 192 * 1024 // 2  # an A100's 192 KB in two-byte numbers, and real sizes
B_c, moved_1 = M // (4 * 64), 2 * 8192 * 64 + 22 * (3 * 8192 * 64 + 4 * 8192)
for block_q in (64, 128, B_c):
    moved_2 = 2 * 8192 * 64 + 8192 + -(-8192 // block_q) * 2 * 8192 * 64
    print(f"8,192 tokens, FlashAttention-2 with tiles of {block_q:3d} queries moves "
          f"{moved_2 / moved_1:.1f} times what algorithm 1 moves")

# %% [markdown]
# Half the multiplications, an eighth of the divisions and stores, with equal tiles. (An A100 does 312 TFLOP/s in matrix
# products and 19.5 in everything else, so these count sixteenfold.) With the tiles that its kernels really take,
# FlashAttention-2 moves *more*, mostly K and V, which are only read and which many blocks find in the L2 cache. It was
# nevertheless about twice as fast (abstract of 2307.08691). The greater gain is in no count of bytes: with the queries
# outside, **each tile of queries is finished by itself, and blocks of threads share them out**. One text of 8,192 tokens
# with 16 heads is 16 blocks, or 1,024.
#
# So that is the kernel: a block of 16 × 16 threads takes 16 queries, and tiles of 16 keys come by. Thread `x` of row `y`
# scores query `y` with key `x`; sixteen threads share a row, find its maximum and sum by shuffles, and own every sixteenth
# column of the output.
#
# #### Exercise 6F: the loop, dealt out  (difficulty 4 of 5, useful, 25 minutes)
#
# Queries are loaded, the output is written; the loop in between is yours.
#
# |name|meaning|
# |---|---|
# |`keys`, `values`|this head's rows in global memory, d floats each|
# |`q_tile`, `k_tile`, `v_tile`|16 rows of d floats, `stride` apart; the queries are on their way, no barrier yet|
# |`o_row`, `p_row`|this query's output, undivided, all zeros; room for its 16 weights|
# |`visible`|keys that this block has to look at; later ones are masked for all its queries|
# |`x`, `y`, `i`|key in the tile, row in the tile, number of the query|
# |`maximum`, `total`|declared, not set: of this query so far, the same in all 16 threads of a row|
#
# `TILE` is 16. `load_rows(tile, TILE, d, stride, rows, first, visible, d)` copies 16 rows from row `first` on with all threads, zeros
# behind `visible`; `may_attend(i, j, n_queries, n_keys, causal)` is false for keys that are not there, too; `row_max(s)`
# and `row_sum(s)` reduce over a row. All 256 threads take part in every load, shuffle and barrier. Returns nothing: `o_row`
# and `total` hold the sums over all keys, measured against `maximum`.
#
# <details><summary>Hint</summary>
#
# Which three things change when a tile comes, and what may not be overwritten before all are done with it
# (`__syncthreads()`)? Score of key `first + x`: what is it where `may_attend` says no? By which factor do `total` and
# `o_row` shrink? Who reads the weights in `p_row`, and when may they (`__syncwarp()`)? Columns `x`, `x + 16`, ... : which
# sum do you add?
#
# </details>

# %%
from attention.flash import FLASH_HEAD

# %% tags=["exercise", "export"] kind="kernel"
FLASH_SHARED = r"""
__global__ void flash_shared(const float* q, const float* k, const float* v, float* out, float* lse,
                             int n_queries, int n_keys, int d, int causal, float scale) {
  extern __shared__ float shared[];
  int stride = d + PAD, x = threadIdx.x, y = threadIdx.y, i = blockIdx.y * TILE + y;
  float *q_tile = shared, *k_tile = q_tile + TILE * stride, *v_tile = k_tile + TILE * stride;
  float *o_row = v_tile + TILE * stride + y * stride;
  float *p_row = shared + 4 * TILE * stride + y * (TILE + PAD);
  size_t head = blockIdx.x;
  const float* queries = q + head * n_queries * d;
  const float* keys = k + head * n_keys * d;
  const float* values = v + head * n_keys * d;
  int visible = visible_keys((blockIdx.y + 1) * TILE, n_queries, n_keys, causal);
  load_rows(q_tile, TILE, d, stride, queries, blockIdx.y * TILE, n_queries, d);
  for (int c = x; c < d; c += TILE) o_row[c] = 0.0f;
  float maximum, total;
  // BEGIN SOLUTION
  maximum = -INFINITY;
  total = 0.0f;
  for (int first = 0; first < visible; first += TILE) {
    // load
    __syncthreads();                                     // the last tiles are used up
    load_rows(k_tile, TILE, d, stride, keys, first, visible, d);
    load_rows(v_tile, TILE, d, stride, values, first, visible, d);
    __syncthreads();                                     // the new tiles have arrived
    // score
    float s = 0.0f;
    for (int t = 0; t < d; ++t) s += q_tile[y * stride + t] * k_tile[x * stride + t];
    s = may_attend(i, first + x, n_queries, n_keys, causal) ? scale * s : -INFINITY;
    // rescale
    float highest = fmaxf(maximum, row_max(s));
    float shift = highest == -INFINITY ? 0.0f : highest;
    float factor = expf(maximum - shift), weight = expf(s - shift);
    maximum = highest;
    total = factor * total + row_sum(weight);
    p_row[x] = weight;
    __syncwarp();                                        // a row belongs to one warp
    // accumulate
    for (int c = x; c < d; c += TILE) {
      float sum = factor * o_row[c];
      for (int r = 0; r < TILE; ++r) sum += p_row[r] * v_tile[r * stride + c];
      o_row[c] = sum;
    }
  }
  // END SOLUTION
  if (i >= n_queries) return;
  float share = total == 0.0f ? 0.0f : 1.0f / total;
  for (int c = x; c < d; c += TILE) out[(head * n_queries + i) * d + c] = o_row[c] * share;
  if (x == 0) lse[head * n_queries + i] = total == 0.0f ? -INFINITY : maximum + logf(total);
}
"""

# %%
FLASH_SHARED = check("6F", FLASH_SHARED)

# %% [markdown]
# The row of five through it, then a head of 128 tokens: what it asks of global memory, and of shared memory.

# %%
kernel = cuda.compile(FLASH_HEAD + FLASH_SHARED, name="flash_shared")
single = [a.astype(np.float32) for a in one_row]
out, lse = np.zeros((1, 1), np.float32), np.zeros(1, np.float32)
kernel.check[(1, 1), (16, 16), 4 * 16 * (4 * 2 + 17)](
    *single, out, lse, 1, 5, 1, 0, 1.0)
print(f"the row: output {out[0, 0]:.3f}, log-sum-exp {lse[0]:.4f}")
head = [rng.standard_normal((128, 64)).astype(np.float32) for _ in range(3)]
out, lse = np.zeros((128, 64), np.float32), np.zeros(128, np.float32)
report = kernel.check[(1, 8), (16, 16), 4 * 16 * (4 * 65 + 17)](
    *head, out, lse, 128, 128, 64, 0, 1 / 8)
expected, _ = tiled_attention(*head)
turns = sum(row.wavefronts for row in report.rows if row.space == "shared")
print(f"largest difference {np.abs(out - expected).max():.5f}, problems "
      f"{len(report.problems)}")
print(f"loads {report.global_loaded:,} bytes: K and V once for each of 8 blocks, "
      f"{8 * 2 * 128 * 64 * 4:,}, and Q")
print(f"turns of shared memory for each multiply-add of a warp: "
      f"{turns / (2 * 128 * 128 * 64 / 32):.1f}")

# %% [markdown]
# A **turn** is one access of a warp to shared memory (lecture 01). A multiprocessor of an H100 can start four multiply-adds
# of a warp in a clock, and one turn: with more than 0.25 turns each, a kernel waits for shared memory. Here both operands
# of each product come from there. A kernel saves turns only if it uses a number more often than it loads it: a thread that
# holds $R$ queries and $C$ keys makes $RC$ products from $R+C$ numbers.
#
# |rung|who does what|
# |---|---|
# |1 three kernels|lecture 01, the matrix in global memory|
# |2 a thread a query|the query in registers, each key is read by all threads at once|
# |3 a block shares|exercise 6F|
# |4 registers 4 × 2|a thread holds 4 queries and 2 keys, and reads four numbers at a time|
# |5 registers 8 × 8|the same with $R=C=8$: as much as registers hold|
# |6 tensor cores, wmma|4,096 products a call in half precision; scores and output pass through shared memory|
# |7 tensor cores, mma|weights and output stay in registers and feed the next product from there|
#
# *Predict.* Three things take time: bytes, turns, operations. Which is the longest on each rung? Is each faster than the
# one before?

# %% tags=["approx", "slide"] approx={"numbers": 0.15, "picture": 0.05}
from attention.experiments.flash import ladder_counts

rungs = ladder_counts(n=512, d=64)  # counted, one head
for name, (n_bytes, turns, _) in rungs.items():
    print(f"{name:23s} {n_bytes / 1e6:6.2f} MB, {turns / (512 * 512 * 4):.2f} turns "
          "for each multiply-add of a warp")
plotting.ladder(rungs, bandwidth=3.35e12, turns_per_second=132 * 1.98e9, peak=67e12,
                title="Shared memory is the wall on rungs 2 to 6; 3 and 6 step back")
plotting.show("Three bars for each of seven kernels, logarithmic: bytes are longest "
              "on rungs 1 and 7, shared-memory turns on all others; rung 3 is slower "
              "than 2, and rung 6 slower than 5.")

# %% [markdown]
# Shared memory on rungs 2 to 6. Rung 3 uses all threads and asks for *more* turns than rung 2. Rung 5 ends single precision: its turns are near what the
# arithmetic takes. On rung 6 the tensor cores are idle: their products would take a thirtieth of the time that rows need
# through shared memory. Rung 7 removes that, and bytes are the longest again. The kernels stand in section 6.9.
#
# (An H100's data sheet: 3.35 TB/s, 132 multiprocessors, 67 TFLOP/s in single precision, 989 on tensor cores. Every sector
# counts as if it came from HBM; L2 serves some. Instructions, barriers and exponentials are not counted.)

# %% [markdown]
# ## Part 5 · Does it matter?
#
# ### 6.6 Performance gains
#
# **What is won on the machine under your hands?** A processor has caches instead of shared memory, and the same story. Your
# function, given no tile sizes, takes 256 × 512 for a few heads at a time: 2 MB of scores, not 67.
#
# *Predict.* Tiles do the same exponentials and some more. Which is faster, and by how much under a causal mask?

# %% tags=["nbval-ignore-output"]
import time

from attention.flash import flash_attention_numpy
from threadpoolctl import threadpool_limits

threadpool_limits(1)  # one thread for NumPy too: its threads' times would add up
arrays = rng.standard_normal((3, 4, 2048, 64)).astype(np.float32)

def seconds(function, *arguments, repeats=3):
    """The least processor time of several calls."""
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        function(*arguments)
        spent.append(time.process_time() - start)
    return min(spent)

spent = {}
for causal in (False, True):
    spent[causal] = [seconds(lambda: attention_numpy(*arrays, causal=causal)),
                     seconds(flash_attention_numpy, *arrays, causal),
                     seconds(flash_attention_numpy, *arrays, causal, None, 64, 64)]
    naive, chosen, small = (1e3 * each for each in spent[causal])
    print(f"2,048 tokens, causal {causal!s:5s}: naive {naive:4.0f} ms, flash "
          f"{chosen:4.0f} ms, with tiles of 64 × 64 {small:4.0f} ms")

# %% tags=["nbval-ignore-output"]
from torch.nn.attention import SDPBackend, sdpa_kernel

def sdpa(backend, q, k, v):
    with sdpa_kernel(backend):
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

in_torch = [torch.from_numpy(a)[None] for a in arrays]
backends = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION
spent["torch"] = [seconds(sdpa, backend, *in_torch) for backend in backends]
for backend, each in zip(backends, spent["torch"]):
    print(f"torch, {backend.name:16s} {1e3 * each:6.0f} ms")

# %%
for name in (False, True, "torch"):
    gain = spent[name][0] / spent[name][1]
    least = 1.0 if name is False else 1.5
    what = "torch, causal" if name == "torch" else f"NumPy, causal {name}"
    print(f"{what:20s}: tiles are faster than the matrix by {least:.1f} times or more: "
          f"{gain >= least}")
for backend in backends:
    kept = [kept_bytes(lambda *a: sdpa(backend, *(t[None, None] for t in a)), n)
            for n in (512, 1024)]
    print(f"torch, {backend.name:16s} keeps {kept[1] / kept[0]:.1f} times as much for "
          "the backward pass at twice the length")

# %% [markdown]
# Tiles are faster although they do more: the scores stay in the caches, and a causal mask halves the work. (`course.py
# bench` prints the table from 512 to 4,096 tokens.) What the papers report from GPUs, each on its own machine:
#
# | | claim | against | source |
# |---|---|---|---|
# | FlashAttention | GPT-2 up to 3.5× as fast, 3× at 1K | Hugging Face's; 1.7× against Megatron-LM | 2205.14135, table 2 |
# | | BERT-large 15 % end to end, length 512 | the MLPerf record | 2205.14135 |
# | FlashAttention-2 | around 2×; 50 to 73 % of an A100's peak | FlashAttention | 2307.08691 |
# | FlashAttention-3 | 1.5 to 2.0×, up to 740 TFLOP/s, 75 % of an H100's peak | FlashAttention-2 | 2407.08608 |
#
# **Trap.** *"Flash attention: O(n) memory, 2 to 4 times faster, with any model, 6.4 points of F1."* The *extra* memory is
# O(n). The factor is that of the first kernel against standard attention, not of training. The 6.4 points are a lift on
# **long**-document classification, from longer contexts: the kernel computes the same numbers. And decoding gains nothing:

# %%
for n_queries in (100_000, 1):
    print(f"{n_queries:7,} queries on 100,000 keys: {-(-n_queries // 128):3d} tiles to "
          f"share out, {4 * 100_000 * n_queries / 1e6:9,.1f} MB of scores a head")

# %% [markdown] tags=["slide"]
# ### 6.7 A row in parts: split keys, and a ring of machines
#
# One query has one tile of queries and nothing to share out; lecture 05 splits its *keys* over many blocks. And a million
# tokens of keys and values (32 layers, 16 heads of 64, two bytes) are 131 GB: more than the 80 GB of a GPU, tiled or not,
# so four GPUs split them. **How do parts of a row become the row again?** Each part has its output, divided by its own sum,
# and its log-sum-exp. Its weight is its share of the whole sum, $e^{L_a}/(e^{L_a}+e^{L_b})$.
#
# *Predict.* The row of five in two halves, 1 and 2 | 0.5, 5 and 4. What share has the first half?

# %%
halves = [tiled_attention(one_row[0], *(a[part] for a in one_row[1:]), scale=1.0)
          for part in (slice(0, 2), slice(2, 5))]
(out_a, lse_a), (out_b, lse_b) = [(out[0, 0], lse[0]) for out, lse in halves]
share = 1 / (1 + np.exp(lse_b - lse_a))
print(f"half a {out_a:.3f}, half b {out_b:.3f}, share of a {share:.4f}")
print(f"merged {share * out_a + (1 - share) * out_b:.3f}")

# %% [markdown]
# 5 %, and the merge says 41.398.
#
# #### Exercise 6G: merge by log-sum-exp  (difficulty 2 of 5, useful, 12 minutes)
#
# Any number of parts, each over its own keys.
#
# |argument|shape|meaning|
# |---|---|---|
# |`outs`|`(n_parts, ..., n_queries, d_v)`|the output of each part; 0 where it had no key to attend to|
# |`lses`|`(n_parts, ..., n_queries)`|its log-sum-exp; `-inf` where it had no key to attend to|
#
# Returns the output `(..., n_queries, d_v)` and the log-sum-exp `(..., n_queries)` of the whole. A row that had nothing to
# attend to in any part is 0 and `-inf`.
#
# <details><summary>Hint</summary>
#
# If the log-sum-exps are scores, one for each part, what are the outputs? Which function of lecture 01 is that? Which
# number do you subtract before the exponential, and what if it is -inf?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def merge_by_lse(outs, lses):
    """Attention over all keys, from attentions over disjoint sets of keys.

    outs (n_parts, ..., n_queries, d_v), lses (n_parts, ..., n_queries): arrays or lists
    of arrays; -inf where a part had nothing to attend to. Returns (out, lse) without
    the axis of parts, in the float types of outs and lses; 0 and -inf for an empty row.
    """
    outs, lses = np.asarray(outs), np.asarray(lses)
    if lses.ndim < 1 or len(lses) == 0 or outs.shape[:-1] != lses.shape:
        raise ValueError("outs and lses must be (n_parts, ..., n_queries, d_v) and "
                         "(n_parts, ..., n_queries) of at least one part, got shapes "
                         f"{outs.shape} and {lses.shape}")
    ### BEGIN SOLUTION
    top = lses.max(axis=0)
    finite = np.where(np.isneginf(top), 0, top)
    shares = np.exp(lses - finite)
    total = shares.sum(axis=0)
    out = shares[..., None] * outs
    out[shares == 0] = 0  # a part that was not seen may hold anything, even nan
    out = out.sum(axis=0) / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):  # the logarithm of an empty row is -inf
        return cuda.like(out, outs), finite + np.log(total)
    ### END SOLUTION

# %%
merge_by_lse = check("6G", merge_by_lse)

# %% [markdown]
# #### Context parallelism: ring attention
#
# Queries, keys and values are cut along the sequence, over $P$ processes (**ranks**). The ranks stand in a ring: at each
# step a rank attends to the block of keys and values that it holds, merges, and hands the block on while the next one
# arrives. After $P-1$ exchanges everybody has seen everything, and nobody ever held more than two blocks (Liu, Zaharia and
# Abbeel 2023, arXiv 2310.01889).

# %% tags=["slide"]
holds = {f"step {t}": (np.arange(4) - t) % 4 for t in range(4)}
plotting.memory(holds, [(("step 0", 0), ("step 1", 1)), (("step 1", 1), ("step 2", 2)),
                        (("step 2", 2), ("step 3", 3))],
                "Each rank holds every block once, one at a time",
                owners={r: f"block of rank {r}" for r in range(4)})
plotting.show("Four rows of four cells, a column for each rank: the block of rank 0 "
              "moves one cell to the right at each step, and so do the others.")

# %% [markdown]
# **When does it pay?** A step does $4n_\text{loc}^2d$ operations and sends $4n_\text{loc}d$ bytes: $n_\text{loc}$
# operations a byte. With 312 TFLOP/s and the 300 GB/s of an A100's NVLink in one direction, messages hide behind the work
# from about 1,000 tokens a rank on.
#
# **Who works, and who waits?** A step ends when its slowest rank has finished. Contiguous, rank 0 has the first part of the
# text; **striped** (Brandon et al. 2023, arXiv 2311.09431), token $i$ belongs to rank $i\bmod P$.
#
# *Predict.* A causal mask, contiguous quarters: which rank has most to do, and which share of the ranks' time is work?

# %% tags=["slide"]
from attention.experiments.flash import pairs_of_work

ranks, share_of_work = [2, 4, 8, 16, 32], {"contiguous": [], "striped": []}
for n_ranks in ranks:
    tokens = np.arange(64 * n_ranks)
    for name, places in (("contiguous", tokens.reshape(n_ranks, 64)),
                         ("striped", tokens.reshape(64, n_ranks).T)):
        pairs = pairs_of_work(places)  # (ranks, steps)
        share_of_work[name].append(pairs.mean(0).sum() / pairs.max(0).sum())
        if n_ranks == 4:
            print(f"{name}: pairs of rank (rows) and step, in whole blocks\n"
                  f"{np.round(pairs / 64**2, 2)}")
for name, shares in share_of_work.items():
    print(f"{name:10s} work is", *(f"{each:.0%}" for each in shares), "of the time")
plotting.curves(share_of_work, x=ranks, xlabel="ranks of 64 tokens",
                ylabel="share of the time that is work",
                title="Dealt like cards, ranks work; in parts they wait half the time"
                ).set_xscale("log", base=2)
plotting.show("Share of work against ranks: striped stays near one, contiguous falls "
              "from two thirds towards one half.")

# %% [markdown]
# The last rank: it works at each step and the others wait for it. Striped, each block is half allowed, for everybody,
# always. The paper measured up to 1.45× end to end on 256k tokens, 1.65× on 786k; the limit is 2.
#
# #### Exercise 6H: around the ring  (difficulty 3 of 5, extra, 15 minutes)
#
# Without processes: a loop over ranks and steps, in one program. The real one, with three processes, is section 6.13.
#
# |argument|shape|meaning|
# |---|---|---|
# |`q`|`(n_ranks, n_local, d_head)`|the queries of each rank|
# |`k`, `v`|`(n_ranks, n_local, d)`|the keys and values that each rank holds at the beginning|
# |`positions`|`(n_ranks, n_local)` integers|where in the sequence they stand|
# |`causal`, `scale`||as before; a query may see the keys at its own position and before|
#
# Returns the output `(n_ranks, n_local, d_v)`. `attend_block(state, q, k, v, q_positions, k_positions, causal, scale)`
# takes one block into the pair `state = (out, lse)` and returns the new pair.
#
# <details><summary>Hint</summary>
#
# Whose block does rank r hold at step t (the figure)? Which output and which log-sum-exp has a rank that has seen nothing?
# Whose positions are those of the keys?
#
# </details>

# %%
from attention.flash import attend_block
from attention.fundamentals import check_arguments

# %% tags=["exercise", "export"] kind="numpy"
def ring_attention_numpy(q, k, v, positions, causal=False, scale=None):
    """Ring attention in one process: each rank attends to all blocks and merges.

    q, k (n_ranks, n_local, d_head), v (n_ranks, n_local, d_v), positions integers
    (n_ranks, n_local): where each token stands; causal: a query may see keys at its own
    position and before. scale defaults to 1/sqrt(d_head). Returns (n_ranks, n_local,
    d_v). Source: Liu, Zaharia and Abbeel 2023 (arXiv 2310.01889), algorithm 1.
    """
    check_arguments(q, k, v)
    if q.ndim != 3 or k.shape != q.shape or positions.shape != q.shape[:2]:
        raise ValueError("q, k and positions must be (n_ranks, n_local, d_head), the "
                         "same, and (n_ranks, n_local), got shapes "
                         f"{q.shape}, {k.shape} and {positions.shape}")
    q, k, v = (a.astype(cuda.float_type(a), copy=False) for a in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    ### BEGIN SOLUTION
    results = np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    for rank in range(len(q)):
        state = results[rank], np.full(q.shape[1], -np.inf, q.dtype)
        for step in range(len(q)):
            held = (rank - step) % len(q)
            state = attend_block(state, q[rank], k[held], v[held], positions[rank],
                                 positions[held], causal, scale)
        results[rank] = state[0]
    return results
    ### END SOLUTION

# %%
ring_attention_numpy = check("6H", ring_attention_numpy)

# %% [markdown]
# One step of a rank in a picture, and the running example as a ring of five ranks with a token each: the query is that of
# the last token, so it may see all.

# %%
q_ring = np.ones((5, 1, 1))
places = np.arange(5)[:, None]
around = ring_attention_numpy(q_ring, row_scores[:, None, None],
                              row_values[:, None, None], places, True, 1.0)
print("outputs of the five ranks:", *(f"{each:.3f}" for each in around[:, 0, 0]))
block = rng.standard_normal((2, 6, 8))
held_out, held_lse = rng.standard_normal((6, 8)), rng.standard_normal((6, 1))
part, part_lse = tiled_attention(q_20[:6], *block)
new_out, new_lse = merge_by_lse([held_out, part], [held_lse[:, 0], part_lse])
plotting.flow({"q of the rank": q_20[:6], "k, v that visit": block, "out": held_out,
               "lse": held_lse, "part": part, "out'": new_out, "lse'": new_lse[:, None],
               "k, v, next rank": block},
              [(("q of the rank", "k, v that visit"), "part", "attend"),
               (("out", "lse", "part"), "out'", "merge by lse"),
               (("lse", "part"), "lse'", "logaddexp"),
               ("k, v that visit", "k, v, next rank", "send on")],
              title="A rank merges what visits into what it has, and sends it on")
plotting.show("Data flow of a ring step: queries attend to the visiting block, the "
              "part is merged into output and log-sum-exp, the block goes on.")

# %% [markdown]
# The last rank says 41.398: the fifth rewrite.
#
# ### 6.8 In use
#
# **What do you call on Monday?** `F.scaled_dot_product_attention(q, k, v, is_causal=True)`: flash kernels where they fit,
# also on a CPU. Pitfalls: its causal mask begins at the *top left* (fewer queries than keys are wrong), and an explicit
# `attn_mask` may send you to a slower kernel. FlexAttention compiles a mask or bias of your own into such a kernel.
# flash-attn has `flash_attn_func` and, for packs, `flash_attn_varlen_func` with `cu_seqlens`; its causal mask is aligned at
# the bottom right since version 2.1. transformers: `attn_implementation="sdpa"` or `"flash_attention_2"`. vLLM packs
# prompts as in 6E. You meet it in the **time to the first token** and in the memory of training; tokens a second while
# decoding are lecture 05's.

# %%
new_q, all_k, all_v = (torch.from_numpy(rng.standard_normal((1, 1, n, 8)))
                       for n in (2, 5, 5))
ours, _ = flash_attention_torch(new_q, all_k, all_v, causal=True)
theirs = nn.functional.scaled_dot_product_attention(new_q, all_k, all_v, is_causal=True)
last = torch.ones(2, 5, dtype=torch.bool).tril(3)
masked = nn.functional.scaled_dot_product_attention(new_q, all_k, all_v, attn_mask=last)
print(f"two new queries on five keys: is_causal is off by "
      f"{(ours - theirs).abs().max():.2f}, a mask of the bottom right by "
      f"{(ours - masked).abs().max():.6f}")

# %% [markdown]
# ## What you can do now
#
# You can write exact attention that never holds the matrix, forward and backward, and test one that somebody else wrote.
# You can say which of three walls a kernel stands at. You can merge parts of a row, over blocks of threads or machines.

# %%
lengths = 2 ** np.arange(10, 21)
plotting.curves({"naive": 2 * 2 * lengths.astype(float)**2 / 1e9,
                 "flash attention": (4 * 64 * 2 + 4) * lengths / 1e9},
                x=lengths, log_y=True, xlabel="tokens", ylabel="gigabytes of one head",
                threshold=80, threshold_name="an H100, GB:",
                title="The matrix of one head outgrows a GPU at 141,000 tokens"
                ).set_xscale("log", base=2)
plotting.show("Gigabytes against tokens on double logarithmic axes: two matrices cross "
              "80 GB beyond 131,072 tokens, flash attention stays below 1 GB.")
print(f"two matrices, two bytes a number: 80 GB at {math.sqrt(80e9 / 4):,.0f} tokens; "
      f"flash at a million: {(4 * 64 * 2 + 4) * 2**20 / 1e9:.1f} GB")

# %% [markdown]
# ## Exercises left
#
# 1. `flash_attention_torch` gives no gradient to the log-sum-exp. Add it: $\partial L_i/\partial s_{ij}=P_{ij}$.
# 2. Deal the tokens of the ring in zigzag: rank $r$ gets chunk $r$ and chunk $2P-1-r$ of $2P$. Is it balanced?
# 3. Skip the rescaling when the maximum did not rise. How often is that, tile by tile, on random data?
# 4. A language model's loss is a log-sum-exp over the vocabulary. Write it in tiles of 4,096 words, so that the logits never
#    exist.

# %% [markdown]
# ## Quiz

# %% [markdown] tags=["quiz"]
# **1.** The maximum of a row so far is 2, its sum 1.6. A tile brings the scores 1 and 0. By which factor is the output so far
# multiplied?
#
# - a) 0.368
# - b) 1
# - c) 0.625
# - d) 2.718

# %% tags=["quiz"]
from utils import quiz

m_after, _ = online_softmax(np.array([2.0]), np.array([1.6]), np.array([[1.0, 0.0]]))
quiz.answer({"a": 0.368, "b": 1, "c": 0.625, "d": 2.718},
            float(np.exp(2.0 - m_after[0])),
            "The maximum did not rise, so nothing is measured anew.")

# %% [markdown] tags=["quiz"]
# **2.** An A100 has 192 KB for each multiprocessor. Which $B_c$ does algorithm 1 take for $d=64$ and two-byte numbers?
#
# - a) 768
# - b) 64
# - c) 1,536
# - d) 384

# %% tags=["quiz"]
quiz.answer({"a": 768, "b": 64, "c": 1536, "d": 384}, -(-192 * 1024 // 2 // (4 * 64)),
            "M counts numbers, and a tile each of Q, K, V and O has to fit.")

# %% [markdown] tags=["quiz"]
# **3.** Four queries, two keys, a causal mask aligned at the bottom right. What is the log-sum-exp of the first query?
#
# - a) 0
# - b) minus infinity
# - c) nan
# - d) log 2

# %% tags=["quiz"]
_, first_lse = flash_attention_numpy(np.ones((4, 1)), np.ones((2, 1)), np.ones((2, 1)),
                                     causal=True)
named = "minus infinity" if np.isneginf(first_lse[0]) else float(first_lse[0])
quiz.answer({"a": 0, "b": "minus infinity", "c": "nan", "d": math.log(2)}, named,
            "It sees no key: a sum of nothing is 0, and its logarithm -inf.")

# %% [markdown] tags=["quiz"]
# **4.** One head, 1,024 tokens, $d=64$. How many numbers does flash attention keep for the backward pass?
#
# - a) 1,048,576
# - b) 65,536
# - c) 263,168
# - d) 2,097,152

# %% tags=["quiz"]
kept = f"{kept_bytes(flash_attention_torch, 1024) // 4:,}"
quiz.answer({"a": "1,048,576", "b": "65,536", "c": "263,168", "d": "2,097,152"}, kept,
            "Q, K, V, the output and one number a row: 4 n d + n.")

# %% [markdown] tags=["quiz"]
# **5.** Two halves of a row have the outputs 10 and 20 and the same log-sum-exp 3. What is the log-sum-exp of the whole?
#
# - a) 3.693
# - b) 6
# - c) 3
# - d) 15

# %% tags=["quiz"]
_, whole_lse = merge_by_lse(np.array([[[10.0]], [[20.0]]]), np.array([[3.0], [3.0]]))
quiz.answer({"a": 3.693, "b": 6, "c": 3, "d": 15}, float(whole_lse[0]),
            "Sums add, their logarithms do not: log(e^3 + e^3) = 3 + log 2.")

# %% [markdown]
# ## Going further
#
# Short sections, each alone, in any order.

# %% [markdown]
# ### 6.9 The rungs of the ladder
#
# **What does each rung do about the wall of the one before?** Rung 2 gives a thread a whole query: $2d+16$ numbers, where
# it can have 255 registers. With $d=128$ they go to memory and back (a **spill**), and 1,024 queries keep only 1,024
# threads busy. Rung 3 is exercise 6F. Rung 4 needs each number less often, and loads four floats at once, a **chunk** of 16
# bytes.
#
# Chunks bring back bank conflicts: chunk 0 of all rows lies in the same four banks, and padding by one float would break the
# alignment. **Swizzling** moves chunk $c$ of row $r$ to place $c\oplus(r\bmod8)$ of its row (exclusive or).

# %%
chunk_rows = np.arange(8)  # a map's title says what it shows
for place_of in (8 * chunk_rows, 8 * chunk_rows + (0 ^ chunk_rows)):
    plotting.bank_map(16 * place_of, size=16)
plotting.show("Two maps of the 32 banks: as they stand, chunk 0 of eight rows piles up "
              "in the first four banks; swizzled, each has four banks of its own.")

# %%
from attention.flash import SWIZZLE, flash_launch

one_head = [torch.from_numpy(a)[None] for a in head]
kernel, launch, arguments = flash_launch("registers", *one_head)
swizzled = kernel.check[launch](*arguments)
PLAIN = "__device__ int place(int row, int chunk, int n) { return row * n + chunk; }"
as_they_stand = cuda.compile(kernel.source.replace(SWIZZLE, PLAIN),
                             name="flash_registers", template=kernel.template)
plain = as_they_stand.check[launch](*arguments)
turns = [sum(row.wavefronts for row in each.rows if row.space == "shared")
         for each in (plain, swizzled)]
print(f"bank conflicts swizzled: {swizzled.bank_conflicts}; without the swizzle more "
      f"than 1.5 times the turns: {turns[0] > 1.5 * turns[1]}")

# %% [markdown]
# Rung 6 hands tiles of 16 × 16 to the tensor cores by `nvcuda::wmma`. It does not say which lane holds which entry, so
# nobody knows where a row is: scores go to shared memory for their maximum, and the output too, for every tile of keys,
# only to be multiplied by a factor.
#
# Rung 7 uses the instruction below, `mma.sync`, which does say it. A warp holds 16 queries; lane $l$ has the entries of
# rows $l/4$ and $l/4+8$, two columns of every eight. A row's maximum takes two shuffles. And the scores of a tile lie in
# the registers just as the next product wants its left factor: **weights never leave the registers.** `ldmatrix` brings K
# and V from shared memory in that order, V transposed.

# %%
from attention.flash import HALF_TILES

# %% tags=["export"]
MMA = r"""
// Four 8 x 8 tiles of shared memory into registers; lane l names the row l % 8 of tile l / 8.
__device__ void load_tiles(unsigned (&r)[4], const element* row) {
  unsigned address = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ void load_tiles_transposed(unsigned (&r)[4], const element* row) {
  unsigned address = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
// sum (16 x 8) += a (16 x 16) b (16 x 8)
__device__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ unsigned pack(float low, float high) {
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
"""

# %% tags=["export"]
MMA_STEPS = r"""
#define MMA_KEYS 64                                      // keys of a tile
// Scores of 16 queries with the tile, eight keys a piece.
template <int D> __device__ void mma_scores(float (&s)[MMA_KEYS / 8][4], const element* k_tile,
                                            const unsigned (&query)[D / 16][4]) {
  int lane = threadIdx.x % 32, key = lane / 16 * 8 + lane % 8, column = lane / 8 % 2 * 8;
  for (int c = 0; c < MMA_KEYS / 16; ++c)
    for (int t = 0; t < D / 16; ++t) {
      unsigned b[4];
      load_tiles(b, k_tile + (16 * c + key) * (D + 8) + 16 * t + column);
      multiply_add(s[2 * c], query[t], b[0], b[1]);
      multiply_add(s[2 * c + 1], query[t], b[2], b[3]);
    }
}
// Scores of row r (0 or 1) of this lane become weights; returns the factor for the sums so far.
__device__ float mma_rescale(float (&s)[MMA_KEYS / 8][4], int r, float& maximum, float& total) {
  float highest = maximum;
  for (int c = 0; c < MMA_KEYS / 8; ++c)
    highest = fmaxf(highest, fmaxf(s[c][2 * r], s[c][2 * r + 1]));
  highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 1));
  highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 2));
  float shift = highest == -INFINITY ? 0.0f : highest, factor = expf(maximum - shift);
  maximum = highest;
  total *= factor;
  for (int c = 0; c < MMA_KEYS / 8; ++c)
    for (int e = 2 * r; e < 2 * r + 2; ++e) {
      s[c][e] = expf(s[c][e] - shift);
      total += s[c][e];
    }
  return factor;
}
// sum += weights times V; the weights are packed into the left factor where they are.
template <int D> __device__ void mma_blend(float (&sum)[D / 8][4], const element* v_tile,
                                           const float (&s)[MMA_KEYS / 8][4]) {
  int lane = threadIdx.x % 32;
  for (int c = 0; c < MMA_KEYS / 16; ++c) {
    const float *left = s[2 * c], *right = s[2 * c + 1];
    unsigned p[4] = {pack(left[0], left[1]), pack(left[2], left[3]),
                     pack(right[0], right[1]), pack(right[2], right[3])};
    for (int t = 0; t < D / 16; ++t) {
      unsigned b[4];
      load_tiles_transposed(b, v_tile + (16 * c + lane % 16) * (D + 8) + 16 * t + lane / 16 * 8);
      multiply_add(sum[2 * t], p, b[0], b[1]);
      multiply_add(sum[2 * t + 1], p, b[2], b[3]);
    }
  }
}
"""

# %% tags=["export"]
FLASH_MMA = r"""
template <int D, int WARPS>                              // d rounded up by 16; 16 queries a warp
__global__ void flash_mma(const element* q, const element* k, const element* v, element* out,
                          float* lse, int n_queries, int n_keys, int d, int causal, float scale) {
  extern __shared__ __align__(128) element k_tile[];     // the queries too, at the beginning
  element* v_tile = k_tile + max(16 * WARPS, MMA_KEYS) * (D + 8);
  int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16, top = blockIdx.y * 16 * WARPS;
  int i = top + own + lane / 4, column = lane % 4 * 2;   // this lane's entries: rows i and i + 8
  size_t head = blockIdx.x;
  const element* keys = k + head * n_keys * d;
  const element* values = v + head * n_keys * d;
  int visible = visible_keys(top + 16 * WARPS, n_queries, n_keys, causal);
  load_half<D>(k_tile, 16 * WARPS, q + head * n_queries * d, top, n_queries, d);
  __syncthreads();
  unsigned query[D / 16][4];
  for (int t = 0; t < D / 16; ++t)
    load_tiles(query[t], k_tile + (own + lane % 16) * (D + 8) + 16 * t + lane / 16 * 8);
  float sum[D / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, total[2] = {};
  for (int first = 0; first < visible; first += MMA_KEYS) {
    __syncthreads();
    load_half<D>(k_tile, MMA_KEYS, keys, first, visible, d);
    load_half<D>(v_tile, MMA_KEYS, values, first, visible, d);
    __syncthreads();
    float s[MMA_KEYS / 8][4] = {};
    mma_scores<D>(s, k_tile, query);
    for (int c = 0; c < MMA_KEYS / 8; ++c)
      for (int e = 0; e < 4; ++e)
        if (may_attend(i + e / 2 * 8, first + 8 * c + column + e % 2, n_queries, n_keys, causal))
          s[c][e] *= scale;
        else
          s[c][e] = -INFINITY;
    float factor[2];
    for (int r = 0; r < 2; ++r) factor[r] = mma_rescale(s, r, maximum[r], total[r]);
    for (int t = 0; t < D / 8; ++t)
      for (int e = 0; e < 4; ++e) sum[t][e] *= factor[e / 2];
    mma_blend<D>(sum, v_tile, s);
  }
  for (int e = 0; e < 4; ++e) {                          // write: two rows, even and odd columns
    int row = i + e / 2 * 8;
    float all = total[e / 2] + __shfl_xor_sync(0xffffffff, total[e / 2], 1);
    all += __shfl_xor_sync(0xffffffff, all, 2);
    for (int c = column + e % 2, t = 0; c < d && row < n_queries; c += 8, ++t)
      out[(head * n_queries + row) * d + c] = element(all == 0.0f ? 0.0f : sum[t][e] / all);
    if (e % 2 == 0 && column == 0 && row < n_queries)
      lse[head * n_queries + row] = all == 0.0f ? -INFINITY : maximum[e / 2] + logf(all);
  }
}
"""

# %%
kernel, launch, arguments = flash_launch("mma", *(a.half() for a in one_head))
report = kernel.check[launch](*arguments)
off_by = np.abs(arguments[3][0].numpy() - expected).max() / np.abs(expected).max()
print(f"rung 7: off from single precision by {off_by:.4f} of the largest; "
      f"problems {len(report.problems)}, bank conflicts {report.bank_conflicts}")

# %% [markdown]
# That is the precision of half, and no conflict. FlashAttention-2's own kernels are built so; those of FlashAttention-3
# (6.16) let the loads and the softmax run beside the products.

# %% [markdown]
# ### 6.10 A formula for the bytes
#
# **What decides the traffic?** A block of $B_q$ queries loads them once, and each key and value that one of them can see.
# With $\text{vis}(b)$ keys for block $b$ and $w$ bytes a number a head loads $w\,(nd+2d\sum_b\text{vis}(b))$ and stores
# $w\,nd+4n$. The size of a tile of *keys* does not appear: it costs shared memory, and saves barriers and rescalings, no
# global byte.

# %%
from attention.flash import flash_attention_cuda, flash_bytes

for rung, block_q in (("rows", 64), ("shared", 16), ("registers", 64)):
    kernel, launch, arguments = flash_launch(rung, *one_head, True)
    loaded = kernel.check[launch](*arguments).global_loaded
    print(f"{rung:9s} causal: loaded {loaded:8,}, formula "
          f"{flash_bytes(128, 128, 64, block_q, True)[0]:8,}")
out, lse = flash_attention_cuda(*(np.full((40, 64), x, np.float32) for x in (1, -1, 1)),
                                scale=200 / 64)
print(f"scores of -200: outputs {out.min():.3f} to {out.max():.3f}, "
      f"lse {lse[0]:.3f}, -200 + log 40 = {math.log(40) - 200:.3f}")

# %% [markdown]
# ### 6.11 Backward on a GPU: recompute, twice
#
# **Who adds up the gradient of a key, when all queries contribute?** One kernel over the tiles of queries has everything
# for $dQ$. For $dK$ and $dV$ a second one goes over the tiles of keys and walks along the queries. Both compute the weights
# again. One kernel alone would need atomic additions, whose order, and last digits, would change from run to run. (The
# kernels stand in Behind the scenes.)

# %%
from attention.flash import (flash_attention_backward_cuda,
                             flash_attention_backward_numpy)

q, k, v, d_out = (rng.standard_normal((2, rows, 64)) for rows in (40, 30, 30, 40))
out, lse = flash_attention_cuda(q, k, v, causal=True)
got = flash_attention_backward_cuda(q, k, v, out, lse, d_out, causal=True)
wanted = flash_attention_backward_numpy(
    q, k, v, *flash_attention_numpy(q, k, v, causal=True), d_out, causal=True)
for name, a, b in zip(("dQ", "dK", "dV"), got, wanted):
    print(f"{name}: largest difference to NumPy, relative "
          f"{np.abs(a - b).max() / np.abs(b).max():.5f}")
print(f"gradient of the ten queries without a key: {np.abs(got[0][:, :10]).max():.3f}")

# %% [markdown]
# ### 6.12 Dropout that can be replayed
#
# **In training some weights are set to zero at random, and the backward pass must drop the same ones. Must the mask be
# stored?** It is another $n\times n$ matrix. A random generator gives its numbers in order, and the backward pass visits
# the tiles in another one. *Counter-based* generators have no order: numbers are a function of a key and a counter, and the
# tile's indices are the counter. The mask belongs on the weights *after* $\ell$ has counted them:
# $\frac1{1-r}\sum_jZ_{ij}P_{ij}V_j$.

# %%
from attention.experiments.flash import keep_mask, with_dropout

q, k, v, d_out = rng.standard_normal((4, 12, 4))
ours = with_dropout(q, k, v, d_out, seed=7, rate=0.25, block=4)  # masks made twice
whole = np.block([[keep_mask(7, i, j, (4, 4), 0.25) for j in (0, 4, 8)]
                  for i in (0, 4, 8)])
tensors = [torch.from_numpy(a).requires_grad_() for a in (q, k, v)]
dropped = torch.softmax(tensors[0] @ tensors[1].mT, -1) * torch.from_numpy(whole) / 0.75
out = dropped @ tensors[2]
theirs = [out, *torch.autograd.grad(out, tensors, torch.from_numpy(d_out))]
for name, a, b in zip(("output", "dQ", "dK", "dV"), ours, theirs):
    gap = np.abs(a - b.detach().numpy()).max()
    print(f"{name:6s} against a stored mask: {gap:.6f}")
other = np.block([[keep_mask(7, i, j, (6, 6), 0.25) for j in (0, 6)] for i in (0, 6)])
print(f"tiles of another size: {(whole == other).mean():.0%} of the mask agrees")

# %% [markdown]
# The last line is a limit of this scheme: forward and backward must agree on the tiles. Real kernels count by element.

# %% [markdown]
# ### 6.13 For real: a ring of three processes
#
# `torch.distributed` sends tensors between processes (gloo is its backend for CPUs): receive the next block while you
# compute with this one, merge, swap. A rank that dies must not leave the others waiting for ever. (A new process cannot
# import a notebook, so it runs the course's finished module, not your functions.)

# %%
from attention.flash import ring_attention

q, k, v = rng.standard_normal((3, 60, 8))
out = ring_attention(q, k, v, n_ranks=3, causal=True)
alone = attention_numpy(q, k, v, causal=True)
print(f"three processes, striped, causal: off by {np.abs(out - alone).max():.6f}")
try:
    ring_attention(q, k, v, n_ranks=2, causal=True, dies=1)
except RuntimeError as error:
    print(error)

# %% [markdown]
# ### 6.14 Rabe and Staats: xFormers' memory-efficient attention
#
# **Was FlashAttention the first without the matrix?** No. Half a year before, Rabe and Staats (2021, arXiv 2112.05682)
# noted that self-attention "does not need $O(n^2)$ memory": keys in chunks, for each chunk its output, maximum and sum, all
# merged in the end. xFormers' *memory-efficient attention* is such a kernel.
#
# *Predict.* Chunks of 64 queries, $n=1024$, $d=64$: with which chunk of keys is the peak lowest?

# %%
# Memory is counted: on the course's functions, not on yours.
from attention.flash import merge_by_lse as merge, tiled_attention as tiled

def chunked_attention(q, k, v, chunk_q, chunk_k):
    """Attention as in 2112.05682: all chunks of keys first, one merge at the end."""
    out = np.empty((len(q), v.shape[1]), q.dtype)
    for i in range(0, len(q), chunk_q):
        parts = [tiled(q[i:i + chunk_q], k[j:j + chunk_k], v[j:j + chunk_k],
                       False, None, chunk_q, chunk_k)
                 for j in range(0, len(k), chunk_k)]
        out[i:i + chunk_q] = merge(*zip(*parts))[0]
    return out

q, k, v = rng.standard_normal((3, 1024, 64))
for chunk in (16, 64, 256, 1024):
    peak = peak_bytes(chunked_attention, q, k, v, 64, chunk) - q.nbytes
    print(f"chunks of {chunk:4d} keys: {peak / 1e6:4.1f} MB beyond the output")
merged = peak_bytes(tiled, q, k, v, False, None, 64, 64) - q.nbytes
print(f"(n d)^(1/2) is {math.sqrt(1024 * 64):.0f}; merged at once {merged / 1e6:.1f}")

# %% [markdown]
# Near $c=\sqrt{nd}$: $c$ scores for each query, and $n/c$ partial outputs of $d$ numbers to keep, hence their $O(\sqrt n)$.
# Merging at once needs no list.

# %% [markdown]
# ### 6.15 Flash, sparse: tiles that are never loaded
#
# **If a mask of tiles is known beforehand, what is saved?** Bytes and arithmetic of each tile that is absent. The first
# paper has such a variant; lecture 07 is about which tiles to keep.

# %%
n, B, d = 256, 32, 16
q, k, v = rng.standard_normal((3, n, d))
distance = np.abs(np.arange(n // B)[:, None] - np.arange(n // B))
keep = (distance <= 1) | (np.arange(n // B) == 0)  # neighbours, and the first tile
out, loaded = np.zeros_like(q), 0
for i in range(n // B):
    columns = np.flatnonzero(np.repeat(keep[i], B))  # only these are read
    rows = slice(i * B, (i + 1) * B)
    out[rows], _ = flash_attention_numpy(q[rows], k[columns], v[columns])
    loaded += 2 * columns.size * d
mask = np.kron(keep, np.ones((B, B), bool))
gap = np.abs(out - attention_numpy(q, k, v, mask=mask)).max()
print(f"tiles kept {keep.mean():.0%}, of K and V loaded "
      f"{loaded / (2 * n * d * (n // B)):.0%}; against the mask {gap:.6f}")

# %% [markdown]
# ### 6.16 FlashAttention-3, first idea: ping-pong
#
# **A GPU does products and exponentials in different units. Can both be busy?** For one score of a head of 128: $4\cdot128$
# operations in products, one exponential.

# %%
from attention.experiments.flash import schedule

products, exponentials = 989e12, 132 * 16 * 1.83e9  # a second, on an H100
print("exponentials take "
      f"{products / exponentials / (4 * 128):.2f} of the products' time")
figure, axes = plt.subplots(2, 1, figsize=(8, 3.6), sharex=True)
for ax, groups in zip(axes, (1, 2)):
    jobs = schedule(groups, tiles=6)
    for group, unit, start, length in jobs:
        ax.barh(unit, length, left=start, height=0.8, edgecolor="white",
                color=("#0072B2", "#E69F00")[group], hatch=("", "//")[group])
    end = max(start + length for _, _, start, length in jobs)
    busy = sum(length for _, unit, _, length in jobs if unit == "products") / end
    ax.set(title=f"{groups} group{'s' * (groups > 1)} of warps, {groups * 6} tiles in "
                 f"{end} units: products run {busy:.0%} of the time", xlim=(0, 25))
axes[1].set_xlabel("time (an exponential part = 1, the products of a tile = 2)")
plotting.show("Two Gantt charts: with one group products and softmax alternate; two "
              "groups do twice as many tiles in 25 units, not 36, without a gap.")

# %% [markdown]
# Half of it. Whoever does one after the other leaves the tensor cores idle for a third of the time. FlashAttention-3 lets
# two groups of warps take turns, kept apart by a barrier. Its ablation: 661 TFLOP/s with overlap, 570 to 582 without one of
# its two forms (2407.08608, table 2). FlashAttention-2 reaches 35 % of an H100's peak; it was written for the A100.

# %% [markdown]
# ### 6.17 FlashAttention-3, second idea: 8 bits and a rotation
#
# **The tensor cores are twice as fast on 8-bit numbers. What is lost?** An e4m3 has three bits after the leading one, and
# it gets bad where a few entries are very large. The remedy: turn queries and keys by the same orthogonal $H$. Scores stay,
# $(QH)(KH)^\top=QK^\top$, and an outlier is spread over its row. $H$ is a **Hadamard** matrix with random signs: $d\log d$
# operations, no table ("incoherent processing").
#
# *Predict.* Scattered outliers (one entry in a thousand), or two large channels as trained models have: where does the
# rotation help more?

# %%
def hadamard(d):
    """The orthogonal Hadamard matrix (d, d), for d a power of two."""
    h = np.ones((1, 1))
    while len(h) < d:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(d)

def to_fp8(x):
    """x rounded to e4m3 with one scale for all; 448 is the largest e4m3."""
    scale = np.abs(x).max() / 448
    return torch.from_numpy(x / scale).to(torch.float8_e4m3fn).double().numpy() * scale

def with_outliers(kind, draw, d=64):
    """Three arrays (1024, d): single entries, or two channels, are large."""
    x = draw.standard_normal((3, 1024, d))
    if kind == "channels":
        return x * np.where(np.isin(np.arange(d), (3, 17)), 8, 1)
    return x + 10 * draw.standard_normal(x.shape) * (draw.random(x.shape) < 0.001)

# %%
for kind in ("scattered", "channels"):
    errors = {"plain": [], "rotated": []}
    for seed in range(3):
        draw = np.random.default_rng(seed)
        q, k, v = with_outliers(kind, draw)
        H = draw.choice([-1.0, 1.0], 64)[:, None] * hadamard(64)
        exact = attention_numpy(q, k, v)
        for way, pair in (("plain", (q, k)), ("rotated", (q @ H, k @ H))):
            rounded = attention_numpy(*map(to_fp8, (*pair, v)))
            errors[way].append(np.sqrt(np.mean((rounded - exact)**2)))
    plain, rotated = (np.mean(each) for each in errors.values())
    print(f"{kind:9s} error {plain:.3f}, rotated {rotated:.3f}: "
          f"{plain / rotated:.1f} times less")

# %% [markdown]
# On the channels. The paper tests the first kind and reports 2.6 times less error (§ 4.3); our weights are not rounded,
# theirs are.

# %% [markdown]
# ### 6.18 Sigmoid attention and FlashSigmoid: no row, no rescaling
#
# **Everything here comes from one fact: a softmax needs its whole row. What if it did not?** Take a sigmoid of each score
# by itself (Ramapuram et al. 2024, arXiv 2409.04431): $O_i=\sum_j\sigma(s_{ij}+b)V_j$ with $b=-\log n$. No maximum, no sum;
# tiles just add up. Their 17 % is the speed-up of the *inference kernel* over FlashAttention-2 on an H100.
#
# **Does it learn as well?** The recall task of lecture 01 (which symbol was it, $k$ steps ago?), two seeds each. The
# control: softmax.
#
# *Predict.* In which order do softmax, sigmoid, and sigmoid with $b=0$ learn?

# %%
from attention.experiments.flash import recall_losses

q, k, v = rng.standard_normal((3, 100, 16))
gates = 1 / (1 + np.exp(-(q @ k.T / 4 - np.log(100))))
tiles = sum(gates[:, j:j + 32] @ v[j:j + 32] for j in range(0, 100, 32))
print(f"tiles add up, off by {np.abs(tiles - gates @ v).max():.6f}; weights of a row "
      f"sum to {gates.sum(1).min():.2f} to {gates.sum(1).max():.2f}")
kinds = {"softmax": lambda s: torch.softmax(s, -1),
         "sigmoid, b = -log n": lambda s: torch.sigmoid(s - math.log(64)),
         "sigmoid, b = 0": torch.sigmoid}
losses = {name: np.array([recall_losses(weigh, seed) for seed in range(2)])
          for name, weigh in kinds.items()}
for name, both in losses.items():
    print(f"{name:20s} mean loss over 200 steps {both.mean():.1f}")
tens = {name: both.reshape(2, 20, 10).mean(-1) for name, both in losses.items()}
plotting.curves(tens,
                x=np.arange(10, 210, 10), xlabel="steps of training",
                ylabel="loss (nats, mean of 10 steps)",
                title="Sigmoid learns as softmax does with b = -log n, late with b = 0")
plotting.show("Training loss against steps: softmax and sigmoid with b = -log n fall "
              "together, sigmoid with b = 0 falls between steps 130 and 190, as low.")

# %% [markdown]
# As fast as softmax, given the bias. With $b=0$ it starts later, and solves the task too: here the bias buys a good start,
# not a better end.

# %% [markdown]
# ## Behind the scenes
#
# **Arguments, and tiles chosen from the sizes.** Where a caller gives none, 256 × 512 numbers of scores for at most four
# heads at a time: 2 MB in single precision, which stay in a processor's caches.

# %% tags=["plumbing"]
import datetime
import functools
import socket
import tempfile
import tracemalloc
import warnings
from multiprocessing import connection
from pathlib import Path

from torch import distributed, multiprocessing
from torch.nn import functional as F

from attention.experiments.fundamentals import Recall, recall_loss
from attention.fundamentals import BLEND, ROW_OF_A_TILE, SCORES, SOFTMAX_ROWS, check_arguments
from utils import data, training

# %% tags=["export", "plumbing"]
def check_blocks(block_q, block_k):
    """Raise ValueError, in one sentence, unless both sizes of a tile are positive whole numbers."""
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name} must be a positive whole number, got {size!r}")

def leading_axes(q, k, v):
    """The leading axes of q, k and v, broadcast together. Raises ValueError, in one sentence, where they cannot be."""
    axes = [tuple(a.shape[:-2]) for a in (q, k, v)]
    try:
        return np.broadcast_shapes(*axes)
    except ValueError:
        got = f"{axes[0]}, {axes[1]}, {axes[2]}"
        raise ValueError(f"the leading axes of q, k and v must broadcast, got {got}") from None

def check_flash_arguments(kind, q, k, v, block_q=None, block_k=None):
    """Raise ValueError unless q, k, v and the sizes of a tile fit; TypeError unless all are of a kind (array, tensor)."""
    check_arguments(q, k, v)
    check_blocks(1 if block_q is None else block_q, 1 if block_k is None else block_k)
    leading_axes(q, k, v)
    cuda.check_kind(kind, q=q, k=k, v=v)

# %% tags=["export", "plumbing"]
TILE_QUERIES, TILE_KEYS = 256, 512                         # of a tile that is chosen
TILE_SCORES = 4 * TILE_QUERIES * TILE_KEYS                 # at a time, all heads together

def chosen_tile(n_queries, n_keys, block_q=None, block_k=None):
    """Rows of a tile of queries and of keys: those given, others from the sizes."""
    return (max(1, min(TILE_QUERIES, n_queries)) if block_q is None else block_q,
            max(1, min(TILE_KEYS, n_keys)) if block_k is None else block_k)

def parts_of(lead, size):
    """Indices that cut leading axes into parts of at most `size` heads (a part of one head at least)."""
    if math.prod(lead) <= size or not lead:
        yield ()
        return
    step = max(1, size // max(1, math.prod(lead[1:])))
    for first in range(0, lead[0], step):
        for rest in parts_of(lead[1:], size):
            yield slice(first, first + step), *rest

def flash_attention_numpy(q, k, v, causal=False, scale=None, block_q=None, block_k=None):
    """Attention tile by tile: the output and the log-sum-exp of each row, without the matrix of scores, in NumPy.

    The oracle of flash_attention_torch and flash_attention_cuda.
    q (..., n_queries, d_head), k (..., n_keys, d_head), v (..., n_keys, d_v), leading axes broadcast; causal is aligned
    at the bottom right; scale defaults to 1/sqrt(d_head). block_q, block_k: rows of a tile of queries and of keys, for
    all leading axes at once; where one is None, it is chosen from the sizes, and few heads are taken at a time. Returns
    out (..., n_queries, d_v) in the float type of q and lse (..., n_queries), at least in single precision; 0 and -inf
    for a query with nothing to attend to. The sizes of tiles do not change the result beyond rounding. Raises
    ValueError when shapes do not fit or a size is no positive whole number.
    Source: Dao 2023 (arXiv 2307.08691), algorithm 1.
    """
    check_flash_arguments(np.ndarray, q, k, v, block_q, block_k)
    lead = leading_axes(q, k, v)
    rows, keys = chosen_tile(q.shape[-2], k.shape[-2], block_q, block_k)
    heads = math.prod(lead)
    if block_q is None or block_k is None:
        heads = max(1, TILE_SCORES // (rows * (keys + q.shape[-1] + v.shape[-1])))
    out = np.zeros((*lead, q.shape[-2], v.shape[-1]), cuda.float_type(q))
    lse = np.zeros((*lead, q.shape[-2]), cuda.work_type(q))
    q, k, v = (np.broadcast_to(a, (*lead, *a.shape[-2:])) for a in (q, k, v))
    for part in parts_of(lead, heads):
        out[part], lse[part] = tiled_attention(q[part], k[part], v[part], causal, scale, rows, keys)
    return out, lse

# %% [markdown]
# **A slow memory that counts**, the standard way on it, and FlashAttention-2. And what the memory of a machine held.

# %% tags=["export", "plumbing"]
class SlowMemory:
    """Named arrays (n, ...) of which rows are loaded and stored; counts the elements that move."""

    def __init__(self, **arrays):
        self.arrays, self.loaded, self.stored = arrays, Counter(), Counter()

    def load(self, name, rows):
        self.loaded[name] += self.arrays[name][rows].size
        return self.arrays[name][rows].copy()

    def store(self, name, rows, block):
        self.stored[name] += block.size
        self.arrays[name][rows] = block

    @property
    def traffic(self):
        return self.loaded.total() + self.stored.total()

    def tiles(self, size):
        """The rows of Q in tiles, as slices."""
        n = len(self.arrays["Q"])
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]

# %% tags=["export", "plumbing"]
def algorithm_0(q, k, v):
    """Standard attention as in the paper, without scale. Returns the output and the memory it used."""
    n, every = len(q), slice(None)
    memory = SlowMemory(Q=q, K=k, V=v, S=np.empty((n, len(k))), P=np.empty((n, len(k))), O=np.empty((n, v.shape[1])))
    memory.store("S", every, memory.load("Q", every) @ memory.load("K", every).T)
    s = memory.load("S", every)
    p = np.exp(s - s.max(1, keepdims=True))
    memory.store("P", every, p / p.sum(1, keepdims=True))
    memory.store("O", every, memory.load("P", every) @ memory.load("V", every))
    return memory.arrays["O"], memory

# %% tags=["export", "plumbing"]
def algorithm_2(q, k, v, block_q, block_k):
    """The forward pass of FlashAttention-2 without scale: queries outside. Returns output, memory, counts."""
    n, d = q.shape
    memory = SlowMemory(Q=q, K=k, V=v, O=np.zeros((n, d)), L=np.zeros((n, 1)))
    count = Counter(tiles_q=-(-n // block_q), tiles_k=-(-n // block_k))
    for i in range(0, n, block_q):
        rows = slice(i, i + block_q)
        Q_i = memory.load("Q", rows)
        m, ell, O_i = np.full((len(Q_i), 1), -np.inf), np.zeros((len(Q_i), 1)), np.zeros((len(Q_i), d))
        for j in range(0, n, block_k):
            K_j, V_j = (memory.load(name, slice(j, j + block_k)) for name in "KV")
            S = Q_i @ K_j.T
            m_new = np.maximum(m, S.max(1, keepdims=True))
            P, factor = np.exp(S - m_new), np.exp(m - m_new)
            ell, m, O_i = factor * ell + P.sum(1, keepdims=True), m_new, factor * O_i + P @ V_j
            count["multiplied"] += O_i.size
        memory.store("O", rows, O_i / ell)                                     # divided once, at the end
        memory.store("L", rows, m + np.log(ell))
        count["divided"] += O_i.size
    return memory.arrays["O"], memory, count

# %% tags=["export", "plumbing"]
def naive_bytes(n, d):
    """Bytes that the three kernels of lecture 01 move through global memory, counted: each sector once a kernel."""
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((n, d)).astype(np.float32) for _ in range(3))
    s, p, out = np.zeros((n, n), np.float32), np.zeros((n, n), np.float32), np.zeros((n, d), np.float32)
    return sum(report.distinct_loaded + report.distinct_stored for report in naive_reports(q, k, v, s, p, out))

def naive_reports(q, k, v, s, p, out):
    """Reports of the three kernels of lecture 01: scores, softmax, blend."""
    (n, d), m = q.shape, len(k)

    def up(size):
        return -(-size // 16)

    return [cuda.compile(SCORES).check[(up(m), up(n)), (16, 16)](q, k, s, n, m, d, 1 / math.sqrt(d)),
            cuda.compile(SOFTMAX_ROWS).check[n, 32](s, p, m),
            cuda.compile(BLEND).check[(up(d), up(n)), (16, 16)](p, v, out, n, m, d)]

def peak_bytes(function, *arguments):
    """The most memory that NumPy held at any moment of the call, in bytes, without what was there before."""
    tracemalloc.start()
    function(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak

def kept_bytes(function, n, d=64):
    """Bytes that autograd keeps between the forward and the backward pass of one head of length n."""
    kept = {}
    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    arrays = [torch.zeros(n, d, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*arrays)
        del result                                              # the hook has seen all that its graph held
    return sum(kept.values())

# %% [markdown]
# **Tiles under a causal mask**, and what a backward pass is given.

# %% tags=["export", "plumbing"]
def causal_tiles(n_queries, n_keys, block_q, block_k):
    """Count the tiles of a causal matrix, aligned at the bottom right: integers (3,), full, partial, skipped.

    Full: every query of the tile may see every key of it; skipped: none may see any. Ragged last tiles count as one.
    Raises ValueError when a block size is no positive whole number.
    """
    check_blocks(block_q, block_k)
    if n_queries < 0 or n_keys < 0:
        raise ValueError(f"n_queries and n_keys must not be negative, got {n_queries} and {n_keys}")
    full = partial = skipped = 0
    for i in range(0, n_queries, block_q):
        last_i, shift = min(i + block_q, n_queries) - 1, n_keys - n_queries
        for j in range(0, n_keys, block_k):
            last_j = min(j + block_k, n_keys) - 1
            if last_j <= i + shift:
                full += 1
            elif j <= last_i + shift:
                partial += 1
            else:
                skipped += 1
    return np.array([full, partial, skipped])

# %% tags=["export", "plumbing"]
def check_backward(q, k, v, out, lse, d_out):
    """Raise ValueError, in one sentence, unless what a backward pass is given fits together. For arrays and tensors."""
    check_arguments(q, k, v)
    cuda.check_numbers(out=out, lse=lse, d_out=d_out)
    lead = tuple(q.shape[:-2])
    shapes = {"k": (k, (*lead, *k.shape[-2:])), "v": (v, (*lead, *v.shape[-2:])), "lse": (lse, tuple(q.shape[:-1])),
              "out": (out, (*q.shape[:-1], v.shape[-1])), "d_out": (d_out, (*q.shape[:-1], v.shape[-1]))}
    for name, (array, expected) in shapes.items():
        if tuple(array.shape) != tuple(expected):
            raise ValueError(f"{name} must have the shape {tuple(expected)}, got {tuple(array.shape)}")

# %% [markdown]
# **The triple**: the backward pass in NumPy, and flash attention in PyTorch.

# %% tags=["export", "plumbing"]
def flash_attention_backward_numpy(q, k, v, out, lse, d_out, causal=False, scale=None):
    """Gradients of flash_attention_numpy's output with respect to q, k and v: weights are computed again, in NumPy.

    q, k, v, causal, scale as in flash_attention_numpy, with equal leading axes; out and lse are what it returned; d_out
    (..., n_queries, d_v). Returns (d_q, d_k, d_v) of the shapes and types of q, k, v; 0 for a query with nothing to
    attend to. Raises ValueError when shapes do not fit.
    Source: Dao 2023 (arXiv 2307.08691), algorithm 2.
    """
    check_backward(q, k, v, out, lse, d_out)
    cuda.check_kind(np.ndarray, q=q, k=k, v=v, out=out, lse=lse, d_out=d_out)
    work = cuda.work_type(q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    types = [cuda.float_type(a) for a in (q, k, v)]
    q, k, v, out, d_out = (a.astype(work, copy=False) for a in (q, k, v, out, d_out))
    d_q, d_k, d_v = (np.zeros_like(a) for a in (q, k, v))
    lse = np.where(np.isneginf(lse), np.inf, lse)              # exp(s - inf) is 0: an empty row has no weights
    D = (d_out * out).sum(axis=-1)
    for rows, columns, allowed in backward_tiles(q.shape[-2], k.shape[-2], causal):
        q_i, d_out_i = q[..., rows, :], d_out[..., rows, :]
        k_j, v_j = k[..., columns, :], v[..., columns, :]
        s = q_i @ np.swapaxes(k_j, -1, -2) * scale
        if allowed is not None:
            s[..., ~allowed.numpy()] = -np.inf
        p = np.exp(s - lse[..., rows, None])
        d_p = d_out_i @ np.swapaxes(v_j, -1, -2)
        d_s = p * (d_p - D[..., rows, None]) * scale
        d_v[..., columns, :] += np.swapaxes(p, -1, -2) @ d_out_i
        d_k[..., columns, :] += np.swapaxes(d_s, -1, -2) @ q_i
        d_q[..., rows, :] += d_s @ k_j
    return tuple(gradient.astype(type_, copy=False) for gradient, type_ in zip((d_q, d_k, d_v), types))

# %% tags=["export", "plumbing"]
def flash_forward_torch(q, k, v, causal, scale, block_q, block_k):
    """The loops of flash_attention_numpy on tensors with equal leading axes: (out, lse). Records no gradient."""
    work = cuda.work_type(q)
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    shift, positions = n_keys - n_queries, torch.arange(max(n_queries, n_keys), device=q.device)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = torch.full(q.shape[:-1], -math.inf, dtype=work, device=q.device)
    for i in range(0, n_queries, block_q):
        stop = min(i + block_q, n_queries)
        end = min(n_keys, stop + shift) if causal else n_keys
        q_i = q[..., i:stop, :].to(work) * scale
        m = torch.full((*q_i.shape[:-1], 1), -math.inf, dtype=work, device=q.device)
        ell, o = torch.zeros_like(m), torch.zeros(*q_i.shape[:-1], v.shape[-1], dtype=work, device=q.device)
        for j in range(0, end, block_k):
            j_stop = min(j + block_k, end)
            s = q_i @ k[..., j:j_stop, :].to(work).mT
            if causal and j_stop - 1 > i + shift:
                s.masked_fill_(positions[j:j_stop] > positions[i:stop, None] + shift, -math.inf)
            m_new = torch.maximum(m, s.amax(-1, keepdim=True))
            finite = m_new.masked_fill(m_new == -math.inf, 0)
            p, factor = torch.exp(s - finite), torch.exp(m - finite)
            ell = ell * factor + p.sum(-1, keepdim=True)
            o = o * factor + p @ v[..., j:j_stop, :].to(work)
            m = m_new
        out[..., i:stop, :] = (o / ell.masked_fill(ell == 0, 1)).to(out.dtype)
        lse[..., i:stop] = (m + torch.log(ell))[..., 0]
    return out, lse

# %% tags=["export", "plumbing"]
def flash_attention_backward_torch(q, k, v, out, lse, d_out, causal=False, scale=None):
    """Gradients as flash_attention_backward_numpy computes them, in PyTorch; arguments, shapes and errors as there."""
    check_backward(q, k, v, out, lse, d_out)
    cuda.check_kind(torch.Tensor, q=q, k=k, v=v, out=out, lse=lse, d_out=d_out)
    work, types = cuda.work_type(q), [cuda.float_type(a) for a in (q, k, v)]
    q, k, v, out, lse, d_out = (a.detach().to(work) for a in (q, k, v, out, lse, d_out))
    gradients = tile_gradients(q, k, v, out, lse, d_out, causal, scale)
    return tuple(gradient.to(type_) for gradient, type_ in zip(gradients, types))

# %% tags=["export", "plumbing"]
class FlashAttention(torch.autograd.Function):
    """Flash attention as one operation of autograd: it keeps q, k, v, the output and one number for each row."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale, block_q, block_k):
        out, lse = flash_forward_torch(q, k, v, causal, scale, block_q, block_k)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.scale = causal, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, _):
        gradients = flash_attention_backward_torch(*ctx.saved_tensors, d_out, ctx.causal, ctx.scale)
        return *gradients, None, None, None, None

@cuda.skip_unseen
def flash_attention_torch(q, k, v, causal=False, scale=None, block_q=None, block_k=None):
    """Attention tile by tile in PyTorch; arguments, shapes and errors as flash_attention_numpy.

    Differentiable in q, k and v through the output; the log-sum-exp carries no gradient. Half precision is computed in
    single.
    """
    check_flash_arguments(torch.Tensor, q, k, v, block_q, block_k)
    lead = leading_axes(q, k, v)
    q, k, v = (t if t.is_floating_point() else t.double() for t in (q, k, v))
    q, k, v = (t.expand(*lead, *t.shape[-2:]) for t in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if block_q is None:                                    # fewer rows of more heads, so that the scores stay few
        block_q = max(16, min(TILE_QUERIES, q.shape[-2], TILE_SCORES // max(1, math.prod(lead) * TILE_KEYS)))
    _, block_k = chosen_tile(q.shape[-2], k.shape[-2], block_q, block_k)
    return FlashAttention.apply(q, k, v, causal, scale, block_q, block_k)

# %% [markdown]
# **The ring**: one block taken in, the checks, and its processes with a supervisor. A rank that lost contact is a victim;
# it looks for the one that began.

# %% tags=["export", "plumbing"]
def attend_block(state, q, k, v, q_positions, k_positions, causal, scale):
    """Take one block of keys and values into a running attention: the new state (out, lse).

    state: out (..., n_queries, d_v) and lse (..., n_queries) over the blocks before, 0 and -inf at the beginning;
    q (..., n_queries, d_head), k, v (..., n_keys, d), positions integers (n_queries,) and (n_keys,).
    """
    s = q @ np.swapaxes(k, -1, -2) * scale
    if causal:
        s = np.where(k_positions <= q_positions[:, None], s, -np.inf)
    m, ell = online_softmax(np.full(s.shape[:-1], -np.inf), np.zeros(s.shape[:-1]), s)
    p = np.exp(s - np.where(np.isneginf(m), 0, m)[..., None])
    with np.errstate(divide="ignore"):
        out, lse = cuda.weighted_sum(p, v) / np.where(ell == 0, 1, ell)[..., None], m + np.log(ell)
    return merge_by_lse([state[0], out], [state[1], lse])

# %% tags=["export", "plumbing"]
def pairs_of_work(positions):
    """Pairs of query and key that rank r has to compute at step t, under a causal mask: (ranks, steps)."""
    ranks = range(len(positions))
    return np.array([[(positions[(r - t) % len(ranks)] <= positions[r][:, None]).sum() for t in ranks] for r in ranks])

# %% tags=["export", "plumbing"]
LOST_CONTACT = 5                                           # exit code of a rank whose neighbour went away

def ring_rank(rank, n_ranks, folder, shards, positions, causal, scale, time_limit, dies):
    """What one process of the ring runs. shards: its own q, k, v. Writes its output to a file in `folder`.

    dies: the rank that ends without a word after the first exchange, for the experiment, or None.
    """
    torch.set_num_threads(1)
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:                                           # gloo would look up the host's name, which may mean nothing
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    store = distributed.FileStore(str(folder / "store"), n_ranks)
    try:
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks,
                                       timeout=datetime.timedelta(seconds=time_limit))
        for step, state in enumerate(ring_steps(rank, n_ranks, *shards, positions, causal, scale)):
            if rank == dies and step == 0:
                raise SystemExit(3)
        np.save(folder / f"{rank}.npy", state[0])
        distributed.barrier()                              # nobody leaves while another still waits for a message
        distributed.destroy_process_group()
    except RuntimeError:                                   # gloo's, when a neighbour is gone or the time is up
        raise SystemExit(LOST_CONTACT) from None

def ring_steps(rank, n_ranks, q, k, v, positions, causal, scale):
    """The steps of one rank: sends its block on, receives the next, attends meanwhile. Yields its state after each."""
    state = np.zeros((len(q), v.shape[-1]), q.dtype), np.full(len(q), -np.inf, q.dtype)
    block = torch.from_numpy(np.concatenate([k, v], axis=-1))                   # one message for both
    for step in range(n_ranks):
        arriving, under_way = torch.empty_like(block), []
        if step < n_ranks - 1:
            under_way = [distributed.isend(block, (rank + 1) % n_ranks),
                         distributed.irecv(arriving, (rank - 1) % n_ranks)]
        keys, values = np.split(block.numpy(), [k.shape[-1]], axis=-1)
        state = attend_block(state, q, keys, values, positions[rank], positions[(rank - step) % n_ranks], causal, scale)
        for message in under_way:
            message.wait()
        block = arriving
        yield state

# %% tags=["export", "plumbing"]
def wait_for(ranks, deadline, time_limit):
    """Return when all processes have ended well. RuntimeError as soon as one has not, and at the deadline."""
    while running := [rank for rank in ranks if rank.exitcode is None]:
        if not connection.wait([rank.sentinel for rank in running], max(0, deadline - time.monotonic())):
            late = [number for number, rank in enumerate(ranks) if rank.exitcode is None]
            raise RuntimeError(f"ranks {late} were not done after {time_limit:g} seconds; the ring was stopped")
        for number, rank in enumerate(ranks):
            if rank.exitcode not in (None, 0, LOST_CONTACT):
                raise RuntimeError(f"rank {number} of {len(ranks)} ended with exit code {rank.exitcode}; "
                                   "the ring was stopped")
    if lost := [number for number, rank in enumerate(ranks) if rank.exitcode == LOST_CONTACT]:
        raise RuntimeError(f"ranks {lost} of {len(ranks)} lost contact; the ring was stopped")

# %% tags=["export", "plumbing"]
def ring_attention(q, k, v, n_ranks=4, causal=False, scale=None, striped=True, time_limit=120.0, dies=None):
    """Attention by a ring of processes on this machine, each with its share of the sequence. Returns (n, d_v).

    q, k (n, d_head), v (n, d_v), of one float type, n a multiple of n_ranks. striped: token i belongs to rank i mod
    n_ranks; otherwise each rank has a contiguous part. time_limit: seconds for everything, the start of the processes
    included. dies: a rank that ends after the first exchange, to see what happens then.
    Raises ValueError when shapes do not fit; RuntimeError, within the time limit, when a rank fails or is not done.
    """
    check_arguments(q, k, v)
    if n_ranks < 1:
        raise ValueError(f"n_ranks must be at least 1, got {n_ranks}")
    q, k, v = (a.astype(cuda.float_type(q), copy=False) for a in (q, k, v))
    if q.ndim != 2 or len(q) != len(k) or len(q) % n_ranks:
        raise ValueError(f"q and k must have the shape (n, d_head) with n a multiple of {n_ranks}, "
                         f"got {q.shape} and {k.shape}")
    positions = np.arange(len(q)).reshape(-1, n_ranks).T if striped else np.arange(len(q)).reshape(n_ranks, -1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    spawn, deadline = multiprocessing.get_context("spawn"), time.monotonic() + time_limit
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        ranks = [spawn.Process(target=ring_rank, daemon=True,
                               args=(rank, n_ranks, Path(name), (q[rows], k[rows], v[rows]), positions, causal, scale,
                                     time_limit, dies)) for rank, rows in enumerate(positions)]
        try:
            for rank in ranks:
                rank.start()
            wait_for(ranks, deadline, time_limit)
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    rank.kill()
                    rank.join()
        out = np.empty((len(q), v.shape[-1]), q.dtype)
        for rank, rows in enumerate(positions):
            out[rows] = np.load(Path(name) / f"{rank}.npy")
    return out

# %% [markdown]
# **The rungs of the ladder in CUDA.** What they have in common, then a thread a query, register tiles (the swizzle, chunks
# of 16 bytes, three steps, the loop), and wmma.

# %% tags=["export", "plumbing"]
FLASH_HEAD = r"""
#define TILE 16                                          // threads that share a row of a tile; two rows are a warp
""" + ROW_OF_A_TILE.lstrip("\n") + r"""__device__ bool may_attend(int i, int j, int n_queries, int n_keys, int causal) {
  return i < n_queries && j < n_keys && (!causal || j <= i + n_keys - n_queries);
}
// How many keys the queries before `last` may attend to. Tiles behind them are not even loaded.
__device__ int visible_keys(int last, int n_queries, int n_keys, int causal) {
  return causal ? max(0, min(last, n_queries) + n_keys - n_queries) : n_keys;
}
// All threads copy n_rows rows of d floats, from row `first` on. What is not there becomes 0: rows from `end` on, and
// columns from d to width - 1.
__device__ void load_rows(float* tile, int n_rows, int width, int stride,
                          const float* rows, int first, int end, int d) {
  for (int e = threadIdx.y * blockDim.x + threadIdx.x; e < n_rows * width; e += blockDim.x * blockDim.y) {
    int r = e / width, c = e % width;
    tile[r * stride + c] = first + r < end && c < d ? rows[(size_t)(first + r) * d + c] : 0.0f;
  }
}
"""

# %% tags=["export", "plumbing"]
FLASH_ROWS = r"""
#define ROWS 64                                          // queries of a block, one a thread
#define KEYS 16                                          // keys of a tile
template <int D>                                         // d, rounded up to a multiple of 16
__global__ void flash_rows(const float* q, const float* k, const float* v, float* out, float* lse,
                           int n_queries, int n_keys, int d, int causal, float scale) {
  __shared__ float k_tile[KEYS * D], v_tile[KEYS * D];
  int i = blockIdx.y * ROWS + threadIdx.x, visible = visible_keys((blockIdx.y + 1) * ROWS, n_queries, n_keys, causal);
  size_t head = blockIdx.x;
  q += (head * n_queries + i) * d, k += head * n_keys * d, v += head * n_keys * d;       // q: this thread's row
  float query[D], sum[D], s[KEYS], maximum = -INFINITY, total = 0.0f;
  for (int t = 0; t < D; ++t) query[t] = i < n_queries && t < d ? q[t] : 0.0f, sum[t] = 0.0f;
  for (int first = 0; first < visible; first += KEYS) {
    // load
    __syncthreads();                                     // the tiles of the last round have been used
    load_rows(k_tile, KEYS, D, D, k, first, visible, d);
    load_rows(v_tile, KEYS, D, D, v, first, visible, d);
    __syncthreads();                                     // the new tiles have arrived
    // score
    float highest = maximum;
    for (int j = 0; j < KEYS; ++j) {
      float product = 0.0f;
      for (int t = 0; t < D; ++t) product += query[t] * k_tile[j * D + t];
      s[j] = may_attend(i, first + j, n_queries, n_keys, causal) ? scale * product : -INFINITY;
      highest = fmaxf(highest, s[j]);
    }
    // rescale
    float shift = highest == -INFINITY ? 0.0f : highest; // no key so far: -inf minus -inf would be nan
    float factor = expf(maximum - shift);
    maximum = highest, total *= factor;
    for (int t = 0; t < D; ++t) sum[t] *= factor;
    // accumulate
    for (int j = 0; j < KEYS; ++j) {
      float weight = expf(s[j] - shift);
      total += weight;
      for (int t = 0; t < D; ++t) sum[t] += weight * v_tile[j * D + t];
    }
  }
  // write
  if (i >= n_queries) return;
  for (int t = 0; t < D; ++t)
    if (t < d) out[(head * n_queries + i) * d + t] = total == 0.0f ? 0.0f : sum[t] / total;
  lse[head * n_queries + i] = total == 0.0f ? -INFINITY : maximum + logf(total);
}
"""

# %% tags=["export", "plumbing"]
SWIZZLE = r"""
__device__ int place(int row, int chunk, int chunks) {
  return row * chunks + (chunk ^ (row % 8));
}
"""

# %% tags=["export", "plumbing"]
CHUNKS = r"""
template <int D> __device__ void load_chunks(float4* tile, int n_rows, const float* rows, int first, int end, int d) {
  for (int e = threadIdx.y * TILE + threadIdx.x; e < n_rows * (D / 4); e += TILE * TILE) {
    int r = e / (D / 4), chunk = e % (D / 4);
    const float* from = rows + (size_t)(first + r) * d + 4 * chunk;
    int left = first + r < end ? d - 4 * chunk : 0;      // columns that exist from here on
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (d % 4 == 0) {
      if (left > 0) four = *(const float4*)from;
    } else {
      if (left > 0) four.x = from[0];
      if (left > 1) four.y = from[1];
      if (left > 2) four.z = from[2];
      if (left > 3) four.w = from[3];
    }
    tile[place(r, chunk, D / 4)] = four;
  }
}
__device__ void store_chunk(float* to, int left, int d, float4 a) {
  if (d % 4 == 0) {
    if (left > 0) *(float4*)to = a;
  } else {
    if (left > 0) to[0] = a.x;
    if (left > 1) to[1] = a.y;
    if (left > 2) to[2] = a.z;
    if (left > 3) to[3] = a.w;
  }
}
__device__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
__device__ float4 times(float factor, float4 a) {
  return make_float4(factor * a.x, factor * a.y, factor * a.z, factor * a.w);
}
__device__ void add(float4& sum, float weight, float4 a) {
  sum.x += weight * a.x, sum.y += weight * a.y, sum.z += weight * a.z, sum.w += weight * a.w;
}
"""

# %% tags=["export", "plumbing"]
REGISTER_STEPS = r"""
template <int D, int R, int C> __device__ void score(float (&s)[R][C], const float4* q_tile, const float4* k_tile) {
  for (int t = 0; t < D / 4; ++t) {
    float4 key[C];
    for (int c = 0; c < C; ++c) key[c] = k_tile[place(threadIdx.x + TILE * c, t, D / 4)];
    for (int r = 0; r < R; ++r) {
      float4 query = q_tile[place(threadIdx.y + TILE * r, t, D / 4)];
      for (int c = 0; c < C; ++c) s[r][c] += dot(query, key[c]);
    }
  }
}
// Turns the scores of a row into weights, in shared memory, and returns the factor for what was summed before.
template <int C> __device__ float rescale(const float (&s)[C], float* p_row, float& maximum, float& total) {
  float highest = -INFINITY;
  for (int c = 0; c < C; ++c) highest = fmaxf(highest, s[c]);
  highest = fmaxf(maximum, row_max(highest));
  float shift = highest == -INFINITY ? 0.0f : highest, factor = expf(maximum - shift);
  maximum = highest, total *= factor;
  for (int c = 0; c < C; ++c) {
    float weight = expf(s[c] - shift);
    p_row[threadIdx.x + TILE * c] = weight;
    total += weight;
  }
  return factor;
}
// Four weights and four chunks of V at a time.
template <int D, int R, int G> __device__ void accumulate(float4 (&sum)[R][G], const float* p_rows, int p_stride,
                                                          const float4* v_tile, int n_keys) {
  for (int j = 0; j < n_keys; j += 4) {
    float4 p[R];
    for (int r = 0; r < R; ++r) p[r] = *(const float4*)(p_rows + TILE * r * p_stride + j);
    for (int g = 0; g < G; ++g) {
      int chunk = threadIdx.x + TILE * g;
      if (chunk >= D / 4) continue;
      float4 v0 = v_tile[place(j, chunk, D / 4)], v1 = v_tile[place(j + 1, chunk, D / 4)];
      float4 v2 = v_tile[place(j + 2, chunk, D / 4)], v3 = v_tile[place(j + 3, chunk, D / 4)];
      for (int r = 0; r < R; ++r)
        add(sum[r][g], p[r].x, v0), add(sum[r][g], p[r].y, v1), add(sum[r][g], p[r].z, v2), add(sum[r][g], p[r].w, v3);
    }
  }
}
"""

# %% tags=["export", "plumbing"]
FLASH_REGISTERS = r"""
template <int D, int BQ, int BK>                         // d rounded up to a multiple of 32; queries and keys of a tile
__global__ void flash_registers(const float* q, const float* k, const float* v, float* out, float* lse,
                                int n_queries, int n_keys, int d, int causal, float scale) {
  const int R = BQ / TILE, C = BK / TILE, CHUNKS = D / 4, G = (CHUNKS + TILE - 1) / TILE;
  const int P_STRIDE = BK + (BK % 32 == 0 ? 16 : 0);     // the two rows of a warp are 16 banks apart
  extern __shared__ float4 shared[];
  float4 *q_tile = shared, *k_tile = q_tile + BQ * CHUNKS, *v_tile = k_tile + BK * CHUNKS;
  int x = threadIdx.x, y = threadIdx.y, first_query = blockIdx.y * BQ;
  float* p_rows = (float*)(v_tile + BK * CHUNKS) + y * P_STRIDE;          // of this thread: rows y, y + 16, ...
  size_t head = blockIdx.x;
  q += head * n_queries * d, k += head * n_keys * d, v += head * n_keys * d;
  int visible = visible_keys(first_query + BQ, n_queries, n_keys, causal);
  load_chunks<D>(q_tile, BQ, q, first_query, n_queries, d);
  float maximum[R], total[R] = {};
  float4 sum[R][G] = {};
  for (int r = 0; r < R; ++r) maximum[r] = -INFINITY;
  for (int first = 0; first < visible; first += BK) {
    __syncthreads();
    load_chunks<D>(k_tile, BK, k, first, visible, d);
    load_chunks<D>(v_tile, BK, v, first, visible, d);
    __syncthreads();
    float s[R][C] = {};
    score<D>(s, q_tile, k_tile);
    for (int r = 0; r < R; ++r) {
      int i = first_query + y + TILE * r;
      for (int c = 0; c < C; ++c)
        s[r][c] = may_attend(i, first + x + TILE * c, n_queries, n_keys, causal) ? scale * s[r][c] : -INFINITY;
      float factor = rescale(s[r], p_rows + TILE * r * P_STRIDE, maximum[r], total[r]);
      for (int g = 0; g < G; ++g) sum[r][g] = times(factor, sum[r][g]);
    }
    __syncwarp();                                        // rows of weights belong to one warp
    accumulate<D>(sum, p_rows, P_STRIDE, v_tile, BK);
  }
  // write
  for (int r = 0; r < R; ++r) {
    int i = first_query + y + TILE * r;
    float all = row_sum(total[r]), share = all == 0.0f ? 0.0f : 1.0f / all;
    if (i >= n_queries) continue;
    for (int g = 0, c = 4 * x; g < G; ++g, c += 4 * TILE)
      store_chunk(out + (head * n_queries + i) * d + c, d - c, d, times(share, sum[r][g]));
    if (x == 0) lse[head * n_queries + i] = all == 0.0f ? -INFINITY : maximum[r] + logf(all);
  }
}
"""

# %% tags=["export", "plumbing"]
HALF_TILES = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
typedef half element;
using namespace nvcuda;
typedef wmma::fragment<wmma::matrix_a, 16, 16, 16, element, wmma::row_major> Left;
typedef wmma::fragment<wmma::matrix_b, 16, 16, 16, element, wmma::row_major> Right;
typedef wmma::fragment<wmma::matrix_b, 16, 16, 16, element, wmma::col_major> RightTransposed;
typedef wmma::fragment<wmma::accumulator, 16, 16, 16, float> Sum;

// As load_rows, for a block of one dimension. Rows are padded by 16 bytes, which wmma allows.
template <int D> __device__ void load_half(element* tile, int n_rows, const element* rows, int first, int end, int d) {
  for (int e = threadIdx.x; e < n_rows * D; e += blockDim.x) {
    int r = e / D, c = e % D;
    tile[r * (D + 8) + c] = first + r < end && c < d ? rows[(size_t)(first + r) * d + c] : element(0.0f);
  }
}
// s = q k^T, for 16 queries and BK keys.
template <int D, int BK> __device__ void score_half(float* s, const element* q, const element* k) {
  for (int c = 0; c < BK; c += 16) {
    Left a; RightTransposed b; Sum sum;
    wmma::fill_fragment(sum, 0.0f);
    for (int t = 0; t < D; t += 16) {
      wmma::load_matrix_sync(a, q + t, D + 8);
      wmma::load_matrix_sync(b, k + c * (D + 8) + t, D + 8);
      wmma::mma_sync(sum, a, b, sum);
    }
    wmma::store_matrix_sync(s + c, sum, BK + 4, wmma::mem_row_major);
  }
}
// o += p v
template <int D, int BK> __device__ void accumulate_half(float* o, const element* p, const element* v) {
  for (int t = 0; t < D; t += 16) {
    Left a; Right b; Sum sum;
    wmma::load_matrix_sync(sum, o + t, D + 4, wmma::mem_row_major);
    for (int c = 0; c < BK; c += 16) {
      wmma::load_matrix_sync(a, p + c, BK + 8);
      wmma::load_matrix_sync(b, v + c * (D + 8) + t, D + 8);
      wmma::mma_sync(sum, a, b, sum);
    }
    wmma::store_matrix_sync(o + t, sum, D + 4, wmma::mem_row_major);
  }
}
"""

# %% tags=["export", "plumbing"]
HALF_ROWS = r"""
// Scores of a row into weights in half precision; what was summed before is rescaled. total: of this lane's columns.
template <int D, int BK> __device__ void rescale_half(float* s_row, element* p_row, float* o_row,
                                                      float& maximum, float& total) {
  int odd = threadIdx.x % 2;
  float highest = -INFINITY;
  for (int c = odd; c < BK; c += 2) highest = fmaxf(highest, s_row[c]);
  highest = fmaxf(maximum, fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 1)));
  float shift = highest == -INFINITY ? 0.0f : highest, factor = expf(maximum - shift);
  maximum = highest, total *= factor;
  for (int c = odd; c < BK; c += 2) {
    float weight = expf(s_row[c] - shift);
    p_row[c] = element(weight), total += weight;
  }
  for (int c = odd; c < D; c += 2) o_row[c] *= factor;
}
// The 16 rows of a warp, one after another and all lanes side by side. Lanes 2 r and 2 r + 1 know the share of row r.
__device__ void write_half(element* out, const float* o_rows, int stride, float share, int n_rows, int d) {
  for (int r = 0; r < 16; ++r) {
    float of_row = __shfl_sync(0xffffffff, share, 2 * r);
    for (int c = threadIdx.x % 32; c < d && r < n_rows; c += 32)
      out[(size_t)r * d + c] = element(of_row * o_rows[r * stride + c]);
  }
}
"""

# %% tags=["export", "plumbing"]
FLASH_TENSOR_CORES = r"""
template <int D, int BQ, int BK>                         // d rounded up to a multiple of 16; queries and keys of a tile
__global__ void flash_tensor_cores(const element* q, const element* k, const element* v, element* out, float* lse,
                                   int n_queries, int n_keys, int d, int causal, float scale) {
  extern __shared__ __align__(128) float shared[];
  int own = threadIdx.x / 32 * 16, row = own + threadIdx.x % 32 / 2, odd = threadIdx.x % 2;
  int first_query = blockIdx.y * BQ, i = first_query + row;
  float *o_tile = shared, *o_row = o_tile + row * (D + 4);
  float *s_tile = o_tile + BQ * (D + 4), *s_row = s_tile + row * (BK + 4);
  element *q_tile = (element*)(s_tile + BQ * (BK + 4)), *k_tile = q_tile + BQ * (D + 8);
  element *v_tile = k_tile + BK * (D + 8), *p_tile = v_tile + BK * (D + 8), *p_row = p_tile + row * (BK + 8);
  size_t head = blockIdx.x;
  q += head * n_queries * d, k += head * n_keys * d, v += head * n_keys * d;
  int visible = visible_keys(first_query + BQ, n_queries, n_keys, causal);

  load_half<D>(q_tile, BQ, q, first_query, n_queries, d);
  for (int c = odd; c < D; c += 2) o_row[c] = 0.0f;
  float maximum = -INFINITY, total = 0.0f;
  for (int first = 0; first < visible; first += BK) {
    __syncthreads();
    load_half<D>(k_tile, BK, k, first, visible, d);
    load_half<D>(v_tile, BK, v, first, visible, d);
    __syncthreads();
    score_half<D, BK>(s_tile + own * (BK + 4), q_tile + own * (D + 8), k_tile);
    __syncwarp();
    for (int c = odd; c < BK; c += 2)
      s_row[c] = may_attend(i, first + c, n_queries, n_keys, causal) ? scale * s_row[c] : -INFINITY;
    rescale_half<D, BK>(s_row, p_row, o_row, maximum, total);
    __syncwarp();
    accumulate_half<D, BK>(o_tile + own * (D + 4), p_tile + own * (BK + 8), v_tile);
  }
  // write
  __syncwarp();
  total += __shfl_xor_sync(0xffffffff, total, 1);
  float share = total == 0.0f ? 0.0f : 1.0f / total;
  write_half(out + (head * n_queries + first_query + own) * d, o_tile + own * (D + 4), D + 4, share,
             n_queries - first_query - own, d);
  if (odd == 0 && i < n_queries) lse[head * n_queries + i] = total == 0.0f ? -INFINITY : maximum + logf(total);
}
"""

# %% [markdown]
# **The backward kernels**: one over the tiles of queries, one over those of keys.

# %% tags=["export", "plumbing"]
FLASH_D_Q = r"""
__device__ float dot_rows(const float* a, const float* b, int d) {
  float sum = 0.0f;
  for (int t = 0; t < d; ++t) sum += a[t] * b[t];
  return sum;
}
// A block for each tile of queries. Also writes delta, the D of the formulas, for the other kernel.
template <int D>                                         // d, rounded up to a multiple of 16
__global__ void flash_d_q(const float* q, const float* k, const float* v, const float* out, const float* lse,
                          const float* d_out, float* delta, float* d_q,
                          int n_queries, int n_keys, int d, int causal, float scale) {
  extern __shared__ float shared[];
  int stride = d + PAD, x = threadIdx.x, y = threadIdx.y, i = blockIdx.y * TILE + y;
  float *q_tile = shared, *g_tile = q_tile + TILE * stride, *k_tile = g_tile + TILE * stride;
  float *v_tile = k_tile + TILE * stride, *ds_row = v_tile + TILE * stride + y * (TILE + PAD);
  size_t head = blockIdx.x, row = head * n_queries + i;
  q += head * n_queries * d, d_out += head * n_queries * d, k += head * n_keys * d, v += head * n_keys * d;
  int visible = visible_keys((blockIdx.y + 1) * TILE, n_queries, n_keys, causal);
  load_rows(q_tile, TILE, d, stride, q, blockIdx.y * TILE, n_queries, d);
  load_rows(g_tile, TILE, d, stride, d_out, blockIdx.y * TILE, n_queries, d);
  __syncthreads();
  float share = 0.0f, log_sum = i < n_queries ? lse[row] : 0.0f, sum[D / TILE] = {};
  for (int c = x; c < d && i < n_queries; c += TILE) share += g_tile[y * stride + c] * out[row * d + c];
  share = row_sum(share);
  if (x == 0 && i < n_queries) delta[row] = share;
  for (int first = 0; first < visible; first += TILE) {
    __syncthreads();
    load_rows(k_tile, TILE, d, stride, k, first, visible, d);
    load_rows(v_tile, TILE, d, stride, v, first, visible, d);
    __syncthreads();
    float s = scale * dot_rows(q_tile + y * stride, k_tile + x * stride, d);
    float p = may_attend(i, first + x, n_queries, n_keys, causal) ? expf(s - log_sum) : 0.0f;
    ds_row[x] = p * (dot_rows(g_tile + y * stride, v_tile + x * stride, d) - share);
    __syncwarp();
    for (int c = 0; c < D / TILE; ++c)
      for (int r = 0; r < TILE && x + TILE * c < d; ++r) sum[c] += ds_row[r] * k_tile[r * stride + x + TILE * c];
  }
  for (int c = 0; c < D / TILE; ++c)
    if (i < n_queries && x + TILE * c < d) d_q[row * d + x + TILE * c] = scale * sum[c];
}
"""

# %% tags=["export", "plumbing"]
FLASH_D_KV = r"""
// A block for each tile of keys. The queries now lie along x, and begin with the first that may see a key of the tile.
template <int D>
__global__ void flash_d_kv(const float* q, const float* k, const float* v, const float* lse, const float* delta,
                           const float* d_out, float* d_k, float* d_v,
                           int n_queries, int n_keys, int d, int causal, float scale) {
  extern __shared__ float shared[];
  int stride = d + PAD, x = threadIdx.x, y = threadIdx.y, j = blockIdx.y * TILE + y;
  float *q_tile = shared, *g_tile = q_tile + TILE * stride, *k_tile = g_tile + TILE * stride;
  float *v_tile = k_tile + TILE * stride, *p_row = v_tile + TILE * stride + y * (TILE + PAD);
  float* ds_row = p_row + TILE * (TILE + PAD);
  size_t head = blockIdx.x, row = head * n_keys + j;
  q += head * n_queries * d, d_out += head * n_queries * d, lse += head * n_queries, delta += head * n_queries;
  load_rows(k_tile, TILE, d, stride, k + head * n_keys * d, blockIdx.y * TILE, n_keys, d);
  load_rows(v_tile, TILE, d, stride, v + head * n_keys * d, blockIdx.y * TILE, n_keys, d);
  float k_sum[D / TILE] = {}, v_sum[D / TILE] = {};
  int start = causal ? max(0, (int)blockIdx.y * TILE + n_queries - n_keys) : 0;
  for (int first = start; first < n_queries; first += TILE) {
    __syncthreads();
    load_rows(q_tile, TILE, d, stride, q, first, n_queries, d);
    load_rows(g_tile, TILE, d, stride, d_out, first, n_queries, d);
    __syncthreads();
    int i = first + x;
    bool allowed = may_attend(i, j, n_queries, n_keys, causal);
    float s = scale * dot_rows(q_tile + x * stride, k_tile + y * stride, d);
    p_row[x] = allowed ? expf(s - lse[i]) : 0.0f;
    ds_row[x] = allowed ? p_row[x] * (dot_rows(g_tile + x * stride, v_tile + y * stride, d) - delta[i]) : 0.0f;
    __syncwarp();
    for (int c = 0; c < D / TILE; ++c)
      for (int r = 0; r < TILE && x + TILE * c < d; ++r) {
        v_sum[c] += p_row[r] * g_tile[r * stride + x + TILE * c];
        k_sum[c] += ds_row[r] * q_tile[r * stride + x + TILE * c];
      }
  }
  for (int c = 0; c < D / TILE; ++c)
    if (j < n_keys && x + TILE * c < d)
      d_k[row * d + x + TILE * c] = scale * k_sum[c], d_v[row * d + x + TILE * c] = v_sum[c];
}
"""

# %% [markdown]
# **Bytes and launches.** The launcher rounds $d$ up for the template, and picks tiles that fit into the 48 KB that every
# GPU gives a block without being asked.

# %% tags=["export", "plumbing"]
def flash_bytes(n_queries, n_keys, d, block_q, causal=False, itemsize=4):
    """Bytes of global memory that one head of a flash kernel asks for: (loaded, stored), exactly.

    block_q: queries of a block; itemsize: bytes of an entry of q, k, v and the output. The log-sum-exp has 4 bytes.
    """
    last = [min(first + block_q, n_queries) for first in range(0, n_queries, block_q)]     # one after each block's last
    visible = sum(max(0, end + n_keys - n_queries) if causal else n_keys for end in last)
    return itemsize * (n_queries * d + 2 * d * visible), itemsize * n_queries * d + 4 * n_queries

# %% tags=["export", "plumbing"]
@functools.cache
def flash_kernel(rung, *template):
    """One rung of the ladder, compiled on first use: "rows", "shared", "registers", "half", "bfloat16" or "mma"."""
    if rung == "rows":
        return cuda.compile(FLASH_HEAD + FLASH_ROWS, name="flash_rows", template=template)
    if rung == "shared":
        return cuda.compile(FLASH_HEAD + FLASH_SHARED, name="flash_shared")
    if rung == "registers":
        return cuda.compile(FLASH_HEAD + SWIZZLE + CHUNKS + REGISTER_STEPS + FLASH_REGISTERS, name="flash_registers",
                            template=template)
    if rung == "mma":
        return cuda.compile(FLASH_HEAD + HALF_TILES + MMA + MMA_STEPS + FLASH_MMA, name="flash_mma", template=template)
    if rung == "half":
        return cuda.compile(FLASH_HEAD + HALF_TILES + HALF_ROWS + FLASH_TENSOR_CORES, name="flash_tensor_cores",
                            template=template)
    return cuda.compile(FLASH_HEAD + HALF_TILES.replace("typedef half", "typedef __nv_bfloat16") + HALF_ROWS
                        + FLASH_TENSOR_CORES, name="flash_tensor_cores", template=template)

def registers_bytes(width, rows, keys):
    """Shared memory of flash_registers<width, rows, keys>."""
    return 4 * (width * (rows + 2 * keys) + rows * (keys + (16 if keys % 32 == 0 else 0)))

def tensor_cores_bytes(width, rows, keys):
    """Shared memory of flash_tensor_cores<width, rows, keys>."""
    return 4 * rows * (width + keys + 8) + 2 * ((rows + 2 * keys) * (width + 8) + rows * (keys + 8))

def mma_bytes(width, warps):
    """Shared memory of flash_mma<width, warps>: keys and values, 64 at a time; the queries pass through the keys' place."""
    return 2 * (width + 8) * (max(16 * warps, 64) + 64)

def tile_sizes(block_q, block_k, shared_bytes, available=48 * 1024):
    """Multiples of 16 up to 64, near those asked for, that fit: (queries, keys). The keys give way first."""
    rows, keys = (min(64, 16 * math.ceil(block / 16)) for block in (block_q, block_k))
    while shared_bytes(rows, keys) > available and (rows, keys) != (16, 16):
        rows, keys = (rows, keys - 16) if keys > 16 else (rows - 16, keys)
    return rows, keys

# %% tags=["export", "plumbing"]
RUNGS = {"rows": None, "shared": None, "registers": None, "large": 96, "half": None, "bfloat16": None, "mma": 128}   # d

def flash_launch(rung, q, k, v, causal=False, scale=None, block_q=None, block_k=None):
    """What launches a rung on tensors (heads, seq, d) of its type: kernel, (grid, block, shared bytes), arguments.

    rung: as in flash_kernel; "large" are register tiles of 128 x 128, d up to 96: they need more shared memory than 48
    KB, and for more columns more than any GPU has. "mma" takes 128 queries, d up to 128. The fourth and fifth argument
    are the output and the log-sum-exp, in single precision, both to be written. Raises ValueError for another rung, and
    for a larger d.
    """
    (n_heads, n_queries, d), n_keys = q.shape, k.shape[1]
    if rung not in RUNGS:
        raise ValueError(f"rung must be one of {', '.join(RUNGS)}, got {rung!r}")
    if RUNGS[rung] and d > RUNGS[rung]:
        raise ValueError(f'rung "{rung}" takes d up to {RUNGS[rung]}, got {d}')
    block_q, block_k = (64 if block is None else block for block in (block_q, block_k))
    step = 32 if rung in ("registers", "large") else 16
    width = step * math.ceil(d / step)
    if rung == "rows":
        template, rows, block, shared = (width,), 64, 64, 0
    elif rung == "shared":
        template, rows, block, shared = (), 16, (16, 16), 4 * 16 * (4 * (d + 1) + 17)
    elif rung == "large":
        template, rows, block, shared = (width, 128, 128), 128, (16, 16), registers_bytes(width, 128, 128)
    elif rung == "mma":
        template, rows, block, shared = (width, 8), 128, 256, mma_bytes(width, 8)
    else:
        needs = functools.partial(registers_bytes if rung == "registers" else tensor_cores_bytes, width)
        rows, keys = tile_sizes(block_q, block_k, needs)
        template, shared = (width, rows, keys), needs(rows, keys)
        block = (16, 16) if rung == "registers" else 2 * rows                             # a warp for 16 queries
    out = torch.zeros_like(q)
    lse = torch.full((n_heads, n_queries), -math.inf, device=q.device)
    scale = 1 / math.sqrt(d) if scale is None else float(scale)
    arguments = q, k, v, out, lse, n_queries, n_keys, d, int(causal), scale
    rung = "registers" if rung == "large" else rung
    return flash_kernel(rung, *template), ((n_heads, math.ceil(n_queries / rows)), block, shared), arguments

# %% tags=["export", "plumbing"]
def as_heads(arrays, dtype):
    """Arrays or tensors (..., seq, d) as tensors (heads, seq, d) of one type, and their leading axes.

    A smaller last axis is filled up with zeros, which change no dot product.
    """
    tensors = cuda.on_device(*arrays, dtype=dtype)
    lead, d = torch.broadcast_shapes(*(t.shape[:-2] for t in tensors)), max(t.shape[-1] for t in tensors)
    heads = []
    for t in tensors:
        t = F.pad(t, (0, d - t.shape[-1])).expand(*lead, t.shape[-2], d)
        t = t.reshape(math.prod(lead), t.shape[-2], d).contiguous()
        heads.append(t.clone() if t.data_ptr() % 16 else t)                     # chunks begin at multiples of 16 bytes
    return heads, lead

# %% tags=["export", "plumbing"]
@cuda.skip_unseen
def flash_attention_cuda(q, k, v, causal=False, scale=None, block_q=None, block_k=None):
    """Exact attention that never stores the scores, as a CUDA kernel; arguments and errors as flash_attention_numpy.

    q (..., n_queries, d), k (..., n_keys, d), v (..., n_keys, d_v), leading axes broadcast. NumPy arrays and CPU
    tensors run on the CPU, CUDA tensors on the GPU. Half precision and bfloat16 use tensor cores and sum in single
    precision; other types are computed in single. Returns (out, lse): out (..., n_queries, d_v) in the kind and type of
    q, lse (..., n_queries) in double for double and in single otherwise. A query with nothing to attend to has output
    0 and lse -inf. Not differentiable. The kernel takes tiles near block_q and block_k: multiples of 16 up to 64
    (64 by default), smaller where shared memory is short. d up to 1,184, on sm_80 864, on sm_120 512. Raises ValueError when shapes or
    block sizes do not fit.
    Source: Dao 2023 (FlashAttention-2, arXiv 2307.08691), algorithm 1.
    """
    check_arguments(q, k, v)
    check_blocks(*(1 if block is None else block for block in (block_q, block_k)))
    leading_axes(q, k, v)
    dtype = cuda.float_type(q)
    rung = {"float16": "half", "bfloat16": "bfloat16"}.get(str(dtype).removeprefix("torch."), "registers")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    heads, lead = as_heads((q, k, v), {"half": torch.float16, "bfloat16": torch.bfloat16}.get(rung, torch.float32))
    kernel, launch, arguments = flash_launch(rung, *heads, causal, scale, block_q, block_k)
    out, lse = arguments[3:5]
    if out.numel() and k.shape[-2]:
        kernel.fast[launch](*arguments)
    out = out[..., :v.shape[-1]].reshape(*lead, q.shape[-2], v.shape[-1])
    lse_type = torch.float64 if str(dtype).endswith("float64") else torch.float32
    return cuda.like(out, q), cuda.like(lse.reshape(*lead, q.shape[-2]), q, lse_type)

# %% tags=["export", "plumbing"]
@functools.cache
def backward_kernel(name, width):
    """flash_d_q or flash_d_kv for d up to width, a multiple of 16, compiled on first use."""
    return cuda.compile(FLASH_HEAD + FLASH_D_Q + FLASH_D_KV, name=name, template=(width,))

def backward_launches(q, k, v, out, lse, d_out, causal, scale):
    """[(kernel, (grid, block, shared bytes), arguments)] of the two kernels, and the gradients that they write.

    Tensors (heads, seq, d) and (heads, n_queries), single precision.
    """
    (n_heads, n_queries, d), n_keys = q.shape, k.shape[1]
    d_q, d_k, d_v, delta = (torch.zeros_like(a) for a in (q, k, v, lse))
    width, shared = 16 * math.ceil(d / 16), 4 * 16 * (4 * (d + 1) + 2 * 17)
    sizes = n_queries, n_keys, d, int(causal), float(scale)
    launches = [(backward_kernel(name, width), ((n_heads, math.ceil(seq / 16)), (16, 16), shared), (*arrays, *sizes))
                for name, seq, arrays in (("flash_d_q", n_queries, (q, k, v, out, lse, d_out, delta, d_q)),
                                          ("flash_d_kv", n_keys, (q, k, v, lse, delta, d_out, d_k, d_v)))]
    return launches, (d_q, d_k, d_v)

def flash_attention_backward_cuda(q, k, v, out, lse, d_out, causal=False, scale=None):
    """Gradients of flash attention by two CUDA kernels, without atomics; as flash_attention_backward_numpy.

    q, k and v with equal leading axes; out and lse are what the forward pass returned, d_out is the gradient of out.
    Computed in single precision. Returns (d_q, d_k, d_v) in the shapes and types of q, k and v. d up to 898, on sm_80
    642, on sm_120 386; at most 1,048,560 queries and as many keys. Raises ValueError when shapes do not fit.
    Source: Dao 2023 (arXiv 2307.08691), algorithm 2, with its loop taken apart in two.
    """
    check_backward(q, k, v, out, lse, d_out)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    (q_, k_, v_, out_, d_out_), _ = as_heads((q, k, v, out, d_out), torch.float32)
    (lse_,), _ = as_heads((lse[..., None],), torch.float32)
    launches, gradients = backward_launches(q_, k_, v_, out_, lse_[..., 0], d_out_, causal, scale)
    if q_.numel() and k_.numel():
        for kernel, launch, arguments in launches:
            kernel.fast[launch](*arguments)
    gradients = [g[..., :a.shape[-1]].reshape(a.shape) for g, a in zip(gradients, (q, k, v))]
    return tuple(cuda.like(g, a) for g, a in zip(gradients, (q, k, v)))

# %% tags=["export", "plumbing"]
def ladder_counts(n, d):
    """What seven kernels need for one head of n tokens: {rung: (bytes of sectors, turns of shared memory, operations)}.

    Operations of tensor cores count 67 / 989, so that one peak serves for all: an H100's in single precision.
    """
    draw = np.random.default_rng(6)
    arrays = [draw.standard_normal((n, d)).astype(np.float32) for _ in range(3)]
    s, p, out = np.zeros((n, n), np.float32), np.zeros((n, n), np.float32), np.zeros((n, d), np.float32)
    reports = {"1 three kernels": naive_reports(*arrays, s, p, out)}
    heads = [torch.from_numpy(a)[None] for a in arrays]
    for name, rung in (("2 a thread a query", "rows"), ("3 a block shares", "shared"),
                       ("4 registers 4 × 2", "registers"), ("5 registers 8 × 8", "large"),
                       ("6 tensor cores, wmma", "half"), ("7 tensor cores, mma", "mma")):
        given = heads if rung in ("rows", "shared", "registers", "large") else [a.half() for a in heads]
        kernel, launch, arguments = flash_launch(rung, *given)
        with warnings.catch_warnings():                    # more than 48 KB of shared memory has to be asked for
            warnings.simplefilter("ignore")
            reports[name] = [kernel.check[launch](*arguments)]
    counts = {}
    for name, several in reports.items():
        rows = [row for report in several for row in report.rows]
        n_bytes = 32 * sum(row.sectors for row in rows if row.space == "global")
        turns = sum(row.wavefronts for row in rows if row.space == "shared")
        counts[name] = n_bytes, turns, 4 * n * n * d * (67 / 989 if "tensor" in name else 1)
    return counts

# %% [markdown]
# **Dropout** in small tiles, the **schedule** of warps, and the models of the **sigmoid** experiment.

# %% tags=["export", "plumbing"]
def keep_mask(seed, i, j, shape, rate):
    """Which weights of tile (i, j) are kept: booleans, the same whenever and wherever they are asked for."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, i, j])).random(shape) >= rate

def with_dropout(q, k, v, d_out, seed, rate, block):
    """Output and gradients of attention with dropout; the mask exists one tile at a time, twice."""
    n, keep = len(q), 1 - rate
    starts = range(0, n, block)
    _, lse = flash_attention_numpy(q, k, v, scale=1.0)

    def part(i):
        return slice(i, i + block)

    def weights(i, j):
        return np.exp(q[part(i)] @ k[part(j)].T - lse[part(i), None])

    def mask(i, j):
        return keep_mask(seed, i, j, (block, block), rate) / keep

    out, d_q, d_k, d_v = (np.zeros_like(a) for a in (v, q, k, v))
    for i in starts:                                                         # forward: queries outside
        for j in starts:
            out[part(i)] += (mask(i, j) * weights(i, j)) @ v[part(j)]
    D = (d_out * out).sum(1)                                                 # holds with dropout too
    for j in starts:                                                         # backward: keys outside
        for i in starts:
            p, z = weights(i, j), mask(i, j)
            d_v[part(j)] += (z * p).T @ d_out[part(i)]
            d_s = p * (z * (d_out[part(i)] @ v[part(j)].T) - D[part(i), None])
            d_q[part(i)] += d_s @ k[part(j)]
            d_k[part(j)] += d_s.T @ q[part(i)]
    return out, d_q, d_k, d_v

# %% tags=["export", "plumbing"]
def schedule(groups, tiles, product=2, softmax=1):
    """Jobs (group, unit, start, length) of warp groups that share tensor cores and exponential units, greedily."""
    free, ready, jobs = {"products": 0, "softmax": 0}, [0] * groups, []
    for _ in range(tiles):
        for unit, length in (("products", product), ("softmax", softmax)):
            for group in range(groups):
                start = max(free[unit], ready[group])
                jobs.append((group, unit, start, length))
                free[unit] = ready[group] = start + length
    return jobs

# %% tags=["export", "plumbing"]
class WeighedRecall(Recall):
    """Lecture 01's model with attention, for 64 symbols; weigh(scores) turns scores (64, 64) into weights."""

    def __init__(self, weigh):
        super().__init__("attention", seq_len=64)
        self.weigh = weigh

    def attend(self, x):
        return self.weigh(self.question.weight @ (x + self.place.weight).mT / math.sqrt(x.shape[-1]))

def streams(seed, batch=16):
    draw = np.random.default_rng(seed)
    while True:
        yield [torch.from_numpy(ids) for ids in data.recall_stream(draw, batch, seq_len=64, n_symbols=8)]

def recall_losses(weigh, seed):
    """The loss at each of 200 steps of training, in double precision."""
    model = training.initialise(WeighedRecall(weigh).double(), seed)
    return training.fit(model, streams(seed), recall_loss, steps=200, lr=1e-2).losses

# %% [markdown]
# ## Glossary
#
# |term|what it is|
# |---|---|
# |causal tile|full, partial (the diagonal crosses it) or skipped|
# |context parallelism|one sequence over several machines|
# |flash attention|exact attention, tile by tile, that never holds the matrix of scores|
# |full, partial, skipped|what a mask does to a tile: allows all of it, some, none|
# |HBM|the large, slow memory of a GPU|
# |IO-aware|designed by the bytes that move between memories|
# |log-sum-exp, $L$|logarithm of the sum of a row's exponentials; gives finished weights and merges parts|
# |merge|attention over all keys, out of attentions over parts of them|
# |online softmax|a softmax in one pass: a maximum and a sum that are corrected when the maximum rises|
# |packed sequences, varlen|texts one behind the other, with a list of where each begins|
# |rank|one of several processes that work together|
# |recomputation|what the backward pass needs is calculated again, not stored|
# |ring attention|ranks in a ring hand on their keys and values|
# |SRAM|the papers' name for the fast memory inside a multiprocessor|
# |striped|tokens dealt out to ranks like cards|
# |swizzle|moving chunks within a row so that columns spread over the banks|
# |turn|one access of a warp to shared memory|
#
# ## Sources
#
# Milakov, Gimelshein 2018, online softmax (arXiv 1805.02867) · Rabe, Staats 2021 (2112.05682) · Dao, Fu, Ermon, Rudra, Ré
# 2022, FlashAttention (2205.14135): figures 1 and 2, algorithm 1, theorem 2, tables 1 and 2 · Dao 2023, FlashAttention-2
# (2307.08691) · Liu, Zaharia, Abbeel 2023, ring attention (2310.01889) · Brandon et al. 2023, striped attention
# (2311.09431) · Shah et al. 2024, FlashAttention-3 (2407.08608): § 4.3, table 2 · Ramapuram et al. 2024, sigmoid attention
# (2409.04431) · Allal et al. 2025, SmolLM2 (2502.02737) · NVIDIA's data sheets of A100 and H100.
