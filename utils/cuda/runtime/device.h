// What kernels call: built-in variables, barriers, shuffles, atomics, cp.async, mma, printf, assert.
#pragma once

extern "C" uint3 cu_thread_idx() { return B.current->thread; }
extern "C" uint3 cu_block_idx() { return B.index; }
extern "C" uint3 cu_block_dim() { return B.block_dim; }
extern "C" uint3 cu_grid_dim() { return B.grid_dim; }
extern "C" unsigned cu_lane() { return B.current->id % WARP; }
extern "C" void* cu_dynamic_shared() { return B.dynamic_shared; }

// There is no time here: a clock goes on by one each time it is asked, so that a loop that waits for it ends.
extern "C" long long cu_clock() {
  static PER_OS_THREAD long long asked;
  return ++asked;
}

// ---- printf and assert

enum { MAX_OUTPUT = 1 << 20 };     // bytes; a GPU's printf buffer has this size too
static char* output;
static size_t output_bytes, output_capacity;
static bool output_cut;

static void make_output_room(size_t n) {
  if (output_bytes + n <= output_capacity) return;
  output_capacity = output_capacity * 2 + n + 4096;
  output = (char*)realloc(output, output_capacity);
}

static void add_output(const char* text, size_t n) {
  make_output_room(n);
  memcpy(output + output_bytes, text, n);
  output_bytes += n;
}

extern "C" int cu_printf(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int n = vsnprintf(0, 0, format, arguments);
  va_end(arguments);
  if (n < 0 || output_cut) return n;
  if (output_bytes + n > MAX_OUTPUT) {
    static const char note[] = "\n... output cut at 1 MB, as a GPU's buffer is\n";
    output_cut = true;
    add_output(note, sizeof note - 1);
  } else {
    make_output_room((size_t)n + 1);
    va_start(arguments, format);
    vsnprintf(output + output_bytes, (size_t)n + 1, format, arguments);
    va_end(arguments);
    output_bytes += (size_t)n;
  }
  return n;
}

extern "C" void cu_assert_failed(const char* expression, int line) {
  if (Problem* p = report(ASSERTION, 0, 0, line))
    if (snprintf(p->text, sizeof p->text, "%s", expression) >= (int)sizeof p->text)
      memcpy(p->text + sizeof p->text - 4, "...", 4);
  stop_kernel();
}

// ---- barriers and warp collectives: say what one waits for, let the others run, read what they offered

extern "C" CuCalls cu_enter(int line, unsigned call) {
  CuCalls before = B.current->calls;
  B.current->calls = {before.chain * 1000003u + call, line};
  return before;
}
extern "C" void cu_leave(CuCalls before) { B.current->calls = before; }

extern "C" void cu_syncthreads(CuPlace place) {
  Fiber* f = B.current;
  f->state = AT_BARRIER;
  f->place = place;
  f->name = "__syncthreads";
  f->predicate = 0;
  to_scheduler();
}

extern "C" int cu_syncthreads_vote(int predicate, int vote, CuPlace place) {
  static const char* const names[] = {"__syncthreads_count", "__syncthreads_and", "__syncthreads_or"};
  Fiber* f = B.current;
  f->state = AT_BARRIER;
  f->place = place;
  f->name = names[vote];
  f->predicate = predicate != 0;
  to_scheduler();
  return B.vote[vote];
}

static const char* meet(unsigned mask, const void* value, unsigned size, CuPlace place, const char* name) {
  Fiber* f = B.current;
  if (CHECKED && !(mask >> (f->id % WARP) & 1)) {
    if (Problem* p = report(LANE_NOT_IN_MASK, 0, 0, place)) {
      snprintf(p->text, sizeof p->text, "%s|%08x", name, mask);
    }
    stop_kernel();
  }
  memcpy(f->slot, value, size);
  f->size = size;
  f->mask = mask;
  f->place = place;
  f->name = name;
  f->state = AT_WARP_SYNC;
  to_scheduler();
  return B.offered[f->id / WARP];
}

extern "C" void cu_syncwarp(unsigned mask, CuPlace place) { meet(mask, "", 0, place, "__syncwarp"); }

extern "C" unsigned cu_ballot(unsigned mask, int predicate, CuPlace place, const char* name) {
  int mine = predicate != 0;
  const char* offered = meet(mask, &mine, sizeof mine, place, name);
  unsigned alive = B.alive[B.current->id / WARP], result = 0;
  for (unsigned l = 0; l < WARP; ++l) {
    int theirs;
    memcpy(&theirs, offered + SLOT * l, sizeof theirs);
    if ((mask & alive) >> l & 1 && theirs) result |= 1u << l;
  }
  return result;
}

extern "C" unsigned cu_converged(CuPlace place) {
  Fiber* f = B.current;
  f->place = place;
  f->state = CONVERGING;
  to_scheduler();
  return f->mask;
}

extern "C" unsigned cu_exchange(const void* mine, unsigned size, unsigned mask, void* all, CuPlace place, const char* name) {
  const char* offered = meet(mask, mine, size, place, name);
  for (unsigned l = 0; l < WARP; ++l) memcpy((char*)all + size * l, offered + SLOT * l, size);
  return mask & B.alive[B.current->id / WARP];
}

extern "C" void cu_wrong_width(int width, CuPlace place, const char* name) {
  if (Problem* p = report(SHUFFLE_WIDTH, 0, 0, place)) snprintf(p->text, sizeof p->text, "%s|%d", name, width);
}

extern "C" void cu_shuffle(void* value, unsigned size, unsigned mask, int source, CuPlace place, const char* name) {
  const char* offered = meet(mask, value, size, place, name);
  if (source < 0) return;
  unsigned alive = B.alive[B.current->id / WARP];
  if (CHECKED && !((mask & alive) >> source & 1)) {
    bool in_mask = mask >> source & 1;
    if (Problem* p = report(in_mask ? SHUFFLE_FROM_EXITED : SHUFFLE_NOT_IN_MASK, 0, 0, place)) {
      p->thread2 = source;
      snprintf(p->text, sizeof p->text, "%s|%08x", name, mask);
    }
  }
  memcpy(value, offered + SLOT * source, size);
}

// Lane l holds elements (2i + l / 16, l % 16), i = 0..7, of each of the three tiles: see include/cpu/wmma.h.
extern "C" void cu_mma(const float* a, const float* b, float* c, CuPlace place) {
  struct Tiles { const float *a, *b; } mine = {a, b}, all[WARP];
  const char* offered = meet(0xffffffffu, &mine, sizeof mine, place, "mma_sync");
  for (unsigned l = 0; l < WARP; ++l) memcpy(&all[l], offered + SLOT * l, sizeof mine);
  unsigned lane = cu_lane();
  if (B.alive[B.current->id / WARP] == 0xffffffffu)
    for (unsigned i = 0; i < 8; ++i)
      for (unsigned k = 0; k < 16; ++k)
        c[i] += all[lane / 16 * 16 + k].a[i] * all[k % 2 * 16 + lane % 16].b[k / 2];
  meet(0xffffffffu, "", 0, place, "mma_sync");            // nobody changes a tile that a neighbour still reads
}

// ---- atomics. Fibers of one OS thread cannot interrupt one another, and a kernel with atomics runs on one OS thread.

#define DEFINE_ATOMIC(name, T, new_value) DEFINE_ATOMIC_AS(ATOMIC, name, T, new_value)
#define DEFINE_ATOMIC_AS(kind, name, T, new_value) \
  T name(T* p, T value) { \
    log_access(p, sizeof(T), kind, CALLER); \
    T old = *p; \
    *p = new_value; \
    return old; \
  }
#define DEFINE_ATOMICS(name, new_value) \
  DEFINE_ATOMIC(name, int, new_value) \
  DEFINE_ATOMIC(name, unsigned, new_value) \
  DEFINE_ATOMIC(name, unsigned long long, new_value)
DEFINE_ATOMICS(atomicAdd, old + value)
DEFINE_ATOMIC(atomicMax, long long, old > value ? old : value)
DEFINE_ATOMIC(atomicAnd, long long, old & value)
DEFINE_ATOMIC(atomicOr, long long, old | value)
DEFINE_ATOMIC(atomicXor, long long, old ^ value)
DEFINE_ATOMIC(atomicMin, long long, old < value ? old : value)
DEFINE_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
DEFINE_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
DEFINE_ATOMICS(atomicMax, old > value ? old : value)
DEFINE_ATOMICS(atomicMin, old < value ? old : value)
DEFINE_ATOMICS(atomicAnd, old & value)
DEFINE_ATOMICS(atomicOr, old | value)
DEFINE_ATOMICS(atomicXor, old ^ value)
DEFINE_ATOMIC(atomicSub, int, old - value)
DEFINE_ATOMIC(atomicSub, unsigned, old - value)
DEFINE_ATOMIC(atomicAdd, float, old + value)
DEFINE_ATOMIC(atomicAdd, double, old + value)
DEFINE_ATOMIC_AS(EXCHANGE, atomicExch, int, value)
DEFINE_ATOMIC_AS(EXCHANGE, atomicExch, unsigned, value)
DEFINE_ATOMIC_AS(EXCHANGE, atomicExch, unsigned long long, value)
DEFINE_ATOMIC_AS(EXCHANGE, atomicExch, float, value)

#define DEFINE_CAS(T) \
  T atomicCAS(T* p, T expected, T value) { \
    log_access(p, sizeof(T), ATOMIC, CALLER); \
    note_expected(p); \
    T old = *p; \
    if (old == expected) *p = value; \
    return old; \
  }
DEFINE_CAS(int)
DEFINE_CAS(unsigned short)
DEFINE_CAS(unsigned)
DEFINE_CAS(unsigned long long)

extern "C" void cu_log(const void* p, unsigned size, int is_store, const void* place) {
  log_access(p, size, is_store ? STORE : LOAD, (uintptr_t)place);
}

extern "C" void cu_log_atomic(const void* p, unsigned size, const void* place) {
  log_access(p, size, ATOMIC, (uintptr_t)place);
}

// ---- addresses of shared memory: the number of a window of 256 MB in the upper 4 bits, the pointer's lower bits

enum { WINDOW = 28, MAX_WINDOWS = 16 };
static PER_OS_THREAD uintptr_t window[MAX_WINDOWS];
static PER_OS_THREAD unsigned n_windows;

extern "C" unsigned cu_shared_address(const void* p) {
  uintptr_t high = (uintptr_t)p >> WINDOW;
  unsigned w = 0;
  while (w < n_windows && window[w] != high) ++w;
  if (w == n_windows) {
    if (w == MAX_WINDOWS) w = n_windows = 0;
    window[n_windows++] = high;
  }
  return w << WINDOW | (unsigned)((uintptr_t)p & ((1u << WINDOW) - 1));
}

extern "C" void* cu_shared_pointer(unsigned address) {
  return (void*)(window[address >> WINDOW] << WINDOW | (address & ((1u << WINDOW) - 1)));
}

// ---- cp.async

extern "C" void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros) {
  Fiber* f = B.current;
  issue({to, from, (unsigned)bytes, (unsigned)zeros, f->group, CALLER, 0, 0});
}

extern "C" void __pipeline_commit() { B.current->group++; }

extern "C" void __pipeline_wait_prior(size_t groups_left) {
  Fiber* f = B.current;
  unsigned kept = 0;
  for (unsigned i = 0; i < f->n_copies; ++i) {
    AsyncCopy c = f->copies[i];
    if (c.barrier || c.group + groups_left >= f->group) { f->copies[kept++] = c; continue; }
    land(f, c);
  }
  f->n_copies = kept;
}
