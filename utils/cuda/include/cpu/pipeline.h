// cp.async through its C primitives. A copy lands at the wait, so a kernel that does not wait reads what was there before.
#pragma once

CU_INLINE void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zero_bytes = 0) {
  cu_copy_async(to, from, (unsigned)bytes, (unsigned)zero_bytes);
}
CU_INLINE void __pipeline_commit() { cu_copy_commit(); }
CU_INLINE void __pipeline_wait_prior(size_t groups_left) { cu_copy_wait((unsigned)groups_left); }
