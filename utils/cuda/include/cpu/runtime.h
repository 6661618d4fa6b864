// What a kernel calls in the runtime (runtime.cpp). The runtime is compiled without access callbacks, so whatever it
// reads and writes on a kernel's behalf is logged by hand or not at all.
#pragma once

// The callbacks see one call site for each line of the kernel; these functions must therefore keep their own.
#define CU_CONST __attribute__((const))

struct CuSharedArray { unsigned launch; void* address; };   // where a __shared__ declaration lives in this launch

enum CuAtomic { CU_ADD, CU_SUB, CU_MAX, CU_MIN, CU_EXCHANGE, CU_AND, CU_OR, CU_XOR };
enum CuVote { CU_COUNT, CU_ALL, CU_ANY };

extern "C" {
void* memcpy(void*, const void*, size_t) noexcept;
void* memset(void*, int, size_t) noexcept;

uint3 cu_thread_idx() CU_CONST;
uint3 cu_block_idx() CU_CONST;
uint3 cu_block_dim() CU_CONST;
uint3 cu_grid_dim() CU_CONST;
unsigned cu_lane() CU_CONST;

void cu_syncthreads(int line);
int cu_syncthreads_vote(int predicate, int vote, int line);
void cu_syncwarp(unsigned mask, int line);
unsigned cu_ballot(unsigned mask, int predicate, int line, const char* name);
unsigned cu_activemask();
// `source` is the lane to read, or -1 to keep one's own value; the value at `value` is replaced.
void cu_shuffle(void* value, unsigned size, unsigned mask, int source, int line, const char* name);

void* cu_dynamic_shared();
void* cu_static_shared(CuSharedArray* array, const char* name, size_t bytes, size_t element);

int cu_atomic_i32(int* p, int value, int op);
unsigned cu_atomic_u32(unsigned* p, unsigned value, int op);
unsigned long long cu_atomic_u64(unsigned long long* p, unsigned long long value, int op);
float cu_atomic_f32(float* p, float value, int op);
double cu_atomic_f64(double* p, double value, int op);
unsigned cu_atomic_cas_u32(unsigned* p, unsigned expected, unsigned value);
unsigned long long cu_atomic_cas_u64(unsigned long long* p, unsigned long long expected, unsigned long long value);

void cu_copy_async(void* to, const void* from, unsigned bytes, unsigned zero_bytes);
void cu_copy_commit();
void cu_copy_wait(unsigned groups_left);

void cu_mma(const float* a, const float* b, float* c, int line);

int cu_printf(const char* format, ...) __attribute__((format(printf, 1, 2)));
void cu_assert_failed(const char* expression, int line);
}

#define printf cu_printf
#define assert(e) ((e) ? (void)0 : cu_assert_failed(#e, __LINE__))
