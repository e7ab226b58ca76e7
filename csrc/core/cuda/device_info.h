#pragma once

namespace mage::core {

// Throws unless the current device runs sm_90a code (compute capability 9.0). The first line of every launcher: without
// it a wrong GPU shows as "no kernel image" at the launch.
void require_hopper(const char* op);

// Multiprocessors of the current device.
int multiprocessors(const char* op);

// Lets a kernel have `bytes` of dynamic shared memory on the current device.
void allow_shared_memory(const char* op, const void* kernel, int bytes);

// Lets a kernel have clusters of up to 16 CTAs; 8 are the most without.
void allow_large_clusters(const char* op, const void* kernel);

// Clusters of `ctas` CTAs that run at once on the current device, each with `threads` threads and `bytes` of dynamic
// shared memory, which the kernel is allowed; 0 if none of that size runs. Asked for once per kernel, device and size,
// then remembered.
int active_clusters(const char* op, const void* kernel, int ctas, int threads, int bytes);

}  // namespace mage::core
