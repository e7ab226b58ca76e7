#include "core/cuda/device_info.h"

#include "core/cuda/cuda_check.h"

namespace mage::core {

void require_hopper(const char* op) {
    int device = 0;
    int major = 0;
    int minor = 0;
    MAGE_CUDA_CHECK(op, cudaGetDevice(&device));
    MAGE_CUDA_CHECK(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    MAGE_CUDA_CHECK(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    MAGE_CHECK(major == 9 && minor == 0, op, ": the GPU must be a Hopper (compute capability 9.0), got ", major, ".",
               minor);
}

}  // namespace mage::core
