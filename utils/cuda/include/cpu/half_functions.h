// The rest of CUDA's functions of half and bfloat16. Included where a source names these types.
#pragma once
#include "cpu/rounding.h"

// A float as a half with a rounding: to nearest, then to the neighbour on the side of the exact number.
template <class H> CU_INLINE H cu_narrowed(CuRounding how, double exact) {
  H h((float)exact);
  double value = (double)(float)h, error = exact - value;
  if (exact != exact || error == 0) return h;
  if (isinf(exact)) return h;
  bool up = error > 0 && (how == CU_RU || (how == CU_RZ && exact < 0));
  bool down = error < 0 && (how == CU_RD || (how == CU_RZ && exact > 0));
  if (!up && !down) return h;
  if ((h.bits & 0x7fff) == 0) h.bits = up ? 0x0001 : 0x8001;            // beside zero
  else if (up == !(h.bits & 0x8000)) h.bits++;                          // away from zero
  else h.bits--;
  return h;
}
CU_INLINE float cu_saturated01(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }

#define CU_TO_WHOLE(h, H, to, T) \
  CU_INLINE T __##h##2##to##_rn(H x) { return cu_saturated<T>(rintf((float)x)); } \
  CU_INLINE T __##h##2##to##_rz(H x) { return cu_saturated<T>(truncf((float)x)); } \
  CU_INLINE T __##h##2##to##_rd(H x) { return cu_saturated<T>(floorf((float)x)); } \
  CU_INLINE T __##h##2##to##_ru(H x) { return cu_saturated<T>(ceilf((float)x)); }
#define CU_FROM_WHOLE(suffix, how, h, H, from, T) \
  CU_INLINE H __##from##2##h##_##suffix(T x) { return cu_narrowed<H>(how, (double)x); }
#define CU_WHOLE(h, H, to, T) CU_TO_WHOLE(h, H, to, T) CU_ROUNDINGS(CU_FROM_WHOLE, h, H, to, T)
#define CU_FROM_FLOAT(suffix, how, h, H) CU_INLINE H __float2##h##_##suffix(float x) { return cu_narrowed<H>(how, x); }

#define CU_COMPARED_HALVES(name, H, P, op) \
  CU_INLINE bool __h##name##u(H a, H b) { return isnan(float(a)) || isnan(float(b)) || float(a) op float(b); } \
  CU_INLINE P __h##name##2(P a, P b) { return P(H(__h##name(a.x, b.x) ? 1.f : 0.f), H(__h##name(a.y, b.y) ? 1.f : 0.f)); } \
  CU_INLINE P __h##name##u2(P a, P b) { return P(H(__h##name##u(a.x, b.x) ? 1.f : 0.f), H(__h##name##u(a.y, b.y) ? 1.f : 0.f)); } \
  CU_INLINE bool __hb##name##2(P a, P b) { return __h##name(a.x, b.x) && __h##name(a.y, b.y); } \
  CU_INLINE bool __hb##name##u2(P a, P b) { return __h##name##u(a.x, b.x) && __h##name##u(a.y, b.y); } \
  CU_INLINE unsigned __h##name##2_mask(P a, P b) { \
    return (__h##name(a.x, b.x) ? 0xffffu : 0u) | (__h##name(a.y, b.y) ? 0xffff0000u : 0u); \
  } \
  CU_INLINE unsigned __h##name##u2_mask(P a, P b) { \
    return (__h##name##u(a.x, b.x) ? 0xffffu : 0u) | (__h##name##u(a.y, b.y) ? 0xffff0000u : 0u); \
  }
#define CU_OF_HALF(name, P, H, f) \
  CU_INLINE H h##name(H a) { return H(f); } \
  CU_INLINE P h2##name(P a) { return P(h##name(a.x), h##name(a.y)); }
#define CU_OF_PAIR(name, P) CU_INLINE P h2##name(P a) { return P(h##name(a.x), h##name(a.y)); }
#define CU_VARIANTS(op, H, P) \
  CU_INLINE H __h##op##_rn(H a, H b) { return __h##op(a, b); } \
  CU_INLINE P __h##op##2_rn(P a, P b) { return __h##op##2(a, b); } \
  CU_INLINE H __h##op##_sat(H a, H b) { return H(cu_saturated01(float(__h##op(a, b)))); } \
  CU_INLINE P __h##op##2_sat(P a, P b) { return P(__h##op##_sat(a.x, b.x), __h##op##_sat(a.y, b.y)); }
#define CU_WITH_NAN(m, H, P) \
  CU_INLINE H __h##m##_nan(H a, H b) { return isnan(float(a)) ? a : isnan(float(b)) ? b : __h##m(a, b); } \
  CU_INLINE P __h##m##2_nan(P a, P b) { return P(__h##m##_nan(a.x, b.x), __h##m##_nan(a.y, b.y)); }

#define CU_HALF_FUNCTIONS(h, H, P, h162) \
  CU_INLINE bool __hne(H a, H b) { return float(a) < float(b) || float(a) > float(b); } \
  CU_COMPARED_HALVES(eq, H, P, ==) CU_COMPARED_HALVES(ne, H, P, !=) CU_COMPARED_HALVES(gt, H, P, >) \
  CU_COMPARED_HALVES(ge, H, P, >=) CU_COMPARED_HALVES(lt, H, P, <) CU_COMPARED_HALVES(le, H, P, <=) \
  CU_VARIANTS(add, H, P) CU_VARIANTS(sub, H, P) CU_VARIANTS(mul, H, P) CU_WITH_NAN(max, H, P) CU_WITH_NAN(min, H, P) \
  CU_INLINE H __hfma_sat(H a, H b, H c) { return H(cu_saturated01(float(__hfma(a, b, c)))); } \
  CU_INLINE P __hfma2_sat(P a, P b, P c) { return P(__hfma_sat(a.x, b.x, c.x), __hfma_sat(a.y, b.y, c.y)); } \
  CU_INLINE H __hfma_relu(H a, H b, H c) { H r = __hfma(a, b, c); return float(r) < 0.f ? H(0.f) : r; } \
  CU_INLINE P __hfma2_relu(P a, P b, P c) { return P(__hfma_relu(a.x, b.x, c.x), __hfma_relu(a.y, b.y, c.y)); } \
  CU_INLINE P __hcmadd(P a, P b, P c) { \
    return P(__hfma(-a.y, b.y, __hfma(a.x, b.x, c.x)), __hfma(a.y, b.x, __hfma(a.x, b.y, c.y))); \
  } \
  CU_INLINE P __h2div(P a, P b) { return P(a.x / b.x, a.y / b.y); } \
  CU_INLINE P __hneg2(P a) { return P(-a.x, -a.y); } \
  CU_INLINE P __habs2(P a) { return P(__habs(a.x), __habs(a.y)); } \
  CU_INLINE int __hisinf(H a) { return isinf(float(a)) ? (float(a) < 0.f ? -1 : 1) : 0; } \
  CU_INLINE P __hisnan2(P a) { return P(H(__hisnan(a.x) ? 1.f : 0.f), H(__hisnan(a.y) ? 1.f : 0.f)); } \
  CU_INLINE P __lowhigh2highlow(P a) { return P(a.y, a.x); } \
  CU_INLINE P __low2##h162(P a) { return P(a.x, a.x); } \
  CU_INLINE P __high2##h162(P a) { return P(a.y, a.y); } \
  CU_INLINE P __lows2##h162(P a, P b) { return P(a.x, b.x); } \
  CU_INLINE P __highs2##h162(P a, P b) { return P(a.y, b.y); } \
  CU_INLINE H __double2##h(double x) { return cu_narrowed<H>(CU_RN, x); } \
  CU_INLINE short __##h##_as_short(H a) { return (short)a.bits; } \
  CU_INLINE unsigned short __##h##_as_ushort(H a) { return a.bits; } \
  CU_INLINE H __short_as_##h(short x) { H r; r.bits = (uint16_t)x; return r; } \
  CU_INLINE H __ushort_as_##h(unsigned short x) { H r; r.bits = x; return r; } \
  CU_WHOLE(h, H, int, int) CU_WHOLE(h, H, uint, unsigned) CU_WHOLE(h, H, ll, long long) \
  CU_WHOLE(h, H, ull, unsigned long long) CU_WHOLE(h, H, short, short) CU_WHOLE(h, H, ushort, unsigned short) \
  CU_INLINE signed char __##h##2char_rz(H x) { return cu_saturated<signed char>(truncf((float)x)); } \
  CU_INLINE unsigned char __##h##2uchar_rz(H x) { return cu_saturated<unsigned char>(truncf((float)x)); } \
  CU_FROM_FLOAT(rz, CU_RZ, h, H) CU_FROM_FLOAT(rd, CU_RD, h, H) CU_FROM_FLOAT(ru, CU_RU, h, H) \
  CU_OF_PAIR(log, P) CU_OF_PAIR(sqrt, P) CU_OF_PAIR(rsqrt, P) \
  CU_OF_HALF(sin, P, H, sinf(float(a))) CU_OF_HALF(cos, P, H, cosf(float(a))) CU_OF_HALF(tanh, P, H, tanhf(float(a))) \
  CU_OF_HALF(tanh_approx, P, H, tanhf(float(a))) CU_OF_HALF(exp2, P, H, exp2f(float(a))) \
  CU_OF_HALF(exp10, P, H, powf(10.f, float(a))) CU_OF_HALF(log2, P, H, log2f(float(a))) \
  CU_OF_HALF(log10, P, H, log10f(float(a))) CU_OF_HALF(rcp, P, H, 1.f / float(a)) \
  CU_OF_HALF(floor, P, H, floorf(float(a))) CU_OF_HALF(ceil, P, H, ceilf(float(a))) \
  CU_OF_HALF(trunc, P, H, truncf(float(a))) CU_OF_HALF(rint, P, H, rintf(float(a)))
CU_HALF_FUNCTIONS(half, __half, __half2, half2)
CU_HALF_FUNCTIONS(bfloat16, __nv_bfloat16, __nv_bfloat162, bfloat162)
CU_INLINE __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
CU_INLINE __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
CU_INLINE __nv_bfloat162 make_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat162(a, b); }
