// Vector types. A GPU moves a float4 as one access of 16 bytes, and so must we for the counts to be right. Left alone,
// gcc splits the copy into fields, and clang emits a memcpy, which its load and store callbacks do not see, or drops
// the fields that are not used. So a vector copies as one machine word of its size, and the checked build hides from the
// compiler what happens to the word between load and store.
#pragma once

#define CU_METHOD inline __attribute__((always_inline))

template <size_t bytes> struct CuWord;
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

CU_VECTOR_2(float2, float) CU_VECTOR_3(float3, float) CU_VECTOR_4(float4, float)
CU_VECTOR_2(int2, int) CU_VECTOR_3(int3, int) CU_VECTOR_4(int4, int)
CU_VECTOR_2(uint2, unsigned) CU_VECTOR_4(uint4, unsigned)
CU_VECTOR_2(double2, double) CU_VECTOR_2(longlong2, long long)
CU_VECTOR_2(short2, short) CU_VECTOR_4(short4, short) CU_VECTOR_4(ushort4, unsigned short)
CU_VECTOR_4(char4, signed char) CU_VECTOR_4(uchar4, unsigned char)
struct float1 { float x; };
struct int1 { int x; };
struct uint1 { unsigned x; };
CU_INLINE uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
