#pragma once

#include <cuda.h>

#include <cstdint>

#include "device/barrier.cuh"
#include "device/cp_async.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"

// The kernels of attention_micro, which alone includes them. Each waits for the one before it and lets the next one
// start as those of attention do; launched without overlap, both cost nothing.
namespace mage::bench {

constexpr int kWarp = 32;
constexpr int kHeadDim = 128;
constexpr int kRowBytes = 2 * kHeadDim;
constexpr int kSpanBytes = 128;  // of a swizzled row
constexpr int kSpans = kRowBytes / kSpanBytes;
constexpr int kAttentionThreads = 384, kMergeThreads = 256;

__global__ void mage_bench_fill_kernel(uint32_t* words, int64_t count, uint32_t seed) {
    for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += gridDim.x * int64_t{blockDim.x}) {
        uint32_t bits = (static_cast<uint32_t>(i) + seed) * 0x9e3779b9u;
        bits = (bits ^ (bits >> 15)) * 0x85ebca6bu;
        words[i] = bits ^ (bits >> 13);
    }
}

__global__ void mage_bench_spin_kernel(int64_t clocks) {
    const int64_t start = clock64();
    while (clock64() - start < clocks) continue;
}

// Tiles [first_tile, first_tile + tiles) of every KV head; the units are head after head.
struct StreamArgs {
    const int32_t* table;
    int32_t page_shift, box_shift;
    int32_t heads, first_tile, tiles;
};

template <int kTokens, int kStages>
struct alignas(1024) StreamShared {
    uint8_t tiles[2 * kStages][kTokens * kRowBytes];  // K, V, K, V, ...
    uint64_t full[2 * kStages], empty[2 * kStages];
};

// The producer of block_attention without its consumers: warp 0 fills the ring, warp 1 sets it free at once.
template <int kTokens, int kStages, int kCtas>
__global__ void __launch_bounds__(2 * kWarp, 1)
    mage_bench_stream_kernel(const StreamArgs args, const __grid_constant__ CUtensorMap k_map,
                             const __grid_constant__ CUtensorMap v_map) {
    constexpr int kSlots = 2 * kStages;
    extern __shared__ uint8_t raw_shared[];
    auto& shared =
        *reinterpret_cast<StreamShared<kTokens, kStages>*>(raw_shared + (-device::shared_address(raw_shared) & 1023));
    const int32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (threadIdx.x == 0) {
        device::prefetch_tensor_map(&k_map);
        device::prefetch_tensor_map(&v_map);
        for (int i = 0; i < kSlots; ++i) {
            device::mbarrier_init(device::shared_address(&shared.full[i]), 1);
            device::mbarrier_init(device::shared_address(&shared.empty[i]), kCtas);
        }
        device::mbarrier_init_fence();
    }
    __syncwarp();
    device::dependency_wait();
    device::dependency_release();
    if constexpr (kCtas > 1) device::cluster_sync_relaxed();  // the barriers of both are initialised
    __syncthreads();

    const int64_t units = int64_t{args.heads} * args.tiles, workers = gridDim.x / kCtas, worker = blockIdx.x / kCtas;
    const int32_t begin = static_cast<int32_t>(units * worker / workers);
    const int32_t end = static_cast<int32_t>(units * (worker + 1) / workers);
    uint32_t slot = 0, parity = 0;
    const auto advance = [&] {
        if (++slot == kSlots) slot = 0, parity ^= 1;
    };
    if (warp == 0) {
        const uint32_t rank = kCtas == 1 ? 0 : device::cluster_rank();
        const int32_t boxes = kTokens >> args.box_shift;
        const int32_t box = lane % boxes, span = lane / boxes;
        const bool own = span < kSpans && (kCtas == 1 || lane % kCtas == rank);
        const uint32_t place = span * (kTokens * kSpanBytes) + box * (kSpanBytes << args.box_shift);
        const auto token_of = [&](int32_t tile) {
            return (args.first_tile + tile) * kTokens + (box << args.box_shift);
        };
        int32_t head = begin / args.tiles, tile = begin % args.tiles;
        int32_t next_page = __ldg(args.table + (token_of(tile) >> args.page_shift));
        for (int32_t unit = begin; unit < end; ++unit) {
            const device::BoxStart at = {span * (kSpanBytes / 2), token_of(tile) & ((1 << args.page_shift) - 1), head,
                                         next_page};
            if (++tile == args.tiles) tile = 0, ++head;
            next_page = __ldg(args.table + (token_of(tile) >> args.page_shift));  // past the last one: of any tile
            for (const CUtensorMap* map : {&k_map, &v_map}) {
                const uint32_t full = device::shared_address(&shared.full[slot]);
                device::mbarrier_wait(device::shared_address(&shared.empty[slot]), parity ^ 1);
                if (lane == 0) device::mbarrier_arrive_expect(full, kTokens * kRowBytes);
                __syncwarp();
                if (own) {
                    const uint32_t to = device::shared_address(shared.tiles[slot]) + place;
                    if constexpr (kCtas == 1) {
                        device::copy_box(map, to, full, at, device::kEvictFirst);
                    } else {
                        device::copy_box_multicast(map, to, full, at, (1 << kCtas) - 1, device::kEvictFirst);
                    }
                }
                __syncwarp();
                advance();
            }
        }
    } else {
        for (int32_t i = 0; i < 2 * (end - begin); ++i) {
            const uint32_t empty = device::shared_address(&shared.empty[slot]);
            device::mbarrier_wait(device::shared_address(&shared.full[slot]), parity);
            __syncwarp();
            if constexpr (kCtas == 1) {
                if (lane == 0) device::mbarrier_arrive(empty);
            } else {
                if (lane < kCtas) device::mbarrier_arrive_cluster(empty, lane);
            }
            __syncwarp();
            advance();
        }
    }
    // No CTA of a pair leaves while the other may still write to it.
    if constexpr (kCtas > 1) device::cluster_sync();
}

constexpr int kGatherWarps = 4, kGatherTokens = 64;

// Rows of single tokens, `heads` to a token in both pools, by cp.async: every warp has a ring of its own.
template <int kStages>
__global__ void __launch_bounds__(kGatherWarps* kWarp, 1)
    mage_bench_gather_kernel(const uint8_t* k, const uint8_t* v, const int32_t* tokens, int32_t tiles, int32_t heads) {
    constexpr int kWarpTokens = kGatherTokens / kGatherWarps, kTileBytes = kGatherTokens * kRowBytes;
    constexpr int kLanes = kRowBytes / 16;  // of a row
    extern __shared__ uint8_t raw_shared[];
    const int32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    device::dependency_wait();
    device::dependency_release();
    const int64_t units = int64_t{heads} * tiles;
    const int32_t begin = static_cast<int32_t>(units * blockIdx.x / gridDim.x);
    const int32_t end = static_cast<int32_t>(units * (blockIdx.x + 1) / gridDim.x);
    const int32_t* own_tokens = tokens + warp * kWarpTokens + lane % kWarpTokens;
    int32_t next_head = begin / tiles, tile = begin % tiles, stage = 0;
    int32_t next = __ldg(own_tokens + tile * kGatherTokens);
    for (int32_t unit = begin; unit < end; ++unit) {
        const int32_t token = next, head = next_head;
        if (++tile == tiles) tile = 0, ++next_head;
        next = __ldg(own_tokens + tile * kGatherTokens);  // past the last one: of any tile
        const uint32_t stage_at = device::shared_address(raw_shared) + stage * (2 * kTileBytes);
#pragma unroll
        for (int i = 0; i < kWarpTokens; i += kWarp / kLanes) {
            const int32_t row = i + lane / kLanes, column = lane % kLanes * 16;
            const int64_t from = (int64_t{__shfl_sync(~0u, token, row)} * heads + head) * kRowBytes + column;
            const uint32_t to = stage_at + (warp * kWarpTokens + row) * kRowBytes + column;
            device::copy_16_bytes(to, k + from, 16);
            device::copy_16_bytes(to + kTileBytes, v + from, 16);
        }
        device::copies_commit();
        device::copies_wait_but<kStages - 1>();
        if (++stage == kStages) stage = 0;
    }
    device::copies_wait();
}

// A partial result of 128 rows by two warpgroups, from registers as accumulators lie in them: nothing, the upper 24
// bits of float32 (48 KB, as block_attention stores them) or float32 (64 KB).
template <int kKilobytes>
__global__ void __launch_bounds__(256, 1) mage_bench_partial_kernel(uint8_t* partial, float value) {
    constexpr int kRows = 128, kPartialRow = kKilobytes * 1024 / kRows;
    const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    float o[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i] = value * static_cast<float>(i + threadIdx.x);
    device::pin_registers(o);
    device::dependency_wait();
    device::dependency_release();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int32_t row = warp * 16 + r * 8 + lane / 4;
        uint8_t* out = partial + (int64_t{blockIdx.x} * kRows + row) * kPartialRow;
#pragma unroll
        for (int b = 0; b < 8; ++b) {
            const float* x = o + 32 * r + 4 * b;
            if constexpr (kKilobytes == 64)
                reinterpret_cast<float4*>(out)[4 * b + lane % 4] = make_float4(x[0], x[1], x[2], x[3]);
            if constexpr (kKilobytes == 48) {
                if (b % 2 != 0) continue;
                uint32_t upper[4], bytes[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    upper[i] = __byte_perm(__float_as_uint(x[2 * i]), __float_as_uint(x[2 * i + 1]), 0x7632);
                    bytes[i] = __byte_perm(__float_as_uint(x[2 * i]), __float_as_uint(x[2 * i + 1]), 0x0051);
                }
                reinterpret_cast<uint4*>(out)[2 * b + lane % 4] = make_uint4(upper[0], upper[1], upper[2], upper[3]);
                reinterpret_cast<uint2*>(out + 2 * kHeadDim)[2 * b + lane % 4] =
                    make_uint2(__byte_perm(bytes[0], bytes[1], 0x5410), __byte_perm(bytes[2], bytes[3], 0x5410));
            }
        }
    }
}

template <int kVectors>
__global__ void __launch_bounds__(kMergeThreads) mage_bench_read_kernel(const uint4* partial, uint32_t* sink) {
    device::dependency_wait();
    device::dependency_release();
    const int32_t threads = gridDim.x * blockDim.x, thread = blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const uint4 part = partial[i * threads + thread];
        sum += part.x ^ part.y ^ part.z ^ part.w;
    }
    if (sum == 0x12345678u) *sink = sum;
}

__global__ void mage_bench_empty_kernel(int32_t* counts) {
    device::dependency_wait();
    device::dependency_release();
    if (counts != nullptr && threadIdx.x == 0) counts[blockIdx.x] += 1;
}

struct BarrierClocks {
    int32_t arrive, all;
};

template <bool kOrders, int kStores>
__global__ void __launch_bounds__(256, 1) mage_bench_cluster_barrier_kernel(float4* out, BarrierClocks* clocks) {
    device::cluster_sync_relaxed();  // both CTAs run
#pragma unroll
    for (int i = 0; i < kStores; ++i)
        out[(blockIdx.x * kStores + i) * 256 + threadIdx.x] = make_float4(i, threadIdx.x, blockIdx.x, 1.0f);
    __syncthreads();
    const int64_t start = clock64();
    if constexpr (kOrders) {
        device::cluster_arrive();
    } else {
        device::cluster_arrive_relaxed();
    }
    const int64_t arrived = clock64();
    device::cluster_wait();
    const int64_t passed = clock64();
    if (threadIdx.x == 0)
        clocks[blockIdx.x] = {static_cast<int32_t>(arrived - start), static_cast<int32_t>(passed - start)};
}

}  // namespace mage::bench
