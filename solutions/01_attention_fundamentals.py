# ---
# jupyter:
#   course:
#     edition: 2
#     experiments:
#     - HISTORY
#     - minilm_head
#     - Recall
#     - recall_streams
#     - recall_loss
#     - train_recall
#     - recall_accuracy
#     - influence
#     - translation
#     - translation_batches
#     - translation_loss
#     - train_translator
#     - exactly_right
#     - source_lengths
#     - align
#     - agreement
#     module: fundamentals
#     public:
#     - attention_numpy
#     - attention_torch
#     - attention_cuda
#     - softmax
#     - attention_weights
#     - causal_mask
#     - padding_mask
#     - AdditiveAttention
#     - Seq2Seq
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["slide"]
# # Lecture 01 · Attention fundamentals
#
# **The question.** How does one word of a sentence find out about another? **You will be able to** *write* attention in
# NumPy (1A to 1C), *build* it as a layer and *train* it (1D, 1E), *test* it (1F), *say* where its bytes go on a GPU (1G).
# **You need** matrix products, gradients, NumPy; of PyTorch tensors, `nn.Module`.
#
# | part or section | core minutes | more minutes |
# |---|---|---|
# | Part 1 · the question: 1.1 to 1.3 | 22 | |
# | Part 2 · NumPy: 1.4 to 1.9, exercises 1A, 1C | 68 | |
# | Part 3 · PyTorch: 1.10 to 1.13, exercises 1D, 1E | 47 | |
# | Part 4 · CUDA: 1.14 | 26 | |
# | Part 5 · does it matter: 1.15, 1.16 | 17 | |
# | Another day: exercises 1B, 1F, 1G | | 40 |
# | Going further: 1.17 to 1.33, exercise 1H | | 190 |
# | **together** | **180** | **230** |
#
# Until an exercise passes, the lecture uses its own answer. Predict before you read a cell.

# %% [markdown] tags=["teacher"]
# **For the teacher: two times 50 minutes, ten to spare in each.** Run everything before class. The learner's copy has
# no outputs, so each prediction can be asked before its cell is run.
#
# - *Hour 1 (40).* The sentence and the surprise (4) · 1.2: table, four sketched curves, the figure (8) · 1.3: the
#   figure only (3) · 1.4: dictionary, soft dictionary, where q, k and v come from (11) · 1.5: flow figure, loop equals
#   matrix (6) · 1.6: overflow, the scale on the sentence (5) · say what 1A asks (3).
# - *At home after hour 1.* 1A, the timeline of 1.1, and 1.7 with a pencil: all are taught by then.
# - *Hour 2 (40).* 1.7: compared, or done now where nobody has (3) · 1.9: masks, the leak, the mask that comes too late
#   (9) · 1.10: the shape contract of 1D (3) · 1.11: the loop in eight lines (6) · 1.13: the table of bugs, guess each
#   line first (8) · 1.14: coalescing, bytes of three kernels and of one (7) · 1.15: the two curves (4).
# - *At home after hour 2.* 1C, 1D, 1E. For volunteers 1B, 1F, 1G.
# - *Board.* $O = \text{softmax}(QK^\top/\sqrt d)\,V$ with the shapes under each letter; the flow figure of 1.5.
# - *Always works.* In 1.9 the class chooses another place and another loud number: the rows before it never change. With
#   minutes to spare 1.8, a sentence of theirs: `lean("...", "noun", "other noun")[3, 1]`, common nouns only (one token
#   each). It may look at either: "The dog chased the cat because it was hungry" goes to the cat.
# - *Checkpoint 1.* Three keys with equal scores: which weights? (One third each.) *Checkpoint 2.* Which rows change
#   under a causal mask when word 3 changes? (Row 3 and all later ones.)
# - *Skip first.* 1.3 and the comparison of 1.7 (6 minutes), then 1.15 (4): all three read well at home.
# - *Questions that come.* Is the fixed vector only under-trained? In part, see the first exercise left. Does the model
#   understand "it"? Section 1.8 has the control.

# %%
import math
import os
import sys
from functools import partial

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
# "The animal didn't cross the street because it was too **tired**." The row of *it* below shows where, in a trained
# network (MiniLM), this word takes its information from.
#
# *Predict.* The last word becomes **wide**. It stands *behind* "it". Does the row of "it" change?

# %% tags=["slide"]
tired = "The animal didn't cross the street because it was too tired."
rows = []
for sentence in (tired, tired.replace("tired", "wide")):
    maps, tokens = data.minilm_attention(sentence)  # (6 layers, 12 heads, 16, 16)
    rows.append(maps[3, 1, tokens.index("it")])  # layer 3, head 1: two words of 1.4
tokens[tokens.index("wide")] = "tired/wide"
plotting.heatmap(np.stack(rows), ["it ... tired", "it ... wide"], tokens,
                 title='Another last word, and "it" looks less at the animal')
plotting.show('Two rows of weights of the word "it" over sixteen tokens: with "tired" '
              '0.68 lies on "animal", with "wide" 0.28.')

# %% [markdown]
# It does: from 0.68 on *animal* to 0.28. Each row sums to 1; its numbers are **attention weights**. This lecture is
# about that 0.68. You will compute it with loops, in three lines of NumPy, as a layer in PyTorch and as a CUDA kernel,
# and it will be 0.68 each time. A text is cut into **tokens**: here
# words, marks, and two that frame the sentence, `[CLS]` and `[SEP]`.
#
# ### 1.1 Historical context
#
# **How old is the idea?** Older than its name: a weighted sum whose weights depend on the data. The soft window of 2013
# weighted characters by position; the *additive attention* of Bahdanau, Cho and Bengio weighted words by **content**
# (arXiv September 2014, ICLR 2015: both years are cited).

# %%
from attention.experiments.fundamentals import HISTORY

plotting.timeline(HISTORY,
                  title="From a state that remembers to a memory that is searched")
plotting.show("Timeline of 18 steps, from the Elman network of 1990 to 2025.")

# %% [markdown] tags=["slide"]
# ### 1.2 From windows to attention: four ways to remember
#
# **What was the symbol $k$ steps ago?** Sixteen symbols go by, each one of eight. Then comes the question, for every $k$
# from 0 to 15. Whoever guesses is right one time in eight. Four networks in the order of their invention. They differ
# in what they hand over when the question comes (and train for 300 or 500 steps):
#
# |memory|hands over|
# |---|---|
# |window|the last four symbols, mixed by one layer (a feed-forward net)|
# |RNN|its **state**: one vector, rewritten at each step, $h_t = f(h_{t-1}, x_t)$|
# |LSTM|its state, and **gates** that decide how much of it is rewritten (a GRU has fewer gates)|
# |attention|for each question another blend of all sixteen symbols|
#
# *Predict.* Sketch four curves, accuracy against $k$. Where does each one fall?

# %% tags=["slide"]
from attention.experiments.fundamentals import Recall, recall_accuracy, train_recall

accuracy = {}  # {memory: (3 seeds, 16 lags)}
for memory, steps in ("attention", 300), ("window", 300), ("RNN", 500), ("LSTM", 500):
    models = [train_recall(Recall(memory), seed, steps) for seed in range(3)]
    accuracy[memory] = np.array([recall_accuracy(model) for model in models])
    shown = (f"k={k} {accuracy[memory][:, k].mean():.1f}" for k in (0, 3, 7, 15))
    print(f"{memory:9s}", *shown, f" least {accuracy[memory].min():.1f} (chance 0.1)")
plotting.curves(accuracy, xlabel="k: how many steps before the last symbol",
                ylabel="accuracy (3 seeds)", threshold=1 / 8, threshold_name="chance",
                title="From k = 7 window and RNN guess; LSTM between, attention right")
plotting.show("Accuracy against the lag k: attention stays at 1, the window drops to "
              "chance at 4, the RNN to 0.2 by 7, the LSTM falls slowly and rises.")

# %% [markdown]
# The window answers what it sees. The RNN has little left after six steps. The LSTM is worse on recent symbols, better
# on old ones and good at the very first; attention is right everywhere. An RNN rewrites its state at each step; an LSTM
# spreads its 32 numbers over the whole stream, and the first symbols meet an empty state. Attention hands over nothing
# in advance: it goes to the place when the question is known. (A convolution is a window that slides, a Transformer
# attention in layers.)
#
# ### 1.3 Why direct connections matter
#
# **Why does an RNN forget?** If the output at the end hardly moves with an input far back, nothing can be learned about
# it. We measure that before any training: the norm of $\partial\,\text{out}_T/\partial x_t$ against the distance $T-t$.
#
# *Predict.* Each step of this RNN multiplies the gradient by about one half. What is left after 49 steps? And in
# attention, where $x_t$ reaches the output in one step from anywhere?

# %% tags=["slide"]
from attention.experiments.fundamentals import influence
from attention.fundamentals import SelfAttention

networks = {"attention": SelfAttention, "RNN": nn.RNN, "LSTM": nn.LSTM}
norms = {name: [influence(network(32, 32), seed) for seed in range(3)]
         for name, network in networks.items()}
norms["LSTM with open gates"] = [influence(nn.LSTM(32, 32), seed, forget_bias=3.0)
                                 for seed in range(3)]
for name, curves in norms.items():
    slope = np.polyfit(np.arange(1, 50), np.log(np.mean(curves, axis=0)), 1)[0]
    print(f"{name:20s} one step: × {np.exp(slope):.2f}  49: × {np.exp(49 * slope):.0e}")
plotting.curves(norms, x=np.arange(1, 50), log_y=True, xlabel="distance $T - t$",
                ylabel=r"norm of $\partial\,\mathrm{out}_T / \partial x_t$",
                title="RNN and LSTM lose the gradient; open gates or attention keep it")
plotting.show("Norm of the Jacobian against distance, logarithmic: falling lines for "
              "RNN and LSTM, flat ones for attention and an LSTM with open gates.")

# %% [markdown]
# Next to nothing, $2 \cdot 10^{-16}$; attention keeps most. A straight line on a logarithmic axis is an exponential:
# the **vanishing gradient** (Bengio et al. 1994). An LSTM *can* keep a gradient, when its forget gates start open (a
# bias of 3) or have learned to. And flat is not free: attention computes a number for each pair, $n^2$ of them, where an
# RNN takes $n$ steps.
#
# ## Part 2 · The mechanism, in NumPy
#
# ### 1.4 Queries, keys and values
#
# **What is attention, before it is a network?** A dictionary that answers with a blend. A Python dictionary compares a
# query with every key; one matches, and its value comes back. Strings match or not. Vectors match *more or less*: each
# key becomes a vector, the comparison a dot product, and a softmax turns the comparisons into shares that sum to 1.
#
# *Predict.* The query is the bird's own key. Will the answer be 2?

# %% tags=["first-attention", "slide"]
legs = {"cat": 4.0, "bird": 2.0, "spider": 8.0}
animals = np.array([[1.0, 0.0], [0.0, 1.0], [-0.7, 0.7]])  # their keys, a row each
query = animals[1]
for beta in (1, 10, 100):  # how sharply to compare
    shares = np.exp(beta * animals @ query)
    shares = shares / shares.sum()
    answer = shares @ list(legs.values())
    print(f"beta {beta:3d}: shares {np.round(shares, 3)}, legs {answer:.2f}")

# %% [markdown]
# That was attention. Not at $\beta = 1$: 4.46 legs is nobody's number. As $\beta$ grows, the soft dictionary turns into
# the hard one. In between, turn the query a little and the answer moves a little: gradient descent can use that.
#
# The **query** $q$ says what is wanted, a **key** $k_j$ what item $j$ can be found by, the **value** $v_j$ what it hands
# over. Keys decide *where* to look, values *what* comes back: with the animals' weights for values the same shares give
# kilograms.
#
# #### Where do q, k and v come from?
#
# A network gets words, not queries. A table gives each token a vector, its **embedding**; each **layer** (one round of
# processing) rewrites these vectors. So a sentence is a matrix $x$, one row a token. One attention, called a **head**,
# owns three matrices. They are *learned*: gradient descent moves them until the looks they produce are useful.
#
# $$q_i=x_iW_Q+b_Q\qquad k_i=x_iW_K+b_K\qquad v_i=x_iW_V+b_V$$
#
# Every token asks, offers and hands over, each with a **projection** of the same $x$: that is **self-attention**. Here
# is the head of our first figure, with the matrices that its training left.

# %%
from attention.experiments.fundamentals import minilm_head

head = minilm_head(tired, layer=3, head=1)
tokens, it, animal = head.tokens, head.tokens.index("it"), head.tokens.index("animal")
x = head.x  # the sentence as it enters layer 3
q, k, v = x @ head.w_q + head.b_q, x @ head.w_k + head.b_k, x @ head.w_v + head.b_v
print("x", x.shape, " W_Q", head.w_q.shape, " q", q.shape, " k", k.shape, " v", v.shape)

# %% [markdown]
# *Predict.* For "it" you know the answer. Which token's key has the largest dot product with the query of "cross"?

# %%
for word in ("it", "cross", "tired"):
    matches = k @ q[tokens.index(word)]  # (16,): one number a key
    best = np.argsort(-matches)[:3]
    print(f"{word:6s} asks:", "  ".join(f"{tokens[j]} {matches[j]:.1f}" for j in best))

# %% [markdown] tags=["slide"]
# ### 1.5 Dot-product attention
#
# **How does this look for all tokens at once, in the letters of the papers?**
#
# $$s_{ij}=\frac{q_i\cdot k_j}{\sqrt{d}}\qquad p_{ij}=\frac{e^{s_{ij}}}{\sum_{j'}e^{s_{ij'}}}\qquad
#   o_i=\sum_jp_{ij}\,v_j$$
#
# |array|shape|meaning|
# |---|---|---|
# |`q`, `k`|`(n_queries, d_head)`, `(n_keys, d_head)`|one query, one key a row|
# |`v`|`(n_keys, d_v)`|one value a row|
# |`scores`, `weights`|`(n_queries, n_keys)`|row: who asks; column: who is asked|
# |`out`|`(n_queries, d_v)`|one blend a row|
#
# The $s_{ij}$ are **scores**, the $p_{ij}$ weights, $d$ is `d_head`. Loops first, a line for each formula.

# %%
n, d = q.shape
out_loop = np.zeros_like(v)
for i in range(n):
    dots = [sum(q[i, t] * k[j, t] for t in range(d)) for j in range(n)]
    s = np.array(dots) / np.sqrt(d)
    p = np.exp(s) / np.exp(s).sum()
    for j in range(n):
        out_loop[i] += p[j] * v[j]
    if i == it:
        print(f"it -> animal {p[animal]:.3f}, first output of it {out_loop[i, 0]:.3f}")

# %% [markdown]
# There is the 0.68. Now three lines: all $n^2$ dot products are one matrix product, and so is the blend.

# %% tags=["slide"]
scores = q @ k.T / np.sqrt(d)  # (n_queries, n_keys)
weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)  # rows sum to 1
out = weights @ v  # (n_queries, d_v)

print(f"it -> animal: {weights[it, animal]:.3f}   first output of it: {out[it, 0]:.3f}")
theirs = nn.functional.scaled_dot_product_attention(
    *(torch.from_numpy(a)[None] for a in (q, k, v)))[0].numpy()
print(f"largest difference to the loops {np.abs(out - out_loop).max():.6f}, "
      f"to PyTorch's own function {np.abs(out - theirs).max():.6f}")
print(f"to the weights of the model itself {np.abs(weights - head.weights).max():.5f}")

# %% tags=["slide"]
plotting.flow(
    {"x": x, "q": q, "k": k, "v": v, "scores": scores, "weights": weights, "out": out},
    [("x", "q", "W_Q"), ("x", "k", "W_K"), ("x", "v", "W_V"),
     (("q", "k"), "scores", "q kᵀ / √d"), ("scores", "weights", "softmax"),
     (("weights", "v"), "out", "weights · v")],
    title="Self-attention of one sentence: queries meet keys, weights mix values")
plotting.show("Data flow from the sentence x through three projections q, k and v to "
              "scores, weights and output, each array with its shape.")

# %% [markdown]
# When queries come from one sequence and keys and values from another, it is **cross-attention** (a
# decoder's layer asks an encoder's output: 1.15).
#
# **The cost** of $n$ queries, $m$ keys: $4\,n\,m\,d$ floating-point operations (FLOPs) in two products, $nm$ weights. For
# a sequence that attends to itself both grow with the square of its length: lecture 04.
#
# ### 1.6 The softmax, and why the scores are divided by $\sqrt d$
#
# **What can go wrong with $e^s$?** In 64-bit floats $e^{710}$ is infinite, and infinity over infinity is not a number.

# %%
row = np.array([1000.0, 999.0, 0.0])
with np.errstate(over="ignore", invalid="ignore"):
    print("naive:  ", np.exp(row) / np.exp(row).sum())
print("shifted:", np.round(np.exp(row - 1000) / np.exp(row - 1000).sum(), 3))

# %% [markdown]
# One number subtracted from every score multiplies numerator and denominator by the same factor: the weights stay. With
# the row's maximum subtracted no exponent is positive, and nothing overflows.
#
# #### Exercise 1A: a softmax that survives  (difficulty 2 of 5, essential, 10 minutes)
#
# Write the shifted softmax.
#
# |argument|shape|meaning|
# |---|---|---|
# |`x`|any|scores; `-inf` means "not allowed" and gets weight 0|
# |`axis`|int|the axis along which the weights sum to 1|
#
# Returns weights of the shape and float type of `x`. A row in which *nothing* is allowed is all zeros, never nan. The
# input stays as it was.
#
# <details><summary>Hint</summary>
#
# What is the maximum of a row of only -inf, and what is -inf minus -inf? Which number could stand in for that maximum?
# What is the sum of that row then, and what may one divide by?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def softmax(x, axis=-1):
    """Softmax along one axis, shifted by the maximum so that no finite score overflows.

    x: numbers of any shape; -inf gives weight 0. Returns the same shape and float type,
    float64 for integers; half precision is summed in single.
    A row of only -inf is all zeros: nothing may be attended to, so nothing is.
    """
    x = np.asarray(x)
    dtype = x.dtype if x.dtype.kind == "f" else np.dtype(float)
    x = x.astype(np.result_type(dtype, np.float32), copy=False)  # half is too coarse
    ### BEGIN SOLUTION
    maximum = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    exponentials = np.exp(x - np.where(np.isneginf(maximum), 0, maximum))
    total = exponentials.sum(axis=axis, keepdims=True)
    return (exponentials / np.where(total == 0, 1, total)).astype(dtype, copy=False)
    ### END SOLUTION

# %%
softmax = check("1A", softmax)

# %% [markdown]
# #### Why $\sqrt d$?
#
# *Predict.* In the head of our sentence $d = 32$. Leave the division out: which weight does "animal" get?

# %% tags=["slide"]
def entropy(p):
    """Entropy of each row in nats: 0 when one key has all, ln n when all are equal."""
    return -(p * np.log(p + 1e-300)).sum(-1)

for name, scale in (("q·k / √d", 1 / np.sqrt(d)), ("q·k", 1.0), ("q·k / d", 1 / d)):
    p = softmax(q @ k.T * scale)
    print(f"{name:8s} it -> animal {p[it, animal]:.3f}, mean entropy "
          f"{entropy(p).mean():.2f} of {np.log(n):.2f}")

# %% [markdown]
# Everything: the head no longer blends. An accident? Let the entries of $q$ and $k$ be independent, mean 0, variance 1.
# Each product $q_tk_t$ then has variance 1, and a dot product adds $d$ of them: its typical size is
# $\sqrt d$ (Vaswani et al. 2017, § 3.2.1, footnote 4).
#
# The *Jacobian* of the softmax, $\partial p_i/\partial s_j=p_i(\delta_{ij}-p_j)$, ($\delta_{ij}$: 1 if $i=j$, else 0) says how the weights react to the
# scores; its trace is $\sum_i p_i(1-p_i)$. Where one weight is 1, it is 0, and no gradient comes through.

# %%
def of_random(size, scale):
    """For 500 random queries, 64 keys: mean largest weight, trace of the Jacobian."""
    draw = np.random.default_rng(1)
    a, b = draw.standard_normal((500, 1, size)), draw.standard_normal((500, size, 64))
    p = softmax((a @ b)[:, 0] * scale)
    return p.max(-1).mean(), (p * (1 - p)).sum(-1).mean()

sizes, traces = [16, 64, 256, 1024], {}
for name, power in (("q·k", 0), ("q·k / √d", -0.5)):
    peaks, traces[name] = zip(*(of_random(size, size**power) for size in sizes))
    print(f"{name:8s} largest of 64 weights:",
          "  ".join(f"d={size} {peak:.2f}" for size, peak in zip(sizes, peaks)))
plotting.curves(traces, x=sizes, xlabel="size of a head, $d$",
                ylabel="trace of the softmax Jacobian",
                title="Unscaled scores saturate the softmax as d grows, "
                      "scaled ones do not"
                ).set_xscale("log", base=2)
plotting.show("Two lines over the head size: unscaled, the trace of the Jacobian falls "
              "towards zero; scaled by the square root of d it stays near one.")

# %% [markdown]
# Without the scale an untrained head of size 1024 has already decided, by chance. (Six other scores: section 1.18.)
#
# ### 1.7 A worked example, start to finish
#
# **Can you do it with a pencil?** Three words, $d = 4$, integers made up for the purpose. *Predict.* Do the row of "it"
# on paper: three dot products, divide by $\sqrt 4$, exponentials ($e^1 = 2.718$), divide by their sum.

# %%
words = ["it", "animal", "street"]
ask = np.array([[2, 0, 1, 0], [0, 2, 0, 2], [1, 1, 1, 1]], float)  # queries
offer = np.array([[0, 1, 0, 1], [1, 0, 0, 0], [1, 2, 0, 1]], float)  # keys
give = np.array([[0, 0, 10, 10], [10, 0, 0, 0], [0, 10, 0, 0]], float)  # values
example = softmax(ask @ offer.T / 2)
print("scores before the division\n", ask @ offer.T)
print("output of it:", np.round(example[0] @ give, 2))
plotting.heatmap(example, words, words, title="Equal scores get equal weights")
plotting.show('Three by three weights; the row of "it" is 0.16, 0.42, 0.42.')

# %% [markdown]
# Row of "it": 0, 2, 2. Halved: 0, 1, 1. Exponentials 1, 2.718, 2.718, sum 6.437. Weights $1/6.437=0.155$ and twice
# $2.718/6.437=0.422$. The output is the weights again, times ten.
#
# **Trap.** *"Two tokens are unrelated if their dot product is minus infinity."* The first score is 0, and its weight
# 0.155: unrelated vectors have a score near 0, and $e^0 = 1$. Opposite vectors have a very negative one. Minus infinity is
# what a mask writes (1.9).
#
# ### 1.8 Seeing attention
#
# **How is a matrix of weights read?** A row: *where does this token look?* A bright column: a key that draws many queries.

# %%
plotting.heatmap(weights, tokens, tokens,
                 title='Layer 3 head 1: most words look at "animal" or "[CLS]"')
plotting.show("Heat map of the sixteen by sixteen weights of our head: bright columns "
              "at the start token and at the word animal.")
print("column sums:", "  ".join(f"{tokens[j]} {weights[:, j].sum():.1f}"
                               for j in np.argsort(-weights.sum(0))[:3]))

# %% [markdown]
# #### Does the model know what "it" is?
#
# This head was picked: of all 72 it changes most from *tired* to *wide*. What do the others do, and what does this one do
# with sentences *not* used to pick it?
#
# *Predict.* The **street** becomes the subject: "The street didn't suit the animal because it was too ..." Where does
# the head look?

# %%
def lean(sentence, first, second):
    """For all heads (6, 12): weight of "it" on one noun minus that on another."""
    maps, words = data.minilm_attention(sentence)
    row = maps[:, :, words.index("it")]
    return row[..., words.index(first)] - row[..., words.index(second)]

street = "The street didn't suit the animal because it was too tired."
for subject, text in (("animal", tired), ("street", street)):
    for word in ("tired", "wide"):
        found = lean(text.replace("tired", word), "animal", "street")
        clear = (found > 0.03).sum(), (found < -0.03).sum()
        print(f"subject {subject}, too {word:5s}: heads for animal {clear[0]:2d}, "
              f"for street {clear[1]:2d}; our head {found[3, 1]:+.2f}")

# %% [markdown]
# At the street: here it follows the **subject**, which is also the first noun. (Not always: "Exercises left".) Most heads
# take no side, the nouns are less than 0.03 apart. One head, picked from 72, is an anecdote until other sentences test
# it. (Section 1.28 resolves "it" by hand.)
#
# #### Are the weights an explanation?
#
# *Predict.* Four values 0, 1, 2, 3. Can two rows of weights without a single key in common give the same output?

# %%
four = np.array([0.0, 1.0, 2.0, 3.0])
for p in (np.array([0.5, 0.0, 0.0, 0.5]), np.array([0.0, 0.5, 0.5, 0.0])):
    print("weights", p, "-> output", p @ four)

# %% [markdown]
# They can, and with more keys than $d_\text{head} + 1$ such maps always exist (1.27). Weights show where a head looked:
# evidence, not an explanation. Look at others: choose a layer and a head, hover over a token.

# %% tags=["nbval-ignore-output", "slide"]
all_heads, _ = data.minilm_attention(tired)  # (6, 12, 16, 16)
first = (all_heads.mean(axis=2).argmax(-1) == 0).sum()  # heads with column 0 brightest
plotting.head_viewer(all_heads, tokens, "All 72 heads of MiniLM on the sentence as "
                     "small heat maps: in most the first column is the brightest.",
                     title=f'In {first} of 72 heads "[CLS]" draws the most weight')

# %% [markdown] tags=["slide"]
# ### 1.9 Masks: who may look where
#
# **How do you forbid a look?** A model that predicts the next word must not see it: a **causal mask**. Shorter sentences
# of a batch are filled up with *padding* that must not be read: a **padding mask**. Both are tables of booleans; in this
# course **True means "may attend"**. A forbidden score becomes $-\infty$ *before* the softmax. Then $e^{-\infty} = 0$, and
# the row shares its weight among what is left.
#
# #### Exercise 1B: the causal mask  (difficulty 2 of 5, useful, 8 minutes)
#
# *Another day.* Query $i$ may look at key $j$ if $j$ is not in its future: before it *and itself*.
#
# |argument|meaning|
# |---|---|
# |`n_queries`|number of queries|
# |`n_keys`|number of keys; `None` means as many as queries|
#
# Returns booleans `(n_queries, n_keys)`. If there are fewer queries than keys, the queries are the *last* ones of the
# sequence: the last query sees every key (one new token, a hundred remembered keys: lecture 05).
#
# <details><summary>Hint</summary>
#
# At which position is query 0 of 2, with 5 keys? Compare a column of query positions
# with a row of key positions.
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def causal_mask(n_queries, n_keys=None):
    """Boolean (n_queries, n_keys), True where key j is not after query i.

    Aligned at the bottom right; with more queries than keys the first rows see nothing.
    Raises ValueError for a negative size.
    """
    n_keys = n_queries if n_keys is None else n_keys
    if n_queries < 0 or n_keys < 0:
        raise ValueError("n_queries and n_keys must not be negative, "
                         f"got {n_queries} and {n_keys}")
    ### BEGIN SOLUTION
    positions = np.arange(n_queries)[:, None] + (n_keys - n_queries)
    return np.arange(n_keys)[None, :] <= positions
    ### END SOLUTION

# %%
causal_mask = check("1B", causal_mask)

# %% [markdown]
# A padding mask compares a row of positions with a column of lengths. Its two axes of size 1 let it *broadcast* over
# heads and queries.

# %% tags=["export"]
def padding_mask(lengths, n_keys):
    """Boolean (batch, 1, 1, n_keys), True for the first lengths[b] keys of sentence b.

    lengths: integers (batch,). Raises ValueError when one is negative or above n_keys.
    """
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or lengths.size and lengths.dtype.kind not in "iu":
        raise ValueError(f"lengths must be integers (batch,), got {lengths.dtype} "
                         f"of shape {lengths.shape}")
    if lengths.size and (lengths.min() < 0 or lengths.max() > n_keys):
        raise ValueError(f"lengths must lie between 0 and n_keys = {n_keys}, "
                         f"got {lengths.tolist()}")
    return (np.arange(n_keys) < lengths[:, None])[:, None, None, :]

# %% tags=["slide"]
causal, padding = causal_mask(6), padding_mask(np.array([4]), 6)[0, 0]
both = {"causal": causal, "padding, length 4": np.broadcast_to(padding, (6, 6)),
        "both": causal & padding}
plotting.masks(both, title='Masks combine with "and"')
plotting.show("Three masks of six queries by six keys: the lower triangle with its "
              "diagonal, the first four columns, and their intersection.")

# %% [markdown] tags=["slide"]
# #### Exercise 1C: attention weights with masks  (difficulty 3 of 5, essential, 15 minutes; if you do only two)
#
# Everything so far in one function: scores, scale, masks, softmax.
#
# |argument|shape|meaning|
# |---|---|---|
# |`q`|`(..., n_queries, d_head)`|queries|
# |`k`|`(..., n_keys, d_head)`|keys|
# |`mask`|booleans, broadcastable to `(..., n_queries, n_keys)`|True = may attend; `None` = all|
# |`causal`|bool|also forbid the future|
# |`scale`|float|factor on $q \cdot k$; `None` means $1/\sqrt{d_\text{head}}$|
#
# Returns weights `(..., n_queries, n_keys)`. A row that may look nowhere is zero.
#
# <details><summary>Hint</summary>
#
# The dots in front are batches and heads: which two axes of k change places? Where in the chain "scores, scale, ____,
# softmax" does a mask write -inf, and which function makes a new array there? What does your softmax do with a row of
# -inf? Is a scale of 0 a scale?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def attention_weights(q, k, mask=None, causal=False, scale=None):
    """Attention weights softmax(scale * q k^T) with masks, in NumPy.

    q (..., n_queries, d_head), k (..., n_keys, d_head); mask boolean, True = may attend
    (else ValueError), broadcastable to (..., n_queries, n_keys). Returns (...,
    n_queries, n_keys), at least in single precision; a row that sees nothing is zero.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1.
    """
    if mask is not None and mask.dtype != bool:
        raise ValueError("mask must be boolean with True = may attend, "
                         f"got {mask.dtype}")
    types = [a.dtype if a.dtype.kind == "f" else float for a in (q, k)]
    work = np.result_type(*types, np.float32)  # never in integers or in half
    q, k = q.astype(work, copy=False), k.astype(work, copy=False)
    ### BEGIN SOLUTION
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ np.swapaxes(k, -1, -2) * float(scale)
    if causal:
        allowed = causal_mask(q.shape[-2], k.shape[-2])
        scores = np.where(allowed, scores, -np.inf)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    return softmax(scores)
    ### END SOLUTION

# %%
attention_weights = check("1C", attention_weights)

# %% [markdown]
# Your function on the sentence, without and with a causal mask. *Predict.* "Tired" stands behind "it". What does the
# row of "it" do when it may not see what comes after it?

# %%
for causal in (False, True):
    row = attention_weights(q, k, causal=causal)[it]
    best = np.argsort(-row)[:3]
    print(f"causal {causal!s:5s}: it ->", *(f" {tokens[j]} {row[j]:.3f}" for j in best),
          f"  sum {row.sum():.3f}")

# %% [markdown]
# "Animal" gains a little: the row still sums to 1, among eleven tokens now.
#
# **Does the mask leak?** Something loud happens at position 3.
#
# *Predict.* Which rows change? And which, in a common wrong version that masks *after* the softmax?

# %% tags=["slide"]
def late_weights(q, k):
    return softmax(q @ k.T / np.sqrt(q.shape[-1])) * causal_mask(len(q))

loud_k, loud_v = k[:6].copy(), v[:6].copy()
loud_k[3], loud_v[3] = 10.0, -10.0
for name, weigh in (("before", lambda q, k: attention_weights(q, k, causal=True)),
                    ("after", late_weights)):
    calm, loud = weigh(q[:6], k[:6]), weigh(q[:6], loud_k)
    moved = np.abs(calm @ v[:6] - loud @ loud_v).max(axis=-1)
    print(f"masked {name:6s} the softmax: rows {np.flatnonzero(moved)} change, "
          f"least row sum {calm.sum(-1).min():.3f}")

# %% [markdown]
# With a right mask rows 0 to 2 are the same to the last bit. The late one leaks into every row (the forbidden key is still
# in the denominator). Papers write $\text{softmax}(QK^\top+M)$ with $M$ of 0 and $-\infty$; the scale belongs on
# $QK^\top$ alone. And a row that may look nowhere? Zero in this course, with gradient zero: one nan
# spreads through a batch at the next mean.

# %% [markdown]
# ## Part 3 · PyTorch: attention that learns
#
# **What changes in PyTorch?** New are the gradient, the layer that owns $W_Q$, $W_K$ and $W_V$, and the training that finds
# them. Your weights times the values, with checks of its arguments, is `attention_numpy`, the course's
# reference; `attention_torch` is the same with gradients. (Their code: Behind the scenes.)
#
# ### 1.10 A layer that owns its projections
#
# #### Exercise 1D: a head of your own  (difficulty 3 of 5, essential, 20 minutes; if you do only two)
#
# Write the head of section 1.4 as an `nn.Module`. The shape contract:
#
# |array|shape|
# |---|---|
# |`x`|`(..., n, d_model)`|
# |queries, keys, values: from the layers `query`, `key`, `value` (`nn.Linear` with bias)|`(..., n, d_head)`|
# |weights|`(..., n, n)`|
# |out|`(..., n, d_head)`|
#
# Returns the pair `(out, weights)`. With `causal=True` no token looks at a later one. The names `query`, `key` and
# `value` matter: by name weights are copied in.
#
# <details><summary>Hint</summary>
#
# `nn.Linear(d_model, d_head)` computes `x @ W.T + b`: do you need to transpose anything? In `forward`: q, k, v = ____;
# scores = q @ ____ / ____; where causal, `masked_fill` with ____; softmax over which axis?
#
# </details>

# %% tags=["exercise", "export"] kind="module"
class SelfAttention(nn.Module):
    """One head of self-attention: q, k and v are projections of the same x.

    x (..., n, d_model). Returns (out (..., n, d_head), weights (..., n, n)).
    """

    def __init__(self, d_model, d_head):
        super().__init__()
        ### BEGIN SOLUTION
        self.query = nn.Linear(d_model, d_head)
        self.key = nn.Linear(d_model, d_head)
        self.value = nn.Linear(d_model, d_head)
        ### END SOLUTION

    def forward(self, x, causal=False):
        ### BEGIN SOLUTION
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if causal:
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        weights = torch.softmax(scores, dim=-1)
        return weights @ v, weights
        ### END SOLUTION

# %%
SelfAttention = check("1D", SelfAttention)

# %% [markdown]
# **Copied weights** are the best test of a layer: with the trained head's matrices it must do what the trained head does.
# And the gradient? `gradcheck` moves each input a little and compares with autograd, here in `attention_torch` with a row
# that sees nothing: the place where it goes wrong, because 0 times nan is nan.

# %%
from attention.fundamentals import attention_numpy, attention_torch

layer = SelfAttention(384, 32).double()
copied = {"query": (head.w_q, head.b_q), "key": (head.w_k, head.b_k),
          "value": (head.w_v, head.b_v)}
for name, (w, b) in copied.items():
    part = {"weight": torch.from_numpy(w.T), "bias": torch.from_numpy(b)}
    getattr(layer, name).load_state_dict(part)
layer_out, layer_weights = (a.detach().numpy() for a in layer(torch.from_numpy(x)))
print(f"it -> animal {layer_weights[it, animal]:.3f}, largest difference to NumPy "
      f"{np.abs(layer_out - attention_numpy(q, k, v)).max():.6f}")

few = [torch.from_numpy(array[:5, :4]).requires_grad_() for array in (q, k, v)]
mask = torch.from_numpy(causal_mask(5)) & (torch.arange(5) != 2)[:, None]
d_q = torch.autograd.grad(attention_torch(*few, mask).sum(), few)[0]
same = torch.autograd.gradcheck(partial(attention_torch, mask=mask), few)
print(f"gradient of a row that sees nothing {d_q[2].abs().max():.1f}, of others up to "
      f"{d_q.abs().max():.2f}; as finite differences: {same}")

# %% [markdown] tags=["slide"]
# ### 1.11 The training loop, once
#
# **How do the projections get their numbers?** The network answers with **logits**: a number for each possible answer,
# before a softmax. The **loss** is the cross-entropy, the mean $-\ln p$ of the right answers: $\ln 8 = 2.08$ for guessing
# among eight. (Its exponential is the **perplexity**: as unsure as among so many.) Then, for each batch:
#
# 1. compute the loss;
# 2. set the old gradients to zero (PyTorch *adds* to them), and compute the new ones backwards;
# 3. **clip**: if all gradients together have a norm above 1, scale them down to 1, so that no odd batch throws the
#    network far;
# 4. take a step with the **optimiser**. **Adam** divides each gradient's running mean by the root of its running mean
#    square, times the learning rate `lr`.
#
# *Predict.* Two parameters have gradients 0.001 and 1000; `lr` is 0.01. How far does one step of Adam move each?

# %%
numbers = nn.Parameter(torch.zeros(2))
adam = torch.optim.Adam([numbers], lr=0.01)
numbers.grad = torch.tensor([0.001, 1000.0])
adam.step()
print("moved by", *(f"{move:.4f}" for move in numbers.tolist()))

# %% [markdown]
# By `lr` each, whatever its gradient.

# %% [markdown]
# #### Exercise 1E: a training step  (difficulty 2 of 5, useful, 10 minutes)
#
# Write steps 1 to 4.
#
# |argument|shape|meaning|
# |---|---|---|
# |`model`||`model(x)` gives logits `(batch, n, n_answers)`|
# |`optimiser`||a `torch.optim` optimiser of the model's parameters|
# |`x`, `y`|`(batch, n)` int64|questions, and the numbers of the right answers|
#
# Returns the loss before the step, a Python number: the cross-entropy averaged over all answers of the batch. The
# gradients of all parameters together are clipped to norm 1 (`nn.utils.clip_grad_norm_`).
#
# <details><summary>Hint</summary>
#
# On which axis does `cross_entropy` want the classes, and which two axes of the logits change places for that? Which
# of the calls `step()`, `backward()`, `zero_grad()`, `clip_grad_norm_(...)` needs the result of which other?
#
# </details>

# %% tags=["exercise", "export"] kind="training"
def training_step(model, optimiser, x, y):
    """One step of training: cross-entropy, gradients, clipping to norm 1, optimiser.

    model(x): logits (batch, n, n_answers) for x (batch, n); y (batch, n) are the right
    answers. Returns the loss before the step, a float.
    """
    ### BEGIN SOLUTION
    loss = nn.functional.cross_entropy(model(x).transpose(1, 2), y)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.item()
    ### END SOLUTION

# %%
training_step = check("1E", training_step)

# %% [markdown]
# With it the loop that trains everything in this course is eight lines (`training.fit` adds a progress bar). The model is
# the attention of 1.2. In it question $k$ is a learned query, a symbol plus its place a key, the symbol alone a value.

# %%
from attention.experiments.fundamentals import recall_streams

def fit(model, batches, steps, lr):
    """Train with AdamW (Adam that lets weights decay a little); returns the losses."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        x, y = next(batches)
        losses.append(float(training_step(model, optimiser, x, y)))
    return losses

recall = training.initialise(Recall("attention").double(), 0)
losses = fit(recall, recall_streams(0), steps=300, lr=1e-2)
print(f"loss at the start {losses[0]:.2f} (guessing 2.08), at the end "
      f"{losses[-1]:.2f}; accuracy {recall_accuracy(recall).mean():.2f}")
plotting.curves({"attention": losses}, x=np.arange(1, 301), xlabel="training step",
                ylabel="loss (nats)", threshold=2.08, threshold_name="guessing",
                title="The loss falls from guessing to almost nothing")
plotting.show("Training loss against steps: from 2.1 nats down to nearly zero.")

# %% [markdown]
# *Predict.* Sixteen questions, sixteen places: sketch the learned weights.

# %%
stream, _ = next(recall_streams(seed=5))
with torch.no_grad():
    learned = recall.attend(recall.symbol(stream))[0].numpy()  # (16 questions, 16)
plotting.heatmap(learned, [f"k={lag}" for lag in range(16)], stream[0].tolist(),
                 title="Learned: question k looks k places back from the last symbol")
plotting.show("Learned weights, questions as rows and symbols as columns: a single "
              "diagonal from upper right to lower left.")

# %% [markdown]
# ### 1.12 A test that finds the bug
#
# A wrong attention has the right shapes, and often trains.
#
# #### Exercise 1F: find the bug  (difficulty 3 of 5, useful, 15 minutes)
#
# *Another day.* Write a function that is given an attention and notices whether it is wrong. It is tried on right ones
# and on eight wrong ones: scales, softmax along the wrong axis, masks turned round, too late or at the top left, a row with nothing to
# attend that is not zero, large scores that overflow.
#
# |argument|meaning|
# |---|---|
# |`attention`|`attention(q, k, v, mask=None, causal=False, scale=None)`, NumPy arrays in and out|
#
# Returns nothing. It raises an error (`assert ...`) for a wrong attention, and none for a right one.
#
# <details><summary>Hint</summary>
#
# What is the output when all values are the same? Which bugs does that catch, and for which do you need numbers: a
# formula of your own, or PyTorch's function?
#
# </details>

# %% tags=["exercise", "export"] kind="bug"
def test_attention(attention):
    """Raise AssertionError if attention(q, k, v, mask, causal, scale) is wrong."""
    ### BEGIN SOLUTION
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for shape in ((2, 4), (5, 4), (5, 3)))
    every, triangle = np.ones((2, 5), bool), np.tri(2, 5, 3, dtype=bool)
    some = np.array([[True, False, True, True, False], [False, True, False, True, True]])
    cases = [({}, every, 0.5), ({"scale": 2.0}, every, 2.0), ({"mask": some}, some, 0.5),
             ({"causal": True}, triangle, 0.5),
             ({"mask": some, "causal": True}, some & triangle, 0.5)]
    for options, allowed, scale in cases:
        powers = np.exp(q @ k.T * scale) * allowed
        expected = powers / powers.sum(-1, keepdims=True) @ v
        assert np.allclose(attention(q, k, v, **options), expected), options
    nothing = attention(q, k, v, mask=np.zeros((2, 5), bool))
    assert np.array_equal(nothing, np.zeros((2, 3))), "nothing to attend to"
    large = attention(1e4 * q, k, v)
    assert np.allclose(large, v[(q @ k.T).argmax(-1)]), "large scores"
    ### END SOLUTION

# %%
test_attention = check("1F", test_attention)

# %% [markdown]
# ### 1.13 Into a real model
#
# **Does your function carry a language model?** SmolLM2 has 135 million parameters in 30 layers of 9 heads. All its attention
# goes through one function: yours.

# %% tags=["language-model"]
from utils import language_model

smollm = language_model.load()

def mine(q, k, v, causal=True):
    return attention_weights(q, k, causal=causal) @ v

# on_arrays: the model's tensors come as arrays, and what you return becomes a tensor
_ = language_model.put_in(smollm, attention=language_model.on_arrays(mine))

# %% [markdown]
# Now six bugs are planted in that one place (the next cell names them), and every shape stays. The model continues
# "... The capital of Germany is". "Loss" is that of the next token, on 256 tokens of prose; right is 2.78.
#
# *Predict.* Which of the six makes the loss *better* than right, and why is that bad news? Which one would you not notice
# from the text?

# %% tags=["language-model", "slide"]
bugs = ("no scale", "scale 1/d", "softmax over the queries", "no mask",
        "one future token seen", "own token not seen")
for name in bugs if smollm else ():
    found = language_model.compare(smollm, **language_model.BUGS[name])
    print(f"{name:25s} loss {found.loss:4.1f}   writes {found.text!r}")

# %% [markdown]
# A model that sees the future predicts it: "no mask" and "one future token seen" have a loss *below* the right one.
# When they write there is no future to see, and the first of them babbles. Two wrong models still answer "Berlin", and
# *own token not seen* writes what the right one writes. **Compare the numbers with a reference first, then the loss,
# then the text.**

# %% [markdown]
# ## Part 4 · CUDA: where the bytes go
#
# ### 1.14 One lab: from three kernels to one
#
# **If the formula is three lines, why write kernels for it?** Because of the matrix in the middle: $n^2$ weights that
# nobody asked for are written to memory and read back.
#
# A GPU runs one function, the **kernel**, in thousands of **threads**. Threads come in **blocks**; a block has a small,
# fast **shared memory**. All threads see the large, slow **global memory**. Thirty-two neighbouring threads form a
# **warp** and are its **lanes**. One load or store of a warp is one **request**.
#
# |CUDA C++|means|
# |---|---|
# |`__global__`, `__device__`|a kernel; a function that kernels call|
# |`const float* s`, `s[i * m + j]`|an array; row i, column j of m columns|
# |`c ? a : b`|`a if c else b`|
# |`threadIdx.x`, `blockIdx.x`, `blockDim.x`|number of the thread, of its block; threads a block|
# |`(size_t)i * m`|a 64-bit product: an `int` ends at 2,147,483,647|
#
# `cuda.compile` runs every thread on your CPU and counts every access. `.check` also reports
# what went wrong. (CUDA tensors go to the GPU. No GPU run is recorded yet: bytes here, no times.)
#
# Next, 4 blocks of 256 threads halve 1,000 numbers: thread `i` the number `i`, if `i < n`.
#
# *Predict.* What do threads 1,000 to 1,023 do without this guard?

# %%
import textwrap

from utils import cuda

SCALE = r"""
__global__ void scale(const float* x, float* y, float factor, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = factor * x[i];
}
"""
thousand, halves = np.arange(1000, dtype=np.float32), np.zeros(1000, np.float32)
cuda.compile(SCALE)[4, 256](thousand, halves, 0.5, 1000)  # 4 blocks of 256 threads
print("last element:", halves[-1])
unguarded = cuda.compile(SCALE.replace("if (i < n) ", ""))
problem = unguarded.check[4, 256](thousand, halves, 0.5, 1000).problems[0]
print(textwrap.fill(str(problem), 88))

# %% [markdown]
# They reach past the arrays' end. On a GPU this may crash, or seem to work. Here it is reported with its line.
#
# #### Coalescing
#
# Memory is fetched in **sectors** of 32 bytes. When 16 lanes read 16 neighbouring floats, that is 2 sectors. Here is a
# softmax of our sentence's scores, one thread a row.
#
# *Predict.* How many sectors does a request fetch?

# %%
SOFTMAX_STRIDED = r"""
__global__ void softmax_strided(const float* s, float* p, int n_queries, int n_keys) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;  // this thread's row
  if (i >= n_queries) return;
  float maximum = -INFINITY;
  for (int j = 0; j < n_keys; ++j) maximum = fmaxf(maximum, s[i * n_keys + j]);
  float total = 0.0f;
  for (int j = 0; j < n_keys; ++j) total += expf(s[i * n_keys + j] - maximum);
  for (int j = 0; j < n_keys; ++j) p[i * n_keys + j] = expf(s[i * n_keys + j] - maximum) / total;
}
"""
scores32, weights32 = scores.astype(np.float32), np.zeros((n, n), np.float32)
strided = cuda.compile(SOFTMAX_STRIDED).check[1, 32](scores32, weights32, n, n)
print(f"it -> animal: {weights32[it, animal]:.3f}")
strided

# %% [markdown]
# Sixteen where two would do: at step $j$ thread 0 reads `s[j]`, thread 1 reads `s[n_keys + j]`, a row further on.

# %%
lane = np.arange(16)
plotting.warp_access(4 * lane * n, title="One thread a row: 16 lanes touch 16 sectors")
plotting.warp_access(4 * lane, title="One warp a row: 16 lanes fill 2 sectors")
plotting.show("Two maps of memory: lanes that read a row apart touch a sector each and "
              "use one word of it; neighbouring lanes fill whole sectors.")

# %% [markdown]
# #### Exercise 1G: coalesce it  (difficulty 3 of 5, useful, 15 minutes)
#
# *Another day.* Give each row a whole warp. The kernel is launched with one block of 32 threads for each row; lane $l$
# takes the columns $l, l + 32, l + 64, \dots$
#
# |argument|shape|meaning|
# |---|---|---|
# |`s`, `p`|`(n_queries, n_keys)`|scores; weights, written|
# |`n_keys`|int|any number, not only multiples of 32; every row has a finite score|
#
# `warp_max` and `warp_sum` are given: each lane hands in its own number and gets the result over all 32. Every lane must
# call them. Returns nothing; it writes `p`.
#
# <details><summary>Hint</summary>
#
# What does a lane know after its own loop, and which two results does it need from all lanes? Three loops `for (int j = ____; j < n_keys; j += ____)`; between which of them stand the two calls?
#
# </details>

# %% tags=["exercise", "export"] kind="kernel"
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
  float* weights = p + (size_t)blockIdx.x * n_keys;
  float maximum = -INFINITY;
  for (int j = threadIdx.x; j < n_keys; j += 32) maximum = fmaxf(maximum, row[j]);
  maximum = warp_max(maximum);
  float total = 0.0f;
  for (int j = threadIdx.x; j < n_keys; j += 32) total += expf(row[j] - maximum);
  total = warp_sum(total);
  for (int j = threadIdx.x; j < n_keys; j += 32) weights[j] = expf(row[j] - maximum) / total;
  // END SOLUTION
}
"""

# %%
SOFTMAX_ROWS = check("1G", SOFTMAX_ROWS)

# %%
warps = cuda.compile(SOFTMAX_ROWS).check[n, 32](scores32, weights32, n)
print(f"it -> animal: {weights32[it, animal]:.3f}")
for name, report in (("one thread a row", strided), ("one warp a row", warps)):
    print(f"{name:17s} asks for {report.global_loaded:,} bytes and fetches "
          f"{report.sectors_loaded * 32:,}, if nothing is cached")

# %% [markdown] tags=["slide"]
# #### Three kernels, counted
#
# The formula of section 1.5, a kernel for each line (their code: Behind the scenes). With $n$ queries, $m$
# keys, $d$ entries of four bytes, and nothing kept between uses:
#
# |kernel|reads|writes|
# |---|---|---|
# |scores: a thread for each of $n m$ dot products|$4 \cdot 2 n m d$|$4 n m$|
# |softmax: three passes over each row|$4 \cdot 3 n m$|$4 n m$|
# |blend: a thread for each of $n d$ sums|$4 \cdot 2 n m d$|$4 n d$|

# %%
from attention.fundamentals import BLEND, SCORES
from attention.fundamentals import SOFTMAX_ROWS as THREE_PASSES  # yours may have two

q32, k32, v32 = (np.ascontiguousarray(array, np.float32) for array in (q, k, v))
out32 = np.zeros((n, d), np.float32)
square = (16, 16)  # threads of a block
three = [
    cuda.compile(SCORES).check[1, square](q32, k32, scores32, n, n, d, d**-0.5),
    cuda.compile(THREE_PASSES).check[n, 32](scores32, weights32, n),
    cuda.compile(BLEND).check[2, square](weights32, v32, out32, n, n, d)]
read, written = (sum(getattr(report, what) for report in three)
                 for what in ("global_loaded", "global_stored"))
print(f"it -> animal {weights32[it, animal]:.3f}, first output {out32[it, 0]:.3f}")
print(f"read    {read:7,} bytes, formula {4 * (4 * n * n * d + 3 * n * n):7,}")
print(f"written {written:7,} bytes, formula {4 * (2 * n * n + n * d):7,}")

# %% [markdown]
# To the byte. Each query is read again for every key, each key for every query.
#
# #### One kernel, no matrix
#
# **How do you read a number once and use it sixteen times?** A block of 16 × 16 threads loads a **tile**, 16 rows of K,
# into its shared memory; then each thread takes from there what it needs. **Where do the scores go?** Into
# **registers**, a thread's own variables; the weights into 16 × 16 floats, used and overwritten. A softmax needs the row's maximum first, so the kernel walks along K twice. Each block:
#
# 1. loads 16 queries;
# 2. pass 0, for each tile of K: load, score, keep the maximum; then combine the maxima of each row;
# 3. pass 1, for each tile of K and V: load, score again, weight, add to total and output;
# 4. combines the totals, divides, writes.
#
# `__syncthreads()` is a barrier: no thread passes before all have come, because a thread uses numbers that *others*
# loaded. (`load_tile`, `row_max`, `row_sum`, `add_to_output`, `TILE` = 16 and `PAD` = 1: section 1.20.)

# %% tags=["export"]
ATTENTION_TILED = r"""
__global__ void attention_tiled(const float* q, const float* k, const float* v,
                                const unsigned char* mask, float* out, int n_queries, int n_keys,
                                int d, int d_v, int use_mask, int causal, float scale) {
  extern __shared__ float shared[];
  float* q_tile = shared;
  float* k_tile = q_tile + TILE * (d + PAD);
  float* v_tile = k_tile + TILE * (d + PAD);
  float* o_tile = v_tile + TILE * (d_v + PAD);  // the output, undivided
  float* p_tile = o_tile + TILE * (d_v + PAD);  // the weights, undivided
  int x = threadIdx.x;
  int y = threadIdx.y;
  int i = blockIdx.y * TILE + y;
  size_t head = blockIdx.x;
  q += head * n_queries * d;
  k += head * n_keys * d;
  v += head * n_keys * d_v;
  load_tile(q_tile, d + PAD, q, blockIdx.y * TILE, n_queries, d);
  for (int c = x; c < d_v; c += TILE) o_tile[y * (d_v + PAD) + c] = 0.0f;
  float maximum = -INFINITY;
  float total = 0.0f;
  for (int pass = 0; pass < 2; ++pass) {
    for (int first = 0; first < n_keys; first += TILE) {
      __syncthreads();  // the tiles of the last round have been used
      load_tile(k_tile, d + PAD, k, first, n_keys, d);
      if (pass == 1) load_tile(v_tile, d_v + PAD, v, first, n_keys, d_v);
      __syncthreads();  // the new tiles have arrived
      int j = first + x;
      bool allowed = i < n_queries && j < n_keys && (!causal || j <= i + n_keys - n_queries);
      if (allowed && use_mask) allowed = mask[(head * n_queries + i) * n_keys + j];
      float s = 0.0f;
      for (int t = 0; t < d; ++t) s += q_tile[y * (d + PAD) + t] * k_tile[x * (d + PAD) + t];
      s = allowed ? scale * s : -INFINITY;
      if (pass == 0) maximum = fmaxf(maximum, s);
      if (pass == 1) total += add_to_output(o_tile, p_tile, v_tile, expf(s - maximum), d_v);
    }
    maximum = row_max(maximum);
    if (maximum == -INFINITY) maximum = 0.0f;  // nothing to attend to: every weight is 0
  }
  total = row_sum(total);
  for (int c = x; c < d_v && i < n_queries; c += TILE)
    out[(head * n_queries + i) * d_v + c] =
        total == 0.0f ? 0.0f : o_tile[y * (d_v + PAD) + c] / total;
}
"""

# %%
from attention.fundamentals import attention_kernel, attention_launch

grid, block, shared, arguments, tiled_out = attention_launch(
    *(torch.from_numpy(array) for array in (q32, k32, v32)), None, False, None)
tiled = attention_kernel().check[grid, block, shared](*arguments)
print(f"first output of it: {tiled_out[it, 0]:.3f}   problems: {len(tiled.problems)}")
print(f"read    {tiled.global_loaded:7,} bytes, formula {4 * (n * d + 3 * n * d):7,}")
print(f"written {tiled.global_stored:7,} bytes, formula {4 * n * d:7,}")

# %% [markdown]
# Q once, K twice, V once, for each tile of 16 queries; the scores appear nowhere. That is 16 times fewer bytes read. And
# for 4,096 tokens on an A100? No kernel is faster than the longest of three times: bytes over bandwidth, **turns** (a warp
# reads shared memory once) over clock, operations over peak.
#
# *Predict.* Which is the longest for the three kernels, which for the tiled one?

# %% tags=["slide"]
N, D = 4096, 64
pairs = N * N * D  # below: A100 40 GB, data sheet: bytes/s, 108 x clock, FLOP/s
rungs = {  # (bytes, turns of shared memory, operations)
    "three kernels": (4 * (4 * pairs + 5 * N * N + N * D), 0, 4 * pairs),
    "one, tiled": (4 * (2 * N * D + 3 * pairs // 16), 10 * pairs / 32, 6 * pairs),
}
plotting.ladder(rungs, bandwidth=1.555e12, turns_per_second=108 * 1.41e9, peak=19.5e12,
                title="Tiles cut the bytes; shared memory is the next wall")
plotting.show("Bars of the least times, logarithmic: the three kernels wait longest "
              "for memory, the tiled one for its shared memory.")

# %% [markdown]
# Bytes for the three kernels, shared memory for the tiled one, which reads K twice only to
# know the maximum first. Lecture 06 finds a way around that: FlashAttention.
#
# (Why ten turns: section 1.20. Caches, left out here, help the three kernels.)
#
# ## Part 5 · Does it matter?
#
# ### 1.15 The bottleneck, and what attention does to it
#
# **What does it cost to squeeze a sentence into one vector?** So attention began: an *encoder* reads English number
# words, its last states are **one vector**, and a *decoder* writes German from that. Sutskever et al.
# (1409.3215) write that their network "did not have difficulty on long sentences"; Cho et al. (1409.1259), in the same
# month, that theirs "degrades rapidly" with the length. Bahdanau's decoder searches all states of the encoder instead,
# with **additive attention**: a small network scores each pair (1.17). All else is the same, but for the parameters.
#
# *Predict.* Two curves, share of sentences translated without a mistake against their length.

# %% tags=["slide"]
from attention.experiments.fundamentals import exactly_right
from attention.experiments.fundamentals import source_lengths, train_translator

lengths, words_in = np.arange(1, 14), source_lengths()
translators, curves = {}, {}
for name, kind in (("attention", "additive"), ("fixed vector", None)):
    translators[name] = [train_translator(kind, seed) for seed in range(3)]
    right = np.array([exactly_right(model) for model in translators[name]])  # (3, 1000)
    curves[name] = np.stack([right[:, (words_in == w) | (words_in == w + 1)].mean(1)
                             for w in lengths], axis=1)
    few, many = right[:, words_in <= 4].mean(), right[:, words_in >= 10].mean()
    count = sum(p.numel() for p in translators[name][0].parameters())
    print(f"{name:12s} right up to 4 words: {few:.1f}, from 10 words: {many:.1f}",
          f"({count:,} parameters)")
plotting.curves(curves, x=lengths, xlabel="English words in the number (n and n + 1)",
                ylabel="share exactly right (3 seeds)",
                title="One vector serves short numbers only; attention serves all")
plotting.show("Share of exact translations against source length: the fixed vector "
              "falls from nine in ten to almost none, attention stays near one.")

# %% [markdown]
# Attention stays near 1, one vector falls to 0. The paper's figure 2 shows the same (§ 5.1: "no performance
# deterioration even with sentences of length 50 or more"). Two cautions. Ours is a snapshot after 150 steps. And
# Sutskever's sentence is true of *his* network: four LSTM layers of 1,000 cells, its sources reversed, to which the paper credits the long sentences (1.22).
#
# *Predict.* A German says *zwei und dreißig*. Sketch the **alignment**: weights, German words against English.

# %%
from attention.experiments.fundamentals import agreement, align

source = "fifty six thousand eight hundred thirty two".split()
alignment, german = align(translators["attention"][0], source)
shares = [agreement(model) for model in translators["attention"]]
for kind in ("unit", "ten", "scale"):
    least = min(share[kind] for share in shares)
    print(f"{kind:5s}: largest weight on the word it translates, at least {least:.1f}")
plotting.alignment(alignment, [*source, "end"], german,
                   title="Units before tens: the alignment crosses twice")
plotting.show("Alignment of an English number with its German translation: mostly a "
              "diagonal, crossed where German says the unit before the ten. The "
              "largest weight of each row is framed.")

# %% [markdown]
# It crosses where German says the unit first (a frame marks the largest weight of a row). Units and tens are nearly
# always looked up; *hundert*, *tausend* less often, and are still right: the neighbours' states have read the
# whole sentence. **Weights show where the model looked, not why it was right.** (Section 1.17 opens this translator.)
#
# ### 1.16 In use
#
# **What do you call on Monday?** In PyTorch `F.scaled_dot_product_attention(q, k, v)`, tensors `(batch, heads, seq,
# d_head)`: it chooses a fast kernel, scales by $1/\sqrt d$ and returns no weights. `flex_attention` compiles masks of
# your own (lecture 07); `flash-attn` is the kernel of lecture 06 as a package; transformers calls one of these,
# vLLM its own, with a cache (lecture 05).
#
# **Trap.** *"A mask is a mask."* **Trap.** *"`is_causal=True` is a causal mask."* One query, four keys, equal scores, and
# values such that the output *is* the weights.
#
# *Predict.* Four rows of weights.

# %%
F = nn.functional
query, four_keys, eye = torch.zeros(1, 1, 4), torch.zeros(1, 4, 4), torch.eye(4)[None]
two = torch.tensor([[True, True, False, False]])
sdpa = F.scaled_dot_product_attention(query, four_keys, eye, attn_mask=two)
_, multi = nn.MultiheadAttention(4, 1, batch_first=True)(
    query, four_keys, eye, attn_mask=two)
top_left = F.scaled_dot_product_attention(query, four_keys, eye, is_causal=True)
ours = attention_weights(query.numpy(), four_keys.numpy(), causal=True)
print("mask in scaled_dot_product_attention:", sdpa[0, 0].numpy())
print("same mask in nn.MultiheadAttention:  ", multi[0, 0].detach().numpy())
print("is_causal, one new query:            ", top_left[0, 0].numpy())
print("this course, causal:                 ", ours[0, 0])

# %% [markdown]
# Halves on the first two keys, halves on the last two, all on the first, a quarter each. In the first, True
# means *may attend*, as here; in `nn.MultiheadAttention` it means *blocked*. And `is_causal` aligns its triangle at the
# top left, as if the new token stood at position 0: wrong with a cache (lecture 05).
#
# ## What you can do now
#
# You can write attention, $O=\text{softmax}(QK^\top/\sqrt d)\,V$, with masks and without overflow. You can build it as
# a layer, train it, test it, and put it into a language model. You can count its bytes and say why one kernel beats three.

# %%
found = [weights[it], layer_weights[it], weights32[it], rows[0]]
plotting.heatmap(np.stack(found), ["NumPy", "PyTorch", "CUDA", "the model"], tokens,
                 ylabel="computed by",
                 title='"It", computed four times: 0.68 on the animal')
plotting.show('Four equal rows of weights of the word "it": from NumPy, PyTorch, CUDA '
              'and the model itself.')

# %% [markdown]
# ## Exercises left
#
# 1. Is the fixed vector under-trained? `exactly_right(train_translator(None, 0, steps=600)).mean()`. Where is it still wrong?
# 2. Find a sentence where our head does not look at the subject: `lean("...", "noun", "other noun")[3, 1]`.
# 3. `ATTENTION_TILED` reads K twice. What would it have to remember to read it once? (Lecture 06.)
# 4. Write the backward pass of `additive_scores` (1.18), and compare with autograd.

# %% [markdown]
# ## Quiz

# %% [markdown] tags=["quiz"]
# **1.** A query stands at right angles to the first of three keys. After the scaling the scores are 0, 1 and 1. Which
# weight does the first key get?
#
# - a) 0
# - b) 0.155
# - c) 0.333
# - d) minus infinity

# %% tags=["quiz"]
from utils import quiz

first = softmax(np.array([0.0, 1.0, 1.0]))[0]
quiz.answer({"a": 0, "b": 0.155, "c": 0.333, "d": "minus infinity"}, first,
            "A score of 0 counts as e^0 = 1: unrelated is not forbidden.")

# %% [markdown] tags=["quiz"]
# **2.** Four equal scores, and the mask True, True, False, False is handed to `nn.MultiheadAttention`. Which weight does
# the first key get?
#
# - a) 0.25
# - b) 0.5
# - c) 0
# - d) 1

# %% tags=["quiz"]
equal_q, equal_k = torch.zeros(1, 1, 4), torch.zeros(1, 4, 4)
_, blocked = nn.MultiheadAttention(4, 1, batch_first=True)(
    equal_q, equal_k, equal_k, attn_mask=torch.tensor([[True, True, False, False]]))
quiz.answer({"a": 0.25, "b": 0.5, "c": 0, "d": 1}, blocked[0, 0, 0].item(),
            "There True means blocked; in this course it means 'may attend'.")

# %% [markdown] tags=["quiz"]
# **3.** One new query, four remembered keys, equal scores, `F.scaled_dot_product_attention(..., is_causal=True)`. Which
# weight does the first key get?
#
# - a) 1
# - b) 0.25
# - c) 0
# - d) nan

# %% tags=["quiz"]
top = nn.functional.scaled_dot_product_attention(
    equal_q, equal_k, torch.eye(4)[None], is_causal=True)
quiz.answer({"a": 1, "b": 0.25, "c": 0, "d": "nan"}, top[0, 0, 0].item(),
            "Its triangle is aligned at the top left: the query stands at position 0.")

# %% [markdown] tags=["quiz"]
# **4.** A softmax over the scores 3, 1 and -10. How many of its weights are exactly zero?
#
# - a) three
# - b) two
# - c) one
# - d) none

# %% tags=["quiz"]
zeros = int((softmax(np.array([3.0, 1.0, -10.0])) == 0).sum())
quiz.answer({"a": 3, "b": 2, "c": 1, "d": 0}, zeros,
            "Only minus infinity, which a mask writes, has weight zero.")

# %% [markdown] tags=["quiz"]
# **5.** The rows of $x$ are shuffled before they go into self-attention without a mask. What happens to the output?
#
# - a) it stays as it was
# - b) its rows are shuffled in the same way
# - c) its rows are shuffled back
# - d) it holds other numbers

# %% tags=["quiz"]
mixed = np.random.default_rng(0).permutation(n)
whole, of_mixed = (attention_weights(q[rows], k[rows]) @ v[rows]
                   for rows in (np.arange(n), mixed))
outcomes = {"as it was": whole, "in the same way": whole[mixed],
            "back": whole[np.argsort(mixed)]}
outcome = next((name for name, rows in outcomes.items() if np.allclose(rows, of_mixed)),
               "other numbers")
quiz.answer({"a": "as it was", "b": "in the same way", "c": "back",
             "d": "other numbers"}, outcome,
            "Each row asks the same questions of the same keys, wherever they stand.")

# %% [markdown]
# ## Going further
#
# Short sections, each alone, in any order. No later lecture needs them.

# %% [markdown]
# ### 1.17 The translator, opened
#
# **What did the network of 1.15 do at each word?** It scored every source word with an additive score, and blended. In the
# letters of Bahdanau, Cho and Bengio (arXiv 1409.0473; they count the output words with $i$, we with $t$):
#
# | | | |
# |---|---|---|
# | annotation | $h_j = [\overrightarrow h_j; \overleftarrow h_j]$ | a GRU reads forwards, another backwards (eq. 7) |
# | context | $c_t$ | what the decoder is told about the source at step $t$ (eq. 5) |
# | state | $s_t = f(s_{t-1}, y_{t-1}, c_t)$ | a GRU cell; $s_0 = \tanh(W_s \overleftarrow h_1)$ |
# | output | $p(y_t \mid \ldots) = g(y_{t-1}, s_t, c_t)$ | here one linear layer and a softmax (eq. 4) |
#
# $h_j$ joins the forward and the backward state at the **same** word $j$. And the output sees $s_t$ and $y_{t-1}$, not
# $c_t$ alone: two steps that look at one place could not say different words. Without attention $c_t$ is one vector for all
# $t$. With it, the state $s_{t-1}$ is the query, and the annotations are keys and values at once:
#
# $$e_{tj} = v^\top \tanh(s_{t-1} W_q + h_j W_k) \qquad
#   \alpha_{tj} = \frac{e^{e_{tj}}}{\sum_{j'} e^{e_{tj'}}} \qquad
#   c_t = \sum_j \alpha_{tj}\, h_j$$
#
# The paper writes $W_a$, $U_a$ and $v_a$ (appendix A.1.2); ours are written for rows, `x @ w`.

# %%
import inspect

from attention.fundamentals import Seq2Seq

print(inspect.getsource(Seq2Seq.decode))

# %% [markdown]
# *Predict.* Word 4 of a sentence of six is changed. Which backward states notice it, and which would know what follows word
# 5, if the annotation joined $h_j$ with the backward state at the *end*, as it is sometimes written?

# %%
gru = training.initialise(nn.GRU(8, 4, bidirectional=True, batch_first=True), seed=0)
sentence = torch.from_numpy(
    np.random.default_rng(11).standard_normal((1, 6, 8))
).float()
changed = sentence.clone()
changed[0, 4] += 1.0  # another word at position 4
with torch.no_grad():
    states, other = gru(sentence)[0][0], gru(changed)[0][0]
backward = np.abs((states - other)[:, 4:].numpy()).max(axis=1) > 0
print(
    "backward states that notice a change of word 4:",
    np.flatnonzero(backward),
    "of 0 to 5",
)

# %% [markdown]
# States 0 to 4. The backward state at the last word has read one word, and is no help anywhere else.

# %% [markdown]
# ### 1.18 Seven scores, one table
#
# A score says how well a query and a key match. Since 2014 at least seven functions have been proposed. **What do they
# share, what does each cost, and are they really seven?** The first one let a tiny network compare:
#
# $$ e_{ij} = v^\top \tanh(q_i W_q + k_j W_k) $$

# %% tags=["export"]
def additive_scores(q, k, w_q, w_k, v):
    """Additive score e_ij = v . tanh(q_i w_q + k_j w_k) of each query with each key.

    q (n_queries, d_q), k (n_keys, d_k), w_q (d_q, d_a), w_k (d_k, d_a), v (d_a,).
    Returns (n_queries, n_keys).
    Source: Bahdanau et al. 2014 (arXiv 1409.0473), appendix A.1.2.
    """
    return np.tanh((q @ w_q)[:, None, :] + (k @ w_k)[None, :, :]) @ v

# %%
def score(kind, q, k, *weights):
    """Scores (n_queries, n_keys) of queries against keys, by one of seven functions."""
    match kind:
        case "dot":
            return q @ k.T
        case "scaled dot":
            return q @ k.T / np.sqrt(q.shape[-1])
        case "cosine":
            return (q / np.linalg.norm(q, axis=-1, keepdims=True)) @ (
                k / np.linalg.norm(k, axis=-1, keepdims=True)
            ).T
        case "general":
            return q @ weights[0] @ k.T
        case "location":
            return q @ weights[0]
        case "additive":
            return additive_scores(q, k, *weights)
        case "concat":
            pairs = np.concatenate(
                np.broadcast_arrays(q[:, None], k[None]), axis=-1
            )  # (n_queries, n_keys, 2d)
            return np.tanh(pairs @ weights[0]) @ weights[1]
    raise ValueError(f"kind is {kind!r}, which is none of the seven")

# %% [markdown]
# *Additive* has two matrices and a vector (Bahdanau writes $W_a$, $U_a$ and $v_a$); *general*, *location* and *concat*
# have one matrix $W$. For *concat* the two matrices of *additive* are stacked, $W = [W_q; W_k]$.
#
# *Predict.* One of the seven never looks at the keys, and two are the same function under two names. Which?

# %%
draw = np.random.default_rng(0)
n_queries, n_keys, d, d_hidden = 6, 50, 16, 32
q, k = draw.standard_normal((n_queries, d)), draw.standard_normal((n_keys, d))
w_q, w_k = draw.standard_normal((2, d, d_hidden)) / np.sqrt(d)
v = draw.standard_normal(d_hidden)

weights = {
    "dot": (),
    "scaled dot": (),
    "cosine": (),
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
    print(
        f"{kind:11s} {s.shape!s:9s} {parameters:10,d} {flops[kind]:10,d} "
        f"{np.abs(s).max():8.2f}    {'yes' if reads_k else 'no'}"
    )

# %% [markdown]
# All seven return one number for each pair; they differ in everything else. *Location* ignores the keys: its matrix
# has one column for each **position**, so it is also tied to a longest length. And *additive* and *concat* are one
# function: $[q; k]\, W_a = q\, W_q + k\, W_k$, whatever the numbers are.

# %%
gap = np.abs(scores["concat"] - scores["additive"]).max()
print(f"concat with W = [W_q; W_k] and additive differ by {gap:.6f}")
print(
    f"as concat it costs {flops['concat'] / flops['additive']:.0f} times as many FLOPs"
)

# %% [markdown]
# Written as *additive*, each query and each key is projected once. Written as *concat*, each pair is.
#
# #### What does a bounded score do to the softmax?
#
# A cosine lies between -1 and 1, however long the vectors are. With $n$ keys the largest weight is therefore at most
# $e^{1} / (e^{1} + (n - 1) e^{-1})$.

# %%
longer = score("cosine", 100 * q, 100 * k)
moved = np.abs(scores["cosine"] - longer).max()
print(f"queries a hundred times longer change a cosine by {moved:.6f}")
for n in (8, 64, 1024):
    most = np.e / (np.e + (n - 1) / np.e)
    print(f"{n:5d} keys: a cosine can give at most {most:.3f} to one")

# %% [markdown]
# It can hardly point. That is why the Neural Turing Machine multiplies its cosine by a learned *key strength* $\beta$
# before the softmax. The dot product has its strength built in: the length of the query.
#
# *Sources: Bahdanau et al. 2014 (arXiv 1409.0473), additive; Luong et al. 2015 (1508.04025, section 3.1), dot,
# general, concat and location; Vaswani et al. 2017 (1706.03762), scaled dot; Graves et al. 2014 (1410.5401), cosine
# with a key strength.*

# %% [markdown]
# ### 1.19 The backward pass by hand
#
# Autograd is convenient and keeps every intermediate. A fused kernel (lecture 06) writes its own backward pass.
#
# #### Exercise 1H: gradients by hand  (difficulty 4 of 5, extra, 25 minutes)
#
# Given $dO = \partial L / \partial O$, walk back through the three formulas of section 1.5:
#
# $$ dV = P^\top dO \qquad dP = dO\, V^\top \qquad dS_{ij} = P_{ij}\Big(dP_{ij} - \sum_{j'} P_{ij'}\, dP_{ij'}\Big) $$
#
# $$ dQ = \text{scale} \cdot dS\, K \qquad dK = \text{scale} \cdot dS^\top Q $$
#
# The third one is the Jacobian of the softmax (section 1.6), applied to a row.
#
# | argument | shape |
# |---|---|
# | `q`, `k`, `v`, `mask`, `causal`, `scale` | as in `attention_weights`; `v` is `(..., n_keys, d_v)` |
# | `d_out` | `(..., n_queries, d_v)`, gradient of the loss with respect to the output |
#
# Returns `(d_q, d_k, d_v)` of the shapes of `q`, `k`, `v`. Given are `q_` and `k_`, which hold no nan, for the last two
# formulas, and `summed(d_q, q)`: it adds up over the axes along which `q` is shared.
#
# <details><summary>Hint</summary>
#
# Which of your functions gives $P$? What is $P_{ij}$ of a forbidden pair, and what is $dS_{ij}$ then: do masks need a case
# of their own? What is 0 times nan? Over which axis does the sum in $dS$ run, and which two results collect from all
# queries?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def attention_backward(q, k, v, d_out, mask=None, causal=False, scale=None):
    """Gradients of attention_numpy with respect to q, k and v, in NumPy.

    Shapes as in attention_numpy; d_out (..., n_queries, d_v), else ValueError. Returns
    (d_q, d_k, d_v) in the shapes and float types of q, k, v: where one is shared along
    a leading axis, its gradient is summed over it. A forbidden row of v may be nan.
    """
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    expected = (*lead, q.shape[-2], v.shape[-1])
    if d_out.shape != expected:
        raise ValueError(f"d_out must have the shape {expected}, got {d_out.shape}")

    def summed(gradient, array):  # over the axes along which the array was shared
        ahead = gradient.ndim - array.ndim
        axes = [ahead + i for i, n in enumerate(array.shape)
                if n == 1 != gradient.shape[ahead + i]]
        dtype = array.dtype if array.dtype.kind == "f" else float
        total = gradient.sum((*range(ahead), *axes)).reshape(array.shape)
        return total.astype(dtype, copy=False)

    q_, k_ = (np.where(np.isnan(a), 0, a) for a in (q, k))  # seen: d_s is nan already
    ### BEGIN SOLUTION
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    p = attention_weights(q, k, mask, causal, scale)
    d_p = np.where(p == 0, 0, d_out @ np.swapaxes(v, -1, -2))  # forbidden v: nan?
    d_s = scale * p * (d_p - (p * d_p).sum(-1, keepdims=True))
    return (summed(d_s @ k_, q), summed(np.swapaxes(d_s, -1, -2) @ q_, k),
            summed(np.swapaxes(p, -1, -2) @ d_out, v))
    ### END SOLUTION

# %%
attention_backward = check("1H", attention_backward)

# %%
draw = np.random.default_rng(20)
arrays = [draw.standard_normal((2, 5, 8)) for _ in range(4)]
tensors = [torch.from_numpy(array).requires_grad_() for array in arrays[:3]]
by_autograd = torch.autograd.grad(
    attention_torch(*tensors, causal=True), tensors, torch.from_numpy(arrays[3])
)
by_hand = attention_backward(*arrays, causal=True)
for name, ours, theirs in zip(("d_q", "d_k", "d_v"), by_hand, by_autograd):
    print(f"{name}: differs from autograd by {np.abs(ours - theirs.numpy()).max():.6f}")

# %% [markdown]
# ### 1.20 Tiles, barriers and banks
#
# **How do 256 threads load a tile, and what do they wait for?** They number the elements of the tile row after row, and
# take them in turns: neighbouring threads read neighbouring addresses, rows that do not exist become 0.

# %% tags=["export"]
LOAD_TILE = r"""
#define TILE 16
__device__ void load_tile(float* tile, int stride, const float* rows, int first, int n_rows,
                          int d) {
  int thread = threadIdx.y * TILE + threadIdx.x;
  for (int e = thread; e < TILE * d; e += TILE * TILE) {
    int r = e / d;
    int c = e % d;
    bool exists = first + r < n_rows;
    tile[r * stride + c] = exists ? rows[(size_t)(first + r) * d + c] : 0.0f;
  }
}
"""

# %% [markdown]
# The kernel below computes scores from tiles of K. Its barriers are missing. *Predict.* Five places are numbered: which of
# them need a `__syncthreads()`? A barrier must be reached by all threads of a block or by none.

# %% tags=["export"]
SCORES_TILED = r"""
__global__ void scores_tiled(const float* q, const float* k, float* s, int n_queries,
                             int n_keys, int d, float scale) {
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

# %%
def with_barriers(places):
    source = SCORES_TILED
    for place in range(5):
        barrier = "__syncthreads();" if place in places else ""
        source = source.replace(f"/* place {place} */", barrier)
    return cuda.compile(LOAD_TILE + source, name="scores_tiled")

draw = np.random.default_rng(21)
q33, k33 = (draw.standard_normal((rows, 32)).astype(np.float32) for rows in (33, 35))
s33 = np.zeros((33, 35), np.float32)
for places in (set(), {1}, {1, 3}, {1, 2, 3}):
    report = with_barriers(places).check[3, (16, 16), 4 * 16 * 32](
        q33, k33, s33, 33, 35, 32, 1.0
    )
    kinds = sorted({problem.kind for problem in report.problems}) or "no problem"
    print(f"barriers at {places or 'no place'}: {kinds}")

# %% [markdown]
# Places 1 and 3: the tile has arrived before anybody uses it, and everybody has used it before anybody overwrites it (0 and
# 1 would do too). Place 2 is not reached by all.
#
# #### Bank conflicts
#
# Shared memory has 32 **banks**; word $a$ lies in bank $a \bmod 32$, and each bank serves one word at a time. At step $t$
# the sixteen keys of the tile are read at `threadIdx.x * d + t`. With $d = 32$ they all lie in one bank and are served one
# after another, in 16 turns (NVIDIA's tools say **wavefronts**). *Predict.* And with rows $d + 1$ apart?

# %%
for stride, found in ((32, "one bank, 16 turns"), (33, "16 banks, one turn")):
    plotting.bank_map(
        4 * stride * np.arange(16), title=f"Rows {stride} words apart: {found}"
    )
plotting.show(
    "Two maps of the 32 banks: with rows 32 words apart sixteen keys pile up in "
    "one bank, with rows 33 apart each key has a bank of its own."
)

# %% [markdown]
# One unused float a row, and this conflict is gone, for every even $d$ (the output tile keeps one of two turns). The tiled kernel of 1.14 has it (`PAD`), and two more
# helpers: maxima and sums over the sixteen threads that share a row, by shuffles; and the blend of a tile. `__syncwarp()` is a
# barrier for one warp: without it a lane could read a weight that another has not written yet. (The ten turns in the
# figure of 1.14, for each entry of 32 pairs: scores, four; blend, six, since conflicts double two of its four accesses.)

# %% tags=["export"]
ROW_OF_A_TILE = r"""
#define PAD 1  // one unused float at the end of each row of a tile
__device__ float row_max(float x) {  // over the TILE threads that share a row
  for (int o = TILE / 2; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, o));
  return x;
}
__device__ float row_sum(float x) {
  for (int o = TILE / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffff, x, o);
  return x;
}
"""

# %% tags=["export"]
ADD_TILE = r"""
__device__ float add_to_output(float* o_tile, float* p_tile, const float* v_tile, float weight,
                               int d_v) {                // one round of the blend, in a row
  int x = threadIdx.x;
  int y = threadIdx.y;
  p_tile[y * (TILE + PAD) + x] = weight;
  __syncwarp();                                          // a row of the tile belongs to one warp
  for (int c = x; c < d_v; c += TILE)
    for (int r = 0; r < TILE; ++r)
      o_tile[y * (d_v + PAD) + c] +=
          p_tile[y * (TILE + PAD) + r] * v_tile[r * (d_v + PAD) + c];
  return weight;
}
"""

# %%
q33, k33, v33 = (
    torch.from_numpy(draw.standard_normal((rows, 32)).astype(np.float32))
    for rows in (33, 35, 35)
)
grid, block, shared, arguments, _ = attention_launch(q33, k33, v33, None, False, None)
padded = attention_kernel().check[grid, block, shared](*arguments)
plain = (LOAD_TILE + ROW_OF_A_TILE + ADD_TILE + ATTENTION_TILED).replace(
    "PAD 1", "PAD 0"
)
unpadded = cuda.compile(plain, name="attention_tiled").check[grid, block, shared](
    *arguments
)
kept = padded.bank_conflicts / unpadded.bank_conflicts
print(f"of the extra turns the padding leaves less than a tenth: {kept < 0.1}")

# %%
visits = [(block, block, tile) for block in range(3) for tile in range(3)]
plotting.walk_picture(
    visits, title="Each block keeps its queries and walks along the keys"
)
plotting.show(
    "Three by three tiles of the score matrix, coloured by block and numbered by "
    "step: each block works along one row."
)

# %% [markdown]
# ### 1.21 What if the values are the keys?
#
# Section 1.4 kept keys and values apart. **What is lost when an item hands over its own key?** In the recall task of
# section 1.2 a key is a symbol with its place, a value the symbol alone. Here the attention returns its keys.
#
# *Predict.* Does it still answer every question? The model is narrow: three numbers for each symbol.

# %%
class KeysAsValues(Recall):
    def values(self, x):
        return x + self.place.weight  # the keys of `attend`

for kind in (Recall, KeysAsValues):
    models = [train_recall(kind("attention", d=3), seed) for seed in range(3)]
    shares = [recall_accuracy(model).mean() for model in models]
    print(f"{kind.__name__:13s} of three seeds the worst {min(shares):.1f}, "
          f"the best {max(shares):.1f}")

# %% [markdown]
# The place travels along with the symbol and takes room that the symbol needed. With $d = 32$ there is room enough and
# nothing is lost; try it. The translator of 1.15 uses its annotations as keys and values at once.

# %% [markdown]
# ### 1.22 Reading backwards
#
# **Can a fixed vector be helped without attention?** Sutskever et al. (1409.3215) reversed the source sentences, not
# the targets. Their test perplexity fell from 5.8 to 4.7 and BLEU rose from 25.9 to 30.6 (section 3.3). Their
# explanation: the first source words come to stand close to the first target words, and short paths are easier to
# learn. You saw in 1.3 why.
#
# Their network in small: an LSTM reads, its last state starts a second LSTM that writes. The vector is given *once*.
#
# *Predict.* Does it help here, where numbers translate almost in order? (One seed each, for time: try three.)

# %%
from attention.experiments.fundamentals import translation, translation_batches
from attention.experiments.fundamentals import translation_loss
from torch.nn.utils.rnn import pack_padded_sequence

from utils.data import Vocabulary

# %%
class Handover(nn.Module):
    """Sutskever's encoder-decoder, one LSTM layer on each side; logits as Seq2Seq."""

    def __init__(self, n_source, n_target, d=48):
        super().__init__()
        self.embed_source, self.embed_target = (
            nn.Embedding(n_source, d),
            nn.Embedding(n_target, d),
        )
        self.reader, self.writer = (
            nn.LSTM(d, d, batch_first=True),
            nn.LSTM(d, d, batch_first=True),
        )
        self.out = nn.Linear(d, n_target)

    def forward(self, source, target):
        lengths = (source != Vocabulary.PAD).sum(1)
        words = pack_padded_sequence(
            self.embed_source(source), lengths, batch_first=True, enforce_sorted=False
        )
        _, state = self.reader(words)
        before = torch.cat(
            [torch.full_like(target[:, :1], Vocabulary.START), target[:, :-1]], dim=1
        )
        return self.out(self.writer(self.embed_target(before), state)[0])

# %%
def backwards(ids):
    """Sentences (n, length), their words reversed; END and padding stay behind."""
    turned = ids.clone()
    for row, length in zip(turned, (ids > Vocabulary.END).sum(1)):
        row[:length] = row[:length].flip(0)
    return turned

# %%
number_words, found = translation(), {}
for name, reading in (("as written", torch.clone), ("reversed", backwards)):
    model = Handover(len(number_words.english), len(number_words.german)).double()
    pairs = translation_batches(reading(number_words.source), number_words.target, 0)
    training.fit(training.initialise(model, 0), pairs, translation_loss, 200, lr=6e-3)
    with torch.no_grad():
        test = reading(number_words.test_source), number_words.test_target
        found[name] = math.exp(translation_loss(model, test))
    print(f"{name:10s} test perplexity a word {found[name]:.1f}")
plotting.bars(found, ylabel="test perplexity a word",
              title="Reversing the source lowers the perplexity")
plotting.show("Two bars of test perplexity, sources read as written and reversed: "
              "reversed is lower.")

# %% [markdown]
# It does. On average a source word is as far from its translation as before; what is shorter is the shortest way: the
# first German word now follows right after the English word it comes from. The paper believes, without a complete
# explanation, that this is the reason: training gets hold at the near end and works its way back from there. Attention
# makes every way that short.

# %% [markdown]
# ### 1.23 Must a query look everywhere?
#
# Luong and colleagues call our attention *global* and ask for less: the decoder first predicts **one position** $p$ in the
# source, a real number, then looks at the at most $2D + 1$ words around it. They call it *local-p*, and predict
# $p = S\,\sigma(v_p^\top \tanh(W_p h))$ from the decoder's state $h$, with $S$ the length of the source (equation 9). **How
# can a position be predicted without losing the gradient?** A window alone would lose it. So they multiply the weights by a
# Gaussian around $p$ (equation 10), with $s$ the position of a key:
#
# $$\alpha_s = \text{softmax}(e)_s \; \exp\!\Big(\!-\frac{(s - p)^2}{2\sigma^2}\Big), \qquad
# \sigma = D/2, \qquad s \in [p - D, p + D]$$

# %% tags=["export"]
def local_weights(scores, centre, window):
    """Local attention weights: a softmax over a window, times a Gaussian (local-p).

    scores (n_queries, n_keys); centre (n_queries,), real positions, 0 is the first key;
    window is D >= 1.
    Returns weights (n_queries, n_keys): 0 outside the window, not normalised again.
    Raises ValueError if window is below 1. Source: arXiv 1508.04025, equation 10.
    """
    if window < 1:
        raise ValueError(f"window is {window}; expected an integer of at least 1")
    distance = np.arange(scores.shape[-1]) - np.asarray(centre)[:, None]
    gaussian = np.exp(-(distance**2) / (2 * (window / 2) ** 2))
    return softmax(np.where(np.abs(distance) <= window, scores, -np.inf)) * gaussian

# %% [markdown]
# *Predict.* One query, 21 keys, a predicted position of 8.3 and $D = 4$. How many keys keep a weight?

# %%
e = np.random.default_rng(1).standard_normal((1, 21))
local = local_weights(e, np.array([8.3]), 4)[0]
print(
    "keys with a weight:",
    np.flatnonzero(local),
    f"  sum of the weights: {local.sum():.3f}",
)

plotting.curves(
    {"global": softmax(e)[0], "local-p": local},
    xlabel="position of the key",
    ylabel="weight",
    title="Local attention keeps eight keys of twenty-one",
)
plotting.show(
    "Two curves over 21 key positions: global weights are spread over all of them, "
    "local weights are zero outside 5 to 12."
)

# %% [markdown]
# The weights sum to less than 1: the Gaussian only takes away. And the position has a gradient. We move $p$ by a
# thousandth and look at the output, the weighted sum of the positions themselves, first within a window, then across
# its edge.

# %%
def read(p, values=np.arange(21.0)):
    return (local_weights(e, np.array([p]), 4) @ values).item()

for p in (8.3, 9.0):
    print(
        f"p = {p}: output {read(p - 1e-3):.3f} just before, {read(p + 1e-3):.3f} after"
    )
print(f"Gaussian at the edge of the window: {np.exp(-2):.3f}")

# %% [markdown]
# At 8.3 the output moves a little with $p$: a slope. At 9.0 it jumps: the key at 5 leaves while its Gaussian is still
# $e^{-2} \approx 0.14$, and the key at 13 enters. The authors call this differentiable almost everywhere.
#
# *Source: Luong et al. 2015, arXiv 1508.04025, section 3.2. Where the window crosses the end of the sentence, the
# outside is ignored, as here.*

# %% [markdown]
# ### 1.24 What if a model may look at only one place?
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
exact = pi * (reward - pi @ reward)  # gradient of the expected reward, all places read

for name, baseline in (("no baseline", 0.0), ("baseline: mean reward", pi @ reward)):
    a = draw.choice(9, size=40_000, p=pi)
    g = (reward[a] - baseline)[:, None] * (np.eye(9)[a] - pi)
    error = np.abs(g.mean(axis=0) - exact) / (g.std(axis=0) / np.sqrt(len(g)))
    noise = np.sqrt(g.var(axis=0).sum())
    print(f"{name:21s}: at most {error.max():.1f} standard errors off, "
          f"noise of one draw {noise:.2f}")

# %% [markdown]
# Right on average, with or without a baseline; noisy in each draw, and a baseline takes away much of the noise.
#
# Now both kinds learn the same task. A scene has nine patches, each of a different colour with a digit on it. The
# question names a colour, the answer is the digit.
#
# *Predict.* Which one needs more steps, and about how many times more?

# %%
class Glimpse(nn.Module):
    """Nine coloured patches with digits; a colour is asked for. Logits of its digit."""

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
            pi = nn.functional.one_hot(pi.argmax(-1), pi.shape[-1]).to(pi.dtype)
        return self.answer((pi[:, None] @ self.value(digits)).squeeze(1))

# %%
def scenes(rng, batch):
    colours = rng.permuted(np.tile(np.arange(9), (batch, 1)), axis=1)
    digits, asked = rng.integers(5, size=(batch, 9)), rng.integers(9, size=batch)
    rows = np.arange(batch)
    return [
        torch.from_numpy(x)
        for x in (colours, digits, colours[rows, asked], digits[rows, asked])
    ]

def soft_loss(model, batch):
    *scene, digit = batch
    return nn.functional.cross_entropy(model(*scene), digit)

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
        reward = -nn.functional.cross_entropy(
            model.answer(model.value(digits.gather(1, a)).squeeze(1)),
            digit,
            reduction="none",
        )
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
    return training.fit(
        model, batches, loss, steps, lr=1e-2, evaluate=accuracy, every=every
    )

runs = {
    name: [learn(hard, seed) for seed in range(3)]
    for name, hard in (("soft", False), ("hard, REINFORCE", True))
}

# %%
curves = {name: np.array([run.metrics for run in three])
          for name, three in runs.items()}
steps = np.array(runs["soft"][0].steps)
for name, found in curves.items():
    first = np.median([steps[c >= 0.95][0] for c in found])
    print(f"{name:16s} at the end {found[:, -1].min():.2f} or more; 0.95 after about "
          f"{first:.0f} steps (median)")
plotting.curves(curves, x=steps, xlabel="training step", ylabel="accuracy",
                title="Hard attention learns the same, later and less smoothly")
plotting.show("Accuracy against training steps, three runs each: soft attention "
              "reaches 100 % first, hard later.")

# %% [markdown]
# Both get there; the hard one pays for its draws with steps. What it buys: at use it reads one value instead of nine
# (all nine scores are still computed). Local-p (1.23) is the compromise: a few places, and a gradient.
#
# *Source: Xu et al. 2015, Show, Attend and Tell, arXiv 1502.03044: soft attention trained by back-propagation, hard
# attention by a variational bound or, equivalently, REINFORCE.*

# %% [markdown]
# ### 1.25 Is an attention weight ever exactly zero?
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
    """Entmax over the last axis, alpha > 1: exact zeros. alpha = 2 is sparsemax."""
    z = (alpha - 1) * (scores - scores.max(axis=-1, keepdims=True))
    low, high = np.full_like(z[..., :1], -1.0), np.zeros_like(z[..., :1])
    for _ in range(60):
        tau = (low + high) / 2
        too_much = (np.maximum(z - tau, 0) ** (1 / (alpha - 1))).sum(
            axis=-1, keepdims=True
        ) > 1
        low, high = np.where(too_much, tau, low), np.where(too_much, high, tau)
    return np.maximum(z - tau, 0) ** (1 / (alpha - 1))

def sparsemax(scores):
    """Sparsemax over the last axis: sort, find how many stay above the threshold."""
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
for name, one, other in (
    ("bisection at alpha = 2, and sparsemax", entmax(rows, 2.0), sparsemax(rows)),
    ("sparsemax of two scores, by hand", sparsemax(two)[:, 0], by_hand_2),
    ("entmax-1.5 of two scores, by hand", entmax(two, 1.5)[:, 0], by_hand_15),
    ("alpha = 1.0001, and softmax", entmax(rows, 1.0001), softmax(rows))):
    print(f"{name:38s} differ by {np.abs(one - other).max():.4f}")

# %%
smaller = {
    "softmax": softmax(two)[:, 1],
    "entmax-1.5": entmax(two, 1.5)[:, 1],
    "sparsemax": sparsemax(two)[:, 1],
}
plotting.curves(
    smaller,
    x=t,
    xlabel="by how much the other score is larger",
    ylabel="weight of the smaller score",
    title="Sparsemax is zero from a gap of 1, entmax-1.5 from 2, softmax never",
)
plotting.show(
    "Weight of the smaller of two scores against their gap: three falling curves; "
    "sparsemax and entmax reach zero, softmax only approaches it."
)

# %% [markdown]
# So there are others, and they say zero. Does that save the $QK^\top$? A weight is known to be zero only once its
# score is known.

# %%
draw = np.random.default_rng(4)
n, d = 256, 64
q, k = draw.standard_normal((2, n, d))
s = q @ k.T / np.sqrt(d)
print("              zero weights   FLOPs of Q K^T   FLOPs of the blend, zeros skipped")
for name, p in (
    ("softmax", softmax(s)),
    ("entmax-1.5", entmax(s, 1.5)),
    ("sparsemax", sparsemax(s)),
):
    blend = 2 * (p > 0).sum() * d
    print(f"{name:11s} {np.mean(p == 0):12.0%} {2 * n * n * d:16,d} {blend:22,d}")

# %% [markdown]
# **Trap.** *"Softmax gives every token some weight, and that is the overhead."* It is not the overhead. All
# three compute all scores; only the second product gets lighter, and a GPU that works on tiles would have to find whole
# tiles of zeros. The cost of attention is not in the small weights. It is in computing the scores
# (lecture 07 skips those).
#
# #### And softmax itself, in floating point?

# %%
for dtype, stays, goes in (
    (np.float16, 10, 20),
    (np.float32, 80, 110),
    (np.float64, 700, 750),
):
    w = [softmax(np.array([0.0, -gap], dtype=dtype))[1] for gap in (stays, goes)]
    print(
        f"{dtype.__name__}: weight {w[0]:.0e} at a gap of {stays}, {w[1]:.0f} at {goes}"
    )

# %% [markdown]
# "Softmax is never zero" is true of real numbers. In half precision a score that is 20 below the best one has a
# weight of exactly 0, by underflow.
#
# *Sources: Martins and Astudillo 2016, arXiv 1602.02068 (sparsemax); Peters, Niculae and Martins 2019, arXiv
# 1905.05702 (entmax).*

# %% [markdown]
# ### 1.26 Can attention follow a chain of facts?
#
# "Which river flows through the capital of Italy?" No single fact answers that. **What if the answer of one look-up
# becomes the query of the next?** A key-value memory network does this. A fact is stored as a key (subject and
# relation) and a value (object); each round, a *hop*, is one attention. The vectors below are random, not learned: we
# want to see the mechanism.

# %%
facts = [
    ("Italy", "capital", "Rome"),
    ("France", "capital", "Paris"),
    ("Egypt", "capital", "Cairo"),
    ("Rome", "river", "Tiber"),
    ("Paris", "river", "Seine"),
    ("Cairo", "river", "Nile"),
]
draw = np.random.default_rng(5)
names = sorted({name for fact in facts for name in fact})
vector = {
    name: x / np.linalg.norm(x)
    for name, x in zip(names, draw.standard_normal((len(names), 64)))
}

keys = np.stack([vector[subject] + vector[relation] for subject, relation, _ in facts])
values = np.stack([vector[obj] for _, _, obj in facts])

# %%
def two_hops(subject, relations, beta):
    """Follow two relations from a subject: the weights at each hop, (2, n_facts)."""
    state, hops = vector[subject], []
    for relation in relations:
        weights = softmax(beta * (state + vector[relation]) @ keys.T)
        state = weights @ values
        hops.append(weights)
    return np.stack(hops)

hops = two_hops("Italy", ("capital", "river"), beta=8)
plotting.heatmap(
    hops,
    queries=["hop 1: capital", "hop 2: river"],
    keys=[f"{relation}({subject})" for subject, relation, _ in facts],
    title="The first hop finds Rome, the second finds the Tiber",
)
plotting.show(
    "Heat map of two hops over six facts: hop 1 is bright at Italy, hop 2 at Rome."
)

# %% [markdown]
# It can. But the second hop starts from what the first one read, and the first reads softly.
#
# *Predict.* If hop 1 puts 90 % on the right fact, is hop 2 better or worse than 90 %?

# %%
betas = np.arange(1.0, 13.0)
right = np.array(
    [
        [w[0, 0], w[1, 3]]
        for w in (two_hops("Italy", ("capital", "river"), b) for b in betas)
    ]
)
plotting.curves(
    {"hop 1: Rome": right[:, 0], "hop 2: Tiber": right[:, 1]},
    x=betas,
    xlabel="sharpness of the softmax",
    ylabel="weight of the right fact",
    title="A blurred first hop costs the second one",
)
plotting.show(
    "Weight of the right fact against sharpness: the second hop lies below the first."
)
print(f"hop 1 minus hop 2, at least: {(right[:, 0] - right[:, 1]).min():.4f}")
print(f"at sharpness 3: hop 1 {right[2, 0]:.2f}, hop 2 {right[2, 1]:.2f}")

# %% [markdown]
# Worse, at every sharpness here: a mixture of Rome, Paris and Cairo asks for three rivers at once. In the paper the
# vectors are learned, and so is the step from one hop to the next.
#
# *Source: Miller et al. 2016, Key-Value Memory Networks for Directly Reading Documents, arXiv 1606.03126.*

# %% [markdown]
# ### 1.27 When does the output determine the weights?
#
# Section 1.8 showed two rows of weights with one output. **When is that possible?** The condition: a change $\delta$ of
# a row is invisible if $\delta^\top V = 0$, and allowed if $\delta^\top \mathbf{1} = 0$ and no weight turns negative. A
# row with positive weights has such a change exactly when the number of keys exceeds the rank of $[V\;\mathbf{1}]$.
# That rank is at most $d_\text{head} + 1$: **with more keys than that, other maps always exist.** For one head of 32
# dimensions:

# %%
draw = np.random.default_rng(7)
for n in (16, 33, 34, 64, 512):
    value_rows = draw.standard_normal((n, 32))
    fixed = np.concatenate(
        [value_rows, np.ones((n, 1))], axis=1
    )  # what a change may not touch
    row = softmax(draw.standard_normal(n))
    delta = softmax(draw.standard_normal(n)) - row  # towards another map
    delta -= (
        fixed @ np.linalg.lstsq(fixed, delta, rcond=None)[0]
    )  # only the part that nobody sees
    free = n - np.linalg.matrix_rank(fixed)
    if free:
        step = np.min(row[delta < 0] / -delta[delta < 0])  # to the first weight at zero
        other = row + step * delta
        changed = np.abs(other @ value_rows - row @ value_rows).max()
        moved = np.abs(other - row).sum() / 2
        print(f"{n:4d} keys: {free:3d} free directions; {moved:.2f} of the weight "
              f"moved, output changed by {changed:.6f}")
    else:
        print(f"{n:4d} keys:   0 free directions; the output determines the row")

# %% [markdown]
# Is the row of "it" in our sentence determined? MiniLM has 32 dimensions a head and the sentence has 16 tokens. The
# values are computed from the hidden states between its layers.

# %%
model, tokenizer = data.minilm()
inputs = tokenizer(
    "The animal didn't cross the street because it was too tired.", return_tensors="pt"
)
with torch.no_grad():
    hidden = model(
        **inputs, output_hidden_states=True
    ).hidden_states  # what enters each layer, (1, 16, 384)
    flat = [
        layer.attention.self.value(x)[0]
        for layer, x in zip(model.encoder.layer, hidden)
    ]
head_values = (
    np.stack(flat).reshape(6, 16, 12, 32).transpose(0, 2, 1, 3)
)  # (layers, heads, n, d_head)
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
# ### 1.28 What would resolving "it" take?
#
# No single head of the trained model did it. **Is a look-up enough in principle?** Here is one by hand. Warning: the
# vectors are **constructed to make it work**. This shows what attention can express, not what any model has learned.
#
# Two features: can be tired, can be wide. First "it" looks up the adjective, then it looks for a noun that fits what
# it found.

# %%
words = ["animal", "street", "it", "tired", "wide"]
fits = np.array(
    [[1, 0], [0, 1], [0, 0], [1, 0], [0, 1]], dtype=float
)  # can be tired, can be wide
is_adjective, is_noun = np.array([0, 0, 0, 1, 1.0]), np.array([1, 1, 0, 0, 0.0])

rows = []
for adjective in ("tired", "wide"):
    heard = np.array(
        [w not in ("tired", "wide") or w == adjective for w in words]
    )  # one adjective a sentence
    found = (
        softmax(np.where(heard, 10 * is_adjective, -np.inf)) @ fits
    )  # layer 1: which adjective?
    rows.append(
        softmax(np.where(heard, 10 * is_noun + 5 * fits @ found, -np.inf))
    )  # layer 2: which noun fits?
plotting.heatmap(
    np.stack(rows),
    queries=["it ... tired", "it ... wide"],
    keys=words,
    title="Constructed: two look-ups resolve the pronoun",
)
plotting.show(
    'Two rows: with "tired" the pronoun looks at "animal", with "wide" at "street".'
)

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
    print(
        f"O {verb:14s}",
        "  ".join(
            f"{c} {w:.2f}" for c, w in zip(candidates, softmax(8.0 * np.array(able)))
        ),
    )

# %% [markdown]
# Half and half is the right answer. A translator into English has to write *he* or *she* anyway; what it picks then
# comes from its training data, not from the sentence.

# %% [markdown]
# ### 1.29 How are weights taken out of a model that does not return them?
#
# With a forward hook: a function that PyTorch calls with the output of a module. Tools such as TransformerLens are
# this idea, carried through a whole model.

# %%
from contextlib import contextmanager

@contextmanager
def cached(modules):
    """Record the output of each named module during the block, in a dict."""
    cache = {}
    handles = [
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: cache.__setitem__(name, output)
        )
        for name, module in modules.items()
    ]
    try:
        yield cache
    finally:
        for handle in handles:
            handle.remove()

# %%
model, tokenizer = data.minilm()
returned, _ = data.minilm_attention(tired)
layers = [layer.attention.self for layer in model.encoder.layer]
hooks = sum(len(layer._forward_hooks) for layer in layers)
with torch.no_grad(), cached(dict(enumerate(layers))) as cache:
    model(**tokenizer(tired, return_tensors="pt"))

caught = np.stack([cache[i][1][0].numpy() for i in range(6)])  # output 1: the weights
print(f"shape {caught.shape}, differs from what it returns by "
      f"{np.abs(caught - returned).max():.6f}")
left = sum(len(layer._forward_hooks) for layer in layers) - hooks
print("hooks left behind:", left)

# %% [markdown]
# BertViz draws what was caught: the twelve heads of layer 3 (it was given one layer, so it calls it layer 0).

# %%
most = caught[3, :, it].argmax(-1)  # (12,): where "it" looks most, head by head
plotting.bertviz_head_view(
    caught[3:4], head.tokens, "Twelve heat maps, the heads of layer 3: nearly all are "
    "brightest in the first column; in the row of it, head 1 is brightest at animal.",
    title=f'"It" looks most at "animal" in {(most == animal).sum()} head of twelve')

# %% [markdown]
# ### 1.30 Six layers, one map? Attention rollout
#
# In the last layer the row of "it" says how much was taken from each *position*, and by then each position is a mixture
# of all words. **How much comes from each word of the input?** *Attention rollout* multiplies the maps of all layers,
# each averaged over heads and mixed half and half with the identity, because the residual connection carries each
# position on unchanged.

# %%
def rollout(weights):
    """Weights (layers, heads, n, n) to one map (n, n), last layer to input."""
    n = weights.shape[-1]
    result = np.eye(n)
    for layer in weights.mean(axis=1):
        result = (0.5 * layer + 0.5 * np.eye(n)) @ result
    return result

w, words = data.minilm_attention(tired)
plotting.heads(
    np.stack([w[-1].mean(axis=0), rollout(w)]),
    words,
    words,
    names=["last layer, mean", "rollout"],
    title="Rollout: more than half of every row comes from [CLS]",
)
plotting.show(
    "Two heat maps of the sentence: the mean of the last layer, and the rollout, "
    "where every row is brightest at [CLS]."
)
print(
    "smallest share of [CLS] in a row of the rollout:", rollout(w)[:, 0].min().round(2)
)

# %% [markdown]
# When is this exactly right? When a layer does nothing but mix: $x \leftarrow \frac12 x + \frac12 A x$. Then the
# rollout **is** the Jacobian. With value matrices in between, the maps no longer tell. Three layers, seven tokens:

# %%
def jacobian_norms(maps, value_matrices, n=7, d=8):
    """How much each output position depends on each input position, rows sum to 1."""

    def network(x):
        for a, w in zip(maps, value_matrices):
            x = 0.5 * x + 0.5 * a @ x @ w
        return x

    jacobian = torch.autograd.functional.jacobian(
        network, torch.zeros(n, d, dtype=torch.float64)
    )  # (n, d, n, d)
    norms = jacobian.pow(2).sum(dim=(1, 3)).sqrt()
    return (norms / norms.sum(-1, keepdim=True)).numpy()

draw = np.random.default_rng(6)
maps = softmax(2 * draw.standard_normal((3, 7, 7)))
torch_maps = torch.from_numpy(maps)
identity = torch.eye(8, dtype=torch.float64).expand(3, 8, 8)
random = torch.from_numpy(draw.standard_normal((3, 8, 8)) / np.sqrt(8))
for name, matrices in (
    ("no value matrices", identity),
    ("random value matrices", random),
):
    difference = np.abs(
        jacobian_norms(torch_maps, matrices) - rollout(maps[:, None])
    ).max()
    print(f"{name:21s}: largest difference to the rollout {difference:.2f}")

# %% [markdown]
# And in MiniLM? We remove one word (replace it by `[MASK]`), see how far the other words' final vectors move, and ask
# whether a map ranks the words in the same order.

# %%
model, tokenizer = data.minilm()

def rank_correlation(a, b):
    return np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1]

@torch.no_grad()
def removal(text):
    """Rank correlation of three maps with what removing a word changes, a mean."""
    w, words = data.minilm_attention(text)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    final = model(input_ids=ids).last_hidden_state[0]
    inner, moved = np.arange(1, len(words) - 1), np.zeros((len(words), len(words)))
    for j in inner:
        changed = ids.clone()
        changed[0, j] = tokenizer.mask_token_id
        without = model(input_ids=changed).last_hidden_state[0]
        moved[:, j] = (without - final).norm(dim=-1)
    maps = {"last layer": w[-1].mean(0), "rollout": rollout(w),
            "mean of all layers": w.mean((0, 1))}
    others = {i: inner[inner != i] for i in inner}
    return {name: np.mean([rank_correlation(m[i, others[i]], moved[i, others[i]])
                           for i in inner]) for name, m in maps.items()}

# %%
texts = [
    "The animal didn't cross the street because it was too tired.",
    "The animal didn't cross the street because it was too wide.",
    "The old man the boats while the young wait at home.",
    "She gave the book to her brother because he had asked for it.",
]
found = [removal(text) for text in texts]
plotting.bars(
    {name: [f[name] for f in found] for name in found[0]},
    ylabel="rank correlation with removal",
    title="Here a plain mean over layers ranks words better than rollout",
)
plotting.show(
    "Three bars, rank correlation with removal: the mean of all layers is highest."
)
margin = min(f["mean of all layers"] - f["rollout"] for f in found)
print(f"mean of all layers minus rollout, at least: {margin:.2f}")

# %% [markdown]
# On these four sentences the plain mean wins. The authors report that rollout agrees with removal better than raw
# attention does, on their models and tasks. Four sentences do not overturn that. They show that it has to be measured
# on the model in question.
#
# *Source: Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers, arXiv 2005.00928.*

# %% [markdown]
# ### 1.31 What does a sentiment model look at?
#
# Yang and colleagues let words vote for the meaning of a sentence and sentences for the meaning of a review. Both
# times the "query" is a learned vector $u$: which words matter, in general? Their paper shows the weights as heat
# maps of Yelp reviews. **Does such a map show the words that decide?**
#
# Our reviews are synthetic: four sentences of filler, in one of them an opinion, in half of the reviews with *not*
# before it.

# %%
good, bad = ["great", "delicious", "friendly"], ["awful", "bland", "rude"]
filler = "the food staff was and we sat table menu on street it".split()
lexicon = good + bad + ["not"] + filler

def reviews(rng, batch):
    """Words (batch, 4, 6), positive (batch,), and where the opinion word stands."""
    x = rng.integers(7, len(lexicon), size=(batch, 4, 6))
    positive, negated = rng.integers(2, size=(2, batch))
    row, s = np.arange(batch), rng.integers(4, size=batch)
    p = rng.integers(1, 6, size=batch)
    x[row, s, p] = np.where(positive ^ negated, 0, 3) + rng.integers(3, size=batch)
    x[row, s, p - 1] = np.where(negated, 6, x[row, s, p - 1])
    return torch.from_numpy(x), torch.from_numpy(positive), s, p

# %%
class Pool(nn.Module):
    """Attention with a learned query: h (..., n, d) to (..., d), weights (..., n)."""

    def __init__(self, d):
        super().__init__()
        self.project, self.u = nn.Linear(d, d), nn.Linear(d, 1, bias=False)

    def forward(self, h):
        weights = torch.softmax(self.u(torch.tanh(self.project(h))).squeeze(-1), dim=-1)
        return (weights[..., None, :] @ h).squeeze(-2), weights

# %%
class Hierarchical(nn.Module):
    """Words to sentences to a review, a Pool at each step; a GRU gives context."""

    def __init__(self, recurrent, d=16):
        super().__init__()
        self.embed = nn.Embedding(len(lexicon), d)
        self.gru = (
            nn.GRU(d, d // 2, bidirectional=True, batch_first=True)
            if recurrent
            else None
        )
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
    training.fit(
        reader,
        batches,
        lambda model, batch: nn.functional.cross_entropy(model(batch[0])[0], batch[1]),
        300,
        lr=1e-2,
    )
    with torch.no_grad():
        logits, word_weights, sentence_weights = reader(test_reviews)
    return (
        (logits.argmax(-1) == positive).float().mean().item(),
        word_weights.numpy(),
        sentence_weights.numpy(),
    )

alone, _, _ = train_reader(recurrent=False, seed=0)
readers = [train_reader(recurrent=True, seed=seed) for seed in range(3)]
print(
    f"words alone: {alone:.1f} right; in context: "
    f"{min(accuracy for accuracy, _, _ in readers):.2f} or more"
)

# %% [markdown]
# Without context *not* and *great* are two votes, and no sum of votes is "not great". With a GRU underneath, the same
# pooling solves the task. Now the map of one of the three models, for one review with *not* and one without.

# %%
import matplotlib.pyplot as plt

row = np.arange(1000)
negated = test_reviews[row, s, p - 1].numpy() == 6
_, word_weights, sentence_weights = readers[1]
figure, axes = plt.subplots(1, 2, figsize=(11, 2.8))
shown = {
    '"not" takes the weight': np.flatnonzero(negated)[0],
    "the opinion takes the weight": np.flatnonzero(~negated)[0],
}
for ax, (title, review) in zip(axes, shown.items()):
    ax.imshow(word_weights[review], cmap="viridis", vmin=0, vmax=1, aspect="auto")
    ax.grid(False)
    for (i, j), weight in np.ndenumerate(word_weights[review]):
        ax.text(j, i, lexicon[test_reviews[review, i, j]], ha="center", va="center",
                fontsize=9, color="black" if weight > 0.6 else "white")
    ax.set(title=title, xticks=[], ylabel="weight of sentence")
    ax.set_yticks(range(4), [f"{w:.2f}" for w in sentence_weights[review]])
plotting.show(
    "Two synthetic reviews as heat maps of word weights, sentence weights at the side: "
    "the opinion's sentence has almost all."
)

# %% [markdown]
# As in the paper's figure, the sentence with the opinion lights up. Do all three models agree on that?
#
# *Predict.* All three are right in nearly all reviews. In how many reviews does the deciding sentence have the
# largest weight?

# %%
found = [np.mean(sentences.argmax(-1) == s) for _, _, sentences in readers]
print("deciding sentence has the largest weight, share of reviews, model by model:",
      *(f"{share:.1f}" for share in sorted(found)))
for name, which in (("without not", ~negated), ("with not", negated)):
    for place, words in (("opinion", p), ("word before it", p - 1)):
        means = [weights[row, s, words][which].mean() for _, weights, _ in readers]
        shown = " ".join(f"{mean:.1f}" for mean in means)
        print(f"{name:11s}: weight of the {place:14s} {shown}")

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
# ### 1.32 What changes in half precision?
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
from attention.fundamentals import softmax as shifted  # yours may round otherwise here

row = np.array([3.0, 1.0, -2.0], dtype=np.float32)
print("-1e9 in float32, all masked:", shifted(row + np.float32(-1e9)).round(3))
print("-1e4 in float32, all masked:", shifted(row + np.float32(-1e4)).round(2))
print(
    "-1e4 in float16, all masked:",
    shifted(row.astype(np.float16) + np.float16(-1e4)).round(3),
)
with np.errstate(over="ignore"):
    print("-1e9 in float16 is:         ", np.float32(-1e9).astype(np.float16))
    print("two masks of -65504 add to: ", np.float16(-65504) + np.float16(-65504))
print("minus infinity, guarded:    ", shifted(np.full(3, -np.inf, dtype=np.float32)))

# %% [markdown]
# A uniform average over keys that it may not see: near $-10^9$ neighbouring float32 numbers are 64 apart, so the
# scores vanish in the mask. The smaller $-10^4$ keeps the scores in float32, and with them the forbidden answer; in
# half precision it loses them too. Only minus infinity with a guard says what is meant: nothing.

# %% [markdown]
# ### 1.33 Does the order of the tokens matter?
#
# **Trap.** *"Attention is permutation-invariant."* Shuffle the tokens of our sentence.
#
# *Predict.* What happens to the outputs, and what to the output of one query when only keys and values are shuffled?

# %%
order = np.random.default_rng(12).permutation(len(head.x))
sentence = head.x[:, :32]
plain = attention_numpy(sentence, sentence, sentence)
moved = attention_numpy(sentence[order], sentence[order], sentence[order])
one = attention_numpy(sentence[:1], sentence[order], sentence[order])
for name, difference in (("the old outputs", moved - plain),
                         ("the old outputs, shuffled", moved - plain[order]),
                         ("one query, shuffled keys and values", one - plain[:1])):
    print(f"difference to {name:36s} {np.abs(difference).max():.3f}")

# %% [markdown]
# They are shuffled in the same way: self-attention is permutation-**equivariant**. Only one query over a *set* is invariant. A
# causal mask breaks both. Word order comes in by other means: lecture 03.

# %% [markdown]
# ## Behind the scenes
#
# What the lecture imports from `attention.fundamentals` and `attention.experiments.fundamentals`: checks of arguments, types and devices, and the experiments'
# models and data. None of it is needed to follow the lecture.

# %% [markdown]
# **The triple.** `attention_numpy` is `attention_weights(...) @ v` behind a check of its arguments; the other two agree
# with it.

# %% tags=["export", "plumbing"]
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from utils import cuda, data, training
from utils.data import Vocabulary

def check_arguments(q, k, v, mask=None):
    """Raise ValueError or TypeError, in one sentence, unless q, k, v and mask fit together. For arrays and tensors."""
    cuda.check_numbers(q=q, k=k, v=v)
    for name, array in (("q", q), ("k", k), ("v", v)):
        if len(array.shape) < 2:
            raise ValueError(f"{name} must have at least two axes (seq, d_head), got shape {tuple(array.shape)}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same d_head, got {q.shape[-1]} and {k.shape[-1]}")
    if q.shape[-1] == 0:
        raise ValueError(f"q and k must have a d_head of at least 1, got shape {tuple(q.shape)}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have the same n_keys, got {k.shape[-2]} and {v.shape[-2]}")
    axes = [tuple(a.shape[:-2]) for a in (q, k, v)]
    try:
        full = (*np.broadcast_shapes(*axes), q.shape[-2], k.shape[-2])
    except ValueError:
        got = f"{axes[0]}, {axes[1]} and {axes[2]}"
        raise ValueError(f"the leading axes of q, k and v must broadcast, got {got}") from None
    if mask is not None:
        if "bool" not in str(getattr(mask, "dtype", type(mask).__name__)):
            raise ValueError("mask must be boolean with True = may attend, "
                             f"got {getattr(mask, 'dtype', type(mask).__name__)}")
        try:
            fits = np.broadcast_shapes(tuple(mask.shape), full) == full
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"mask must broadcast to {full}, got shape {tuple(mask.shape)}")

@cuda.skip_unseen
def attention_numpy(q, k, v, mask=None, causal=False, scale=None):
    """Each query's weighted average of the values: softmax(q k^T / sqrt(d_head)) v, in NumPy.

    The oracle of attention_torch and attention_cuda.
    q (..., n_queries, d_head), k (..., n_keys, d_head), v (..., n_keys, d_v), leading axes broadcast; mask boolean,
    True = may attend, broadcastable to (..., n_queries, n_keys); causal is aligned at the bottom right; scale defaults
    to 1/sqrt(d_head). Returns (..., n_queries, d_v) in the float type of q, float64 for integers (half precision is
    computed in single); a query with nothing to attend to gets zeros, and a value that it may not attend to changes
    nothing, be it nan. Raises ValueError when shapes or mask do not fit, TypeError for anything but arrays.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1.
    """
    check_arguments(q, k, v, mask)
    cuda.check_kind(np.ndarray, q=q, k=k, v=v)
    q_, k_, v_ = (a.astype(cuda.work_type(q), copy=False) for a in (q, k, v))
    return cuda.like(attention_weights(q_, k_, mask, causal, scale) @ v_, q)

# %% tags=["export", "plumbing"]
@cuda.skip_unseen
def attention_torch(q, k, v, mask=None, causal=False, scale=None):
    """Scaled dot-product attention in PyTorch; same arguments, shapes and errors as attention_numpy, differentiable.

    Half precision is computed in single and returned in the type of q. mask and causal as in attention_numpy.
    """
    check_arguments(q, k, v, mask)
    cuda.check_kind(torch.Tensor, q=q, k=k, v=v)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q_, k_, v_ = (a.to(cuda.work_type(q)) for a in (q, k, v))
    lost = k_.isnan()                                      # a key with nan has score nan, but as a forbidden one the
    scores = q_ @ k_.masked_fill(lost, 0).mT * scale       # gradient 0, and not 0 times nan
    scores = scores.masked_fill(lost.any(-1).unsqueeze(-2), math.nan)
    if causal:
        allowed = torch.from_numpy(causal_mask(q.shape[-2], k.shape[-2])).to(q.device)
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is not None:
        scores = torch.where(torch.as_tensor(mask, device=q.device), scores, -math.inf)
    if k.shape[-2] == 0:
        return cuda.like(scores @ v_, q)
    maximum = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - maximum.masked_fill(maximum == -math.inf, 0))
    total = weights.sum(-1, keepdim=True)
    return cuda.like(weights / total.masked_fill(total == 0, 1) @ v_, q)

# %% tags=["export", "plumbing"]
@functools.cache
def attention_kernel():
    """The tiled kernel, compiled on first use."""
    return cuda.compile(LOAD_TILE + ROW_OF_A_TILE + ADD_TILE + ATTENTION_TILED, name="attention_tiled")

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

@cuda.skip_unseen
def attention_cuda(q, k, v, mask=None, causal=False, scale=None):
    """Scaled dot-product attention by the tiled CUDA kernel; arguments, shapes and errors as attention_numpy.

    NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU. Computed in single precision, returned in
    the kind and type of q. Not differentiable.
    d + d_v up to 1,805 where a block may have 227 KB of shared memory, 1,293 on sm_80, 781 on sm_120.
    """
    check_arguments(q, k, v, mask)
    grid, block, shared, arguments, out = attention_launch(*cuda.on_device(q, k, v), mask, causal, scale)
    if out.numel() and k.shape[-2]:
        attention_kernel().fast[grid, block, shared](*arguments)                # without the checks and counts
    return cuda.like(out, q)

# %% tags=["export", "plumbing"]
SCORES = r"""
__global__ void scores(const float* q, const float* k, float* s, int n_queries, int n_keys,
                       int d, float scale) {
  int i = blockIdx.y * blockDim.y + threadIdx.y;
  int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n_queries || j >= n_keys) return;
  float sum = 0.0f;
  for (int t = 0; t < d; ++t) sum += q[(size_t)i * d + t] * k[(size_t)j * d + t];
  s[(size_t)i * n_keys + j] = scale * sum;
}
"""
BLEND = r"""
__global__ void blend(const float* p, const float* v, float* out, int n_queries, int n_keys,
                      int d) {
  int i = blockIdx.y * blockDim.y + threadIdx.y;
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n_queries || t >= d) return;
  float sum = 0.0f;
  for (int j = 0; j < n_keys; ++j) sum += p[(size_t)i * n_keys + j] * v[(size_t)j * d + t];
  out[(size_t)i * d + t] = sum;
}
"""

# %% [markdown]
# **The timeline of 1.1**, with its sources.

# %% tags=["export", "plumbing"]
HISTORY = [
    (1990, "Elman network", "a recurrent net: memory is its own last state"),  # Cognitive Science 14, 179-211
    (1991, "fast weights", "outer products of two learned patterns as a memory"),  # Schmidhuber; see 2102.11174
    (1997, "LSTM", "gates that keep a state over long times"),  # Hochreiter, Schmidhuber, Neural Computation 9(8)
    (2013, "soft window", "handwriting that moves along its text"),  # Graves, 1308.0850
    (2014, "seq2seq", "a sentence squeezed into one vector"),  # Sutskever et al., 1409.3215
    (2014, "additive attention", "the decoder searches the source at each word"),  # Bahdanau et al., 1409.0473
    (2015, "Luong attention", "dot, general and concat; global and local"),  # 1508.04025
    (2016, "key-value memory", "address by one vector, read another"),  # Miller et al., 1606.03126
    (2017, "Transformer", "attention without recurrence, in many heads"),  # Vaswani et al., 1706.03762
    (2019, "multi-query", "heads share keys and values"),  # Shazeer, 1911.02150
    (2020, "linear attention", "no softmax, a state of fixed size"),  # Katharopoulos et al., 2006.16236
    (2021, "RoPE", "positions as rotations"),  # Su et al., 2104.09864
    (2022, "FlashAttention", "exact attention, tile by tile"),  # Dao et al., 2205.14135
    (2022, "mixture of heads", "each token is routed to a few heads"),  # Zhang et al., 2210.05144
    (2023, "grouped-query", "groups of heads share keys and values"),  # Ainslie et al., 2305.13245
    (2024, "latent attention", "a compressed cache of keys and values"),  # DeepSeek-V2, 2405.04434
    (2024, "differential attention", "the difference of two softmax maps"),  # Ye et al., 2410.05258
    (2025, "native sparse attention", "sparsity that is trained, not cut in later"),  # 2502.11089
]

# %% [markdown]
# **A head of MiniLM**, taken out of its layer: what goes in, its three matrices and biases, and the weights it returns.

# %% tags=["export", "plumbing"]
class Head(NamedTuple):
    """One head of a trained encoder on one sentence: float64 arrays; projections (d_in, d_out), used as x @ w + b."""

    tokens: list[str]
    x: np.ndarray
    w_q: np.ndarray
    b_q: np.ndarray
    w_k: np.ndarray
    b_k: np.ndarray
    w_v: np.ndarray
    b_v: np.ndarray
    weights: np.ndarray


def minilm_head(sentence, layer, head):
    """The head of MiniLM with its input: x (n, 384), w_q, w_k, w_v (384, 32), b_q, b_k, b_v (32,), weights (n, n).

    layer from 0 to 5, head from 0 to 11; ValueError for others.
    """
    model, tokenizer = data.minilm()
    if not (0 <= layer < 6 and 0 <= head < 12):
        raise ValueError(f"layer must be from 0 to 5 and head from 0 to 11, got {layer} and {head}")
    weights, tokens = data.minilm_attention(sentence)
    with torch.no_grad():
        states = model(**tokenizer(sentence, return_tensors="pt"), output_hidden_states=True).hidden_states
    own, rows = model.encoder.layer[layer].attention.self, slice(32 * head, 32 * head + 32)
    parts = []
    for part in (own.query, own.key, own.value):
        parts += [part.weight.detach().numpy()[rows].T, part.bias.detach().numpy()[rows]]
    arrays = (states[layer][0].numpy(), *parts, weights[layer, head])
    return Head(tokens, *(array.astype(np.float64) for array in arrays))

# %% [markdown]
# **The recall task** of 1.2 and 1.11, and the untrained networks of 1.3.

# %% tags=["export", "plumbing"]
class Recall(nn.Module):
    """Reads streams (batch, 16) and answers for every lag k at once: logits (batch, 16, 8).

    memory: "window" (the last four symbols), "RNN", "LSTM" or "attention". All share embeddings and the last two layers.
    """

    def __init__(self, memory, seq_len=16, n_symbols=8, d=32, window=4):
        super().__init__()
        if memory not in ("window", "RNN", "LSTM", "attention"):
            raise ValueError(f'memory must be "window", "RNN", "LSTM" or "attention", not {memory!r}')
        self.memory, self.window = memory, window
        self.symbol = nn.Embedding(n_symbols, d)
        self.question = nn.Embedding(seq_len, d)  # one vector for each lag k
        self.answer = nn.Sequential(nn.Linear(2 * d, 2 * d), nn.ReLU(), nn.Linear(2 * d, n_symbols))
        match memory:
            case "window":
                self.mix = nn.Linear(window * d, d)
            case "RNN":
                self.mix = nn.RNN(d, d, batch_first=True)
            case "LSTM":
                self.mix = nn.LSTM(d, d, batch_first=True)
            case "attention":
                self.place = nn.Embedding(seq_len, d)

    def attend(self, x):
        """Weights (batch, 16 questions, 16 places) for symbols x (batch, 16, d)."""
        keys = x + self.place.weight  # a symbol with its place
        scores = self.question.weight @ keys.mT / math.sqrt(x.shape[-1])
        return torch.softmax(scores, dim=-1)

    def values(self, x):
        """What a symbol hands over: itself, without its place."""
        return x

    def forward(self, stream):
        x = self.symbol(stream)  # (batch, 16, d)
        match self.memory:
            case "window":
                found = self.mix(x[:, -self.window :].flatten(1))[:, None]
            case "attention":
                found = self.attend(x) @ self.values(x)
            case _:
                found = self.mix(x)[0][:, -1:]  # the last state answers every question
        question = self.question.weight.expand_as(x)
        return self.answer(torch.cat([found.expand_as(x), question], dim=-1))


def recall_streams(seed, batch=64):
    """Endless batches of (streams, answers), both (batch, 16) int64."""
    rng = np.random.default_rng(seed)
    while True:
        yield [torch.from_numpy(ids) for ids in data.recall_stream(rng, batch, seq_len=16, n_symbols=8)]


def recall_loss(model, batch):
    """Mean cross-entropy of a batch of (streams, answers)."""
    stream, answers = batch
    return F.cross_entropy(model(stream).mT, answers)


def train_recall(model, seed, steps=500):
    """`steps` steps from the first weights of `seed`, in double precision. Returns the model."""
    training.initialise(model.double(), seed)
    training.fit(model, recall_streams(seed), recall_loss, steps, lr=1e-2)
    return model


@torch.no_grad()
def recall_accuracy(model):
    """Share of right answers for each of the 16 lags, over 1,000 streams of their own."""
    stream, answers = next(recall_streams(seed=99, batch=1000))
    return (model(stream).argmax(-1) == answers).double().mean(0).numpy()


def influence(network, seed, forget_bias=0.0, n=50, d=32):
    """Norm of d out_T / d x_t for the distances T - t = 1 ... n - 1 in an untrained network, in float64: (n - 1,)."""
    training.initialise(network.double(), seed)
    if forget_bias:
        network.bias_ih_l0.data[d : 2 * d] += forget_bias  # torch's order: input, forget, cell, output
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)))
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x)[0][-1], x)  # (d, n, d)
    return jacobian.norm(dim=(0, 2)).flip(0)[1:].numpy()

# %% [markdown]
# **The translator** of 1.15 and 1.17.

# %% tags=["export", "plumbing"]
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

    def forward(self, query, keys, mask, projected=None):
        """query (batch, d_query), keys (batch, n_keys, d_key), mask (batch, n_keys) bool, True = may attend.

        projected: keys @ w_k, for which one computation a sentence is enough; it is computed here where it is not given.
        Returns the context c_t (batch, d_key) and the weights alpha_t (batch, n_keys); zeros for a row that may
        attend to nothing. ValueError for a mask that does not fit.
        """
        expected = tuple(keys.shape[:-1])
        if mask.dtype != torch.bool or mask.shape != expected:
            raise ValueError(
                f"mask must be boolean of shape {expected}, not {mask.dtype} {tuple(mask.shape)}"
            )
        projected = keys @ self.w_k if projected is None else projected
        scores = torch.tanh((query @ self.w_q)[:, None] + projected) @ self.v
        lowest = torch.finfo(
            scores.dtype
        ).min  # a row of -inf would be nan; `* mask` makes zeros exact
        weights = torch.softmax(scores.masked_fill(~mask, lowest), dim=-1) * mask
        return (weights[:, None] @ keys)[:, 0], weights

# %% tags=["export", "plumbing"]
class Encoder(nn.Module):
    """Annotations of a sentence: a GRU reads it forwards, another backwards. Sentences as in Seq2Seq."""

    def __init__(self, n_source, d_hidden):
        super().__init__()
        self.embed = nn.Embedding(n_source, d_hidden)
        self.gru = nn.GRU(d_hidden, d_hidden, batch_first=True, bidirectional=True)

    def forward(self, source):
        """All h_j (batch, n_source, 2 d), and the two states that have read everything, h_n and h_1, each (batch, d)."""
        lengths = (source != Vocabulary.PAD).sum(1).cpu()
        words = pack_padded_sequence(
            self.embed(source), lengths, batch_first=True, enforce_sorted=False
        )
        h, (h_n, h_1) = self.gru(words)
        return (
            pad_packed_sequence(h, batch_first=True, total_length=source.shape[1])[0],
            h_n,
            h_1,
        )

# %% tags=["export", "plumbing"]
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
        self.attention = (
            AdditiveAttention(d_hidden, 2 * d_hidden, d_hidden) if attention else None
        )
        self.f = nn.GRUCell(3 * d_hidden, d_hidden)
        self.g = nn.Linear(4 * d_hidden, n_target)

    def decode(self, source, n_steps, target=None):
        """Logits (batch, n_steps, n_target), alignments (batch, n_steps, n_source) or None.

        y_{t-1} is the target's word, or without a target the decoder's own best word.
        """
        h, h_n, h_1 = self.encoder(source)
        projected = h @ self.attention.w_k if self.attention else None  # once, not at each t
        s, fixed = torch.tanh(h_1 @ self.w_s), torch.cat([h_n, h_1], dim=-1)
        y, logits, alignments = torch.full_like(source[:, 0], Vocabulary.START), [], []
        for t in range(n_steps):
            y = self.embed_target(y)
            c, alpha = fixed, None
            if self.attention:
                c, alpha = self.attention(s, h, source != Vocabulary.PAD, projected)
            s = self.f(torch.cat([y, c], dim=-1), s)
            logits.append(self.g(torch.cat([y, s, c], dim=-1)))
            alignments.append(alpha)
            y = logits[-1].argmax(-1) if target is None else target[:, t]
        found = torch.stack(alignments, 1) if self.attention else None
        return torch.stack(logits, 1), found

    def forward(self, source, target):
        """Logits (batch, length, n_target) for every word of target (batch, length), given the words before it."""
        return self.decode(source, target.shape[1], target)[0]

    @torch.no_grad()
    def translate(self, source, n_steps):
        """Greedy translation: ids (batch, n_steps), to be read up to the first END; and the alignments or None."""
        logits, alignments = self.decode(source, n_steps)
        return logits.argmax(-1), alignments

# %% [markdown]
# **The translation task** of 1.15: numbers below a billion, English to German. It is trained in double precision: in
# single, two processors round differently, and after some hundred steps their curves differ visibly.

# %% tags=["export", "plumbing"]
class Translation(NamedTuple):
    """The number words: vocabularies, pairs to test with, and ids (n, length) of both languages."""

    english: Vocabulary
    german: Vocabulary
    test: list
    source: torch.Tensor
    target: torch.Tensor
    test_source: torch.Tensor
    test_target: torch.Tensor


@functools.cache
def translation():
    """The translation data, read once."""
    train, test = data.number_words()
    english, german = Vocabulary([p.source for p in train]), Vocabulary([p.target for p in train])
    ids = [
        torch.from_numpy(vocabulary.encode([getattr(p, side) for p in pairs]))
        for pairs in (train, test)
        for vocabulary, side in ((english, "source"), (german, "target"))
    ]
    return Translation(english, german, test, *ids)


def translation_batches(source, target, seed):
    """Endless batches of 64 pairs of ids, without the columns that are padding only."""
    rng = np.random.default_rng(seed)
    while True:
        rows = torch.from_numpy(rng.integers(len(source), size=64))
        yield [ids[rows][:, : (ids[rows] != Vocabulary.PAD).sum(1).max()] for ids in (source, target)]


def translation_loss(model, batch):
    """Mean cross-entropy of the German words, padding left out."""
    source, target = batch
    return F.cross_entropy(model(source, target).mT, target, ignore_index=Vocabulary.PAD)


def train_translator(attention, seed, steps=150):
    """A Seq2Seq of number words after `steps` steps; attention "additive" or None."""
    words = translation()
    model = training.initialise(Seq2Seq(len(words.english), len(words.german), attention=attention).double(), seed)
    training.fit(model, translation_batches(words.source, words.target, seed), translation_loss, steps, lr=6e-3)
    return model


def exactly_right(model):
    """For each test sentence: is the greedy translation right from the first word to the last? Booleans (1000,)."""
    words = translation()
    ids, _ = model.translate(words.test_source, words.test_target.shape[1])
    return ((ids == words.test_target) | (words.test_target == Vocabulary.PAD)).all(1).numpy()


def source_lengths():
    """English words of each test sentence, (1000,)."""
    return np.array([len(p.source) for p in translation().test])


def align(model, source):
    """Translate a list of English words. Returns (weights (n_german, n_source + 1), German words)."""
    words = translation()
    ids, alignments = model.translate(torch.from_numpy(words.english.encode([source])), words.test_target.shape[1])
    german = words.german.decode(ids[0])
    return alignments[0, : len(german), : len(source) + 1].numpy(), german


def kind_of(german, t):
    """What German word number t is: the unit before an "und", the ten after it, a scale, or None of these."""
    if "und" in german[t + 1 : t + 2]:
        return "unit"
    if t and german[t - 1] == "und":
        return "ten"
    return "scale" if german[t] in ("hundert", "tausend", "Million", "Millionen") else None


def agreement(model):
    """{kind: share of the words whose largest weight is on the English word that they translate}, over the test set."""
    words = translation()
    found = model.translate(words.test_source, words.test_target.shape[1])[1].argmax(-1).numpy()
    hits = {"unit": [], "ten": [], "scale": [], None: []}
    for i, p in enumerate(words.test):
        for t, j in enumerate(p.alignment):
            if j >= 0:  # "und" translates no English word
                hits[kind_of(p.target, t)].append(found[i, t] == j)
    return {name: np.mean(values) for name, values in hits.items() if name}

# %% [markdown]
# ## Glossary
#
# |term|what it is|
# |---|---|
# |additive, dot-product score|$v^\top\tanh(qW_q+kW_k)$; $q\cdot k$, mostly over $\sqrt d$|
# |attention (SDPA)|softmax of scores between queries and keys, times the values|
# |attention weight|a share of a row; the shares sum to 1|
# |attention score|how well a query and a key match, before the softmax|
# |causal mask, padding mask|forbids later tokens; forbids filling|
# |embedding|the vector that a table gives to a token|
# |head|one attention with its own $W_Q$, $W_K$, $W_V$; several side by side are *multi-head* (lecture 02)|
# |kernel, warp, lane|a function of the GPU; 32 threads that run together; one of them|
# |layer, residual connection|one round of processing; the input that is carried past it and added|
# |logits, perplexity|numbers before the last softmax; $e^{\text{loss}}$|
# |query, key, value|what is asked, what one is found by, what is handed over|
# |self-, cross-attention|queries and keys from one sequence; from two|
# |sector, tile|32 bytes of memory; rows that fit into shared memory|
#
# ## Sources
#
# Bahdanau, Cho, Bengio 2014 (arXiv 1409.0473) · Sutskever, Vinyals, Le 2014 (1409.3215) · Cho et al. 2014 (1409.1259) ·
# Luong, Pham, Manning 2015 (1508.04025) · Vaswani et al. 2017 (1706.03762) · Kingma, Ba 2014, Adam (1412.6980) ·
# Bengio, Simard, Frasconi 1994 (IEEE Trans. Neural Networks 5(2)) · Pascanu et al. 2012, clipping (1211.5063) · Reimers,
# Gurevych 2019 and Wang et al. 2020 (1908.10084, 2002.10957), MiniLM · Allal et al. 2025, SmolLM2 (2502.02737). Those of
# Going further stand there.
