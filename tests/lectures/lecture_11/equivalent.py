"""Mutants that no input can tell from the right answer, with the reason; names as `Mutant.name` has them."""

EQUIVALENT = {
    "11C": {
        "line 18.28: for (int first = 0; first < visible; first += TILE) {: < becomes <=": "one more round of the loop finds nothing left, and adds 0",
    },
}
