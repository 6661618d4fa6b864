// Functions of integers and bits, and conversions to integers, which on a GPU saturate and turn nan into 0.
#pragma once

CU_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
CU_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
CU_INLINE int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
CU_INLINE int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
CU_INLINE int __ffs(int x) { return __builtin_ffs(x); }
CU_INLINE int __ffsll(long long x) { return __builtin_ffsll(x); }

CU_INLINE unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
CU_INLINE unsigned long long __brevll(unsigned long long x) {
  return (unsigned long long)__brev((unsigned)x) << 32 | __brev((unsigned)(x >> 32));
}

// The position of the n-th set bit, from `base` upwards, or downwards for a negative n; -1 if there is none.
CU_INLINE unsigned __fns(unsigned mask, unsigned base, int n) {
  int step = n < 0 ? -1 : 1, at = (int)base;
  if (n == 0) return mask >> (base & 31) & 1 ? base : ~0u;
  for (int left = n * step; at >= 0 && at < 32; at += step)
    if (mask >> at & 1 && --left == 0) return (unsigned)at;
  return ~0u;
}

CU_INLINE int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
CU_INLINE unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
CU_INLINE long long __mul64hi(long long a, long long b) { return (long long)((__int128)a * b >> 64); }
CU_INLINE unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
CU_INLINE int cu_low24(int x) { return (int)((unsigned)x << 8) >> 8; }
CU_INLINE int __mul24(int a, int b) { return (int)((unsigned)cu_low24(a) * (unsigned)cu_low24(b)); }
CU_INLINE unsigned __umul24(unsigned a, unsigned b) { return (a & 0xffffff) * (b & 0xffffff); }

CU_INLINE unsigned __sad(int a, int b, unsigned c) { return c + (a > b ? (unsigned)a - b : (unsigned)b - a); }
CU_INLINE unsigned __usad(unsigned a, unsigned b, unsigned c) { return c + (a > b ? a - b : b - a); }
CU_INLINE int __hadd(int a, int b) { return (int)((long long)a + b >> 1); }
CU_INLINE int __rhadd(int a, int b) { return (int)((long long)a + b + 1 >> 1); }
CU_INLINE unsigned __uhadd(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a + b >> 1); }
CU_INLINE unsigned __urhadd(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a + b + 1 >> 1); }

CU_INLINE unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  unsigned long long bytes = (unsigned long long)b << 32 | a;
  unsigned y = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned which = selector >> 4 * i & 15, byte = (unsigned)(bytes >> 8 * (which & 7)) & 255;
    y |= (which & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;      // the eighth value's bit asks for the sign
  }
  return y;
}
CU_INLINE unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned n) {
  return (unsigned)((((unsigned long long)high << 32 | low) << (n < 32 ? n : 32)) >> 32);
}
CU_INLINE unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned n) {
  return (unsigned)(((unsigned long long)high << 32 | low) >> (n < 32 ? n : 32));
}
CU_INLINE unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) { return __funnelshift_lc(low, high, n & 31); }
CU_INLINE unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) { return __funnelshift_rc(low, high, n & 31); }

template <class Byte> CU_INLINE unsigned cu_dot4(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (unsigned)((int)(Byte)(a >> 8 * i) * (int)(Byte)(b >> 8 * i));
  return c;
}
CU_INLINE int __dp4a(int a, int b, int c) { return (int)cu_dot4<signed char>((unsigned)a, (unsigned)b, (unsigned)c); }
CU_INLINE unsigned __dp4a(unsigned a, unsigned b, unsigned c) { return cu_dot4<unsigned char>(a, b, c); }
template <class Half, class Byte> CU_INLINE unsigned cu_dot2(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 2; ++i) c += (unsigned)((int)(Half)(a >> 16 * i) * (int)(Byte)(b >> 8 * i));
  return c;
}
CU_INLINE int __dp2a_lo(int a, int b, int c) { return (int)cu_dot2<short, signed char>((unsigned)a, (unsigned)b, (unsigned)c); }
CU_INLINE int __dp2a_hi(int a, int b, int c) { return __dp2a_lo(a, (int)((unsigned)b >> 16), c); }
CU_INLINE unsigned __dp2a_lo(unsigned a, unsigned b, unsigned c) { return cu_dot2<unsigned short, unsigned char>(a, b, c); }
CU_INLINE unsigned __dp2a_hi(unsigned a, unsigned b, unsigned c) { return __dp2a_lo(a, b >> 16, c); }

// ---- conversions: rn to nearest even, rz towards zero, rd down, ru up

template <class To, class From> CU_INLINE To cu_saturated(From x) {
  const From above = (From)((To)1 << (sizeof(To) * 8 - 2)) * ((To)-1 < 0 ? 2 : 4);      // the first value beyond the range
  const To most = (To)-1 < 0 ? (To)~((To)1 << (sizeof(To) * 8 - 1)) : (To)-1;
  if (!(x == x)) return 0;
  if (x >= above) return most;
  if ((To)-1 < 0 ? x < -above : x < 0) return (To)~most;
  return (To)x;
}
#define CU_TO_INTEGER(from, to, From, To, f) \
  CU_INLINE To __##from##2##to##_rn(From x) { return cu_saturated<To>(rint##f(x)); } \
  CU_INLINE To __##from##2##to##_rz(From x) { return cu_saturated<To>(trunc##f(x)); } \
  CU_INLINE To __##from##2##to##_rd(From x) { return cu_saturated<To>(floor##f(x)); } \
  CU_INLINE To __##from##2##to##_ru(From x) { return cu_saturated<To>(ceil##f(x)); }
#define CU_TO_INTEGERS(from, From, f) \
  CU_TO_INTEGER(from, int, From, int, f) CU_TO_INTEGER(from, uint, From, unsigned, f) \
  CU_TO_INTEGER(from, ll, From, long long, f) CU_TO_INTEGER(from, ull, From, unsigned long long, f)
CU_TO_INTEGERS(float, float, f)
CU_TO_INTEGERS(double, double, )

CU_INLINE double __int2double_rn(int x) { return x; }
CU_INLINE double __uint2double_rn(unsigned x) { return x; }
CU_INLINE long long __double_as_longlong(double x) { return cu_bits<long long>(x); }
CU_INLINE double __longlong_as_double(long long x) { return cu_bits<double>(x); }
CU_INLINE int __double2hiint(double x) { return (int)(cu_bits<long long>(x) >> 32); }
CU_INLINE int __double2loint(double x) { return (int)cu_bits<long long>(x); }
CU_INLINE double __hiloint2double(int high, int low) {
  return cu_bits<double>((long long)((unsigned long long)(unsigned)high << 32 | (unsigned)low));
}
