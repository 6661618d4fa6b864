"""What can be said for certain about a wrong result, where no known mistake explains it."""

import numpy as np

from utils.judge.compare import difference

SINGLE = 1e-5  # relative: what single precision leaves


def diagnose(got, expected, tolerance):
    """A sentence about two lists of arrays of the same shapes, "" where there is nothing to say."""
    for ours, theirs in zip(got, expected):
        if ours.shape != theirs.shape:
            return ""
        if difference(ours, theirs) > tolerance:
            return _about(ours.astype(float), theirs.astype(float), tolerance)
    return ""


def _about(got, expected, tolerance):
    if np.isnan(got).any() and not np.isnan(expected).any():
        return "There is a nan: look for 0/0, and for infinities that are subtracted or multiplied by 0."
    if np.isinf(got).any() and not np.isinf(expected).any():
        return "There is an infinity: look for exp of a large number, and for a division by 0."
    if not np.isfinite(got).all() or not np.isfinite(expected).all():
        return ""
    if difference(got, expected) <= SINGLE:
        return "The numbers agree to some seven digits: was something computed in single precision, or a small number added?"
    near = max(tolerance, 1e-9)
    if got.ndim >= 2 and got.size > 1 and got.shape[-1] == got.shape[-2]:
        if difference(np.swapaxes(got, -1, -2), expected) <= near:
            return "The numbers are right and the last two axes are swapped."
    if got.ndim and len(got) > 1 and difference(got[::-1], expected) <= near:
        return "The numbers are right, in the opposite order."
    return _factor(got, expected, near)


def _factor(got, expected, near):
    large = np.abs(expected) > 1e-3 * np.abs(expected).max(initial=0)
    if large.sum() < 2:
        return ""
    factors = got[large] / expected[large]
    if abs(factors[0]) > 1e-6 and difference(factors, np.full_like(factors, factors[0])) <= 100 * near:
        return (
            "Every number has the wrong sign."
            if abs(factors[0] + 1) < near
            else (f"Every number is {factors[0]:.4g} times what is expected.")
        )
    return ""
