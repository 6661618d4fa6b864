"""The exercises of lecture 03 in CUDA: rotary embedding, one pair a thread, then four pairs in all heads."""

import importlib

import numpy as np

from utils.exercises.arrays import singles
from utils.judge.kernel import KernelExercise, compiled, launch, must_be, must_coalesce, must_employ, of_global
from utils.judge.result import Failed

MODULE = "rotary"
BASE = 100.0
X, FREQUENCIES = 0, 2  # which of the arrays


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


# --- 3.7 -------------------------------------------------------------------------------------------------------------

rope_pairs = KernelExercise(
    "3.7",
    "ROPE_PAIRS",
    MODULE,
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


# --- 3.8 -------------------------------------------------------------------------------------------------------------

rope_float4 = KernelExercise(
    "3.8",
    "ROPE_FLOAT4",
    MODULE,
    fault_hints={
        "out of bounds": "A token has d / 8 threads, and the last block has threads to spare: they return. "
        "Row `token` of head `head` is (head * seq + token) * d. In float4s the second half begins d / 8 after the "
        "first.",
        "misaligned": "Vector i of a row begins at float 4 * i: make row a float4* first, then index it.",
        "race": "Two threads touched one number. A token has d / 8 threads, and each takes eight numbers of a row.",
    },
)


def run_float4(source, x, positions):
    heads, seq, d = x.shape
    return run_in_place(source, "rope_float4", seq * d // 8, 64, x, positions, heads, seq, d)


@rope_float4.property(
    "columns i and i + d/2 turn by position times frequency",
    hint="(a.x, b.x) turns with the angle of frequency 4 i, (a.w, b.w) with that of 4 i + 3; b is vector i + d / 8.",
)
def _(source, rng):
    run_float4(source, singles(rng, 1, 2, 8), np.arange(2))
    run_float4(source, singles(rng, 1, 2, 24), np.arange(2))


@rope_float4.property("all heads turn alike", hint="The angles stay as they are; only the address of the row changes.")
def _(source, rng):
    run_float4(source, singles(rng, 3, 2, 8), np.arange(2))


@rope_float4.property("any numbers of heads and tokens, any positions", hint="The angle takes positions[token].")
def _(source, rng):
    for heads, seq, d in ((5, 13, 24), (1, 1, 8), (2, 71, 40)):
        run_float4(source, singles(rng, heads, seq, d), 7 + rng.permutation(seq))


@rope_float4.property("x is loaded four floats at a time", hint="Load float4 a = row[i], with float4* row.")
def _(source, rng):
    x = singles(rng, 3, 8, 64)
    must_need(run_float4(source, x, np.arange(8)), enough=x.nbytes // 512)


@rope_float4.property("each number is read once and written once", hint="Load a and b, rotate them, write both.")
def _(source, rng):
    x = singles(rng, 3, 8, 64)
    must_touch_once(run_float4(source, x, np.arange(8)), x)


@rope_float4.property(
    "angles are computed once for all heads", hint="Call turn before the loop over heads and keep float2 t[4]."
)
def _(source, rng):
    x = singles(rng, 3, 8, 64)
    asked = total(of_global(run_float4(source, x, np.arange(8)), "load", FREQUENCIES), "bytes")
    once = 8 * 8 * 64 // 2
    if asked > once:
        raise Failed(f"{asked:,} bytes of frequencies were read, where {once:,} would do")


@rope_float4.property(
    "all threads share the work", hint="One thread, one group of one token: loop over heads and angles only."
)
def _(source, rng):
    report = run_float4(source, singles(rng, 3, 16, 64), np.arange(16))
    for kind in ("load", "store"):
        must_employ(report, X, kind, 16 * 64 // 8)


@rope_float4.property("neighbouring threads take neighbouring columns", hint="Number the groups token after token.")
def _(source, rng):
    must_coalesce(run_float4(source, singles(rng, 2, 64, 64), np.arange(64)))
