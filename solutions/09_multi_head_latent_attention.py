# ---
# jupyter:
#   course:
#     edition: 2
#     experiments:
#     - EncoderLayer
#     - encoder_layer
#     - encoder_inputs
#     - layer_inputs
#     - with_weights
#     - MultiQueryAttention
#     - train_reader
#     - held_out_loss
#     - bigram_loss
#     module: latent
#     public:
#     - latent_decode_attention_numpy
#     - latent_decode_attention_torch
#     - latent_decode_attention_cuda
#     - MultiHeadLatentAttention
#     - LatentCache
#     - joint_latent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["slide"]
# # Lecture 09 · Multi-head latent attention
#
# **The question.** What is the least that a cache must hold? **You will be able to** *compress* keys and values into one
# latent (9A), *build* the layer and its decoupled rotation (9B), *decode* without making a key (9C), *test* it
# (9D), *put* it into a real model (9E), *count* its bytes in CUDA (9F). **You need** attention (lecture 01),
# heads (lecture 02), RoPE (lecture 03), caches (lecture 05), an SVD.
#
# | part or section | core minutes | more minutes |
# |---|---|---|
# | Part 1 · a cache of 768 numbers: 9.1, 9.2, exercise 9A | 40 | |
# | Part 2 · the mechanism: 9.3, 9.4, exercises 9B, 9C | 68 | |
# | Part 3 · made right: 9.5, 9.6, exercise 9D | 42 | |
# | Part 4 · CUDA: 9.7 | 16 | |
# | Part 5 · does it matter: 9.8, 9.9 | 14 | |
# | Another day: exercises 9E, 9F | | 40 |
# | Going further: 9.10 to 9.14 | | 60 |
# | **together** | **180** | **100** |
#
# **An exercise:** write in place of `raise NotImplementedError`, run the cell, then its `check`. Predict first.

# %% [markdown] tags=["teacher"]
# **For the teacher: two times 50 minutes, ten to spare in each.** Run everything before class.
#
# - *Hour 1 (40).* What the 768 numbers are (4) · 9.1: how many directions, the figure (7) · 9.2: the SVD of the data, not
#   of the weights; what 9A asks (6) · 9.2: the real model's figure (3) · 9.3: brackets moved, the same weight again (7) · 9.3: two
#   positions that break it, the rank (6) · 9.3: the flow figure, what 9B asks (7).
# - *At home after hour 1.* 9A, 9B.
# - *Hour 2 (40).* 9.4: bytes, then the break-even (9) · 9.4: what 9C asks (3) · 9.5: the test that cannot fail (7) · 9.6: three
#   heads of a real model as one latent (4) · 9.6: several devices (3) · 9.7: one pass for all heads, the ridge (8) · 9.8: the
#   bars, as measured (6).
# - *At home after hour 2.* 9C, 9D. For volunteers 9E, 9F.
# - *Board.* $q_i(c_jW_{UK})^\top=(q_iW_{UK}^\top)c_j^\top$, the bracket moved; under it the shapes.
# - *Always works.* After 9.3: let the class name a latent size r from 1 to 384 (384: 0.68, 100: 0.65, 10: 0.18), then print
#   `attend(x @ rebuilt(r, texts)[0], x @ w_v)[0][1, it, animal]`.
# - *Checkpoint 1.* A cache of x itself is half as large as keys and values here. What would it cost? (New keys from all of x
#   at each step, or absorption: the latent of 384 is just that.) *Checkpoint 2.* Which scale has a key of 128 + 64
#   columns that is computed from 576? ($1/\sqrt{192}$.)
# - *Skip first.* The real model in 9.2 and the devices of 9.6 (6 minutes): both read well at home.
# - *Questions that come.* Is this LoRA? The same shape of matrices, but nothing is frozen, and the product is the layer. Why
#   does training not absorb? Section 9.4: with many queries expanding is cheaper.

# %%
import math
import os
import sys

sys.path.insert(0, "." if os.path.exists("course.py") else "..")

import numpy as np
import torch
from torch import nn

from utils import cuda, data, plotting, training
from utils.check import check

torch.set_num_threads(1)  # tiny models: one thread is fastest

# %% [markdown]
# ## Part 1 · A cache of 768 numbers
#
# In lecture 01 *it* put 0.68 of its attention on *animal* (MiniLM, layer 3). With 12 heads of 32 a cache keeps
# $2\cdot12\cdot32=768$ numbers a token, all made from one vector $x$ of 384.
#
# *Predict.* Are 768 numbers needed?

# %% tags=["first-attention", "slide"]
from attention.experiments.latent import encoder_layer
from attention.fundamentals import softmax

tired = "The animal didn't cross the street because it was too tired."
layer = encoder_layer(tired, layer=3)
x, w_k, w_v = layer.x, layer.w_k, layer.w_v  # (16, 384), (384, 384), (384, 384)
it, animal = layer.tokens.index("it"), layer.tokens.index("animal")
q = layer.queries  # (12, 16, 32)

def by_head(rows):  # (n, 12 * 32) -> (12, n, 32)
    return rows.reshape(len(rows), 12, 32).swapaxes(0, 1)

def attend(k, v):  # weights (12, 16, 16) and outputs (12, 16, 32)
    weights = softmax(q @ by_head(k).swapaxes(1, 2) / math.sqrt(32))
    return weights, weights @ by_head(v)

weights, out = attend(x @ w_k, x @ w_v)
print(f"it -> animal {weights[1, it, animal]:.2f}, first output {out[1, it, 0]:.3f}")
print("numbers a token: x", x.shape[1], " keys", w_k.shape[1], " values", w_v.shape[1])

# %% [markdown]
# No: $x$ itself has half of them, and everything else can be made again from it. (The biases of keys and values are left
# out here: one adds the same number to a whole row of scores, the other the same vector to each output.) The same 0.68 will
# come out of a smaller cache, without keys, in PyTorch and from a kernel. Can it be smaller than 384?
#
# ### 9.1 Latent space fundamentals
#
# **How many numbers does a key need?** Take the keys of 4,550 tokens of other texts, one a row. Their **singular values**
# $\sigma_1\ge\sigma_2\ge\dots$ say how far the rows spread along the best directions; $\sum_{i\le r}\sigma_i^2$ over the sum
# of all is the share of their **energy** that $r$ directions hold.
#
# *Predict.* How many directions hold nine tenths of the keys' energy: 30, 100 or 300? And of the values'? And of the
# weights $[W_K\,W_V]$ themselves, which have never seen a text?

# %% tags=["slide"]
from attention.experiments.latent import encoder_inputs

texts = encoder_inputs(layer=3)  # (4550, 384): what enters layer 3, other texts
both = np.concatenate([w_k, w_v], axis=1)  # (384, 768)
shares = {}
for name, matrix in (("keys", texts @ w_k), ("values", texts @ w_v),
                     ("keys and values", texts @ both), ("weights alone", both)):
    energy = np.linalg.svd(matrix, compute_uv=False) ** 2
    shares[name] = np.cumsum(energy)[:384] / energy.sum()
    print(f"{name:16s} 90 % in {(shares[name] < 0.9).sum() + 1:3d} directions "
          f"of {matrix.shape[1]}")
plotting.curves(shares, x=np.arange(1, 385), xlabel="directions $r$",
                ylabel="share of the energy", threshold=0.9,
                threshold_name="nine tenths",
                title="Keys and values of texts lie in few directions, weights do not")
plotting.show("Share of the energy against the number of directions: keys rise "
              "fastest, then both together, then values; the weights alone rise "
              "slowly.")

# %% [markdown]
# 43 directions for the keys, 90 for the values, 70 for both together, of 768. The weights look as if nothing could be
# saved: what is small is the space that *real inputs* fill. A vector of such coordinates, from which keys and values are
# made when needed, is a **latent**, $c=xW_{DKV}$, with $W_{DKV}$ of shape $(d_\text{model}, d_c)$ (D: down, U: up):
#
# $$k\approx c\,W_{UK}\qquad v\approx c\,W_{UV}$$
#
# ### 9.2 Dimensionality reduction: which latent is best?
#
# **Which $r$ directions should be kept?** For a matrix $M=U\Sigma V^\top$ the best approximation of rank $r$ keeps the $r$
# largest singular values (Eckart and Young 1936): $M V_rV_r^\top$, with $V_r$ the first $r$ columns of $V$; the error is
# $\sqrt{\sum_{i>r}\sigma_i^2}$. A check with a matrix that can be looked at:

# %%
grid = np.outer([1, 2, 3], [1, 1, 0]) + 0.1 * np.outer([3, 0, -1], [1, -1, 1])
u, sigma, vt = np.linalg.svd(grid)
one = grid @ vt[:1].T @ vt[:1]  # the best of rank 1
print("singular values", np.round(sigma, 3))
print(f"error of rank 1: {np.linalg.norm(grid - one):.3f}, from the singular values "
      f"{np.sqrt((sigma[1:] ** 2).sum()):.3f}")

# %% [markdown]
# #### Exercise 9A: one latent for keys and values  (difficulty 3 of 5, useful, 15 minutes)
#
# Find the latent that loses least of keys *and* values together. Put $W=[W_K\,W_V]$. Without inputs, $M=W$ is to be
# approximated; with inputs `x`, $M=xW$, the keys and values that really occur. In both cases $V_r$ has the best directions, and
# $W_{DKV}=WV_r$, $[W_{UK}\,W_{UV}]=V_r^\top$.
#
# |argument|shape|meaning|
# |---|---|---|
# |`w_k`, `w_v`|`(d_model, d_k)`, `(d_model, d_v)`|all heads side by side|
# |`d_latent`|int|$r$, at most the rank of $M$|
# |`x`|`(n, d_model)` or `None`|inputs to be good for|
#
# Returns `(w_dkv, w_uk, w_uv)` of the shapes `(d_model, d_latent)`, `(d_latent, d_k)`, `(d_latent, d_v)`. Only the products
# `w_dkv @ w_uk` and `w_dkv @ w_uv` are compared: any basis of the latent is right.
#
# <details><summary>Hint</summary>
#
# `np.linalg.svd(M, full_matrices=False)` gives `u, sigma, vt`: are the directions the rows or the columns of `vt`? Of which
# matrix is the SVD taken, and which one is multiplied by $V_r$? Where do the columns of the keys end?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def joint_latent(w_k, w_v, d_latent, x=None):
    """Factors (w_dkv, w_uk, w_uv) of the best joint latent of keys and values.

    w_k (d_model, d_k), w_v (d_model, d_v), d_latent at least 1; x (n, d_model) are
    inputs whose keys and values are to be kept, None weighs all directions alike.
    Raises ValueError for weights that do not fit. Source: Eckart and Young 1936.
    """
    if w_k.ndim != 2 or w_v.ndim != 2 or len(w_k) != len(w_v) or d_latent < 1:
        raise ValueError("w_k and w_v must be (d_model, columns) with one d_model, and "
                         f"d_latent at least 1, got {w_k.shape}, {w_v.shape} and "
                         f"{d_latent}")
    ### BEGIN SOLUTION
    both = np.concatenate([w_k, w_v], axis=1)
    _, _, vt = np.linalg.svd(both if x is None else x @ both, full_matrices=False)
    best = vt[:d_latent]
    return both @ best.T, best[:, :w_k.shape[1]], best[:, w_k.shape[1]:]
    ### END SOLUTION

# %%
joint_latent = check("9A", joint_latent)

# %% [markdown]
# Three ways to spend the same numbers in the cache: one latent made from the weights alone, one made from data, and two
# separate latents, half the size each, for keys and for values.
#
# *Predict.* Which one loses least of the layer's output on our sentence?

# %% tags=["slide"]
def rebuilt(r, x=None):
    """Rank-r versions of w_k and w_v from one latent."""
    w_dkv, w_uk, w_uv = joint_latent(w_k, w_v, r, x)
    return w_dkv @ w_uk, w_dkv @ w_uv

def apart(r):
    """The same with half the rank each, in two latents."""
    nothing = np.zeros((384, 0))
    return [np.matmul(*joint_latent(w, nothing, r // 2, texts)[:2]) for w in (w_k, w_v)]

ways = {"joint, from data": lambda r: rebuilt(r, texts),
        "separate, from data": apart, "joint, weights alone": rebuilt}
ranks, errors = [384, 256, 192, 128, 64], {}
for name, way in ways.items():
    found = [attend(x @ w[0], x @ w[1]) for w in map(way, ranks)]
    errors[name] = [np.linalg.norm(o - out) / np.linalg.norm(out) for _, o in found]
    print(f"{name:20s} it -> animal",
          *(f" {r}: {p[1, it, animal]:.2f}" for r, (p, _) in zip(ranks, found)))
plotting.curves(errors, x=ranks, xlabel="numbers in the cache for each token (of 768)",
                ylabel="relative error of the 12 heads",
                title="One latent from data loses least, down to a sixth of the cache")
plotting.show("Relative error against the size of the latent, three curves falling "
              "to the right: the joint latent from data lies lowest down to 128 and "
              "reaches zero at 384.")

# %% [markdown]
# Half of the 768 is free: 384 is the width of $x$. At a quarter, 0.69 in place of 0.68 for our word, but the layer's output
# is off by more than a third: nothing was trained for it. One shared latent beats two, because keys and values of a
# token say similar things; that is the paper's reason for a *joint* compression. (Below a sixth of the cache all three are
# bad, and their order means little.)
#
# Now a real language model. SmolLM2 has 3 heads of keys and values for its 9 query heads (lecture 08), so GQA has
# already taken two thirds. Your function makes latents for all 30 layers from 512 tokens of one text; then the loss on
# another.
#
# *Predict.* What does a latent of half the remaining cache, 192 of 384 numbers, cost: 0.05, 0.5 or 5 nats a token?

# %% tags=["language-model"]
from attention.experiments.latent import layer_inputs, with_weights
from utils import language_model

smollm = language_model.load()

def from_latent(w_k, w_v, r, x=None):
    """w_k and w_v of the model, rebuilt from one latent of r numbers."""
    w_k, w_v = (w.double().numpy() for w in (w_k, w_v))
    w_dkv, w_uk, w_uv = joint_latent(w_k, w_v, r, x)
    return [torch.from_numpy(w_dkv @ up).float() for up in (w_uk, w_uv)]

def from_two(w_k, w_v, r, x):
    """The same with half of the numbers for each, in latents of their own."""
    return [from_latent(w, w[:, :0], r // 2, x)[0] for w in (w_k, w_v)]

# %% tags=["language-model", "slide"]
if smollm:
    inputs = layer_inputs(smollm, language_model.excerpt(smollm, 512, of="course"))
    prose = language_model.excerpt(smollm, 256)
    right = smollm.losses(prose).mean()
    sizes, extra = [256, 192, 128], {}
    for name, make, given in (("joint, from data", from_latent, inputs),
                              ("separate, from data", from_two, inputs),
                              ("joint, weights alone", from_latent, [None] * 30)):
        extra[name] = [
            float(with_weights(smollm, lambda i, w_k, w_v: make(w_k, w_v, r, given[i]))
                  .losses(prose).mean() - right) for r in sizes]
        print(f"{name:20s}", *(f" {r}: +{e:.2f}" for r, e in zip(sizes, extra[name])))
    plotting.curves(extra, x=sizes, xlabel="numbers in the cache, a layer (of 384)",
                    ylabel="loss above the model's own (nats)",
                    title="A real model: data choose a far better latent")
    plotting.show("Extra loss against the size of the latent: from weights alone over "
                    "four nats at 128, two latents from data 2.1, one from data 1.5.")

# %% [markdown]
# Nearly half a nat for half, untrained: converting is possible, not free, and far from the 93 % that DeepSeek-V2 reports
# (9.10). Two latents of half the size each cost more than twice as much, the SVD of the weights alone several times. So
# MLA does not squeeze finished weights: it is **trained** through its latent.
#
# %% [markdown] tags=["slide"]
# ## Part 2 · The mechanism
#
# ### 9.3 Query and key transformations: absorption
#
# **If the cache holds latents, must the keys be made again at each step?** A score is a product of three things, and brackets
# may be moved:
#
# $$s_{ij}=q_i\,(c_jW_{UK})^\top=(q_i\,W_{UK}^\top)\,c_j^\top\qquad
#   o_i=\sum_jp_{ij}\,(c_jW_{UV})=\Big(\sum_jp_{ij}\,c_j\Big)W_{UV}$$
#
# On the right the query moves into the latent space *once*, and meets the cache as it lies there. The output is a blend of
# latents, and comes back once. $W_{UK}$ has been **absorbed** into the query, $W_{UV}$ into the output. For all 12 heads the
# keys *and* the values are now the same $c$: attention with one shared key and value head (MQA) of width $d_c$.
#
# *Predict.* Latents of 384 numbers lose nothing. Which weight does "animal" get, when no key is ever made?

# %% tags=["slide"]
w_dkv, w_uk, w_uv = joint_latent(w_k, w_v, 384, texts)
c = x @ w_dkv  # (16, 384): the cache
up_k = w_uk.reshape(384, 12, 32).swapaxes(0, 1)  # (12, 384, 32)
up_v = w_uv.reshape(384, 12, 32).swapaxes(0, 1)

q_latent = q @ up_k.swapaxes(1, 2)  # (12, 16, 384): queries in the latent space
p = softmax(q_latent @ c.T / math.sqrt(32))  # the scale is that of the key not made
blend = p @ c  # (12, 16, 384): blends of latents
absorbed_out = blend @ up_v  # (12, 16, 32)
print(f"it -> animal {p[1, it, animal]:.2f}, first output {absorbed_out[1, it, 0]:.3f}")
print(f"largest difference to keys and values {np.abs(absorbed_out - out).max():.6f}")

# %% tags=["slide"]
plotting.flow(
    {"x": x, "c": c, "q": q, "q in latents": q_latent, "weights": p,
     "blend of c": blend, "out": absorbed_out},
    [("x", "c", "W_DKV"), ("x", "q", "W_Q"), ("q", "q in latents", "W_UKᵀ"),
     (("q in latents", "c"), "weights", "softmax(· cᵀ / √32)"),
     (("weights", "c"), "blend of c", "weights · c"), ("blend of c", "out", "W_UV")],
    title="Absorbed: the cache c is key and value of all heads")
plotting.show("Data flow: x gives the latents c and the queries; queries go through "
              "the transposed up-projection, meet c, blend c, and come back through "
              "W_UV.")

# %% [markdown]
# The same 0.68, and the same output to six decimals.
#
# **Trap.** *"During decoding, the compressed keys and values are projected up again."* They need not be, and that is the
# point. The product $W_QW_{UK}^\top$ need not be formed either (per head it would be larger than its two factors): what
# matters is the order of the brackets.
#
# #### What a rotation does to it
#
# Language models rotate queries and keys by their positions (RoPE, lecture 03): $q_i$ becomes $q_iR_i$. Then the score has
# a matrix in its middle, $q_i\,R_{i-j}\,W_{UK}^\top c_j^\top$, with $R_{i-j}=R_iR_j^\top$. Can the query absorb that?
#
# *Predict.* One query, two cached tokens at distances 1 and 2. Is there one vector that gives both scores with the cached
# $c_j$?

# %% tags=["slide"]
from attention import apply_rope_numpy, rope_frequencies

frequencies, _ = rope_frequencies(32)

def moved(rows, distance):
    """Turn rows (n, 32) by so many positions."""
    return apply_rope_numpy(rows, np.full(len(rows), distance), frequencies)

query = q[1, it][None]
one_step, two_steps = (moved(query, d) @ up_k[1].T for d in (1, 2))  # what to absorb
true = moved(query, 2) @ (c[animal] @ up_k[1])[:, None]
print(f"score at distance 2: {true.item():.2f}, with the query of distance 1: "
      f"{(one_step @ c[animal]).item():.2f}, with its own: "
      f"{(two_steps @ c[animal]).item():.2f}")

# %% [markdown]
# There is not: each distance needs an absorbed query of its own, one for each cached token, and that is as much work as making
# the keys. Caching *rotated* latents is no way out either: the rotation acts on keys, behind $W_{UK}$.
#
# Is it at least possible to compress the rotated keys? On the real model: the directions that hold nine tenths of the
# keys' energy, before and after the rotation, on 255 tokens.
#
# *Predict.* Does a rotation, which changes no length, change the rank?

# %% tags=["language-model", "slide", "approx"] approx={"numbers": 0.05, "picture": 0.02}
from utils.language_model.model import rotate

def directions(rows):
    """How many directions hold nine tenths of the energy of rows (n, columns)."""
    energy = torch.linalg.svdvals(rows.double()) ** 2
    return int((energy.cumsum(0) / energy.sum() < 0.9).sum()) + 1

if smollm:
    counts = {"keys before": [], "keys after": [], "values": []}
    for block, seen in zip(smollm.blocks, layer_inputs(smollm, prose)):
        rows = torch.from_numpy(seen[1:]).float()  # without token 0, lecture 05
        keys, places = rows @ block.attention.w_k, torch.arange(1, len(rows) + 1)
        turned = rotate(keys.view(1, -1, 3, 64).transpose(1, 2), places, 1e5)
        counts["keys before"].append(directions(keys))
        turned = turned.transpose(1, 2).reshape(keys.shape)
        counts["keys after"].append(directions(turned))
        counts["values"].append(directions(rows @ block.attention.w_v))
    means = {name: float(np.mean(found)) for name, found in counts.items()}
    print("mean over 30 layers, of 192:", *(f" {k} {v:.0f}" for k, v in means.items()))
    plotting.curves({k: np.array(v) for k, v in counts.items()}, xlabel="layer",
                    ylabel="directions for nine tenths of the energy",
                    title="On average the rotation triples the rank of "
                          "a real model's keys")
    plotting.show("Directions against the layer: keys before the rotation near seven, "
                  "after it near twenty, values about fifty.")

# %% [markdown]
# It does: tokens at different positions are turned by different angles, so one direction becomes many. The rotation breaks
# absorption, and triples the rank of what is to be compressed.
#
# #### Decoupled RoPE
#
# **How can positions be told without touching the latent?** DeepSeek-V2's answer: give each head a few columns more, for
# the rotation alone. The queries' $q^R$ are a head's own; the key $k^R$ is **one for all heads**, and is cached beside the latent:
#
# $$s_{ij}=\frac{q^C_i\cdot k^C_j+q^R_i\cdot k^R_j}{\sqrt{d_h+d_h^R}}\qquad
#   k^C_j=c_jW_{UK}\qquad k^R_j=\text{RoPE}(x_jW_{KR},j)\qquad q^R_i=\text{RoPE}(x_iW_{QR},i)$$
#
# A token's cache is $d_c+d_h^R$ numbers. The latent goes through an RMSNorm before it is cached; $k^R$ does not. These are the weights:

# %% tags=["export"]
class LatentWeights(nn.Module):
    """The weights of multi-head latent attention, in the letters of arXiv 2405.04434.

    d_query: the width of the queries' own latent; None makes queries from x directly.
    positions: what rotates (Rotary(d_rope) by default); scale: of the scores.
    """

    def __init__(self, d_model, n_heads, d_head, d_latent, d_rope, d_query=None,
                 d_v=None, positions=None, scale=None):
        super().__init__()
        d_v, d_in = d_v or d_head, d_query or d_model
        self.n_heads = n_heads
        self.scale = (d_head + d_rope) ** -0.5 if scale is None else scale
        self.positions = Rotary(d_rope) if positions is None else positions
        nope, rope, value = n_heads * d_head, n_heads * d_rope, n_heads * d_v
        shapes = {"w_dkv": (d_model, d_latent), "w_kr": (d_model, d_rope),
                  "w_uk": (d_latent, nope), "w_uv": (d_latent, value),
                  "w_uq": (d_in, nope), "w_qr": (d_in, rope), "w_o": (value, d_model)}
        for name, (rows, columns) in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(rows, columns) * rows**-0.5))
        self.norm_kv = nn.RMSNorm(d_latent, eps=1e-6)
        if d_query:
            self.w_dq = nn.Parameter(torch.randn(d_model, d_query) * d_model**-0.5)
            self.norm_q = nn.RMSNorm(d_query, eps=1e-6)

# %% [markdown] tags=["slide"]
# #### Exercise 9B: latent attention with decoupled RoPE  (difficulty 4 of 5, essential, 25 minutes; if you do only two)
#
# Write the two methods. `project` makes queries, latent and shared key; `forward` expands the latent to keys and values of each
# head and attends, causally. The shape contract:
#
# |array|from|shape|
# |---|---|---|
# |`q_nope`, `q_rope`|`w_uq`, `w_qr` applied to $x$; the second rotated|`(batch, n_heads, n, d_head)`, `(..., d_rope)`|
# |`c_kv`|`w_dkv`, then `norm_kv`|`(batch, n, d_latent)`|
# |`k_rope`|`w_kr`, then rotated|`(batch, n, d_rope)`|
# |keys, values|`c_kv @ w_uk`, `c_kv @ w_uv`, split into heads|`(batch, n_heads, n, ...)`|
#
# `self.positions.rotate(a, positions)` rotates an array `(batch, heads, n, d_rope)`; `split_heads(a, n_heads)` and
# `merge_heads` are those of lecture 02. Returns `(batch, n, d_model)`.
#
# <details><summary>Hint</summary>
#
# How many heads has the shared key, and which axis must be there before it can be rotated? Two products are added before the
# scale, the mask and the softmax: which? Which numbers are under the root, and where does `self` keep it?
#
# </details>

# %%
from attention.kv_cache import check_sizes
from attention.multi_head import masked_softmax, merge_heads, split_heads
from attention.rotary import Rotary

# %% tags=["exercise", "export"] kind="module"
class LatentAttention(LatentWeights, nn.Module):
    """Multi-head latent attention, expanded: x (batch, n, d_model) to the same, causal.

    Source: DeepSeek-AI 2024 (arXiv 2405.04434), § 2.1, equations 9 to 19.
    """

    def project(self, x, positions):
        """(q_nope, q_rope, c_kv, k_rope) of x at positions (n,); shapes as in 9B."""
        c_q = self.norm_q(x @ self.w_dq) if hasattr(self, "w_dq") else x
        ### BEGIN SOLUTION
        q_nope, q_rope = (split_heads(c_q @ w, self.n_heads)
                          for w in (self.w_uq, self.w_qr))
        k_rope = self.positions.rotate((x @ self.w_kr)[:, None], positions)[:, 0]
        q_rope = self.positions.rotate(q_rope, positions)
        return q_nope, q_rope, self.norm_kv(x @ self.w_dkv), k_rope
        ### END SOLUTION

    def forward(self, x):
        positions = torch.arange(x.shape[1], device=x.device)
        ### BEGIN SOLUTION
        q_nope, q_rope, c_kv, k_rope = self.project(x, positions)
        k, v = (split_heads(c_kv @ w, self.n_heads) for w in (self.w_uk, self.w_uv))
        scores = (q_nope @ k.mT + q_rope @ k_rope[:, None].mT) * self.scale
        return merge_heads(masked_softmax(scores, causal=True) @ v) @ self.w_o
        ### END SOLUTION

# %%
LatentAttention = check("9B", LatentAttention)

# %% tags=["slide"]
small = training.initialise(LatentAttention(64, 4, 16, 24, 8).double(), 0)
tokens = torch.from_numpy(np.random.default_rng(9).standard_normal((1, 10, 64)))
with torch.no_grad():
    q_c, q_r, c_kv, k_r = small.project(tokens, torch.arange(10))
    keys, values = (split_heads(c_kv @ w, 4) for w in (small.w_uk, small.w_uv))
    reference = small(tokens)
drawn = {"x": tokens[0], "c_kv": c_kv[0], "k_rope": k_r[0], "q_nope": q_c[0],
         "q_rope": q_r[0], "keys": keys[0], "values": values[0],
         "out": reference[0]}
plotting.flow(
    drawn,
    [("x", "c_kv", "W_DKV"), ("x", "k_rope", "RoPE W_KR"), ("x", "q_nope", "W_UQ"),
     ("x", "q_rope", "RoPE W_QR"), ("c_kv", "keys", "W_UK"), ("c_kv", "values", "W_UV"),
     (("q_nope", "q_rope", "k_rope", "keys", "values"), "out", "attention")],
    title="MLA, expanded: only c_kv and k_rope are cached")
plotting.show("Data flow of a small layer: x gives a latent of 24, one rotated key "
              "of 8, and queries of four heads; keys and values come from the "
              "latent.")
print("cached a token:", c_kv.shape[-1] + k_r.shape[-1], " of", 2 * 4 * 16)

# %% [markdown] tags=["slide"]
# ### 9.4 Computational efficiency gains
#
# **What does a token cost, in bytes and in operations?** DeepSeek-V2 and V3 have $d_h=128$, $d_h^R=64$, $d_c=512$ (V3: 128
# heads, 61 layers). Elements a token and layer: MHA keeps $2n_hd_h$, GQA $2n_gd_h$, MQA $2d_h$, MLA $d_c+d_h^R$.
#
# *Predict.* To how many groups of GQA is MLA's cache equal?

# %%
d_h, d_r, d_c, n_h = 128, 64, 512, 128
sizes_of = {"MHA, 128 heads": 2 * n_h * d_h, "GQA, 8 groups": 2 * 8 * d_h,
            "MQA": 2 * d_h, "MLA": d_c + d_r}
for name, elements in sizes_of.items():
    print(f"{name:15s} {elements:6,} elements, {elements / (2 * n_h * d_h):6.1%} "
          f"of MHA, as {elements / (2 * d_h):6.2f} groups")
print(f"V3, 61 layers, two bytes: {61 * (d_c + d_r) * 2 / 1000:.1f} KB a token")

# %% [markdown]
# 2.25 groups. ("x % of MHA" depends on the heads: 1.8 % for 128, more for fewer.)
#
# Now the operations. Expanded, each cached latent is made into keys and values for all heads, then attended to in 192 and
# 128 columns; absorbed, each query goes into the latent space, and attends in 576 and 512 columns.
#
# *Predict.* Absorbed attention does more work for each pair. From how many queries on is it cheaper to expand?

# %% tags=["slide"]
def flops(n_queries, n_keys, absorbed):
    """Operations of one layer for new queries against n_keys cached tokens."""
    up = 2 * n_h * d_c * (d_h + d_h)  # W_UK and W_UV, for one token
    if absorbed:
        return n_queries * up + 2 * n_queries * n_keys * n_h * (d_c + d_r + d_c)
    return n_keys * up + 2 * n_queries * n_keys * n_h * (d_h + d_r + d_h)

queries, cached = 2 ** np.arange(0, 13), 4096
work = {"MLA, expanded": flops(queries, cached, False) / 1e9,
        "MLA, absorbed": flops(queries, cached, True) / 1e9}
one_query = [work[name][0] for name in ("MLA, expanded", "MLA, absorbed")]
even = next(m for m in range(1, 4096)
            if flops(m, cached, False) < flops(m, cached, True))
print(f"one query, 4,096 cached: {one_query[0]:.0f} GFLOP expanded, "
      f"{one_query[1]:.1f} absorbed")
print(f"expanding is cheaper from {even} queries on")
ax = plotting.curves(work, x=queries, xlabel="new queries, 4,096 tokens cached",
                     ylabel="GFLOP of one layer", log_y=True,
                     title="Decode absorbs, prefill expands")
ax.set_xscale("log", base=2)
plotting.show("Operations against the number of queries, both axes logarithmic: "
              "absorbed starts a hundred times lower and crosses the expanded line "
              "at 164.")

# %% [markdown]
# At 164, near $d_c\cdot 2d_h/768=171$ (a little less: absorbed queries pay for their way in and out). So training and
# reading a prompt (**prefill**) expand, and writing (**decode**, one query at a time) absorbs. Both give the same numbers. And in decode the absorbed form has another gift: the cache is read once for
# all heads, which section 9.7 counts.
#
# #### Exercise 9C: decode without a key  (difficulty 3 of 5, essential, 15 minutes; if you do only two)
#
# One new token for each text of a batch, all heads, against its cache.
#
# |argument|shape|meaning|
# |---|---|---|
# |`q_latent`|`(batch, heads, d_latent)`|queries, already through $W_{UK}^\top$|
# |`q_rope`|`(batch, heads, d_rope)`|their rotated part|
# |`c_kv`, `k_rope`|`(batch, capacity, d_latent)`, `(batch, capacity, d_rope)`|the cache|
# |`lengths`|`(batch,)` integers|how many rows of each text count; behind them anything may stand, even nan|
# |`scale`|float|factor on the scores|
#
# Returns the blends of latents `(batch, heads, d_latent)` in the float type of `q_latent`, before $W_{UV}$; zeros for a
# length of 0.
#
# <details><summary>Hint</summary>
#
# For one text: which rows of the cache exist? The scores are a sum of two products, `(heads, length)`: which? What is blended:
# does `k_rope` belong to the values? Why must the function be told the scale?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def absorbed_decode(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    """One query a head against a latent cache: (batch, heads, d_latent), NumPy.

    Row b attends to its first lengths[b] latents, and gets zeros where that is 0.
    """
    ### BEGIN SOLUTION
    out = np.zeros_like(q_latent)
    for b, length in enumerate(lengths):
        c, k_r = c_kv[b, :length], k_rope[b, :length]
        scores = (q_latent[b] @ c.T + q_rope[b] @ k_r.T) * scale  # (heads, length)
        out[b] = softmax(scores) @ c
    return out
    ### END SOLUTION

# %%
absorbed_decode = check("9C", absorbed_decode)

# %% [markdown]
# It takes the last token of two examples: the word *it* in MiniLM (which has no rotation: `k_rope` of width 0), and the last token
# of the small layer.

# %%
nothing = np.zeros((1, 12, 0)), np.zeros((1, 16, 0))
of_it = absorbed_decode(q_latent[None, :, it], nothing[0], c[None], nothing[1], [16],
                        1 / math.sqrt(32))
print(f"first output of it {(of_it[0, 1] @ up_v[1])[0]:.3f}")

with torch.no_grad():
    heads_uk, heads_uv = (w.unflatten(1, (4, 16)).transpose(0, 1)
                          for w in (small.w_uk, small.w_uv))  # (4, 24, 16)
    last = (q_c[:, :, -1:] @ heads_uk.mT)[:, :, 0]  # (1, 4, 24)
    found = absorbed_decode(last.numpy(), q_r[:, :, -1].numpy(), c_kv.numpy(),
                            k_r.numpy(), [10], small.scale)
    again = (torch.from_numpy(found)[:, :, None] @ heads_uv).flatten() @ small.w_o
print(f"last token, expanded {reference[0, -1, 0]:.3f}, absorbed {again[0]:.3f}")

# %% [markdown]
# ## Part 3 · Made right
#
# ### 9.5 Implementation challenges
#
# **Is it the layer that others call MLA?** One class with both forms; what is cached is two tensors, in memory taken once.

# %% tags=["export"]
class LatentCache:
    """The latents and rotated keys of one layer, in memory that is taken once."""

    def __init__(self, batch, capacity, d_latent, d_rope, dtype=torch.float64,
                 device=None):
        check_sizes(0, batch=batch, capacity=capacity, d_rope=d_rope)
        check_sizes(d_latent=d_latent)
        self.c_kv = torch.zeros(batch, capacity, d_latent, dtype=dtype, device=device)
        self.k_rope = self.c_kv.new_zeros(batch, capacity, d_rope)
        self.length = 0

    def update(self, c_kv, k_rope):
        """Store new rows (batch, n, width); return all so far. ValueError if full."""
        end = self.length + c_kv.shape[1]
        for name, new in (("c_kv", c_kv), ("k_rope", k_rope)):
            kept = getattr(self, name)
            if new.shape != (len(kept), end - self.length, kept.shape[2]):
                wanted = f"({len(kept)}, n_new, {kept.shape[2]})"
                raise ValueError(f"{name} must be {wanted}, got {tuple(new.shape)}")
        if end > self.c_kv.shape[1]:
            raise ValueError(f"the cache holds {self.c_kv.shape[1]} tokens, got {end}")
        self.c_kv[:, self.length:end], self.k_rope[:, self.length:end] = c_kv, k_rope
        self.length = end
        return self.c_kv[:, :end], self.k_rope[:, :end]

# %% tags=["export"]
class MultiHeadLatentAttention(LatentAttention):
    """MLA for TransformerLM and for decoding: two forms, one result."""

    def forward(self, x, mask=None, causal=False, positions=None, cache=None,
                absorbed=False):
        """x (batch, n, d_model) to the same; mask boolean, True = may attend.

        positions integers (n,), by default after what the cache, a LatentCache, holds.
        """
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        q_nope, q_rope, *latents = self.project(x, positions)
        if cache is not None:
            latents = cache.update(*latents)
        c_kv, k_rope = (rows[:, None] for rows in latents)  # one head for all
        w_uk, w_uv = (w.unflatten(1, (self.n_heads, -1)).transpose(0, 1)
                      for w in (self.w_uk, self.w_uv))  # (n_heads, d_latent, ...)
        scores = (q_nope @ w_uk.mT) @ c_kv.mT if absorbed else q_nope @ (c_kv @ w_uk).mT
        scores = (scores + q_rope @ k_rope.mT) * self.scale
        p = masked_softmax(scores, mask, causal)
        out = cuda.weighted_sum(p, c_kv if absorbed else c_kv @ w_uv)
        out = out @ w_uv if absorbed else out
        return merge_heads(out) @ self.w_o

# %% [markdown]
# transformers has DeepSeek's layers as independent implementations. We copy random weights into its `DeepseekV3Attention`
# and compare: whole texts, then nine tokens into a cache and the tenth decoded. (V2's layer, YaRN and V3.2's indexer stand in
# the table of `python -m tests.conformance`.)
#
# *Predict.* In double precision, how far may two right implementations be apart?

# %%
from attention.latent import LatentCache, MultiHeadLatentAttention
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

config = deepseek.DeepseekV3Config(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=None,
    kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    attn_implementation="eager")
theirs = deepseek.DeepseekV3Attention(config, layer_idx=0).double()
ours = MultiHeadLatentAttention(64, 4, 16, 24, 8,
                                positions=Rotary(8, interleaved=True)).double()
ours.load_state_dict(small.state_dict())

def per_head(*parts):
    """nn.Linear's matrix whose rows are, head after head, those of the parts."""
    split = [w.unflatten(1, (4, -1)) for w in parts]  # (d_in, 4, width)
    return torch.cat(split, dim=-1).flatten(1).T

with torch.no_grad():
    theirs.q_proj.weight.copy_(per_head(ours.w_uq, ours.w_qr))
    theirs.kv_a_proj_with_mqa.weight.copy_(torch.cat([ours.w_dkv, ours.w_kr], 1).T)
    theirs.kv_b_proj.weight.copy_(per_head(ours.w_uk, ours.w_uv))
    theirs.o_proj.weight.copy_(ours.w_o.T)

# %%
turning = deepseek.DeepseekV3RotaryEmbedding(config)(tokens, torch.arange(10)[None])
future = torch.full((10, 10), -math.inf, dtype=torch.float64).triu(1)
with torch.no_grad():
    right_out = theirs(tokens, turning, future)[0]
    cache = LatentCache(1, 10, 24, 8)
    forms = {"expanded": ours(tokens, causal=True),
             "absorbed": ours(tokens, causal=True, absorbed=True)}
    ours(tokens[:, :9], causal=True, cache=cache)
    forms["decoded"] = ours(tokens[:, 9:], cache=cache, absorbed=True)
for name, result in forms.items():
    gap = (result - right_out[:, -result.shape[1]:]).abs().max()
    print(f"{name}: last token {result[0, -1, 0]:.3f}, "
          f"difference to transformers {gap:.6f}")

# %% [markdown]
# By rounding: this is the layer that others call MLA. Three traps lie here. DeepSeek rotates **interleaved** pairs (the indexer of V3.2 half-split ones): with the same weights
# 0.169 in place of our 0.168. The norm stands on the latent, *before* the cache. And the scale:
#
# **Trap.** *"The dot product in the absorbed form has 576 columns, so divide by $\sqrt{576}$."* It is the same score as
# before, of a key with $128+64$ columns: $1/\sqrt{192}$, in both forms. (With YaRN it is multiplied by the square of YaRN's factor.) A
# public contest of GPU kernels had $1/\sqrt{576}$ in its reference (gpu-mode/reference-kernels, `amd_202602/mixed-mla`).
#
# #### A test that cannot fail
#
# Below is a test of the kind found in public repositories: small weights, an absolute tolerance.
#
# *Predict.* Which of these wrong versions does it find?

# %% tags=["slide"]
def decode_one(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, columns=None, rope=1.0):
    """One token, expanded, with a place for two mistakes; shapes as in exercise 9D."""
    columns = columns or q_nope.shape[-1] + q_rope.shape[-1]
    keys, values = (np.einsum("nr,hrd->hnd", c_kv, w) for w in (w_uk, w_uv))
    scores = np.einsum("hd,hnd->hn", q_nope, keys) + rope * q_rope @ k_rope.T
    return np.einsum("hn,hnd->hd", softmax(scores / math.sqrt(columns)), values)

wrong = {"1/sqrt(d_latent + d_rope)": dict(columns=48),
         "no rotated part": dict(rope=0.0), "no scale": dict(columns=1)}
shapes = [(4, 16), (4, 8), (10, 40), (10, 8), (4, 40, 16), (4, 40, 16)]
for size in (0.01, 0.3):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in shapes[:4]]
    arrays += [size * rng.standard_normal(shape) for shape in shapes[4:]]
    for i in (0, 1, 3):  # queries and rotated keys come from weights too
        arrays[i] = size * arrays[i]
    exact = decode_one(*arrays)
    for name, change in wrong.items():
        off = np.abs(decode_one(*arrays, **change) - exact).max()
        print(f"weights of {size:4.2f}: {name:26s} off by {off:.0e}, "
              f"{off / np.abs(exact).max():.2%} of the output")

# %% [markdown]
# With weights of 0.01 all scores are near 0, all attention is an even average, and a wrong scale moves the output by two parts
# in ten thousand. With `atol=1e-3` nothing is found. A test needs scores that differ, and a tolerance **relative** to the output.
#
# #### Exercise 9D: a test that can fail  (difficulty 3 of 5, useful, 15 minutes)
#
# Write a function that is given a decode step and notices whether it is wrong. It is tried on right ones and on ten wrong
# ones: scales, a forgotten part, heads in the wrong order, a blend of the wrong thing.
#
# |argument|meaning|
# |---|---|
# |`decode`|`decode(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv)` for one token: `(heads, d_head)`, `(heads, d_rope)`, `(n, d_latent)`, `(n, d_rope)`, `(heads, d_latent, d_head)`, `(heads, d_latent, d_v)`; returns `(heads, d_v)`; the scale is its own|
#
# Returns nothing. It raises an error (`assert ...`) for a wrong decode step, and none for a right one.
#
# <details><summary>Hint</summary>
#
# How large must queries be for the weights to differ? What do you compare with: a formula of your own, head by head? Which
# sizes must differ from one another for a wrong one to show? What happens with very large scores?
#
# </details>

# %% tags=["exercise", "export"] kind="bug"
def test_latent_decode(decode):
    """Raise AssertionError if the decode step is wrong; its arguments are in 9D."""
    ### BEGIN SOLUTION
    rng = np.random.default_rng(0)
    for size in (1.0, 300.0):
        shapes = (3, 6), (3, 4), (7, 10), (7, 4), (3, 10, 6), (3, 10, 5)
        q_nope, q_rope, c, k_rope, w_uk, w_uv = map(rng.standard_normal, shapes)
        q_nope, q_rope = size * q_nope, size * q_rope
        got = decode(q_nope, q_rope, c, k_rope, w_uk, w_uv)
        for h in range(3):
            scores = (c @ w_uk[h] @ q_nope[h] + k_rope @ q_rope[h]) / math.sqrt(10)
            p = np.exp(scores - scores.max())
            expected = p / p.sum() @ (c @ w_uv[h])
            assert np.abs(got[h] - expected).max() < 1e-8 * np.abs(expected).max()
    ### END SOLUTION

# %%
test_latent_decode = check("9D", test_latent_decode)

# %% [markdown]
# ### 9.6 Practical considerations: a real layer, devices, bits
#
# **Can a trained GQA layer become an MLA layer?** Exactly, before any truncation (TransMLA, arXiv 2502.07864): the keys and
# values of its groups, side by side, *are* a latent, and $W_{UK}$ only picks, for head $i$, the columns of its group. SmolLM2:
# three groups of 64 + 64 columns, a latent of 384.
#
# #### Exercise 9E: three key heads as one latent  (difficulty 3 of 5, useful, 15 minutes)
#
# Write the model's attention in absorbed form: one wide key, the same for all heads.
#
# |argument|shape|meaning|
# |---|---|---|
# |`q`|`(batch, n_heads, n_queries, d_head)`|already rotated|
# |`k`, `v`|`(batch, n_groups, n_keys, d_head)`|one for each group of neighbouring heads|
#
# 1. the latent: the groups' keys, then the groups' values side by side, `(batch, 1, n_keys, 2 * n_groups * d_head)`;
# 2. the queries in its space: head $i$ has its $q_i$ in the columns of *its group's keys*, zeros elsewhere;
# 3. scores, scale, causal mask (the last query sees all keys), softmax; the blend of latents;
# 4. of the blend, head $i$ takes the columns of its group's values.
#
# Returns `(batch, n_heads, n_queries, d_head)`.
#
# <details><summary>Hint</summary>
#
# To which group does head $i$ belong, with neighbours together? The query has more columns now: does the scale change?
# `k.transpose(1, 2).flatten(2)` lays heads side by side.
#
# </details>

# %% tags=["exercise", "export"] kind="training"
def grouped_as_latent(q, k, v):
    """Causal grouped-query attention as attention to one latent for all heads.

    q (batch, n_heads, n_queries, d_head), k and v (batch, n_groups, n_keys, d_head).
    Returns the shape of q. ValueError if n_groups does not divide n_heads.
    """
    n_heads, n_groups, d = q.shape[1], k.shape[1], q.shape[-1]
    if n_heads % n_groups:
        raise ValueError(f"{n_groups} groups do not divide {n_heads} heads")
    ### BEGIN SOLUTION
    c = torch.cat([k, v], dim=1).transpose(1, 2).flatten(2)[:, None]
    q_latent = q.new_zeros(*q.shape[:3], c.shape[-1])
    group = [head // (n_heads // n_groups) for head in range(n_heads)]
    for head, g in enumerate(group):
        q_latent[:, head, :, g * d:(g + 1) * d] = q[:, head]
    blend = masked_softmax(q_latent @ c.mT / math.sqrt(d), causal=True) @ c
    values = blend[..., n_groups * d:]
    return torch.stack([values[:, head, :, g * d:(g + 1) * d]
                        for head, g in enumerate(group)], dim=1)
    ### END SOLUTION

# %%
grouped_as_latent = check("9E", grouped_as_latent)

# %% [markdown]
# The model hands over keys that are already shared, three query heads to one; every third is one of its own three. *Predict.*
# The cache is the same size. Does the model say the same?

# %% tags=["language-model", "slide"]
if smollm:
    language_model.put_in(
        smollm, attention=lambda q, k, v, causal=True:
        grouped_as_latent(q, k[:, ::3], v[:, ::3]))

# %% [markdown]
# So MLA contains GQA, at the same cache (its keys here already rotated; a truncation has to come before the rotation, as in section
# 9.2). What it costs is operations: 384 columns for each head in place of 64.
#
# #### Several devices
#
# **What happens to the cache when heads are spread over devices?** With tensor parallelism each device has some of the heads. GQA's
# groups are dealt out; a latent that all heads need must lie on **every** device.
#
# *Predict.* From how many devices on does 8-group GQA keep less on each than MLA?

# %% tags=["slide"]
devices = np.array([1, 2, 4, 8])
bytes_on = {"GQA, 8 groups": 2 * 2 * d_h * np.maximum(8 // devices, 1),
            "MLA": np.full(4, 2 * (d_c + d_r)),
            "GLA, 2 latents of 256": 2 * (2 * 256 // np.minimum(devices, 2) + d_r)}
for name, count in bytes_on.items():
    print(f"{name:22s} bytes a token on each of 1, 2, 4, 8 devices:", count)
plotting.curves(bytes_on, x=devices, xlabel="devices",
                ylabel="bytes a token, a layer and a device",
                title="On 4 devices and more GQA keeps less than MLA, which is copied")
plotting.show("Bytes on each device against their number: GQA falls from 4,096 to "
              "512, MLA stays at 1,152, grouped latents halve once.")

# %% [markdown]
# From four on. "2.25 groups" holds on one device. (GLA, arXiv 2505.21487, cuts the latent into one for each half of the heads; its GTA ties
# keys to values in GQA.) Servers therefore often spread *requests*, not heads, over devices for MLA.
#
# #### Fewer bits
#
# *Predict.* The latents in 8-bit floats with one scale a token, the rotated key left alone: how far is the output off?

# %%
def in_eight_bits(rows):
    """Round to float8 (e4m3) with one scale for each row."""
    scale = rows.abs().amax(-1, keepdim=True) / 448
    return (rows / scale).to(torch.float8_e4m3fn).to(rows.dtype) * scale

with torch.no_grad():
    w = {name: torch.softmax((q_c @ (kept @ heads_uk).mT + q_r @ k_r[:, None].mT)
                             * small.scale + future, -1) @ (kept @ heads_uv)
         for name, kept in (("as it is", c_kv[:, None]),
                            ("float8", in_eight_bits(c_kv[:, None])),
                            ("bfloat16", c_kv[:, None].bfloat16().double()))}
for name in ("bfloat16", "float8"):
    off = (w[name] - w["as it is"]).norm() / w["as it is"].norm()
    print(f"{name}: the heads' outputs are off by {off:.4f} of their size")

# %% [markdown]
# About two percent for a quarter of float32's bytes: one vector serves all heads, so its error reaches all of them, but it is
# averaged over tokens.
#
# ## Part 4 · CUDA
#
# %% [markdown] tags=["slide"]
# ### 9.7 One pass over the latent
#
# In the absorbed form all heads attend to one sequence of vectors: the latent $c_j$ with the shared key $k^R_j$
# behind it. As a key all of it counts, as a value the latent alone. So every head needs a row of the cache twice.
# **How often must it be read?**
#
# Once, if the heads stand around it. A block takes 128 keys of one text (a **split**; the splits are merged by the
# second kernel of lecture 05). It has a warp for each head. All warps together bring 16 rows into shared memory, and each
# warp uses them for its own head: first as keys, then as values. A lane has the columns $l, l + 32, \dots$ of its head's
# query and of its sum, in registers.

# %%
from attention.kv_cache import WARP

# %% tags=["export"]
LATENT_TILE = WARP + r"""
#define KEYS 16                                          // rows of a tile
#define SPLIT 128                                        // keys of a block
// All threads copy rows first to end - 1: the latent, the shared key, zeros up to 32 C columns.
template <int C, typename T>
__device__ void load_latents(float* tile, const T* c_kv, const T* k_rope, size_t first, int n,
                             int d_latent, int d_rope) {
  for (int e = threadIdx.y * 32 + threadIdx.x; e < n * 32 * C; e += blockDim.y * 32) {
    size_t j = first + e / (32 * C);
    int c = e % (32 * C);
    float x = 0.0f;
    if (c < d_latent) x = (float)c_kv[j * d_latent + c];
    else if (c < d_latent + d_rope) x = (float)k_rope[j * d_rope + c - d_latent];
    tile[e] = x;
  }
}
// This lane's columns of one head's query, latent and rotary part.
template <int C>
__device__ void load_query(float (&query)[C], const float* q_latent, const float* q_rope,
                           int d_latent, int d_rope, float scale) {
  for (int c = 0; c < C; ++c) {
    int column = 32 * c + threadIdx.x;
    query[c] = 0.0f;
    if (column < d_latent) query[c] = scale * q_latent[column];
    else if (column < d_latent + d_rope) query[c] = scale * q_rope[column - d_latent];
  }
}
// From the score of a lane's key to its weight; returns the factor for what was summed before.
__device__ float rescale(float score, float& weight, float& maximum, float& total) {
  float larger = fmaxf(maximum, warp_max(score));
  float top = larger == -INFINITY ? 0.0f : larger;
  float shrink = expf(maximum - top);
  weight = expf(score - top);
  total = shrink * total + warp_sum(weight);
  maximum = larger;
  return shrink;
}
"""

# %% [markdown]
# #### Exercise 9F: as keys, then as values  (difficulty 4 of 5, useful, 20 minutes)
#
# Write the loop over the tiles of a split. Given: `load_latents<C>(tile, c_kv, k_rope, row, n, d_latent, d_rope)` brings `n` rows,
# `query[C]` holds this lane's columns, `rescale(score, weight, maximum, total)` turns the score of this lane's key into its weight
# and returns the factor for what was summed before.
#
# |name|meaning|
# |---|---|
# |`begin`, `end`|keys of this block, at most 128; `rows + begin` is the first row in the cache|
# |`tile`|shared: `KEYS` = 16 rows of `32 * C` floats; column `32 * c + lane` of row t is `tile[(t * C + c) * 32 + lane]`|
# |`query[c]`, `sum[c]`|column `32 * c + lane` of the query (scaled) and of the blend so far|
# |`maximum`, `total`|of this head so far|
#
# Returns nothing; in the end `sum` is the undivided blend, `total` the sum of the weights. Each row is read from global memory once for all
# heads of the block. A block may have warps without a head: they work on with the others.
#
# <details><summary>Hint</summary>
#
# Two barriers a tile: who may still read the old one, who has brought the new one? Which lane keeps the score of key t, and how
# do all lanes get its weight later (`__shfl_sync`)? What has to happen to `sum` between the two uses? Which columns of a row are
# the value, and what becomes of the others in the end?
#
# </details>

# %% tags=["exercise", "export"] kind="kernel"
LATENT_SPLIT = LATENT_TILE + r"""
template <typename T, int C>                             // 32 C >= d_latent + d_rope
__global__ __launch_bounds__(1024) void latent_split(
    const float* q_latent, const float* q_rope, const T* c_kv, const T* k_rope, const int* lengths,
    float* outs, double* lses, int capacity, int heads, int d_latent, int d_rope, float scale) {
  extern __shared__ float tile[];                        // KEYS rows of 32 C floats
  int lane = threadIdx.x;
  int h = blockIdx.y * blockDim.y + threadIdx.y;         // this warp's head
  size_t rows = (size_t)blockIdx.x * capacity;           // of the cache, before this sequence
  int begin = blockIdx.z * SPLIT;
  int end = min(begin + SPLIT, lengths[blockIdx.x]);
  size_t row = (size_t)blockIdx.x * heads + min(h, heads - 1);
  size_t split = row * gridDim.z + blockIdx.z;
  if (begin >= end && lane == 0 && h < heads) lses[split] = -INFINITY;
  if (begin >= end) return;                              // no keys: the merge will not look
  float query[C], sum[C] = {};
  load_query<C>(query, q_latent + row * d_latent, q_rope + row * d_rope, d_latent, d_rope, scale);
  float maximum = -INFINITY, total = 0.0f;
  // BEGIN SOLUTION
  for (int first = begin; first < end; first += KEYS) {
    int n = min(KEYS, end - first);
    __syncthreads();                                     // the last tile is used up
    load_latents<C>(tile, c_kv, k_rope, rows + first, n, d_latent, d_rope);
    __syncthreads();                                     // the new tile is there
    float score = -INFINITY;
    for (int t = 0; t < n; ++t) {                        // as keys: lane t keeps the score of t
      float s = 0.0f;
      for (int c = 0; c < C; ++c) s += query[c] * tile[(t * C + c) * 32 + lane];
      s = warp_sum(s);
      if (lane == t) score = s;
    }
    float weight, shrink = rescale(score, weight, maximum, total);
    for (int c = 0; c < C; ++c) sum[c] *= shrink;
    for (int t = 0; t < n; ++t) {                        // as values
      float w = __shfl_sync(0xffffffff, weight, t);
      for (int c = 0; c < C; ++c) sum[c] += w * tile[(t * C + c) * 32 + lane];
    }
  }
  // END SOLUTION
  if (h >= heads) return;
  for (int c = 0; c < C && 32 * c + lane < d_latent; ++c)
    outs[split * d_latent + 32 * c + lane] = sum[c] / (total == 0.0f ? 1.0f : total);
  if (lane == 0) lses[split] = (double)maximum + logf(total);
}
"""

# %%
LATENT_SPLIT = check("9F", LATENT_SPLIT)

# %% [markdown]
# What it should read: each row of the cache once for up to 32 heads, each query once a split.

# %% tags=["export"]
LATENT_SPLIT_KEYS = 128  # as SPLIT in LATENT_TILE

def latent_bytes(lengths, heads, d_latent, d_rope, itemsize=4, warps=32):
    """Bytes that the kernel reads, exactly: (cache, queries).

    itemsize: of the cache; warps: the most heads that share a block.
    """
    rows, width = sum(lengths), d_latent + d_rope
    splits = sum(-(-n // LATENT_SPLIT_KEYS) for n in lengths)
    return -(-heads // warps) * rows * width * itemsize, splits * heads * width * 4

# %% [markdown]
# First the word *it* in MiniLM: 12 heads, a latent of 384, 16 tokens. Then three texts, one of them empty, with 16 heads, a
# latent of 64 and a rotated key of 16; behind the lengths stands nan.
#
# *Predict.* How many bytes of the cache does one block for all 16 heads read, and how many a block for each head?

# %%
from attention.latent import latent_decode_attention_cuda, latent_launch

single = [a.astype(np.float32) for a in (q_latent[None, :, it], nothing[0], c[None],
                                         nothing[1])]
kernel, launch, arguments = latent_launch(*single, [16], 1 / math.sqrt(32))
report = kernel.check[launch](*arguments)
by_kernel = latent_decode_attention_cuda(*single, [16], 1 / math.sqrt(32))
print(f"first output of it {(by_kernel[0, 1] @ up_v[1])[0]:.3f}; read of the cache "
      f"{sum(r.bytes for r in report.rows if r.array == 'c_kv'):,} bytes, "
      f"which is 4 x 16 x 384 = {4 * 16 * 384:,}")

# %%
rng, lengths = np.random.default_rng(9), np.array([150, 0, 37])
shapes = [(3, 16, 64), (3, 16, 16), (3, 160, 64), (3, 160, 16)]
batch = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
for row, length in enumerate(lengths):
    batch[2][row, length:], batch[3][row, length:] = np.nan, np.nan

read = {}
for name, warps in (("all heads in a block", 32), ("a block for each head", 1)):
    kernel, launch, arguments = latent_launch(*batch, lengths, 48**-0.5, warps=warps)
    report = kernel.check[launch](*arguments)
    read[name] = sum(r.bytes for r in report.rows
                     if r.kind == "load" and r.array in ("c_kv", "k_rope"))
    formula = latent_bytes(lengths, 16, 64, 16, warps=warps)[0]
    print(f"{name:21s} {read[name]:9,} bytes of the cache, formula {formula:9,}, "
          f"problems {len(report.problems)}")

# %% [markdown]
# 59,840, and sixteen times as many: the factor is the number of heads. And nothing was read a second time as a value: $64+16$ floats a token, where keys
# and values apart would be $64+16+64$. (With V3's 128 heads four blocks read each row, three of them at best from the GPU's cache;
# FlashMLA has 64 heads in a block.)
#
# #### Towards the ridge
#
# **What does that do to decode?** Operations for each byte of cache, in two-byte numbers: MHA has 1, GQA as many as heads share a
# key. MLA does $2n_h(2d_c+d_h^R)$ operations for $2(d_c+d_h^R)$ bytes.
#
# *Predict.* An H100 can do 295 operations in the time of one byte. Who is still waiting for memory?

# %% tags=["slide"]
bandwidth, peak = 3.35e12, 989e12  # H100 SXM, data sheet, 16-bit, dense
intensity = {"MHA": 1.0, "GQA, 8 heads a key": 8.0,
             "MLA, 16 heads": 16 * (2 * d_c + d_r) / (d_c + d_r),
             "MLA, 128 heads": 128 * (2 * d_c + d_r) / (d_c + d_r)}
for name, value in intensity.items():
    print(f"{name:19s} {value:6.1f} operations a byte, at most "
          f"{min(1, value * bandwidth / peak):6.1%} of the peak")
plotting.roofline({name: (value, min(peak, value * bandwidth))
                   for name, value in intensity.items()}, bandwidth, peak,
                  title="Absorbed decode with 128 heads comes near the ridge")
plotting.show("Roofline of an H100 with four decode mechanisms on the slanted part: "
              "MHA far left, MLA with 128 heads just left of the ridge.")

# %% [markdown]
# All of them still wait, but MLA with 128 heads only just: 242 of 295. One query more a step (speculative decoding, lecture 05)
# and it is bound by arithmetic. That is why its kernels are written like matrix products, and why a machine with less arithmetic for
# each byte gains less from MLA.
#
# ## Part 5 · Does it matter?
#
# ### 9.8 Equal caches, trained
#
# **Is a latent a better use of the same bytes than fewer heads?** DeepSeek-V2's paper reports that MLA is stronger than MHA at its
# scale (arXiv 2405.04434, § 2.1). Here is a language model of characters, two layers of 64, three seeds, everything else the
# same: MHA keeps 128 numbers a token and layer, one shared key and value head 32, MLA $24+8=32$. The control is a table of
# which character follows which.
#
# *Predict.* The order of the three. Is it the same for every seed?

# %% tags=["slide", "approx"] approx={"numbers": 0.02, "picture": 0.05}
from attention.experiments.latent import bigram_loss, held_out_loss, train_reader

readers = {name: [train_reader(name, seed) for seed in range(3)]
           for name in ("MHA", "GQA-1", "MLA")}
losses = {name: [held_out_loss(model) for model in models]
          for name, models in readers.items()}
print(f"control, pairs of characters: loss {bigram_loss():.2f}")
for name, found in losses.items():
    count = sum(p.numel() for p in readers[name][0].parameters())
    print(f"{name:5s} loss {np.mean(found):.2f}, by seed",
          *(f"{loss:.2f}" for loss in found), f"({count:,} parameters)")
plotting.bars({"pairs (control)": bigram_loss(), **losses},
              ylabel="loss on held-out text (nats)",
              title="After 120 steps MLA is a little behind MHA and GQA-1")
plotting.show("Bars of the losses with a dot for each seed: the control highest, MHA "
              "and one shared head about equal, MLA a little above.")

# %% [markdown]
# MLA is last for each seed, MHA and the shared head change places. All three beat the table. Here MLA does **not** win: after so
# few steps it lies a little behind, at a quarter of MHA's cache, while one shared head is as good as four. The paper's ordering is
# about models with billions of weights, trained to the end; this page neither supports nor refutes it. What it shows: equal
# cache is not equal quality, and must be measured.
#
# ### 9.9 In use
#
# **What do you call on Monday?** A model class: `DeepseekV3Attention` in transformers expands, and caches the latent (5.23.0);
# vLLM and SGLang absorb in decode by themselves, with FlashMLA, FlashInfer or a Triton kernel. There is no argument of
# `scaled_dot_product_attention` for it, but the absorbed form *is* grouped-query attention with one key head.
#
# *Predict.* Does PyTorch's own function give our number, if it gets the latent as key and as value?

# %%
wide_q = torch.cat([torch.from_numpy(batch[0][:1]), torch.from_numpy(batch[1][:1])], -1)
wide_k = torch.from_numpy(np.concatenate(batch[2:], -1)[:1, :150])
by_torch = nn.functional.scaled_dot_product_attention(
    wide_q[:, :, None], wide_k[:, None].expand(1, 16, 150, 80),
    wide_k[:, None, :, :64].expand(1, 16, 150, 64), scale=48**-0.5)[:, :, 0]
by_kernel = latent_decode_attention_cuda(*batch, lengths, 48**-0.5)[:1]
print(f"first number {by_torch[0, 0, 0]:.3f} and {by_kernel[0, 0, 0]:.3f}, "
      f"largest difference {np.abs(by_torch.numpy() - by_kernel).max():.5f}")

# %% [markdown]
# It does, if it is told the scale: its default would be $1/\sqrt{80}$. Where MLA is met (folders of models in transformers
# 5.23.0): `deepseek_v2` to `deepseek_v32`, `kimi_k25`, `mistral4`, `longcat_flash`, `minicpm3`, `youtu`; `kimi_linear` has it
# without a rotation.
#
# ## What you can do now
#
# You can say how few numbers a cache must hold for *given inputs*, and find them. You can build multi-head latent attention with its
# decoupled rotation, decode without making a key, and give a grouped model this form. You can test it, and count why one
# pass over the latent serves all heads.

# %%
forms = {"keys, values": out[1, it, :8], "absorbed": absorbed_out[1, it, :8],
         "decoded": (of_it[0, 1] @ up_v[1])[:8]}
plotting.matrix(np.stack(list(forms.values())), list(forms), list(range(8)),
                title='"It", head 1: three forms, one output', xlabel="column",
                annotate=True)
plotting.show("Three equal rows of numbers: the first eight outputs of the word it, "
              "from keys and values, in the absorbed form, and from the decode "
              "step.")

# %% [markdown]
# ## Exercises left
#
# 1. For which cache length does the break-even of 9.4 change? `flops(200, 100, True)`, and with 10,000 tokens.
# 2. Give SmolLM2 a latent of 192 in its last ten layers only: `with_weights` calls its function with the layer's number first.
# 3. Give `train_reader` more steps, `train_reader("MLA", 0, steps=600)`. Does MLA catch up with `"MHA"`?
# 4. Why may `k_rope` not be normalised together with the latent? Think of what a rotation keeps.

# %% [markdown]
# ## Quiz

# %% [markdown] tags=["quiz"]
# **1.** A latent of 256 numbers, heads of 64, and 32 columns more for the rotation. In the absorbed form, what are the
# scores divided by?
#
# - a) $\sqrt{288}$
# - b) $\sqrt{96}$
# - c) $\sqrt{256}$
# - d) $\sqrt{64}$

# %% tags=["quiz"]
from utils import quiz

asked_layer = MultiHeadLatentAttention(512, 16, 64, 256, 32)
under_the_root = asked_layer.scale**-2
quiz.answer({"a": 288, "b": 96, "c": 256, "d": 64}, under_the_root,
            "In either form it is the score of a key with 64 + 32 columns.")

# %% [markdown] tags=["quiz"]
# **2.** The same layer has 16 heads. How many numbers does it cache for a token?
#
# - a) 288
# - b) 768
# - c) 512
# - d) 2,048

# %% tags=["quiz"]
with torch.no_grad():
    *_, one_latent, one_key = asked_layer.project(torch.zeros(1, 1, 512),
                                                  torch.arange(1))
for_a_token = one_latent.numel() + one_key.numel()
quiz.answer({"a": 288, "b": 768, "c": 512, "d": 2048}, for_a_token,
            "One latent for keys and values, and one rotated key for all heads.")

# %% [markdown] tags=["quiz"]
# **3.** That layer against grouped queries with 4 key heads of 64: the heads are spread over several devices. From how
# many devices on does the grouped layer cache less on each device?
#
# - a) 2
# - b) 4
# - c) 16
# - d) never

# %% tags=["quiz"]
fewer_on_each = [count for count in (1, 2, 4, 8, 16)
                 if 2 * 64 * max(4 // count, 1) < for_a_token]
quiz.answer({"a": 2, "b": 4, "c": 16, "d": "never"}, fewer_on_each[0],
            "512 numbers are dealt out; the latent lies on every device as it is.")

# %% [markdown] tags=["quiz"]
# **4.** $W_K$ and $W_V$ are random, 48 × 64 each. All inputs lie in a space of 3 directions. How many numbers must a joint
# latent have to lose nothing on these inputs?
#
# - a) 48
# - b) 128
# - c) 6, three for keys and three for values
# - d) 3

# %% tags=["quiz"]
chance = np.random.default_rng(0)
in_three = chance.standard_normal((100, 3)) @ chance.standard_normal((3, 48))
random_k, random_v = chance.standard_normal((2, 48, 64))
both_made = in_three @ np.concatenate([random_k, random_v], axis=1)  # (100, 128)
quiz.answer({"a": 48, "b": 128, "c": 6, "d": 3}, int(np.linalg.matrix_rank(both_made)),
            "Keys and values are made from the same three coordinates of the input.")

# %% [markdown] tags=["quiz"]
# **5.** A prompt of 1,000 tokens is read at once, with the sizes of DeepSeek-V3. Which form needs fewer operations?
#
# - a) the absorbed one: it makes no keys
# - b) none: only brackets are moved
# - c) the expanded one
# - d) the absorbed one: its cache is smaller

# %% tags=["quiz"]
of_prompt = {name: flops(1000, 1000, name == "absorbed")
             for name in ("expanded", "absorbed")}
quiz.answer({"a": "absorbed", "b": "none", "c": "expanded", "d": "absorbed, cache"},
            min(of_prompt, key=of_prompt.get),
            "Every pair costs 576 + 512 columns absorbed, and 192 + 128 expanded.")

# %% [markdown]
# ## Going further
#
# Short sections, each alone, in any order. No later lecture needs them.

# %% [markdown]
# ### 9.10 Where 93.3 % comes from
#
# DeepSeek-V2's abstract says that the cache is 93.3 % smaller, training 42.5 % cheaper, generation 5.76 times faster, all
# compared with DeepSeek 67B: 95 layers, GQA with 8 groups of 128 (arXiv 2401.02954, table 2). V2 has 60 layers. *Predict.* How much of the 93.3 % is MLA?

# %%
v2, dense = 60 * (512 + 64), 95 * 2 * 8 * 128
print(f"elements a token and layer: 576 and 2,048; saved by MLA {1 - 576 / 2048:.1%}")
print(f"elements a token: {v2:,} and {dense:,}; saved by MLA and fewer layers "
      f"{1 - v2 / dense:.1%}")
print(f"and with 6 bits an element for V2 against 16: {1 - v2 * 6 / (dense * 16):.1%}")
print(f"GPU hours for 10^12 tokens, 172.8 and 300.6 thousand: saved "
      f"{1 - 172.8 / 300.6:.1%}")

# %% [markdown]
# 71.9 % of a layer, 82.2 % with V2's fewer layers; the rest is the quantised cache, "6 bits on average" (§ 3.2.3, which also names
# the 8-bit weights that are part of 5.76). The paper does not write this sum down: it is ours, and it gives its number. 42.5 % are
# the experts, not the attention.
#
# ### 9.11 A low-rank cache is not a low-rank attention
#
# **If keys lie in few directions, do the weights too?** A family of methods assumes it (Linformer 2006.04768: keys and values are
# projected along the *sequence*, to $k$ rows). Unit vectors $q$, $k$ of 16 numbers, 256 tokens, $\text{softmax}(\beta\,qk^\top)$.
#
# *Predict.* The scores have rank 16. And the weights, for $\beta$ from 0.5 to 32?

# %%
rng = np.random.default_rng(3)
units = rng.standard_normal((2, 256, 16))
units /= np.linalg.norm(units, axis=-1, keepdims=True)
for beta in (0.5, 2, 8, 32):
    energy = np.linalg.svd(softmax(beta * units[0] @ units[1].T), compute_uv=False) ** 2
    rank = (np.cumsum(energy) / energy.sum() < 0.99).sum() + 1
    print(f"beta {beta:4}: 99 % of the weights' energy in {rank} of 256 directions")

# %% [markdown]
# Peaked attention has a high rank, whatever the width of a head. Families that make attention cheaper, and where this course has
# them:
#
# |family|what is left out|where|
# |---|---|---|
# |window, neighbourhood|far keys|lecture 07|
# |graph, fixed patterns|all but some edges|lecture 07|
# |clustering, binning (LSH)|keys of other bins|lecture 07|
# |selected blocks or tokens|keys with low estimates|lecture 07, section 9.13|
# |linear (kernels)|the softmax|lecture 10|
# |low rank along the sequence (Linformer)|rows of keys|here|
# |low rank along the width (MLA)|columns of the cache|here|
# |fewer key heads (GQA)|heads of the cache|lecture 08|

# %% [markdown]
# ### 9.12 Normalised keys and absorption
#
# Some models normalise each head's key, $k/\text{rms}(k)$ (QK-norm). "Then MLA cannot absorb" is often said: the norm stands
# between $W_{UK}$ and the query. *Predict.* How many numbers must be stored for each token and head to do it all the same?

# %%
keys_of = c @ up_k  # (12, 16, 32), made once, when the token comes
size = np.sqrt((keys_of**2).mean(-1))  # (12, 16): one number a token and head
normed = softmax(q @ (keys_of / size[..., None]).swapaxes(1, 2) / math.sqrt(32))
scaled = softmax((q @ up_k.swapaxes(1, 2)) @ c.T / size[:, None] / math.sqrt(32))
print(f"it -> animal with normalised keys {normed[1, it, animal]:.3f}, absorbed "
      f"{scaled[1, it, animal]:.3f}")

# %% [markdown]
# One: the size. (arXiv 2606.16310; a learned gain of the norm goes into $W_{UK}$.)
#
# ### 9.13 An indexer on top
#
# DeepSeek-V3.2 attends to 2,048 tokens only, chosen by a small second attention, the **indexer** (lecture 07): few heads, one shared key of its own,
# queries from the queries' latent. With a latent cache a chosen row serves all heads, so the choice is made once for all of them.

# %%
from attention.sparse import LightningIndexer

# %% tags=["export"]
def best_of_past(scores, top_k):
    """Boolean, as scores (..., n, n): the top_k best places of a row, none later.

    Of equal scores the earlier place is taken, however many places follow.
    """
    past = torch.ones_like(scores, dtype=torch.bool).tril()
    scores = scores.masked_fill(~past, -math.inf)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(past).scatter(-1, best, True) & past  # see below

# %% tags=["export"]
class IndexedLatentAttention(MultiHeadLatentAttention):
    """Latent attention to the top_k tokens that an indexer scores best, causal.

    Sizes as in MultiHeadLatentAttention, d_query with them; index_heads of d_index
    columns choose, their first d_rope rotated. Source: DeepSeek-V3.2-Exp (2025).
    """

    def __init__(self, *sizes, top_k, index_heads, d_index, **named):
        super().__init__(*sizes, **named)
        self.top_k, self.d_rope = top_k, self.w_kr.shape[1]
        d_model, d_query = self.w_dq.shape
        self.indexer = LightningIndexer(d_model, index_heads, d_index)
        self.indexer.query = nn.Linear(d_query, index_heads * d_index, bias=False)
        self.index_positions = Rotary(self.d_rope)  # half-split, unlike the layer's own

    def forward(self, x, absorbed=False):
        return super().forward(x, self.chosen(x)[:, None], True, absorbed=absorbed)

    def chosen(self, x):
        """Boolean (batch, n, n): the best top_k of each token, never a later one."""
        own, places = self.indexer, torch.arange(x.shape[1], device=x.device)
        q = split_heads(own.query(self.norm_q(x @ self.w_dq)), own.n_heads)
        q, k = (self.turned(a, places) for a in (q, own.norm(own.key(x))[:, None]))
        matches = torch.relu(q @ k.mT * k.shape[-1] ** -0.5)  # (batch, heads, n, n)
        w = own.weight(x).mT[..., None] * own.n_heads**-0.5  # (batch, heads, n, 1)
        return best_of_past((w * matches).sum(1), self.top_k)

    def turned(self, heads, places):
        turned = self.index_positions.rotate(heads[..., :self.d_rope], places)
        return torch.cat([turned, heads[..., self.d_rope:]], dim=-1)

# %% [markdown]
# (`& past` is needed a second time: a top-k over a row with fewer than k finite scores returns places that are masked.) *Predict.* What must the
# result be when everything is chosen? And what changes if the indexer rotates as the layer beside it does, interleaved?

# %%
indexed = IndexedLatentAttention(64, 4, 16, 24, 8, 20, top_k=14, index_heads=2,
                                 d_index=16).double()
indexed = training.initialise(indexed, 0).requires_grad_(False)
short_text = torch.from_numpy(np.random.default_rng(13).standard_normal((1, 14, 64)))
dense_out = MultiHeadLatentAttention.forward(indexed, short_text, causal=True)
for kept in (14, 8, 4):
    indexed.top_k = kept
    forms_of = [indexed(short_text, absorbed=absorbed) for absorbed in (False, True)]
    print(f"{kept:2d} of 14 tokens: largest difference to dense "
          f"{(forms_of[0] - dense_out).abs().max():.2f}, expanded to absorbed "
          f"{(forms_of[0] - forms_of[1]).abs().max():.6f}")
before = indexed.chosen(short_text)
indexed.index_positions = Rotary(8, interleaved=True)
print(f"rotated the other way: {int((before & ~indexed.chosen(short_text)).sum())} of "
      f"{int(before.sum())} choices are others, and no shape")

# %% [markdown]
# The same as dense. And other tokens, without an error: several ports of V3.2 had that bug (sgl-project/sglang, pull request 13495). (An untrained indexer, as here,
# chooses at random. With copied weights this class equals transformers' `DeepseekV32Attention`: a row of `python -m tests.conformance`.)
#
# ### 9.14 Balance without a loss, and the rest of V3
#
# DeepSeek-V3 has 671B parameters, 37B of them used for a token, 14.8T training tokens, and predicts a second token as a further aim (multi-token
# prediction, MTP; arXiv 2412.19437). Its experts are balanced without an auxiliary loss (**auxiliary-loss-free**): a **bias** for each
# expert is added to its score when experts are *chosen*, not when they are weighted, and is moved by a small step against the load.
# Lecture 12 has the routers. *Predict.* Eight experts, two of them favoured: how does the largest load change?

# %%
rng = np.random.default_rng(14)
favour, bias, loads = np.array([1.5, 1.0, 0, 0, 0, 0, 0, 0]), np.zeros(8), []
for step in range(400):
    scores_of = rng.standard_normal((256, 8)) + favour  # 256 tokens
    chosen = np.argsort(-(scores_of + bias), axis=1)[:, :2]
    load = np.bincount(chosen.ravel(), minlength=8) / 512
    bias -= 0.01 * np.sign(load - 1 / 8)
    loads.append(load.max())
print(f"largest share of an expert: first 20 steps {np.mean(loads[:20]):.2f}, "
      f"last 20 {np.mean(loads[-20:]):.2f} (even: 0.12)")
print("biases", np.round(bias - bias.mean(), 1))

# %% [markdown]
# The biases cancel the favour, and the weights of the chosen never see them.

# %% [markdown]
# ## Behind the scenes
#
# What the sections above import. **The triple**: checks, and the same in PyTorch and CUDA.

# %% tags=["plumbing"]
import copy
import functools
from typing import NamedTuple

from attention.grouped_query import HALF_HEADERS, cache_type
from attention.kv_cache import merge_kernel, whole_numbers
from attention.multi_head import MultiHeadAttention, TransformerConfig, TransformerLM

# %% tags=["export", "plumbing"]
LATENT_TILE_KEYS = 16                                       # as KEYS

def check_latent_arguments(q_latent, q_rope, c_kv, k_rope, lengths):
    """Raise ValueError, in one sentence, unless queries and a latent cache fit together. For arrays and tensors."""
    cuda.check_numbers(q_latent=q_latent, q_rope=q_rope, c_kv=c_kv, k_rope=k_rope)
    shape = tuple(q_latent.shape)
    if len(shape) != 3 or shape[2] == 0:
        raise ValueError(f"q_latent must be (batch, heads, d_latent), d_latent at least 1, got shape {shape}")
    if len(q_rope.shape) != 3 or tuple(q_rope.shape[:2]) != shape[:2]:
        raise ValueError(f"q_rope must be (batch, heads, d_rope) with the {shape[:2]} of q_latent, "
                         f"got shape {tuple(q_rope.shape)}")
    for name, cache, width in (("c_kv", c_kv, shape[2]), ("k_rope", k_rope, q_rope.shape[2])):
        if len(cache.shape) != 3 or (cache.shape[0], cache.shape[2]) != (shape[0], width):
            raise ValueError(f"{name} must be ({shape[0]}, capacity, {width}), got shape {tuple(cache.shape)}")
    if c_kv.shape[1] != k_rope.shape[1]:
        raise ValueError(f"c_kv and k_rope must have the same capacity, got {c_kv.shape[1]} and {k_rope.shape[1]}")
    lengths, capacity = whole_numbers("lengths", lengths), c_kv.shape[1]
    if lengths.shape != shape[:1]:
        raise ValueError(f"lengths must be ({shape[0]},), one for each row of q_latent, got shape {lengths.shape}")
    if lengths.size and (lengths.min() < 0 or lengths.max() > capacity):
        raise ValueError(f"lengths must lie between 0 and {capacity}, got {lengths.tolist()}")

@functools.cache
def latent_kernel(element, columns):
    """The kernel for a type of the cache and so many columns a lane, compiled on first use."""
    if element == "float":
        return cuda.compile(LATENT_SPLIT, name="latent_split", template=(element, columns))
    return cuda.compile(HALF_HEADERS + LATENT_SPLIT, name="latent_split", template=(element, columns))

def latent_launch(q_latent, q_rope, c_kv, k_rope, lengths, scale, warps=32):
    """What launches the kernel: kernel, (grid, block, shared bytes), arguments. A block has at most `warps` heads.

    The sixth and seventh argument are the outputs of the splits and their log-sum-exps, to be written.
    """
    element, dtype = cache_type(c_kv, k_rope)
    c_kv, k_rope = cuda.on_device(c_kv, k_rope, dtype=dtype)
    q_latent, q_rope = (q.to(c_kv.device) for q in cuda.on_device(q_latent, q_rope))
    if q_rope.shape[-1] == 0:                                                   # a kernel's array holds at least one
        q_rope, k_rope = q_latent.new_zeros(1), c_kv.new_zeros(1)
    (batch, heads, d_latent), d_rope = q_latent.shape, q_rope.shape[-1] if q_rope.dim() == 3 else 0
    lengths = whole_numbers("lengths", lengths).astype(np.int32)
    n_splits, n_blocks = -(-int(lengths.max(initial=0)) // LATENT_SPLIT_KEYS), -(-heads // warps)
    columns = -(-(d_latent + d_rope) // 32)
    outs = q_latent.new_empty(batch * heads, n_splits, d_latent)
    lses = q_latent.new_empty(batch * heads, n_splits, dtype=torch.float64)
    launch = (batch, n_blocks, n_splits), (32, -(-heads // n_blocks)), 4 * LATENT_TILE_KEYS * 32 * columns
    arguments = (q_latent, q_rope, c_kv, k_rope, torch.from_numpy(lengths).to(c_kv.device), outs, lses, c_kv.shape[1],
                 heads, d_latent, d_rope, float(scale))
    return latent_kernel(element, columns), launch, arguments

# %% tags=["export", "plumbing"]
def latent_decode_attention_numpy(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    """One query for each head attends to a latent cache that is key and value of all heads, in NumPy.

    q_latent (batch, heads, d_latent), already through W_UK; q_rope (batch, heads, d_rope); c_kv (batch, capacity,
    d_latent) and k_rope (batch, capacity, d_rope), of which the first lengths[b] rows count, whatever stands behind
    them; lengths integers (batch,); scale a number, 1/sqrt(d_head + d_rope) of the keys that are never made.
    Returns the weighted latents (batch, heads, d_latent) in the float type of q_latent; a row of length 0 gets zeros.
    Raises ValueError when shapes or lengths do not fit. Source: DeepSeek-AI 2024 (arXiv 2405.04434), section 2.1.
    """
    check_latent_arguments(q_latent, q_rope, c_kv, k_rope, lengths)
    cuda.check_kind(np.ndarray, q_latent=q_latent, q_rope=q_rope, c_kv=c_kv, k_rope=k_rope)
    arrays = (array.astype(cuda.work_type(q_latent)) for array in (q_latent, q_rope, c_kv, k_rope))
    return cuda.like(absorbed_decode(*arrays, whole_numbers("lengths", lengths), float(scale)), q_latent)

def latent_decode_attention_torch(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    """latent_decode_attention_numpy in PyTorch: all rows at once, differentiable. Same arguments, shapes and errors."""
    check_latent_arguments(q_latent, q_rope, c_kv, k_rope, lengths)
    cuda.check_kind(torch.Tensor, q_latent=q_latent, q_rope=q_rope, c_kv=c_kv, k_rope=k_rope)
    work = cuda.work_type(q_latent)
    lengths = torch.from_numpy(whole_numbers("lengths", lengths)).to(q_latent.device)
    inside = torch.arange(c_kv.shape[1], device=q_latent.device) < lengths[:, None]           # (batch, capacity)
    # What lies behind the end may be anything, even nan: 0 * nan is nan, so it is replaced before the products.
    c, k_r = (cache.to(work).masked_fill(~inside[..., None], 0) for cache in (c_kv, k_rope))
    scores = (q_latent.to(work) @ c.mT + q_rope.to(work) @ k_r.mT) * float(scale)
    return cuda.like(masked_softmax(scores, inside[:, None]) @ c, q_latent)

# %% tags=["export", "plumbing"]
def latent_decode_attention_cuda(q_latent, q_rope, c_kv, k_rope, lengths, scale):
    """latent_decode_attention_numpy by two CUDA kernels: each row of the cache is read once for up to 32 heads.

    q_latent (batch, heads, d_latent), already through W_UK; q_rope (batch, heads, d_rope); c_kv (batch, capacity,
    d_latent) and k_rope (batch, capacity, d_rope), of which the first lengths[b] rows count; lengths integers (batch,);
    scale a number. NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU; lengths may lie anywhere.
    A contiguous cache in float32, float16 or bfloat16 is read in place, any other is copied to float32. Computed in
    single precision. Returns the weighted latents (batch, heads, d_latent) in the kind and type of q_latent; a row of
    length 0 gets zeros. Not differentiable. d_latent + d_rope up to 768 with 48 KB of shared memory.
    Raises ValueError when shapes or lengths do not fit. Source: DeepSeek-AI 2024 (arXiv 2405.04434), § 2.1.
    """
    check_latent_arguments(q_latent, q_rope, c_kv, k_rope, lengths)
    (batch, heads, d_latent), longest = q_latent.shape, int(whole_numbers("lengths", lengths).max(initial=0))
    (out,) = cuda.on_device(q_latent)
    out = torch.zeros_like(out)
    if out.numel() and longest:
        kernel, launch, arguments = latent_launch(q_latent, q_rope, c_kv, k_rope, lengths, scale)
        kernel.fast[launch](*arguments)
        outs, lses = arguments[5:7]
        merge_kernel().fast[batch * heads, 32, 4 * outs.shape[1]](outs, lses, out, outs.shape[1], d_latent)
    return cuda.like(out, q_latent)

# %% [markdown]
# **The encoder of lecture 01**: one layer of MiniLM with its 12 heads.

# %% tags=["export", "plumbing"]
class EncoderLayer(NamedTuple):
    """One attention layer of MiniLM on one sentence: x (n, 384), w_k and w_v (384, 384), queries (12, n, 32)."""

    tokens: list
    x: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    queries: np.ndarray


@torch.no_grad()
def encoder_layer(sentence, layer):
    """The attention layer number `layer` of MiniLM, in float64. Keys and values without their biases."""
    model, tokenizer = data.minilm()
    inputs = tokenizer(sentence, return_tensors="pt")
    x = model(**inputs, output_hidden_states=True).hidden_states[layer][0].double()
    own = model.encoder.layer[layer].attention.self
    w_q, w_k, w_v = (part.weight.double().T for part in (own.query, own.key, own.value))
    queries = (x @ w_q + own.query.bias.double()).unflatten(1, (12, 32)).transpose(0, 1)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    return EncoderLayer(tokens, *(array.numpy() for array in (x, w_k, w_v, queries)))


@torch.no_grad()
def encoder_inputs(layer, length=128):
    """What enters a layer of MiniLM for the prose of this course: (n, 384) float64, one row a token."""
    model, tokenizer = data.minilm()
    ids = tokenizer(data.course_prose(), add_special_tokens=False, verbose=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    ends = (torch.full((len(rows), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    first, last = ends
    states = model(input_ids=torch.cat([first, rows, last], dim=1), output_hidden_states=True).hidden_states
    return states[layer].flatten(0, 1).double().numpy()

# %% [markdown]
# **The language model**: what enters its layers, and the same model with other keys and values.

# %% tags=["export", "plumbing"]
def layer_inputs(model, ids):
    """What enters the attention of each layer of a LanguageModel on ids (1, n): a list of arrays (n, d_model) float64."""
    kept = []
    hooks = [block.attention.register_forward_pre_hook(lambda _, given: kept.append(given[0][0].double().numpy()))
             for block in model.blocks]
    try:
        with torch.no_grad():
            model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def with_weights(model, change):
    """A copy of a LanguageModel with change(layer, w_k, w_v) for the weights of its keys and values; all else is shared."""
    shared = {id(part): part for part in (*model.parameters(), model.tokenizer)}
    other = copy.deepcopy(model, shared)
    for layer, block in enumerate(other.blocks):
        new = change(layer, block.attention.w_k, block.attention.w_v)
        block.attention.w_k, block.attention.w_v = (nn.Parameter(w, requires_grad=False) for w in new)
    return other

# %% [markdown]
# **The readers of 9.8**: language models of characters that differ in their attention alone.

# %% tags=["export", "plumbing"]
class MultiQueryAttention(nn.Module):
    """All heads share one key and one value, as a layer of TransformerLM."""

    def __init__(self, d_model, n_heads, positions):
        super().__init__()
        self.n_heads, self.positions = n_heads, positions
        shapes = {"w_q": d_model, "w_k": d_model // n_heads, "w_v": d_model // n_heads, "w_o": d_model}
        for name, columns in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(d_model, columns) * d_model**-0.5))

    def forward(self, x, mask=None, causal=False, positions=None, cache=None):
        q = self.positions.rotate(split_heads(x @ self.w_q, self.n_heads), positions)
        k = self.positions.rotate((x @ self.w_k)[:, None], positions)
        p = masked_softmax(q @ k.mT / math.sqrt(q.shape[-1]), mask, causal)
        return merge_heads(p @ (x @ self.w_v)[:, None]) @ self.w_o


def train_reader(name, seed, steps=120):
    """A TransformerLM of two layers of 64 with four heads and "MHA", "GQA-1" or "MLA", trained on characters."""
    layers = {
        "MHA": lambda config, layer, positions: MultiHeadAttention(64, 4, positions),
        "GQA-1": lambda config, layer, positions: MultiQueryAttention(64, 4, positions),
        "MLA": lambda config, layer, positions: MultiHeadLatentAttention(64, 4, 16, 24, 8),
    }
    text = data.characters()
    model = TransformerLM(TransformerConfig(len(text.alphabet)), layers[name], Rotary(16))
    training.initialise(model.double(), seed)
    training.fit(model, training.windows(text.corpus, 32, 12, seed), training.next_token_loss, steps, lr=8e-3)
    return model


@functools.cache
def held_out():
    """128 stretches of held-out text, (128, 33)."""
    return next(training.windows(data.characters().held_out, 32, 128, seed=99))


@torch.no_grad()
def held_out_loss(model):
    """The mean loss on held-out text, in nats a character."""
    return float(training.next_token_loss(model, held_out()))


def bigram_loss():
    """The same of a table that knows how often each character follows each other one in the corpus."""
    text, ids = data.characters(), held_out()
    pairs = np.full((len(text.alphabet),) * 2, 0.1)
    np.add.at(pairs, (text.corpus[:-1].numpy(), text.corpus[1:].numpy()), 1)
    logs = np.log(pairs / pairs.sum(1, keepdims=True))
    return float(-logs[ids[:, :-1].numpy(), ids[:, 1:].numpy()].mean())

# %% [markdown]
# ## Glossary
#
# |term|what it is|
# |---|---|
# |absorption|moving $W_{UK}$ to the query and $W_{UV}$ to the output, so that no key or value is made|
# |decode, prefill|one new token against a cache; reading a whole prompt|
# |decoupled RoPE|a few columns for the rotation alone, with one key for all heads|
# |energy, rank|sum of squared singular values; how many directions there are|
# |expanded form|keys and values of each head made from the latent|
# |latent, $d_c$|the vector from which a token's keys and values are made; its width|
# |MHA, GQA, MQA, MLA|a key head for each query head; for each group; one for all; one latent for all|
# |singular values|how far rows spread along the best directions, from the largest down|
# |tensor parallelism|each device has some of the heads|
#
# ## Sources
#
# DeepSeek-AI 2024, DeepSeek LLM (arXiv 2401.02954), V2 (2405.04434) and V3 (2412.19437) · Eckart and Young 1936 (Psychometrika 1) · Shazeer 2019, MQA
# (1911.02150) · Ainslie et al. 2023, GQA (2305.13245) · Meng et al. 2025, TransMLA (2502.07864) · Zadouri et al. 2025, GTA and GLA
# (2505.21487) · Wang et al. 2020, Linformer (2006.04768), and MiniLM (2002.10957) · Allal et al. 2025, SmolLM2 (2502.02737) · QK-normed MLA
# (2606.16310) · FlashMLA (github.com/deepseek-ai/FlashMLA) · transformers 5.23.0.
