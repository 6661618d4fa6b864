"""Correct kernels of every kind the runner supports, for its tests and its benchmark. All take ragged sizes."""

MATMUL = r"""
#define T 16
__global__ void matmul(const float* a, const float* b, float* c, int rows, int inner, int columns) {
  __shared__ float tile_a[T][T], tile_b[T][T];
  int tx = threadIdx.x, ty = threadIdx.y;
  int row = blockIdx.y * T + ty, column = blockIdx.x * T + tx;
  float sum = 0.f;
  for (int k0 = 0; k0 < inner; k0 += T) {
    tile_a[ty][tx] = row < rows && k0 + tx < inner ? a[row * inner + k0 + tx] : 0.f;
    tile_b[ty][tx] = k0 + ty < inner && column < columns ? b[(k0 + ty) * columns + column] : 0.f;
    __syncthreads();
    #pragma unroll
    for (int k = 0; k < T; ++k) sum += tile_a[ty][k] * tile_b[k][tx];
    __syncthreads();
  }
  if (row < rows && column < columns) c[row * columns + column] = sum;
}
"""

# One block: 64 queries of one head; 128 threads, two for each query.
FLASH = r"""
template <int D>
__global__ void __launch_bounds__(128) flash(const float* __restrict__ q, const float* __restrict__ k,
                                             const float* __restrict__ v, float* __restrict__ out, int n, float scale) {
  constexpr int ROWS = 64, KEYS = 64, HALF = D / 2;
  extern __shared__ float memory[];
  float* tile_q = memory;                          // [ROWS][D + 1]
  float* tile_k = tile_q + ROWS * (D + 1);         // [KEYS][D + 1]
  float* tile_v = tile_k + KEYS * (D + 1);         // [KEYS][D]
  float* tile_p = tile_v + KEYS * D;               // [ROWS][KEYS + 1]
  int thread = threadIdx.x, row = thread / 2, side = thread % 2, row0 = blockIdx.x * ROWS;
  size_t head = (size_t)blockIdx.y * n * D;
  for (int i = thread; i < ROWS * D; i += blockDim.x)
    tile_q[i / D * (D + 1) + i % D] = row0 + i / D < n ? q[head + (size_t)row0 * D + i] * scale : 0.f;
  float maximum = -INFINITY, total = 0.f, sum[HALF];
  for (int j = 0; j < HALF; ++j) sum[j] = 0.f;
  for (int key0 = 0; key0 < n; key0 += KEYS) {
    __syncthreads();
    for (int i = thread; i < KEYS * D; i += blockDim.x) {
      bool inside = key0 + i / D < n;
      tile_k[i / D * (D + 1) + i % D] = inside ? k[head + (size_t)key0 * D + i] : 0.f;
      tile_v[i] = inside ? v[head + (size_t)key0 * D + i] : 0.f;
    }
    __syncthreads();
    float new_maximum = maximum;
    for (int c = side; c < KEYS; c += 2) {
      float s = 0.f;
      for (int d = 0; d < D; ++d) s += tile_q[row * (D + 1) + d] * tile_k[c * (D + 1) + d];
      if (key0 + c >= n) s = -INFINITY;
      tile_p[row * (KEYS + 1) + c] = s;
      new_maximum = fmaxf(new_maximum, s);
    }
    new_maximum = fmaxf(new_maximum, __shfl_xor_sync(0xffffffff, new_maximum, 1));
    float rescale = __expf(maximum - new_maximum), tile_total = 0.f;
    for (int c = side; c < KEYS; c += 2) {
      float p = __expf(tile_p[row * (KEYS + 1) + c] - new_maximum);
      tile_p[row * (KEYS + 1) + c] = p;
      tile_total += p;
    }
    tile_total += __shfl_xor_sync(0xffffffff, tile_total, 1);
    total = total * rescale + tile_total;
    maximum = new_maximum;
    __syncwarp();
    for (int j = 0; j < HALF; ++j) sum[j] *= rescale;
    for (int c = 0; c < KEYS; ++c) {
      float p = tile_p[row * (KEYS + 1) + c];
      for (int j = 0; j < HALF; ++j) sum[j] += p * tile_v[c * D + side * HALF + j];
    }
  }
  if (row0 + row < n)
    for (int j = 0; j < HALF; ++j) out[head + (size_t)(row0 + row) * D + side * HALF + j] = sum[j] / total;
}
"""


def flash_shared_bytes(d):
    """Dynamic shared memory of FLASH for heads of size d."""
    return 4 * (64 * (d + 1) * 2 + 64 * d + 64 * 65)


NAIVE = r"""
__global__ void scores(const float* q, const float* k, float* s, int n, int d, float scale) {
  int j = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y * blockDim.y + threadIdx.y, head = blockIdx.z;
  if (i >= n || j >= n) return;
  float sum = 0.f;
  for (int t = 0; t < d; ++t) sum += q[((size_t)head * n + i) * d + t] * k[((size_t)head * n + j) * d + t];
  s[((size_t)head * n + i) * n + j] = sum * scale;
}

__global__ void softmax(const float* s, float* p, int n) {
  __shared__ float partial[32];
  int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, n_warps = blockDim.x / 32;
  size_t row = (size_t)blockIdx.x * n;
  float maximum = -INFINITY;
  for (int j = thread; j < n; j += blockDim.x) maximum = fmaxf(maximum, s[row + j]);
  for (int o = 16; o; o /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffff, maximum, o));
  if (lane == 0) partial[warp] = maximum;
  __syncthreads();
  for (int w = 0; w < n_warps; ++w) maximum = fmaxf(maximum, partial[w]);
  __syncthreads();
  float total = 0.f;
  for (int j = thread; j < n; j += blockDim.x) total += __expf(s[row + j] - maximum);
  for (int o = 16; o; o /= 2) total += __shfl_xor_sync(0xffffffff, total, o);
  if (lane == 0) partial[warp] = total;
  __syncthreads();
  total = 0.f;
  for (int w = 0; w < n_warps; ++w) total += partial[w];
  for (int j = thread; j < n; j += blockDim.x) p[row + j] = __expf(s[row + j] - maximum) / total;
}

__global__ void weighted_sum(const float* p, const float* v, float* out, int n, int d) {
  int c = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y * blockDim.y + threadIdx.y, head = blockIdx.z;
  if (i >= n || c >= d) return;
  float sum = 0.f;
  for (int j = 0; j < n; ++j) sum += p[((size_t)head * n + i) * n + j] * v[((size_t)head * n + j) * d + c];
  out[((size_t)head * n + i) * d + c] = sum;
}
"""

# PAD = 0 has bank conflicts, PAD = 1 has none.
TRANSPOSE = r"""
template <int PAD>
__global__ void transpose(const float* x, float* y, int rows, int columns) {
  __shared__ float tile[32][32 + PAD];
  int column = blockIdx.x * 32 + threadIdx.x, row = blockIdx.y * 32 + threadIdx.y;
  if (row < rows && column < columns) tile[threadIdx.y][threadIdx.x] = x[row * columns + column];
  __syncthreads();
  column = blockIdx.y * 32 + threadIdx.x;
  row = blockIdx.x * 32 + threadIdx.y;
  if (row < columns && column < rows) y[row * rows + column] = tile[threadIdx.x][threadIdx.y];
}
"""

BLOCK_SUM = r"""
__inline__ __device__ float warp_sum(float x) {
  for (int o = 16; o; o /= 2) x += __shfl_down_sync(0xffffffff, x, o);
  return x;
}

__global__ void block_sum(const float* x, float* total, int n) {
  __shared__ float partial[32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = 0.f;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  sum = warp_sum(sum);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = warp_sum(lane < blockDim.x / 32 ? partial[lane] : 0.f);
    if (lane == 0) atomicAdd(total, sum);
  }
}
"""

HISTOGRAM = r"""
__global__ void histogram(const int* x, int* counts, int n, int bins) {
  extern __shared__ int local[];
  for (int b = threadIdx.x; b < bins; b += blockDim.x) local[b] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&local[x[i]], 1);
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += blockDim.x) atomicAdd(&counts[b], local[b]);
}
"""

# Sums tiles of 128 floats, the next tile copied while the present one is summed.
DOUBLE_BUFFER = r"""
#include <cuda_pipeline_primitives.h>
__global__ void tile_sums(const float* x, float* sums, int tiles) {
  __shared__ __align__(16) float buffer[2][128];
  int thread = threadIdx.x;
  if (thread < 32) __pipeline_memcpy_async(&buffer[0][4 * thread], &x[4 * thread], 16);
  __pipeline_commit();
  for (int t = 0; t < tiles; ++t) {
    if (t + 1 < tiles && thread < 32)
      __pipeline_memcpy_async(&buffer[(t + 1) % 2][4 * thread], &x[(t + 1) * 128 + 4 * thread], 16);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    float value = buffer[t % 2][thread] + buffer[t % 2][127 - thread];
    for (int o = 16; o; o /= 2) value += __shfl_xor_sync(0xffffffff, value, o);
    if (thread % 32 == 0) sums[t * 4 + thread / 32] = value;
    __syncthreads();
  }
}
"""

# Half or bfloat16 in, float out; one warp for each tile of 16 x 16. Sizes are multiples of 16.
WMMA = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
using namespace nvcuda;
template <class Number>
__global__ void wmma_matmul(const Number* a, const Number* b, float* c, int inner, int columns) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, Number, wmma::row_major> tile_a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, Number, wmma::row_major> tile_b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> tile_c;
  wmma::fill_fragment(tile_c, 0.f);
  int row = blockIdx.y * 16, column = blockIdx.x * 16;
  for (int k = 0; k < inner; k += 16) {
    wmma::load_matrix_sync(tile_a, a + row * inner + k, inner);
    wmma::load_matrix_sync(tile_b, b + k * columns + column, columns);
    wmma::mma_sync(tile_c, tile_a, tile_b, tile_c);
  }
  wmma::store_matrix_sync(c + row * columns + column, tile_c, columns, wmma::mem_row_major);
}
"""
