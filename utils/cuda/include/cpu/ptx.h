// Instructions of PTX that kernels write by hand, with the layouts over the lanes of a warp that the PTX manual gives them.
// ptx.py turns an `asm` statement into calls of these. Included where a source has such statements.
#pragma once

// ---- addresses of shared memory have 32 bits: a window of 256 MB, and where in it. The low bits are the pointer's own.

extern "C" unsigned cu_shared_address(const void* p);
extern "C" void* cu_shared_pointer(unsigned address);
CU_INLINE unsigned cu_to_shared(const void* p) { return cu_shared_address(p); }
#define __cvta_generic_to_shared(p) ((size_t)cu_shared_address(p))

CU_INLINE unsigned cu_ptx_bits(unsigned x) { return x; }
CU_INLINE unsigned cu_ptx_bits(int x) { return (unsigned)x; }
CU_INLINE unsigned cu_ptx_bits(float x) { return cu_bits<unsigned>(x); }

#define cu_ptx_cp_async(...) cu_ptx_cp_async_of(__VA_ARGS__, cu_none, cu_none)
struct CuNone {};
static const CuNone cu_none;
#define CU_PTX_CALL inline __attribute__((always_inline))
CU_PTX_CALL void cu_ptx_cp_async_of(unsigned to, unsigned long long from, unsigned bytes, CuNone, CuNone) {
  __pipeline_memcpy_async(cu_shared_pointer(to), (const void*)from, bytes, 0);
}
CU_PTX_CALL void cu_ptx_cp_async_of(unsigned to, unsigned long long from, unsigned bytes, unsigned wanted, CuNone, CuNone = {}) {
  __pipeline_memcpy_async(cu_shared_pointer(to), (const void*)from, bytes, bytes - wanted);
}
template <class T, class... More> CU_PTX_CALL void cu_ptx_cp_async_of(unsigned to, const T* from, unsigned bytes, More... more) {
  cu_ptx_cp_async_of(to, (unsigned long long)(size_t)from, bytes, more...);
}
template <class T, class... More> CU_PTX_CALL void cu_ptx_cp_async_of(unsigned to, T* from, unsigned bytes, More... more) {
  cu_ptx_cp_async_of(to, (unsigned long long)(size_t)from, bytes, more...);
}

// ---- registers are bits: an operand is read as the instruction's type, and a result written as the register's own

template <class T, class S> CU_PTX_CALL T cu_ptx_get(S s) {
  if constexpr (sizeof(T) == sizeof(S)) return cu_bits<T>(s);
  else return (T)s;
}
template <class D, class V> CU_PTX_CALL void cu_ptx_put(D& d, V v) {
  if constexpr (sizeof(D) == sizeof(V)) d = cu_bits<D>(v);
  else d = (D)v;
}
template <class T> CU_PTX_CALL T cu_ptx_shl(T x, unsigned n) { return n < 8 * sizeof(T) ? (T)(x << n) : (T)0; }
template <class T> CU_PTX_CALL T cu_ptx_shr(T x, unsigned n) { return (T)(x >> (n < 8 * sizeof(T) ? n : 8 * sizeof(T) - 1) >> (n >= 8 * sizeof(T))); }
template <class T> CU_PTX_CALL T cu_ptx_bfe(T x, T from, T bits) {
  unsigned first = (unsigned)from & 255, n = (unsigned)bits & 255;
  if (n == 0 || first >= 32) return n == 0 || x >= 0 ? (T)0 : (T)-1;
  if (n > 32 - first) n = 32 - first;
  return (T)((T)(x << (32 - first - n)) >> (32 - n));
}
CU_PTX_CALL unsigned cu_ptx_bfi(unsigned x, unsigned into, unsigned first, unsigned n) {
  unsigned mask = first > 31 ? 0 : (n > 31 ? ~0u : (1u << n) - 1) << first;
  return (into & ~mask) | (first > 31 ? 0 : x << first & mask);
}
CU_PTX_CALL unsigned cu_ptx_lop3(unsigned a, unsigned b, unsigned c, unsigned table) {
  unsigned result = 0;
  for (unsigned i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}

template <class T> CU_PTX_CALL void* cu_ptx_pointer(T* p) { return (void*)p; }
CU_PTX_CALL void* cu_ptx_pointer(unsigned long long p) { return (void*)(size_t)p; }
template <class T> CU_PTX_CALL unsigned long long cu_ptx_plus(T* p, long long bytes) { return (size_t)p + bytes; }
template <class T> CU_PTX_CALL T cu_ptx_plus(T address, long long bytes) { return address + (T)bytes; }

// `ordered`: volatile, relaxed and stronger. Such accesses do not race with one another, as atomics do not.
CU_UNCHECKED __attribute__((noinline)) inline void cu_ptx_access(void* values, const void* p, unsigned size, int is_store, int ordered) {
  if (ordered) cu_log_atomic(p, size, __builtin_return_address(0));
  else cu_log(p, size, is_store, __builtin_return_address(0));
  if (is_store) __builtin_memcpy((void*)p, values, size);
  else __builtin_memcpy(values, p, size);
}

CU_INLINE unsigned cu_ptx_pack_f16(float high, float low) { return cu_bits<unsigned>(__half2(low, high)); }
CU_INLINE unsigned cu_ptx_pack_bf16(float high, float low) { return cu_bits<unsigned>(__nv_bfloat162(low, high)); }
CU_INLINE unsigned cu_ptx_to_tf32(float x) {      // 10 bits of mantissa, ties away from zero
  unsigned bits = cu_bits<unsigned>(x);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & 0xffffe000;
}

// ---- ldmatrix: lane l gives the address of row l % 8 of matrix l / 8, and gets two neighbours of each matrix

CU_UNCHECKED __attribute__((noinline)) inline void cu_ptx_ldmatrix(unsigned address, int count, bool transposed, int line,
                                                                  unsigned* r0, unsigned* r1 = 0, unsigned* r2 = 0,
                                                                  unsigned* r3 = 0) {
  unsigned *result[] = {r0, r1, r2, r3}, lane = cu_lane();
  const void *row = cu_shared_pointer(address), *rows[32];
  if (lane < 8u * (unsigned)count) cu_log(row, 16, 0, __builtin_return_address(0));      // 8 rows are one pass over the banks
  cu_exchange(&row, sizeof row, 0xffffffffu, rows, line, "ldmatrix");
  unsigned values[4] = {0, 0, 0, 0};
  for (int m = 0; m < count; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      unsigned r = transposed ? lane % 4 * 2 + i : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + i;
      pair[i] = ((const uint16_t*)rows[8 * m + r])[c];
    }
    values[m] = pair[0] | (unsigned)pair[1] << 16;
  }
  char nothing[1] = {0}, all[32];
  cu_exchange(nothing, 1, 0xffffffffu, all, line, "ldmatrix");      // nobody writes to a row that a neighbour still reads
  for (int m = 0; m < count; ++m) *result[m] = values[m];
}

// ---- mma.m16n8kK: lane l holds row l / 4 and row l / 4 + 8 of A and of D, and column l / 4 of B; which of the K inner
// places, is said by l % 4. A register holds `PER` numbers that stand side by side.

struct cu_ptx_f16 { enum { PER = 2 }; static float at(unsigned w, int i) { return cu_half_to_float((uint16_t)(w >> 16 * i)); } };
struct cu_ptx_bf16 { enum { PER = 2 }; static float at(unsigned w, int i) { return cu_bits<float>((w >> 16 * i & 0xffff) << 16); } };
struct cu_ptx_tf32 { enum { PER = 1 }; static float at(unsigned w, int) { return cu_bits<float>(w & 0xffffe000); } };
struct cu_ptx_s8 { enum { PER = 4 }; static int at(unsigned w, int i) { return (signed char)(w >> 8 * i); } };
struct cu_ptx_u8 { enum { PER = 4 }; static int at(unsigned w, int i) { return (unsigned char)(w >> 8 * i); } };

// sum[0..3] += rows l / 4 and l / 4 + 8 of A times columns 2 (l % 4) and the next of B
template <class In, int K, class Sum> CU_UNCHECKED static void cu_ptx_multiply(const unsigned* a, const unsigned* b, Sum* sum, int line) {
  enum { PER = In::PER, B_REGISTERS = K / (4 * PER), A_REGISTERS = 2 * B_REGISTERS };
  struct A { unsigned r[A_REGISTERS]; } mine_a, all_a[32];
  struct B { unsigned r[B_REGISTERS]; } mine_b, all_b[32];
  for (int i = 0; i < A_REGISTERS; ++i) mine_a.r[i] = a[i];
  for (int i = 0; i < B_REGISTERS; ++i) mine_b.r[i] = b[i];
  cu_exchange(&mine_a, sizeof mine_a, 0xffffffffu, all_a, line, "mma.sync");
  cu_exchange(&mine_b, sizeof mine_b, 0xffffffffu, all_b, line, "mma.sync");
  unsigned lane = cu_lane();
  for (int k = 0; k < K; ++k) {
    int part = k / (4 * PER), holder = k / PER % 4, place = k % PER;
    for (int d = 0; d < 4; ++d)
      sum[d] += In::at(all_a[lane / 4 * 4 + holder].r[2 * part + d / 2], place) *
                In::at(all_b[(lane % 4 * 2 + d % 2) * 4 + holder].r[part], place);
  }
}
template <class In, int K> CU_UNCHECKED static void cu_ptx_mma_f32(const unsigned* a, const unsigned* b, float* d, int line) {
  cu_ptx_multiply<In, K>(a, b, d, line);
}
template <class In, int K> CU_UNCHECKED static void cu_ptx_mma_s32(const unsigned* a, const unsigned* b, int* d, int line) {
  cu_ptx_multiply<In, K>(a, b, d, line);
}
template <class In, int K> CU_UNCHECKED static void cu_ptx_mma_f16(const unsigned* a, const unsigned* b, unsigned* d, int line) {
  float sum[4] = {cu_ptx_f16::at(d[0], 0), cu_ptx_f16::at(d[0], 1), cu_ptx_f16::at(d[1], 0), cu_ptx_f16::at(d[1], 1)};
  cu_ptx_multiply<In, K>(a, b, sum, line);
  d[0] = cu_ptx_pack_f16(sum[1], sum[0]);
  d[1] = cu_ptx_pack_f16(sum[3], sum[2]);
}
