#pragma once

#include <cuda.h>

#include "emulator.h"
#include "tensor_map.h"

// In place of csrc/device/tma.cuh.
namespace mage::device {

constexpr uint64_t kEvictNormal = 0;
constexpr uint64_t kEvictFirst = 1;
constexpr uint64_t kEvictLast = 2;

inline void prefetch_tensor_map(const CUtensorMap*) {}

struct BoxStart {
    int32_t x0, x1, x2, x3;  // innermost first
};

inline void copy_box(const CUtensorMap* map, uint32_t to, uint32_t barrier, const BoxStart& at, uint64_t) {
    const auto box = emulator::TensorMap::decode(*map);
    if (to % 128 != 0) emulator::fail("a box to %x, which is not on 128 bytes", to);
    emulator::copy_async(to, box.bytes(), barrier,
                         [=](char* destination) { box.copy(destination, to, {at.x0, at.x1, at.x2, at.x3}); });
}

// .multicast::cluster: the same offsets in every CTA of the mask, data and bytes on the barrier alike, at times that
// have nothing to do with each other.
inline void copy_box_multicast(const CUtensorMap* map, uint32_t to, uint32_t barrier, const BoxStart& at, uint16_t ctas,
                               uint64_t policy) {
    for (uint32_t rank = 0; rank < 16; ++rank) {
        if ((ctas >> rank & 1) == 0) continue;
        copy_box(map, emulator::cluster_address(to, rank), emulator::cluster_address(barrier, rank), at, policy);
    }
}

inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || to % 16 != 0 || bytes % 16 != 0)
        emulator::fail("cp.async.bulk is not on 16 bytes");
    emulator::copy_async(to, bytes, barrier, [=](char* destination) { memcpy(destination, from, bytes); });
}

}  // namespace mage::device
