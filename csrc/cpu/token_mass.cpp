#include "mage/token_mass.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "cpu/attention.h"

namespace mage {

namespace {

constexpr char kOp[] = "token_mass";
constexpr int64_t kTokensPerItem = 512;
constexpr double kLog2E = 1.4426950408889634;

// The workspace, in floats per (request, KV head): lse_log2, weights, and row totals per piece of the prefix.
struct Layout {
    int64_t padded_rows, pieces;
    int64_t total() const { return padded_rows * (pieces + 2); }
};

Layout make_layout(const TokenMassParams& p) {
    const int64_t rows = p.num_queries * (p.num_heads / p.num_kv_heads);
    return {cpu::round_up(rows, cpu::kMaxLanes), cpu::divide_up(p.max_seq_len, kTokensPerItem)};
}

// One run per candidate: what is left of it below `seq_len`, then tokens that weigh 0 (begin -1).
std::vector<cpu::TokenRun> candidate_runs(const int32_t* units, int64_t num_candidates, int64_t g, int64_t seq_len) {
    std::vector<cpu::TokenRun> runs;
    for (int64_t c = 0; c < num_candidates; ++c) {
        const int64_t begin = int64_t{units[c]} * g;
        const int64_t count = begin < 0 ? 0 : std::clamp<int64_t>(seq_len - begin, 0, g);
        if (count > 0) runs.push_back({c * g, static_cast<int32_t>(begin), static_cast<int32_t>(count)});
        if (count < g) runs.push_back({c * g + count, -1, static_cast<int32_t>(g - count)});
    }
    return runs;
}

}  // namespace

int64_t token_mass_workspace(int64_t num_requests, int64_t num_queries, int64_t num_heads, int64_t num_kv_heads,
                             int64_t head_dim, int64_t max_seq_len) {
    cpu::attention_dims(kOp, num_requests, num_queries, num_heads, num_kv_heads, head_dim, max_seq_len, 0);
    TokenMassParams params;
    params.num_requests = num_requests;
    params.num_queries = num_queries;
    params.num_heads = num_heads;
    params.num_kv_heads = num_kv_heads;
    params.head_dim = head_dim;
    params.max_seq_len = max_seq_len;
    params.norm = MassNorm::kPrefix;
    return std::max(cpu::token_mass_workspace(params), cuda::token_mass_workspace(params));
}

void check_token_mass(const TokenMassParams& p) {
    BlockAttentionParams attention = cpu::attention_dims(kOp, p.num_requests, p.num_queries, p.num_heads,
                                                         p.num_kv_heads, p.head_dim, p.max_seq_len, 0);
    attention.pages = p.pages;
    attention.softmax_scale = p.softmax_scale;
    check_block_attention(attention, kOp);
    cpu::check_granularity(kOp, p.granularity);
    MAGE_CHECK(p.has_units || p.granularity == 1, kOp, ": g must be 1 without units, got ", p.granularity);
    MAGE_CHECK(p.num_candidates >= 0 && p.num_candidates <= (int64_t{1} << 30) / p.granularity, kOp,
               ": units must hold at most 2^30 tokens per KV head, got ", p.num_candidates, " units of ",
               p.granularity);
    MAGE_CHECK(p.norm == MassNorm::kContext || p.prefix_lens != nullptr || p.num_requests == 0, kOp,
               ": prefix_lens must be given with norm prefix");
}

namespace cpu {

int64_t token_mass_workspace(const TokenMassParams& params) {
    return 4 * params.num_requests * params.num_kv_heads * make_layout(params).total();
}

void token_mass(const TokenMassParams& p) {
    check_token_mass(p);
    check_workspace(kOp, p.workspace_bytes, token_mass_workspace(p));
    const int64_t group = p.num_heads / p.num_kv_heads;
    const int64_t rows = p.num_queries * group;
    const int64_t num_streams = p.num_requests * p.num_kv_heads;
    const Layout layout = make_layout(p);
    float* lse_log2 = static_cast<float*>(p.workspace);
    float* weights = lse_log2 + num_streams * layout.padded_rows;
    float* totals = weights + num_streams * layout.padded_rows;
    const bool by_rows = p.score == MassScore::kRows;
    const auto share_tokens = MAGE_CPU_PICK(token_mass_item);
    const int64_t scratch_floats = attention_scratch_floats(rows, p.head_dim);
    const double flops_per_token = 2.0 * static_cast<double>(num_streams * rows * p.head_dim);

    // Lengths that count, per request, and the runs that are walked, per stream.
    std::vector<int32_t> seq_lens(p.num_requests), ends(p.num_requests);
    for (int64_t b = 0; b < p.num_requests; ++b) {
        seq_lens[b] = clamped_seq_len(p.seq_lens, b, p.max_seq_len, p.pages);
        ends[b] = p.norm == MassNorm::kPrefix ? std::clamp(p.prefix_lens[b], 0, seq_lens[b]) : seq_lens[b];
    }

    // 1. Row weights and lse in log2 units.
    std::vector<int64_t> kept(num_streams, 0);
    for (int64_t stream = 0; stream < num_streams; ++stream) {
        const int64_t request = stream / p.num_kv_heads;
        const int64_t first_head = stream % p.num_kv_heads * group;
        float* weight = weights + stream * layout.padded_rows;
        float* lse = lse_log2 + stream * layout.padded_rows;
        std::fill(weight, weight + layout.padded_rows, 0.0f);
        std::fill(lse, lse + layout.padded_rows, 0.0f);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t query = r / group;
            if (p.row_mask != nullptr && !p.row_mask[request * p.num_queries + query]) continue;
            ++kept[stream];
            const float value = p.lse[(request * p.num_heads + first_head + r % group) * p.num_queries + query];
            if (value == -INFINITY) continue;  // a row that saw no token: it counts, and gives nothing
            weight[r] = 1.0f;
            lse[r] = static_cast<float>(value * kLog2E);
        }
    }

    const auto make_item = [&](int64_t stream, float* scratch) {
        const int64_t request = stream / p.num_kv_heads;
        const int64_t kv_head = stream % p.num_kv_heads;
        TokenMassItem item;
        item.shape = {p.dtype, static_cast<int32_t>(p.head_dim)};
        item.rows.q = static_cast<const char*>(p.q) +
                      (request * p.stride_q_request + kv_head * group * p.stride_q_head) * dtype_bytes(p.dtype);
        item.rows.stride_q_query = p.stride_q_query;
        item.rows.stride_q_head = p.stride_q_head;
        item.rows.group = static_cast<int32_t>(group);
        item.rows.row_end = static_cast<int32_t>(rows);
        item.rows.kv_lens = p.kv_lens == nullptr ? nullptr : p.kv_lens + request * p.num_queries;
        item.rows.seq_len = seq_lens[request];
        item.rows.scale_log2 = static_cast<float>(p.softmax_scale * kLog2E);
        item.stream = token_stream(p.dtype, p.k_cache, PagedPool(), p.pages, request, kv_head);
        item.end = ends[request];
        item.lse_log2 = lse_log2 + stream * layout.padded_rows;
        item.weight = weights + stream * layout.padded_rows;
        item.scratch = scratch;
        return item;
    };

    // 2. Norm prefix: every row's share of [0, P), by pieces that are added up in order; then lse becomes that of the
    // prefix.
    if (p.norm == MassNorm::kPrefix) {
        for_each_item(num_streams * layout.pieces, scratch_floats, flops_per_token * static_cast<double>(p.max_seq_len),
                      [&](int64_t i, float* scratch) {
                          const int64_t stream = i / layout.pieces;
                          const int64_t begin = i % layout.pieces * kTokensPerItem;
                          const int64_t end = std::min<int64_t>(ends[stream / p.num_kv_heads], begin + kTokensPerItem);
                          if (begin >= end) return;
                          const TokenRun run = {0, 0, static_cast<int32_t>(end)};
                          TokenMassItem item = make_item(stream, scratch);
                          item.stream.runs = &run;
                          item.stream.num_runs = 1;
                          item.stream_begin = begin;
                          item.stream_end = end;
                          item.mode = TokenMassItem::Mode::kRowTotal;
                          item.row_total = totals + i * layout.padded_rows;
                          std::fill(item.row_total, item.row_total + layout.padded_rows, 0.0f);
                          share_tokens(item);
                      });
        for (int64_t stream = 0; stream < num_streams; ++stream) {
            const int64_t used = divide_up(ends[stream / p.num_kv_heads], kTokensPerItem);
            float* weight = weights + stream * layout.padded_rows;
            for (int64_t r = 0; r < rows; ++r) {
                float total = 0.0f;
                for (int64_t i = 0; i < used; ++i)
                    total += totals[(stream * layout.pieces + i) * layout.padded_rows + r];
                if (total == 0.0f) weight[r] = 0.0f;
                if (weight[r] != 0.0f) lse_log2[stream * layout.padded_rows + r] += std::log2(total);
            }
        }
    }

    // 3. The shares themselves.
    const int64_t length = !p.has_units ? p.max_seq_len : p.num_candidates * p.granularity;
    const int64_t width = by_rows ? rows : 1;
    const int64_t pieces = divide_up(length, kTokensPerItem);
    std::vector<std::vector<TokenRun>> runs(num_streams);
    for (int64_t stream = 0; stream < num_streams; ++stream) {
        const int64_t request = stream / p.num_kv_heads;
        if (p.has_units) {
            runs[stream] =
                candidate_runs(p.units + stream * p.num_candidates, p.num_candidates, p.granularity, ends[request]);
        } else if (ends[request] > 0) {
            runs[stream] = {{0, 0, ends[request]}};
        }
    }
    for_each_item(num_streams * pieces, scratch_floats, flops_per_token * static_cast<double>(length),
                  [&](int64_t i, float* scratch) {
                      const int64_t stream = i / pieces;
                      const int64_t begin = i % pieces * kTokensPerItem;
                      const int64_t end = std::min(length, begin + kTokensPerItem);
                      const int64_t walked =
                          runs[stream].empty() ? 0 : runs[stream].back().offset + runs[stream].back().count;
                      const int64_t used = std::clamp(kept[stream] == 0 ? int64_t{0} : walked, begin, end);
                      float* mass = p.mass + stream * length * width;
                      if (begin < used) {
                          TokenMassItem item = make_item(stream, scratch);
                          item.stream.runs = runs[stream].data();
                          item.stream.num_runs = static_cast<int32_t>(runs[stream].size());
                          item.stream_begin = begin;
                          item.stream_end = used;
                          item.mode = by_rows                      ? TokenMassItem::Mode::kRows
                                      : p.score == MassScore::kMax ? TokenMassItem::Mode::kMaximum
                                                                   : TokenMassItem::Mode::kSum;
                          item.factor = p.score == MassScore::kMean ? 1.0f / static_cast<float>(kept[stream]) : 1.0f;
                          item.mass = mass;
                          share_tokens(item);
                      }
                      std::fill(mass + used * width, mass + end * width, by_rows ? -INFINITY : 0.0f);
                  });
}

TokenMassParams token_mass_params(const BlockAttentionParams& p) {
    TokenMassParams tokens;
    tokens.num_requests = p.num_requests;
    tokens.num_queries = p.num_queries;
    tokens.num_heads = p.num_heads;
    tokens.num_kv_heads = p.num_kv_heads;
    tokens.head_dim = p.head_dim;
    tokens.max_seq_len = p.max_seq_len;
    tokens.dtype = p.dtype;
    tokens.q = p.q;
    tokens.stride_q_request = p.stride_q_request;
    tokens.stride_q_query = p.stride_q_query;
    tokens.stride_q_head = p.stride_q_head;
    tokens.k_cache = p.k_cache;
    tokens.pages = p.pages;
    tokens.seq_lens = p.seq_lens;
    tokens.kv_lens = p.kv_lens;
    tokens.lse = p.lse;
    tokens.softmax_scale = p.softmax_scale;
    tokens.workspace = p.workspace;
    tokens.workspace_bytes = p.workspace_bytes;
    return tokens;
}

}  // namespace cpu
}  // namespace mage
