#include "kernels/token_mass/variants.cuh"

namespace mage::cuda {

MAGE_TOKEN_MASS_VARIANTS(__nv_bfloat16, 64, bf16_d64)

}  // namespace mage::cuda
