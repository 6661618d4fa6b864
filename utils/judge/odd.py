"""What an answer leaves changed in its process, so that the next check gets a fresh one; and what goes through exp."""

import contextlib
import math
import os
import sys
import threading

import numpy as np

PLACES = ("numpy", "numpy.linalg", "math", "builtins", "torch", "torch.nn.functional")
OF_TORCH = "TORCHINDUCTOR_"  # variables that torch sets itself when a part of it is imported late


def fingerprint():
    """What `since` compares with. Costs a tenth of a millisecond."""
    return {
        **{f"a function of {name}": dict(vars(sys.modules[name])) for name in PLACES if name in sys.modules},
        "the default float type": _default_dtype(),
        "the working directory": os.getcwd(),
        "the environment": {name: value for name, value in os.environ.items() if not name.startswith(OF_TORCH)},
        "the recursion limit": sys.getrecursionlimit(),
        "the number of threads": threading.active_count(),
    }


def since(before):
    """The first thing that differs from a fingerprint, in words; "" where nothing does."""
    now = fingerprint()
    for what, was in before.items():
        if what.startswith("a function of"):
            names = [
                name
                for name, value in was.items()
                if callable(value) and now[what].get(name) is not value and not _by_torch(now[what].get(name), value)
            ]
            if names:
                return f"{what.removeprefix('a function of ')}.{names[0]}"
        elif now[what] != was:
            return what
    return ""


def _by_torch(function, before):
    """Whether torch itself has wrapped a function of its own, as a part of it does that is imported late, by an optimiser."""
    if getattr(function, "__wrapped__", None) is not before or "torch" not in sys.modules:
        return False
    written = getattr(getattr(function, "__code__", None), "co_filename", "")
    return written.startswith(os.path.dirname(sys.modules["torch"].__file__) + os.sep)


def _default_dtype():
    torch = sys.modules.get("torch")
    return str(torch.get_default_dtype()) if torch and hasattr(torch, "get_default_dtype") else "torch.float32"


@contextlib.contextmanager
def watching_exp():
    """Inside, the list that is handed out holds the size of the largest array that went through exp, or a softmax."""
    largest = [0]

    def watched(function):
        def call(first, *args, **kwargs):
            largest[0] = max(largest[0], math.prod(getattr(first, "shape", ())))
            return function(first, *args, **kwargs)

        return call

    places = [(np, "exp"), (np, "exp2"), (np, "expm1")]
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        places += [(torch, "exp"), (torch, "softmax"), (torch.nn.functional, "softmax")]
        places += [(torch.Tensor, name) for name in ("exp", "exp_", "softmax")]
    kept = [(place, name, getattr(place, name)) for place, name in places]
    try:
        for place, name, function in kept:
            setattr(place, name, watched(function))
        yield largest
    finally:
        for place, name, function in kept:
            setattr(place, name, function)
