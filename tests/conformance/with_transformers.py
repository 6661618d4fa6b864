"""Rows of the table: attention layers of published models, from transformers, with the same weights as ours."""

import importlib.metadata
import math

import numpy as np
import torch
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.bert import modeling_bert as bert
from transformers.models.bloom import modeling_bloom as bloom
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.t5 import modeling_t5 as t5

from attention.kv_cache import KVCache, LearnedSink, NullKey, RingKVCache, new_caches
from attention.multi_head import MultiHeadAttention, TransformerConfig, TransformerLM
from attention.rotary import ALiBi, Rotary, T5Bias
from tests.conformance.table import row
from tests.conformance.with_torch import bottom_right, draw
from tests.lectures.lecture_02.test_transformer_lm import neox_with_the_weights_of

FROM = f"transformers {importlib.metadata.version('transformers')}, "
D_MODEL, N_HEADS, D_HEAD = 64, 4, 16
SIZES = dict(hidden_size=D_MODEL, num_attention_heads=N_HEADS, attn_implementation="eager")


def filled(module, seed=0):
    """The module in evaluation mode: matrices drawn so that outputs are of unit size, norms near 1, biases zero."""
    rng = np.random.default_rng(seed)
    for name, parameter in module.named_parameters():
        drawn = rng.uniform(0.5, 1.5, parameter.shape) * (not name.endswith("bias"))
        if parameter.dim() == 2:
            drawn = rng.standard_normal(parameter.shape) * 1.5 * parameter.shape[1] ** -0.5
        parameter.data.copy_(torch.from_numpy(drawn))
    return module.eval()


def with_weights(q, k, v, o, positions=None, factor=1.0):
    """Our attention with the weights of four linear layers, queries multiplied by factor; o may be None."""
    module = MultiHeadAttention(D_MODEL, N_HEADS, positions)
    matrices = [m.weight if hasattr(m, "weight") else m for m in (q, k, v)]
    matrices.append(torch.eye(D_MODEL) if o is None else o.weight)
    for name, matrix in zip(("w_q", "w_k", "w_v", "w_o"), matrices, strict=True):
        getattr(module, name).data = matrix.detach().T * (factor if name == "w_q" else 1.0)
    return module


def apart(fused):
    """The matrices of queries, keys and values of a layer that has the three of each head one behind the other."""
    return fused.weight.reshape(N_HEADS, 3, D_HEAD, D_MODEL).transpose(0, 1).reshape(3, D_MODEL, D_MODEL)


def additive(allowed):
    """A boolean mask as numbers to add."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)


def causal(n):
    return additive(bottom_right(n, n))[None, None]


# --- positions -------------------------------------------------------------------------------------------------------

LENGTH = {"original_max_position_embeddings": 32}
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.5, **LENGTH},
    "yarn": {"factor": 4.0, **LENGTH},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LENGTH},
}


def llama_config(kind, scaling):
    """One layer of Llama; there the trained length of dynamic scaling is the configured one."""
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **scaling}
    if kind == "dynamic":
        del parameters["original_max_position_embeddings"]
    return llama.LlamaConfig(**SIZES, num_key_value_heads=N_HEADS, rope_parameters=parameters,
                             max_position_embeddings=32 if kind == "dynamic" else 128)  # fmt: skip


def rope_of_llama(kind, scaling):
    """A row for one kind of scaling, within the trained length and beyond it."""

    @row(f"RoPE, {kind} scaling", FROM + "LlamaAttention", {f"{n} tokens": dict(n=n) for n in (20, 70)})
    def rope(factor, n):
        config = llama_config(kind, scaling)
        layer = filled(llama.LlamaAttention(config, 0))
        (x,) = draw(1, (2, n, D_MODEL))
        turns = llama.LlamaRotaryEmbedding(config)(x, torch.arange(n)[None])
        theirs, _ = layer(x, turns, causal(n))
        positions = Rotary(D_HEAD, scaling={"rope_type": kind, **scaling})
        ours = with_weights(layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj, positions, factor)
        steps = [] if kind == "dynamic" else [step_by_step(ours, x)]  # its frequencies change while a text grows
        return [ours(x, causal=True), *steps], theirs


def step_by_step(ours, x, cache=None):
    """The layer's outputs when tokens come one at a time into a cache."""
    cache = KVCache(len(x), N_HEADS, x.shape[1], D_HEAD, x.dtype) if cache is None else cache
    steps = [ours(x[:, i : i + 1], positions=torch.tensor([i]), cache=cache) for i in range(x.shape[1])]
    return torch.cat(steps, dim=1)


for _kind, _scaling in SCALINGS.items():
    rope_of_llama(_kind, _scaling)


@row("RoPE, neighbouring pairs, part of the columns", FROM + "GPTJAttention", {"half": dict(turned=8), "all": dict(turned=16)})  # fmt: skip
def interleaved(factor, turned, n=30):
    config = gptj.GPTJConfig(n_embd=D_MODEL, n_head=N_HEADS, rotary_dim=turned, n_positions=64)
    layer = filled(gptj.GPTJAttention(config, 0))
    (x,) = draw(2, (2, n, D_MODEL))
    theirs = layer(x, attention_mask=causal(n), position_ids=torch.arange(n).expand(2, n))[0]
    positions = Rotary(D_HEAD, interleaved=True, partial=turned / D_HEAD)
    ours = with_weights(layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj, positions, factor)
    return [ours(x, causal=True), step_by_step(ours, x)], theirs


@row("RoPE, part of the columns", FROM + "GPTNeoXAttention", {"a quarter": dict(part=0.25), "half": dict(part=0.5)})
def partial(factor, part, n=30):
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": part}
    config = neox.GPTNeoXConfig(**SIZES, rope_parameters=parameters)
    layer = filled(neox.GPTNeoXAttention(config, 0))
    (x,) = draw(3, (2, n, D_MODEL))
    turns = neox.GPTNeoXRotaryEmbedding(config)(x, torch.arange(n)[None])
    theirs, _ = layer(x, causal(n), position_embeddings=turns)
    ours = with_weights(*apart(layer.query_key_value), layer.dense, Rotary(D_HEAD, partial=part), factor)
    return [ours(x, causal=True), step_by_step(ours, x)], theirs


@row("ALiBi", FROM + "BloomAttention", {"short": dict(n=9), "long": dict(n=60)})
def alibi(factor, n):
    config = bloom.BloomConfig(hidden_size=D_MODEL, n_head=N_HEADS, hidden_dropout=0.0)
    layer = filled(bloom.BloomAttention(config, 0))
    (x,) = draw(4, (2, n, D_MODEL))
    slopes = bloom.build_alibi_tensor(torch.ones(2, n), N_HEADS, torch.float32)
    theirs = layer(x, torch.zeros_like(x), slopes, causal(n))[0]
    ours = with_weights(*apart(layer.query_key_value), layer.dense, ALiBi(N_HEADS), factor)
    return [ours(x, causal=True), step_by_step(ours, x)], theirs


@row("buckets of distances", FROM + "T5Attention", {"encoder": dict(decoder=False), "decoder": dict(decoder=True)})
def distance_buckets(factor, decoder, n=70):
    config = t5.T5Config(d_model=D_MODEL, d_kv=D_HEAD, num_heads=N_HEADS, relative_attention_num_buckets=16,
                         relative_attention_max_distance=40, is_decoder=decoder, attn_implementation="eager")  # fmt: skip
    layer = filled(t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0))
    (x,) = draw(5, (2, n, D_MODEL))
    theirs = layer(x, mask=causal(n) if decoder else None)[0]
    positions = T5Bias(N_HEADS, 16, 40, bidirectional=not decoder)
    positions.table.weight.data = layer.relative_attention_bias.weight.data
    ours = with_weights(layer.q, layer.k, layer.v, layer.o, positions, factor * math.sqrt(D_HEAD))  # T5 has no scale
    return [ours(x, causal=decoder)], theirs


# --- masks, windows, sinks -------------------------------------------------------------------------------------------


@row("multi-head attention over padded texts", FROM + "BertSelfAttention", {"lengths of 12 and 7": {}})
def padded(factor, n=12):
    config = bert.BertConfig(**SIZES)
    layer = filled(bert.BertSelfAttention(config))
    (x,) = draw(6, (2, n, D_MODEL))
    keep = (torch.arange(n) < torch.tensor([[12], [7]]))[:, None, None]
    theirs, _ = layer(x, additive(keep))
    return [with_weights(layer.query, layer.key, layer.value, None, None, factor)(x, mask=keep)], theirs


def windowed(n, window):
    """What a window that counts the query itself lets see, (n, n)."""
    return bottom_right(n, n).triu(1 - window)


@row("a window of keys", FROM + "MistralAttention", {f"window of {w}": dict(window=w) for w in (2, 5, 16, 40)})
def window(factor, window, n=30):
    config = mistral.MistralConfig(**SIZES, num_key_value_heads=N_HEADS, head_dim=D_HEAD, sliding_window=window,
                                   rope_parameters={"rope_type": "default", "rope_theta": 10000.0})  # fmt: skip
    layer = filled(mistral.MistralAttention(config, 0))
    (x,) = draw(7, (2, n, D_MODEL))
    positions = torch.arange(n)[None]
    mask = create_sliding_window_causal_mask(config=config, inputs_embeds=x, attention_mask=None, past_key_values=None,
                                             position_ids=positions)  # fmt: skip
    theirs, _ = layer(x, mistral.MistralRotaryEmbedding(config)(x, positions), mask)
    ours = with_weights(layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj, Rotary(D_HEAD), factor)
    ring = RingKVCache(2, N_HEADS, window, D_HEAD, x.dtype)
    return [step_by_step(ours, x, ring), ours(x, mask=windowed(n, window))], theirs


@row("a learned sink for each head", FROM + "GptOssAttention", {"all keys": dict(layer=1), "window of 6": dict(layer=0)})  # fmt: skip
def sinks(factor, layer, n=30):
    config = gpt_oss.GptOssConfig(**SIZES, num_key_value_heads=N_HEADS, head_dim=D_HEAD, sliding_window=6,
                                  num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"],
                                  rope_parameters={"rope_type": "default", "rope_theta": 10000.0})  # fmt: skip
    theirs = filled(gpt_oss.GptOssAttention(config, layer))
    theirs.sinks.data = torch.tensor([-1.0, 0.5, 2.0, 3.0])
    (x,) = draw(8, (2, n, D_MODEL))
    allowed = windowed(n, 6 if theirs.sliding_window else n)
    turns = gpt_oss.GptOssRotaryEmbedding(config)(x, torch.arange(n)[None])
    expected, _ = theirs(x, turns, additive(allowed)[None, None])
    positions = LearnedSink(D_HEAD, N_HEADS)
    positions.sink.data = theirs.sinks.data
    ours = with_weights(theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.o_proj, positions, factor)
    with_sink = torch.nn.functional.pad(allowed, (1, 0), value=True)
    return [ours(x, mask=with_sink, cache=NullKey())], expected


# --- a whole model ---------------------------------------------------------------------------------------------------


@row("a language model of two layers", FROM + "GPTNeoXForCausalLM", {"all at once and with a cache": {}})
def language_model(factor, n=20):
    ours = filled(TransformerLM(TransformerConfig(23, D_MODEL, N_HEADS), positions=Rotary(D_HEAD)))
    theirs = neox_with_the_weights_of(ours).float()
    ids = torch.from_numpy(np.random.default_rng(9).integers(0, 23, (2, n)))
    expected = theirs(ids).logits
    for block in ours.blocks:
        block.attention.w_q.data *= factor
    caches = new_caches(ours, 2, n)
    steps = [ours(ids[:, a:b], positions=torch.arange(a, b), caches=caches) for a, b in ((0, 7), (7, 8), (8, n))]
    return [ours(ids), torch.cat(steps, dim=1)], expected
