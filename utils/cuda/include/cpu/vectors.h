// Vector types. A GPU moves a float4 as one access of 16 bytes, and so must we for the counts to be right: clang would
// emit a memcpy, which its load and store callbacks do not see, so 16-byte types copy through a vector register.
#pragma once

#define CU_METHOD inline __attribute__((always_inline))

#define CU_VECTOR_1_2_3(T, N) \
  struct N##1 { T x; }; \
  struct __attribute__((aligned(2 * sizeof(T)))) N##2 { T x, y; }; \
  struct N##3 { \
    T x, y, z; \
    N##3() = default; \
    CU_METHOD N##3(T a, T b, T c) : x(a), y(b), z(c) {} \
    CU_METHOD N##3(const N##3& o) : x(o.x), y(o.y), z(o.z) {}       /* three accesses, as on a GPU */ \
    CU_METHOD N##3& operator=(const N##3& o) { x = o.x; y = o.y; z = o.z; return *this; } \
  }; \
  CU_INLINE N##1 make_##N##1(T x) { return {x}; } \
  CU_INLINE N##2 make_##N##2(T x, T y) { return {x, y}; } \
  CU_INLINE N##3 make_##N##3(T x, T y, T z) { return N##3(x, y, z); }

#define CU_COPY_AS_16_BYTES(N) \
    typedef int cu_vector __attribute__((vector_size(16), may_alias)); \
    N() = default; \
    CU_METHOD N(const N& o) { *(cu_vector*)this = *(const cu_vector*)&o; } \
    CU_METHOD N& operator=(const N& o) { *(cu_vector*)this = *(const cu_vector*)&o; return *this; }

#define CU_VECTOR_4(T, N) \
  struct __attribute__((aligned(16))) N##4 { \
    T x, y, z, w; \
    CU_COPY_AS_16_BYTES(N##4) \
    CU_METHOD N##4(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {} \
  }; \
  CU_INLINE N##4 make_##N##4(T x, T y, T z, T w) { return N##4(x, y, z, w); }

#define CU_VECTOR_2_OF_8_BYTES(T, N) \
  struct __attribute__((aligned(16))) N##2 { \
    T x, y; \
    CU_COPY_AS_16_BYTES(N##2) \
    CU_METHOD N##2(T a, T b) : x(a), y(b) {} \
  }; \
  CU_INLINE N##2 make_##N##2(T x, T y) { return N##2(x, y); }

CU_VECTOR_1_2_3(float, float)
CU_VECTOR_1_2_3(int, int)
CU_VECTOR_4(float, float)
CU_VECTOR_4(int, int)
CU_VECTOR_4(unsigned, uint)
CU_VECTOR_2_OF_8_BYTES(double, double)
CU_VECTOR_2_OF_8_BYTES(long long, longlong)

struct uint1 { unsigned x; };
struct __attribute__((aligned(8))) uint2 { unsigned x, y; };
struct __attribute__((aligned(4))) uchar4 { unsigned char x, y, z, w; };
struct __attribute__((aligned(4))) char4 { signed char x, y, z, w; };
struct __attribute__((aligned(8))) short4 { short x, y, z, w; };
CU_INLINE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
CU_INLINE uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
CU_INLINE uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) { return {x, y, z, w}; }
