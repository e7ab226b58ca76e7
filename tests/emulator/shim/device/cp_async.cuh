#pragma once

#include "emulator.h"

// In place of csrc/device/cp_async.cuh.
namespace mage::device {

inline void copy_16_bytes(uint32_t to, const void* from, uint32_t bytes) { emulator::cp_async(to, from, bytes); }
inline void copies_commit() { emulator::cp_async_commit(); }

template <int kPending>
void copies_wait_but() {
    emulator::cp_async_wait(kPending);
}

// cp.async.wait_all: commits, then waits for all.
inline void copies_wait() {
    emulator::cp_async_commit();
    emulator::cp_async_wait(0);
}

}  // namespace mage::device
