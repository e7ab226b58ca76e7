#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <random>
#include <vector>

#include "attention_cases.h"
#include "mage/sparse_block_attention.h"

// Lists of units for the tests of sparse_block_attention: of every look, good and bad, and the tokens that they name.
namespace mage::test {

enum class ListKind {
    kHalf,            // each unit by the toss of a coin
    kNone,            // count 0
    kOne,             // one unit
    kAll,             // every unit that starts below the tail
    kAllButTheLast,   // without the one that may reach across tail_start
    kUneven,          // as many units as the KV head's number says: one, ..., all
    kRuns,            // neighbours in runs, with gaps between them
    kDirty,           // repeats, negative and far entries; counts out of range for some
    kFalling,         // any order, units more than once: an error of the caller with a defined result
    kLongerThanRoom,  // all units, in lists too short for them: count is larger than the capacity
};

enum class TailKind {
    kPrefix,   // the prefix S - Q, down to whole units: what select_kv gives
    kInUnit,   // in the middle of a unit
    kZero,     // everything
    kEnd,      // S: the list alone
    kPastEnd,  // INT_MAX
    kNegative,
};

struct SparseCase {
    AttentionCase attention;
    int64_t granularity = 64;
    ListKind list = ListKind::kHalf;
    TailKind tail = TailKind::kPrefix;
    int64_t capacity = -1;     // Kmax; -1: room for all units of max_seq_len and some more
    bool spread_rows = false;  // kv_lens from far below 0 over all of [0, S] to far above it
};

inline std::ostream& operator<<(std::ostream& out, const SparseCase& c) { return out << c.attention.name; }

// indices [B, Hkv, Kmax], counts [B, Hkv], tail_start [B] of a case.
struct SparseLists {
    int64_t capacity = 0;
    std::vector<int32_t> indices, counts, tail_start;
    std::vector<std::vector<int32_t>> times;  // per (request, KV head): [S], how often a token counts

    SparseLists(const SparseCase& c, int64_t max_seq_len) {
        const AttentionCase& a = c.attention;
        const int64_t g = c.granularity;
        std::mt19937 random(a.seed + 100);
        capacity = c.capacity >= 0 ? c.capacity : (max_seq_len + g - 1) / g + 8;
        if (c.list == ListKind::kLongerThanRoom) capacity = std::min<int64_t>(capacity, 3);
        for (const int32_t len : a.seq_lens) {
            tail_start.push_back(tail_of(c, len));
            const int64_t tail = std::clamp<int64_t>(tail_start.back(), 0, len);
            for (int64_t h = 0; h < a.num_kv_heads; ++h) {
                std::vector<int32_t> list = list_of(c, static_cast<int32_t>((tail + g - 1) / g), h, random);
                counts.push_back(static_cast<int32_t>(list.size()));
                if (c.list == ListKind::kDirty && h % 3 == 1) counts.back() = INT_MAX;
                if (c.list == ListKind::kDirty && h % 3 == 2 && len % 2 == 1) counts.back() = INT_MIN;
                // Past the count lies what must not be looked at: -1 as select_kv has it, or units that could be meant.
                int32_t next = list.empty() ? 0 : list.back();
                while (static_cast<int64_t>(list.size()) < capacity) {
                    next = next == INT_MAX ? 0 : next + 1;
                    list.push_back(h % 2 == 0 ? next : -1);
                }
                list.resize(capacity);
                indices.insert(indices.end(), list.begin(), list.end());
                count_tokens(list, counts.back(), g, tail, len);
            }
        }
    }

    static int32_t tail_of(const SparseCase& c, int32_t len) {
        const auto g = static_cast<int32_t>(c.granularity);
        const int32_t prefix = std::max(0, len - static_cast<int32_t>(c.attention.num_queries)) / g * g;
        switch (c.tail) {
            case TailKind::kPrefix:
                return prefix;
            case TailKind::kInUnit:
                return prefix + g / 2 + 1;
            case TailKind::kZero:
                return 0;
            case TailKind::kEnd:
                return len;
            case TailKind::kPastEnd:
                return INT_MAX;
            case TailKind::kNegative:
                return INT_MIN;
        }
        return 0;
    }

    // Entries of KV head `head`, of which those in [0, units) name a token below the tail.
    static std::vector<int32_t> list_of(const SparseCase& c, int32_t units, int64_t head, std::mt19937& random) {
        std::vector<int32_t> all(units), list;
        for (int32_t u = 0; u < units; ++u) all[u] = u;
        switch (c.list) {
            case ListKind::kNone:
                return {};
            case ListKind::kOne:
                return units > 0 ? std::vector<int32_t>{static_cast<int32_t>(random() % units)} : all;
            case ListKind::kAll:
            case ListKind::kLongerThanRoom:
                return all;
            case ListKind::kAllButTheLast:
                if (units > 0) all.pop_back();
                return all;
            case ListKind::kUneven: {
                const int64_t share = c.attention.num_kv_heads - head, of = c.attention.num_kv_heads;
                std::shuffle(all.begin(), all.end(), random);
                all.resize((units * share + of - 1) / of);
                std::sort(all.begin(), all.end());
                return all;
            }
            case ListKind::kRuns:
                for (int32_t u = 0; u < units;) {
                    const int32_t end = std::min<int32_t>(units, u + 1 + static_cast<int32_t>(random() % 9));
                    for (; u < end; ++u) list.push_back(u);
                    u += 1 + static_cast<int32_t>(random() % 9);
                }
                return list;
            case ListKind::kHalf:
            case ListKind::kDirty:
            case ListKind::kFalling:
                break;
        }
        for (const int32_t u : all) {
            if (random() % 2 == 0) list.push_back(u);
        }
        if (c.list == ListKind::kDirty) {
            std::vector<int32_t> dirty = {INT_MIN, -1};
            for (const int32_t u : list) {
                dirty.push_back(u);
                if (u % 3 == 0) dirty.push_back(u);
                if (u % 5 == 0) dirty.push_back(u);
            }
            for (const int32_t u : {units, units, units + 1, INT_MAX / 2, INT_MAX, INT_MAX, -7, INT_MIN})
                dirty.push_back(u);
            return dirty;
        }
        if (c.list == ListKind::kFalling) {
            list.insert(list.end(), list.begin(), list.begin() + static_cast<int64_t>(list.size() / 4));
            std::shuffle(list.begin(), list.end(), random);
        }
        return list;
    }

private:
    // The contract, entry by entry.
    void count_tokens(const std::vector<int32_t>& list, int32_t count, int64_t g, int64_t tail, int64_t len) {
        std::vector<int32_t> counted(len, 0);
        const int64_t listed = std::clamp<int64_t>(count, 0, capacity);
        for (int64_t i = 0; i < listed; ++i) {
            const int64_t unit = list[i];
            if (unit < 0 || (i > 0 && list[i] <= list[i - 1]) || unit * g >= tail) continue;
            for (int64_t t = unit * g; t < std::min((unit + 1) * g, tail); ++t) ++counted[t];
        }
        for (int64_t t = tail; t < len; ++t) counted[t] = 1;
        times.push_back(std::move(counted));
    }
};

// A case on the host: attention's tensors, the lists, params that point to them, and what the naive loop makes of them.
// Tokens that no list and no tail names are NaN.
struct SparseBuffers {
    SparseCase test;
    AttentionBuffers attention;
    SparseLists lists;
    SparseBlockAttentionParams params;

    explicit SparseBuffers(const SparseCase& c)
        : test(c), attention(c.attention, false), lists(c, attention.params.max_seq_len) {
        if (c.spread_rows) attention.spread_rows();
        attention.run_naive([this](int64_t b, int64_t h, int64_t t) { return times(b, h, t); });
        poison_unlisted();
        params.indices = lists.indices.data();
        params.counts = lists.counts.data();
        params.tail_start = lists.tail_start.data();
        params.capacity = lists.capacity;
        params.granularity = c.granularity;
        attention.set_workspace(workspace_bytes());
        params.attention = attention.params;
    }

    int64_t times(int64_t b, int64_t h, int64_t t) const { return lists.times[b * test.attention.num_kv_heads + h][t]; }

    int64_t workspace_bytes() const {
        const BlockAttentionParams& p = attention.params;
        return sparse_block_attention_workspace(p.num_requests, p.num_queries, p.num_heads, p.num_kv_heads, p.head_dim,
                                                p.max_seq_len, test.granularity, lists.capacity, p.split_tokens);
    }

private:
    void poison_unlisted() {
        const AttentionCase& c = test.attention;
        const PagedPool& strides = attention.params.k_cache;
        const auto nan = std::numeric_limits<float>::quiet_NaN();
        for (int64_t b = 0; b < attention.params.num_requests; ++b) {
            for (int64_t h = 0; h < c.num_kv_heads; ++h) {
                for (int64_t t = 0; t < c.seq_lens[b]; ++t) {
                    if (times(b, h, t) > 0 || attention.is_broken(b, t)) continue;
                    const int64_t page = attention.block_table[b * attention.params.pages.max_pages + t / c.page_size];
                    const int64_t at =
                        page * strides.stride_page + t % c.page_size * strides.stride_token + h * strides.stride_head;
                    for (std::vector<char>* pool : {&attention.k_pool, &attention.v_pool}) {
                        for (int64_t d = 0; d < c.head_dim; ++d)
                            store_exact(c.dtype, nan, pool->data() + (at + d) * dtype_bytes(c.dtype));
                    }
                }
            }
        }
    }
};

}  // namespace mage::test
