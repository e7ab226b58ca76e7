#include "mage/token_confidence.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/check.h"
#include "core/parallel.h"
#include "cpu/kernels/token_confidence.h"

namespace mage {

int64_t token_confidence_workspace(int64_t num_rows, int64_t vocab_size) {
    MAGE_CHECK(num_rows >= 0, "token_confidence: num_rows must be at least 0, got ", num_rows);
    MAGE_CHECK(vocab_size >= 1 && vocab_size <= kMaxVocab, "token_confidence: vocab_size must be in [1, ", kMaxVocab,
               "], got ", vocab_size);
    return 0;
}

void check_token_confidence(const TokenConfidenceParams& params) {
    MAGE_CHECK(params.num_rows >= 0, "token_confidence: logits must have >= 0 rows, got ", params.num_rows);
    MAGE_CHECK(params.vocab_size >= 1 && params.vocab_size <= kMaxVocab, "token_confidence: logits must have 1 to ",
               kMaxVocab, " entries per row, got ", params.vocab_size);
}

namespace cpu {
namespace {

// Logits per piece: small enough for the first-level cache, so that memory is read once.
constexpr int64_t kPiece = 4096;

// Pieces that are worth a thread of their own, if they are whole.
constexpr int64_t kPiecesPerTask = 4;

struct Confidence {
    int64_t token = 0;
    float prob = 0.0f;
    float entropy = 0.0f;
};

// The pieces of one row, rescaled to the row's maximum, in order.
Confidence join(const TokenConfidenceParams& params, int64_t row, const ConfidencePiece* pieces, int64_t num_pieces) {
    const auto find = MAGE_CPU_PICK(find_logit);
    const char* logits =
        static_cast<const char*>(params.logits) + row * params.stride_logits_row * dtype_bytes(params.dtype);
    int64_t first = 0;
    for (int64_t i = 1; i < num_pieces; ++i) first = pieces[i].max > pieces[first].max ? i : first;
    const float max = pieces[first].max;
    if (max == -INFINITY) return {};

    int64_t ties = 0, equal = 0, token = 0;
    for (int64_t i = first; i < num_pieces; ++i) {
        if (pieces[i].max != max) continue;
        const int64_t begin = i * kPiece, count = std::min(kPiece, params.vocab_size - begin);
        const int64_t found = find(logits + begin * dtype_bytes(params.dtype), params.dtype, count, max, &equal);
        if (i == first) token = begin + found;
        ties += equal;
        if (max != INFINITY) break;  // their number matters for +inf alone
    }
    if (max == INFINITY) return {token, static_cast<float>(1.0 / ties), static_cast<float>(std::log(ties))};

    double sum = 0.0, weighted = 0.0;
    for (int64_t i = 0; i < num_pieces; ++i) {
        if (pieces[i].max == -INFINITY) continue;
        const double below = static_cast<double>(pieces[i].max) - max;
        const double scale = std::exp(below);
        sum += scale * pieces[i].sum;
        weighted += scale * (pieces[i].weighted + below * pieces[i].sum);
    }
    const double entropy = std::log(sum) - weighted / sum;
    return {token, static_cast<float>(1.0 / sum), static_cast<float>(std::max(entropy, 0.0))};
}

}  // namespace

void token_confidence(const TokenConfidenceParams& params) {
    check_token_confidence(params);
    MAGE_CHECK(params.num_rows == 0 || (params.logits && params.token && params.prob && params.entropy),
               "token_confidence: logits and the outputs must be given, got a null pointer");
    const auto piece_of = MAGE_CPU_PICK(confidence_piece);
    const int64_t num_pieces = (params.vocab_size + kPiece - 1) / kPiece;
    const int64_t bytes = dtype_bytes(params.dtype);
    std::vector<ConfidencePiece> pieces(params.num_rows * num_pieces);
    const int64_t grain = kPiecesPerTask * kPiece / std::min(kPiece, params.vocab_size);
    core::parallel_for(params.num_rows * num_pieces, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / num_pieces, first = i % num_pieces * kPiece;
            const char* logits =
                static_cast<const char*>(params.logits) + (row * params.stride_logits_row + first) * bytes;
            piece_of(logits, params.dtype, std::min(kPiece, params.vocab_size - first), &pieces[i]);
        }
    });
    for (int64_t row = 0; row < params.num_rows; ++row) {
        const Confidence confidence = join(params, row, pieces.data() + row * num_pieces, num_pieces);
        params.token[row] = confidence.token;
        params.prob[row] = confidence.prob;
        params.entropy[row] = confidence.entropy;
    }
}

}  // namespace cpu
}  // namespace mage
