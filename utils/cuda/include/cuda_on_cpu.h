// The words of CUDA C++ as ordinary C++17, so that a kernel's source compiles for a CPU as it stands.
// Included before the kernel's first line by compile.py. Uses no C++ library: with zig that alone takes
// minutes to build.
#pragma once
#define CU_ON_CPU 1

#include <float.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>

// What sources ask about the compiler: an Ampere GPU, whose instructions are the ones that are known here.
#define __CUDACC__ 1
#define __CUDA_ARCH__ 800
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define CUDART_VERSION 13000
#define CUDA_VERSION 13000

#include "cpu/keywords.h"
#include "cpu/runtime.h"
#include "cpu/sync.h"
#include "cpu/atomics.h"
#include "cpu/math.h"
#include "cpu/integers.h"
#include "cpu/vectors.h"
#include "cpu/half.h"
#include "cpu/pipeline.h"
#include "cpu/wmma.h"
#include "cpu/entry.h"
// Hundreds of functions that few sources use: binary.py asks for them by their names.
#ifdef CU_ROUNDING
#include "cpu/rounding.h"
#endif
#ifdef CU_SPECIAL
#include "cpu/special.h"
#endif
#ifdef CU_SIMD
#include "cpu/simd.h"
#endif
#ifdef CU_PTX
#include "cpu/ptx.h"
#endif
#ifdef CU_HALF_FUNCTIONS_TOO
#include "cpu/half_functions.h"
#endif

#ifdef CU_CHECKED
extern "C" void* cu_memcpy(void* to, const void* from, size_t n);
extern "C" void* cu_memset(void* to, int value, size_t n);
#define memcpy(...) cu_memcpy(__VA_ARGS__)
#define memset(...) cu_memset(__VA_ARGS__)
#endif

// Inline PTX has no meaning here. The name is undeclared, so the compiler stops at the learner's line.
#define asm CU_ONLY_ON_A_GPU
#define __asm__ CU_ONLY_ON_A_GPU
