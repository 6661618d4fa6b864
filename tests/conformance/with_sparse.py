"""Rows of the table: windows, blocks and chosen keys beside PyTorch's FlexAttention, Longformer's and DeepSeek's."""

import warnings

import torch
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex
from torch.overrides import TorchFunctionMode
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32
from transformers.models.longformer import modeling_longformer as longformer
from transformers.models.mistral import modeling_mistral as mistral

from attention import sparse
from attention.fundamentals import attention_numpy, attention_torch
from attention.multi_head import merge_heads, split_heads
from tests.conformance.table import row
from tests.conformance.with_torch import TORCH, draw, three
from tests.conformance.with_transformers import D_HEAD, D_MODEL, FROM, N_HEADS, SIZES, filled

TRIPLE = sparse.block_sparse_attention_numpy, sparse.block_sparse_attention_torch, sparse.block_sparse_attention_cuda


@row("block-sparse attention", f"{TORCH}, flex_attention",
     {"half of the blocks": {}, "causal": dict(causal=True), "ragged": dict(n=50, m=39, size=8),
      "a mask for each head": dict(heads=2)})  # fmt: skip
def blocks(factor, n=64, m=64, size=16, causal=False, heads=1):
    q, k, v, chance = draw(16, (1, 2, n, D_HEAD), (1, 2, m, D_HEAD), (1, 2, m, D_HEAD), (heads, -(-n // size), -(-m // size)))  # fmt: skip
    there = (chance > 0) | (torch.arange(chance.shape[2]) == 0)

    def seen(batch, head, query, key):
        return there[head % heads, query // size, key // size] & ((key <= query + m - n) | (not causal))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would be faster compiled
        mask = flex.create_block_mask(seen, None, 2, n, m, device="cpu")
        theirs = flex.flex_attention(q, k, v, block_mask=mask)
    return three(TRIPLE, factor * q, k, v, there if heads > 1 else there[0], block_size=size, causal=causal), theirs


@row("the mask of a window", FROM + "create_sliding_window_causal_mask", {f"window of {w}": dict(window=w) for w in (2, 6, 64, 200)})  # fmt: skip
def window_mask(factor, window, n=90):
    q, k, v, x = draw(17, *3 * [(2, 2, n, D_HEAD)], (2, n, D_MODEL))
    config = mistral.MistralConfig(**SIZES | {"attn_implementation": "sdpa"}, sliding_window=window)
    allowed = create_sliding_window_causal_mask(config=config, inputs_embeds=x, attention_mask=None, past_key_values=None,
                                                position_ids=torch.arange(n)[None], allow_is_causal_skip=False)  # fmt: skip
    theirs = F.scaled_dot_product_attention(q, k, v, allowed)
    mask = sparse.sliding_window_mask(n, n, window)
    arrays = [a.numpy() for a in (factor * q, k, v)]
    return [attention_numpy(*arrays, mask), attention_torch(factor * q, k, v, torch.from_numpy(mask)),
            sparse.sliding_window_attention_cuda(factor * q, k, v, window)], theirs  # fmt: skip


@row("a window and global tokens", FROM + "LongformerSelfAttention", {"one global": dict(tokens=[0]), "three": dict(tokens=[0, 7, 20])})  # fmt: skip
def global_tokens(factor, tokens, n=32, window=8):
    config = longformer.LongformerConfig(hidden_size=D_MODEL, num_attention_heads=N_HEADS, attention_window=[window])
    layer = filled(longformer.LongformerSelfAttention(config, 0))
    (x,) = draw(18, (1, n, D_MODEL))
    is_global = torch.zeros(1, n, dtype=torch.bool)
    is_global[:, tokens] = True
    theirs = layer(x, 10000.0 * is_global, torch.zeros_like(is_global), is_global, is_global_attn=True)[0]

    def projected(end):
        matrices = (getattr(layer, f"{name}{end}").weight.T for name in ("query", "key", "value"))
        q, k, v = (split_heads(x @ w, N_HEADS).numpy() for w in matrices)
        return factor * q, k, v

    out = sparse.longformer_attention(projected(""), projected("_global"), window, tokens)
    return [merge_heads(out)], theirs


class SeenByTopk(TorchFunctionMode):
    """Keeps what is handed to topk: the scores, of which the layer itself shows the places only."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.topk:
            self.scores = args[0]
        return function(*args, **kwargs or {})


@row("scores of an indexer", FROM + "DeepseekV32Indexer", {"one head": dict(n_heads=1), "four heads": dict(n_heads=4)})
def indexer(factor, n_heads, n=30):
    """Theirs also rotates, by an angle of 0 here, and takes its queries from a latent, which is the text here."""
    config = v32.DeepseekV32Config(**SIZES, num_key_value_heads=N_HEADS, q_lora_rank=D_MODEL, qk_rope_head_dim=8,
                                   index_n_heads=n_heads, index_head_dim=D_HEAD, index_topk=5)  # fmt: skip
    layer = filled(v32.DeepseekV32Indexer(config, 0))
    (x,) = draw(19, (2, n, D_MODEL))
    future = torch.full((n, n), float("-inf")).triu(1).expand(2, n, n)
    unturned = torch.ones(1, n, 8), torch.zeros(1, n, 8)
    with SeenByTopk() as mode:
        layer(x, x, unturned, future, None)
    ours = sparse.LightningIndexer(D_MODEL, n_heads, D_HEAD)
    ours.query.weight.data, ours.key.weight.data = factor * layer.wq_b.weight, layer.wk.weight
    ours.norm.load_state_dict(layer.k_norm.state_dict())
    ours.weight.weight.data = layer.weights_proj.weight
    past = torch.ones(n, n, dtype=torch.bool).tril()
    return [ours(x, causal=True)[:, past]], mode.scores[:, past]
