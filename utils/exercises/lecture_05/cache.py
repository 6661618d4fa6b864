"""Lecture 05: the cache of one layer, a module with a memory. It is asked for a course of steps, not for one call."""

from inspect import isclass

import torch
from torch import nn

from utils.exercises.arrays import draw
from utils.judge.drivers import Named
from utils.judge.module import ModuleExercise, ModuleTrial
from utils.judge.result import NotAttempted
from utils.judge.stub import is_python_stub

MODULE = "kv_cache"
PARTS = "keys", "values", "length after each step", "lies in self.k and self.v"


def steps_of(cache_class):
    """A module that makes a cache of this class and takes it through some steps; a class that is one already stays."""
    if getattr(cache_class, "takes_steps", False):
        return cache_class

    class Steps(nn.Module):
        takes_steps = True

        def __init__(self, **sizes):
            super().__init__()
            self.cache = cache_class(**sizes)

        def forward(self, k, v, steps):
            """steps: ("update", n), the next n of the tokens; ("rewind", length); ("reorder", rows).

            Returns, under the names of PARTS, what all updates returned, one after the other, flat where there were several; the
            length after each step; and whether the keys and values that came back lie in the memory that was there.
            """
            keys, values, lengths, in_place, read = [], [], [], [], 0
            for name, what in steps:
                if name == "update":
                    before = [t.untyped_storage().data_ptr() for t in (self.cache.k, self.cache.v)]
                    found = self.cache(k[:, :, read : read + what], v[:, :, read : read + what])
                    in_place += [f.untyped_storage().data_ptr() == b for f, b in zip(found, before)]
                    for kept, part in zip((keys, values), found):
                        kept.append(part.clone())
                    read += what
                elif name == "rewind":
                    self.cache.rewind(what)
                else:
                    self.cache.reorder(torch.tensor(what))
                lengths.append(self.cache.length)
            if len(keys) > 1:
                keys, values = ([part.flatten() for part in parts] for parts in (keys, values))
            parts = torch.cat(keys), torch.cat(values), torch.tensor(lengths), torch.tensor(in_place)
            return Named(zip(PARTS, parts))

    return Steps


class CacheExercise(ModuleExercise):
    def judge(self, answer, own=None):
        methods = [vars(answer).get(name) for name in ("update", "rewind", "reorder")] if isclass(answer) else []
        if methods and all(m and is_python_stub(m, getattr(own, m.__name__, None)) for m in methods):
            raise NotAttempted
        return super().judge(answer, own)

    def trial(self, answer, own):
        return ModuleTrial(self, steps_of(answer), own)

    def mistake(self, message):
        def add(answer):
            super(CacheExercise, self).mistake(message)(steps_of(answer))
            return answer

        return add


class Memory(nn.Module):
    """What every answer here begins with."""

    def __init__(self, batch, n_heads, capacity, d_head, dtype=torch.float64, device=None):
        super().__init__()
        for name in ("k", "v"):
            self.register_buffer(name, torch.zeros(batch, n_heads, capacity, d_head, dtype=dtype, device=device))
        self.length = 0

    def forward(self, k, v):
        return self.update(k, v)


class OneByOne(Memory):  # the oracle: a token, and a row, at a time
    def update(self, k, v):
        for i in range(k.shape[2]):
            for memory, new in ((self.k, k), (self.v, v)):
                memory[:, :, self.length + i] = new[:, :, i]
        self.length += k.shape[2]
        return self.k.narrow(2, 0, self.length), self.v.narrow(2, 0, self.length)

    def rewind(self, length):
        self.length = length

    def reorder(self, rows):
        self.k = torch.stack([self.k[int(row)].clone() for row in rows])
        self.v = torch.stack([self.v[int(row)].clone() for row in rows])


SIZES = {"batch": 2, "n_heads": 2, "capacity": 9, "d_head": 3}
KVCache = CacheExercise("5B", "KVCache", MODULE, "", "essential", oracle=steps_of(OneByOne), make=SIZES)


def tokens(rng, n, batch=2, n_heads=2, d_head=3):
    """k and v of n tokens."""
    return [torch.from_numpy(draw(rng, batch, n_heads, n, d_head)) for _ in "kv"]


@KVCache.property(
    "the first update returns what it was given",
    hint="Which part of the memory is handed back, and what is its length?",
)
def _(ask, rng):
    ask(*tokens(rng, 2, 1, 1, 2), [("update", 2)], make={"batch": 1, "n_heads": 1, "capacity": 4, "d_head": 2})
    ask(*tokens(rng, 3), [("update", 3)])


@KVCache.property(
    "the next ones come after it, one or several at a time", hint="Where in the memory do the new tokens begin and end?"
)
def _(ask, rng):
    ask(*tokens(rng, 3), [("update", 2), ("update", 1)])
    ask(*tokens(rng, 9), [("update", 3), ("update", 1), ("update", 4), ("update", 1)])


@KVCache.property(
    "no token, and a memory that is full to the last",
    hint="What does your slice do when nothing comes, or nothing is free?",
)
def _(ask, rng):
    ask(*tokens(rng, 9), [("update", 0), ("update", 9), ("update", 0)])


@KVCache.property(
    "what is there is neither copied nor made anew: views into the same memory",
    hint="Does your update make new tensors (torch.cat, clone), or write into self.k and self.v?",
)
def _(ask, rng):
    ask(*tokens(rng, 7), [("update", 5), ("update", 1), ("update", 1)])


@KVCache.property(
    "after a rewind the forgotten tokens are gone, and new ones take their places",
    hint="After a rewind, how long is what update returns, where does it write, and is all the memory still there?",
)
def _(ask, rng):
    ask(*tokens(rng, 8), [("update", 5), ("rewind", 2), ("update", 1), ("update", 2)])
    ask(*tokens(rng, 4), [("update", 3), ("rewind", 0), ("update", 1)])


@KVCache.property(
    "reorder: each row continues what row rows[i] was, twice where it is wanted twice",
    hint="Do keys and values both change rows, and does the length stay? What if row 0 is overwritten before row 1 asks for it?",
)
def _(ask, rng):
    make = SIZES | {"batch": 3}
    ask(*tokens(rng, 4, 3), [("update", 3), ("reorder", [1, 0, 2]), ("update", 1)], make=make)
    ask(*tokens(rng, 4, 3), [("update", 3), ("reorder", [2, 2, 0]), ("update", 1)], make=make)


@KVCache.property(
    "all at once: float32, a rewind, a reorder, several tokens",
    hint="In which order do your methods change length and memory?",
)
def _(ask, rng):
    k, v = (t.float() for t in tokens(rng, 9))
    steps = [
        ("update", 4),
        ("reorder", [1, 1]),
        ("update", 2),
        ("rewind", 3),
        ("update", 2),
        ("reorder", [1, 0]),
        ("update", 1),
    ]
    ask(k, v, steps, make=SIZES | {"dtype": torch.float32})


class Usual(Memory):
    """The cache in the usual way. The mistakes override one of its methods; as it stands, it is right."""

    def write(self, k, v, begin, end):
        self.k[:, :, begin:end], self.v[:, :, begin:end] = k, v

    def found(self):
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def update(self, k, v):
        end = self.length + k.shape[2]
        self.write(k, v, self.length, end)
        self.length = end
        return self.found()

    def rewind(self, length):
        self.length = length

    def reorder(self, rows):
        self.k, self.v = self.k[rows], self.v[rows]


@KVCache.mistake("Only the new keys and values come back: return all that are there so far.")
class _(Usual):
    def update(self, k, v):
        super().update(k, v)
        return self.k[:, :, self.length - k.shape[2] : self.length], self.v[
            :, :, self.length - k.shape[2] : self.length
        ]


@KVCache.mistake("A rewind goes back *to* a length, not *by* one.")
class _(Usual):
    def rewind(self, length):
        self.length -= length


@KVCache.mistake("The length grows by one, however many tokens come.")
class _(Usual):
    def update(self, k, v):
        begin, end = self.length, self.length + k.shape[2]
        self.write(k, v, begin, end)
        self.length += 1
        return self.k[:, :, :end], self.v[:, :, :end]


@KVCache.mistake("The whole memory comes back, with what was never written: return the first `length` tokens.")
class _(Usual):
    def found(self):
        return self.k, self.v


@KVCache.mistake("The length does not move: the next tokens are written over these.")
class _(Usual):
    def update(self, k, v):
        super().update(k, v)
        found, self.length = self.found(), 0
        return found


@KVCache.mistake("The new tokens are written at the beginning: they go after the first `length`.")
class _(Usual):
    def write(self, k, v, begin, end):
        super().write(k, v, 0, end - begin)


@KVCache.mistake("Keys and values are exchanged: return (keys, values).")
class _(Usual):
    def found(self):
        return super().found()[::-1]


@KVCache.mistake("The values are the keys once more: v is stored, too.")
class _(Usual):
    def write(self, k, v, begin, end):
        super().write(k, k, begin, end)


@KVCache.mistake(
    "What comes back does not lie in the memory that was taken: hand back slices of self.k and self.v, "
    "neither k and v, nor what torch.cat or clone make."
)
class _(Usual):
    def update(self, k, v):
        self.k = torch.cat([self.k[:, :, : self.length], k], dim=2)
        self.v = torch.cat([self.v[:, :, : self.length], v], dim=2)
        self.length += k.shape[2]
        return self.found()


@KVCache.mistake(
    "What comes back does not lie in the memory that was taken: hand back slices of self.k and self.v, "
    "neither k and v, nor what torch.cat or clone make."
)
class _(Usual):
    def found(self):
        return tuple(part.clone() for part in super().found())


@KVCache.mistake("A rewind changes nothing: the forgotten tokens are still there.")
class _(Usual):
    def rewind(self, length):
        pass


@KVCache.mistake("Only the keys are reordered: the values change rows with them.")
class _(Usual):
    def reorder(self, rows):
        self.k = self.k[rows]


@KVCache.mistake("A reorder changes nothing.")
class _(Usual):
    def reorder(self, rows):
        pass


@KVCache.mistake("Rows are overwritten before others ask for them: take all of them first, self.k[rows].")
class _(Usual):
    def reorder(self, rows):
        for i, row in enumerate(rows.tolist()):
            self.k[i], self.v[i] = self.k[row].clone(), self.v[row].clone()


@KVCache.mistake("The rows go the other way: row i continues what row rows[i] was.")
class _(Usual):
    def reorder(self, rows):
        k, v = self.k.clone(), self.v.clone()
        k[rows], v[rows] = self.k, self.v
        self.k, self.v = k, v
