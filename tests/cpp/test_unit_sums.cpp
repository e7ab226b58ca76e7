#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "core/unit_sums.h"

namespace mage::core {
namespace {

constexpr int32_t kTileTokens = 128;

// A tile of a row: log2 of its terms' largest one and of its units' sums, -inf of a unit that the row does not see.
struct Tile {
    std::vector<double> units;
    double highest;  // of a term: at most the largest unit sum, and at least that less log2 of a unit's tokens
};

double log2_sum(const std::vector<double>& logs) {
    double highest = -INFINITY;
    for (const double x : logs) highest = std::max(highest, x);
    if (highest == -INFINITY) return highest;
    double sum = 0.0;
    for (const double x : logs) sum += std::exp2(x - highest);
    return highest + std::log2(sum);
}

// What exp2 is where results below 2^-126 are zeros.
float exp2_flushed(double x) { return x < -126.0 ? 0.0f : static_cast<float>(std::exp2(x)); }

// Packs the tiles of a piece as the attention kernel does and reads them as the launch after it; `outside` is log2 of
// what the row adds up to in other pieces. Every share must be right within 2^-10 and a part of the whole.
void expect_shares(const std::vector<Tile>& tiles, double outside) {
    constexpr double kSlack = 8.0;
    double reference = -INFINITY;
    UnitLevels levels = no_levels();
    std::vector<uint32_t> words;
    std::vector<double> exact, all = {outside};
    std::vector<int32_t> begins;
    for (size_t t = 0; t < tiles.size(); ++t) {
        const Tile& tile = tiles[t];
        const auto token = static_cast<int32_t>(t) * kTileTokens;
        if (tile.highest > reference + kSlack) {
            reference = tile.highest;
            const auto level = static_cast<float>(log2_sum(tile.units)) + PackedSum::kOne;
            if (is_next_level(level, levels.level)) levels = with_level(levels, level, token);
        }
        const auto size = static_cast<int32_t>(tile.units.size());
        for (int32_t u = 0; u < size; ++u) {
            exact.push_back(tile.units[u]);
            all.push_back(tile.units[u]);
            begins.push_back(token + u * (kTileTokens / size));
            const float sum = exp2_flushed(tile.units[u] - reference);
            const float packed = levels.level == -INFINITY ? 0.0f : sum * exp2_flushed(reference - levels.level);
            ASSERT_LT(packed, 2.0f);
            words.push_back(PackedSum::pack(packed));
            ASSERT_LE(words.back(), 0xffffu);
        }
    }
    const double total = log2_sum(all);
    if (total == -INFINITY) return;
    double shares = 0.0;
    for (size_t i = 0; i < words.size(); ++i) {
        const float level = level_at(levels, begins[i]);
        const float factor = level == -INFINITY ? 0.0f : exp2_flushed(level - total);
        // Both halves of a word.
        const float share = PackedSum::low(words[i]) * factor;
        ASSERT_EQ(PackedSum::high(words[i] << 16) * factor, share);
        const double wanted = std::exp2(exact[i] - total);
        ASSERT_NEAR(share, wanted, wanted * (0x1p-10 + 0x1p-16) + 0x1p-33) << "unit " << i;
        shares += share;
    }
    const double inside = 1.0 - std::exp2(outside - total);
    ASSERT_NEAR(shares, inside, inside * 0x1p-9 + 0x1p-20);
}

Tile tile_of(std::vector<double> units, double terms) {
    double highest = -INFINITY;
    for (const double x : units) highest = std::max(highest, x);
    return {std::move(units), highest - terms};
}

TEST(UnitSums, KeepWhatGrowsInSteps) {
    // Far below the next level, just below it, above it: of each the unit before has a share that counts.
    expect_shares({tile_of({0, 0}, 0), tile_of({47.9, 1}, 0), tile_of({3, 56}, 0)}, -INFINITY);
    expect_shares({tile_of({0, 0}, 0), tile_of({54.9, 0}, 7), tile_of({62.8, 62.8}, 7), tile_of({63, 63}, 0)},
                  -INFINITY);
    expect_shares({tile_of({0, 0}, 0), tile_of({48.1, 0}, 0), tile_of({96, 90}, 0), tile_of({97, 96}, 0)}, -INFINITY);
    expect_shares({tile_of({0, 0}, 0), tile_of({49, 0}, 0), tile_of({98, 0}, 0), tile_of({147, 0}, 0)}, 140);
    // Nothing is seen at first, and at last.
    expect_shares({tile_of({-INFINITY, -INFINITY}, 0), tile_of({-INFINITY, -300}, 0), tile_of({-301, -INFINITY}, 0)},
                  -301);
    expect_shares({tile_of({5, 5}, 0), tile_of({-INFINITY, -INFINITY}, 0)}, 100);
}

TEST(UnitSums, AreRightForRandomRows) {
    std::mt19937 random(7);
    const auto uniform = [&](double low, double high) {
        return low + (high - low) * static_cast<double>(random()) / 4294967296.0;
    };
    for (int row = 0; row < 20000; ++row) {
        const int per_tile = 1 << random() % 4;
        const double step = std::exp2(uniform(0.0, 7.0)), spread = std::exp2(uniform(0.0, 6.0));
        double height = uniform(-200.0, 200.0);
        std::vector<Tile> tiles;
        for (int t = 0; t < 12; ++t) {
            height += uniform(-0.3, 1.0) * step;
            std::vector<double> units;
            for (int u = 0; u < per_tile; ++u)
                units.push_back(random() % 16 == 0 ? -INFINITY : height - uniform(0.0, 1.0) * spread);
            tiles.push_back(tile_of(units, uniform(0.0, 4.0)));
        }
        expect_shares(tiles, random() % 2 == 0 ? -INFINITY : height + uniform(-100.0, 100.0));
        if (HasFatalFailure()) FAIL() << "row " << row;
    }
}

}  // namespace
}  // namespace mage::core
