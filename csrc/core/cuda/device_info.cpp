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

int multiprocessors(const char* op) {
    int device = 0;
    int count = 0;
    MAGE_CUDA_CHECK(op, cudaGetDevice(&device));
    MAGE_CUDA_CHECK(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

void allow_shared_memory(const char* op, const void* kernel, int bytes) {
    MAGE_CUDA_CHECK(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

void allow_large_clusters(const char* op, const void* kernel) {
    MAGE_CUDA_CHECK(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

}  // namespace mage::core
