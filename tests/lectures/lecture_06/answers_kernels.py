"""Answers to the exercises of lecture 06 in CUDA: RIGHT and WRONG, as in answers.py."""


def change(source, *pairs):
    """The source with each first text replaced by the second; every text has to be there, once."""
    for old, new in pairs:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


FLASH = r"""
__global__ void flash_shared(const float* q, const float* k, const float* v, float* out, float* lse,
                             int n_queries, int n_keys, int d, int causal, float scale) {
  extern __shared__ float shared[];
  int stride = d + PAD, x = threadIdx.x, y = threadIdx.y, i = blockIdx.y * TILE + y;
  float *q_tile = shared, *k_tile = q_tile + TILE * stride, *v_tile = k_tile + TILE * stride;
  float *o_row = v_tile + TILE * stride + y * stride;
  float *p_row = shared + 4 * TILE * stride + y * (TILE + PAD);
  size_t head = blockIdx.x;
  const float* queries = q + head * n_queries * d;
  const float* keys = k + head * n_keys * d;
  const float* values = v + head * n_keys * d;
  int visible = visible_keys((blockIdx.y + 1) * TILE, n_queries, n_keys, causal);
  load_rows(q_tile, TILE, d, stride, queries, blockIdx.y * TILE, n_queries, d);
  for (int c = x; c < d; c += TILE) o_row[c] = 0.0f;
  float maximum, total;
  // the loop
  if (i >= n_queries) return;
  float share = total == 0.0f ? 0.0f : 1.0f / total;
  for (int c = x; c < d; c += TILE) out[(head * n_queries + i) * d + c] = o_row[c] * share;
  if (x == 0) lse[head * n_queries + i] = total == 0.0f ? -INFINITY : maximum + logf(total);
}
"""

# Barriers at the end of a round, and weights by shuffles instead of shared memory.
LOOP = r"""
  maximum = -INFINITY; total = 0.0f;
  for (int first = 0; first < visible; first += TILE) {
    load_rows(k_tile, TILE, d, stride, keys, first, visible, d);
    load_rows(v_tile, TILE, d, stride, values, first, visible, d);
    __syncthreads();
    bool seen = may_attend(i, first + x, n_queries, n_keys, causal);
    float s = 0.0f;
    for (int t = 0; t < d; ++t) s += q_tile[y * stride + t] * k_tile[x * stride + t];
    s = seen ? s * scale : -INFINITY;
    float highest = fmaxf(maximum, row_max(s));
    float shift = highest == -INFINITY ? 0.0f : highest;
    float factor = expf(maximum - shift);
    p_row[x] = expf(s - shift);
    total = total * factor + row_sum(p_row[x]);
    maximum = highest;
    __syncwarp();
    for (int c = x; c < d; c += TILE) {
      o_row[c] *= factor;
      for (int r = 0; r < TILE; ++r) o_row[c] += p_row[r] * v_tile[r * stride + c];
    }
    __syncthreads();
  }
"""
RIGHT_TO_LEFT = change(
    LOOP,
    (
        "for (int first = 0; first < visible; first += TILE) {",
        "for (int first = (visible - 1) / TILE * TILE; first >= 0 && visible > 0; first -= TILE) {",
    ),
)
GUARDED = change(
    LOOP,
    ("float factor = expf(maximum - shift);", "float factor = maximum == -INFINITY ? 0.0f : expf(maximum - shift);"),
)


def flash(loop):
    return change(FLASH, ("  // the loop\n", loop))


def flash_with(*pairs):
    return flash(change(LOOP, *pairs))


TWICE = LOOP + LOOP.replace(
    "maximum = -INFINITY; total = 0.0f;",
    "maximum = -INFINITY; total = 0.0f; for (int c = x; c < d; c += TILE) o_row[c] = 0.0f;",
)
ONE_THREAD_A_ROW = r"""
  maximum = -INFINITY; total = 0.0f;
  for (int first = 0; first < visible; first += TILE) {
    __syncthreads();
    load_rows(k_tile, TILE, d, stride, keys, first, visible, d);
    load_rows(v_tile, TILE, d, stride, values, first, visible, d);
    __syncthreads();
    for (int j = 0; j < TILE && x == 0; ++j) {
      if (!may_attend(i, first + j, n_queries, n_keys, causal)) continue;
      float s = 0.0f;
      for (int t = 0; t < d; ++t) s += q_tile[y * stride + t] * k_tile[j * stride + t];
      float highest = fmaxf(maximum, scale * s), factor = expf(maximum - highest), weight = expf(scale * s - highest);
      maximum = highest, total = factor * total + weight;
      for (int c = 0; c < d; ++c) o_row[c] = factor * o_row[c] + weight * v_tile[j * stride + c];
    }
  }
  __syncwarp();
  maximum = row_max(x == 0 ? maximum : -INFINITY), total = row_sum(total);
"""

RIGHT = {"6F": [flash(LOOP), flash(RIGHT_TO_LEFT), flash(GUARDED)]}
WRONG = {
    "6F": [
        (flash_with(("maximum = -INFINITY;", "maximum = 1e-30f;")), "The maximum starts at -INFINITY"),
        (flash_with(("maximum = -INFINITY;", "maximum = 0.0f;")), "The maximum starts at -INFINITY"),
        (flash_with(("    __syncthreads();\n  }\n", "  }\n")), "before the tiles are overwritten"),
        (flash_with(("    __syncwarp();\n", "")), "before the other weights of the row are read"),
        (flash_with(("visible, d);\n    __syncthreads();", "visible, d);")), "before they are used"),
        (flash_with(("bool seen = may_attend(i, first + x, n_queries, n_keys, causal);", "bool seen = true;")), "the score of a zero is 0"),
        (flash_with(("may_attend(i, first + x, n_queries, n_keys, causal)", "first + x < n_keys")), "may_attend knows the causal mask"),
        (flash_with(("      o_row[c] *= factor;\n", "")), "multiply both by exp(old - new)"),
        (flash_with(("total * factor", "total")), "multiply both by exp(old - new)"),
        (flash_with(("fmaxf(maximum, row_max(s))", "row_max(s)")), "that factor is 1"),
        (flash_with(("highest == -INFINITY ? 0.0f : highest", "highest")), "shift by 0 there"),
        (flash_with(("row_sum(p_row[x])", "p_row[x]")), "total is their sum over the row"),
        (flash_with(("row_max(s)", "s")), "Weights are exp(scale * product"),
        (flash_with(("s = seen ? s * scale : -INFINITY;", "s = seen ? s : -INFINITY;")), "Weights are exp(scale * product"),
        (flash_with(("total = 0.0f;", "")), "come without a value"),
        (flash_with(("k_tile[x * stride + t]", "k_tile[x * d + t]")), "`stride` apart"),
        (flash(LOOP.replace("visible", "n_keys")), "bytes are loaded, where"),
        (flash_with(("first < visible;", "first < n_keys;")), "of the requests to shared memory, and 6 of 9 tiles"),
        (flash_with(("first < visible;", "first <= visible;")), "of the requests to shared memory, and 6 of 9 tiles"),
        (flash(TWICE), "bytes are loaded, where"),
        (flash_with(("k_tile[x * stride + t];", "(seen ? keys[(size_t)(first + x) * d + t] : 0.0f);")), "no number is loaded twice"),
        (flash_with(("k_tile[x * stride + t];", "(seen ? keys[(size_t)(first + x) * d + t] : 0.0f);"),
                    ("    load_rows(k_tile, TILE, d, stride, keys, first, visible, d);\n", "")), "fetches 6144 sectors where 1536 would do"),
        (flash(ONE_THREAD_A_ROW), "requests to shared memory, where"),
        (flash_with(("    __syncthreads();\n  }\n", "    if (i < n_queries) __syncthreads();\n  }\n")), "reached by all 256 threads"),
        (flash_with(("row_max(s)", "(seen ? row_max(s) : s)")), "Barriers and shuffles need all threads"),
        (flash_with(("for (int c = x; c < d; c += TILE) {", "if (x < d) { int c = x;")), "steps of TILE while c < d"),
    ]
}  # fmt: skip
