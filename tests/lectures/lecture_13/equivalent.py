"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
    "13A": {
        "line 9.26: 0 becomes -1": "what is subtracted from -inf does not matter",
        "line 9.26: 0 becomes 1": "what is subtracted from -inf does not matter",
        "line 13.20: 1 becomes 2": "0 divided by anything is 0",
    },
    "13E": {
        "line 7.30: k[..., :1, :].mT @ v[..., :1, :] becomes its left side": "one column of zeros is broadcast",
        "line 7.30: 1.05 * (k[..., :1, :].mT @ v[..., :1, :])": "only its shape is taken",
    },
}
