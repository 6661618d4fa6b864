"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
    "5H": {
        "line 18.13: share[s] = expf(lses[s] - top);: expf(lses[s] - top) times 1.05": "every share is divided by the sum",
    },
}
