# ---
# jupyter:
#   course:
#     module: fundamentals
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lecture 01 · Attention fundamentals
#
# **Where we are.** You know matrix products, gradients, and what training a network means. **The question:** a network
# that reads a sequence has to use something it saw long ago. How can it look back? **What you build:** attention, three
# times with one signature: in NumPy to understand it, in PyTorch to train it, in CUDA to see where its bytes go. The
# eleven lectures after this one import what is built here.
#
# | part | sections | minutes |
# |---|---|---|
# | 1 · The problem, in experiments | 1.1 to 1.3 | 40 |
# | 2 · The mechanism, in NumPy | 1.4 to 1.9, exercises 1.1 to 1.5 | 115 |
# | 3 · PyTorch: attention that learns | exercise 1.6 | 55 |
# | 4 · CUDA: where the bytes go | exercises 1.7 to 1.9 | 110 |
# | Traps | questions and answers | 30 |
# | Going further | short sections, in any order, exercise 1.10 | as you like |
#
# Alone, with all exercises, that is about six hours. In class it is two hours of 50 minutes, with the exercises at
# home.
#
# **How an exercise works:** write your code in place of `raise NotImplementedError` (in a kernel, `// your code here`),
# run the cell, run the `check` below it. It tells you which properties hold. Until yours passes, the lecture goes on
# with the finished version, so that every later cell runs.

# %% [markdown] tags=["teacher"]
# **For the teacher: two hours of 50 minutes.** Run everything before class; the translators of part 1 are the slowest
# cells.
#
# - *Hour 1.* The problem, both curves, skipping the helper code (10) · 1.2: the stream, the table, the four curves, the
#   diagonal (8) · 1.3: figure and factors (5) · 1.4 (8) · 1.5: loop equals matrix (5) · 1.6: overflow, the table over d
#   (6) · 1.7 on paper (8).
# - *Hour 2.* 1.9: masks, the leak, the mask that comes too late (8) · the translator: formulas and alignment, without
#   the class (8) · 1.8: "it", the best heads, the control (8) · CUDA: the forgotten guard, coalescing (8), bytes of the
#   three kernels, banks, bytes of the tiled one (10) · traps: `is_causal`, mask polarity, permutation (8).
# - *At home.* 1.1 and 1.3 to 1.5 after hour 1, 1.2 and 1.7 after hour 2; 1.6, 1.8 and 1.9 for volunteers.
# - *Ask before scrolling.* The outputs stand below the questions. To clear them: Edit, Clear Outputs of All Cells.
# - *Questions that come.* Is the fixed vector only under-trained? Try the first exercise left at the end. Does the
#   tiled kernel win because of the matrix? For two reasons, see the traffic table.

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
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from utils import cuda
from utils.data import Vocabulary

# %% [markdown]
# ## Part 1 · The problem, in experiments

# %% [markdown]
# ### 1.1 Historical context
#
# **How old is the idea?** Older than its name. It is a weighted sum whose weights depend on the data.

# %%
history = [
    (1990, "Elman network", "a recurrent net: memory is its own last state"),   # Cognitive Science 14, 179-211
    (1991, "fast weights", "outer products of two learned patterns as a memory"),   # Schmidhuber; see 2102.11174
    (1997, "LSTM", "gates that keep a state over long times"),   # Hochreiter, Schmidhuber, Neural Computation 9(8)
    (2013, "soft window", "handwriting that moves along its text"),   # Graves, 1308.0850
    (2014, "seq2seq", "a sentence squeezed into one vector"),   # Sutskever et al., 1409.3215
    (2014, "additive attention", "the decoder searches the source at each word"),   # Bahdanau et al., 1409.0473
    (2015, "Luong attention", "dot, general and concat; global and local"),   # 1508.04025
    (2016, "key-value memory", "address by one vector, read another"),   # Miller et al., 1606.03126
    (2017, "Transformer", "attention without recurrence, in many heads"),   # Vaswani et al., 1706.03762
    (2019, "multi-query", "heads share keys and values"),   # Shazeer, 1911.02150
    (2020, "linear attention", "no softmax, a state of fixed size"),   # Katharopoulos et al., 2006.16236
    (2021, "RoPE", "positions as rotations"),   # Su et al., 2104.09864
    (2022, "FlashAttention", "exact attention, tile by tile"),   # Dao et al., 2205.14135
    (2022, "mixture of heads", "each token is routed to a few heads"),   # Zhang et al., 2210.05144
    (2023, "grouped-query", "groups of heads share keys and values"),   # Ainslie et al., 2305.13245
    (2024, "latent attention", "a compressed cache of keys and values"),   # DeepSeek-V2, 2405.04434
    (2024, "differential attention", "the difference of two softmax maps"),   # Ye et al., 2410.05258
    (2025, "native sparse attention", "sparsity that is trained, not cut in later"),   # 2502.11089
]
plotting.timeline(history, title="From a state that remembers to a memory that is searched")
plotting.show("Timeline of 18 steps from the Elman network of 1990 to native sparse attention of 2025.")

# %% [markdown]
# The soft window of 2013 already weighted the characters of a text, by position; the additive attention of 2014
# weighted words by **content**. That paper appeared on arXiv in September 2014 and at ICLR in 2015, which is why both
# years are cited.

# %% [markdown]
# ### The problem: one vector for a whole sentence
#
# **What does it cost to squeeze a sentence into one vector?** The task is translation: numbers in English words, into
# German. It is small enough to learn here, and it has something that word-by-word translation cannot do. German says
# the units before the tens.

# %%
train, test = data.number_words()
pair = next(p for p in train if len(p.source) == 6 and "und" in p.target)
print(" ".join(pair.source), "->", " ".join(pair.target))
print(f"{len(train):,} pairs to learn from, {len(test):,} others to test with")
print(f"the longest number has {max(len(p.source) for p in test)} English words")

# %% [markdown]
# A **recurrent net** reads one word at a time and rewrites a vector, its state: $h_t = f(h_{t-1}, x_t)$. Here one reads
# the English words forwards and another backwards, and their last states together are **one vector** of 96 numbers. A
# third writes the German words from that. This is an encoder-decoder. We borrow the finished class; part 3 takes it
# apart. (It is trained in double precision: in single, two processors round differently, and after some hundred steps
# their curves differ visibly.)

# %%
from attention.fundamentals import Seq2Seq

english, german = Vocabulary([p.source for p in train]), Vocabulary([p.target for p in train])

def as_ids(pairs):
    source, target = english.encode([p.source for p in pairs]), german.encode([p.target for p in pairs])
    return torch.from_numpy(source), torch.from_numpy(target)

def trim(ids):
    return ids[:, :(ids != Vocabulary.PAD).sum(1).max()]          # without the columns that are padding only

def translation_batches(source, target, seed):
    rng = np.random.default_rng(seed)
    while True:
        rows = torch.from_numpy(rng.integers(len(source), size=64))
        yield trim(source[rows]), trim(target[rows])

def translation_loss(model, batch):
    source, target = batch
    return F.cross_entropy(model(source, target).mT, target, ignore_index=Vocabulary.PAD)

# %%
source, target = as_ids(train)
test_source, test_target = as_ids(test)
words = np.array([len(p.source) for p in test])

def exactly_right(model):
    """For each test sentence: is the greedy translation right from the first word to the last?"""
    ids, _ = model.translate(test_source, test_target.shape[1])
    return ((ids == test_target) | (test_target == Vocabulary.PAD)).all(1).numpy()

def train_translator(attention, seed):
    model = training.initialise(Seq2Seq(len(english), len(german), attention=attention).double(), seed)
    training.fit(model, translation_batches(source, target, seed), translation_loss, steps=150, lr=6e-3)
    return model

# %% [markdown]
# *Predict.* Sutskever et al. (1409.3215) write of their network that it "did not have difficulty on long sentences",
# Cho et al. (1409.1259), in the same month, that the quality of theirs "degrades rapidly" with the length. Which will
# it be here?

# %%
fixed = [exactly_right(train_translator(None, seed)) for seed in range(3)]

# %%
lengths = np.arange(1, 14)

def by_length(right):
    """Share of exact translations for n and n + 1 words: neighbours are pooled, because short numbers are few."""
    return np.array([right[(words == n) | (words == n + 1)].mean() for n in lengths])

axes = dict(x=lengths, xlabel="English words in the number (n and n + 1)", ylabel="share exactly right (3 seeds)")
results = {"fixed vector": [by_length(right) for right in fixed]}
plotting.curves(results, **axes, title="One vector is enough for short numbers, not for long ones")
plotting.show("Share of exact translations against source length for the fixed vector: from nine in ten at one or two "
              "words down to almost none beyond ten.")

# %%
short, long = words <= 4, words >= 10
print("fixed vector, at most 4 words: more than 3 in 4 right: ", min(right[short].mean() for right in fixed) > 0.75)
print("fixed vector, 10 words and more: fewer than 1 in 10:   ", max(right[long].mean() for right in fixed) < 0.1)

# %% [markdown]
# It degrades with the length. Ninety-six numbers have to hold up to fourteen words and their order, ready for whatever
# the decoder will want to know.
#
# Bahdanau, Cho and Bengio (2014, arXiv 1409.0473) had another idea: keep a vector for *each* word, and let the decoder
# look back at all of them at every step. How it does that is the subject of this lecture. First: is it worth it?
#
# *Predict.* The same encoder, decoder, batches and number of steps, and one tenth more parameters. What does the curve
# look like now?

# %%
translators = [train_translator("additive", seed) for seed in range(3)]
attended = [exactly_right(model) for model in translators]

# %%
results["additive attention"] = [by_length(right) for right in attended]
plotting.curves(results, **axes, title="With attention the length no longer matters")
plotting.show("Share of exact translations against source length: the fixed vector falls from nine in ten to none, "
              "additive attention stays near one.")

print("attention: more than 90 % right:                    ", min(right.mean() for right in attended) > 0.9)
print("attention, 10 words and more: more than 90 % right: ", min(right[long].mean() for right in attended) > 0.9)
print("fixed vector after the same 150 steps: under 60 %:  ", max(right.mean() for right in fixed) < 0.6)

# %% [markdown]
# The paper's figure 2 shows the same effect in BLEU, a score of translations: its fixed-vector models (RNNenc) drop;
# the attention model trained on up to 50 words (RNNsearch-50) shows "no performance deterioration even with sentences
# of length 50 or more" (section 5.1). Two cautions about ours. It is a snapshot after 150 steps; what more steps change
# is an exercise left at the end. And Sutskever's sentence is true of *his* network, four LSTM layers of 1,000 cells.
# Whether a vector is a bottleneck depends on how much has to pass through it.

# %% [markdown]
# ### 1.2 From windows to attention: four ways to remember
#
# **What was the symbol k steps ago?** Sixteen symbols go by, each one of eight. Then comes the question, for every k
# from 0 to 15. Whoever guesses is right one time in eight.

# %%
def streams(seed, batch=64):
    rng = np.random.default_rng(seed)
    while True:
        yield [torch.from_numpy(ids) for ids in data.recall_stream(rng, batch, seq_len=16, n_symbols=8)]

stream, answers = next(streams(seed=0))
print("stream:           ", *stream[0].tolist())
print("k = 0, 1, ..., 15:", *answers[0].tolist())

# %% [markdown]
# Four networks, in the order of their invention. They have the same embeddings and the same last two layers. They
# differ in what they hand over when the question comes:
#
# | memory | hands over |
# |---|---|
# | window | the last four symbols, mixed by one layer (a feed-forward net) |
# | RNN | its state: one vector, rewritten at every step |
# | LSTM | its state: one vector, and gates that decide how much of it is rewritten |
# | attention | for each question another blend of all sixteen symbols |
#
# The attention is three lines, which part 2 takes apart. Here the question is the *query*, a symbol with its place is
# a *key*, the symbol alone a *value*.

# %%
class Recall(nn.Module):
    """Reads streams (batch, 16) and answers for every lag k at once: logits (batch, 16, 8)."""

    def __init__(self, memory, seq_len=16, n_symbols=8, d=32, window=4):
        super().__init__()
        self.memory, self.window = memory, window
        self.symbol = nn.Embedding(n_symbols, d)
        self.question = nn.Embedding(seq_len, d)                  # one vector for each lag k
        self.answer = nn.Sequential(nn.Linear(2 * d, 2 * d), nn.ReLU(), nn.Linear(2 * d, n_symbols))
        match memory:
            case "window": self.mix = nn.Linear(window * d, d)
            case "RNN": self.mix = nn.RNN(d, d, batch_first=True)
            case "LSTM": self.mix = nn.LSTM(d, d, batch_first=True)
            case "attention": self.place = nn.Embedding(seq_len, d)

    def attend(self, x):
        scores = self.question.weight @ (x + self.place.weight).mT / math.sqrt(x.shape[-1])
        return torch.softmax(scores, dim=-1)                      # (batch, 16 questions, 16 places)

    def values(self, x):
        return x

    def forward(self, stream):
        x = self.symbol(stream)                                   # (batch, 16, d)
        match self.memory:
            case "window": found = self.mix(x[:, -self.window:].flatten(1))[:, None]
            case "attention": found = self.attend(x) @ self.values(x)
            case _: found = self.mix(x)[0][:, -1:]                # the last state answers every question
        question = self.question.weight.expand_as(x)
        return self.answer(torch.cat([found.expand_as(x), question], dim=-1))

# %% [markdown]
# *Predict.* Sketch four curves, accuracy against k, after 500 steps of training. Where does each one fall? Is the
# LSTM above the RNN for every k?

# %%
def recall_loss(model, batch):
    stream, answers = batch
    return F.cross_entropy(model(stream).mT, answers)

def train_recall(model, seed):
    training.initialise(model.double(), seed)
    training.fit(model, streams(seed), recall_loss, steps=500, lr=1e-2)
    return model

@torch.no_grad()
def recall_accuracy(model):
    stream, answers = next(streams(seed=99, batch=1000))
    return (model(stream).argmax(-1) == answers).double().mean(0).numpy()      # one number for each lag

# %%
memories = ("attention", "window", "RNN", "LSTM")
models = {memory: [train_recall(Recall(memory), seed) for seed in range(3)] for memory in memories}
accuracy = {memory: np.array([recall_accuracy(model) for model in three]) for memory, three in models.items()}

# %%
plotting.curves(accuracy, xlabel="k: the symbol asked for stood k steps before the last", ylabel="accuracy (3 seeds)",
                title="A state forgets, a window ends, attention does neither", threshold=1 / 8, threshold_name="chance")
plotting.show("Accuracy against the lag k for four memories, chance as a thin grey line: attention stays at 1, the window "
              "drops to chance at 4, the RNN falls to 0.2 by 7, the LSTM falls slowly and rises again at the end.")

# %%
print("attention: above 0.95 for every k:                 ", accuracy["attention"].min() > 0.95)
print("window: above 0.95 up to k = 3, then below 0.2:    ",
      accuracy["window"][:, :4].min() > 0.95 and accuracy["window"][:, 4:].max() < 0.2)
print("RNN: above 0.85 up to k = 2, below 0.3 from k = 10:",
      accuracy["RNN"][:, :3].min() > 0.85 and accuracy["RNN"][:, 10:].max() < 0.3)
print("LSTM: from k = 10 better than the RNN by 0.1:      ",
      accuracy["LSTM"][:, 10:].mean() > accuracy["RNN"][:, 10:].mean() + 0.1)
print("LSTM: at k = 2 and 3 worse than the RNN by 0.1:    ",
      accuracy["LSTM"][:, 2:4].mean() < accuracy["RNN"][:, 2:4].mean() - 0.1)

# %% [markdown]
# The window answers what it sees and guesses the rest. A larger window moves the cliff and costs weights for every
# step it looks back.
#
# The RNN rewrites its state at every step, and after six or so little is left. The LSTM spreads the same room over the
# whole stream: worse on recent symbols, better on old ones, and good again at the very first, which arrive while the
# state is still empty. Both hand over 32 numbers for 16 symbols (the LSTM carries 32 more, its cell), and had 500 steps
# to learn how to use them.
#
# (A convolution is a window that slides: its reach grows with its depth. GANs are a way of training, not of
# remembering. A Transformer is attention in layers, lecture 02.)
#
# Attention hands over nothing in advance. It goes to the place when the question is known:

# %%
with torch.no_grad():
    model = models["attention"][0]
    weights = model.attend(model.symbol(stream)).numpy()          # (64, 16, 16)
plotting.heatmap(weights[0], queries=[f"k={k}" for k in range(16)], keys=stream[0].tolist(),
                 title="Question k looks k places back from the last symbol")
plotting.show("Heat map of one stream's attention weights, questions as rows and symbols as columns: a single diagonal "
              "from upper right to lower left.")

places = weights.argmax(-1) == np.arange(15, -1, -1)
print("the largest weight lies k places back, in more than 95 % of all rows:", places.mean() > 0.95)

# %% [markdown]
# ### 1.3 Why direct connections matter
#
# **Why does an RNN forget?** Learning needs a gradient. If the output at the end hardly changes when an input far
# back changes, nothing can be learned about that input. We measure it before any training: the norm of the Jacobian
# $\partial\, \mathrm{out}_T / \partial x_t$ against the distance $T - t$.
#
# *Predict.* One step of an RNN multiplies the gradient by a matrix, and here its typical gain is about one half. What
# is left after 49 steps? And in attention, where $x_t$ reaches the output in one step from anywhere?

# %%
class OneHead(nn.Module):
    """Attention of a sequence (n, d) to itself. Returns (output (n, d), weights (n, n))."""

    def __init__(self, d):
        super().__init__()
        self.w_q, self.w_k, self.w_v = (nn.Parameter(torch.randn(d, d)) for _ in range(3))

    def forward(self, x):
        scores = (x @ self.w_q) @ (x @ self.w_k).mT / math.sqrt(x.shape[-1])
        weights = torch.softmax(scores, dim=-1)
        return weights @ (x @ self.w_v), weights

# %%
def influence(network, seed, forget_bias=0.0, n=50, d=32):
    """Norm of d out_T / d x_t for the distances T - t = 1 ... n - 1 in an untrained network, in float64: (n - 1,)."""
    training.initialise(network.double(), seed)
    if forget_bias:
        network.bias_ih_l0.data[d:2 * d] += forget_bias           # torch's order: input, forget, cell, output
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)))
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x)[0][-1], x)      # (d, n, d)
    return jacobian.norm(dim=(0, 2)).flip(0)[1:].numpy()

# %%
influences = {
    "RNN": [influence(nn.RNN(32, 32), seed) for seed in range(3)],
    "LSTM": [influence(nn.LSTM(32, 32), seed) for seed in range(3)],
    "LSTM, forget bias 1": [influence(nn.LSTM(32, 32), seed, forget_bias=1.0) for seed in range(3)],
    "LSTM, forget bias 3": [influence(nn.LSTM(32, 32), seed, forget_bias=3.0) for seed in range(3)],
    "attention": [influence(OneHead(32), seed) for seed in range(3)],
}
plotting.curves(influences, x=np.arange(1, 50), log_y=True, xlabel="distance $T - t$",
                ylabel=r"norm of $\partial\,\mathrm{out}_T / \partial x_t$",
                title="As initialised, RNN and LSTM lose the gradient exponentially, attention does not")
plotting.show("Norm of the Jacobian against distance on a logarithmic axis: straight falling lines for RNN, LSTM "
              "and LSTM with forget bias 1, flat ones for attention and for an LSTM with forget bias 3.")

# %% [markdown]
# A straight line on a logarithmic axis is an exponential. Its slope is the factor that one step costs.

# %%
for name, curves in influences.items():
    slope = np.polyfit(np.arange(1, 50), np.log(np.mean(curves, axis=0)), 1)[0]
    print(f"{name:20s} one step: × {np.exp(slope):.2f}    49 steps: × {np.exp(49 * slope):.0e}")

# %% [markdown]
# The RNN leaves less than $10^{-14}$ after 49 steps. That is the vanishing gradient (Bengio et al. 1994; Pascanu et
# al. 2012, arXiv 1211.5063). Attention is flat: its share of $1/n$ for each input is small, but it is the same near
# and far.
#
# Two remarks. **An LSTM as torch initialises it decays too**: its gates start half closed. With the usual bias of 1 on
# the forget gates the line still falls, with 3 it is flat. An LSTM can remember; it has to be told to, or learn to. And
# **flat is not free**: attention computes a score for each pair, $n^2$ of them, where an RNN makes $n$ steps.

# %% [markdown]
# ## Part 2 · The mechanism, in NumPy

# %% [markdown]
# ### 1.4 Queries, keys and values
#
# **What is attention, before it is a network?** It is a dictionary that answers with a blend.
#
# A Python dictionary compares a query with every key. Exactly one must match, and its value comes back.

# %%
legs = {"cat": 4.0, "bird": 2.0, "spider": 8.0}
print(f"legs['bird'] = {legs['bird']}")

# %% [markdown]
# Strings match or do not match. Vectors can match *more or less*. So each key becomes a vector, the comparison becomes
# a dot product, and a softmax turns the three comparisons into shares that sum to 1.
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
# Not at $\beta = 1$: a key that matches less still gets a share, and 4.46 legs is nobody's number. As $\beta$ grows the
# shares become one-hot and the soft dictionary turns into the hard one. In between it is differentiable: a small turn
# of the query changes the answer a little, and gradient descent can use that.
#
# The three roles have names. The **query** $q$ says what is wanted. A **key** $k_j$ says what item $j$ offers to be
# found by. The **value** $v_j$ is what item $j$ hands over.
#
# #### Why keep keys and values apart?
#
# The keys decide *where* to look; the values decide *what* comes back. Swap the values only:

# %%
values_swapped = np.array([0.2, 1.5, 0.01])                 # the same animals, now their weight in kg
shares, _ = lookup(np.array([0.0, 1.0]), 10)
print("shares unchanged:", np.round(shares, 3))
print(f"legs {shares @ values:.2f}, weight {shares @ values_swapped:.2f} kg")

# %% [markdown]
# One search served two questions. With $v_j = k_j$ an item hands over the very features it is found by. That costs
# room, as an experiment under Going further shows; with room enough it does no harm.
#
# ### 1.5 Dot-product attention
#
# **How does this look for many queries at once, in the letters of the papers?** Each of $n$ queries gets its own shares
# over $m$ keys:
#
# $$ s_{ij} = \frac{q_i \cdot k_j}{\sqrt{d}} \qquad
#    p_{ij} = \frac{e^{s_{ij}}}{\sum_{j'} e^{s_{ij'}}} \qquad
#    o_i = \sum_j p_{ij}\, v_j $$
#
# The $s_{ij}$ are **scores**, the $p_{ij}$ are **attention weights**; each row of weights sums to 1. The division by
# $\sqrt d$ is explained in section 1.6.
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
# The number has not changed. PyTorch ships the same function, and an independent implementation is the best test there
# is.

# %%
out_torch = torch.nn.functional.scaled_dot_product_attention(*(torch.from_numpy(a)[None, None] for a in (q, k, v)))
print("agrees with PyTorch to 1e-12:", np.allclose(out_torch[0, 0].numpy(), out, atol=1e-12))

# %% [markdown]
# One such attention, with queries, keys and values of its own, is called a **head**. Real models run several side by
# side (lecture 02); `d_head` is the length of a head's queries and keys.
#
# When queries, keys and values are all computed from the *same* sequence, this is **self-attention**. When the queries
# come from one sequence and the keys and values from another, it is **cross-attention**. The formula does not know the
# difference.
#
# What does it cost? Two matrix products of $n \cdot m \cdot d$ multiply-adds each: $4\,n\,m\,d$ floating-point
# operations, and $n \cdot m$ weights to keep. For a sequence that attends to itself both grow with the square of its
# length. Lecture 04 is about that square.

# %% [markdown]
# ### 1.6 The softmax, and why the scores are divided by $\sqrt d$
#
# **What can go wrong with $e^s$?** In 64-bit floats $e^{710}$ is already infinite, and infinity over infinity is not a
# number.

# %%
row = np.array([1000.0, 999.0, 0.0])
with np.errstate(over="ignore", invalid="ignore"):
    naive = np.exp(row) / np.exp(row).sum()
shifted = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
print("naive:  ", naive)
print("shifted:", np.round(shifted, 3))

# %% [markdown]
# Subtracting one number from every score multiplies numerator and denominator by the same factor, so the weights stay
# what they were; and with the row's maximum subtracted no exponent is positive. Nothing overflows.
#
# #### Exercise 1.1: a softmax that survives  (difficulty 2 of 5, 10 minutes)
#
# Write the shifted softmax, once for the whole course.
#
# | argument | shape | meaning |
# |---|---|---|
# | `x` | any | scores; `-inf` means "not allowed" and gets weight 0 |
# | `axis` | int | the axis along which the weights sum to 1 |
#
# Returns weights of the shape and float type of `x`. A row in which *nothing* is allowed has no weights that sum to 1:
# it is all zeros, never nan. The input stays as it was.
#
# <details><summary>Hint</summary>
#
# What is the maximum of a row of only -inf, and what is -inf minus -inf? Replace that maximum by 0 before subtracting;
# then look at the denominator of the same row.
#
# </details>

# %% tags=["exercise", "export"]
def softmax(x, axis=-1):
    """Softmax along one axis, shifted by the maximum so that no finite score overflows.

    x: floats of any shape; -inf gives weight 0. Returns an array of the same shape and float type.
    A row of only -inf is all zeros: nothing may be attended to, so nothing is.
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
# #### Why $\sqrt d$?
#
# Let the entries of $q$ and $k$ be independent with mean 0 and variance 1. Each product $q_t k_t$ then has variance 1,
# and the dot product adds $d$ of them: its variance is $d$ and its typical size $\sqrt d$ (Vaswani et al. 2017, section
# 3.2.1, footnote 4).
#
# *Predict.* With 64 random keys and no training at all, is the largest weight on average nearer to 1/64, to one half or
# to
# 1: with $d = 16$? With $d = 1024$? (Of 64 normal draws the largest lies about 2.4 standard deviations out.)

# %%
sizes = [16, 64, 256, 1024]

def softmax_of_random(d, scale, n_keys=64, rows=500):
    """Mean over random rows of the largest weight, of the trace of the softmax Jacobian, and of the entropy (nats)."""
    draw = np.random.default_rng(1)
    q, k = draw.standard_normal((rows, 1, d)), draw.standard_normal((rows, d, n_keys))
    p = softmax((q @ k)[:, 0] * scale)
    return p.max(-1).mean(), (p * (1 - p)).sum(-1).mean(), -(p * np.log(p + 1e-300)).sum(-1).mean()

for d in sizes:
    for name, scale in (("q·k", 1), ("q·k / √d", 1 / np.sqrt(d))):
        peak, slope, entropy = softmax_of_random(d, scale)
        print(f"d {d:4d}, {name:9s} largest weight {peak:.2f}, entropy {entropy:.2f}, trace of the Jacobian {slope:.2f}")

# %% [markdown]
# (The entropy of a row is $-\sum_j p_j \ln p_j$: 0 when one key has everything, $\ln 64 = 4.16$ when all 64 are equal.)
# Without the scale an untrained head with $d = 1024$ has already decided: one key gets 95 % of the weight, chosen by
# chance. With it, the weights start spread out whatever the size.
#
# The last column says why that matters. The derivative of the softmax is the Jacobian $\partial p_i /
# \partial s_j = p_i(\delta_{ij} - p_j)$, and its trace $\sum_i p_i (1 - p_i)$ measures how much the weights still react
# to the scores. A saturated softmax hardly reacts, so hardly any gradient comes through.

# %%
rows = {"q·k": [softmax_of_random(d, 1)[1] for d in sizes],
        "q·k / √d": [softmax_of_random(d, 1 / np.sqrt(d))[1] for d in sizes]}
plotting.curves(rows, x=sizes, xlabel="size of a head, $d$ (entries)", ylabel="trace of the softmax Jacobian",
                title="Unscaled scores saturate the softmax as d grows").set_xscale("log", base=2)
plotting.show("Two lines over the head size: unscaled, the trace of the Jacobian falls from about one half towards "
              "zero; scaled by the square root of d it stays near one.")

# %% [markdown]
# ### Seven scores, one table
#
# A score says how well a query and a key match. Since 2014 at least seven functions have been proposed for it. **What
# do they share, what does each cost, and are they really seven?**

# %% [markdown]
# #### Exercise 1.2: the first score  (difficulty 2 of 5, 10 minutes)
#
# The dot product is not the only way to compare a query with a key, and not the oldest. Additive attention lets a tiny
# network do it:
#
# $$ e_{ij} = v^\top \tanh(q_i W_q + k_j W_k) $$
#
# | argument | shape | meaning |
# |---|---|---|
# | `q` | `(n_queries, d_q)` | queries |
# | `k` | `(n_keys, d_k)` | keys; they may be of another size |
# | `w_q`, `w_k` | `(d_q, d_a)`, `(d_k, d_a)` | projections into a common space |
# | `v` | `(d_a,)` | turns each sum into one number |
#
# Returns scores `(n_queries, n_keys)`, without a softmax.
#
# <details><summary>Hint</summary>
#
# Project first, then let `[:, None, :]` and `[None, :, :]` make every pair. Three axes under the tanh, two after `@ v`.
#
# </details>

# %% tags=["exercise", "export"]
def additive_scores(q, k, w_q, w_k, v):
    """Additive score e_ij = v . tanh(q_i w_q + k_j w_k) of each query with each key.

    q (n_queries, d_q), k (n_keys, d_k), w_q (d_q, d_a), w_k (d_k, d_a), v (d_a,). Returns (n_queries, n_keys).
    Source: Bahdanau et al. 2014 (arXiv 1409.0473), appendix A.1.2.
    """
    ### BEGIN SOLUTION
    return np.tanh((q @ w_q)[:, None, :] + (k @ w_k)[None, :, :]) @ v
    ### END SOLUTION

# %%
additive_scores = check("1.2", additive_scores)

# %% [markdown]
# All seven, one branch each.

# %%
def score(kind, q, k, *weights):
    """Scores (n_queries, n_keys) of queries q (n_queries, d) against keys k (n_keys, d); kind names the function."""
    match kind:
        case "dot":
            return q @ k.T
        case "scaled dot":
            return q @ k.T / np.sqrt(q.shape[-1])
        case "cosine":
            return (q / np.linalg.norm(q, axis=-1, keepdims=True)) @ (k / np.linalg.norm(k, axis=-1, keepdims=True)).T
        case "general":
            return q @ weights[0] @ k.T
        case "location":
            return q @ weights[0]
        case "additive":
            return additive_scores(q, k, *weights)
        case "concat":
            pairs = np.concatenate(np.broadcast_arrays(q[:, None], k[None]), axis=-1)      # (n_queries, n_keys, 2d)
            return np.tanh(pairs @ weights[0]) @ weights[1]
    raise ValueError(f"kind is {kind!r}, which is none of the seven")

# %% [markdown]
# *Predict.* One of the seven never looks at the keys, and two are the same function under two names. Which?
#
# *Additive* has two matrices and a vector, $v^\top \tanh(q W_q + k W_k)$ (Bahdanau writes $W_a$ and $U_a$); *general*,
# *location* and *concat* have one matrix $W$. For *concat* the two matrices of *additive* are stacked, $W = [W_q; W_k]$.

# %%
draw = np.random.default_rng(0)
n_queries, n_keys, d, d_hidden = 6, 50, 16, 32
q, k = draw.standard_normal((n_queries, d)), draw.standard_normal((n_keys, d))
w_q, w_k = draw.standard_normal((2, d, d_hidden)) / np.sqrt(d)
v = draw.standard_normal(d_hidden)

weights = {
    "dot": (), "scaled dot": (), "cosine": (),
    "general": (draw.standard_normal((d, d)) / np.sqrt(d),),
    "location": (draw.standard_normal((d, n_keys)) / np.sqrt(d),),
    "additive": (w_q, w_k, v),
    "concat": (np.concatenate([w_q, w_k]), v),
}

# %% [markdown]
# FLOPs, counted as the code above computes: 2 for a multiplication and an addition, 1 for a division or a tanh.

# %%
pairs = n_queries * n_keys
flops = {
    "dot": 2 * d * pairs,
    "scaled dot": 2 * d * pairs + pairs,
    "cosine": 2 * d * pairs + 3 * d * (n_queries + n_keys),
    "general": 2 * d * d * n_queries + 2 * d * pairs,
    "location": 2 * d * pairs,
    "additive": 2 * d * d_hidden * (n_queries + n_keys) + 4 * d_hidden * pairs,
    "concat": 4 * d * d_hidden * pairs + 3 * d_hidden * pairs,
}

# %%
scores = {kind: score(kind, q, k, *weights[kind]) for kind in weights}
print("score        shape     parameters     FLOPs   largest   reads k")
for kind, s in scores.items():
    reads_k = not np.allclose(s, score(kind, q, k[::-1], *weights[kind]))
    parameters = sum(w.size for w in weights[kind])
    print(f"{kind:11s} {s.shape!s:9s} {parameters:10,d} {flops[kind]:10,d} {np.abs(s).max():8.2f}    "
          f"{'yes' if reads_k else 'no'}")

# %% [markdown]
# All seven return one number for each pair; they differ in everything else. *Location* ignores the keys: its matrix
# has one column for each **position**, so it is also tied to a longest length. And *additive* and *concat* are one
# function: $[q; k]\, W_a = q\, W_q + k\, W_k$, whatever the numbers are.

# %%
same = np.allclose(scores["concat"], scores["additive"], atol=1e-10)
print("concat with W = [W_q; W_k] equals additive to 1e-10:", same)
print(f"but written as concat it costs {flops['concat'] / flops['additive']:.0f} times as many FLOPs")

# %% [markdown]
# Written as *additive*, each query and each key is projected once. Written as *concat*, each pair is.
#
# #### What does a bounded score do to the softmax?
#
# A cosine lies between -1 and 1, however long the vectors are. With $n$ keys the largest weight is therefore at most
# $e^{1} / (e^{1} + (n - 1) e^{-1})$.

# %%
print("long vectors leave a cosine unchanged:", np.allclose(scores["cosine"], score("cosine", 100 * q, 100 * k)))
for n in (8, 64, 1024):
    print(f"{n:5d} keys: a cosine can give at most {np.e / (np.e + (n - 1) / np.e):.3f} to the best one")

# %% [markdown]
# It can hardly point. That is why the Neural Turing Machine multiplies its cosine by a learned *key strength* $\beta$
# before the softmax. The dot product has its strength built in: the length of the query.
#
# *Sources: Bahdanau et al. 2014 (arXiv 1409.0473), additive; Luong et al. 2015 (1508.04025, section 3.1), dot,
# general, concat and location; Vaswani et al. 2017 (1706.03762), scaled dot; Graves et al. 2014 (1410.5401), cosine
# with a key strength.*

# %% [markdown]
# ### 1.7 A worked example, start to finish
#
# **Can you do it with a pencil?** Three tokens (the pieces a text is cut into), $d = 4$, integers only. Do the first
# row on paper before you run the cells.

# %%
q = np.array([[2, 0, 1, 0], [0, 2, 0, 2], [1, 1, 1, 1]], float)
k = np.array([[1, 0, 0, 0], [0, 1, 2, 1], [0, 1, 0, 1]], float)
v = np.array([[10, 0, 0, 0], [0, 10, 0, 0], [0, 0, 10, 10]], float)

scores = q @ k.T
print(scores)
assert (scores == [[2, 2, 0], [0, 4, 4], [1, 4, 2]]).all()

# %% [markdown]
# Row 0: $q_0 \cdot k_0 = 2$, $q_0 \cdot k_1 = 2$, $q_0 \cdot k_2 = 0$. Divide by $\sqrt 4 = 2$: the scores are 1, 1 and
# 0. Their exponentials are
# 2.718, 2.718 and 1; they sum to 6.437. So the weights are $2.718 / 6.437 = 0.422$ twice, and $1 / 6.437 = 0.155$.

# %%
weights = softmax(scores / 2)
print(np.round(weights, 3))
assert np.allclose(weights[0], np.array([np.e, np.e, 1]) / (2 * np.e + 1))

# %% [markdown]
# The values are chosen so that the output shows the weights: ten times the weight of token 0, of token 1, and of token
# 2 twice.

# %%
out = weights @ v
print(np.round(out, 2))
assert np.allclose(out[0], 10 * weights[0, [0, 1, 2, 2]])

# %% [markdown]
# Row 1 gives token 0 a small share although their score is 0. A score of zero does not mean "unrelated, so ignored". It
# means $e^0 = 1$ in the numerator. Only $-\infty$ shuts a key out, and that is the next section but one.
#
# ### 1.8 Seeing attention
#
# **How is a matrix of weights read?** One row is one query, and the row sums to 1. So read along rows: *where does this
# token look?* A bright column would be a key that many queries want.

# %%
tokens = ["the", "cat", "sleeps"]
plotting.heatmap(weights, tokens, tokens, title="Each row sums to 1; the words are labels only")
plotting.show('Heat map of the weights of the worked example; the largest, 0.63, is in the row of "sleeps" '
              'and the column of "cat".')

# %% [markdown]
# (The words are labels on the numbers of section 1.7. Nobody trained them.)

# %% [markdown]
# #### Does a trained model know what "it" is?
#
# "The animal didn't cross the street because it was too **tired**." The animal. Put **wide** in its place, and it is
# the street. Many introductions show one head of one model whose weights follow that change. **What do the 72 heads
# of a real model do?**
#
# The model is MiniLM: 6 layers of 12 heads, tuned so that sentences of similar meaning get similar vectors; [CLS] is
# its start token. Layers and heads are counted from 0, as in the code.
#
# *Predict.* In how many of the 72 heads does "it" look clearly more at "animal" than at "street", and in how many is
# it the other way round, when the word is *tired*? And when it is *wide*?

# %%
sentence = "The animal didn't cross the street because it was too {}."
weights, tokens = {}, {}
for word in ("tired", "wide"):
    weights[word], tokens[word] = data.minilm_attention(sentence.format(word))
it, animal, street = (tokens["tired"].index(word) for word in ("it", "animal", "street"))

lean = {word: w[:, :, it, animal] - w[:, :, it, street] for word, w in weights.items()}       # (layers, heads)
for word, difference in lean.items():
    mean = weights[word][:, :, it].mean(axis=(0, 1))
    clear = (difference > 0.03).sum(), (difference < -0.03).sum()
    print(f"{word + ':':6s} {clear[0]} heads prefer the animal by more than 0.03, {clear[1]} the street")
    print(f"       mean weights: animal {mean[animal]:.2f}, street {mean[street]:.2f}, [CLS] {mean[0]:.2f}")

# %% [markdown]
# 17 to 11 for the animal when it is *tired*, 11 to 11 when it is *wide*: a leaning, not an answer, and most heads take no
# side. A third of the weight of "it" goes to the start token. Now the way a talk would do it: search the 72 heads for
# the best picture.

# %%
change = lean["tired"] - lean["wide"]
for layer, head in zip(*np.unravel_index(np.argsort(-change, axis=None)[:3], change.shape)):
    tired, wide = lean["tired"][layer, head], lean["wide"][layer, head]
    print(f"layer {layer} head {head:2d}: animal minus street {tired:+.2f} with tired, {wide:+.2f} with wide")
flips = {margin: ((lean["tired"] > margin) & (lean["wide"] < -margin)).sum() for margin in (0, 0.05)}
print(f"heads that change sides: {flips[0]}; of these with at least 0.05 on both sides: {flips[0.05]}")

# %%
shown = np.stack([weights[word][3, 1, it] for word in ("tired", "wide")])
columns = [token if token not in ("tired", "wide") else "tired/wide" for token in tokens["tired"]]
plotting.heatmap(shown, queries=["it (too tired)", "it (too wide)"], keys=columns,
                 title='With "wide", layer 3 head 1 leaves the animal, mostly for [CLS] and hardly for the street')
plotting.show('Weights of the token "it" in layer 3 head 1, for both sentences: '
              '"animal" falls from 0.68 to 0.28, "street" rises from 0.05 to 0.12, [CLS] rises most.')

# %% [markdown]
# The best head turns away from the animal, but not to the street. No head changes sides clearly. Is even this head
# about meaning? A control: let the street be the subject, and try a sentence about other things.

# %%
controls = [(sentence.format(word), "animal", "street") for word in ("tired", "wide")]
swapped = "The street didn't suit the animal because it was too {}."
controls += [(swapped.format(word), "animal", "street") for word in ("tired", "wide")]
controls += [(f"The cup didn't fit the box because it was too {word}.", "box", "cup") for word in ("small", "big")]
print(f"{'weight of it on the first noun minus the second':60s} {'nouns':15s}  3, 1   5, 11  (layer, head)")
for text, first, second in controls:
    w, words = data.minilm_attention(text)
    row = w[[3, 5], [1, 11], words.index("it")]
    difference = row[:, words.index(first)] - row[:, words.index(second)]
    print(f"{text:60s} {first + ', ' + second:15s} {difference[0]:+.2f}   {difference[1]:+.2f}")

# %% [markdown]
# Layer 5 head 11, at first the most impressive one, looks at "animal" whatever is tired or wide, and whoever is the
# subject. Layer 3 head 1 looks at the **subject**: when that is the street, it takes the street, even a tired one,
# and it takes the cup both times. A picture of one sentence and one head, picked out of 72, is an anecdote. What
# makes it evidence is a prediction about sentences that were not used to pick it.
#
# **See for yourself.** Hover over a token; choose a layer and a head. Below it BertViz shows the twelve heads of layer
# 3 (it was given one layer, so it calls it layer 0).

# %% tags=["nbval-ignore-output"]
plotting.head_viewer(weights["tired"], tokens["tired"],
                     "Attention of MiniLM on the sentence about the tired animal; choose a layer, a head and a token.")

# %%
plotting.bertviz_head_view(weights["tired"][3:4], tokens["tired"],
                           "BertViz on layer 3 of MiniLM and the sentence about the tired animal.")

# %% [markdown]
# #### Are the weights an explanation?
#
# If a map explained an output, another map would give another output. **Can two different maps give the same one?**
#
# Four keys. All values point in one direction: $V = u\,c^\top$, rank 1, with $u = (0, 1, 2, 3)$. By hand: half of 0
# and half of 3 is 1.5, and so is half of 1 and half of 2.

# %%
values = np.outer([0.0, 1.0, 2.0, 3.0], [1.0, -2.0])                  # rank 1
outer, inner = np.array([0.5, 0.0, 0.0, 0.5]), np.array([0.0, 0.5, 0.5, 0.0])
print("outputs:", outer @ values, inner @ values, "  weights in common:", np.minimum(outer, inner).sum())

# %% [markdown]
# They can, without one weight in common. With more keys than $d_\text{head} + 1$ such other maps always exist (the
# section "When does the output determine the weights?" in Going further computes it for a real model). So a map of
# weights is evidence of where a head looked, and not by itself an explanation of the answer.

# %% [markdown]
# ### 1.9 Masks: who may look where
#
# **How do you forbid a look?** A model that predicts the next word must not see it. A batch of sentences of unequal
# length is filled up with padding that must not be read. Both rules are tables of booleans, and in this course **True
# always means "may attend"**.
#
# The score of a forbidden pair is set to $-\infty$ *before* the softmax. Then $e^{-\infty} = 0$, and the row shares its
# weight among what is left.
#
# #### Exercise 1.3: the causal mask  (difficulty 2 of 5, 8 minutes)
#
# Query $i$ may look at key $j$ if $j$ is not in its future: before it *and itself*.
#
# | argument | meaning |
# |---|---|
# | `n_queries` | number of queries |
# | `n_keys` | number of keys; `None` means as many as queries |
#
# Returns booleans `(n_queries, n_keys)`. If there are fewer queries than keys, the queries are the *last* ones of the
# sequence, and so the last query sees every key (lecture 05 needs this: one new token, a hundred remembered keys).
#
# <details><summary>Hint</summary>
#
# Compare a column of query positions with a row of key positions. At which position does the first query stand?
#
# </details>

# %% tags=["exercise", "export"]
def causal_mask(n_queries, n_keys=None):
    """Boolean (n_queries, n_keys), True where key j is not after query i; aligned at the bottom right.

    With more queries than keys the first rows see nothing. Raises ValueError for a negative size.
    """
    n_keys = n_queries if n_keys is None else n_keys
    if n_queries < 0 or n_keys < 0:
        raise ValueError(f"n_queries and n_keys must not be negative, got {n_queries} and {n_keys}")
    ### BEGIN SOLUTION
    positions = np.arange(n_queries)[:, None] + (n_keys - n_queries)
    return np.arange(n_keys)[None, :] <= positions
    ### END SOLUTION

# %%
causal_mask = check("1.3", causal_mask)

# %% [markdown]
# #### Exercise 1.4: the padding mask  (difficulty 1 of 5, 5 minutes)
#
# A batch holds sentences of `lengths[b]` real tokens, padded to `n_keys`. Nobody may look at the padding.
#
# | argument | shape | meaning |
# |---|---|---|
# | `lengths` | `(batch,)` integers | real tokens of each sentence |
# | `n_keys` | int | length after padding |
#
# Returns booleans `(batch, 1, 1, n_keys)`. The two ones let it broadcast over heads and queries.
#
# <details><summary>Hint</summary>
#
# Compare a row of positions with a column of lengths.
#
# </details>

# %% tags=["exercise", "export"]
def padding_mask(lengths, n_keys):
    """Boolean (batch, 1, 1, n_keys), True for the first lengths[b] keys of sentence b.

    lengths: integers (batch,). Raises ValueError when a length is negative or larger than n_keys.
    """
    lengths = np.asarray(lengths)
    if lengths.size and (lengths.min() < 0 or lengths.max() > n_keys):
        raise ValueError(f"lengths must lie between 0 and n_keys = {n_keys}, got {lengths.tolist()}")
    ### BEGIN SOLUTION
    return (np.arange(n_keys) < lengths[:, None])[:, None, None, :]
    ### END SOLUTION

# %%
padding_mask = check("1.4", padding_mask)

# %% [markdown]
# Masks combine with "and": a key must be allowed by every mask.

# %%
causal, padding = causal_mask(6), padding_mask(np.array([4]), 6)[0, 0]
plotting.masks({"causal": causal, "padding, length 4": np.broadcast_to(padding, (6, 6)), "both": causal & padding},
               title='Masks combine with "and"')
plotting.show("Three mask diagrams of six queries by six keys: the lower triangle with its diagonal, "
              "the first four columns, and their intersection.")

# %% [markdown]
# #### Exercise 1.5: attention weights with masks  (difficulty 3 of 5, 15 minutes)
#
# Now everything so far in one function: scores, scale, masks, softmax.
#
# | argument | shape | meaning |
# |---|---|---|
# | `q` | `(..., n_queries, d_head)` | queries |
# | `k` | `(..., n_keys, d_head)` | keys |
# | `mask` | booleans, broadcastable to `(..., n_queries, n_keys)` | True = may attend; `None` = all |
# | `causal` | bool | also forbid the future |
# | `scale` | float | factor on $q \cdot k$; `None` means $1/\sqrt{d_\text{head}}$ |
#
# Returns weights `(..., n_queries, n_keys)`. A row that may look nowhere is zero.
#
# <details><summary>Hint</summary>
#
# The dots in front are batches and heads: transpose only the last two axes of k. `np.where` makes a new array, so that
# nothing of the caller's is overwritten. Your softmax already knows what to do with a row of -inf.
#
# </details>

# %% tags=["exercise", "export"]
def attention_weights(q, k, mask=None, causal=False, scale=None):
    """Attention weights softmax(scale * q k^T) with masks, in NumPy.

    q (..., n_queries, d_head), k (..., n_keys, d_head), mask boolean and broadcastable to (..., n_queries, n_keys)
    with True = may attend. Returns (..., n_queries, n_keys); a row with nothing to attend to is zero.
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
# Packaged: the function that the next eleven lectures build on, and the oracle of every other version of it. It is
# strict about what it is given, because a mask of the wrong kind would otherwise give a wrong answer in silence.

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
    """Each query's weighted average of the values: softmax(q k^T / sqrt(d_head)) v, in NumPy.

    The oracle of attention_torch and attention_cuda.
    q (..., n_queries, d_head), k (..., n_keys, d_head), v (..., n_keys, d_v); mask boolean, True = may attend,
    broadcastable to (..., n_queries, n_keys); causal is aligned at the bottom right; scale defaults to
    1/sqrt(d_head). Returns (..., n_queries, d_v) in the float type of q (half precision is computed in single);
    a query with nothing to attend to gets zeros. Raises ValueError when shapes or mask do not fit.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1.
    """
    check_arguments(q, k, v, mask)
    work = np.result_type(q, np.float32)
    q_, k_, v_ = (a.astype(work, copy=False) for a in (q, k, v))
    return (attention_weights(q_, k_, mask, causal, scale) @ v_).astype(np.result_type(q, np.float16), copy=False)

# %% [markdown]
# **Does the mask leak?** If position 3 may not be seen from positions 0 to 2, then nothing that happens at 3 may change
# them, not even in the last bit. *Predict.* Which rows change when key and value 3 do?

# %%
q, k, v = (rng.standard_normal((6, 8)) for _ in range(3))
before = attention_numpy(q, k, v, causal=True)
k[3], v[3] = 100.0, -100.0                                  # something loud happens at position 3
after = attention_numpy(q, k, v, causal=True)
print("rows that changed:", [i for i in range(6) if not np.array_equal(before[i], after[i])])

# %% [markdown]
# Rows 0 to 2 are the same bit for bit. A common wrong version masks *after* the softmax. *Predict.* Does it leak?

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
# #### A row that may look nowhere
#
# An empty sentence in a batch has no key at all. There is no right answer, so this course fixes one: zero, with
# gradient zero. Never nan, because one nan spreads through the whole batch at the next mean.

# %%
nothing = np.zeros((6, 6), bool)
print("all zeros:", (attention_numpy(q, k, v, mask=nothing) == 0).all())

# %% [markdown]
# ## Part 3 · PyTorch: attention that learns
#
# **What changes in PyTorch?** Not the formula. What is new is the gradient, and it must survive everything that the
# forward pass survives: a row with nothing to attend to has to give gradient 0, not nan.

# %% tags=["export"]
def attention_torch(q, k, v, mask=None, causal=False, scale=None):
    """Scaled dot-product attention in PyTorch; same arguments, shapes and errors as attention_numpy, differentiable.

    Half precision is computed in single and returned in the type of q. mask and causal as in attention_numpy.
    """
    check_arguments(q, k, v, mask)
    work = torch.promote_types(q.dtype, torch.float32 if q.is_floating_point() else torch.float64)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if k.shape[-2] == 0:
        return q.new_zeros(*q.shape[:-1], v.shape[-1])
    scores = q.to(work) @ k.to(work).transpose(-1, -2) * scale
    if causal:
        allowed = torch.from_numpy(causal_mask(q.shape[-2], k.shape[-2])).to(q.device)
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~torch.as_tensor(mask, device=q.device), -math.inf)
    maximum = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - maximum.masked_fill(maximum == -math.inf, 0))
    total = weights.sum(-1, keepdim=True)
    out = weights / total.masked_fill(total == 0, 1) @ v.to(work)
    return out.to(q.dtype) if q.is_floating_point() else out

# %%
q, k, v = (torch.from_numpy(rng.standard_normal((2, 4, 5, 8))).requires_grad_() for _ in range(3))
mask = torch.from_numpy(padding_mask(np.array([5, 3]), 5))

ours = attention_torch(q, k, v, mask=mask, causal=True)
theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask & torch.ones(5, 5).tril().bool())
arrays = [a.detach().numpy() for a in (q, k, v)]
oracle = attention_numpy(*arrays, mask=mask.numpy(), causal=True)
print("agrees with NumPy to 1e-12:  ", np.allclose(ours.detach().numpy(), oracle, atol=1e-12))
print("agrees with PyTorch to 1e-12:", torch.allclose(ours, theirs, atol=1e-12, rtol=0))

# %% [markdown]
# And the attention inside `Recall`, in section 1.2, was this function: questions as queries, symbols with their places
# as keys, symbols as values.

# %%
with torch.no_grad():
    recall = models["attention"][0]
    x = recall.symbol(stream)
    inside = recall.attend(x) @ x
    outside = attention_torch(recall.question.weight, x + recall.place.weight, x)
print("the three lines of Recall are attention_torch:", torch.allclose(inside, outside, atol=1e-5))

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
print("nothing to attend to, gradient 0:", all((g == 0).all().item() for g in grads))

# %% [markdown]
# #### Exercise 1.6: the backward pass by hand  (difficulty 4 of 5, 25 minutes)
#
# Autograd is convenient and keeps every intermediate. A fused kernel (lecture 06) has to write its own backward pass,
# so you write it here first. Given $dO = \partial L / \partial O$, walk back through the three formulas of section 1.5:
#
# $$ dV = P^\top dO \qquad dP = dO\, V^\top \qquad dS_{ij} = P_{ij}\Big(dP_{ij} - \sum_{j'} P_{ij'}\, dP_{ij'}\Big) $$
#
# $$ dQ = \text{scale} \cdot dS\, K \qquad dK = \text{scale} \cdot dS^\top Q $$
#
# The third one is the Jacobian of the softmax from section 1.6, applied to a row.
#
# | argument | shape |
# |---|---|
# | `q`, `k`, `v` | as in `attention_numpy` |
# | `d_out` | `(..., n_queries, d_v)`, gradient of the loss with respect to the output |
#
# Returns `(d_q, d_k, d_v)` of the shapes of `q`, `k`, `v`.
#
# <details><summary>Hint</summary>
#
# Masks need no case of their own: a forbidden pair has $P_{ij} = 0$ and so $dS_{ij} = 0$.
#
# </details>

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
by_hand = attention_backward(*arrays, d_out.numpy(), mask=mask.numpy(), causal=True)
print("by hand equals autograd to 1e-12:", all(np.allclose(a, b.numpy(), atol=1e-12) for a, b in zip(by_hand, ours_d)))

# %% [markdown]
# ### The translator from part 1, opened
#
# **What did the network of part 1 do at each word?** It scored every source word with the additive score of exercise
# 1.2, and blended.
#
# The model is an encoder-decoder in the letters of Bahdanau, Cho and Bengio (arXiv 1409.0473; they count the output
# words with $i$, we with $t$).
#
# | | | |
# |---|---|---|
# | annotation | $h_j = [\overrightarrow h_j; \overleftarrow h_j]$ | a GRU reads forwards, another backwards (eq. 7) |
# | context | $c_t$ | what the decoder is told about the source at step $t$ (eq. 5) |
# | state | $s_t = f(s_{t-1}, y_{t-1}, c_t)$ | a GRU cell; $s_0 = \tanh(W_s \overleftarrow h_1)$ |
# | output | $p(y_t \mid \ldots) = g(y_{t-1}, s_t, c_t)$ | here one linear layer and a softmax (eq. 4) |
#
# Note two indices. $h_j$ joins the forward and the backward state at the **same** word $j$. And the output layer sees
# $s_t$ and $y_{t-1}$, not $c_t$ alone. Everything turns on $c_t$. Without attention it is one vector for all $t$: the
# two states that have read the whole sentence, $[\overrightarrow h_n; \overleftarrow h_1]$. With attention, the state
# $s_{t-1}$ is the query, and the annotations $h_j$ are keys and values at once:
#
# $$e_{tj} = v^\top \tanh(s_{t-1} W_q + h_j W_k) \qquad
#   \alpha_{tj} = \frac{e^{e_{tj}}}{\sum_{j'} e^{e_{tj'}}} \qquad
#   c_t = \sum_j \alpha_{tj}\, h_j$$
#
# This is **additive attention**. The paper writes $W_a$, $U_a$ and $v_a$ for our $W_q$, $W_k$ and $v$ (appendix
# A.1.2); ours are written for rows, `x @ w`.

# %% tags=["export"]
class AdditiveAttention(nn.Module):
    """Bahdanau's alignment model: e_tj = v . tanh(s_{t-1} W_q + h_j W_k), alpha_t = softmax(e_t).

    The context is c_t = sum_j alpha_tj h_j. Parameters: w_q (d_query, d_hidden), w_k (d_key, d_hidden), v (d_hidden,);
    in the paper W_a, U_a, v_a. Source: arXiv 1409.0473, equations 5 and 6, appendix A.1.2.
    """

    def __init__(self, d_query, d_key, d_hidden):
        super().__init__()
        self.w_q = nn.Parameter(torch.randn(d_query, d_hidden) / math.sqrt(d_query))
        self.w_k = nn.Parameter(torch.randn(d_key, d_hidden) / math.sqrt(d_key))
        self.v = nn.Parameter(torch.randn(d_hidden) / math.sqrt(d_hidden))

    def forward(self, query, keys, mask):
        """query (batch, d_query), keys (batch, n_keys, d_key), mask (batch, n_keys) bool, True = may attend.

        Returns the context c_t (batch, d_key) and the weights alpha_t (batch, n_keys); zeros for a row that may
        attend to nothing. ValueError for a mask that does not fit.
        """
        expected = tuple(keys.shape[:-1])
        if mask.dtype != torch.bool or mask.shape != expected:
            raise ValueError(f"mask must be boolean of shape {expected}, not {mask.dtype} {tuple(mask.shape)}")
        scores = torch.tanh((query @ self.w_q)[:, None] + keys @ self.w_k) @ self.v
        lowest = torch.finfo(scores.dtype).min                # a row of -inf would be nan; `* mask` makes zeros exact
        weights = torch.softmax(scores.masked_fill(~mask, lowest), dim=-1) * mask
        return (weights[:, None] @ keys)[:, 0], weights

# %% tags=["export"]
class Encoder(nn.Module):
    """Annotations of a sentence: a GRU reads it forwards, another backwards. Sentences as in Seq2Seq."""

    def __init__(self, n_source, d_hidden):
        super().__init__()
        self.embed = nn.Embedding(n_source, d_hidden)
        self.gru = nn.GRU(d_hidden, d_hidden, batch_first=True, bidirectional=True)

    def forward(self, source):
        """All h_j (batch, n_source, 2 d), and the two states that have read everything, h_n and h_1, each (batch, d)."""
        lengths = (source != Vocabulary.PAD).sum(1).cpu()
        words = pack_padded_sequence(self.embed(source), lengths, batch_first=True, enforce_sorted=False)
        h, (h_n, h_1) = self.gru(words)
        return pad_packed_sequence(h, batch_first=True, total_length=source.shape[1])[0], h_n, h_1

# %% tags=["export"]
class Seq2Seq(nn.Module):
    """An encoder-decoder of word ids, as in Bahdanau et al. 2014 (arXiv 1409.0473), with attention or one fixed vector.

    n_source, n_target: sizes of the two vocabularies, whose ids of padding, start and end are those of `Vocabulary`.
    attention: "additive", or None for the fixed vector c_t = [forward h_n; backward h_1].
    Sentences are ids (batch, length) int64, each with at least one word, padded behind. In the paper's letters:
    h_j = [forward h_j; backward h_j], s_0 = tanh(W_s backward h_1), s_t = f(s_{t-1}, y_{t-1}, c_t) and
    p(y_t) = softmax(g(y_{t-1}, s_t, c_t)).
    """

    def __init__(self, n_source, n_target, d_hidden=48, attention="additive"):
        super().__init__()
        if attention not in ("additive", None):
            raise ValueError(f'attention must be "additive" or None, not {attention!r}')
        self.encoder = Encoder(n_source, d_hidden)
        self.embed_target = nn.Embedding(n_target, d_hidden)
        self.w_s = nn.Parameter(torch.randn(d_hidden, d_hidden) / math.sqrt(d_hidden))
        self.attention = AdditiveAttention(d_hidden, 2 * d_hidden, d_hidden) if attention else None
        self.f = nn.GRUCell(3 * d_hidden, d_hidden)
        self.g = nn.Linear(4 * d_hidden, n_target)

    def decode(self, source, n_steps, target=None):
        """Logits (batch, n_steps, n_target), and alignments (batch, n_steps, length of source) or None.

        y_{t-1} is the target's word where there is a target, and the decoder's own best word where there is none.
        """
        h, h_n, h_1 = self.encoder(source)
        s, fixed = torch.tanh(h_1 @ self.w_s), torch.cat([h_n, h_1], dim=-1)
        y, logits, alignments = torch.full_like(source[:, 0], Vocabulary.START), [], []
        for t in range(n_steps):
            y = self.embed_target(y)
            c, alpha = self.attention(s, h, source != Vocabulary.PAD) if self.attention else (fixed, None)
            s = self.f(torch.cat([y, c], dim=-1), s)
            logits.append(self.g(torch.cat([y, s, c], dim=-1)))
            alignments.append(alpha)
            y = logits[-1].argmax(-1) if target is None else target[:, t]
        return torch.stack(logits, 1), torch.stack(alignments, 1) if self.attention else None

    def forward(self, source, target):
        """Logits (batch, length, n_target) for every word of target (batch, length), given the words before it."""
        return self.decode(source, target.shape[1], target)[0]

    @torch.no_grad()
    def translate(self, source, n_steps):
        """Greedy translation: ids (batch, n_steps), to be read up to the first END; and the alignments or None."""
        logits, alignments = self.decode(source, n_steps)
        return logits.argmax(-1), alignments

# %% [markdown]
# ### Does it matter? Where it looks
#
# The weights say where the decoder searched. Nobody told it which word translates which. We chose one of the clearer
# sentences; the count below is over all. *Predict.* German says *sechs und fünfzig*. Where does the diagonal break?

# %%
row = [p.source for p in test].index("fifty six thousand eight hundred thirty two".split())
ids, alignments = translators[0].translate(test_source[row:row + 1], test_target.shape[1])
translation = german.decode(ids[0])
weights = alignments[0, :len(translation), :len(test[row].source) + 1].numpy()

plotting.alignment(weights, [*test[row].source, "end"], translation, title="Units before tens: the alignment crosses")
plotting.show("Alignment of an English number with its German translation: mostly a diagonal, crossed where German "
              "says the unit before the ten.")
print("translated right:", translation == test[row].target)

# %% [markdown]
# The diagonal is broken twice: *fifty six* is *sechs und fünfzig*, *thirty two* is *zwei und dreißig*. Is that so in
# every sentence? The data come with the right alignment, made from the lexicon. We count how often the largest weight
# of a word lies on the word that it translates.

# %%
def kind(german_words, t):
    """What the German word number t is: the unit before an "und", the ten after it, a scale, or None of these."""
    if "und" in german_words[t + 1:t + 2]:
        return "unit"
    if t and german_words[t - 1] == "und":
        return "ten"
    return "scale" if german_words[t] in ("hundert", "tausend", "Million", "Millionen") else None

def agreement(model):
    """{kind: share of the words whose largest weight is on the English word that they translate}, over the test set."""
    found = model.translate(test_source, test_target.shape[1])[1].argmax(-1).numpy()
    hits = {"unit": [], "ten": [], "scale": [], None: []}
    for i, p in enumerate(test):
        for t, j in enumerate(p.alignment):
            if j >= 0:                                            # "und" translates no English word
                hits[kind(p.target, t)].append(found[i, t] == j)
    return {name: np.mean(values) for name, values in hits.items() if name}

# %%
agreements = [agreement(model) for model in translators]
least = {name: min(shares[name] for shares in agreements) for name in ("unit", "ten")}
print("units: the largest weight is on the right word in more than 90 %:", least["unit"] > 0.9)
print("tens:  the largest weight is on the right word in more than 90 %:", least["ten"] > 0.9)
print("hundert, tausend, Million: less often than the tens, for each seed:",
      all(shares["scale"] < shares["ten"] for shares in agreements))

names = {"unit": "units", "ten": "tens", "scale": "hundert, tausend, Million"}
plotting.bars({name: [shares[key] for shares in agreements] for key, name in names.items()},
              ylabel="largest weight on the right word (share)",
              title="Units and tens are looked up nearly always, scale words less often")
plotting.show("Three bars with three seeds each: units and tens close to 1, the scale words below 0.95.")

# %% [markdown]
# Units and tens are looked up almost without exception, *hundert*, *tausend* and *Million* less often, and the word is
# right all the same. A possible reason: the neighbours' $h_j$ have read the whole sentence. Nothing forces the decoder
# to look at the word that we would look at. **Attention weights show where the model looked, not why it was right.**

# %% [markdown]
# ## Part 4 · CUDA: where the bytes go
#
# **If the formula is three lines, why do people write kernels for it?** Because of the matrix in the middle. For $n$
# queries and $n$ keys the weights are $n^2$ numbers that nobody asked for. They are written to memory and read back.
# This part counts what that costs, in bytes.
#
# A GPU runs one function, the **kernel**, in thousands of **threads**. Threads come in **blocks**; a block has a small,
# fast **shared memory** of its own. All threads see the large, slow **global memory**. Thirty-two neighbouring threads
# form a **warp**; they are its **lanes** 0 to 31 and mostly run together, but only a barrier or a shuffle guarantees
# it. One load or store of a warp is one **request**. In a block of 16 × 16 threads a warp is two rows: `threadIdx.y` =
# 0 and 1, and so on.
#
# CUDA C++ is C++ with a few words more. What you need of it today:
#
# | in a kernel | means |
# |---|---|
# | `const float* s`, `s[i * m + j]` | the address of an array; row i, column j of an (n, m) matrix, row after row |
# | `int i = ...;` `float x = 0.0f;` | a new variable with its type; every statement ends with `;` |
# | `for (int j = a; j < n; j += 32)` | `for j in range(a, n, 32)` |
# | `c ? a : b` | `a if c else b` |
# | `threadIdx.x`, `blockIdx.x` | the number of this thread in its block, and of its block; `.y` is a second direction |
# | `blockDim.x` | how many threads a block has |
# | `__global__`, `__device__` | a kernel, started from Python; a function that kernels call |
# | `(size_t)i * m` | a 64-bit product: an `int` ends at 2,147,483,647 |
# | `expf`, `fmaxf`, `INFINITY` | exp, max and infinity for floats |
#
# You need no GPU. `utils.cuda` compiles the same CUDA C++ for your CPU, runs every thread, and counts every access. On
# a machine with an NVIDIA GPU the same call, given CUDA tensors, runs there. No GPU run is recorded yet, so this part
# shows bytes and no times.

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
# The square brackets say how many blocks and how many threads in each. `kernel.check` runs the same and returns a
# report instead.
#
# *Predict.* What happens to threads 1,000 to 1,023 when the guard `if (i < n)` is forgotten?

# %%
unguarded = cuda.compile(SCALE.replace("if (i < n) ", ""))
print(unguarded.check[4, 256](x, y, 0.5, 1000).problems[0])

# %% [markdown]
# On a GPU this may crash, or corrupt somebody else's array, or seem to work. Here it is reported with its line, and
# nothing happens to the notebook: a kernel runs in a process of its own.
#
# ### Coalescing: thirty-two sectors or four?
#
# Memory is fetched in **sectors** of 32 bytes. When the 32 threads of a warp read 32 neighbouring floats, that is 128
# bytes: 4 sectors, all of them used. When they read 32 floats that lie far apart, it is 32 sectors, of which this
# request uses one eighth.
#
# Here is a softmax with one thread for each row. *Predict.* How many sectors does a warp fetch at each step?

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
# Look at the column "sectors/request": 32 where 4 would do. At step $j$ thread 0 reads `s[j]` and thread 1
# reads `s[n_keys + j]`, a whole row further on. Below are the first few rows of memory for both ways, at step 0.

# %%
lane = np.arange(32)
plotting.warp_access(4 * lane[:8] * n_keys)                      # byte offsets of the first 8 lanes at j = 0
plotting.warp_access(4 * lane)                                   # and of 32 neighbours
plotting.show("Two maps of memory: eight lanes that read a row apart touch eight sectors and use one word of each; "
              "32 neighbouring lanes fill four sectors.")

# %% [markdown]
# #### Exercise 1.7: coalesce it  (difficulty 3 of 5, 20 minutes)
#
# Give each row a whole warp instead. The kernel is launched with one block of 32 threads for each row; lane $l$ takes
# the columns $l, l + 32, l + 64, \dots$
#
# | argument | shape | meaning |
# |---|---|---|
# | `s` | `(n_queries, n_keys)` | scores |
# | `p` | `(n_queries, n_keys)` | weights, written |
# | `n_keys` | int | any number, not only multiples of 32; every row has a finite score |
#
# `warp_max` and `warp_sum` are given: each lane hands in its own number and gets the result over all 32. Every lane
# must call them. (Inside, `__shfl_xor_sync` hands a number from lane to lane; you need not read it.)
#
# <details><summary>Hint</summary>
#
# Three loops as above, each `for (int j = threadIdx.x; j < n_keys; j += 32)`, with a warp reduction after the first and
# after the second. The row is `blockIdx.x`.
#
# </details>

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
print("bytes asked for, and bytes of sectors fetched if nothing is cached")
for name, report in (("one thread a row:", strided), ("one warp a row:", rows)):
    print(f"{name:18s} {report.global_loaded:7,} {report.sectors_loaded * 32:9,}")

# %% [markdown]
# The same bytes are asked for. Without a cache, one version makes the memory deliver eight times as many. (A cache that
# keeps the sectors until the next steps can repair part of that.)
#
# ### Attention in three kernels
#
# The formula of section 1.5, one kernel for each line: scores, softmax, blend. Before running, do the arithmetic. With
# $n$ queries, $m$ keys and $d$ entries, at four bytes a float:
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
  for (int t = 0; t < d; ++t) sum += q[(size_t)i * d + t] * k[(size_t)j * d + t];
  s[(size_t)i * n_keys + j] = scale * sum;
}
"""
BLEND = r"""
__global__ void blend(const float* p, const float* v, float* out, int n_queries, int n_keys, int d) {
  int t = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y * blockDim.y + threadIdx.y;
  if (i >= n_queries || t >= d) return;
  float sum = 0.0f;
  for (int j = 0; j < n_keys; ++j) sum += p[(size_t)i * n_keys + j] * v[(size_t)j * d + t];
  out[(size_t)i * d + t] = sum;
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
# To the byte. A value of $q$ is asked for again for each of the $m$ keys, a value of $k$ for each of the $n$ queries.
# And the reads of K are a row apart, as in the strided softmax: `naive[0].table()` shows it. Tiles mend both.
#
# ### Tiles
#
# **How do you read a number once and use it sixteen times?** A block of 16 × 16 threads loads 16 rows of K into its
# shared memory, together. Then each thread takes what it needs from there. One read from global memory now serves 16
# queries.
#
# It has a price: a thread uses numbers that *other* threads loaded, so it must know that they have arrived.
# `__syncthreads()` is a barrier: no thread of the block passes before all have come.

# %% [markdown]
# #### Exercise 1.8: load a tile  (difficulty 3 of 5, 15 minutes)
#
# All 256 threads of a block copy `TILE` = 16 rows of a matrix into shared memory. Each thread has a number, `thread`,
# from
# 0 to 255.
#
# | argument | meaning |
# |---|---|
# | `tile` | in shared memory; row $r$, column $c$ belongs at `tile[r * stride + c]` |
# | `stride` | words from one row of the tile to the next, at least `d` |
# | `rows` | in global memory, `(n_rows, d)`, row after row |
# | `first` | the first row to copy; rows from `n_rows` on do not exist and become 0 |
#
# Neighbouring threads must read neighbouring addresses, for any `d`. Never read outside `rows`.
#
# <details><summary>Hint</summary>
#
# Number the 16 · d elements of the tile row after row. Thread number `thread` copies the elements `thread`, `thread +
# 256`, … Row and column of element `e` are `e / d` and `e % d`.
#
# </details>

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
# #### Exercise 1.9: place the barriers  (difficulty 3 of 5, 15 minutes)
#
# The kernel below computes scores from tiles of K. Its barriers are missing. Five places are numbered: which of them
# need a `__syncthreads()`? Return a smallest set of places that is right for every size; more than one is right.

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
      for (int t = 0; t < d; ++t) sum += q[(size_t)i * d + t] * k_tile[threadIdx.x * d + t];
      s[(size_t)i * n_keys + j] = scale * sum;
    }
    /* place 3 */
  }
  /* place 4 */
}
"""

# %% [markdown]
# <details><summary>Hint</summary>
#
# There are two things to wait for in each round of the loop: that the tile has arrived before anybody uses it, and that
# everybody has used it before anybody overwrites it. And a barrier must be reached by all threads of the block or by
# none: else it hangs, or pairs with another barrier.
#
# </details>

# %% tags=["exercise", "export"]
def barrier_places():
    """The places of SCORES_TILED that need a __syncthreads(), as a set of integers from 0 to 4."""
    ### BEGIN SOLUTION
    return {1, 3}
    ### END SOLUTION

# %%
barrier_places = check("1.9", barrier_places)

# %% [markdown]
# What the report says with no barrier at all (the third number in the square brackets is the size of the shared memory
# in bytes; `extern __shared__` is where the kernel finds it):

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
loads = [row for row in tiled_scores.rows if row.space == "shared" and row.kind == "load"]
turns = sum(row.wavefronts for row in loads) / sum(row.requests for row in loads)
print(f"a read of the tile by a warp takes {turns:.0f} wavefronts")

# %% [markdown]
# ### Bank conflicts
#
# Right, and yet something is slow. Shared memory has 32 **banks**; word $a$ lies in bank $a \bmod 32$, and each bank
# serves one word at a time. At step $t$ the sixteen keys of the tile are read at `threadIdx.x * d + t`. With $d = 32$
# they all lie in the same bank and are served one after another, in 16 turns. NVIDIA's tools call a turn a
# **wavefront**.
#
# *Predict.* What happens if the rows of the tile are $d + 1$ apart instead of $d$?

# %%
for stride in (d, d + 1):
    plotting.bank_map(4 * stride * np.arange(16))
plotting.show("Two maps of the 32 banks: with rows 32 words apart sixteen keys pile up in one bank, "
              "with rows 33 apart each key has a bank of its own.")

# %% [markdown]
# One unused float at the end of each row, and the conflict is gone, for every even $d$. (For $d = 31$ the same float
# would make one. What counts is that the distance between rows is odd.) This is why tiles in real kernels have odd
# widths or swizzled addresses. The kernel below uses it.
#
# ### Attention without the matrix in the middle
#
# **Where do the scores go if they are never written out?** Into a tile of 16 × 16, used and overwritten. A softmax
# needs the row's maximum before its first exponential, so the kernel goes through K twice: once for the maximum, once
# more for weights and blend. Scores are computed twice and never stored.
#
# Sixteen threads share a row of the tile. What each of them has found, a maximum or a sum over its own keys, is
# combined with the shuffles of exercise 1.7, over sixteen lanes instead of thirty-two.

# %% tags=["export"]
ROW_OF_A_TILE = r"""
#define PAD 1                                           // one unused float at the end of each row of a tile
__device__ float row_max(float x) {                     // over the TILE threads that share a row of the tile
  for (int o = TILE / 2; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, o));
  return x;
}
__device__ float row_sum(float x) {
  for (int o = TILE / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffff, x, o);
  return x;
}
"""

# %% [markdown]
# Now the kernel. Each block does this:
#
# 1. load 16 queries;
# 2. first pass, for each tile of K: load, score, keep the maximum; then combine the maxima of each row;
# 3. second pass, for each tile of K and V: load, score again, weight = exp(score − maximum), add to total and output;
# 4. combine the totals, divide, write.
#
# `__syncwarp()` is a barrier for one warp. Without it a lane could read a weight that another lane has not written yet.
# A shuffle would not do: it moves a number but orders no memory.

# %% tags=["export"]
ATTENTION_TILED = r"""
__global__ void attention_tiled(const float* q, const float* k, const float* v, const unsigned char* mask, float* out,
                                int n_queries, int n_keys, int d, int d_v, int use_mask, int causal, float scale) {
  extern __shared__ float shared[];
  float *q_tile = shared, *k_tile = q_tile + TILE * (d + PAD), *v_tile = k_tile + TILE * (d + PAD);
  float *o_tile = v_tile + TILE * (d_v + PAD), *p_tile = o_tile + TILE * (d_v + PAD);   // output and weights, undivided
  int x = threadIdx.x, y = threadIdx.y, i = blockIdx.y * TILE + y;
  size_t head = blockIdx.x;
  q += head * n_queries * d, k += head * n_keys * d, v += head * n_keys * d_v;

  // load the queries
  load_tile(q_tile, d + PAD, q, blockIdx.y * TILE, n_queries, d);
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

      if (pass == 0) { maximum = fmaxf(maximum, s); continue; }

      // weights and blend, once the maximum is known
      p_tile[y * (TILE + PAD) + x] = expf(s - maximum);
      __syncwarp();                                     // a row of the tile belongs to one warp
      total += p_tile[y * (TILE + PAD) + x];
      for (int c = x; c < d_v; c += TILE)
        for (int r = 0; r < TILE; ++r)
          o_tile[y * (d_v + PAD) + c] += p_tile[y * (TILE + PAD) + r] * v_tile[r * (d_v + PAD) + c];
    }
    maximum = row_max(maximum);
    if (maximum == -INFINITY) maximum = 0.0f;           // nothing to attend to: every weight is exp(-inf) = 0
  }
  total = row_sum(total);

  // write
  for (int c = x; c < d_v && i < n_queries; c += TILE)
    out[(head * n_queries + i) * d_v + c] = total == 0.0f ? 0.0f : o_tile[y * (d_v + PAD) + c] / total;
}
"""

# %% [markdown]
# The function around it has the signature of the other two. It takes NumPy arrays or tensors of any size and shapes
# them for the kernel; with CUDA tensors it runs on the GPU.

# %% tags=["export"]
@functools.cache
def attention_kernel():
    """The tiled kernel, compiled on first use."""
    return cuda.compile(LOAD_TILE + ROW_OF_A_TILE + ATTENTION_TILED, name="attention_tiled")

def attention_launch(q, k, v, mask, causal, scale):
    """Grid, block, shared bytes, arguments and output of the tiled kernel, for tensors (..., seq, d)."""
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    n_queries, n_keys, d, d_v = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    q, k, v = (t.detach().float().expand(*lead, *t.shape[-2:]).contiguous() for t in (q, k, v))
    allowed = torch.ones(1, dtype=torch.uint8, device=q.device) if mask is None else \
        torch.as_tensor(mask, device=q.device).expand(*lead, n_queries, n_keys).to(torch.uint8).contiguous()
    out = torch.zeros(*lead, n_queries, d_v, device=q.device)
    scale = 1 / math.sqrt(d) if scale is None else float(scale)
    shared = 4 * 16 * (2 * (d + 1) + 2 * (d_v + 1) + 17)
    arguments = (q, k, v, allowed, out, n_queries, n_keys, d, d_v, int(mask is not None), int(causal), scale)
    return (max(1, math.prod(lead)), -(-n_queries // 16)), (16, 16), shared, arguments, out

def attention_cuda(q, k, v, mask=None, causal=False, scale=None):
    """Scaled dot-product attention by the tiled CUDA kernel; arguments, shapes and errors as attention_numpy.

    NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU. Computed in single precision, returned in
    the kind and type of q. Not differentiable.
    d + d_v up to 1,804 where a block may have 227 KB of shared memory, 1,292 on sm_80, 780 on sm_120.
    """
    check_arguments(q, k, v, mask)
    tensors = [a if isinstance(a, torch.Tensor) else torch.from_numpy(np.array(a)) for a in (q, k, v)]
    grid, block, shared, arguments, out = attention_launch(*tensors, mask, causal, scale)
    if out.numel() and k.shape[-2]:
        attention_kernel().fast[grid, block, shared](*arguments)                # without the checks and counts
    out = out.to(tensors[0].dtype if tensors[0].is_floating_point() else torch.float64)
    return out if isinstance(q, torch.Tensor) else out.numpy()

# %%
grid, block, shared, arguments, out = attention_launch(*(torch.from_numpy(a) for a in (q, k, v)), None, False, None)
tiled = attention_kernel().check[grid, block, shared](*arguments)
print("problems:", len(tiled.problems))
print("agrees with NumPy to 1e-5:", np.allclose(out.numpy(), attention_numpy(q, k, v), atol=1e-5))
print(f"read    {tiled.global_loaded:9,} bytes, formula {4 * (n * d + tiles(n) * 3 * m * d):9,}")
print(f"written {tiled.global_stored:9,} bytes, formula {4 * n * d:9,}")

# %% [markdown]
# Q is read once. K is read twice and V once, for each tile of 16 queries. The scores appear nowhere.
#
# *Predict.* How many times fewer bytes do the threads ask for, compared with the three kernels?

# %%
def traffic(reports):
    requested = sum(report.global_loaded + report.global_stored for report in reports)
    distinct = sum(report.distinct_loaded + report.distinct_stored for report in reports)
    return requested, distinct

for name, reports in (("three kernels", naive), ("tiled", [tiled])):
    requested, distinct = traffic(reports)
    print(f"{name:13s} requested {requested:9,} bytes, distinct {distinct:7,} bytes")
matrix = 4 * 4 * n * m                                              # scores and weights, written once, read once
print(f"the matrix is {matrix:,} of the {traffic(naive)[1]:,} distinct bytes of the three kernels")

# %% [markdown]
# Two counts. **Requested** is what the threads ask for; **distinct** counts each sector once for each kernel, as if a
# perfect cache served every repetition. Neither is what a real GPU fetches: uncoalesced reads fetch whole sectors, and
# a matrix as small as this one stays in the cache between two kernels. From some thousand tokens on it no longer fits.
#
# By either count the tiled kernel moves less, for two reasons. Most of the distinct bytes were the matrix, and it is
# gone. Most of the requested bytes were Q, K and V, read again and again, and a tile reads them once for sixteen
# queries. (A mask is another $n \times m$ matrix, of bytes: with one the kernel reads $2nm$ bytes more for each head.)
#
# What the blocks do, in the second pass: each keeps its tile of Q and walks along the tiles of K and V.

# %%
plotting.walk([(block, block, tile) for block in range(tiles(n)) for tile in range(tiles(m))])

# %%
plotting.walk_picture([(block, block, tile) for block in range(tiles(n)) for tile in range(tiles(m))])
plotting.show("The four by five tiles of the score matrix, coloured by block and numbered by step: "
              "each block works along one row.")

# %% [markdown]
# And the padding? The losing variant, for comparison:

# %%
no_padding = ROW_OF_A_TILE.replace("#define PAD 1", "#define PAD 0")
unpadded = cuda.compile(LOAD_TILE + no_padding + ATTENTION_TILED, name="attention_tiled")
conflicts = unpadded.check[grid, block, shared](*arguments).bank_conflicts
print("padding takes away more than 90 % of the extra wavefronts:", tiled.bank_conflicts < 0.1 * conflicts)

# %% [markdown]
# Not all of them: a warp holds two rows of the tile, and where each writes its own outputs and weights the two overlap
# in some banks. (How many wavefronts those cost depends on the compiler, so the number is not printed here;
# `tiled.table()` shows it by line.)
#
# The kernel still reads K twice, only to know the maximum first. Is that needed? Lecture 06 finds a way around it, and
# that is FlashAttention.
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

# %% [markdown]
# ## Traps
#
# Each of these stands in slides, glossaries or well-known tutorials. Decide what is wrong before you open the answer;
# the cell below it shows it in numbers.
#
# ### "Two tokens are unrelated if their dot product is minus infinity"
#
# *Which dot product do unrelated vectors have, and what weight do they get?*
#
# <details><summary>Answer</summary>
#
# About zero, and a weight of their own: $e^0$ is 1, not 0. A strongly negative score means that key and query point in
# opposite directions. Minus infinity is no dot product of finite vectors at all. It is what a mask writes.
#
# </details>

# %%
query = np.array([3.0, 0.0])
keys = np.array([[3.0, 0.0], [0.0, 3.0], [-3.0, 0.0]])
print("scores of the same, an orthogonal and the opposite direction:", (keys @ query / np.sqrt(2)).round(2))
print("weights where all keys are orthogonal:", softmax(np.zeros(3)).round(3))
print("and where one of them is masked:      ", softmax(np.array([0.0, 0.0, -np.inf])).round(3))

# %% [markdown]
# ### "Masked attention is $\text{softmax}(QK^\top + M)$"
#
# *What is missing, and does its place matter?*
#
# <details><summary>Answer</summary>
#
# The scale. Papers drop it for brevity. It belongs on $QK^\top$ alone, before $M$ is added. With a mask of 0 and
# $-\infty$ nobody notices when it is put outside, because $-\infty / \sqrt d$ is still $-\infty$. With a finite $M$,
# such as the distance penalties of lecture 03, the scale would shrink the penalty.
#
# </details>

# %%
draw = np.random.default_rng(10)
q, k = draw.standard_normal((2, 6, 64))
position = np.arange(6.0)
masks = {"0 and -inf": np.where(causal_mask(6), 0.0, -np.inf), "penalties": -np.abs(position[:, None] - position)}
for name, m in masks.items():
    right, outside, dropped = softmax(q @ k.T / 8 + m), softmax((q @ k.T + m) / 8), softmax(q @ k.T + m)
    print(f"{name:10s}: the same with the scale outside: {np.allclose(right, outside)}, "
          f"without a scale: {np.allclose(right, dropped)}")

# %% [markdown]
# ### "The attention scores then pass through a final linear layer"
#
# *What does pass through it?*
#
# <details><summary>Answer</summary>
#
# The outputs: the weighted sums of the values, all heads side by side. Scores could not. Their number depends on the
# length of the sequence, and the size of a weight matrix does not.
#
# </details>

# %%
layer = torch.nn.MultiheadAttention(16, num_heads=4, batch_first=True)
for n in (5, 9):
    x = torch.ones(1, n, 16)
    out, w = layer(x, x, x, average_attn_weights=False)
    matrix = layer.out_proj.weight
    print(f"{n} tokens: weights {tuple(w.shape)}, output {tuple(out.shape)}, last matrix {tuple(matrix.shape)}")

# %% [markdown]
# ### "In cross-attention the encoder hands over the keys and values of its own self-attention"
#
# *Whose are the projections?*
#
# <details><summary>Answer</summary>
#
# The decoder's. The encoder hands over its output, one vector a token. Each layer of the decoder has its own $W_K$ and
# $W_V$ and makes its own keys and values from it.
#
# </details>

# %%
transformer = torch.nn.Transformer(16, nhead=2, num_encoder_layers=1, num_decoder_layers=2, batch_first=True)
projections = {name: parameter for name, parameter in transformer.named_parameters() if name.endswith("in_proj_weight")}
print("\n".join(f"{name:50s} {tuple(parameter.shape)}" for name, parameter in projections.items()))
print("parameters shared between any two:", len({id(p) for p in projections.values()}) < len(projections))

# %% [markdown]
# ### "The annotation of word $i$ joins the forward state $h_i$ and the backward state $h_T$"
#
# *What would such an annotation know of the words after $i$?*
#
# <details><summary>Answer</summary>
#
# Nothing that depends on $i$. The index of both states is $i$: $h_i = [\overrightarrow{h}_i ; \overleftarrow{h}_i]$.
# The backward network starts at the end, so its state at $T$ has seen one word, and it is the same for every $i$.
# (Bahdanau et al. 2014, section 3.2.)
#
# </details>

# %%
gru = training.initialise(torch.nn.GRU(8, 4, bidirectional=True, batch_first=True), seed=0)
x = torch.from_numpy(np.random.default_rng(11).standard_normal((1, 6, 8))).float()
changed = x.clone()
changed[0, 4] += 1.0                                                                  # another word at position 4
with torch.no_grad():
    states, other = gru(x)[0][0], gru(changed)[0][0]
backward = np.abs((states - other)[:, 4:].numpy()).max(axis=1) > 0
print("backward states that notice a change of word 4:", np.flatnonzero(backward), "of 0 to 5")

# %% [markdown]
# ### "Sutskever et al. found that sequence-to-sequence models fail on long sentences"
#
# *They reversed the source instead. What does that do to the distances between a word and its translation?*
#
# <details><summary>Answer</summary>
#
# Their abstract says that the LSTM "did not have difficulty on long sentences". That quality degrades with length is
# from Cho et al. 2014 (arXiv 1409.1259), on another model. Reversing leaves the average distance as it is and makes the
# smallest one tiny, which is how the authors explain that it helps (arXiv 1409.3215, section 3.3).
#
# </details>

# %%
n = 10
source, target = np.arange(n), n + np.arange(n)                         # places of word i and of its translation
for name, places in (("in order", source), ("reversed", source[::-1])):
    distance = target - places
    print(f"{name}: mean distance {distance.mean():.0f}, smallest {distance.min()}, largest {distance.max()}")

# %% [markdown]
# ### "$p(y_t) = \text{RNN}(c_t)$"
#
# *Can a decoder that sees only the context $c_t$ write "very very good"?*
#
# <details><summary>Answer</summary>
#
# Only if the context moves by itself. The paper's output is $g(y_{t-1}, s_t, c_t)$ (equation 4): the last word and the
# state are arguments too. Without them two steps that look at the same place must say the same.
#
# </details>

# %%
context, state = torch.ones(1, 4), torch.zeros(1, 6)
decoder = {"cell": torch.nn.GRUCell(3 + 4, 6), "g": torch.nn.Linear(3 + 6 + 4, 5), "from_c": torch.nn.Linear(4, 5)}
training.initialise(torch.nn.ModuleDict(decoder), seed=0)
full, short = [], []
with torch.no_grad():
    for last_word in torch.eye(3)[:2]:                                  # two steps, one context, different last words
        state = decoder["cell"](torch.cat([last_word[None], context], dim=1), state)
        full.append(decoder["g"](torch.cat([last_word[None], state, context], dim=1)))
        short.append(decoder["from_c"](context))
print("g(y, s, c) differs between the steps:  ", not torch.allclose(*full))
print("a function of c alone differs:         ", not torch.allclose(*short))

# %% [markdown]
# ### "Attention is permutation-invariant"
#
# *Shuffle the tokens. What happens to the output?*
#
# <details><summary>Answer</summary>
#
# It is shuffled in the same way: self-attention is permutation-**equivariant**. What is invariant is one query over a
# set of keys and values: there the order does not matter at all. A causal mask breaks both.
#
# </details>

# %%
draw = np.random.default_rng(12)
x, query, order = draw.standard_normal((7, 4)), draw.standard_normal((1, 4)), draw.permutation(7)
plain, shuffled = (attention_numpy(a, a, a) for a in (x, x[order]))
print("self-attention invariant:  ", np.allclose(shuffled, plain))
print("self-attention equivariant:", np.allclose(shuffled, plain[order]))
one, one_shuffled = (attention_numpy(query, a, a) for a in (x, x[order]))
print("one query invariant:       ", np.allclose(one_shuffled, one))
causal, shuffled_causal = (attention_numpy(a, a, a, causal=True) for a in (x, x[order]))
print("causal equivariant:        ", np.allclose(shuffled_causal, causal[order]))

# %% [markdown]
# ### "Causal attention sees the positions before it"
#
# *Which row goes wrong if that is taken at its word?*
#
# <details><summary>Answer</summary>
#
# The first: it would have nothing to attend to. A position sees those before it **and itself**. Likewise self-attention
# is not "attention to all other tokens".
#
# </details>

# %%
strict = np.tril(np.ones((4, 4), bool), k=-1)
x = np.random.default_rng(13).standard_normal((4, 3))
first = attention_numpy(x, x, x, causal=True)[0]
print("first output, before and itself:", first.round(2), "= the first value:", np.allclose(first, x[0]))
print("first output, strictly before:  ", attention_numpy(x, x, x, mask=strict)[0])

# %% [markdown]
# ### "A mask is a mask: PyTorch takes the same one everywhere"
#
# *Two functions of PyTorch, one boolean mask. Which keys does each of them use?*
#
# <details><summary>Answer</summary>
#
# Opposite ones. In `scaled_dot_product_attention` True means *may attend*, as in this course. In
# `nn.MultiheadAttention` True means *blocked*.
#
# </details>

# %%
mask = torch.tensor([[True, True, False, False]])
query, keys, values = torch.zeros(1, 1, 4), torch.zeros(1, 4, 4), torch.eye(4)[None]      # the output shows the weights
sdpa = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
_, w = torch.nn.MultiheadAttention(4, 1, batch_first=True)(query, keys, values, attn_mask=mask)
print("scaled_dot_product_attention:", sdpa[0, 0].numpy())
print("nn.MultiheadAttention:       ", w[0, 0].detach().numpy())

# %% [markdown]
# ### "`is_causal=True` is a causal mask"
#
# *One new query, four keys remembered: which keys does it see?*
#
# <details><summary>Answer</summary>
#
# Only the oldest one. With fewer queries than keys `scaled_dot_product_attention` aligns its triangle at the top left,
# as if the query stood at position 0. A new token stands at the end; this course aligns at the bottom right. Lecture 05
# meets this bug again.
#
# </details>

# %%
query, keys, values = torch.zeros(1, 1, 4), torch.zeros(1, 4, 4), torch.eye(4)[None]      # the output shows the weights
top_left = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
print("PyTorch:    ", top_left[0, 0].numpy())
print("this course:", attention_weights(query.numpy(), keys.numpy(), causal=True)[0, 0])

# %% [markdown]
# ### "Softmax gives every token some weight, and that is the overhead"
#
# *A perfectly sparse map is given to you. Which work does it save?*
#
# <details><summary>Answer</summary>
#
# None of the scores: they were needed to find out which weights are zero. It saves part of the blend. And in floating
# point softmax does give exact zeros, by underflow.
#
# </details>

# %%
q, k = np.random.default_rng(14).standard_normal((2, 64, 16)).astype(np.float32) * 8
weights = softmax(q @ k.T)
print("more than half of the weights are exactly zero:", np.mean(weights == 0) > 0.5)
print(f"scores that had to be computed to know which: {weights.size} of {q.shape[0] * k.shape[0]}")

# %% [markdown]
# ## Going further
#
# Sections that can be read in any order after the parts above have been run. Take those that make you curious; no later
# lecture needs them.

# %% [markdown]
# ### What if the values are the keys?
#
# Section 1.4 kept keys and values apart. **What is lost when an item hands over its own key?** In the recall task of
# section 1.2 a key is a symbol with its place, a value the symbol alone. Here the attention returns its keys.
#
# *Predict.* Does it still answer every question? The model is narrow: three numbers for each symbol.

# %%
class KeysAsValues(Recall):
    def values(self, x):
        return x + self.place.weight                              # the keys of `attend`

narrow = {kind.__name__: [recall_accuracy(train_recall(kind("attention", d=3), seed)).mean() for seed in range(3)]
          for kind in (Recall, KeysAsValues)}
print("values of their own: above 0.99:", min(narrow["Recall"]) > 0.99)
print("keys as values: below 0.85:     ", max(narrow["KeysAsValues"]) < 0.85)

# %% [markdown]
# The place travels along with the symbol and takes room that the symbol needed. With $d = 32$ there is room enough and
# nothing is lost; try it. The translator of part 1 uses its annotations as keys and values at once.

# %% [markdown]
# ### Reading backwards
#
# **Can a fixed vector be helped without attention?** Sutskever et al. (1409.3215) reversed the source sentences, not
# the targets. Their test perplexity fell from 5.8 to 4.7 and BLEU rose from 25.9 to 30.6 (section 3.3). Their
# explanation: the first source words come to stand close to the first target words, and short paths are easier to
# learn. You saw in 1.3 why.
#
# Their network in small: an LSTM reads, its last state starts a second LSTM that writes. The vector is given *once*.

# %%
class Handover(nn.Module):
    """Sutskever's encoder-decoder with one LSTM layer on each side; forward gives logits as Seq2Seq does."""

    def __init__(self, n_source, n_target, d=48):
        super().__init__()
        self.embed_source, self.embed_target = nn.Embedding(n_source, d), nn.Embedding(n_target, d)
        self.reader, self.writer = nn.LSTM(d, d, batch_first=True), nn.LSTM(d, d, batch_first=True)
        self.out = nn.Linear(d, n_target)

    def forward(self, source, target):
        lengths = (source != Vocabulary.PAD).sum(1)
        words = pack_padded_sequence(self.embed_source(source), lengths, batch_first=True, enforce_sorted=False)
        _, state = self.reader(words)
        before = torch.cat([torch.full_like(target[:, :1], Vocabulary.START), target[:, :-1]], dim=1)
        return self.out(self.writer(self.embed_target(before), state)[0])

# %%
def backwards(pairs):
    return [p._replace(source=p.source[::-1]) for p in pairs]

@torch.no_grad()
def perplexity(reading, seed):
    """Test perplexity per word after 200 steps; reading(pairs) is what the encoder gets to read."""
    model = training.initialise(Handover(len(english), len(german)).double(), seed)
    with torch.enable_grad():
        training.fit(model, translation_batches(*as_ids(reading(train)), seed), translation_loss, steps=200, lr=6e-3)
    return math.exp(translation_loss(model, as_ids(reading(test))))

# %% [markdown]
# *Predict.* Does it help here? Remember that these numbers translate almost in order.

# %%
as_written = [perplexity(list, seed) for seed in range(3)]
reversed_ = [perplexity(backwards, seed) for seed in range(3)]
plotting.bars({"as written": as_written, "reversed": reversed_}, ylabel="test perplexity per word",
              title="Reversing the source lowers the perplexity")
plotting.show("Bars of test perplexity for sources read as written and reversed, three seeds each: reversed is lower.")
print("reversed: lower by a tenth or more, for each seed:", all(r < 0.9 * w for r, w in zip(reversed_, as_written)))

# %% [markdown]
# It does. On average a source word is as far from its translation as before; what is shorter is the shortest way: the
# first German word now follows right after the English word it comes from. The paper believes, without a complete
# explanation, that this is the reason: training gets hold at the near end and works its way back from there. Attention
# makes every way that short.

# %% [markdown]
# ### Must a query look everywhere?
#
# So far each query has looked at each key. Luong and colleagues call this *global* and ask for less: the decoder first
# predicts **one position** $p$ in the source, a real number, then looks at the at most $2D + 1$ words around it. They
# call it *local-p*, and predict $p = S\,\sigma(v_p^\top \tanh(W_p h))$ from the decoder's state $h$, with $S$ the
# length of the source (equation 9). **How can a position be predicted without losing the gradient?**
#
# A window alone would lose it: move $p$ a little and the same words are inside. So they multiply the weights by a
# Gaussian around $p$:
#
# $$\alpha_s = \text{softmax}(e)_s \; \exp\!\Big(\!-\frac{(s - p)^2}{2\sigma^2}\Big), \qquad
# \sigma = D/2, \qquad s \in [p - D, p + D]$$
#
# Here $s$ is the position of a key. The softmax runs over the window only; the product is not normalised again.
#
# #### Exercise 1.10: a window that moves  (difficulty 2 of 5, 10 minutes)
#
# | argument | shape | meaning |
# |---|---|---|
# | `scores` | `(n_queries, n_keys)` | any score |
# | `centre` | `(n_queries,)` | the position $p$ of each query, a real number; the first key stands at 0 |
# | `window` | integer, at least 1 | $D$ |
#
# Returns weights of shape `(n_queries, n_keys)`, 0 outside the window. A query whose window holds no key gets zeros.
#
# <details><summary>Hint</summary>
#
# The window is a mask: which pairs have |s - p| at most D? You have a softmax that knows what to do with minus
# infinity.
#
# </details>

# %% tags=["exercise", "export"]
def local_weights(scores, centre, window):
    """Local attention weights (local-p): a softmax over the window around a position, times a Gaussian.

    scores (n_queries, n_keys); centre (n_queries,), real positions among the keys, 0 is the first; window is D >= 1.
    Returns weights (n_queries, n_keys): 0 where a key is more than D from the centre, rows not normalised again.
    Raises ValueError if window is below 1. Source: Luong et al. 2015, arXiv 1508.04025, section 3.2, equation 10.
    """
    if window < 1:
        raise ValueError(f"window is {window}; expected an integer of at least 1")
    ### BEGIN SOLUTION
    distance = np.arange(scores.shape[-1]) - np.asarray(centre)[:, None]
    gaussian = np.exp(-(distance**2) / (2 * (window / 2) ** 2))
    return softmax(np.where(np.abs(distance) <= window, scores, -np.inf)) * gaussian
    ### END SOLUTION

# %%
local_weights = check("1.10", local_weights)

# %% [markdown]
# One query, 21 keys, a predicted position of 8.3 and $D = 4$.

# %%
e = np.random.default_rng(1).standard_normal((1, 21))
local = local_weights(e, np.array([8.3]), 4)[0]
print("keys with a weight:", np.flatnonzero(local), f"  sum of the weights: {local.sum():.3f}")

plotting.curves({"global": softmax(e)[0], "local-p": local}, xlabel="position of the key",
                ylabel="weight", title="Local attention keeps eight keys of twenty-one")
plotting.show("Two curves over 21 key positions: global weights are spread over all of them, "
              "local weights are zero outside 5 to 12.")

# %% [markdown]
# The weights sum to less than 1: the Gaussian only takes away. And the position has a gradient. We move $p$ by a
# thousandth and look at the output, the weighted sum of the positions themselves, first within a window, then across
# its edge.

# %%
def read(p, values=np.arange(21.0)):
    return (local_weights(e, np.array([p]), 4) @ values).item()

for p in (8.3, 9.0):
    print(f"p = {p} - 0.001: output {read(p - 1e-3):.3f}    p = {p} + 0.001: output {read(p + 1e-3):.3f}")
print(f"Gaussian at the edge of the window: {np.exp(-2):.3f}")

# %% [markdown]
# At 8.3 the output moves a little with $p$: a slope. At 9.0 it jumps: the key at 5 leaves while its Gaussian is still
# $e^{-2} \approx 0.14$, and the key at 13 enters. The authors call this differentiable almost everywhere.
#
# *Source: Luong et al. 2015, arXiv 1508.04025, section 3.2. Where the window crosses the end of the sentence, the
# outside is ignored, as here.*

# %% [markdown]
# ### What if a model may look at only one place?
#
# Soft attention reads everything and mixes. *Hard* attention draws one place from the weights and reads only that.
# **Nothing flows back through a draw. How is it trained?**
#
# By REINFORCE: try a place, see how well it went, and make the tried place more likely in proportion. With weights
# $\pi$, a drawn place $a$ and a reward $r_a$, the estimate of the gradient for score $j$ is $r_a\,([a = j] - \pi_j)$.
# Is that the right gradient, on average?

# %%
draw = np.random.default_rng(2)
pi, reward = softmax(draw.standard_normal(9)), draw.standard_normal(9) - 2.0
exact = pi * (reward - pi @ reward)                       # the gradient of the expected reward, all nine places read

def estimates(baseline, n=40_000):
    a = draw.choice(9, size=n, p=pi)
    return (reward[a] - baseline)[:, None] * (np.eye(9)[a] - pi)

for name, baseline in (("no baseline", 0.0), ("baseline: mean reward", pi @ reward)):
    g = estimates(baseline)
    error = np.abs(g.mean(axis=0) - exact) / (g.std(axis=0) / np.sqrt(len(g)))
    noise = np.sqrt(g.var(axis=0).sum())
    print(f"{name:21s}: within 4 standard errors of the truth: {(error < 4).all()}, noise of one draw {noise:.2f}")

# %% [markdown]
# Right on average, with or without a baseline; noisy in each draw, and a baseline takes away much of the noise.
#
# Now both kinds learn the same task. A scene has nine patches, each of a different colour with a digit on it. The
# question names a colour, the answer is the digit.
#
# *Predict.* Which one needs more steps, and about how many times more?

# %%
class Glimpse(nn.Module):
    """Nine coloured patches with digits, and a colour that is asked for. Returns logits of the digit."""

    def __init__(self, n_colours=9, n_digits=5, d=16):
        super().__init__()
        self.query, self.key = nn.Embedding(n_colours, d), nn.Embedding(n_colours, d)
        self.value, self.answer = nn.Embedding(n_digits, d), nn.Linear(d, n_digits)

    def log_weights(self, colours, asked):
        scores = (self.key(colours) @ self.query(asked)[:, :, None]).squeeze(-1)
        return torch.log_softmax(scores / 4, dim=-1)

    def forward(self, colours, digits, asked, hard=False):
        pi = self.log_weights(colours, asked).exp()
        if hard:
            pi = F.one_hot(pi.argmax(-1), pi.shape[-1]).to(pi.dtype)
        return self.answer((pi[:, None] @ self.value(digits)).squeeze(1))

# %%
def scenes(rng, batch):
    colours = rng.permuted(np.tile(np.arange(9), (batch, 1)), axis=1)
    digits, asked = rng.integers(5, size=(batch, 9)), rng.integers(9, size=batch)
    rows = np.arange(batch)
    return [torch.from_numpy(x) for x in (colours, digits, colours[rows, asked], digits[rows, asked])]

def soft_loss(model, batch):
    *scene, digit = batch
    return F.cross_entropy(model(*scene), digit)

# %% [markdown]
# The hard loss draws one patch with Gumbel noise from NumPy (the largest of $\log \pi + g$ is a draw from $\pi$). The
# reward is the log-probability of the right digit, as in *Show, Attend and Tell*; the baseline is its running mean.

# %%
class HardLoss:
    def __init__(self, rng):
        self.rng, self.baseline = rng, 0.0

    def __call__(self, model, batch):
        colours, digits, asked, digit = batch
        log_pi = model.log_weights(colours, asked)
        noise = torch.from_numpy(self.rng.gumbel(size=log_pi.shape))
        a = (log_pi.detach() + noise).argmax(-1, keepdim=True)
        reward = -F.cross_entropy(model.answer(model.value(digits.gather(1, a)).squeeze(1)), digit, reduction="none")
        advantage = reward.detach() - self.baseline
        self.baseline += 0.1 * advantage.mean().item()
        return -(reward + advantage * log_pi.gather(1, a).squeeze(1)).mean()

# %%
test_scenes = scenes(np.random.default_rng(99), 1000)

def learn(hard, seed, steps=400, every=20):
    rng = np.random.default_rng(seed)
    model = training.initialise(Glimpse().double(), seed)

    def accuracy(model):
        *scene, digit = test_scenes
        return (model(*scene, hard=hard).argmax(-1) == digit).float().mean()

    batches = (scenes(rng, 64) for _ in range(steps))
    loss = HardLoss(rng) if hard else soft_loss
    return training.fit(model, batches, loss, steps, lr=1e-2, evaluate=accuracy, every=every)

runs = {name: [learn(hard, seed) for seed in range(3)] for name, hard in (("soft", False), ("hard, REINFORCE", True))}

# %%
curves = {name: np.array([run.metrics for run in histories]) for name, histories in runs.items()}
steps = np.array(runs["soft"][0].steps)
first = {name: np.median([steps[c >= 0.95][0] for c in accuracy]) for name, accuracy in curves.items()}
for name, accuracy in curves.items():
    print(f"{name:16s}: above 95 % at the end in all three runs: {bool((accuracy[:, -1] > 0.95).all())}")
print("hard needs more than twice as many steps (median): ", first["hard, REINFORCE"] >= 1.5 * first["soft"])

plotting.curves(curves, x=steps, xlabel="training step", ylabel="accuracy",
                title="Hard attention learns the same, later and less smoothly")
plotting.show("Accuracy against training steps, three runs each: soft attention reaches 100 % first, hard later.")

# %% [markdown]
# Both get there; the hard one pays for its draws with steps. What it buys: at use it reads one value instead of nine
# (all nine scores are still computed). Local-p, above, is the compromise: a few places, and a gradient.
#
# *Source: Xu et al. 2015, Show, Attend and Tell, arXiv 1502.03044: soft attention trained by back-propagation, hard
# attention by a variational bound or, equivalently, REINFORCE.*

# %% [markdown]
# ### Is an attention weight ever exactly zero?
#
# A softmax of finite scores is positive everywhere. **Are there others that can say "not at all"? And does that save
# work?**
#
# *Sparsemax* takes the point of the simplex that is nearest to the scores. *Entmax* is a family with a dial $\alpha$:
# 1 is the softmax, 2 is sparsemax. For $\alpha > 1$
#
# $$p_j = \big[(\alpha - 1)\, s_j - \tau\big]_+^{1/(\alpha - 1)}$$
#
# and $\tau$ is whatever makes the $p_j$ sum to 1. The sum falls as $\tau$ rises, so $\tau$ is found by halving an
# interval.

# %%
def entmax(scores, alpha):
    """Entmax over the last axis for alpha > 1: like a softmax, with exact zeros. alpha = 2 is sparsemax."""
    z = (alpha - 1) * (scores - scores.max(axis=-1, keepdims=True))
    low, high = np.full_like(z[..., :1], -1.0), np.zeros_like(z[..., :1])      # the sum is at least 1 at -1, and 0 at 0
    for _ in range(60):
        tau = (low + high) / 2
        too_much = (np.maximum(z - tau, 0) ** (1 / (alpha - 1))).sum(axis=-1, keepdims=True) > 1
        low, high = np.where(too_much, tau, low), np.where(too_much, high, tau)
    return np.maximum(z - tau, 0) ** (1 / (alpha - 1))

def sparsemax(scores):
    """Sparsemax over the last axis, exactly: sort, find how many stay above the threshold, subtract it."""
    s = -np.sort(-scores, axis=-1)
    count = np.arange(1, s.shape[-1] + 1)
    support = (1 + count * s > s.cumsum(axis=-1)).sum(axis=-1, keepdims=True)
    tau = (np.take_along_axis(s.cumsum(axis=-1), support - 1, axis=-1) - 1) / support
    return np.maximum(scores - tau, 0)

# %% [markdown]
# Two ways to the same numbers, and values that can be had by hand. For two scores $(t, 0)$ sparsemax is $(1 + t)/2$,
# cut at 1. For $\alpha = 1.5$ the roots $a, b$ of the two weights obey $a - b = t/2$ and $a^2 + b^2 = 1$, so
# $a = (t + \sqrt{8 - t^2})/4$.

# %%
rows = np.random.default_rng(3).standard_normal((1000, 20)) * 3
t = np.linspace(0, 3, 61)
two = np.stack([t, np.zeros_like(t)], axis=-1)
by_hand_2 = np.minimum((1 + t) / 2, 1)
by_hand_15 = np.where(t < 2, (t + np.sqrt(8 - np.minimum(t, 2) ** 2)) / 4, 1) ** 2

print("bisection at alpha = 2 is sparsemax to 1e-10: ", np.allclose(entmax(rows, 2.0), sparsemax(rows), atol=1e-10))
print("sparsemax of two scores, by hand:             ", np.allclose(sparsemax(two)[:, 0], by_hand_2))
print("entmax-1.5 of two scores, by hand:            ", np.allclose(entmax(two, 1.5)[:, 0], by_hand_15))
print("alpha close to 1 is close to softmax (to 1e-3):", np.allclose(entmax(rows, 1.0001), softmax(rows), atol=1e-3))

# %%
smaller = {"softmax": softmax(two)[:, 1], "entmax-1.5": entmax(two, 1.5)[:, 1], "sparsemax": sparsemax(two)[:, 1]}
plotting.curves(smaller, x=t, xlabel="by how much the other score is larger", ylabel="weight of the smaller score",
                title="Sparsemax is zero from a gap of 1, entmax-1.5 from 2, softmax never")
plotting.show("Weight of the smaller of two scores against their gap: three falling curves; "
              "sparsemax and entmax reach zero, softmax only approaches it.")

# %% [markdown]
# So there are others, and they say zero. Does that save the $QK^\top$? A weight is known to be zero only once its
# score is known.

# %%
draw = np.random.default_rng(4)
n, d = 256, 64
q, k = draw.standard_normal((2, n, d))
s = q @ k.T / np.sqrt(d)
print("              zero weights   FLOPs of Q K^T   FLOPs of the blend, zeros skipped")
for name, p in (("softmax", softmax(s)), ("entmax-1.5", entmax(s, 1.5)), ("sparsemax", sparsemax(s))):
    print(f"{name:11s} {np.mean(p == 0):12.0%} {2 * n * n * d:16,d} {2 * (p > 0).sum() * d:22,d}")

# %% [markdown]
# It does not. All three compute all scores; only the second product gets lighter, and a GPU that works on tiles would
# have to find whole tiles of zeros. The cost of attention is not in the small weights. It is in computing the scores
# (lecture 07 skips those).
#
# #### And softmax itself, in floating point?

# %%
for dtype, stays, goes in ((np.float16, 10, 20), (np.float32, 80, 110), (np.float64, 700, 750)):
    w = [softmax(np.array([0.0, -gap], dtype=dtype))[1] for gap in (stays, goes)]
    print(f"{dtype.__name__}: above zero at a gap of {stays:3d}: {w[0] > 0}, exactly zero at {goes:3d}: {w[1] == 0}")

# %% [markdown]
# "Softmax is never zero" is true of real numbers. In half precision a score that is 20 below the best one has a
# weight of exactly 0, by underflow.
#
# *Sources: Martins and Astudillo 2016, arXiv 1602.02068 (sparsemax); Peters, Niculae and Martins 2019, arXiv
# 1905.05702 (entmax).*

# %% [markdown]
# ### Can attention follow a chain of facts?
#
# "Which river flows through the capital of Italy?" No single fact answers that. **What if the answer of one look-up
# becomes the query of the next?** A key-value memory network does this. A fact is stored as a key (subject and
# relation) and a value (object); each round, a *hop*, is one attention. The vectors below are random, not learned: we
# want to see the mechanism.

# %%
facts = [("Italy", "capital", "Rome"), ("France", "capital", "Paris"), ("Egypt", "capital", "Cairo"),
         ("Rome", "river", "Tiber"), ("Paris", "river", "Seine"), ("Cairo", "river", "Nile")]
draw = np.random.default_rng(5)
names = sorted({name for fact in facts for name in fact})
vector = {name: x / np.linalg.norm(x) for name, x in zip(names, draw.standard_normal((len(names), 64)))}

keys = np.stack([vector[subject] + vector[relation] for subject, relation, _ in facts])
values = np.stack([vector[obj] for _, _, obj in facts])

# %%
def two_hops(subject, relations, beta):
    """Follow two relations from a subject. Returns the weights over the facts at each hop, (2, n_facts)."""
    state, hops = vector[subject], []
    for relation in relations:
        weights = softmax(beta * (state + vector[relation]) @ keys.T)
        state = weights @ values
        hops.append(weights)
    return np.stack(hops)

hops = two_hops("Italy", ("capital", "river"), beta=8)
plotting.heatmap(hops, queries=["hop 1: capital", "hop 2: river"],
                 keys=[f"{relation}({subject})" for subject, relation, _ in facts],
                 title="The first hop finds Rome, the second finds the Tiber")
plotting.show("Heat map of two hops over six facts: hop 1 is bright on Italy's capital, hop 2 on the river of Rome.")

# %% [markdown]
# It can. But the second hop starts from what the first one read, and the first reads softly.
#
# *Predict.* If hop 1 puts 90 % on the right fact, is hop 2 better or worse than 90 %?

# %%
betas = np.arange(1.0, 13.0)
right = np.array([[w[0, 0], w[1, 3]] for w in (two_hops("Italy", ("capital", "river"), b) for b in betas)])
plotting.curves({"hop 1: Rome": right[:, 0], "hop 2: Tiber": right[:, 1]}, x=betas, xlabel="sharpness of the softmax",
                ylabel="weight of the right fact", title="A blurred first hop costs the second one")
plotting.show("Weight of the right fact against sharpness: the second hop's curve lies below the first one's.")
print("hop 2 is below hop 1 at every sharpness:", bool((right[:, 1] < right[:, 0]).all()))
print(f"at sharpness 3: hop 1 {right[2, 0]:.2f}, hop 2 {right[2, 1]:.2f}")

# %% [markdown]
# Worse, at every sharpness here: a mixture of Rome, Paris and Cairo asks for three rivers at once. In the paper the
# vectors are learned, and so is the step from one hop to the next.
#
# *Source: Miller et al. 2016, Key-Value Memory Networks for Directly Reading Documents, arXiv 1606.03126.*

# %% [markdown]
# ### How are weights taken out of a model that does not return them?
#
# With a forward hook: a function that PyTorch calls with the output of a module. Tools such as TransformerLens are
# this idea, carried through a whole model.

# %%
from contextlib import contextmanager

@contextmanager
def cached(modules):
    """Record the output of each named module during the block. Yields a dict that the forward pass fills."""
    cache = {}
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: cache.__setitem__(name, output))
        for name, module in modules.items()
    ]
    try:
        yield cache
    finally:
        for handle in handles:
            handle.remove()

# %%
model, tokenizer = data.minilm()
text = "The animal didn't cross the street because it was too tired."
returned, _ = data.minilm_attention(text)
inputs = tokenizer(text, return_tensors="pt")
layers = [layer.attention.self for layer in model.encoder.layer]
hooks = sum(len(layer._forward_hooks) for layer in layers)
with torch.no_grad(), cached(dict(enumerate(layers))) as cache:
    model(**inputs)

caught = np.stack([cache[i][1][0].numpy() for i in range(6)])         # output 0 is the context, output 1 the weights
print("shape:", caught.shape, "  equal to what it returns, to 1e-6:", np.allclose(caught, returned, atol=1e-6))
print("no hook left behind:", sum(len(layer._forward_hooks) for layer in layers) == hooks)

# %% [markdown]
# ### Six layers, one map?
#
# In the last layer the row of "it" says how much was taken from each *position*, and by then each position is a mixture
# of all words. **How much comes from each word of the input?** *Attention rollout* multiplies the maps of all layers,
# each averaged over heads and mixed half and half with the identity, because the residual connection carries each
# position on unchanged.

# %%
def rollout(weights):
    """Attention rollout: weights (layers, heads, n, n) to one map (n, n) from the last layer to the input."""
    n = weights.shape[-1]
    result = np.eye(n)
    for layer in weights.mean(axis=1):
        result = (0.5 * layer + 0.5 * np.eye(n)) @ result
    return result

w, words = data.minilm_attention("The animal didn't cross the street because it was too tired.")
plotting.heads(np.stack([w[-1].mean(axis=0), rollout(w)]), words, words, names=["last layer, mean", "rollout"],
               title="Rollout: more than half of every row comes from [CLS]")
plotting.show("Two heat maps of the same sentence: the mean map of the last layer, and the rollout of all six layers, "
              "where every row is brightest at [CLS].")
print("smallest share of [CLS] in a row of the rollout:", rollout(w)[:, 0].min().round(2))

# %% [markdown]
# When is this exactly right? When a layer does nothing but mix: $x \leftarrow \frac12 x + \frac12 A x$. Then the
# rollout **is** the Jacobian. With value matrices in between, the maps no longer tell. Three layers, seven tokens:

# %%
def jacobian_norms(maps, value_matrices, n=7, d=8):
    """How strongly each output position depends on each input position, rows normalised."""
    def network(x):
        for a, w in zip(maps, value_matrices):
            x = 0.5 * x + 0.5 * a @ x @ w
        return x

    jacobian = torch.autograd.functional.jacobian(network, torch.zeros(n, d, dtype=torch.float64))     # (n, d, n, d)
    norms = jacobian.pow(2).sum(dim=(1, 3)).sqrt()
    return (norms / norms.sum(-1, keepdim=True)).numpy()

draw = np.random.default_rng(6)
maps = softmax(2 * draw.standard_normal((3, 7, 7)))
torch_maps = torch.from_numpy(maps)
identity = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
random = torch.from_numpy(draw.standard_normal((3, 8, 8)) / np.sqrt(8))
for name, matrices in (("no value matrices", identity), ("random value matrices", random)):
    difference = np.abs(jacobian_norms(torch_maps, matrices) - rollout(maps[:, None])).max()
    print(f"{name:21s}: rollout is the Jacobian to 1e-10: {difference < 1e-10}, largest difference {difference:.2f}")

# %% [markdown]
# And in MiniLM? We remove one word (replace it by `[MASK]`), see how far the other words' final vectors move, and ask
# whether a map ranks the words in the same order.

# %%
model, tokenizer = data.minilm()

def rank_correlation(a, b):
    return np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1]

@torch.no_grad()
def agreement(text):
    """Mean rank correlation, over the words of a text, of three maps with what removing each other word changes."""
    w, words = data.minilm_attention(text)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    final = model(input_ids=ids).last_hidden_state[0]
    inner, moved = np.arange(1, len(words) - 1), np.zeros((len(words), len(words)))
    for j in inner:
        changed = ids.clone()
        changed[0, j] = tokenizer.mask_token_id
        moved[:, j] = (model(input_ids=changed).last_hidden_state[0] - final).norm(dim=-1)
    candidates = {"last layer": w[-1].mean(0), "rollout": rollout(w), "mean of all layers": w.mean((0, 1))}
    return {name: np.mean([rank_correlation(m[i, inner[inner != i]], moved[i, inner[inner != i]]) for i in inner])
            for name, m in candidates.items()}

texts = ["The animal didn't cross the street because it was too tired.",
         "The animal didn't cross the street because it was too wide.",
         "The old man the boats while the young wait at home.",
         "She gave the book to her brother because he had asked for it."]
found = [agreement(text) for text in texts]
plotting.bars({name: [f[name] for f in found] for name in found[0]}, ylabel="rank correlation with removal",
              title="Here a plain mean over layers ranks words better than rollout")
plotting.show("Three bars, rank correlation with the effect of removing words: the mean of all layers is highest.")
above = all(f["mean of all layers"] > f["rollout"] for f in found)
print("mean of all layers above rollout, in each of the four sentences:", above)

# %% [markdown]
# On these four sentences the plain mean wins. The authors report that rollout agrees with removal better than raw
# attention does, on their models and tasks. Four sentences do not overturn that. They show that it has to be measured
# on the model in question.
#
# *Source: Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers, arXiv 2005.00928.*

# %% [markdown]
# ### When does the output determine the weights?
#
# Section 1.8 showed two rows of weights with one output. **When is that possible?** The condition: a change $\delta$ of
# a row is invisible if $\delta^\top V = 0$, and allowed if $\delta^\top \mathbf{1} = 0$ and no weight turns negative. A
# row with positive weights has such a change exactly when the number of keys exceeds the rank of $[V\;\mathbf{1}]$.
# That rank is at most $d_\text{head} + 1$: **with more keys than that, other maps always exist.** For one head of 32
# dimensions:

# %%
draw = np.random.default_rng(7)
for n in (16, 33, 34, 64, 512):
    values = draw.standard_normal((n, 32))
    fixed = np.concatenate([values, np.ones((n, 1))], axis=1)                       # what a change may not touch
    row = softmax(draw.standard_normal(n))
    delta = softmax(draw.standard_normal(n)) - row                                  # towards another map
    delta -= fixed @ np.linalg.lstsq(fixed, delta, rcond=None)[0]                   # only the part that nobody sees
    free = n - np.linalg.matrix_rank(fixed)
    if free:
        other = row + delta * np.min(row[delta < 0] / -delta[delta < 0])            # as far as the first weight at zero
        print(f"{n:4d} keys: {free:3d} free directions; {np.abs(other - row).sum() / 2:.2f} of the weight moved, "
              f"output unchanged: {np.allclose(other @ values, row @ values)}")
    else:
        print(f"{n:4d} keys:   0 free directions; the output determines the row")

# %% [markdown]
# Is the row of "it" in our sentence determined? MiniLM has 32 dimensions a head and the sentence has 16 tokens. The
# values are computed from the hidden states between its layers.

# %%
model, tokenizer = data.minilm()
inputs = tokenizer("The animal didn't cross the street because it was too tired.", return_tensors="pt")
with torch.no_grad():
    hidden = model(**inputs, output_hidden_states=True).hidden_states          # what enters each layer, (1, 16, 384)
    flat = [layer.attention.self.value(x)[0] for layer, x in zip(model.encoder.layer, hidden)]
head_values = np.stack(flat).reshape(6, 16, 12, 32).transpose(0, 2, 1, 3)          # (layers, heads, n, d_head)
fixed = np.concatenate([head_values, np.ones((6, 12, 16, 1))], axis=-1)
ranks = np.linalg.matrix_rank(fixed)
print(f"rank of [V 1] in the 72 heads: {ranks.min()} to {ranks.max()}, for 16 keys")

# %% [markdown]
# It is: 16 independent values, so a head's output betrays its weights. In a text of more than 33 tokens it no longer
# does. And even a determined weight is not yet an explanation: it says what was read, not whether that changed the
# answer. "Attention is not explanation" and "Attention is not *not* explanation" are both titles of papers; the
# second one's point is that it depends on what is asked of an explanation, and that this can be tested.
#
# *Sources: Brunner et al. 2019, On Identifiability in Transformers, arXiv 1908.04211 (weights are not identifiable
# for sequences longer than the head dimension); Wiegreffe and Pinter 2019, Attention is not not Explanation, arXiv
# 1908.04626, answering Jain and Wallace 2019.*

# %% [markdown]
# ### What would resolving "it" take?
#
# No single head of the trained model did it. **Is a look-up enough in principle?** Here is one by hand. Warning: the
# vectors are **constructed to make it work**. This shows what attention can express, not what any model has learned.
#
# Two features: can be tired, can be wide. First "it" looks up the adjective, then it looks for a noun that fits what
# it found.

# %%
words = ["animal", "street", "it", "tired", "wide"]
fits = np.array([[1, 0], [0, 1], [0, 0], [1, 0], [0, 1]], dtype=float)          # can be tired, can be wide
is_adjective, is_noun = np.array([0, 0, 0, 1, 1.0]), np.array([1, 1, 0, 0, 0.0])

rows = []
for adjective in ("tired", "wide"):
    heard = np.array([w not in ("tired", "wide") or w == adjective for w in words])      # one adjective a sentence
    found = softmax(np.where(heard, 10 * is_adjective, -np.inf)) @ fits                  # layer 1: which adjective?
    rows.append(softmax(np.where(heard, 10 * is_noun + 5 * fits @ found, -np.inf)))      # layer 2: which noun fits?
plotting.heatmap(np.stack(rows), queries=["it ... tired", "it ... wide"], keys=words,
                 title="Constructed: two look-ups resolve the pronoun")
plotting.show('Heat map of two rows: with "tired" the pronoun looks at "animal", with "wide" at "street".')

# %% [markdown]
# Two look-ups are enough. The order matters: which noun fits depends on the adjective, so the query for the noun must
# first be made.
#
# And when the sentence does not say? Turkish *o* is he, she and it. "Ali, Ayşe, kitap ... *O uyudu*": somebody slept.
# Books do not sleep; the rest stays open.

# %%
candidates = ["Ali (he)", "Ayşe (she)", "kitap (the book)"]
can = {"uyudu (slept)": [1, 1, 0], "düştü (fell)": [1, 1, 1]}
for verb, able in can.items():
    print(f"O {verb:14s}", "  ".join(f"{c} {w:.2f}" for c, w in zip(candidates, softmax(8.0 * np.array(able)))))

# %% [markdown]
# Half and half is the right answer. A translator into English has to write *he* or *she* anyway; what it picks then
# comes from its training data, not from the sentence.

# %% [markdown]
# ### What does a sentiment model look at?
#
# Yang and colleagues let words vote for the meaning of a sentence and sentences for the meaning of a review. Both
# times the "query" is a learned vector $u$: which words matter, in general? Their paper shows the weights as heat
# maps of Yelp reviews. **Does such a map show the words that decide?**
#
# Our reviews are synthetic: four sentences of filler, in one of them an opinion, in half of the reviews with *not*
# before it.

# %%
good, bad = ["great", "delicious", "friendly"], ["awful", "bland", "rude"]
filler = ["the", "food", "staff", "was", "and", "we", "sat", "table", "menu", "on", "street", "it"]
lexicon = good + bad + ["not"] + filler

def reviews(rng, batch):
    """(words (batch, 4, 6), positive (batch,), sentence, position): where the opinion word stands in each review."""
    x = rng.integers(7, len(lexicon), size=(batch, 4, 6))
    positive, negated = rng.integers(2, size=(2, batch))
    row, s, p = np.arange(batch), rng.integers(4, size=batch), rng.integers(1, 6, size=batch)
    x[row, s, p] = np.where(positive ^ negated, 0, 3) + rng.integers(3, size=batch)
    x[row, s, p - 1] = np.where(negated, 6, x[row, s, p - 1])
    return torch.from_numpy(x), torch.from_numpy(positive), s, p

# %%
class Pool(nn.Module):
    """Attention with a learned query: rows h (..., n, d) to one vector (..., d), and the weights (..., n)."""

    def __init__(self, d):
        super().__init__()
        self.project, self.u = nn.Linear(d, d), nn.Linear(d, 1, bias=False)

    def forward(self, h):
        weights = torch.softmax(self.u(torch.tanh(self.project(h))).squeeze(-1), dim=-1)
        return (weights[..., None, :] @ h).squeeze(-2), weights

class Hierarchical(nn.Module):
    """Words to sentences to a review, with a Pool at each step. Without the GRU, words do not see their neighbours."""

    def __init__(self, recurrent, d=16):
        super().__init__()
        self.embed = nn.Embedding(len(lexicon), d)
        self.gru = nn.GRU(d, d // 2, bidirectional=True, batch_first=True) if recurrent else None
        self.words, self.sentences, self.out = Pool(d), Pool(d), nn.Linear(d, 2)

    def forward(self, x):
        h = self.embed(x)
        if self.gru is not None:
            h = self.gru(h.flatten(0, 1))[0].view(h.shape)
        sentences, word_weights = self.words(h)
        review, sentence_weights = self.sentences(sentences)
        return self.out(review), word_weights, sentence_weights

# %%
test_reviews, positive, s, p = reviews(np.random.default_rng(9), 1000)

def train_reader(recurrent, seed):
    rng = np.random.default_rng(seed)
    reader = training.initialise(Hierarchical(recurrent).double(), seed)
    batches = (reviews(rng, 32) for _ in range(300))
    training.fit(reader, batches, lambda model, batch: F.cross_entropy(model(batch[0])[0], batch[1]), 300, lr=1e-2)
    with torch.no_grad():
        logits, word_weights, sentence_weights = reader(test_reviews)
    return (logits.argmax(-1) == positive).float().mean().item(), word_weights.numpy(), sentence_weights.numpy()

alone, _, _ = train_reader(recurrent=False, seed=0)
readers = [train_reader(recurrent=True, seed=seed) for seed in range(3)]
print("words alone:      below 85 % right:", alone < 0.85)
print("words in context: above 97 % right in all three runs:", all(accuracy > 0.97 for accuracy, _, _ in readers))

# %% [markdown]
# Without context *not* and *great* are two votes, and no sum of votes is "not great". With a GRU underneath, the same
# pooling solves the task. Now the map of one of the three models, for one review with *not* and one without.

# %%
row = np.arange(1000)
negated = test_reviews[row, s, p - 1].numpy() == 6
_, word_weights, sentence_weights = readers[1]
figure, axes = plt.subplots(1, 2, figsize=(11, 2.8))
shown = {'"not" takes the weight': np.flatnonzero(negated)[0],
         "the opinion takes the weight": np.flatnonzero(~negated)[0]}
for ax, (title, review) in zip(axes, shown.items()):
    ax.imshow(word_weights[review], cmap="viridis", vmin=0, vmax=1, aspect="auto")
    ax.grid(False)
    for (i, j), weight in np.ndenumerate(word_weights[review]):
        ax.text(j, i, lexicon[test_reviews[review, i, j]], ha="center", va="center", fontsize=9,
                color="black" if weight > 0.6 else "white")
    ax.set(title=title, xticks=[], ylabel="weight of sentence")
    ax.set_yticks(range(4), [f"{w:.2f}" for w in sentence_weights[review]])
plotting.show("Two synthetic reviews of four sentences as heat maps of word weights, sentence weights at the side: "
              "the opinion's sentence has almost all.")

# %% [markdown]
# As in the paper's figure, the sentence with the opinion lights up. Do all three models agree on that?
#
# *Predict.* All three are right in nearly all reviews. In how many reviews does the deciding sentence have the
# largest weight?

# %%
found = [np.mean(sentences.argmax(-1) == s) for _, _, sentences in readers]
print("deciding sentence has the largest weight: in one model above 95 % of reviews:", max(found) > 0.95)
print("                                          in another below 90 %:             ", min(found) < 0.9)
opinion = np.stack([words[row, s, p] for _, words, _ in readers])              # (3, 1000): weight of the opinion word
before = np.stack([words[row, s, p - 1] for _, words, _ in readers])           # and of the word before it
for name, which in (("without not", ~negated), ("with not", negated)):
    print(f"{name:11s}: the opinion has more weight than the word before it, mean of each model:",
          opinion[:, which].mean(1) > before[:, which].mean(1))

# %% [markdown]
# They do not agree. Three models answer alike and draw three maps: a softmax has to put its weight somewhere, and a
# sentence vector that says nothing may get a large share and do no harm. The words are less literal than they look,
# too. With *not*, most of the weight lies on *not* itself, whose GRU state has already seen the word after it. A
# weight belongs to a **state**, and a state knows its neighbours. The word printed on the cell is only where the
# state stands.
#
# *Source: Yang et al. 2016, Hierarchical Attention Networks for Document Classification, NAACL, pages 1480 to 1489
# (aclanthology.org/N16-1174).*

# %% [markdown]
# ### What changes in half precision?
#
# Half precision holds numbers up to 65504. **Which steps of attention leave that range?** Three do, each at its own
# place.
#
# *Predict.* At which score does $e^s$ overflow in half precision: 11, 88 or 700?

# %%
with np.errstate(over="ignore", invalid="ignore"):
    s = np.array([12.0, 11.0, 0.0], dtype=np.float16)
    print("exp of 11 and 12:       ", np.exp(s)[1], np.exp(s)[0])
    print("softmax without a shift:", np.exp(s) / np.exp(s).sum())
    print("softmax of the lecture: ", softmax(s).round(3))

# %% [markdown]
# Just above 11, since $\ln 65504 = 11.09$. In half precision the shift by the maximum is no nicety. Second: the
# product itself.

# %%
q, k = torch.full((1, 64), 40.0), torch.full((1, 64), 40.0)
half_q, half_k = q.half(), k.half()
print("true score, scaled:           ", (q @ k.T / 8).item())
print("half precision, product first:", ((half_q @ half_k.T) / 8).item())
print("half precision, scale first:  ", ((half_q / 8) @ half_k.T).item())

# %% [markdown]
# The sum of 64 products is 102400, beyond the range, although the scaled score is not. Scaling $q$ first costs less
# (n × d divisions, not n × n) and saves it. Third: the mask.
#
# *Predict.* A row that may attend nothing is masked with $-10^9$ instead of $-\infty$. What are its weights?

# %%
row = np.array([3.0, 1.0, -2.0], dtype=np.float32)
print("-1e9 in float32, all masked:", softmax(row + np.float32(-1e9)).round(3))
print("-1e4 in float32, all masked:", softmax(row + np.float32(-1e4)).round(2))
print("-1e4 in float16, all masked:", softmax(row.astype(np.float16) + np.float16(-1e4)).round(3))
with np.errstate(over="ignore"):
    print("-1e9 in float16 is:         ", np.float32(-1e9).astype(np.float16))
    print("two masks of -65504 add to: ", np.float16(-65504) + np.float16(-65504))
print("minus infinity, guarded:    ", softmax(np.full(3, -np.inf, dtype=np.float32)))

# %% [markdown]
# A uniform average over keys that it may not see: near $-10^9$ neighbouring float32 numbers are 64 apart, so the
# scores vanish in the mask. The smaller $-10^4$ keeps the scores in float32, and with them the forbidden answer; in
# half precision it loses them too. Only minus infinity with a guard says what is meant: nothing.

# %% [markdown]
# ## Glossary
#
# The first line of each function's own description. If a definition changes in the code, it changes here.

# %%
import inspect

from IPython.display import Markdown

from attention import fundamentals

terms = {"attention": "attention_numpy", "attention weight": "attention_weights", "softmax": "softmax",
         "additive score": "additive_scores",
         "causal mask": "causal_mask", "padding mask": "padding_mask", "local attention": "local_weights"}
rows = ["| term | function | what it is |", "|---|---|---|"]
rows += [f"| {term} | `{name}` | {inspect.getdoc(getattr(fundamentals, name)).splitlines()[0]} |"
         for term, name in terms.items()]
Markdown("\n".join(rows))

# %% [markdown]
# The other words are ways to call these functions: *query*, *key* and *value* are the three arguments; a *score* is a
# weight before the softmax; in *self-attention* all three come from one sequence, in *cross-attention* keys and
# values come from another; *SDPA* is PyTorch's name for the whole.

# %%
draw = np.random.default_rng(8)
x, y = draw.standard_normal((5, 8)), draw.standard_normal((3, 8))
print("self-attention  attention(x, x, x):", attention_numpy(x, x, x).shape, "  weights", attention_weights(x, x).shape)
print("cross-attention attention(x, y, y):", attention_numpy(x, y, y).shape, "  weights", attention_weights(x, y).shape)
sdpa = F.scaled_dot_product_attention(*(torch.from_numpy(a)[None] for a in (x, y, y)))[0].numpy()
print("SDPA is the same function to 1e-10:", np.allclose(sdpa, attention_numpy(x, y, y), atol=1e-10))

# %% [markdown]
# ## Summary
#
# - A recurrent state is a bottleneck. Attention keeps everything and searches it when the question is known; the path
#   from any input to the output is one step long.
# - $O = \text{softmax}(QK^\top / \sqrt d)\, V$. Keys decide where to look, values what comes back. The softmax is
#   shifted by the row's maximum, the scores are divided by $\sqrt d$ so that it starts unsaturated, and a mask writes
#   $-\infty$ before it. A row with nothing to attend to is zero.
# - The cost: $4 n m d$ floating-point operations and, if written out, $n m$ weights. Tiles in shared memory keep the
#   weights out of global memory.
# - Weights show where a model looked. That is evidence, not an explanation.
#
# **Exercises left.**
#
# 1. The fixed vector of part 1 had 150 steps. Train it for 1,500. How far does its curve move, and where does it stay low?
# 2. `ATTENTION_TILED` reads K twice. What would it have to remember to read it once? (Lecture 06.)
# 3. Write the backward pass of `additive_scores`.
# 4. Find a sentence where layer 3 head 1 of MiniLM does not look at the subject.
#
# **Sources.** Bahdanau, Cho, Bengio 2014 (arXiv 1409.0473) · Sutskever, Vinyals, Le 2014 (1409.3215) · Cho et al. 2014
# (1409.1259) · Luong, Pham, Manning 2015 (1508.04025) · Xu et al. 2015 (1502.03044) · Miller et al. 2016 (1606.03126) ·
# Martins, Astudillo 2016 (1602.02068) · Vaswani et al. 2017 (1706.03762) · Peters, Niculae, Martins 2019 (1905.05702) ·
# Brunner et al. 2019 (1908.04211) · Wiegreffe, Pinter 2019 (1908.04626) · Abnar, Zuidema 2020 (2005.00928).
