"""Answers to exercise 2H as learners write them: right ones, unlike the lecture's, and wrong ones, each with words that
the report must contain."""

HEAD = r"""
#define TILE 16
__device__ void load_head(float* tile, int stride, const float* rows, int row_stride, int head, int first, int n_rows,
                          int d_head) {
  int thread = threadIdx.y * TILE + threadIdx.x;
"""
BY_NUMBER = (
    HEAD
    + r"""
  for (int e = thread; e < TILE * d_head; e += 256) {
    int t = first + e / d_head;
    float number = 0.0f;
    if (t < n_rows) number = rows[(size_t)t * row_stride + (head * d_head + e % d_head)];
    tile[(e / d_head) * stride + e % d_head] = number;
  }
}
"""
)
A_ROW_FOR_SIXTEEN_THREADS = (
    HEAD
    + r"""
  const float* mine = rows + (size_t)(first + threadIdx.y) * row_stride + head * d_head;
  for (int c = threadIdx.x; c < d_head; c += TILE)
    tile[threadIdx.y * stride + c] = first + (int)threadIdx.y < n_rows ? mine[c] : 0.0f;
}
"""
)
INDEX = "(size_t)t * row_stride + (head * d_head + e % d_head)"
NEXT_HEAD = BY_NUMBER.replace("(head * d_head", "((head + 1) * d_head")
FIRST_HEAD = BY_NUMBER.replace("(head * d_head + e", "(e")
AS_IF_TRANSPOSED = BY_NUMBER.replace(INDEX, "((size_t)head * n_rows + t) * d_head + e % d_head")
ROWS_TOO_NEAR = BY_NUMBER.replace("t * row_stride", "t * d_head")
COLUMNS_IN_TURNS = BY_NUMBER.replace("(head * d_head + e % d_head)", "(e % d_head) * (row_stride / d_head) + head")
WITHOUT_STRIDE = BY_NUMBER.replace("(e / d_head) * stride + e % d_head", "e")
WITHOUT_END = BY_NUMBER.replace("if (t < n_rows) ", "")
END_OF_THE_TILE = BY_NUMBER.replace("t < n_rows", "e / d_head < n_rows")
NOT_ZEROED = BY_NUMBER.replace("    tile[", "    if (t < n_rows) tile[")
WITHOUT_FIRST = BY_NUMBER.replace("first + e / d_head", "e / d_head")
ONE_ELEMENT_A_THREAD = BY_NUMBER.replace(
    "for (int e = thread; e < TILE * d_head; e += 256)", "int e = thread; if (e < TILE * d_head)"
)
BY_COLUMNS = (
    HEAD
    + r"""
  for (int e = thread; e < TILE * d_head; e += 256) {
    int r = e % TILE, c = e / TILE;
    tile[r * stride + c] = first + r < n_rows ? rows[(size_t)(first + r) * row_stride + head * d_head + c] : 0.0f;
  }
}
"""
)
BY_THREAD_ZERO = BY_NUMBER.replace(
    "int e = thread; e < TILE * d_head; e += 256", "int e = 0; e < TILE * d_head && !thread; ++e"
)
WHOLE_ROWS = (
    HEAD
    + r"""
  for (int e = thread; e < TILE * row_stride; e += 256) {
    int r = e / row_stride, c = e % row_stride - head * d_head;
    float number = first + r < n_rows ? rows[(size_t)(first + r) * row_stride + e % row_stride] : 0.0f;
    if (c >= 0 && c < d_head) tile[r * stride + c] = number;
  }
}
"""
)
LAST_ROW_AGAIN = BY_NUMBER.replace(
    "    if (t < n_rows) number = rows[(size_t)t *", "    int u = min(t, n_rows - 1);\n    number = rows[(size_t)u *"
).replace("= number;", "= t < n_rows ? number : 0.0f;")
TWICE = BY_NUMBER.replace("  for (int e", "  for (int again = 0; again < 2; ++again)\n  for (int e")
SIXTEEN_THREADS = BY_NUMBER.replace(
    "int e = thread; e < TILE * d_head; e += 256", "int e = thread; e < TILE * d_head && thread < 16; e += 16"
)
EVERY_THREAD_ALL = BY_NUMBER.replace("int e = thread; e < TILE * d_head; e += 256", "int e = 0; e < TILE * d_head; ++e")
BARRIER_INSIDE = BY_NUMBER.replace("= number;\n", "= number;\n    __syncthreads();\n")
PADDING_ZEROED = (
    HEAD
    + r"""
  for (int e = thread; e < TILE * stride; e += 256) {
    int t = first + e / stride, c = e % stride;
    tile[e] = t < n_rows && c < d_head ? rows[(size_t)t * row_stride + head * d_head + c] : 0.0f;
  }
}
"""
)

RIGHT = {"2H": [BY_NUMBER, A_ROW_FOR_SIXTEEN_THREADS, PADDING_ZEROED]}
WRONG = {
    "2H": [
        (NEXT_HEAD, "The columns of a head are head * d_head to"),
        (FIRST_HEAD, "head 1 was asked for and head 0 loaded"),
        (AS_IF_TRANSPOSED, "as if each head had an array of its own"),
        (ROWS_TOO_NEAR, "rows were d_head apart: they are row_stride apart"),
        (COLUMNS_IN_TURNS, "those of one head stand side by side"),
        (WITHOUT_STRIDE, "row r begins at r * stride"),
        (WITHOUT_END, "Compare first + r with n_rows."),
        (END_OF_THE_TILE, "Compare first + r with n_rows."),
        (NOT_ZEROED, "99 stood in the tile before."),
        (WITHOUT_FIRST, "row r of the tile is row first + r of the matrix"),
        (ONE_ELEMENT_A_THREAD, "256 threads have to copy more than 256 elements"),
        (BY_COLUMNS, "Number the elements of the tile row after row"),
        (BY_THREAD_ZERO, "requests, where 24 would do"),
        (SIXTEEN_THREADS, "16 threads load from rows, where 256 could"),
        (WHOLE_ROWS, "TILE * d_head elements, not whole rows"),
        (LAST_ROW_AGAIN, "where only 5 rows of 16 bytes exist"),
        (EVERY_THREAD_ALL, "No two threads may write the same one"),
        (BARRIER_INSIDE, "no barrier stands in it"),
        (TWICE, "bytes were read, for a head of"),
    ]
}
