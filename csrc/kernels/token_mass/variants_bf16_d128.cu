#include "kernels/token_mass/variants.cuh"

namespace mage::cuda {

MAGE_TOKEN_MASS_VARIANTS(__nv_bfloat16, 128, bf16_d128)

}  // namespace mage::cuda
