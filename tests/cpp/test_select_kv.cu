#include <gtest/gtest.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gpu.h"
#include "mage/error.h"
#include "select_kv_cases.h"

namespace mage::test {
namespace {

constexpr SelectRule kRules[] = {SelectRule::kFixed, SelectRule::kLayer, SelectRule::kMass, SelectRule::kJoint};
constexpr const char* kRuleNames[] = {"fixed", "layer", "mass", "joint"};

// The five outputs as bytes, so that NaN and padding count.
struct Outputs {
    std::vector<unsigned char> indices, counts, kept_mass, tail_start, overflow;
};

template <typename T>
std::vector<unsigned char> bytes_of(const T* data, size_t count) {
    std::vector<unsigned char> bytes(count * sizeof(T));
    std::memcpy(bytes.data(), data, bytes.size());
    return bytes;
}

Outputs outputs_of(const SelectBuffers& buffers) {
    return {bytes_of(buffers.indices.data(), buffers.indices.size()),
            bytes_of(buffers.counts.data(), buffers.counts.size()),
            bytes_of(buffers.kept_mass.data(), buffers.kept_mass.size()),
            bytes_of(buffers.tail_start.data(), buffers.tail_start.size()),
            bytes_of(buffers.overflow.get(), buffers.counts.size())};
}

// Inputs of a case on the device, and outputs full of poison.
struct DeviceSelect {
    explicit DeviceSelect(const SelectBuffers& host)
        : mass(host.mass),
          lengths(host.lengths),
          votes(host.votes),
          union_size(host.union_size),
          coverage(host.coverage),
          indices(poison(host.indices.size() * 4)),
          counts(poison(host.counts.size() * 4)),
          kept_mass(poison(host.kept_mass.size() * 4)),
          tail_start(poison(host.tail_start.size() * 4)),
          overflow(poison(host.counts.size())),
          params(host.params) {
        params.mass = mass.data();
        params.prefix_lens = lengths.data();
        if (!host.votes.empty()) {
            params.votes = votes.data();
            params.union_size = union_size.data();
            params.coverage = coverage.data();
        }
        params.indices = reinterpret_cast<int32_t*>(indices.data());
        params.counts = reinterpret_cast<int32_t*>(counts.data());
        params.kept_mass = reinterpret_cast<float*>(kept_mass.data());
        params.tail_start = reinterpret_cast<int32_t*>(tail_start.data());
        params.overflow = reinterpret_cast<bool*>(overflow.data());
    }

    static std::vector<unsigned char> poison(size_t bytes) { return std::vector<unsigned char>(bytes, 0xff); }

    void poison_again() {
        for (DeviceArray<unsigned char>* array : {&indices, &counts, &kept_mass, &tail_start, &overflow})
            array->set(poison(array->get().size()));
    }

    DeviceCall call() {
        return {[this](cudaStream_t stream) { cuda::select_kv(params, stream); }, [this] { poison_again(); },
                [this] { return bytes_in(indices, counts, kept_mass, tail_start, overflow); }};
    }

    Outputs outputs() const { return {indices.get(), counts.get(), kept_mass.get(), tail_start.get(), overflow.get()}; }

    DeviceArray<float> mass;
    DeviceArray<int32_t> lengths, votes, union_size;
    DeviceArray<float> coverage;
    DeviceArray<unsigned char> indices, counts, kept_mass, tail_start, overflow;
    SelectKvParams params;
};

// Bit for bit; returns whether all is equal.
bool expect_same(const Outputs& actual, const Outputs& expected, const std::string& what) {
    const auto same = [&](const char* name, const auto& a, const auto& b) {
        const auto at = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
        EXPECT_TRUE(at.first == a.end() && at.second == b.end())
            << what << ": " << name << " differs from byte " << at.first - a.begin() << " of " << a.size() << " on";
        return at.first == a.end() && at.second == b.end();
    };
    bool all = same("counts", actual.counts, expected.counts);
    all = same("indices", actual.indices, expected.indices) && all;
    all = same("kept_mass", actual.kept_mass, expected.kept_mass) && all;
    all = same("tail_start", actual.tail_start, expected.tail_start) && all;
    return same("overflow", actual.overflow, expected.overflow) && all;
}

bool expect_the_cpus(const SelectCase& c, int runs) {
    SelectBuffers buffers = select_buffers(c);
    cpu::select_kv(buffers.params);
    const Outputs expected = outputs_of(buffers);
    DeviceSelect device(buffers);
    for (int run = 0; run < runs; ++run) {
        if (run > 0) device.poison_again();
        cuda::select_kv(device.params, nullptr);
        if (!expect_same(device.outputs(), expected, c.name)) return false;
    }
    return true;
}

class SelectKvCuda : public testing::TestWithParam<SelectCase> {};

TEST_P(SelectKvCuda, AgreesWithTheCpu) {
    MAGE_NEEDS_GPU();
    expect_the_cpus(GetParam(), 1);
}

TEST_P(SelectKvCuda, GivesTheSameBitsAgain) {
    MAGE_NEEDS_GPU();
    SelectBuffers buffers = select_buffers(GetParam());
    DeviceSelect device(buffers);
    expect_equal_runs(device.call(), 3);
}

// One for each way of laying rows on CTAs and each rule, and the edges of budgets and lengths.
std::vector<SelectCase> select_cases() {
    using R = SelectRule;
    using M = Masses;
    const std::vector<int32_t> short_prefixes = {0, 1, 67, 1024, 1025, 4100, 16385, -1};
    const std::vector<int32_t> tiny_prefixes = {2, 3, 4, 5, 6, 7, 8, 9};
    std::vector<SelectCase> cases = {
        {"OneUnit", 1, 1, 1, 1, 64, 1, R::kFixed, 1, M::kPeaked},
        {"OneUnitPartial", 1, 1, 1, 1, 64, 1, R::kFixed, 1, M::kPeaked, {63}},
        {"NoBudget", 2, 2, 2, 100, 16, 8, R::kFixed, 0, M::kPeaked},
        {"AllUnits", 2, 1, 2, 100, 16, 100, R::kFixed, 100, M::kPeaked},
        {"MoreThanAllUnits", 1, 3, 2, 300, 16, 500, R::kFixed, 500, M::kPeaked, {0, 4799, 1600}},
        {"EmptyPrefixes", 2, 3, 4, 2049, 64, 64, R::kFixed, 64, M::kPeaked, {0, -5, 63}},
        {"StepOf7B", 28, 1, 4, 2049, 64, 16, R::kFixed, 16, M::kPeaked, {131072}, 4, 64},
        {"StepOf7BPartial", 4, 2, 4, 2049, 64, 16, R::kFixed, 16, M::kPeaked, {131071, 70001}, 4, 64},
        {"StepOf7BAtG16", 3, 1, 4, 8194, 16, 64, R::kFixed, 64, M::kPeaked, {131072}},
        {"Ties", 2, 2, 2, 4000, 1, 900, R::kFixed, 700, M::kFew, {4000, 3111}, 4, 16},
        {"OnlyTies", 1, 1, 4, 10000, 1, 900, R::kFixed, 777, M::kEqual},
        {"OnlyTiesInParts", 1, 1, 2, 30000, 1, 900, R::kFixed, 777, M::kEqual, {29000}},
        {"Nothing", 1, 1, 2, 30000, 1, 900, R::kFixed, 777, M::kZero, {28123}},
        {"AllNan", 1, 1, 2, 11000, 1, 900, R::kFixed, 777, M::kAllNan},
        {"AboveOne", 1, 1, 2, 11000, 1, 900, R::kFixed, 777, M::kLarge},
        {"Broken", 2, 2, 2, 5000, 16, 900, R::kFixed, 777, M::kBroken, {80000, 61111}, 100, 100},
        {"BrokenInParts", 1, 1, 2, 50000, 1, 9000, R::kFixed, 7777, M::kBroken},
        {"OnlySinksFit", 1, 1, 2, 3000, 16, 40, R::kFixed, 20, M::kPeaked, {}, 1000, 1000},
        {"SinksAndRecentsOfAll", 1, 1, 2, 3000, 16, 4000, R::kFixed, 3000, M::kPeaked, {}, 1 << 30, 1 << 30},
        {"Overflow", 2, 1, 2, 3000, 16, 33, R::kFixed, 200, M::kPeaked, {}, 40, 200},
        {"Strided", 3, 2, 4, 2047, 32, 40, R::kFixed, 32, M::kPeaked, {}, 0, 0, 0, 0.9, 3},
        {"TokensOf7B", 1, 1, 4, 131072, 1, 1024, R::kFixed, 1024, M::kPeaked, {}, 4, 64},
        {"TokensOf7BWithBlock", 1, 1, 4, 131104, 1, 1024, R::kFixed, 1024, M::kFlat, {131072}, 4, 64},
        {"ManyLongRows", 5, 2, 4, 60000, 1, 1024, R::kFixed, 1024, M::kPeaked, {60000, 31007}, 4, 64},
        {"ManyLongRowsSmallCapacity", 5, 2, 4, 60000, 1, 100, R::kFixed, 1024, M::kFew, {60000, 31007}},
        {"ManyLongRowsAllListed", 3, 3, 4, 40000, 1, 40000, R::kFixed, 39000, M::kPeaked, {}},
        {"ManyRowsOfTokens", 9, 1, 4, 131104, 1, 1024, R::kFixed, 1024, M::kPeaked, {131072}, 4, 64},
        {"ManyRowsOfTokensTies", 9, 1, 4, 131104, 1, 1024, R::kFixed, 1024, M::kFew, {131072}, 4, 64},
        {"ManyRowsOfTokensAllListed", 9, 1, 4, 131104, 1, 131104, R::kFixed, 131000, M::kPeaked, {}, 4, 64},
        {"StreamedRows", 7, 2, 4, 50001, 1, 1024, R::kFixed, 1024, M::kPeaked, {50001, 50000}, 4, 64, 0, 0.9, 1},
        {"StreamedRowsFlat", 7, 2, 4, 50003, 1, 1024, R::kFixed, 1024, M::kFlat, {50003, 16500}, 5, 64, 0, 0.9, 2},
        {"StreamedRowsMostListed", 5, 1, 4, 70000, 1, 2048, R::kFixed, 2048, M::kPeaked, {69997}, 3, 31, 0, 0.9, 3},
        {"StreamedRowsShort", 2, 8, 2, 40000, 1, 1024, R::kFixed, 1024, M::kPeaked, short_prefixes, 4, 64, 0, 0.9, 1},
        {"StreamedRowsTiny", 2, 8, 2, 40000, 1, 9, R::kFixed, 7, M::kFew, tiny_prefixes, 1, 1, 0, 0.9, 3},
        {"StreamedRowsPartial", 9, 2, 2, 36000, 64, 300, R::kFixed, 300, M::kPeaked, {2303999, 448001}, 700, 900},
        {"StreamedRowsNoBudget", 9, 2, 2, 36000, 16, 300, R::kFixed, 0, M::kPeaked, {576000, 555555}, 70, 90},
        {"StreamedRowsForcedAlone", 9, 1, 4, 36000, 16, 100, R::kFixed, 100, M::kPeaked, {}, 1000, 1000},
        {"StreamedRowsOverflow", 9, 1, 4, 36000, 1, 99, R::kFixed, 2000, M::kSparse, {35990}, 7, 70},
        {"StreamedRowsEqual", 9, 1, 4, 36000, 1, 900, R::kFixed, 777, M::kEqual, {35001}, 4, 64, 0, 0.9, 1},
        {"StreamedRowsZero", 9, 1, 4, 36000, 1, 900, R::kFixed, 777, M::kZero, {35001}},
        {"StreamedRowsAllNan", 9, 1, 4, 36000, 1, 900, R::kFixed, 777, M::kAllNan, {}},
        {"StreamedRowsAboveOne", 9, 1, 4, 36000, 1, 900, R::kFixed, 777, M::kLarge, {}, 0, 0, 0, 0.9, 2},
        {"StreamedRowsBroken", 9, 1, 4, 36000, 1, 2048, R::kFixed, 2001, M::kBroken, {35999}, 4, 64, 0, 0.9, 1},
        {"StreamedRowsInBlocksOfBits", 3, 1, 4, 300001, 1, 1500, R::kFixed, 1500, M::kPeaked, {290000}, 4, 64},
        {"StreamedRowsInBlocksOfBitsEqual", 3, 1, 4, 300001, 1, 1500, R::kFixed, 1500, M::kEqual, {290000}, 4, 64},
        {"StreamedRowsInBlocksOfBitsZero", 3, 1, 4, 300001, 1, 1500, R::kFixed, 1500, M::kZero, {290000}, 4, 64},
        {"StreamedRowsMostUnits", 3, 1, 4, 1 << 19, 1, 1500, R::kFixed, 1500, M::kPeaked, {}, 4, 64},
        {"StreamedRowsMostUnitsEqual", 3, 1, 4, 1 << 19, 1, 1500, R::kFixed, 1500, M::kEqual, {}, 4, 64},
        {"StreamedRowsMostUnitsZero", 3, 1, 4, 1 << 19, 1, 1500, R::kFixed, 1500, M::kZero, {}, 4, 64},
        {"StreamedRowsMostUnitsInRuns", 3, 1, 4, 1 << 19, 1, 2048, R::kFixed, 2048, M::kRuns, {524287}, 4, 64},
        {"MoreUnitsThanAreStreamed", 3, 1, 4, (1 << 19) + 1, 1, 1500, R::kFixed, 1500, M::kPeaked, {}, 4, 64},
        {"MoreUnitsThanAreStreamedEqual", 3, 1, 4, (1 << 19) + 1, 1, 1500, R::kFixed, 1500, M::kEqual, {}, 4, 64},
        {"MoreUnitsThanAreStreamedZero", 3, 1, 4, (1 << 19) + 1, 1, 1500, R::kFixed, 1500, M::kZero, {}, 4, 64},
        {"MoreUnitsThanAreStreamedInRuns", 3, 1, 4, (1 << 19) + 1, 1, 2048, R::kFixed, 2048, M::kRuns, {}, 4, 64},
        {"StreamedRowsInRuns", 9, 1, 4, 131104, 1, 1024, R::kFixed, 1024, M::kRuns, {131072}, 4, 64},
        {"StreamedRowsInRunsMostListed", 5, 1, 4, 131071, 1, 2048, R::kFixed, 2048, M::kRuns, {}, 4, 64, 0, 0.9, 2},
        {"StreamedRowsInFewRuns", 9, 1, 4, 32800, 1, 1024, R::kFixed, 1024, M::kRuns, {32768}, 4, 64},
        {"StreamedRowsInSpans", 9, 1, 4, 50000, 1, 2000, R::kFixed, 2000, M::kSpans, {}},
        {"StreamedRowsInSpansShifted", 9, 1, 4, 50000, 1, 2000, R::kFixed, 2000, M::kSpans, {49990}, 1, 1, 0, 0.9, 1},
        {"StreamedRowsInSpansOfMany", 3, 1, 4, 300001, 1, 2048, R::kFixed, 2048, M::kSpans, {}, 4, 64},
        {"LongRowsThatAreNotStreamed", 9, 1, 4, 36000, 1, 2049, R::kFixed, 2049, M::kPeaked, {}, 4, 64},
        {"HalfOfTheUnits", 2, 2, 4, 2048, 1, 1100, R::kFixed, 1024, M::kPeaked, {}, 4, 64},
        {"LongInOneCluster", 1, 1, 1, 163000, 1, 1024, R::kFixed, 1024, M::kPeaked, {}},
        {"HeldInSharedMemory", 1, 1, 1, 400000, 1, 300000, R::kFixed, 250000, M::kPeaked, {}},
        {"HeldInTwoBlocksOfWords", 1, 1, 1, 700000, 1, 300000, R::kFixed, 250000, M::kPeaked, {690001}, 4, 64},
        {"ReadInEachPass", 1, 1, 1, 900000, 1, 5000, R::kFixed, 4096, M::kPeaked, {}},
        {"MostUnits", 1, 1, 1, kSelectMaxUnits, 1, 70000, R::kFixed, 65536, M::kSparse, {}},
        {"MassOfMostUnits", 1, 1, 1, kSelectMaxUnits, 1, kSelectMaxUnits, R::kMass, 0, M::kEqual, {}},
        {"MassOfMemory", 1, 2, 1, 830000, 1, 80000, R::kMass, 0, M::kPeaked, {830000, 500001}, 4, 64, 16, 0.8},
        {"LayerOfMemory", 2, 1, 1, 830000, 1, 8000, R::kLayer, 4000, M::kPeaked, {}},
        {"JointOfMemory", 1, 1, 5, 300000, 1, 9000, R::kJoint, 4000, M::kFew, {299000}, 4, 64},
        {"JointOfManyHeads", 2, 2, 21, 3000, 16, 100, R::kJoint, 64, M::kPeaked, {48000, 30011}, 4, 64},
        {"JointOfManyHeadsOverflow", 1, 1, 40, 777, 16, 64, R::kJoint, 64, M::kFew, {}, 40, 64},
        {"JointOfEqualMasses", 2, 1, 8, 2049, 64, 64, R::kJoint, 33, M::kEqual, {131072}},
        {"JointOfHeadsThatDoNotDivide", 1, 1, 5, 40000, 1, 4096, R::kJoint, 1024, M::kFew, {}, 4, 64},
        {"JointOfTwelveHeads", 2, 1, 12, 2049, 64, 40, R::kJoint, 33, M::kPeaked, {131072}},
        {"JointOfOneHead", 2, 1, 1, 20000, 1, 600, R::kJoint, 512, M::kFew, {}},
        {"JointOfAllUnits", 1, 1, 2, 12000, 1, 12000, R::kJoint, 12000, M::kEqual, {}},
        {"JointOfAllUnitsWithRoom", 1, 1, 2, 12000, 1, 13000, R::kJoint, 12000, M::kPeaked, {}},
        {"JointOfAllUnitsOfAPrefix", 1, 2, 2, 12000, 1, 13000, R::kJoint, 7000, M::kPeaked, {7000, 12000}},
        {"JointOfAllUnitsOf16", 1, 1, 4, 8194, 16, 8194, R::kJoint, 8194, M::kFew, {}},
        {"JointOfAllUnitsOfManyHeads", 1, 1, 17, 600, 1, 1024, R::kJoint, 600, M::kEqual, {}},
        {"MassReachesAll", 2, 1, 2, 5000, 16, 5000, R::kMass, 0, M::kPeaked, {}, 4, 64, 0, 1.0},
        {"MassOfLittle", 2, 1, 2, 5000, 16, 5000, R::kMass, 0, M::kPeaked, {}, 0, 0, 0, 1e-9},
        {"MassOfTies", 2, 1, 2, 20000, 1, 20000, R::kMass, 0, M::kFew, {19999}, 0, 0, 0, 0.5},
        {"MassOverflow", 2, 1, 2, 20000, 1, 2000, R::kMass, 0, M::kFlat, {19999}, 4, 64, 0, 0.5},
        {"MassOfNothing", 2, 1, 2, 20000, 1, 2000, R::kMass, 0, M::kZero, {19999}, 4, 64, 100, 0.5},
        {"MassLargest", 1, 1, 2, 200000, 1, 200000, R::kMass, 0, M::kLarge, {}, 4, 64, 100, 0.7},
        {"LayersOf7B", 28, 2, 4, 2049, 64, 64, R::kLayer, 16, M::kPeaked, {131072, 65000}, 4, 64, 8},
        {"LayersWithoutScores", 5, 2, 4, 2049, 64, 64, R::kLayer, 16, M::kZero, {131072, 65000}},
        {"LayersBroken", 9, 2, 3, 3000, 64, 64, R::kLayer, 16, M::kBroken, {131072, 65000}, 4, 64, 8},
        {"ManyLayersOfManyHeads", 70, 1, 33, 65, 64, 64, R::kLayer, 16, M::kPeaked, {}},
    };
    // Prefixes past the last unit and below 0: few units, one CTA, clusters, a stream; the last rows are not held.
    for (const R rule : kRules) {
        for (const int64_t units : {300, 5000, 20000, 36000}) {
            const bool streams = units == 36000 && rule == R::kFixed;
            const int64_t g = 16, layers = streams ? 9 : 2, capacity = units == 36000 ? 99 : units;
            const auto end = static_cast<int32_t>(units * g);
            SelectCase c = {"", layers, 7, 2, units, g, capacity, rule, units / 9, M::kPeaked};
            c.lengths = {end, end + 1, INT_MAX, INT_MAX - g + 1, -1, INT_MIN, end - 1};
            c.sinks = 40;
            c.recents = 100;
            c.p = 0.5;
            c.name = std::string("FarPrefixes_") + kRuleNames[static_cast<int>(rule)] + "_of_" + std::to_string(units);
            cases.push_back(c);
        }
    }
    for (const R rule : kRules) {
        for (const int64_t units : {70, 1024, 1025, 4097, 8192, 8193, 16384, 16385, 33000, 131072}) {
            SelectCase c = {"", 2, 1, 2, units, 1, units, rule, units / 9, Masses::kPeaked, {}, 4, 33, 5, 0.7, 1};
            c.name = std::string("Rule_") + kRuleNames[static_cast<int>(rule)] + "_of_" + std::to_string(units);
            cases.push_back(c);
        }
    }
    return cases;
}

INSTANTIATE_TEST_SUITE_P(Cases, SelectKvCuda, testing::ValuesIn(select_cases()),
                         [](const auto& info) { return info.param.name; });

// Whatever the sizes, masses, lengths and budgets: seeds 0 to 2999, short rows more often than long ones.
TEST(SelectKvCudaRandom, AgreesWithTheCpu) {
    MAGE_NEEDS_GPU();
    for (int seed = 0; seed < 3000; ++seed) {
        std::mt19937 random(seed);
        const auto below = [&](int64_t end) { return static_cast<int64_t>(random() % end); };
        SelectCase c;
        c.name = "seed " + std::to_string(seed);
        c.seed = seed;
        c.rule = kRules[below(4)];
        c.masses = static_cast<Masses>(below(kMasses));
        c.units = 1 + below(int64_t{1} << (1 + below(seed % 20 == 0 ? 17 : 13)));
        c.layers = 1 + below(4);
        c.requests = 1 + below(3);
        c.heads = 1 + below(8);
        c.granularity = std::vector<int64_t>{1, 16, 32, 64}[below(4)];
        c.k = below(3) ? below(c.units + 3) : below(80);
        c.k_min = below(2) ? 0 : below(c.units + 1);
        c.capacity = below(3) ? c.units + 2 : 1 + below(c.units);
        c.sinks = below(2) ? 0 : below(5 * c.granularity + 1);
        c.recents = below(2) ? 0 : below(9 * c.granularity + 1);
        if (below(12) == 0) c.recents = c.units * c.granularity;
        c.p = std::vector<double>{1e-9, 0.3, 0.5, 0.9, 0.999, 1.0}[below(6)];
        c.extra = below(3);
        for (int64_t request = 0; request < c.requests; ++request) {
            const int64_t all = c.units * c.granularity;
            c.lengths.push_back(static_cast<int32_t>(below(4) ? below(all + 1) : below(2) ? all : below(3) - 1));
        }
        if (!expect_the_cpus(c, 1)) {
            ADD_FAILURE() << c.name << ": " << c.layers << " x " << c.requests << " x " << c.heads << " x " << c.units
                          << ", g " << c.granularity << ", rule " << kRuleNames[static_cast<int>(c.rule)] << ", masses "
                          << static_cast<int>(c.masses) << ", k " << c.k << ", k_min " << c.k_min << ", capacity "
                          << c.capacity << ", sinks " << c.sinks << ", recents " << c.recents << ", p " << c.p
                          << ", first length " << c.lengths[0];
            return;
        }
    }
}

// One for each kernel of this op.
std::vector<SelectCase> cases_of_each_kernel() {
    using R = SelectRule;
    using M = Masses;
    return {
        {"short", 2, 2, 2, 700, 16, 40, R::kFixed, 32, M::kPeaked, {11200, 5003}, 4, 64},
        {"alone", 4, 2, 4, 2049, 64, 16, R::kFixed, 16, M::kPeaked, {131071, 70001}, 4, 64},
        {"cluster", 1, 1, 4, 131104, 1, 1024, R::kFixed, 1024, M::kFlat, {131072}, 4, 64},
        {"streamed", 9, 1, 4, 36000, 1, 900, R::kFixed, 777, M::kPeaked, {35001}, 4, 64, 0, 0.9, 1},
        {"long", 1, 1, 1, 900000, 1, 5000, R::kFixed, 4096, M::kPeaked, {890001}, 4, 64},
        {"layers", 5, 2, 4, 2049, 64, 64, R::kLayer, 16, M::kPeaked, {131072, 65000}, 4, 64, 8},
        {"layers in clusters", 2, 1, 2, 33000, 1, 700, R::kLayer, 300, M::kPeaked, {32000}, 4, 64, 8},
        {"mass in clusters", 2, 1, 2, 20000, 1, 2000, R::kMass, 0, M::kFlat, {19999}, 4, 64, 0, 0.05},
        {"joint of many heads", 2, 2, 21, 3000, 16, 100, R::kJoint, 64, M::kPeaked, {48000, 30011}, 4, 64},
    };
}

TEST(SelectKvCudaRepeated, GivesTheSameBits) {
    MAGE_NEEDS_GPU();
    for (const SelectCase& c : cases_of_each_kernel()) EXPECT_TRUE(expect_the_cpus(c, 100));
    for (const SelectRule rule : kRules) {
        SelectCase c = {"repeated", 6, 2, 4, 20000, 1, 700, rule, 600, Masses::kFew, {20000, 13001}, 4, 64, 16, 0.2};
        EXPECT_TRUE(expect_the_cpus(c, 100));
        c.units = 2049;
        c.lengths = {2048, 1300};
        EXPECT_TRUE(expect_the_cpus(c, 100));
    }
}

// A captured call follows what is in the buffers when the graph runs, again and again.
void expect_replays(const SelectCase& captured, const SelectCase& replayed) {
    SelectBuffers buffers = select_buffers(captured), other = select_buffers(replayed);
    cpu::select_kv(other.params);
    DeviceSelect device(buffers);
    Streams streams;
    streams.capture([&](cudaStream_t stream) {
        for (int call = 0; call < 3; ++call) cuda::select_kv(device.params, stream);
    });
    device.mass.set(other.mass);
    device.lengths.set(other.lengths);
    if (captured.rule == SelectRule::kLayer) {
        device.votes.set(other.votes);
        device.union_size.set(other.union_size);
        device.coverage.set(other.coverage);
    }
    for (int run = 0; run < 3; ++run) {
        device.poison_again();
        streams.replay();
        expect_same(device.outputs(), outputs_of(other), captured.name);
    }
}

TEST(SelectKvCudaGraph, ReplaysWithNewMasses) {
    MAGE_NEEDS_GPU();
    for (const SelectRule rule : kRules) {
        SelectCase captured = {"", 3, 2, 4, 12000, 1, 500, rule, 400, Masses::kPeaked, {12000, 11000}, 4, 64, 16, 0.2};
        captured.name = kRuleNames[static_cast<int>(rule)];
        SelectCase replayed = captured;
        replayed.masses = Masses::kFew;
        replayed.lengths = {10001, 17};
        replayed.seed = 99;
        expect_replays(captured, replayed);
    }
}

// The bound of a streamed row is of the new masses; where these are equal, it is of no use.
TEST(SelectKvCudaGraph, ReplaysStreamedRowsWithNewMasses) {
    MAGE_NEEDS_GPU();
    const SelectCase captured = {"streamed",     5, 2, 4, 36000, 1, 900, SelectRule::kFixed, 777, Masses::kPeaked,
                                 {36000, 20001}, 4, 64};
    for (const Masses masses : {Masses::kFlat, Masses::kEqual}) {
        for (const std::vector<int32_t>& lengths : {std::vector<int32_t>{35001, 36000}, {0, 18000}}) {
            SelectCase replayed = captured;
            replayed.masses = masses;
            replayed.lengths = lengths;
            replayed.seed = 99;
            expect_replays(captured, replayed);
        }
    }
}

TEST(SelectKvCudaStreams, DoNotDisturbEachOther) {
    MAGE_NEEDS_GPU();
    const SelectCase cases[] = {
        {"first", 2, 1, 4, 40000, 1, 1024, SelectRule::kFixed, 1000, Masses::kPeaked, {}, 4, 64},
        {"second", 4, 2, 8, 5000, 1, 300, SelectRule::kJoint, 200, Masses::kFew, {4999, 3000}},
    };
    std::vector<SelectBuffers> buffers;
    for (const SelectCase& c : cases) buffers.push_back(select_buffers(c));
    cudaStream_t streams[2];
    std::vector<std::unique_ptr<DeviceSelect>> devices;
    for (int i = 0; i < 2; ++i) {
        buffers[i].bind();
        cpu::select_kv(buffers[i].params);
        devices.push_back(std::make_unique<DeviceSelect>(buffers[i]));
        ASSERT_EQ(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking), cudaSuccess);
    }
    for (int run = 0; run < 50; ++run)
        for (int i = 0; i < 2; ++i) cuda::select_kv(devices[i]->params, streams[i]);
    for (int i = 0; i < 2; ++i) {
        ASSERT_EQ(cudaStreamSynchronize(streams[i]), cudaSuccess);
        expect_same(devices[i]->outputs(), outputs_of(buffers[i]), cases[i].name);
        cudaStreamDestroy(streams[i]);
    }
}

// Every input may come from a kernel that lets this one start early.
TEST(SelectKvCudaOverlap, WaitsForEveryInput) {
    MAGE_NEEDS_GPU();
    for (const SelectCase& c : cases_of_each_kernel()) {
        SelectBuffers buffers = select_buffers(c);
        cpu::select_kv(buffers.params);
        DeviceSelect device(buffers);
        LateInputs late;
        late.add("mass", device.mass);
        late.add("prefix_lens", device.lengths, 0);
        late.add("votes", device.votes);
        late.add("union_size", device.union_size);
        late.add("coverage", device.coverage);
        SCOPED_TRACE(c.name);
        late.expect_awaited(device.call());
        if (HasFatalFailure()) return;
        expect_same(device.outputs(), outputs_of(buffers), c.name);
    }
}

// What is written may still be read by a kernel that lets this one start early; of empty prefixes too.
TEST(SelectKvCudaOverlap, WaitsForReaders) {
    MAGE_NEEDS_GPU();
    for (SelectCase c : cases_of_each_kernel()) {
        for (const bool empty : {false, true}) {
            if (empty) c.lengths.assign(c.requests, 0);
            if (c.requests > 1) c.lengths.back() = 0;
            SCOPED_TRACE(c.name + (empty ? ", empty" : ""));
            DeviceSelect device(select_buffers(c));
            LateReads late;
            late.add("indices", device.indices);
            late.add("counts", device.counts);
            late.add("kept_mass", device.kept_mass);
            late.add("tail_start", device.tail_start);
            late.add("overflow", device.overflow);
            late.expect_awaited(device.call());
            if (HasFatalFailure()) return;
        }
    }
}

TEST(SelectKvCudaErrors, NameTheArgument) {
    MAGE_NEEDS_GPU();
    const SelectBuffers buffers(1, 1, 1, 4, 16, 2);
    DeviceSelect device(buffers);
    const auto message_with = [&](auto change) -> std::string {
        SelectKvParams params = device.params;
        change(params);
        try {
            cuda::select_kv(params, nullptr);
        } catch (const Error& error) {
            return error.what();
        }
        return "";
    };
    EXPECT_EQ(message_with([](auto&) {}), "");
    EXPECT_EQ(message_with([](auto& p) { p.num_requests = 0; }), "");
    EXPECT_EQ(message_with([](auto& p) { p.k = 24; }), "select_kv: k must be a multiple of g = 16, got 24");
    EXPECT_NE(message_with([](auto& p) { p.rule = SelectRule::kLayer; }).find("votes, union_size and coverage must be"),
              std::string::npos);
    EXPECT_NE(message_with([](auto& p) { p.mass = nullptr; }).find("got a null pointer"), std::string::npos);
    EXPECT_EQ(
        message_with([](auto& p) {
            p.rule = SelectRule::kJoint;
            p.num_kv_heads = 1025;
            p.num_units = kSelectMaxUnits;
        }),
        "select_kv: mass must have at most 2097152 units with rule \"joint\" and 1025 heads on CUDA, got 4194304");
}

}  // namespace
}  // namespace mage::test
