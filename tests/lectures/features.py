"""What a check asks of a function, feature by feature: those that occur together in some call."""

import inspect
import itertools

import numpy as np

from utils.judge.trial import FunctionTrial

LARGE = 100  # a number from which exp needs care
NUMBERS = "float32 or float16"
# Scores of 1e4 in single precision are known to three digits: nothing can be asked of their exponentials.
NOT_TOGETHER = {frozenset((NUMBERS, "large numbers"))}


def calls_of(exercise, answer, own=None):
    """Each Call that the check of an exercise makes of an answer."""
    ask = FunctionTrial(exercise, answer, own)
    exercise._judge(ask)
    return ask.calls


def features_of(exercise, calls):
    """For each call the names of what is not plain in it."""
    least = {}
    for name, array in ((n, a) for call in calls for n, a in call.items() if hasattr(a, "ndim")):
        least[name] = min(least.get(name, array.ndim), array.ndim)
    optional = {
        name: parameter.default
        for name, parameter in inspect.signature(exercise.oracle).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return [set(_features(call, optional, least)) for call in calls]


def never_together(exercise, answer):
    """Pairs of features that a check asks one at a time, and never both in one call."""
    features = features_of(exercise, [call.arguments for call in calls_of(exercise, answer)])
    pairs = map(frozenset, itertools.combinations(sorted(set().union(*features)), 2))
    return [sorted(pair) for pair in pairs if pair not in NOT_TOGETHER and not any(pair <= f for f in features)]


def _features(call, optional, least):
    for name, value in call.items():
        if name in optional and (hasattr(value, "shape") or value != optional[name]):
            yield name
        if not hasattr(value, "ndim"):
            continue
        if value.ndim > least[name]:
            yield "leading axes"
        if 1 in value.shape:
            yield "an axis of size 1"
        array = value.detach().numpy() if hasattr(value, "detach") else value
        if array.dtype.kind != "f":
            continue
        finite = np.abs(array[np.isfinite(array)])
        if array.dtype != np.float64:
            yield NUMBERS
        if finite.max(initial=0) >= LARGE:
            yield "large numbers"
        if finite.size < array.size:
            yield "inf or nan"
