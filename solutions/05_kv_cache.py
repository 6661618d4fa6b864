# ---
# jupyter:
#   course:
#     experiments:
#     - copying_texts
#     - is_trigger
#     - train_copier
#     - look_at_sink
#     - Facts
#     - facts_and_questions
#     - train_clerk
#     - plant_outliers
#     module: kv_cache
#     public:
#     - decode_attention_numpy
#     - decode_attention_torch
#     - decode_attention_cuda
#     - paged_decode_attention_numpy
#     - paged_decode_attention_torch
#     - paged_decode_attention_cuda
#     - KVCache
#     - RingKVCache
#     - PagePool
#     - PagedKVCache
#     - QuantizedKVCache
#     - keep_window
#     - keep_sinks
#     - keep_random
#     - keep_heavy
#     - keep_voted
#     - evict
#     - generate
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lecture 05 · KV cache
#
# **Where we are.** You can build a language model (02), tell it where its tokens stand (03), and you know what a long
# prompt costs (04). **The question:** a model writes one token at a time, and each token reads everything before it.
# How much of that work is done twice? **What you build:** the cache that every transformer in use writes with, in
# its three forms, what can go wrong with it, what it may forget, and the kernel that reads it.
#
# | part | sections | minutes |
# |---|---|---|
# | 1 · The cache and its price | 5.1, 5.2, exercises 5.1 and 5.2 | 65 |
# | 2 · A cache at work | 5.3 to 5.6, exercises 5.3 and 5.4 | 120 |
# | 3 · What a cache may forget | sinks, eviction, exercise 5.5 | 65 |
# | 4 · Fewer bits | quantised cache, slim attention, exercise 5.6 | 45 |
# | Into a real model | cache, sinks and 2 bits in a model that writes English | 30 |
# | 5 · CUDA: one query, many keys | exercises 5.7 and 5.8 | 90 |
# | Traps | questions and answers | 20 |
# | Going further | short sections, in any order | as you like |
#
# Alone, with all exercises, that is about seven and a half hours. In class it is two hours of 50 minutes, with the exercises at
# home.
#
# **What it borrows.** From lecture 02 the model, from 03 RoPE, which is why a cached key has a position. Forward
# references: some models of section 5.2 have fewer key heads than query heads (`n_kv_heads`; why that works is lecture
# 08), one caches a latent vector in their place (lecture 09). Here both are only numbers in a formula.

# %% [markdown] tags=["teacher"]
# **For the teacher: two hours of 50 minutes.** Run everything before class; the language model of 5.1 is the slowest
# cell.
#
# - *Hour 1.* Counting the keys (5) · three tokens by hand (5) · exercise 5.1 together (12) · token-exact (5) · the
#   calculator, 20.97 GB (10) · FLOPs (5) · preallocated and ring (8).
# - *Hour 2.* Pages, copy on write, waste (12) · left padding (8) · chunks, beams, speculation (12) · the table of five
#   bugs: each group bets on one row before the cell is run (10) · 5.6 (8).
# - *At home.* 5.2 to 5.4, parts 3 to 5.
# - *Questions that come.* Why are queries not cached? Nobody asks an old query again. Could an encoder have a cache?
#   See the end of 5.1.

# %%
import os
import sys

sys.path.insert(0, "." if os.path.exists("course.py") else "..")  # the course's own modules

import json

import matplotlib.pyplot as plt
import numpy as np
import torch

from utils import data, plotting, training
from utils.check import check

torch.set_num_threads(1)                          # tiny models: one thread is fastest, and the same everywhere

# %%
import copy
import functools
import itertools
import math

import numpy as np
import torch
from torch.nn import functional as F

from attention.fundamentals import attention_numpy, softmax
from attention.multi_head import TransformerConfig, TransformerLM, record
from attention.rotary import Rotary, apply_rope_torch
from utils import cuda, training

# %% [markdown]
# ## Part 1 · The cache and its price
#
# ### The problem: the same keys, again and again
#
# **How much does a model compute twice while it writes?** We need a model that writes. This one reads single
# characters of Python's help texts, 128 at a time, with RoPE.

# %%
text = data.characters()
vocabulary, corpus, held_out = text
encode, decode = text.encode, text.decode                             # a string to ids (1, n), and back

# %%
config = TransformerConfig(vocab_size=len(vocabulary), d_model=64, n_heads=4, n_layers=2, d_ff=128)
model = training.initialise(TransformerLM(config, positions=Rotary(config.d_head)).double(), seed=0)
training.fit(model, training.windows(corpus, 128, 12, seed=0), training.next_token_loss, steps=250, lr=6e-3)

starts = torch.linspace(0, len(held_out) - 129, 40).long()
test_ids = held_out[starts[:, None] + torch.arange(129)]
with torch.no_grad():
    loss = training.next_token_loss(model, test_ids).item()
guessing = math.log(len(vocabulary))
print(f"loss on held-out text below 2 nats: {loss < 2.0}   (guessing among {len(vocabulary)}: {guessing:.2f})")

# %% [markdown]
# Writing is a loop: read all, take the likeliest next character, append it, read all again. We count for how many
# tokens the first layer makes a key (and a value).
#
# *Predict.* A prompt of 64 characters, 64 new ones. How many keys does a layer compute? How many different keys are
# there?

# %%
computed = []                                     # for each call of layer 0: how many tokens came in
hook = model.blocks[0].attention.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[1]))

prompt = held_out[None, 29000:29064]
ids = prompt
with torch.no_grad():
    for _ in range(64):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
hook.remove()
without_cache = ids

print(f"keys computed: {sum(computed):,}   tokens that were read: {ids.shape[1] - 1}")
print(f"each key was computed {sum(computed) / (ids.shape[1] - 1):.0f} times on average")
print("the prompt ends: ", repr(decode(ids[0, 44:64])))
print("and it goes on:   ", repr(decode(ids[0, 64:])))

# %% [markdown]
# $\sum_{t=64}^{127} t = 6112$ keys for 127 tokens: the work grows with the square of the length. (The last of the 128
# is written and never read. The text is what a small model writes when it always takes the likeliest: it soon goes
# round in circles.)
#
# **But are they the same keys?** `TransformerLM` hands each layer's keys and values to a cache if it is given one. This
# one only looks.

# %%
class Peek:
    """A cache that stores nothing and remembers what it was shown."""

    length = 0

    def update(self, k, v):
        self.k, self.v = k, v
        return k, v

shorter, longer = [Peek(), Peek()], [Peek(), Peek()]
with torch.no_grad():
    model(ids[:, :100], caches=shorter)
    model(ids[:, :128], caches=longer)
for layer in range(2):
    k, v = ((getattr(longer[layer], name)[:, :, :100] - getattr(shorter[layer], name)).abs().max() for name in "kv")
    print(f"layer {layer}, the first 100 tokens, read with 28 more behind them: the same to 1e-10:",
          bool(max(k, v) < 1e-10))

# %% [markdown]
# They are the same, in every layer. A causal model's token never learns what comes after it, so nothing about it ever
# changes. Keys and values can be kept. Queries need not be: an old query is never asked again.
#
# **Is that true of every attention?** An encoder looks both ways. Two of its layers, and one token more:

# %%
from attention.multi_head import MultiHeadAttention

draw = np.random.default_rng(1)
layer = training.initialise(MultiHeadAttention(16, 2).double(), seed=2)
x = torch.from_numpy(draw.standard_normal((1, 9, 16)))
with torch.no_grad():
    for causal in (True, False):
        second_input = [y + layer(y, causal=causal) for y in (x[:, :8], x)]
        moved = (second_input[0] - second_input[1][:, :8]).abs().max()
        print(f"causal {causal!s:5}: the second layer reads something else of the first 8: {bool(moved > 1e-10)}")

# %% [markdown]
# It is not. In an encoder each new token changes all the others, from the second layer on. Keys and values can be kept
# where nothing that comes later changes them: under a causal mask, and in cross-attention, whose keys come from a text
# or a sound that was read in full (Whisper keeps those of its encoder).

# %% [markdown]
# ### 5.1 The core concept of the KV cache: keep the keys and the values
#
# **What does one step look like, when everything old is kept?** By hand first. One head of size 1, every query is 1,
# the keys are $\ln 1, \ln 2, \ln 3$, so that $e^{\text{score}}$ is 1, 2, 3. The values are 6, 3, 1.
#
# $$o_1 = 6 \qquad o_2 = \frac{1 \cdot 6 + 2 \cdot 3}{1 + 2} = 4 \qquad
#   o_3 = \frac{1 \cdot 6 + 2 \cdot 3 + 3 \cdot 1}{1 + 2 + 3} = 2.5$$

# %%
keys, values = [], []                             # the cache
for k, v in zip(np.log([1.0, 2.0, 3.0]), [6.0, 3.0, 1.0]):
    keys.append(k)
    values.append(v)
    weights = np.exp(1.0 * np.array(keys))
    print(f"step {len(keys)}: {weights @ np.array(values) / weights.sum():.1f}")

# %% [markdown]
# And in one pass over all three, with the attention of lecture 01:

# %%
q, k, v = np.ones((3, 1)), np.log([[1.0], [2.0], [3.0]]), np.array([[6.0], [3.0], [1.0]])
print(attention_numpy(q, k, v, causal=True)[:, 0])
assert np.allclose(attention_numpy(q, k, v, causal=True)[:, 0], [6, 4, 2.5])

# %% [markdown]
# #### Exercise 5.1: one step with a cache  (difficulty 2 of 5, 15 minutes)
#
# One head. Some tokens are cached, some new ones arrive: one when the model writes, many when it reads a prompt.
#
# | argument | shape | meaning |
# |---|---|---|
# | `x` | `(n_new, d_model)` | the new tokens |
# | `keys` | `(n_old, d_head)` | cached keys, `n_old` may be 0 |
# | `values` | `(n_old, d_v)` | cached values |
# | `w_q`, `w_k` | `(d_model, d_head)` | projections |
# | `w_v` | `(d_model, d_v)` | projection |
#
# Returns `(out, keys, values)`: what the new tokens found, `(n_new, d_v)`, and the cache with them in it. A new token
# sees the cache, the new tokens before it, and itself. The scale is $1/\sqrt{d_\text{head}}$. `attention_numpy(q, k, v,
# causal=True)` of lecture 01 is at hand.
#
# <details><summary>Hint</summary>
#
# Three of the five lines are projections of `x`, and only of `x`. The new keys go behind the old ones *before* anybody
# looks. `causal=True` aligns at the bottom right: the last query sees all keys.
#
# </details>

# %% tags=["exercise", "export"]
def cached_step(x, keys, values, w_q, w_k, w_v):
    """New tokens x (n_new, d_model) join a cache of one head and attend to it, causally.

    keys (n_old, d_head), values (n_old, d_v), w_q and w_k (d_model, d_head), w_v (d_model, d_v).
    Returns (out (n_new, d_v), keys (n_old + n_new, d_head), values (n_old + n_new, d_v)).
    """
    ### BEGIN SOLUTION
    keys = np.concatenate([keys, x @ w_k])
    values = np.concatenate([values, x @ w_v])
    return attention_numpy(x @ w_q, keys, values, causal=True), keys, values
    ### END SOLUTION

# %%
cached_step = check("5.1", cached_step)

# %% [markdown]
# Twelve tokens at once, one by one, and as 5 + 4 + 3: is the output the same?

# %%
tokens = draw.standard_normal((12, 16))
w_q, w_k, w_v = (draw.standard_normal((16, 8)) / 4 for _ in range(3))
whole, _, _ = cached_step(tokens, np.empty((0, 8)), np.empty((0, 8)), w_q, w_k, w_v)
for sizes in ([1] * 12, [5, 4, 3]):
    keys = values = np.empty((0, 8))
    parts = []
    for chunk in np.split(tokens, np.cumsum(sizes)[:-1]):
        out, keys, values = cached_step(chunk, keys, values, w_q, w_k, w_v)
        parts.append(out)
    print(f"in {len(sizes):2d} steps: the same to 1e-10: {np.allclose(np.concatenate(parts), whole, atol=1e-10)}")

# %% [markdown]
# It is, and that is the whole idea. What is left is where to put the numbers. `np.concatenate` copies the cache at
# every step; this class takes its memory once.

# %% tags=["export"]
def whole_numbers(name, x):
    """An array or tensor of integers of any type, on any device, as NumPy array int64. ValueError for others."""
    if isinstance(x, torch.Tensor):
        x = (x.double() if x.is_floating_point() else x).detach().cpu().numpy()
    x = np.asarray(x)
    if x.size and x.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {x.dtype}")
    return x.astype(np.int64)

def check_update(k, v, shape):
    """Raise ValueError, in one sentence, unless k and v fit into a cache of shape (batch, n_heads, _, d_head)."""
    if k.shape != v.shape or k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (*shape[:2], shape[3]):
        raise ValueError(f"k and v must be ({shape[0]}, {shape[1]}, n_new, {shape[3]}) for this cache, "
                         f"got {tuple(k.shape)} and {tuple(v.shape)}")

def check_sizes(lowest=1, **sizes):
    """Raise ValueError, in one sentence, unless all sizes are whole numbers from `lowest` on."""
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or size < lowest:
            raise ValueError(f"{name} must be a whole number of at least {lowest}, got {size!r}")

# %% tags=["export"]
class KVCache:
    """Keys and values of one layer, in memory that is taken once: (batch, n_heads, capacity, d_head) each."""

    def __init__(self, batch, n_heads, capacity, d_head, dtype=torch.float64, device=None):
        check_sizes(0, batch=batch, n_heads=n_heads, capacity=capacity, d_head=d_head)
        self.k = torch.zeros(batch, n_heads, capacity, d_head, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.length = 0

    @property
    def n_bytes(self):
        """Bytes of the memory taken, used or not."""
        return self.k.nbytes + self.v.nbytes

    def update(self, k, v):
        """Store k and v (batch, n_heads, n_new, d_head); return all keys and values so far. ValueError when full."""
        check_update(k, v, self.k.shape)
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            raise ValueError(f"the cache holds {self.k.shape[2]} tokens, got {end}: make it with a larger capacity")
        self.k[:, :, self.length:end], self.v[:, :, self.length:end] = k, v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def rewind(self, length):
        """Forget everything after the first `length` tokens. ValueError when there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must lie between 0 and {self.length}, got {length}")
        self.length = length

    def reorder(self, rows):
        """Row i of the batch continues what row rows[i] was: beams change their places."""
        self.k, self.v = self.k[rows], self.v[rows]

# %% tags=["export"]
def new_caches(model, batch, capacity):
    """An empty KVCache for each layer of a model, in the float type of its weights and where they lie."""
    c, w = model.config, model.embedding.weight
    n_heads = getattr(c, "n_kv_heads", c.n_heads)                    # some models have fewer heads of keys: lecture 08
    return [KVCache(batch, n_heads, capacity, c.d_head, w.dtype, w.device) for _ in range(c.n_layers)]

def check_prompt(ids):
    """Raise ValueError, in one sentence, unless ids are (batch, n) with at least one token."""
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids must be (batch, n) with at least one token, got shape {tuple(ids.shape)}")

def check_empty(model, caches):
    """Raise ValueError, in one sentence, unless there is an empty cache for each layer of the model."""
    held = [cache.length for cache in caches]
    if held != [0] * model.config.n_layers:
        raise ValueError(f"caches must be {model.config.n_layers}, one a layer, and empty, got lengths {held}")

def sample(logits, temperature, top_k, rng):
    """Next tokens (batch,) from logits (batch, vocab_size); temperature 0 takes the largest."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double() / temperature
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.shape[-1]))
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)
    draws = torch.from_numpy(rng.random(len(logits))).to(logits.device)
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    return (cumulative < draws[:, None] * cumulative[:, -1:]).sum(-1)

# %% tags=["export"]
@torch.no_grad()
def generate(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0, on_token=None):
    """Continue each row of ids by n_new tokens. ids integers (batch, n), all of one length. Returns (batch, n + n_new).

    caches: one for each layer, empty, with length and update(k, v); without them the whole text is read again for each
    token. temperature 0 is greedy; otherwise tokens are drawn, from the top_k likeliest if given, by numpy's
    default_rng(seed). on_token: called with the tokens (batch, 1) of each step as they come. ValueError for an empty
    prompt, a negative n_new or temperature, or a top_k below 1.
    """
    check_prompt(ids)
    if n_new < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError("n_new and temperature must not be negative and top_k at least 1, "
                         f"got {n_new}, {temperature} and {top_k}")
    if caches is not None:
        check_empty(model, caches)
    rng = np.random.default_rng(seed)
    unread = ids
    for _ in range(n_new):
        logits = model(unread, caches=caches)[:, -1] if caches is not None else model(ids)[:, -1]
        unread = sample(logits, temperature, top_k, rng)[:, None]
        ids = torch.cat([ids, unread], dim=1)
        if on_token is not None:
            on_token(unread)
    return ids

# %% [markdown]
# `generate` reads the prompt once and then one token at a time. Twice the same claim: the **tokens** are the same, and
# the **logits** are, which is stricter.

# %%
with_cache = generate(model, prompt, 64, new_caches(model, batch=1, capacity=128))
print("token-exact:", torch.equal(with_cache, without_cache))

caches = new_caches(model, batch=1, capacity=128)
with torch.no_grad():
    whole = model(with_cache[:, :-1])
    steps = torch.cat([model(with_cache[:, t:t + 1], caches=caches) for t in range(127)], dim=1)
print("logits the same to 1e-10:", torch.allclose(steps, whole, atol=1e-10, rtol=0))

# %% [markdown]
# The same text for 127 keys a layer in place of 6112. Compare logits, not only tokens: greedy tokens can agree by luck
# while something is wrong (section 5.5).

# %% [markdown]
# ### 5.2 The mathematics of its memory
#
# **What does the cache cost?** It is usually introduced under the heading "memory savings". It saves no memory. It
# *spends* memory to save compute.
#
# For each token, in each layer, a key and a value for each key-value head (exercise 4.6 went further):

# %%
def cache_bytes(n_layers, n_kv_heads, d_head, n_tokens, batch=1, bytes_per_number=2):
    """Bytes of the keys and values of `batch` sequences; two bytes a number are half precision."""
    return 2 * n_layers * n_kv_heads * d_head * n_tokens * batch * bytes_per_number

# %% [markdown]
# The formula and the real thing: our caches of 128 tokens, in double precision.

# %%
held = sum(cache.n_bytes for cache in new_caches(model, batch=3, capacity=128))
print(f"held: {held:,} bytes, formula: {cache_bytes(2, 4, 16, 128, batch=3, bytes_per_number=8):,} bytes")
assert held == cache_bytes(2, 4, 16, 128, batch=3, bytes_per_number=8)

# %% [markdown]
# Now models that people use, in half precision. The last column: at how many tokens in all is the cache as large as the
# weights?

# %%
models = {                                         # layers, key-value heads, d_head, weights; published configurations
    "GPT-2": (12, 12, 64, 124_439_808),
    "Llama 2 7B": (32, 32, 128, 6_738_415_616),
    "Llama 3.1 8B": (32, 8, 128, 8_030_261_248),
    "Llama 3 70B": (80, 8, 128, 70_553_706_496),
    "Llama 3.1 405B": (126, 8, 128, 405_853_388_800),
}
print(f"{'':15s} KiB a token   GB at 8 x 1000 tokens   tokens that weigh as much as the model")
for name, (n_layers, n_kv_heads, d_head, n_weights) in models.items():
    token, batch = cache_bytes(n_layers, n_kv_heads, d_head, 1), cache_bytes(n_layers, n_kv_heads, d_head, 1000, 8)
    print(f"{name:15s} {token / 1024:11.0f} {batch / 1e9:23.2f} {2 * n_weights // token:40,}")

# %% [markdown]
# Llama 2 7B needs more for a token than Llama 3 70B, which has ten times its weights: 32 key-value heads against 8.
#
# *Predict.* A slide computes "Llama 3 70B, 64 heads, 8 sequences of 1,000 tokens: 20.97 GB". The table says 2.62. Who
# is right?

# %%
slide = cache_bytes(n_layers=80, n_kv_heads=64, d_head=128, n_tokens=1000, batch=8)
model_card = cache_bytes(n_layers=80, n_kv_heads=8, d_head=128, n_tokens=1000, batch=8)
print(f"64 key-value heads: {slide / 1e9:.2f} GB = {slide / 2**30:.2f} GiB")
print(f" 8 key-value heads:  {model_card / 1e9:.2f} GB =  {model_card / 2**30:.2f} GiB")
assert (slide, model_card) == (20_971_520_000, 2_621_440_000)

# %% [markdown]
# The slide's arithmetic is right and its model is not. Llama 3 70B has 64 *query* heads and 8 *key-value* heads. The
# factor of 8 is lecture 08.
#
# #### And what does it buy?
#
# Floating-point operations. How many does a forward pass take that reads `n_new` tokens behind a cache?
#
# #### Exercise 5.2: operations of a forward pass  (difficulty 3 of 5, 15 minutes)
#
# A product of a matrix $(a, b)$ with a matrix $(b, c)$ takes $2abc$ operations. Count those of all matrix products of
# a `TransformerLM`; norms, softmax and GELU do not count.
#
# | argument | shape | meaning |
# |---|---|---|
# | `n_new` | `(n,)` integers | tokens that are read |
# | `n_keys` | `(n,)` integers | keys when they are in the cache, they included |
# | `d_model`, `d_ff` | int | width of the model, and inside its feed-forward layers |
# | `n_layers`, `vocab_size` | int | layers, and the size of the vocabulary |
#
# Returns an integer array `(n,)`. The score matrix is computed whole, `n_new` by `n_keys`, and masked afterwards.
#
# <details><summary>Hint</summary>
#
# A layer: queries, keys, values, output; scores, weighted sum; up to `d_ff` and back. All heads together are as wide as
# `d_model`. Behind the last layer: from `d_model` to `vocab_size`, for each new token.
#
# </details>

# %% tags=["exercise", "export"]
def forward_flops(n_new, n_keys, d_model, d_ff, n_layers, vocab_size):
    """Operations of all matrix products when a TransformerLM reads n_new tokens and then has n_keys keys.

    n_new, n_keys integers (n,); the sizes as in TransformerConfig. Returns an integer array (n,).
    """
    ### BEGIN SOLUTION
    n_new, n_keys = (np.asarray(n, np.int64) for n in (n_new, n_keys))          # in 32 bits they would overflow
    projections = 2 * n_new * (4 * d_model**2 + 2 * d_model * d_ff)
    attention = 2 * n_new * n_keys * 2 * d_model                       # scores, and the weighted sum of values
    return n_layers * (projections + attention) + 2 * n_new * d_model * vocab_size
    ### END SOLUTION

# %%
forward_flops = check("5.2", forward_flops)

# %% [markdown]
# PyTorch counts, too. The prompt, one token behind it, and twenty at once:

# %%
from torch.utils.flop_counter import FlopCounterMode

sizes = dict(d_model=64, d_ff=128, n_layers=2, vocab_size=len(vocabulary))
caches = new_caches(model, 1, 128)
for begin, end in ((0, 64), (64, 65), (65, 85)):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids[:, begin:end], caches=caches)
    counted, formula = counter.get_total_flops(), forward_flops(np.array([end - begin]), np.array([end]), **sizes)[0]
    print(f"tokens {begin:2d} to {end}: counted {counted:10,}, formula {formula:10,}")
    assert counted == formula

# %% [markdown]
# The formula is exact, so we may use it where no computer would finish. A whole text, from its first token on:

# %%
lengths = 2 ** np.arange(5, 17)
t = np.arange(1, lengths[-1] + 1)                       # the length when token t is written
again = forward_flops(t, t, **sizes).cumsum()[lengths - 1]
once = forward_flops(np.ones_like(t), t, **sizes).cumsum()[lengths - 1]
held = cache_bytes(2, 4, 16, lengths, bytes_per_number=8)
figure, axes = plt.subplots(1, 2, figsize=(11, 4))
for ax, series, title in ((axes[0], {"no cache": again, "cache": once}, "FLOPs saved: one power of n ..."),
                          (axes[1], {"cache": held}, "... bought with bytes")):
    for name, y in series.items():
        ax.plot(lengths, y, {"no cache": "C0o-", "cache": "C1s--"}[name], label=name)
    ax.set(xscale="log", yscale="log", xlabel="tokens in the text", title=title)
    ax.legend()
axes[0].set_ylabel("floating-point operations, whole text")
axes[1].set_ylabel("bytes held at the end")
plotting.show("Two log-log panels against the length. Left, operations without a cache rise steeper than with one. "
              "Right, the bytes of the cache rise in proportion to the length.")

# %% [markdown]
# The left panel's title claims something. **Which powers are they?** The slope between two lengths:

# %%
def slope(y, i):
    return math.log(y[i + 1] / y[i]) / math.log(lengths[i + 1] / lengths[i])

for name, y in (("no cache", again), ("cache", once)):
    print(f"{name:9s} from 32 to 64 tokens: n^{slope(y, 0):.1f}   from 32,768 to 65,536: n^{slope(y, -2):.1f}")
print(f"operations saved at 128 tokens: a factor of {again[2] / once[2]:.0f}; at 65,536: {again[-1] / once[-1]:,.0f}")

# %% [markdown]
# Short texts: $n$ with, $n^2$ without, since a token's projections cost more than its attention. Long texts: attention
# wins, and it is $n^2$ with and $n^3$ without. In words: without a cache a text costs one power of $n$ more. The
# common "$O(n)$ against $O(n^2)$" is the left end of these curves.

# %% [markdown]
# ## Part 2 · A cache at work
#
# ### 5.3 Implementation: preallocated, ring, pages, ragged batches
#
# **Where do the numbers live?** First answer: in a tensor that grows, as in exercise 5.1. A growing tensor is copied
# whenever it grows.

# %%
for n in (128, 1024, 8192):
    grown, written = sum(range(1, n + 1)), n                     # tokens moved by concatenate, tokens written in place
    print(f"{n:5,} tokens: concatenate moves {grown:10,} of them, a preallocated cache {written:,}")

# %% [markdown]
# #### Preallocated
#
# `KVCache` takes the memory once and writes in place. It has to know its capacity beforehand, and says so when it
# does not suffice.

# %%
try:
    generate(model, prompt, 64, new_caches(model, batch=1, capacity=100))
except ValueError as error:
    print(error)

# %% [markdown]
# #### A ring, for a model that looks back only so far
#
# Some models attend to a window: each token sees the last $w$ tokens, itself included (lecture 07). Such a model never
# needs more than $w$ keys. A new token can take the place of the oldest.

# %% tags=["export"]
class RingKVCache:
    """The keys and values of the last `window` tokens of one layer; a new token takes the place of the oldest."""

    def __init__(self, batch, n_heads, window, d_head, dtype=torch.float64, device=None):
        check_sizes(window=window)
        self.k = torch.zeros(batch, n_heads, window, d_head, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.length = 0

    @property
    def n_bytes(self):
        """Bytes of the memory taken; they do not grow with the length."""
        return self.k.nbytes + self.v.nbytes

    def update(self, k, v):
        """Store one token's k and v (batch, n_heads, 1, d_head); return those of the last `window` tokens in order.

        ValueError for more tokens than one: the first of them would have to see keys that the last has overwritten.
        """
        check_update(k, v, self.k.shape)
        if k.shape[2] != 1:
            raise ValueError(f"a ring takes one token at a time, got {k.shape[2]}")
        window = self.k.shape[2]
        slot = self.length % window
        self.k[:, :, slot], self.v[:, :, slot] = k[:, :, 0], v[:, :, 0]
        self.length += 1
        if self.length < window:
            return self.k[:, :, :self.length], self.v[:, :, :self.length]
        oldest_first = torch.arange(self.length, self.length + window, device=self.k.device) % window
        return self.k[:, :, oldest_first], self.v[:, :, oldest_first]

# %% [markdown]
# The reference reads everything, with a mask that forbids what is more than $w - 1$ back.

# %%
window = 16
back = np.arange(128)[:, None] - np.arange(128)[None, :]
with torch.no_grad():
    masked = model(ids[:, :128], mask=torch.from_numpy(back < window))
    rings = [RingKVCache(1, config.n_heads, window, config.d_head) for _ in range(config.n_layers)]
    ringed = torch.cat([model(ids[:, t:t + 1], caches=rings) for t in range(128)], dim=1)
print("ring = all tokens under a window mask, to 1e-10:", torch.allclose(ringed, masked, atol=1e-10, rtol=0))
print(f"keys and values held: {sum(ring.n_bytes for ring in rings):,} bytes, at any length")

# %% [markdown]
# Two things are easily confused here. The *slot* of a token goes round in circles; its *position* does not: RoPE has
# turned the key of token 100 to position 100, wherever it lies. And the order of the slots would not matter to the
# softmax; the ring returns the oldest first for the sake of biases such as ALiBi, which count from the end.
#
# #### Pages
#
# A server has many texts at once and knows of none how long it will be. To reserve the longest possible for each is
# safe and wasteful. Kwon et al. (2023, *PagedAttention*, arXiv 2309.06180) do as an operating system does: the memory
# is cut into small pages, a text owns a list of pages (its **block table**), and gets a new one when the last is full.
#
# (A name to trip over: the paper and its software call a page a *block*. "Paged or block cache?" is one thing twice.)

# %% tags=["export"]
class PagePool:
    """Pages of keys and values of one layer, (n_pages, page_size, n_heads, d_head) each, lent out and counted."""

    def __init__(self, n_pages, page_size, n_heads, d_head, dtype=torch.float64, device=None):
        check_sizes(n_pages=n_pages, page_size=page_size)
        self.k_pages = torch.zeros(n_pages, page_size, n_heads, d_head, dtype=dtype, device=device)
        self.v_pages = torch.zeros_like(self.k_pages)
        self.users = [0] * n_pages
        self.free = list(range(n_pages - 1, -1, -1))

    @property
    def page_size(self):
        return self.k_pages.shape[1]

    def take(self):
        """A free page's number. MemoryError when there is none."""
        if not self.free:
            raise MemoryError(f"all {len(self.users)} pages are in use")
        page = self.free.pop()
        self.users[page] = 1
        return page

    def share(self, page):
        """One more sequence reads this page."""
        self.users[page] += 1

    def release(self, page):
        """One sequence less; the last one gives the page back."""
        self.users[page] -= 1
        if self.users[page] == 0:
            self.free.append(page)

    def own(self, page):
        """A page with the same contents that nobody else reads: itself, or a copy (copy on write)."""
        if self.users[page] == 1:
            return page
        copy = self.take()
        self.k_pages[copy], self.v_pages[copy] = self.k_pages[page], self.v_pages[page]
        self.release(page)
        return copy

# %% [markdown]
# The pool counts for each page how many texts read it. That is for later; first the cache that lives in it.

# %% tags=["export"]
class PagedKVCache:
    """Keys and values of some sequences of one layer, in pages of a PagePool; tables[b] lists the pages of row b."""

    def __init__(self, pool, batch):
        self.pool = pool
        self.tables, self.length = [[] for _ in range(batch)], 0

    @property
    def block_table(self):
        """Page numbers, int32 (batch, pages of each row), for paged_decode_attention."""
        return np.array(self.tables, dtype=np.int32)

    def update(self, k, v):
        """Store k and v (batch, n_heads, n_new, d_head); return all so far. MemoryError keeps pages until close()."""
        size, n_heads, d_head = self.pool.k_pages.shape[1:]
        check_update(k, v, (len(self.tables), n_heads, 0, d_head))
        for row, table in enumerate(self.tables):
            for new in range(k.shape[2]):
                page, slot = divmod(self.length + new, size)
                if page == len(table):
                    table.append(self.pool.take())
                table[page] = self.pool.own(table[page])
                where = table[page], slot
                self.pool.k_pages[where], self.pool.v_pages[where] = k[row, :, new], v[row, :, new]
        self.length += k.shape[2]
        return self._gather(self.pool.k_pages), self._gather(self.pool.v_pages)

    def _gather(self, pages):
        """(batch, n_heads, length, d_head), contiguous."""
        tables = torch.tensor(self.tables, dtype=torch.long, device=pages.device)
        rows = pages[tables].flatten(1, 2)[:, :self.length]
        return rows.transpose(1, 2).contiguous()

    def fork(self, rows):
        """A cache whose row i begins as row rows[i] of this one, sharing its pages until one of them writes."""
        other = PagedKVCache(self.pool, 0)
        other.tables, other.length = [list(self.tables[row]) for row in rows], self.length
        for page in itertools.chain(*other.tables):
            self.pool.share(page)
        return other

    def close(self):
        """Give all pages back."""
        for page in itertools.chain(*self.tables):
            self.pool.release(page)
        self.tables, self.length = [], 0

# %% [markdown]
# Two texts take turns, so their pages lie mixed. *Predict* the two block tables: pages of 16 tokens, 40 tokens of the
# first text, 20 of the second, then 30 more of the first.

# %%
pools = [PagePool(n_pages=12, page_size=16, n_heads=4, d_head=16) for _ in range(2)]
first, second = ([PagedKVCache(pool, batch=1) for pool in pools] for _ in range(2))
plain = new_caches(model, 1, 128)
with torch.no_grad():
    model(ids[:, :40], caches=first)
    model(ids[:, 50:70], caches=second)
    paged = model(ids[:, 40:70], caches=first)
    model(ids[:, :40], caches=plain)
    contiguous = model(ids[:, 40:70], caches=plain)
print("first: ", first[0].tables[0], "  second:", second[0].tables[0])

# %%
k, v = first[0]._gather(pools[0].k_pages), first[0]._gather(pools[0].v_pages)
print("keys, paged = contiguous bit for bit:  ", torch.equal(k, plain[0].k[:, :, :70]))
print("values, paged = contiguous bit for bit:", torch.equal(v, plain[0].v[:, :, :70]))
print("logits, paged = contiguous bit for bit:", torch.equal(paged, contiguous))

# %% [markdown]
# Page 5 belongs to the first text although 3 and 4 do not. Nothing else has changed, not one bit.
#
# #### One prompt, many answers: copy on write
#
# Four answers to the same prompt of 100 tokens. Each has the prompt in its cache. **How many pages of 16 does that
# take?** Seven, as long as nobody writes.

# %%
pool = PagePool(n_pages=40, page_size=16, n_heads=4, d_head=16)
prompt_cache = PagedKVCache(pool, batch=1)
draw = np.random.default_rng(3)
prompt_cache.update(*(torch.from_numpy(draw.standard_normal((1, 4, 100, 16))) for _ in "kv"))
answers = prompt_cache.fork([0, 0, 0, 0])
prompt_cache.close()

def report(when):
    alone = sum(len(table) for table in answers.tables)
    print(f"{when:28s} {len(pool.users) - len(pool.free):2d} pages, without sharing {alone}")

report("four answers, nobody wrote:")
new_k, new_v = (torch.from_numpy(draw.standard_normal((4, 4, 1, 16))) for _ in "kv")
k, v = answers.update(new_k, new_v)
report("each wrote one token:")
print("block tables:", *answers.tables, sep="\n")

# %% [markdown]
# Six full pages stay common. Only the last one, in which there was room, was copied when its readers began to write
# different things into it: three times, since the fourth writer was alone by then. Did anybody overwrite anybody?

# %%
print("each sees its own token last:      ", torch.equal(k[:, :, 100:], new_k))
print("all see the same prompt before it: ", all(torch.equal(k[0, :, :100], k[row, :, :100]) for row in range(4)))
answers.close()
print("all pages came back:               ", len(pool.free) == len(pool.users))

# %% [markdown]
# #### How much memory holds nothing?
#
# Kwon et al. measured that in systems before theirs "only 20.4% - 38.2% of the KV cache memory" held the states of
# tokens. The rest was reserved, for a length that never came, or lost between pieces.
#
# *Predict.* A thousand requests of random lengths. Each is served for as many steps as it gets new tokens. Which share
# of what is reserved holds a token, (a) with 2,048 places for each request, (b) with pages of 16?

# %%
draw = np.random.default_rng(4)
prompts = np.clip(draw.lognormal(5.0, 1.0, size=1000), 4, 1024).astype(int)
outputs = np.clip(draw.lognormal(5.3, 0.8, size=1000), 1, 1024).astype(int)
tokens_held = [np.arange(p, p + o) for p, o in zip(prompts, outputs)]      # of each request, at each of its steps

def share_used(reserve):
    """Tokens held divided by places reserved, over all steps of all requests."""
    reserved = sum(np.broadcast_to(reserve(held), held.shape).sum() for held in tokens_held)
    return sum(held.sum() for held in tokens_held) / reserved

page_sizes = 2 ** np.arange(9)
used = [share_used(lambda held: -(-held // size) * size) for size in page_sizes]
print(f"mean prompt {prompts.mean():.0f} tokens, mean answer {outputs.mean():.0f}")
print(f"2,048 places for each request:           {share_used(lambda held: 2048):6.1%} used")
print(f"its final length, if that were known:    {share_used(lambda held: held[-1] + 1):6.1%}")
for size in (1, 16, 256):
    print(f"pages of {size:3d}:                            {used[page_sizes.tolist().index(size)]:6.1%}")

# %%
series = {"pages": used, "2,048 places each": [share_used(lambda held: 2048)] * 9}
ax = plotting.curves(series, x=page_sizes, xlabel="tokens in a page", ylabel="share of reserved memory in use",
                     title="Small pages waste almost nothing")
ax.set(xscale="log", ylim=(0, 1.02))
ax.set_xticks(page_sizes, page_sizes)
plotting.show("Share of memory in use against the page size from 1 to 256: near one for small pages, falling for large "
              "ones, far above the constant line of 2,048 reserved places.")

# %% [markdown]
# A request wastes half a page on average, so waste grows with the page size. Why not pages of one token? Each page
# is an entry in the table, which has to be kept, copied at every fork and sent to the GPU. (That pages lie scattered
# costs the kernel of part 5 nothing; it counts that.) Our first number depends on the lengths that we drew; the paper's
# come from traces of real use.
#
# What pages buy is *room for more requests at once*. The paper's claim is about what follows from it: 2 to 4 times the
# **throughput** at the same latency (abstract). It is not that batches are 2 to 4 times larger; see Traps.
#
# *Source: Kwon et al. 2023, section 1 and figure 2 (20.4% to 38.2%), abstract (2-4x).*

# %% [markdown]
# #### Ragged batches: left padding
#
# Three prompts of different lengths shall be continued together. The *last* tokens are to be continued, so they have to
# stand in one column: the padding goes to the **left**.
#
# *Predict.* Two things must know about the padding. The mask is one. What is the other?
#
# #### Exercise 5.3: left padding  (difficulty 2 of 5, 10 minutes)
#
# | argument | shape | meaning |
# |---|---|---|
# | `lengths` | `(batch,)` integers | real tokens of each row |
# | `n_keys` | int | columns; row b has `n_keys - lengths[b]` of padding on its left |
#
# Returns `(mask, positions)`: booleans `(batch, 1, 1, n_keys)`, True where a real token stands, and integers
# `(batch, n_keys)`: a row's first real token has position 0, the next 1, and so on. Padding gets position 0.
#
# <details><summary>Hint</summary>
#
# Column minus the number of padding columns. Where that is negative, there is padding.
#
# </details>

# %% tags=["exercise", "export"]
def left_padding(lengths, n_keys):
    """Mask (batch, 1, 1, n_keys) and positions (batch, n_keys) of rows whose last lengths[b] columns are tokens.

    Positions count from each row's first token; padding gets 0. Raises ValueError for a length outside 0 to n_keys.
    """
    lengths = whole_numbers("lengths", lengths)
    if lengths.size and (lengths.min() < 0 or lengths.max() > n_keys):
        raise ValueError(f"lengths must lie between 0 and n_keys = {n_keys}, got {lengths.tolist()}")
    ### BEGIN SOLUTION
    positions = np.arange(n_keys) - (n_keys - lengths[:, None])
    return (positions >= 0)[:, None, None, :], positions.clip(0)
    ### END SOLUTION

# %%
left_padding = check("5.3", left_padding)

# %% tags=["export"]
@torch.no_grad()
def generate_ragged(model, ids, lengths, n_new, caches):
    """Greedily continue rows of different lengths: ids (batch, n), padded on the left; the last lengths[b] count.

    caches: empty, one for each layer. Returns (batch, n + n_new). ValueError where a row has no token.
    """
    check_empty(model, caches)
    check_prompt(ids)
    check_sizes(0, n_new=n_new)
    lengths = whole_numbers("lengths", lengths)
    if lengths.shape != (len(ids),) or (lengths < 1).any():
        raise ValueError(f"lengths must be ({len(ids)},), each at least 1, got {lengths.tolist()}")
    unread = ids
    for step in range(n_new):
        mask, positions = (torch.from_numpy(a).to(ids.device) for a in left_padding(lengths + step, ids.shape[1]))
        logits = model(unread, mask=mask, positions=positions[:, -unread.shape[1]:], caches=caches)
        unread = logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, unread], dim=1)
    return ids

# %% [markdown]
# Three prompts of 20, 7 and 13 characters. Does it make a difference to a row who its neighbours are?

# %%
rows = [held_out[start:start + n] for start, n in ((9500, 20), (29000, 7), (44000, 13))]
lengths = np.array([len(row) for row in rows])
padded = torch.stack([F.pad(row, (20 - len(row), 0)) for row in rows])
together = generate_ragged(model, padded, lengths, 30, new_caches(model, batch=3, capacity=64))
for row, out in zip(rows, together):
    alone = generate(model, row[None], 30)[0, len(row):]
    print(f"prompt of {len(row):2d}: token-exact with the row alone: {torch.equal(out[20:], alone)}")

# %% [markdown]
# None. The queries of the padding attend to nothing at all, and such a row is zero by the contract of lecture 01. With
# an additive $-10^9$ it would be an average over keys that nobody may see.
#
# #### Or no padding at all
#
# A kernel that decodes needs no mask. It gets each row's length and reads that many keys, from a rectangle or through a
# block table. These are the functions that part 5 makes fast.

# %% tags=["export"]
def check_decode_arguments(q, k, v, lengths, capacity):
    """Raise ValueError, in one sentence, unless a query for each head and a cache fit together."""
    cuda.check_numbers(q=q, keys=k, values=v)
    if len(q.shape) != 3 or q.shape[2] == 0:
        raise ValueError(f"q must be (batch, heads, d_head), d_head at least 1, got shape {tuple(q.shape)}")
    if tuple(k.shape) != tuple(v.shape):
        raise ValueError(f"keys and values must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if len(k.shape) != 4 or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"keys must have four axes, the last of {q.shape[-1]} as in q, got shape {tuple(k.shape)}")
    lengths = whole_numbers("lengths", lengths)
    if lengths.shape != (q.shape[0],):
        raise ValueError(f"lengths must be ({q.shape[0]},), one for each row of q, got shape {lengths.shape}")
    if lengths.size and (lengths.min() < 0 or lengths.max() > capacity):
        raise ValueError(f"lengths must lie between 0 and {capacity}, got {lengths.tolist()}")

def check_cache_shape(q, cache):
    """Raise ValueError, in one sentence, unless a cache (batch, heads, capacity, d_head) fits the rows of q."""
    cuda.check_numbers(q=q, k_cache=cache)
    if len(cache.shape) != 4 or (len(q.shape) == 3 and tuple(cache.shape[:2]) != tuple(q.shape[:2])):
        raise ValueError(f"keys and values must be (batch, heads, capacity, d_head) with the rows and heads of q, "
                         f"{tuple(q.shape[:2])}, got shape {tuple(cache.shape)}")


# %% tags=["export"]
def decode_attention_numpy(q, k_cache, v_cache, lengths, scale=None):
    """One query for each head attends to the first lengths[b] keys of its row of a cache, in NumPy.

    q (batch, heads, d_head), k_cache and v_cache (batch, heads, capacity, d_head), lengths integers (batch,); scale
    defaults to 1/sqrt(d_head). Returns (batch, heads, d_head) in the float type of q; a row of length 0 gets zeros.
    Raises ValueError when shapes or lengths do not fit.
    """
    check_cache_shape(q, k_cache)
    check_decode_arguments(q, k_cache, v_cache, lengths, k_cache.shape[2])
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    cuda.check_kind(np.ndarray, q=q, keys=k_cache, values=v_cache)
    work = cuda.work_type(q)
    out = np.zeros(q.shape, work)
    for row, length in enumerate(whole_numbers("lengths", lengths)):
        k, v = (cache[row, :, :length].astype(work) for cache in (k_cache, v_cache))
        weights = softmax(np.einsum("hd,hnd->hn", q[row].astype(work), k) * scale)
        out[row] = np.einsum("hn,hnd->hd", weights, v)
    return cuda.like(out, q)

def decode_attention_torch(q, k_cache, v_cache, lengths, scale=None):
    """decode_attention_numpy in PyTorch: all rows at once, differentiable. Same arguments, shapes and errors."""
    check_cache_shape(q, k_cache)
    check_decode_arguments(q, k_cache, v_cache, lengths, k_cache.shape[2])
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    cuda.check_kind(torch.Tensor, q=q, keys=k_cache, values=v_cache)
    work = cuda.work_type(q)
    lengths = torch.from_numpy(whole_numbers("lengths", lengths)).to(q.device)[:, None, None]
    inside = torch.arange(k_cache.shape[2], device=q.device) < lengths                        # (batch, 1, capacity)
    # What lies behind the end may be anything, even nan: 0 * nan is nan, so it is replaced before the products.
    k, v = (cache.to(work).masked_fill(~inside[..., None], 0) for cache in (k_cache, v_cache))
    scores = torch.einsum("bhd,bhnd->bhn", q.to(work), k) * scale
    scores = scores.masked_fill(~inside, -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0), dim=-1).masked_fill(nothing, 0)
    return cuda.like(torch.einsum("bhn,bhnd->bhd", weights, v), q)

# %% tags=["export"]
def gather_pages(pages, block_table, lengths):
    """The rows of a paged cache, contiguous: (batch, heads, table columns * page_size, d_head). Arrays and tensors.

    pages (n_pages, page_size, heads, d_head); block_table integers (batch, columns), unused entries -1; row b needs
    ceil(lengths[b] / page_size) entries. ValueError for a page that does not exist, or a table that is too narrow.
    """
    table, lengths = whole_numbers("block_table", block_table), whole_numbers("lengths", lengths)
    if table.ndim != 2 or len(table) != len(lengths):
        raise ValueError(f"block_table must be ({len(lengths)}, columns), got shape {table.shape}")
    if len(pages.shape) != 4:
        raise ValueError(f"pages must be (n_pages, page_size, heads, d_head), got shape {tuple(pages.shape)}")
    n_pages, page_size = pages.shape[:2]
    if (lengths > table.shape[1] * page_size).any():
        raise ValueError(f"block_table has room for {table.shape[1] * page_size} tokens a row, got {lengths.tolist()}")
    used = np.arange(table.shape[1]) < -(-lengths[:, None] // page_size)
    if (table[used] < 0).any() or (table[used] >= n_pages).any():
        raise ValueError(f"block_table must name pages 0 to {n_pages - 1}, got {table.tolist()}")
    rows = pages[np.where(used, table, 0).astype(np.int64)]             # (batch, columns, page_size, heads, d_head)
    rows = rows.reshape(len(rows), rows.shape[1] * page_size, *rows.shape[3:]).swapaxes(1, 2)
    return rows.contiguous() if hasattr(rows, "contiguous") else np.ascontiguousarray(rows)

def check_paged_arguments(q, k_pages, v_pages, table, lengths):
    """Raise ValueError, in one sentence, unless pages fit q, and the table names those that the lengths need."""
    cuda.check_numbers(q=q, k_pages=k_pages, v_pages=v_pages)
    if len(k_pages.shape) != 4 or len(q.shape) == 3 and k_pages.shape[2] != q.shape[1]:
        raise ValueError(f"pages must be (n_pages, page_size, heads, d_head) with heads and d_head of q, "
                         f"{tuple(q.shape[1:])}, got shape {tuple(k_pages.shape)}")
    if table.ndim != 2 or len(q.shape) == 3 and len(table) != len(q):
        raise ValueError(f"block_table must be ({len(q)}, columns), got shape {table.shape}")
    n_pages, page_size = k_pages.shape[:2]
    check_decode_arguments(q, k_pages, v_pages, lengths, table.shape[1] * page_size)
    used = np.arange(table.shape[1]) < -(-whole_numbers("lengths", lengths)[:, None] // page_size)
    if (table[used] < 0).any() or (table[used] >= n_pages).any():
        raise ValueError(f"block_table must name pages 0 to {n_pages - 1}, got {table.tolist()}")

def gather_both(q, k_pages, v_pages, block_table, lengths):
    """gather_pages of keys and of values; ValueError unless they fit together and q."""
    check_paged_arguments(q, k_pages, v_pages, whole_numbers("block_table", block_table), lengths)
    return [gather_pages(pages, block_table, lengths) for pages in (k_pages, v_pages)]

# %% tags=["export"]
def paged_decode_attention_numpy(q, k_pages, v_pages, block_table, lengths, scale=None):
    """decode_attention_numpy on a paged cache; pages (n_pages, page_size, heads, d_head), block_table (batch, columns).

    Entries of block_table behind a row's last page may be -1. Source: Kwon et al. 2023 (arXiv 2309.06180).
    """
    k, v = gather_both(q, k_pages, v_pages, block_table, lengths)
    return decode_attention_numpy(q, k, v, lengths, scale)

def paged_decode_attention_torch(q, k_pages, v_pages, block_table, lengths, scale=None):
    """paged_decode_attention_numpy in PyTorch. Same arguments, shapes and errors."""
    k, v = gather_both(q, k_pages, v_pages, block_table, lengths)
    return decode_attention_torch(q, k, v, lengths, scale)

# %% [markdown]
# Three requests of 70, 3 and 33 tokens in one pool, one query each. What lies behind a row's end is filled with nan, so
# that a read too far shows.

# %%
draw = np.random.default_rng(5)
k_pages, v_pages = draw.standard_normal((2, 12, 16, 4, 8))
lengths = np.array([70, 3, 33])
table = np.array([[7, 2, 9, 0, 4], [5, -1, -1, -1, -1], [11, 1, 3, -1, -1]])
for row, n in enumerate(lengths):
    last = table[row, (n - 1) // 16]
    k_pages[last, (n - 1) % 16 + 1:] = v_pages[last, (n - 1) % 16 + 1:] = np.nan

q = draw.standard_normal((3, 4, 8))
paged = paged_decode_attention_numpy(q, k_pages, v_pages, table, lengths)
rectangle = [gather_pages(pages, table, lengths) for pages in (k_pages, v_pages)]
print("through the table = from a rectangle, bit for bit:",
      np.array_equal(paged, decode_attention_numpy(q, *rectangle, lengths)))
for row, n in enumerate(lengths):
    k, v = (cache[row, :, :n] for cache in rectangle)
    one = attention_numpy(q[row][:, None], k, v)[:, 0]
    print(f"row of {n:2d} tokens = plain attention, to 1e-10: {np.allclose(paged[row], one, atol=1e-10)}")
same = paged_decode_attention_torch(*(torch.from_numpy(a) for a in (q, k_pages, v_pages)), table, lengths).numpy()
print("PyTorch = NumPy, to 1e-10:", np.allclose(same, paged, atol=1e-10))

# %% [markdown]
# ### 5.4 Autoregressive generation patterns
#
# **In how many ways is a cache filled and read?** All at once (prefill), in pieces (chunked prefill), one by one
# (decode), a few guesses at a time (speculation): the new tokens may be one or many, that is all. Only beams ask for
# more: rows that change places.
#
# #### Prefill and decode
#
# The prompt is known, so all its tokens go in at once: **prefill**, large matrix products. The answer is not known, so
# it comes token by token: **decode**, a matrix times a vector. A prompt may also go in by pieces (**chunked prefill**;
# Agrawal et al. 2023, arXiv 2308.16369; so that a long one does not hold up everybody else: Agrawal et al. 2024, arXiv
# 2403.02310).

# %%
text_ids = held_out[None, 7000:7100]
with torch.no_grad():
    whole = model(text_ids)
    for size in (1, 7, 32, 100):
        caches = new_caches(model, 1, 128)
        parts = [model(chunk, caches=caches) for chunk in text_ids.split(size, dim=1)]
        same = torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-10, rtol=0)
        scores = max(part.shape[1] * end for part, end in zip(parts, np.cumsum([p.shape[1] for p in parts])))
        print(f"chunks of {size:3d}: logits as in one pass: {same}   largest score matrix: {scores:6,} a head")

# %% [markdown]
# The same logits, and a smaller peak of memory. This is where the causal mask has to be **aligned at the bottom
# right**: 3 new tokens and 8 keys, of which 5 were there before.

# %%
from attention.fundamentals import causal_mask

top_left = np.arange(8)[None, :] <= np.arange(3)[:, None]
figure = plotting.masks({"bottom right: right": causal_mask(3, 8), "top left: wrong": top_left},
                        title="Three new tokens, eight keys: the last query must see all")
figure.set_figheight(2.9)
plotting.show("Two masks of three queries and eight keys. Bottom right: the queries see 6, 7 and 8 keys. "
              "Top left: they see 1, 2 and 3.")

# %% [markdown]
# On a square the two are the same, and so a test on squares does not tell them apart.
#
# #### Greedy and sampled
#
# Sampling changes who is chosen, not what is cached. `sample` divides the logits by the temperature, may drop all but
# the `top_k` likeliest, and draws.

# %%
logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, -1)
for temperature, top_k in ((1.0, None), (0.5, None), (1.0, 2)):
    drawn = sample(logits, temperature, top_k, np.random.default_rng(6))
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    wanted = torch.softmax(logits[0] / temperature, -1)
    wanted = wanted if top_k is None else torch.cat([wanted[:top_k] / wanted[:top_k].sum(), torch.zeros(4 - top_k)])
    print(f"temperature {temperature}, top_k {top_k!s:4}: shares", share.numpy().round(2),
          "expected", wanted.numpy().round(2))

drawn = [generate(model, prompt, 64, caches, temperature=0.8, top_k=20, seed=7)
         for caches in (None, new_caches(model, 1, 128))]
print("sampled text, with cache = without:", torch.equal(*drawn))

# %% [markdown]
# #### Beams
#
# Beam search keeps the `width` likeliest beginnings. At each step one beginning may have two children in the next
# generation and another none. **What must the cache do then?** Change its rows, too.

# %% tags=["export"]
@torch.no_grad()
def beam_search(model, ids, n_new, width, caches):
    """The `width` likeliest continuations found. ids (1, n); caches empty, for `width` rows.

    Returns (width, n + n_new) and the log probabilities (width,) of the new tokens, best first. width is at most the
    size of the vocabulary. ValueError for other shapes or widths, or caches that are not empty.
    """
    check_prompt(ids)
    check_sizes(0, n_new=n_new)
    if len(ids) != 1 or not 1 <= width <= model.config.vocab_size:
        raise ValueError(f"ids must be (1, n) and width between 1 and {model.config.vocab_size}, "
                         f"got {tuple(ids.shape)} and {width}")
    check_empty(model, caches)
    beams = unread = ids.expand(width, -1)
    totals = torch.full((width,), -math.inf, dtype=torch.float64, device=ids.device)
    totals[0] = 0.0                                # the rows are still equal: only one may have children
    for _ in range(n_new):
        steps = torch.log_softmax(model(unread, caches=caches)[:, -1], dim=-1)
        totals, best = (totals[:, None] + steps).flatten().topk(width)
        rows, tokens = best // steps.shape[1], best % steps.shape[1]
        for cache in caches:
            cache.reorder(rows)
        unread = tokens[:, None]
        beams = torch.cat([beams[rows], unread], dim=1)
    return beams, totals

# %% [markdown]
# With as many beams as there are characters nothing is lost over two steps, so the result must be the best of *all*
# continuations. And each total must be what the model says of that text when it reads it from scratch.

# %%
def log_probability(texts, n_prompt):
    with torch.no_grad():
        steps = torch.log_softmax(model(texts[:, :-1]), dim=-1)
    return steps.gather(2, texts[:, 1:, None])[:, n_prompt - 1:, 0].sum(1)

n = len(vocabulary)
short = prompt[:, :10]
pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))
all_texts = torch.cat([short.expand(n * n, -1), pairs], dim=1)
beams, totals = beam_search(model, short, 2, n, new_caches(model, n, 16))
exhaustive = log_probability(all_texts, 10)
print(f"{n * n:,} continuations of two characters; the best found by beam search:",
      torch.equal(beams[0], all_texts[exhaustive.argmax()]))

beams, totals = beam_search(model, prompt, 30, 4, new_caches(model, 4, 128))
greedy = generate(model, prompt, 30, new_caches(model, 1, 128))
print("30 characters, 4 beams: totals as read from scratch, to 1e-8:",
      torch.allclose(totals, log_probability(beams, 64), atol=1e-8))
print("the best beam is at least as likely as the greedy text:",
      bool(totals[0] >= log_probability(greedy, 64)[0] - 1e-9))

# %% [markdown]
# (The last line is no law: with two or more beams the greedy text may be crowded out by beginnings that end badly.)
#
# #### Speculation: several queries at once
#
# Decoding one token reads all weights and the whole cache. Reading five new tokens reads them once as well. So let
# something cheap *guess* four tokens, and let the model **verify** all of them in one pass (Leviathan et al. 2022,
# arXiv 2211.17192). What the model agrees with is kept, and its own token is put where it first disagrees.
#
# #### Exercise 5.4: verify a draft  (difficulty 3 of 5, 15 minutes)
#
# | argument | shape | meaning |
# |---|---|---|
# | `draft` | `(n_draft,)` integers | guessed tokens |
# | `logits` | `(n_draft + 1, vocab_size)` | row $i$ is what the model says after `draft[:i]` |
#
# Returns an integer array: the accepted beginning of the draft, then one token of the model's own. Together exactly
# what greedy decoding would have written, so from 1 to `n_draft + 1` tokens.
#
# <details><summary>Hint</summary>
#
# `logits.argmax(-1)` is what the model would write at each place, *if* the draft is right up to there. Find the first
# place of the draft that differs. Nothing behind it means anything, not even a match.
#
# </details>

# %% tags=["exercise", "export"]
def verify_draft(draft, logits):
    """The tokens that greedy decoding would write: the draft as far as the model agrees, and one of the model's own.

    draft integers (n_draft,); logits (n_draft + 1, vocab_size), row i after draft[:i]. Returns an integer array of
    1 to n_draft + 1 tokens. Source: the greedy case of Leviathan et al. 2022 (arXiv 2211.17192).
    """
    ### BEGIN SOLUTION
    own = logits.argmax(-1)
    wrong = np.flatnonzero(own[:-1] != draft)
    n_accepted = wrong[0] if len(wrong) else len(draft)
    return own[:n_accepted + 1]
    ### END SOLUTION

# %%
verify_draft = check("5.4", verify_draft)

# %% tags=["export"]
@torch.no_grad()
def generate_speculative(model, ids, n_new, propose, caches):
    """Greedy continuation of ids (1, n), n at least 1, with guesses. Returns (ids (1, n + n_new), calls of the model).

    propose(ids) guesses the next tokens, integers (n_draft,). caches: empty KVCaches, one for each layer.
    ValueError for other shapes, or caches that are not empty.
    """
    check_prompt(ids)
    check_sizes(0, n_new=n_new)
    if len(ids) != 1:
        raise ValueError(f"ids must be (1, n), got shape {tuple(ids.shape)}")
    check_empty(model, caches)
    end, calls = ids.shape[1] + n_new, 0
    while ids.shape[1] < end:
        draft = whole_numbers("the draft", propose(ids))[:end - ids.shape[1] - 1]              # what can be used
        unread = torch.cat([ids[0], torch.from_numpy(draft).to(ids)])[caches[0].length:]
        logits = model(unread[None], caches=caches)[0, -len(draft) - 1:]
        calls += 1
        found = torch.from_numpy(verify_draft(draft, logits.double().cpu().numpy())).to(ids)
        ids = torch.cat([ids, found[None]], dim=1)
        for cache in caches:                       # keys of rejected guesses are forgotten, the last token is unread
            cache.rewind(ids.shape[1] - 1)
    return ids[:, :end], calls

# %% [markdown]
# The one who guesses: the character that most often followed the last five in the training text (or the last four, if
# those five are new, and so on). No training, no matrix.

# %%
from collections import Counter, defaultdict

followers = defaultdict(Counter)
letters = decode(corpus[:200_000])
for n_context in range(6):
    for i in range(n_context, len(letters)):
        followers[letters[i - n_context:i]][letters[i]] += 1
likeliest = {context: max(sorted(counts), key=counts.get) for context, counts in followers.items()}

def guess(ids, n_draft):
    written = decode(ids[0])
    for _ in range(n_draft):
        context = next(written[len(written) - n:] for n in range(5, -1, -1) if written[len(written) - n:] in likeliest)
        written += likeliest[context]
    return encode(written[len(written) - n_draft:])[0].tolist() if n_draft else []

# %%
starts = (6500, 9500, 15500, 29000, 33500, 44000)
per_call = {}
for n_draft in (0, 2, 4, 8):
    calls, exact = 0, True
    for start in starts:
        beginning = held_out[None, start:start + 48]
        out, n_calls = generate_speculative(model, beginning, 32, lambda ids: guess(ids, n_draft),
                                            new_caches(model, 1, 128))
        calls += n_calls
        exact &= torch.equal(out, generate(model, beginning, 32, new_caches(model, 1, 128)))
    per_call[n_draft] = 32 * len(starts) / calls
    print(f"{n_draft} guesses at a time: greedy-exact {exact}, {per_call[n_draft]:.1f} characters a call")

# %% [markdown]
# The text is exactly the greedy one, whatever is guessed; a bad guess only costs. Each call of the model reads weights
# and cache once, and with guesses writes more than one character. (Our greedy texts go round in circles, which makes
# them easy to guess. And whether fewer calls are faster depends on the price of guesses and of wider calls; the paper
# reports 2x to 3x with T5-XXL.)
#
# **And when tokens are sampled?** Then a guess $x$, drawn from the guesser's $q$, is accepted with probability
# $\min(1, p(x)/q(x))$; if not, a token is drawn from what $p$ has in excess, $\max(0, p - q)$, normalised. The
# distribution of the result is exactly $p$:

# %%
draw = np.random.default_rng(8)
p, q = draw.dirichlet(np.ones(6)), draw.dirichlet(np.ones(6))
accepted = q * np.minimum(1, p / q)
excess = np.maximum(0, p - q)
result = accepted + (1 - accepted.sum()) * excess / excess.sum()
print("p:     ", p.round(3))
print("result:", result.round(3), "  the same to 1e-12:", np.allclose(result, p, atol=1e-12))
print(f"a guess is accepted with probability {accepted.sum():.3f} = sum of min(p, q)")

# %% [markdown]
# ### 5.5 Common pitfalls: five planted bugs
#
# **Which test finds which bug?** A decoder with a cache does four things. Here they are, right:

# %%
class Decoder:
    """A model, its caches, and what is done with them; five bugs will be planted."""

    def __init__(self, model, batch):
        self.model = model
        self.caches = self.make_caches(batch)

    def make_caches(self, batch):
        return new_caches(self.model, batch, 64)

    def positions(self, lengths, n_keys):
        return left_padding(lengths, n_keys)[1]

    def mask(self, lengths, n_new, n_keys):
        return left_padding(lengths, n_keys)[0] if (lengths < n_keys).any() else None     # causal is the model's part

    @torch.no_grad()
    def read(self, ids, padding=None):
        """Logits of ids (batch, n_new), behind what was read before; padding: columns on the left of each row."""
        n_new, n_keys = ids.shape[1], self.caches[0].length + ids.shape[1]
        lengths = n_keys - (np.zeros(len(ids), dtype=int) if padding is None else padding)
        positions, mask = self.positions(lengths, n_keys)[:, -n_new:], self.mask(lengths, n_new, n_keys)
        mask = None if mask is None else torch.from_numpy(mask)
        return self.model(ids, mask=mask, positions=torch.from_numpy(positions), caches=self.caches)

    def reorder(self, rows):
        for cache in self.caches:
            cache.reorder(rows)

# %% [markdown]
# Five bugs that are easily made, each in one place:

# %%
class WrongOffset(Decoder):                       # positions begin again at 0 with every call
    def positions(self, lengths, n_keys):
        return np.tile((np.arange(n_keys) - self.caches[0].length).clip(0), (len(lengths), 1))

class TopLeftMask(Decoder):                       # causal as on a square, when several tokens come
    def mask(self, lengths, n_new, n_keys):
        mask, top_left = super().mask(lengths, n_new, n_keys), np.arange(n_keys) <= np.arange(n_new)[:, None]
        return mask if n_new == 1 else top_left if mask is None else mask & top_left

class StaleRows(Decoder):                         # a rewind moves the pen, and forgets to shorten what is read
    class Cache(KVCache):
        filled = 0

        def update(self, k, v):
            super().update(k, v)
            self.filled = max(self.filled, self.length)
            return self.k[:, :, :self.filled], self.v[:, :, :self.filled]

    def make_caches(self, batch):
        c = self.model.config
        return [self.Cache(batch, c.n_heads, 64, c.d_head) for _ in range(c.n_layers)]

class PaddingCounted(Decoder):                    # positions count the padding
    def positions(self, lengths, n_keys):
        return np.tile(np.arange(n_keys), (len(lengths), 1))

class NoReorder(Decoder):                         # beams change places, their caches do not
    def reorder(self, rows):
        pass

# %% [markdown]
# Five tests. Each reads some text in a complicated way and compares with the model alone, from scratch.

# %%
sequence = held_out[None, 3000:3024]
other = held_out[None, 3100:3124]

def agree(logits, plain):
    return logits.shape == plain.shape and torch.allclose(logits, plain, atol=1e-9, rtol=0)

def one_by_one(kind, model):
    decoder = kind(model, 1)
    return agree(torch.cat([decoder.read(t) for t in sequence.split(1, dim=1)], dim=1), model(sequence))

def in_chunks(kind, model):
    decoder = kind(model, 1)
    return agree(torch.cat([decoder.read(t) for t in sequence.split(7, dim=1)], dim=1), model(sequence))

def after_rewind(kind, model):
    decoder = kind(model, 1)
    decoder.read(sequence)
    for cache in decoder.caches:
        cache.rewind(10)
    logits = torch.cat([decoder.read(t) for t in other[:, 10:14].split(1, dim=1)], dim=1)
    return agree(logits, model(torch.cat([sequence[:, :10], other[:, 10:14]], dim=1))[:, 10:])

def ragged_batch(kind, model):
    decoder = kind(model, 2)
    padded = torch.cat([sequence, F.pad(other[:, :15], (9, 0))])
    logits = decoder.read(padded, padding=np.array([0, 9]))
    return agree(logits[1:, 9:], model(other[:, :15]))

def with_beams(kind, model):
    decoder = kind(model, 2)
    decoder.read(torch.cat([sequence[:, :10], other[:, :10]]))
    decoder.reorder(torch.tensor([1, 1]))
    logits = decoder.read(torch.cat([sequence[:, 10:11], other[:, 10:11]]))
    return agree(logits[:1, -1], model(torch.cat([other[:, :10], sequence[:, 10:11]], dim=1))[:, -1])

# %% [markdown]
# *Predict.* A table of five bugs (and the right decoder) against five tests. In which places is a bug found? Which test
# would you run first? Is there a bug that no test finds?

# %%
kinds = [Decoder, WrongOffset, TopLeftMask, StaleRows, PaddingCounted, NoReorder]
tests = [one_by_one, in_chunks, after_rewind, ragged_batch, with_beams]

@torch.no_grad()
def show_table(model):
    print(f"{'':15s}", *(f"{test.__name__:>13s}" for test in tests))
    for kind in kinds:
        print(f"{kind.__name__:15s}", *(f"{'.' if test(kind, model) else 'FOUND':>13s}" for test in tests))

show_table(model)

# %% [markdown]
# Read the table by columns. The test that everybody writes, one token at a time, finds one bug of five. Tests in
# chunks, after a rewind and with beams find one more each. And **nothing finds `PaddingCounted`**. Why?
#
# RoPE sees only differences of positions. Padding moves all positions of a row by the same number, and nothing changes.
# The bug is there, but this model cannot show it. With sinusoidal positions, which are absolute:

# %%
from attention.rotary import Sinusoidal

absolute = TransformerLM(config, positions=Sinusoidal()).double()
training.initialise(absolute, seed=1)
show_table(absolute)

# %% [markdown]
# Now it is found. Whoever tests the cache with one model and ships it for all has not tested it. It would show with
# RoPE, too, if prompt and answer disagreed about the counting, or if the frequencies followed the length (dynamic
# scaling, lecture 03).

# %% [markdown]
# ### 5.6 Performance implications
#
# **How many tokens a second, with and without?** We time one forward pass: all $n$ tokens, or one token with $n$ in the
# cache. Times differ from machine to machine, so only the exponent of $n$ between 256 and 1,024 is judged here; behind
# it stands a recorded run.

# %%
import time

def seconds(run, repeats=5):
    """Processor time of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)

sizes = np.array([256, 512, 1024])
rows = held_out[None, :1025]
without, with_it = [], []
with torch.no_grad():
    for n in sizes:
        caches = new_caches(model, 1, n + 1)
        model(rows[:, :n], caches=caches)
        without.append(seconds(lambda: model(rows[:, :n + 1])))

        def one_token():
            model(rows[:, n:n + 1], caches=caches)
            for cache in caches:
                cache.rewind(n)
        with_it.append(seconds(one_token, repeats=200))

# %%
def exponent(times):
    return np.polyfit(np.log(sizes), np.log(times), 1)[0]

print("time of the next token, without a cache: exponent above 1.2:", exponent(without) > 1.2)
print("with a cache: below 0.7:", exponent(with_it) < 0.7)
print("at 1,024 tokens the cache makes it at least 10 times faster:", without[-1] > 10 * with_it[-1])

# %% [markdown]
# A run on one machine, recorded (`python -m data.recorded.lecture_05`, one thread, processor time):

# %%
recorded = json.loads((data.FOLDER / "recorded" / "lecture_05.json").read_text())
speed = recorded["tokens_a_second"]
n = np.array(speed["n"])
powers = {kind: np.polyfit(np.log(n[2:]), np.log(speed[kind][2:]), 1)[0] for kind in ("cache", "no cache")}
rates = {f"{kind}: as $n^{{{power:.1f}}}$ from 256 on": speed[kind] for kind, power in powers.items()}
ax = plotting.curves(rates, x=n, xlabel="tokens in the text", ylabel="tokens a second", log_y=True,
                     title="With a cache the next token takes nearly as long in a long text; without, ever longer")
ax.set_xscale("log", base=2)
ax.set_xticks(n, n)
plotting.show("Tokens a second against 64 to 2,048 tokens in the text, both axes logarithmic: with a cache slightly "
              "falling, from over 2,000; without one falling steeply, from 1,000 to about 1.")

# %% [markdown]
# Without a cache the time of *one* token grows faster than the text: all its tokens are projected again, and their
# $n \times n$ scores computed again. With it, it barely grows at these lengths: most of a step does not depend on $n$.
# Does the formula of exercise 5.2 say as much? The same powers, for the same lengths:

# %%
shape = dict(d_model=64, d_ff=128, n_layers=2, vocab_size=len(vocabulary))
counted = {"cache": forward_flops(np.ones_like(n), n, **shape), "no cache": forward_flops(n, n, **shape)}
for kind, flops in counted.items():
    power = -np.polyfit(np.log(n[2:]), np.log(flops[2:]), 1)[0]
    print(f"{kind:8s} tokens a second: measured n^{powers[kind]:.1f}, by the operations alone n^{power:.1f}")

# %% [markdown]
# With a cache most of a step is the same for any length. Without one it gets slower than its operations do. The formula counts products only. It leaves out the mask and the
# softmax, which touch each of the $n^2$ scores several times, and it knows no memory: at 2,048 tokens the scores of a
# layer are 134 MB in double precision and have left the processor's caches. Not writing them down at all is the idea of
# lecture 06.
#
# #### Prefill and decode are two different problems
#
# **What limits them?** Count operations for each byte that must be read, for Llama 3.1 8B in half precision. An H100
# SXM has 3.35 TB/s and 989 TFLOP/s (data sheet, dense bf16), so it needs about 295 operations for each byte to be
# busy.

# %%
n_weights, n_layers, n_heads, n_kv_heads, d_head = 8_030_261_248, 32, 32, 8, 128

def intensity(n_new, n_old, batch):
    """FLOP per byte: (the weights' products, attention over the cache)."""
    weights = 2 * n_weights * n_new * batch / (2 * n_weights)
    keys = n_old + n_new
    attention = 4 * n_new * keys * n_layers * n_heads * d_head / cache_bytes(n_layers, n_kv_heads, d_head, keys)
    return weights, attention                      # the batch multiplies operations and bytes of the cache alike

print(f"an H100 needs {989e12 / 3.35e12:.0f}")
for name, n_new, n_old, batch in (("prefill of 2,000 tokens", 2000, 0, 1), ("decode, one text", 1, 2000, 1),
                                  ("decode, 64 texts", 1, 2000, 64), ("decode, 64 texts, verify 5", 5, 2000, 64)):
    weights, attention = intensity(n_new, n_old, batch)
    print(f"{name:27s} weights {weights:5.0f} FLOP per byte   cache {attention:5.0f}")

# %% [markdown]
# Prefill is limited by arithmetic, decode by memory. A larger batch helps the weights: they are read once for all
# texts. It does not help the cache, because **each text has its own**. For one new token, each query head takes 4
# operations for a number of a key and its neighbour in the value (2 for the score, 2 for the sum). The two are 4 bytes
# in half precision, which $n_\text{heads} / n_\text{kv heads}$ query heads share: that many operations per byte, for
# any batch and any length. Five new tokens take five times as many. This is why one query per head is memory-bound
# (part 5), and why fewer key-value heads (lecture 08) and fewer bits (part 4) matter so much.
#
# The last row: with 64 texts and five tokens each the weights need more operations than the H100's 295 a byte. Is
# speculation still free there?

# %%
weights, cache = 2 * 8.03e9, cache_bytes(32, 8, 128, 2000, batch=64)
for name, n_new in (("one token", 1), ("verify five", 5)):
    products = max(weights / 3.35e12, 2 * 8.03e9 * 64 * n_new / 989e12)
    print(f"{name:12s} weights {1e3 * products:.1f} ms, caches {1e3 * cache / 3.35e12:.1f} ms")

# %% [markdown]
# Nearly: the weights take 8 % longer than it takes to read them, the whole step 4 %.

# %% [markdown]
# ## Part 3 · What a cache may forget
#
# A cache grows with each token. Something has to go, some day. Part 3 asks **which keys** can be dropped, part 4 **how
# many bits** of those that stay.

# %% [markdown]
# ### Attention sinks
#
# **Where does a head look when it wants to look nowhere?** The weights of a softmax sum to 1. A head that has nothing
# to add can only put its weight where it does no harm.
#
# A task where it can be seen (the *Bigram-Backcopy* of Guo et al. 2024, arXiv 2410.13835): every text begins with token
# 0. Tokens 1 to 4 are *triggers*: behind a trigger comes a copy of the token before it. Behind any other token comes
# one drawn from a fixed table, for which no attention is needed.

# %% tags=["export"]
N_TOKENS, N_TRIGGERS = 33, 4                       # token 0 begins a text, tokens 1 to 4 are triggers

def copying_texts(rng, batch, seq_len):
    """Texts of the task of Guo et al. 2024 (arXiv 2410.13835), int64 (batch, seq_len); rng a numpy Generator.

    Behind a trigger comes the token before it, behind another token one drawn from a fixed table.
    """
    table = np.random.default_rng(0).dirichlet(np.full(N_TOKENS - 1, 0.05), size=N_TOKENS).cumsum(1)
    ids = np.zeros((batch, seq_len), dtype=np.int64)
    ids[:, 1] = rng.integers(N_TRIGGERS + 1, N_TOKENS, size=batch)
    for t in range(2, seq_len):
        last = ids[:, t - 1]
        drawn = 1 + (table[last] < rng.random((batch, 1))).sum(1).clip(0, N_TOKENS - 2)
        ids[:, t] = np.where(is_trigger(last), ids[:, t - 2], drawn)
    return ids

def is_trigger(ids):
    return (ids >= 1) & (ids <= N_TRIGGERS)

# %%
print(copying_texts(np.random.default_rng(11), 1, 24)[0])

# %% [markdown]
# One layer, one head, no feed-forward. *Predict:* after training, where does the head look from a trigger, and where
# from any other token?
#
# `positions` and `make_cache` of the next function are needed in a moment: whatever is to stand in front of a model's
# keys can be put there by a cache, also by one that stores nothing.

# %% tags=["export"]
def train_copier(seed, positions=None, make_cache=None, steps=400):
    """A model of one layer and one head, trained on copying_texts. Returns it.

    make_cache(): what stands in front of the keys, made anew for each batch; see NullKey.
    """
    positions = Rotary(32) if positions is None else positions
    model = TransformerLM(TransformerConfig(N_TOKENS, 32, 1, 1, 0), positions=positions).double()
    rng = np.random.default_rng(seed)

    def loss(model, ids):
        caches = [make_cache()] if make_cache else None
        return F.cross_entropy(model(ids[:, :-1], caches=caches).mT, ids[:, 1:])

    texts = (torch.from_numpy(copying_texts(rng, 32, 32)) for _ in range(steps))
    training.fit(training.initialise(model, seed), texts, loss, steps, lr=1e-2)
    return model

# %% tags=["export"]
@torch.no_grad()
def look_at_sink(model, make_cache=None):
    """What a copier does with token 0, on 64 new texts. Returns a dictionary of numbers.

    mass: weight on token 0 from tokens that are no triggers, mass_trigger: from triggers, null: on the null key;
    value_ratio: length of token 0's value over the others'; loss, and evicted: the loss without token 0.
    """
    ids = torch.from_numpy(copying_texts(np.random.default_rng(9), 64, 32))
    with record(model, ("weights",)) as seen:
        logits = model(ids[:, :-1], caches=[make_cache()] if make_cache else None)
    weights, extra = seen["blocks.0.attention.weights"][:, 0], int(make_cache is not None)
    may_attend = torch.arange(31 + extra) != extra                     # all but token 0
    without = model(ids[:, :-1], mask=may_attend, caches=[make_cache()] if make_cache else None)
    trigger, late = is_trigger(ids[:, :-1]), torch.arange(31) >= 4
    values = (model.blocks[0].norm_1(model.embedding(ids[:, :-1])) @ model.blocks[0].attention.w_v).norm(dim=-1)
    return {
        "mass": weights[..., extra][~trigger & late].mean().item(),
        "mass_trigger": weights[..., extra][trigger & late].mean().item(),
        "null": weights[..., 0][~trigger & late].mean().item() if extra else 0.0,
        "value_ratio": (values[:, 0].mean() / values[:, 1:].mean()).item(),
        "loss": F.cross_entropy(logits.mT[..., 1:], ids[:, 2:]).item(),
        "evicted": F.cross_entropy(without.mT[..., 1:], ids[:, 2:]).item(),
    }

# %%
copier = train_copier(seed=0)
plain = look_at_sink(copier)
print(f"weight on token 0, from other tokens:  over 0.5: {plain['mass'] > 0.5}")
print(f"                   from triggers:      under 0.1: {plain['mass_trigger'] < 0.1}")
print(f"length of token 0's value, over that of the others: under 0.3: {plain['value_ratio'] < 0.3}")

# %%
ids = torch.from_numpy(copying_texts(np.random.default_rng(11), 1, 17))
with record(copier, ("weights",)) as seen, torch.no_grad():
    copier(ids[:, :-1])
names = [f"{'!' if is_trigger(i) else ''}{i}" for i in ids[0, :-1].tolist()]
weights = seen["blocks.0.attention.weights"][0, 0].numpy()
plotting.heatmap(weights, names, names, title="A trigger (!) looks at the token before it, the others at token 0")
plotting.show("Attention weights of a text of 16 tokens: rows of triggers are bright just left of the diagonal, most "
              "other rows in the first column.")

# %% [markdown]
# **From a trigger the head looks one token back; from the others it looks at the first token, and makes that token's
# value small.** A large weight times a small value is almost nothing. Both halves were claimed by Guo et al., who call
# the second a *value-state drain*.
#
# So a sink is not a fault that distorts what the model knows. It is how a head says "nothing", when the softmax does
# not let it say so.
#
# #### Room to say nothing
#
# What if the weights need not sum to 1? Add 1 to the denominator (Miller 2023, "Attention is off by one"):
# $w_j = e^{s_j} / (1 + \sum_i e^{s_i})$. That is one more key of zeros, whose score is always 0, with a value of zeros.
# A cache can put it there:

# %% tags=["export"]
class NullKey:
    """A cache that only puts a key of zeros with a value of zeros in front: softmax with 1 added to its denominator."""

    length = 0

    def update(self, k, v):
        return F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))

class LearnedSink(Rotary):
    """RoPE, and a learned score for each head on the first key: with a NullKey, the sink of GPT-OSS."""

    def __init__(self, d_head, n_heads):
        super().__init__(d_head)
        self.sink = torch.nn.Parameter(torch.zeros(n_heads))

    def bias(self, n_queries, n_keys):
        return F.pad(self.sink[:, None, None].expand(-1, n_queries, 1), (0, n_keys - 1))

# %%
scores = np.array([1.0, 2.0, 0.5])
with_null = softmax(np.append(scores, 0.0))[:-1]
off_by_one = np.exp(scores) / (1 + np.exp(scores).sum())
print(f"{with_null.round(4)} sum {with_null.sum():.4f}, the same: {np.allclose(with_null, off_by_one, atol=1e-12)}")

# %% [markdown]
# The open models of GPT-OSS go one step further (OpenAI 2025, arXiv 2508.10925): the score of the missing key is
# learned, one number $b$ for each head, $w_j = e^{s_j} / (e^b + \sum_i e^{s_i})$. With $b = 0$ that is off by one.
# *Predict:* do both get rid of the sink on token 0?

# %%
learned_copier = train_copier(0, positions=LearnedSink(32, n_heads=1), make_cache=NullKey)
learned = look_at_sink(learned_copier, NullKey)
print(f"learned sink: weight on token 0 under half of the plain model's: {learned['mass'] < 0.5 * plain['mass']}")
print(f"the score that was learned is above 0: {learned_copier.positions.sink.item() > 0}")

# %% [markdown]
# Three seeds of each were recorded as well (`data/recorded/lecture_05.json`):

# %%
print("weight on            token 0             null key        loss   without token 0")
for kind, runs in recorded["sinks"].items():
    mass, null = (" ".join(f"{run[key]:.2f}" for run in runs) for key in ("mass", "null"))
    loss, evicted = (np.mean([run[key] for run in runs]) for key in ("loss", "evicted"))
    print(f"{kind:14s} {mass:>20s} {null:>20s} {loss:10.3f} {evicted:10.3f}")

# %% [markdown]
# **The learned sink cut the weight on token 0 to less than half in all three runs, off by one in one of three**: a
# score of 0 can be too low, and then token 0 serves again. The null key took most of the weight in two of the learned
# runs; in the third the weight went to other tokens as well. The loss is nearly the same for all.
#
# Evicting token 0 costs the plain model 0.037 nats, and the other two 0.023: what the sink adds is about a hundredth.
# In large models it is a catastrophe: Xiao et al. 2023 (StreamingLLM, arXiv 2309.17453) report that window attention
# breaks down as soon as the first tokens are evicted, and that keeping the first four brings the quality back. **That
# collapse does not reproduce at this size.** What does is the mechanism: when the sink goes, its weight must go
# somewhere.

# %%
print("one row:", row := np.array([0.70, 0.20, 0.06, 0.04]), "-> without its sink:", (row[1:] / row[1:].sum()).round(2))
print(f"in the model trained here, evicting costs under 0.1 nat: {plain['evicted'] - plain['loss'] < 0.1}")

# %% [markdown]
# With the sink, the other values were added with a weight of 0.3 in all; without it, with 1. A head that wanted to say
# nothing now says something, more than three times as loudly.

# %% [markdown]
# ### Attention sinks / StreamingLLM: sinks and a window
#
# **Can a model read on for ever with a cache of fixed size?** StreamingLLM keeps the first four tokens and the most
# recent ones. And it counts positions **inside the cache**: the newest token of a full cache of 64 is always at
# position 63. When a token is dropped, those behind it move up by one; with RoPE that is a turn by -1 (`shift_keys` of
# lecture 03).

# %% tags=["export"]
class SinkKVCache:
    """The first `n_sinks` tokens of one layer and the most recent ones, `capacity` in all (StreamingLLM, 2309.17453).

    frequencies: those of RoPE, to turn keys to their places inside the cache; without them keys keep their positions in
    the text. capacity > n_sinks, else ValueError.
    """

    def __init__(self, capacity, n_sinks=4, frequencies=None):
        if not 0 <= n_sinks < capacity:
            raise ValueError(f"n_sinks must lie between 0 and capacity - 1, got {n_sinks} and capacity {capacity}")
        self.capacity, self.n_sinks, self.frequencies = capacity, n_sinks, frequencies
        self.k = self.v = self.moved = None                             # moved: by how many places each key was
        self.seen = 0

    @property
    def length(self):
        """The position of the next token."""
        return self.seen if self.frequencies is None else min(self.seen, self.capacity - 1)

    def update(self, k, v):
        """Store k and v (batch, n_heads, n_new, d_head), and return what is kept.

        More than one token only while there is room, else ValueError.
        """
        check_update(k, v, k.shape if self.k is None else self.k.shape)
        held, n_new = min(self.seen, self.capacity), k.shape[2]
        if n_new > 1 and held + n_new > self.capacity:
            raise ValueError(f"a cache of {self.capacity} with {held} tokens takes one at a time, got {n_new}")
        if self.k is None:
            self.k, self.v, self.moved = k[:, :, :0], v[:, :, :0], torch.zeros(0, dtype=torch.long, device=k.device)
        if held == self.capacity and n_new:
            self._drop_oldest()
        self.seen += n_new
        self.k, self.v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        self.moved = torch.cat([self.moved, self.moved.new_zeros(n_new)])
        if self.frequencies is None:
            return self.k, self.v
        return apply_rope_torch(self.k, -self.moved, self.frequencies), self.v    # from how it came, rounded once

    def _drop_oldest(self):
        """Forget the first token behind the sinks; those behind it move up by one."""
        kept = [i for i in range(self.capacity) if i != self.n_sinks]
        self.k, self.v, self.moved = self.k[:, :, kept], self.v[:, :, kept], self.moved[kept]
        self.moved[self.n_sinks:] += 1

# %% [markdown]
# After hundreds of turns by -1, is a key still where it belongs? Each key was turned as often as it moved; rounding
# could add up.

# %%
rope, rng = Rotary(32), np.random.default_rng(0)
keys = torch.from_numpy(rng.standard_normal((1, 1, 1000, 32)))
cache = SinkKVCache(512, frequencies=rope.frequencies)
for t in range(1000):
    turned = rope.rotate(keys[:, :, t:t + 1], torch.tensor([cache.length]))
    held, _ = cache.update(turned, turned)
kept = torch.cat([keys[:, :, :4], keys[:, :, -508:]], dim=2)
expected = rope.rotate(kept, torch.arange(512))
print(f"512 of 1,000 keys, as if turned once: agrees to 1e-10: {torch.allclose(held, expected, rtol=0, atol=1e-10)}")

# %% [markdown]
# Now the model of part 1, trained on 128 characters, reads 384 of them, one by one.

# %%
@torch.no_grad()
def streamed_loss(make_cache, ids):
    """Loss of each next character (batch, seq - 1), read one at a time through the caches that make_cache() makes."""
    caches = [make_cache() for _ in model.blocks]
    losses = []
    for t in range(ids.shape[1] - 1):
        logits = model(ids[:, t:t + 1], caches=caches)[:, 0]
        losses.append(F.cross_entropy(logits, ids[:, t + 1], reduction="none"))
    return torch.stack(losses, dim=1).numpy()

starts = torch.linspace(0, len(held_out) - 386, 24).long()
stream = held_out[starts[:, None] + torch.arange(385)]
d_head = model.config.d_head
frequencies = Rotary(d_head).frequencies

# %%
streamed = {
    "all keys": streamed_loss(lambda: KVCache(24, model.config.n_heads, 384, d_head), stream),
    "last 64": streamed_loss(lambda: SinkKVCache(64, 0, frequencies), stream),
    "4 sinks + 60, positions in the cache": streamed_loss(lambda: SinkKVCache(64, 4, frequencies), stream),
    "4 sinks + 60, positions in the text": streamed_loss(lambda: SinkKVCache(64, 4), stream),
}
stretches = {name: losses.reshape(24, 12, 32).mean((0, 2)).round(2) for name, losses in streamed.items()}

# %%
plotting.curves(stretches, x=np.arange(16, 384, 32), xlabel="characters read", ylabel="loss (nats)",
                title="A fixed cache reads on, if kept sinks stay near in position")
plotting.show("Loss against characters read, in four curves: with all keys it climbs beyond the trained length of 128; "
              "with sinks at their positions in the text it rises at 176, falls back and rises again at the end; the "
              "window, and sinks with positions in the cache, stay flat.")

# %%
late = {name: losses[:, 256:].mean() for name, losses in streamed.items()}
window, sinks = late["last 64"], late["4 sinks + 60, positions in the cache"]
print(f"all keys: worse than the window by more than 0.3 nats: {late['all keys'] > window + 0.3}")
print(f"the four sinks change the window's loss by less than 0.05 nats: {abs(sinks - window) < 0.05}")
with record(model, ("weights",)) as seen, torch.no_grad():
    model(stream[:, :128])
on_first = torch.stack(list(seen.values()))[..., 32:, 0].mean((1, 3))        # (layers, heads)
even = (1 / torch.arange(33.0, 129.0)).mean()
print("weight on a text's first token: under twice an even share in each head:", bool(on_first.max() < 2 * even))
in_text = late["4 sinks + 60, positions in the text"]
print(f"sinks left at their positions in the text: worse by more than 0.1 nats: {in_text > sinks + 0.1}")

# %% [markdown]
# **A fixed cache reads on for ever, and keeping four tokens gains nothing here.** (No head made a sink of the first
# token: this model's texts began anywhere, with no first token in common.) With all keys it meets distances that it was
# not trained on. In a window no distance is new, but the way back to a sink grows with the text, unless positions are
# counted inside the cache: that part of the paper does reproduce. (The damage comes and goes with the distance: between
# 240 and 304 characters it cannot be seen. And without sinks both ways of counting are the same, since RoPE sees only
# differences.)
#
# The paper's 4 million tokens and up to 22.2 times the speed of recomputing the window (its abstract) are statements
# about models that have sinks. "Into a real model", after part 4, looks at one.

# %% [markdown]
# ### H2O, SnapKV: which keys to keep
#
# **Can the weights of the past tell which keys the future will need?** A *policy* looks at the weights of a prompt,
# `(..., n_queries, n_keys)`, and marks `budget` keys. Three of them do not need to look:

# %% tags=["export"]
def check_budget(weights, budget):
    """Raise ValueError, in one sentence, unless weights are (..., n_queries, n_keys) and budget a count."""
    if weights.ndim < 2 or weights.shape[-1] < weights.shape[-2]:
        raise ValueError("weights must be (..., n_queries, n_keys) with n_keys >= n_queries, "
                         f"got shape {weights.shape}")
    if budget < 0:
        raise ValueError(f"budget must be a number of keys, got {budget}")

def mark_largest(scores, budget):
    """Boolean, True at the `budget` largest scores of each row (..., n_keys); of equal ones the first."""
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :budget]
    keep = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(keep, best, True, axis=-1)
    return keep

def keep_window(weights, budget):
    """The `budget` most recent keys. weights (..., n_queries, n_keys); returns boolean (..., n_keys), True = kept."""
    check_budget(weights, budget)
    recency = np.arange(weights.shape[-1], dtype=float)
    return mark_largest(np.broadcast_to(recency, weights[..., 0, :].shape), budget)

def keep_sinks(weights, budget, n_sinks=4):
    """The first n_sinks keys and the most recent ones, as StreamingLLM (arXiv 2309.17453). Shapes as keep_window."""
    check_budget(weights, budget)
    scores = np.arange(weights.shape[-1], dtype=float)
    scores[:n_sinks] = np.inf
    return mark_largest(np.broadcast_to(scores, weights[..., 0, :].shape), budget)

def keep_random(weights, budget, seed=0):
    """Any `budget` keys, drawn for each row: what a policy has to beat. Shapes as keep_window."""
    check_budget(weights, budget)
    return mark_largest(np.random.default_rng(seed).random(weights[..., 0, :].shape), budget)

# %% [markdown]
# #### Exercise 5.5: heavy hitters  (difficulty 3 of 5, 20 minutes)
#
# H2O (Zhang et al. 2023, arXiv 2306.14048) keeps the keys that were looked at most, its *heavy hitters*, **and** the
# most recent ones, half and half.
#
# | argument | shape | meaning |
# |---|---|---|
# | `weights` | `(..., n_queries, n_keys)` | causal attention weights of the prompt; the last query sees all keys |
# | `budget` | integer | keys to keep; `n_keys` or more keeps all |
# | `fair` | boolean | how a key is scored, see below |
#
# Returns a boolean array `(..., n_keys)`, True at `budget` keys. `budget // 2` of them are the heavy hitters, the rest
# are the most recent keys; heavy hitters are chosen among those that are not recent already.
#
# The score of a key is the sum of its column. With `fair`, each weight is first multiplied by the number of keys that
# its query could see, and the sum is divided by the number of queries that could see the key. (A weight of twice its
# even share counts 2.)
#
# <details><summary>Hint</summary>
#
# Give the recent keys a score of infinity, then `mark_largest`. Query $i$ sees $n_k - n_q + i + 1$ keys; key $j$ is
# seen by $\min(n_q, n_k - j)$ queries.
#
# </details>

# %% tags=["exercise", "export"]
def keep_heavy(weights, budget, fair=False):
    """Half heavy hitters, half recent keys. weights (..., n_queries, n_keys), causal; returns boolean (..., n_keys).

    With fair, weights count relative to an even share, and a key's sum is divided by the queries that could see it.
    Source: Zhang et al. 2023 (arXiv 2306.14048), decided once, at the end of the prompt.
    """
    check_budget(weights, budget)
    ### BEGIN SOLUTION
    n_queries, n_keys = weights.shape[-2:]
    scores = weights.sum(-2, dtype=float)
    if fair:
        visible = np.arange(n_keys - n_queries, n_keys) + 1
        seen_by = np.minimum(n_queries, n_keys - np.arange(n_keys))
        scores = (weights * visible[:, None]).sum(-2) / seen_by
    recent = budget - budget // 2
    scores[..., max(n_keys - recent, 0):] = np.inf
    return mark_largest(scores, budget)
    ### END SOLUTION

# %%
keep_heavy = check("5.5", keep_heavy)

# %% [markdown]
# #### Whom does a sum favour?
#
# *Predict.* A head looks at all keys evenly. Which keys are its heavy hitters?

# %%
even = np.tri(12) / np.arange(1, 13)[:, None]
print("column sums:       ", even.sum(0).round(2))
print("kept, 4 of 12:     ", np.flatnonzero(keep_heavy(even, 4)))
visible, seen_by = np.arange(1, 13), 12 - np.arange(12)
print("relative to even:  ", ((even * visible[:, None]).sum(0) / seen_by).round(2))

# %% [markdown]
# **The oldest, though no key was preferred.** An old key was seen by more queries, and by early queries that had few
# keys to choose from. H2O's recent half is there for that reason: "evict by cumulative score" alone would keep a
# prompt's first page for ever. Relative to an even share all keys are equal.
#
# #### SnapKV
#
# SnapKV (Li et al. 2024, arXiv 2404.14469) lets only the **last few queries** vote, the end of the prompt, where the
# question usually stands. Votes are pooled over neighbouring keys, so that a phrase is kept whole, and the voters keep
# their own keys.

# %% tags=["export"]
def keep_voted(weights, budget, n_voters=8, width=1):
    """The keys that the last n_voters queries looked at most, and those of the voters. Shapes as keep_window.

    width: an odd number of neighbouring keys; each gets the largest vote among them.
    Source: Li et al. 2024 (SnapKV, arXiv 2404.14469).
    """
    check_budget(weights, budget)
    if n_voters < 1 or width < 1 or width % 2 == 0:
        raise ValueError(f"n_voters must be at least 1 and width odd, got {n_voters} and {width}")
    votes = weights[..., -n_voters:, :].sum(-2)
    padded = np.pad(votes, [(0, 0)] * (votes.ndim - 1) + [(width // 2, width // 2)])
    votes = np.lib.stride_tricks.sliding_window_view(padded, width, axis=-1).max(-1)
    n_keys = votes.shape[-1]
    place = np.arange(n_keys)
    above_all = votes.max(-1, keepdims=True) + 1 + place                # of the voters the most recent first
    return mark_largest(np.where(place >= n_keys - n_voters, above_all, votes), budget)

def evict(cache, keep, room):
    """A KVCache of the kept keys and values of a KVCache, with room for that many tokens more.

    keep boolean (batch, n_heads, length), as many True in each row, else ValueError. The new cache counts what it
    holds: a model with positions must be told them.
    """
    counts = keep.sum(-1)
    if keep.shape != (*cache.k.shape[:2], cache.length) or (counts != counts.flat[0]).any():
        raise ValueError(f"keep must be {(*cache.k.shape[:2], cache.length)} with as many True in each row, "
                         f"got shape {keep.shape} with {counts.min()} to {counts.max()}")
    (batch, n_heads, _, d_head), kept = cache.k.shape, torch.from_numpy(keep).to(cache.k.device)
    smaller = KVCache(batch, n_heads, int(counts.flat[0]) + room, d_head, cache.k.dtype, cache.k.device)
    smaller.update(*(t[:, :, :cache.length][kept].view(batch, n_heads, -1, d_head) for t in (cache.k, cache.v)))
    return smaller

# %% [markdown]
# #### A task with something to forget
#
# A prompt states 32 facts, one token each: a name and a number. Then come questions, one token each: a name. The model
# has one layer with one head, and no positions, so what is dropped is the only thing that matters. It answers all
# questions in a few seconds of training.

# %% tags=["export"]
N_NAMES, N_NUMBERS = 32, 16

class Facts(torch.nn.Module):
    """Embeds tokens (N_NUMBERS + 1) * name + number, with number 0 for a question, as name plus number."""

    def __init__(self, d_model):
        super().__init__()
        self.names, self.numbers = torch.nn.Embedding(N_NAMES, d_model), torch.nn.Embedding(N_NUMBERS + 1, d_model)

    def forward(self, ids):
        return self.names(ids // (N_NUMBERS + 1)) + self.numbers(ids % (N_NUMBERS + 1))

def facts_and_questions(rng, asked):
    """All names in any order with a number each, then the names asked (batch, n). Returns ids and answers, tensors."""
    names = rng.permuted(np.tile(np.arange(N_NAMES), (len(asked), 1)), axis=1)
    numbers = rng.integers(N_NUMBERS, size=(len(asked), N_NAMES))                  # by name
    facts = names * (N_NUMBERS + 1) + 1 + np.take_along_axis(numbers, names, axis=1)
    ids = np.concatenate([facts, asked * (N_NUMBERS + 1)], axis=1)
    return torch.from_numpy(ids), torch.from_numpy(np.take_along_axis(numbers, asked, axis=1))

def train_clerk(seed, steps=120):
    """A model that answers facts_and_questions: one layer, one head, no positions."""
    model = TransformerLM(TransformerConfig(N_NAMES * (N_NUMBERS + 1), 32, 1, 1, 0))
    model.embedding = Facts(32)
    rng = np.random.default_rng(seed)
    batches = (facts_and_questions(rng, rng.integers(N_NAMES, size=(32, 16))) for _ in range(steps))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0])[:, N_NAMES:, :N_NUMBERS].mT, batch[1])

    training.fit(training.initialise(model.double(), seed), batches, loss, steps, lr=1e-2)
    return model

# %%
clerks = [train_clerk(seed) for seed in range(3)]

# %% [markdown]
# After 24 questions the cache is cut, then 8 more questions come. Three ways the world may go on:
#
# - *same topic*: all 24 questions were about six names, and so are the 8;
# - *new topic*: 16 questions were about six names, then 8 about six others, and so are the 8 that follow;
# - *anything*: the 24 were about six names, the 8 may be about any.

# %%
def questions(rng, batch, world):
    """Names asked before (batch, 24) and after (batch, 8) the cut."""
    topics = rng.permuted(np.tile(np.arange(N_NAMES), (batch, 1)), axis=1)
    first, second = topics[:, :6], topics[:, 6:12]
    def about(topic, n):
        return np.take_along_axis(topic, rng.integers(topic.shape[1], size=(batch, n)), axis=1)
    if world == "new topic":
        return np.concatenate([about(first, 16), about(second, 8)], axis=1), about(second, 8)
    return about(first, 24), about(first if world == "same topic" else topics, 8)

# %%
budgets = np.array([6, 12, 17, 23, 28, 34, 39, 45, 50, 56])                        # of 56 keys: 10 to 100 percent

@torch.no_grad()
def accuracy(model, policies, world, batch=64):
    """Share of right answers after the cut, {policy: (10,)}, one for each budget."""
    rng = np.random.default_rng(7)
    before, after = questions(rng, batch, world)
    ids, answers = facts_and_questions(rng, np.concatenate([before, after], axis=1))
    cache = KVCache(batch, 1, 56, 32)
    with record(model, ("weights",)) as seen:
        model(ids[:, :56], caches=[cache])
    weights = seen["blocks.0.attention.weights"].numpy()

    def share(policy, budget):
        smaller = evict(cache, policy(weights, budget), room=8)
        found = model(ids[:, 56:], caches=[smaller])[..., :N_NUMBERS].argmax(-1)
        return (found == answers[:, 24:]).double().mean().item()
    return {name: np.array([share(policy, budget) for budget in budgets]) for name, policy in policies.items()}

# %% [markdown]
# Expected: the window fails everywhere, since the facts came first; H2O wins on the same topic, SnapKV on a new one.
# *Predict:* which policy is best when anything may be asked?

# %%
def keep_facts(weights, budget, seed=0):
    """Any keys, but facts before questions: it knows what a fact is, and nothing of what will be asked."""
    chance = np.random.default_rng(seed).random(weights[..., 0, :].shape)
    return mark_largest(chance + (np.arange(weights.shape[-1]) < N_NAMES), budget)

policies = {"random": keep_random, "window": keep_window, "4 sinks + window": keep_sinks,
            "H2O": keep_heavy, "SnapKV": keep_voted}
worlds = {"same topic": policies, "new topic": policies, "anything": policies | {"facts first": keep_facts}}
found = {world: [accuracy(clerk, tried, world) for clerk in clerks] for world, tried in worlds.items()}

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
for ax, (world, tried) in zip(axes, worlds.items()):
    runs = {name: np.array([run[name] for run in found[world]]).round(2) for name in tried}
    plotting.curves(runs, x=budgets / 56 * 100, xlabel="keys kept (percent)", ylabel="right answers", title=world,
                    ax=ax)
for ax in axes[:2]:
    ax.get_legend().remove()                                           # one is enough, beside the curves
axes[2].legend(loc="upper left", bbox_to_anchor=(1.02, 1), title="band: range over 3 seeds", title_fontsize=9)
plotting.show("Right answers against the share of keys kept, in three worlds. Same topic: H2O is right "
              "from a fifth of the keys on, SnapKV climbs from 0.65 there. New topic: from a fifth on SnapKV leads, "
              "H2O follows. Anything: H2O and SnapKV run along random from 30 to 60 percent, then SnapKV rises above it "
              "and H2O stays a little below; from a fifth on window and sinks lie below; facts first is above all, and "
              "right from 60 percent on.")

# %%
def right(world, budget):
    i = list(budgets).index(budget)
    return {name: np.mean([run[name][i] for run in found[world]]) for name in worlds[world]}

for world in worlds:
    row = right(world, 17)
    print(f"{world:10s} 17 of 56 keys: " + ", ".join(f"{name} {row[name]:.1f}" for name in row
                                                       if name in policies and name != "window"))
print(f"the window is right once in {N_NUMBERS} times, as a guess: under 0.1 in all three:",
      all(right(world, 17)["window"] < 0.1 for world in worlds))
for budget in (17, 34, 45):
    row = right("anything", budget)
    shown = ("random", "H2O", "SnapKV", "facts first")
    print(f"anything   {budget} of 56 keys: " + ", ".join(f"{name} {row[name]:.1f}" for name in shown))

# %% [markdown]
# **A policy is as good as its guess about the next question.** When the past says what will be asked, H2O keeps all
# that is needed in a third of the cache, SnapKV most of it (eight voters need not have asked for all six names). When
# the topic has just changed, the sum still remembers the old one, and the last voters know better. When anything may be
# asked, **H2O and SnapKV do no better than random eviction with up to 60 percent of the keys**: no weight says which
# fact will be needed. With more, SnapKV gains a little. Who knows what a fact is and drops the 24 questions first has
# all answers with 34 keys, where random has 0.6.
#
# The papers measure where attention repeats itself: H2O up to 29 times the throughput of two serving systems with 20 %
# heavy hitters, SnapKV 3.6 times the speed of decoding at 16,000 tokens (their abstracts). A benchmark whose question
# stands at the end of the prompt, before the cut, is the first world. Ask a second, different question and it is the
# third.
#
# Does pooling help here? Facts are single tokens, so a vote for a neighbour is a vote wasted:

# %%
wide = {f"width {w}": lambda weights, budget, w=w: keep_voted(weights, budget, width=w) for w in (1, 5)}
pooled = [accuracy(clerk, wide, "same topic") for clerk in clerks]
one, five = (np.mean([run[name][list(budgets).index(17)] for run in pooled]) for name in wide)
print(f"at 17 of 56 keys pooling over 5 loses more than 0.1: {one - five > 0.1}")

# %% [markdown]
# ## Part 4 · Fewer bits
#
# ### Quantised KV
#
# **How many bits does a key need?** To quantise is to keep, for a group of numbers, the smallest and the step, and for
# each number only how many steps it lies above. With $b$ bits there are $2^b$ levels.
#
# #### Exercise 5.6: levels  (difficulty 2 of 5, 15 minutes)
#
# | argument | shape | meaning |
# |---|---|---|
# | `x` | `(..., n_tokens, d_head)` | floats, single or double precision |
# | `bits` | integer | there are `2**bits` levels |
# | `per` | `"channel"` or `"token"` | what shares one minimum and one step: the numbers of a channel, or of a token |
#
# Returns an array of the shape of `x` in which each number is replaced by the nearest of its group's levels. The
# levels lie evenly between the group's smallest and largest number, both of which are levels. A group of equal
# numbers stays as it is.
#
# <details><summary>Hint</summary>
#
# Which axis runs over the numbers of one channel? Along it take the minimum and the maximum, with `keepdims=True`.
# Between $2^b$ levels there are $2^b - 1$ steps. A step of 0 must not be divided by.
#
# </details>

# %% tags=["exercise", "export"]
def round_to_levels(x, bits, per):
    """x (..., n_tokens, d_head) rounded to 2**bits even levels between the extremes of each channel or token.

    per "channel" or "token", else ValueError. Returns floats of x's shape.
    """
    if per not in ("channel", "token"):
        raise ValueError(f'per must be "channel" or "token", got {per!r}')
    ### BEGIN SOLUTION
    axis = -2 if per == "channel" else -1
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    step = (high - low) / (2**bits - 1)
    safe = np.where(step == 0, 1, step)
    return np.round((x - low) / safe) * step + low
    ### END SOLUTION

# %%
round_to_levels = check("5.6", round_to_levels)

# %% [markdown]
# #### Which way to group?
#
# *Predict.* One channel of a key is twenty times as large as the others, for all tokens. Does it hurt more to group by
# token or by channel?

# %%
rng = np.random.default_rng(0)
usual = rng.standard_normal((64, 32))
outlier = usual * np.where(np.arange(32) == 5, 20, 1)                 # channel 5 is large for all tokens
others = np.arange(32) != 5

print("error in the other channels, relative to their size, 4 bits")
for name, x in (("usual", usual), ("outlier", outlier)):
    errors = [np.linalg.norm((round_to_levels(x, 4, per) - x)[:, others]) / np.linalg.norm(x[:, others])
              for per in ("token", "channel")]
    print(f"{name:8s} per token {errors[0]:.1f}   per channel {errors[1]:.1f}")

# %% [markdown]
# **Per token, one large channel sets the step for all of them. Per channel it only pays for itself.** KIVI (Liu et al.
# 2024, arXiv 2402.02750) found such channels in the keys of large models, not in their values. Hence its layout: keys
# per channel, values per token, 2 bits, the most recent tokens in full precision.

# %% [markdown]
# #### A quantised cache, in real bytes
#
# Codes of 2 or 4 bits have to be packed into bytes, or nothing is saved. And a group may only be packed after it was
# handed out: its minimum and step would tell a token about later ones.

# %% tags=["export"]
def quantize(x, bits, axis):
    """Round x to 2**bits levels between its minimum and maximum along `axis`. Returns codes, minimum and step.

    x: floats of size below 65,504, the limit of minimum and step. codes: uint8 of x's shape; minimum and step: float16,
    x's shape with `axis` of size 1.
    Dequantised: codes * step + minimum. ValueError for bits other than 2, 4 or 8.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, got {bits}")
    x = x.to(cuda.work_type(x))
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    minimum, step = low.half(), ((high - low) / (2**bits - 1)).half()
    safe = step.masked_fill(step == 0, 1).to(x.dtype)                   # all equal: every code is 0
    codes = ((x - minimum.to(x.dtype)) / safe).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return codes, minimum, step

def dequantize(codes, minimum, step, dtype):
    """The numbers that `quantize` stood for."""
    work = torch.promote_types(dtype, torch.float32)                    # rounded once, at the end
    return (codes.to(work) * step.to(work) + minimum.to(work)).to(dtype)

def pack(codes, bits):
    """Put 8 / bits codes into each byte along the last axis, whose size must be a multiple of that, else ValueError."""
    per_byte = 8 // bits
    if codes.shape[-1] % per_byte:
        raise ValueError(f"the last axis must be a multiple of {per_byte}, got {codes.shape[-1]}")
    parts = codes.unflatten(-1, (codes.shape[-1] // per_byte, per_byte)).to(torch.int32)
    parts = parts << (torch.arange(per_byte, device=codes.device) * bits)
    return parts.sum(-1).to(torch.uint8)

def unpack(packed, bits):
    """The inverse of pack."""
    shifts = torch.arange(8 // bits, device=packed.device) * bits
    return (packed[..., None].to(torch.int32) >> shifts & (2**bits - 1)).to(torch.uint8).flatten(-2)

# %% tags=["export"]
class QuantizedKVCache:
    """Keys and values of one layer in `bits` bits, the last tokens (fewer than `group`) in full precision.

    Each group of tokens gets a minimum and a step, in half precision, for each channel of its keys and for each
    token of its values, the layout of KIVI (Liu et al. 2024, arXiv 2402.02750); key_axis="token" treats keys as values.
    """

    def __init__(self, bits, group=32, key_axis="channel"):
        if bits not in (2, 4, 8) or group < 1:
            raise ValueError(f"bits must be 2, 4 or 8 and group at least 1, got {bits} and {group}")
        if key_axis not in ("channel", "token"):
            raise ValueError(f'key_axis must be "channel" or "token", got {key_axis!r}')
        self.bits, self.group, self.length = bits, group, 0
        self.axes = (-2 if key_axis == "channel" else -1, -1)
        self.stored = ([], [])                                          # of keys and of values: (packed, minimum, step)
        self.recent = [None, None]

    @property
    def n_bytes(self):
        """Bytes that are really held: packed codes, minima, steps, and the recent tokens as they came."""
        return sum(t.nbytes for kind in self.stored for part in kind for t in part) + sum(
            t.nbytes for t in self.recent if t is not None)

    def update(self, k, v):
        """Store k and v (batch, n_heads, n_new, d_head); return all so far.

        Earlier groups come back dequantised, the rest as it came. A group that is full now is packed for the next
        call: its minimum and step would let a token see later ones.
        """
        recent, per_byte = self.recent[0], 8 // self.bits
        check_update(k, v, k.shape if recent is None else recent.shape)
        if k.shape[3] % per_byte:
            raise ValueError(f"d_head must be a multiple of {per_byte}, got {k.shape[3]}")
        self.length += k.shape[2]
        found = []
        for kind, new in enumerate((k, v)):
            recent = new if self.recent[kind] is None else torch.cat([self.recent[kind], new], dim=2)
            old = [dequantize(unpack(packed, self.bits), minimum, step, new.dtype)
                   for packed, minimum, step in self.stored[kind]]
            found.append(torch.cat([*old, recent], dim=2))
            while recent.shape[2] >= self.group:
                codes, minimum, step = quantize(recent[:, :, :self.group], self.bits, self.axes[kind])
                self.stored[kind].append((pack(codes, self.bits), minimum, step))
                recent = recent[:, :, self.group:].clone()
            self.recent[kind] = recent
        return tuple(found)

# %%
x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 32, 32)))
codes, minimum, step = quantize(x, 4, -2)
assert (unpack(pack(codes, 4), 4) == codes).all()
ours = torch.from_numpy(round_to_levels(x.numpy(), 4, "channel"))
print(f"32 codes of 4 bits are {pack(codes, 4).shape[-1]} bytes")
error = (dequantize(codes, minimum, step, x.dtype) - ours).abs().mean()
print(f"as in exercise 5.6, up to the rounding of minimum and step: {error < 0.005}")

# %% [markdown]
# Minimum and step are stored too, two bytes each for a group: 32 tokens of a key channel, or all channels of a value.
# *Predict:* how many bits does a number of a 4-bit cache take?

# %%
numbers = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4, 256, 32)))
for bits in (8, 4, 2):
    per_number = {}
    for d_head in (32, 16):
        some, cache = numbers[..., :d_head], QuantizedKVCache(bits, group=32)
        cache.update(some, some)
        per_number[d_head] = 8 * cache.n_bytes / (2 * some.numel())
    print(f"{bits} bits: {per_number[32]:.0f} bits a number, {16 / per_number[32]:.1f} times smaller than half "
          f"precision; with d_head 16: {per_number[16]:.1f} bits")

# %% [markdown]
# **4 bits are 5 bits: 3.2 times smaller, not 4.** "int4 quarters the cache" leaves out minimum and step; at 2 bits they
# are a third of the cache. The heads of the model of part 1 have 16 channels: there a value's group is half as large,
# and it is 5.5.
#
# #### What it costs
#
# The claim of KIVI (its abstract): 2 bits with almost the same quality, 2.6 times less peak memory with the weights
# counted. The model of part 1 reads held-out text through quantised caches. Expected: 8 bits free, 4 bits almost,
# 2 bits better in KIVI's layout.

# %%
starts = torch.linspace(0, len(held_out) - 130, 48).long()
pages = held_out[starts[:, None] + torch.arange(129)]

@torch.no_grad()
def loss_with(make_cache, reader):
    """Loss of the second half of 48 held-out texts of 128 characters."""
    caches = [make_cache() for _ in reader.blocks]
    # In chunks of one group: what is read together sees itself unquantised, as one token at a time would.
    logits = torch.cat([reader(ids, caches=caches) for ids in pages[:, :-1].split(32, dim=1)], dim=1)
    return F.cross_entropy(logits[:, 64:].mT, pages[:, 65:]).item()

# %%
def compare(reader):
    """Extra loss over a cache that is not quantised, {(bits, key_axis): nats}."""
    n_heads, d_head = reader.config.n_heads, reader.config.d_head
    exact = loss_with(lambda: KVCache(48, n_heads, 128, d_head), reader)
    return {(bits, axis): loss_with(lambda: QuantizedKVCache(bits, 32, axis), reader) - exact
            for bits in (8, 4, 2) for axis in ("token", "channel")}

extra = compare(model)
print(f"8 bits, either way:   under 0.005 nats: {max(extra[8, 'token'], extra[8, 'channel']) < 0.005}")
print(f"4 bits, either way:   under 0.01 nats: {max(extra[4, 'token'], extra[4, 'channel']) < 0.01}")
print(f"2 bits, either way:   under 0.05 nats: {max(extra[2, 'token'], extra[2, 'channel']) < 0.05}")
print(f"2 bits: the two layouts differ by less than 0.03 nats: {abs(extra[2, 'token'] - extra[2, 'channel']) < 0.03}")

# %% [markdown]
# **8 and 4 bits are free, 2 nearly, and KIVI's layout gains little: this model has no large channels.** They can be
# planted without changing what the model computes: multiply one pair of key channels by 20 and divide the queries' by
# 20. (A pair, because RoPE turns the two together; lecture 03.)

# %% tags=["export"]
def plant_outliers(model, factor=20.0):
    """A copy of a TransformerLM with Rotary that computes the same, with keys of a few large channels.

    In each head the last pair of channels is `factor` times as large in the keys, and as much smaller in the queries.
    """
    other, half = copy.deepcopy(model), model.config.d_head // 2
    columns = [head * 2 * half + i for head in range(model.config.n_heads) for i in (half - 1, 2 * half - 1)]
    with torch.no_grad():
        for block in other.blocks:
            block.attention.w_k[:, columns] *= factor
            block.attention.w_q[:, columns] /= factor
    return other

# %%
planted = plant_outliers(model)
with torch.no_grad():
    print(f"same logits to 1e-10: {torch.allclose(model(pages[:4, :-1]), planted(pages[:4, :-1]), rtol=0, atol=1e-10)}")
extra_planted = compare(planted)
gain = extra_planted[2, "token"] - extra_planted[2, "channel"]
print(f"2 bits, outliers planted: keys per channel better by more than 0.45 nats: {gain > 0.45}")
print(f"as good as without outliers, to 0.005 nats: {abs(extra_planted[2, 'channel'] - extra[2, 'channel']) < 0.005}")

# %%
with_names = {f"{bits} bits, {which} outliers, per {axis}": round(many[bits, axis], 2)
              for which, many in (("no", extra), ("with", extra_planted)) for bits in (4, 2)
              for axis in ("token", "channel")}
plotting.bars(with_names, ylabel="extra loss (nats)",
              title="With large channels, keys are better quantised per channel")
plotting.show("Bars of extra loss for 4 and 2 bits, without and with planted outliers, keys per token and per channel: "
              "only with outliers is per token clearly worse.")

# %% [markdown]
# The same with three seeds of training, recorded (`data/recorded/lecture_05.json`), extra loss in nats:

# %%
print("bits  outliers   keys per token      keys per channel")
for bits in ("8", "4", "2"):
    for kind in ("usual", "planted"):
        runs = [run[kind][bits] for run in recorded["quantised"]]
        token, channel = (" ".join(f"{round(run[axis], 2) + 0.0:.2f}" for run in runs) for axis in ("token", "channel"))
        print(f"{bits:>4s}  {kind:8s}   {token:16s}    {channel}")

# %% [markdown]
# ### Slim attention
#
# **Must values be stored at all?** Keys are $K = X W_K$ and values $V = X W_V$. If $W_K$ is square and invertible, then
# $X = K W_K^{-1}$ and $V = K\, W_K^{-1} W_V$: half of the cache is redundant (Graef and Wasielewski 2025, arXiv
# 2503.05840).

# %% tags=["export"]
def values_from_keys(k, w_k, w_v):
    """Slim attention: the values x @ w_v of tokens whose keys, before RoPE, are k = x @ w_k. NumPy.

    k (..., d_model), all heads side by side; w_k square, else ValueError; w_v (d_model, d_out). Exact as far as w_k is
    well conditioned. Source: arXiv 2503.05840.
    """
    if w_k.shape[0] != w_k.shape[1]:
        raise ValueError(f"w_k must be square to be inverted, got shape {w_k.shape}: grouped heads cannot be slim")
    return k @ np.linalg.solve(w_k, w_v)

# %%
block = model.blocks[0].attention
w_k, w_v = block.w_k.detach().numpy(), block.w_v.detach().numpy()
x = np.random.default_rng(0).standard_normal((100, len(w_k)))
v = x @ w_v
rebuilt = values_from_keys(x @ w_k, w_k, w_v)
print(f"values from keys, in float64: agrees to 1e-10: {np.allclose(rebuilt, v, rtol=0, atol=1e-10)}")

# %% [markdown]
# Exact, on paper. A cache is stored in half precision. *Predict:* what does $W_K^{-1}$ do to the rounding of K? The
# weights below are random with a chosen **condition number**, the largest singular value over the smallest.

# %%
def conditioned(rng, d, condition):
    """A random matrix (d, d) with singular values from 1 down to 1 / condition."""
    left, right = (np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(2))
    return left * np.geomspace(1, 1 / condition, d) @ right

def slim_error(rng, condition, d=64):
    """Relative error of values rebuilt from keys in half precision, and of values stored in half precision."""
    x, w_k, w_v = rng.standard_normal((200, d)), conditioned(rng, d, condition), conditioned(rng, d, 10)
    k, v = x @ w_k, x @ w_v
    rebuilt = values_from_keys(k.astype(np.float16).astype(float), w_k, w_v)
    return [np.linalg.norm(other - v) / np.linalg.norm(v) for other in (rebuilt, v.astype(np.float16))]

conditions = np.array([1, 10, 100, 1000, 10_000])
errors = np.array([[slim_error(np.random.default_rng(seed), c) for c in conditions] for seed in range(3)])
plotting.curves({"rebuilt from keys in half precision": errors[..., 0], "stored in half precision": errors[..., 1]},
                x=np.log10(conditions), xlabel="log10 of the condition number of W_K", ylabel="relative error of V",
                title="Slim attention is as exact as W_K is well conditioned", log_y=True)
plotting.show("Relative error of the values on a logarithmic axis: stored values stay near 0.0002, rebuilt ones "
              "climb with the condition number of W_K.")

# %%
mean = errors.mean(0)
print(f"condition 1: error at most 3 times that of stored values: {mean[0, 0] < 3 * mean[0, 1]}")
print(f"condition 1000: more than 20 times: {mean[3, 0] > 20 * mean[3, 1]}")
grouped = w_k[:, :len(w_k) // 4]                                       # one of four heads has keys
left_over = v - (x @ grouped) @ np.linalg.lstsq(x @ grouped, v, rcond=None)[0]
print(f"grouped heads: best possible error over half of V: {np.linalg.norm(left_over) > 0.5 * np.linalg.norm(v)}")

# %% [markdown]
# **Half the cache for models with as many key heads as query heads, with a square, well-conditioned $W_K$, and keys
# kept before RoPE.** Rounding is amplified by up to the condition number. With grouped heads (lecture 08) the key of a
# token has fewer numbers than its x: X cannot be recovered, and the slim form is gone. The paper's larger factors, 8
# for Whisper and 32 for T5-11B, come from encoder-decoder models and from a projection wider than the model.

# %% [markdown]
# ## Into a real model
#
# ### The same cache, in a model that writes English
#
# Until now a model of some ten thousand parameters read characters. **Does what you built hold in a model that people
# use?** SmolLM2-135M has 30 layers, 9 query heads on 3 heads of keys, $d_\text{head} = 64$, and comes as one file of 98
# MB. Its code is in `utils/language_model/model.py`; each part of it can be exchanged for a function of yours.

# %% tags=["language-model"]
from attention.multi_head import masked_softmax
from utils import language_model

smollm = language_model.load()

# %% [markdown]
# `generate` and `KVCache` do not know which model they serve. The tokens below appear as they are computed.

# %% tags=["language-model"]
if smollm:
    writer = smollm.replace(last_only=True)           # logits of the last token only
    opening = smollm.encode("The sun rises in the east and")
    typewriter = language_model.Typewriter(smollm)
    typewriter(opening)
    caches = new_caches(smollm, batch=1, capacity=40)
    cached = generate(writer, opening, 24, caches, on_token=typewriter)
    plain = generate(writer, opening, 24)
    start = opening.shape[1]
    print(f"\n\nthe same tokens without a cache: {torch.equal(cached, plain)}")
    without = sum(range(start, start + 24))
    print(f"tokens read: with the cache {start + 23}, without {without}")

# %% [markdown]
# The mistakes of section 5.5 can be made here too. A mask that begins at the top left, positions that start again in
# each call, positions that are one too small after the prompt, a token that does not see itself. *Predict:* which of
# them can you see in what the model writes?

# %% tags=["language-model"]
if smollm:
    for name in ("mask at the top left", "positions restarted",
                 "positions one too early", "own token not seen"):
        seen = language_model.compare(smollm, **language_model.BUGS[name])
        print(f"{name:24s} loss {seen.loss:.2f}, logits off by {seen.off}")
        print(f"{'':24s} {seen.text!r}")
    print(f"{'no mistake':24s} loss {seen.right_loss:.2f}")
    print(f"{'':24s} {seen.right_text!r}")

# %% [markdown]
# **Two of the four write the right sentence, and one of these has the right loss, too.** So a test of a cache compares
# logits first, then the loss, then the text. (Read: 256 tokens of a manual, 64 at a time.)
#
# ### Sinks, and one number out of 221,184
#
# Our small models had to be given a reason to make a sink. Here is the weight that token 0 gets in each head, as a mean
# over the queries 64 to 511 of a text that the model has never seen: this course. An even share would be 0.005.

# %% tags=["language-model"]
if smollm:
    strange = language_model.excerpt(smollm, 512, of="course")
    on_first = []

    def watch(q, k, v, causal):
        weights = masked_softmax(q @ k.mT / math.sqrt(q.shape[-1]), causal=True)
        on_first.append(weights[0, :, 64:, 0].mean(-1))
        return weights @ v

    with torch.no_grad():
        smollm.replace(attention=watch).hidden(strange)
    sink = torch.stack(on_first)                                 # (layers, heads)
    plotting.matrix(sink.T, xlabel="layer", ylabel="head", label="weight on token 0",
                    title="In layers 12 to 29 much of the weight is on token 0")
    plotting.show("Nine heads by thirty layers, coloured by the weight on token 0: "
                  "white in layers 0, 1, 10 and 11, pale in 2 to 9, and from layer 12 on "
                  "red in nearly every head, darkest in heads 7 and 8 of layer 18.")
    print(f"weight on token 0, layers 12 to 28:      {sink[12:29].mean():.2f}")
    print(f"weight on token 0, layers 0, 1, 10, 11:  {sink[[0, 1, 10, 11]].mean():.2f}")
    print(f"heads that give it more than half:       {(sink > 0.5).sum()} of 270")

# %% [markdown]
# What the last word of the first lines looks at, on the average of the heads of layers 12 to 28:

# %% tags=["language-model"]
if smollm:
    few = strange[:, :80]
    received = language_model.weights(smollm, few)[12:29, :, -1].mean((0, 1))
    plotting.text(smollm.tokens(few), received, "weight received from the last token",
                  "The first 80 tokens of a text: the first word gets about a third of "
                  "the weight, a few near the end a little, all others almost none.",
                  highest=0.5)

# %% [markdown]
# The first word is no more important than the others. What makes it the sink? After layer 11 its vector of 576 numbers
# has one that dwarfs all others (a *massive activation*, Sun et al. 2024, arXiv 2402.17762):

# %% tags=["language-model"]
if smollm:
    seen = {}
    def keep(block, given, stream):
        seen["after layer 11"] = stream[0].abs()

    hook = smollm.blocks[11].register_forward_hook(keep)
    with torch.no_grad():
        smollm.hidden(strange[:, :384])
    hook.remove()
    size = seen["after layer 11"]
    print(f"token 0: number {size[0].argmax()} is {size[0].max() / 1000:.1f} thousand")
    print(f"the largest of the {size[1:].numel():,} numbers of the other tokens: "
          f"{size[1:].max():.0f}")

# %% [markdown]
# 384 tokens times 576 numbers are 221,184 numbers. *Predict:* what does the loss of the other 383 tokens become when
# this one is set to 0? And when another one is? Two texts: this course, and a manual that the model may have seen in
# training.

# %% tags=["language-model"]
if smollm:
    def loss_with(ids, entry, value):
        """Loss where after layer 11 one number of token 0 is set to a value."""
        def change(block, given, stream):
            stream = stream.clone()
            stream[0, 0, entry] = value
            return stream
        hook = smollm.blocks[11].register_forward_hook(change)
        try:
            return smollm.losses(ids).mean()
        finally:
            hook.remove()

    texts = [language_model.excerpt(smollm, 384, of) for of in ("course", "help")]
    hidden = torch.ones(384, 384, dtype=torch.bool)
    hidden[1:, 0] = False
    changes = ((507, 22_000.0), (507, 1000.0), (507, 0.0), (100, 0.0))
    print(f"{'loss, nats a token':32s} course    help")

    def show_row(name, losses):
        print(f"{name:32s} " + "   ".join(f"{loss:5.2f}" for loss in losses))

    show_row("nothing changed", [smollm.losses(ids).mean() for ids in texts])
    for entry, value in changes:
        show_row(f"number {entry} set to {value:,.0f}",
                 [loss_with(ids, entry, value) for ids in texts])
    show_row("token 0 hidden from the others",
             [smollm.losses(ids, mask=hidden).mean() for ids in texts])
    guess = math.log(smollm.config.vocab_size)
    show_row(f"guessing among {smollm.config.vocab_size:,} tokens", [guess, guess])

# %% [markdown]
# **One number decides between a language model and something worse than guessing, and its exact value does not
# matter:** the sink is a constant that the model adds to each text. The last row is a warning. Hide token 0 in all
# layers, and the loss hardly moves: token 1 is the first that can be seen then, and takes over. Who evicts the
# first tokens from a cache that has been filled does something else: they were the sinks when the other keys were
# made.
#
# ### 2 bits, in the right layout and in the wrong one
#
# Part 4 had to plant large channels. Are there any here? The keys of 64 tokens in one head of layer 12:

# %% tags=["language-model"]
if smollm:
    def read(ids):
        """The caches of 768 tokens, and the next 129 tokens."""
        caches = smollm.new_caches()
        with torch.no_grad():
            smollm.hidden(ids[:, :768], caches=caches)
        return caches, ids[:, 768:]

    full = {of: read(language_model.excerpt(smollm, 897, of))
            for of in ("course", "help")}
    keys = full["course"][0][12].k[0, 0, 64:128]
    plotting.matrix(keys, xlabel="channel", ylabel="token", label="key",
                    title="A few channels are far from zero in all tokens")
    plotting.show("Keys of 64 tokens in 64 channels: three columns have one strong "
                  "colour from top to bottom; the rows look alike.")

# %% [markdown]
# Columns, not rows: a channel that is large is large for all tokens. A group of one *channel* has a small range; a group
# of one *token* has to span from the largest channel to the smallest. The loss of the 128 tokens that follow 768 in a
# quantised cache, above that with the exact cache:

# %% tags=["language-model"]
if smollm:
    def next_loss(of, make_cache):
        """Loss of what follows, from other caches with the same keys and values."""
        exact, ids = full[of]
        caches = [make_cache() for _ in exact]
        for cache, filled in zip(caches, exact):
            cache.update(filled.k, filled.v)
        return smollm.losses(ids, caches=caches).mean()

    extra_loss = {}
    for of in full:
        exact_loss = next_loss(of, language_model.Cache)
        for bits, axis in itertools.product((4, 2), ("channel", "token")):
            found_loss = next_loss(of, lambda: QuantizedKVCache(bits, 32, axis))
            extra_loss[of, bits, axis] = float(found_loss - exact_loss)
    print("extra loss, keys          course    help")
    for bits, axis in itertools.product((4, 2), ("channel", "token")):
        both = [round(extra_loss[of, bits, axis], 2) + 0.0 for of in full]
        print(f"{bits} bits, per {axis:12s} {both[0]:9.2f} {both[1]:7.2f}")

# %% tags=["language-model"]
if smollm:
    heights = {f"{of}, keys per {axis}": extra_loss[of, 2, axis]
               for of in full for axis in ("channel", "token")}
    plotting.bars(heights, ylabel="extra loss (nats)",
                  title="At 2 bits the layout of the keys decides")
    plotting.show("Extra loss of a 2-bit cache on two texts: about 0.15 nats with keys "
                  "per channel, 0.75 and 2.2 nats with keys per token.")

# %% [markdown]
# **KIVI's claim holds here without planting anything:** 4 bits cost nothing, and at 2 bits the layout decides.
# (Differences of 0.01 on 128 tokens are noise.) The small model of part 4 could not show this: large channels come
# with size and training.

# %% tags=["language-model"]
smollm = writer = full = None                                    # its memory is free again

# %% [markdown]
# ## Part 5 · CUDA: one query, many keys
#
# **What does a kernel with one query wait for?** Section 5.6 counted: a query head with keys of its own does one
# operation for each byte of a cache in half precision, whatever the batch and the length. The kernels below compute in
# float32, where a number is twice as large: half an operation for each byte. The ridge of the roofline lies at 20 in
# float32 and at 295 in bfloat16 (lecture 04, H100 SXM).
#
# So it waits for the memory, and the bytes decide. This part writes the kernel, splits it so that the whole GPU has
# work, and lets it read a paged cache. No GPU is needed, and no times are claimed: bytes and blocks are counted.

# %% [markdown]
# The floor: each number of K and V once, the query once, the output once. Four operations for each pair of numbers, one
# of K and one of V: two for the score, two for the output.

# %%
def floor(lengths, heads, d):
    """Bytes that a step of decoding must move in float32: K and V, the queries of rows with keys, the outputs."""
    return 4 * heads * d * (2 * sum(lengths) + sum(n > 0 for n in lengths) + len(lengths))

n, d = 8192, 128
print(f"{4 * n * d / floor([n], 1, d):.2f} FLOP per byte")

# %% [markdown]
# ### One block for each head
#
# First the obvious kernel. A block of four warps has one query. Each warp takes a key at a time, and its lanes read
# neighbouring numbers of it; the scores stay in shared memory. Then a softmax, then one thread for each column of V.

# %% tags=["export"]
WARP = r"""
__device__ float warp_max(float x) {
  for (int o = 16; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, o));
  return x;
}
__device__ float warp_sum(float x) {
  for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffff, x, o);
  return x;
}
"""

# %%
DECODE_NAIVE = WARP + r"""
#define THREADS 128
__global__ void decode_naive(const float* q, const float* k, const float* v, const int* lengths, float* out,
                             int capacity, int heads, int d, float scale) {
  extern __shared__ float q_row[];                      // the query, then a score for each key
  float* scores = q_row + d;
  size_t row = blockIdx.x;                              // batch * heads rows
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, length = lengths[row / heads];
  q += row * d, out += row * d, k += row * capacity * d, v += row * capacity * d;

  // load
  for (int c = threadIdx.x; c < d; c += THREADS) q_row[c] = length ? scale * q[c] : 0.0f;
  __syncthreads();

  // score: a warp for each key
  for (int j = warp; j < length; j += THREADS / 32) {
    float s = 0.0f;
    for (int c = lane; c < d; c += 32) s += q_row[c] * k[(size_t)j * d + c];
    s = warp_sum(s);
    if (lane == 0) scores[j] = s;
  }
  __syncthreads();

  // maximum and sum: every warp for itself
  float maximum = -INFINITY, total = 0.0f;
  for (int j = lane; j < length; j += 32) maximum = fmaxf(maximum, scores[j]);
  maximum = warp_max(maximum);
  for (int j = lane; j < length; j += 32) total += expf(scores[j] - maximum);
  total = warp_sum(total);

  // accumulate: a thread for each column
  for (int c = threadIdx.x; c < d; c += THREADS) {
    float sum = 0.0f;
    for (int j = 0; j < length; ++j) sum += expf(scores[j] - maximum) * v[(size_t)j * d + c];
    out[c] = length ? sum / total : 0.0f;
  }
}
"""

# %% [markdown]
# Three sequences of different lengths in one cache, one of them empty. What lies behind the end is nan: who reads it
# will notice.

# %%
def random_cache(lengths, heads, capacity, d, seed=5):
    """q, k_cache, v_cache in float32, nan behind the end of each row, and the lengths as int32."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((len(lengths), heads, d)).astype(np.float32)
    k, v = (rng.standard_normal((len(lengths), heads, capacity, d)).astype(np.float32) for _ in range(2))
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = np.nan, np.nan
    return q, k, v, np.array(lengths, np.int32)

def loaded(report, *names):
    """Bytes that a kernel read from the arrays with these names."""
    return sum(row.bytes for row in report.rows if row.kind == "load" and row.array in names)

# %%
heads, capacity, d = 3, 320, 80
q, k, v, lengths = random_cache([300, 0, 45], heads, capacity, d)
expected, out = decode_attention_numpy(q, k, v, lengths), np.full_like(q, -1)
naive = cuda.compile(DECODE_NAIVE)
report = naive.check[3 * heads, 128, 4 * (d + capacity)](q, k, v, lengths, out, capacity, heads, d, d**-0.5)
moved = loaded(report, "q", "k", "v") + report.global_stored
print("problems:", len(report.problems), " agrees with NumPy to 1e-5:", np.abs(out - expected).max() < 1e-5)
print(f"moved {moved:,} bytes, floor {floor(lengths, heads, d):,}")

# %% [markdown]
# Not one byte above the floor. (The lengths come on top: four bytes that all threads of a block read.) So is it a good
# kernel? It has as many blocks as there are heads in the batch. An H100 (SXM) has 132 *multiprocessors*, the units on
# which blocks run, each block on one of them. Where there are more blocks than places, they run in rounds, called
# *waves*.
#
# *Predict.* A model with 32 heads writes an answer for one user. What part of the GPU works? And with 133 rows?

# %%
PROCESSORS = 132
def busy(n_blocks):
    """Share of the GPU at work, for equal blocks, if each multiprocessor takes one at a time: full waves are ideal."""
    return n_blocks / (PROCESSORS * np.ceil(n_blocks / PROCESSORS))

for rows in (8, 32, 132, 133, 256):
    print(f"{rows:3d} rows: {int(np.ceil(rows / PROCESSORS))} wave(s), {busy(rows):4.0%} of the GPU at work")

# %% [markdown]
# A quarter of the GPU, however long the text is. (Or a sixteenth, if the 4 query heads that share a head of keys share
# a block too, as they should, and 8 blocks are left.) Multiprocessors without work ask for no bytes. The floor was
# reached, the bandwidth is not.
#
# ### Split the keys
#
# The heads are few, the keys are many: so let several blocks share the keys of one query. This is *Flash-Decoding*
# (Dao, Haziza, Massa and Sizov, blog post, October 2023; they report up to 8 times faster generation for very long
# sequences).
# **Two blocks have each seen one half of the keys. Can the whole softmax be put together, without the scores?**
#
# In one dimension: six scores, six values, in two halves. Each half has finished its own softmax.

# %%
s, values = np.array([1.0, 2.0, 0.5, 5.0, 4.0, 3.0]), np.array([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
whole = softmax(s) @ values
out_a, out_b = softmax(s[:3]) @ values[:3], softmax(s[3:]) @ values[3:]
print(f"first half {out_a:.3f}, second half {out_b:.3f}, their average {(out_a + out_b) / 2:.3f}, whole {whole:.3f}")

# %% [markdown]
# The average is wrong, because the second half holds the large scores. With $\ell_a = \sum_{j \in a} e^{s_j}$ and
# $\ell_b$ likewise, each half divided by its own sum, and the whole divides by $\ell_a + \ell_b$:
#
# $$o = \frac{\sum_{a} e^{s_j} v_j + \sum_{b} e^{s_j} v_j}{\ell_a + \ell_b}
#     = \frac{\ell_a o_a + \ell_b o_b}{\ell_a + \ell_b}$$
#
# So one number beside the output is enough. Exponentials overflow, therefore it is the log-sum-exp, $\log \ell$, found
# as the maximum plus the logarithm of the shifted sum. The merge is then itself a softmax: the log-sum-exps are its
# scores.

# %%
lse = np.array([np.log(np.exp(s[:3]).sum()), np.log(np.exp(s[3:]).sum())])
shares = softmax(lse)
print(f"log-sum-exps {lse.round(3)}, shares {shares.round(3)}, merged {shares @ [out_a, out_b]:.3f}")
assert np.isclose(shares @ [out_a, out_b], whole)

# %% [markdown]
# Scores can be large, and then single precision is not enough for this one number. *Predict.* Two splits with 128 and
# 16 keys, all scores 0: the first has $128/144$ of the sum. What is its share if all scores are a million?

# %%
for level in (0, 10_000, 100_000, 1_000_000):
    exact = level + np.log([128, 16])
    print(f"scores of {level:9,}: share {softmax(exact.astype(np.float32))[0]:.4f} in single precision, "
          f"{softmax(exact)[0]:.4f} in double")

# %% [markdown]
# At a million the steps of float32 are 1/16, and the logarithm of the sum is rounded to them. So each split hands over
# its log-sum-exp as a double: four bytes more for each split, and one subtraction.
#
# And a split without keys, behind the end of a short row? Its sum is 0, its log-sum-exp $-\infty$, its share
# $e^{-\infty} = 0$. Two traps lie here. If *all* splits are empty, $-\infty - (-\infty)$ is nan. And 0 times nan is
# nan: a share of 0 does not protect from an output that nobody wrote.

# %%
with_empty = np.append(lse, -np.inf)
shares = softmax(with_empty)
print("multiplied:", shares @ [out_a, out_b, np.nan], " left out:", (shares[:2] @ [out_a, out_b]).round(3))

# %% [markdown]
# #### Exercise 5.7: merge the splits  (difficulty 3 of 5, 25 minutes)
#
# The second kernel of Flash-Decoding. One warp, a block of 32 threads, merges all splits of one row. The launch is
# `kernel[rows, 32, 4 * n_splits](outs, lses, out, n_splits, d)`.
#
# | argument | shape | meaning |
# |---|---|---|
# | `outs` | `(rows, n_splits, d)` | each split's output, divided by its sum; anything where its lse is $-\infty$ |
# | `lses` | `(rows, n_splits)`, double | each split's log-sum-exp; $-\infty$ for a split without keys |
# | `out` | `(rows, d)` | the output over all keys; zeros for a row without keys |
# | `n_splits`, `d` | int | at least 1, of any size |
# | `share` | `n_splits` floats | the block's shared memory |
#
# Read each output once, and those of empty splits not at all. `warp_max` and `warp_sum` stand above; every lane must
# call them.
#
# <details><summary>Hint</summary>
#
# First a softmax over the splits, as in `softmax_rows` of lecture 01: lane $l$ has the splits $l$, $l + 32$, ... and
# leaves `expf(lses[s] - top)` in `share`: the difference is a double, its exponential need not be. A `top` of $-\infty$
# is replaced by 0, and a sum of 0 by 1. Then the lanes turn to the columns: lane $l$ has the columns $l$, $l + 32$, ...
# and adds up `share[s]` times `outs[s][c]` over all splits with a share. Between the two a lane needs what other lanes
# have written: `__syncwarp()`.
#
# </details>

# %% tags=["exercise", "export"]
MERGE_SPLITS = WARP + r"""
__global__ void merge_splits(const float* outs, const double* lses, float* out, int n_splits, int d) {
  extern __shared__ float share[];
  // BEGIN SOLUTION
  size_t row = blockIdx.x;
  int lane = threadIdx.x;
  outs += row * n_splits * d, lses += row * n_splits, out += row * d;

  // the share of each split
  float top = -INFINITY, total = 0.0f;
  for (int s = lane; s < n_splits; s += 32) top = fmaxf(top, lses[s]);
  top = warp_max(top);
  if (top == -INFINITY) top = 0.0f;                     // no keys at all: every share is exp(-inf) = 0
  for (int s = lane; s < n_splits; s += 32) {
    share[s] = expf(lses[s] - top);                     // subtracted in double, then rounded
    total += share[s];
  }
  total = warp_sum(total);
  if (total == 0.0f) total = 1.0f;
  __syncwarp();                                         // all shares are there

  // accumulate
  for (int c = lane; c < d; c += 32) {
    float sum = 0.0f;
    for (int s = 0; s < n_splits; ++s)
      if (share[s] != 0.0f) sum += share[s] * outs[(size_t)s * d + c];
    out[c] = sum / total;
  }
  // END SOLUTION
}
"""

# %%
MERGE_SPLITS = check("5.7", MERGE_SPLITS)

# %% [markdown]
# Now the first kernel. A split is a run of 128 keys, and one warp works on it. It takes 32 keys at a time: their
# scores first, one after the other; lane $t$ keeps the score of key $t$. Then one rescaling for all 32 (the online
# softmax of lecture 04), and one round over the values.
#
# How many keys a row has does not matter any more: no shared memory grows with it. The kernel does not know either
# *where* key $j$ lies. It asks `address`, a function that is handed in; that will serve us again.

# %% tags=["export"]
ATTEND_SPLIT = WARP + r"""
#define SPLIT 128                                       // keys of a split
template <typename Address>                             // address(j): where key j begins in k, and value j in v
__device__ void attend_split(const float* q, const float* k, const float* v, float* out, double* lse,
                             int length, int d, float scale, Address address) {
  extern __shared__ float q_row[];                      // the query, then what is summed so far: d floats each
  float *sum = q_row + d, maximum = -INFINITY, total = 0.0f;
  int lane = threadIdx.x, begin = blockIdx.y * SPLIT, end = min(begin + SPLIT, length);
  if (begin >= end) { if (lane == 0) *lse = -INFINITY; return; }            // no keys: the merge will not look at out

  // load
  for (int c = lane; c < d; c += 32) q_row[c] = scale * q[c], sum[c] = 0.0f;

  for (int first = begin; first < end; first += 32) {
    int n = min(32, end - first);
    size_t mine = lane < n ? address(first + lane) : 0;         // each lane looks up one key
    float score = -INFINITY;

    // score: all lanes work on one key, lane t keeps the score of key t
    for (int t = 0; t < n; ++t) {
      const float* key = k + __shfl_sync(0xffffffff, mine, t);
      float s = 0.0f;
      for (int c = lane; c < d; c += 32) s += q_row[c] * key[c];
      s = warp_sum(s);
      if (lane == t) score = s;
    }

    // rescale
    float larger = fmaxf(maximum, warp_max(score)), top = larger == -INFINITY ? 0.0f : larger;
    float weight = expf(score - top), shrink = expf(maximum - top);
    total = total * shrink + warp_sum(weight), maximum = larger;
    for (int c = lane; c < d; c += 32) sum[c] *= shrink;
    // accumulate
    for (int t = 0; t < n; ++t) {
      const float* value = v + __shfl_sync(0xffffffff, mine, t);
      float w = __shfl_sync(0xffffffff, weight, t);
      for (int c = lane; c < d; c += 32) sum[c] += w * value[c];
    }
  }

  // write
  for (int c = lane; c < d; c += 32) out[c] = sum[c] / (total == 0.0f ? 1.0f : total);
  if (lane == 0) *lse = (double)maximum + logf(total);
}
"""

# %% [markdown]
# A lane only touches the columns that are its own, in `q_row` and in `sum` too, so no barrier is needed.
#
# The kernel for a contiguous cache says which query, which split, and where the keys are. `[=](int j) { ... }` is a
# function without a name that knows the variables around it.

# %% tags=["export"]
DECODE_SPLIT = ATTEND_SPLIT + r"""
__global__ void decode_split(const float* q, const float* k, const float* v, const int* lengths, float* outs,
                             double* lses, int capacity, int heads, int d, float scale) {
  size_t row = blockIdx.x, split = row * gridDim.y + blockIdx.y;            // (batch, heads) and their splits
  attend_split(q + row * d, k, v, outs + split * d, lses + split, lengths[row / heads], d, scale,
               [=](int j) { return (row * capacity + j) * d; });
}
"""

# %%
split, merge = cuda.compile(DECODE_SPLIT), cuda.compile(MERGE_SPLITS)
rows, n_splits = 3 * heads, -(-lengths.max() // 128)
outs, lses = np.full((rows, n_splits, d), np.nan, np.float32), np.full((rows, n_splits), np.nan)
first = split.check[(rows, n_splits), 32, 8 * d](q, k, v, lengths, outs, lses, capacity, heads, d, d**-0.5)
second = merge.check[rows, 32, 4 * n_splits](outs, lses, out, n_splits, d)
print("problems:", len(first.problems + second.problems), " agrees to 1e-5:", np.abs(out - expected).max() < 1e-5)
print("splits with keys in each row:", np.isfinite(lses).sum(axis=1).tolist())

# %% [markdown]
# Three splits with keys for each head of the first sequence, none for the second, one for the third. The outputs of
# the other splits are still nan, and nobody has read them.
#
# *Predict.* K and V are read once, as before. What else do the two kernels move?

# %%
keys = 4 * 2 * lengths.sum() * heads * d
used = sum(-(-lengths // 128)) * heads                                       # splits with keys
print(f"K and V    {loaded(first, 'k', 'v'):9,} bytes, formula {keys:9,}")
print(f"queries    {loaded(first, 'q'):9,} bytes, formula {4 * used * d:9,}")
partials = 4 * used * d + 8 * rows * n_splits                                # each output, each log-sum-exp
print(f"partials   {first.global_stored:9,} bytes, formula {partials:9,}, written")
print(f"           {second.global_loaded:9,} bytes, formula {partials + 8 * rows * n_splits:9,}, read")
print(f"output     {second.global_stored:9,} bytes, formula {4 * rows * d:9,}")

# %% [markdown]
# Every K and V once, to the byte, and for each split with keys a query read, an output written and read. (The
# log-sum-exps are read twice, for the maximum and for the shares.) That is $3d$ floats and a little for
# $2 \cdot 128\, d$ floats of keys and values: somewhat more than one per cent.
#
# #### How long should a split be?
#
# Short splits make more blocks and more partials. One row of 8,192 keys with $d = 128$, in a model with 8 heads of
# keys, alone on the GPU:

# %%
n, d, heads = 8192, 128, 8
print("keys of a split   warps   at work   warps on each   extra bytes")
for size in (8192, 2048, 512, 128, 32, 8):
    n_splits = n // size
    extra = (4 * (3 * n_splits - 1) * d + 3 * 8 * n_splits) / (4 * 2 * n * d)
    print(f"{size:15,} {heads * n_splits:7,} {busy(heads * n_splits):9.0%} "
          f"{heads * n_splits / PROCESSORS:15.1f} {extra:13.1%}")

# %% [markdown]
# Splits of 2,048 keys leave most of the GPU idle, splits of 8 cost nearly a fifth more bytes. In between there is room.
# A multiprocessor wants several warps, so that some compute while others wait for memory; 128 keys give it four of
# them here, for about one per cent. Against the number of rows, for the same length:

# %%
rows = np.arange(1, 401)
print(f"with splits, from 20 rows on: at least {busy(rows[19:] * (n // 128)).min():.1%} of the GPU at work")
ax = plotting.curves({"one block a row": busy(rows), "splits of 128 keys": busy(rows * (n // 128))}, x=rows,
                     xlabel="rows: batch times heads of keys", ylabel="share of the GPU at work",
                     title="Split keys fill the GPU from twenty rows on; one block a row falls back again and again")
plotting.show("The share of 132 multiprocessors at work against the number of rows: one block a row climbs to one "
              "at 132, falls to a half at 133, to two thirds at 265 and to three quarters at 397; with splits it "
              "begins at a half and is above 0.9 from 20 rows on.")

# %% [markdown]
# (The picture counts equal blocks, one on each multiprocessor at a time. A real one holds several, which softens the
# teeth; it does not help where there are fewer blocks than multiprocessors.)
#
# A fixed size of the splits has one more merit: the result of a row does not depend on which other rows are in the
# batch, to the last bit. Kernels that choose the number of splits from the batch lose that.

# %% tags=["export"]
SPLIT = 128                                                 # keys of a split, as in ATTEND_SPLIT

# %% tags=["export"]
@functools.cache
def merge_kernel():
    """Compiled on first use."""
    return cuda.compile(MERGE_SPLITS)

@functools.cache
def decode_kernel():
    """Compiled on first use."""
    return cuda.compile(DECODE_SPLIT)

def in_splits(kernel, q, k, v, lengths, scale, *where):
    """Run a kernel on all splits, then the merge. where: the arguments with which the kernel finds a key.

    Returns the output in the kind and float type of q.
    """
    lengths, (batch, heads, d) = whole_numbers("lengths", lengths).astype(np.int32), q.shape
    rows, n_splits = batch * heads, -(-int(lengths.max(initial=0)) // SPLIT)
    q_single, k, v = cuda.on_device(q, k, v)
    out = torch.zeros_like(q_single)
    if out.numel() and n_splits:
        scale = 1 / math.sqrt(d) if scale is None else float(scale)
        outs, lses = out.new_empty(rows, n_splits, d), out.new_empty(rows, n_splits, dtype=torch.float64)
        lengths, *where = (torch.from_numpy(a).to(out.device) if isinstance(a, np.ndarray) else a
                           for a in (lengths, *where))
        kernel.fast[(rows, n_splits), 32, 8 * d](q_single, k, v, lengths, outs, lses, *where, heads, d, scale)
        merge_kernel().fast[rows, 32, 4 * n_splits](outs, lses, out, n_splits, d)
    return cuda.like(out, q)

def decode_attention_cuda(q, k_cache, v_cache, lengths, scale=None):
    """decode_attention_numpy by two CUDA kernels, on splits of 128 keys. Same arguments, shapes and errors.

    NumPy arrays and CPU tensors run on the CPU, CUDA tensors on the GPU; lengths may lie anywhere. Computed in single
    precision, returned in the kind and type of q. Not differentiable. A row's result does not depend on the other rows.
    The cache is read in place only if it is contiguous float32 (pass cache.k and the lengths, not the view that update
    returns); any other is copied whole at each call.
    d_head up to 6,000 and 1.5 million keys with 48 KB of shared memory. Source: Flash-Decoding (Dao et al. 2023).
    """
    check_cache_shape(q, k_cache)
    check_decode_arguments(q, k_cache, v_cache, lengths, k_cache.shape[2])
    return in_splits(decode_kernel(), q, k_cache, v_cache, lengths, scale, k_cache.shape[2])

# %%
worst = 0.0
for lengths, heads, d in (([1], 1, 1), ([0, 0], 2, 7), ([129, 5, 0, 128], 3, 33), ([1000], 2, 256)):
    q, k, v, lengths = random_cache(lengths, heads, 1000, d)
    worst = max(worst, np.abs(decode_attention_cuda(q, k, v, lengths) - decode_attention_numpy(q, k, v, lengths)).max())
print("four odd shapes agree to 1e-5:", worst < 1e-5)

q, k, v, lengths = random_cache([700, 30, 129], 2, 700, 64)
alone = [decode_attention_cuda(q[b:b + 1], k[b:b + 1], v[b:b + 1], lengths[b:b + 1])[0] for b in range(3)]
print("alone and in a batch, to the last bit:", np.array_equal(decode_attention_cuda(q, k, v, lengths), alone))
print("scores of 1e6, no nan:", np.isfinite(decode_attention_cuda(1e6 * q, k, v, lengths)).all())

# %% [markdown]
# ### Through a block table
#
# A paged cache keeps its tokens in pages of `(page_size, heads, d_head)`, wherever one was free, and `block_table` has
# a line of page numbers for each row. Gathering the pages first would read the whole cache, write it, and read it
# again: three times the floor. But the kernel only asks where key $j$ begins. **Can the answer come out of a table?**
#
# #### Exercise 5.8: where is key j?  (difficulty 2 of 5, 15 minutes)
#
# | argument | shape | meaning |
# |---|---|---|
# | `block_table` | `(batch, columns)` | the pages of each row, in order; $-1$ behind its last page |
# | `columns` | int | entries in a line of the table |
# | `b`, `h`, `j` | int | which row, which head, which token of the row: 0, 1, 2 ... |
# | `page_size`, `heads`, `d` | int | pages are `(n_pages, page_size, heads, d)` |
#
# Returns the number of floats that lie before key $j$ of head $h$ of row $b$ in `k_pages`. (For its value in `v_pages`
# it is the same number.) A cache may hold more than $2^{31}$ floats: multiply in `size_t`.
#
# <details><summary>Hint</summary>
#
# Token $j$ is in the row's page number `j / page_size`, counted from 0, at slot `j % page_size`. The line of row
# $b$ begins at `b * columns`. Then read the shape of the pages from left to right: page, slot, head.
#
# </details>

# %% tags=["exercise", "export"]
KEY_OFFSET = r"""
__device__ size_t key_offset(const int* block_table, int columns, int b, int h, int j,
                             int page_size, int heads, int d) {
  // BEGIN SOLUTION
  size_t page = block_table[(size_t)b * columns + j / page_size];
  return ((page * page_size + j % page_size) * heads + h) * d;
  // END SOLUTION
}
"""

# %%
KEY_OFFSET = check("5.8", KEY_OFFSET)

# %% [markdown]
# The rest of the kernel is the one from above. Each lane looks up one key, and the lookup serves key and value, so the
# table costs four bytes for each key and head.

# %% tags=["export"]
PAGED_SPLIT = ATTEND_SPLIT + KEY_OFFSET + r"""
__global__ void paged_split(const float* q, const float* k, const float* v, const int* lengths, float* outs,
                            double* lses, const int* block_table, int columns, int page_size, int heads, int d,
                            float scale) {
  size_t row = blockIdx.x, split = row * gridDim.y + blockIdx.y;
  int b = row / heads, h = row % heads;
  attend_split(q + row * d, k, v, outs + split * d, lses + split, lengths[b], d, scale,
               [=](int j) { return key_offset(block_table, columns, b, h, j, page_size, heads, d); });
}
"""

# %% [markdown]
# A contiguous cache, cut into pages, and the pages shuffled. Those that nobody uses are full of nan, and so is the end
# of each last page.

# %%
def paged(cache, lengths, page_size, n_pages, order):
    """Pages (n_pages, page_size, heads, d) and a block table with the rows of a cache, in the given order of pages."""
    pages = np.full((n_pages, page_size, cache.shape[1], cache.shape[3]), np.nan, np.float32)
    table, free = np.full((len(lengths), -(-max(lengths) // page_size)), -1, np.int32), iter(order)
    for b, n in enumerate(lengths):
        for column in range(-(-n // page_size)):
            here = cache[b, :, column * page_size:min(n, (column + 1) * page_size)]
            table[b, column] = next(free)
            pages[table[b, column], :here.shape[1]] = here.swapaxes(0, 1)
    return pages, table

q, k, v, lengths = random_cache([37, 0, 9], 3, 48, 80)
order = np.random.default_rng(0).permutation(8)
k_pages, table = paged(k, lengths, 8, 8, order)
v_pages, _ = paged(v, lengths, 8, 8, order)
print(table)

# %%
through_table = cuda.compile(PAGED_SPLIT)
outs, lses, out = np.zeros((9, 1, 80), np.float32), np.zeros((9, 1)), np.zeros_like(q)
report = through_table.check[(9, 1), 32, 8 * 80](q, k_pages, v_pages, lengths, outs, lses, table, table.shape[1], 8,
                                                 3, 80, 80**-0.5)
merge.check[9, 32, 4](outs, lses, out, 1, 80)
expected = decode_attention_numpy(q, k, v, lengths)
print("problems:", len(report.problems), " agrees to 1e-5:", np.abs(out - expected).max() < 1e-5)
print(f"K and V {loaded(report, 'k', 'v'):,} bytes, formula {4 * 2 * lengths.sum() * 3 * 80:,}")
print(f"table   {loaded(report, 'block_table'):7,} bytes, formula {4 * lengths.sum() * 3:7,}")

# %% [markdown]
# #### Do pages cost coalescing?
#
# In the contiguous cache the keys of one head lie one behind the other. In a page the same token of the *other heads*
# lies between them. And pages lie anywhere. *Predict.* How many sectors too many does a request fetch, for pages of 1,
# 16 and 64 tokens?
#
# Beside it stands a kernel that many would write first: each lane computes the score of its own key, without shuffles.

# %%
LANE_A_KEY = PAGED_SPLIT.replace("""    for (int t = 0; t < n; ++t) {
      const float* key = k + __shfl_sync(0xffffffff, mine, t);
      float s = 0.0f;
      for (int c = lane; c < d; c += 32) s += q_row[c] * key[c];
      s = warp_sum(s);
      if (lane == t) score = s;
    }
""", """    __syncwarp();                                       // a lane needs the whole query now
    float own = 0.0f;
    for (int c = 0; c < d && lane < n; ++c) own += q_row[c] * k[mine + c];
    if (lane < n) score = own;
""")
lane_a_key = cuda.compile(LANE_A_KEY)

# %%
def key_sectors(kernel, d, page_size, n=128, heads=2):
    """For one row of n keys: sectors that a request for keys fetches, and how many times too many these are."""
    q, k, v, lengths = random_cache([n], heads, n, d)
    order = np.random.default_rng(1).permutation(n // page_size)
    pages, table = paged(k, lengths, page_size, len(order), order)
    outs, lses = np.zeros((heads, 1, d), np.float32), np.zeros((heads, 1))
    report = kernel.check[(heads, 1), 32, 8 * d](q, pages, pages.copy(), lengths, outs, lses, table, table.shape[1],
                                                 page_size, heads, d, d**-0.5)
    assert report.ok, report.problems
    (row,) = [row for row in report.rows if row.kind == "load" and row.array == "k"]
    return row.sectors / row.requests, row.sectors / row.ideal_sectors

print("          a warp for each key, pages of        a lane for each key")
print("d_head     1 token   16 tokens   64 tokens      pages of 16")
for d in (32, 64, 80, 128):
    per_request, wasted = zip(*(key_sectors(through_table, d, size) for size in (1, 16, 64)))
    lane_sectors, lane_wasted = key_sectors(lane_a_key, d, 16)
    print(f"{d:6d} " + "".join(f"{p:6.1f} ({w:.0f}x)" for p, w in zip(per_request, wasted))
          + f"   {lane_sectors:12.1f} ({lane_wasted:.0f}x)")

# %% [markdown]
# None, for any page size. A request reads neighbouring numbers of *one* key, and these are together in both layouts:
# with $d$ a multiple of 8 each key fills whole sectors. (At $d = 80$ the third request has 16 lanes at work, therefore
# 3.3.) A lane for each key looks simpler and fetches eight sectors for one; the GPU's L1 cache may keep the other seven
# eighths until they are used, or it may not. The price of a page lies elsewhere: in the table, and in the empty slots
# of the last page.
#
# What real kernels do beyond this one: they read half precision as it is stored, two or eight numbers at a time, and
# give all the query heads that share a head of keys to one block.

# %% tags=["export"]
@functools.cache
def paged_kernel():
    """Compiled on first use."""
    return cuda.compile(PAGED_SPLIT)

def paged_decode_attention_cuda(q, k_pages, v_pages, block_table, lengths, scale=None):
    """paged_decode_attention_numpy by two CUDA kernels: no page is copied. Same arguments, shapes and errors.

    Arrays, tensors, types and limits as in decode_attention_cuda; block_table may lie anywhere. Entries behind a row's
    last page are not read.
    """
    table = whole_numbers("block_table", block_table).astype(np.int32)
    check_paged_arguments(q, k_pages, v_pages, table, lengths)
    return in_splits(paged_kernel(), q, k_pages, v_pages, lengths, scale, table, table.shape[1], k_pages.shape[1])

# %%
q, k, v, lengths = random_cache([700, 0, 129, 16], 2, 700, 64)
contiguous = decode_attention_cuda(q, k, v, lengths)
for page_size in (1, 16, 50):
    order = np.random.default_rng(page_size).permutation(sum(-(-lengths // page_size)))
    (k_pages, table), (v_pages, _) = (paged(cache, lengths, page_size, len(order), order) for cache in (k, v))
    out = paged_decode_attention_cuda(q, k_pages, v_pages, table, lengths)
    print(f"pages of {page_size:2d}: equal to the contiguous cache, to the last bit: {np.array_equal(out, contiguous)}")

# %% [markdown]
# ### What is left to win?
#
# The kernel reads no byte twice, and each multiprocessor has a block. That does not make it fast yet: by Little's law
# 3.35 TB/s at a latency of some 700 ns (an assumption) need 18 KB in flight on each multiprocessor, and four warps whose
# lanes wait for 16 bytes each have 2 KB. Real kernels load several tiles ahead.
#
# How long must a step of decoding take, for a model of the shape of Llama 3.1 8B (32 layers, 8 heads of keys,
# $d = 128$, 8.0 billion weights, all in bfloat16), if only memory counts? The weights are read once for the whole batch,
# the cache once for each of its sequences.

# %%
BANDWIDTH = 3.35e12                                                          # H100 SXM, bytes in a second
print("batch   context   weights, ms   cache, ms   tokens in a second, at most   fits into 80 GB")
for batch, n in ((1, 1024), (1, 131_072), (64, 1024), (64, 4096), (64, 8192)):
    weights, cache = 2 * 8.0e9, batch * n * 2 * 32 * 8 * 128 * 2
    at_most = batch / ((weights + cache) / BANDWIDTH)
    print(f"{batch:5d} {n:9,} {1e3 * weights / BANDWIDTH:13.1f} {1e3 * cache / BANDWIDTH:11.1f} {at_most:29,.0f}   "
          f"{'yes' if weights + cache < 80e9 else 'no'}: {(weights + cache) / 1e9:.1f} GB")

# %% [markdown]
# The weights cost the same for 64 sequences as for one; the cache does not, and soon it is most of the bytes. No kernel
# changes that. What does: fewer bits for each number, fewer tokens, fewer heads of keys (lecture 08), a small latent
# vector in their place (lecture 09).

# %% [markdown]
# ## Traps
#
# Each of these stands in slides, glossaries or well-known tutorials. Decide what is wrong before you open the answer;
# the cell below it shows it in numbers.
#
# ### "Llama 3 70B needs 20.97 GB for the cache of 8 sequences of 1,000 tokens"
#
# *Which number was put into a right formula?*
#
# <details><summary>Answer</summary>
#
# 64, the number of query heads. What is cached are the 8 key-value heads: 2.62 GB. An easy slip, because the number of
# query heads is the one that every summary names.
#
# </details>

# %%
for n_kv_heads in (64, 8):
    print(f"{n_kv_heads:2d} heads cached: {cache_bytes(80, n_kv_heads, 128, 1000, 8) / 1e9:5.2f} GB, "
          f"{cache_bytes(80, n_kv_heads, 128, 1) // 1024:,} KiB a token")

# %% [markdown]
# ### "KV caching: memory savings through reuse"
#
# *What is saved, and what is spent?*
#
# <details><summary>Answer</summary>
#
# Computation is saved, memory is spent. Without a cache a decoder needs the keys of one layer at a time and forgets
# them; with it, those of all layers stay. "Memory savings" belong to what makes the *cache* smaller: fewer heads, fewer
# bits, fewer tokens, a latent vector.
#
# </details>

# %%
one_layer, all_layers = cache_bytes(1, 8, 128, 8000), cache_bytes(80, 8, 128, 8000)
print("Llama 3 70B, 8,000 tokens: "
      f"keys and values of one layer {one_layer / 1e9:.2f} GB, kept for all {all_layers / 1e9:.2f} GB")

# %% [markdown]
# ### "Attention is memory-bound, primarily because of the KV cache"
#
# *When is there a cache at all? And what is read when there is none?*
#
# <details><summary>Answer</summary>
#
# Two effects under one name. In training and prefill there is nothing to stream from a cache; what costs bandwidth is
# the $n \times n$ matrix of scores, if it is written to memory, and FlashAttention (lecture 06) cures that. In decode
# there is one row of scores for each head; what costs bandwidth is the cache itself, and grouped heads, latents and
# fewer bits cure that. FlashAttention alone does not make the cache smaller by one byte.
#
# </details>

# %%
n, d, n_bytes = 8000, 128, 2                       # one head, half precision; each matrix of scores written and read
prefill = {"scores": 2 * n * n * n_bytes, "keys and values": 2 * n * d * n_bytes}
decode_one = {"scores": 2 * n * n_bytes, "keys and values": 2 * n * d * n_bytes}
for name, moved in (("prefill", prefill), ("decode of one token", decode_one)):
    print(f"{name:20s}" + ", ".join(f"{what} {100 * b / sum(moved.values()):3.0f} %" for what, b in moved.items()))

# %% [markdown]
# ### "PagedAttention gives a 2 to 4 times larger batch"
#
# *Of what did the paper claim 2 to 4 times?*
#
# <details><summary>Answer</summary>
#
# Of throughput, at the same latency, against the systems of its time. How many more requests fit is another number: it
# is the ratio of the shares of memory in use, which depends on the lengths of the requests. In our simulation it is
# larger than 4. Throughput grows less than the batch, because each text's cache has to be read (section 5.6).
#
# </details>

# %%
in_pages, reserved = share_used(lambda held: -(-held // 16) * 16), share_used(lambda held: 2048)
print(f"requests that fit, pages of 16 against 2,048 places each: {in_pages / reserved:.1f} times as many")

# %% [markdown]
# ### "GQA, FlashAttention and the KV cache: three ways to make attention faster"
#
# *They are taught in this order here: cache (05), Flash (06), grouped heads (08), latents (09). Which of them needs
# which, and which of the two phases does each help?*
#
# <details><summary>Answer</summary>
#
# The cache comes first: without it there is nothing for grouped heads or latents to make smaller. But the numbers of
# this lecture's calculator need 08 already, so they are forward references, and said to be. Lecture 09 also needs RoPE
# (03), since a latent cannot be rotated. And they help different phases:
#
# | | prefill | decode |
# |---|---|---|
# | KV cache (05) | nothing | one power of $n$ |
# | FlashAttention (06) | bytes of the scores | little: only the split over keys (part 5) |
# | grouped heads (08), latents (09) | little | bytes of the cache |
#
# </details>

# %% [markdown]
# ## Going further
#
# ### Failure modes of long contexts
#
# Four are usually listed: sinks, positions beyond the training length, scores that blow up, and "attention becomes
# uniform". **Which of them can be seen here?** Sinks have their own section in part 3. Positions: our model has read
# at most 128 characters.

# %%
starts = torch.linspace(0, len(held_out) - 513, 24).long()
long_ids = held_out[starts[:, None] + torch.arange(513)]
with torch.no_grad():
    per_token = F.cross_entropy(model(long_ids[:, :-1]).mT, long_ids[:, 1:], reduction="none")
stretches = per_token.mean(0).unflatten(0, (8, 64)).mean(1)
print("characters 64 to 128 (trained): below 2 nats:        ", bool(stretches[1] < 2))
print("characters 448 to 512 (never seen): more than 0.5 worse:", bool(stretches[7] > stretches[1] + 0.5))

# %% [markdown]
# A cache lets the text go on; it does not teach the model to read it. Lecture 03 has the cures.
#
# Blow-up: nothing bounds a score, and half precision ends at 65,504. How large may the entries of a query and a key of
# 128 channels be?

# %%
for size in (8, 22, 23):
    dot = np.float32(128 * size * size)
    with np.errstate(over="ignore"):
        print(f"all entries {size:2d}: score {dot:9,.0f} before the scale, in half precision {np.float16(dot)}")

# %% [markdown]
# Entries of 23 in all channels are too much, before the scale is applied.
#
# "In long contexts attention becomes uniform." **Does it?** One key fits better than the others by a gap $g$. Its
# weight among $n$ keys is $e^g / (e^g + n - 1)$.

# %%
for n in (100, 10_000, 1_000_000):
    print(f"{n:9,} keys: weight of the fitting one at gap 5: {math.exp(5) / (math.exp(5) + n - 1):.4f}, "
          f"gap needed for one half: {math.log(n - 1):.1f}")

# %% [markdown]
# With a fixed gap the weight is diluted in proportion to $1/n$. That is not the same as uniform, and not a law: a gap
# that grows as $\ln n$ is enough to hold one half, and most heads of our model are far from uniform at 512 characters,
# four times the trained length. Measured as the number of keys that a uniform head of the same entropy would look at:

# %%
with torch.no_grad(), record(model, names=("weights",)) as seen:
    model(long_ids[:4, :512])
weights = torch.stack(list(seen.values()))                              # (layers, batch, heads, queries, keys)
entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean(1)   # (layers, heads, queries)
effective = entropy.exp()[..., -64:].mean(-1).flatten()
print("last 64 queries of 512: heads that look at fewer than 200 of about 480 keys, in effect:",
      f"{int((effective < 200).sum())} of {len(effective)}")

# %% [markdown]
# ## Glossary
#
# The first line of each one's own description. If a definition changes in the code, it changes here.

# %%
import inspect

from IPython.display import Markdown

from attention import kv_cache

terms = {"KV cache": "KVCache", "ring": "RingKVCache", "page pool": "PagePool", "paged cache": "PagedKVCache",
         "left padding": "left_padding", "decode attention": "decode_attention_numpy", "beam search": "beam_search",
         "speculation": "generate_speculative", "sinks and a window": "SinkKVCache", "heavy hitters": "keep_heavy",
         "votes": "keep_voted", "quantised cache": "QuantizedKVCache", "slim attention": "values_from_keys",
         "decode in splits": "decode_attention_cuda"}
rows = ["| term | in the code | what it is |", "|---|---|---|"]
rows += [f"| {term} | `{name}` | {inspect.getdoc(getattr(kv_cache, name)).splitlines()[0]} |"
         for term, name in terms.items()]
Markdown("\n".join(rows))

# %% [markdown]
# *Prefill* is the pass over the prompt, *decode* the passes that add one token each. A *block table* lists the pages of
# a text; *copy on write* means that a shared page is copied when one of its readers writes. A *policy* says which keys
# stay. A *sink* is a key that many queries look at and that hands over little.
#
# ## Summary
#
# - A causal model never changes what it has computed of a token. Keys and values are kept, queries are not needed
#   again.
# - The cache spends $2 \cdot \text{layers} \cdot \text{kv heads} \cdot d_\text{head}$ numbers for each token and
#   saves one power of $n$ in operations.
# - Preallocated, ring, paged: the same numbers at different places. Pages waste half a page a text, and can be shared.
# - New tokens come one by one, in chunks, as guesses: the causal mask is aligned at the bottom right. Positions count
#   real tokens, and go on where the cache ends. What changes the order of the rows changes it in the cache.
# - Test a cache in chunks, after a rewind, in a ragged batch and with beams, and with absolute positions as well.
# - Prefill is limited by arithmetic, decode by the bytes of weights and cache. A batch shares the weights, not the
#   cache.
# - A sink is where a head puts the weight that it does not want to use; a null key can take its place. A fixed cache
#   reads on if positions are counted inside it. A policy that evicts is as good as its guess about the next question.
# - 4 bits with a group of 32 are 5 bits. Keys with large channels are quantised per channel. Slim attention rebuilds V
#   from K as exactly as $W_K$ is well conditioned.
# - In a model of 135 million parameters token 0 is the sink of most heads from layer 12 on, and one number makes it one;
#   keys have large channels, and 2 bits per channel cost far less than 2 bits per token.
# - Decode is split over the keys, so that all multiprocessors work, and merged by log-sum-exp. A block table changes
#   where a key is, and nothing else.
#
# **Exercises left.**
#
# 1. `RingKVCache` takes one token at a time. Let it take a chunk, and return what a window mask then needs.
# 2. `PagedKVCache` copies all keys at each step (`_gather`). Give `MultiHeadAttention` a decode path that calls
#    `paged_decode_attention_torch` instead.
# 3. Two prompts begin with the same 60 tokens. Let the second find the pages of the first by the tokens they hold.
# 4. Let `beam_search` use `PagedKVCache.fork`. How many pages does a step copy?
#
# **Sources.** Leviathan, Kalman, Matias 2022 (arXiv 2211.17192) · Zhang et al. 2023, H2O (2306.14048) · Agrawal et al.
# 2023 (2308.16369) and 2024 (2403.02310) · Kwon et al. 2023, PagedAttention (2309.06180) · Xiao et al. 2023,
# StreamingLLM (2309.17453) · Dao, Haziza, Massa, Sizov 2023, Flash-Decoding (blog post) · Liu et al. 2024, KIVI
# (2402.02750) · Li et al. 2024, SnapKV (2404.14469) · Guo et al. 2024 (2410.13835) · Graef, Wasielewski 2025, slim
# attention (2503.05840).
