"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
    "1A": {
        "line 12.14: np.max(x, axis=axis, keepdims=True, i... without initial": "an axis without scores has no weights",
        "line 13.26: 0 becomes 1": "what is subtracted from -inf does not matter",
        "line 13.26: 0 becomes -1": "what is subtracted from -inf does not matter",
        "line 15.11: 1 becomes 2": "0 divided by anything is 0",
    },
    "1H": {
        "line 25.10: 0 becomes -1": "what stands there is multiplied by a p of 0",
        "line 25.10: 0 becomes 1": "what stands there is multiplied by a p of 0",
    },
}
