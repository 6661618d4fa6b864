// Vector types. A GPU moves a float4 as one access of 16 bytes, and so must we for the counts to be right. Left alone,
// gcc splits the copy into fields, and clang emits a memcpy, which its load and store callbacks do not see, or drops
// the fields that are not used. So a vector copies as one machine word of its size, and the checked build hides from the
// compiler what happens to the word between load and store.
#pragma once

#define CU_METHOD inline __attribute__((always_inline))

template <size_t bytes> struct CuWord;
template <> struct CuWord<1> { typedef unsigned char type __attribute__((may_alias)); };
template <> struct CuWord<2> { typedef unsigned short type __attribute__((may_alias)); };
template <> struct CuWord<4> { typedef unsigned type __attribute__((may_alias)); };
template <> struct CuWord<8> { typedef unsigned long long type __attribute__((may_alias)); };
template <> struct CuWord<16> { typedef int type __attribute__((vector_size(16), may_alias)); };

template <class Word> CU_INLINE Word cu_whole(Word word) {
#if defined(CU_CHECKED) && defined(__x86_64__)
  if constexpr (sizeof(Word) == 16) __asm__("" : "+x"(word)); else __asm__("" : "+r"(word));
#elif defined(CU_CHECKED) && defined(__aarch64__)
  if constexpr (sizeof(Word) == 16) __asm__("" : "+w"(word)); else __asm__("" : "+r"(word));
#endif
  return word;
}

#define CU_COPY_WHOLE(bytes) *(CuWord<bytes>::type*)this = cu_whole(*(const CuWord<bytes>::type*)&o)
#define CU_COPIES_WHOLE(N, bytes) \
    N() = default; \
    CU_METHOD N(const N& o) { CU_COPY_WHOLE(bytes); } \
    CU_METHOD N& operator=(const N& o) { CU_COPY_WHOLE(bytes); return *this; }

#define CU_VECTOR_2(N, T) \
  struct __attribute__((aligned(2 * sizeof(T)))) N { \
    T x, y; \
    CU_COPIES_WHOLE(N, 2 * sizeof(T)) \
    CU_METHOD N(T a, T b) : x(a), y(b) {} \
  }; \
  CU_INLINE N make_##N(T x, T y) { return N(x, y); }

#define CU_VECTOR_3(N, T) /* three accesses, as on a GPU */ \
  struct N { \
    T x, y, z; \
    N() = default; \
    CU_METHOD N(T a, T b, T c) : x(a), y(b), z(c) {} \
    CU_METHOD N(const N& o) : x(o.x), y(o.y), z(o.z) {} \
    CU_METHOD N& operator=(const N& o) { x = o.x; y = o.y; z = o.z; return *this; } \
  }; \
  CU_INLINE N make_##N(T x, T y, T z) { return N(x, y, z); }

#define CU_VECTOR_4(N, T) \
  struct __attribute__((aligned(4 * sizeof(T)))) N { \
    T x, y, z, w; \
    CU_COPIES_WHOLE(N, 4 * sizeof(T)) \
    CU_METHOD N(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {} \
  }; \
  CU_INLINE N make_##N(T x, T y, T z, T w) { return N(x, y, z, w); }

#define CU_VECTOR_4_WIDE(N, T) /* 32 bytes: more than one access, as on most GPUs */ \
  struct __attribute__((aligned(16))) N { \
    T x, y, z, w; \
    N() = default; \
    CU_METHOD N(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {} \
    CU_METHOD N(const N& o) : x(o.x), y(o.y), z(o.z), w(o.w) {} \
    CU_METHOD N& operator=(const N& o) { x = o.x; y = o.y; z = o.z; w = o.w; return *this; } \
  }; \
  CU_INLINE N make_##N(T x, T y, T z, T w) { return N(x, y, z, w); }
#define CU_VECTOR_1(N, T) \
  struct N { T x; }; \
  CU_INLINE N make_##N(T x) { return {x}; }

#define CU_VECTORS(name, T) CU_VECTOR_1(name##1, T) CU_VECTOR_2(name##2, T) CU_VECTOR_3(name##3, T) CU_VECTOR_4(name##4, T)
#define CU_VECTORS_WIDE(name, T) CU_VECTOR_1(name##1, T) CU_VECTOR_2(name##2, T) CU_VECTOR_3(name##3, T) CU_VECTOR_4_WIDE(name##4, T)
CU_VECTORS(float, float) CU_VECTORS(int, int) CU_VECTORS(short, short) CU_VECTORS(ushort, unsigned short)
CU_VECTORS(char, signed char) CU_VECTORS(uchar, unsigned char)
CU_VECTOR_1(uint1, unsigned) CU_VECTOR_2(uint2, unsigned) CU_VECTOR_4(uint4, unsigned)      // uint3: keywords.h
CU_VECTORS_WIDE(double, double) CU_VECTORS_WIDE(longlong, long long) CU_VECTORS_WIDE(ulonglong, unsigned long long)
CU_VECTORS_WIDE(long, long) CU_VECTORS_WIDE(ulong, unsigned long)
CU_ATOMIC_ADD(float2, float2(old.x + value.x, old.y + value.y))
CU_ATOMIC_ADD(float4, float4(old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w))
CU_INLINE uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

CU_INLINE int __dp4a(char4 a, char4 b, int c) { return c + a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
CU_INLINE unsigned __dp4a(uchar4 a, uchar4 b, unsigned c) {
  return c + (unsigned)(a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w);
}
CU_INLINE int __dp2a_lo(short2 a, char4 b, int c) { return c + a.x * b.x + a.y * b.y; }
CU_INLINE int __dp2a_hi(short2 a, char4 b, int c) { return c + a.x * b.z + a.y * b.w; }
CU_INLINE unsigned __dp2a_lo(ushort2 a, uchar4 b, unsigned c) { return c + (unsigned)(a.x * b.x + a.y * b.y); }
CU_INLINE unsigned __dp2a_hi(ushort2 a, uchar4 b, unsigned c) { return c + (unsigned)(a.x * b.z + a.y * b.w); }
