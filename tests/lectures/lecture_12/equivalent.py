"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
    "12A": {
        "line 10.13: np.argsort(-logits, axis=-1, kind='st... without axis": "what is left out is the default",
        "line 12.13: np.take_along_axis(logits, chosen, ax... without axis": "what is left out is the default",
    },
    "12B": {
        "line 13.8: if len(rows) becomes True": "attention of no queries adds nothing",
    },
    "12C": {
        "line 11.26: self.logits.topk(self.top_k, dim=-1) without dim": "what is left out is the default",
        "line 21.57: 0 becomes -1": "the axis has one entry",
        "line 28.8: if cache is not None becomes False": "the exercise says that its check passes no cache",
    },
    "12D": {
        "line 13.13: rows.topk(top_k, dim=-1) without dim": "what is left out is the default",
        "line 13.34: -1 becomes 1": "there are two axes: the last one is number 1",
        "line 15.45: -1 becomes 1": "there are two axes: the last one is number 1",
    },
    "12E": {
        "line 9.28: rows.topk(top_k, dim=-1) without dim": "what is left out is the default",
        "line 9.49: -1 becomes 1": "there are two axes: the last one is number 1",
    },
    "12G": {
        "line 20.28: for (int first = 0; first < inner; first += DEPTH) {: < becomes <=": "one more round of the loop finds nothing left, and adds 0",
    },
}
