#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>
#include <cstring>

namespace emulator {

// What the emulated driver writes into a CUtensorMap: four dimensions, and boxes of the first two.
struct TensorMap {
    const char* data;
    uint64_t sizes[4];
    uint64_t strides[3];  // bytes
    uint32_t box[2];
    uint32_t element_bytes;
    uint32_t swizzles;  // whether by 128 bytes

    static TensorMap decode(const CUtensorMap& encoded) {
        TensorMap map;
        memcpy(&map, &encoded, sizeof map);
        return map;
    }

    uint32_t bytes() const { return box[0] * box[1] * element_bytes; }

    // cp.async.bulk.tensor.4d: elements outside of the tensor are zeros. In the swizzle bits 4 to 6 of an address in
    // shared memory are xor'ed with bits 7 to 9. The first dimension is inside or outside by whole 16 bytes.
    void copy(char* destination, uint32_t address, const std::array<int64_t, 4>& at) const {
        const uint32_t row_bytes = box[0] * element_bytes;
        const auto is_inside = [&](int dimension, int64_t x) {
            return x >= 0 && x < static_cast<int64_t>(sizes[dimension]);
        };
        for (uint32_t j = 0; j < box[1]; ++j) {
            const bool row_inside = is_inside(1, at[1] + j) && is_inside(2, at[2]) && is_inside(3, at[3]);
            const int64_t row = (at[1] + j) * static_cast<int64_t>(strides[0]) +
                                at[2] * static_cast<int64_t>(strides[1]) + at[3] * static_cast<int64_t>(strides[2]);
            for (uint32_t byte = 0; byte < row_bytes; byte += 16) {
                const int64_t x = at[0] + byte / element_bytes;
                uint32_t to = j * row_bytes + byte;
                if (swizzles != 0) to ^= ((address + to) >> 7 & 7) << 4;
                if (row_inside && is_inside(0, x)) {
                    memcpy(destination + to, data + row + x * element_bytes, 16);
                } else {
                    memset(destination + to, 0, 16);
                }
            }
        }
    }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "it takes the place of one");

}  // namespace emulator
