#pragma once

struct CUstream_st;

namespace mage {

// The same type as cudaStream_t, so that public headers compile where no CUDA toolkit is installed.
using CudaStream = CUstream_st*;

}  // namespace mage
