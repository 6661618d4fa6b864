"""Rows of the table: multi-head latent attention, DeepSeek's layers from transformers, with the same weights as ours."""

import math

import numpy as np
import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32

from attention import latent
from attention.latent import IndexedLatentAttention, LatentCache, MultiHeadLatentAttention
from attention.rotary import Rotary
from tests.conformance.table import row
from tests.conformance.with_torch import draw, three
from tests.conformance.with_transformers import D_MODEL, FROM, N_HEADS

TRIPLE = (
    latent.latent_decode_attention_numpy,
    latent.latent_decode_attention_torch,
    latent.latent_decode_attention_cuda,
)
NOPE, ROPE, LATENT, D_V, N = 16, 8, 24, 12, 12
QUERIES = {"queries from x": dict(query=None), "queries from a latent": dict(query=20)}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip


def config_of(module, name, query, **more):
    return getattr(module, f"{name}Config")(
        hidden_size=D_MODEL, num_attention_heads=N_HEADS, num_key_value_heads=N_HEADS, q_lora_rank=query,
        kv_lora_rank=LATENT, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=D_V, head_dim=ROPE,
        max_position_embeddings=256, attn_implementation="eager", **more,
    )  # fmt: skip


def layer(query, scaling=None, scale=None, kind=MultiHeadLatentAttention, **more):
    """Our layer, its matrices drawn so that outputs are of unit size, the gains of its norms around 1."""
    positions = Rotary(ROPE, scaling=scaling, interleaved=True)
    ours = kind(D_MODEL, N_HEADS, NOPE, LATENT, ROPE, query, D_V, positions, scale, **more)
    rng = np.random.default_rng(11)
    for parameter in ours.parameters():
        drawn = rng.standard_normal(parameter.shape) * 1.5 * len(parameter) ** -0.5
        drawn = drawn if parameter.dim() == 2 else rng.uniform(0.5, 1.5, parameter.shape)
        parameter.data.copy_(torch.from_numpy(drawn))
    return ours


def per_head(*parts):
    """The matrix (rows, d_in) of a linear layer: head after head, the rows of each part."""
    return torch.cat([w.unflatten(1, (N_HEADS, -1)) for w in parts], dim=-1).flatten(1).T


def copied(ours, theirs, query):
    """Put our weights into a layer of transformers."""
    if query:
        theirs.q_a_proj.weight.data = ours.w_dq.data.T
        theirs.q_a_layernorm.weight.data = ours.norm_q.weight.data
    into = theirs.q_b_proj if query else theirs.q_proj
    into.weight.data = per_head(ours.w_uq.data, ours.w_qr.data)
    theirs.kv_a_proj_with_mqa.weight.data = torch.cat([ours.w_dkv.data, ours.w_kr.data], 1).T
    theirs.kv_a_layernorm.weight.data = ours.norm_kv.weight.data
    theirs.kv_b_proj.weight.data = per_head(ours.w_uk.data, ours.w_uv.data)
    theirs.o_proj.weight.data = ours.w_o.data.T
    return theirs.eval()


def future():
    return torch.full((N, N), torch.finfo(torch.float32).min).triu(1)[None, None]


def forms(ours, x, factor):
    """All tokens expanded, absorbed, and one after another with a cache, with queries multiplied by factor."""
    ours.w_uq.data, ours.w_qr.data = factor * ours.w_uq.data, factor * ours.w_qr.data
    cache = LatentCache(len(x), x.shape[1], LATENT, ROPE, dtype=x.dtype)
    first = ours(x[:, :5], causal=True, cache=cache)
    steps = [ours(x[:, i : i + 1], cache=cache, absorbed=i % 2 == 0) for i in range(5, x.shape[1])]
    return [ours(x, causal=True), ours(x, causal=True, absorbed=True), torch.cat([first, *steps], dim=1)]


@row("multi-head latent attention, three forms", FROM + "DeepseekV2Attention", QUERIES)
def of_v2(factor, query):
    config, ours = config_of(v2, "DeepseekV2", query), layer(query)
    (x,) = draw(9, (2, N, D_MODEL))
    theirs = copied(ours, v2.DeepseekV2Attention(config, 0), query)
    turning = v2.DeepseekV2RotaryEmbedding(config)(x, torch.arange(N)[None])
    expected = theirs(x, future(), position_embeddings=turning)[0]
    return forms(ours, x, factor), expected


@row("multi-head latent attention, three forms", FROM + "DeepseekV3Attention", {**QUERIES, "YaRN": dict(query=None, scaling=YARN)})  # fmt: skip
def of_v3(factor, query, scaling=None):
    more = {"rope_parameters": dict(scaling)} if scaling else {}
    config = config_of(v3, "DeepseekV3", query, **more)
    square = (0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1) ** 2 if scaling else 1
    ours = layer(query, dict(scaling) if scaling else None, square * (NOPE + ROPE) ** -0.5)
    (x,) = draw(10, (2, N, D_MODEL))
    theirs = copied(ours, v3.DeepseekV3Attention(config, 0), query)
    expected = theirs(x, v3.DeepseekV3RotaryEmbedding(config)(x, torch.arange(N)[None]), future())[0]
    return forms(ours, x, factor), expected


@row("latent decode attention, one token for each text", FROM + "DeepseekV3Attention", QUERIES)
def one_token_of_v3(factor, query):
    """The last tokens of a text of 12 and one of 7, each against its cache, behind whose end stands nan."""
    config, ours = config_of(v3, "DeepseekV3", query), layer(query)
    (x,) = draw(12, (2, N, D_MODEL))
    theirs = copied(ours, v3.DeepseekV3Attention(config, 0), query)
    expected = theirs(x, v3.DeepseekV3RotaryEmbedding(config)(x, torch.arange(N)[None]), future())[0]
    text, lengths = torch.arange(2), torch.tensor([N, 7])
    q_nope, q_rope, c_kv, k_rope = ours.project(x, torch.arange(N))
    w_uk, w_uv = (w.unflatten(1, (N_HEADS, -1)).transpose(0, 1) for w in (ours.w_uk, ours.w_uv))
    queries = [factor * q for q in ((q_nope @ w_uk.mT)[text, :, lengths - 1], q_rope[text, :, lengths - 1])]
    caches = [cache.masked_fill((torch.arange(N) >= lengths[:, None])[..., None], math.nan) for cache in (c_kv, k_rope)]
    blends = three(TRIPLE, *queries, *caches, lengths, scale=ours.scale)
    back = [(torch.as_tensor(blend)[:, :, None] @ w_uv).flatten(1) @ ours.w_o for blend in blends]
    return back, expected[text, lengths - 1]


@row("latent attention under an indexer's choice", FROM + "DeepseekV32Attention", {"all tokens": dict(kept=N), "4 of 12 tokens": dict(kept=4)})  # fmt: skip
def of_v32(factor, kept):
    """The indexer's choice of tokens, taken from the layer, is our mask; with all tokens chosen the layer is dense."""
    torch.manual_seed(0)
    config = config_of(v32, "DeepseekV32", 20, index_topk=kept, index_n_heads=2, index_head_dim=16)
    ours, chosen = layer(20), []
    (x,) = draw(11, (1, N, D_MODEL))
    theirs = copied(ours, v32.DeepseekV32Attention(config, 0), 20)
    theirs.indexer.register_forward_hook(lambda _module, _given, found: chosen.append(found))
    expected = theirs(x, v32.DeepseekV32RotaryEmbedding(config)(x, torch.arange(N)[None]), future())[0]
    mask = torch.zeros(1, N, N, dtype=torch.bool).scatter(-1, chosen[0].long(), True)[:, None]
    ours.w_uq.data, ours.w_qr.data = factor * ours.w_uq.data, factor * ours.w_qr.data
    return [ours(x, mask=mask, causal=True, absorbed=absorbed) for absorbed in (False, True)], expected


@row("latent attention, and the indexer that chooses for it", FROM + "DeepseekV32Attention", {"all tokens": dict(kept=N), "4 of 12 tokens": dict(kept=4)})  # fmt: skip
def with_an_indexer(factor, kept):
    """Nothing of theirs is used: our indexer, with its half-split rotation, chooses for our layer, with its interleaved one."""
    heads = 8  # with few of them ReLU makes many scores 0, and of equal ones ours takes the earlier
    config = config_of(v32, "DeepseekV32", 20, index_topk=kept, index_n_heads=heads, index_head_dim=16)
    ours = layer(20, kind=IndexedLatentAttention, top_k=kept, index_heads=heads, d_index=16)
    (x,) = draw(14, (2, N, D_MODEL))
    theirs = copied(ours, v32.DeepseekV32Attention(config, 0), 20)
    own = ours.indexer
    theirs.indexer.wq_b.weight.data, theirs.indexer.wk.weight.data = own.query.weight.data, own.key.weight.data
    theirs.indexer.weights_proj.weight.data = own.weight.weight.data
    theirs.indexer.k_norm.load_state_dict(own.norm.state_dict())
    turning = v32.DeepseekV32RotaryEmbedding(config)(x, torch.arange(N)[None])
    expected = theirs(x, turning, future().expand(2, -1, -1, -1))[0]
    ours.w_uq.data, ours.w_qr.data = factor * ours.w_uq.data, factor * ours.w_qr.data
    return [ours(x), ours(x, absorbed=True)], expected
