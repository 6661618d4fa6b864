"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
    "1A": {
        "line 12.14: np.max(x, axis=axis, keepdims=True, i... without initial": "an axis without scores has no weights",
        "line 13.26: 0 becomes 1": "what is subtracted from -inf does not matter",
        "line 13.26: 0 becomes -1": "what is subtracted from -inf does not matter",
        "line 15.11: 1 becomes 2": "0 divided by anything is 0",
    },
    "4.7": {
        "line 18.11: row[j] = expf(row[j] - maximum);: expf(row[j] - maximum) times 1.05": "every weight is divided by the sum"
    },
    "5.7": {
        "line 15.13: share[s] = expf(lses[s] - top);: expf(lses[s] - top) times 1.05": "every share is divided by the sum"
    },
    "8C": {"line 15.33: 1.05 * (v[h].T @ v[h // group * group])": "a rotation is taken out of it, whatever its size"},
    "9A": {"line 14.52: 1.05 * (x @ both)": "only the directions are taken"},
    "10B": {"line 9.8: 1.05 * (features.of_q(q) @ features.of_k(k).mT)": "every row is divided by its sum"},
    "13E": {"line 7.30: 1.05 * (k[..., :1, :].mT @ v[..., :1, :])": "only its shape is taken"},
}
