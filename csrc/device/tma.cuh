#pragma once

#include <cuda.h>

#include <cstdint>

// The bulk copy engine: boxes of a 4-D tensor map, or bytes in a row, into shared memory, completing on an mbarrier.
namespace mage::device {

// L2 policies, as createpolicy encodes them.
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

struct BoxStart {
    int32_t x0, x1, x2, x3;  // innermost first
};

__device__ __forceinline__ void copy_box(const CUtensorMap* map, uint32_t to, uint32_t barrier, const BoxStart& at,
                                         uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
        "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(at.x0), "r"(at.x1), "r"(at.x2), "r"(at.x3), "l"(policy)
        : "memory");
}

// The same into every CTA of `ctas` (bits), at the same places of their shared memory and on their own barriers.
__device__ __forceinline__ void copy_box_multicast(const CUtensorMap* map, uint32_t to, uint32_t barrier,
                                                   const BoxStart& at, uint16_t ctas, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(to),
        "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(at.x0), "r"(at.x1), "r"(at.x2), "r"(at.x3), "h"(ctas),
        "l"(policy)
        : "memory");
}

// Consecutive bytes; both addresses and the number are multiples of 16.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
                 : "memory");
}

}  // namespace mage::device
