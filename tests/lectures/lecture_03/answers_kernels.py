"""Answers to the CUDA exercise of lecture 03: right ones, unlike the lecture's, and wrong ones.

WRONG pairs each wrong answer with words that the report must contain.
"""

PAIRS = r"""
__device__ float2 turn(long long position, double frequency);
__global__ void rope_pairs(float* x, const long long* positions, const double* frequencies,
                           int n_rows, int seq, int d) {
  int half = d / 2, pair = blockIdx.x * blockDim.x + threadIdx.x;
  int row = pair / half, i = pair - row * half;
  if (pair < n_rows * half) {
    float2 cs = turn(positions[row % seq], frequencies[i]);
    float* at = x + row * d;
    float a = at[i];
    float b = at[i + half];
    at[i + half] = b * cs.x + a * cs.y;
    at[i] = a * cs.x - b * cs.y;
  }
}
"""
BODY = PAIRS[PAIRS.index("    float a = at[i];") : PAIRS.index("  }\n}")]
INTERLEAVED = PAIRS.replace("at[i + half]", "at[2 * i + 1]").replace("at[i]", "at[2 * i]")
OVERWRITTEN = PAIRS.replace(
    BODY,
    """
    at[i] = at[i] * cs.x - at[i + half] * cs.y;
    at[i + half] = at[i] * cs.y + at[i + half] * cs.x;
""",
)
OTHER_WAY_ROUND = PAIRS.replace("at[i] = a * cs.x - b", "at[i] = a * cs.x + b").replace("b * cs.x + a", "b * cs.x - a")
DISTANCE_AND_POSITION = PAIRS.replace("float2 cs", "long long p = positions[row % seq];\n    float2 cs").replace(
    "turn(positions[row % seq],", "turn((p - 1) * p,"
)
AXIS_OF_HEADS = PAIRS.replace("positions[row % seq]", "positions[row / seq]")
TOKEN_IS_THE_ROW = PAIRS.replace("positions[row % seq]", "row")
FROM_ZERO = PAIRS.replace("positions[row % seq]", "row % seq")
ANGLE_IN_SINGLE = PAIRS.replace(
    "turn(positions[row % seq], frequencies[i])",
    "make_float2(cosf((float)p * (float)frequencies[i]), sinf((float)p * (float)frequencies[i]))",
).replace("float2 cs", "long long p = positions[row % seq];\n    float2 cs")
NO_GUARD = PAIRS.replace("if (pair < n_rows * half)", "")
FIRST_BLOCK_ONLY = PAIRS.replace("blockIdx.x * blockDim.x + threadIdx.x", "threadIdx.x")
# volatile, or a compiler may see that one read is enough
READ_AGAIN = PAIRS.replace("float* at", "volatile float* at").replace(
    BODY,
    """
    float a = at[i];
    at[i] = a * cs.x - at[i + half] * cs.y;
    at[i + half] = at[i + half] * cs.x + a * cs.y;
""",
)
ONE_ELEMENT_A_THREAD = (
    PAIRS.replace("int half = d / 2, pair", "int half = d, pair")
    .replace(
        BODY,
        """
    cs = turn(positions[row % seq], frequencies[i % (d / 2)]);
    if (i < d / 2) at[i] = at[i] * cs.x - at[i + d / 2] * cs.y;
    else at[i] = at[i - d / 2] * cs.y + at[i] * cs.x;
""",
    )
    .replace("frequencies[i]);", "frequencies[0]);")
)
COLUMN_AFTER_COLUMN = PAIRS.replace(
    "int row = pair / half, i = pair - row * half", "int i = pair / n_rows, row = pair % n_rows"
)
ONE_WARP_FOR_ALL = PAIRS.replace("int half", "if (blockIdx.x || threadIdx.x >= 32) return;\n  int half").replace(
    "if (pair < n_rows * half) {",
    "for (; pair < n_rows * half; pair += 32) {\n    row = pair / half, i = pair - row * half;",
)
ONE_THREAD_A_ROW = PAIRS.replace("if (pair < n_rows * half) {", "if (i == 0 && row < n_rows) for (; i < half; ++i) {")
OWN_SINE = PAIRS.replace(
    "float2 cs = turn(positions[row % seq], frequencies[i]);",
    "double angle = positions[row % seq] * frequencies[i];\n    float2 cs = make_float2((float)cos(angle), (float)sin(angle));",
)
PAIRS_BY_POINTER = r"""
__device__ float2 turn(long long position, double frequency);
__global__ void rope_pairs(float* x, const long long* positions, const double* frequencies,
                           int n_rows, int seq, int d) {
  for (int pair = blockIdx.x * blockDim.x + threadIdx.x; pair < n_rows * d / 2; pair += gridDim.x * blockDim.x) {
    int row = 2 * pair / d;
    float* first = x + pair + row * (d / 2);
    float2 z = make_float2(first[0], first[d / 2]), t = turn(positions[row % seq], frequencies[pair % (d / 2)]);
    first[0] = z.x * t.x - z.y * t.y;
    first[d / 2] = z.x * t.y + z.y * t.x;
  }
}
"""

RIGHT = {"3G": [PAIRS, PAIRS_BY_POINTER, OWN_SINE]}
WRONG = {
    "3G": [
        (INTERLEAVED, "The pair is columns i and i + d/2"),
        (OVERWRITTEN, "first = a cos - b sin"),
        (OTHER_WAY_ROUND, "first = a cos - b sin"),
        (DISTANCE_AND_POSITION, "first = a cos - b sin"),
        (AXIS_OF_HEADS, "The angle is that of token row % seq."),
        (TOKEN_IS_THE_ROW, "The token of a row is row % seq."),
        (FROM_ZERO, "The angle takes positions[token]"),
        (ANGLE_IN_SINGLE, "forms the angle in double"),
        (NO_GUARD, "threads to spare"),
        (FIRST_BLOCK_ONLY, "counts over all blocks"),
        (READ_AGAIN, "bytes of x were read, and x has"),
        (ONE_ELEMENT_A_THREAD, "each pair has one thread"),
        (COLUMN_AFTER_COLUMN, "Number the pairs row after row."),
        (ONE_THREAD_A_ROW, "no loop over pairs"),
        (ONE_WARP_FOR_ALL, "32 threads load from x, where 512 could"),
    ],
}
