"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
    "8C": {
        "line 13.61: np.zeros(w_o.shape): ones instead": "every entry is written",
        "line 15.33: 1.05 * (v[h].T @ v[h // group * group])": "a rotation is taken out of it, whatever its size",
    },
    "8F": {
        "line 21.32: for (int first = begin; first < end; first += KEYS) {: < becomes <=": "one more round of the loop finds nothing left, and adds 0",
    },
}
