"""Answers to exercise 5D, the test of a decoder, as learners write them."""

import numpy as np

from attention.kv_cache import place_code, read_alone
from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()


# --- 5D --------------------------------------------------------------------------------------------------------------


@right("5D")
def compares_every_row_with_reading_alone(decoder_class):
    rng = np.random.default_rng(5)
    texts = rng.normal(size=(2, 12, 4))
    decoder = decoder_class(2, 4, [0, 2])
    found = np.concatenate([decoder.read(texts[:, i : i + 3]) for i in (0, 3)] + [decoder.read(texts[:, 6:7])], axis=1)
    np.testing.assert_allclose(found[0], read_alone(texts[0, :7]))
    np.testing.assert_allclose(found[1, 2:], read_alone(texts[1, 2:7]))
    decoder.rewind(4)
    rest = decoder.read(texts[:, 7:9])
    np.testing.assert_allclose(rest[0], read_alone(np.concatenate([texts[0, :4], texts[0, 7:9]]))[4:])
    decoder.reorder(np.array([1, 0]))
    last = decoder.read(texts[:, 10:11])
    kept = np.concatenate([texts[1, 2:4], texts[1, 7:9], texts[0, 10:11]])
    if not np.allclose(last[0, 0], read_alone(kept)[-1]):
        raise ValueError("rows")


@wrong("5D", "Has your test several new vectors behind some that are cached?")
def one_by_one_only(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    decoder = decoder_class(1, 4)
    found = [decoder.read(row[None, None])[0, 0] for row in x]
    assert np.allclose(found, read_alone(x))


@wrong("5D", "Has your test a second piece?")
def all_at_once_only(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    assert np.allclose(decoder_class(1, 4).read(x[None])[0], read_alone(x))


@wrong("5D", "What is read after your test has rewound")
def pieces_only(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    decoder = decoder_class(1, 4)
    assert np.allclose(np.concatenate([decoder.read(part[None])[0] for part in (x[:2], x[2:])]), read_alone(x))


@wrong("5D", "and how much of it?")
def reads_as_much_as_was_forgotten(decoder_class):
    x, y = np.random.default_rng(5).normal(size=(2, 1, 6, 4))
    decoder = decoder_class(1, 4)
    found = np.concatenate([decoder.read(x[:, :2]), decoder.read(x[:, 2:])], axis=1)
    assert np.allclose(found[0], read_alone(x[0]))
    decoder.rewind(4)
    assert np.allclose(decoder.read(y[:, :2])[0], read_alone(np.concatenate([x[0, :4], y[0, :2]]))[4:])


@wrong("5D", "What should the first real vector of a row with padding find?")
def no_padding(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    decoder = decoder_class(1, 4)
    assert np.allclose(np.concatenate([decoder.read(part[None])[0] for part in (x[:2], x[2:])]), read_alone(x))
    decoder.rewind(3)
    assert np.allclose(decoder.read(x[None, 3:5])[0], read_alone(x[:5])[3:])


@wrong("5D", "What should the first real vector of a row with padding find?")
def padding_is_not_looked_at(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    decoder = decoder_class(1, 4)
    assert np.allclose(np.concatenate([decoder.read(part[None])[0] for part in (x[:2], x[2:])]), read_alone(x))
    decoder.rewind(3)
    assert np.allclose(decoder.read(x[None, 3:5])[0], read_alone(x[:5])[3:])
    first = decoder_class(1, 4, [1]).read(x[None, :2])[0, 1]
    assert np.abs(first - x[1]).max() < np.abs(x[:2]).max() * 2
    q = decoder_class(1, 4, [2])
    q.read(np.concatenate([x[:2] * 0 - place_code(np.array([0, 0]), 4), x])[None])


@wrong("5D", "Whose text does row 0 continue")
def never_reorders(decoder_class):
    no_padding(decoder_class)
    x = np.random.default_rng(5).normal(size=(6, 4))
    padded = decoder_class(1, 4, [2]).read(np.concatenate([np.full((2, 4), 7.0), x])[None])
    assert np.allclose(padded[0, 2:], read_alone(x))


@wrong("5D", "does each row find the values of its own text?")
def compares_rows_with_one_another(decoder_class):
    never_reorders(decoder_class)
    texts = np.random.default_rng(5).normal(size=(2, 6, 4))
    decoder = decoder_class(2, 4)
    decoder.read(texts)
    decoder.reorder(np.array([1, 1]))
    decoder.rewind(6)
    new = np.stack([texts[0, :1], texts[0, :1]])
    keys = getattr(decoder, "k", None)
    if keys is not None:
        assert np.allclose(keys[0], keys[1])
    decoder.read(new)


@wrong("5D", "Does your test compare numbers?")
def trusts_the_first(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    decoder = decoder_class(1, 4)
    decoder.read(x[None, :1])
    found = decoder.read(x[None, 1:3])[0]
    assert found.shape == (2, 4) and np.isfinite(found).all()


@wrong("5D", "it survived")
def compares_roughly(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    decoder = decoder_class(1, 4)
    found = np.concatenate([decoder.read(part[None])[0] for part in (x[:3], x[3:])])
    assert np.abs(found - read_alone(x)).max() < 0.4


@wrong("5D", "A test says no with an exception")
def says_what_it_found(decoder_class):
    x = np.ones((1, 2, 4))
    return np.allclose(decoder_class(1, 4).read(x), 1)


@wrong("5D", "The right code is refused")
def wants_no_positions(decoder_class):
    x = np.random.default_rng(5).normal(size=(6, 4))
    assert np.allclose(decoder_class(1, 4).read(x[None])[0, -1], x.mean(0))
