// Running a block. The threads of a warp run one after another, each to its next barrier or collective; then the next
// warp; when every thread waits at the barrier, all go on. The order is the same in every run: see order_of in state.h.
#pragma once

static void report_async_at_exit(Fiber* f) {
#ifdef CU_CHECKED
  if (f->n_copies) report(ASYNC_AT_EXIT, f->copies[0].place - first_place, 0);
#else
  (void)f;
#endif
}

static void fiber_main() {
  B.entry(B.arguments);
  report_async_at_exit(B.current);
  B.current->state = DONE;
  for (;;) to_scheduler();
}

static void prepare(Fiber* f) {
  f->sp = fresh_stack(f->stack_end, fiber_main);
  f->state = READY;
  f->n_copies = f->group = f->n_log = 0;
  f->calls = {0, 0};
  for (int i = 0; i < CANARIES; ++i) ((uint64_t*)f->stack)[i] = CANARY;
}

static bool overflowed(const Fiber* f) {
  for (int i = 0; i < CANARIES; ++i)
    if (((const uint64_t*)f->stack)[i] != CANARY) return true;
  return false;
}

static void run_fiber(Fiber* f) {
  B.current = B.last = f;
  cu_switch(&B.scheduler, f->sp);
  B.current = 0;
  if (tracing | comparing) settle(f);
  if (!overflowed(f)) return;
  if (Problem* p = report(STACK_OVERFLOW, 0, 0)) p->thread1 = (int)f->id;
  B.stopped = true;
}

static bool same_place(CuPlace a, CuPlace b) { return a.line == b.line && a.call == b.call; }

static bool same_barrier(const Fiber& a, const Fiber& b) {
  return same_place(a.place, b.place) && a.calls.chain == b.calls.chain;
}

// Lanes that wait for a collective go on when all lanes of their mask that have not returned wait for the same one.
static bool release_collectives(unsigned warp) {
  Fiber* f = B.fiber + warp * WARP;
  unsigned n_lanes = lanes_of(warp), alive = 0;
  bool released = false;
  for (unsigned l = 0; l < n_lanes; ++l)
    if (f[l].state != DONE) alive |= 1u << l;
  for (unsigned l = 0; l < n_lanes; ++l) {
    if (f[l].state != AT_WARP_SYNC) continue;
    unsigned needed = f[l].mask & alive, here = 0;
    for (unsigned k = 0; k < n_lanes; ++k)
      if (f[k].state == AT_WARP_SYNC && f[k].mask == f[l].mask && strcmp(f[k].name, f[l].name) == 0) here |= 1u << k;
    if (needed & ~here) continue;
    B.alive[warp] = alive;
    for (unsigned k = 0; k < n_lanes; ++k) {
      if (!(needed >> k & 1)) continue;
      memcpy(B.offered[warp] + SLOT * k, f[k].slot, f[k].size);
      f[k].state = READY;
      if (!f[k].size) log_warp_sync(&f[k]);
    }
    released = true;
  }
  return released;
}

// No lane can go on: those that came to one place in the meantime are the ones that are active there.
static bool release_converged(unsigned warp) {
  Fiber* f = B.fiber + warp * WARP;
  const Fiber* first = 0;
  unsigned together = 0;
  for (unsigned l = 0; l < lanes_of(warp); ++l) {
    if (f[l].state != CONVERGING) continue;
    if (!first) first = &f[l];
    if (same_place(f[l].place, first->place)) together |= 1u << l;
  }
  for (unsigned l = 0; l < lanes_of(warp); ++l) {
    if (!(together >> l & 1)) continue;
    f[l].mask = together;
    f[l].state = READY;
  }
  return together != 0;
}

// Until every lane of the warp waits at the block's barrier, has returned, or can go no further.
static void run_warp(unsigned warp) {
  Fiber* f = B.fiber + warp * WARP;
  do {
    Order turn = order_of(lanes_of(warp));
    for (unsigned i = 0; i < turn.n; ++i) {
      Fiber* lane = &f[turn(i)];
      if (lane->state == READY) run_fiber(lane);
      if (B.stopped) return;
    }
  } while (catch_up(warp) || release_collectives(warp) || release_converged(warp));
  judge_warp(warp);
}

static bool same_collective(const Fiber& a, const Fiber& b) {
  return same_place(a.place, b.place) && a.mask == b.mask && strcmp(a.name, b.name) == 0;
}

static void report_deadlock(const Fiber* collective, const Fiber* barrier) {
  if (barrier) return report_waiting(DEADLOCK, *collective, *barrier, barrier->name, barrier->place);
  for (unsigned i = 0; i < B.n_threads; ++i) {
    const Fiber& other = B.fiber[i];
    if (collective->state == AT_MBARRIER || other.state == AT_MBARRIER) continue;
    if (other.state == AT_WARP_SYNC && same_collective(other, *collective)) continue;
    if (other.state == AT_WARP_SYNC) return report_waiting(DEADLOCK, *collective, other, other.name, other.place);
  }
  report_waiting(DEADLOCK, *collective, *collective, "", 0);
}

// All threads stand still. Returns true if the block goes on, having opened the barrier.
static bool open_barrier() {
  const Fiber *first = 0, *elsewhere = 0, *collective = 0, *returned = 0;
  int count = 0, all = 1, any = 0;
  for (unsigned i = 0; i < B.n_threads; ++i) {
    const Fiber& f = B.fiber[i];
    if (f.state == DONE) { if (!returned) returned = &f; continue; }
    if (f.state == AT_WARP_SYNC || f.state == AT_MBARRIER) { if (!collective) collective = &f; continue; }
    count += f.predicate;
    all &= f.predicate;
    any |= f.predicate;
    if (!first) first = &f;
    else if (!elsewhere && !same_barrier(f, *first)) elsewhere = &f;
  }
  if (collective) { report_deadlock(collective, first); B.stopped = true; return false; }
  if (!first) return false;                                              // all have returned
  if (elsewhere) {
    report_waiting(BARRIER, *first, *elsewhere, elsewhere->name, elsewhere->place);
    B.stopped = true;
    return false;
  }
  if (returned) report_waiting(BARRIER, *first, *returned, "", 0);
  B.vote[CU_COUNT] = count;
  B.vote[CU_ALL] = all;
  B.vote[CU_ANY] = any;
  begin_barrier_interval();
  for (unsigned i = 0; i < B.n_threads; ++i)
    if (B.fiber[i].state == AT_BARRIER) B.fiber[i].state = READY;
  return true;
}

static void run_block() {
  unsigned n_warps = (B.n_threads + WARP - 1) / WARP;
  for (unsigned i = 0; i < B.n_threads; ++i) prepare(&B.fiber[i]);
  n_mbarriers = 0;
  begin_block();
  do {
    Order turn = order_of(n_warps);
    for (unsigned w = 0; w < n_warps && !B.stopped; ++w) run_warp((unsigned)turn(w));
  } while (!B.stopped && (release_mbarriers() || open_barrier()));
  end_block();
}

// ---- a launch

static void make_fibers(unsigned n) {
  if (B.n_threads == n) return;
  for (unsigned i = 0; i < B.n_threads; ++i) { free(B.fiber[i].log); free(B.fiber[i].copies); free(B.fiber[i].values); }
  free(B.fiber);
  free(B.stacks);
  free(B.offered);
  free(B.alive);
  unsigned n_warps = (n + WARP - 1) / WARP;
  B.n_threads = n;
  B.fiber = (Fiber*)calloc(n, sizeof(Fiber));
  B.offered = (char (*)[WARP * SLOT])calloc(n_warps, sizeof *B.offered);
  B.alive = (unsigned*)calloc(n_warps, sizeof *B.alive);
  B.stacks = (char*)malloc(SLACK_BYTES + (size_t)n * (STACK_BYTES + STACK_SKEW) + 64);
  char* first = (char*)(((uintptr_t)B.stacks + SLACK_BYTES + 63) & ~(uintptr_t)63);
  for (unsigned i = 0; i < n; ++i) {
    B.fiber[i].id = i;
    B.fiber[i].stack = first + (size_t)i * (STACK_BYTES + STACK_SKEW);
    B.fiber[i].stack_end = B.fiber[i].stack + STACK_BYTES;
  }
}

static void make_dynamic_shared(size_t bytes) {
#ifdef CU_CHECKED
  B.dynamic_shared = bytes ? (char*)add_shared("dynamic shared memory", bytes, 1 << dynamic_shift, dynamic_shift, {0, 0}) : 0;
#else
  if (B.dynamic_bytes >= bytes) return;
  B.dynamic_shared = (char*)(((uintptr_t)malloc(bytes + 128) + 127) & ~(uintptr_t)127);
  B.dynamic_bytes = bytes;
#endif
}

// Runs blocks first, first + step, first + 2 step, ... and returns the number of problems found.
// A plain run calls this from one OS thread for each core.
EXPORT int cu_run(void (*entry)(void**), void** arguments, const unsigned* grid, const unsigned* block,
                  uint64_t dynamic_bytes, uint64_t first, uint64_t step, uint64_t schedule) {
  unsigned n = block[0] * block[1] * block[2];
  make_fibers(n);
  B.current = 0;
  B.last = B.fiber;
  B.stopped = false;
  B.entry = entry;
  B.arguments = arguments;
  B.block_dim = {block[0], block[1], block[2]};
  B.grid_dim = {grid[0], grid[1], grid[2]};
  B.schedule = (int)schedule;
  B.seed = 1;
  n_problems = 0;
  more_problems = false;
  for (unsigned i = 0; i < n; ++i)
    B.fiber[i].thread = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
  begin_launch();
  make_dynamic_shared(dynamic_bytes);
  uint64_t total = (uint64_t)grid[0] * grid[1] * grid[2];
  Order turn = order_of(total);
  for (uint64_t i = first; i < total && !B.stopped; i += step) {
    uint64_t b = turn(i);
    B.index = {(unsigned)(b % grid[0]), (unsigned)(b / grid[0] % grid[1]), (unsigned)(b / grid[0] / grid[1])};
    begin_trace(b);
    run_block();
  }
  tracing = false;
  forget_expected_reads();
  return n_problems;
}

// The problems of the last cu_run on this OS thread; `more` says whether there were others that found no place.
EXPORT const Problem* cu_problems(int* more) { *more = more_problems; return problems; }

EXPORT size_t cu_take_output(const char** text) {
  size_t n = output_bytes;
  *text = output;
  output_bytes = 0;
  output_cut = false;
  return n;
}
