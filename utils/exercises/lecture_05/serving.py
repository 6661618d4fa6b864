"""Lecture 05: the verification of a draft. The oracle goes one token at a time."""

import numpy as np

from utils.exercises.arrays import draw
from utils.judge.function import exercise

MODULE = "kv_cache"


# --- 5F --------------------------------------------------------------------------------------------------------------


@exercise("5F", MODULE, formerly="5.4", importance="useful")
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


@verify_draft.property(
    "a wrong first guess: the model's own token alone",
    hint="What does row 0 of the logits say, whatever the draft is?",
)
def _(ask, rng):
    ask(np.array([2, 3]), logits_that_say(rng, [4, 3, 1]))


@verify_draft.property(
    "the draft is kept as far as the model agrees, then comes the model's own token",
    hint="Where does the draft first differ from what the model says, and what is written there?",
)
def _(ask, rng):
    ask(np.array([2, 3, 5, 0]), logits_that_say(rng, [2, 3, 1, 4, 5]))


@verify_draft.property(
    "a match behind the first mismatch means nothing",
    hint="What had the model read when it said the tokens after the first wrong guess?",
)
def _(ask, rng):
    ask(np.array([2, 3, 5, 0]), logits_that_say(rng, [2, 4, 5, 0, 1]))
    ask(np.array([1, 1, 1]), logits_that_say(rng, [0, 1, 1, 1]))


@verify_draft.property(
    "all right: the whole draft and one token more",
    hint="What does the last row of the logits say?",
)
def _(ask, rng):
    ask(np.array([2, 3, 5]), logits_that_say(rng, [2, 3, 5, 4]))


@verify_draft.property(
    "no guesses: one token, as in plain decoding",
    hint="What does your code do with an empty draft?",
)
def _(ask, rng):
    ask(np.array([], dtype=int), logits_that_say(rng, [3]))


@verify_draft.property(
    "thirty random drafts",
    hint="Try a draft of three by hand: right, wrong, right.",
)
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
