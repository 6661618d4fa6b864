"""TransformerLM: against an independent model with the same weights, and what later lectures rely on."""

import numpy as np
import pytest
import torch
from torch import nn

from attention import multi_head as m
from utils import training


def small(seed=0, positions=None, **sizes):
    config = m.TransformerConfig(**{"vocab_size": 19, "d_model": 24, "n_heads": 3, "n_layers": 2, "d_ff": 40} | sizes)
    return training.initialise(m.TransformerLM(config, positions=positions).double(), seed)


def some_ids(batch=2, seq=11, seed=0, vocab=19):
    return torch.from_numpy(np.random.default_rng(seed).integers(vocab, size=(batch, seq)))


class HalfRotation(m.Positions):
    """The rotation of GPT-NeoX: number c of the first half of a head is turned with number c of the second half."""

    def rotate(self, x, positions):
        half = x.shape[-1] // 2
        angle = positions[:, None] * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def neox_with_the_weights_of(model):
    """transformers' GPT-NeoX with sequential residuals, full rotation and our weights; its biases are zero."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    config = transformers.GPTNeoXConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        intermediate_size=c.d_ff,
        hidden_act="gelu",
        use_parallel_residual=False,
        layer_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        attn_implementation="eager",
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    theirs = transformers.GPTNeoXForCausalLM(config).double().eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    theirs.gpt_neox.embed_in.weight.data.copy_(model.embedding.weight)
    theirs.gpt_neox.final_layer_norm.load_state_dict(model.norm.state_dict())
    theirs.get_output_embeddings().weight.data.copy_(model.unembedding.weight)
    for ours, layer in zip(model.blocks, theirs.gpt_neox.layers):
        layer.input_layernorm.load_state_dict(ours.norm_1.state_dict())
        layer.post_attention_layernorm.load_state_dict(ours.norm_2.state_dict())
        a = ours.attention
        by_head = [w.T.reshape(c.n_heads, c.d_head, c.d_model) for w in (a.w_q, a.w_k, a.w_v)]
        layer.attention.query_key_value.weight.data.copy_(torch.stack(by_head, 1).reshape(-1, c.d_model))
        layer.attention.dense.weight.data.copy_(a.w_o.T)
        layer.mlp.dense_h_to_4h.weight.data.copy_(ours.feed_forward[0].weight)
        layer.mlp.dense_4h_to_h.weight.data.copy_(ours.feed_forward[2].weight)
    return theirs


def test_logits_and_gradients_agree_with_gpt_neox():
    model = small(positions=HalfRotation())
    for block in model.blocks:  # norms that do something
        block.norm_1.weight.data.uniform_(0.5, 1.5), block.norm_2.bias.data.uniform_(-1, 1)
    theirs, ids = neox_with_the_weights_of(model), some_ids()
    expected, logits = theirs(ids).logits, model(ids)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)  # its angles are computed in single precision
    ours = torch.autograd.grad(logits.square().mean(), model.embedding.weight)[0]
    torch.testing.assert_close(
        ours, torch.autograd.grad(expected.square().mean(), theirs.gpt_neox.embed_in.weight)[0], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("positions", [m.Positions, lambda: m.DistanceBias(3), HalfRotation])
def test_no_prediction_sees_a_later_token(positions):
    model, ids = small(positions=positions()), some_ids(1)
    with torch.no_grad():
        for i in range(ids.shape[1]):
            changed = ids.clone()
            changed[0, i] = (changed[0, i] + 1) % 19
            moved = (model(ids) != model(changed)).any(-1)[0].tolist()
            assert moved == [False] * i + [True] * (ids.shape[1] - i)


class ListCache:
    """The least that a cache must do: remember, and say how much."""

    def __init__(self):
        self.k, self.v, self.length = [], [], 0

    def update(self, k, v):
        self.k.append(k), self.v.append(v)
        self.length += k.shape[-2]
        return torch.cat(self.k, -2), torch.cat(self.v, -2)


@pytest.mark.parametrize("positions", [m.Positions, lambda: m.DistanceBias(3), HalfRotation])
@pytest.mark.parametrize("pieces", [(1,) * 11, (4, 1, 6), (10, 1)])
def test_with_a_cache_the_pieces_give_what_the_whole_gives(positions, pieces):
    model, ids = small(positions=positions()), some_ids()
    caches = [ListCache() for _ in model.blocks]
    with torch.no_grad():
        parts = [model(part, caches=caches) for part in ids.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-12, rtol=0)


def test_given_positions_replace_the_running_ones():
    model, ids = small(positions=HalfRotation()), some_ids()
    with torch.no_grad():
        shifted = model(ids, positions=torch.arange(11) + 100)
        torch.testing.assert_close(shifted, model(ids), atol=1e-10, rtol=0)  # rotations are relative
        assert not torch.allclose(model(ids, positions=2 * torch.arange(11)), model(ids))


def test_a_mask_hides_padding_in_front():
    model, ids = small(), some_ids()
    padded = nn.functional.pad(ids, (3, 0))
    mask = (torch.arange(14) >= 3).expand(2, 1, 1, 14)
    with torch.no_grad():
        torch.testing.assert_close(model(padded, mask=mask)[:, 3:], model(ids), atol=1e-12, rtol=0)


def test_attention_positions_and_norm_can_be_exchanged():
    class Mean(nn.Module):
        """Each token takes the mean of what came before: an attention without parameters."""

        def forward(self, x, mask=None, causal=False, positions=None, cache=None):
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

    made = []

    def attention(config, layer, positions):
        made.append((layer, positions))
        return Mean()

    positions = m.Positions()
    model = m.TransformerLM(m.TransformerConfig(19, 24, 3, 3), attention, positions, nn.RMSNorm).double()
    assert made == [(layer, positions) for layer in range(3)]
    assert isinstance(model.norm, nn.RMSNorm) and isinstance(model.blocks[2].norm_2, nn.RMSNorm)
    assert model(some_ids()).shape == (2, 11, 19)


def test_each_hook_of_positions_is_called():
    class Counting(m.Positions):
        def __init__(self):
            super().__init__()
            self.calls = []

        def embed(self, x, positions):
            self.calls.append("embed")
            return x

        def rotate(self, x, positions):
            self.calls.append("rotate")
            return x

        def bias(self, n_queries, n_keys):
            self.calls.append("bias")

    positions = Counting()
    small(positions=positions)(some_ids())
    assert positions.calls == ["embed"] + 2 * ["rotate", "rotate", "bias"]


def test_without_feed_forward_layers_only_attention_is_left():
    model = small(d_ff=0)
    assert not any("feed_forward" in name or "norm_2" in name for name, _ in model.named_parameters())
    assert model(some_ids()).shape == (2, 11, 19)


def test_record_sees_what_the_heads_do_and_leaves_no_hook():
    model, ids = small(), some_ids()
    with torch.no_grad(), m.record(model) as cache:
        model(ids)
    assert {path: tuple(value.shape) for path, value in cache.items()} == {
        f"blocks.{i}.attention.{name}": shape
        for i in (0, 1)
        for name, shape in (("weights", (2, 3, 11, 11)), ("outputs", (2, 3, 11, 8)))
    }
    torch.testing.assert_close(cache["blocks.1.attention.weights"].sum(-1), torch.ones(2, 3, 11, dtype=torch.float64))
    with pytest.raises(RuntimeError), m.record(model):
        raise RuntimeError
    assert not any(module._forward_hooks for module in model.modules())


def test_a_silenced_head_is_a_head_whose_rows_of_w_o_are_zero():
    model, ids = small(), some_ids()
    with torch.no_grad():
        with m.without_heads(model, [(0, 1), (1, 2)]):
            silenced = model(ids)
        intact = model(ids)
        model.blocks[0].attention.w_o[8:16] = 0
        model.blocks[1].attention.w_o[16:] = 0
        torch.testing.assert_close(silenced, model(ids), atol=1e-12, rtol=0)
        assert not torch.allclose(silenced, intact)


def test_a_head_that_is_not_there_cannot_be_silenced():
    for head in ((2, 0), (0, 3), (-1, 0)):
        with pytest.raises(ValueError, match="heads must be"), m.without_heads(small(), [head]):
            pass


def test_a_head_silenced_to_its_own_constant_output_changes_nothing():
    model, ids = small(n_layers=1), some_ids(1, 1)  # one token: its output is its mean
    with torch.no_grad():
        with m.record(model, ("outputs",)) as cache:
            intact = model(ids)
        means = [outputs.mean((0, 2)) for outputs in cache.values()]
        with m.without_heads(model, [(0, 0), (0, 2)], means):
            torch.testing.assert_close(model(ids), intact, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(3, dtype=torch.long), "ids must be integers"),
        (torch.zeros(1, 3), "ids must be integers"),
        (torch.full((1, 3), 19), "ids must lie in 0 ... 18"),
        (torch.full((1, 3), -1), "ids must lie in 0 ... 18"),
    ],
)
def test_bad_ids_get_one_sentence(ids, words):
    with pytest.raises(ValueError, match=words) as refused:
        small()(ids)
    assert "\n" not in str(refused.value)
