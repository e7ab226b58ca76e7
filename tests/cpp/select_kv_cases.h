#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "mage/select_kv.h"

// Buffers and cases of select_kv, shared by the CPU and the CUDA test.
namespace mage::test {

// Inputs and outputs of one call; the outputs start full of poison.
struct SelectBuffers {
    SelectBuffers(int64_t layers, int64_t requests, int64_t heads, int64_t units, int64_t granularity, int64_t capacity)
        : mass(layers * requests * heads * units),
          lengths(requests, static_cast<int32_t>(units * granularity)),
          indices(layers * requests * heads * capacity, -7),
          counts(layers * requests * heads, -7),
          kept_mass(counts.size(), NAN),
          tail_start(requests, -7),
          overflow(new bool[counts.size()]()) {
        params.num_layers = layers;
        params.num_requests = requests;
        params.num_kv_heads = heads;
        params.num_units = units;
        params.granularity = granularity;
        params.capacity = capacity;
        params.stride_mass_head = units;
        params.stride_mass_request = heads * units;
        params.stride_mass_layer = requests * heads * units;
        bind();
    }

    // The params name the vectors of this object.
    void bind() {
        params.mass = mass.data();
        params.prefix_lens = lengths.data();
        params.votes = votes.empty() ? nullptr : votes.data();
        params.union_size = union_size.empty() ? nullptr : union_size.data();
        params.coverage = coverage.empty() ? nullptr : coverage.data();
        params.indices = indices.data();
        params.counts = counts.data();
        params.kept_mass = kept_mass.data();
        params.tail_start = tail_start.data();
        params.overflow = overflow.get();
    }

    std::vector<int32_t> list(int64_t row) const {
        const auto begin = indices.begin() + row * params.capacity;
        return {begin, begin + counts[row]};
    }

    SelectKvParams params;
    std::vector<float> mass;
    std::vector<int32_t> lengths;
    std::vector<int32_t> votes, union_size;  // rule kLayer
    std::vector<float> coverage;
    std::vector<int32_t> indices, counts;
    std::vector<float> kept_mass;
    std::vector<int32_t> tail_start;
    std::unique_ptr<bool[]> overflow;
};

enum class Masses {
    kPeaked,  // softmax of normal logits, standard deviation 3
    kFlat,    // the same, 0.3
    kFew,     // eight different values: ties
    kEqual,   // one value
    kZero,    // nothing but zeros
    kSparse,  // nine of ten are 0
    kBroken,  // NaN, infinities, negatives, both zeros, denormals and values above 1 among them
    kAllNan,
    kLarge,  // above 1, as no op gives them
    kRuns,   // softmax of normal logits: 1.5 for 128 units together and 0.3 for each
    kSpans,  // 512 of every 2048 units are heavy, 2048 in all: 128 of each of the same few warps
};
constexpr int kMasses = 11;

struct SelectCase {
    std::string name;
    int64_t layers, requests, heads, units, granularity, capacity;
    SelectRule rule;
    int64_t k;  // units
    Masses masses;
    std::vector<int32_t> lengths = {};  // empty: all units
    int64_t sinks = 0, recents = 0;     // tokens
    int64_t k_min = 0;                  // units
    double p = 0.9;
    int64_t extra = 0;  // elements between rows of mass
    int seed = 5;
};

inline std::ostream& operator<<(std::ostream& out, const SelectCase& c) { return out << c.name; }

inline void fill_masses(Masses masses, float* row, int64_t units, std::mt19937& random) {
    const auto uniform = [&] { return static_cast<float>(random() % (1 << 20)) / (1 << 20); };
    std::normal_distribution<float> normal;
    double sum = 0.0;
    float run = 0.0f;
    for (int64_t i = 0; i < units; ++i) {
        float& mass = row[i];
        switch (masses) {
            case Masses::kPeaked:
                sum += mass = std::exp(3.0f * normal(random));
                break;
            case Masses::kFlat:
                sum += mass = std::exp(0.3f * normal(random));
                break;
            case Masses::kFew:
                sum += mass = static_cast<float>(1 << random() % 8);
                break;
            case Masses::kEqual:
                mass = 1.0f / static_cast<float>(units);
                break;
            case Masses::kZero:
                mass = 0.0f;
                break;
            case Masses::kSparse:
                sum += mass = random() % 10 ? 0.0f : uniform();
                break;
            case Masses::kBroken: {
                const float broken[] = {NAN,  -NAN,  INFINITY, -INFINITY, 0.0f, -0.0f,
                                        1.5f, -1.0f, 1e-41f,   2e-41f,    3e38f};
                mass = random() % 3 ? uniform() / static_cast<float>(units) : broken[random() % 11];
                break;
            }
            case Masses::kAllNan:
                mass = NAN;
                break;
            case Masses::kLarge:
                mass = 1.0f + 100.0f * uniform();
                break;
            case Masses::kRuns:
                if (i % 128 == 0) run = 1.5f * normal(random);
                sum += mass = std::exp(run + 0.3f * normal(random));
                break;
            case Masses::kSpans:
                sum += mass = std::exp(0.3f * normal(random)) * (i < 8192 && i % 2048 < 512 ? 100.0f : 1.0f);
                break;
        }
    }
    if (sum > 0.0)
        for (int64_t i = 0; i < units; ++i) row[i] = static_cast<float>(row[i] / sum);
}

inline SelectBuffers select_buffers(const SelectCase& c) {
    std::mt19937 random(c.seed);
    SelectBuffers buffers(c.layers, c.requests, c.heads, c.units, c.granularity, c.capacity);
    const int64_t rows = c.layers * c.requests * c.heads, stride = c.units + c.extra;
    buffers.mass.assign(rows * stride, NAN);
    for (int64_t row = 0; row < rows; ++row) fill_masses(c.masses, buffers.mass.data() + row * stride, c.units, random);
    SelectKvParams& params = buffers.params;
    params.stride_mass_head = stride;
    params.stride_mass_request = c.heads * stride;
    params.stride_mass_layer = c.requests * c.heads * stride;
    if (!c.lengths.empty()) buffers.lengths = c.lengths;
    params.rule = c.rule;
    params.k = c.k * c.granularity;
    params.k_min = c.k_min * c.granularity;
    params.p = c.p;
    params.sinks = c.sinks;
    params.recents = c.recents;
    if (c.rule == SelectRule::kLayer) {
        const int32_t most = std::vector<int32_t>{2, 9, 225, 100000}[random() % 4];
        buffers.votes.resize(rows * c.units);
        for (int32_t& votes : buffers.votes) votes = static_cast<int32_t>(random() % most);
        const float coverages[] = {NAN, 0.0f, -1.0f, 2.0f, INFINITY, 1.0f, 0x1.b97c7p-14f, 0x1p-24f};
        for (int64_t row = 0; row < rows; ++row) {
            buffers.union_size.push_back(static_cast<int32_t>(random() % (c.units + 1)));
            buffers.coverage.push_back(random() % 4 ? static_cast<float>(random() % (1 << 24)) / (1 << 24)
                                                    : coverages[random() % 8]);
        }
        if (c.masses == Masses::kBroken) {
            for (int32_t& votes : buffers.votes)
                if (random() % 5 == 0) votes = random() % 2 ? -3 : 2147483647;
            for (int32_t& size : buffers.union_size)
                if (random() % 4 == 0) size = random() % 2 ? -5 : 2147483647;
        }
        if (c.masses == Masses::kZero) buffers.union_size.assign(rows, 0);
    }
    buffers.bind();
    return buffers;
}

}  // namespace mage::test
