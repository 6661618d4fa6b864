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

int atomicCAS(int* p, int expected, int value);
unsigned atomicCAS(unsigned* p, unsigned expected, unsigned value);
unsigned long long atomicCAS(unsigned long long* p, unsigned long long expected, unsigned long long value);
