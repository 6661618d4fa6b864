// Barriers that live in shared memory: cuda::barrier, cuda::pipeline and PTX's mbarrier. A phase is over when the expected
// number of arrivals, and of bytes that copies bring, have come. Who waits for a phase goes on when no thread of the block can
// run: then the copies that belong to it land, and what was done before is ordered with what comes after. That orders more
// than one barrier does, so a race may be missed; none is invented.
#pragma once

enum { MAX_MBARRIERS = 512 };
struct MBarrier { const void* address; int expected, pending; long long bytes; unsigned phase; };
static PER_OS_THREAD MBarrier mbarrier[MAX_MBARRIERS];
static PER_OS_THREAD unsigned n_mbarriers;
enum { MBARRIER_BYTES = 8 };

static MBarrier* mbarrier_at(const void* address) {
  for (unsigned i = 0; i < n_mbarriers; ++i)
    if (mbarrier[i].address == address) return &mbarrier[i];
  return 0;
}

static MBarrier* known_mbarrier(const void* address, CuPlace place) {
  if (MBarrier* b = mbarrier_at(address)) return b;
  report(MBARRIER_NOT_MADE, 0, 0, place);
  stop_kernel();
  return 0;
}

static void end_phase_if_complete(MBarrier* b) {
  if (b->pending > 0 || b->bytes != 0) return;
  b->pending = b->expected;
  b->phase++;
}

extern "C" void cu_mbarrier_init(void* address, int expected, CuPlace place) {
  log_access(address, MBARRIER_BYTES, STORE, CALLER);
  MBarrier* b = mbarrier_at(address);
  if (!b) {
    if (n_mbarriers == MAX_MBARRIERS || expected < 1) { report(MBARRIER_NOT_MADE, 0, 0, place); stop_kernel(); }
    b = &mbarrier[n_mbarriers++];
  }
  *b = {address, expected, expected, 0, 0};
}

// Returns the number of the phase that the arrival belongs to. `bytes` more are expected; `dropped` of the arrivals are the last.
extern "C" unsigned long long cu_mbarrier_arrive(void* address, int n, long long bytes, int dropped, CuPlace place) {
  log_access(address, MBARRIER_BYTES, EXCHANGE, CALLER);
  MBarrier* b = known_mbarrier(address, place);
  unsigned phase = b->phase;
  if (n > b->pending) {
    report(MBARRIER_TOO_MANY, 0, 0, place);
    stop_kernel();
  }
  b->bytes += bytes;
  b->pending -= n;
  b->expected -= dropped;
  end_phase_if_complete(b);
  return phase;
}

static bool is_over(const Fiber* f) {
  const MBarrier* b = mbarrier_at(f->waits_for);
  if (!b) return false;
  return f->by_parity ? (b->phase & 1) != (f->phase & 1) : b->phase > f->phase;
}

extern "C" void cu_mbarrier_wait(const void* address, unsigned long long phase, int by_parity, CuPlace place) {
  log_access((void*)address, MBARRIER_BYTES, EXCHANGE, CALLER);
  known_mbarrier(address, place);
  Fiber* f = B.current;
  f->waits_for = address;
  f->phase = (unsigned)phase;
  f->by_parity = by_parity != 0;
  f->place = place;
  f->name = "a barrier in shared memory";
  f->state = AT_MBARRIER;
  to_scheduler();
}

static void issue(AsyncCopy c) {
  Fiber* f = B.current;
  copy_issued(c);
  if (f->n_copies == f->copy_capacity) {
    f->copy_capacity = f->copy_capacity * 2 + 16;
    f->copies = (AsyncCopy*)realloc(f->copies, f->copy_capacity * sizeof c);
  }
  f->copies[f->n_copies++] = c;
}

// A copy that the barrier's phase waits for. A bulk copy brings its bytes to the count of the phase.
extern "C" void cu_mbarrier_copy(void* to, const void* from, size_t bytes, void* address, int is_bulk, CuPlace place) {
  MBarrier* b = known_mbarrier(address, place);
  unsigned phase = b->phase;
  for (size_t at = 0; at < bytes;) {
    size_t left = bytes - at, both = ((uintptr_t)to | (uintptr_t)from) + at;
    unsigned piece = 1, most = is_bulk && !tracing ? 32 : 16;      // a sector; what is traced has room for 16 bytes
    while (piece < most && left >= piece * 2 && (both & (piece * 2 - 1)) == 0) piece *= 2;
    issue({(char*)to + at, (const char*)from + at, piece, 0, 0, CALLER, address, phase});
    at += piece;
  }
  if (!is_bulk) return;
  b->bytes -= (long long)bytes;
  end_phase_if_complete(b);
}

// The barrier waits for all copies that this thread has issued so far; `arrives` says whether the thread itself counts as one
// of those that come.
extern "C" void cu_mbarrier_track(void* address, int arrives, CuPlace place) {
  MBarrier* b = known_mbarrier(address, place);
  for (unsigned i = 0; i < B.current->n_copies; ++i) {
    AsyncCopy& c = B.current->copies[i];
    if (c.barrier) continue;
    c.barrier = address;
    c.phase = b->phase;
  }
  if (arrives) cu_mbarrier_arrive(address, 1, 0, 0, place);
}

// From shared to global memory, as one of the thread's groups.
extern "C" void cu_bulk_store(void* to, const void* from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 16)
    issue({(char*)to + at, (const char*)from + at, 16, 0, B.current->group, CALLER, 0, 0});
}

static void land(Fiber* f, const AsyncCopy& c) {
  memcpy(c.to, c.from, c.bytes - c.zeros);
  memset((char*)c.to + c.bytes - c.zeros, 0, c.zeros);
  copy_landed(f, c);
}

static void land_for_barriers(Fiber* f) {
  unsigned kept = 0;
  for (unsigned i = 0; i < f->n_copies; ++i) {
    AsyncCopy c = f->copies[i];
    const MBarrier* b = c.barrier ? mbarrier_at(c.barrier) : 0;
    if (b && b->phase > c.phase) land(f, c);
    else f->copies[kept++] = c;
  }
  f->n_copies = kept;
}

// No thread of the block can run. Returns whether some that waited for a phase can now.
static bool release_mbarriers() {
  bool any = false;
  for (unsigned i = 0; i < B.n_threads; ++i)
    any |= B.fiber[i].state == AT_MBARRIER && is_over(&B.fiber[i]);
  if (!any) return false;
  for (unsigned i = 0; i < B.n_threads; ++i) land_for_barriers(&B.fiber[i]);
  for (unsigned w = 0; w * WARP < B.n_threads; ++w) judge_warp(w);
  begin_barrier_interval();
  for (unsigned i = 0; i < B.n_threads; ++i)
    if (B.fiber[i].state == AT_MBARRIER && is_over(&B.fiber[i])) B.fiber[i].state = READY;
  return true;
}
