#include "kernels/token_mass/variants.cuh"

namespace mage::cuda {

MAGE_TOKEN_MASS_VARIANTS(__half, 128, fp16_d128)

}  // namespace mage::cuda
