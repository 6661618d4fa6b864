// What the runtime knows of the block that is running.
#pragma once

enum { WARP = 32, MAX_WARPS = 32, SLOT = 16 };
enum { STACK_BYTES = 96 * 1024 };
enum { STACK_SKEW = 1088 };        // an odd distance between stacks keeps their tops out of the same cache sets
enum { SLACK_BYTES = 256 * 1024 };      // below the first stack: an overflow is to be reported, not to ruin the heap
enum { CANARIES = 8 };             // words at the low end of a stack; one that changed means an overflow
static const uint64_t CANARY = 0xC0FFEE5AFEC0DEull;

enum FiberState { READY, AT_BARRIER, AT_WARP_SYNC, LOG_FULL, DONE };

// Everything a warp does to memory is first logged lane by lane, and judged when all 32 lanes have caught up.
enum AccessKind : uint8_t { LOAD, STORE, ATOMIC, WARP_SYNC, LANDED };      // LANDED: the store of a finished cp.async
struct Access {
  uint64_t address;
  uint32_t place;                  // the call site in the kernel, as an offset; Python knows its source line
  uint16_t region;
  uint8_t size;
  AccessKind kind;
};

struct AsyncCopy { void* to; const void* from; unsigned bytes, zeros, group; uintptr_t place; };

struct Fiber {
  void* sp;
  char *stack, *stack_end;
  FiberState state;
  uint3 thread;
  unsigned id;
  // what it waits for
  int line, predicate;
  unsigned mask, size;
  const char* name;
  char slot[SLOT];                 // the value it offers to the other lanes
  // its cp.async copies
  AsyncCopy* copies;
  unsigned n_copies, copy_capacity, group;
  // its log
  Access* log;
  uint32_t n_log, log_capacity;
};

struct Block {
  Fiber* fiber;
  unsigned n_threads;
  char* stacks;
  Fiber* current;                  // null while the scheduler itself runs
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
};
static PER_OS_THREAD Block B;

static void to_scheduler() { Fiber* f = B.current; cu_switch(&f->sp, B.scheduler); }
static void stop_kernel() { B.stopped = true; to_scheduler(); }
static unsigned lanes_of(unsigned warp) {
  unsigned left = B.n_threads - warp * WARP;
  return left < (unsigned)WARP ? left : (unsigned)WARP;
}
