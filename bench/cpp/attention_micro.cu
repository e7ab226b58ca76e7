// Measures what decides tiles, pages and splits of attention, apart from it, and prints a table.
//
//   attention_micro        a few seconds on one Hopper GPU, 1.1 GB of its memory
//
// Every time is the median of 5 replays of a graph, divided by its nodes; the graph waits behind a kernel that only
// spins, so that the host is never waited for. Reads of K and V go through 200 MB and more before they repeat.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "attention_micro_kernels.cuh"
#include "core/check.h"
#include "core/cuda/cuda_check.h"
#include "core/cuda/device_info.h"
#include "core/cuda/launch.h"
#include "core/cuda/tensor_map.h"

namespace {

using namespace mage;
using namespace mage::bench;

constexpr char kWho[] = "attention_micro";
constexpr double kHbmBytesPerUs = 3.05e6;
constexpr int kRepeats = 5;
constexpr int64_t kPoolBytes = int64_t{512} << 20;  // K, and V as well
constexpr uint32_t kAllShared = 227 * 1024;         // also keeps a second CTA off the SM

struct Free {
    void operator()(void* memory) const { cudaFree(memory); }
};
template <typename T>
using Memory = std::unique_ptr<T, Free>;

template <typename T>
Memory<T> allocate(int64_t bytes) {
    void* memory = nullptr;
    MAGE_CUDA_CHECK(kWho, cudaMalloc(&memory, static_cast<size_t>(bytes)));
    MAGE_CUDA_CHECK(kWho, cudaMemset(memory, 0, static_cast<size_t>(bytes)));
    return Memory<T>(static_cast<T*>(memory));
}

Memory<int32_t> shuffled(int64_t count) {
    std::vector<int32_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(0));
    Memory<int32_t> memory = allocate<int32_t>(4 * count);
    MAGE_CUDA_CHECK(kWho, cudaMemcpy(memory.get(), order.data(), 4 * order.size(), cudaMemcpyHostToDevice));
    return memory;
}

template <typename T>
T median(std::vector<T> values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
}

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
    char buffer[160];
    va_list values;
    va_start(values, format);
    std::vsnprintf(buffer, sizeof(buffer), format, values);
    va_end(values);
    return buffer;
}

void print_row(const std::string& name, const std::string& value, const std::string& share = "") {
    std::printf("| %s | %s | %s |\n", name.c_str(), value.c_str(), share.c_str());
    std::fflush(stdout);
}

struct Bench {
    uint32_t sms = static_cast<uint32_t>(core::multiprocessors(kWho)) / 2 * 2;
    cudaStream_t stream;
    cudaEvent_t start, end;
    Memory<uint8_t> k = allocate<uint8_t>(kPoolBytes), v = allocate<uint8_t>(kPoolBytes);

    Bench() {
        MAGE_CUDA_CHECK(kWho, cudaStreamCreate(&stream));
        MAGE_CUDA_CHECK(kWho, cudaEventCreate(&start));
        MAGE_CUDA_CHECK(kWho, cudaEventCreate(&end));
        for (uint8_t* pool : {k.get(), v.get()})
            core::launch(kWho, mage_bench_fill_kernel, plan(1024, 256), stream, reinterpret_cast<uint32_t*>(pool),
                         kPoolBytes / 4, pool == k.get() ? 1u : 2u);
        MAGE_CUDA_CHECK(kWho, cudaDeviceSynchronize());
    }

    static LaunchPlan plan(uint32_t blocks, uint32_t threads, uint32_t shared = 0, uint32_t cluster = 1,
                           bool overlap = false) {
        LaunchPlan plan;
        plan.grid[0] = blocks;
        plan.block[0] = threads;
        plan.shared_bytes = shared;
        plan.cluster = cluster;
        plan.overlap = overlap;
        return plan;
    }

    // Microseconds of a node; enqueue(i) launches the kernels of node i.
    template <typename Enqueue>
    double time(int nodes, const Enqueue& enqueue) {
        enqueue(0);
        MAGE_CUDA_CHECK(kWho, cudaStreamSynchronize(stream));
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        MAGE_CUDA_CHECK(kWho, cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < nodes; ++i) enqueue(i);
        MAGE_CUDA_CHECK(kWho, cudaStreamEndCapture(stream, &graph));
        MAGE_CUDA_CHECK(kWho, cudaGraphInstantiate(&exec, graph, 0));
        std::vector<double> times;
        for (int i = 0; i <= kRepeats; ++i) {
            core::launch(kWho, mage_bench_spin_kernel, plan(1, 1), stream, int64_t{1000000});
            MAGE_CUDA_CHECK(kWho, cudaEventRecord(start, stream));
            MAGE_CUDA_CHECK(kWho, cudaGraphLaunch(exec, stream));
            MAGE_CUDA_CHECK(kWho, cudaEventRecord(end, stream));
            MAGE_CUDA_CHECK(kWho, cudaStreamSynchronize(stream));
            float milliseconds = 0;
            MAGE_CUDA_CHECK(kWho, cudaEventElapsedTime(&milliseconds, start, end));
            if (i > 0) times.push_back(1e3 * milliseconds / nodes);
        }
        MAGE_CUDA_CHECK(kWho, cudaGraphExecDestroy(exec));
        MAGE_CUDA_CHECK(kWho, cudaGraphDestroy(graph));
        return median(times);
    }
};

template <typename... ParamsT>
void allow_all_shared(void (*kernel)(ParamsT...)) {
    core::allow_shared_memory(kWho, reinterpret_cast<const void*>(kernel), kAllShared);
}

void print_bandwidth(const std::string& name, double bytes, double us) {
    print_row(name, text("%.2f TB/s, %.1f us", bytes / us * 1e-6, us),
              text("%.1f %%", 100 * bytes / us / kHbmBytesPerUs));
}

struct Pool {
    int32_t heads, page;
    bool hnd;
    const int32_t* table;

    int64_t tokens() const { return kPoolBytes / (heads * kRowBytes); }
};

int32_t log2_of(int32_t power) { return power == 1 ? 0 : 1 + log2_of(power / 2); }

// The whole pool in one launch, or launches over `call_tokens` in turn.
template <int kTokens, int kStages, int kCtas = 1>
void stream_row(Bench& bench, const Pool& pool, int64_t call_tokens = 0) {
    static_assert(sizeof(StreamShared<kTokens, kStages>) + 1023 <= kAllShared);
    const auto kernel = mage_bench_stream_kernel<kTokens, kStages, kCtas>;
    allow_all_shared(kernel);
    const int32_t box = std::min({pool.page, kTokens, 64});
    PageTable pages;
    pages.page_size = pool.page;
    pages.num_pages = pool.tokens() / pool.page;
    const auto map_of = [&](const char* name, const uint8_t* data) {
        const int64_t row = kHeadDim;
        const PagedPool strides = {data, row * pool.heads * pool.page, pool.hnd ? row : row * pool.heads,
                                   pool.hnd ? row * pool.page : row};
        return core::paged_pool_map(kWho, name, strides, pages, pool.heads, kHeadDim, DType::kBFloat16, box);
    };
    const CUtensorMap k_map = map_of("k", bench.k.get()), v_map = map_of("v", bench.v.get());
    const int64_t tokens = call_tokens == 0 ? pool.tokens() : call_tokens;
    const int nodes = call_tokens == 0 ? 2 : 24;
    MAGE_CHECK(call_tokens == 0 || nodes * call_tokens <= pool.tokens(), kWho, ": calls must fit the pool");
    StreamArgs args = {
        pool.table, log2_of(pool.page), log2_of(box), pool.heads, 0, static_cast<int32_t>(tokens / kTokens)};
    const double us = bench.time(nodes, [&](int node) {
        args.first_tile = call_tokens == 0 ? 0 : node * args.tiles;
        core::launch(kWho, kernel, Bench::plan(bench.sms, 2 * kWarp, kAllShared, kCtas, true), bench.stream, args,
                     k_map, v_map);
    });
    const double bytes = 2.0 * static_cast<double>(tokens) * pool.heads * kRowBytes;
    const std::string call = call_tokens == 0 ? "" : text(", call of %lld tokens", static_cast<long long>(call_tokens));
    print_bandwidth(text("TMA, %d KV heads, page %d, %s, %d x %d tokens%s%s", pool.heads, pool.page,
                         pool.hnd ? "HND" : "NHD", kStages, kTokens, kCtas > 1 ? ", pairs" : "", call.c_str()),
                    bytes, us);
}

void measure_streams(Bench& bench) {
    for (const int32_t heads : {8, 2}) {
        for (const int32_t page : {16, 32, 64, 128}) {
            const Memory<int32_t> table = shuffled(kPoolBytes / (heads * kRowBytes) / page);
            for (const bool hnd : {false, true}) {
                const Pool pool = {heads, page, hnd, table.get()};
                stream_row<64, 2>(bench, pool);
                stream_row<64, 3>(bench, pool);
                stream_row<64, 5>(bench, pool);
                if (page != 64) continue;
                stream_row<128, 2>(bench, pool);
                stream_row<128, 2, 2>(bench, pool);
                stream_row<128, 3, 2>(bench, pool);
                stream_row<64, 5>(bench, pool, 32768 / heads);
                stream_row<64, 5>(bench, pool, 65536 / heads);
            }
        }
    }
}

template <int kStages>
void gather_row(Bench& bench, const int32_t* tokens) {
    constexpr int kHeads = 4;
    const auto kernel = mage_bench_gather_kernel<kStages>;
    static_assert(kStages * 2 * kGatherTokens * kRowBytes <= kAllShared);
    allow_all_shared(kernel);
    const int64_t count = kPoolBytes / (kHeads * kRowBytes);
    const double us = bench.time(2, [&](int) {
        core::launch(kWho, kernel, Bench::plan(bench.sms, kGatherWarps * kWarp, kAllShared, 1, true), bench.stream,
                     bench.k.get(), bench.v.get(), tokens, static_cast<int32_t>(count / kGatherTokens), kHeads);
    });
    print_bandwidth(text("cp.async, %d KV heads, page 1, NHD, %d x %d tokens, %d warps", kHeads, kStages, kGatherTokens,
                         kGatherWarps),
                    2.0 * kPoolBytes, us);
}

struct PartialTimes {
    double write, both;
};

template <int kKilobytes>
PartialTimes partial_times(Bench& bench, uint8_t* partial, uint32_t* sink) {
    constexpr int kVectors = kKilobytes * 1024 / 16 / (2 * kMergeThreads);
    const auto kernel = mage_bench_partial_kernel<kKilobytes>;
    allow_all_shared(kernel);
    const auto write = [&](int) {
        core::launch(kWho, kernel, Bench::plan(bench.sms, 256, kAllShared, 1, true), bench.stream, partial, 0.5f);
    };
    const auto both = [&](int node) {
        write(node);
        core::launch(kWho, mage_bench_read_kernel<kVectors>, Bench::plan(2 * bench.sms, kMergeThreads, 0, 1, true),
                     bench.stream, reinterpret_cast<const uint4*>(partial), sink);
    };
    return {bench.time(100, write), bench.time(100, both)};
}

void measure_partials(Bench& bench) {
    const Memory<uint8_t> partial = allocate<uint8_t>(bench.sms * int64_t{64} * 1024);
    const Memory<uint32_t> sink = allocate<uint32_t>(4);
    const PartialTimes none = partial_times<0>(bench, partial.get(), sink.get());
    const PartialTimes less = partial_times<48>(bench, partial.get(), sink.get());
    const PartialTimes all = partial_times<64>(bench, partial.get(), sink.get());
    const auto print = [&](const char* name, const PartialTimes& times) {
        print_row(text("partials, %u x %s: write", bench.sms, name),
                  text("%.2f us, %+.2f us over none", times.write, times.write - none.write));
        print_row(text("partials, %u x %s: write, then read by %u blocks", bench.sms, name, 2 * bench.sms),
                  text("%.2f us, %+.2f us over none", times.both, times.both - none.both));
    };
    print("none", none);
    print("48 KB (24 bits)", less);
    print("64 KB (float32)", all);
}

void measure_launches(Bench& bench) {
    const auto kernel = mage_bench_empty_kernel;
    allow_all_shared(kernel);
    const Memory<int32_t> counts = allocate<int32_t>(4 * 2 * bench.sms);
    for (const uint32_t cluster : {1u, 2u}) {
        for (const uint32_t shared : {0u, 200u}) {
            for (const bool overlap : {false, true}) {
                const LaunchPlan plan = Bench::plan(bench.sms, kAttentionThreads, shared * 1024, cluster, overlap);
                const double us = bench.time(
                    200, [&](int) { core::launch(kWho, kernel, plan, bench.stream, static_cast<int32_t*>(nullptr)); });
                print_row(text("empty kernel, %u CTAs x %d, %u KB%s%s", bench.sms, kAttentionThreads, shared,
                               cluster > 1 ? ", pairs" : "", overlap ? ", PDL" : ""),
                          text("%.2f us", us));
            }
        }
    }
    for (const uint32_t shared : {200u, 227u}) {
        for (const bool overlap : {false, true}) {
            const auto first = Bench::plan(bench.sms, kAttentionThreads, shared * 1024, 1, overlap);
            const auto second = Bench::plan(2 * bench.sms, kMergeThreads, 0, 1, overlap);
            const double us = bench.time(100, [&](int) {
                core::launch(kWho, kernel, first, bench.stream, counts.get());
                core::launch(kWho, kernel, second, bench.stream, counts.get());
            });
            print_row(text("nearly empty, %u CTAs with %u KB, then %u blocks%s", bench.sms, shared, 2 * bench.sms,
                           overlap ? ", PDL" : ""),
                      text("%.2f us for both", us));
        }
    }
}

template <bool kOrders, int kStores>
void barrier_row(Bench& bench, float4* out) {
    const auto kernel = mage_bench_cluster_barrier_kernel<kOrders, kStores>;
    allow_all_shared(kernel);
    const Memory<BarrierClocks> clocks = allocate<BarrierClocks>(bench.sms * int64_t{sizeof(BarrierClocks)});
    std::vector<BarrierClocks> copy(bench.sms);
    std::vector<int32_t> arrive, all;
    for (int i = 0; i <= kRepeats; ++i) {
        core::launch(kWho, kernel, Bench::plan(bench.sms, 256, kAllShared, 2), bench.stream, out, clocks.get());
        MAGE_CUDA_CHECK(kWho, cudaStreamSynchronize(bench.stream));
        MAGE_CUDA_CHECK(
            kWho, cudaMemcpy(copy.data(), clocks.get(), copy.size() * sizeof(BarrierClocks), cudaMemcpyDeviceToHost));
        for (const BarrierClocks& each : copy)
            if (i > 0) arrive.push_back(each.arrive), all.push_back(each.all);
    }
    print_row(text("barrier.cluster of pairs, arrive.%s, after %d KB of stores", kOrders ? "release" : "relaxed",
                   kStores * 256 * 16 / 1024),
              text("%d clocks, of them %d to arrive", median(all), median(arrive)));
}

void run() {
    core::require_hopper(kWho);
    Bench bench;
    std::printf("| measurement | value | of 3.05 TB/s |\n|---|---|---|\n");
    measure_streams(bench);
    const Memory<int32_t> tokens = shuffled(kPoolBytes / (4 * kRowBytes));
    gather_row<2>(bench, tokens.get());
    gather_row<3>(bench, tokens.get());
    gather_row<5>(bench, tokens.get());
    measure_partials(bench);
    measure_launches(bench);
    const Memory<float4> out = allocate<float4>(bench.sms * int64_t{64} * 1024);
    barrier_row<true, 0>(bench, out.get());
    barrier_row<false, 0>(bench, out.get());
    barrier_row<true, 16>(bench, out.get());
    barrier_row<false, 16>(bench, out.get());
}

}  // namespace

int main() {
    try {
        run();
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
