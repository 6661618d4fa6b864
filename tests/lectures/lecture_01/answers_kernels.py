"""Answers to exercise 1G of lecture 01, in CUDA: right ones and wrong ones, as in answers.py."""

from tests.lectures.collect import collect

RIGHT, WRONG, right, wrong = collect()

SOFTMAX_HEAD = r"""
__device__ float warp_max(float x) {
  for (int o = 16; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, o));
  return x;
}
__device__ float warp_sum(float x) {
  for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffff, x, o);
  return x;
}
__global__ void softmax_rows(const float* s, float* p, int n_keys) {
  int lane = threadIdx.x;
  s += blockIdx.x * n_keys;
  p += blockIdx.x * n_keys;
"""
ONLINE = (
    SOFTMAX_HEAD
    + r"""
  float maximum = -INFINITY, total = 0.0f;
  for (int j = lane; j < n_keys; j += 32) {
    float higher = fmaxf(maximum, s[j]);
    total = total * expf(maximum - higher) + expf(s[j] - higher);
    maximum = higher;
  }
  float top = warp_max(maximum);
  total = warp_sum(maximum == -INFINITY ? 0.0f : total * expf(maximum - top));
  for (int j = lane; j < n_keys; j += 32) p[j] = expf(s[j] - top) / total;
}
"""
)
ONE_KEY_A_LANE = (
    SOFTMAX_HEAD
    + r"""
  float x = lane < n_keys ? s[lane] : -INFINITY;
  float power = expf(x - warp_max(x)), total = warp_sum(power);
  if (lane < n_keys) p[lane] = power / total;
}
"""
)
NOT_SHIFTED = (
    SOFTMAX_HEAD
    + r"""
  float total = 0.0f;
  for (int j = lane; j < n_keys; j += 32) total += expf(s[j]);
  total = warp_sum(total);
  for (int j = lane; j < n_keys; j += 32) p[j] = expf(s[j]) / total;
}
"""
)
NO_GUARD = (
    SOFTMAX_HEAD
    + r"""
  float x = s[lane];
  float power = expf(x - warp_max(x)), total = warp_sum(power);
  p[lane] = power / total;
}
"""
)
CHUNK_A_LANE = (
    SOFTMAX_HEAD
    + r"""
  int each = (n_keys + 31) / 32, first = lane * each, last = min(first + each, n_keys);
  float maximum = -INFINITY, total = 0.0f;
  for (int j = first; j < last; ++j) maximum = fmaxf(maximum, s[j]);
  maximum = warp_max(maximum);
  for (int j = first; j < last; ++j) total += expf(s[j] - maximum);
  total = warp_sum(total);
  for (int j = first; j < last; ++j) p[j] = expf(s[j] - maximum) / total;
}
"""
)
ALL_BY_EACH_LANE = (
    SOFTMAX_HEAD
    + r"""
  float maximum = -INFINITY, total = 0.0f;
  for (int j = 0; j < n_keys; ++j) maximum = fmaxf(maximum, s[j]);
  for (int j = 0; j < n_keys; ++j) total += expf(s[j] - maximum);
  for (int j = lane; j < n_keys; j += 32) p[j] = expf(s[j] - maximum) / total;
}
"""
)
LANE_ZERO_ALONE = (
    SOFTMAX_HEAD
    + r"""
  float maximum = -INFINITY, total = 0.0f;
  if (lane == 0) {
    for (int j = 0; j < n_keys; ++j) maximum = fmaxf(maximum, s[j]);
    for (int j = 0; j < n_keys; ++j) total += expf(s[j] - maximum);
    for (int j = 0; j < n_keys; ++j) p[j] = expf(s[j] - maximum) / total;
  }
}
"""
)
NEVER_ENDS = SOFTMAX_HEAD + "  for (int j = lane; j < n_keys; j += 0) p[j] = s[j];\n}"
FROM_ZERO = ONLINE.replace("maximum = -INFINITY, total", "maximum = 0.0f, total")
RESULT_UNUSED = ONLINE.replace("float top = warp_max(maximum);", "float top = maximum; warp_max(maximum);")
IDLE_LANES_RETURN = ONLINE.replace("  float maximum", "  if (lane >= n_keys) return;\n  float maximum", 1)
IN_THE_LOOP = (
    SOFTMAX_HEAD
    + r"""
  for (int j = lane; j < n_keys; j += 32) {
    float power = expf(s[j] - warp_max(s[j]));
    p[j] = power / warp_sum(power);
  }
}
"""
)
ROW_IS_THE_THREAD = ONLINE.replace("blockIdx.x * n_keys", "(blockIdx.x * 32 + lane) * n_keys")

LANE_ZERO_WRITES = ONLINE.replace(
    "for (int j = lane; j < n_keys; j += 32) p[j]", "for (int j = 0; j < n_keys && lane == 0; ++j) p[j]"
)
FIRST_ROUND_DECIDES = (
    SOFTMAX_HEAD
    + r"""
  float top = warp_max(lane < n_keys ? s[lane] : -INFINITY), total = 0.0f;
  for (int j = lane; j < n_keys; j += 32) total += expf(s[j] - top);
  total = warp_sum(total);
  for (int j = lane; j < n_keys; j += 32) p[j] = expf(s[j] - top) / total;
}
"""
)

RIGHT["1G"] = [ONLINE]
WRONG["1G"] = [
    (ONE_KEY_A_LANE, "Let j go on in steps of 32"),
    (NOT_SHIFTED, "let the search for it start at -INFINITY"),
    (FROM_ZERO, "let the search for it start at -INFINITY"),
    (RESULT_UNUSED, "where do the results of warp_max and warp_sum go?"),
    (IDLE_LANES_RETURN, "lanes without a column have to take part"),
    (IN_THE_LOOP, "lanes without a column have to take part"),
    (ROW_IS_THE_THREAD, "the row is blockIdx.x."),
    (NO_GUARD, "Its columns are 0 to n_keys - 1."),
    (CHUNK_A_LANE, "Lane l reads columns"),
    (LANE_ZERO_ALONE, "Every lane reads and writes its own columns"),
    (LANE_ZERO_WRITES, "Every lane reads and writes its own columns"),
    (FIRST_ROUND_DECIDES, "let the search for it start at -INFINITY"),
    (NEVER_ENDS, "TIME LIMIT"),
    (ALL_BY_EACH_LANE, "bytes were read, for"),
    (SOFTMAX_HEAD + "  p[lane] = s[lane]\n}", "expected ';'"),
]
