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
CU_UNARY(acosh) CU_UNARY(asinh) CU_UNARY(atanh) CU_UNARY(lgamma) CU_UNARY(tgamma) CU_UNARY(logb) CU_UNARY(nearbyint)
CU_BINARY(nextafter) CU_BINARY(fdim) CU_BINARY(remainder)
#define CU_TO_LONG(T, name) T name(double) noexcept; T name##f(float) noexcept;
CU_TO_LONG(long, lrint) CU_TO_LONG(long, lround) CU_TO_LONG(long long, llrint) CU_TO_LONG(long long, llround) CU_TO_LONG(int, ilogb)
double ldexp(double, int) noexcept;
float ldexpf(float, int) noexcept;
double frexp(double, int*) noexcept;
float frexpf(float, int*) noexcept;
double modf(double, double*) noexcept;
float modff(float, float*) noexcept;
double remquo(double, double, int*) noexcept;
float remquof(float, float, int*) noexcept;
double nan(const char*) noexcept;
float nanf(const char*) noexcept;
long labs(long) noexcept;
long long llabs(long long) noexcept;
CU_BINARY(pow) CU_BINARY(fmod) CU_BINARY(fmax) CU_BINARY(fmin) CU_BINARY(atan2) CU_BINARY(hypot) CU_BINARY(copysign)
double fma(double, double, double) noexcept;
float fmaf(float, float, float) noexcept;
int abs(int) noexcept;
}

#define CU_OVERLOAD(name) CU_INLINE float name(float x) { return name##f(x); }
CU_OVERLOAD(exp) CU_OVERLOAD(exp2) CU_OVERLOAD(log) CU_OVERLOAD(log2) CU_OVERLOAD(sqrt) CU_OVERLOAD(sin)
CU_OVERLOAD(cos) CU_OVERLOAD(tanh) CU_OVERLOAD(erf) CU_OVERLOAD(floor) CU_OVERLOAD(ceil) CU_OVERLOAD(round)
CU_OVERLOAD(fabs) CU_OVERLOAD(tan) CU_OVERLOAD(asin) CU_OVERLOAD(acos) CU_OVERLOAD(atan) CU_OVERLOAD(sinh) CU_OVERLOAD(cosh)
CU_OVERLOAD(log10) CU_OVERLOAD(log1p) CU_OVERLOAD(expm1) CU_OVERLOAD(cbrt) CU_OVERLOAD(trunc) CU_OVERLOAD(rint) CU_OVERLOAD(erfc)
CU_INLINE float fmod(float x, float y) { return fmodf(x, y); }
CU_INLINE float fmax(float x, float y) { return fmaxf(x, y); }
CU_INLINE float fmin(float x, float y) { return fminf(x, y); }
CU_INLINE float atan2(float x, float y) { return atan2f(x, y); }
CU_INLINE float hypot(float x, float y) { return hypotf(x, y); }
CU_INLINE float copysign(float x, float y) { return copysignf(x, y); }
CU_INLINE float ldexp(float x, int n) { return ldexpf(x, n); }
CU_INLINE float frexp(float x, int* n) { return frexpf(x, n); }
CU_INLINE float modf(float x, float* whole) { return modff(x, whole); }
CU_INLINE float abs(float x) { return fabsf(x); }
CU_INLINE double abs(double x) { return fabs(x); }
CU_INLINE long abs(long x) { return labs(x); }
CU_INLINE long long abs(long long x) { return llabs(x); }
CU_INLINE float pow(float x, float y) { return powf(x, y); }
CU_INLINE float fma(float a, float b, float c) { return fmaf(a, b, c); }

#define isinf(x) (__builtin_isinf(x) != 0)          // a bool, as in C++: gcc's own gives -1 for -inf
#define isnan(x) (__builtin_isnan(x) != 0)
#define isfinite(x) (__builtin_isfinite(x) != 0)
#define signbit(x) (__builtin_signbit(x) != 0)
#ifndef INFINITY
#define INFINITY __builtin_inff()
#endif
#ifndef NAN
#define NAN __builtin_nanf("")
#endif
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
#define CUDART_PI_F 3.141592654f
#include "constants.h"
#define HUGE_VALF __builtin_inff()
#define HUGE_VAL __builtin_inf()

// The fast forms of a GPU are approximate; here they are the exact ones. Macros: glibc has functions of these names.
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __exp10f(x) powf(10.f, (x))
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __tanf(x) tanf(x)
#define exp10(x) pow(10.0, (x))
#define exp10f(x) powf(10.f, (x))
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
CU_INLINE float fdividef(float a, float b) { return a / b; }
CU_INLINE double fdivide(double a, double b) { return a / b; }
#define CU_SINE_COSINE(T, f) \
  CU_INLINE void sincos##f(T x, T* s, T* c) { *s = sin(x); *c = cos(x); } \
  CU_INLINE T sinpi##f(T x) { return sin((T)M_PI * (x - 2 * rint##f(x / 2))); } \
  CU_INLINE T cospi##f(T x) { return cos((T)M_PI * (x - 2 * rint##f(x / 2))); } \
  CU_INLINE void sincospi##f(T x, T* s, T* c) { *s = sinpi##f(x); *c = cospi##f(x); } \
  CU_INLINE T rhypot##f(T x, T y) { return 1 / hypot##f(x, y); } \
  CU_INLINE T norm3d##f(T a, T b, T c) { return hypot##f(hypot##f(a, b), c); } \
  CU_INLINE T norm4d##f(T a, T b, T c, T d) { return hypot##f(hypot##f(a, b), hypot##f(c, d)); } \
  CU_INLINE T rnorm3d##f(T a, T b, T c) { return 1 / norm3d##f(a, b, c); } \
  CU_INLINE T rnorm4d##f(T a, T b, T c, T d) { return 1 / norm4d##f(a, b, c, d); } \
  CU_INLINE T rcbrt##f(T x) { return 1 / cbrt##f(x); } \
  CU_INLINE T normcdf##f(T x) { return (T)(0.5 * erfc(-(double)x * 0.70710678118654752440)); } \
  CU_INLINE T scalbn##f(T x, int n) { return ldexp##f(x, n); } \
  CU_INLINE T scalbln##f(T x, long n) { return ldexp##f(x, (int)(n > 5000 ? 5000 : n < -5000 ? -5000 : n)); } \
  CU_INLINE T norm##f(int n, const T* v) { T r = 0; for (int i = 0; i < n; ++i) r = hypot##f(r, v[i]); return r; } \
  CU_INLINE T rnorm##f(int n, const T* v) { return 1 / norm##f(n, v); }
CU_SINE_COSINE(float, f) CU_SINE_COSINE(double, )
CU_INLINE void __sincosf(float x, float* s, float* c) { sincosf(x, s, c); }
CU_INLINE long long llmax(long long a, long long b) { return a < b ? b : a; }
CU_INLINE long long llmin(long long a, long long b) { return b < a ? b : a; }
CU_INLINE unsigned long long ullmax(unsigned long long a, unsigned long long b) { return a < b ? b : a; }
CU_INLINE unsigned long long ullmin(unsigned long long a, unsigned long long b) { return b < a ? b : a; }
CU_INLINE unsigned umax(unsigned a, unsigned b) { return a < b ? b : a; }
CU_INLINE unsigned umin(unsigned a, unsigned b) { return b < a ? b : a; }
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

#define CU_MIN_MAX_MIXED(A, B, T) \
  CU_INLINE T min(A a, B b) { return min((T)a, (T)b); } \
  CU_INLINE T min(B a, A b) { return min((T)a, (T)b); } \
  CU_INLINE T max(A a, B b) { return max((T)a, (T)b); } \
  CU_INLINE T max(B a, A b) { return max((T)a, (T)b); }
CU_MIN_MAX_MIXED(int, unsigned, unsigned) CU_MIN_MAX_MIXED(long, unsigned long, unsigned long)
CU_MIN_MAX_MIXED(long long, unsigned long long, unsigned long long) CU_MIN_MAX_MIXED(float, double, double)

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

// Loads and stores with a hint for the cache. Macros: the access then belongs to the kernel's line.
#define __ldg(p) (*(p))
#define __ldcg(p) (*(p))
#define __ldca(p) (*(p))
#define __ldcs(p) (*(p))
#define __ldlu(p) (*(p))
#define __ldcv(p) (*(p))
#define __stwb(p, value) ((void)(*(p) = (value)))
#define __stcg(p, value) ((void)(*(p) = (value)))
#define __stcs(p, value) ((void)(*(p) = (value)))
#define __stwt(p, value) ((void)(*(p) = (value)))
