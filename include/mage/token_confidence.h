#pragma once

#include "mage/types.h"

// token_confidence: the most probable token of each row of logits, its probability and the row's entropy.
//
//   token = argmax_v x_v (ties: lowest id)      prob = softmax(x)[token]      entropy = -sum_v softmax(x)_v ln
//           softmax(x)_v, in nats
//
// NaN counts as -inf. If logits are +inf, those share the probability equally. A row without any logit above -inf gives
// token 0, prob 0, entropy 0. Sums are float32 within short runs and float64 between them, always in the
// same order: results are bit-reproducible for any number of threads and any N, on one instruction set.
//
// Cost: N * V logits, read once from memory (and once more from cache), one exponential each.
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

// Bytes of workspace, for every backend the same. NOTE: 0 today, the CPU backend needs none; callers ask nevertheless.
int64_t token_confidence_workspace(int64_t num_rows, int64_t vocab_size);

// Throws mage::Error if a dimension does not hold. Backends call it; a binding calls it before it allocates.
void check_token_confidence(const TokenConfidenceParams& params);

namespace cpu {

// Throws mage::Error if an argument does not hold.
void token_confidence(const TokenConfidenceParams& params);

}  // namespace cpu
}  // namespace mage
