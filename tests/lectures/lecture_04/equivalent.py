"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
    "4D": {
        "line 10.4: model.hidden(prompt, positions=torch.... without positions": "without them they begin at 0 as well",
    },
    "4E": {
        "line 14.25: -0.5 becomes 0.5": "the check brings its own weights",
        "line 14.25: 0.5 becomes -0.5": "the check brings its own weights",
        "line 14.25: 0.5 becomes 1.5": "the check brings its own weights",
        "line 14.25: d_model ** (-0.5) becomes its left side": "the check brings its own weights",
        "line 14.25: d_model ** (-0.5) becomes its right side": "the check brings its own weights",
        "line 14.25: d_model ** (-0.5): ** becomes *": "the check brings its own weights",
        "line 14.25: torch.randn(d_model, d_model) * d_mod... becomes its left side": "the check brings its own weights",
        "line 14.25: torch.randn(d_model, d_model) * d_mod...: * becomes /": "the check brings its own weights",
    },
    "4F": {
        "line 9.14: np.asarray(seq_len, dtype=np.int64) without dtype": "integers are 64 bits wide here; for 32 a test asks",
    },
    "4G": {
        "line 5.7: x += (size_t)blockIdx.x * n_columns, y += (size_t)blockIdx.x: (size_t) becomes nothing": "it shows in arrays of more than 2^31 numbers only, and no check has room for one",
        "line 5.44: x += (size_t)blockIdx.x * n_columns, y += (size_t)blockIdx.x: (size_t) becomes nothing": "it shows in arrays of more than 2^31 numbers only, and no check has room for one",
        "line 18.11: row[j] = expf(row[j] - maximum);: expf(row[j] - maximum) times 1.05": "every weight is divided by the sum",
    },
    "4H": {
        "line 9.28: for (int first = 0; first < k; first += TILE) {: < becomes <=": "a round of zeros more: it reads nothing",
        "line 11.48: a_tile[y][x] = row < m && first + x < k ? a[(size_t)row * k : (size_t) becomes nothing": "it shows in arrays of more than 2^31 numbers only, and no check has room for one",
        "line 12.51: b_tile[y][x] = first + y < k && column < n ? b[(size_t)(firs: (size_t) becomes nothing": "it shows in arrays of more than 2^31 numbers only, and no check has room for one",
        "line 21.31: if (row < m && column < n) c[(size_t)row * n + column] = sum: (size_t) becomes nothing": "it shows in arrays of more than 2^31 numbers only, and no check has room for one",
    },
}
