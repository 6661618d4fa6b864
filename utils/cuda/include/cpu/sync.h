// Barriers, votes and shuffles. A default argument of __builtin_LINE() is the line of the call.
#pragma once

#define CU_HERE int line = __builtin_LINE()

CU_INLINE void __syncthreads(CU_HERE) { cu_syncthreads(line); }
CU_INLINE int __syncthreads_count(int p, CU_HERE) { return cu_syncthreads_vote(p, CU_COUNT, line); }
CU_INLINE int __syncthreads_and(int p, CU_HERE) { return cu_syncthreads_vote(p, CU_ALL, line); }
CU_INLINE int __syncthreads_or(int p, CU_HERE) { return cu_syncthreads_vote(p, CU_ANY, line); }
CU_INLINE void __syncwarp(unsigned mask = 0xffffffffu, CU_HERE) { cu_syncwarp(mask, line); }
CU_INLINE void __threadfence() {}          // every store is seen at once
CU_INLINE void __threadfence_block() {}

CU_INLINE unsigned __ballot_sync(unsigned mask, int p, CU_HERE) { return cu_ballot(mask, p, line, "__ballot_sync"); }
CU_INLINE int __any_sync(unsigned mask, int p, CU_HERE) { return cu_ballot(mask, p, line, "__any_sync") != 0; }
CU_INLINE int __all_sync(unsigned mask, int p, CU_HERE) { return cu_ballot(mask, !p, line, "__all_sync") == 0; }
CU_INLINE unsigned __activemask() { return cu_activemask(); }

template <class T> CU_INLINE T cu_shuffled(T value, unsigned mask, int source, int line, const char* name) {
  static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes");
  cu_shuffle(&value, sizeof(T), mask, source, line, name);
  return value;
}

template <class T> CU_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32, CU_HERE) {
  int first = (int)cu_lane() & ~(width - 1);
  return cu_shuffled(value, mask, first + (source & (width - 1)), line, "__shfl_sync");
}

template <class T> CU_INLINE T __shfl_xor_sync(unsigned mask, T value, int x, int width = 32, CU_HERE) {
  int lane = (int)cu_lane(), source = lane ^ x;
  bool reachable = (source & ~(width - 1)) <= lane;          // a later segment of `width` lanes is out of reach
  return cu_shuffled(value, mask, reachable ? source & 31 : -1, line, "__shfl_xor_sync");
}

template <class T> CU_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CU_HERE) {
  unsigned lane = cu_lane();
  bool reachable = (lane & (unsigned)(width - 1)) + delta < (unsigned)width;
  return cu_shuffled(value, mask, reachable ? (int)(lane + delta) : -1, line, "__shfl_down_sync");
}

template <class T> CU_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CU_HERE) {
  unsigned lane = cu_lane();
  bool reachable = (lane & (unsigned)(width - 1)) >= delta;
  return cu_shuffled(value, mask, reachable ? (int)(lane - delta) : -1, line, "__shfl_up_sync");
}
