"""Lecture 04: the tasks ask what they say, memories do what they promise, costs agree with published numbers."""

import itertools
import json

import numpy as np
import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from attention import long_context as lc
from attention.experiments import long_context as tasks
from attention.fundamentals import attention_numpy
from attention.multi_head import TransformerConfig, TransformerLM
from attention.rotary import ALiBi, Rotary
from data.recorded.lecture_04 import SEEDS
from utils import data, training

MODELS = {
    m["name"]: m for m in json.loads((data.FOLDER / "long_context_models.json").read_text(encoding="utf-8"))["models"]
}


def names_and_contents(ids):
    return ids // tasks.N_SYMBOLS, ids % tasks.N_SYMBOLS


@pytest.mark.parametrize(("chains", "hops", "seq_len"), [(6, 1, 32), (1, 0, 5), (4, 4, 33), (8, 3, 32)])
def test_every_answer_is_found_by_following_the_statements(chains, hops, seq_len):
    ids, answers, order = tasks.documents(np.random.default_rng(1), 20, seq_len, chains, hops)
    n = chains * (hops + 1)
    assert ids.shape == answers.shape == (20, seq_len + n + 1)
    names, contents = names_and_contents(ids)
    for row in range(20):
        known = {}
        for place in range(seq_len):
            name, content = names[row, place], contents[row, place]
            if name < tasks.VALUES:
                assert name not in known
                known[name] = known[content] if content < tasks.VALUES else content  # what it refers to came before
                assert answers[row, place] == known[name]
            else:
                assert answers[row, place] == tasks.NO_ANSWER
        assert len(known) == n
        for place in range(seq_len, seq_len + n):
            assert contents[row, place] == tasks.ASK and answers[row, place] == known[names[row, place]]
        asked = names[row, seq_len : seq_len + n]
        by_chain = asked[order[row].argsort()].reshape(chains, hops + 1)
        said = {names[row, place]: contents[row, place] for place in range(seq_len)}
        assert (np.vectorize(said.get)(by_chain[:, 1:]) == by_chain[:, :-1]).all() if hops else True


def test_the_order_of_the_questions_gives_no_answer_away():
    ids, answers, order = tasks.documents(np.random.default_rng(1), 4000, 32)
    assert (np.sort(order, axis=1) == np.arange(12)).all()
    asked = answers[:, 32:44]
    same = (asked[:, 1:] == asked[:, :-1]).mean()  # 1 in 11 shares its chain, 1 in 32 its value by chance
    assert abs(same - (1 / 11 + 10 / 11 / 32)) < 0.01


def test_recorded_readers_answer_at_the_length_they_were_trained_at():
    recorded = np.load(data.FOLDER / "recorded" / "lecture_04.npz")
    assert str(recorded["made_by"]) == "python -m data.recorded.lecture_04"
    names = [*tasks.POSITIONS, *tasks.STEPS]
    assert set(recorded) - {"made_by"} == {f"{name} {seed}" for name in names for seed in SEEDS}
    ids, answers, _ = tasks.documents(np.random.default_rng(3), 50, 32)
    for reader in itertools.chain(*map(tasks.recorded_readers, tasks.POSITIONS)):
        with torch.no_grad():
            said = reader(torch.from_numpy(ids)).argmax(-1).numpy()
        assert (said == answers)[:, 32:44].mean() > 0.9


def test_handed_on_names_are_followed_also_when_theirs_is_the_first_question():
    ids, answers, order = tasks.documents(np.random.default_rng(98), 200, 32)
    for reader in itertools.chain(*map(tasks.recorded_readers, tasks.POSITIONS)):
        with torch.no_grad():
            right = reader(torch.from_numpy(ids[:, :33]))[:, 32].argmax(-1).numpy() == answers[:, 32]
        assert right[order[:, 0] % 2 == 1].mean() > 0.85


@pytest.mark.parametrize(("name", "low", "high"), [("scratchpad", 0.75, 1.0), ("blank tokens", 0.45, 0.65)])
def test_parity_needs_a_scratchpad(name, low, high):
    for model in tasks.recorded_thinkers(name):
        accuracy = tasks.parity_accuracy(model, 32, name == "scratchpad")
        assert low < accuracy[5:].mean() <= high


def test_the_common_word_is_the_most_frequent_of_a_long_text():
    ids, answers, _ = tasks.documents(np.random.default_rng(0), 30, 400)
    names, contents = names_and_contents(ids[:, :400])
    words = np.concatenate([names, contents], axis=1)
    for row, answer in zip(words, answers[:, -1]):
        assert np.bincount(row[(row >= tasks.WORDS) & (row < tasks.ASK)]).argmax() == answer


def test_too_many_names_get_a_sentence():
    with pytest.raises(ValueError, match=r"at most 32, got 36"):
        tasks.documents(np.random.default_rng(0), 1, 100, chains=12, hops=2)
    with pytest.raises(ValueError, match=r"at most 7, got 12"):
        tasks.documents(np.random.default_rng(0), 1, 7)
    with pytest.raises(ValueError, match="depth must lie between 0 and 1"):
        lc.place_needle(np.zeros((1, 3), int), np.zeros(1, int), np.array([1.5]))
    with pytest.raises(ValueError, match="at most as many queries as keys"):
        lc.relative_shift(np.zeros((3, 2)))


def small_model(n_layers, positions):
    config = TransformerConfig(vocab_size=11, d_model=16, n_heads=2, n_layers=n_layers, d_ff=32)
    return training.initialise(TransformerLM(config, positions=positions).double(), 0)


@pytest.mark.parametrize("positions", [ALiBi(2), Rotary(8)], ids=["ALiBi", "RoPE"])
@pytest.mark.parametrize("segment", [1, 5, 8, 21])
def test_segments_with_enough_memory_are_the_whole_text(positions, segment):
    model, ids = small_model(2, positions), torch.arange(21)[None] % 11
    with torch.no_grad():
        torch.testing.assert_close(lc.read_in_segments(model, ids, segment, memory=21), model(ids), atol=1e-12, rtol=0)


# A memory of half a segment holds tokens that saw their own segment from its start: each layer adds a segment all the same.
REACH = [(1, 4, 4, 7), (2, 4, 4, 11), (3, 4, 4, 15), (2, 4, 2, 9), (2, 4, 0, 3), (2, 1, 3, 6)]


@pytest.mark.parametrize(("n_layers", "segment", "memory", "expected"), REACH)
def test_memory_extends_the_reach_with_every_layer(n_layers, segment, memory, expected):
    model = small_model(n_layers, ALiBi(2))
    ids = torch.from_numpy(np.random.default_rng(0).integers(10, size=(1, 24)))
    reached = 0
    with torch.no_grad():
        before = lc.read_in_segments(model, ids, segment, memory)[0, -1]
        for position in range(24):
            changed = ids.clone()
            changed[0, position] = 10
            if not torch.equal(lc.read_in_segments(model, changed, segment, memory)[0, -1], before):
                reached = max(reached, 23 - position)
    assert reached == expected


def test_a_layer_that_remembers_everything_is_causal_attention():
    torch.manual_seed(0)
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    layer = lc.SegmentAttention(8, 2, segment=3, memory=11).double()
    q, k, v = ((x @ w).unflatten(-1, (2, 4)).transpose(1, 2) for w in (layer.w_q, layer.w_k, layer.w_v))
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), whole @ layer.w_o, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("n_layers", "segment", "memory", "expected"), REACH[:5])
def test_a_stack_of_layers_reaches_as_far_as_segments_with_caches(n_layers, segment, memory, expected):
    layers = [training.initialise(lc.SegmentAttention(8, 2, segment, memory).double(), i) for i in range(n_layers)]

    def last(x):
        for layer in layers:
            x = x + layer(x)
        return x[0, -1]

    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 24, 8)))
    moved = [x + (torch.arange(24) == at)[:, None] for at in range(24)]
    reached = [23 - at for at in range(24) if not torch.equal(last(moved[at]), last(x))]
    assert max(reached) == expected


def test_no_gradient_flows_into_the_memory():
    memory = lc.SegmentMemory(3)
    k = torch.ones(1, 1, 4, 2, requires_grad=True)
    memory.update(k, k)
    k_all, _ = memory.update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert k_all.shape[-2] == 5 and not k_all.requires_grad and memory.length == 6


def test_relative_attention_equals_loops_with_leading_axes():
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((2, 3, 4, 6)), rng.standard_normal((2, 3, 7, 6)), rng.standard_normal((2, 3, 7, 6))
    r, (u, w) = rng.standard_normal((7, 6)), rng.standard_normal((2, 6))
    out = lc.relative_attention_numpy(q, k, v, r, u, w)
    for b, h, i in np.ndindex(2, 3, 4):
        seen = range(i + 3 + 1)
        s = np.array(
            [((q[b, h, i] + u) @ k[b, h, j] + (q[b, h, i] + w) @ r[6 - (i + 3 - j)]) / np.sqrt(6) for j in seen]
        )
        p = np.exp(s - s.max())
        np.testing.assert_allclose(out[b, h, i], p / p.sum() @ v[b, h, : i + 4], atol=1e-12)
    plain = lc.relative_attention_numpy(q, k, v, 0 * r, 0 * u, 0 * w)
    np.testing.assert_allclose(plain, attention_numpy(q, k, v, causal=True), atol=1e-12)
    np.testing.assert_allclose(lc.relative_attention_numpy(q[0, 0], k[0, 0], v[0, 0], r, u, w), out[0, 0], atol=1e-12)


def test_relative_attention_survives_large_scores():
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((3, 2, 5, 6))
    q *= np.array([1e4, 1, 1e-3, -1e4, 10])[:, None]
    found = lc.relative_attention_numpy(q, k, v, np.zeros((5, 6)), np.zeros(6), np.zeros(6))
    np.testing.assert_allclose(found, attention_numpy(q, k, v, causal=True), atol=1e-12)


def test_losses_by_position_are_means_of_what_is_known():
    losses = np.array([[1.0, np.nan, np.nan, 4.0], [3.0, 5.0, np.nan, np.nan]])
    found = lc.loss_by_position(losses, np.array([0, 2, 3, 4]))
    np.testing.assert_array_equal(found, [3.0, np.nan, 4.0])


@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (1, 4), (2, 3, 4, 6)])
def test_the_relative_shift_puts_each_distance_at_its_key(shape):
    scores = np.random.default_rng(0).standard_normal(shape)
    n_queries, n_keys = shape[-2:]
    expected = np.zeros(shape)
    for i, j in np.ndindex(n_queries, n_keys):
        if j <= i + n_keys - n_queries:
            expected[..., i, j] = scores[..., i, n_keys - 1 - (i + n_keys - n_queries - j)]
    np.testing.assert_array_equal(lc.relative_shift(scores), expected)


def test_published_effective_lengths_follow_from_published_scores():
    lengths = np.array([4, 8, 16, 32, 64, 128])
    scores = np.array(
        [
            [96.6, 96.3, 95.2, 93.2, 87.0, 81.2],
            [95.5, 93.8, 91.6, 87.4, 84.7, 77.0],
            [94.7, 92.8, 92.1, 89.9, 86.7, 83.1],
            [87.8, 83.4, 78.6, 69.9, 56.0, 42.0],
        ]
    )
    assert lc.effective_length(lengths, scores, 85.6).tolist() == [64, 32, 64, 4]  # NVIDIA/RULER, as its table says


def test_cache_sizes_agree_with_published_ones():
    per_token = {name: lc.prompt_cost(model, 1000)[1] / 1000 for name, model in MODELS.items()}
    assert per_token["Llama 3.1 70B"] == 320 * 1024
    assert round(per_token["Llama 3.1 405B"] / 1000) == 516 and round(per_token["DeepSeek-V3"] / 1000, 1) == 70.3


def test_cache_sizes_do_not_overflow_for_32_bit_lengths():
    assert lc.kv_cache_bytes(np.array([131072], np.int32), 8, 128, 32).tolist() == [17_179_869_184]


@pytest.mark.parametrize("name", ["Llama 3.1 8B", "Mistral 7B v0.1", "Gemma 2 2B", "DeepSeek-V3"])
def test_the_flops_of_a_prefill_equal_a_sum_over_tokens(name):
    model, n = MODELS[name], 5000
    pairs = sum(model["full"] * t + model["windowed"] * min(t, model["window"] or 0) for t in range(1, n + 1))
    assert np.isclose(
        lc.prompt_cost(model, n)[0], 2 * model["active"] * n + 4 * model["d_attention"] * pairs, rtol=1e-12
    )


def test_the_last_token_of_a_prefill_has_the_share_of_exercise_4a():
    model = MODELS["Llama 3.1 70B"]
    n = 50_000
    last = lc.prompt_cost(model, n)[0] - lc.prompt_cost(model, n - 1)[0]
    assert np.isclose(
        1 - 2 * model["active"] / last, lc.attention_share(np.array([n]), model["active"], 80, 8192)[0], rtol=1e-6
    )


def default(model_type):
    return CONFIG_MAPPING[model_type]()


def test_models_whose_sizes_are_defaults_of_transformers_agree_with_them():
    for model_type, name in (("mistral", "Mistral 7B v0.1"), ("gemma2", "Gemma 2 2B"), ("gpt_oss", "GPT-OSS 120B")):
        config, model = default(model_type), MODELS[name]
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        assert (types.count("full_attention"), types.count("sliding_attention")) == (model["full"], model["windowed"])
        assert config.sliding_window == model["window"]
        assert (config.num_key_value_heads, config.head_dim) == (model["n_kv_heads"], model["d_head"])
        assert config.num_attention_heads * config.head_dim == model["d_attention"]
    v3, model = default("deepseek_v3"), MODELS["DeepSeek-V3"]
    assert (v3.num_hidden_layers, v3.kv_lora_rank + v3.qk_rope_head_dim) == (model["full"], model["latent"])
    assert (
        v3.num_attention_heads * (v3.qk_nope_head_dim + v3.qk_rope_head_dim + v3.v_head_dim) // 2
        == model["d_attention"]
    )


def test_current_approaches_are_as_the_defaults_of_transformers_say():
    count = {kind: default(kind).layer_types.count for kind in ("qwen3_next", "kimi_linear", "deepseek_v4")}
    assert (count["qwen3_next"]("linear_attention"), count["qwen3_next"]("full_attention")) == (36, 12)
    assert (count["kimi_linear"]("linear_attention"), count["kimi_linear"]("full_attention")) == (21, 6)
    assert default("deepseek_v32").index_topk == 2048 and default("jamba").attn_layer_period == 8
    v4 = default("deepseek_v4")
    assert v4.compress_rates == {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    assert (v4.index_topk, v4.sliding_window, v4.max_position_embeddings) == (512, 128, 2**20)


SIZES = [
    ("Llama 3.1 8B", 128_256, 4096, 14336),
    ("Llama 3.1 70B", 128_256, 8192, 28672),
    ("Llama 3.1 405B", 128_256, 16384, 53248),
    ("Mistral 7B v0.1", 32_000, 4096, 14336),
]


@pytest.mark.parametrize(("name", "vocab_size", "d", "d_ff"), SIZES)
def test_the_weights_of_dense_models_follow_from_their_sizes(name, vocab_size, d, d_ff):
    model = MODELS[name]
    layer = 2 * d * d + 2 * d * model["n_kv_heads"] * model["d_head"] + 3 * d * d_ff + 2 * d
    assert model["active"] == 2 * vocab_size * d + (model["full"] + model["windowed"]) * layer + d
