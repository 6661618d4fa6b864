"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
    "4D": {
        "line 10.4: model.hidden(prompt, positions=torch.... without positions": "without them they begin at 0 as well",
    },
    "4F": {
        "line 9.14: np.asarray(seq_len, dtype=np.int64) without dtype": "the lecture and the check pass integers of 64 bits, NumPy's own; for 32 a test asks",
    },
    "4G": {
        "line 18.11: row[j] = expf(row[j] - maximum);: expf(row[j] - maximum) times 1.05": "every weight is divided by the sum",
    },
    "4H": {
        "line 9.28: for (int first = 0; first < k; first += TILE) {: < becomes <=": "a round of zeros more: it reads nothing",
    },
}
