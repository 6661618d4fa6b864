"""Arrays that exercises of several lectures ask with, and two reductions that their oracles share."""

import math

import numpy as np

from utils.judge.result import Failed

INF = np.inf


def draw(rng, *shape):
    """Random normal numbers, rounded to one decimal, so that what a report shows is what the function was given."""
    return rng.normal(size=shape).round(1)


def singles(rng, *shape):
    """The same in single precision, for kernels."""
    return draw(rng, *shape).astype(np.float32)


def weights_of(scores, allowed):
    """The softmax of one row of numbers over the allowed entries; zeros where there are none."""
    top = max((s for s, a in zip(scores, allowed) if a and s > -INF), default=None)
    if top is None:
        return [0.0] * len(scores)
    powers = [math.exp(s - top) if a else 0.0 for s, a in zip(scores, allowed)]
    return [p / math.fsum(powers) for p in powers]


def or_one(total):
    return np.where(total == 0, 1, total)


def kept_dtype(ask, dtype, *arrays, parts=slice(None), **others):
    """Ask with float arrays of `dtype`, and raise Failed unless the parts of the result have that type too."""
    given = [a.astype(dtype) if getattr(a, "dtype", None) == np.float64 else a for a in arrays]
    result = ask(*given, **others)
    for part in (result if isinstance(result, list) else [result])[parts]:
        if part.dtype != dtype:
            raise Failed(f"returned {part.dtype}, expected {np.dtype(dtype).name} as the arguments have")


def refuses(ask, *args):
    """Whether the answer raises a ValueError."""
    try:
        ask.run(*args)
    except Failed as failure:
        return "ValueError" in str(failure)
    return False
