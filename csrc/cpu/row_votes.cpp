#include "mage/row_votes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "core/parallel.h"
#include "core/row_votes_tiles.h"
#include "cpu/kernels/row_votes.h"
#include "cpu/radix_select.h"

namespace mage {

int64_t row_votes_workspace(int64_t num_requests, int64_t num_kv_heads, int64_t num_units, int64_t num_rows) {
    core::check_range("row_votes", "batch", num_requests, 0, 1 << 20);
    core::check_range("row_votes", "num_kv_heads", num_kv_heads, 1, 1 << 20);
    core::check_range("row_votes", "num_units", num_units, 1, 1 << 30);
    core::check_range("row_votes", "num_rows", num_rows, 1, kMaxVoteRows);
    return 8 * num_requests * num_kv_heads * (1 + num_rows * (1 + core::max_vote_tiles(num_units)));
}

void check_row_votes(const RowVotesParams& params) {
    const int64_t g = params.granularity;
    MAGE_CHECK(params.num_requests >= 0 && params.num_kv_heads >= 1 && params.num_units >= 1,
               "row_votes: row_mass must have at least one head and unit, got [", params.num_requests, ", ",
               params.num_kv_heads, ", ", params.num_units, ", ", params.num_rows, "]");
    MAGE_CHECK(params.num_rows >= 1 && params.num_rows <= kMaxVoteRows, "row_votes: row_mass must have 1 to ",
               kMaxVoteRows, " rows, got ", params.num_rows);
    MAGE_CHECK(g == 1 || g == 16 || g == 32 || g == 64, "row_votes: g must be 1, 16, 32 or 64, got ", g);
    MAGE_CHECK(params.num_units <= (int64_t{1} << 30) / g, "row_votes: row_mass must have at most ",
               (int64_t{1} << 30) / g, " units of ", g, " tokens, got ", params.num_units);
    MAGE_CHECK(params.k >= 0 && params.k % g == 0, "row_votes: k must be a multiple of g = ", g, " >= 0, got ",
               params.k);
    MAGE_CHECK(!params.row_mask || (params.num_positions >= 1 && params.num_rows % params.num_positions == 0),
               "row_votes: row_mask must have Q positions that divide the rows (", params.num_rows, "), got ",
               params.num_positions);
}

namespace cpu {
namespace {

// Rows handled together: one cache line of row_mass per unit.
constexpr int64_t kGroup = 16;

// Units of a group that are worth a thread of their own.
constexpr int64_t kUnitsPerTask = 1024;

// Key of a log-share: ascending with its value; 0 for a share that can't be chosen (-inf, NaN).
inline uint32_t share_key(float log_share) {
    uint32_t bits;
    std::memcpy(&bits, &log_share, sizeof bits);
    const bool is_negative = bits > 0x80000000u;  // -0 is not
    return log_share > -INFINITY ? (is_negative ? ~bits : bits | 0x80000000u) : 0u;
}

class Votes {
public:
    explicit Votes(const RowVotesParams& params)
        : params_(params),
          groups_((params.num_rows + kGroup - 1) / kGroup),
          total_(params.num_requests * params.num_kv_heads * params.num_rows, 0.0),
          inside_(total_.size(), 0.0) {}

    void run() {
        const int64_t heads = params_.num_requests * params_.num_kv_heads;
        const int64_t grain = std::max<int64_t>(1, kUnitsPerTask / params_.num_units);
        std::fill_n(params_.votes, heads * params_.num_units, 0);
        core::parallel_for(heads * groups_, grain, [&](int64_t begin, int64_t end) {
            std::vector<uint32_t> keys(kGroup * key_stride());
            for (int64_t i = begin; i < end; ++i) vote(i / groups_, i % groups_ * kGroup, keys.data());
        });
        core::parallel_for(heads * groups_, grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) add_shares(i / groups_, i % groups_ * kGroup);
        });
        for (int64_t head = 0; head < heads; ++head) finish(head);
    }

private:
    bool is_kept(int64_t head, int64_t row) const {
        if (!params_.row_mask) return true;
        const int64_t group_size = params_.num_rows / params_.num_positions;  // G
        return params_.row_mask[head / params_.num_kv_heads * params_.num_positions + row / group_size];
    }

    // Keys of one row; a cache line more than the units, or the rows of a group would share cache sets.
    int64_t key_stride() const { return params_.num_units + 16; }

    int64_t eligible(int64_t head) const {
        const int64_t g = params_.granularity;
        return std::clamp<int64_t>(params_.prefix_lens[head / params_.num_kv_heads], 0, params_.num_units * g) / g;
    }

    int64_t rows_of(int64_t first) const { return std::min(kGroup, params_.num_rows - first); }

    const float* row_mass(int64_t head, int64_t first) const {
        return params_.row_mass + head * params_.num_units * params_.num_rows + first;
    }

    // Votes of the rows [first, first + 16) of one head.
    void vote(int64_t head, int64_t first, uint32_t* keys) const {
        const int64_t num_units = eligible(head), num_rows = rows_of(first);
        const float* shares = row_mass(head, first);
        int64_t possible[kGroup] = {};
        for (int64_t unit = 0; unit < num_units; ++unit) {
            for (int64_t row = 0; row < num_rows; ++row) {
                const uint32_t key = share_key(shares[unit * params_.num_rows + row]);
                keys[row * key_stride() + unit] = key;
                possible[row] += key > 0;
            }
        }
        int32_t* votes = params_.votes + head * params_.num_units;
        for (int64_t row = 0; row < num_rows; ++row) {
            if (!is_kept(head, first + row)) continue;
            const uint32_t* row_keys = keys + row * key_stride();
            const int64_t budget = params_.k / params_.granularity;
            const bool takes_all = budget >= possible[row];
            const Threshold threshold = takes_all ? Threshold{} : find_threshold(row_keys, num_units, budget);
            int64_t ties = threshold.ties;
            for (int64_t unit = 0; unit < num_units; ++unit) {
                const uint32_t key = row_keys[unit];
                if (key < threshold.key || (key == threshold.key && ties-- <= 0)) continue;
                __atomic_fetch_add(&votes[unit], 1, __ATOMIC_RELAXED);  // rows of other threads vote for the same unit
            }
        }
    }

    void add_shares(int64_t head, int64_t first) {
        const auto add = MAGE_CPU_PICK(add_row_shares);
        const int64_t at = head * params_.num_rows + first;
        add(row_mass(head, first), params_.num_rows, params_.num_units, rows_of(first),
            params_.votes + head * params_.num_units, total_.data() + at, inside_.data() + at);
    }

    void finish(int64_t head) const {
        const int32_t* votes = params_.votes + head * params_.num_units;
        params_.union_size[head] = static_cast<int32_t>(
            std::count_if(votes, votes + params_.num_units, [](int32_t count) { return count > 0; }));
        double sum = 0.0;
        int64_t kept = 0;
        for (int64_t row = 0; row < params_.num_rows; ++row) {
            if (!is_kept(head, row)) continue;
            const int64_t at = head * params_.num_rows + row;
            ++kept;
            sum += total_[at] > 0.0 ? inside_[at] / total_[at] : 0.0;
        }
        params_.coverage[head] = kept ? static_cast<float>(sum / static_cast<double>(kept)) : 0.0f;
    }

    const RowVotesParams& params_;
    int64_t groups_;
    std::vector<double> total_;   // [B, Hkv, R], whole mass of each row
    std::vector<double> inside_;  // [B, Hkv, R], its part inside the union
};

}  // namespace

void row_votes(const RowVotesParams& params) {
    check_row_votes(params);
    if (params.num_requests == 0) return;
    MAGE_CHECK(params.row_mass && params.prefix_lens && params.votes && params.union_size && params.coverage,
               "row_votes: row_mass, prefix_lens and the outputs must be given, got a null pointer");
    Votes(params).run();
}

}  // namespace cpu
}  // namespace mage
