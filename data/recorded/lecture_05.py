"""Records what lecture 05 quotes: tokens a second of SmolLM2 and of a small model, and attention sinks from three seeds.

python -m data.recorded.lecture_05            # about three minutes; writes data/recorded/lecture_05.json
"""

import json
import time

import torch

from attention.experiments.kv_cache import look_at_sink, train_copier
from attention.kv_cache import LearnedSink, NullKey, new_caches
from attention.multi_head import TransformerConfig, TransformerLM, masked_softmax
from attention.rotary import Rotary
from utils import data, language_model, training

SEEDS = range(3)


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


def least(run, turns):
    """The least processor time of some turns, in seconds."""
    times = []
    for _ in range(turns):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


@torch.no_grad()
def tokens_a_second(model, lengths, turns):
    """Tokens a second when n are there, {"n": [...], "with a cache": [...], "without a cache": [...]}.

    One thread, processor time, the least of some turns: (with, without).
    """
    ids = torch.arange(max(lengths) + 1)[None] % model.config.vocab_size
    found = {"n": list(lengths), "with a cache": [], "without a cache": []}
    for n in lengths:
        caches = new_caches(model, 1, n + 1)
        model(ids[:, :n], caches=caches)

        def one_token():
            model(ids[:, n : n + 1], caches=caches)
            for cache in caches:
                cache.rewind(n)

        found["with a cache"].append(1 / least(one_token, turns[0]))
        found["without a cache"].append(1 / least(lambda: model(ids[:, : n + 1]), turns[1]))
    return found


@torch.no_grad()
def softmax_share(model, n=2048):
    """Which share of a forward pass on n tokens is the mask and the softmax, made once more alone."""
    config = model.config
    scores = torch.zeros(1, config.n_heads, n, n, dtype=torch.float64)

    def mask_and_softmax():
        for _ in range(config.n_layers):
            masked_softmax(scores, causal=True)

    whole = least(lambda: model(torch.zeros(1, n, dtype=torch.long)), 5)
    return least(mask_and_softmax, 5) / whole


def rounded(value):
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def main():
    torch.set_num_threads(1)
    small = TransformerLM(TransformerConfig(103, 64, 4, 2, 128), positions=Rotary(16)).double()
    small = training.initialise(small, 0)
    record = {
        "made_by": "python -m data.recorded.lecture_05",
        "tokens_a_second": tokens_a_second(
            language_model.load().replace(last_only=True), (16, 32, 64, 128, 256, 512, 1024), (12, 3)
        ),
        "small_model": tokens_a_second(small, (128, 256, 512, 1024, 2048), (100, 8))
        | {"softmax_share": softmax_share(small)},
        "sinks": sinks(),
    }
    path = data.FOLDER / "recorded" / "lecture_05.json"
    path.write_text(json.dumps(rounded(record), indent=1) + "\n")


if __name__ == "__main__":
    main()
