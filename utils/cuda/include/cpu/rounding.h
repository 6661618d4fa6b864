// Arithmetic and conversions with a rounding that the name chooses: rn to nearest even, rz towards zero, rd down, ru up.
// The result to nearest is moved to its neighbour where the exact one lies on that side. Included where a source uses them.
#pragma once

enum CuRounding { CU_RN, CU_RZ, CU_RD, CU_RU };

CU_INLINE float cu_next(float x, float to) { return nextafterf(x, to); }
CU_INLINE double cu_next(double x, double to) { return nextafter(x, to); }

// `error` has the sign of the exact result minus r.
template <class T> CU_INLINE T cu_rounded(CuRounding how, T r, double error) {
  if (error > 0 && (how == CU_RU || (how == CU_RZ && r < 0))) return cu_next(r, (T)__builtin_inf());
  if (error < 0 && (how == CU_RD || (how == CU_RZ && r > 0))) return cu_next(r, (T)-__builtin_inf());
  return r;
}

// What a sum of doubles leaves over (Knuth), and which side of r the exact sum is on.
CU_INLINE double cu_rest(double a, double b, double sum) {
  double part = sum - a;
  return (a - (sum - part)) + (b - part);
}
CU_INLINE double cu_side(double a, double b, double r) {
  double sum = a + b;
  return sum != r ? sum - r : cu_rest(a, b, sum);
}

CU_INLINE double cu_error_add(float a, float b, float r) { return cu_side(a, b, r); }
CU_INLINE double cu_error_add(double a, double b, double r) { return isinf(r) ? -r : cu_rest(a, b, r); }
CU_INLINE double cu_error_mul(float a, float b, float r) { return (double)a * b - r; }
CU_INLINE double cu_error_mul(double a, double b, double r) { return fma(a, b, -r); }
CU_INLINE double cu_error_div(float a, float b, float r) { return ((double)a - (double)r * b) * (b < 0 ? -1 : 1); }
CU_INLINE double cu_error_div(double a, double b, double r) { return fma(-r, b, a) * (b < 0 ? -1 : 1); }
CU_INLINE double cu_error_sqrt(float a, float r) { return (double)a - (double)r * r; }
CU_INLINE double cu_error_sqrt(double a, double r) { return fma(-r, r, a); }
CU_INLINE double cu_error_fma(float a, float b, float c, float r) { return cu_side((double)a * b, c, r); }
CU_INLINE double cu_error_fma(double a, double b, double c, double r) {
  double product = a * b, sum = product + c;
  return isinf(r) ? -r : (sum - r) + cu_rest(product, c, sum) + fma(a, b, -product);
}

// An operation on numbers that are no infinities itself: there nothing is rounded.
#define CU_FINITE(x) (!isinf((double)(x)) && !isnan((double)(x)))
#define CU_ROUNDINGS(define, ...) define(rn, CU_RN, __VA_ARGS__) define(rz, CU_RZ, __VA_ARGS__) \
  define(rd, CU_RD, __VA_ARGS__) define(ru, CU_RU, __VA_ARGS__)
#define CU_DEFINE_1(suffix, how, name, T, r, error) \
  CU_INLINE T __##name##_##suffix(T a) { T y = r; return CU_FINITE(a) ? cu_rounded(how, y, error) : y; }
#define CU_DEFINE_2(suffix, how, name, T, r, error) \
  CU_INLINE T __##name##_##suffix(T a, T b) { \
    T y = r; \
    return CU_FINITE(a) && CU_FINITE(b) ? cu_rounded(how, y, error) : y; \
  }
#define CU_DEFINE_3(suffix, how, name, T, r, error) \
  CU_INLINE T __##name##_##suffix(T a, T b, T c) { \
    T y = r; \
    return CU_FINITE(a) && CU_FINITE(b) && CU_FINITE(c) ? cu_rounded(how, y, error) : y; \
  }
#define CU_OPERATIONS(letter, T, root, fused) \
  CU_ROUNDINGS(CU_DEFINE_2, letter##add, T, a + b, cu_error_add(a, b, y)) \
  CU_ROUNDINGS(CU_DEFINE_2, letter##sub, T, a - b, cu_error_add(a, -b, y)) \
  CU_ROUNDINGS(CU_DEFINE_2, letter##mul, T, a * b, cu_error_mul(a, b, y)) \
  CU_ROUNDINGS(CU_DEFINE_2, letter##div, T, a / b, cu_error_div(a, b, y)) \
  CU_ROUNDINGS(CU_DEFINE_1, letter##rcp, T, (T)1 / a, cu_error_div((T)1, a, y)) \
  CU_ROUNDINGS(CU_DEFINE_1, letter##sqrt, T, root(a), cu_error_sqrt(a, y))
CU_OPERATIONS(f, float, sqrtf, fmaf)
CU_OPERATIONS(d, double, sqrt, fma)
CU_ROUNDINGS(CU_DEFINE_3, fmaf, float, fmaf(a, b, c), cu_error_fma(a, b, c, y))
CU_ROUNDINGS(CU_DEFINE_3, fmaf_ieee, float, fmaf(a, b, c), cu_error_fma(a, b, c, y))
CU_ROUNDINGS(CU_DEFINE_3, fma, double, fma(a, b, c), cu_error_fma(a, b, c, y))

#define CU_DEFINE_FROM(suffix, how, name, From, To, error) \
  CU_INLINE To __##name##_##suffix(From a) { To y = (To)a; return cu_rounded(how, y, error); }
CU_ROUNDINGS(CU_DEFINE_FROM, int2float, int, float, (double)a - y)
CU_ROUNDINGS(CU_DEFINE_FROM, uint2float, unsigned, float, (double)a - y)
CU_ROUNDINGS(CU_DEFINE_FROM, ll2float, long long, float, (double)((__int128)a - (__int128)y))
CU_ROUNDINGS(CU_DEFINE_FROM, ull2float, unsigned long long, float, (double)((__int128)a - (__int128)y))
CU_ROUNDINGS(CU_DEFINE_FROM, ll2double, long long, double, (double)((__int128)a - (__int128)y))
CU_ROUNDINGS(CU_DEFINE_FROM, ull2double, unsigned long long, double, (double)((__int128)a - (__int128)y))
CU_ROUNDINGS(CU_DEFINE_FROM, double2float, double, float, isinf(a) ? 0 : a - y)
