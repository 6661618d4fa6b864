"""Answers to exercise 8F of lecture 08, in CUDA: right ones and wrong ones, as in answers.py."""

from attention.grouped_query import GROUPED_SPLIT
from tests.lectures.collect import collect, replacing

RIGHT, WRONG, right, wrong = collect()
changed = replacing(GROUPED_SPLIT)

LOAD_K = "load_tile<C>(k_tile, k + (head * n_keys + first) * d, n, d);"
LOAD_V = "load_tile<C>(v_tile, v + (head * n_keys + first) * d_v, n, d_v);"
BEFORE = "__syncthreads();                                     // the last tiles are used up"
AFTER = "__syncthreads();                                     // the new tiles are there"
SEEN = "score = seen ? score : -INFINITY;                    // before the softmax"
SHRINK = "for (int c = 0; c < C; ++c) sum[c] *= shrink;"
SHUFFLE = "float w = __shfl_sync(0xffffffff, weight, t);"

RIGHT["8F"] = [
    changed(
        (BEFORE, ""),
        (SHUFFLE, SHUFFLE + "\n      if (w == 0.0f) continue;"),
        (LOAD_K, "__syncthreads();\n    " + LOAD_K),
    ),
    changed(
        (SHRINK, ""),
        (SHUFFLE, SHUFFLE + "\n      if (t == 0) { for (int c = 0; c < C; ++c) sum[c] *= shrink; }"),
    ),
]
SCORE = "float score = score_keys<C>(query, k_tile, n);       // of key `lane`"
SCORE_FROM_GLOBAL = """float score = -INFINITY;
    for (int t = 0; t < n; ++t) {
      float s = 0.0f;
      for (int c = 0; c < C; ++c) {
        int column = 32 * c + lane;
        s += column < d ? query[c] * (float)k[(head * n_keys + first + t) * d + column] : 0.0f;
      }
      s = warp_sum(s);
      if (lane == t) score = s;
    }"""
EVERY_WARP_LOADS = """for (int e = lane; e < n * 32 * C; e += 32) {
      int r2 = e / (32 * C);
      int c2 = e % (32 * C);
      v_tile[e] = c2 < d_v ? (float)v[(head * n_keys + first + r2) * d_v + c2] : 0.0f;
    }"""
WRONG["8F"] = [
    (
        changed((LOAD_K, LOAD_K.replace("(head * n_keys + first)", "(size_t)first"))),
        "Where in k and in v does the head",
    ),
    (changed((LOAD_V, LOAD_V.replace("* d_v,", "* d,"))), "Where in k and in v does the head"),
    (changed((BEFORE, "")), "one before a tile is overwritten"),
    (changed((AFTER, "")), "which barrier stands between"),
    (changed((SEEN, "")), "What is the score of a key that this row may not see"),
    (changed((SHRINK, "")), "what happens to the sum so far"),
    (changed((SHUFFLE, "float w = weight;")), "which knows its weight"),
    (changed((SCORE, SCORE_FROM_GLOBAL), (LOAD_K, "")), "Who copies rows from k and v"),
    (changed((LOAD_V, EVERY_WARP_LOADS)), "tile"),
    (changed(("int n = min(KEYS, end - first);", "int n = min(KEYS, end - begin);")), "any number of keys"),
    (changed(("first += KEYS", "first += 2 * KEYS")), "any number of keys"),
    (
        changed(("for (int first = begin;", "if (top + threadIdx.y >= rows) return;\n  for (int first = begin;")),
        "All warps of a block have to come",
    ),
    (changed(("float shrink = rescale(score,", "float shrink = rescale(1.05f * score,")), "one row, one tile"),
]
