"""Answers to exercise 10G of lecture 10, in CUDA: right ones and wrong ones, as in answers.py."""

from attention.linear import LINEAR_CHUNKED
from tests.lectures.collect import collect, replacing

RIGHT, WRONG, right, wrong = collect()
changed = replacing(LINEAR_CHUNKED)

BEFORE = "__syncthreads();                                     // load: the last chunk is added"
AFTER = "__syncthreads();                                     // the new chunk is there"
USED = "__syncthreads();                                     // the old state is used up"
LOAD_V = "load_tile(v_tile, TILE * C, TILE * C, v, before + first, n_keys, columns, d_v);"
LOAD_K = "load_tile(k_tile, d, stride, k, before + first, n_keys, d, d);"
LOAD_Q = "load_tile(q_tile, d, stride, q, first, n_queries, d, d);"
READ = "read_state<C>(sum, q_tile, state, d);                // accumulate: what came before ..."
ADD = "if (causal) add_to_state<C>(state, k_tile, v_tile, d);\n  }\n}"
OWN = "for (int c = 0; c < C && causal && r <= y; ++c) sum[c] += w * v_tile[(r * C + c) * TILE + x];"
SHUFFLE = "float w = __shfl_sync(0xffffffff, s, r, TILE);"
LOOP = "for (int first = 0; first < n_queries; first += TILE) {"
WRITE = "c < C && first + y < n_queries && x + TILE * c < columns"
AT = "out[(size_t)(first + y) * d_v + x + TILE * c]"

RIGHT["10G"] = [
    changed((READ, ""), (USED, USED.replace("__syncthreads();", "")), (
        "for (int c = 0; c < C && first + y < n_queries",
        "read_state<C>(sum, q_tile, state, d);\n    __syncthreads();\n    for (int c = 0; c < C && first + y < n_queries",
    )),
    changed((OWN, OWN.replace("causal && r <= y", "r <= y && causal != 0")), (SHUFFLE, SHUFFLE + "\n      if (r > y) w = 0.0f;")),
]  # fmt: skip
WRONG["10G"] = [
    (changed((OWN, OWN.replace("r <= y", "r < y"))), "Which scores of a chunk"),
    (changed((OWN, OWN.replace("&& r <= y", ""))), "Which scores of a chunk"),
    (changed((OWN, OWN.replace("&& r <= y", "").replace("w *", "(r <= y ? w : 0.0f) *"))), "0 times nan is nan"),
    (changed((READ, "")), "What is in the state"),
    (changed((ADD, ADD.replace("if (causal)", "if (false)"))), "What is in the state"),
    (changed((ADD, ADD.replace("if (causal) ", ""))), "NO"),
    (changed((BEFORE, "")), "Three barriers a chunk"),
    (changed((AFTER, "")), "Three barriers a chunk"),
    (changed((USED, "")), "Three barriers a chunk"),
    (
        changed((USED, ""), (ADD, "}\n}"), (AFTER, AFTER + "\n    if (causal) add_to_state<C>(state, k_tile, v_tile, d);\n"
                "    __syncthreads();")),
        "Which scores of a chunk",
    ),
    (changed((LOAD_K, LOAD_K.replace("before + first", "first")), (LOAD_V, LOAD_V.replace("before + first", "first"))), "more keys than queries"),
    (changed((LOAD_Q, LOAD_Q.replace("stride", "d"))), "NO"),
    (changed((SHUFFLE, "float w = s;")), "Which scores of a chunk"),
    (changed((LOOP, "if (y >= n_queries) return;\n  " + LOOP)), "All 256 threads have to come"),
    (changed((WRITE, WRITE.replace(" && first + y < n_queries", ""))), "Which rows and columns does the last chunk have"),
    (changed((AT, AT.replace("* d_v", "* columns"))), "Which pointers stand at this head"),
]  # fmt: skip
