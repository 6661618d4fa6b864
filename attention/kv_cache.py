# Generated from solutions/05_kv_cache.py by `python course.py build`. Edit that file, not this one.
"""Lecture 05 · KV cache: the finished code."""

import math

import numpy as np
import torch

from attention.fundamentals import softmax


class KVCache:
    """Keys and values of one layer, in memory that is taken once: (batch, n_heads, capacity, d_head) each."""

    def __init__(self, batch, n_heads, capacity, d_head, dtype=torch.float64):
        self.k = torch.zeros(batch, n_heads, capacity, d_head, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.length = 0

    @property
    def n_bytes(self):
        """Bytes of the memory taken, used or not."""
        return self.k.nbytes + self.v.nbytes

    def update(self, k, v):
        """Store k and v (batch, n_heads, n_new, d_head); return all keys and values so far. ValueError when full."""
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


class RingKVCache:
    """The keys and values of the last `window` tokens of one layer; a new token takes the place of the oldest."""

    def __init__(self, batch, n_heads, window, d_head, dtype=torch.float64):
        self.k = torch.zeros(batch, n_heads, window, d_head, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.length = 0

    @property
    def n_bytes(self):
        """Bytes of the memory taken; they do not grow with the length."""
        return self.k.nbytes + self.v.nbytes

    def update(self, k, v):
        """Store one token's k and v (batch, n_heads, 1, d_head); return those of the last `window` tokens, oldest first.

        ValueError for more tokens than one: the first of them would have to see keys that the last has overwritten.
        """
        if k.shape[2] != 1:
            raise ValueError(f"a ring takes one token at a time, got {k.shape[2]}")
        window = self.k.shape[2]
        slot = self.length % window
        self.k[:, :, slot], self.v[:, :, slot] = k[:, :, 0], v[:, :, 0]
        self.length += 1
        if self.length < window:
            return self.k[:, :, :self.length], self.v[:, :, :self.length]
        oldest_first = torch.arange(self.length, self.length + window) % window
        return self.k[:, :, oldest_first], self.v[:, :, oldest_first]


class PagePool:
    """Pages of keys and values of one layer, (n_pages, page_size, n_heads, d_head) each, lent out and counted."""

    def __init__(self, n_pages, page_size, n_heads, d_head, dtype=torch.float64):
        self.k_pages = torch.zeros(n_pages, page_size, n_heads, d_head, dtype=dtype)
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
    """Keys and values of some sequences of one layer, in pages of a PagePool; block_table[b] lists those of row b."""

    def __init__(self, pool, batch):
        self.pool = pool
        self.tables = [[] for _ in range(batch)]
        self.length = 0

    @property
    def block_table(self):
        """Page numbers, int32 (batch, pages of each row), for paged_decode_attention."""
        return np.array(self.tables, dtype=np.int32)

    def update(self, k, v):
        """Store k and v (batch, n_heads, n_new, d_head); return all so far, gathered. MemoryError when pages run out."""
        size = self.pool.page_size
        for row, table in enumerate(self.tables):
            for new in range(k.shape[2]):
                page, slot = divmod(self.length + new, size)
                if page == len(table):
                    table.append(self.pool.take())
                table[page] = self.pool.own(table[page])
                self.pool.k_pages[table[page], slot] = k[row, :, new]
                self.pool.v_pages[table[page], slot] = v[row, :, new]
        self.length += k.shape[2]
        return self._gather(self.pool.k_pages), self._gather(self.pool.v_pages)

    def _gather(self, pages):
        """(batch, n_heads, length, d_head), contiguous."""
        rows = pages[torch.tensor(self.tables)].flatten(1, 2)[:, :self.length]
        return rows.transpose(1, 2).contiguous()

    def fork(self, rows):
        """A cache whose row i begins as row rows[i] of this one, sharing its pages until one of them writes."""
        other = PagedKVCache(self.pool, 0)
        other.tables, other.length = [list(self.tables[row]) for row in rows], self.length
        for table in other.tables:
            for page in table:
                self.pool.share(page)
        return other

    def close(self):
        """Give all pages back."""
        for table in self.tables:
            for page in table:
                self.pool.release(page)
        self.tables, self.length = [], 0


def check_decode_arguments(q, k, v, lengths, capacity):
    """Raise ValueError, in one sentence, unless a query for each head and a cache fit together."""
    if len(q.shape) != 3:
        raise ValueError(f"q must be (batch, heads, d_head), got shape {tuple(q.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"keys and values must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    lengths = np.asarray(lengths)
    if lengths.shape != (q.shape[0],):
        raise ValueError(f"lengths must be ({q.shape[0]},), one for each row of q, got shape {lengths.shape}")
    if lengths.size and (lengths.min() < 0 or lengths.max() > capacity):
        raise ValueError(f"lengths must lie between 0 and {capacity}, got {lengths.tolist()}")

def decode_attention_numpy(q, k_cache, v_cache, lengths, scale=None):
    """One query for each head attends to the first lengths[b] keys of its row of a cache, in NumPy.

    q (batch, heads, d_head), k_cache and v_cache (batch, heads, capacity, d_head), lengths integers (batch,); scale
    defaults to 1/sqrt(d_head). Returns (batch, heads, d_head) in the float type of q; a row of length 0 gets zeros.
    Raises ValueError when shapes or lengths do not fit.
    """
    check_decode_arguments(q, k_cache, v_cache, lengths, k_cache.shape[2])
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    work = np.result_type(q, np.float32)
    out = np.zeros(q.shape, work)
    for row, length in enumerate(np.asarray(lengths)):
        k, v = (cache[row, :, :length].astype(work) for cache in (k_cache, v_cache))
        weights = softmax(np.einsum("hd,hnd->hn", q[row].astype(work), k) * scale)
        out[row] = np.einsum("hn,hnd->hd", weights, v)
    return out.astype(np.result_type(q, np.float16), copy=False)

def decode_attention_torch(q, k_cache, v_cache, lengths, scale=None):
    """decode_attention_numpy in PyTorch: all rows at once, differentiable. Same arguments, shapes and errors."""
    check_decode_arguments(q, k_cache, v_cache, lengths, k_cache.shape[2])
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    work = torch.promote_types(q.dtype, torch.float32)
    lengths = torch.as_tensor(lengths, device=q.device)[:, None, None]
    inside = torch.arange(k_cache.shape[2], device=q.device) < lengths                        # (batch, 1, capacity)
    scores = torch.einsum("bhd,bhnd->bhn", q.to(work), k_cache.to(work)) * scale
    weights = torch.softmax(scores.masked_fill(~inside & (lengths > 0), -math.inf), dim=-1).masked_fill(~inside, 0)
    # What lies behind the end may be anything, even nan: 0 * nan is nan, so it is replaced before the product.
    values = v_cache.to(work).masked_fill(~inside[..., None], 0)
    return torch.einsum("bhn,bhnd->bhd", weights, values).to(q.dtype)


def gather_pages(pages, block_table, lengths):
    """The rows of a paged cache, contiguous: (batch, heads, table columns * page_size, d_head). Arrays and tensors.

    pages (n_pages, page_size, heads, d_head); block_table integers (batch, columns), unused entries -1; row b needs
    ceil(lengths[b] / page_size) entries. ValueError for a page that does not exist.
    """
    table = np.asarray(block_table)
    used = np.arange(table.shape[1]) < -(-np.asarray(lengths)[:, None] // pages.shape[1])
    if table.ndim != 2 or (np.asarray(lengths) > table.shape[1] * pages.shape[1]).any():
        raise ValueError(f"block_table has room for {table.shape[-1] * pages.shape[1]} tokens a row, got lengths {lengths}")
    if (table[used] < 0).any() or (table[used] >= pages.shape[0]).any():
        raise ValueError(f"block_table must name pages 0 to {pages.shape[0] - 1}, got {table.tolist()}")
    rows = pages[np.where(used, table, 0)]                              # (batch, columns, page_size, heads, d_head)
    return rows.reshape(rows.shape[0], -1, *rows.shape[3:]).swapaxes(1, 2)

def paged_decode_attention_numpy(q, k_pages, v_pages, block_table, lengths, scale=None):
    """decode_attention_numpy on a paged cache; pages (n_pages, page_size, heads, d_head), block_table (batch, columns).

    Entries of block_table behind a row's last page may be -1. Source: Kwon et al. 2023 (arXiv 2309.06180).
    """
    k, v = (gather_pages(pages, block_table, lengths) for pages in (k_pages, v_pages))
    return decode_attention_numpy(q, k, v, lengths, scale)

def paged_decode_attention_torch(q, k_pages, v_pages, block_table, lengths, scale=None):
    """paged_decode_attention_numpy in PyTorch. Same arguments, shapes and errors."""
    k, v = (gather_pages(pages, block_table, lengths) for pages in (k_pages, v_pages))
    return decode_attention_torch(q, k, v, lengths, scale)


def quantize(x, bits, axis):
    """Round x to 2**bits levels between its minimum and maximum along `axis`. Returns codes, minimum and step.

    x: floats. codes: uint8 of x's shape; minimum and step: float16, x's shape with `axis` of size 1.
    Dequantised: codes * step + minimum. ValueError for bits other than 2, 4 or 8.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 4 or 8, got {bits}")
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    minimum, step = low.half(), ((high - low) / (2**bits - 1)).half()
    safe = step.masked_fill(step == 0, 1).to(x.dtype)                   # all equal: every code is 0
    codes = ((x - minimum.to(x.dtype)) / safe).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return codes, minimum, step

def dequantize(codes, minimum, step, dtype):
    """The numbers that `quantize` stood for."""
    return codes.to(dtype) * step.to(dtype) + minimum.to(dtype)

def pack(codes, bits):
    """Put 8 / bits codes into each byte along the last axis, whose size must be a multiple of that."""
    per_byte = 8 // bits
    parts = codes.unflatten(-1, (-1, per_byte)).to(torch.int32) << (torch.arange(per_byte) * bits)
    return parts.sum(-1).to(torch.uint8)

def unpack(packed, bits):
    """The inverse of pack."""
    shifts = torch.arange(8 // bits) * bits
    return (packed[..., None].to(torch.int32) >> shifts & (2**bits - 1)).to(torch.uint8).flatten(-2)

class QuantizedKVCache:
    """Keys and values of one layer in `bits` bits, the last tokens (fewer than `group`) in full precision.

    Each group of tokens gets a minimum and a step, in half precision, for each channel of its keys and for each
    token of its values, the layout of KIVI (Liu et al. 2024, arXiv 2402.02750); key_axis="token" treats keys as values.
    """

    def __init__(self, bits, group=32, key_axis="channel"):
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
        """Store k and v (batch, n_heads, n_new, d_head); return all keys and values so far, dequantised."""
        self.length += k.shape[2]
        found = []
        for kind, new in enumerate((k, v)):
            recent = new if self.recent[kind] is None else torch.cat([self.recent[kind], new], dim=2)
            while recent.shape[2] >= self.group:
                codes, minimum, step = quantize(recent[:, :, :self.group], self.bits, self.axes[kind])
                self.stored[kind].append((pack(codes, self.bits), minimum, step))
                recent = recent[:, :, self.group:].clone()
            self.recent[kind] = recent
            old = [dequantize(unpack(packed, self.bits), minimum, step, new.dtype)
                   for packed, minimum, step in self.stored[kind]]
            found.append(torch.cat([*old, recent], dim=2))
        return tuple(found)


def sample(logits, temperature, top_k, rng):
    """Next tokens (batch,) from logits (batch, vocab_size); temperature 0 takes the largest."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    draws = torch.from_numpy(rng.random(len(logits))).to(logits.dtype)
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    return (cumulative < draws[:, None] * cumulative[:, -1:]).sum(-1)

@torch.no_grad()
def generate(model, ids, n_new, caches=None, temperature=0.0, top_k=None, seed=0):
    """Continue each row of ids by n_new tokens. ids integers (batch, n), all of one length. Returns (batch, n + n_new).

    caches: one for each layer, empty, with length and update(k, v); without them the whole text is read again for each
    token. temperature 0 is greedy; otherwise tokens are drawn, from the top_k likeliest if given, by numpy's
    default_rng(seed). ValueError for an empty prompt, a negative n_new or temperature, or a top_k below 1.
    """
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids must be (batch, n) with at least one token, got shape {tuple(ids.shape)}")
    if n_new < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"n_new and temperature must not be negative and top_k at least 1, got {n_new}, {temperature}, {top_k}")
    rng = np.random.default_rng(seed)
    unread = ids
    for _ in range(n_new):
        logits = model(unread, caches=caches)[:, -1] if caches is not None else model(ids)[:, -1]
        unread = sample(logits, temperature, top_k, rng)[:, None]
        ids = torch.cat([ids, unread], dim=1)
    return ids
