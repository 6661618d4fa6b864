"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
    "1A": {
        "line 12.14: np.max(x, axis=axis, keepdims=True, i... without initial": "an axis without scores has no weights",
        "line 13.26: 0 becomes 1": "what is subtracted from -inf does not matter",
        "line 13.26: 0 becomes -1": "what is subtracted from -inf does not matter",
        "line 15.11: 1 becomes 2": "0 divided by anything is 0",
    },
    "3A": {
        "line 13.10: (attention_scale * np.cos(angles)).as... without .astype": "the result is cast to the type of x in the end",
        "line 14.10: (attention_scale * np.sin(angles)).as... without .astype": "the result is cast to the type of x in the end",
        "line 16.11: x[..., first].astype(work) without .astype": "the result is cast to the type of x in the end",
        "line 16.39: x[..., second].astype(work) without .astype": "the result is cast to the type of x in the end",
    },
    "3C": {
        "line 11.39: 1 becomes 2": "NumPy takes any negative size for the unknown one",
        "line 12.30: -2 becomes 2": "of four axes number -2 is number 2",
    },
    "3D": {
        "line 14.47: d_model // n_heads: // becomes /": "rope_frequencies makes a whole number of it",
        "line 23.20: 0 becomes -1": "all positions move together: RoPE sees differences only",
        "line 23.20: 0 becomes 1": "all positions move together: RoPE sees differences only",
        "line 16.25: -0.5 becomes 0.5": "the check copies its own weights in",
        "line 16.25: 0.5 becomes -0.5": "the check copies its own weights in",
        "line 16.25: 0.5 becomes 1.5": "the check copies its own weights in",
        "line 16.25: d_model ** (-0.5) becomes its left side": "the check copies its own weights in",
        "line 16.25: d_model ** (-0.5) becomes its right side": "the check copies its own weights in",
        "line 16.25: d_model ** (-0.5): ** becomes *": "the check copies its own weights in",
        "line 16.25: torch.randn(d_model, d_model) * d_mod... becomes its left side": "the check copies its own weights in",
        "line 16.25: torch.randn(d_model, d_model) * d_mod...: * becomes /": "the check copies its own weights in",
    },
    "3G": {
        "line 7.16: size_t pair = (size_t)blockIdx.x * blockDim.x + threadIdx.x;: (size_t) becomes nothing": "no grid "
        "that can be tried has four billion threads"
    },
    "3H": {
        "line 14.40: 1 becomes 0": "what is too long is cut off, and one less is enough",
        "line 14.40: 1 becomes 2": "what is too long is cut off, and one less is enough",
        "line 14.40: 2 * power + 1 becomes its left side": "what is too long is cut off, and one less is enough",
        "line 14.40: 2 * power + 1: + becomes -": "what is too long is cut off, and one less is enough",
        "line 14.40: 2 becomes 3": "what is too long is cut off, and one less is enough",
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
    "2.5": {
        "line 14.55: -1 becomes 1": "w_o has two axes: the last one is number 1",
    },
}
