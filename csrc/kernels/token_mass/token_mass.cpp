#include "mage/token_mass.h"

#include <algorithm>
#include <cmath>

#include "core/attention_schedule.h"
#include "core/cuda/device_info.h"
#include "core/cuda/launch.h"
#include "core/cuda/tensor_map.h"
#include "kernels/attention_launch.h"
#include "kernels/kernel_list.h"
#include "kernels/token_mass/variants.h"

namespace mage::cuda {

namespace {

constexpr char kOp[] = "token_mass";
constexpr double kLog2E = 1.4426950408889634;
constexpr float kNoScale = 1e-30f;  // for a scale that is 0 in float32: scores vanish beside any lse

const TokenMassVariant& variant_of(DType dtype, int64_t head_dim, int shape) {
    if (dtype == DType::kBFloat16) {
        return head_dim == 64 ? token_mass_variant_bf16_d64(shape) : token_mass_variant_bf16_d128(shape);
    }
    return head_dim == 64 ? token_mass_variant_fp16_d64(shape) : token_mass_variant_fp16_d128(shape);
}

void check_supported(const TokenMassParams& p) {
    check_served(kOp, p.dtype, p.head_dim);
    const int64_t group = p.num_heads / p.num_kv_heads;
    MAGE_CHECK(p.num_queries * group * group < (int64_t{1} << 32), kOp,
               ": q must have fewer than 2^32 rows per KV head times heads per KV head on CUDA, got ",
               p.num_queries * group, " x ", group);
}

void check_workspace(const TokenMassParams& p) {
    const int64_t needed = token_mass_workspace(p);
    MAGE_CHECK(p.workspace_bytes >= needed, kOp, ": workspace must have at least ", needed, " bytes, got ",
               p.workspace_bytes);
    const uintptr_t past = reinterpret_cast<uintptr_t>(p.workspace) % 16;
    MAGE_CHECK(past == 0 || needed == 0, kOp, ": workspace must be aligned to 16 bytes, got a base ", past,
               " bytes past it");
}

MassMode mode_of(MassScore score) {
    switch (score) {
        case MassScore::kMax:
            return MassMode::kMax;
        case MassScore::kRows:
            return MassMode::kRows;
        default:
            return MassMode::kMean;
    }
}

// One launch over `tiles` tiles at most.
void launch_pass(const TokenMassParams& p, const core::TokenMassPlan& plan, TokenMassArgs args, int64_t tiles,
                 CudaStream stream) {
    MAGE_CHECK(tiles < (int64_t{1} << 31), kOp, ": the call must have fewer than 2^31 tiles of 64 tokens, got ", tiles);
    args.box_shift = std::min(args.page_shift, core::log2_of(core::kMassTile));
    if (args.units != nullptr) args.box_shift = std::min(args.box_shift, args.unit_shift);
    PagedPool k_cache = p.k_cache;
    if (p.pages.num_pages == 0) k_cache.data = p.q;  // a pool without pages has no address, and none is read
    const CUtensorMap k_map = core::paged_pool_map(kOp, "k_cache", k_cache, p.pages, p.num_kv_heads, p.head_dim,
                                                   p.dtype, int32_t{1} << args.box_shift);
    const TokenMassVariant& variant = variant_of(p.dtype, p.head_dim, plan.shape);
    core::allow_shared_memory(kOp, reinterpret_cast<const void*>(variant.kernel), variant.shared_bytes);
    const int64_t workers = std::min(std::min<int64_t>(core::multiprocessors(kOp), core::kMaxSms), tiles);
    const auto streams = static_cast<int32_t>(p.num_requests * p.num_kv_heads);
    args.alike = args.units != nullptr || args.num_requests == 1;
    args.stream_workers = static_cast<int32_t>(workers / streams);
    args.guess_tiles = static_cast<int32_t>(tiles / streams);
    if (args.alike) {
        args.guess_workers =
            own_workers_of(args.guess_tiles, streams, args.stream_workers, static_cast<int32_t>(workers));
    }
    LaunchPlan launch;
    launch.grid[0] = static_cast<uint32_t>(workers);
    launch.block[0] = static_cast<uint32_t>(variant.threads);
    launch.shared_bytes = static_cast<uint32_t>(variant.shared_bytes);
    launch.overlap = true;
    core::launch(kOp, variant.kernel, launch, stream, args, k_map);
}

}  // namespace

std::vector<KernelEntry> token_mass_kernels() {
    std::vector<KernelEntry> entries;
    for (const auto variants : {token_mass_variant_bf16_d128, token_mass_variant_bf16_d64, token_mass_variant_fp16_d128,
                                token_mass_variant_fp16_d64}) {
        for (int shape = 0; shape < core::kNumMassShapes; ++shape) {
            const TokenMassVariant& variant = variants(shape);
            entries.push_back(
                {variant.name, reinterpret_cast<const void*>(variant.kernel), variant.threads, variant.shared_bytes});
        }
    }
    return entries;
}

void token_mass(const TokenMassParams& p, CudaStream stream) {
    core::require_hopper(kOp);
    check_token_mass(p);
    check_supported(p);
    check_workspace(p);
    const int64_t streams = p.num_requests * p.num_kv_heads;
    const int64_t length = p.has_units ? p.num_candidates * p.granularity : p.max_seq_len;
    if (streams == 0 || length == 0) return;

    const core::TokenMassPlan plan = core::plan_token_mass(p);
    const int64_t group = p.num_heads / p.num_kv_heads;
    TokenMassArgs args = {};
    args.q = p.q;
    args.stride_q_request = p.stride_q_request;
    args.stride_q_query = p.stride_q_query;
    args.stride_q_head = p.stride_q_head;
    args.block_table = p.pages.block_table;
    args.stride_table = p.pages.stride_request;
    args.seq_lens = p.seq_lens;
    args.kv_lens = p.kv_lens;
    args.prefix_lens = p.norm == MassNorm::kPrefix ? p.prefix_lens : nullptr;
    args.lse = p.lse;
    args.row_mask = p.row_mask;
    args.num_pages = p.pages.num_pages;
    args.max_seq_len = static_cast<int32_t>(std::min(p.max_seq_len, int64_t{p.pages.max_pages} * p.pages.page_size));
    args.page_shift = core::log2_of(p.pages.page_size);
    args.num_requests = static_cast<int32_t>(p.num_requests);
    args.num_queries = static_cast<int32_t>(p.num_queries);
    args.num_heads = static_cast<int32_t>(p.num_heads);
    args.num_kv_heads = static_cast<int32_t>(p.num_kv_heads);
    args.group = static_cast<int32_t>(group);
    args.group_reciprocal = static_cast<uint32_t>(((uint64_t{1} << 32) + args.group - 1) / args.group);
    args.rows = static_cast<int32_t>(plan.rows);
    args.chunks = static_cast<int32_t>(plan.chunks);
    args.chunk_rows = static_cast<int32_t>(plan.chunk_rows);
    const auto scale_log2 = static_cast<float>(p.softmax_scale * kLog2E);
    args.scale_log2 = scale_log2 == 0.0f ? kNoScale : scale_log2;
    args.hidden = args.scale_log2 > 0.0f ? -INFINITY : INFINITY;
    if (args.prefix_lens != nullptr) {
        args.totals = static_cast<float*>(p.workspace);
        args.stride_totals = plan.padded_rows;
        args.parts = reinterpret_cast<StreamParts*>(args.totals + plan.slots * plan.padded_rows);
        args.mode = MassMode::kTotals;
        launch_pass(p, plan, args, plan.max_tiles, stream);
        args.divides = true;
    }
    args.mode = mode_of(p.score);
    args.mass = p.mass;
    args.pairs = plan.rows % 2 == 0 && reinterpret_cast<uintptr_t>(p.mass) % 8 == 0;
    args.length = static_cast<int32_t>(length);
    if (p.has_units) {
        args.units = p.units;
        args.num_candidates = static_cast<int32_t>(p.num_candidates);
        args.unit_shift = core::log2_of(p.granularity);
        args.list_tiles = static_cast<int32_t>(plan.list_tiles);
    }
    launch_pass(p, plan, args, p.has_units ? streams * plan.list_tiles : plan.max_tiles, stream);
}

}  // namespace mage::cuda
