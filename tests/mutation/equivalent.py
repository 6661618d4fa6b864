"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EMPTY_ROUND = "one more round of the loop finds nothing left, and adds 0"
ONE = "the axis has one entry"
SQUARE = "there are as many queries as keys: the mean of the sums is the same along both"
LAST = "there are two axes: the last one is number 1"
WRITTEN = "every entry is written"
DEFAULT = "what is left out is the default"

EQUIVALENT = {
    "1A": {
        "line 12.14: np.max(x, axis=axis, keepdims=True, i... without initial": "an axis without scores has no weights",
        "line 13.26: 0 becomes 1": "what is subtracted from -inf does not matter",
        "line 13.26: 0 becomes -1": "what is subtracted from -inf does not matter",
        "line 15.11: 1 becomes 2": "0 divided by anything is 0",
    },
    "1H": {
        "line 25.10: 0 becomes -1": "what stands there is multiplied by a p of 0",
        "line 25.10: 0 becomes 1": "what stands there is multiplied by a p of 0",
    },
    "2.5": {
        "line 14.55: -1 becomes 1": LAST,
    },
    "4.7": {
        "line 18.11: row[j] = expf(row[j] - maximum);: expf(row[j] - maximum) times 1.05": "every weight is divided by the sum"
    },
    "5.7": {
        "line 15.13: share[s] = expf(lses[s] - top);: expf(lses[s] - top) times 1.05": "every share is divided by the sum"
    },
    "7B": {"line 22.49: 1 becomes 2": "the next block's rows are written too, and then once more by the next block"},
    "7C": {
        "line 13.22: column < row: < becomes <=": "the own block becomes inf in the next line",
        "line 15.12: np.argsort(-ranked, axis=-1, kind='st... without axis": DEFAULT,
        "line 16.12: np.argsort(order, axis=-1) without axis": DEFAULT,
    },
    "7D": {"line 25.50: 0 becomes -1": ONE},
    "7E": {
        "line 10.52: -1 becomes 1": SQUARE,
        "line 10.52: 1 becomes 2": SQUARE,
    },
    "7G": {
        "line 33.47: for (int first = block * block_size; first < end; first += B: < becomes <=": EMPTY_ROUND,
    },
    "8C": {
        "line 13.61: np.zeros(w_o.shape): ones instead": WRITTEN,
        "line 15.33: 1.05 * (v[h].T @ v[h // group * group])": "a rotation is taken out of it, whatever its size",
    },
    "8F": {"line 21.32: for (int first = begin; first < end; first += KEYS) {: < becomes <=": EMPTY_ROUND},
    "9A": {
        "line 14.15: np.linalg.svd(both if x is None else ... without full_matrices": "only the first rows are taken",
        "line 14.52: 1.05 * (x @ both)": "only the directions are taken",
        "line 14.76: False becomes True": "only the first rows are taken",
    },
    "9B": {"line 13.79: 0 becomes -1": ONE},
    "9F": {"line 20.32: for (int first = begin; first < end; first += KEYS) {: < becomes <=": EMPTY_ROUND},
    "10A": {
        "line 11.36: 2 becomes 3": "the first product has all leading axes: the sum has them too",
        "line 12.10: np.zeros((*q.shape[:-1], v.shape[-1])...: ones instead": WRITTEN,
    },
    "10B": {
        "line 9.8: 1.05 * (features.of_q(q) @ features.of_k(k).mT)": "every row is divided by its sum",
        "line 11.34: -1 becomes 1": SQUARE,
        "line 11.34: 1 becomes 2": SQUARE,
    },
    "10C": {"line 10.47: 0 becomes -1": ONE},
    "10G": {
        "line 35.22: for (int c = 0; c < C && first + y < n_queries && x + TILE *: < becomes <=": "x + TILE * C is no "
        "column of a block",
        "line 22.28: for (int first = 0; first < n_queries; first += TILE) {: < becomes <=": "a round without queries "
        "writes nothing",
        "line 31.22: for (int r = 0; r < TILE; ++r) {: < becomes <=": "r <= y is never true for r = TILE",
    },
    "11C": {"line 18.28: for (int first = 0; first < visible; first += TILE) {: < becomes <=": EMPTY_ROUND},
    "12A": {
        "line 10.13: np.argsort(-logits, axis=-1, kind='st... without axis": DEFAULT,
        "line 12.13: np.take_along_axis(logits, chosen, ax... without axis": DEFAULT,
    },
    "12B": {"line 13.8: if len(rows) becomes True": "attention of no queries adds nothing"},
    "12C": {
        "line 11.26: self.logits.topk(self.top_k, dim=-1) without dim": DEFAULT,
        "line 21.57: 0 becomes -1": ONE,
        "line 28.8: if cache is not None becomes False": "the exercise says that its check passes no cache",
    },
    "12D": {
        "line 12.13: rows.topk(top_k, dim=-1) without dim": DEFAULT,
        "line 12.34: -1 becomes 1": LAST,
        "line 14.45: -1 becomes 1": LAST,
    },
    "12E": {
        "line 9.28: rows.topk(top_k, dim=-1) without dim": DEFAULT,
        "line 9.49: -1 becomes 1": LAST,
    },
    "12G": {"line 20.28: for (int first = 0; first < inner; first += DEPTH) {: < becomes <=": EMPTY_ROUND},
    "13A": {
        "line 9.26: 0 becomes -1": "what is subtracted from -inf does not matter",
        "line 9.26: 0 becomes 1": "what is subtracted from -inf does not matter",
        "line 13.20: 1 becomes 2": "0 divided by anything is 0",
    },
    "13E": {
        "line 7.30: k[..., :1, :].mT @ v[..., :1, :] becomes its left side": "one column of zeros is broadcast",
        "line 7.30: 1.05 * (k[..., :1, :].mT @ v[..., :1, :])": "only its shape is taken",
    },
}

EVERYWHERE = {  # what a mutant's name ends with
    "(size_t) becomes nothing": "only an array of 2^31 numbers can tell, and a check has no room for it",
}


def reason(number, name):
    """Why a mutant of an exercise is taken for equivalent; "" where it is not."""
    everywhere = (why for ending, why in EVERYWHERE.items() if name.endswith(ending))
    return EQUIVALENT.get(number, {}).get(name) or next(everywhere, "")
