#pragma once

#include <type_traits>

#include "kernels/block_attention/mainloop.cuh"
#include "kernels/block_attention/variants.h"

namespace mage::cuda {

template <typename Config>
AttentionVariant make_variant(const char* name) {
    static_assert(sizeof(AttentionShared<Config>) + 1024 <= 232448, "a CTA may have 227 KB");
    return {name,
            &mage_block_attention_kernel<Config>,
            Config::kThreads,
            static_cast<int>(sizeof(AttentionShared<Config>)) + 1024,
            Config::kCtaRows,
            Config::kCtas,
            Config::kKeys,
            Config::kKeyGroups,
            ClusterMerge<Config>::kServed};
}

// Stages fill the 227 KB of shared memory that a CTA may have. Lists of 64 rows have as many CTAs as the launch says,
// and two warpgroups for the same rows: what is small waits for latencies.
template <typename T, int kDim, bool kLists>
const AttentionVariant& variant_of(int row_shape, const char* const (&names)[4]) {
    constexpr int kDeep = kDim == 64 ? 2 : 1;
    static const AttentionVariant variants[core::kRowShapes] = {
        make_variant<std::conditional_t<kLists, AttentionConfig<T, kDim, 2, 128, 3 * kDeep, 0, true, 2>,
                                        AttentionConfig<T, kDim, 1, 64, 6 * kDeep, 1, false, 1>>>(names[0]),
        make_variant<AttentionConfig<T, kDim, 2, 128, 3 * kDeep, 1, kLists, 1>>(names[1]),
        make_variant<AttentionConfig<T, kDim, 3, 64, 5 * kDeep, 1, kLists, 1>>(names[2]),
        make_variant<AttentionConfig<T, kDim, 2, 128, 3 * kDeep, 2, kLists, 1>>(names[3]),
    };
    return variants[row_shape];
}

#define MAGE_ATTENTION_NAMES(prefix) {prefix "_rows64", prefix "_rows128", prefix "_rows192", prefix "_rows256"}
#define MAGE_ATTENTION_VARIANTS(T, kDim, suffix)                                                                    \
    const AttentionVariant& attention_variant_##suffix(int row_shape, bool lists) {                                 \
        return lists ? variant_of<T, kDim, true>(row_shape,                                                         \
                                                 MAGE_ATTENTION_NAMES("mage_block_attention_list_kernel_" #suffix)) \
                     : variant_of<T, kDim, false>(row_shape,                                                        \
                                                  MAGE_ATTENTION_NAMES("mage_block_attention_kernel_" #suffix));    \
    }

}  // namespace mage::cuda
