"""The tokenizer, held to a second implementation: byte-pair encoding in plain Python, from the same file."""

import re

import pytest

from utils import data
from utils.language_model import files
from utils.language_model.gguf import GGUF

WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+|\d")
SAMPLES = [
    "",
    " ",
    "a  b\n\n c ",
    "In 1905, 3.14 and x2",
    "Übergrößen, naïve, 日本語",
    "don't they'll 'quoted'",
    "\ttab\r\n",
]


def bytes_as_letters():
    """GPT-2's table: a printable letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def in_plain_python(metadata):
    """A function from text to ids."""
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    letters, known = bytes_as_letters(), {}

    def merged(word):
        parts = [letters[byte] for byte in word.encode()]
        while True:
            pairs = {pair: ranks[pair] for pair in zip(parts, parts[1:]) if pair in ranks}
            if not pairs:
                return [ids[part] for part in parts]
            best, at = min(pairs, key=pairs.get), 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = ["".join(best)]
                at += 1

    def encode(text):
        found = []
        pieces = re.split(r"(\d)", text)  # digits first, one by one; then words in what is between
        for word in [word for piece in pieces for word in WORDS.findall(piece)]:
            if word not in known:
                known[word] = merged(word)
            found += known[word]
        return found

    return encode


@pytest.fixture(scope="module")
def plain(smollm):
    return in_plain_python(GGUF(files.path()).metadata)


def test_all_prose_of_the_course_becomes_the_same_tokens(smollm, plain):
    assert smollm.tokenizer.encode(data.prose()) == plain(data.prose())


@pytest.mark.parametrize("text", SAMPLES)
def test_digits_letters_and_white_space_become_the_same_tokens_and_come_back(smollm, plain, text):
    ids = smollm.tokenizer.encode(text)
    assert ids == plain(text)
    assert smollm.tokenizer.decode(ids) == text


def test_a_chat_is_written_as_transformers_writes_it(smollm):
    from transformers import PreTrainedTokenizerFast

    metadata = GGUF(files.path()).metadata
    theirs = PreTrainedTokenizerFast(tokenizer_object=smollm.tokenizer._made)
    theirs.chat_template = metadata["tokenizer.chat_template"]
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    text = smollm.tokenizer.chat("Why is the sky blue?")
    assert text == theirs.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert smollm.tokenizer.encode(text).count(smollm.tokenizer.end) == 2  # one token, not eight letters


def test_what_is_no_text_is_refused(smollm):
    with pytest.raises(ValueError, match="text must be a string, got int"):
        smollm.encode(5)
