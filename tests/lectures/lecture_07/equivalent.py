"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
    "7B": {
        "line 22.49: 1 becomes 2": "the next block's rows are written too, and then once more by the next block",
    },
    "7C": {
        "line 13.22: column < row: < becomes <=": "the own block becomes inf in the next line",
        "line 15.12: np.argsort(-ranked, axis=-1, kind='st... without axis": "what is left out is the default",
        "line 16.12: np.argsort(order, axis=-1) without axis": "what is left out is the default",
    },
    "7D": {
        "line 25.50: 0 becomes -1": "the axis has one entry",
    },
    "7E": {
        "line 10.52: -1 becomes 1": "there are as many queries as keys: the mean of the sums is the same along both",
        "line 10.52: 1 becomes 2": "there are as many queries as keys: the mean of the sums is the same along both",
    },
    "7G": {
        "line 33.47: for (int first = block * block_size; first < end; first += B: < becomes <=": "one more round of the loop finds nothing left, and adds 0",
    },
}
