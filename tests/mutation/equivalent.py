"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

WIDE = "it shows in arrays of more than 2^31 numbers only, and no check has room for one"

EQUIVALENT = {
    "1A": {
        "line 12.14: np.max(x, axis=axis, keepdims=True, i... without initial": "an axis without scores has no weights",
        "line 13.26: 0 becomes 1": "what is subtracted from -inf does not matter",
        "line 13.26: 0 becomes -1": "what is subtracted from -inf does not matter",
        "line 15.11: 1 becomes 2": "0 divided by anything is 0",
    },
    "4D": {
        "line 10.4: model.hidden(prompt, positions=torch.... without positions": "without them they begin at 0 as well"
    },
    "4E": {
        f"line 14.25: {change}": "the check brings its own weights"
        for change in (
            "-0.5 becomes 0.5",
            "0.5 becomes -0.5",
            "0.5 becomes 1.5",
            "d_model ** (-0.5) becomes its left side",
            "d_model ** (-0.5) becomes its right side",
            "d_model ** (-0.5): ** becomes *",
            "torch.randn(d_model, d_model) * d_mod... becomes its left side",
            "torch.randn(d_model, d_model) * d_mod...: * becomes /",
        )
    },
    "4F": {
        "line 9.14: np.asarray(seq_len, dtype=np.int64) without dtype": "integers are 64 bits wide here; for 32 a test asks"
    },
    "4G": {
        **{
            f"line 5.{at}: x += (size_t)blockIdx.x * n_columns, y += (size_t)blockIdx.x: (size_t) becomes nothing": WIDE
            for at in (7, 44)
        },
        "line 18.11: row[j] = expf(row[j] - maximum);: expf(row[j] - maximum) times 1.05": "every weight is divided by the sum",
    },
    "4H": {
        "line 9.28: for (int first = 0; first < k; first += TILE) {: < becomes <=": "a round of zeros more: it reads nothing",
        "line 11.48: a_tile[y][x] = row < m && first + x < k ? a[(size_t)row * k : (size_t) becomes nothing": WIDE,
        "line 12.51: b_tile[y][x] = first + y < k && column < n ? b[(size_t)(firs: (size_t) becomes nothing": WIDE,
        "line 21.31: if (row < m && column < n) c[(size_t)row * n + column] = sum: (size_t) becomes nothing": WIDE,
    },
    "5.7": {
        "line 15.13: share[s] = expf(lses[s] - top);: expf(lses[s] - top) times 1.05": "every share is divided by the sum"
    },
    "8C": {"line 15.33: 1.05 * (v[h].T @ v[h // group * group])": "a rotation is taken out of it, whatever its size"},
    "9A": {"line 14.52: 1.05 * (x @ both)": "only the directions are taken"},
    "10B": {"line 9.8: 1.05 * (features.of_q(q) @ features.of_k(k).mT)": "every row is divided by its sum"},
    "13E": {"line 7.30: 1.05 * (k[..., :1, :].mT @ v[..., :1, :])": "only its shape is taken"},
    "2.5": {
        "line 14.55: -1 becomes 1": "w_o has two axes: the last one is number 1",
    },
}
