// What Python asks of the checked build, in this order: cu_open once; for each launch cu_begin, cu_add_array, cu_run,
// the results, cu_end.
#pragma once

extern "C" {
extern const uintptr_t cu_places[] __attribute__((visibility("hidden")));      // every call of a callback: assembly.py
extern const uintptr_t cu_n_places __attribute__((visibility("hidden")));
}

// An integer division by zero ends a process on x86. Here it ends the launch, at a place that is one of ours.
#if defined(__linux__) && defined(__x86_64__)
#include <signal.h>
#include <ucontext.h>
static void on_division(int, siginfo_t*, void* context) {
  if (!B.current) { signal(SIGFPE, SIG_DFL); return; }
  report(DIVISION_BY_ZERO, (uintptr_t)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP] - first_place, 0);
  stop_kernel();
}
static void catch_division() {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_division;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;      // it is left for the scheduler, and never returned from
  sigaction(SIGFPE, &action, 0);
}
#else
static void catch_division() {}
#endif

// Of a kernel that does not end, asked by another OS thread: the thread that runs, its block, its last access to memory.
EXPORT void cu_where(uint32_t* out) {
  const Fiber* f = B.last;
  bool logged = f->log_capacity != 0;
  out[0] = logged;
  out[1] = logged ? f->log[f->n_log ? f->n_log - 1 : 0].place : 0;
  out[2] = f->id;
  out[3] = B.index.x;
  out[4] = B.index.y;
  out[5] = B.index.z;
}

// Writes the offset of each place from the first one, and returns how many there are.
EXPORT unsigned cu_open(uint32_t* offsets) {
  find_module(module_low, module_high);
  catch_division();
  first_place = ~(uintptr_t)0;
  for (uintptr_t i = 0; i < cu_n_places; ++i)
    if (cu_places[i] < first_place) first_place = cu_places[i];
  for (uintptr_t i = 0; offsets && i < cu_n_places; ++i) offsets[i] = (uint32_t)(cu_places[i] - first_place);
  return (unsigned)cu_n_places;
}

EXPORT void cu_end() {
  for (int i = 0; i < n_shared; ++i) free_region(&region[i]);
  for (int i = GLOBAL; i < n_regions; ++i) free_region(&region[i]);
  n_shared = 0;
  n_regions = last_global = GLOBAL;
}

EXPORT void cu_begin(unsigned shift_of_dynamic_shared) {
  cu_end();
  dynamic_shift = shift_of_dynamic_shared;
  arena_used = shared_bytes = static_bytes = 0;
  n_pending = 0;
  epoch = 1;
  launch++;
  reset_traffic();
  reset_workers();
}

EXPORT void cu_add_array(void* p, uint64_t bytes, int element, int writable) {
  if (n_regions == MAX_REGIONS) abort();
  add_region(n_regions++, "", p, bytes, element, writable, shift_for(element));
}

EXPORT int cu_shared_array(int index, const char** name, uint64_t* bytes, int* element, CuShape* shape) {
  if (index >= n_shared) return 0;
  *name = region[index].name;
  *bytes = region[index].bytes;
  *element = region[index].element;
  *shape = region[index].shape;
  return 1;
}

// Whether a global array is too large to keep a cell for every element.
EXPORT int cu_races_unchecked(int index) { return region[index].bytes && !region[index].n_cells; }

EXPORT void cu_distinct_bytes(int index, uint64_t* loaded, uint64_t* stored) {
  const Region& r = region[index];
  *loaded = *stored = 0;
  for (size_t i = 0; i < r.bytes / 256 + 2; ++i) {
    *loaded += 32u * (unsigned)__builtin_popcount(r.loaded[i]);
    *stored += 32u * (unsigned)__builtin_popcount(r.stored[i]);
  }
}
