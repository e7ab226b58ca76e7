#pragma once

#include <array>
#include <cstdint>

// The k-th largest of 32-bit keys without sorting: histograms from the top digit down, O(number of keys).
namespace mage::cpu {

struct RadixDigit {
    int shift;
    uint32_t bins;
};
constexpr uint32_t kRadixBins = 2048;
constexpr std::array<RadixDigit, 3> kRadixDigits = {{{21, kRadixBins}, {10, kRadixBins}, {0, 1024}}};

// The top `count` keys are all keys above `key` and the first `ties` of those equal to it.
struct Threshold {
    uint32_t key = 0;
    int64_t ties = 0;
};

// Key 0 is never taken, so count must not exceed the number of keys above 0 unless it is at least num_keys.
inline Threshold find_threshold(const uint32_t* keys, int64_t num_keys, int64_t count) {
    if (count >= num_keys) return {0, 0};
    if (count <= 0) return {UINT32_MAX, 0};
    uint32_t prefix = 0, prefix_mask = 0;
    int64_t left = count;
    for (const RadixDigit& digit : kRadixDigits) {
        std::array<int32_t, kRadixBins> histogram{};
        for (int64_t i = 0; i < num_keys; ++i) {
            if ((keys[i] & prefix_mask) == prefix) ++histogram[(keys[i] >> digit.shift) & (digit.bins - 1)];
        }
        uint32_t bin = digit.bins - 1;
        while (histogram[bin] < left) left -= histogram[bin--];
        prefix |= bin << digit.shift;
        prefix_mask |= (digit.bins - 1) << digit.shift;
    }
    return {prefix, left};
}

}  // namespace mage::cpu
