#pragma once

#include <cstdint>

// Copies of 16 bytes by single threads, from global into shared memory, that no register waits for.
namespace mage::device {

// Reads `bytes` of 16 (0 or 16) and fills the rest with zeros.
__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
                 "r"(bytes)
                 : "memory");
}

// Makes a group of the calling thread's copies since the last one.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when at most kPending groups of the calling thread are in flight.
template <int kPending>
__device__ __forceinline__ void copies_wait_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Returns when all copies of the calling thread have arrived.
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace mage::device
