// What the runtime knows of the block that is running.
#pragma once

enum { WARP = 32, MAX_WARPS = 32, SLOT = 16 };
enum { STACK_BYTES = 96 * 1024 };
enum { STACK_SKEW = 1088 };        // an odd distance between stacks keeps their tops out of the same cache sets
enum { SLACK_BYTES = 256 * 1024 };      // below the first stack: an overflow is to be reported, not to ruin the heap
enum { CANARIES = 8 };             // words at the low end of a stack; one that changed means an overflow
static const uint64_t CANARY = 0xC0FFEE5AFEC0DEull;

enum FiberState { READY, AT_BARRIER, AT_WARP_SYNC, CONVERGING, AT_MBARRIER, LOG_FULL, DONE };

// Everything a warp does to memory is first logged lane by lane, and judged when all 32 lanes have caught up.
// LANDED: the store of a finished cp.async. EXCHANGE: an atomic that may be the first to write a cell.
enum AccessKind : uint8_t { LOAD, STORE, ATOMIC, WARP_SYNC, LANDED, EXCHANGE };
struct Access {
  uint64_t address;
  uint32_t place;                  // the call site in the kernel, as an offset; Python knows its source line
  uint16_t region;
  uint8_t size;
  AccessKind kind;
};

struct AsyncCopy {
  void* to;
  const void* from;
  unsigned bytes, zeros, group;
  uintptr_t place;
  void* barrier;                   // that waits for it, in this phase (mbarrier.h); or null
  unsigned phase;
};

struct Fiber {
  void* sp;
  char *stack, *stack_end;
  FiberState state;
  uint3 thread;
  unsigned id;
  // what it waits for
  int predicate;
  CuPlace place;
  CuCalls calls;                   // those that it is in: calls.py
  unsigned mask, size;
  const char* name;
  const void* waits_for;           // a barrier in shared memory, and which phase of it: mbarrier.h
  unsigned phase;
  bool by_parity;
  uint32_t fence_epoch;            // when it last called __threadfence(): order.h
  char slot[SLOT];                 // the value it offers to the other lanes
  // its cp.async copies
  AsyncCopy* copies;
  unsigned n_copies, copy_capacity, group;
  // its log
  Access* log;
  uint32_t n_log, log_capacity;
  // while it is traced: the values of its accesses that are not yet judged, and a store whose value is still to come
  uint8_t (*values)[16];
  uint32_t n_values, first_value, value_capacity, due_size;
  uint64_t due_address;
};

struct Block {
  Fiber* fiber;
  unsigned n_threads;
  char* stacks;
  Fiber *current, *last;           // null while the scheduler itself runs; the one that ran last
  void* scheduler;                 // its stack pointer while a fiber runs
  void (*entry)(void**);
  void** arguments;
  uint3 index, block_dim, grid_dim;
  char* dynamic_shared;
  size_t dynamic_bytes;
  char (*offered)[WARP * SLOT];    // for each warp, the slots of its lanes when a collective completed
  unsigned* alive;                 // for each warp, the lanes that had not returned then
  int vote[3];
  bool stopped;
  int schedule;                    // enum Schedule
  uint64_t seed;
};
static PER_OS_THREAD Block B;
static bool tracing;               // the block that runs is the one that somebody looks at: trace.h
static bool comparing;             // the values of stores are wanted, to tell races that do no harm: races.h

// In which order blocks, warps and lanes have their turns. A right kernel gives the same in any.
enum Schedule { FORWARD, REVERSE, RANDOM };
struct Order {
  uint64_t n, start, stride;
  uint64_t operator()(uint64_t i) const { return (start + i * stride) % n; }
};

static Order order_of(uint64_t n) {
  if (B.schedule == FORWARD) return {n, 0, 1};
  if (B.schedule == REVERSE) return {n, n - 1, n - 1};
  B.seed = B.seed * 6364136223846793005ull + 1442695040888963407ull;
  uint64_t stride = (B.seed >> 33) % n, a = 0;
  do {                             // a stride that meets every one of n
    stride = stride % n + 1;
    a = stride;
    for (uint64_t b = n; b;) { uint64_t rest = a % b; a = b; b = rest; }
  } while (a != 1);
  return {n, (B.seed >> 40) % n, stride};
}

static void to_scheduler() { Fiber* f = B.current; cu_switch(&f->sp, B.scheduler); }
static void stop_kernel() { B.stopped = true; to_scheduler(); }
static unsigned lanes_of(unsigned warp) {
  unsigned left = B.n_threads - warp * WARP;
  return left < (unsigned)WARP ? left : (unsigned)WARP;
}
