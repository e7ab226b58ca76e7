#include "kernels/token_mass/variants.cuh"

namespace mage::cuda {

MAGE_TOKEN_MASS_VARIANTS(__half, 64, fp16_d64)

}  // namespace mage::cuda
