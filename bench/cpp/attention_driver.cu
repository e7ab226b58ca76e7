// Calls an attention operator on random data, for profilers.
//
//   attention_driver OP [MODEL:BATCH:CONTEXT[:Q]] [PAGE] [G] [CALLS] [K]
//   attention_driver block_attention_mass 7B:1:32768 64 64 20
//   attention_driver sparse_block_attention 7B:1:32768 64 16 20 1024
//
// sparse_block_attention lists K tokens of the context in units of G, at even distances, for every KV head.
// Two calls to warm up, then CALLS between cudaProfilerStart and cudaProfilerStop (`ncu --profile-from-start off`), all
// over one set of K/V: the L2 is warm unless the profiler flushes it. CONTEXT may end in K.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/cuda/cuda_check.h"
#include "core/cuda/device_info.h"
#include "mage/block_attention_mass.h"
#include "mage/block_attention_rows.h"
#include "mage/sparse_block_attention.h"

// Of cuda_profiler_api.h, which the pip wheels of CUDA lack.
extern "C" {
cudaError_t CUDARTAPI cudaProfilerStart();
cudaError_t CUDARTAPI cudaProfilerStop();
}

namespace {

constexpr char kWho[] = "attention_driver";
constexpr int64_t kHeadDim = 128;
constexpr int kWarmups = 2;

struct Case {
    std::string op = "block_attention";
    std::string model = "7B";
    int64_t heads = 28, kv_heads = 4;
    int64_t batch = 1, context = 32768, q_len = 32;
    int64_t page = 64, g = 64, calls = 1, k = 1024;

    int64_t length() const { return context + q_len; }
    int64_t rows() const { return heads / kv_heads * q_len; }
};

int64_t positive(const char* name, const std::string& text) {
    char* end = nullptr;
    int64_t value = std::strtoll(text.c_str(), &end, 10);
    if (*end == 'K') value *= 1024, ++end;
    MAGE_CHECK(!text.empty() && *end == '\0' && value > 0, kWho, ": ", name, " must be a positive number, got ", text);
    return value;
}

Case parse(int argc, char** argv) {
    Case c;
    MAGE_CHECK(argc >= 2 && argc <= 7, kWho, ": arguments must be OP [MODEL:BATCH:CONTEXT[:Q]] [PAGE] [G] [CALLS] [K]");
    c.op = argv[1];
    MAGE_CHECK(c.op == "block_attention" || c.op == "block_attention_mass" || c.op == "block_attention_rows" ||
                   c.op == "sparse_block_attention",
               kWho, ": OP must be block_attention, block_attention_mass, block_attention_rows or ",
               "sparse_block_attention, got ", c.op);
    if (argc > 2) {
        std::vector<std::string> parts;
        std::istringstream stream(argv[2]);
        for (std::string part; std::getline(stream, part, ':');) parts.push_back(part);
        MAGE_CHECK(parts.size() == 3 || parts.size() == 4, kWho, ": SHAPE must be MODEL:BATCH:CONTEXT[:Q], got ",
                   argv[2]);
        c.model = parts[0];
        c.batch = positive("BATCH", parts[1]);
        c.context = positive("CONTEXT", parts[2]);
        if (parts.size() == 4) c.q_len = positive("Q", parts[3]);
        MAGE_CHECK(c.model == "7B" || c.model == "1.5B" || c.model == "8B", kWho,
                   ": MODEL must be 7B, 1.5B or 8B, got ", c.model);
        if (c.model == "1.5B") c.heads = 12, c.kv_heads = 2;
        if (c.model == "8B") c.heads = 32, c.kv_heads = 8;
    }
    if (argc > 3) c.page = positive("PAGE", argv[3]);
    if (argc > 4) c.g = positive("G", argv[4]);
    if (argc > 5) c.calls = positive("CALLS", argv[5]);
    if (argc > 6) c.k = positive("K", argv[6]);
    return c;
}

// bfloat16 of about the normal distribution: the sum of four uniform numbers, of variance 1.
__global__ void mage_bench_fill_kernel(uint16_t* values, int64_t count, uint64_t seed) {
    for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += gridDim.x * int64_t{blockDim.x}) {
        uint64_t bits = (static_cast<uint64_t>(i) + seed) * 0x9e3779b97f4a7c15u;
        bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
        bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
        bits ^= bits >> 31;
        int sum = 0;
        for (int part = 0; part < 4; ++part) sum += static_cast<int>((bits >> (16 * part)) & 0xffff);
        const float value = (static_cast<float>(sum) / 65536.f - 2.f) * 1.7320508f;
        values[i] = static_cast<uint16_t>(__float_as_uint(value) >> 16);
    }
}

struct Free {
    void operator()(void* memory) const { cudaFree(memory); }
};
using Memory = std::unique_ptr<void, Free>;

Memory allocate(int64_t bytes) {
    void* memory = nullptr;
    MAGE_CUDA_CHECK(kWho, cudaMalloc(&memory, static_cast<size_t>(std::max<int64_t>(bytes, 1))));
    return Memory(memory);
}

Memory random_values(int64_t count, uint64_t seed) {
    Memory memory = allocate(2 * count);
    mage_bench_fill_kernel<<<1024, 256>>>(static_cast<uint16_t*>(memory.get()), count, seed << 40);
    MAGE_CUDA_CHECK(kWho, cudaGetLastError());
    return memory;
}

Memory copy_of(const std::vector<int32_t>& values) {
    Memory memory = allocate(static_cast<int64_t>(values.size()) * 4);
    MAGE_CUDA_CHECK(kWho, cudaMemcpy(memory.get(), values.data(), values.size() * 4, cudaMemcpyHostToDevice));
    return memory;
}

void run(const Case& c) {
    mage::core::require_hopper(kWho);
    const int64_t pages_per_request = (c.length() + c.page - 1) / c.page;
    const int64_t pages = c.batch * pages_per_request;
    std::vector<int32_t> order(static_cast<size_t>(pages));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(0));
    const Memory table = copy_of(order);
    const Memory seq_lens = copy_of(std::vector<int32_t>(c.batch, static_cast<int32_t>(c.length())));

    const int64_t q_values = c.batch * c.q_len * c.heads * kHeadDim;
    const int64_t pool_values = pages * c.page * c.kv_heads * kHeadDim;
    const Memory q = random_values(q_values, 1);
    const Memory k_cache = random_values(pool_values, 2);
    const Memory v_cache = random_values(pool_values, 3);
    const Memory out = allocate(2 * q_values);
    const Memory lse = allocate(4 * c.batch * c.heads * c.q_len);

    mage::BlockAttentionParams params;
    params.num_requests = c.batch;
    params.num_queries = c.q_len;
    params.num_heads = c.heads;
    params.num_kv_heads = c.kv_heads;
    params.head_dim = kHeadDim;
    params.max_seq_len = c.length();
    params.dtype = mage::DType::kBFloat16;
    params.q = q.get();
    params.stride_q_head = kHeadDim;
    params.stride_q_query = c.heads * kHeadDim;
    params.stride_q_request = c.q_len * c.heads * kHeadDim;
    params.k_cache = {k_cache.get(), c.page * c.kv_heads * kHeadDim, c.kv_heads * kHeadDim, kHeadDim};
    params.v_cache = {v_cache.get(), c.page * c.kv_heads * kHeadDim, c.kv_heads * kHeadDim, kHeadDim};
    params.pages.block_table = static_cast<const int32_t*>(table.get());
    params.pages.stride_request = pages_per_request;
    params.pages.max_pages = static_cast<int32_t>(pages_per_request);
    params.pages.page_size = static_cast<int32_t>(c.page);
    params.pages.num_pages = pages;
    params.seq_lens = static_cast<const int32_t*>(seq_lens.get());
    params.softmax_scale = 0.08838834764831845;  // kHeadDim^-0.5
    params.out = out.get();
    params.lse = static_cast<float*>(lse.get());

    const bool emits_mass = c.op == "block_attention_mass";
    const bool emits_rows = c.op == "block_attention_rows";
    const int64_t units = c.batch * c.kv_heads * ((c.length() + c.g - 1) / c.g);
    const Memory emitted = allocate(emits_rows ? 4 * units * c.rows() : emits_mass ? 4 * units : 0);
    mage::BlockAttentionMassParams mass_params;
    mass_params.attention = params;
    mass_params.granularity = c.g;
    mass_params.mass = static_cast<float*>(emitted.get());
    mage::BlockAttentionRowsParams rows_params;
    rows_params.attention = params;
    rows_params.granularity = c.g;
    rows_params.row_mass = static_cast<float*>(emitted.get());
    const bool is_sparse = c.op == "sparse_block_attention";
    const int64_t listed = c.k / c.g, all_units = c.context / c.g;
    MAGE_CHECK(!is_sparse || (listed > 0 && listed <= all_units), kWho, ": K must be from G to CONTEXT, got ", c.k);
    std::vector<int32_t> list;
    for (int64_t i = 0; is_sparse && i < c.batch * c.kv_heads * listed; ++i)
        list.push_back(static_cast<int32_t>(i % listed * all_units / listed));
    const Memory indices = copy_of(list);
    const Memory counts = copy_of(std::vector<int32_t>(c.batch * c.kv_heads, static_cast<int32_t>(listed)));
    const Memory tails = copy_of(std::vector<int32_t>(c.batch, static_cast<int32_t>(c.context / c.g * c.g)));
    mage::SparseBlockAttentionParams sparse_params;
    sparse_params.attention = params;
    sparse_params.indices = static_cast<const int32_t*>(indices.get());
    sparse_params.counts = static_cast<const int32_t*>(counts.get());
    sparse_params.tail_start = static_cast<const int32_t*>(tails.get());
    sparse_params.capacity = listed;
    sparse_params.granularity = c.g;
    const int64_t needed = is_sparse    ? mage::cuda::sparse_block_attention_workspace(sparse_params)
                           : emits_mass ? mage::cuda::block_attention_mass_workspace(mass_params)
                           : emits_rows ? mage::cuda::block_attention_rows_workspace(rows_params)
                                        : mage::cuda::block_attention_workspace(params);
    const Memory workspace = allocate(needed);
    for (mage::BlockAttentionParams* each :
         {&params, &mass_params.attention, &rows_params.attention, &sparse_params.attention}) {
        each->workspace = workspace.get();
        each->workspace_bytes = needed;
    }

    cudaStream_t stream;
    cudaEvent_t start, end;
    MAGE_CUDA_CHECK(kWho, cudaStreamCreate(&stream));
    MAGE_CUDA_CHECK(kWho, cudaEventCreate(&start));
    MAGE_CUDA_CHECK(kWho, cudaEventCreate(&end));
    const auto call = [&] {
        if (is_sparse) {
            mage::cuda::sparse_block_attention(sparse_params, stream);
        } else if (emits_mass) {
            mage::cuda::block_attention_mass(mass_params, stream);
        } else if (emits_rows) {
            mage::cuda::block_attention_rows(rows_params, stream);
        } else {
            mage::cuda::block_attention(params, stream);
        }
    };
    for (int i = 0; i < kWarmups; ++i) call();
    MAGE_CUDA_CHECK(kWho, cudaDeviceSynchronize());
    MAGE_CUDA_CHECK(kWho, cudaProfilerStart());
    MAGE_CUDA_CHECK(kWho, cudaEventRecord(start, stream));
    for (int64_t i = 0; i < c.calls; ++i) call();
    MAGE_CUDA_CHECK(kWho, cudaEventRecord(end, stream));
    MAGE_CUDA_CHECK(kWho, cudaDeviceSynchronize());
    MAGE_CUDA_CHECK(kWho, cudaProfilerStop());
    float milliseconds = 0;
    MAGE_CUDA_CHECK(kWho, cudaEventElapsedTime(&milliseconds, start, end));
    std::printf("%s %s %lld x %lld + %lld, page %lld, g %lld: %lld calls, %.1f us each by events\n", c.op.c_str(),
                c.model.c_str(), static_cast<long long>(c.batch), static_cast<long long>(c.context),
                static_cast<long long>(c.q_len), static_cast<long long>(c.page), static_cast<long long>(c.g),
                static_cast<long long>(c.calls), 1e3 * milliseconds / static_cast<double>(c.calls));
}

}  // namespace

int main(int argc, char** argv) {
    try {
        run(parse(argc, argv));
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
