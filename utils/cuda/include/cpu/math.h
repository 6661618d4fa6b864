// Mathematics. The C functions are declared here and not through <math.h>, which costs a third of a second to compile
// and, in glibc, declares its own __expf and rsqrtf.
#pragma once

#define CU_UNARY(name) double name(double) noexcept; float name##f(float) noexcept;
#define CU_BINARY(name) double name(double, double) noexcept; float name##f(float, float) noexcept;
extern "C" {
void* memcpy(void*, const void*, size_t) noexcept;
void* memset(void*, int, size_t) noexcept;
CU_UNARY(exp) CU_UNARY(exp2) CU_UNARY(expm1) CU_UNARY(log) CU_UNARY(log2) CU_UNARY(log10) CU_UNARY(log1p)
CU_UNARY(sqrt) CU_UNARY(cbrt) CU_UNARY(sin) CU_UNARY(cos) CU_UNARY(tan) CU_UNARY(asin) CU_UNARY(acos) CU_UNARY(atan)
CU_UNARY(sinh) CU_UNARY(cosh) CU_UNARY(tanh) CU_UNARY(erf) CU_UNARY(erfc)
CU_UNARY(floor) CU_UNARY(ceil) CU_UNARY(round) CU_UNARY(rint) CU_UNARY(trunc) CU_UNARY(fabs)
CU_BINARY(pow) CU_BINARY(fmod) CU_BINARY(fmax) CU_BINARY(fmin) CU_BINARY(atan2) CU_BINARY(hypot) CU_BINARY(copysign)
double fma(double, double, double) noexcept;
float fmaf(float, float, float) noexcept;
int abs(int) noexcept;
}

#define CU_OVERLOAD(name) CU_INLINE float name(float x) { return name##f(x); }
CU_OVERLOAD(exp) CU_OVERLOAD(exp2) CU_OVERLOAD(log) CU_OVERLOAD(log2) CU_OVERLOAD(sqrt) CU_OVERLOAD(sin)
CU_OVERLOAD(cos) CU_OVERLOAD(tanh) CU_OVERLOAD(erf) CU_OVERLOAD(floor) CU_OVERLOAD(ceil) CU_OVERLOAD(round)
CU_OVERLOAD(fabs)
CU_INLINE float pow(float x, float y) { return powf(x, y); }
CU_INLINE float fma(float a, float b, float c) { return fmaf(a, b, c); }

#define isinf(x) __builtin_isinf(x)
#define isnan(x) __builtin_isnan(x)
#define isfinite(x) __builtin_isfinite(x)
#ifndef INFINITY
#define INFINITY __builtin_inff()
#endif
#ifndef NAN
#define NAN __builtin_nanf("")
#endif
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
#define CUDART_PI_F 3.141592654f
#ifndef M_PI
#define M_PI 3.14159265358979323846
#endif

// The fast forms of a GPU are approximate; here they are the exact ones. Macros: glibc has functions of these names.
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __exp10f(x) powf(10.f, (x))
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanhf(x) tanhf(x)
#define __powf(x, y) powf((x), (y))
#define rsqrtf(x) cu_rsqrtf(x)
#define rsqrt(x) cu_rsqrt(x)
CU_INLINE float cu_rsqrtf(float x) { return 1.f / sqrtf(x); }
CU_INLINE float cu_rsqrt(float x) { return 1.f / sqrtf(x); }
CU_INLINE double cu_rsqrt(double x) { return 1.0 / sqrt(x); }

CU_INLINE float __fdividef(float a, float b) { return a / b; }
CU_INLINE float __fdiv_rn(float a, float b) { return a / b; }
CU_INLINE float __fadd_rn(float a, float b) { return a + b; }
CU_INLINE float __fmul_rn(float a, float b) { return a * b; }
CU_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
CU_INLINE float __frcp_rn(float x) { return 1.f / x; }
CU_INLINE float __fsqrt_rn(float x) { return sqrtf(x); }
CU_INLINE float __frsqrt_rn(float x) { return 1.f / sqrtf(x); }
CU_INLINE float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }      // nan gives 0, as on a GPU

#define CU_MIN_MAX(T) \
  CU_INLINE T min(T a, T b) { return b < a ? b : a; } \
  CU_INLINE T max(T a, T b) { return a < b ? b : a; }
CU_MIN_MAX(int) CU_MIN_MAX(unsigned) CU_MIN_MAX(long) CU_MIN_MAX(unsigned long)
CU_MIN_MAX(long long) CU_MIN_MAX(unsigned long long)
CU_INLINE float min(float a, float b) { return fminf(a, b); }
CU_INLINE float max(float a, float b) { return fmaxf(a, b); }
CU_INLINE double min(double a, double b) { return fmin(a, b); }
CU_INLINE double max(double a, double b) { return fmax(a, b); }

CU_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
CU_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
CU_INLINE int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
CU_INLINE int __ffs(int x) { return __builtin_ffs(x); }

template <class To, class From> CU_INLINE To cu_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
CU_INLINE int __float_as_int(float x) { return cu_bits<int>(x); }
CU_INLINE float __int_as_float(int x) { return cu_bits<float>(x); }
CU_INLINE unsigned __float_as_uint(float x) { return cu_bits<unsigned>(x); }
CU_INLINE float __uint_as_float(unsigned x) { return cu_bits<float>(x); }
CU_INLINE int __float2int_rn(float x) { return (int)rintf(x); }
CU_INLINE int __float2int_rz(float x) { return (int)x; }
CU_INLINE float __int2float_rn(int x) { return (float)x; }

#define __ldg(p) (*(p))              // a macro: the load then belongs to the kernel's line
