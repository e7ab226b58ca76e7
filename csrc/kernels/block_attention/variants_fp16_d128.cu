#include "kernels/block_attention/variants.cuh"

namespace mage::cuda {

MAGE_ATTENTION_VARIANTS(__half, 128, fp16_d128)

}  // namespace mage::cuda
