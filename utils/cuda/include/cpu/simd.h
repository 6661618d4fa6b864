// Two halves or four bytes of a word at once, and the three-operand minima and maxima. Included where a source uses them.
#pragma once

template <int bits> CU_INLINE int cu_signed(unsigned word, int at) { return (int)(word << (32 - bits - at)) >> (32 - bits); }
template <int bits> CU_INLINE int cu_unsigned(unsigned word, int at) { return (int)(word >> at & ((1u << bits) - 1)); }

// `x` and `y` are the parts, as numbers that are `kind` (signed or unsigned); MOST and LEAST the range of such a part.
#define CU_PARTS(name, bits, kind, expression) \
  CU_INLINE unsigned name(unsigned a, unsigned b) { \
    unsigned result = 0; \
    for (int at = 0; at < 32; at += bits) { \
      const int x = cu_##kind<bits>(a, at), y = cu_##kind<bits>(b, at); \
      result |= ((unsigned)(expression) & ((1u << bits) - 1)) << at; \
    } \
    return result; \
  }
#define CU_PARTS_1(name, bits, expression) \
  CU_PARTS(cu_of##name, bits, signed, (y, expression)) \
  CU_INLINE unsigned name(unsigned a) { return cu_of##name(a, 0); }
#define CU_BOTH(name, kind, e2, e4) CU_PARTS(name##2, 16, kind, e2) CU_PARTS(name##4, 8, kind, e4)
#define CU_SAME(name, kind, e) CU_BOTH(name, kind, e, e)
#define CU_CLAMP(v, low, high) ((v) < (low) ? (low) : (v) > (high) ? (high) : (v))
#define CU_CLAMPED_S(name, v) CU_BOTH(name, signed, CU_CLAMP(v, -32768, 32767), CU_CLAMP(v, -128, 127))
#define CU_CLAMPED_U(name, v) CU_BOTH(name, unsigned, CU_CLAMP(v, 0, 65535), CU_CLAMP(v, 0, 255))
#define CU_COMPARED(name, kind, op) CU_SAME(__vcmp##name, kind, x op y ? ~0u : 0u) CU_SAME(__vset##name, kind, x op y)

CU_SAME(__vadd, unsigned, x + y) CU_SAME(__vsub, unsigned, x - y)
CU_CLAMPED_S(__vaddss, x + y) CU_CLAMPED_U(__vaddus, x + y) CU_CLAMPED_S(__vsubss, x - y) CU_CLAMPED_U(__vsubus, x - y)
CU_SAME(__vabsdiffs, signed, x > y ? x - y : y - x) CU_SAME(__vabsdiffu, unsigned, x > y ? x - y : y - x)
CU_SAME(__vavgs, signed, (x + y + (x + y >= 0)) >> 1) CU_SAME(__vavgu, unsigned, (x + y + 1) >> 1)
CU_SAME(__vhaddu, unsigned, (x + y) >> 1)
CU_SAME(__vmaxs, signed, x > y ? x : y) CU_SAME(__vmaxu, unsigned, x > y ? x : y)
CU_SAME(__vmins, signed, x < y ? x : y) CU_SAME(__vminu, unsigned, x < y ? x : y)
CU_COMPARED(eq, signed, ==) CU_COMPARED(ne, signed, !=)
CU_COMPARED(ges, signed, >=) CU_COMPARED(geu, unsigned, >=) CU_COMPARED(gts, signed, >) CU_COMPARED(gtu, unsigned, >)
CU_COMPARED(les, signed, <=) CU_COMPARED(leu, unsigned, <=) CU_COMPARED(lts, signed, <) CU_COMPARED(ltu, unsigned, <)
CU_PARTS_1(__vabs2, 16, x < 0 ? -x : x) CU_PARTS_1(__vabs4, 8, x < 0 ? -x : x)
CU_PARTS_1(__vneg2, 16, -x) CU_PARTS_1(__vneg4, 8, -x)
CU_PARTS_1(__vabsss2, 16, CU_CLAMP(x < 0 ? -x : x, 0, 32767)) CU_PARTS_1(__vabsss4, 8, CU_CLAMP(x < 0 ? -x : x, 0, 127))
CU_PARTS_1(__vnegss2, 16, CU_CLAMP(-x, -32768, 32767)) CU_PARTS_1(__vnegss4, 8, CU_CLAMP(-x, -128, 127))

#define CU_SUM_OF_DIFFERENCES(name, bits, kind) \
  CU_INLINE unsigned name(unsigned a, unsigned b) { \
    unsigned sum = 0; \
    for (int at = 0; at < 32; at += bits) { \
      int d = cu_##kind<bits>(a, at) - cu_##kind<bits>(b, at); \
      sum += (unsigned)(d < 0 ? -d : d); \
    } \
    return sum; \
  }
CU_SUM_OF_DIFFERENCES(__vsads2, 16, signed) CU_SUM_OF_DIFFERENCES(__vsads4, 8, signed)
CU_SUM_OF_DIFFERENCES(__vsadu2, 16, unsigned) CU_SUM_OF_DIFFERENCES(__vsadu4, 8, unsigned)

// ---- minima and maxima of two or three, of a sum and a number, with 0 (relu), and with which one it was (vib)

#define CU_EXTREME(m, op, T, kind, S) \
  CU_INLINE T cu_##m##_##S(T x, T y) { return x op y ? x : y; } \
  CU_INLINE T __vi##m##3_##S(T a, T b, T c) { return cu_##m##_##S(cu_##m##_##S(a, b), c); } \
  CU_INLINE T __viadd##m##_##S(T a, T b, T c) { return cu_##m##_##S((T)((unsigned)a + (unsigned)b), c); } \
  CU_INLINE T __vib##m##_##S(T a, T b, bool* first) { *first = a op##= b; return *first ? a : b; } \
  CU_PARTS(cu_##m##_##kind##16, 16, kind, x op y ? x : y)
CU_EXTREME(max, >, int, signed, s32) CU_EXTREME(min, <, int, signed, s32)
#undef CU_EXTREME
#define CU_EXTREME_U(m, op) \
  CU_INLINE unsigned cu_##m##_u32(unsigned x, unsigned y) { return x op y ? x : y; } \
  CU_INLINE unsigned __vi##m##3_u32(unsigned a, unsigned b, unsigned c) { return cu_##m##_u32(cu_##m##_u32(a, b), c); } \
  CU_INLINE unsigned __viadd##m##_u32(unsigned a, unsigned b, unsigned c) { return cu_##m##_u32(a + b, c); } \
  CU_INLINE unsigned __vib##m##_u32(unsigned a, unsigned b, bool* first) { *first = a op##= b; return *first ? a : b; } \
  CU_PARTS(cu_##m##_unsigned16, 16, unsigned, x op y ? x : y)
CU_EXTREME_U(max, >) CU_EXTREME_U(min, <)
#define CU_EXTREME_PAIR(m, op, kind, S) \
  CU_INLINE unsigned __vi##m##3_##S(unsigned a, unsigned b, unsigned c) { \
    return cu_##m##_##kind##16(cu_##m##_##kind##16(a, b), c); \
  } \
  CU_INLINE unsigned __viadd##m##_##S(unsigned a, unsigned b, unsigned c) { return cu_##m##_##kind##16(__vadd2(a, b), c); } \
  CU_INLINE unsigned __vib##m##_##S(unsigned a, unsigned b, bool* high, bool* low) { \
    *high = cu_##kind<16>(a, 16) op##= cu_##kind<16>(b, 16); \
    *low = cu_##kind<16>(a, 0) op##= cu_##kind<16>(b, 0); \
    return cu_##m##_##kind##16(a, b); \
  }
CU_EXTREME_PAIR(max, >, signed, s16x2) CU_EXTREME_PAIR(min, <, signed, s16x2)
CU_EXTREME_PAIR(max, >, unsigned, u16x2) CU_EXTREME_PAIR(min, <, unsigned, u16x2)
#define CU_RELU(m) \
  CU_INLINE int __vi##m##_s32_relu(int a, int b) { return cu_max_s32(cu_##m##_s32(a, b), 0); } \
  CU_INLINE int __vi##m##3_s32_relu(int a, int b, int c) { return cu_max_s32(__vi##m##3_s32(a, b, c), 0); } \
  CU_INLINE int __viadd##m##_s32_relu(int a, int b, int c) { return cu_max_s32(__viadd##m##_s32(a, b, c), 0); } \
  CU_INLINE unsigned __vi##m##_s16x2_relu(unsigned a, unsigned b) { return cu_max_signed16(cu_##m##_signed16(a, b), 0); } \
  CU_INLINE unsigned __vi##m##3_s16x2_relu(unsigned a, unsigned b, unsigned c) { \
    return cu_max_signed16(__vi##m##3_s16x2(a, b, c), 0); \
  } \
  CU_INLINE unsigned __viadd##m##_s16x2_relu(unsigned a, unsigned b, unsigned c) { \
    return cu_max_signed16(__viadd##m##_s16x2(a, b, c), 0); \
  }
CU_RELU(max) CU_RELU(min)
