"""Answers to exercise 12G of lecture 12, in CUDA: right ones and wrong ones, as in answers.py."""

from attention.mixture import GROUPED_MATMUL
from tests.lectures.collect import collect, replacing

RIGHT, WRONG, right, wrong = collect()
changed = replacing(GROUPED_MATMUL)

BEFORE = "__syncthreads();                                     // load: the last tiles are used up"
AFTER = "__syncthreads();                                     // the new tiles are there"
GATHER = "x[(size_t)source[r] * inner + first + t]"
THERE_X = "bool there = r < rows && first + t < inner;"
THERE_W = "bool there = first + t < inner && left + c < columns;"
TILE_X = "int r = e / DEPTH, t = e % DEPTH;"
TILE_W = "int t = e / COLUMNS, c = e % COLUMNS;"
PUT_W = "w_tile[e] = there"
LOOP = "for (int first = 0; first < inner; first += DEPTH) {"
WRITE_ROWS = "for (int r = ty, i = 0; r < rows; r += 16, ++i)"
WRITE_COLUMNS = "for (int c = tx; c < COLUMNS && left + c < columns; c += 16)"
WRITE = "y[(size_t)target[r] * columns + left + c] = gate[r] * sum[i][c / 16];"
SECOND = "sum[1][c] += x_tile[(ty + 16) * (DEPTH + 1) + t] * value;"
VALUE = "float value = w_tile[t * COLUMNS + tx + 16 * c];"

RIGHT["12G"] = [
    changed(
        (THERE_X, "bool there = first + t < inner && r < rows;\n      float g = r < rows ? gate[r] : 0.0f;"),
        (GATHER, "g * " + GATHER),
        ("gate[r] * sum[i][c / 16]", "sum[i][c / 16]"),
    ),
    changed(
        (BEFORE, BEFORE.replace("__syncthreads();", "if (first == 0) __syncthreads();")),
        ("  for (int r = ty, i = 0;", "  __syncthreads();\n  for (int r = ty, i = 0;"),
        (SECOND, SECOND + "\n      }\n    __syncthreads();\n    {"),
    ),
]
WRONG["12G"] = [
    (changed((GATHER, GATHER.replace("source[r]", "(begin + r)"))), "NO"),
    (changed((GATHER, GATHER.replace("source[r]", "target[r]"))), "NO"),
    (changed((WRITE, WRITE.replace("target[r]", "(begin + r)"))), "Which row of x is that of slot"),
    (changed((WRITE, WRITE.replace("gate[r] * ", ""))), "With what is a sum multiplied"),
    (changed((WRITE_ROWS, WRITE_ROWS.replace("r < rows", "r < ROWS"))), "NO"),
    (changed((WRITE_ROWS, WRITE_ROWS.replace("r < rows", "i < 1 && r < rows"))), "Which row of x_tile"),
    (changed((THERE_X, THERE_X.replace(" && first + t < inner", ""))), "NO"),
    (changed((THERE_W, THERE_W.replace(" && left + c < columns", ""))), "NO"),
    (changed((LOOP, LOOP.replace("first < inner", "first < min(inner, DEPTH)"))), "How many columns of x has the last round"),
    (changed((BEFORE, "")), "Two barriers a round"),
    (changed((BEFORE, BEFORE.replace("__syncthreads();", "if (first == 0) __syncthreads();"))), "Two barriers a round"),
    (changed((AFTER, "")), "barrier"),
    (changed((LOOP, "if (ty >= rows) return;\n  " + LOOP)), "All 256 threads have to come"),
    (
        changed((TILE_W, "int c = e / DEPTH, t = e % DEPTH;"), (PUT_W, "w_tile[t * COLUMNS + c] = there")),
        "How are the elements of a tile numbered",
    ),
    (
        changed((VALUE, "int at = left + tx + 16 * c < columns && first + t < inner ? (first + t) * columns + tx + 16 * c : -1;\n"
                        "        float value = at < 0 ? 0.0f : w[at];")),
        "Who copies a row of x",
    ),
]  # fmt: skip
