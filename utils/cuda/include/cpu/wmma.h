// wmma tiles of 16x16x16. Element (row, column) of a tile lives in lane 16 * (row % 2) + column, at place row / 2, so
// that a warp's loads and stores of a row-major tile are coalesced. A kernel may not rely on the place:
// who reads what a warp has stored needs a __syncwarp first.
#pragma once

namespace nvcuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
  static_assert(M == 16 && N == 16 && K == 16, "on the CPU a wmma tile is 16x16x16");
  enum { num_elements = 8 };
  T x[num_elements];
};

template <class A> struct is_col_major { enum { value = 0 }; };
template <> struct is_col_major<col_major> { enum { value = 1 }; };

template <class Fragment, class V> CU_INLINE void fill_fragment(Fragment& f, V value) {
  for (int i = 0; i < 8; ++i) f.x[i] = value;
}

CU_INLINE unsigned cu_offset(int i, unsigned stride, bool by_column) {
  unsigned lane = cu_lane(), row = 2 * i + lane / 16, column = lane % 16;
  return by_column ? column * stride + row : row * stride + column;
}

// In the checked build these are calls, logged by hand: the accesses then belong to the kernel's line.
#ifdef CU_CHECKED
#define CU_TILE_FUNCTION CU_UNCHECKED __attribute__((noinline))
#define CU_LOG(p, is_store) cu_log(p, sizeof *(p), is_store, __builtin_return_address(0))
#else
#define CU_TILE_FUNCTION inline
#define CU_LOG(p, is_store) ((void)0)
#endif

template <class Fragment, class T>
CU_TILE_FUNCTION void load_tile(Fragment& f, const T* p, unsigned stride, bool by_column, int line) {
  for (int i = 0; i < 8; ++i) {
    const T* from = p + cu_offset(i, stride, by_column);
    CU_LOG(from, 0);
    f.x[i] = *from;
  }
  cu_syncwarp(0xffffffffu, line);
}

template <class Fragment, class T>
CU_TILE_FUNCTION void store_tile(T* p, const Fragment& f, unsigned stride, bool by_column, int line) {
  for (int i = 0; i < 8; ++i) {
    T* to = p + cu_offset(i, stride, by_column);
    CU_LOG(to, 1);
    *to = f.x[i];
  }
  char nothing[1] = {0}, all[32];
  cu_exchange(nothing, 1, 0xffffffffu, all, line, "store_matrix_sync");   // all lanes arrive; memory is not ordered by it
}

template <class Use, class T, class Layout>
CU_INLINE void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* p, unsigned stride, int line = __builtin_LINE()) {
  load_tile(f, p, stride, is_col_major<Layout>::value, line);
}

template <class T>
CU_INLINE void load_matrix_sync(fragment<accumulator, 16, 16, 16, T>& f, const T* p, unsigned stride, layout_t layout,
                                int line = __builtin_LINE()) {
  load_tile(f, p, stride, layout == mem_col_major, line);
}

template <class T>
CU_INLINE void store_matrix_sync(T* p, const fragment<accumulator, 16, 16, 16, T>& f, unsigned stride, layout_t layout,
                                 int line = __builtin_LINE()) {
  store_tile(p, f, stride, layout == mem_col_major, line);
}

template <class D, class A, class B, class C>
CU_INLINE void mma_sync(D& d, const A& a, const B& b, const C& c, int line = __builtin_LINE()) {
  float fa[8], fb[8], fc[8];
  for (int i = 0; i < 8; ++i) { fa[i] = float(a.x[i]); fb[i] = float(b.x[i]); fc[i] = float(c.x[i]); }
  cu_mma(fa, fb, fc, line);
  for (int i = 0; i < 8; ++i) d.x[i] = fc[i];
}

}  // namespace wmma
}  // namespace nvcuda
