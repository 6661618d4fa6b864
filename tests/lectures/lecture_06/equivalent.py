"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

NOTHING = "exp(-inf minus any finite number) is 0"
ALL_MASKED = "tiles that nobody sees are masked: more work, the same numbers, and skipping is section 6.4"
MASKED_TWICE = "the mask is put on tiles that it does not cross, and forbids nothing there"
IN_PLACE = "another array for the same numbers"
QUIET = "only a warning, of the logarithm of 0"
COPIED = "the check copies its own weights in"
ANY_ORDER = "every rank still meets every block once; the order of a merge changes nothing"

EQUIVALENT = {
    "6A": {
        "line 11.26: scores.max(axis=-1, initial=-np.inf) without initial": "a block has one score at least",
        "line 12.13: 0 becomes -1": NOTHING,
        "line 12.13: 0 becomes 1": NOTHING,
    },
    "6B": {
        "line 19.14: min(n_keys, rows[-1] + shift + 1) if ... becomes n_keys": ALL_MASKED,
        "line 19.14: min(n_keys, rows[-1] + shift + 1): max instead": ALL_MASKED,
        "line 19.26: 1 becomes 2": ALL_MASKED,
        "line 22.17: (np.zeros_like(m), np.zeros((*lead, l...: the first two change places": "all columns of the sum are equal, and the output broadcasts",
        "line 24.24: a[..., j:min(j + block_k, end), :].as... without .astype": "a product with a wider type is computed in that",
        "line 28.26: columns[-1] > i + shift: > becomes >=": MASKED_TWICE,
        "line 28.40: i + shift becomes its right side": MASKED_TWICE,
        "line 31.21: 0 becomes -1": NOTHING,
        "line 31.21: 0 becomes 1": NOTHING,
        "line 32.16: np.exp(np.subtract(s, finite, out=s),... without out": IN_PLACE,
        "line 32.23: np.subtract(s, finite, out=s) without out": IN_PLACE,
        "line 37.28: 1 becomes 2": "0 divided by 2 is 0 as well",
        "line 38.13: np.errstate(divide='ignore') without divide": QUIET,
        "line 39.52: 0 becomes -1": "the last axis has one element",
    },
    "6E": {
        "line 14.25: -0.5 becomes 0.5": COPIED,
        "line 14.25: 0.5 becomes -0.5": COPIED,
        "line 14.25: 0.5 becomes 1.5": COPIED,
        "line 14.25: d_model ** (-0.5) becomes its left side": COPIED,
        "line 14.25: d_model ** (-0.5) becomes its right side": COPIED,
        "line 14.25: d_model ** (-0.5): ** becomes *": COPIED,
        "line 14.25: torch.randn(d_model, d_model) * d_mod... becomes its left side": COPIED,
        "line 14.25: torch.randn(d_model, d_model) * d_mod...: * becomes /": COPIED,
        "line 19.37: -1 becomes 1": "of two axes number -1 is number 1",
    },
    "6G": {
        "line 15.13: 0 becomes -1": NOTHING,
        "line 15.13: 0 becomes 1": NOTHING,
        "line 19.4: out[shares == 0] = 0: left out": "the contract says that such a part is 0",
        "line 19.18: 0 becomes -1": "the contract says that such a part is 0",
        "line 20.28: 1 becomes 2": "0 divided by 2 is 0 as well",
        "line 21.9: np.errstate(divide='ignore') without divide": QUIET,
    },
    "6H": {
        "line 17.14: np.zeros((*q.shape[:-1], v.shape[-1])...: ones instead": "its log-sum-exp is -inf, so its share is 0",
        "line 21.19: (rank - step) % len(q) becomes its left side": ANY_ORDER + "; -1 is the last rank",
        "line 21.19: rank - step becomes its right side": ANY_ORDER,
        "line 21.19: rank - step: - becomes +": ANY_ORDER,
    },
}
