# ---
# jupyter:
#   course:
#     edition: 2
#     experiments:
#     - head_inputs
#     - masked_form
#     - mamba2_form
#     - delta_form
#     - references
#     - mamba_parts
#     - LearnedFeatures
#     - Imitation
#     - RecallMixer
#     - RecallModel
#     - recall_batches
#     - recall_loss
#     - recall_accuracy
#     - train_recall
#     - ParityModel
#     - parity_batches
#     - parity_loss
#     - train_parity
#     - parity_accuracy
#     module: linear
#     public:
#     - linear_attention_numpy
#     - linear_attention_torch
#     - linear_attention_cuda
#     - selective_scan_numpy
#     - selective_scan_torch
#     - selective_scan_cuda
#     - chunked_attention
#     - memory_step
#     - scan
#     - favor_features
#     - stream
#     - wkv
#     - long_convolution
#     - Mamba
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["slide"]
# # Lecture 10 · Linear and state-space attention
#
# **The question.** Can a fixed state replace the cache? **You will be able to** *write* attention that walks in chunks with
# a state (10A), *train* features that imitate softmax (10B), *correct* a memory with three knobs (10C), *build* the scan and
# the layer of Mamba (10D, 10E), *test* the hand-over of a state (10F), *keep* the state on the chip in CUDA (10G).
# **You need** attention, modules and training steps (lecture 01), the cache (lecture 05), tiles (lecture 06).
#
# | part or section | core minutes | more minutes |
# |---|---|---|
# | Part 1 · one state for all tokens: 10.1, exercises 10A, 10C | 70 | |
# | Part 2 · state spaces: 10.2, 10.3, exercises 10D, 10E | 65 | |
# | Part 3 · CUDA: 10.4, exercise 10G | 35 | |
# | Part 4 · does it matter: 10.5, 10.6 | 10 | |
# | Another day: 10B, 10F; going further: 10.7 to 10.15 | | 105 |
# | **together** | **180** | **105** |

# %% [markdown] tags=["teacher"]
# **For the teacher: two times 50 minutes, ten to spare in each.** Run everything before class.
#
# - *Hour 1 (40).* 10.1: six facts, cache and state (6) · brackets moved, three forms, the flow figure, what 10A asks (11) · 10.1:
#   features, elu and learned, on the head that finds "animal" (8) · 10.1: the table of three knobs, overwriting, what 10C asks
#   (9) · 10.1: capacity, then parity by hand (6).
# - *At home after hour 1.* 10A, 10C. For volunteers 10B.
# - *Hour 2 (40).* 10.2: three ways to take a step, the HiPPO figure (9) · 10.3: selection by hand, what 10D asks (8) · 10.3: a
#   scan is a masked matrix; the layer of 10E (8) · 10.4: the state stays on the chip (7) · 10.5: recall against the size of
#   the state, the crossing (8).
# - *At home after hour 2.* 10D, 10E. For volunteers 10F, 10G.
# - *Board.* $o_i=q_i^\top\sum_j k_jv_j^\top$, the bracket moved; under it $S\leftarrow S+k\,v^\top$.
# - *Always works.* After 10C: let the class say who moves where, append it to `facts` and to `k` and `v`, and run the three memories again.
# - *Checkpoint 1.* A head has keys of 128 and values of 128. After how many tokens is its cache as large as its state? (64 in
#   numbers, two rows of 128 a token; 128 in the bytes of 10.5.) *Checkpoint 2.* Which of the three knobs lets a memory forget one fact and keep the others? (The third:
#   erasing along the key.)
# - *Skip first.* The random features of 10.1 and the rounded state of 10.6 (6 minutes): both read well at home.
# - *Questions that come.* Is it an RNN? Yes, one whose steps are linear in the state, so that they can be taken in any order
#   of brackets. Why not always hybrids? Most new models are (10.14).

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
# ## Part 1 · One state for all tokens
#
# A cache grows with every token (lecture 05). Suppose instead that all a model keeps is **one matrix** of fixed size. Four facts
# arrive. A key is a name, a unit vector of 8 numbers; a value is a city, one number for each of four. The matrix adds up
# $k\,v^\top$ and keeps nothing else.
#
# *Predict.* Can the matrix still say where Anna is?

# %% tags=["first-attention", "slide"]
from attention.fundamentals import softmax

people, cities = ["Anna", "Ben", "Cleo", "Dora"], ["Paris", "Rome", "Oslo", "Bern"]
names = np.random.default_rng(0).standard_normal((4, 8))
names = names / np.linalg.norm(names, axis=1, keepdims=True)
facts = [(0, 0), (1, 1), (2, 2), (3, 3), (1, 0), (0, 2)]  # (person, city)
k = np.stack([names[person] for person, _ in facts])  # (6, 8)
v = np.stack([np.eye(4)[city] for _, city in facts])  # (6, 4)
anna = names[0]

def show(what, answer):
    rounded = np.round(answer, 2) + 0.0  # no -0.00
    print(f"{what:26s}", *(f"{c} {a:5.2f} " for c, a in zip(cities, rounded)))

show("cache, 4 keys, 4 values:", softmax(8 * anna @ k[:4].T) @ v[:4])
memory = sum(np.outer(k[j], v[j]) for j in range(4))  # (8, 4), always
show("state of 8 x 4 numbers:", anna @ memory)

# %% [markdown]
# It can. Anna is in Paris, 1.00, as in the cache. The rest is no rounding: Dora's key is not orthogonal to Anna's, so her city
# is heard too, with **-0.47**. Both numbers will come out of every form below. (The cache's scores are multiplied by 8, so that
# softmax points.) The last two facts move Ben and Anna; that a state should then forget comes at the end of 10.1.
#
# ### 10.1 Linear attention mechanisms
#
# **Where have the scores gone?** Leave out the softmax, and brackets may be moved (as in lecture 09, section 9.3):
#
# $$o_i=\sum_{j\le i}(q_i\cdot k_j)\,v_j=q_i^\top\sum_{j\le i}k_jv_j^\top=q_i^\top S_i\qquad S_i=S_{i-1}+k_iv_i^\top$$
#
# |form|what is made|operations for $n$ tokens, causal|used|
# |---|---|---|---|
# |**parallel**|all scores, $n\times n$|$n^2(d_k+d_v)$|training, short texts|
# |**recurrent**|a state, $d_k\times d_v$|$4\,n\,d_kd_v$|writing|
# |**chunked**|both, in pieces of $C$|$n\,C\,(d_k+d_v)+4\,n\,d_kd_v$|training and prompts|
#
# (A multiplication and an addition are two operations; half of the scores are not needed.) On the left of the equation $i$ scores
# belong to a query, on the right none. Katharopoulos et al. (2020) put a **feature map**
# in place of softmax, $\phi(q)\cdot\phi(k)$ with $\phi=\text{elu}+1$, and divide by the sum of the weights. Below, `q` and `k` are features already.
#
# *Predict.* Anna is asked for after each of the six facts. Do parallel and recurrent form agree, and after which facts does the
# answer change?

# %%
q = np.tile(anna, (6, 1))  # (6, 8): the same question after each fact
parallel = np.tril(q @ k.T) @ v  # (6, 6) scores, zeros above the diagonal

state, recurrent = np.zeros((8, 4)), np.zeros((6, 4))
for i, (person, city) in enumerate(facts):
    state += np.outer(k[i], v[i])
    recurrent[i] = q[i] @ state
    show(f"{people[person]:4s} is in {cities[city]:5s}", recurrent[i])
print(f"parallel form, largest difference {np.abs(parallel - recurrent).max():.6f}")

# %% [markdown]
# They agree. After each one: every new key is heard a little in every answer. The row of the fourth fact is the first cell's, 1.00
# and -0.47. Now in **chunks** of $C$ tokens. What came before a chunk lies in the state, what is inside it is a small
# square of scores:
#
# $$O=\underbrace{Q_cS}_{\text{before}}+\underbrace{\text{tril}(Q_cK_c^\top)\,V_c}_{\text{inside}}\qquad S\leftarrow S+K_c^\top V_c$$

# %% tags=["slide"]
before = k[:3].T @ v[:3]  # the state after the first chunk of three
chunk_scores = np.tril(q[3:] @ k[3:].T)
plotting.flow(
    {"S before": before, "Q of chunk": q[3:], "K of chunk": k[3:], "V of chunk": v[3:],
     "scores": chunk_scores, "S after": before + k[3:].T @ v[3:],
     "O of chunk": q[3:] @ before + chunk_scores @ v[3:]},
    [(("Q of chunk", "K of chunk"), "scores", "tril(q kᵀ)"),
     (("S before", "Q of chunk", "scores", "V of chunk"), "O of chunk",
      "q S + scores · v"),
     (("S before", "K of chunk", "V of chunk"), "S after", "S + kᵀ v")],
    title="A chunk reads the state once and hands it on")
plotting.show("Data flow of the second chunk of three tokens: queries meet the state "
              "before and the scores inside; keys and values are added to the state.")

# %% [markdown] tags=["slide"]
# #### Exercise 10A: chunk by chunk  (difficulty 3 of 5, essential, 20 minutes; if you do only two)
#
# Write causal linear attention, chunk after chunk, with a state between them.
#
# |argument|shape|meaning|
# |---|---|---|
# |`q`, `k`|`(..., n, d_k)`|features of queries and keys|
# |`v`|`(..., n, d_v)`|values|
# |`chunk`|int, at least 1|tokens of a chunk; the last one may be shorter|
# |`state`|`(..., d_k, d_v)` or `None`|what came before; `None`: nothing|
#
# Returns `(out, state)`: the outputs `(..., n, d_v)`, neither scaled nor divided by a sum, and the state after the last token, in
# the float type of `q`. The check
# watches the memory: scores of all tokens are never made at once.
#
# <details><summary>Hint</summary>
#
# Which rows of q, k and v belong to the chunk that begins at `first`, also when it is the last? Which of the two products uses the
# state from *before* the chunk, and when is the state moved on? What does `np.tril` do with leading axes? Does the state that
# was handed in stay as it was?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def chunked_attention(q, k, v, chunk, state=None):
    """Causal linear attention in chunks: (out, the state after the last token).

    q, k (..., n, d_k), v (..., n, d_v), state (..., d_k, d_v) or None for zeros;
    chunk at least 1, ValueError otherwise. Source: Hua et al. 2022 (arXiv 2202.10447).
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    ### BEGIN SOLUTION
    if state is None:
        state = np.zeros((*q.shape[:-2], q.shape[-1], v.shape[-1]), q.dtype)
    out = np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    for first in range(0, q.shape[-2], chunk):
        rows = slice(first, first + chunk)
        q_c, k_c, v_c = q[..., rows, :], k[..., rows, :], v[..., rows, :]
        inside = np.tril(q_c @ k_c.swapaxes(-1, -2)) @ v_c
        out[..., rows, :] = q_c @ state + inside
        state = state + k_c.swapaxes(-1, -2) @ v_c
    return out, state
    ### END SOLUTION

# %%
chunked_attention = check("10A", chunked_attention)

# %% [markdown]
# Any chunk must give the same, also where it does not divide the length: a chunk of 1 is the recurrent form, one of $n$ the
# parallel form.
#
# *Predict.* Facts 5 and 6 go into a second call, with the state of the first. What is its last answer for Oslo, and what would it be
# without that state?

# %%
for chunk in (1, 2, 3, 4, 6, 100):
    in_chunks, last = chunked_attention(q, k, v, chunk)
    gap = np.abs(in_chunks - parallel).max()
    print(f"chunk {chunk:3d}: after four facts Paris {in_chunks[3, 0]:.2f}, Bern "
          f"{in_chunks[3, 3]:.2f}, difference to the parallel form {gap:.6f}")
two_calls = chunked_attention(q[4:], k[4:], v[4:], 4,
                              chunked_attention(q[:4], k[:4], v[:4], 4)[1])
print(f"state handed over after fact 4: last answer Oslo {two_calls[0][-1, 2]:.2f}, "
      f"in one call {parallel[-1, 2]:.2f}")

# %% [markdown]
# Oslo 1.10, as in one call; without the state 1.00, from the sixth fact alone. And all chunks agree. A chunk of 1 reads and writes the state at every
# token, a chunk of $n$ makes $n^2$ scores: between them lies the form that is trained with (section 10.4 counts it).
#
# #### Which features?
#
# **Can features give softmax itself?** Yes, with infinitely many. For random $w\sim N(0,I)$ the mean of
# $e^{w\cdot q-|q|^2/2}\,e^{w\cdot k-|k|^2/2}$ is $e^{q\cdot k}$. With $m$ of them and the mean over the $w$ this is **FAVOR+**, the Performer
# (Choromanski et al. 2021); the estimate is unbiased and positive. Sines and cosines would be unbiased too.
#
# *Predict.* Four times as many features: how much smaller is the error? And if queries and keys are twice as long, as vectors?

# %% tags=["export"]
def favor_features(x, w):
    """Positive random features of x (..., d): (..., m), for w (m, d) of N(0, 1).

    The mean of favor_features(q, w) · favor_features(k, w) is exp(q · k).
    Source: Choromanski et al. 2021 (arXiv 2009.14794), § 2.3.
    """
    with_w = x @ w.T - (x * x).sum(-1, keepdims=True) / 2
    return np.exp(with_w) / math.sqrt(len(w))

# %%
def row_errors(size, counts=(16, 64, 256, 1024, 4096)):
    """Mean distance of a row of weights from softmax's, over 5 draws: one a count."""
    rng = np.random.default_rng(1)
    q, k = size * rng.standard_normal((2, 64, 16))
    exact, found = softmax(q @ k.T), []
    for m in counts:
        off = []
        for _ in range(5):
            w = rng.standard_normal((m, 16))
            weights = favor_features(q, w) @ favor_features(k, w).T
            weights /= weights.sum(1, keepdims=True)
            off.append(np.abs(weights - exact).sum(1).mean())
        found.append(np.mean(off))
    return np.array(counts), np.array(found)

errors = {"queries and keys of length 1": row_errors(0.25),
          "twice as long": row_errors(0.5)}
slopes = plotting.scaling(errors, xlabel="random features m",
                          ylabel="distance from softmax's weights",
                          title="More features help slowly, large queries undo it")
plotting.show("Distance from the softmax weights against the number of features, both "
              "logarithmic: two falling lines, the one for larger queries far higher.")
for name, (_, found) in errors.items():
    print(f"{name:30s} {found[0]:.2f} with 16, {found[-1]:.2f} with 4,096, "
          f"slope {slopes[name]:.2f}")

# %% [markdown]
# A slope of $-1/2$ halves the error for four times the features; short vectors come near it, long ones do not: the variance
# grows exponentially with the squared length. And with $m$ features the state has $m\times d_v$ numbers. (Sines and cosines also
# give *negative* weights, and their sum, by which one divides, can come near 0.)
#
# #### Exercise 10B: features that imitate  (difficulty 3 of 5, useful, 15 minutes)
#
# Features can also be **learned**. In lecture 01 *it* put 0.68 on *animal*; that head has softmax. Hedgehog (Zhang et al. 2024, arXiv
# 2402.04347) trains small maps $\phi_q,\phi_k$ so that linear weights imitate the head's: cross-entropy between the two rows.
# Write one step of this training.
#
# |argument|shape|meaning|
# |---|---|---|
# |`features`|a module|`features.of_q(q)`, `features.of_k(k)`: positive features `(batch, n, m)`|
# |`optimiser`||of its parameters|
# |`q`, `k`|`(batch, n, d)`|queries and keys of the head to imitate, not causal|
#
# $$p=\text{softmax}\big(qk^\top/\sqrt d\big)\qquad w_{ij}=\frac{\phi_q(q_i)\cdot\phi_k(k_j)}{\sum_l\phi_q(q_i)\cdot\phi_k(k_l)}\qquad
#   L=-\frac1{\text{rows}}\sum_i\sum_jp_{ij}\log w_{ij}$$
#
# Returns the loss as a number, from before the step. The gradients replace those that were there.
#
# <details><summary>Hint</summary>
#
# Over how many rows is the mean, with a batch? Which of p and w needs a gradient? What does `backward` do with gradients that are
# there already, and in which order come `zero_grad`, `backward`, `step`?
#
# </details>

# %% tags=["exercise", "export"] kind="training"
def imitation_step(features, optimiser, q, k):
    """One step of features towards the softmax weights of q and k (batch, n, d).

    Returns the loss, a float: the mean cross-entropy of a row, before the step.
    Source: Zhang et al. 2024 (arXiv 2402.04347).
    """
    ### BEGIN SOLUTION
    p = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    w = features.of_q(q) @ features.of_k(k).mT
    w = w / w.sum(dim=-1, keepdim=True)
    loss = -(p * w.log()).sum(dim=-1).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()
    ### END SOLUTION

# %%
imitation_step = check("10B", imitation_step)

# %% [markdown]
# The head of lecture 01 (MiniLM, layer 3, head 1) on our sentence; the features, 64 for a key of 32, learn from other texts.
#
# *Predict.* Of softmax's 0.68, how much does elu + 1 leave on "animal"? And learned features after 100 steps?

# %% tags=["slide", "approx"] approx={"numbers": 0.1, "picture": 0.05}
from attention.experiments.linear import Imitation, head_inputs

tokens, q_it, k_it, q_texts, k_texts = head_inputs("The animal didn't cross the "
                                                   "street because it was too tired.")
it, animal = tokens.index("it"), tokens.index("animal")
imitation = training.initialise(Imitation(32, 32).double(), seed=0)
optimiser = torch.optim.Adam(imitation.parameters(), lr=0.02)
draw, losses = np.random.default_rng(0), []
for step in range(100):
    rows = torch.from_numpy(draw.integers(len(q_texts), size=16))
    losses.append(imitation_step(imitation, optimiser, q_texts[rows], k_texts[rows]))

with torch.no_grad():
    maps = {"elu + 1": (nn.functional.elu(q_it) + 1, nn.functional.elu(k_it) + 1),
            "learned": (imitation.of_q(q_it), imitation.of_k(k_it))}
    said = {"softmax": torch.softmax(q_it @ k_it.T / math.sqrt(32), dim=-1)}
    said |= {name: nn.functional.normalize(a @ b.T, p=1, dim=-1)
             for name, (a, b) in maps.items()}
print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} at the end")
for name, weights in said.items():
    print(f"{name:8s} it -> animal {weights[it, animal]:.2f}")

# %% tags=["approx"] approx={"numbers": 0.1, "picture": 0.05}
plotting.matrix(torch.stack([w[it] for w in said.values()]).numpy(), list(said), tokens,
                title="elu + 1 spreads what softmax points at; learned features point",
                label="weight of the query 'it'")
plotting.show("Three rows of weights over the sixteen tokens: softmax mostly on "
              "animal, elu + 1 nearly even, learned features again highest on animal.")

# %% [markdown]
# elu + 1 is nearly even over the sixteen tokens: it cannot **point**. Learned features can, with a state of $64\times32$
# (and they point at *street* too, which softmax hardly does).
#
# **And a whole model?** SmolLM2 with elu + 1 in place of softmax, not trained for it, in some of its 30 layers.
#
# *Predict.* Its loss is 2.78, guessing costs 10.8. What does one linear layer cost, what do five, what do all thirty?

# %% tags=["language-model", "slide"]
from attention import linear
from utils import language_model

smollm = language_model.load()

def linear_layer(q, k, v, causal=True):
    q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
    return linear.linear_attention_torch(q, k, v, causal, normalise=True)

if smollm:
    prose, extra = language_model.excerpt(smollm, 256), {}
    right = smollm.losses(prose).mean()
    for name, chosen in (("layer 15", [15]), ("layers 25 to 29", range(25, 30)),
                         ("layers 0 to 4", range(5)), ("all 30", range(30))):
        parts = [linear_layer if i in chosen else smollm.parts.attention
                 for i in range(30)]
        changed = smollm.replace(attention=parts).losses(prose).mean()
        extra[name] = float(changed - right)
        print(f"{name:15s} loss {right:.2f} + {extra[name]:.2f}")
    plotting.bars(extra, ylabel="loss above the model's own (nats)",
                  title="One layer can be swapped untrained, thirty cannot")
    plotting.show("Bars of extra loss: 0.04 for layer 15, 0.37 for the last five "
                  "layers, several nats for the first five, one more for all thirty.")

# %% [markdown]
# One costs 0.04, the last five 0.37; the first five break the model, and all thirty cost one nat more than
# these. Its weights were trained for softmax: linear models are **trained** as such, or converted with training.
#
# #### A memory that can correct itself
#
# **What if a fact changes?** Anna moved to Oslo, Ben to Paris: six facts, two overwritten. A sum keeps both. Published models
# turn three knobs, all in one line:
#
# $$\tilde S=\text{diag}(\alpha_t)\,S_{t-1}\qquad S_t=\tilde S+\beta_t\,k_t\big(v_t-m\,\tilde S^\top k_t\big)^\top$$
#
# |model|$\alpha_t$: keep|$\beta_t$: write|$m$: erase first|
# |---|---|---|---|
# |linear attention (2020)|1|1|0|
# |RetNet, retention (2023)|a number for each head, fixed|1|0|
# |GLA, gated linear attention (2023)|a vector, from the token|1|0|
# |Mamba-2 (2024)|a number, from the token: $e^{\Delta_ta}$|$\Delta_t$|0|
# |DeltaNet (2021, 2024)|1|a number in (0, 1)|1|
# |Gated DeltaNet (2024)|a number, from the token|a number|1|
# |KDA, Kimi Delta Attention (2025)|a vector, from the token|a number|1|
#
# With $m=1$ the memory first asks itself what it would answer, and writes only the difference: the **delta rule**.

# %% [markdown] tags=["slide"]
# #### Exercise 10C: one line, three knobs  (difficulty 2 of 5, essential, 10 minutes)
#
# Write one step of the memory.
#
# |argument|shape|meaning|
# |---|---|---|
# |`state`|`(..., d_k, d_v)`|$S_{t-1}$|
# |`k`, `v`|`(..., d_k)`, `(..., d_v)`|key and value|
# |`decay`|`(..., d_k)` or `(..., 1)`|$\alpha_t$, for each row of the state or for all|
# |`beta`|`(..., 1)`|$\beta_t$|
# |`erase`|bool|$m$|
#
# Returns $S_t$ `(..., d_k, d_v)`, a new array.
#
# <details><summary>Hint</summary>
#
# Which axis of the state belongs to the key: which axis must `decay` and `k` get, so that they meet rows? What does the memory
# answer to k, *after* the decay? An outer product for any number of axes: `k[..., :, None] * new[..., None, :]`.
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def memory_step(state, k, v, decay, beta, erase):
    """One step of a linear memory: decay, then (perhaps) erase along k, then write.

    state (..., d_k, d_v), k (..., d_k), v (..., d_v), decay (..., d_k) or (..., 1),
    beta (..., 1). Returns the new state. Source: arXiv 2412.06464 and 2510.26692.
    """
    ### BEGIN SOLUTION
    state = decay[..., None] * state
    if erase:
        v = v - (k[..., None, :] @ state)[..., 0, :]
    return state + k[..., None] * (beta * v)[..., None, :]
    ### END SOLUTION

# %%
memory_step = check("10C", memory_step)

# %% [markdown]
# *Predict.* Where is Anna, after all six facts? The cache with softmax has no positions here; retention keeps 0.7 at each step.

# %% tags=["slide"]
one, keep = np.ones(1), np.full(1, 0.7)
knobs = {"sum": (one, False), "retention, 0.7": (keep, False),
         "delta rule": (one, True)}
memories = {}
for name, (decay, erase) in knobs.items():
    memory = np.zeros((8, 4))
    for key, value in zip(k, v):
        memory = memory_step(memory, key, value, decay, one, erase)
    memories[name] = memory
show("cache, softmax", softmax(8 * anna @ k.T) @ v)
for name, memory in memories.items():
    show(f"Anna, {name}", anna @ memory)
for name, memory in memories.items():
    show(f"Cleo, {name}", names[2] @ memory)

# %% [markdown]
# The sum, and the cache, mix the old city with the new one. Retention forgets the old one, and Cleo with it, who never moved.
# The delta rule answers Oslo 1.00, Paris 0.00, and keeps Cleo: it erases along one key. It is a step of gradient
# descent on $\frac12|S^\top k-v|^2$.
#
# Are these the published models? Each row of the table against an implementation that never walks token by token: the parallel form,
# or the chunked code of the transformers package (Mamba-2, Qwen3-Next, Kimi Linear; `references` stands in "Behind the scenes").
#
# *Predict.* Seven models, one function: how many of the seven agree with `walk` to five places?

# %%
import transformers

from attention.experiments.linear import references

transformers.logging.set_verbosity_error()  # it says which faster kernels are missing
rng = np.random.default_rng(3)
n, d = 100, 16
q_n, k_n, v_n = rng.standard_normal((3, n, d))
q_n, k_n = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (q_n, k_n))
beta = rng.uniform(0.1, 0.9, (n, 1))
number, vector = (-rng.uniform(0, 0.3, shape) for shape in ((n, 1), (n, d)))  # log α
zero, ones, fixed = np.zeros((n, 1)), np.ones((n, 1)), np.full((n, 1), math.log(0.9))

def walk(log_decay, beta, erase):
    """The recurrent form: an output (n, d) from one state."""
    state, out = np.zeros((d, d)), np.zeros((n, d))
    for t in range(n):
        state = memory_step(state, k_n[t], v_n[t], np.exp(log_decay[t]), beta[t], erase)
        out[t] = q_n[t] @ state
    return out

# %%
models = {"linear attention": (zero, ones, False), "retention": (fixed, ones, False),
          "GLA": (vector, ones, False), "Mamba-2": (number, beta, False),
          "DeltaNet": (zero, beta, True), "Gated DeltaNet": (number, beta, True),
          "Kimi Delta Attention": (vector, beta, True)}
for name, turned in models.items():
    ours, other = walk(*turned), references[name](q_n, k_n, v_n, *turned[:2])
    print(f"{name:21s} last output {ours[-1, 0]:6.3f}, theirs {other[-1, 0]:6.3f}, "
          f"largest difference {np.abs(ours - other).max():.5f}")

# %% [markdown]
# All seven, though some of theirs compute in single precision: one line is seven models. (Two traps in it: the decay comes *before* the error is measured, and $1/\sqrt{d_k}$ multiplies `q` after
# it was normalised.)
#
# *Predict.* The delta rule repairs what was overwritten. Does it also let the memory hold **more** keys?

# %% tags=["slide"]
def recalled(n, erase, d=64, seeds=3):
    """Share of n random unit keys whose own value is the nearest to the answer."""
    right = []
    for seed in range(seeds):
        k, v = np.random.default_rng(seed).standard_normal((2, n, d))
        k, v = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (k, v))
        state = np.zeros((d, d))
        for key, value in zip(k, v):
            state = memory_step(state, key, value, np.ones(1), np.ones(1), erase)
        right.append(((k @ state @ v.T).argmax(1) == np.arange(n)).mean())
    return np.mean(right)

counts = np.array([16, 32, 48, 64, 96, 128, 192, 256])
held = {name: np.array([recalled(n, erase) for n in counts])
        for name, erase in (("linear", False), ("delta rule", True))}
for name, found in held.items():
    print(f"{name:10s}", *(f" {n}: {f:.2f}" for n, f in zip(counts, found)))
plotting.curves(held, x=counts, xlabel="random keys written into a state of 64 x 64",
                ylabel="answers whose value is nearest",
                title="The delta rule does not hold more random keys: it holds fewer")
plotting.show("Share of keys recalled against their number: the sum stays near one up "
              "to 128 keys, the delta rule falls from 64 on.")

# %% [markdown]
# No: at 128 keys the sum still finds 98 %, the delta rule half. To put the newest key right it bends the answers of older ones
# that overlap with it. **It fixes overwriting, not capacity** (for random keys; a trained model may learn keys that overlap less).
#
# **Keys must be normalised.** Along $k$ the step multiplies the old answer by $1-\beta|k|^2$.
#
# *Predict.* 64 writes with Gaussian keys of 64 numbers, $|k|^2\approx64$, $\beta=1$. How large does the state become?

# %%
rng = np.random.default_rng(0)
for name, scaled in (("unit keys", True), ("keys as drawn", False)):
    state = np.zeros((64, 64))
    for _ in range(64):
        key, value = rng.standard_normal((2, 64))
        key = key / np.linalg.norm(key) if scaled else key
        state = memory_step(state, key, value, np.ones(1), np.ones(1), True)
    power = np.log10(np.linalg.norm(state))
    print(f"{name:13s} norm of the state: 10 to the power {power:.0f}")
print(f"factor along k: {1 - 1:.0f} for unit keys, about {1 - 64} for keys as drawn")

# %% [markdown]
# (44, and not 115 as $63^{64}$: only a part of the state lies along the next key.) $|1-\beta|k|^2|$ must not exceed 1, so
# $\beta|k|^2\le2$. For unit keys the factor is $1-\beta$, an **eigenvalue** of the step. Most models keep $\beta$ below 1.
#
# *Predict.* Is the number of ones so far odd? What must $\beta$ be at a one, so that a state of one number keeps count by its sign?

# %%
bits = np.random.default_rng(5).integers(0, 2, 1000)
for name, largest in (("beta up to 1", 1.0), ("beta up to 2", 2.0)):
    sign, right = np.ones((1, 1)), 0
    for t, bit in enumerate(bits):
        sign = memory_step(sign, np.ones(1), np.zeros(1), np.ones(1),
                           np.array([largest * bit]), True)
        right += (sign[0, 0] < 0) == bits[:t + 1].sum() % 2
    print(f"{name}: sign {sign[0, 0]:4.1f} at the end, parity right at {right} of 1000")

# %% [markdown]
# 2: then each one flips the sign, exactly, for ever (a reflection). With $\beta\le1$ no eigenvalue is negative and the sign cannot
# come back (Grazzi et al. 2024, arXiv 2411.12537). In softmax attention one bit of $n$ moves the output by $O(1/n)$ only (Hahn
# 2020, arXiv 1906.06755); weights that find parity exist, but have to be constructed (Chiang and Cholak 2022, arXiv 2202.12172). That is **state
# tracking**, the one thing here that a state does better than a cache; section 10.10 trains it, Olmo-Hybrid allows negative eigenvalues for it (10.14).

# %% [markdown] tags=["slide"]
# ## Part 2 · State spaces
#
# ### 10.2 State space models
#
# **What is the state of something that changes smoothly?** Engineers describe it by a differential equation: an input $x$ pushes
# a state $h$, which fades by itself ($a<0$), and an output looks at it,
#
# $$h'(t)=a\,h(t)+b\,x(t)\qquad y(t)=c\cdot h(t)$$
#
# Text comes in steps. Over a step of length $\Delta$ the state fades by $e^{\Delta a}$, exactly; what the input adds is an integral,
# and there are several ways to take it:
#
# |way|added in a step|used by|
# |---|---|---|
# |Euler|$\Delta\,b\,x_t$|Mamba's and Mamba-2's code|
# |zero-order hold: $x$ constant during the step|$\frac{e^{\Delta a}-1}{a}\,b\,x_t$|S4D; Mamba's paper, equation 4|
# |trapezoid: the mean of both ends|$\frac\Delta2(e^{\Delta a}b\,x_{t-1}+b\,x_t)$|Mamba-3 (arXiv 2603.15569), with a share of the ends from the token|
#
# *Predict.* $h'=-h+\sin t$ has a known solution. What does half the step do to each way's error?

# %% tags=["slide"]
ways = {"Euler": lambda e, dt, before, now: dt * now,
        "zero-order hold": lambda e, dt, before, now: (1 - e) * now,
        "trapezoid": lambda e, dt, before, now: dt / 2 * (e * before + now)}
exact = (math.sin(2) - math.cos(2) + math.exp(-2)) / 2  # h(2), from h(0) = 0
steps, off = np.array([0.2, 0.1, 0.05, 0.025]), {}
for name, added in ways.items():
    off[name] = (steps, [])
    for dt in steps:
        h, e = 0.0, math.exp(-dt)  # a = -1
        for t in range(round(2 / dt)):
            h = e * h + added(e, dt, math.sin(t * dt), math.sin((t + 1) * dt))
        off[name][1].append(abs(h - exact))
    print(f"{name:16s}", *(f"step {dt}: {x:.5f} "
                           for dt, x in zip(steps, off[name][1])))
plotting.scaling(off, xlabel="step Δ", ylabel="error of h(2)",
                 title="Euler and hold are of first order, trapezoid of second")
plotting.show("Error against the step, logarithmic: two parallel lines of slope one "
              "and a steeper one, of slope two, far below.")

# %% [markdown]
# Half for the first two, a quarter for the third.
#
# **Trap.** *"Mamba discretises with a zero-order hold."* Its paper does; its code does so for $A$ and takes Euler for $B$, "slightly
# simpler without affecting empirical performance" (the author, state-spaces/mamba issue 114). The contract of this lecture is the code's.
#
# #### A recurrence that is a convolution
#
# If $a$, $b$, $c$ and $\Delta$ are the same at every step, the model is **time-invariant**, and the recurrence can be unrolled:
# $y_t=\sum_jK_j\,x_{t-j}$ with $K_j=c\,(e^{\Delta a})^j\,\Delta b$. That is a convolution as long as the text, and the Fourier transform
# (FFT) does it in $n\log n$ steps.
#
# *Predict.* The FFT takes signals for periodic. What does it hear at the first token, if no zeros are put behind the text?

# %%
a_n = -np.arange(1, 17) / 16.0  # (16,): decays of 16 states
rng = np.random.default_rng(0)
(b_n, c_n), signal = rng.standard_normal((2, 16)), rng.standard_normal(200)
step_size, h, by_steps = 0.1, np.zeros(16), np.zeros(200)
for t in range(200):
    h = np.exp(step_size * a_n) * h + step_size * b_n * signal[t]
    by_steps[t] = c_n @ h
kernel = np.exp(step_size * a_n * np.arange(200)[:, None]) @ (c_n * step_size * b_n)
for name, length in (("with 200 zeros", 400), ("without zeros", 200)):
    product = np.fft.rfft(kernel, length) * np.fft.rfft(signal, length)
    by_fft = np.fft.irfft(product, length)[:200]
    print(f"FFT {name}: first output {by_fft[0]:6.3f} (recurrence {by_steps[0]:6.3f}), "
          f"largest difference {np.abs(by_fft - by_steps).max():.6f}")

# %% [markdown]
# The **end** of the text: without padding the future leaks into the past. With it, recurrence and convolution are one.
#
# #### Which matrix remembers?
#
# Many states, each fading at its own speed: which speeds keep most of the past? HiPPO (Gu et al. 2020) asks for the best approximation
# of *all* that came so far by polynomials, and finds a matrix $A$ and a vector $b$ that keep its coefficients up to date, step by step. S4
# started from that matrix; Mamba keeps only a trace of it, $a_n=-n$.
#
# *Predict.* 1,000 samples have gone by. How many numbers of state are enough to draw the curve again?

# %% tags=["slide"]
from numpy.polynomial import legendre

def hippo(signal, n):
    """What n numbers, updated sample by sample, remember of a signal (HiPPO-LegS)."""
    i = np.arange(n)
    a = -np.tril(np.sqrt(np.outer(2 * i + 1, 2 * i + 1)), -1) - np.diag(i + 1.0)
    b, state, eye = np.sqrt(2 * i + 1), np.zeros(n), np.eye(n)
    for t, sample in enumerate(signal, start=1):  # a trapezoid step of size 1/t
        step = (eye + a / (2 * t)) @ state + b * sample / t
        state = np.linalg.solve(eye - a / (2 * t), step)
    return legendre.legval(np.linspace(-1, 1, len(signal)), state * b)

time = np.linspace(0, 1, 1000)
past = np.sin(20 * time**2) * np.exp(-time) + 0.5 * (time > 0.4)
drawn = {"the past": past}
for size in (4, 16, 64):
    drawn[f"{size} numbers"] = hippo(past, size)
    error = np.sqrt(np.mean((drawn[f"{size} numbers"] - past) ** 2))
    print(f"{size:2d} numbers: root mean square error {error:.3f}")
plotting.curves(drawn, x=time, xlabel="time", ylabel="signal",
                title="More numbers of HiPPO's state remember finer detail")
plotting.show("A chirp with a jump, and its reconstructions from 4, 16 and 64 numbers: "
              "four follow the trend, sixteen most of it, 64 nearly all.")

# %% [markdown]
# 64 numbers for 1,000 samples of a curve that is smooth but for one jump, where the error is. A text is not smooth: nothing tells in advance which word will be asked for.
#
# ### 10.3 Mamba insights
#
# **How can a state know what to keep?** A time-invariant model treats every token alike. Mamba (Gu and Dao 2023) computes $\Delta_t$,
# $b_t$, $c_t$ *from the token*. A large $\Delta$ empties the state and writes; $\Delta\approx0$ passes by.
#
# *Predict.* One marked number among 60 of noise must be known at the end. With $a=-1$, which $\Delta$ at the mark and which elsewhere?

# %% tags=["slide"]
noise = np.random.default_rng(2).standard_normal(60)
noise[20] = 2.0  # the marked number
marked = np.arange(60) == 20
kept = {"marked number": np.where(marked, noise, 0.0)}
for name, delta in (("Δ = 0.1 always", np.full(60, 0.1)),
                    ("Δ = 5 at the mark", np.where(marked, 5.0, 0.002))):
    h, trace = 0.0, []
    for t in range(60):
        h = math.exp(-delta[t]) * h + delta[t] * 0.2 * noise[t]  # b = 1/5
        trace.append(h)
    kept[name] = np.array(trace)
    print(f"{name:18s} state at the end {h:5.2f} (2 was marked)")
plotting.curves(kept, xlabel="token", ylabel="value of the state",
                title="A step that depends on the token keeps the marked number")
plotting.show("The marked number as a peak at token 20; the state with a constant step "
              "wanders near zero, the selective one jumps to two and stays.")

# %% [markdown]
# A large step at the mark, hardly any elsewhere. That is the **selective scan**, for every channel of the input with a
# state of its own:
#
# $$h_t=e^{\Delta_ta}\,h_{t-1}+\Delta_tb_t\,x_t\qquad y_t=c_t\cdot h_t$$

# %% [markdown] tags=["slide"]
# #### Exercise 10D: the selective scan  (difficulty 2 of 5, essential, 10 minutes)
#
# Walk through a batch of texts, from a given state, and hand the state over.
#
# |argument|shape|meaning|
# |---|---|---|
# |`x`, `delta`|`(batch, n, channels)`|input, and a positive step for each channel|
# |`a`|`(channels, d_state)`|negative|
# |`b`, `c`|`(batch, n, d_state)`|shared by all channels|
# |`h`|`(batch, channels, d_state)`|the state before the first token|
#
# Returns `(y, h)`: outputs `(batch, n, channels)` and the state after the last token, in the float type of `x`. Nothing as large as
# all states together may be made: the check watches the memory.
#
# <details><summary>Hint</summary>
#
# At one token, `delta[:, t]` is `(batch, channels)` and the state has one axis more: where does it go? Over which axis is the product with $c_t$
# summed? Does the caller's `h` stay as it was?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def scan(x, delta, a, b, c, h):
    """The selective scan of Mamba from a state h: (outputs, the state at the end).

    x, delta (batch, n, channels), a (channels, d_state), b, c (batch, n, d_state),
    h (batch, channels, d_state). Source: arXiv 2312.00752, algorithm 2, with the step
    of its code.
    """
    ### BEGIN SOLUTION
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]  # (batch, channels, 1)
        h = np.exp(step * a) * h + step * b[:, t, None] * x[:, t, :, None]
        y[:, t] = (h * c[:, t, None]).sum(-1)
    return y, h
    ### END SOLUTION

# %%
scan = check("10D", scan)

# %% [markdown]
# #### A scan is a masked matrix
#
# Mamba-2 lets all states of a head fade alike: $a$ is one number. *Predict.* Unroll the recurrence: which matrix takes $x$ to
# $y$, and where has it been seen?

# %% tags=["slide"]
rng = np.random.default_rng(4)
x_s, (b_s, c_s) = rng.standard_normal((1, 12, 3)), rng.standard_normal((2, 1, 12, 8))
delta_s = np.tile(rng.uniform(0.02, 0.6, (1, 12, 1)), (1, 1, 3))
by_scan, _ = scan(x_s, delta_s, np.full((3, 8), -1.0), b_s, c_s, np.zeros((1, 3, 8)))

total = np.cumsum(-delta_s[0, :, 0])
decay_s = np.tril(np.exp(np.minimum(total[:, None] - total, 0)))  # (12, 12)
scores_s = (c_s[0] @ b_s[0].T) * decay_s
by_matrix = scores_s @ (delta_s[0] * x_s[0])
print(f"last output: scan {by_scan[0, -1, 0]:.3f}, matrix {by_matrix[-1, 0]:.3f}, "
      f"largest difference {np.abs(by_scan[0] - by_matrix).max():.6f}")
plotting.matrix(scores_s, xlabel="token j", ylabel="token i",
                label="$c_i·b_j$, decayed",
                title="A scan with one decay is linear attention: c asks, b is the key")
plotting.show("Lower triangle of twelve by twelve scores, strongest near the diagonal "
              "and fading to the left.")

# %% [markdown]
# $y=\big(CB^\top\odot L\big)(\Delta x)$: linear attention with $c$ as query, $b$ as key, $\Delta x$ as value and a decay. That is the
# duality of Mamba-2 (**SSD**, Dao and Gu 2024), why it can be computed in chunks of matrix products, and why it stands in the table
# of 10.1.
#
# The whole layer of Mamba has a short convolution before the scan and a gate behind it:

# %% tags=["export"]
class MambaWeights(nn.Module):
    """The weights of Mamba's layer; as in the course, matrices are (d_in, d_out)."""

    def __init__(self, d_model, d_inner, d_state=16, width=4, rank=4):
        super().__init__()
        self.d_state, self.rank = d_state, rank
        shapes = {"w_in": (d_model, 2 * d_inner), "conv": (d_inner, width),
                  "w_x": (d_inner, rank + 2 * d_state), "w_dt": (rank, d_inner),
                  "w_out": (d_inner, d_model)}
        for name, (rows, columns) in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(rows, columns) * rows**-0.5))
        decays = torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1)
        self.a_log = nn.Parameter(decays)  # a = -exp(a_log): -1, -2, ..., as HiPPO's
        self.d = nn.Parameter(torch.ones(d_inner))
        self.conv_bias = nn.Parameter(torch.zeros(d_inner))
        self.dt_bias = nn.Parameter(torch.full((d_inner,), -3.0))  # steps near 0.05

# %% [markdown]
# #### Exercise 10E: the layer of Mamba  (difficulty 4 of 5, essential, 25 minutes; if you do only two)
#
# Write `forward`. The shape contract:
#
# |array|from|shape|
# |---|---|---|
# |`u`, `gate`|the two halves of `x @ w_in`, `u` first|`(batch, n, d_inner)`|
# |`u`|each channel convolved with its row of `conv`, causally, plus `conv_bias`; then SiLU|`(batch, n, d_inner)`|
# |`low`, `b`, `c`|`u @ w_x`, cut after `rank` and `rank + d_state` columns|`(batch, n, ...)`|
# |`delta`|softplus of `low @ w_dt + dt_bias`|`(batch, n, d_inner)`|
# |`y`|`selective_scan_torch(u, delta, a, b, c, d)` with $a=-e^{\text{a\_log}}$|`(batch, n, d_inner)`|
#
# The last column of `conv` meets the token itself, the one before it the token before. Returns $(y\odot\text{SiLU}(\text{gate}))\,W_\text{out}$,
# `(batch, n, d_model)`.
#
# <details><summary>Hint</summary>
#
# How many zeros stand before the first token, so that the convolution sees no later one? With `nn.functional.conv1d` the channels are
# the middle axis, the weights `(d_inner, 1, width)`, and how many groups are there? Where does SiLU stand, twice?
#
# </details>

# %%
from attention.linear import selective_scan_torch

# %% tags=["exercise", "export"] kind="module"
class Mamba(MambaWeights, nn.Module):
    """Mamba's layer: x (batch, n, d_model) to the same.

    Source: Gu and Dao 2023 (arXiv 2312.00752), figure 3.
    """

    def forward(self, x):
        ### BEGIN SOLUTION
        F = nn.functional
        u, gate = (x @ self.w_in).chunk(2, dim=-1)
        padded = F.pad(u.mT, (self.conv.shape[1] - 1, 0))
        u = F.conv1d(padded, self.conv[:, None], self.conv_bias, groups=len(self.conv))
        u = F.silu(u.mT)
        low, b, c = (u @ self.w_x).split([self.rank, self.d_state, self.d_state], -1)
        delta = F.softplus(low @ self.w_dt + self.dt_bias)
        y = selective_scan_torch(u, delta, -self.a_log.exp(), b, c, self.d)
        return (y * F.silu(gate)) @ self.w_out
        ### END SOLUTION

# %%
Mamba = check("10E", Mamba)

# %% tags=["slide"]
from attention.experiments.linear import mamba_parts

layer = training.initialise(Mamba(8, 16, 8).double(), seed=1)
for weight in (layer.w_in, layer.conv, layer.w_x, layer.w_dt, layer.w_out):
    weight.data *= 2  # outputs far from 0, or a test would prove little
text = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 12, 8)))
plotting.flow(
    mamba_parts(layer, text[0]),
    [("x", "u", "W_in"), ("x", "gate", "W_in"),
     ("u", "u, convolved", "3 tokens before\nand SiLU"),
     ("u, convolved", "Δ, b, c", "W_x, W_dt"),
     (("u, convolved", "Δ, b, c"), "y", "selective scan,\nstate 16 × 8"),
     (("y", "gate"), "out", "· SiLU, W_out")],
    title="Mamba: the token chooses its own step, key and query")
plotting.show("Data flow of Mamba's layer: x gives u and a gate; u is convolved, makes "
              "its own step, b and c, and goes through the scan; the gate comes last.")

# %% [markdown]
# transformers has the layer too, `MambaMixer`; random weights are copied into it.
#
# *Predict.* Which numbers of the layer grow with the length of the text, when it writes?

# %%
from transformers.models.mamba import modeling_mamba

config = modeling_mamba.MambaConfig(
    hidden_size=8, intermediate_size=16, state_size=8, conv_kernel=4,
    time_step_rank=4, num_hidden_layers=1)
mixer = modeling_mamba.MambaMixer(config, layer_idx=0).double().eval()
pairs_of = {"in_proj": layer.w_in, "x_proj": layer.w_x, "dt_proj": layer.w_dt,
            "out_proj": layer.w_out}
with torch.no_grad():
    for name, weight in pairs_of.items():
        getattr(mixer, name).weight.copy_(weight.T)
    mixer.conv1d.weight.copy_(layer.conv[:, None])
    mixer.conv1d.bias.copy_(layer.conv_bias)
    mixer.dt_proj.bias.copy_(layer.dt_bias)
    mixer.A_log.copy_(layer.a_log)
    mixer.D.copy_(layer.d)
    ours, other = layer(text), mixer(text)
print(f"last token {ours[0, -1, 0]:.3f}, theirs {other[0, -1, 0]:.3f}, size of "
      f"outputs {ours.std():.1f}, largest difference {(ours - other).abs().max():.5f}")
print(f"kept while writing: {16 * 8 + 16 * 3} numbers, after 12 tokens or 12,000")

# %% [markdown]
# None. Kept are the scan's state, $16\times8$, and **the last three inputs of the convolution**. The second is often forgotten:
#
# #### Handing a state over
#
# A prompt is read in one piece, then tokens are written one by one. `stream` does a piece: convolution, scan, and what the next
# piece needs.

# %% tags=["export"]
def stream(x, delta, a, b, c, kernel, state=None):
    """A piece of a text: short causal convolution, then scan. NumPy: (y, state).

    As scan; kernel (channels, width), its last column for the token itself. state is
    (tail, h): the last width - 1 inputs (batch, width - 1, channels) and the scan's.
    """
    width, n = kernel.shape[1], x.shape[1]
    if state is None:
        state = (np.zeros((len(x), width - 1, x.shape[2])),
                 np.zeros((len(x), *a.shape)))
    tail, h = state
    seen = np.concatenate([tail, x], axis=1)  # (batch, width - 1 + n, channels)
    u = sum(kernel[:, i] * seen[:, i:i + n] for i in range(width))
    y, h = scan(u, delta, a, b, c, h)
    return y, (seen[:, n:], h)

# %% [markdown]
# #### Exercise 10F: find the bug  (difficulty 3 of 5, useful, 15 minutes)
#
# Write a test that is given such a function and notices whether it is wrong. It is tried on right ones and on ten wrong ones:
# state not handed on, convolution that starts anew, pieces shorter than the kernel, a step that is not Euler's ...
#
# |argument|meaning|
# |---|---|
# |`stream`|`stream(x, delta, a, b, c, kernel, state)` returns `(y, state)`, as above; the form of `state` is its own business|
#
# Returns nothing. It raises an error (`assert ...`) for a wrong function, and none for a right one.
#
# <details><summary>Hint</summary>
#
# Into which pieces must a text be cut: is one of them shorter than the kernel? Is it enough to compare two calls of the same
# function with each other? Which plain loop over tokens do you believe? Is more than one text in the batch, and is each channel's kernel its own?
#
# </details>

# %% tags=["exercise", "export"] kind="bug"
def test_stream(stream):
    """Raise AssertionError if stream(x, delta, a, b, c, kernel, state) is wrong."""
    ### BEGIN SOLUTION
    rng = np.random.default_rng(0)
    x, delta = rng.standard_normal((2, 9, 3)), rng.uniform(0.1, 1, (2, 9, 3))
    b, c = rng.standard_normal((2, 2, 9, 4))
    a, kernel = -rng.uniform(0.5, 2, (3, 4)), rng.standard_normal((3, 4))
    h, expected = np.zeros((2, 3, 4)), np.zeros((2, 9, 3))
    for t in range(9):
        u = sum(kernel[:, 3 - i] * x[:, t - i] for i in range(min(4, t + 1)))
        step = delta[:, t, :, None]
        h = np.exp(step * a) * h + step * b[:, t, None] * u[..., None]
        expected[:, t] = (h * c[:, t, None]).sum(-1)
    for cuts in ([0, 9], [0, 5, 6, 7, 8, 9], [0, 1, 3, 9]):
        state = None
        for first, end in zip(cuts, cuts[1:]):
            piece = slice(first, end)
            y, state = stream(x[:, piece], delta[:, piece], a, b[:, piece],
                              c[:, piece], kernel, state)
            assert np.allclose(y, expected[:, piece]), (first, end)
    ### END SOLUTION

# %%
test_stream = check("10F", test_stream)

# %% [markdown]
# *Predict.* A prompt of six tokens, then two single ones. How wrong is the eighth output if only the scan's state is handed over?

# %%
rng = np.random.default_rng(6)
x_p, delta_p = rng.standard_normal((1, 8, 3)), rng.uniform(0.1, 1, (1, 8, 3))
b_p, c_p = rng.standard_normal((2, 1, 8, 4))
a_p, kernel_p = -rng.uniform(0.5, 2, (3, 4)), rng.standard_normal((3, 4))

def pieces(cuts, keep_tail):
    state = None
    for first, end in zip(cuts, cuts[1:]):
        at = slice(first, end)
        y, state = stream(x_p[:, at], delta_p[:, at], a_p, b_p[:, at], c_p[:, at],
                          kernel_p, state)
        state = (state[0] * keep_tail, state[1])
    return y[0, -1, 0]

print(f"in one piece {pieces([0, 8], True):.3f}, "
      f"handed over {pieces([0, 6, 7, 8], True):.3f}, "
      f"without the tail {pieces([0, 6, 7, 8], False):.3f}")

# %% [markdown]
# A state may be copied like a cache, but **not cut**: nobody can take the last ten tokens out of it again. Servers that share prefixes
# of prompts, or go back after a rejected draft (lecture 05), must save states on the way.
#

# %% [markdown]
# ## Part 3 · CUDA
#
# %% [markdown]
# ### 10.4 Performance characteristics: a state that stays on the chip
#
# **What does a token cost?** Softmax pays for every token before it; a state pays the same at each. For a head of $d_k=d_v=64$, by the
# table of 10.1:
#
# *Predict.* From which length on do the chunks of 64 need fewer operations than all scores?

# %%
lengths_n = 2 ** np.arange(5, 15)
per_token = {"softmax, causal": lengths_n * 128,  # n/2 keys, twice two operations
             "recurrent": np.full(10, 4 * 64 * 64),
             "chunks of 64": np.minimum(lengths_n, 64) * 128 + 4 * 64 * 64}
ax = plotting.curves(per_token, x=lengths_n, log_y=True, xlabel="tokens n",
                     ylabel="operations a token and head",
                     title="A state costs the same at every length")
ax.set_xscale("log", base=2)
plotting.show("Operations a token against the length, both axes logarithmic: softmax "
              "rises in a line, recurrent and chunked form stay level.")
for name, count in per_token.items():
    print(f"{name:16s} {count[2]:7,} operations a token at 128 tokens, "
          f"{count[-1]:9,} at 16,384")

# %% [markdown]
# From some 200 tokens on. The recurrent form has the fewest operations, but it walks token by token, and its state has to
# live somewhere. Bytes, in floats, for $n$ tokens:
#
# |way|linear attention, a head|selective scan, $D$ channels, $N$ states|
# |---|---|---|
# |floor: inputs and output once|$n(2d + 2d_v)$|$n(3D + 2N) + DN + D$|
# |state through global memory|$2n\,d\,d_v$ more|$2n\,DN$ more|
# |the kernels below|the floor ($d\le100$, $d_v\le64$)|$b$, $c$ once for 32 channels|
#
# In chunks of 16 the state stays in shared memory: the tile of FlashAttention
# (lecture 06) without a softmax, nothing to rescale, nothing read twice. One block walks the whole text, so there are only as many blocks
# as heads, times slices of $V$.

# %%
from attention.flash import FLASH_HEAD
from attention.fundamentals import check_arguments

# %% tags=["export"]
CHUNK_TOOLS = FLASH_HEAD + r"""
// All threads copy TILE rows of `pitch` floats, from row `first` on, so many columns. Else zeros.
__device__ void load_tile(float* tile, int width, int stride, const float* from, int first, int end,
                          int columns, int pitch) {
  int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int e = thread; e < TILE * width; e += blockDim.x * blockDim.y) {
    int r = e / width, c = e % width;
    bool there = first + r < end && c < columns;
    tile[r * stride + c] = there ? from[(size_t)(first + r) * pitch + c] : 0.0f;
  }
}
"""

# %% tags=["export"]
LINEAR_TOOLS = CHUNK_TOOLS + r"""
// A number of the state: 16 C columns, and space behind them so that two rows lie in other banks.
#define STATE(t, c) state[((t) * (C | 1) + (c)) * TILE + threadIdx.x]
__device__ float score(const float* q_tile, const float* k_tile, int d) {  // query y with key x
  float s = 0.0f;
  for (int t = 0; t < d; ++t)
    s += q_tile[threadIdx.y * (d + PAD) + t] * k_tile[threadIdx.x * (d + PAD) + t];
  return s;
}
// sum += row y of Q S, in columns x, x + 16, ...
template <int C>
__device__ void read_state(float (&sum)[C], const float* q_tile, const float* state, int d) {
  for (int t = 0; t < d; ++t) {
    float q = q_tile[threadIdx.y * (d + PAD) + t];
    for (int c = 0; c < C; ++c) sum[c] += q * STATE(t, c);
  }
}
// S += K^T V: a thread has rows y, y + 16, ... of S.
template <int C>
__device__ void add_to_state(float* state, const float* k_tile, const float* v_tile, int d) {
  for (int t = threadIdx.y; t < d; t += TILE) {
    float sum[C] = {};
    for (int r = 0; r < TILE; ++r) {
      float k = k_tile[r * (d + PAD) + t];
      for (int c = 0; c < C; ++c) sum[c] += k * v_tile[(r * C + c) * TILE + threadIdx.x];
    }
    for (int c = 0; c < C; ++c) STATE(t, c) += sum[c];
  }
}
"""

# %% [markdown]
# #### Exercise 10G: read, then add  (difficulty 4 of 5, useful, 20 minutes)
#
# Write the loop over the chunks. Given, each run by all threads: `load_tile(tile, width, stride, from, first, end, columns, pitch)`
# copies 16 rows from `first` on, zeros from row `end` and from column `columns` on; `score(q_tile, k_tile, d)` multiplies query y with key
# x; `read_state<C>(sum, q_tile, state, d)` adds $QS$ to `sum`; `add_to_state<C>(state, k_tile, v_tile, d)` adds $K^\top V$ to the state.
#
# |name|meaning|
# |---|---|
# |`q`, `k`, `v`, `out`|of this head; query `i` in row i, its key and value in row `before + i`; `v` and `out` begin at this block's columns|
# |pitch|`d` for q and k, `d_v` for v and out; `columns`: how many of v this block has|
# |`q_tile`, `k_tile`, `v_tile`, `state`|shared; rows every `stride`, `stride`, `16 * C` floats; the state holds the keys before `before`|
# |`causal`|int; where it is 0 the state holds all keys, and only queries are read|
#
# Returns nothing; thread (x, y) writes columns `x + 16 * c` of query `first + y`, those that exist. Each row is read once, and what a
# query may not see may be `nan`.
#
# <details><summary>Hint</summary>
#
# A chunk has to see the state of before: what must have happened before `add_to_state`? That makes three barriers a chunk. Which keys of
# its own chunk may query y see? How does a lane get the score of key r (`__shfl_sync(0xffffffff, s, r, TILE)`)? Do all threads of a
# warp come to it?
#
# </details>

# %% tags=["exercise", "export"] kind="kernel"
LINEAR_CHUNKED = LINEAR_TOOLS + r"""
template <int C>                                         // columns of V a thread, 16 C a block
__global__ void linear_chunked(const float* q, const float* k, const float* v, float* out,
                               int n_queries, int n_keys, int d, int d_v, int causal) {
  extern __shared__ float q_tile[];
  int x = threadIdx.x, y = threadIdx.y, stride = d + PAD, left = blockIdx.y * TILE * C;
  float *k_tile = q_tile + TILE * stride, *v_tile = k_tile + TILE * stride;
  float* state = v_tile + TILE * TILE * C;               // d rows, zero in the beginning
  int columns = min(TILE * C, d_v - left), before = causal ? n_keys - n_queries : n_keys;
  size_t head = blockIdx.x;
  q += head * n_queries * d, k += head * n_keys * d;
  v += head * n_keys * d_v + left, out += head * n_queries * d_v + left;
  for (int e = y * TILE + x; e < d * TILE * (C | 1); e += TILE * TILE) state[e] = 0.0f;
  for (int first = 0; first < before; first += TILE) {   // keys that all queries see
    __syncthreads();
    load_tile(k_tile, d, stride, k, first, before, d, d);
    load_tile(v_tile, TILE * C, TILE * C, v, first, before, columns, d_v);
    __syncthreads();
    add_to_state<C>(state, k_tile, v_tile, d);
  }
  // BEGIN SOLUTION
  for (int first = 0; first < n_queries; first += TILE) {
    __syncthreads();                                     // load: the last chunk is added
    load_tile(q_tile, d, stride, q, first, n_queries, d, d);
    if (causal) load_tile(k_tile, d, stride, k, before + first, n_keys, d, d);
    if (causal) load_tile(v_tile, TILE * C, TILE * C, v, before + first, n_keys, columns, d_v);
    __syncthreads();                                     // the new chunk is there
    float s = causal ? score(q_tile, k_tile, d) : 0.0f;  // score
    float sum[C] = {};
    read_state<C>(sum, q_tile, state, d);                // accumulate: what came before ...
    for (int r = 0; r < TILE; ++r) {                     // ... and the chunk itself
      float w = __shfl_sync(0xffffffff, s, r, TILE);
      for (int c = 0; c < C && causal && r <= y; ++c) sum[c] += w * v_tile[(r * C + c) * TILE + x];
    }
    for (int c = 0; c < C && first + y < n_queries && x + TILE * c < columns; ++c)     // write
      out[(size_t)(first + y) * d_v + x + TILE * c] = sum[c];
    __syncthreads();                                     // the old state is used up
    if (causal) add_to_state<C>(state, k_tile, v_tile, d);
  }
  // END SOLUTION
}
"""

# %%
LINEAR_CHUNKED = check("10G", LINEAR_CHUNKED)

# %% [markdown]
# First the six facts: Anna after the fourth. Then two heads of 64 with 100 tokens; beside the kernel the recurrence as it is written in
# the formula, a thread a column of $S$, the state in global memory.

# %%
LINEAR_RECURRENT = r"""
__global__ void linear_recurrent(const float* q, const float* k, const float* v, float* state,
                                 float* out, int n, int d, int d_v) {
  int c = threadIdx.x;
  size_t head = blockIdx.x;
  for (int i = 0; i < n; ++i) {
    float sum = 0.0f;
    for (int t = 0; t < d; ++t) {
      size_t row = head * n + i, at = (head * d + t) * d_v + c;
      float s = state[at] + k[row * d + t] * v[row * d_v + c];
      state[at] = s;
      sum += q[row * d + t] * s;
    }
    out[(head * n + i) * d_v + c] = sum;
  }
}
"""

# %% [markdown]
# *Predict.* How many times the floor does each kernel move?

# %% tags=["slide"]
from attention.linear import linear_attention_cuda, linear_launch

six = linear_attention_cuda(q, k, v)
print(f"by the kernel: after four facts Paris {six[3, 0]:.2f}, Bern {six[3, 3]:.2f}")
heads = np.random.default_rng(10).standard_normal((3, 2, 100, 64)).astype(np.float32)
kernel_c, launch, arguments = linear_launch(*heads)
chunked = kernel_c.check[launch](*arguments)
in_memory, out_n = np.zeros((2, 64, 64), np.float32), np.zeros_like(heads[0])
naive = cuda.compile(LINEAR_RECURRENT).check[2, 64](*heads, in_memory, out_n,
                                                    100, 64, 64)
floor = 4 * heads[0].nbytes  # q, k, v and the output, all of one size
through = sum(row.bytes for row in naive.rows if row.array == "state")
moved = chunked.global_loaded + chunked.global_stored
print(f"chunked {moved:,} bytes, {moved / floor:.1f} times the floor of {floor:,}")
print(f"state through memory {through:,} bytes more, {through / floor:.1f} times; "
      f"problems {len(chunked.problems)}")

# %% [markdown]
# One, and for the state alone 32: $2\,d\,d_v/(2d+2d_v)$. A kernel that asks for the floor's bytes may still wait for something else. For 4,096 tokens on an A100:
#
# *Predict.* Which bar is the longest for each?

# %% tags=["slide"]
N, D = 4096, 64  # 440 turns a token: of the loops above, by hand
rungs = {  # (bytes, turns of shared memory, operations), one head
    "state through memory": (4 * (4 * N * D + 2 * N * D * D), 0, 4 * N * D * D),
    "state on the chip": (16 * N * D, 440 * N, 4 * N * D * D + 64 * N * D),
    "flash, causal": (4 * (2 * N * D + N * N * D // 16), 5 * N * N * D / 32,
                      2 * N * N * D)}
plotting.ladder(rungs, bandwidth=1.555e12, turns_per_second=108 * 1.41e9, peak=19.5e12,
                title="On the chip the state waits for shared memory, not bytes")
plotting.show("Three bars for each of three kernels, logarithmic: the state through "
              "memory waits for bytes, the two others for shared memory.")

# %% [markdown]
# Bytes for the first, turns of shared memory for the others (flash by the estimate of lecture 01, ten turns for 32 pairs and each of their $d$ entries). At 4,096
# tokens the state is ahead in all three, and the more the longer the text. But one walk has one block: a GPU needs a hundred heads to be busy.

# %% [markdown]
# ## Part 4 · Does it matter?
#
# ### 10.5 When to use linear alternatives
#
# **What is lost?** Most of the loss against softmax is **recall** of something said once: of the gap between gated convolutions and
# attention in one study 82 % (Arora et al. 2023, arXiv 2312.04927). The task in miniature: eight keys with a value each, then the eight keys in another
# order; which value had each? Two layers of width 32, a short convolution, one head; 200 steps, one seed each. Chance is 1 in 32.
#
# *Predict.* Keys of 8 numbers for all. What do softmax, the sum, the delta rule and two hybrids reach? And the sum with keys of 4 to 32?

# %% tags=["approx"] approx={"numbers": 0.12, "picture": 0.1}
from attention.experiments.linear import train_recall

runs = {"softmax": (["softmax"], 8)} | {
    f"linear, state {d_k} x 32": (["linear"], d_k) for d_k in (4, 8, 16, 32)} | {
    "delta rule, state 8 x 32": (["delta rule"], 8),
    "softmax, then linear": (["softmax", "linear"], 8),
    "linear, then softmax": (["linear", "softmax"], 8)}
recall = {}
for name, (kinds, d_k) in runs.items():
    recall[name] = train_recall(kinds, d_k)
    print(f"{name:25s} recalls {recall[name][-1]:.2f} after 200 steps")

# %% tags=["slide", "approx"] approx={"numbers": 0.12, "picture": 0.1}
plotting.curves({name: np.array(recall[name]) for name in runs
                 if name.startswith(("softmax", "linear, state"))},
                x=np.arange(0, 201, 50), xlabel="training steps",
                ylabel="share of values recalled", threshold=0.031,
                threshold_name="chance",
                title="Recall grows with the state; softmax has all of it")
plotting.show("Recall against training steps: softmax and softmax with a linear layer "
              "behind it reach one, linear layers rise with the size of their state.")

# %% [markdown]
# With equal steps the sum recalls more the larger its state, and softmax everything. The delta rule is level with the sum here: no
# key is written twice. One softmax layer is enough, if it stands first: behind a linear layer it does not help at this size. One seed and one size: the
# first statement is the paper's, the order of hybrids is only this table's.
#
# *Predict.* A layer's state is constant, but not small; caches of grouped heads and of a latent (lectures 08 and 09) are small. How long must a text be before it is smaller than a cache?

# %% tags=["slide"]
qwen, kimi, m2 = (getattr(transformers, f"{name}Config")()
                  for name in ("Qwen3Next", "KimiLinear", "Mamba2"))
rows = {  # (numbers of state, of 4 bytes; numbers a token in the cache, of 2 bytes)
    "Qwen3-Next: Gated DeltaNet, GQA":
        (qwen.linear_num_value_heads * qwen.linear_key_head_dim
         * qwen.linear_value_head_dim, 2 * qwen.num_key_value_heads * qwen.head_dim),
    "Kimi Linear: KDA, MLA": (kimi.linear_num_heads * kimi.linear_head_dim**2,
                              kimi.kv_lora_rank + kimi.qk_rope_head_dim),
    "Mamba-2, MHA of its width": (m2.num_heads * m2.head_dim * m2.state_size,
                                  2 * m2.hidden_size)}
lengths, kept_mib = 2 ** np.arange(6, 18), {}
for name, (numbers, a_token) in rows.items():
    kept_mib[name] = 2 * a_token * lengths / (4 * numbers)
    print(f"{name:32s} state {4 * numbers / 2**20:.0f} MiB a layer, as much as "
          f"{4 * numbers / (2 * a_token):5,.0f} tokens of cache")
ax = plotting.curves(kept_mib, x=lengths, threshold=1, threshold_name="equal:",
                     log_y=True, xlabel="tokens",
                     ylabel="cache of a layer / state of a layer",
                     title="In short texts the constant state is the larger one")
ax.set_xscale("log", base=2)
plotting.show("Three rising lines, the size of a cache over that of a state, cross one "
              "at 256, 1,024 and near 1,800 tokens.")

# %% [markdown]
# Between 256 and 1,820 tokens (from the default configurations of the classes in transformers 5.23.0; states in single
# precision). So:
#
# |the task|take|
# |---|---|
# |short texts, exact recall, in-context copying|softmax|
# |long texts, much writing, many texts at once|a hybrid: one softmax layer to three or more linear ones|
# |streams without end, signals, sound, genomes|a state|
# |counting, parity, permutations|a delta rule with negative eigenvalues|
#
# **Trap.** *"Linear attention needs $O(n)$ memory and loses a little quality everywhere."* In decoding it needs $O(d_kd_v)$, whatever
# $n$; and the loss sits in recall, where it is large.
#
# ### 10.6 In use
#
# **What do you call on Monday?** `flash-linear-attention` (`fla.layers`, Triton kernels for nearly all rows of the table), `mamba-ssm`
# (`Mamba`, `Mamba2`), or a model class of transformers, which falls back to PyTorch code where these packages are missing: much slower,
# with the same numbers. ONNX has `LinearAttention` from opset 27. PyTorch itself has no function for it.
#
# Pitfalls: keys not normalised (nan, fla issue 99); grouped heads given to a kernel that knows none (an
# illegal memory access: OLMo-core pull request 592 forbids them); the decay after the
# error; a state in half precision; the convolution's tail not handed over. And a chunked kernel for training and a recurrent one for writing
# are *two* programs: test them against each other.
#
# *Predict.* A state in bfloat16, 4,096 tokens of retention at 0.999: how far off is the last state?

# %%
rng = np.random.default_rng(0)
kept_exactly = torch.zeros(16, 16)
kept_rounded = kept_exactly.bfloat16()
for _ in range(4096):
    key, value = torch.from_numpy(rng.standard_normal((2, 16))).float()
    kept_exactly = 0.999 * kept_exactly + torch.outer(key, value)
    kept_rounded = 0.999 * kept_rounded + torch.outer(key, value).bfloat16()
off_by = (kept_rounded.float() - kept_exactly).norm() / kept_exactly.norm()
print(f"state in bfloat16: off by {off_by:.1f} times its size")
print(f"1.5 times 0.999 in bfloat16: {(0.999 * torch.tensor(1.5).bfloat16()).item()}")

# %% [markdown]
# Twice its size: 0.999 of a bfloat16 number is rounded back to the number itself, so nothing ever fades. States are kept in single
# precision, and take twice the bytes of a cache's numbers.
#
# ## What you can do now
#
# You can write attention whose past is one matrix, in three forms that agree, and say which knobs make it retention, Mamba-2 or
# Gated DeltaNet. You can build Mamba's layer and hand its whole state over. And you can say when a fixed state replaces the cache: when
# what will be asked for fits into it; a hybrid keeps one cache for the rest.
#
# **Exercises left**: all that say "not attempted yet" above; they work after Run All.

# %% [markdown]
# ## Quiz

# %% [markdown] tags=["quiz"]
# **1.** Keys and values of 16 numbers, a text of 1,000 tokens. How many numbers does a head of linear attention keep to
# write the next token?
#
# - a) 32,000
# - b) 256
# - c) 16,000
# - d) 32

# %% tags=["quiz"]
from utils import quiz

long_text = np.zeros((1000, 16))
_, kept_state = chunked_attention(long_text, long_text, long_text, 100)
quiz.answer({"a": 32_000, "b": 256, "c": 16_000, "d": 32}, kept_state.size,
            "A state of 16 x 16, whatever the length.")

# %% [markdown] tags=["quiz"]
# **2.** The same unit key is written twice into an empty memory, first with the value 3, then with 5 (keep 1, write 1).
# What do the sum and the delta rule answer to this key?
#
# - a) 5 and 5
# - b) 4 and 5
# - c) 8 and 4
# - d) 8 and 5

# %% tags=["quiz"]
unit, full, replies = np.eye(8)[2], np.ones(1), []
for erase_old in (False, True):
    written = memory_step(np.zeros((8, 1)), unit, 3 * full, full, full, erase_old)
    written = memory_step(written, unit, 5 * full, full, full, erase_old)
    replies.append(f"{(unit @ written).item():.0f}")
quiz.answer({"a": "5 and 5", "b": "4 and 5", "c": "8 and 4", "d": "8 and 5"},
            " and ".join(replies),
            "The delta rule takes its old answer away before it writes; a sum adds.")

# %% [markdown] tags=["quiz"]
# **3.** A memory answers 1 to a key of length 2. The delta rule writes the value 0 for this key, with $\beta=1$. What does
# the memory answer to it now?
#
# - a) 0, it was erased
# - b) 0.25
# - c) -3
# - d) 1

# %% tags=["quiz"]
key_of_2 = 2 * np.eye(8)[3]
remembered = key_of_2[:, None] / 4  # answers 1
remembered = memory_step(remembered, key_of_2, np.zeros(1), full, full, True)
quiz.answer({"a": 0, "b": 0.25, "c": -3, "d": 1}, float(key_of_2 @ remembered[:, 0]),
            "The old answer is multiplied by 1 - 2^2: keys must be normalised.")

# %% [markdown] tags=["quiz"]
# **4.** A state of 0, $a=-1$, $b=1$, and one input $x=1$ with a step of $\Delta=1$. What is in the state, if the step is taken
# as Mamba's code takes it?
#
# - a) 1
# - b) 0.632
# - c) 0.368
# - d) 0.5

# %% tags=["quiz"]
lone = np.ones((1, 1, 1))
_, after_one = scan(lone, lone, -np.ones((1, 1)), lone, lone, np.zeros((1, 1, 1)))
quiz.answer({"a": 1, "b": 0.632, "c": 0.368, "d": 0.5}, float(after_one[0, 0, 0]),
            "Its code takes Euler for b: step times input. A hold would give 0.632.")

# %% [markdown] tags=["quiz"]
# **5.** A layer of Mamba has 32 channels, 16 numbers of state for each, and a convolution of width 4. How many numbers
# must be handed over from a prompt to the next token?
#
# - a) 512
# - b) 608
# - c) 640
# - d) more after a longer prompt

# %% tags=["quiz"]
prompt_of_9, asked_by = np.ones((1, 9, 32)), np.ones((1, 9, 16))
_, (tail_kept, h_kept) = stream(prompt_of_9, prompt_of_9, -np.ones((32, 16)), asked_by,
                                asked_by, np.ones((32, 4)))
quiz.answer({"a": 512, "b": 608, "c": 640, "d": "more"}, tail_kept.size + h_kept.size,
            "32 * 16 of the scan, and the last 3 inputs of each convolution.")

# %% [markdown]
# ## Going further
#
# ### 10.7 A selective scan in CUDA: the state in registers
#
# Mamba's state is small, $N=16$ numbers a channel, and no channel looks at another. Sixteen lanes take a channel, each with
# $N/16$ of its states in registers; a block has 32 channels and walks in tiles of 16 steps: load $x$, $\Delta$, $b$, $c$; step, with $c\,h$ added up over
# the lanes by four shuffles; write.

# %% tags=["export"]
SELECTIVE_SCAN = CHUNK_TOOLS + r"""
#define CHANNELS 32                                      // of a block; TILE lanes each
template <int S>                                         // states a lane: 16 S >= n_state
__global__ __launch_bounds__(512) void selective_scan(const float* x, const float* delta,
    const float* a, const float* b, const float* c, const float* d, float* out,
    int n, int channels, int n_state) {
  __shared__ float x_tile[TILE * CHANNELS], delta_tile[TILE * CHANNELS], y_tile[TILE * CHANNELS];
  extern __shared__ float b_tile[];                      // TILE rows of 16 S floats, twice
  float* c_tile = b_tile + TILE * TILE * S;
  int lane = threadIdx.x, own = threadIdx.y, left = blockIdx.x * CHANNELS;
  int columns = min(CHANNELS, channels - left);
  size_t batch = blockIdx.y, begin = batch * n * channels + left;
  a += (size_t)(left + own) * n_state, b += batch * n * n_state, c += batch * n * n_state;
  float rate[S], state[S] = {};
  for (int s = 0; s < S; ++s)
    rate[s] = own < columns && lane + TILE * s < n_state ? a[lane + TILE * s] : 0.0f;
  float skip = own < columns && lane == 0 ? d[left + own] : 0.0f;
  for (int first = 0; first < n; first += TILE) {
    load_tile(x_tile, CHANNELS, CHANNELS, x + begin, first, n, columns, channels);       // load
    load_tile(delta_tile, CHANNELS, CHANNELS, delta + begin, first, n, columns, channels);
    load_tile(b_tile, TILE * S, TILE * S, b, first, n, n_state, n_state);
    load_tile(c_tile, TILE * S, TILE * S, c, first, n, n_state, n_state);
    __syncthreads();                                     // the new steps are there
    for (int t = 0; t < TILE; ++t) {                     // step
      float step = delta_tile[t * CHANNELS + own], u = x_tile[t * CHANNELS + own], y = 0.0f;
      for (int s = 0; s < S; ++s) {
        int at = (t * S + s) * TILE + lane;
        state[s] = expf(step * rate[s]) * state[s] + step * b_tile[at] * u;
        y += c_tile[at] * state[s];
      }
      y = row_sum(y);                                    // over the lanes of this channel
      if (lane == 0) y_tile[t * CHANNELS + own] = y + skip * u;
    }
    __syncthreads();                                     // the steps are used, the sums are there
    for (int e = own * TILE + lane; e < TILE * CHANNELS; e += TILE * CHANNELS) {         // write
      int t = first + e / CHANNELS, channel = e % CHANNELS;
      if (t < n && channel < columns) out[begin + (size_t)t * channels + channel] = y_tile[e];
    }
  }
}
"""

# %% [markdown]
# Beside it the same recurrence with its state in global memory, a thread a channel.

# %%
SCAN_THROUGH_MEMORY = r"""
__global__ void scan_through_memory(const float* x, const float* delta, const float* a,
    const float* b, const float* c, float* state, float* out, int n, int channels, int n_state) {
  int channel = threadIdx.x;
  size_t batch = blockIdx.x;
  for (size_t t = batch * n; t < (batch + 1) * n; ++t) {
    float step = delta[t * channels + channel], u = x[t * channels + channel], y = 0.0f;
    for (int s = 0; s < n_state; ++s) {
      size_t at = (batch * n_state + s) * channels + channel;
      float decay = expf(step * a[(size_t)channel * n_state + s]);
      float h = decay * state[at] + step * b[t * n_state + s] * u;
      state[at] = h;
      y += c[t * n_state + s] * h;
    }
    out[t * channels + channel] = y;
  }
}
"""

# %% [markdown]
# *Predict.* 64 channels of 16 states, 100 steps. Two blocks share a text: which of the five inputs is read twice?

# %%
from attention.linear import scan_bytes, scan_launch

rng = np.random.default_rng(10)
x_k, delta_k = rng.standard_normal((2, 1, 100, 64)).astype(np.float32)
delta_k, a_k = np.exp(delta_k - 2), -np.tile(np.arange(1.0, 17), (64, 1))
b_k, c_k = rng.standard_normal((2, 1, 100, 16)).astype(np.float32)
kernel_s, launch, arguments = scan_launch(x_k, delta_k, a_k, b_k, c_k)
report = kernel_s.check[launch](*arguments)
moved = report.global_loaded + report.global_stored
floor = scan_bytes(1, 100, 64, 16, block=64)
h_k, out_k = np.zeros((1, 16, 64), np.float32), np.zeros_like(x_k)
given = x_k, delta_k, a_k.astype(np.float32), b_k, c_k
naive = cuda.compile(SCAN_THROUGH_MEMORY).check[1, 64](*given, h_k, out_k, 100, 64, 16)
through = sum(row.bytes for row in naive.rows if row.array == "state")
print(f"in registers {moved:,} bytes, formula {scan_bytes(1, 100, 64, 16):,}: "
      f"{moved / floor:.2f} times the floor of {floor:,}")
print(f"state through memory {through:,} bytes more, "
      f"{through / floor:.1f} times the floor")
by_numpy, _ = scan(x_k, delta_k, a_k, b_k, c_k, np.zeros((1, 64, 16)))
gap = np.abs(arguments[6].numpy() - by_numpy).max() / np.abs(by_numpy).max()
print(f"difference to 10D, of the largest output: {gap:.6f}; problems "
      f"{len(report.problems)}")

# %% [markdown]
# $b$ and $c$, once for each block of 32 channels. The state is never in memory, not even between tiles. (Mamba's own kernel does the
# same, and its threads also share the time steps, by a parallel scan: the steps $(e^{\Delta a},\Delta bx)$ can be combined in pairs. The PyTorch code of
# transformers writes all $n\,DN$ states to memory.)

# %% [markdown]
# ### 10.8 Retention in chunks, and why some chunks have 16 tokens
#
# With a decay, each product of a chunk carries a power of it: tokens inside $\gamma^{i-j}$, the state $\gamma^{i+1}$. (RetNet's three forms agree only with the
# same $1/\sqrt d$, the same xPos rotation and the same group norm in each; Sun et al. 2023.) One may write $\gamma^{i-j}$ as
# $\gamma^i\cdot\gamma^{-j}$, two factors on q and k, so that plain matrix products do it all.
#
# *Predict.* KDA's decay may be $e^{-5}$ a token. How long a chunk can single precision take with two factors?

# %%
for chunk in (8, 16, 17, 18, 64):
    logs = -5.0 * np.arange(1, chunk + 1, dtype=np.float32)
    with np.errstate(all="ignore"):
        two_factors = np.exp(logs)[:, None] * np.exp(-logs)
        largest = np.exp(-logs).max()
    difference = np.exp(np.minimum(logs[:, None] - logs, 0))
    lower = np.tril(np.ones((chunk, chunk), bool))
    largest_off = np.abs(two_factors - difference)[lower].max()
    print(f"chunk {chunk:2d}: largest factor {largest:.0e}, product off by "
          f"{largest_off:.1g}")

# %% [markdown]
# $e^{5\cdot18}$ is above the largest float32: 17 tokens fit. Kernels therefore take sub-chunks of 16, or form the exponential of the
# *difference*. With that, retention in chunks:

# %%
def retention_in_chunks(q, k, v, log_decay, chunk):
    """Chunked linear attention with one decay, a number."""
    state, out = np.zeros((q.shape[1], v.shape[1])), np.zeros((len(q), v.shape[1]))
    for first in range(0, len(q), chunk):
        q_c, k_c, v_c = (a[first:first + chunk] for a in (q, k, v))
        at = np.arange(len(q_c))
        between = np.tril(np.exp(log_decay * np.maximum(at[:, None] - at, 0)))
        into = np.exp(log_decay * (at + 1))[:, None]
        left = np.exp(log_decay * (len(q_c) - 1 - at))[:, None]
        out[first:first + chunk] = q_c * into @ state + (q_c @ k_c.T * between) @ v_c
        state = math.exp(log_decay * len(q_c)) * state + (left * k_c).T @ v_c
    return out

whole = walk(fixed, ones, False)
for chunk in (1, 7, 32, 100):
    gap = np.abs(retention_in_chunks(q_n, k_n, v_n, math.log(0.9), chunk) - whole).max()
    print(f"chunk {chunk:3d}: last output {whole[-1, 0]:.3f}, difference {gap:.6f}")

# %% [markdown]
# ### 10.9 The delta rule in chunks
#
# Inside a chunk each token corrects what the ones before it wrote: the written values $u_i=\beta_i\big(v_i-\sum_{j<i}(k_i\cdot k_j)\,u_j\big)$ depend on one
# another. That is a triangular system, $(I+\text{tril}_{-1}(\beta KK^\top))\,U=\beta V$, and one solve replaces the walk (the WY form of Yang et al.
# 2024, arXiv 2406.06484).

# %%
lower = np.eye(n) + np.tril(beta * k_n @ k_n.T, -1)
u_n = np.linalg.solve(lower, beta * v_n)
by_solve = np.tril(q_n @ k_n.T) @ u_n
by_walk = walk(zero, beta, True)
print(f"last output: solve {by_solve[-1, 0]:.3f}, walk {by_walk[-1, 0]:.3f}, "
      f"largest difference {np.abs(by_solve - by_walk).max():.6f}")

# %% [markdown]
# ### 10.10 State tracking, trained
#
# Can training find the reflection of 10.1? One layer of the delta rule, width 8, learns the parity of random bits, from texts of 4 to
# 16 bits; then it is asked about longer ones. The only difference is the largest $\beta$.
#
# *Predict.* Which of the two is right at 256 bits: both, one, none?

# %% tags=["approx"] approx={"numbers": 0.1, "picture": 0.1}
from attention.experiments.linear import parity_accuracy, train_parity

sizes_p = [16, 32, 64, 128, 256]
tracked = {}
for name, largest in (("beta up to 1", 1.0), ("beta up to 2", 2.0)):
    trained = [train_parity(largest, seed) for seed in range(3)]
    tracked[name] = np.array([[parity_accuracy(m, size) for size in sizes_p]
                              for m in trained])
    print(f"{name}: right at 16 bits {tracked[name][:, 0].round(2)}, at 256 bits "
          f"{tracked[name][:, -1].round(2)} (three seeds)")
plotting.curves(tracked, x=sizes_p, xlabel="bits", ylabel="last eight answers right",
                threshold=0.5, threshold_name="chance",
                title="With negative eigenvalues parity is learned, and carries on")
plotting.show("Accuracy against the length: with beta up to 2 it is one at every "
              "length, with beta up to 1 it lies at chance, three seeds each.")

# %% [markdown]
# One: sixteen times the length of training, all seeds, against chance. (The gate of this layer is steep, $\beta=\beta_\text{max}\,\sigma(4\,x\,w)$, so that it
# can come near 0 and 2.) Two reflections a token make a rotation, and count to three: DeltaProduct (Siems et al. 2025, arXiv 2502.10297).

# %% [markdown]
# ### 10.11 RWKV: a stable recurrence
#
# RWKV-4 (Peng et al. 2023) has no products of queries and keys: for each channel, a weighted mean of values with weights
# $e^{k_j-(i-1-j)w}$, and $e^{u+k_i}$ for the token itself ($u$, the bonus). Exponentials of keys overflow, so the largest exponent so
# far is kept apart, as in lecture 06. (RWKV-5 and later have matrix states and belong into the table of 10.1.)

# %% tags=["export"]
def wkv(w, u, k, v):
    """RWKV-4's weighted mean of values, stable. w, u (channels,), k, v (n, channels).

    w > 0 is the decay a token, u the bonus of the token itself. Returns (n, channels).
    Source: Peng et al. 2023 (arXiv 2305.13048).
    """
    top = np.full(k.shape[1], -np.inf)  # the largest exponent so far
    above, below = np.zeros(k.shape[1]), np.zeros(k.shape[1])
    out = np.zeros(v.shape)
    for i in range(len(k)):
        new = np.maximum(top, u + k[i])
        old, now = np.exp(top - new), np.exp(u + k[i] - new)
        out[i] = (old * above + now * v[i]) / (old * below + now)
        new = np.maximum(top - w, k[i])
        old, now = np.exp(top - w - new), np.exp(k[i] - new)
        above, below, top = old * above + now * v[i], old * below + now, new
    return out

# %%
from attention.linear import wkv
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

rng = np.random.default_rng(0)
w_r, u_r = rng.uniform(0.1, 2, 6), rng.standard_normal(6)
for size in (1, 300):
    k_r, v_r = size * rng.standard_normal((30, 6)), rng.standard_normal((30, 6))
    hf = rwkv_linear_attention_cpu(*(torch.from_numpy(a) for a in (np.log(w_r), u_r)),
                                   *(torch.from_numpy(a)[None] for a in (k_r, v_r)))[0]
    ours = wkv(w_r, u_r, k_r, v_r)
    print(f"keys of size {size:3d}: last output {ours[-1, 0]:.3f}, transformers "
          f"{hf[0, -1, 0]:.3f}, largest difference "
          f"{np.abs(ours - hf[0].numpy()).max():.5f}")

# %% [markdown]
# ### 10.12 Hyena: long convolutions
#
# Hyena (Poli et al. 2023) keeps the convolution and gives up the recurrence: its kernel, as long as the text, is made by a small network
# from the position (an **implicit filter**), times a decaying window, and gates stand around it. It has no state of fixed size: writing a token costs the
# whole past again.

# %% tags=["export"]
def long_convolution(x, kernel):
    """Causal convolution by FFT: x (..., n, channels), kernel (n, channels).

    Returns the shape of x. Zeros stand behind the text, or its end would leak into
    the beginning.
    """
    n = x.shape[-2]
    product = np.fft.rfft(x, 2 * n, axis=-2) * np.fft.rfft(kernel, 2 * n, axis=0)
    return np.fft.irfft(product, 2 * n, axis=-2)[..., :n, :]

# %%
from attention.linear import long_convolution

rng, place = np.random.default_rng(0), np.linspace(0, 1, 64)[:, None]
waves = np.concatenate([np.sin(f * np.pi * place) for f in (1, 2, 4, 8)], axis=1)
hidden = np.sin(waves @ rng.standard_normal((4, 16)))  # a network of one hidden layer
implicit = hidden @ rng.standard_normal((16, 5)) * np.exp(-4 * place)  # (64, 5)
x_h = rng.standard_normal((64, 5))
direct = np.stack([sum(implicit[j] * x_h[t - j] for j in range(t + 1))
                   for t in range(64)])
print(f"last output by FFT {long_convolution(x_h, implicit)[-1, 0]:.3f}, direct "
      f"{direct[-1, 0]:.3f}, largest difference "
      f"{np.abs(long_convolution(x_h, implicit) - direct).max():.6f}")
print(f"numbers in the network: {4 * 16 + 16 * 5}, in the kernel: {implicit.size}")

# %% [markdown]
# ### 10.13 Infini-attention
#
# Infini-attention (Munkhdalai et al. 2024, arXiv 2404.07143) puts both into one head: softmax inside a segment, and a linear memory, with elu + 1
# features and optionally the delta rule, for all segments before it; a learned gate mixes the two. It is the chunked form of 10A with a
# softmax inside.

# %% tags=["export"]
def infini_attention(q, k, v, segment, gate, delta=False):
    """Softmax inside segments, a linear memory of all before them, mixed by a gate.

    q, k (n, d), v (n, d_v), NumPy; sigmoid(gate) is the memory's share; delta: write
    only what the memory does not answer yet. Returns (n, d_v). ValueError where
    segment is below 1. Source: Munkhdalai et al. 2024 (arXiv 2404.07143), § 2.1.
    """
    if segment < 1:
        raise ValueError(f"segment must be at least 1, got {segment}")
    share, out = 1 / (1 + np.exp(-gate)), np.zeros((len(q), v.shape[1]))
    memory, total = np.zeros((k.shape[1], v.shape[1])), np.zeros(k.shape[1])
    for first in range(0, len(q), segment):
        rows = slice(first, first + segment)
        q_f, k_f = (np.exp(np.minimum(a[rows], 0)) + np.maximum(a[rows], 0)
                    for a in (q, k))  # elu + 1
        said, known = (f @ memory / np.maximum(f @ total, 1e-9)[:, None]
                       for f in (q_f, k_f))
        local = attention_numpy(q[rows], k[rows], v[rows], causal=True)
        out[rows] = share * said + (1 - share) * local
        memory = memory + k_f.T @ (v[rows] - (known if delta else 0))
        total = total + k_f.sum(0)
    return out

# %% [markdown]
# *Predict.* The gate wide open, and shut: what is left? And a fact of the first segment: how far is the memory's answer from it after 1, 4 and
# 16 segments of 64 other keys?

# %%
from attention.fundamentals import attention_numpy
from attention.linear import infini_attention, linear_attention_numpy

rng = np.random.default_rng(13)
q_m, k_m, v_m = rng.standard_normal((3, 96, 16))
shut, wide = (infini_attention(q_m, k_m, v_m, 32, gate) for gate in (-50.0, 50.0))
last = attention_numpy(q_m[64:], k_m[64:], v_m[64:], causal=True)
q_f, k_f = (np.where(a > 0, a + 1, np.exp(a)) for a in (q_m, k_m))
earlier = linear_attention_numpy(q_f[64:], k_f[:64], v_m[:64], causal=False,
                                 normalise=True)
print(f"gate shut, last segment, to softmax {np.abs(shut[64:] - last).max():.6f}")
print(f"wide open, to linear attention {np.abs(wide[64:] - earlier).max():.6f}")
many_k, many_v = rng.standard_normal((2, 18 * 64, 64))
for segments in (1, 4, 16):
    asks = np.zeros((segments * 64 + 1, 64))
    asks[-1] = many_k[5]  # the last query asks for the sixth token
    upto = slice(0, len(asks))
    answer = infini_attention(asks, many_k[upto], many_v[upto], 64, 50.0)[-1]
    cosine = answer @ many_v[5] / np.linalg.norm(answer) / np.linalg.norm(many_v[5])
    print(f"{segments:2d} segments in the memory: cosine of its answer with the value "
          f"that was stored {cosine:.2f}")

# %% [markdown]
# Softmax of the segment, and linear attention to what came before. After one segment the answer holds little of the value (the features of 64 keys overlap), after sixteen
# nothing. A public replication got worse with each compression into the
# memory and called it a failure (Hugging Face blog, 14 August 2024). A later one, with 300 M
# parameters, saw retrieval fall with each compression too, but stayed above its baseline (arXiv 2512.23862).
#
# ### 10.14 Hybrids, November 2026
#
# Default configurations of classes in transformers 5.23.0, read on 28 November 2026; a published model may differ from a default.
#
# |class|linear layers|others|ratio|
# |---|---|---|---|
# |`Qwen3Next`|Gated DeltaNet|softmax with an output gate|3 : 1|
# |`KimiLinear`|Kimi Delta Attention|MLA without positions|3.5 : 1|
# |`OlmoHybrid`|Gated DeltaNet, negative eigenvalues|softmax|3 : 1|
# |`RecurrentGemma`|RG-LRU, a gated diagonal state|window|2 : 1|
# |`MiniMax`|lightning attention: retention|softmax|1 : 1 (the published MiniMax-Text-01: 7 : 1)|
# |`NemotronH`|Mamba-2|a few softmax layers|as configured|
#
# MiniMax went back to softmax in every layer with M2 (its team says why: LMSYS blog, 4 November 2025), and to block-sparse attention
# with M3: the discussion question of this lecture. A study of 72 trained
# models finds language modelling flat and recall rising with the share of softmax layers, and recommends 3 : 1 to 6 : 1 (arXiv 2507.06457). "75 % less cache" of such a
# model *is* the ratio 3 : 1.
#
# *Predict.* The defaults have 48, 27, 32, 26 and 32 layers. In which one do the counts not make the ratio of the table?

# %%
for name in ("Qwen3Next", "KimiLinear", "OlmoHybrid", "RecurrentGemma", "MiniMax"):
    config = getattr(transformers, f"{name}Config")()
    kinds = config.layer_types
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    print(f"{name:15s} {len(kinds)} layers: {counted}")

# %% [markdown]
# RecurrentGemma: 26 layers are eight groups of three and two linear layers more, 18 : 8.
#
# ### 10.15 Why the features are positive
#
# Sines and cosines give an unbiased estimate of $e^{q\cdot k}$ too: $e^{|q|^2/2+|k|^2/2}\cos(w\cdot(q-k))$ has the right mean. *Predict.* Where $q\cdot k$ is very negative,
# the weight is near 0. Which of the two estimates is off by less there, and how often is one negative?

# %%
rng = np.random.default_rng(15)
w_t = rng.standard_normal((400, 64, 16))  # 400 draws of 64 features
one_q = np.ones(16) / 4 * 1.5  # length 1.5
for cosine in (1.0, 0.0, -1.0):
    side = np.tile([1.0, -1.0], 8) / 4 * 1.5  # at right angles to it
    one_k = cosine * one_q + math.sqrt(1 - cosine**2) * side
    exact_t = math.exp(one_q @ one_k)
    sizes_t = math.exp((one_q @ one_q + one_k @ one_k) / 2)
    waves = sizes_t * np.cos(w_t @ (one_q - one_k)).mean(1)
    positive = np.array([favor_features(one_q, w) @ favor_features(one_k, w)
                         for w in w_t])
    errors_t = [np.sqrt(((e - exact_t) ** 2).mean()) for e in (positive, waves)]
    print(f"exp(q·k) = {exact_t:5.2f}: positive features off by {errors_t[0]:.2f}, "
          f"waves by {errors_t[1]:.2f}, below 0 {(waves < 0).mean():.0%} of the time")

# %% [markdown]
# The positive ones, where it matters: most pairs of a text have small weights, and a sum of weights of either sign may come near 0. Where the weight is large waves
# are better.

# %% [markdown]
# ## Behind the scenes
#
# What the sections above import. **The triples**: checks, NumPy and PyTorch.

# %% tags=["plumbing"]
import functools

from attention.multi_head import masked_softmax

# %% tags=["export", "plumbing"]
def check_linear(q, k, v, chunk=64):
    """Raise ValueError or TypeError, in one sentence, unless the arguments fit. Returns the leading axes, broadcast."""
    check_arguments(q, k, v)
    if isinstance(chunk, bool) or not isinstance(chunk, (int, np.integer)) or chunk < 1:
        raise ValueError(f"chunk must be a positive whole number, got {chunk!r}")
    return np.broadcast_shapes(*(tuple(a.shape[:-2]) for a in (q, k, v)))

def linear_attention_numpy(q, k, v, causal=True, chunk=64, normalise=False):
    """Linear attention in chunks, with a state between them, in NumPy: sum_j (q_i · k_j) v_j, or divided by sum_j (q_i · k_j).

    q (..., n_queries, d_head) and k (..., n_keys, d_head) are features already, without a scale; v (..., n_keys, d_v);
    leading axes broadcast; causal is aligned at the bottom right; chunk, a positive number, does not change the result.
    Returns (..., n_queries, d_v) in the float type of q, float64 for integers (half precision is computed in single); a
    query with nothing to attend to, or weights that add up to 0 where they are normalised, gets zeros. What a query may
    not see changes nothing, be it nan. Raises ValueError when shapes do not fit.
    Source: Katharopoulos et al. 2020 (arXiv 2006.16236), equations 4 to 12.
    """
    lead = check_linear(q, k, v, chunk)
    cuda.check_kind(np.ndarray, q=q, k=k, v=v)
    given, work = q, cuda.work_type(q)
    q, k, v = (np.broadcast_to(a, (*lead, *a.shape[-2:])).astype(work) for a in (q, k, v))
    if normalise:
        v = np.concatenate([v, np.ones_like(v[..., :1], shape=(*v.shape[:-1], 1))], -1)  # a column more: the sum of the weights
    n, m = q.shape[-2], k.shape[-2]
    blind, before = (max(0, n - m), max(0, m - n)) if causal else (0, m)
    state = k[..., :before, :].swapaxes(-1, -2) @ v[..., :before, :]                      # what all queries see
    out = np.zeros((*lead, n, v.shape[-1]), work)
    if causal:
        finite = np.isfinite(k).all() and np.isfinite(v).all()                            # 0 times nan is nan, so ...
        rest = (a[..., first:, :] for a, first in ((q, blind), (k, before), (v, before)))
        out[..., blind:, :] = chunked_attention(*rest, int(chunk) if finite else 1, state)[0]
    else:
        out = q @ state
    if normalise:
        total = out[..., -1:]
        out = out[..., :-1] / np.where(total == 0, 1, total)
    return cuda.like(out, given)

def linear_attention_torch(q, k, v, causal=True, chunk=64, normalise=False):
    """linear_attention_numpy in PyTorch, differentiable. Same arguments, shapes and errors."""
    lead = check_linear(q, k, v, chunk)
    cuda.check_kind(torch.Tensor, q=q, k=k, v=v)
    given, work = q, cuda.work_type(q)
    q, k, v = (a.to(work).expand(*lead, *a.shape[-2:]) for a in (q, k, v))
    if normalise:
        v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
    n, m = q.shape[-2], k.shape[-2]
    blind, before = (max(0, n - m), max(0, m - n)) if causal else (0, m)
    state = k[..., :before, :].mT @ v[..., :before, :]
    if causal:
        finite = bool(k.isfinite().all() and v.isfinite().all())
        step, pieces = int(chunk) if finite else 1, [q.new_zeros(*lead, blind, v.shape[-1])]
        for first in range(0, max(n - blind, 1), step):                                    # once even where nothing is there
            q_c = q[..., blind + first : blind + first + step, :]
            k_c, v_c = (a[..., before + first : before + first + step, :] for a in (k, v))
            pieces.append(q_c @ state + (q_c @ k_c.mT).tril() @ v_c)
            state = state + k_c.mT @ v_c
        out = torch.cat(pieces, -2)
    else:
        out = q @ state
    if normalise:
        total = out[..., -1:]
        out = out[..., :-1] / total.masked_fill(total == 0, 1)
    return cuda.like(out, given)

# %% tags=["export", "plumbing"]
def selective_scan_numpy(x, delta, a, b, c, d=None):
    """The selective scan of Mamba in NumPy: h_t = exp(delta_t a) h_{t-1} + delta_t b_t x_t, y_t = c_t · h_t + d x_t.

    x, delta (batch, seq, channels), a (channels, state), b, c (batch, seq, state), d (channels,) or None; delta positive
    and a negative for a state that fades. Returns (batch, seq, channels) in the float type of x, float64 for integers.
    Raises ValueError when shapes do not fit. Source: Gu and Dao 2023 (arXiv 2312.00752), algorithm 2, with the step of its code.
    """
    check_scan(x, delta, a, b, c, d)
    cuda.check_kind(np.ndarray, x=x, delta=delta, a=a, b=b, c=c, **({} if d is None else {"d": d}))
    given, work = x, cuda.work_type(x)
    x, delta, a, b, c = (array.astype(work) for array in (x, delta, a, b, c))
    y, _ = scan(x, delta, a, b, c, np.zeros((len(x), *a.shape), work))
    return cuda.like(y if d is None else y + d.astype(work) * x, given)

def selective_scan_torch(x, delta, a, b, c, d=None):
    """selective_scan_numpy in PyTorch, differentiable. Same arguments, shapes and errors."""
    check_scan(x, delta, a, b, c, d)
    cuda.check_kind(torch.Tensor, x=x, delta=delta, a=a, b=b, c=c, **({} if d is None else {"d": d}))
    given, work = x, cuda.work_type(x)
    x, delta, a, b, c = (tensor.to(work) for tensor in (x, delta, a, b, c))
    h, ys = x.new_zeros(len(x), *a.shape), []
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        h = torch.exp(step * a) * h + step * b[:, t, None] * x[:, t, :, None]
        ys.append((h * c[:, t, None]).sum(-1))
    nothing = x * delta * a.sum(-1) * (b * c).sum(-1, keepdim=True)                       # a text without tokens has gradients too
    y = torch.stack(ys, 1) if ys else nothing
    return cuda.like(y if d is None else y + d.to(work) * x, given)

# %% [markdown]
# **The two kernels**: their bytes, their launches, the functions around them.

# %% tags=["export", "plumbing"]
def linear_tiles(d, d_v, available=48 * 1024):
    """How V is cut: (columns a thread, slices, bytes of shared memory). At most four columns a thread, fewer to fit."""
    def shared(columns):
        return 4 * (32 * (d + 1) + 256 * columns + 16 * d * (columns | 1))

    most = next((columns for columns in (4, 3, 2) if shared(columns) <= available), 1)
    slices = max(1, -(-d_v // (16 * most)))
    columns = max(1, -(-d_v // (16 * slices)))
    return columns, slices, shared(columns)

def linear_bytes(n_queries, n_keys, d, d_v):
    """Bytes of global memory that one head of the chunked kernel asks for, exactly: (loaded, stored).

    Queries and keys are read once for each slice of V, values once.
    """
    slices = linear_tiles(d, d_v)[1]
    return 4 * (slices * (n_queries + n_keys) * d + n_keys * d_v), 4 * n_queries * d_v

def scan_bytes(batch, n, channels, n_state, block=32):
    """Bytes of global memory that the scan asks for, exactly; block: channels that share a reading of b and c."""
    each = 3 * channels + 2 * n_state * -(-channels // block)              # x, delta, the output; b and c
    return 4 * (batch * n * each + batch * channels * (n_state + 1))

# %% tags=["export", "plumbing"]
@functools.cache
def linear_kernel(columns):
    """The kernel for so many columns of V a thread, compiled on first use."""
    return cuda.compile(LINEAR_CHUNKED, name="linear_chunked", template=(columns,))

def linear_launch(q, k, v, causal=True):
    """What launches the chunked kernel: kernel, (grid, block, shared bytes), arguments. The fourth is the output.

    All leading axes are one: (heads, seq, d), single precision. Causal: at least as many keys as queries.
    """
    lead, (n_queries, d), (n_keys, d_v) = check_linear(q, k, v), q.shape[-2:], v.shape[-2:]
    heads = math.prod(lead)
    q, k, v = (a.expand(*lead, *a.shape[-2:]).reshape(heads, *a.shape[-2:]).contiguous()
               for a in cuda.on_device(q, k, v))
    columns, slices, shared = linear_tiles(d, d_v)
    out = q.new_zeros(heads, n_queries, d_v)
    launch = (heads, slices), (16, 16), shared
    return linear_kernel(columns), launch, (q, k, v, out, n_queries, n_keys, d, d_v, int(causal))

# %% tags=["export", "plumbing"]
def linear_attention_cuda(q, k, v, causal=True, chunk=64, normalise=False):
    """linear_attention_numpy by a CUDA kernel: chunks of 16 tokens, the state d_head x d_v in shared memory.

    q (..., n_queries, d_head), k (..., n_keys, d_head), v (..., n_keys, d_v), leading axes broadcast, features already;
    causal is aligned at the bottom right; normalise divides by the sum of the weights (0 where that is 0). chunk is
    checked and else not used: it does not change the result. NumPy arrays and CPU tensors run on the CPU, CUDA tensors
    on the GPU. Computed in single precision. Returns (..., n_queries, d_v) in the kind and type of q. Not
    differentiable. d_head up to 250 within 48 KB of shared memory; more has to be granted by the GPU. Raises ValueError
    when shapes do not fit.
    Source: Katharopoulos et al. 2020 (arXiv 2006.16236); chunks: Yang et al. 2024 (arXiv 2312.06635), section 4.
    """
    lead, given, n_queries, d_v = check_linear(q, k, v, chunk), q, q.shape[-2], v.shape[-1]
    q, k, v = cuda.on_device(q, k, v)
    if normalise:
        v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)               # one more column: the sum of the weights
    out = q.new_zeros(*lead, n_queries, v.shape[-1])
    blind = max(0, n_queries - k.shape[-2]) if causal else 0               # queries before the first key
    kernel, launch, arguments = linear_launch(q[..., blind:, :], k, v, causal)
    if arguments[3].numel():
        kernel.fast[launch](*arguments)
    out[..., blind:, :] = arguments[3].reshape(*lead, n_queries - blind, v.shape[-1])
    if normalise:
        total = out[..., d_v:]
        out = out[..., :d_v] / total.masked_fill(total == 0, 1)
    return cuda.like(out, given)

# %% tags=["export", "plumbing"]
def check_scan(x, delta, a, b, c, d=None):
    """Raise ValueError or TypeError, in one sentence, unless the arguments of a scan fit. For arrays and tensors."""
    arrays = {"x": x, "delta": delta, "a": a, "b": b, "c": c} | ({} if d is None else {"d": d})
    cuda.check_numbers(**arrays)
    if len(x.shape) != 3 or len(a.shape) != 2:
        raise ValueError("x and a must have the axes (batch, seq, channels) and (channels, state), got shapes "
                         f"{tuple(x.shape)} and {tuple(a.shape)}")
    shapes = {"delta": tuple(x.shape), "a": (x.shape[2], a.shape[1]), "b": (*x.shape[:2], a.shape[1]),
              "c": (*x.shape[:2], a.shape[1]), "d": (x.shape[2],)}
    for name, shape in shapes.items():
        if name in arrays and tuple(arrays[name].shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(arrays[name].shape)}")

@functools.cache
def scan_kernel(states):
    """The kernel for so many states a lane, compiled on first use."""
    return cuda.compile(SELECTIVE_SCAN, name="selective_scan", template=(states,))

def scan_launch(x, delta, a, b, c, d=None):
    """What launches the scan: kernel, (grid, block, shared bytes), arguments. The seventh is the output."""
    check_scan(x, delta, a, b, c, d)
    (batch, n, channels), n_state = x.shape, a.shape[1]
    arrays = cuda.on_device(x, delta, a, b, c, np.zeros(channels, np.float32) if d is None else d)
    states = max(1, -(-n_state // 16))
    launch = (-(-channels // 32), batch), (16, 32), 2 * 4 * 16 * 16 * states
    return scan_kernel(states), launch, (*arrays, torch.zeros_like(arrays[0]), n, channels, n_state)

# %% tags=["export", "plumbing"]
def selective_scan_cuda(x, delta, a, b, c, d=None):
    """selective_scan_numpy by a CUDA kernel: 16 lanes a channel with its states in registers, 32 channels a block.

    x, delta (batch, seq, channels), a (channels, state), b, c (batch, seq, state), d (channels,) or None. NumPy arrays
    and CPU tensors run on the CPU, CUDA tensors on the GPU. Computed in single precision. Returns (batch, seq,
    channels) in the kind and type of x. Not differentiable. Up to 320 states with 48 KB of shared memory. Raises
    ValueError when shapes do not fit.
    Source: Gu and Dao 2023 (arXiv 2312.00752), algorithm 2.
    """
    kernel, launch, arguments = scan_launch(x, delta, a, b, c, d)
    if arguments[6].numel():
        kernel.fast[launch](*arguments)
    return cuda.like(arguments[6], x)

# %% [markdown]
# **The head of lecture 01**, and what imitates it.

# %% tags=["export", "plumbing"]
@torch.no_grad()
def head_inputs(sentence, layer=3, head=1, length=32):
    """(tokens, q, k, q_texts, k_texts) of one head of MiniLM, float64: of a sentence (n, 32), and of course prose (texts, length, 32)."""
    model, tokenizer = data.minilm()
    own = model.encoder.layer[layer].attention.self
    at = slice(head * 32, (head + 1) * 32)

    def projected(ids):
        x = model(input_ids=ids, output_hidden_states=True).hidden_states[layer].double()
        parts = ((own.query, own.query.bias.double()), (own.key, torch.zeros(384, dtype=torch.float64)))
        return [(x @ part.weight.double().T + bias)[..., at] for part, bias in parts]

    ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
    rows = tokenizer(data.course_prose(), add_special_tokens=False, verbose=False)["input_ids"]
    texts = torch.tensor(rows[: len(rows) // length * length]).view(-1, length)
    q, k = projected(ids)
    return tokenizer.convert_ids_to_tokens(ids[0].tolist()), q[0], k[0], *projected(texts)


class LearnedFeatures(nn.Module):
    """x (..., d) to 2 m positive features: softmax(x w + b) and softmax(-(x w + b)), after Zhang et al. 2024."""

    def __init__(self, d, m):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(d, m)), nn.Parameter(torch.zeros(m))

    def forward(self, x):
        y = 3 * (x @ self.w) + self.b
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


class Imitation(nn.Module):
    """Features of queries and of keys."""

    def __init__(self, d, m):
        super().__init__()
        self.of_q, self.of_k = LearnedFeatures(d, m), LearnedFeatures(d, m)

# %% [markdown]
# **The other implementations of 10.1**: the parallel form, and chunked functions of transformers for one head.

# %% tags=["export", "plumbing"]
def masked_form(q, k, v, log_decay, _beta):
    """Linear attention with decays as one masked matrix, in which the decay from j to i is the exponential of a difference."""
    total = np.cumsum(log_decay * np.ones(k.shape), axis=0)
    between = np.exp(np.minimum(total[:, None] - total, 0.0))                             # (n, n, d)
    return np.tril(np.einsum("id,jd,ijd->ij", q, k, between)) @ v


def mamba2_form(q, k, v, log_decay, beta):
    """Mamba-2's chunked scan, one head: a is -1, its step is -log_decay, and the value is divided by that step."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    steps = torch.from_numpy(-log_decay)[None]
    x, b, c = (torch.from_numpy(a)[None, :, None] for a in (v * beta / -log_decay, k, q))
    return mamba2_chunk_scan(x, steps, -torch.ones(1), b, c, 32)[0, :, 0].numpy()


def delta_form(q, k, v, log_decay, beta):
    """A chunked delta rule: Kimi Linear's where each row has its decay, Qwen3-Next's otherwise. They scale q by 1/sqrt(d)."""
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    each_row = log_decay.shape[1] > 1
    function = chunk_kimi_delta_attention if each_row else torch_chunk_gated_delta_rule
    given = [torch.from_numpy(a)[None, :, None] for a in (q, k, v, log_decay if each_row else log_decay[:, 0])]
    out, _ = function(*given, torch.from_numpy(beta)[None], initial_state=None, output_final_state=False)
    return math.sqrt(q.shape[1]) * out[0, :, 0].numpy()


references = {
    "linear attention": masked_form, "retention": masked_form, "GLA": masked_form, "Mamba-2": mamba2_form,
    "DeltaNet": delta_form, "Gated DeltaNet": delta_form, "Kimi Delta Attention": delta_form,
}

# %% [markdown]
# **The arrays of Mamba's picture.**

# %% tags=["export", "plumbing"]
@torch.no_grad()
def mamba_parts(layer, x):
    """What flows through a Mamba layer for one text x (n, d_model): {name: array}, in the order of the picture."""
    u, gate = (x @ layer.w_in).chunk(2, dim=-1)
    padded = nn.functional.pad(u, (0, 0, layer.conv.shape[1] - 1, 0))
    convolved = sum(padded[i : i + len(x)] * layer.conv[:, i] for i in range(layer.conv.shape[1])) + layer.conv_bias
    convolved = nn.functional.silu(convolved)
    found = convolved @ layer.w_x
    delta = nn.functional.softplus(found[:, : layer.rank] @ layer.w_dt + layer.dt_bias)
    b, c = found[:, layer.rank :].split(layer.d_state, -1)
    y = selective_scan_torch(convolved[None], delta[None], -layer.a_log.exp(), b[None], c[None], layer.d)[0]
    return {"x": x, "u": u, "gate": gate, "u, convolved": convolved, "Δ, b, c": found, "y": y, "out": layer(x[None])[0]}

# %% [markdown]
# **The models of 10.5**: two layers that differ in their mixer alone.

# %% tags=["export", "plumbing"]
class RecallMixer(nn.Module):
    """One head with keys of d_k: "softmax", "linear" (elu + 1, normalised) or "delta rule" (in one chunk, by a solve)."""

    def __init__(self, kind, d, d_k):
        super().__init__()
        self.kind = kind
        shapes = {"w_q": (d, d_k), "w_k": (d, d_k), "w_v": (d, d), "w_o": (d, d)} | ({"w_b": (d, 1)} if kind == "delta rule" else {})
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        q, k, v = x @ self.w_q, x @ self.w_k, x @ self.w_v
        if self.kind == "softmax":
            return masked_softmax(q @ k.mT / math.sqrt(q.shape[-1]), causal=True) @ v @ self.w_o
        if self.kind == "linear":
            weights = ((nn.functional.elu(q) + 1) @ (nn.functional.elu(k) + 1).mT).tril()
            return weights / weights.sum(-1, keepdim=True) @ v @ self.w_o
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        beta = torch.sigmoid(x @ self.w_b)
        lower = torch.eye(x.shape[1], dtype=x.dtype) + (beta * (k @ k.mT)).tril(-1)
        return (q @ k.mT).tril() @ torch.linalg.solve_triangular(lower, beta * v, upper=False) @ self.w_o


class RecallModel(nn.Module):
    """ids (batch, n) to logits (batch, n, 64): for each kind a layer of short convolution and RecallMixer."""

    def __init__(self, kinds, d=32, d_k=8):
        super().__init__()
        self.embedding = nn.Embedding(64, d)
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(len(kinds) + 1))
        self.convs = nn.ModuleList(nn.Conv1d(d, d, 3, groups=d) for _ in kinds)
        self.mixers = nn.ModuleList(RecallMixer(kind, d, d_k) for kind in kinds)
        self.out = nn.Parameter(torch.randn(d, 64))

    def forward(self, ids):
        x = self.embedding(ids)
        for norm, conv, mixer in zip(self.norms, self.convs, self.mixers):
            y = norm(x)
            x = x + mixer(y + conv(nn.functional.pad(y.mT, (2, 0))).mT)
        return self.norms[-1](x) @ self.out


def recall_batches(batch, seed, pairs=8):
    """Endless (ids (batch, 3 pairs), answers (batch, pairs)): key, value, key, value, ..., then the keys in another order."""
    rng = np.random.default_rng(seed)
    while True:
        keys = np.argsort(rng.random((batch, 32)), 1)[:, :pairs]
        values, order = rng.integers(32, 64, (batch, pairs)), np.argsort(rng.random((batch, pairs)), 1)
        asked, answers = (np.take_along_axis(a, order, 1) for a in (keys, values))
        told = np.stack([keys, values], 2).reshape(batch, -1)
        yield torch.from_numpy(np.concatenate([told, asked], 1)), torch.from_numpy(answers)


def recall_loss(model, given):
    """The mean cross-entropy of the answers, in nats."""
    ids, answers = given
    return nn.functional.cross_entropy(model(ids)[:, -answers.shape[1] :].mT, answers)


def recall_accuracy(model, given):
    """The share of answers that are right."""
    ids, answers = given
    return float((model(ids)[:, -answers.shape[1] :].argmax(-1) == answers).double().mean())


def train_recall(kinds, d_k, steps=200, seed=0):
    """The accuracy on texts not seen before at 0, 50, 100, ... steps: a list. kinds: one for both layers, or two."""
    model = training.initialise(RecallModel(kinds * 2 if len(kinds) == 1 else kinds, d_k=d_k).double(), seed)
    test = next(recall_batches(256, seed=99))
    with torch.no_grad():
        first = recall_accuracy(model, test)
    found = training.fit(model, recall_batches(32, seed), recall_loss, steps, lr=8e-3,
                         evaluate=lambda trained: recall_accuracy(trained, test), every=50)
    return [first, *found.metrics]

# %% [markdown]
# **The model of 10.10**: one layer of the delta rule.

# %% tags=["export", "plumbing"]
class ParityModel(nn.Module):
    """bits (batch, n) to logits (batch, n, 2): one delta rule with beta from 0 to `largest`."""

    def __init__(self, largest, d=8):
        super().__init__()
        self.largest, self.embedding, self.norm = largest, nn.Embedding(2, d), nn.RMSNorm(d)
        for name, columns in {"w_q": d, "w_k": d, "w_v": d, "w_b": 1, "out": 2}.items():
            setattr(self, name, nn.Parameter(torch.randn(d, columns)))

    def forward(self, bits):
        x = self.embedding(bits)
        q, k, v = x @ self.w_q, nn.functional.normalize(x @ self.w_k, dim=-1), x @ self.w_v
        beta = self.largest * torch.sigmoid(4 * (x @ self.w_b))
        lower = torch.eye(x.shape[1], dtype=x.dtype) + (beta * (k @ k.mT)).tril(-1)
        return self.norm((q @ k.mT).tril() @ torch.linalg.solve_triangular(lower, beta * v, upper=False)) @ self.out


def parity_batches(seed):
    """Endless bits (64, n), n from 4 to 16."""
    rng = np.random.default_rng(seed)
    while True:
        yield torch.from_numpy(rng.integers(0, 2, (64, int(rng.integers(4, 17)))))


def parity_loss(model, bits):
    """The mean cross-entropy of whether the number of ones so far is odd, in nats."""
    return nn.functional.cross_entropy(model(bits).mT, bits.cumsum(1) % 2)


def train_parity(largest, seed, steps=300):
    """A ParityModel trained on texts of 4 to 16 bits."""
    model = training.initialise(ParityModel(largest).double(), seed)
    training.fit(model, parity_batches(seed), parity_loss, steps, lr=2e-2)
    return model


@torch.no_grad()
def parity_accuracy(model, n):
    """The share of right answers at the last eight of n bits."""
    bits = torch.from_numpy(np.random.default_rng(9).integers(0, 2, (64, n)))
    return float((model(bits)[:, -8:].argmax(-1) == (bits.cumsum(1) % 2)[:, -8:]).double().mean())

# %% [markdown]
# ## Glossary
#
# |term|what it is|
# |---|---|
# |capacity|how many associations a state holds so that each is found again|
# |chunked form|scores inside a chunk, a state between chunks|
# |decay, gate|the factor on the state at each step: fixed, or from the token|
# |delta rule|writing the difference between a value and what the memory answers already|
# |discretisation|from a differential equation to steps of length Δ|
# |feature map|what makes positive features of queries and keys, in place of softmax|
# |hybrid|a model with linear and softmax layers|
# |recall|finding a value that was said once|
# |selective|parameters of the recurrence come from the token|
# |SSD|the duality of a scan and a masked score matrix (Mamba-2)|
# |state|all that is kept of the past: a matrix a head, or some numbers a channel|
# |state tracking|following something that every token changes, such as parity|
# |time-invariant|the same recurrence at each step, so a convolution|
#
# ## Sources
#
# Katharopoulos et al. 2020 (arXiv 2006.16236) · Choromanski et al. 2021, Performers (2009.14794) · Schlag et al. 2021, delta rule (2102.11174) · Hua et
# al. 2022, chunks (2202.10447) · Sun et al. 2023, RetNet (2307.08621) · Yang et al. 2023, GLA (2312.06635), 2024, DeltaNet (2406.06484) and Gated DeltaNet
# (2412.06464) · Kimi Team 2025, Kimi Linear (2510.26692) · Zhang et al. 2024, Hedgehog (2402.04347) · Grazzi et al. 2024 (2411.12537) · Gu et al. 2020, HiPPO
# (2008.07669), 2021, S4 (2111.00396) · Gu and Dao 2023, Mamba (2312.00752) · Dao and Gu 2024, Mamba-2 (2405.21060) · Mamba-3 (2603.15569) · Poli et al. 2023,
# Hyena (2302.10866) · Peng et al. 2023, RWKV (2305.13048) · Arora et al. 2023, Zoology (2312.04927) · Munkhdalai et al. 2024 (2404.07143) · hybrids: 2507.06457 ·
# transformers 5.23.0.
