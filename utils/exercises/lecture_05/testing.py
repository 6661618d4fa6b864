"""Lecture 05: a test of a decoder with a cache, tried on right ones and on decoders with one bug each."""

import numpy as np

from utils.judge.bug import bug

MODULE = "kv_cache"


def code(places, d):
    angles = places[..., None] / 30.0 ** (np.arange(d // 2) / (d // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def attend(q, k, v, allowed):
    scores = np.where(allowed, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), -np.inf)
    powers = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300))
    total = powers.sum(-1, keepdims=True)
    return powers / np.where(total == 0, 1, total) @ v


def alone(x):
    at = x + code(np.arange(len(x)), x.shape[1])
    return attend(at, at, x, np.tri(len(x), dtype=bool))


class Growing:
    """A decoder with a place for each bug; as it stands, it is right."""

    def __init__(self, batch, d, padding=None):
        self.k, self.v = np.zeros((2, batch, 0, d))
        self.padding = np.zeros(batch, int) if padding is None else np.array(padding)

    def places(self, columns, n_old):
        return (columns - self.padding[:, None]).clip(0)[:, n_old:]

    def allowed(self, columns, n_old):
        return columns <= columns[n_old:, None]

    def real(self, columns):
        return columns >= self.padding[:, None]

    def read(self, x):
        n_old, columns = self.k.shape[1], np.arange(self.k.shape[1] + x.shape[1])
        q = x + code(self.places(columns, n_old), x.shape[2])
        self.k, self.v = np.concatenate([self.k, q], axis=1), np.concatenate([self.v, x], axis=1)
        return attend(q, self.k, self.v, self.allowed(columns, n_old) & self.real(columns)[:, None])

    def rewind(self, length):
        self.k, self.v = self.k[:, :length], self.v[:, :length]

    def reorder(self, rows):
        self.k, self.v, self.padding = self.k[rows], self.v[rows], self.padding[rows]


@bug("5D", MODULE, subject="Decoder", importance="useful")
def test_decoder(Decoder):
    a, b, c = np.random.default_rng(3).normal(size=(3, 9, 4))
    for pieces in ([2, 3], [4]):
        decoder = Decoder(1, 4)
        assert np.allclose(np.concatenate([decoder.read(x[None])[0] for x in np.split(a, pieces)]), alone(a))
    decoder.rewind(5)
    assert np.allclose(decoder.read(b[None, :2])[0], alone(np.concatenate([a[:5], b[:2]]))[5:])
    decoder = Decoder(2, 4, padding=[0, 2])
    found = decoder.read(np.stack([a[:6], np.concatenate([9 + c[:2], b[:4]])]))
    assert np.allclose(found[1, 2:], alone(b[:4]))
    decoder.reorder(np.array([1, 1]))
    found = decoder.read(np.stack([c[:1], a[:1]]))
    for row, more in zip(found, (c, a)):
        assert np.allclose(row, alone(np.concatenate([b[:4], more[:1]]))[4:])


@test_decoder.right
class _(Growing):
    """Keys and values in arrays that grow."""


@test_decoder.right
class _:
    """In memory that is taken once, a row and a vector at a time."""

    def __init__(self, batch, d, padding=None):
        self.padding = [0] * batch if padding is None else list(padding)
        self.memory, self.length = np.full((2, batch, 40, d), np.nan), 0

    def read(self, x):
        out = np.zeros(x.shape)
        for i in range(x.shape[1]):
            for row, padding in enumerate(self.padding):
                place = self.length - padding
                q = x[row, i] + code(np.array(max(place, 0)), x.shape[2])
                self.memory[:, row, self.length] = q, x[row, i]
                if place >= 0:
                    k, v = self.memory[:, row, padding : self.length + 1]
                    out[row, i] = attend(q[None], k, v, True)[0]
            self.length += 1
        return out

    def rewind(self, length):
        self.length = length

    def reorder(self, rows):
        self.memory, self.padding = self.memory[:, rows].copy(), [self.padding[row] for row in rows]


@test_decoder.mutant("positions begin again at 0 with each piece", "Has your test a second piece?")
class _(Growing):
    def places(self, columns, n_old):
        return (columns - n_old - self.padding[:, None]).clip(0)[:, n_old:]


@test_decoder.mutant(
    "positions are one too small after the first piece", "Do you compare numbers, or only which is largest?"
)
class _(Growing):
    def places(self, columns, n_old):
        return super().places(columns, n_old) - (n_old > 0)


@test_decoder.mutant("a mask at the top left", "Has your test several new vectors behind some that are cached?")
class _(Growing):
    def allowed(self, columns, n_old):
        return (
            super().allowed(columns, n_old) if len(columns) - n_old == 1 else columns <= columns[n_old:, None] - n_old
        )


@test_decoder.mutant("a new vector does not see itself", "What does the first vector of a text find?")
class _(Growing):
    def allowed(self, columns, n_old):
        return columns < columns[n_old:, None]


@test_decoder.mutant("stale rows after a rewind", "What is read after your test has rewound, and how much of it?")
class _(Growing):
    stale = 0

    def rewind(self, length):
        self.stale = max(self.stale, self.k.shape[1] - length)  # the next pieces still see what was forgotten
        self.old = self.k[:, length:], self.v[:, length:]
        super().rewind(length)

    def read(self, x):
        if not self.stale:
            return super().read(x)
        n_old, columns = self.k.shape[1], np.arange(self.k.shape[1] + x.shape[1])
        q = x + code(self.places(columns, n_old), x.shape[2])
        self.k, self.v = np.concatenate([self.k, q], axis=1), np.concatenate([self.v, x], axis=1)
        rest = max(0, self.stale - x.shape[1])
        self.old, self.stale = tuple(old[:, old.shape[1] - rest :] for old in self.old), rest
        allowed = np.pad(
            self.allowed(columns, n_old) & self.real(columns)[:, None],
            ((0, 0), (0, 0), (0, rest)),
            constant_values=True,
        )
        return attend(q, *(np.concatenate(both, axis=1) for both in zip((self.k, self.v), self.old)), allowed)


@test_decoder.mutant("positions count the padding", "What should the first real vector of a row with padding find?")
class _(Growing):
    def places(self, columns, n_old):
        return np.tile(columns[n_old:], (len(self.padding), 1))


@test_decoder.mutant("the padding is seen", "Is the padding of your test different from zero?")
class _(Growing):
    def real(self, columns):
        return np.ones((len(self.padding), len(columns)), bool)


@test_decoder.mutant("a reorder is forgotten", "Whose text does row 0 continue after your test reordered the rows?")
class _(Growing):
    def reorder(self, rows):
        pass


@test_decoder.mutant("only the keys are reordered", "After a reorder, does each row find the values of its own text?")
class _(Growing):
    def reorder(self, rows):
        self.k, self.padding = self.k[rows], self.padding[rows]
