// Cooperative groups of the threads of a block: the block itself, and tiles and other parts of a warp. A group is the mask
// of its lanes. Grids and clusters cannot meet here, because blocks run one after another.
#pragma once

namespace cooperative_groups {

#define CU_LINE int line = __builtin_LINE()

CU_INLINE unsigned cu_thread_rank() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

// The lane that comes n-th in a mask; counting from 0.
CU_INLINE int cu_lane_of(unsigned mask, unsigned n) {
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1 && n-- == 0) return l;
  return -1;
}

class thread_group {
 public:
  CU_METHOD explicit thread_group(unsigned lanes = 0) : lanes_(lanes) {}      // 0: the whole block
  CU_METHOD void sync(CU_LINE) const { if (lanes_) cu_syncwarp(lanes_, line); else cu_syncthreads(line); }
  CU_METHOD unsigned num_threads() const { return lanes_ ? __popc(lanes_) : blockDim.x * blockDim.y * blockDim.z; }
  CU_METHOD unsigned size() const { return num_threads(); }
  CU_METHOD unsigned thread_rank() const { return lanes_ ? __popc(lanes_ & ((1u << cu_lane()) - 1)) : cu_thread_rank(); }
  CU_METHOD unsigned cu_lanes() const { return lanes_; }

 protected:
  unsigned lanes_;
};

class thread_block : public thread_group {
 public:
  CU_METHOD uint3 group_index() const { return blockIdx; }
  CU_METHOD uint3 thread_index() const { return threadIdx; }
  CU_METHOD dim3 dim_threads() const { return dim3(blockDim.x, blockDim.y, blockDim.z); }
  CU_METHOD dim3 group_dim() const { return dim_threads(); }
};
CU_INLINE thread_block this_thread_block() { return thread_block(); }

class grid_group {
 public:
  CU_METHOD unsigned long long num_blocks() const { return (unsigned long long)gridDim.x * gridDim.y * gridDim.z; }
  CU_METHOD unsigned long long block_rank() const {
    return blockIdx.x + (unsigned long long)gridDim.x * (blockIdx.y + (unsigned long long)gridDim.y * blockIdx.z);
  }
  CU_METHOD unsigned long long num_threads() const { return num_blocks() * thread_block().num_threads(); }
  CU_METHOD unsigned long long size() const { return num_threads(); }
  CU_METHOD unsigned long long thread_rank() const {
    return block_rank() * thread_block().num_threads() + cu_thread_rank();
  }
  CU_METHOD dim3 group_dim() const { return dim3(gridDim.x, gridDim.y, gridDim.z); }
  CU_METHOD uint3 block_index() const { return blockIdx; }
  template <class None = void> CU_METHOD void sync() const {
    static_assert(sizeof(None*) == 0, "a grid cannot meet on the CPU, where blocks run one after another: run it on a GPU");
  }
};
CU_INLINE grid_group this_grid() { return grid_group(); }

// ---- parts of a warp: shuffles and votes between their ranks

class cu_warp_part : public thread_group {
 public:
  CU_METHOD explicit cu_warp_part(unsigned lanes) : thread_group(lanes) {}
  template <class T> CU_METHOD T shfl(T value, int rank, CU_LINE) const { return from(value, (unsigned)rank % num_threads(), line, "shfl"); }
  template <class T> CU_METHOD T shfl_down(T value, unsigned n, CU_LINE) const {
    return from(value, thread_rank() + n, line, "shfl_down");
  }
  template <class T> CU_METHOD T shfl_up(T value, unsigned n, CU_LINE) const {
    return from(value, n <= thread_rank() ? thread_rank() - n : 32, line, "shfl_up");
  }
  CU_METHOD int any(int p, CU_LINE) const { return cu_ballot(lanes_, p, line, "any") != 0; }
  CU_METHOD int all(int p, CU_LINE) const { return cu_ballot(lanes_, !p, line, "all") == 0; }
  CU_METHOD unsigned ballot(int p, CU_LINE) const { return ranks(cu_ballot(lanes_, p, line, "ballot")); }
  template <class T> CU_METHOD unsigned match_any(T value, CU_LINE) const {
    return ranks((__match_any_sync)(CuPlace(line), lanes_, value));
  }
  template <class T> CU_METHOD unsigned match_all(T value, int& all_equal, CU_LINE) const {
    return ranks((__match_all_sync)(CuPlace(line), lanes_, value, &all_equal));
  }

 protected:
  template <class T> CU_METHOD T from(T value, unsigned rank, int line, const char* name) const {
    return cu_shuffled(value, lanes_, rank < num_threads() ? cu_lane_of(lanes_, rank) : -1, CuPlace(line), name);
  }
  CU_METHOD unsigned ranks(unsigned lanes) const {      // a mask of lanes as a mask of ranks
    unsigned result = 0, rank = 0;
    for (int l = 0; l < 32; ++l)
      if (lanes_ >> l & 1) result |= (lanes >> l & 1) << rank++;
    return result;
  }
};

class coalesced_group : public cu_warp_part {
 public:
  CU_METHOD explicit coalesced_group(unsigned lanes, unsigned rank = 0, unsigned count = 1)
      : cu_warp_part(lanes), rank_(rank), count_(count) {}
  CU_METHOD unsigned meta_group_rank() const { return rank_; }
  CU_METHOD unsigned meta_group_size() const { return count_; }

 private:
  unsigned rank_, count_;
};
CU_INLINE coalesced_group coalesced_threads(CU_LINE) { return coalesced_group(cu_converged(line)); }

template <unsigned N, class Parent = thread_block> class thread_block_tile : public cu_warp_part {
  static_assert(N <= 32 && (N & (N - 1)) == 0, "on the CPU a tile has 1, 2, 4, 8, 16 or 32 threads");

 public:
  CU_METHOD explicit thread_block_tile(unsigned parents_rank, unsigned parents_size)
      : cu_warp_part((N == 32 ? ~0u : (1u << N % 32) - 1) << cu_lane() / N * N), rank_(parents_rank / N),
        count_((parents_size + N - 1) / N) {}
  CU_METHOD static constexpr unsigned size() { return N; }
  CU_METHOD static constexpr unsigned num_threads() { return N; }
  CU_METHOD unsigned thread_rank() const { return cu_lane() % N; }
  CU_METHOD unsigned meta_group_rank() const { return rank_; }
  CU_METHOD unsigned meta_group_size() const { return count_; }
  template <class T> CU_METHOD T shfl_xor(T value, unsigned x, CU_LINE) const {
    return cu_shuffled(value, lanes_, (thread_rank() ^ x) < N ? (int)(cu_lane() ^ x) : -1, CuPlace(line), "shfl_xor");
  }

 private:
  unsigned rank_, count_;
};

template <unsigned N, class Group> CU_INLINE thread_block_tile<N, Group> tiled_partition(const Group& g) {
  return thread_block_tile<N, Group>(g.thread_rank(), g.num_threads());
}
CU_INLINE thread_group tiled_partition(const thread_group& g, unsigned n) {
  (void)g;
  return thread_group((n >= 32 ? ~0u : (1u << n) - 1) << cu_lane() / n * n);
}
template <class Label> CU_INLINE coalesced_group labeled_partition(const cu_warp_part& g, Label label, CU_LINE) {
  return coalesced_group((__match_any_sync)(CuPlace(line), g.cu_lanes(), label));
}
CU_INLINE coalesced_group binary_partition(const cu_warp_part& g, bool yes, CU_LINE) {
  unsigned lanes = cu_ballot(g.cu_lanes(), yes, line, "binary_partition");
  return coalesced_group(yes ? lanes : g.cu_lanes() & ~lanes, yes, 2);
}

template <class Group> CU_METHOD void sync(const Group& g, CU_LINE) { g.sync(line); }
template <class Group> CU_METHOD unsigned thread_rank(const Group& g) { return g.thread_rank(); }
template <class Group> CU_METHOD unsigned group_size(const Group& g) { return g.num_threads(); }

// ---- reductions and scans

template <class T> struct plus { CU_METHOD T operator()(T a, T b) const { return a + b; } };
template <class T> struct less { CU_METHOD T operator()(T a, T b) const { return b < a ? b : a; } };
template <class T> struct greater { CU_METHOD T operator()(T a, T b) const { return a < b ? b : a; } };
template <class T> struct bit_and { CU_METHOD T operator()(T a, T b) const { return a & b; } };
template <class T> struct bit_or { CU_METHOD T operator()(T a, T b) const { return a | b; } };
template <class T> struct bit_xor { CU_METHOD T operator()(T a, T b) const { return a ^ b; } };

// The values of the group in the order of its ranks; returns how many there are.
template <class T> CU_UNCHECKED inline unsigned cu_values(const cu_warp_part& g, T value, T* values, int line, const char* name) {
  T all[32];
  unsigned present = cu_exchange(&value, sizeof value, g.cu_lanes(), all, CuPlace(line), name), n = 0;
  for (int l = 0; l < 32; ++l)
    if (present >> l & 1) values[n++] = all[l];
  return n;
}

template <class T, class Op> CU_METHOD T reduce(const cu_warp_part& g, T value, Op op, CU_LINE) {
  T values[32];
  for (unsigned n = cu_values(g, value, values, line, "reduce"); n > 1; n = (n + 1) / 2)      // by halves, as with shuffles
    for (unsigned i = 0; i < n / 2; ++i) values[i] = op(values[i], values[i + (n + 1) / 2]);
  return values[0];
}
template <class T, class Op> CU_METHOD T inclusive_scan(const cu_warp_part& g, T value, Op op, CU_LINE) {
  T values[32];
  cu_values(g, value, values, line, "inclusive_scan");
  for (unsigned i = 1; i <= g.thread_rank(); ++i) values[i] = op(values[i - 1], values[i]);
  return values[g.thread_rank()];
}
template <class T> CU_METHOD T inclusive_scan(const cu_warp_part& g, T value, CU_LINE) {
  return inclusive_scan(g, value, plus<T>(), line);
}
template <class T, class Op> CU_METHOD T exclusive_scan(const cu_warp_part& g, T value, Op op, CU_LINE) {
  T values[32];
  cu_values(g, value, values, line, "exclusive_scan");
  for (unsigned i = 1; i < g.thread_rank(); ++i) values[i] = op(values[i - 1], values[i]);
  return g.thread_rank() ? values[g.thread_rank() - 1] : T();
}
template <class T> CU_METHOD T exclusive_scan(const cu_warp_part& g, T value, CU_LINE) {
  return exclusive_scan(g, value, plus<T>(), line);
}

// ---- copies by all threads of a group, each in its turn 4 bytes

template <class Group, class To, class From>
CU_METHOD void memcpy_async(const Group& g, To* to, const From* from, size_t bytes) {
  for (size_t i = g.thread_rank() * 4; i < bytes; i += g.num_threads() * 4)
    __pipeline_memcpy_async((char*)to + i, (const char*)from + i, 4);
  __pipeline_commit();
}
template <class Group> CU_METHOD void wait(const Group& g, CU_LINE) {
  __pipeline_wait_prior(0);
  g.sync(line);
}
template <unsigned Left, class Group> CU_METHOD void wait_prior(const Group& g, CU_LINE) {
  __pipeline_wait_prior(Left);
  g.sync(line);
}

#undef CU_LINE

}  // namespace cooperative_groups
