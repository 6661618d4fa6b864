# ---
# jupyter:
#   course:
#     edition: 2
#     exceptions:
#       headers: "an appendix of half a lecture's length has five exercises, one of each kind"
#     experiments:
#     - Pooled
#     - train_pooled
#     - VisionBlock
#     - VisionTransformer
#     - digits
#     - train_vision
#     - Asker
#     - colour_grids
#     - train_asker
#     - Scorer
#     - train_scorer
#     - NeuralTuringMachine
#     - copies
#     - train_copier
#     module: beyond
#     public:
#     - segment_softmax
#     - graph_attention
#     - SetBlock
#     - InducedSetAttention
#     - patchify
#     - memory_by_gradient
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["slide"]
# # Lecture 13 · Appendix: beyond text and memory
#
# **The question.** What else can attention read? **You will be able to** *normalise* over the edges of a graph (13A),
# *fuse* that in CUDA (13B), *build* attention for sets (13C), *test* a pooling for its symmetries (13D), *write* a
# memory that learns while it reads (13E). **You need** attention (lecture 01), heads (lecture 02), softmax in CUDA
# (lecture 01), the delta rule (lecture 10).
#
# |part or section|core minutes|more minutes|
# |---|---|---|
# |Part 1 · graphs: 13.1 to 13.3, exercises 13A, 13B|44| |
# |Part 2 · sets: 13.4, 13.5, exercises 13C, 13D|36| |
# |Part 3 · pictures: 13.6, 13.7|8| |
# |Part 4 · a memory: 13.8, exercise 13E|15| |
# |Part 5 · what to read next: 13.9|5| |
# |Going further: 13.10 to 13.14| |25|
# |**together**|**108**|**25**|
#
# **An exercise:** write in place of `raise NotImplementedError`, run the cell, then its `check`. Until yours passes, the
# lecture uses its own. Predict first.

# %% [markdown] tags=["teacher"]
# **For the teacher: two times 50 minutes, ten to spare in each.** Run everything before class. In one lesson: 13.1, 13.2, 13.4,
# 13.6 and 13.9.
#
# - *Hour 1 (40).* 13.1: one node by hand, the edge list, what 13A asks (12) · 13.2: two queries that GAT cannot tell apart,
#   predict first (8) · 13.3: bytes of edges and of padding (7) · 13.4: a sum, a maximum, an average (8) · 13.5: the picture,
#   what 13C asks (5).
# - *At home after hour 1.* 13A, 13C.
# - *Hour 2 (40).* 13.5: rows that move, a row that stays, what 13D asks (6) · 13.6: patches, the class token's map (8) · 13.7: a
#   word asks a picture (6) · 13.8: a memory that takes gradient steps, what 13E asks (8) · 13.9: the table, one row each
#   aloud (8) · 13.10: the copy that goes on (4).
# - *At home after hour 2.* 13E. For volunteers 13B, 13D.
# - *Board.* $\sum_{j\in N(i)}\alpha_{ij}h_j$; under it what $N(i)$ is for a text, a graph, a set, a picture, the depth of a
#   network.
# - *Always works.* 13.2: let the class choose five new queries; the order of the keys stays.
# - *Checkpoint 1.* Why can a GAT head not give two queries two favourites? (The query's part of the score is the same for
#   all keys, and LeakyReLU keeps the order.) *Checkpoint 2.* Which pooling can count, and which can find the largest? (A sum
#   counts; attention finds.)
# - *Skip first.* 13.7 and the flow of 13.5 (5 minutes).
# - *Questions that come.* Is a transformer a graph network? Yes, on the complete graph. Why not always GATv2? It costs a
#   second matrix, or one shared one, and often makes no difference.

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
# ## Part 1 · Graphs
#
# ### 13.1 Attention over neighbours: GAT
#
# **Who may attend to whom, if there is no order?** In a graph, a node attends to its **neighbours** and to itself. Six
# people; an edge goes from a `source` to the `target` that looks at it. Each has four features.
#
# *Predict.* A looks at itself, B and C. Softmax over how many numbers?

# %% tags=["first-attention", "slide"]
from attention.fundamentals import softmax

pairs = [(0, 1), (0, 2), (1, 2), (2, 3), (3, 4), (3, 5)]  # A B C D E F
edges = sorted([(i, i) for i in range(6)] + pairs + [(j, i) for i, j in pairs])
target, source = np.array(edges).T  # sorted by the node that looks
rng = np.random.default_rng(5)
h = rng.standard_normal((6, 4))
w, a_target, a_source = (rng.standard_normal(s) for s in ((4, 3), 3, 3))

def leaky_relu(x):
    return np.where(x > 0, x, 0.2 * x)

features = h @ w
sees = [0, 1, 2]  # A sees A, B, C
scores_of_a = leaky_relu(features[0] @ a_target + features[sees] @ a_source)
weights_of_a = softmax(scores_of_a)
print("weights of A for A, B, C:", weights_of_a.round(3))
print("new features of A:", (weights_of_a @ features[sees]).round(3))

# %% [markdown] tags=["slide"]
# Over three. This is graph attention (GAT; Veličković et al. 2018, arXiv 1710.10903), one head:
#
# $$e_{ij}=\text{LeakyReLU}(a_t\cdot Wh_i+a_s\cdot Wh_j)\qquad
#   \alpha_{ij}=\frac{e^{e_{ij}}}{\sum_{k\in N(i)}e^{e_{ik}}}\qquad h_i'=\sum_{j\in N(i)}\alpha_{ij}Wh_j$$
#
# The neighbourhoods differ in size, so there is no matrix to take a softmax of: there is a list of 18 edges.
#
# #### Exercise 13A: softmax over segments  (difficulty 2 of 5, essential, 10 minutes; if you do only two)
#
# Turn the scores of edges into weights: the edges with the same target sum to 1.
#
# |argument|shape|meaning|
# |---|---|---|
# |`scores`|`(n_edges, heads)`|one score an edge and head; $-\infty$: the edge is not there|
# |`target`|`(n_edges,)`|whole numbers below `n_nodes`, in any order|
# |`n_nodes`|int|a node may have no edges|
#
# Returns `(n_edges, heads)` in the float type of `scores`; where all edges of a target are $-\infty$, zeros.
#
# <details><summary>Hint</summary>
#
# `np.maximum.at(top, target, scores)` keeps the largest score of each target: what must `top` hold before? Which index gives
# each edge the maximum of its target? What is $-\infty-(-\infty)$, and which total must not be divided by?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def segment_softmax(scores, target, n_nodes):
    """Softmax over the edges of each target: scores (n_edges, heads) to the same.

    target (n_edges,) in any order; an edge of -inf has the weight 0. NumPy.
    """
    ### BEGIN SOLUTION
    top = np.full((n_nodes, *scores.shape[1:]), -np.inf, scores.dtype)
    np.maximum.at(top, target, scores)
    top[top == -np.inf] = 0
    powers = np.exp(scores - top[target])
    total = np.zeros_like(top)
    np.add.at(total, target, powers)
    return powers / np.where(total == 0, 1, total)[target]
    ### END SOLUTION

# %%
segment_softmax = check("13A", segment_softmax)

# %% [markdown]
# With it a layer is a few lines. For the proof we compute the same in another way: a dense matrix of all 36 scores, masked, in
# PyTorch. (A test holds ours to torch-geometric's `GATConv` and `GATv2Conv`.)
#
# *Predict.* **Review this code:** somebody takes the softmax over *all* edges at once. What do the weights of A sum to?

# %% tags=["export"]
def blend_edges(scores, features, source, target):
    """Each target's blend of its sources' features: ((n, d), weights (n_edges,))."""
    weights = segment_softmax(scores[:, None], target, len(features))
    out = np.zeros_like(features)
    np.add.at(out, target, weights * features[source])
    return out, weights[:, 0]

def graph_attention(h, source, target, w, a_target, a_source):
    """One GAT head in NumPy: (new features (n, d), weights (n_edges,))."""
    features = h @ w
    scores = (features @ a_target)[target] + (features @ a_source)[source]
    scores = np.where(scores > 0, scores, 0.2 * scores)
    return blend_edges(scores, features, source, target)

# %% tags=["slide"]
out, weights = graph_attention(h, source, target, w, a_target, a_source)
t = torch.from_numpy
edge = torch.zeros(6, 6, dtype=torch.bool)
edge[target, source] = True
scores = nn.functional.leaky_relu(
    t(features @ a_target)[:, None] + t(features @ a_source), 0.2)
dense = torch.softmax(scores.masked_fill(~edge, -math.inf), -1) @ t(features)
of_edges = scores[target, source].numpy()
everywhere = softmax(of_edges)
print("new features of A:", out[0].round(3))
gap = np.abs(out - dense.numpy()).max()
print(f"largest difference from the dense matrix {gap:.6f}")
print(f"softmax over all edges: A's weights sum to {everywhere[target == 0].sum():.3f}")
plotting.flow(
    {"h": h, "Wh": features, "scores of edges": of_edges[None],
     "weights": weights[None], "new h": out},
    [("h", "Wh", "W"), ("Wh", "scores of edges", "gather, add, LeakyReLU"),
     ("scores of edges", "weights", "softmax by target"),
     (("weights", "Wh"), "new h", "add by target")],
    title="GAT: 18 edges, one softmax for each target")
plotting.show("Data flow: features are projected, gathered into a score for each edge, "
              "normalised by target and added up by target.")

# %% [markdown]
# To a small part of 1: a node would fade as the graph grows, and depend on people it does not know. The self-loop matters
# too: without it A would forget itself.
#
# ### 13.2 What GAT cannot choose
#
# **Do two nodes ever rank their neighbours differently?** GAT's score is $\text{LeakyReLU}(t_i+s_j)$: one number for the query,
# one for the key. GATv2 (Brody et al. 2022, arXiv 2105.14491) moves the vector outside:
# $a\cdot\text{LeakyReLU}(W_th_i+W_sh_j)$.
#
# *Predict.* Five queries, five keys, each query puts the keys in its order: how many different orders has GAT?

# %% tags=["slide"]
queries, keys = rng.standard_normal((2, 5, 8))
wt, ws, a = (rng.standard_normal(s) for s in ((8, 8), (8, 8), 8))
together = (queries @ wt)[:, None] + keys @ ws  # (5 queries, 5 keys, 8)
tables = {"GAT": leaky_relu(together @ a), "GATv2": leaky_relu(together) @ a}
for name, table in tables.items():
    orders = {tuple(row) for row in np.argsort(-table, axis=1).tolist()}
    favourites = table.argmax(1)
    print(f"{name:5s} rankings: {len(orders)}, favourites of the queries: {favourites}")

# %% [markdown]
# One: $t_i$ is the same for all keys of a query, and LeakyReLU keeps order. A GAT head has one list of favourites for the
# whole graph: if A and C both see B and D, "A listens to B, and C to D" is out of its reach. GATv2 has 4 orders here. The smallest graph on which it must fail has **two** queries and **two** keys: query $i$ wants key $i$. We train both on it.
#
# *Predict.* Which accuracy does GAT reach, whatever its weights?

# %% tags=["approx"] approx={"numbers": 0.1, "picture": 0.05}
from attention.experiments.beyond import train_scorer

for name in ("GAT", "GATv2"):
    right, found = train_scorer(name)
    print(f"{name:5s} loss after 300 steps {found:.3f}, right {right} of 2")

# %% [markdown]
# One of two; GATv2 gets both. (GAT's loss of 0.520 is the least it can have, below $\ln2=0.693$: LeakyReLU's slopes of 1 and
# 0.2 let it be sure of the right one and doubtful of the wrong one.) Dot products have no such limit: $q_i\cdot k_j$ ranks anew for each query.
#
# **Trap.** *"GATv2 is GAT with more parameters."* With one matrix $W$ for both, as in GAT, it has fewer: one vector $a$ in place of
# two. The order of vector and LeakyReLU is the difference. (`graph_attention_v2`: Behind the scenes.)
#
# ### 13.3 The edges in CUDA
#
# **How does a GPU read ragged rows?** Sorted by target, the edges of node $i$ stand from `starts[i]` to `starts[i + 1]`
# (compressed sparse rows, lecture 07). One warp takes one node; its 32 lanes take edges `first + lane`, `+ 32` ...

# %%
from attention.kv_cache import WARP  # warp_max and warp_sum, as in lecture 01

# %% [markdown] tags=["slide"]
# #### Exercise 13B: a softmax for each ragged row  (difficulty 3 of 5, useful, 12 minutes)
#
# Write the weights of one node's edges. `warp_max(x)` and `warp_sum(x)` give every lane the largest, or the sum, of the 32
# lanes' numbers.
#
# |name|meaning|
# |---|---|
# |`scores`|`(n_edges,)` float, finite, sorted by target|
# |`first`, `end`|int, this node's edges are `first` to `end - 1`; there may be none|
# |`lane`|int, 0 to 31|
# |`weights`|`(n_edges,)` float, to be written|
#
# Returns nothing. Neighbouring lanes read and write neighbouring edges.
#
# <details><summary>Hint</summary>
#
# Which edge has this lane first, and by how much does it go on? What does a lane without edges bring to the maximum, and what to
# the sum? Three loops, or two and a number that is kept: where does each `warp_` call stand, if all 32 lanes have to come?
#
# </details>

# %% tags=["exercise", "export"] kind="kernel"
SEGMENT_SOFTMAX = WARP + r"""
__global__ void segment_softmax(const float* scores, const int* starts, float* weights,
                                int n_nodes) {
  int lane = threadIdx.x, node = blockIdx.x * blockDim.y + threadIdx.y;
  if (node >= n_nodes) return;                           // the whole warp leaves
  int first = starts[node], end = starts[node + 1];
  // BEGIN SOLUTION
  float maximum = -INFINITY, total = 0.0f;
  for (int e = first + lane; e < end; e += 32)           // load
    maximum = fmaxf(maximum, scores[e]);
  maximum = warp_max(maximum);
  for (int e = first + lane; e < end; e += 32)           // score
    total += expf(scores[e] - maximum);
  total = warp_sum(total);
  for (int e = first + lane; e < end; e += 32)           // write
    weights[e] = expf(scores[e] - maximum) / total;
  // END SOLUTION
}
"""

# %%
SEGMENT_SOFTMAX = check("13B", SEGMENT_SOFTMAX)

# %% [markdown]
# First our graph, then one of 256 nodes with 3 to 64 neighbours: half of them have five or fewer, a few have 64. A dense softmax would
# read a padded row for each node: as long as all 256, or as the largest degree.
#
# *Predict.* How many times as many bytes does padding to the largest degree read?

# %% tags=["slide"]
from attention.beyond import segment_softmax_launch

kernel, launch, given = segment_softmax_launch(of_edges, target, 6)
kernel.check[launch](*given)
by_kernel = given[2].numpy().astype(float)
print("new features of A:", (by_kernel[target == 0] @ features[sees]).round(3))

degrees = np.minimum(64, (3 / np.random.default_rng(1).random(256)).astype(int))
starts = np.repeat(np.arange(256), degrees)
ragged = np.random.default_rng(2).standard_normal(len(starts))
kernel, launch, given = segment_softmax_launch(ragged, starts, 256)
report = kernel.check[launch](*given)
of_scores = sum(row.bytes for row in report.rows
                if row.kind == "load" and row.array == "scores")
read = {"edges": of_scores, "largest degree": 3 * 4 * 256 * int(degrees.max()),
        "all nodes": 3 * 4 * 256 * 256}
for name, count in read.items():
    print(f"{name:15s} {count:8,} bytes of scores, "
          f"{count / of_scores:5.1f} times the edges")
print(f"edges {len(starts):,}, mean degree {degrees.mean():.1f}, "
      f"problems {len(report.problems)}")
plotting.bars({name: count / of_scores for name, count in read.items()},
              ylabel="bytes read, times those of the edges",
              title="A ragged list reads a fraction of what padding reads")
plotting.show("Three bars: the list of edges 1, padding to the largest degree several "
              "times as much, the matrix of all nodes many times as much.")

# %% [markdown]
# Nearly six times; a matrix of all nodes would read 23 times as much. Most lanes of a short row idle, though: 32 lanes for 3 edges.
#
# ## Part 2 · Sets
#
# ### 13.4 Deep Sets: what a sum cannot do
#
# **How does a network read a set?** Deep Sets (Zaheer et al. 2017, arXiv 1703.06114): $\rho\big(\sum_j\phi(x_j)\big)$, the same
# for any order. A sum with continuous $\phi$ and $\rho$ that is to represent *every* continuous function of $n$ numbers needs at
# least $n$ components (Wagstaff et al. 2019, arXiv 1901.09006). An attention pooling replaces the sum: $\sum_jw_j\,\phi(x_j)$, $w$ a softmax.
#
# *Predict.* Largest of 5 numbers, 400 steps: which error (1 = always the mean) has a sum of size 1, 2, 5, 8, and attention of
# size 1?

# %% tags=["slide", "approx"] approx={"numbers": 0.15, "picture": 0.05}
from attention.experiments.beyond import train_pooled

errors = {f"sum of {size}": train_pooled("sum", size)[0] for size in (1, 2, 5, 8)}
errors["attention of 1"], pooled = train_pooled("attention", 1)
for name, error in errors.items():
    print(f"{name:15s} relative error {error:.2f}")
plotting.bars(errors, ylabel="error of the maximum, relative to its spread",
              title="Attention of size 1 finds the maximum, sums of 1 to 8 do not yet")
plotting.show("Five bars: sums of size 1, 2, 5 and 8 have errors between a fifth and "
              "a half, attention of size 1 less than a tenth.")

# %% [markdown]
# Attention wins with one number (0.07): it *chooses*. A sum of 1 cannot represent the maximum exactly: of a small and a large
# number only the large one may count. A sum of 8 can, by the theorem, yet reaches 0.37 after 400 steps, hardly less than the
# 0.42 of size 1: that is training, not a limit. And attention pays for it. Put every element into the set
# twice:
#
# *Predict.* What does the pooled number do: for the sum, for attention?

# %% tags=["approx"] approx={"numbers": 0.1, "picture": 0.05}
once = t(np.random.default_rng(3).uniform(-1, 1, (1, 5)))
twice = torch.cat([once, once], dim=1)
for name, model in (("sum", train_pooled("sum", 8)[1]), ("attention", pooled)):
    with torch.no_grad():
        small, large = (model.pooled(x)[0, 0].item() for x in (once, twice))
    print(f"{name:10s} once {small:6.3f}, twice {large:6.3f}, "
          f"ratio {large / small:.2f}")

# %% [markdown]
# The sum doubles; the average stays. **Attention cannot count**: whoever needs the size of a set adds it as a feature.
#
# %% [markdown] tags=["slide"]
# ### 13.5 The Set Transformer
#
# **How do elements see each other at less than $n^2$?** Lee et al. 2019 (arXiv 1810.00825) make everything from one block
# $\text{MAB}(X,Y)$, in which $X$ asks $Y$:
#
# $$\text{ISAB}(X)=\text{MAB}(X,\text{MAB}(I,X))\qquad \text{PMA}(X)=\text{MAB}(S,X)$$
#
# $I$ are $m$ learned **inducing points**: they gather the set, then each element asks them; $O(nm)$. $S$ are learned seeds: PMA is the
# pooling (in the paper $X$ goes through a small network first). (Perceiver, arXiv 2103.03206, keeps the $m$ and works on.)

# %% tags=["export"]
from attention.multi_head import masked_softmax, merge_heads, split_heads

class SetBlock(nn.Module):
    """MAB: x (batch, n, d_model) asks y (batch, m, d_model). Without layer norms."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        for name in ("w_q", "w_k", "w_v", "w_o", "w_f"):
            first = torch.randn(d_model, d_model) / d_model**0.5
            setattr(self, name, nn.Parameter(first))

    def forward(self, x, y, mask=None):
        """mask (batch, m) boolean: which elements of y are there."""
        q, k, v = (split_heads(a @ w, self.n_heads)
                   for a, w in ((x, self.w_q), (y, self.w_k), (y, self.w_v)))
        seen = None if mask is None else mask[:, None, None]
        weights = masked_softmax(q @ k.mT / math.sqrt(q.shape[-1]), seen)
        h = x + merge_heads(weights @ v) @ self.w_o
        return h + torch.relu(h @ self.w_f)

# %% tags=["export"]
class InducedWeights(nn.Module):
    """m inducing points, and two blocks."""

    def __init__(self, d_model, n_heads, m):
        super().__init__()
        self.points = nn.Parameter(torch.randn(m, d_model))
        self.gather, self.spread = (SetBlock(d_model, n_heads) for _ in range(2))

# %% [markdown]
# #### Exercise 13C: induced attention  (difficulty 2 of 5, essential, 12 minutes; if you do only two)
#
# Write `forward`. The shape contract:
#
# |array|from|shape|
# |---|---|---|
# |`x`|the sets, padded to one size|`(batch, n, d_model)`|
# |`mask`|`True` where an element is there; `None`: all are|`(batch, n)`|
# |`self.points`|the inducing points, the same for each set|`(m, d_model)`|
# |gathered|`self.gather`: the points ask the elements that are there|`(batch, m, d_model)`|
# |spread|`self.spread`: the elements ask what was gathered|`(batch, n, d_model)`|
#
# Returns `(batch, n, d_model)`; zeros where no element is.
#
# <details><summary>Hint</summary>
#
# How does `(m, d_model)` become one set of points for each set of a batch? Which of the two blocks sees padding among its
# keys? Where does padding show itself a second time, and how does `(batch, n)` fit `(batch, n, d_model)`?
#
# </details>

# %% tags=["exercise", "export"] kind="module"
class InducedSetAttention(InducedWeights, nn.Module):
    """ISAB: set attention over m inducing points. Source: Lee et al. 2019."""

    def forward(self, x, mask=None):
        ### BEGIN SOLUTION
        points = self.points.expand(len(x), -1, -1)
        out = self.spread(x, self.gather(points, x, mask))
        return out if mask is None else out * mask[..., None]
        ### END SOLUTION

# %%
InducedSetAttention = check("13C", InducedSetAttention)

# %% [markdown]
# *Predict.* With $n=1{,}024$ and $m=16$: how many scores, against $n^2$? If the elements change places, what changes?

# %% tags=["slide"]
layer = training.initialise(InducedSetAttention(16, 2, 4).double(), 0)
seed = training.initialise(InducedSetAttention(16, 2, 1).double(), 1)  # its PMA
x = t(np.random.default_rng(5).standard_normal((1, 10, 16)))
order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
with torch.no_grad():
    y = layer(x)
    moved = (layer(x[:, order]) - y[:, order]).abs().max()
    pool = [seed.gather(seed.points[None], z)[0, 0] for z in (y, y[:, order])]
    gathered = layer.gather(layer.points[None], x)
print(f"ISAB: rows move with their elements, difference {moved:.6f}")
print(f"PMA:  one row, difference {(pool[0] - pool[1]).abs().max():.6f}")
print(f"scores for n = 1,024: {2 * 1024 * 16:,} with 16 points, {1024**2:,} without")
plotting.flow(
    {"I": layer.points, "X": x[0], "gathered": gathered[0], "ISAB(X)": y[0],
     "S": seed.points, "pooled": pool[0][None]},
    [(("I", "X"), "gathered", "I asks X"), (("X", "gathered"), "ISAB(X)", "X asks"),
     (("S", "ISAB(X)"), "pooled", "S asks: PMA")],
    title="A Set Transformer: points gather, elements ask, a seed pools")
plotting.show("Data flow: inducing points ask the set, the set asks what was gathered, "
              "a seed pools the rows into one.")

# %% [markdown]
# A 32nd. ISAB is **equivariant** (the rows move along), PMA **invariant** (nothing moves): properties that need no reference to be tested.
#
# **Trap.** *"A Set Transformer replaces the sum by ISAB."* ISAB returns $n$ rows; PMA is what stands in place of the sum.
#
# #### Exercise 13D: a test of symmetry  (difficulty 3 of 5, useful, 12 minutes)
#
# Write a function that is given a pooling and notices whether it is one. It is tried on right ones (sums, means,
# attention) and on nine wrong ones; you do not know which features they compute.
#
# |argument|meaning|
# |---|---|
# |`pool`|`pool(x, mask)`: `x` `(batch, n, 8)`, `mask` `(batch, n)` boolean, NumPy, to `(batch, d_out)`; each set has at least one element|
#
# A right one promises: the order of a set does not count; nor do the finite numbers where `mask` is `False`, nor how many of them there are; sets of a
# batch do not mix; each element that is there counts. Single precision is right. Returns nothing; it raises an error
# (`assert ...`) for a wrong one.
#
# <details><summary>Hint</summary>
#
# Which change of `x` and `mask` must leave the result as it is: one for each promise? What has to move with the elements of a set?
# What do you compare for "each element counts", and for how many of them?
#
# </details>

# %% tags=["exercise", "export"] kind="bug"
def test_pooling(pool):
    """Raise AssertionError unless pool(x, mask) is an invariant pooling."""
    ### BEGIN SOLUTION
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((3, 7, 8)), np.ones((3, 7), bool)
    mask[1, 4:], mask[2, ::2] = False, False
    right, order = pool(x, mask), rng.permutation(7)
    same = {
        "order": pool(x[:, order], mask[:, order]),
        "padding's content": pool(np.where(mask[..., None], x, 50.0), mask),
        "more padding": pool(np.pad(x, ((0, 0), (0, 5), (0, 0)), constant_values=2.0),
                             np.pad(mask, ((0, 0), (0, 5)))),
        "alone": np.concatenate([pool(x[i:i + 1], mask[i:i + 1]) for i in range(3)]),
    }
    for name, found in same.items():
        assert np.abs(found - right).max() < 1e-4, name
    for i, j in zip(*np.nonzero(mask)):
        other = x.copy()
        other[i, j] += 1.0
        assert np.abs(pool(other, mask)[i] - right[i]).max() > 1e-4, "an element"
    ### END SOLUTION

# %%
test_pooling = check("13D", test_pooling)

# %% [markdown]
# ## Part 3 · Pictures
#
# ### 13.6 A vision transformer
#
# **What are the tokens of a picture?** Patches. The ViT (Dosovitskiy et al. 2021, arXiv 2010.11929) cuts it into squares,
# projects each one, adds a learned position, and puts a **class token** in front, whose last row is classified. Here: 1,797
# digits of 8 x 8 (scikit-learn's), 16 patches of 2 x 2.

# %% tags=["export"]
def patchify(images, side=2):
    """Squares of a picture, row by row: (batch, H, W) to (batch, patches, side²)."""
    rows, columns = images.shape[1] // side, images.shape[2] // side
    cut = images.reshape(len(images), rows, side, columns, side)
    return cut.swapaxes(2, 3).reshape(len(images), rows * columns, side * side)

# %% [markdown]
# Cutting and projecting is also a convolution with stride 2; the two agree below.
#
# *Predict.* Two layers of width 32, 400 steps: which share of 360 new digits is right? Where does the class token of a 3 look?

# %% tags=["slide", "approx"] approx={"numbers": 0.05, "picture": 0.1}
import matplotlib.pyplot as plt

from attention.experiments.beyond import digits, train_vision

vision, right = train_vision()
images, labels = digits()[1]
kernel = vision.embed.weight.view(32, 1, 2, 2)
by_convolution = nn.functional.conv2d(images[:, None], kernel, vision.embed.bias, 2)
gap = vision.embed(patchify(images)) - by_convolution.flatten(2).mT
print(f"patches against a convolution: difference {gap.abs().max():.6f}")
print(f"{sum(p.numel() for p in vision.parameters()):,} parameters, "
      f"right on new digits {right:.2f} (above 0.90: {right > 0.90})")
with torch.no_grad():
    vision(images)
looks = vision.blocks[-1].weights[:, :, 0, 1:].mean(1)  # (360, 16), class token
ink = patchify(images).mean(-1)
inked = ink > 0.25
mass = (looks * inked).sum(1) / looks.sum(1)
print(f"patches with ink: {inked.double().mean():.2f} of all, "
      f"{mass.mean():.2f} of the class token's attention")
three = int((labels == 3).nonzero()[0])
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
plotting.matrix(images[three], ax=axes[0], label="ink", title="A 3 ...")
plotting.matrix(looks[three].view(4, 4), ax=axes[1], label="attention",
                title="... and where its class token looks")
plotting.show("Left an 8 by 8 picture of a 3, right the attention of the class token "
              "to its 4 by 4 patches in the last layer.")

# %% [markdown]
# More than nine tenths; three quarters of the attention are on the ink, which touches 0.46 of the patches. Yet for this 3 the
# top right patch, with almost no ink, is one of the two most read. Patches have mixed in the first layer, and a blank corner can
# tell a 3 from an 8: a map shows what was read, not why.
#
# ### 13.7 Text asks an image
#
# **Can a word be the query and a picture the keys?** That is cross-attention: queries from a text, keys and values from image
# regions, as in captioning. A 4 x 4 grid of noisy colours; the word is one of six colour names, each grid has that colour once. Keys
# are projected colours, values are learned places; the answer is the place. Nobody says where to look.
#
# *Predict.* How much of the attention is on the right square after 100 steps (chance 0.06)?

# %% tags=["slide", "approx"] approx={"numbers": 0.05, "picture": 0.1}
from attention.experiments.beyond import colour_grids, train_asker

asker, right = train_asker()
word, grid, place = colour_grids(np.random.default_rng(99), 500)
with torch.no_grad():
    asker(word, grid)
found = asker.weights[torch.arange(500), place].mean()
print(f"places right {right:.2f} (above 0.9: {right > 0.9}), "
      f"attention on the right square {found:.2f}")
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
for i, ax in enumerate(axes):
    plotting.matrix(asker.weights[i].view(4, 4), ax=ax, label="attention",
                    title=f"colour {int(word[i])} is on square {int(place[i])}")
plotting.show("Three grids of 4 by 4 squares: in each most of the attention is on "
              "one square, the one whose colour was asked for.")

# %% [markdown]
# Nine tenths on average. The map was never a target: the gradient of the answer made it.
#
# ## Part 4 · A memory that learns
#
# %% [markdown] tags=["slide"]
# ### 13.8 Test-time training and Titans
#
# **Can a state be a model, and reading be training?** The state is a matrix $M$ with the loss $\tfrac12|k_tM-v_t|^2$: each token takes a
# step of gradient descent (test-time training: Sun et al. 2024, arXiv 2407.04620). Titans (Behrouz et al. 2025, arXiv 2501.00663)
# adds momentum $\eta$ and forgetting $\alpha$, and calls the gradient the *surprise*:
#
# $$S_t=\eta S_{t-1}-\theta\,k_t^\top(k_tM_{t-1}-v_t)\qquad M_t=(1-\alpha)M_{t-1}+S_t\qquad o_t=q_tM_t$$
#
# (Both papers also let $M$ be a small network; then the gradient comes from autograd.)
#
# #### Exercise 13E: a gradient step for each token  (difficulty 3 of 5, useful, 10 minutes)
#
# |argument|shape|meaning|
# |---|---|---|
# |`q`, `k`|`(..., n, d)`|queries, keys; tensors|
# |`v`|`(..., n, d_v)`|values|
# |`rate`, `momentum`, `forget`|numbers|θ, η, α; the same for all tokens|
#
# Returns `(out, memory)`: `(..., n, d_v)` and the last $M$ `(..., d, d_v)`. $M$ and $S$ begin as zeros.
#
# <details><summary>Hint</summary>
#
# Which shape has $k_tM$ when $k_t$ is one row: `k[..., i:i + 1, :]`? Is the surprise computed from the old $M$ or from the
# forgotten one? Does $o_t$ see the step of its own token?
#
# </details>

# %% tags=["exercise", "export"] kind="training"
def memory_by_gradient(q, k, v, rate, momentum=0.0, forget=0.0):
    """A linear memory that takes one gradient step for each token, in PyTorch.

    q, k (..., n, d), v (..., n, d_v). Returns out (..., n, d_v), memory (..., d, d_v).
    """
    ### BEGIN SOLUTION
    memory = torch.zeros_like(k[..., :1, :].mT @ v[..., :1, :])
    step, out = torch.zeros_like(memory), []
    for i in range(k.shape[-2]):
        row = k[..., i:i + 1, :]
        surprise = row.mT @ (row @ memory - v[..., i:i + 1, :])
        step = momentum * step - rate * surprise
        memory = (1 - forget) * memory + step
        out.append(q[..., i:i + 1, :] @ memory)
    return torch.cat(out, dim=-2), memory
    ### END SOLUTION

# %%
memory_by_gradient = check("13E", memory_by_gradient)

# %% [markdown]
# *Predict.* Keys of length 1, rate 1, no momentum, no forgetting: which mechanism of lecture 10 is this?

# %% tags=["slide"]
from attention.linear import memory_step

rng = np.random.default_rng(6)
k = rng.standard_normal((12, 8))
k /= np.linalg.norm(k, axis=-1, keepdims=True)
v = rng.standard_normal((12, 4))
state = np.zeros((8, 4))
for i in range(12):
    state = memory_step(state, k[i], v[i], np.ones(1), np.ones(1), True)
_, learned = memory_by_gradient(t(k), t(k), t(v), 1.0)
gap = np.abs(learned.numpy() - state).max()
print(f"largest difference from the delta rule {gap:.6f}")
misses = {}
for name, settings in (("rate 1", (1.0,)), ("rate 0.5", (0.5,)),
                       ("rate 0.5, momentum 0.5", (0.5, 0.5))):
    _, memory = memory_by_gradient(t(k), t(k), t(v), *settings)
    misses[name] = (t(k) @ memory - t(v)).norm(dim=-1).numpy()
    print(f"{name:24s} error of the newest token {misses[name][-1]:.2f}, "
          f"mean of all {misses[name].mean():.2f}")
plotting.curves(misses, x=np.arange(1, 13), xlabel="token, the newest last",
                ylabel="error |kM - v| after reading all",
                title="At rate 1 the newest token is exact, older ones are blurred")
plotting.show("Error of each of 12 tokens after all are read: at rate 1 zero for the "
              "newest, at smaller rates not zero.")

# %% [markdown]
# The **delta rule**, to six decimals: a linear layer that is trained while it reads is a linear attention that corrects
# itself. Twelve keys of 8 numbers cannot all be exact. Rate 1 writes the newest in full over the older ones (0.00, mean 1.76);
# rate 0.5 misses the newest by 0.70 and has the smaller mean, 1.56. Momentum is no gain on these keys without a pattern (1.73).
#
# ## Part 5 · What to read next
#
# ### 13.9 In use: architectures of 2026
#
# **What do this year's models combine?** The cell asks the installed transformers: does the class exist, and what does the *default
# configuration* of its class say (read on 2026-11-29)? A default may differ from a published checkpoint, and a class is no
# proof that weights were published.
#
# *Predict.* In how many of these twelve is every layer the same full attention?

# %% tags=["slide"]
import importlib
from collections import Counter

CLASSES = [
    ("deepseek_v32", "DeepseekV32Indexer", "DeepseekV32Config", "index_topk"),
    ("deepseek_v4", "DeepseekV4Indexer", "DeepseekV4Config", "index_topk"),
    ("minimax_m3_vl", "MiniMaxM3VLIndexer", "MiniMaxM3VLTextConfig", None),
    ("mistral_large4", "MistralLarge4TextIndexer", "MistralLarge4TextConfig", None),
    ("qwen3_next", "Qwen3NextGatedDeltaNet", "Qwen3NextConfig", None),
    ("kimi_linear", "KimiLinearDeltaAttention", "KimiLinearConfig", None),
    ("bailing_hybrid", "BailingHybridDeltaAttention", "BailingHybridConfig", None),
    ("olmo_hybrid", "OlmoHybridGatedDeltaNet", "OlmoHybridConfig", None),
    ("gpt_oss", "GptOssAttention", "GptOssConfig", "sliding_window"),
    ("mimo_v2_flash", "MiMoV2FlashAttention", "MiMoV2FlashConfig", "sliding_window"),
    ("granite_swa", "GraniteSWAAttention", "GraniteSWAConfig", "sliding_window"),
    ("inkling2", "Inkling2BlockAttentionResidual", "Inkling2TextConfig", None),
]
for folder, part, name, field in CLASSES:
    models = f"transformers.models.{folder}."
    config = getattr(importlib.import_module(f"{models}configuration_{folder}"), name)()
    exists = hasattr(importlib.import_module(f"{models}modeling_{folder}"), part)
    kinds = Counter(kind.removesuffix("_attention") for kind in config.layer_types)
    layers = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    found = f", {field} {getattr(config, field)}" if field else ""
    print(f"{part}: {'exists' if exists else 'is missing'}; layers {layers}{found}")

# %% [markdown]
# In one, and there the default hides it: an indexer stands beside 60 "full" layers, and a checkpoint's own file turns it on. Of the
# eight that mix full layers with cheaper ones, three have 3 cheaper to 1 full, two 5:1, one 1:1; the others lie at 3.5 and 4.3.
#
# |idea|class in transformers 5.23.0, or source|lecture|
# |---|---|---|
# |keys are selected by a trained indexer, one by one|`DeepseekV32Indexer`, `MistralLarge4TextIndexer`|07|
# |blocks of keys are selected|`MiniMaxM3VLIndexer`|07|
# |the sequence is compressed, and selected|`DeepseekV4Indexer`|07, 09|
# |linear layers, some full ones|`Qwen3NextGatedDeltaNet`, `KimiLinearDeltaAttention`, `BailingHybridDeltaAttention`, `OlmoHybridGatedDeltaNet`|10|
# |windows, some full layers, learned sinks|`GptOssAttention`, `MiMoV2FlashAttention`, `GraniteSWAAttention`|05, 11|
# |an output gate|`Qwen3NextAttention`|11|
# |attention over depth|`Inkling2BlockAttentionResidual`; arXiv 2603.15031|13.12|
# |a complex state|Mamba-3, arXiv 2603.15569|10|
#
# In each case: the default configuration of that class in transformers 5.23.0, read on 2026-11-29.
#
# ## What you can do now
#
# You can run attention on anything that has elements and a rule who sees whom: edges, sets, patches, words that ask patches. You
# can test such a layer by its symmetries. And you know what it cannot do: GAT cannot choose by query, an average cannot count.

# %% tags=["slide"]
forms = {"by hand": weights_of_a @ features[sees], "edges": out[0],
         "dense": dense[0].numpy(), "kernel": by_kernel[target == 0] @ features[sees]}
plotting.matrix(np.stack(list(forms.values())), list(forms), list(range(3)),
                title="Node A, four ways: one result", xlabel="feature", annotate=True)
plotting.show("Four equal rows of three numbers: the new features of node A by hand, "
              "from the edge list, from the dense matrix and from the kernel.")

# %% [markdown]
# ## Exercises left
#
# 1. Leave the self-loops out of the graph of 13.1. Whose new features change most?
# 2. `train_pooled("sum", 8, steps=4000)`: does the sum catch up?
# 3. Take the positions from the vision transformer (`vision.places.data.zero_()`). How many digits are still right?
# 4. `memory_by_gradient` with forgetting: at which α is the mean error of 13.8 least?

# %% [markdown]
# ## Quiz

# %% [markdown] tags=["quiz"]
# **1.** A graph of 6 nodes and 18 edges, all scores equal. One node sees itself and three others. Which weight has each of
# its edges?
#
# - a) 1/18
# - b) 1/6
# - c) 1/3
# - d) 1/4

# %% tags=["quiz"]
from utils import quiz

looking = np.repeat(np.arange(6), [4, 4, 3, 3, 2, 2])  # who looks, for each of 18 edges
of_each = segment_softmax(np.zeros((18, 1)), looking, 6)[0, 0]
quiz.answer({"a": 1 / 18, "b": 1 / 6, "c": 1 / 3, "d": 1 / 4}, of_each,
            "Its own four edges sum to 1, that to itself is one of them.")

# %% [markdown] tags=["quiz"]
# **2.** In a head of GAT the node A gives B a larger score than C. D also sees B and C. To which of them does D give the larger
# score?
#
# - a) to B
# - b) to C
# - c) it depends on the features of D
# - d) to neither: both scores are equal

# %% tags=["quiz"]
parts_of_d = np.linspace(-9, 9, 1000)  # the query's part of the score; B has 2, C has 1
ahead = leaky_relu(parts_of_d + 2) > leaky_relu(parts_of_d + 1)
quiz.answer({"a": "B", "b": "C", "c": "it depends", "d": "neither"},
            "B" if ahead.all() else "it depends",
            "Each query adds one number to all keys, and LeakyReLU keeps their order.")

# %% [markdown] tags=["quiz"]
# **3.** ISAB with 8 inducing points reads a set of 100 elements. How many rows come out?
#
# - a) 8
# - b) 100
# - c) 1, for the whole set
# - d) 800

# %% tags=["quiz"]
induced = InducedSetAttention(16, 2, 8)
with torch.no_grad():
    rows_out = induced(torch.zeros(1, 100, 16)).shape[1]
quiz.answer({"a": 8, "b": 100, "c": 1, "d": 800}, rows_out,
            "The points gather, then every element asks them. PMA is the pooling.")

# %% [markdown] tags=["quiz"]
# **4.** An attention pooling gives 3.5 for a set of two numbers, 2 and 4. Each number is put into the set three times. What
# does it give now?
#
# - a) 10.5
# - b) 3, the mean
# - c) 1.17
# - d) 3.5

# %% tags=["quiz"]
set_of_2, scores_of_2 = np.array([2.0, 4.0]), np.log([1.0, 3.0])  # weights 1/4 and 3/4
three_times = softmax(np.tile(scores_of_2, 3)) @ np.tile(set_of_2, 3)
quiz.answer({"a": 10.5, "b": 3, "c": 1.17, "d": 3.5}, three_times,
            "An average does not count; a sum would give three times as much.")

# %% [markdown] tags=["quiz"]
# **5.** A memory that takes a gradient step for each token, rate 0.5, no momentum. It reads the same unit key with the value 1
# twice. What does it answer to this key then?
#
# - a) 1, as the delta rule does
# - b) 0.5
# - c) 0.75
# - d) 0.25

# %% tags=["quiz"]
same_key = torch.eye(4).double()[[2, 2]]
read_out, _ = memory_by_gradient(same_key, same_key, torch.ones(2, 1).double(), 0.5)
quiz.answer({"a": 1, "b": 0.5, "c": 0.75, "d": 0.25}, read_out[-1, 0].item(),
            "Each step takes away half of the error: 1, then 0.5, then 0.25.")

# %% [markdown]
# ## Going further
#
# Short sections, each alone, in any order.

# %% [markdown]
# ### 13.10 The Neural Turing Machine
#
# **Can a network learn to use a tape?** The Neural Turing Machine (Graves et al. 2014, arXiv 1410.5401) has a memory of $N$ rows, and
# heads that address it in four steps: by **content** (a softmax of cosine similarities, sharpness β), **interpolated** with the last
# address (gate $g$), **shifted** by −1, 0 or 1 (a convolution), and **sharpened** (power γ).
#
# *Predict.* Shift a slightly blurred address ten times by 1: what does sharpening change? May it come before the shift?

# %% tags=["export"]
def address(memory, last, key, beta, gate, shift, gamma):
    """A head's weights (batch, N); memory (batch, N, M), shift (batch, 3): -1, 0, 1."""
    alike = nn.functional.cosine_similarity(memory, key[:, None], dim=-1)
    w = gate * torch.softmax(beta * alike, dim=-1) + (1 - gate) * last
    w = sum(shift[:, s + 1, None] * w.roll(s, dims=1) for s in (-1, 0, 1))
    w = (w + 1e-12) ** gamma
    return w / w.sum(dim=1, keepdim=True)

# %%
tape, start = torch.zeros(1, 16, 4).double(), torch.eye(16).double()[:1]
shift = torch.tensor([[0.05, 0.05, 0.9]]).double()  # mostly one to the right
for gamma in (1.0, 3.0):
    w = start
    for _ in range(10):
        w = address(tape, w, torch.ones(1, 4).double(), 1.0, 0.0, shift, gamma)
    print(f"sharpening {gamma}: after ten shifts {w[0, 10]:.2f} of it is on row 10")

# %% [markdown]
# Without it the address spreads at each shift; sharpening *after* the shift repairs what the shift blurred. Now the
# copy task: up to 5 rows of four bits, then the same rows are asked for. Trained at lengths 1 to 5, tested at 10.
#
# *Predict.* Which share of bits is right at length 10, after 250 steps (chance 0.5)?

# %% tags=["approx"] approx={"numbers": 0.1, "picture": 0.05}
from attention.experiments.beyond import train_copier

for length, right in train_copier().items():
    print(f"length {length:2d}: {right:.2f} of the bits right")

# %% [markdown]
# It goes on past the lengths of its training: what it learned is a loop (write, step right). That is one seed. Sorting by priority, another of
# the paper's tasks, is out of this lecture's budget and was not tried.
#
# ### 13.11 Memory networks: two hops
#
# **Can one look-up answer "Where is the ball?"** The facts: Mary took the ball; Mary is in the garden; John is in the kitchen. A memory network
# (Sukhbaatar et al. 2015, arXiv 1503.08895) reads, adds what it read to the question, and reads again: $u_{2}=u_1+o_1$.
#
# *Predict.* Which fact gets most weight in each hop?

# %%
names = ["ball", "Mary", "John", "garden", "kitchen"]
ball, mary, john, garden, kitchen = 6 * np.eye(5)
keys = np.stack([ball, mary, john])  # what a fact is about
values = np.stack([mary, garden, kitchen])  # what it says
u = ball
for hop in (1, 2):
    weights = softmax(keys @ u / 6)
    o = weights @ values
    print(f"hop {hop}: weights {weights.round(2)}, read: {names[o.argmax()]}")
    u = u + o - ball * (hop == 1)  # the question is answered: on to what was read

# %% [markdown]
# The first, then the second: an answer over two facts needs two look-ups, and two layers of a transformer are two hops. (The ball is taken out of $u$
# by hand here; in one of the paper's versions a learned matrix stands between the hops, $Hu_1+o_1$.)
#
# ### 13.12 Attention over depth
#
# **Is $x+f(x)$ an attention?** The input of layer $l$ is the sum of all earlier outputs. Attention residuals (arXiv 2603.15031;
# `Inkling2BlockAttentionResidual`) weigh them: one learned query for each layer, keys and values are the earlier outputs. A query of zeros gives
# equal weights: the mean, which is the sum over a number.
#
# *Predict.* Six layers $f(\text{norm}(x))$: do both networks compute the same?

# %%
def rms_norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True))

rng = np.random.default_rng(12)
matrices, x = rng.standard_normal((6, 16, 16)) / 4, rng.standard_normal((3, 16))
stream, blocks, zero_query = x, [x], np.zeros(16)
for matrix in matrices:
    stream = stream + np.tanh(rms_norm(stream) @ matrix)  # the residual stream
    past = np.stack(blocks, axis=1)  # (3, depth, 16)
    mixed = softmax(rms_norm(past) @ zero_query)[:, None] @ past
    blocks.append(np.tanh(rms_norm(mixed[:, 0]) @ matrix))
mean = np.stack(blocks, axis=1).mean(1)
print(f"sum and 7 times the mean: difference {np.abs(stream - 7 * mean).max():.6f}")

# %% [markdown]
# The same: the norm before each layer takes the number away. So from queries of zeros a network with attention over depth
# starts as a residual network, and may learn to skip or to repeat layers. (The class in transformers keeps one state for
# each block of layers, and normalises the values too: it starts as a mean of *normalised* states, which is not the residual sum.)
#
# ### 13.13 Attention with a learned activation: KArAt
#
# **Must it be the exponential?** KArAt (arXiv 2503.10632) replaces the softmax of a vision transformer by functions with learned coefficients
# (Fourier series and others). We fit six frequencies, a cosine and a sine each, to $e^s$ on $[-3,3]$.
#
# *Predict.* How good is the fit at $s=4$?

# %%
def waves(s):
    angles = [j * s * np.pi / 4 for j in range(6)]
    return np.stack([f(angle) for angle in angles for f in (np.cos, np.sin)], -1)

s = np.linspace(-3, 3, 200)
coefficients = np.linalg.lstsq(waves(s), np.exp(s), rcond=None)[0]
inside = np.abs(waves(s) @ coefficients - np.exp(s)).max()
there = float(waves(np.array(4.0)) @ coefficients)
print(f"largest error on [-3, 3]: {inside:.2f}; "
      f"at 4: {there:.0f} in place of {np.exp(4.0):.0f}")

# %% [markdown]
# Within 0.39 inside of what it has seen (where $e^s$ goes up to 20), wrong outside, where a softmax still orders scores. The paper studies pictures; it speaks of a memory explosion, which a version of low
# rank tames, of gains that do not carry over to larger models, and says that it does not mean to challenge the usual activation.
#
# ### 13.14 Transformers with a memory
#
# **What can carry on when a text is longer than the window?** Three ways, a number each. The *Recurrent Memory Transformer* (RMT, arXiv 2207.06881) hands $m$
# memory tokens from segment to segment. The *Memorizing Transformer* (arXiv 2203.08913) keeps old keys as they are (up to 262K tokens in
# the paper) and lets each query find its $k$ nearest. *Infini-attention* (arXiv 2404.07143) adds up old keys and values in one matrix, a linear attention (lecture 10), beside the local softmax.
#
# *Predict.* 16 numbers a key: how well does one matrix give back 8, and how well 64 stored values?

# %%
segment, m, n = 512, 16, 32_768
pairs_rmt, pairs_all = n // segment * (segment + 2 * m) ** 2, n**2
print(f"RMT: {pairs_rmt / pairs_all:.3f} of the scores of {n:,} tokens")
rng = np.random.default_rng(14)
for stored in (8, 64):
    keys = rng.standard_normal((stored, 16))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    values = np.sign(rng.standard_normal((stored, 16)))
    nearest = (keys @ keys.T).argmax(1)  # Memorizing, k = 1
    read = keys @ (keys.T @ values)  # Infini's matrix, without its normaliser
    print(f"{stored:2d} stored: signs right by nearest key "
          f"{(values[nearest] == values).mean():.2f}, by one matrix "
          f"{(np.sign(read) == values).mean():.2f}")

# %% [markdown]
# A list forgets nothing and grows; a matrix stays small and blurs. (A public attempt to repeat Infini-attention reports that it got worse with each compression: Hugging
# Face blog, 2024-08-14.)

# %% [markdown]
# ## Behind the scenes
#
# What the sections above import.

# %% tags=["plumbing"]
import functools

from sklearn.datasets import load_digits

# %% [markdown]
# **A head of GATv2** (13.2), beside the `graph_attention` of 13.1.

# %% tags=["export", "plumbing"]
def graph_attention_v2(h, source, target, w_target, w_source, a):
    """One GATv2 head in NumPy: (new features (n, d), weights (n_edges,)).

    h (n, d_in); source, target (n_edges,), sorted by target; w_target, w_source (d_in, d); a (d,). Source: arXiv 2105.14491.
    """
    features = h @ w_source
    both = (h @ w_target)[target] + features[source]
    return blend_edges(np.where(both > 0, both, 0.2 * both) @ a, features, source, target)

# %% [markdown]
# **The kernel of 13.3**: from scores and targets to a launch.

# %% tags=["export", "plumbing"]
@functools.cache
def segment_softmax_kernel():
    """The kernel, compiled on first use."""
    return cuda.compile(SEGMENT_SOFTMAX, name="segment_softmax")

def segment_softmax_launch(scores, target, n_nodes):
    """What launches the kernel: kernel, (grid, block, shared bytes), arguments. The third argument is the weights.

    scores (n_edges,), target (n_edges,) sorted, both NumPy. ValueError for targets that are not sorted.
    """
    if (np.diff(target) < 0).any():
        raise ValueError("target must be sorted: the kernel reads the edges of a node as one row")
    starts = np.searchsorted(target, np.arange(n_nodes + 1)).astype(np.int32)
    scores = cuda.on_device(scores)[0]
    starts, weights = torch.from_numpy(starts).to(scores.device), torch.zeros_like(scores)
    launch = max(1, -(-n_nodes // 4)), (32, 4), 0
    return segment_softmax_kernel(), launch, (scores, starts, weights, n_nodes)

# %% [markdown]
# **Pooling of 13.4**: the largest of five numbers.

# %% tags=["export", "plumbing"]
class Pooled(nn.Module):
    """rho(pooled phi(x)), x (batch, n) to (batch,); the pooled part has `size` numbers, a sum or attention."""

    def __init__(self, kind, size, width=32):
        super().__init__()
        self.kind = kind
        self.phi = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, size + 1))
        self.rho = nn.Sequential(nn.Linear(size, width), nn.Tanh(), nn.Linear(width, 1))

    def pooled(self, x):
        z = self.phi(x[..., None])
        score, features = z[..., :1], z[..., 1:]
        weights = torch.ones_like(score) if self.kind == "sum" else torch.softmax(score, dim=1)
        return (weights * features).sum(1)

    def forward(self, x):
        return self.rho(self.pooled(x))[:, 0]

# %% tags=["export", "plumbing"]
@functools.cache
def train_pooled(kind, size, n=5, steps=400, seed=0):
    """(error, model): the maximum of n numbers in [-1, 1]; the error relative to the spread of the maximum."""
    rng, model = np.random.default_rng(seed), training.initialise(Pooled(kind, size).double(), seed)
    batches = (torch.from_numpy(rng.uniform(-1, 1, (64, n))) for _ in range(steps))
    training.fit(model, batches, lambda m, x: (m(x) - x.amax(1)).square().mean(), steps, lr=0.01)
    x = torch.from_numpy(np.random.default_rng(9).uniform(-1, 1, (1000, n)))
    with torch.no_grad():
        return float((model(x) - x.amax(1)).square().mean().sqrt() / x.amax(1).std()), model

# %% [markdown]
# **Two queries, two keys** (13.2).

# %% tags=["export", "plumbing"]
class Scorer(nn.Module):
    """Scores (2, 2) of two queries and two keys, one-hot, by GAT or by GATv2."""

    def __init__(self, name, width=8):
        super().__init__()
        self.name, self.target, self.source = name, nn.Linear(2, width), nn.Linear(2, width)
        self.a = nn.Linear(width, 1, bias=False)

    def forward(self, x):
        both = self.target(x)[:, None] + self.source(x)
        inside = self.name == "GATv2"
        scores = self.a(nn.functional.leaky_relu(both, 0.2) if inside else both)[..., 0]
        return scores if inside else nn.functional.leaky_relu(scores, 0.2)

# %% tags=["export", "plumbing"]
@functools.cache
def train_scorer(name, steps=300, seed=0):
    """(how many of two queries prefer their own key, the loss)."""
    model, x = training.initialise(Scorer(name).double(), seed), torch.eye(2).double()
    own = torch.arange(2)
    history = training.fit(
        model, (x for _ in range(steps)), lambda m, x: nn.functional.cross_entropy(m(x), own), steps, lr=0.02
    )
    with torch.no_grad():
        return int((model(x).argmax(1) == own).sum()), history.losses[-1]

# %% [markdown]
# **The vision transformer of 13.6 and the asker of 13.7.**

# %% tags=["export", "plumbing"]
class VisionBlock(nn.Module):
    """Pre-norm attention and feed-forward; keeps its last weights (batch, heads, n, n)."""

    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(2))
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, 2 * d_model), nn.Linear(2 * d_model, d_model)

    def forward(self, x):
        q, k, v = (split_heads(a, self.n_heads) for a in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        self.weights = weights.detach()
        x = x + self.out(merge_heads(weights @ v))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))

# %% tags=["export", "plumbing"]
class VisionTransformer(nn.Module):
    """Scores of 10 digits for pictures (batch, 8, 8): patches of 2 x 2, positions, a class token in front."""

    def __init__(self, d_model=32, n_layers=2, n_heads=4):
        super().__init__()
        self.embed = nn.Linear(4, d_model)
        self.class_token = nn.Parameter(0.1 * torch.randn(1, d_model))
        self.places = nn.Parameter(0.1 * torch.randn(17, d_model))
        self.blocks = nn.ModuleList(VisionBlock(d_model, n_heads) for _ in range(n_layers))
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, 10)

    def forward(self, images):
        x = self.embed(patchify(images))
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))

# %% tags=["export", "plumbing"]
@functools.cache
def digits():
    """((images, labels), (images, labels)): 1,437 to learn and 360 to test; images (n, 8, 8) from 0 to 1."""
    found = load_digits()
    images, labels = torch.from_numpy(found.images / 16), torch.from_numpy(found.target).long()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    return tuple((images[part], labels[part]) for part in (order[:1437], order[1437:]))


@functools.cache
def train_vision(steps=400, seed=0):
    """(model, share of the 360 new digits that are right)."""
    (images, labels), (new, right) = digits()
    rng, model = np.random.default_rng(seed), training.initialise(VisionTransformer().double(), seed)
    batches = (torch.from_numpy(rng.choice(len(labels), 64)) for _ in range(steps))
    training.fit(
        model, batches, lambda m, i: nn.functional.cross_entropy(m(images[i]), labels[i]), steps, lr=0.003
    )
    with torch.no_grad():
        return model, float((model(new).argmax(1) == right).double().mean())

# %% tags=["export", "plumbing"]
class Asker(nn.Module):
    """Scores of 16 places for a word (batch,) and a picture (batch, 16, 3): the word asks, squares are keys."""

    def __init__(self, d_model=16):
        super().__init__()
        self.words, self.keys = nn.Embedding(6, d_model), nn.Linear(3, d_model)
        self.values, self.answer = nn.Parameter(0.1 * torch.randn(16, d_model)), nn.Linear(d_model, 16)

    def forward(self, word, grid):
        scores = (self.keys(grid) @ self.words(word)[:, :, None])[..., 0] / self.keys.out_features**0.5
        weights = torch.softmax(scores, dim=-1)
        self.weights = weights.detach()
        return self.answer(weights @ self.values)


def colour_grids(rng, batch):
    """(word (batch,), grid (batch, 16, 3), place (batch,)): 16 noisy colours, the word's one at one place alone."""
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], float)
    word, place = rng.integers(6, size=batch), rng.integers(16, size=batch)
    squares = (word[:, None] + rng.integers(1, 6, size=(batch, 16))) % 6
    squares[np.arange(batch), place] = word
    grid = colours[squares] + 0.15 * rng.standard_normal((batch, 16, 3))
    return tuple(map(torch.from_numpy, (word, grid, place)))

# %% tags=["export", "plumbing"]
@functools.cache
def train_asker(steps=100, seed=0):
    """(model, share of right places on 500 new pictures)."""
    rng, model = np.random.default_rng(seed), training.initialise(Asker().double(), seed)
    batches = (colour_grids(rng, 64) for _ in range(steps))
    training.fit(model, batches, lambda m, b: nn.functional.cross_entropy(m(b[0], b[1]), b[2]), steps, lr=0.02)
    word, grid, place = colour_grids(np.random.default_rng(99), 500)
    with torch.no_grad():
        return model, float((model(word, grid).argmax(1) == place).double().mean())

# %% [markdown]
# **The machine of 13.10**: one head reads, one writes, a feed-forward controller.

# %% tags=["export", "plumbing"]
class NeuralTuringMachine(nn.Module):
    """Scores of bits (batch, n, bits) for rows (batch, n, bits + 2); a memory of 16 rows of 8 numbers."""

    def __init__(self, bits=4, rows=16, width=8, hidden=32):
        super().__init__()
        self.rows, self.width = rows, width
        self.controller = nn.Linear(bits + 2 + width, hidden)
        self.heads = nn.Linear(hidden, 2 * (width + 6) + 2 * width)
        self.out = nn.Linear(hidden + width, bits)

    def moved(self, memory, last, said):
        """The new address of a head from what the controller said, (batch, width + 6)."""
        key, rest = said.tensor_split([self.width], dim=1)
        beta, gamma = nn.functional.softplus(rest[:, :1]), 1 + nn.functional.softplus(rest[:, 5:])
        gate, shift = torch.sigmoid(rest[:, 1:2] - 2), torch.softmax(rest[:, 2:5], dim=1)
        return address(memory, last, torch.tanh(key), beta, gate, shift, gamma)

    def forward(self, x):
        memory, read, outs = x.new_full((len(x), self.rows, self.width), 0.01), x.new_zeros(len(x), self.width), []
        reads = writes = torch.eye(self.rows, dtype=x.dtype)[:1].expand(len(x), -1)
        cuts = [self.width + 6, 2 * (self.width + 6), 3 * self.width + 12]
        for row in x.unbind(1):
            hidden = torch.tanh(self.controller(torch.cat([row, read], dim=1)))
            to_read, to_write, erase, add = self.heads(hidden).tensor_split(cuts, dim=1)
            reads, writes = self.moved(memory, reads, to_read), self.moved(memory, writes, to_write)
            memory = memory * (1 - writes[..., None] * torch.sigmoid(erase)[:, None])
            memory = memory + writes[..., None] * torch.tanh(add)[:, None]
            read = (reads[:, None] @ memory)[:, 0]
            outs.append(self.out(torch.cat([hidden, read], dim=1)))
        return torch.stack(outs, dim=1)

# %% tags=["export", "plumbing"]
def copies(rng, batch, n, bits=4):
    """(x (batch, 2 n + 1, bits + 2), y (batch, n, bits)): n random rows, a mark, n times the wish to hear them."""
    y, x = rng.integers(2, size=(batch, n, bits)).astype(float), np.zeros((batch, 2 * n + 1, bits + 2))
    x[:, :n, :bits], x[:, n, bits], x[:, n + 1 :, bits + 1] = y, 1, 1
    return torch.from_numpy(x), torch.from_numpy(y)

# %% tags=["export", "plumbing"]
@functools.cache
def train_copier(steps=250, seed=0):
    """Trained at lengths 1 to 5: {length: share of right bits} at 5 and at 10."""
    rng, model = np.random.default_rng(seed), training.initialise(NeuralTuringMachine().double(), seed)
    batches = (copies(rng, 16, int(rng.integers(1, 6))) for _ in range(steps))

    def answers(model, x, y):
        return model(x)[:, -y.shape[1] :]

    training.fit(
        model,
        batches,
        lambda m, b: nn.functional.binary_cross_entropy_with_logits(answers(m, *b), b[1]),
        steps,
        lr=0.01,
    )
    found = {}
    for n in (5, 10):
        x, y = copies(np.random.default_rng(9), 100, n)
        with torch.no_grad():
            found[n] = float(((answers(model, x, y) > 0) == y.bool()).double().mean())
    return found

# %% [markdown]
# ## Glossary
#
# |term|what it is|
# |---|---|
# |attention over depth|a layer's input as a weighted mean of earlier layers' outputs|
# |class token|a learned row in front of the patches, whose last state is classified|
# |Deep Sets|a sum over elements between two networks|
# |equivariant, invariant|the result moves with the elements; the result stays|
# |GAT, GATv2|attention over the edges of a graph, with LeakyReLU behind or before the learned vector|
# |inducing points|learned rows that gather a set, so that no element asks all others|
# |ISAB, MAB, PMA|induced attention, its block, pooling by learned seeds|
# |NTM|Neural Turing Machine: heads that address a memory by content and by place|
# |patch|a square of a picture, taken as a token|
# |segment softmax|a softmax for each group of entries in one list|
# |surprise|in Titans the gradient of the memory's loss for a token|
# |test-time training|a state that is a model, trained by gradient steps while it reads|
#
# ## Sources
#
# Veličković et al. 2018, GAT (arXiv 1710.10903) · Brody et al. 2022, GATv2 (2105.14491) · Zaheer et al. 2017, Deep Sets (1703.06114) · Wagstaff et al.
# 2019 (1901.09006) · Lee et al. 2019, Set Transformer (1810.00825) · Jaegle et al. 2021, Perceiver (2103.03206) · Dosovitskiy et al. 2021, ViT
# (2010.11929) · Sun et al. 2024, test-time training (2407.04620) · Behrouz et al. 2025, Titans (2501.00663) · Graves et al. 2014, NTM (1410.5401) ·
# Sukhbaatar et al. 2015, memory networks (1503.08895) · AttnRes 2026 (2603.15031) · KArAt 2025 (2503.10632) · Bulatov et al. 2022, RMT (2207.06881) ·
# Wu et al. 2022, Memorizing Transformers (2203.08913) · Munkhdalai et al. 2024, Infini-attention (2404.07143) · transformers 5.23.0.
