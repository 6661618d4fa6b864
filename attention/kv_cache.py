# Generated from solutions/05_kv_cache.py by `python course.py build`. Edit that file, not this one.
"""Lecture 05 · KV cache: the finished code."""

import functools
import itertools
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attention.fundamentals import attention_numpy, softmax
from attention.rotary import Rotary, apply_rope_torch
from utils import cuda

__all__ = [
    "decode_attention_numpy",
    "decode_attention_torch",
    "decode_attention_cuda",
    "paged_decode_attention_numpy",
    "paged_decode_attention_torch",
    "paged_decode_attention_cuda",
    "KVCache",
    "RingKVCache",
    "PagePool",
    "PagedKVCache",
    "QuantizedKVCache",
    "keep_window",
    "keep_sinks",
    "keep_random",
    "keep_heavy",
    "keep_voted",
    "evict",
    "generate",
]


def cached_step(x, keys, values, w_q, w_k, w_v):
    """New tokens x (n_new, d_model) join a cache of one head and attend to it.

    keys (n_old, d_head), values (n_old, d_v), w_q, w_k (d_model, d_head), w_v (d_model,
    d_v). Returns out (n_new, d_v), and keys and values with n_old + n_new rows.
    """
    keys = np.concatenate([keys, x @ w_k])
    values = np.concatenate([values, x @ w_v])
    return attention_numpy(x @ w_q, keys, values, causal=True), keys, values


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
        end = self.length + k.shape[2]
        self.k[:, :, self.length:end] = k
        self.v[:, :, self.length:end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def rewind(self, length):
        """Forget everything after the first `length` tokens."""
        check_length(length, self.length)
        self.length = length

    def reorder(self, rows):
        """Row i of the batch continues what row rows[i] was."""
        self.k, self.v = self.k[rows], self.v[rows]


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
        for _ in range(n_new):
            logits = model(ids) if caches is None else model(unread, caches=caches)
            unread = sample(logits[:, -1], temperature, top_k, rng)[:, None]
            ids = torch.cat([ids, unread], dim=1)
            if on_token is not None:
                on_token(unread)
        return ids


def place_code(places, d):
    """Sines and cosines of places (...,), integers: (..., d); d even."""
    angles = places[..., None] / 30.0 ** (np.arange(d // 2) / (d // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

def read_alone(x):
    """What each vector of one text x (n, d) finds, read at once and without a cache."""
    at = x + place_code(np.arange(len(x)), x.shape[1])
    return attention_numpy(at, at, x, causal=True)


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


def test_decoder(Decoder):
    """Raise AssertionError if a decoder of this class is wrong."""
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


KEY_OFFSET = r"""
__device__ size_t key_offset(const int* block_table, int columns, int b, int h, int j,
                             int page_size, int heads, int d) {
  size_t page = block_table[(size_t)b * columns + j / page_size];
  return ((page * page_size + j % page_size) * heads + h) * d;
}
"""


def verify_draft(draft, logits):
    """What greedy decoding would write: the draft as far as it is right, then its own.

    draft integers (n_draft,); logits (n_draft + 1, vocab_size), row i after draft[:i].
    Returns an integer array of 1 to n_draft + 1 tokens. Source: arXiv 2211.17192.
    """
    own = logits.argmax(-1)
    wrong = np.flatnonzero(own[:-1] != draft)
    n_accepted = wrong[0] if len(wrong) else len(draft)
    return own[:n_accepted + 1]


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


def keep_heavy(weights, budget, fair=False):
    """Half heavy hitters, half recent keys. weights (..., n_queries, n_keys), causal.

    With fair, weights count relative to an even share, and a key's sum is divided by
    the queries that could see it. Returns boolean (..., n_keys). ValueError for other
    weights. Source: Zhang et al. 2023 (arXiv 2306.14048), decided once.
    """
    check_budget(weights, budget)
    n_queries, n_keys = weights.shape[-2:]
    scores = weights.sum(-2, dtype=float)
    if fair:
        visible = np.arange(n_keys - n_queries, n_keys) + 1
        seen_by = np.minimum(n_queries, n_keys - np.arange(n_keys))
        scores = (weights * visible[:, None]).sum(-2) / seen_by
    recent = budget - budget // 2
    scores[..., max(n_keys - recent, 0):] = np.inf
    return mark_largest(scores, budget)


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


MERGE_SPLITS = WARP + r"""
__global__ void merge_splits(const float* outs, const double* lses, float* out, int n_splits,
                             int d) {
  extern __shared__ float share[];
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
}
"""


def values_from_keys(k, w_k, w_v):
    """Slim attention: values x @ w_v of tokens with keys k = x @ w_k, before RoPE.

    k (..., d_model), all heads side by side; w_k square, else ValueError; w_v (d_model,
    d_out). NumPy. Exact as far as w_k is well conditioned. Source: arXiv 2503.05840.
    """
    if w_k.shape[0] != w_k.shape[1]:
        raise ValueError("w_k must be square to be inverted, got shape "
                         f"{w_k.shape}: grouped heads cannot be slim")
    return k @ np.linalg.solve(w_k, w_v)


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
