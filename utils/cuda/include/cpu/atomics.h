// Atomics. A kernel that uses them runs on one OS thread, so that sums of floats come out the same every time.
#pragma once

#define CU_ATOMIC(name, op) \
  CU_INLINE int name(int* p, int v) { return cu_atomic_i32(p, v, op); } \
  CU_INLINE unsigned name(unsigned* p, unsigned v) { return cu_atomic_u32(p, v, op); } \
  CU_INLINE unsigned long long name(unsigned long long* p, unsigned long long v) { return cu_atomic_u64(p, v, op); }

CU_ATOMIC(atomicAdd, CU_ADD)
CU_ATOMIC(atomicMax, CU_MAX)
CU_ATOMIC(atomicMin, CU_MIN)
CU_ATOMIC(atomicExch, CU_EXCHANGE)
CU_ATOMIC(atomicAnd, CU_AND)
CU_ATOMIC(atomicOr, CU_OR)
CU_ATOMIC(atomicXor, CU_XOR)

// As on a GPU: no 64-bit atomicSub, and floats only add and exchange.
CU_INLINE int atomicSub(int* p, int v) { return cu_atomic_i32(p, v, CU_SUB); }
CU_INLINE unsigned atomicSub(unsigned* p, unsigned v) { return cu_atomic_u32(p, v, CU_SUB); }
CU_INLINE float atomicAdd(float* p, float v) { return cu_atomic_f32(p, v, CU_ADD); }
CU_INLINE double atomicAdd(double* p, double v) { return cu_atomic_f64(p, v, CU_ADD); }
CU_INLINE float atomicExch(float* p, float v) { return cu_atomic_f32(p, v, CU_EXCHANGE); }

CU_INLINE unsigned atomicCAS(unsigned* p, unsigned expected, unsigned v) { return cu_atomic_cas_u32(p, expected, v); }
CU_INLINE int atomicCAS(int* p, int expected, int v) {
  return (int)cu_atomic_cas_u32((unsigned*)p, (unsigned)expected, (unsigned)v);
}
CU_INLINE unsigned long long atomicCAS(unsigned long long* p, unsigned long long expected, unsigned long long v) {
  return cu_atomic_cas_u64(p, expected, v);
}
