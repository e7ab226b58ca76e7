#include "mage/select_kv.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "core/parallel.h"
#include "cpu/radix_select.h"

namespace mage {

int64_t select_kv_workspace(int64_t num_layers, int64_t num_requests, int64_t num_kv_heads, int64_t num_units,
                            int64_t capacity) {
    constexpr int64_t kMost = (int64_t{1} << 31) - 1;
    core::check_range("select_kv", "num_layers", num_layers, 1, kMost);
    core::check_range("select_kv", "batch", num_requests, 0, kMost);
    core::check_range("select_kv", "num_kv_heads", num_kv_heads, 1, kMost);
    core::check_range("select_kv", "num_units", num_units, 1, kSelectMaxUnits);
    core::check_range("select_kv", "capacity", capacity, 1, kSelectMaxUnits);
    return 0;
}

void check_select_kv(const SelectKvParams& params) {
    const int64_t g = params.granularity;
    MAGE_CHECK(params.num_layers >= 1 && params.num_requests >= 0 && params.num_kv_heads >= 1,
               "select_kv: mass must have at least one layer and head, got [", params.num_layers, ", ",
               params.num_requests, ", ", params.num_kv_heads, ", ", params.num_units, "]");
    MAGE_CHECK(params.num_units >= 1 && params.num_units <= kSelectMaxUnits, "select_kv: mass must have 1 to ",
               kSelectMaxUnits, " units, got ", params.num_units);
    MAGE_CHECK(g == 1 || g == 16 || g == 32 || g == 64, "select_kv: g must be 1, 16, 32 or 64, got ", g);
    MAGE_CHECK(params.capacity >= 1 && params.capacity <= kSelectMaxUnits, "select_kv: capacity must be in [1, ",
               kSelectMaxUnits, "], got ", params.capacity);
    const auto check_tokens = [](const char* name, int64_t tokens, int64_t multiple) {
        MAGE_CHECK(tokens >= 0 && tokens <= kSelectMaxTokens, "select_kv: ", name, " must be in [0, ", kSelectMaxTokens,
                   "], got ", tokens);
        MAGE_CHECK(tokens % multiple == 0, "select_kv: ", name, " must be a multiple of g = ", multiple, ", got ",
                   tokens);
    };
    check_tokens("k", params.k, g);
    check_tokens("k_min", params.k_min, g);
    check_tokens("sinks", params.sinks, 1);
    check_tokens("recents", params.recents, 1);
    MAGE_CHECK(params.rule != SelectRule::kMass || (params.p > 0.0 && params.p <= 1.0),
               "select_kv: p must be in (0, 1] with rule \"mass\", got ", params.p);
}

namespace cpu {
namespace {

// Units that are worth a thread of their own.
constexpr int64_t kUnitsPerTask = 16384;

constexpr float kFixedPoint = 1099511627776.0f;  // 2^40
constexpr double kLeastCoverage = 1.0 / (1 << 24);
constexpr double kLogGrid = 1 << 20;

// Key of a mass: NaN 1, zero and negative 2, then ascending with the value. Bits, not comparisons, so that denormals
// keep their order where the processor flushes them to zero.
inline uint32_t mass_key(float mass) {
    int32_t bits;
    std::memcpy(&bits, &mass, sizeof bits);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    const uint32_t key = bits > 0 ? static_cast<uint32_t>(bits) + 2 : 2;
    return is_nan ? 1 : key;
}

inline int64_t fixed_point(float mass) {
    const float share = mass > 0.0f ? std::min(mass, 1.0f) : 0.0f;  // NaN: 0
    return static_cast<int64_t>(share * kFixedPoint);
}

int64_t fixed_point_sum(const float* mass, int64_t count) {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += fixed_point(mass[i]);
    return sum;
}

float share_of(int64_t sum) { return static_cast<float>(static_cast<double>(sum) / kFixedPoint); }

// The least number of top keys whose masses sum to at least `need`, at most num_keys. Equal keys are equal masses.
int64_t count_to_reach(const uint32_t* keys, const float* mass, int64_t num_keys, int64_t need) {
    if (need <= 0) return 0;
    uint32_t prefix = 0, prefix_mask = 0;
    int64_t count = 0;
    for (const RadixDigit& digit : kRadixDigits) {
        std::array<int32_t, kRadixBins> histogram{};
        std::array<int64_t, kRadixBins> sums{};
        for (int64_t i = 0; i < num_keys; ++i) {
            if ((keys[i] & prefix_mask) != prefix) continue;
            const uint32_t bin = (keys[i] >> digit.shift) & (digit.bins - 1);
            ++histogram[bin];
            sums[bin] += fixed_point(mass[i]);
        }
        int64_t bin = digit.bins - 1;
        while (bin >= 0 && sums[bin] < need) {
            need -= sums[bin];
            count += histogram[bin--];
        }
        if (bin < 0) return num_keys;
        prefix |= static_cast<uint32_t>(bin) << digit.shift;
        prefix_mask |= (digit.bins - 1) << digit.shift;
        if (digit.shift == 0) {
            const int64_t each = sums[bin] / histogram[bin];
            return count + (need + each - 1) / each;
        }
    }
    return count;
}

// Units a request can list, and those that come first.
struct Prefix {
    int64_t eligible = 0;  // E
    int64_t sinks = 0;     // [0, sinks) intersect the sink tokens
    int64_t recents = 0;   // [E - recents, E) intersect the recent tokens; disjoint from the sinks
    int64_t partial = 0;   // 1 if the prefix ends inside a unit
};

Prefix prefix_of(const SelectKvParams& params, int64_t request) {
    const int64_t g = params.granularity;
    const int64_t tokens = std::clamp<int64_t>(params.prefix_lens[request], 0, params.num_units * g);
    Prefix prefix;
    prefix.eligible = tokens / g;
    prefix.partial = tokens % g != 0;
    prefix.sinks = std::min<int64_t>((params.sinks + g - 1) / g, prefix.eligible);
    if (params.recents > 0) {
        const int64_t first = std::max<int64_t>(tokens - params.recents, 0) / g;
        prefix.recents = std::min(prefix.eligible - std::min(first, prefix.eligible), prefix.eligible - prefix.sinks);
    }
    return prefix;
}

// Forced units of one list, cut to its budget: sinks first, then the latest recents.
struct Forced {
    int64_t sinks = 0;
    int64_t recents = 0;
    int64_t count() const { return sinks + recents; }
};

Forced forced_within(const Prefix& prefix, int64_t budget) {
    Forced forced;
    forced.sinks = std::min(prefix.sinks, budget);
    forced.recents = std::min(prefix.recents, budget - forced.sinks);
    return forced;
}

int64_t budget_units(const SelectKvParams& params, const Prefix& prefix, int64_t units) {
    return std::clamp<int64_t>(units - prefix.partial, 0, params.num_units);
}

// One (layer, request, head).
class Row {
public:
    Row(const SelectKvParams& params, int64_t layer, int64_t request, int64_t head)
        : params_(params),
          row_((layer * params.num_requests + request) * params.num_kv_heads + head),
          mass_(params.mass + layer * params.stride_mass_layer + request * params.stride_mass_request +
                head * params.stride_mass_head) {}

    int64_t index() const { return row_; }
    const float* mass() const { return mass_; }

    void mass_keys(int64_t begin, int64_t end, uint32_t* keys) const {
        for (int64_t unit = begin; unit < end; ++unit) keys[unit - begin] = mass_key(mass_[unit]);
    }

    // Voted units above all others; those without votes by recency, which makes their keys unique.
    void vote_keys(int64_t begin, int64_t end, uint32_t* keys) const {
        const int32_t* votes = params_.votes + row_ * params_.num_units;
        for (int64_t unit = begin; unit < end; ++unit) {
            const uint32_t voted = static_cast<uint32_t>(params_.num_units) + static_cast<uint32_t>(votes[unit]);
            keys[unit - begin] = votes[unit] > 0 ? voted : static_cast<uint32_t>(unit) + 1;
        }
    }

    // Lists the forced units and the top `count - forced` of those between them, given the keys of the latter.
    void list(const Prefix& prefix, int64_t count, const uint32_t* keys, bool overflow) const {
        const Forced forced = forced_within(prefix, count);
        const int64_t begin = forced.sinks, end = prefix.eligible - forced.recents;
        const Threshold threshold = find_threshold(keys, end - begin, count - forced.count());
        int32_t* indices = params_.indices + row_ * params_.capacity;
        int64_t listed = 0, kept = 0, ties = threshold.ties;
        const auto add = [&](int64_t unit) {
            indices[listed++] = static_cast<int32_t>(unit);
            kept += fixed_point(mass_[unit]);
        };
        for (int64_t unit = 0; unit < begin; ++unit) add(unit);
        for (int64_t unit = begin; unit < end; ++unit) {
            const uint32_t key = keys[unit - begin];
            if (key < threshold.key || (key == threshold.key && ties-- <= 0)) continue;
            add(unit);
        }
        for (int64_t unit = end; unit < prefix.eligible; ++unit) add(unit);
        kept += fixed_point_sum(mass_ + prefix.eligible, params_.num_units - prefix.eligible);
        std::fill(indices + listed, indices + params_.capacity, -1);
        params_.counts[row_] = static_cast<int32_t>(listed);
        params_.kept_mass[row_] = share_of(kept);
        params_.overflow[row_] = overflow;
    }

private:
    const SelectKvParams& params_;
    int64_t row_;
    const float* mass_;
};

// rule kLayer: units of K_l per (layer, request), before the partial unit is charged.
std::vector<int64_t> layer_budgets(const SelectKvParams& params) {
    const int64_t requests = params.num_requests, heads = params.num_kv_heads;
    const int64_t k = params.k / params.granularity, k_min = params.k_min / params.granularity;
    std::vector<int64_t> scores(params.num_layers * requests), budgets(scores.size());
    for (int64_t i = 0; i < static_cast<int64_t>(scores.size()); ++i) {
        for (int64_t head = 0; head < heads; ++head) {
            const double coverage = params.coverage[i * heads + head];
            const double share =
                coverage > kLeastCoverage ? std::min(coverage, 1.0) : kLeastCoverage;  // NaN: the least
            const int64_t weight = std::llrint((1.0 - std::log(share)) * kLogGrid);
            const int64_t size = std::clamp<int64_t>(params.union_size[i * heads + head], 0, params.num_units);
            scores[i] = std::max(scores[i], size * weight);
        }
    }
    for (int64_t request = 0; request < requests; ++request) {
        int64_t sum = 0;
        for (int64_t layer = 0; layer < params.num_layers; ++layer) sum += scores[layer * requests + request];
        for (int64_t layer = 0; layer < params.num_layers; ++layer) {
            const int64_t i = layer * requests + request;
            double share = static_cast<double>(k);
            if (sum > 0) {
                const double pool = static_cast<double>(k * params.num_layers);
                share = std::floor(static_cast<double>(scores[i]) * pool / static_cast<double>(sum));
            }
            share = std::min(share, static_cast<double>(params.num_units) + 1);  // one more for the partial unit
            budgets[i] = std::max(k_min, static_cast<int64_t>(share));
        }
    }
    return budgets;
}

void select_row(const SelectKvParams& params, const Row& row, const Prefix& prefix, int64_t layer_budget,
                std::vector<uint32_t>& keys) {
    const int64_t g = params.granularity;
    int64_t wanted = 0;
    if (params.rule == SelectRule::kMass) {
        const Forced forced = forced_within(prefix, prefix.eligible);
        const int64_t begin = forced.sinks, end = prefix.eligible - forced.recents;
        row.mass_keys(begin, end, keys.data());
        const int64_t between = fixed_point_sum(row.mass() + begin, end - begin);
        const int64_t total = fixed_point_sum(row.mass(), params.num_units);
        const double share = std::ceil(params.p * static_cast<double>(total));
        // A total above 2^53 may be rounded up on its way to double.
        const int64_t target = share >= static_cast<double>(total) ? total : static_cast<int64_t>(share);
        const int64_t need = target - (total - between);
        wanted = forced.count() + count_to_reach(keys.data(), row.mass() + begin, end - begin, need);
        wanted = std::max(wanted, budget_units(params, prefix, params.k_min / g));
    } else {
        const int64_t units = params.rule == SelectRule::kLayer ? layer_budget : params.k / g;
        wanted = budget_units(params, prefix, units);
    }
    wanted = std::min(wanted, prefix.eligible);
    const int64_t count = std::min<int64_t>(wanted, params.capacity);
    const Forced forced = forced_within(prefix, count);
    const int64_t begin = forced.sinks, end = prefix.eligible - forced.recents;
    if (params.rule == SelectRule::kLayer) {
        row.vote_keys(begin, end, keys.data());
    } else {
        row.mass_keys(begin, end, keys.data());
    }
    row.list(prefix, count, keys.data(), wanted > params.capacity);
}

// rule kJoint: one (layer, request), all its heads.
void select_joint(const SelectKvParams& params, int64_t layer, int64_t request, std::vector<uint32_t>& keys) {
    const Prefix prefix = prefix_of(params, request);
    const int64_t heads = params.num_kv_heads;
    const int64_t budget = budget_units(params, prefix, params.k / params.granularity);
    const Forced forced = forced_within(prefix, budget);
    const int64_t begin = forced.sinks, width = prefix.eligible - forced.count();
    for (int64_t head = 0; head < heads; ++head) {
        Row(params, layer, request, head).mass_keys(begin, begin + width, keys.data() + head * width);
    }
    const Threshold threshold = find_threshold(keys.data(), heads * width, heads * (budget - forced.count()));
    std::vector<int64_t> counts(heads, forced.count());
    int64_t ties = threshold.ties;
    for (int64_t i = 0; i < width; ++i) {
        for (int64_t head = 0; head < heads; ++head) {
            const uint32_t key = keys[head * width + i];
            counts[head] += key > threshold.key || (key == threshold.key && ties-- > 0);
        }
    }
    // What a head gets of the joint ranking is the top of its own ranking: both break ties by the lowest unit.
    for (int64_t head = 0; head < heads; ++head) {
        const Row row(params, layer, request, head);
        const int64_t count = std::min<int64_t>(counts[head], params.capacity);
        const Forced cut = forced_within(prefix, count);
        row.mass_keys(cut.sinks, prefix.eligible - cut.recents, keys.data());
        row.list(prefix, count, keys.data(), counts[head] > params.capacity);
    }
}

}  // namespace

void select_kv(const SelectKvParams& params) {
    check_select_kv(params);
    if (params.num_requests == 0) return;
    MAGE_CHECK(params.rule != SelectRule::kLayer || (params.votes && params.union_size && params.coverage),
               "select_kv: votes, union_size and coverage must be given with rule \"layer\", got a null pointer");
    MAGE_CHECK(params.mass && params.prefix_lens && params.indices && params.counts && params.kept_mass &&
                   params.tail_start && params.overflow,
               "select_kv: mass, prefix_lens and the outputs must be given, got a null pointer");

    const int64_t layers = params.num_layers, requests = params.num_requests, heads = params.num_kv_heads;
    for (int64_t request = 0; request < requests; ++request) {
        const Prefix prefix = prefix_of(params, request);
        params.tail_start[request] = static_cast<int32_t>(prefix.eligible * params.granularity);
    }
    if (params.rule == SelectRule::kJoint) {
        const int64_t grain = std::max<int64_t>(1, kUnitsPerTask / (heads * params.num_units));
        core::parallel_for(layers * requests, grain, [&](int64_t begin, int64_t end) {
            std::vector<uint32_t> keys(heads * params.num_units);
            for (int64_t i = begin; i < end; ++i) select_joint(params, i / requests, i % requests, keys);
        });
        return;
    }
    std::vector<int64_t> budgets(layers * requests, 0);
    if (params.rule == SelectRule::kLayer) budgets = layer_budgets(params);
    const int64_t grain = std::max<int64_t>(1, kUnitsPerTask / params.num_units);
    core::parallel_for(layers * requests * heads, grain, [&](int64_t begin, int64_t end) {
        std::vector<uint32_t> keys(params.num_units);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t request = i / heads % requests;
            const Row row(params, i / heads / requests, request, i % heads);
            select_row(params, row, prefix_of(params, request), budgets[i / heads], keys);
        }
    });
}

}  // namespace cpu
}  // namespace mage
