#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "mage/row_votes.h"

// Buffers and cases of row_votes, shared by the CPU and the CUDA test.
namespace mage::test {

struct VoteBuffers {
    VoteBuffers(int64_t requests, int64_t heads, int64_t units, int64_t rows, int64_t granularity)
        : row_mass(requests * heads * units * rows, -INFINITY),
          lengths(requests, static_cast<int32_t>(units * granularity)),
          votes(requests * heads * units, -7),
          union_size(requests * heads, -7),
          coverage(requests * heads, NAN) {
        params.num_requests = requests;
        params.num_kv_heads = heads;
        params.num_units = units;
        params.num_rows = rows;
        params.granularity = granularity;
        bind();
    }

    // The params name the vectors of this object.
    void bind() {
        params.row_mass = row_mass.data();
        params.prefix_lens = lengths.data();
        params.votes = votes.data();
        params.union_size = union_size.data();
        params.coverage = coverage.data();
        params.row_mask = mask.empty() ? nullptr : reinterpret_cast<const bool*>(mask.data());
    }

    float& share(int64_t head, int64_t unit, int64_t row) {
        return row_mass[(head * params.num_units + unit) * params.num_rows + row];
    }

    RowVotesParams params;
    std::vector<float> row_mass;
    std::vector<int32_t> lengths, votes, union_size;
    std::vector<float> coverage;
    std::vector<char> mask;  // [B, Q] if not empty
};

enum class Shares {
    kRandom,
    kQuarters,  // few different values: ties
    kEqual,     // one value: nothing but ties
    kSparse,    // half of them 0
    kBroken,    // NaN, infinities, both zeros and shares above 1 among them
    kWide,      // from e^-300 to 1, the highest far from the rest
};

struct VoteCase {
    std::string name;
    int64_t requests, heads, units, rows, granularity, k;  // k in units
    Shares shares;
    std::vector<int32_t> lengths;  // empty: all units
    int64_t positions = 0;         // with a mask
};

inline std::ostream& operator<<(std::ostream& out, const VoteCase& c) { return out << c.name; }

inline std::vector<VoteCase> vote_cases() {
    using S = Shares;
    return {
        {"OneOfEach", 1, 1, 1, 1, 16, 1, S::kRandom, {}},
        {"NothingTaken", 1, 2, 40, 9, 16, 0, S::kRandom, {}},
        {"AllTaken", 1, 2, 40, 9, 16, 40, S::kRandom, {}},
        {"MoreThanThereAre", 2, 1, 33, 17, 1, 40, S::kSparse, {20, 33}},
        {"PartialTiles", 2, 3, 101, 37, 16, 7, S::kRandom, {1600, 777}},
        {"BlockOf7B", 1, 4, 2048, 224, 64, 64, S::kRandom, {131000}},
        {"BlockOf7BLargeBudget", 1, 4, 2048, 224, 64, 128, S::kWide, {}},
        {"BlockOf7BWithItself", 1, 2, 2049, 224, 64, 16, S::kRandom, {131072}},
        {"BlockOf7BAtG16", 1, 2, 2050, 224, 16, 64, S::kRandom, {32768}, 32},
        {"BlockOf1500M", 1, 2, 2049, 192, 64, 128, S::kWide, {131072}},
        {"BlockOf7BShort", 2, 2, 65, 224, 64, 16, S::kRandom, {4096, 64}},
        {"MostUnitsHeld", 1, 1, 2176, 64, 16, 200, S::kRandom, {}},
        {"MostUnitsAndRowsHeld", 1, 1, 2176, 256, 16, 3000, S::kSparse, {}},
        {"QuarterTaken", 1, 1, 2176, 40, 16, 512, S::kRandom, {}},
        {"BrokenLargeBudget", 1, 1, 2176, 20, 16, 600, S::kBroken, {}},
        {"TiesInShortLists", 1, 1, 129, 31, 16, 3, S::kQuarters, {}},
        {"TiesInLists", 1, 1, 2049, 96, 16, 16, S::kQuarters, {}, 32},
        {"TiesInLongLists", 1, 1, 600, 32, 16, 100, S::kQuarters, {}},
        {"OddRows", 2, 1, 300, 18, 16, 33, S::kBroken, {2250, 4800}, 6},
        {"MoreUnitsThanHeld", 1, 1, 2177, 32, 16, 16, S::kRandom, {}},
        {"MoreRowsThanHeld", 1, 1, 300, 257, 16, 16, S::kRandom, {}},
        {"BlockOf135M", 1, 3, 512, 96, 16, 32, S::kRandom, {8000}, 32},
        {"BudgetOfQuarters", 1, 1, 2048, 24, 16, 200, S::kRandom, {}},
        {"BudgetAboveGroups", 1, 1, 2048, 24, 16, 700, S::kRandom, {}},
        {"SmallBudget", 1, 2, 1999, 24, 16, 3, S::kWide, {}},
        {"Ties", 2, 2, 1300, 37, 16, 20, S::kQuarters, {20800, 12437}},
        {"OnlyTies", 1, 2, 2000, 40, 16, 77, S::kEqual, {31999}},
        {"Broken", 2, 2, 300, 21, 32, 19, S::kBroken, {9600, 5000}},
        {"Masked", 2, 2, 700, 42, 16, 30, S::kRandom, {}, 7},
        {"NegativeLength", 3, 1, 70, 8, 64, 5, S::kRandom, {-5, 63, 2147483647}},
        {"Long", 1, 2, 5003, 40, 16, 300, S::kRandom, {80000}},
        {"LongTies", 1, 1, 5003, 40, 1, 1000, S::kQuarters, {}},
        {"LongOnlyTies", 1, 1, 2500, 10, 1, 100, S::kEqual, {}},
        {"ManyRounds", 1, 1, 20000, 8, 1, 500, S::kSparse, {}},
        {"MostRows", 1, 1, 200, 1024, 16, 20, S::kRandom, {}, 32},
    };
}

inline VoteBuffers vote_buffers(const VoteCase& c) {
    std::mt19937 random(11);
    VoteBuffers buffers(c.requests, c.heads, c.units, c.rows, c.granularity);
    const auto uniform = [&] { return static_cast<float>(random() % (1 << 20)) / (1 << 20); };
    for (float& share : buffers.row_mass) {
        switch (c.shares) {
            case Shares::kRandom:
                share = -20.0f * uniform() * uniform() - 0.25f;
                break;
            case Shares::kQuarters:
                share = -static_cast<float>(random() % 64) / 4;
                break;
            case Shares::kEqual:
                share = -7.5f;
                break;
            case Shares::kSparse:
                share = random() % 2 ? -INFINITY : -15.0f * uniform();
                break;
            case Shares::kBroken: {
                const float broken[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1.5f, -1e-42f, -3e38f};
                share = random() % 3 ? -9.0f * uniform() : broken[random() % 8];
                break;
            }
            case Shares::kWide:
                share = random() % 500 ? -300.0f * uniform() * uniform() - 2.0f : -1e-4f * uniform();
                break;
        }
    }
    if (!c.lengths.empty()) buffers.lengths = c.lengths;
    buffers.params.k = c.k * c.granularity;
    if (c.positions > 0) {
        buffers.params.num_positions = c.positions;
        buffers.mask.resize(c.requests * c.positions);
        for (char& kept : buffers.mask) kept = random() % 4 != 0;
        if (c.requests > 1) std::fill_n(buffers.mask.begin(), c.positions, 0);
    }
    return buffers;
}

}  // namespace mage::test
