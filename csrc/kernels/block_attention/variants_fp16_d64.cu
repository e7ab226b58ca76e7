#include "kernels/block_attention/variants.cuh"

namespace mage::cuda {

MAGE_ATTENTION_VARIANTS(__half, 64, fp16_d64)

}  // namespace mage::cuda
