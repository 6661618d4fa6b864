// What orders blocks: one that has stored, and then met a global cell with an atomic or a volatile access (a flag) behind a
// __threadfence(), hands over what it stored before the fence to every block that meets the cell later: the ticket of "the last
// block adds up", a lock, a flag.
// Blocks run one after another here, so a block is its number in the launch, and what it hands over an epoch.
#pragma once

enum { MAX_MEETINGS = 1024, MAX_MET = 16384 };      // cells, and blocks; beyond them races are reported as without order
// handed[b]: the last epoch of block b that is seen through it; met: the last block that met it.
struct Meeting { uint64_t address; uint32_t *handed, n, met; };
static Meeting meeting[MAX_MEETINGS];
static unsigned n_meetings, block_number;
static uint32_t *block_start, *seen;     // for each block of the launch: its first epoch; what the running block sees of it
static unsigned starts_capacity;

static COLD void make_starts() {
  unsigned n = starts_capacity ? starts_capacity * 2 : 256;
  block_start = (uint32_t*)realloc(block_start, n * sizeof *block_start);
  seen = (uint32_t*)realloc(seen, n * sizeof *seen);
  starts_capacity = n;
}

static void begin_meetings() {
  for (unsigned i = 0; i < n_meetings; ++i) free(meeting[i].handed);
  n_meetings = block_number = 0;
  fences = false;
}

static void begin_block_order() {
  if (block_number >= MAX_MET) return;
  if (block_number == starts_capacity) make_starts();
  block_start[block_number++] = block_epoch;
  if (fences) memset(seen, 0, block_number * sizeof *seen);
}

static COLD Meeting* meeting_at(uint64_t address) {
  for (unsigned i = 0; i < n_meetings; ++i)
    if (meeting[i].address == address) return &meeting[i];
  return 0;
}

extern "C" void cu_threadfence() {
  if (!fences && block_number) memset(seen, 0, block_number * sizeof *seen);
  fences = true;
  B.current->fence_epoch = epoch;
}

// A thread meets a cell of global memory with an atomic.
static COLD void meet_others(uint64_t address, unsigned thread) {
  Meeting* m = meeting_at(address);
  if (!m) {
    if (n_meetings == MAX_MEETINGS) return;
    m = &meeting[n_meetings++];
    *m = {address, 0, 0, 0};
  }
  if (m->n < block_number) {
    m->handed = (uint32_t*)realloc(m->handed, block_number * sizeof *m->handed);
    memset(m->handed + m->n, 0, (block_number - m->n) * sizeof *m->handed);
    m->n = block_number;
  }
  m->met = block_number;
  for (unsigned b = 0; b + 1 < block_number; ++b)
    if (seen[b] < m->handed[b]) seen[b] = m->handed[b];
  uint32_t fenced = B.fiber[thread].fence_epoch;
  if (fenced < block_epoch) return;      // none in this block
  for (unsigned b = 0; b + 1 < block_number; ++b) m->handed[b] = seen[b];
  if (m->handed[block_number - 1] < fenced) m->handed[block_number - 1] = fenced;
}

static COLD bool handed_over(uint32_t e, uint64_t address) {
  if (Meeting* m = meeting_at(address))
    if (m->met == block_number) return true;      // the cell itself
  unsigned low = 0, high = block_number;
  while (high - low > 1) { unsigned middle = (low + high) / 2; (block_start[middle] <= e ? low : high) = middle; }
  return block_number && seen[low] >= e;
}
