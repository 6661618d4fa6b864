// The runtime of a kernel on a CPU: the threads of a block as fibers, barriers, warp collectives, and, in the checked
// build (-DCU_CHECKED), the log of every access with what follows from it: traffic, bank conflicts, races, bounds.
// One translation unit, compiled once for each compiler and build, without access callbacks.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu/keywords.h"
#include "cpu/runtime.h"
#include "cpu/atomics.h"
#include "cpu/pipeline.h"
#undef printf
#undef assert

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
#define CALLER ((uintptr_t)__builtin_return_address(0))
#define RARELY(x) __builtin_expect(!!(x), 0)
#define COLD __attribute__((noinline, cold))

#ifdef CU_CHECKED
enum { CHECKED = 1 };
#define PER_OS_THREAD              // blocks run one after another
#else
enum { CHECKED = 0 };
#define PER_OS_THREAD __thread     // blocks are spread over OS threads, each with its own state
#endif

#include "runtime/fiber_switch.h"
#include "runtime/state.h"
#include "runtime/problems.h"
#ifdef CU_CHECKED
#include "runtime/memory.h"
#include "runtime/trace.h"
#include "runtime/order.h"
#include "runtime/races.h"
#include "runtime/traffic.h"
#include "runtime/workers.h"
#include "runtime/pairing.h"
#else
#include "runtime/unchecked.h"
#endif
#include "runtime/mbarrier.h"
#include "runtime/device.h"
#include "runtime/scheduler.h"
#ifdef CU_CHECKED
#include "runtime/interface.h"
#endif
