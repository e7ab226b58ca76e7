#include "kernels/block_attention/variants.cuh"

namespace mage::cuda {

MAGE_ATTENTION_VARIANTS(__nv_bfloat16, 128, bf16_d128)

}  // namespace mage::cuda
