# ---
# jupyter:
#   course:
#     edition: 2
#     experiments:
#     - LETTERS
#     - BACK
#     - READ_AT
#     - streams
#     - read_back_loss
#     - reader
#     - train_reader
#     - read_accuracy
#     - with_rotary
#     module: rotary
#     public:
#     - apply_rope_numpy
#     - apply_rope_torch
#     - apply_rope_cuda
#     - rope_frequencies
#     - alibi_slopes
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["slide"]
# # Lecture 03 · Rotary positional embeddings
#
# **The question.** How does order get into attention, and what happens at distances that no training text had?
# **You will be able to** *write* the rotation that most open models use (3A), *find* its bugs (3B), *convert* weights made
# for other pairs (3C), *build* the layer with its cache (3D), *measure* a model behind a gap (3E), *stretch* it (3F),
# *rotate* on a GPU (3G). **You need** attention and masks (lecture 01), heads and the small language model (lecture 02).
#
# | part or section | core minutes | more minutes |
# |---|---|---|
# | Part 1 · the question: 3.1 | 22 | |
# | Part 2 · NumPy: 3.2, exercises 3A, 3B | 57 | |
# | Part 3 · PyTorch: 3.3, exercises 3C, 3D | 46 | |
# | Part 4 · does it matter: 3.4, 3.5, exercise 3E | 41 | |
# | Part 5 · CUDA: 3.6 | 10 | |
# | Part 6 · in use: 3.7 | 4 | |
# | Another day: exercises 3F, 3G | | 30 |
# | Going further: 3.8 to 3.16, exercise 3H | | 60 |
# | **together** | **180** | **90** |

# %% [markdown] tags=["teacher"]
# **For the teacher: two times 50 minutes.** Run everything before class; cells with `smollm` take some seconds each.
#
# - *Hour 1 (40).* 3.1: the two sentences, what the real model says without positions (8) · 3.1: the three doors, the shift
#   test (9) · 3.2: two arrows on the board, 60 degrees apart (7) · 3.2: clocks, the flow figure (9) · say what 3A and 3B ask
#   (2) · 3.3: one stored weight matrix, wrong pairs (5).
# - *At home after hour 1.* 3A, 3B. For volunteers 3C.
# - *Hour 2 (40).* 3.3: the cache, the figure of the real model's losses (8) · 3.4: guess six curves, then the figure (11) ·
#   3.4: the gap (7) · 3.5: which pairs came round, three ways to slow them (9) · 3.6: bytes of a rotation (5).
# - *At home after hour 2.* 3D, 3E. For volunteers 3F, 3G.
# - *Board.* $\langle R_mq, R_nk\rangle=q^\top R_{n-m}k$, and two clock hands that turn together.
# - *Always works.* In 3.3 let the class choose a change of the positions, and guess the loss before it runs.
# - *Checkpoint 1.* All positions plus 7,000: what happens to the loss? (Nothing.) *Checkpoint 2.* Which pairs does NTK slow
#   most, and why those? (The slow ones: they have never come round.)
# - *Skip first.* 3.6 (5), then the flow figure of 3.2 (4): both read well at home.
# - *Questions that come.* Why are values not turned? Quiz question 2. Is ALiBi then best? Not where one exact place is asked for
#   (3.4). Does a larger base reach further? Only with training (3.15).

# %%
import math
import os
import sys
from functools import partial

sys.path.insert(0, "." if os.path.exists("course.py") else "..")

import numpy as np
import torch
from torch import nn

from attention.fundamentals import attention_numpy
from utils import plotting
from utils.check import check

torch.set_num_threads(1)  # tiny models: one thread is fastest

# %% [markdown]
# ## Part 1 · The question
#
# ### 3.1 Absolute and relative positions
#
# **What does attention make of another order?** Six words, each a random vector; queries and keys are its projections.
# The second sentence swaps two.
#
# *Predict.* Which words get another output there? And the two "the"?

# %% tags=["first-attention", "slide"]
words = ["the", "dog", "bites", "the", "man", "again"]
draw = np.random.default_rng(3)
meaning = {word: draw.standard_normal(8) for word in dict.fromkeys(words)}
x = np.stack([meaning[word] for word in words])  # (6 tokens, 8 columns)
w_q, w_k = draw.standard_normal((2, 8, 8)) / np.sqrt(8)
swapped = [0, 4, 2, 3, 1, 5]  # the man bites the dog again

out = attention_numpy(x @ w_q, x @ w_k, x)
x_swapped = x[swapped]
out_swapped = attention_numpy(x_swapped @ w_q, x_swapped @ w_k, x_swapped)
for i, word in enumerate(words):
    print(f"{word:6s} output {out[i, 0]:6.3f}, in the other sentence "
          f"{out_swapped[swapped.index(i), 0]:6.3f}")

# %% [markdown]
# None, and the two "the" cannot be told apart. Shuffle the tokens, and the output is shuffled in the same way:
# $f(Px)=Pf(x)$. That is **permutation equivariance**: who bites whom is lost.
#
# *Predict.* SmolLM2 is asked for the capital of Germany after "The capital of France is Paris. The capital of Germany is".
# Without its positions, what does it write?

# %% tags=["language-model", "slide"]
from utils import language_model

smollm = language_model.load()
if smollm:
    print(language_model.compare(smollm, rotate=lambda x, positions: x))

# %% [markdown]
# It repeats a word. (Its causal mask leaves a trace of order, 3.9. It is no help here: the model was trained with
# positions.) Order can come in through three doors. Lecture 02 left a hook at each, `Positions`.
#
# |hook|what changes|schemes|
# |---|---|---|
# |`embed`|a vector for the place is added to the embedding|**learned** (a row for each place), **sinusoidal** (fixed waves)|
# |`bias`|a number for the distance is added to the score|**T5** (trained, one for each bucket of distances), **ALiBi** (fixed: minus slope times distance)|
# |`rotate`|queries and keys are turned by an angle|**RoPE**|
#
# With "not at all" (**NoPE**) that makes six ways to tell positions. What do they do to words that are all the same?

# %% tags=["slide"]
from attention.fundamentals import softmax
from attention.rotary import ALiBi, rope_frequencies, sinusoidal_positions

far = np.arange(24)  # how many tokens back a key stands
waves = sinusoidal_positions(far, 32)
angles_back = np.outer(far, rope_frequencies(32)[0])
scores = {"NoPE": np.zeros(24), "sinusoidal": waves @ waves[0] / np.sqrt(32),
          "ALiBi, slope 1/4": ALiBi(8).bias(1, 24).numpy()[1, 0, ::-1],
          "RoPE": 2 * np.cos(angles_back).sum(1) / np.sqrt(32)}
weights = {name: softmax(row) for name, row in scores.items()}
plotting.curves(weights, x=far, xlabel="tokens back", ylabel="attention weight",
                title="Equal words: NoPE sees no order, the others prefer near keys")
plotting.show("Attention weight against distance on equal words: level for NoPE, "
              "falling for ALiBi, falling and then wavy for sinusoidal and RoPE.")
for name, row in weights.items():
    print(f"{name:17s} weight on itself {row[0]:.2f}, on the key before {row[1]:.2f}")

# %% [markdown]
# **Who notices where a text begins?** The same twelve tokens, at positions 0 to 11 and at 100 to 111; the logits of an
# untrained model of two layers.
#
# *Predict.* Six schemes. Which ones notice?

# %% tags=["slide"]
from attention.multi_head import Positions, TransformerConfig, TransformerLM
from attention.rotary import Learned, Rotary, Sinusoidal, T5Bias
from utils import training

config = TransformerConfig(vocab_size=20, d_model=32, n_heads=4, n_layers=2, d_ff=64)
schemes = {"learned": Learned(256, 32), "sinusoidal": Sinusoidal(), "T5": T5Bias(4),
           "ALiBi": ALiBi(4), "RoPE": Rotary(8), "NoPE": Positions()}
ids = torch.from_numpy(np.random.default_rng(1).integers(20, size=(2, 12)))
changes = {}
for name, scheme in schemes.items():
    model = training.initialise(TransformerLM(config, positions=scheme).double(), 0)
    with torch.no_grad():
        later = model(ids, positions=torch.arange(100, 112))
        changes[name] = (model(ids) - later).abs().max().item()
    print(f"{name:10s} logits change by {changes[name]:.3f}")
plotting.bars({name: round(change, 12) for name, change in changes.items()},
              ylabel="largest change of a logit",
              title="Learned and sinusoidal notice where a text begins, others do not")
plotting.show("Six bars: learned and sinusoidal positions change the logits, T5, "
              "ALiBi, RoPE and NoPE leave them exactly as they were.")

# %% [markdown]
# Two: what is added to the embedding is **absolute**. T5, ALiBi and RoPE are **relative**: distance 5 is distance 5 everywhere.
# (T5 and ALiBi pass by construction: their hook is handed counts of tokens, no positions. For RoPE the test is a test.) RoPE is
# the odd one. It turns each query and each key by its *absolute* position, each alone, so keys can be
# cached; and only the distance is left in the score. How?

# %% [markdown] tags=["slide"]
# ## Part 2 · NumPy
#
# ### 3.2 RoPE mathematics: a rotation for each position
#
# **Can a query at $m$ and a key at $n$ be changed, each alone, so that their product knows only $m-n$?** In the plane, yes:
# turn the query by $m\theta$ and the key by $n\theta$. A dot product depends on two lengths and the angle between, and
# that has changed by $(m-n)\theta$. A rotation's transpose is its inverse, so
#
# $$\langle R_m q,\;R_n k\rangle=q^\top R_m^\top R_n\,k=q^\top R_{n-m}\,k$$
#
# *Predict.* By hand: $q=k=(1,0)$ and $\theta=60°$. The query stands at 2, the key at 1: which score? At 7 and 6? At 7 and 4?

# %% tags=["slide"]
def turn(pair, angle):
    """Rotate a vector (2,) of the plane against the clock."""
    a, b = pair
    return np.array([a * np.cos(angle) - b * np.sin(angle),
                     a * np.sin(angle) + b * np.cos(angle)])

east = np.array([1.0, 0.0])
for m, n in ((2, 1), (7, 6), (7, 4)):
    score = turn(east, m * np.radians(60)) @ turn(east, n * np.radians(60))
    z_m, z_n = np.exp(1j * np.radians(60) * np.array([m, n]))
    as_complex = (z_m * z_n.conj()).real
    wrong = np.cos((m - n) * m * np.radians(60))
    print(f"query at {m}, key at {n}: score {score:5.2f}, in complex numbers "
          f"{as_complex:5.2f}; cos((m - n) m θ) {wrong:5.2f}")

# %% [markdown]
# $\cos 60°=\frac12$ for both neighbours, wherever they stand, and $\cos 180°=-1$ at distance 3. Read a pair $(a,b)$ as $a+ib$, and turning is
# multiplying by $e^{im\theta}$: $\;\langle R_mq,R_nk\rangle=\mathrm{Re}\big(q\bar k\,e^{i(m-n)\theta}\big)$. This is **RoPE**, rotary position embedding (Su et
# al. 2021, arXiv 2104.09864).
#
# **Trap.** *"The angle between query and key is $(m-n)\,m\,\theta$."* Public notes have had this formula. The last column shows what it loses: neighbours
# at 2 and 7 get two scores.
#
# **One angle is not enough.** At 60° a distance of 6 looks like 0. So the $d$ columns of a head are cut into $d/2$ pairs,
# and each turns at its own frequency, from 1 radian a token down to nearly nothing:
#
# $$\theta_i=b^{-2i/d},\qquad i=0\dots d/2-1,\qquad b=10000$$

# %% tags=["slide"]
frequencies = 10000.0 ** (-np.arange(0, 8, 2) / 8)  # of the running example: 4 pairs
for i, theta in enumerate(frequencies):
    print(f"pair {i}: {theta:5.3f} radians a token, "
          f"one turn in {2 * np.pi / theta:5,.0f} tokens")
distance = np.linspace(0, 40, 401)
ax = plotting.curves({f"pair {i}": np.cos(distance * theta)
                      for i, theta in enumerate(frequencies)}, x=distance,
                     xlabel="distance of query and key (tokens)",
                     ylabel="cos(distance · θ): this pair's part of a score",
                     title="Pair 0 tells neighbours apart; pairs 2 and 3 hardly move")
ax.set_xlim(-1, 49)  # room for the legend
ax.legend(loc="center right")
plotting.show("Four cosines against the distance: pair 0 oscillates six times, pair 1 "
              "falls to minus one at 31 tokens, pair 2 bends a little, pair 3 is flat.")

# %% [markdown]
# They are like the hands of a clock. Now the running example, one token and one pair at a time. The pair $i$ is columns $i$ and $i+d/2$. **The number to watch: the score of
# "man" (token 4) with "dog" (token 1).**

# %% tags=["slide"]
q, k = x @ w_q, x @ w_k  # (6, 8) each: one head
positions = np.arange(6)

def turned_by_loop(rows):
    turned = np.zeros_like(rows)
    for m in range(len(rows)):
        for i, theta in enumerate(frequencies):
            pair = [i, i + 4]
            turned[m, pair] = turn(rows[m, pair], positions[m] * theta)
    return turned

q_loop, k_loop = turned_by_loop(q), turned_by_loop(k)
print(f"man · dog without positions {q[4] @ k[1] / np.sqrt(8):6.3f}, "
      f"turned {q_loop[4] @ k_loop[1] / np.sqrt(8):6.3f}")
print(f"man · the (0) {q_loop[4] @ k_loop[0] / np.sqrt(8):6.3f}, "
      f"man · the (3) {q_loop[4] @ k_loop[3] / np.sqrt(8):6.3f}")

# %% [markdown]
# The two "the" are two words now. All at once: a table of angles, its cosines and sines, two lines that turn; and once more in complex numbers, where it is one product.

# %%
angles = positions[:, None] * frequencies  # (6 positions, 4 pairs)
cos, sin = np.cos(angles), np.sin(angles)

def turned_at_once(rows):
    a, b = rows[:, :4], rows[:, 4:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

q_turned, k_turned = turned_at_once(q), turned_at_once(k)
z_q, z_k = ((rows[:, :4] + 1j * rows[:, 4:]) * np.exp(1j * angles) for rows in (q, k))
print(f"man · dog at once {q_turned[4] @ k_turned[1] / np.sqrt(8):6.3f}, in complex "
      f"numbers {(z_q[4] * z_k[1].conj()).real.sum() / np.sqrt(8):6.3f}")

# %% tags=["slide"]
plotting.flow(
    {"q": q, "k": k, "θ": frequencies[None], "positions": positions[:, None],
     "angles": angles, "q turned": q_turned, "k turned": k_turned,
     "scores": q_turned @ k_turned.T / np.sqrt(8), "v": x,
     "out": softmax(q_turned @ k_turned.T / np.sqrt(8)) @ x},
    [(("positions", "θ"), "angles", "m · θᵢ"),
     (("q", "angles"), "q turned", "turn pairs"),
     (("k", "angles"), "k turned", "turn pairs"),
     (("q turned", "k turned"), "scores", "q kᵀ / √d"),
     (("scores", "v"), "out", "softmax · v")],
    title="RoPE: the same angles turn the pairs of queries and of keys; values pass by")
plotting.show("Data flow: positions times frequencies give angles of 6 tokens by 4 "
              "pairs; they turn queries and keys, whose product gives 6 by 6 scores; "
              "values join after the softmax, as they were.")

# %% [markdown] tags=["slide"]
# #### Exercise 3A: turn every pair  (difficulty 3 of 5, essential, 20 minutes; if you do only two)
#
# Write RoPE for any number of axes in front. `rope_angles(x, positions, frequencies)` checks the shapes and returns the angles, in a shape that
# broadcasts with `(..., seq, n_pairs)`.
#
# |argument|shape|meaning|
# |---|---|---|
# |`x`|`(..., seq, d)`|queries or keys|
# |`positions`|`(seq,)` or `(batch, seq)`|where each token stands; `batch` is the first axis of `x`|
# |`frequencies`|`(n_pairs,)`|radians a position; `2 * n_pairs` may be less than `d`|
# |`attention_scale`|float|multiplies what is turned (section 3.5)|
# |`interleaved`|bool|pairs are columns `(2i, 2i + 1)`; otherwise `(i, i + n_pairs)`|
#
# Returns an array of the shape and float type of `x`. Columns from `2 * n_pairs` on stay as they are. `x` itself does not
# change.
#
# <details><summary>Hint</summary>
#
# `pair_slices(n_pairs, interleaved)` returns two slices: where do the first and the second members of all pairs stand? What
# does the second line read, if the first has already written? What holds the columns that stay?
#
# </details>

# %%
from attention.rotary import pair_slices, rope_angles
from utils import cuda

# %% tags=["exercise", "export"] kind="numpy"
def apply_rope_numpy(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    """Turn each pair of columns of x by position times frequency, in NumPy.

    x (..., seq, d); positions (seq,) or (batch, seq), batch being the first axis of x;
    frequencies (d_rot / 2,), in radians per position. Pairs are columns i and
    i + d_rot / 2, or with interleaved 2i and 2i + 1. Columns from d_rot on stay as they
    are. attention_scale multiplies what is rotated. Returns the shape and float type of
    x (half precision may be computed in single); rope_angles raises a ValueError when
    shapes do not fit. Source: Su et al. 2021 (arXiv 2104.09864), equation 34.
    """
    ### BEGIN SOLUTION
    angles, work = rope_angles(x, positions, frequencies), cuda.work_type(x)
    cos = (attention_scale * np.cos(angles)).astype(work)
    sin = (attention_scale * np.sin(angles)).astype(work)
    first, second = pair_slices(len(frequencies), interleaved)
    a, b = x[..., first].astype(work), x[..., second].astype(work)
    out = x.astype(work)
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return cuda.like(out, x)
    ### END SOLUTION

# %%
apply_rope_numpy = check("3A", apply_rope_numpy)

# %% [markdown]
# **Into a real model.** Yours takes the place of SmolLM2's own rotation: heads of 64 columns, base 100,000.

# %% tags=["language-model"]
if smollm:
    thetas = rope_frequencies(64, 100000.0)[0]

    def mine(x, positions):
        return torch.from_numpy(apply_rope_numpy(x.numpy(), positions.numpy(), thetas))

    language_model.put_in(smollm, rotate=mine)

# %% [markdown]
# Two properties, asserted up to position 100,000: lengths stay, and a score knows only the distance.

# %%
far_q, far_k = draw.standard_normal((2, 20, 8))  # 20 queries, and a key for each
apart = draw.integers(0, 100, size=20)
for start in (0, 1_000, 99_900):
    there = apply_rope_numpy(far_q, start + apart, frequencies)
    here = apply_rope_numpy(far_k, np.full(20, start), frequencies)
    assert np.allclose(np.linalg.norm(there, axis=-1), np.linalg.norm(far_q, axis=-1))
    of_three = (there * here).sum(-1)[:3]
    print(f"keys at {start:6,}: first three scores", of_three.round(3))

# %% [markdown]
# **Trap.** *"RoPE weakens tokens that are far away."* The paper shows a bound that falls with distance, and equal vectors do score
# less: that was the fall in 3.1. *Predict.* And vectors that point anywhere?

# %%
clocks = rope_frequencies(64)[0]
any_q, any_k = np.random.default_rng(23).standard_normal((2, 4000, 64))
for apart_by in (0, 10, 100, 1000):
    ones = apply_rope_numpy(np.ones((1, 64)), np.array([apart_by]), clocks).sum() / 64
    spread = (apply_rope_numpy(any_q, np.full(4000, apart_by), clocks) * any_k).sum(-1)
    print(f"distance {apart_by:5,}: equal vectors {ones:.2f}, "
          f"spread of random scores {spread.std() / 8:.1f}")

# %% [markdown]
# Their scores are as large at 1,000 as at 0. A rotation changes an angle, not a size: a model *can* learn to look far. (Barbero et al. 2024, arXiv 2410.06205, make
# the same point.)
#
# #### Exercise 3B: find the bug  (difficulty 3 of 5, useful, 15 minutes)
#
# Write a test that is given a rotation and notices whether it is wrong. It is tried on nine wrong ones, and on right ones, which differ in the last digits.
#
# |argument|meaning|
# |---|---|
# |`rope`|`rope(x, positions, frequencies)`, as `apply_rope_numpy` without its options: half-split pairs|
#
# Returns nothing. It raises an error (`assert ...`) for a wrong rotation, and none for a right one.
#
# <details><summary>Hint</summary>
#
# Which loop is so plain that you believe it? Which sizes make two axes impossible to confuse? Which positions would a bug that ignores
# them not survive, and which a bug that rounds? Is there a column that should stay?
#
# </details>

# %% tags=["exercise", "export"] kind="bug"
def test_rope(rope):
    """Raise AssertionError if rope(x, positions, frequencies) is wrong."""
    ### BEGIN SOLUTION
    rng = np.random.default_rng(1)
    x, thetas = rng.standard_normal((2, 3, 9)), np.array([1.0, 0.5, 0.2, 0.01])
    given, places = x.copy(), np.array([100_003, 7, 40])
    got = rope(x, places, thetas)
    assert np.array_equal(x, given), "the input has changed"
    for head in range(2):
        for row, place in enumerate(places):
            for i, theta in enumerate(thetas):
                z = complex(given[head, row, i], given[head, row, i + 4])
                z = z * np.exp(1j * place * theta)
                assert np.allclose(got[head, row, [i, i + 4]], [z.real, z.imag]), i
    assert np.array_equal(got[..., 8], given[..., 8]), "a column without a pair"
    ### END SOLUTION

# %%
test_rope = check("3B", test_rope)

# %% [markdown]
# ## Part 3 · PyTorch
#
# ### 3.3 Implementation details: pairs, parts, layers and caches
#
# **Two libraries both "have RoPE". What happens when the weights of one run in the other?** The paper pairs neighbours, columns $2i$ and $2i+1$:
# **interleaved**. Llama's code in transformers pairs column $i$ with $i+d/2$: **half-split**. A checkpoint rarely says which.
#
# *Predict.* SmolLM2's weights, made for halves, with neighbours turned. No shape is wrong. Loss (2.78 when right), and the capital of Germany?

# %% tags=["language-model", "slide"]
if smollm:
    def neighbours(x, positions):
        return torch.from_numpy(apply_rope_numpy(
            x.numpy(), positions.numpy(), thetas, interleaved=True))

    print(language_model.compare(smollm, rotate=neighbours))

# %% [markdown]
# The first word is right and the loss has more than doubled: a model that half works. At distance 0 nothing turns, so a test on one token finds nothing.
#
# But the two are the same function of differently ordered columns. A score sums over all columns; where a pair stands does not matter if query and key
# agree. **Permute the columns of the weights once, and everything is as before.**
#
# #### Exercise 3C: convert the weights  (difficulty 2 of 5, useful, 10 minutes)
#
# |argument|shape|meaning|
# |---|---|---|
# |`w`|`(d_model, n_heads * d_head)`|a query or key projection, used as `x @ w`, made for interleaved pairs|
# |`n_heads`|int|number of heads, side by side in the columns|
#
# Returns weights of the same shape and type with which half-split RoPE gives the same scores: in each head first the first members of
# all pairs, then the second members, both in their order.
#
# <details><summary>Hint</summary>
#
# Into which three axes do the columns of all heads fall? Which two of them have to change places?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def interleaved_to_half_split(w, n_heads):
    """Reorder columns of a projection: half-split RoPE then does what interleaved did.

    w (d_model, n_heads * d_head), d_head even. Returns the same shape and type.
    ValueError where the columns do not make n_heads heads of even size.
    """
    if n_heads < 1 or w.shape[-1] % (2 * n_heads):
        raise ValueError("w must have an even number of columns for each of "
                         f"{n_heads} heads, got {w.shape[-1]}")
    ### BEGIN SOLUTION
    pairs = w.reshape(len(w), n_heads, -1, 2)
    return pairs.swapaxes(-1, -2).reshape(w.shape)
    ### END SOLUTION

# %%
interleaved_to_half_split = check("3C", interleaved_to_half_split)

# %%
stored = [interleaved_to_half_split(w, 1) for w in (w_q, w_k)]
old_q, old_k = (apply_rope_numpy(a, positions, frequencies, interleaved=True)
                for a in (q, k))
new_q, new_k = (apply_rope_numpy(x @ w, positions, frequencies) for w in stored)
print(f"man · dog, neighbours turned {old_q[4] @ old_k[1] / np.sqrt(8):6.3f}, "
      f"converted and halves turned {new_q[4] @ new_k[1] / np.sqrt(8):6.3f}")

# %% [markdown]
# And the real file: it stores the queries' weights of layer 0 for neighbours. Yours makes of them what the model uses.

# %% tags=["language-model"]
if smollm:
    from utils.language_model import files, gguf

    rows = gguf.GGUF(files.path()).tensor("blk.0.attn_q.weight")  # (columns, d_model)
    used = smollm.blocks[0].attention.w_q.numpy()
    halves = interleaved_to_half_split(rows.T, 9)
    for name, w in (("as stored", rows.T), ("converted", halves)):
        print(f"{name}: columns that agree with the model's "
              f"{int((w == used).all(0).sum())} of {used.shape[1]}")

# %% [markdown]
# (In each head the first and the last column stay where they are.) **Partial rotary.** Some models turn only part of each head: GPT-NeoX a quarter, Phi-2 two fifths; lecture 09 keeps 64
# columns for RoPE beside 128 without. Fewer frequencies do it; the rest compares content alone.
#
# **Where does the rotation stand in a layer?** After the split into heads, before the cache: a key is turned once, by its own position, and never again.
#
# #### Exercise 3D: the layer with its cache  (difficulty 3 of 5, essential, 18 minutes; if you do only two)
#
# Write the layer: its parameters in `__init__`, and what becomes of a text in `forward`.
#
# |array|shape|
# |---|---|
# |`x`|`(batch, n, d_model)`|
# |parameters `w_q`, `w_k`, `w_v`, `w_o`|`(d_model, d_model)`, used as `x @ w`|
# |q and k, turned as two halves; v|`(batch, n_heads, n, d_head)`|
# |`positions`|`(n,)`; by default they count on after what the cache holds, from 0 without one|
# |out|`(batch, n, d_model)`|
#
# `cache.length` tokens are stored; `cache.update(k, v)` stores more and returns all so far. Attention is causal, with the last query at the last
# key: `attention_torch(q, k, v, causal=True)`.
#
# Returns what the heads found, merged and multiplied by `w_o`.
#
# <details><summary>Hint</summary>
#
# Which two of the three are turned? In which order do split, turn and cache stand? One new token comes alone, and 40 are stored: what is its
# position? A parameter of size (a, b): `nn.Parameter(torch.randn(a, b) * a**-0.5)`.
#
# </details>

# %%
from attention.fundamentals import attention_torch
from attention.multi_head import merge_heads, split_heads
from attention.rotary import apply_rope_torch

# %% tags=["exercise", "export"] kind="module"
class RotaryAttention(nn.Module):
    """Causal self-attention whose queries and keys are turned by their positions.

    base: of the frequencies. ValueError unless d_model / n_heads is an even number.
    """

    def __init__(self, d_model, n_heads, base=10000.0):
        super().__init__()
        if n_heads < 1 or d_model % (2 * n_heads):
            raise ValueError("d_model must make n_heads heads of even size, "
                             f"got {d_model} and {n_heads}")
        self.n_heads = n_heads
        ### BEGIN SOLUTION
        self.frequencies, _ = rope_frequencies(d_model // n_heads, base)
        self.w_q, self.w_k, self.w_v, self.w_o = (
            nn.Parameter(torch.randn(d_model, d_model) * d_model**-0.5) for _ in range(4))
        ### END SOLUTION

    def forward(self, x, positions=None, cache=None):
        ### BEGIN SOLUTION
        q, k, v = (split_heads(x @ w, self.n_heads) for w in (self.w_q, self.w_k, self.w_v))
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + x.shape[1])
        q, k = (apply_rope_torch(a, positions, self.frequencies) for a in (q, k))
        if cache is not None:
            k, v = cache.update(k, v)
        return merge_heads(attention_torch(q, k, v, causal=True)) @ self.w_o
        ### END SOLUTION

# %%
RotaryAttention = check("3D", RotaryAttention)

# %% [markdown]
# The running example through the layer, whole and token by token; and with a popular mistake: positions that restart at 0, because each token comes alone.

# %%
from utils.language_model import Cache

layer = training.initialise(RotaryAttention(8, 1).double(), 0)
tokens = torch.from_numpy(x)[None]
with torch.no_grad():
    whole = layer(tokens)
    for name, places in (("counted on", None), ("restarted at 0", torch.tensor([0]))):
        cache = Cache()
        each = [layer(tokens[:, t:t + 1], places, cache) for t in range(6)]
        off_by = (whole - torch.cat(each, dim=1)).abs().max(-1).values[0].numpy()
        print(f"{name:14s} difference to the whole text, each token:", off_by.round(2))

# %% [markdown]
# Training does not show this mistake: there is no cache. **How much does each change of positions cost the real model?** A text of this course, 256 tokens.
#
# *Predict.* Sort them: all positions plus 7,000; twice as large; four times; restarted every 64 tokens; base 10,000 instead of 100,000; wrong pairs; none.

# %% tags=["language-model", "slide"]
if smollm:
    text, p = language_model.excerpt(smollm, 256, "course"), torch.arange(256)
    cost = {name: float(smollm.losses(text, positions=places).mean())
            for name, places in {"right": p, "all + 7,000": p + 7000, "all x 2": 2 * p,
                                 "all x 4": 4 * p, "restart every 64": p % 64}.items()}
    other_base = partial(apply_rope_torch, frequencies=rope_frequencies(64)[0])
    for name, rotate in {"base 10,000": other_base, "wrong pairs": neighbours,
                         "none": lambda x, places: x}.items():
        cost[name] = float(smollm.replace(rotate=rotate).losses(text).mean())
    for name, loss in cost.items():
        print(f"{name:17s} loss {loss:.2f}")
    plotting.bars(cost, ylabel="loss (nats a token)",
                  title="A shift costs nothing, a wrong base or factor 2 little, "
                  "the others most of a nat and more")
    plotting.show("Eight bars of loss: right and shifted alike, base 10,000 and twice "
                  "as large a little higher, the other four clearly higher.")

# %% [markdown]
# The shift costs nothing: RoPE is relative, in a trained model too. A wrong base hardly shows in the loss: to find it, compare logits with a reference. Stretched by 4, the model is
# worse off than with none. Section 3.5 will stretch, and has to explain why that can work.

# %% [markdown]
# ## Part 4 · Does it matter?
#
# ### 3.4 Benefits over other approaches: six schemes, one task
#
# **Which scheme can point at one exact place, and how far?** A stream of random letters, 16 of them. At each place the model says which letter stood **three
# places back**. The letters are independent: whoever has not looked there is right by chance, one time in 16. One layer, two heads of 16; trained on
# streams of 32; read up to 256. Two seeds each.
#
# *Predict.* Six curves of accuracy against the place. Which schemes learn it at all? Who holds beyond 32?

# %% tags=["approx", "slide"] approx={"numbers": 0.3, "picture": 0.1}
from attention.experiments.rotary import READ_AT, read_accuracy, train_reader

makers = {"RoPE": partial(Rotary, 16), "ALiBi": partial(ALiBi, 2),
          "T5": partial(T5Bias, 2, n_buckets=8, max_distance=16),
          "sinusoidal": Sinusoidal, "learned": partial(Learned, 256, 32),
          "NoPE": Positions}
readers, right = {}, {}
for name, make in makers.items():
    readers[name] = [train_reader(make(), seed) for seed in (0, 1)]
    right[name] = np.array([read_accuracy(reader) for reader in readers[name]])
    _, within, behind_32, _, last = right[name].mean(0)
    print(f"{name:10s} places 16-32: {within:.1f}, 32-64: {behind_32:.1f}, "
          f"128-256: {last:.1f}")
ax = plotting.curves(right, x=READ_AT, xlabel="place in the stream (trained up to 32)",
                     ylabel="accuracy, three back", threshold=1 / 16,
                     threshold_name="chance:",
                     title="Within 32 four schemes are right; beyond, T5 holds best, "
                           "RoPE slides, sinusoidal and learned drop at once")
ax.set_xscale("log", base=2)
ax.xaxis.set_major_formatter("{x:.0f}")
ax.legend(loc="upper left", bbox_to_anchor=(0, 0.92), title="band: range over 2 seeds")
plotting.show("Accuracy against place: RoPE, T5, sinusoidal and learned at 1 up to 32; "
              "then T5 falls slowly to three quarters, RoPE to chance at 181, the two "
              "absolute ones at once; ALiBi stays near a fifth, NoPE below it.")

# %% [markdown]
# Four learn it; **ALiBi cannot**: its penalty only grows with distance, so no head can prefer three back to two back. It stays
# near a fifth to the end. NoPE has nothing to point with. Beyond 32 the absolute schemes meet vectors they have never seen, and drop. T5's far distances share
# a bucket that was trained.
#
# And RoPE? Three back is three back at every place. *Predict.* Why does it fail at all? Hide all keys that are 32 or more tokens back, and say what the accuracy is then.

# %% tags=["approx"] approx={"numbers": 0.2}
i = torch.arange(256)
near_only = i[:, None] - i < 32  # True = may attend
for seed, reader in enumerate(readers["RoPE"]):
    print(f"seed {seed}, places 128-256: all keys {read_accuracy(reader)[4]:.1f}, "
          f"only distances below 32 {read_accuracy(reader, near_only)[4]:.1f}")

# %% [markdown]
# All of it comes back. The right key is still found; but the keys at **distances never seen in training** get scores that nobody has trained, and some are larger. This is the failure of *position generalisation*.
#
# **Trap.** *"Use RoPE for better length generalisation."* Chen et al. (2023, arXiv 2306.15595) report perplexities in the thousands beyond the trained length.
# Press et al. (2021, arXiv 2108.12409) made ALiBi for that.
#
# **And a real model?** SmolLM2 was trained on 8,192 positions. Texts of that length are too long for this notebook. But RoPE sees differences only: so put a **gap** of positions between a prompt and what follows, an emulation of a long text with few tokens.
#
# #### Exercise 3E: the loss behind a gap  (difficulty 3 of 5, useful, 12 minutes)
#
# |argument|shape|meaning|
# |---|---|---|
# |`model`||`model(ids, positions=places)` gives logits `(batch, n, vocab_size)`; places `(n,)`|
# |`ids`|`(batch, n)` int64|a text|
# |`n_prompt`|int|its first tokens stand at 0, 1, ...|
# |`gap`|int|all others stand this much later than they would|
#
# Returns a tensor `()` that can be trained on: the mean next-token loss, over the predictions that are made behind the gap, from tokens behind it. The first token behind
# the gap is not counted: the one that predicts it stands before the gap.
#
# <details><summary>Hint</summary>
#
# Which positions do the tokens have, with `n_prompt = 2` and a gap of 10? The logits at place i are about which token? Which is the first place whose logits count, and
# which the last? `cross_entropy` wants the classes on axis 1.
#
# </details>

# %% tags=["exercise", "export"] kind="training"
def gap_loss(model, ids, n_prompt, gap):
    """Mean next-token loss behind a gap of positions after the first n_prompt tokens.

    model(ids, positions=...): logits (batch, n, vocab_size); ids (batch, n) int64.
    Returns a tensor () with its graph: the mean over all tokens after that at n_prompt.
    """
    ### BEGIN SOLUTION
    positions = torch.arange(ids.shape[1])
    positions[n_prompt:] += gap
    logits = model(ids, positions=positions)[:, n_prompt:-1]
    return nn.functional.cross_entropy(logits.mT, ids[:, n_prompt + 1:])
    ### END SOLUTION

# %%
gap_loss = check("3E", gap_loss)

# %% [markdown]
# A prompt of 256 tokens and 127 predictions behind the gap. The dashed line is the loss with no prompt at all.
#
# *Predict.* Where does the curve cross it?

# %% tags=["language-model", "slide"]
if smollm:
    story = language_model.excerpt(smollm, 384, "course")
    gaps = [0, 2000, 8000, 12000, 16000, 32000]
    behind = [float(gap_loss(smollm, story, 256, gap)) for gap in gaps]
    alone = float(gap_loss(smollm, story[:, 256:], 0, 0))
    for gap, loss in zip(gaps, behind):
        print(f"gap {gap:6,}: loss {loss:.2f} (no prompt {alone:.2f})")
    plotting.curves({"RoPE as it is": behind}, x=gaps, threshold=round(alone, 2),
                    xlabel="gap between prompt and text (positions)",
                    ylabel="loss (nats a token)", threshold_name="no prompt:",
                    title="Beyond the trained 8,192 positions a prompt harms")
    plotting.show("Loss against the gap: rising slowly through the level without a "
                  "prompt, then from 12,000 jumping two nats above it at 16,000.")

# %% [markdown]
# Between 2,000 and 8,000, inside the declared length: up to there a far prompt slowly loses its use. Beyond 8,192 it **harms**: at 16,000 by two
# nats, where it would be far better to have none.

# %% [markdown]
# ### 3.5 Scaling considerations: which clocks to slow
#
# **What exactly has the model never seen?** Not positions; angles. A pair that turned once within the trained length has shown every angle it has.
#
# *Predict.* 32 pairs, base 100,000, 8,192 positions. How many have not come round?

# %%
smol = rope_frequencies(64, 100000.0)[0]
turned_in = 8192 * smol / (2 * np.pi)
for i in (0, 10, 19, 20, 31):
    print(f"pair {i:2d}: {turned_in[i]:8.2f} turns in 8,192, "
          f"{4 * turned_in[i]:8.2f} in 32,768")
print(f"less than one turn: {int((turned_in < 1).sum())} of 32 pairs")

# %% [markdown]
# Twelve. Beyond 8,192 they show new angles. All remedies turn them more slowly; they differ in which others they slow, too.
#
# To read $s$ times as far:
#
# |method|new frequency of pair $i$|idea|
# |---|---|---|
# |**position interpolation**, PI|$\theta_i/s$|all clocks slower: position $s\,p$ gets the angles of $p$|
# |**NTK-aware**|$\theta_i\,/\,s^{\,i/(n-1)}$ of $n$ pairs|the fastest as it was, the slowest $s$ times slower|
# |**YaRN**, by parts|$\gamma_i\theta_i+(1-\gamma_i)\,\theta_i/s$|keep ($\gamma=1$) those that made many turns, slow those that made few|
#
# PI also blurs neighbours: one token is now $1/s$ of a radian in pair 0, and the model has learned 1. (NTK is usually written as another base, $b\,s^{d/(d-2)}$: the same numbers.) YaRN's $\gamma$ is a ramp in the number of turns:
#
# $$r_i=\frac{L\,\theta_i}{2\pi}\qquad\gamma(r)=\min\Big(1,\max\Big(0,\frac{r-\alpha}{\beta-\alpha}\Big)\Big)$$
#
# with $\alpha=1$, $\beta=32$ for LLaMA (Peng et al. 2023, arXiv 2309.00071, § 3.2). Llama 3.1 uses the same ramp with 1 and 4 (rope_type `llama3`).
#
# #### Exercise 3F: keep by turns  (difficulty 2 of 5, useful, 10 minutes)
#
# |argument|shape|meaning|
# |---|---|---|
# |`frequencies`|`(n_pairs,)`|radians a token|
# |`length`|int|the trained length $L$|
# |`slow`, `fast`|float, slow < fast|$\alpha$ and $\beta$, in turns|
#
# Returns $\gamma$, the share of its own frequency that each pair keeps, `(n_pairs,)`, from 0 to 1.
#
# <details><summary>Hint</summary>
#
# How many radians are a turn? Which function of NumPy cuts a line off at both ends?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def keep_by_turns(frequencies, length, slow, fast):
    """How much of its own frequency each pair keeps, by its turns within `length`.

    0 for at most `slow` turns, 1 for at least `fast`, a straight line between.
    ValueError unless slow < fast. Source: Peng et al. 2023 (arXiv 2309.00071), § 3.2.
    """
    if not slow < fast:
        raise ValueError(f"slow must be less than fast, got {slow} and {fast}")
    frequencies = np.asarray(frequencies)
    ### BEGIN SOLUTION
    turns = length * frequencies / (2 * np.pi)
    return np.clip((turns - slow) / (fast - slow), 0, 1)
    ### END SOLUTION

# %%
keep_by_turns = check("3F", keep_by_turns)

# %% tags=["slide"]
from attention.rotary import ntk_frequencies

kept = keep_by_turns(smol, 8192, 1, 32)
slowed = {"PI, factor 4": smol / 4, "NTK, factor 4": ntk_frequencies(smol, 4),
          "YaRN, factor 4": kept * smol + (1 - kept) * smol / 4}
plotting.curves({name: smol / new for name, new in slowed.items()}, x=np.arange(32),
                xlabel="pair, from the fastest to the slowest",
                ylabel="how many times slower",
                title="PI slows every pair, NTK more and more, YaRN only the slow ones")
plotting.show("How much slower each of 32 pairs turns: PI a level line at 4, NTK "
              "rising smoothly from 1 to 4, YaRN at 1, then a steep rise to 4.")

# %% [markdown]
# *Predict.* The same gaps, the same weights, no training. Which of the three costs most at gap 0? Which is best at 32,000?

# %% tags=["language-model", "slide"]
if smollm:
    slower = {name: smollm.replace(rotate=partial(apply_rope_torch, frequencies=new))
              for name, new in slowed.items()}
    some = [0, 16000, 32000]
    losses = {"RoPE as it is": [behind[gaps.index(gap)] for gap in some]}
    for name, model in slower.items():
        losses[name] = [float(gap_loss(model, story, 256, gap)) for gap in some]
    for name, row in losses.items():
        print(f"{name:15s}", *(f"gap {gap:6,}: {at_gap:.2f} "
                               for gap, at_gap in zip(some, row)))
    plotting.curves(losses, x=some, xlabel="gap between prompt and text (positions)",
                    ylabel="loss (nats a token)", threshold=round(alone, 2),
                    threshold_name="no prompt:",
                    title="Without training YaRN mends both gaps, NTK one and most of "
                    "the other; PI costs a nat everywhere")
    plotting.show("Loss at three gaps: RoPE as it is low, then high; PI level and a "
                  "nat above no prompt; NTK low, rising at 32,000; YaRN low.")

# %% [markdown]
# PI costs more than a nat, even without a gap; YaRN is best. "Mended" means: the harm is gone, the loss is back at the level without a prompt. That this model *reads* prose 16,000 positions
# back is not shown; lecture 04 asks for a fact that stands there.
#
# YaRN has a second part, a **temperature**: cosine and sine times $0.1\ln s+1$, so scores get its square. *Predict.* Does it help here?

# %% tags=["language-model"]
if smollm:
    hot = 0.1 * np.log(4) + 1
    with_heat = partial(apply_rope_torch, frequencies=slowed["YaRN, factor 4"],
                        attention_scale=hot)
    warmer = float(gap_loss(smollm.replace(rotate=with_heat), story, 256, 16000))
    print(f"gap 16,000: YaRN {losses['YaRN, factor 4'][1]:.2f}, "
          f"with cosine and sine times {hot:.3f}: {warmer:.2f}")

# %% [markdown]
# Not here. **Trap.** *"NTK and YaRN extend a context instead of training."* NTK can be used untuned. YaRN's main results are with a short fine-tuning (its abstract: ten times fewer tokens than earlier methods, not none).
#
# **What happens when one does tune?** Back to the readers of 3.4: three back, trained on 32. First untuned, by a factor of 4.
#
# *Predict.* PI makes each clock four times slower. Which letter does the reader name, if not the third?

# %% tags=["approx", "slide"] approx={"numbers": 0.3, "picture": 0.1}
from attention.experiments.rotary import with_rotary

four = {"factor": 4.0, "original_max_position_embeddings": 32}
ramps = {"PI": {"rope_type": "linear", "factor": 4.0},
         "YaRN (1/2, 2)": {"rope_type": "yarn", "beta_slow": 0.5, "beta_fast": 2.0,
                           **four},
         "over turns (1, 32)": {"rope_type": "llama3", "low_freq_factor": 1.0,
                                "high_freq_factor": 32.0, **four}}
stretched = {"RoPE as it is": right["RoPE"]}
for name, scaling in ramps.items():
    others = [with_rotary(reader, scaling=scaling) for reader in readers["RoPE"]]
    stretched[name] = np.array([read_accuracy(other) for other in others])
    twelve = np.mean([read_accuracy(other, back=12)[1] for other in others])
    print(f"{name:18s} 16-32: {stretched[name][:, 1].mean():.1f}, "
          f"64-128: {stretched[name][:, 3].mean():.1f}; "
          f"twelve back, 16-32: {twelve:.1f}")
ax = plotting.curves(stretched, x=READ_AT,
                     xlabel="place in the stream (trained up to 32)",
                     ylabel="accuracy, three back",
                     title="Slowing the fast pairs ruins the reader at once; YaRN with "
                           "its own constants reaches further than RoPE")
ax.set_xscale("log", base=2)
ax.xaxis.set_major_formatter("{x:.0f}")
plotting.show("Accuracy against place: RoPE as it is and YaRN start at 1 and fall, "
              "YaRN later; PI and the ramp over turns with 1 and 32 lie near chance.")

# %% [markdown]
# The **twelfth**: at a quarter of the speed, twelve back has the angle that three back had. So PI needs training. And YaRN's constants belong to a trained length of thousands: in 32 tokens the fastest pair makes 5 turns, so with $\beta=32$ no
# pair keeps its speed. (The YaRN here ramps over the *number* of the pair, as the published code does.)
#
# Now 40 steps of training on streams of 128. With its **control**: plain RoPE, with the same 40 steps.

# %% tags=["approx"] approx={"numbers": 0.3}
from attention.experiments.rotary import streams, read_back_loss

for name, scaling in (("RoPE", None), ("PI", ramps["PI"])):
    tuned = [with_rotary(reader, scaling=scaling) for reader in readers["RoPE"]]
    for seed, reader in enumerate(tuned):
        training.fit(reader, streams(4, 128, 100 + seed), read_back_loss, 40, lr=3e-3)
    after = np.mean([read_accuracy(reader) for reader in tuned], axis=0)
    print(f"{name}, 40 steps: places 16-32 {after[1]:.1f}, 64-128 {after[3]:.1f} "
          f"(chance {1 / 16:.1f})")

# %% [markdown]
# Here the control wins by everything. Lecture 04 finds the opposite: there, after 40 steps, interpolation is ahead. Both are right. *Here* the answer stands three back: plain
# RoPE has only to learn to leave far keys alone, and PI has to learn its neighbours anew. *There* the answer stands far away, where plain RoPE has never read. **Which method is better depends on where the answers are**, so a
# claim about stretching needs a task, and a control with the same training.

# %% [markdown]
# ## Part 5 · CUDA
#
# ### 3.6 A kernel that only moves bytes
#
# **How fast can a rotation be?** Each number of $x$ is read once and written once: with $n$ rows of $d$ floats that is a **floor** of $2\cdot4\,nd$ bytes. A pair
# costs 6 operations for its 16 bytes.
#
# *Predict.* An H100 computes 67 TFLOP/s in single precision and moves 3.35 TB/s (data sheet, SXM). How much of its arithmetic can a rotation use?

# %% tags=["slide"]
peak, bandwidth = 67e12, 3.35e12  # FLOP/s in single precision, bytes/s
print(f"operations a byte: {6 / 16:.3f}; {peak / bandwidth:.0f} would keep it busy: "
      f"{6 / 16 / (peak / bandwidth):.1%} of the arithmetic")
moved_bytes = 2 * 4 * 4096 * 32 * 128
print(f"4,096 tokens, 32 heads of 128: {moved_bytes / 1e6:.0f} MB, at least "
      f"{moved_bytes / bandwidth * 1e6:.0f} microseconds")

# %% [markdown]
# Under two percent: a good RoPE kernel is a copy that rotates on the way. First one thread for each *number*: find your partner, find your angle, compute yourself. (`turn` forms the angle in double precision; 3.14 says why.)

# %%
ROPE_NAIVE = r"""
__global__ void rope_naive(const float* x, const long long* positions,
                           const double* frequencies, float* y, int n_rows, int seq, int d) {
  size_t e = (size_t)blockIdx.x * blockDim.x + threadIdx.x;         // this thread's element
  int c = e % d;
  int half = d / 2;
  if (e >= (size_t)n_rows * d) return;
  float2 t = turn(positions[e / d % seq], frequencies[c % half]);   // (cosine, sine)
  if (c < half) y[e] = x[e] * t.x - x[e + half] * t.y;
  else          y[e] = x[e - half] * t.y + x[e] * t.x;
}
"""

# %% [markdown]
# $x$ is read twice, and each angle is computed twice, once by each partner. A thread that owns the **pair** has neither problem, and can work in place.
#
# #### Exercise 3G: one thread, one pair  (difficulty 3 of 5, useful, 20 minutes)
#
# Rotate $x$ in place, half-split. The kernel is launched with blocks of 256 threads, enough for one thread for each pair; the last block has threads to
# spare. Number the pairs row after row.
#
# |argument|shape|meaning|
# |---|---|---|
# |`x`|`(n_rows, d)`, `n_rows` = heads · `seq`|overwritten; row $r$ is token $r \bmod$ `seq` of some head|
# |`positions`|`(seq,)`|of the tokens; they need not begin at 0|
# |`frequencies`|`(d / 2,)`|radians a position|
#
# `turn(position, frequency)` gives a `float2 t`: two floats that travel together, `t.x` the cosine, `t.y` the sine. Returns nothing; each number is read once and written once.
#
# <details><summary>Hint</summary>
#
# Which number has this thread in the whole grid? Of that number, which row and which column is it, with `d / 2` pairs in a row? What has to be read before
# anything is written?
#
# </details>

# %% tags=["exercise", "export"] kind="kernel"
ROPE_PAIRS = r"""
__device__ float2 turn(long long position, double frequency);        // (cosine, sine)

__global__ void rope_pairs(float* x, const long long* positions, const double* frequencies,
                           int n_rows, int seq, int d) {
  // BEGIN SOLUTION
  size_t pair = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  int half = d / 2;
  int i = pair % half;
  size_t row = pair / half;
  if (row >= n_rows) return;
  float2 t = turn(positions[row % seq], frequencies[i]);
  float* first = x + row * d + i;
  float* second = first + half;
  float a = *first;
  float b = *second;
  *first = a * t.x - b * t.y;
  *second = a * t.y + b * t.x;
  // END SOLUTION
}
"""

# %%
ROPE_PAIRS = check("3G", ROPE_PAIRS)

# %% [markdown]
# Three rungs on eight heads of 40 tokens: one number a thread; one pair a thread; and the course's kernel, in which a thread keeps four angles in registers and walks over eight heads, four
# numbers at a time. *Predict.* Requested bytes over the floor, for each.

# %%
from attention.rotary import TURN, rope_kernel, rope_launch

heads, seq, d = 8, 40, 64
many = draw.standard_normal((heads, seq, d)).astype(np.float32)
at, omega = np.arange(1000, 1000 + seq), rope_frequencies(d)[0]
y, floor = np.zeros_like(many), 2 * many.nbytes
rungs = {}
rungs["one number a thread"] = cuda.compile(TURN + ROPE_NAIVE, name="rope_naive").check[
    -(-many.size // 256), 256](many, at, omega, y, heads * seq, seq, d)
y = many.copy()
rungs["one pair a thread"] = cuda.compile(ROPE_PAIRS + TURN, name="rope_pairs").check[
    -(-many.size // 512), 256](y, at, omega, heads * seq, seq, d)
off_by = np.abs(y - apply_rope_numpy(many, at, omega)).max()
print(f"one pair a thread: off by {off_by:.5f}")
_, grid, block, arguments, _ = rope_launch(*map(torch.from_numpy, (many, at, omega)))
rungs["four pairs, all heads"] = rope_kernel(True).check[grid, block](*arguments)
asked = {name: report.global_loaded + report.global_stored
         for name, report in rungs.items()}
for name, report in rungs.items():
    print(f"{name:22s} {asked[name] / floor:.2f} times the floor, "
          f"{sum(row.requests for row in report.rows):6,} requests")

# %%
scale = 4096 * 32 * 128 / many.size  # a layer of 4,096 tokens, 32 heads of 128
plotting.ladder({name: (count * scale, 0, 3 * 4096 * 32 * 128)
                 for name, count in asked.items()},
                bandwidth=bandwidth, turns_per_second=132 * 1.7e9, peak=peak,
                title="Every rung waits for memory; the last is almost at the floor")
plotting.show("Two bars for each of three kernels, logarithmic: bytes far longer than "
              "operations, shrinking from rung to rung.")

# %% [markdown]
# An upper bound: it charges every *requested* byte to memory, and a cache gives positions and frequencies nearly for free. The kernel itself (any size, both pairings, partial rotation) stands in Behind the scenes. Nothing here was timed.

# %% [markdown]
# ## Part 6 · In use
#
# ### 3.7 In use
#
# **What do you call on Monday?** transformers: `rope_parameters` of a configuration, with `rope_type` (`default`, `linear`, `dynamic`, `yarn`, `llama3`; `longrope` is not in ours) and `rope_theta`: the keys that our `rope_frequencies` takes (a test of the course compares the two on random configurations). Its Llama code is half-split, its GPT-J's interleaved. flash-attn: `apply_rotary_emb(..., interleaved=False)`. vLLM:
# `is_neox_style=True` means half-split. Pitfalls: positions or angles cast to bfloat16 with the model (3.14), a dynamic scaling with a cache of turned keys (3.13), and a configuration that promises a length nobody trained.
#
# You meet it whenever a chat grows too long. *Context shift* drops the oldest tokens and moves the rest forward; the cached keys are already turned. Two rotations in a row are one rotation: turn them back.

# %%
from attention.rotary import shift_keys

cached = apply_rope_numpy(k, positions + 50, frequencies)
moved = shift_keys(cached, -50, frequencies)
print(f"man · dog with keys moved from 50: {q_turned[4] @ moved[1] / np.sqrt(8):6.3f}")

# %% [markdown]
# The number of 3.2 again.
#
# ## What you can do now
#
# You can say why a score under RoPE knows only the distance, write the rotation and the layer around its cache, and find a wrong pairing. You can measure what a model does at distances it never saw, and say which clocks to slow, and what a claim about that needs as a control.

# %%
plotting.curves({name: new * 32768 / (2 * np.pi) for name, new in
                 ({"RoPE as it is": smol} | slowed).items()},
                x=np.arange(32), log_y=True, xlabel="pair",
                ylabel="turns in 32,768 positions", threshold=1,
                threshold_name="turns:",
                title="YaRN keeps the fast pairs, NTK nearly; PI slows all")
plotting.show("Turns of each pair in 32,768 positions, logarithmic: four falling "
              "lines; YaRN with RoPE on the fast pairs and with PI on the slow ones.")

# %% [markdown]
# ## Exercises left
#
# 1. Train a reader of 3.4 with `Rotary(16, base=100.0)`. Which pairs have come round in 32 tokens, and what happens beyond?
# 2. Use `gap_loss` as a training loss with random gaps, on streams of 32. Does the reader then hold at 128? (Zhu et al. 2023, arXiv 2309.10400, train long contexts with short texts in this way.)
# 3. How far does YaRN with factor 8 carry SmolLM2, and what does it cost at gap 0?
# 4. Ask the readers of 3.4 for the letter twelve back. Which schemes still learn it?

# %% [markdown]
# ## Quiz

# %% [markdown] tags=["quiz"]
# **1.** $q=k=(1,0)$, one pair, $\theta=60°$. The query stands at 1,003 and the key at 1,000. What is their product?
#
# - a) 1
# - b) 0.5
# - c) -1
# - d) 0

# %% tags=["quiz"]
from utils import quiz

third = np.array([np.radians(60)])
far_apart = apply_rope_numpy(np.array([[1.0, 0.0], [1.0, 0.0]]),
                             np.array([1003, 1000]), third)
quiz.answer({"a": 1, "b": 0.5, "c": -1, "d": 0}, far_apart[0] @ far_apart[1],
            "Only the distance counts: three times 60 degrees is half a turn.")

# %% [markdown] tags=["quiz"]
# **2.** Somebody turns the values too. The same text begins at position 0, then at 100. Which part of attention changes?
#
# - a) nothing, because all positions move together
# - b) the output, and the weights stay
# - c) weights and output
# - d) only the weights

# %% tags=["quiz"]
starts = []
for start in (0, 100):
    all_three = [apply_rope_numpy(a, positions + start, frequencies) for a in (q, k, x)]
    mixed = softmax(all_three[0] @ all_three[1].T / np.sqrt(8))
    starts.append((mixed, mixed @ all_three[2]))
same = tuple(np.allclose(*pair) for pair in zip(*starts))
quiz.answer({"a": (True, True), "b": (True, False), "c": (False, False),
             "d": (False, True)}, same,
            "No second rotation meets that of a value: its absolute position stays.")

# %% [markdown] tags=["quiz"]
# **3.** Position interpolation by a factor of 4. By how many radians do two neighbours differ in pair 0?
#
# - a) 4
# - b) 1
# - c) 0.5
# - d) 0.25

# %% tags=["quiz"]
linear = rope_frequencies(64, 100000.0, {"rope_type": "linear", "factor": 4.0})[0]
quiz.answer({"a": 4, "b": 1, "c": 0.5, "d": 0.25}, linear[0],
            "All pairs are slowed, also the one that tells neighbours apart.")

# %% [markdown] tags=["quiz"]
# **4.** The positions 256, 257, 258 and 259 are cast to bfloat16 with the model. How many different ones are left?
#
# - a) 3
# - b) 4
# - c) 1
# - d) 2

# %% tags=["quiz"]
left = len(torch.arange(256, 260).bfloat16().unique())
quiz.answer({"a": 3, "b": 4, "c": 1, "d": 2}, left,
            "Eight bits of precision: from 256 on neighbours become the same number.")

# %% [markdown] tags=["quiz"]
# **5.** A layer of 4 heads reads 4 tokens. By mistake its RoPE turns the axis of heads instead of tokens. What does the program say?
#
# - a) a ValueError, because shapes differ
# - b) nothing, and the result is right
# - c) nothing, and the result is wrong
# - d) nan

# %% tags=["quiz"]
square = draw.standard_normal((1, 4, 4, 8))  # (batch, heads, seq, d_head)
try:
    by_heads = apply_rope_numpy(square.swapaxes(1, 2), np.arange(4), frequencies)
    alike = np.allclose(by_heads.swapaxes(1, 2),
                        apply_rope_numpy(square, np.arange(4), frequencies))
    said = "nothing, right" if alike else "nothing, wrong"
except ValueError:
    said = "ValueError"
quiz.answer({"a": "ValueError", "b": "nothing, right", "c": "nothing, wrong",
             "d": "nan"}, said, "Equal sizes hide a wrong axis: test with odd ones.")

# %% [markdown]
# ## Going further
#
# Short sections, each alone, in any order.

# %% [markdown]
# ### 3.8 The others, opened: sinusoids, buckets, slopes
#
# **What do sinusoids and RoPE have in common?** The same clocks. Moving a sinusoidal position by 7 is a rotation of each pair of its columns. The authors hoped that a model could use that (Vaswani et al. 2017, § 3.5);
# it is added there, and turns here.

# %%
table = sinusoidal_positions(np.arange(100), 32)
rates = rope_frequencies(32)[0]
turned_back = apply_rope_numpy(table[:-7], np.full(93, -7), rates, interleaved=True)
off_by = np.abs(turned_back - table[7:]).max()
print(f"turned by 7: off by {off_by:.6f} from position p + 7")

# %% [markdown]
# (By minus 7, because their pairs hold the sine first.) **T5** sorts distances into buckets: small ones get one each, large ones share (Raffel et al. 2019, arXiv 1910.10683, § 2.1). *Predict.* 32 buckets up to 128 tokens: in which is 64?

# %%
from attention.rotary import t5_buckets

for back in (1, 15, 16, 32, 64, 5000):
    bucket = t5_buckets(-back, bidirectional=False)
    print(f"{back:5,} tokens back: bucket {bucket}")

# %% [markdown]
# In 26. **ALiBi** (attention with linear biases, Press et al. 2021) trains nothing: each head has a slope. The paper gives those for 8 heads, $2^{-1},2^{-2},\dots,2^{-8}$, a
# geometric sequence that starts at its own ratio $2^{-8/n}$.
#
# #### Exercise 3H: the slopes of ALiBi  (difficulty 2 of 5, extra, 10 minutes)
#
# Models do not always have a power of two heads. For $n$ heads take the slopes of the largest power of two $p\le n$; the
# $n-p$ that are missing are the first, third, fifth ... slope of $2p$ heads.
#
# |argument|type|meaning|
# |---|---|---|
# |`n_heads`|int, at least 1|number of heads|
#
# Returns the slopes, a float64 array `(n_heads,)`, in the order just given.
#
# <details><summary>Hint</summary>
#
# What is the exponent of slope i of p heads, counted from 1? Which slopes of 2p heads are not among those of p?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def alibi_slopes(n_heads):
    """How much each head of ALiBi dislikes distance: (n_heads,) float64.

    n a power of two: 2^(-8/n), 2^(-16/n), ..., 2^-8. Otherwise the slopes of the next
    smaller power of two, then every second slope of the power of two above it.
    ValueError for fewer than one head. Source: Press et al. 2021 (arXiv 2108.12409),
    section 3, and the authors' code for other numbers of heads.
    """
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, got {n_heads}")
    ### BEGIN SOLUTION
    power = 2 ** int(math.log2(n_heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([slopes, between[:n_heads - power]])
    ### END SOLUTION

# %%
alibi_slopes = check("3H", alibi_slopes)

# %%
from attention.fundamentals import causal_mask

biased = softmax(np.where(causal_mask(24, 24), ALiBi(8).bias(24, 24).numpy(), -np.inf))
plotting.heads(biased[[0, 2, 5, 7]],
               names=["slope 1/2", "slope 1/8", "slope 1/64", "slope 1/256"],
               title="Equal words: steep heads of ALiBi see neighbours, flat ones all")
plotting.show("Four maps of causal weights: a narrow diagonal for slope 1/2, a wide "
              "one for 1/8, and nearly even rows for 1/64 and 1/256.")

# %% [markdown]
# ### 3.9 NoPE: does a causal mask tell the order?
#
# **The last token stays, the nine before it are shuffled. Does the prediction after it change?** No positions; one layer, then two.

# %%
asked_ids = torch.from_numpy(np.random.default_rng(0).integers(20, size=(1, 10)))
shuffled_ids = asked_ids[:, [4, 2, 7, 0, 8, 1, 6, 3, 5, 9]]
for n_layers in (1, 2):
    sizes = TransformerConfig(20, d_model=32, n_heads=4, n_layers=n_layers, d_ff=64)
    nope = training.initialise(TransformerLM(sizes).double(), 0)
    with torch.no_grad():
        before, after_it = (nope(each)[0, -1] for each in (asked_ids, shuffled_ids))
    moved_by = (before - after_it).abs().max().item()
    print(f"{n_layers} layer(s): logits change by {moved_by:.3f}")

# %% [markdown]
# With one layer the last token sees a bag. With two it does not: in the first layer token 3 saw three tokens and token 7 saw seven, so what they hand on depends on their place (Haviv et al.
# 2022, arXiv 2203.16634; Kazemnejad et al. 2023, arXiv 2305.19466).

# %% [markdown]
# ### 3.10 Failure: blow-up
#
# **A score is a sum of waves of the distance. Training bounds it where it was trained. What does it do outside?** Chen et al. (2023, figure 2) fit coefficients to random scores below 1 at the distances 0 to 63. So do we; the cut-off leaves out directions that 64 points hardly determine.

# %%
hands = rope_frequencies(32)[0]

def in_waves(far):
    turns_of = np.outer(far, hands)
    return np.concatenate([np.cos(turns_of), np.sin(turns_of)], axis=1)

target = np.random.default_rng(0).uniform(-1, 1, 64)
for cutoff in (1e-4, 1e-2):
    weights_of = np.linalg.lstsq(in_waves(np.arange(64)), target, rcond=cutoff)[0]
    trained, between, beyond = (np.abs(in_waves(far) @ weights_of).max() for far in
                                (np.arange(64), np.arange(253) / 4, np.arange(64, 256)))
    print(f"cut-off {cutoff:.0e}: trained {trained:.1f}, between {between:.1f}, "
          f"beyond {beyond:5.1f}; coefficients up to {np.abs(weights_of).max():.0f}")

# %% [markdown]
# Nothing holds the sum beyond the last point, if the coefficients may grow. Between two points much holds it: the argument for interpolation. With small coefficients the same fit stays small outside too. It shows what can happen, not what must.

# %% [markdown]
# ### 3.11 Failure: losing the sink
#
# **Do attention sinks distort what a model reads?** A softmax gives away exactly 1. A head that has nothing to say parks its weight on a token that does no harm, often the first. One
# built by hand: all keys score -6, except the first, whose value is zero.

# %%
sink_scores = np.array([0.0, *np.full(20, -6.0)])
sink_values = np.array([0.0, *np.random.default_rng(11).standard_normal(20) + 3.0])
evicted = [softmax(np.delete(sink_scores, j)) @ np.delete(sink_values, j)
           for j in range(21)]
print(f"weight on the sink {softmax(sink_scores)[0]:.2f}; the head says "
      f"{softmax(sink_scores) @ sink_values:.2f}")
print(f"any other key evicted: {min(evicted[1:]):.2f} to {max(evicted[1:]):.2f}; "
      f"the sink evicted: {evicted[0]:.2f}")

# %% [markdown]
# The sink does not distort; evicting it does. Xiao et al. (2023, arXiv 2309.17453) keep the first four tokens for that reason; lecture 05 does it in the real model.

# %% [markdown]
# ### 3.12 Failure: uniform attention?
#
# **Uniform attention early in training is said to destabilise gradients. How much gradient comes through?** The largest gain of the softmax's Jacobian.

# %%
torn = np.r_[np.log(63), np.zeros(63)]  # one key has half of the weight
for name, row in (("uniform", np.zeros(64)), ("one key at 1/2", torn),
                  ("collapsed", np.r_[10.0, np.zeros(63)])):
    share = softmax(row)
    gain = np.linalg.norm(np.diag(share) - np.outer(share, share), 2)
    print(f"{name:14s}: largest gain {gain:.3f}")

# %% [markdown]
# Little from a uniform softmax, as from a collapsed one. A small gradient is not an unstable one; reported instability goes with the collapse, *entropy collapse* (Zhai et al. 2023, arXiv 2303.06296).

# %% [markdown]
# ### 3.13 Dynamic frequencies and a cache
#
# **Dynamic NTK changes its frequencies as the text grows. What of keys in a cache, turned by the old ones?** One layer, 64 trained positions: at once, and one by one. (With $n$ tokens in use the published code's factor is $s\,n/L-(s-1)$, and 1 up to $L$.)

# %%
from attention.multi_head import MultiHeadAttention

dynamic = Rotary(16, scaling={"rope_type": "dynamic", "factor": 4.0,
                              "original_max_position_embeddings": 64})
of_32 = training.initialise(MultiHeadAttention(32, 2, positions=dynamic).double(), 0)
long_text = torch.from_numpy(np.random.default_rng(24).standard_normal((1, 100, 32)))
with torch.no_grad():
    for length in (64, 100):
        cache = Cache()
        for t in range(length):
            last = of_32(long_text[:, t:t + 1], causal=True, cache=cache,
                         positions=torch.tensor([t]))
        at_once = of_32(long_text[:, :length], causal=True)[:, -1]
        off = (at_once - last[:, 0]).abs().max()
        print(f"{length:3d} tokens: the last output is off by {off:.3f}")

# %% [markdown]
# Beyond the trained length the two belong to different clocks. Whoever serves dynamic NTK caches keys *before* they are turned, or turns them again.

# %% [markdown]
# ### 3.14 How precise must an angle be?
#
# **Position 100,000 at frequency 1 is 15,915 turns. Only what is left after the last full turn counts. What does an angle in single precision lose?**

# %%
of_128 = rope_frequencies(128)[0]
for position in (100, 10_000, 100_000):
    single = (np.float32(position) * of_128.astype(np.float32)).astype(np.float64)
    error = np.abs(np.cos(position * of_128) - np.cos(single)).max()
    print(f"position {position:7,}: cosine off by {error:.4f}, angle in float32")

# %% [markdown]
# Up to half a hundredth, more than a cosine that is rounded to bfloat16 (0.002). So the kernel forms the angle in double precision, takes whole turns away there, and needs a float only for what is left: `turn` in Behind the scenes.

# %% [markdown]
# ### 3.15 A slower clock from the start
#
# **What does a larger base change?** Llama 3 raised it from 10,000 to 500,000.

# %%
for base in (10_000.0, 500_000.0):
    of_base = 8192 * rope_frequencies(128, base)[0] / (2 * np.pi)
    print(f"base {base:7,.0f}: {np.sum(of_base < 1):2d} of 64 pairs turn less than "
          f"once in 8,192 tokens; the slowest needs {8192 / of_base[-1]:9,.0f}")

# %% [markdown]
# More pairs that never come round. By 3.5 this does not protect beyond the trained length; it helps a model that is then trained on long texts. And those pairs can serve as "no position at all": to look for a word wherever it is, a head asks where nothing turns.

# %% [markdown]
# ### 3.16 What the rotation does to the cache
#
# **Could the cache store fewer numbers?** The keys of a layer of SmolLM2 have 192 columns (three heads). How many directions hold 90 % of their energy, before and after the rotation?

# %% tags=["language-model"]
if smollm:
    held = {"keys before rotation": [], "keys after rotation": []}
    own_rotate = smollm.parts.rotate

    def watch(heads_in, places):
        heads_out = own_rotate(heads_in, places)
        if heads_in.shape[1] == 3:  # keys; token 0 is left out, it is unlike all others
            for name, kept_rows in zip(held, (heads_in, heads_out)):
                by_token = kept_rows[0, :, 1:].transpose(0, 1).flatten(1)
                held[name].append(by_token.double())
        return heads_out

    smollm.replace(rotate=watch).hidden(story)
    spectra = {name: torch.stack([torch.linalg.svdvals(rows) for rows in layers]) ** 2
               for name, layers in held.items()}
    energy = {name: s.cumsum(1) / s.sum(1, keepdim=True)
              for name, s in spectra.items()}
    for name, shares in energy.items():
        needed = (shares < 0.9).sum(1).double().mean() + 1
        print(f"{name}: {needed:.0f} of 192 directions")
    plotting.curves({name: shares.mean(0)[:64] for name, shares in energy.items()},
                    x=np.arange(1, 65), xlabel="directions kept",
                    ylabel="share of energy", threshold=0.9,
                    title="The rotation triples the rank of the keys")
    plotting.show("Two rising curves of energy against directions, means of 30 layers: "
                  "unrotated keys pass 0.9 at about 9, rotated ones at about 27.")

# %% [markdown]
# Three times as many. That is why latent attention (lecture 09) compresses keys *before* the rotation, and gives RoPE a few columns of its own.

# %% [markdown]
# ## Behind the scenes
#
# **Shapes and pairs**, for arrays and tensors.

# %%
import functools

# %% tags=["export", "plumbing"]
def check_rope(x, positions, frequencies):
    """Raise ValueError, in one sentence, unless the shapes fit. For arrays and tensors."""
    cuda.check_numbers(x=x, positions=positions, frequencies=frequencies)
    shape, where, pairs = (tuple(a.shape) for a in (x, positions, frequencies))
    if len(shape) < 2:
        raise ValueError(f"x must have at least two axes (seq, d), got shape {shape}")
    if where != shape[-2:-1] and not (len(shape) > 2 and where == (shape[0], shape[-2])):
        raise ValueError(f"positions must have shape (seq,) or (batch, seq) of x {shape}, got {where}")
    if len(pairs) != 1 or 2 * pairs[0] > shape[-1]:
        raise ValueError(f"frequencies must be one for each pair of the {shape[-1]} columns of x at most, got {pairs}")

def pair_slices(n_pairs, interleaved):
    """Where the first and the second members of all pairs stand in the last axis, as two slices."""
    if interleaved:
        return slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2)
    return slice(0, n_pairs), slice(n_pairs, 2 * n_pairs)

def rope_angles(x, positions, frequencies):
    """Angles for arrays x (..., seq, d), in a shape that broadcasts with (..., seq, n_pairs): float64.

    positions (seq,), or (batch, seq) where batch is the first axis of x. ValueError where shapes do not fit, TypeError
    for anything but an array x.
    """
    positions, frequencies = np.asarray(positions), np.asarray(frequencies, np.float64)
    check_rope(x, positions, frequencies)
    cuda.check_kind(np.ndarray, x=x)
    angles = positions[..., None].astype(np.float64) * frequencies
    if positions.ndim == 2:                                          # (batch, 1, ..., seq, n_pairs)
        angles = angles.reshape(len(x), *[1] * (x.ndim - 3), *angles.shape[1:])
    return angles

def apply_rope_torch(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    """Rotary embedding in PyTorch; arguments, shapes and errors as apply_rope_numpy, differentiable in x.

    positions and frequencies may be tensors or arrays; angles are computed in float64.
    """
    cuda.check_kind(torch.Tensor, x=x)
    positions = torch.as_tensor(positions, device=x.device)
    frequencies = torch.as_tensor(frequencies, device=x.device)
    check_rope(x, positions, frequencies)
    angles = positions[..., None].double() * frequencies.double()
    if positions.dim() == 2:                                         # (batch, 1, ..., seq, n_pairs)
        angles = angles.reshape(len(x), *[1] * (x.dim() - 3), *angles.shape[1:])
    work = cuda.work_type(x)
    cos, sin = (attention_scale * angles.cos()).to(work), (attention_scale * angles.sin()).to(work)
    n_pairs = len(frequencies)
    first, second = pair_slices(n_pairs, interleaved)
    a, b = x[..., first].to(work), x[..., second].to(work)
    a, b = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack([a, b], dim=-1).flatten(-2) if interleaved else torch.cat([a, b], dim=-1)
    out = torch.cat([turned, x[..., 2 * n_pairs:].to(work)], dim=-1)
    return cuda.like(out, x)

def shift_keys(k, shift, frequencies, interleaved=False):
    """Move cached keys by `shift` positions: RoPE at p, then shift_keys, is RoPE at p + shift.

    k (..., seq, d), already rotated; frequencies and interleaved as in apply_rope_numpy. Returns the shape of k.
    """
    return apply_rope_numpy(k, np.full(k.shape[-2], shift), frequencies, interleaved=interleaved)

# %% [markdown]
# **The other schemes**: learned and sinusoidal positions, T5's buckets, ALiBi.

# %% tags=["export", "plumbing"]
class Learned(Positions):
    """One trained vector for each position, added to the embeddings; max_length positions, and no more."""

    def __init__(self, max_length, d_model):
        super().__init__()
        self.table = nn.Embedding(max_length, d_model)

    def embed(self, x, positions):
        lowest, highest = (int(end) for end in positions.aminmax()) if positions.numel() else (0, 0)
        if lowest < 0 or highest >= self.table.num_embeddings:
            raise ValueError(f"positions must be from 0 to max_length - 1 = {self.table.num_embeddings - 1}, "
                             f"got {lowest} to {highest}")
        return x + self.table(positions)

def sinusoidal_positions(positions, d_model, base=10000.0):
    """Sinusoids of falling frequency: sine in the even columns, cosine in the odd ones.

    positions of any shape (...), d_model even. Returns (..., d_model) float64: [..., 2i] = sin(p / base^(2i/d_model)),
    [..., 2i+1] its cosine. Raises ValueError for an odd d_model. Source: Vaswani et al. 2017 (1706.03762), section 3.5.
    """
    if d_model < 2 or d_model % 2:
        raise ValueError(f"d_model must be even and positive, got {d_model}")
    angles = np.asarray(positions, float)[..., None] * base ** (-np.arange(0, d_model, 2) / d_model)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(*angles.shape[:-1], d_model)

class Sinusoidal(Positions):
    """Fixed sinusoids, added to the embeddings."""

    def embed(self, x, positions):
        table = sinusoidal_positions(positions.cpu().numpy(), x.shape[-1])
        return x + torch.from_numpy(table).to(x)

def relative_positions(n_queries, n_keys):
    """Key position minus query position, int64 (n_queries, n_keys), aligned at the bottom right."""
    return np.arange(n_keys) - (np.arange(n_queries) + n_keys - n_queries)[:, None]

def t5_buckets(relative, n_buckets=32, max_distance=128, bidirectional=True):
    """Sort key position minus query position into buckets: small distances get one each, large ones share.

    relative: integers of any shape. Half of the buckets of a side are exact, half logarithmic up to max_distance;
    with bidirectional half of all are for keys behind the query, otherwise those all count as distance 0.
    Returns int64 in [0, n_buckets). Raises ValueError unless max_distance is above the exact distances, at least one.
    Source: Raffel et al. 2019 (arXiv 1910.10683), section 2.1, and its code.
    """
    relative = np.asarray(relative, np.int64)               # minus the lowest 8-bit number is no 8-bit number
    offset, distance = 0, np.maximum(-relative, 0)
    if bidirectional:
        n_buckets //= 2
        offset, distance = np.where(relative > 0, n_buckets, 0), np.abs(relative)
    exact = n_buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(f"max_distance must be above the number of exact distances, at least 1, "
                         f"got {max_distance} and {exact}")
    growth = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    shared = exact + (growth * (n_buckets - exact) + 1e-6).astype(np.int64)    # a power of two starts its own bucket
    return offset + np.where(distance < exact, distance, np.minimum(shared, n_buckets - 1))

class T5Bias(Positions):
    """One trained number for each head and bucket of distances, added to the scores.

    Distances are counted in tokens; positions are not read.
    """

    def __init__(self, n_heads, n_buckets=32, max_distance=128, bidirectional=False):
        super().__init__()
        self.table = nn.Embedding(n_buckets, n_heads)
        self.max_distance, self.bidirectional = max_distance, bidirectional

    def bias(self, n_queries, n_keys):
        buckets = t5_buckets(relative_positions(n_queries, n_keys), self.table.num_embeddings, self.max_distance,
                             self.bidirectional)
        return self.table(torch.from_numpy(buckets).to(self.table.weight.device)).permute(2, 0, 1)

class ALiBi(Positions):
    """A penalty on the scores that grows with the distance, at another slope in each head. Nothing is trained.

    Distances are counted in tokens; positions are not read.
    """

    def __init__(self, n_heads):
        super().__init__()
        self.exact = alibi_slopes(n_heads)                                # float64, whatever the model is cast to
        self.register_buffer("slopes", torch.from_numpy(self.exact).to(torch.get_default_dtype()), False)

    def bias(self, n_queries, n_keys):
        bias = -self.exact[:, None, None] * np.abs(relative_positions(n_queries, n_keys))
        return torch.from_numpy(bias).to(self.slopes)                     # rounded once, after the product

# %% [markdown]
# **Frequencies of published models**, and RoPE as a scheme of `Positions`.

# %% tags=["export", "plumbing"]
def ntk_frequencies(frequencies, factor):
    """NTK-aware scaling: the fastest pair as it was, the slowest `factor` times slower.

    From pair to pair the slowing is a geometric sequence.
    frequencies (n_pairs,), fastest first. Returns (n_pairs,). Raises ValueError for fewer than two pairs, or a
    factor that is not positive.
    Source: section 3.1 of Peng et al. 2023 (arXiv 2309.00071), there as a change of the base.
    """
    if len(frequencies) < 2:
        raise ValueError(f"frequencies must be of at least two pairs, got {len(frequencies)}")
    if not factor > 0:
        raise ValueError(f"factor must be positive, got {factor}")
    frequencies = np.asarray(frequencies)
    passed = np.arange(len(frequencies)) / (len(frequencies) - 1)
    return frequencies / factor**passed

def yarn_keep(d_rot, base, length, beta_slow=1.0, beta_fast=32.0, truncate=True):
    """How much of its own frequency each pair keeps in published YaRN models: (d_rot / 2,) float64.

    As keep_by_turns, but linear in the number of the pair, between the pairs that make beta_fast and beta_slow turns,
    with truncate rounded outwards to whole pairs. Raises ValueError unless beta_slow < beta_fast.
    Source: the code of Peng et al. 2023 (arXiv 2309.00071).
    """
    if not beta_slow < beta_fast:
        raise ValueError(f"beta_slow must be less than beta_fast, got {beta_slow} and {beta_fast}")

    def pair_with(turns):
        return d_rot * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d_rot - 1)
    return 1 - np.clip((np.arange(d_rot // 2) - low) / max(high - low, 1e-3), 0, 1)

def yarn_attention_factor(scaling):
    """What cosine and sine are multiplied with under YaRN: 0.1 ln(factor) + 1, unless the model says otherwise."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def grown(mscale):
        return 0.1 * mscale * math.log(max(scaling["factor"], 1.0)) + 1.0

    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(above) / grown(below) if above and below else grown(1.0)

NEEDED = {"default": [], "linear": ["factor"], "dynamic": ["factor", "original_max_position_embeddings"],
          "yarn": ["factor", "original_max_position_embeddings"],
          "llama3": ["factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"]}

def without_nulls(scaling):
    """A copy of a scaling without the keys that are None; configuration files have such keys."""
    return {key: value for key, value in (scaling or {}).items() if value is not None}

def rope_type(scaling):
    """Which scaling it is; older models have the key `type`."""
    return scaling.get("rope_type", scaling.get("type", "default"))

def check_scaling(scaling):
    """Raise ValueError, in one sentence, unless a scaling has a known rope_type and what that needs."""
    kind = rope_type(scaling)
    if kind not in NEEDED:
        raise ValueError(f"rope_type must be one of {', '.join(NEEDED)}, got {kind!r}")
    missing = [key for key in NEEDED[kind] if key not in scaling]
    if missing:
        raise ValueError(f"scaling of rope_type {kind} must have {', '.join(missing)}, got {sorted(scaling)}")
    if not scaling.get("factor", 1.0) > 0:
        raise ValueError(f"factor must be positive, got {scaling['factor']}")

def rope_frequencies(d_head, base=10000.0, scaling=None):
    """Frequencies of the pairs, in radians per position, and the factor for cosine and sine.

    scaling: None, or a dict with the keys of a published model's rope_parameters: rope_type (default, linear, dynamic,
    yarn, llama3) and what it needs; rope_theta there takes the place of base; partial_rotary_factor is the share of
    d_head that is rotated. dynamic also reads seq_len, the length in use. A key that is None counts as missing.
    Returns (frequencies (d_rot / 2,) float64, attention_scale). Raises ValueError for an odd number of columns, an
    unknown rope_type, a missing key, or a factor or base that is not positive.
    Sources: linear Chen et al. 2023 (arXiv 2306.15595); yarn Peng et al. 2023 (2309.00071); dynamic the code of
    transformers (with factor 1 it is that of Peng et al., seq_len / length); llama3 the code published with Llama 3.1.
    """
    scaling = without_nulls(scaling)
    check_scaling(scaling)
    base, d_rot = scaling.get("rope_theta", base), int(d_head * scaling.get("partial_rotary_factor", 1.0))
    if not base > 0:
        raise ValueError(f"base must be positive, got {base}")
    if not 2 <= d_rot <= d_head or d_rot % 2:
        raise ValueError(f"the rotated part of d_head must be even and from 2 to d_head, got {d_rot} of {d_head}")
    factor, length = scaling.get("factor", 1.0), scaling.get("original_max_position_embeddings")
    keep, attention_scale = 1.0, 1.0
    kind = rope_type(scaling)
    frequencies = base ** (-np.arange(0, d_rot, 2) / d_rot)
    match kind:
        case "dynamic":
            longer = max(scaling.get("seq_len", length), length) / length
            frequencies = ntk_frequencies(frequencies, factor * longer - (factor - 1))
        case "linear":
            keep = 0.0
        case "llama3":
            keep = keep_by_turns(frequencies, length, scaling["low_freq_factor"], scaling["high_freq_factor"])
        case "yarn":
            keep = yarn_keep(d_rot, base, length, scaling.get("beta_slow") or 1, scaling.get("beta_fast") or 32,
                             scaling.get("truncate", True))
            attention_scale = yarn_attention_factor(scaling)
    return frequencies * (keep + (1 - keep) / factor), attention_scale

class Rotary(Positions):
    """RoPE: queries and keys are turned by their positions. Nothing is trained.

    d_head, base, scaling as in rope_frequencies; interleaved as in apply_rope_numpy; partial: the share of d_head that
    is rotated, unless scaling has a partial_rotary_factor. With rope_type dynamic the frequencies follow the largest
    position that is asked for.
    """

    def __init__(self, d_head, base=10000.0, scaling=None, interleaved=False, partial=1.0):
        super().__init__()
        self.d_head, self.base, self.interleaved = d_head, base, interleaved
        self.scaling = {"partial_rotary_factor": partial} | without_nulls(scaling)
        self.frequencies, self.attention_scale = rope_frequencies(d_head, base, self.scaling)

    def rotate(self, x, positions):
        frequencies = self.frequencies
        if rope_type(self.scaling) == "dynamic" and positions.numel():
            longest = self.scaling | {"seq_len": int(positions.max()) + 1}
            frequencies, _ = rope_frequencies(self.d_head, self.base, longest)
        return apply_rope_torch(x, positions, frequencies, self.attention_scale, self.interleaved)

# %% [markdown]
# **Readers** of 3.4 and 3.5: what stood three places back?

# %% tags=["export", "plumbing"]
LETTERS, BACK = 16, 3
BINS = (3, 16, 32, 64, 128, 256)                              # accuracy is counted between these places
READ_AT = np.sqrt(np.multiply(BINS[:-1], BINS[1:]))           # and drawn in their middle, on a logarithmic axis

def streams(batch, n, seed):
    """Endless streams of random letters, int64 (batch, n)."""
    rng = np.random.default_rng(seed)
    while True:
        yield torch.from_numpy(rng.integers(LETTERS, size=(batch, n)))

def read_back_loss(model, ids):
    """Each token but the first BACK says which letter stood BACK places before it."""
    return nn.functional.cross_entropy(model(ids)[:, BACK:].mT, ids[:, :-BACK])

def reader(positions):
    """An untrained reader: one layer of width 32, two heads of 16, double precision."""
    return TransformerLM(TransformerConfig(LETTERS, 32, 2, 1, 64), positions=positions).double()

def train_reader(positions, seed, steps=120):
    """A reader trained on streams of 32."""
    model = training.initialise(reader(positions), seed)
    training.fit(model, streams(16, 32, seed), read_back_loss, steps, lr=1e-2)
    return model

@torch.no_grad()
def read_accuracy(model, mask=None, back=BACK):
    """How often the letter `back` places before is named, between the places of BINS: (5,)."""
    ids = next(streams(40, BINS[-1], 99))
    right = (model(ids, mask=mask)[:, back:].argmax(-1) == ids[:, :-back]).double().mean(0)
    return np.array([float(right[max(low - back, 0): high - back].mean()) for low, high in zip(BINS[:-1], BINS[1:])])

def with_rotary(model, **rotary):
    """A reader with RoPE, and the same weights with another Rotary."""
    other = reader(Rotary(16, **rotary))
    other.load_state_dict(model.state_dict())
    return other

# %% [markdown]
# **The angle in a kernel**, and the course's kernel: any size, both pairings, partial rotation.

# %% tags=["export", "plumbing"]
TURN = r"""
// cosine and sine of position * frequency
__device__ float2 turn(long long position, double frequency) {
  double angle = position * frequency;
  angle -= 6.283185307179586 * rint(angle * 0.15915494309189535);       // whole turns
  float small = (float)angle;
  return make_float2(cosf(small), sinf(small));
}
// the pair (a, b) turned, where it stands; t is (cosine, sine)
__device__ void rotate(float& a, float& b, float2 t) {
  float turned = a * t.x - b * t.y;
  b = a * t.y + b * t.x;
  a = turned;
}
"""

ROPE = r"""
__device__ void meet(float& a, float& b, const float2* t, int) { rotate(a, b, t[0]); }
__device__ void meet(float4& a, float4& b, const float2* t, int interleaved) {
  if (interleaved) {
    rotate(a.x, a.y, t[0]), rotate(a.z, a.w, t[1]), rotate(b.x, b.y, t[2]), rotate(b.z, b.w, t[3]);
  } else {
    rotate(a.x, b.x, t[0]), rotate(a.y, b.y, t[1]), rotate(a.z, b.z, t[2]), rotate(a.w, b.w, t[3]);
  }
}
template <typename V>                                   // V is float or float4
__global__ void rope(const float* x, const long long* positions, const double* frequencies, float* y, int n_tokens,
                     int seq, int n_heads, int d, int n_pairs, int interleaved, float attention_scale) {
  const int width = sizeof(V) / sizeof(float);
  int half = n_pairs / width, items = d / width - half; // of a row: vectors with a partner, then those only copied
  size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, token = thread / items;
  int i = thread % items;
  if (token >= n_tokens) return;

  // angles: once for all heads of this thread
  long long position = positions[token];
  float2 t[width];
  for (int w = 0; w < width && i < half; ++w) {
    int pair = interleaved && width == 4 ? 2 * (i + w / 2 * half) + w % 2 : width * i + w;
    t[w] = turn(position, frequencies[pair]);
    t[w].x *= attention_scale, t[w].y *= attention_scale;
  }
  int first = interleaved && width == 1 ? 2 * i : i, second = interleaved && width == 1 ? first + 1 : i + half;

  for (int head = blockIdx.y; head < n_heads; head += gridDim.y) {
    size_t row = ((token / seq * n_heads + head) * seq + token % seq) * d;
    const V* from = reinterpret_cast<const V*>(x + row);
    V* to = reinterpret_cast<V*>(y + row);
    if (i < half) {                                     // load, rotate, write
      V a = from[first], b = from[second];
      meet(a, b, t, interleaved);
      to[first] = a, to[second] = b;
    } else {                                            // past the pairs: copy
      to[i + half] = from[i + half];
    }
  }
}
"""

@functools.cache
def rope_kernel(wide):
    """The kernel for float4 if wide, else for float, compiled on first use."""
    if wide:
        return cuda.compile(TURN + ROPE, name="rope", template=("float4",))
    return cuda.compile(TURN + ROPE, name="rope", template=("float",))

def rope_launch(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    """Whether float4 fits, grid, block, arguments and output of the kernel, for a tensor x (..., seq, d)."""
    x = x.detach().float().contiguous()
    seq, d, n_pairs = x.shape[-2], x.shape[-1], len(frequencies)
    n_heads = x[..., 0, 0].numel() // (len(x) if positions.ndim == 2 else 1)
    wide = n_pairs % 4 == 0 and d % 4 == 0 and x.data_ptr() % 16 == 0
    n_tokens, out = positions.numel(), torch.empty_like(x)
    threads = n_tokens * (d - n_pairs) // (4 if wide else 1)
    grid = -(-threads // 256), min(-(-n_heads // 8), 65_535)
    arguments = (x, positions.long().contiguous(), frequencies.double().contiguous(), out, n_tokens, seq, n_heads, d,
                 n_pairs, int(interleaved), float(attention_scale))
    return wide, grid, 256, arguments, out

def apply_rope_cuda(x, positions, frequencies, attention_scale=1.0, interleaved=False):
    """Rotary embedding by the CUDA kernel; arguments, shapes and errors as apply_rope_numpy, positions integers.

    NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU. Angles are computed in double precision, the
    rest in single; returned in the kind and type of x. Not differentiable.
    """
    device = x.device if isinstance(x, torch.Tensor) else "cpu"
    positions, frequencies = (torch.as_tensor(np.array(a) if isinstance(a, np.ndarray) else a, device=device)
                              for a in (positions, frequencies))
    check_rope(x, positions, frequencies)
    if positions.is_floating_point():
        raise ValueError(f"positions must be integers, got {str(positions.dtype).removeprefix('torch.')}")
    [out] = cuda.on_device(x)
    if out.numel():
        wide, grid, block, arguments, out = rope_launch(out, positions, frequencies, attention_scale, interleaved)
        rope_kernel(wide).fast[grid, block](*arguments)
    return cuda.like(out, x)

# %% [markdown]
# ## Glossary
#
# |term|what it is|
# |---|---|
# |absolute position|a token is told its place|
# |ALiBi|scores get minus a slope times the distance; nothing is trained|
# |attention sink|a key that takes the weight a head has no use for|
# |base|$b$ in $\theta_i=b^{-2i/d}$; the larger, the slower the slow pairs|
# |context shift|the oldest tokens are dropped and cached keys turned back|
# |equivariance|shuffle the input, and the output is shuffled in the same way|
# |half-split, interleaved|pairs are columns $i$ and $i+d/2$, or $2i$ and $2i+1$|
# |NoPE|no positions: order enters through the causal mask alone|
# |NTK-aware scaling|the slower a pair, the more it is slowed|
# |partial rotary|only some columns of a head turn|
# |PI, position interpolation|all pairs slowed by the same factor|
# |relative position|only the distance of two tokens counts|
# |RoPE|queries and keys are turned, pair by pair, by position times frequency|
# |T5 buckets|distances sorted into classes, each with a trained number|
# |YaRN|pairs that made many turns keep their speed, the others are slowed; and a temperature|
#
# ## Sources
#
# Gehring et al. 2017, learned positions (arXiv 1705.03122) · Vaswani et al. 2017 (arXiv 1706.03762) · Raffel et al. 2019, T5
# (arXiv 1910.10683) · Su et al. 2021, RoFormer (arXiv 2104.09864) · Press, Smith, Lewis 2021, ALiBi (arXiv 2108.12409) · Haviv et al.
# 2022 (arXiv 2203.16634) · Zhai et al. 2023 (arXiv 2303.06296) · Kazemnejad et al. 2023 (arXiv 2305.19466) · Chen et al. 2023,
# position interpolation (arXiv 2306.15595) · Peng et al. 2023, YaRN (arXiv 2309.00071) · Zhu et al. 2023, PoSE (arXiv 2309.10400) · Xiao et al. 2023 (arXiv 2309.17453) ·
# Barbero et al. 2024 (arXiv 2410.06205) · Allal et al. 2025, SmolLM2 (arXiv 2502.02737) · the code of transformers for `dynamic`, `yarn` and `llama3`.
