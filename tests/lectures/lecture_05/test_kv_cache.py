"""Lecture 05: every cache gives what reading everything again gives, against loops, limits and transformers."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from attention import kv_cache as c
from attention.fundamentals import attention_numpy
from attention.multi_head import TransformerConfig, TransformerLM
from attention.rotary import ALiBi, Learned, Rotary, Sinusoidal
from utils import training

CONFIG = TransformerConfig(vocab_size=23, d_model=24, n_heads=3, n_layers=2, d_ff=40)
SCHEMES = {
    "none": lambda: None,
    "rope": lambda: Rotary(8),
    "alibi": lambda: ALiBi(3),
    "sinusoidal": Sinusoidal,
    "learned": lambda: Learned(64, 24),
}


def make_model(scheme="rope", seed=0):
    return training.initialise(TransformerLM(CONFIG, positions=SCHEMES[scheme]()).double(), seed).eval()


def make_ids(batch, n, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).integers(CONFIG.vocab_size, size=(batch, n)))


def paged_caches(batch, n_pages=64, page_size=5):
    pools = [c.PagePool(n_pages, page_size, CONFIG.n_heads, CONFIG.d_head) for _ in range(CONFIG.n_layers)]
    return [c.PagedKVCache(pool, batch) for pool in pools]


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make", [lambda model: c.new_caches(model, 2, 40), lambda model: paged_caches(2)])
@torch.no_grad()
def test_cached_logits_equal_reading_everything_for_any_chunks_and_positions(make, scheme):
    model, ids = make_model(scheme), make_ids(2, 40)
    whole = model(ids)
    for sizes in ([1] * 40, [40], [17, 1, 1, 21], [3] * 13 + [1]):
        caches = make(model)
        parts = [model(part, caches=caches) for part in ids.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0)


@torch.no_grad()
def test_paged_equals_contiguous_bit_for_bit():
    model, ids = make_model(), make_ids(3, 33)
    contiguous, paged = c.new_caches(model, 3, 33), paged_caches(3)
    for part in ids.split([20, 1, 12], dim=1):
        assert torch.equal(model(part, caches=contiguous), model(part, caches=paged))
    for plain, pages in zip(contiguous, paged):
        assert torch.equal(plain.k, pages._gather(pages.pool.k_pages))
        assert torch.equal(plain.v, pages._gather(pages.pool.v_pages))


@pytest.mark.parametrize("window", [1, 2, 7, 30])
@pytest.mark.parametrize("scheme", ["rope", "alibi", "none"])
@torch.no_grad()
def test_a_ring_equals_reading_everything_under_a_window_mask(scheme, window):
    model, ids = make_model(scheme), make_ids(2, 25)
    back = np.arange(25)[:, None] - np.arange(25)
    rings = [c.RingKVCache(2, CONFIG.n_heads, window, CONFIG.d_head) for _ in range(CONFIG.n_layers)]
    ringed = torch.cat([model(t, caches=rings) for t in ids.split(1, dim=1)], 1)
    torch.testing.assert_close(ringed, model(ids, mask=torch.from_numpy(back < window)), atol=1e-10, rtol=0)
    assert rings[0].n_bytes == 2 * 2 * CONFIG.n_heads * window * CONFIG.d_head * 8


@torch.no_grad()
def test_after_a_rewind_and_a_reorder_a_cache_equals_reading_everything():
    model, ids, other = make_model(), make_ids(3, 20), make_ids(3, 20, seed=2)
    caches = c.new_caches(model, 3, 30)
    model(ids, caches=caches)
    rows = torch.tensor([2, 2, 0])
    for cache in caches:
        cache.rewind(8)
        cache.reorder(rows)
    text = torch.cat([ids[rows, :8], other[:, :5]], 1)
    torch.testing.assert_close(model(other[:, :5], caches=caches), model(text)[:, 8:], atol=1e-10, rtol=0)


def test_what_does_not_fit_into_a_cache_is_refused_in_a_sentence():
    cache, ring = c.KVCache(2, 3, 4, 8), c.RingKVCache(2, 3, 4, 8)

    def new(*shape):
        return torch.zeros(shape)

    with pytest.raises(ValueError, match="holds 4 tokens, got 5"):
        cache.update(new(2, 3, 5, 8), new(2, 3, 5, 8))
    for shape in ((1, 3, 1, 8), (2, 1, 1, 8), (2, 3, 1, 1), (2, 3, 8)):  # most of these would broadcast
        for kind in (cache, ring, c.PagedKVCache(c.PagePool(4, 2, 3, 8), 2)):
            with pytest.raises(ValueError, match=r"must be \(2, 3, n_new, 8\)"):
                kind.update(new(*shape), new(*shape))
    with pytest.raises(ValueError, match="one token at a time, got 2"):
        ring.update(new(2, 3, 2, 8), new(2, 3, 2, 8))
    with pytest.raises(ValueError, match="between 0 and 0, got 1"):
        cache.rewind(1)


# --- pages -----------------------------------------------------------------------------------------------------------


def test_pages_are_never_lost_doubled_or_shared_by_writers_in_a_thousand_random_steps():
    rng, pool = np.random.default_rng(3), c.PagePool(40, 3, 1, 2)
    alive, texts = [], []  # caches of one row, and what each must hold
    for _ in range(1000):
        action = rng.integers(4)
        if action == 0 and len(alive) < 6:
            alive.append(c.PagedKVCache(pool, 1))
            texts.append([])
        elif action == 1 and alive:
            which = rng.integers(len(alive))
            if alive[which].length:
                alive.append(alive[which].fork([0]))
                texts.append(list(texts[which]))
        elif action == 2 and alive:
            which = rng.integers(len(alive))
            new = rng.standard_normal((1, 1, rng.integers(1, 4), 2))
            try:
                k, _ = alive[which].update(torch.from_numpy(new), torch.from_numpy(-new))
            except MemoryError:
                alive[which].close()
                del alive[which], texts[which]
                continue
            texts[which] += new[0, 0].tolist()
            assert k[0, 0].tolist() == texts[which]
        elif alive and len(alive) > 3:
            which = rng.integers(len(alive))
            alive[which].close()
            del alive[which], texts[which]
        readers = list(itertools.chain(*(cache.tables[0] for cache in alive)))
        assert pool.users == [readers.count(page) for page in range(40)]
        assert sorted(pool.free) == [page for page in range(40) if pool.users[page] == 0]
    for cache, text in zip(alive, texts):
        if cache.length:
            assert cache._gather(pool.k_pages)[0, 0].tolist() == text


def test_a_fork_writes_only_into_pages_of_its_own():
    pool = c.PagePool(20, 4, 1, 1)
    first = c.PagedKVCache(pool, 1)
    first.update(torch.arange(6.0).view(1, 1, 6, 1), torch.zeros(1, 1, 6, 1))
    forks = first.fork([0, 0, 0])
    assert len(pool.free) == 18
    k, _ = forks.update(torch.tensor([10.0, 11.0, 12.0]).view(3, 1, 1, 1), torch.zeros(3, 1, 1, 1))
    assert k[:, 0, :, 0].tolist() == [[0, 1, 2, 3, 4, 5, new] for new in (10, 11, 12)]
    assert first._gather(pool.k_pages)[0, 0, :, 0].tolist() == list(range(6))
    assert len(pool.free) == 15
    forks.close()
    first.close()
    assert sorted(pool.free) == list(range(20))


# --- decoding attention ----------------------------------------------------------------------------------------------


def decode_input(lengths, heads, capacity, d, dtype=np.float64, seed=4):
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal(shape).astype(dtype)
        for shape in ((len(lengths), heads, d), *[(len(lengths), heads, capacity, d)] * 2)
    )
    for row, n in enumerate(lengths):
        k[row, :, n:] = v[row, :, n:] = np.nan  # whoever reads behind the end will notice
    return q, k, v


def cut_into_pages(cache, lengths, page_size, order):
    pages = np.full((len(order), page_size, cache.shape[1], cache.shape[3]), np.nan, cache.dtype)
    table, free = np.full((len(lengths), -(-max(lengths) // page_size) + 1), -1), iter(order)
    for row, n in enumerate(lengths):
        for column in range(-(-n // page_size)):
            here = cache[row, :, column * page_size : min(n, (column + 1) * page_size)]
            table[row, column] = next(free)
            pages[table[row, column], : here.shape[1]] = here.swapaxes(0, 1)
    return pages, table


@pytest.mark.parametrize("lengths", [[1], [0, 5], [7, 33, 1], [33, 0, 32, 31]])
def test_decode_attention_and_its_paged_form_equal_plain_attention_on_each_row(lengths):
    q, k, v = decode_input(lengths, 3, 33, 5)
    out = c.decode_attention_numpy(q, k, v, np.array(lengths))
    for row, n in enumerate(lengths):
        expected = attention_numpy(q[row][:, None], k[row, :, :n], v[row, :, :n])[:, 0]
        np.testing.assert_allclose(out[row], expected, atol=1e-12)
    torched = c.decode_attention_torch(*(torch.from_numpy(a) for a in (q, k, v)), torch.tensor(lengths))
    np.testing.assert_allclose(torched.numpy(), out, atol=1e-12)
    for page_size in (1, 4, 64):
        order = np.random.default_rng(5).permutation(100)
        (k_pages, table), (v_pages, _) = (cut_into_pages(a, lengths, page_size, order) for a in (k, v))
        np.testing.assert_array_equal(c.paged_decode_attention_numpy(q, k_pages, v_pages, table, lengths), out)
        arrays = [torch.from_numpy(a) for a in (q, k_pages, v_pages)]
        paged = c.paged_decode_attention_torch(*arrays, torch.from_numpy(table), torch.tensor(lengths))
        np.testing.assert_allclose(paged.numpy(), out, atol=1e-12)


def test_decode_attention_of_integers_is_double_and_a_row_without_finite_scores_is_zero():
    q, k, v = (a.astype(np.int64) for a in decode_input([4], 2, 4, 4))
    out, torched = (
        c.decode_attention_numpy(q, k, v, [4]),
        c.decode_attention_torch(*map(torch.from_numpy, (q, k, v)), [4]),
    )
    assert out.dtype == np.float64 and torched.dtype == torch.float64
    np.testing.assert_allclose(torched.numpy(), out, atol=1e-6)
    keys = np.full((1, 2, 4, 4), -np.inf)
    for function, kind in ((c.decode_attention_numpy, np.asarray), (c.decode_attention_torch, torch.as_tensor)):
        assert (np.asarray(function(kind(np.ones((1, 2, 4))), kind(keys), kind(np.ones_like(keys)), [4])) == 0).all()


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_generation_is_token_exact_greedy_and_sampled(scheme):
    model, ids = make_model(scheme), make_ids(3, 7)
    for arguments in ({}, {"temperature": 0.7, "seed": 5}, {"temperature": 1.5, "top_k": 4}):
        plain = c.generate(model, ids, 20, **arguments)
        assert torch.equal(plain, c.generate(model, ids, 20, c.new_caches(model, 3, 27), **arguments))
        assert torch.equal(plain, c.generate(model, ids, 20, paged_caches(3), **arguments))
        assert torch.equal(plain[:, :7], ids) and plain.shape == (3, 27)
    assert not torch.equal(c.generate(model, ids, 20, temperature=1.0), c.generate(model, ids, 20))


def test_generation_refuses_what_makes_no_sense():
    model, ids = make_model(), make_ids(1, 3)
    for arguments in ((ids[:, :0], 2), (ids[0], 2), (ids, -1)):
        with pytest.raises(ValueError):
            c.generate(model, *arguments)
    for keywords in ({"temperature": -1.0}, {"temperature": 1.0, "top_k": 0}):
        with pytest.raises(ValueError, match="top_k"):
            c.generate(model, ids, 2, **keywords)


def test_a_used_cache_is_refused_by_all_that_would_read_it_as_empty():
    model, ids = make_model(), make_ids(1, 3)
    used = c.new_caches(model, 1, 20)
    c.generate(model, ids, 2, used)
    for write in (
        lambda caches: c.generate(model, ids, 2, caches),
        lambda caches: c.beam_search(model, ids, 2, 1, caches),
        lambda caches: c.generate_ragged(model, ids, [3], 2, caches),
    ):
        for caches in (used, c.new_caches(model, 1, 20)[:1]):
            with pytest.raises(ValueError, match="caches must be 2, one a layer, and empty"):
                write(caches)


def test_beam_search_refuses_several_prompts_and_impossible_widths():
    model = make_model()
    for rows, width in ((2, 4), (1, 0), (1, CONFIG.vocab_size + 1)):
        with pytest.raises(ValueError, match=f"width between 1 and {CONFIG.vocab_size}, got"):
            c.beam_search(model, make_ids(rows, 3), 2, width, c.new_caches(model, max(width, 1), 5))


def test_of_equal_logits_no_more_than_top_k_are_drawn():
    drawn = c.sample(torch.zeros(1000, 5), 1.0, 2, np.random.default_rng(0))
    assert len(set(drawn.tolist())) == 2


def test_caches_lie_where_the_model_lies():
    assert {cache.k.device.type for cache in c.new_caches(make_model().to("meta"), 1, 4)} == {"meta"}


def test_samples_follow_the_softmax_and_respect_top_k():
    logits = torch.tensor([[3.0, 1.0, 2.0, -1.0, 0.0]])
    for temperature, top_k in itertools.product((0.5, 1.0, 2.0), (None, 1, 3, 9)):
        drawn = c.sample(logits.expand(40_000, -1), temperature, top_k, np.random.default_rng(6))
        kept = (
            logits if top_k is None else logits.masked_fill(logits < logits.topk(min(top_k, 5)).values[:, -1:], -np.inf)
        )
        expected = torch.softmax(kept[0] / temperature, -1)
        np.testing.assert_allclose(torch.bincount(drawn, minlength=5) / 40_000, expected, atol=0.01)


@pytest.mark.parametrize("scheme", ["rope", "alibi", "sinusoidal", "learned"])
def test_in_a_ragged_batch_each_row_is_what_it_is_alone(scheme):
    model, lengths = make_model(scheme), np.array([3, 11, 1, 8])
    rows = [make_ids(1, n, seed=n)[0] for n in lengths]
    padded = torch.stack([F.pad(row, (11 - len(row), 0), value=22) for row in rows])
    together = c.generate_ragged(model, padded, lengths, 15, c.new_caches(model, 4, 26))
    for row, out in zip(rows, together):
        assert torch.equal(out[11:], c.generate(model, row[None], 15)[0, len(row) :])
    with pytest.raises(ValueError, match="each at least 1"):
        c.generate_ragged(model, padded, [3, 0, 1, 8], 2, c.new_caches(model, 4, 26))


def test_beam_search_with_as_many_beams_as_tokens_is_exhaustive_for_two_tokens():
    model, ids, n = make_model(), make_ids(1, 5), CONFIG.vocab_size
    beams, totals = c.beam_search(model, ids, 2, n, c.new_caches(model, n, 7))
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    with torch.no_grad():
        steps = torch.log_softmax(model(torch.cat([ids.expand(n * n, -1), pairs], 1)), -1)
    exhaustive = steps[:, 4].gather(1, pairs[:, :1])[:, 0] + steps[:, 5].gather(1, pairs[:, 1:])[:, 0]
    best = exhaustive.topk(n)
    torch.testing.assert_close(totals, best.values, atol=1e-10, rtol=0)
    assert torch.equal(beams[0, 5:], pairs[best.indices[0]])


def test_one_beam_is_greedy():
    model, ids = make_model(), make_ids(1, 5)
    beams, _ = c.beam_search(model, ids, 12, 1, c.new_caches(model, 1, 20))
    assert torch.equal(beams, c.generate(model, ids, 12))


@pytest.mark.parametrize("quality", [0.0, 0.5, 1.0])
def test_speculation_is_greedy_exact_whatever_is_guessed(quality):
    model, ids, rng = make_model(), make_ids(1, 6), np.random.default_rng(7)
    truth = c.generate(model, ids, 40)[0]

    def propose(written):
        right = truth[written.shape[1] : written.shape[1] + 4].numpy()
        guesses = np.where(rng.random(len(right)) < quality, right, rng.integers(CONFIG.vocab_size, size=len(right)))
        return guesses.tolist()

    out, calls = c.generate_speculative(model, ids, 30, propose, c.new_caches(model, 1, 6 + 30 - 1))
    assert torch.equal(out[0], truth[:36])
    assert calls <= 30 and (quality < 1 or calls == 6)
    _, calls = c.generate_speculative(model, ids, 30, lambda written: [], c.new_caches(model, 1, 48))
    assert calls == 30


# --- a third party ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_generation_with_a_cache_equals_gpt_neox_of_transformers_with_the_same_weights():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        vocab_size=23,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        use_parallel_residual=False,
        max_position_embeddings=64,
        hidden_act="gelu",
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        eos_token_id=None,
        bos_token_id=None,
    )
    theirs, ours = transformers.GPTNeoXForCausalLM(config).double().eval(), make_model("rope", seed=8)
    state = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()}
    state["gpt_neox.embed_in.weight"], state["lm_head.weight"] = ours.embedding.weight, ours.unembedding.weight
    state["gpt_neox.final_layer_norm.weight"] = ours.norm.weight
    for layer, block in enumerate(ours.blocks):
        at, attention = f"gpt_neox.layers.{layer}.", block.attention
        heads = [w.mT.view(3, 8, 24) for w in (attention.w_q, attention.w_k, attention.w_v)]
        state[at + "attention.query_key_value.weight"] = torch.cat(heads, dim=1).reshape(72, 24)
        state[at + "attention.dense.weight"] = attention.w_o.mT.contiguous()
        state[at + "input_layernorm.weight"] = block.norm_1.weight
        state[at + "post_attention_layernorm.weight"] = block.norm_2.weight
        state[at + "mlp.dense_h_to_4h.weight"] = block.feed_forward[0].weight
        state[at + "mlp.dense_4h_to_h.weight"] = block.feed_forward[2].weight
    theirs.load_state_dict(state)
    ids = make_ids(2, 9)
    # Their cosines are single precision.
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-7, rtol=0)
    expected = theirs.generate(ids, max_new_tokens=25, do_sample=False, use_cache=True, pad_token_id=0)
    assert torch.equal(expected, c.generate(ours, ids, 25, c.new_caches(ours, 2, 34)))
    past = theirs(ids[:, :5], use_cache=True).past_key_values
    caches = c.new_caches(ours, 2, 9)
    ours(ids[:, :5], caches=caches)
    for layer, cache in enumerate(caches):
        torch.testing.assert_close(past.layers[layer].keys, cache.k[:, :, :5], atol=1e-7, rtol=0)
        torch.testing.assert_close(past.layers[layer].values, cache.v[:, :, :5], atol=1e-7, rtol=0)


# --- operations ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_counted_operations_equal_the_formula_for_any_chunk():
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = make_model(), make_ids(1, 30)
    caches = c.new_caches(model, 1, 30)
    begin = 0
    for size in (1, 7, 2, 20):
        with FlopCounterMode(display=False) as counter:
            model(ids[:, begin : begin + size], caches=caches)
        begin += size
        assert counter.get_total_flops() == c.forward_flops(np.array([size]), np.array([begin]), 24, 40, 2, 23)[0]
