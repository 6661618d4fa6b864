# ---
# jupyter:
#   course:
#     edition: 2
#     experiments:
#     - copying_texts
#     - is_trigger
#     - train_copier
#     - look_at_sink
#     - sink_and_stream
#     - loss_with_entry
#     - passkey
#     - read_and_choose
#     - loss_after
#     - look_up
#     - schedule
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

# %% [markdown] tags=["slide"]
# # Lecture 05 · KV cache
#
# **The question.** A model writes one token at a time, and each token looks at everything before it. How much of that is
# computed twice? **You will be able to** *write* a step with a cache, the cache and the loop around it (5A to 5C), *find*
# the bugs of such code (5D), *read* keys through a block table (5E), *verify* guesses (5F), *choose* what to keep (5G),
# *merge* splits on a GPU (5H). **You need** masks and modules (lecture 01), heads (lecture 02), rotations (lecture 03).
#
# | part or section | core minutes | more minutes |
# |---|---|---|
# | Part 1 · the question: 5.1, 5.2, exercise 5A | 38 | |
# | Part 2 · a cache at work: 5.3, 5.4, exercises 5B, 5C | 62 | |
# | The bugs: 5.5, exercise 5D | 30 | |
# | Part 3 · what it costs: 5.6 | 10 | |
# | Part 4 · what it may forget: 5.7 to 5.10 | 20 | |
# | Part 5 · CUDA: 5.11, 5.12 | 20 | |
# | Another day: exercises 5E to 5H | | 70 |
# | Going further: 5.13 to 5.22 | | 90 |
# | **together** | **180** | **160** |

# %% [markdown] tags=["teacher"]
# **For the teacher: two times 50 minutes.** Run everything before class; part 4 needs the language model.
#
# - *Hour 1 (40).* 5.1: the two writings, tokens a second, three tokens by hand (12) · 5.2: the table, ask who is right about
#   20.97 GB (8) · 5.3: cache and ring, pages, copy on write (12) · 5.4: the time axis, the two masks (6) · say what 5A, 5B
#   and 5C ask (2).
# - *At home after hour 1.* 5A, 5B, 5C.
# - *Hour 2 (40).* 5.5: bet on the four bugs before the cell is run (8) · 5.6: what limits prefill and decode (6) · 5.7: one
#   number of 221,184 (7) · 5.8: three curves (4) · 5.9: who gets the credit, sink or policy (6) · 5.10: columns of keys
#   (4) · 5.11: the block table's look-up, idle processors (5).
# - *At home after hour 2.* 5D. For volunteers 5E.
# - *Board.* The table of three tokens: keys $\ln 1, \ln 2, \ln 3$, values 6, 3, 1, and what each token finds: 6, 4, 2.5.
# - *Always works.* In 5.7 let the class choose a number of token 0 that is set to 0: nothing happens, until it is 507.
# - *Checkpoint 1.* Three new tokens join five cached ones: how many keys does the first of the three see? (6.)
#   *Checkpoint 2.* A batch twice as large: twice as many bytes of what are read, weights or caches? (Caches.)
# - *Skip first.* The waiting of 5.6 (3), then the ragged batch of 5.3 (3): both read well at home.
# - *Questions that come.* Why are queries not kept? Nobody asks an old query again. Can an encoder have a cache? See 5.1.

# %%
import json
import math
import os
import sys

sys.path.insert(0, "." if os.path.exists("course.py") else "..")

import numpy as np
import torch
from torch import nn

from utils import data, plotting
from utils.check import check

torch.set_num_threads(1)  # tiny models: one thread is fastest

# %% [markdown]
# ## Part 1 · The question
#
# SmolLM2 continues seven tokens by twelve. For each of them it reads the whole text again.
#
# *Predict.* How many times is a token read in all?

# %% tags=["language-model", "slide"]
from utils import language_model

smollm = language_model.load()
if smollm:
    writer = smollm.replace(last_only=True)  # logits of the last token only
    text, n_read = smollm.encode("The sun rises in the east and"), 0
    with torch.no_grad():
        for _ in range(12):
            n_read += text.shape[1]
            newest = writer(text)[:, -1:].argmax(-1)
            text = torch.cat([text, newest], dim=1)
    print(smollm.decode(text).replace("\n", " "))
    print(f"{text.shape[1] - 1} tokens had to be read, and {n_read} were")

# %% [markdown]
# 150 times, for 18 tokens. Each reading computes a key and a value of the token in every layer. **Are they the same each
# time?** Then they can be kept. `caches` has a list of keys and values for each layer, and only the newest token is read.

# %% tags=["language-model"]
if smollm:
    caches, again, n_cached = smollm.new_caches(), text[:, :7], 0
    unread = again
    with torch.no_grad():
        for _ in range(12):
            n_cached += unread.shape[1]
            unread = writer(unread, caches=caches)[:, -1:].argmax(-1)
            again = torch.cat([again, unread], dim=1)
    print(f"tokens read: {n_cached} ({n_read} before), "
          f"the same text: {torch.equal(again, text)}")

# %% [markdown]
# The same text for 18 readings. And in a longer one? Nothing is timed here: the numbers are **recorded**, on one thread of a
# processor, in two sessions, one of them on a machine that had other work to do (`python -m data.recorded.lecture_05` makes
# your own). Another machine has other numbers, and lines of the same shape.

# %% tags=["slide"]
recorded = json.loads((data.FOLDER / "recorded" / "lecture_05.json").read_text())
speed = recorded["tokens_a_second"]
lengths = np.array(speed["n"])
rates = {name: np.array(speed[name]) for name in ("with a cache", "without a cache")}
for i in (0, -1):
    print(f"{lengths[i]:5,} tokens in the text: " + ", ".join(
        f"{name} {rate[i]:.1f} a second" for name, rate in rates.items()))
ax = plotting.curves(rates, x=lengths, xlabel="tokens in the text", log_y=True,
                     ylabel="tokens a second", title="Without a cache SmolLM2 gets "
                     "slower with every token; with one, far less")
ax.set_xscale("log", base=2)
plotting.show("Tokens a second against the length of the text, both logarithmic: with "
              "a cache nearly level, without one a straight line that falls.")

# %% [markdown] tags=["slide"]
# ### 5.1 The core concept of the KV cache
#
# **What does a step look like, when everything old is kept?** By hand: one head of size 1, every query is 1, the keys are
# $\ln 1, \ln 2, \ln 3$, so that $e^{\text{score}}$ is 1, 2, 3. The values are 6, 3, 1.
#
# $$o_1 = 6 \qquad o_2 = \frac{1 \cdot 6 + 2 \cdot 3}{1 + 2} = 4 \qquad
#   o_3 = \frac{1 \cdot 6 + 2 \cdot 3 + 3 \cdot 1}{1 + 2 + 3} = 2.5$$
#
# *Predict.* What has to be stored after step 2 to compute step 3?

# %% tags=["first-attention", "slide"]
ln_keys, three_values = np.log([1.0, 2.0, 3.0]), np.array([6.0, 3.0, 1.0])
kept_k, kept_v = [], []  # the cache
for k, v in zip(ln_keys, three_values):
    kept_k.append(k)
    kept_v.append(v)
    weights = np.exp(1.0 * np.array(kept_k))
    print(f"step {len(kept_k)}: {weights @ np.array(kept_v) / weights.sum():.1f}")

# %% [markdown]
# Keys and values, no query: nobody asks an old query again. **The 2.5** will come back from every cache of this lecture.
#
# Why may they be kept? Because nothing that comes later changes them. *Predict.* Two layers, then one token more. By how much
# does what the second layer reads of the first eight tokens move, with causal attention, and with attention that looks both ways?

# %%
from attention.multi_head import MultiHeadAttention, TransformerConfig, TransformerLM
from utils import training

draw = np.random.default_rng(1)
layer = training.initialise(MultiHeadAttention(16, 2).double(), seed=2)
nine = torch.from_numpy(draw.standard_normal((1, 9, 16)))
with torch.no_grad():
    for name, causal in (("causal", True), ("both ways", False)):
        before, after = (x + layer(x, causal=causal) for x in (nine[:, :8], nine))
        print(f"{name:15s} moved by {(after[:, :8] - before).abs().max():.2f}")

# %% [markdown]
# An encoder that looks both ways has no cache: each new token changes all the others. **Trap.** *"A KV cache belongs to causal
# attention."* It belongs wherever nothing later changes the keys: in cross-attention, too, whose source was read in full before
# the first token was written. Whisper keeps those of its encoder.
#
# #### Exercise 5A: one step with a cache  (difficulty 2 of 5, essential, 12 minutes)
#
# One head. New tokens join those that are cached: one when the model writes, many when it reads a prompt. A new token sees the
# cache, the new ones before it, and itself.
#
# |argument|shape|meaning|
# |---|---|---|
# |`x`|`(n_new, d_model)`|the new tokens|
# |`keys`, `values`|`(n_old, d_head)`, `(n_old, d_v)`|the cache; `n_old` may be 0|
# |`w_q`, `w_k`|`(d_model, d_head)`|projections|
# |`w_v`|`(d_model, d_v)`|projection|
#
# Returns `(out, keys, values)`: what the new tokens found, `(n_new, d_v)`, and the cache with them in it. The scale is
# $1/\sqrt{d_\text{head}}$.
#
# <details><summary>Hint</summary>
#
# What of `x` goes behind the old keys, and before or after anybody looks? `attention_numpy(q, k, v, causal=True)` of lecture
# 01 is at hand: which key does its last query see last?
#
# </details>

# %%
from attention.fundamentals import attention_numpy, causal_mask, softmax

# %% tags=["exercise", "export"] kind="numpy"
def cached_step(x, keys, values, w_q, w_k, w_v):
    """New tokens x (n_new, d_model) join a cache of one head and attend to it.

    keys (n_old, d_head), values (n_old, d_v), w_q, w_k (d_model, d_head), w_v (d_model,
    d_v). Returns out (n_new, d_v), and keys and values with n_old + n_new rows.
    """
    ### BEGIN SOLUTION
    keys = np.concatenate([keys, x @ w_k])
    values = np.concatenate([values, x @ w_v])
    return attention_numpy(x @ w_q, keys, values, causal=True), keys, values
    ### END SOLUTION

# %%
cached_step = check("5A", cached_step)

# %% [markdown]
# The three tokens once more: columns of `x` are query, key and value, and each matrix picks one. At once, one by one, and as
# 2 + 1:

# %%
x = np.stack([np.ones(3), ln_keys, three_values], axis=1)
pick = [np.eye(3)[:, [i]] for i in range(3)]  # w_q, w_k, w_v
for sizes in ([3], [1, 1, 1], [2, 1]):
    memory, found = (np.empty((0, 1)), np.empty((0, 1))), []
    for chunk in np.split(x, np.cumsum(sizes)[:-1]):
        out, *memory = cached_step(chunk, *memory, *pick)
        found += out[:, 0].tolist()
    print(f"in {len(sizes)} steps of {sizes}: ", *(f"{o:.1f}" for o in found))

# %%
old_k, old_v = draw.standard_normal((2, 5, 4))
x_new = draw.standard_normal((2, 6))
w_q, w_k, w_v = draw.standard_normal((3, 6, 4))
out, all_k, all_v = cached_step(x_new, old_k, old_v, w_q, w_k, w_v)
q, scores = x_new @ w_q, x_new @ w_q @ all_k.T / 2
plotting.flow(
    {"cached keys": old_k, "x": x_new, "cached values": old_v, "keys": all_k, "q": q,
     "values": all_v, "weights": softmax(np.where(causal_mask(2, 7), scores, -np.inf)),
     "out": out},
    [(("cached keys", "x"), "keys", "append\nx W_K"), ("x", "q", "x W_Q"),
     (("cached values", "x"), "values", "append\nx W_V"),
     (("q", "keys"), "weights", "softmax\nq kᵀ / √d"),
     (("weights", "values"), "out", "· v")],
    title="New tokens are projected, old ones are only read")
plotting.show("Data flow: two new tokens are projected to queries, keys and values; "
              "keys and values join five cached ones; weights of two by seven mix the "
              "values.")

# %% [markdown]
# ### 5.2 The mathematics of its memory
#
# **What does the cache cost?** For each token, in each layer, a key and a value for each *key-value head*:
#
# $$\text{bytes} = 2 \cdot \text{layers} \cdot \text{kv heads} \cdot d_\text{head} \cdot \text{tokens} \cdot \text{texts}
# \cdot \text{bytes of a number}$$
#
# Several query heads may share one key-value head (lecture 08); here that is only a number. *Predict.* A slide computes
# "Llama 3 70B, 64 heads, 8 texts of 1,000 tokens: 20.97 GB". Is it right?

# %% tags=["slide"]
def cache_bytes(n_layers, n_kv_heads, d_head, n_tokens, n_texts=1, n_bytes=2):
    return 2 * n_layers * n_kv_heads * d_head * n_tokens * n_texts * n_bytes

models = {  # layers, key-value heads, width of a head, weights, as published
    "GPT-2": (12, 12, 64, 124_439_808), "SmolLM2 135M": (30, 3, 64, 134_515_008),
    "Llama 2 7B": (32, 32, 128, 6_738_415_616),
    "Llama 3.1 8B": (32, 8, 128, 8_030_261_248),
    "Llama 3 70B": (80, 8, 128, 70_553_706_496)}
for name, (*sizes, n_weights) in models.items():
    token = cache_bytes(*sizes, n_tokens=1)
    print(f"{name:12s} {token / 1024:4.0f} KiB a token, 8 texts of 1,000: "
          f"{token * 8e-6:5.2f} GB; like the weights at {2 * n_weights // token:,}")
print(f"Llama 3 70B with 64 heads: {cache_bytes(80, 64, 128, 1000, 8) / 1e9:.2f} GB")

# %% [markdown]
# The arithmetic is right and the model is not: 64 heads *ask*, 8 are cached, 2.62 GB. Llama 2 7B needs more for a token than
# Llama 3 70B.
#
# **Trap.** *"KV caching: memory savings through reuse."* It **spends** memory and saves computation. How much?
# `forward_flops` (Behind the scenes) counts operations without doing them, so lengths may be larger than any computer would
# finish. (A test compares it with PyTorch's own counter.)
#
# *Predict.* By which power of the length do the operations of a whole text grow, with a cache and without?

# %%
from attention.kv_cache import forward_flops

sizes = dict(d_model=576, d_ff=1536, n_layers=30, vocab_size=49_152)
t = np.arange(1, 2**17 + 1)  # the length when token t is written
at = 2 ** np.arange(7, 18, 2)
whole = {"with a cache": forward_flops(np.ones_like(t), t, **sizes).cumsum()[at - 1],
         "without a cache": forward_flops(t, t, **sizes).astype(float).cumsum()[at - 1]}
for name, y in whole.items():
    short, long = (np.log(y[i + 1] / y[i]) / np.log(4) for i in (0, -2))
    print(f"{name:16s} n^{short:.1f} from 128 to 512 tokens, n^{long:.1f} at the end")
ax = plotting.curves(whole, x=at, xlabel="tokens in the text", log_y=True,
                     ylabel="operations, whole text",
                     title="Without a cache a text costs one power of its length more")
ax.set_xscale("log", base=2)
plotting.show("Operations for a whole text against its length, both logarithmic: the "
              "line without a cache is steeper by one everywhere.")

# %% [markdown]
# Short texts: $n$ with, $n^2$ without, since a token's projections cost more than its attention. Long ones: $n^2$ with, $n^3$
# without. The common "$O(n)$ against $O(n^2)$" is the left end of these lines.

# %% [markdown]
# ## Part 2 · A cache at work
#
# ### 5.3 Implementation: preallocated, ring, pages
#
# **Where do the numbers live?** In a tensor that grows, as in 5A, all that is there is copied whenever something is added. A
# cache takes its memory once and writes in place.
#
# #### Exercise 5B: the cache  (difficulty 2 of 5, essential, 18 minutes; if you do only two)
#
# Write what changes in the memory of one layer. A `buffer` of a module moves with it to another device, and is no weight.
#
# |method|argument|what it does|
# |---|---|---|
# |`update`|`k`, `v` `(batch, n_heads, n_new, d_head)`|writes them after what is there; returns the pair of all keys and all values so far, `(batch, n_heads, length, d_head)`, as views: nothing that is there is copied|
# |`rewind`|`length`|forgets all but the first `length` tokens|
# |`reorder`|`rows` `(batch,)` integers|row i continues what row `rows[i]` was|
#
# Returns of `update`: views into `self.k` and `self.v`. The checks of sizes are written already.
#
# <details><summary>Hint</summary>
#
# Which slice of the third axis is still free, and which slice is handed back? Does `rewind` have to touch the memory, if
# `update` and its views go by `self.length`? A row may be wanted twice by `reorder`: what must not be overwritten too early?
#
# </details>

# %% tags=["export"]
def check_sizes(lowest=1, **sizes):
    """The sizes as a tuple. ValueError unless all are whole numbers from `lowest`."""
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or size < lowest:
            raise ValueError(f"{name} must be a whole number of at least {lowest}, "
                             f"got {size!r}")
    return tuple(sizes.values())

def check_update(k, v, shape, room=None):
    """ValueError unless k and v fit into a cache (batch, n_heads, _, d_head)."""
    batch, n_heads, _, d_head = shape
    if k.shape != v.shape or k.dim() != 4 or k.shape[::3] + k.shape[1:2] != (
            batch, d_head, n_heads):
        raise ValueError(f"k and v must be ({batch}, {n_heads}, n_new, {d_head}) for "
                         f"this cache, got {tuple(k.shape)} and {tuple(v.shape)}")
    if room is not None and k.shape[2] > room:
        raise ValueError(f"the cache holds {shape[2]} tokens, got "
                         f"{shape[2] - room + k.shape[2]}: make it larger")

def check_length(length, most):
    """ValueError unless 0 <= length <= most."""
    if not 0 <= length <= most:
        raise ValueError(f"length must lie between 0 and {most}, got {length}")

# %% tags=["exercise", "export"] kind="module"
class KVCache(nn.Module):
    """Keys and values of one layer, (batch, n_heads, capacity, d_head) each."""

    def __init__(self, batch, n_heads, capacity, d_head, dtype=torch.float64,
                 device=None):
        super().__init__()
        sizes = check_sizes(0, batch=batch, n_heads=n_heads, capacity=capacity,
                            d_head=d_head)
        for name in ("k", "v"):
            memory = torch.zeros(sizes, dtype=dtype, device=device)
            self.register_buffer(name, memory, persistent=False)
        self.length = 0

    n_bytes = property(lambda self: self.k.nbytes + self.v.nbytes)

    def forward(self, k, v):
        return self.update(k, v)

    def update(self, k, v):
        """Store k, v (batch, n_heads, n_new, d_head); return all so far, as views."""
        check_update(k, v, self.k.shape, room=self.k.shape[2] - self.length)
        ### BEGIN SOLUTION
        end = self.length + k.shape[2]
        self.k[:, :, self.length:end] = k
        self.v[:, :, self.length:end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]
        ### END SOLUTION

    def rewind(self, length):
        """Forget everything after the first `length` tokens."""
        check_length(length, self.length)
        ### BEGIN SOLUTION
        self.length = length
        ### END SOLUTION

    def reorder(self, rows):
        """Row i of the batch continues what row rows[i] was."""
        ### BEGIN SOLUTION
        self.k, self.v = self.k[rows], self.v[rows]
        ### END SOLUTION

# %%
KVCache = check("5B", KVCache)

# %% [markdown]
# **A ring**, for a model that looks back only so far (a *window*, lecture 07): token $t$ takes the *slot* $t \bmod w$, and
# with it the place of the oldest. Its *position* goes on: RoPE has turned its key to $t$ wherever it lies.
#
# *Predict.* Ten tokens, a ring of four slots: which token lies in slot 0?

# %% tags=["slide"]
from attention.kv_cache import RingKVCache

places = torch.arange(10.0).view(1, 1, 10, 1).double()  # each token's value: its number
cache, ring = KVCache(1, 1, 16, 1), RingKVCache(1, 1, 4, 1)
cache.update(places, places)
for one in places.split(1, dim=2):
    recent, _ = ring.update(one, one)
in_cache, in_ring = (c.k[0, 0, :, 0].int().numpy() for c in (cache, ring))
in_cache[cache.length:] = -1  # not written yet
plotting.memory({"preallocated": in_cache, "ring of 4": in_ring},
                [(("preallocated", t), ("ring of 4", t % 4)) for t in range(6, 10)],
                "A cache has room to grow, a ring keeps the last four")
plotting.show("Sixteen cells with the tokens 0 to 9 and six free ones; below them a "
              "ring of four cells with the tokens 8, 9, 6 and 7.")
print("the ring hands over, oldest first:", recent[0, 0, :, 0].int().tolist())

# %% [markdown]
# Token 8, in the place of 4.
#
# **Pages.** A server has many texts and knows of none how long it will be. To reserve the longest for each is safe and
# wasteful. *PagedAttention* (Kwon et al. 2023, arXiv 2309.06180) cuts memory into small **pages**; a text owns a list of
# pages, its **block table**, and gets a new one when the last is full. (The paper calls a page a *block*: "paged or block
# cache?" is one thing twice.) `PagePool` lends pages, `PagedKVCache` writes into them (Behind the scenes).
#
# *Predict.* Pages of 4. Text a brings 6 tokens, then text b 5, then a 4 more. Which pages has a?

# %% tags=["slide"]
from attention.kv_cache import PagedKVCache, PagePool

def token_pages(cache, owner, pool):
    """What stands in a pool: "a3" is token 3 of text a."""
    cells = np.full((len(pool.users), pool.page_size), "", dtype="<U4")
    for t in range(cache.length):
        cells[cache.tables[0][t // 4], t % 4] = f"{owner}{t}"
    return cells

pool = PagePool(n_pages=6, page_size=4, n_heads=1, d_head=1)
text_a, text_b = PagedKVCache(pool, batch=1), PagedKVCache(pool, batch=1)
for written, n_new in ((text_a, 6), (text_b, 5), (text_a, 4)):
    new = written.length + torch.arange(n_new).double().view(1, 1, n_new, 1)
    in_order, _ = written.update(new, new)
lent = np.char.add(*(token_pages(cache, owner, pool)
                     for cache, owner in ((text_a, "a"), (text_b, "b")))).ravel()
table = text_a.tables[0]
plotting.memory({"block table of a": np.array(table), "pages": lent},
                [(("block table of a", i), ("pages", 4 * page))
                 for i, page in enumerate(table)],
                "A text's pages lie anywhere; its block table has their order")
plotting.show("A block table with the pages 0, 1 and 4, and six pages of four tokens: "
              "text a in pages 0, 1 and 4, text b in pages 2 and 3, page 5 free.")
print("gathered:", in_order[0, 0, :, 0].int().tolist())

# %% [markdown]
# Pages 0, 1 and 4: token $t$ lies in page `table[t // 4]`, slot `t % 4`. Attention through the table is the same attention:

# %%
from attention.kv_cache import paged_decode_attention_numpy

k_pages, v_pages = np.full((2, 3, 2, 1, 1), np.nan)  # 3 pages of 2 slots, one head of 1
block_table = np.array([[2, 0]])  # the first two tokens in page 2, the third in page 0
for t in range(3):
    k_pages[block_table[0, t // 2], t % 2] = ln_keys[t]
    v_pages[block_table[0, t // 2], t % 2] = three_values[t]
one_query, three = np.ones((1, 1, 1)), np.array([3])
out = paged_decode_attention_numpy(one_query, k_pages, v_pages, block_table, three)
print(f"pages {block_table[0]} hold the keys; through the table: {out.item():.1f}")

# %% [markdown]
# **One prompt, many answers: copy on write.** Four answers begin with the same 10 tokens. `fork` copies the table, not the
# pages; each page knows how many read it. *Predict.* Each answer now writes one token. How many pages are in use?

# %% tags=["slide"]
answers = text_a.fork([0, 0, 0, 0])
text_a.close()
text_b.close()
shared = {"shared": np.array(answers.tables)}
print(f"four answers, nothing written: {6 - len(pool.free)} pages")
new = torch.arange(4.0).double().view(4, 1, 1, 1)
answers.update(new, new)
shared["written"] = np.array(answers.tables)
print(f"each has written one token: {6 - len(pool.free)} pages, without sharing "
      f"{shared['written'].size}")
plotting.memory(shared, title="Only the written page is copied: full ones stay common")
plotting.show("Block tables of four answers. Before: pages 0, 1, 4 in each line. "
              "After: 0 and 1 in each line, then four different pages.")

# %% [markdown]
# Six in place of twelve. Pages waste half a page a text, reserved places most of the memory (5.16).
#
# **Ragged batches.** Prompts of different lengths are continued together. Their *last* tokens have to stand in one column, so
# the padding goes to the **left**, and two things must know of it: the mask, and the positions.

# %%
from attention.kv_cache import left_padding

mask, positions = left_padding(np.array([5, 2, 3]), n_keys=5)
cells = np.where(mask[:, 0, 0], positions.astype(str), "")
plotting.memory({"positions": cells},
                title="A row's first token has position 0, wherever it stands")
plotting.show("Three rows of five columns: positions 0 to 4; three free cells, then 0, "
              "1; two free cells, then 0, 1, 2.")

# %% [markdown]
# ### 5.4 Autoregressive generation patterns
#
# **In which ways is a cache filled and read?** The prompt is known: all its tokens go in at once, **prefill**. The answer
# comes token by token, **decode**. The loop that does both is the heart of every program that lets a model write.
#
# #### Exercise 5C: the loop that writes  (difficulty 3 of 5, essential, 18 minutes; if you do only two)
#
# |argument|meaning|
# |---|---|
# |`model`|`model(ids)` or `model(ids, caches=caches)`: logits `(batch, n, vocab_size)`; with caches it adds what it reads to them, and goes on where they end|
# |`ids`|integers `(batch, n)`: the prompt|
# |`n_new`|how many tokens are to be written|
# |`caches`|empty ones, or None: then the whole text is read again each time|
# |`temperature`, `top_k`, `rng`|go to `sample(logits, temperature, top_k, rng)`, logits `(batch, vocab_size)`, which returns the tokens `(batch,)`|
# |`on_token`|if given: called with the tokens `(batch, 1)` of each step as they come|
#
# Returns `(batch, n + n_new)`. With caches each token but the last is read once, the prompt in one call.
#
# <details><summary>Hint</summary>
#
# What is unread before the first step, and what after it? Which row of the logits speaks about the token that comes next?
# What does the model read when there are no caches?
#
# </details>

# %%
from attention.kv_cache import sample

# %% tags=["export"]
def check_prompt(ids):
    """ValueError unless ids are (batch, n) with at least one token."""
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError("ids must be (batch, n) with at least one token, "
                         f"got shape {tuple(ids.shape)}")

def check_empty(model, caches):
    """ValueError unless there is an empty cache for each layer of the model."""
    held = [cache.length for cache in caches]
    if held != [0] * model.config.n_layers:
        raise ValueError(f"caches must be {model.config.n_layers}, one a layer, and "
                         f"empty, got lengths {held}")

# %% tags=["exercise", "export"] kind="training"
def generate(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0,
             on_token=None):
    """Continue each row of ids (batch, n) by n_new tokens. Returns (batch, n + n_new).

    caches: one for each layer, empty, with length and update(k, v); None reads the
    whole text again for each token. temperature 0 is greedy; otherwise tokens are
    drawn, of the top_k likeliest if given, by numpy's default_rng(seed). on_token:
    called with the tokens (batch, 1) of each step. ValueError for an empty prompt or
    numbers that make no sense.
    """
    check_prompt(ids)
    if n_new < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError("n_new and temperature must not be negative and top_k at "
                         f"least 1, got {n_new}, {temperature} and {top_k}")
    if caches is not None:
        check_empty(model, caches)
    rng, unread = np.random.default_rng(seed), ids
    with torch.no_grad():
        ### BEGIN SOLUTION
        for _ in range(n_new):
            logits = model(ids) if caches is None else model(unread, caches=caches)
            unread = sample(logits[:, -1], temperature, top_k, rng)[:, None]
            ids = torch.cat([ids, unread], dim=1)
            if on_token is not None:
                on_token(unread)
        return ids
        ### END SOLUTION

# %%
generate = check("5C", generate)

# %% [markdown]
# **Into the real model**: your loop and your caches write, and the tokens appear as they come.

# %% tags=["language-model"]
from attention.kv_cache import new_caches

if smollm:
    typewriter = language_model.Typewriter(smollm)
    typewriter(text[:, :7])
    mine = generate(writer, text[:, :7], 12, new_caches(smollm, 1, 20),
                    on_token=typewriter)
    print(f"\ntokens as before: {int((mine == text).sum())} of {text.shape[1]}")

# %% [markdown]
# **On a time axis.** A prefill is large matrix products: the GPU computes. A step of decoding reads all weights for one token:
# the GPU waits for its memory (5.6). On one GPU, Anna's answer is being written when Ben's prompt of 8,000 tokens arrives.
#
# *Predict.* What does Anna see? And when Ben's prompt goes in by pieces of 1,000 (**chunked prefill**, arXiv 2403.02310), one
# with each step of hers?

# %% tags=["slide"]
import matplotlib.pyplot as plt
from attention.experiments.kv_cache import schedule

figure, axes = plt.subplots(2, 1, figsize=(9, 3.6), sharex=True)
for ax, (name, chunk) in zip(axes, (("at once", 8000), ("in chunks of 1,000", 1000))):
    spans = schedule(8000, chunk)
    for line, (who, pieces) in enumerate(spans.items()):
        ax.broken_barh([(start, end - start) for start, end in pieces], (line, 0.8),
                       facecolor=f"C{1 - line}", edgecolor="white")
    ax.set_yticks([0.4, 1.4], list(spans))
    ax.set_title(name)
    waits = np.diff([end for _, end in spans["Anna's tokens"]])
    first = spans["Ben's prompt"][-1][1] - spans["Ben's prompt"][0][0]
    print(f"{name:18s}: Anna waits {waits.max():3.0f} ms at most, Ben {first:.0f} ms")
axes[1].set_xlabel("milliseconds")
figure.suptitle("A long prefill stops everybody else; in chunks it only slows them")
plotting.show("Two time axes with Anna's steps above Ben's prefill. At once: her steps "
              "stop for 130 ms. In chunks: one step of hers with every piece of his.")

# %% [markdown]
# Her text stops, or it only slows down. When several new tokens meet older keys, the causal mask must be
# **aligned at the bottom right**. On a square both masks below are the same, so a test on squares does not tell them apart.

# %% tags=["slide"]
top_left = np.arange(8)[None, :] <= np.arange(3)[:, None]
plotting.masks({"bottom right: right": causal_mask(3, 8), "top left: wrong": top_left},
               title="Three new tokens, eight keys: the last query must see all"
               ).set_figheight(2.9)
plotting.show("Two masks of three queries and eight keys. Bottom right: the queries "
              "see 6, 7 and 8 keys. Top left: they see 1, 2 and 3.")

# %% [markdown]
# Three more patterns are the same cache. **Sampling** changes who is chosen, not what is kept. **Beam search** keeps
# the likeliest beginnings; one may have two children and another none, so the cache's rows must change places: `reorder`
# (5.19). **Speculative decoding** lets something cheap guess several tokens, verifies them in one pass, and rewinds what was
# wrong (5.13).

# %% [markdown]
# ### 5.5 Common pitfalls
#
# **Which test finds which bug?** A decoder with a cache, in NumPy: one head, and vectors in place of tokens, to which a code
# of their place is added. A row may begin with padding. `read_alone` says what it has to give.

# %% tags=["export"]
def place_code(places, d):
    """Sines and cosines of places (...,), integers: (..., d); d even."""
    angles = places[..., None] / 30.0 ** (np.arange(d // 2) / (d // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

def read_alone(x):
    """What each vector of one text x (n, d) finds, read at once and without a cache."""
    at = x + place_code(np.arange(len(x)), x.shape[1])
    return attention_numpy(at, at, x, causal=True)

# %% tags=["export"]
class Decoder:
    """Reads texts of vectors (batch, n_new, d) piece by piece, with a cache."""

    def __init__(self, batch, d, padding=None):
        """padding (batch,): how many of the first vectors of each row are none."""
        self.k, self.v = np.zeros((2, batch, 0, d))
        self.padding = np.zeros(batch, int) if padding is None else np.array(padding)

    def read(self, x):
        """What the new vectors find: (batch, n_new, d); zeros for padding."""
        n_old, columns = self.k.shape[1], np.arange(self.k.shape[1] + x.shape[1])
        places = (columns - self.padding[:, None]).clip(0)[:, n_old:]
        q = x + place_code(places, x.shape[2])
        self.k = np.concatenate([self.k, q], axis=1)
        self.v = np.concatenate([self.v, x], axis=1)
        real = (columns >= self.padding[:, None])[:, None]
        return attention_numpy(q, self.k, self.v, mask=real, causal=True)

    def rewind(self, length):
        self.k, self.v = self.k[:, :length], self.v[:, :length]

    def reorder(self, rows):
        self.k, self.v, self.padding = self.k[rows], self.v[rows], self.padding[rows]

# %% [markdown] tags=["slide"]
# #### Exercise 5D: find the bugs  (difficulty 3 of 5, useful, 20 minutes)
#
# Write a test that is given a class like `Decoder` and notices whether it is wrong. It is tried on right ones and on nine
# wrong ones: five of these have been seen in published programs.
#
# |argument|meaning|
# |---|---|
# |`Decoder`|a class with the methods above; its memory may look different|
#
# Returns nothing. It raises an error (`assert ...`) for a wrong class, and none for a right one.
#
# <details><summary>Hint</summary>
#
# Which pieces does a program read: one token, several, fewer after a rewind than were forgotten? What should the second text of a batch with
# padding find? After `reorder([1, 1])`, whose text does row 0 continue? Each time: what would `read_alone` say of the whole
# text of that row?
#
# </details>

# %% tags=["exercise", "export"] kind="bug"
def test_decoder(Decoder):
    """Raise AssertionError if a decoder of this class is wrong."""
    ### BEGIN SOLUTION
    a, b, c = np.random.default_rng(1).standard_normal((3, 9, 6))
    for pieces in ([3], [1, 2, 3, 4, 5, 6, 7, 8], [4, 5, 8]):
        decoder = Decoder(1, 6)
        found = [decoder.read(piece[None])[0] for piece in np.split(a, pieces)]
        assert np.allclose(np.concatenate(found), read_alone(a)), pieces
    decoder.rewind(4)
    found = [decoder.read(piece[None])[0] for piece in np.split(b[:4], [1])]
    whole = np.concatenate([a[:4], b[:4]])
    assert np.allclose(np.concatenate(found), read_alone(whole)[4:]), "rewind"
    decoder = Decoder(2, 6, padding=[0, 3])
    padded = np.concatenate([np.full((3, 6), 9.0), b[:4]])
    found = decoder.read(np.stack([a[:7], padded]))
    assert np.allclose(found[1, 3:], read_alone(b[:4])), "padding"
    decoder.reorder(np.array([1, 1]))
    found = decoder.read(np.stack([c[:2], a[:2]]))
    for row, more in zip(found, (c, a)):
        assert np.allclose(row, read_alone(np.concatenate([b[:4], more[:2]]))[4:])
    ### END SOLUTION

# %%
test_decoder = check("5D", test_decoder)

# %% [markdown]
# The same bugs in SmolLM2, which reads 256 tokens of a manual by 64 and then writes. *Predict.* Which of the four can you see
# in what it writes? Which in the loss?

# %% tags=["language-model", "slide"]
if smollm:
    for name in ("mask at the top left", "positions restarted",
                 "positions one too early", "own token not seen"):
        seen = language_model.compare(smollm, **language_model.BUGS[name])
        print(f"{name:24s} loss {seen.loss:.2f}, logits off by {seen.off}")
        print(f"{'':24s} {seen.text!r}")
    print(f"{'no mistake':24s} loss {seen.right_loss:.2f}")
    print(f"{'':24s} {seen.right_text!r}")
    moved = language_model.compare(
        smollm, locate=lambda n_old, n_new: 9 + torch.arange(n_old, n_old + n_new))
    print(f"positions all nine too late: loss {moved.loss:.2f}, "
          f"logits off by {moved.off}")

# %% [markdown]
# Two of the four write the right sentence, and one of these has the right loss, too. So a test of a cache compares **logits
# first**, then the loss, then the text. The last line is a warning: RoPE sees only differences, so positions that count the
# padding do no harm here, and the test on this model finds nothing. With positions that are added, as in `Decoder`, they do.

# %% [markdown]
# ## Part 3 · What it costs
#
# ### 5.6 Performance implications
#
# **Does the clock say what the operations say?** The slopes of the first figure, and those of `forward_flops` for the same
# lengths (in sizes of SmolLM2). Then the same of a small model with two layers of width 64, where attention is most of the
# work. The times are the recorded ones of the beginning: trust their slopes to a few tenths.

# %%
small = recorded["small_model"]
for name, run, shape in (("SmolLM2", speed, sizes), ("small model", small, dict(
        d_model=64, d_ff=128, n_layers=2, vocab_size=103))):
    n = np.array([n for n in run["n"] if n >= 128])
    for kind, read in (("with a cache", np.ones_like(n)), ("without a cache", n)):
        y = run[kind][-len(n):]
        power = np.polyfit(np.log(n), np.log(y), 1)[0]
        counted = -np.polyfit(np.log(n), np.log(forward_flops(read, n, **shape)), 1)[0]
        print(f"{name:11s} {kind:15s} tokens a second: measured n^{power:.1f}, "
              f"by operations n^{counted:.1f}")
print(f"small model at 2,048 tokens: {small['softmax_share']:.1f} of the time is mask "
      f"and softmax; a layer's scores are {4 * 2048**2 * 8 / 1e6:.0f} MB")

# %% [markdown]
# In the large one they agree roughly. In the small one a step with a cache is mostly the cost of calling functions, the same at
# any length. Without a cache its time grows **faster** than its operations, for two reasons: mask and softmax touch each of the $n^2$ scores
# several times, which the formula leaves out, and the score matrix has left the processor's caches. Not writing it down at
# all is lecture 06.
#
# **What limits prefill and decode?** Operations for each byte that is read, for Llama 3.1 8B in half precision. An H100 has
# 3.35 TB/s and 989 TFLOP/s (data sheet, dense bf16): it needs 295 for each byte to be busy.
#
# *Predict.* 64 texts are decoded together. Which of the two, weights or caches, is now read for more work than before?

# %%
n_weights, n_layers, n_heads, n_kv_heads, d_head = 8_030_261_248, 32, 32, 8, 128
for name, n_new, n_old, batch in (("prefill of 2,000 tokens", 2000, 0, 1),
                                  ("decode, one text", 1, 2000, 1),
                                  ("decode, 64 texts", 1, 2000, 64),
                                  ("64 texts, verify 5", 5, 2000, 64)):
    n_keys = n_old + n_new
    of_weights = 2 * n_weights * n_new * batch / (2 * n_weights)
    of_cache = 4 * n_new * n_keys * n_layers * n_heads * d_head / cache_bytes(
        n_layers, n_kv_heads, d_head, n_keys)  # the batch multiplies both alike
    reading = 2 * n_weights + cache_bytes(n_layers, n_kv_heads, d_head, n_keys, batch)
    seconds = (max(2 * n_weights / 3.35e12, 2 * n_weights * n_new * batch / 989e12)
               + (reading - 2 * n_weights) / 3.35e12)
    print(f"{name:24s} FLOP a byte: weights {of_weights:4.0f}, cache {of_cache:4.0f}; "
          f"at least {1e3 * seconds:5.1f} ms, {reading / 1e9:4.1f} GB")

# %% [markdown]
# The weights: they are read once for all texts. **Each text has its own cache**: $n_\text{heads}/n_\text{kv heads}$ operations
# a byte, whatever batch and length. Verifying five guesses a text passes the 295 for the weights, and still costs only 4 %
# more than one token does: speculation remains almost free.
#
# *Predict.* At most how many tokens a second, and does it fit into 80 GB?

# %%
for batch, n in ((1, 1024), (1, 131_072), (64, 1024), (64, 4096), (64, 8192)):
    of_cache = cache_bytes(n_layers, n_kv_heads, d_head, n, batch)
    in_memory = 2 * n_weights + of_cache
    fits = "fits" if in_memory < 80e9 else "does not fit"
    print(f"{batch:2d} texts of {n:7,}: weights {2e3 * n_weights / 3.35e12:.1f} ms, "
          f"cache {1e3 * of_cache / 3.35e12:4.1f} ms, {in_memory / 1e9:.1f} GB {fits}, "
          f"{batch / in_memory * 3.35e12:5,.0f} tokens a second")

# %% [markdown]
# The weights cost the same for 64 texts as for one; the caches do not, and soon they are most of the bytes, or too many. What
# helps: fewer tokens and fewer bits (part 4), fewer heads of keys (lecture 08), a latent in their place (lecture 09).
#
# **Trap.** *"Attention is memory-bound because of the KV cache."* In training and prefill there is none: there the $n \times n$
# scores cost bandwidth, which FlashAttention (lecture 06) cures. In decode the cache does, and FlashAttention does not make it smaller
# by a byte.

# %% [markdown]
# ## Part 4 · What it may forget
#
# ### 5.7 Attention sinks
#
# **Which keys does a real model look at?** SmolLM2 reads 512 tokens that it has never seen: this course. Below is the weight
# that token 0 gets in each head, as a mean over the queries from 64 on. An even share would be 0.005.
#
# *Predict.* What is special about token 0?

# %% tags=["language-model", "slide"]
if smollm:
    from attention.experiments.kv_cache import sink_and_stream

    strange = language_model.excerpt(smollm, 512, of="course")
    on_first, value_ratio, stream = sink_and_stream(smollm, strange)
    plotting.matrix(on_first.T, xlabel="layer", ylabel="head", label="weight",
                    title="From layer 12 on much of the weight is on token 0")
    plotting.show("Nine heads by thirty layers, coloured by the weight on token 0: "
                  "none in layers 0, 1, 10 and 11, little in 2 to 9, and from layer 12 "
                  "on much in many heads.")
    print(f"layers 12 to 28: {on_first[12:29].mean():.2f}, layers 0, 1, 10 and 11: "
          f"{on_first[[0, 1, 10, 11]].mean():.2f}; "
          f"over one half in {(on_first > 0.5).sum()} of 270 heads")
    print(f"its value is {value_ratio.median():.2f} times as long as the others'")
    print(f"after layer 11 its largest number is {stream[0].max() / 1e3:.1f} thousand, "
          f"that of all other tokens {stream[1:].max():.0f}")

# %% [markdown]
# Nothing but its place: an **attention sink** (Xiao et al. 2023, arXiv 2309.17453). A softmax must put its weight somewhere; a head
# with nothing to say puts it on a key whose value is short (a *value drain*, Guo et al. 2024, arXiv 2410.13835). What marks
# the token is **one number** of its vector, a *massive activation* (Sun et al. 2024, arXiv 2402.17762).
#
# *Predict.* 384 tokens times 576 numbers are 221,184. What does the loss become when this one is set to 0? When another is?

# %% tags=["language-model", "slide"]
if smollm:
    from attention.experiments.kv_cache import loss_with_entry

    stretch = strange[:, :384]
    hidden_first = torch.ones(384, 384, dtype=torch.bool)
    hidden_first[1:, 0] = False
    losses = {"nothing changed": float(smollm.losses(stretch).mean())}
    for entry, value in ((507, 22_000.0), (507, 0.0), (100, 0.0)):
        losses[f"number {entry} is {value:,.0f}"] = loss_with_entry(
            smollm, stretch, entry, value)
    hiding = smollm.losses(stretch, mask=hidden_first)
    losses["token 0 hidden"] = float(hiding.mean())
    losses["guessing"] = math.log(smollm.config.vocab_size)
    plotting.bars({name: round(loss, 2) for name, loss in losses.items()},
                  ylabel="loss (nats a token)",
                  title="One number of 221,184 set to 0, and the model is gone")
    plotting.show("Bars of loss: 4.3 for the model, the number set to 22,000, another "
                  "number set to 0 and token 0 hidden; 16 for number 507 set to 0; "
                  "guessing 10.8.")

# %% [markdown]
# Worse than guessing; and its exact value does not matter. Token 0 has become a constant that the model adds to each text. The
# bar before the last is a warning: hide token 0 everywhere, and token 1 is the first that can be seen, and takes over. Who evicts the
# first tokens from a cache that is *filled* does something else: they were the sinks when the other keys were made.

# %% [markdown]
# ### 5.8 StreamingLLM: a window, and the sink
#
# **Can a model read on with a cache of fixed size?** Keep the last 64 tokens; or 63 of them and the first one. One pass
# under a mask shows what such a cache would do.
#
# *Predict.* Three curves of loss: everything, last 64, one sink and 63. Where do they part?

# %% tags=["language-model", "slide"]
if smollm:
    longer = language_model.excerpt(smollm, 768, of="course")
    back = torch.arange(768)[:, None] - torch.arange(768)
    masks = {"full": None, "window, last 64": back < 64,
             "window with sinks, 1 + 63": (back < 63) | (torch.arange(768) == 0)}
    by_token = {name: smollm.losses(longer, mask=mask).numpy()
                for name, mask in masks.items()}
    late = {name: loss[383:].mean() for name, loss in by_token.items()}
    print("second half:",
          ", ".join(f"{loss:.2f} {name}" for name, loss in late.items()))
    smooth = {name: np.convolve(loss, np.ones(64) / 64, "valid")
              for name, loss in by_token.items()}
    plotting.curves(smooth, x=np.arange(64, 768), xlabel="tokens read",
                    ylabel="loss, mean of 64 tokens (nats)",
                    title="One kept sink wins back most of what a window loses")
    plotting.show("Loss against tokens read: the window alone rises by about a nat "
                  "above the others after 64 tokens; with one sink it stays near full.")

# %% [markdown]
# At token 64, when the sink leaves the window, and by about a nat. One key wins back three quarters of it. The paper keeps four; its 22.2
# times the speed (abstract) is against recomputing the window. It also counts positions *inside the cache* (5.18). A model can
# be given a place for its sink before it is trained (5.17).

# %% [markdown]
# ### 5.9 H2O, SnapKV: which keys to keep
#
# **Can the weights of the past tell which keys the future needs?** After the prompt each head keeps a share of its keys. *H2O*
# (Zhang et al. 2023, arXiv 2306.14048): half of them those that were looked at most, half the most recent. *SnapKV* (Li et
# al. 2024, arXiv 2404.14469): those that the last queries look at, with their neighbours. Window and random do not look.
#
# *Predict.* A prompt of 768 tokens, a fifth of the keys is kept; the loss of the next 128. Who wins, and why?

# %% tags=["language-model", "slide", "approx"] approx={"numbers": 0.04, "picture": 0.03}
from functools import partial

from attention.kv_cache import keep_heavy, keep_random, keep_sinks
from attention.kv_cache import keep_voted, keep_window, random_with_sinks

if smollm:
    from attention.experiments.kv_cache import loss_after, read_and_choose

    policies = {"window": keep_window, "4 sinks, window": keep_sinks,
                "random": keep_random, "4 sinks, random": random_with_sinks,
                "H2O": keep_heavy, "SnapKV": partial(keep_voted, n_voters=32, width=7)}
    story = language_model.excerpt(smollm, 897, of="course")
    choices = {name: (policy, 154) for name, policy in policies.items()}
    exact, kept = read_and_choose(smollm, story[:, :768], choices)
    after = {"all keys": loss_after(smollm, exact, None, story[:, 768:])}
    for name in policies:
        after[name] = loss_after(smollm, exact, kept[name], story[:, 768:])
    plotting.bars({name: round(loss, 2) for name, loss in after.items()},
                  ylabel="loss of the next 128 tokens (nats)",
                  title="A fifth of the keys: four sinks do most of the work")
    plotting.show("Bars of loss: all keys 4.7, window 5.8, random 6.4; with four sinks "
                  "both fall to 4.9 and 4.8, where H2O and SnapKV stand too.")

# %% [markdown]
# All that keep the sink, and H2O and SnapKV keep it because it is heavy. A table without the two "4 sinks" columns would credit
# them with its work. So ask for something that one must *look* to keep: a pass key in the first part of 600 tokens, the question
# at the end.

# %% tags=["language-model", "slide", "approx"] approx={"numbers": 0.06, "picture": 0.04}
if smollm:
    from attention.experiments.kv_cache import passkey

    shares, on_key = (0.1, 0.2, 0.5), {name: [] for name in policies}
    for of, key in (("course", " 59063"), ("help", " 27148")):
        prose = language_model.excerpt(smollm, 1060, of)[:, 500:]
        prompt, answer = passkey(smollm, prose, key, depth=0.2)
        n = prompt.shape[1]
        choices = {(name, share): (policy, round(share * n))
                   for name, policy in policies.items() for share in shares}
        filled, kept = read_and_choose(smollm, prompt, choices)
        print(f"{of:6s} {n} tokens, all keys: loss on the key "
              f"{loss_after(smollm, filled, None, answer):.2f}")
        for name, rows in on_key.items():
            rows.append([loss_after(smollm, filled, kept[name, share], answer)
                         for share in shares])
    plotting.curves({name: np.mean(rows, axis=0) for name, rows in on_key.items()},
                    x=[10, 20, 50], xlabel="keys kept (percent)",
                    ylabel="loss on the pass key (nats)",
                    title="Who looks at weights loses least of the pass key"
                    ).set_ylim(top=8.5)
    plotting.show("Loss on the pass key against the share kept, six curves: window and "
                  "sinks with window stay high, H2O and SnapKV are lowest at every "
                  "share.")
    del filled, kept

# %% [markdown]
# A window never has it, random keeps a digit here and there, and those that look lose least at every share; none reaches the full
# cache. The question stood *in* the prompt when the keys were chosen. Ask a second, different one afterwards, and no policy can have known (5.14).
#
# ### 5.10 Fewer bits
#
# **How many bits does a key need?** To quantise: keep a group's smallest number and the step between $2^b$ levels, and of each
# number only its level. What shall be a group: the numbers of a token, or those of a channel over 32 tokens?
#
# *Predict.* Look at 64 keys of a head in layer 12. In which direction are they alike?

# %% tags=["language-model"]
if smollm:
    keys = exact[12].k[0, 0, 64:128]
    plotting.matrix(keys, xlabel="channel", ylabel="token", label="key",
                    title="A few channels are far from zero in all tokens")
    plotting.show("Keys of 64 tokens in 64 channels: a few columns have one strong "
                  "colour from top to bottom; the rows look alike.")
    print(f"means of channels: {keys.mean(0).abs().median():.1f} in the median, "
          f"{keys.mean(0).abs().max():.1f} at most")

# %% [markdown]
# Columns. A channel's numbers are close together, so a group of one *channel* has a small step; a group of one *token* has to
# reach from the largest channel to the smallest. *KIVI* (Liu et al. 2024, arXiv 2402.02750): keys per channel, values per
# token, the last tokens exact. The loss of the next 128 tokens above that of the exact cache:

# %% tags=["language-model", "slide", "approx"] approx={"numbers": 0.1, "picture": 0.03}
from attention.kv_cache import QuantizedKVCache

if smollm:
    extra = {}
    for bits in (4, 2):
        for axis in ("channel", "token"):
            packed = [QuantizedKVCache(bits, 32, axis) for _ in exact]
            for quantised, cache in zip(packed, exact):
                quantised.update(cache.k, cache.v)
            loss = float(smollm.losses(story[:, 768:], caches=packed).mean())
            extra[f"{bits} bits, keys per {axis}"] = round(loss - after["all keys"], 2)
    plotting.bars(extra, ylabel="extra loss (nats)",
                  title="4 bits are free; at 2 bits the layout of the keys decides")
    plotting.show("Four bars of extra loss: next to nothing with 4 bits in both "
                  "layouts and 0.15 with 2 bits per channel; 0.75 with 2 bits per "
                  "token.")
    del packed

# %% [markdown]
# With 4 bits in place of 32, or 16, the loss does not move; with 2 the layout decides, as KIVI says. A group's minimum and step
# take space too: 4 bits are 5 (5.22).

# %% [markdown]
# ## Part 5 · CUDA
#
# ### 5.11 One query, many keys
#
# **What does a kernel with one query wait for?** In float32 a key and a value of $d$ numbers each are $8d$ bytes, read for
# $4d$ operations: half an operation a byte, where an H100 needs 20. So the bytes decide: each key once, no matter what. But
# one user of a model with 8 key heads has 8 rows of keys: a block of threads for each row makes 8 blocks, for 132 multiprocessors.
#
# Let several blocks share the keys of a row: *Flash-Decoding* (Dao et al. 2023). Can a softmax be put together from parts? A
# split hands over its output and its log-sum-exp $\ell$, and its share is $e^{\ell}$ over the sum of them all. *Predict.* Keys
# 1 and 2 of the running example are one split ($o = 4$), key 3 the other ($o = 1$). What are the shares?

# %%
splits = [(ln_keys[:2], three_values[:2]), (ln_keys[2:], three_values[2:])]
parts = np.array([softmax(s) @ v for s, v in splits])
lse = np.array([np.log(np.exp(s).sum()) for s, v in splits])
print(f"outputs {parts}, shares {softmax(lse)}, merged {softmax(lse) @ parts:.1f}")

# %% tags=["slide"]
def busy(n_blocks, processors=132):
    """Share of an H100's multiprocessors with a block, if each takes one at a time."""
    return n_blocks / (processors * np.ceil(n_blocks / processors))

rows, n_splits = np.arange(1, 401), 8192 // 128
plotting.curves({"one block a row": busy(rows),
                 "splits of 128 keys": busy(rows * n_splits)},
                x=rows, xlabel="rows: texts times key heads",
                ylabel="multiprocessors with a block",
                title="A block a row leaves processors idle, splits hardly any")
plotting.show("Share of multiprocessors with a block against rows: one block a row "
              "climbs to one at 132 and falls to a half; splits are above 0.9 from 20 "
              "rows on.")
needed = 3.35e12 * 700e-9 / 132  # bytes in flight, at a latency of some 700 ns
waiting = 4 * 32 * 16  # four warps, each lane waits for 16 bytes
print(f"8 rows: {8 * n_splits / 132:.1f} warps a processor, {waiting:,} bytes under "
      f"way; full bandwidth: {needed:,.0f}, {needed / waiting:.0f} times as many")

# %% [markdown]
# One half each, and 2.5 again. Splits occupy the multiprocessors; they do not yet fill the memory's pipe. By Little's
# law (bytes under way = bandwidth times latency) such a kernel has far too few loads in flight; real ones load several tiles
# ahead. Here is the part that matters: a warp works on a split of 128 keys, 32 at a time. It keeps the largest score so far,
# and makes its sums smaller when a larger one comes (the *online softmax* of lecture 06). It does not know *where* key $j$ lies.
# It asks `address`.

# %% tags=["export"]
ATTEND_SPLIT = r"""
#define SPLIT 128                                        // keys of a split
template <typename Address>                              // address(j): where key j begins
__device__ void attend_split(const float* q, const float* k, const float* v, float* out,
                             double* lse, int length, int d, float scale, Address address) {
  extern __shared__ float q_row[];                       // the query, then the sum so far
  float* sum = q_row + d;
  float maximum = -INFINITY, total = 0.0f;
  int lane = threadIdx.x, begin = blockIdx.y * SPLIT;
  int end = min(begin + SPLIT, length);
  if (begin >= end) {                                    // no keys: the merge will not look at out
    if (lane == 0) *lse = -INFINITY;
    return;
  }
  // load: a lane has the columns lane, lane + 32, ...
  for (int c = lane; c < d; c += 32) {
    q_row[c] = scale * q[c];
    sum[c] = 0.0f;
  }
  for (int first = begin; first < end; first += 32) {
    int n = min(32, end - first);
    size_t mine = lane < n ? address(first + lane) : 0;  // each lane looks up one key
    float score = -INFINITY;
    for (int t = 0; t < n; ++t) {                        // score: lane t keeps that of key t
      const float* key = k + __shfl_sync(0xffffffff, mine, t);
      float s = 0.0f;
      for (int c = lane; c < d; c += 32) s += q_row[c] * key[c];
      s = warp_sum(s);
      if (lane == t) score = s;
    }
    // rescale
    float larger = fmaxf(maximum, warp_max(score)), top = larger == -INFINITY ? 0.0f : larger;
    float weight = expf(score - top), shrink = expf(maximum - top);
    total = total * shrink + warp_sum(weight);
    maximum = larger;
    for (int c = lane; c < d; c += 32) sum[c] *= shrink;
    for (int t = 0; t < n; ++t) {                        // accumulate
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
# #### Exercise 5E: where is key j?  (difficulty 2 of 5, useful, 10 minutes)
#
# |argument|shape|meaning|
# |---|---|---|
# |`block_table`|`(batch, columns)`|the pages of each row, in order; $-1$ after its last page|
# |`b`, `h`, `j`|int|which row, which head, which token of the row|
# |`page_size`, `heads`, `d`|int|pages are `(n_pages, page_size, heads, d)`|
#
# Returns the number of floats before key $j$ of head $h$ of row $b$ in the pages. A cache may hold more than $2^{31}$
# floats: multiply in `size_t`.
#
# <details><summary>Hint</summary>
#
# Which page of row b has token j, and which slot in it (5.3)? Where does the line of row b begin? How many floats has a page, a
# slot, a head?
#
# </details>

# %% tags=["exercise", "export"] kind="kernel"
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
KEY_OFFSET = check("5E", KEY_OFFSET)

# %% [markdown]
# `PAGED_KERNEL` hands your look-up to `attend_split` (Behind the scenes). Every load of the kernel is counted. *Predict.* Do
# scattered pages cost wasted **sectors** (the 32 bytes that memory hands over at least)? And what does the table cost?

# %%
from attention.kv_cache import PAGED_KERNEL, WARP, cut_into_pages, random_cache
from utils import cuda

through_table = cuda.compile(WARP + ATTEND_SPLIT + KEY_OFFSET + PAGED_KERNEL)
for page_size in (1, 16, 64):
    q, k, v, n_cached = random_cache([128], heads=2, capacity=128, d=64)
    order = np.random.default_rng(1).permutation(128 // page_size)
    pages_k, pages_table = cut_into_pages(k, n_cached, page_size, order)
    pages_v, _ = cut_into_pages(v, n_cached, page_size, order)
    outs, lses = np.zeros((2, 1, 64), np.float32), np.zeros((2, 1))
    report = through_table.check[(2, 1), 32, 8 * 64](
        q, pages_k, pages_v, n_cached, outs, lses, pages_table, pages_table.shape[1],
        page_size, 2, 64, 1 / 8)
    (of_keys,) = [r for r in report.rows if r.kind == "load" and r.array == "k"]
    (look_ups,) = [r for r in report.rows if r.array == "block_table"]
    wasted = of_keys.sectors / of_keys.ideal_sectors
    print(f"pages of {page_size:2d}: keys {of_keys.bytes:,} bytes ({2 * 128 * 64 * 4:,}"
          f" at least), sectors {wasted:.1f} times the ideal, table {look_ups.bytes:,}")

# %% [markdown]
# No sector is wasted for any page size: a request reads neighbouring numbers of *one* key, which stay together. The table costs
# four bytes for each key and head. The running example, through your look-up on the CPU's copy of the kernel:

# %%
from attention.kv_cache import decode_attention_cuda, paged_decode_attention_cuda

single = [np.asarray(a, np.float32) for a in (one_query, k_pages, v_pages)]
straight = [a.astype(np.float32)[None, None, :, None] for a in (ln_keys, three_values)]
by_table = paged_decode_attention_cuda(*single, block_table, [3])
contiguous = decode_attention_cuda(single[0], *straight, [3])
print(f"through the table {by_table.item():.1f}, contiguous {contiguous.item():.1f}")

# %% [markdown]
# ### 5.12 In use
#
# **What do you call on Monday?** In transformers `generate` makes the cache itself: a `DynamicCache` that grows, a `StaticCache` for
# compiled code, a sliding one for window layers; `past_key_values` is its name, and a loop that does not pass it on reads everything again. `F.scaled_dot_product_attention(is_causal=True)` aligns at the
# **top left**: with a cache pass a mask. vLLM and SGLang page, share prefixes between requests, batch continuously (a finished
# text makes room at once) and prefill in chunks: *first-token latency* is prefill, *time between tokens* is decode. FlexAttention and FlashInfer read
# block tables.

# %%
q1, k4 = torch.ones(1, 1, 1, 1), torch.tensor(ln_keys)[None, None, :, None].float()
v4 = torch.tensor(three_values)[None, None, :, None].float()
for causal in (False, True):
    said = nn.functional.scaled_dot_product_attention(q1, k4, v4, is_causal=causal)
    print(f"is_causal={causal!s:5}: {said.item():.1f}")

# %% [markdown]
# With the mask at the top left the new token sees the first key alone, and says 6.
#
# ## What you can do now
#
# You can write a cache, the loop that uses it and the test that finds its bugs; say what it costs, and what limits prefill and
# decode; and choose what it may forget: anything but the sink, most bits, and keys nobody will ask for.

# %%
tokens = 2.0 ** np.arange(10, 18)
gigabytes = {f"{name}: {cache_bytes(*models[name][:3], 1) // 1024} KiB a token":
             cache_bytes(*models[name][:3], 1) * tokens / 1e9
             for name in ("Llama 2 7B", "Llama 3 70B", "Llama 3.1 8B", "SmolLM2 135M")}
ax = plotting.curves(gigabytes, x=tokens, xlabel="tokens in all texts", log_y=True,
                     ylabel="gigabytes of cache",
                     title="Layers and key heads set what a token costs, not weights")
ax.set_xscale("log", base=2)
plotting.show("Four parallel rising lines of cache bytes against tokens: Llama 2 7B "
              "above Llama 3 70B, then Llama 3.1 8B and SmolLM2.")

# %% [markdown]
# ## Exercises left
#
# 1. Let `RingKVCache` take a chunk. What mask does its caller then need?
# 2. `PagedKVCache` gathers all keys at each step. Give a layer a decode path through `paged_decode_attention_torch`.
# 3. Two prompts begin alike. Let the second find the pages of the first by the tokens they hold.
# 4. Let `beam_search` use `PagedKVCache.fork`. How many pages does a step copy?

# %% [markdown]
# ## Quiz

# %% [markdown] tags=["quiz"]
# **1.** Three new tokens join five cached ones. How many keys does the *first* of the three see?
#
# - a) 1
# - b) 3
# - c) 6
# - d) all 8

# %% tags=["quiz"]
from utils import quiz

quiz.answer({"a": 1, "b": 3, "c": 6, "d": 8}, int(causal_mask(3, 8)[0].sum()),
            "The five in the cache, and itself; a mask at the top left allows 1.")

# %% [markdown] tags=["quiz"]
# **2.** Llama 3 70B has 80 layers, 64 query heads on 8 key-value heads of width 128, two bytes a number. How many KiB does a
# token take in the cache?
#
# - a) 2,560
# - b) 320
# - c) 160
# - d) 40

# %% tags=["quiz"]
a_token = cache_bytes(80, 8, 128, 1) // 1024
quiz.answer({"a": 2560, "b": 320, "c": 160, "d": 40}, a_token,
            "Keys and values of 8 heads in 80 layers; query heads are not cached.")

# %% [markdown] tags=["quiz"]
# **3.** A ring of four slots has taken tokens 0 to 9. To which position has RoPE turned the key in slot 1?
#
# - a) 9
# - b) 1
# - c) 3
# - d) 5

# %% tags=["quiz"]
quiz.answer({"a": 9, "b": 1, "c": 3, "d": 5}, int(ring.v[0, 0, 1, 0]),
            "Token 9 lies there. The slot goes round, the position goes on.")

# %% [markdown] tags=["quiz"]
# **4.** In decoding, the number of texts is doubled. By which factor do the operations for each byte of *cache* grow?
#
# - a) 4
# - b) 2
# - c) 1.41
# - d) 1: they do not grow

# %% tags=["quiz"]
per_byte = [4 * texts * 2001 * 32 * 32 * 128 / cache_bytes(32, 8, 128, 2001, texts)
            for texts in (8, 16)]
quiz.answer({"a": 4, "b": 2, "c": 1.41, "d": 1}, per_byte[1] / per_byte[0],
            "Each text brings its own cache: operations and bytes grow together.")

# %% [markdown] tags=["quiz"]
# **5.** Keys are quantised to 4 bits in groups of 32, each with a minimum and a step in half precision. How many bits does a
# number take?
#
# - a) 4
# - b) 4.5
# - c) 5
# - d) 6

# %% tags=["quiz"]
from attention.kv_cache import QuantizedKVCache

four_bits = QuantizedKVCache(4, group=32)
four_bits.update(*torch.zeros(2, 1, 1, 32, 32))
quiz.answer({"a": 4, "b": 4.5, "c": 5, "d": 6}, 8 * four_bits.n_bytes / (2 * 32 * 32),
            "Two times 16 bits for 32 numbers are one bit more for each.")

# %% [markdown]
# ## Going further
#
# Short sections, each alone, in any order.

# %% [markdown]
# ### 5.13 Several guesses, one pass
#
# **Can decoding read its weights less often?** Reading five new tokens reads them once as well. So something cheap guesses, and
# the model **verifies** all guesses in one pass (speculative decoding, Leviathan et al. 2022, arXiv 2211.17192). What it agrees
# with is kept, and where it first disagrees its own token is put.
#
# #### Exercise 5F: verify a draft  (difficulty 3 of 5, useful, 15 minutes)
#
# |argument|shape|meaning|
# |---|---|---|
# |`draft`|`(n_draft,)` integers|guessed tokens|
# |`logits`|`(n_draft + 1, vocab_size)`|row $i$ is what the model says after `draft[:i]`|
#
# Returns an integer array: the accepted beginning of the draft, then one token of the model's own; together what greedy
# decoding would have written, from 1 to `n_draft + 1` tokens.
#
# <details><summary>Hint</summary>
#
# What would the model write at each place, *if* the draft is right up to there? Where does the draft first differ from that, and
# what if nowhere? Does a match after that place mean anything?
#
# </details>

# %% tags=["exercise", "export"] kind="numpy"
def verify_draft(draft, logits):
    """What greedy decoding would write: the draft as far as it is right, then its own.

    draft integers (n_draft,); logits (n_draft + 1, vocab_size), row i after draft[:i].
    Returns an integer array of 1 to n_draft + 1 tokens. Source: arXiv 2211.17192.
    """
    ### BEGIN SOLUTION
    own = logits.argmax(-1)
    wrong = np.flatnonzero(own[:-1] != draft)
    n_accepted = wrong[0] if len(wrong) else len(draft)
    return own[:n_accepted + 1]
    ### END SOLUTION

# %%
verify_draft = check("5F", verify_draft)

# %% [markdown]
# The cheapest guesser looks into the text itself: what followed the last three tokens when they stood there before? (*Prompt
# lookup*; no training, no second model.) *Predict.* For which of three tasks does it help?

# %% tags=["language-model"]
from attention.kv_cache import generate_speculative

if smollm:
    from attention.experiments.kv_cache import look_up

    chat, a_call = smollm.tokenizer.chat, {}
    for task, said in {
            "repeat a text": chat("Repeat this text: The cat sat on the mat."),
            "continue help": smollm.decode(language_model.excerpt(smollm, 100)),
            "open question": chat("Why is the sky blue?")}.items():
        beginning = smollm.encode(said)
        n = beginning.shape[1]
        guessed, calls = generate_speculative(smollm, beginning, 32, look_up,
                                              new_caches(smollm, 1, n + 32))
        a_call[task] = 32 / calls
        print(f"{task:14s} {a_call[task]:.1f} tokens a call")
    plain = generate(writer, beginning, 32, new_caches(smollm, 1, n + 32))
    print(f"the last text, guessed and plain: {int((plain == guessed).sum())} of "
          f"{n + 32} tokens are the same")
    plotting.bars({task: round(rate, 1) for task, rate in a_call.items()},
                  ylabel="tokens a call of the model",
                  title="Guesses from the text help where the text repeats itself")
    plotting.show("Three bars of tokens a call: most for continuing a manual, which "
                  "soon repeats itself, one and a half for repeating a text, one for "
                  "an open question.")

# %% [markdown]
# Where what is written repeats itself: the manual has set phrases, and a small greedy model soon loops. The text is the greedy one
# whatever is guessed. On a
# processor a pass of nine tokens costs more than one, so one token a call is a loss. **And when tokens are sampled?** A guess
# $x$ from the guesser's $q$ is accepted with probability $\min(1, p(x)/q(x))$; if not, one is drawn from
# $\max(0, p - q)$, normalised. The result follows $p$:

# %%
p, q = np.random.default_rng(8).dirichlet(np.ones(6), size=2)
accepted, excess = np.minimum(p, q), np.maximum(0, p - q)
result = accepted + (1 - accepted.sum()) * excess / excess.sum()
print("p     ", p.round(3))
print("result", result.round(3), f" accepted with probability {accepted.sum():.3f}")

# %% [markdown]
# ### 5.14 Heavy hitters
#
# #### Exercise 5G: heavy hitters  (difficulty 3 of 5, extra, 20 minutes)
#
# H2O keeps the keys that were looked at most **and** the most recent ones, half and half.
#
# |argument|shape|meaning|
# |---|---|---|
# |`weights`|`(..., n_queries, n_keys)`|causal weights of the prompt; the last query sees all keys|
# |`budget`|integer|keys to keep; `n_keys` or more keeps all|
# |`fair`|boolean|how a key is scored, see below|
#
# Returns a boolean array `(..., n_keys)`, True at `budget` keys: `budget // 2` heavy hitters, chosen among those that are not
# recent, and the most recent ones. A key's score is the sum of its column. With `fair`, each weight is first multiplied by
# the number of keys that its query could see, and the sum is divided by the number of queries that could see the key.
#
# <details><summary>Hint</summary>
#
# `mark_largest(scores, budget)` marks the largest of each row: which score makes a recent key certain? How many keys does query i
# see, when the last one sees them all? How many queries see key j?
#
# </details>

# %% tags=["export"]
def check_budget(weights, budget):
    """ValueError unless weights are (..., n_queries, n_keys) and budget a count."""
    if weights.ndim < 2 or weights.shape[-1] < weights.shape[-2]:
        raise ValueError("weights must be (..., n_queries, n_keys) with n_keys >= "
                         f"n_queries, got shape {weights.shape}")
    if budget < 0:
        raise ValueError(f"budget must be a number of keys, got {budget}")

def mark_largest(scores, budget):
    """Boolean, True at the `budget` largest of each row (..., n_keys)."""
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :budget]
    keep = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(keep, best, True, axis=-1)
    return keep

# %% tags=["exercise", "export"] kind="numpy"
def keep_heavy(weights, budget, fair=False):
    """Half heavy hitters, half recent keys. weights (..., n_queries, n_keys), causal.

    With fair, weights count relative to an even share, and a key's sum is divided by
    the queries that could see it. Returns boolean (..., n_keys). ValueError for other
    weights. Source: Zhang et al. 2023 (arXiv 2306.14048), decided once.
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
keep_heavy = check("5G", keep_heavy)

# %% [markdown]
# **Whom does a sum favour?** *Predict.* A head looks at all keys evenly. Which keys are its heavy hitters?

# %%
even = np.tri(12) / np.arange(1, 13)[:, None]
visible, seen_by = np.arange(1, 13), 12 - np.arange(12)
print("column sums:     ", even.sum(0).round(2))
print("kept, 4 of 12:   ", np.flatnonzero(keep_heavy(even, 4)))
print("relative to even:", ((even * visible[:, None]).sum(0) / seen_by).round(2))

# %% [markdown]
# The oldest, though none was preferred: more queries saw them, and early queries had few to choose from. H2O's recent half is there for
# that reason. And a policy is as good as its guess about the next question: a benchmark whose question stands in the
# prompt before the cut tells it what will be asked. (H2O's abstract: up to 29 times the throughput of two systems of its time
# with 20 % heavy hitters; SnapKV's: 3.6 times the speed of decoding at 16,000 tokens.)

# %% [markdown]
# ### 5.15 Merging the splits
#
# **Is the log-sum-exp a harmless number?** Two splits with 128 and 16 keys, all scores equal: the first has $128/144$ of the
# sum. *Predict.* What is its share if all scores are a million?

# %%
for level in (0, 10_000, 1_000_000):
    precise = level + np.log([128, 16])
    single_share = softmax(precise.astype(np.float32))[0]
    print(f"scores of {level:9,}: share {single_share:.4f} in single precision, "
          f"{softmax(precise)[0]:.4f} in double")

# %% [markdown]
# At a million the steps of float32 are 1/16, so splits hand over doubles. A split without keys has a sum of 0 and a log-sum-exp of
# $-\infty$. Two traps: if *all* are empty, $-\infty - (-\infty)$ is nan; and 0 times nan is nan, so a share of 0 does not
# protect from an output that nobody wrote.
#
# #### Exercise 5H: merge the splits  (difficulty 3 of 5, extra, 25 minutes)
#
# One warp merges all splits of one row. The launch is `kernel[rows, 32, 4 * n_splits](outs, lses, out, n_splits, d)`.
#
# |argument|shape|meaning|
# |---|---|---|
# |`outs`|`(rows, n_splits, d)`|each split's output, divided by its sum; anything where its lse is $-\infty$|
# |`lses`|`(rows, n_splits)`, double|each split's log-sum-exp; $-\infty$ for a split without keys|
# |`out`|`(rows, d)`|the output over all keys; zeros for a row without keys|
# |`n_splits`, `d`|int|at least 1, of any size|
# |`share`|`n_splits` floats|the block's shared memory|
#
# Returns nothing; it writes `out`. Each output is read once, those of empty splits not at all. Every lane must call
# `warp_max` and `warp_sum`.
#
# <details><summary>Hint</summary>
#
# A softmax over the splits first: which splits has lane l, and which difference must be taken in double? By what do you replace
# a largest of $-\infty$, and a sum of 0? Then the lanes turn to the columns: what must they wait for (`__syncwarp()`)?
#
# </details>

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

# %% tags=["exercise", "export"] kind="kernel"
MERGE_SPLITS = WARP + r"""
__global__ void merge_splits(const float* outs, const double* lses, float* out, int n_splits,
                             int d) {
  extern __shared__ float share[];
  // BEGIN SOLUTION
  size_t row = blockIdx.x;
  int lane = threadIdx.x;
  outs += row * n_splits * d;
  lses += row * n_splits;
  out += row * d;

  // the share of each split
  float top = -INFINITY, total = 0.0f;
  for (int s = lane; s < n_splits; s += 32) top = fmaxf(top, lses[s]);
  top = warp_max(top);
  if (top == -INFINITY) top = 0.0f;                      // no keys at all: every share is 0
  for (int s = lane; s < n_splits; s += 32) {
    share[s] = expf(lses[s] - top);                      // subtracted in double, then rounded
    total += share[s];
  }
  total = warp_sum(total);
  if (total == 0.0f) total = 1.0f;
  __syncwarp();                                          // all shares are there

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
MERGE_SPLITS = check("5H", MERGE_SPLITS)

# %% [markdown]
# How long should a split be? One text of 8,192 keys, $d = 128$, 8 heads of keys; the extra bytes are the queries read and the
# partial outputs written and read.

# %%
for size in (8192, 2048, 512, 128, 32, 8):
    count = 8192 // size
    bytes_more = (4 * (3 * count - 1) * 128 + 3 * 8 * count) / (4 * 2 * 8192 * 128)
    print(f"splits of {size:5,}: {busy(8 * count):4.0%} of the processors have a "
          f"block, extra bytes {bytes_more:5.1%}")

# %% [markdown]
# Splits of 2,048 leave most of the GPU idle, splits of 8 cost nearly a fifth more bytes; 128 are in between. A fixed size has one
# more merit: a row's result does not depend on its batch, to the last bit.

# %% [markdown]
# ### 5.16 How much memory holds nothing?
#
# Kwon et al. found in systems before theirs "only 20.4% - 38.2%" of the cache's memory in use (§ 1). *Predict.* A thousand requests of random
# lengths, each served for as many steps as it gets new tokens. Which share of what is reserved holds a token?

# %%
lots = np.random.default_rng(4)
prompt_sizes = np.clip(lots.lognormal(5.0, 1.0, size=1000), 4, 1024).astype(int)
new_sizes = np.clip(lots.lognormal(5.3, 0.8, size=1000), 1, 1024).astype(int)
held = np.concatenate([np.arange(p, p + o) for p, o in zip(prompt_sizes, new_sizes)])
page_sizes = 2 ** np.arange(9)
used = [held.sum() / (-(-held // size) * size).sum() for size in page_sizes]
reserved = held.mean() / 2048
ax = plotting.curves({"pages": used, "2,048 places each": [reserved] * 9}, x=page_sizes,
                     xlabel="tokens in a page", ylabel="share of memory in use",
                     title="Small pages waste almost nothing, reserved places most")
ax.set_xscale("log", base=2)
plotting.show("Share of memory in use against the page size: near one for small pages, "
              "falling for large ones, far above the level line of 2,048 places.")
print(f"pages of 16: {used[4]:.0%}, 2,048 places each: {reserved:.0%}, so "
      f"{used[4] / reserved:.1f} times as many requests fit")

# %% [markdown]
# **Trap.** *"PagedAttention gives a 2 to 4 times larger batch."* The paper claims 2 to 4 times the **throughput** at the same
# latency. How many more requests fit depends on their lengths; throughput grows less, because each text's cache has to be read.

# %% [markdown]
# ### 5.17 Room to say nothing
#
# **Where does a small model put its sink?** *Bigram-Backcopy* (Guo et al. 2024): every text begins with token 0; behind a *trigger* (1
# to 4) comes a copy of the token before it, behind any other token one from a fixed table, for which no attention is needed. One
# layer, one head. *Predict.* Where does the head look from a trigger, and where from any other token?

# %%
from attention.experiments.kv_cache import (copying_texts, is_trigger, look_at_sink,
                                            train_copier)
from attention.multi_head import record

copier = train_copier(seed=0)
copied = torch.from_numpy(copying_texts(np.random.default_rng(11), 1, 17))
with record(copier, ("weights",)) as noted, torch.no_grad():
    copier(copied[:, :-1])
names = [f"{'!' if is_trigger(i) else ''}{i}" for i in copied[0, :-1].tolist()]
plotting.heatmap(noted["blocks.0.attention.weights"][0, 0].numpy(), names, names,
                 title="A trigger (!) looks at the token before it, others at token 0")
plotting.show("Attention weights of 16 tokens: rows of triggers are bright just left "
              "of the diagonal, most other rows in the first column.")
found = look_at_sink(copier)
print(f"weight on token 0: from others {found['mass']:.1f}, from triggers "
      f"{found['mass_trigger']:.1f}; its value {found['value_ratio']:.1f} as long")

# %% [markdown]
# So a sink is how a head says "nothing" when a softmax does not let it. What if the weights need not sum to 1? Add 1 to the
# denominator (E. Miller 2023, *Attention is off by one*, blog post): $w_j = e^{s_j} / (1 + \sum_i e^{s_i})$, which is one more key of zeros with a
# value of zeros, `NullKey`. The gpt-oss models (OpenAI 2025, model card, arXiv 2508.10925) learn its score for each head, `LearnedSink`. Three
# seeds of each, recorded:

# %%
for kind, runs in recorded["sinks"].items():
    mass, null = (" ".join(f"{run[key]:.2f}" for run in runs)
                  for key in ("mass", "null"))
    lost = np.mean([run["evicted"] - run["loss"] for run in runs])
    print(f"{kind:12s} on token 0: {mass}, null key: {null}, "
          f"without token 0 {lost:+.3f} nats")

# %% [markdown]
# The learned sink cut the weight on token 0 to less than half in all three runs, off by one in one of three: a score of 0 can be too
# low. Losing token 0 costs these little models almost nothing; the damage of 5.7 needs a large one.

# %% [markdown]
# ### 5.18 Positions inside the cache
#
# StreamingLLM counts positions *inside* the cache: the newest token of a full cache of 64 is always at position 63. When a
# token is dropped, those behind it move up; with RoPE that is a turn by -1. `SinkKVCache` turns each key from how it came, so
# that rounding does not add up:

# %%
from attention.kv_cache import SinkKVCache
from attention.rotary import Rotary

rope = Rotary(32)
many = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1, 1000, 32)))
streaming = SinkKVCache(512, n_sinks=4, frequencies=rope.frequencies)
for t in range(1000):
    turned = rope.rotate(many[:, :, t:t + 1], torch.tensor([streaming.length]))
    now, _ = streaming.update(turned, turned)
stay = torch.cat([many[:, :, :4], many[:, :, -508:]], dim=2)
gap = (now - rope.rotate(stay, torch.arange(512))).abs().max()
print(f"512 of 1,000 keys against one turn: difference {gap:.6f}")

# %% [markdown]
# It matters past the trained length: the way back to a sink would otherwise grow with the text (lecture 03 has what happens then).

# %% [markdown]
# ### 5.19 Beams
#
# **Do more beams find a likelier text?** `beam_search` keeps the `width` likeliest beginnings; `reorder` moves the cache's rows with
# them. *Predict.* Is the best of four beams at least as likely as the greedy text, twelve tokens long?

# %% tags=["language-model"]
from attention.kv_cache import beam_search

if smollm:
    for opening in ("The sun rises in the east and",
                    "A good way to learn a language is"):
        start = smollm.encode(opening)
        totals = {width: beam_search(writer, start, 12, width, new_caches(
            smollm, width, start.shape[1] + 12))[1][0] for width in (1, 4)}
        print(f"{opening!r}: log probability greedy {totals[1]:.1f}, "
              f"best of four beams {totals[4]:.1f}")

# %% [markdown]
# Not always: the greedy text may be crowded out by beginnings that end badly.

# %% [markdown]
# ### 5.20 Slim attention
#
# **Must values be stored?** Keys are $K = XW_K$, values $V = XW_V$. If $W_K$ is square and invertible, $V = K\,W_K^{-1}W_V$: half
# of the cache is redundant (Graef and Wasielewski 2025, arXiv 2503.05840). *Predict.* A cache is stored in half precision. What does $W_K^{-1}$
# do to the rounding?

# %% tags=["export"]
def values_from_keys(k, w_k, w_v):
    """Slim attention: values x @ w_v of tokens with keys k = x @ w_k, before RoPE.

    k (..., d_model), all heads side by side; w_k square, else ValueError; w_v (d_model,
    d_out). NumPy. Exact as far as w_k is well conditioned. Source: arXiv 2503.05840.
    """
    if w_k.shape[0] != w_k.shape[1]:
        raise ValueError("w_k must be square to be inverted, got shape "
                         f"{w_k.shape}: grouped heads cannot be slim")
    return k @ np.linalg.solve(w_k, w_v)

# %%
def slim_error(seed, condition, d=64):
    """Relative error of V, rebuilt from rounded keys, and stored."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(2))
    w_k = left * np.geomspace(1, 1 / condition, d) @ right
    x, w_v = rng.standard_normal((200, d)), rng.standard_normal((d, d)) / 8
    k, v = x @ w_k, x @ w_v
    rebuilt = values_from_keys(k.astype(np.float16).astype(float), w_k, w_v)
    return [np.linalg.norm(a - v) / np.linalg.norm(v)
            for a in (rebuilt, v.astype(np.float16))]

conditions = np.array([1, 10, 100, 1000, 10_000])
errors = np.array([[slim_error(seed, c) for c in conditions] for seed in range(3)])
print("rebuilt:", errors[..., 0].mean(0).round(3),
      f"stored: {errors[..., 1].mean():.4f}")
plotting.curves({"rebuilt from keys": errors[..., 0], "stored": errors[..., 1]},
                x=np.log10(conditions), ylabel="relative error of V",
                xlabel="log10 of the condition number of W_K", log_y=True,
                title="Slim attention is as exact as W_K is well conditioned")
plotting.show("Relative error of the values, logarithmic: stored values stay near "
              "0.0002, rebuilt ones climb with the condition number.")

# %% [markdown]
# Half the cache, for square, well-conditioned $W_K$ and keys kept before RoPE. With grouped heads (lecture 08) a key has fewer
# numbers than its $x$, and the form is gone; `values_from_keys` refuses.

# %% [markdown]
# ### 5.21 Failure modes of long contexts
#
# Four are usually listed. **Sinks**: 5.7. **Positions** never trained: the cache of 5.9 ends at 768; what follows is told that it stands
# further on.

# %% tags=["language-model"]
if smollm:
    for gap in (0, 4_000, 12_000):
        far = loss_after(smollm, exact, None, story[:, 768:], gap)
        print(f"a gap of {gap:6,} positions: loss {far:.2f}")

# %% [markdown]
# **Blow-up**: nothing bounds a score, and half precision ends at 65,504. **Uniform attention**: one key fits better than $n - 1$
# others by a gap $g$; its weight is $e^g / (e^g + n - 1)$.

# %%
for size in (22, 23):
    with np.errstate(over="ignore"):
        score = np.float16(128 * size * size)
    print(f"128 entries of {size}: score {score} in half precision")
for n in (100, 10_000, 1_000_000):
    share = math.exp(5) / (math.exp(5) + n - 1)
    print(f"{n:9,} keys: at gap 5 weight {share:.4f}; gap needed for one half "
          f"{math.log(n - 1):.1f}")

# %% [markdown]
# Diluted is not uniform, and no law: a gap that grows as $\ln n$ holds one half.

# %% [markdown]
# ### 5.22 Bits in bytes
#
# Codes of 2 or 4 bits are packed into bytes, or nothing is saved; minimum and step are stored too. *Predict.* By what factor is an int4
# cache smaller than one in half precision? An int8 cache?

# %%
from attention.kv_cache import QuantizedKVCache

normal = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4, 256, 32)))
for bits in (8, 4, 2):
    per_number = {}
    for d in (32, 16):
        in_bits = QuantizedKVCache(bits, group=32)
        in_bits.update(normal[..., :d], normal[..., :d])
        per_number[d] = 8 * in_bits.n_bytes / (2 * normal[..., :d].numel())
    print(f"int{bits}: {per_number[32]:.0f} bits a number, {16 / per_number[32]:.1f} "
          f"times smaller than in half precision; d_head 16: {per_number[16]:.1f} bits")

# %% [markdown]
# **4 bits are 5 bits**: 3.2 times, not 4; at 2 bits minimum and step are a third of the cache. And a group is packed only after it was handed
# out: its minimum and step would tell a token about later ones.

# %% [markdown]
# ## Behind the scenes
#
# **Checks of arguments**, caches for a whole model, and the choice of a token.

# %%
import functools
import itertools

from attention.multi_head import masked_softmax
from attention.rotary import apply_rope_torch
from torch.nn import functional as F

# %% tags=["export", "plumbing"]
def whole_numbers(name, x):
    """An array or tensor of integers of any type, on any device, as NumPy array int64. ValueError for others."""
    if isinstance(x, torch.Tensor):
        x = (x.double() if x.is_floating_point() else x).detach().cpu().numpy()
    x = np.asarray(x)
    if x.size and x.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {x.dtype}")
    return x.astype(np.int64)

def new_caches(model, batch, capacity):
    """An empty KVCache for each layer of a model, in the float type of its weights and where they lie."""
    c, w = model.config, model.embedding.weight
    n_heads = getattr(c, "n_kv_heads", c.n_heads)                    # some models have fewer heads of keys: lecture 08
    return [KVCache(batch, n_heads, capacity, c.d_head, w.dtype, w.device) for _ in range(c.n_layers)]

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

# %% tags=["export", "plumbing"]
def forward_flops(n_new, n_keys, d_model, d_ff, n_layers, vocab_size):
    """Operations of all matrix products when a TransformerLM reads n_new tokens and then has n_keys keys.

    n_new, n_keys integers (n,); the sizes as in TransformerConfig. Returns an integer array (n,).
    """
    n_new, n_keys = (np.asarray(n, np.int64) for n in (n_new, n_keys))          # in 32 bits they would overflow
    projections = 2 * n_new * (4 * d_model**2 + 2 * d_model * d_ff)
    attention = 2 * n_new * n_keys * 2 * d_model                       # scores, and the weighted sum of values
    return n_layers * (projections + attention) + 2 * n_new * d_model * vocab_size

def left_padding(lengths, n_keys):
    """Mask (batch, 1, 1, n_keys) and positions (batch, n_keys) of rows whose last lengths[b] columns are tokens.

    Positions count from each row's first token; padding gets 0. Raises ValueError for a length outside 0 to n_keys.
    """
    lengths = whole_numbers("lengths", lengths)
    if lengths.size and (lengths.min() < 0 or lengths.max() > n_keys):
        raise ValueError(f"lengths must lie between 0 and n_keys = {n_keys}, got {lengths.tolist()}")
    positions = np.arange(n_keys) - (n_keys - lengths[:, None])
    return (positions >= 0)[:, None, None, :], positions.clip(0)

# %% [markdown]
# **The ring and the pages.**

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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
# **Attention of one query**, from a rectangle and through a block table, in NumPy and PyTorch.

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
def used_entries(table, lengths, n_pages, page_size):
    """Where a block table names a page that its row needs, boolean. ValueError for a page that does not exist."""
    used = np.arange(table.shape[1]) < -(-lengths[:, None] // page_size)
    if (table[used] < 0).any() or (table[used] >= n_pages).any():
        raise ValueError(f"block_table must name pages 0 to {n_pages - 1}, got {table.tolist()}")
    return used

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
    if (lengths > table.shape[1] * pages.shape[1]).any():
        raise ValueError(f"block_table has room for {table.shape[1] * pages.shape[1]} tokens a row, got {lengths.tolist()}")
    used = used_entries(table, lengths, *pages.shape[:2])
    rows = pages[np.where(used, table, 0).astype(np.int64)]             # (batch, columns, page_size, heads, d_head)
    rows = rows.reshape(len(rows), rows.shape[1] * rows.shape[2], *rows.shape[3:]).swapaxes(1, 2)
    return rows.contiguous() if hasattr(rows, "contiguous") else np.ascontiguousarray(rows)

def check_paged_arguments(q, k_pages, v_pages, table, lengths):
    """Raise ValueError, in one sentence, unless pages fit q, and the table names those that the lengths need."""
    cuda.check_numbers(q=q, k_pages=k_pages, v_pages=v_pages)
    if len(k_pages.shape) != 4 or len(q.shape) == 3 and k_pages.shape[2] != q.shape[1]:
        raise ValueError(f"pages must be (n_pages, page_size, heads, d_head) with heads and d_head of q, "
                         f"{tuple(q.shape[1:])}, got shape {tuple(k_pages.shape)}")
    if table.ndim != 2 or len(q.shape) == 3 and len(table) != len(q):
        raise ValueError(f"block_table must be ({len(q)}, columns), got shape {table.shape}")
    check_decode_arguments(q, k_pages, v_pages, lengths, table.shape[1] * k_pages.shape[1])
    used_entries(table, whole_numbers("lengths", lengths), *k_pages.shape[:2])

def gather_both(q, k_pages, v_pages, block_table, lengths):
    """gather_pages of keys and of values; ValueError unless they fit together and q."""
    check_paged_arguments(q, k_pages, v_pages, whole_numbers("block_table", block_table), lengths)
    return [gather_pages(pages, block_table, lengths) for pages in (k_pages, v_pages)]

# %% tags=["export", "plumbing"]
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
# **Other ways to write**: ragged batches, beams, guesses.

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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
# **Sinks**: a null key, a learned one, and a cache of sinks and a window.

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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
# **Policies**, and a cache of what they keep.

# %% tags=["export", "plumbing"]
def keep_sinks(weights, budget, n_sinks=4):
    """The first n_sinks keys and the most recent ones, as StreamingLLM (arXiv 2309.17453).

    weights (..., n_queries, n_keys); returns boolean (..., n_keys), True = kept.
    """
    check_budget(weights, budget)
    scores = np.arange(weights.shape[-1], dtype=float)
    scores[:n_sinks] = np.inf
    return mark_largest(np.broadcast_to(scores, weights[..., 0, :].shape), budget)

def keep_window(weights, budget):
    """The `budget` most recent keys. Shapes as keep_sinks."""
    return keep_sinks(weights, budget, n_sinks=0)

def random_with_sinks(weights, budget, seed=0, n_sinks=4):
    """The first n_sinks keys and any others: the control of a policy that keeps the sink. Shapes as keep_sinks."""
    check_budget(weights, budget)
    scores = np.random.default_rng(seed).random(weights[..., 0, :].shape)
    scores[..., :n_sinks] = np.inf
    return mark_largest(scores, budget)

def keep_random(weights, budget, seed=0):
    """Any `budget` keys, drawn for each row: what a policy has to beat. Shapes as keep_sinks."""
    return random_with_sinks(weights, budget, seed, n_sinks=0)

# %% tags=["export", "plumbing"]
def keep_voted(weights, budget, n_voters=8, width=1):
    """The keys that the last n_voters queries looked at most, and those of the voters. Shapes as keep_sinks.

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
# **Fewer bits.**

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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

# %% [markdown]
# **Kernels**: the contiguous and the paged form, and how both are launched. `[=](int j) { ... }` is a function without a
# name that knows the variables around it.

# %% tags=["export", "plumbing"]
DECODE_SPLIT = WARP + ATTEND_SPLIT + r"""
__global__ void decode_split(const float* q, const float* k, const float* v, const int* lengths, float* outs,
                             double* lses, int capacity, int heads, int d, float scale) {
  size_t row = blockIdx.x, split = row * gridDim.y + blockIdx.y;            // (batch, heads) and their splits
  attend_split(q + row * d, k, v, outs + split * d, lses + split, lengths[row / heads], d, scale,
               [=](int j) { return (row * capacity + j) * d; });
}
"""

PAGED_KERNEL = r"""
__global__ void paged_split(const float* q, const float* k, const float* v, const int* lengths, float* outs,
                            double* lses, const int* block_table, int columns, int page_size, int heads, int d,
                            float scale) {
  size_t row = blockIdx.x, split = row * gridDim.y + blockIdx.y;
  int b = row / heads, h = row % heads;
  attend_split(q + row * d, k, v, outs + split * d, lses + split, lengths[b], d, scale,
               [=](int j) { return key_offset(block_table, columns, b, h, j, page_size, heads, d); });
}
"""
PAGED_SPLIT = WARP + ATTEND_SPLIT + KEY_OFFSET + PAGED_KERNEL

# %% tags=["export", "plumbing"]
SPLIT = 128                                                 # keys of a split, as in ATTEND_SPLIT

@functools.cache
def merge_kernel():
    """Compiled on first use."""
    return cuda.compile(MERGE_SPLITS)

@functools.cache
def split_kernel(source):
    """Compiled on first use."""
    return cuda.compile(source)

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

# %% tags=["export", "plumbing"]
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
    return in_splits(split_kernel(DECODE_SPLIT), q, k_cache, v_cache, lengths, scale, k_cache.shape[2])

def paged_decode_attention_cuda(q, k_pages, v_pages, block_table, lengths, scale=None):
    """paged_decode_attention_numpy by two CUDA kernels: no page is copied. Same arguments, shapes and errors.

    Arrays, tensors, types and limits as in decode_attention_cuda; block_table may lie anywhere. Entries behind a row's
    last page are not read.
    """
    table = whole_numbers("block_table", block_table).astype(np.int32)
    check_paged_arguments(q, k_pages, v_pages, table, lengths)
    return in_splits(split_kernel(PAGED_SPLIT), q, k_pages, v_pages, lengths, scale, table, table.shape[1], k_pages.shape[1])

# %% tags=["export", "plumbing"]
def random_cache(lengths, heads, capacity, d, seed=5):
    """q, k_cache, v_cache in float32, nan behind the end of each row, and the lengths as int32."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((len(lengths), heads, d)).astype(np.float32)
    k, v = (rng.standard_normal((len(lengths), heads, capacity, d)).astype(np.float32) for _ in range(2))
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = np.nan, np.nan
    return q, k, v, np.array(lengths, np.int32)

def cut_into_pages(cache, lengths, page_size, order):
    """Pages (len(order), page_size, heads, d), nan where no token is, and a block table, in the given order of pages."""
    pages = np.full((len(order), page_size, cache.shape[1], cache.shape[3]), np.nan, np.float32)
    table, free = np.full((len(lengths), -(-max(lengths) // page_size)), -1, np.int32), iter(order)
    for b, n in enumerate(lengths):
        for column in range(-(-n // page_size)):
            here = cache[b, :, column * page_size:min(n, (column + 1) * page_size)]
            table[b, column] = next(free)
            pages[table[b, column], :here.shape[1]] = here.swapaxes(0, 1)
    return pages, table

# %% [markdown]
# **Two people on one GPU**, for 5.4, and the copier of 5.17.

# %% tags=["export", "plumbing"]
def schedule(prompt, chunk, n_weights=8.03e9):
    """(start, end) in milliseconds of Ben's pieces of a prompt and of Anna's tokens, on an H100; two bytes a weight."""
    a_step = 2e3 * n_weights / 3.35e12  # all weights are read
    clock, anna, ben = 0.0, [], []
    for piece in [0] * 4 + [chunk] * (prompt // chunk) + [0] * 4:
        end = clock + max(a_step, 2e3 * n_weights * piece / 989e12)  # or multiplied with each token
        if piece:
            ben.append((clock, end))
        if piece < prompt:
            anna.append((clock, end))
        clock = end
    return {"Ben's prompt": ben, "Anna's tokens": anna}


# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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

# %% tags=["export", "plumbing"]
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

# %% [markdown]
# **In the language model**: what is read off it, and what is changed.

# %% tags=["export", "plumbing"]
@torch.no_grad()
def sink_and_stream(model, ids, layer=11, first=64):
    """What a language model does with token 0 of ids (1, n). Returns three tensors.

    Its weight in each head, mean over the queries from `first` on (layers, heads); the length of its value over the mean of the
    others' (layers, key heads); and the sizes of the numbers after a layer (n, d_model).
    """
    on_first, streams, caches = [], [], model.new_caches()

    def watch(q, k, v, causal):
        weights = masked_softmax(q @ k.mT / math.sqrt(q.shape[-1]), causal=True)
        on_first.append(weights[0, :, first:, 0].mean(-1))
        return weights @ v

    hook = model.blocks[layer].register_forward_hook(lambda block, given, stream: streams.append(stream[0].abs()))
    try:
        model.replace(attention=watch).hidden(ids, caches=caches)
    finally:
        hook.remove()
    norms = torch.stack([cache.v[0].norm(dim=-1) for cache in caches])
    return torch.stack(on_first), norms[..., 0] / norms[..., 1:].mean(-1), streams[0]

def loss_with_entry(model, ids, entry, value, layer=11):
    """The loss of a language model on ids (1, n) where after a layer one number of token 0 is set to a value."""
    def change(block, given, stream):
        stream = stream.clone()
        stream[0, 0, entry] = value
        return stream

    hook = model.blocks[layer].register_forward_hook(change)
    try:
        return float(model.losses(ids).mean())
    finally:
        hook.remove()

# %% tags=["export", "plumbing"]
def passkey(model, prose, key, depth):
    """A pass key (a string of digits with a space in front) in prose, ids (1, n), and the question for it at the end.

    depth: where, as a share. Returns ids (1, n) without the last token, and that token with the key's, (1, n_key + 1).
    """
    ids = prose[0].tolist()
    at = int(depth * len(ids))
    ids[at:at] = model.encode(f" The pass key is{key}. Remember it:{key} is the pass key.")[0].tolist()
    ids += model.encode(" What is the pass key? The pass key is")[0].tolist()
    return torch.tensor([ids[:-1]]), torch.tensor([ids[-1:] + model.encode(key)[0].tolist()])

@torch.no_grad()
def read_and_choose(model, ids, choices):
    """Read ids (1, n) and let policies choose. choices: {name: (policy, budget)}, asked for each layer and key head.

    Returns full KVCaches, and {name: [boolean (1, n_kv_heads, n) of each layer]}. The weights of a key head are the mean over
    its query heads.
    """
    caches, kept = new_caches(model, 1, ids.shape[1]), {name: [] for name in choices}
    n_kv_heads = model.config.n_kv_heads

    def watch(q, k, v, causal):
        weights = masked_softmax(q @ k.mT / math.sqrt(q.shape[-1]), causal=True)
        of_group = weights.unflatten(1, (n_kv_heads, -1)).mean(2).numpy()
        for name, (policy, budget) in choices.items():
            kept[name].append(policy(of_group, budget))
        return weights @ v

    model.replace(attention=watch).hidden(ids, caches=caches)
    return caches, kept

def loss_after(model, caches, kept, ids, gap=0):
    """The loss of all tokens of ids (1, n) but the first, after full KVCaches of which each keeps what `kept` says.

    kept: as read_and_choose gives it; None keeps all. Positions go on where the text ended, and `gap` further.
    """
    end, n_new = caches[0].length, ids.shape[1]
    everything = np.ones((1, caches[0].k.shape[1], end), dtype=bool)
    smaller = [evict(cache, everything if kept is None else kept[i], n_new) for i, cache in enumerate(caches)]
    return float(model.losses(ids, caches=smaller, positions=end + gap + torch.arange(n_new)).mean())

# %% tags=["export", "plumbing"]
def look_up(ids, n_draft=8, longest=3):
    """Guess what follows ids (1, n): what followed its last tokens where they last stood before. Returns a list."""
    tokens = ids[0].tolist()
    for n in range(longest, 0, -1):
        for at in range(len(tokens) - n - 1, -1, -1):
            if tokens[at:at + n] == tokens[-n:]:
                return tokens[at + n:at + n + n_draft]
    return []

# %% [markdown]
# ## Glossary
#
# |term|what it is|
# |---|---|
# |attention sink|a key that many queries look at and that hands over little|
# |block table|the pages of each text, in order|
# |copy on write|a shared page is copied when one of its readers writes into it|
# |decode|passes that add one token each|
# |eviction policy|a rule that says which keys stay|
# |heavy hitter|a key that was looked at much so far|
# |KV cache|keys and values of all tokens so far, kept for each layer|
# |left padding|padding in front, so that the last tokens of a batch stand in one column|
# |massive activation|one number of a token's vector, thousands of times as large as the others|
# |page|a small piece of cache memory, lent to one text or shared by several|
# |prefill|the pass over the prompt; in chunks, several passes|
# |prompt lookup|guesses that are copied from the text itself|
# |ragged batch|texts of different lengths that are continued together|
# |ring|a cache of the last tokens, in which a new one takes the place of the oldest|
# |slim attention|values computed from keys, so that they need not be stored|
# |speculative decoding|guesses that the model verifies in one pass|
# |split|a part of the keys on which one block works; merged by log-sum-exp|
#
# ## Sources
#
# Leviathan, Kalman, Matias 2022 (arXiv 2211.17192) · Zhang et al. 2023, H2O (2306.14048) · Agrawal et al. 2023 (2308.16369) and 2024
# (2403.02310) · Kwon et al. 2023, PagedAttention (2309.06180) · Xiao et al. 2023, StreamingLLM (2309.17453) · E. Miller 2023,
# Attention is off by one (blog post) · Dao, Haziza, Massa, Sizov 2023, Flash-Decoding (blog post) · Liu et al. 2024, KIVI (2402.02750) · Sun
# et al. 2024, massive activations (2402.17762) · Li et al. 2024, SnapKV (2404.14469) · Guo et al. 2024 (2410.13835) · Allal et al. 2025, SmolLM2 (2502.02737) ·
# Graef, Wasielewski 2025, slim attention (2503.05840) · OpenAI 2025, gpt-oss model card (2508.10925) · data sheet of the H100 SXM.
