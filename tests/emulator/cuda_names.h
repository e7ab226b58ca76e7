#pragma once

// What the sources of kernels see in place of CUDA's device side; included before each of them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"

// --- Qualifiers
// -------------------------------------------------------------------------------------------------------

#undef __device__
#undef __global__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#undef __noinline__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__  // nothing, as libstdc++ writes __attribute__((__noinline__))

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_dim())
#define gridDim (emulator::grid_dim())

namespace emulator {

// `__shared__ T name;` (translate.py).
template <typename T>
T& shared_variable(const char* name, int line) {
    return *static_cast<T*>(static_shared(name, line, sizeof(T)));
}

// kernel<<<grid, block, shared_bytes, stream>>>(argument) of the tests' own kernel, which releases its successor at
// once.
template <typename T>
void launch_late(std::common_type_t<void (*)(T)> kernel, dim3 grid, dim3 block, size_t, cudaStream_t stream,
                 const T& argument) {
    submit_late(stream, [=] { run_plain_grid(grid, block, [&] { kernel(argument); }); });
}

template <typename To, typename From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <typename T>
uint64_t to_bits(T value) {
    static_assert(sizeof value <= 8, "a register or two");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// shfl.sync: from a lane outside of the warp comes the own value. From one outside of the mask PTX gives anything; here
// it is what that lane gave last.
template <typename T>
T shuffle(uint32_t mask, T value, int source, const char* op) {
    uint64_t out[32];
    collective(mask, to_bits(value), op, out);
    return source < 0 || source > 31 ? value : from_bits<T>(out[source]);
}

// redux.sync.
template <typename T, typename Combine>
T reduce(uint32_t mask, T value, const char* op, const Combine& combine) {
    uint64_t out[32];
    collective(mask, to_bits(value), op, out);
    T all = value;
    for (int i = 0; i < 32; ++i) {
        if (i != lane() && (mask >> i & 1) != 0) all = combine(all, from_bits<T>(out[i]));
    }
    return all;
}

}  // namespace emulator

// --- Warps and CTAs
// ---------------------------------------------------------------------------------------------------

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source) {
    return emulator::shuffle(mask, value, source % 32, "shfl.idx");
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits) {
    return emulator::shuffle(mask, value, emulator::lane() ^ bits, "shfl.bfly");
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int distance) {
    return emulator::shuffle(mask, value, emulator::lane() - distance, "shfl.up");
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int distance) {
    return emulator::shuffle(mask, value, emulator::lane() + distance, "shfl.down");
}

template <typename T>
T __reduce_add_sync(uint32_t mask, T value) {
    return emulator::reduce(mask, value, "redux.add", [](T a, T b) { return a + b; });
}
template <typename T>
T __reduce_max_sync(uint32_t mask, T value) {
    return emulator::reduce(mask, value, "redux.max", [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
T __reduce_min_sync(uint32_t mask, T value) {
    return emulator::reduce(mask, value, "redux.min", [](T a, T b) { return a < b ? a : b; });
}
template <typename T>
T __reduce_or_sync(uint32_t mask, T value) {
    return emulator::reduce(mask, value, "redux.or", [](T a, T b) { return a | b; });
}

inline uint32_t __ballot_sync(uint32_t mask, bool value) {
    const uint32_t own = value ? 1u << emulator::lane() : 0;
    return emulator::reduce(mask, own, "vote", [](uint32_t a, uint32_t b) { return a | b; });
}
inline int __any_sync(uint32_t mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline int __all_sync(uint32_t mask, bool value) { return __ballot_sync(mask, value) == mask; }

inline void __syncwarp(uint32_t mask = ~0u) {
    uint64_t out[32];
    emulator::collective(mask, 0, "bar.warp.sync", out);
}
inline void __syncthreads() { emulator::sync_cta(0); }
inline int __syncthreads_or(int value) { return emulator::sync_cta(value != 0 ? 1 : 0) != 0; }
inline int __syncthreads_count(int value) { return emulator::sync_cta(value != 0 ? 1 : 0); }
inline void __threadfence() {}
inline long long clock64() {
    static long long clocks = 0;
    return clocks += 1 << 20;
}

// --- Memory: fibers change only where they wait, so that every access is atomic
// ------------------------------------------

template <typename T, typename V>
T atomicAdd(T* at, V value) {
    const T before = *at;
    *at += static_cast<T>(value);
    return before;
}
template <typename T, typename V>
T atomicOr(T* at, V value) {
    const T before = *at;
    *at |= static_cast<T>(value);
    return before;
}
template <typename T, typename V>
T atomicMax(T* at, V value) {
    const T before = *at;
    if (static_cast<T>(value) > before) *at = static_cast<T>(value);
    return before;
}
template <typename T, typename V>
T atomicMin(T* at, V value) {
    const T before = *at;
    if (static_cast<T>(value) < before) *at = static_cast<T>(value);
    return before;
}
template <typename T>
T __ldcg(const T* at) {
    return *at;
}
template <typename T>
T __ldg(const T* at) {
    return *at;
}

// --- Arithmetic
// -------------------------------------------------------------------------------------------------------

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int32_t x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }
inline int __ffs(int32_t x) { return __builtin_ffs(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> shift % 32);
}
inline int __vimax3_s32(int a, int b, int c) { return std::max(std::max(a, b), c); }
// prmt.b32: each nibble of the selector names a byte of {y, x}; the mode that replicates a sign is not used.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t all = uint64_t{y} << 32 | x;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(all >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return out;
}
inline uint32_t __float_as_uint(float x) { return emulator::bit_cast<uint32_t>(x); }
inline int32_t __float_as_int(float x) { return emulator::bit_cast<int32_t>(x); }
inline float __uint_as_float(uint32_t x) { return emulator::bit_cast<float>(x); }
inline float __int_as_float(int32_t x) { return emulator::bit_cast<float>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }
inline long long __float2ll_rz(float x) { return static_cast<long long>(x); }
inline long long __double2ll_rn(double x) { return std::llrint(x); }

template <typename A, typename B>
auto min(A a, B b) {
    using C = std::common_type_t<A, B>;
    return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b);
}
template <typename A, typename B>
auto max(A a, B b) {
    using C = std::common_type_t<A, B>;
    return static_cast<C>(a) > static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b);
}
using std::isnan;
