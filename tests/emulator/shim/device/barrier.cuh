#pragma once

#include "emulator.h"

// In place of csrc/device/barrier.cuh, an emulated instruction per function.
namespace mage::device {

inline uint32_t shared_address(const void* pointer) { return emulator::address_of(pointer); }

inline void store_shared(uint32_t address, uint4 value) {
    memcpy(emulator::settled(address, 16, "st.shared"), &value, sizeof value);
}

inline uint4 load_shared(uint32_t address) {
    uint4 value;
    memcpy(&value, emulator::settled(address, 16, "ld.shared"), sizeof value);
    return value;
}

inline float2 load_shared_2(uint32_t address) {
    float2 value;
    memcpy(&value, emulator::settled(address, 8, "ld.shared"), sizeof value);
    return value;
}

// stmatrix.sync.aligned.m8n8.x4: lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i; lane l holds elements
// 2 (l % 4) and + 1 of row l / 4 of each, in its i-th register. Here each lane writes the row whose address it gave.
inline void store_matrices(uint32_t address, uint4 values) {
    uint64_t low[32], high[32];
    emulator::collective(~0u, uint64_t{values.y} << 32 | values.x, "stmatrix", low);
    emulator::collective(~0u, uint64_t{values.w} << 32 | values.z, "stmatrix", high);
    const int matrix = emulator::lane() / 8;
    char* row = emulator::settled(address, 16, "stmatrix");
    for (int column = 0; column < 4; ++column) {
        const int holder = emulator::lane() % 8 * 4 + column;
        const auto word = static_cast<uint32_t>((matrix < 2 ? low : high)[holder] >> 32 * (matrix % 2));
        memcpy(row + 4 * column, &word, sizeof word);
    }
}

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) { emulator::mbarrier_init(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) { emulator::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_arrive(uint32_t barrier) { emulator::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_cluster(uint32_t barrier, uint32_t cta) {
    emulator::mbarrier_arrive_remote(emulator::cluster_address(barrier, cta));
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) { emulator::mbarrier_wait(barrier, parity); }

inline void named_barrier(uint32_t id, uint32_t threads) { emulator::named_barrier(id, threads, true); }
inline void named_barrier_arrive(uint32_t id, uint32_t threads) { emulator::named_barrier(id, threads, false); }
inline void fence_async_shared() {}

inline int32_t thread_index() { return static_cast<int32_t>(emulator::thread_index().x); }
inline uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline uint32_t cluster_index() { return emulator::cluster_index(); }

inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_arrive_relaxed() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
inline void cluster_sync() {
    emulator::cluster_arrive();
    emulator::cluster_wait();
}
inline void cluster_sync_relaxed() { cluster_sync(); }
inline uint32_t cluster_address(uint32_t address, uint32_t cta) { return emulator::cluster_address(address, cta); }

// st.async: a store to the shared memory of a CTA of the cluster that counts its bytes on a barrier there.
template <typename T>
void store_cluster_async(uint32_t address, T value, uint32_t barrier) {
    if (address % sizeof value != 0) emulator::fail("st.async to %x is not aligned", address);
    emulator::copy_async(address, sizeof value, barrier, [value](char* to) { memcpy(to, &value, sizeof value); });
}
inline void copy_cluster_async(uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier) {
    emulator::copy_shared_async(to, from, bytes, barrier);
}

inline void prefetch_l2(const void*) {}
inline void dependency_wait() { emulator::dependency_wait(); }
inline void dependency_release() {}

// setmaxnreg.sync.aligned: all threads of the warp. Registers are not counted.
template <int kRegisters>
void registers_grow() {
    uint64_t out[32];
    emulator::collective(~0u, kRegisters, "setmaxnreg", out);
}
template <int kRegisters>
void registers_shrink() {
    registers_grow<kRegisters>();
}

}  // namespace mage::device
