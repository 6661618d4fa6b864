"""Answers to exercise 11C of lecture 11, in CUDA: right ones and wrong ones, as in answers.py."""

from attention.differential import DIFFERENTIAL_FLASH
from tests.lectures.collect import collect, replacing

RIGHT, WRONG, right, wrong = collect()
changed = replacing(DIFFERENTIAL_FLASH)

BEFORE = "__syncthreads();                                     // load: the last tiles are used up"
AFTER = "__syncthreads();                                     // the new tiles are there"
LOAD_V = "load_rows(v_tile, TILE, TILE * C, TILE * C, v, first, visible, d_v);"
SHRINK_1, SHRINK_2 = (f"for (int c = 0; c < C; ++c) sum{m}[c] *= shrink{m};" for m in (1, 2))
SHUFFLE_1, SHUFFLE_2 = (f"float w{m} = __shfl_sync(0xffffffff, weight{m}, r, TILE);" for m in (1, 2))
SCORE_2 = "float s2 = seen ? scale * score(q2_tile, k2_tile, d) : -INFINITY;"
SCORE_1 = SCORE_2.replace("2", "1")
RESCALE_2 = "float weight2, shrink2 = rescale(s2, weight2, maximum2, total2);"
VALUE = "float value = v_tile[(r * C + c) * TILE + x];"
LOOP = "for (int first = 0; first < visible; first += TILE) {"

RIGHT["11C"] = [
    changed(
        (SHRINK_1, ""),
        (SHRINK_2, ""),
        (
            SHUFFLE_2,
            SHUFFLE_2 + "\n      for (int c = 0; c < C && r == 0; ++c) sum1[c] *= shrink1, sum2[c] *= shrink2;",
        ),
    ),
    changed((BEFORE, ""), (LOOP, LOOP.replace("visible;", "visible; __syncthreads(),"))),
]
WRONG["11C"] = [
    (changed((SHRINK_2, SHRINK_2.replace("shrink2", "shrink1"))), "what happens to both sums"),
    (changed((RESCALE_2, RESCALE_2.replace("maximum2", "maximum1"))), "two softmaxes"),
    (changed((SHRINK_1, "")), "what happens to both sums"),
    (changed((SHUFFLE_2, "float w2 = weight2;")), "Which lane knows the weights"),
    (changed((SHUFFLE_1, SHUFFLE_1.replace(", TILE)", ")"))), "Which lane knows the weights"),
    (changed((SCORE_2, "float s2 = scale * score(q2_tile, k2_tile, d);")), "What does a key score that is not there"),
    (changed(*((s, s.replace("-INFINITY", "-1e9f")) for s in (SCORE_1, SCORE_2))), "What is the score of a key"),
    (changed(*((s, s.replace("scale * ", "")) for s in (SCORE_1, SCORE_2))), "multiplied by scale"),
    (changed((SHUFFLE_2, SHUFFLE_2.replace("__shfl", "lambda * __shfl"))), "who multiplies by lambda"),
    (
        changed((LOOP, LOOP.replace("visible", "n_keys")), (LOAD_V, LOAD_V.replace("visible", "n_keys"))),
        "Behind which key has no query",
    ),
    (changed((BEFORE, "")), "one before the tiles are overwritten"),
    (changed((AFTER, "")), "one before they are used"),
    (
        changed((VALUE, "float value = first + r < visible && x + TILE * c < d_v ? "
                        "v[(size_t)(first + r) * d_v + x + TILE * c] : 0.0f;"), (LOAD_V, "")),
        "Who copies a value from v",
    ),
    (changed((LOOP, "if (i >= n_queries) return;\n  " + LOOP)), "All 256 threads have to come"),
    (changed((LOAD_V, LOAD_V.replace("TILE * C, TILE * C", "d_v, d_v"))), "NO"),
    (changed((LOAD_V, LOAD_V.replace("TILE * C, TILE * C", "d_v, TILE * C"))), "are all 16 * C columns"),
    (changed((LOOP, LOOP.replace("first += TILE", "first += 2 * TILE"))), "any number of queries and keys"),
]  # fmt: skip
