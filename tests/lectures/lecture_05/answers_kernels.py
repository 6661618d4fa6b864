"""Answers to the CUDA exercises of lecture 05 as learners write them: right ones, unlike the lecture's, and wrong ones."""


def change(source, *pairs):
    """The source with each first text replaced by the second; every text has to be there, once."""
    for old, new in pairs:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


# --- 5H --------------------------------------------------------------------------------------------------------------

MERGE_HEAD = r"""
__device__ float warp_max(float x) {
  for (int o = 16; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, o));
  return x;
}
__device__ float warp_sum(float x) {
  for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffff, x, o);
  return x;
}
__global__ void merge_splits(const float* outs, const double* lses, float* out, int n_splits, int d) {
  extern __shared__ float share[];
"""
NORMALISED_FIRST = (
    MERGE_HEAD
    + r"""
  const double* mine = lses + (size_t)blockIdx.x * n_splits;
  float top = -INFINITY, total = 0.0f;
  for (int s = threadIdx.x; s < n_splits; s += 32) top = fmaxf(top, mine[s]);
  top = warp_max(top);
  bool empty = top == -INFINITY;
  for (int s = threadIdx.x; s < n_splits; s += 32) total += share[s] = empty ? 0.0f : expf(mine[s] - top);
  total = warp_sum(total);
  for (int s = threadIdx.x; s < n_splits; s += 32) share[s] /= empty ? 1.0f : total;
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += 32) {
    float sum = 0.0f;
    for (int s = 0; s < n_splits; ++s) {
      if (mine[s] == -INFINITY) continue;
      sum += share[s] * outs[((size_t)blockIdx.x * n_splits + s) * d + c];
    }
    out[(size_t)blockIdx.x * d + c] = sum;
  }
}
"""
)
ONLINE = (
    MERGE_HEAD
    + r"""
  for (int c = threadIdx.x; c < d; c += 32) {
    double top = -INFINITY;
    float total = 0.0f, sum = 0.0f;
    for (int s = 0; s < n_splits; ++s) {
      size_t at = (size_t)blockIdx.x * n_splits + s;
      double lse = lses[at];
      if (lse == -INFINITY) continue;
      double larger = fmax(top, lse);
      float shrink = expf(top - larger), weight = expf(lse - larger);
      total = total * shrink + weight, sum = sum * shrink + weight * outs[at * d + c], top = larger;
    }
    out[(size_t)blockIdx.x * d + c] = total > 0.0f ? sum / total : 0.0f;
  }
}
"""
)
AVERAGED = change(NORMALISED_FIRST, ("share[s] * outs", "1.0f / n_splits * outs"))
NOT_DIVIDED = change(NORMALISED_FIRST, ("empty ? 1.0f : total", "1.0f"))
RESULT_UNUSED = change(NORMALISED_FIRST, ("total = warp_sum(total)", "warp_sum(total)"))
LSE_AS_SHARE = change(ONLINE, ("weight = expf(lse - larger)", "weight = lse"), ("expf(top - larger)", "1.0f"))
NOT_SHIFTED = change(NORMALISED_FIRST, ("expf(mine[s] - top)", "expf(mine[s])"))
FROM_ZERO = change(NORMALISED_FIRST, ("top = -INFINITY, total", "top = 0.0f, total"))
ROUNDED_FIRST = change(ONLINE, ("double lse = lses[at]", "float lse = lses[at]"))
NAN_MULTIPLIED = change(NORMALISED_FIRST, ("      if (mine[s] == -INFINITY) continue;\n", ""))
NO_EMPTY_ROW = change(NORMALISED_FIRST, ("empty = top == -INFINITY", "empty = false"),
                      ("      if (mine[s] == -INFINITY) continue;\n", "      if (share[s] == 0.0f) continue;\n"))  # fmt: skip
ZERO_BY_ZERO = change(ONLINE, ("total > 0.0f ? sum / total : 0.0f", "sum / total"))
ONE_SPLIT_A_LANE = NORMALISED_FIRST.replace(
    "for (int s = threadIdx.x; s < n_splits; s += 32)", "if (int s = threadIdx.x; s < n_splits)"
)
ONE_COLUMN_A_LANE = change(ONLINE, ("for (int c = threadIdx.x; c < d; c += 32)", "if (int c = threadIdx.x; c < d)"))
ONE_ROW_FOR_ALL = change(NORMALISED_FIRST, ("lses + (size_t)blockIdx.x * n_splits", "lses"))
NOT_AWAITED = change(NORMALISED_FIRST, ("  __syncthreads();\n", ""))
IDLE_LANES_RETURN = change(NORMALISED_FIRST, ("  float top", "  if (threadIdx.x >= n_splits) return;\n  float top"))
LANE_ZERO_ALONE = change(ONLINE, ("int c = threadIdx.x; c < d; c += 32", "int c = 0; c < d && threadIdx.x == 0; ++c"))
LANE_A_SPLIT = change(
    NORMALISED_FIRST,
    ("int c = threadIdx.x; c < d; c += 32", "int c = 0; c < d; ++c"),
    ("int s = 0; s < n_splits; ++s", "int s = threadIdx.x; s < n_splits; s += 32"),
    ("    out[(size_t)blockIdx.x * d + c] = sum;", "    sum = warp_sum(sum);\n    if (threadIdx.x == 0) out[(size_t)blockIdx.x * d + c] = sum;"),
)  # fmt: skip
READ_THEN_ASKED = change(
    ONLINE,
    ("      double lse = lses[at];\n", "      double lse = lses[at];\n      float value = outs[at * d + c];\n      out[(size_t)blockIdx.x * d + c] = value;\n"),
    ("weight * outs[at * d + c]", "weight * value"),
)  # fmt: skip
STEPS_OF_33 = change(
    NORMALISED_FIRST,
    ("s += 32) top = fmaxf", "s += 33) top = fmaxf"),
)
ALL_LANES_WRITE_ALL = change(ONLINE, ("int c = threadIdx.x; c < d; c += 32", "int c = 0; c < d; ++c"))
SUM_OF_AT_LEAST_ONE = change(NORMALISED_FIRST, ("share[s] /= empty ? 1.0f : total", "share[s] /= fmaxf(total, 1.0f)"))

THIRTEEN_LANES = change(
    ONLINE, ("int c = threadIdx.x; c < d; c += 32", "int c = threadIdx.x; c < d && threadIdx.x < 13; c += 13")
)
FIRST_ROUND_DECIDES = change(
    NORMALISED_FIRST,
    (
        "for (int s = threadIdx.x; s < n_splits; s += 32) top = fmaxf(top, mine[s]);",
        "if (threadIdx.x < n_splits) top = mine[threadIdx.x];",
    ),
)

# --- 5E --------------------------------------------------------------------------------------------------------------

OFFSET_HEAD = r"""
__device__ size_t key_offset(const int* block_table, int columns, int b, int h, int j,
                             int page_size, int heads, int d) {
"""
BY_TOKENS = (
    OFFSET_HEAD
    + r"""
  const int* line = block_table + (size_t)b * columns;
  size_t token = (size_t)line[j / page_size] * page_size + j % page_size;
  return token * heads * d + (size_t)h * d;
}
"""
)
BY_SUBTRACTION = (
    OFFSET_HEAD
    + r"""
  int column = 0;
  for (; j >= page_size; j -= page_size) ++column;
  long long page = block_table[b * columns + column], of_slot = heads * d;
  return page * page_size * of_slot + j * of_slot + h * d;
}
"""
)
NO_TABLE = change(BY_TOKENS, ("(size_t)line[j / page_size]", "(size_t)(j / page_size)"))
FIRST_LINE = change(BY_TOKENS, ("block_table + (size_t)b * columns", "block_table"))
LINE_OF_PAGES = change(BY_TOKENS, ("(size_t)b * columns", "(size_t)b * page_size"))
ROUNDED_UP = change(BY_TOKENS, ("line[j / page_size]", "line[(j + page_size - 1) / page_size]"))
PAGE_TOO_EARLY = change(BY_TOKENS, ("line[j / page_size]", "line[(j + 1) / page_size]"))
SLOT_FORGOTTEN = change(BY_TOKENS, (" + j % page_size", ""))
J_FOR_SLOT = change(BY_TOKENS, ("j % page_size", "j"))
PAGE_OF_ONE_TOKEN = change(BY_TOKENS, ("[j / page_size] * page_size", "[j / page_size]"))
TOKEN_IN_TABLE = change(BY_TOKENS, ("line[j / page_size]", "line[j]"))
HEADS_OUTSIDE = (
    OFFSET_HEAD
    + r"""
  size_t page = block_table[b * columns + j / page_size];
  return ((page * heads + h) * page_size + j % page_size) * d;
}
"""
)
SIZES_MIXED_UP = change(
    HEADS_OUTSIDE, ("(page * heads + h) * page_size + j % page_size", "(page * heads + j % page_size) * page_size + h")
)
HEAD_FORGOTTEN = change(BY_TOKENS, (" + (size_t)h * d", ""))
D_FORGOTTEN = change(BY_TOKENS, ("token * heads * d + (size_t)h * d", "token * heads + h"))
IN_INT = (
    OFFSET_HEAD
    + r"""
  int page = block_table[b * columns + j / page_size];
  return ((page * page_size + j % page_size) * heads + h) * d;
}
"""
)
CAST_TOO_LATE = change(
    IN_INT,
    (
        "return ((page * page_size + j % page_size) * heads + h) * d",
        "return (size_t)(((page * page_size + j % page_size) * heads + h) * d)",
    ),
)

RIGHT = {"5H": [NORMALISED_FIRST, ONLINE], "5E": [BY_TOKENS, BY_SUBTRACTION]}
WRONG = {
    "5H": [
        (AVERAGED, "not one in n_splits"),
        (NOT_DIVIDED, "and not undivided"),
        (RESULT_UNUSED, "Use what warp_max and warp_sum return"),
        (LSE_AS_SHARE, "The share of split s is exp(lses[s])"),
        (ONE_ROW_FOR_ALL, "Its outs begin at row * n_splits * d"),
        (ONE_SPLIT_A_LANE, "every s below n_splits needs a lane"),
        (ONE_COLUMN_A_LANE, "and c in steps of 32 while c < d"),
        (NOT_SHIFTED, "let the search for it start at -INFINITY"),
        (FROM_ZERO, "let the search for it start at -INFINITY"),
        (ROUNDED_FIRST, "subtract before you round"),
        (NAN_MULTIPLIED, "0 times nan is nan"),
        (NO_EMPTY_ROW, "replace a largest of -INFINITY by 0"),
        (ZERO_BY_ZERO, "a sum of 0 by 1"),
        (NOT_AWAITED, "__syncwarp() between the two"),
        (IDLE_LANES_RETURN, "need all 32 lanes"),
        (LANE_ZERO_ALONE, "brings 32 columns of a split"),
        (STEPS_OF_33, "let the search for it start at -INFINITY"),
        (ALL_LANES_WRITE_ALL, "Each number of out is written by one lane"),
        (SUM_OF_AT_LEAST_ONE, "divide by any sum but 0"),
        (THIRTEEN_LANES, "brings 32 columns of a split"),
        (FIRST_ROUND_DECIDES, "let the search for it start at -INFINITY"),
        (LANE_A_SPLIT, "Lane l reads columns l, l + 32"),
        (READ_THEN_ASKED, "before you read outs[s * d + c]"),
    ],
    "5E": [
        (NO_TABLE, "the page is what stands there"),
        (FIRST_LINE, "The line of row b begins at b * columns"),
        (LINE_OF_PAGES, "The line of row b begins at b * columns"),
        (ROUNDED_UP, "that of token j in row b is number b * columns + j / page_size"),
        (PAGE_TOO_EARLY, "that of token j in row b is number b * columns + j / page_size"),
        (TOKEN_IN_TABLE, "that of token j in row b is number b * columns + j / page_size"),
        (SLOT_FORGOTTEN, "The slot of a key is j % page_size"),
        (J_FOR_SLOT, "A page has page_size * heads * d floats"),
        (PAGE_OF_ONE_TOKEN, "A page has page_size * heads * d floats"),
        (HEADS_OUTSIDE, "head h begins h * d floats into it"),
        (SIZES_MIXED_UP, "key j begins at j * d"),
        (HEAD_FORGOTTEN, "head h begins h * d floats into it"),
        (D_FORGOTTEN, "key j begins at j * d"),
        (IN_INT, "make the first one a size_t"),
        (CAST_TOO_LATE, "make the first one a size_t"),
    ],
}
