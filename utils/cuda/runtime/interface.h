// What Python asks of the checked build, in this order: cu_open once; for each launch cu_begin, cu_add_array, cu_run,
// the results, cu_end.
#pragma once

extern "C" {
extern const uintptr_t cu_places[] __attribute__((visibility("hidden")));      // every call of a callback: assembly.py
extern const uintptr_t cu_n_places __attribute__((visibility("hidden")));
}

// Writes the offset of each place from the first one, and returns how many there are.
EXPORT unsigned cu_open(uint32_t* offsets) {
  find_module(module_low, module_high);
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
}

EXPORT void cu_add_array(const char* name, void* p, uint64_t bytes, int element, int writable) {
  if (n_regions < MAX_REGIONS) add_region(n_regions++, name, p, bytes, element, writable, shift_for(element));
}

EXPORT int cu_shared_array(int index, const char** name, uint64_t* bytes, int* element) {
  if (index >= n_shared) return 0;
  *name = region[index].name;
  *bytes = region[index].bytes;
  *element = region[index].element;
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
