"""How close is close enough: one table for the whole course, and the two functions that use it."""

import numpy as np

# Relative to the largest expected value. Integers and booleans have to be equal.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-2}


def difference(actual, expected):
    """Largest |actual - expected|, relative to the largest finite |expected| (absolute where that is 0).

    Takes NumPy arrays, tensors or numbers of one shape and any real dtype; returns a float. nan agrees with nan and an
    infinity with the same infinity; where only one of the two is finite, the difference is infinite.
    Raises ValueError when the shapes differ.
    """
    (actual, _), (expected, _) = _plain(actual), _plain(expected)
    if actual.shape != expected.shape:
        raise ValueError(f"actual has the shape {actual.shape}, expected {expected.shape}: they must be the same")
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    agree = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    if agree.all():
        return 0.0
    if not np.isfinite(actual[~agree]).all() or not np.isfinite(expected[~agree]).all():
        return float("inf")
    largest = np.abs(expected[np.isfinite(expected)]).max()
    return float(np.abs(actual[~agree] - expected[~agree]).max() / (largest or 1.0))


def close(actual, expected):
    """Whether two arrays of one shape agree to the tolerance of the coarser of their two dtypes; returns a bool.

    Raises ValueError when the shapes differ.
    """
    (_, first), (_, second) = _plain(actual), _plain(expected)
    return difference(actual, expected) <= max(TOLERANCE.get(first, 0.0), TOLERANCE.get(second, 0.0))


def _plain(x):
    """A NumPy array of x, and the name of the dtype that x had (NumPy knows no bfloat16)."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        name = str(x.dtype).removeprefix("torch.")
        return (x.float() if name == "bfloat16" else x).numpy(), name
    x = np.asarray(x)
    return x, x.dtype.name
