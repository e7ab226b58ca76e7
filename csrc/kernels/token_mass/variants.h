#pragma once

#include <cuda.h>

#include "kernels/token_mass/arguments.h"

// The compiled instances of the kernel: dtype x head dim x rows (core::kMassShapes).
namespace mage::cuda {

struct TokenMassVariant {
    const char* name;
    void (*kernel)(TokenMassArgs, CUtensorMap);
    int threads, shared_bytes;
};

const TokenMassVariant& token_mass_variant_bf16_d128(int shape);
const TokenMassVariant& token_mass_variant_bf16_d64(int shape);
const TokenMassVariant& token_mass_variant_fp16_d128(int shape);
const TokenMassVariant& token_mass_variant_fp16_d64(int shape);

}  // namespace mage::cuda
