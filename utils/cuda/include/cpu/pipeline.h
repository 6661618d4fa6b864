// cp.async through its C primitives. A copy lands at the wait, so a kernel that does not wait reads what was
// there before.
#pragma once

extern "C" {
void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zero_bytes = 0);
void __pipeline_commit();
void __pipeline_wait_prior(size_t groups_left);
}
