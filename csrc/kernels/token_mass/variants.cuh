#pragma once

#include "kernels/token_mass/mainloop.cuh"
#include "kernels/token_mass/variants.h"

namespace mage::cuda {

template <typename Config>
TokenMassVariant make_variant(const char* name) {
    constexpr int kBytes = static_cast<int>(sizeof(TokenMassShared<Config>)) + 1024;
    static_assert(kBytes <= 232448, "a CTA may have 227 KB");
    return {name, &mage_token_mass_kernel<Config>, kThreads, kBytes};
}

#define MAGE_TOKEN_MASS_VARIANTS(T, kDim, suffix)                                                      \
    const TokenMassVariant& token_mass_variant_##suffix(int shape) {                                   \
        static const TokenMassVariant variants[core::kNumMassShapes] = {                               \
            make_variant<TokenMassConfig<T, kDim, 64>>("mage_token_mass_kernel_" #suffix "_rows64"),   \
            make_variant<TokenMassConfig<T, kDim, 128>>("mage_token_mass_kernel_" #suffix "_rows128"), \
            make_variant<TokenMassConfig<T, kDim, 192>>("mage_token_mass_kernel_" #suffix "_rows192"), \
            make_variant<TokenMassConfig<T, kDim, 224>>("mage_token_mass_kernel_" #suffix "_rows224"), \
            make_variant<TokenMassConfig<T, kDim, 256>>("mage_token_mass_kernel_" #suffix "_rows256"), \
        };                                                                                             \
        return variants[shape];                                                                        \
    }

}  // namespace mage::cuda
