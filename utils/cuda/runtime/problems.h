// What went wrong, as numbers. The sentences are made in Python (problems.py), which knows the source.
#pragma once

enum ProblemKind {
  OUT_OF_BOUNDS = 1, NULL_POINTER, MISALIGNED, WRITE_TO_CONST, UNWRITTEN_SHARED, RACE, RACE_BETWEEN_BLOCKS,
  ASYNC_NOT_WAITED, ASYNC_AT_EXIT, BARRIER, DEADLOCK, SHUFFLE_NOT_IN_MASK, SHUFFLE_FROM_EXITED, LANE_NOT_IN_MASK,
  STACK_OVERFLOW, ASSERTION, TOO_MUCH_SHARED, DIVISION_BY_ZERO, SHUFFLE_WIDTH, MBARRIER_NOT_MADE,
  MBARRIER_TOO_MANY, SAME_VALUE, SAME_VALUE_BETWEEN_BLOCKS
};

struct Problem {
  int32_t kind, line1, line2, access1, access2, region, size, thread1, thread2;
  uint32_t count;
  uint64_t place1, place2;
  int64_t offset;
  uint3 block;
  char text[96];
};

// A few places are kept for what stops the kernel: it is the last thing found, and often the cause of the others.
enum { MAX_PROBLEMS = 64, KEPT_FREE = 4 };
static PER_OS_THREAD Problem problems[MAX_PROBLEMS];
static PER_OS_THREAD int n_problems;
static PER_OS_THREAD bool more_problems;

static bool goes_on_after(ProblemKind kind) {
  return kind == UNWRITTEN_SHARED || kind == RACE || kind == RACE_BETWEEN_BLOCKS || kind == ASYNC_NOT_WAITED ||
         kind == SAME_VALUE || kind == SAME_VALUE_BETWEEN_BLOCKS;
}

// A new problem to be filled in, or null if this one was seen before (then it is counted) or there are too many (then
// that is noted).
static COLD Problem* report(ProblemKind kind, uint64_t place1, uint64_t place2, CuPlace call1 = 0, CuPlace call2 = 0) {
  int line1 = call1.line, line2 = call2.line;
  for (int i = 0; i < n_problems; ++i) {
    Problem& p = problems[i];
    if (p.kind == kind && p.place1 == place1 && p.place2 == place2 && p.line1 == line1 && p.line2 == line2) {
      p.count++;
      return 0;
    }
  }
  if (n_problems >= MAX_PROBLEMS - (goes_on_after(kind) ? KEPT_FREE : 0)) {
    more_problems = true;
    return 0;
  }
  Problem* p = &problems[n_problems++];
  memset(p, 0, sizeof *p);
  p->kind = kind;
  p->place1 = place1;
  p->place2 = place2;
  p->line1 = line1;
  p->line2 = line2;
  p->count = 1;
  p->region = -1;
  p->block = B.index;
  if (B.current) p->thread1 = (int)B.current->id;
  return p;
}

// Two threads that wait for different things; line2 is 0 where the other one has returned.
static void report_waiting(ProblemKind kind, const Fiber& a, const Fiber& b, const char* b_name, CuPlace b_place) {
  Problem* p = report(kind, 0, 0, a.place, b_place);
  if (!p) return;
  p->thread1 = (int)a.id;
  p->thread2 = (int)b.id;
  p->access1 = a.calls.line;       // where they come from, if the barrier is in a function
  p->access2 = b.calls.line;
  snprintf(p->text, sizeof p->text, "%s|%s", a.name, b_name);
}
