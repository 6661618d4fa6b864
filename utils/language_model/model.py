"""A language model of the Llama kind in plain PyTorch, small enough to read, with parts that can be exchanged.

Each layer: x + attention(norm(x)), then x + feed_forward(norm(x)). What differs from the first Transformer: the norm is
RMSNorm and stands in front, positions rotate queries and keys, several query heads share one key and value head, and
the feed-forward part is gated. Source: Touvron et al. 2023 (arXiv 2302.13971), section 2.2; Ainslie et al. 2023 (2305.13245).
"""

import copy
from dataclasses import dataclass, fields, replace
from typing import Callable

import torch
from torch import nn
from torch.nn import functional as F

CHUNK = 256  # tokens whose logits are held at a time: 197 KB each


@dataclass(frozen=True)
class Config:
    """The sizes of a LanguageModel."""

    vocab_size: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    d_ff: int
    base: float = 10000.0
    epsilon: float = 1e-5

    @property
    def d_head(self):
        return self.d_model // self.n_heads


def attend(q, k, v, mask=None, causal=True):
    """Softmax attention, torch's own, with the last query at the last key (torch's is_causal begins at the first)."""
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    if causal and n_queries > 1:
        allowed = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
        mask = allowed if mask is None else allowed & mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def share(x, n_heads):
    """Give each query head its key or value head: (batch, n_kv_heads, n, d_head) -> (batch, n_heads, n, d_head).

    Neighbours share: with 9 heads on 3 they are 0 0 0 1 1 1 2 2 2.
    """
    return x.repeat_interleave(n_heads // x.shape[1], dim=1)


def rotate(x, positions, base=10000.0):
    """RoPE: turn columns i and i + d_head / 2 of x (batch, heads, n, d_head) by positions (n,) times base^(-2i / d_head)."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = torch.as_tensor(positions, device=x.device)[..., None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def locate(n_old, n_new):
    """The positions of n_new tokens after n_old that a cache holds."""
    return torch.arange(n_old, n_old + n_new)


@dataclass(frozen=True)
class Parts:
    """The functions of a LanguageModel that can be exchanged, called as those above are.

    attention(q, k, v, causal=True) gets heads that are already shared, (batch, n_heads, n, d_head), and mask=... only where the
    model was given a mask. It may be a list with one function for each layer.
    """

    attention: Callable | list = attend
    share: Callable = share
    rotate: Callable = rotate
    locate: Callable = locate


class Cache:
    """Keys and values of one layer, in tensors that grow."""

    def __init__(self):
        self.k = self.v = None

    @property
    def length(self):
        return 0 if self.k is None else self.k.shape[2]

    def update(self, k, v):
        """Append k and v (batch, n_kv_heads, n_new, d_head); return all so far."""
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        return self.k, self.v


class RMSNorm(nn.Module):
    """x divided by the root of its mean square, times one weight for each column."""

    def __init__(self, weight, epsilon):
        super().__init__()
        self.weight, self.epsilon = fixed(weight), epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight


class Attention(nn.Module):
    """Grouped heads: n_heads queries on n_kv_heads keys and values. A hook on `outputs` sees what each head found."""

    def __init__(self, config, w_q, w_k, w_v, w_o):
        super().__init__()
        self.n_heads, self.d_head = config.n_heads, config.d_head
        self.w_q, self.w_k, self.w_v, self.w_o = map(fixed, (w_q, w_k, w_v, w_o))
        self.outputs = nn.Identity()

    def forward(self, x, parts, attention, positions, cache, options):
        q, k, v = (self.split(x @ w) for w in (self.w_q, self.w_k, self.w_v))
        q, k = (must_be("rotate", parts.rotate(each, positions), each.shape) for each in (q, k))
        if cache is not None:
            k, v = cache.update(k, v)
        k, v = parts.share(k, self.n_heads), parts.share(v, self.n_heads)
        out = must_be("attention", attention(q, k, v, causal=True, **options), q.shape)
        return self.outputs(out).transpose(1, 2).flatten(2) @ self.w_o

    def split(self, x):
        """(batch, n, heads * d_head) -> (batch, heads, n, d_head)."""
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: one half of the hidden layer opens and closes the other. Source: Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, w_gate, w_up, w_down):
        super().__init__()
        self.w_gate, self.w_up, self.w_down = map(fixed, (w_gate, w_up, w_down))

    def forward(self, x):
        return (F.silu(x @ self.w_gate) * (x @ self.w_up)) @ self.w_down


class Block(nn.Module):
    """One layer."""

    def __init__(self, norm_1, attention, norm_2, feed_forward):
        super().__init__()
        self.norm_1, self.attention, self.norm_2, self.feed_forward = norm_1, attention, norm_2, feed_forward

    def forward(self, x, *where):
        x = x + self.attention(self.norm_1(x), *where)
        return x + self.feed_forward(self.norm_2(x))


class LanguageModel(nn.Module):
    """ids (batch, n) -> logits (batch, n, vocab_size) of the token after each.

    The embedding, (vocab_size, d_model), is also the output layer. Weights are (d_in, d_out), used as x @ w; they ask for no
    gradients. replace() makes a model with other parts.
    """

    def __init__(self, config, tokenizer, embedding, blocks, norm):
        super().__init__()
        self.config, self.tokenizer, self.last_only = config, tokenizer, False
        self.parts = Parts(rotate=lambda x, positions: rotate(x, positions, config.base))
        self.embedding, self.blocks, self.norm = nn.Embedding.from_pretrained(embedding), nn.ModuleList(blocks), norm

    def replace(self, last_only=False, **parts):
        """The same model, on the same weights, with other parts: attention, share, rotate or locate (see Parts).

        last_only: its logits are those of the last token only, all that writing needs. ValueError for an unknown part and
        for what is no function (of attention also a list, one for each layer).
        """
        known = [field.name for field in fields(Parts)]
        for name, part in parts.items():
            if name not in known:
                raise ValueError(f"a part must be one of {', '.join(known)}, got {name}")
            or_more = f" or a list of {self.config.n_layers}" if name == "attention" else ""
            each = part if name == "attention" and isinstance(part, list) else [part]
            if not all(map(callable, each)) or len(each) not in (1, self.config.n_layers):
                raise ValueError(f"{name} must be a function{or_more}, got {part!r:.40}")
        other = copy.copy(self)
        other.parts, other.last_only = replace(self.parts, **parts), last_only
        return other

    def hidden(self, ids, mask=None, positions=None, caches=None):
        """What the last layer hands over, normalised: (batch, n, d_model). Arguments as those of the model."""
        if ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(f"ids must be integers (batch, n), got {ids.dtype} of shape {tuple(ids.shape)}")
        if positions is None:
            positions = self.parts.locate(caches[0].length if caches else 0, ids.shape[1])
        attention, options = self.parts.attention, {} if mask is None else {"mask": mask}
        x = self.embedding(ids)
        for layer, block in enumerate(self.blocks):
            function = attention if callable(attention) else attention[layer]
            x = block(x, self.parts, function, positions, caches[layer] if caches else None, options)
        return self.norm(x)

    def forward(self, ids, mask=None, positions=None, caches=None):
        """mask boolean, True = may attend, beside the causal one, broadcastable to (batch, n_heads, n, n_keys).

        positions: integers (n,), by default 0, 1, ... after what the caches hold. caches: one for each layer, with
        length and update(k, v), as new_caches() makes them. ValueError where ids are not integers (batch, n).
        """
        x = self.hidden(ids, mask, positions, caches)
        return self.logits(x[:, -1:] if self.last_only else x)

    def logits(self, x):
        """The score of each token of the vocabulary, from what hidden() gives: (..., d_model) -> (..., vocab_size)."""
        return x @ self.embedding.weight.T

    def new_caches(self):
        """An empty cache for each layer."""
        return [Cache() for _ in self.blocks]

    @torch.no_grad()
    def losses(self, ids, mask=None, positions=None, caches=None):
        """The loss of each token but the first, in nats: ids (1, n) -> (n - 1,). Arguments as those of the model."""
        x = self.hidden(ids, mask, positions, caches)[0, :-1]
        parts = zip(x.split(CHUNK), ids[0, 1:].split(CHUNK))
        return torch.cat(
            [F.cross_entropy(self.logits(rows).float(), target, reduction="none") for rows, target in parts]
        )

    def encode(self, text):
        """The ids of a text: int64 (1, n)."""
        return torch.tensor([self.tokenizer.encode(text)])

    def decode(self, ids):
        """The text of ids, a tensor of any shape or a list."""
        return self.tokenizer.decode(torch.as_tensor(ids).flatten().tolist())

    def tokens(self, ids):
        """The text of each token alone: a list of strings."""
        return [self.tokenizer.decode([i]) for i in torch.as_tensor(ids).flatten().tolist()]

    @torch.no_grad()
    def stream(self, ids):
        """Write on, always the likeliest token, without end: yields ids (1, 1). ids (1, n)."""
        writer, caches = self.replace(last_only=True), self.new_caches()
        while True:
            ids = writer(ids, caches=caches)[:, -1].argmax(-1, keepdim=True)
            yield ids


def must_be(name, value, shape):
    """The value that a part returned. ValueError, in one sentence, unless it is a tensor of this shape."""
    if not torch.is_tensor(value) or value.shape != shape:
        got = tuple(value.shape) if hasattr(value, "shape") else type(value).__name__
        raise ValueError(f"{name} must return a tensor of shape {tuple(shape)}, got {got}")
    return value


def fixed(weight):
    """A weight that is not trained."""
    return nn.Parameter(weight, requires_grad=False)


def on_arrays(function):
    """An attention function of NumPy arrays as one of tensors, for LanguageModel.replace(attention=...)."""

    def attention(q, k, v, **options):
        options = {name: value.numpy() if torch.is_tensor(value) else value for name, value in options.items()}
        return torch.as_tensor(function(q.numpy(), k.numpy(), v.numpy(), **options)).to(q.dtype)

    return attention


@torch.no_grad()
def weights(model, ids):
    """The attention weights of every head on ids (1, n): an array (n_layers, n_heads, n, n), rows are queries.

    For a viewer or a map: 512 tokens take 283 MB. Sum up inside an attention function of your own where more is read.
    """
    kept = []

    def attention(q, k, v, causal):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        kept.append(torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1))
        return kept[-1] @ v

    model.replace(attention=attention).hidden(ids)
    return torch.cat(kept).numpy()
