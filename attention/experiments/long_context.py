# Generated from solutions/04_context_length_challenge.py by `python course.py build`. Edit that file, not this one.
"""Lecture 04 · The context-length challenge: what it trains for itself alone."""

import functools
import time
import tracemalloc

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from attention.long_context import place_needle, read_in_segments
from attention.multi_head import Positions, TransformerConfig, TransformerLM
from attention.rotary import ALiBi, Rotary, apply_rope_torch, rope_frequencies
from utils import data, training
from utils.data import EXCERPTS

__all__ = [
    "statement",
    "documents",
    "Statements",
    "statement_reader",
    "train_reader",
    "train_statement_reader",
    "recorded_readers",
    "in_words",
    "needle_grid",
    "answer",
    "losses_of",
    "four_tasks",
    "found_by_hops",
    "found_by_age",
    "needle_weight",
    "parity_stream",
    "train_parity",
    "recorded_thinkers",
    "parity_accuracy",
    "passkey",
    "rescaled_model",
    "peak_and_seconds",
]


N_NAMES, VALUES, WORDS, ASK, MOST, N_SYMBOLS, NO_ANSWER = 32, 32, 64, 96, 97, 98, -100

def statement(name, content):
    """The id of a statement: names, contents and ids are integers of one shape. Names are symbols 0 to 31, values 32 to
    63, words 64 to 95; ASK and MOST make questions."""
    return name * N_SYMBOLS + content

def documents(rng, batch, seq_len, chains=6, hops=1, share=0.3):
    """Documents of statements, followed by questions about all of them. rng: a numpy Generator.

    chains variables get a value; each is handed on `hops` times to another name, always in this order in the text. The
    other statements are hay: random words, of which one has the share `share`.
    Returns (ids, answers, order). ids and answers: (batch, seq_len + chains * (hops + 1) + 1) int64, the statements,
    then a question for each name in random order, then one for the most common word; answers holds the symbol that the
    name stands for, after a statement and after a question, and NO_ANSWER after hay. order, integers
    (batch, chains * (hops + 1)): order // (hops + 1) is the chain of a question, order % (hops + 1) how often its value
    was handed on.
    ValueError when the names or the places do not suffice.
    """
    n = chains * (hops + 1)
    if n > min(N_NAMES, seq_len):
        raise ValueError(f"chains * (hops + 1) must be at most {min(N_NAMES, seq_len)}, got {n}")
    names = rng.permuted(np.tile(np.arange(N_NAMES), (batch, 1)), axis=1)[:, :n].reshape(batch, chains, hops + 1)
    values = VALUES + rng.integers(32, size=(batch, chains, 1))
    common = WORDS + rng.integers(32, size=(batch, 1))
    text = WORDS + rng.integers(32, size=(batch, seq_len, 2))
    text = np.where(rng.random(text.shape) < share, common[:, :, None], text)
    places = np.sort(rng.random((batch, seq_len)).argsort(axis=1)[:, :n].reshape(names.shape), axis=2)
    rows = np.arange(batch)[:, None, None]
    text[rows, places] = np.stack([names, np.concatenate([values, names[:, :, :-1]], axis=2)], axis=-1)
    worth = np.broadcast_to(values, names.shape)
    said = np.full((batch, seq_len), NO_ANSWER)
    said[rows, places] = worth
    order = rng.permuted(np.tile(np.arange(n), (batch, 1)), axis=1)
    asked, replies = (np.take_along_axis(a.reshape(batch, n), order, axis=1) for a in (statement(names, ASK), worth))
    most = np.full((batch, 1), statement(MOST, MOST))
    ids = np.concatenate([statement(text[..., 0], text[..., 1]), asked, most], axis=1)
    return ids, np.concatenate([said, replies, common], axis=1), order


class Statements(nn.Module):
    """Embeds statements: ids (batch, seq) -> (batch, seq, d_model), a vector for the name plus one for the content."""

    def __init__(self, d_model):
        super().__init__()
        self.name, self.content = nn.Embedding(N_SYMBOLS, d_model), nn.Embedding(N_SYMBOLS, d_model)

    def forward(self, ids):
        return self.name(ids // N_SYMBOLS) + self.content(ids % N_SYMBOLS)

def statement_reader(positions, n_layers=2):
    """An untrained model, ids of statements -> logits over the symbols; d_model 32, two heads of 16, a Positions."""
    model = TransformerLM(TransformerConfig(N_SYMBOLS**2, 32, 2, n_layers, 64), positions=positions)
    model.embedding, model.unembedding = Statements(32), nn.Linear(32, N_SYMBOLS, bias=False)
    return model.double()

def train_reader(model, seed, steps, seq_len=32, batch=32, lr=1e-2):
    """Train on documents of seq_len statements: six variables, each handed on once. Returns the model."""
    rng = np.random.default_rng(seed)
    batches = ([torch.from_numpy(a) for a in documents(rng, batch, seq_len)[:2]] for _ in range(steps))

    def loss(model, pair):
        return F.cross_entropy(model(pair[0]).mT, pair[1], ignore_index=NO_ANSWER)

    training.fit(model, batches, loss, steps, lr=lr)
    return model

POSITIONS = {"RoPE": lambda: Rotary(16), "ALiBi": lambda: ALiBi(2), "no positions": Positions}

def train_statement_reader(kind, seed):
    """A reader with positions of this kind, trained for 400 steps."""
    return train_reader(training.initialise(statement_reader(POSITIONS[kind]()), seed), seed, 400)


@functools.cache
def recorded():
    """The weights that data/recorded/lecture_04.py made, by name and seed."""
    return dict(np.load(data.FOLDER / "recorded" / "lecture_04.npz"))

def with_weights(model, name):
    """A model with recorded weights, ready to be asked."""
    nn.utils.vector_to_parameters(torch.from_numpy(recorded()[name]).double(), model.parameters())
    return model.eval()

def recorded_readers(kind):
    """The readers of seeds 0, 1 and 2 with positions of this kind, as train_statement_reader makes them."""
    return [with_weights(statement_reader(POSITIONS[kind]()), f"{kind} {seed}") for seed in range(3)]

def in_words(token, alone=False):
    """A statement as a reader of the course sees it: (x7, 41); alone: one symbol."""
    if alone:
        kinds = ((VALUES, f"x{token}"), (WORDS, f"{token - VALUES}"), (ASK, f"w{token - WORDS}"), (N_SYMBOLS, "?"))
        return next(word for end, word in kinds if token < end)
    if token == statement(MOST, MOST):
        return "most?"
    return f"({in_words(token // N_SYMBOLS, True)}, {in_words(token % N_SYMBOLS, True)})"


@torch.no_grad()
def needle_grid(models, lengths, rivals, n_depths=9, repeats=6):
    """Mean probability (n_depths, lengths) of the needle's value: rows from the start of the document to its end.

    rivals: how many other variables are put into the hay, at random places.
    """
    columns, batch = [], n_depths * repeats
    for n in lengths:
        rng = np.random.default_rng(5)
        hay = statement(*WORDS + rng.integers(32, size=(2, batch, n)))
        name, value = rng.integers(N_NAMES, size=batch), VALUES + rng.integers(32, size=batch)
        for _ in range(rivals):
            other = (name + 1 + rng.integers(N_NAMES - 1, size=batch)) % N_NAMES
            hay[np.arange(batch), rng.integers(n, size=batch)] = statement(other, VALUES + rng.integers(32, size=batch))
        text = place_needle(hay, statement(name, value), np.repeat(np.linspace(0, 1, n_depths), repeats))
        ids = torch.from_numpy(np.concatenate([text, statement(name, ASK)[:, None]], axis=1))
        right = [model(ids)[:, -1].softmax(-1).numpy()[np.arange(batch), value] for model in models]
        columns.append(np.mean(right, axis=0).reshape(n_depths, repeats).mean(1))
    return np.stack(columns, axis=1)

@torch.no_grad()
def answer(model, seq_len, batch=100, hops=1, **task):
    """Which questions are answered correctly: booleans (batch, chains, hops + 1), and (batch,) for the common word."""
    ids, answers, order = documents(np.random.default_rng(99), batch, seq_len, hops=hops, **task)
    right = model(torch.from_numpy(ids)).argmax(-1).numpy()[:, seq_len:] == answers[:, seq_len:]
    by_name = np.take_along_axis(right[:, :-1], order.argsort(axis=1), axis=1)
    return by_name.reshape(batch, -1, hops + 1), right[:, -1]

@torch.no_grad()
def losses_of(model, seq_len=256, batch=30):
    """What the model says after each statement of long documents, as losses (batch, seq_len); nan after hay."""
    ids, answers, _ = documents(np.random.default_rng(7), batch, seq_len, chains=15)
    logits, answers = model(torch.from_numpy(ids)), torch.from_numpy(answers)
    losses = F.cross_entropy(logits.mT, answers, ignore_index=NO_ANSWER, reduction="none")
    return losses.masked_fill(answers == NO_ANSWER, torch.nan).numpy()[:, :seq_len]

def found_by_hops(model):
    """Share of values found that were handed on 0 to 4 times: (5,)."""
    return answer(model, 32, batch=60, chains=4, hops=4)[0].mean((0, 1))

def four_tasks(model, n, batch=40):
    """Accuracy at length n: needle, many needles, tracking, common word."""
    needle = answer(model, n, batch, chains=1, hops=0)[0].mean()
    many = answer(model, n, batch, chains=8, hops=0)[0].mean()
    tracking, common = answer(model, n, batch)
    return np.array([needle, many, tracking[..., 1].mean(), common.mean()])


@torch.no_grad()
def found_by_age(model, memory, batch=60):
    """Share of values found, by the segment of the fact: three segments of 32, and the questions in a fourth."""
    ids, answers, _ = documents(np.random.default_rng(42), batch, 96, chains=12, hops=0)
    said = read_in_segments(model, torch.from_numpy(ids), 32, memory).argmax(-1).numpy()
    right = said[:, 96:108] == answers[:, 96:108]
    names = ids // N_SYMBOLS
    place = (names[:, None, :96] == names[:, 96:108, None]).argmax(-1)                    # where the fact stands
    return [right[place // 32 == s].mean() for s in range(3)]

@torch.no_grad()
def needle_weight(model, n, batch=20):
    """Weight that the best head of the question gives to the needle, median over documents."""
    seen = []
    hooks = [block.attention.weights.register_forward_hook(lambda module, args, out: seen.append(out[:, :, -1, n // 2]))
             for block in model.blocks]
    rng = np.random.default_rng(0)
    name, value = rng.integers(N_NAMES, size=batch), VALUES + rng.integers(32, size=batch)
    hay = statement(*WORDS + rng.integers(32, size=(2, batch, n)))
    text = place_needle(hay, statement(name, value), np.full(batch, 0.5))
    model(torch.from_numpy(np.concatenate([text, statement(name, ASK)[:, None]], axis=1)))
    for hook in hooks:
        hook.remove()
    return np.median(torch.cat(seen, dim=1).max(dim=1).values.numpy())


BLANK = 4                                                   # 0, 1: bits; 2, 3: parity even, odd
STEPS = {"scratchpad": True, "blank tokens": False}

def parity_stream(rng, batch, n_bits, scratchpad):
    """Bits with a token after each: its parity so far, or a blank. ids (batch, 2 n_bits), parity (batch, n_bits)."""
    bits = rng.integers(2, size=(batch, n_bits))
    parity = 2 + bits.cumsum(axis=1) % 2
    ids = np.stack([bits, parity if scratchpad else np.full_like(bits, BLANK)], axis=2).reshape(batch, -1)
    return torch.from_numpy(ids), torch.from_numpy(parity)

def parity_model():
    """Untrained: two layers of width 32."""
    return TransformerLM(TransformerConfig(5, 32, 4, 2, 64), positions=ALiBi(4)).double()

def train_parity(name, seed, steps=200):
    """Trained on 16 bits, name: one of STEPS."""
    model, rng = training.initialise(parity_model(), seed), np.random.default_rng(seed)

    def loss(model, pair):
        return F.cross_entropy(model(pair[0])[:, ::2].mT, pair[1])

    training.fit(model, (parity_stream(rng, 32, 16, STEPS[name]) for _ in range(steps)), loss, steps, lr=6e-3)
    return model

def recorded_thinkers(name):
    """The models of seeds 0, 1 and 2, as train_parity makes them."""
    return [with_weights(parity_model(), f"{name} {seed}") for seed in range(3)]

@torch.no_grad()
def parity_accuracy(model, n_bits, scratchpad, batch=50):
    """Share of right answers after each bit. With a scratchpad the model reads what it wrote, right or wrong."""
    ids, parity = parity_stream(np.random.default_rng(99), batch, n_bits, scratchpad)
    for i in range(n_bits if scratchpad else 0):
        ids[:, 2 * i + 1] = model(ids[:, :2 * i + 1])[:, -1].argmax(-1)
    return (model(ids)[:, ::2].argmax(-1) == parity).double().mean(0).numpy()


def passkey(model, key, depth, of="help", n_text=190):
    """A pass key in prose: (prompt, rest), ids (1, n) each; rest is the question with the digits as its last five tokens.

    model: a language model; key: five digits; depth from 0 to 1: where in the first n_text tokens of the text.
    """
    text = model.encode(EXCERPTS[of]())[:, :n_text]
    needle = model.encode(f" The pass key is {key}. Remember it: {key} is the pass key.")
    at = round(depth * n_text)
    prompt = torch.cat([text[:, :at], needle, text[:, at:]], dim=1)
    question = "\n\nWhat is the pass key? The pass key is"
    return prompt, torch.cat([model.encode(question), model.encode(f" {key}")], dim=1)

def rescaled_model(model, way, factor):
    """The language model with RoPE as it is, or rescaled: "PI", "NTK" or "YaRN" (without its temperature)."""
    d, base, trained = model.config.d_head, model.config.base, 8192
    if way == "NTK":
        base *= factor ** (d / (d - 2))
    scaling = {"PI": {"rope_type": "linear", "factor": factor},
               "YaRN": {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}}.get(way)
    frequencies = torch.as_tensor(rope_frequencies(d, base=base, scaling=scaling)[0])
    return model.replace(rotate=lambda x, positions: apply_rope_torch(x, positions, frequencies))

def peak_and_seconds(counted, timed, qkv):
    """Most bytes that `counted` has in use at once, above those at the start; seconds of processor time of `timed`.

    Two functions of causal attention, of arrays and of tensors; qkv (3, n, d), an array.
    """
    tensors = torch.from_numpy(qkv)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    counted(*qkv, causal=True)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        timed(*tensors, causal=True)
        seconds.append(time.process_time() - begin)
    return peak, min(seconds)
