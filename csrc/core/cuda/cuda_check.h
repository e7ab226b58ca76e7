#pragma once

#include <cuda_runtime_api.h>

#include "core/check.h"

// MAGE_CUDA_CHECK(op, call): throws mage::Error with the op, the call and CUDA's own text if the call fails.
#define MAGE_CUDA_CHECK(op, call)                                                                         \
    do {                                                                                                  \
        const cudaError_t mage_cuda_error = (call);                                                       \
        if (mage_cuda_error != cudaSuccess)                                                               \
            ::mage::core::throw_error(op, ": ", #call, " failed: ", cudaGetErrorString(mage_cuda_error)); \
    } while (0)
