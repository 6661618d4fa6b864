// What NVRTC compiles before the learner's source. Here and not after it, so that no macro of theirs can reach in.

// What NVRTC lacks and CUDA source expects; the integers as CUDA's own headers define them for NVRTC.
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif
#define CUDA_VERSION CUDART_VERSION
#define HUGE_VALF INFINITY
#define HUGE_VAL ((double)INFINITY)
#define CHAR_BIT 8
#define SCHAR_MIN (-128)
#define SCHAR_MAX 127
#define UCHAR_MAX 255
#define SHRT_MIN (-32768)
#define SHRT_MAX 32767
#define USHRT_MAX 65535
#define LONG_MAX ((long)(~0ul >> 1))
#define LONG_MIN (-LONG_MAX - 1)
#define ULONG_MAX (~0ul)
#define LLONG_MAX 9223372036854775807ll
#define LLONG_MIN (-LLONG_MAX - 1)
#define ULLONG_MAX 18446744073709551615ull
#define INT8_MIN (-128)
#define INT8_MAX 127
#define UINT8_MAX 255
#define INT16_MIN (-32768)
#define INT16_MAX 32767
#define UINT16_MAX 65535
#define INT32_MIN INT_MIN
#define INT32_MAX INT_MAX
#define UINT32_MAX UINT_MAX
#define INT64_MIN LLONG_MIN
#define INT64_MAX LLONG_MAX
#define UINT64_MAX ULLONG_MAX
#define SIZE_MAX ULONG_MAX
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define DBL_MAX 1.7976931348623157e+308
#define DBL_MIN 2.2250738585072014e-308
#define DBL_EPSILON 2.2204460492503131e-16
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 4294967295u
typedef signed char int8_t;      typedef unsigned char uint8_t;
typedef short int16_t;           typedef unsigned short uint16_t;
typedef int int32_t;             typedef unsigned int uint32_t;
typedef long long int64_t;       typedef unsigned long long uint64_t;
typedef unsigned int uint;       typedef unsigned short ushort;        typedef unsigned long ulong;
typedef long long intptr_t;      typedef unsigned long long uintptr_t;

// A table of a kernel's arguments, filled in by the compiler. Parsing the parameter list instead would miss typedefs, macros
// and template parameters. kind: 's' by value, 'p' pointer, 'c' pointer to const; code: a letter of Python's struct module,
// 'y' bfloat16, 'v' void, 0 a struct; size: bytes of the value, or of what the pointer points to.
struct __half; struct __half2; struct __nv_bfloat16; struct __nv_bfloat162;
namespace course_signature {
template <class T> struct code { static constexpr char value = 0; };
#define COURSE_CODE(T, letter) template <> struct code<T> { static constexpr char value = letter; };
COURSE_CODE(float, 'f') COURSE_CODE(double, 'd') COURSE_CODE(__half, 'e') COURSE_CODE(__nv_bfloat16, 'y')
COURSE_CODE(bool, '?') COURSE_CODE(char, 'b') COURSE_CODE(signed char, 'b') COURSE_CODE(unsigned char, 'B')
COURSE_CODE(short, 'h') COURSE_CODE(unsigned short, 'H') COURSE_CODE(int, 'i') COURSE_CODE(unsigned, 'I')
COURSE_CODE(long, sizeof(long) == 8 ? 'q' : 'i') COURSE_CODE(unsigned long, sizeof(long) == 8 ? 'Q' : 'I')
COURSE_CODE(long long, 'q') COURSE_CODE(unsigned long long, 'Q')
template <class T> struct pointee : code<T> {};  // an array of vectors is an array of numbers
#define COURSE_POINTEE(T, letter) template <> struct pointee<T> { static constexpr char value = letter; };
COURSE_POINTEE(void, 'v') COURSE_POINTEE(float2, 'f') COURSE_POINTEE(float3, 'f') COURSE_POINTEE(float4, 'f')
COURSE_POINTEE(double2, 'd') COURSE_POINTEE(int2, 'i') COURSE_POINTEE(int3, 'i') COURSE_POINTEE(int4, 'i')
COURSE_POINTEE(uint2, 'I') COURSE_POINTEE(uint4, 'I') COURSE_POINTEE(__half2, 'e') COURSE_POINTEE(__nv_bfloat162, 'y')
template <class T> struct bytes { static constexpr unsigned value = sizeof(T); };
template <> struct bytes<void> { static constexpr unsigned value = 1; };

struct entry { char kind, code; unsigned size; };
template <class T> struct describe { static constexpr entry is = {'s', code<T>::value, bytes<T>::value}; };
template <class T> struct describe<T*> { static constexpr entry is = {'p', pointee<T>::value, bytes<T>::value}; };
template <class T> struct describe<const T*> { static constexpr entry is = {'c', pointee<T>::value, bytes<T>::value}; };
template <class F> struct table;
template <class... A> struct table<void (*)(A...)> {
  char mark[16]; int count; entry entries[sizeof...(A) + 1];
  static __device__ constexpr table make() {
    return {{'k','e','r','n','e','l',' ','s','i','g','n','a','t','u','r','e'}, sizeof...(A), {describe<A>::is..., {}}};
  }
};
}
