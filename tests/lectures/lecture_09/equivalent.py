"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
    "9A": {
        "line 14.15: np.linalg.svd(both if x is None else ... without full_matrices": "only the first rows are taken",
        "line 14.52: 1.05 * (x @ both)": "only the directions are taken",
        "line 14.76: False becomes True": "only the first rows are taken",
    },
    "9B": {
        "line 13.79: 0 becomes -1": "the axis has one entry",
    },
    "9F": {
        "line 20.32: for (int first = begin; first < end; first += KEYS) {: < becomes <=": "one more round of the loop finds nothing left, and adds 0",
    },
}
