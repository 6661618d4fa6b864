"""A real language model, SmolLM2-135M-Instruct, in which a lecture's own function can take the place of a part.

load() gives it, or None after one sentence that says how to get it. It imports nothing of the lectures: what it computes
is the reference for whatever is put in.
"""

from utils.language_model.bugs import BUGS, compare, put_in
from utils.language_model.files import problem
from utils.language_model.model import Cache, LanguageModel, on_arrays, weights
from utils.language_model.smollm2 import load
from utils.language_model.texts import Typewriter, excerpt, speak

__all__ = [
    "BUGS",
    "Cache",
    "LanguageModel",
    "Typewriter",
    "compare",
    "excerpt",
    "load",
    "on_arrays",
    "problem",
    "put_in",
    "speak",
    "weights",
]
