"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
    "2D": {
        "line 39.49: -2 becomes 2": "of four axes number -2 is number 2",
    },
}
