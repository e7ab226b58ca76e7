#pragma once

#include <cstdint>

// A row of O, unnormalised, on its way to the merge: the upper 24 bits of each float32, 2^-15 of a value, which is
// nothing beside the rounding of P and of out. First the upper 16 of all columns, then the 8 below them. The pairs of
// columns that a lane of the quad holds of blocks of eight lie together, so that it writes 16 bytes at once: in units
// of elements, 32 b + 8 (lane % 4) + 2 i + j is column 32 b + 8 i + 2 (lane % 4) + j, in both halves.
namespace mage::cuda {

// A thread's part of row r (0, or 1: 8 below) of an accumulator.
template <int kDim>
__device__ __forceinline__ void pack_row(const float (&o)[kDim / 2], int r, uint8_t* to) {
    const int32_t quad = threadIdx.x % 4;
#pragma unroll
    for (int b = 0; b < kDim / 32; ++b) {
        uint32_t upper[4], bytes[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t x = __float_as_uint(o[16 * b + 4 * i + 2 * r]);
            const uint32_t y = __float_as_uint(o[16 * b + 4 * i + 2 * r + 1]);
            upper[i] = __byte_perm(x, y, 0x7632);
            bytes[i] = __byte_perm(x, y, 0x0051);
        }
        reinterpret_cast<uint4*>(to)[4 * b + quad] = make_uint4(upper[0], upper[1], upper[2], upper[3]);
        reinterpret_cast<uint2*>(to + 2 * kDim)[4 * b + quad] =
            make_uint2(__byte_perm(bytes[0], bytes[1], 0x5410), __byte_perm(bytes[2], bytes[3], 0x5410));
    }
}

// Four elements of a packed row, those of one lane of the warp that reads it.
struct PackedElements {
    uint2 upper = make_uint2(0, 0);
    uint32_t bytes = 0;

    // `own` and `own_bytes` are where the lane's are; without a branch, and zeros if they are not to be read.
    __device__ __forceinline__ void load_if(bool reads, const uint8_t* own, const uint8_t* own_bytes) {
        asm volatile(
            "{\n.reg .pred reads;\nsetp.ne.b32 reads, %3, 0;\n@reads ld.global.v2.b32 {%0, %1}, [%4];\n"
            "@reads ld.global.b32 %2, [%5];\n}"
            : "+r"(upper.x), "+r"(upper.y), "+r"(bytes)
            : "r"(static_cast<int>(reads)), "l"(__cvta_generic_to_global(own)),
              "l"(__cvta_generic_to_global(own_bytes)));
    }
    // The same from shared memory, by its address there.
    __device__ __forceinline__ void load_shared(uint32_t row, int32_t head_dim, int32_t lane) {
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                     : "=r"(upper.x), "=r"(upper.y)
                     : "r"(row + 8 * lane)
                     : "memory");
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bytes) : "r"(row + 2 * head_dim + 4 * lane) : "memory");
    }
    __device__ __forceinline__ void add_to(float (&sum)[4], float share) const {
        sum[0] += share * __uint_as_float(__byte_perm(upper.x, bytes, 0x1044) & 0xFFFFFF00u);
        sum[1] += share * __uint_as_float(__byte_perm(upper.x, bytes, 0x3255) & 0xFFFFFF00u);
        sum[2] += share * __uint_as_float(__byte_perm(upper.y, bytes, 0x1066) & 0xFFFFFF00u);
        sum[3] += share * __uint_as_float(__byte_perm(upper.y, bytes, 0x3277) & 0xFFFFFF00u);
    }
};

// The column of the first of a lane's elements; the second is beside it, the other two are 8 further on.
__device__ __forceinline__ int32_t packed_column(int32_t lane) {
    return lane / 8 * 32 + lane % 2 * 16 + lane / 2 % 4 * 2;
}

}  // namespace mage::cuda
