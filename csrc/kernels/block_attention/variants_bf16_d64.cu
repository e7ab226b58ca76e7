#include "kernels/block_attention/variants.cuh"

namespace mage::cuda {

MAGE_ATTENTION_VARIANTS(__nv_bfloat16, 64, bf16_d64)

}  // namespace mage::cuda
