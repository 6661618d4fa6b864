// For looking on step by step: every request of one block in the order in which it is judged, with the values that moved.
// A value is known after a store only, so a lane settles its last store at its next access, or when it stops.
#pragma once

enum { TRACE_BARRIER = 15, MOST_TRACED = 400000 };      // entries; what comes later is not kept

struct Traced {                    // one lane of one request; read by Python (steps.py)
  uint32_t step, place;            // for a barrier, `place` is its line
  uint16_t region;
  uint8_t kind, size;
  uint32_t thread;
  uint64_t offset;
  uint8_t value[16];
};
static_assert(sizeof(Traced) == 40, "as in steps.py");

static Traced* traced;
static uint32_t n_traced, traced_capacity, n_steps;
static uint64_t wanted_block = ~0ull;      // its number in the grid

static COLD void settle(Fiber* f) {
  if (!f->due_size) return;
  memcpy(f->values[f->n_values - 1], (const void*)f->due_address, f->due_size);
  f->due_size = 0;
}

// A lane has logged an access: its value is put behind those that wait to be judged.
static COLD void trace_value(Fiber* f, uint64_t address, unsigned size, AccessKind kind) {
  if (kind == WARP_SYNC) return;
  settle(f);
  if (f->n_values == f->value_capacity) {
    f->value_capacity = f->value_capacity * 2 + 64;
    f->values = (uint8_t (*)[16])realloc(f->values, f->value_capacity * sizeof *f->values);
  }
  memset(f->values[f->n_values], 0, sizeof *f->values);
  if (kind == LOAD || kind == LANDED) {
    memcpy(f->values[f->n_values], (const void*)address, size < 16 ? size : 16);
  } else {
    f->due_address = address;
    f->due_size = size;
  }
  f->n_values++;
}

// A store whose value comes later than the lane's next access, or not all at once, is like no other.
static COLD void make_unlike(Fiber* f) {
  static uint32_t n;
  if (!f || !f->due_size) return;
  f->due_size = 0;
  uint32_t unlike[4] = {n + 1, n + 2, n + 3, n + 4};
  n += 4;
  memcpy(f->values[f->n_values - 1], unlike, sizeof unlike);
}

// The value of the next access of a lane that is judged. It stays until the lane runs again.
static COLD const uint8_t* next_value(Fiber* f) {
  const uint8_t* value = f->values[f->first_value++];
  if (f->first_value == f->n_values && !f->due_size) f->first_value = f->n_values = 0;
  return value;
}

static Traced* new_traced() {
  if (n_traced == MOST_TRACED) return 0;
  if (n_traced == traced_capacity) {
    traced_capacity = traced_capacity * 2 + 1024;
    traced = (Traced*)realloc(traced, traced_capacity * sizeof *traced);
  }
  memset(&traced[n_traced], 0, sizeof *traced);
  return &traced[n_traced++];
}

static COLD void trace_request(const Access* const* access, const unsigned* lane, unsigned n, unsigned warp,
                               const uint8_t* const* value) {
  for (unsigned i = 0; i < n; ++i) {
    const Access& a = *access[i];
    Traced* t = new_traced();
    if (!t) continue;
    *t = {n_steps, a.place, a.region, (uint8_t)a.kind, a.size, warp * WARP + lane[i], a.address - region[a.region].low, {0}};
    memcpy(t->value, value[i], sizeof t->value);
  }
  n_steps++;
}

static COLD void trace_barrier() {
  Traced* t = new_traced();
  if (!t) return;
  t->step = n_steps++;
  t->kind = TRACE_BARRIER;
  for (unsigned i = 0; i < B.n_threads; ++i)
    if (B.fiber[i].state == AT_BARRIER || B.fiber[i].state == AT_MBARRIER) t->place = (uint32_t)B.fiber[i].place.line;
}

static void begin_trace(uint64_t block) {
  tracing = block == wanted_block;
  for (unsigned i = 0; i < B.n_threads; ++i) B.fiber[i].n_values = B.fiber[i].first_value = B.fiber[i].due_size = 0;
}

EXPORT void cu_trace(uint64_t block, int compare) {
  wanted_block = block;
  comparing = compare != 0;
  n_traced = n_steps = 0;
}

EXPORT const Traced* cu_traced(int* n) {
  *n = (int)n_traced;
  return traced;
}
