// The way in: a call with unpacked arguments, and a description of the arguments, both made from the kernel's own type.
// Nothing is parsed, so typedefs, templates and structs cannot be got wrong.
#pragma once

template <class T> struct CuCode { enum { value = 0 }; };      // 0: a struct, known by its size alone
#define CU_CODE(T, c) template <> struct CuCode<T> { enum { value = c }; };
CU_CODE(float, 'f') CU_CODE(double, 'd') CU_CODE(__half, 'e') CU_CODE(__nv_bfloat16, 'y')
CU_CODE(bool, '?') CU_CODE(char, 'b') CU_CODE(signed char, 'b') CU_CODE(unsigned char, 'B')
CU_CODE(short, 'h') CU_CODE(unsigned short, 'H') CU_CODE(int, 'i') CU_CODE(unsigned, 'I')
CU_CODE(long, (sizeof(long) == 8 ? 'q' : 'i')) CU_CODE(unsigned long, (sizeof(long) == 8 ? 'Q' : 'I'))
CU_CODE(long long, 'q') CU_CODE(unsigned long long, 'Q')
#define CU_POINTEE(T, c) template <> struct CuPointee<T> { enum { value = c }; };
template <class T> struct CuPointee { enum { value = CuCode<T>::value }; };      // arrays of vectors: arrays of numbers
CU_POINTEE(void, 'v') CU_POINTEE(__half2, 'e') CU_POINTEE(__nv_bfloat162, 'y')
#define CU_POINTEES(name, c) \
  CU_POINTEE(name##1, c) CU_POINTEE(name##2, c) CU_POINTEE(name##3, c) CU_POINTEE(name##4, c)
CU_POINTEES(float, 'f') CU_POINTEES(double, 'd') CU_POINTEES(char, 'b') CU_POINTEES(uchar, 'B') CU_POINTEES(short, 'h')
CU_POINTEES(ushort, 'H') CU_POINTEES(int, 'i') CU_POINTEES(uint, 'I') CU_POINTEES(longlong, 'q') CU_POINTEES(ulonglong, 'Q')
CU_POINTEES(long, (sizeof(long) == 8 ? 'q' : 'i')) CU_POINTEES(ulong, (sizeof(long) == 8 ? 'Q' : 'I'))

template <class T> struct CuSize { enum { value = sizeof(T) }; };
template <> struct CuSize<void> { enum { value = 1 }; };

struct CuArgument { char kind, code; unsigned size; };      // 's' by value, 'p' pointer, 'c' pointer to const
template <class T> struct CuDescribe { static constexpr CuArgument value = {'s', CuCode<T>::value, sizeof(T)}; };
template <class T> struct CuDescribe<const T> : CuDescribe<T> {};
template <class T> struct CuDescribe<T*> {
  static constexpr CuArgument value = {'p', CuPointee<T>::value, CuSize<T>::value};
};
template <class T> struct CuDescribe<const T*> {
  static constexpr CuArgument value = {'c', CuPointee<T>::value, CuSize<T>::value};
};
template <class T> struct CuDescribe<T* const> : CuDescribe<T*> {};

template <class T> struct CuElement {
  enum { size = sizeof(T) };
  static constexpr CuShape shape = {0, CuPointee<T>::value};
};
template <class T, size_t N> struct CuElement<T[N]> : CuElement<T> {
  static constexpr CuShape shape = {CuElement<T>::shape.columns ? CuElement<T>::shape.columns : (int)N, CuElement<T>::shape.code};
};

template <int... I> struct CuIndices {};
template <int N, int... I> struct CuCount : CuCount<N - 1, N - 1, I...> {};
template <int... I> struct CuCount<0, I...> { typedef CuIndices<I...> type; };

template <class... A, int... I> CU_UNCHECKED static inline void cu_apply(void (*f)(A...), void** a, CuIndices<I...>) {
  f(*(A*)a[I]...);
}
template <class... A> CU_UNCHECKED static inline void cu_enter(void (*f)(A...), void** a) {
  cu_apply(f, a, typename CuCount<sizeof...(A)>::type());
}
// Returns how many there are; `out` may be null.
template <class... A> CU_UNCHECKED static inline int cu_describe(void (*)(A...), CuArgument* out) {
  CuArgument all[] = {CuDescribe<A>::value..., CuArgument()};
  for (unsigned i = 0; out && i < sizeof...(A); ++i) out[i] = all[i];
  return sizeof...(A);
}

// Constant memory that a host fills by name. `code` and `element` as of an argument.
struct CuConstant { void* address; unsigned bytes, element; char code; };
template <class T> struct CuScalar { typedef T type; };
template <class T, size_t N> struct CuScalar<T[N]> : CuScalar<T> {};
template <class T> CU_INLINE CuConstant cu_constant(T& variable) {
  typedef typename CuScalar<T>::type Element;
  return {(void*)&variable, sizeof variable, sizeof(Element), CuPointee<Element>::value};
}

#if defined(_WIN32)
#define CU_EXPORT extern "C" __declspec(dllexport)
#else
#define CU_EXPORT extern "C" __attribute__((visibility("default"), used))
#endif
#define CU_ENTRY(...) \
  CU_EXPORT CU_UNCHECKED void cu_entry(void** arguments) { cu_enter(&__VA_ARGS__, arguments); } \
  CU_EXPORT CU_UNCHECKED int cu_signature(CuArgument* out) { return cu_describe(&__VA_ARGS__, out); }
#define CU_CONSTANTS(...) \
  CU_EXPORT CU_UNCHECKED int cu_constants(CuConstant* out) { \
    CuConstant all[] = {__VA_ARGS__ CuConstant()}; \
    int count = (int)(sizeof all / sizeof *all) - 1; \
    for (int i = 0; out && i < count; ++i) out[i] = all[i]; \
    return count; \
  }
