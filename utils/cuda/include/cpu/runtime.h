// What a kernel calls in the runtime (runtime.cpp). The runtime is compiled without access callbacks, so whatever it
// reads and writes on a kernel's behalf is logged by hand or not at all.
#pragma once

// The same for a thread wherever it asks: the compiler may ask once.
#define CU_CONST __attribute__((const))

struct CuShape { int columns; char code; };      // of an array: its last extent, and a letter for its type
struct CuSharedArray { unsigned launch; void* address; };   // where a __shared__ declaration lives in this launch

// A place in the kernel: its line and, as a line can hold several calls, the number of the call.
struct CuPlace {
  int line, call;
  constexpr CuPlace(int a, int b = 0) : line(a), call(b) {}
};

// One call of a function that holds a barrier, while it runs: calls.py.
struct CuCalls { unsigned chain; int line; };

enum CuVote { CU_COUNT, CU_ALL, CU_ANY };

#if defined(__APPLE__)
typedef unsigned long clock_t;      // as the platform has it
#else
typedef long clock_t;
#endif

extern "C" {
uint3 cu_thread_idx() CU_CONST;
uint3 cu_block_idx() CU_CONST;
uint3 cu_block_dim() CU_CONST;
uint3 cu_grid_dim() CU_CONST;
unsigned cu_lane() CU_CONST;

CuCalls cu_enter(int line, unsigned call);
void cu_leave(CuCalls before);
void cu_syncthreads(CuPlace place);
int cu_syncthreads_vote(int predicate, int vote, CuPlace place);
void cu_syncwarp(unsigned mask, CuPlace place);
unsigned cu_ballot(unsigned mask, int predicate, CuPlace place, const char* name);
unsigned cu_converged(CuPlace place);      // the lanes of the warp that come here before anything else holds them
// Writes the values of all lanes of `mask` to `all`, `size` bytes for each of 32, and returns which lanes there are.
unsigned cu_exchange(const void* mine, unsigned size, unsigned mask, void* all, CuPlace place, const char* name);
// `source` is the lane to read, or -1 to keep one's own value; the value at `value` is replaced.
void cu_wrong_width(int width, CuPlace place, const char* name);
void cu_shuffle(void* value, unsigned size, unsigned mask, int source, CuPlace place, const char* name);

// Barriers in shared memory, and the copies that they wait for: runtime/mbarrier.h.
void cu_mbarrier_init(void* address, int expected, CuPlace place);
unsigned long long cu_mbarrier_arrive(void* address, int n, long long bytes, int dropped, CuPlace place);
void cu_mbarrier_wait(const void* address, unsigned long long phase, int by_parity, CuPlace place);
void cu_mbarrier_track(void* address, int arrives, CuPlace place);
void cu_bulk_store(void* to, const void* from, size_t bytes);
void cu_mbarrier_copy(void* to, const void* from, size_t bytes, void* address, int is_bulk, CuPlace place);

void* cu_dynamic_shared();
void* cu_static_shared(CuSharedArray* array, const char* name, size_t bytes, size_t element, CuShape shape);

void cu_log(const void* p, unsigned size, int is_store, const void* place);
void cu_log_atomic(const void* p, unsigned size, const void* place);
void cu_mma(const float* a, const float* b, float* c, CuPlace place);

long long cu_clock();

int cu_printf(const char* format, ...) __attribute__((format(printf, 1, 2)));
void cu_assert_failed(const char* expression, int line);
}

#define printf cu_printf
#define clock64() cu_clock()
#define clock() ((clock_t)cu_clock())
#define assert(e) ((e) ? (void)0 : cu_assert_failed(#e, __LINE__))
