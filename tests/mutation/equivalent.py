"""Mutants that no input can tell from the right answer, with the reason; each lecture's stand beside its tests."""

import importlib

from utils.judge.exercise import lectures
from utils.paths import ROOT

EQUIVALENT = {}  # {exercise: {mutant: reason}}
for lecture in lectures():
    if (ROOT / "tests" / "lectures" / f"lecture_{lecture}" / "equivalent.py").exists():
        EQUIVALENT |= importlib.import_module(f"tests.lectures.lecture_{lecture}.equivalent").EQUIVALENT

EVERYWHERE = {  # what a mutant's name ends with
    "(size_t) becomes nothing": "only an array of 2^31 numbers can tell, and a check has no room for it",
}


def reason(number, name):
    """Why a mutant of an exercise is taken for equivalent; "" where it is not."""
    everywhere = (why for ending, why in EVERYWHERE.items() if name.endswith(ending))
    return EQUIVALENT.get(number, {}).get(name) or next(everywhere, "")
