// Who works: the threads that load from an array and those that store to it, each counted once in its block; and the same
// for global and for shared memory as a whole.
#pragma once

enum { ALL_GLOBAL = MAX_REGIONS, ALL_SHARED, N_WORKERS };
struct Workers {
  uint32_t lanes[MAX_WARPS];       // of the block that is running
  uint64_t n;                      // in the blocks before it
};
static Workers workers[N_WORKERS][2];      // those that load, those that store; an atomic does both

static void note_workers(const Access& a, const unsigned* lane, unsigned n, unsigned warp) {
  uint32_t lanes = 0;
  for (unsigned i = 0; i < n; ++i) lanes |= 1u << lane[i];
  unsigned all = is_shared(a.region) ? ALL_SHARED : ALL_GLOBAL;
  for (int stores = 0; stores < 2; ++stores) {
    if (a.kind == (stores ? LOAD : STORE)) continue;
    workers[a.region][stores].lanes[warp] |= lanes;
    workers[all][stores].lanes[warp] |= lanes;
  }
}

static void count_workers(Workers* w) {
  for (unsigned i = 0; i < MAX_WARPS; ++i) {
    w->n += (unsigned)__builtin_popcount(w->lanes[i]);
    w->lanes[i] = 0;
  }
}

static void end_block() {
  for (int stores = 0; stores < 2; ++stores) {
    for (int i = GLOBAL; i < n_regions; ++i) count_workers(&workers[i][stores]);
    count_workers(&workers[ALL_GLOBAL][stores]);
    count_workers(&workers[ALL_SHARED][stores]);
  }
}

static void reset_workers() { memset(workers, 0, sizeof workers); }

// index: of a global array, -1 for all of them, -2 for shared memory.
EXPORT uint64_t cu_workers(int index, int stores) {
  return workers[index == -1 ? ALL_GLOBAL : index == -2 ? ALL_SHARED : index][stores].n;
}
