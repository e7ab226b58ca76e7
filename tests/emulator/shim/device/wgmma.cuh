#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"

// In place of csrc/device/wgmma.cuh.
namespace mage::device {

inline uint64_t swizzled_tile(uint32_t tile, uint32_t atom_stride, uint32_t span_stride) {
    return uint64_t{tile | span_stride >> 4 << 16} | uint64_t{1u << 30 | atom_stride >> 4} << 32;
}
inline uint64_t tile_further(uint64_t tile, uint32_t bytes) {
    return uint64_t{static_cast<uint32_t>(tile) + bytes / 16} | tile >> 32 << 32;
}
inline uint32_t tile_address(uint32_t address) { return (address & 0x3FFFF) >> 4; }

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
void wgmma_wait() {
    emulator::wgmma_wait(kPending);
}

// The machine writes the registers behind the compiler's back too.
template <int kCount>
void pin_registers(float (&)[kCount]) {
    asm volatile("" ::: "memory");
}

template <typename T, int kColumns>
struct Wgmma {
    static constexpr emulator::Element kElement =
        std::is_same_v<T, __half> ? emulator::Element::kHalf : emulator::Element::kBfloat16;

    static void scores(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add) {
        emulator::wgmma(d, nullptr, a, b, kColumns, kElement, add);
    }
    static void values(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
        emulator::wgmma(d, a, 0, b, kColumns, kElement, add);
    }
};

template <typename T, int kColumns>
struct WgmmaScores : Wgmma<T, kColumns> {};

}  // namespace mage::device
