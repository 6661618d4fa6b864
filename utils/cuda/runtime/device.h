// What kernels call: built-in variables, barriers, shuffles, atomics, cp.async, mma, printf, assert.
#pragma once

extern "C" uint3 cu_thread_idx() { return B.current->thread; }
extern "C" uint3 cu_block_idx() { return B.index; }
extern "C" uint3 cu_block_dim() { return B.block_dim; }
extern "C" uint3 cu_grid_dim() { return B.grid_dim; }
extern "C" unsigned cu_lane() { return B.current->id % WARP; }
extern "C" void* cu_dynamic_shared() { return B.dynamic_shared; }

// ---- printf and assert

enum { MAX_OUTPUT = 1 << 20 };     // bytes; a GPU's printf buffer has this size too
static char* output;
static size_t output_bytes, output_capacity;
static bool output_cut;

static void add_output(const char* text, size_t n) {
  if (output_bytes + n > output_capacity) {
    output_capacity = output_capacity * 2 + 4096;
    output = (char*)realloc(output, output_capacity);
  }
  memcpy(output + output_bytes, text, n);
  output_bytes += n;
}

extern "C" int cu_printf(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  int n = vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (n < 0) return n;
  if (n >= (int)sizeof text) n = sizeof text - 1;
  if (output_cut) return n;
  if (output_bytes + n > MAX_OUTPUT) {
    static const char note[] = "\n... output cut at 1 MB, as a GPU's buffer is\n";
    output_cut = true;
    add_output(note, sizeof note - 1);
  } else {
    add_output(text, (size_t)n);
  }
  return n;
}

extern "C" void cu_assert_failed(const char* expression, int line) {
  if (Problem* p = report(ASSERTION, 0, 0, line)) snprintf(p->text, sizeof p->text, "%s", expression);
  stop_kernel();
}

// ---- barriers and warp collectives: say what one waits for, let the others run, read what they offered

extern "C" void cu_syncthreads(int line) {
  Fiber* f = B.current;
  f->state = AT_BARRIER;
  f->line = line;
  f->name = "__syncthreads";
  f->predicate = 0;
  to_scheduler();
}

extern "C" int cu_syncthreads_vote(int predicate, int vote, int line) {
  static const char* const names[] = {"__syncthreads_count", "__syncthreads_and", "__syncthreads_or"};
  Fiber* f = B.current;
  f->state = AT_BARRIER;
  f->line = line;
  f->name = names[vote];
  f->predicate = predicate != 0;
  to_scheduler();
  return B.vote[vote];
}

static const char* meet(unsigned mask, const void* value, unsigned size, int line, const char* name) {
  Fiber* f = B.current;
  if (CHECKED && !(mask >> (f->id % WARP) & 1)) {
    if (Problem* p = report(LANE_NOT_IN_MASK, 0, 0, line)) {
      snprintf(p->text, sizeof p->text, "%s|%08x", name, mask);
    }
    stop_kernel();
  }
  memcpy(f->slot, value, size);
  f->size = size;
  f->mask = mask;
  f->line = line;
  f->name = name;
  f->state = AT_WARP_SYNC;
  to_scheduler();
  return B.offered[f->id / WARP];
}

extern "C" void cu_syncwarp(unsigned mask, int line) { meet(mask, "", 0, line, "__syncwarp"); }

extern "C" unsigned cu_ballot(unsigned mask, int predicate, int line, const char* name) {
  int mine = predicate != 0;
  const char* offered = meet(mask, &mine, sizeof mine, line, name);
  unsigned alive = B.alive[B.current->id / WARP], result = 0;
  for (unsigned l = 0; l < WARP; ++l) {
    int theirs;
    memcpy(&theirs, offered + SLOT * l, sizeof theirs);
    if ((mask & alive) >> l & 1 && theirs) result |= 1u << l;
  }
  return result;
}

extern "C" unsigned cu_activemask() {
  unsigned warp = B.current->id / WARP, mask = 0;
  for (unsigned l = 0; l < lanes_of(warp); ++l)
    if (B.fiber[warp * WARP + l].state != DONE) mask |= 1u << l;
  return mask;
}

extern "C" void cu_shuffle(void* value, unsigned size, unsigned mask, int source, int line, const char* name) {
  const char* offered = meet(mask, value, size, line, name);
  if (source < 0) return;
  unsigned alive = B.alive[B.current->id / WARP];
  if (CHECKED && !((mask & alive) >> source & 1)) {
    bool in_mask = mask >> source & 1;
    if (Problem* p = report(in_mask ? SHUFFLE_FROM_EXITED : SHUFFLE_NOT_IN_MASK, 0, 0, line)) {
      p->thread2 = source;
      snprintf(p->text, sizeof p->text, "%s|%08x", name, mask);
    }
  }
  memcpy(value, offered + SLOT * source, size);
}

// Lane l holds elements (2i + l / 16, l % 16), i = 0..7, of each of the three tiles: see include/cpu/wmma.h.
extern "C" void cu_mma(const float* a, const float* b, float* c, int line) {
  struct Tiles { const float *a, *b; } mine = {a, b}, all[WARP];
  const char* offered = meet(0xffffffffu, &mine, sizeof mine, line, "mma_sync");
  for (unsigned l = 0; l < WARP; ++l) memcpy(&all[l], offered + SLOT * l, sizeof mine);
  unsigned lane = cu_lane();
  if (B.alive[B.current->id / WARP] == 0xffffffffu)
    for (unsigned i = 0; i < 8; ++i)
      for (unsigned k = 0; k < 16; ++k)
        c[i] += all[lane / 16 * 16 + k].a[i] * all[k % 2 * 16 + lane % 16].b[k / 2];
  meet(0xffffffffu, "", 0, line, "mma_sync");            // nobody changes a tile that a neighbour still reads
}

// ---- atomics. Fibers of one OS thread cannot interrupt one another, and a kernel with atomics runs on one OS thread.

#define DEFINE_ATOMIC(name, T, new_value) \
  T name(T* p, T value) { \
    log_access(p, sizeof(T), ATOMIC, CALLER); \
    T old = *p; \
    *p = new_value; \
    return old; \
  }
#define DEFINE_ATOMICS(name, new_value) \
  DEFINE_ATOMIC(name, int, new_value) \
  DEFINE_ATOMIC(name, unsigned, new_value) \
  DEFINE_ATOMIC(name, unsigned long long, new_value)
DEFINE_ATOMICS(atomicAdd, old + value)
DEFINE_ATOMICS(atomicMax, old > value ? old : value)
DEFINE_ATOMICS(atomicMin, old < value ? old : value)
DEFINE_ATOMICS(atomicExch, value)
DEFINE_ATOMICS(atomicAnd, old & value)
DEFINE_ATOMICS(atomicOr, old | value)
DEFINE_ATOMICS(atomicXor, old ^ value)
DEFINE_ATOMIC(atomicSub, int, old - value)
DEFINE_ATOMIC(atomicSub, unsigned, old - value)
DEFINE_ATOMIC(atomicAdd, float, old + value)
DEFINE_ATOMIC(atomicAdd, double, old + value)
DEFINE_ATOMIC(atomicExch, float, value)

#define DEFINE_CAS(T) \
  T atomicCAS(T* p, T expected, T value) { \
    log_access(p, sizeof(T), ATOMIC, CALLER); \
    T old = *p; \
    if (old == expected) *p = value; \
    return old; \
  }
DEFINE_CAS(int)
DEFINE_CAS(unsigned)
DEFINE_CAS(unsigned long long)

extern "C" void cu_log(const void* p, unsigned size, int is_store, const void* place) {
  log_access(p, size, is_store ? STORE : LOAD, (uintptr_t)place);
}

// ---- cp.async

extern "C" void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros) {
  Fiber* f = B.current;
  AsyncCopy c = {to, from, (unsigned)bytes, (unsigned)zeros, f->group, CALLER};
  copy_issued(c);
  if (f->n_copies == f->copy_capacity) {
    f->copy_capacity = f->copy_capacity * 2 + 16;
    f->copies = (AsyncCopy*)realloc(f->copies, f->copy_capacity * sizeof c);
  }
  f->copies[f->n_copies++] = c;
}

extern "C" void __pipeline_commit() { B.current->group++; }

extern "C" void __pipeline_wait_prior(size_t groups_left) {
  Fiber* f = B.current;
  unsigned kept = 0;
  for (unsigned i = 0; i < f->n_copies; ++i) {
    AsyncCopy c = f->copies[i];
    if (c.group + groups_left >= f->group) { f->copies[kept++] = c; continue; }
    memcpy(c.to, c.from, c.bytes - c.zeros);
    memset((char*)c.to + c.bytes - c.zeros, 0, c.zeros);
    copy_landed(f, c);
  }
  f->n_copies = kept;
}
