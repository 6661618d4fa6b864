// The words of CUDA C++ as ordinary C++17, so that a kernel's source compiles for a CPU as it stands.
// Included before the kernel's first line by compile.py. Uses no C++ library: with zig that alone takes
// minutes to build.
#pragma once
#define CU_ON_CPU 1

#include <float.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu/keywords.h"
#include "cpu/runtime.h"
#include "cpu/sync.h"
#include "cpu/atomics.h"
#include "cpu/math.h"
#include "cpu/vectors.h"
#include "cpu/half.h"
#include "cpu/pipeline.h"
#include "cpu/wmma.h"
#include "cpu/entry.h"

// Inline PTX has no meaning here. The name is undeclared, so the compiler stops at the learner's line.
#define asm CU_ONLY_ON_A_GPU
#define __asm__ CU_ONLY_ON_A_GPU
