"""Attention on this machine's CPU, side by side: `python -m tests.benchmarks.flash_numpy`.

Attention with the matrix, flash attention with small tiles and with those that it chooses, and torch's own kernel, on one thread: processor time (the best of five turns, taken in
rotation, so that a busy machine is busy for all) and the peak of the memory that NumPy allocates.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy starts its threads

import time
import tracemalloc
from functools import partial

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from attention.flash import flash_attention_numpy
from attention.fundamentals import attention_numpy

HEADS, D = 4, 64
LENGTHS = (512, 1024, 2048, 4096)
SMALL = {"block_q": 64, "block_k": 64}
NAIVE, SMALL_TILES, CHOSEN_TILES, TORCH = "attention_numpy", "flash 64 x 64", "flash", "torch"  # flash: as it is called


def contenders(n, causal):
    """{name: a call without arguments}, on the same random float32 arrays (HEADS, n, D)."""
    arrays = np.random.default_rng(0).standard_normal((3, HEADS, n, D)).astype(np.float32)
    tensors = [torch.from_numpy(a)[None] for a in arrays]
    return {
        NAIVE: partial(attention_numpy, *arrays, causal=causal),
        SMALL_TILES: partial(flash_attention_numpy, *arrays, causal, **SMALL),
        CHOSEN_TILES: partial(flash_attention_numpy, *arrays, causal),
        TORCH: partial(scaled_dot_product_attention, *tensors, is_causal=causal),
    }


def seconds(calls, turns=5):
    """{name: least processor time of several turns}."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(turns):
        for name, call in calls.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
    return best


def peak_bytes(call):
    """The most memory that NumPy held at any moment of the call, its result included."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def main():
    torch.set_num_threads(1)
    print(f"{HEADS} heads of {D}, float32, one thread; milliseconds and, in brackets, the peak in MB")
    print(f"{'n':>6} {'mask':>7}" + "".join(f"{name:>24}" for name in (NAIVE, SMALL_TILES, CHOSEN_TILES, TORCH)))
    for causal in (False, True):
        for n in LENGTHS:
            calls = contenders(n, causal)
            times = seconds(calls)
            row = f"{n:>6} {'causal' if causal else 'full':>7}"
            for name, call in calls.items():
                peak = "" if name == TORCH else f"({peak_bytes(call) / 1e6:.1f})"  # torch's memory is not NumPy's
                row += f"{1e3 * times[name]:>14.1f} {peak:>9}"
            print(row)


if __name__ == "__main__":
    main()
