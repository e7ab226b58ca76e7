#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>

#include "core/check.h"
#include "core/parallel.h"

namespace mage::cpu {

namespace {

constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kMaxRows = int64_t{1} << 24;
constexpr int64_t kMaxTokens = int64_t{1} << 30;
constexpr int64_t kMinSplitTokens = 256;   // below, packing Q and merging partial results cost more than 3 %
constexpr int64_t kWantedItems = 128;      // work items of a call, for balance over threads
constexpr int64_t kRowTileStep = 48;       // a whole number of row panels for every instruction set
constexpr int64_t kRowTileFloats = 30720;  // rows * D of a tile: Q and O together stay within 240 KiB of L2
constexpr int64_t kMaxRowTile = 240;
constexpr double kFlopsPerThread = 2e6;  // about 10 us of work; starting a thread pool costs a few
constexpr double kLog2E = 1.4426950408889634;

// Memory of a thread that outlives the call, so that steps don't pay for page faults again and again.
float* thread_scratch(int64_t floats) {
    struct Buffer {
        std::unique_ptr<float, decltype(&std::free)> data{nullptr, &std::free};
        int64_t floats = 0;
    };
    static thread_local Buffer buffer;
    if (buffer.floats < floats) {
        const auto bytes = static_cast<size_t>(round_up(floats * 4, 64));
        buffer.data.reset();
        buffer.floats = 0;
        buffer.data.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
        if (buffer.data == nullptr) throw std::bad_alloc();
        buffer.floats = floats;
    }
    return buffer.data.get();
}

int32_t page_shift(int32_t page_size) {
    int32_t shift = 0;
    while ((1 << shift) < page_size) ++shift;
    return shift;
}

const void* advance(const void* data, int64_t elements, DType dtype) {
    return static_cast<const char*>(data) + elements * dtype_bytes(dtype);
}

}  // namespace

void for_each_item(int64_t count, int64_t scratch_floats, double flops,
                   const std::function<void(int64_t, float*)>& body) {
    const auto useful = static_cast<int64_t>(std::min(1.0 + flops / kFlopsPerThread, 1024.0));
    const int64_t threads = std::min({static_cast<int64_t>(core::num_threads()), count, useful});
    std::atomic<int64_t> next{0};
    core::parallel_for(threads, 1, [&](int64_t, int64_t) {
        float* scratch = thread_scratch(scratch_floats);
        for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) body(i, scratch);
    });
}

BlockAttentionParams attention_dims(const char* op, int64_t num_requests, int64_t num_queries, int64_t num_heads,
                                    int64_t num_kv_heads, int64_t head_dim, int64_t max_seq_len, int64_t split_tokens) {
    // In the words of a query for a workspace, which has no tensors.
    core::check_range(op, "batch", num_requests, 0, kMaxRows);
    core::check_range(op, "num_kv_heads", num_kv_heads, 1, kMaxRows);
    core::check_range(op, "num_heads", num_heads, 1, kMaxRows);
    MAGE_CHECK(num_heads % num_kv_heads == 0, op, ": num_heads must be a multiple of num_kv_heads (", num_kv_heads,
               "), got ", num_heads);
    core::check_range(op, "q_len", num_queries, 1, kMaxRows / (num_heads / num_kv_heads));
    MAGE_CHECK(head_dim >= 8 && head_dim % 8 == 0 && head_dim <= kMaxHeadDim, op,
               ": head_dim must be a multiple of 8 and at most ", kMaxHeadDim, ", got ", head_dim);
    BlockAttentionParams dims;
    dims.num_requests = num_requests;
    dims.num_queries = num_queries;
    dims.num_heads = num_heads;
    dims.num_kv_heads = num_kv_heads;
    dims.head_dim = head_dim;
    dims.max_seq_len = max_seq_len;
    dims.split_tokens = split_tokens;
    check_attention_dims(op, dims);
    // Partial results and sums of every row, roughly: what a size in 64 bits can tell.
    const int64_t splits = split_tokens > 0 ? divide_up(max_seq_len, split_tokens) : 1;
    const double floats =
        static_cast<double>(num_requests) * static_cast<double>(num_heads * num_queries) *
        (static_cast<double>(splits) * static_cast<double>(head_dim + 2) + static_cast<double>(max_seq_len));
    MAGE_CHECK(floats < 0x1p56, op, ": batch must be smaller, for results of all rows below 2^56 numbers, got ",
               num_requests);
    return dims;
}

void check_attention_dims(const char* op, const BlockAttentionParams& p) {
    MAGE_CHECK(p.num_requests >= 0, op, ": the number of requests must be at least 0, got ", p.num_requests);
    MAGE_CHECK(p.num_kv_heads >= 1 && p.num_heads >= 1 && p.num_heads % p.num_kv_heads == 0, op,
               ": the number of heads of q must be a multiple of the KV heads (", p.num_kv_heads, "), got ",
               p.num_heads);
    MAGE_CHECK(p.num_queries >= 1 && p.num_queries <= kMaxRows / (p.num_heads / p.num_kv_heads), op,
               ": q must have at least 1 query and at most 2^24 rows per KV head, got ", p.num_queries, " queries of ",
               p.num_heads / p.num_kv_heads, " heads");
    MAGE_CHECK(p.head_dim >= 8 && p.head_dim % 8 == 0 && p.head_dim <= kMaxHeadDim, op,
               ": the head dim of q must be a multiple of 8 and at most ", kMaxHeadDim, ", got ", p.head_dim);
    MAGE_CHECK(p.max_seq_len >= 1 && p.max_seq_len <= kMaxTokens, op, ": max_seq_len must be in [1, 2^30], got ",
               p.max_seq_len);
    MAGE_CHECK(p.split_tokens >= 0 && p.split_tokens % kTileTokens == 0, op,
               ": split_tokens must be 0 or a positive multiple of ", kTileTokens, ", got ", p.split_tokens);
    MAGE_CHECK(p.split_tokens <= kMaxTokens, op, ": split_tokens must be at most 2^30, got ", p.split_tokens);
}

void check_granularity(const char* op, int64_t g) {
    MAGE_CHECK(g == 1 || g == 16 || g == 32 || g == 64, op, ": g must be 1, 16, 32 or 64, got ", g);
}

AttentionPlan plan_attention(const BlockAttentionParams& p, int64_t expected_tokens) {
    AttentionPlan plan;
    plan.rows = p.num_queries * (p.num_heads / p.num_kv_heads);
    plan.padded_rows = round_up(plan.rows, kMaxLanes);
    const int64_t fitting = kRowTileFloats / p.head_dim / kRowTileStep * kRowTileStep;
    const int64_t largest = std::clamp(fitting, kRowTileStep, kMaxRowTile);
    plan.num_row_tiles = divide_up(plan.rows, largest);
    plan.row_tile =
        plan.num_row_tiles == 1 ? plan.padded_rows : round_up(divide_up(plan.rows, plan.num_row_tiles), kRowTileStep);
    const int64_t tiles = p.num_requests * p.num_kv_heads * plan.num_row_tiles;
    if (p.split_tokens > 0) {
        plan.split_tokens = p.split_tokens;
        plan.num_splits = divide_up(p.max_seq_len, p.split_tokens);
    } else {
        const int64_t wanted = std::max<int64_t>(1, kWantedItems / std::max<int64_t>(tiles, 1));
        plan.split_tokens = std::max(kMinSplitTokens, round_up(divide_up(expected_tokens, wanted), kTileTokens));
        plan.num_splits = divide_up(expected_tokens, plan.split_tokens);
    }
    plan.partial_floats = plan.row_tile * (p.head_dim + 2);
    plan.num_partials = tiles * plan.num_splits;
    return plan;
}

void check_workspace(const char* op, int64_t workspace_bytes, int64_t needed) {
    MAGE_CHECK(workspace_bytes >= needed, op, ": workspace must have at least ", needed, " bytes, got ",
               workspace_bytes);
}

int32_t clamped_seq_len(const int32_t* seq_lens, int64_t request, int64_t max_seq_len, const PageTable& pages) {
    const int64_t longest = std::min(max_seq_len, int64_t{pages.max_pages} * pages.page_size);
    return static_cast<int32_t>(std::clamp<int64_t>(seq_lens[request], 0, longest));
}

TokenStream token_stream(DType dtype, const PagedPool& k, const PagedPool& v, const PageTable& pages, int64_t request,
                         int64_t kv_head) {
    TokenStream stream;
    stream.k = advance(k.data, kv_head * k.stride_head, dtype);
    stream.stride_k_page = k.stride_page;
    stream.stride_k_token = k.stride_token;
    if (v.data != nullptr) {
        stream.v = advance(v.data, kv_head * v.stride_head, dtype);
        stream.stride_v_page = v.stride_page;
        stream.stride_v_token = v.stride_token;
    }
    stream.pages = pages.block_table + request * pages.stride_request;
    stream.num_pages = pages.num_pages;
    stream.page_shift = page_shift(pages.page_size);
    return stream;
}

void run_attention(const BlockAttentionParams& p, const AttentionPlan& plan, const UnitBuffers& units,
                   const RunsOf& runs, const TileDone& tile_done, const StreamDone& stream_done) {
    struct Stream {
        std::vector<TokenRun> runs;
        int64_t tokens = 0;
        int64_t split_tokens = 0;
        int64_t num_splits = 0;
    };
    const int64_t group = p.num_heads / p.num_kv_heads;
    const int64_t num_streams = p.num_requests * p.num_kv_heads;
    if (num_streams == 0) return;
    std::vector<Stream> streams(num_streams);
    double flops = 0.0;
    for (int64_t i = 0; i < num_streams; ++i) {
        Stream& stream = streams[i];
        const int64_t request = i / p.num_kv_heads;
        const int32_t seq_len = clamped_seq_len(p.seq_lens, request, p.max_seq_len, p.pages);
        if (runs) {
            stream.runs = runs(request, i % p.num_kv_heads, seq_len);
        } else if (seq_len > 0) {
            stream.runs = {{0, 0, seq_len}};
        }
        if (!stream.runs.empty()) stream.tokens = stream.runs.back().offset + stream.runs.back().count;
        // A stream that is longer than the shapes promised gets longer splits, never more of them.
        stream.split_tokens =
            std::max(plan.split_tokens, round_up(divide_up(stream.tokens, plan.num_splits), kTileTokens));
        stream.num_splits = divide_up(stream.tokens, stream.split_tokens);
        flops += 4.0 * static_cast<double>(plan.rows * stream.tokens * p.head_dim);
    }

    const int64_t unit_tiles = divide_up(p.max_seq_len, kTileTokens);
    const auto partial_of = [&](int64_t item) {
        float* base = static_cast<float*>(p.workspace) + item * plan.partial_floats;
        return PartialTile{base, base + plan.row_tile * p.head_dim, base + plan.row_tile * (p.head_dim + 1)};
    };
    // Splits of a row tile that hold a token for one of its rows: with kv_lens a tile stops early.
    const auto splits_of = [&](const Stream& stream, int64_t request, int64_t row_end) {
        if (p.kv_lens == nullptr || runs) return stream.num_splits;
        const int64_t longest = std::max<int64_t>(0, p.kv_lens[request * p.num_queries + (row_end - 1) / group]);
        return std::min(stream.num_splits, divide_up(longest, stream.split_tokens));
    };
    const auto attend = MAGE_CPU_PICK(attention_item);
    const auto finish = MAGE_CPU_PICK(finish_item);
    const auto scale_log2 = static_cast<float>(p.softmax_scale * kLog2E);

    const auto attend_split = [&](int64_t i, int64_t stream_index, int64_t row_begin, int64_t row_end, float* scratch) {
        const Stream& stream = streams[stream_index];
        const int64_t split = i % plan.num_splits;
        const int64_t request = stream_index / p.num_kv_heads;
        const int64_t kv_head = stream_index % p.num_kv_heads;
        if (split >= stream.num_splits) return;
        if (units.granularity == 0 && split >= splits_of(stream, request, row_end)) return;
        AttentionItem item;
        item.shape = {p.dtype, static_cast<int32_t>(p.head_dim)};
        item.rows.q = advance(p.q, request * p.stride_q_request + kv_head * group * p.stride_q_head, p.dtype);
        item.rows.stride_q_query = p.stride_q_query;
        item.rows.stride_q_head = p.stride_q_head;
        item.rows.group = static_cast<int32_t>(group);
        item.rows.row_begin = static_cast<int32_t>(row_begin);
        item.rows.row_end = static_cast<int32_t>(row_end);
        item.rows.kv_lens = p.kv_lens == nullptr ? nullptr : p.kv_lens + request * p.num_queries;
        item.rows.seq_len = clamped_seq_len(p.seq_lens, request, p.max_seq_len, p.pages);
        item.rows.scale_log2 = scale_log2;
        item.stream = token_stream(p.dtype, p.k_cache, p.v_cache, p.pages, request, kv_head);
        item.stream.runs = stream.runs.data();
        item.stream.num_runs = static_cast<int32_t>(stream.runs.size());
        item.stream_begin = split * stream.split_tokens;
        item.stream_end = std::min(stream.tokens, item.stream_begin + stream.split_tokens);
        item.partial = partial_of(i);
        if (units.granularity != 0) {
            item.units.unit_tokens = static_cast<int32_t>(units.granularity);
            item.units.end = units.end == nullptr ? item.rows.seq_len : std::min(item.rows.seq_len, units.end[request]);
            item.units.sums = units.sums + stream_index * units.num_units * units.sums_stride;
            item.units.sums_stride = units.sums_stride;
            item.units.reference = units.reference + stream_index * unit_tiles * plan.padded_rows;
            item.units.reference_stride = plan.padded_rows;
        }
        item.scratch = scratch;
        attend(item);
    };

    // Merges the splits of a row tile, in their order.
    const auto finish_tile = [&](int64_t first_item, int64_t stream_index, int64_t row_begin, int64_t row_end,
                                 float* scratch) {
        const int64_t request = stream_index / p.num_kv_heads;
        const int64_t kv_head = stream_index % p.num_kv_heads;
        const PartialTile first = partial_of(first_item);
        FinishItem item;
        item.shape = {p.dtype, static_cast<int32_t>(p.head_dim)};
        item.group = static_cast<int32_t>(group);
        item.row_begin = static_cast<int32_t>(row_begin);
        item.row_end = static_cast<int32_t>(row_end);
        item.num_splits = static_cast<int32_t>(splits_of(streams[stream_index], request, row_end));
        item.values = first.values;
        item.row_max = first.row_max;
        item.row_sum = first.row_sum;
        item.values_stride = item.row_stride = plan.partial_floats;
        item.out = const_cast<void*>(
            advance(p.out, (request * p.num_queries * p.num_heads + kv_head * group) * p.head_dim, p.dtype));
        item.stride_out_query = p.num_heads * p.head_dim;
        item.stride_out_head = p.head_dim;
        item.lse = p.lse + (request * p.num_heads + kv_head * group) * p.num_queries;
        item.stride_lse_query = 1;
        item.stride_lse_head = p.num_queries;
        if (units.lse_log2 != nullptr) item.lse_log2 = units.lse_log2 + stream_index * plan.padded_rows;
        item.scratch = scratch;
        finish(item);
    };

    // One pass over the threads: whoever ends the last split of a row tile merges it, whoever ends the last tile of a
    // stream calls stream_done. Every such step sees all that it needs and is computed the same way by any thread.
    const int64_t num_tiles = num_streams * plan.num_row_tiles;
    std::vector<std::atomic<int64_t>> splits_left(num_tiles), tiles_left(num_streams);
    for (auto& left : splits_left) left.store(plan.num_splits, std::memory_order_relaxed);
    for (auto& left : tiles_left) left.store(plan.num_row_tiles, std::memory_order_relaxed);
    const int64_t scratch_floats = std::max(
        {attention_scratch_floats(plan.row_tile, p.head_dim), finish_scratch_floats(p.head_dim), plan.padded_rows});
    for_each_item(plan.num_partials, scratch_floats, flops, [&](int64_t i, float* scratch) {
        const int64_t tile = i / plan.num_splits;
        const int64_t stream = tile / plan.num_row_tiles;
        const int64_t row_begin = tile % plan.num_row_tiles * plan.row_tile;
        const int64_t row_end = std::min(plan.rows, row_begin + plan.row_tile);
        attend_split(i, stream, row_begin, row_end, scratch);
        if (splits_left[tile].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
        finish_tile(tile * plan.num_splits, stream, row_begin, row_end, scratch);
        if (tile_done) tile_done(stream, row_begin, row_end);
        if (tiles_left[stream].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
        if (stream_done) stream_done(stream, scratch);
    });
}

}  // namespace mage::cpu
