// The attention core (see attention_kernel.h): row panels of at most kRowVectors vectors against tiles of 64 tokens.
//
// Per item: Q packed once as [panel][D][lanes]; per tile K and V to float32; per panel and tile
// S[token][lane] = sum_d K[token][d] Q[d][lane];  online softmax down the tokens, P = 2^(scale * S - max);
// O[d][lane] = O[d][lane] * correction + sum_token V[token][d] P[token][lane].
// A panel's S, Q and O stay in L1 (12, 12 and 12 KiB for D = 64 with AVX-512), K and V in L2.
#include <cstdint>

#include "cpu/attention_kernel.h"
#include "cpu/simd/simd.h"

namespace mage::cpu::MAGE_ISA_NAMESPACE {
namespace {

constexpr int kPanelLanes = kRowVectors * kWidth;
constexpr float kLn2 = 0.693147180559945f;
constexpr int kMaxHeadDim = 512;

MAGE_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
MAGE_INLINE int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }

// ---------------------------------------------------------------------------------------------------------------------
// Tokens
// ---------------------------------------------------------------------------------------------------------------------

struct TokenTile {
    int count = 0;
    bool has_gap = false;           // some token weighs 0
    int32_t first = 0, last = -1;   // smallest and largest position of a token with weight
    int32_t position[kTileTokens];  // logical position; -1: weighs 0, never read
    int32_t page[kTileTokens];
    int32_t slot[kTileTokens];
};

// Finds the pages of stream tokens [begin, begin + count); positions at or past `end` weigh 0.
void locate_tile(const TokenStream& stream, int64_t begin, int count, int32_t end, TokenTile* tile) {
    int low = 0, high = stream.num_runs - 1;  // last run whose offset is not past begin
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (stream.runs[middle].offset <= begin) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    const int32_t slot_mask = (1 << stream.page_shift) - 1;
    tile->count = count;
    tile->has_gap = false;
    tile->first = INT32_MAX;
    tile->last = -1;
    const TokenRun* run = stream.runs + low;
    for (int i = 0; i < count; ++i) {
        while (begin + i >= run->offset + run->count) ++run;
        int32_t position = run->begin < 0 ? -1 : run->begin + static_cast<int32_t>(begin + i - run->offset);
        if (position >= end) position = -1;
        if (position >= 0) {
            const int32_t page = stream.pages[position >> stream.page_shift];
            if (page < 0 || page >= stream.num_pages) position = -1;
            tile->page[i] = page;
            tile->slot[i] = position & slot_mask;
        }
        tile->position[i] = position;
        if (position < 0) {
            tile->has_gap = true;
            continue;
        }
        if (position < tile->first) tile->first = position;
        if (position > tile->last) tile->last = position;
    }
}

template <typename T>
void load_tokens(const TokenTile& tile, const T* pool, int64_t stride_page, int64_t stride_token, int head_dim,
                 int padded, float* to) {
    for (int i = 0; i < tile.count; ++i, to += head_dim) {
        if (tile.position[i] < 0) {
            for (int d = 0; d < head_dim; ++d) to[d] = 0.0f;
        } else {
            convert_row(pool + tile.page[i] * stride_page + tile.slot[i] * stride_token, to, head_dim);
        }
    }
    for (int64_t i = 0; i < int64_t{padded - tile.count} * head_dim; ++i) to[i] = 0.0f;
}

void load_tokens(DType dtype, const TokenTile& tile, const void* pool, int64_t stride_page, int64_t stride_token,
                 int head_dim, int padded, float* to) {
    switch (dtype) {
        case DType::kFloat32:
            load_tokens(tile, static_cast<const float*>(pool), stride_page, stride_token, head_dim, padded, to);
            break;
        case DType::kFloat16:
            load_tokens(tile, static_cast<const Float16*>(pool), stride_page, stride_token, head_dim, padded, to);
            break;
        case DType::kBFloat16:
            load_tokens(tile, static_cast<const BFloat16*>(pool), stride_page, stride_token, head_dim, padded, to);
            break;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows
// ---------------------------------------------------------------------------------------------------------------------

// The rows of an item in panels of kPanelLanes lanes; the last one may be narrower. Panel p starts at lane p *
// kPanelLanes.
struct Panel {
    int lane = 0;                      // first lane of the panel within the item
    int vectors = 0;                   // 1 .. kRowVectors
    int32_t min_len = 0, max_len = 0;  // over its rows
};

MAGE_INLINE int num_panels(int rows) { return (rows + kPanelLanes - 1) / kPanelLanes; }

MAGE_INLINE int panel_vectors(int rows, int panel) {
    return static_cast<int>(min_of(kRowVectors, (rows - panel * kPanelLanes + kWidth - 1) / kWidth));
}

// Lengths of lanes [0, padded) to `lens`; lanes past the rows see every token.
void row_lengths(const RowTile& rows, int padded, int32_t* lens) {
    for (int i = 0; i < padded; ++i) {
        const int32_t row = rows.row_begin + i;
        int32_t len = rows.seq_len;
        if (row < rows.row_end && rows.kv_lens != nullptr) {
            len = static_cast<int32_t>(max_of(0, min_of(len, rows.kv_lens[row / rows.group])));
        }
        lens[i] = len;
    }
}

MAGE_INLINE Panel make_panel(int rows, int index, const int32_t* lens) {
    Panel panel;
    panel.lane = index * kPanelLanes;
    panel.vectors = panel_vectors(rows, index);
    panel.min_len = INT32_MAX;
    for (int i = panel.lane; i < rows && i < panel.lane + panel.vectors * kWidth; ++i) {
        if (lens[i] < panel.min_len) panel.min_len = lens[i];
        if (lens[i] > panel.max_len) panel.max_len = lens[i];
    }
    return panel;
}

// Softmax weights are 2^(factor * s - reference) with factor > 0. One fma from the exact product to the exponent keeps
// the error of the scale out of large scores; the sign of the scale goes into Q, and for a scale of 0 Q is 0.
MAGE_INLINE float score_factor(const RowTile& rows) {
    return rows.scale_log2 == 0.0f ? 1.0f : __builtin_fabsf(rows.scale_log2);
}

// Q of the tile's rows as [panel][D][lanes], times the sign of the scale; lanes past the rows are 0.
template <typename T>
void pack_rows(const RowTile& tile, const T* q, int head_dim, float* packed) {
    const int rows = tile.row_end - tile.row_begin;
    const float sign = tile.scale_log2 == 0.0f ? 0.0f : tile.scale_log2 < 0.0f ? -1.0f : 1.0f;
    float buffer[4 * kMaxHeadDim];
    for (int p = 0; p < num_panels(rows); ++p) {
        const int lanes = panel_vectors(rows, p) * kWidth;
        float* to = packed + static_cast<int64_t>(p) * kPanelLanes * head_dim;
        for (int lane = 0; lane < lanes; lane += 4) {
            for (int i = 0; i < 4; ++i) {
                float* row_values = buffer + i * head_dim;
                const int32_t row = tile.row_begin + p * kPanelLanes + lane + i;
                if (row >= tile.row_end || sign == 0.0f) {
                    for (int d = 0; d < head_dim; ++d) row_values[d] = 0.0f;
                    continue;
                }
                convert_row(q + row / tile.group * tile.stride_q_query + row % tile.group * tile.stride_q_head,
                            row_values, head_dim);
                if (sign < 0.0f) {
                    for (int d = 0; d < head_dim; ++d) row_values[d] = -row_values[d];
                }
            }
            for (int d = 0; d < head_dim; d += 4) transpose_4x4(buffer + d, head_dim, to + d * lanes + lane, lanes);
        }
    }
}

void pack_rows(DType dtype, const RowTile& tile, int head_dim, float* packed) {
    switch (dtype) {
        case DType::kFloat32:
            pack_rows(tile, static_cast<const float*>(tile.q), head_dim, packed);
            break;
        case DType::kFloat16:
            pack_rows(tile, static_cast<const Float16*>(tile.q), head_dim, packed);
            break;
        case DType::kBFloat16:
            pack_rows(tile, static_cast<const BFloat16*>(tile.q), head_dim, packed);
            break;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrix micro-kernels. kVectors: Floats of rows; kDim: head dim where the compiler shall know it, else 0.
// ---------------------------------------------------------------------------------------------------------------------

// A single vector of rows leaves registers for two sums per result, of even and odd terms: half the latency of a chain
// of fma.
template <int kVectors>
constexpr int kChains = kVectors == 1 ? 2 : 1;

// acc[i][j] += sum over kChains terms; a(i, term) is broadcast, b(term, j) a vector of rows.
template <int kVectors>
struct Accumulators {
    Float sum[kChains<kVectors>][kSteps][kVectors];

    MAGE_INLINE void add(int chain, const float* a, int64_t stride_a, const float* b) {
        Float rows[kVectors];
        for (int j = 0; j < kVectors; ++j) rows[j] = load(b + j * kWidth);
        for (int i = 0; i < kSteps; ++i) {
            const Float factor = set1(a[i * stride_a]);
            for (int j = 0; j < kVectors; ++j) sum[chain][i][j] = fma(factor, rows[j], sum[chain][i][j]);
        }
    }

    MAGE_INLINE Float total(int i, int j) const {
        Float result = sum[0][i][j];
        for (int chain = 1; chain < kChains<kVectors>; ++chain) result = result + sum[chain][i][j];
        return result;
    }
};

// Rounding grows with the length of a sum: scores of more than kLongSum terms are summed kShortSum at a time.
constexpr int kLongSum = 128, kShortSum = 32;

// s[token][lanes] = sum_d k[token][d] q[d][lanes]; tokens is a multiple of kSteps, D of kChains.
template <int kVectors, int kDim>
void score_tokens(const float* k, const float* q, int tokens, int head_dim, float* s) {
    constexpr int kLanes = kVectors * kWidth;
    const int dims = kDim != 0 ? kDim : head_dim;
    const int span = dims <= kLongSum ? dims : kShortSum;
    for (int t = 0; t < tokens; t += kSteps, k += kSteps * dims) {
        for (int first = 0; first < dims; first += span) {
            const int end = first + span < dims ? first + span : dims;
            Accumulators<kVectors> acc;
            for (auto& chain : acc.sum) {
                for (int i = 0; i < kSteps; ++i) {
                    for (int j = 0; j < kVectors; ++j) chain[i][j] = zero();
                }
            }
            for (int d = first; d < end; d += kChains<kVectors>) {
                for (int c = 0; c < kChains<kVectors>; ++c) acc.add(c, k + d + c, dims, q + (d + c) * kLanes);
            }
            for (int i = 0; i < kSteps; ++i) {
                for (int j = 0; j < kVectors; ++j) {
                    float* to = s + (t + i) * kLanes + j * kWidth;
                    store(to, first == 0 ? acc.total(i, j) : load(to) + acc.total(i, j));
                }
            }
        }
    }
}

// o[d][lanes] = o[d][lanes] * correction[lanes] + sum_token v[token][d] p[token][lanes]; D is a multiple of kSteps.
template <int kVectors, int kDim>
void add_values(const float* v, const float* p, int tokens, int head_dim, const Float* correction, float* o) {
    constexpr int kLanes = kVectors * kWidth;
    const int dims = kDim != 0 ? kDim : head_dim;
    for (int d = 0; d < dims; d += kSteps) {
        Accumulators<kVectors> acc;
        for (int i = 0; i < kSteps; ++i) {
            for (int j = 0; j < kVectors; ++j) {
                acc.sum[0][i][j] = load(o + (d + i) * kLanes + j * kWidth) * correction[j];
                for (int c = 1; c < kChains<kVectors>; ++c) acc.sum[c][i][j] = zero();
            }
        }
        int t = 0;
        for (; t + kChains<kVectors> <= tokens; t += kChains<kVectors>) {
            for (int c = 0; c < kChains<kVectors>; ++c) acc.add(c, v + (t + c) * dims + d, 1, p + (t + c) * kLanes);
        }
        for (; t < tokens; ++t) acc.add(0, v + t * dims + d, 1, p + t * kLanes);
        for (int i = 0; i < kSteps; ++i) {
            for (int j = 0; j < kVectors; ++j) store(o + (d + i) * kLanes + j * kWidth, acc.total(i, j));
        }
    }
}

// Scores of tokens that weigh 0, or lie at or past a row's length, become -inf.
template <int kVectors>
void mask_scores(const TokenTile& tile, const Panel& panel, const int32_t* lens, float* s) {
    constexpr int kLanes = kVectors * kWidth;
    if (!tile.has_gap && tile.last < panel.min_len) return;
    const Float none = set1(-kInfinity);
    for (int i = 0; i < tile.count; ++i) {
        const int32_t position = tile.position[i];
        if (position >= 0 && position < panel.min_len) continue;
        for (int j = 0; j < kVectors; ++j) {
            float* at = s + i * kLanes + j * kWidth;
            const Mask seen = less(set1_int(position), load_int(lens + panel.lane + j * kWidth));
            store(at, position < 0 ? none : select(seen, load(at), none));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Softmax and emission
// ---------------------------------------------------------------------------------------------------------------------

// One tile of the online softmax: s becomes 2^(factor * s - max); groups[4][lanes] are the sums over 16 tokens each.
template <int kVectors>
void softmax_tile(int tokens, float factor, float* s, float* row_max, float* row_sum, Float* correction,
                  Float* reference, float* groups) {
    constexpr int kLanes = kVectors * kWidth;
    const Float scale = set1(factor);
    Float highest[kVectors], total[kVectors];
    for (int j = 0; j < kVectors; ++j) highest[j] = load(s + j * kWidth);
    for (int i = 0; i < tokens; ++i) {
        for (int j = 0; j < kVectors; ++j) highest[j] = max(highest[j], load(s + i * kLanes + j * kWidth));
    }
    for (int j = 0; j < kVectors; ++j) {
        highest[j] = max(load(row_max + j * kWidth), highest[j] * scale);
        // A row without any token so far keeps max -inf; its reference is 0, so that -inf - reference is no NaN.
        reference[j] = select(equal(highest[j], set1(-kInfinity)), zero(), highest[j]);
        correction[j] = exp2(load(row_max + j * kWidth) - reference[j]);
        store(row_max + j * kWidth, highest[j]);
        total[j] = zero();
    }
    for (int begin = 0; begin < tokens; begin += kGroupTokens, groups += kLanes) {
        const int end = static_cast<int>(min_of(tokens, begin + kGroupTokens));
        Float sum[kVectors];
        for (int j = 0; j < kVectors; ++j) sum[j] = zero();
        for (int i = begin; i < end; ++i) {
            for (int j = 0; j < kVectors; ++j) {
                float* at = s + i * kLanes + j * kWidth;
                const Float p = exp2(fms(load(at), scale, reference[j]));
                store(at, p);
                sum[j] = sum[j] + p;
            }
        }
        for (int j = 0; j < kVectors; ++j) {
            store(groups + j * kWidth, sum[j]);
            total[j] = total[j] + sum[j];
        }
    }
    for (int j = 0; j < kVectors; ++j) {
        store(row_sum + j * kWidth, fma(load(row_sum + j * kWidth), correction[j], total[j]));
    }
}

// Columns [column, column + kWidth) of a row of `width` columns.
MAGE_INLINE void store_columns(float* row, int64_t column, int64_t width, Float x) {
    if (column + kWidth <= width) {
        store(row + column, x);
    } else if (column < width) {
        store_partial(row + column, x, static_cast<int>(width - column));
    }
}

// Unit sums and references of a panel and a tile that starts at token `begin`. p and groups as softmax_tile left them;
// null p: no row of the panel sees a token of the tile.
template <int kVectors>
void emit_units(const UnitSums& units, int64_t begin, int tokens, int64_t column, const float* p, const float* groups,
                const Float* reference) {
    constexpr int kLanes = kVectors * kWidth;
    const int groups_per_unit = units.unit_tokens / kGroupTokens;
    const int counted = static_cast<int>(max_of(0, min_of(tokens, units.end - begin)));
    for (int j = 0; j < kVectors; ++j) {
        store_columns(units.reference + begin / kTileTokens * units.reference_stride, column + j * kWidth,
                      units.reference_stride, p == nullptr ? zero() : reference[j]);
    }
    for (int first = 0; first < tokens; first += units.unit_tokens) {
        float* row = units.sums + (begin + first) / units.unit_tokens * units.sums_stride;
        const int end = static_cast<int>(min_of(tokens, first + units.unit_tokens));
        for (int j = 0; j < kVectors; ++j) {
            Float sum = zero();
            if (p != nullptr && end <= counted) {
                for (int g = 0; g < groups_per_unit && first + g * kGroupTokens < end; ++g) {
                    sum = sum + load(groups + (first / kGroupTokens + g) * kLanes + j * kWidth);
                }
            } else if (p != nullptr) {
                for (int i = first; i < counted; ++i) sum = sum + load(p + i * kLanes + j * kWidth);
            }
            store_columns(row, column + j * kWidth, units.sums_stride, sum);
        }
    }
}

struct Scratch {
    float* q;
    float* k;
    float* v;
    float* s;
    int32_t* lens;
};

MAGE_INLINE Scratch split_scratch(float* scratch, int rows, int head_dim) {
    const int64_t padded = round_up(rows, kMaxLanes);
    Scratch parts;
    parts.s = scratch;
    parts.k = parts.s + kTileTokens * 4 * kMaxLanes;
    parts.v = parts.k + kTileTokens * head_dim;
    parts.q = parts.v + kTileTokens * head_dim;
    parts.lens = reinterpret_cast<int32_t*>(parts.q + padded * head_dim);
    return parts;
}

template <int kVectors, int kDim>
void attend_tile(const AttentionItem& item, const TokenTile& tile, int64_t begin, const Panel& panel,
                 const Scratch& scratch) {
    const int head_dim = kDim != 0 ? kDim : item.shape.head_dim;
    const int64_t column = item.rows.row_begin + panel.lane;
    if (tile.last < 0 || tile.first >= panel.max_len) {
        if (item.units.unit_tokens != 0) {
            emit_units<kVectors>(item.units, begin, tile.count, column, nullptr, nullptr, nullptr);
        }
        return;
    }
    Float correction[kVectors], reference[kVectors];
    float groups[kTileTokens / kGroupTokens * kVectors * kWidth];
    const float* q = scratch.q + static_cast<int64_t>(panel.lane) * head_dim;
    float* values = item.partial.values + static_cast<int64_t>(panel.lane) * head_dim;
    const int padded = (tile.count + kSteps - 1) / kSteps * kSteps;
    score_tokens<kVectors, kDim>(scratch.k, q, padded, head_dim, scratch.s);
    mask_scores<kVectors>(tile, panel, scratch.lens, scratch.s);
    softmax_tile<kVectors>(tile.count, score_factor(item.rows), scratch.s, item.partial.row_max + panel.lane,
                           item.partial.row_sum + panel.lane, correction, reference, groups);
    add_values<kVectors, kDim>(scratch.v, scratch.s, tile.count, head_dim, correction, values);
    if (item.units.unit_tokens != 0) {
        emit_units<kVectors>(item.units, begin, tile.count, column, scratch.s, groups, reference);
    }
}

template <int kDim>
void attend_item(const AttentionItem& item) {
    const int head_dim = item.shape.head_dim;
    const int rows = item.rows.row_end - item.rows.row_begin;
    const int padded = static_cast<int>(round_up(rows, kMaxLanes));
    const Scratch scratch = split_scratch(item.scratch, rows, head_dim);
    row_lengths(item.rows, padded, scratch.lens);
    pack_rows(item.shape.dtype, item.rows, head_dim, scratch.q);
    for (int64_t i = 0; i < int64_t{padded} * head_dim; ++i) item.partial.values[i] = 0.0f;
    int32_t longest = 0;
    for (int i = 0; i < padded; ++i) {
        item.partial.row_max[i] = -kInfinity;
        item.partial.row_sum[i] = 0.0f;
        if (i < rows && scratch.lens[i] > longest) longest = scratch.lens[i];
    }
    TokenTile tile;
    for (int64_t begin = item.stream_begin; begin < item.stream_end; begin += kTileTokens) {
        const int count = static_cast<int>(min_of(kTileTokens, item.stream_end - begin));
        locate_tile(item.stream, begin, count, item.rows.seq_len, &tile);
        if (tile.first < longest) {
            const int tokens = (count + kSteps - 1) / kSteps * kSteps;
            load_tokens(item.shape.dtype, tile, item.stream.k, item.stream.stride_k_page, item.stream.stride_k_token,
                        head_dim, tokens, scratch.k);
            load_tokens(item.shape.dtype, tile, item.stream.v, item.stream.stride_v_page, item.stream.stride_v_token,
                        head_dim, count, scratch.v);
        }
        for (int p = 0; p < num_panels(rows); ++p) {
            const Panel panel = make_panel(rows, p, scratch.lens);
            switch (panel.vectors) {
                case 1:
                    attend_tile<1, kDim>(item, tile, begin, panel, scratch);
                    break;
                case 2:
                    attend_tile<2, kDim>(item, tile, begin, panel, scratch);
                    break;
                default:
                    attend_tile<3, kDim>(item, tile, begin, panel, scratch);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Single tokens
// ---------------------------------------------------------------------------------------------------------------------

// Shares of a panel's rows in the tile's tokens; by_token is [64][kWidth], lanes still to be reduced.
template <int kVectors>
void share_tile(const TokenMassItem& item, const TokenTile& tile, int64_t begin, const Panel& panel,
                const Scratch& scratch, float* by_token) {
    constexpr int kLanes = kVectors * kWidth;
    const int padded = (tile.count + kSteps - 1) / kSteps * kSteps;
    const int64_t num_rows = item.rows.row_end - item.rows.row_begin;
    const float* q = scratch.q + static_cast<int64_t>(panel.lane) * item.shape.head_dim;
    const Float factor = set1(score_factor(item.rows));
    score_tokens<kVectors, 0>(scratch.k, q, padded, item.shape.head_dim, scratch.s);
    mask_scores<kVectors>(tile, panel, scratch.lens, scratch.s);
    for (int j = 0; j < kVectors; ++j) {
        const int64_t column = panel.lane + j * kWidth;
        const Float lse = load(item.lse_log2 + column);
        const Float weight = load(item.weight + column);
        const Mask dropped = equal(weight, zero());
        Float total = zero();
        for (int i = 0; i < tile.count; ++i) {
            if (tile.position[i] < 0) {  // has no share, also where lse is NaN
                if (item.mode == TokenMassItem::Mode::kRows)
                    store_columns(item.mass + (begin + i) * num_rows, column, num_rows, set1(-kInfinity));
                continue;
            }
            const Float log_share = fms(load(scratch.s + i * kLanes + j * kWidth), factor, lse);
            if (item.mode == TokenMassItem::Mode::kRows) {
                const Float shown = select(dropped, set1(-kInfinity), log_share * set1(kLn2));
                store_columns(item.mass + (begin + i) * num_rows, column, num_rows, shown);
                continue;
            }
            // Selected, not multiplied by 0: a row that doesn't count may hold NaN.
            const Float share = select(dropped, zero(), exp2(log_share) * weight);
            float* at = by_token + i * kWidth;
            if (item.mode == TokenMassItem::Mode::kSum) {
                store(at, load(at) + share);
            } else if (item.mode == TokenMassItem::Mode::kMaximum) {
                store(at, max_or_nan(load(at), share));
            } else {
                total = total + share;
            }
        }
        if (item.mode == TokenMassItem::Mode::kRowTotal)
            store(item.row_total + column, load(item.row_total + column) + total);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Merging
// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
void write_rows(const FinishItem& item, const float* values, int lanes, int first_row, T* out) {
    float buffer[4 * kMaxHeadDim];
    const int head_dim = item.shape.head_dim;
    for (int lane = 0; lane < lanes; lane += 4) {
        for (int d = 0; d < head_dim; d += 4) transpose_4x4(values + d * lanes + lane, lanes, buffer + d, head_dim);
        for (int i = 0; i < 4 && first_row + lane + i < item.row_end; ++i) {
            const int32_t row = first_row + lane + i;
            round_row(buffer + i * head_dim,
                      out + row / item.group * item.stride_out_query + row % item.group * item.stride_out_head,
                      head_dim);
        }
    }
}

template <typename T>
void merge_parts(int head_dim, const MergeRow* parts, int num_parts, float* sums, T* out) {
    for (int d = 0; d < head_dim; ++d) sums[d] = 0.0f;
    for (int part = 0; part < num_parts; ++part) {
        if (parts[part].weight == 0.0f) continue;
        const T* from = static_cast<const T*>(parts[part].out);
        const Float weight = set1(parts[part].weight);
        int d = 0;
        for (; d + kWidth <= head_dim; d += kWidth) store(sums + d, fma(load(from + d), weight, load(sums + d)));
        for (; d < head_dim; ++d) sums[d] += to_float(from[d]) * parts[part].weight;
    }
    round_row(sums, out, head_dim);
}

}  // namespace

void attention_item(const AttentionItem& item) {
    switch (item.shape.head_dim) {
        case 64:
            return attend_item<64>(item);
        case 128:
            return attend_item<128>(item);
        default:
            return attend_item<0>(item);
    }
}

void finish_item(const FinishItem& item) {
    const int head_dim = item.shape.head_dim;
    const int rows = item.row_end - item.row_begin;
    float* factor = item.scratch;
    float* values = factor + 4 * kMaxLanes;
    for (int p = 0; p < num_panels(rows); ++p) {
        const int lanes = panel_vectors(rows, p) * kWidth;
        const int64_t lane = static_cast<int64_t>(p) * kPanelLanes;
        for (int j = 0; j < lanes; j += kWidth) {
            Float highest = set1(-kInfinity);
            for (int s = 0; s < item.num_splits; ++s)
                highest = max(highest, load(item.row_max + s * item.row_stride + lane + j));
            const Mask empty = equal(highest, set1(-kInfinity));
            const Float reference = select(empty, zero(), highest);
            Float sum = zero();
            for (int s = 0; s < item.num_splits; ++s) {
                const int64_t at = s * item.row_stride + lane + j;
                sum = fma(load(item.row_sum + at), exp2(load(item.row_max + at) - reference), sum);
            }
            // A row that saw no token: sum 0, so out must not become 0 / 0.
            const Float inverse = select(empty, zero(), set1(1.0f) / sum);
            store(factor + j, inverse);
            for (int d = 0; d < head_dim; ++d) store(values + d * lanes + j, zero());
            for (int s = 0; s < item.num_splits; ++s) {
                const Float scale = exp2(load(item.row_max + s * item.row_stride + lane + j) - reference) * inverse;
                const float* from = item.values + s * item.values_stride + lane * head_dim + j;
                for (int d = 0; d < head_dim; ++d) {
                    float* to = values + d * lanes + j;
                    store(to, fma(load(from + static_cast<int64_t>(d) * lanes), scale, load(to)));
                }
            }
            float lse[kWidth], lse_log2[kWidth];
            const Float log_sum = log(sum);
            store(lse, select(empty, set1(-kInfinity), fma(reference, set1(kLn2), log_sum)));
            store(lse_log2, select(empty, set1(kInfinity), fma(log_sum, set1(1.0f / kLn2), reference)));
            for (int i = 0; i < kWidth; ++i) {
                const int32_t row = item.row_begin + static_cast<int32_t>(lane) + j + i;
                if (row >= item.row_end) break;
                item.lse[row / item.group * item.stride_lse_query + row % item.group * item.stride_lse_head] = lse[i];
                if (item.lse_log2 != nullptr) item.lse_log2[row] = lse_log2[i];
            }
        }
        const int first_row = item.row_begin + static_cast<int>(lane);
        switch (item.shape.dtype) {
            case DType::kFloat32:
                write_rows(item, values, lanes, first_row, static_cast<float*>(item.out));
                break;
            case DType::kFloat16:
                write_rows(item, values, lanes, first_row, static_cast<Float16*>(item.out));
                break;
            case DType::kBFloat16:
                write_rows(item, values, lanes, first_row, static_cast<BFloat16*>(item.out));
                break;
        }
    }
}

// share(unit, row) = sums * 2^(reference - lse); rows with weight 0 don't count, whatever they hold.
static Float unit_share(const UnitItem& item, int64_t unit, int64_t column) {
    const int64_t tile = unit * item.units.unit_tokens / kTileTokens;
    const Float weight = load(item.weight + column);
    const Float power =
        exp2(load(item.units.reference + tile * item.units.reference_stride + column) - load(item.lse_log2 + column));
    const Float share = load(item.units.sums + unit * item.units.sums_stride + column) * power;
    return select(equal(weight, zero()), zero(), share * weight);
}

void unit_mass(const UnitItem& item) {
    for (int64_t unit = item.unit_begin; unit < item.unit_end; ++unit) {
        Float result = zero();
        for (int64_t column = 0; column < item.num_rows; column += kWidth) {
            const Float share = unit_share(item, unit, column);
            result = item.maximum ? max_or_nan(result, share) : result + share;
        }
        item.mass[unit] = (item.maximum ? reduce_max(result) : reduce_add(result)) * item.factor;
    }
}

void unit_row_totals(const UnitItem& item) {
    for (int64_t column = 0; column < item.num_rows; column += kWidth) {
        Float total = zero();
        for (int64_t unit = item.unit_begin; unit < item.unit_end; ++unit)
            total = total + unit_share(item, unit, column);
        store(item.row_total + column, total);
    }
}

void unit_log_shares(const UnitItem& item) {
    for (int64_t unit = item.unit_begin; unit < item.unit_end; ++unit) {
        const int64_t tile = unit * item.units.unit_tokens / kTileTokens;
        float* row = item.units.sums + unit * item.units.sums_stride;
        const float* reference = item.units.reference + tile * item.units.reference_stride;
        for (int r = item.row_begin; r < item.num_rows; ++r)
            row[r] = ::logf(row[r]) + (reference[r] - item.lse_log2[r]) * kLn2;
    }
}

void token_mass_item(const TokenMassItem& item) {
    const int head_dim = item.shape.head_dim;
    const int rows = item.rows.row_end - item.rows.row_begin;
    const Scratch scratch = split_scratch(item.scratch, rows, head_dim);
    row_lengths(item.rows, static_cast<int>(round_up(rows, kMaxLanes)), scratch.lens);
    pack_rows(item.shape.dtype, item.rows, head_dim, scratch.q);
    float by_token[kTileTokens * kWidth];
    TokenTile tile;
    for (int64_t begin = item.stream_begin; begin < item.stream_end; begin += kTileTokens) {
        const int count = static_cast<int>(min_of(kTileTokens, item.stream_end - begin));
        locate_tile(item.stream, begin, count, static_cast<int32_t>(min_of(item.end, item.rows.seq_len)), &tile);
        load_tokens(item.shape.dtype, tile, item.stream.k, item.stream.stride_k_page, item.stream.stride_k_token,
                    head_dim, (count + kSteps - 1) / kSteps * kSteps, scratch.k);
        for (int i = 0; i < count * kWidth; ++i) by_token[i] = 0.0f;
        for (int p = 0; p < num_panels(rows); ++p) {
            const Panel panel = make_panel(rows, p, scratch.lens);
            switch (panel.vectors) {
                case 1:
                    share_tile<1>(item, tile, begin, panel, scratch, by_token);
                    break;
                case 2:
                    share_tile<2>(item, tile, begin, panel, scratch, by_token);
                    break;
                default:
                    share_tile<3>(item, tile, begin, panel, scratch, by_token);
            }
        }
        if (item.mode == TokenMassItem::Mode::kRows || item.mode == TokenMassItem::Mode::kRowTotal) continue;
        for (int i = 0; i < count; ++i) {
            const Float lanes = load(by_token + i * kWidth);
            const float result = item.mode == TokenMassItem::Mode::kSum ? reduce_add(lanes) : reduce_max(lanes);
            item.mass[begin + i] = result * item.factor;
        }
    }
}

// out[D] = sum over the parts of weight * part, in the parts' order; scratch [D].
void merge_row(DType dtype, int head_dim, const MergeRow* parts, int num_parts, float* scratch, void* out) {
    switch (dtype) {
        case DType::kFloat32:
            return merge_parts(head_dim, parts, num_parts, scratch, static_cast<float*>(out));
        case DType::kFloat16:
            return merge_parts(head_dim, parts, num_parts, scratch, static_cast<Float16*>(out));
        case DType::kBFloat16:
            return merge_parts(head_dim, parts, num_parts, scratch, static_cast<BFloat16*>(out));
    }
}

}  // namespace mage::cpu::MAGE_ISA_NAMESPACE
