#pragma once

#include <cstdint>

// Arithmetic that has an instruction of its own, and what a quad (four lanes in a row) adds.
namespace mage::device {

// 2^x with an error of 2^-22, 0 below 2^-126.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log2(x), -inf for 0 and below 2^-126; its error is 2^-22, absolute for x in [0.5, 2], relative elsewhere.
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The larger one, or NaN if one of them is.
__device__ __forceinline__ float max_or_nan(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// Stores without a branch, under a policy of L2 (tma.cuh).
__device__ __forceinline__ void store_if(bool stores, float* to, float x, uint64_t policy) {
    asm volatile(
        "{\n.reg .pred stores;\nsetp.ne.b32 stores, %0, 0;\n@stores st.global.L2::cache_hint.f32 [%1], %2, %3;\n}" ::
            "r"(static_cast<int>(stores)),
        "l"(to), "f"(x), "l"(policy)
        : "memory");
}

// The same of the lower 16 bits.
__device__ __forceinline__ void store_16_bits_if(bool stores, void* to, uint32_t x, uint64_t policy) {
    asm volatile(
        "{\n.reg .pred stores;\n.reg .b16 low;\nsetp.ne.b32 stores, %0, 0;\ncvt.u16.u32 low, %2;\n"
        "@stores st.global.L2::cache_hint.b16 [%1], low, %3;\n}" ::"r"(static_cast<int>(stores)),
        "l"(to), "r"(x), "l"(policy)
        : "memory");
}

// Drops a line of 128 bytes, on 128 bytes, from L2: what was written there need not go to memory. All its readers are
// done.
__device__ __forceinline__ void discard_line(const void* line) {
    asm volatile("discard.global.L2 [%0], 128;" ::"l"(__cvta_generic_to_global(line)) : "memory");
}

// The same of the whole lines among `bytes` bytes, by the lanes of a warp.
__device__ __forceinline__ void discard_lines(const void* begin, int32_t bytes, int32_t lane) {
    const uint8_t* at = static_cast<const uint8_t*>(begin);
    const int32_t skipped = -static_cast<int32_t>(reinterpret_cast<uintptr_t>(begin)) & 127;
    for (int32_t i = skipped + lane * 128; i + 128 <= bytes; i += 32 * 128) discard_line(at + i);
}

// The sum of a quad's values, in each of its lanes.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// The largest value, or the sum, of a warp's values, in each of its lanes.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    return value;
}

__device__ __forceinline__ float warp_max_or_nan(float value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value = max_or_nan(value, __shfl_xor_sync(~0u, value, step));
    return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

}  // namespace mage::device
