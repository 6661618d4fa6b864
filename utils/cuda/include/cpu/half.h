// half and bfloat16: stored in 16 bits, computed in float, rounded to nearest even after every operation.
#pragma once

CU_INLINE float cu_half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return cu_bits<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent) return cu_bits<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  return cu_bits<float>(sign | cu_bits<uint32_t>((float)mantissa * 5.9604644775390625e-8f));    // times 2^-24
}

CU_INLINE uint16_t cu_float_to_half(float f) {
  uint32_t x = cu_bits<uint32_t>(f), sign = (x >> 16) & 0x8000;
  x &= 0x7fffffff;
  if (x > 0x7f800000) return (uint16_t)(sign | 0x7fff);                     // nan
  if (x >= 0x477ff000) return (uint16_t)(sign | 0x7c00);                    // rounds to infinity
  if (x < 0x38800000)                                                       // subnormal: the adder rounds for us
    return (uint16_t)(sign | (cu_bits<uint32_t>(cu_bits<float>(x) + 0.5f) - 0x3f000000u));
  return (uint16_t)(sign | ((x - 0x38000000u + 0xfff + ((x >> 13) & 1)) >> 13));
}

CU_INLINE float cu_bfloat16_to_float(uint16_t h) { return cu_bits<float>((uint32_t)h << 16); }

CU_INLINE uint16_t cu_float_to_bfloat16(float f) {
  uint32_t x = cu_bits<uint32_t>(f);
  if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;                         // nan
  return (uint16_t)((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}

// The bits of a half as CUDA names them, to be taken apart and put together.
struct __half_raw { unsigned short x; };
struct __half2_raw { unsigned short x, y; };
struct __nv_bfloat16_raw { unsigned short x; };
struct __nv_bfloat162_raw { unsigned short x, y; };

#define CU_HALF_TYPE(H, R, to_float, from_float) \
  struct H { \
    uint16_t bits; \
    H() = default; \
    CU_METHOD H(R raw) : bits(raw.x) {} \
    CU_METHOD operator R() const { return {bits}; } \
    CU_METHOD H(unsigned x) : bits(from_float((float)x)) {} \
    CU_METHOD H(long x) : bits(from_float((float)x)) {} \
    CU_METHOD H(unsigned long x) : bits(from_float((float)x)) {} \
    CU_METHOD H(long long x) : bits(from_float((float)x)) {} \
    CU_METHOD H(unsigned long long x) : bits(from_float((float)x)) {} \
    CU_METHOD H(float x) : bits(from_float(x)) {} \
    CU_METHOD H(double x) : bits(from_float((float)x)) {} \
    CU_METHOD H(int x) : bits(from_float((float)x)) {} \
    CU_METHOD operator float() const { return to_float(bits); } \
    CU_METHOD H& operator+=(H o) { return *this = H(float(*this) + float(o)); } \
    CU_METHOD H& operator-=(H o) { return *this = H(float(*this) - float(o)); } \
    CU_METHOD H& operator*=(H o) { return *this = H(float(*this) * float(o)); } \
    CU_METHOD H& operator/=(H o) { return *this = H(float(*this) / float(o)); } \
    CU_METHOD H operator-() const { H r; r.bits = bits ^ 0x8000; return r; } \
    CU_METHOD H operator+() const { return *this; } \
    CU_METHOD H& operator++() { return *this += H(1); } \
    CU_METHOD H& operator--() { return *this -= H(1); } \
    CU_METHOD H operator++(int) { H old = *this; ++*this; return old; } \
    CU_METHOD H operator--(int) { H old = *this; --*this; return old; } \
  }; \
  CU_INLINE H operator+(H a, H b) { return H(float(a) + float(b)); } \
  CU_INLINE H operator-(H a, H b) { return H(float(a) - float(b)); } \
  CU_INLINE H operator*(H a, H b) { return H(float(a) * float(b)); } \
  CU_INLINE H operator/(H a, H b) { return H(float(a) / float(b)); } \
  CU_INLINE H __hadd(H a, H b) { return a + b; } \
  CU_INLINE H __hsub(H a, H b) { return a - b; } \
  CU_INLINE H __hmul(H a, H b) { return a * b; } \
  CU_INLINE H __hdiv(H a, H b) { return a / b; } \
  CU_INLINE H __hneg(H a) { return -a; } \
  CU_INLINE H __habs(H a) { a.bits &= 0x7fff; return a; } \
  CU_INLINE H __hfma(H a, H b, H c) { return H(fmaf(float(a), float(b), float(c))); } \
  CU_INLINE H __hmax(H a, H b) { return H(fmaxf(float(a), float(b))); } \
  CU_INLINE H __hmin(H a, H b) { return H(fminf(float(a), float(b))); } \
  CU_INLINE bool __hgt(H a, H b) { return float(a) > float(b); } \
  CU_INLINE bool __hge(H a, H b) { return float(a) >= float(b); } \
  CU_INLINE bool __hlt(H a, H b) { return float(a) < float(b); } \
  CU_INLINE bool __hle(H a, H b) { return float(a) <= float(b); } \
  CU_INLINE bool __heq(H a, H b) { return float(a) == float(b); } \
  CU_INLINE bool __hisnan(H a) { return isnan(float(a)); } \
  CU_INLINE H hexp(H a) { return H(expf(float(a))); } \
  CU_INLINE H hlog(H a) { return H(logf(float(a))); } \
  CU_INLINE H hsqrt(H a) { return H(sqrtf(float(a))); } \
  CU_INLINE H hrsqrt(H a) { return H(cu_rsqrtf(float(a))); }

#define CU_PAIR_OPERATOR(P, op) \
  CU_INLINE P operator op(P a, P b) { return P(a.x op b.x, a.y op b.y); } \
  CU_INLINE P& operator op##=(P& a, P b) { return a = a op b; }
#define CU_PAIR_COMPARISON(P, op) \
  CU_INLINE bool operator op(P a, P b) { return float(a.x) op float(b.x) && float(a.y) op float(b.y); }
#define CU_HALF_PAIR(H, P, R) \
  struct __attribute__((aligned(4))) P { \
    H x, y; \
    CU_COPIES_WHOLE(P, 4) \
    CU_METHOD P(H a, H b) : x(a), y(b) {} \
    CU_METHOD P(R raw) { x.bits = raw.x; y.bits = raw.y; } \
    CU_METHOD operator R() const { return {x.bits, y.bits}; } \
    CU_METHOD P operator-() const { return P(-x, -y); } \
    CU_METHOD P operator+() const { return *this; } \
    CU_METHOD P& operator++() { return *this = P(x + H(1), y + H(1)); } \
    CU_METHOD P& operator--() { return *this = P(x - H(1), y - H(1)); } \
    CU_METHOD P operator++(int) { P old = *this; ++*this; return old; } \
    CU_METHOD P operator--(int) { P old = *this; --*this; return old; } \
  }; \
  CU_PAIR_OPERATOR(P, +) CU_PAIR_OPERATOR(P, -) CU_PAIR_OPERATOR(P, *) CU_PAIR_OPERATOR(P, /) \
  CU_PAIR_COMPARISON(P, ==) CU_PAIR_COMPARISON(P, <) CU_PAIR_COMPARISON(P, <=) CU_PAIR_COMPARISON(P, >) \
  CU_PAIR_COMPARISON(P, >=) \
  CU_INLINE bool operator!=(P a, P b) { return float(a.x) != float(b.x) && float(a.y) != float(b.y); } \
  CU_INLINE P __hadd2(P a, P b) { return a + b; } \
  CU_INLINE P __hsub2(P a, P b) { return a - b; } \
  CU_INLINE P __hmul2(P a, P b) { return a * b; } \
  CU_INLINE P __hfma2(P a, P b, P c) { return P(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)); } \
  CU_INLINE P __hmax2(P a, P b) { return P(__hmax(a.x, b.x), __hmax(a.y, b.y)); } \
  CU_INLINE P __hmin2(P a, P b) { return P(__hmin(a.x, b.x), __hmin(a.y, b.y)); } \
  CU_INLINE P h2exp(P a) { return P(hexp(a.x), hexp(a.y)); } \
  CU_INLINE float __low2float(P a) { return float(a.x); } \
  CU_INLINE float __high2float(P a) { return float(a.y); }

CU_HALF_TYPE(__half, __half_raw, cu_half_to_float, cu_float_to_half)
CU_HALF_TYPE(__nv_bfloat16, __nv_bfloat16_raw, cu_bfloat16_to_float, cu_float_to_bfloat16)
CU_HALF_PAIR(__half, __half2, __half2_raw)
CU_HALF_PAIR(__nv_bfloat16, __nv_bfloat162, __nv_bfloat162_raw)
CU_ATOMIC_ADD(__half, old + value)
CU_ATOMIC_ADD(__half2, old + value)
CU_ATOMIC_ADD(__nv_bfloat16, old + value)
CU_ATOMIC_ADD(__nv_bfloat162, old + value)
typedef __half half;
typedef __half2 half2;
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

CU_INLINE float __half2float(__half h) { return float(h); }
CU_INLINE __half __float2half(float x) { return __half(x); }
CU_INLINE __half __float2half_rn(float x) { return __half(x); }
CU_INLINE __half __low2half(__half2 a) { return a.x; }
CU_INLINE __half __high2half(__half2 a) { return a.y; }
CU_INLINE __half2 __half2half2(__half a) { return __half2(a, a); }
CU_INLINE __half2 __halves2half2(__half a, __half b) { return __half2(a, b); }
CU_INLINE __half2 __float2half2_rn(float x) { return __half2(x, x); }
CU_INLINE __half2 __floats2half2_rn(float a, float b) { return __half2(a, b); }
CU_INLINE __half2 __float22half2_rn(float2 v) { return __half2(v.x, v.y); }
CU_INLINE __half2 make_half2(__half a, __half b) { return __half2(a, b); }
CU_INLINE float2 __half22float2(__half2 h) { return {float(h.x), float(h.y)}; }

CU_INLINE float __bfloat162float(__nv_bfloat16 h) { return float(h); }
CU_INLINE __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
CU_INLINE __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
CU_INLINE __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return __nv_bfloat162(a, a); }
CU_INLINE __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat162(a, b); }
CU_INLINE __nv_bfloat162 __float2bfloat162_rn(float x) { return __nv_bfloat162(x, x); }
CU_INLINE __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return __nv_bfloat162(a, b); }
CU_INLINE __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __nv_bfloat162(v.x, v.y); }
CU_INLINE float2 __bfloat1622float2(__nv_bfloat162 h) { return {float(h.x), float(h.y)}; }
