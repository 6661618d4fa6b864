// What went wrong, as numbers. The sentences are made in Python (problems.py), which knows the source.
#pragma once

enum ProblemKind {
  OUT_OF_BOUNDS = 1, NULL_POINTER, MISALIGNED, WRITE_TO_CONST, UNWRITTEN_SHARED, RACE, RACE_BETWEEN_BLOCKS,
  ASYNC_NOT_WAITED, ASYNC_AT_EXIT, BARRIER, DEADLOCK, SHUFFLE_NOT_IN_MASK, SHUFFLE_FROM_EXITED, LANE_NOT_IN_MASK,
  STACK_OVERFLOW, ASSERTION, TOO_MUCH_SHARED
};

struct Problem {
  int32_t kind, line1, line2, access1, access2, region, size, thread1, thread2;
  uint32_t count;
  uint64_t place1, place2;
  int64_t offset;
  uint3 block;
  char text[96];
};

enum { MAX_PROBLEMS = 64 };
static PER_OS_THREAD Problem problems[MAX_PROBLEMS];
static PER_OS_THREAD int n_problems;

// A new problem to be filled in, or null if this one was seen before (then it is counted) or there are too many.
static COLD Problem* report(ProblemKind kind, uint64_t place1, uint64_t place2, int line1 = 0, int line2 = 0) {
  for (int i = 0; i < n_problems; ++i) {
    Problem& p = problems[i];
    if (p.kind == kind && p.place1 == place1 && p.place2 == place2 && p.line1 == line1 && p.line2 == line2) {
      p.count++;
      return 0;
    }
  }
  if (n_problems == MAX_PROBLEMS) return 0;
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
static void report_waiting(ProblemKind kind, const Fiber& a, const Fiber& b, const char* b_name, int b_line) {
  Problem* p = report(kind, 0, 0, a.line, b_line);
  if (!p) return;
  p->thread1 = (int)a.id;
  p->thread2 = (int)b.id;
  snprintf(p->text, sizeof p->text, "%s|%s", a.name, b_name);
}
