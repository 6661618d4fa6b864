"""Lecture 08: what a token takes in the cache of each device."""

import numpy as np

from utils.exercises.arrays import refuses
from utils.judge.function import exercise
from utils.judge.result import Failed

MODULE = "grouped_query"


@exercise("8G", MODULE, importance="extra")
def cache_per_device(n_layers, n_kv_heads, d_head, n_devices=1, n_shared_layers=0, n_bytes=2):
    if n_kv_heads % n_devices and n_devices % n_kv_heads:
        raise ValueError(f"one of n_kv_heads and n_devices must divide the other, got {n_kv_heads} and {n_devices}")
    numbers = 0
    for _ in range(n_layers - n_shared_layers):
        numbers += 2 * d_head * len(range(0, n_kv_heads, n_devices))
    return np.int64(numbers * n_bytes)


@cache_per_device.property(
    "one device: keys and values of all layers",
    hint="How many numbers has a token in one layer, keys and values together?",
)
def _(ask, rng):
    ask(1, 1, 4)
    ask(80, 8, 128)


@cache_per_device.property("heads are dealt out", hint="How many of 8 heads has each of 4 devices?")
def _(ask, rng):
    for n_devices in (2, 4, 8):
        ask(3, 8, 16, n_devices)


@cache_per_device.property(
    "with more devices than heads, a device has one", hint="What does 8 // 16 give, and what has a device at least?"
)
def _(ask, rng):
    ask(3, 8, 16, 16)
    ask(2, 1, 64, 8)


@cache_per_device.property("shared layers store nothing", hint="From which number are they taken away?")
def _(ask, rng):
    ask(35, 2, 256, n_shared_layers=15)
    ask(6, 4, 8, 2, 3)


@cache_per_device.property("bytes of a number, and all at once", hint="Which of your factors is fixed?")
def _(ask, rng):
    ask(3, 8, 16, n_bytes=1)
    ask(61, 6, 40, 3, 20, 4)
    ask(7, 3, 10, 12, 2, 8)


@cache_per_device.property(
    "numbers that do not divide one another are refused",
    hint="8 heads on 3 devices: which remainder shows it? And 3 heads on 8?",
)
def _(ask, rng):
    for heads, devices in ((8, 3), (3, 8), (6, 4)):
        if not refuses(ask, 2, heads, 16, devices):
            raise Failed(f"{heads} heads on {devices} devices: a ValueError is expected")


def usual_cache(n_layers, n_kv_heads, d_head, n_devices=1, n_shared_layers=0, n_bytes=2, *, both=2, heads=lambda n, m: max(1, n // m),
                layers=lambda n, m: n - m, given=lambda n: n, refuse=True):  # fmt: skip
    """Right, until one of what follows the `*` is replaced."""
    if refuse and n_kv_heads % n_devices and n_devices % n_kv_heads:
        raise ValueError("one must divide the other")
    return int(both * layers(n_layers, n_shared_layers) * heads(n_kv_heads, n_devices) * d_head * given(n_bytes))


cache_per_device.mistakes_of(
    usual_cache,
    {
        "Keys and values are two: a factor of 2 is missing.": {"both": 1},
        "With more devices than heads a device has one head, not none.": {"heads": lambda n, m: n // m},
        "With more devices than heads a device gets a part of a head here: it has a whole one.": {
            "heads": lambda n, m: n / m
        },
        "Every device holds all heads here: they are dealt out.": {"heads": lambda n, m: n},
        "The layers that share still count: they store nothing.": {"layers": lambda n, m: n},
        "Only the layers that share are counted.": {"layers": lambda n, m: m or n},
        "A number has n_bytes bytes, not always 2.": {"given": lambda n: 2},
    },
)
