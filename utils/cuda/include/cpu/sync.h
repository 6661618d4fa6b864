// Barriers, votes and shuffles. Each call in the source gets a number of its own, which its copies in templates, inlined
// functions and loops share.
#pragma once

#define CU_HERE CuPlace(__builtin_LINE(), __COUNTER__)

#ifdef CU_CHECKED
struct CuFrom {
  CuCalls before;
  CU_UNCHECKED CuFrom(int line, unsigned call) : before(cu_enter(line, call)) {}
  CU_UNCHECKED ~CuFrom() { cu_leave(before); }
};
#endif

CU_INLINE void __syncthreads(CuPlace place) { cu_syncthreads(place); }
CU_INLINE int __syncthreads_count(CuPlace place, int p) { return cu_syncthreads_vote(p, CU_COUNT, place); }
CU_INLINE int __syncthreads_and(CuPlace place, int p) { return cu_syncthreads_vote(p, CU_ALL, place); }
CU_INLINE int __syncthreads_or(CuPlace place, int p) { return cu_syncthreads_vote(p, CU_ANY, place); }
CU_INLINE void __syncwarp(CuPlace place, unsigned mask = 0xffffffffu) { cu_syncwarp(mask, place); }
#ifdef CU_CHECKED                          // every store is seen at once, but a right kernel asks for it
extern "C" void cu_threadfence();
CU_INLINE void __threadfence() { cu_threadfence(); }
#else
CU_INLINE void __threadfence() {}
#endif
CU_INLINE void __threadfence_block() {}
CU_INLINE void __threadfence_system() { __threadfence(); }
CU_INLINE void __nanosleep(unsigned) {}

CU_INLINE unsigned __ballot_sync(CuPlace place, unsigned mask, int p) { return cu_ballot(mask, p, place, "__ballot_sync"); }
CU_INLINE int __any_sync(CuPlace place, unsigned mask, int p) { return cu_ballot(mask, p, place, "__any_sync") != 0; }
CU_INLINE int __all_sync(CuPlace place, unsigned mask, int p) { return cu_ballot(mask, !p, place, "__all_sync") == 0; }
CU_INLINE unsigned __activemask(CuPlace place) { return cu_converged(place); }

template <class T> CU_INLINE T cu_shuffled(T value, unsigned mask, int source, CuPlace place, const char* name) {
  static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes");
  cu_shuffle(&value, sizeof(T), mask, source, place, name);
  return value;
}

// The lanes of a shuffle stay in segments of `width`, a power of two.
CU_INLINE void cu_check_width(int width, CuPlace place, const char* name) {
#ifdef CU_CHECKED
  if (width < 1 || width > 32 || (width & (width - 1))) cu_wrong_width(width, place, name);
#else
  (void)width, (void)place, (void)name;
#endif
}

template <class T> CU_INLINE T __shfl_sync(CuPlace place, unsigned mask, T value, int source, int width = 32) {
  cu_check_width(width, place, "__shfl_sync");
  int first = (int)cu_lane() & ~(width - 1);
  return cu_shuffled(value, mask, first + (source & (width - 1)), place, "__shfl_sync");
}

template <class T> CU_INLINE T __shfl_xor_sync(CuPlace place, unsigned mask, T value, int x, int width = 32) {
  cu_check_width(width, place, "__shfl_xor_sync");
  int lane = (int)cu_lane(), source = lane ^ x;
  bool reachable = (source & ~(width - 1)) <= lane;          // a later segment of `width` lanes is out of reach
  return cu_shuffled(value, mask, reachable ? source & 31 : -1, place, "__shfl_xor_sync");
}

template <class T> CU_INLINE T __shfl_down_sync(CuPlace place, unsigned mask, T value, unsigned delta, int width = 32) {
  cu_check_width(width, place, "__shfl_down_sync");
  unsigned lane = cu_lane();
  bool reachable = (lane & (unsigned)(width - 1)) + delta < (unsigned)width;
  return cu_shuffled(value, mask, reachable ? (int)(lane + delta) : -1, place, "__shfl_down_sync");
}

template <class T> CU_INLINE T __shfl_up_sync(CuPlace place, unsigned mask, T value, unsigned delta, int width = 32) {
  cu_check_width(width, place, "__shfl_up_sync");
  unsigned lane = cu_lane();
  bool reachable = (lane & (unsigned)(width - 1)) >= delta;
  return cu_shuffled(value, mask, reachable ? (int)(lane - delta) : -1, place, "__shfl_up_sync");
}

// ---- what lanes have in common: every lane sees the values of all lanes of the mask

template <class T> CU_UNCHECKED inline unsigned __match_any_sync(CuPlace place, unsigned mask, T value) {
  T all[32];
  unsigned present = cu_exchange(&value, sizeof value, mask, all, place, "__match_any_sync"), same = 0;
  for (int l = 0; l < 32; ++l)
    if (present >> l & 1 && __builtin_memcmp(&all[l], &value, sizeof value) == 0) same |= 1u << l;
  return same;
}

template <class T> CU_UNCHECKED inline unsigned __match_all_sync(CuPlace place, unsigned mask, T value, int* all_equal) {
  T all[32];
  unsigned present = cu_exchange(&value, sizeof value, mask, all, place, "__match_all_sync"), same = 0;
  for (int l = 0; l < 32; ++l)
    if (present >> l & 1 && __builtin_memcmp(&all[l], &value, sizeof value) == 0) same |= 1u << l;
  *all_equal = same == present;
  return *all_equal ? mask : 0;
}

#define CU_REDUCE(what, T, expression) \
  CU_UNCHECKED inline T __reduce_##what##_sync(CuPlace place, unsigned mask, T value) { \
    T all[32]; \
    unsigned present = cu_exchange(&value, sizeof value, mask, all, place, "__reduce_" #what "_sync"); \
    bool first = true; \
    for (int l = 0; l < 32; ++l) { \
      if (!(present >> l & 1)) continue; \
      T a = value, b = all[l]; \
      value = first ? b : expression; \
      first = false; \
    } \
    return value; \
  }
CU_REDUCE(add, unsigned, a + b) CU_REDUCE(add, int, (int)((unsigned)a + (unsigned)b))
CU_REDUCE(min, unsigned, b < a ? b : a) CU_REDUCE(min, int, b < a ? b : a)
CU_REDUCE(max, unsigned, a < b ? b : a) CU_REDUCE(max, int, a < b ? b : a)
CU_REDUCE(and, unsigned, a & b) CU_REDUCE(or, unsigned, a | b) CU_REDUCE(xor, unsigned, a ^ b)

#define __activemask() __activemask(CU_HERE)
#define __match_any_sync(...) __match_any_sync(CU_HERE, __VA_ARGS__)
#define __match_all_sync(...) __match_all_sync(CU_HERE, __VA_ARGS__)
#define __reduce_add_sync(...) __reduce_add_sync(CU_HERE, __VA_ARGS__)
#define __reduce_min_sync(...) __reduce_min_sync(CU_HERE, __VA_ARGS__)
#define __reduce_max_sync(...) __reduce_max_sync(CU_HERE, __VA_ARGS__)
#define __reduce_and_sync(...) __reduce_and_sync(CU_HERE, __VA_ARGS__)
#define __reduce_or_sync(...) __reduce_or_sync(CU_HERE, __VA_ARGS__)
#define __reduce_xor_sync(...) __reduce_xor_sync(CU_HERE, __VA_ARGS__)
#define __syncthreads() __syncthreads(CU_HERE)
#define __syncthreads_count(...) __syncthreads_count(CU_HERE, __VA_ARGS__)
#define __syncthreads_and(...) __syncthreads_and(CU_HERE, __VA_ARGS__)
#define __syncthreads_or(...) __syncthreads_or(CU_HERE, __VA_ARGS__)
#define __syncwarp(...) __syncwarp(CU_HERE, ##__VA_ARGS__)
#define __ballot_sync(...) __ballot_sync(CU_HERE, __VA_ARGS__)
#define __any_sync(...) __any_sync(CU_HERE, __VA_ARGS__)
#define __all_sync(...) __all_sync(CU_HERE, __VA_ARGS__)
#define __shfl_sync(...) __shfl_sync(CU_HERE, __VA_ARGS__)
#define __shfl_xor_sync(...) __shfl_xor_sync(CU_HERE, __VA_ARGS__)
#define __shfl_down_sync(...) __shfl_down_sync(CU_HERE, __VA_ARGS__)
#define __shfl_up_sync(...) __shfl_up_sync(CU_HERE, __VA_ARGS__)
