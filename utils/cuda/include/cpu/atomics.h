// Atomics. Functions of the runtime and not of a header, so that the call in the kernel's line is the one that is seen.
// A kernel that uses them runs on one OS thread, so that sums of floats come out the same every time.
#pragma once

#define CU_ATOMIC_OF(name, T) T name(T* p, T value);
#define CU_ATOMIC(name) CU_ATOMIC_OF(name, int) CU_ATOMIC_OF(name, unsigned) CU_ATOMIC_OF(name, unsigned long long)
CU_ATOMIC(atomicAdd) CU_ATOMIC(atomicMax) CU_ATOMIC(atomicMin) CU_ATOMIC(atomicExch)
CU_ATOMIC(atomicAnd) CU_ATOMIC(atomicOr) CU_ATOMIC(atomicXor)

// As on a GPU: no 64-bit atomicSub, and floats only add and exchange.
CU_ATOMIC_OF(atomicSub, int)
CU_ATOMIC_OF(atomicSub, unsigned)
CU_ATOMIC_OF(atomicAdd, float)
CU_ATOMIC_OF(atomicAdd, double)
CU_ATOMIC_OF(atomicExch, float)
CU_ATOMIC_OF(atomicAnd, long long)
CU_ATOMIC_OF(atomicOr, long long)
CU_ATOMIC_OF(atomicXor, long long)
CU_ATOMIC_OF(atomicMin, long long)
CU_ATOMIC_OF(atomicMax, long long)
CU_ATOMIC_OF(atomicInc, unsigned)
CU_ATOMIC_OF(atomicDec, unsigned)

unsigned short atomicCAS(unsigned short* p, unsigned short expected, unsigned short value);
int atomicCAS(int* p, int expected, int value);
unsigned atomicCAS(unsigned* p, unsigned expected, unsigned value);
unsigned long long atomicCAS(unsigned long long* p, unsigned long long expected, unsigned long long value);

// With a scope: here an atomic is one for everybody.
#define atomicAdd_block atomicAdd
#define atomicAdd_system atomicAdd
#define atomicSub_block atomicSub
#define atomicSub_system atomicSub
#define atomicMin_block atomicMin
#define atomicMin_system atomicMin
#define atomicMax_block atomicMax
#define atomicMax_system atomicMax
#define atomicExch_block atomicExch
#define atomicExch_system atomicExch
#define atomicInc_block atomicInc
#define atomicInc_system atomicInc
#define atomicDec_block atomicDec
#define atomicDec_system atomicDec
#define atomicAnd_block atomicAnd
#define atomicAnd_system atomicAnd
#define atomicOr_block atomicOr
#define atomicOr_system atomicOr
#define atomicXor_block atomicXor
#define atomicXor_system atomicXor
#define atomicCAS_block atomicCAS
#define atomicCAS_system atomicCAS

// For types that the runtime does not know; defined where these are.
#define CU_ATOMIC_ADD(T, sum) \
  CU_UNCHECKED __attribute__((noinline)) inline T atomicAdd(T* p, T value) { \
    cu_log_atomic(p, sizeof(T), __builtin_return_address(0)); \
    T old = *p; \
    *p = sum; \
    return old; \
  }
