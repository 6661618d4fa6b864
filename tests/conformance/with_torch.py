"""Rows of the table: the course beside PyTorch's own functions and modules."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attention import flash, fundamentals, kv_cache, long_context, multi_head
from tests.conformance.table import row

TORCH = f"torch {torch.__version__.split('+')[0]}"


def draw(seed, *shapes):
    """Tensors of these shapes in single precision, normally distributed."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(shape, np.float32)) for shape in shapes]


def three(functions, *arguments, **named):
    """The results of the three functions of a triple, on arrays or tensors."""
    by_numpy, by_torch, by_cuda = functions
    arrays = [a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments]
    return [by_numpy(*arrays, **named), by_torch(*arguments, **named), by_cuda(*arguments, **named)]


def bottom_right(n, m):
    """The causal mask of the course; PyTorch's own is aligned at the top left."""
    return torch.ones(n, m, dtype=torch.bool).tril(m - n)


ATTENTION = fundamentals.attention_numpy, fundamentals.attention_torch, fundamentals.attention_cuda
SHAPES = {
    "one head": dict(q=(7, 16), k=(7, 16), v=(7, 16)),
    "batch and heads": dict(q=(2, 3, 9, 8), k=(2, 3, 21, 8), v=(2, 3, 21, 5)),
    "long rows": dict(q=(1, 2, 3, 64), k=(1, 2, 300, 64), v=(1, 2, 300, 64)),
}


@row("attention", f"{TORCH}, scaled_dot_product_attention",
     SHAPES | {"causal": dict(q=(2, 9, 8), k=(2, 21, 8), v=(2, 21, 8), causal=True),
               "a mask": dict(q=(2, 9, 8), k=(2, 21, 8), v=(2, 21, 8), masked=True),
               "a scale": dict(q=(2, 9, 8), k=(2, 21, 8), v=(2, 21, 8), scale=0.7)})  # fmt: skip
def attention(factor, q, k, v, causal=False, masked=False, scale=None):
    q, k, v = draw(1, q, k, v)
    n, m = q.shape[-2], k.shape[-2]
    mask = torch.from_numpy(np.random.default_rng(2).random((n, m)) < 0.6) if masked else None
    theirs = F.scaled_dot_product_attention(q, k, v, bottom_right(n, m) if causal else mask, scale=scale)
    arguments = (factor * q, k, v, None if mask is None else mask.numpy())
    return three(ATTENTION, *arguments, causal=causal, scale=scale), theirs


@row("multi-head attention", f"{TORCH}, nn.MultiheadAttention",
     {"to itself": {}, "to others": dict(others=13), "causal": dict(causal=True), "padding": dict(padding=True),
      "one head": dict(n_heads=1)})  # fmt: skip
def many_heads(factor, n_heads=4, others=0, causal=False, padding=False):
    d, n = 32, 9
    theirs = nn.MultiheadAttention(d, n_heads, bias=False, batch_first=True)
    x, other, projections, out = draw(3, (2, n, d), (2, others or n, d), (3 * d, d), (d, d))
    theirs.in_proj_weight.copy_(projections * d**-0.5), theirs.out_proj.weight.copy_(out * d**-0.5)
    other = other if others else x
    keep = torch.arange(len(other[0])) < torch.tensor([[9], [5]]) if padding else None
    expected, _ = theirs(x, other, other, key_padding_mask=None if keep is None else ~keep, need_weights=False,
                         attn_mask=~bottom_right(n, len(other[0])) if causal else None)  # fmt: skip
    w_q, w_k, w_v, w_o = multi_head.weights_from_torch(theirs.in_proj_weight, theirs.out_proj.weight)
    mask = None if keep is None else keep[:, None, None].numpy()
    functions = (multi_head.multi_head_attention_numpy, multi_head.multi_head_attention_torch, multi_head.multi_head_attention_cuda)  # fmt: skip
    found = three(functions, x, other, *(torch.as_tensor(w) for w in (factor * w_q, w_k, w_v, w_o)), n_heads=n_heads,
                  mask=mask, causal=causal)  # fmt: skip
    module = multi_head.MultiHeadAttention(d, n_heads)
    for name, w in (("w_q", factor * w_q), ("w_k", w_k), ("w_v", w_v), ("w_o", w_o)):
        getattr(module, name).data = torch.as_tensor(w)
    keep = None if keep is None else keep[:, None, None]
    return [*found, module(x, other if others else None, mask=keep, causal=causal)], expected


SOFTMAX = long_context.softmax_rows_numpy, long_context.softmax_rows_torch, long_context.softmax_rows_cuda
MATMUL = long_context.matmul_numpy, long_context.matmul_torch, long_context.matmul_cuda


@row("softmax of rows", f"{TORCH}, softmax", {"short": dict(shape=(5, 7)), "long": dict(shape=(2, 300))})
def softmax(factor, shape):
    (x,) = draw(4, shape)
    return three(SOFTMAX, 20 * factor * x), torch.softmax(20 * x, -1)


@row("matrix product", f"{TORCH}, matmul", {"square": dict(a=(64, 64), b=(64, 64)), "ragged": dict(a=(2, 67, 19), b=(2, 19, 65))})  # fmt: skip
def matmul(factor, a, b):
    a, b = draw(5, a, b)
    a = a / math.sqrt(a.shape[-1])
    return three(MATMUL, factor * a, b), a @ b


FLASH = flash.flash_attention_numpy, flash.flash_attention_torch, flash.flash_attention_cuda
TILES = {"one tile": dict(n=16, m=16), "ragged": dict(n=70, m=90), "causal": dict(n=70, m=90, causal=True),
         "small tiles": dict(n=33, m=50, causal=True, block=16)}  # fmt: skip


@row("flash attention", f"{TORCH}, scaled_dot_product_attention", TILES)
def flash_forward(factor, n, m, causal=False, block=64):
    q, k, v = draw(6, (2, n, 32), (2, m, 32), (2, m, 32))
    theirs = F.scaled_dot_product_attention(q, k, v, bottom_right(n, m) if causal else None)
    found = three(FLASH, factor * q, k, v, causal=causal, block_q=block, block_k=block)
    return [out for out, _ in found], theirs


@row("flash attention, log-sum-exp", f"{TORCH}, logsumexp", TILES)
def flash_sums(factor, n, m, causal=False, block=64):
    q, k, v = draw(6, (2, n, 32), (2, m, 32), (2, m, 32))
    scores = q @ k.mT / math.sqrt(32)
    theirs = torch.logsumexp(scores.masked_fill(~bottom_right(n, m), -math.inf) if causal else scores, -1)
    found = three(FLASH, factor * q, k, v, causal=causal, block_q=block, block_k=block)
    return [lse for _, lse in found], theirs


BACKWARD = flash.flash_attention_backward_numpy, flash.flash_attention_backward_torch, flash.flash_attention_backward_cuda  # fmt: skip


@row("flash attention, gradients", f"{TORCH}, autograd of scaled_dot_product_attention", TILES)
def flash_gradients(factor, n, m, causal=False, block=64):
    q, k, v, d_out = draw(7, (2, n, 32), (2, m, 32), (2, m, 32), (2, n, 32))
    with torch.enable_grad():
        leaves = [a.clone().requires_grad_() for a in (q, k, v)]
        out = F.scaled_dot_product_attention(*leaves, bottom_right(n, m) if causal else None)
        theirs = torch.autograd.grad(out, leaves, d_out)
    out, lse = flash.flash_attention_torch(factor * q, k, v, causal, block_q=block, block_k=block)
    found = three(BACKWARD, factor * q, k, v, out, lse, d_out, causal=causal)
    together = [torch.cat([torch.as_tensor(g).flatten() for g in gradients]) for gradients in found]
    return together, torch.cat([g.flatten() for g in theirs])


DECODE = kv_cache.decode_attention_numpy, kv_cache.decode_attention_torch, kv_cache.decode_attention_cuda
PAGED = kv_cache.paged_decode_attention_numpy, kv_cache.paged_decode_attention_torch, kv_cache.paged_decode_attention_cuda  # fmt: skip
LENGTHS = {"short": dict(lengths=(1, 9, 5)), "more than a split": dict(lengths=(300, 129))}


def decoded(q, k, v, lengths):
    inside = torch.arange(k.shape[2]) < torch.tensor(lengths)[:, None, None, None]
    return F.scaled_dot_product_attention(q[:, :, None], k, v, inside)[:, :, 0]


@row("decoding with a cache", f"{TORCH}, scaled_dot_product_attention", LENGTHS)
def decode(factor, lengths):
    q, k, v = draw(8, (len(lengths), 2, 32), (len(lengths), 2, max(lengths), 32), (len(lengths), 2, max(lengths), 32))
    return three(DECODE, factor * q, k, v, np.array(lengths)), decoded(q, k, v, lengths)


@row("decoding through a block table", f"{TORCH}, scaled_dot_product_attention", LENGTHS)
def paged_decode(factor, lengths, page=4):
    batch, n_pages = len(lengths), -(-max(lengths) // page)
    q, k_pages, v_pages = draw(9, (batch, 2, 32), *2 * [(batch * n_pages, page, 2, 32)])
    table = np.random.default_rng(9).permutation(batch * n_pages).reshape(batch, n_pages)
    k, v = (pages[table].reshape(batch, n_pages * page, 2, 32).transpose(1, 2) for pages in (k_pages, v_pages))
    found = three(PAGED, factor * q, k_pages, v_pages, table, np.array(lengths))
    return found, decoded(q, k, v, lengths)
