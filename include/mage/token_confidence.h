#pragma once

#include "mage/kernel_info.h"
#include "mage/stream.h"
#include "mage/types.h"

// token_confidence: the most probable token of each row of logits, its probability and the row's entropy.
//
//   token = argmax_v x_v (ties: lowest id)      prob = softmax(x)[token]      entropy = -sum_v softmax(x)_v ln
//           softmax(x)_v, in nats
//
//   logits   [N, V]       in    bfloat16, float16 or float32; last stride 1, any base and row stride
//   token    [N] int64    out   contiguous, as the two others
//   prob     [N] float32  out
//   entropy  [N] float32  out
//
// NaN counts as -inf. If logits are +inf, those share the probability equally. A row without any logit above -inf gives
// token 0, prob 0, entropy 0. V is 1 to kMaxVocab; on a GPU N is below 2^31.
// Sums are float32 within short runs; between them they are float64 or carry along what rounding lost. Their order
// depends on V and the dtype alone: a row's results are bit-reproducible for any number of threads, any N and any
// stride, on one instruction set or on CUDA. On CUDA e^x is within 2^-22 of its value, and 0 below e^-87.
//
// Cost: N * V logits, read once from memory (on the CPU once more from cache), one exponential each.
namespace mage {

// Vocabulary entries that a row may have.
constexpr int64_t kMaxVocab = int64_t{1} << 30;

struct TokenConfidenceParams {
    int64_t num_rows = 0;    // N, >= 0
    int64_t vocab_size = 0;  // V, 1 to kMaxVocab
    DType dtype = DType::kFloat32;

    const void* logits = nullptr;  // [N, V], last stride 1
    int64_t stride_logits_row = 0;

    // Outputs, contiguous.
    int64_t* token = nullptr;  // [N]
    float* prob = nullptr;     // [N]
    float* entropy = nullptr;  // [N], nats
};

// Bytes of workspace, for every backend the same: 0, none needs memory of its own; callers ask nevertheless.
int64_t token_confidence_workspace(int64_t num_rows, int64_t vocab_size);

// Throws mage::Error if a dimension does not hold. Backends call it; a binding calls it before it allocates.
void check_token_confidence(const TokenConfidenceParams& params);

namespace cpu {

// Throws mage::Error if an argument does not hold.
void token_confidence(const TokenConfidenceParams& params);

}  // namespace cpu

namespace cuda {

// Asynchronous on `stream`, one launch; allocates nothing; can be captured in a graph. Throws mage::Error if an
// argument does not hold.
void token_confidence(const TokenConfidenceParams& params, CudaStream stream);

// How it is launched: looks at the dims and the dtype only.
LaunchPlan token_confidence_plan(const TokenConfidenceParams& params);

}  // namespace cuda
}  // namespace mage
