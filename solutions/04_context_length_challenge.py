# ---
# jupyter:
#   course:
#     experiments:
#     - statement
#     - documents
#     - Statements
#     - statement_reader
#     - train_reader
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

# %% [markdown]
# # Lecture 04 · The context-length challenge
#
# **Where we are.** You have attention, many heads of it, and positions as rotations. Nothing in the formula says how
# long the sequence may be. **The question:** what does length cost, what is it good for, and what happens past the
# length that a model was trained on? **What you build:** calculators that turn a published configuration into FLOPs
# and bytes, four long-context tests, a reader that takes them, and the memory of Transformer-XL.
#
# | part | sections | minutes |
# |---|---|---|
# | 1 · What length costs | 4.1, 4.2, exercise 4.1 | 45 |
# | 2 · What length is good for | 4.3, 4.4, exercises 4.2 to 4.4 | 75 |
# | 3 · Longer | 4.5 to 4.7, Transformer-XL, exercises 4.5 and 4.6 | 75 |
# | 4 · CUDA: one kernel of each kind | exercises 4.7 and 4.8 | 75 |
# | Traps | questions and answers | 20 |
# | Going further | scratchpads, failure modes, a table of variants, a recipe | as you like |
#
# From lecture 02 it needs `TransformerLM`, from lecture 03 the positions. Alone, with all exercises, about five
# hours.

# %% [markdown] tags=["teacher"]
# **For the teacher: two hours of 50 minutes.** Run everything before class; the three readers trained in part 2 take
# the longest.
#
# - *Hour 1.* 4.1: predict the two slopes (10) · the crossing of weights and scores (5) · 4.2: where each kernel
#   stands under the roof (12) · 4.3: the task on the board, then the three grids (15) · 4.4: three curves, one rule
#   (8).
# - *Hour 2.* The published table and the rule (8) · 4.5: what rescaling repairs (10) · Transformer-XL: reach (8) ·
#   4.7: guess the cost of a prompt (10) · CUDA: bytes of the two kernels (8) · scratchpad (6).
# - *At home.* 4.1 to 4.4 after hour 1, 4.5 and 4.6 after hour 2, the kernels for volunteers.
# - *Ask before scrolling.* Which slope has the memory of attention, and why is it not exactly 2? From which length on
#   is more than half of the work attention, for a token and for a whole prompt? Does a longer window make a model
#   slower for a short prompt? What would 40 steps of training do without any rescaling?
# - *Questions that come.* Why does a model without positions do well in part 2? Because the order of the statements
#   does not matter there. In language it does; lecture 03 shows the price.

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

# %%
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attention.multi_head import TransformerConfig, TransformerLM
from utils import cuda, training

# %% [markdown]
# ## Part 1 · What length costs

# %% [markdown]
# ### 4.1 The quadratic scaling problem
#
# **What happens to time and memory when the sequence becomes twice as long?** We take `attention_numpy` of lecture
# 01, one head of 64 numbers, and count every byte that NumPy asks for while it runs. The time is that of
# `attention_torch`, which keeps to one thread.
#
# *Predict.* On axes that are both logarithmic a power law is a straight line. Which slopes will the two lines have?

# %%
import time
import tracemalloc

from attention.fundamentals import attention_numpy, attention_torch

def peak_and_seconds(counted, timed):
    """Most bytes that `counted` has in use at once, above those at the start; seconds of processor time of `timed`."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    counted()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        timed()
        seconds.append(time.process_time() - begin)
    return peak, min(seconds)

# %%
lengths = 2 ** np.arange(8, 13)                                        # 256 to 4096
rng = np.random.default_rng(0)
measured = []
for n in lengths:
    q, k, v = rng.standard_normal((3, n, 64), dtype=np.float32)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    measured.append(peak_and_seconds(lambda: attention_numpy(q, k, v, causal=True),
                                     lambda: attention_torch(*tensors, causal=True)))
peaks, seconds = np.array(measured).T

# %%
scores_alone = 4.0 * lengths**2
slopes = plotting.scaling({"peak memory": (lengths, peaks), "the scores alone, 4 n² bytes": (lengths, scores_alone)},
                          xlabel="sequence length n", ylabel="bytes", title="Twice the length, four times the memory")
plotting.show("Peak memory of attention against sequence length, both axes logarithmic: a straight line of "
              "slope 2, a few times above the line of the scores alone.")

# %%
time_slope = np.polyfit(np.log(lengths[1:]), np.log(seconds[1:]), 1)[0]
print(f"slope of the memory: {slopes['peak memory']:.1f}")
print(f"matrices of n x n numbers alive at the peak, n = 4096: {peaks[-1] / (4 * 4096**2):.1f}")
print("slope of the time between 1.5 and 3:", 1.5 < time_slope < 3)

# %% [markdown]
# Both slopes are about two. At the peak three such matrices are alive: the masked scores, their exponentials, the
# quotient. Nothing of that is needed. Lecture 06 computes the same output with no $n \times n$ matrix at all, and its
# time still has the slope two.
#
# #### Complexity: $O(n^2 d)$, and what a cache changes
#
# **Where do the operations go?** One layer multiplies each token with its weight matrices, which costs the same at
# any length, and each token with all others, which does not. When a model *writes*, it does this for every new token.
# Without a cache it computes all keys and values again; with one (lecture 05) it computes one query. (**Prefill** is
# the reading of the prompt, **decoding** the writing of one token after another.)

# %%
d = 4096                                                  # one layer of an 8B model: d_model, and 218 million weights
weights_per_layer = 218e6
print("       n   prefill: weights, scores   next token without a cache, with one   (GFLOP, one layer)")
for n in (1024, 8192, 65536):
    by_weights, by_scores = 2 * weights_per_layer * n, 2 * n**2 * d          # causal: half of the pairs
    without, with_cache = by_weights + by_scores, 2 * weights_per_layer + 4 * n * d
    print(f"{n:8,d} {by_weights / 1e9:16,.0f} {by_scores / 1e9:9,.0f} {without / 1e9:21,.0f} {with_cache / 1e9:13.2f}")

# %% [markdown]
# A cache turns the next token from a quadratic affair into a linear one. It pays in bytes: the cache itself, which is
# section 4.7. The prefill stays quadratic.
#
# #### Exercise 4.1: the share of attention  (difficulty 2 of 5, 10 minutes)
#
# "The energy of a language model is dominated by the attention mechanism", a slide says. How large is its share of
# the operations? A token at position $n$ costs two operations for each weight and $4 n d$ in each layer for its
# scores and its weighted sum ($d$: all heads side by side).
#
# | argument | shape | meaning |
# |---|---|---|
# | `n` | integers, any shape | how many tokens the query sees |
# | `n_params` | int | weights that a token is multiplied with (below all of a model, its embedding included) |
# | `n_layers` | int | layers |
# | `d_model` | int | width of all heads together |
#
# Returns floats of the shape of `n`, between 0 and 1: operations of scores and weighted sums, divided by all
# operations.
#
# <details><summary>Hint</summary>
#
# Two sums: $4 n d L$ and $2N$. A share is one of them divided by both together.
#
# </details>

# %% tags=["exercise", "export"]
def attention_share(n, n_params, n_layers, d_model):
    """Share of the scores and weighted sums in the FLOPs of one token that sees n tokens; floats of the shape of n.

    n integers; n_params, n_layers, d_model integers. A multiplication and an addition count as two FLOPs.
    """
    ### BEGIN SOLUTION
    by_length = 4.0 * np.asarray(n) * d_model * n_layers
    return by_length / (2.0 * n_params + by_length)
    ### END SOLUTION

# %%
attention_share = check("4.1", attention_share)

# %%
n = np.array([1, 8, 32, 128]) * 1024
share = attention_share(n, n_params=70_553_706_496, n_layers=80, d_model=8192)         # Llama 3.1 70B
print("   ".join(f"{length // 1024}k: {s:.0%}" for length, s in zip(n, share)))
half = 70_553_706_496 / (2 * 80 * 8192)
print(f"half of the operations are attention: of one token from {half:,.0f} on, of a prompt from {2 * half:,.0f} on")

# %% [markdown]
# Two per cent at a thousand tokens, more than half only past fifty thousand. That is the share for one token, the
# last. Over a whole causal prompt a token sees $n/2$ others on average, so the same share needs a prompt twice as
# long. The sentence on the slide is wrong at the lengths of most prompts, and becomes true at the lengths of this
# lecture. Grouped queries change nothing here: they shrink what is stored, not what is multiplied. (Counted as in
# many papers: the projections to queries, keys, values and output are weights here. A slide that counts them as
# attention means something else.) Operations are not joules either; section 4.7 counts bytes as well.

# %% [markdown]
# ### 4.2 Memory and compute bounds
#
# **How fast could a kernel be?** A GPU has two limits: how many numbers it can multiply in a second, and how many
# bytes it can fetch. A kernel that does few operations with each byte waits for memory, and no cleverness in its
# arithmetic helps. The number that decides is its **arithmetic intensity**: FLOPs per byte moved. Drawn against it, the
# speed that the two limits allow is the **roofline**: a slope where memory limits, flat where arithmetic does. They
# meet at the **ridge**.
#
# Part 4 builds the two extremes. Each reads its input once and writes its output once; that is the floor.

# %%
def intensity(flops, numbers_moved, bytes_per_number=2):
    return flops / (numbers_moved * bytes_per_number)

n, d = 8192, 128
kernels = {
    "softmax_rows, n x n": intensity(5 * n**2, 2 * n**2),              # maximum, subtract, exp, sum, divide
    "matmul, n x n": intensity(2 * n**3, 3 * n**2),
    "attention, scores written": intensity(4 * n**2 * d + 5 * n**2, 4 * n * d + 4 * n**2),
    "attention, fused": intensity(4 * n**2 * d + 5 * n**2, 4 * n * d),
    "decode, one query": intensity(4 * n * d + 5 * n, 2 * n * d + 2 * d),
}
for name, value in kernels.items():
    print(f"{name:26s} {value:8.1f} FLOP per byte")

# %% [markdown]
# *Predict.* The data sheet of an H100 SXM says 989 TFLOP/s in half precision and 3.35 TB/s. From which intensity on
# does arithmetic limit, and which of the five are beyond it?

# %%
BANDWIDTH, PEAK = 3.35e12, 989e12                                      # NVIDIA H100 SXM, data sheet, dense bf16
reachable = {name: (value, min(PEAK, value * BANDWIDTH)) for name, value in kernels.items()}
ax = plotting.roofline(reachable, BANDWIDTH, PEAK,
                       title="Decoding and the softmax wait for memory, fused attention does not")
ax.legend(loc="upper left", bbox_to_anchor=(0.0, -0.15), ncols=2)
plotting.show("Roofline of an H100 with five kernels drawn where they could be at best: decoding at 1 and the "
              "softmax at about 1 FLOP per byte, attention with written scores at about 60, left of the ridge "
              "at 295; the matrix product and fused attention far right of it.")

# %%
for name, (value, speed) in reachable.items():
    print(f"{name:26s} at best {speed / PEAK:6.1%} of the peak")

# %% [markdown]
# From 295 FLOP per byte on; the matrix product and fused attention are beyond it. All points stand on the roof because
# they were put there: nothing can be above it, and real kernels stay below. Two lessons are on the picture, and a third
# is not:
#
# - **Prefill and training** are bound by memory only because the scores are written and read again. Fusing the three
#   steps (lecture 06) moves the same operations far to the right.
# - **Decoding** has one query. Each key and value is fetched for two FLOPs per number. Fusing changes nothing; only
#   fewer bytes help: shared keys and values (lecture 08), one short vector for both, called *latent* (lecture 09),
#   fewer bits (lecture 05).
# - Many queries at once, as in a batch of users, do not help decoding attention: each brings a cache of its own.
#   They do help the weights, which all of them share.

# %% [markdown]
# ## Part 2 · What length is good for

# %% [markdown]
# ### 4.3 Needle in a haystack
#
# **Can a model use what stands far back?** A test of this kind hides one sentence, the needle, at a chosen depth of a
# long text and asks for it at the end (Kamradt 2023). RULER (Hsieh et al. 2024, arXiv 2404.06654) adds harder ones:
# several needles, variables to be followed, words to be counted.
#
# Our documents are lists of *statements*. A statement has a name and a content, and one token carries both: what the
# first layers of a real model would make of a short sentence. Its id is `name * 98 + content`.
#
# | statement | meaning |
# |---|---|
# | `(x7, 41)` | x7 is 41 |
# | `(x2, x7)` | x2 is what x7 is |
# | `(apple, pear)` | two words: the hay |
# | `(x2, ?)` | a question: what is x2? |
# | `(most, most)` | a question: which word is the most common? Printed as `most?`, and the words as w0 to w31. |

# %% tags=["export"]
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

# %%
def say(symbol):
    kinds = ((VALUES, f"x{symbol}"), (WORDS, f"{symbol - VALUES}"), (ASK, f"w{symbol - WORDS}"), (N_SYMBOLS, "?"))
    return next(word for end, word in kinds if symbol < end)

def in_words(token):
    return "most?" if token == statement(MOST, MOST) else f"({say(token // N_SYMBOLS)}, {say(token % N_SYMBOLS)})"

ids, answers, _ = documents(np.random.default_rng(7), batch=1, seq_len=8, chains=2, hops=1)
print("text:    ", *map(in_words, ids[0, :8]))
print("asked:   ", *map(in_words, ids[0, 8:]))
print("answers: ", *map(say, answers[0, 8:]))

# %% [markdown]
# The reader is a `TransformerLM` of two layers. Its embedding is the sum of two, one for the name and one for the
# content. It is trained on documents of **32 statements**, to say after each statement and question what the name
# stands for. With twelve questions about names and one about words that makes 45 tokens; no greater distance than 44
# was ever seen. The questions come in random order: asked chain by chain, a reader learns to repeat its last answer.
# Positions are left to be chosen: rotary, ALiBi, or none at all.

# %% tags=["export"]
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

# %% [markdown]
# Three readers for each choice. Seed 0 is trained here; seeds 1 and 2 were trained by the same two functions, and their
# weights recorded (`python -m data.recorded.lecture_04`; `data/recorded/lecture_04.npz`).

# %%
from attention.multi_head import Positions
from attention.rotary import ALiBi, Rotary

recorded = np.load(data.FOLDER / "recorded" / "lecture_04.npz")

def three_readers(kind, positions):
    """The reader of seed 0, trained here, and those of seeds 1 and 2, trained in the same way before."""
    readers = [train_reader(training.initialise(statement_reader(positions()), 0), seed=0, steps=400)]
    for seed in (1, 2):
        readers.append(statement_reader(positions()).eval())
        weights = torch.from_numpy(recorded[f"{kind} {seed}"]).double()
        nn.utils.vector_to_parameters(weights, readers[-1].parameters())
    return readers

readers = {"RoPE": three_readers("RoPE", lambda: Rotary(16))}

# %%
readers["ALiBi"] = three_readers("ALiBi", lambda: ALiBi(2))

# %%
readers["no positions"] = three_readers("no positions", Positions)

# %%
@torch.no_grad()
def answer(model, seq_len, batch=100, hops=1, **task):
    """Which questions are answered correctly: booleans (batch, chains, hops + 1), and (batch,) for the common word."""
    ids, answers, order = documents(np.random.default_rng(99), batch, seq_len, hops=hops, **task)
    right = model(torch.from_numpy(ids)).argmax(-1).numpy()[:, seq_len:] == answers[:, seq_len:]
    by_name = np.take_along_axis(right[:, :-1], order.argsort(axis=1), axis=1)
    return by_name.reshape(batch, -1, hops + 1), right[:, -1]

@torch.no_grad()
def followed_alone(model, batch=200):
    """Share of handed-on names that are answered where theirs is the first question, so that none stands before it."""
    ids, answers, order = documents(np.random.default_rng(98), batch, 32)
    right = model(torch.from_numpy(ids[:, :33]))[:, 32].argmax(-1).numpy() == answers[:, 32]
    return right[order[:, 0] % 2 == 1].mean()

every = [model for three in readers.values() for model in three]
looked_up, followed = np.array([answer(model, 32)[0].mean((0, 1)) for model in every]).T
print("at the trained length all nine readers look up a value:      above 0.95:", looked_up.min() > 0.95)
print("and follow a name to another name and then to its value:     above 0.85:", followed.min() > 0.85)
print("that too when it is the first question, with none before it: above 0.85:",
      min(followed_alone(model) for model in every) > 0.85)

# %% [markdown]
# #### Exercise 4.2: place the needle  (difficulty 2 of 5, 10 minutes)
#
# Put one statement into each document, each at a depth of its own: 0 is the first place, 1 the last, 0.5 the middle.
#
# | argument | shape | meaning |
# |---|---|---|
# | `haystack` | integers `(batch, seq_len)` | documents |
# | `needle` | integers `(batch,)` | the statement for each document |
# | `depth` | floats `(batch,)` | from 0 to 1 |
#
# Returns new documents of the same shape; the statement that stood there is replaced. Where a depth falls between two
# places, take the nearer one, and the later one if both are equally near.
#
# <details><summary>Hint</summary>
#
# The last of `seq_len` places has the index `seq_len - 1`. Adding a half and rounding down rounds to the nearest. To
# write into another place of each row, index with two arrays: the rows and the places.
#
# </details>

# %% tags=["exercise", "export"]
def place_needle(haystack, needle, depth):
    """Documents with one statement replaced: needle[b] stands in document b at depth[b], 0 the first place, 1 the last.

    haystack integers (batch, seq_len), needle integers (batch,), depth floats (batch,). Returns a new array of the
    shape of haystack. Raises ValueError for a depth outside 0 to 1.
    """
    if np.size(depth) and not (0 <= np.min(depth) and np.max(depth) <= 1):
        raise ValueError(f"depth must lie between 0 and 1, got {np.min(depth)} to {np.max(depth)}")
    ### BEGIN SOLUTION
    places = np.floor(depth * (haystack.shape[1] - 1) + 0.5).astype(int)
    documents = haystack.copy()
    documents[np.arange(len(haystack)), places] = needle
    return documents
    ### END SOLUTION

# %%
place_needle = check("4.2", place_needle)

# %%
@torch.no_grad()
def needle_grid(model, lengths, n_depths=9, repeats=16):
    """Accuracy (n_depths, lengths) of finding one needle in hay: rows from the start of the document to its end."""
    columns, batch = [], n_depths * repeats
    for n in lengths:
        rng = np.random.default_rng(5)
        hay = statement(*WORDS + rng.integers(32, size=(2, batch, n)))
        name, value = rng.integers(N_NAMES, size=batch), VALUES + rng.integers(32, size=batch)
        text = place_needle(hay, statement(name, value), np.repeat(np.linspace(0, 1, n_depths), repeats))
        ids = np.concatenate([text, statement(name, ASK)[:, None]], axis=1)
        said = model(torch.from_numpy(ids))[:, -1].argmax(-1).numpy()
        columns.append((said == value).reshape(n_depths, repeats).mean(1))
    return np.stack(columns, axis=1)

lengths = (16, 32, 64, 128, 256)
grids = {name: needle_grid(three[0], lengths) for name, three in readers.items()}

# %% [markdown]
# *Predict.* All readers were trained at 32. Which of the three will still find the needle at 256, and where in the
# text will the others lose it first?

# %%
def draw_grids(grids, title):
    figure, axes = plt.subplots(1, len(grids), figsize=(3.3 * len(grids), 3.6), sharey=True)
    for ax, (name, grid) in zip(axes, grids.items()):
        picture = ax.imshow((grid * 4).round() / 4, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        ax.set(title=name, xlabel="statements", xticks=range(len(lengths)), xticklabels=lengths)
        ax.grid(False)
    axes[0].set(ylabel="depth of the needle", yticks=[0, 4, 8], yticklabels=["start", "middle", "end"])
    figure.colorbar(picture, ax=axes, label="found (rounded to quarters)")
    figure.suptitle(title)

draw_grids(grids, "Trained at 32: RoPE loses needles from 128 on, fewest at the end")
plotting.show("Three heat maps of needle depth against document length, seed 0. RoPE finds everything up to 64 "
              "statements, most at 128, and at 256 about two thirds, near the end nearly everything; ALiBi and no "
              "positions are bright everywhere.")

# %%
far, near = grids["RoPE"][:3, -1].mean(), grids["RoPE"][-2:, -1].mean()
print("RoPE at 256, all depths, on average below 0.83:       ", grids["RoPE"][:, -1].mean() < 0.83)
print("there, the start worse than the end by 0.15:          ", far < near - 0.15)
print("ALiBi and no positions at 256, worst depth above 0.75:",
      min(grids["ALiBi"][:, -1].min(), grids["no positions"][:, -1].min()) > 0.75)

# %% [markdown]
# The reader with RoPE has met rotations for distances below 45 only. At 256 it misses about a third: most needles near
# the question, whose distance is familiar, are still found, fewer of those at the start. The other two never learned
# to need a distance.
#
# **Lost in the middle?** Liu et al. (2023, arXiv 2307.03172) report that language models find facts at the beginning
# and at the end of their context better than in its middle, a U. Expected here: no U, because our reader has no
# reason to prefer the beginning. Measured over three seeds:

# %%
by_depth = {name: np.array([needle_grid(model, (256,))[:, 0] for model in three]) for name, three in readers.items()}
plotting.curves(by_depth, x=np.linspace(0, 1, 9), xlabel="depth of the needle: 0 first, 1 last statement of 256",
                ylabel="found (3 seeds)", title="RoPE finds most near the end; the other two find nearly everything")
plotting.show("Accuracy against needle depth at 256 statements, three seeds: ALiBi and no positions near one at all "
              "depths; RoPE at 0.7 in the first half with a wide spread, rising to nearly one at the end.")

# %%
for name, r in by_depth.items():
    start, middle, end = r[:, :2].mean(), r[:, 3:6].mean(), r[:, -2:].mean()
    print(f"{name:13s} better than the middle by 0.1: the end {end > middle + 0.1!s:5}  "
          f"the start {start > middle + 0.1}")

# %% [markdown]
# One-sided: RoPE loses towards the past, and the start is no better than the middle. The U depends on the model and its
# training data; it is no law of attention. Test yours.

# %% [markdown]
# ### 4.4 Key metrics for long context
#
# **Which number says that a model can use its context?** There are four in use: the loss by position, the accuracy on
# a passkey (a number hidden in prose) or needle, a mean over harder tasks, and the longest length at which that mean
# is still good.
#
# #### Exercise 4.3: the loss by position  (difficulty 2 of 5, 10 minutes)
#
# A mean loss over a long text hides where it comes from. Cut the positions into buckets.
#
# | argument | shape | meaning |
# |---|---|---|
# | `losses` | `(batch, seq_len)` | loss of each token; `nan` where nothing was to be said |
# | `edges` | integers `(n_buckets + 1,)` | bucket i holds the positions `edges[i]` to `edges[i+1] - 1` |
#
# Returns `(n_buckets,)`: the mean over all losses in each bucket, `nan` where there is none.
#
# <details><summary>Hint</summary>
#
# Take the columns of one bucket, keep what is not `nan`, and look whether anything is left before you divide.
#
# </details>

# %% tags=["exercise", "export"]
def loss_by_position(losses, edges):
    """Mean loss in each bucket of positions: (n_buckets,) floats, nan for a bucket without any loss.

    losses (batch, seq_len), nan where there was nothing to predict; edges integers (n_buckets + 1,), bucket i holds the
    positions edges[i] to edges[i + 1] - 1.
    """
    ### BEGIN SOLUTION
    means = np.full(len(edges) - 1, np.nan)
    for i, (first, end) in enumerate(zip(edges[:-1], edges[1:])):
        bucket = losses[:, first:end]
        known = bucket[~np.isnan(bucket)]
        if known.size:
            means[i] = known.mean()
    return means
    ### END SOLUTION

# %%
loss_by_position = check("4.3", loss_by_position)

# %%
@torch.no_grad()
def losses_of(model, seq_len=256, batch=60):
    """What the model says after each statement of long documents, as losses (batch, seq_len); nan after hay."""
    ids, answers, _ = documents(np.random.default_rng(7), batch, seq_len, chains=15)
    logits, answers = model(torch.from_numpy(ids)), torch.from_numpy(answers)
    losses = F.cross_entropy(logits.mT, answers, ignore_index=NO_ANSWER, reduction="none")
    return losses.masked_fill(answers == NO_ANSWER, torch.nan).numpy()[:, :seq_len]

edges = np.arange(0, 257, 32)
curves = {name: np.array([loss_by_position(losses_of(model), edges) for model in three])
          for name, three in readers.items()}

# %%
plotting.curves(curves, x=edges[:-1] + 16, xlabel="position in the document (trained up to 45)", ylabel="loss in nats",
                title="Past the trained length the losses climb, that of RoPE towards guessing")
plotting.show("Loss by position to 256 for three readers, mean and range of three seeds: RoPE rises from about "
              "position 80 to nearly 3 nats, where guessing among 32 values has 3.5; ALiBi ends near 0.3, no positions "
              "near 0.1.")

# %%
print("position 224 to 255, loss in nats, three seeds:")
for name, curve in curves.items():
    last = curve[:, -1]
    print(f"  {name:13s}", "above 1.5" if last.min() > 1.5 else "below 0.9" if last.max() < 0.9 else "between")

# %% [markdown]
# A falling curve means that the model uses its context, a flat one that it stopped using it, a rising one that length
# harms. Not only the length grows here: 15 variables and their 15 second names compete, 6 and 6 in training. A mean
# over the first 64 positions would have shown none of this.
#
# #### Four tasks of the RULER kind
#
# *Needle*: one variable in hay (the passkey test, where the hay is prose and the needle a number). *Many needles*:
# eight, each asked for. *Tracking* (RULER: variable tracking): a value handed on to another name. *Common word* (RULER:
# common words): which word is most frequent?

# %%
def four_tasks(model, n):
    needle = answer(model, n, batch=50, chains=1, hops=0)[0].mean()
    many = answer(model, n, batch=50, chains=8, hops=0)[0].mean()
    tracking, common = answer(model, n, batch=50)
    return np.array([needle, many, tracking[..., 1].mean(), common.mean()])

tasks = ("needle", "many needles", "tracking", "common word")
lengths = np.array([32, 64, 128, 256])
scores = {name: np.array([[four_tasks(model, n) for n in lengths] for model in three])
          for name, three in readers.items()}

# %%
rope = {task: scores["RoPE"][:, :, i] for i, task in enumerate(tasks)}
plotting.curves(rope, x=lengths, xlabel="statements (trained at 32)", ylabel="accuracy (RoPE, 3 seeds)",
                title="Lookups fail with length, tracking first; the common word gains")
plotting.show("Accuracy of the RoPE reader on four tasks against length: tracking is below one from 64 on and 0.4 at "
              "256; many needles and needle fall from 128 on, to 0.55 and 0.7; the common word rises from 0.95 to one.")

# %% [markdown]
# One model, four answers. The single needle is lost last, as in RULER, where almost all models are near perfect at the
# plain needle and lose much on the other tasks as the text grows. The fourth task gains: it asks for an average, and an
# average becomes *easier* with more words. So a test says little about another one.
#
# #### Exercise 4.4: the effective length  (difficulty 3 of 5, 10 minutes)
#
# RULER calls a length *effective* when the mean score at it is above a threshold, 85.6 points: what Llama 2 7B
# reaches at its 4K. We take the last length before the score falls to the threshold for the first time.
#
# | argument | shape | meaning |
# |---|---|---|
# | `lengths` | integers `(n_lengths,)`, rising | lengths that were tested |
# | `scores` | `(n_models, n_lengths)` | mean score of each model at each length |
# | `threshold` | float | a score has to be above it |
#
# Returns integers `(n_models,)`: the longest length such that it *and all shorter ones* are above the threshold; 0
# where not even the first is.
#
# <details><summary>Hint</summary>
#
# `np.minimum.accumulate` along a row of 1 and 0 stays 0 after the first 0. How many ones are left tells which length
# it is.
#
# </details>

# %% tags=["exercise", "export"]
def effective_length(lengths, scores, threshold):
    """The longest length up to which all scores are above the threshold: integers (n_models,), 0 where there is none.

    lengths integers (n_lengths,), rising; scores (n_models, n_lengths).
    Source: the rule of Hsieh et al. 2024 (arXiv 2404.06654), section 4, with the shorter lengths asked for as well.
    """
    ### BEGIN SOLUTION
    passed = np.logical_and.accumulate(np.asarray(scores) > threshold, axis=1).sum(axis=1)
    return np.concatenate([[0], np.asarray(lengths)])[passed]
    ### END SOLUTION

# %%
effective_length = check("4.4", effective_length)

# %% [markdown]
# First on published scores: the mean over RULER's 13 tasks, from the table in the benchmark's repository
# (NVIDIA/RULER, as of 2024). *Predict.* Five models claim 128K or more. How many are effective at 128K?

# %%
published = {                       # claimed length in K, then the score at 4K, 8K, 16K, 32K, 64K, 128K
    "Gemini 1.5 Pro": (1000, 96.7, 95.8, 96.0, 95.9, 95.9, 94.4),
    "GPT-4-1106": (128, 96.6, 96.3, 95.2, 93.2, 87.0, 81.2),
    "Llama 3.1 70B": (128, 96.5, 95.8, 95.4, 94.8, 88.4, 66.6),
    "Qwen2 72B": (128, 96.9, 96.1, 94.9, 94.1, 79.8, 53.7),
    "Llama 3 70B, third-party 1M": (1000, 95.1, 94.4, 90.8, 85.4, 80.9, 72.1),
    "Mistral 7B v0.2": (32, 93.6, 91.2, 87.2, 75.4, 49.0, 13.8),
}
table = np.array(list(published.values()))
effective = effective_length(np.array([4, 8, 16, 32, 64, 128]), table[:, 1:], threshold=85.6)
for name, claimed, kept in zip(published, table[:, 0], effective):
    print(f"{name:28s} claims {claimed:5.0f}K, effective up to {kept:3d}K{' or more' if kept == 128 else ''}")

# %% [markdown]
# One of five. Now our readers, with a threshold of 0.856 on the mean of the four tasks.

# %%
ours = {name: effective_length(lengths, s.mean(-1), 0.856) for name, s in scores.items()}
for name, kept in ours.items():
    print(f"{name:13s} effective length of all three seeds:", "256 or more" if kept.min() >= 256 else
          "below 256, and at least the trained 32" if 32 <= kept.min() and kept.max() < 256 else "mixed")

# %% [markdown]
# ## Part 3 · Longer

# %% [markdown]
# ### 4.5 From 2K to 100K+ tokens
#
# **What changed between a context of 2,048 tokens and one of a million?** Not one thing.
#
# | date | who | context | what made it possible | source |
# |---|---|---|---|---|
# | 2020-05 | GPT-3 | 2K | learned positions, one for each place: there is no place 2,049 | arXiv 2005.14165 |
# | 2023-02 | LLaMA | 2K | RoPE, base 10,000 | 2302.13971 |
# | 2023-06 | position interpolation | 32K | squeeze the positions, then at most 1,000 steps of training | 2306.15595 |
# | 2023-07 | Llama 2 | 4K | trained at 4K | 2307.09288 |
# | 2023-08 | Code Llama | 100K | base 1,000,000, tuned on sequences of 16K | 2308.12950 |
# | 2023-08 | YaRN | 128K | interpolate only what turns slowly, and a temperature | 2309.00071 |
# | 2023-10 | ring attention | limited by devices | the sequence is spread over many GPUs | 2310.01889 |
# | 2024-03 | Gemini 1.5 | 1M and more | not disclosed in detail | 2403.05530 |
# | 2024-07 | Llama 3.1 | 128K | base 500,000, frequencies rescaled, long data, spread over GPUs | 2407.21783 |
# | 2025-03 | Gemma 3 (4B and larger) | 128K | five layers in six look at 1,024 tokens only | 2503.19786 |
# | 2026-04 | DeepSeek-V4 | 1M | keys and values compressed along the sequence | its published configuration |
#
# (As of November 2026. Ring attention is built in lecture 06, windows in 07.)
#
# The first half of this history is about *positions*, and can be repeated here. The reader with RoPE fails past its
# trained length. Its rotations are rescaled as in lecture 03, for four times the length, first **without any
# training**.
#
# (The frequencies are those of `rope_frequencies`, which lecture 03 compares with the reference implementation. The
# base of dynamic NTK depends on the length; here it is fixed at the one for 180.)
#
# *Predict.* Interpolation squeezes all positions into the trained range. Does that suffice? YaRN leaves the fast
# pairs alone. Is that better or worse?

# %%
import copy

from attention.rotary import rope_frequencies

def rescaled(model, kind):
    """A copy of a reader whose rotations are rescaled for four times the trained length of 45."""
    factor = 1.0 if kind == "dynamic" else 4.0                # the formula of NTK multiplies it by 180 / 45 itself
    scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": 45, "seq_len": 180}
    model = copy.deepcopy(model)
    model.positions.frequencies, model.positions.attention_scale = rope_frequencies(16, scaling=scaling)
    return model

def tracked(model, n):
    return answer(model, n, batch=50)[0][..., 1].mean()

ways = {"RoPE as it is": "default", "interpolation": "linear", "NTK": "dynamic", "YaRN": "yarn"}
lengths = (32, 64, 128, 256)
untrained = {way: [[tracked(rescaled(model, kind), n) for n in lengths] for model in readers["RoPE"]]
             for way, kind in ways.items()}

# %% [markdown]
# Then interpolation with 40 steps of training at 128 statements: a twelfth of the tokens of the first training. And a
# control: the same 40 steps without interpolation.

# %%
def tuned(kind):
    """Tracking at four lengths of the three readers with RoPE, rescaled and then trained for 40 steps."""
    three = [train_reader(rescaled(model, kind), seed=100 + i, steps=40, seq_len=128, batch=8, lr=2e-3)
             for i, model in enumerate(readers["RoPE"])]
    return [[tracked(model, n) for n in lengths] for model in three]

extension = untrained | {"interpolation + 40 steps": tuned("linear"), "RoPE + 40 steps": tuned("default")}

# %%
plotting.curves(extension, x=np.array(lengths), xlabel="statements (trained at 32)", ylabel="tracking (3 seeds)",
                title="Interpolation and YaRN extend without training; NTK and 40 steps do less")
plotting.show("Tracking accuracy against length for six ways: RoPE as it is falls to 0.4 at 256, and to 0.6 when "
              "trained for 40 steps; NTK holds to 64 and falls to 0.6; interpolation and YaRN have 0.9 or more at all "
              "lengths, interpolation with 40 steps a little higher.")

# %%
squeezed, rescaled_too = ("interpolation", "YaRN"), ("interpolation", "YaRN", "NTK")
at = {way: np.array(rows) for way, rows in extension.items()}
print("at 128 statements, four times the trained length, over three seeds:")
print("  RoPE as it is below 0.81, rescaled in three ways, no training, above:",
      at["RoPE as it is"][:, 2].max() < 0.81 < min(at[way][:, 2].min() for way in rescaled_too))
print("  after 40 steps RoPE below 0.92, interpolation above:                 ",
      at["RoPE + 40 steps"][:, 2].max() < 0.92 < at["interpolation + 40 steps"][:, 2].min())
print("at 256: interpolation and YaRN, no training, above 0.78:               ",
      min(at[way][:, 3].min() for way in squeezed) > 0.78)
print("  RoPE with 40 steps and NTK below:                                    ",
      max(at[way][:, 3].max() for way in ("RoPE + 40 steps", "NTK")) < 0.78)
print("at 32: what rescaling costs without training is below 0.1:             ",
      max((at["RoPE as it is"] - at[way])[:, 0].max() for way in rescaled_too) < 0.1)

# %% [markdown]
# As published: plain RoPE breaks, and tuning it directly is slow; after interpolation 40 steps go farther (Chen et
# al.). Not as published: here interpolation needs no tuning, and is as good as YaRN. Language models need one after
# it, and less after YaRN (Peng et al.). A likely reason: this task can be done without any positions, as the third
# reader shows, so there are no exact neighbours to be blurred. Text has them (lecture 03).
#
# A longer position range is necessary, not sufficient. The model must also have *seen* questions whose answer stands
# far back; that is what "long data" in the table means.

# %% [markdown]
# ### Transformer-XL: a memory of the segment before
#
# **Can a model read beyond its window without a longer window?** Dai et al. (2019, arXiv 1901.02860) cut the text
# into segments and keep the hidden states of the last one. Each layer attends to them as well; no gradient flows into
# them.
#
# Our `MultiHeadAttention` takes a cache. Keys and values of a segment are functions of its hidden states: for reading,
# keeping these keys and values is the same thing. In training it is not: the paper stops the gradient at the hidden
# states, so $W_K$ and $W_V$ still learn from the memory; here they do not.

# %% tags=["export"]
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

# %% [markdown]
# *Predict.* Segments of 8, a memory of 8, random weights. We change one token and look whether the *last* output of a
# text of 56 changes. From how far back does it notice, with 1, 2, 3, 4 layers? And without a memory?

# %%
@torch.no_grad()
def reach(n_layers, segment, memory, length=56):
    """The largest distance at which a changed token changes the last output."""
    config = TransformerConfig(vocab_size=11, d_model=16, n_heads=2, n_layers=n_layers, d_ff=32)
    model = training.initialise(TransformerLM(config, positions=ALiBi(2)).double(), 0)
    ids = torch.from_numpy(np.random.default_rng(0).integers(10, size=(1, length)))
    before = read_in_segments(model, ids, segment, memory)[0, -1]
    for position in range(length):
        changed = ids.clone()
        changed[0, position] = 10
        if not torch.equal(read_in_segments(model, changed, segment, memory)[0, -1], before):
            return length - 1 - position

print("layers:               ", *(f"{n:3d}" for n in (1, 2, 3, 4)))
print("reach without memory: ", *(f"{reach(n, 8, memory=0):3d}" for n in (1, 2, 3, 4)))
print("reach with memory 8:  ", *(f"{reach(n, 8, memory=8):3d}" for n in (1, 2, 3, 4)))

# %% [markdown]
# The reach grows by a segment with each layer: $(L + 1) \cdot 8 - 1$. Without a memory it ends where the segment
# begins.
#
# Reach is what a model *can* use. **Does one use it?** The trained ALiBi reader reads documents of 96 statements in
# segments of 32, with different memories, and is asked for values.

# %%
@torch.no_grad()
def found_by_age(model, memory, batch=100):
    """Share of values found, by the segment of the fact: three segments, and the questions in a fourth."""
    ids, answers, _ = documents(np.random.default_rng(42), batch, 96, chains=12, hops=0)
    said = read_in_segments(model, torch.from_numpy(ids), 32, memory).argmax(-1).numpy()
    right = said[:, 96:108] == answers[:, 96:108]
    names = ids // N_SYMBOLS
    place = (names[:, None, :96] == names[:, 96:108, None]).argmax(-1)                    # where the fact stands
    return [right[place // 32 == s].mean() for s in range(3)]

by_memory = {f"memory {m}": np.array([found_by_age(model, m) for model in readers["ALiBi"]]) for m in (0, 32, 64, 96)}
plotting.curves(by_memory, x=np.arange(3), xlabel="segment of the fact: 0 the oldest, 2 just before the questions",
                ylabel="found (3 seeds)",
                title="A reader finds what its memory holds, not what its layers could reach").set_xticks(range(3))
plotting.show("Share of facts found by segment: no memory finds nothing anywhere, memory 32 only the last "
              "segment, 64 the last two, 96 all three.")

# %%
m32 = by_memory["memory 32"]
print("memory 32: last segment above 0.8, older ones below 0.3:", m32[:, 2].min() > 0.8 and m32[:, :2].max() < 0.3)

# %% [markdown]
# With a memory of 32 and two layers, the reach is three segments: that of the questions (3), and segments 2 and 1.
# Segment 0 is out of reach. A fact in segment 1 can arrive only if somebody in segment 2 had picked it up before anyone
# asked, and our reader was never trained to do so. A receptive field is an upper bound; the effective context has to be
# measured.
#
# #### The relative shift
#
# Positions that restart in each segment cannot be told apart, so Transformer-XL uses distances. The score of query
# $i$ and key $j$ has two parts, $(q_i + u) \cdot k_j + (q_i + w) \cdot r_{i-j}$, with one vector $r$ for each
# distance and two learned vectors $u, w$. The second part is computed for all distances at once: a row for each
# query, a column for each distance. Then each row has to be pushed into place.

# %% [markdown]
# #### Exercise 4.5: push the rows into place  (difficulty 4 of 5, 20 minutes)
#
# Column $c$ of the input belongs to the distance `n_keys - 1 - c`: the last column is the query itself. In the
# output, column $j$ belongs to key $j$. The last query stands at the last key.
#
# | argument | shape | meaning |
# |---|---|---|
# | `by_distance` | `(..., n_queries, n_keys)`, `n_queries <= n_keys` | scores, a column for each distance |
#
# Returns `(..., n_queries, n_keys)`: entry $(i, j)$ is the score of query $i$ at the distance of key $j$, and 0 for
# keys in the future. Two queries, three keys:
#
#     distance 2 1 0          key 0 1 2
#         a b c       ->          b c 0
#         d e f                   d e f
#
# <details><summary>Hint</summary>
#
# A loop over the rows is right. The trick of the paper has no loop: put a column of zeros on the left, read the
# numbers of each matrix as one long line, leave out the first `n_queries` of them, and cut the line into rows of
# `n_keys`. The future is then filled with numbers of the next row; a triangle removes them.
#
# </details>

# %% tags=["exercise", "export"]
def relative_shift(by_distance):
    """Scores by distance (..., n_queries, n_keys) turned into scores by key, of the same shape; 0 in the future.

    Column c of by_distance is the distance n_keys - 1 - c; the last query stands at the last key.
    Raises ValueError when there are more queries than keys. Source: Dai et al. 2019 (arXiv 1901.02860), appendix B.
    """
    n_queries, n_keys = by_distance.shape[-2:]
    if n_queries > n_keys:
        raise ValueError(f"by_distance must have at most as many queries as keys, got {n_queries} and {n_keys}")
    ### BEGIN SOLUTION
    lead = by_distance.shape[:-2]
    padded = np.concatenate([np.zeros_like(by_distance[..., :1]), by_distance], axis=-1)
    line = padded.reshape(*lead, n_queries * (n_keys + 1))[..., n_queries:]
    return np.tril(line.reshape(*lead, n_queries, n_keys), k=n_keys - n_queries)
    ### END SOLUTION

# %%
relative_shift = check("4.5", relative_shift)

# %% [markdown]
# The whole attention of Transformer-XL, and the same with three loops.

# %% tags=["export"]
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

# %%
rng = np.random.default_rng(1)
q, (k, v, r), (u, w) = rng.standard_normal((5, 8)), rng.standard_normal((3, 9, 8)), rng.standard_normal((2, 8))
looped = np.zeros((5, 8))
for i in range(5):
    position, scores = i + 4, []                              # five queries behind four remembered keys
    for j in range(position + 1):
        scores.append(((q[i] + u) @ k[j] + (q[i] + w) @ r[8 - (position - j)]) / np.sqrt(8))
    weights = np.exp(np.array(scores) - max(scores))
    looped[i] = weights / weights.sum() @ v[:position + 1]
print("shifted equals looped to 1e-12:", np.allclose(relative_attention_numpy(q, k, v, r, u, w), looped, atol=1e-12))
print("and u = w = 0, r = 0 is causal attention:", np.allclose(relative_attention_numpy(q, k, v, 0 * r, 0 * u, 0 * w),
                                                               attention_numpy(q, k, v, causal=True), atol=1e-12))

# %% [markdown]
# ### 4.6 Current approaches
#
# **What do models with long contexts do today?** Many no longer let every layer look at everything. The table is of
# November 2026. Each number is from the paper named, or from the default configuration in transformers 5.23.0 (*conf*).
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
# | 2026-04 | DeepSeek-V4-Flash (*conf*) | window of 128; CSA (4 tokens in one, 512 picked) or HCA (128 in one) | 07 |
#
# (NSA, DSA, CSA, HCA: ways to compress keys or to choose among them. A delta layer keeps one matrix instead of keys and
# values. The lecture named builds it.)
#
# Two ideas recur. **Hybrids** keep a few full layers, because recall suffers without them (lecture 10), and make the
# rest cheap. **Sparse** ones keep the keys and choose among them. How much of the cache that saves can be calculated:

# %%
n = np.array([4, 32, 128, 1024]) * 1024
layers = {"all full": (1, 0, 0), "1 of 2 full, window 4,096": (1 / 2, 1 / 2, 4096),
          "1 of 6 full, window 1,024": (1 / 6, 5 / 6, 1024), "1 of 4 full, rest constant": (1 / 4, 0, 0)}
print(f"{'keys and values kept, share of all':36s}", *(f"{m // 1024:6d}k" for m in n))
for name, (full, windowed, window) in layers.items():
    share = full + windowed * np.minimum(n, window) / n
    print(f"{name:36s}", *(f"{s:7.0%}" for s in share))

# %% [markdown]
# ### 4.7 Real-world implications: what a prompt costs
#
# **How many bytes does a conversation occupy?** Each layer keeps two vectors for each token and KV head: a key and a
# value. A layer with a window keeps the last ones only.
#
# #### Exercise 4.6: bytes of the cache  (difficulty 2 of 5, 10 minutes)
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
# Count *tokens kept*, layer by layer: `seq_len` in a full one, never more than `window` in the others. Each costs a
# key and a value.
#
# </details>

# %% tags=["exercise", "export"]
def kv_cache_bytes(seq_len, n_kv_heads, d_head, n_full, n_windowed=0, window=0, n_bytes=2):
    """Bytes of the keys and values of one sequence: integers of the shape of seq_len.

    n_full layers keep all seq_len tokens, n_windowed layers the last `window`; a number has n_bytes bytes.
    """
    ### BEGIN SOLUTION
    seq_len = np.asarray(seq_len, dtype=np.int64)
    tokens_kept = n_full * seq_len + n_windowed * np.minimum(seq_len, window)
    return 2 * n_kv_heads * d_head * n_bytes * tokens_kept
    ### END SOLUTION

# %%
kv_cache_bytes = check("4.6", kv_cache_bytes)

# %% [markdown]
# With it, a calculator. The sizes of eight published models are in `data/long_context_models.json`, with their
# sources. Mistral v0.1 and Gemma 2 were trained for 8K; at 128k the numbers are what their shapes would cost. Two bytes
# for each number, also where a model is published in fewer (GPT-OSS, DeepSeek-V3).

# %% tags=["export"]
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

# %%
import json

models = json.loads((data.FOLDER / "long_context_models.json").read_text(encoding="utf-8"))["models"]
seq_len = 128 * 1024
print(f"{'a prompt of 131,072 tokens':20s} prefill PFLOP   cache GB   KB per token   read for a new token, GB")
for model in models:
    prefill, cache, read = prompt_cost(model, seq_len)
    print(f"{model['name']:20s} {prefill / 1e15:19.2f} {cache / 1e9:10.2f} {cache / seq_len / 1e3:14.1f} "
          f"{read / 1e9:26.1f}")

# %% [markdown]
# *Predict before the next cell.* How many seconds does the prompt take on one H100 *at best*, and how many tokens a
# second does it write after that? (As if the weights fitted on it.)

# %%
print(f"{'at the roof of one H100':20s} {'prefill: 1k':>14s} {'128k tokens':>14s} {'tokens/s: 1k':>15s} {'128k':>8s}")
for model in models:
    short, long = prompt_cost(model, 1024), prompt_cost(model, seq_len)
    print(f"{model['name']:20s} {short[0] / PEAK:12.2f} s {long[0] / PEAK:12.1f} s {BANDWIDTH / short[2]:15.0f} "
          f"{BANDWIDTH / long[2]:8.0f}")

# %% [markdown]
# Prefill time grows faster than the prompt, decoding slows down because the cache has to be read for each token. What a
# layer keeps decides: Mistral 7B and Llama 3.1 8B, equal at 1k, differ three times in the prefill at 128k.
#
# #### "The energy is dominated by the attention mechanism"
#
# Back to the slide of exercise 4.1. Two currencies, operations in the prefill and bytes while decoding, and two
# lengths:

# %%
print(f"{'share of attention in':20s} {'prefill FLOPs, 1k':>19s} {'128k':>6s} {'decoded bytes, 1k':>20s} {'128k':>6s}")
for model in models:
    row = []
    for n in (1024, seq_len):
        prefill, cache, read = prompt_cost(model, n)
        row.append((1 - 2 * model["active"] * n / prefill, cache / read))
    print(f"{model['name']:20s} {row[0][0]:19.1%} {row[1][0]:6.0%} {row[0][1]:20.1%} {row[1][1]:6.0%}")

# %% [markdown]
# Smaller than in exercise 4.1: there the token at position $n$ was counted, here it is the mean over a prompt, whose
# tokens see $n/2$ on average. At a thousand tokens neither currency is spent on attention: a few per cent. At 128k it
# depends on the model. The sentence is refuted as a general one. (Operations and bytes are what energy is spent on;
# how many joules each costs depends on the chip, and no paper on one chip settles it for all.)

# %% [markdown]
# ## Part 4 · CUDA: one kernel of each kind
#
# **What does a kernel wait for: the memory, or its own arithmetic?** A GPU can do both at once, so the slower of the
# two decides. The datasheet of an H100 (SXM) says 3.35 TB/s for its memory, 67 TFLOP/s in float32, and 989 TFLOP/s
# for bfloat16 on its tensor cores (without sparsity). The quotient of the two is the **ridge** of the roofline: a
# kernel that does fewer operations for each byte waits for the memory, one that does more waits for the arithmetic.
#
# This part builds one kernel on each side of the ridge, and then attention out of the two. No GPU is needed: bytes
# are counted, as in lecture 01, and no times are claimed.
#
# *Predict.* A softmax does about five operations on each number (compare, subtract, exp, add, divide). On which side
# of the ridge is it? And the product of two n × n matrices?

# %%
import functools
import math

from attention.fundamentals import softmax

# %%
SINGLE = 67e12                                            # H100 SXM: FLOP/s in float32; BANDWIDTH and PEAK as in 4.2
print(f"ridge: {SINGLE / BANDWIDTH:.0f} FLOP per byte in float32, {PEAK / BANDWIDTH:.0f} in bfloat16")
print(f"softmax of any size: {5 / 8:6.2f} FLOP per byte, each number read once and written once")
for n in (64, 256, 1024, 4096):
    print(f"matmul of n = {n:4d}:  {2 * n**3 / (3 * 4 * n**2):6.2f} FLOP per byte, A and B read once, C written once")

# %% [markdown]
# The softmax lies far left of the ridge, at every size: it can only be as fast as the memory. The matrix product does
# $2n^3$ operations on $3n^2$ numbers, so from $n = 128$ on it lies right of it. These are **floors**: no number is
# read twice. Whether a kernel comes near its floor is a matter of how it is written.
#
# ### `softmax_rows`: the kernel that waits for the memory
#
# One block of 256 threads works on each row. In lecture 01 a warp was enough; here a row holds the scores of a long
# context. The threads of a block have no shuffle in common, so a maximum over the block takes two steps: shuffles in
# each warp, then eight numbers in shared memory.

# %% tags=["export"]
OVER_BLOCK = r"""
#define THREADS 256
__device__ float combine(float a, float b, bool largest) { return largest ? fmaxf(a, b) : a + b; }
__device__ float over_block(float x, bool largest) {
  __shared__ float of_warp[THREADS / 32];
  for (int o = 16; o > 0; o /= 2) x = combine(x, __shfl_xor_sync(0xffffffff, x, o), largest);
  __syncthreads();                                      // the numbers of the last call have been read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();                                      // all eight are there
  x = of_warp[0];
  for (int w = 1; w < THREADS / 32; ++w) x = combine(x, of_warp[w], largest);
  return x;
}
__device__ float block_max(float x) { return over_block(x, true); }       // every thread calls it,
__device__ float block_sum(float x) { return over_block(x, false); }      // every thread gets the result
"""

# %% [markdown]
# First the definition, word for word: a pass for the maximum, a pass for the sum, a pass to write. A row of only
# $-\infty$ has nothing to attend to and becomes zeros: its maximum is replaced by 0, and its sum by 1.

# %%
SOFTMAX_THREE_PASSES = OVER_BLOCK + r"""
__global__ void softmax_three_passes(const float* x, float* y, int n_columns) {
  x += (size_t)blockIdx.x * n_columns, y += (size_t)blockIdx.x * n_columns;             // this block's row
  float maximum = -INFINITY, total = 0.0f;
  for (int j = threadIdx.x; j < n_columns; j += THREADS) maximum = fmaxf(maximum, x[j]);
  maximum = block_max(maximum);
  if (maximum == -INFINITY) maximum = 0.0f;
  for (int j = threadIdx.x; j < n_columns; j += THREADS) total += expf(x[j] - maximum);
  total = block_sum(total);
  if (total == 0.0f) total = 1.0f;
  for (int j = threadIdx.x; j < n_columns; j += THREADS) y[j] = expf(x[j] - maximum) / total;
}
"""
rng = np.random.default_rng(4)
x = rng.standard_normal((3, 1000)).astype(np.float32)
x[1], x[2] = -np.inf, 1e4 * x[2]                                            # the two rows that go wrong elsewhere
y = np.full_like(x, -1)
three_passes = cuda.compile(SOFTMAX_THREE_PASSES)
report = three_passes.check[3, 256](x, y, 1000)
print("problems:", len(report.problems), " agrees with lecture 01 to 1e-6:", np.abs(y - softmax(x)).max() < 1e-6)
print(f"read {report.global_loaded / x.nbytes:.0f} times, written {report.global_stored / x.nbytes:.0f} time")

# %% [markdown]
# Sixteen bytes for each number where the floor is eight. The kernel waits for the memory, so twice the bytes are
# twice the time, unless a cache catches the repetition.
#
# #### Exercise 4.7: read it once  (difficulty 3 of 5, 20 minutes)
#
# A row of 12,000 floats fits into the shared memory of a block. Keep it there: read each number from global memory
# once, and go over the copy as often as you like. The launch is `kernel[rows, 256, 4 * n_columns](x, y, n_columns)`.
#
# | argument | shape | meaning |
# |---|---|---|
# | `x` | `(rows, n_columns)` | any floats, also $-\infty$ |
# | `y` | `(rows, n_columns)` | the softmax of each row, written once; zeros for a row of only $-\infty$ |
# | `n_columns` | int | 1 to 12,000, not only multiples of 256 |
# | `row` | `n_columns` floats | the block's shared memory |
#
# The 256 threads take the columns in turn. `block_max` and `block_sum` stand above; every thread of the block must call
# them.
#
# <details><summary>Hint</summary>
#
# Three loops as above. The first also copies: `row[j] = x[j]`. The second may leave the exponential in `row[j]`, so
# that the third only divides. A thread that always takes the same columns reads nothing but what it wrote itself, and
# needs no barrier of its own.
#
# </details>

# %% tags=["exercise", "export"]
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
SOFTMAX_READ_ONCE = check("4.7", SOFTMAX_READ_ONCE)

# %% [markdown]
# #### And a row that does not fit?
#
# A row of 100,000 columns is 400 KB, and no block has that much. Then the numbers must be read twice, but not three
# times: one pass can find maximum and sum together. It keeps the sum relative to the largest number so far; when a
# larger one comes, the old sum shrinks by $e^{\text{old} - \text{new}}$. (Lecture 06 turns this into FlashAttention.)

# %% tags=["export"]
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

# %% [markdown]
# *Predict.* How many bytes do the three kernels move, as a multiple of the floor of 8 bytes for each number?

# %%
read_once, online = cuda.compile(SOFTMAX_READ_ONCE), cuda.compile(SOFTMAX_ONLINE)
print("columns   three passes   read once   online      (bytes moved / floor)")
for n_columns in (64, 1000, 4096, 100_000):
    x = rng.standard_normal((2, n_columns)).astype(np.float32)
    times_floor = []
    for kernel, shared in ((three_passes, 0), (read_once, 4 * n_columns), (online, 0)):
        if shared > 48_000:
            times_floor.append("  too long")
            continue
        y = np.full_like(x, -1)
        report = kernel.check[2, 256, shared](x, y, n_columns)
        assert report.ok and np.allclose(y, softmax(x), atol=1e-6)
        times_floor.append(f"{(report.global_loaded + report.global_stored) / (2 * x.nbytes):10.2f}")
    print(f"{n_columns:7,}     {'  '.join(times_floor)}")

# %% [markdown]
# Exactly the floor, where the row fits; one and a half times the floor where it does not. There is nothing left to
# win in bytes. What is left is the number of requests: a thread can load four floats at once, as a `float4`, where
# the rows are a multiple of four long and begin at a multiple of 16 bytes.

# %%
SOFTMAX_FLOAT4 = OVER_BLOCK + r"""
__global__ void softmax_float4(const float4* x, float4* y, int n_fours) {
  extern __shared__ float4 row[];
  x += (size_t)blockIdx.x * n_fours, y += (size_t)blockIdx.x * n_fours;
  float maximum = -INFINITY, total = 0.0f;
  for (int j = threadIdx.x; j < n_fours; j += THREADS) {
    float4 s = row[j] = x[j];
    maximum = fmaxf(maximum, fmaxf(fmaxf(s.x, s.y), fmaxf(s.z, s.w)));
  }
  maximum = block_max(maximum);
  if (maximum == -INFINITY) maximum = 0.0f;
  for (int j = threadIdx.x; j < n_fours; j += THREADS) {
    float4 s = row[j];
    s = make_float4(expf(s.x - maximum), expf(s.y - maximum), expf(s.z - maximum), expf(s.w - maximum));
    total += s.x + s.y + s.z + s.w;
    row[j] = s;
  }
  total = block_sum(total);
  if (total == 0.0f) total = 1.0f;
  for (int j = threadIdx.x; j < n_fours; j += THREADS) {
    float4 s = row[j];
    y[j] = make_float4(s.x / total, s.y / total, s.z / total, s.w / total);
  }
}
"""

# %%
x = rng.standard_normal((2, 4096)).astype(np.float32)
float4 = cuda.compile(SOFTMAX_FLOAT4)
for name, kernel, count in (("float", read_once, 4096), ("float4", float4, 1024)):
    y = np.full_like(x, -1)
    report = kernel.check[2, 256, 4 * 4096](x, y, count)
    assert report.ok and np.allclose(y, softmax(x), atol=1e-6)
    requests = sum(row.requests for row in report.rows if row.space == "global" and row.kind == "store")
    print(f"{name:6s} {requests:4d} requests to write {report.global_stored:,} bytes")

# %% [markdown]
# The same bytes in a quarter of the requests: fewer instructions, and the floor stays what it was. The function below
# keeps the simpler kernel, which takes rows of any length.

# %% tags=["export"]
LONGEST_KEPT = 12_000              # columns: 48 KB of shared memory, less what block_max needs

def check_rows(x):
    """Raise ValueError, in one sentence, unless x holds rows of real numbers. For arrays and tensors."""
    cuda.check_numbers(x=x)
    if not np.ndim(x):
        raise ValueError("x must have at least one axis (n_columns), got a single number")

def widened(x):
    """An array or tensor in at least single precision: half precision is too coarse to add up in."""
    return x.to(cuda.work_type(x)) if isinstance(x, torch.Tensor) else x.astype(cuda.work_type(x))

# %% tags=["export"]
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

# %% tags=["export"]
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

# %% [markdown]
# ### `matmul`: the kernel that waits for arithmetic, if it is written well
#
# The product of an $(m, k)$ and a $(k, n)$ matrix does $2mnk$ operations. The simplest kernel gives each number of C
# to one thread, and each thread reads a row of A and a column of B for itself: $2k$ floats for $k$ multiply-adds.
#
# | | reads, in bytes | writes |
# |---|---|---|
# | naive: each of $mn$ threads reads $2k$ floats | $4 \cdot 2mnk$ | $4mn$ |
# | floor: A and B once | $4(mk + kn)$ | $4mn$ |

# %%
MATMUL_NAIVE = r"""
__global__ void matmul_naive(const float* a, const float* b, float* c, int m, int n, int k) {
  int i = blockIdx.y * blockDim.y + threadIdx.y, j = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= m || j >= n) return;
  float sum = 0.0f;
  for (int t = 0; t < k; ++t) sum += a[(size_t)i * k + t] * b[(size_t)t * n + j];
  c[(size_t)i * n + j] = sum;
}
"""
m, n, k = 100, 150, 70                                                       # no multiples of anything
a, b = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
c = np.full((m, n), -1, np.float32)
blocks = lambda size, tile: -(-size // tile)                                 # how many tiles cover it
naive = cuda.compile(MATMUL_NAIVE).check[(blocks(n, 16), blocks(m, 16)), (16, 16)](a, b, c, m, n, k)
print("problems:", len(naive.problems), " agrees with NumPy to 1e-5:", np.abs(c - a @ b).max() < 1e-5 * np.abs(c).max())
print(f"read {naive.global_loaded:9,} bytes, formula {4 * 2 * m * n * k:9,}, floor {4 * (m * k + k * n):7,}")

# %% [markdown]
# Two operations for eight bytes: 0.25 FLOP per byte, less than the softmax. The *problem* lies right of the ridge,
# this *kernel* lies left of it. (Caches help it on a GPU; it should not have to rely on them.)
#
# **How is a number used more than once?** As in lecture 01: a block of 16 × 16 threads loads a 16 × 16 tile of A and
# one of B into shared memory, together. Each number of a tile then serves 16 threads.
#
# #### Exercise 4.8: a product of tiles  (difficulty 4 of 5, 30 minutes)
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
# <details><summary>Hint</summary>
#
# Thread $(x, y)$ of the block computes row `blockIdx.y * TILE + y`, column `blockIdx.x * TILE + x` of C. In the round
# that begins at `first` it loads one number of each tile: `a_tile[y][x]` from row `row`, column `first + x` of A, and
# `b_tile[y][x]` from row `first + y`, column `column` of B. After a barrier it adds up `a_tile[y][t] * b_tile[t][x]`.
# Before the next round loads, everybody must have finished: the second barrier. Threads outside C load and wait too.
#
# </details>

# %% tags=["exercise", "export"]
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
MATMUL_TILED = check("4.8", MATMUL_TILED)

# %% [markdown]
# Each number of A is now read once for each *tile* of columns of C, and each number of B once for each tile of rows.
# With tiles of $T$ that is $mk\lceil n/T\rceil + kn\lceil m/T\rceil$ floats, about $2mnk/T$: sixteen times fewer.
#
# *Predict.* Does the formula also hold where the tiles stick out at the edges?

# %%
def tiled_reads(m, n, k, tile):
    """Bytes that a tiled product reads from global memory."""
    return 4 * (m * k * blocks(n, tile) + k * n * blocks(m, tile))

matmul_tiled = cuda.compile(MATMUL_TILED)
for m, n, k in ((64, 64, 64), (100, 150, 70), (17, 1, 33)):
    a, b = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
    c = np.full((m, n), -1, np.float32)
    tiled = matmul_tiled.check[(blocks(n, 16), blocks(m, 16)), (16, 16)](a, b, c, m, n, k)
    assert tiled.ok and np.abs(c - a @ b).max() < 1e-5 * np.abs(c).max()
    print(f"({m:3d}, {k:2d}) @ ({k:2d}, {n:3d}): read {tiled.global_loaded:7,} bytes, "
          f"formula {tiled_reads(m, n, k, 16):7,}, naive {8 * m * n * k:9,}")

# %% [markdown]
# To the byte: the guards that keep a thread inside the matrix also keep it from reading.
#
# **Why not larger tiles?** A block has at most 1,024 threads, which is a tile of 32 × 32. And there is a second
# traffic now, inside the block: for one multiply-add a thread reads two floats from shared memory. Both are mended by
# the same step: each thread computes 4 × 4 numbers of C. Four numbers of A and four of B, read into registers, serve
# sixteen multiply-adds; and 16 × 16 threads cover a tile of 64 × 64.

# %% tags=["export"]
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

# %% [markdown]
# Three kernels on one problem, all counted. *Predict* the two ratios between the second and the third line.

# %%
m = n = k = 256
a, b = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
c = np.full((m, n), -1, np.float32)
registers = cuda.compile(MATMUL_REGISTERS)
matmuls = {
    "naive": cuda.compile(MATMUL_NAIVE).check[(16, 16), (16, 16)](a, b, c, m, n, k),
    "tiles of 16": matmul_tiled.check[(16, 16), (16, 16)](a, b, c, m, n, k),
    "tiles of 64, 4 x 4 a thread": registers.check[(1, 4, 4), (16, 16)](a, b, c, m, n, k)}
print("agrees with NumPy to 1e-5:", np.abs(c - a @ b).max() < 1e-5 * np.abs(c).max())
print(f"{'':28s} global bytes  times floor  FLOP/byte  shared reads/multiply-add")
for name, report in matmuls.items():
    moved = report.global_loaded + report.global_stored
    print(f"{name:28s} {moved:12,} {moved / (3 * a.nbytes):12.1f} {2 * m * n * k / moved:10.2f} "
          f"{report.shared_loaded / (4 * m * n * k):10.1f}")

# %% [markdown]
# The tile that is four times as wide reads four times less from global memory (what is written stays the same), and a
# thread with 4 × 4 numbers reads four times less from shared memory. Real libraries go on in the same direction:
# tiles of 128 and more, 8 × 8 numbers for each thread or tensor cores, which take whole small matrices, and loads
# that run ahead of the arithmetic.
#
# #### Which sixteen numbers?
#
# The thread above takes rows and columns 16 apart. Would a square of 4 × 4 neighbours not be more natural? *Predict.*
# Think of what one warp reads from `b_tile[t]` at once, and of the 32 banks.

# %%
ROWS_TOGETHER = MATMUL_REGISTERS.replace("(y + 16 * (i))", "(4 * y + (i))")
MATMUL_NEIGHBOURS = ROWS_TOGETHER.replace("(x + 16 * (j))", "(4 * x + (j))")
neighbours = cuda.compile(MATMUL_NEIGHBOURS).check[(1, 4, 4), (16, 16)](a, b, c, m, n, k)
for name, report in (("16 apart", matmuls["tiles of 64, 4 x 4 a thread"]), ("neighbours", neighbours)):
    reads = [row for row in report.rows if row.space == "shared" and row.kind == "load"]
    wavefronts = sum(row.wavefronts for row in reads) / sum(row.requests for row in reads)
    (store,) = [row for row in report.rows if row.space == "global" and row.kind == "store"]
    sectors = store.sectors / store.requests
    print(f"{name:10s} wavefronts for a shared read: {wavefronts:.0f}, sectors for a write of C: {sectors:2.0f}")

# %%
for step in (1, 4):
    plotting.bank_map(4 * step * np.arange(16))
plotting.show("Two maps of the 32 banks: sixteen threads that read neighbouring words have a bank each, sixteen that "
              "read every fourth word share eight banks.")

# %% [markdown]
# The square of neighbours computes the same from the same bytes, and needs twice the wavefronts in shared memory and
# four times the sectors in global memory. (Real kernels do give a thread four neighbours, but load them as one
# `float4`.)
#
# The function around the kernel: leading axes are broadcast (a shared matrix is copied for each pair; a stride of 0
# in the kernel would spare that), and each pair of matrices gets its own blocks.

# %% tags=["export"]
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

# %% tags=["export"]
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
for shape_a, shape_b in (((1, 7), (7, 1)), ((3, 1, 65, 33), (2, 33, 70)), ((5, 0), (0, 4)), ((2, 130, 20), (20, 3))):
    a, b = rng.standard_normal(shape_a), rng.standard_normal(shape_b)
    worst = max(worst, np.abs(matmul_cuda(a, b) - matmul_numpy(a, b)).max())
for shape in ((1, 1), (4, 12_001), (2, 3, 257)):
    x = rng.standard_normal(shape)
    worst = max(worst, np.abs(softmax_rows_cuda(x) - softmax_rows_numpy(x)).max())
print("seven odd shapes agree to 1e-5:", worst < 1e-5)

# %% [markdown]
# ### Both kernels on one roofline
#
# A point of the roofline has two coordinates. To the right: how many operations the *problem* allows for each byte,
# at its floor. Upwards: how many operations in a second the *kernel* can reach, if every byte that its threads ask
# for comes from memory. That is bandwidth times its own FLOP per byte, and no more than the peak. Nothing here was
# timed: both come from the counts above. A cache lifts the points, and everything that the counts leave out lowers
# them. The legend says how far each point is below its roof.

# %%
def roof_point(flop, moved, floor, peak):
    """A point of the roofline: FLOP per byte of the problem, FLOP per second that the moved bytes permit."""
    return flop / floor, min(peak, BANDWIDTH * flop / moved)

points = {f"softmax, {name}": roof_point(5, moved, 8, SINGLE)
          for name, moved in (("three passes", 16), ("read once", 8))}
flop, floor = 2 * m * n * k, 4 * (m * k + k * n + m * n)
points |= {f"matmul 256, {name}": roof_point(flop, report.global_loaded + report.global_stored, floor, SINGLE)
           for name, report in matmuls.items()}
title = "A softmax stays on the slope; a product has to climb to the flat roof"
ax = plotting.roofline(points, BANDWIDTH, SINGLE, title=title)
ax.set(xlabel="FLOP per byte, at the floor of the problem", ylabel="FLOP/s, as the bytes permit")
ax.set_ylim(bottom=2e10)
plotting.show("A roofline of an H100 in float32: two softmaxes at 0.6 operations a byte, the one that reads once on "
              "the slope; three matrix products at 43 operations a byte, below the flat roof.")

# %% [markdown]
# The softmax that reads once stands on its roof: nobody can write a faster one, except by not writing its result to
# memory. The products all solve the same problem; the wider their tiles, the closer they come to the peak.
#
# ### Where does attention fall?
#
# Naive attention is these two kernels in a row: `matmul`, `softmax_rows`, `matmul`. For one head with $n$ queries and
# keys of size $d$, the floors of the three add up to $4(2nd + n^2) + 4 \cdot 2n^2 + 4(n^2 + 2nd)$ bytes, that is
# $16n^2 + 16nd$. *Predict.* How does it grow when $n$ doubles?

# %%
def naive_attention(q, k, v):
    """Attention by three kernels, and the distinct bytes of each: every sector once, as with a perfect cache."""
    n, d = q.shape
    scores, weights, out = np.zeros((n, n), np.float32), np.zeros((n, n), np.float32), np.zeros((n, d), np.float32)
    tiles = blocks(n, 64)
    reports = [registers.check[(1, tiles, tiles), (16, 16)](q / np.float32(d**0.5), k.T.copy(), scores, n, n, d),
               read_once.check[n, 256, 4 * n](scores, weights, n),
               registers.check[(1, tiles, blocks(d, 64)), (16, 16)](weights, v, out, n, d, n)]
    assert all(report.ok for report in reports)
    return out, [report.distinct_loaded + report.distinct_stored for report in reports]

# %%
d = 64
print("    n    matmul   softmax    matmul       sum   16n² + 16nd   in the matrix")
for n in (64, 128, 256, 512):
    q, k, v = (rng.standard_normal((n, d)).astype(np.float32) for _ in range(3))
    out, moved = naive_attention(q, k, v)
    assert np.allclose(out, softmax(q @ k.T / d**0.5) @ v, atol=1e-5)
    print(f"{n:5d} {moved[0]:9,} {moved[1]:9,} {moved[2]:9,} {sum(moved):9,} {16 * n * n + 16 * n * d:13,} "
          f"{16 * n * n / sum(moved):14.0%}")

# %% [markdown]
# Measured and formula are equal. The Q, K, V and output part doubles with $n$; the matrix part, written twice and
# read twice, grows fourfold. So the formula may be trusted where no laptop can follow: one head of $d = 128$ with
# everything, the matrix too, in bfloat16, which is half the bytes, from 1k to 128k tokens.

# %%
lengths, d = 1024 * np.array([1, 8, 32, 128]), 128
moved, flop = 8.0 * lengths**2 + 8.0 * lengths * d, 4.0 * lengths**2 * d
print("tokens    GB moved   ms for the memory   ms for the arithmetic   FLOP/byte")
for n, gigabytes, operations in zip(lengths, moved / 1e9, flop):
    print(f"{n // 1024:4d}k {gigabytes:13.3f} {1e12 * gigabytes / BANDWIDTH:19.3f} {1e3 * operations / PEAK:23.3f} "
          f"{operations / gigabytes / 1e9:11.0f}")
slope = np.polyfit(np.log(lengths[1:]), np.log(moved[1:]), 1)[0]
print(f"slope of the bytes from 8k on: {slope:.2f}")

# %% [markdown]
# For each head of each layer. The memory needs about five times as long as the tensor cores, and that does not
# improve with $n$: both grow as $n^2$, and the FLOP per byte end at $d/2$, left of the bfloat16 ridge. If only Q, K,
# V and the output were moved, it would be $n/2$ FLOP per byte, and a long prompt would lie far right of the ridge.

# %%
points = {f"prefill {n // 1024}k, matrix in memory": roof_point(operations, in_bytes, 8.0 * n * d, PEAK)
          for n, operations, in_bytes in zip(lengths, flop, moved)}
n = lengths[-1]
points["decode, 1 query on 128k keys"] = roof_point(4.0 * n * d, 4.0 * n * d + 8.0 * n, 4.0 * n * d, PEAK)
ax = plotting.roofline(points, BANDWIDTH, PEAK, title="The matrix in memory keeps long prompts at a fifth of the peak")
ax.legend(loc="upper left", bbox_to_anchor=(0.0, -0.15))
ax.set(xlabel="FLOP per byte, at the floor of the problem", ylabel="FLOP/s, as the bytes permit")
plotting.show("A roofline of an H100 in bfloat16: prefill at four lengths from 1k to 128k lies right of the ridge, but "
              "at a fifth of the peak; decoding lies on the slope at one operation a byte.")

# %% [markdown]
# Two different problems, and two different remedies:
#
# - **Prefill** could be bound by arithmetic, but the matrix in the middle keeps it at $d/2$ FLOP per byte. The remedy
#   is to never write the matrix: FlashAttention, lecture 06.
# - **Decode** reads all keys and values for one query: two operations for each number of two bytes. It *is* at its
#   floor, so no kernel helps. The remedy is fewer bytes: a window (lecture 07), shared heads (lecture 08), a latent
#   cache (lecture 09).
#
# What the counts leave out: caches, which make naive kernels better than they look; the exponentials, which have a
# unit and a rate of their own; and launch times, which dominate at small sizes.

# %% [markdown]
# ## Traps
#
# Each of these stands in slides, glossaries or announcements. Decide what is wrong before you open the answer; the
# cell below it shows it in numbers.
#
# ### "100,000 tokens need 10 billion scores: terabytes of memory"
#
# *Ten billion is right. How many bytes is it, and who needs them at once?*
#
# <details><summary>Answer</summary>
#
# 20 GB in half precision, for one head of one layer. A terabyte appears when all 64 heads of a layer are written out at
# the same time, as every unfused implementation does, ours of lecture 02 too. One head after the other, or a fused
# kernel that keeps one tile of scores, needs no terabyte. The operations remain.
#
# </details>

# %%
n = 100_000
print(f"one head of one layer: {2 * n**2 / 1e9:.0f} GB, 64 heads at once: {64 * 2 * n**2 / 1e12:.2f} TB")
print(f"a tile of 64 x 64 scores: {2 * 64**2 / 1e3:.0f} KB")
print(f"operations of one head of 128: {4 * n**2 * 128 / 1e12:.0f} TFLOP")

# %% [markdown]
# ### "Attention is memory-bound, primarily because of the KV cache"
#
# *Which attention: that of the prompt, or that of the next token?*
#
# <details><summary>Answer</summary>
#
# Two different effects. With many queries it is the $n \times n$ matrix that is written and read, and fusing cures
# it. With one query it is the cache that is read, and fusing does not help: the bytes are needed.
#
# </details>

# %%
n, d = 8192, 128
for case, queries in (("prompt", n), ("next token", 1)):
    flops, inputs, scores = 4 * queries * n * d, 2 * n * d + 2 * queries * d, 4 * queries * n
    written, fused = flops / (2 * (inputs + scores)), flops / (2 * inputs)
    print(f"{case:10s}: scores written {written:6.1f}, fused {fused:7.1f} FLOP per byte; ridge {PEAK / BANDWIDTH:.0f}")

# %% [markdown]
# ### "Flash attention makes every model's attention linear and 2 to 4 times faster"
#
# *What becomes linear, and in which case is nothing gained?*
#
# <details><summary>Answer</summary>
#
# The *extra memory* becomes linear; the operations stay quadratic. Two to four times was the first version against
# standard attention. With a single query there is no matrix to avoid; another kernel, which splits the keys, is used
# there.
#
# </details>

# %%
inputs = 2 * 8192 * 128                                        # keys and values: they must be read in any case
for case, n_queries in (("prompt", 8192), ("next token", 1)):
    written, fused = n_queries * 8192, 2 * n_queries           # scores; a maximum and a sum for each query
    print(f"{case:10s}: scores {written:10,d}, fused {fused:6,d}, keys and values {inputs:9,d}; "
          f"scores add {written / inputs:7.1%}")

# %% [markdown]
# ### "This model has a context of 1M (it is a Llama 3)"
#
# *What does a claimed length say?*
#
# <details><summary>Answer</summary>
#
# That the positions reach so far. Llama 3 was trained for 8K, Llama 3.1 for 128K; the versions for 1M are tuned by
# third parties. In RULER's table one of these is effective up to 16K, less than the 70B model that claims 128K.
#
# </details>

# %%
for name in ("Llama 3.1 70B", "Llama 3 70B, third-party 1M"):
    row = published[name]
    kept = effective_length(np.array([4, 8, 16, 32, 64, 128]), np.array([row[1:]]), 85.6)[0]
    print(f"{name:28s} claims {row[0]}K, effective {kept}K")

# %% [markdown]
# ### "Language models forget the middle"
#
# *Is the U of Liu et al. a property of attention?*
#
# <details><summary>Answer</summary>
#
# No. They measured it on models of 2023, and it is real there. Attention weights depend on content and, if the model
# has them, on positions; nothing singles out the middle. Section 4.3 found a loss towards the past with RoPE and
# nothing with two other schemes.
#
# </details>

# %%
for name, r in by_depth.items():
    start, middle, end = r[:, :2].mean(), r[:, 3:6].mean(), r[:, -2:].mean()
    flat, late = np.ptp([start, middle, end]) < 0.15, end > max(start, middle) + 0.1
    print(f"{name:13s}: {'flat' if flat else 'the end is best by more than 0.1' if late else 'neither'}")

# %% [markdown]
# ### "FlashAttention-2 reaches 35 % of an H100, so attention wastes two thirds of it"
#
# *35 % of what?*
#
# <details><summary>Answer</summary>
#
# Of the peak of the tensor cores in half precision; the kernel was written for the chip before (the number is from the
# announcement of FlashAttention-3, July 2024). Fused attention may reach all of the peak (section 4.2), so this kernel
# does leave two thirds of *that chip* unused, and the next version took up to 75 %. It is a statement about a kernel:
# no operation is wasted. And where the roof is lower, as in decoding, 0.3 % of the peak is perfect.
#
# </details>

# %%
for name in ("attention, fused", "softmax_rows, n x n", "decode, one query"):
    print(f"{name:20s} a perfect kernel reaches {reachable[name][1] / PEAK:7.2%} of the peak, and 100% of its roof")

# %% [markdown]
# ## Going further
#
# Sections that can be read in any order after the parts above have been run. No later lecture needs them.

# %% [markdown]
# ### Chain of thought: what do written steps buy?
#
# **Claim.** A transformer of fixed depth does a fixed number of serial steps, whatever the length of its input.
# Tokens that it writes and reads again add steps. With a linear number of them (and a slightly generalised norm) it can
# recognise every regular language; without, under standard conjectures, it cannot (Merrill and Sabharwal 2023, arXiv
# 2310.07923). Basic arithmetic becomes possible at constant size (Feng et al. 2023, 2305.15408).
#
# First a look at depth. The readers of part 2 have two layers and were trained to follow a name *once*. A value
# handed on two, three, four times:

# %%
depth = {name: np.array([answer(model, 32, batch=150, chains=4, hops=4)[0].mean((0, 1)) for model in three])
         for name, three in readers.items()}
plotting.curves(depth, x=np.arange(5), xlabel="times the value was handed on", ylabel="found (3 seeds)",
                threshold=1 / 4, threshold_name="chance among four values",
                title="Two layers follow one step, and fail from the second on").set_xticks(range(5))
plotting.show("Accuracy against the number of hops for three readers: near one for none and one, about 0.2 for two and "
              "between 0.1 and 0.2 for three and four, below the chance of one in four.")

# %% [markdown]
# No reader does better than a guess among the four values of the text. The answer is there, two lookups further; there
# is no layer left to look it up. (Trained on longer chains the reader would need more layers, or fewer if it learns to
# follow two links at once.)
#
# Now the classic: the **parity** of a row of bits. Two models with the same layers read the same bits and are asked,
# after each bit, for the parity so far. Between the bits stands one more token. In the first model it is blank; in
# the second it is *the parity that the model itself wrote after the bit before* (in training: the right one). Same
# length, same computation; the difference is what can be read.
#
# *Predict.* Up to which number of bits is each one right?

# %%
BLANK = 4                                                   # 0, 1: bits; 2, 3: parity even, odd

def parity_stream(rng, batch, n_bits, scratchpad):
    bits = rng.integers(2, size=(batch, n_bits))
    parity = 2 + bits.cumsum(axis=1) % 2
    ids = np.stack([bits, parity if scratchpad else np.full_like(bits, BLANK)], axis=2).reshape(batch, -1)
    return torch.from_numpy(ids), torch.from_numpy(parity)

def parity_loss(model, pair):
    return F.cross_entropy(model(pair[0])[:, ::2].mT, pair[1])

def train_parity(scratchpad, seed, steps=200):
    model = TransformerLM(TransformerConfig(5, 32, 4, 2, 64), positions=ALiBi(4))
    training.initialise(model.double(), seed)
    rng = np.random.default_rng(seed)
    training.fit(model, (parity_stream(rng, 32, 16, scratchpad) for _ in range(steps)), parity_loss, steps, lr=6e-3)
    return model

thinkers = {True: [train_parity(True, seed) for seed in range(3)]}

# %%
thinkers[False] = [train_parity(False, seed) for seed in range(3)]

# %% tags=["nbval-ignore-output"]
@torch.no_grad()
def parity_accuracy(model, n_bits, scratchpad):
    """Share of right answers after each bit. With a scratchpad the model reads what it wrote, right or wrong."""
    ids, parity = parity_stream(np.random.default_rng(99), 100, n_bits, scratchpad)
    for i in range(n_bits if scratchpad else 0):
        ids[:, 2 * i + 1] = model(ids[:, :2 * i + 1])[:, -1].argmax(-1)
    return (model(ids)[:, ::2].argmax(-1) == parity).double().mean(0).numpy()

n_bits = 32
parities = {"scratchpad": np.array([parity_accuracy(m, n_bits, True) for m in thinkers[True]]),
            "blank tokens": np.array([parity_accuracy(m, n_bits, False) for m in thinkers[False]])}
plotting.curves(parities, x=np.arange(1, n_bits + 1), xlabel="bits so far (trained up to 16)",
                ylabel="accuracy (3 seeds)", threshold=0.5, threshold_name="chance",
                title="One step at a time, parity is easy; at once, it is not learned")
plotting.show("Accuracy against the number of bits: with a scratchpad near one throughout, with blank tokens falling"
              " to chance within the first six bits.")

# %%
scratchpad = parities["scratchpad"]
print("scratchpad: above 0.75 on average over 16 bits:         ", scratchpad[:, :16].mean(1).min() > 0.75)
print("and over bits 17 to 32, twice the trained length:       ", scratchpad[:, 16:].mean(1).min() > 0.75)
print("blank tokens: below 0.65 on average from bit 6 on:      ", parities["blank tokens"][:, 5:].mean(1).max() < 0.65)

# %% [markdown]
# (The last tenth is a matter of rounding: on other processors the same training ends between 0.9 and 1, so the picture
# above is not compared.)
#
# The scratchpad turns one question about all bits into many questions about two tokens. A caution about what this
# shows: parity is not impossible for a fixed depth, since counting can be done by one uniform attention; it is hard
# to *learn*, and no seed of ours did in 200 steps. Impossible, under standard conjectures, are harder chains, such as
# following permutations.
#
# Written steps are paid for in length: each is a token to be cached, and read by all later ones. That is where this
# section meets the others.

# %% [markdown]
# ### Four ways in which attention fails
#
# #### Blow-up
#
# Section 4.1 and the first trap: memory and operations, with the square of the length.
#
# #### Positions that were never seen
#
# Section 4.3 (where RoPE fails) and 4.5 (what repairs it).
#
# #### Sinks: the weight has to go somewhere
#
# **What does a head do when it has nothing to look for?** A softmax sums to 1, so it cannot say "nothing". Trained
# models park the weight on the first tokens (Xiao et al. 2023, arXiv 2309.17453). Throw those away and the rest is
# inflated:

# %%
scores = np.array([4.0] + [0.0] * 7)                        # a head that rests on the first token
def weights_of(s):
    return np.exp(s - s.max()) / np.exp(s - s.max()).sum()

kept, evicted = weights_of(scores), weights_of(scores[1:])
print(f"weight on the seven others with the sink: {kept[1:].sum():.2f}, after it was evicted: {evicted.sum():.2f}")

# %% [markdown]
# A head that added almost nothing now adds an average of everything. Lecture 05 comes back to this, with models that
# are trained.
#
# #### Dilution, and "uniform attention destabilises training"
#
# **How much must a needle's score stand out as the text grows?** Against $n - 1$ keys of score 0, a margin $m$ gives
# it the weight $e^m / (e^m + n - 1)$.

# %%
print("       n   weight at margin 6   margin for a weight of 0.9   largest slope of a uniform softmax")
for n in (32, 1024, 131_072):
    weight = np.exp(6) / (np.exp(6) + n - 1)
    margin = np.log(9 * (n - 1))
    print(f"{n:8,d} {weight:20.3f} {margin:28.1f} {(1 - 1 / n) / n:36.1e}")

# %% [markdown]
# The margin has to grow with $\ln n$. **Does it, in a model trained at 32?** Measured: the weight that our readers
# without positions give to the one statement they are asked for, and the weight at 512 that the formula predicts from
# their margin at 32.

# %%
@torch.no_grad()
def needle_weight(model, n, batch=40):
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

dilution = np.array([[needle_weight(model, n) for n in (32, 128, 512)] for model in readers["no positions"]])
margin = np.log(32 * dilution[:, 0] / (1 - dilution[:, 0]))
predicted = np.exp(margin) / (np.exp(margin) + 512)
print("median weight on the needle, three seeds, above 0.9 at 32, 128 and 512:", dilution.min() > 0.9)
print("margin at 32, as the formula counts it, above 7:                       ", margin.min() > 7)
print("at 512 more weight than the formula predicts:                          ", (dilution[:, 2] > predicted).all())

# %% [markdown]
# These readers learned a larger margin than 32 needed, and lose little up to 512. The formula is a worst case: it lets
# every other key score 0, and hay does not score that well here.
#
# A sentence in glossaries says that *uniform attention early in training makes gradients unstable*. It does not. The
# last column above is the largest slope $\partial w / \partial s$ of a uniform row, $(1 - 1/n)/n$, about $1/n$:
# uniform attention has small gradients, not wild ones. The instability that was reported is the opposite, **entropy
# collapse**: rows that become too sharp (Zhai et al. 2023, arXiv 2303.06296).

# %% [markdown]
# ### The table of variants: complexity, measured
#
# **Which variant grows how?** Most tables copy their exponents. Here five variants run at four lengths, each matrix
# product is counted, the peak of the memory beyond the inputs is taken, and the exponents are fitted.

# %%
count = 0
def mm(a, b):
    global count
    count += 2 * a.size * b.shape[-1]
    return a @ b

def rows_of(q, k, v):                                        # softmax attention, in as few matrices as NumPy allows
    s = mm(q, k.T)
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    return mm(s, v) / s.sum(axis=-1, keepdims=True)

def in_blocks(q, k, v, size=64, window=None):
    out = np.empty_like(v)
    for i in range(0, len(q), size):
        first = 0 if window is None else max(0, i - window)
        last = len(k) if window is None else i + size
        out[i:i + size] = rows_of(q[i:i + size], k[first:last], v[first:last])
    return out

def linear(q, k, v):
    q, k = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k))
    return mm(q, mm(k.T, v)) / mm(q, k.sum(axis=0)[:, None])

# %%
variants = {"full": rows_of, "full, 64 queries at a time": in_blocks,
            "window of 128, in blocks": lambda q, k, v: in_blocks(q, k, v, window=128), "linear (elu + 1)": linear,
            "decode: one query, cached": lambda q, k, v: rows_of(q[:1], k, v)}
lengths, rng = 2 ** np.arange(10, 14), np.random.default_rng(0)
print(f"{'variant':28s} FLOPs ~ n^   peak bytes ~ n^")
for name, variant in variants.items():
    flops, peaks = [], []
    for n in lengths:
        q, k, v = rng.standard_normal((3, n, 32), dtype=np.float32)
        count = 0
        tracemalloc.start()
        variant(q, k, v)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        flops.append(count)
    slope = [np.polyfit(np.log(lengths), np.log(y), 1)[0] for y in (flops, peaks)]
    print(f"{name:28s} {slope[0]:10.1f} {slope[1]:17.1f}")

# %% [markdown]
# (The 0.8 is an exponent of 1 with a constant beside it: at 1,024 the blocks and NumPy's own objects still count.)
#
# When to use which: *full, in blocks* (flash) whenever it can be afforded, since it is exact; a *window* where
# neighbours matter and a few full layers carry the rest; *linear* where the length is unbounded and exact recall is
# not the task. Grouped and latent heads are not in the table: they change the constants of the last row, not its
# exponent.

# %% [markdown]
# ### A recipe for a long-context model
#
# The usual list says: pick flash attention, pick sparse attention, train on long text, done. In the light of this
# lecture:
#
# 1. Say which *task* needs the length, and write its test first: needles at all depths, tracking, counting, loss by
#    position.
# 2. Compute the cost at that length: share of attention, bytes of the cache, tokens a second (4.7). Then choose
#    heads and layers.
# 3. Train short for most of the budget; full attention is cheap there (4.1).
# 4. Raise the base or rescale the rotations, and go on training on *long documents whose ends need their beginnings*
#    (4.5).
# 5. Measure the effective length, not the claimed one (4.4), at every step of the extension.
# 6. Exact kernels first (lecture 06). Approximate attention only where step 2 says that exact is too dear.

# %% [markdown]
# ### Reading: "Why AI language models choke on too much text"
#
# T. B. Lee, Ars Technica, 20 December 2024: a history of the problem for a general audience, from RNNs to state-space
# models. Read it with this lecture beside it. Three questions: which of its costs are operations and which are bytes?
# Where does "scales with the square" hold, and from which length on does it matter (exercise 4.1)? Which of the
# lengths it lists are claimed, which are effective? And for scratchpads: B. Brubaker, Quanta Magazine, 21 March 2024,
# "How Chain-of-Thought Reasoning Helps Neural Networks Compute".

# %% [markdown]
# ## Glossary
#
# The first line of each function's own description.

# %%
import inspect

from IPython.display import Markdown

from attention import long_context

terms = {"share of attention": "attention_share", "KV cache, its bytes": "kv_cache_bytes", "needle": "place_needle",
         "loss by position": "loss_by_position", "effective length": "effective_length",
         "segment recurrence": "SegmentMemory", "relative shift": "relative_shift",
         "softmax of rows": "softmax_rows_numpy", "matrix product": "matmul_numpy"}
rows = ["| term | name here | what it is |", "|---|---|---|"]
rows += [f"| {term} | `{name}` | {inspect.getdoc(getattr(long_context, name)).splitlines()[0]} |"
         for term, name in terms.items()]
Markdown("\n".join(rows))

# %% [markdown]
# *Prefill* is the first reading of a prompt, *decoding* the writing of tokens one by one. *Arithmetic intensity* is
# FLOPs per byte moved, the *ridge* the intensity at which the two limits of a chip meet. A *claimed* length is one
# that the positions allow, an *effective* one was measured.

# %% [markdown]
# ## Summary
#
# - Time and memory of plain attention grow with $n^2$; a cache makes the next token linear and costs bytes. The
#   share of attention in the operations of one token of a 70B model is 2 % at 1k and 71 % at 128k.
# - Prompts are limited by the scores that are written, decoding by the cache that is read. Different cures.
# - A claimed length is about positions. Needles, tracking, counts and the loss by position measure what is used, and
#   differ.
# - RoPE breaks past its trained length. Interpolation and YaRN repair it, in our readers without training;
#   memory across segments extends the reach by a segment a layer, which is not yet use.
# - Written steps add depth, and length.
#
# **Exercises left.**
#
# 1. Train a reader with three layers on documents of two hops (`train_reader` has to pass them on). Does it follow
#    two steps, and a third?
# 2. Train the ALiBi reader *with* a memory of 32, so that the loss of the fourth segment reaches facts of the first.
#    Does the effective context approach the reach?
# 3. Give the common-word task a share that falls with the length. From where on does it fail?
# 4. Add a model of your choice to `data/long_context_models.json`, with its source. From which length on does its
#    cache outweigh its weights?
#
# **Sources.** Dai et al. 2019 (arXiv 1901.02860) · Chen et al. 2023 (2306.15595) · Peng et al. 2023 (2309.00071) ·
# Liu et al. 2023 (2307.03172) · Xiao et al. 2023 (2309.17453) · Hsieh et al. 2024 (2404.06654) and the table in its
# repository · Llama team 2024 (2407.21783) · Zhai et al. 2023 (2303.06296) · Merrill, Sabharwal 2023 (2310.07923) ·
# Feng et al. 2023 (2305.15408) · NVIDIA H100 data sheet.
