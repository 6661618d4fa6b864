// Races: two accesses to one cell, at least one a store, by two threads, with nothing that orders them. Inside a block
// __syncthreads() orders all threads (the epoch) and __syncwarp() those of a warp (the warp epoch); a shuffle does not
// promise to order memory. Blocks of a launch are ordered by what order.h says only. Two atomics never race.
// Each cell keeps its last writer and two readers of the current epoch, of different warps where it can: enough to find
// a conflict with any thread, though not to name every pair.
#pragma once

static COLD void report_race(ProblemKind kind, const Access& a, unsigned thread, uint32_t other_place,
                             unsigned other_thread, AccessKind other_kind) {
  Problem* p = report(kind, a.place, other_place);
  if (!p) return;
  p->region = a.region;
  p->offset = (int64_t)(a.address - region[a.region].low);
  p->size = a.size;
  p->access1 = a.kind;
  p->access2 = other_kind;
  p->thread1 = (int)thread;
  p->thread2 = (int)other_thread;
}

static COLD void report_unwritten(const Access& a, unsigned thread) {
  Problem* p = report(UNWRITTEN_SHARED, a.place, 0);
  if (!p) return;
  p->region = a.region;
  p->offset = (int64_t)(a.address - region[a.region].low);
  p->size = a.size;
  p->access1 = a.kind;
  p->thread1 = (int)thread;
}

static inline bool is_atomic(AccessKind kind) { return kind == ATOMIC || kind == EXCHANGE; }
static inline bool same_warp(unsigned a, unsigned b) { return a / WARP == b / WARP; }

struct Actor { unsigned thread, warp_epoch; };

// `other` acted in the same barrier interval as `me`.
static inline bool ordered(Actor me, unsigned other, unsigned other_warp_epoch) {
  return other == me.thread || (same_warp(other, me.thread) && other_warp_epoch != me.warp_epoch);
}

// What a store puts into one cell, and where the last value of the cell is kept; null where values are not compared.
struct Stored { uint32_t value; uint32_t* last; };

// Two stores of one statement that put the same into a cell, and no other value in between: nothing depends on which comes
// last.
static inline bool is_harmless(const Cell& c, const Access& a, Stored s) {
  return s.last && a.kind == STORE && !c.atomic && !c.varied && c.write_place == a.place && *s.last == s.value;
}

static inline bool by_earlier_block(uint32_t e) { return e >= launch_epoch && e < block_epoch; }

static inline void judge_against_writer(const Cell& c, const Access& a, Actor me, Stored s) {
  bool both_atomic = c.atomic && is_atomic(a.kind);
  AccessKind written = c.atomic ? ATOMIC : STORE;
  if (c.write_epoch == epoch) {
    if (!ordered(me, c.writer, c.writer_warp_epoch) && !both_atomic)
      report_race(is_harmless(c, a, s) ? SAME_VALUE : RACE, a, me.thread, c.write_place, c.writer, written);
  } else if (!is_shared(a.region) && by_earlier_block(c.write_epoch) && !both_atomic &&
             !(fences && handed_over(c.write_epoch, a.address))) {
    report_race(is_harmless(c, a, s) ? SAME_VALUE_BETWEEN_BLOCKS : RACE_BETWEEN_BLOCKS, a, me.thread, c.write_place,
                c.writer, written);
  }
}

static inline void judge_against_readers(const Cell& c, const Access& a, Actor me) {
  if (c.read_epoch == epoch) {
    if (!ordered(me, c.reader1, c.reader1_warp_epoch))
      report_race(RACE, a, me.thread, c.read_place, c.reader1, LOAD);
    else if (!ordered(me, c.reader2, c.reader2_warp_epoch))
      report_race(RACE, a, me.thread, c.read_place, c.reader2, LOAD);
  } else if (!is_shared(a.region) && by_earlier_block(c.read_epoch) &&
             !(fences && handed_over(c.read_epoch, a.address))) {
    report_race(RACE_BETWEEN_BLOCKS, a, me.thread, c.read_place, c.reader1, LOAD);
  }
}

static inline void remember_reader(Cell& c, const Access& a, Actor me) {
  uint16_t thread = (uint16_t)me.thread, warp = (uint16_t)me.warp_epoch;
  if (c.read_epoch != epoch) {                                          // the first reader of this epoch
    c.read_epoch = epoch;
    c.read_place = a.place;
    c.reader1 = c.reader2 = thread;
    c.reader1_warp_epoch = c.reader2_warp_epoch = warp;
  } else if (same_warp(c.reader1, thread) && c.reader1_warp_epoch != warp) {      // the old ones are ordered
    c.reader1 = thread;
    c.reader1_warp_epoch = warp;
    if (same_warp(c.reader2, thread)) { c.reader2 = thread; c.reader2_warp_epoch = warp; }
  } else if (c.reader1 != thread &&
             (c.reader2 == c.reader1 || (same_warp(c.reader2, c.reader1) && !same_warp(c.reader1, thread)))) {
    c.reader2 = thread;
    c.reader2_warp_epoch = warp;
    c.read_place = a.place;
  }
}

static inline void judge(Cell& c, const Access& a, Actor me, Stored s) {
  if ((a.kind == LOAD || a.kind == ATOMIC) && is_shared(a.region) && c.write_epoch < block_epoch) report_unwritten(a, me.thread);
  judge_against_writer(c, a, me, s);
  if (a.kind == LOAD) return remember_reader(c, a, me);
  judge_against_readers(c, a, me);
  // A thread's own atomic does not hide that it has stored there: for others that store is not ordered.
  if (is_atomic(a.kind) && c.write_epoch == epoch && !c.atomic && c.writer == me.thread) return;
  if (s.last) c.varied = c.write_epoch == epoch && (c.varied || *s.last != s.value);
  c.write_epoch = epoch;
  c.write_place = a.place;
  c.writer = (uint16_t)me.thread;
  c.writer_warp_epoch = (uint16_t)me.warp_epoch;
  c.atomic = is_atomic(a.kind);
  if (s.last) *s.last = s.value;
}

static COLD Stored stored_in(const Region& r, size_t cell, const Access& a, const uint8_t* value) {
  uint64_t low = (uint64_t)cell << r.cell_shift, offset = a.address - r.low, from = low > offset ? low - offset : 0;
  uint64_t n = a.size - from, most = 1ull << r.cell_shift;
  Stored s = {0, &r.value[cell]};
  memcpy(&s.value, value + from, n < most ? n : most);
  return s;
}

// One warp instruction on one region.
static void judge_request(const Access* const* access, const unsigned* lane, unsigned n, unsigned warp) {
  const uint8_t* value[WARP];
  bool valued = RARELY(tracing | comparing) && access[0]->region != MODULE;
  if (RARELY(valued)) {
    for (unsigned k = 0; k < n; ++k) value[k] = next_value(&B.fiber[warp * WARP + lane[k]]);
    if (tracing) trace_request(access, lane, n, warp, value);
  }
  Region& r = region[access[0]->region];
  bool meets = RARELY(fences) && !is_shared(access[0]->region) &&
               (is_atomic(access[0]->kind) || is_volatile(access[0]->place));
  size_t previous = ~(size_t)0;
  for (unsigned k = 0; k < n; ++k) {
    const Access& a = *access[k];
    Actor me = {warp * WARP + lane[k], warp_epoch[warp]};
    if (RARELY(meets)) meet_others(a.address, me.thread);
    uint64_t offset = a.address - r.low;
    size_t i = offset >> r.cell_shift, last = (offset + a.size - 1) >> r.cell_shift;
    if (last >= r.n_cells) continue;
    if (i == previous && a.kind == LOAD) {      // a broadcast: one more reader of these cells
      for (; i <= last; ++i) {
        Cell& c = r.cell[i];
        if (c.reader2 != c.reader1) continue;
        c.reader2 = (uint16_t)me.thread;
        c.reader2_warp_epoch = (uint16_t)me.warp_epoch;
      }
      continue;
    }
    previous = i;
    for (; i <= last; ++i)
      judge(r.cell[i], a, me, RARELY(valued && r.value) ? stored_in(r, i, a, value[k]) : Stored{0, 0});
  }
}
