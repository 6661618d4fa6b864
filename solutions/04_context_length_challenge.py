# ---
# jupyter:
#   course:
#     edition: 2
#     experiments:
#     - statement
#     - documents
#     - Statements
#     - statement_reader
#     - train_reader
#     - train_statement_reader
#     - recorded_readers
#     - in_words
#     - needle_grid
#     - answer
#     - losses_of
#     - four_tasks
#     - found_by_hops
#     - found_by_age
#     - needle_weight
#     - parity_stream
#     - train_parity
#     - recorded_thinkers
#     - parity_accuracy
#     - passkey
#     - rescaled_model
#     - peak_and_seconds
#     module: long_context
#     public:
#     - softmax_rows_numpy
#     - softmax_rows_torch
#     - softmax_rows_cuda
#     - matmul_numpy
#     - matmul_torch
#     - matmul_cuda
#     - attention_share
#     - kv_cache_bytes
#     - prompt_cost
#     - place_needle
#     - effective_length
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["slide"]
# # Lecture 04 · The context-length challenge
#
# **The question.** What does a long context cost, and how much of it does a model use? **You will be able to** *count* what
# length costs (4A, 4F), *test* a test of long contexts (4B), *measure* how much of a context a real model uses (4C, 4D),
# *write* a layer that remembers the segment before (4E), *read* memory once on a GPU (4G, 4H).
# **You need** attention (lecture 01), the small language model (lecture 02), RoPE, its rescaling, ALiBi (lecture 03).
#
# | part or section | core minutes | more minutes |
# |---|---|---|
# | Part 1 · cost: 4.1, 4.2, exercise 4A | 32 | |
# | Part 2 · use: 4.3, 4.4, exercises 4B, 4C | 54 | |
# | Part 3 · longer: 4.5, exercises 4D, 4E | 57 | |
# | Part 4 · prompts: 4.6, 4.7, exercise 4F | 22 | |
# | Part 5 · CUDA: 4.8 and 4.9 | 15 | |
# | Another day: exercise 4G | | 20 |
# | Going further: 4.10 to 4.16, exercise 4H | | 90 |
# | **together** | **180** | **110** |

# %% [markdown] tags=["teacher"]
# **For the teacher: two times 50 minutes.** Run everything before class.
#
# - *Hour 1 (40).* 4.1: guess both slopes, the figure, the flow (9) · 4.2: the roofline, which of five wait for memory (8) ·
#   4.3: the model repeats its pass key (4) · 4.3: what 4B asks, the three grids (9) · 4.4: three curves, one rule (10).
# - *At home after hour 1.* 4A, 4B, 4C.
# - *Hour 2 (40).* 4.5: the gap on the board, predict the loss at 8,000 (12) · 4.5: what repairs it, two thresholds (6) ·
#   4.5: the memory of a segment, reach and use (9) · 4.6: the table (3) · 4.7: what a prompt costs (6) · 4.8: bytes of
#   three kernels (4).
# - *At home after hour 2.* 4D, 4E, 4F. For volunteers 4G.
# - *Board.* Two blocks on a line, prompt and question, the gap $D$ between them; RoPE sees $m-n$ only.
# - *Always works.* In 4.3 let the class choose five digits, and read aloud what SmolLM2 answers at depth 0.5.
# - *Checkpoint 1.* From which length on is half of the work of one token attention, in a 70B model? (Some 54 thousand.)
#   *Checkpoint 2.* A model claims 8,192 positions. What does that say? (That they were trained, not that they are used.)
# - *Skip first.* The memory that is read (4.5), then the table in 4.6: both read well at home.
# - *Questions that come.* Why does a model without positions do well in 4.3? The order of the statements does not matter
#   there; in language it does (lecture 03). Is the gap a fair test? It tests distances, not crowds: 4.3 tests crowds.

# %%
import math
import os
import sys

sys.path.insert(0, "." if os.path.exists("course.py") else "..")

import numpy as np
import torch

from utils import cuda, data, plotting, training
from utils.check import check

torch.set_num_threads(1)  # tiny models: one thread is fastest

# %% [markdown]
# ## Part 1 · What length costs
#
# ### 4.1 The quadratic scaling problem
#
# **What happens to time and memory when the sequence becomes twice as long?** One head of 64 numbers; NumPy's bytes are
# counted.
#
# *Predict.* On two logarithmic axes a power law is a straight line. Which slope will the memory have, and which the time?

# %% tags=["slide", "first-attention"]
from attention.experiments.long_context import peak_and_seconds
from attention.fundamentals import attention_numpy, attention_torch

lengths = 2 ** np.arange(8, 13)  # 256 to 4,096 tokens
measured = []
for length in lengths:
    qkv = np.random.default_rng(0).standard_normal((3, length, 64), dtype=np.float32)
    measured.append(peak_and_seconds(attention_numpy, attention_torch, qkv))
peaks, seconds = np.array(measured).T
plotting.scaling({"peak memory": (lengths, peaks),
                  "one score matrix, 4 n² bytes": (lengths, 4.0 * lengths**2)},
                 xlabel="sequence length n", ylabel="bytes",
                 title="Twice the length, four times the memory")
plotting.show("Two logarithmic lines of slope 2: peak memory lies above one matrix.")
print(f"score matrices alive at the peak: {peaks[-1] / (4 * 4096**2):.1f}")

# %% tags=["approx"] approx={"numbers": 0.5}
time_slope = np.polyfit(np.log(lengths[1:]), np.log(seconds[1:]), 1)[0]
print(f"the time grows as n to the power of about {time_slope:.0f}")

# %% [markdown]
# Two, for both. At the peak three matrices of $n \times n$ are alive, and a mask: scores, exponentials, weights. Nobody asked
# for them, and none is kept:

# %% tags=["slide"]
q, k, v = np.random.default_rng(0).standard_normal((3, 6, 2))
scores = q @ k.T / np.sqrt(2)
weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
plotting.flow({"Q": q, "K": k, "V": v, "scores": scores, "weights": weights,
               "out": weights @ v},
              [(("Q", "K"), "scores", "q kᵀ / √d\nn · n · d"),
               ("scores", "weights", "softmax\nn · n"),
               (("weights", "V"), "out", "weights · v\nn · n · d")],
              title="Long and thin goes in and comes out; the square is in the middle")
plotting.show("Data flow: Q and K, six rows of two, become six by six scores, then "
              "weights, and with V six rows of two again.")

# %% [markdown] tags=["slide"]
# #### Complexity: $O(n^2 d)$, and what a cache changes
#
# A layer multiplies each token with its $N$ weights, and with all tokens before it. For a prompt of $n$ tokens:
#
# $$2Nn+2n^2d\quad\text{operations}$$
#
# **Prefill** is the reading of the prompt, **decoding** the writing of one token after another. With a **cache** of keys and
# values (lecture 05) a new token asks one query.
#
# *Predict.* One layer of an 8B model. What does the next token cost at 65,536, without a cache and with one?

# %%
width, layer_weights = 4096, 218e6  # of one layer
print("       n   prefill: weights, scores   next token: no cache, cache  (GFLOP)")
for n_seen in (1024, 8192, 65536):
    by_weights = 2 * layer_weights * n_seen
    by_scores = 2 * n_seen**2 * width  # causal: half of the pairs
    cached = 2 * layer_weights + 4 * n_seen * width
    print(f"{n_seen:8,d} {by_weights / 1e9:16,.0f} {by_scores / 1e9:9,.0f} "
          f"{(by_weights + by_scores) / 1e9:21,.0f} {cached / 1e9:6.2f}")

# %% [markdown]
# Some 64 thousand GFLOP, or 1.5. A cache turns the next token from a quadratic affair into a linear one, and costs bytes
# (4.7). The prefill stays quadratic.
#
# #### Exercise 4A: the share of attention  (difficulty 2 of 5, useful, 8 minutes)
#
# "The operations of a language model are mostly attention." Are they? A token costs two operations for each weight, and in
# each layer $4nd$ for its scores and its weighted sum ($n$: tokens it sees; $d$: width of all heads).
#
# | argument | shape | meaning |
# |---|---|---|
# | `n` | integers, any shape | how many tokens the query sees |
# | `n_params` | int | weights that a token is multiplied with, in all layers |
# | `n_layers`, `d_model` | int | layers; width of all heads together |
#
# Returns floats of the shape of `n`: operations of scores and weighted sums, divided by all operations.
#
# <details><summary>Hint</summary>
#
# Which two sums are there, and does the second depend on $n$? A share is one of them divided by what?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def attention_share(n, n_params, n_layers, d_model):
    """Share of scores and weighted sums in the FLOPs of one token that sees n tokens.

    n integers of any shape; n_params, n_layers, d_model integers. A multiplication and
    an addition are two FLOPs. Returns floats of the shape of n.
    """
    ### BEGIN SOLUTION
    by_length = 4.0 * np.asarray(n) * d_model * n_layers
    return by_length / (2.0 * n_params + by_length)
    ### END SOLUTION

# %%
attention_share = check("4A", attention_share)

# %% tags=["slide"]
seen = np.array([1, 8, 32, 128]) * 1024
share = attention_share(seen, n_params=70_553_706_496, n_layers=80, d_model=8192)
print("Llama 3.1 70B:", "  ".join(f"{s // 1024}k {x:.0%}" for s, x in zip(seen, share)))
half = 70_553_706_496 / (2 * 80 * 8192)
print(f"half of the operations: of one token from {half:,.0f} on, "
      f"of a whole prompt from {2 * half:,.0f} on")

# %% [markdown]
# Two per cent at a thousand tokens, more than half only past fifty thousand (in a prompt a token sees $n/2$ others on
# average). Shared key heads (lecture 08) change nothing here: they shrink what is stored, not what is multiplied.
#
# **Trap.** *"100,000 tokens need 10 billion scores: terabytes of memory."* Ten billion is right. How many bytes, and who needs
# them at once?

# %%
print(f"one head of one layer, 2 bytes a score: {2 * 100_000**2 / 1e9:.0f} GB")
print(f"all 64 heads of a layer at once: {64 * 2 * 100_000**2 / 1e12:.2f} TB")
print(f"a tile of 64 x 64 scores: {2 * 64**2 / 1e3:.0f} KB")

# %% [markdown]
# Head after head needs 20 GB, tile after tile (lecture 06) 8 KB. The operations remain.

# %% [markdown]
# ### 4.2 Memory and compute bounds
#
# **How fast could a kernel be?** A GPU has two limits: bytes a second and operations a second. What decides is the **arithmetic
# intensity**, FLOPs per byte. Below the **ridge** a kernel waits for memory. The **roofline** draws both limits.
#
# An H100 SXM (data sheet): 3.35 TB/s, 989 TFLOP/s in bfloat16. To the right: FLOPs per byte that the *problem* allows, if each
# input is read once and each output written once. Upwards: the speed that a *kernel* can reach with all the bytes it really moves.
#
# *Predict.* Where is the ridge? Which of five kernels are left of it, and which stays below its roof?

# %% tags=["slide"]
BANDWIDTH, PEAK = 3.35e12, 989e12  # NVIDIA H100 SXM, data sheet, dense bfloat16
n_, d_ = 8192, 128
flops = 4 * n_**2 * d_ + 5 * n_**2  # two products; 5 for a softmax
kernels = {  # (FLOP, numbers in and out, numbers moved), 2 bytes each
    "softmax, n x n": (5 * n_**2, 2 * n_**2, 2 * n_**2),
    "matmul, n x n": (2 * n_**3, 3 * n_**2, 3 * n_**2),
    "attention, scores written": (flops, 4 * n_ * d_, 4 * n_ * d_ + 4 * n_**2),
    "attention, scores not written": (flops, 4 * n_ * d_, 4 * n_ * d_),
    "decode, one query": (flops / n_, 2 * n_ * d_ + 2 * d_, 2 * n_ * d_ + 2 * d_)}
points = {name: (work / (2 * floor), min(PEAK, BANDWIDTH * work / (2 * moved)))
          for name, (work, floor, moved) in kernels.items()}
ax = plotting.roofline(points, BANDWIDTH, PEAK,
                       title="Written scores keep attention at a fifth of its roof; "
                       "decoding stays on the slope")
marks, _ = ax.get_legend_handles_labels()
ax.legend(marks, points, loc="upper left", bbox_to_anchor=(0.0, -0.15), ncols=2)
ax.set(xlabel="FLOP per byte that the problem allows",
       ylabel="FLOP/s that the bytes permit")
plotting.show("Roofline of an H100: softmax and decoding on the slope near 1 FLOP per "
              "byte; the matrix product and attention without written scores on the "
              "flat roof; attention with written scores at a fifth of it.")
print(f"ridge: {PEAK / BANDWIDTH:.0f} FLOP per byte")
for name, (work, _, moved) in kernels.items():
    limit = "bytes" if work / (2 * moved) < PEAK / BANDWIDTH else "arithmetic"
    print(f"{name:30s} {work / (2 * moved):6.0f} FLOP per byte moved, limit: {limit}")

# %% [markdown]
# At 295; softmax and decoding are left of it, and attention with written scores is below. All points are **upper limits** put
# there by arithmetic; real kernels stay under them. Three lessons:
#
# - **Prefill** could be bound by arithmetic. The written scores hold it at a fifth; not to write them is lecture 06.
# - **Decoding** has one query: two operations for each number that is fetched. Only fewer bytes help: windows (07), shared
#   heads (08), latent keys (09), fewer bits (05).
# - A batch of users shares the weights, but each brings a cache of its own.
#
# **Trap.** *"Attention is memory-bound because of the KV cache."* Which attention? With many queries it is the square that is
# written and read, with one query the cache. Two causes, two cures: the figure has both.

# %% [markdown]
# ## Part 2 · What length is good for
#
# ### 4.3 Needle in a haystack
#
# **Can a model use what stands far back?** Hide one sentence, the needle, at some depth of a text, and ask for it at the end
# (Kamradt 2023). Where the needle is a number it is called a **pass key**. Ours is the running example of this lecture: *The
# pass key is 59063. Remember it: 59063 is the pass key.* It stands in a help page of Python; SmolLM2 reads it.
#
# *Predict.* What does SmolLM2 say where the needle is in the middle, and what where it is near the question?

# %% tags=["language-model", "slide"]
import itertools

from attention.experiments.long_context import passkey
from utils import language_model

smollm = language_model.load()
if smollm:
    for depth, n_said in ((0.5, 6), (0.9, 2)):
        prompt, question = passkey(smollm, key=59063, depth=depth)
        asked = torch.cat([prompt, question[:, :-6]], dim=1)
        written = itertools.islice(smollm.stream(asked), n_said)
        said = smollm.decode([int(token) for token in written])
        digits = smollm.losses(torch.cat([prompt, question], dim=1))[-5:]
        print(f"depth {depth}: {smollm.decode(question[:, :-6]).strip()}{said} ...")
        print(f"    loss on the five digits {digits.mean():.2f}")
    print(f"{asked.shape[1]} tokens; a guess among ten digits: {math.log(10):.2f}")

# %% [markdown]
# In the middle it reads the key off; near the question it begins to explain what a key is. And yet the digits cost little there
# too, once the space before them is given: it has found them. So the **loss on the digits** says more than right or wrong. Section
# 4.5 asks the same question from farther away.
#
# A test is code, and can be wrong: one whose needle always stands at one depth says nothing of the others. This function places
# needles:

# %% tags=["export"]
def place_needle(haystack, needle, depth):
    """Documents with one statement replaced: needle[b] in document b at depth[b].

    haystack integers (batch, seq_len), needle integers (batch,), depth floats (batch,):
    0 the first place, 1 the last, between two places the nearer one, and the later one
    if both are equally near.
    Returns a new array. ValueError for a depth outside [0, 1].
    """
    if np.size(depth) and not (0 <= np.min(depth) and np.max(depth) <= 1):
        raise ValueError("depth must lie between 0 and 1, "
                         f"got {np.min(depth)} to {np.max(depth)}")
    places = np.floor(depth * (haystack.shape[1] - 1) + 0.5).astype(int)
    documents = haystack.copy()
    documents[np.arange(len(haystack)), places] = needle
    return documents

# %% [markdown] tags=["slide"]
# #### Exercise 4B: test the test  (difficulty 3 of 5, useful, 15 minutes)
#
# Write a test that is given such a function and notices whether it is wrong. It is tried on right ones and on ten wrong ones.
#
# | argument | meaning |
# |---|---|
# | `place` | `place(haystack, needle, depth)`, as `place_needle` above |
#
# Returns nothing. It raises an error (`assert ...`) for a wrong function, and none for a right one.
#
# <details><summary>Hint</summary>
#
# Which documents let you write down the answer by hand? Do yours differ in needle and in depth? Which depths fall between two
# places, and which exactly in the middle? What should have become of the haystack, and what of a depth of 1.5?
#
# </details>

# %% tags=["exercise", "export"] kind="bug"
def test_place_needle(place):
    """Raise AssertionError if place(haystack, needle, depth) is wrong."""
    ### BEGIN SOLUTION
    haystack = np.arange(40).reshape(8, 5)
    kept, needle = haystack.copy(), np.arange(100, 108)
    depth = np.array([0.0, 1.0, 0.125, 0.375, 0.3, 0.95, 0.625, 0.2])
    expected = haystack.copy()
    expected[np.arange(8), [0, 4, 1, 2, 1, 4, 3, 1]] = needle
    found = place(haystack, needle, depth)
    assert np.array_equal(found, expected), "wrong places"
    assert np.array_equal(haystack, kept), "the haystack was changed"
    for outside in (-0.1, 1.5):
        try:
            place(haystack[:1], needle[:1], np.array([outside]))
        except ValueError:
            continue
        raise AssertionError(f"a depth of {outside} is accepted")
    ### END SOLUTION

# %%
test_place_needle = check("4B", test_place_needle)

# %% [markdown]
# #### A haystack with rivals
#
# A single needle in hay is easy: nothing else looks like it. RULER (Hsieh et al. 2024, arXiv 2404.06654) adds needles that
# nobody asks for. We take readers that are small enough to be asked thousands of times: two layers, trained on documents of
# **32 statements**. A statement is one token with a name and a content.
#
# | statement | meaning |
# |---|---|
# | `(x7, 41)` | x7 is 41 |
# | `(x2, x7)` | x2 is what x7 is |
# | `(w3, w8)` | two words: the hay |
# | `(x2, ?)`, `most?` | questions: what is x2? Which word is the most common? |

# %%
from attention.experiments.long_context import documents, in_words, recorded_readers

ids, answers, _ = documents(np.random.default_rng(7), batch=1, seq_len=8, chains=2)
print("text:    ", *map(in_words, ids[0, :8]))
print("asked:   ", *map(in_words, ids[0, 8:]))
print("answers: ", *(in_words(symbol, alone=True) for symbol in answers[0, 8:]))

readers = {kind: recorded_readers(kind) for kind in ("RoPE", "ALiBi", "no positions")}
print("trained up to position 44;", ", ".join(f"{kind}: {len(three)} seeds"
                                              for kind, three in readers.items()))

# %% [markdown]
# (`documents`, the readers and their training are in Behind the scenes; the weights were recorded, `python -m
# data.recorded.lecture_04`. The questions come in random order: asked chain by chain, a reader learns to repeat itself.)
#
# *Predict.* All were trained at 32 statements. Which loses needles first, and where in the text?

# %% tags=["slide"]
import matplotlib.pyplot as plt
from attention.experiments.long_context import needle_grid

sizes = (32, 64, 96, 128, 256)
grids = {"RoPE, hay": needle_grid(readers["RoPE"], sizes, rivals=0),
         "RoPE, 15 rivals": needle_grid(readers["RoPE"], sizes, rivals=15),
         "ALiBi, 15 rivals": needle_grid(readers["ALiBi"], sizes, rivals=15)}

def draw_grids(grids, sizes, title):
    figure, axes = plt.subplots(1, len(grids), figsize=(10, 3.8), sharey=True)
    for ax, (name, grid) in zip(axes, grids.items()):
        picture = ax.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        ax.set(title=name, xlabel="statements")
        ax.set_xticks(range(len(sizes)), sizes)
        ax.grid(False)
    axes[0].set(ylabel="depth of the needle")
    axes[0].set_yticks([0, 4, 8], ["start", "middle", "end"])
    figure.colorbar(picture, ax=axes, label="probability of the right value")
    figure.suptitle(title)

draw_grids(grids, sizes, "At 256, with rivals, RoPE keeps the end, ALiBi nearly all")
plotting.show("Three heat maps, needle depth against length: RoPE darkens at 256, with "
              "rivals from 96 on, but not near the end; ALiBi stays bright.")
for name, grid in grids.items():
    start, middle, end = (grid[rows, -1].mean() for rows in
                          (slice(0, 2), slice(3, 6), slice(7, 9)))
    print(f"{name:17s} at 256: start {start:.2f}, middle {middle:.2f}, end {end:.2f}")

# %% [markdown]
# RoPE, at the start and in the middle: it has met rotations for distances up to 44 only. Needles near the question, at familiar
# distances, are still found. ALiBi only subtracts a little for each step, at 256 as at 44. With rivals the same model looks far
# worse: *a test says little about another one*.
#
# **Trap.** *"Language models forget the middle."* Liu et al. (2023, arXiv 2307.03172) found a U, *lost in the middle*: start and
# end better than the middle. Here the start is as bad as the middle. The U depends on model and training data; it is no law of
# attention. Test yours.

# %% [markdown]
# ### 4.4 Key metrics for long context
#
# **Which number says that a model uses its context?** Four are common: the loss by position, a needle or pass key, a mean over
# harder tasks, and the longest length at which that mean is still good. First: a mean loss over a long text hides where it
# comes from, so cut the positions into buckets.
#
# *Predict.* 256 statements, 15 variables. Which curve rises, and how high? (Guessing among 32 values costs 3.47.)

# %% tags=["slide"]
from attention.experiments.long_context import losses_of
from attention.long_context import loss_by_position

edges = np.arange(0, 257, 32)
by_position = {kind: np.array([loss_by_position(losses_of(model), edges)
                               for model in three]) for kind, three in readers.items()}
plotting.curves(by_position, x=edges[:-1] + 16, ylabel="loss (nats)",
                xlabel="position in the document (trained up to 44)",
                threshold=3.47, threshold_name="guessing",
                title="Past the trained length RoPE climbs towards guessing, the "
                      "others a little")
plotting.show("Loss by position to 256, mean and range of three seeds: RoPE rises from "
              "position 50 to nearly 3 nats; ALiBi and no positions stay below 1.")
for kind, curve in by_position.items():
    print(f"{kind:13s} loss in the last 32 positions {curve[:, -1].mean():.1f}")

# %% [markdown]
# RoPE, nearly up to guessing. A falling curve means that context is used, a flat one that it stopped, a rising one that length
# harms. A mean over the first 64 positions would have shown none of it.
#
# RULER's harder tasks, in our statements: **many needles** (eight, each asked for), **variable tracking** (a value handed on to
# another name), **common words** (which word is most frequent?).
#
# *Predict.* Which of the four is lost first with length? Does one gain?

# %% tags=["slide"]
from attention.experiments.long_context import four_tasks

tasks = ("needle", "many needles", "tracking", "common word")
tried = np.array([32, 64, 128, 256])
scores_of = np.array([[four_tasks(model, n) for n in tried]
                      for model in readers["RoPE"]])
plotting.curves({task: scores_of[:, :, i] for i, task in enumerate(tasks)}, x=tried,
                xlabel="statements (trained at 32)", ylabel="accuracy (RoPE)",
                title="Lookups fail with length, tracking first; the common word gains")
plotting.show("Accuracy of the RoPE readers on four tasks against length: tracking "
              "falls first, then many needles and needle; the common word rises.")
for i, task in enumerate(tasks):
    print(f"{task:13s}", "  ".join(f"{n}: {s:.2f}" for n, s in
                                   zip(tried, scores_of[:, :, i].mean(0))))

# %% [markdown]
# Tracking first, the single needle last, as in RULER. The common word *gains*: it asks for an average, and an average becomes
# easier with more words.
#
# #### Exercise 4C: the effective length  (difficulty 3 of 5, useful, 12 minutes)
#
# RULER calls a length *effective* when the mean score is above a threshold (85.6 points: what Llama 2 7B reaches at its 4K). We
# ask for all shorter lengths as well.
#
# | argument | shape | meaning |
# |---|---|---|
# | `lengths` | integers `(n_lengths,)`, rising | lengths that were tested |
# | `scores` | `(n_models, n_lengths)` | mean score of each model at each length |
# | `threshold` | float | a score has to be above it |
#
# Returns integers `(n_models,)`: the longest length such that it *and all shorter ones* are above the threshold; 0 where not
# even the first is.
#
# <details><summary>Hint</summary>
#
# What does a score tell that comes back after a failure? `np.logical_and.accumulate` along a row stays False after the first
# False. How many are left, and which length is that?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def effective_length(lengths, scores, threshold):
    """The longest length up to which all scores are above the threshold, 0 for none.

    lengths integers (n_lengths,), rising; scores (n_models, n_lengths). Returns
    integers (n_models,). Source: the rule of Hsieh et al. 2024 (arXiv 2404.06654), § 4,
    with the shorter lengths asked for as well.
    """
    ### BEGIN SOLUTION
    passed = np.logical_and.accumulate(np.asarray(scores) > threshold, axis=1)
    return np.concatenate([[0], np.asarray(lengths)])[passed.sum(axis=1)]
    ### END SOLUTION

# %%
effective_length = check("4C", effective_length)

# %% [markdown]
# The mean over RULER's 13 tasks, from the table in its repository (NVIDIA/RULER, as of 2024). *Predict.* Five of these models
# claim 128K or more. How many are effective at 128K?

# %% tags=["slide"]
published = {  # claimed length in K; score at 4K, 8K, 16K, 32K, 64K, 128K
    "Gemini 1.5 Pro": (1000, 96.7, 95.8, 96.0, 95.9, 95.9, 94.4),
    "GPT-4-1106": (128, 96.6, 96.3, 95.2, 93.2, 87.0, 81.2),
    "Llama 3.1 70B": (128, 96.5, 95.8, 95.4, 94.8, 88.4, 66.6),
    "Qwen2 72B": (128, 96.9, 96.1, 94.9, 94.1, 79.8, 53.7),
    "Llama 3 70B, third-party 1M": (1000, 95.1, 94.4, 90.8, 85.4, 80.9, 72.1),
    "Mistral 7B v0.2": (32, 93.6, 91.2, 87.2, 75.4, 49.0, 13.8)}
table = np.array(list(published.values()))
kept = effective_length(np.array([4, 8, 16, 32, 64, 128]), table[:, 1:], 85.6)
for name, claimed, found in zip(published, table[:, 0], kept):
    more = " or more" if found == 128 else ""
    print(f"{name:28s} claims {claimed:5.0f}K, effective up to {found:3d}K{more}")

# %% [markdown]
# One of five. **Trap.** *"This model has a context of 1M (it is a Llama 3)."* Its positions reach so far. Llama 3 was trained
# for 8K, Llama 3.1 for 128K; the versions for 1M were tuned by third parties, and this one is effective up to 16K.

# %% [markdown]
# ## Part 3 · Longer
#
# ### 4.5 From 2K to 100K+ tokens
#
# **What changed between a context of 2,048 tokens and one of a million?** Not one thing.
#
# | date | who | context | what made it possible | source |
# |---|---|---|---|---|
# | 2020-05 | GPT-3 | 2K | learned positions: there is no place 2,049 | arXiv 2005.14165 |
# | 2023-02 | LLaMA | 2K | RoPE, base 10,000 | 2302.13971 |
# | 2023-06 | position interpolation | 32K | positions squeezed, at most 1,000 steps of training | 2306.15595 |
# | 2023-08 | Code Llama | 100K | base 1,000,000, tuned on sequences of 16K | 2308.12950 |
# | 2023-08 | YaRN | 128K | interpolates only what turns slowly, and a temperature | 2309.00071 |
# | 2023-10 | ring attention | limited by devices | the sequence is spread over GPUs (lecture 06) | 2310.01889 |
# | 2024-07 | Llama 3.1 | 128K | base 500,000, frequencies rescaled, long data, many GPUs | 2407.21783 |
# | 2025-03 | Gemma 3, 4B and larger | 128K | five layers in six see 1,024 tokens only | 2503.19786 |
# | 2026-04 | DeepSeek-V4 | 1M | keys and values compressed along the sequence | its configuration |
#
# (As of November 2026.) The first half of it is about *positions*, and can be tried on SmolLM2, which **claims 8,192**. A text of
# that length costs minutes here. But RoPE sees differences of positions only: leave a **gap** of $D$ positions between prompt
# and question, as in lecture 03, and every key of the prompt is $D$ farther away, at the cost of 240 tokens.

# %%
words = ["text", "text", "text", "key", "text", "text", "ask", "ask", "5"]
places = ["0", "1", "2", "3", "4", "5", "6+D", "7+D", "8+D"]
plotting.memory({"tokens": np.array(words), "positions": np.array(places)},
                title="A gap of D positions: few tokens, large distances")
plotting.show("Nine tokens, six of a prompt with the key in it and three of the "
              "question; below them their positions, which jump by D after the prompt.")

# %% [markdown]
# The prompt is read once; its keys wait in the caches. For each gap the question is read on a copy of them.
#
# #### Exercise 4D: the loss across a gap  (difficulty 3 of 5, essential, 15 minutes; if you do only two)
#
# | argument | shape | meaning |
# |---|---|---|
# | `model` | | SmolLM2, or one like it (below) |
# | `prompt` | `(1, n_prompt)` int64 | read once, at positions 0, 1, ... |
# | `rest` | `(1, n_rest)` int64 | read after each gap: its first token stands at `n_prompt + gap` |
# | `gaps` | list of ints | how many positions are left out |
# | `n_last` | int | how many tokens at the end of `rest` count |
#
# `model.new_caches()` gives an empty cache for each layer, and `copy.copy(cache)` a copy: what joins one does not join the other.
# `model.hidden(ids, positions=..., caches=...)` reads ids and fills caches; `model.losses(ids, positions=..., caches=...)` does
# the same and returns the loss of each token but the first, `(n - 1,)`. Positions are a tensor of
# integers `(n,)`.
#
# Returns a tensor of floats `(n_gaps,)`: the mean loss of the last `n_last` tokens after each gap.
#
# <details><summary>Hint</summary>
#
# What has a cache seen after the first gap, if it is not copied? At which position does token $i$ of `rest` stand? What would
# happen to the distances if the prompt were moved as well?
#
# </details>

# %%
import copy

# %% tags=["exercise", "export"] kind="training"
def loss_across_gap(model, prompt, rest, gaps, n_last):
    """Mean loss of the last n_last tokens of rest, a gap of positions after the prompt.

    prompt (1, n_prompt), rest (1, n_rest), gaps a list of integers. model has
    new_caches(), hidden and losses, both called (ids, positions=..., caches=...).
    Returns a tensor of floats (n_gaps,).
    """
    ### BEGIN SOLUTION
    caches = model.new_caches()
    model.hidden(prompt, positions=torch.arange(prompt.shape[1]), caches=caches)
    found = []
    for gap in gaps:
        own = [copy.copy(cache) for cache in caches]
        positions = prompt.shape[1] + gap + torch.arange(rest.shape[1])
        losses = model.losses(rest, positions=positions, caches=own)
        found.append(losses[-n_last:].mean())
    return torch.stack(found)
    ### END SOLUTION

# %%
loss_across_gap = check("4D", loss_across_gap)

# %% [markdown]
# Four prompts (two texts, two depths), asked across gaps. Then the rotations of lecture 03, rescaled for four times the length,
# **without a step of training**: NTK raises the base, YaRN interpolates only the slow pairs.
#
# *Predict.* Where does the loss leave zero: at the claimed 8,192, before, or after? What does rescaling cost at a gap of 0?

# %% tags=["language-model", "slide"]
from attention.experiments.long_context import rescaled_model

gaps = [0, 1000, 2000, 4000, 6000, 8000, 16000]
if smollm:
    asked_across = [passkey(smollm, key, depth, of) for of, key in
                    (("help", 59063), ("course", 24718)) for depth in (0.1, 0.9)]
    across = {}
    for way in ("RoPE", "NTK", "YaRN"):
        model = rescaled_model(smollm, way, factor=4)
        across[way] = torch.stack([loss_across_gap(model, *pair, gaps, 5)
                                   for pair in asked_across]).numpy()
        print(f"{way:5s}", " ".join(f"{gap}: {loss:.2f} " for gap, loss in
                                    zip(gaps, across[way].mean(0))))
    plotting.curves({way: rows.mean(0) for way, rows in across.items()}, x=gaps,
                    xlabel="gap in positions (claimed: 8,192)",
                    ylabel="loss on the digits (nats)",
                    threshold=2.3, threshold_name="a guess among ten digits:",
                    title="The model uses a fraction of what it claims; rescaling "
                          "gives part of it back")
    plotting.show("Loss on the digits against the gap: unchanged RoPE is near 0 up to "
                  "1,000, near 1 at 4,000, above a guess from 8,000 on; NTK and YaRN "
                  "stay below the guess to 16,000, with a bump at 6,000.")

# %% [markdown]
# Long before. At 1,000 the key is read off, at 4,000 half of it is lost, and near the claimed 8,192 a guess would do better: a
# key that is too far away does not only get lost, it *harms*. Rescaled, the model does better than guessing at 16,000, for a few
# hundredths at gap 0. It is no clean repair: both stumble at 6,000, and worse than the model as it is.
#
# **How long is the effective context, then?** Your rule of 4C needs a threshold. Two: all five digits right more often than not
# ($5 \cdot \text{loss} < \ln 2$), or half of the way to guessing.

# %% tags=["language-model", "slide"]
if smollm:
    ways = list(across)
    mean_loss = np.array([across[way].mean(0) for way in ways])
    reach_of = np.array(gaps) + asked_across[0][0].shape[1]
    for name, limit in (("all five digits, loss below 0.14", math.log(2) / 5),
                        ("half a guess, loss below 1.15", math.log(10) / 2)):
        found = effective_length(reach_of, -mean_loss, -limit)
        print(f"{name:33s}", "  ".join(f"{w}: {n:6,d}" for w, n in zip(ways, found)))
    squeezed = rescaled_model(smollm, "PI", factor=4)
    pi = loss_across_gap(squeezed, *asked_across[0], [0, 8000], 5)
    print(f"positions divided by 4, untuned (one prompt): {pi[0]:.1f} at 0, "
          f"{pi[1]:.1f} at 8,000")

# %% [markdown]
# Between 1,215 and 6,215 for the model as it is. By the first threshold both repairs nearly double it; by the second YaRN makes
# it *shorter*, for its stumble at 6,000. *An effective length without its threshold says nothing*. Position interpolation
# (PI) without tuning destroys retrieval even at gap 0; its paper tunes, for that reason (Chen et al. 2023). Two cautions. The
# gap is an **emulation**: large distances, but no crowd of rivals between them; a real long text is harder. And a longer range
# is necessary, not sufficient: the model must have *seen* questions whose answers stand far back. PoSE (Zhu et al. 2023, arXiv
# 2309.10400) trains exactly with such gaps.
#
# #### Transformer-XL: a memory of the segment before
#
# **Can a model read beyond its window without a longer window?** Dai et al. (2019, arXiv 1901.02860) cut the text into segments.
# Each layer also attends to its own inputs of the segment before. **No gradient flows into them.**

# %% tags=["slide"]
x_old, x_new = np.zeros((8, 16)), np.zeros((8, 16))
plotting.flow({"memory": x_old, "x": x_new, "seen": np.zeros((16, 16)),
               "q": x_new, "k, v": np.zeros((16, 16)), "out": x_new},
              [(("memory", "x"), "seen", "memory.detach(),\nthen x"),
               ("seen", "k, v", "W_K, W_V"), ("x", "q", "W_Q"),
               (("q", "k, v"), "out", "causal attention,\nW_O")],
              title="A segment of 8 asks itself and the 8 tokens before")
plotting.show("Data flow: memory and x, eight rows each, are joined to sixteen rows of "
              "keys and values; the eight queries come from x alone.")

# %% [markdown]
# #### Exercise 4E: a layer with a memory  (difficulty 4 of 5, essential, 20 minutes; if you do only two)
#
# Write the layer. It gets the whole text and reads it segment by segment. The shape contract:
#
# | array | shape |
# |---|---|
# | `x` | `(batch, n, d_model)`, n not always a multiple of `segment` |
# | parameters `w_q`, `w_k`, `w_v`, `w_o` | `(d_model, d_model)`, used as `x @ w`; random, of size about `d_model**-0.5` |
# | q of a segment | `(batch, n_heads, up to segment, d_head)` |
# | k, v of a segment | the last `memory` rows of x before it, then its own: `(batch, n_heads, up to memory + segment, d_head)` |
#
# The rows before are **detached**; `w_k` and `w_v` are applied after that, so they learn from the memory. Inside, causal: the
# last query sees all keys. The memory belongs to one text: nothing stays from one call to the next.
#
# Returns `(batch, n, d_model)`.
#
# <details><summary>Hint</summary>
#
# Which rows of x does the segment that begins at `start` remember, and what is that for the first one? What does
# `attention_torch(q, k, v, causal=True)` do with fewer queries than keys? Which part of x must not send a gradient back?
#
# </details>

# %%
from attention.multi_head import merge_heads, split_heads
from torch import nn

# %% tags=["exercise", "export"] kind="module"
class SegmentAttention(nn.Module):
    """Causal self-attention over segments that remembers `memory` tokens before each.

    x (batch, n, d_model) -> (batch, n, d_model). Parameters w_q, w_k, w_v, w_o
    (d_model, d_model). No gradient flows into what is remembered.
    Source: Dai et al. 2019 (arXiv 1901.02860), § 3.2, without its positions.
    """

    def __init__(self, d_model, n_heads, segment, memory):
        super().__init__()
        self.n_heads, self.segment, self.memory = n_heads, segment, memory
        ### BEGIN SOLUTION
        self.w_q, self.w_k, self.w_v, self.w_o = (
            nn.Parameter(torch.randn(d_model, d_model) * d_model**-0.5) for _ in "qkvo")
        ### END SOLUTION

    def forward(self, x):
        ### BEGIN SOLUTION
        out = []
        for start in range(0, x.shape[1], self.segment):
            part = x[:, start:start + self.segment]
            remembered = x[:, max(0, start - self.memory):start].detach()
            seen = torch.cat([remembered, part], dim=1)
            q, k, v = (split_heads(rows @ w, self.n_heads) for rows, w in
                       ((part, self.w_q), (seen, self.w_k), (seen, self.w_v)))
            out.append(merge_heads(attention_torch(q, k, v, causal=True)) @ self.w_o)
        return torch.cat(out, dim=1)
        ### END SOLUTION

# %%
SegmentAttention = check("4E", SegmentAttention)

# %% [markdown]
# *Predict.* Segments of 8, a memory of 8, random weights, layers stacked. One token is changed; from how far back does the last
# output notice it, with 1, 2, 3, 4 layers? And from how far back comes a gradient?

# %%
def stack(n_layers, memory):
    return [training.initialise(SegmentAttention(16, 2, 8, memory).double(), seed)
            for seed in range(n_layers)]

def last_output(layers, x):
    for layer in layers:
        x = x + layer(x)
    return x[0, -1]

tokens = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 56, 16)))
for name, memory in (("no memory", 0), ("memory 8 ", 8)):
    noticed = []
    for n_layers in (1, 2, 3, 4):
        layers = stack(n_layers, memory)
        before, at = last_output(layers, tokens), 0
        moved = tokens.clone()
        while at < 55:
            moved[0, at] += 1
            if not torch.equal(last_output(layers, moved), before):
                break
            moved[0, at], at = tokens[0, at], at + 1
        noticed.append(55 - at)
    print(f"{name} reach with 1, 2, 3, 4 layers:", *noticed)
given = tokens.clone().requires_grad_()
last_output(stack(4, 8), given).sum().backward()
far = int(given.grad.abs().sum(-1)[0].nonzero()[0])
print(f"the gradient of four layers reaches back {55 - far}")

# %% [markdown]
# The reach grows by a segment with each layer, $(L + 1) \cdot 8 - 1$; the gradient stays in its own segment. Reach is what a
# model *can* use. **Does one use it?** The ALiBi readers of 4.3 read 96 statements in three segments of 32, with different
# memories; the questions stand in a fourth.
#
# *Predict.* With two layers and a memory of 32 a question reaches back two segments. Which facts are found?

# %% tags=["slide"]
from attention.experiments.long_context import found_by_age

by_memory = {f"memory {size}": np.array([found_by_age(model, size) for model in
                                         readers["ALiBi"]]) for size in (0, 32, 64, 96)}
plotting.curves(by_memory, x=np.arange(3), ylabel="found (3 seeds)",
                xlabel="segment of the fact: 0 the oldest, 2 just before the questions",
                title="A reader finds what its memory holds, not what its layers reach")
plotting.show("Share of facts found by segment: no memory finds nothing anywhere, "
              "memory 32 only the last segment, 64 the last two, 96 all three.")
for name, rows in by_memory.items():
    print(f"{name:9s} found, oldest first:", rows.mean(0).round(2).tolist())

# %% [markdown]
# The last segment only. A fact of segment 1 could arrive if somebody in segment 2 had picked it up before anyone asked, and
# our readers were never trained to. A receptive field is an upper bound; the effective context has to be measured.

# %% [markdown]
# ## Part 4 · What a prompt costs
#
# ### 4.6 Current approaches
#
# **What do models with long contexts do today?** Many no longer let every layer see everything. (November 2026; from the paper
# named, or *conf*: the default configuration in transformers 5.23.)
#
# | date | model | layers | lecture |
# |---|---|---|---|
# | 2023-10 | Mistral 7B v0.1 (2310.06825) | window of 4,096 in every layer | 07 |
# | 2024-03 | Jamba (2403.19887, *conf*) | one attention layer in eight, the others Mamba | 10 |
# | 2024-06 | Gemma 2 (2408.00118, *conf*) | window of 4,096 and full, in turn | 07 |
# | 2025-02 | NSA (2502.11089) | three branches: compressed, selected and recent keys | 07 |
# | 2025-03 | Gemma 3, 4B and larger (2503.19786) | five with a window of 1,024, one full | 07 |
# | 2025-08 | GPT-OSS (2508.10925, *conf*) | window of 128 and full, in turn | 07 |
# | 2025-09 | Qwen3-Next (*conf*) | three gated delta layers, one full with two KV heads | 10 |
# | 2025-09 | DeepSeek-V3.2, DSA (*conf*) | an indexer picks 2,048 keys for each query | 07, 09 |
# | 2025-10 | Kimi Linear (2510.26692, *conf*) | mostly three delta layers, one latent attention | 10 |
# | 2026-04 | DeepSeek-V4-Flash (*conf*) | window of 128; 4 tokens in one, 512 picked; or 128 in one | 07 |
#
# (A delta layer keeps one matrix instead of keys and values.) **Hybrids** keep a few full layers, because recall suffers without
# them; **sparse** ones keep the keys and choose among them.
#
# *Predict.* One layer in six is full, the others keep 1,024. Which share of the cache is left at 128k?

# %%
context = np.array([4, 32, 128, 1024]) * 1024
mixes = {"all full": (1, 0, 0), "1 of 2 full, window 4,096": (1 / 2, 1 / 2, 4096),
         "1 of 6 full, window 1,024": (1 / 6, 5 / 6, 1024),
         "1 of 4 full, rest constant": (1 / 4, 0, 0)}
print(f"{'share of the cache':26s}", *(f"{size // 1024:6d}k" for size in context))
for name, (full, windowed, window) in mixes.items():
    left = full + windowed * np.minimum(context, window) / context
    print(f"{name:26s}", *(f"{part:7.0%}" for part in left))

# %% [markdown]
# 17 %. What is not full hardly counts at that length.
#
# ### 4.7 Real-world implications: what a prompt costs
#
# **How many bytes does a conversation occupy?** Each layer keeps a key and a value for each token and KV head; a layer with a
# window keeps the last ones only.
#
# #### Exercise 4F: bytes of the cache  (difficulty 2 of 5, useful, 8 minutes)
#
# | argument | meaning |
# |---|---|
# | `seq_len` | integers, any shape: tokens so far |
# | `n_kv_heads`, `d_head` | heads that keep keys and values, and their width |
# | `n_full` | layers that keep everything |
# | `n_windowed`, `window` | layers that keep the last `window` tokens |
# | `n_bytes` | bytes of a number |
#
# Returns integers of the shape of `seq_len`.
#
# <details><summary>Hint</summary>
#
# How many tokens does a full layer keep, and how many a windowed one that is not yet full? What does each token cost?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def kv_cache_bytes(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0,
                   n_bytes=2):
    """Bytes of the keys and values of one sequence: integers of the shape of seq_len.

    n_full layers keep all seq_len tokens, n_windowed layers the last `window`; a number
    has n_bytes bytes.
    """
    ### BEGIN SOLUTION
    seq_len = np.asarray(seq_len, dtype=np.int64)
    tokens_kept = n_full * seq_len + n_windowed * np.minimum(seq_len, window)
    return 2 * n_kv_heads * d_head * n_bytes * tokens_kept
    ### END SOLUTION

# %%
kv_cache_bytes = check("4F", kv_cache_bytes)

# %% [markdown]
# `prompt_cost` (Behind the scenes) adds the FLOPs of the prefill and the bytes that a new token reads: its weights, and the cache.
# (A model of *experts*, lecture 12, uses a part of its weights for each token.) Eight published models (sizes with embeddings,
# and sources: `data/long_context_models.json`), a prompt of 131,072 tokens, two bytes a number. *Does it fit?* The last column
# divides by 80 GB and counts every weight, also of experts that this token does not use.
#
# *Predict.* Llama 3.1 8B and Mistral 7B cost the same at 1k. By which factor do their prefills differ at 128k?

# %% tags=["slide"]
import json

from attention.long_context import prompt_cost

path = data.FOLDER / "long_context_models.json"
models = json.loads(path.read_text(encoding="utf-8"))["models"]
total = {  # weights with all experts
    "GPT-OSS 120B": 117e9, "DeepSeek-V2": 236e9, "DeepSeek-V3": 671e9}
print(f"{'131,072 tokens':16s} prefill PFLOP cache GB KB/token  read a token GB  H100s")
for entry in models:
    prefill, cache, read = prompt_cost(entry, 131072)
    needed = 2 * total.get(entry["name"], entry["active"]) + cache
    print(f"{entry['name']:16s} {prefill / 1e15:13.2f} {cache / 1e9:9.2f} "
          f"{cache / 131072 / 1e3:9.1f} {read / 1e9:16.1f} {needed / 80e9:6.1f}")

# %% [markdown]
# By three. Three of the eight fit on one H100. At best, on as many as hold it:

# %%
print(f"{'at the roof':16s} H100s   prefill: 1k     128k   tokens/s: 1k   128k")
for entry in models:
    short, long = prompt_cost(entry, 1024), prompt_cost(entry, 131072)
    needed = 2 * total.get(entry["name"], entry["active"]) + long[1]
    chips = math.ceil(needed / 80e9)
    print(f"{entry['name']:16s} {chips:5d} {short[0] / PEAK / chips:11.3f} s "
          f"{long[0] / PEAK / chips:6.1f} s {chips * BANDWIDTH / short[2]:12.0f} "
          f"{chips * BANDWIDTH / long[2]:6.0f}")

# %% [markdown]
# (Upper limits: nothing is timed, and no byte between devices is counted. Mistral v0.1 and Gemma 2 were trained for 8K: these
# are the costs of their shapes.) **The first token** waits for the prefill, which grows faster than the prompt; **every other
# one** for weights and cache.
#
# **Trap.** *"The energy of a language model is dominated by attention."* Two currencies: operations in the prefill, bytes while
# decoding. *Predict.* At which length is it true?

# %%
spans = 1024 * 2 ** np.arange(8)
shares, of_bytes = {}, {}
for entry in models[1:2] + models[3:4] + models[5:6]:
    costs = [prompt_cost(entry, int(span)) for span in spans]
    shares[entry["name"]] = [1 - 2 * entry["active"] * span / cost[0]
                             for span, cost in zip(spans, costs)]
    of_bytes[entry["name"]] = [cost[1] / cost[2] for cost in costs]
plotting.curves(shares, x=spans, xlabel="tokens of the prompt",
                ylabel="share of attention in the FLOPs", threshold=0.5,
                threshold_name="half:",
                title="Attention dominates no short prompt; at 128k, two of the three"
                ).set_xscale("log", base=2)
plotting.show("Share of attention in the operations of a prefill against length: near "
              "0 at 1k for all; at 128k above half for Llama and GPT-OSS, low with "
              "Mistral's windows.")
for name in shares:
    for what, part in (("FLOPs of the prefill", shares), ("bytes decoded", of_bytes)):
        first, *_, last = part[name]
        print(f"{name:16s} {what:20s} 1k {first:4.0%}, 128k {last:4.0%}")

# %% [markdown]
# As a general sentence, at none. At 1k neither currency is spent on attention; at 128k it depends on the model. (Joules for each
# depend on the chip.)

# %% [markdown]
# ## Part 5 · CUDA
#
# ### 4.8 A row of scores, read once
#
# **What does a softmax wait for?** For memory, at any size: five operations a number, eight bytes in float32 at least. So its bytes
# are its time. One block of 256 threads takes a row; a maximum over the block needs shuffles in each warp, then eight numbers in
# shared memory.

# %% tags=["export"]
OVER_BLOCK = r"""
#define THREADS 256
__device__ float combine(float a, float b, bool largest) { return largest ? fmaxf(a, b) : a + b; }
__device__ float over_block(float x, bool largest) {
  __shared__ float of_warp[THREADS / 32];
  for (int o = 16; o > 0; o /= 2) x = combine(x, __shfl_xor_sync(0xffffffff, x, o), largest);
  __syncthreads();                                      // the last call's numbers have been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();                                      // all eight are there
  x = of_warp[0];
  for (int w = 1; w < THREADS / 32; ++w) x = combine(x, of_warp[w], largest);
  return x;
}
// Every thread of the block calls these, and every thread gets the result.
__device__ float block_max(float x) { return over_block(x, true); }
__device__ float block_sum(float x) { return over_block(x, false); }
"""

# %% [markdown]
# The definition, word for word: a pass for the maximum, one for the sum, one to write. A row of only $-\infty$ becomes zeros.

# %%
SOFTMAX_THREE_PASSES = OVER_BLOCK + r"""
__global__ void softmax_three_passes(const float* x, float* y, int n_columns) {
  x += (size_t)blockIdx.x * n_columns;                   // this block's row
  y += (size_t)blockIdx.x * n_columns;
  float top = -INFINITY, total = 0.0f;
  for (int j = threadIdx.x; j < n_columns; j += THREADS) top = fmaxf(top, x[j]);
  top = block_max(top);
  if (top == -INFINITY) top = 0.0f;
  for (int j = threadIdx.x; j < n_columns; j += THREADS) total += expf(x[j] - top);
  total = block_sum(total);
  if (total == 0.0f) total = 1.0f;
  for (int j = threadIdx.x; j < n_columns; j += THREADS) y[j] = expf(x[j] - top) / total;
}
"""
from attention.fundamentals import softmax

rows_x = np.random.default_rng(4).standard_normal((3, 1000)).astype(np.float32)
rows_x[1], rows_x[2] = -np.inf, 1e4 * rows_x[2]  # the two rows that go wrong elsewhere
rows_y = np.full_like(rows_x, -1)
three_passes = cuda.compile(SOFTMAX_THREE_PASSES)
report = three_passes.check[3, 256](rows_x, rows_y, 1000)
print(f"problems {len(report.problems)}, largest difference to lecture 01 "
      f"{np.abs(rows_y - softmax(rows_x)).max():.5f}")
print(f"reads its row {report.global_loaded / rows_x.nbytes:.0f} times, "
      f"writes it {report.global_stored / rows_x.nbytes:.0f} time")

# %% [markdown] tags=["slide"]
# Sixteen bytes a number, where the floor is eight.
#
# #### Exercise 4G: read it once  (difficulty 3 of 5, useful, 20 minutes)
#
# A row of 12,000 floats fits into the shared memory of a block. Read each number from global memory once, and go over the copy as
# often as you like. The launch is `kernel[rows, 256, 4 * n_columns](x, y, n_columns)`.
#
# | argument | shape | meaning |
# |---|---|---|
# | `x` | `(rows, n_columns)` | any floats, also $-\infty$ |
# | `y` | `(rows, n_columns)` | the softmax of each row, written once; zeros for a row of only $-\infty$ |
# | `n_columns` | int | 1 to 12,000, not only multiples of 256 |
# | `row` | `n_columns` floats | the block's shared memory |
#
# The 256 threads take the columns in turn. Every thread of the block must call `block_max` and `block_sum`.
#
# Returns nothing; y is filled.
#
# <details><summary>Hint</summary>
#
# Three loops as above. What else can the first do, if `row[j] = x[j]`? What may the second leave in `row[j]`? Does a thread that
# always takes the same columns need a barrier of its own?
#
# </details>

# %% tags=["exercise", "export"] kind="kernel"
SOFTMAX_READ_ONCE = OVER_BLOCK + r"""
__global__ void softmax_read_once(const float* x, float* y, int n_columns) {
  extern __shared__ float row[];
  // BEGIN SOLUTION
  x += (size_t)blockIdx.x * n_columns, y += (size_t)blockIdx.x * n_columns;             // this block's row

  // load
  float maximum = -INFINITY, total = 0.0f;
  for (int j = threadIdx.x; j < n_columns; j += THREADS) {
    row[j] = x[j];
    maximum = fmaxf(maximum, row[j]);
  }
  maximum = block_max(maximum);
  if (maximum == -INFINITY) maximum = 0.0f;             // nothing to attend to: every exponential is exp(-inf) = 0

  // exponentials
  for (int j = threadIdx.x; j < n_columns; j += THREADS) {
    row[j] = expf(row[j] - maximum);
    total += row[j];
  }
  total = block_sum(total);
  if (total == 0.0f) total = 1.0f;

  // write
  for (int j = threadIdx.x; j < n_columns; j += THREADS) y[j] = row[j] / total;
  // END SOLUTION
}
"""

# %%
SOFTMAX_READ_ONCE = check("4G", SOFTMAX_READ_ONCE)

# %% [markdown]
# A row of 100,000 columns fits into no block. Then it must be read twice, not three times: one pass finds maximum and sum together,
# the sum relative to the largest number so far; a larger one shrinks it by $e^{\text{old} - \text{new}}$. (Lecture 06 makes
# FlashAttention of this; `SOFTMAX_ONLINE` stands in Behind the scenes.)
#
# *Predict.* How many bytes do the three kernels move, as a multiple of the floor?

# %% tags=["slide"]
from attention.long_context import SOFTMAX_ONLINE

softmaxes = {"three passes": (three_passes, 0),
             "read once": (cuda.compile(SOFTMAX_READ_ONCE), 4),
             "online": (cuda.compile(SOFTMAX_ONLINE), 0)}
times_floor = {}
for n_columns in (64, 1000, 4096, 100_000):
    line = []
    row_in = np.random.default_rng(4).standard_normal((2, n_columns)).astype(np.float32)
    for name, (kernel, shared) in softmaxes.items():
        if shared * n_columns > 48_000:
            line.append(f"{name}: too long")
            continue
        row_out = np.full_like(row_in, -1)
        report = kernel.check[2, 256, shared * n_columns](row_in, row_out, n_columns)
        assert report.ok and np.allclose(row_out, softmax(row_in), atol=1e-6)
        moved = report.global_loaded + report.global_stored
        times_floor[name] = moved / (2 * row_in.nbytes)
        line.append(f"{name}: {times_floor[name]:.2f}")
    print(f"{n_columns:7,} columns, times the floor:", "   ".join(line))
plotting.bars({name: 8 * factor for name, factor in times_floor.items()},
              ylabel="bytes moved for each number",
              title="The row that is kept is read once: the floor is reached")
plotting.show("Three bars of bytes for each number: 16 with three passes, 8 when the "
              "row is read once, 12 online.")

# %% [markdown]
# Two, one, and one and a half. At the floor nothing is left to win in bytes, except not to write the weights at all: that is
# lecture 06.

# %% [markdown]
# ### 4.9 In use
#
# **What do you call on Monday?**
#
# - `F.scaled_dot_product_attention`: never writes the scores where a fused kernel takes the call (lecture 06).
# - transformers: `rope_parameters` of a configuration, `{"rope_type": "yarn", "factor": 4.0, ...}`. It is **static**: the same at
#   length 10. Qwen advises to add it only where long texts are needed. You saw its price at gap 0.
# - vLLM: `--max-model-len` caps the context, and with it the cache; `--hf-overrides '{"rope_parameters": {...}}'` extends it.
# - Needles, tracking, counting at your own lengths: RULER's repository. At a length that you did not test, claim nothing.
#
# You meet this lecture as the wait for the first token, as a server that takes fewer users when they paste books, and as an
# assistant that forgets what was said an hour ago without an error message.

# %% tags=["language-model"]
if smollm:
    for way in ("NTK", "YaRN"):
        price = across[way][:, 0].mean() - across["RoPE"][:, 0].mean()
        print(f"{way} at gap 0: {price:+.2f} nats a digit")

# %% [markdown]
# ## What you can do now
#
# You can say what a prompt costs in operations and bytes, and which of the two it waits for. You can test a long context, and the
# test. You can measure how much of a claimed context a real model uses, and what repairs it without training.

# %% tags=["slide"]
figure, ax = plt.subplots(figsize=(8, 4))
at = np.arange(len(published))
ax.barh(at - 0.2, table[:, 0], 0.4, color="#BBBBBB", label="claimed")
ax.barh(at + 0.2, kept, 0.4, color="#0072B2", label="effective (RULER, tested to 128K)")
ax.set(xscale="log", xlabel="thousand tokens", xlim=(4, 2000),
       title="Claimed is what was trained, effective is what was measured")
ax.set_yticks(at, list(published))
ax.invert_yaxis()
ax.legend(loc="lower right")
plotting.show("Two bars for each of six models, logarithmic: the claimed lengths are "
              "two to more than sixty times the effective ones.")

# %% [markdown]
# ## Exercises left
#
# 1. Train a reader with three layers on documents of two hops (`train_reader` has to pass them on). Does it follow a third?
# 2. Train a stack of `SegmentAttention` so that the loss of the fourth segment reaches facts of the first. Does use catch up?
# 3. Put rivals into the prompt of 4.5: five other keys, "The pass key of Anna is ...". Where is the effective length then?
# 4. Add a model of your choice to `data/long_context_models.json`. From which length on does its cache outweigh its weights?

# %% [markdown]
# ## Quiz

# %% [markdown] tags=["quiz"]
# **1.** A prompt grows from 2,000 to 8,000 tokens. By which factor grows one head's score matrix?
#
# - a) 4
# - b) 16
# - c) 8
# - d) 2, with a cache

# %% tags=["quiz"]
from utils import quiz

quiz.answer({"a": 4, "b": 16, "c": 8, "d": "2, with a cache"}, 8000**2 / 2000**2,
            "Queries and keys both grow by four.")

# %% [markdown] tags=["quiz"]
# **2.** A model scores 96, 84, 90 at 4K, 8K, 16K, and the threshold is 85.6. What is its effective length here?
#
# - a) 16K, the longest that passes
# - b) 8K
# - c) 0
# - d) 4K

# %% tags=["quiz"]
rule = effective_length(np.array([4, 8, 16]), np.array([[96.0, 84.0, 90.0]]), 85.6)
quiz.answer({"a": "16K, the longest that passes", "b": "8K", "c": "0", "d": "4K"},
            f"{int(rule[0])}K", "After the first failure nothing counts.")

# %% [markdown] tags=["quiz"]
# **3.** All positions of a model with RoPE, prompt and question, grow by 7,000. By how much do its scores change?
#
# - a) 0
# - b) 7,000 times the slope
# - c) they vanish
# - d) 0.5

# %% tags=["quiz"]
from attention.rotary import apply_rope_numpy, rope_frequencies

one, two = np.random.default_rng(0).standard_normal((2, 1, 8))
turned = [[apply_rope_numpy(row, np.array([place + moved_by]), rope_frequencies(8)[0])
           for row, place in ((one, 40), (two, 3))] for moved_by in (0, 7000)]
change = [float((a @ b.T)[0, 0]) for a, b in turned]
quiz.answer({"a": 0, "b": "7,000 times the slope", "c": "they vanish", "d": 0.5},
            round(change[1] - change[0], 6), "Only differences of positions count.")

# %% [markdown] tags=["quiz"]
# **4.** Three layers, segments of 8, a memory of 8. From how far back can the last output of a segment change?
#
# - a) 8
# - b) 15
# - c) 31
# - d) from anywhere, through the memories of memories

# %% tags=["quiz"]
quiz.answer({"a": 8, "b": 15, "c": 31,
             "d": "from anywhere, through the memories of memories"},
            (3 + 1) * 8 - 1, "Each layer adds one segment, and the first sees its own.")

# %% [markdown] tags=["quiz"]
# **5.** How often does a softmax kernel read its row, if it keeps the row in shared memory?
#
# - a) three times
# - b) once
# - c) twice
# - d) never: it is in the cache

# %% tags=["quiz"]
row_out = np.full_like(rows_x, -1)
loads = softmaxes["read once"][0].check[3, 256, 4000](rows_x, row_out, 1000)
count = round(loads.global_loaded / rows_x.nbytes)
quiz.answer({"a": "three times", "b": "once", "c": "twice",
             "d": "never: it is in the cache"}, {1: "once"}.get(count, count),
            "Maximum, sum and quotient are taken from the copy.")

# %% [markdown]
# ## Going further
#
# Short sections, each alone, in any order.

# %% [markdown]
# ### 4.10 A product of tiles
#
# **When does a kernel wait for arithmetic?** When each number that it fetches is used often. The product of an $(m, k)$ and a
# $(k, n)$ matrix does $2mnk$ operations. In the simplest kernel each thread computes one number of C and reads $2k$ floats for it:
# 0.25 FLOP per byte, less than the softmax. The *problem* lies right of the ridge (67 TFLOP/s in float32 over 3.35 TB/s: 20), this
# *kernel* left of it. As in lecture 01, tiles in shared memory let a number serve 16 threads.
#
# #### Exercise 4H: a product of tiles  (difficulty 4 of 5, extra, 30 minutes)
#
# Each block computes a 16 × 16 tile of C. It walks along $k$ in steps of 16: load a tile of A and a tile of B,
# multiply them, go on. The launch is `kernel[(tiles of n, tiles of m), (16, 16)](a, b, c, m, n, k)`.
#
# | argument | shape | meaning |
# |---|---|---|
# | `a`, `b` | `(m, k)`, `(k, n)` | row after row; `m`, `n`, `k` at least 1, of any size |
# | `c` | `(m, n)` | the product, written once |
# | `a_tile`, `b_tile` | 16 × 16 floats | the block's shared memory |
#
# What lies outside A or B counts as 0 and must not be read; what lies outside C must not be written. In a load,
# threads whose `threadIdx.x` are neighbours read neighbouring addresses. Two barriers in each round are enough.
#
# Returns nothing; c is filled.
#
# <details><summary>Hint</summary>
#
# Which row and column of C does thread $(x, y)$ of a block compute, and which number of A and of B does it load in the round that
# begins at `first`? What must everybody have done before the sums, and what before the next load? What do threads outside C do?
#
# </details>

# %% tags=["exercise", "export"] kind="kernel"
MATMUL_TILED = r"""
#define TILE 16
__global__ void matmul_tiled(const float* a, const float* b, float* c, int m, int n, int k) {
  __shared__ float a_tile[TILE][TILE], b_tile[TILE][TILE];
  int x = threadIdx.x, y = threadIdx.y;
  // BEGIN SOLUTION
  int row = blockIdx.y * TILE + y, column = blockIdx.x * TILE + x;
  float sum = 0.0f;
  for (int first = 0; first < k; first += TILE) {
    // load
    a_tile[y][x] = row < m && first + x < k ? a[(size_t)row * k + first + x] : 0.0f;
    b_tile[y][x] = first + y < k && column < n ? b[(size_t)(first + y) * n + column] : 0.0f;
    __syncthreads();                                    // both tiles have arrived

    // accumulate
    for (int t = 0; t < TILE; ++t) sum += a_tile[y][t] * b_tile[t][x];
    __syncthreads();                                    // both tiles have been used
  }

  // write
  if (row < m && column < n) c[(size_t)row * n + column] = sum;
  // END SOLUTION
}
"""

# %%
MATMUL_TILED = check("4H", MATMUL_TILED)

# %% [markdown]
# Each number of A is now read once for each *tile* of columns, $4(mk\lceil n/T\rceil + kn\lceil m/T\rceil)$ bytes, about $T$ times
# fewer. Larger tiles need more than one number of C for each thread: `MATMUL_REGISTERS` (Behind the scenes) computes 4 × 4 a
# thread, a tile of 64 × 64.
#
# *Predict.* Three kernels on one product of 256. By which factor does each read less than the one before?

# %%
from attention.long_context import MATMUL_REGISTERS

MATMUL_NAIVE = r"""
__global__ void matmul_naive(const float* a, const float* b, float* c, int m, int n, int k) {
  int i = blockIdx.y * blockDim.y + threadIdx.y;
  int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= m || j >= n) return;
  float sum = 0.0f;
  for (int t = 0; t < k; ++t) sum += a[(size_t)i * k + t] * b[(size_t)t * n + j];
  c[(size_t)i * n + j] = sum;
}
"""
product_rng, side = np.random.default_rng(4), 256
a_, b_ = product_rng.standard_normal((2, side, side)).astype(np.float32)
c_ = np.full((side, side), -1, np.float32)
registers = cuda.compile(MATMUL_REGISTERS)
ladder = {"naive": (cuda.compile(MATMUL_NAIVE), (16, 16)),
          "tiles of 16": (cuda.compile(MATMUL_TILED), (16, 16)),
          "4 x 4 a thread": (registers, (1, 4, 4))}
rungs = {}
for name, (kernel, grid) in ladder.items():
    report = kernel.check[grid, (16, 16)](a_, b_, c_, side, side, side)
    moved = report.global_loaded + report.global_stored
    turns = sum(row.wavefronts for row in report.rows if row.space == "shared")
    rungs[name] = moved, turns, 2 * side**3
    gap_to = np.abs(c_ - a_ @ b_).max()
    print(f"{name:15s} {moved / (3 * a_.nbytes):6.1f} times the floor, "
          f"{2 * side**3 / moved:5.2f} FLOP a byte; agrees: {gap_to < 1e-3}")

# %%
plotting.ladder(rungs, bandwidth=3.35e12, turns_per_second=132 * 1.83e9, peak=67e12,
                title="Fewer bytes first; then shared memory is the wall")
plotting.show("Three bars for each of three products on an H100, logarithmic: naive "
              "waits for memory, tiles of 16 for shared memory, 4 by 4 a thread least "
              "of all.")

# %% [markdown]
# By sixteen, then by four (what is written stays). The bars are lower limits from counts, each byte taken from memory, with 132
# multiprocessors at 1.83 GHz: nothing was timed. Real libraries go on: 8 × 8 numbers a thread, tensor cores, loads that run ahead.

# %% [markdown]
# ### 4.11 Naive attention is three kernels in a row
#
# **How many bytes do `matmul`, `softmax_rows`, `matmul` move for one head?** The floors of the three add up to
# $4(2nd + n^2) + 8n^2 + 4(n^2 + 2nd) = 16n^2 + 16nd$ bytes in float32.

# %%
def three_kernels(q, k, v):
    """Attention by three kernels; distinct bytes of each, as with a perfect cache."""
    n, d = q.shape
    s, w, out = np.zeros((n, n), "f"), np.zeros((n, n), "f"), np.zeros((n, d), "f")
    tiles, wide = -(-n // 64), -(-d // 64)
    softmax_once = softmaxes["read once"][0]
    done = [registers.check[(1, tiles, tiles), (16, 16)](
                q / np.float32(d**0.5), k.T.copy(), s, n, n, d),
            softmax_once.check[n, 256, 4 * n](s, w, n),
            registers.check[(1, tiles, wide), (16, 16)](w, v, out, n, d, n)]
    return out, [each.distinct_loaded + each.distinct_stored for each in done]

for rows_n in (64, 128, 256):
    head = np.random.default_rng(1).standard_normal((3, rows_n, 64)).astype(np.float32)
    result, distinct = three_kernels(*head)
    difference = np.abs(result - attention_numpy(*head)).max()
    print(f"n = {rows_n:3d}: {sum(distinct):9,} bytes, formula "
          f"{16 * rows_n**2 + 16 * rows_n * 64:9,}, difference {difference:.5f}")

# %% [markdown]
# Measured and formula are equal. In bfloat16 that is $8n^2 + 8nd$ bytes for $4n^2d$ operations, so at most $d/2$ FLOP per byte: the
# fifth of the roof in 4.2, at any length.

# %% [markdown]
# ### 4.12 The relative shift of Transformer-XL
#
# **How does it tell positions, when each segment begins at 0?** By distances: the score of query $i$ and key $j$ is
# $(q_i + u) \cdot k_j + (q_i + w) \cdot r_{i-j}$, one vector $r$ for each distance. The second part is computed for all distances at
# once, a column for each; then every row has to be pushed into place. The paper's trick has no loop: a column of zeros on the left,
# all numbers as one long line, the first few left out, cut again.

# %%
from attention.long_context import relative_attention_numpy, relative_shift

by_distance = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])  # distances 2, 1, 0
print("by distance:", by_distance.tolist())
print("by key:     ", relative_shift(by_distance).tolist())
xl = np.random.default_rng(1)
xl_q, (xl_k, xl_v, xl_r) = xl.standard_normal((5, 8)), xl.standard_normal((3, 9, 8))
zero = np.zeros(8)
plain = relative_attention_numpy(xl_q, xl_k, xl_v, 0 * xl_r, zero, zero)
print("without distances it is causal attention, largest difference "
      f"{np.abs(plain - attention_numpy(xl_q, xl_k, xl_v, causal=True)).max():.6f}")

# %% [markdown]
# ### 4.13 Chain of thought: what written steps buy
#
# **Claim.** A transformer of fixed depth does a fixed number of serial steps. Tokens that it writes and reads again add steps: with a
# linear number of them it recognises every regular language; without, under standard conjectures, it cannot (Merrill and Sabharwal
# 2023, arXiv 2310.07923; for arithmetic Feng et al. 2023, 2305.15408).
#
# The readers of 4.3 have two layers and learned to follow a name once. *Predict.* A value handed on two, three, four times?

# %%
from attention.experiments.long_context import found_by_hops

depth_found = {kind: np.array([found_by_hops(model) for model in three])
               for kind, three in readers.items()}
plotting.curves(depth_found, x=np.arange(5), xlabel="times the value was handed on",
                ylabel="found (3 seeds)", threshold=1 / 4,
                threshold_name="chance among four values",
                title="Two layers follow one step, and fail from the second on")
plotting.show("Accuracy against the number of hops for three readers: near one for "
              "none and one, at or below the chance of one in four from two on.")

# %% [markdown]
# A guess. There is no layer left to look further. Now the classic: the **parity** of a row of bits. Two models read bits and say the
# parity after each; between the bits stands a blank token, or *the parity that the model itself wrote*: a **scratchpad**.
#
# *Predict.* Trained on 16 bits; up to which number is each right?

# %%
from attention.experiments.long_context import parity_accuracy, recorded_thinkers

thinkers = {name: recorded_thinkers(name) for name in ("scratchpad", "blank tokens")}
parities = {name: np.array([parity_accuracy(model, 32, name == "scratchpad")
                            for model in three]) for name, three in thinkers.items()}
plotting.curves(parities, x=np.arange(1, 33), xlabel="bits so far (trained up to 16)",
                ylabel="accuracy (3 seeds)", threshold=0.5, threshold_name="chance",
                title="One step at a time parity is easy; at once it is not learned")
plotting.show("Accuracy against the number of bits: with a scratchpad near one, with "
              "blank tokens at chance after a few bits.")
for name, rows in parities.items():
    print(f"{name:13s} bits 1 to 16: {rows[:, :16].mean():.2f}, "
          f"17 to 32: {rows[:, 16:].mean():.2f}")

# %% [markdown]
# The scratchpad turns one question about all bits into many about two tokens. (Parity is not impossible for a fixed depth: counting
# can be done by one uniform attention. It is hard to *learn*.) Each written step is paid for in length.

# %% [markdown]
# ### 4.14 Four ways in which attention fails
#
# 1. **Blow-up**: section 4.1.
# 2. **Positions never seen**: section 4.5.
# 3. **Sinks**: a softmax cannot say "nothing"; trained models park the weight on the first tokens (Xiao et al. 2023, arXiv
#    2309.17453; lecture 05).
# 4. **Dilution**: against $n - 1$ keys of score 0 a margin $m$ gives the needle $e^m / (e^m + n - 1)$.
#
# *Predict.* A margin of 6 is enough at 32. And at 131,072?

# %%
print("       n   weight at margin 6   margin for weight 0.9   slope of a uniform row")
for crowd in (32, 1024, 131_072):
    weight = np.exp(6) / (np.exp(6) + crowd - 1)
    print(f"{crowd:8,d} {weight:20.3f} {np.log(9 * (crowd - 1)):23.1f} "
          f"{(1 - 1 / crowd) / crowd:24.1e}")

from attention.experiments.long_context import needle_weight

sizes_w = (32, 128, 512)
diluted = np.array([[needle_weight(model, size) for size in sizes_w]
                    for model in readers["no positions"]]).mean(0)
print("readers without positions, weight on the needle:",
      "  ".join(f"{size}: {weight:.2f}" for size, weight in zip(sizes_w, diluted)))

# %% [markdown]
# The margin has to grow with $\ln n$. Our readers learned more than 32 needed, and lose little up to 512. A sentence in glossaries
# says that *uniform attention destabilises training*. The last column is its largest slope $\partial w/\partial s$, about $1/n$:
# uniform attention has small gradients, not wild ones. What was reported is the opposite, **entropy collapse**: rows that become too
# sharp (Zhai et al. 2023, arXiv 2303.06296).

# %% [markdown]
# ### 4.15 A table of variants: complexity, measured
#
# **Which variant grows how?** Five variants at four lengths; each matrix product is counted, the peak of the memory taken, exponents
# fitted.

# %%
import tracemalloc

work = {"flops": 0}

def product(a, b):
    work["flops"] += 2 * a.size * b.shape[-1]
    return a @ b

def rows_of(q, k, v):  # softmax attention, in as few matrices as NumPy allows
    s = product(q, k.T)
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    return product(s, v) / s.sum(axis=-1, keepdims=True)

def in_blocks(q, k, v, size=64, window=None):
    out = np.empty_like(v)
    for i in range(0, len(q), size):
        first = 0 if window is None else max(0, i - window)
        last = len(k) if window is None else i + size
        out[i:i + size] = rows_of(q[i:i + size], k[first:last], v[first:last])
    return out

def linear(q, k, v):
    q, k = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k))
    return product(q, product(k.T, v)) / product(q, k.sum(axis=0)[:, None])

# %%
variants = {"full": rows_of, "full, 64 queries at a time": in_blocks,
            "window of 128, in blocks": lambda q, k, v: in_blocks(q, k, v, window=128),
            "linear (elu + 1)": linear,
            "decode: one query, cached": lambda q, k, v: rows_of(q[:1], k, v)}
spans_v = 2 ** np.arange(9, 13)
for name, variant in variants.items():
    flops_of, peaks_of = [], []
    for span in spans_v:
        qkv_v = np.random.default_rng(0).standard_normal((3, span, 32), np.float32)
        work["flops"] = 0
        tracemalloc.start()
        variant(*qkv_v)
        peaks_of.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        flops_of.append(work["flops"])
    fits = [np.polyfit(np.log(spans_v), np.log(y), 1)[0] for y in (flops_of, peaks_of)]
    print(f"{name:28s} FLOPs ~ n^{fits[0]:.1f}, peak bytes ~ n^{fits[1]:.1f}")

# %% [markdown]
# (An exponent a little below 1 is a 1 with a constant beside it.) *Full, in blocks* whenever it can be afforded: it is exact. A *window* where
# neighbours matter and a few full layers carry the rest. *Linear* where the length is unbounded and exact recall is not the task.
# Grouped and latent heads change the constants of the last row, not its exponent.

# %% [markdown]
# ### 4.16 A recipe for a long-context model
#
# 1. Say which *task* needs the length, and write its test first: needles with rivals at all depths, tracking, counting, loss by
#    position. Test the test (4B).
# 2. Compute the cost at that length: share of attention, bytes of the cache, tokens a second (4.7). Then choose heads and layers.
# 3. Train short for most of the budget; full attention is cheap there (4.1).
# 4. Raise the base or rescale the rotations, and go on training on *long documents whose ends need their beginnings* (4.5).
# 5. Measure the effective length, not the claimed one (4.4), with its threshold, at every step of the extension.
# 6. Exact kernels first (lecture 06). Approximate attention only where step 2 says that exact is too dear.
#
# **To read.** T. B. Lee, Ars Technica, 20 December 2024, "Why AI language models choke on too much text": which of its costs are
# operations, which bytes, and which of the lengths that it lists are claimed? B. Brubaker, Quanta Magazine, 21 March 2024, "How
# Chain-of-Thought Reasoning Helps Neural Networks Compute".

# %%
budget = [attention_share(np.array([n_half]), 8_030_261_248, 32, 4096)[0]
          for n_half in (2048, 65536)]  # mean number of tokens seen, at 4k and 128k
print(f"step 3, an 8B model: attention is {budget[0]:.0%} of training at 4k, "
      f"{budget[1]:.0%} at 128k")

# %% [markdown]
# ## Behind the scenes
#
# **Measures, and the two memories of Transformer-XL.**

# %%
import functools
import time

from attention.multi_head import Positions, TransformerConfig, TransformerLM
from attention.rotary import ALiBi, Rotary, apply_rope_torch, rope_frequencies
from torch.nn import functional as F
from utils.data import EXCERPTS

# %% tags=["export", "plumbing"]
def loss_by_position(losses, edges):
    """Mean loss in each bucket of positions: (n_buckets,) floats, nan for a bucket without any loss.

    losses (batch, seq_len), nan where there was nothing to predict; edges integers (n_buckets + 1,), bucket i holds the
    positions edges[i] to edges[i + 1] - 1.
    """
    means = np.full(len(edges) - 1, np.nan)
    for i, (first, end) in enumerate(zip(edges[:-1], edges[1:])):
        bucket = losses[:, first:end]
        known = bucket[~np.isnan(bucket)]
        if known.size:
            means[i] = known.mean()
    return means

# %% tags=["export", "plumbing"]
class SegmentMemory:
    """The keys and values of the last `size` tokens, for one layer: a cache as TransformerLM wants it.

    For reading: keys and values are cut from the graph, so no weight learns through the memory.
    Source: the segment recurrence of Dai et al. 2019 (arXiv 1901.02860), section 3.2.
    """

    def __init__(self, size):
        self.size, self.length, self.kept = size, 0, None

    def update(self, k, v):
        """Take k, v (batch, n_heads, segment, d_head) of a new segment; returns them behind the remembered ones."""
        self.length += k.shape[-2]
        if self.kept is not None:
            k, v = (torch.cat(pair, dim=-2) for pair in zip(self.kept, (k, v)))
        start = max(k.shape[-2] - self.size, 0)
        self.kept = k[..., start:, :].detach(), v[..., start:, :].detach()
        return k, v

def read_in_segments(model, ids, segment, memory):
    """Logits of a TransformerLM that reads ids (batch, seq) segment by segment, with `memory` tokens remembered."""
    caches = [SegmentMemory(memory) for _ in model.blocks]
    return torch.cat([model(part, caches=caches) for part in ids.split(segment, dim=1)], dim=1)

# %% tags=["export", "plumbing"]
def relative_shift(by_distance):
    """Scores by distance (..., n_queries, n_keys) turned into scores by key, of the same shape; 0 in the future.

    Column c of by_distance is the distance n_keys - 1 - c; the last query stands at the last key.
    Raises ValueError when there are more queries than keys. Source: Dai et al. 2019 (arXiv 1901.02860), appendix B.
    """
    n_queries, n_keys = by_distance.shape[-2:]
    if n_queries > n_keys:
        raise ValueError(f"by_distance must have at most as many queries as keys, got {n_queries} and {n_keys}")
    lead = by_distance.shape[:-2]
    padded = np.concatenate([np.zeros_like(by_distance[..., :1]), by_distance], axis=-1)
    line = padded.reshape(*lead, n_queries * (n_keys + 1))[..., n_queries:]
    return np.tril(line.reshape(*lead, n_queries, n_keys), k=n_keys - n_queries)

def relative_attention_numpy(q, k, v, r, u, w):
    """Causal attention with relative positions: scores ((q_i + u) k_j + (q_i + w) r_{i-j}) / sqrt(d_head), in NumPy.

    q (..., n_queries, d_head), k and v (..., n_keys, d_head); r (n_keys, d_head), row c for the distance
    n_keys - 1 - c; u, w (d_head,). Returns (..., n_queries, d_head).
    Source: Dai et al. 2019 (arXiv 1901.02860), section 3.3.
    """
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    scores = (q + u) @ np.swapaxes(k, -1, -2) + relative_shift((q + w) @ r.T)
    scores = np.where(np.tri(n_queries, n_keys, n_keys - n_queries, dtype=bool), scores / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return cuda.weighted_sum(weights / weights.sum(axis=-1, keepdims=True), v)

# %% tags=["export", "plumbing"]
def prompt_cost(model, seq_len, n_bytes=2):
    """What a prompt costs a model: (FLOPs of the prefill, bytes of the cache, bytes that the next token reads).

    model: an entry of data/long_context_models.json; seq_len int, the tokens of the prompt. The next token reads all
    active weights once, and the cache; one sequence, n_bytes for each number.
    """
    def pairs(window):                                        # of queries and keys, causal
        width = min(seq_len, window)
        return width * (width + 1) / 2 + (seq_len - width) * width

    attended = model["full"] * pairs(seq_len) + model["windowed"] * pairs(model["window"] or 0)
    prefill = 2 * model["active"] * seq_len + 4 * model["d_attention"] * attended
    if "latent" in model:                                     # one vector stands for key and value
        cache = model["latent"] * n_bytes * model["full"] * seq_len
    else:
        cache = int(kv_cache_bytes(np.array([seq_len]), model["n_kv_heads"], model["d_head"], model["full"],
                                   model["windowed"], model["window"] or 0, n_bytes)[0])
    return prefill, cache, model["active"] * n_bytes + cache

# %% [markdown]
# **The triples** `softmax_rows` and `matmul`, and their kernels.

# %% tags=["export", "plumbing"]
SOFTMAX_ONLINE = OVER_BLOCK + r"""
__global__ void softmax_online(const float* x, float* y, int n_columns) {
  x += (size_t)blockIdx.x * n_columns, y += (size_t)blockIdx.x * n_columns;             // this block's row

  // maximum and sum, together
  float maximum = -INFINITY, total = 0.0f;
  for (int j = threadIdx.x; j < n_columns; j += THREADS) {
    float s = x[j];
    if (s > maximum) {
      total = total * expf(maximum - s) + 1.0f;         // rescale what was summed so far
      maximum = s;
    } else if (s != -INFINITY) total += expf(s - maximum);
  }
  float top = block_max(maximum);
  if (top == -INFINITY) top = 0.0f;
  total = block_sum(total * expf(maximum - top));       // each thread's sum, measured against the same maximum
  if (total == 0.0f) total = 1.0f;

  // write
  for (int j = threadIdx.x; j < n_columns; j += THREADS) y[j] = expf(x[j] - top) / total;
}
"""

# %% tags=["export", "plumbing"]
MATMUL_REGISTERS = r"""
#define BLOCK 64                                        // a block computes BLOCK x BLOCK numbers of C
#define DEPTH 16                                        // columns of A, and rows of B, in a tile
#define EACH 4                                          // a thread computes EACH x EACH numbers of C
#define ROW(i) (y + 16 * (i))
#define COLUMN(j) (x + 16 * (j))
__global__ void matmul_registers(const float* a, const float* b, float* c, int m, int n, int k) {
  __shared__ float a_tile[BLOCK][DEPTH], b_tile[DEPTH][BLOCK];
  int x = threadIdx.x, y = threadIdx.y, thread = y * 16 + x;
  int top = blockIdx.y * BLOCK, left = blockIdx.z * BLOCK;                  // blockIdx.x: which pair of matrices
  a += (size_t)blockIdx.x * m * k, b += (size_t)blockIdx.x * k * n, c += (size_t)blockIdx.x * m * n;
  float sum[EACH][EACH] = {};
  for (int first = 0; first < k; first += DEPTH) {
    // load
    for (int e = thread; e < BLOCK * DEPTH; e += 256) {
      int r = e / DEPTH, t = e % DEPTH;
      a_tile[r][t] = top + r < m && first + t < k ? a[(size_t)(top + r) * k + first + t] : 0.0f;
    }
    for (int e = thread; e < DEPTH * BLOCK; e += 256) {
      int t = e / BLOCK, s = e % BLOCK;
      b_tile[t][s] = first + t < k && left + s < n ? b[(size_t)(first + t) * n + left + s] : 0.0f;
    }
    __syncthreads();                                    // both tiles have arrived

    // accumulate, from registers
    for (int t = 0; t < DEPTH; ++t) {
      float a_part[EACH], b_part[EACH];
      for (int i = 0; i < EACH; ++i) a_part[i] = a_tile[ROW(i)][t], b_part[i] = b_tile[t][COLUMN(i)];
      for (int i = 0; i < EACH; ++i)
        for (int j = 0; j < EACH; ++j) sum[i][j] += a_part[i] * b_part[j];
    }
    __syncthreads();                                    // both tiles have been used
  }

  // write
  for (int i = 0; i < EACH; ++i)
    for (int j = 0; j < EACH; ++j)
      if (top + ROW(i) < m && left + COLUMN(j) < n) c[(size_t)(top + ROW(i)) * n + left + COLUMN(j)] = sum[i][j];
}
"""

# %% tags=["export", "plumbing"]
LONGEST_KEPT = 12_000              # columns: 48 KB of shared memory, less what block_max needs

def check_rows(x):
    """Raise ValueError, in one sentence, unless x holds rows of real numbers. For arrays and tensors."""
    cuda.check_numbers(x=x)
    if not np.ndim(x):
        raise ValueError("x must have at least one axis (n_columns), got a single number")

def widened(x):
    """An array or tensor in at least single precision: half precision is too coarse to add up in."""
    return x.to(cuda.work_type(x)) if isinstance(x, torch.Tensor) else x.astype(cuda.work_type(x))

# %% tags=["export", "plumbing"]
def softmax_rows_numpy(x):
    """Softmax along the last axis. x (..., n_columns), real; -inf gives weight 0, a row of only -inf gives zeros.

    Returns an array of x's shape and float type (float64 for integers); half precision is computed in single.
    Raises ValueError if x has no axis or holds anything but real numbers.
    """
    check_rows(x)
    cuda.check_kind(np.ndarray, x=x)
    return cuda.like(softmax(widened(x)), x)

def softmax_rows_torch(x):
    """softmax_rows_numpy for a tensor, differentiable; the gradient of a row of only -inf is 0."""
    check_rows(x)
    cuda.check_kind(torch.Tensor, x=x)
    if not x.numel():
        return cuda.like(x.clone(), x)
    wide = widened(x)
    maximum = wide.detach().amax(-1, keepdim=True)
    exponentials = torch.exp(wide - torch.where(maximum == -math.inf, 0.0, maximum))
    total = exponentials.sum(-1, keepdim=True)
    return cuda.like(exponentials / torch.where(total == 0, 1.0, total), x)

# %% tags=["export", "plumbing"]
@functools.cache
def softmax_kernel(kept):
    """The kernel that keeps a row in shared memory, or the one for rows of any length; compiled on first use."""
    return cuda.compile(SOFTMAX_READ_ONCE) if kept else cuda.compile(SOFTMAX_ONLINE)

def softmax_rows_cuda(x):
    """softmax_rows_numpy by a CUDA kernel. NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU.

    Computed in single precision, returned in the kind and type of x. Not differentiable.
    """
    check_rows(x)
    [rows] = cuda.on_device(x)
    out = torch.zeros_like(rows)
    if out.numel():
        n_columns = rows.shape[-1]
        kept = n_columns <= LONGEST_KEPT
        shared = 4 * n_columns if kept else 0
        softmax_kernel(kept).fast[rows.numel() // n_columns, 256, shared](rows, out, n_columns)
    return cuda.like(out, x)

# %% tags=["export", "plumbing"]
def check_matrices(a, b):
    """Raise ValueError, in one sentence, unless a and b are real and can be multiplied. For arrays and tensors."""
    cuda.check_numbers(a=a, b=b)
    for name, shape in (("a", np.shape(a)), ("b", np.shape(b))):
        if len(shape) < 2:
            raise ValueError(f"{name} must have at least two axes (rows, columns), got shape {tuple(shape)}")
    (*lead_a, _, k_a), (*lead_b, k_b, _) = np.shape(a), np.shape(b)
    if k_a != k_b:
        raise ValueError(f"a must have as many columns as b has rows, got {k_a} and {k_b}")
    try:
        np.broadcast_shapes(tuple(lead_a), tuple(lead_b))
    except ValueError:
        leading = f"{tuple(lead_a)} and {tuple(lead_b)}"
        raise ValueError(f"the leading axes of a and b must broadcast, got {leading}") from None

# %% tags=["export", "plumbing"]
def matmul_numpy(a, b):
    """Matrix product. a (..., m, k), b (..., k, n), real, leading axes broadcast. Returns (..., m, n) in a's type.

    Half precision is added up in single precision; k = 0 gives zeros; integers give float64. Raises ValueError for
    shapes that do not fit and for anything but real numbers.
    """
    check_matrices(a, b)
    cuda.check_kind(np.ndarray, a=a, b=b)
    return cuda.like(np.matmul(widened(a), widened(b)), a)

def matmul_torch(a, b):
    """matmul_numpy for tensors, differentiable."""
    check_matrices(a, b)
    cuda.check_kind(torch.Tensor, a=a, b=b)
    wide_a, wide_b = widened(a), widened(b)
    dtype = torch.promote_types(wide_a.dtype, wide_b.dtype)
    return cuda.like(wide_a.to(dtype) @ wide_b.to(dtype), a)

@functools.cache
def matmul_kernel():
    """The kernel with register tiles, compiled on first use."""
    return cuda.compile(MATMUL_REGISTERS)

def matmul_cuda(a, b):
    """matmul_numpy by a CUDA kernel. NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU.

    Computed in single precision, returned in the kind and type of a. Not differentiable. m and n up to 4 million.
    """
    check_matrices(a, b)
    left, right = cuda.on_device(a, b)
    lead = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    m, k, n = left.shape[-2], left.shape[-1], right.shape[-1]
    left, right = (t.expand(*lead, *t.shape[-2:]).contiguous() for t in (left, right))
    out = torch.zeros(*lead, m, n, device=left.device)
    if out.numel() and k:
        matmul_kernel().fast[(math.prod(lead), -(-m // 64), -(-n // 64)), (16, 16)](left, right, out, m, n, k)
    return cuda.like(out, a)

# %%
worst = 0.0
for shape_a, shape_b in (((1, 7), (7, 1)), ((3, 1, 65, 33), (2, 33, 70)),
                         ((5, 0), (0, 4)), ((2, 130, 20), (20, 3))):
    odd_a, odd_b = map(product_rng.standard_normal, (shape_a, shape_b))
    by_kernel, by_numpy = matmul_cuda(odd_a, odd_b), matmul_numpy(odd_a, odd_b)
    worst = max(worst, np.abs(by_kernel - by_numpy).max())
for shape in ((1, 1), (4, 12_001), (2, 3, 257)):
    odd_x = product_rng.standard_normal(shape)
    by_kernel, by_numpy = softmax_rows_cuda(odd_x), softmax_rows_numpy(odd_x)
    worst = max(worst, np.abs(by_kernel - by_numpy).max())
print(f"seven odd shapes, largest difference of the triples {worst:.3f}")

# %% [markdown]
# **The statements of 4.3**, their readers, and what asks them.

# %% tags=["export", "plumbing"]
N_NAMES, VALUES, WORDS, ASK, MOST, N_SYMBOLS, NO_ANSWER = 32, 32, 64, 96, 97, 98, -100

def statement(name, content):
    """The id of a statement: names, contents and ids are integers of one shape. Names are symbols 0 to 31, values 32 to
    63, words 64 to 95; ASK and MOST make questions."""
    return name * N_SYMBOLS + content

def documents(rng, batch, seq_len, chains=6, hops=1, share=0.3):
    """Documents of statements, followed by questions about all of them. rng: a numpy Generator.

    chains variables get a value; each is handed on `hops` times to another name, always in this order in the text. The
    other statements are hay: random words, of which one has the share `share`.
    Returns (ids, answers, order). ids and answers: (batch, seq_len + chains * (hops + 1) + 1) int64, the statements,
    then a question for each name in random order, then one for the most common word; answers holds the symbol that the
    name stands for, after a statement and after a question, and NO_ANSWER after hay. order, integers
    (batch, chains * (hops + 1)): order // (hops + 1) is the chain of a question, order % (hops + 1) how often its value
    was handed on.
    ValueError when the names or the places do not suffice.
    """
    n = chains * (hops + 1)
    if n > min(N_NAMES, seq_len):
        raise ValueError(f"chains * (hops + 1) must be at most {min(N_NAMES, seq_len)}, got {n}")
    names = rng.permuted(np.tile(np.arange(N_NAMES), (batch, 1)), axis=1)[:, :n].reshape(batch, chains, hops + 1)
    values = VALUES + rng.integers(32, size=(batch, chains, 1))
    common = WORDS + rng.integers(32, size=(batch, 1))
    text = WORDS + rng.integers(32, size=(batch, seq_len, 2))
    text = np.where(rng.random(text.shape) < share, common[:, :, None], text)
    places = np.sort(rng.random((batch, seq_len)).argsort(axis=1)[:, :n].reshape(names.shape), axis=2)
    rows = np.arange(batch)[:, None, None]
    text[rows, places] = np.stack([names, np.concatenate([values, names[:, :, :-1]], axis=2)], axis=-1)
    worth = np.broadcast_to(values, names.shape)
    said = np.full((batch, seq_len), NO_ANSWER)
    said[rows, places] = worth
    order = rng.permuted(np.tile(np.arange(n), (batch, 1)), axis=1)
    asked, replies = (np.take_along_axis(a.reshape(batch, n), order, axis=1) for a in (statement(names, ASK), worth))
    most = np.full((batch, 1), statement(MOST, MOST))
    ids = np.concatenate([statement(text[..., 0], text[..., 1]), asked, most], axis=1)
    return ids, np.concatenate([said, replies, common], axis=1), order

# %% tags=["export", "plumbing"]
class Statements(nn.Module):
    """Embeds statements: ids (batch, seq) -> (batch, seq, d_model), a vector for the name plus one for the content."""

    def __init__(self, d_model):
        super().__init__()
        self.name, self.content = nn.Embedding(N_SYMBOLS, d_model), nn.Embedding(N_SYMBOLS, d_model)

    def forward(self, ids):
        return self.name(ids // N_SYMBOLS) + self.content(ids % N_SYMBOLS)

def statement_reader(positions, n_layers=2):
    """An untrained model, ids of statements -> logits over the symbols; d_model 32, two heads of 16, a Positions."""
    model = TransformerLM(TransformerConfig(N_SYMBOLS**2, 32, 2, n_layers, 64), positions=positions)
    model.embedding, model.unembedding = Statements(32), nn.Linear(32, N_SYMBOLS, bias=False)
    return model.double()

def train_reader(model, seed, steps, seq_len=32, batch=32, lr=1e-2):
    """Train on documents of seq_len statements: six variables, each handed on once. Returns the model."""
    rng = np.random.default_rng(seed)
    batches = ([torch.from_numpy(a) for a in documents(rng, batch, seq_len)[:2]] for _ in range(steps))

    def loss(model, pair):
        return F.cross_entropy(model(pair[0]).mT, pair[1], ignore_index=NO_ANSWER)

    training.fit(model, batches, loss, steps, lr=lr)
    return model

POSITIONS = {"RoPE": lambda: Rotary(16), "ALiBi": lambda: ALiBi(2), "no positions": Positions}

def train_statement_reader(kind, seed):
    """A reader with positions of this kind, trained for 400 steps."""
    return train_reader(training.initialise(statement_reader(POSITIONS[kind]()), seed), seed, 400)

# %% tags=["export", "plumbing"]
@functools.cache
def recorded():
    """The weights that data/recorded/lecture_04.py made, by name and seed."""
    return dict(np.load(data.FOLDER / "recorded" / "lecture_04.npz"))

def with_weights(model, name):
    """A model with recorded weights, ready to be asked."""
    nn.utils.vector_to_parameters(torch.from_numpy(recorded()[name]).double(), model.parameters())
    return model.eval()

def recorded_readers(kind):
    """The readers of seeds 0, 1 and 2 with positions of this kind, as train_statement_reader makes them."""
    return [with_weights(statement_reader(POSITIONS[kind]()), f"{kind} {seed}") for seed in range(3)]

def in_words(token, alone=False):
    """A statement as a reader of the course sees it: (x7, 41); alone: one symbol."""
    if alone:
        kinds = ((VALUES, f"x{token}"), (WORDS, f"{token - VALUES}"), (ASK, f"w{token - WORDS}"), (N_SYMBOLS, "?"))
        return next(word for end, word in kinds if token < end)
    if token == statement(MOST, MOST):
        return "most?"
    return f"({in_words(token // N_SYMBOLS, True)}, {in_words(token % N_SYMBOLS, True)})"

# %% tags=["export", "plumbing"]
@torch.no_grad()
def needle_grid(models, lengths, rivals, n_depths=9, repeats=6):
    """Mean probability (n_depths, lengths) of the needle's value: rows from the start of the document to its end.

    rivals: how many other variables are put into the hay, at random places.
    """
    columns, batch = [], n_depths * repeats
    for n in lengths:
        rng = np.random.default_rng(5)
        hay = statement(*WORDS + rng.integers(32, size=(2, batch, n)))
        name, value = rng.integers(N_NAMES, size=batch), VALUES + rng.integers(32, size=batch)
        for _ in range(rivals):
            other = (name + 1 + rng.integers(N_NAMES - 1, size=batch)) % N_NAMES
            hay[np.arange(batch), rng.integers(n, size=batch)] = statement(other, VALUES + rng.integers(32, size=batch))
        text = place_needle(hay, statement(name, value), np.repeat(np.linspace(0, 1, n_depths), repeats))
        ids = torch.from_numpy(np.concatenate([text, statement(name, ASK)[:, None]], axis=1))
        right = [model(ids)[:, -1].softmax(-1).numpy()[np.arange(batch), value] for model in models]
        columns.append(np.mean(right, axis=0).reshape(n_depths, repeats).mean(1))
    return np.stack(columns, axis=1)

@torch.no_grad()
def answer(model, seq_len, batch=100, hops=1, **task):
    """Which questions are answered correctly: booleans (batch, chains, hops + 1), and (batch,) for the common word."""
    ids, answers, order = documents(np.random.default_rng(99), batch, seq_len, hops=hops, **task)
    right = model(torch.from_numpy(ids)).argmax(-1).numpy()[:, seq_len:] == answers[:, seq_len:]
    by_name = np.take_along_axis(right[:, :-1], order.argsort(axis=1), axis=1)
    return by_name.reshape(batch, -1, hops + 1), right[:, -1]

@torch.no_grad()
def losses_of(model, seq_len=256, batch=30):
    """What the model says after each statement of long documents, as losses (batch, seq_len); nan after hay."""
    ids, answers, _ = documents(np.random.default_rng(7), batch, seq_len, chains=15)
    logits, answers = model(torch.from_numpy(ids)), torch.from_numpy(answers)
    losses = F.cross_entropy(logits.mT, answers, ignore_index=NO_ANSWER, reduction="none")
    return losses.masked_fill(answers == NO_ANSWER, torch.nan).numpy()[:, :seq_len]

def found_by_hops(model):
    """Share of values found that were handed on 0 to 4 times: (5,)."""
    return answer(model, 32, batch=60, chains=4, hops=4)[0].mean((0, 1))

def four_tasks(model, n, batch=40):
    """Accuracy at length n: needle, many needles, tracking, common word."""
    needle = answer(model, n, batch, chains=1, hops=0)[0].mean()
    many = answer(model, n, batch, chains=8, hops=0)[0].mean()
    tracking, common = answer(model, n, batch)
    return np.array([needle, many, tracking[..., 1].mean(), common.mean()])

# %% tags=["export", "plumbing"]
@torch.no_grad()
def found_by_age(model, memory, batch=60):
    """Share of values found, by the segment of the fact: three segments of 32, and the questions in a fourth."""
    ids, answers, _ = documents(np.random.default_rng(42), batch, 96, chains=12, hops=0)
    said = read_in_segments(model, torch.from_numpy(ids), 32, memory).argmax(-1).numpy()
    right = said[:, 96:108] == answers[:, 96:108]
    names = ids // N_SYMBOLS
    place = (names[:, None, :96] == names[:, 96:108, None]).argmax(-1)                    # where the fact stands
    return [right[place // 32 == s].mean() for s in range(3)]

@torch.no_grad()
def needle_weight(model, n, batch=20):
    """Weight that the best head of the question gives to the needle, median over documents."""
    seen = []
    hooks = [block.attention.weights.register_forward_hook(lambda module, args, out: seen.append(out[:, :, -1, n // 2]))
             for block in model.blocks]
    rng = np.random.default_rng(0)
    name, value = rng.integers(N_NAMES, size=batch), VALUES + rng.integers(32, size=batch)
    hay = statement(*WORDS + rng.integers(32, size=(2, batch, n)))
    text = place_needle(hay, statement(name, value), np.full(batch, 0.5))
    model(torch.from_numpy(np.concatenate([text, statement(name, ASK)[:, None]], axis=1)))
    for hook in hooks:
        hook.remove()
    return np.median(torch.cat(seen, dim=1).max(dim=1).values.numpy())

# %% [markdown]
# **The parity of 4.13.** In training the scratchpad holds the right parity, later what the model wrote.

# %% tags=["export", "plumbing"]
BLANK = 4                                                   # 0, 1: bits; 2, 3: parity even, odd
STEPS = {"scratchpad": True, "blank tokens": False}

def parity_stream(rng, batch, n_bits, scratchpad):
    """Bits with a token after each: its parity so far, or a blank. ids (batch, 2 n_bits), parity (batch, n_bits)."""
    bits = rng.integers(2, size=(batch, n_bits))
    parity = 2 + bits.cumsum(axis=1) % 2
    ids = np.stack([bits, parity if scratchpad else np.full_like(bits, BLANK)], axis=2).reshape(batch, -1)
    return torch.from_numpy(ids), torch.from_numpy(parity)

def parity_model():
    """Untrained: two layers of width 32."""
    return TransformerLM(TransformerConfig(5, 32, 4, 2, 64), positions=ALiBi(4)).double()

def train_parity(name, seed, steps=200):
    """Trained on 16 bits, name: one of STEPS."""
    model, rng = training.initialise(parity_model(), seed), np.random.default_rng(seed)

    def loss(model, pair):
        return F.cross_entropy(model(pair[0])[:, ::2].mT, pair[1])

    training.fit(model, (parity_stream(rng, 32, 16, STEPS[name]) for _ in range(steps)), loss, steps, lr=6e-3)
    return model

def recorded_thinkers(name):
    """The models of seeds 0, 1 and 2, as train_parity makes them."""
    return [with_weights(parity_model(), f"{name} {seed}") for seed in range(3)]

@torch.no_grad()
def parity_accuracy(model, n_bits, scratchpad, batch=50):
    """Share of right answers after each bit. With a scratchpad the model reads what it wrote, right or wrong."""
    ids, parity = parity_stream(np.random.default_rng(99), batch, n_bits, scratchpad)
    for i in range(n_bits if scratchpad else 0):
        ids[:, 2 * i + 1] = model(ids[:, :2 * i + 1])[:, -1].argmax(-1)
    return (model(ids)[:, ::2].argmax(-1) == parity).double().mean(0).numpy()

# %% [markdown]
# **The pass key of 4.3 and 4.5**, SmolLM2 with other rotations, and what 4.1 measures.

# %% tags=["export", "plumbing"]
def passkey(model, key, depth, of="help", n_text=190):
    """A pass key in prose: (prompt, rest), ids (1, n) each; rest is the question with the digits as its last five tokens.

    model: a language model; key: five digits; depth from 0 to 1: where in the first n_text tokens of the text.
    """
    text = model.encode(EXCERPTS[of]())[:, :n_text]
    needle = model.encode(f" The pass key is {key}. Remember it: {key} is the pass key.")
    at = round(depth * n_text)
    prompt = torch.cat([text[:, :at], needle, text[:, at:]], dim=1)
    question = "\n\nWhat is the pass key? The pass key is"
    return prompt, torch.cat([model.encode(question), model.encode(f" {key}")], dim=1)

def rescaled_model(model, way, factor):
    """The language model with RoPE as it is, or rescaled: "PI", "NTK" or "YaRN" (without its temperature)."""
    d, base, trained = model.config.d_head, model.config.base, 8192
    if way == "NTK":
        base *= factor ** (d / (d - 2))
    scaling = {"PI": {"rope_type": "linear", "factor": factor},
               "YaRN": {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}}.get(way)
    frequencies = torch.as_tensor(rope_frequencies(d, base=base, scaling=scaling)[0])
    return model.replace(rotate=lambda x, positions: apply_rope_torch(x, positions, frequencies))

def peak_and_seconds(counted, timed, qkv):
    """Most bytes that `counted` has in use at once, above those at the start; seconds of processor time of `timed`.

    Two functions of causal attention, of arrays and of tensors; qkv (3, n, d), an array.
    """
    tensors = torch.from_numpy(qkv)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    counted(*qkv, causal=True)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        timed(*tensors, causal=True)
        seconds.append(time.process_time() - begin)
    return peak, min(seconds)

# %% [markdown]
# ## Glossary
#
# |term|what it is|
# |---|---|
# |arithmetic intensity|operations for each byte moved|
# |claimed length|the length whose positions a model was trained on|
# |decoding|writing one token after another|
# |effective length|the longest length up to which a test is passed, at a stated threshold|
# |gap|positions left out between a prompt and a question: large distances from few tokens|
# |loss by position|the mean loss in buckets of positions|
# |needle, pass key|a statement hidden in a long text, and asked for|
# |prefill|the reading of a prompt|
# |receptive field, reach|the farthest token that can change an output|
# |relative shift|the step that moves scores by distance to where their keys stand|
# |ridge|the intensity at which the two limits of a chip meet|
# |roofline|the speed that bandwidth and peak allow, against the intensity|
# |scratchpad|intermediate results that a model writes and reads again|
# |segment recurrence|a memory of the segment before, without gradient|
#
# ## Sources
#
# Dai et al. 2019, Transformer-XL (arXiv 1901.02860): § 3.2, § 3.3, appendix B · Chen et al. 2023, position interpolation
# (2306.15595) · Peng et al. 2023, YaRN (2309.00071) · Zhu et al. 2023, PoSE (2309.10400) · Kamradt 2023, "Needle in a haystack"
# (github.com/gkamradt) · Liu et al. 2023, lost in the middle (2307.03172) · Xiao et al. 2023, attention sinks (2309.17453) ·
# Hsieh et al. 2024, RULER (2404.06654), and the table in its repository · Llama team 2024 (2407.21783) · Zhai et al. 2023,
# entropy collapse (2303.06296) · Merrill and Sabharwal 2023 (2310.07923) · Feng et al. 2023 (2305.15408) · Allal et al. 2025,
# SmolLM2 (2502.02737) · configurations in transformers 5.23 · vLLM, "Context extension" (docs), Qwen, "Enabling long context"
# (docs) · NVIDIA H100 data sheet.
