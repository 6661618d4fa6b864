"""Answers to the CUDA exercises of lecture 03: right ones, unlike the lecture's, and wrong ones.

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

FLOAT4 = r"""
__device__ float2 turn(long long position, double frequency);
__device__ void rotate(float& a, float& b, float2 t);
__global__ void rope_float4(float* x, const long long* positions, const double* frequencies,
                            int n_heads, int seq, int d) {
  int thread = blockIdx.x * blockDim.x + threadIdx.x, token = thread / (d / 8), i = thread % (d / 8);
  if (token < seq) {
    long long p = positions[token];
    float2 t0 = turn(p, frequencies[4 * i]), t1 = turn(p, frequencies[4 * i + 1]);
    float2 t2 = turn(p, frequencies[4 * i + 2]), t3 = turn(p, frequencies[4 * i + 3]);
    for (int h = 0; h < n_heads; ++h) {
      float4* row = reinterpret_cast<float4*>(x) + (h * seq + token) * (d / 4);
      float4 a = row[i], b = row[i + d / 8];
      rotate(a.x, b.x, t0);
      rotate(a.y, b.y, t1);
      rotate(a.z, b.z, t2);
      rotate(a.w, b.w, t3);
      row[i] = a;
      row[i + d / 8] = b;
    }
  }
}
"""
ANGLES = FLOAT4[FLOAT4.index("    float2 t0") : FLOAT4.index("    for (int h")]
LOOP = "    for (int h = 0; h < n_heads; ++h) {\n"
PAIRED_INSIDE = (
    FLOAT4.replace("(a.x, b.x, t0)", "(a.x, a.y, t0)")
    .replace("(a.y, b.y, t1)", "(a.z, a.w, t1)")
    .replace("(a.z, b.z, t2)", "(b.x, b.y, t2)")
    .replace("(a.w, b.w, t3)", "(b.z, b.w, t3)")
)
ONE_ANGLE_FOR_ALL = FLOAT4.replace("b.y, t1", "b.y, t0").replace("b.z, t2", "b.z, t0").replace("b.w, t3", "b.w, t0")
FIRST_HEAD_ONLY = FLOAT4.replace("h < n_heads", "h < 1")
TOKENS_BY_HEADS = FLOAT4.replace("(h * seq + token) * (d / 4)", "(token * n_heads + h) * (d / 4)")
FLOAT4_FROM_ZERO = FLOAT4.replace("positions[token]", "token")
FLOAT4_NO_GUARD = FLOAT4.replace("if (token < seq)", "")
MISALIGNED = FLOAT4.replace(
    "float4* row = reinterpret_cast<float4*>(x) + (h * seq + token) * (d / 4);",
    "float4* row = reinterpret_cast<float4*>(x + (h * seq + token) * d + i);",
)
ONE_FLOAT_AT_A_TIME = FLOAT4.replace(
    FLOAT4[FLOAT4.index("      float4* row") : FLOAT4.index("    }\n  }")],
    """
      float* row = x + (h * seq + token) * d;
      float2 t[4] = {t0, t1, t2, t3};
      for (int w = 0; w < 4; ++w) {
        float a = row[4 * i + w], b = row[4 * i + w + d / 2];
        rotate(a, b, t[w]);
        row[4 * i + w] = a;
        row[4 * i + w + d / 2] = b;
      }
""",
)
ANGLES_IN_THE_LOOP = FLOAT4.replace(ANGLES, "").replace(LOOP, LOOP + ANGLES)
GROUPS_BY_COLUMN = FLOAT4.replace(
    "token = thread / (d / 8), i = thread % (d / 8)", "token = thread % seq, i = thread / seq"
).replace("if (token < seq)", "if (i < d / 8)")
FLOAT4_READ_AGAIN = FLOAT4.replace(
    "b = row[i + d / 8];", "b = row[i + d / 8];\n      a.y = *(volatile float*)&row[i].y;"
)

FLOAT4_ONE_WARP_FOR_ALL = FLOAT4.replace(
    "  int thread", "  if (blockIdx.x || threadIdx.x >= 32) return;\n  int thread"
).replace("if (token < seq) {", "for (; token < seq; thread += 32, token = thread / (d / 8), i = thread % (d / 8)) {")

RIGHT = {"3.7": [PAIRS, PAIRS_BY_POINTER, OWN_SINE], "3.8": [FLOAT4]}
WRONG = {
    "3.7": [
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
    "3.8": [
        (PAIRED_INSIDE, "b is vector i + d / 8"),
        (ONE_ANGLE_FOR_ALL, "b is vector i + d / 8"),
        (FIRST_HEAD_ONLY, "only the address of the row changes"),
        (TOKENS_BY_HEADS, "only the address of the row changes"),
        (FLOAT4_FROM_ZERO, "The angle takes positions[token]"),
        (FLOAT4_NO_GUARD, "threads to spare"),
        (MISALIGNED, "make row a float4* first"),
        (ONE_FLOAT_AT_A_TIME, "Load float4 a = row[i]"),
        (FLOAT4_READ_AGAIN, "bytes of x were"),
        (ANGLES_IN_THE_LOOP, "bytes of frequencies were read"),
        (FLOAT4_ONE_WARP_FOR_ALL, "32 threads load from x, where 128 could"),
        (GROUPS_BY_COLUMN, "Number the groups token after token."),
    ],
}
