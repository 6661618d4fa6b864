"""Records what lecture 05 quotes: tokens a second on one machine, and from three seeds attention sinks and a quantised
cache with and without outliers.

    python -m data.recorded.lecture_05            # about three minutes; writes data/recorded/lecture_05.json
"""

import json
import time

import torch
from torch.nn import functional as F

from attention.experiments.kv_cache import look_at_sink, plant_outliers, train_copier
from attention.kv_cache import (
    KVCache,
    LearnedSink,
    NullKey,
    QuantizedKVCache,
    new_caches,
)
from attention.multi_head import TransformerConfig, TransformerLM
from attention.rotary import Rotary
from utils import data, training

SEEDS = range(3)
BITS, KEY_AXES = (8, 4, 2), ("token", "channel")


def sinks():
    """look_at_sink of three kinds of copier, for each seed."""
    kinds = {
        "plain": (lambda: None, None),
        "off by one": (lambda: None, NullKey),
        "learned sink": (lambda: LearnedSink(32, n_heads=1), NullKey),
    }
    return {
        kind: [look_at_sink(train_copier(seed, positions(), make_cache), make_cache) for seed in SEEDS]
        for kind, (positions, make_cache) in kinds.items()
    }


def train_reader(seed, corpus, n_characters):
    """The character model of lecture 05, trained on windows of 128 characters."""
    model = TransformerLM(TransformerConfig(n_characters, 64, 4, 2, 128), positions=Rotary(16)).double()
    batches = training.windows(corpus, 128, 12, seed)
    training.fit(training.initialise(model, seed), batches, training.next_token_loss, 250, lr=6e-3)
    return model


@torch.no_grad()
def extra_losses(model, pages):
    """Loss over that of an exact cache, in nats, {bits: {key_axis: number}}, on the second half of each page."""

    def loss(make_cache):
        caches = [make_cache() for _ in model.blocks]
        logits = torch.cat([model(ids, caches=caches) for ids in pages[:, :-1].split(32, dim=1)], dim=1)
        return F.cross_entropy(logits[:, 64:].mT, pages[:, 65:]).item()

    exact = loss(lambda: KVCache(len(pages), model.config.n_heads, 128, model.config.d_head))
    return {bits: {axis: loss(lambda: QuantizedKVCache(bits, 32, axis)) - exact for axis in KEY_AXES} for bits in BITS}


def quantised():
    """Extra loss of a character model with a quantised cache, as trained and with outliers planted, for each seed."""
    alphabet, corpus, held_out = data.characters()
    starts = torch.linspace(0, len(held_out) - 130, 48).long()
    pages = held_out[starts[:, None] + torch.arange(129)]
    readers = [train_reader(seed, corpus, len(alphabet)) for seed in SEEDS]
    return [
        {"usual": extra_losses(reader, pages), "planted": extra_losses(plant_outliers(reader), pages)}
        for reader in readers
    ]


@torch.no_grad()
def tokens_a_second():
    """Tokens a second when n are there, with and without a cache, {"n": [...], "cache": [...], "no cache": [...]}.

    The model of lecture 05, untrained; one thread, processor time, the least of many turns.
    """
    model = training.initialise(TransformerLM(TransformerConfig(103, 64, 4, 2, 128), positions=Rotary(16)).double(), 0)
    ids, found = (
        torch.zeros(1, 2049, dtype=torch.long),
        {"n": [64, 128, 256, 512, 1024, 2048], "cache": [], "no cache": []},
    )

    def least(run, turns):
        times = []
        for _ in range(turns):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return min(times)

    for n in found["n"]:
        caches = new_caches(model, 1, n + 1)
        model(ids[:, :n], caches=caches)

        def one_token():
            model(ids[:, n : n + 1], caches=caches)
            for cache in caches:
                cache.rewind(n)

        found["cache"].append(1 / least(one_token, 200))
        found["no cache"].append(1 / least(lambda: model(ids[:, : n + 1]), 20))
    return found


def rounded(value):
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, int):
        return value
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value]


def main():
    torch.set_num_threads(1)
    record = {
        "made_by": "python -m data.recorded.lecture_05",
        "tokens_a_second": tokens_a_second(),
        "sinks": sinks(),
        "quantised": quantised(),
    }
    record = {key: value if isinstance(value, str) else rounded(value) for key, value in record.items()}
    path = data.FOLDER / "recorded" / "lecture_05.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
