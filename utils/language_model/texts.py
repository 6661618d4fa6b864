"""What the model reads and how it writes into a cell."""

import itertools

from utils.data import EXCERPTS

WIDTH = 80  # columns after which a new word begins a new line


def excerpt(model, n_tokens, of="help"):
    """The first n_tokens of a text: ids (1, n_tokens).

    of: "help" is Python's help on the import statement, which the model has probably been trained on; "course" is this
    course, which it has not. Quote differences between losses rather than losses. ValueError for another text or length.
    """
    if of not in EXCERPTS:
        raise ValueError(f"of must be one of {', '.join(EXCERPTS)}, got {of!r}")
    ids = model.encode(EXCERPTS[of]())
    if not 1 <= n_tokens <= ids.shape[1]:
        raise ValueError(f"n_tokens must be from 1 to {ids.shape[1]} for {of!r}, got {n_tokens}")
    return ids[:, :n_tokens]


class Typewriter:
    """Prints tokens as they come: typewriter(ids), ids of any shape with one text's next tokens. Long lines are wrapped."""

    def __init__(self, model):
        self.tokenizer, self.ids, self.written, self.column = model.tokenizer, [], 0, 0

    def __call__(self, ids):
        self.ids += ids.flatten().tolist()
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # a letter of which some bytes are still to come
            return
        for word in text[self.written :].replace("\n", "\n\0").replace(" ", "\0 ").split("\0"):
            self._print(word)
        self.written = len(text)

    def _print(self, word):
        if word.startswith(" ") and self.column + len(word) > WIDTH:
            word = "\n" + word[1:]
        print(word, end="", flush=True)
        self.column = len(word) - word.rfind("\n") - 1 if "\n" in word else self.column + len(word)


def speak(model, prompt, n_tokens=40):
    """Print a prompt and what the model writes after it, always the likeliest token, until n_tokens or the end of an answer.

    For an answer rather than a continuation: speak(model, model.tokenizer.chat("Why is the sky blue?")).
    """
    typewriter, ids = Typewriter(model), model.encode(prompt)
    typewriter(ids)
    for token in itertools.islice(model.stream(ids), n_tokens):
        if int(token) == model.tokenizer.end:
            break
        typewriter(token)
    print()
