// cuda::barrier, cuda::pipeline and the copies that belong to them, for the threads of a block. Included where a source
// includes <cuda/barrier> or <cuda/pipeline>.
#pragma once

#ifndef CU_STD_MOVE
#define CU_STD_MOVE
#define CU_MOVE_AND_FORWARD \
  template <class T> struct cu_bare { typedef T type; }; \
  template <class T> struct cu_bare<T&> { typedef T type; }; \
  template <class T> struct cu_bare<T&&> { typedef T type; }; \
  template <class T> CU_METHOD constexpr typename cu_bare<T>::type&& move(T&& x) { return (typename cu_bare<T>::type&&)x; }
namespace std { CU_MOVE_AND_FORWARD }
namespace cuda { namespace std { CU_MOVE_AND_FORWARD } }
#endif

namespace cuda {

enum thread_scope { thread_scope_system, thread_scope_device, thread_scope_block, thread_scope_thread };
enum class pipeline_role { producer, consumer };
template <size_t alignment> struct aligned_size_t {
  enum { align = alignment };
  size_t value;
  CU_METHOD explicit constexpr aligned_size_t(size_t n) : value(n) {}
  CU_METHOD constexpr operator size_t() const { return value; }
};

#define CU_LINE int line = __builtin_LINE()

template <thread_scope scope = thread_scope_system> class barrier {
  unsigned long long state_;

 public:
  typedef unsigned long long arrival_token;
  barrier() = default;
  barrier(const barrier&) = delete;
  CU_METHOD explicit barrier(ptrdiff_t expected, CU_LINE) { cu_mbarrier_init(this, (int)expected, line); }
  CU_METHOD static constexpr ptrdiff_t max() { return (1 << 20) - 1; }
  CU_METHOD arrival_token arrive(ptrdiff_t n = 1, CU_LINE) { return cu_mbarrier_arrive(this, (int)n, 0, 0, line); }
  CU_METHOD void wait(arrival_token token, CU_LINE) const { cu_mbarrier_wait(this, token, 0, line); }
  CU_METHOD void wait_parity(bool parity, CU_LINE) const { cu_mbarrier_wait(this, parity, 1, line); }
  CU_METHOD bool try_wait(arrival_token token, CU_LINE) const { return cu_mbarrier_wait(this, token, 0, line), true; }
  CU_METHOD bool try_wait_parity(bool parity, CU_LINE) const { return cu_mbarrier_wait(this, parity, 1, line), true; }
  CU_METHOD void arrive_and_wait(CU_LINE) { cu_mbarrier_wait(this, cu_mbarrier_arrive(this, 1, 0, 0, line), 0, line); }
  CU_METHOD void arrive_and_drop(CU_LINE) { cu_mbarrier_arrive(this, 1, 0, 1, line); }
};
template <thread_scope S> CU_METHOD void init(barrier<S>* b, ptrdiff_t expected, CU_LINE) {
  cu_mbarrier_init(b, (int)expected, line);
}

namespace device {
template <thread_scope S> CU_METHOD unsigned long long* barrier_native_handle(barrier<S>& b) { return (unsigned long long*)&b; }
template <thread_scope S>
CU_METHOD typename barrier<S>::arrival_token barrier_arrive_tx(barrier<S>& b, ptrdiff_t n, ptrdiff_t bytes, CU_LINE) {
  return cu_mbarrier_arrive(&b, (int)n, bytes, 0, line);
}
template <thread_scope S> CU_METHOD void barrier_expect_tx(barrier<S>& b, ptrdiff_t bytes, CU_LINE) {
  cu_mbarrier_arrive(&b, 0, bytes, 0, line);
}
template <class T, class Size, thread_scope S>
CU_METHOD void memcpy_async_tx(T* to, const T* from, Size bytes, barrier<S>& b, CU_LINE) {
  cu_mbarrier_copy(to, from, (size_t)bytes, &b, 1, line);
}
}  // namespace device
using device::barrier_native_handle;

// ---- pipelines: for one thread, the groups of cp.async; for a block, two barriers for each stage

template <thread_scope scope, unsigned char stages> struct pipeline_shared_state {
  unsigned long long full[stages], empty[stages];
};

template <thread_scope scope> class pipeline {
  unsigned long long *full_, *empty_;
  unsigned stages_, put_, taken_, freed_, acquired_;
  bool produces_, consumes_;

 public:
  CU_METHOD pipeline() : full_(0), empty_(0), stages_(0), put_(0), taken_(0), freed_(0), acquired_(0), produces_(true), consumes_(true) {}
  CU_METHOD pipeline(unsigned long long* full, unsigned long long* empty, unsigned stages, bool produces, bool consumes)
      : full_(full), empty_(empty), stages_(stages), put_(0), taken_(0), freed_(0), acquired_(0), produces_(produces),
        consumes_(consumes) {}
  CU_METHOD void producer_acquire(CU_LINE) {
    if (!full_ || !produces_) return;
    unsigned n = acquired_++;
    if (n >= stages_) cu_mbarrier_wait(&empty_[n % stages_], (n / stages_ - 1) & 1, 1, line);
  }
  CU_METHOD void producer_commit(CU_LINE) {
    if (!full_) __pipeline_commit();
    else if (produces_) cu_mbarrier_arrive(&full_[put_ % stages_], 1, 0, 0, line);
    ++put_;
  }
  CU_METHOD void consumer_wait(CU_LINE) {
    unsigned n = taken_++;
    if (!full_) __pipeline_wait_prior(put_ - n - 1);
    else if (consumes_) cu_mbarrier_wait(&full_[n % stages_], (n / stages_) & 1, 1, line);
  }
  CU_METHOD void consumer_release(CU_LINE) {
    if (full_ && consumes_) cu_mbarrier_arrive(&empty_[freed_ % stages_], 1, 0, 0, line);
    ++freed_;
  }
  CU_METHOD void quit() {}
  CU_METHOD unsigned long long* cu_barrier() const { return full_ ? &full_[put_ % stages_] : 0; }
  CU_METHOD unsigned cu_put() const { return put_; }
  CU_METHOD void cu_set_taken(unsigned n) { taken_ = n; }
};
CU_METHOD pipeline<thread_scope_thread> make_pipeline() { return pipeline<thread_scope_thread>(); }

template <class Group, class State> CU_METHOD void cu_make_stages(const Group& group, State* state, unsigned stages, int producers,
                                                                  int consumers, int line) {
  if (group.thread_rank() == 0)
    for (unsigned i = 0; i < stages; ++i) {
      cu_mbarrier_init(&state->full[i], producers, line);
      cu_mbarrier_init(&state->empty[i], consumers, line);
    }
  group.sync(line);
}
template <class Group, thread_scope S, unsigned char N>
CU_METHOD pipeline<S> make_pipeline(const Group& group, pipeline_shared_state<S, N>* state, CU_LINE) {
  cu_make_stages(group, state, N, (int)group.size(), (int)group.size(), line);
  return pipeline<S>(state->full, state->empty, N, true, true);
}
template <class Group, thread_scope S, unsigned char N>
CU_METHOD pipeline<S> make_pipeline(const Group& group, pipeline_shared_state<S, N>* state, size_t producers, CU_LINE) {
  bool produces = group.thread_rank() < producers;
  cu_make_stages(group, state, N, (int)producers, (int)(group.size() - producers), line);
  return pipeline<S>(state->full, state->empty, N, produces, !produces);
}
template <class Group, thread_scope S, unsigned char N>
CU_METHOD pipeline<S> make_pipeline(const Group& group, pipeline_shared_state<S, N>* state, pipeline_role role, CU_LINE) {
  bool produces = role == pipeline_role::producer;
  int producers = __syncthreads_count(produces);
  cu_make_stages(group, state, N, producers, (int)group.size() - producers, line);
  return pipeline<S>(state->full, state->empty, N, produces, !produces);
}
template <unsigned char left, thread_scope S> CU_METHOD void pipeline_consumer_wait_prior(pipeline<S>& p) {
  __pipeline_wait_prior(left);
  p.cu_set_taken(p.cu_put() - left);
}

// ---- copies: by one thread, or by all threads of a group, each in its turn a piece

CU_METHOD void cu_copy_piece(void* to, const void* from, size_t bytes, void* barrier, int line) {
  if (barrier) return cu_mbarrier_copy(to, from, bytes, barrier, 0, line);
  for (size_t at = 0; at < bytes;) {
    size_t left = bytes - at, piece = 1;
    while (piece < 16 && left >= piece * 2 && ((((size_t)to | (size_t)from) + at) & (piece * 2 - 1)) == 0) piece *= 2;
    __pipeline_memcpy_async((char*)to + at, (const char*)from + at, piece);
    at += piece;
  }
}
template <class Group>
CU_METHOD void cu_copy_shared_out(const Group& g, void* to, const void* from, size_t bytes, size_t piece, void* barrier, int line) {
  if ((((size_t)to | (size_t)from | bytes) & (piece - 1)) != 0) piece = 1;
  for (size_t i = g.thread_rank() * piece; i < bytes; i += g.num_threads() * piece)
    cu_copy_piece((char*)to + i, (const char*)from + i, piece, barrier, line);
}
template <class Size> struct CuPiece { enum { value = 4 }; };
template <size_t N> struct CuPiece<aligned_size_t<N>> { enum { value = N < 4 ? 4 : N > 16 ? 16 : N }; };

template <class T, class From, class Size, thread_scope S>
CU_METHOD void memcpy_async(T* to, const From* from, Size bytes, barrier<S>& b, CU_LINE) {
  cu_copy_piece(to, from, (size_t)bytes, &b, line);
}
template <class T, class From, class Size, thread_scope S>
CU_METHOD void memcpy_async(T* to, const From* from, Size bytes, pipeline<S>& p, CU_LINE) {
  cu_copy_piece(to, from, (size_t)bytes, p.cu_barrier(), line);
}
template <class Group, class T, class From, class Size, thread_scope S>
CU_METHOD void memcpy_async(const Group& g, T* to, const From* from, Size bytes, barrier<S>& b, CU_LINE) {
  cu_copy_shared_out(g, to, from, (size_t)bytes, CuPiece<Size>::value, &b, line);
}
template <class Group, class T, class From, class Size, thread_scope S>
CU_METHOD void memcpy_async(const Group& g, T* to, const From* from, Size bytes, pipeline<S>& p, CU_LINE) {
  cu_copy_shared_out(g, to, from, (size_t)bytes, CuPiece<Size>::value, p.cu_barrier(), line);
}

#undef CU_LINE

}  // namespace cuda
