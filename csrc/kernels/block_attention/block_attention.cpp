#include "mage/block_attention.h"

#include <algorithm>
#include <cmath>

#include "core/cuda/device_info.h"
#include "core/cuda/launch.h"
#include "core/cuda/tensor_map.h"
#include "kernels/attention_launch.h"
#include "kernels/block_attention/variants.h"
#include "kernels/kernel_list.h"

namespace mage::cuda {

namespace {

constexpr char kOp[] = "block_attention";
constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kMergePieces = 6;     // of a warp; more are shared with others
constexpr int32_t kMostMergeShift = 3;  // 1 << shift warps share a row
constexpr int32_t kMaxBoxTokens = 64;
constexpr int64_t kMaxGrid = 65535;
constexpr int32_t kFixedMergeShift = 2;
constexpr int64_t kManyStreams = 32;
constexpr int64_t kUnitsOfBlock = 64;          // that are worth a block of the merge
constexpr int64_t kManyBlocks = 32;            // of a stream that finish masses
constexpr int64_t kBlocksAtOnce = 2 * 132;     // of the merge
constexpr int64_t kMostStreamsOfTurns = 1024;  // of more, blocks that leave at once would cost more than turns
constexpr int kMaxCluster = 16;                // CTAs
constexpr int64_t kFurthestAhead = 1024;       // tokens past its end that a warp may count
constexpr int32_t kShortBoxShift = 4;          // of boxes of short lists

const AttentionVariant& variant_of(DType dtype, int64_t head_dim, int row_shape, Serves serves) {
    if (dtype == DType::kBFloat16) {
        return head_dim == 64 ? attention_variant_bf16_d64(row_shape, serves)
                              : attention_variant_bf16_d128(row_shape, serves);
    }
    return head_dim == 64 ? attention_variant_fp16_d64(row_shape, serves)
                          : attention_variant_fp16_d128(row_shape, serves);
}

void check_supported(const char* op, const BlockAttentionParams& p, const UnitOutputs& outputs) {
    check_served(op, p.dtype, p.head_dim);
    if (outputs.granularity == 0) return;
    MAGE_CHECK(outputs.granularity == 16 || outputs.granularity == 32 || outputs.granularity == 64, op,
               ": g must be 16, 32 or 64 on CUDA (token_mass has g = 1), got ", outputs.granularity);
    const int64_t rows = p.num_queries * (p.num_heads / p.num_kv_heads);
    MAGE_CHECK(rows <= kMaxUnitRows, op, ": q must have at most ", kMaxUnitRows, " rows per KV head on CUDA, got ",
               rows);
}

// How a call with lists is served where no second launch is needed.
struct ListPlan {
    int shape_index = 0;  // 0: short lists
    int ctas = 1;         // that share the rows of a segment
    int splits = 0;       // of a segment; 0: the schedule's workers, and a merge
    int64_t row_tiles = 1;
};

int64_t clusters_at_once(const char* op, const AttentionVariant& variant, int ctas) {
    return core::active_clusters(op, reinterpret_cast<const void*>(variant.attention), ctas, variant.threads,
                                 variant.shared_bytes);
}

// What takes least by a rough count, in microseconds. Lists are taken to be full.
ListPlan plan_lists(const char* op, const BlockAttentionParams& p, const core::AttentionPlan& plan,
                    int64_t list_tokens) {
    constexpr double kTile[core::kRowShapes] = {0.0, 1.6, 1.25, 1.6};
    constexpr double kStart = 5.0, kSecondLaunch = 6.5;
    // Of a segment behind another in the same place; of a piece behind another, with its share of the merge.
    constexpr double kNextSegment = 7.0, kNextPiece = 10.0;
    // Of short lists: a wave, a tile, a box of one, what splits of a number take to merge, and bytes of L2 in a
    // microsecond. Clusters that are no power of two start late.
    constexpr double kShortStart = 4.3, kShortTile = 0.55, kShortBox = 0.085, kBytes = 4.5e6;
    constexpr struct {
        int splits;
        double time;
    } kMerges[] = {{1, 0.0}, {2, 1.2}, {3, 1.9}, {4, 1.4}, {5, 1.9}, {6, 2.6}, {7, 3.0}, {8, 1.6}, {16, 2.4}};
    constexpr int64_t kExpectedTail = 32, kBox = 16;
    constexpr int64_t kMaxY = 65535;
    ListPlan best;
    if (plan.schedule.fixed) return best;
    const int64_t tokens = list_tokens + kExpectedTail;
    const int64_t streams = p.num_requests * p.num_kv_heads;
    const AttentionVariant& general = variant_of(p.dtype, p.head_dim, plan.shape_index, Serves::kLists);
    const auto time_of = [&](int64_t tiles) { return kStart + kTile[plan.shape_index] * static_cast<double>(tiles); };
    const int64_t segments = streams * plan.row_tiles, tiles = (tokens + general.keys - 1) / general.keys;
    const int64_t workers = plan.schedule.max_workers;
    double least = time_of((tiles * segments + workers - 1) / workers) + kSecondLaunch;
    if (segments > workers) least += kNextPiece * static_cast<double>((segments + workers - 1) / workers);
    const auto consider = [&](double time, const ListPlan& candidate) {
        if (time >= least) return;
        least = time;
        best = candidate;
    };
    // Segments that do not all run at once follow one another, each where one has ended.
    if (const int64_t at_once = clusters_at_once(op, general, general.ctas); at_once > 0) {
        const int64_t waves = (segments + at_once - 1) / at_once;
        const double time =
            waves == 1 ? time_of(tiles) : static_cast<double>(waves) * (time_of(tiles) - kStart + kNextSegment);
        consider(time, {plan.shape_index, general.ctas, 1, plan.row_tiles});
    }
    const AttentionVariant& few = variant_of(p.dtype, p.head_dim, 0, Serves::kLists);
    const int64_t groups = (plan.rows + few.rows - 1) / few.rows;
    for (int ctas = 1; ctas <= 4 && ctas < 2 * groups; ctas *= 2) {
        const int64_t row_tiles = (groups + ctas - 1) / ctas;
        if (p.num_kv_heads * row_tiles > kMaxY) continue;
        for (const auto& [splits, merge_time] : kMerges) {
            if (splits * ctas > kMaxCluster) break;
            const int64_t at_once = clusters_at_once(op, few, splits * ctas);
            if (at_once == 0) continue;
            const int64_t waves = (streams * row_tiles + at_once - 1) / at_once;
            const int64_t boxes = ((tokens + kBox - 1) / kBox + splits - 1) / splits;
            const int64_t of_tiles = (boxes * kBox + few.keys - 1) / few.keys;
            const double products = kShortTile * static_cast<double>(of_tiles) + kShortBox * static_cast<double>(boxes);
            // CTAs of a row that do not share K and V read them again.
            const double bytes = static_cast<double>(std::min(at_once, streams * row_tiles) * splits * boxes) *
                                 static_cast<double>(kBox * 4 * p.head_dim);
            const double time =
                merge_time + static_cast<double>(waves) * (kShortStart + std::max(products, bytes / kBytes));
            consider(time, {0, ctas, splits, row_tiles});
        }
    }
    return best;
}

}  // namespace

std::vector<KernelEntry> block_attention_kernels() {
    std::vector<KernelEntry> entries;
    for (const auto variants : {attention_variant_bf16_d128, attention_variant_bf16_d64, attention_variant_fp16_d128,
                                attention_variant_fp16_d64}) {
        for (const Serves serves : {Serves::kRange, Serves::kPacked, Serves::kLists}) {
            const int shapes = serves == Serves::kPacked ? core::kPackedShapes : core::kRowShapes;
            for (int shape = 0; shape < shapes; ++shape) {
                const AttentionVariant& variant = variants(shape, serves);
                entries.push_back({variant.name, reinterpret_cast<const void*>(variant.attention), variant.threads,
                                   variant.shared_bytes});
            }
        }
    }
    for (const Finish finish : {Finish::kNothing, Finish::kUnits, Finish::kPacked}) {
        const MergeVariant& merge = merge_variant(finish);
        entries.push_back({merge.name, reinterpret_cast<const void*>(merge.merge), merge.threads, 0});
    }
    return entries;
}

void launch_block_attention(const char* op, const BlockAttentionParams& p, const UnitOutputs& outputs,
                            const ListInputs* lists, CudaStream stream) {
    core::require_hopper(op);
    check_block_attention(p, op);
    check_supported(op, p, outputs);
    if (p.num_requests == 0) return;
    const uintptr_t past = reinterpret_cast<uintptr_t>(p.out) % 16;
    MAGE_CHECK(past == 0, op, ": out must be aligned to 16 bytes on CUDA, got a base ", past, " bytes past it");

    const int64_t list_tokens = lists == nullptr ? 0 : lists->capacity * lists->granularity;
    const int64_t most_positions =
        lists == nullptr ? p.max_seq_len : core::max_list_positions(list_tokens, p.max_seq_len);
    const int64_t limit = (int64_t{1} << 31) - std::max(p.split_tokens, kFurthestAhead);
    MAGE_CHECK(most_positions < limit, op, ": lists and tail must have fewer than ", limit, " tokens, got ",
               most_positions);
    core::AttentionPlan plan = lists == nullptr ? core::plan_attention(p, core::multiprocessors(op))
                                                : core::plan_list_attention(p, list_tokens, core::multiprocessors(op));
    const int64_t group = p.num_heads / p.num_kv_heads;
    MAGE_CHECK(plan.rows * group < (int64_t{1} << 32), op,
               ": q must have fewer than 2^32 rows per KV head times heads per KV head on CUDA, got ", plan.rows, " x ",
               group);
    const ListPlan list_plan = lists == nullptr ? ListPlan() : plan_lists(op, p, plan, list_tokens);
    const bool is_short = list_plan.splits > 0 && list_plan.shape_index == 0;
    const int64_t streams = p.num_requests * p.num_kv_heads;
    const int64_t num_units =
        outputs.granularity == 0 ? 0 : (p.max_seq_len + outputs.granularity - 1) / outputs.granularity;
    if (outputs.mass != nullptr) plan.pack_units(streams, num_units, outputs.pack_from);
    const Serves serves = lists != nullptr ? Serves::kLists : plan.packs_units ? Serves::kPacked : Serves::kRange;
    const AttentionVariant& variant = variant_of(p.dtype, p.head_dim, is_short ? 0 : plan.shape_index, serves);
    MAGE_CHECK(is_short || variant.rows * std::max(variant.ctas, 1) == plan.shape.rows, op,
               ": internal: the kernel of ", variant.rows, " rows must serve the shape of ", plan.shape.rows);
    core::set_tile(&plan.schedule, variant.keys);
    const int64_t most_units = core::max_units(plan.schedule, most_positions);
    MAGE_CHECK(most_units < (int64_t{1} << 31), op, ": the call must have fewer than 2^31 tiles of keys, got ",
               most_units);
    core::allow_shared_memory(op, reinterpret_cast<const void*>(variant.attention), variant.shared_bytes);
    core::allow_large_clusters(op, reinterpret_cast<const void*>(variant.attention));

    const int64_t segments = int64_t{plan.schedule.num_requests} * plan.schedule.segments_per_request;
    AttentionArgs args = {};
    args.schedule = plan.schedule;
    args.splits = list_plan.splits;
    args.splits_reciprocal =
        args.splits < 2 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + args.splits - 1) / args.splits);
    args.ctas = is_short ? list_plan.ctas : plan.shape.ctas;
    if (list_plan.splits > 0) {
        args.guess_workers = 1;
    } else if (lists == nullptr) {
        const auto units = static_cast<int32_t>(most_units / std::max(segments, int64_t{1}));
        const int32_t most = core::aligned_units(plan.schedule, static_cast<int32_t>(most_units), [&](int32_t t) {
            return static_cast<int32_t>(segments) * core::ceil_div(units, t);
        });
        const bool whole = core::takes_whole(plan.schedule, static_cast<int32_t>(most_units), units);
        args.guess_workers = most > 0 ? core::ceil_div(units, most) : whole ? 1 : 0;
    }
    if (lists != nullptr) {
        args.indices = lists->indices;
        args.counts = lists->counts;
        args.tail_start = lists->tail_start;
        args.capacity = static_cast<int32_t>(lists->capacity);
        args.list_shift = core::log2_of(lists->granularity);
    }
    args.q = p.q;
    args.stride_q_request = p.stride_q_request;
    args.stride_q_query = p.stride_q_query;
    args.stride_q_head = p.stride_q_head;
    args.block_table = p.pages.block_table;
    args.stride_table = p.pages.stride_request;
    args.seq_lens = p.seq_lens;
    args.kv_lens = p.kv_lens;
    args.prefix_lens = outputs.prefix_lens;
    args.num_pages = p.pages.num_pages;
    args.max_seq_len = static_cast<int32_t>(std::min(p.max_seq_len, int64_t{p.pages.max_pages} * p.pages.page_size));
    args.page_shift = core::log2_of(p.pages.page_size);
    args.box_shift = std::min(args.page_shift, core::log2_of(kMaxBoxTokens));
    if (lists != nullptr) args.box_shift = std::min(args.box_shift, args.list_shift);
    if (is_short) args.box_shift = std::min(args.box_shift, kShortBoxShift);
    args.num_queries = static_cast<int32_t>(p.num_queries);
    args.num_heads = static_cast<int32_t>(p.num_heads);
    args.num_kv_heads = static_cast<int32_t>(p.num_kv_heads);
    args.group = static_cast<int32_t>(group);
    args.group_reciprocal = static_cast<uint32_t>(((uint64_t{1} << 32) + args.group - 1) / args.group);
    args.rows = static_cast<int32_t>(plan.rows);
    args.row_tiles = static_cast<int32_t>(is_short ? list_plan.row_tiles : plan.row_tiles);
    args.tile_rows = static_cast<int32_t>(plan.shape.rows);
    args.head_dim = static_cast<int32_t>(p.head_dim);
    args.is_half = p.dtype == DType::kFloat16;
    // Scores are scaled by a positive factor, so that the largest stays the largest: q takes the sign, or becomes 0.
    const auto scale_log2 = static_cast<float>(std::abs(p.softmax_scale) * kLog2E);
    const bool scaled = scale_log2 > 0.0f;
    args.scale_log2 = scaled ? scale_log2 : 1.0f;
    args.flip = p.softmax_scale < 0.0 ? 0x80008000u : 0u;
    args.keep = scaled ? ~0u : 0u;
    args.out = p.out;
    args.lse = p.lse;
    args.partial = static_cast<uint8_t*>(p.workspace);
    args.partial_rows = static_cast<float*>(p.workspace) + plan.partial_floats(p.head_dim);
    args.pieces = reinterpret_cast<core::Pieces*>(args.partial_rows + plan.partial_row_floats());
    args.row_stats = args.partial_rows + plan.partial_row_floats() + plan.piece_floats(streams);
    if (outputs.granularity != 0) {
        float* own = args.row_stats + plan.stat_floats(streams);
        if (plan.packs_units) {
            args.slots = static_cast<int32_t>(plan.slots);
            args.unit_levels = reinterpret_cast<core::UnitLevels*>(own);
            own += plan.level_floats(streams);
        }
        args.units = outputs.units != nullptr ? outputs.units : own;
        args.unit_rows = static_cast<int32_t>(plan.unit_rows());
        args.unit_shift = core::log2_of(outputs.granularity);
        args.num_units = static_cast<int32_t>(num_units);
        args.mass = outputs.mass;
        args.row_mask = outputs.row_mask;
        args.score_max = outputs.score == MassScore::kMax ? 1 : 0;
    }
    const Finish finish = outputs.granularity == 0 ? Finish::kNothing
                          : plan.packs_units       ? Finish::kPacked
                                                   : Finish::kUnits;
    const MergeVariant& merge = merge_variant(finish);
    // Warps that share a row: the same with masses and without, so that out and lse are too. Fixed splits are merged in
    // the same order whatever else is in the batch, so by a fixed number of warps.
    const int64_t pieces = plan.schedule.max_workers / (streams * plan.row_tiles);
    const auto merge_blocks = [&] {
        const int64_t rows_of_block = merge.warps >> args.merge_shift;
        return (plan.rows + rows_of_block - 1) / rows_of_block;
    };
    args.merge_shift = kFixedMergeShift;
    if (!plan.schedule.fixed) {
        args.merge_shift = 0;
        while (args.merge_shift < kMostMergeShift && pieces > kMergePieces << args.merge_shift) ++args.merge_shift;
        while (args.merge_shift > 0 && merge_blocks() * streams > kBlocksAtOnce * 3 / 4) --args.merge_shift;
    }
    // All blocks that have work should run at once; those that finish masses have what the merge leaves, half of them
    // if need be.
    const bool finishes = finish != Finish::kNothing;
    const int64_t merge_most = args.merge_shift == 0 && finishes ? kBlocksAtOnce / 2 : kBlocksAtOnce;
    // Where segments may be cut wherever a worker ends, only some streams have anything to merge: two turns for these.
    const bool cuts = core::may_take_whole(plan.schedule) && plan.row_tiles == 1 && streams <= kMostStreamsOfTurns;
    const int64_t merge_least = cuts ? (merge_blocks() + 1) / 2 : 1;
    args.merge_blocks = static_cast<int32_t>(std::min(merge_blocks(), std::max(merge_most / streams, merge_least)));
    int64_t finish_blocks = 0;
    if (finish == Finish::kPacked) {
        // As many to a worker as run at once. Of many streams most are whole, so that blocks that merge leave at once.
        const int64_t workers = std::min<int64_t>(plan.schedule.max_workers, most_units);
        const int64_t left = streams > kManyStreams ? kBlocksAtOnce : kBlocksAtOnce - args.merge_blocks * streams;
        args.finish_parts = static_cast<int32_t>(std::max(left / workers, int64_t{1}));
        finish_blocks = (workers * args.finish_parts + streams - 1) / streams;
    } else if (finishes) {
        finish_blocks = std::max(kBlocksAtOnce / streams - args.merge_blocks, int64_t{1});
        // In a batch of many streams one may have most of the units: its blocks must not be few.
        if (streams > kManyStreams) {
            finish_blocks =
                std::max(finish_blocks, std::min((num_units + kUnitsOfBlock - 1) / kUnitsOfBlock, kManyBlocks));
        }
        finish_blocks = std::min(finish_blocks, (num_units + merge.warps - 1) / merge.warps);
    }
    MAGE_CHECK(p.num_requests <= kMaxGrid && p.num_kv_heads <= kMaxGrid, op,
               ": q and k_cache must have at most 65535 requests and KV heads on CUDA, got ", p.num_requests, " and ",
               p.num_kv_heads);

    const auto in_bytes = [](const PagedPool& pool) {
        return PoolBytes{static_cast<const uint8_t*>(pool.data), 2 * pool.stride_page, 2 * pool.stride_token,
                         2 * pool.stride_head};
    };
    args.k_pool = in_bytes(p.k_cache);
    args.v_pool = in_bytes(p.v_cache);
    const int32_t box_tokens = 1 << args.box_shift;
    // A pool without pages has no address, and none is read.
    PagedPool k_cache = p.k_cache, v_cache = p.v_cache;
    if (p.pages.num_pages == 0) k_cache.data = v_cache.data = p.q;
    const CUtensorMap k_map =
        core::paged_pool_map(op, "k_cache", k_cache, p.pages, p.num_kv_heads, p.head_dim, p.dtype, box_tokens);
    const CUtensorMap v_map =
        core::paged_pool_map(op, "v_cache", v_cache, p.pages, p.num_kv_heads, p.head_dim, p.dtype, box_tokens);
    const int64_t workers = std::min<int64_t>(plan.schedule.max_workers, most_units);
    LaunchPlan attention;
    attention.grid[0] = static_cast<uint32_t>(workers * args.ctas);
    attention.block[0] = static_cast<uint32_t>(variant.threads);
    attention.shared_bytes = static_cast<uint32_t>(variant.shared_bytes);
    attention.cluster = static_cast<uint32_t>(args.ctas);
    attention.overlap = true;
    if (is_short) {
        attention.cluster *= static_cast<uint32_t>(args.splits);
        attention.grid[0] = attention.cluster;
        attention.grid[1] = static_cast<uint32_t>(p.num_kv_heads * list_plan.row_tiles);
        attention.grid[2] = static_cast<uint32_t>(p.num_requests);
    } else if (args.splits > 0) {
        attention.grid[0] = static_cast<uint32_t>(segments) * attention.cluster;
    }
    core::launch(op, variant.attention, attention, stream, args, k_map, v_map);
    if (args.splits > 0) return;
    LaunchPlan plan_of_merge;
    plan_of_merge.grid[0] = static_cast<uint32_t>(args.merge_blocks + finish_blocks);
    plan_of_merge.grid[1] = static_cast<uint32_t>(p.num_kv_heads);
    plan_of_merge.grid[2] = static_cast<uint32_t>(p.num_requests);
    plan_of_merge.block[0] = static_cast<uint32_t>(merge.threads);
    plan_of_merge.overlap = true;
    core::launch(op, merge.merge, plan_of_merge, stream, args);
}

void block_attention(const BlockAttentionParams& params, CudaStream stream) {
    check_block_attention(params);
    const int64_t needed = block_attention_workspace(params);
    MAGE_CHECK(params.workspace_bytes >= needed, kOp, ": workspace must have at least ", needed, " bytes, got ",
               params.workspace_bytes);
    launch_block_attention(kOp, params, UnitOutputs(), nullptr, stream);
}

}  // namespace mage::cuda
