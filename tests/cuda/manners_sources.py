"""The sources of manners.py: constructs that much-read public kernels use, written for these tests."""

BLOCK_REDUCE = r"""
#include <cuda_runtime.h>
#include <stdio.h>
#define WARP_SIZE 32
#define CEIL_DIV(a, b) (((a) + (b) - 1) / (b))
template <typename T> struct MaxOp { __device__ __forceinline__ T operator()(const T& a, const T& b) const { return max(a, b); } };
template <typename T> struct SumOp { __device__ __forceinline__ T operator()(const T& a, const T& b) const { return a + b; } };
template <template <typename> class Op, typename T, int WIDTH = WARP_SIZE>
__inline__ __device__ T warpAllReduce(T val) {
  for (int mask = WIDTH / 2; mask > 0; mask /= 2) val = Op<T>()(val, __shfl_xor_sync(0xffffffff, val, mask));
  return val;
}
template <template <typename> class Op, typename T> __inline__ __device__ T blockAllReduce(T val, T start) {
  static __shared__ T shared[32];
  const int lane = threadIdx.x % WARP_SIZE, wid = threadIdx.x / WARP_SIZE;
  val = warpAllReduce<Op, T>(val);
  if (lane == 0) shared[wid] = val;
  __syncthreads();
  val = lane < CEIL_DIV(blockDim.x, WARP_SIZE) ? shared[lane] : start;
  val = warpAllReduce<Op, T>(val);
  __syncthreads();
  return val;
}
__global__ void softmax_forward_kernel(float* __restrict__ out, const float* __restrict__ inp, int N, int C) {
  const uint row = blockIdx.x;
  const float* x = inp + (size_t)row * C;
  float m = -INFINITY, s = 0.f;
  for (int i = threadIdx.x; i < C; i += blockDim.x) m = fmaxf(m, __ldcs(&x[i]));
  m = blockAllReduce<MaxOp, float>(m, -INFINITY);
  for (int i = threadIdx.x; i < C; i += blockDim.x) s += expf(x[i] - m);
  s = blockAllReduce<SumOp, float>(s, 0.f);
  for (int i = threadIdx.x; i < C; i += blockDim.x) __stcs(&out[(size_t)row * C + i], expf(x[i] - m) / s);
}
"""

LAYERNORM_GROUPS = r"""
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
namespace cg = cooperative_groups;
__global__ void layernorm_forward(float* __restrict__ out, float* mean, float* rstd, const float* inp, const float* weight,
                                  const float* bias, int N, int C) {
  cg::thread_block block = cg::this_thread_block();
  cg::thread_block_tile<32> warp = cg::tiled_partition<32>(block);
  int idx = blockIdx.x * warp.meta_group_size() + warp.meta_group_rank();
  if (idx >= N) return;
  const float* x = inp + idx * C;
  float sum = 0.0f;
  for (int i = warp.thread_rank(); i < C; i += warp.size()) sum += x[i];
  sum = cg::reduce(warp, sum, cg::plus<float>{});
  float m = sum / C;
  if (warp.thread_rank() == 0 && mean != nullptr) __stcs(mean + idx, m);
  sum = 0.0f;
  for (int i = warp.thread_rank(); i < C; i += warp.size()) { float d = x[i] - m; sum += d * d; }
  sum = cg::reduce(warp, sum, cg::plus<float>{});
  float s = rsqrtf(sum / C + 1e-5f);
  if (warp.thread_rank() == 0 && rstd != nullptr) __stcs(rstd + idx, s);
  float* o = out + idx * C;
  for (int c = warp.thread_rank(); c < C; c += warp.size()) __stcs(o + c, s * (__ldcs(x + c) - m) * weight[c] + bias[c]);
}
"""

SGEMM = r"""
template <const int BM = 32, const int BN = 32, const int BK = 8, const int TM = 4, const int TN = 4>
__global__ void __launch_bounds__((BM * BN) / (TM * TN), 1)
    sgemm2DBlocktiling(int M, int N, int K, float alpha, const float* A, const float* B, float beta, float* C) {
  const uint cRow = blockIdx.y, cCol = blockIdx.x;
  const uint numThreads = BM * BN / (TM * TN);
  const int threadCol = threadIdx.x % (BN / TN), threadRow = threadIdx.x / (BN / TN);
  __shared__ float As[BM * BK];
  __shared__ float Bs[BK * BN];
  A += cRow * BM * K;
  B += cCol * BN;
  C += cRow * BM * N + cCol * BN;
  float threadResults[TM * TN] = {0.0}, regM[TM] = {0.0}, regN[TN] = {0.0};
  for (uint bkIdx = 0; bkIdx < K; bkIdx += BK) {
    for (uint i = threadIdx.x; i < BM * BK; i += numThreads) As[i] = A[i / BK * K + i % BK];
    for (uint i = threadIdx.x; i < BK * BN; i += numThreads) Bs[i] = B[i / BN * N + i % BN];
    __syncthreads();
    A += BK;
    B += BK * N;
    for (uint dot = 0; dot < BK; ++dot) {
      for (uint i = 0; i < TM; ++i) regM[i] = As[(threadRow * TM + i) * BK + dot];
      for (uint i = 0; i < TN; ++i) regN[i] = Bs[dot * BN + threadCol * TN + i];
      for (uint m = 0; m < TM; ++m)
        for (uint n = 0; n < TN; ++n) threadResults[m * TN + n] += regM[m] * regN[n];
    }
    __syncthreads();
  }
  for (uint m = 0; m < TM; ++m)
    for (uint n = 0; n < TN; ++n) {
      float& c = C[(threadRow * TM + m) * N + threadCol * TN + n];
      c = alpha * threadResults[m * TN + n] + beta * c;
    }
}
"""

CONVOLUTION = r"""
#define MAX_WIDTH 9
__constant__ float Mask[MAX_WIDTH];
template <typename T> __device__ __host__ T clampTo(T x, T lo, T hi) { return x < lo ? lo : (x > hi ? hi : x); }
__global__ void convolution1D(const float* N, float* P, int width, int n) {
  extern __shared__ float tile[];
  int i = blockIdx.x * blockDim.x + threadIdx.x, radius = width / 2;
  for (int t = threadIdx.x; t < blockDim.x + width - 1; t += blockDim.x) {
    int at = blockIdx.x * blockDim.x + t - radius;
    tile[t] = at >= 0 && at < n ? N[at] : 0.f;
  }
  __syncthreads();
  float p = 0.f;
  for (int j = 0; j < width; ++j) p += tile[threadIdx.x + j] * Mask[j];
  if (i < n) P[i] = p;
}
"""

SCAN = r"""
#define SECTION 128
__global__ void Brent_Kung_scan(float* X, float* Y, unsigned int n) {
  __shared__ float XY[2 * SECTION];
  unsigned int i = 2 * blockIdx.x * blockDim.x + threadIdx.x;
  XY[threadIdx.x] = i < n ? X[i] : 0;
  XY[threadIdx.x + blockDim.x] = i + blockDim.x < n ? X[i + blockDim.x] : 0;
  for (unsigned int stride = 1; stride <= blockDim.x; stride *= 2) {
    __syncthreads();
    unsigned int index = (threadIdx.x + 1) * 2 * stride - 1;
    if (index < 2 * SECTION) XY[index] += XY[index - stride];
  }
  for (int stride = SECTION / 2; stride > 0; stride /= 2) {
    __syncthreads();
    unsigned int index = (threadIdx.x + 1) * stride * 2 - 1;
    if (index + stride < 2 * SECTION) XY[index + stride] += XY[index];
  }
  __syncthreads();
  if (i < n) Y[i] = XY[threadIdx.x];
  if (i + blockDim.x < n) Y[i + blockDim.x] = XY[threadIdx.x + blockDim.x];
}
"""

AGGREGATED = r"""
// warp-aggregated filter: the lanes that are active together share one atomic
__device__ int atomicAggInc(int* ctr) {
  unsigned mask = __activemask();
  int leader = __ffs(mask) - 1, lane = threadIdx.x & 31, start = 0;
  if (lane == leader) start = atomicAdd(ctr, __popc(mask));
  start = __shfl_sync(mask, start, leader);
  return start + __popc(mask & ((1u << lane) - 1));
}
__global__ void filter(int* dst, int* nres, const int* src, int n) {
  int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i >= n) return;
  if (src[i] > 0) dst[atomicAggInc(nres)] = src[i];
}
"""

BITONIC = r"""
__device__ __forceinline__ void comparator(uint& a, uint& b, uint dir) { if ((a > b) == dir) { uint t = a; a = b; b = t; } }
__global__ void bitonicSortShared(uint* d_Dst, const uint* d_Src) {
  __shared__ uint s_key[256];
  s_key[threadIdx.x] = d_Src[threadIdx.x];
  s_key[threadIdx.x + 128] = d_Src[threadIdx.x + 128];
  for (uint size = 2; size < 256; size <<= 1) {
    uint ddd = 1u ^ ((threadIdx.x & (size / 2)) != 0);
    for (uint stride = size / 2; stride > 0; stride >>= 1) {
      __syncthreads();
      uint pos = 2 * threadIdx.x - (threadIdx.x & (stride - 1));
      comparator(s_key[pos], s_key[pos + stride], ddd);
    }
  }
  for (uint stride = 128; stride > 0; stride >>= 1) {
    __syncthreads();
    uint pos = 2 * threadIdx.x - (threadIdx.x & (stride - 1));
    comparator(s_key[pos], s_key[pos + stride], 1u);
  }
  __syncthreads();
  d_Dst[threadIdx.x] = s_key[threadIdx.x];
  d_Dst[threadIdx.x + 128] = s_key[threadIdx.x + 128];
}
"""

ELEMENTWISE = r"""
#include <cuda_fp16.h>
#define LDST128BITS(value) (reinterpret_cast<float4*>(&(value))[0])
#define HALF2(value) (reinterpret_cast<half2*>(&(value))[0])
__global__ void elementwise_add_f16x8_pack_kernel(half* a, half* b, half* c, int N) {
  int idx = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
  half pack_a[8], pack_b[8], pack_c[8];
  LDST128BITS(pack_a[0]) = LDST128BITS(a[idx]);
  LDST128BITS(pack_b[0]) = LDST128BITS(b[idx]);
#pragma unroll
  for (int i = 0; i < 8; i += 2) { HALF2(pack_c[i]) = __hadd2(HALF2(pack_a[i]), HALF2(pack_b[i])); }
  if ((idx + 7) < N) { LDST128BITS(c[idx]) = LDST128BITS(pack_c[0]); }
}
"""

FLASH_MINIMAL = r"""
__global__ void forward_kernel(const float* Q, const float* K, const float* V, const int N, const int d, const int Tc,
                               const int Tr, const int Bc, const int Br, const float softmax_scale, float* l, float* m, float* O) {
  int tx = threadIdx.x, bx = blockIdx.x, by = blockIdx.y;
  int qkv_offset = (bx * gridDim.y * N * d) + (by * N * d), lm_offset = (bx * gridDim.y * N) + (by * N);
  extern __shared__ float sram[];
  int tile_size = Bc * d;
  float *Qi = sram, *Kj = &sram[tile_size], *Vj = &sram[tile_size * 2], *S = &sram[tile_size * 3];
  for (int j = 0; j < Tc; j++) {
    for (int x = 0; x < d; x++) {
      Kj[(tx * d) + x] = K[qkv_offset + (tile_size * j) + (tx * d) + x];
      Vj[(tx * d) + x] = V[qkv_offset + (tile_size * j) + (tx * d) + x];
    }
    __syncthreads();
    for (int i = 0; i < Tr; i++) {
      for (int x = 0; x < d; x++) Qi[(tx * d) + x] = Q[qkv_offset + (tile_size * i) + (tx * d) + x];
      float row_m_prev = m[lm_offset + (Br * i) + tx], row_l_prev = l[lm_offset + (Br * i) + tx], row_m = -INFINITY;
      for (int y = 0; y < Bc; y++) {
        float sum = 0;
        for (int x = 0; x < d; x++) sum += Qi[(tx * d) + x] * Kj[(y * d) + x];
        S[(Bc * tx) + y] = sum *= softmax_scale;
        if (sum > row_m) row_m = sum;
      }
      float row_l = 0;
      for (int y = 0; y < Bc; y++) { S[(Bc * tx) + y] = __expf(S[(Bc * tx) + y] - row_m); row_l += S[(Bc * tx) + y]; }
      float row_m_new = max(row_m_prev, row_m);
      float row_l_new = (__expf(row_m_prev - row_m_new) * row_l_prev) + (__expf(row_m - row_m_new) * row_l);
      for (int x = 0; x < d; x++) {
        float pv = 0;
        for (int y = 0; y < Bc; y++) pv += S[(Bc * tx) + y] * Vj[(y * d) + x];
        float& o = O[qkv_offset + (tile_size * i) + (tx * d) + x];
        o = (1 / row_l_new) * ((row_l_prev * __expf(row_m_prev - row_m_new) * o) + (__expf(row_m - row_m_new) * pv));
      }
      m[lm_offset + (Br * i) + tx] = row_m_new;
      l[lm_offset + (Br * i) + tx] = row_l_new;
    }
    __syncthreads();
  }
}
"""

ADAM = r"""
struct AdamState { float beta1, beta2, lr, eps; int step; };
__device__ inline float lerp(float start, float end, float weight) { return fma(weight, end, fma(-weight, start, start)); }
template <typename Tp, typename Tg>
__global__ void adamw_kernel(Tp* params, const Tg* grads, float* m, float* v, size_t n, AdamState s) {
  size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
  if (i >= n) { return; }
  float g = (float)grads[i];
  m[i] = lerp(g, m[i], s.beta1);
  v[i] = lerp(g * g, v[i], s.beta2);
  float mhat = m[i] / (1.f - powf(s.beta1, s.step)), vhat = v[i] / (1.f - powf(s.beta2, s.step));
  params[i] -= s.lr * mhat / (sqrtf(vhat) + s.eps);
}
"""

INT8 = r"""
__global__ void gemv_int8(const int* __restrict__ w, const int* __restrict__ x, int* y, int words) {
  int acc = 0;
  for (int i = threadIdx.x; i < words; i += 32) acc = __dp4a(__ldg(&w[blockIdx.x * words + i]), x[i], acc);
  acc = __reduce_add_sync(0xffffffffu, acc);
  if (threadIdx.x == 0) y[blockIdx.x] = acc;
}
"""

GELU = r"""
#define GELU_SCALING_FACTOR sqrtf(2.0f / M_PI)
namespace act {
struct Gelu { __device__ float operator()(float x) const { float cube = 0.044715f * x * x * x;
  return 0.5f * x * (1.0f + tanhf(GELU_SCALING_FACTOR * (x + cube))); } };
template <typename F, int VEC = 4> __global__ void map(const float4* in, float4* out, int n, F f = F()) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n / VEC; i += gridDim.x * blockDim.x) {
    float4 v = in[i];
    float* p = reinterpret_cast<float*>(&v);
    for (int k = 0; k < VEC; ++k) p[k] = f(p[k]);
    out[i] = v;
  }
}
}
"""

ROPE = r"""
#include <cuda_bf16.h>
using bf16 = __nv_bfloat16;
__global__ void rope_bf16(const __nv_bfloat162* x, __nv_bfloat162* y, const float2* table, int half_d, int n_tokens) {
  const int token = blockIdx.x, pair = threadIdx.x;
  if (token >= n_tokens || pair >= half_d) return;
  float2 cs = __ldg(&table[token * half_d + pair]), v = __bfloat1622float2(x[token * half_d + pair]);
  y[token * half_d + pair] = __floats2bfloat162_rn(v.x * cs.x - v.y * cs.y, v.x * cs.y + v.y * cs.x);
}
"""

EMBEDDING = r"""
typedef long long int64;
template <typename scalar_t> __global__ void embedding(const int64* ids, const scalar_t* weight, scalar_t* out, int64 dim, int64 padding_idx) {
  const int64 row = ids[blockIdx.x];
#pragma unroll 4
  for (int64 c = threadIdx.x; c < dim; c += blockDim.x)
    out[blockIdx.x * dim + c] = row == padding_idx ? scalar_t(0) : weight[row * dim + c];
}
"""

HISTOGRAM = r"""
#define NUM_BINS 16
extern "C" __global__ void histogram_private(const unsigned char* data, unsigned int* bins, size_t n) {
  __shared__ unsigned int local[NUM_BINS];
  for (unsigned b = threadIdx.x; b < NUM_BINS; b += blockDim.x) local[b] = 0u;
  __syncthreads();
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)blockDim.x * gridDim.x)
    atomicInc(&local[data[i] % NUM_BINS], 0xffffffffu);
  __syncthreads();
  for (unsigned b = threadIdx.x; b < NUM_BINS; b += blockDim.x) if (local[b]) atomicAdd(&bins[b], local[b]);
}
"""

CAUSAL = r"""
__global__ void causal(const float* x, float* out, int n) {      // loops of different length in one warp
  __shared__ float p[32][33];
  int row = threadIdx.x;
  for (int j = 0; j <= row; ++j) p[row][j] = expf(x[row * n + j]);
  for (int j = row + 1; j < n; ++j) p[row][j] = 0.f;
  float sum = 0.f;
  for (int j = 0; j < n; ++j) sum += p[row][j];
  for (int j = 0; j < n; ++j) out[row * n + j] = p[row][j] / sum;
}
"""

PERMUTE = r"""
__global__ void permute_kernel(float* q, float* k, float* v, const float* inp, int B, int N, int NH, int d) {
  int idx = blockIdx.x * blockDim.x + threadIdx.x;
  if (idx < B * NH * N * d) {
    int b = idx / (NH * N * d), rest = idx % (NH * N * d), nh_ = rest / (N * d);
    rest = rest % (N * d);
    int n = rest / d, d_ = rest % d;
    int inp_idx = (b * N * 3 * NH * d) + (n * 3 * NH * d) + (0 * NH * d) + (nh_ * d) + d_;
    q[idx] = __ldcs(&inp[inp_idx]);
    k[idx] = __ldcs(&inp[inp_idx + NH * d]);
    v[idx] = __ldcs(&inp[inp_idx + 2 * (NH * d)]);
  }
}
"""

WELFORD = r"""
struct Welford { float mean, m2; int n; };
__device__ Welford combine(Welford a, Welford b) {
  if (b.n == 0) return a;
  Welford r;
  float delta = b.mean - a.mean;
  r.n = a.n + b.n;
  r.mean = a.mean + delta * b.n / r.n;
  r.m2 = a.m2 + b.m2 + delta * delta * a.n * b.n / r.n;
  return r;
}
__global__ void variance(const float* x, float* out, int n) {
  Welford w = {0.f, 0.f, 0};
  for (int i = threadIdx.x; i < n; i += 32) w = combine(w, Welford{x[blockIdx.x * n + i], 0.f, 1});
  for (int o = 16; o; o >>= 1) {
    Welford other = {__shfl_down_sync(~0u, w.mean, o), __shfl_down_sync(~0u, w.m2, o), __shfl_down_sync(~0u, w.n, o)};
    w = combine(w, other);
  }
  if (threadIdx.x == 0) out[blockIdx.x] = w.m2 / w.n;
}
"""

STENCIL = r"""
#define IN_TILE_DIM 16
#define OUT_TILE_DIM ((IN_TILE_DIM) - 2)
__global__ void stencil(const float* in, float* out, unsigned int N) {
  int row = blockIdx.y * OUT_TILE_DIM + threadIdx.y - 1, col = blockIdx.x * OUT_TILE_DIM + threadIdx.x - 1;
  float __shared__ in_s[IN_TILE_DIM][IN_TILE_DIM];
  if (row >= 0 && row < N && col >= 0 && col < N) in_s[threadIdx.y][threadIdx.x] = in[row * N + col];
  __syncthreads();
  if (row >= 1 && row < N - 1 && col >= 1 && col < N - 1 && threadIdx.x >= 1 && threadIdx.x < IN_TILE_DIM - 1 &&
      threadIdx.y >= 1 && threadIdx.y < IN_TILE_DIM - 1)
    out[row * N + col] = in_s[threadIdx.y][threadIdx.x] - 0.25f * (in_s[threadIdx.y - 1][threadIdx.x] +
        in_s[threadIdx.y + 1][threadIdx.x] + in_s[threadIdx.y][threadIdx.x - 1] + in_s[threadIdx.y][threadIdx.x + 1]);
}
"""
