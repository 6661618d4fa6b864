"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
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
        "line 7.16: size_t pair = (size_t)blockIdx.x * blockDim.x + threadIdx.x;: (size_t) becomes nothing": "no grid that can be tried has four billion threads",
    },
    "3H": {
        "line 14.40: 1 becomes 0": "what is too long is cut off, and one less is enough",
        "line 14.40: 1 becomes 2": "what is too long is cut off, and one less is enough",
        "line 14.40: 2 * power + 1 becomes its left side": "what is too long is cut off, and one less is enough",
        "line 14.40: 2 * power + 1: + becomes -": "what is too long is cut off, and one less is enough",
        "line 14.40: 2 becomes 3": "what is too long is cut off, and one less is enough",
    },
}
