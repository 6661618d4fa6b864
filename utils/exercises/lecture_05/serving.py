"""Lecture 05: left padding, and the verification of a draft. The oracles go one token at a time."""

import numpy as np

from utils.exercises.arrays import draw
from utils.judge.function import exercise

MODULE = "kv_cache"


# --- 5.3 -------------------------------------------------------------------------------------------------------------


@exercise("5.3", MODULE, returns=("mask", "positions"))
def left_padding(lengths, n_keys):
    mask = np.zeros((len(lengths), 1, 1, n_keys), dtype=bool)
    positions = np.zeros((len(lengths), n_keys), dtype=int)
    for row, length in enumerate(lengths):
        for position in range(int(length)):
            column = n_keys - int(length) + position
            mask[row, 0, 0, column], positions[row, column] = True, position
    return mask, positions


@left_padding.property("the last lengths[b] columns are tokens, numbered from 0")
def _(ask, rng):
    ask(np.array([2]), 4)
    ask(np.array([3, 1]), 5)


@left_padding.property("a row without padding: all columns, 0 to n_keys - 1")
def _(ask, rng):
    ask(np.array([4, 2]), 4)


@left_padding.property("an empty row: nothing may be seen, positions 0")
def _(ask, rng):
    ask(np.array([0, 2]), 3)


@left_padding.property("more columns than the longest row")
def _(ask, rng):
    ask(np.array([2, 5, 1]), 9)


@left_padding.property("positions are integers that an embedding could take: none is negative")
def _(ask, rng):
    ask(np.array([1, 6]), 6)


def padding_with(mask=None, positions=None):
    def answer(lengths, n_keys):
        right = left_padding.oracle(lengths, n_keys)
        made = [
            part if make is None else make(np.asarray(lengths), n_keys) for make, part in zip((mask, positions), right)
        ]
        return made[0], made[1]

    return answer


def columns(lengths, n_keys):
    return np.broadcast_to(np.arange(n_keys), (len(lengths), n_keys))


for message, answer in {
    "Positions count the padding: a row's first token has position 0.": padding_with(positions=columns),
    "Padding has negative positions: clip them at 0.": padding_with(
        positions=lambda lengths, n: columns(lengths, n) - (n - lengths[:, None])
    ),
    "Positions count from 1: cumsum of the mask, minus 1.": padding_with(
        positions=lambda lengths, n: (columns(lengths, n) - (n - lengths[:, None]) + 1).clip(0)
    ),
    "The mask is the wrong way round: True is where a token stands.": padding_with(
        mask=lambda lengths, n: ~left_padding.oracle(lengths, n)[0]
    ),
    "The mask is (batch, n_keys): give it the axes of heads and queries, (batch, 1, 1, n_keys).": padding_with(
        mask=lambda lengths, n: left_padding.oracle(lengths, n)[0][:, 0, 0]
    ),
    "The mask is off by one column: row b has n_keys - lengths[b] columns of padding.": padding_with(
        mask=lambda lengths, n: (columns(lengths, n) > n - lengths[:, None])[:, None, None, :]
    ),
}.items():
    left_padding.mistake(message)(answer)


@left_padding.mistake("The padding is on the right: here the tokens stand in the last columns.")
def _(lengths, n_keys):
    inside = columns(lengths, n_keys) < np.asarray(lengths)[:, None]
    return inside[:, None, None, :], columns(lengths, n_keys) * inside


# --- 5.4 -------------------------------------------------------------------------------------------------------------


@exercise("5.4", MODULE)
def verify_draft(draft, logits):
    written = []
    for place in range(len(draft) + 1):
        own = max(range(logits.shape[1]), key=lambda token: logits[place, token])
        written.append(own)
        if place == len(draft) or own != draft[place]:
            return np.array(written)


def logits_that_say(rng, tokens, vocab_size=6):
    """Logits whose largest of each row is the given token's."""
    logits = draw(rng, len(tokens), vocab_size)
    logits[np.arange(len(tokens)), tokens] = logits.max(1) + 1
    return logits


@verify_draft.property("a wrong first guess: the model's own token alone")
def _(ask, rng):
    ask(np.array([2, 3]), logits_that_say(rng, [4, 3, 1]))


@verify_draft.property("the draft is kept as far as the model agrees, then comes the model's own token")
def _(ask, rng):
    ask(np.array([2, 3, 5, 0]), logits_that_say(rng, [2, 3, 1, 4, 5]))


@verify_draft.property("a match behind the first mismatch means nothing")
def _(ask, rng):
    ask(np.array([2, 3, 5, 0]), logits_that_say(rng, [2, 4, 5, 0, 1]))
    ask(np.array([1, 1, 1]), logits_that_say(rng, [0, 1, 1, 1]))


@verify_draft.property("all right: the whole draft and one token more")
def _(ask, rng):
    ask(np.array([2, 3, 5]), logits_that_say(rng, [2, 3, 5, 4]))


@verify_draft.property("no guesses: one token, as in plain decoding")
def _(ask, rng):
    ask(np.array([], dtype=int), logits_that_say(rng, [3]))


@verify_draft.property("thirty random drafts")
def _(ask, rng):
    for _ in range(30):
        tokens = rng.integers(3, size=6)
        ask(np.where(rng.random(5) < 0.7, tokens[:5], rng.integers(3, size=5)), logits_that_say(rng, tokens, 3))


def accepted(draft, logits):
    """How many guesses are right before the first wrong one."""
    return len(verify_draft.oracle(draft, logits)) - 1


@verify_draft.mistake("The model's own token is missing: where it disagrees, and behind a draft that is all right.")
def _(draft, logits):
    return np.asarray(draft)[: accepted(draft, logits)]


@verify_draft.mistake("Where the draft is wrong, the model's own token is written, not the guess.")
def _(draft, logits):
    n = accepted(draft, logits)
    return np.append(draft[: n + 1], logits[-1].argmax()) if n == len(draft) else np.asarray(draft[: n + 1])


@verify_draft.mistake("All matches are counted: what comes behind the first mismatch means nothing.")
def _(draft, logits):
    own = logits.argmax(-1)
    return own[: (own[:-1] == draft).sum() + 1]


@verify_draft.mistake("All matches are counted: what comes behind the first mismatch means nothing.")
def _(draft, logits):
    own = logits.argmax(-1)
    match = own[:-1] == draft
    return np.append(draft[match], own[match.sum()])


@verify_draft.mistake("When nothing differs, argmax of the comparison is 0: ask first whether there is a mismatch.")
def _(draft, logits):
    own, n = logits.argmax(-1), accepted(draft, logits)
    return own[:1] if n == len(draft) else own[: n + 1]


@verify_draft.mistake("The model's own token comes from the first row that disagrees, not from the last row of logits.")
def _(draft, logits):
    return np.append(draft[: accepted(draft, logits)], logits[-1].argmax())


@verify_draft.mistake("Everything the model says is taken: behind the first mismatch it read a wrong guess.")
def _(draft, logits):
    return logits.argmax(-1)


@verify_draft.mistake("If the whole draft is right, the last row of logits gives one token more.")
def _(draft, logits):
    n = accepted(draft, logits)
    return np.asarray(draft) if n == len(draft) else verify_draft.oracle(draft, logits)


@verify_draft.mistake("Row i of the logits is what the model says after draft[:i]: compare it with draft[i].")
def _(draft, logits):
    own = logits.argmax(-1)
    wrong = np.flatnonzero(own[1:] != draft)
    return own[: (wrong[0] if len(wrong) else len(draft)) + 1]
