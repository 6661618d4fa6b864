"""Answers to exercise 13B of lecture 13, in CUDA: right ones and wrong ones, as in answers.py."""

from attention.beyond import SEGMENT_SOFTMAX
from tests.lectures.collect import collect, replacing

RIGHT, WRONG, right, wrong = collect()
changed = replacing(SEGMENT_SOFTMAX)

LOAD = "for (int e = first + lane; e < end; e += 32)           // load"
SCORE = "for (int e = first + lane; e < end; e += 32)           // score"
WRITE = "for (int e = first + lane; e < end; e += 32)           // write"
SUM = "total += expf(scores[e] - maximum);"
WEIGHT = "weights[e] = expf(scores[e] - maximum) / total;"

RIGHT["13B"] = [
    changed((SUM, "total += weights[e] = expf(scores[e] - maximum);"), (WEIGHT, "weights[e] /= total;")),
    changed((WEIGHT, "weights[e] = expf(scores[e] - maximum - logf(total));")),
]
WRONG["13B"] = [
    (changed(("maximum = warp_max(maximum);", "")), "What do the lanes without an edge bring"),
    (changed(("total = warp_sum(total);", "")), "What do the lanes without an edge bring"),
    (changed((SUM, "total += expf(scores[e]);"), (WEIGHT, "weights[e] = expf(scores[e]) / total;")), "do not overflow"),
    (changed(("float maximum = -INFINITY", "float maximum = 0.0f")), "where does the maximum begin"),
    (changed((LOAD, "for (int e = lane; e < end; e += 32)")), "all at once"),
    (changed((WRITE, "for (int e = first + lane; e < first + 32 && e < end; e += 32)")), "by how much does it go on"),
    (
        changed(
            (LOAD, "for (int e = first; e < end; ++e)"),
            (SCORE, "for (int e = first; e < end; ++e)"),
            ("total = warp_sum(total);", ""),
            (WRITE, "for (int e = first; e < end && lane == 0; ++e)"),
        ),
        "Which edges has lane 1",
    ),
    (
        changed((SCORE, "for (int e = first + lane; e <= end; e += 32)")),
        "NO",
    ),
    (
        changed(
            ("int first = starts[node], end = starts[node + 1];", "int first = starts[0], end = starts[node + 1];")
        ),
        "Which lane writes which edge?",
    ),
    (
        changed((WRITE, "if (first == end) weights[first] = 0.0f;\n  " + WRITE)),
        "NO",
    ),
]
