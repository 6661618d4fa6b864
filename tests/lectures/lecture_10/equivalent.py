"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
    "10A": {
        "line 11.36: 2 becomes 3": "the first product has all leading axes: the sum has them too",
        "line 12.10: np.zeros((*q.shape[:-1], v.shape[-1])...: ones instead": "every entry is written",
    },
    "10B": {
        "line 9.8: 1.05 * (features.of_q(q) @ features.of_k(k).mT)": "every row is divided by its sum",
        "line 11.34: -1 becomes 1": "there are as many queries as keys: the mean of the sums is the same along both",
        "line 11.34: 1 becomes 2": "there are as many queries as keys: the mean of the sums is the same along both",
    },
    "10C": {
        "line 10.47: 0 becomes -1": "the axis has one entry",
    },
    "10G": {
        "line 35.22: for (int c = 0; c < C && first + y < n_queries && x + TILE *: < becomes <=": "x + TILE * C is no column of a block",
        "line 22.28: for (int first = 0; first < n_queries; first += TILE) {: < becomes <=": "a round without queries writes nothing",
        "line 31.22: for (int r = 0; r < TILE; ++r) {: < becomes <=": "r <= y is never true for r = TILE",
    },
}
