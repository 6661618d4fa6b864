// The memory a kernel may touch, and the callbacks that the compiler puts before every load and store.
#pragma once

// Last writer and two readers of a cell of 1, 2 or 4 bytes; what a race is, is decided in races.h.
struct Cell {
  uint32_t write_epoch, write_place, read_epoch, read_place;
  uint16_t writer, writer_warp_epoch, reader1, reader1_warp_epoch, reader2, reader2_warp_epoch, atomic, varied;
};

struct Region {                    // one array
  const char* name;                // of a shared array; Python knows the others
  uint64_t low, bytes;
  int32_t writable, element;
  Cell* cell;
  uint32_t* value;                 // of each cell, while values are compared: what was stored last
  size_t n_cells;
  uint8_t *loaded, *stored;        // one bit for each 32-byte sector of a global array
  uint8_t* pending;                // one byte for each byte of a shared array: a cp.async is under way
  unsigned cell_shift;
  CuShape shape;                   // of a shared array
};

// Shared arrays first, then global ones: as many as a kernel can have parameters (arguments.py), and one.
enum { MAX_SHARED = 256, GLOBAL = MAX_SHARED, MODULE = GLOBAL + 4096, MAX_REGIONS };      // MODULE: variables of the source
static Region region[MAX_REGIONS];
static int n_shared, n_regions = GLOBAL, last_global = GLOBAL;
static bool is_shared(int r) { return r < GLOBAL; }

static uint32_t epoch = 1;         // counts the barriers of the launch; a block begins a new one too
static uint32_t block_epoch, launch_epoch;
static uint16_t warp_epoch[MAX_WARPS];      // counts the __syncwarp() of each warp of the block
static unsigned launch;
static uint64_t max_cells = 16u << 20;
static unsigned dynamic_shift;
static unsigned n_pending;

static unsigned shift_for(int element) { return element >= 4 ? 2 : element >= 2 ? 1 : 0; }

static void add_region(int index, const char* name, void* p, size_t bytes, int element, int writable, unsigned shift) {
  Region* r = &region[index];
  CuShape shape = r->shape;
  memset(r, 0, sizeof *r);
  r->shape = shape;
  r->name = name;
  r->low = (uint64_t)(uintptr_t)p;
  r->bytes = bytes;
  r->element = element;
  r->writable = writable;
  r->cell_shift = shift;
  r->n_cells = (bytes + 3) >> shift;
  if (r->n_cells > max_cells) r->n_cells = 0;                            // races are not looked for
  r->cell = (Cell*)calloc(r->n_cells + 1, sizeof(Cell));
  if (comparing) r->value = (uint32_t*)calloc(r->n_cells + 1, sizeof(uint32_t));
  if (index >= GLOBAL) {
    r->loaded = (uint8_t*)calloc(bytes / 256 + 2, 1);
    r->stored = (uint8_t*)calloc(bytes / 256 + 2, 1);
  } else {
    r->pending = (uint8_t*)calloc(bytes, 1);
  }
}

static void free_region(Region* r) {
  free(r->cell);
  free(r->value);
  free(r->loaded);
  free(r->stored);
  free(r->pending);
  memset(r, 0, sizeof *r);
}

// ---- shared memory: one arena, a guard band before and after every array, NaN until it is written

enum { MOST_SHARED = 227 * 1024, MOST_STATIC = 48 * 1024 };      // bytes in a block, as on a GPU
enum { GUARD = 1024, UNWRITTEN = 0xff, ARENA_BYTES = MOST_SHARED + MAX_SHARED * (GUARD + 128) + GUARD };
static char arena[ARENA_BYTES] __attribute__((aligned(128)));
static size_t arena_used, shared_bytes, static_bytes;

static void* add_shared(const char* name, size_t bytes, int element, unsigned shift, CuShape shape) {
  size_t padded = (bytes + 127) & ~(size_t)127;
  shared_bytes += bytes;
  if (n_shared == MAX_SHARED || shared_bytes > MOST_SHARED || arena_used + padded + 2 * GUARD > ARENA_BYTES) return 0;
  char* p = arena + arena_used + GUARD;
  arena_used += GUARD + padded;
  region[n_shared].shape = shape;
  add_region(n_shared++, name, p, bytes, element, 1, shift);
  memset(p, UNWRITTEN, bytes);
  return p;
}

extern "C" void* cu_static_shared(CuSharedArray* array, const char* name, size_t bytes, size_t element, CuShape shape) {
  if (array->launch == launch) return array->address;      // every thread of every block has the same one
  static_bytes += bytes;
  array->address = static_bytes > MOST_STATIC ? 0 : add_shared(name, bytes, (int)element, shift_for((int)element), shape);
  array->launch = launch;
  if (array->address) return array->address;
  report(TOO_MUCH_SHARED, 0, 0);
  stop_kernel();
  return 0;
}

// ---- addresses that are none of the kernel's arrays

#if defined(__linux__)
extern char __ehdr_start __attribute__((visibility("hidden"))), _end __attribute__((visibility("hidden")));
static void find_module(uintptr_t& low, uintptr_t& high) { low = (uintptr_t)&__ehdr_start; high = (uintptr_t)&_end; }
#elif defined(_WIN32)
extern "C" char __ImageBase;
static void find_module(uintptr_t& low, uintptr_t& high) {
  uint32_t header = *(uint32_t*)(&__ImageBase + 0x3c);                   // e_lfanew
  low = (uintptr_t)&__ImageBase;
  high = low + *(uint32_t*)(&__ImageBase + header + 0x50);               // SizeOfImage
}
#else
extern "C" char __dso_handle;                                            // the Mach-O header of this library
static void find_module(uintptr_t& low, uintptr_t& high) {
  const char* header = &__dso_handle;
  uint32_t n_commands = *(const uint32_t*)(header + 16);
  const char* command = header + 32;
  uint64_t first = ~0ull, end = 0;
  for (uint32_t i = 0; i < n_commands; ++i, command += *(const uint32_t*)(command + 4)) {
    if (*(const uint32_t*)command != 0x19) continue;                     // LC_SEGMENT_64
    uint64_t address = *(const uint64_t*)(command + 24), size = *(const uint64_t*)(command + 32);
    if (address < first) first = address;
    if (address + size > end) end = address + size;
  }
  low = (uintptr_t)header;
  high = low + (uintptr_t)(end - first);
}
#endif

static uintptr_t module_low, module_high, first_place;

static COLD bool is_module_constant(uintptr_t x) {      // string literals, lookup tables, __constant__ arrays
  if (x - (uintptr_t)arena < ARENA_BYTES) return false;
  return x >= module_low && x < module_high;
}

static COLD int find_region(uintptr_t x) {
  for (int i = 0; i < n_shared; ++i)
    if (x - region[i].low < region[i].bytes) return i;
  for (int i = GLOBAL; i < n_regions; ++i)
    if (x - region[i].low < region[i].bytes) return last_global = i;
  return -1;
}

static COLD void report_address(ProblemKind kind, int r, uintptr_t x, unsigned size, AccessKind access,
                                uintptr_t place) {
  Problem* p = report(kind, place - first_place, 0, 0, B.current ? B.current->calls.line : 0);
  if (!p) return;
  p->region = r;
  p->offset = r < 0 ? 0 : (int64_t)x - (int64_t)region[r].low;
  p->size = (int)size;
  p->access1 = access;
}

static inline __attribute__((always_inline)) void append(Fiber* f, uint64_t address, uint32_t place, unsigned r, unsigned size, AccessKind kind);
static COLD void out_of_bounds(uintptr_t x, unsigned size, AccessKind access, uintptr_t place) {
  if (is_module_constant(x)) {                 // its atomics are what blocks meet at: locks, tickets
    if (access >= ATOMIC) append(B.current, x, (uint32_t)(place - first_place), MODULE, size, access);
    return;
  }
  if ((char*)__builtin_frame_address(0) < B.current->stack) {      // local variables, but of a stack that has run over
    report(STACK_OVERFLOW, place - first_place, 0);
    stop_kernel();
  }
  int nearest = -1;
  uint64_t best = ~0ull;
  for (int i = 0; i < n_regions; ++i) {
    if (i >= n_shared && i < GLOBAL) continue;
    uint64_t end = region[i].low + region[i].bytes;
    uint64_t distance = x >= end ? x - end : x < region[i].low ? region[i].low - x : 0;
    if (distance < best) { best = distance; nearest = i; }
  }
  if (best > (1ull << 32)) nearest = -1;
  report_address(x < 4096 ? NULL_POINTER : OUT_OF_BOUNDS, nearest, x, size, access, place);
  stop_kernel();
}

static COLD void pending_touched(int r, uintptr_t x, unsigned size, AccessKind access, uintptr_t place) {
  for (unsigned i = 0; i < size; ++i)
    if (region[r].pending[x + i - region[r].low]) {
      report_address(ASYNC_NOT_WAITED, r, x, size, access, place);
      return;
    }
}

// ---- the log of a fiber

static void trace_value(Fiber* f, uint64_t address, unsigned size, AccessKind kind);      // trace.h
static void settle(Fiber* f);
static void make_unlike(Fiber* f);

enum { FIRST_LOG = 256, LONGEST_LOG = 16384 };      // records; a lane lets its warp catch up each time its log is full

static COLD void make_room(Fiber* f) {
  if (f->log_capacity && B.current == f) {
    f->state = LOG_FULL;
    to_scheduler();
  }
  if (f->n_log < f->log_capacity) return;
  f->log_capacity = f->log_capacity ? f->log_capacity * 2 : (uint32_t)FIRST_LOG;
  f->log = (Access*)realloc(f->log, f->log_capacity * sizeof(Access));
}

static inline __attribute__((always_inline)) void
append(Fiber* f, uint64_t address, uint32_t place, unsigned r, unsigned size, AccessKind kind) {
  if (RARELY(f->n_log == f->log_capacity)) make_room(f);
  Access* a = &f->log[f->n_log++];
  a->address = address;
  a->place = place;
  a->region = (uint16_t)r;
  a->size = (uint8_t)size;
  a->kind = kind;
  if (RARELY(tracing | comparing) && r != MODULE) trace_value(f, address, size, kind);
}

static inline __attribute__((always_inline)) void
on_access(uintptr_t x, unsigned size, AccessKind kind, uintptr_t place) {
  Fiber* f = B.current;
  if (!f || x - (uintptr_t)f->stack < STACK_BYTES) return;      // the thread's own local variables
  int r;
  if (x - region[0].low < region[0].bytes) r = 0;
  else if (x - region[1].low < region[1].bytes) r = 1;
  else if (x - region[last_global].low < region[last_global].bytes) r = last_global;
  else if ((r = find_region(x)) < 0) return out_of_bounds(x, size, kind, place);

  uint64_t offset = x - region[r].low;
  if (RARELY(offset + size > region[r].bytes)) return out_of_bounds(x, size, kind, place);
  if (RARELY((offset & (size - 1)) != 0)) {
    report_address(MISALIGNED, r, x, size, kind, place);
    return stop_kernel();
  }
  if (RARELY(kind != LOAD && !region[r].writable)) {
    report_address(WRITE_TO_CONST, r, x, size, kind, place);
    return stop_kernel();
  }
  if (RARELY(n_pending != 0) && is_shared(r)) pending_touched(r, x, size, kind, place);
  append(f, x, (uint32_t)(place - first_place), (unsigned)r, size, kind);
}

// gcc calls __tsan_*, clang __sanitizer_cov_*. Only the names are theirs: no sanitizer library is linked.
#define CALLBACKS(size) \
  extern "C" void __tsan_read##size(void* a) { on_access((uintptr_t)a, size, LOAD, CALLER); } \
  extern "C" void __tsan_write##size(void* a) { on_access((uintptr_t)a, size, STORE, CALLER); } \
  extern "C" void __tsan_unaligned_read##size(void* a) { on_access((uintptr_t)a, size, LOAD, CALLER); } \
  extern "C" void __tsan_unaligned_write##size(void* a) { on_access((uintptr_t)a, size, STORE, CALLER); } \
  extern "C" void __sanitizer_cov_load##size(void* a) { on_access((uintptr_t)a, size, LOAD, CALLER); } \
  extern "C" void __sanitizer_cov_store##size(void* a) { on_access((uintptr_t)a, size, STORE, CALLER); }
CALLBACKS(1) CALLBACKS(2) CALLBACKS(4) CALLBACKS(8) CALLBACKS(16)

// Volatile accesses, by their places: what they do for the order of blocks is said in order.h.
enum { MAX_VOLATILE = 256 };
static uint32_t volatile_place[MAX_VOLATILE];
static unsigned n_volatile;
static bool is_volatile(uint64_t place) {
  for (unsigned i = 0; i < n_volatile; ++i)
    if (volatile_place[i] == place) return true;
  return false;
}
static COLD void on_volatile(uintptr_t x, unsigned size, AccessKind kind, uintptr_t place) {
  uint32_t p = (uint32_t)(place - first_place);
  if (!is_volatile(p) && n_volatile < MAX_VOLATILE) volatile_place[n_volatile++] = p;
  if (B.current && is_module_constant(x)) append(B.current, x, p, MODULE, size, kind);
  else on_access(x, size, kind, place);
}
#define VOLATILE_CALLBACKS(size) \
  extern "C" void __tsan_volatile_read##size(void* a) { on_volatile((uintptr_t)a, size, LOAD, CALLER); } \
  extern "C" void __tsan_volatile_write##size(void* a) { on_volatile((uintptr_t)a, size, STORE, CALLER); }
VOLATILE_CALLBACKS(1) VOLATILE_CALLBACKS(2) VOLATILE_CALLBACKS(4) VOLATILE_CALLBACKS(8) VOLATILE_CALLBACKS(16)

static void on_range(uintptr_t x, size_t n, AccessKind kind, uintptr_t place) {      // a struct copied as a whole
  while (n) {
    unsigned piece = n >= 4 && x % 4 == 0 ? 4 : n >= 2 && x % 2 == 0 ? 2 : 1;
    on_access(x, piece, kind, place);
    if (comparing && kind == STORE) make_unlike(B.current);
    x += piece;
    n -= piece;
  }
}
extern "C" void __tsan_read_range(void* a, size_t n) { on_range((uintptr_t)a, n, LOAD, CALLER); }
extern "C" void __tsan_write_range(void* a, size_t n) { on_range((uintptr_t)a, n, STORE, CALLER); }

// What clang's callbacks do not see (assembly.py), and a kernel's own memcpy and memset (cuda_on_cpu.h).
extern "C" void cu_log_copy(void* to, const void* from, size_t n) {
  on_range((uintptr_t)from, n, LOAD, CALLER);
  on_range((uintptr_t)to, n, STORE, CALLER);
}
extern "C" void cu_log_fill(void* to, size_t n) { on_range((uintptr_t)to, n, STORE, CALLER); }
extern "C" void* cu_memcpy(void* to, const void* from, size_t n) {
  on_range((uintptr_t)from, n, LOAD, CALLER);
  on_range((uintptr_t)to, n, STORE, CALLER);
  return memcpy(to, from, n);
}
extern "C" void* cu_memset(void* to, int value, size_t n) {
  on_range((uintptr_t)to, n, STORE, CALLER);
  return memset(to, value, n);
}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" void __sanitizer_cov_trace_pc_guard_init(uint32_t*, uint32_t*) {}
extern "C" void __sanitizer_cov_trace_pc_guard(uint32_t*) {}

// ---- what device.h and scheduler.h ask for

static bool fences;                      // this launch has had a __threadfence(): order.h
static void log_access(const void* p, unsigned size, AccessKind kind, uintptr_t place) {
  on_access((uintptr_t)p, size, kind, place);
}

// The usual loop around atomicCAS begins with a plain read, whose value the atomic then confirms or refuses. What such a
// place reads while others update it by atomics is no race.
enum { LOOK_BACK = 24, MAX_EXPECTED = 256 };
static uint32_t expected_place[MAX_EXPECTED];
static unsigned n_expected;

static bool is_expected(uint64_t place) {
  for (unsigned i = 0; i < n_expected; ++i)
    if (expected_place[i] == place) return true;
  return false;
}

static COLD void note_expected(const void* p) {
  Fiber* f = B.current;
  for (uint32_t i = 0; f && i < LOOK_BACK && i < f->n_log; ++i) {
    const Access& a = f->log[f->n_log - 1 - i];
    if (a.kind != LOAD || a.address != (uint64_t)(uintptr_t)p) continue;
    if (!is_expected(a.place) && n_expected < MAX_EXPECTED) expected_place[n_expected++] = a.place;
    return;
  }
}

// Nor are volatile accesses to global memory a race among themselves, in a kernel that uses __threadfence().
static void forget_expected_reads() {
  int kept = 0;
  for (int i = 0; i < n_problems; ++i) {
    const Problem& p = problems[i];
    bool race = p.kind == RACE || p.kind == RACE_BETWEEN_BLOCKS;
    bool first = p.access1 == LOAD && p.access2 == ATOMIC && is_expected(p.place1);
    bool second = p.access2 == LOAD && p.access1 == ATOMIC && is_expected(p.place2);
    bool flag = fences && p.region >= GLOBAL && is_volatile(p.place1) && is_volatile(p.place2);
    if (!(race && (first || second || flag))) problems[kept++] = p;
  }
  n_problems = kept;
}

static void log_warp_sync(Fiber* f) { append(f, 0, 0, 0, 0, WARP_SYNC); }

static void mark_pending(const AsyncCopy& c, int change) {
  int r = find_region((uintptr_t)c.to);
  if (r < 0 || !is_shared(r)) return;
  for (unsigned i = 0; i < c.bytes; ++i) region[r].pending[(uintptr_t)c.to + i - region[r].low] += (uint8_t)change;
  n_pending += (unsigned)change;
}

static void copy_issued(const AsyncCopy& c) {
  if (c.bytes > c.zeros) on_access((uintptr_t)c.from, c.bytes, LOAD, c.place);
  on_access((uintptr_t)c.to, c.bytes, STORE, c.place);
  if (comparing) make_unlike(B.current);
  mark_pending(c, +1);
}

static void copy_landed(Fiber* f, const AsyncCopy& c) {
  mark_pending(c, -1);
  int r = find_region((uintptr_t)c.to);
  if (r >= 0) append(f, (uint64_t)(uintptr_t)c.to, (uint32_t)(c.place - first_place), (unsigned)r, c.bytes, LANDED);
}

static void begin_meetings();
static void begin_block_order();
static void begin_launch() { n_expected = n_volatile = 0; launch_epoch = epoch + 1; begin_meetings(); }

static void begin_block() {
  block_epoch = ++epoch;
  begin_block_order();
  memset(warp_epoch, 0, sizeof warp_epoch);
  for (int i = 0; i < n_shared; ++i) {
    memset((void*)region[i].low, UNWRITTEN, region[i].bytes);
    if (n_pending) memset(region[i].pending, 0, region[i].bytes);
  }
  n_pending = 0;
}

static void trace_barrier();
static void begin_barrier_interval() {
  epoch++;
  if (tracing) trace_barrier();
}
