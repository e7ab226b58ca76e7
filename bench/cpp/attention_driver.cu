// Calls an operator on random data, for profilers.
//
//   attention_driver OP [MODEL:BATCH:CONTEXT[:Q]] [PAGE] [G] [CALLS] [K]
//   attention_driver block_attention_mass 7B:1:32768 64 64 20
//   attention_driver sparse_block_attention 7B:1:32768 64 16 20 1024
//
// OP and what else it looks at:
//   block_attention, block_attention_mass, block_attention_rows   SHAPE, PAGE; G the last two
//   token_mass               SHAPE, PAGE: of all tokens, with the lse of block_attention
//   sparse_block_attention   SHAPE, PAGE, G, K: K tokens of the context in units of G, at even distances, per KV head
//   select_kv                MODEL, BATCH, CONTEXT, G, K: rule fixed for all layers of MODEL, 4 sinks and 64 recents
//   row_votes                SHAPE, G, K: K tokens per row
//   merge_attention          MODEL, BATCH, Q: two parts
//   token_confidence         BATCH * Q rows of 151936 logits
// Two calls to warm up, then CALLS between cudaProfilerStart and cudaProfilerStop (`ncu --profile-from-start off`), all
// over one set of inputs: the L2 is warm unless the profiler flushes it. CONTEXT may end in K.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/cuda/cuda_check.h"
#include "core/cuda/device_info.h"
#include "mage/block_attention_mass.h"
#include "mage/block_attention_rows.h"
#include "mage/merge_attention.h"
#include "mage/row_votes.h"
#include "mage/select_kv.h"
#include "mage/sparse_block_attention.h"
#include "mage/token_confidence.h"
#include "mage/token_mass.h"

// Of cuda_profiler_api.h, which the pip wheels of CUDA lack.
extern "C" {
cudaError_t CUDARTAPI cudaProfilerStart();
cudaError_t CUDARTAPI cudaProfilerStop();
}

namespace {

constexpr char kWho[] = "attention_driver";
constexpr int64_t kHeadDim = 128;
constexpr int64_t kVocab = 151936;  // of Qwen2.5
constexpr int kWarmups = 2;

struct Case {
    std::string op = "block_attention";
    std::string model = "7B";
    int64_t heads = 28, kv_heads = 4, layers = 28;
    int64_t batch = 1, context = 32768, q_len = 32;
    int64_t page = 64, g = 64, calls = 1, k = 1024;

    int64_t length() const { return context + q_len; }
    int64_t rows() const { return heads / kv_heads * q_len; }
    int64_t units() const { return (length() + g - 1) / g; }
    int64_t listed() const {
        MAGE_CHECK(k >= g && k / g <= context / g, kWho, ": K must be from G to CONTEXT, got ", k);
        return k / g;
    }
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
        if (c.model == "8B") c.heads = 32, c.kv_heads = 8, c.layers = 36;
    }
    if (argc > 3) c.page = positive("PAGE", argv[3]);
    if (argc > 4) c.g = positive("G", argv[4]);
    if (argc > 5) c.calls = positive("CALLS", argv[5]);
    if (argc > 6) c.k = positive("K", argv[6]);
    return c;
}

// Of about the normal distribution: the sum of four uniform numbers, of variance 1.
__device__ float normal(uint64_t number) {
    uint64_t bits = number * 0x9e3779b97f4a7c15u;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
    bits ^= bits >> 31;
    int sum = 0;
    for (int part = 0; part < 4; ++part) sum += static_cast<int>((bits >> (16 * part)) & 0xffff);
    return (static_cast<float>(sum) / 65536.f - 2.f) * 1.7320508f;
}

// bfloat16.
__global__ void mage_bench_fill_kernel(uint16_t* values, int64_t count, uint64_t seed) {
    for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += gridDim.x * int64_t{blockDim.x})
        values[i] = static_cast<uint16_t>(__float_as_uint(normal(static_cast<uint64_t>(i) + seed)) >> 16);
}

// Shares of units that add up to about 1, or their natural logs: e^3.78 is the mean of e^(3 * normal).
__global__ void mage_bench_fill_shares_kernel(float* values, int64_t count, float units, bool logs) {
    for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += gridDim.x * int64_t{blockDim.x}) {
        const float share = fminf(3.f * normal(static_cast<uint64_t>(i)) - 3.78f - logf(units), 0.f);
        values[i] = logs ? share : expf(share);
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

Memory random_shares(int64_t count, int64_t units, bool logs) {
    Memory memory = allocate(4 * count);
    mage_bench_fill_shares_kernel<<<1024, 256>>>(static_cast<float*>(memory.get()), count, static_cast<float>(units),
                                                 logs);
    MAGE_CUDA_CHECK(kWho, cudaGetLastError());
    return memory;
}

Memory copy_of(const std::vector<int32_t>& values) {
    Memory memory = allocate(static_cast<int64_t>(values.size()) * 4);
    MAGE_CUDA_CHECK(kWho, cudaMemcpy(memory.get(), values.data(), values.size() * 4, cudaMemcpyHostToDevice));
    return memory;
}

// What is profiled, and the memory that it uses.
struct Call {
    std::vector<Memory> memory;
    std::function<void(cudaStream_t)> launch;

    template <typename T>
    T* keep(Memory one) {
        memory.push_back(std::move(one));
        return static_cast<T*>(memory.back().get());
    }
};

// Gives `params` its workspace. Params of ops that hold those of block_attention keep it there.
template <typename Params>
void give_workspace(int64_t bytes, Params* params, Call* call) {
    params->workspace_bytes = bytes;
    params->workspace = call->keep<void>(allocate(bytes));
}

Call select_kv(const Case& c) {
    Call call;
    mage::SelectKvParams params;
    params.num_layers = c.layers;
    params.num_requests = c.batch;
    params.num_kv_heads = c.kv_heads;
    params.num_units = c.units();
    params.granularity = c.g;
    params.capacity = c.listed();
    params.k = c.listed() * c.g;
    params.sinks = 4;
    params.recents = 64;
    params.stride_mass_head = c.units();
    params.stride_mass_request = c.kv_heads * c.units();
    params.stride_mass_layer = c.batch * c.kv_heads * c.units();
    const int64_t lists = c.layers * c.batch * c.kv_heads;
    params.mass = call.keep<float>(random_shares(lists * c.units(), c.units(), false));
    params.prefix_lens = call.keep<int32_t>(copy_of(std::vector<int32_t>(c.batch, static_cast<int32_t>(c.context))));
    params.indices = call.keep<int32_t>(allocate(4 * lists * params.capacity));
    params.counts = call.keep<int32_t>(allocate(4 * lists));
    params.kept_mass = call.keep<float>(allocate(4 * lists));
    params.tail_start = call.keep<int32_t>(allocate(4 * c.batch));
    params.overflow = call.keep<bool>(allocate(lists));
    call.launch = [params](cudaStream_t stream) { mage::cuda::select_kv(params, stream); };
    return call;
}

Call row_votes(const Case& c) {
    Call call;
    mage::RowVotesParams params;
    params.num_requests = c.batch;
    params.num_kv_heads = c.kv_heads;
    params.num_units = c.units();
    params.num_rows = c.rows();
    params.num_positions = c.q_len;
    params.granularity = c.g;
    params.k = c.listed() * c.g;
    const int64_t heads = c.batch * c.kv_heads;
    params.row_mass = call.keep<float>(random_shares(heads * c.units() * c.rows(), c.units(), true));
    params.prefix_lens = call.keep<int32_t>(copy_of(std::vector<int32_t>(c.batch, static_cast<int32_t>(c.context))));
    params.votes = call.keep<int32_t>(allocate(4 * heads * c.units()));
    params.union_size = call.keep<int32_t>(allocate(4 * heads));
    params.coverage = call.keep<float>(allocate(4 * heads));
    give_workspace(mage::row_votes_workspace(c.batch, c.kv_heads, c.units(), c.rows()), &params, &call);
    call.launch = [params](cudaStream_t stream) { mage::cuda::row_votes(params, stream); };
    return call;
}

Call merge_attention(const Case& c) {
    Call call;
    mage::MergeAttentionParams params;
    params.num_requests = c.batch;
    params.num_queries = c.q_len;
    params.num_heads = c.heads;
    params.head_dim = kHeadDim;
    params.dtype = mage::DType::kBFloat16;
    const int64_t rows = c.batch * c.q_len * c.heads;
    for (const uint64_t seed : {1, 2}) {
        mage::MergePart part;
        part.out = call.keep<void>(random_values(rows * kHeadDim, seed));
        part.stride_head = kHeadDim;
        part.stride_query = c.heads * kHeadDim;
        part.stride_request = c.q_len * c.heads * kHeadDim;
        part.lse = call.keep<float>(random_shares(rows, c.units(), true));
        params.parts.push_back(part);
    }
    params.out = call.keep<void>(allocate(2 * rows * kHeadDim));
    params.lse = call.keep<float>(allocate(4 * rows));
    call.launch = [params](cudaStream_t stream) { mage::cuda::merge_attention(params, stream); };
    return call;
}

Call token_confidence(const Case& c) {
    Call call;
    mage::TokenConfidenceParams params;
    params.num_rows = c.batch * c.q_len;
    params.vocab_size = kVocab;
    params.dtype = mage::DType::kBFloat16;
    params.logits = call.keep<void>(random_values(params.num_rows * kVocab, 1));
    params.stride_logits_row = kVocab;
    params.token = call.keep<int64_t>(allocate(8 * params.num_rows));
    params.prob = call.keep<float>(allocate(4 * params.num_rows));
    params.entropy = call.keep<float>(allocate(4 * params.num_rows));
    call.launch = [params](cudaStream_t stream) { mage::cuda::token_confidence(params, stream); };
    return call;
}

// q, and K and V in pages at random places; without workspace.
mage::BlockAttentionParams attention_of(const Case& c, Call* call) {
    const int64_t pages_per_request = (c.length() + c.page - 1) / c.page;
    const int64_t pages = c.batch * pages_per_request;
    std::vector<int32_t> order(static_cast<size_t>(pages));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(0));
    const int64_t q_values = c.batch * c.q_len * c.heads * kHeadDim;
    const int64_t pool_values = pages * c.page * c.kv_heads * kHeadDim;

    mage::BlockAttentionParams params;
    params.num_requests = c.batch;
    params.num_queries = c.q_len;
    params.num_heads = c.heads;
    params.num_kv_heads = c.kv_heads;
    params.head_dim = kHeadDim;
    params.max_seq_len = c.length();
    params.dtype = mage::DType::kBFloat16;
    params.q = call->keep<void>(random_values(q_values, 1));
    params.stride_q_head = kHeadDim;
    params.stride_q_query = c.heads * kHeadDim;
    params.stride_q_request = c.q_len * c.heads * kHeadDim;
    for (mage::PagedPool* pool : {&params.k_cache, &params.v_cache}) {
        pool->data = call->keep<void>(random_values(pool_values, pool == &params.k_cache ? 2 : 3));
        pool->stride_page = c.page * c.kv_heads * kHeadDim;
        pool->stride_token = c.kv_heads * kHeadDim;
        pool->stride_head = kHeadDim;
    }
    params.pages.block_table = call->keep<int32_t>(copy_of(order));
    params.pages.stride_request = pages_per_request;
    params.pages.max_pages = static_cast<int32_t>(pages_per_request);
    params.pages.page_size = static_cast<int32_t>(c.page);
    params.pages.num_pages = pages;
    params.seq_lens = call->keep<int32_t>(copy_of(std::vector<int32_t>(c.batch, static_cast<int32_t>(c.length()))));
    params.softmax_scale = 0.08838834764831845;  // kHeadDim^-0.5
    params.out = call->keep<void>(allocate(2 * q_values));
    params.lse = call->keep<float>(allocate(4 * c.batch * c.heads * c.q_len));
    return params;
}

Call block_attention(const Case& c) {
    Call call;
    mage::BlockAttentionParams params = attention_of(c, &call);
    give_workspace(mage::cuda::block_attention_workspace(params), &params, &call);
    call.launch = [params](cudaStream_t stream) { mage::cuda::block_attention(params, stream); };
    return call;
}

Call block_attention_mass(const Case& c) {
    Call call;
    mage::BlockAttentionMassParams params;
    params.attention = attention_of(c, &call);
    params.granularity = c.g;
    params.mass = call.keep<float>(allocate(4 * c.batch * c.kv_heads * c.units()));
    give_workspace(mage::cuda::block_attention_mass_workspace(params), &params.attention, &call);
    call.launch = [params](cudaStream_t stream) { mage::cuda::block_attention_mass(params, stream); };
    return call;
}

Call block_attention_rows(const Case& c) {
    Call call;
    mage::BlockAttentionRowsParams params;
    params.attention = attention_of(c, &call);
    params.granularity = c.g;
    params.row_mass = call.keep<float>(allocate(4 * c.batch * c.kv_heads * c.units() * c.rows()));
    give_workspace(mage::cuda::block_attention_rows_workspace(params), &params.attention, &call);
    call.launch = [params](cudaStream_t stream) { mage::cuda::block_attention_rows(params, stream); };
    return call;
}

Call sparse_block_attention(const Case& c) {
    Call call;
    mage::SparseBlockAttentionParams params;
    params.attention = attention_of(c, &call);
    params.capacity = c.listed();
    params.granularity = c.g;
    const int64_t heads = c.batch * c.kv_heads, all_units = c.context / c.g;
    std::vector<int32_t> list;
    for (int64_t i = 0; i < heads * params.capacity; ++i)
        list.push_back(static_cast<int32_t>(i % params.capacity * all_units / params.capacity));
    params.indices = call.keep<int32_t>(copy_of(list));
    params.counts = call.keep<int32_t>(copy_of(std::vector<int32_t>(heads, static_cast<int32_t>(params.capacity))));
    params.tail_start =
        call.keep<int32_t>(copy_of(std::vector<int32_t>(c.batch, static_cast<int32_t>(all_units * c.g))));
    give_workspace(mage::cuda::sparse_block_attention_workspace(params), &params.attention, &call);
    call.launch = [params](cudaStream_t stream) { mage::cuda::sparse_block_attention(params, stream); };
    return call;
}

Call token_mass(const Case& c) {
    Call call;
    mage::BlockAttentionParams attention = attention_of(c, &call);
    give_workspace(mage::cuda::block_attention_workspace(attention), &attention, &call);
    mage::cuda::block_attention(attention, nullptr);  // gives the lse
    mage::TokenMassParams params;
    params.num_requests = attention.num_requests;
    params.num_queries = attention.num_queries;
    params.num_heads = attention.num_heads;
    params.num_kv_heads = attention.num_kv_heads;
    params.head_dim = attention.head_dim;
    params.max_seq_len = attention.max_seq_len;
    params.dtype = attention.dtype;
    params.q = attention.q;
    params.stride_q_request = attention.stride_q_request;
    params.stride_q_query = attention.stride_q_query;
    params.stride_q_head = attention.stride_q_head;
    params.k_cache = attention.k_cache;
    params.pages = attention.pages;
    params.seq_lens = attention.seq_lens;
    params.lse = attention.lse;
    params.softmax_scale = attention.softmax_scale;
    params.mass = call.keep<float>(allocate(4 * c.batch * c.kv_heads * c.length()));
    give_workspace(mage::cuda::token_mass_workspace(params), &params, &call);
    call.launch = [params](cudaStream_t stream) { mage::cuda::token_mass(params, stream); };
    return call;
}

Call make_call(const Case& c) {
    const std::map<std::string, Call (*)(const Case&)> makers = {
        {"block_attention", block_attention},
        {"block_attention_mass", block_attention_mass},
        {"block_attention_rows", block_attention_rows},
        {"merge_attention", merge_attention},
        {"row_votes", row_votes},
        {"select_kv", select_kv},
        {"sparse_block_attention", sparse_block_attention},
        {"token_confidence", token_confidence},
        {"token_mass", token_mass},
    };
    std::string known;
    for (const auto& [op, maker] : makers) known += (known.empty() ? "" : ", ") + op;
    MAGE_CHECK(makers.count(c.op) == 1, kWho, ": OP must be one of ", known, ", got ", c.op);
    mage::core::require_hopper(kWho);
    return makers.at(c.op)(c);
}

void run(const Case& c) {
    const Call call = make_call(c);
    cudaStream_t stream;
    cudaEvent_t start, end;
    MAGE_CUDA_CHECK(kWho, cudaStreamCreate(&stream));
    MAGE_CUDA_CHECK(kWho, cudaEventCreate(&start));
    MAGE_CUDA_CHECK(kWho, cudaEventCreate(&end));
    for (int i = 0; i < kWarmups; ++i) call.launch(stream);
    MAGE_CUDA_CHECK(kWho, cudaDeviceSynchronize());
    MAGE_CUDA_CHECK(kWho, cudaProfilerStart());
    MAGE_CUDA_CHECK(kWho, cudaEventRecord(start, stream));
    for (int64_t i = 0; i < c.calls; ++i) call.launch(stream);
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
