"""The exercise of lecture 03 in CUDA: rotary embedding, one pair a thread."""

import importlib

import numpy as np

from utils.exercises.arrays import singles
from utils.judge.kernel import KernelExercise, compiled, launch, must_be, must_coalesce, must_employ, of_global
from utils.judge.result import Failed

MODULE = "rotary"
BASE = 100.0
X = 0  # which of the arrays


def frequencies_of(d):
    return BASE ** (-np.arange(0, d, 2) / d)


def rotated(x, positions):
    """Half-split rotary embedding of (heads, seq, d), by complex numbers in float64."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:].astype(float)
    pairs *= np.exp(1j * positions[:, None] * frequencies_of(2 * half))
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def run_in_place(source, name, n_threads, block, x, positions, *sizes):
    """Rotate x (heads, seq, d) by the learner's kernel, and return its report after the result was found right."""
    y = x.copy()
    kernel = compiled(source + importlib.import_module(f"attention.{MODULE}").TURN, name=name)
    report = launch(kernel, -(-n_threads // block), block, 0, y, positions, frequencies_of(x.shape[-1]), *sizes)
    must_be(y.reshape(-1, x.shape[-1]), rotated(x, positions).reshape(-1, x.shape[-1]), x=x, positions=positions)
    return report


def total(rows, field):
    return sum(getattr(row, field) for row in rows)


def must_touch_once(report, x):
    """Raise Failed unless as many bytes of x were read, and written, as x has."""
    for kind, done in (("load", "read"), ("store", "written")):
        moved = total(of_global(report, kind, X), "bytes")
        if moved != x.nbytes:
            raise Failed(f"{moved:,} bytes of x were {done}, and x has {x.nbytes:,}")


def must_need(report, enough):
    """Raise Failed where x is read in more requests than enough."""
    requests = total(of_global(report, "load", X), "requests")
    if requests > enough:
        raise Failed(f"x is read in {requests} requests, where {enough} would do")


# --- 3G --------------------------------------------------------------------------------------------------------------

rope_pairs = KernelExercise(
    "3G",
    "ROPE_PAIRS",
    MODULE,
    formerly="3.7",
    importance="useful",
    fault_hints={
        "out of bounds": "The row is pair / (d / 2), its token is row % seq, and the last block has threads to spare: "
        "they return.",
        "race": "Two threads touched one number. A row has d / 2 pairs, and each pair has one thread.",
    },
)


def run_pairs(source, x, positions):
    heads, seq, d = x.shape
    return run_in_place(source, "rope_pairs", x.size // 2, 256, x, positions, heads * seq, seq, d)


@rope_pairs.property(
    "columns i and i + d/2 turn by position times frequency",
    hint="The pair is columns i and i + d/2, and the sine with the minus belongs to the first: "
    "first = a cos - b sin, second = a sin + b cos, both from the numbers that stood there before. "
    "The angle is that of token row % seq.",
)
def _(source, rng):
    run_pairs(source, singles(rng, 1, 3, 2), np.arange(3))
    run_pairs(source, singles(rng, 1, 3, 4), np.arange(3))


@rope_pairs.property("every head begins at the first token again", hint="The token of a row is row % seq.")
def _(source, rng):
    run_pairs(source, singles(rng, 3, 2, 4), np.arange(2))


@rope_pairs.property(
    "positions need not begin at 0", hint="The angle takes positions[token], not the number of the token."
)
def _(source, rng):
    run_pairs(source, singles(rng, 2, 3, 4), np.arange(5, 8))
    run_pairs(source, singles(rng, 1, 3, 4), np.array([9, 2, 4]))


@rope_pairs.property("positions of 100,000 lose nothing", hint="turn(position, frequency) forms the angle in double.")
def _(source, rng):
    run_pairs(source, singles(rng, 1, 4, 4), np.arange(100_000, 100_004))


@rope_pairs.property("any sizes", hint="The number of a thread counts over all blocks.")
def _(source, rng):
    for shape in ((1, 1, 2), (3, 7, 10), (2, 19, 34), (1, 1, 700)):
        run_pairs(source, singles(rng, *shape), np.arange(shape[1]))


@rope_pairs.property("each number is read once and written once", hint="Read both into variables, then write both.")
def _(source, rng):
    x = singles(rng, 2, 8, 64)
    must_touch_once(run_pairs(source, x, np.arange(8)), x)


@rope_pairs.property("all threads share the work", hint="One thread, one pair: no loop over pairs.")
def _(source, rng):
    x = singles(rng, 2, 8, 64)
    report = run_pairs(source, x, np.arange(8))
    must_need(report, enough=x.nbytes // 128)
    for kind in ("load", "store"):
        must_employ(report, X, kind, x.size // 2)


@rope_pairs.property("neighbouring threads take neighbouring columns", hint="Number the pairs row after row.")
def _(source, rng):
    must_coalesce(run_pairs(source, singles(rng, 2, 8, 64), np.arange(8)))
