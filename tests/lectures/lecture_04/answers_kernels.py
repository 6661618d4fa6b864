"""Answers to the CUDA exercises of lecture 04 as learners write them: right ones, unlike the lecture's, and wrong ones."""

# --- 4G -------------------------------------------------------------------------------------------------------------

SOFTMAX_HEAD = r"""
#define THREADS 256
__device__ float combine(float a, float b, bool largest) { return largest ? fmaxf(a, b) : a + b; }
__device__ float over_block(float x, bool largest) {
  __shared__ float of_warp[THREADS / 32];
  for (int o = 16; o > 0; o /= 2) x = combine(x, __shfl_xor_sync(0xffffffff, x, o), largest);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = of_warp[0];
  for (int w = 1; w < THREADS / 32; ++w) x = combine(x, of_warp[w], largest);
  return x;
}
__device__ float block_max(float x) { return over_block(x, true); }
__device__ float block_sum(float x) { return over_block(x, false); }
__global__ void softmax_read_once(const float* x, float* y, int n_columns) {
  extern __shared__ float row[];
  int thread = threadIdx.x;
"""
IN_REGISTERS = (
    SOFTMAX_HEAD
    + r"""
  const float* from = x + (size_t)blockIdx.x * n_columns;
  float mine[47], top = -INFINITY, sum = 0.0f;                 // 47 * 256 is 12,032
  for (int i = 0; i < 47; ++i) {
    int j = i * THREADS + thread;
    mine[i] = j < n_columns ? from[j] : -INFINITY;
    top = fmaxf(top, mine[i]);
  }
  top = block_max(top);
  bool empty = top == -INFINITY;
  for (int i = 0; i < 47; ++i) sum += mine[i] = empty ? 0.0f : expf(mine[i] - top);
  sum = block_sum(sum);
  for (int i = 0; i < 47; ++i)
    if (i * THREADS + thread < n_columns)
      y[(size_t)blockIdx.x * n_columns + i * THREADS + thread] = empty ? 0.0f : mine[i] / sum;
}
"""
)
TOO_FEW_REGISTERS = IN_REGISTERS.replace("47", "16")
COPIED_FIRST = (
    SOFTMAX_HEAD
    + r"""
  size_t at = (size_t)blockIdx.x * n_columns;
  for (int j = thread; j < n_columns; j += THREADS) row[j] = x[at + j];
  __syncthreads();
  int each = (n_columns + THREADS - 1) / THREADS, first = thread * each, last = min(first + each, n_columns);
  float top = -INFINITY, sum = 0.0f;
  for (int j = first; j < last; ++j) top = fmaxf(top, row[j]);
  top = block_max(top);
  if (top == -INFINITY) top = 0.0f;
  for (int j = first; j < last; ++j) sum += expf(row[j] - top);
  sum = block_sum(sum);
  for (int j = thread; j < n_columns; j += THREADS) y[at + j] = sum == 0.0f ? 0.0f : expf(row[j] - top) / sum;
}
"""
)
COPY_NOT_AWAITED = COPIED_FIRST.replace("  __syncthreads();\n  int each", "  int each")
FROM_ZERO = COPIED_FIRST.replace("top = -INFINITY, sum", "top = 0.0f, sum")
NOT_SHIFTED = COPIED_FIRST.replace("expf(row[j] - top)", "expf(row[j])")
NO_EMPTY_ROWS = COPIED_FIRST.replace("  if (top == -INFINITY) top = 0.0f;\n", "")
ZERO_BY_ZERO = COPIED_FIRST.replace("sum == 0.0f ? 0.0f : ", "")
RESULT_UNUSED = COPIED_FIRST.replace("sum = block_sum(sum);", "block_sum(sum);")
THREE_READS = COPIED_FIRST.replace("top, row[j]", "top, x[at + j]").replace(
    "sum += expf(row[j]", "sum += expf(x[at + j]"
)
READ_TWICE = COPIED_FIRST.replace(": expf(row[j] - top)", ": expf(x[at + j] - top)")
WRITTEN_TWICE = COPIED_FIRST.replace("row[j] = x[at + j];", "y[at + j] = row[j] = x[at + j];")
ONE_COLUMN_A_THREAD = COPIED_FIRST.replace(
    "for (int j = thread; j < n_columns; j += THREADS) y", "if (int j = thread; j < n_columns) y"
)
IDLE_THREADS_RETURN = COPIED_FIRST.replace("  size_t at", "  if (thread >= n_columns) return;\n  size_t at")
ROW_IN_SHARED_TOO = COPIED_FIRST.replace("row[j] = x[at + j]", "row[at + j] = x[at + j]")
CHUNK_A_THREAD = (
    SOFTMAX_HEAD
    + r"""
  size_t at = (size_t)blockIdx.x * n_columns;
  int each = (n_columns + THREADS - 1) / THREADS, first = thread * each, last = min(first + each, n_columns);
  float top = -INFINITY, sum = 0.0f;
  for (int j = first; j < last; ++j) top = fmaxf(top, row[j] = x[at + j]);
  top = block_max(top);
  if (top == -INFINITY) top = 0.0f;
  for (int j = first; j < last; ++j) sum += row[j] = expf(row[j] - top);
  sum = block_sum(sum);
  for (int j = first; j < last; ++j) y[at + j] = sum == 0.0f ? 0.0f : row[j] / sum;
}
"""
)
THREAD_ZERO_ALONE = COPIED_FIRST.replace(
    "for (int j = thread; j < n_columns; j += THREADS) row", "for (int j = 0; j < n_columns && !thread; ++j) row"
)
ONE_ROW_FOR_ALL = COPIED_FIRST.replace("(size_t)blockIdx.x * n_columns", "0")
FROM_MINUS_1E30 = COPIED_FIRST.replace("top = -INFINITY, sum", "top = -1e30f, sum")
NEVER_COPIED = COPIED_FIRST.replace("row[j] = x[at + j];", "y[at + j] = x[at + j];")

THREAD_ZERO_WRITES = COPIED_FIRST.replace("float top", "__syncthreads();\n  float top").replace(
    "for (int j = thread; j < n_columns; j += THREADS) y", "for (int j = 0; j < n_columns && !thread; ++j) y"
)
ELEVEN_THREADS = COPIED_FIRST.replace(
    "for (int j = thread; j < n_columns; j += THREADS) row",
    "for (int j = thread; j < n_columns && thread < 11; j += 11) row",
)
FIRST_ROUND_DECIDES = COPIED_FIRST.replace(
    "for (int j = first; j < last; ++j) top = fmaxf(top, row[j]);",
    "if (thread < n_columns) top = row[thread];",
)

# --- 4H -------------------------------------------------------------------------------------------------------------

MATMUL_HEAD = r"""
#define TILE 16
__global__ void matmul_tiled(const float* a, const float* b, float* c, int m, int n, int k) {
  __shared__ float a_tile[TILE][TILE], b_tile[TILE][TILE];
  int x = threadIdx.x, y = threadIdx.y;
"""
BY_ROUNDS = (
    MATMUL_HEAD
    + r"""
  int i = blockIdx.y * TILE + y, j = blockIdx.x * TILE + x, rounds = (k + TILE - 1) / TILE;
  float sum = 0.0f;
  for (int round = 0; round < rounds; ++round) {
    int at_a = round * TILE + x, at_b = round * TILE + y;
    float from_a = 0.0f, from_b = 0.0f;
    if (i < m && at_a < k) from_a = a[i * k + at_a];
    if (at_b < k && j < n) from_b = b[at_b * n + j];
    __syncthreads();
    a_tile[y][x] = from_a, b_tile[y][x] = from_b;
    __syncthreads();
    for (int t = 0; t < TILE; ++t) sum += a_tile[y][t] * b_tile[t][x];
  }
  if (i < m && j < n) c[i * n + j] = sum;
}
"""
)
A_TURNED = BY_ROUNDS.replace("a_tile[y][x] = from_a", "a_tile[x][y] = from_a").replace("a_tile[y][t]", "a_tile[t][y]")
NO_FIRST_BARRIER = BY_ROUNDS.replace("    __syncthreads();\n    for", "    for")
NO_SECOND_BARRIER = BY_ROUNDS.replace("    __syncthreads();\n    a_tile", "    a_tile")
NO_GUARD_OF_LOADS = BY_ROUNDS.replace("if (i < m && at_a < k) ", "").replace("if (at_b < k && j < n) ", "")
NO_GUARD_OF_K = BY_ROUNDS.replace("i < m && at_a < k", "i < m").replace("at_b < k && j < n", "j < n")
NO_GUARD_OF_THE_WRITE = BY_ROUNDS.replace("if (i < m && j < n) c", "c")
WIDTHS_MIXED_UP = BY_ROUNDS.replace("b[at_b * n + j]", "b[at_b * k + j]")
NEXT_ROW_READ = BY_ROUNDS.replace("i < m && at_a < k", "i * k + at_a < m * k")
TAIL_FORGOTTEN = BY_ROUNDS.replace("(k + TILE - 1) / TILE", "k / TILE")
OUTSIDE_RETURNS = BY_ROUNDS.replace("  float sum", "  if (i >= m || j >= n) return;\n  float sum")
STARTED_AGAIN = BY_ROUNDS.replace("    float from_a", "    sum = 0.0f;\n    float from_a")
INDICES_MIXED_UP = BY_ROUNDS.replace("a_tile[y][t] * b_tile[t][x]", "a_tile[t][x] * b_tile[y][t]")
BLOCKS_MIXED_UP = BY_ROUNDS.replace("blockIdx.y * TILE + y", "blockIdx.x * TILE + y").replace(
    "blockIdx.x * TILE + x", "blockIdx.y * TILE + x"
)
BY_COLUMNS = BY_ROUNDS.replace("x = threadIdx.x, y = threadIdx.y", "x = threadIdx.y, y = threadIdx.x")
WITHOUT_TILES = (
    MATMUL_HEAD
    + r"""
  int i = blockIdx.y * TILE + y, j = blockIdx.x * TILE + x;
  float sum = 0.0f;
  for (int t = 0; t < k && i < m && j < n; ++t) sum += a[i * k + t] * b[t * n + j];
  if (i < m && j < n) c[i * n + j] = sum;
}
"""
)
ADDED_UP_IN_C = (
    BY_ROUNDS.replace("  float sum = 0.0f;\n", "  if (i < m && j < n) c[i * n + j] = 0.0f;\n")
    .replace(
        "    for (int t = 0; t < TILE; ++t) sum", "    for (int t = 0; t < TILE && i < m && j < n; ++t) c[i * n + j]"
    )
    .replace("  if (i < m && j < n) c[i * n + j] = sum;\n", "")
)
THREAD_ZERO_LOADS = (
    MATMUL_HEAD
    + r"""
  int top = blockIdx.y * TILE, left = blockIdx.x * TILE;
  float sum = 0.0f;
  for (int first = 0; first < k; first += TILE) {
    if (x == 0 && y == 0)
      for (int r = 0; r < TILE; ++r)
        for (int t = 0; t < TILE; ++t) {
          a_tile[r][t] = top + r < m && first + t < k ? a[(top + r) * k + first + t] : 0.0f;
          b_tile[r][t] = first + r < k && left + t < n ? b[(first + r) * n + left + t] : 0.0f;
        }
    __syncthreads();
    for (int t = 0; t < TILE; ++t) sum += a_tile[y][t] * b_tile[t][x];
    __syncthreads();
  }
  if (top + y < m && left + x < n) c[(top + y) * n + left + x] = sum;
}
"""
)
ONE_WARP_LOADS = THREAD_ZERO_LOADS.replace("if (x == 0 && y == 0)", "if (y < 2)").replace(
    "for (int r = 0; r < TILE; ++r)\n        for (int t = 0; t < TILE; ++t) {",
    "for (int r = y; r < TILE; r += 2)\n        for (int t = x; t < TILE; t += TILE) {",
)

RIGHT = {"4G": [IN_REGISTERS, COPIED_FIRST], "4H": [BY_ROUNDS, A_TURNED]}
WRONG = {
    "4G": [
        (RESULT_UNUSED, "Use what block_max and block_sum return"),
        (ONE_COLUMN_A_THREAD, "Let j go on in steps of 256"),
        (TOO_FEW_REGISTERS, "an array of shape (2, 12000)"),
        (NOT_SHIFTED, "let the search for it start at -INFINITY"),
        (FROM_ZERO, "let the search for it start at -INFINITY"),
        (FROM_MINUS_1E30, "let the search for it start at -INFINITY"),
        (ONE_ROW_FOR_ALL, "add blockIdx.x * n_columns to both"),
        (NO_EMPTY_ROWS, "replace a maximum of -INFINITY by 0"),
        (ZERO_BY_ZERO, "a sum of 0 by 1"),
        (COPY_NOT_AWAITED, "has to wait for it"),
        (IDLE_THREADS_RETURN, "wait for the whole block"),
        (ROW_IN_SHARED_TOO, "Its columns, in row[] too, are 0 to"),
        (NEVER_COPIED, "is read before x[j] was copied into it"),
        (CHUNK_A_THREAD, "Thread t reads columns t, t + 256"),
        (THREAD_ZERO_ALONE, "one request of a warp brings 32 numbers"),
        (THREAD_ZERO_WRITES, "2 threads write to y, where 512 could"),
        (ELEVEN_THREADS, "22 threads load from x, where 512 could"),
        (FIRST_ROUND_DECIDES, "let the search for it start at -INFINITY"),
        (READ_TWICE, "read x[j] in the first loop only"),
        (THREE_READS, "Thread t reads columns t, t + 256"),
        (WRITTEN_TWICE, "bytes were written, where 12,012 would do"),
    ],
    "4H": [
        (NO_FIRST_BARRIER, "Two barriers in each round"),
        (NO_SECOND_BARRIER, "Two barriers in each round"),
        (NO_GUARD_OF_LOADS, "Compare with m, n and k"),
        (NO_GUARD_OF_K, "Compare with m, n and k"),
        (NO_GUARD_OF_THE_WRITE, "Compare with m, n and k"),
        (WIDTHS_MIXED_UP, "A row of A is k numbers long"),
        (TAIL_FORGOTTEN, "The last round may be a part of a tile"),
        (OUTSIDE_RETURNS, "no return, no barrier in an if"),
        (STARTED_AGAIN, "the sum is not started again"),
        (INDICES_MIXED_UP, "Thread (x, y) adds up a_tile[y][t] * b_tile[t][x]"),
        (BLOCKS_MIXED_UP, "row blockIdx.y * TILE, column blockIdx.x * TILE"),
        (BY_COLUMNS, "In a row of A the column is first + threadIdx.x"),
        (NEXT_ROW_READ, "compare first + x with k"),
        (WITHOUT_TILES, "In the sums read a_tile and b_tile"),
        (ADDED_UP_IN_C, "write c once, after the loop"),
        (ONE_WARP_LOADS, "128 threads load from global memory, where 1,024 could"),
        (THREAD_ZERO_LOADS, "Each thread loads one number of each tile"),
    ],
}
